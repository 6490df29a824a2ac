"""Files of several networks under prefixes: every spelling is read, every tensor belongs to somebody."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import miniflux
from miniflux.checkpoints import inspect, load_into, open_tensors, save, save_all_in_one, to_layout
from miniflux.checkpoints.formats.reading import GivenTensors
from miniflux.checkpoints.layouts import ALL_IN_ONE
from miniflux.checkpoints.loading import compare
from miniflux.checkpoints.networks import PIPELINE
from miniflux.checkpoints.opened import divide, networks_in, part_of, parts_of
from miniflux.errors import CheckpointError
from miniflux.models.autoencoder import Autoencoder
from miniflux.models.clip import ClipTextEncoder
from miniflux.models.flux1 import Flux1
from miniflux.models.t5 import T5Encoder
from miniflux.variants import FLUX1_AUTOENCODER, VARIANTS
from miniflux.weights.finding import BUNDLED
from tests.tiny import AUTOENCODER, CLIP, FLUX1, T5, randn, randomise

Manifest = Callable[[str], dict[str, list[int]]]
NETWORKS: dict[type[nn.Module], nn.Module] = {
    Flux1: randomise(Flux1(FLUX1), 1),
    Autoencoder: randomise(Autoencoder(AUTOENCODER), 2),
    ClipTextEncoder: randomise(ClipTextEncoder(CLIP), 3),
    T5Encoder: randomise(T5Encoder(T5), 4),
}
PIPE: Any = SimpleNamespace(
    transformer=NETWORKS[Flux1],
    autoencoder=NETWORKS[Autoencoder],
    text=SimpleNamespace(networks={"clip": NETWORKS[ClipTextEncoder], "t5": NETWORKS[T5Encoder]}),
)

PREFIXES = {network.kind: network.prefix for network in PIPELINE if network.kind in NETWORKS}


def empty(kind: type[nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return kind(NETWORKS[kind].config)


def equal(module: nn.Module, expected: nn.Module) -> bool:
    a, b = module.state_dict(), expected.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def together(layouts: Mapping[type[nn.Module], str], prefixes: Mapping[type[nn.Module], str]) -> dict[str, Tensor]:
    return {
        prefixes[kind] + key: tensor
        for kind, layout in layouts.items()
        for key, tensor in to_layout(NETWORKS[kind], NETWORKS[kind].state_dict(), layout).items()
    }


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("all") / "everything.safetensors"
    save_all_in_one(PIPE, path)
    return path


def test_four_networks_in_one_file(file: Path) -> None:
    """What is written has ComfyUI's prefixes; each network is read from it bitwise, and every key belongs to one."""
    keys = set(load_file(file))
    assert networks_in(keys) == PREFIXES
    used: list[str] = []
    for kind, expected in NETWORKS.items():
        network = empty(kind)
        report = load_into(network, file)
        assert equal(network, expected)
        assert (report.layout, report.problems) == (ALL_IN_ONE, {})
        assert str(report).startswith(f"{file} ({PREFIXES[kind]}*): {len(report.used)} tensors, all used")
        used += [PREFIXES[kind] + key for key in report.used]
    assert sorted(used) == sorted(keys)


@pytest.mark.parametrize("kind", NETWORKS)
def test_one_network_behind_its_prefix(kind: type[nn.Module], tmp_path: Path) -> None:
    """The inverse of the table saves; explicit and recognised layouts load the same; the dict is left alone."""
    path, network = tmp_path / "a.safetensors", NETWORKS[kind]
    save(network, path, layout=ALL_IN_ONE)
    tensors = load_file(path)
    assert set(tensors) == {PREFIXES[kind] + key for key in network.state_dict()}
    before = dict(tensors)
    for source in (path, tensors, open_tensors(path)):
        for layout in (None, ALL_IN_ONE):
            other = empty(kind)
            load_into(other, source, layout=layout)
            assert equal(other, network)
    assert list(tensors) == list(before) and all(tensors[key] is before[key] for key in before)


