"""Prompt upsampling: language models that write long prompts from short ones, and say where things are."""

from miniflux.upsampling.boxes import Layout, Row, parsed, request
from miniflux.upsampling.loading import load_upsampler
from miniflux.upsampling.rewriting import Upsampler

__all__ = ["Layout", "Row", "Upsampler", "load_upsampler", "parsed", "request"]
