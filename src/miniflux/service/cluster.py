"""Ray, where an option asks for it: started on this machine, or a cluster that runs."""

from __future__ import annotations

import logging
import os
import signal
from typing import Any

from miniflux.errors import InputError, MissingExtraError

LOCAL = "local"


def started(address: str) -> Any:
    """The package `ray`, connected.

    Args:
        address: of a cluster, or `auto` for the one of this machine; `LOCAL` to start one that ends with us.

    Raises:
        MissingExtraError: it is not installed.
        InputError: there is no cluster.
    """
    # Nobody is told that we run; a request to end is no failure with a trace.
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DISABLE_FAILURE_SIGNAL_HANDLER": "1"}
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"--ray needs {error.name}: pip install 'miniflux[ray]'") from error
    ending = signal.getsignal(signal.SIGTERM)
    more = {"include_dashboard": False} if address == LOCAL else {"address": address}
    try:
        ray.init(**more, logging_level=logging.WARNING)
    except (ConnectionError, ValueError) as error:
        raise InputError(f"--ray {address}: {str(error).partition(chr(10))[0]}") from error
    signal.signal(signal.SIGTERM, ending)  # Ray has put its own there, which leaves in the middle
    return ray


def share(ray: Any, count: int) -> dict[str, float]:
    """What an actor that draws is to have: a GPU, or without any its share of the CPUs."""
    total: dict[str, float] = ray.cluster_resources()
    return {"num_gpus": 1.0} if total.get("GPU") else {"num_cpus": max(1.0, total.get("CPU", 1.0) // count)}
