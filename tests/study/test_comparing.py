"""Where two networks part: faults planted by surgery on modules are named, and rounding is not taken for one."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import miniflux
from miniflux import study
from miniflux.apps.cli import main
from miniflux.checkpoints import save
from miniflux.conversion.converting import convert
from miniflux.errors import InputError
from miniflux.models import layers
from miniflux.models.flux1 import Flux1
from miniflux.models.flux2 import Flux2
from miniflux.models.flux3 import Flux3, Parts
from miniflux.models.layers import Shift, attention
from miniflux.study.divergence import comparing, parting, sides
from miniflux.testing import randomise
from tests.tiny import FLUX1, FLUX2, FLUX3

DEPTHS = {"depth": 4, "depth_single_blocks": 8}  # twelve blocks
CONFIGS = {
    "flux1": replace(FLUX1, **DEPTHS),
    "flux2": replace(FLUX2, **DEPTHS),
    "flux3": replace(FLUX3, cond_in_channels=16, depth=2, depth_single_blocks=6),  # 3 * 2 + 6
}
KINDS: dict[str, type[Any]] = {"flux1": Flux1, "flux2": Flux2, "flux3": Flux3}
INPUT: dict[str, Any] = {"width": 128, "height": 96, "text_tokens": 7}
Plant = Callable[[Any], None]


def network(name: str) -> Any:
    return randomise(KINDS[name](CONFIGS[name]), 3).requires_grad_(False)


def calling(module: Any, change: Callable[..., Any]) -> None:
    """Put another function in the place of a module's forward: `change(the old one, its arguments ...)`."""
    before = module.forward
    module.forward = lambda *args, **kwargs: change(before, *args, **kwargs)


def scaled(block: Any) -> None:
    block.linear1.weight *= 1.01


def heads_swapped(block: Any) -> None:
    """The first two heads of the queries."""
    head = block.img_attn.norm.query_norm.scale.numel()
    weight = block.img_attn.qkv.weight
    weight[: 2 * head] = torch.cat((weight[head : 2 * head].clone(), weight[:head].clone()))


def bias_lost(block: Any) -> None:
    block.img_attn.proj.bias.zero_()


def wrong_eps(block: Any) -> None:
    """That of torch's layer norm, in place of the release's: seen where a stream is not large, and else no fault."""
    block.img_norm1.eps = 1e-5


def wrong_qk_eps(block: Any) -> None:
    block.norm.query_norm.eps = 1e-4


def gate_negative(block: Any) -> None:
    calling(block, lambda old, x, mod, *rest: old(x, Shift(mod.shift, mod.scale, -mod.gate), *rest))


def qk_swapped(block: Any) -> None:
    calling(block, lambda old, *args: old(*args[:-1], lambda q, k, *rest: attention(k, q, *rest)))


def shift_and_scale_exchanged(block: Any) -> None:
    lin = block.modulation.lin
    shift, scale, gate = lin.weight.clone().chunk(3)
    lin.weight.copy_(torch.cat((scale, shift, gate)))


def transposed(block: Any) -> None:
    block.attn_out.weight.copy_(block.attn_out.weight.T.clone())


def norm_left_out(block: Any) -> None:
    block.norm.key_norm.forward = lambda x: x


def stale_dtype(block: Any) -> None:
    for parameter in block.parameters():
        parameter.copy_(parameter.bfloat16())


def streams_mixed(block: Any) -> None:
    calling(block, lambda old, *args: old(*args)[::-1])


def rope_left_out(block: Any) -> None:
    def unturned(q: Tensor, k: Tensor, v: Tensor, pe: Tensor, mask: Tensor | None) -> Tensor:
        return attention(q, k, v, torch.stack((torch.ones_like(pe[..., 0]), torch.zeros_like(pe[..., 0])), -1), mask)

    calling(block, lambda old, *args: old(*args[:-1], unturned))


def scale_without_one(block: Any) -> None:
    """scale * norm(x) + shift, in place of (1 + scale) * norm(x) + shift."""
    calling(block.txt_norm2, lambda old, x, mod: old(x, layers.Affine(mod.shift, mod.scale - 1)))


def halves_of_swiglu(block: Any) -> None:
    weight = block.txt_mlp[0].weight
    weight.copy_(torch.cat(weight.clone().chunk(2)[::-1]))


def exact_gelu(block: Any) -> None:
    block.img_mlp[1] = nn.GELU()


