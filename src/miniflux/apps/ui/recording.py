"""What was seen inside of a model while it drew a picture, as a session keeps it; `inside` makes and shows it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the page starts without the room of studies
    from miniflux.study.mapping.maps import Array, Maps


@dataclass(frozen=True, repr=False, eq=False)
class Recording:
    """What was seen of one picture.

    Attributes:
        id: the picture's, in the history.
        caption: the beginning of its prompt.
        maps: of its words (N, S, K, 1, rows, columns): of all that a patch looks at, the share of the word.
        shares: what each of P patches looks at (N words + P patches or all as one + references, P), the mean over
            steps, blocks and heads; what is missing to 1 is the rest of the text, and whatever else there is.
        references: how many there were among the tokens.
        left_out: words that are not read: without a token, or behind the end of what is.
        steps: how many the run had.
    """

    id: str
    caption: str
    maps: Maps
    shares: Array = field(repr=False)
    references: int
    left_out: tuple[str, ...]
    steps: int

    @property
    def bytes(self) -> int:
        """Its size in memory."""
        return self.maps.values.nbytes + self.shares.nbytes

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        rows, columns = self.maps.values.shape[-2:]
        return rows, columns

    def about(self) -> str:
        """What was kept, and how large it is, in a line."""
        maps, (rows, columns) = self.maps, self.grid
        some = f" of {self.steps}" if len(maps.steps) < self.steps else ""
        kept = f"{len(maps.names)} words, {len(maps.steps)}{some} steps, {len(maps.blocks)} blocks"
        left = f" Not read by the model: {', '.join(self.left_out)}." if self.left_out else ""
        large = f"{self.bytes / 2**20:.1f} MiB" if self.bytes >= 2**20 else f"{math.ceil(self.bytes / 2**10)} KiB"
        return f"Kept in memory: {large} ({kept}, {rows} x {columns} patches).{left}"
