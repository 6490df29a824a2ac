"""What the container, the composition and the unit say is true of the program, as far as no container is run."""

from __future__ import annotations

import configparser
import fnmatch
import http.server
import json
import re
import shlex
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from miniflux.apps.cli import parser
from miniflux.apps.serve.command import END_SECONDS, PORT
from miniflux.service.jobs.supervisor import ENDS

yaml = pytest.importorskip("yaml")
tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads pyproject.toml")

ROOT = Path(__file__).resolve().parents[1]
UNIT = ROOT / "deploy" / "miniflux.service"
KNOWN = {"ARG", "FROM", "RUN", "WORKDIR", "COPY", "ENV", "USER", "VOLUME", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT", "CMD"}


def instructions() -> list[tuple[str, str]]:
    """Those of the Dockerfile, lines joined."""
    text = "\n".join(line for line in (ROOT / "Dockerfile").read_text("utf-8").splitlines() if line[:1] != "#")
    lines = [line.strip() for line in text.replace("\\\n", " ").splitlines()]
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines if line)]


def last(name: str) -> str:
    return [rest for word, rest in instructions() if word == name][-1]


def composed(path: str = "compose.yaml") -> dict[str, Any]:
    return yaml.safe_load((ROOT / path).read_text("utf-8"))