def softmax_scale(block: Any) -> None:
    calling(block, lambda old, *args: old(*args[:-1], lambda q, *rest: attention(q / 2**0.5, *rest)))


def residual_lost(block: Any) -> None:
    calling(block, lambda old, x, *rest: old(x, *rest) - x)


def one_number(block: Any) -> None:
    """A flipped sign of a single weight, as of a damaged file."""
    block.mlp_out.weight[3, 5] *= -1


def parts_mixed(block: Any) -> None:
    """The modulations of text and picture change places."""

    def change(old: Any, x: Tensor, parts: Any, *rest: Any) -> Tensor:
        return old(x, Parts(parts.lengths, (parts.shifts[1], parts.shifts[0], *parts.shifts[2:])), *rest)

    calling(block, change)


FAULTS: list[tuple[str, str, Plant]] = [
    ("flux1", "double_blocks.2", heads_swapped),
    ("flux1", "double_blocks.1", bias_lost),
    ("flux1", "double_blocks.0", wrong_eps),
    ("flux1", "double_blocks.3", streams_mixed),
    ("flux1", "double_blocks.1", exact_gelu),
    ("flux1", "single_blocks.0", scaled),
    ("flux1", "single_blocks.7", shift_and_scale_exchanged),
    ("flux1", "single_blocks.4", qk_swapped),
    ("flux1", "single_blocks.2", stale_dtype),
    ("flux2", "double_blocks.2", rope_left_out),
    ("flux2", "double_blocks.0", scale_without_one),
    ("flux2", "double_blocks.3", halves_of_swiglu),
    ("flux2", "single_blocks.5", gate_negative),
    ("flux2", "single_blocks.1", wrong_qk_eps),
    ("flux2", "single_blocks.6", softmax_scale),
    ("flux3", "txt_mode_blocks.1", transposed),
    ("flux3", "content_mode_blocks.image.0", norm_left_out),
    ("flux3", "content_mode_blocks.image_cond.1", residual_lost),
    ("flux3", "single_blocks.3", one_number),
    ("flux3", "single_blocks.2", parts_mixed),
]


@pytest.mark.parametrize(("name", "where", "plant"), FAULTS, ids=[f"{n}-{p.__name__}" for n, _, p in FAULTS])
def test_twenty_faults(name: str, where: str, plant: Plant) -> None:
    """Each is named, and nothing before or behind it; without it they agree."""
    a = network(name)
    b = copy.deepcopy(a)
    plant(b.get_submodule(where))
    found = study.diff(a, b, **INPUT)
    assert found.parts_at == where and f"they part at {where}: " in found.verdict
    off = [row.name for row in found.rows if parting.beyond(row.own, 1) or parting.beyond(row.given, 1)]
    assert off == [where], found
    assert found.output.relative > 1e-7


def test_block_7_of_12() -> None:
    """In every family, though the difference has grown behind it."""
    for name in CONFIGS:
        a = network(name)
        where = a.config.blocks[7]
        b = copy.deepcopy(a)
        [p for p in b.get_submodule(where).parameters() if p.ndim == 2][-1].mul_(1.001)
        found = study.diff(a, b, **INPUT)
        assert len(a.config.blocks) == 12 and found.parts_at == where
        grown = {row.name: max(one.relative for one in row.grown.values()) for row in found.rows if row.block}
        assert grown[a.config.blocks[-1]] > 0


def positions(a: Any) -> None:
    a.config = replace(a.config, theta=10)


def embedder(a: Any) -> None:
    a.txt_in.weight[0] *= 1.1


def shared_modulation(a: Any) -> None:
    a.single_stream_modulation.lin.weight *= 1.001


def last_layer(a: Any) -> None:
    a.final_layer.image.linear.weight[0] *= -1


@pytest.mark.parametrize(
    ("name", "plant", "verdict"),
    [
        ("flux1", positions, r"they part before double_blocks\.0: B hands it other pe \("),
        ("flux3", positions, r"they part before txt_mode_blocks\.0: B hands it other pe \("),
        ("flux1", embedder, r"they part at txt_in: of what A's was given it makes other out \("),
        ("flux2", shared_modulation, r"they part at single_stream_modulation: .* other 0\.shift, 0\.scale, 0\.gate \("),
        ("flux3", last_layer, r"they part at final_layer\.image: .* other out \("),
    ],
)
def test_faults_around_blocks(name: str, plant: Plant, verdict: str) -> None:
    """Named as what they are, and no block is blamed for them."""
    a = network(name)
    b = copy.deepcopy(a)
    plant(b)
    found = study.diff(a, b, **INPUT)
    assert re.match(verdict, found.verdict), found.verdict
    assert not [row.name for row in found.rows if row.block and parting.beyond(row.own, 1)]


