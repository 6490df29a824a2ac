"""Checkpoints with LoRAs merged in, and LoRAs taken out of checkpoints, file to file."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from miniflux.checkpoints import load_into, save, to_layout
from miniflux.errors import CheckpointError, InputError, LoraError, MinifluxError, OutputError
from miniflux.lora import attach, detach, extract, inspect, merge, merge_files, unmerge
from miniflux.models.flux1 import Flux1, Flux1Config
from miniflux.weights.finding import BUNDLED
from tests.lora.conftest import out
from tests.lora.made import lora
from tests.lora.test_attach import FILES, control, control_base, wider
from tests.reference import Golden, of_exponentials
from tests.tiny import FLUX1, flux1_inputs, randn, randomise

QKV, LINEAR1, LINEAR2 = "double_blocks.0.img_attn.qkv", "single_blocks.1.linear1", "single_blocks.0.linear2"
MODULATION = "final_layer.adaLN_modulation.1"
INPUTS = flux1_inputs(FLUX1)
LAYOUTS = ("original", "diffusers")


def loaded(path: Path, config: Flux1Config = FLUX1) -> Flux1:
    """Strictly."""
    with torch.device("meta"):
        network = Flux1(config)
    load_into(network, path)
    return network.eval()


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", FILES)
def test_merged_file_is_the_attached_lora(form: str, layout: str, network: Flux1, tmp_path: Path) -> None:
    """In the layout and with the keys of its base."""
    base, merged = tmp_path / "base.safetensors", tmp_path / "merged.safetensors"
    save(network, base, layout=layout)
    tensors = FILES[form](network)
    receipts = merge_files(base, [(tensors, 0.7)], merged)
    assert len(receipts) == 1 and receipts[0].applied == receipts[0].expected
    assert load_file(merged).keys() == load_file(base).keys()
    attach(network, tensors, scale=0.7, name="x")
    close(out(loaded(merged, network.config), wider(network)), out(network, wider(network)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.safetensors", "merged.safetensors"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_control_lora_of_the_original_release(layout: str, golden: Callable[[str], Golden], tmp_path: Path) -> None:
    data = golden("flux1_control_lora")
    network, tensors = control_base(data)
    save(network, tmp_path / "base.safetensors", layout=layout)
    merge_files(tmp_path / "base.safetensors", [(tensors, 0.85)], tmp_path / "merged.safetensors")
    wide = replace(network.config, in_channels=data["img"].shape[-1])
    found = loaded(tmp_path / "merged.safetensors", wide)
    told = [data[name] for name in ("img", "img_ids", "txt", "txt_ids", "timesteps", "y", "guidance")]
    with torch.inference_mode():
        torch.testing.assert_close(
            found(*told), data["output"], rtol=0, atol=2e-5 + of_exponentials(lambda: found(*told))
        )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_several_loras_into_shards(layout: str, network: Flux1, tmp_path: Path) -> None:
    """Scales of all kinds; the base may lie in pieces, and its header is kept."""
    state, index = to_layout(network, network.state_dict(), layout), {}
    folder = tmp_path / "base"
    folder.mkdir()
    for i in range(3):
        part = {key: state[key].contiguous() for key in list(state)[i::3]}
        save_file(part, folder / f"m-{i}.safetensors", {"format": "pt"})
        index |= dict.fromkeys(part, f"m-{i}.safetensors")
    (folder / "m.safetensors.index.json").write_text(json.dumps({"weight_map": index}), "utf-8")
    first, second = lora(network, QKV, LINEAR1), lora(network, LINEAR1, MODULATION, seed=9)
    save_file(first, tmp_path / "first.safetensors")
    scale = {"final_layer": 0.5}
    merge_files(folder, [(tmp_path / "first.safetensors", -0.5), (second, scale)], tmp_path / "merged.safetensors")
    attach(network, first, -0.5, "first")
    attach(network, second, scale, "second")
    close(out(loaded(tmp_path / "merged.safetensors")), out(network))


def test_dtypes_and_header_of_the_base_stay(network: Flux1, tmp_path: Path) -> None:
    """Layers that no LoRA changes keep their bytes."""
    base, merged = tmp_path / "base.safetensors", tmp_path / "merged.safetensors"
    state = {k: t.bfloat16() if "blocks" in k else t.clone() for k, t in network.state_dict().items()}
    save_file(state, base, {"about": "a test"})
    merge_files(base, [(lora(network, QKV, "img_in"), 1.0)], merged)
    found = load_file(merged)
    with safe_open(merged, "pt") as file:
        assert file.metadata()["about"] == "a test"
    assert {key: tensor.dtype for key, tensor in found.items()} == {key: tensor.dtype for key, tensor in state.items()}
    different = {key for key in state if not torch.equal(found[key], state[key])}
    assert different == {f"{QKV}.weight", "img_in.weight"}


@pytest.mark.parametrize("form", FILES)
def test_scale_0_gives_the_base(form: str, network: Flux1, tmp_path: Path) -> None:
    """As an attached LoRA of scale 0 does; a wider input has zeros for what is new."""
    save(network, tmp_path / "base.safetensors")
    merge_files(tmp_path / "base.safetensors", [(FILES[form](network), 0.0)], tmp_path / "merged.safetensors")
    before, after = load_file(tmp_path / "base.safetensors"), load_file(tmp_path / "merged.safetensors")
    for key, tensor in before.items():
        found = after[key]
        if found.shape != tensor.shape:
            assert key == "img_in.weight" and not found[:, tensor.shape[1] :].any()
            found = found[:, : tensor.shape[1]]
        assert torch.equal(found, tensor), key


def broken_loras(network: Flux1) -> dict[str, tuple[list[Any], str]]:
    good = lora(network, QKV)
    encoder = {f"lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_{half}.weight": torch.ones(2, 2)
               for half in ("down", "up")}  # fmt: skip
    return {
        "no such file": [("nothing.safetensors", 1.0)],
        "half": [(good, 1.0), ({f"{QKV}.lora_down.weight": torch.ones(2, 32)}, 1.0)],
        "wrong width": [
            ({f"{QKV}.lora_down.weight": torch.ones(2, 33), f"{QKV}.lora_up.weight": torch.ones(96, 2)}, 1.0)
        ],
        "of an encoder": [(encoder, 1.0)],
        "scale not a number": [(good, float("nan"))],
        "scale of nothing": [(good, {"nowhere": 1.0})],
    }


@pytest.mark.parametrize("kind", ["no such file", "half", "wrong width", "of an encoder", "scale not a number",
                                  "scale of nothing"])  # fmt: skip
def test_a_bad_lora_leaves_nothing_behind(kind: str, network: Flux1, tmp_path: Path) -> None:
    base, merged = tmp_path / "base.safetensors", tmp_path / "merged.safetensors"
    save(network, base)
    merged.write_bytes(b"old")
    with pytest.raises((LoraError, InputError)):
        merge_files(base, broken_loras(network)[kind], merged)
    assert merged.read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.safetensors", "merged.safetensors"]


def test_bad_bases_and_places(network: Flux1, tmp_path: Path) -> None:
    save(network, tmp_path / "base.safetensors")
    good = lora(network, QKV)
    with pytest.raises(CheckpointError, match="ae.safetensors|Autoencoder|transformer"):
        merge_files(BUNDLED / "ae.safetensors", [(good, 1.0)], tmp_path / "merged.safetensors")
    with pytest.raises(OutputError, match="merged.pt"):
        merge_files(tmp_path / "base.safetensors", [(good, 1.0)], tmp_path / "merged.pt")
    with pytest.raises(OutputError, match="nowhere"):
        merge_files(tmp_path / "base.safetensors", [(good, 1.0)], tmp_path / "nowhere" / "merged.safetensors")
    part = {key: tensor for key, tensor in load_file(tmp_path / "base.safetensors").items() if key != f"{LINEAR2}.bias"}
    save_file(part, tmp_path / "part.safetensors")
    with pytest.raises(CheckpointError, match=f"{LINEAR2}.bias"):
        merge_files(tmp_path / "part.safetensors", [(good, 1.0)], tmp_path / "merged.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.safetensors", "part.safetensors"]


# Extraction


def tuned_files(network: Flux1, tensors: dict[str, Tensor], tmp_path: Path) -> tuple[Path, Path]:
    """A base in one layout and its tuned form in the other."""
    base, tuned = tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"
    save(network, base, layout="diffusers")
    attach(network, tensors, name="tuning")
    merge(network, "tuning")
    save(network, tuned)
    unmerge(network, "tuning")
    detach(network, "tuning")
    return base, tuned


@pytest.mark.parametrize("dialect", ["diffusers", "kohya", "comfyui"])
@pytest.mark.parametrize("form", ["LoRA", "LoHa", "diff", "bias", "norm", "control"])
def test_all_ranks_give_the_tuned_model(form: str, dialect: str, network: Flux1, tmp_path: Path) -> None:
    base, tuned = tuned_files(network, FILES[form](network), tmp_path)
    found = extract(base, tuned, tmp_path / "x.safetensors", rank=FLUX1.hidden_size, dialect=dialect)
    assert all(0 < module.captured <= 1 and module.norm > 0 for module in found)
    assert all(module.captured == pytest.approx(1, abs=1e-6) for module in found)
    attach(network, tmp_path / "x.safetensors")
    close(out(network, wider(network)), out(loaded(tuned, network.config), wider(network)))


def test_a_low_rank_is_the_best_approximation(network: Flux1, tmp_path: Path) -> None:
    """Eckart-Young: the error is the norm of the singular values that are left out."""
    base, tuned = tuned_files(network, FILES["diff"](network), tmp_path)
    (matrix, *_) = [m for m in extract(base, tuned, tmp_path / "x.safetensors", rank=5) if m.target == QKV]
    delta = load_file(tuned)[f"{QKV}.weight"].double() - network.get_submodule(QKV).weight.detach().double()
    values = torch.linalg.svdvals(delta)
    assert matrix.norm == pytest.approx(float(delta.norm()), rel=1e-5)
    assert matrix.captured == pytest.approx(float((values[:5] ** 2).sum() / (values**2).sum()), rel=1e-5)
    (module,) = [m for m in attach(network, tmp_path / "x.safetensors").modules if m.target == QKV]
    assert module.rank == 5
    error = (module.change.delta().double() - delta).norm()
    assert float(error) == pytest.approx(float(values[5:].norm()), rel=1e-4)


def test_big_matrices_are_decomposed_by_random_projection(
    network: Flux1, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exact for a difference that is of that rank; twice the same bytes, and the global generator is left alone."""
    monkeypatch.setattr("miniflux.lora.tools.EXACT_SVD", 8)
    base, tuned = tuned_files(network, lora(network, QKV, LINEAR2, rank=4), tmp_path)
    before = torch.random.get_rng_state()
    found = extract(base, tuned, tmp_path / "a.safetensors", rank=4)
    extract(base, tuned, tmp_path / "b.safetensors", rank=4)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert {module.target for module in found} == {QKV, LINEAR2}
    assert all(module.captured == pytest.approx(1, abs=1e-4) for module in found)
    attach(network, tmp_path / "a.safetensors")
    close(out(network), out(loaded(tuned)))


