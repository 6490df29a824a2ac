"""Files that cannot be loaded are named for what they are, from their headers alone; and what is wrong with data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import miniflux
from miniflux.apps.cli import main
from miniflux.checkpoints import inspect, open_tensors, save
from miniflux.checkpoints.by_name import found_by_name
from miniflux.checkpoints.files import TensorFile
from miniflux.checkpoints.loading import bare, compare
from miniflux.checkpoints.networks import BY_CONFIG
from miniflux.checkpoints.networks.known import KNOWN
from miniflux.checkpoints.writing import write_tensors
from miniflux.errors import WeightsNotFoundError
from miniflux.inspection import Part, fits
from miniflux.lora import read
from miniflux.models.autoencoder import Autoencoder
from miniflux.models.clip import ClipTextEncoder
from miniflux.models.flux1 import Flux1
from miniflux.models.t5 import T5Encoder
from miniflux.variants import VARIANTS
from miniflux.weights.finding import BUNDLED
from tests import reference
from tests.checkpoints.raw import sparse
from tests.hanging import no_hang
from tests.lora.made import FLUX1_DIALECTS, FLUX2_DIALECTS
from tests.test_inspection import KLEIN_4B, PUBLISHED
from tests.tiny import AUTOENCODER, CLIP, FLUX1, FLUX2, FLUX2_AUTOENCODER, FLUX3, LM, T5, randomise

Manifest = Callable[[str], dict[str, list[int]]]

NAMED = {
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
}
IP_ADAPTER = {f"ip_adapter.{i}.to_k_ip.weight": [8, 4] for i in range(3)} | {"image_proj.proj.weight": [16, 4]}


@pytest.mark.usefixtures("headers_only")
@pytest.mark.parametrize("name", NAMED)
def test_published_files_are_named(name: str, manifest: Manifest, tmp_path: Path) -> None:
    """By keys and shapes, in both layouts, also behind a prefix."""
    network, variant, layout = NAMED[name]
    for prefix in ("", "model.diffusion_model."):
        shapes = {prefix + key: shape for key, shape in manifest(name).items()}
        path = sparse(tmp_path / "a.safetensors", shapes)
        (part,) = inspect(path).parts
        assert (part.network, part.variant, part.layout) == (network, f"{variant}, for conditions.load", layout)
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
    for config in (FLUX1, FLUX2, FLUX3, AUTOENCODER, FLUX2_AUTOENCODER, CLIP, T5, LM):
        kind = BY_CONFIG[type(config)].kind
        network = bare(kind, config)
        with torch.device("meta"):
            expected = kind(config)
        assert [(key, t.shape, t.dtype, t.device) for key, t in network.state_dict().items()] == [
            (key, t.shape, t.dtype, t.device) for key, t in expected.state_dict().items()
        ]


def test_other_sizes_and_damaged_files(manifest: Manifest, tmp_path: Path) -> None:
    def told(shapes: dict[str, list[int]]) -> tuple[list[str], str]:
        (part,) = inspect(sparse(tmp_path / "a.safetensors", shapes)).parts
        return part.problems, part.variant

    def variant(shapes: dict[str, list[int]]) -> str:
        return told(shapes)[1]

    for whose, block in (("bfl", "double_blocks.4."), ("diffusers", "transformer_blocks.4.")):
        name = f"{whose}-flux2-klein-4b"
        end = "txt_in.weight" if whose == "bfl" else "context_embedder.weight"
        shapes = {key: shape for key, shape in manifest(name).items() if not key.startswith(block)}
        assert variant(shapes) == (
            "a FLUX.2 of another size (in_channels 128, hidden size 3072, 4 + 20 blocks, without guidance input)"
        )
        incomplete, closest = told({k: s for k, s in manifest(name).items() if k != end})
        assert incomplete == [f"missing: txt_in.weight{'' if end == 'txt_in.weight' else f' (here: {end})'}"]
        assert closest == f"none known; closest is {KLEIN_4B}"
    for name, end in (("bfl-flux3", "txt_in.weight"), ("diffusers-flux3", "context_embedder.weight")):
        blocks = {k: s for k, s in manifest(name).items() if "mode_blocks.4." not in k and ".image_cond.4." not in k}
        shapes = {k: s for k, s in blocks.items() if ".image.4." not in k}
        assert variant(shapes) == (
            "a FLUX.3 of another size (in_channels 128, hidden size 3072, 4 + 28 blocks, without guidance input)"
        )
        incomplete, closest = told({k: s for k, s in manifest(name).items() if k != end})
        assert incomplete == [f"missing: txt_in.weight{'' if end == 'txt_in.weight' else f' (here: {end})'}"]
        assert closest == "none known; closest is flux3-klein-base"
    assert variant(IP_ADAPTER) == "FLUX.1 IP-Adapter for 3 double blocks, for conditions.load"
    assert variant({"redux_up.weight": [8, 4], "redux_down.weight": [4, 8]}).startswith("a Redux image encoder of")
    layer = {"layers.0.mlp.gate_proj.weight": [4, 4], "embed_tokens.weight": [9, 4]}
    (part,) = inspect(sparse(tmp_path / "a.safetensors", layer)).parts
    assert (part.network, part.layout) == ("CausalLm", "bare") and part.variant.startswith("none known; closest is")
    assert part.problems[0].startswith("missing: model.layers.0.input_layernorm.weight ")
    assert part.problems[0].endswith(" more")
    (part,) = inspect(sparse(tmp_path / "a.safetensors", {"bn.running_mean": [4], "quant_conv.weight": [4]})).parts
    assert part.network == "Flux2Autoencoder" and part.variant.startswith("none known; closest is nano2 or nano3")
    assert part.problems[0].startswith("missing: ") and part.problems[0].endswith(" more")


def test_files_of_several_networks(manifest: Manifest, tmp_path: Path) -> None:
    """FLUX.2 all in one, and FLUX.1 with something unknown beside it."""
    prefixes = {
        "model.diffusion_model.": "bfl-flux2-klein-4b",
        "text_encoders.qwen3_4b.transformer.": "te-qwen3-4b",
        "vae.": "bfl-flux2-ae",
    }
    shapes = {prefix + key: shape for prefix, name in prefixes.items() for key, shape in manifest(name).items()}
    found = inspect(sparse(tmp_path / "a.safetensors", shapes)).parts
    parts = {part.network: part for part in found}
    assert len(found) == len(parts) == 3 and not any(part.problems for part in found)  # it is a whole model
    for (prefix, name), network in zip(prefixes.items(), ("Flux2", "CausalLm", "Flux2Autoencoder"), strict=True):
        assert parts[network].tensors == len(manifest(name)) and f"({prefix}*)" in parts[network].path
        assert KLEIN_4B in parts[network].variant

    shapes = {f"model.diffusion_model.{key}": shape for key, shape in manifest("bfl-flux1-schnell").items()}
    shapes |= {f"vae.{key}": shape for key, shape in manifest("bfl-flux1-ae").items()} | {"extra": [3]}
    first, second = inspect(sparse(tmp_path / "a.safetensors", shapes)).parts
    assert (first.network, second.network) == ("Flux1", "Autoencoder")
    assert first.problems == ["unused: extra", "missing beside it: CLIP text encoder, T5 encoder"]
    assert first.bytes == 2 * first.parameters == 2 * 11_891_178_560 and second.parameters == 83_819_683


def test_keys_of_two_networks_without_prefixes(tmp_path: Path) -> None:
    parts = inspect(sparse(tmp_path / "a.safetensors", {"img_in.weight": [], "decoder.conv_in.weight": []})).parts
    assert sum(part.tensors for part in parts) == 2 and all(part.problems for part in parts)


@pytest.mark.parametrize("layout", ["bfl", "diffusers"])
def test_a_file_is_what_its_tensors_are(
    layout: str, manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """klein files are taken for dev elsewhere; here neither by a name nor by a wish."""
    monkeypatch.delenv("MINIFLUX_WEIGHTS", raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "no cache"))
    for name, file, other in (
        ("flux2-klein-4b", "flux1-dev", "flux1-dev"),
        ("flux2-klein-4b", "flux2-dev", "flux2-dev"),
        ("flux3", "flux1-dev", "flux1-dev"),
    ):
        path = sparse(tmp_path / f"{file}.safetensors", manifest(f"{layout}-{name}"))
        meant = "flux3-klein-base" if name == "flux3" else name
        with pytest.raises(WeightsNotFoundError, match=f"^{meant}: not on this machine: autoencoder"):
            miniflux.load(path)
        source = open_tensors(path)
        assert not fits(source, VARIANTS[other].transformer) and fits(source, VARIANTS[meant].transformer)
        refused = compare(bare(BY_CONFIG[type(VARIANTS[other].transformer)].kind, VARIANTS[other].transformer), source)
        assert refused.missing and (refused.unused or refused.misshapen)
        path.unlink()


@pytest.mark.usefixtures("headers_only")
@pytest.mark.parametrize("name", [*(f"flux1-{n}" for n in FLUX1_DIALECTS), *(f"flux2-{n}" for n in FLUX2_DIALECTS)])
def test_lora_files_are_told_by_their_dialect(name: str, tmp_path: Path) -> None:
    about = reference.dialect(name)
    shapes = {key: t["shape"] for key, t in (about.get("full") or about["tiny"])["tensors"].items()}
    meta = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    (part,) = inspect(sparse(tmp_path / "a.safetensors", shapes)).parts
    assert (part.network, part.layout, part.problems) == ("LoRA", read(meta).dialect, [])
    if "full" in about:
        fits = "flux2-dev" if name == "flux2-dev-diffusers-peft" else KLEIN_4B
        if about["family"] == "flux2":
            assert part.variant == f"for {fits}"
        else:
            assert part.variant.startswith("for flux1-") and "flux2" not in part.variant
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


def parts(path: Path, data: bool) -> list[Part]:
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
    before = parts(path, data=False)[0].problems
    assert not count
    problems = [problem for problem in parts(path, data=True)[0].problems if problem not in before]
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
