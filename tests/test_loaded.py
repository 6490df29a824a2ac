"""Changes in memory since loading: noticed, not cached, said in the settings; LoRAs and memory modes are none."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import miniflux
from miniflux import lora
from miniflux.cache import ResultCache
from miniflux.checkpoints import convert
from miniflux.checkpoints.fingerprint import differences, facts_of, numbers_elsewhere
from miniflux.checkpoints.quantized import packed_layers
from miniflux.pipeline import Pipeline
from miniflux.result import Result
from miniflux.weights.finding import BUNDLED
from tests.tiny import FLUX1, randomise

SMALL: dict[str, Any] = {"steps": 2, "width": 32, "height": 32}


@pytest.fixture(scope="module")
def loaded() -> Pipeline:
    return miniflux.load("nano")


@pytest.fixture
def pipe(loaded: Pipeline) -> Iterator[Pipeline]:
    """nano with an empty cache; every weight is put back afterwards."""
    kept = {name: p.detach().clone() for name, p in loaded.transformer.state_dict().items()}
    made = Pipeline(
        loaded.variant, loaded.transformer, loaded.autoencoder, loaded.text, loaded.origin, results=ResultCache()
    )
    assert made.changed() == ()
    yield made
    loaded.transformer.load_state_dict(kept)
    assert loaded.changed() == ()


def draw(pipe: Pipeline, prompt: str = "a star", **options: Any) -> Result:
    return pipe.generate(prompt, **{**SMALL, **options})


Undo = Callable[[], Any]


def swapped(owner: Any, name: str, value: Any) -> Undo:
    """Set an attribute; the way back."""
    before = vars(owner).get(name, owner)
    setattr(owner, name, value)
    return lambda: delattr(owner, name) if before is owner else setattr(owner, name, before)


def weight_of(pipe: Pipeline) -> nn.Parameter:
    return pipe.transformer.double_blocks[0].img_mlp[0].weight  # pyright: ignore


def written(pipe: Pipeline, write: Callable[[nn.Parameter], object]) -> Undo:
    weight = weight_of(pipe)
    kept = weight.detach().clone()
    write(weight)
    return lambda: weight.data.copy_(kept)


@torch.no_grad()
def zero(weight: nn.Parameter) -> None:
    weight.zero_()


@torch.inference_mode()
def one_number_in_inference_mode(weight: nn.Parameter) -> None:
    weight[5, 7] += 0.25


def one_number_of_data(weight: nn.Parameter) -> None:
    weight.data[3, 4] = -weight.data[3, 4] - 0.5


def other_data(weight: nn.Parameter) -> None:
    weight.data = weight.data * 1.01


def by_numpy(weight: nn.Parameter) -> None:
    weight.detach().numpy()[0] *= 2


def rows_exchanged(weight: nn.Parameter) -> None:
    weight.data = weight.data.flip(0).contiguous()


def other_module(pipe: Pipeline) -> Undo:
    blocks, block = pipe.transformer.double_blocks, pipe.transformer.double_blocks[1]
    blocks[1] = randomise(type(block)(pipe.transformer.config))
    return lambda: blocks.__setitem__(1, block)


def another_parameter(pipe: Pipeline) -> Undo:
    layer = pipe.transformer.txt_in
    weight, layer.weight = layer.weight, nn.Parameter(torch.zeros_like(layer.weight), requires_grad=False)
    return lambda: setattr(layer, "weight", weight)


def one_block_less(pipe: Pipeline) -> Undo:
    blocks = list(pipe.transformer.single_blocks)
    del pipe.transformer.single_blocks[-1]
    return lambda: pipe.transformer.single_blocks.append(blocks[-1])


def parametrised(pipe: Pipeline) -> Undo:
    layer = pipe.transformer.txt_in
    parametrize.register_parametrization(layer, "weight", nn.Tanh())
    original = layer.parametrizations.weight.original  # pyright: ignore

    def undo() -> None:
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
        layer.weight = original

    return undo


def pruned(pipe: Pipeline) -> Undo:
    layer = pipe.transformer.txt_in
    original, numbers = layer.weight, layer.weight.data
    prune.l1_unstructured(layer, "weight", 0.5)

    def undo() -> None:
        prune.remove(layer, "weight")
        original.data = numbers
        layer.weight = original

    return undo


def half_and_back(pipe: Pipeline) -> Undo:
    kept = {name: p.data for name, p in pipe.transformer.named_parameters()}
    pipe.transformer.half().float()
    return lambda: [p.__setattr__("data", kept[name]) for name, p in pipe.transformer.named_parameters()]


def another_encoder(pipe: Pipeline) -> Undo:
    return swapped(pipe.text, "t5", randomise(type(pipe.text.t5)(pipe.text.t5.config)))


def state_dict_loaded(weight: nn.Parameter) -> None:
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight = weight
    layer.load_state_dict({"weight": torch.ones_like(weight), "bias": layer.bias})


# name -> (make the change and give the way back, the part that changed, a word of what is said)
CHANGES: dict[str, tuple[Callable[[Pipeline], Undo], str, str]] = {
    "zeroed under no_grad": (lambda p: written(p, zero), "transformer", "double_blocks.0.img_mlp.0.weight"),
    "one number in inference mode": (
        lambda p: written(p, one_number_in_inference_mode),
        "transformer",
        "img_mlp.0.weight",
    ),
    "one number of .data": (lambda p: written(p, one_number_of_data), "transformer", "img_mlp.0.weight"),
    "other .data": (lambda p: written(p, other_data), "transformer", "img_mlp.0.weight"),
    "by numpy": (lambda p: written(p, by_numpy), "transformer", "img_mlp.0.weight"),
    "rows exchanged": (lambda p: written(p, rows_exchanged), "transformer", "img_mlp.0.weight"),
    "nn.init": (lambda p: written(p, nn.init.xavier_uniform_), "transformer", "img_mlp.0.weight"),
    "load_state_dict": (lambda p: written(p, state_dict_loaded), "transformer", "img_mlp.0.weight"),
    "another parameter": (
        another_parameter,
        "transformer",
        "txt_in.weight",
    ),
    "a forward hook": (
        lambda p: p.transformer.double_blocks[0].register_forward_hook(lambda *a: None).remove,
        "transformer",
        "double_blocks.0: a forward hook",
    ),
    "a forward pre-hook with kwargs": (
        lambda p: p.transformer.register_forward_pre_hook(lambda *a: None, with_kwargs=True).remove,
        "transformer",
        "a forward hook",
    ),
    "a hook of the autoencoder": (
        lambda p: p.autoencoder.decoder.conv_out.register_forward_hook(lambda *a: None).remove,
        "autoencoder",
        "decoder.conv_out: a forward hook",
    ),
    "a hook of CLIP": (
        lambda p: p.text.clip.text_model.register_forward_hook(lambda *a: None).remove,
        "clip",
        "text_model: a forward hook",
    ),
    "a hook of all modules": (
        lambda p: nn.modules.module.register_module_forward_hook(lambda *a: None).remove,
        "",
        "hooks of all modules",
    ),
    "another block": (other_module, "transformer", "double_blocks.1: another module"),
    "a block less": (one_block_less, "transformer", "was taken out"),
    "parametrised": (parametrised, "transformer", "txt_in: another module"),
    "pruned": (pruned, "transformer", "txt_in"),
    "half and back": (half_and_back, "transformer", "weight"),
    "a patched forward": (
        lambda p: swapped(p.transformer.img_in, "forward", MethodType(lambda self, x: x * 0, p.transformer.img_in)),
        "transformer",
        "img_in.forward",
    ),
    "a patched class": (
        lambda p: swapped(type(p.transformer.final_layer), "forward", lambda self, x, vec: x),
        "",
        "LastLayer.forward",
    ),
    "patched attention": (
        lambda p: swapped(torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: a[0]),
        "",
        "scaled_dot_product_attention",
    ),
    "another attribute": (
        lambda p: swapped(p.transformer.double_blocks[0].img_attn.norm.query_norm, "eps", 0.1),
        "transformer",
        "query_norm.eps",
    ),
    "another config": (
        lambda p: swapped(p.transformer, "config", FLUX1),
        "transformer",
        "config",
    ),
    "another text encoder": (another_encoder, "t5", "another module"),
    "another tokenizer": (
        lambda p: swapped(p.text, "t5_tokenizer", p.text.clip_tokenizer),
        "t5_tokenizer",
        "t5_tokenizer",
    ),
    "another end of text": (lambda p: swapped(p.text.t5_tokenizer, "end", 3), "t5_tokenizer", "t5_tokenizer"),
    "a patched encode": (lambda p: swapped(p.text, "encode", p.text.encode), "t5", "text: is another one"),
    "another variant": (
        lambda p: swapped(p, "variant", replace(p.variant, name="nano", shift=not p.variant.shift)),
        "",
        "variant",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_noticed(pipe: Pipeline, name: str) -> None:
    """Item 2: it is named, not cached, and the files of the part claim no hash; undone, the pipeline is what it was."""
    make, part, word = CHANGES[name]
    undo = make(pipe)
    try:
        changes = pipe.changed()
        files = pipe._files(changes)
        assert changes and any(word in line for line in changes)
        assert not part or all(line.startswith(f"{part}:") or part in ("t5", "clip") for line in changes)
        edited = {part for part, stamp in files if type(stamp).__name__ == "Edited"}
        assert (part in edited) if part else not edited
    finally:
        undo()
    assert pipe.changed() == ()


def test_a_changed_model_is_not_answered_from_the_cache(pipe: Pipeline, tmp_path: Path) -> None:
    """The picture of before comes neither with zero weights nor with a hook; the settings and the file say why."""
    first = draw(pipe)
    assert draw(pipe).cached and "changed" not in first.settings[0]
    undo = written(pipe, zero)
    changed = draw(pipe)
    about = changed.settings[0]
    assert not changed.cached and "cached" not in about
    assert about["changed"] == ["transformer: double_blocks.0.img_mlp.0.weight"]
    assert "changed in memory" in about["not_cached"] and "img_mlp" in about["not_cached"]
    assert changed.images[0].tobytes() != first.images[0].tobytes()
    changed.hash_files()
    hashes = {file["part"]: file["sha256"] for file in changed.settings[0]["files"]}
    assert hashes["transformer"] is None and hashes["autoencoder"] and hashes["t5"]
    undo()
    assert draw(pipe).cached
    with torch.no_grad():
        handle = pipe.transformer.final_layer.register_forward_hook(lambda module, inputs, output: output * 0)
    hooked = draw(pipe)
    handle.remove()
    assert not hooked.cached and hooked.settings[0]["changed"] == ["transformer: final_layer: a forward hook"]
    assert draw(pipe).images[0].tobytes() == first.images[0].tobytes()


def test_without_a_cache_it_is_said_as_well(loaded: Pipeline) -> None:
    handle = loaded.autoencoder.decoder.register_forward_hook(lambda module, inputs, output: -output)
    result = draw(loaded)
    handle.remove()
    result.hash_files()
    about = result.settings[0]
    assert about["changed"] == ["autoencoder: decoder: a forward hook"] and "not_cached" not in about
    assert {file["part"] for file in about["files"] if file["sha256"] is None} == {"autoencoder"}


def test_prompts_read_by_changed_encoders_are_forgotten(pipe: Pipeline) -> None:
    """Also when the encoder is itself again."""
    first = draw(pipe, "a square")
    handle = pipe.text.t5.register_forward_hook(lambda module, inputs, output: output * 0)
    pipe.results = None
    other = draw(pipe, "a square")
    handle.remove()
    again = draw(pipe, "a square")
    assert not torch.equal(other.latents, first.latents) and torch.equal(again.latents, first.latents)


def test_many_changes_are_bounded(pipe: Pipeline) -> None:
    with torch.no_grad():
        for parameter in pipe.transformer.parameters():
            parameter.mul_(0.5)
    about = draw(pipe).settings[0]
    assert len(about["changed"]) == 9 and about["changed"][-1].startswith("and ") and len(about["not_cached"]) < 2000


def test_loras_are_no_change(pipe: Pipeline) -> None:
    """Attached, at another strength, merged, unmerged, detached; on text encoders too."""
    lora.attach(pipe, "realism")
    sizes, layer = pipe.text.clip.config, "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    down, up = torch.ones(2, sizes.hidden_size), torch.ones(sizes.intermediate_size, 2)
    clip = {f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up}
    lora.attach(pipe, clip, name="words")
    assert pipe.changed() == ()
    lora.set_scale(pipe, "realism", 0.3)
    lora.set_schedule(pipe, "realism", lambda sigma: sigma)
    assert pipe.changed() == ()
    lora.set_schedule(pipe, "realism", None)
    lora.merge(pipe)
    assert pipe.changed() == ()
    lora.unmerge(pipe)
    lora.detach(pipe, "words")
    lora.detach(pipe, "realism")
    assert pipe.changed() == ()


def test_a_lora_changed_after_attaching_is_a_change(pipe: Pipeline) -> None:
    """Its file's hash is not claimed, and it is not cached."""
    lora.attach(pipe, "realism")
    assert draw(pipe).settings[0]["cached"] is False and draw(pipe).cached
    changes = next(c for m in pipe.transformer.modules() for c in lora.layer.changes_of(m).values())
    kept = changes[0].up.clone()  # pyright: ignore
    with torch.inference_mode():
        changes[0].up.mul_(2)  # pyright: ignore
    result = draw(pipe)
    assert not result.cached and result.settings[0]["changed"] == ["lora realism: is not as it was attached"]
    result.hash_files()
    assert [file["part"] for file in result.settings[0]["files"] if file["sha256"] is None] == ["lora realism"]
    with torch.inference_mode():
        changes[0].up.copy_(kept)  # pyright: ignore
        assert draw(pipe).cached
        changes[0].scale.fill_(3.0)
    assert not draw(pipe).cached
    lora.detach(pipe, "realism")


