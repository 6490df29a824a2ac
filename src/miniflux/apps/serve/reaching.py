"""Requests to addresses that clients name: to the public internet alone, and to what the operator trusts.

A server that asks what it is told to ask could be sent to its own neighbours (SSRF). So a name is resolved once, all
its addresses must be public, and the connection goes to one of those: the name could mean another machine a moment
later (DNS rebinding). `Host` and certificate are still those of the name. No redirect is followed here, and no proxy
of the environment is used, which would resolve the name itself.
"""

from __future__ import annotations

import asyncio
import functools
import ipaddress
import re
import socket
import ssl
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager

import httpx

from miniflux.checks import shown
from miniflux.errors import InputError
from miniflux.version import __version__

LONGEST = 4096  # characters of an address
CONNECT_SECONDS = 5.0  # for each address of a name
ADDRESSES = 4  # of a name are tried
STRANGE = re.compile(r"[\x00-\x20\x7f-\xa0\\\u2028\u2029]")  # what programs read in different ways
NAME = re.compile(r"[a-z0-9_][a-z0-9._-]{0,252}")
NUMBER = re.compile(r"(.*\.)?(\d+|0x[0-9a-f]*)\.?")  # 2130706433, 0x7f.1 and 127.1 are 127.0.0.1 to some resolvers
LOW_PORTS = (80, 443)  # below 1024; behind the others are services that HTTP can be mistaken for, such as mail

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

UNICAST = ipaddress.ip_network("2000::/3")  # all of IPv6 that is public lies here
NAT64 = ipaddress.ip_network("64:ff9b::/96")  # but for these, which are addresses of IPv4 where there is IPv6 alone
NOT_PUBLIC = tuple(
    ipaddress.ip_network(text)
    for text in (
        "100.64.0.0/10",  # networks of providers (CGNAT), and metadata of a cloud
        "168.63.129.16/32",  # metadata of a cloud
        "192.0.0.0/24",  # protocols, and metadata of a cloud
        "192.88.99.0/24",  # to 6to4
        "224.0.0.0/3",  # multicast and reserved
        "2001::/23",  # protocols, such as Teredo, which carries addresses of IPv4
        "2001:db8::/32",  # examples
        "2002::/16",  # 6to4: carries addresses of IPv4
        "3fff::/20",  # examples
    )
)
"""What Python's `is_global` lets through, at least in some versions."""


