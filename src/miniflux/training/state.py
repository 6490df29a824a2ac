"""A training run that can be stopped at any step and goes on as if it had not been."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from miniflux.disk import write_beside
from miniflux.errors import CheckpointError, OutputError
from miniflux.training.muon import Muon

M = TypeVar("M", bound=nn.Module)

MATRIX_RATE = 4.0  # Muon's rate in units of AdamW's: the best of 2, 4 and 8 on the nano teacher


def cosine_rate(step: int, total: int, warmup: int = 200, floor: float = 0.02) -> float:
    """Factor on the learning rate: linear warm-up, then half a cosine down to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


class TrainingState(Generic[M]):
    """A network, its running average, its optimisers and the step count, saved together.

    Args:
        model: the network to train, float32.
        path: file stem; the state goes to `path.pt`, written beside and renamed.
        rate: AdamW's learning rate, before the schedule's factor.
        about: what the run was started with; a saved run that differs is refused.
        decay: of the running average (EMA), reached gradually from the start.
        matrices: says by its name whether a weight matrix is trained by Muon (orthogonalised momentum,
            https://kellerjordan.github.io/posts/muon) instead of AdamW; without it none is.
    """

    def __init__(
        self,
        model: M,
        path: Path,
        rate: float,
        about: dict[str, Any],
        decay: float = 0.999,
        clip: float = 1.0,
        matrices: Callable[[str], bool] | None = None,
    ) -> None:
        self.model: M = model
        self.path, self.rate, self.decay, self.clip = path.with_suffix(".pt"), rate, decay, clip
        self.about = json.dumps(about, sort_keys=True)
        self.average: M = copy.deepcopy(model).requires_grad_(False)
        named = dict(model.named_parameters())
        chosen = {name for name, p in named.items() if matrices is not None and p.ndim == 2 and matrices(name)}
        rest = [p for name, p in named.items() if name not in chosen]
        self.optimizers: list[tuple[float, torch.optim.Optimizer]] = [
            (1.0, torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.99), weight_decay=0.01))
        ]
        if chosen:
            muon = Muon([named[name] for name in sorted(chosen)], lr=rate, weight_decay=0.01)
            self.optimizers.append((MATRIX_RATE, muon))
        self.step = 0

    def optimise(self, loss: Tensor, factor: float) -> None:
        """One step at rate * factor, gradients clipped to norm 1, and of the running average."""
        self.model.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        for scale, optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.rate * factor * scale
            optimizer.step()
        self.step += 1
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - decay)  # pyright: ignore

    def save(self) -> None:
        """
        Raises:
            OutputError: the place cannot be written to.
        """
        state = {
            "about": self.about,
            "step": self.step,
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": [optimizer.state_dict() for _, optimizer in self.optimizers],
            "rng": torch.get_rng_state(),
        }
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be written: {error.strerror or error}") from error

        def write(beside: Path) -> None:
            try:
                with beside.open("wb") as file:
                    torch.save(state, file)
            except RuntimeError as error:  # torch's word for a disk that is full
                raise error.__context__ if isinstance(error.__context__, OSError) else error from None

        write_beside(self.path, write)

    def resume(self) -> bool:
        """Load the saved state if there is one; True if there was.

        Raises:
            CheckpointError: the saved run was started with other settings.
        """
        if not self.path.exists():
            return False
        saved = torch.load(self.path, weights_only=True)
        if saved["about"] != self.about:
            raise CheckpointError(f"{self.path} was started with {saved['about']}, this run with {self.about}")
        self.step = saved["step"]
        self.model.load_state_dict(saved["model"])
        self.average.load_state_dict(saved["average"])
        for (_, optimizer), state in zip(self.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        torch.set_rng_state(saved["rng"])
        return True
