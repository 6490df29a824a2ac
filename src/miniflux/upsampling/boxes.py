"""Boxes that say where something is in a picture of FLUX.3: the request to a prompt upsampler, and its answer.

A box is [y_min, x_min, y_max, x_max]: from 0 to 1 as a user gives it, whole numbers from 0 to 1000 in requests and
prompts. A prompt with boxes is one paragraph that names things by id in angle brackets, and behind it a JSON array of
rows, one for each id. A row of a new picture is {id, bbox, desc}; of an edit {id, from, src_bbox, tgt_bbox, desc}.
Source: `modular_pipelines/flux3/prompt_upsampler.py` of diffusers, after `flux3/bbox.py` of the release.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from miniflux.checks import check_number, finite, several, shown, whole
from miniflux.errors import InputError
from miniflux.text.decoding import repaired

Corners: TypeAlias = "tuple[float, float, float, float]"
"""y_min, x_min, y_max, x_max."""

GRID = 1000
SAME = 0.9  # intersection over union from which a box of the answer is the user's
ID = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
CITED = re.compile(rf"<({ID.pattern})>")
ORIGIN = re.compile(r"target|ref_image_\d+", re.ASCII)
NEW, EDIT = ("id", "desc", "bbox"), ("id", "desc", "from", "src_bbox", "tgt_bbox")
REQUEST = """ORIGINAL PROMPT:
{prompt}

