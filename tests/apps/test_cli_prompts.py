"""The prompts that the words of a command line stand for."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from miniflux.apps.prompts import prompts_of
from miniflux.errors import InputError
from tests.apps.test_cli import QUICK, run


@pytest.mark.parametrize(
    ("words", "prompts"),
    [
        (["a red circle"], ["a red circle"]),
        (["star"], ["star"]),
        (["a", "red", "circle"], ["a red circle"]),
        (["a red circle", "a star"], ["a red circle", "a star"]),
        (["a red circle", "star"], ["a red circle", "star"]),
        (["赤い円", "青い星"], ["赤い円", "青い星"]),
        (["@@home with a view"], ["@home with a view"]),
        (["@@home", "with", "a", "view"], ["@home with a view"]),
        ([""], [""]),
        (["caf\udcc3\udca9 noir"], ["café noir"]),  # typed in the C locale
    ],
)
def test_words(words: list[str], prompts: list[str]) -> None:
    assert prompts_of(words) == prompts


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["a", "red", "dark blue circle"], "where does a prompt end in 'a' 'red' 'dark blue circle'"),
        (["@list.txt", "a", "red", "circle"], "where does a prompt end in '@list.txt' 'a' 'red' 'circle'"),
        (["a", "cat", "-", "on", "a", "mat"], "where does a prompt end in 'a' 'cat' '-'"),
        (["portrait", "of", "@somebody"], "where does a prompt end in 'portrait' 'of' '@somebody'"),
        (["@nothing.txt"], "'nothing.txt': no prompts could be read: No such file"),
        (["@nothing.txt"], "is written @@nothing.txt"),
        (["@."], "Is a directory"),
        (["-", "-"], "named twice"),
        (["a \udcff b"], "0xff, which is not UTF-8"),
    ],
)
def test_what_is_refused(words: list[str], named: str) -> None:
    with pytest.raises(InputError, match="(?s).*") as error:
        prompts_of(words)
    assert named in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
def test_a_file_of_prompts(tmp_path: Path, encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One a line, in any Unicode encoding; beside quoted ones; or on stdin."""
    file = tmp_path / "prompts.txt"
    data = "a red circle\r\n\n  ein grüner Würfel \u2028 hier\n".encode(encoding)
    file.write_bytes(data)
    expected = ["a red circle", "ein grüner Würfel \u2028 hier"]
    assert prompts_of([f"@{file}"]) == expected
    assert prompts_of(["star", f"@{file}", "heart"]) == ["star", *expected, "heart"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert prompts_of(["-"]) == expected


def test_a_file_that_holds_none_or_another_encoding(tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    for data, named in ((b"\n \n", "1 to 256 lines"), ("grün\n".encode("latin-1"), "not UTF-8")):
        file.write_bytes(data)
        with pytest.raises(InputError, match=named) as error:
            prompts_of([f"@{file}"])
        assert str(file) in str(error.value)


def test_unquoted_words_draw_one_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "x.png"
    assert run("generate", "a", "red", "circle", "on", "a", "blue", "background", "-o", str(out), *QUICK) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]
    assert json.loads(Image.open(out).info["miniflux"])["prompt"] == "a red circle on a blue background"
    assert "one prompt of 7 words" in capsys.readouterr().err


def test_prompts_from_a_pipe(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "miniflux", "generate", "-", "-o", "{prompt}.png", *QUICK]
    subprocess.run(command, cwd=tmp_path, input=b"a star\na heart\n", check=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-heart.png", "a-star.png"]
