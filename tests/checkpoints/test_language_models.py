"""Language models as llama.cpp and ComfyUI keep them: rows in pairs, layers cut off, a tokenizer among the tensors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

import miniflux
from miniflux.checkpoints import inspect, load_into, save
from miniflux.checkpoints.files import TensorSource
from miniflux.checkpoints.loading import bare
from miniflux.checkpoints.quantized import QuantizedLinear
from miniflux.conversion.converting import convert
from miniflux.errors import TokenizerError
from miniflux.models.causal_lm import CausalLm, CausalLmConfig
from miniflux.testing import tiny
from miniflux.text.chat import ChatForm, ChatText, chat_tokenizer
from miniflux.text.tekken import tekken_of
from tests.tekken import content, trained
from tests.tiny import LM, randomise

gguf = pytest.importorskip("gguf")
MISTRAL = replace(LM, qk_norm=False, rope_theta=1e9, rms_norm_eps=1e-5, hidden_size=64, intermediate_size=64)
KINDS = {"llama": MISTRAL, "mistral3": MISTRAL, "qwen3": replace(MISTRAL, qk_norm=True)}
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OTHERS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def paired(weight: np.ndarray, heads: int) -> np.ndarray:
    """`permute` of llama.cpp's conversion: of each head the first row, the first of its second half, the second ..."""
    size = len(weight) // heads
    order = [
        head * size + half * size // 2 + row for head in range(heads) for row in range(size // 2) for half in (0, 1)
    ]
    return weight[order]


def theirs(network: CausalLm, permuted: bool) -> dict[str, np.ndarray]:
    """The tensors as llama.cpp names and orders them."""
    made: dict[str, np.ndarray] = {}
    for key, tensor in network.state_dict().items():
        module, _, ending = key.rpartition(".")
        array = tensor.numpy()
        if module in OTHERS:
            made[f"{OTHERS[module]}.{ending}"] = array
            continue
        _, _, number, name = module.split(".", 3)
        heads = {"self_attn.q_proj": network.config.num_attention_heads}.get(name, network.config.num_key_value_heads)
        if permuted and name in ("self_attn.q_proj", "self_attn.k_proj"):
            array = paired(array, heads)
        made[f"blk.{number}.{NAMES[name]}.{ending}"] = array
    return made


