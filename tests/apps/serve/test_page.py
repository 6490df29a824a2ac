"""The page of `miniflux ui` on the server: who gets it, that it draws, and that the API is what it was."""

from __future__ import annotations

import base64
import contextlib
import io
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import pytest
import uvicorn
from fastapi.testclient import TestClient
from PIL import Image
from starlette.datastructures import Headers

import miniflux
from miniflux.apps.cli import main, parser
from miniflux.apps.serve.beside import Beside, beside, password_in
from miniflux.apps.serve.place import Place
from miniflux.apps.serve.starting import door_of
from miniflux.apps.ui.routes import COOKIE
from miniflux.apps.web.listening import listen
from miniflux.apps.web.serving import Server
from miniflux.errors import InputError
from miniflux.service.jobs import keys
from miniflux.settings import Request
from tests.apps.serve.conftest import Served
from tests.apps.serve.running import Running

PATIENCE = 60.0  # seconds, on however busy a machine
CALM: dict[str, Any] = {"trust_env": False, "timeout": PATIENCE}
PROMPT, SEED, STEPS, SIDE = "a red circle on a blue background", 7, 2, 64


@contextlib.contextmanager
def mounted(served: Served, place: Path, *words: str) -> Generator[tuple[Beside, Any]]:
    """A server with the page, not asked yet, and the sockets it is to listen on."""
    options = parser().parse_args(["serve", "--ui", *words])
    with (
        mock.patch.dict(os.environ, GRADIO_TEMP_DIR=str(place)),
        contextlib.closing(listen("127.0.0.1", 0)) as listening,
        beside(served.app, door_of(options.url, listening.names), options, Place(place)) as both,
    ):
        yield both, listening


@pytest.fixture(scope="module")
def paged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, str]]:
    """A server with the page behind a socket, and its address."""
    place = tmp_path_factory.mktemp("paged")
    served = Served(place)
    with mounted(served, place) as (both, listening):
        config = uvicorn.Config(both, log_config=None, ws="none", lifespan="on", timeout_graceful_shutdown=2)
        server = Server(config, both.page.end)
        thread = threading.Thread(target=server.run, args=(listening.sockets,), daemon=True)
        thread.start()
        until = time.monotonic() + PATIENCE
        while not server.started:
            assert thread.is_alive() and time.monotonic() < until
            time.sleep(0.01)
        yield served, f"http://127.0.0.1:{listening.port}"
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()
    served.close()


@pytest.fixture
def untold() -> Iterator[None]:
    """An environment without what the page of the other tests has set, which is as it was afterwards."""
    with mock.patch.dict(os.environ):
        for name in [name for name in os.environ if name.startswith("GRADIO_") or name == "NO_PROXY"]:
            del os.environ[name]
        yield


def asks(url: str, key: str | None, name: str = "somebody") -> httpx.Client:
    """A browser, so to say, whose user has given a name and a key."""
    return httpx.Client(base_url=url, auth=None if key is None else (name, key), follow_redirects=True, **CALM)


def told_of(client: httpx.Client) -> dict[str, Any]:
    assert client.get("/ui/").status_code == 200  # brings the cookie
    return client.get("/ui/config").json()


# Who gets it


def test_the_page_and_all_that_belongs_to_it_are_below_its_path(paged: tuple[Served, str]) -> None:
    served, url = paged
    with asks(url, served.key) as client:
        for entrance in ("/", "/ui", "/ui/"):
            answer = client.get(entrance)
            assert answer.status_code == 200 and str(answer.url) == f"{url}/ui/"
        assert "default-src 'self'" in answer.headers["content-security-policy"]
        config = told_of(client)
        assert config["root"] == f"{url}/ui"
        linked = set(re.findall(r"""(?:src|href)=["']([^"'#]+)["']""", answer.text))
        linked -= {"/manifest.json"}  # of Gradio's template, wherever the page is; there is none, and none is missed
        assert any(link.endswith(".js") for link in linked) and any(".css" in link for link in linked)
        for link in linked:
            there = httpx.URL(f"{url}/ui/").join(link)
            assert str(there).startswith(f"{url}/ui/"), link
            assert client.get(there).status_code == 200, link
        assert client.get("/ui/theme.css").status_code == 200
        assert client.get("/ui/studio/state").json()["jobs"] == []


