"""What ControlNets, Redux and IP-Adapters have in common: a network of their own, and how strongly it steers when."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from miniflux.checks import check_number, check_window, shown
from miniflux.errors import InputError
from miniflux.models.vision import ClipVision, SiglipVision
from miniflux.sampling import Schedule


@dataclass(frozen=True, eq=False)
class Steering:
    """A network that steers, as `conditions.load` gives it.

    Attributes:
        network: a ControlNet, Redux or an IP-Adapter.
        vision: the tower that sees pictures for it; None for ControlNets.
        files: (what, file) of everything it was loaded from.
    """

    network: nn.Module
    vision: SiglipVision | ClipVision | None = None
    files: tuple[tuple[str, Any], ...] = ()


Strength = float | Sequence[float] | Callable[[float], float]
"""One for all blocks and steps; one for each block; or a function of the noise level."""


def steering_of(kind: type[nn.Module] | tuple[type[nn.Module], ...], given: Any, vision: bool = False) -> Steering:
    """What somebody gives as the network of a condition, as `Steering`.

    Args:
        kind: what its network must be.
        vision: whether a tower must be there.

    Raises:
        InputError: it is something else.
    """
    steering = given if isinstance(given, Steering) else Steering(given)
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(steering.network, kinds):
        names = " or ".join(one.__name__ for one in kinds)
        what = type(steering.network).__name__ if isinstance(given, Steering) else shown(given)
        raise InputError(f"the network must be a {names}, as conditions.load gives it, got {what}")
    if vision and steering.vision is None:
        name = type(steering.network).__name__
        raise InputError(f"{name} needs a vision tower to see pictures with: conditions.load(path, vision=...)")
    return steering


def check_strength(scale: Strength, blocks: int) -> None:
    """Raises InputError unless it is one of what `Strength` says, for so many blocks."""
    if callable(scale):
        return
    if isinstance(scale, Sequence) and not isinstance(scale, str):
        if len(scale) != blocks:
            raise InputError(f"scale must have a number for each of {blocks} blocks, got {len(scale)}")
        for i, one in enumerate(scale):
            check_number(f"scale[{i}]", one, -float("inf"))
        return
    check_number("scale", scale, -float("inf"))  # pyright: ignore[reportArgumentType]


def strength_of(scale: Strength, block: int, sigma: float) -> float:
    """That of one block at a noise level."""
    if callable(scale):
        return float(check_number("what the scale returns", scale(sigma), -float("inf")))
    return float(scale[block]) if isinstance(scale, Sequence) else float(scale)


def told_of(scale: Strength) -> Any:
    """As plain JSON; of a function that it is one."""
    return "a function" if callable(scale) else list(scale) if isinstance(scale, Sequence) else float(scale)


@dataclass(frozen=True)
class Window:
    """When a network steers, in shares of the steps: in step i of n if that lies inside as a whole, as in diffusers.

    Raises:
        InputError: not 0 <= start < stop <= 1.
    """

    start: float = 0.0
    stop: float = 1.0

    def __post_init__(self) -> None:
        check_window("window", (self.start, self.stop))

    def holds(self, timesteps: Tensor, levels: Schedule) -> bool:
        """Whether the step that calls the network at this noise level (B,) lies inside."""
        if (self.start, self.stop) == (0.0, 1.0):
            return True
        # Rounded as the network is told them.
        passed = torch.tensor(levels.falling[:-1]).to(timesteps.dtype) >= timesteps[0].cpu()
        step, steps = max(0, int(passed.sum()) - 1), levels.steps
        return not (step / steps < self.start or (step + 1) / steps > self.stop)


def with_added(streams: tuple[Tensor, ...], addition: Tensor, text_tokens: int) -> tuple[Tensor, ...]:
    """The streams of a block with something added to the first of its image tokens (B, L', hidden), in memory of their
    own: (img, txt) of a double block, (txt and img joined,) of a single one, behind so many text tokens."""
    first, tokens = (0 if len(streams) == 2 else text_tokens), streams[0].clone()
    tokens[:, first : first + addition.shape[1]] += addition.to(tokens)
    return (tokens, *streams[1:])


def waiting(conditions: Sequence[object], device: torch.device | None = None) -> int:
    """Bytes of the networks of conditions, each counted once, that a run has to bring to its device; of files that the
    machine's own memory maps they count every time, because what is mapped may be let go of between runs."""
    steering = [one for condition in conditions if isinstance(one := getattr(condition, "network", None), Steering)]
    networks = {id(x): x for one in steering for x in (one.network, one.vision) if x is not None}
    weights = (weight for network in networks.values() for weight in network.parameters())
    there = None if device is None or device.type == "cpu" else device.type
    return sum(w.numel() * w.element_size() for w in weights if w.device.type != there)


def placed(network: nn.Module, like: Tensor) -> Tensor:
    """Bring a network to where a tensor is, in its own precision: returns one of its weights."""
    weight = next(network.parameters())
    if weight.device != like.device:
        network.to(like.device)
        weight = next(network.parameters())
    return weight
