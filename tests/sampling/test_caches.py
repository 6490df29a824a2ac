"""Step caches: exact at their neutral settings, and a bill that equals counted blocks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from miniflux.errors import InputError
from miniflux.models.flux1 import Flux1
from miniflux.sampling import Bill, Words, cache, denoise, flux1_schedule, guide
from miniflux.sampling.caches import Measure, TaylorSeer
from tests.tiny import FLUX1, flux1_inputs, randn, randomise

STEPS = 8
INPUTS = flux1_inputs(FLUX1)
BLOCKS = FLUX1.depth + FLUX1.depth_single_blocks


@pytest.fixture(scope="module")
def model() -> Flux1:
    return randomise(Flux1(FLUX1))


def run(model: Flux1, **options) -> Tensor:
    arguments = [INPUTS[name] for name in ("img", "img_ids", "txt", "txt_ids", "y")]
    return denoise(model, *arguments, flux1_schedule(STEPS, 256), 3.0, **options)


NEUTRAL = {
    "first-block": {"threshold": 0.0},
    "tea": {"threshold": 0.0},
    "mag": {"threshold": 0.0, "ratios": (1.0,) * STEPS},
    "taylor": {"interval": 1},
}
EAGER = {
    "first-block": {"threshold": 1e9},
    "tea": {"threshold": 1e9, "coefficients": (1.0, 0.0)},
    "mag": {"threshold": 1e9, "ratios": (1.0,) * STEPS},
    "taylor": {"interval": 3},
}


@pytest.mark.parametrize("name", NEUTRAL)
def test_neutral_is_exact(model: Flux1, name: str) -> None:
    bill = Bill()
    assert torch.equal(run(model, cache=cache(name, **NEUTRAL[name]), bill=bill), run(model))
    assert (bill.evaluated, bill.skipped) == (STEPS * BLOCKS, 0)


@pytest.mark.parametrize("name", EAGER)
@pytest.mark.parametrize("guided", [False, True])
def test_bill_equals_counted_blocks(model: Flux1, name: str, guided: bool) -> None:
    """With two texts, each has a cache of its own; skipped and computed make all blocks of all calls."""
    calls, bill = [], Bill()
    handles = [
        block.register_forward_hook(lambda *_: calls.append(1))
        for block in (*model.double_blocks, *model.single_blocks)
    ]
    options = {}
    if guided:
        options = {
            "guide": guide("cfg", scale=2.0),
            "negative": Words(randn(2, 5, 20, seed=3), INPUTS["txt_ids"], INPUTS["y"]),
        }
    found = run(model, cache=cache(name, **EAGER[name]), bill=bill, **options)
    for handle in handles:
        handle.remove()
    assert found.isfinite().all() and bill.evaluated == len(calls) and bill.skipped > 0
    assert bill.evaluated + bill.skipped == STEPS * BLOCKS * (2 if guided else 1)


def test_a_network_without_single_blocks() -> None:
    model = randomise(Flux1(replace(FLUX1, depth_single_blocks=0)))
    for name, settings in NEUTRAL.items():
        assert torch.equal(run(model, cache=cache(name, **settings)), run(model))
    assert run(model, cache=cache("taylor", interval=2)).isfinite().all()


def test_taylor_of_first_order_is_exact_for_straight_lines(model: Flux1) -> None:
    """Additions that grow evenly with the calls are foretold exactly."""
    branch = TaylorSeer(interval=3, order=1).start(model, 20, Bill())
    for call in (0, 1, 4):
        branch.call = call
        branch.learn(torch.tensor([2.0 * call + 1]))
    branch.call = 6
    assert branch.addition().item() == 13.0


def test_measured_ratios_are_what_mag_takes(model: Flux1) -> None:
    measure = Measure()
    assert torch.equal(run(model, cache=measure), run(model))
    assert len(measure.ratios) == STEPS and measure.ratios[0] == 1.0
    assert run(model, cache=cache("mag", ratios=tuple(measure.ratios))).isfinite().all()


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("magic", {}, "unknown cache 'magic'; known: first-block"),
        ("tea", {"speed": 2}, "cache 'tea' has no setting 'speed'"),
        ("first-block", {"threshold": float("nan")}, "threshold must be a finite number"),
        ("taylor", {"interval": 0}, "interval must be a finite number of at least 1"),
    ],
)
def test_bad_settings(name: str, settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        cache(name, **settings)


def test_mag_needs_its_table(model: Flux1) -> None:
    with pytest.raises(InputError, match="ratios"):
        run(model, cache=cache("mag"))
