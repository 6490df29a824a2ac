"""The Hugging Face cache of this machine: where it is, and which snapshot of a repository counts."""

from __future__ import annotations

import importlib.util
import os
import warnings
from pathlib import Path

# In the order in which they count; the third is the old name of the first.
VARIABLES = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME")


def hub_cache() -> Path:
    """The folder of the cache, as the variables of the environment say now.

    The package huggingface_hub is asked, where it is installed. Its own constants are those of the moment in which it
    was imported; so its file of constants is read again, without the rest of the package.
    """
    if not any(os.environ.get(name) == "" for name in VARIABLES):  # an empty variable is none; they take it for a path
        found = _as_the_package_says()
        if found:
            return Path(found)
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    cache = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or os.path.join(home, "hub")
    return Path(os.path.expandvars(os.path.expanduser(cache)))


def _as_the_package_says() -> str | None:
    """`HF_HUB_CACHE` by the rules of the installed huggingface_hub; None if it is not there, or cannot be asked so."""
    try:
        package = importlib.util.find_spec("huggingface_hub")
        places = list(package.submodule_search_locations or ()) if package else []
        if not places:
            return None
        spec = importlib.util.spec_from_file_location("_constants", Path(places[0]) / "constants.py")
        assert spec is not None and spec.loader is not None
        constants = importlib.util.module_from_spec(spec)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of variables that are not used any more: theirs to say
            spec.loader.exec_module(constants)
    except (ImportError, OSError, ValueError):
        return None
    return getattr(constants, "HF_HUB_CACHE", None)


def repository_folder(repository: str) -> Path:
    """Where the cache keeps a repository of models."""
    return hub_cache() / ("models--" + repository.replace("/", "--"))


def snapshot(repository: str) -> Path | None:
    """The cached snapshot of a repository's main branch, if there is one. Its files are links to blobs, or (on systems
    without links) the files themselves."""
    folder = repository_folder(repository)
    try:
        revision = (folder / "refs" / "main").read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    found = folder / "snapshots" / revision
    return found if revision and found.is_dir() else None
