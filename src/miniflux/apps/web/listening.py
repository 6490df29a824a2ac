"""Where the page listens, and under which addresses and names it can then be asked for."""

from __future__ import annotations

import errno
import ipaddress
import re
import socket
from dataclasses import dataclass

from miniflux.errors import InputError

FIRST_PORT, PORTS = 7860, 100  # of no given port, so many are tried
ANYWHERE = "192.0.2.1", "2001:db8::1"  # reserved for examples: nobody is there, and nothing is sent

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True)
class Listening:
    """Sockets that are bound and listen.

    Attributes:
        sockets: all with the same port; `localhost` may have one of each kind.
        port: theirs.
        host: what was asked for, without brackets.
        only_here: whether nothing but this machine can reach it.
    """

    sockets: list[socket.socket]
    port: int
    host: str
    only_here: bool

    def close(self) -> None:
        for one in self.sockets:
            one.close()

    @property
    def hosts(self) -> list[str]:
        """What can be opened in a browser, as it stands in an address; the first works on this machine."""
        bound = address(self.host)
        if bound is None:
            return [self.host]
        if not bound.is_unspecified:
            return [f"[{bound}]" if bound.version == 6 else str(bound)]
        dual = bound.version == 6
        outside = [found for found in (_own(4), _own(6) if dual else None) if found is not None]
        here = "127.0.0.1" if not dual or _takes_v4(self.sockets[0]) else "[::1]"
        return [here, *(f"[{one}]" if ":" in one else one for one in outside)]

    @property
    def names(self) -> set[str]:
        """Names, lower case, under which it may be asked for. Addresses are judged by the connection they come over."""
        names = {"localhost"}
        bound = address(self.host)
        if bound is None:
            names.add(self.host.lower().rstrip("."))
        elif bound.is_unspecified:
            names |= {"0.0.0.0", "::"}  # people copy these, and mostly get here
        if not self.only_here:
            own = socket.gethostname().lower()
            names |= {own, own.partition(".")[0], f"{own.partition('.')[0]}.local"}
        return names - {""}


def address(text: str) -> Address | None:
    """An address in its plain form, `::ffff:1.2.3.4` as 1.2.3.4, without the zone; None if the text is none."""
    try:
        found = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return mapped or found


def listen(host: str, port: int | None) -> Listening:
    """Bind and listen.

    Args:
        host: a name or an address of this machine, `0.0.0.0` or `::` for all of them; IPv6 with brackets or without.
        port: 0 for any that is free; None for the first that is free from 7860.

    Raises:
        InputError: the name is unknown, the address is not of this machine, or the port is taken or not allowed.
    """
    bare = host.strip()
    if bare.startswith("[") and bare.endswith("]"):
        bare = bare[1:-1]
    if not bare or not re.fullmatch(r"[A-Za-z0-9._:%-]+", bare):
        raise InputError(f"--host {host!r}: expected a name or an address, such as 127.0.0.1, ::1 or 0.0.0.0")
    if port is not None and not 0 <= port <= 65535:
        raise InputError(f"--port {port}: expected 0 to 65535")
    bare = _plain(bare)
    places = _resolved(bare)
    for candidate in range(FIRST_PORT, FIRST_PORT + PORTS) if port is None else [port]:
        try:
            sockets = _bound(places, candidate)
        except OSError as error:
            if error.errno == errno.EADDRINUSE and port is None:
                continue
            raise InputError(f"--host {bare} --port {candidate}: {_why(error, bare, candidate)}") from error
        only_here = all(_loopback(place[1][0]) for place in places)
        return Listening(sockets, sockets[0].getsockname()[1], bare, only_here)
    raise InputError(
        f"--host {bare}: no port of {FIRST_PORT} to {FIRST_PORT + PORTS - 1} is free; choose one by --port"
    )


def _plain(host: str) -> str:
    """Addresses as browsers ask for them, whatever they are written like: `0`, `127.1` and `::ffff:127.0.0.1` too."""
    found = address(host)
    if found is not None:
        return str(found) if found.version == 4 else host
    try:
        return socket.inet_ntoa(socket.inet_aton(host))
    except OSError:
        return host


def _resolved(host: str) -> list[tuple[int, tuple[str, int]]]:
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        raise InputError(f"--host {host}: no such name or address") from error
    places = {info[0]: info[4] for info in reversed(found) if info[0] in (socket.AF_INET, socket.AF_INET6)}
    if not places:
        raise InputError(f"--host {host}: no such name or address")
    return sorted(places.items())  # type: ignore[arg-type]  # one of each kind, IPv4 first


def _bound(places: list[tuple[int, tuple[str, int]]], port: int) -> list[socket.socket]:
    """A socket for each place, all on one port. Of a name with several addresses, those that this machine lacks (::1 is
    in many lists of hosts where IPv6 is off) are left out, if one is left."""
    sockets: list[socket.socket] = []
    refused: OSError | None = None
    try:
        for kind, place in places:
            family = socket.AddressFamily(kind)
            where = (place[0], port or (sockets[0].getsockname()[1] if sockets else 0), *place[2:])
            dual = family == socket.AF_INET6 and place[0] == "::" and socket.has_dualstack_ipv6()
            try:
                sockets.append(
                    socket.create_server(where, family=family, backlog=128, dualstack_ipv6=dual)  # type: ignore[arg-type]
                )
            except OSError as error:
                if error.errno in (errno.EADDRINUSE, errno.EACCES):
                    raise
                refused = error
        if not sockets:
            assert refused is not None
            raise refused
    except OSError:
        for one in sockets:
            one.close()
        raise
    return sockets


def _why(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return "something else listens there; choose another --port"
    if error.errno == errno.EACCES:
        return "ports below 1024 are for administrators; choose a higher one" if port < 1024 else "not allowed here"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"{host} is not an address of this machine"
    if error.errno in (errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT):
        return "this machine has no IPv6" if ":" in host else "this machine has no such addresses"
    return (error.strerror or str(error)).partition(" (")[0]


def _loopback(text: str) -> bool:
    found = address(text)
    return found is not None and found.is_loopback


def _takes_v4(one: socket.socket) -> bool:
    return one.family == socket.AF_INET6 and not one.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)


def _own(version: int) -> str | None:
    """The address by which other machines most likely know this one; nothing is sent to find out."""
    family, target = (socket.AF_INET, ANYWHERE[0]) if version == 4 else (socket.AF_INET6, ANYWHERE[1])
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((target, 9))
            found = str(probe.getsockname()[0])
    except OSError:
        return None
    return None if _loopback(found) or (where := address(found)) is None or where.is_unspecified else found
