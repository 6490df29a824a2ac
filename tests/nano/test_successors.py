"""nano2's and nano3's recipe: the same latents as nano's, what is learned from nano-dev, and how it is judged."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from miniflux.conditions import Reference
from miniflux.models.autoencoder import Flux2AutoencoderConfig
from miniflux.nano import scenes
from miniflux.nano.recipe import edits, successors
from miniflux.nano.recipe.export import Nano
from miniflux.nano.recipe.pairs import latents_of
from miniflux.nano.recipe.realism import encoders_of
from miniflux.sampling import initial_noise, pack
from miniflux.sampling.schedules import flux3_schedule
from miniflux.text.chat import load_chat_tokenizer
from miniflux.variants import NANO_LM, VARIANTS

SIZE = (96, 64)  # width and height: of no canvas that is compiled


@pytest.fixture(scope="module")
def nano() -> Nano:
    return Nano.load()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lm")
    successors.train_tokenizer(folder)
    return folder


def student(name: str, files: Path) -> successors.Student:
    variant = VARIANTS[name]
    assert variant.chat is not None
    torch.manual_seed(5)
    made = successors.Student(variant, load_chat_tokenizer(files, variant.chat))
    for parameter in made.parameters():  # nothing is silent, as it is at the start
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return made


def test_the_autoencoder_has_the_same_latents(nano: Nano) -> None:
    """Encoded and decoded as by nano's own, but for the order of the numbers."""
    config = VARIANTS["nano2"].autoencoder
    assert isinstance(config, Flux2AutoencoderConfig)
    made = successors.successor_autoencoder(nano.autoencoder, config)
    pixels = torch.rand(1, 3, 96, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        old, new = nano.autoencoder.encode(pixels), made.encode(pixels)
        torch.testing.assert_close(pack(new, 1), pack(old), rtol=0, atol=1e-5)
        torch.testing.assert_close(made.decode(new), nano.autoencoder.decode(old), rtol=0, atol=1e-5)


def test_the_tokenizer_gives_back_what_it_reads(files: Path, tmp_path: Path) -> None:
    """The same files twice; each word of scenes is one token; any text comes back from its tokens."""
    successors.train_tokenizer(tmp_path)
    assert all((tmp_path / path.name).read_bytes() == path.read_bytes() for path in files.iterdir())
    form = VARIANTS["nano2"].chat
    assert form is not None
    tokenizer = load_chat_tokenizer(files, form)
    empty = len(tokenizer.tokens(""))
    for word in (*scenes.PALETTE, *scenes.SHAPES, "background"):
        assert len(tokenizer.tokens(f"a {word}")) == empty + 2, word
    assert max(tokenizer.tokens("a \U0001f98a with é")) < NANO_LM.vocab_size


def test_blends_are_told_from_their_parts() -> None:
    """The third picture has the shape of one and the colour of the other; held-out pairs only where asked for."""
    rng = random.Random(2)
    for held_out in (False, True):
        for _ in range(40):
            blend = edits.blend(rng, held_out)
            (a,), (b,), (after,) = blend.first.shapes, blend.second.shapes, blend.after.shapes
            first = blend.words.index("first") < blend.words.index("second")
            shape, colour = (a, b) if first else (b, a)
            assert (after.kind, after.colour) == (shape.kind, colour.colour)
            assert after.colour != blend.after.background
            assert ((after.colour, after.kind) in scenes.HELD_OUT) == held_out


def test_jumps_are_about_those_of_a_run() -> None:
    """Half of them are the run's own, each goes down, the last one to 0."""
    levels, (now, then) = flux3_schedule(4), successors.jumps(4000, 4)
    assert bool((then < now).all()) and float(now.max()) <= 1
    ends = torch.tensor(levels[1:])
    assert bool(((then[:, None] - ends).abs().min(1).values < 1e-6).all())
    starts = torch.tensor(levels[:-1])
    own = ((now[:, None] - starts).abs().min(1).values < 1e-6).float().mean()
    assert 0.4 < float(own) < 0.6


def test_the_teacher_shows_the_mean_of_a_way(nano: Nano) -> None:
    """A jump that is nearly none is the velocity there; a long one is what Euler's steps make."""
    teacher = successors.Teacher(nano.transformer, encoders_of(nano.text))
    x, words = torch.randn(1, 24, 64, generator=torch.Generator().manual_seed(3)), ["a red circle on a blue background"]
    now, strength = torch.tensor([0.8]), torch.tensor([3.0])
    here = teacher(words, x, SIZE, now, strength, now)
    torch.testing.assert_close(teacher(words, x, SIZE, now, strength, now - 1e-3), here, rtol=0, atol=0.05)
    y, levels = x, torch.linspace(0.8, 0.4, successors.SUBSTEPS + 1)
    for a, b in pairwise(levels):
        y = y + (b - a) * teacher(words, y, SIZE, a[None], strength, a[None])
    mean = teacher(words, x, SIZE, now, strength, torch.tensor([0.4]))
    torch.testing.assert_close(mean, (x - y) / 0.4, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", successors.GOALS)
def test_a_step_of_training_reaches_every_weight(name: str, nano: Nano, files: Path) -> None:
    """Both losses together: each weight, those of the language model among them, has a finite gradient."""
    one, rng = student(name, files), random.Random(4)
    teacher = successors.Teacher(nano.transformer, encoders_of(nano.text))
    words, x0, seen = successors.blends(2, SIZE, nano.autoencoder, rng)
    assert seen.shape == (2, 2 * x0.shape[1], 64)
    blended = successors.blend_loss(one, SIZE, words, x0, seen)
    taught = successors.taught_loss(one, teacher, ["a red circle on a blue background"] * 2, x0, SIZE, rng)
    (blended + taught).backward()
    without = [name for name, p in one.named_parameters() if p.grad is None or not bool(p.grad.isfinite().all())]
    assert not without and all(0 < loss.item() < 10 for loss in (blended, taught))


@pytest.mark.parametrize("name", successors.GOALS)
def test_what_it_learned_with_is_what_draws(name: str, nano: Nano, files: Path) -> None:
    """The network is called in training as the pipeline calls it: the same velocity of the same latents."""
    one = student(name, files)
    config = one.variant.autoencoder
    assert isinstance(config, Flux2AutoencoderConfig)
    pipe = successors.drawing(one, successors.successor_autoencoder(nano.autoencoder, config))
    prompt, rng = "a red circle on a blue background", random.Random(1)
    shown = scenes.render(scenes.one_object(rng), *SIZE)
    drawn = pipe.generate(prompt, seed=2, schedule=[1.0, 0.0], conditions=[Reference(shown)], width=96, height=64)
    x = pack(initial_noise(64, 96, 2, 64, 1), 1)
    with torch.no_grad():
        seen = latents_of(nano.autoencoder, [np.asarray(shown)])
        v = one([prompt], x, SIZE, torch.ones(1), torch.full((1,), 3.0), torch.zeros(1), seen)
    assert drawn.latents is not None
    torch.testing.assert_close(x - v, pack(drawn.latents, 1), rtol=0, atol=2e-2)  # pictures are encoded in bfloat16