@pytest.mark.parametrize(
    ("method", "path"),
    [
        *(("GET", f"/ui/{path}") for path in ("", "config", "theme.css", "robots.txt", "assets/x.js", "studio/state")),
        *(("GET", f"/ui/{path}") for path in ("gradio_api/heartbeat/x", "gradio_api/info", "%2e%2e/v1/models", "none")),
        *(("POST", f"/ui/gradio_api/{path}") for path in ("upload", "queue/join", "run/predict")),
        *(("POST", "/ui/login"), ("DELETE", "/ui/"), ("OPTIONS", "/ui/config")),
    ],
)
def test_nothing_of_the_page_is_there_without_a_key(paged: tuple[Served, str], method: str, path: str) -> None:
    served, url = paged
    where = httpx.URL(url).copy_with(raw_path=path.encode())
    for given in (
        {},
        {"x-key": served.key},
        {"authorization": f"Bearer {served.key}"},
        {"cookie": f"{COOKIE}=" + 32 * "a"},
    ):
        answer = httpx.request(method, where, headers=given, **CALM)
        assert answer.status_code == 401
        asked = answer.headers["www-authenticate"].partition(" ")[0]  # people, by the page itself alone
        assert asked == ("Basic" if path == "/ui/" else "xBasic")
        assert answer.text == "miniflux: a key is needed: any name, and the key as the password\n"
    for name, key in (("somebody", f"{served.key[:-1]}!"), (served.key, "somebody"), ("", "x" * 500)):
        answer = httpx.request(method, where, auth=(name, key), **CALM)
        assert answer.status_code == 401 and answer.text == "miniflux: there is no such key\n"


def test_a_key_that_is_removed_opens_nothing_from_then_on(paged: tuple[Served, str]) -> None:
    served, url = paged
    with asks(url, keys.add(served.store, "guest"), "any name") as client:
        assert told_of(client)
        keys.remove(served.store, "guest")
        assert client.get("/ui/studio/state").status_code == 401


@pytest.mark.parametrize("quota", [{"per_day": 5}, {"per_minute": 5}])
def test_keys_with_a_quota_are_not_for_the_page_which_counts_nothing(
    paged: tuple[Served, str], quota: dict[str, int]
) -> None:
    served, url = paged
    with asks(url, keys.add(served.store, f"shop {quota}", **quota)) as client:
        answer = client.get("/ui/")
    assert answer.status_code == 401 and "quota" in answer.text


def test_names_that_are_not_ours_are_refused_with_the_option_of_this_command(paged: tuple[Served, str]) -> None:
    served, url = paged
    with asks(url, served.key) as client:
        answer = client.get("/ui/", headers={"host": "evil.example"})
        assert answer.status_code == 421 and "--url URL" in answer.text
        told_of(client)
        assert client.get("/ui/config", headers={"origin": "http://evil.example"}).status_code == 403


@pytest.mark.parametrize(
    ("given", "password"),
    [
        (b"somebody:mf-key", "mf-key"),
        (b":mf-key", "mf-key"),
        (b"a:b:c", "b:c"),
        ("jos\u00e9:\u00fc".encode(), "\u00fc"),
        (b"no colon", ""),
        (b"a:\xff", ""),
        (b"", ""),
    ],
)
def test_passwords_as_browsers_send_them(given: bytes, password: str) -> None:
    shown = base64.b64encode(given).decode()
    assert password_in(Headers({"authorization": f"Basic {shown}"})) == password
    assert password_in(Headers({"authorization": f"bAsIc  {shown}"})) == password
    assert password_in(Headers({"authorization": f"Bearer {shown}"})) == ""
    assert password_in(Headers({"authorization": f"Basic {shown}?"})) == ""


# What it does


def drawing(client: httpx.Client, **wanted: Any) -> dict[str, Any]:
    """What the page sends when Draw is pressed, with some of its controls moved."""
    config = told_of(client)
    draw = next(one for one in config["dependencies"] if one["api_name"] == "draw")
    controls = {one["id"]: one["props"] for one in config["components"]}
    data = [wanted.pop(controls[id].get("label"), controls[id].get("value")) for id in draw["inputs"]]
    assert not wanted
    return {"fn_index": draw["id"], "data": data, "session_hash": "x"}


