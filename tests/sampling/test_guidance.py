"""Guides in whole runs of a tiny network, and against formulas written out by hand."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import FrozenInstanceError, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from miniflux.errors import InputError
from miniflux.models.flux1 import Flux1
from miniflux.models.layers import attention, rope_rotations
from miniflux.sampling import GUIDES, Bill, Words, add_noise, custom_schedule, from_strength, guide
from miniflux.sampling.guidance import Apg, Cfg, CfgZero, Nag, PerpNeg, SkipLayer
from tests.sampling.test_denoising import Field, run
from tests.tiny import FLUX1, flux1_inputs, randn, randomise

LEVELS = [1.0, 0.7, 0.4, 0.15, 0.0]
STEPS = 4
INPUTS = flux1_inputs(FLUX1, rows=2, columns=2)
NEGATIVE = Words(randn(2, 5, 20, seed=11), INPUTS["txt_ids"], randn(2, 12, seed=12))
EMPTY = Words(randn(2, 5, 20, seed=13), INPUTS["txt_ids"], randn(2, 12, seed=14))
TEXTS = {"negative": NEGATIVE, "empty": EMPTY}
ACTIVE = {
    "cfg": Cfg(scale=3.0),
    "cfg-rescale": Cfg(scale=3.0, rescale=0.7),
    "cfg-zero": CfgZero(scale=3.0),
    "apg": Apg(scale=3.0, eta=0.2, threshold=3.0, momentum=-0.5),
    "perp-neg": PerpNeg(scale=3.0, negative_scale=0.8),
    "skip-layer": SkipLayer(scale=1.0, skip_window=(0.0, 0.75)),
    "skip-layer-cfg": SkipLayer(scale=3.0, skip_window=(0.0, 0.75)),
    "nag": Nag(scale=4.0),
}


@pytest.fixture(scope="module")
def model() -> Flux1:
    return randomise(Flux1(FLUX1))


@pytest.fixture(scope="module")
def plain(model: Flux1) -> Tensor:
    """The run without any guide."""
    return run(model, INPUTS, LEVELS)


@pytest.fixture(scope="module")
def double() -> Flux1:
    """The same network in float64, so that the order of sums does not show in the latents."""
    return randomise(Flux1(FLUX1)).double()


def doubled(value: Any) -> Any:
    """Inputs or a text for it."""
    if isinstance(value, dict):
        return {key: doubled(part) for key, part in value.items()}
    if isinstance(value, Words):
        return Words(doubled(value.txt), doubled(value.txt_ids), doubled(value.vec), value.mask)
    return value.double()


@contextmanager
def counted(model: nn.Module) -> Iterator[list[dict[str, Any]]]:
    """Arguments of every call of the network."""
    calls: list[dict[str, Any]] = []
    names = ["img", "img_ids", "txt", "txt_ids", "timesteps", "y", "guidance", "txt_mask"]

    def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(dict(zip(names, args, strict=False)) | kwargs)

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


# Runs that begin in the middle.

PARTIAL = {
    **{f"{name}-late": replace(guide, window=(0.5, 1.0)) for name, guide in ACTIVE.items() if "skip" not in name},
    **{f"{name}-early": replace(guide, window=(0.0, 0.5)) for name, guide in ACTIVE.items()},
    "apg-momentum": Apg(scale=3.0, momentum=0.8),
    "skip-layer-window": SkipLayer(scale=1.0, skip_window=(0.25, 0.75)),
}


@pytest.mark.parametrize("method", ["heun", "dpmpp-3m", "unipc-3"])
@pytest.mark.parametrize("name", PARTIAL)
def test_continuous_in_the_strength(model: Flux1, name: str, method: str) -> None:
    """A tenth of the way from side to side of where a step more begins, about a tenth of the change: no jump."""
    whole, source = custom_schedule([1.0, 0.7, 0.4, 0.25, 0.1, 0.0]), torch.zeros_like(INPUTS["img"])

    def drawn(strength: float) -> Tensor:
        part = from_strength(whole, strength)
        begun = INPUTS | {"img": add_noise(source, 0.0, part[0], INPUTS["img"])}
        return run(model, begun, part, method=method, guide=PARTIAL[name], **TEXTS)

    for boundary in (0.4, 0.6):
        wide, near = ((drawn(boundary - e) - drawn(boundary + e)).abs().max() for e in (1e-5, 1e-6))
        assert near < wide / 5, boundary


# Neutral settings.

NEUTRAL = [
    Cfg(),
    Cfg(scale=1.0, rescale=1.0),
    CfgZero(scale=1.0, zero_steps=2),
    Apg(scale=1.0, eta=0.0, threshold=1.0, momentum=0.5),
    PerpNeg(scale=1.0, negative_scale=3.0),
    SkipLayer(scale=1.0, skip_scale=0.0, skip_window=(0.0, 1.0)),
    SkipLayer(scale=1.0, skip_scale=3.0, skip_window=(0.0, 0.1)),
    Nag(scale=1.0),
    Nag(scale=5.0, alpha=0.0),
    Cfg(scale=lambda sigma: 1.0),
    Cfg(scale=5.0, window=(0.0, 0.2)),  # of 4 steps, none
    CfgZero(scale=5.0, window=(0.3, 0.45)),
    Apg(scale=5.0, window=(0.8, 0.9)),
    PerpNeg(scale=5.0, window=(0.3, 0.4)),
    SkipLayer(scale=5.0, window=(0.3, 0.4), skip_window=(0.3, 0.4)),
    Nag(scale=5.0, window=(0.3, 0.4)),
]


@pytest.mark.parametrize("method", ["euler", "heun"])
@pytest.mark.parametrize("setting", NEUTRAL, ids=[f"{i} {type(s).__name__}" for i, s in enumerate(NEUTRAL)])
def test_neutral_is_plain(model: Flux1, plain: Tensor, setting: Cfg, method: str) -> None:
    """Bit for bit, in no more calls, and without any other text."""
    expected = plain if method == "euler" else run(model, INPUTS, LEVELS, method=method)
    with counted(model) as calls:
        found = run(model, INPUTS, LEVELS, method=method, guide=setting)
    assert torch.equal(found, expected)
    assert len(calls) == (STEPS if method == "euler" else 2 * STEPS - 1)


@pytest.mark.parametrize("name", ACTIVE)
def test_outside_the_window_is_plain(model: Flux1, name: str) -> None:
    """The first half of a run as if there were no guide, and another result afterwards."""
    late = replace(ACTIVE[name], window=(0.5, 1.0))
    if isinstance(late, SkipLayer):
        late = replace(late, skip_window=(0.25, 0.9))  # its first step does not count
    if isinstance(late, CfgZero):
        late = replace(late, zero_steps=0)
    half = run(model, INPUTS, LEVELS, stop=2)
    assert torch.equal(run(model, INPUTS, LEVELS, guide=late, stop=2, **TEXTS), half)
    third = run(model, INPUTS, LEVELS, guide=late, stop=3, **TEXTS)
    assert (third - run(model, INPUTS, LEVELS, stop=3)).abs().max() > 1e-3


@pytest.mark.parametrize("name", ACTIVE)
def test_guides_act(model: Flux1, plain: Tensor, name: str) -> None:
    """Another picture, finite; and another one still with another negative prompt, where there is one."""
    found = run(model, INPUTS, LEVELS, guide=ACTIVE[name], **TEXTS)
    assert found.isfinite().all() and (found - plain).abs().max() > 1e-2
    other = TEXTS | {"negative": EMPTY}
    if name not in ("skip-layer",):
        assert (run(model, INPUTS, LEVELS, guide=ACTIVE[name], **other) - found).abs().max() > 1e-3


# Calls of the network.


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("window", [(0.0, 1.0), (0.25, 0.8), (0.5, 1.0)])
@pytest.mark.parametrize("name", ACTIVE)
def test_calls_are_what_is_wanted(model: Flux1, name: str, window: tuple[float, float], batched: bool) -> None:
    """One per prediction and step; batched, one for all the texts of a step, and one more without the layers."""
    setting = replace(ACTIVE[name], window=window)
    wanted = [setting.wants(sigma, i, STEPS) for i, sigma in enumerate(LEVELS[:-1])]
    assert all(names[0] == "positive" or names == ("attended",) for names in wanted)
    with counted(model) as calls:
        run(model, INPUTS, LEVELS, guide=setting, batched=batched, **TEXTS)
    rows = [len(call["img"]) for call in calls]
    expected: list[int] = []
    for names in wanted:
        texts = [name for name in names if name in ("positive", "negative", "empty")]
        together = [2 * len(texts)] if batched else [2] * len(texts)
        expected += [4] if names == ("attended",) else together
        expected += [2] * ("skipped" in names)
    assert rows == expected


@pytest.mark.parametrize("name", ACTIVE)
@pytest.mark.parametrize("method", ["euler", "heun"])
def test_batched_is_the_same(double: Flux1, name: str, method: str) -> None:
    """Both texts in one call, or one after the other."""
    options = {"guide": ACTIVE[name], "method": method, **doubled(TEXTS)}
    together, apart = (run(double, doubled(INPUTS), LEVELS, batched=batched, **options) for batched in (True, False))
    assert_close(together, apart, rtol=0, atol=1e-5)
    assert torch.equal(run(double, doubled(INPUTS), LEVELS, **options), apart)  # the default on a CPU


def test_texts_of_other_lengths(model: Flux1) -> None:
    """Cannot go into one batch, so they go one by one."""
    long = Words(randn(2, 7, 20, seed=15), torch.zeros(2, 7, 3), randn(2, 12, seed=12))
    guided = Cfg(scale=3.0)
    found = run(model, INPUTS, LEVELS, guide=guided, negative=long, batched=True)
    assert torch.equal(found, run(model, INPUTS, LEVELS, guide=guided, negative=long, batched=False))
    with pytest.raises(InputError, match="NAG needs texts of one length, got 5 and 7"):
        run(model, INPUTS, LEVELS, guide=Nag(scale=3.0), negative=long)


@pytest.mark.parametrize("setting", [Cfg(scale=3.0), Nag(scale=3.0)], ids=["cfg", "nag"])
def test_masks_stay_with_their_text(double: Flux1, setting: Cfg) -> None:
    """What a text masks is as if it were not there, for that text alone."""
    mask = torch.tensor([[True] * 4 + [False], [True] * 4 + [False]])
    inputs, masked = doubled(INPUTS), doubled(replace(NEGATIVE, mask=mask))
    garbage = replace(masked, txt=torch.cat((masked.txt[:, :4], 100 + masked.txt[:, 4:]), dim=1))
    runs = [
        run(double, inputs, LEVELS, guide=setting, negative=negative, batched=batched)
        for negative in (masked, garbage)
        for batched in (True, False)
    ]
    for other in runs[1:]:
        assert_close(other, runs[0], rtol=0, atol=1e-5)
    assert (run(double, inputs, LEVELS, guide=setting, negative=doubled(NEGATIVE)) - runs[0]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ACTIVE)
def test_picture_of_a_batch_equals_it_alone(double: Flux1, name: str) -> None:
    """Norms, fits and projections are those of one picture, not of the batch."""
    together = run(double, doubled(INPUTS), LEVELS, guide=ACTIVE[name], **doubled(TEXTS))
    for i in range(2):
        one = {key: value[i : i + 1] for key, value in doubled(INPUTS).items()}
        texts = {
            key: Words(text.txt[i : i + 1], text.txt_ids[i : i + 1], text.vec[i : i + 1])
            for key, text in doubled(TEXTS).items()
        }
        alone = run(double, one, LEVELS, guide=ACTIVE[name], **texts)
        assert_close(alone, together[i : i + 1], rtol=0, atol=1e-5)


def test_same_texts_need_no_guide(model: Flux1, plain: Tensor) -> None:
    """Where the negative prompt is the prompt, there is nothing to push away from."""
    same = Words(INPUTS["txt"], INPUTS["txt_ids"], INPUTS["y"])
    for setting in (
        Cfg(scale=6.0, rescale=0.5),
        CfgZero(scale=6.0, zero_steps=0),
        Apg(scale=6.0, eta=0.0, threshold=1.0, momentum=0.5),
        Nag(scale=6.0),
    ):
        assert_close(run(model, INPUTS, LEVELS, guide=setting, negative=same), plain, rtol=0, atol=1e-4)


# Strengths as functions.


def test_scale_as_a_function(model: Flux1) -> None:
    """A constant one is the number; one that is 1 somewhere saves the calls there; it is asked for the noise level."""
    number = run(model, INPUTS, LEVELS, guide=Cfg(scale=3.0), negative=NEGATIVE)
    asked: list[float] = []

    def constant(sigma: float) -> float:
        asked.append(sigma)
        return 3.0

    assert torch.equal(run(model, INPUTS, LEVELS, guide=Cfg(scale=constant), negative=NEGATIVE), number)
    assert set(asked) <= set(LEVELS) and set(LEVELS[:-1]) <= set(asked)
    late = Cfg(scale=lambda sigma: 3.0 if sigma < 0.5 else 1.0)
    with counted(model) as calls:
        found = run(model, INPUTS, LEVELS, guide=late, negative=NEGATIVE)
    assert [round(float(call["timesteps"][0]), 4) for call in calls] == [1.0, 0.7, 0.4, 0.4, 0.15, 0.15]
    assert torch.equal(found, run(model, INPUTS, LEVELS, guide=Cfg(scale=3.0, window=(0.5, 1.0)), negative=NEGATIVE))


@pytest.mark.parametrize("name", ["cfg", "cfg-zero", "apg", "perp-neg", "nag"])
def test_every_guide_takes_a_function(model: Flux1, name: str) -> None:
    number = run(model, INPUTS, LEVELS, guide=ACTIVE[name], **TEXTS)
    function = replace(ACTIVE[name], scale=lambda sigma: float(ACTIVE[name].scale))
    assert torch.equal(run(model, INPUTS, LEVELS, guide=function, **TEXTS), number)


def test_distilled_guidance_as_a_function(model: Flux1) -> None:
    """What the network is told at each noise level, also where the solver asks in between."""
    with counted(model) as calls:
        run(model, INPUTS, LEVELS, guidance=lambda sigma: 1 + 4 * sigma, method="midpoint")
    levels = [1.0, 0.85, 0.7, 0.55, 0.4, 0.275, 0.15, 0.075]
    assert [float(call["guidance"][0]) for call in calls] == pytest.approx([1 + 4 * sigma for sigma in levels])
    constant = run(model, INPUTS, LEVELS, guidance=lambda sigma: 2.5)
    assert torch.equal(constant, run(model, INPUTS, LEVELS, guidance=2.5))


# Formulas.


def parts(seed: int) -> dict[str, Tensor]:
    return {name: randn(3, 5, 4, seed=seed + i) for i, name in enumerate(["positive", "negative", "empty"])}


@pytest.mark.parametrize("seed", range(3))
def test_perpendicular_negative(seed: int) -> None:
    """Equation by equation, picture by picture; and the push away is orthogonal to the prompt's direction."""
    given, setting = parts(10 * seed), PerpNeg(scale=3.5, negative_scale=0.6)
    found, _ = setting.combine(given, 0.5, 1)
    only_positive, _ = PerpNeg(scale=3.5, negative_scale=0.0).combine(given, 0.5, 1)
    for i in range(3):
        positive, negative, empty = (given[name][i].double().numpy().ravel() for name in given)
        main, away = positive - empty, negative - empty
        perpendicular = away - np.dot(away, main) / np.dot(main, main) * main
        expected = empty + 3.5 * (main - 0.6 * perpendicular)
        np.testing.assert_allclose(found[i].numpy().ravel(), expected, rtol=0, atol=1e-5)
        push = (found - only_positive)[i].double().numpy().ravel()
        assert np.linalg.norm(push) > 1
        assert abs(np.dot(push, main)) < 1e-5 * np.linalg.norm(push) * np.linalg.norm(main)


