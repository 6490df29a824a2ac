"""The FLUX.3 transformer against diffusers' class and published key lists, and its own symmetries."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from miniflux.errors import ConfigError
from miniflux.models.flux3 import Flux3, Flux3Config
from tests.tiny import randn, randomise, shapes

TINY = Flux3Config(
    in_channels=16,
    out_channels=16,
    cond_in_channels=12,
    context_in_dim=24,
    hidden_size=32,
    num_heads=2,
    depth=2,
    depth_single_blocks=3,
    axes_dim=(4, 4, 4, 4),
    flow_map=False,
)
RENAMED = (
    (r"^x_embedders\.", "emb_in."),
    (r"^context_embedder\.", "txt_in."),
    (r"^timestep_embedder\.linear_1\.", "time_in.in_layer."),
    (r"^timestep_embedder\.linear_2\.", "time_in.out_layer."),
    (r"^target_timestep_embedder\.linear_1\.", "ref_time_in.in_layer."),
    (r"^target_timestep_embedder\.linear_2\.", "ref_time_in.out_layer."),
    (r"^mode_blocks\.", "content_mode_blocks."),
    (r"^single_transformer_blocks\.", "single_blocks."),
    (r"\.attn\.to_([qkv])\.", r".\1_proj."),
    (r"\.attn\.to_out\.0\.", ".attn_out."),
    (r"\.attn\.norm_q\.weight$", ".norm.query_norm.scale"),
    (r"\.attn\.norm_k\.weight$", ".norm.key_norm.scale"),
    (r"\.ff\.linear_(in|out)\.", r".mlp_\1."),
    (r"(_modulations\.\w+)\.linear\.", r"\1.lin."),
    (r"^norm_out\.linear\.", "final_layer.image.adaLN_modulation.1."),
    (r"^proj_out\.", "final_layer.image.linear."),
)


def inputs(config: Flux3Config, references: bool = False) -> dict[str, Tensor]:
    ids = torch.zeros(2, 12, 4)
    ids[..., 1], ids[..., 2] = 0.5 * (torch.arange(12) // 4), 0.5 * (torch.arange(12) % 4)
    words = torch.zeros(2, 5, 4)
    words[..., 3] = torch.arange(5)
    told = {
        "img": randn(2, 12, config.in_channels),
        "img_ids": ids,
        "txt": randn(2, 5, config.context_in_dim, seed=1),
        "txt_ids": words,
        "timesteps": torch.tensor([0.9, 0.3]),
    }
    if config.flow_map:
        told["target"] = torch.tensor([0.8, 0.0])
    if references:
        seen = torch.cat((ids[:, :8], ids[:, :6]), dim=1)
        seen[:, :8, 3], seen[:, 8:, 3] = -1, -2
        told |= {"cond": randn(2, 14, config.cond_in_channels, seed=2), "cond_ids": seen}
    return told


def theirs(config: Flux3Config) -> Any:
    diffusers = pytest.importorskip("diffusers")
    head = config.hidden_size // config.num_heads
    return diffusers.Flux3Transformer2DModel(
        in_channels=config.in_channels,
        cond_in_channels=config.cond_in_channels,
        num_layers=config.depth,
        num_single_layers=config.depth_single_blocks,
        attention_head_dim=head,
        num_attention_heads=config.num_heads,
        joint_attention_dim=config.context_in_dim,
        axes_dims_rope=config.axes_dim,
        flow_map=config.flow_map,
    ).eval()


def renamed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' names to those of the release; the last modulation stores its halves the other way round."""
    found: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        new = name
        for pattern, to in RENAMED:
            new = re.sub(pattern, to, new)
        found[new] = torch.cat(tensor.chunk(2)[::-1]) if name.startswith("norm_out") else tensor
    return found


@pytest.mark.parametrize("references", [False, True])
@pytest.mark.parametrize("flow_map", [False, True])
@torch.inference_mode()
def test_forward_equals_diffusers(flow_map: bool, references: bool) -> None:
    """Base and distilled, with and without references, each picture at a time of its own."""
    config = replace(TINY, flow_map=flow_map)
    peer, model, told = randomise(theirs(config)), Flux3(config), inputs(config, references)
    model.load_state_dict(renamed(peer.state_dict()))
    about: dict[str, Any] = {"encoder_hidden_states": told["txt"], "timestep": told["timesteps"]}
    about |= {"img_ids": told["img_ids"][0], "txt_ids": told["txt_ids"][0]}
    if flow_map:
        about["target_timestep"] = told["target"]
    if references:
        about |= {"image_cond_hidden_states": told["cond"], "image_cond_ids": told["cond_ids"][0]}
    expected = peer(told["img"], **about, return_dict=False)[0]
    assert_close(model(**told), expected, rtol=0, atol=2e-5)
    assert expected.std() > 0.1


@pytest.mark.parametrize(("name", "flow_map"), [("bfl-flux3", False), ("bfl-flux3-distilled", True)])
def test_keys_are_those_of_the_published_file(manifest, name: str, flow_map: bool) -> None:
    sizes: dict[str, Any] = {"in_channels": 128, "out_channels": 128, "cond_in_channels": 128, "context_in_dim": 20480}
    sizes |= {"hidden_size": 3072, "num_heads": 24, "depth": 5, "depth_single_blocks": 28, "axes_dim": (32,) * 4}
    with torch.device("meta"):
        model = Flux3(Flux3Config(**sizes, flow_map=flow_map))
    assert shapes(model) == manifest(name)


@torch.inference_mode()
def test_references_are_seen_in_joint_blocks_alone() -> None:
    """Without joint blocks the picture does not depend on them, nor on the text."""
    apart = randomise(Flux3(replace(TINY, depth_single_blocks=0)))
    told, other = inputs(TINY, references=True), inputs(TINY)
    assert torch.equal(apart(**told), apart(**{**other, "txt": 2 * other["txt"]}))
    model = randomise(Flux3(TINY))
    assert not torch.allclose(model(**told), model(**other), atol=1e-3)


@torch.inference_mode()
def test_blocks_can_be_run_by_others() -> None:
    model, told, names = randomise(Flux3(TINY)), inputs(TINY, references=True), list[str]()

    def run(name: str, block: nn.Module, streams: tuple[Tensor, ...], context: tuple[Any, ...]) -> tuple[Tensor, ...]:
        assert model.get_submodule(name) is block
        names.append(name)
        return (block(*streams, *context),)

    assert torch.equal(model(**told, run=run), model(**told))
    kinds = ("txt_mode_blocks", "content_mode_blocks.image", "content_mode_blocks.image_cond")
    assert names == [f"{kind}.{i}" for kind in kinds for i in range(2)] + [f"single_blocks.{i}" for i in range(3)]


def test_what_does_not_go_together_is_refused() -> None:
    told = inputs(TINY, references=True)
    with pytest.raises(ConfigError, match="no input for it"):
        Flux3(TINY)(**told, target=torch.zeros(2))
    with pytest.raises(ConfigError, match="target must be a tensor"):
        Flux3(replace(TINY, flow_map=True))(**told)
    with pytest.raises(ConfigError, match="both or neither"):
        Flux3(TINY)(**{name: x for name, x in told.items() if name != "cond_ids"})
    for wrong in ({"num_heads": 3}, {"axes_dim": (4, 4, 4)}, {"axes_dim": (5, 3, 4, 4)}):
        with pytest.raises(ConfigError):
            replace(TINY, **wrong)