def test_what_is_drawn_on_the_page_is_what_the_library_draws(paged: tuple[Served, str]) -> None:
    served, url = paged
    with asks(url, served.key) as client:
        wanted = {"Prompt": PROMPT, "Seed": str(SEED), "Lock": True, "Steps": STEPS, "Width": SIDE, "Height": SIDE}
        body = drawing(client, **wanted)
        answer = client.post("/ui/gradio_api/run/predict", json=body, headers={"origin": url})
        assert answer.status_code == 200, answer.text
        until, entries = time.monotonic() + PATIENCE, list[dict[str, Any]]()
        while not entries:
            assert time.monotonic() < until
            entries = client.get("/ui/studio/state").json()["entries"]
            time.sleep(0.05)
        data = client.get(f"/ui/{entries[0]['url']}").content
    with asks(url, served.key) as other:  # another browser with the same key
        told_of(other)
        assert other.get("/ui/studio/state").json()["entries"] == []
        assert other.get(f"/ui/{entries[0]['url']}").status_code == 404
    drawn = miniflux.load("nano").generate(PROMPT, seed=SEED, steps=STEPS, width=SIDE, height=SIDE)
    assert Image.open(io.BytesIO(data)).tobytes() == drawn.images[0].tobytes()
    assert served.painter.began == []  # nothing of it came into the line of the server


def test_files_larger_than_bodies_of_the_api_are_taken_as_they_come(paged: tuple[Served, str]) -> None:
    served, url = paged
    data = b"x" * (65 * 2**20)
    with asks(url, served.key) as client:
        told_of(client)
        answer = client.post("/ui/gradio_api/upload", files={"files": ("a.safetensors", data)})
        assert answer.status_code == 200, answer.text
        (path,) = map(Path, answer.json())
        assert path.stat().st_size == len(data) and path.parents[3].name.startswith("miniflux-ui-")
        assert client.post("/ui/gradio_api/queue/join", content=b"x" * (5 * 2**20)).status_code == 413  # the page's own
        path.unlink()


def test_events_come_while_the_stream_is_open(paged: tuple[Served, str]) -> None:
    served, url = paged
    with asks(url, served.key) as client:
        told_of(client)
        with client.stream("GET", "/ui/gradio_api/heartbeat/x") as stream:
            assert stream.status_code == 200 and "ALIVE" in next(stream.iter_lines())


def test_the_api_is_what_it_was(paged: tuple[Served, str]) -> None:
    served, url = paged
    with asks(url, None) as client:
        assert client.get("/healthz").status_code == 200
        assert client.get("/docs").status_code == 200 and "/ui" not in client.get("/openapi.json").text
        for path in ("/uix", "/UI/", "//ui/", "/ui%2f"):
            assert client.get(path).status_code in (401, 404), path
        assert client.post("/").status_code in (404, 405)
        assert client.get("/v1/models").status_code == 401
        assert client.get("/v1/models", auth=("somebody", served.key)).status_code == 401  # a key is no password there
        assert client.get("/v1/models", headers=served.headers).status_code == 200
        text = {**served.headers, "content-type": "text/plain"}
        assert client.post("/v1/nano", headers=text, content=b"x" * 70_000).status_code == 413
        asked = client.post("/v1/nano", headers=served.headers, json={"prompt": "a", "steps": 1, "seed": 1})
        assert asked.status_code == 200
        until = time.monotonic() + PATIENCE
        while True:
            told = client.get(asked.json()["polling_url"], headers=served.headers).json()
            if told["status"] != "Pending":
                break
            assert time.monotonic() < until
            time.sleep(0.05)
        assert told["status"] == "Ready" and client.get(told["result"]["sample"]).status_code == 200


def test_behind_a_proxy_with_chosen_models_and_without_keys(tmp_path: Path) -> None:
    """The proxy takes /flux away, and says nothing of what it was asked for, as nginx does untold."""
    served = Served(tmp_path, models=("nano-schnell",), keys=False)
    words = ("--models", "nano-schnell", "--url", "https://draw.example.org/flux/", "--insecure-no-keys")
    with mounted(served, tmp_path, *words) as (both, _):
        with TestClient(both, base_url="http://127.0.0.1:8000") as client:
            front = client.get("/", follow_redirects=False)
            assert httpx.URL("https://draw.example.org/flux/").join(front.headers["location"]).path == "/flux/ui/"
            assert client.get("/ui/").status_code == 200
            assert client.get("/ui/", headers={"host": "draw.example.org"}).status_code == 200
            assert client.get("/ui/", headers={"host": "else.example.org"}).status_code == 421
            config = client.get("/ui/config", headers={"origin": "https://draw.example.org"}).json()
            assert config["root"] == "https://draw.example.org/flux/ui"
            (models,) = [one["props"] for one in config["components"] if one["props"].get("label") == "Model"]
            assert [name for name, _ in models["choices"]] == ["nano-schnell"] and models["value"] == "nano-schnell"
        site = both.page.app.seen.__self__  # type: ignore[attr-defined]  # of the guard: the page's uploads
        assert site.folder.parent.name.startswith("miniflux-ui-")
    served.close()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("miniflux-ui-")] == []