def test_perpendicular_negative_of_an_empty_prompt() -> None:
    """The prompt's direction is zero then: nothing is parallel to it, and nothing is divided by it."""
    given = parts(1)
    given["positive"] = given["empty"].clone()
    found, _ = PerpNeg(scale=3.0).combine(given, 0.5, 1)
    assert found.isfinite().all()


def test_an_empty_prompt_gives_a_picture(model: Flux1) -> None:
    """The same in a whole run: prompt and empty prompt are one text."""
    same = Words(INPUTS["txt"], INPUTS["txt_ids"], INPUTS["y"])
    found = run(model, INPUTS, LEVELS, guide=PerpNeg(scale=3.0), negative=NEGATIVE, empty=same)
    assert found.isfinite().all()


def test_zero_star_with_rescaling(model: Flux1) -> None:
    """A velocity of zero has no spread to bring back."""
    found = run(model, INPUTS, LEVELS, guide=CfgZero(scale=3.0, rescale=0.5), negative=NEGATIVE)
    assert found.isfinite().all()


def test_zero_star_stands_still(model: Flux1) -> None:
    """In its first steps the latents stay what they were."""
    setting = CfgZero(scale=3.0, zero_steps=2)
    found = run(model, INPUTS, LEVELS, guide=setting, negative=NEGATIVE, stop=2)
    assert torch.equal(found, INPUTS["img"])
    moved = run(model, INPUTS, LEVELS, guide=setting, negative=NEGATIVE, stop=3)
    assert (moved - found).abs().max() > 1e-2


