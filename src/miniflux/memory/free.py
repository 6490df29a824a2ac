"""What memory is free: of the machine, within the limits of its control groups and of the process, and of a device."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import torch

ROOT = Path("/")  # of the files that Linux says it in
# Of both versions of control groups: where the groups are, limit, use, and what of that is a cache that gives way.
GROUPS = {
    "": ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    "memory": ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def free_ram() -> int | None:
    """Bytes that new work could have without swapping; None where that is not known (Windows)."""
    if sys.platform == "linux":
        return min((*_of_machine(), *_of_groups(), *_of_process()), default=None)
    try:  # macOS says how much there is, not how much is free
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def free_vram(device: torch.device) -> int | None:
    """Bytes free on a device, what torch holds for later among them; None on a CPU, whose memory is the machine's."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    return None


def _of_machine() -> Iterator[int]:
    for line in _lines("proc/meminfo"):
        if line.startswith("MemAvailable:"):
            yield 1024 * int(line.split()[1])


def _of_groups() -> Iterator[int]:
    """What is left in the group of this process, and in each that this one lies in. In a container its own group is
    often mounted where the root of all would be."""
    for line in [*_lines("proc/self/cgroup"), "0::/", "0:memory:/"]:
        _, controllers, path = line.split(":", 2)
        name = "memory" if "memory" in controllers.split(",") else controllers
        if name not in GROUPS:
            continue
        mount, limit, use, cache = GROUPS[name]
        group = PurePosixPath(path.lstrip("/"))
        for folder in (group, *group.parents):
            place = PurePosixPath(mount) / folder
            try:
                allowed, used = (int(_lines(str(place / file))[0]) for file in (limit, use))
            except (IndexError, ValueError):  # no such group, or no limit ("max")
                continue
            spared = [
                int(words[1]) for words in map(str.split, _lines(str(place / "memory.stat"))) if words[0] == cache
            ]
            yield max(0, allowed - used + sum(spared))


def _of_process() -> Iterator[int]:
    """What `ulimit -v` leaves: address space, which new memory takes as much of."""
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        taken = [1024 * int(line.split()[1]) for line in _lines("proc/self/status") if line.startswith("VmSize:")]
        yield max(0, limit - sum(taken))


def _lines(path: str) -> list[str]:
    """The lines of a file; none if it cannot be read."""
    try:
        return (ROOT / path).read_text("ascii", "replace").splitlines()
    except OSError:
        return []