def test_weights_changed_under_a_merged_lora_are_a_change(pipe: Pipeline) -> None:
    lora.attach(pipe, "realism")
    lora.merge(pipe)
    original = next(iter(pipe.transformer.__dict__["_lora_originals"].values()))
    kept = original.clone()
    original.data.zero_()
    assert len(pipe.changed()) == 1
    original.data.copy_(kept)
    lora.unmerge(pipe)
    lora.detach(pipe, "realism")


@pytest.mark.parametrize("mode", ["text-freed", "offload", "stream"])
def test_memory_modes_are_no_change(mode: str) -> None:
    """Before, between and while drawing, also in another thread; a hook and a patched block are noticed in them."""
    pipe = miniflux.load("nano", memory=mode, cache=ResultCache())
    assert pipe.changed() == ()
    seen: list[tuple[str, ...]] = []
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            seen.append(pipe.changed())

    thread = threading.Thread(target=look)
    thread.start()
    try:
        first = draw(pipe, watch=lambda *_: seen.append(pipe.changed()))
    finally:
        done.set()
        thread.join()
    assert set(seen) == {()} and not first.cached and draw(pipe).cached
    lora.attach(pipe, "realism")
    assert pipe.changed() == ()
    lora.detach(pipe, "realism")
    handle = pipe.transformer.double_blocks[0].register_forward_hook(lambda *a: None)
    assert pipe.changed() == ("transformer: double_blocks.0: a forward hook",)
    handle.remove()
    layer = pipe.transformer.double_blocks[0].img_mlp[0]  # pyright: ignore
    weight = layer.weight
    layer.weight = nn.Parameter(torch.zeros(weight.shape), requires_grad=False)  # pyright: ignore
    assert pipe.changed() == ("transformer: double_blocks.0.img_mlp.0.weight",)
    layer.weight = weight  # pyright: ignore
    assert pipe.changed() == ()


