"""Folders as people have them, converted: every network is in the result, or it is said why not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import miniflux
from miniflux.checkpoints import convert, inspect, save
from miniflux.conversion.inputs import inputs
from miniflux.errors import CheckpointError, InputError
from miniflux.models.autoencoder import Autoencoder
from miniflux.models.causal_lm import CausalLm, CausalLmConfig
from miniflux.models.clip import ClipTextEncoder
from miniflux.models.flux1 import Flux1
from miniflux.models.t5 import T5Encoder
from miniflux.models.tiny_autoencoder import TinyDecoder
from miniflux.pipeline import Pipeline
from miniflux.testing import tiny
from miniflux.variants import VARIANTS
from miniflux.weights.finding import BUNDLED
from tests.checkpoints.raw import sparse
from tests.tiny import AUTOENCODER, CLIP, FLUX1, T5, TINY, randomise

WIDE = replace(FLUX1, in_channels=64, out_channels=64, context_in_dim=T5.d_model, vec_in_dim=CLIP.hidden_size)
NETWORKS: dict[str, nn.Module] = {
    "transformer": randomise(Flux1(WIDE)).to(torch.bfloat16),
    "vae": randomise(Autoencoder(replace(AUTOENCODER, z_channels=16))),
    "text_encoder": randomise(
        ClipTextEncoder(replace(CLIP, vocab_size=2000, max_position_embeddings=77, eos_token_id=2))
    ),
    "text_encoder_2": randomise(T5Encoder(replace(T5, vocab_size=1000))),
}
SINGLE = {
    "transformer": "flux1-mine.safetensors",
    "vae": "ae.safetensors",
    "text_encoder": "clip_l.safetensors",
    "text_encoder_2": "t5xxl_fp16.safetensors",
}
WORDS = ["transformer", "autoencoder", "CLIP text encoder", "T5 encoder"]


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("te-qwen3-4b", "flux2-klein-4b"),
        ("te-qwen3-vl-4b-language-model", "flux3-klein"),
        ("te-qwen3-8b", "flux2-klein-9b"),
        ("te-mistral-small-24b-language-model", "flux2-dev"),
    ],
)
def test_the_config_of_a_published_text_encoder(
    name: str, variant: str, manifest: Callable[[str], dict[str, list[int]]], tmp_path: Path
) -> None:
    """Of a file without header and without config.json: two have the same shapes, and other rotary frequencies."""
    (found,) = inputs(sparse(tmp_path / "a.safetensors", manifest(name))).networks
    whole = replace(cast(CausalLmConfig, VARIANTS[variant].lm), layers_read=None)  # nothing is left out
    assert found.network.config == whole and found.untold == ""
    assert CausalLmConfig(**json.loads(found.metadata["lm_config"])) == whole


@pytest.mark.parametrize("name", ["flux2-klein-4b", "flux3-klein"])
@pytest.mark.parametrize("layout", ["original", "diffusers", None])
def test_a_model_with_a_language_model(
    name: str, layout: str | None, tokenizer: Callable[[str], Path], tmp_path: Path
) -> None:
    """Every network lies where loading looks, under the name of its family, and draws what it drew; what is not
    written is said."""
    small = tiny(name)
    assert small.variant.lm is not None
    whole = replace(small.variant.lm, vocab_size=151936)
    parts = {"transformer": small.transformer, "vae": small.autoencoder, "text_encoder": randomise(CausalLm(whole))}
    for place, network in parts.items():
        (tmp_path / "a" / place).mkdir(parents=True)
        save(network, tmp_path / "a" / place / "model.safetensors")
    made = convert(tmp_path / "a", tmp_path / "b", layout=layout)
    assert made.networks == ["transformer", "autoencoder", "language model"] and not made.layers and not made.left_out
    cut = ["the rest of the language model"]
    no_index = ["the index of a pipeline"] * (name == "flux3-klein" and layout == "diffusers")
    assert list(made.missing) == ["tokenizer", *cut, *no_index]
    files = {str(path.relative_to(tmp_path / "b")) for path in (tmp_path / "b").rglob("*.safetensors")}
    stem = "diffusion_pytorch_model.safetensors"
    single = {f"{name[:5]}.safetensors", "flux2-vae.safetensors"}
    first = single if layout == "original" else {f"transformer/{stem}", f"vae/{stem}"}
    assert files == first | {"text_encoder/model.safetensors"}
    pipes: list[Pipeline] = []
    for folder in ("a", "b"):
        (tmp_path / folder / "tokenizer").symlink_to(tokenizer("qwen3"))
        pipes.append(miniflux.load(tmp_path / folder, device="cpu"))
    networks = [(pipe.transformer, pipe.autoencoder, pipe.text.networks["lm"]) for pipe in pipes]
    for one, other in zip(*networks, strict=True):
        before, after = one.state_dict(), other.state_dict()
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    pictures = [pipe.generate("a cat", seed=1, steps=1, width=32, height=32).latents for pipe in pipes]
    torch.testing.assert_close(*pictures, rtol=0, atol=1e-4)  # sums depend on how the memory is aligned


def tokenizers(root: Path) -> None:
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(BUNDLED / name, root / name)


def put(root: Path, name: str, place: str, layout: str = "original") -> None:
    (root / place).parent.mkdir(parents=True, exist_ok=True)
    save(NETWORKS[name], root / place, layout=layout)


def singles(root: Path) -> None:
    for name, place in SINGLE.items():
        put(root, name, place)


def mixed(root: Path) -> None:
    """As weights/README.md recommends."""
    put(root, "transformer", SINGLE["transformer"])
    put(root, "vae", "ae.safetensors")
    put(root, "text_encoder", "text_encoder/model.safetensors")
    put(root, "text_encoder_2", "text_encoder_2/model.safetensors")


def folders(root: Path) -> None:
    put(root, "transformer", "transformer/model.safetensors", "diffusers")
    put(root, "vae", "vae/model.safetensors", "diffusers")
    put(root, "text_encoder", "text_encoder/model.safetensors")
    put(root, "text_encoder_2", "text_encoder_2/model.safetensors")


def published(root: Path) -> None:
    """As the repositories on the Hub: a diffusers pipeline, and the original files beside it."""
    folders(root)
    put(root, "transformer", SINGLE["transformer"])
    put(root, "vae", "ae.safetensors")


def comfyui(root: Path) -> None:
    put(root, "transformer", "diffusion_models/a fine-tune.safetensors")
    put(root, "vae", "vae/flux_ae.safetensors")
    put(root, "text_encoder", "text_encoders/my clip.safetensors")
    put(root, "text_encoder_2", "text_encoders/t5.safetensors")


def nested(root: Path) -> None:
    for place, name in (("models/unet/x", "transformer"), ("models/vae/y", "vae")):
        put(root, name, f"{place}/model.safetensors")
    put(root, "text_encoder", "models/clip/z.safetensors")
    put(root, "text_encoder_2", "models/clip/deep/t5.safetensors")


def linked(root: Path) -> None:
    """As the snapshots of the Hugging Face cache."""
    mixed(root.parent / "elsewhere")
    for path in (root.parent / "elsewhere").rglob("*.safetensors"):
        link = root / path.relative_to(root.parent / "elsewhere")
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)


def other_endings(root: Path) -> None:
    mixed(root)
    (root / SINGLE["transformer"]).rename(root / "flux1-mine.SFT")
    (root / "ae.safetensors").rename(root / "ae.sft")
    (root / "._ae.sft").write_bytes(bytes(100))


SHAPES: dict[str, Callable[[Path], None]] = {
    f.__name__: f for f in (singles, mixed, folders, published, comfyui, nested, linked, other_endings)
}
TARGETS = [("made", "diffusers"), ("made", "original"), ("made", None), ("made.safetensors", "all-in-one")]


def numbers(path: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Every network of a result, in our own names."""
    from miniflux.checkpoints import load_into
    from miniflux.conversion.inputs import inputs

    found = {}
    for part in inputs(path).networks:
        network = type(part.network)(part.network.config)  # type: ignore[operator]
        load_into(network, part.source)
        found[type(network).__name__] = network.state_dict()
    return found


