"""Pictures that were given to a service, by the SHA-256 of their pixels, and the conditions that they belong to."""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from miniflux.checks import whole
from miniflux.conditions import Condition, Steering
from miniflux.conditions.again import again
from miniflux.conditions.masks import check_mask
from miniflux.disk import folder_to_fill, write_beside
from miniflux.errors import InputError
from miniflux.pictures import digest_of, on_white, open_picture
from miniflux.settings import Request
from miniflux.steering import load
from miniflux.weights.origin import Stamp, stamps

OWN = re.compile(r"[0-9a-f]{64}[.]png|[0-9a-f]{16}[.]part")  # files of a service, and what one left half-written
NETWORKS = 2  # that steer, kept in memory


class Pictures:
    """Pictures and masks in a folder, as PNG, by the SHA-256 of their pixels.

    Args:
        vision: vision towers, for networks that have none beside them.

    Raises:
        OutputError: the folder cannot be made, or not be written to.
    """

    def __init__(self, folder: str | Path, vision: Sequence[str | Path] = ()) -> None:
        self.folder, self.vision = Path(folder), tuple(vision)
        folder_to_fill(self.folder, "pictures")
        self._lock = threading.Lock()
        self._networks: OrderedDict[str, tuple[list[Stamp], Steering]] = OrderedDict()

    def add(self, picture: Image.Image | Tensor) -> str:
        """Keep a picture as it is; or a mask (H, W) from 0 to 1, in 256 levels.

        Returns:
            What `Request` calls it.

        Raises:
            InputError: as `pictures.open_picture`; or the mask is not of numbers from 0 to 1.
            OutputError: it cannot be written.
        """
        if isinstance(picture, Tensor):
            check_mask(picture)
            shown = Image.fromarray((picture * 255).round().byte().numpy())
            digest = digest_of(_mask(shown))
        else:
            shown = open_picture(picture)
            digest = digest_of(shown)
        with self._lock:
            if digest not in self:
                write_beside(self._path(digest), lambda beside: shown.save(beside, "PNG", compress_level=1))
            self._used(digest)
        return digest

    def _path(self, digest: str) -> Path:
        return self.folder / f"{digest}.png"

    def _used(self, digest: str) -> None:
        """Somebody needs it now: it is young again."""
        with suppress(OSError):
            self._path(digest).touch()

    def __contains__(self, digest: str) -> bool:
        return self._path(digest).is_file()

    def picture(self, digest: str) -> Image.Image:
        """One that was added.

        Raises:
            InputError: it is not here, or not any more.
        """
        with self._lock:
            if digest in self:
                self._used(digest)
                return open_picture(self._path(digest))
        raise InputError(f"the picture that it was made from (SHA-256 {digest[:12]}...) is not here: give it again")

    def mask(self, digest: str) -> Tensor:
        """A mask that was added, (H, W); errors as of `picture`."""
        return _mask(self.picture(digest))

    def steering(self, request: Request) -> dict[str, Any]:
        """The arguments of `Pipeline.generate` that are pictures, or hold some.

        Raises:
            InputError: a picture is not here.
            CheckpointError: a network cannot be read, or does not fit.
        """
        found: dict[str, Any] = {"strength": request.strength, "conditions": self.conditions(request)}
        if request.image is not None:
            found["image"] = self.picture(request.image)
        if request.mask is not None:
            found["mask"] = self.mask(request.mask)
        return found

    def conditions(self, request: Request, kinds: Sequence[str] | None = None) -> list[Condition]:
        """What else steers it; only conditions of these kinds, if they are named. Errors as of `steering`."""
        uses = [use for use in request.conditions if kinds is None or use.kind in kinds]
        seen = {digest: on_white(self.picture(digest)) for use in uses for digest in use.pictures}
        names = {digest: digest_of(picture) for digest, picture in seen.items()}  # of transparent ones, on white
        networks = [self._network(use.network) for use in uses if use.network is not None]
        return again([use.described(names) for use in uses], list(seen.values()), networks)

    def _network(self, path: str) -> Steering:
        with self._lock:
            known = self._networks.pop(path, None)
            if known is None or known[0] != stamps(Path(path)):
                known = None
                while len(self._networks) >= NETWORKS:
                    self._networks.popitem(last=False)
                known = stamps(Path(path)), load(path, vision=self.vision or None)
            self._networks[path] = known
            return known[1]


class Given(Pictures):
    """Those of a service that forgets them when it ends.

    Args:
        folder: for them alone. What an earlier service left there goes now, and these go with `close`.
        max_bytes: of their files; those that were used least recently go first.
        vision: as of `Pictures`.

    Raises:
        OutputError: as of `Pictures`.
        InputError: something else is in the folder.
    """

    def __init__(self, folder: str | Path, max_bytes: int = 2**30, vision: Sequence[str | Path] = ()) -> None:
        super().__init__(folder, vision)
        self.max_bytes = whole("max_bytes", max_bytes, 1)
        self._sizes: OrderedDict[str, int] = OrderedDict()  # bytes by SHA-256, the least recently used first
        found = list(self.folder.iterdir())
        other = next((path for path in found if not OWN.fullmatch(path.name)), None)
        if other is not None:
            raise InputError(f"{folder}: a folder for given pictures alone is expected, and {other.name} is in it")
        for path in found:
            path.unlink()

    def _used(self, digest: str) -> None:
        if digest not in self._sizes:
            self._sizes[digest] = self._path(digest).stat().st_size
        self._sizes.move_to_end(digest)
        while sum(self._sizes.values()) > self.max_bytes and len(self._sizes) > 1:
            self._path(self._sizes.popitem(last=False)[0]).unlink(missing_ok=True)

    def __contains__(self, digest: str) -> bool:
        return digest in self._sizes

    def close(self) -> None:
        """Remove everything."""
        with self._lock:
            for digest in self._sizes:
                self._path(digest).unlink(missing_ok=True)
            self._sizes.clear()
            with suppress(OSError):  # somebody put something else there
                self.folder.rmdir()


def unsteered(request: Request) -> dict[str, Any]:
    """As `Given.steering`, where no pictures are kept.

    Raises:
        InputError: the request needs one.
    """
    if request.pictures:
        raise InputError("the request is steered by pictures, and no place for pictures was given to this service")
    return {}


def _mask(shown: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(shown.convert("L")).astype(np.float32)) / 255
