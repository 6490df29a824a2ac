"""`miniflux inspect`: what files and folders are, and what pictures say of themselves."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miniflux.apps import arguments, console
from miniflux.errors import MinifluxError

if TYPE_CHECKING:
    from miniflux.settings import Reading, Record

SHOWN = ("model", "seed", "width", "height", "steps", "guidance", "solver", "schedule")  # also if they are the default
PNG, JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"


def add(commands: Any) -> None:
    """Add the command to the subparsers of the command line."""
    inspect = commands.add_parser(
        "inspect",
        help="say what files, folders and pictures are",
        description="Say which network, variant, layout and format a safetensors or GGUF file or a model folder holds; "
        "of a PNG, JPEG or WebP picture the settings that it was made with in miniflux, A1111 and its kin, or ComfyUI.",
        epilog="Formats are named as `miniflux convert --format` takes them. If one of several cannot be read, the "
        "others are told all the same, and the exit code is 2.",
    )
    inspect.add_argument("paths", nargs="+", type="path", metavar="FILE|FOLDER|PICTURE")
    inspect.add_argument("--data", action="store_true", help="read every tensor: name those with NaN, and all zero")
    inspect.add_argument("--json", action="store_true", help="the same for programs: one list for all")
    inspect.set_defaults(run=_inspect)
    arguments.add_verbose(inspect)


def _inspect(options: argparse.Namespace) -> int:
    from miniflux.inspection import inspect

    told: list[Any] = []
    code = 0
    for path in options.paths:
        try:
            if _is_picture(path):
                found = _Picture(path)
                told += [found.about()]
            else:
                found = inspect(path, data=options.data)
                told += json.loads(found.json()) if options.json else []
        except MinifluxError as error:
            if len(options.paths) == 1:
                raise
            first = str(error).splitlines()[0]
            console.complain(first)
            told += [{"path": path, "error": first}]
            code = arguments.MENDABLE
            continue
        if not options.json:
            console.say(str(found))
    if options.json:
        console.say(json.dumps(told, indent=1))
    return code


def _is_picture(path: str) -> bool:
    """Whether a file begins as pictures do that hold settings."""
    try:
        if not Path(path).is_file():  # pipes and devices are for whoever refuses them
            return False
        with open(path, "rb") as file:
            start = file.read(12)
    except (OSError, ValueError):
        return False
    return start.startswith((PNG, JPEG)) or (start[:4] == b"RIFF" and start[8:] == b"WEBP")


class _Picture:
    """What a picture says of itself: `str()` for people, `about()` for programs."""

    def __init__(self, path: str) -> None:
        from miniflux.pictures import open_picture
        from miniflux.settings import read_picture

        self.path = path
        self.reading: Reading = read_picture(path)
        self.size: tuple[int, int] | None = None
        try:
            self.size = open_picture(path).size
        except MinifluxError as error:  # what it says of itself may be whole
            self.problem = str(error).splitlines()[0].removeprefix(f"{path}: ")

    @property
    def settings(self) -> list[dict[str, Any]]:
        """Of each picture what was asked for, if it is not the default; of our own the usual as well."""
        usual = SHOWN if self.reading.records else ()
        found: list[dict[str, Any]] = []
        for request in self.reading.requests:
            about = request.as_json()
            first = {"prompt": about.pop("prompt"), "negative": about.pop("negative", None)}
            first |= {name: about.pop(name, getattr(request, name)) for name in usual}
            found.append({name: value for name, value in {**first, **about}.items() if value is not None})
        return found

    def about(self) -> dict[str, Any]:
        reading = self.reading
        return {
            "path": self.path,
            "network": "picture",
            "size": self.size,
            "origin": reading.origin,
            "settings": self.settings,
            "upsampled": [one.upsampled for one in reading.records if one.upsampled is not None],
            "files": [vars(file) for file in reading.records[0].files] if reading.records else [],
            "not_understood": list(reading.not_understood),
        }

    def __str__(self) -> str:
        reading = self.reading
        origin = "nobody who says how" if reading.origin == "none" else reading.origin
        size = f"{self.size[0]}x{self.size[1]}" if self.size else f"its pixels cannot be read: {self.problem}"
        lines = [self.path, f"  picture     {size}", f"  made by     {origin}"]
        if reading.records:
            lines[-1] += _facts(reading.records[0])
        for i, settings in enumerate(self.settings, start=1):
            if len(self.settings) > 1:
                lines.append(f"  -- picture {i} of {len(self.settings)}")
            lines += [f"  {name:<11} {_shown(value)}" for name, value in settings.items()]
            written = reading.records[i - 1].upsampled if reading.records else None
            lines += [] if written is None else [f"  upsampled   {_shown(written)}"]
        for file in reading.records[0].files if reading.records else ():
            digest = "had changed" if file.sha256 is None else f"sha256 {file.sha256[:12]}..."
            lines.append(f"  file        {file.part}: {_line(file.file)}, {file.bytes:,} bytes, {digest}")
        lines += [f"  doubt       {_line(line)}" for line in (reading.records[0].doubts if reading.records else ())]
        return "\n".join(lines + [f"  not understood: {_line(line)}" for line in reading.not_understood])


def _facts(record: Record) -> str:
    """Where and with what it was drawn, as far as it says."""
    facts = (record.version, record.torch and f"torch {record.torch}", record.device, record.dtype)
    return f" {', '.join(fact for fact in facts if fact)}".rstrip()


def _shown(value: Any) -> str:
    return _line(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _line(text: str) -> str:
    """On one line, and nothing in it that a terminal would obey."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
