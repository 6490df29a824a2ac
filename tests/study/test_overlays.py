"""Pictures of maps, and how maps are scored: arithmetic on numbers made up, files read back, short runs on nano."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import miniflux
from miniflux.apps.cli import main
from miniflux.errors import InputError, OutputError
from miniflux.nano import scenes
from miniflux.result import Result
from miniflux.study.mapping import overlays, scoring
from miniflux.study.mapping.attention import attention_maps
from miniflux.study.mapping.maps import Maps
from miniflux.study.mapping.scoring import Candidate

FAR = overlays.HEAT[-1][1]
NEAR = overlays.HEAT[0][1]


def maps(on: int = 0) -> Maps:
    """Two names, two steps, three blocks, 2 x 3 places; a picture of 48 x 32."""
    values = np.random.default_rng(0).random((2, 2, 3, 1, 2, 3)).astype(np.float32)
    result = Result([Image.new("RGB", (48, 32), "white")], torch.zeros(1, 1, 4, 6), [{}])
    names = ("double_blocks.0", "single_blocks.0", "single_blocks.1")
    return Maps("attention", ("circle", "red"), (0, 4), names, (), values, result, (48, 32), on)


def test_a_map_is_spread_from_0_to_1() -> None:
    values = np.array([[0.0, 1.0], [2.0, np.nan]], np.float32)
    np.testing.assert_allclose(overlays.spread(values, high=2.0), [[0, 0.5], [1, 0]])
    np.testing.assert_allclose(overlays.spread(values, low=1.0, high=4.0), [[0, 0], [1 / 3, 0]])
    assert not overlays.spread(np.full((3, 3), 7.0, np.float32)).any()
    assert not overlays.spread(np.full((3, 3), np.nan, np.float32)).any()


def test_one_outlier_leaves_the_others_light() -> None:
    """A place a thousand times as bright as the rest: the rest is still seen."""
    values = np.linspace(0, 1, 400, dtype=np.float32).reshape(20, 20)
    values[3, 3] = 1000
    assert np.median(overlays.spread(values)) > 0.4


def test_an_overlay_shows_its_map() -> None:
    """Wide pictures too: the bright place of the map is the bright corner; the rest is the picture in grey."""
    image = Image.new("RGB", (64, 32), (200, 30, 30))
    values = np.zeros((2, 4), np.float32)
    values[0, 0] = 1
    shown = overlays.overlay(image, values, opacity=1, high=1.0)
    assert shown.size == (64, 32)
    assert shown.getpixel((2, 2)) == FAR and shown.getpixel((60, 30)) == NEAR
    grey = image.convert("L").getpixel((0, 0))
    assert overlays.overlay(image, values, opacity=0).getpixel((2, 2)) == (grey,) * 3
    with pytest.raises(InputError, match="opacity"):
        overlays.overlay(image, values, opacity=1.5)


def test_a_picture_that_is_the_middle_of_its_canvas() -> None:
    """What is cut off the picture is cut off the map."""
    values = np.zeros((2, 2), np.float32)
    values[:, 1] = 1
    shown = overlays.overlay(Image.new("RGB", (20, 32)), values, opacity=1, canvas=(32, 32), high=1.0)
    whole = overlays.overlay(Image.new("RGB", (32, 32)), values, opacity=1, high=1.0)
    assert shown.size == (20, 32) and shown.tobytes() == whole.crop((6, 0, 26, 32)).tobytes()


@pytest.mark.parametrize(("by", "cells"), [("step", (2, 1)), ("block", (2, 2)), ("both", (2, 3))])
def test_sheets(by: Any, cells: tuple[int, int]) -> None:
    """A cell for every step, every block, or each pair of them, and a line of text under each."""
    across, down = overlays.CELL + overlays.GAP, round(overlays.CELL * 2 / 3) + overlays.LABEL + overlays.GAP
    made = overlays.grid(maps(), "circle", by)
    assert made.size == (cells[0] * across + overlays.GAP, cells[1] * down + overlays.GAP)
    assert overlays.grid(maps(), "circle", by, scale="all").tobytes() != made.tobytes()
    assert overlays.words_picture(maps()).width == 3 * across + overlays.GAP


@pytest.mark.parametrize("ending", ["gif", "webp"])
def test_animations(ending: str, tmp_path: Path) -> None:
    """A frame for every step, or every block; the last stays longer."""
    for by, count in (("step", 2), ("block", 3)):
        path = overlays.animation(maps(), "red", tmp_path / f"{by}.{ending}", by, milliseconds=100)  # type: ignore[arg-type]
        with Image.open(path) as film:
            assert getattr(film, "n_frames") == count  # noqa: B009
            times: list[int] = []
            for i in range(count):
                film.seek(i)
                film.load()
                times.append(int(film.info["duration"]))
        assert times == [100] * (count - 1) + [400]


def test_pictures_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="'.png'"):
        overlays.animation(maps(), "red", tmp_path / "x.png")
    with pytest.raises(InputError, match="'both'"):
        overlays.animation(maps(), "red", tmp_path / "x.gif", "both")
    with pytest.raises(InputError, match="by must be one of"):
        overlays.grid(maps(), "red", "head")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="scale must be one of"):
        overlays.grid(maps(), "red", scale="some")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="columns"):
        overlays.grid(maps(), "red", "both", columns=2)
    with pytest.raises(InputError, match="no name 'blue'"):
        overlays.map_picture(maps(), "blue")
    with pytest.raises(InputError, match="give it as image"):
        overlays.map_picture(maps(on=1), "red")
    assert overlays.map_picture(maps(on=1), "red", Image.new("RGB", (48, 32))).size == (48, 32)


def test_contrast_is_what_others_have_not() -> None:
    both = maps()
    np.testing.assert_allclose(both.contrast("red"), both["red"] - both["circle"], atol=1e-6)
    assert both.contrast("red", steps=[4], blocks=["single_blocks.1"]).shape == (2, 3)
    alone = Maps(both.kind, ("red",), both.steps, both.blocks, (), both.values[:1], both.result, both.canvas)
    with pytest.raises(InputError, match="only 'red'"):
        alone.contrast("red")


def test_thresholds() -> None:
    """Otsu's is the best of all cuts, tried one by one; half is half."""
    values = np.concatenate([np.random.default_rng(1).normal(m, 1, n) for m, n in ((0, 300), (8, 60))]).astype(
        np.float32
    )

    def apart(cut: float) -> float:
        low, high = values[values <= cut], values[values > cut]
        return len(low) * len(high) * float(high.mean() - low.mean()) ** 2

    best = max(apart(cut) for cut in np.sort(values)[1:-1])
    assert apart(scoring.otsu(values)) >= 0.99 * best
    assert scoring.otsu(np.full(9, 3.0, np.float32)) == 3
    assert scoring.half(np.array([0, 1, 1, 5], np.float32)) == 3


