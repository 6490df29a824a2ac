"""What Gradio is imported into: an environment that says nothing to it, and a temporary folder of ours."""

from __future__ import annotations

import importlib
import inspect
import logging
import os
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from miniflux.errors import InputError, MissingExtraError

log = logging.getLogger(__name__)

FOLDER = "GRADIO_TEMP_DIR"  # where temporary folders are made; it is honoured everywhere


def clean(*honoured: str) -> None:
    """Take away from this process whatever would change what the page promises: Gradio's settings, and the proxies of
    the machine. The page asks nobody outside; but Gradio does not even load if a proxy needs a package that is not
    there.

    Args:
        honoured: settings of Gradio that were read before; all others are named as without effect.
    """
    settings = [name for name in sorted(os.environ) if name.startswith("GRADIO_") and name != FOLDER]
    others = [name for name in settings if name not in honoured]
    if others:
        log.warning("without effect here: %s", ", ".join(others))
    proxies = [name for name in os.environ if name.lower().endswith("_proxy")]
    for name in (*settings, *proxies):
        os.environ.pop(name, None)  # Gradio fails while it is imported if one of its own is not as it expects
    os.environ["NO_PROXY"] = "*"  # nor those that the system has without a variable


@contextmanager
def imported() -> Generator[Path]:
    """Gradio is imported, and its files go to a temporary folder, which is gone when the context ends.

    Raises:
        MissingExtraError: Gradio is not installed.
        InputError: no temporary folder can be made.
    """
    beside = os.environ.get(FOLDER) or None
    try:
        folder = tempfile.TemporaryDirectory(prefix="miniflux-ui-", dir=beside, ignore_cleanup_errors=True)
    except OSError as error:
        raise InputError(
            f"{beside or tempfile.gettempdir()}: no temporary folder can be made: {error.strerror}"
        ) from error
    with folder as temporary:
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        os.environ[FOLDER] = str(Path(temporary) / "uploads")  # read when Gradio is imported
        try:
            with no_stubs():
                importlib.import_module("miniflux.apps.ui.launch")
        except ModuleNotFoundError as error:
            if error.name != "gradio":
                raise
            raise MissingExtraError("the page needs Gradio: pip install 'miniflux[ui]'") from error
        yield Path(temporary)


@contextmanager
def no_stubs() -> Generator[None]:
    """While it is imported, Gradio parses the source of all its components and writes stubs for editors beside it: half
    of the time that its import takes, and files that nobody asked for. It leaves out components that have no source
    file, as those of a notebook; for so long, Python says that they have none. A Gradio that does not ask is imported
    as ever."""
    getfile = inspect.getfile

    def hidden(what: Any) -> str:
        if isinstance(what, type) and what.__module__.startswith("gradio."):
            raise OSError("source code not available")  # as Python says of such classes
        return getfile(what)

    inspect.getfile = hidden
    try:
        yield
    finally:
        inspect.getfile = getfile
