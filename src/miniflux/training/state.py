"""A training run that can be stopped at any step and goes on as if it had not been."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from miniflux.errors import CheckpointError

M = TypeVar("M", bound=nn.Module)


def cosine_rate(step: int, total: int, warmup: int = 200, floor: float = 0.02) -> float:
    """Factor on the learning rate: linear warm-up, then half a cosine down to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


class TrainingState(Generic[M]):
    """A network, its running average, its optimiser and the step count, saved together.

    Args:
        model: the network to train, float32.
        path: file stem; the state goes to `path.pt`, written beside and renamed.
        rate: AdamW's learning rate, before the schedule's factor.
        about: what the run was started with; a saved run that differs is refused.
        decay: of the running average (EMA), reached gradually from the start.
    """

    def __init__(
        self, model: M, path: Path, rate: float, about: dict[str, Any], decay: float = 0.999, clip: float = 1.0
    ) -> None:
        self.model: M = model
        self.path, self.rate, self.decay, self.clip = path.with_suffix(".pt"), rate, decay, clip
        self.about = json.dumps(about, sort_keys=True)
        self.average: M = copy.deepcopy(model).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.01)
        self.step = 0

    def optimise(self, loss: Tensor, factor: float) -> None:
        """One step of AdamW at rate * factor, gradients clipped to norm 1, and of the running average."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * factor
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.step += 1
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - decay)  # pyright: ignore

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".part")
        torch.save(
            {
                "about": self.about,
                "step": self.step,
                "model": self.model.state_dict(),
                "average": self.average.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "rng": torch.get_rng_state(),
            },
            beside,
        )
        beside.replace(self.path)

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
        self.optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["rng"])
        return True
