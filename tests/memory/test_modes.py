"""Weights that come and go: the same pictures, bit for bit, and nothing left behind."""

from __future__ import annotations

import re
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import miniflux
from miniflux.checkpoints.networks import BY_KIND
from miniflux.checkpoints.networks.flux1 import MODULATION
from miniflux.errors import CheckpointError, InputError, LoraError
from miniflux.lora import attach, detach, merge
from miniflux.memory import modes
from miniflux.pipeline import Pipeline
from miniflux.sampling import Moment, guide
from miniflux.sampling.denoising import denoise, model_calls
from miniflux.sampling.solvers import SOLVERS
from tests.memory.conftest import Make
from tests.reference import alike
from tests.tiny import flux1_inputs, randn

COME_AND_GO = ("stream", "offload")
PROMPT = "a red circle"


def loaded(path: Path, memory: str, **settings: Any) -> Pipeline:
    return miniflux.load(path, memory=memory, device="cpu", **settings)


def drawn(pipe: Pipeline, **settings: Any) -> Tensor:
    return pipe.generate(PROMPT, **{"steps": 2, "width": 32, "height": 24, "t5_length": 6, **settings}).latents


@pytest.fixture(scope="module")
def resident(make: Make) -> Pipeline:
    return loaded(make(), "resident")


@pytest.fixture(scope="module", params=COME_AND_GO)
def streamed(make: Make, request: pytest.FixtureRequest) -> Pipeline:
    return loaded(make(), request.param)


def assert_nothing_held(pipe: Pipeline) -> None:
    """No block has weights, and no memory is set aside for them; what is outside the blocks stays."""
    assert pipe.memory is not None and pipe.memory.transformer is not None
    for network in (pipe.memory.transformer, *pipe.memory.text):
        assert network.held == 0
        units = {unit.name for chain in network.chains for unit in chain.units}
        stays = BY_KIND[type(network.network)].stays
        for key, tensor in network.network.state_dict().items():
            inside = any(key.startswith(f"{name}.") for name in units)
            assert tensor.is_meta == (inside and not (stays and stays.fullmatch(key))), key


def assert_foreseen(pipe: Pipeline) -> None:
    assert pipe.memory is not None and pipe.memory.ahead is not None
    assert pipe.memory.ahead.misses == 0


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize("layout", ["original", "diffusers"])
@pytest.mark.parametrize("memory", [*COME_AND_GO, "text-freed"])
def test_every_mode_draws_the_same(make: Make, memory: str, layout: str, ahead: bool) -> None:
    pipe = loaded(make(layout), memory, modulation_ahead=ahead)
    result = pipe.generate(PROMPT, steps=2, width=32, height=24, t5_length=6)
    assert torch.equal(result.latents, drawn(loaded(make(layout), "resident")))
    assert result.settings[0]["memory"] == memory
    if memory != "text-freed":
        assert_nothing_held(pipe)
        assert pipe.memory is not None
        assert (pipe.memory.ahead is not None) == ahead


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory", COME_AND_GO)
def test_half_precision_files_are_widened_block_by_block(make: Make, memory: str, stored: torch.dtype) -> None:
    """Bitwise the model that was widened as a whole, in two areas of the size of a block in float32."""
    path = make(dtype=stored)
    pipe = loaded(path, memory, dtype="float32")
    held: list[int] = []
    assert pipe.memory is not None and pipe.memory.transformer is not None
    network, wide = pipe.memory.transformer, loaded(path, "resident", dtype="float32")
    other = drawn(pipe, callback=lambda i, moment: held.append(network.held))
    assert torch.equal(other, drawn(wide))
    block = wide.transformer.double_blocks[0].state_dict()
    size = sum(4 * t.numel() for key, t in block.items() if "_mod.lin" not in key)
    assert 2 * size <= held[0] <= 2 * size + 2 * 64 * len(block)
    assert torch.equal(drawn(loaded(path, memory)), drawn(loaded(path, "resident")))  # in what suits the machine


