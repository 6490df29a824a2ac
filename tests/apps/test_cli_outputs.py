"""Where the pictures of `miniflux generate` go: names, folders, numbers, and never over a file that is there."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from miniflux.apps.outputs import PROMPT_BYTES, PROMPT_LETTERS, Outputs, claimed, new_file, numbered, wordy
from miniflux.errors import InputError, MinifluxError, OutputError
from miniflux.result import Result
from tests.apps.test_cli import QUICK, run

ENDINGS = (".png", ".jpg")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def placed(outputs: Outputs, *abouts: dict[str, object]) -> list[str]:
    """The names of pictures of these settings, written one after the other."""
    for i, about in enumerate(abouts):
        given = {"index": i + 1, "seed": 7 + i, "prompt": "a star", "model": "nano-dev", "width": 64, "height": 48}
        with outputs.place({**given, "steps": 2, "solver": "euler", **about}) as path:
            path.write_text("picture")
    return [path.name for path in outputs.done]


def test_fields_in_names(tmp_path: Path) -> None:
    """Every field, in the forms that numbers and texts have; braces themselves."""
    pattern = str(tmp_path / "{{{index:03}}}-{seed:x}-{prompt:.3}-{model}-{width}x{height}-{steps}-{solver}.png")
    made = placed(Outputs(pattern, 2, False, ENDINGS), {}, {"prompt": "blue"})
    assert made == ["{001}-7-a-s-nano-dev-64x48-2-euler.png", "{002}-8-blu-nano-dev-64x48-2-euler.png"]


@pytest.mark.parametrize(
    ("pattern", "named"),
    [
        ("{sed}.png", "unknown field {sed}; known are {index}, {seed}"),
        ("{}.png", "unknown field {}"),
        ("{0}.png", "unknown field {0}"),
        ("{seed.real}.png", "unknown field {seed.real}"),
        ("{prompt[0]}.png", "unknown field {prompt[0]}"),
        ("{seed:>999999999}.png", "the field seed takes forms such as {seed:04}"),
        ("{seed:{index}}.png", "the field seed takes forms"),
        ("{prompt!r}.png", "the field prompt takes forms such as {prompt:.20}"),
        ("{prompt:5}.png", "the field prompt takes forms"),
        ("{seed.png", "expected '}'"),
        ("{seed}/x.png", "not of its folder"),
        ("x.bmp", "got the ending '.bmp'"),
        ("x", "a folder ends in /"),
        ("no/such/x.png", "does not exist"),
        (f"{'x' * 252}.png", "File name too long"),
        (f"{'x' * 200}{{prompt}}.png", "File name too long"),
    ],
)
def test_names_that_are_refused(
    pattern: str, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("generate", "a star", "-o", pattern, *QUICK) == 2
    said = capsys.readouterr().err
    assert named in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_folder_is_made_and_filled(tmp_path: Path) -> None:
    """One that is not there ends in a separator; names come from prompts and seeds."""
    out = tmp_path / "new" / "out"
    assert run("generate", "a red/circle?", "a star", "-o", f"{out}/", *QUICK) == 0
    assert names(out) == ["a-red-circle-0.png", "a-star-1.png"]
    assert run("generate", "a red/circle?", "-o", str(out), *QUICK) == 0
    assert names(out) == ["a-red-circle-0-1.png", "a-red-circle-0.png", "a-star-1.png"]


def test_a_file_that_is_there_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Numbered by default, which is said; `--force` writes over it; several pictures go on behind the last number."""
    out = tmp_path / "out.png"
    out.write_text("mine")
    assert run("generate", "a star", "-o", str(out), *QUICK) == 0
    said = capsys.readouterr()
    assert out.read_text() == "mine" and said.out.startswith(f"{tmp_path / 'out-1.png'}: ")
    assert run("generate", "a star", "-o", str(out), *QUICK, "--images", "2") == 0
    assert names(tmp_path) == ["out-1.png", "out-2.png", "out-3.png", "out.png"]
    assert run("generate", "a star", "-o", str(out), *QUICK, "--force") == 0
    assert Image.open(out).size == (64, 48) and len(names(tmp_path)) == 4


def test_force_never_writes_over_pictures_of_the_same_call(tmp_path: Path) -> None:
    """Where a name says too little; also on systems that do not tell a from A."""
    outputs = Outputs(str(tmp_path / "{prompt}.png"), 3, True, ENDINGS)
    assert placed(outputs, {}, {}, {"prompt": "A STAR"}) == ["a-star.png", "a-star-1.png", "A-STAR-2.png"]