SPELLINGS = {
    Flux1: ["", "model.diffusion_model.", "diffusion_model.", "transformer.", "model.", "net."],
    Autoencoder: ["vae.", "first_stage_model.", "autoencoder."],
    ClipTextEncoder: ["text_encoders.clip_l.transformer.", "cond_stage_model.clip_l.", "text_encoder.", "clip_l."],
    T5Encoder: ["text_encoders.t5xxl.transformer.", "cond_stage_model.t5xxl.transformer.", "text_encoder_2.", "t5xxl."],
}
LAYOUTS: dict[type[nn.Module], list[str]] = {
    Flux1: ["original", "diffusers"],
    Autoencoder: ["original", "diffusers"],
    ClipTextEncoder: ["original", "without prefix"],
    T5Encoder: ["original", "encoder embedding", "llama.cpp"],
}


@settings(max_examples=12)
@given(
    kinds=st.sets(st.sampled_from(list(NETWORKS)), min_size=1),
    prefixes=st.fixed_dictionaries({kind: st.sampled_from(names) for kind, names in SPELLINGS.items()}),
    layouts=st.fixed_dictionaries({kind: st.sampled_from(names) for kind, names in LAYOUTS.items()}),
)
def test_any_spelling_of_the_prefixes(
    kinds: set[type[nn.Module]], prefixes: dict[type[nn.Module], str], layouts: dict[type[nn.Module], str]
) -> None:
    """Any set of networks, any prefixes, any naming behind them: each is found and nothing is left over."""
    tensors = together({kind: layouts[kind] for kind in kinds}, prefixes)
    division = divide(tensors)
    assert division.prefixes == {kind: prefixes[kind] for kind in kinds}
    assert not division.strays and sum(map(len, division.keys.values())) == len(tensors)
    for kind in kinds:
        network = empty(kind)
        load_into(network, tensors)
        assert equal(network, NETWORKS[kind])


def test_full_size(manifest: Manifest) -> None:
    """The published key lists behind the prefixes of an all-in-one file: every key is used, none twice."""
    dev = VARIANTS["flux1-dev"]
    parts: dict[type[nn.Module], tuple[str, Any]] = {
        Flux1: ("bfl-flux1-dev", dev.transformer),
        Autoencoder: ("bfl-flux1-ae", FLUX1_AUTOENCODER),
        ClipTextEncoder: ("te-clip-l", dev.clip),
        T5Encoder: ("te-t5-xxl", dev.t5),
    }
    shapes = {PREFIXES[k] + key: shape for k, (name, _) in parts.items() for key, shape in manifest(name).items()}
    tensors = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    used: set[str] = set()
    for kind, (_, config) in parts.items():
        with torch.device("meta"):
            report = compare(kind(config), tensors)
        assert (report.layout, report.problems) == (ALL_IN_ONE, {})
        used |= {PREFIXES[kind] + key for key in (*report.used, *report.redundant)}
    assert used == set(tensors)


def test_what_comfyui_writes_beside_the_networks() -> None:
    """Each text encoder comes with a `logit_scale` outside its prefix; whole CLIP files with an image encoder."""
    tensors = together(dict.fromkeys(NETWORKS, "original"), PREFIXES)
    tensors |= {"text_encoders.clip_l.logit_scale": randn(1), "text_encoders.t5xxl.logit_scale": randn(1)}
    tensors |= {"text_encoders.clip_l.transformer.text_projection.weight": randn(2, 2)}
    tensors |= {"text_encoders.clip_l.transformer.vision_model.post_layernorm.weight": randn(2)}
    for kind, expected in NETWORKS.items():
        network = empty(kind)
        report = load_into(network, tensors)
        assert equal(network, expected)
        assert {"text_encoders.clip_l.logit_scale", "text_encoders.t5xxl.logit_scale"} <= set(report.redundant)
        own = {key for key in report.redundant if not key.startswith("text_encoders.")}
        clip = {"text_projection.weight", "vision_model.post_layernorm.weight"}
        assert own == (clip if kind is ClipTextEncoder else set())


def test_a_tensor_of_nobody_stops_every_network(tmp_path: Path) -> None:
    """It may be half a network that was meant."""
    tensors = together({Flux1: "original", Autoencoder: "original"}, PREFIXES)
    tensors |= {"text_encoders.clip_g.transformer.text_model.embeddings.weight": randn(2), "logit_scale.odd": randn(1)}
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / "a.safetensors")
    for kind in (Flux1, Autoencoder):
        with pytest.raises(CheckpointError, match="2 unused") as caught:
            load_into(empty(kind), tmp_path / "a.safetensors")
        assert "text_encoders.clip_g.transformer" in str(caught.value) and "logit_scale.odd" in str(caught.value)


