"""Pictures that clients give: by address, as a `data:` URL, in base64, as bytes; bounded before they are decoded.

Addresses are asked as `reaching` says, after three redirects at most, each checked like the first. What comes is
bounded in bytes and in time, however little its sender says; compressed answers are refused, which no picture needs.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
from collections.abc import Sequence
from dataclasses import dataclass

import httpx
from PIL import Image

from miniflux.apps.serve.reaching import asked, checked, host_of
from miniflux.checks import shown
from miniflux.errors import InputError
from miniflux.pictures import open_picture

FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "TIFF", "BMP", "AVIF")
"""What the web uses, and whose headers say how large a picture is: an ICO may hold a larger one than it says."""
SCANS = 200  # of a JPEG, each of which is decoded over all pixels; the usual ten make it appear by and by
ADDRESS = re.compile(r"https?://", re.IGNORECASE)
DATA = re.compile(r"data:(?P<kind>[^,;]*)(?P<more>(;[^,;]*)*),(?P<data>.*)", re.IGNORECASE | re.DOTALL)
MOVED = (301, 302, 303, 307, 308)
HEADERS = {"accept": "image/*", "accept-encoding": "identity"}


@dataclass(frozen=True)
class Limits:
    """What a picture may take; as much as BFL's API takes.

    Attributes:
        size: bytes.
        pixels: in all.
        seconds: until an address has given it whole.
        redirects: on the way to it.
    """

    size: int = 20 * 2**20
    pixels: int = 2**24
    seconds: float = 20.0
    redirects: int = 3


def is_address(text: str) -> bool:
    """Whether a picture is given by its address."""
    return ADDRESS.match(text) is not None


async def fetched(url: str, limits: Limits | None = None, allowed: Sequence[str] = ()) -> bytes:
    """The bytes behind an address.

    Args:
        allowed: names, addresses and networks that may be asked although they are not public, as of `reaching.trusted`.

    Raises:
        InputError: it may not be asked, does not answer, or gives too much, too slowly.
    """
    limits = Limits() if limits is None else limits
    try:
        return await asyncio.wait_for(_fetched(url, limits, allowed), limits.seconds)
    except asyncio.TimeoutError:
        raise InputError(f"{shown(url)} took longer than {limits.seconds:g} seconds") from None


async def _fetched(url: str, limits: Limits, allowed: Sequence[str]) -> bytes:
    place = checked(url, allowed)
    for _ in range(limits.redirects + 1):
        async with asked("GET", place, allowed, HEADERS) as answer:
            if answer.status_code not in MOVED or "location" not in answer.headers:
                return await _body(answer, host_of(place), limits)
            place = checked(answer.headers["location"], allowed, place)
    raise InputError(f"{host_of(place)}: more than {limits.redirects} redirects")


async def _body(answer: httpx.Response, host: str, limits: Limits) -> bytes:
    if answer.status_code != 200:
        raise InputError(f"{host} answered {answer.status_code}, and no picture")
    coding = answer.headers.get("content-encoding", "identity")
    if coding.lower() != "identity":
        raise InputError(f"{host} sends it compressed ({shown(coding)}), which was not asked for")
    length = answer.headers.get("content-length", "0")
    too_large = InputError(f"{host} gives more than {limits.size:,} bytes")
    if len(length) > 15 or int(length) > limits.size:  # its characters first: Python refuses to read thousands
        raise too_large
    body = bytearray()
    async for piece in answer.aiter_raw():
        body += piece
        if len(body) > limits.size:
            raise too_large
    return bytes(body)


def picture_from(given: str | bytes, limits: Limits | None = None) -> Image.Image:
    """A picture from its bytes, or from text: base64, bare or in a `data:` URL. As `open_picture` gives it.

    Raises:
        InputError: it is none, or a larger one than the limits take.
    """
    limits = Limits() if limits is None else limits
    data = _decoded(given, limits) if isinstance(given, str) else given
    if len(data) > limits.size:
        raise InputError(f"the picture has {len(data):,} bytes; at most {limits.size:,} are taken")
    if data.startswith(b"\xff\xd8") and data.count(b"\xff\xda") > SCANS:
        raise InputError(f"the picture is a JPEG of more than {SCANS} scans")
    return open_picture(data, max_pixels=limits.pixels, formats=FORMATS)


def _decoded(text: str, limits: Limits) -> bytes:
    if len(text) > 2 * limits.size + 1000:  # 4/3 of it are base64; line ends and the head of the URL may be more
        raise InputError(f"the picture has more than {limits.size:,} bytes, which are the most that are taken")
    if text[:5].lower() == "data:":
        match = DATA.fullmatch(text)
        if match is None or not match["more"].lower().endswith(";base64"):
            raise InputError(f"a data: URL with ;base64 is expected, got {shown(text[:100])}")
        text = match["data"]
    try:
        bare = "".join(text.split()).rstrip("=").encode("ascii")
        return base64.b64decode(bare + b"=" * (-len(bare) % 4), validate=True)
    except (binascii.Error, UnicodeEncodeError):
        raise InputError(f"a picture in base64 is expected, got {shown(text[:100])}") from None
