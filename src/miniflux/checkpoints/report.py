"""What loading says of a file: every tensor of it, and of the network, is accounted for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

FEW = 4  # tensors that are not needed for one and the same reason: so many are named each


def not_needed(redundant: Mapping[str, str]) -> list[tuple[str, str]]:
    """What is not needed, and why, to be read: each key, or of many with one reason the first and how many follow.
    Language models have a hundred tensors behind the last layer that is read."""
    by_reason: dict[str, list[str]] = {}
    for key, why in redundant.items():
        by_reason.setdefault(why, []).append(key)
    few = {
        why: keys if len(keys) <= FEW else [f"{keys[0]} and {len(keys) - 1} more"] for why, keys in by_reason.items()
    }
    return [(key, why) for why, keys in few.items() for key in keys]


@dataclass
class LoadReport:
    """What became of every tensor of a file and of a network.

    Attributes:
        source: the file or files.
        layout: the naming that was recognised.
        dtypes: how many tensors the file stores in each dtype.
        used: keys of the file that went into the network.
        redundant: keys of the file that the network does not need, with the reason.
        missing: keys of the network that the file lacks.
        unused: keys of the file that nothing asked for.
        misshapen: "key: the file's shape, the expected shape".
        not_floating: "key: dtype" of weights stored as whole numbers in no format known here.
        damaged: "key: what is wrong" of packed weights that cannot be unpacked, and what is wrong with the header.
        bad: keys of the network whose values are not finite.
        packed: how many weights the file stores in each format of packed weights.
    """

    source: str
    layout: str
    dtypes: dict[str, int] = field(default_factory=dict)
    used: list[str] = field(default_factory=list)
    redundant: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)
    not_floating: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    packed: dict[str, int] = field(default_factory=dict)

    @property
    def problems(self) -> dict[str, list[str]]:
        found = {
            "missing": self.missing,
            "unused": self.unused,
            "misshapen": self.misshapen,
            "not floating-point": self.not_floating,
            "damaged": self.damaged,
            "not finite (NaN or infinite)": self.bad,
        }
        return {name: keys for name, keys in found.items() if keys}

    def __str__(self) -> str:
        """A first line that sums up, then every key that is not as it should be."""
        counts = [f"{len(keys)} {name}, such as {keys[0]}" for name, keys in self.problems.items()]
        packed = "".join(f", {count} x {name}" for name, count in self.packed.items())
        summary = "; ".join(counts) or f"{len(self.used)} tensors, all used"
        lines = [f"{self.source}: {summary} (layout: {self.layout}{packed})"]
        lines += [f"  {name}: {key}" for name, keys in self.problems.items() for key in keys]
        lines += [f"  not needed: {key} ({why})" for key, why in not_needed(self.redundant)]
        return "\n".join(lines)
