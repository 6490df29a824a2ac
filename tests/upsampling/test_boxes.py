"""Boxes of FLUX.3 against the functions of diffusers, and what holds for all of them."""

from __future__ import annotations

import json
from copy import deepcopy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miniflux.errors import InputError
from miniflux.upsampling.boxes import Layout, Row, iou, parsed, request, rows_of

CAT = {"id": "cat_1", "desc": "a grey cat", "bbox": [0.1, 0.2, 0.55, 0.6004]}
MOVED = {"id": "cup_1", "desc": "", "from": "ref_image_0", "src_bbox": [0, 0, 0.5, 0.5], "tgt_bbox": [0.5, 0.5, 1, 1]}
ADDED = {"id": "hat_1", "desc": "a hat", "from": "target", "src_bbox": None, "tgt_bbox": [0.1, 0.1, 0.3, 0.3]}
GONE = {"id": "van_1", "desc": "", "from": "ref_image_12", "src_bbox": [0.1, 0.1, 0.3, 0.3], "tgt_bbox": None}


def peer() -> Any:
    """The module of diffusers; that of transformers which it needs may be too old."""
    pytest.importorskip("diffusers")
    return pytest.importorskip("diffusers.modular_pipelines.flux3.prompt_upsampler", exc_type=ImportError)


# Strategies: coordinates of users, boxes of answers near them or anywhere, rows sound and unsound.
UNIT = st.integers(0, 10_000).map(lambda n: n / 10_000)
IDS = st.sampled_from(["cat_1", "dog_2", "En_Text_1", "cup_1", "x", "new_1", "new_2", "7up", "a b", ""])
DESCS = st.sampled_from(["", " a thing ", 'caf\u00e9 "quoted" \\n [1]', "x"])


@st.composite
def unit_box(draw: st.DrawFn) -> list[float]:
    y, x = (sorted(draw(st.lists(UNIT, min_size=2, max_size=2, unique_by=lambda v: round(v * 1000)))) for _ in "yx")
    return [y[0], x[0], y[1], x[1]]


@st.composite
def locked_boxes(draw: st.DrawFn) -> list[dict[str, Any]]:
    names = draw(st.lists(st.sampled_from(["cat_1", "dog_2", "En_Text_1", "cup_1", "x"]), unique=True, min_size=1))
    if draw(st.booleans()):
        return [{"id": name, "desc": draw(DESCS), "bbox": draw(unit_box())} for name in names]
    rows: list[dict[str, Any]] = []
    for name in names:
        origin = draw(st.sampled_from(["target", "ref_image_0", "ref_image_3"]))
        source = None if origin == "target" else draw(unit_box())
        target = draw(unit_box()) if source is None or draw(st.booleans()) else None
        rows.append({"id": name, "desc": draw(DESCS), "from": origin, "src_bbox": source, "tgt_bbox": target})
    return rows


NUMBERS = st.one_of(
    st.integers(-5, 1100), st.floats(-1, 1100), st.sampled_from([0, 1, 1000, True, None, "3", float("nan")])
)
ANY_BOX = st.one_of(
    st.lists(NUMBERS, min_size=3, max_size=5),
    st.tuples(st.integers(0, 500), st.integers(0, 500), st.integers(501, 1000), st.integers(501, 1000)).map(list),
    st.sampled_from([None, "no", {}, [0, 0, 1, 1], [0, 0, 1000, 1000], [5, 5, 5, 9]]),
)


@st.composite
def answers(draw: st.DrawFn, locked: list[dict[str, Any]]) -> str:
    """A caption and an array whose boxes are the user's, near them, or anything."""
    ours = [row[key] for row in locked for key in ("bbox", "src_bbox", "tgt_bbox") if row.get(key)]
    near = st.tuples(st.sampled_from(ours), st.lists(st.integers(-30, 30), min_size=4, max_size=4)).map(
        lambda pair: [round(v * 1000) + d for v, d in zip(*pair, strict=True)]
    )
    boxes = st.one_of(near, ANY_BOX)
    row = st.fixed_dictionaries(
        {"id": IDS},
        optional={
            "desc": st.one_of(DESCS, st.none(), st.just(3)),
            "bbox": boxes,
            "from": st.sampled_from(["target", "ref_image_0", "ref_image_x", None, 4]),
            "src_bbox": boxes,
            "tgt_bbox": boxes,
            "more": st.just(1),
        },
    )
    rows = draw(st.lists(st.one_of(row, st.sampled_from([3, "no", None])), max_size=6))
    words = draw(st.lists(st.one_of(IDS.map(lambda name: f"<{name}>"), st.sampled_from(["a", "[b]", "<", "["]))))
    end = draw(st.sampled_from([json.dumps(rows), json.dumps(rows, ensure_ascii=False) + "\n", "", "]", "[1, 2"]))
    return " ".join(words) + draw(st.sampled_from([" ", "", "\n\n"])) + end


