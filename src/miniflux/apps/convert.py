"""`miniflux convert`: model files in another layout or format."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miniflux.apps import arguments, console
from miniflux.apps.outputs import new_file

if TYPE_CHECKING:
    from PIL import Image

PROMPTS = ("a red circle on a blue background", "a green ring left of a white heart on a black background")
WORST = 10  # layers that are listed unless -v asks for all


def add(commands: Any) -> None:
    """Add the command to the command line."""
    convert = commands.add_parser(
        "convert",
        help="write model files in another layout or format",
        description="Write a transformer, an autoencoder, a text encoder, or all of them in another layout, another "
        "format, or both. One tensor is in memory at a time; an interrupted run goes on where it stopped; the result "
        "is read back and compared, and the error of every layer is told.",
        epilog="Formats: float32, float16, bfloat16; fp8 (scaled, as ComfyUI has it), fp8_e4m3, fp8_e5m2, fp8_rows, "
        "int8, nf4, fp4, nvfp4 to .safetensors; Q8_0, Q6_K, Q5_K, Q5_1, Q5_0, Q4_K, Q4_1, Q4_0, IQ4_NL, IQ4_XS, Q3_K, "
        "Q2_K to .gguf (miniflux[gguf]). "
        "Of a transformer and of text encoders the linears of the blocks are packed; everything else keeps its dtype.",
    )
    convert.add_argument("source", type="path", metavar="IN", help="a file, a folder with shards, or a model folder")
    convert.add_argument(
        "target", type="path", metavar="OUT", help="ends in .safetensors or .gguf; without ending a folder"
    )
    convert.add_argument(
        "--layout",
        metavar="NAME",
        help="original, diffusers, all-in-one (FLUX.1), llama.cpp (T5, language models); default: that of the source",
    )
    convert.add_argument(
        "--format", metavar="NAME", help="how weights are stored; default: as they are, packed ones too"
    )
    convert.add_argument(
        "--picture", action="store_true", help="draw with both and tell how far apart the pictures are (PSNR)"
    )
    convert.add_argument(
        "--weights", type="path", metavar="FOLDER", help="for --picture: where the model's other files are"
    )
    convert.add_argument("-v", "--verbose", action="store_true", help="list every layer, and say more")
    arguments.add_force(convert)
    convert.set_defaults(run=_convert)


def _convert(options: argparse.Namespace) -> None:
    from tqdm import tqdm

    from miniflux.conversion.converting import convert
    from miniflux.conversion.outputs import names_file

    target = Path(options.target)
    place = new_file(target, options.force, [options.source], folder=not names_file(target))
    before = pictures(options.source, options.weights) if options.picture else []  # what cannot be drawn is said first
    with place as path, tqdm(unit="tensor", leave=False, disable=not sys.stderr.isatty()) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        made = convert(options.source, path, layout=options.layout, format=options.format, progress=progress)
    console.say(made.report(None if options.verbose else WORST))
    if options.picture:
        from miniflux.result import psnr

        for prompt, old, new in zip(PROMPTS, before, pictures(path, options.weights), strict=True):
            console.say(f"picture: PSNR {psnr(old, new):.1f} dB, {prompt!r}")


def pictures(path: str | Path, weights: str | Path | None = None) -> list[Image.Image]:
    """What a model draws of `PROMPTS`, with seed 0 and its own defaults.

    Raises:
        MinifluxError: it cannot be loaded as a pipeline.
    """
    from miniflux.pipeline import load

    return load(path, weights=weights).generate(list(PROMPTS), seed=0).images
