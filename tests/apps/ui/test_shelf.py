"""Models of one's own on the page: by a path and from a folder; what browsers are told of them; which sizes fit."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from miniflux import disk
from miniflux.apps.cli import main
from miniflux.apps.ui import fitting, form
from miniflux.apps.ui.routes import state_of
from miniflux.apps.ui.site import opened
from miniflux.errors import MinifluxError, OutputError
from miniflux.service import Models
from miniflux.settings import read_picture
from miniflux.variants import VARIANTS
from miniflux.weights.finding import BUNDLED
from tests.apps.ui.test_handlers import ANN, People

PARTS = ("ae.safetensors", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
TUNE = "my tune.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for part in PARTS:
        (root / part).symlink_to(BUNDLED / part)
    shutil.copy(BUNDLED / "flux1-nano-schnell.safetensors", root / TUNE)
    (root / "cut.safetensors").write_bytes(b"no model")
    return root


@pytest.fixture(scope="module")
def people(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[People]:
    with opened(tmp_path_factory.mktemp("site"), shelf=str(folder)) as site:
        yield People(site)


def test_models_of_the_folder_are_in_the_list_and_draw(people: People, folder: Path, tmp_path: Path) -> None:
    """What they cannot use is grey, their pictures are those of the command line, and no path goes to a browser."""
    assert TUNE in people.site.listed and TUNE in [name for name, _ in people.c.model.choices]
    assert people.does("model", model=TUNE)["steps"] == 4
    assert not people.does("model", model=TUNE)["guidance"]["interactive"]
    answer = people.does("draw", model=TUNE, seed="3", width=128, height=128, steps=4, prompt="a red circle")
    assert answer["stage"]["kind"] != "error"
    entry = people.drawn()
    told = json.dumps([state_of(people.site, ANN), form.described(entry.request, people.site.listed[TUNE])])
    assert TUNE in told and str(folder) not in told
    out = tmp_path / "cli.png"
    assert main(["generate", "a red circle", "--model", str(folder / TUNE), "--seed", "3", "-o", str(out)]) == 0
    with Image.open(out) as cli, Image.open(people.site.history.path(ANN, entry.id)) as page:
        assert np.array_equal(np.asarray(cli), np.asarray(page))


def test_settings_of_such_a_picture_choose_the_model_again(people: People, folder: Path) -> None:
    people.does("draw", model=TUNE, seed="4", steps=1)
    entry = people.drawn()
    answer = people.does("files", files=[str(people.site.history.path(ANN, entry.id))])
    assert answer["model"]["value"] == TUNE and answer["stage"]["kind"] == "ok"
    request = read_picture(people.site.history.path(ANN, entry.id)).requests[0]
    elsewhere = fitting.listed_as(f"C:\\models\\{TUNE}", people.site.listed)
    assert request.model == str(folder / TUNE) and elsewhere is not None and elsewhere.name == TUNE
    assert fitting.listed_as("/etc/passwd", people.site.listed) is None


def test_what_cannot_be_used_is_told_on_the_page(people: People) -> None:
    refused = people.c.refused.value
    assert set(refused) == {"cut.safetensors"} and "cut.safetensors" in refused["cut.safetensors"]


def test_file_that_is_new_is_there_when_the_page_is_loaded_again(people: People, folder: Path) -> None:
    """With what fits it; the model that this browser has left chosen is chosen again."""
    try:
        shutil.copy(BUNDLED / "flux1-nano-dev.safetensors", folder / "new.safetensors")
        left = json.dumps({"first": "nano-dev", "model": "new.safetensors", "steps": 150})
        answer = people.does("arrive", kept=left)
        assert "new.safetensors" in answer["model"]["choices"] and answer["model"]["value"] == "new.safetensors"
        assert answer["steps"]["maximum"] == 150 and not answer["loras"][0]["reason"]
        assert people.does("draw", model="new.safetensors", steps=1)["stage"]["kind"] != "error"
        people.drawn()
    finally:
        (folder / "new.safetensors").unlink()
    assert "new.safetensors" not in people.does("arrive", kept="{}").get("model", {}).get("choices", [])
    assert people.does("draw", model="new.safetensors", steps=1)["stage"]["kind"] == "error"


def test_grid_of_models_takes_names_only(people: People, folder: Path) -> None:
    """And says the name beside the pictures, not the path."""
    people.does("draw_grid", model=TUNE, x="model", x_values=f"nano-schnell, {TUNE}", y="", seed="1")
    requests = read_picture(people.site.history.path(ANN, people.drawn().id)).requests
    assert [request.model for request in requests] == ["nano-schnell", str(folder / TUNE)]
    assert people.does("draw_grid", x="model", x_values=str(folder / TUNE))["stage"]["kind"] == "error"


def test_page_begins_with_a_file(folder: Path, tmp_path: Path) -> None:
    with opened(tmp_path, first=str(folder / TUNE)) as site:
        assert site.listed[site.first].path == str(folder / TUNE)
        assert People(site).c.model.value == site.first


@pytest.mark.parametrize("name", ["cut.safetensors", "ae.safetensors", "gone.gguf"])
def test_page_does_not_begin_with_what_is_no_model(folder: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(MinifluxError, match=name), opened(tmp_path, first=str(folder / name)):
        pass


def test_folder_of_models_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MinifluxError, match=r"--models .*no such folder"), opened(tmp_path, shelf=str(tmp_path / "x")):
        pass


def test_sizes_end_where_learning_did(people: People) -> None:
    """Sliders, per model; a size beside them is drawn, and warned about."""
    assert (people.c.width.minimum, people.c.width.maximum) == (64, 192)
    flux = next(model for model in Models().listed() if model.name == "flux1-dev")
    low, high = fitting.sides_of(flux)
    assert (high, low % 16) == (2048, 0) and (high, high // 2) in flux.variant.learned
    assert (low, 2 * low) in flux.variant.learned
    answer = people.does("model", model="nano-schnell")
    assert (answer["width"]["minimum"], answer["height"]["maximum"]) == (64, 192)
    assert str(VARIANTS["nano-schnell"].learned) in answer["aspect"]["info"]
    text = people.does("draw", width=256, height=64, steps=1, seed="1")["stage"]["text"]
    assert "256 × 64" in text and "64 to 192" in text
    people.drawn()
    assert people.does("draw", width=192, height=64, steps=1, seed="1")["stage"]["text"] == ""
    people.drawn()


def test_cache_that_cannot_be_written_to_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(disk.tempfile, "TemporaryFile", refuse)
    with (
        pytest.raises(OutputError, match="no folder for a cache: Read-only file system"),
        opened(tmp_path / "site", cache=str(tmp_path)),
    ):
        pass