def test_extract_refuses(network: Flux1, tmp_path: Path) -> None:
    """Equal files, other sizes, no rank; nothing is written."""
    base, tuned = tuned_files(network, lora(network, QKV), tmp_path)
    save(randomise(Flux1(replace(FLUX1, depth=1))), tmp_path / "small.safetensors")
    save(randomise(Flux1(replace(FLUX1, in_channels=8))), tmp_path / "narrow.safetensors")
    files = sorted(tmp_path.iterdir())
    x = tmp_path / "x.safetensors"
    with pytest.raises(InputError, match="the same numbers"):
        extract(base, base, x)
    with pytest.raises(CheckpointError, match="different sizes: double_blocks.1"):
        extract(base, tmp_path / "small.safetensors", x)
    with pytest.raises(MinifluxError):  # fewer inputs than the base has
        extract(base, tmp_path / "narrow.safetensors", x)
    for rank in (0, -1, 2.0, True):
        with pytest.raises(InputError, match="rank"):
            extract(base, tuned, x, rank=rank)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="unknown dialect"):
        extract(base, tuned, x, dialect="klingon")
    with pytest.raises(CheckpointError):
        extract(base, BUNDLED / "ae.safetensors", x)
    assert sorted(tmp_path.iterdir()) == files


# Inspection


