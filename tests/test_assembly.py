"""From a name, a folder or a file to a pipeline: which parts, which sizes, which precision - or why not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import miniflux
from miniflux.checkpoints import loading, save
from miniflux.errors import CheckpointError, InputError, MinifluxError, WeightsNotFoundError
from miniflux.memory import compute
from miniflux.models.autoencoder import Autoencoder
from miniflux.models.clip import ClipTextEncoder
from miniflux.models.flux1 import Flux1
from miniflux.models.t5 import T5Encoder
from miniflux.variants import VARIANTS
from miniflux.weights.finding import BUNDLED
from tests.checkpoints.raw import sparse
from tests.tiny import AUTOENCODER, CLIP, FLUX1, T5, randomise

CONFIG = replace(FLUX1, vec_in_dim=CLIP.hidden_size, context_in_dim=T5.d_model)
PARTS: dict[str, tuple[nn.Module, str]] = {
    "transformer": (randomise(Flux1(CONFIG)), "diffusers"),
    "vae": (randomise(Autoencoder(AUTOENCODER)), "diffusers"),
    "text_encoder": (
        randomise(ClipTextEncoder(replace(CLIP, vocab_size=2000, max_position_embeddings=77))),
        "original",
    ),
    "text_encoder_2": (randomise(T5Encoder(replace(T5, vocab_size=1000))), "original"),
}
VAE = {
    "in_channels": AUTOENCODER.in_channels,
    "out_channels": AUTOENCODER.out_ch,
    "block_out_channels": [AUTOENCODER.ch * mult for mult in AUTOENCODER.ch_mult],
    "layers_per_block": AUTOENCODER.num_res_blocks,
    "latent_channels": AUTOENCODER.z_channels,
    "scaling_factor": AUTOENCODER.scale_factor,
    "shift_factor": AUTOENCODER.shift_factor,
    "norm_num_groups": AUTOENCODER.num_groups,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "transformer": {"_class_name": "FluxTransformer2DModel", "axes_dims_rope": list(CONFIG.axes_dim)},
    "vae": VAE,
    "text_encoder": {**asdict(PARTS["text_encoder"][0].config), "architectures": ["CLIPTextModel"]},
    "text_encoder_2": {**asdict(PARTS["text_encoder_2"][0].config), "feed_forward_proj": "gated-gelu"},
}


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither accelerators nor weights of this machine are seen."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.delenv("MINIFLUX_WEIGHTS", raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "no cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny model in the diffusers layout."""
    root = tmp_path / "tiny.model"
    for name, (module, layout) in PARTS.items():
        (root / name).mkdir(parents=True)
        save(module, root / name / "model.safetensors", layout=layout)
        (root / name / "config.json").write_text(json.dumps(CONFIGS[name]), "utf-8")
    for name in ("tokenizer", "tokenizer_2"):
        (root / name).symlink_to(BUNDLED / name)
    return root


def scheduler(folder: Path, **settings: Any) -> None:
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(settings), "utf-8")


def same(module: nn.Module, expected: nn.Module, dtype: torch.dtype = torch.float32) -> bool:
    pairs = zip(module.state_dict().items(), expected.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y.to(dtype)) and x.dtype == dtype for (a, x), (b, y) in pairs)


