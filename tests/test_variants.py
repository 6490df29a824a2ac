"""The registry of models equals what was published."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from miniflux.arguments import warn_of_result
from miniflux.errors import InputError
from miniflux.nano.recipe import flow
from miniflux.sampling import custom_schedule
from miniflux.variants import ALIASES, VARIANTS, names, variant, variant_of

OFFICIAL = ("flux1-dev", "flux1-schnell", "flux1-krea-dev")


def fields_of(config: Any) -> dict[str, Any]:
    return {key: list(x) if isinstance(x, tuple) else x for key, x in dataclasses.asdict(config).items()}


@pytest.mark.parametrize("name", OFFICIAL)
def test_sizes_and_defaults_are_the_published_ones(name: str, published: dict[str, Any]) -> None:
    """A wrong width loads nothing; a wrong default draws worse pictures, which nobody would trace back."""
    found, expected = VARIANTS[name], published["flux1"][name]
    assert fields_of(found.transformer) == expected["params"]
    assert (found.repository, found.file) == (expected["hf_repo"], expected["file"])
    assert (found.steps, found.guidance) == (expected["steps"], expected["guidance_default"])
    assert (found.t5_length, found.shift) == (expected["t5_max_length"], expected["shift"]["used"])
    assert (found.guidance is None) == (not found.transformer.guidance_embed)
    assert not found.bundled and found.size == 1024


@pytest.mark.parametrize("name", OFFICIAL)
def test_text_encoders_and_autoencoder_are_the_published_ones(name: str, published: dict[str, Any]) -> None:
    """Every field that the published config has and ours has too."""
    chosen, encoders, vae = VARIANTS[name], published["text_encoders"], published["vae"]["flux1-ae"]
    for config, expected, count in [
        (chosen.clip, encoders["clip-l"], 8),
        (chosen.t5, encoders["t5-v1_1-xxl-encoder"], 9),
        (chosen.autoencoder, vae["params"], 8),
    ]:
        ours = fields_of(config)
        shared = ours.keys() & expected.keys()
        assert len(shared) == count and {key: ours[key] for key in shared} == {key: expected[key] for key in shared}
    assert (chosen.clip.eos_token_id, chosen.autoencoder.num_groups) == (encoders["clip-l"]["eos"], vae["norm_groups"])


def test_transformers_that_need_a_picture(published: dict[str, Any]) -> None:
    """Fill, Canny and Depth are told apart by their channels."""
    for name in ("flux1-fill-dev", "flux1-canny-dev", "flux1-depth-dev"):
        assert fields_of(VARIANTS[name].transformer) == published["flux1"][name]["params"]


def test_the_bundled_models_are_small_and_share_their_parts() -> None:
    """Different only in what schnell differs from dev."""
    dev, schnell = VARIANTS["nano-dev"], VARIANTS["nano-schnell"]
    assert (dev.clip, dev.t5, dev.autoencoder) == (schnell.clip, schnell.t5, schnell.autoencoder)
    assert dataclasses.replace(dev.transformer, guidance_embed=False) == schnell.transformer
    assert (schnell.steps, schnell.guidance, schnell.shift) == (4, None, False)
    assert dev.shift and dev.transformer.guidance_embed and dev.bundled and schnell.bundled


def test_names_aliases_and_repositories_resolve() -> None:
    """Each to its own variant; no name is taken twice."""
    assert names() == list(VARIANTS)
    for name, found in VARIANTS.items():
        assert found.name == name and variant(name) is found
        if found.repository:
            assert variant(found.repository) is found
    for alias, name in ALIASES.items():
        assert variant(alias) is VARIANTS[name] and alias not in VARIANTS
    every = [key for v in VARIANTS.values() for key in (v.name, v.repository or v.file)]
    assert len(every) == len(set(every))


@pytest.mark.parametrize("name", ["", "flux", "FLUX1-DEV", "flux1-dev ", "nano-dev.safetensors", "None"])
def test_unknown_names_are_refused(name: str) -> None:
    """With all that are known; the empty name is none, though bundled models have an empty repository."""
    with pytest.raises(
        InputError, match=rf"unknown model {name!r}; known: flux1-dev, flux1-schnell, .*nano-dev.*, nano$"
    ):
        variant(name)


def test_a_config_leads_to_its_variant() -> None:
    for found in VARIANTS.values():
        assert variant_of(found.transformer).transformer == found.transformer  # type: ignore[union-attr]
    assert variant_of(VARIANTS["nano-schnell"].transformer) is VARIANTS["nano-schnell"]
    assert variant_of(dataclasses.replace(VARIANTS["nano-dev"].transformer, depth=9)) is None
    depth = VARIANTS["flux1-depth-dev"]  # canny's sizes: of several, the one whose file is so called
    assert (
        variant_of(depth.transformer, depth.file) is depth and variant_of(depth.transformer).name == "flux1-canny-dev"
    )


def test_a_variant_cannot_be_changed() -> None:
    """It is shared by every pipeline; a copy with other numbers is made by `dataclasses.replace`."""
    for field in ("steps", "transformer"):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(VARIANTS["nano-dev"], field, None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        VARIANTS["nano-dev"].transformer.depth = 1  # type: ignore[misc]


def test_every_official_file_is_in_the_list_of_weights() -> None:
    """The message about missing files sends people there."""
    text = (Path(__file__).parents[1] / "weights" / "README.md").read_text("utf-8")
    for name in OFFICIAL:
        found = VARIANTS[name]
        assert found.file in text and found.repository in text and found.licence.removeprefix("FLUX.1 [dev] ") in text


@pytest.mark.parametrize(
    ("name", "inside", "outside"),
    [
        ("nano-dev", [(64, 64), (192, 64), (128, 176)], [(512, 512), (48, 128), (128, 208)]),
        ("nano-schnell", [(192, 192)], [(32, 192)]),
        ("flux1-dev", [(1024, 1024), (1920, 1088), (320, 320), (2752, 512)], [(2048, 2048), (256, 256), (8192, 1024)]),
        ("flux1-schnell", [(512, 512)], [(128, 128)]),
    ],
)
def test_sizes_that_a_model_learned(
    name: str, inside: list[tuple[int, int]], outside: list[tuple[int, int]], caplog: pytest.LogCaptureFixture
) -> None:
    """Known of every model, in its record; what is outside is said with what was learned."""
    chosen = VARIANTS[name]
    assert all(size in chosen.learned for size in inside) and not any(size in chosen.learned for size in outside)
    for size in inside:
        warn_of_result(chosen, *size, custom_schedule([1, 0]))
    assert not caplog.records
    for width, height in outside:
        warn_of_result(chosen, width, height, custom_schedule([1, 0]))
        assert f"{width}x{height}" in caplog.text and f"it learned {chosen.learned}" in caplog.text
    assert str(VARIANTS["nano-dev"].learned) == "sides of 64 to 192 pixels"
    assert str(VARIANTS["flux1-dev"].learned) == "0.1 to 2 megapixels"


def test_nano_learned_the_sizes_of_its_recipe() -> None:
    assert VARIANTS["nano-dev"].learned.sides == (min(flow.SIDES), max(flow.SIDES))
