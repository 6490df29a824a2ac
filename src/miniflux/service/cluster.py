"""Ray, where an option asks for it: started on this machine, or a cluster that runs.

What is started here is ours alone: it listens on this machine only, knows nothing of other Rays of the machine, and
nothing of it is left when we end, processes or files.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from miniflux.errors import InputError, MinifluxError, MissingExtraError

log = logging.getLogger(__name__)

LOCAL = "local"
TRIES = 4  # Ray gives its helpers 15 seconds to begin and itself 30, which on a busy machine are sometimes too few
STORE = 256 * 2**20  # bytes of shared memory; Ray would take a third of all
NEEDED = "gcs_server", "raylet"
LONGEST = 30  # characters of a folder in which Ray can have its sockets, whose paths end at 107
DIED = re.compile(r" [CF] \d+ \d+\] (?:\(\w+\) )?\S+?:\d+: +(.*)")  # the last words of a process in its log

ALWAYS = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nobody is told that we run
    "RAY_DISABLE_FAILURE_SIGNAL_HANDLER": "1",  # a request to end is no failure with a trace
    "RAY_DEDUP_LOGS": "0",  # lines that are alike are lines nevertheless
    "RAY_COLOR_PREFIX": "0",
}
OWN = {  # for one that is started here; what is set already counts
    "RAY_worker_niceness": "0",  # 15 else: behind everything else on the machine, and seldom ready in time
    "RAY_memory_monitor_refresh_ms": "0",  # would end workers because others fill the memory
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # its processes have our interpreter, and no copy of the current folder
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # 5 are too few where models are being loaded
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "2",  # 10 else, in which a proxy that ended is not missed
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "30",
}


@dataclass
class Cluster:
    """Ray, connected.

    Attributes:
        ray: the package.
        folder: its files, if it was started here; else empty.
        processes: those that it cannot do without, and their names, if it was started here.
    """

    ray: Any
    folder: str = ""
    processes: Sequence[tuple[str, Any]] = ()

    def ended(self) -> str:
        """What is no more of what it cannot do without; empty if all is there, or elsewhere."""
        for name, process in self.processes:
            if _is_over(process):
                return f"the process {name} of Ray has ended"
        return ""

    def close(self) -> None:
        """Disconnect; end what was started here."""
        with suppress(Exception):  # it may be Ray that has ended
            self.ray.shutdown()
        if self.folder:
            _clear(self.folder)


def started(address: str) -> Cluster:
    """Connect to Ray.

    Args:
        address: of a cluster, or `auto` for the one of this machine; `LOCAL` to start one that ends with us.

    Raises:
        MissingExtraError: it is not installed.
        InputError: there is no cluster.
        MinifluxError: it does not start here.
    """
    os.environ |= ALWAYS
    if address == LOCAL:
        for name, value in OWN.items():
            os.environ.setdefault(name, value)
        if not {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
            os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}  # in no file
    try:
        ray, _ = import_module("ray"), import_module("psutil")
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"--ray needs {error.name}: pip install 'miniflux[ray]'") from error
    if address == LOCAL:
        return _start(ray)
    if place := re.fullmatch(r"(?:ray://)?\[?(.+?)\]?:(\d+)", address):  # Ray would ask for minutes
        try:
            socket.create_connection((place[1], int(place[2])), timeout=10).close()
        except (OSError, OverflowError) as error:
            raise InputError(f"--ray {address}: nothing answers there ({_line(error)})") from error
    try:
        with _own_signals():
            ray.init(address=address, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        with suppress(Exception):
            ray.shutdown()
        raise InputError(f"--ray {address}: {_line(error)}") from error
    return Cluster(ray)


def _start(ray: Any) -> Cluster:
    import psutil  # pyright: ignore[reportMissingModuleSource]

    for left in reversed(range(TRIES)):
        folder = _folder()
        try:
            with _own_signals():
                ray.init(
                    address=LOCAL,
                    include_dashboard=False,
                    object_store_memory=STORE,
                    logging_level=logging.ERROR,
                    _temp_dir=folder,
                )
            begun = [(process.name(), process) for process in psutil.Process().children()]
            return Cluster(ray, folder, [one for one in begun if one[0] in NEEDED])
        except Exception as error:
            why = _last_words(folder) or _line(error)
            with suppress(Exception):
                ray.shutdown()
            if left:
                log.warning("Ray did not start, and is started again: %s", why)
                _clear(folder)
                continue
            _end(folder)
            raise MinifluxError(
                f"Ray does not start on this machine ({why}): end other programs and try again, or do without --ray; "
                f"its logs are in {folder}"
            ) from error
        except BaseException:
            _clear(folder)
            raise
    raise AssertionError


def _folder() -> str:
    """A new one for the files of Ray; a path that its sockets can have."""
    base = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    try:
        return tempfile.mkdtemp(prefix="ray-", dir=base if len(base) <= LONGEST else "/tmp")
    except OSError as error:
        raise InputError(f"--ray: {error.filename}: {error.strerror}; set RAY_TMPDIR to another folder") from error


@contextmanager
def _own_signals() -> Generator[None]:
    """Ray puts a handler of its own for requests to end, which leaves in the middle."""
    here = threading.current_thread() is threading.main_thread()
    ending = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit:
        if not here:
            raise
        signal.signal(signal.SIGTERM, ending)
        signal.raise_signal(signal.SIGTERM)
        raise
    finally:
        if here:
            signal.signal(signal.SIGTERM, ending)


def _clear(folder: str) -> None:
    """End what has its files in a folder, and remove it."""
    _end(folder)
    shutil.rmtree(folder, ignore_errors=True)


def _end(folder: str) -> None:
    """End our processes that have their files in a folder of Ray, which is said in their command line; and theirs."""
    import psutil  # pyright: ignore[reportMissingModuleSource]

    found: list[Any] = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if any(folder in word for word in process.cmdline()):
                found += [process, *process.children(recursive=True)]
    for process in found:
        with suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(found, timeout=5)


def _is_over(process: Any) -> bool:
    import psutil  # pyright: ignore[reportMissingModuleSource]

    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.Error:
        return True


def _last_words(folder: str) -> str:
    """What a process of Ray said that ended itself."""
    for path in sorted(Path(folder).glob("session_latest/logs/*.out")):
        with suppress(OSError):
            found = DIED.search(path.read_text(errors="replace"))
            if found:
                words = re.sub(r".*Check failed: (\S*has_value\(\) )?", "", found[1])
                return f"{path.stem}: {re.sub(r'/[^ ]+/', '', words)[:200]}"
    return ""


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def share(ray: Any, count: int) -> dict[str, float]:
    """What an actor that draws is to have: a GPU, or without any the largest share of the CPUs of which the machines
    have `count`."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if any(node.get("GPU") for node in nodes):
        return {"num_gpus": 1.0}
    return {"num_cpus": cpus_of_each([int(node.get("CPU", 0)) for node in nodes], count)}


def cpus_of_each(machines: Sequence[int], count: int) -> float:
    """The most CPUs, or the largest even part of one, that each of `count` can have on machines with so many."""
    most = max([*machines, 0])
    if most == 0:  # nothing is counted there
        return 0.0
    for cpus in range(most, 0, -1):
        if sum(machine // cpus for machine in machines) >= count:
            return float(cpus)
    return 1 / -(-count // sum(machines))