def test_a_folder(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Every weight where it belongs, sizes from the configs, networks ready to compute."""
    with caplog.at_level("INFO"):
        pipe = miniflux.load(folder)
    networks = [pipe.transformer, pipe.autoencoder, pipe.text.clip, pipe.text.t5]
    for network, (expected, _) in zip(networks, PARTS.values(), strict=True):
        assert same(network, expected) and network.config == expected.config
        assert not network.training and not any(p.requires_grad or p.is_meta for p in network.parameters())
    assert (pipe.variant.name, pipe.variant.shift, pipe.variant.transformer) == ("tiny.model", True, CONFIG)
    assert "tiny.model: 0.1 million parameters in float32 on cpu, loaded in" in caplog.text
    assert pipe.generate("a red circle", steps=1, width=32, height=16).images[0].size == (32, 16)


def test_the_same_from_a_string_and_from_inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path, the folder itself too, which has no name of its own."""
    monkeypatch.chdir(folder)
    assert miniflux.load(".").variant.name == "tiny.model"
    monkeypatch.chdir(folder.parent)
    assert same(miniflux.load("tiny.model").transformer, PARTS["transformer"][0])


def test_without_guidance_it_is_like_schnell(folder: Path) -> None:
    """No guidance input: no shift, four steps."""
    model = Flux1(replace(CONFIG, guidance_embed=False))
    save(model, folder / "transformer" / "model.safetensors")
    variant = miniflux.load(folder).variant
    assert (variant.shift, variant.guidance, variant.steps, variant.t5_length) == (False, None, 4, 256)


@pytest.mark.parametrize("name", ["flux1-dev", "flux1-schnell"])
def test_the_published_schedulers(name: str, published: dict[str, Any], folder: Path) -> None:
    scheduler(folder, _class_name="FlowMatchEulerDiscreteScheduler", **published["scheduler_configs"][name])
    assert miniflux.load(folder).variant.shift == VARIANTS[name].shift


@pytest.mark.parametrize("dynamic", [True, False])
def test_the_scheduler_decides_on_the_shift(dynamic: bool, folder: Path) -> None:
    scheduler(folder, use_dynamic_shifting=dynamic, shift=3.0 if dynamic else 1.0, base_shift=0.5, max_shift=1.15)
    assert miniflux.load(folder).variant.shift == dynamic


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shift": 3.0}, "fixed shift 3.0, which FLUX.1 never uses"),
        ({"use_dynamic_shifting": True, "max_shift": 1.3}, "max_shift 1.3; FLUX.1's is 1.15"),
        ({"use_dynamic_shifting": True, "base_image_seq_len": 64}, "base_image_seq_len 64; FLUX.1's is 256"),
        ({"use_dynamic_shifting": True, "time_shift_type": "linear"}, "time_shift_type 'linear'"),
        ({"use_karras_sigmas": True}, "use_karras_sigmas True; FLUX.1's is False"),
        ({"_class_name": "DDIMScheduler"}, "_class_name 'DDIMScheduler'"),
    ],
)
def test_schedulers_that_would_draw_something_else(settings: dict[str, Any], message: str, folder: Path) -> None:
    """Ignoring such a setting would change every picture in silence."""
    scheduler(folder, **settings)
    with pytest.raises(CheckpointError, match=f"^{folder}: its scheduler has .*{message}"):
        miniflux.load(folder)


def test_precision(folder: Path) -> None:
    """Small bfloat16 models are widened on the CPU; the autoencoder stays float32 unless a dtype is asked for."""
    for name, (module, layout) in PARTS.items():
        if name != "vae":
            half = type(module)(module.config).to(torch.bfloat16)  # type: ignore[operator]
            half.load_state_dict(module.state_dict())
            save(half, folder / name / "model.safetensors", layout=layout)
    for asked, computed, decoded in [
        (None, torch.float32, torch.float32),
        ("bfloat16", torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16, torch.float16),
    ]:
        pipe = miniflux.load(folder, dtype=asked, device="cpu")
        dtypes = {p.dtype for n in (pipe.transformer, pipe.text.clip, pipe.text.t5) for p in n.parameters()}
        assert dtypes == {computed} and {p.dtype for p in pipe.autoencoder.parameters()} == {decoded}