def test_force_does_not_write_a_sheet_over_a_picture_that_is_on_it(tmp_path: Path) -> None:
    to = ["-o", str(tmp_path / "x.png"), "--grid", str(tmp_path / "x-1.png"), "--force"]
    assert run("generate", "a star", *to, *QUICK, "--images", "2") == 0
    assert names(tmp_path) == ["x-1-1.png", "x-1.png", "x-2.png"]
    assert Image.open(tmp_path / "x-1.png").size == (64, 48)


def test_a_failed_picture_leaves_no_name_behind(tmp_path: Path) -> None:
    def fail() -> None:
        with claimed(numbered(tmp_path / "x.png"), force=False) as path:
            assert path.read_bytes() == b""  # taken: nobody else gets it
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not list(tmp_path.iterdir())
    (tmp_path / "x.png").touch()  # as by mktemp, or left by a program that was killed
    with claimed(numbered(tmp_path / "x.png"), force=False) as path:
        assert path.name == "x.png"


def test_two_at_once_get_two_names(tmp_path: Path) -> None:
    """Threads here, and a process of its own."""
    taken: list[str] = []
    barrier = threading.Barrier(8)

    def take() -> None:
        barrier.wait()
        with claimed(numbered(tmp_path / "x.png"), force=False) as path:
            taken.append(path.name)
            barrier.wait()
            path.write_text("x")

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(taken)) == 8
    code = (
        "import sys\nfrom pathlib import Path\nfrom miniflux.apps.outputs import claimed, numbered\n"
        "with claimed(numbered(Path(sys.argv[1])), False) as path: print(path.name, flush=True); input()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "y.png")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "y.png\n"
        with claimed(numbered(tmp_path / "y.png"), force=False) as path:
            assert path.name == "y-1.png"
        other.kill()
    assert (tmp_path / "y.png").exists()  # killed: what it left is free again
    with claimed(numbered(tmp_path / "y.png"), force=False) as path:
        assert path.name == "y.png"


def test_what_is_read_is_not_written_over(tmp_path: Path) -> None:
    source = tmp_path / "x.safetensors"
    source.write_text("weights")
    (tmp_path / "link.safetensors").symlink_to(source)
    for target in (source, tmp_path / "link.safetensors"):
        with pytest.raises(OutputError, match="is what is read from"):
            new_file(target, True, [source])


@given(st.text(max_size=300))
def test_prompts_in_names_are_safe(prompt: str) -> None:
    """Letters, digits and hyphens of any script, short, the same twice over, never hidden and never an option."""
    name = wordy(prompt)
    assert re.fullmatch(r"[^\W_].*", name) or unicodedata.category(name[0])[0] in "MN"
    assert len(name) <= PROMPT_LETTERS and len(name.encode()) <= PROMPT_BYTES
    assert not set(name) & set('/\\:*?"<>|. ~\0\n') and not name.endswith("-")
    assert unicodedata.is_normalized("NFC", name) or len(name) == PROMPT_LETTERS
    assert wordy(name) == name or len(name) == PROMPT_LETTERS


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("a red circle, on: blue/green", "a-red-circle-on-blue-green"),
        ("🐱", "picture"),
        ("👩‍👩‍👧 family ❤️", "family"),
        ("../../etc/passwd", "etc-passwd"),
        ("-rf", "rf"),
        ("ein schöner Würfel", "ein-schöner-Würfel"),
        ("e\u0301te\u0301", "été"),
        ("हिन्दी", "हिन्दी"),
        ("x" * 100, "x" * 60),
        ("word " * 30, "-".join(["word"] * 12)),
        ("円" * 80, "円" * 33),
        ("", "picture"),
        ("\udcff\ud800", "picture"),
    ],
)
def test_prompts_as_names(prompt: str, name: str) -> None:
    assert wordy(prompt) == name


@pytest.mark.parametrize("prompt", ["con", "NUL", "com1", "LPT9", "aux"])
def test_names_that_windows_keeps_for_itself(prompt: str, tmp_path: Path) -> None:
    assert placed(Outputs(str(tmp_path / "{prompt}.png"), 1, False, ENDINGS), {"prompt": prompt}) == [f"_{prompt}.png"]


