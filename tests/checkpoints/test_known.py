"""Files that cannot be loaded are named for what they are, from their headers alone; and what is wrong with data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import miniflux
from miniflux.apps.cli import main
from miniflux.checkpoints import inspect, open_tensors, save
from miniflux.checkpoints.by_name import found_by_name
from miniflux.checkpoints.files import TensorFile
from miniflux.checkpoints.loading import bare
from miniflux.checkpoints.networks.known import KNOWN
from miniflux.checkpoints.writing import write_tensors
from miniflux.errors import CheckpointError
from miniflux.inspection import Part
from miniflux.lora import read
from miniflux.models.autoencoder import Autoencoder
from miniflux.models.clip import ClipTextEncoder
from miniflux.models.flux1 import Flux1
from miniflux.models.t5 import T5Encoder
from miniflux.weights.finding import BUNDLED
from tests import reference
from tests.checkpoints.raw import sparse
from tests.hanging import no_hang
from tests.lora.made import FLUX1_DIALECTS, FLUX2_DIALECTS
from tests.test_inspection import PUBLISHED
from tests.tiny import AUTOENCODER, CLIP, FLUX1, T5, randomise

Manifest = Callable[[str], dict[str, list[int]]]
KLEIN = "FLUX.2 klein 4B transformer, not loadable yet"

NAMED = {
    "bfl-flux2-dev": ("FLUX.2 transformer", "FLUX.2 dev transformer", "original"),
    "bfl-flux2-klein-4b": ("FLUX.2 transformer", "FLUX.2 klein 4B transformer", "original"),
    "bfl-flux2-klein-9b": ("FLUX.2 transformer", "FLUX.2 klein 9B transformer", "original"),
    "diffusers-flux2-dev": ("FLUX.2 transformer", "FLUX.2 dev transformer", "diffusers"),
    "diffusers-flux2-klein-4b": ("FLUX.2 transformer", "FLUX.2 klein 4B transformer", "diffusers"),
    "diffusers-flux2-klein-9b": ("FLUX.2 transformer", "FLUX.2 klein 9B transformer", "diffusers"),
    "bfl-flux3": ("FLUX.3 transformer", "FLUX.3 klein base transformer", "original"),
    "bfl-flux3-distilled": ("FLUX.3 transformer", "FLUX.3 klein transformer", "original"),
    "diffusers-flux3": ("FLUX.3 transformer", "FLUX.3 klein base transformer", "diffusers"),
    "diffusers-flux3-distilled": ("FLUX.3 transformer", "FLUX.3 klein transformer", "diffusers"),
    "bfl-flux2-ae": ("FLUX.2 autoencoder", "FLUX.2 autoencoder, 32 latent channels", "original"),
    "diffusers-flux2-vae": ("FLUX.2 autoencoder", "FLUX.2 autoencoder, 32 latent channels", "diffusers"),
    "diffusers-controlnet-5-0-single-mode": ("ControlNet", "FLUX.1 ControlNet, 5 + 0 blocks", "diffusers"),
    "diffusers-controlnet-instantx-union": (
        "ControlNet",
        "FLUX.1 ControlNet, 5 + 10 blocks, union of 10 modes",
        "diffusers",
    ),
    "diffusers-controlnet-shakker-depth": ("ControlNet", "FLUX.1 ControlNet, 5 + 10 blocks", "diffusers"),
    "diffusers-controlnet-shakker-union-pro-2": ("ControlNet", "FLUX.1 ControlNet, 6 + 0 blocks", "diffusers"),
    "xlabs-flux-controlnet-v3": ("ControlNet", "FLUX.1 ControlNet of XLabs, 2 blocks", "XLabs"),
    "xlabs-flux-ip-adapter": ("IP-Adapter", "FLUX.1 IP-Adapter for 19 double blocks", "XLabs"),
    "bfl-flux1-redux-dev": ("Redux", "flux1-redux-dev, image encoder of FLUX.1", "original"),
    "diffusers-redux-image-encoder": ("Redux", "flux1-redux-dev, image encoder of FLUX.1", "original"),
    "te-siglip-so400m-patch14-384-vision": (
        "SigLIP",
        "SigLIP so400m patch14 384, image encoder of Redux",
        "transformers",
    ),
    "te-qwen3-4b": ("Qwen3", "Qwen3 4B, text encoder of FLUX.2 klein 4B", "transformers"),
    "te-qwen3-8b": ("Qwen3", "Qwen3 8B, text encoder of FLUX.2 klein 9B", "transformers"),
    "te-qwen3-vl-4b-language-model": ("Qwen3-VL", "Qwen3-VL 4B, text encoder of FLUX.3 klein", "transformers"),
    "te-mistral-small-24b-language-model": (
        "Mistral",
        "Mistral Small 3 24B, text encoder of FLUX.2 dev",
        "transformers",
    ),
}
STEERING = {"ControlNet", "IP-Adapter", "Redux", "SigLIP"}
IP_ADAPTER = {f"ip_adapter.{i}.to_k_ip.weight": [8, 4] for i in range(3)} | {"image_proj.proj.weight": [16, 4]}


@pytest.fixture
def headers_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor may be read."""

    def refuse(*_: object) -> Any:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(TensorFile, "view", refuse)
    monkeypatch.setattr(TensorFile, "read", refuse)


