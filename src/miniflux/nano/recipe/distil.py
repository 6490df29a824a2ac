"""Stages 3 and 4 of the nano recipe: a guidance input learned from the teacher, then four steps learned from that."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miniflux.models.flux1 import Flux1
from miniflux.nano.recipe.flow import DEV, SCHNELL, Teacher, embed, noise_levels, velocity
from miniflux.sampling import euler_step
from miniflux.training.flow import mix

GUIDANCE_RANGE = (1.0, 6.0)
SCHNELL_STEPS = 4
SCHNELL_GUIDANCE = 3.0  # what nano-schnell has built in; the default of nano-dev
SUBSTEPS = 4  # steps of nano-dev that one step of nano-schnell learns to make


def dev_from(teacher: Teacher) -> Flux1:
    """A network with a guidance input that starts as the teacher: the new input is silent at first."""
    student = Flux1(DEV)
    for module in student.guidance_in.children():
        assert isinstance(module, nn.Linear)
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
    nn.init.zeros_(student.guidance_in.out_layer.weight)
    student.load_state_dict({**student.state_dict(), **teacher.flux.state_dict()})
    return student


def guidance_loss(
    student: Flux1, teacher: Teacher, captions: list[str], x0: Tensor, size: tuple[int, int], rng: random.Random
) -> Tensor:
    """Predict in one pass what classifier-free guidance makes of two (arXiv 2210.03142, section 3.1).

    Target: v_u + g * (v_c - v_u), for a random strength g per picture.
    """
    captions = ["" if rng.random() < 0.05 else caption for caption in captions]
    sigmas = noise_levels(len(x0))
    strength = torch.empty(len(x0)).uniform_(*GUIDANCE_RANGE)
    x = mix(x0, torch.randn_like(x0), sigmas)
    with torch.no_grad():
        text = embed(teacher.text, captions, rng)
        empty = teacher.text([""] * len(x0), text.txt.shape[1], masked=text.mask is not None)
        v_c = velocity(teacher.flux, x, size, sigmas, text).float()
        v_u = velocity(teacher.flux, x, size, sigmas, empty).float()
        target = v_u + strength[:, None, None] * (v_c - v_u)
    return F.mse_loss(velocity(student, x, size, sigmas, text, guidance=strength).float(), target)


def steps_loss(
    student: Flux1,
    dev: Flux1,
    teacher: Teacher,
    captions: list[str],
    x0: Tensor,
    size: tuple[int, int],
    rng: random.Random,
) -> Tensor:
    """Make in one Euler step what nano-dev makes in several (progressive distillation, arXiv 2202.00512)."""
    at = torch.randint(1, SCHNELL_STEPS + 1, (len(x0),)).float() / SCHNELL_STEPS
    x = start = mix(x0, torch.randn_like(x0), at)
    strength = torch.full((len(x0),), SCHNELL_GUIDANCE)
    width = 1 / (SCHNELL_STEPS * SUBSTEPS)
    with torch.no_grad():
        text = embed(teacher.text, captions, rng)
        for i in range(SUBSTEPS):
            v = velocity(dev, x, size, at - i * width, text, guidance=strength).float()
            x = euler_step(x, v, 0.0, -width)
        target = (start - x) * SCHNELL_STEPS
    return F.mse_loss(velocity(student, start, size, at, text).float(), target)


def schnell_from(teacher: Teacher) -> Flux1:
    """A network without guidance input that starts as the teacher."""
    student = Flux1(SCHNELL)
    student.load_state_dict(teacher.flux.state_dict())
    return student
