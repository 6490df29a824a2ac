"""Words of the command line that mean more than a word: sizes, pairs, LoRAs with a scale."""

from __future__ import annotations

import argparse
import difflib
import os
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from miniflux.apps import console
from miniflux.errors import InputError

MENDABLE = 2  # exit code: the user can mend it
GIVEN, NOTES = "_given", "_notes"  # of a namespace: which options were given, with what; what is to be said of them


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line; options in full, because what is short for one today may be for two tomorrow;
    numbers such as -1e3 and -1:2 as values; a word when an option is given twice."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{"allow_abbrev": False, **options})
        self._negative_number_matcher = re.compile(r"-(\.?\d|inf|nan)")  # argparse knows -1 and -1.5
        self.register("type", "path", path)
        self.register("type", "count", count)
        self.register("action", None, _Once)
        self.register("action", "store", _Once)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        found, left = super().parse_known_args(args, namespace)
        if left:
            self.error(f"unrecognized arguments: {' '.join(left)}{self._meant(left)}")
        return found, left

    def _meant(self, left: Sequence[str]) -> str:
        """The option whose name is nearest to what nobody knows."""
        known = [name for action in self._actions for name in action.option_strings if name.startswith("--")]
        for word in (word.partition("=")[0] for word in left if word.startswith("--")):
            starts = [name for name in known if name.startswith(word)]
            near = starts if len(starts) == 1 else difflib.get_close_matches(word, known, 1)
            if near:
                return f"; did you mean {near[0]}?"
        return "; words stand together, before the options or behind them" if left[0][:1] != "-" else ""

    def error(self, message: str) -> NoReturn:
        name = re.match(r"argument (?:-\w/)?(-[^:]+): expected one argument", message)
        if name:
            message += f"; one that begins with - is given as {name[1]}=-..."
        console.complain(f"{' '.join(message.splitlines())} (see {self.prog} --help)", self.prog)
        raise SystemExit(MENDABLE)


