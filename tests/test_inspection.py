"""What a file is, told from its header: published files at full size, which are holes on the disk."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import miniflux
from miniflux.checkpoints import convert, inspect, layouts_of, open_tensors, save, to_layout
from miniflux.checkpoints.configs import config_of_transformer, in_header
from miniflux.checkpoints.loading import bare
from miniflux.checkpoints.networks import BY_CONFIG, BY_KIND, NETWORKS
from miniflux.errors import CheckpointError
from miniflux.inspection import describe, fits
from miniflux.lora import attach, merge_files, read
from miniflux.models.autoencoder import Autoencoder, Flux2Autoencoder
from miniflux.models.causal_lm import CausalLm
from miniflux.models.clip import ClipTextEncoder
from miniflux.models.flux1 import Flux1, Flux1Config
from miniflux.models.flux2 import Flux2
from miniflux.models.flux3 import Flux3
from miniflux.models.t5 import T5Encoder
from miniflux.models.vision import ClipVision, SiglipVision
from miniflux.variants import CLIP_VIT_L14, VARIANTS
from miniflux.weights.finding import BUNDLED
from tests.checkpoints.raw import sparse
from tests.tiny import AUTOENCODER, CLIP, FLUX1, FLUX2, FLUX2_AUTOENCODER, FLUX3, LM, T5

Manifest = Callable[[str], dict[str, list[int]]]
DEV = "flux1-dev or flux1-krea-dev or flux1-kontext-dev"
OFFICIAL = " or ".join(
    name for name in VARIANTS if name.startswith("flux1")
)  # they share text encoders and autoencoder
CANNY = "flux1-canny-dev or flux1-depth-dev"
KLEIN_4B = "flux2-klein-4b or flux2-klein-base-4b"
KLEIN_9B = "flux2-klein-9b or flux2-klein-base-9b or flux2-klein-9b-kv"
FLUX3_KLEIN = "flux3-klein or flux3-klein-base"
FLUX2_AND_3 = f"flux2-dev or {KLEIN_4B} or {KLEIN_9B} or {FLUX3_KLEIN}"  # one autoencoder for all

# manifest: network, variant, layout, parameters where they were published or can be counted by hand
PUBLISHED = {
    "bfl-flux1-dev": ("Flux1", DEV, "original", 11_901_408_320),
    "bfl-flux1-schnell": ("Flux1", "flux1-schnell", "original", 11_891_178_560),
    "bfl-flux1-fill-dev": ("Flux1", "flux1-fill-dev", "original", 11_901_408_320 + 320 * 3072),
    "bfl-flux1-canny-dev": ("Flux1", CANNY, "original", 11_901_408_320 + 64 * 3072),
    "diffusers-flux1-dev": ("Flux1", DEV, "diffusers", 11_901_408_320),
    "diffusers-flux1-schnell": ("Flux1", "flux1-schnell", "diffusers", 11_891_178_560),
    "diffusers-flux1-fill-dev": ("Flux1", "flux1-fill-dev", "diffusers", 11_901_408_320 + 320 * 3072),
    "diffusers-flux1-canny-dev": ("Flux1", CANNY, "diffusers", 11_901_408_320 + 64 * 3072),
    "bfl-flux1-ae": ("Autoencoder", OFFICIAL, "original", 83_819_683),
    "diffusers-flux1-vae": ("Autoencoder", OFFICIAL, "diffusers", 83_819_683),
    "te-clip-l": ("ClipTextEncoder", OFFICIAL, "original", 123_060_480),
    "te-t5-xxl": ("T5Encoder", OFFICIAL, "original", 4_762_310_656),
    **{
        f"{whose}-{name}": (network, variant, layout, parameters)
        for whose, layout in (("bfl", "original"), ("diffusers", "diffusers"))
        for name, network, variant, parameters in (
            ("flux2-dev", "Flux2", "flux2-dev", 32_223_281_152),
            ("flux2-klein-4b", "Flux2", KLEIN_4B, 3_875_544_576),
            ("flux2-klein-9b", "Flux2", KLEIN_9B, 9_078_581_248),
            ("flux3", "Flux3", "flux3-klein-base", 5_538_458_368),
            ("flux3-distilled", "Flux3", "flux3-klein", 5_548_681_984),
        )
    },
    "bfl-flux2-ae": ("Flux2Autoencoder", FLUX2_AND_3, "original", 84_046_372),
    "diffusers-flux2-vae": ("Flux2Autoencoder", FLUX2_AND_3, "diffusers", 84_046_372),
    "te-qwen3-4b": ("CausalLm", KLEIN_4B, "original", 4_022_468_096),
    "te-qwen3-8b": ("CausalLm", KLEIN_9B, "original", 8_190_735_360),
    "te-qwen3-vl-4b-language-model": ("CausalLm", FLUX3_KLEIN, "language model", 4_022_468_096),
    "te-mistral-small-24b-language-model": ("CausalLm", "flux2-dev", "original", 23_572_403_200),
}


@pytest.mark.usefixtures("headers_only")
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_are_named(name: str, manifest: Manifest, tmp_path: Path) -> None:
    """By keys and shapes, also behind a prefix; a klein is never taken for a dev."""
    shapes = manifest(name)
    network, variant, layout, parameters = PUBLISHED[name]
    counts = sum(key.endswith("num_batches_tracked") for key in shapes)  # whole numbers of 8 bytes
    whole = {"int64": counts} if counts else {}
    for prefix in ("", "some.where."):
        path = sparse(tmp_path / "a.safetensors", {prefix + key: shape for key, shape in shapes.items()})
        found = inspect(path)
        (part,) = found.parts
        assert (part.network, part.variant, part.layout, part.problems) == (network, variant, layout, [])
        assert (part.parameters, part.bytes) == (parameters, 2 * parameters + 6 * counts)
        assert part.formats == {"bfloat16": len(shapes) - counts, **whole} and part.tensors == len(shapes)
        for word in (str(path), network, variant, layout, "bfloat16", f"{parameters:,}"):
            assert word in str(found)
        assert part.path == (f"{path} ({prefix}*)" if prefix else str(path))


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_the_config_of_a_transformer_is_read_from_its_shapes(name: str, layout: str, tmp_path: Path) -> None:
    """`miniflux.load(FILE)` builds the network from it."""
    config = VARIANTS[name].transformer
    with torch.device("meta"):
        module = BY_CONFIG[type(config)].kind(config)
    tensors = to_layout(module, module.state_dict(), layout)
    path = sparse(tmp_path / "a.safetensors", {key: list(tensor.shape) for key, tensor in tensors.items()})
    source = open_tensors(path)
    assert config_of_transformer(source.entries, source.metadata) == config
    assert fits(source, config) and not fits(source, replace(config, in_channels=8))


TINY: list[nn.Module] = [
    Flux1(FLUX1),
    Autoencoder(AUTOENCODER),
    ClipTextEncoder(CLIP),
    T5Encoder(T5),
    Flux2(FLUX2),
    Flux3(FLUX3),
    Flux2Autoencoder(FLUX2_AUTOENCODER),
    CausalLm(LM),
]
OTHER_SIZES = {
    Flux1: "a FLUX.1 of another size (in_channels 16, hidden size 32, 2 + 2 blocks, with guidance input)",
    Flux2: "a FLUX.2 of another size (in_channels 16, hidden size 32, 2 + 2 blocks, with guidance input)",
    Flux3: "a FLUX.3 of another size (in_channels 16, hidden size 32, 2 + 3 blocks, without guidance input)",
}
CASES = [(module, layout) for module in TINY for layout in layouts_of(module)]


@pytest.mark.parametrize(("module", "layout"), CASES, ids=[f"{type(m).__name__}, {layout}" for m, layout in CASES])
def test_networks_of_other_sizes(module: nn.Module, layout: str, tmp_path: Path) -> None:
    """The network and the layout are recognised at any size; nobody claims that they are a released model."""
    path = tmp_path / "a.safetensors"
    save(module, path, layout=layout)
    (part,) = inspect(path).parts
    assert (part.network, part.layout) == (type(module).__name__, layout)
    assert part.parameters == sum(tensor.numel() for tensor in module.state_dict().values())
    if type(module) in OTHER_SIZES:
        assert (part.variant, part.problems) == (OTHER_SIZES[type(module)], [])
    else:
        assert part.variant.startswith("of another size than ") and not part.problems


def test_problems_are_listed(manifest: Manifest, tmp_path: Path) -> None:
    """A published file with a tensor too few, one too many and one of another shape."""
    shapes = manifest("bfl-flux1-dev")
    del shapes["double_blocks.7.img_mlp.0.bias"]
    shapes |= {"extra": [5], "final_layer.linear.bias": [65]}
    path = sparse(tmp_path / "a.safetensors", shapes)
    (part,) = inspect(path).parts
    assert (part.network, part.variant, part.layout) == ("Flux1", f"none known; closest is {DEV}", "original")
    assert part.problems == [
        "missing: double_blocks.7.img_mlp.0.bias",
        "unused: extra",
        "misshapen: final_layer.linear.bias: [65] in the file, [64] expected",
    ]
    assert str(inspect(path)).count("  problem     ") == 3


def test_json_is_the_same_for_programs(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save(Autoencoder(AUTOENCODER), path)
    (told,), (part,) = json.loads(inspect(path).json()), inspect(path).parts
    assert told == vars(part) and told["network"] == "Autoencoder" and told["path"] == str(path)


def test_a_file_of_something_else(tmp_path: Path) -> None:
    path = sparse(tmp_path / "a.safetensors", {"lora.down": [4, 8], "lora.up": [8, 4]}, "F16")
    (part,) = inspect(path).parts
    assert (part.network, part.variant, part.layout, part.problems) == ("unknown", "unknown", "unknown", [])
    assert (part.formats, part.tensors, part.parameters, part.bytes) == ({"float16": 2}, 2, 64, 128)


def test_mixed_formats_are_counted(tmp_path: Path) -> None:
    """float8 files keep biases and norms in another dtype."""
    module = Flux1(FLUX1)
    for name, parameter in module.named_parameters():
        parameter.data = parameter.data.to(torch.float8_e4m3fn if name.endswith("weight") else torch.bfloat16)
    save(module, tmp_path / "a.safetensors")
    (part,) = inspect(tmp_path / "a.safetensors").parts
    weights = sum(name.endswith("weight") for name, _ in module.named_parameters())
    assert part.formats == {"float8_e4m3fn": weights, "bfloat16": part.tensors - weights}


def test_a_diffusers_folder_is_told_part_by_part(tmp_path: Path) -> None:
    """Single files beside the folders come first, as in the published repositories."""
    parts = {"transformer": (Flux1(FLUX1), "diffusers"), "vae": (Autoencoder(AUTOENCODER), "diffusers")}
    parts |= {"text_encoder": (ClipTextEncoder(CLIP), "original"), "text_encoder_2": (T5Encoder(T5), "original")}
    for name, (module, layout) in parts.items():
        (tmp_path / name).mkdir()
        save(module, tmp_path / name / "model.safetensors", layout=layout)
    networks = ["Flux1", "Autoencoder", "ClipTextEncoder", "T5Encoder"]
    assert [part.network for part in inspect(tmp_path).parts] == networks
    save(Autoencoder(AUTOENCODER), tmp_path / "ae.safetensors")
    first, *rest = inspect(tmp_path).parts
    assert (first.network, first.layout) == ("Autoencoder", "original") and [part.network for part in rest] == networks
    assert inspect(tmp_path / "vae").parts[0].network == "Autoencoder"


def test_what_cannot_be_inspected(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        inspect(tmp_path / "gone.safetensors")
    with pytest.raises(CheckpointError, match="found none"):
        inspect(tmp_path)
    (tmp_path / "a.safetensors").write_bytes(b"junk")
    with pytest.raises(CheckpointError, match=r"a\.safetensors: 4 bytes are too few"):
        inspect(tmp_path / "a.safetensors")


def shapes_of(config: Flux1Config) -> dict[str, list[int]]:
    with torch.device("meta"):
        return {key: list(tensor.shape) for key, tensor in Flux1(config).state_dict().items()}


HEAD = "single_blocks.0.norm.query_norm.scale"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"img_in.weight": None}, "neither img_in.weight nor x_embedder.weight"),
        ({"txt_in.weight": None, HEAD: None}, f"incomplete FLUX.1 transformer: txt_in.weight, {HEAD} missing"),
        ({"img_in.weight": [32]}, r"shape of img_in.weight \[32\]"),
        ({"img_in.weight": []}, r"shape of img_in.weight \[\]"),
        ({"img_in.weight": [0, 16]}, r"shape of img_in.weight \[0, 16\]"),
        ({HEAD: [0]}, rf"shape of {HEAD} \[0\]"),
        ({HEAD: [128, 1]}, rf"shape of {HEAD} \[128, 1\]"),
        ({HEAD: [7]}, "heads of 7 channels: its rotary axes are not in the file; known are those of heads of 32, 128"),
        ({HEAD: [128]}, "must be even numbers that sum to the head size"),
        ({"img_in.weight": [100, 16], HEAD: [32]}, "hidden_size 100 is not a multiple of num_heads 3"),
    ],
)
def test_a_transformer_that_is_none(change: dict[str, list[int] | None], message: str, tmp_path: Path) -> None:
    """Shapes that make no sense are an error in words, not a division by zero."""
    shapes = {key: shape for key, shape in {**shapes_of(FLUX1), **change}.items() if shape is not None}
    source = open_tensors(sparse(tmp_path / "a.safetensors", shapes))
    with pytest.raises(CheckpointError, match=message):
        config_of_transformer(source.entries, source.metadata)
    assert not fits(source, FLUX1)
    assert isinstance(describe(source), str) and inspect(tmp_path / "a.safetensors").parts


@pytest.mark.parametrize("axes", ["banana", "5", "[]", '["a"]', "[4, 6.0, 6]", "null", "[" * 100_000, "[true, 15]"])
def test_rotary_axes_in_the_header_that_are_none(axes: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save(Flux1(FLUX1), path, metadata={"axes_dim": axes})
    source = open_tensors(path)
    with pytest.raises(CheckpointError, match="axes_dim in the header (must be a JSON list|is no JSON)") as caught:
        config_of_transformer(source.entries, source.metadata)
    assert len(str(caught.value)) < 200


def test_other_networks_are_not_taken_for_known_ones(manifest: Manifest) -> None:
    """A control LoRA or Redux file has names of its own."""
    for name in ("bfl-flux1-redux-dev", "bfl-flux1-canny-dev-lora", "xlabs-flux-ip-adapter"):
        assert not any(sign in manifest(name) for network in NETWORKS for sign in network.signs)


@pytest.mark.parametrize("name", [name for name, (network, *_) in PUBLISHED.items() if network == "CausalLm"])
def test_a_language_model_is_read_up_to_a_layer(name: str, manifest: Manifest, tmp_path: Path) -> None:
    """What comes behind is not needed: all of it is in the part, and a line of the table says how much it is."""
    (part,) = inspect(sparse(tmp_path / "a.safetensors", manifest(name))).parts
    chosen = VARIANTS[PUBLISHED[name][1].partition(" or ")[0]].lm
    assert chosen is not None and chosen.layers_read is not None
    layers = {int(found[1]) for key in part.redundant if (found := re.search(r"layers\.(\d+)\.", key))}
    assert layers == set(range(chosen.layers_read, chosen.num_hidden_layers))
    ends = {key.replace("language_model.", "") for key in part.redundant if "layers." not in key}
    assert ends == {"model.norm.weight"} | ({"lm_head.weight"} if "lm_head.weight" in manifest(name) else set())
    assert set(part.redundant.values()) == {"comes behind the last layer that is read"}
    (line,) = (line for line in str(part).splitlines() if "not needed" in line)
    assert line.endswith(f" and {len(part.redundant) - 1} more: comes behind the last layer that is read")


def test_models_that_have_the_same_shapes(manifest: Manifest, tmp_path: Path) -> None:
    """Qwen3 and Qwen3-VL: the header of a file tells, else whether it sees."""
    path = tmp_path / "a.safetensors"
    for name in ("flux2-klein-4b", "flux3-klein"):
        network = bare(CausalLm, VARIANTS[name].lm)
        shapes = {key: list(tensor.shape) for key, tensor in network.state_dict().items()}
        sparse(path, shapes, metadata=in_header(network))
        (part,) = inspect(path).parts
        assert (part.variant.partition(" or ")[0], part.problems, part.redundant) == (name, [], {})
    sparse(path, manifest("te-qwen3-4b") | {"visual.patch_embed.proj.bias": [1024]})
    (part,) = inspect(path).parts
    assert (part.variant, part.problems) == (FLUX3_KLEIN, [])
    assert part.redundant["visual.patch_embed.proj.bias"] == "sees pictures, and prompts are text"


def test_what_is_not_needed_is_listed(tmp_path: Path) -> None:
    """Tensors that published files carry beside the network's own: with the reason, and no problem."""
    clip = load_file(BUNDLED / "text_encoder" / "model.safetensors")
    save_file({**clip, "logit_scale": torch.ones(())}, tmp_path / "clip.safetensors")
    (part,) = inspect(tmp_path / "clip.safetensors").parts
    assert part.redundant == {"logit_scale": "only for comparing with images"} and not part.problems
    assert "not needed  logit_scale: only for" in str(part)


