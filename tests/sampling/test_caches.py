"""Step caches: exact at their neutral settings, and a bill that equals counted blocks."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from miniflux.errors import InputError
from miniflux.models.flux1 import Flux1, RunBlock, run_block
from miniflux.sampling import CACHES, Bill, Moment, Words, Wrap, cache, denoise, flux1_schedule, guide
from miniflux.sampling.caches import Cache, Measure, TaylorSeer
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


def counting(bill: Bill) -> Wrap:
    """Writes what is computed on a bill, as `denoise` does around all that its caller gives."""

    def wrap(inner: RunBlock) -> RunBlock:
        def count(name: str, block: Any, streams: Any, context: Any) -> Any:
            bill.evaluated += 1
            return inner(name, block, streams, context)

        return count

    return wrap


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
        ("taylor", {"interval": 0}, "interval must be a whole number of at least 1"),
    ],
)
def test_bad_settings(name: str, settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        cache(name, **settings)


def test_mag_needs_its_table(model: Flux1) -> None:
    with pytest.raises(InputError, match="ratios"):
        run(model, cache=cache("mag"))


# Which calls are computed, in whole runs.

NEGATIVE = Words(randn(2, 5, 20, seed=3), INPUTS["txt_ids"], randn(2, 12, seed=4))


def computed(model: Flux1, **options: Any) -> tuple[list[int], Tensor]:
    """Numbers of the calls whose last block was run, and the result."""
    calls, full = [], []
    handles = [
        model.register_forward_pre_hook(lambda *_: calls.append(1)),
        model.single_blocks[-1].register_forward_hook(lambda *_: full.append(len(calls) - 1)),
    ]
    result = run(model, **options)
    for handle in handles:
        handle.remove()
    return full, result


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("first-block", EAGER["first-block"], [0]),
        ("tea", EAGER["tea"], [0, 7]),  # the first and the last always
        ("mag", EAGER["mag"], [0, 4]),  # `longest` is 3
        ("mag", EAGER["mag"] | {"longest": 2, "retention": 0.5}, [0, 1, 2, 3, 6]),
        ("taylor", {"interval": 3}, [0, 1, 2, 5, 7]),  # the last always
        ("taylor", {"interval": 2, "warmup": 1}, [0, 2, 4, 6, 7]),
        ("measure", {}, list(range(8))),
    ],
)
def test_calls_that_are_computed(model: Flux1, name: str, settings: dict, expected: list[int]) -> None:
    """With a threshold nothing reaches, as few as each allows."""
    bill = Bill()
    full, found = computed(model, cache=cache(name, **settings), bill=bill)
    assert full == expected and found.isfinite().all()
    first = STEPS - len(full) if name == "first-block" else 0  # which it needs to decide
    assert bill == Bill(len(full) * BLOCKS + first, (STEPS - len(full)) * BLOCKS - first)
    assert name == "measure" or (found - run(model)).abs().max() > 1e-3


@pytest.mark.parametrize("name", EAGER)
def test_solvers_of_more_calls(model: Flux1, name: str) -> None:
    """The bill is of all the calls of a step, and the last call is the solver's last."""
    bill = Bill()
    full, found = computed(model, cache=cache(name, **EAGER[name]), bill=bill, method="heun")
    assert found.isfinite().all() and bill.evaluated + bill.skipped == (2 * STEPS - 1) * BLOCKS
    assert name not in ("tea", "taylor") or full[-1] == 2 * STEPS - 2
    exact = run(model, method="heun")
    assert torch.equal(run(model, cache=cache(name, **NEUTRAL[name]), method="heun"), exact)


@pytest.mark.parametrize("name", EAGER)
def test_each_text_has_its_own(model: Flux1, name: str) -> None:
    """At scale 0 the result is the negative text's, and what was kept for the prompt has no part in it."""
    options = {"cache": cache(name, **EAGER[name]), "batched": False}
    found = run(model, guide=guide("cfg", scale=0.0), negative=NEGATIVE, **options)
    arguments = [INPUTS["img"], INPUTS["img_ids"], NEGATIVE.txt, NEGATIVE.txt_ids, NEGATIVE.vec]
    alone = denoise(model, *arguments, flux1_schedule(STEPS, 256), 3.0, cache=options["cache"])
    assert_close(found, alone, rtol=0, atol=1e-4)
    assert (found - run(model, cache=options["cache"])).abs().max() > 0.1


