"""Pictures by address, as data: URLs and in base64: what is fetched, and all that is not."""

from __future__ import annotations

import asyncio
import base64
import gzip
import io
import ipaddress
import logging
import ssl
import struct
import time
import zlib
from collections.abc import Sequence
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile

from miniflux.apps.serve import reaching
from miniflux.apps.serve.fetching import Limits, fetched, is_address, picture_from
from miniflux.apps.serve.reaching import checked, public, trusted
from miniflux.errors import InputError

from .neighbours import Asked, Names, certificate, neighbour, says

HERE = ("127.0.0.1",)


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    return Names(monkeypatch)


PICTURE = Image.radial_gradient("L").resize((40, 24)).convert("RGB")


def png(picture: Image.Image = PICTURE, kind: str = "PNG", **more: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **more)
    return file.getvalue()


def fetch(url: str, allowed: Sequence[str] = HERE, **limits: float) -> bytes:
    return asyncio.run(fetched(url, Limits(**limits), allowed))  # type: ignore[arg-type]


def refused(url: str, allowed: Sequence[str] = (), **limits: float) -> str:
    with pytest.raises(InputError) as caught:
        fetch(url, allowed, **limits)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    return str(caught.value)


# Which addresses


@pytest.mark.parametrize(
    "text",
    [
        *("0.0.0.0", "0.1.2.3", "10.1.2.3", "100.64.0.1", "100.100.100.200", "127.0.0.1", "127.9.9.9"),
        *(
            "168.63.129.16",
            "169.254.169.254",
            "172.16.0.1",
            "172.31.255.255",
            "192.0.0.192",
            "192.0.2.1",
            "192.168.1.1",
        ),
        *("192.88.99.1", "198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.1.1.1", "240.0.0.1"),
        *("255.255.255.255", "::", "::1", "fe80::1", "fec0::1", "fc00::1", "fd00:ec2::254", "ff02::1", "100::1"),
        *("::ffff:127.0.0.1", "::ffff:8.8.8.8", "::127.0.0.1", "::8.8.8.8", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe"),
        *("64:ff9b:1::808:808", "2002:7f00:1::1", "2002:808:808::1", "2001:0:4136:e378:8000:63bf:3fff:fdd2"),
        *("2001:db8::1", "3fff::1", "4000::1"),
    ],
)
def test_addresses_that_are_not_public(text: str) -> None:
    assert not public(ipaddress.ip_address(text))
    host = f"[{text}]" if ":" in text else text
    assert "has no public address" in refused(f"http://{host}/x.png")
    with pytest.raises(InputError):
        checked(f"https://{host}:8443/")
    assert checked(f"http://{host}/x.png", (text,)).host == text  # unless the operator trusts it


@pytest.mark.parametrize(
    "text", ["1.1.1.1", "8.8.8.8", "100.63.255.255", "172.32.0.1", "2606:4700::1111", "64:ff9b::808:808"]
)
def test_addresses_that_are_public(text: str) -> None:
    assert public(ipaddress.ip_address(text))
    assert checked(f"http://[{text}]/" if ":" in text else f"http://{text}/").host == text


@given(st.ip_addresses(v=4))
def test_what_carries_an_address_of_ipv4_is_no_way_around(inner: ipaddress.IPv4Address) -> None:
    carried = [f"::ffff:{inner}", f"2002:{int(inner) >> 16:x}:{int(inner) & 0xFFFF:x}::1", f"::{inner}"]
    assert not any(public(ipaddress.ip_address(text)) for text in carried)
    assert public(ipaddress.ip_address(f"64:ff9b::{inner}")) == public(inner)
    if public(inner):
        assert inner.is_global and not inner.is_private and not inner.is_multicast and not inner.is_reserved


@pytest.mark.parametrize(
    "host",
    [
        *("2130706433", "0x7f000001", "0177.0.0.1", "127.1", "0", "0x7f.1", "127.0.0.1.", "127.0.0.1%00", "a.b.1"),
        *(
            "%31%32%37.0.0.1",
            "１２７.0.0.1",
            "①②⑦.⓪.⓪.①",
            "[::1%25lo]",
            "[::1%25eth0]",
            "[::1",
            "127.0.0.1\\.a.b",
            "-a",
        ),
        *("a..b\\c", "a b", "a\tb", "a\nb", "a\x00b", "256.1.1.1", "1.2.3.4.5", ".", "[v1.a]", "[127.0.0.1]", "a,b"),
    ],
)
def test_other_spellings_of_addresses_are_refused(names: Names, host: str) -> None:
    names.known[host] = ["8.8.8.8"]
    refused(f"http://{host}/")
    assert not names.asked  # before anybody is asked what it means


@pytest.mark.parametrize(
    "url",
    [
        *(
            "",
            "x",
            "http://",
            "http:///x",
            "//host/x",
            "http:host",
            "ftp://host/x",
            "file:///etc/passwd",
            "gopher://h/",
        ),
        *("data:,x", "javascript:1", "http://[::1]x/", "http://h:99999/", "http://h:-1/", "http://h:x/", "http:// h/"),
        *("http://h/\r\nX: y", "http://h/a b", "http://h/\u2028", "http://h/" + "x" * 5000, "\ud800", "http://\ud800/"),
    ],
)
def test_what_is_no_address_of_a_picture(names: Names, url: str) -> None:
    names.known["h"] = names.known["host"] = ["8.8.8.8"]
    refused(url)
    assert not names.asked


def test_no_user_and_no_password() -> None:
    for user in ("user@", "user:secret@", ":@", "8.8.8.8:80@"):
        said = refused(f"http://{user}127.0.0.1/", HERE)
        assert "secret" not in said


@pytest.mark.parametrize("port", [0, 1, 22, 25, 81, 445, 1023])
def test_odd_ports(names: Names, port: int) -> None:
    names.known["pictures.example"] = ["8.8.8.8"]
    assert f"port {port}" in refused(f"http://pictures.example:{port}/")
    if port:
        assert checked(f"http://pictures.example:{port}/", (f"pictures.example:{port}",))
    for fine in (80, 443, 1024, 8080, 65535):
        assert checked(f"http://pictures.example:{fine}/")


def test_what_an_operator_trusts() -> None:
    for text in (
        "10.0.0.0/8",
        "10.1.2.3/8",
        "::1",
        "[::1]:80",
        "fd00::/8",
        "localhost",
        "Pictures.Local:8080",
        "10.0.0.1:1",
    ):
        assert len(trusted([text])) == 1
    for text in (
        "",
        "http://host",
        "10.0.0.0/99",
        "host:",
        "host:x",
        "a b",
        "*",
        "2130706433",
        "10.1",
        "[x]",
        "user@host",
    ):
        with pytest.raises(InputError, match="a name, an address or a network"):
            trusted([text])
    assert checked("http://localhost:99/", ["LOCALHOST"]) and checked("http://localhost.:99/", ["localhost:99"])
    assert checked("http://10.3.4.5:99/", ["10.0.0.0/8"]) and checked("http://[::1]:99/", ["[::1]:99"])
    for url, allowed in (
        ("http://10.3.4.5:98/", "10.3.4.5:99"),
        ("http://11.0.0.1:99/", "10.0.0.0/8"),
        ("http://a:99/", "b"),
    ):
        with pytest.raises(InputError):
            checked(url, [allowed])


# What is fetched


def test_a_picture() -> None:
    with neighbour(says(200, png(), content_type="image/png")) as server:
        data = fetch(server.url(path="/x.png?a=1"))
    assert picture_from(data).tobytes() == PICTURE.tobytes()
    method, path, headers, body = server.seen[0]
    assert (method, path, body) == ("GET", "/x.png?a=1", b"") and headers["host"] == f"127.0.0.1:{server.port}"
    assert not {"cookie", "authorization"} & set(headers)


def test_nothing_is_asked_that_is_not_trusted() -> None:
    with neighbour(says(200, png())) as server:
        for allowed in ((), ("10.0.0.0/8",), (f"127.0.0.1:{server.port + 1}",), ("localhost",)):
            assert refused(server.url(), allowed) == "'127.0.0.1' has no public address"
        assert not server.seen
        assert fetch(server.url(), (f"127.0.0.1:{server.port}",)) == png()
        assert fetch(server.url(), ("127.0.0.0/8",)) == png()


def test_names_are_resolved_once_and_connected_to_what_was_checked(names: Names) -> None:
    names.known["pictures.example"] = ["127.0.0.1"]
    with neighbour(says(200, png())) as server:
        assert fetch(server.url("pictures.example")) == png()
        assert names.asked == ["pictures.example"] and server.seen[0][2]["host"] == f"pictures.example:{server.port}"
        assert fetch(server.url("pictures.example"), ("pictures.example",)) == png()  # by name
        names.known["inside"] = ["127.0.0.1"]
        names.known["both.example"] = ["8.8.8.8", "127.0.0.1"]
        names.known["mapped.example"] = ["::ffff:127.0.0.1"]
        names.known["link.example"] = ["fe80::1%lo"]
        seen = len(server.seen)
        for name in ("inside", "both.example", "mapped.example", "link.example", "nobody.example"):
            assert (
                refused(server.url(name)) == f"'{name}' has no public address"
            )  # the same, whether it is there or not
        assert len(server.seen) == seen


def test_a_name_that_changes_its_address_meanwhile(names: Names, monkeypatch: pytest.MonkeyPatch) -> None:
    """DNS rebinding: the first answer is checked and used; a second one, which leads inside, is never asked for."""
    names.known["rebound.example"] = [["8.8.8.8"], ["127.0.0.1"]]
    asked: list[str] = []

    async def connects(self: object, request: httpx.Request) -> httpx.Response:
        asked.append(f"{request.url.host} {request.headers['host']} {request.extensions['sni_hostname']}")
        raise httpx.ConnectError("nobody there")

    monkeypatch.setattr(httpx.AsyncHTTPTransport, "handle_async_request", connects)
    assert "cannot be reached" in refused("https://rebound.example/")
    assert asked == ["8.8.8.8 rebound.example rebound.example"] and names.asked == ["rebound.example"]
    assert "has no public address" in refused("https://rebound.example/")  # now it is the second one
    assert len(asked) == 1


def test_the_next_address_of_a_name_is_tried(names: Names) -> None:
    names.known["two.example"] = ["127.0.0.2", "127.0.0.1"]  # nobody listens at the first one
    with neighbour(says(200, png())) as server:
        assert fetch(server.url("two.example"), ("127.0.0.0/8",)) == png()


def test_certificates_are_those_of_the_name(names: Names, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names.known["pictures.example"] = names.known["other.example"] = ["127.0.0.1"]
    context, known = certificate(tmp_path, "pictures.example")
    with neighbour(says(200, png()), context) as server:
        assert "certificate" in refused(server.url("pictures.example", scheme="https"), HERE)  # nobody vouches for it
        monkeypatch.setattr(reaching, "_certificates", lambda: ssl.create_default_context(cafile=str(known)))
        assert fetch(server.url("pictures.example", scheme="https")) == png()
        assert server.names[-1] == "pictures.example"
        assert "certificate" in refused(server.url("other.example", scheme="https"), HERE)
        assert "certificate" in refused(server.url("127.0.0.1", scheme="https"), HERE)


def test_proxies_of_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with neighbour(says(200, png())) as server, neighbour(says(200, b"of the proxy")) as proxy:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "https_proxy"):
            monkeypatch.setenv(name, proxy.url())
        assert fetch(server.url()) == png() and not proxy.seen


# Redirects


def test_redirects_are_followed_three_times() -> None:
    def answer(asked: Asked) -> None:
        left = int(asked.path[1:])
        (says(302, location=f"/{left - 1}") if left else says(200, png()))(asked)

    with neighbour(answer) as server:
        assert fetch(server.url(path="/3")) == png()
        assert "more than 3 redirects" in refused(server.url(path="/4"), HERE)
        assert fetch(server.url(path="/0"), redirects=0) == png()
        assert "more than 0 redirects" in refused(server.url(path="/1"), HERE, redirects=0)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_each_redirect_is_checked(names: Names, status: int) -> None:
    names.known["outside.example"] = names.known["inside"] = ["127.0.0.1"]
    with neighbour(says(200, b"secret")) as inner, neighbour(lambda asked: None) as outer:
        for target in (
            *(
                inner.url(),
                inner.url("inside"),
                inner.url("2130706433"),
                inner.url("[::ffff:127.0.0.1]"),
                "//127.0.0.1/",
            ),
            *("file:///etc/passwd", "http://u:p@outside.example/", "http://[", "ftp://outside.example/", "http://a b/"),
            *("http://outside.example:22/", "http://169.254.169.254/latest/meta-data/"),
        ):
            outer.answer = says(status, location=target)
            said = refused(outer.url("outside.example"), (f"outside.example:{outer.port}",))
            assert "secret" not in said
        assert not inner.seen
        outer.answer = says(status, location=inner.url())
        assert fetch(outer.url("outside.example"), ("outside.example", "127.0.0.1")) == b"secret"


def test_a_redirect_to_nowhere_is_no_picture() -> None:
    with neighbour(says(302)) as server:
        assert "answered 302" in refused(server.url(), HERE)


# How much


def test_bytes_are_bounded() -> None:
    with neighbour(says(200, b"x" * 1000)) as server:
        assert len(fetch(server.url(), size=1000)) == 1000
        assert "more than 999 bytes" in refused(server.url(), HERE, size=999)

        def endless(asked: Asked) -> None:  # no length at all
            asked.send_response(200)
            asked.end_headers()
            for _ in range(10_000):
                asked.wfile.write(b"x" * 1000)

        server.answer = endless
        assert "more than 5,000 bytes" in refused(server.url(), HERE, size=5000)

        def chunks(asked: Asked) -> None:
            asked.protocol_version = "HTTP/1.1"
            asked.send_response(200)
            asked.send_header("transfer-encoding", "chunked")
            asked.end_headers()
            for _ in range(10_000):
                asked.wfile.write(b"3e8\r\n" + b"x" * 1000 + b"\r\n")

        server.answer = chunks
        assert "more than 5,000 bytes" in refused(server.url(), HERE, size=5000)
        server.answer = says(200, b"x" * 100, content_length="5")  # says less than it sends
        assert fetch(server.url(), size=50) == b"x" * 5
        server.answer = says(200, b"x" * 5, content_length="100")
        assert "broke off" in refused(server.url(), HERE)
        for length in ("9" * 20, "9" * 5000, "-1", "x", "5, 6"):
            server.answer = says(200, b"x", content_length=length)
            refused(server.url(), HERE)


def test_nothing_is_decompressed() -> None:
    bomb = gzip.compress(b"\0" * 10**7)
    with neighbour(says(200, bomb, content_encoding="gzip")) as server:
        assert "compressed" in refused(server.url(), HERE)
        assert server.seen[0][2]["accept-encoding"] == "identity"
        server.answer = says(200, png(), content_encoding="identity")
        assert fetch(server.url()) == png()


def test_time_is_bounded() -> None:
    def drips(asked: Asked) -> None:
        asked.send_response(200)
        asked.end_headers()
        for _ in range(200):
            asked.wfile.write(b"x")
            time.sleep(0.02)

    def waits(asked: Asked) -> None:
        time.sleep(2)

    for answer in (drips, waits):
        with neighbour(answer) as server:
            assert "took longer than 0.2 seconds" in refused(server.url(), HERE, seconds=0.2)


@pytest.mark.parametrize("status", [204, 206, 400, 401, 404, 500])
def test_other_answers_are_told_by_their_number_alone(status: int) -> None:
    with neighbour(says(status, b"" if status == 204 else b"secret")) as server:
        assert refused(server.url(), HERE) == f"'127.0.0.1' answered {status}, and no picture"


def test_who_speaks_no_http_is_refused() -> None:
    with neighbour(lambda asked: asked.wfile.write(b"220 mail ready secret\r\n")) as server:
        assert refused(server.url(), HERE) == "'127.0.0.1' gave no answer"
        server.answer = lambda asked: None
        assert refused(server.url(), HERE) == "'127.0.0.1' gave no answer"
        port = server.port
    assert "cannot be reached" in refused(f"http://127.0.0.1:{port}/", HERE)


# Text and bytes


def test_pictures_in_text() -> None:
    text = base64.b64encode(png()).decode()
    lines = "\r\n".join(text[i : i + 76] for i in range(0, len(text), 76))
    for way in (
        text,
        text.rstrip("="),
        lines,
        f"data:image/png;base64,{text}",
        f"DATA:;charset=x;BASE64,{lines}",
        png(),
    ):
        assert picture_from(way).tobytes() == PICTURE.tobytes()
    assert is_address("https://x") and is_address("HTTP://x") and not is_address(text) and not is_address("data:,")


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "====", "!", "a", "data:", "data:image/png,abc", "data:image/png;base64", "data:;base64,", "\ud800"),
        *("http://127.0.0.1/x.png", "/etc/passwd", "file:///etc/passwd", "data:image/png;base64,é", "aGVsbG8=", "-_-_"),
    ],
)
def test_what_is_no_picture(text: str) -> None:
    with pytest.raises(InputError) as caught:
        picture_from(text)
    assert len(str(caught.value)) < 300