def test_large_models_keep_bfloat16_but_not_their_autoencoder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the CPU is quick at it; the autoencoder was published in float32."""
    monkeypatch.setattr(compute, "SMALL", 0)
    monkeypatch.setattr(compute, "bfloat16_slowness", lambda: 0.5)
    save(Flux1(CONFIG).to(torch.bfloat16), folder / "transformer" / "model.safetensors")
    pipe = miniflux.load(folder)
    assert (pipe.dtype, pipe.text.t5.shared.weight.dtype) == (torch.bfloat16, torch.bfloat16)
    assert {p.dtype for p in pipe.autoencoder.parameters()} == {torch.float32}


def test_weights_come_before_the_folder_of_the_model(folder: Path, tmp_path: Path) -> None:
    """What the caller names wins over what lies beside the transformer."""
    other = randomise(Autoencoder(AUTOENCODER), seed=9)
    shutil.copytree(folder / "vae", tmp_path / "mine" / "vae")
    save(other, tmp_path / "mine" / "vae" / "model.safetensors")
    pipe = miniflux.load(folder, weights=tmp_path / "mine")
    assert same(pipe.autoencoder, other) and same(pipe.transformer, PARTS["transformer"][0])


def test_shards(folder: Path) -> None:
    """With an index; without one of them, all that are missing are named."""
    place = folder / "transformer"
    tensors, index = load_file(place / "model.safetensors"), {}
    (place / "model.safetensors").unlink()
    for i in range(3):
        part = sorted(tensors)[i::3]
        save_file({key: tensors[key] for key in part}, place / f"m-{i}.safetensors")
        index |= dict.fromkeys(part, f"m-{i}.safetensors")
    (place / "m.safetensors.index.json").write_text(json.dumps({"weight_map": index}), "utf-8")
    assert same(miniflux.load(folder).transformer, PARTS["transformer"][0])
    (place / "m-1.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"m\.safetensors\.index\.json names 3 files.* missing: m-1\.safetensors$"
    ):
        miniflux.load(folder)


def test_parts_that_are_missing(folder: Path) -> None:
    (folder / "text_encoder_2" / "model.safetensors").unlink()
    (folder / "tokenizer").unlink()
    with pytest.raises(
        WeightsNotFoundError, match=r"t5 \(.*text_encoder_2.*\); clip_tokenizer \(tokenizer\)\nlooked in: "
    ):
        miniflux.load(folder)


# the part, what is changed in its config or put in its place, the complaint
SPOILED: dict[str, tuple[str, dict[str, Any] | str | bytes, str]] = {
    "cut off": ("text_encoder", '{"vocab_size": 2000, "hidd', "is no JSON"),
    "binary": ("text_encoder_2", b"\xff\xfe\x00\x80", "is no JSON"),
    "list": ("vae", "[5]", "expected a JSON object"),
    "bottomless": ("vae", "[" * 100_000, "is no JSON"),
    "missing field": ("text_encoder", '{"vocab_size": 2000}', "not a ClipTextConfig: .*hidden_size"),
    "missing vae field": ("vae", '{"in_channels": 3}', "not an AutoencoderKL: 'block_out_channels'"),
    "text for a number": ("text_encoder_2", {"num_layers": "two"}, "num_layers must be a whole number .* got 'two'"),
    "nothing for a number": ("text_encoder_2", {"num_heads": None}, "num_heads must be a whole number .* got None"),
    "negative": ("text_encoder_2", {"d_ff": -36}, "d_ff must be a whole number of at least 1, got -36"),
    "fraction": ("text_encoder", {"num_hidden_layers": 1.5}, "num_hidden_layers must be a whole number .* got 1.5"),
    "no heads": ("text_encoder", {"num_attention_heads": 0}, "not a ClipTextConfig"),
    "odd heads": (
        "text_encoder",
        {"num_attention_heads": 5},
        "hidden_size 24 is not a multiple of num_attention_heads 5",
    ),
    "unknown activation": ("text_encoder", {"hidden_act": "relu"}, "hidden_act 'relu'"),
    "text for epsilon": ("text_encoder", {"layer_norm_eps": "1e-5"}, "layer_norm_eps must be a number, got '1e-5'"),
    "another T5": ("text_encoder_2", {"feed_forward_proj": "relu"}, "feed_forward_proj 'relu' is not gated-gelu"),
    "quant convolution": ("vae", {"use_quant_conv": True}, "quant convolutions"),
    "no widths": ("vae", {"block_out_channels": []}, "not an AutoencoderKL"),
    "zero width": ("vae", {"block_out_channels": [0, 8]}, "not an AutoencoderKL"),
    "odd widths": ("vae", {"block_out_channels": [8, 12, 16]}, r"multiples of the first, got \[8, 12, 16\]"),
    "text for widths": ("vae", {"block_out_channels": "8, 16"}, "not an AutoencoderKL"),
    "zero groups": ("vae", {"norm_num_groups": 0}, "not an AutoencoderKL"),
    "no scale": ("vae", {"scaling_factor": None}, "scale_factor must be a number, got None"),
    "axes of text": ("transformer", {"axes_dims_rope": "4, 6, 6"}, "axes_dims_rope must be a JSON list of numbers"),
    "odd axes": ("transformer", {"axes_dims_rope": [4, 6, 8]}, "axes_dim .* sum to the head size 16"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_a_spoiled_config_is_refused_with_its_name(name: str, folder: Path) -> None:
    """One line that names the file and the value, instead of a traceback from the depth of torch."""
    part, change, message = SPOILED[name]
    path = folder / part / "config.json"
    if isinstance(change, dict):
        change = json.dumps(CONFIGS[part] | change)
    path.write_bytes(change if isinstance(change, bytes) else change.encode())
    with pytest.raises(CheckpointError, match=message) as caught:
        miniflux.load(folder)
    assert str(path.parent) in str(caught.value) and "\n" not in str(caught.value)


def test_a_config_that_does_not_fit_its_weights(folder: Path) -> None:
    """The report names the file and every key."""
    (folder / "text_encoder_2" / "config.json").write_text(json.dumps(CONFIGS["text_encoder_2"] | {"num_layers": 3}))
    with pytest.raises(
        CheckpointError, match=r"text_encoder_2/model\.safetensors: 9 missing, such as encoder\.block\.2"
    ):
        miniflux.load(folder)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda t: {**t, "proj_out.weight": t["proj_out.weight"] * torch.nan},
            "1 not finite .*final_layer.linear.weight",
        ),
        (lambda t: {**t, "more": torch.ones(1)}, "1 unused, such as more"),
        (lambda t: {k: x for k, x in t.items() if k != "x_embedder.bias"}, "1 missing, such as img_in.bias"),
        (lambda t: {**t, "proj_out.bias": torch.ones(3)}, "1 misshapen, such as final_layer.linear.bias"),
        (lambda t: {"x": torch.ones(1)}, "expected a transformer of FLUX, found no network known here"),
        (lambda t: PARTS["vae"][0].state_dict(), "expected a transformer of FLUX, found Autoencoder"),
    ],
)
def test_a_spoiled_transformer_is_refused_with_its_name(
    spoil: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], message: str, folder: Path
) -> None:
    """Its own sizes are right, so nothing is said about another model."""
    path = folder / "transformer" / "model.safetensors"
    save_file(spoil(load_file(path)), path)
    with pytest.raises(CheckpointError, match=rf"^{path}: {message}"):
        miniflux.load(folder)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=rf"^{path}: cut off"):
        miniflux.load(folder)


@pytest.fixture
def nano(tmp_path: Path) -> Path:
    """The bundled files of nano-dev and nano-schnell in a folder of the user's."""
    root = tmp_path / "nano"
    root.mkdir()
    for path in BUNDLED.iterdir():
        if path.name not in (VARIANTS["nano-fill"].file, VARIANTS["nano-kontext"].file):
            (root / path.name).symlink_to(path)
    return root