@pytest.mark.parametrize("call", [miniflux.load, inspect, read, open_tensors,
                                  lambda path: convert(path, "a.safetensors"),
                                  lambda path: attach(miniflux.load("nano"), path),
                                  lambda path: merge_files(path, [], "a.safetensors"),
                                  lambda path: miniflux.load("nano", weights=path)])  # fmt: skip
def test_an_empty_name_is_not_the_folder_we_are_in(call: Callable[[str], Any]) -> None:
    """Python's `Path("")` is `.`."""
    with pytest.raises(CheckpointError, match="the name of a file or folder is empty"):
        call("")


@pytest.mark.parametrize(
    ("network", "said"),
    [
        (CausalLm(LM), "of another size than nano2 or nano3: vocab_size 50 instead of 640, "),
        (CausalLm(replace(LM, qk_norm=False)), "of another size than nano2 or nano3: vocab_size 50 instead of 640, "),
        (Flux2Autoencoder(FLUX2_AUTOENCODER), "of another size than nano2 or nano3: ch 8 instead of 32, "),
        (T5Encoder(T5), "of another size than "),
    ],
    ids=["Qwen3", "Mistral", "autoencoder", "T5"],
)
def test_other_sizes_are_one_line(network: nn.Module, said: str, tmp_path: Path) -> None:
    """Of a network that fits the sizes in its own file, though no variant has them; and one that does not fit has one
    line for each kind of problem."""
    tensors = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    save_file(tensors, tmp_path / "a.safetensors")
    (part,) = inspect(tmp_path / "a.safetensors").parts
    assert part.network == type(network).__name__ and part.problems == []
    assert part.variant.startswith(said) and " instead of " in part.variant and len(str(part).splitlines()) <= 8
    lost = [key for key in tensors if key.endswith("weight") and key not in BY_KIND[type(network)].signs][1:8]
    save_file({key: tensor for key, tensor in tensors.items() if key not in lost}, tmp_path / "b.safetensors")
    (part,) = inspect(tmp_path / "b.safetensors").parts
    assert 0 < len(part.problems) <= 12 and any(" more" in problem for problem in part.problems)


@pytest.mark.parametrize("bare", [False, True], ids=["vision_model", "without prefix"])
@pytest.mark.parametrize("kind", [SiglipVision, ClipVision])
def test_vision_towers_are_named(kind: Any, bare: bool, tmp_path: Path) -> None:
    """Alone in a file; beside CLIP's half for texts that is what the file is for."""
    clip = kind is ClipVision
    tower = kind(
        replace(CLIP_VIT_L14, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    )
    tensors = {key.removeprefix("vision_model.") if bare else key: t for key, t in tower.state_dict().items()}
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, tmp_path / "a.safetensors")
    (part,) = inspect(tmp_path / "a.safetensors").parts
    assert part.network == ("CLIP vision" if clip else "SigLIP") and part.problems == []
    assert "width 16, patches of 14 pixels" in part.variant
    if clip and not bare:
        save_file({**tensors, **ClipTextEncoder(CLIP).state_dict()}, tmp_path / "whole.safetensors")
        (part,) = inspect(tmp_path / "whole.safetensors").parts
        assert part.network == "ClipTextEncoder"
