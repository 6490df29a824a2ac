"""Prompt upsampling: language models that write long prompts from short ones, and say where things are."""

from miniflux.upsampling.boxes import Layout, Row, parsed, request
from miniflux.upsampling.loading import check_upsampler, load_upsampler
from miniflux.upsampling.rewriting import Upsampler
from miniflux.upsampling.written import Written, borrowed, write

__all__ = [
    "Layout",
    "Row",
    "Upsampler",
    "Written",
    "borrowed",
    "check_upsampler",
    "load_upsampler",
    "parsed",
    "request",
    "write",
]
