"""`miniflux lora ...` and `miniflux generate --lora`, typed as a user would."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from miniflux.lora import attach, inspect
from miniflux.models.flux1 import Flux1
from miniflux.variants import variant
from miniflux.weights.finding import BUNDLED
from tests.apps.test_cli import QUICK, run
from tests.tiny import randn

BASE = BUNDLED / "flux1-nano-dev.safetensors"


@pytest.fixture
def style(tmp_path: Path) -> Path:
    """A LoRA for nano-dev, as XLabs trains them."""
    path = tmp_path / "style.safetensors"
    shapes = {"down": (4, 192), "up": (576, 4)}
    tensors = {
        f"double_blocks.{i}.processor.qkv_lora1.{half}.weight": 0.1 * randn(*shape, seed=i + len(half))
        for i in range(2)
        for half, shape in shapes.items()
    }
    save_file(tensors, path)
    return path


def latents(path: Path) -> bytes:
    with Image.open(path) as image:
        return image.convert("RGB").tobytes()


def test_generate_with_loras(style: Path, tmp_path: Path) -> None:
    """The picture changes with the scale, 0 is none, and the settings say it."""
    pictures = {}
    for name, options in {"none": [], "zero": [f"{style}:0"], "half": [f"{style}:0.5"], "whole": [str(style)]}.items():
        out = tmp_path / f"{name}.png"
        loras = [argument for option in options for argument in ("--lora", option)]
        assert run("generate", "a star", "-o", str(out), *QUICK, *loras) == 0
        pictures[name] = latents(out)
        with Image.open(out) as image:
            said = json.loads(image.text["miniflux"])["loras"]  # type: ignore[attr-defined]
        scale = {"zero": 0.0, "half": 0.5, "whole": 1.0}.get(name)
        about = {"name": "style", "source": str(style), "scale": scale, "scheduled": False}
        assert said == ([] if scale is None else [about])
    assert pictures["none"] == pictures["zero"]
    assert len(set(pictures.values())) == 3


def test_a_colon_may_belong_to_the_path(style: Path, tmp_path: Path) -> None:
    odd = style.rename(tmp_path / "a:b.safetensors")
    assert run("generate", "a star", "-o", str(tmp_path / "x.png"), *QUICK, "--lora", str(odd)) == 0


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ("nothing.safetensors", "nothing.safetensors: no such file"),
        ("{style}:nan", "nan"),
        ("{style}:inf", "inf"),
        ("{bad}", "bad.safetensors"),
        ("{base}", "flux1-nano-dev.safetensors"),
        ("{style} --lora {style}", "'style' is attached already"),
        ("{style} --model nano-schnell --guidance 3", "guidance"),
    ],
)
def test_bad_loras_are_one_line_and_exit_code_2(
    option: str, named: str, style: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(style.read_bytes()[:-100])
    out = tmp_path / "x.png"
    options = option.format(style=style, bad=bad, base=BASE).split()
    assert run("generate", "a star", "-o", str(out), *QUICK, "--lora", *options) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and named in said.err and "Traceback" not in said.err and not said.out
    assert not out.exists()


def test_inspect(style: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("lora", "inspect", str(style)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "XLabs, 2 of 2 modules applied" in lines[0]
    assert [line.split()[0] for line in lines[2:]] == [f"double_blocks.{i}.img_attn.qkv" for i in range(2)]
    assert run("lora", "inspect", str(style), "--model", "nano") == 0
    capsys.readouterr()
    assert run("lora", "inspect", str(style), "--model", "flux1-dev") == 2
    assert "its widths are those of nano-dev" in capsys.readouterr().err
    assert run("lora", "inspect", "nothing.safetensors") == 2


@pytest.mark.parametrize("dialect", ["diffusers", "kohya", "comfyui", "xlabs"])
def test_convert(dialect: str, style: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.safetensors"
    assert run("lora", "convert", str(style), "-o", str(out), "--to", dialect, "--model", "nano") == 0
    assert f"{out}: {len(load_file(out))} tensors, {dialect}, for nano" in capsys.readouterr().out
    assert run("lora", "convert", str(style), "-o", str(tmp_path / "again.safetensors"), "--to", dialect) == 0
    assert (
        f"{dialect}, for nano-dev (it fits nano-schnell, nano-fill, nano-kontext, nano2 as well)"
        in capsys.readouterr().out
    )
    assert (tmp_path / "again.safetensors").read_bytes() == out.read_bytes()
    deltas = []
    for path in (style, out):
        total = torch.zeros(2, 576, 192)
        for module in inspect(path).modules:
            total[int(module.target.split(".")[1]), slice(*module.rows)] += module.change.delta()
        deltas.append(total)
    torch.testing.assert_close(*deltas)


def test_merge(style: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The merged file draws what the attached LoRA draws."""
    out = tmp_path / "merged.safetensors"
    assert run("lora", "merge", str(BASE), "--lora", f"{style}:0.5", "-o", str(out)) == 0
    assert f"{out}: 2 changes merged" in capsys.readouterr().out
    before, after = load_file(BASE), load_file(out)
    layers = {f"double_blocks.{i}.img_attn.qkv.weight" for i in range(2)}
    assert {key for key in before if not torch.equal(before[key], after[key])} == layers
    tensors = load_file(style)
    for i, key in enumerate(sorted(layers)):
        down, up = (tensors[f"double_blocks.{i}.processor.qkv_lora1.{half}.weight"] for half in ("down", "up"))
        torch.testing.assert_close(after[key], (before[key].float() + 0.5 * up @ down).to(before[key].dtype))


