"""Whether torch can compile here, told before anything waits for it."""

from __future__ import annotations

import torch

from miniflux.errors import InputError

NEEDS = {
    "cpu": "a C++ compiler (g++ or clang; the environment variable CXX may name another) and the headers of Python",
    "cuda": "the package triton and a C compiler",
}
"""What `torch.compile` needs, by the type of the device."""


def check_compiler(what: str, device: torch.device) -> None:
    """Compile something small.

    Args:
        what: what was asked for, for the message.

    Raises:
        InputError: it does not work; the message says what is needed.
    """
    try:
        with torch.inference_mode():
            torch.compile(torch.sin, fullgraph=True)(torch.zeros(2, device=device))
    except RuntimeError as error:  # all errors of torch.compile are of this kind
        needs = NEEDS.get(device.type, "another device")
        raise InputError(
            f"{what} is not possible here: torch cannot compile for {device.type} and needs {needs} ({reason(error)})"
        ) from error


def reason(error: Exception) -> str:
    """What an error of torch's compiler says in its first line."""
    inner = getattr(error, "inner_exception", error)
    return str(inner).strip().partition("\n")[0]
