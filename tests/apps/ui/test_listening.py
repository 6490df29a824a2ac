"""Where the page listens."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator

import pytest

from miniflux.apps.web import listening
from miniflux.apps.web.listening import address, listen
from miniflux.errors import InputError


def has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")


def reached(where: str, port: int) -> bool:
    try:
        socket.create_connection((where, port), timeout=5).close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize(
    ("host", "shown", "reach", "only_here"),
    [
        ("127.0.0.1", ["127.0.0.1"], ["127.0.0.1"], True),
        ("localhost", ["localhost"], ["127.0.0.1"], True),
        pytest.param("::1", ["[::1]"], ["::1"], True, marks=ipv6),
        pytest.param("[::1]", ["[::1]"], ["::1"], True, marks=ipv6),
        ("0.0.0.0", ["127.0.0.1"], ["127.0.0.1"], False),
        pytest.param("::", ["127.0.0.1"], ["127.0.0.1", "::1"], False, marks=ipv6),
        ("0", ["127.0.0.1"], ["127.0.0.1"], False),
        ("127.1", ["127.0.0.1"], ["127.0.0.1"], True),
        ("0x7f000001", ["127.0.0.1"], ["127.0.0.1"], True),
        ("::ffff:127.0.0.1", ["127.0.0.1"], ["127.0.0.1"], True),
    ],
)
def test_what_is_shown_can_be_opened(host: str, shown: list[str], reach: list[str], only_here: bool) -> None:
    found = listen(host, 0)
    try:
        assert found.hosts[: len(shown)] == shown
        assert found.only_here is only_here
        assert all(reached(where, found.port) for where in reach)
        assert all(reached(where.strip("[]"), found.port) for where in found.hosts)
        assert "localhost" in found.names
        assert ("0.0.0.0" in found.names) is ("::" in found.names) is (not only_here)
        assert (socket.gethostname().lower() in found.names) is (not only_here)
    finally:
        found.close()


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as one:
        yield one.getsockname()[1]


def test_taken_port(taken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=f"--port {taken}: something else listens there"):
        listen("127.0.0.1", taken)
    monkeypatch.setattr(listening, "FIRST_PORT", taken)
    found = listen("127.0.0.1", None)
    found.close()
    assert taken < found.port < taken + listening.PORTS
    monkeypatch.setattr(listening, "PORTS", 1)
    with pytest.raises(InputError, match="no port of"):
        listen("127.0.0.1", None)


@pytest.mark.parametrize(
    ("host", "port", "why"),
    [
        ("no.such.name.invalid", None, "no such name"),
        ("192.0.2.77", None, "192.0.2.77 is not an address of this machine"),
        ("a b", None, "expected a name or an address"),
        ("http://127.0.0.1", None, "expected a name or an address"),
        (" ", None, "expected a name or an address"),
        ("127.0.0.1", 65536, "expected 0 to 65535"),
        ("127.0.0.1", -1, "expected 0 to 65535"),
    ],
)
def test_wrong_places_are_refused_in_one_line(host: str, port: int | None, why: str) -> None:
    with pytest.raises(InputError, match=why) as refused:
        listen(host, port)
    assert "\n" not in str(refused.value)


def test_ports_of_administrators(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(socket, "create_server", refuse)
    with pytest.raises(InputError, match="--port 80: ports below 1024 are for administrators"):
        listen("127.0.0.1", 80)


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("::FFFF:1.2.3.4", "1.2.3.4"),
        ("fe80::1%eth0", "fe80::1"),
        ("127.1", None),
        ("a", None),
    ],
)
def test_addresses_in_their_plain_form(text: str, plain: str | None) -> None:
    assert str(address(text)) == str(plain)