@given(locked_boxes(), st.text(st.characters(exclude_categories=["Cs"])))
def test_requests_equal_diffusers(boxes: list[dict[str, Any]], prompt: str) -> None:
    module = peer()
    expected = module.boxes_to_canvas(boxes)
    assert [row.as_json() for row in rows_of(boxes)] == expected
    assert request(prompt, boxes) == module.format_layout_request(prompt, expected)


@given(st.data())
def test_answers_equal_diffusers(data: st.DataObject) -> None:
    """The whole text, with the boxes of the user put back."""
    module, boxes = peer(), data.draw(locked_boxes())
    answer = data.draw(answers(boxes))
    assert parsed(answer, boxes).text == module.reconcile_boxes(answer, module.boxes_to_canvas(boxes))


@given(ANY_BOX, ANY_BOX)
def test_boxes_and_overlaps_equal_diffusers(a: Any, b: Any) -> None:
    module = peer()
    valid = [module.valid_canvas_box(box) for box in (a, b)]
    for box, expected in zip((a, b), valid, strict=True):
        rows = [{"id": "a", "desc": "d", "bbox": box}]
        found = parsed(f"<a> {json.dumps(rows)}").rows
        assert [list(row.bbox or ()) for row in found] == ([] if expected is None else [expected])
    if all(box is not None for box in valid):
        assert iou(valid[0], valid[1]) == module.box_iou(*valid) == iou(valid[1], valid[0])


@given(locked_boxes())
def test_an_answer_that_keeps_all_is_kept(boxes: list[dict[str, Any]]) -> None:
    """There and back: rows of a layout are what its text is parsed to, with and without the user's boxes."""
    before, rows = deepcopy(boxes), rows_of(boxes)
    told = tuple(Row(r.id, r.desc.strip() or "d", r.bbox, r.origin, r.src_bbox, r.tgt_bbox) for r in rows)
    layout = Layout(" and ".join(f"a <{row.id}>" for row in rows), told)
    assert parsed(layout.text, boxes) == layout and boxes == before
    assert parsed(layout.text, rows) == layout and rows_of(rows) == rows
    assert layout.cited == tuple(row.id for row in rows)
    if all(max(box) > 1 for row in rows for box in (row.bbox, row.src_bbox, row.tgt_bbox) if box):
        assert parsed(layout.text) == layout


@given(st.data())
def test_the_rows_of_a_user_come_first_and_as_they_were(data: st.DataObject) -> None:
    boxes = data.draw(locked_boxes())
    layout, rows = parsed(data.draw(answers(boxes)), boxes), rows_of(boxes)
    assert [(r.id, r.bbox, r.origin, r.src_bbox, r.tgt_bbox) for r in layout.rows[: len(rows)]] == [
        (r.id, r.bbox, r.origin, r.src_bbox, r.tgt_bbox) for r in rows
    ]
    assert len({row.id for row in layout.rows}) == len(layout.rows)
    assert all(row.id in layout.cited and row.desc for row in layout.rows[len(rows) :])


def test_coordinates_are_rounded_to_thousandths() -> None:
    (row,) = rows_of([CAT])
    assert row == Row("cat_1", "a grey cat", (100, 200, 550, 600)) and row.box == row.bbox
    assert all(type(value) is int for value in row.bbox or ())
    assert rows_of([{"bbox": (0, 0, 1, 1)}, {"desc": "x", "bbox": [0.0, 0.5, 0.001, 1.0]}]) == (
        Row("obj_1", "", (0, 0, 1000, 1000)),
        Row("obj_2", "x", (0, 500, 1, 1000)),
    )
    moved, added, gone = rows_of([MOVED, ADDED, GONE])
    assert moved.box == moved.tgt_bbox and added.src_bbox is None and gone.box == gone.src_bbox
    assert list(moved.as_json()) == ["id", "from", "src_bbox", "tgt_bbox", "desc"]


def test_requests() -> None:
    """A canvas comes first; without boxes the prompt stands as it is."""
    assert request("a cat ") == "a cat "
    assert request("a cat", canvas=(16, 9)) == "TARGET CANVAS: 16:9\na cat"
    text = request(" a {cat}", [CAT], canvas=(1024, 768))
    assert text.startswith("ORIGINAL PROMPT:\nTARGET CANVAS: 1024:768\n a {cat}\n\nLOCKED BOUNDING-BOX ANNOTATIONS (")
    assert text.endswith('\n[{"id": "cat_1", "bbox": [100, 200, 550, 600], "desc": "a grey cat"}]')