def test_packed_layers_are_no_change_and_their_numbers_count(tmp_path: Path) -> None:
    """A packed layer, a LoRA merged into it, and one of its bytes changed."""
    path = tmp_path / "packed.safetensors"
    convert(BUNDLED / "flux1-nano-dev.safetensors", path, format="int8")
    pipe = miniflux.load("nano", weights={"transformer": path})
    layers = packed_layers(pipe.transformer)
    assert layers and pipe.changed() == ()
    draw(pipe)
    lora.attach(pipe, "realism")
    for pack in (False, True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            lora.merge(pipe, pack=pack)
        assert pipe.changed() == ()
        lora.unmerge(pipe)
    lora.detach(pipe, "realism")
    assert pipe.changed() == ()
    name, layer = next(iter(layers.items()))
    buffer = layer.names(0)["weight"]
    getattr(layer, buffer).data[0, 0] += 1
    assert pipe.changed() == (f"transformer: {name}.{buffer}",)


def test_what_looking_costs(loaded: Pipeline) -> None:
    """About 1 % of a nano picture of 128x128; the bound here is that of a busy machine."""

    def shortest(run: Callable[[], object], times: int) -> float:
        taken: list[float] = []
        for _ in range(times):
            start = time.perf_counter()
            run()
            taken.append(time.perf_counter() - start)
        return min(taken)

    assert shortest(loaded.changed, 20) < 0.03 * shortest(lambda: loaded.generate("a star", seed=1), 2)


def test_inference_tensors() -> None:
    """They have no version; their numbers are looked at all the same."""
    with torch.inference_mode():
        pipe = miniflux.load("nano")
    assert pipe.changed() == ()
    with torch.inference_mode():
        pipe.transformer.img_in.bias[0] += 1
    assert pipe.changed() == ("transformer: img_in.bias",)


def test_large_networks_are_sampled() -> None:
    """Identity, place and version count as well: one number changed in place, and all of `.data`."""
    network = nn.Linear(300, 300)
    then = facts_of(network, whole=False)
    assert differences(then, facts_of(network, whole=False)) == []
    with torch.no_grad():
        network.weight[7, 3] += 1  # which no sample need be
    assert differences(then, facts_of(network, whole=False)) == ["weight"]
    then = facts_of(network, whole=False)
    network.bias.data.mul_(1.5)
    assert differences(then, facts_of(network, whole=False)) == ["bias"]


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.float8_e4m3fn, torch.int64])
def test_numbers_on_a_device(whole: bool, dtype: torch.dtype) -> None:
    """What a GPU is asked: every number counts where all are read, and places count; views at odd addresses too."""
    area = torch.arange(1, 4097).to(torch.uint8)
    odd = area[3:260].view(torch.uint8)
    tensors = [(torch.arange(n) % 7).to(torch.float32).to(dtype) for n in (1, 8, 101, 9999)] + [odd]
    then = numbers_elsewhere(tensors, whole)
    assert then == numbers_elsewhere([tensor.clone() for tensor in tensors], whole)
    for i, tensor in enumerate(tensors):
        at = 0 if not whole else len(tensor) // 2
        changed = [other.clone() for other in tensors]
        changed[i].view(torch.uint8)[at * tensor.element_size()] ^= 1
        now = numbers_elsewhere(changed, whole)
        assert [a == b for a, b in zip(then, now, strict=True)] == [j != i for j in range(len(tensors))]


def test_a_pipeline_without_files_knows_of_no_changes(loaded: Pipeline) -> None:
    made = Pipeline(loaded.variant, loaded.transformer, loaded.autoencoder, loaded.text)
    handle = made.transformer.register_forward_hook(lambda *a: None)
    assert made.changed() == ()
    handle.remove()
