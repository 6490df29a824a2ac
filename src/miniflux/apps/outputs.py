"""Where results go: names from templates, numbered names, and never a file that was there already.

A name is taken by creating it, empty, which only one program can: so two that run at once get two names. The result is
then written beside and renamed over it; if there is none after all, the empty file goes again.
"""

from __future__ import annotations

import logging
import os
import re
import stat
import string
import unicodedata
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from itertools import chain, count
from pathlib import Path
from typing import Any

from miniflux.errors import InputError, OutputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

log = logging.getLogger(__name__)

FIELDS = ("index", "seed", "prompt", "model", "width", "height", "steps", "solver")
"""What `{...}` in the name of an output may say of its picture."""
IN_FOLDER = "{prompt}-{seed}.png"  # the name of a picture in a folder
PROMPT_LETTERS, PROMPT_BYTES = 60, 100  # of a prompt in a name; eCryptfs takes names of 143 bytes, most others 255
MARGIN = len("-1000.png.part")  # what is added to a name while it is written
WHOLE = ("index", "seed", "width", "height", "steps")  # fields that are numbers
RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³])$", re.IGNORECASE)  # on Windows, with any ending


def wordy(text: str, letters: int = PROMPT_LETTERS) -> str:
    """A text as part of a file's name, on every file system: its letters and digits, with hyphens between words.

    Cut behind a whole word where there is one. `picture` if nothing is left.
    """
    kept = "".join(
        letter if unicodedata.category(letter)[0] in "LMN" and letter not in "\ufe0e\ufe0f\u20e3" else " "
        for letter in unicodedata.normalize("NFC", text)
        if unicodedata.category(letter) != "Cf"  # joiners and the like, which nobody sees
    )
    try:
        os.fsencode(kept)
    except UnicodeEncodeError:  # the C locale
        kept = unicodedata.normalize("NFKD", kept).encode("ascii", "ignore").decode()
    name = "-".join(kept.split())
    end = min(letters, len(name))
    while len(name[:end].encode()) > PROMPT_BYTES or unicodedata.category(name[end : end + 1] or "x")[0] == "M":
        end -= 1
    short = name[:end]
    if end < len(name) and name[end] != "-" and "-" in short:
        short = short[: short.rindex("-")]
    return short.strip("-") or "picture"


