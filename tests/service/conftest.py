"""What tests of the service share: work that takes no time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image

from miniflux.result import Result
from miniflux.service import Cost
from miniflux.service.queue import Step
from miniflux.settings import Request


def picture(request: Request, size: int = 16) -> Result:
    """A result whose colour is its seed."""
    color = (request.seed % 256, request.seed // 256 % 256, 0)
    about: list[dict[str, Any]] = [
        {"prompt": request.prompt, "seed": request.seed + i, "model": "nano-dev", "loras": []}
        for i in range(request.images)
    ]
    images = [Image.new("RGB", (size, size), color) for _ in range(request.images)]
    return Result(images, torch.zeros(request.images, 4, 2, 2), about)


def cost(request: Request) -> Cost:
    """As many steps as the request says."""
    return Cost(kind=request.model, size=64, steps=(request.steps or 4) * request.images)


@pytest.fixture
def draw() -> Callable[[Request, Step], Result]:
    """Work that tells its steps and takes no time."""

    def work(request: Request, step: Step) -> Result:
        for done in range(1, cost(request).steps + 1):
            step(done, lambda: Image.new("RGB", (8, 8), (request.seed % 256, 0, 0)))
        return picture(request)

    return work
