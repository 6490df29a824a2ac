"""Text encoders in files of the whole model they are a half of, and in the names of other programs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from miniflux.checkpoints import convert, inspect, layouts_of, load_into, to_layout
from miniflux.errors import CheckpointError, InputError
from miniflux.models.clip import ClipTextEncoder
from miniflux.models.t5 import T5Encoder
from miniflux.variants import VARIANTS
from tests.tiny import CLIP, T5, randomise

transformers = pytest.importorskip("transformers", reason="compares with transformers: pip install miniflux[test]")


def openai_names(theirs: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """The text tower of transformers in OpenAI's names; written for this test alone."""
    made = {
        "token_embedding.weight": theirs["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": theirs["text_model.embeddings.position_embedding.weight"],
        "ln_final.weight": theirs["text_model.final_layer_norm.weight"],
        "ln_final.bias": theirs["text_model.final_layer_norm.bias"],
    }
    for i in range(layers):
        old, new = f"text_model.encoder.layers.{i}", f"transformer.resblocks.{i}"
        for kind in ("weight", "bias"):
            made[f"{new}.attn.in_proj_{kind}"] = torch.cat([theirs[f"{old}.self_attn.{x}_proj.{kind}"] for x in "qkv"])
            made[f"{new}.attn.out_proj.{kind}"] = theirs[f"{old}.self_attn.out_proj.{kind}"]
            made[f"{new}.ln_1.{kind}"] = theirs[f"{old}.layer_norm1.{kind}"]
            made[f"{new}.ln_2.{kind}"] = theirs[f"{old}.layer_norm2.{kind}"]
            made[f"{new}.mlp.c_fc.{kind}"] = theirs[f"{old}.mlp.fc1.{kind}"]
            made[f"{new}.mlp.c_proj.{kind}"] = theirs[f"{old}.mlp.fc2.{kind}"]
    return {key: tensor.clone() for key, tensor in made.items()}


VISUAL = {
    "visual.conv1.weight": torch.ones(4, 3, 2, 2),
    "visual.class_embedding": torch.ones(4),
    "visual.transformer.resblocks.0.attn.in_proj_weight": torch.ones(12, 4),
    "visual.transformer.resblocks.0.ln_1.weight": torch.ones(4),
    "text_projection": torch.ones(24, 8),
    "logit_scale": torch.ones(()),
    "context_length": torch.tensor(12),
    "vocab_size": torch.tensor(50),
    "input_resolution": torch.tensor(224),
}


@pytest.fixture
def clip() -> tuple[torch.nn.Module, dict[str, Tensor]]:
    """A whole CLIP of transformers with random weights, and what it holds."""
    text = {**vars(CLIP), "bos_token_id": 48, "pad_token_id": 1}
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = transformers.CLIPConfig(
        text_config=text, vision_config={**vision, "image_size": 8, "patch_size": 4}, projection_dim=8
    )
    model = transformers.CLIPModel(config)
    randomise(model)
    return model, {key: tensor.clone() for key, tensor in model.state_dict().items()}


@pytest.mark.parametrize("prefix", ["", "text.", "cond_stage_model.model."])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_clip_in_openai_names(prefix: str, dtype: torch.dtype, clip: tuple, tmp_path: Path) -> None:
    """The same summary vector as transformers', from a file with the image half, too; what is left over is named."""
    model, state = clip
    names = openai_names(state, CLIP.num_hidden_layers)
    others = VISUAL if not prefix else {}
    save_file({prefix + k: t.to(dtype) for k, t in names.items()} | others, tmp_path / "a.safetensors")
    ours = ClipTextEncoder(CLIP)
    report = load_into(ours, tmp_path / "a.safetensors", dtype=torch.float32)
    assert set(report.redundant) == set(others) and report.layout == "openai"
    ids = torch.tensor([[48, 3, 4, 7, 49, 49, 49, 49, 49, 49, 49, 49]])
    with torch.no_grad():
        expected = model.text_model(ids).pooler_output
        got = ours(ids)
    got = got if isinstance(got, Tensor) else got[-1]
    assert float((got.reshape(expected.shape) - expected).abs().max()) < (2e-5 if dtype == torch.float32 else 2e-2)
    (part,) = inspect(tmp_path / "a.safetensors").parts
    assert (part.network, part.layout) == ("ClipTextEncoder", "openai")
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    back = load_file(tmp_path / "b.safetensors")
    assert all(torch.equal(back[key], state[key].to(dtype)) for key in ours.state_dict())


def test_clip_l_itself_is_recognised(tmp_path: Path) -> None:
    """Sizes of the published file, in OpenAI's names."""
    from tests.checkpoints.raw import sparse

    with torch.device("meta"):
        network = ClipTextEncoder(VARIANTS["flux1-dev"].clip)
    tensors = to_layout(network, network.state_dict(), "openai")
    path = sparse(tmp_path / "a.safetensors", {k: list(t.shape) for k, t in tensors.items()}, "F16")
    (part,) = inspect(path).parts
    assert part.variant.startswith("flux1-dev or") and not part.problems


def test_openai_names_are_read_and_not_written(clip: tuple, tmp_path: Path) -> None:
    save_file(openai_names(clip[1], CLIP.num_hidden_layers), tmp_path / "a.safetensors")
    assert "openai" in layouts_of(ClipTextEncoder(CLIP))
    with pytest.raises(InputError, match="'openai' is read, not written; written are original, diffusers"):
        convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", layout="openai")
    state = openai_names(clip[1], CLIP.num_hidden_layers)
    state["transformer.resblocks.1.attn.in_proj_weight"] = torch.ones(48, 24)
    save_file({**state, "more": torch.ones(1)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="1 unused, such as more.*3 misshapen|3 misshapen.*1 unused"):
        load_into(ClipTextEncoder(CLIP), tmp_path / "a.safetensors")


def test_a_whole_clip_of_transformers(clip: tuple, tmp_path: Path) -> None:
    _, state = clip
    save_file(state, tmp_path / "a.safetensors")
    ours = ClipTextEncoder(CLIP)
    report = load_into(ours, tmp_path / "a.safetensors")
    assert all(torch.equal(tensor, state[key]) for key, tensor in ours.state_dict().items())
    assert set(report.redundant) == set(state) - set(ours.state_dict())
    made = convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert set(made.left_out) == set(report.redundant)


@pytest.mark.parametrize("tied", ["both", "shared", "embed_tokens"])
def test_a_whole_t5(tied: str, tmp_path: Path) -> None:
    """With decoder and head, as google's own repository has it; the shared table under any of its names."""
    sizes = {**vars(T5), "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0))
    randomise(model)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    table = state["shared.weight"]
    drop = {"both": (), "shared": ("encoder.embed_tokens.weight",), "embed_tokens": ("shared.weight",)}[tied]
    state |= {"encoder.embed_tokens.weight": table.clone(), "decoder.embed_tokens.weight": table.clone()}
    save_file({key: tensor for key, tensor in state.items() if key not in drop}, tmp_path / "model.safetensors")
    ours = T5Encoder(T5)
    report = load_into(ours, tmp_path)
    assert torch.equal(ours.shared.weight, table)
    assert torch.equal(
        ours.encoder.block[0].layer[0].SelfAttention.q.weight, state["encoder.block.0.layer.0.SelfAttention.q.weight"]
    )
    assert {"lm_head.weight", "decoder.embed_tokens.weight"} <= set(report.redundant)
    assert report.redundant["lm_head.weight"] == "belongs to T5's decoder"
    ids = torch.tensor([[3, 5, 7, 1, 0]])
    with torch.no_grad():
        assert float((ours(ids) - model.encoder(ids).last_hidden_state).abs().max()) < 2e-5
    assert inspect(tmp_path).parts[0].network == "T5Encoder"