def test_merge_at_scale_0_says_that_nothing_changes(
    style: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.safetensors"
    assert run("lora", "merge", str(BASE), "--lora", f"{style}:0", "-o", str(out)) == 0
    said = capsys.readouterr().out
    assert ": 0 changes merged, " in said and f"; {style} at scale 0 adds nothing" in said


def test_merge_into_packed_layers(style: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They become wide, or, on request, are packed again, and one line says what that took."""
    packed = tmp_path / "packed.safetensors"
    assert run("convert", str(BASE), str(packed), "--format", "nf4") == 0
    capsys.readouterr()
    for option, dtype in (([], torch.float16), (["--pack"], torch.uint8)):
        out = tmp_path / "merged.safetensors"
        assert run("lora", "merge", str(packed), "--lora", f"{style}:0.2", *option, "-o", str(out), "--force") == 0
        said = capsys.readouterr()
        assert said.out == f"{out}: 2 changes merged, {out.stat().st_size:,} bytes\n"
        assert said.err.count("\n") == len(option) and ("packed weights lose part of their" in said.err) == bool(option)
        assert load_file(out)["double_blocks.0.img_attn.qkv.weight"].dtype == dtype


def test_extract(style: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What was merged comes out again, to the rounding of the base."""
    merged, out = tmp_path / "merged.safetensors", tmp_path / "out.safetensors"
    run("lora", "merge", str(BASE), "--lora", str(style), "-o", str(merged))
    capsys.readouterr()
    assert run("lora", "extract", str(BASE), str(merged), "-o", str(out), "--rank", "4", "--to", "diffusers") == 0
    assert f"{out}: 2 modules at rank 4; at least " in capsys.readouterr().out
    with torch.device("meta"):
        network = Flux1(variant("nano").transformer)
    receipt = attach(network, out)
    assert receipt.dialect == "diffusers" and receipt.applied == 6


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("convert {style} -o {out} --to a1111 --model nano", "a1111"),
        ("convert {style} -o {out} --to kohya --model flux1-dev", "nano-dev"),
        ("convert {style} -o {out} --to kohya --model sdxl", "sdxl"),
        ("convert {style} -o x.pt --to kohya --model nano", "x.pt"),
        ("convert {style} --to kohya", "-o"),
        ("merge {base} -o {out}", "--lora"),
        ("merge {base} --lora nothing.safetensors -o {out}", "nothing.safetensors"),
        ("merge {base} --lora {style}:nan -o {out}", "nan"),
        ("merge nothing.safetensors --lora {style} -o {out}", "nothing.safetensors"),
        ("merge {style} --lora {style} -o {out}", "style.safetensors"),
        ("extract {base} {base} -o {out}", "the same numbers"),
        ("extract {base} {base} -o {out} --rank 0", "rank"),
        ("extract {base} {style} -o {out}", "style.safetensors"),
        ("inspect {base}", "flux1-nano-dev.safetensors"),
        ("nonsense", "nonsense"),
        ("", "ACTION"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: str, named: str, style: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.safetensors"
    assert run("lora", *arguments.format(style=style, out=out, base=BASE).split()) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and named in said.err and "Traceback" not in said.err and not said.out
    assert list(tmp_path.iterdir()) == [style]


@pytest.mark.parametrize("action", ["", "inspect", "convert", "merge", "extract"])
def test_each_action_has_help(action: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("lora", *action.split(), "--help") == 0
    assert "usage:" in capsys.readouterr().out