@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("memory", COME_AND_GO)
def test_packed_weights_stay_packed(make: Make, memory: str, stored: torch.dtype, tmp_path: Path) -> None:
    root = tmp_path / "model"
    shutil.copytree(make(), root, symlinks=True)
    file = root / "transformer" / "model.safetensors"
    tensors = load_file(file)
    save_file({key: t.to(stored) if t.ndim == 2 else t for key, t in tensors.items()}, file)
    pipe = loaded(root, memory, dtype="float32")
    held: list[int] = []
    assert pipe.memory is not None and pipe.memory.transformer is not None
    network = pipe.memory.transformer
    other = drawn(pipe, callback=lambda i, moment: held.append(network.held))
    assert torch.equal(other, drawn(loaded(root, "resident", dtype="float32")))
    assert 0 < held[0] < 2 * sum(t.numel() * 2 for key, t in tensors.items() if key.startswith("double_blocks.0."))
    assert_nothing_held(pipe)


@pytest.mark.parametrize(
    "settings",
    [
        {"solver": "heun"},
        {"solver": "rk4"},
        {"solver": "dpmpp-2s"},
        {"solver": "ddim:0.5"},
        {"solver": "heun", "restart": (0.3, 0.8, 1), "steps": 4},
        {"guide": guide("cfg", scale=3.0), "negative": "a blue star"},
        {"guide": guide("perp-neg", scale=2.0), "negative": "a blue star"},
        {"guide": guide("nag", scale=3.0), "negative": "a blue star"},
        {"guide": guide("skip-layer", skip_window=(0.0, 1.0)), "steps": 3},
        {"cache": "first-block", "steps": 4},
        {"cache": "tea", "steps": 4},
        {"cache": "taylor", "steps": 4},
        {"guidance": lambda sigma: 1 + sigma},
        {"images": 2, "padding": "masked"},
        {"stop": 1, "steps": 3},
    ],
    ids=lambda settings: "-".join(map(str, settings)),
)
def test_whatever_is_asked_for(streamed: Pipeline, resident: Pipeline, settings: dict[str, Any]) -> None:
    """Extra calls, several texts, skipped blocks: the same latents, and every modulation was foreseen."""
    assert alike(drawn(streamed, **settings), drawn(resident, **settings))
    assert_foreseen(streamed)
    assert_nothing_held(streamed)


def test_resuming(streamed: Pipeline, resident: Pipeline) -> None:
    half = streamed.generate(PROMPT, steps=4, stop=2, width=32, height=24, t5_length=6, solver="ipndm").moment
    assert isinstance(half, Moment)
    assert torch.equal(drawn(streamed, steps=4, resume=half, solver="ipndm"), drawn(resident, steps=4, solver="ipndm"))
    assert_foreseen(streamed)


@pytest.mark.parametrize("name", SOLVERS)
def test_the_calls_of_a_run_are_known_before(resident: Pipeline, name: str) -> None:
    """Every solver asks for the noise levels that it asked for in the rehearsal, in that order."""
    model, heard = resident.transformer, list[tuple[float, float]]()
    inputs = flux1_inputs(model.config, batch=1)
    run = {key: inputs[key] for key in ("img", "img_ids", "txt", "txt_ids")}
    run |= {"vec": inputs["y"], "timesteps": [1.0, 0.8, 0.5, 0.1, 0.0], "guidance": lambda sigma: 1 + sigma}
    handle = model.register_forward_pre_hook(lambda _, given: heard.append((float(given[4][0]), float(given[6][0]))))
    try:
        denoise(model, **run, method=name, rng=lambda step, x: randn(*x.shape, seed=step))
    finally:
        handle.remove()
    calls = model_calls(model, **run, method=name)
    assert [(float(call.timesteps[0]), float(call.guidance[0])) for call in calls if call.guidance is not None] == heard


