"""Named points: all of them are there, have the shapes that they say, and cost nothing."""

from __future__ import annotations

import pytest

import miniflux
from miniflux import study
from miniflux.errors import InputError
from miniflux.study.values.planning import shape_of
from tests.small_models import tiny

VARIANTS = ("flux1-dev", "flux2-dev", "flux2-klein-4b", "flux3-klein")


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_block_has_its_points(variant: str) -> None:
    pipe = tiny(variant)
    points = study.points(pipe)
    assert len(points.names) == len(set(points.names))
    for block in pipe.transformer.config.blocks:
        inside = {point.name.removeprefix(f"{block}.") for point in points if point.block == block}
        assert {"q", "k", "v", "q_rope", "k_rope", "attn_weights", "z"} <= inside
        if block.startswith("double_blocks"):
            sides = {f"{s}_{what}" for s in ("img", "txt") for what in ("in", "norm1.out", "norm2.out", "out")}
            sides |= {f"{s}_attn.{what}" for s in ("img", "txt") for what in ("q_raw", "k_raw", "proj.out", "qkv.out")}
            sides |= {f"{s}_mlp.{what}" for s in ("img", "txt") for what in ("pre", "post", "out")}
            assert sides <= inside
        else:
            assert {"in", "pre_norm.out", "q_raw", "k_raw", "mlp.pre", "mlp.post", "out"} <= inside
    for kind in ("shift", "scale", "gate"):
        assert [name for name in points.names if name.endswith(kind)]
    networks = {point.network for point in points}
    assert networks == {"transformer", "autoencoder", *pipe.text.networks}


@pytest.mark.parametrize("variant", VARIANTS)
def test_values_have_the_shapes_that_points_say(variant: str) -> None:
    pipe = tiny(variant)
    points = study.points(pipe)
    with study.capture(pipe, "**") as seen:
        pipe.generate("a red circle", steps=1, width=64, height=32)
    latent = {"h": 32 // 8, "w": 64 // 8}
    text = seen.get("txt_in.out").shape[0]
    parts = {"text": text, "image": 4 * 2, "reference": 0}
    kept = {record.point: record for record in seen.records}
    for point in points:
        if point.only_with_references or ".encoder.conv" in point.name or ".encoder.down" in point.name:
            assert point.name not in kept or not point.only_with_references
            continue
        if point.name not in kept:
            assert point.name.startswith("autoencoder.encoder.")
            continue
        value = seen.value(kept[point.name])
        sizes = {**points.sizes.get(point.network, {}), **latent}
        if point.network in pipe.text.networks and point.tokens:
            here = {**parts, "text": value.shape[point.tokens_axis - 1]}  # type: ignore
            assert tuple(value.shape) == shape_of(point, sizes, here), point
        else:
            assert tuple(value.shape) == shape_of(point, sizes, parts), point


def test_patterns() -> None:
    points = study.points(tiny("flux1-dev"))
    assert points.select("double_blocks.*.img_out").names == ["double_blocks.0.img_out", "double_blocks.1.img_out"]
    assert points.select(["single_blocks.1.out", "double_blocks.0.txt_in"]).names == [
        "double_blocks.0.txt_in",
        "single_blocks.1.out",
    ]  # in the order in which they are computed
    assert "double_blocks.0.img_mlp.out" in points.select("double_blocks.**.out").names
    assert "double_blocks.0.img_mlp.out" not in points.select("double_blocks.*.*").names
    assert points["final_layer.out"].shape == ("B", "L", "out")
    assert [point.name for point in points[:2]] == points.names[:2]


def test_printed() -> None:
    text = str(study.points(tiny("flux1-dev")))
    assert "double_blocks.0-1.img_out" in text and "(B, L, hidden)" in text and "hidden 64" in text
    assert len(text.splitlines()) < len(study.points(tiny("flux1-dev")))  # blocks that are alike are one row


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("double_blocks.0.img_outt", "double_blocks.0.img_out"),
        ("double_block.0.img_out", "double_blocks.0.img_out"),
        ("double_blocks.*.nothing", "no point"),
        (3, "given by its name"),
        ([], "at least one name"),
    ],
)
def test_unknown_names_are_refused(name: object, said: str) -> None:
    with pytest.raises(InputError, match=said):
        study.points(tiny("flux1-dev")).select(name)  # type: ignore


def test_networks_are_what_they_were() -> None:
    """Listing points, capturing and editing leave nothing behind."""
    pipe = miniflux.load("nano")
    networks = [pipe.transformer, pipe.autoencoder, *pipe.text.networks.values()]

    def hooks() -> int:
        modules = [module for network in networks for module in network.modules()]
        return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules)

    study.points(pipe)
    assert hooks() == 0
    with study.capture(pipe, "**"):
        assert hooks() > 100
        assert pipe.changed() == ()
    assert hooks() == 0
    with pytest.raises(RuntimeError, match="mine"), study.edit(pipe, {"single_blocks.0.out": study.scale(2)}):
        raise RuntimeError("mine")
    assert hooks() == 0
