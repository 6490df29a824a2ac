"""The study of solvers: its arithmetic on numbers made up, and a short run on nano."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

import miniflux
from miniflux.study import solvers
from miniflux.study.solvers import Error


def test_observed_order_of_a_power_law() -> None:
    """error = c / calls^p has order p."""
    errors = [Error("heun", calls, 3.0 * calls**-1.7) for calls in (40, 10, 20)]
    assert solvers.observed_order(errors) == pytest.approx(1.7)


def test_distance_is_relative_and_a_median() -> None:
    """Three pictures, 10 %, 20 % and 500 % away."""
    reference = torch.ones(3, 1, 2, 2)
    latents = reference * torch.tensor([1.1, 1.2, 6.0])[:, None, None, None]
    assert solvers.distance(latents, reference) == pytest.approx(0.2)


def test_measured_on_nano(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """More calls come nearer; the table names every solver with the calls that were made; the figure is written."""
    monkeypatch.setattr(solvers, "REFERENCE", ("rk4", 12))
    errors = solvers.measure(miniflux.load("nano"), [4, 12], 1, ["euler", "heun"])
    assert [(error.solver, error.calls) for error in errors] == [("euler", 4), ("euler", 12), ("heun", 3), ("heun", 11)]
    assert errors[1].error < errors[0].error and errors[3].error < errors[2].error
    text = solvers.table(errors)
    assert "euler" in text and "heun" in text and " 11: " in text
    assert Image.open(solvers.plot(errors, tmp_path / "errors.png")).size[0] > 400
