"""nano2 and nano3, FLUX.2 and FLUX.3 at nano's size: `python -m miniflux.nano.recipe.successors nano2|nano3 [FOLDER]`.

Their autoencoder is nano's in the form of FLUX.2's, with the same latents, so that nano-dev can teach them: they learn
its velocities, guidance among them, and from pictures how two references make a third. A small language model is
trained along with each; that of nano3 begins as that of nano2. nano3 learns to make in one step what nano-dev makes in
several (a flow map, arXiv 2406.07507). Hours each on a CPU core.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import miniflux
from miniflux.checkpoints import load_into, save
from miniflux.checkpoints.networks import BY_CONFIG
from miniflux.conditions import Reference
from miniflux.families import FAMILIES
from miniflux.models.autoencoder import EPS, Autoencoder, Flux2Autoencoder, Flux2AutoencoderConfig
from miniflux.models.causal_lm import CausalLm
from miniflux.models.flux1 import Flux1
from miniflux.nano import scenes
from miniflux.nano.recipe import edits
from miniflux.nano.recipe.adherence import judge
from miniflux.nano.recipe.distil import GUIDANCE_RANGE, SCHNELL_GUIDANCE
from miniflux.nano.recipe.editing import MAIN, MATTERS, Pool, changed, high_levels, shaped, trained
from miniflux.nano.recipe.export import Nano, export_network
from miniflux.nano.recipe.flow import OTHERS, SHORT, Data, compiled, initial_weights, noise_levels, velocity
from miniflux.nano.recipe.pairs import latents_of
from miniflux.nano.recipe.realism import encoders_of
from miniflux.nano.recipe.text import TextEncoders, byte_pair_merges, corpus, varied
from miniflux.pipeline import Pipeline
from miniflux.sampling.forwards import Told, Words
from miniflux.sampling.schedules import FLUX3_SHIFT
from miniflux.text.chat import ChatText, ChatTokenizer, load_chat_tokenizer, qwen_pipeline
from miniflux.training.flow import mix
from miniflux.training.state import TrainingState
from miniflux.variants import NANO_LM, VARIANTS, Variant

log = logging.getLogger(__name__)

MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")  # Qwen's, as far as prompts need them
SMALL = (64, 64)
BLENDS = 0.35  # share of the batches that show two references
EMPTY = 0.05  # share of captions that are left out
JUMPS = 0.6  # share of the batches of a flow map that are jumps; the others are slopes at one place
SUBSTEPS = 4  # of nano-dev, that make one jump
TOLD = 36  # prompts of a report


@dataclass(frozen=True)
class Goal:
    """One of the two: the first `small` steps are on a small canvas, with `many` pictures each."""

    name: str
    small: int
    many: int
    steps: int
    batch: int
    rate: float


GOALS = {
    goal.name: goal
    for goal in (Goal("nano2", 3_000, 64, 9_500, 28, 1.5e-3), Goal("nano3", 3_000, 64, 10_000, 28, 1.5e-3))
}


def successor_autoencoder(autoencoder: Autoencoder, config: Flux2AutoencoderConfig) -> Flux2Autoencoder:
    """nano's autoencoder in the form of FLUX.2's: the same latents, patchified."""
    made, sizes = Flux2Autoencoder(config), autoencoder.config
    with torch.no_grad():
        for conv in (made.encoder.quant_conv, made.decoder.post_quant_conv):  # which it has not
            nn.init.dirac_(conv.weight)
            nn.init.zeros_(conv.bias)  # pyright: ignore
        assert made.bn.running_mean is not None and made.bn.running_var is not None
        made.bn.running_mean.fill_(sizes.shift_factor)
        made.bn.running_var.fill_(sizes.scale_factor**-2 - EPS)
    made.load_state_dict({**made.state_dict(), **autoencoder.state_dict()})  # what it has not is as made above
    return made.eval().requires_grad_(False)


def train_tokenizer(folder: Path) -> None:
    """Write the three files of a tokenizer like Qwen's, learned from captions and from instructions."""
    rng = random.Random(1)
    told = [words for _ in range(4000) for words in (edits.edit(rng).words, edits.blend(rng).words)]
    lines = corpus() + [varied(words, rng) for words in told]
    merges = byte_pair_merges(lines, qwen_pipeline(Tokenizer(BPE())), "")
    tokens = [*sorted(ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    assert len(vocabulary) + len(MARKS) <= NANO_LM.vocab_size, "the registry states a smaller vocabulary"
    added = {
        str(len(vocabulary) + i): {"content": mark, "special": mark.startswith("<|")} for i, mark in enumerate(MARKS)
    }
    folder.mkdir(parents=True, exist_ok=True)
    text = "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges)
    (folder / "merges.txt").write_text(text, "utf-8")
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), "utf-8")
    about = {"added_tokens_decoder": added, "tokenizer_class": "Qwen2Tokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n", "utf-8")


