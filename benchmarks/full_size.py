"""A full-size model with random weights draws a picture in `stream` mode: memory, time, bytes read. Linux only.

    python -m benchmarks.full_size FOLDER --tokenizers FOLDER [--model flux2-klein-4b]

Writes its files into the folder, once: transformer and text encoders in bfloat16, the autoencoder in float32, tensor by
tensor; 34 GB of FLUX.1 dev, 16 GB of FLUX.2 klein 4B. The tokenizers' folder holds `clip_l`, `t5_v1_1_xxl` and `qwen3`.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from miniflux.checkpoints.networks import networks_of
from miniflux.checkpoints.writing import safetensors_frame, write_frame
from miniflux.models.causal_lm import CausalLm
from miniflux.variants import variant

POOL = 2**26  # random numbers, of which every tensor is a piece
LIMIT = 4 * 2**30  # bytes of peak resident memory
WITHIN = 0.05  # of the ledger's prediction


def write(folder: Path, model: str) -> dict[str, Path]:
    """The files of a model's networks, written where they are missing."""
    sizes = variant(model)
    networks = {
        part: (record.kind, record.of(sizes), torch.bfloat16 if record.packed else torch.float32)
        for part, record in networks_of(sizes).items()
    }
    if sizes.lm is not None:  # all of its layers, though not all are read
        networks["lm"] = (CausalLm, replace(sizes.lm, layers_read=None), torch.bfloat16)
    folder.mkdir(parents=True, exist_ok=True)
    pool = torch.empty(0)
    files: dict[str, Path] = {}
    for part, (kind, config, dtype) in networks.items():
        path = files[part] = folder / f"{part}.safetensors"
        if path.exists():
            continue
        if not len(pool):
            pool = torch.randn(POOL, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
        with torch.device("meta"):
            network: nn.Module = kind(config)  # pyright: ignore
        kinds = {
            key: (dtype if tensor.is_floating_point() else tensor.dtype, tuple(tensor.shape))
            for key, tensor in network.state_dict().items()
        }
        begin, beside = time.perf_counter(), path.with_suffix(".partial")
        frame = safetensors_frame(beside.name, kinds, {})
        write_frame(beside, frame, ((key, made(key, *kinds[key], pool)) for key in frame.places))
        beside.rename(path)
        print(f"wrote {path}: {path.stat().st_size / 1e9:.2f} GB in {time.perf_counter() - begin:.0f} s", flush=True)
    return files


def made(key: str, dtype: torch.dtype, shape: tuple[int, ...], pool: Tensor) -> Tensor:
    """Random numbers under which nothing grows: matrices keep the variance, norms are 1, biases are 0."""
    if len(shape) <= 1:
        is_norm = re.search(r"norm.*\.(weight|scale)$|running_var$", key) is not None
        return torch.full(shape, 1.0 if is_norm else 0.0, dtype=dtype)
    count, inputs = torch.Size(shape).numel(), torch.Size(shape[1:]).numel()
    start = sum(key.encode()) * 7919 % len(pool)
    flat = torch.empty(count, dtype=dtype)
    for piece in flat.split(len(pool) // 2):
        numbers = (
            torch.roll(pool, -start)[: len(piece)] if start + len(piece) > len(pool) else pool[start:][: len(piece)]
        )
        torch.mul(numbers, inputs**-0.5, out=piece) if dtype == pool.dtype else piece.copy_(numbers * inputs**-0.5)
    return flat.view(shape)


def draw(model: str, files: dict[str, str], memory: str, dtype: str | None, size: int, steps: int) -> dict[str, object]:
    """Draw a picture in this process and say what it took."""
    import miniflux
    from miniflux.memory.ledger import Run, peak_size

    begin = time.perf_counter()
    pipe = miniflux.load(model, weights=files, device="cpu", dtype=dtype, memory=memory)
    assert pipe.memory is not None and pipe.memory.transformer is not None
    ledger = pipe.memory.ledger(
        Run(width=size, height=size, text_tokens=pipe.variant.t5_length or 0, calls=steps, batch=1)
    )
    loaded = time.perf_counter()
    prompt = "a lighthouse in fog"
    pipe.text.encode([prompt])
    pipe.memory.free_text()
    encoded, peak_of_text = time.perf_counter(), peak_size()
    ends: list[float] = []
    result = pipe.generate(
        prompt, width=size, height=size, steps=steps, progress=lambda *_: ends.append(time.perf_counter())
    )
    done = time.perf_counter()
    blocks, *modulation = (chain.bytes_read for chain in pipe.memory.transformer.chains)
    assert bool(torch.isfinite(result.latents).all())
    return {
        "dtype": result.settings[0]["dtype"],
        "load": loaded - begin,
        "text": encoded - loaded,
        "text_bytes": sum(network.bytes_read for network in pipe.memory.text),
        "modulation_bytes": sum(modulation),
        "step": (ends[-1] - encoded) / steps,
        "step_bytes": blocks / steps,
        "decode": done - ends[-1],
        "peak_of_text": peak_of_text,
        "peak": peak_size(),
        "predicted": ledger.ram,
        "ledger": str(ledger),
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", type=Path, nargs="?")
    options.add_argument("--tokenizers", type=Path)
    options.add_argument("--model", default="flux1-dev", choices=("flux1-dev", "flux2-klein-4b"))
    options.add_argument("--memory", default="stream", choices=("stream", "offload"))
    options.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: what suits this CPU")
    options.add_argument("--size", type=int, default=256)
    options.add_argument("--steps", type=int, default=1)
    options.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # the fresh process
    given = options.parse_args()
    if given.folder is None or given.tokenizers is None:
        print("left out: it wants a folder with room for its files and one with tokenizers, see --help")
        return
    files = {part: str(path) for part, path in write(given.folder, given.model).items()}
    tokenizers = {"clip": "clip_l", "t5": "t5_v1_1_xxl", "lm": "qwen3"}
    files |= {f"{part}_tokenizer": str(given.tokenizers / name) for part, name in tokenizers.items() if part in files}
    if given.here:
        print(json.dumps(draw(given.model, files, given.memory, given.dtype, given.size, given.steps)))
        return
    run = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--here"], stdout=subprocess.PIPE)
    if run.returncode:
        raise SystemExit(run.returncode)
    found = json.loads(run.stdout.splitlines()[-1])
    print(found["ledger"])
    print(f"computed in {found['dtype']}, {given.size}x{given.size}, {given.steps} step(s), memory {given.memory}")
    print(f"loading        {found['load']:8.1f} s")
    print(f"text           {found['text']:8.1f} s   {found['text_bytes'] / 1e9:6.2f} GB read")
    print(f"modulation                   {found['modulation_bytes'] / 1e9:6.2f} GB read, once")
    print(f"step           {found['step']:8.1f} s   {found['step_bytes'] / 1e9:6.2f} GB read")
    print(f"decoding       {found['decode']:8.1f} s")
    print(f"peak of the text encoders  {found['peak_of_text'] / 2**30:6.3f} GiB")
    off = found["predicted"] / found["peak"] - 1
    print(f"peak                       {found['peak'] / 2**30:6.3f} GiB (limit {LIMIT / 2**30:.0f})")
    print(f"predicted                  {found['predicted'] / 2**30:6.3f} GiB ({100 * off:+.1f} %)")
    if found["peak"] > LIMIT or abs(off) > WITHIN:
        raise SystemExit("more memory than allowed, or another peak than predicted")


if __name__ == "__main__":
    main()