def test_a_network_twice_is_refused() -> None:
    """Weights and their average, of which nobody says which is meant."""
    tensors = together({Flux1: "original"}, {Flux1: "model.diffusion_model."})
    tensors |= {"ema." + key: tensor for key, tensor in tensors.items()}
    with pytest.raises(CheckpointError, match=r"Flux1 is there 2 times: under 'ema\.model\.diffusion_model\.' and"):
        load_into(empty(Flux1), tensors)


def test_a_network_that_is_not_there(file: Path, tmp_path: Path) -> None:
    """The report is that of a file without any of its tensors."""
    save(NETWORKS[Autoencoder], tmp_path / "vae.safetensors", layout=ALL_IN_ONE)
    with pytest.raises(CheckpointError, match="missing, such as shared.weight"):
        load_into(empty(T5Encoder), tmp_path / "vae.safetensors")


def test_views_of_the_mapped_file(file: Path) -> None:
    """A network out of a file of 17 GB costs its own size, not that of the file."""
    network, source = empty(Flux1), open_tensors(file)
    load_into(network, source)
    for key, tensor in network.state_dict().items():
        assert tensor.data_ptr() == source[PREFIXES[Flux1] + key].data_ptr()


def test_scaled_float8_behind_a_prefix(tmp_path: Path) -> None:
    """Side tensors, the marker, and the header's table of layers carry the prefix too."""
    from miniflux.checkpoints.formats import FORMATS
    from miniflux.checkpoints.formats.scaled import METADATA, comfy_header

    network, layer = NETWORKS[Flux1], "double_blocks.0.img_attn.qkv"
    for name in ("fp8_scaled", "fp8_scaled_old"):
        form, tensors = FORMATS[name], together(dict.fromkeys(NETWORKS, "original"), PREFIXES)
        parts = form.pack(network.state_dict()[f"{layer}.weight"])
        del tensors[f"{PREFIXES[Flux1]}{layer}.weight"]
        tensors |= {f"{PREFIXES[Flux1]}{layer}.{part}": tensor for part, tensor in parts.items()}
        tensors |= {PREFIXES[Flux1] + key: tensor for key, tensor in form.markers().items()}
        path = tmp_path / f"{name}.safetensors"
        about = comfy_header([PREFIXES[Flux1] + layer], "float8_e4m3fn") if name == "fp8_scaled" else {}
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, about)
        other = empty(Flux1)
        report = load_into(other, path)
        assert report.packed == {form.label: 1}
        assert torch.equal(other.get_submodule(layer).dense(), form.unpack(parts))  # pyright: ignore[reportCallIssue]
        if about:
            layers = json.loads(part_of(open_tensors(path), Flux1).metadata[METADATA])["layers"]
            assert set(layers) == {layer}
            assert not json.loads(part_of(open_tensors(path), T5Encoder).metadata[METADATA])["layers"]
        for kind in (T5Encoder, ClipTextEncoder, Autoencoder):
            plain = empty(kind)
            load_into(plain, path)
            assert equal(plain, NETWORKS[kind])


def test_inspect_names_every_network(file: Path) -> None:
    parts = inspect(file).parts
    assert [(part.network, part.layout) for part in parts] == [(kind.__name__, ALL_IN_ONE) for kind in NETWORKS]
    assert sum(part.tensors for part in parts) == len(open_tensors(file))


def test_parts_of_a_source(file: Path) -> None:
    """A source of one bare network is that network's; one of no known network has no parts."""
    bare = GivenTensors(NETWORKS[T5Encoder].state_dict())
    assert parts_of(bare) == {T5Encoder: bare} and part_of(bare, Flux1) is bare
    assert parts_of(GivenTensors({"x": randn(1)})) == {}
    assert list(parts_of(open_tensors(file))) == list(NETWORKS)