class Outputs:
    """Where the pictures of a call go.

    Args:
        given: a file; a file whose name holds fields, such as `{seed}.png`; or a folder, which is there or ends in a
            separator. Several pictures for one file are numbered: `out-1.png`, `out-2.png` ...
        total: how many pictures there will be.
        force: write over files that are there, but never over those of this call.
        endings: of files that can be written.

    Raises:
        InputError: an unknown field, or one that says how in no way we know.
        OutputError: another ending, or the place cannot be written to.
    """

    def __init__(self, given: str, total: int, force: bool, endings: Sequence[str]) -> None:
        if not given:
            raise InputError("the name of the output is empty")
        self.total, self.force = total, force
        self.done: list[Path] = []
        self.others: list[Path] = []
        folder = given.endswith(("/", os.sep)) or os.path.isdir(given)
        pattern = os.path.join(given, IN_FOLDER) if folder else given
        self.folder, self.pattern = Path(os.path.dirname(pattern)), os.path.basename(pattern)
        self.fields = _fields(self.pattern)
        self.number = 1 if total > 1 and not self.fields else 0  # that the next file is to have; 0 for none
        if "{" in str(self.folder) and not self.folder.is_dir():
            raise InputError(f"{given}: fields in braces may stand in the name of a file, not of its folder")
        longest = {name: 9999 if name in WHOLE else "x" * 20 for name in FIELDS}
        longest |= {"seed": 2**64, "prompt": "\u4e00" * PROMPT_BYTES, "model": "x" * PROMPT_LETTERS}
        example = self.folder / self._named(longest)
        check_place(example, endings, folder=folder)

    def _named(self, about: Mapping[str, Any]) -> str:
        if not self.fields:
            return self.pattern.replace("{{", "{").replace("}}", "}")
        said = {name: wordy(str(about[name])) if isinstance(about[name], str) else about[name] for name in self.fields}
        name = self.pattern.format(**said)
        return f"_{name}" if RESERVED.match(name.partition(".")[0].strip()) else name

    def stem(self, about: Mapping[str, Any]) -> str:
        """The name of a picture without its ending, for what belongs to it: such as previews."""
        stem = Path(self._named(about)).stem
        return stem if self.fields or self.total == 1 else f"{stem}-{about['index']}"

    @contextmanager
    def beside(self, given: Path) -> Generator[Path]:
        """A path, taken, for what is none of the pictures: a preview, a sheet. Never over what this call has written.

        Raises:
            InputError, OutputError: as of `new_file`.
        """
        mine = os.path.exists(given) and any(
            path.exists() and os.path.samefile(path, given) for path in (*self.done, *self.others)
        )
        with new_file(given, self.force and not mine) as path:
            yield path
        self.others.append(path)

    @contextmanager
    def place(self, about: Mapping[str, Any]) -> Generator[Path]:
        """The path of the next picture, taken; `about` says what of `FIELDS` the pattern holds.

        Raises:
            OutputError: it cannot be written to.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{self.folder}: the folder cannot be made: {error.strerror or error}") from error
        path = self.folder / self._named(about)
        names = numbered(path, self.number)
        mine = {str(written).casefold() for written in (*self.done, *self.others)}
        with claimed((name for name in names if str(name).casefold() not in mine), self.force) as taken:
            yield taken
            self.done.append(taken)
            if self.number:
                self.number = int(taken.stem.rpartition("-")[2]) + 1


def sheet_name(given: str) -> Path:
    """The name of a sheet: one that any of its pictures could have, so without fields.

    Raises:
        InputError: it holds some.
    """
    folder, name = os.path.split(given)
    if re.search("[{}]", name.replace("{{", "").replace("}}", "")):
        raise InputError(
            f"--grid {given}: one sheet holds all pictures: no field of one names it; a brace itself is written twice"
        )
    return Path(folder, name.replace("{{", "{").replace("}}", "}"))


def _fields(pattern: str) -> list[str]:
    """The fields of a pattern, each once.

    Raises:
        InputError: one that there is not, or a form that it cannot have.
    """
    known = f"known are {', '.join(f'{{{name}}}' for name in FIELDS)}; a brace itself is written twice"
    try:
        parsed = list(string.Formatter().parse(pattern))
    except ValueError as error:
        raise InputError(f"{pattern}: {error}; {known}") from None
    fields: list[str] = []
    for _, name, spec, conversion in parsed:
        if name is None:
            continue
        if name not in FIELDS:
            raise InputError(f"{pattern}: unknown field {{{name}}}; {known}")
        form, like = (r"(0?\d{1,2})?[dxX]?", ":04") if name in WHOLE else (r"(\.\d{1,3})?", ":.20")
        if conversion or not re.fullmatch(form, spec or ""):
            raise InputError(f"{pattern}: the field {name} takes forms such as {{{name}{like}}}")
        fields.append(name)
    return list(dict.fromkeys(fields))


def check_place(path: Path, endings: Sequence[str] | None = None, *, folder: bool = False) -> None:
    """Refuse, before the work is done, what could not be written after it.

    Args:
        endings: of files that can be written; None to leave that to others.
        folder: its folder will be made if it is not there.

    Raises:
        OutputError: another ending, no such folder, no permission, or too long a name.
    """
    if endings is not None and path.suffix.lower() not in endings:
        hint = "" if path.suffix else " (a folder ends in /)"
        raise OutputError(f"{path}: a picture is written as {', '.join(endings)}, got the ending {path.suffix!r}{hint}")
    parent = path.parent
    while folder and not os.path.lexists(parent):
        parent = parent.parent
    try:
        kind = os.stat(parent).st_mode
        with suppress(FileNotFoundError):
            os.stat(parent / f"{path.name}{'x' * MARGIN}")
    except FileNotFoundError:
        raise OutputError(f"{path}: the folder {parent} does not exist") from None
    except (OSError, ValueError) as error:
        raise OutputError(f"{path}: cannot be written: {getattr(error, 'strerror', None) or error}") from None
    if not stat.S_ISDIR(kind):
        raise OutputError(f"{path}: {parent} is no folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{path}: the folder {parent} cannot be written to")


def numbered(path: Path, first: int = 0, whole: bool = False) -> Iterator[Path]:
    """`out.png`, `out-1.png`, `out-2.png` ..., from the number `first`; `whole`: what looks like an ending is none."""
    stem, ending = (path.name, "") if whole else (path.stem, path.suffix)
    for number in count(first):
        yield path.with_name(f"{stem}-{number}{ending}") if number else path


@contextmanager
def claimed(paths: Iterator[Path], force: bool, folder: bool = False) -> Generator[Path]:
    """The first of the paths that is free, taken while the result is made; with `force` the first.

    An empty file (or folder) that no running program holds is free: an interrupted run left it, or somebody made it
    for us.

    Raises:
        OutputError: the place cannot be written to.
    """
    if force:
        yield next(paths)
        return
    asked = next(paths)
    path, claim = next((path, claim) for path in chain([asked], paths) if (claim := _Claim.of(path, folder)))
    if path != asked:
        log.warning("%s is there and stays: the result is %s (--force writes over it)", asked, path.name)
    try:
        yield path
    finally:
        claim.release(path, folder)


class _Claim:
    """A name that is taken.

    Attributes:
        held: a descriptor that locks it for as long as this program lives; None where there are no locks.
        made: whether nothing was there before.
    """

    def __init__(self, held: int | None, made: bool) -> None:
        self.held, self.made = held, made

    @classmethod
    def of(cls, path: Path, folder: bool) -> _Claim | None:
        """None if somebody else has it."""
        made = True
        try:
            if folder:
                path.mkdir()
                held = os.open(path, os.O_RDONLY) if fcntl else None
            else:
                held = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            if not _empty(path, folder):
                return None
            made = False
            try:
                held = os.open(path, os.O_RDONLY) if fcntl else None
            except OSError:
                return None
        except OSError as error:
            raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error
        if held is None or fcntl is None:
            if held is not None:
                os.close(held)
            return cls(None, made) if made or folder else None
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(held), os.stat(path)) and _empty(path, folder):
                return cls(held, made)
        except BlockingIOError:
            pass  # somebody else saw our empty file and was quicker
        except OSError:
            if made:  # a file system without locks: that we made it has to do
                return cls(held, made)
        os.close(held)
        return None

    def release(self, path: Path, folder: bool) -> None:
        """Let go of it; take away what we made if nothing was written."""
        with suppress(OSError):
            if self.made and _empty(path, folder):
                if folder:
                    path.rmdir()
                else:
                    path.unlink()
        if self.held is not None:
            os.close(self.held)


def _empty(path: Path, folder: bool) -> bool:
    """Whether there is a file without bytes, or a folder without files."""
    try:
        about = os.lstat(path)
        if folder:
            return stat.S_ISDIR(about.st_mode) and not any(os.scandir(path))
    except OSError:
        return False
    return stat.S_ISREG(about.st_mode) and about.st_size == 0


def new_file(
    given: str | Path, force: bool, inputs: Sequence[str | Path] = (), *, folder: bool = False
) -> AbstractContextManager[Path]:
    """A path to write one file to (or a folder): the given one, numbered if it is taken; see `claimed`.

    Args:
        inputs: what the result is made from, which is not written over.

    Raises:
        InputError: the name is empty.
        OutputError: it is one of the inputs, or the place cannot be written to.
    """
    if not str(given):
        raise InputError("the name of the output is empty")
    path = Path(given)
    check_place(path)
    for source in inputs:
        with suppress(OSError):
            if os.path.samefile(path, source):
                raise OutputError(f"{path}: is what is read from; give the result another name")
    if path.is_dir() and not folder:
        raise OutputError(f"{path}: is a folder")
    if path.name in ("", ".."):
        raise OutputError(f"{path}: give the result a name of its own")
    return claimed(numbered(path, whole=folder), force, folder)