def test_projection(model: Flux1) -> None:
    """Eta 0 leaves a push orthogonal to the prediction, and the threshold a push no longer than that."""
    given = parts(3)
    push = Apg(scale=1.5, eta=0.0).combine(given, 0.5, 1)[0] - given["negative"]
    overlap = (push * given["positive"]).sum((1, 2))
    assert_close(overlap, torch.zeros(3), rtol=0, atol=1e-4)
    short = Apg(scale=1.0 + 1e-9, threshold=0.5).combine(given, 0.5, 1)[0] - given["negative"]
    assert_close(short.norm(dim=(1, 2)), torch.full((3,), 0.5), rtol=0, atol=1e-5)
    plain = Cfg(scale=3.0).combine({k: given[k] for k in ("positive", "negative")}, 0.5, 1)[0]
    assert torch.equal(Apg(scale=3.0).combine(given, 0.5, 1)[0], plain)


def test_rescaling_brings_the_spread_back() -> None:
    """At 1, every picture has the spread of the positive prediction."""
    given = {name: part for name, part in parts(5).items() if name != "empty"}
    full, _ = Cfg(scale=5.0, rescale=1.0).combine(given, 0.5, 1)
    assert_close(full.std((1, 2)), given["positive"].std((1, 2)))
    half, _ = Cfg(scale=5.0, rescale=0.5).combine(given, 0.5, 1)
    none, _ = Cfg(scale=5.0).combine(given, 0.5, 1)
    assert_close(half, (full + none) / 2)


