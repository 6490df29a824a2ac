"""Webhooks: who asked for a picture is told when it is there, by a POST that proves where it comes from.

Two signatures are sent where there is a secret. That of BFL's API, of its integration guide:

    X-BFL-Signature: sha256=HEX       HEX: HMAC-SHA256 of the body; the key is the secret in UTF-8

and, since that one could be sent again by whoever has seen it, that of Standard Webhooks (standardwebhooks.com):

    webhook-id: ID                    the same whenever it is tried again
    webhook-timestamp: SECONDS        since 1970
    webhook-signature: v1,BASE64      HMAC-SHA256 of ID.SECONDS.BODY; the key is what follows `whsec_` in the secret,
                                      decoded, or all of a secret that does not begin so, in UTF-8

Addresses are asked as `reaching` says; a redirect is a failure. The secret is neither logged nor in any message.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import json
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from miniflux.apps.serve.reaching import asked, checked, host_of
from miniflux.checks import shown
from miniflux.errors import InputError, MinifluxError

SECONDS = 30.0  # as BFL gives a receiver
TOLERANCE = 300.0  # seconds that a clock may be wrong, and after which a message is too old
WAITS = (1.0, 5.0, 30.0, 300.0, 1800.0, 7200.0, 18000.0)  # BFL tries the first three; then as Standard Webhooks advises
LONGEST_SECRET = 512
ID = re.compile(r"[A-Za-z0-9_-]{1,200}")  # a dot would make it unclear what was signed


class UndeliveredError(MinifluxError):
    """A receiver did not take a webhook; the message says why, and that it may be tried again."""


def signature(secret: str, id: str, seconds: int, body: bytes) -> str:
    """`webhook-signature` of a message.

    Raises:
        InputError: the secret is none.
    """
    made = hmac.digest(_key(secret), f"{id}.{seconds}.".encode() + body, hashlib.sha256)
    return f"v1,{base64.b64encode(made).decode()}"


def bfl_signature(secret: str, body: bytes) -> str:
    """`X-BFL-Signature` of a message; errors as of `signature`."""
    return f"sha256={hmac.new(_utf8(secret), body, hashlib.sha256).hexdigest()}"


def verified(secret: str, headers: Mapping[str, str], body: bytes, now: float | None = None) -> bool:
    """Whether a message comes from somebody who knows the secret, not long ago: for receivers, by `webhook-signature`.

    Args:
        body: as it came, not parsed and written again.
        now: seconds since 1970.
    """
    lower = {name.lower(): value for name, value in headers.items()}
    id, said = lower.get("webhook-id", ""), lower.get("webhook-timestamp", "")
    if not re.fullmatch(r"\d{1,12}", said, re.ASCII) or not ID.fullmatch(id):
        return False
    right = signature(secret, id, int(said), body).encode()
    given = lower.get("webhook-signature", "").encode("utf-8", "replace").split(b" ")
    known = [hmac.compare_digest(right, one) for one in given]
    return any(known) and abs((time.time() if now is None else now) - int(said)) <= TOLERANCE


def check(url: str, secret: str | None, allowed: Sequence[str] = ()) -> None:
    """Refuse what can never be delivered, as soon as somebody asks for it.

    Raises:
        InputError: the address may not be asked, or the secret is none.
    """
    checked(url, allowed)
    if secret is not None:
        _key(secret)


async def deliver(
    url: str,
    secret: str | None,
    payload: Mapping[str, Any],
    id: str,
    allowed: Sequence[str] = (),
    limit: float = SECONDS,
) -> None:
    """Tell a receiver once.

    Args:
        id: of the message.
        limit: seconds for all of it.

    Raises:
        UndeliveredError: it did not answer in time, or with another status than 2xx.
        InputError: it may not be asked, cannot be reached, or the secret is none.
    """
    if not ID.fullmatch(id):
        raise InputError(f"the id of a webhook is letters, digits, _ and -, got {shown(id)}")
    body = json.dumps(payload, allow_nan=False, separators=(",", ":")).encode()
    now, place = int(time.time()), checked(url, allowed)
    headers = {"content-type": "application/json", "webhook-id": id, "webhook-timestamp": str(now)}
    if secret is not None:
        headers["webhook-signature"] = signature(secret, id, now, body)
        headers["x-bfl-signature"] = bfl_signature(secret, body)

    async def told() -> int:
        async with asked("POST", place, allowed, headers, body) as answer:
            return answer.status_code

    try:
        status = await asyncio.wait_for(told(), limit)
    except asyncio.TimeoutError:
        raise UndeliveredError(f"{host_of(place)} took longer than {limit:g} seconds") from None
    if not 200 <= status < 300:
        raise UndeliveredError(f"{host_of(place)} answered {status}")


def next_try(tries: int) -> float | None:
    """Seconds to wait after so many failed tries; None to give up."""
    return WAITS[tries - 1] if 0 < tries <= len(WAITS) else None


def _key(secret: str) -> bytes:
    """The key of Standard Webhooks; messages never show the secret."""
    key = _utf8(secret)
    if not secret.startswith("whsec_"):
        return key
    try:
        bare = key[len("whsec_") :].rstrip(b"=")
        key = base64.b64decode(bare + b"=" * (-len(bare) % 4), validate=True)
    except binascii.Error:
        key = b""
    if not key:
        raise InputError("the secret begins with whsec_, and no base64 follows")
    return key


def _utf8(secret: str) -> bytes:
    try:
        key = secret.encode()
    except UnicodeEncodeError:
        key = b""
    if not 0 < len(key) <= LONGEST_SECRET:
        raise InputError(f"a secret is text of 1 to {LONGEST_SECRET} bytes in UTF-8")
    return key