def whole(path: Path, dtype: torch.dtype | None = None) -> bool:
    found = numbers(path)
    for network in NETWORKS.values():
        for key, tensor in network.state_dict().items():
            got = found[type(network).__name__][key]
            if got.dtype != (dtype or tensor.dtype) or not torch.equal(got, tensor.to(got.dtype)):
                return False
    return len(found) == len(NETWORKS)


@pytest.mark.parametrize(("target", "layout"), TARGETS)
@pytest.mark.parametrize("shape", SHAPES)
def test_no_network_is_dropped(shape: str, target: str, layout: str | None, tmp_path: Path) -> None:
    """However the folder is laid out, all four are in the result, number by number, and the message names them."""
    source = tmp_path / "source"
    SHAPES[shape](source)
    tokenizers(source)
    made = convert(source, tmp_path / target, layout=layout)
    assert made.networks == WORDS and str(made).startswith(f"{tmp_path / target}: {', '.join(WORDS)}; ")
    assert whole(tmp_path / target) and not made.missing and "every number is the same" in str(made)
    if shape == "published":
        assert list(made.left_out.values()) == [
            f"the same transformer as {source / 'flux1-mine.safetensors'}",
            f"the same autoencoder as {source / 'ae.safetensors'}",
        ]
    else:
        assert not made.left_out
    if target == "made":
        assert {"tokenizer", "tokenizer_2"} <= set(made.beside)
        pipe = miniflux.load(tmp_path / target)
        assert torch.equal(pipe.transformer.img_in.weight, NETWORKS["transformer"].img_in.weight.float())
    if layout == "diffusers":
        names = {"model_index.json", "scheduler", "tokenizer", "tokenizer_2", *NETWORKS}
        assert {path.name for path in (tmp_path / target).iterdir()} == names
        assert all((tmp_path / target / name / "config.json").is_file() for name in NETWORKS)