@pytest.mark.usefixtures("headers_only")
@pytest.mark.parametrize("name", NAMED)
def test_published_files_are_named(name: str, manifest: Manifest, tmp_path: Path) -> None:
    """By keys and shapes, in both layouts, also behind a prefix."""
    network, variant, layout = NAMED[name]
    for prefix in ("", "model.diffusion_model."):
        shapes = {prefix + key: shape for key, shape in manifest(name).items()}
        path = sparse(tmp_path / "a.safetensors", shapes)
        (part,) = inspect(path).parts
        use = "for conditions.load" if network in STEERING else "not loadable yet"
        assert (part.network, part.variant, part.layout) == (network, f"{variant}, {use}", layout)
        assert part.tensors == len(shapes) and part.problems == []
        assert part.path == (f"{path} ({prefix}*)" if prefix else str(path))


def test_every_manifest_is_tested() -> None:
    """Nothing that was published for the family is left out, here and where loadable files are named."""
    assert reference.names("manifests") == set(NAMED) | set(PUBLISHED) | {"bfl-flux1-canny-dev-lora"}


def test_the_control_lora_is_no_transformer(manifest: Manifest, tmp_path: Path) -> None:
    (part,) = inspect(sparse(tmp_path / "a.safetensors", manifest("bfl-flux1-canny-dev-lora"))).parts
    assert (part.network, part.variant, part.layout) == ("LoRA", "for flux1-canny-dev or flux1-depth-dev", "BFL")


@pytest.mark.usefixtures("headers_only")
@pytest.mark.parametrize("name", ["bfl-flux1-dev", "diffusers-flux1-dev"])
def test_a_file_of_24_gb_is_told_from_its_header(name: str, manifest: Manifest, tmp_path: Path) -> None:
    path = sparse(tmp_path / "a.safetensors", manifest(name))
    assert path.stat().st_size > 23_800_000_000
    with no_hang():
        assert inspect(path).parts[0].problems == []


def test_networks_without_first_weights() -> None:
    """`bare` gives what the class gives on the meta device."""
    for kind, config in ((Flux1, FLUX1), (Autoencoder, AUTOENCODER), (ClipTextEncoder, CLIP), (T5Encoder, T5)):
        network = bare(kind, config)
        with torch.device("meta"):
            expected = kind(config)
        assert [(key, t.shape, t.dtype, t.device) for key, t in network.state_dict().items()] == [
            (key, t.shape, t.dtype, t.device) for key, t in expected.state_dict().items()
        ]


def test_other_sizes_and_damaged_files(manifest: Manifest, tmp_path: Path) -> None:
    def variant(shapes: dict[str, list[int]]) -> str:
        return inspect(sparse(tmp_path / "a.safetensors", shapes)).parts[0].variant

    shapes = manifest("bfl-flux2-klein-4b")
    assert variant({key: shape for key, shape in shapes.items() if not key.startswith("double_blocks.4.")}) == (
        "a FLUX.2 transformer of another size (hidden size 3072, 4 + 20 blocks), not loadable yet"
    )
    assert variant({k: s for k, s in shapes.items() if k != "txt_in.weight"}) == (
        "an incomplete FLUX.2 transformer, not loadable yet"
    )
    for name, end in (("bfl-flux3", "txt_in.weight"), ("diffusers-flux3", "context_embedder.weight")):
        shapes = {k: s for k, s in manifest(name).items() if "txt_mode_blocks.4." not in k}
        assert (
            variant(shapes)
            == "a FLUX.3 transformer of another size (hidden size 3072, 4 + 28 blocks), not loadable yet"
        )
        assert (
            variant({k: s for k, s in shapes.items() if k != end})
            == "an incomplete FLUX.3 transformer, not loadable yet"
        )
    assert variant(IP_ADAPTER) == "FLUX.1 IP-Adapter for 3 double blocks, for conditions.load"
    assert variant({"redux_up.weight": [8, 4], "redux_down.weight": [4, 8]}).startswith("a Redux image encoder of")
    layer = {"layers.0.self_attn.q_proj.weight": [4, 4], "embed_tokens.weight": [9, 4]}
    assert variant(layer) == "a language model of 1 layers of width 4, not loadable yet"
    assert variant({"bn.running_mean": [4], "quant_conv.weight": [4]}).startswith("an incomplete FLUX.2 autoencoder")


