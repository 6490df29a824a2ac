"""Edits and holes that the editing models learn from, and the program that judges what they draw."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import miniflux
from miniflux.nano import scenes
from miniflux.nano.recipe import edited, editing, edits
from miniflux.nano.recipe.realism import encoders_of
from miniflux.sampling import image_ids, text_ids


@pytest.mark.parametrize("kind", edits.KINDS)
@pytest.mark.parametrize("held_out", [False, True])
def test_the_judge_knows_a_true_edit_from_none(kind: str, held_out: bool) -> None:
    """The scene that was asked for is right, and the rest kept; the scene before is not; noise beside it is seen."""
    rng = random.Random(7)
    for _ in range(6):
        edit = edits.edit(rng, kind, held_out)
        before, after = (scenes.render(scene, *edited.SIZE) for scene in (edit.before, edit.after))
        assert edited.judged(edit, before, after).good and not edited.judged(edit, before, before).right
        pairs = {(shape.colour, shape.kind) for shape in edit.after.shapes}
        assert bool(pairs & scenes.HELD_OUT) == held_out and edit.words
        noisy = np.clip(np.asarray(after, int) + np.random.default_rng(0).integers(-12, 13, (128, 128, 3)), 0, 255)
        spoiled = edited.judged(edit, before, Image.fromarray(noisy.astype(np.uint8)))
        assert spoiled.kept < edited.KEPT or kind == "background"


def test_holes_hide_what_the_words_ask_for() -> None:
    """Masks of the canvas from 0 to 1, never empty; words and scene go together."""
    rng = random.Random(3)
    for _ in range(60):
        hole = edits.hole(rng, 96, 64)
        assert hole.mask.shape == (64, 96) and 0 < hole.mask.max() <= 1 and hole.mask.min() >= 0
        assert all(shape.kind in hole.words.lower() or hole.mask.min() < 1 for shape in hole.scene.shapes)


@pytest.mark.parametrize("name", editing.GOALS)
def test_both_models_begin_as_nano_dev(name: str) -> None:
    """New channels say nothing yet, and a step of training has a finite gradient for every weight that is used."""
    pipe, goal = miniflux.load("nano-dev", dtype="float32"), editing.GOALS[name]
    words, x0, seen = goal.examples(2, (64, 64), pipe.autoencoder, random.Random(1))
    channels = seen.shape[-1] if name == "fill" else 0
    student = editing.beginning(pipe.transformer, channels).requires_grad_(True)
    text = encoders_of(pipe.text)(words, editing.SHORT)
    told = (
        image_ids(2, 4, 4),
        text.txt,
        text_ids(2, text.txt.shape[1]),
        torch.ones(2),
        text.vec,
        torch.full((2,), 3.0),
    )
    with torch.no_grad():
        wide = torch.cat((x0, seen[..., :channels]), dim=-1)
        torch.testing.assert_close(student(wide, *told), pipe.transformer(x0, *told), rtol=0, atol=1e-5)
    loss = editing.editing_loss(student, goal, encoders_of(pipe.text), (64, 64), words, x0, seen)
    loss.backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in student.parameters())
    assert 0 < float(loss) < 10 and F.relu(loss) == loss