@pytest.mark.parametrize(("target", "layout"), TARGETS)
@pytest.mark.parametrize("format", ["float16", "fp8_e4m3", "int8"])
def test_none_is_dropped_with_a_format(format: str, target: str, layout: str | None, tmp_path: Path) -> None:
    mixed(tmp_path / "source")
    made = convert(tmp_path / "source", tmp_path / target, layout=layout, format=format)
    assert made.networks == WORDS and len(inspect(tmp_path / target).parts) == 4
    assert whole(tmp_path / target, torch.float16) == (format == "float16")
    if layout == "diffusers":
        packed = "weights that are not packed" in made.missing
        assert packed == (format == "int8") and not (tmp_path / target / "model_index.json").exists()


@pytest.mark.parametrize("shape", ["mixed", "folders", "comfyui"])
def test_there_and_back(shape: str, tmp_path: Path) -> None:
    """Bit by bit, whatever was in between."""
    SHAPES[shape](tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "a", layout="diffusers")
    convert(tmp_path / "a", tmp_path / "b.safetensors", layout="all-in-one")
    convert(tmp_path / "b.safetensors", tmp_path / "c", layout="original")
    convert(tmp_path / "source", tmp_path / "d", layout="original")
    for path in (tmp_path / "d").glob("*.safetensors"):
        assert (tmp_path / "c" / path.name).read_bytes() == path.read_bytes()
    assert len(list((tmp_path / "c").glob("*.safetensors"))) == 4


def test_a_gguf_transformer_beside_the_others(tmp_path: Path) -> None:
    """It stays GGUF where it stays packed; told a format, all become that."""
    pytest.importorskip("gguf")
    mixed(tmp_path / "source")
    tokenizers(tmp_path / "source")
    convert(tmp_path / "source" / SINGLE["transformer"], tmp_path / "source" / "flux1-Q8_0.gguf", format="Q8_0")
    (tmp_path / "source" / SINGLE["transformer"]).unlink()
    assert miniflux.load(tmp_path / "source").transformer.config == WIDE
    made = convert(tmp_path / "source", tmp_path / "a")
    assert made.networks == WORDS and [p.name for p in (tmp_path / "a").glob("*.gguf")] == ["flux1.gguf"]
    miniflux.load(tmp_path / "a")
    made = convert(tmp_path / "source", tmp_path / "b", layout="diffusers", format="bfloat16")
    assert made.networks == WORDS and not made.missing and (tmp_path / "b" / "model_index.json").is_file()
    made = convert(tmp_path / "source", tmp_path / "c", layout="diffusers")
    assert made.networks == WORDS and "GGUF Q8_0" in made.missing["weights that are not packed"]
    with pytest.raises(InputError, match="GGUF Q8_0 is not in .safetensors files"):
        convert(tmp_path / "source", tmp_path / "d.safetensors", layout="all-in-one")
    made = convert(tmp_path / "source", tmp_path / "e", format="Q8_0")  # all that can be packed
    assert made.networks == WORDS and len(list((tmp_path / "e").rglob("*.gguf"))) == 3
    miniflux.load(tmp_path / "e")


def test_two_transformers_that_differ_are_refused_by_name(tmp_path: Path) -> None:
    mixed(tmp_path / "source")
    save(randomise(Flux1(WIDE), 5), tmp_path / "source" / "another.safetensors")
    for target, layout in TARGETS:
        with pytest.raises(
            CheckpointError,
            match=r"holds the transformer twice, .*another.safetensors and .*flux1-mine.safetensors, wh",
        ):
            convert(tmp_path / "source", tmp_path / target, layout=layout)
        assert not (tmp_path / target).exists()


