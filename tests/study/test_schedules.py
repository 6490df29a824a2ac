"""Schedules side by side, as tables and as a figure."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from miniflux.errors import InputError, OutputError
from miniflux.sampling import flux1_schedule
from miniflux.study import schedules


def test_named_schedules_are_those_of_sampling() -> None:
    """The shift is FLUX.1 dev's for the size, unless a static one is given."""
    (levels,) = schedules.schedules(["uniform"], 6, 1024, 768)
    assert list(levels) == pytest.approx(flux1_schedule(6, 64 * 48), abs=1e-15)
    (levels,) = schedules.schedules(["uniform"], 4, 1024, 768, shift=1.0)
    assert list(levels) == [1, 0.75, 0.5, 0.25, 0]


def test_a_figure_with_every_schedule(tmp_path: Path) -> None:
    """The file is a picture, and nothing else is left."""
    made = schedules.schedules(list(schedules.SPACINGS), 8, 512, 512)
    path = schedules.plot(made, tmp_path / "levels.png")
    assert Image.open(path).size[0] > 400
    assert [file.name for file in tmp_path.iterdir()] == ["levels.png"]


def test_bad_input_is_refused(tmp_path: Path) -> None:
    """Names, endings and folders."""
    with pytest.raises(InputError, match="'squared'; known: uniform"):
        schedules.schedules(["squared"], 4, 512, 512)
    made = schedules.schedules(["uniform"], 4, 512, 512)
    with pytest.raises(OutputError, match=r"\.gif"):
        schedules.plot(made, tmp_path / "levels.gif")
    with pytest.raises(OutputError, match="does not exist"):
        schedules.plot(made, tmp_path / "no" / "levels.png")
