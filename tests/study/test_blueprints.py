"""Drawings of architectures: well-formed, and with the numbers of the modules."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from miniflux import study
from miniflux.checkpoints.loading import bare
from miniflux.checkpoints.networks import BY_CONFIG
from miniflux.errors import InputError, OutputError
from miniflux.models.flux1 import Flux1
from miniflux.testing import tiny
from miniflux.variants import VARIANTS
from tests.tiny import FLUX1

IMAGES = Path(__file__).parents[2] / "docs" / "images"
DRAWN = ("flux1-dev", "flux2-dev", "flux2-klein-4b", "flux3-klein")


def network_of(name: str) -> Any:
    config = VARIANTS[name].transformer
    return bare(BY_CONFIG[type(config)].kind, config)


@pytest.mark.parametrize("name", VARIANTS)
def test_numbers_are_those_of_the_modules(name: str) -> None:
    """Every box says whose parameters it counts; bars and boxes are all there is; block lists with their lengths."""
    network, text = network_of(name), study.blueprint(name)
    root = ElementTree.fromstring(text)
    sizes = {key: parameter.numel() for key, parameter in network.named_parameters()}

    def count(parts: str) -> int:
        return sum(n for key, n in sizes.items() if any(key.startswith(f"{part}.") for part in parts.split()))

    boxes = {one.get("data-of"): int(one.get("data-parameters", 0)) for one in root.iter() if one.get("data-of")}
    shares = {one.get("data-share"): int(one.get("data-parameters", 0)) for one in root.iter() if one.get("data-share")}
    for found in (boxes, shares):
        assert all(number == count(str(parts)) > 0 for parts, number in found.items())
        assert sum(found.values()) == sum(sizes.values())  # nothing is left out, and nothing is there twice
    words = [one.text or "" for one in root.iter() if one.tag.endswith("text")]
    config = network.config
    assert any(f"hidden size {config.hidden_size:,}, {config.num_heads} heads" in word for word in words)
    lists = {block.rpartition(".")[0] for block in config.blocks}
    assert {word.partition(" \u00d7 ")[2] for word in words if " \u00d7 " in word} == lists
    for word in words:
        if " \u00d7 " in word:
            number, _, where = word.partition(" \u00d7 ")
            assert int(number) == len(network.get_submodule(where))


def test_shared_modulations_are_drawn_where_there_are_some() -> None:
    assert "shared by" not in study.blueprint("flux1-dev")
    assert len(re.findall("shared by", study.blueprint("flux2-dev"))) == 2
    assert "guidance_in" in study.blueprint("flux2-dev") and "guidance_in" not in study.blueprint("flux2-klein-4b")
    assert "reference tokens" in study.blueprint("flux3-klein")


def test_drawings_of_the_documents_are_up_to_date() -> None:
    for name in DRAWN:
        assert (IMAGES / f"architecture-{name}.svg").read_text("utf-8") == study.blueprint(name)


def test_of_what(tmp_path: Path) -> None:
    """Pipelines and networks; a file is written, and only as SVG."""
    pipe = tiny("flux3-klein")
    assert study.blueprint(pipe, tmp_path / "a.svg") == (tmp_path / "a.svg").read_text("utf-8")
    assert "Flux1: FLUX.1" in study.blueprint(bare(Flux1, FLUX1))
    with pytest.raises(InputError, match="unknown model 'flux9'"):
        study.blueprint("flux9")
    with pytest.raises(OutputError, match=r"written as \.svg"):
        study.blueprint("nano", tmp_path / "a.png")