def test_single_files(nano: Path) -> None:
    """The other parts lie beside the file; what it is is read from its shapes, not from its name."""
    (nano / "flux1-nano-dev.safetensors").rename(nano / "mine.safetensors")
    pipe = miniflux.load(nano / "mine.safetensors")
    assert pipe.variant == miniflux.load("nano").variant and same(pipe.transformer, miniflux.load("nano").transformer)
    with pytest.raises(CheckpointError, match=r"found flux1-nano-schnell\.safetensors, mine\.safetensors"):
        miniflux.load(nano)
    (nano / "mine.safetensors").unlink()
    assert miniflux.load(nano).variant.name == "nano-schnell"
    (nano / "flux1-nano-schnell.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match="expected a folder `transformer` or one file of a transformer; found none"
    ):
        miniflux.load(nano)


def test_single_files_spread_over_folders(nano: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file alone finds the other parts in `weights`, then in the folder of the variable; a dict overrides both."""
    alone = tmp_path / "alone" / "a.safetensors"
    alone.parent.mkdir()
    shutil.copy(BUNDLED / "flux1-nano-dev.safetensors", alone)
    assert miniflux.load(alone, weights=nano).variant.name == "nano-dev"
    model = Flux1(replace(VARIANTS["nano-dev"].transformer, depth=1))
    save(model, alone)  # no variant, so nothing bundled
    with pytest.raises(WeightsNotFoundError, match=r"^a: not on this machine: autoencoder"):
        miniflux.load(alone)
    parts = {"autoencoder": "ae.safetensors", "clip": "text_encoder", "t5": "text_encoder_2"}
    monkeypatch.setenv("MINIFLUX_WEIGHTS", str(nano))
    miniflux.load(alone)  # the header of nano's autoencoder tells its config
    (nano / parts["autoencoder"]).unlink()
    save_file(load_file(BUNDLED / parts["autoencoder"]), nano / parts["autoencoder"])
    with pytest.raises(CheckpointError, match=r"ae\.safetensors: \d+ missing"):  # unknown models have the official one
        miniflux.load(alone)
    vae = tmp_path / "vae"
    vae.mkdir()
    shutil.copy(nano / parts["autoencoder"], vae)
    config = VARIANTS["nano-dev"].autoencoder
    widths = [config.ch * mult for mult in config.ch_mult]
    change = {"block_out_channels": widths, "latent_channels": 16, "norm_num_groups": 4}
    (vae / "config.json").write_text(json.dumps(VAE | change))
    pipe = miniflux.load(alone, weights={"autoencoder": vae})
    assert same(pipe.transformer, model) and pipe.variant.name == "a" and pipe.variant.autoencoder.ch == config.ch


def test_a_folder_given_as_weights_comes_first(folder: Path, nano: Path) -> None:
    (nano / "text_encoder").unlink()
    shutil.copytree(BUNDLED / "text_encoder", nano / "text_encoder")
    tensors = load_file(nano / "text_encoder" / "model.safetensors")
    tensors["text_model.final_layer_norm.bias"] += 1
    save_file(tensors, nano / "text_encoder" / "model.safetensors")
    ours, theirs = miniflux.load("nano", weights=nano), miniflux.load("nano")
    name = "text_model.final_layer_norm.bias"
    change = ours.text.clip.get_parameter(name) - theirs.text.clip.get_parameter(name)
    assert float(change.mean()) == pytest.approx(1, abs=0.01) and same(ours.transformer, theirs.transformer)


def test_the_wrong_file_for_a_variant_is_named(nano: Path) -> None:
    """What the file is, not two hundred keys."""
    schnell, ae = nano / "flux1-nano-schnell.safetensors", nano / "ae.safetensors"
    for part, path, message in [
        ("transformer", schnell, "expected the transformer of nano-dev, found nano-schnell"),
        ("transformer", ae, "expected the transformer of nano-dev, found the tensors of Autoencoder"),
        ("autoencoder", schnell, "expected the Autoencoder, found nano-schnell"),
        ("t5", ae, "expected the T5Encoder, found the tensors of Autoencoder"),
        (
            "clip",
            nano / "text_encoder_2" / "model.safetensors",
            "expected the ClipTextEncoder, found the tensors of T5Encoder",
        ),
    ]:
        with pytest.raises(CheckpointError) as caught:
            miniflux.load("nano", weights={part: path})
        assert str(caught.value).splitlines()[0] == f"{path}: {message}"


@pytest.fixture
def official(manifest: Callable[[str], dict[str, list[int]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """All parts of FLUX.1 dev at full size, as holes on the disk."""
    monkeypatch.setattr(compute, "bfloat16_slowness", lambda: 0.5)
    monkeypatch.setattr(loading, "fetch", lambda *_: pytest.fail("would read 24 GB"))
    for name in ("MINIFLUX_WEIGHTS", "HF_HUB_CACHE"):
        monkeypatch.setenv(name, str(tmp_path))
    names = {"flux1-dev": "bfl-flux1-dev", "ae": "bfl-flux1-ae", "clip_l": "te-clip-l", "t5xxl_fp16": "te-t5-xxl"}
    for file, name in names.items():
        sparse(tmp_path / f"{file}.safetensors", manifest(name))
    for name in ("tokenizer", "tokenizer_2"):
        (tmp_path / name).symlink_to(BUNDLED / name)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bfl-flux1-schnell", "expected the transformer of flux1-dev, found flux1-schnell"),
        ("diffusers-flux1-schnell", "expected the transformer of flux1-dev, found flux1-schnell"),
        ("bfl-flux1-fill-dev", "expected the transformer of flux1-dev, found flux1-fill-dev"),
        (
            "diffusers-flux1-canny-dev",
            "expected the transformer of flux1-dev, found flux1-canny-dev or flux1-depth-dev",
        ),
    ],
)
def test_official_files_taken_for_another(
    name: str, message: str, official: Path, manifest: Callable[[str], dict[str, list[int]]]
) -> None:
    """The name of a file says nothing: here all are called flux1-dev."""
    path = sparse(official / "flux1-dev.safetensors", manifest(name))
    with pytest.raises(CheckpointError) as caught:
        miniflux.load("flux1-dev")
    assert str(caught.value).splitlines()[0] == f"{path}: {message}"


def test_an_official_file_with_a_tensor_too_few(
    official: Path, manifest: Callable[[str], dict[str, list[int]]]
) -> None:
    """It is what was asked for, so the report alone is the message."""
    shapes = manifest("bfl-flux1-dev")
    del shapes["double_blocks.18.img_mlp.2.weight"]
    path = sparse(official / "flux1-dev.safetensors", shapes)
    with pytest.raises(CheckpointError, match=rf"^{path}: 1 missing, such as double_blocks\.18\.img_mlp\.2\.weight \("):
        miniflux.load("flux1-dev")


def test_transformers_that_read_something_else_are_refused_at_once(
    official: Path, manifest: Callable[[str], dict[str, list[int]]]
) -> None:
    """Canny, Depth and Fill read a picture, or that and a mask, beside the noise; nothing known reads 320."""
    shapes = manifest("bfl-flux1-fill-dev")
    shapes["img_in.weight"][1] = 320
    path = sparse(official / "mine.safetensors", shapes)
    with pytest.raises(
        CheckpointError, match=rf"^{path} and .*ae\.safetensors do not belong .* of 320 and of 64 channels"
    ):
        miniflux.load(path)


def test_parts_of_different_models(folder: Path) -> None:
    """Text encoders of other widths would fail in the first layer."""
    for part, message in [
        ({"t5": BUNDLED / "text_encoder_2"}, "text tokens of 24 and of 128 channels"),
        ({"clip": BUNDLED / "text_encoder"}, "text summaries of 24 and of 64 channels"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            miniflux.load(folder, weights=part)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"name_or_path": "flux3"},
            "'flux3' is neither a model nor a file or folder here; models are flux1-dev, .*nano",
        ),
        ({"name_or_path": "no/such/file.safetensors"}, "'no/such/file.safetensors' is neither a model"),
        ({"name_or_path": "x" * 5000}, "is neither a model"),
        ({"name_or_path": "a\0b"}, "is neither a model"),
        ({"memory": "banana"}, "memory must be one of auto, resident, text-freed, offload, stream, got 'banana'"),
        ({"device": "banana"}, "device 'banana' cannot be used here"),
        ({"device": "meta"}, "device 'meta' holds no data"),
        ({"dtype": "banana"}, "dtype 'banana' is not one of float32, bfloat16, float16"),
        ({"dtype": torch.int8}, "dtype 'torch.int8' is not one of"),
        ({"weights": "no/such/folder"}, "weights 'no/such/folder' is no folder"),
        ({"weights": BUNDLED / "ae.safetensors"}, "ae.safetensors' is no folder; single files are given as a dict"),
        ({"weights": {"vae": BUNDLED / "ae.safetensors"}}, "unknown part 'vae' of a model; parts are transformer,"),
        ({"weights": {"autoencoder": "gone.safetensors"}}, r"autoencoder \(gone\.safetensors\)"),
    ],
)
def test_arguments_that_make_no_sense(arguments: dict[str, Any], message: str) -> None:
    """Refused with the value, and with what is known."""
    with pytest.raises(MinifluxError, match=message) as caught:
        miniflux.load(**{"name_or_path": "nano", **arguments})
    assert isinstance(caught.value, InputError) or "gone" in message


def test_names_aliases_repositories() -> None:
    """Every registered name leads to its own variant."""
    assert miniflux.load("nano").variant.name == "nano-dev"
    assert miniflux.load("nano-schnell", memory="resident").variant.name == "nano-schnell"
    with pytest.raises(WeightsNotFoundError, match="^flux1-schnell: not on this machine: transformer"):
        miniflux.load("black-forest-labs/FLUX.1-schnell")