def test_truth_is_found_by_colour() -> None:
    """Each object of a drawn scene, where it was drawn; and the overlap of masks by hand."""
    for scene in scoring.unseen(6):
        image = scenes.render(scene, 128, 128)
        for i, shape in enumerate(scene.shapes):
            drawn = np.asarray(scenes.mask(shape, 128, 128)) > 127
            assert scoring.iou(scoring.where(image, scene, i), drawn) > 0.95
    a, b = np.array([[True, True, False]]), np.array([[False, True, True]])
    assert scoring.iou(a, b) == pytest.approx(1 / 3) and scoring.iou(a, a) == 1
    assert len({scene.caption for scene in scoring.unseen(100)}) > 95


def test_scores_on_nano() -> None:
    """The documented map finds at least half of the object; the table says what a map made by hand has."""
    pipe = miniflux.load("nano3")
    chosen = Candidate("image_to_text", "red circle", "map", "single_blocks", "last quarter")
    scores = scoring.measure(pipe, 4, [chosen])
    assert scores.each[0].means["half"] >= 0.5 and scores.perfect["half"] > 0.6 and scores.right == 4
    assert "image_to_text, 'red circle', single_blocks, last quarter" in str(scores)
    ious: list[float] = []
    for i, scene in enumerate(scoring.unseen(4)):
        name = f"{scene.shapes[0].colour} {scene.shapes[0].kind}"
        seen = attention_maps(pipe, scene.caption, [name], at_steps=[3], seed=i)
        found = scoring.inside(seen[name], *seen.image.size)
        ious.append(scoring.iou(found, scoring.where(seen.image, scene)))
    assert scores.each[0].means["half"] == pytest.approx(np.mean(ious), abs=1e-3)
    with pytest.raises(InputError, match="at least one candidate"):
        scoring.measure(pipe, 1, [])
    with pytest.raises(InputError, match="prompts must be"):
        scoring.measure(pipe, 0)
    names = [str(one) for one in scoring.candidates(pipe)]
    assert len(set(names)) == len(names)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A picture, a film and numbers; and what does not go together is said before anything is drawn."""
    out, film, raw = (str(tmp_path / name) for name in ("map.png", "map.gif", "map.npz"))
    common = ["--model", "nano3", "--steps", "2", "--size", "64"]
    prompt = "a red circle on a blue background"
    assert (
        main(["study", "map", prompt, "--word", "circle", "-o", out, "--animation", film, "--raw", raw, *common]) == 0
    )
    assert Image.open(out).width > 2 * overlays.CELL and getattr(Image.open(film), "n_frames") == 2  # noqa: B009
    assert np.load(raw)["names"].tolist() == ["circle"]
    assert "circle" in capsys.readouterr().out
    concept = ["--concept", "sky", "--concept", "circle", "--block", "single_blocks.1", "--at", "1", "--pieces", "all"]
    assert main(["study", "map", prompt, *concept, "-o", str(tmp_path / "c.png"), *common]) == 0
    assert main(["study", "map", prompt, "--word", "red", "--by", "both", "-o", str(tmp_path / "b.png"), *common]) == 0
    for words, said in (
        ([], "--word or --concept"),
        (["--word", "red", "--concept", "sky"], "one of the two"),
        (["--word", "star"], "'star' is not in the prompt"),
        (["--word", "red", "--space", "output"], "--space is for --concept"),
        (["--word", "red", "--word", "blue", "--by", "step"], "show one map"),
        (["--word", "red", "--by", "both", "--animation", film], "no order"),
        (["--word", "red", "-o", "x.tiff"], "'.tiff'"),
        (["--word", "red", "--animation", "x.png"], "'.png'"),
    ):
        assert main(["study", "map", prompt, *words, *common]) == 2, words
        assert said in capsys.readouterr().err
    assert main(["study", "iou", "--model", "nano3", "--prompts", "0"]) == 2
