"""The command `miniflux ui`, in a process of its own."""

from __future__ import annotations

import inspect
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import pytest
from gradio.components import Textbox

from miniflux.apps.cli import main
from miniflux.apps.ui.surroundings import no_stubs
from tests.apps.ui.test_listening import has_ipv6

NOBODY = "127.0.0.1:9"  # the port that discards, where no proxy is
PROXIES = dict.fromkeys(("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy"), f"http://{NOBODY}")
SOCKS = {"ALL_PROXY": f"socks5://{NOBODY}", "all_proxy": f"socks5h://{NOBODY}", "NO_PROXY": "example.org"}
NEEDLESS = {
    "GRADIO_SHARE": "true",
    "GRADIO_NODE_SERVER_PORT": "x",
    "GRADIO_ALLOWED_PATHS": "/",
    "GRADIO_VIBE_MODE": "1",
}


@pytest.mark.parametrize(
    ("how", "options", "variables", "where", "said"),
    [
        (signal.SIGINT, ["--port", "0"], {**PROXIES, **SOCKS}, r"http://127\.0\.0\.1:\d+", ""),
        (signal.SIGTERM, [], {"GRADIO_SERVER_NAME": "::1", "GRADIO_SERVER_PORT": "0"}, r"http://\[::1\]:\d+", ""),
        (
            signal.SIGINT,
            ["--host", "0.0.0.0", "--port", "0"],
            {**NEEDLESS, "GRADIO_SERVER_PORT": "", "GRADIO_ROOT_PATH": "/draw", "HTTP_PROXY": "nonsense"},
            r"http://127\.0\.0\.1:\d+",
            f"miniflux: without effect here: {', '.join(sorted(NEEDLESS))}\n"
            "miniflux: everybody who reaches this machine can draw here; --auth USER:PASSWORD asks who they are\n",
        ),
    ],
    ids=["behind proxies", "IPv6", "everybody"],
)
def test_serves_until_it_is_told_to_stop(
    how: signal.Signals, options: list[str], variables: dict[str, str], where: str, said: str, tmp_path: Path
) -> None:
    """One line says where; the page is there; Ctrl+C ends it at once, and leaves no temporary folder behind."""
    if "::1" in variables.values() and not has_ipv6():
        pytest.skip("this machine has no IPv6")
    plain = {name: value for name, value in os.environ.items() if not name.startswith("GRADIO_")}
    environment = plain | {"TMPDIR": str(tmp_path)} | variables
    arguments = [sys.executable, "-m", "miniflux", "ui", *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    calm: Any = {"trust_env": False, "timeout": 60}
    heard = partial(signal.signal, how, signal.SIG_DFL)  # a shell's background jobs, these tests perhaps, ignore SIGINT
    with subprocess.Popen(arguments, env=environment, preexec_fn=heard, **pipes) as server:  # type: ignore[call-overload]
        try:
            line = server.stdout.readline()
            found = re.search(where, line)
            assert found is not None, server.stderr.read()
            with httpx.Client(**calm, base_url=found[0]) as asks, httpx.Client(**calm) as streams:
                assert "miniflux" in asks.get("/").text
                assert re.fullmatch("([a-z0-9:/.\\[\\]]+)(/draw)?", asks.get("/config").json()["root"])
                url = f"{found[0]}/gradio_api/heartbeat/x"
                with streams.stream("GET", url, cookies=asks.cookies) as stream:  # an open tab has one
                    assert "ALIVE" in next(stream.iter_lines())
                    server.send_signal(how)
                    told = time.monotonic()
                    _, errors = server.communicate(timeout=60)
                    assert time.monotonic() - told < 30
        finally:
            server.kill()
    assert server.returncode == 130
    assert errors == f"{said}miniflux: stopped\n"
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def own_process(tmp_path: Path) -> Iterator[None]:
    """What the command does to its process is undone."""
    heard = signal.getsignal(signal.SIGTERM)
    with mock.patch.dict(os.environ):
        yield
    signal.signal(signal.SIGTERM, heard)


@pytest.mark.usefixtures("own_process")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--weights", "{tmp}/none"], "--weights {tmp}/none: no such folder"),
        (["--weights", "{tmp}/file"], "--weights {tmp}/file: no such folder"),
        (["--weights", "{tmp}"], "--weights {tmp}: no model is in this folder"),
        (["--model", "nothing"], "nothing"),
        (["--device", "abacus"], "device 'abacus' cannot be used here"),
        (["--dtype", "int3"], "dtype 'int3' is not one of"),
        (["--host", "no.such.name.invalid"], "no such name or address"),
        (["--host", "192.0.2.77"], "192.0.2.77 is not an address of this machine"),
        (["--port", "65536"], "--port 65536: expected 0 to 65535"),
        (["--port", "eighty"], "'eighty'"),
        (["--auth", "nobody"], "expected USER:PASSWORD"),
        (["--auth", " ann:x"], "expected USER:PASSWORD"),
        (["--allow-host", "http://a/"], "--allow-host 'http://a/'"),
        (["--cache", "{tmp}/file/cache"], "{tmp}/file/cache"),
        (["--history", "{tmp}/file/history"], "{tmp}/file/history"),
        (["--queue", "0"], "at least 1, got '0'"),
        (["--workers", "-1"], "at least 1, got '-1'"),
    ],
)
def test_what_is_wrong_is_said_before_the_address(
    options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("x")
    try:
        code = main(["ui", "--port", "0", *(option.format(tmp=tmp_path) for option in options)])
    except SystemExit as end:
        code = end.code
    told = capsys.readouterr()
    assert code == 2
    assert told.out == ""
    assert said.format(tmp=tmp_path) in told.err and told.err.count("\n") == 1


@pytest.mark.usefixtures("own_process")
@pytest.mark.parametrize(
    ("name", "value"), [("GRADIO_SERVER_PORT", "abc"), ("GRADIO_SERVER_PORT", "70000"), ("GRADIO_ROOT_PATH", "draw")]
)
def test_wrong_settings_of_gradio_are_said(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(name, value)
    assert main(["ui"]) == 2
    told = capsys.readouterr()
    assert value in told.err and told.out == ""


@pytest.mark.usefixtures("own_process")
def test_a_port_that_is_taken_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["ui", "--port", str(port)]) == 2
    told = capsys.readouterr()
    assert f"--port {port}: something else listens there" in told.err and told.out == ""


@pytest.mark.usefixtures("own_process")
def test_without_gradio_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "miniflux.apps.ui.launch", raising=False)
    monkeypatch.delitem(sys.modules, "miniflux.apps.ui.layout", raising=False)
    assert main(["ui"]) == 2
    assert capsys.readouterr().err == "miniflux: the page needs Gradio: pip install 'miniflux[ui]'\n"


def test_gradio_is_kept_from_its_sources_only_while_it_is_imported() -> None:
    before = inspect.getfile
    with no_stubs():
        with pytest.raises(OSError, match="source code"):
            inspect.getfile(Textbox)
        assert inspect.getfile(Path)
        assert inspect.getfile(tempfile)
    assert inspect.getfile is before
    assert inspect.getfile(Textbox)