def test_what_lies_between_blocks() -> None:
    """A block that is given what no block made: the forward has mixed it up."""
    a = network("flux2")
    b = copy.deepcopy(a)
    b.single_blocks[3].register_forward_pre_hook(lambda module, args: (args[0].flip(1), *args[1:]))
    found = study.diff(a, b, **INPUT)
    assert found.parts_at == "single_blocks.3" and "before single_blocks.3: B hands it other txt, img" in found.verdict


def test_the_layer_is_named() -> None:
    """A second table, of the modules in the block: a linear, and what happens between two of them."""
    a = network("flux1")
    b = copy.deepcopy(a)
    scaled(b.single_blocks[5])
    found = study.diff(a, b, layers=True, **INPUT)
    assert "; in there at single_blocks.5.linear1: " in found.verdict
    assert {row.name for row in found.inside} >= {f"single_blocks.5.{x}" for x in ("norm", "linear1", "linear2")}
    b = copy.deepcopy(a)
    qk_swapped(b.single_blocks[5])
    found = study.diff(a, b, layers=True, **INPUT)
    assert "; in there before single_blocks.5.linear2: B hands it other in" in found.verdict
    assert not study.diff(a, a, layers=True, **INPUT).inside


@pytest.mark.parametrize("name", CONFIGS)
def test_diffusers_agrees(name: str) -> None:
    """Another implementation with the same weights: within what rounding explains in every block; and a fault in it is
    named by our name of the block."""
    pytest.importorskip("diffusers")
    a = network(name)
    found = study.diff(a, "diffusers", **INPUT)
    assert found.agree and found.verdict.startswith("they agree: no part's own error is over ")
    assert [row.name for row in found.rows if row.block] == a.config.blocks
    most = max(one.excess for row in found.rows for one in row.own.values())
    assert 0.01 < most < 0.75  # it is another implementation, and not near the bound
    theirs = sides.diffusers_of(copy.deepcopy(a))  # which shares its weights
    theirs.single_transformer_blocks[1].attn.norm_k.weight[0] *= 1.01
    assert study.diff(a, theirs, **INPUT).parts_at == "single_blocks.1"


@pytest.mark.parametrize("name", CONFIGS)
def test_rounding_is_no_fault(name: str) -> None:
    """bfloat16 against float32: errors grow to a percent, and no block is to blame."""
    a = network(name)
    found = study.diff(a, copy.deepcopy(a).bfloat16(), **INPUT)
    assert found.agree and found.rounding == 2**-8
    assert found.output.relative > 1e-3
    assert max(one.excess for row in found.rows for one in row.own.values()) < 0.5


def test_the_same_is_the_same() -> None:
    a = network("flux3")
    found = study.diff(a, a, **INPUT)
    assert found.agree and found.output == parting.Error(0.0, 0.0, 0.0)
    assert not any(one.largest for row in found.rows for one in (*row.own.values(), *row.grown.values()))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A transformer, the same in 8 bits, one of another size, one of another family."""
    folder = tmp_path_factory.mktemp("files")
    wide = replace(FLUX1, hidden_size=64, num_heads=2, axes_dim=(8, 12, 12))
    names = {"wide": Flux1(wide), "narrow": Flux1(FLUX1), "other": Flux2(FLUX2)}
    for name, one in names.items():
        save(randomise(one), folder / f"{name}.safetensors")
    convert(folder / "wide.safetensors", folder / "q8.gguf", format="Q8_0")
    return {path.stem: path for path in folder.iterdir()}


def test_a_quantised_file(files: dict[str, Path]) -> None:
    """Every block parts, the first is named; with a larger tolerance none does. The rest of the file is as it was."""
    found = study.diff(files["wide"], files["q8"], **INPUT)
    assert found.parts_at == "double_blocks.0"
    assert all(parting.beyond(row.own, 1) for row in found.rows if row.block)
    assert not any(parting.beyond(row.own, 1) for row in found.rows if not row.block)
    assert study.diff(files["wide"], files["q8"], tolerance=1e5, **INPUT).agree
    assert study.diff(files["wide"], files["wide"], **INPUT).output.largest == 0


def test_a_lora_on_and_off(tmp_path: Path) -> None:
    """nano's own; it is off again afterwards."""
    a, b = miniflux.load("nano", device="cpu"), miniflux.load("nano", device="cpu")
    small: dict[str, Any] = {"width": 64, "height": 64, "prompt": "a red circle on a blue background"}
    found = study.diff(a, b, lora="realism", **small)
    assert not found.agree and found.b.endswith("with realism at 1")
    assert study.diff(a, b, **small).output.largest == 0
    with pytest.raises(InputError, match="attached to B alone"):
        study.diff(a, a, lora="realism")
    assert comparing.plot(found, tmp_path / "errors.png") and Image.open(tmp_path / "errors.png").size[0] > 400