def interpolated(text: str) -> str:
    """With the values that stand beside the variables."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


def unit() -> configparser.ConfigParser:
    found = configparser.ConfigParser(strict=False, interpolation=None)
    found.optionxform = str  # type: ignore[assignment, method-assign]
    found.read(UNIT, "utf-8")
    return found


def sources() -> list[str]:
    """What the Dockerfile copies out of the checkout."""
    copies = [rest.split() for word, rest in instructions() if word == "COPY"]
    return [source for words in copies if not words[0].startswith("--from") for source in words[:-1]]


def taken(name: str) -> bool:
    """Whether .dockerignore lets a path through: the last pattern that fits decides."""
    found = True
    for line in (ROOT / ".dockerignore").read_text("utf-8").split():
        pattern, wanted = line.removeprefix("!"), line.startswith("!")
        parts = [name, *map(str, Path(name).parents)] if not pattern.startswith("**") else Path(name).parts
        if line != "#" and any(fnmatch.fnmatch(part, pattern.removeprefix("**/")) for part in parts):
            found = wanted
    return found


# The container


def test_the_dockerfile_has_instructions_that_there_are() -> None:
    assert {word for word, _ in instructions()} == KNOWN
    assert [rest.split()[0] for word, rest in instructions() if word == "FROM"] == ["${BASE}", "${BASE}"]


def test_the_container_serves_as_somebody_else_than_root() -> None:
    words = [*json.loads(last("ENTRYPOINT")), *json.loads(last("CMD"))]
    options = parser().parse_args(words[1:])
    assert words[0] == "miniflux" and options.command == "serve" and options.host == "0.0.0.0"
    assert options.port == PORT == int(last("EXPOSE"))
    user = last("USER")
    assert user.isdigit() and int(user) > 0
    made = [rest for word, rest in instructions() if word == "RUN" and "useradd" in rest]
    assert f"--uid {user} " in made[0] and f"-m 0700 {last('VOLUME')}" in made[0]
    assert f"MINIFLUX_DATA={last('VOLUME')}" in last("ENV")


def test_what_is_copied_is_there_and_nothing_else_is_sent() -> None:
    for source in sources():
        assert (ROOT / source).exists() and taken(source), source
    assert taken("src/miniflux/nano/weights/README.md") and taken("src/miniflux/apps/cli.py")
    for name in (".env", ".git/config", "weights/ae.safetensors", "tests/conftest.py", ".venv/bin/python"):
        assert not taken(name), name
    assert not taken("src/miniflux/__pycache__/checks.pyc")


def test_the_package_is_built_from_what_is_copied(tmp_path: Path) -> None:
    for source in sources():
        if source != "src":
            shutil.copy(ROOT / source, tmp_path)
    (tmp_path / "src").symlink_to(ROOT / "src")
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    about = (tmp_path / "miniflux.egg-info" / "PKG-INFO").read_text("utf-8")
    arguments = dict(rest.split("=", 1) for word, rest in instructions() if word == "ARG")
    assert '".[${EXTRAS}]"' in (ROOT / "Dockerfile").read_text("utf-8")
    with_page = composed("deploy/compose.ui.yaml")["services"]["server"]["build"]["args"]["EXTRAS"]
    for extras in (arguments["EXTRAS"], with_page):
        assert {f"Provides-Extra: {extra}" for extra in extras.split(",")} <= set(about.splitlines())


def test_the_health_check_asks_the_server() -> None:
    check = json.loads(last("HEALTHCHECK").partition("CMD")[2])
    assert f":{PORT}/healthz" in check[-1]

    class Answer(http.server.BaseHTTPRequestHandler):
        status = 200

        def do_GET(self) -> None:
            self.send_response(self.status if self.path == "/healthz" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        asked = [sys.executable, *check[1:-1], check[-1].replace(str(PORT), str(server.server_port))]
        assert subprocess.run(asked, check=False).returncode == 0
        Answer.status = 503
        assert subprocess.run(asked, check=False, capture_output=True).returncode != 0
        server.shutdown()
    assert subprocess.run(asked, check=False, capture_output=True).returncode != 0  # nobody listens


# The composition


def test_the_composition_starts_the_server_when_the_database_answers() -> None:
    services = composed()["services"]
    server, database = services["server"], services["database"]
    options = parser().parse_args([interpolated(word) for word in server["command"]])
    assert options.command == "serve" and options.workers == 1
    assert server["depends_on"]["database"]["condition"] == "service_healthy" and database["healthcheck"]["test"]
    assert re.match(r"postgresql\+psycopg://miniflux:.*@database/miniflux$", server["environment"]["MINIFLUX_DATABASE"])
    assert database["environment"]["POSTGRES_USER"] == database["environment"]["POSTGRES_DB"] == "miniflux"
    assert interpolated(server["ports"][0]) == f"127.0.0.1:8000:{PORT}"  # for nobody else, unless told
    named = {volume.split(":")[0] for one in services.values() for volume in one["volumes"] if volume[0] not in "$./"}
    assert named == set(composed()["volumes"])
    assert f"data:{last('VOLUME')}" in server["volumes"]
    assert int(server["stop_grace_period"].removesuffix("s")) > END_SECONDS + ENDS


def test_variables_are_those_of_the_example_and_no_secret_has_a_value() -> None:
    text = (ROOT / "compose.yaml").read_text("utf-8")
    example = (ROOT / "deploy" / "env.example").read_text("utf-8")
    given = dict(line.split("=", 1) for line in example.splitlines() if "=" in line and line[0] != "#")
    assert set(re.findall(r"\$\{(\w+)", text)) == set(given)
    for name, default in re.findall(r"\$\{(\w+):-([^}]*)\}", text):
        assert given[name] == default
    assert given["POSTGRES_PASSWORD"] == "" and "${POSTGRES_PASSWORD:?" in text
    assert "/.env" in (ROOT / ".gitignore").read_text("utf-8").split()


@pytest.mark.parametrize("which", ["cuda", "ui"])
def test_more_of_the_composition_changes_services_that_there_are(which: str) -> None:
    more = composed(f"deploy/compose.{which}.yaml")["services"]
    assert set(more) <= set(composed()["services"])
    arguments = {rest.partition("=")[0] for word, rest in instructions() if word == "ARG"}
    assert set(more["server"]["build"]["args"]) <= arguments


def test_the_composition_with_the_page_starts_the_same_server() -> None:
    words = composed("deploy/compose.ui.yaml")["services"]["server"]["command"]
    assert words == [*composed()["services"]["server"]["command"], "--ui"]
    assert parser().parse_args([interpolated(word) for word in words]).ui


# The unit


def test_the_unit_starts_the_server() -> None:
    service = unit()["Service"]
    words = shlex.split(service["ExecStart"])
    options = parser().parse_args(words[1:])
    assert Path(words[0]).name == "miniflux" and options.command == "serve" and options.host == "127.0.0.1"
    assert f"MINIFLUX_DATA=/var/lib/{service['StateDirectory']}" in service["Environment"].split()
    assert service["SuccessExitStatus"] == "143"
    assert int(service["TimeoutStopSec"]) > END_SECONDS + ENDS


def test_variables_are_read_somewhere() -> None:
    texts = [path.read_text("utf-8") for path in (ROOT / "src").rglob("*.py")]
    deployed = [ROOT / "Dockerfile", ROOT / "compose.yaml", UNIT]
    names = {name for path in deployed for name in re.findall(r"MINIFLUX_[A-Z]+", path.read_text("utf-8"))}
    names -= {"MINIFLUX_WORKERS", "MINIFLUX_LISTEN"}  # of the composition alone
    assert names == {"MINIFLUX_DATA", "MINIFLUX_DATABASE", "MINIFLUX_WEIGHTS"}
    for name in names:
        assert any(f'"{name}"' in text for text in texts), name


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_takes_the_unit_and_finds_little_exposed(tmp_path: Path) -> None:
    """The program is another one: the unit's own is not installed here."""
    copy = tmp_path / UNIT.name
    copy.write_text(re.sub(r"ExecStart=\S+", f"ExecStart={sys.executable}", UNIT.read_text("utf-8")), "utf-8")
    verified = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", copy], check=False, capture_output=True, text=True
    )
    assert verified.returncode == 0 and not verified.stderr, verified.stderr
    exposed = ["systemd-analyze", "security", "--offline=true", "--threshold=15", "--no-pager", copy]  # of 100
    told = subprocess.run(exposed, check=False, capture_output=True, text=True)
    if "unrecognized option" in told.stderr:
        pytest.skip("systemd is older than 250")
    assert told.returncode == 0, told.stdout[-300:]