def test_files_of_several_networks(manifest: Manifest, tmp_path: Path) -> None:
    """FLUX.2 all in one, and FLUX.1 with something unknown beside it."""
    prefixes = {
        "model.diffusion_model.": "bfl-flux2-klein-4b",
        "text_encoders.qwen3_4b.transformer.": "te-qwen3-4b",
        "vae.": "bfl-flux2-ae",
    }
    shapes = {prefix + key: shape for prefix, name in prefixes.items() for key, shape in manifest(name).items()}
    parts = {part.network: part for part in inspect(sparse(tmp_path / "a.safetensors", shapes)).parts}
    assert set(parts) == {"FLUX.2 transformer", "FLUX.2 autoencoder", "Qwen3"}
    for (prefix, name), network in zip(
        prefixes.items(), ("FLUX.2 transformer", "Qwen3", "FLUX.2 autoencoder"), strict=True
    ):
        assert parts[network].tensors == len(manifest(name)) and f"({prefix}*)" in parts[network].path

    shapes = {f"model.diffusion_model.{key}": shape for key, shape in manifest("bfl-flux1-schnell").items()}
    shapes |= {f"vae.{key}": shape for key, shape in manifest("bfl-flux1-ae").items()} | {"extra": [3]}
    first, second = inspect(sparse(tmp_path / "a.safetensors", shapes)).parts
    assert (first.network, second.network) == ("Flux1", "Autoencoder")
    assert first.problems == ["unused: extra", "missing beside it: CLIP text encoder, T5 encoder"]
    assert first.bytes == 2 * first.parameters == 2 * 11_891_178_560 and second.parameters == 83_819_683


def test_keys_of_two_networks_without_prefixes(tmp_path: Path) -> None:
    parts = inspect(sparse(tmp_path / "a.safetensors", {"img_in.weight": [], "decoder.conv_in.weight": []})).parts
    assert sum(part.tensors for part in parts) == 2 and all(part.problems for part in parts)


def test_they_are_refused_by_name(manifest: Manifest, tmp_path: Path) -> None:
    """klein files are taken for dev elsewhere."""
    path = sparse(tmp_path / "flux1-dev.safetensors", manifest("bfl-flux2-klein-4b"))
    with pytest.raises(CheckpointError, match=f"no FLUX.1 transformer, but {KLEIN}"):
        miniflux.load(path)


@pytest.mark.usefixtures("headers_only")
@pytest.mark.parametrize("name", [*(f"flux1-{n}" for n in FLUX1_DIALECTS), *(f"flux2-{n}" for n in FLUX2_DIALECTS)])
def test_lora_files_are_told_by_their_dialect(name: str, tmp_path: Path) -> None:
    about = reference.dialect(name)
    shapes = {key: t["shape"] for key, t in (about.get("full") or about["tiny"])["tensors"].items()}
    meta = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    (part,) = inspect(sparse(tmp_path / "a.safetensors", shapes)).parts
    assert (part.network, part.layout, part.problems) == ("LoRA", read(meta).dialect, [])
    if "full" in about:
        family = "for FLUX.2 " if about["family"] == "flux2" else "for flux1-"
        assert part.variant.startswith(family) and ("FLUX.2" in part.variant) == (about["family"] == "flux2")
        assert ("CLIP" in part.variant, "T5" in part.variant) == (
            any("te1" in key or "text_encoder." in key for key in shapes),
            any("te3" in key or "te2" in key or "text_encoder_2" in key for key in shapes),
        )
    else:
        assert "are those of no model known here" in part.variant


def test_damaged_lora_files(tmp_path: Path) -> None:
    half = {"lora_unet_img_in.lora_down.weight": [4, 64]}
    (part,) = inspect(sparse(tmp_path / "a.safetensors", half)).parts
    assert (part.network, part.variant) == ("LoRA", "unknown") and "lacks its up" in part.problems[0]
    pair = {"lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": [4, 768]}
    pair |= {"lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": [3072, 4], "strange": [1]}
    (part,) = inspect(sparse(tmp_path / "a.safetensors", pair)).parts
    assert (part.variant, part.layout, part.problems) == ("for text encoders only (CLIP)", "kohya", ["unused: strange"])