def test_what_is_no_network_of_a_pipeline_is_named(tmp_path: Path) -> None:
    """LoRAs, the decoder for previews, variants of a file, networks that are known by name only."""
    source = tmp_path / "source"
    mixed(source)
    save(TinyDecoder(TINY), source / "taef1_decoder.safetensors")
    (source / "loras").mkdir()
    key = "transformer.single_transformer_blocks.0.attn.to_q.lora_{}.weight"
    save_file(
        {key.format("A"): torch.ones(2, 32), key.format("B"): torch.ones(32, 2)}, source / "loras" / "a.safetensors"
    )
    save_file(
        {"redux_up.weight": torch.ones(4, 2), "redux_down.weight": torch.ones(2, 4)}, source / "redux.safetensors"
    )
    shutil.copy(source / "ae.safetensors", source / "ae.fp16.safetensors")
    made = convert(source, tmp_path / "made", layout="diffusers")
    assert made.networks == WORDS
    assert made.left_out == {
        "ae.fp16.safetensors": "a variant of ae.safetensors",
        "loras/a.safetensors": "a LoRA is converted by itself: miniflux lora convert",
        "redux.safetensors": "a Redux image encoder of another size, for conditions.load",
        "taef1_decoder.safetensors": "the tiny decoder is for previews; a pipeline has no place for it",
    }
    assert all(f"left out: {name} (" in str(made) for name in made.left_out)


def test_a_file_that_nobody_knows_is_refused_by_name(tmp_path: Path) -> None:
    mixed(tmp_path / "source")
    save_file({"x": torch.ones(1)}, tmp_path / "source" / "what.safetensors")
    with pytest.raises(CheckpointError, match=r"what\.safetensors: no network known here"):
        convert(tmp_path / "source", tmp_path / "made", layout="diffusers")
    (tmp_path / "source" / "what.safetensors").write_bytes(b"<html>a page</html>")
    with pytest.raises(CheckpointError, match=r"what\.safetensors: not a safetensors file"):
        convert(tmp_path / "source", tmp_path / "made", layout="diffusers")


@pytest.mark.parametrize("absent", NETWORKS)
def test_only_some_parts(absent: str, tmp_path: Path) -> None:
    """Those that are there are written, and what is missing for a pipeline is said."""
    folders(tmp_path / "source")
    shutil.rmtree(tmp_path / "source" / absent)
    made = convert(tmp_path / "source", tmp_path / "made", layout="diffusers")
    word = WORDS[list(NETWORKS).index(absent)]
    assert made.networks == [w for w in WORDS if w != word]
    assert set(made.missing) == {word, "tokenizer", "tokenizer_2"}
    assert f"missing for a whole pipeline: {word} (not in what was converted)" in str(made)
    assert not (tmp_path / "made" / "model_index.json").exists()


def test_sizes_that_the_file_does_not_tell(tmp_path: Path) -> None:
    """A text encoder of an unknown size, without config and header: heads cannot be counted, and are not made up."""
    mixed(tmp_path / "source")
    save_file(dict(NETWORKS["text_encoder"].state_dict()), tmp_path / "source" / "text_encoder" / "model.safetensors")
    made = convert(tmp_path / "source", tmp_path / "made", layout="diffusers")
    assert "the number of its heads is not in" in made.missing["text_encoder/config.json"]
    assert not (tmp_path / "made" / "text_encoder" / "config.json").exists()
    config = {**vars(NETWORKS["text_encoder"].config), "mine": 1}
    (tmp_path / "source" / "text_encoder" / "config.json").write_text(json.dumps(config))
    made = convert(tmp_path / "source", tmp_path / "again", layout="diffusers")
    found = json.loads((tmp_path / "again" / "text_encoder" / "config.json").read_text())
    assert (found["num_attention_heads"], found["mine"]) == (3, 1) and "text_encoder/config.json" not in made.missing


def test_a_scheduler_of_its_own_is_kept(tmp_path: Path) -> None:
    """A model that shifts though it takes no guidance."""
    mixed(tmp_path / "source")
    (tmp_path / "source" / "scheduler").mkdir()
    about = {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": False, "shift": 1.0, "mine": 2}
    (tmp_path / "source" / "scheduler" / "scheduler_config.json").write_text(json.dumps(about))
    for layout in ("diffusers", "original", None):
        out = tmp_path / f"{layout}"
        convert(tmp_path / "source", out, layout=layout)
        assert json.loads((out / "scheduler" / "scheduler_config.json").read_text()) == about


def test_an_all_in_one_file_beside_other_parts(tmp_path: Path) -> None:
    """One that lacks T5, which lies in a folder beside it."""
    source = tmp_path / "source"
    singles(tmp_path / "parts")
    (tmp_path / "parts" / SINGLE["text_encoder_2"]).unlink()
    source.mkdir()
    convert(tmp_path / "parts", source / "one.safetensors", layout="all-in-one")
    put(source, "text_encoder_2", "text_encoder_2/model.safetensors")
    for target, layout in TARGETS:
        made = convert(source, tmp_path / f"{layout}-{target}", layout=layout)
        assert made.networks == WORDS and whole(tmp_path / f"{layout}-{target}")
    assert load_file(tmp_path / "all-in-one-made.safetensors")