@pytest.mark.parametrize("name", NEUTRAL)
def test_neutral_is_exact_with_two_texts(model: Flux1, name: str) -> None:
    for batched in (True, False):
        options = {"guide": guide("cfg", scale=3.0), "negative": NEGATIVE, "batched": batched}
        assert torch.equal(run(model, cache=cache(name, **NEUTRAL[name]), **options), run(model, **options))


@pytest.mark.parametrize("name", NEUTRAL)
def test_neutral_is_exact_with_reference_tokens(model: Flux1, name: str) -> None:
    """Kontext's tokens are image tokens to a cache."""
    seq = {"img_cond_seq": randn(2, 3, 16, seed=7), "img_cond_seq_ids": randn(2, 3, 3, seed=8)}
    assert torch.equal(run(model, cache=cache(name, **NEUTRAL[name]), **seq), run(model, **seq))
    assert run(model, cache=cache(name, **EAGER[name]), **seq).isfinite().all()


def test_a_network_without_double_blocks() -> None:
    """TeaCache has nothing to watch there; the others are at home in single blocks too."""
    model = randomise(Flux1(replace(FLUX1, depth=0)))
    for name, settings in NEUTRAL.items():
        if name != "tea":
            assert torch.equal(run(model, cache=cache(name, **settings)), run(model))
            assert run(model, cache=cache(name, **EAGER[name])).isfinite().all()
    with pytest.raises(InputError, match="TeaCache watches the first double block"):
        run(model, cache=cache("tea"))


@pytest.mark.parametrize("name", EAGER)
def test_one_record_serves_many_runs(model: Flux1, name: str) -> None:
    """Settings remember nothing: a second run, and four at a time, are the first."""
    settings = cache(name, **EAGER[name])
    first = run(model, cache=settings)
    with ThreadPoolExecutor(4) as pool:
        others = list(pool.map(lambda _: run(model, cache=settings), range(4)))
    assert all(torch.equal(other, first) for other in others)


def test_the_last_call_of_a_window_or_the_run_is_computed(model: Flux1) -> None:
    """TeaCache and TaylorSeer compute the last call, also where texts are batched in a part of the run only."""
    options = {"guide": guide("cfg", scale=3.0, window=(0.0, 0.5)), "negative": NEGATIVE, "batched": True}
    for name in ("tea", "taylor"):
        full, _ = computed(model, cache=cache(name, **EAGER[name]), **options)
        assert full[-1] == STEPS - 1


def test_a_cached_run_is_not_resumed(model: Flux1) -> None:
    """What a cache remembers is not in a moment: refused, instead of going on from elsewhere."""
    moments: list[Moment] = []
    run(model, callback=moments.append, cache=cache("taylor"))
    with pytest.raises(InputError, match="resume cannot be exact with a step cache"):
        run(model, resume=moments[1], cache=cache("taylor"))


# What a branch does, with blocks that add what the test says.


class Adds(nn.Module):
    """A block that adds a number to every image token; its modulation leaves tokens as they are."""

    def __init__(self, text: int, amount: Callable[[], float]) -> None:
        super().__init__()
        self.text, self.amount = text, amount
        self.img_norm1 = nn.Identity()

    def modulated(self, img: Tensor, vec: Tensor) -> Tensor:
        return self.img_mod(vec)[0](self.img_norm1(img))

    def img_mod(self, _vec: Tensor) -> tuple[Callable[[Tensor], Tensor], None]:
        return (lambda x: x), None

    def forward(self, *streams: Tensor) -> Any:
        if len(streams) == 3:  # a double block, and the conditioning vector
            return streams[0] + self.amount(), streams[1] - 1
        moved = torch.zeros_like(streams[0])
        moved[:, : self.text], moved[:, self.text :] = -1, self.amount()
        return streams[0] + moved