@pytest.mark.usefixtures("untold")
def test_models_that_are_not_offered_are_not_drawn_with(tmp_path: Path) -> None:
    """An older picture of the history may say one, and its settings can be used again."""
    from miniflux.apps.ui.site import opened

    with opened(tmp_path, first="nano-schnell", only={"nano-schnell"}) as site:
        assert list(site.listed) == ["nano-schnell"]
        for model in ("nano", "nano-dev", "nano2"):
            with pytest.raises(InputError, match="is not here; there are nano-schnell"):
                site.submit("s" * 32, [Request(prompt="a", model=model, steps=1)])
        assert site.submit("s" * 32, [Request(prompt="a", model="nano-schnell", width=32, height=32, steps=1)]).results(
            60
        )


# The command


@pytest.mark.usefixtures("untold")
@pytest.mark.parametrize(("package", "extra"), [("gradio", "ui"), ("uvicorn", "serve")])
def test_the_extra_that_is_missing_is_named(
    package: str, extra: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    for name in [name for name in sys.modules if name.startswith(("miniflux.apps.ui.l", "miniflux.apps.web.serving"))]:
        monkeypatch.delitem(sys.modules, name)
    assert main(["serve", "--ui", "--insecure-no-keys", "--port", "0", "--data", str(tmp_path)]) == 2
    told = capsys.readouterr()
    assert f"pip install 'miniflux[{extra}]'" in told.err and told.err.count("\n") == 1 and told.out == ""


@pytest.mark.usefixtures("untold")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--ray"], "--ui with --ray"),
        (["--insecure-no-keys", "--url", "draw.example.org"], "--url draw.example.org: a whole address"),
        (["--insecure-no-keys", "--url", "https://a b/"], "--url https://a b/: a whole address"),
        ([], "nobody has a key"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_served(
    options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "--ui", "--port", "0", "--data", str(tmp_path), *options]) == 2
    told = capsys.readouterr()
    assert said in told.err and told.err.count("\n") == 1 and told.out == ""


@pytest.mark.slow
@pytest.mark.usefixtures("untold")
def test_it_ends_at_once_and_leaves_nothing_temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a page open in a browser, whose stream never ends by itself."""
    place = tmp_path / "tmp"
    place.mkdir()
    monkeypatch.setenv("TMPDIR", str(place))
    monkeypatch.setenv("GRADIO_SERVER_PORT", "1")  # neither this nor a proxy is for the page
    monkeypatch.setenv("HTTPS_PROXY", "socks5://127.0.0.1:9")
    with Running(tmp_path / "data", "--ui", "--insecure-no-keys") as server:
        process = server.process
        assert process is not None
        with asks(server.url, None) as client:
            assert told_of(client)["root"] == f"{server.url}/ui"
            with client.stream("GET", "/ui/gradio_api/heartbeat/x") as stream:
                assert "ALIVE" in next(stream.iter_lines())
                assert [path.name[:12] for path in place.iterdir()] == ["miniflux-ui-"]
                process.send_signal(signal.SIGTERM)
                assert process.wait(30) == 128 + signal.SIGTERM
    assert list(place.iterdir()) == []
    said = (tmp_path / "server.log").read_text()
    assert "the page at /ui" in said and "without effect here: GRADIO_SERVER_PORT" in said
    assert "Traceback" not in said


@pytest.mark.browser
def test_somebody_with_a_browser_signs_in_and_draws(paged: tuple[Served, str]) -> None:
    from tests.apps.ui.conftest import Tab, browser

    served, url = paged
    driver = browser()
    try:
        driver.get(f"{url}/ui/")
        assert "mf-" not in driver.page_source  # nothing before the key is given
        driver.get(f"{url.replace('//', f'//somebody:{served.key}@')}/ui/")  # as if it were typed
        driver.get("about:blank")  # scripts may ask for nothing below an address with a password
        tab = Tab(driver, f"{url}/ui/")
        tab.console()
        tab.open()
        assert len(tab.fill("prompt", PROMPT).fill("steps", STEPS).draw()) == 1
        nowhere = re.compile(r"/(manifest\.json|favicon\.ico)\b")  # asked for at the root, whatever the page says
        assert not [line for line in tab.console() if not nowhere.search(line)]
        asked = [httpx.URL(one) for one in tab.requests() if one.startswith("http")]
        assert asked and {one.host for one in asked} == {"127.0.0.1"}
        outside = {one.path for one in asked if not one.path.startswith("/ui/")}
        assert outside <= {"/manifest.json", "/favicon.ico"}
    finally:
        driver.quit()