@given(st.one_of(st.binary(max_size=200), st.text(max_size=200)))
def test_anything_else_is_refused_in_a_line(anything: str | bytes) -> None:
    logging.disable()
    with pytest.raises(InputError):
        picture_from(anything)
    logging.disable(logging.NOTSET)


def test_bytes_of_text_are_bounded_before_they_are_decoded() -> None:
    limits = Limits(size=len(png()))
    assert picture_from(base64.b64encode(png()).decode(), limits).size == (40, 24)
    for given_ in (png() + b"x", base64.b64encode(png() + b"x").decode(), "A" * 10**5, "A" * 10**7):
        with pytest.raises(InputError, match="bytes"):
            picture_from(given_, limits)


def test_pixels_are_bounded_before_they_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    files = [png(kind=kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")]
    for file in files:
        assert picture_from(file, Limits(pixels=960)).size == (40, 24)
    loaded: list[object] = []
    monkeypatch.setattr(ImageFile.ImageFile, "load", loaded.append)
    for file in files:
        with pytest.raises(InputError, match="40x24 pixels; at most 959 in all"):
            picture_from(file, Limits(pixels=959))
    bombs = [
        headed(10**5, 10**4),
        headed(31_623, 31_623),
        headed(4097, 4096),
        headed(2**31 - 1, 2**31 - 1),
        headed(1, 2**30),
    ]
    for bomb in bombs:  # a billion pixels in 60 bytes
        with pytest.raises(InputError, match="pixels"):
            picture_from(bomb)
    assert not loaded


def headed(width: int, height: int) -> bytes:
    """A PNG that says it is of this size."""
    parts = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"\0")),
        (b"IEND", b""),
    )
    chunks = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_formats_whose_headers_do_not_say_the_size_are_refused() -> None:
    with pytest.raises(InputError, match="no picture; PNG, JPEG"):
        picture_from(png(Image.new("RGB", (64, 64)), "ICO"))
    with pytest.raises(InputError, match="no picture; PNG, JPEG"):
        picture_from(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")


def test_jpegs_of_endless_scans_are_refused() -> None:
    whole = png(kind="JPEG", progressive=True)
    assert picture_from(whole).size == (40, 24)
    scan = whole[whole.rindex(b"\xff\xda") : -2]
    with pytest.raises(InputError, match="more than 200 scans"):
        picture_from(whole[:-2] + 300 * scan + whole[-2:])