def written(path: Path, network: CausalLm, architecture: str, kind: str = "F32") -> Path:
    """A file as llama.cpp's conversion makes it, sizes in its header and a vocabulary included."""
    config = network.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_token_list([f"token {i}" for i in range(config.vocab_size)])
    quantised = gguf.GGMLQuantizationType[kind]
    for key, array in theirs(network, architecture != "qwen3").items():
        if array.ndim == 1 or kind == "F32":
            writer.add_tensor(key, array)
        else:
            writer.add_tensor(key, gguf.quants.quantize(array, quantised), raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def made(config: CausalLmConfig) -> CausalLm:
    return randomise(CausalLm(config), 3).requires_grad_(False)


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
@pytest.mark.parametrize("architecture", KINDS)
def test_llama_cpp(architecture: str, kind: str, tmp_path: Path) -> None:
    """The same weights as they were, bit for bit; packed rows stay packed, and are put in order when they are used."""
    network = made(KINDS[architecture])
    path = written(tmp_path / "lm.gguf", network, architecture, kind)
    other = bare(CausalLm, network.config)
    report = load_into(other, path)
    assert report.layout == "llama.cpp"
    for name, module in network.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        twin = other.get_submodule(name)
        if kind == "F32":
            assert torch.equal(cast(Tensor, twin.weight), module.weight)
            continue
        assert isinstance(twin, QuantizedLinear)
        rows = gguf.quants.quantize(module.weight.numpy(), gguf.GGMLQuantizationType.Q8_0)
        expected = torch.from_numpy(gguf.quants.dequantize(rows, gguf.GGMLQuantizationType.Q8_0))
        assert torch.equal(twin.dense(), expected)
    ids = torch.tensor([[3, 1, 4, 1, 5, 9]])
    found, wanted = other(ids, layers=(1, 3)), network(ids, layers=(1, 3))
    assert all(torch.allclose(a, b, atol=0.2 if kind == "Q8_0" else 1e-5) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("kind", [None, "Q8_0"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_there_and_back(architecture: str, kind: str | None, tmp_path: Path) -> None:
    """Converted to what llama.cpp calls it: its architecture, its rows; and back, bit for bit."""
    network = made(KINDS[architecture])
    save(network, tmp_path / "lm.safetensors")
    convert(tmp_path / "lm.safetensors", tmp_path / "lm.gguf", layout="llama.cpp", format=kind)
    source = TensorSource([tmp_path / "lm.gguf"])
    assert source.metadata["general.architecture"] == architecture
    if kind is None:
        for key, array in theirs(network, architecture == "llama").items():
            assert np.array_equal(source[key].numpy(), array), key
        convert(tmp_path / "lm.gguf", tmp_path / "back.safetensors", layout="original")
        back = TensorSource([tmp_path / "back.safetensors"])
        assert all(torch.equal(back[key], tensor) for key, tensor in network.state_dict().items())
        return
    convert(tmp_path / "lm.gguf", tmp_path / "ours.gguf", layout="original")
    convert(tmp_path / "ours.gguf", tmp_path / "again.gguf", layout="llama.cpp")
    ours, again = (TensorSource([tmp_path / f"{name}.gguf"]) for name in ("ours", "again"))
    assert all(torch.equal(again[key], source[key]) for key in source.entries)
    one, two = bare(CausalLm, network.config), bare(CausalLm, network.config)
    for network, file in ((one, source), (two, ours)):
        load_into(network, file)
    name = "model.layers.1.self_attn.k_proj"
    assert torch.equal(*(cast(QuantizedLinear, network.get_submodule(name)).dense() for network in (one, two)))


def test_the_header_of_llama_cpp_tells_what_shapes_do_not(tmp_path: Path) -> None:
    """Of whatever sizes it is: the base of its frequencies, its heads, its epsilon."""
    odd = replace(MISTRAL, rope_theta=12345.0, rms_norm_eps=3e-6, head_dim=8)
    path = written(tmp_path / "lm.gguf", made(odd), "llama")
    convert(path, tmp_path / "folder", layout="diffusers")
    about = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert about["rope_theta"] == 12345.0 and about["rms_norm_eps"] == 3e-6 and about["head_dim"] == 8


# -- The file of FLUX.2 dev's encoder for ComfyUI: 30 layers, no last norm, `tekken_model` --


@pytest.fixture(scope="module")
def tekken() -> bytes:
    return json.dumps(content(trained(140))).encode()


@pytest.fixture
def dev(tekken: bytes, tmp_path: Path) -> tuple[Path, ChatText]:
    """A tiny FLUX.2 dev in single files."""
    pipe = tiny("flux2-dev")
    tokenizer = tekken_of(tekken, "tekken.json")
    config = replace(cast(CausalLm, pipe.text.networks["lm"]).config, vocab_size=tokenizer.get_vocab_size())
    text = ChatText(made(config), chat_tokenizer(tokenizer, cast(ChatForm, pipe.variant.chat)))
    save(pipe.transformer, tmp_path / "transformer.safetensors")
    save(pipe.autoencoder, tmp_path / "flux2-vae.safetensors")
    return tmp_path, text


def embedded(text: ChatText, path: Path, blob: bytes | None) -> Path:
    """The language model in a file, with its tokenizer as bytes."""
    from safetensors.torch import save_file

    lm = cast(CausalLm, text.networks["lm"])
    extra = {} if blob is None else {"tekken_model": torch.frombuffer(bytearray(blob), dtype=torch.uint8)}
    about: dict[str, Any] = {**vars(lm.config)}
    save_file({**lm.state_dict(), **extra}, path, {"lm_config": json.dumps(about)})
    return path


def test_a_tokenizer_among_the_tensors(dev: tuple[Path, ChatText], tekken: bytes) -> None:
    """Where there is no other it is read; the prompt is the same as with the file beside."""
    folder, text = dev
    file = embedded(text, folder / "mistral_3_small_flux2_bf16.safetensors", tekken)
    loaded = miniflux.load(folder, device="cpu")
    assert torch.equal(loaded.text.encode(["a cat"]).txt, text.encode(["a cat"]).txt)
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tekken.json").write_bytes(tekken)
    beside = miniflux.load(folder, device="cpu")
    assert torch.equal(beside.text.encode(["a cat"]).txt, text.encode(["a cat"]).txt)
    assert beside.origin is not None
    assert ("lm_tokenizer", "tekken.json") in [(part, Path(stamp.path).name) for part, stamp in beside.origin.files]
    assert inspect(file).parts[0].redundant["tekken_model"].startswith("its tokenizer")


def test_a_damaged_tokenizer_among_the_tensors(dev: tuple[Path, ChatText], tekken: bytes) -> None:
    folder, text = dev
    file = embedded(text, folder / "mistral_3_small_flux2_bf16.safetensors", tekken[:-9])
    with pytest.raises(TokenizerError, match=r"bf16\.safetensors: tekken_model"):
        miniflux.load(folder, device="cpu")
    embedded(text, file, None)
    with pytest.raises(TokenizerError, match="holds no tokenizer"):
        miniflux.load(folder, device="cpu", weights={"lm_tokenizer": file})


def test_layers_that_are_cut_off(dev: tuple[Path, ChatText], tmp_path: Path) -> None:
    """A file without its last layers and without the norm behind them is converted as it is; and where a config says
    that there are no others, what is read after the last one is not normalised all the same."""
    _, text = dev
    lm = cast(CausalLm, text.networks["lm"])
    path = embedded(text, tmp_path / "cut.safetensors", None)
    convert(path, tmp_path / "cut.gguf", layout="llama.cpp")
    other = bare(CausalLm, lm.config)
    load_into(other, tmp_path / "cut.gguf")
    assert all(torch.equal(other.state_dict()[key], tensor) for key, tensor in lm.state_dict().items())
