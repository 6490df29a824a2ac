"""Every example of the server's page, run as it stands there against a server that was started as the page says."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from miniflux.apps.cli import parser
from miniflux.apps.serve.webhooks import signature
from tests.apps.serve.running import Running

PAGE = Path(__file__).resolve().parents[3] / "docs" / "serve.md"
TEXT = PAGE.read_text("utf-8")
RUN = {
    "bash": (["bash", "-euo", "pipefail"], "example.sh", ("bash", "curl", "jq", "base64")),
    "py": ([sys.executable], "example.py", ()),
    "js": (["node"], "example.mjs", ("node",)),
}
MADE = {  # what the examples write, and how large it is
    **{f"{name}.png": (128, 128) for name in ("circle", "star-7", "star-8", "half", "green", "cross", "ring")},
    **{f"{name}.png": (128, 128) for name in ("ring-partial-0", "ring-partial-1", "polled", "polled-again", "steered")},
    "heart.jpg": (128, 128),
}


@dataclass(frozen=True)
class Example:
    language: str
    code: str
    line: int

    @property
    def asks(self) -> bool:
        """Whether it is for a server."""
        return ":8000" in self.code


EXAMPLES = [
    Example(found[1], found[2], TEXT[: found.start()].count("\n") + 1)
    for found in re.finditer(r"^```(bash|py|js)\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where they are run, one after the other: some go on with the picture of another."""
    return tmp_path_factory.mktemp("examples")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, str]]:
    """A server with nano, and a key for it."""
    data = tmp_path_factory.mktemp("served") / "data"
    made = subprocess.run(
        [sys.executable, "-m", "miniflux", "keys", "add", "me", "--data", str(data)],
        check=True,
        capture_output=True,
        text=True,
    )
    server = Running(data).start()
    yield server, made.stdout.strip()
    assert server.process is not None
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(60) == 143  # as systemd is told that it will


@pytest.mark.slow
@pytest.mark.parametrize("example", [one for one in EXAMPLES if one.asks], ids=lambda one: f"line {one.line}")
def test_examples_work(example: Example, served: tuple[Running, str], place: Path) -> None:
    server, key = served
    command, name, programs = RUN[example.language]
    missing = [program for program in programs if shutil.which(program) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    if example.language == "py":
        for module in set(re.findall(r"^(?:import|from) (openai|requests)\b", example.code, re.MULTILINE)):
            pytest.importorskip(module)
    before = set(place.iterdir())
    (place / name).write_text(example.code.replace("127.0.0.1:8000", f"127.0.0.1:{server.port}"), "utf-8")
    environment = {**os.environ, "MINIFLUX_KEY": key, "NO_PROXY": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, name], cwd=place, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr + done.stdout
    for path in set(place.iterdir()) - before - {place / name}:
        if path.suffix in (".png", ".jpg") and path.name != "edges.png":
            with Image.open(path) as image:
                assert image.size == MADE[path.name]
    if "events.txt" in example.code:
        events = re.findall(r"^event: (\w+)$", (place / "events.txt").read_text("utf-8"), re.MULTILINE)
        assert "progress" in events and events.count("preview") == 2 and events[-1] == "done"
        assert done.stdout.strip() == "done"  # one that is over stays as it is
    if "queue_length" in example.code:
        assert "miniflux_queue_length 0.0" in done.stdout


@pytest.mark.slow
def test_they_have_made_what_they_say(place: Path, served: tuple[Running, str]) -> None:
    """Run after those above. Asked for twice, in both shapes or by two clients, a seed is one picture."""
    if not all(map(shutil.which, ("bash", "curl", "jq", "node"))) or not (place / "circle.png").exists():
        pytest.skip("not all of them were run")
    assert {path.name for path in place.iterdir()} >= set(MADE)
    same = [Image.open(place / f"{name}.png").tobytes() for name in ("circle", "polled", "polled-again")]
    assert same[0] == same[1] == same[2]
    assert served[0].store().numbers()["done"] >= 10


def test_the_receiver_of_a_webhook_knows_a_genuine_one() -> None:
    (code,) = [one.code for one in EXAMPLES if not one.asks]
    names: dict[str, object] = {}
    exec(compile(code, PAGE.name, "exec"), names)
    genuine, body, now = names["genuine"], b'{"id":"1","status":"Ready"}', int(time.time())
    assert callable(genuine)
    signed = {"webhook-id": "a", "webhook-timestamp": str(now), "webhook-signature": signature("s", "a", now, body)}
    assert genuine("s", signed, body)
    assert not genuine("t", signed, body) and not genuine("s", signed, body + b" ")
    assert not genuine("s", {**signed, "webhook-id": "b"}, body)
    old = {**signed, "webhook-timestamp": str(now - 400), "webhook-signature": signature("s", "a", now - 400, body)}
    assert not genuine("s", old, body)


def test_commands_and_options_are_those_that_there_are() -> None:
    commands = re.findall(r"^\$ miniflux (.*)$", TEXT, re.MULTILINE)
    assert len(commands) >= 5
    for command in commands:
        parser().parse_args(command.split())
    (table,) = re.findall(r"^\| option \| what \|\n(.*?)\n\n", TEXT, re.MULTILINE | re.DOTALL)
    named = set(re.findall(r"`(--[a-z-]+)", table))
    (serve,) = [one for action in parser()._actions if action.dest == "command" for one in [action.choices["serve"]]]  # type: ignore[index]
    there = {option for action in serve._actions for option in action.option_strings if option.startswith("--")}
    assert named <= there
    assert there - named == {
        "--help",
        "--ray",
        "--host",
        "--port",
        "--insecure-no-keys",
        "--device",
        "--dtype",
        "--verbose",
    }


def test_measures_are_those_that_there_are() -> None:
    source = (Path(__file__).resolve().parents[3] / "src/miniflux/apps/serve/health.py").read_text("utf-8")
    for name in set(re.findall(r"`miniflux_(\w+?)(?:_total)?`", TEXT)):
        assert f'"{name}"' in source or f'"miniflux_{name}"' in source, name
