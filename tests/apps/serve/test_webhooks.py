"""Webhooks: what is sent, how it is signed, and to whom it is never sent."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import logging
import time
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miniflux.apps.serve.webhooks import (
    UndeliveredError,
    bfl_signature,
    check,
    deliver,
    next_try,
    signature,
    verified,
)
from miniflux.errors import InputError, MinifluxError

from .neighbours import Asked, Names, neighbour, says

HERE = ("127.0.0.1",)


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    return Names(monkeypatch)


SECRET = "correct horse battery staple"
PAYLOAD = {"id": "job_1", "status": "Ready", "result": {"sample": "https://pictures.example/é", "seed": 7}}


def tell(url: str, secret: str | None = SECRET, allowed: Sequence[str] = HERE, **more: Any) -> None:
    asyncio.run(deliver(url, secret, more.pop("payload", PAYLOAD), more.pop("id", "msg_1"), allowed, **more))


def test_what_is_sent() -> None:
    with neighbour(says(200, b"ok")) as server:
        tell(server.url(path="/hook?a=1"))
    method, path, headers, body = server.seen[0]
    assert (method, path, json.loads(body)) == ("POST", "/hook?a=1", PAYLOAD)
    assert headers["content-type"] == "application/json" and headers["webhook-id"] == "msg_1"
    assert abs(int(headers["webhook-timestamp"]) - time.time()) < 60
    assert verified(SECRET, headers, body)
    assert theirs(SECRET, headers, body)
    assert SECRET not in str(server.seen)


def theirs(secret: str, headers: dict[str, str], body: bytes) -> bool:
    """As receivers of BFL's webhooks are told to look."""
    scheme, _, found = headers["x-bfl-signature"].partition("=")
    return scheme == "sha256" and hmac.compare_digest(
        hmac.new(secret.encode(), body, hashlib.sha256).hexdigest(), found
    )


def test_without_a_secret_nothing_is_signed() -> None:
    with neighbour(says(204)) as server:
        tell(server.url(), None)
    headers = server.seen[0][2]
    assert "webhook-signature" not in headers and "x-bfl-signature" not in headers and "webhook-id" in headers


def test_a_signature_of_the_specification() -> None:
    """The example of the libraries of Standard Webhooks."""
    secret, body = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", b'{"test": 2432232314}'
    found = signature(secret, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, body)
    assert found == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
    headers = {
        "Webhook-Id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
        "Webhook-Timestamp": "1614265330",
        "Webhook-Signature": f"v1a,abc v1,nonsense {found}",
    }
    assert verified(secret, headers, body, now=1614265330 + 299) and verified(
        secret, headers, body, now=1614265330 - 299
    )
    assert not verified(secret, headers, body, now=1614265330 + 301)
    assert not verified(secret, headers, body, now=1614265330 - 301)
    assert not verified(secret, headers, body)


@given(st.text(min_size=1, max_size=50).filter(lambda text: not text.startswith("whsec_")), st.binary(max_size=100))
def test_signatures_are_hmac(secret: str, body: bytes) -> None:
    try:
        key = secret.encode()
    except UnicodeEncodeError:
        return
    right = hmac.new(key, b"a.5." + body, "sha256").digest()
    assert signature(secret, "a", 5, body) == "v1," + base64.b64encode(right).decode()
    assert bfl_signature(secret, body) == "sha256=" + hmac.new(key, body, "sha256").hexdigest()
    coded = "whsec_" + base64.b64encode(key).decode()
    assert (
        signature(coded, "a", 5, body) == signature(coded.rstrip("="), "a", 5, body) == signature(secret, "a", 5, body)
    )


def test_what_is_not_signed_by_who_knows_the_secret() -> None:
    right = {"webhook-id": "a", "webhook-timestamp": "100", "webhook-signature": signature(SECRET, "a", 100, b"{}")}
    assert verified(SECRET, right, b"{}", now=100)
    for changed in (
        {"webhook-id": "b"},
        {"webhook-id": "a.1"},
        {"webhook-id": ""},
        {"webhook-timestamp": "101"},
        {"webhook-timestamp": "1e2"},
        {"webhook-timestamp": "²"},
        {"webhook-timestamp": "9" * 5000},
        {"webhook-signature": ""},
        {"webhook-signature": "v1,é"},
        {"webhook-signature": "v1,\ud800"},
        {"webhook-signature": right["webhook-signature"].replace("v1,", "v2,")},
    ):
        assert not verified(SECRET, {**right, **changed}, b"{}", now=100)
    assert not verified(SECRET, right, b"{} ", now=100) and not verified(SECRET + "x", right, b"{}", now=100)
    assert not verified(SECRET, {}, b"{}", now=100)


