"""A file of requests: drawn once, whatever ends in the middle; alike ones together, and named as if they were not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from miniflux import service
from miniflux.apps import batch
from miniflux.apps.cli import main
from miniflux.errors import InputError
from miniflux.memory.compute import device_of_process
from miniflux.result import Result
from miniflux.settings import Request

QUICK = ["--steps", "1", "--size", "64x48"]


class Stand:
    """Draws pictures whose colour is their seed, and remembers what it was asked to draw together."""

    batches: list[list[Request]]
    most = 3

    def __init__(self, **_: Any) -> None:
        pass

    def most_at_once(self, request: Request) -> int:
        return self.most

    def draw_together(self, requests: Sequence[Request], step: Any) -> list[Result]:
        type(self).batches.append(list(requests))
        for i, request in enumerate(requests):
            if "impossible" in request.prompt:
                error = InputError(f"prompt {request.prompt!r} cannot be drawn")
                error.which = i  # pyright: ignore[reportAttributeAccessIssue]
                raise error
            if "nameless" in request.prompt:
                raise RuntimeError("out of memory")
            if "stop" in request.prompt:
                raise KeyboardInterrupt
        return [
            Result([Image.new("RGB", (8, 8), (one.seed, 0, 0))], torch.zeros(1, 4, 1, 1), [{"seed": one.seed}])
            for one in requests
        ]


@pytest.fixture
def stand(monkeypatch: pytest.MonkeyPatch) -> type[Stand]:
    Stand.batches = []
    monkeypatch.setattr(service, "Models", Stand)
    return Stand


def run(file: Path, out: Path, *more: str) -> int:
    try:
        return main(["batch", str(file), "--out", str(out), "--no-metadata", *more])
    except SystemExit as stop:  # argparse
        return int(stop.code or 0)


def written(path: Path, *lines: str | dict[str, Any]) -> Path:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines), "utf-8")
    return path


def results(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text("utf-8").splitlines()]


def pictures(out: Path) -> dict[str, tuple[int, ...]]:
    """The files, and the colour of each."""
    return {path.name: Image.open(path).getpixel((0, 0)) for path in sorted(out.glob("*.png"))}  # type: ignore[misc]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "prompts.jsonl"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "pictures"


@pytest.mark.usefixtures("stand")
def test_lines_are_pictures_and_results(file: Path, out: Path) -> None:
    written(file, "a star", "", {"prompt": "a ring", "seed": 7, "steps": 3}, {"prompt": "a cross", "images": 2})
    assert run(file, out, "--seed", "5", *QUICK) == 0
    star, ring, cross = results(out)
    assert [one["line"] for one in (star, ring, cross)] == [1, 3, 4]
    assert star["request"] == {"prompt": "a star", "model": "nano", "seed": 5, "steps": 1, "width": 64, "height": 48}
    assert (ring["request"]["seed"], ring["request"]["steps"]) == (7, 3)
    assert (ring["seeds"], cross["seeds"]) == ([7], [5, 6])
    assert sorted(name for one in (star, ring, cross) for name in one["files"]) == list(pictures(out))
    assert [name[:7] for name in pictures(out)] == ["000001-", "000003-", "000004-", "000004-"]
    assert list(pictures(out).values()) == [(5, 0, 0), (7, 0, 0), (5, 0, 0), (6, 0, 0)]


def test_nothing_is_drawn_twice(stand: type[Stand], file: Path, out: Path) -> None:
    lines = [{"prompt": "a star", "seed": i} for i in range(5)]
    assert run(written(file, *lines), out) == 0
    before = pictures(out)
    assert sum(map(len, stand.batches)) == 5
    assert run(file, out) == 0 and sum(map(len, stand.batches)) == 5 and pictures(out) == before

    assert run(written(file, *lines[:2], {"prompt": "a ring"}, *lines[3:]), out) == 0  # one that changed
    assert [one.prompt for one in stand.batches[-1]] == ["a ring"]
    assert set(before) < set(pictures(out))  # what was there stays

    stand.batches.clear()
    assert run(written(file, {"prompt": "a cross", "seed": 9}, *lines), out) == 0  # every line has moved
    assert [[one.prompt for one in batch] for batch in stand.batches] == [["a cross"]]
    assert [one["seeds"] for one in results(out)] == [[9], [0], [1], [2], [3], [4]]
    assert all((out / name).exists() for one in results(out) for name in one["files"])

    stand.batches.clear()
    assert run(file, out, "--force") == 0 and sum(map(len, stand.batches)) == 6


def test_equal_lines_share_a_picture(stand: type[Stand], file: Path, out: Path) -> None:
    written(file, "a star", {"prompt": "a star", "images": 2}, {"prompt": "a star", "seed": 1})
    assert run(file, out) == 0
    assert sum(map(len, stand.batches)) == 2  # seeds 0 and 1
    assert [(one["seeds"], len(one["files"])) for one in results(out)] == [([0], 1), ([0, 1], 2), ([1], 1)]


def test_alike_lines_are_drawn_together_and_order_changes_no_file(
    stand: type[Stand], file: Path, out: Path, tmp_path: Path
) -> None:
    lines = [{"prompt": "a star", "seed": i, "steps": 1 + i % 2} for i in range(8)]
    assert run(written(file, *lines), out) == 0
    assert sorted(len(batch) for batch in stand.batches) == [1, 1, 3, 3]
    for together in stand.batches:
        assert len({one.steps for one in together}) == 1
    stand.most = 1
    try:
        assert run(file, tmp_path / "alone") == 0
    finally:
        stand.most = 3
    assert pictures(tmp_path / "alone") == pictures(out)
    assert (tmp_path / "alone" / "results.jsonl").read_bytes() == (out / "results.jsonl").read_bytes()


@pytest.mark.parametrize("window", [1, 3, 100])
@pytest.mark.usefixtures("stand")
def test_the_window_changes_nothing(
    file: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    lines = [{"prompt": f"star {i % 4}", "seed": i % 3, "images": 1 + i % 2} for i in range(12)]
    assert run(written(file, *lines), tmp_path / "usual") == 0
    monkeypatch.setattr(batch, "WINDOW", window)
    assert run(file, out) == 0
    assert pictures(out) == pictures(tmp_path / "usual") and results(out) == results(tmp_path / "usual")


WRONG = {
    "{": "not JSON",
    '{"prompt": 3}': "prompt",
    '{"seed": 3}': "'prompt' is missing",
    '{"prompt": "a", "sead": 3}': "sead",
    '{"prompt": "a", "seed": -3}': "seed must be a whole number",
    '{"prompt": "a", "prompt": "b"}': "prompt",
    '{"prompt": "a", "model": "flux9"}': "flux9",
    '{"prompt": "a", "loras": [{"file": "nowhere"}]}': "nowhere: no such file",
    '{"prompt": "a", "image": "' + 64 * "0" + '"}': "steered by pictures",
}


def test_wrong_lines_are_told_and_the_others_drawn(
    stand: type[Stand], file: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written(file, "a star", *WRONG, "an impossible ring", "a cross", "a nameless one")
    assert run(file, out) == 2
    said = capsys.readouterr().err
    for number, (_, why) in enumerate(WRONG.items(), 2):
        (line,) = [line for line in said.splitlines() if f"line {number}:" in line]
        assert why in line
        assert why in results(out)[number - 1]["error"]
    by_line = {one["line"]: one for one in results(out)}
    assert "cannot be drawn" in by_line[len(WRONG) + 2]["error"]
    assert by_line[len(WRONG) + 4]["error"] == "out of memory"
    drawn = [line for line, one in by_line.items() if one.get("files")]
    assert drawn == [1, len(WRONG) + 3]
    stand.batches.clear()
    assert run(file, out) == 2  # those that failed are tried again, nothing else is
    assert {one.prompt for batch in stand.batches for one in batch} == {"an impossible ring", "a nameless one"}


def test_strict_draws_nothing_if_a_line_is_wrong(stand: type[Stand], file: Path, out: Path) -> None:
    assert run(written(file, "a star", "{"), out, "--strict") == 2
    assert not stand.batches and not out.exists()


def test_strict_stops_at_the_first_that_cannot_be_drawn(stand: type[Stand], file: Path, out: Path) -> None:
    stand.most = 1
    try:
        assert run(written(file, "an impossible ring", "a star", "a cross"), out, "--strict") == 2
    finally:
        stand.most = 3
    assert [[one.prompt for one in batch] for batch in stand.batches] == [["an impossible ring"]]


def test_stopped_in_the_middle_it_goes_on(stand: type[Stand], file: Path, out: Path) -> None:
    written(file, *[{"prompt": "a star", "seed": i} for i in range(6)], "stop")
    assert run(file, out) == 130
    assert len(pictures(out)) == 6 and not (out / "results.jsonl").exists()
    (out / "0123456789abcdef.part").write_bytes(b"half a pict")  # as a killed run leaves it
    empty = sorted(out.glob("*.png"))[2]
    empty.write_bytes(b"")  # as a machine that lost its power may
    stand.batches.clear()
    assert run(written(file, *[{"prompt": "a star", "seed": i} for i in range(7)]), out) == 0
    assert [one.seed for one in stand.batches[0]] == [2, 6]
    assert [Image.open(out / one["files"][0]).getpixel((0, 0)) for one in results(out)] == [(i, 0, 0) for i in range(7)]
    assert not list(out.glob("*.part"))


@pytest.mark.usefixtures("stand")
def test_two_runs_do_not_share_a_folder(file: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("fcntl")
    written(file, "a star")
    with batch.Folder(str(out), "png", False):
        assert run(file, out) == 2
    assert "another batch is filling this folder" in capsys.readouterr().err
    assert run(file, out) == 0


@pytest.mark.usefixtures("stand")
def test_encodings_and_line_ends(file: Path, out: Path) -> None:
    file.write_bytes('{"prompt": "ein Stern über Wasser"}\r\nein Ring\r{"prompt": "x"}\n'.encode("utf-16"))
    assert run(file, out) == 0
    assert [one["request"]["prompt"] for one in results(out)] == ["ein Stern über Wasser", "ein Ring", "x"]


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["nothing.jsonl", "--out", "o"], "No such file"),
        (["empty.jsonl", "--out", "o"], "no line with a request"),
        (["one.jsonl", "--out", "one.jsonl"], "one.jsonl"),
        (["one.jsonl", "--out", "o", "--workers", "0"], "at least 1"),
        (["one.jsonl", "--out", "o", "--steps", "0"], "steps"),
        (["one.jsonl", "--out", "o", "--weights", "nowhere"], "no such folder"),
        (["one.jsonl", "--out", "o", "--dtype", "int3"], "dtype"),
        (["one.jsonl", "--out", "o", "--format", "gif"], "gif"),
    ],
)
@pytest.mark.usefixtures("stand")
def test_wrong_options(
    arguments: list[str],
    why: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "empty.jsonl", "", "  ")
    written(tmp_path / "one.jsonl", "a star")
    try:
        code = main(["batch", *arguments])
    except SystemExit as stop:
        code = int(stop.code or 0)
    said = capsys.readouterr().err
    assert code == 2 and why in said and len(said.splitlines()) == 1


def test_processes_share_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device_of_process(1, "cpu") == "cpu"
    for gpus, devices in ((0, [None] * 3), (1, [None] * 3), (2, ["cuda:0", "cuda:1", "cuda:0"])):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        assert [device_of_process(i, None) for i in range(3)] == devices


def test_a_real_picture_is_the_one_that_generate_draws(file: Path, tmp_path: Path) -> None:
    written(file, {"prompt": "a red circle", "seed": 4}, {"prompt": "a star", "seed": 1, "images": 2})
    out = tmp_path / "pictures"
    assert main(["batch", str(file), "--out", str(out), *QUICK]) == 0
    alone = tmp_path / "alone.png"
    for line, prompt, seed in ((1, "a red circle", 4), (2, "a star", 2)):
        assert main(["generate", prompt, "-o", str(alone), "--force", "--seed", str(seed), *QUICK]) == 0
        (about,) = [one for one in results(out) if one["line"] == line]
        with Image.open(out / about["files"][-1]) as image, Image.open(alone) as expected:
            assert image.tobytes() == expected.tobytes()
            assert json.loads(image.text["miniflux"])["seed"] == seed  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_killed_at_any_moment_it_goes_on(file: Path, out: Path, tmp_path: Path, workers: str) -> None:
    written(file, *[{"prompt": f"star {i}", "seed": i, "steps": 1 + i % 2} for i in range(24)])
    command = [sys.executable, "-m", "miniflux", "batch", str(file), "--size", "64x48", "--no-metadata"]
    more = ["--workers", workers, "--out"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for kept in (1, 9):
        process = subprocess.Popen([*command, *more, str(out)], env=environment, stderr=subprocess.DEVNULL)
        until = time.monotonic() + 300
        while len(list(out.glob("*.png"))) < kept and process.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.png")}
    assert before
    for name in before:
        Image.open(out / name).load()  # none of them is half a picture
    subprocess.run([*command, *more, str(out)], env=environment, check=True)
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before
    subprocess.run([*command, "--out", str(tmp_path / "whole")], env=environment, check=True)
    assert pictures(out) == pictures(tmp_path / "whole") and len(pictures(out)) == 24
    assert (out / "results.jsonl").read_bytes() == (tmp_path / "whole" / "results.jsonl").read_bytes()