def test_inspect_finds_the_model(tmp_path: Path) -> None:
    """Without loading one: the first whose sizes fit."""
    with torch.device("meta"):
        nano = Flux1(Flux1Config(**{**vars(FLUX1), "hidden_size": 192, "num_heads": 6, "axes_dim": (4, 14, 14)}))
    save_file(lora(nano, QKV), tmp_path / "a.safetensors")
    receipt = inspect(tmp_path / "a.safetensors")
    assert "nano-dev" in receipt.name and receipt.applied == receipt.expected == 1
    assert QKV in str(receipt)
    with pytest.raises(LoraError, match="its widths are those of nano-dev"):
        inspect(tmp_path / "a.safetensors", "flux1-dev")
    with pytest.raises(InputError, match="unknown model 'sdxl'"):
        inspect(tmp_path / "a.safetensors", "sdxl")


def test_inspect_of_a_file_for_no_model() -> None:
    with pytest.raises(LoraError, match=r"its widths \(33\) are those of no model known here"):
        inspect({f"{QKV}.lora_down.weight": torch.ones(2, 33), f"{QKV}.lora_up.weight": torch.ones(99, 2)})


def test_a_lora_that_was_attached_before_does_not_matter(network: Flux1, tmp_path: Path) -> None:
    """Saving a network writes its own weights, not what hangs on them."""
    save(network, tmp_path / "plain.safetensors")
    attach(network, lora(network, QKV), name="x")
    save(network, tmp_path / "attached.safetensors")
    detach(network, "x")
    assert (tmp_path / "plain.safetensors").read_bytes() == (tmp_path / "attached.safetensors").read_bytes()


def test_two_that_replace_the_same_norm_are_refused(network: Flux1, tmp_path: Path) -> None:
    """As when attaching: one of them would silently lose."""
    save(network, tmp_path / "base.safetensors")
    pair = [(control(network), 1.0), ({"single_blocks.0.norm.key_norm.scale": randn(16).abs()}, 1.0)]
    with pytest.raises(LoraError, match="key_norm"):
        merge_files(tmp_path / "base.safetensors", pair, tmp_path / "merged.safetensors")
    assert not (tmp_path / "merged.safetensors").exists()