@pytest.mark.parametrize("secret", ["", "whsec_", "whsec_!", "whsec_é", "whsec_a", "x" * 513, "é" * 257, "\ud800"])
def test_secrets_that_are_none(secret: str) -> None:
    with pytest.raises(InputError) as caught:
        check("https://receiver.example/", secret)
    assert len(secret) < 2 or secret == "whsec_" or secret not in str(caught.value)
    with neighbour(says(200)) as server:
        with pytest.raises(InputError):
            tell(server.url(), secret)
        assert not server.seen


def test_what_can_be_known_at_once_is_refused_at_once(names: Names) -> None:
    check("https://receiver.example/hook", SECRET)
    check("http://127.0.0.1:9/", None, HERE)
    for url in (
        "http://127.0.0.1/",
        "ftp://a/",
        "http://a:25/",
        "http://[::1]/",
        "http://u:p@a/",
        "http://2130706433/",
        "",
    ):
        with pytest.raises(InputError):
            check(url, SECRET)
    assert not names.asked


def test_nothing_is_sent_inside(names: Names) -> None:
    names.known["inside.example"] = ["127.0.0.1"]
    with neighbour(says(200)) as server:
        for host in ("127.0.0.1", "inside.example", "[::ffff:127.0.0.1]", "localhost", "nobody.example"):
            with pytest.raises(InputError, match="has no public address"):
                tell(server.url(host), allowed=())
        assert not server.seen
        tell(server.url("inside.example"), allowed=("inside.example",))
        assert server.seen[0][2]["host"] == f"inside.example:{server.port}"


@pytest.mark.parametrize("status", [301, 302, 307, 308, 400, 404, 410, 429, 500, 503])
def test_other_answers_are_failures(status: int) -> None:
    with neighbour(says(200)) as other, neighbour(says(status, b"secret", location=other.url())) as server:
        with pytest.raises(UndeliveredError) as caught:
            tell(server.url())
        assert str(caught.value) == f"'127.0.0.1' answered {status}" and len(server.seen) == 1 and not other.seen


@pytest.mark.parametrize("status", [200, 201, 202, 204, 299])
def test_all_of_2xx_is_fine(status: int) -> None:
    with neighbour(says(status)) as server:
        tell(server.url())


def test_time_is_bounded() -> None:
    def waits(asked: Asked) -> None:
        time.sleep(2)

    with neighbour(waits) as server, pytest.raises(UndeliveredError, match="longer than 0.2 seconds"):
        tell(server.url(), limit=0.2)


def test_who_is_not_there_is_a_failure() -> None:
    with neighbour(says(200)) as server:
        url = server.url()
    with pytest.raises(MinifluxError, match="cannot be reached"):
        tell(url)


def test_an_endless_answer_is_not_read() -> None:
    def endless(asked: Asked) -> None:
        asked.send_response(200)
        asked.end_headers()
        while True:
            asked.wfile.write(b"x" * 65536)

    with neighbour(endless) as server:
        tell(server.url())


@pytest.mark.parametrize("id", ["", "a.b", "a\r\nX: y", "é", "a b", "x" * 201])
def test_ids_that_could_be_mistaken(id: str) -> None:
    with neighbour(says(200)) as server:
        with pytest.raises(InputError, match="id of a webhook"):
            tell(server.url(), id=id)
        assert not server.seen


def test_the_secret_is_in_no_log_and_no_message(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with neighbour(says(500)) as server:
        for secret in (SECRET, "whsec_" + "!" + SECRET):
            with pytest.raises(MinifluxError) as caught:
                tell(server.url(), secret)
            assert SECRET not in repr(caught.value)
    assert SECRET not in caplog.text


def test_when_to_try_again() -> None:
    waits = [next_try(tries) for tries in range(1, 9)]
    assert waits[:3] == [1, 5, 30] and waits[-1] is None  # as BFL does, and longer
    known = [wait for wait in waits if wait is not None]
    assert known == sorted(known) and len(known) == 7 and sum(known) < 24 * 3600
    assert next_try(0) is None and next_try(100) is None
