"""Make the nano models: `python -m miniflux.nano.recipe [FOLDER]` (or `make nano`).

Stages run in order, each resumable; several hours on two CPU cores. Everything that is made on the way stays in
the folder (default runs/nano); the finished files go to its `weights` folder, to be copied over the package's own.
"""

from __future__ import annotations

import argparse
import copy
import logging
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import miniflux
from miniflux.models.autoencoder import Autoencoder
from miniflux.models.flux1 import Flux1
from miniflux.nano import scenes
from miniflux.nano.recipe import autoencoder as stage1
from miniflux.nano.recipe import polish
from miniflux.nano.recipe.adherence import judge
from miniflux.nano.recipe.distil import SCHNELL_GUIDANCE, dev_from, guidance_loss, schnell_from, steps_loss
from miniflux.nano.recipe.export import Nano, export_encoders, export_network
from miniflux.nano.recipe.flow import OTHERS, SMALL, Phase, Teacher, run, teacher_loss
from miniflux.nano.recipe.pairs import Pairs
from miniflux.nano.recipe.text import T5_LENGTH, TextEncoders, train_tokenizers
from miniflux.pipeline import Pipeline
from miniflux.text import Text, load_clip_tokenizer, load_t5_tokenizer
from miniflux.training.state import TrainingState
from miniflux.variants import NANO_AUTOENCODER, VARIANTS

M = TypeVar("M", bound=nn.Module)

log = logging.getLogger(__name__)

MAIN = (128, 128)
# Where shapes are hardest to learn: few latents for each of them, or far more than on the main canvas.
NARROW = tuple(size for size in OTHERS if min(size) == 64)
LARGE = tuple(size for size in OTHERS if min(size) >= 160)
LARGEST = ((192, 192),)
LONG = tuple(size for size in NARROW if max(size) >= 160)
ALL = (MAIN, *OTHERS, *(2 * NARROW), *(6 * SMALL), *(12 * LARGE))
EXTREME = (MAIN, *OTHERS, *(2 * NARROW), *(3 * SMALL), *(10 * LARGE), *(40 * LARGEST))
SMALLEST = (MAIN, *OTHERS, *(12 * NARROW), *(8 * LONG), *(6 * LARGE))
EVEN = (MAIN, *(4 * OTHERS), *(3 * NARROW), *(4 * LONG), *(3 * LARGE), *(6 * LARGEST))
TEACHER = [
    Phase("teacher 64", 6500, SMALL, 128, 1.5e-3),
    Phase("teacher 128", 9_000, (MAIN, *OTHERS), 48, 7.5e-4, main=0.9),
    Phase("teacher sizes", 5_500, (MAIN, *OTHERS), 48, 7.5e-4, main=0.2),
    Phase("teacher hard sizes", 2_800, ALL, 48, 7.5e-4, main=0.25),
    Phase("teacher outlines", 4_200, EXTREME, 48, 1e-3, main=0.2),
    Phase("teacher small shapes", 1_300, SMALLEST, 48, 7.5e-4, main=0.2),
    Phase("teacher even", 5_500, EVEN, 48, 1e-3, main=0.25),
]
DEV = [
    Phase("dev", 300, ALL, 48, 4e-4, main=0.25),
    Phase("dev small shapes", 300, SMALLEST, 48, 4e-4, main=0.25),
]
SCHNELL = [
    Phase("schnell", 300, ALL, 48, 4e-4, main=0.25),
    Phase("schnell small shapes", 300, SMALLEST, 48, 4e-4, main=0.25),
]
OWN_DEV = polish.Phase("dev, own pictures", 1_300, EVEN, 24, 4e-4)
OWN_SCHNELL = polish.Phase("schnell, own pictures", 500, EVEN, 24, 4e-4)

POOL = 4_000  # pictures of the main canvas kept as latents; a quarter for the short stages
REPORT = {"teacher": 2000, "dev": 150, "schnell": 150, "own": 200}  # steps between sheets
SHEET = 36  # pictures on a sheet