def drive(
    settings: Cache, amount: Callable[[int], float], calls: int = 10, image: Callable[[int], float] = lambda _: 1.0
) -> tuple[list[int], list[float]]:
    """Which calls were computed, and what was added to the image tokens in each; through two and two blocks."""
    now, text = [0], 3
    blocks = [Adds(text, lambda: amount(now[0]) / 4) for _ in range(4)]
    names = [f"{kind}_blocks.{i}" for kind in ("double", "single") for i in range(2)]
    network: Any = SimpleNamespace(config=SimpleNamespace(blocks=names, depth=2, joined=True))
    bill = Bill()
    branch = settings.start(network, calls, bill)
    branch.inner = counting(bill)(run_block)
    full, added = [], []
    for call in range(calls):
        now[0], before, branch.call = call, bill.evaluated, call
        img, txt = torch.full((2, 4, 5), image(call), dtype=torch.float64), torch.zeros(2, text, 5)
        start = img
        for i in range(2):
            img, txt = branch(f"double_blocks.{i}", blocks[i], (img, txt), (torch.zeros(2, 5),))
        x = torch.cat((txt, img), dim=1)
        for i in range(2):
            (x,) = branch(f"single_blocks.{i}", blocks[2 + i], (x,), (torch.zeros(2, 5),))
        change = x[:, text:] - start
        assert torch.equal(change, change[:1, :1, :1].expand_as(change))
        added.append(float(change[0, 0, 0]))
        if bill.evaluated - before == 4:
            full.append(call)
            assert added[-1] == pytest.approx(amount(call), abs=1e-9)
        else:
            assert x[:, :text].min() >= -1  # text went through none, or through the first block alone
    return full, added


@pytest.mark.parametrize(("interval", "warmup"), [(2, 2), (3, 2), (4, 5), (5, 1)])
def test_taylor_goes_on_in_a_straight_line(interval: int, warmup: int) -> None:
    """Exact from the second full call on, whatever lies between two; of order 0 it repeats the last one."""
    full, added = drive(TaylorSeer(interval=interval, order=1, warmup=warmup), lambda call: 3.0 + 0.5 * call, 14)
    for call, change in enumerate(added):
        if call >= full[1]:
            assert change == pytest.approx(3.0 + 0.5 * call, abs=1e-9)
    full, added = drive(TaylorSeer(interval=interval, order=0, warmup=warmup), lambda call: 3.0 + 0.5 * call, 14)
    for call, change in enumerate(added):
        last = max(done for done in full if done <= call)
        assert change == pytest.approx(3.0 + 0.5 * last, abs=1e-9)
    assert full[:warmup] == list(range(warmup)) and full[-1] == 13


def test_first_block_compares_with_the_last_full_call() -> None:
    """Changes of 5% in a row: the third is 16% from where it was computed last, and not the call before."""
    full, added = drive(cache("first-block", threshold=0.12), lambda call: 1.05**call)
    assert full == [0, 3, 6, 9]
    for call, change in enumerate(added):  # the first block's own part is always new
        last = max(done for done in full if done <= call)
        assert change == pytest.approx(1.05**call / 4 + 1.05**last * 3 / 4, abs=1e-9)