def test_combine_changes_nothing() -> None:
    """Neither the predictions nor what is remembered."""
    for setting in ACTIVE.values():
        names = {name for step in range(STEPS) for name in setting.wants(0.5, step, STEPS)}
        given = {name: randn(2, 5, 4, seed=i) for i, name in enumerate(sorted(names))}
        memory = randn(2, 5, 4, seed=9)
        before = [part.clone() for part in (*given.values(), memory)]
        setting.combine(given, 0.5, 3, memory)
        assert all(torch.equal(a, b) for a, b in zip((*given.values(), memory), before, strict=True))
        with pytest.raises(FrozenInstanceError):
            setting.scale = 2.0


# Normalised attention guidance.

TEXT, IMAGE, HEADS, HEAD = 3, 4, 2, 16


def attention_inputs(batch: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v = (randn(batch, HEADS, TEXT + IMAGE, HEAD, seed=i) for i in range(3))
    return q, k, 3 * v, rope_rotations(randn(batch, TEXT + IMAGE, 3, seed=4), (4, 6, 6), 10_000)


@pytest.mark.parametrize(("scale", "tau", "alpha"), [(4.0, 2.5, 0.25), (11.0, 1.2, 0.6), (2.0, 100.0, 1.0)])
def test_attention_is_guided(scale: float, tau: float, alpha: float) -> None:
    """The formulas of the paper, token by token; text tokens keep their own, both halves get one picture."""
    q, k, v, pe = attention_inputs(4)
    plain = attention(q, k, v, pe).double().numpy()
    found = Nag(scale=scale, tau=tau, alpha=alpha).attend(0.5, TEXT)(q, k, v, pe)
    assert torch.equal(found[:, :TEXT], attention(q, k, v, pe)[:, :TEXT])
    assert torch.equal(found[:2, TEXT:], found[2:, TEXT:])
    clipped = 0
    for i in range(2):
        for token in range(TEXT, TEXT + IMAGE):
            positive, negative = plain[i, token], plain[2 + i, token]
            pushed = positive + (scale - 1) * (positive - negative)
            ratio = np.abs(pushed).sum() / np.abs(positive).sum()
            if ratio > tau:
                pushed, clipped = pushed * tau / ratio, clipped + 1
            expected = alpha * pushed + (1 - alpha) * positive
            np.testing.assert_allclose(found[i, token].numpy(), expected, rtol=0, atol=1e-4)
    assert (clipped > 0) == (tau < 100)


def test_attention_is_guided_by_the_scale_of_the_moment() -> None:
    """A function is asked for the noise level of the call; at 1 the positive half is untouched."""
    q, k, v, pe = attention_inputs(2)
    setting = Nag(scale=lambda sigma: 1 + 10 * sigma, tau=100.0)
    fixed = Nag(scale=6.0, tau=100.0)
    assert torch.equal(setting.attend(0.5, TEXT)(q, k, v, pe), fixed.attend(0.9, TEXT)(q, k, v, pe))
    neutral = setting.attend(0.0, TEXT)(q, k, v, pe)
    assert_close(neutral[:1], attention(q, k, v, pe)[:1], rtol=0, atol=1e-5)


def test_attention_without_features() -> None:
    """Features of zero stay zero: their norms divide nothing."""
    q, k, v, pe = attention_inputs(2)
    assert not Nag(scale=4.0).attend(0.5, TEXT)(q, k, torch.zeros_like(v), pe).any()


# Skipped layers.


def test_layers_are_skipped(model: Flux1) -> None:
    """Every named one, and the middle double block if none is named; the bill has the blocks that were run."""
    ran: list[str] = []
    blocks = {name: module for name, module in model.named_modules() if name.count(".") == 1 and "blocks" in name}
    handles = [
        block.register_forward_hook(lambda *_args, name=name: ran.append(name)) for name, block in blocks.items()
    ]
    try:
        for layers, left in (((), "double_blocks.1"), (("single_blocks.0",), "single_blocks.0")):
            ran.clear()
            bill = Bill()
            setting = SkipLayer(scale=1.0, layers=layers, skip_window=(0.0, 0.75))
            run(model, INPUTS, LEVELS, guide=setting, bill=bill)
            names = ["double_blocks.0", "double_blocks.1", "single_blocks.0", "single_blocks.1"]
            rest = [name for name in names if name != left]
            assert ran == [*names, *names, *rest, *names, *rest, *names]
            assert bill.evaluated == len(ran)
    finally:
        for handle in handles:
            handle.remove()


def test_unknown_layers_are_refused(model: Flux1) -> None:
    """A layer that the network does not have would change nothing, and cost a call."""
    for layers in (("double_blocks.7",), ("blocks.0",)):
        setting = SkipLayer(scale=1.0, layers=layers, skip_window=(0.0, 0.75))
        with pytest.raises(InputError, match=layers[0]):
            run(model, INPUTS, LEVELS, guide=setting)


# What is refused.


@pytest.mark.parametrize("name", ["nope", "", "CFG"])
def test_unknown_methods(name: str) -> None:
    with pytest.raises(InputError, match="unknown guidance method") as caught:
        guide(name)
    assert all(known in str(caught.value) for known in GUIDES)


@pytest.mark.parametrize("name", GUIDES)
def test_names_and_settings(name: str) -> None:
    """Each by its name, with its settings; an unknown one is refused with the list of those there are."""
    made = guide(name, scale=2.0, window=(0.1, 0.9))
    assert type(made) is GUIDES[name] and made.scale == 2.0 and made.window == (0.1, 0.9)
    with pytest.raises(InputError, match=f"guidance method '{name}' has no setting 'strength'; it has scale, window"):
        guide(name, strength=2.0)


BAD = [
    *(("cfg", {"scale": value}) for value in (math.nan, math.inf, -1.0, "3", True, None)),
    *(
        ("cfg", {"window": value})
        for value in ((0.5, 0.5), (0.8, 0.2), (-0.1, 0.5), (0.2, 1.1), (math.nan, 1.0), (0.5,))
    ),
    *(("cfg", {"rescale": value}) for value in (-0.1, 1.5, math.nan)),
    *(("cfg-zero", {"zero_steps": value}) for value in (-1, math.nan)),
    *(("apg", {"eta": value}) for value in (math.nan, math.inf)),
    *(("apg", {"threshold": value}) for value in (-1.0, math.nan)),
    *(("apg", {"momentum": value}) for value in (-1.5, 2.0, math.nan)),
    *(("perp-neg", {"negative_scale": value}) for value in (-1.0, math.nan)),
    *(("skip-layer", {"skip_scale": value}) for value in (-1.0, math.nan)),
    *(("skip-layer", {"skip_window": value}) for value in ((0.3, 0.3), (0.5, 0.1), (0.0, 2.0))),
    *(("nag", {"tau": value}) for value in (-1.0, math.nan)),
    *(("nag", {"alpha": value}) for value in (-0.1, 1.1, math.nan)),
    *((name, {"scale": -2.0}) for name in GUIDES),
    *((name, {"window": (1.0, 0.0)}) for name in GUIDES),
]


@pytest.mark.parametrize(("name", "settings"), BAD, ids=str)
def test_bad_settings(name: str, settings: dict[str, Any]) -> None:
    """The message names the setting and what it was."""
    (setting, value), *_ = settings.items()
    with pytest.raises(InputError, match=f"{setting} must be") as caught:
        guide(name, **settings)
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("name", [name for name in ACTIVE if name != "skip-layer"])
def test_missing_texts(name: str) -> None:
    """Refused before the network is called, also where they are only needed later."""
    field = Field(lambda x, _t: x)
    for setting in (ACTIVE[name], replace(ACTIVE[name], window=(0.7, 1.0))):
        with pytest.raises(InputError, match="needs the negative text"):
            run(field, INPUTS, LEVELS, guide=setting, empty=EMPTY)
    if name == "perp-neg":
        with pytest.raises(InputError, match="needs the empty text"):
            run(field, INPUTS, LEVELS, guide=ACTIVE[name], negative=NEGATIVE)
    assert field.calls == []


@pytest.mark.parametrize("method", ["midpoint", "rk4", "dpmpp-2s"])
def test_missing_texts_between_levels(method: str) -> None:
    """Solvers ask between the levels of the schedule too: a text needed only there is missed as well."""
    field = Field(lambda x, _t: x)
    setting = Cfg(scale=lambda sigma: 3.0 if 0.75 < sigma < 0.95 else 1.0)
    with pytest.raises(InputError, match="needs the negative text"):
        run(field, INPUTS, LEVELS, guide=setting, method=method)


def test_unequal_texts_are_refused_at_once() -> None:
    """Texts that attention guidance cannot use side by side are known before the first call."""
    field = Field(lambda x, _t: x)
    long = Words(randn(2, 7, 20, seed=15), torch.zeros(2, 7, 3), randn(2, 12, seed=12))
    with pytest.raises(InputError, match="texts of one length"):
        run(field, INPUTS, LEVELS, guide=Nag(scale=3.0, window=(0.5, 1.0)), negative=long)
    assert field.calls == []


@pytest.mark.parametrize("value", [math.nan, -1.0, math.inf])
def test_functions_must_give_scales(model: Flux1, value: float) -> None:
    """What a function gives is checked as a number would be."""
    with pytest.raises(InputError, match="scale must be"):
        run(model, INPUTS, LEVELS, guide=Cfg(scale=lambda sigma: value), negative=NEGATIVE)
