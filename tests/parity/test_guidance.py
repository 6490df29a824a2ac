"""Guides against the guiders of diffusers: the same velocity from the same predictions, and the same steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from miniflux.sampling import guide
from tests.parity.peers import diffusers
from tests.tiny import randn

STEPS = 10
SHAPE = (3, 12, 16)
TOLERANCE = 1e-5


def peer(kind: str, **settings: Any) -> Any:
    """A guider of diffusers; their package only loads them on demand."""
    assert diffusers is not None
    from diffusers import guiders

    return getattr(guiders, kind)(**settings)


def predictions(step: int) -> dict[str, Tensor]:
    """What a network might say: related to each other, and different in every picture and step."""
    positive = randn(*SHAPE, seed=10 * step + 1) * torch.tensor([0.5, 1.0, 3.0])[:, None, None]
    negative = 0.6 * positive + 0.7 * randn(*SHAPE, seed=10 * step + 2)
    return {"positive": positive, "negative": negative, "skipped": 0.9 * positive + 0.3 * randn(*SHAPE, seed=step)}


def both(ours: Any, theirs: Any, step: int, memory: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Our velocity, theirs, and what our guide remembers, from the predictions that ours wants."""
    parts = predictions(step)
    theirs.set_state(step, STEPS, torch.tensor(500))
    wanted = ours.wants(0.5, step, STEPS)
    assert len(wanted) == theirs.num_conditions
    given = {name: parts[name] for name in wanted}
    names = {"positive": "pred_cond", "negative": "pred_uncond", "skipped": "pred_cond_skip"}
    expected = theirs.forward(**{names[name]: part for name, part in given.items()}).pred
    found, memory = ours.combine(given, 0.5, step, memory)
    return found, expected, memory


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 3.5])
@pytest.mark.parametrize("rescale", [0.0, 0.7, 1.0])
def test_classifier_free_guidance(scale: float, rescale: float) -> None:
    """With the rescaling of arXiv 2305.08891; at scale 1 neither of them has more than the one prediction."""
    ours = guide("cfg", scale=scale, rescale=rescale)
    theirs = peer("ClassifierFreeGuidance", guidance_scale=scale, guidance_rescale=rescale)
    found, expected, _ = both(ours, theirs, 4)
    assert_close(found, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("zero_steps", [0, 1, 3])
@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_zero_star(zero_steps: int, rescale: float) -> None:
    """The first steps stand still; then the negative prediction is scaled to fit."""
    ours = guide("cfg-zero", scale=4.0, zero_steps=zero_steps, rescale=rescale)
    theirs = peer(
        "ClassifierFreeZeroStarGuidance", guidance_scale=4.0, zero_init_steps=zero_steps, guidance_rescale=rescale
    )
    for step in range(zero_steps if rescale else 0, 5):  # rescaling a velocity of zero is 0 / 0 in theirs
        found, expected, _ = both(ours, theirs, step)
        assert_close(found, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("momentum", [0.0, -0.75, 0.5])
@pytest.mark.parametrize("threshold", [0.0, 15.0, 5.0])
@pytest.mark.parametrize("eta", [1.0, 0.0, 0.4])
def test_adaptive_projected_guidance(momentum: float, threshold: float, eta: float) -> None:
    """Over several steps, so that the momentum counts; the norms are of whole pictures."""
    ours = guide("apg", scale=4.0, momentum=momentum, threshold=threshold, eta=eta, rescale=0.2)
    theirs = peer(
        "AdaptiveProjectedGuidance",
        guidance_scale=4.0,
        adaptive_projected_guidance_momentum=momentum or None,
        adaptive_projected_guidance_rescale=threshold,
        eta=eta,
        guidance_rescale=0.2,
    )
    theirs.set_state(0, STEPS, torch.tensor(999))
    theirs.prepare_inputs({"prompt": (torch.zeros(1), torch.zeros(1))})  # starts their momentum
    memory = None
    for step in range(4):
        found, expected, memory = both(ours, theirs, step, memory)
        assert_close(found, expected, rtol=0, atol=TOLERANCE)


def skip_layer(original: bool, **settings: Any) -> Any:
    return peer(
        "SkipLayerGuidance",
        skip_layer_guidance_start=0.2,
        skip_layer_guidance_stop=0.6,
        skip_layer_config=diffusers.hooks.LayerSkipConfig(indices=[1], fqn="transformer_blocks"),
        use_original_formulation=original,
        **settings,
    )


@pytest.mark.parametrize("rescale", [0.0, 0.5])
@pytest.mark.parametrize("step", range(STEPS))
def test_skip_layer_guidance(step: int, rescale: float) -> None:
    """On top of plain guidance, in the steps of its own window."""
    ours = guide("skip-layer", scale=3.0, skip_scale=2.5, skip_window=(0.2, 0.6), rescale=rescale)
    theirs = skip_layer(False, guidance_scale=3.0, skip_layer_guidance_scale=2.5, guidance_rescale=rescale)
    found, expected, _ = both(ours, theirs, step)
    assert_close(found, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("step", [0, 3, 8])
def test_skip_layer_guidance_alone(step: int) -> None:
    """Without plain guidance, it is what diffusers calls the original formulation (there, 0 is no guidance)."""
    ours = guide("skip-layer", scale=1.0, skip_scale=2.5, skip_window=(0.2, 0.6))
    theirs = skip_layer(True, guidance_scale=0.0, skip_layer_guidance_scale=2.5)
    found, expected, _ = both(ours, theirs, step)
    assert_close(found, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("window", [(0.0, 1.0), (0.0, 0.3), (0.25, 0.8), (0.5, 0.55), (0.99, 1.0)])
@pytest.mark.parametrize("steps", [1, 2, 4, 7, 28])
def test_windows(window: tuple[float, float], steps: int) -> None:
    """Which steps lie within is decided as diffusers decides it, with the same rounding."""
    settings = {"start": window[0], "stop": window[1], "guidance_scale": 3.0}
    theirs = [
        peer("ClassifierFreeGuidance", **settings),
        skip_layer(False, skip_layer_guidance_scale=2.0, **settings),
    ]
    ours = [
        guide("cfg", scale=3.0, window=window),
        guide("skip-layer", scale=3.0, window=window, skip_scale=2.0, skip_window=(0.2, 0.6)),
    ]
    for mine, other in zip(ours, theirs, strict=True):
        for step in range(steps):
            other.set_state(step, steps, torch.tensor(500))
            assert len(mine.wants(0.5, step, steps)) == other.num_conditions