def test_tea_sums_the_changes() -> None:
    """Of the tokens before the blocks: 10% a call, and so three calls to more than 25%; rescaled by the polynomial."""
    grow = {"amount": lambda call: 2.0 + call, "image": lambda call: 1.1**call}
    full, added = drive(cache("tea", threshold=0.25, coefficients=(1.0, 0.0)), **grow)
    assert full == [0, 3, 6, 9]
    assert added == pytest.approx([2.0 + 3 * (call // 3) for call in range(10)], abs=1e-9)
    assert drive(cache("tea", threshold=0.25, coefficients=(10.0, 0.5, 0.0)), **grow)[0] == [0, 2, 4, 6, 8, 9]  # 0.15
    assert drive(cache("tea", threshold=0.25, coefficients=(0.2,)), **grow)[0] == [0, 2, 4, 6, 8, 9]


def test_mag_sums_the_errors() -> None:
    """Ratios of 0.95: errors of 0.05, then 0.0975 more; full calls begin the sum anew."""
    settings = {"ratios": (0.95,) * 10, "retention": 0.0}
    assert drive(cache("mag", threshold=0.12, **settings), lambda _: 1.0)[0] == [0, 2, 4, 6, 8]
    assert drive(cache("mag", threshold=0.15, **settings), lambda _: 1.0)[0] == [0, 3, 6, 9]
    assert drive(cache("mag", threshold=0.05, **settings), lambda _: 1.0)[0] == list(range(10))


@pytest.mark.parametrize("known", [1, 2, 10, 33])
def test_mag_spreads_its_table(known: int) -> None:
    """A table of another length: its ends are the run's ends. Only its first half holds still here."""
    ratios = tuple(1.0 if i < known / 2 else 0.5 for i in range(known))
    full, _ = drive(cache("mag", ratios=ratios, threshold=0.1, longest=9, retention=0.0), lambda _: 1.0)
    assert full == ([0] if known == 1 else [0, *range(5, 10)])


def test_measured_ratios() -> None:
    """What is added becomes a tenth shorter with every call."""
    measure = Measure()
    assert drive(measure, lambda call: 2 * 0.9**call, 6)[0] == list(range(6))
    assert measure.ratios == pytest.approx([1.0] + [0.9] * 5)


def test_measuring_twice(model: Flux1) -> None:
    """One ratio per call of the network; a second run does not append to the table of the first."""
    measure = Measure()
    run(model, cache=measure)
    once = list(measure.ratios)
    run(model, cache=measure)
    assert measure.ratios == once


# What is refused.


@pytest.mark.parametrize("name", CACHES)
def test_names_and_settings(name: str) -> None:
    """Each by its name; unknown ones are refused with the list of those there are."""
    assert type(cache(name)) is CACHES[name]
    with pytest.raises(
        InputError, match=f"cache '{name}' has no setting 'speed'; it has (threshold|interval|ratios|runs)"
    ):
        cache(name, speed=1)
    with pytest.raises(InputError, match="unknown cache") as caught:
        cache(name.upper())
    assert all(known in str(caught.value) for known in CACHES)


@pytest.mark.parametrize("value", [-1, math.nan, math.inf, "1", None, True])
@pytest.mark.parametrize(
    ("name", "setting"),
    [(name, "threshold") for name in ("first-block", "tea", "mag")]
    + [("mag", "longest"), ("mag", "retention"), ("taylor", "interval"), ("taylor", "order"), ("taylor", "warmup")],
)
def test_bad_numbers(name: str, setting: str, value: Any) -> None:
    """The message names the setting and what it was."""
    with pytest.raises(InputError, match=f"{setting} must be a (finite|whole) number") as caught:
        cache(name, **{setting: value})
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("setting", ["interval", "order", "warmup"])
def test_numbers_of_steps_are_whole(model: Flux1, setting: str) -> None:
    """Half a step, or half a derivative, is refused at once, not in the middle of a run."""
    with pytest.raises(InputError, match=setting):
        run(model, cache=cache("taylor", **{setting: 1.5}))


def test_step_cache_skip_layer_and_wraps_at_once(model: Flux1) -> None:
    """All are wraps: two of the caller's and one function in place of the blocks see what is computed, in their order,
    and the bill counts it; with wraps that only look on, the picture is that without them."""
    seen: list[str] = []

    def looking(label: str) -> Wrap:
        def wrap(inner: RunBlock) -> RunBlock:
            def look(name: str, block: Any, streams: Any, context: Any) -> Any:
                seen.append(f"{label} {name}")
                return inner(name, block, streams, context)

            return look

        return wrap

    options = {
        "cache": cache("taylor", interval=3, warmup=1),
        "guide": guide("skip-layer", skip_scale=1.5, layers=("double_blocks.1",), skip_window=(0.0, 1.0)),
    }
    bill, alone = Bill(), Bill()
    plain = run(model, bill=alone, **options)
    both = run(model, bill=bill, run=looking("run")(run_block), wraps=[looking("first"), looking("second")], **options)
    assert torch.equal(both, plain) and (bill.evaluated, bill.skipped) == (alone.evaluated, alone.skipped)
    assert bill.skipped > 0 and len(seen) == 3 * bill.evaluated
    triples = [tuple(line.split()[0] for line in seen[i : i + 3]) for i in range(0, len(seen), 3)]
    assert set(triples) == {("second", "first", "run")}
    assert sum(line == "run double_blocks.1" for line in seen) < sum(line == "run double_blocks.0" for line in seen)


def test_a_wrap_may_change_what_a_block_says(model: Flux1) -> None:
    """The change passes through the cache: with one that computes everything it is that without a cache."""

    def halved(inner: RunBlock) -> RunBlock:
        def half(name: str, block: Any, streams: Any, context: Any) -> Any:
            out = inner(name, block, streams, context)
            return tuple((a + b) / 2 for a, b in zip(streams, out, strict=True))

        return half

    assert torch.equal(run(model, wraps=[halved]), run(model, wraps=[halved], cache=cache("taylor", interval=1)))
    assert not torch.equal(run(model, wraps=[halved]), run(model))