KEYS = [
    *sorted({sign for known in KNOWN for one in known.spellings for sign in one.signs} - {"img_in.weight"}),
    *(
        "img_in.lora_A.weight",
        "img_in.lora_B.weight",
        "lora_unet_img_in.lora_down.weight",
        "a.lokr_w1_a",
        "a.lokr_w1_b",
    ),
    *("lora_unet_img_in.diff", "lora_unet_img_in.lokr_w1", "lora_unet_img_in.lokr_w2", "lora_unet_img_in.alpha"),
    *("lora_unet_img_in.hada_w1_a", "context_embedder.weight", "controlnet_mode_embedder.weight"),
    *("vision_model.embeddings.patch_embedding.weight", "transformer_blocks.0.x"),
]


@settings(max_examples=150)
@given(shapes=st.dictionaries(st.sampled_from(KEYS), st.lists(st.integers(0, 5), max_size=4), min_size=1, max_size=9))
def test_any_shapes_are_told_as_something(
    shapes: dict[str, list[int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "shapes.safetensors"
    path.unlink(missing_ok=True)
    parts = inspect(sparse(path, shapes)).parts
    assert sum(part.tensors for part in parts) == len(shapes) and all(part.variant for part in parts)
    assert len(found_by_name(open_tensors(path).entries)) <= len(parts)


def told(path: Path, data: bool) -> list[Part]:
    return inspect(path, data=data).parts


def test_data_are_read_if_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN, infinity and weights that are all zero, in every tensor, each read once."""
    module = randomise(Autoencoder(AUTOENCODER))
    tensors = dict(module.state_dict())
    names = [key for key in tensors if key.endswith("weight")]
    zero, nan, infinite, bias = names[0], names[1], names[-1], names[2].replace("weight", "bias")
    tensors[zero] = torch.zeros_like(tensors[zero]).bfloat16()
    tensors[bias] = torch.zeros_like(tensors[bias])  # as training leaves many
    tensors[nan] = tensors[nan].clone().index_fill_(0, torch.tensor([0]), torch.nan)
    tensors[infinite] = torch.full_like(tensors[infinite], torch.inf).half()
    path = tmp_path / "a.safetensors"
    write_tensors(path, tensors, {})
    count: list[str] = []
    original = TensorFile.read
    monkeypatch.setattr(TensorFile, "read", lambda file, key, *rest: (count.append(key), original(file, key, *rest))[1])
    before = told(path, data=False)[0].problems
    assert not count
    problems = [problem for problem in told(path, data=True)[0].problems if problem not in before]
    assert sorted(problems) == sorted(
        [f"all zero: {zero}", *(f"not finite (NaN or infinite): {key}" for key in (nan, infinite))]
    )
    assert sorted(count) == sorted(tensors)


def test_the_data_of_the_bundled_models_are_sound(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "--data", "--json", str(BUNDLED / "flux1-nano-schnell.safetensors")]) == 0
    (part,) = json.loads(capsys.readouterr().out)
    assert (part["variant"], part["problems"]) == ("nano-schnell", [])


def test_what_a_folder_lacks_is_said(tmp_path: Path) -> None:
    for name, module in (("transformer", Flux1(FLUX1)), ("text_encoder", ClipTextEncoder(CLIP))):
        (tmp_path / name).mkdir()
        save(module, tmp_path / name / "model.safetensors")
    (tmp_path / "tokenizer").mkdir()
    first = inspect(tmp_path).parts[0]
    assert first.problems == ["missing beside it: autoencoder, T5 encoder, tokenizer_2"]
    save(Autoencoder(AUTOENCODER), tmp_path / "ae.safetensors")  # a single file beside the folders counts
    assert inspect(tmp_path).parts[0].problems[-1] == "missing beside it: T5 encoder, tokenizer_2"
    assert not any(
        "missing beside" in problem for part in inspect(tmp_path / "transformer").parts for problem in part.problems
    )


def test_a_folder_of_single_files(tmp_path: Path) -> None:
    save(Flux1(FLUX1), tmp_path / "one.safetensors")
    save(T5Encoder(T5), tmp_path / "two.safetensors")
    assert [part.network for part in inspect(tmp_path).parts] == ["Flux1", "T5Encoder"]
