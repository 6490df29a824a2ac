"""What a call will do, resolved once: the number of calls is the one that is counted, everywhere."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from inspect import signature
from typing import Any

import pytest
import torch
from torch import nn

import miniflux
from miniflux.conditions import Reference
from miniflux.errors import InputError
from miniflux.pipeline import Pipeline
from miniflux.plan import Plan
from miniflux.sampling import GUIDES, SOLVERS, guide
from miniflux.service.models import Models
from miniflux.service.queue import Timings
from miniflux.settings import Request
from miniflux.variants import variant

RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "restart": {"restart": (0.2, 0.8, 2)},
    "part": {"image": torch.zeros(3, 64, 64), "strength": 0.55},
    "stopped": {"stop": 3},
    "part, restart": {"image": torch.zeros(3, 64, 64), "strength": 0.7, "restart": (0.1, 0.4, 1)},
}


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return miniflux.tiny()


@pytest.fixture
def rows(pipe: Pipeline) -> Iterator[list[int]]:
    """How many rows each call of the network had."""
    seen: list[int] = []

    def count(_: nn.Module, given: tuple[Any, ...]) -> None:
        seen.append(len(given[0]))

    handle = pipe.transformer.register_forward_pre_hook(count)
    yield seen
    handle.remove()


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("method", [None, *GUIDES])
@pytest.mark.parametrize("solver", ["euler", "heun", "midpoint", "rk4", "dpmpp-2s", "unipc", "lcm"])
def test_calls_are_those_that_are_counted(
    solver: str, method: str | None, run: str, pipe: Pipeline, rows: list[int]
) -> None:
    """For kinds of solvers, every guide - with a window, so that texts come and go - and parts of runs."""
    window = {"skip_window": (0.1, 0.9)} if method == "skip-layer" else {"window": (0.2, 0.8), "scale": 2.0}
    options = {"solver": solver, "steps": 5, "guide": method and guide(method, **window), **RUNS[run]}
    plan = Plan.of(pipe.variant, "a star", **options)
    pipe.generate("a star", **options)
    assert plan.calls == sum(rows) == plan.needs().calls


@pytest.mark.parametrize("solver", SOLVERS)
def test_calls_of_every_solver(solver: str, pipe: Pipeline, rows: list[int]) -> None:
    pipe.generate("a star", solver=solver, steps=4)
    assert Plan.of(pipe.variant, "a star", solver=solver, steps=4).calls == sum(rows)


def test_what_is_left_of_a_resumed_run(pipe: Pipeline, rows: list[int]) -> None:
    half = pipe.generate("a star", steps=5, stop=2).moment
    rows.clear()
    pipe.generate("a star", steps=5, resume=half)
    assert Plan.of(pipe.variant, "a star", steps=5, resume=half).calls == sum(rows) == 3


def test_the_signatures_that_people_read_are_equal() -> None:
    """generate, Plan.of and Request name the same arguments with the same defaults; what only looks on, or cannot be
    written down, is generate's alone."""
    made = {name: one.default for name, one in signature(Pipeline.generate).parameters.items() if name != "self"}
    plan = {name: one.default for name, one in signature(Plan.of).parameters.items() if name != "variant"}
    assert plan == {name: value for name, value in made.items() if name not in ("progress", "callback", "watch")}
    request = {one.name: one.default for one in fields(Request) if one.name in made and one.name != "prompt"}
    assert request == {name: made[name] for name in request} and len(request) == len(fields(Request)) - 4


def test_one_number_everywhere() -> None:
    """generate, a request and the service resolve a call in one way."""
    chosen, options = variant("nano"), {"steps": 6, "solver": "heun", "guide": guide("cfg", scale=2.0), "images": 2}
    plan, request = Plan.of(chosen, "a star", **options), Request(prompt="a star", **options)
    assert request.plan(chosen).needs() == plan.needs() and plan.calls == 2 * 11
    assert request.steps_in_all(chosen) == plan.total * plan.steps == 12
    cost = Models().cost(request)
    assert (cost.steps, cost.size) == (12, plan.calls / plan.steps * plan.rows * plan.columns)


def test_a_run_that_calls_more_costs_more() -> None:
    """What was measured of one window of a guide tells, in proportion of calls, how long another takes."""
    chosen, models, timings = variant("nano"), Models(), Timings()
    narrow, wide = (
        Request(prompt="a star", model="nano", steps=8, guide=guide("cfg", scale=2.0, window=(0.0, end)))
        for end in (0.5, 1.0)
    )
    assert (narrow.plan(chosen).calls, wide.plan(chosen).calls) == (12, 16)
    timings.add_step(models.cost(wide), 2.0)
    assert timings.per_step(models.cost(narrow)) == 1.5


def test_what_cannot_be_resolved_is_refused_by_name() -> None:
    for options, said in (
        ({"steps": 0}, "steps"),
        ({"width": 5}, "width"),
        ({"stop": 0}, "stop"),
        ({"seed": -1}, "seed"),
    ):
        with pytest.raises(InputError, match=said):
            Plan.of(variant("nano"), "a star", **options)


def test_what_needs_no_weights_is_refused_before_texts_are_encoded(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plan.of refuses what generate refuses, in the same words, and generate does so before any network works."""
    half, whole = (pipe.generate("a star", steps=5, stop=stop).moment for stop in (2, None))

    def never(*_: object, **__: object) -> None:
        raise AssertionError("a text was encoded")

    monkeypatch.setattr(type(pipe.text), "encode", never)
    for options, said in (
        ({"steps": 4, "stop": 9}, "stop must be a number of steps from 1 to 4, got 9"),
        ({"steps": 5, "stop": 2, "resume": half}, "stop must be a number of steps from 3 to 5, got 2"),
        ({"steps": 4, "resume": half}, "resume is from a run of 5 steps; this one has 4"),
        ({"steps": 5, "resume": whole}, "nothing is left to do"),
        ({"steps": 5, "resume": half, "cache": "tea"}, "resume cannot be exact with a step cache"),
        ({"padding": "odd"}, "padding must be one of released, masked, trimmed, got 'odd'"),
        ({"guide": guide("skip-layer", layers=("double_blocks.99",))}, "no block 'double_blocks.99' to skip"),
        ({"conditions": 3}, "conditions must be a list, got 3"),
        ({"conditions": [3]}, r"conditions\[0\] must be one of miniflux.conditions, got 3"),
        ({"conditions": [Reference]}, r"conditions\[0\] must be one of miniflux.conditions, got"),
        ({"wraps": 3}, "wraps must be a list, got 3"),
        ({"wraps": [3]}, r"wraps\[0\] must be a function, got 3"),
    ):
        with pytest.raises(InputError, match=said) as resolved:
            Plan.of(pipe.variant, "a star", **options)
        with pytest.raises(InputError) as drawn:
            pipe.generate("a star", **options)
        assert str(drawn.value) == str(resolved.value)
