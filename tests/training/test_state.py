"""A training run that is stopped and resumed is the run that was not stopped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from miniflux.errors import CheckpointError
from miniflux.training.flow import logit_normal_sigmas, mix
from miniflux.training.state import TrainingState, cosine_rate


def start(folder: Path, about: str = "x") -> TrainingState:
    torch.manual_seed(0)
    return TrainingState(nn.Linear(3, 2), folder / "run", 1e-2, {"what": about})


def work(state: TrainingState, steps: int) -> None:
    for _ in range(steps):
        state.optimise(state.model(torch.randn(4, 3)).square().mean(), cosine_rate(state.step, 20, warmup=2))


def test_resuming_changes_nothing(tmp_path: Path) -> None:
    straight = start(tmp_path / "a")
    work(straight, 10)
    first = start(tmp_path / "b")
    work(first, 4)
    first.save()
    second = start(tmp_path / "b")
    assert second.resume() and second.step == 4
    work(second, 6)
    for a, b in ((straight.model, second.model), (straight.average, second.average)):
        assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert [file.name for file in (tmp_path / "b").iterdir()] == ["run.pt"]


def test_nothing_to_resume(tmp_path: Path) -> None:
    assert not start(tmp_path).resume()


def test_another_run_is_refused(tmp_path: Path) -> None:
    start(tmp_path).save()
    with pytest.raises(CheckpointError, match="was started with"):
        start(tmp_path, about="y").resume()


def test_the_average_follows_slowly(tmp_path: Path) -> None:
    state = start(tmp_path)
    before = state.average.weight.clone()
    work(state, 1)
    moved, followed = (state.model.weight - before).abs().max(), (state.average.weight - before).abs().max()
    assert 0 < followed <= moved


def test_rate() -> None:
    """Warm-up, then from 1 down to the floor, never below."""
    assert cosine_rate(0, 100, warmup=10) == 0.1
    assert cosine_rate(10, 100, warmup=10) == 1.0
    assert cosine_rate(100, 100, warmup=10, floor=0.05) == pytest.approx(0.05)
    assert cosine_rate(500, 100, warmup=10, floor=0.05) == pytest.approx(0.05)


def test_sigmas_are_logit_normal() -> None:
    """Mean and spread of the logits are those asked for."""
    torch.manual_seed(0)
    logits = torch.logit(logit_normal_sigmas(20_000, mean=0.3, std=1.0))
    assert logits.mean().item() == pytest.approx(0.3, abs=0.03) and logits.std().item() == pytest.approx(1, abs=0.03)


def test_mix_is_the_straight_line() -> None:
    x0, noise = torch.randn(3, 4, 2), torch.randn(3, 4, 2)
    sigmas = torch.tensor([0.0, 0.25, 1.0])
    mixed = mix(x0, noise, sigmas)
    assert torch.equal(mixed[0], x0[0]) and torch.equal(mixed[2], noise[2])
    assert_close(mixed[1], 0.75 * x0[1] + 0.25 * noise[1])