def public(address: Address) -> bool:
    """Whether an address is one of the public internet."""
    if isinstance(address, ipaddress.IPv6Address):
        if address in NAT64:
            return public(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        if address not in UNICAST:  # also ::ffff:127.0.0.1
            return False
    return address.is_global and not any(address in network for network in NOT_PUBLIC)


Trust = tuple[str | Network, int | None]
"""A name or a network, and the port if only one is trusted."""


def trusted(allowed: Sequence[str]) -> list[Trust]:
    """What an operator trusts: names, addresses and networks, each with `:PORT` or for all ports. An address or a
    network is trusted whichever name leads there, a name wherever it leads.

    Raises:
        InputError: one of them is none of these.
    """
    found: list[Trust] = []
    for text in allowed:
        match = re.fullmatch(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::(\d{1,5}))?", text.lower())
        bare, port = (match[1].strip("[]"), match[2]) if match else (text, None)
        try:
            found.append((ipaddress.ip_network(bare, strict=False), int(port) if port else None))
        except ValueError:
            if match is None or NUMBER.fullmatch(bare):
                there = "a name, an address or a network such as 10.0.0.0/8 is expected"
                raise InputError(f"{there}, with or without :PORT, got {shown(text)}") from None
            found.append((bare.removesuffix("."), int(port) if port else None))
    return found


def _trusts(trust: Sequence[Trust], what: str | Address, port: int) -> bool:
    for known, only in trust:
        same = known == what if isinstance(known, str) or isinstance(what, str) else what in known
        if same and only in (None, port):
            return True
    return False


def port_of(url: httpx.URL) -> int:
    """The port of an address."""
    if url.port is not None:
        return url.port
    return 443 if url.scheme == "https" else 80


def host_of(url: httpx.URL) -> str:
    """The name in an address, for a message."""
    return shown(url.host)


def checked(text: str, allowed: Sequence[str] = (), base: httpx.URL | None = None) -> httpx.URL:
    """An address that may be asked, as far as that is known before its name is resolved.

    Args:
        allowed: what else than the public internet, as of `trusted`.
        base: what a redirect is relative to.

    Raises:
        InputError: it may not, and why.
    """
    try:
        if STRANGE.search(text) or len(text) > LONGEST:
            raise httpx.InvalidURL("")
        url = httpx.URL(text) if base is None else base.join(text)
    except (httpx.InvalidURL, ValueError):
        raise InputError(f"an address http(s)://HOST/... is expected, got {shown(text)}") from None
    if url.scheme not in ("http", "https") or not url.host:
        raise InputError(f"an address http(s)://HOST/... is expected, got {shown(text)}")
    if url.userinfo:
        raise InputError(f"{host_of(url)}: an address must not hold a name and password")
    host, port, trust = url.raw_host.decode("ascii"), port_of(url), trusted(allowed)
    literal = _literal(host)
    if literal is None and (not NAME.fullmatch(host) or NUMBER.fullmatch(host)):
        raise InputError(f"{host_of(url)} is no name and no address")
    if _trusts(trust, host.removesuffix(".") if literal is None else literal, port):
        return url
    if literal is not None and not public(literal):
        raise _unreachable(url)
    if port > 65535 or (port < 1024 and port not in LOW_PORTS):
        raise InputError(f"{host_of(url)}: port {port} is not asked; 80, 443 and those from 1024 are")
    return url


def _literal(host: str) -> Address | None:
    try:
        return ipaddress.ip_address(host) if "%" not in host else None
    except ValueError:
        return None


def _unreachable(url: httpx.URL) -> InputError:
    """One line for names that there are not, and for those that lead inside: who asks shall not learn which."""
    return InputError(f"{host_of(url)} has no public address")


async def _places(url: httpx.URL, allowed: Sequence[str]) -> list[str]:
    """The addresses behind a name, all of which may be asked."""
    host, port, trust = url.raw_host.decode("ascii"), port_of(url), trusted(allowed)
    literal = _literal(host)
    found = [literal] if literal is not None else []
    if literal is None:
        try:
            known = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            raise _unreachable(url) from None
        found = list(dict.fromkeys(ipaddress.ip_address(one[4][0]) for one in known))
    named = literal is None and _trusts(trust, host.removesuffix("."), port)
    for address in found:
        if not (named or public(address) or _trusts(trust, address, port)):
            raise _unreachable(url)
    return [str(address) for address in found[:ADDRESSES]]


@functools.cache
def _certificates() -> ssl.SSLContext:
    return httpx.create_ssl_context()  # of SSL_CERT_FILE or SSL_CERT_DIR, else of certifi


@asynccontextmanager
async def asked(
    method: str, url: httpx.URL, allowed: Sequence[str], headers: Mapping[str, str], content: bytes | None = None
) -> AsyncGenerator[httpx.Response]:
    """The answer to one request, whose body is still to be read.

    Raises:
        InputError: the address may not be asked, cannot be reached, or breaks off.
    """
    places = await _places(url, allowed)
    transport = httpx.AsyncHTTPTransport(verify=_certificates(), trust_env=False)
    timeout = httpx.Timeout(None, connect=CONNECT_SECONDS)  # the time in all is the caller's
    headers = {"host": url.netloc.decode("ascii"), "user-agent": f"miniflux/{__version__}", **headers}
    async with httpx.AsyncClient(transport=transport, trust_env=False, timeout=timeout) as client:
        for place in places:
            request = client.build_request(
                method,
                url.copy_with(host=place),
                headers=headers,
                content=content,
                extensions={"sni_hostname": url.raw_host.decode("ascii").removesuffix(".")},
            )
            try:
                answer = await client.send(request, stream=True)
            except (httpx.ConnectError, httpx.ConnectTimeout):  # nothing was sent yet
                continue
            except httpx.HTTPError:
                raise InputError(f"{host_of(url)} gave no answer") from None
            try:
                yield answer
            except httpx.HTTPError:
                raise InputError(f"{host_of(url)} broke off") from None
            finally:
                await answer.aclose()
            return
    tls = ", or its certificate is not one for this name" if url.scheme == "https" else ""
    raise InputError(f"{host_of(url)} cannot be reached{tls}")
