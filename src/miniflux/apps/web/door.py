"""Under which names the page and the server answer, by what a browser says of itself.

A browser lets any page on the web send requests to this machine. It says where they come from (`Origin`), and under
which name it found us (`Host`); a foreign name that was made to point here (DNS rebinding) is seen by the second alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import urlsplit

from miniflux.apps.web.bodies import RefusedError
from miniflux.apps.web.listening import address
from miniflux.errors import InputError


@dataclass(frozen=True)
class Door:
    """Under which names something is served, and which pages of browsers are its own.

    Attributes:
        names: lower case; addresses of this machine need not be among them.
        allowed: what a proxy in front of it is asked for, as (name, port or None); only with one of them are the
            headers believed by which a proxy says what it was asked for.
        prefix: what stands before every path, such as `/draw`, whether a proxy takes it away or not.
        option: of the command that serves it, by which a name is allowed.
    """

    names: frozenset[str] = frozenset({"localhost"})
    allowed: tuple[tuple[str, int | None], ...] = ()
    prefix: str = ""
    option: str = "--allow-host NAME"

    def serves(self, host: str | None, local: str) -> tuple[str, int | None]:
        """The name and port of a `Host` header.

        Args:
            local: the address of this machine that the connection came to.

        Raises:
            RefusedError: it is not served under that.
        """
        found = split(host or "")
        if found is None:
            raise RefusedError(400, "no Host header, or none that is a name and a port")
        name, port = found
        literal = address(name)
        own = literal is not None and (literal.is_loopback or literal == address(local))
        if own or name in self.names or any(name == known and other in (None, port) for known, other in self.allowed):
            return found
        raise RefusedError(421, f"not served as {name[:100]!r}; if it should be: {self.option}")

    def own(self, origin: str, asked: tuple[str, int | None]) -> bool:
        """Whether an `Origin` is a page served here, by what was asked for as (name, port)."""
        scheme, _, rest = origin.partition("://")
        rest = rest.partition("/")[0]  # of a Referer
        found, usual = split(rest), {"http": 80, "https": 443}.get(scheme.lower())
        if found is None or usual is None:
            return False
        port = found[1] or usual
        if found[0] == asked[0] and port == (asked[1] or usual):
            return True
        return any(found[0] == name and port == (other or usual) for name, other in self.allowed)


def split(host: str) -> tuple[str, int | None] | None:
    """The name (lower case, without a dot at the end; addresses in their plain form) and the port of a `Host`."""
    match = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_.-]{1,253})(?::(\d{0,5}))?", host)
    if match is None:
        return None
    name = match[1].lower().strip("[]").removesuffix(".")
    port = int(match[2]) if match[2] else None
    found = address(name)
    if not name or ("[" in match[1]) != (":" in name) or (port is not None and port > 65535):
        return None
    if "[" in match[1] and found is None:
        return None
    return (name if found is None else str(found)), port


def allowed_host(text: str) -> tuple[str, int | None]:
    """A name for `Door.allowed`, as people write it.

    Raises:
        InputError: it is none.
    """
    bare = text.strip()
    try:
        name = bare if bare.isascii() else bare.encode("idna").decode("ascii")
    except UnicodeError:
        name = ""
    found = split(f"[{name}]" if name.count(":") > 1 and not name.startswith("[") else name)
    if found is None:
        raise InputError(f"--allow-host {text!r}: expected NAME or NAME:PORT, such as draw.example.org")
    return found


def prefix_of(root: str) -> str:
    """The path of a root such as `/draw` or `https://example.org/draw`, without a slash at the end.

    Raises:
        InputError: it is neither.
    """
    parts = urlsplit(root)
    if root and not (root.startswith("/") and not root.startswith("//")) and parts.scheme not in ("http", "https"):
        raise InputError(f"GRADIO_ROOT_PATH={root!r}: expected a path such as /draw, or a whole address")
    return parts.path.rstrip("/")


def door(names: Iterable[str], allowed: Iterable[str], root: str = "") -> Door:
    """What a page is served under, from what people write; errors as of `allowed_host` and `prefix_of`."""
    return Door(frozenset(names), tuple(allowed_host(text) for text in allowed), prefix_of(root))