def report(name: str, flux: Flux1, encoders: TextEncoders, autoencoder: Autoencoder, folder: Path, step: int) -> float:
    """Draw unseen prompts, save them as a sheet, log and return the share that shows what was asked for."""
    variant = VARIANTS["nano-dev" if flux.config.guidance_embed else "nano-schnell"]
    if name == "teacher":
        variant = replace(variant, steps=12, shift=True)
    text = Text(encoders.clip, encoders.t5, encoders.clip_tokenizer, encoders.t5_tokenizer, T5_LENGTH)
    pipe = Pipeline(variant, flux, autoencoder, text)
    rng = random.Random(99)
    wanted = [(scenes.two_objects if i % 2 else scenes.one_object)(rng, held_out=i % 3 == 0) for i in range(SHEET)]
    result = pipe.generate([scene.caption for scene in wanted])
    result.save(folder / f"{name}-{step:05d}.png")
    right = sum(judge(image, scene).all for image, scene in zip(result.images, wanted, strict=True)) / SHEET
    log.info("%s step %d: %.0f %% of %d prompts right", name, step, 100 * right, SHEET)
    return right


def averaged(state: TrainingState[M]) -> M:
    """The running average of a finished run, to be used as it is."""
    return copy.deepcopy(state.average).eval().requires_grad_(False)


def matrices(name: str) -> bool:
    """Weights that Muon trains: the matrices inside the blocks. The rest, embeddings among it, is AdamW's."""
    return "blocks" in name or "encoder.block" in name or "encoder.layers" in name