LOCKED BOUNDING-BOX ANNOTATIONS ([y_min, x_min, y_max, x_max] on a 0-1000 canvas, with (0, 0) at the top-left). This \
is an authoritative JSON list of dictionaries; preserve every supplied identity, provenance value, null, and \
coordinate exactly:
{rows}"""
"""The words that the model was trained with."""


@dataclass(frozen=True)
class Row:
    """One thing and where it is, on the grid of 0 to 1000.

    Attributes:
        id: its name: a letter, then letters, digits and underscores.
        desc: what it looks like.
        bbox: where it is in a new picture; the rest is then None.
        origin: `from` of an edit: "target" for what is new, "ref_image_0" and so on for what is in a reference.
        src_bbox: where it is in that reference; None for what is new.
        tgt_bbox: where it is in the result; None for what is taken away.
    """

    id: str
    desc: str = ""
    bbox: Corners | None = None
    origin: str | None = None
    src_bbox: Corners | None = None
    tgt_bbox: Corners | None = None

    @property
    def box(self) -> Corners | None:
        """The one that tells it from others: in the new picture, else in the reference."""
        return self.bbox or self.tgt_bbox or self.src_bbox

    def as_json(self) -> dict[str, Any]:
        """Its object in the JSON array."""
        if self.origin is None:
            return {"id": self.id, "bbox": _list(self.bbox), "desc": self.desc}
        source, target = _list(self.src_bbox), _list(self.tgt_bbox)
        return {"id": self.id, "from": self.origin, "src_bbox": source, "tgt_bbox": target, "desc": self.desc}


@dataclass(frozen=True)
class Layout:
    """A prompt with boxes.

    Attributes:
        caption: the paragraph, which names things as `<id>`.
        rows: one for each thing.
    """

    caption: str
    rows: tuple[Row, ...]

    @property
    def cited(self) -> tuple[str, ...]:
        """The ids that the caption names, in order."""
        return tuple(dict.fromkeys(CITED.findall(self.caption)))

    @property
    def text(self) -> str:
        """The prompt for FLUX.3."""
        return f"{self.caption} {_json(self.rows)}" if self.rows else self.caption


def rows_of(boxes: Sequence[Mapping[str, Any] | Row]) -> tuple[Row, ...]:
    """What a user gives, as rows on the grid; rows are taken as they are.

    Args:
        boxes: each {id, desc, bbox}, or each {id, desc, from, src_bbox, tgt_bbox}, coordinates from 0 to 1. Without
            `id` it is obj_1, obj_2 and so on by place; `desc` may be left out.

    Raises:
        InputError: a key is unknown or missing, a box is outside of the picture or empty on the grid, an id is no name
            or there twice, or rows of both kinds are mixed. (The release's code moves such boxes into the picture and
            names nothing.)
    """
    if isinstance(boxes, (str, Mapping)) or not isinstance(boxes, Sequence):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InputError(f"boxes must be a list, got {shown(boxes)}")
    rows = tuple(box if isinstance(box, Row) else _row(i, box) for i, box in enumerate(boxes))
    seen: set[str] = set()
    for row in rows:
        if row.id in seen:
            raise InputError(f"the id {shown(row.id)} stands in two boxes; each must have its own")
        seen.add(row.id)
    if len({row.origin is None for row in rows}) > 1:
        raise InputError("boxes are all of a new picture (with bbox), or all of an edit (with from); these are mixed")
    return rows


def _row(place: int, given: Mapping[str, Any]) -> Row:
    """A user's box. Errors as of `rows_of`."""
    if not isinstance(given, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InputError(f"box {place} must be a mapping with {', '.join(NEW)}, got {shown(given)}")
    keys = EDIT if any(key in given for key in EDIT[2:]) else NEW
    unknown = [key for key in given if key not in keys]
    if unknown:
        raise InputError(f"box {place} has no key {shown(unknown[0])}; known: {', '.join(keys)}")
    name, desc = given.get("id", f"obj_{place + 1}"), repaired(f"desc of box {place}", given.get("desc", ""))
    if not isinstance(name, str) or not ID.fullmatch(name):
        raise InputError(f"id of box {place} must be a letter, then letters, digits and underscores, got {shown(name)}")
    about = f"of box {place} ({name})"
    if keys is NEW:
        if given.get("bbox") is None:
            raise InputError(f"box {place} ({name}) needs bbox; or, in an edit, from, src_bbox and tgt_bbox")
        return Row(name, desc, _on_grid(f"bbox {about}", given["bbox"]))
    origin = given.get("from")
    if not isinstance(origin, str) or not ORIGIN.fullmatch(origin):
        raise InputError(f"from {about} must be target, or ref_image_0 and so on, got {shown(origin)}")
    source, target = (
        None if given.get(key) is None else _on_grid(f"{key} {about}", given[key]) for key in ("src_bbox", "tgt_bbox")
    )
    if origin == "target" and (source is not None or target is None):
        raise InputError(f"what is new {about}: from target needs tgt_bbox and has no src_bbox")
    if origin != "target" and source is None:
        raise InputError(f"src_bbox {about} must be its box in {origin}, got None")
    return Row(name, desc, None, origin, source, target)


def _on_grid(what: str, given: Any) -> Corners:
    """Coordinates from 0 to 1 on the grid of 0 to 1000."""
    values = several(what, given, "y_min, x_min, y_max, x_max")
    y1, x1, y2, x2 = (round(float(check_number(what, value, 0, 1)) * GRID) for value in values)
    if y2 <= y1 or x2 <= x1:
        raise InputError(
            f"{what} must have y_min < y_max and x_min < x_max by a thousandth or more, got {shown(given)}"
        )
    return y1, x1, y2, x2


def request(prompt: str, boxes: Sequence[Mapping[str, Any] | Row] = (), canvas: tuple[int, int] | None = None) -> str:
    """What FLUX.3's prompt upsampler is asked.

    Args:
        prompt: what the user wants.
        boxes: what the answer must keep, see `rows_of`.
        canvas: width and height of the picture, or their ratio; written as given.

    Raises:
        InputError: see `rows_of`; or the canvas is not two whole numbers of at least 1.
    """
    prompt, rows = repaired("the prompt", prompt), rows_of(boxes)
    if canvas is not None:
        width, height = (whole("canvas", side, 1) for side in several("canvas", canvas, "width, height"))
        prompt = f"TARGET CANVAS: {width}:{height}\n{prompt}"
    return REQUEST.format(prompt=prompt.strip(), rows=_json(rows)) if rows else prompt


def parsed(answer: str, boxes: Sequence[Mapping[str, Any] | Row] = ()) -> Layout:
    """What the upsampler answered, with the user's boxes put back.

    Where a row of the answer has a box that is nearly the user's (intersection over union of 0.9 or more) and the
    user's id is not there, it takes that id, also in the caption. The user's rows come first and are as they were
    given, but for `desc`, which the answer may write anew. Other rows follow if the caption names them and they are
    sound.

    Args:
        answer: a paragraph, and the JSON array that ends it, if there is one.
        boxes: what was given to `request`.

    Raises:
        InputError: see `rows_of`; or the answer is no text.
    """
    locked, (caption, found) = rows_of(boxes), _split(repaired("the answer", answer))
    named = [row for row in found if isinstance(row, dict)]
    renamed = dict(_renamed(named, locked))
    named = [{**row, "id": _id(row, renamed)} for row in named]
    for old, new in renamed.items():
        caption = caption.replace(f"<{old}>", f"<{new}>")
    written = {row["id"]: row.get("desc") for row in named if row["id"] is not None}
    rows = {row.id: replace(row, desc=_said(written.get(row.id)) or row.desc) for row in locked}
    for about in named:
        row = _sound(about)
        if row is not None and row.id not in rows and f"<{row.id}>" in caption:
            rows[row.id] = row
    return Layout(caption, tuple(rows.values()))


def _split(answer: str) -> tuple[str, list[Any]]:
    """The paragraph, and the items of the JSON array that ends the text: the shortest end of it that is one."""
    start = answer.rfind("[")
    while start >= 0 and answer.rstrip().endswith("]"):
        try:
            return answer[:start].rstrip(), json.loads(answer[start:])
        except (ValueError, RecursionError):
            start = answer.rfind("[", 0, start)
    return answer.strip(), []


def _id(row: Mapping[str, Any], renamed: Mapping[str, str]) -> str | None:
    """A row's id; None if it is no text."""
    return renamed.get(row["id"], row["id"]) if isinstance(row.get("id"), str) else None


def _renamed(found: Sequence[Mapping[str, Any]], locked: Sequence[Row]) -> Iterator[tuple[str, str]]:
    """Ids of the answer, each with that of the user's row whose box it has nearly."""
    taken, ours = {_id(row, {}) for row in found}, {row.id for row in locked}
    used: set[str] = set()
    for lock in locked:
        for row in found if lock.id not in taken else ():
            name = _id(row, {})
            box = _corners(row.get("bbox") or row.get("tgt_bbox") or row.get("src_bbox"))
            if name is None or name in used | ours or box is None or lock.box is None or iou(box, lock.box) < SAME:
                continue
            used.add(name)
            yield name, lock.id
            break


def _sound(about: Mapping[str, Any]) -> Row | None:
    """A row that the answer added, or None if it is not as rows are."""
    name, desc, origin = about["id"], _said(about.get("desc")), about.get("from")
    if name is None or not ID.fullmatch(name) or not desc:
        return None
    if box := _corners(about.get("bbox")):
        return Row(name, desc, box)
    source, target = (_corners(about.get(key)) for key in ("src_bbox", "tgt_bbox"))
    damaged = any(about.get(key) is not None and _corners(about[key]) is None for key in ("src_bbox", "tgt_bbox"))
    if not isinstance(origin, str) or not ORIGIN.fullmatch(origin) or damaged or not (source or target):
        return None
    return Row(name, desc, None, origin, source, target) if (origin == "target") == (source is None) else None


def _said(text: Any) -> str:
    return text.strip() if isinstance(text, str) else ""


def _corners(given: Any) -> Corners | None:
    """A box on the grid as an answer may have it, or None. One within 0 to 1 is not on the grid."""
    if not isinstance(given, (list, tuple)) or len(given) != 4 or not all(map(finite, given)):
        return None
    y1, x1, y2, x2 = given
    return (y1, x1, y2, x2) if 0 <= y1 < y2 <= GRID and 0 <= x1 < x2 <= GRID and max(given) > 1 else None


def iou(a: Corners, b: Corners) -> float:
    """Intersection over union of two boxes."""
    height, width = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(0, height) * max(0, width)
    either = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both
    return both / either if either > 0 else 0.0


def _list(box: Corners | None) -> list[float] | None:
    return None if box is None else list(box)


def _json(rows: Sequence[Row]) -> str:
    return json.dumps([row.as_json() for row in rows], ensure_ascii=False)
