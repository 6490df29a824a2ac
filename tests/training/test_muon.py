"""Muon against torch's own, and against the singular values that it promises."""

from __future__ import annotations

import pytest
import torch

from miniflux.training.muon import Muon, orthogonalised
from tests.tiny import randn


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
def test_steps_equal_torch(shape: tuple[int, int]) -> None:
    """Three steps with momentum and weight decay, in bfloat16 as torch computes: the same to its rounding."""
    start, gradients = randn(*shape, seed=1), [randn(*shape, seed=2 + i) for i in range(3)]
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    mine = Muon([ours], lr=0.01, weight_decay=0.1)
    mine.dtype = torch.bfloat16
    other = torch.optim.Muon([theirs], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for gradient in gradients:
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        mine.step()
        other.step()
    assert (ours - theirs).norm() / (theirs - start).norm() < 0.01


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_singular_values_are_about_one(shape: tuple[int, int]) -> None:
    """And the singular vectors stay: the result has the polar factor's sign and direction."""
    matrix = randn(*shape, seed=5)
    result = orthogonalised(matrix, torch.float32)
    values = torch.linalg.svdvals(result)
    assert float(values.min()) > 0.6 and float(values.max()) < 1.3
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    assert float((u.T @ result @ vh.T).diagonal().min()) > 0.6


def test_a_matrix_without_gradient_is_left_alone() -> None:
    matrix = torch.nn.Parameter(randn(4, 6))
    before = matrix.clone()
    Muon([matrix], lr=0.1, weight_decay=0.1).step()
    assert torch.equal(matrix, before)