def test_answers() -> None:
    """Renamed where it is nearly the user's box, written anew, added where it is named, and left out."""
    rows = [
        {"id": "animal_3", "bbox": [101, 200, 550, 600], "desc": "a fluffy grey cat"},
        {"id": "mat_1", "bbox": [500, 0, 1000, 1000], "desc": " a mat "},
        {"id": "unseen_1", "bbox": [0, 0, 10, 10], "desc": "nobody names it"},
    ]
    layout = parsed(f"An <animal_3> on a <mat_1>. {json.dumps(rows)}", [CAT])
    assert layout == Layout(
        "An <cat_1> on a <mat_1>.",
        (Row("cat_1", "a fluffy grey cat", (100, 200, 550, 600)), Row("mat_1", "a mat", (500, 0, 1000, 1000))),
    )
    assert layout.cited == ("cat_1", "mat_1")
    for answer in ("No table.", "No table [1, ", "A list [1, 2]", " Damaged [{]  "):
        assert parsed(answer, [CAT]).rows == rows_of([CAT])
    assert parsed("No table.").text == "No table."


def test_the_overlap_from_which_boxes_are_one() -> None:
    """At 0.9, not under it."""
    for upper, name in ((900, "cat_1"), (899, "b")):
        answer = f'<b> [{{"id": "b", "bbox": [0, 0, {upper}, 1000], "desc": "d"}}]'
        assert parsed(answer, [{"id": "cat_1", "bbox": [0, 0, 1, 1]}]).cited == (name,)


def test_answers_of_strangers_do_not_break_it() -> None:
    """Ids that are no texts, arrays a thousand deep, and a text of brackets."""
    for rows in ([{"id": [1]}], [{"id": None, "bbox": [100, 200, 550, 600]}], [[[]]], [{}]):
        assert parsed(f"x {json.dumps(rows)}", [CAT]) == Layout("x", rows_of([CAT]))
    for answer in ("[" * 5000 + "]" * 5000, "[" * 5000 + "]", "[1e999]", '[{"id": "a", "bbox": [0, 0, 1e999, 9]}]'):
        assert parsed(answer, [CAT]).rows == rows_of([CAT])
    with pytest.raises(InputError, match="half a character"):
        parsed("\ud800")
    with pytest.raises(InputError, match="must be a string"):
        parsed(None)  # type: ignore


@pytest.mark.parametrize(
    ("boxes", "about"),
    [
        ("no", "boxes must be a list"),
        (CAT, "boxes must be a list"),
        ([3], "box 0 must be a mapping"),
        ([{**CAT, "box": 1}], "box 0 has no key 'box'; known: id, desc, bbox"),
        ([{**CAT, "from": "target"}], "has no key 'bbox'"),
        ([{"id": "a"}], r"box 0 \(a\) needs bbox"),
        ([{**CAT, "bbox": None}], "needs bbox"),
        ([{**CAT, "bbox": [0, 0, 1]}], "bbox of box 0 .* must be .y_min, x_min, y_max, x_max"),
        ([{**CAT, "bbox": [0, 0, 1, 1.01]}], "from 0 to 1, got 1.01"),
        ([{**CAT, "bbox": [0, -0.1, 1, 1]}], "from 0 to 1, got -0.1"),
        ([{**CAT, "bbox": [100, 200, 550, 600]}], "from 0 to 1, got 100"),
        ([{**CAT, "bbox": [0, 0, 1, float("nan")]}], "finite"),
        ([{**CAT, "bbox": [0, 0, 1, "1"]}], "finite"),
        ([{**CAT, "bbox": [0.5, 0, 0.2, 1]}], "y_min < y_max"),
        ([{**CAT, "bbox": [0, 0.5, 1, 0.5004]}], "by a thousandth"),
        ([{**CAT, "id": "1cat"}], "id of box 0 must be a letter"),
        ([{**CAT, "id": ""}], "id of box 0"),
        ([{**CAT, "id": 3}], "id of box 0"),
        ([{**CAT, "desc": 3}], "desc of box 0 must be a string"),
        ([{**CAT, "desc": "\ud800"}], "half a character"),
        ([CAT, CAT], "'cat_1' stands in two boxes"),
        ([CAT, ADDED], "these are mixed"),
        ([{**ADDED, "from": "here"}], "from of box 0 .* must be target, or ref_image_0"),
        ([{**ADDED, "from": None}], "from of box 0"),
        ([{**ADDED, "tgt_bbox": None}], "needs tgt_bbox"),
        ([{**ADDED, "src_bbox": [0, 0, 1, 1]}], "has no src_bbox"),
        ([{**MOVED, "src_bbox": None}], "src_bbox of box 0 .cup_1. must be its box in ref_image_0"),
    ],
    ids=repr,
)
def test_bad_boxes_are_refused(boxes: Any, about: str) -> None:
    for call in (lambda: request("a cat", boxes), lambda: parsed("a cat", boxes)):
        with pytest.raises(InputError, match=about):
            call()


@pytest.mark.parametrize("canvas", [(0, 1), (1.5, 1), (1,), "16:9", 3])
def test_bad_canvases_are_refused(canvas: Any) -> None:
    with pytest.raises(InputError, match="canvas"):
        request("a cat", canvas=canvas)
