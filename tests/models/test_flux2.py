"""The FLUX.2 transformer against outputs of the original release, published key lists and its own symmetries."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from miniflux.errors import ConfigError
from miniflux.models.flux2 import Flux2, Flux2Config
from tests.reference import of_exponentials
from tests.tiny import randn, randomise, shapes

INPUTS = ("img", "img_ids", "txt", "txt_ids", "timesteps", "guidance")
TINY = Flux2Config(
    in_channels=16,
    out_channels=16,
    context_in_dim=24,
    hidden_size=32,
    num_heads=2,
    depth=2,
    depth_single_blocks=2,
    axes_dim=(4, 4, 4, 4),
    guidance_embed=False,
)


def load(case: Any) -> Flux2:
    model = Flux2(Flux2Config(out_channels=128, guidance_embed=True, **case.about["config"]))
    model.load_state_dict(case.weights)
    return model


def inputs(config: Flux2Config, batch: int = 2, tokens: int = 12, words: int = 5) -> dict[str, Tensor]:
    img_ids, txt_ids = torch.zeros(batch, tokens, 4), torch.zeros(batch, words, 4)
    img_ids[..., 1], img_ids[..., 2] = torch.arange(tokens) // 4, torch.arange(tokens) % 4
    txt_ids[..., 3] = torch.arange(words)
    return {
        "img": randn(batch, tokens, config.in_channels),
        "img_ids": img_ids,
        "txt": randn(batch, words, config.context_in_dim, seed=1),
        "txt_ids": txt_ids,
        "timesteps": torch.linspace(0.3, 0.9, batch),
    }


@torch.inference_mode()
def test_forward_equals_the_release(golden) -> None:
    case = golden("flux2_dev")
    output = load(case)(**{name: case[name] for name in INPUTS})
    assert_close(output, case["output"], rtol=0, atol=2e-5)


@pytest.mark.parametrize("output", ["denoise_output", "reference_output"])
@torch.inference_mode()
def test_a_run_equals_the_release(golden, output: str) -> None:
    """Euler over all of its noise levels: alone, and with two references, whose tokens stand behind those of the
    picture; the velocity of the picture's alone is read."""
    case = golden("flux2_dev")
    model, x = load(case), case["img"]
    told = {name: case[name] for name in ("img_ids", "txt", "txt_ids")}
    told["guidance"] = torch.full((len(x),), case.about["guidance_in_denoise"])
    seen = x[:, :0]
    if output == "reference_output":
        seen, told["img_ids"] = case["reference_seq"], torch.cat((told["img_ids"], case["reference_seq_ids"]), dim=1)

    def run() -> Tensor:
        x = case["img"]
        for sigma, sigma_next in pairwise(case["denoise_timesteps"].tolist()):
            v = model(torch.cat((x, seen), dim=1), timesteps=torch.full((len(x),), sigma), **told)
            x = x + (sigma_next - sigma) * v[:, : x.shape[1]]
        return x

    assert_close(run(), case[output], rtol=0, atol=2e-5 + of_exponentials(run))


@pytest.mark.parametrize("name", ["flux2-dev", "flux2-klein-4b", "flux2-klein-9b"])
def test_keys_are_those_of_the_published_file(published, manifest, name: str) -> None:
    params = {key: x for key, x in published["flux2"][name]["params"].items() if key not in ("qkv_bias", "vec_in_dim")}
    with torch.device("meta"):
        model = Flux2(Flux2Config(**params))
    assert shapes(model) == manifest(f"bfl-{name}")


@torch.inference_mode()
def test_every_field_of_the_config_is_read() -> None:
    """Sizes reach the layers; another base of the frequencies is another model."""
    model = randomise(Flux2(replace(TINY, mlp_ratio=2.0)))
    assert model.double_blocks[0].txt_mlp[0].out_features == 128
    assert model.single_blocks[0].linear1.out_features == 3 * 32 + 128
    assert not [key for key in model.state_dict() if key.endswith("bias")]
    other = Flux2(replace(TINY, mlp_ratio=2.0, theta=10_000))
    other.load_state_dict(model.state_dict())
    told = inputs(TINY)
    assert not torch.equal(model(**told), other(**told))


@torch.inference_mode()
def test_tokens_have_no_order_but_their_ids() -> None:
    model, told = randomise(Flux2(TINY)), inputs(TINY)
    turned = {**told, "img": told["img"].flip(1), "img_ids": told["img_ids"].flip(1)}
    assert_close(model(**turned).flip(1), model(**told), rtol=0, atol=1e-5)


@torch.inference_mode()
def test_masked_text_is_as_if_it_were_not_there() -> None:
    model, told = randomise(Flux2(TINY)), inputs(TINY)
    mask = torch.tensor([[True] * 3 + [False] * 2] * 2)
    short = {**told, "txt": told["txt"][:, :3], "txt_ids": told["txt_ids"][:, :3]}
    assert_close(model(**told, txt_mask=mask), model(**short), rtol=0, atol=1e-5)


@torch.inference_mode()
def test_blocks_can_be_run_by_others() -> None:
    """In order, under their names, with the streams of both kinds."""
    model, told, names = randomise(Flux2(TINY)), inputs(TINY), list[tuple[str, int]]()

    def run(name: str, block: nn.Module, streams: tuple[Tensor, ...], context: tuple[Any, ...]) -> tuple[Tensor, ...]:
        names.append((name, len(streams)))
        out = block(*streams, *context)
        return out if isinstance(out, tuple) else (out,)

    assert torch.equal(model(**told, run=run), model(**told))
    assert names == [(f"{kind}_blocks.{i}", n) for kind, n in (("double", 2), ("single", 1)) for i in range(2)]


def test_guidance_that_is_needed_is_asked_for() -> None:
    with pytest.raises(ConfigError, match="guidance must be a tensor"):
        Flux2(replace(TINY, guidance_embed=True))(**inputs(TINY))


@pytest.mark.parametrize("wrong", [{"num_heads": 3}, {"axes_dim": (4, 4, 4)}, {"axes_dim": (5, 3, 4, 4)}])
def test_sizes_that_do_not_go_together_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        replace(TINY, **wrong)
