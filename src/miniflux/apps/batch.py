"""`miniflux batch`: a file of requests, one picture a line; what is drawn already is not drawn again."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from miniflux.apps import arguments, console
from miniflux.apps.arguments import MENDABLE
from miniflux.errors import InputError, MinifluxError, OutputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

if TYPE_CHECKING:
    from miniflux.apps.hands import Hand, Hands, RayHands, Unit
    from miniflux.settings import Request

WINDOW = 512  # pictures among which those that can be drawn together are looked for
DIGITS = 16  # of a digest in a name: 64 bits tell the requests of every file that there will be from each other
TOLD = 20  # lines that are wrong, of which each is told on stderr
RESULTS = "results.jsonl"
NAME = re.compile(rf"\d{{6,}}(?:-\d+)?-([0-9a-f]{{{DIGITS}}})\.(png|jpg|webp)")
PART = re.compile(r"[0-9a-f]{16}\.part")  # as `disk.write_beside` names what is not finished


def add(commands: Any) -> None:
    """Add the command to the subparsers of the command line."""
    batch = commands.add_parser(
        "batch",
        help="draw a file of requests, one a line",
        description="Draw every line of a file. A line that begins with { is JSON: a prompt, and what else the record "
        "of settings has (model, seed, images, steps, width, height, guidance, negative, loras ...), which goes before "
        "the options here; any other line is a prompt. Each picture is named by the number of its line and a digest of "
        "its request. What is there is not drawn again: stopped or killed, the same command goes on where it was.",
        epilog=f"What became of each line is told in FOLDER/{RESULTS}. Exit code 2 if a line is wrong.",
    )
    batch.add_argument("file", metavar="FILE", help="one request a line; - for stdin")
    batch.add_argument("--out", type="path", required=True, metavar="FOLDER", help="for the pictures; it is made")
    batch.add_argument("--format", choices=("png", "jpg", "webp"), default="png", help="default %(default)s")
    batch.add_argument("--no-metadata", action="store_true", help="leave the settings out of the files")
    batch.add_argument("--force", action="store_true", help="draw what is there anew, and write over it")
    batch.add_argument("--strict", action="store_true", help="draw nothing if a line is wrong, and stop where one "
                       "cannot be drawn; else the others are drawn")  # fmt: skip
    batch.add_argument("--workers", type="count", default=1, metavar="N", help="processes that draw, each with models "
                       "of its own; with several GPUs one for each; default %(default)s: this one")  # fmt: skip
    batch.add_argument("--ray", nargs="?", const="local", metavar="ADDRESS", help="have Ray place them; of a cluster "
                       "that runs: auto, or its address. Needs the extra ray")  # fmt: skip
    lines = batch.add_argument_group("what lines do not say themselves")
    lines.add_argument("--model", default="nano", metavar="NAME|PATH", help="default %(default)s, which is bundled")
    lines.add_argument("--seed", type=int, metavar="N", help="of every line; default 0")
    lines.add_argument("--images", type=int, metavar="N", help="pictures of a line, from seed, seed + 1 ...")
    lines.add_argument("--steps", type=int, metavar="N", help="more is slower and finer")
    lines.add_argument("--size", type=arguments.size, metavar="WxH", help="in pixels, multiples of 16")
    lines.add_argument("--guidance", type=float, metavar="X", help="how strongly the prompt is followed")
    lines.add_argument("--lora", action="append", type=arguments.lora, default=[], metavar="PATH[:SCALE]",
                       help="may be given several times")  # fmt: skip
    batch.add_argument("--weights", type="path", metavar="FOLDER", help="look for the files of models here first")
    batch.add_argument("--device", metavar="NAME", help="cpu, cuda, mps ...; default the best there is")
    batch.add_argument("--dtype", metavar="NAME", help="float32, bfloat16 or float16; default what suits the device")
    batch.set_defaults(run=_run)
    arguments.add_verbose(batch)


@dataclass
class Line:
    """One line, and what becomes of it.

    Attributes:
        number: from 1, as editors count.
        request: None if the line is wrong.
        error: why it is wrong, or could not be drawn.
        units: its pictures.
    """

    number: int
    request: Request | None = None
    error: str = ""
    units: list[Unit] = field(default_factory=list)

    def text(self) -> str:
        """As the results tell it."""
        about: dict[str, Any] = {"line": self.number}
        if self.request is not None:
            about |= {"request": self.request.as_json(), "files": [], "seeds": []}
            for unit in self.units:
                if unit.path.exists():
                    about["files"].append(unit.path.name)
                    about["seeds"].append(unit.request.seed)
        return json.dumps({**about, "error": self.error} if self.error else about, ensure_ascii=False)


class Folder:
    """The pictures that there are, by digest; and the results, which only one run at a time may write.

    Raises:
        OutputError: it cannot be made or written to, or another run fills it.
    """

    def __init__(self, path: str, ending: str, force: bool) -> None:
        from miniflux.disk import folder_to_fill

        self.path, self.ending = Path(path), ending
        with suppress(OSError):  # which the next line tells; made here, it is as open as this user's folders are
            self.path.mkdir(parents=True, exist_ok=True)
        folder_to_fill(self.path, "the pictures of a batch")
        self.part = self.path / f"{RESULTS}.part"
        self.results: TextIO = open(self.part, "a", encoding="utf-8")  # noqa: SIM115
        try:
            if fcntl is not None:
                fcntl.flock(self.results, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.results.close()
            raise OutputError(f"{path}: another batch is filling this folder") from None
        except OSError:
            pass  # a file system without locks
        self.results.truncate(0)
        self.there: dict[str, Path] = {}
        for entry in os.scandir(self.path):
            if PART.fullmatch(entry.name):  # of a run that was killed
                with suppress(OSError):
                    os.unlink(entry)
            elif not force and (found := NAME.fullmatch(entry.name)) and found[2] == ending and entry.stat().st_size:
                self.there[found[1]] = Path(entry)

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *_: object) -> None:
        self.results.close()

    def units(self, line: Line) -> list[Unit]:
        """The pictures of a line."""
        from miniflux.apps.hands import Unit

        assert line.request is not None
        many = line.request.images > 1
        singles = [line.request.single(i) for i in range(line.request.images)]
        names = [f"{line.number:06}-{i}" if many else f"{line.number:06}" for i in range(1, len(singles) + 1)]
        return [
            Unit(single, self.path / f"{name}-{digest(single)}.{self.ending}")
            for name, single in zip(names, singles, strict=True)
        ]

    def take(self, unit: Unit) -> bool:
        """Whether its picture is there; if it is under the name of another line, it is copied."""
        from miniflux.disk import write_beside

        found = self.there.get(digest(unit.request))
        if found is not None and found != unit.path and not unit.path.exists():
            write_beside(unit.path, partial(shutil.copyfile, found))
        return found is not None

    def finish(self) -> None:
        """What this run has told of its lines is what there is to read."""
        self.results.close()
        os.replace(self.part, self.path / RESULTS)


@dataclass
class Count:
    """Pictures that were drawn, that were there, and lines that could not be drawn."""

    drawn: int = 0
    there: int = 0
    failed: int = 0


def digest(request: Request) -> str:
    """What tells a request from all others."""
    return hashlib.sha256(request.text().encode()).hexdigest()[:DIGITS]


def _run(options: argparse.Namespace) -> int | None:
    """Draw what is not there.

    Raises:
        InputError: the file cannot be read or holds nothing; an option is wrong; with --strict, a line.
        OutputError: the folder cannot be written to.
    """
    from tqdm import tqdm

    texts, check, counts = list(lines_of(options.file)), _Check(options), Count()
    wrong = [line for line in check.lines(texts) if line.error]  # before anything is drawn, which may take days
    total = check.pictures
    _tell(wrong)
    if wrong and options.strict:
        raise InputError(f"{len(wrong)} of {len(texts)} lines are wrong: nothing is drawn")
    arguments.say_notes(options)
    with Folder(options.out, options.format, options.force) as folder:
        try:
            with _hands(options) as hands, tqdm(total=total, unit="picture", disable=None) as bar:
                for window in windows(check.lines(texts)):
                    _draw(window, folder, hands, bar, counts, options.strict)
                    folder.results.writelines(f"{line.text()}\n" for line in window)
                    folder.results.flush()
                    with tqdm.external_write_mode(file=sys.stderr):
                        _tell([line for line in window if line.error and line.request is not None])
                    if counts.failed and options.strict:
                        break
        except KeyboardInterrupt as stop:
            stop.kept = f"{counts.drawn} pictures more are kept; the same command goes on"  # pyright: ignore
            raise
        folder.finish()
    bad = len(wrong) + counts.failed
    console.say(f"{folder.path}: {counts.drawn} pictures drawn, {counts.there} were there, of {len(texts)} lines"
                f"{f', {bad} of them wrong: see {RESULTS}' if bad else ''}")  # fmt: skip
    return MENDABLE if bad else None


def _tell(wrong: Sequence[Line]) -> None:
    """What is wrong with lines, as far as anybody reads that on a screen."""
    for line in wrong[:TOLD]:
        console.complain(f"line {line.number}: {line.error}")
    if len(wrong) > TOLD:
        console.complain(f"{len(wrong) - TOLD} lines more are wrong: {RESULTS} tells each")


def lines_of(name: str) -> Iterator[tuple[int, str]]:
    """The lines of a file that hold something, with their numbers.

    Raises:
        InputError: it cannot be read, is no text, or holds none.
    """
    from miniflux.text.decoding import decoded

    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except (OSError, ValueError) as error:
        raise InputError(f"{name}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    found = [(i, text.strip()) for i, text in enumerate(re.split("\r\n|[\r\n]", decoded(name, data)), 1)]
    found = [(i, text) for i, text in found if text]
    if not found:
        raise InputError(f"{name}: no line with a request")
    yield from found


class _Check:
    """Makes requests of lines, and refuses what can be refused without weights."""

    def __init__(self, options: argparse.Namespace) -> None:
        from miniflux.memory.compute import choose_device
        from miniflux.service import Catalogue
        from miniflux.settings import LoraUse, Request

        if options.weights is not None and not Path(options.weights).is_dir():
            raise InputError(f"--weights {options.weights}: no such folder")
        choose_device(options.device)
        width, height = options.size or (None, None)
        given = {"model": options.model, "seed": options.seed, "images": options.images, "steps": options.steps}
        given |= {"width": width, "height": height, "guidance": options.guidance, "dtype": options.dtype}
        loras = tuple(LoraUse(file, scale) for file, scale in options.lora)
        base = Request(prompt="", loras=loras, **{name: value for name, value in given.items() if value is not None})
        self.defaults: Mapping[str, Any] = base.as_json()
        self.pictures = 0
        self.catalogue = Catalogue(options.weights)
        self.model, self.lora = cache(self._model), cache(self._lora)

    def lines(self, texts: Sequence[tuple[int, str]]) -> Iterator[Line]:
        """What the texts stand for; `pictures` is how many there will be."""
        self.pictures = 0
        for number, text in texts:
            try:
                line = Line(number, self.request(text))
                assert line.request is not None
                self.pictures += line.request.images
            except MinifluxError as error:
                line = Line(number, error=str(error).partition("\n")[0])
            yield line

    def request(self, text: str) -> Request:
        """
        Raises:
            InputError, MinifluxError: the line is none.
        """
        from miniflux.service.given import unsteered
        from miniflux.settings import Request, strict
        from miniflux.variants import ALIASES, VARIANTS

        about = strict.record("settings", strict.parsed("settings", text)) if text[0] == "{" else {"prompt": text}
        if "prompt" not in about:
            raise InputError("the field 'prompt' is missing")
        request = Request.from_json({**self.defaults, **about})
        unsteered(request)
        if why := self.model(request.model):
            raise InputError(why)
        if request.model not in VARIANTS and request.model not in ALIASES:
            request.check(self.catalogue.variant_of(request.model))
        for use in request.loras:
            if why := self.lora(use.file):
                raise InputError(why)
        return request

    def _model(self, name: str) -> str:
        """Why there is no such model here; empty if there is. Asked once: a file may have as many lines as it likes."""
        from miniflux.variants import ALIASES, VARIANTS

        try:
            name = ALIASES.get(name, name)
            if name in VARIANTS:
                self.catalogue.bytes_of(name)
            else:
                self.catalogue.add(name)
        except MinifluxError as error:
            return str(error).partition("\n")[0]
        return ""

    def _lora(self, file: str) -> str:
        """Why a LoRA cannot be read; empty if it can."""
        from miniflux.lora import read
        from miniflux.lora.attaching import resolved

        try:
            read(resolved(file))
        except MinifluxError as error:
            return str(error).partition("\n")[0]
        return ""


def windows(lines: Iterator[Line]) -> Iterator[list[Line]]:
    """Whole lines, of about `WINDOW` pictures each time."""
    window: list[Line] = []
    pictures = 0
    for line in lines:
        window.append(line)
        pictures += line.request.images if line.request is not None else 0
        if pictures >= WINDOW:
            yield window
            window, pictures = [], 0
    if window:
        yield window


@contextmanager
def _hands(options: argparse.Namespace) -> Generator[Hand | Hands | RayHands]:
    from miniflux.apps.hands import Hand, Hands, How, RayHands

    how = How(weights=options.weights, device=options.device, metadata=not options.no_metadata)
    if options.workers == 1 and options.ray is None:
        yield Hand(how)
        return
    hands = Hands(how, options.workers) if options.ray is None else RayHands(how, options.workers, options.ray)
    try:
        yield hands
    finally:
        hands.close()


def _draw(
    window: Sequence[Line], folder: Folder, hands: Hand | Hands | RayHands, bar: Any, counts: Count, strict: bool
) -> None:
    """Draw what is not there of some lines."""
    from miniflux.service import kin

    wanted: dict[str, list[tuple[Line, Unit]]] = {}  # by digest: lines that ask for the same picture share it
    for line in window:
        line.units = [] if line.request is None else folder.units(line)
        for unit in line.units:
            if folder.take(unit):
                counts.there += 1
                bar.update()
            else:
                wanted.setdefault(digest(unit.request), []).append((line, unit))
    units = [same[0][1] for same in wanted.values()]
    units.sort(key=lambda unit: kin(unit.request))  # stable: those of one kin stay in the order of their lines
    for piece, told in hands.draw(units):
        for unit, why in zip(piece, told, strict=True):
            same = wanted[digest(unit.request)]
            if not why:
                folder.there[digest(unit.request)] = unit.path
                counts.drawn += 1
                counts.there += len(same) - 1
            for line, other in same:
                counts.failed += bool(why) and not line.error
                line.error = line.error or why
                if not why:
                    folder.take(other)
            bar.update(len(same))
        if strict and any(told):
            break