def test_the_command(files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = ["--size", "64x64", "--text-length", "5"]
    plot = tmp_path / "errors.svg"
    assert main(["study", "diff", str(files["wide"]), str(files["q8"]), "--layers", "--plot", str(plot), *place]) == 0
    said = capsys.readouterr().out.splitlines()
    assert "they part at double_blocks.0: " in said[-2] and "; in there at double_blocks.0." in said[-2]
    assert plot.read_text().startswith("<?xml")
    assert main(["study", "diff", str(files["wide"]), str(files["wide"]), "--dtype-b", "bfloat16", *place]) == 0
    assert "they agree: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{wide}", "{narrow}"], "A and B are of other sizes: hidden_size is 64 in A and 32 in B"),
        (["{wide}", "{other}"], "A is a FLUX.1, and B is a FLUX.2: compare two of one family"),
        (["{wide}", "nothing"], "'nothing' is neither a model nor a file or folder here"),
        (["diffusers", "{wide}"], "'diffusers' is neither a model nor a file"),
        (["{wide}", "{wide}", "--size", "0x64"], "width must be a whole number from 16 to 8192, got 0"),
        (["{wide}", "{wide}", "--text-length", "0"], "text_tokens must be a whole number from 1"),
        (["{wide}", "{wide}", "--sigma", "2"], "sigma must be a finite number from 0 to 1, got 2"),
        (["{wide}", "{wide}", "--seed", "-1"], "seed must be a whole number from 0"),
        (["{wide}", "{wide}", "--references", "99"], "references must be a whole number from 0 to 10, got 99"),
        (["{wide}", "{wide}", "--tolerance", "nan"], "tolerance must be a finite number"),
        (["{wide}", "{wide}", "--dtype-b", "int8"], "dtype 'int8' is not one of"),
        (["{wide}", "{wide}", "--device-b", "abacus"], "device 'abacus' cannot be used here"),
        (["{q8}", "diffusers"], "diffusers does not read packed weights"),
        (["{wide}", "diffusers", "--dtype-b", "float32"], "give no other to B"),
        (["{wide}", "{wide}", "--plot", "errors.gif"], "got the ending '.gif'"),
        (["{wide}", "{wide}", "--lora", "nowhere.safetensors"], "nowhere.safetensors"),
    ],
)
def test_bad_input_is_refused(
    files: dict[str, Path], capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    """Exit code 2, and one line."""
    small = [] if {"--size", "--text-length"} & set(words) else ["--size", "32x32", "--text-length", "3"]
    filled = [word.format(**{name: str(path) for name, path in files.items()}) for word in words]
    assert main(["study", "diff", *filled, *small]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_network_that_makes_no_numbers() -> None:
    a = network("flux1")
    a.double_blocks[1].img_mlp[0].weight[0] = float("nan")
    with pytest.raises(InputError, match=r"A's double_blocks\.1 makes numbers that are not finite"):
        study.diff(a, a, **INPUT)
    b = network("flux1")
    assert study.diff(b, a, **INPUT).parts_at == "double_blocks.1"
    with pytest.raises(InputError, match="A must be a transformer"):
        study.diff(nn.Linear(2, 2), b, **INPUT)
    with pytest.raises(InputError, match="Linear is not diffusers' FluxTransformer2DModel"):
        study.diff(b, nn.Linear(2, 2), **INPUT)
    with pytest.raises(InputError, match="reads no prompt"):
        study.diff(b, b, prompt="x", **INPUT)
