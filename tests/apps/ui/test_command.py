"""The command `miniflux ui`, in a process of its own."""

from __future__ import annotations

import inspect
import os
import re
import signal
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import httpx
import pytest
from gradio.components import Textbox

from miniflux.apps.ui.command import _no_stubs


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_serves_until_it_is_told_to_stop(how: signal.Signals, tmp_path: Path) -> None:
    """One line says where; the page is there; Ctrl+C ends it, and leaves no temporary folder behind."""
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    arguments = [sys.executable, "-m", "miniflux", "ui"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    heard = partial(signal.signal, how, signal.SIG_DFL)  # a shell's background jobs, these tests perhaps, ignore SIGINT
    with subprocess.Popen(arguments, env=environment, preexec_fn=heard, **pipes) as server:  # type: ignore[call-overload]
        try:
            line = server.stdout.readline()
            found = re.search(r"http://127\.0\.0\.1:\d+", line)
            assert found is not None, server.stderr.read()
            assert "miniflux" in httpx.get(found[0]).text
            server.send_signal(how)
            _, told = server.communicate(timeout=60)
        finally:
            server.kill()
    assert server.returncode == 130
    assert told == "miniflux: stopped\n"
    assert list(tmp_path.iterdir()) == []


def test_gradio_is_kept_from_its_sources_only_while_it_is_imported() -> None:
    before = inspect.getfile
    with _no_stubs():
        with pytest.raises(OSError, match="source code"):
            inspect.getfile(Textbox)
        assert inspect.getfile(Path)
        assert inspect.getfile(tempfile)
    assert inspect.getfile is before
    assert inspect.getfile(Textbox)
