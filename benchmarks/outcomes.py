"""Some two hundred outcomes as hashes, to hold two commits against each other: pictures, latents, settings, LoRAs,
conversions, saved files, what is said of files.

    python benchmarks/outcomes.py > before.txt        # at one commit, and at another on the same machine:
    python benchmarks/outcomes.py > after.txt; diff before.txt after.txt

Only public names are used. Settings hold the versions, and paths are replaced, so equal lines mean equal bits.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import math
import struct
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import miniflux
from miniflux import checkpoints, lora, sampling
from miniflux.apps.cli import main as command
from miniflux.errors import MinifluxError
from miniflux.sampling import schedules

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests import reference

PROMPT = "a red circle on a blue background"
REALISM = Path(miniflux.__file__).parent / "nano" / "weights" / "loras" / "realism.safetensors"
NANO = Path(miniflux.__file__).parent / "nano" / "weights"
VARIED: dict[str, dict[str, Any]] = {
    **{f"solver {name}": {"solver": name} for name in sampling.SOLVERS},
    **{f"schedule {name}": {"schedule": name} for name in ("uniform", "karras", "beta", "simple", "flow-dpmpp")},
    **{f"guide {name}": {"guide": name, "negative": "a green square"} for name in sampling.GUIDES},
    **{f"cache {name}": {"cache": name, "steps": 8} for name in sampling.CACHES},
    "cache checked": {"cache": "first-block", "steps": 8, "check_cache": True},
    "cache and guide": {"cache": "mag", "guide": "cfg", "steps": 8},
    "restart": {"restart": (0.3, 0.7, 1)},
    "variation": {"variation": (9, 0.4)},
    "own levels": {"schedule": [1.0, 0.8, 0.4, 0.1, 0.0], "steps": None},
    "shift": {"shift": 2.5},
    "guidance of sigma": {"guidance": lambda sigma: 1 + 3 * sigma},
    "trimmed": {"padding": "trimmed"},
    "masked": {"padding": "masked"},
    "t5 length": {"t5_length": 24},
    "another size": {"width": 96, "height": 160},
    "two prompts, two seeds": {"prompt": [PROMPT, "two blue stars"], "images": 2},
    "stopped": {"stop": 2},
    "from a picture": {"image": Image.linear_gradient("L").resize((128, 128)).convert("RGB"), "strength": 0.6},
    "from pixels": {"image": torch.linspace(-1, 1, 3 * 64 * 64).reshape(3, 64, 64), "strength": 0.5},
}


def digest(*things: Any) -> str:
    """A hash of tensors, pictures, bytes, texts and whatever JSON can say."""
    made = hashlib.sha256()
    for thing in things:
        if isinstance(thing, torch.Tensor):
            made.update(f"{thing.dtype}{tuple(thing.shape)}".encode())
            made.update(thing.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if thing.numel() else b"")
        elif isinstance(thing, Image.Image):
            made.update(f"{thing.mode}{thing.size}".encode() + thing.tobytes())
        elif isinstance(thing, bytes):
            made.update(thing)
        elif isinstance(thing, str):
            made.update(thing.encode())
        else:
            made.update(json.dumps(thing, sort_keys=True).encode())
    return made.hexdigest()[:20]


def drawn(result: miniflux.Result) -> str:
    return digest(result.latents, *result.images, result.settings)


def pictures(folder: Path) -> Iterator[tuple[str, str]]:
    """What bundled models draw, and files of it."""
    for model in ("nano-dev", "nano-schnell"):
        pipe = miniflux.load(model)
        for name, options in {"plain": {}, **VARIED}.items():
            asked = {"prompt": PROMPT, "seed": 3, "steps": 4, **options}
            if model == "nano-schnell" and name.startswith(("cache", "guidance of")):
                continue
            if pipe.tiny is None or (model == "nano-schnell" and name.startswith(("solver", "guide"))):
                asked["steps"] = 2
            with contextlib.suppress(MinifluxError):
                yield f"{model}: {name}", drawn(pipe.generate(**asked))
        result = pipe.generate(PROMPT, seed=5, steps=2)
        for ending in ("png", "jpg", "webp"):
            yield f"{model}: saved {ending}", digest(result.save(folder / f"{model}.{ending}").read_bytes())
        half = pipe.generate(PROMPT, seed=5, steps=4, stop=2).moment
        assert half is not None
        yield f"{model}: resumed", drawn(pipe.generate(PROMPT, seed=5, steps=4, resume=half))
        yield f"{model}: previews", digest(*(pipe.preview(half, 128, 128, how) for how in ("tiny", "table")))


def memory(folder: Path) -> Iterator[tuple[str, str]]:
    """Where weights wait, and in which precision, with and without a LoRA."""
    for mode in ("resident", "text-freed", "offload", "stream"):
        for dtype in ("float32", "bfloat16"):
            pipe = miniflux.load("nano-dev", memory=mode, dtype=dtype)
            yield f"memory {mode} {dtype}", drawn(pipe.generate(PROMPT, steps=2))
            lora.attach(pipe, REALISM, scale=0.7)
            yield f"memory {mode} {dtype} lora", digest(pipe.generate(PROMPT, steps=2, guide="cfg").latents)
    pipe = miniflux.load("nano-dev", memory="stream", modulation_ahead=False)
    yield "memory stream, modulation as it comes", drawn(pipe.generate(PROMPT, steps=2))
    pipe = miniflux.load("nano-dev", cache=folder / "results")
    first, again = pipe.generate(PROMPT, steps=2, images=2), pipe.generate(PROMPT, steps=2)
    yield "result cache", digest(first.latents, list(first.keys), again.latents, again.settings)


def random_models(folder: Path) -> Iterator[tuple[str, str]]:
    """Tiny models of every variant."""
    for name in miniflux.variants.names():
        with contextlib.suppress(MinifluxError):
            yield f"tiny {name}", drawn(miniflux.tiny(name, seed=2).generate(PROMPT, seed=1, steps=2))


def loras(folder: Path) -> Iterator[tuple[str, str]]:
    """Files in every dialect that is written, attached, merged, taken back, extracted; receipts of published ones."""
    files = {"as published": REALISM}
    for dialect in ("diffusers", "kohya", "comfyui", "xlabs"):
        path = folder / f"{dialect}.safetensors"
        with contextlib.suppress(MinifluxError):
            lora.convert(REALISM, path, dialect)
            files[dialect] = path
            yield f"lora to {dialect}", digest(path.read_bytes())
    for name, path in files.items():
        pipe = miniflux.load("nano-dev")
        receipt = lora.attach(pipe, path, scale=0.8)
        yield f"lora {name}: receipt", digest(str(receipt).replace(str(path), ""))
        yield f"lora {name}: attached", digest(pipe.generate(PROMPT, steps=2).latents)
        lora.merge(pipe)
        yield f"lora {name}: merged", digest(pipe.generate(PROMPT, steps=2).latents)
        lora.unmerge(pipe)
        yield f"lora {name}: unmerged", digest(pipe.generate(PROMPT, steps=2).latents)
        lora.set_schedule(pipe, receipt.name, lambda sigma: 1 - sigma)
        yield f"lora {name}: by noise level", digest(pipe.generate(PROMPT, steps=2).latents)
        base, target = NANO / "flux1-nano-dev.safetensors", folder / f"merged-{len(name)}.safetensors"
        lora.merge_files(base, [(path, 0.5)], target)
        yield f"lora {name}: merged file", digest(target.read_bytes())
    lora.extract(NANO / "flux1-nano-dev.safetensors", target, folder / "out.safetensors", rank=4)
    yield "lora extracted", digest((folder / "out.safetensors").read_bytes())
    for name in sorted(reference.names("lora_dialects")):
        about = reference.dialect(name)
        content = about.get("full", about.get("tiny"))["tensors"]
        path = sparse(folder / "published.safetensors", {key: entry["shape"] for key, entry in content.items()})
        yield f"lora {name}", digest(said(path, folder))


def sparse(path: Path, shapes: Mapping[str, Sequence[int]]) -> Path:
    """A file of bfloat16 zeros that takes no room."""
    header, end = {}, 0
    for key, shape in shapes.items():
        size = 2 * math.prod(shape)
        header[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return path


def said(path: Path, folder: Path) -> str:
    """What inspection, or its refusal, tells of a file."""
    try:
        return checkpoints.inspect(path).json().replace(str(folder), "")
    except MinifluxError as error:
        return str(error).replace(str(folder), "")


def files(folder: Path) -> Iterator[tuple[str, str]]:
    """Conversions of the bundled models, what is said of them, and of every published checkpoint."""
    formats = "float32 float16 bfloat16 fp8 fp8_e4m3 fp8_e5m2 fp8_rows int8 nf4 fp4 nvfp4".split()
    ggml = "Q8_0 Q6_K Q5_K Q5_1 Q5_0 Q4_K Q4_1 Q4_0 IQ4_NL IQ4_XS Q3_K Q2_K".split()
    for name in [*formats, *ggml]:
        path = folder / f"dev-{name}{'.gguf' if name in ggml else '.safetensors'}"
        made = checkpoints.convert(NANO / "flux1-nano-dev.safetensors", path, format=name)
        yield f"convert {name}", digest(path.read_bytes(), made.report(None).replace(str(folder), ""))
        yield f"inspect {name}", digest(said(path, folder))
        if name in ("fp8", "nf4", "Q4_K", "int8", "nvfp4"):
            yield f"drawn {name}", digest(miniflux.load(path).generate(PROMPT, steps=2).latents)
    everything = folder / "everything"
    everything.mkdir()
    for item in NANO.iterdir():
        if item.name not in ("flux1-nano-schnell.safetensors", "loras", "tiny_decoder.safetensors"):
            (everything / item.name).symlink_to(item)
    for layout in ("original", "diffusers", "all-in-one", None):
        target = folder / f"as-{layout}"
        checkpoints.convert(everything, target, layout=layout)
        tree = {str(p.relative_to(target)): digest(p.read_bytes()) for p in sorted(target.rglob("*")) if p.is_file()}
        yield f"convert to {layout}", digest(tree)
        yield f"inspect {layout}", digest(said(target, folder))
        with contextlib.suppress(MinifluxError):
            yield f"drawn {layout}", digest(miniflux.load(target).generate(PROMPT, steps=2).latents)
    pipe = miniflux.load("nano-dev")
    for part in ("transformer", "autoencoder"):
        path = folder / f"{part}.safetensors"
        checkpoints.save(getattr(pipe, part), path)
        yield f"save {part}", digest(path.read_bytes())
    for name in sorted(reference.names("manifests")):
        if not name.startswith("_"):
            yield (
                f"inspect {name}",
                digest(said(sparse(folder / "published.safetensors", reference.manifest(name)), folder)),
            )


def numbers(folder: Path) -> Iterator[tuple[str, str]]:
    """Sampling by itself."""
    for name in schedules.SPACINGS:
        with contextlib.suppress(MinifluxError):
            yield f"levels {name}", digest(list(sampling.schedule(name, 10, schedules.static_shift(3.0))))
    for tokens in (64, 256, 4096):
        yield f"flux1_schedule {tokens}", digest(list(sampling.flux1_schedule(12, tokens)))
    yield "initial_noise", digest(sampling.initial_noise(64, 96, 7))
    yield "pack", digest(sampling.pack(sampling.initial_noise(64, 96, 7)))


COMMANDS = (
    ("variants",),
    ("inspect", str(NANO)),
    ("lora", "inspect", str(REALISM)),
    ("lora", "inspect", "missing.safetensors"),
    ("generate", "x", "--steps", "0"),
    ("generate", "x", "--model", "no such model"),
    ("generate", "x", "--solver", "none"),
    ("convert", "missing", "out"),
    ("study", "schedule", "--steps", "6"),
)


def commands(folder: Path) -> Iterator[tuple[str, str]]:
    """What the command line answers."""
    for words in COMMANDS:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = command(list(words))
            except SystemExit as stop:
                code = stop.code
        text = (out.getvalue() + err.getvalue()).replace(str(NANO), "NANO")
        yield f"miniflux {' '.join(words[:2]).replace(str(NANO), 'NANO')}", digest(text, [code])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="lines whose kind begins so")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    count = 0
    for kind in (numbers, pictures, memory, random_models, loras, files, commands):
        if options.only and not kind.__name__.startswith(options.only):
            continue
        with tempfile.TemporaryDirectory() as folder:
            for name, value in kind(Path(folder)):
                count += 1
                print(f"{value}  {name}", flush=True)
    print(f"{count} outcomes")


if __name__ == "__main__":
    main()
