"""Models with the same tensors, told apart by the header, the beginning of a file's name, or a pipeline's index: kept
when a file is converted, and said where nothing tells."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

import miniflux
from miniflux.checkpoints import convert, open_tensors
from miniflux.variants import variant
from miniflux.weights.which import MODEL, which
from tests.small_models import model

BASE, KLEIN = variant("flux2-klein-base-4b"), variant("flux2-klein-4b")


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("flux-2-klein-base-4b.safetensors", "flux2-klein-base-4b"),
        ("flux-2-klein-base-4b-fp8.safetensors", "flux2-klein-base-4b"),
        ("FLUX-2-klein-base-4B-Q4_K_M.gguf", "flux2-klein-base-4b"),
        ("flux2-klein-base-4b.safetensors", "flux2-klein-base-4b"),
        ("flux-2-klein-4b_mine.safetensors", "flux2-klein-4b"),
        ("flux-2-klein-base-4bit.safetensors", None),
        ("mine.safetensors", None),
    ],
)
def test_the_beginning_of_a_name_tells(file: str, name: str | None, tmp_path: Path) -> None:
    found = which(BASE.transformer, {}, file, tmp_path)
    assert found.told == (name is not None) and found.variant.name == (name or "flux2-klein-4b")


def test_the_longest_name_is_meant(tmp_path: Path) -> None:
    """flux-2-klein-9b begins flux-2-klein-9b-kv."""
    config = variant("flux2-klein-9b").transformer
    for file, name in (
        ("flux-2-klein-9b-kv-fp8.safetensors", "flux2-klein-9b-kv"),
        ("flux-2-klein-9b.gguf", "flux2-klein-9b"),
    ):
        assert which(config, {}, file, tmp_path).variant.name == name


def test_a_header_comes_before_a_name_and_a_name_before_an_index(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"is_distilled": False}))
    with caplog.at_level(logging.WARNING):
        for told, file, name in (
            ({MODEL: KLEIN.name}, BASE.file, KLEIN.name),
            ({MODEL: "flux1-dev"}, KLEIN.file, KLEIN.name),  # of other tensors: passed over
            ({}, KLEIN.file, KLEIN.name),
            ({}, "mine.safetensors", BASE.name),
        ):
            found = which(BASE.transformer, told, file, tmp_path)
            found.warn(tmp_path)
            assert found.variant.name == name and found.told and not caplog.text
        (tmp_path / "model_index.json").unlink()
        which(BASE.transformer, {}, "mine.safetensors", tmp_path).warn(tmp_path)
    assert "taken for flux2-klein-4b; flux2-klein-base-4b has the same tensors" in caplog.text


@pytest.mark.parametrize("name", ["flux2-klein-base-4b", "flux2-klein-9b-kv"])
@pytest.mark.parametrize("made", ["made.safetensors", "made.gguf", "folder", "diffusers"])
def test_what_is_converted_stays_what_it_is(
    name: str, made: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Into a file of another format, and a whole model into a folder: drawn with as before, nothing is guessed."""
    source = model(tmp_path / "source", name)
    before = miniflux.load(source, device="cpu")
    assert (before.variant.cfg, before.variant.once) == (variant(name).cfg, variant(name).once)
    whole, target = made in ("folder", "diffusers"), tmp_path / made
    options = {"layout": "diffusers"} if made == "diffusers" else {"format": "q8_0" if made.endswith("gguf") else "fp8"}
    with caplog.at_level(logging.WARNING):
        convert(source if whole else source / variant(name).file, target, **options)
        after = miniflux.load(target, weights=source, device="cpu")
    assert (after.variant.cfg, after.variant.once) == (before.variant.cfg, before.variant.once)
    assert "taken for" not in caplog.text


def test_a_guess_is_said_when_a_model_is_loaded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = model(tmp_path / "source", BASE.name)
    mine = (folder / BASE.file).rename(folder / "mine.safetensors")
    with caplog.at_level(logging.WARNING):
        assert miniflux.load(mine, device="cpu").variant.cfg is None
    assert "taken for flux2-klein-4b" in caplog.text and MODEL not in open_tensors(mine).metadata