def test_a_random_seed_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is in the picture and in the line; a second one is another."""
    seeds = []
    for i in range(2):
        out = tmp_path / f"{i}.png"
        assert run("generate", "a star", "-o", str(out), *QUICK, "--seed", "random") == 0
        seeds.append(json.loads(Image.open(out).info["miniflux"])["seed"])
        assert f"seed {seeds[-1]}" in capsys.readouterr().out
    assert seeds[0] != seeds[1] and all(0 <= seed < 2**32 for seed in seeds)
    assert run("generate", "a star", *QUICK, "--seed", "dice") == 2
    assert "a whole number or random, got 'dice'" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_what_is_drawn_is_kept_when_stopped(number: signal.Signals, code: int, tmp_path: Path) -> None:
    """A signal after the first of many pictures: it is there, whole, and said; nothing half-written is."""
    command = [sys.executable, "-m", "miniflux", "generate", "a star", "--images", "900", "--steps", "4", "-o", "x.png"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if signal.getsignal(number) == signal.SIG_IGN:
        pytest.skip("these tests run where this signal is ignored (nohup, &), and so would the command")
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline().startswith("x-1.png: ")
        time.sleep(0.05)
        process.send_signal(number)
        said = process.stderr.read()
        assert process.wait(30) == code
    found = names(tmp_path)
    assert said == f"miniflux: stopped: {len(found)} of 900 pictures are kept ({', '.join(sorted(found, key=by))})\n"
    for name in found:
        Image.open(tmp_path / name).load()


def test_a_stopped_call_writes_its_sheet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the pictures that are drawn."""
    drawn, save = [], Result.save

    def stopping(self: Result, path: str | Path, metadata: bool = True) -> Path:
        drawn.append(path)
        if len(drawn) == 3:
            raise KeyboardInterrupt
        return save(self, path, metadata)

    monkeypatch.setattr(Result, "save", stopping)
    out, grid = str(tmp_path / "x.png"), tmp_path / "grid.png"
    assert run("generate", "a star", "-o", out, "--images", "4", "--grid", str(grid), *QUICK) == 130
    assert names(tmp_path) == ["grid.png", "x-1.png", "x-2.png"]
    assert Image.open(grid).size == (2 * 64, 48)


def test_a_stopped_call_whose_sheet_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """That it was stopped, and what is kept, is said all the same."""
    (tmp_path / "sheets").mkdir()
    save = Result.save

    def stopping(self: Result, path: str | Path, metadata: bool = True) -> Path:
        if Path(path).name == "x-2.png":
            (tmp_path / "sheets").rmdir()
            raise KeyboardInterrupt
        return save(self, path, metadata)

    monkeypatch.setattr(Result, "save", stopping)
    where = ["-o", str(tmp_path / "x.png"), "--grid", str(tmp_path / "sheets" / "grid.png")]
    assert run("generate", "a star", *where, "--images", "4", *QUICK) == 130
    said = capsys.readouterr().err
    assert "stopped: 1 of 4 pictures are kept" in said and "the sheet is not written: " in said
    assert names(tmp_path) == ["x-1.png"]


def test_previews_of_a_call_are_not_written_over(tmp_path: Path) -> None:
    """Two pictures of one name, with `--force`: what was there goes, what this call wrote stays."""
    (tmp_path / "a-star-step001.png").write_text("old")
    steps = [*QUICK, "--steps", "2", "--preview-every", "1", "--force"]
    assert run("generate", "a star", "a star", "-o", str(tmp_path / "{prompt}.png"), *steps) == 0
    assert names(tmp_path) == ["a-star-1.png", "a-star-step001-1.png", "a-star-step001.png", "a-star.png"]
    Image.open(tmp_path / "a-star-step001.png").load()


def test_pictures_and_previews_of_a_call_do_not_take_each_others_names(tmp_path: Path) -> None:
    """A preview where a picture of the call is, a picture where a preview is, a sheet where a preview is."""
    steps = [*QUICK, "--steps", "2", "--preview-every", "1", "--force", "--grid", str(tmp_path / "x-b-step001.png")]
    prompts = ["x a step001", "x a", "x b", "x b step001"]
    assert run("generate", *prompts, "-o", str(tmp_path / "{prompt}.png"), *steps) == 0
    pictures, first = ["x-a.png", "x-b.png"], ["x-a-step001.png", "x-b-step001.png"]
    others = ["x-a-step001-1.png", "x-b-step001-1.png", "x-b-step001-2.png"]
    assert names(tmp_path) == sorted([*pictures, *first, *others, "x-a-step001-step001.png", "x-b-step001-step001.png"])
    settings = {name: len(getattr(Image.open(tmp_path / name), "text", {})) for name in (*first, *others)}
    assert [name for name, texts in settings.items() if texts] == [first[0], *others[1:]]  # previews have none


def test_a_brace_in_the_name_of_a_sheet_is_written_twice(tmp_path: Path) -> None:
    """As in the name of a picture."""
    where = ["-o", str(tmp_path / "{{a}}.png"), "--grid", str(tmp_path / "{{g}}.png")]
    assert run("generate", "a star", *where, *QUICK) == 0
    assert names(tmp_path) == ["{a}.png", "{g}.png"]


def by(name: str) -> int:
    return int(re.findall(r"\d+", name)[0])


def test_bad_templates_are_errors_of_ours() -> None:
    for pattern in ("{a}.png", "{", "x"):
        with pytest.raises(MinifluxError):
            Outputs(pattern, 1, False, ENDINGS)
    with pytest.raises(InputError):
        Outputs("{index:999}.png", 1, False, ENDINGS)
