"""Text from bytes of an unsaid encoding, and strings with halves of characters: right, or refused in a line."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miniflux.errors import InputError
from miniflux.text.decoding import decoded, repaired

TEXTS = ["a red star\na blue ring", "ein Wärter\nfaçade", "дом\nкот", "灯台の夜\n霧の星", "\U0001f600 moon\n", "x"]
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-32"]


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        *((text, encoding) for text in TEXTS for encoding in [*ENCODINGS, "utf-32-le", "utf-32-be"]),
        # Without a mark and without a line end nothing tells UTF-16 from UTF-8: no NUL lies beside an ASCII letter.
        *((text, encoding) for text in TEXTS if "\n" in text for encoding in ["utf-16-le", "utf-16-be"]),
    ],
)
def test_files_in_unicode_are_read_with_and_without_a_mark(text: str, encoding: str) -> None:
    assert decoded("the list", text.encode(encoding)) == text


@pytest.mark.parametrize("mark", ["\ufeff"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_marks_are_no_part_of_the_text(mark: str, encoding: str) -> None:
    assert decoded("the list", (mark + "a star").encode(encoding)) == "a star"


@pytest.mark.parametrize("encoding", ["cp1252", "cp1251", "cp932", "gb18030", "euc_kr", "latin-1", "mac_roman"])
def test_code_pages_are_refused(encoding: str) -> None:
    text = {"cp1251": "дом на холме", "cp932": "灯台の夜", "gb18030": "灯塔之夜", "euc_kr": "등대의 밤"}.get(
        encoding, "façade"
    )
    with pytest.raises(InputError, match=r"the list: not UTF-8 \(.* at line 2\): save it as UTF-8"):
        decoded("the list", b"a star\n" + text.encode(encoding))


@pytest.mark.parametrize(
    "data",
    [
        b"a\0b",
        b"\0",
        b"\0\0\0\0",
        b"\xff\xfea",
        b"\xef\xbb\xbf\xff",
        b"\x89PNG\r\n\x1a\n\0\0",
        b"\xff\xfe\0\xd8",
        bytes(range(256)),
    ],
)
def test_what_is_no_text_is_refused(data: bytes) -> None:
    with pytest.raises(InputError) as error:
        decoded("the list", data)
    assert "\n" not in str(error.value) and str(error.value).startswith("the list")


def test_halves_that_belong_together_are_joined() -> None:
    assert repaired("a prompt", "a \ud83d\ude00 b") == "a \U0001f600 b"
    assert repaired("a prompt", "\ud83d\udc80") == "\U0001f480"  # its second half looks like an escaped byte
    assert repaired("a prompt", "plain é 漢") == "plain é 漢"


@given(st.text())
def test_bytes_that_a_locale_could_not_read_are_utf8(text: str) -> None:
    escaped = text.encode().decode("ascii", "surrogateescape")  # as `sys.argv` of the C locale
    assert repaired("a prompt", escaped) == text
    halves = "".join(
        letter if letter < "\U00010000" else letter.encode("utf-16-be").decode("utf-16-be", "surrogatepass")
        for letter in text
    )
    assert repaired("a prompt", halves) == text


@pytest.mark.parametrize("text", ["\ud800", "a \udfff", "\ude00\ud83d", "caf\udce9", "\ud83d x \ude00"])
def test_halves_that_are_left_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="the prompt holds (half a character|the byte)") as error:
        repaired("the prompt", text)
    str(error.value).encode()
    with pytest.raises(InputError, match="must be a string, got 3"):
        repaired("the prompt", 3)  # type: ignore[arg-type]


def test_a_prompt_of_the_c_locale() -> None:
    """Where Python reads arguments as ASCII, the bytes of UTF-8 are still the same prompt."""
    code = "import sys; from miniflux.text.decoding import repaired; print(ascii(repaired('a', sys.argv[1])))"
    environment = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, "-c", code, "灯台"], env=environment, capture_output=True, check=True)
    assert done.stdout.decode().strip() == ascii("灯台")