def make(folder: Path, start: Path | None = None, begin: int = 0, again: bool = False) -> None:
    """All stages, from wherever the last run stopped; or the later ones, from the weights in the folder `start`, whose
    teacher is taken to have made `begin` steps. `again`: its autoencoder is trained further, too."""
    before = None if start is None else miniflux.load("nano-dev", weights=start)
    if start is not None and not (folder / "text").exists():
        for name in ("tokenizer", "tokenizer_2"):
            shutil.copytree(start / name, folder / "text" / name)
    if not (folder / "text").exists():
        train_tokenizers(folder / "text")
    clip_tokenizer = load_clip_tokenizer(folder / "text" / "tokenizer")
    t5_tokenizer = load_t5_tokenizer(folder / "text" / "tokenizer_2")

    finished = None if before is None else Nano.of(before).autoencoder.float()
    autoencoder = stage1.train(folder, before=finished) if finished is None or again else finished
    autoencoder = autoencoder.requires_grad_(False).to(memory_format=torch.channels_last)  # pyright: ignore
    stated = NANO_AUTOENCODER
    if autoencoder.config != stated:
        log.warning("write these into variants/sizes.py: scale_factor %s, shift_factor %s",
                    autoencoder.config.scale_factor, autoencoder.config.shift_factor)  # fmt: skip
    flat, lit, small = (stage1.psnr(autoencoder, *how) for how in ((False, 128), (True, 128), (False, 64)))
    log.info("autoencoder: %.1f dB flat, %.1f dB lit, %.1f dB flat at 64x64", flat, lit, small)

    torch.manual_seed(3)
    teacher = Teacher(TextEncoders(clip_tokenizer, t5_tokenizer))
    if before is not None:
        teacher.start_from(before)
    about = {"stage": "teacher"}
    state = TrainingState(teacher, folder / "teacher", TEACHER[0].rate, about, decay=0.998, matrices=matrices)
    if not state.resume() and before is not None:
        state.step = begin

    def teacher_report(step: int) -> None:
        report("teacher", state.average.flux, state.average.text, autoencoder, folder, step)

    run(state, TEACHER, autoencoder, partial(teacher_loss, teacher), 3, POOL, (REPORT["teacher"], teacher_report))
    teacher = averaged(state)

    dev_state = TrainingState(dev_from(teacher), folder / "dev", DEV[0].rate, {"stage": "dev"}, decay=0.998)
    dev_state.resume()

    def dev_report(step: int) -> None:
        report("dev", dev_state.average, teacher.text, autoencoder, folder, step)

    loss = partial(guidance_loss, dev_state.model, teacher)
    run(dev_state, DEV, autoencoder, loss, 4, POOL // 4, (REPORT["dev"], dev_report))
    dev = averaged(dev_state)

    schnell_state = TrainingState(
        schnell_from(teacher), folder / "schnell", SCHNELL[0].rate, {"stage": "schnell"}, decay=0.998
    )
    schnell_state.resume()

    def schnell_report(step: int) -> None:
        report("schnell", schnell_state.average, teacher.text, autoencoder, folder, step)

    loss = partial(steps_loss, schnell_state.model, dev, teacher)
    run(schnell_state, SCHNELL, autoencoder, loss, 5, POOL // 4, (REPORT["schnell"], schnell_report))

    dev, schnell = polished(folder, dev, averaged(schnell_state), teacher.text, autoencoder)
    weights = folder / "weights"
    export_encoders(teacher.text, folder / "text", weights)
    export_network(autoencoder, weights / "ae.safetensors")
    export_network(dev, weights / VARIANTS["nano-dev"].file)
    export_network(schnell, weights / VARIANTS["nano-schnell"].file)
    log.info("finished: %s", weights)


def polished(
    folder: Path, dev: Flux1, schnell: Flux1, encoders: TextEncoders, autoencoder: Autoencoder
) -> tuple[Flux1, Flux1]:
    """nano-dev after learning from its own pictures, and nano-schnell after learning from those of nano-dev."""
    pairs = partial(Pairs, autoencoder)

    def show(name: str, state: TrainingState[Flux1]) -> tuple[int, Callable[[int], object]]:
        return REPORT["own"], partial(report, name, state.average, encoders, autoencoder, folder)

    about = {"stage": "dev, own pictures"}
    student = copy.deepcopy(dev).requires_grad_(True)
    state = TrainingState(student, folder / "dev-own", OWN_DEV.rate, about, decay=0.995, matrices=matrices)
    state.resume()
    loss = partial(polish.dev_loss, student, dev, encoders)
    polish.run(state, OWN_DEV, partial(pairs, state.average, encoders), loss, 71, show("dev-own", state))
    finished = averaged(state)

    about = {"stage": "schnell, own pictures"}
    student = copy.deepcopy(schnell).requires_grad_(True)
    state = TrainingState(student, folder / "schnell-own", OWN_SCHNELL.rate, about, decay=0.995, matrices=matrices)
    state.resume()
    loss = partial(polish.schnell_loss, student, encoders)
    built_in = (SCHNELL_GUIDANCE, SCHNELL_GUIDANCE)
    drawn = partial(pairs, finished, encoders, guidance=built_in)
    polish.run(state, OWN_SCHNELL, drawn, loss, 51, show("schnell-own", state))
    return finished, averaged(state)


def main() -> None:
    arguments = argparse.ArgumentParser(prog="miniflux.nano.recipe", description=__doc__)
    arguments.add_argument("folder", type=Path, nargs="?", default=Path("runs/nano"))
    arguments.add_argument("--start", type=Path, help="a folder of finished weights, to train them further")
    arguments.add_argument("--begin", type=int, default=0, metavar="N", help="the teacher's step to go on from there")
    arguments.add_argument("--again", action="store_true", help="train the autoencoder of --start further, too")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    # Attention over a hundred tokens trains faster as plain matrix products than with the CPU's flash kernel.
    # One thread for forward and backward passes: two would each keep a team of workers, which wait for each other.
    with sdpa_kernel(SDPBackend.MATH), torch.autograd.set_multithreading_enabled(False):
        options = arguments.parse_args()
        make(options.folder, options.start, options.begin, options.again)


if __name__ == "__main__":
    main()
