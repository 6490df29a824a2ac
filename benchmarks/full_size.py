"""A full-size FLUX.1 dev with random weights draws a picture in `stream` mode: memory, time, bytes read. Linux only.

    python -m benchmarks.full_size FOLDER --tokenizers FOLDER

Writes 34 GB into the folder, once: the transformer (12 billion parameters) and the text encoders in bfloat16, the
autoencoder in float32, tensor by tensor. The tokenizers' folder holds `clip_l` and `t5_v1_1_xxl`.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from miniflux.checkpoints.writing import safetensors_frame, write_frame
from miniflux.models.autoencoder import Autoencoder
from miniflux.models.clip import ClipTextEncoder
from miniflux.models.flux1 import Flux1
from miniflux.models.t5 import T5Encoder
from miniflux.variants import variant

MODEL = "flux1-dev"
POOL = 2**26  # random numbers, of which every tensor is a piece
LIMIT = 4 * 2**30  # bytes of peak resident memory
WITHIN = 0.05  # of the ledger's prediction


def write(folder: Path) -> dict[str, Path]:
    """The files of the four networks, written where they are missing."""
    sizes = variant(MODEL)
    networks = {
        "transformer": (Flux1, sizes.transformer, torch.bfloat16),
        "t5": (T5Encoder, sizes.t5, torch.bfloat16),
        "clip": (ClipTextEncoder, sizes.clip, torch.bfloat16),
        "autoencoder": (Autoencoder, sizes.autoencoder, torch.float32),
    }
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
        kinds = {key: (dtype, tuple(tensor.shape)) for key, tensor in network.state_dict().items()}
        begin, beside = time.perf_counter(), path.with_suffix(".partial")
        frame = safetensors_frame(beside.name, kinds, {})
        write_frame(beside, frame, ((key, made(key, *kinds[key], pool)) for key in frame.places))
        beside.rename(path)
        print(f"wrote {path}: {path.stat().st_size / 1e9:.2f} GB in {time.perf_counter() - begin:.0f} s", flush=True)
    return files


def made(key: str, dtype: torch.dtype, shape: tuple[int, ...], pool: Tensor) -> Tensor:
    """Random numbers under which nothing grows: matrices keep the variance, norms are 1, biases are 0."""
    if len(shape) == 1:
        is_norm = re.search(r"norm.*\.(weight|scale)$", key) is not None
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


def draw(files: dict[str, str], memory: str, dtype: str | None, size: int, steps: int) -> dict[str, object]:
    """Draw a picture in this process and say what it took."""
    import miniflux
    from miniflux.memory.ledger import Run, peak_size

    begin = time.perf_counter()
    pipe = miniflux.load(MODEL, weights=files, device="cpu", dtype=dtype, memory=memory)
    assert pipe.memory is not None and pipe.memory.transformer is not None
    ledger = pipe.memory.ledger(Run(width=size, height=size, text_tokens=pipe.variant.t5_length, calls=steps, batch=1))
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
    blocks, modulation = (chain.bytes_read for chain in pipe.memory.transformer.chains)
    assert bool(torch.isfinite(result.latents).all())
    return {
        "dtype": result.settings[0]["dtype"],
        "load": loaded - begin,
        "text": encoded - loaded,
        "text_bytes": sum(network.bytes_read for network in pipe.memory.text),
        "modulation_bytes": modulation,
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
    options.add_argument("--memory", default="stream", choices=("stream", "offload"))
    options.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: what suits this CPU")
    options.add_argument("--size", type=int, default=256)
    options.add_argument("--steps", type=int, default=1)
    options.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # the fresh process
    given = options.parse_args()
    if given.folder is None or given.tokenizers is None:
        print("left out: it wants a folder with room for 34 GB and one with tokenizers, see --help")
        return
    files = {part: str(path) for part, path in write(given.folder).items()}
    files |= {"clip_tokenizer": str(given.tokenizers / "clip_l"), "t5_tokenizer": str(given.tokenizers / "t5_v1_1_xxl")}
    if given.here:
        print(json.dumps(draw(files, given.memory, given.dtype, given.size, given.steps)))
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