class _Once(argparse.Action):
    """Stores a value. Given again with another, the last one counts, as of every command; that is said."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        given = namespace.__dict__.setdefault(GIVEN, {})
        if option_string and self.dest in given and given[self.dest] != values:
            said = f"{option_string} is given twice: {values} counts, {given[self.dest]} does not"
            namespace.__dict__.setdefault(NOTES, []).append(said)
        given[self.dest] = values
        setattr(namespace, self.dest, values)


def say_notes(options: argparse.Namespace) -> None:
    """Say what is odd about the options, once; after they were checked, so that what is wrong is one line."""
    for note in options.__dict__.pop(NOTES, ()):
        console.complain(note)


def seed(given: str) -> int | None:
    """A whole number; None for `random`."""
    if given.lower() == "random":
        return None
    try:
        return int(given)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number or random, got {given!r}") from None


def count(text: str) -> int:
    """A whole number of at least 1."""
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 10**9):
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def path(text: str) -> str:
    """The name of a file or folder: an empty one would be the folder we are in."""
    if not text:
        raise argparse.ArgumentTypeError("the name is empty")
    return text


def size(text: str) -> tuple[int, int]:
    """Width and height in pixels, of 1024x768 or 1024."""
    width, cross, height = text.lower().partition("x")
    try:
        return int(width), int(height if cross else width)
    except ValueError:
        raise argparse.ArgumentTypeError(f"a size looks like 1024x768 (width x height), got {text!r}") from None


def lora(text: str) -> tuple[str, float]:
    """A path and a scale, of PATH[:SCALE]."""
    path, colon, scale = text.rpartition(":")
    try:
        return (path, float(scale)) if colon else (text, 1.0)
    except ValueError:  # a colon that belongs to the path
        return text, 1.0


def steering(text: str) -> tuple[str, str, float, str | None]:
    """A network, a picture, a scale and a mode, of NET=FILE[:SCALE[:MODE]]; '' where NET= is left out."""
    network, equals, rest = text.partition("=")
    if not equals or (os.path.exists(text) and not os.path.exists(network)):  # a file with = in its name
        network, rest = "", text
    parts = rest.split(":")
    scales = [i for i in range(max(1, len(parts) - 2), len(parts)) if _is_number(parts[i])]
    path, scale, mode = rest, 1.0, None
    if scales:  # the first of the last two that is a number
        path, scale, mode = ":".join(parts[: scales[0]]), float(parts[scales[0]]), ":".join(parts[scales[0] + 1 :])
    if not path:
        raise argparse.ArgumentTypeError(f"expected NET=FILE[:SCALE[:MODE]], got {text!r}")
    return network, path, scale, mode or None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def sides(text: str) -> tuple[int, int, int, int]:
    """Pixels on the left, at the top, on the right and at the bottom, of L,T,R,B."""
    found = numbers(text)
    if len(found) != 4:
        raise argparse.ArgumentTypeError(f"expected four numbers LEFT,TOP,RIGHT,BOTTOM, got {text!r}")
    return found[0], found[1], found[2], found[3]


def add_pictures(command: Any) -> None:
    """The picture to change, and where: as `picture_and_mask` reads them."""
    command.add_argument("--image", metavar="FILE", help="a picture to change instead of noise to begin with")
    command.add_argument(
        "--mask", type=path, metavar="FILE", help="where to change it: white is drawn anew, black stays, bit for bit"
    )
    command.add_argument(
        "--mask-grow", type=int, default=0, metavar="N", help="by how many pixels the mask reaches further"
    )
    command.add_argument(
        "--mask-feather", type=float, default=0.0, metavar="N", help="a soft edge, so many pixels wide"
    )
    command.add_argument("--mask-threshold", type=float, metavar="X", help="no greys: white from here on (0 to 1)")
    command.add_argument(
        "--outpaint", type=sides, metavar="L,T,R,B", help="enlarge --image by so many pixels on the left, top, right "
        "and bottom, and draw there",
    )  # fmt: skip


def picture_and_mask(options: argparse.Namespace) -> tuple[Any, Any]:
    """The picture to change and its mask (H, W), as the options ask for them; None where there is none.

    Raises:
        InputError: one of them cannot be read, or an option has nothing to work on.
    """
    from miniflux.arguments import mask_for
    from miniflux.conditions.masks import feathered, grown, hardened, outpainted
    from miniflux.pictures import open_picture

    image = None if options.image is None else open_picture(options.image)
    mask = mask_for(options.mask, image)
    if options.outpaint is not None:
        if image is None:
            raise InputError("--outpaint enlarges a picture, and no --image is given")
        left, top, right, bottom = options.outpaint
        image, border = outpainted(image, left=left, top=top, right=right, bottom=bottom)
        if mask is not None:
            height, width = mask.shape
            border[top : top + height, left : left + width] = mask
        mask = border
    if mask is None:
        for name in ("mask_grow", "mask_feather", "mask_threshold"):
            if getattr(options, name) not in (None, 0) or (name == "mask_threshold" and options.mask_threshold == 0):
                raise InputError(f"--{name.replace('_', '-')} changes a mask, and none is given")
        return image, None
    if options.mask_threshold is not None:
        mask = hardened(mask, options.mask_threshold)
    mask = feathered(grown(mask, options.mask_grow), options.mask_feather)
    return image, mask


def pair(text: str) -> tuple[float, float]:
    """Two numbers, of A:B."""
    first, colon, second = text.partition(":")
    try:
        return float(first), float(second if colon else "")
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected two numbers as A:B, got {text!r}") from None


def variation(text: str) -> tuple[int, float]:
    """A seed and an amount, of SEED:AMOUNT."""
    seed, colon, amount = text.partition(":")
    try:
        return int(seed), float(amount if colon else "")
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected SEED:AMOUNT, such as 7:0.2, got {text!r}") from None


def numbers(text: str) -> list[int]:
    """Whole numbers, of 8,16,32."""
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected whole numbers as 8,16,32, got {text!r}") from None


def spacing(text: str) -> str | list[float]:
    """The name of a schedule, or noise levels of 1,0.6,0.3,0."""
    if "," not in text:
        return text
    try:
        return [float(level) for level in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a name, or noise levels as 1,0.6,0.3,0, got {text!r}") from None


def add_verbose(command: argparse.ArgumentParser) -> None:
    """The option that every command has."""
    command.add_argument("-v", "--verbose", action="store_true", help="say more about what is done")


def add_force(command: argparse.ArgumentParser) -> None:
    """The option of every command that writes files."""
    command.add_argument(
        "--force", action="store_true", help="write over a file that is there; else the result is numbered: out-1.png"
    )
