"""Where `miniflux.weights.hub` was: what programs import from here is handed on when it is asked for."""

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    return getattr(import_module("miniflux.weights.hub"), name)
