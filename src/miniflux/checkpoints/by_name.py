"""Which networks that no pipeline is made of are in a file, behind which prefixes, and what exactly they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from miniflux.checkpoints.files import Entry
from miniflux.checkpoints.layouts import renamed
from miniflux.checkpoints.networks.known import KNOWN, STEERS, Known, Spelling

_FIRST = tuple(spelling.signs[0] for known in KNOWN for spelling in known.spellings)


@dataclass(frozen=True)
class Found:
    """A network that no pipeline is made of, in a file.

    Attributes:
        what: which one.
        layout: the naming of its tensors.
        prefix: what stands before their names.
        name: what it is, in a few words.
    """

    what: Known
    layout: str
    prefix: str
    name: str


def found_by_name(entries: Mapping[str, Entry]) -> list[Found]:
    """The networks among these keys that are known by name only, at most one behind each prefix.

    Args:
        entries: of a file; packed weights by the shapes that they unpack to.
    """
    signs = [key for key in entries if key.endswith(_FIRST)]
    found: dict[str, Found] = {}
    for known, spelling in ((one, how) for one in KNOWN for how in one.spellings):
        for key in signs:
            prefix = key[: -len(spelling.signs[0])]
            outer = any(prefix.startswith(at) for at, one in found.items() if one.what.named is known.named)
            if key != prefix + spelling.signs[0] or (prefix and not prefix.endswith(".")) or prefix in found or outer:
                continue
            if (prefix and spelling.alone) or any(prefix + sign in entries for sign in spelling.without):
                continue
            if all(prefix + sign in entries for sign in spelling.signs):
                found[prefix] = Found(known, spelling.layout, prefix, _named(known, spelling, prefix, entries))
    return list(found.values())


def _named(known: Known, spelling: Spelling, prefix: str, entries: Mapping[str, Entry]) -> str:
    shapes = {key[len(prefix) :]: tuple(entry.shape) for key, entry in entries.items() if key.startswith(prefix)}
    try:
        name = known.named(renamed(spelling.rows, shapes), known.released)
    except (KeyError, ValueError, IndexError):  # a tensor that tells the size is not there, or has other axes
        name = f"an incomplete {known.network}"
    return f"{name}, {STEERS}"