def test_a_vector_that_nobody_foresaw(make: Make, resident: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    """Whoever changes the conditioning in flight gets what the plain network says; it is counted and said once."""
    pipe, inputs = loaded(make(), "stream"), flux1_inputs(resident.transformer.config)
    assert pipe.memory is not None and pipe.memory.ahead is not None

    def moved(_: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
        return (*given[:4], given[4] * 0.5, *given[5:])

    handles = [p.transformer.register_forward_pre_hook(moved) for p in (pipe, resident)]
    try:
        assert torch.equal(drawn(pipe), drawn(resident))
    finally:
        for handle in handles:
            handle.remove()
    linears = sum(re.fullmatch(MODULATION, name) is not None for name, _ in pipe.transformer.named_modules())
    assert pipe.memory.ahead.misses == 2 * linears
    assert sum("not foreseen" in message for message in caplog.messages) == 1
    with torch.inference_mode():  # and outside of any run
        assert torch.equal(pipe.transformer(**inputs), resident.transformer(**inputs))


def test_modulations_are_read_once(make: Make) -> None:
    """Not per step, not per picture of a prompt."""
    pipe = loaded(make(), "stream")
    assert pipe.memory is not None and pipe.memory.transformer is not None
    _, modulation = pipe.memory.transformer.chains
    drawn(pipe, steps=1)
    once = modulation.bytes_read
    state = loaded(make(), "resident").transformer.state_dict()
    assert once == sum(4 * t.numel() for key, t in state.items() if re.fullmatch(rf"({MODULATION})\.weight", key))
    drawn(loaded(make(), "stream"), steps=4)
    drawn(pipe, steps=1, images=2)
    assert modulation.bytes_read == once
    drawn(pipe, steps=3)
    assert modulation.bytes_read == 2 * once


LORA = {
    "double_blocks.0.img_attn.qkv": (96, 32),
    "double_blocks.1.txt_mod.lin": (192, 32),
    "single_blocks.1.linear2": (32, 160),
    "single_blocks.0.modulation.lin": (96, 32),
    "final_layer.adaLN_modulation.1": (64, 32),
}


def lora_tensors(dora: bool) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for seed, (name, (rows, columns)) in enumerate(LORA.items()):
        tensors[f"diffusion_model.{name}.lora_A.weight"] = randn(2, columns, seed=seed)
        tensors[f"diffusion_model.{name}.lora_B.weight"] = randn(rows, 2, seed=100 + seed)
        if dora:
            tensors[f"diffusion_model.{name}.dora_scale"] = randn(rows, 1, seed=200 + seed).abs() + 0.5
    return tensors


@pytest.mark.parametrize("dora", [False, True])
def test_loras(make: Make, streamed: Pipeline, resident: Pipeline, dora: bool) -> None:
    """On blocks and on modulations: the same as on resident weights; off again it is the model as it was."""
    plain = drawn(resident)
    for pipe in (streamed, resident):
        receipt = attach(pipe, lora_tensors(dora), 0.7, "x")
        assert receipt.applied == len(LORA)
    changed = drawn(streamed)
    assert torch.equal(changed, drawn(resident)) and not torch.equal(changed, plain)
    with pytest.raises(LoraError, match="in memory only while it runs"):
        merge(streamed, "x")
    for pipe in (streamed, resident):
        detach(pipe, "x")
    assert torch.equal(drawn(streamed), plain) and torch.equal(drawn(resident), plain)
    assert_nothing_held(streamed)


def test_replaced_norms(streamed: Pipeline, resident: Pipeline) -> None:
    """Parameters that a LoRA exchanges stay exchanged while blocks come and go."""
    norm, plain = "double_blocks.0.img_attn.norm.query_norm.scale", drawn(resident)
    tensors = lora_tensors(dora=False)
    tensors = {key.removeprefix("diffusion_model."): tensor for key, tensor in tensors.items()}
    tensors[norm] = randn(16, seed=9)
    for pipe in (streamed, resident):
        attach(pipe, tensors, 1.0, "control")
    assert torch.equal(drawn(streamed), drawn(resident))
    for pipe in (streamed, resident):
        detach(pipe, "control")
    assert torch.equal(drawn(streamed), plain)
    assert_nothing_held(streamed)


def test_threads(streamed: Pipeline, resident: Pipeline) -> None:
    """Runs of other prompts, sizes and seeds at the same time do not disturb each other."""
    jobs: list[dict[str, Any]] = [{"seed": i, "steps": 1 + i % 3, "guidance": 1.0 + i} for i in range(4)]
    found: dict[int, Tensor] = {}

    def work(i: int) -> None:
        found[i] = drawn(streamed, **jobs[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, job in enumerate(jobs):
        assert torch.equal(found[i], drawn(resident, **job))
    assert_nothing_held(streamed)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_interruption_leaves_everything_usable(
    streamed: Pipeline, resident: Pipeline, error: type[BaseException]
) -> None:
    """Between steps, and in the middle of a block, which stopping with the keyboard may be."""

    def stop(*_: Any) -> Any:
        raise error("enough")

    with pytest.raises(error, match="enough"):
        drawn(streamed, callback=stop)
    assert_nothing_held(streamed)
    handle = streamed.transformer.get_submodule("single_blocks.0.linear2").register_forward_pre_hook(stop)
    with pytest.raises(error, match="enough"):
        drawn(streamed)
    handle.remove()
    assert_nothing_held(streamed)
    done: list[Tensor] = []
    thread = threading.Thread(target=lambda: done.append(drawn(streamed)))  # no lock is left behind
    thread.start()
    thread.join(60)
    assert torch.equal(done[0], drawn(resident))


def test_numbers_that_are_not_finite(make: Make, tmp_path: Path) -> None:
    """Where the blocks are read as they run, they are looked at when they are first read."""
    root = tmp_path / "model"
    shutil.copytree(make(), root, symlinks=True)
    file = root / "transformer" / "model.safetensors"
    tensors = load_file(file)
    tensors["single_blocks.1.linear1.weight"][3, 4] = float("nan")
    save_file(tensors, file)
    for memory in ("resident", "offload"):
        with pytest.raises(CheckpointError, match=r"single_blocks\.1\.linear1\.weight"):
            loaded(root, memory)
    pipe = loaded(root, "stream")
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"1 not finite .* single_blocks\.1\.linear1\.weight"):
            drawn(pipe)
        assert_nothing_held(pipe)
    tensors["single_blocks.1.linear1.weight"][3, 4] = 0
    tensors["txt_in.weight"][0, 0] = float("inf")
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"txt_in\.weight"):
        loaded(root, "stream")


def test_a_file_that_goes_away(make: Make, tmp_path: Path) -> None:
    root = tmp_path / "model"
    shutil.copytree(make(), root, symlinks=True)
    pipe = loaded(root, "stream")
    drawn(pipe)
    (root / "transformer" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        drawn(pipe)
    assert_nothing_held(pipe)


def test_modes_that_do_not_exist(make: Make) -> None:
    with pytest.raises(InputError, match="auto, resident, text-freed, offload, stream, got 'swap'"):
        loaded(make(), "swap")


def test_auto_takes_the_fastest_that_fits(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And says what was free, what each mode would need, and why."""
    path, needs = make(dtype=torch.bfloat16), dict[str, int]()
    for mode in modes.MODES:
        ledger = ledger_of(loaded(path, mode, dtype="float32"))
        needs[mode] = ledger.ram - ledger.process
    taken: list[str] = []
    for free in [*sorted((int(need / modes.SPARED) + 2 for need in needs.values()), reverse=True), 0]:
        monkeypatch.setattr(modes, "free_ram", lambda free=free: free)
        caplog.clear()
        with caplog.at_level("INFO"):
            pipe = loaded(path, "auto", dtype="float32")
        assert pipe.memory is not None
        fitting = [mode for mode in modes.MODES if needs[mode] <= modes.SPARED * free]
        taken.append(pipe.memory.mode)
        assert taken[-1] == (fitting[0] if fitting else "stream")
        said = next(message for message in caplog.messages if message.startswith("memory "))
        assert said.startswith(f"memory {taken[-1]}: {'it fits' if fitting else 'nothing needs less'} (free: ")
        assert "resident needs" in said and f"{taken[-1]} needs" in said
    assert taken[0] == "resident" and taken[-1] == "stream" and len(set(taken)) > 2


def ledger_of(pipe: Pipeline) -> Any:
    from miniflux.memory.ledger import Run

    assert pipe.memory is not None
    variant = pipe.variant
    return pipe.memory.ledger(
        Run(width=variant.size, height=variant.size, text_tokens=variant.t5_length, calls=variant.steps)
    )


def test_conditions_are_cut_as_the_picture_is(resident: Pipeline) -> None:
    """Channels and tokens beside the picture, in a run of many tokens: the rehearsal takes one of each."""
    model = resident.transformer
    inputs = flux1_inputs(model.config, batch=1)
    run = {key: inputs[key] for key in ("img_ids", "txt", "txt_ids")}
    run |= {"vec": inputs["y"], "timesteps": [1.0, 0.5, 0.0], "guidance": 2.0}
    run["img"] = inputs["img"]
    assert len(model_calls(model, **run, img_cond=inputs["img"][..., :7])) == 2
    tokens = {"img_cond_seq": inputs["img"][:, :3], "img_cond_seq_ids": inputs["img_ids"][:, :3]}
    assert len(model_calls(model, **run, **tokens)) == 2
