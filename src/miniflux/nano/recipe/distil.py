"""Stages 3 and 4 of the nano recipe: a guidance input learned from the teacher, then four steps learned from that."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from miniflux.checkpoints.formats import FORMATS
from miniflux.models.flux1 import Flux1
from miniflux.nano.recipe.flow import DEV, SCHNELL, Teacher, embed, noise_levels, velocity
from miniflux.training.flow import mix

GUIDANCE_RANGE = (1.0, 6.0)
SCHNELL_STEPS = 4
SCHNELL_GUIDANCE = 3.0  # what nano-schnell has built in; the default of nano-dev
# How often each of the four steps is practised, and how many steps of nano-dev it learns to make. Shapes are decided in
# the first one, from 1 to 0.75: it is the hardest to learn, and the one where nano-dev must be followed closely.
PRACTICE = {1: (0.4, 6), 2: (0.2, 3), 3: (0.2, 3), 4: (0.2, 3)}


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


def rounded(model: nn.Module) -> Callable[..., Tensor]:
    """The network, to be called as it is itself, with the matrices of its blocks as an NF4 file keeps them. Gradients
    pass to the unrounded ones (straight-through estimator, arXiv 1308.3432)."""
    form = FORMATS["nf4"]
    near: dict[str, Tensor] = {}
    for name, weight in model.named_parameters():
        if weight.ndim == 2 and "blocks" in name:
            near[name] = weight + (form.unpack(form.pack(weight.detach())) - weight).detach()
    return lambda *args, **more: functional_call(model, near, args, more)


def guidance_loss(
    student: Flux1, teacher: Teacher, captions: list[str], x0: Tensor, size: tuple[int, int], rng: random.Random
) -> Tensor:
    """Predict in one pass what classifier-free guidance makes of two (arXiv 2210.03142, section 3.1).

    Target: v_u + g * (v_c - v_u), for a random strength g per picture. Half of the time with rounded weights, so that
    four bits keep what is drawn: modulations are the first to suffer.
    """
    captions = ["" if rng.random() < 0.05 else caption for caption in captions]
    sigmas = noise_levels(*x0.shape[:2])
    strength = torch.empty(len(x0)).uniform_(*GUIDANCE_RANGE)
    x = mix(x0, torch.randn_like(x0), sigmas)
    with torch.no_grad():
        text = embed(teacher.text, captions, rng)
        empty = teacher.text([""] * len(x0), text.txt.shape[1], masked=text.mask is not None)
        v_c = velocity(teacher.flux, x, size, sigmas, text).float()
        v_u = velocity(teacher.flux, x, size, sigmas, empty).float()
        target = v_u + strength[:, None, None] * (v_c - v_u)
    network = rounded(student) if rng.random() < 0.5 else student
    return F.mse_loss(velocity(network, x, size, sigmas, text, guidance=strength).float(), target)


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
    step = rng.choices(list(PRACTICE), [share for share, _ in PRACTICE.values()])[0]
    at = torch.full((len(x0),), 1 - (step - 1) / SCHNELL_STEPS)
    substeps = PRACTICE[step][1]
    x = start = mix(x0, torch.randn_like(x0), at)
    strength = torch.full((len(x0),), SCHNELL_GUIDANCE)
    width = 1 / (SCHNELL_STEPS * substeps)
    with torch.no_grad():
        text = embed(teacher.text, captions, rng)
        for i in range(substeps):
            v = velocity(dev, x, size, at - i * width, text, guidance=strength).float()
            x = x - width * v  # Euler
        target = (start - x) * SCHNELL_STEPS
    return F.mse_loss(velocity(student, start, size, at, text).float(), target)


def schnell_from(teacher: Teacher) -> Flux1:
    """A network without guidance input that starts as the teacher."""
    student = Flux1(SCHNELL)
    student.load_state_dict(teacher.flux.state_dict())
    return student