# -- whole pipelines --


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No weights of this machine are seen."""
    monkeypatch.delenv("MINIFLUX_WEIGHTS", raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "no cache"))


def test_load_an_all_in_one_file(alone: None, tmp_path: Path) -> None:
    """nano in one file, under a name that says nothing: the same networks and the same picture."""
    nano = miniflux.load("nano")
    path = tmp_path / "x.safetensors"
    save_all_in_one(nano, path)
    for place in (path, tmp_path):
        pipe = miniflux.load(place)
        assert pipe.variant.name == "nano-dev"
        for a, b in (
            (pipe.transformer, nano.transformer),
            (pipe.autoencoder, nano.autoencoder),
            (pipe.text.clip, nano.text.clip),
            (pipe.text.t5, nano.text.t5),
        ):
            assert equal(a, b)
    call: dict[str, Any] = {"seed": 1, "steps": 1, "width": 32, "height": 32}
    ours, theirs = (p.generate("a red circle", **call).latents for p in (pipe, nano))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)  # sums depend on how the memory is aligned


def test_load_a_tiny_all_in_one_file(alone: None, tmp_path: Path) -> None:
    """What shapes do not tell (heads, groups, the scale of latents) is in the header."""
    config = replace(FLUX1, vec_in_dim=CLIP.hidden_size, context_in_dim=T5.d_model)
    clip = replace(CLIP, vocab_size=2000, max_position_embeddings=77)
    parts: Any = SimpleNamespace(
        transformer=randomise(Flux1(config)),
        autoencoder=randomise(Autoencoder(AUTOENCODER)),
        text=SimpleNamespace(
            networks={
                "clip": randomise(ClipTextEncoder(clip)),
                "t5": randomise(T5Encoder(replace(T5, vocab_size=1000))),
            }
        ),
    )
    save_all_in_one(parts, tmp_path / "tiny.safetensors", metadata={"author": "nobody"})
    for name in ("tokenizer", "tokenizer_2"):
        (tmp_path / name).symlink_to(BUNDLED / name)
    pipe = miniflux.load(tmp_path / "tiny.safetensors")
    assert (pipe.variant.clip, pipe.variant.autoencoder) == (clip, AUTOENCODER)
    assert equal(pipe.transformer, parts.transformer) and equal(pipe.text.t5, parts.text.networks["t5"])
    assert pipe.generate("a red circle", steps=1, width=32, height=16).images[0].size == (32, 16)
    assert open_tensors(tmp_path / "tiny.safetensors").metadata["author"] == "nobody"


@pytest.mark.parametrize("layout", ["original", ALL_IN_ONE])
def test_load_a_transformer_alone(alone: None, layout: str, tmp_path: Path) -> None:
    """Fine-tunes that hold only the transformer, bare or behind the prefix: the rest is found in the usual places."""
    nano = miniflux.load("nano")
    save(nano.transformer, tmp_path / "my tune.safetensors", layout=layout)
    pipe = miniflux.load(tmp_path / "my tune.safetensors")
    assert equal(pipe.transformer, nano.transformer) and equal(pipe.text.t5, nano.text.t5)


def test_comfyui_models_folder(alone: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`MINIFLUX_WEIGHTS` may name ComfyUI's `models`, with other files lying beside those that are meant."""
    nano, models = miniflux.load("nano"), tmp_path / "models"
    names = {
        "diffusion_models/flux1-dev.safetensors": nano.transformer,
        "vae/ae.safetensors": nano.autoencoder,
        "vae/another.safetensors": NETWORKS[Autoencoder],
        "text_encoders/clip_l.safetensors": nano.text.clip,
        "text_encoders/t5xxl_fp8_e4m3fn.safetensors": nano.text.t5,
    }
    for name, network in names.items():
        (models / name).parent.mkdir(parents=True, exist_ok=True)
        save(network, models / name)
    from miniflux.weights.finding import find

    for name in ("tokenizer", "tokenizer_2"):
        (models / name).symlink_to(BUNDLED / name)
    monkeypatch.setenv("MINIFLUX_WEIGHTS", str(models))
    files = find(VARIANTS["flux1-dev"])
    found = [files.transformer, files.autoencoder, files.clip, files.t5]
    assert [str(path.relative_to(models)) for path in found] == [n for n in names if "another" not in n]


# -- T5 as llama.cpp names it --


def test_llama_cpp_names() -> None:
    """Against the name map of the package `gguf`."""
    gguf = pytest.importorskip("gguf")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, T5.num_layers)
    state = NETWORKS[T5Encoder].state_dict()
    expected = {names.get_name(key, try_suffixes=(".weight",)) for key in state}
    assert expected == set(to_layout(NETWORKS[T5Encoder], state, "llama.cpp"))
    pairs = {key: names.get_name(key, try_suffixes=(".weight",)) for key in state}
    theirs = to_layout(NETWORKS[T5Encoder], state, "llama.cpp")
    assert all(torch.equal(theirs[theirs_key], state[key]) for key, theirs_key in pairs.items())