class Student(nn.Module):
    """A transformer of any family, and the language model that reads for it."""

    def __init__(self, variant: Variant, tokenizer: ChatTokenizer) -> None:
        super().__init__()
        assert variant.lm is not None and variant.chat is not None
        self.network: Any = BY_CONFIG[type(variant.transformer)].kind(variant.transformer)
        self.lm: CausalLm = CausalLm(variant.lm)
        self.variant, self.tokenizer, self.family = variant, tokenizer, FAMILIES[variant.family]
        initial_weights(self.network)
        nn.init.normal_(self.lm.model.embed_tokens.weight, std=0.5)

    def words(self, prompts: list[str]) -> Words:
        """What the transformer reads."""
        tokens = self.tokenizer(prompts, self.variant.t5_length)
        hidden = self.lm(tokens.ids, tokens.mask, tokens.positions, self.tokenizer.form.layers)
        txt = torch.cat(hidden, dim=-1)
        return Words(txt, self.family.text_ids(*txt.shape[:2]))

    def forward(
        self,
        prompts: list[str],
        x: Tensor,
        size: tuple[int, int],
        sigmas: Tensor,
        strength: Tensor,
        target: Tensor | None = None,
        seen: Tensor | None = None,
    ) -> Tensor:
        """The velocity of packed latents (B, L, 64) of a canvas; `seen` (B, R, 64) of references of the same size."""
        rows, columns, drawn = size[1] // 16, size[0] // 16, x.shape[1]
        ids = self.family.image_ids(len(x), rows, columns)
        if seen is not None:
            numbers = range(1, seen.shape[1] // drawn + 1)
            there = torch.cat([self.family.reference_ids(number, rows, columns) for number in numbers], dim=1)
            x, ids = torch.cat((x, seen), dim=1), torch.cat((ids, there.expand(len(x), -1, -1)), dim=1)
        network = compiled(self.network) if size in (SMALL, MAIN) else self.network
        told = Told(x, ids, self.words(prompts), sigmas, strength, sigmas if target is None else target, drawn)
        return self.family.velocity(network, told)[:, :drawn].float()


@dataclass(frozen=True)
class Teacher:
    """nano-dev with its text encoders."""

    flux: Flux1
    encoders: TextEncoders

    @torch.no_grad()
    def __call__(
        self, captions: list[str], x: Tensor, size: tuple[int, int], sigmas: Tensor, strength: Tensor, target: Tensor
    ) -> Tensor:
        """Its velocity, or where `target` (B,) is a lower noise level, the mean one on the way there."""
        text, way = self.encoders(captions, SHORT), sigmas - target
        flux = compiled(self.flux) if size in (SMALL, MAIN) else self.flux

        def slope(y: Tensor, at: Tensor) -> Tensor:
            return velocity(flux, y, size, at, text, guidance=strength).float()

        if not bool(way.any()):
            return slope(x, sigmas)
        y = x
        for i in range(SUBSTEPS):
            y = y - (way / SUBSTEPS)[:, None, None] * slope(y, sigmas - way * i / SUBSTEPS)
        return (x - y) / way[:, None, None]


def taught_loss(
    student: Student, teacher: Teacher, captions: list[str], x0: Tensor, size: tuple[int, int], rng: random.Random
) -> Tensor:
    """Predict what nano-dev predicts; a flow map also what it makes in several steps."""
    captions = ["" if rng.random() < EMPTY else caption for caption in captions]
    sigmas, strength = noise_levels(*x0.shape[:2]), torch.empty(len(x0)).uniform_(*GUIDANCE_RANGE)
    target = sigmas
    if flow_map(student):
        strength = torch.full_like(strength, SCHNELL_GUIDANCE)  # is built in
        if rng.random() < JUMPS:
            sigmas, target = jumps(len(x0), student.variant.steps)
    x = mix(x0, torch.randn_like(x0), sigmas)
    wanted = teacher(captions, x, size, sigmas, strength, target)
    v = student(captions, x, size, sigmas, strength, target)
    return weighted(v, wanted, shaped(x0))


def blend_loss(student: Student, size: tuple[int, int], words: list[str], x0: Tensor, seen: Tensor) -> Tensor:
    """Flow matching towards the third picture, beside the two. There is just one, so that the mean velocity is the same
    on any way."""
    batch, tokens, _ = x0.shape
    sigmas, noise = high_levels(batch, tokens), torch.randn_like(x0)
    strength, target = torch.empty(batch).uniform_(*GUIDANCE_RANGE), sigmas
    if flow_map(student) and torch.rand(()) < JUMPS:
        sigmas, target = jumps(batch, student.variant.steps)
    v = student(words, mix(x0, noise, sigmas), size, sigmas, strength, target, seen)
    first, second = seen.chunk(2, dim=1)
    return weighted(v, noise - x0, shaped(x0) + 0.5 * (changed(x0, first) + changed(x0, second)))


def flow_map(student: Student) -> bool:
    """Whether it is told where a step jumps to."""
    return bool(getattr(student.variant.transformer, "flow_map", False))


def jumps(batch: int, steps: int) -> tuple[Tensor, Tensor]:
    """Noise levels (B,) and those that are jumped to: about those of a run of so many steps."""
    even = torch.randint(steps, (batch,)) + torch.rand(batch) * 0.5
    even = torch.where(torch.rand(batch) < 0.5, even.floor(), even)  # the run's own, half of the time

    def shifted(t: Tensor) -> Tensor:
        return FLUX3_SHIFT * t / (1 + (FLUX3_SHIFT - 1) * t)

    return shifted(1 - even / steps), shifted(1 - (even.floor() + 1) / steps)


def weighted(v: Tensor, wanted: Tensor, matters: Tensor) -> Tensor:
    """Mean squared error, in which tokens count more that matter (B, L)."""
    counts = 1 + MATTERS * matters
    return (counts * (v - wanted).square().mean(-1)).mean() / counts.mean()


@torch.no_grad()
def blends(
    count: int, size: tuple[int, int], autoencoder: Autoencoder, rng: random.Random
) -> tuple[list[str], Tensor, Tensor]:
    """Words, the third picture, and the two that it is made of (N, 2 L, 64)."""
    made = [edits.blend(rng) for _ in range(count)]
    three = [one for blend in made for one in (blend.after, blend.first, blend.second)]
    latents = latents_of(autoencoder, [np.asarray(scenes.render(one, *size)) for one in three])
    return [varied(one.words, rng) for one in made], latents[0::3], torch.cat((latents[1::3], latents[2::3]), dim=1)


def matrices(name: str) -> bool:
    """Weights that Muon trains: the matrices inside the blocks."""
    return "blocks" in name or "model.layers" in name


def drawing(student: Student, autoencoder: Flux2Autoencoder) -> Pipeline:
    """It, to draw with."""
    network, lm = copy.deepcopy(student.network), copy.deepcopy(student.lm)
    for one in (network, lm):
        one.eval().requires_grad_(False)
    text = ChatText(lm, student.tokenizer, length=student.variant.t5_length)
    return Pipeline(student.variant, network, autoencoder, text)


def blended(pipe: Pipeline, count: int, seed: int) -> list[bool]:
    """Whether two references become what the words say."""
    rng, told = random.Random(seed), list[bool]()
    for i in range(count):
        blend = edits.blend(rng, held_out=i % 4 == 0)
        seen = [Reference(scenes.render(one, *MAIN), index=n + 1) for n, one in enumerate((blend.first, blend.second))]
        drawn = pipe.generate(blend.words, conditions=seen, seed=i, width=MAIN[0], height=MAIN[1]).images[0]
        told.append(judge(drawn, blend.after).all)
    return told


def captioned(pipe: Pipeline, count: int, seed: int) -> dict[str, list[bool]]:
    """Whether scenes are drawn as their captions say: of one object, of held-out pairs, of two."""
    told: dict[str, list[bool]] = {}
    for kind, scene, held_out in (
        ("one object", scenes.one_object, False),
        ("held-out pairs", scenes.one_object, True),
        ("two objects", scenes.two_objects, False),
    ):
        rng = random.Random(seed)
        wanted = [scene(rng, held_out) for _ in range(count)]
        result = pipe.generate([one.caption for one in wanted], seed=seed)
        told[kind] = [judge(image, one).all for image, one in zip(result.images, wanted, strict=True)]
    return told


def report(student: Student, autoencoder: Flux2Autoencoder, count: int) -> None:
    """Say how much it draws as it should."""
    told(student.variant.name, drawing(student, autoencoder), count)


def told(name: str, pipe: Pipeline, count: int) -> None:
    """Say it of any pipeline."""
    found = {**captioned(pipe, count, 2026), "two references": blended(pipe, count, 5)}
    said = ", ".join(f"{kind} {100 * sum(right) / len(right):.0f} %" for kind, right in found.items())
    log.info("%s: %s of %d each", name, said, count)


def make(name: str, folder: Path, start: Path | None = None, reader: Path | None = None) -> None:
    """Train, or go on training; the finished files go to `weights/NAME` in the folder.

    Args:
        start: a folder with the files of an earlier run, to begin with their weights.
        reader: a folder with the tokenizer and the language model of the other, to begin with.
    """
    goal, variant = GOALS[name], VARIANTS[name]
    assert variant.chat is not None and isinstance(variant.autoencoder, Flux2AutoencoderConfig)
    torch.manual_seed(31)
    nano = Nano.load()
    read = start if reader is None else reader
    tokenizer = folder / "tokenizer" if read is None else read / "tokenizer"
    if read is None and not tokenizer.exists():
        train_tokenizer(tokenizer)
    student = Student(variant, load_chat_tokenizer(tokenizer, variant.chat))
    if start is not None:
        load_into(student.network, start / variant.file, dtype=torch.float32)
    if read is not None:
        load_into(student.lm, read / "text_encoder", dtype=torch.float32)
    student.requires_grad_(True)
    autoencoder = nano.autoencoder.to(memory_format=torch.channels_last)  # pyright: ignore
    successor = successor_autoencoder(nano.autoencoder, variant.autoencoder)
    teacher = Teacher(nano.transformer, encoders_of(nano.text))
    state = TrainingState(student, folder / name, goal.rate, {"goal": name}, decay=0.998, matrices=matrices)
    state.resume()
    for sizes, end, batch in (((SMALL,), goal.small, goal.many), ((MAIN, *OTHERS), goal.steps, goal.batch)):
        torch.compiler.reset()  # a network is compiled for a few shapes at most, and these are others
        if state.step < end:
            _train(state, goal, teacher, autoencoder, sizes, end, batch, partial(report, state.average, successor))
    report(state.average, successor, 100)
    weights = folder / "weights" / name
    export_network(state.average.network, weights / variant.file)
    export_lm(state.average.lm, weights / "text_encoder")
    shutil.copytree(tokenizer, weights / "tokenizer", dirs_exist_ok=True)
    if reader is None:  # nano3 takes that of nano2
        export_network(successor, weights / "ae.safetensors")
    log.info("finished: %s", weights)


def export_lm(lm: CausalLm, folder: Path) -> None:
    """The language model in the layout of Qwen3's repositories."""
    folder.mkdir(parents=True, exist_ok=True)
    save(copy.deepcopy(lm).to(torch.bfloat16), folder / "model.safetensors")
    content = BY_CONFIG[type(lm.config)].as_json(lm.config)
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def _train(
    state: TrainingState[Student],
    goal: Goal,
    teacher: Teacher,
    autoencoder: Autoencoder,
    sizes: tuple[tuple[int, int], ...],
    end: int,
    batch: int,
    said: Callable[[int], None],
) -> None:
    """Train up to a step, mostly on the first of the sizes."""
    data, rng = Data(autoencoder, sizes, 3 + state.step, 3000), random.Random(7 + state.step)
    pool = Pool(blends, autoencoder, sizes[0], 1500, 11 + state.step)

    def loss() -> Tensor:
        if rng.random() < BLENDS:
            words, x0, seen = pool.draw(batch // 2)
            return blend_loss(state.model, pool.size, words, x0, seen)
        captions, x0, size = data.draw(batch, 0.9)
        return taught_loss(state.model, teacher, captions, x0, size, rng)

    while state.step < end:
        trained(state, goal.name, min(end, state.step + 1000), goal.steps, loss)
        said(TOLD)


def main() -> None:
    arguments = argparse.ArgumentParser(prog="miniflux.nano.recipe.successors", description=__doc__)
    arguments.add_argument("goal", choices=[*GOALS])
    arguments.add_argument("folder", type=Path, nargs="?", default=Path("runs/nano"))
    arguments.add_argument("--start", type=Path, metavar="FOLDER", help="begin with the weights of an earlier run")
    arguments.add_argument("--judge", action="store_true", help="judge the bundled one instead of training")
    arguments.add_argument("--reader", type=Path, metavar="FOLDER", help="begin with the language model of this one")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    with sdpa_kernel(SDPBackend.MATH), torch.autograd.set_multithreading_enabled(False):
        options = arguments.parse_args()
        if options.judge:
            told(options.goal, miniflux.load(options.goal), 100)
            return
        make(options.goal, options.folder, options.start, options.reader)


if __name__ == "__main__":
    main()
