"""The server behind the page, asked without a browser."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from miniflux.apps.ui import launch, layout
from miniflux.apps.ui.launch import Page, served
from miniflux.apps.ui.routes import COOKIE, state_of, valid
from miniflux.apps.ui.site import opened
from miniflux.settings import Request


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """A page that asks for a password."""
    folder = tmp_path_factory.mktemp("served")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder / "uploads"))
        with opened(folder) as site, served(site, auth=("ann", "secret")) as page:
            yield page


def client(page: Page, password: str | None = "secret") -> httpx.Client:
    """Somebody who has opened the page, and logged in if a password is given."""
    asks = httpx.Client(base_url=page.url, timeout=60)
    assert asks.get("/").status_code == 200
    if password is not None:
        asks.post("/login", data={"username": "ann", "password": password})
    return asks


def drawn(page: Page, session: str) -> str:
    page.site.submit(session, [Request(prompt="a", width=32, height=32, steps=1)]).results(60)
    return page.site.history.listed(session)[0].id


def test_only_this_machine_is_listened_to(page: Page) -> None:
    assert page.url.startswith("http://127.0.0.1:")


def test_password_guards_our_routes_too(page: Page) -> None:
    for password in (None, "wrong"):
        stranger = client(page, password)
        assert stranger.get("/studio/state").status_code == 401
        assert stranger.get(f"/studio/picture/{'0' * 32}.png").status_code == 401
    assert client(page).get("/studio/state").json()["jobs"] == []


def test_pictures_belong_to_a_session(page: Page) -> None:
    """Whoever has another token gets nothing, even with the name of the picture."""
    owner, other = client(page), client(page)
    id = drawn(page, owner.cookies[COOKIE])
    for route in (f"/studio/picture/{id}.png", f"/studio/about/{id}"):
        assert owner.get(route).status_code == 200
        assert other.get(route).status_code == 404
        assert httpx.get(page.url + route).status_code == 401
    assert [entry["id"] for entry in owner.get("/studio/state").json()["entries"]] == [id]
    assert other.get("/studio/state").json()["entries"] == []
    assert owner.get("/studio/picture/../sessions/x.png").status_code == 404


def test_picture_that_is_damaged_or_gone_is_no_fault(page: Page, caplog: pytest.LogCaptureFixture) -> None:
    owner = client(page)
    id = drawn(page, owner.cookies[COOKIE])
    path = page.site.history.path(owner.cookies[COOKIE], id)
    path.write_bytes(path.read_bytes()[:60])
    assert owner.get(f"/studio/picture/{id}.png?bare=1").status_code == 404
    path.unlink()
    for query in ("", "?bare=1", "?download=1"):
        assert owner.get(f"/studio/picture/{id}.png{query}").status_code == 404
    assert not caplog.records


def test_cookie_is_kept_from_scripts_and_other_sites(page: Page) -> None:
    reply = httpx.get(page.url + "/")
    cookie = next(line for line in reply.headers.get_list("set-cookie") if line.startswith(COOKIE))
    assert {"HttpOnly", "SameSite=Strict", "Path=/"} <= set(cookie.split("; "))
    assert valid(reply.cookies[COOKIE])
    again = httpx.get(page.url + "/", cookies={COOKIE: reply.cookies[COOKIE]})
    assert COOKIE not in again.cookies


def test_forged_token_is_replaced(page: Page) -> None:
    reply = httpx.get(page.url + "/", cookies={COOKIE: "../../etc/passwd"})
    assert valid(reply.cookies[COOKIE])


def test_policy_lets_the_browser_ask_nobody_else(page: Page) -> None:
    policy = httpx.get(page.url + "/").headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "http" not in policy and "*" not in policy


def test_nothing_of_gradio_that_talks_is_on(page: Page) -> None:
    """No API pages, no runs kept, no analytics, and no fonts or scripts of others in the page."""
    asks = client(page)
    text = asks.get("/").text
    assert "fonts.googleapis" not in text and "fonts.gstatic" not in text
    config = asks.get("/config").json()
    assert not config["analytics_enabled"] and not config.get("footer_links")
    assert all(dependency["api_visibility"] != "public" for dependency in config["dependencies"])
    assert not page.blocks.run_history and page.blocks.share_url is None
    assert asks.get("/docs").status_code == 404


def test_history_is_sent_when_it_has_changed(page: Page) -> None:
    session = "d" * 32
    drawn(page, session)
    first = state_of(page.site, session)
    assert len(first["entries"]) == 1
    assert "entries" not in state_of(page.site, session, first["mark"])
    page.site.history.delete(session, first["entries"][0]["id"])
    assert state_of(page.site, session, first["mark"])["entries"] == []


def test_end_of_a_job_is_told_once(page: Page) -> None:
    session = "e" * 32
    drawn(page, session)
    assert [end["state"] for end in state_of(page.site, session)["ended"]] == ["done"]
    assert state_of(page.site, session)["ended"] == []


def test_style_and_script_are_in_the_package() -> None:
    folder = Path(launch.__file__).parent
    names = ["page.css", "icon.svg", *(f"script/{name}.js" for name in layout.SCRIPTS)]
    assert all((folder / name).stat().st_size for name in names)
    assert {path.stem for path in (folder / "script").iterdir()} == set(layout.SCRIPTS)


def test_all_pictures_in_one_file(page: Page) -> None:
    """Of one's own only; streamed, so that no length is known before."""
    owner, other = client(page), client(page)
    ids = [drawn(page, owner.cookies[COOKIE]) for _ in range(2)]
    reply = owner.get("/studio/pictures.zip")
    assert reply.headers["content-type"] == "application/zip" and "content-length" not in reply.headers
    with zipfile.ZipFile(io.BytesIO(reply.content)) as archive:
        assert archive.namelist() == ["0001-a.png", "0002-a.png"]
        assert archive.read("0001-a.png") == owner.get(f"/studio/picture/{ids[0]}.png").content
    assert zipfile.ZipFile(io.BytesIO(other.get("/studio/pictures.zip").content)).namelist() == []
    assert httpx.get(page.url + "/studio/pictures.zip").status_code == 401
