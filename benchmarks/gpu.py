"""Full-size transformers with random weights on a GPU, 1024x1024, bfloat16: eager, compiled by block, as CUDA graphs,
with a step cache, and with float8 linears (torchao); against diffusers with the same weights, in turns, and against
the arithmetic alone. Also blocks that wait in RAM (each network is written to a temporary folder for it), and two
pictures that are decoded: each while the next one is denoised, or one after the other.

    python benchmarks/gpu.py [--models flux1-dev flux2-klein-4b flux3-klein] [--tflops 989]

`--tiny` runs small networks in float32 where no GPU is: it shows that the script works, and says nothing about speed.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import peers
import torch
from timing import Report, Taken, options, times
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from miniflux.checkpoints import save
from miniflux.checkpoints.networks import BY_CONFIG
from miniflux.checkpoints.opened import open_part
from miniflux.families import FAMILIES
from miniflux.memory.bands import through
from miniflux.memory.lanes import Aside, directly, lane_of
from miniflux.memory.streaming import offload, partitioned
from miniflux.models.compiling import compile_blocks
from miniflux.sampling import denoise
from miniflux.sampling.caches import FirstBlockCache
from miniflux.sampling.forwards import Told, Words
from miniflux.testing import randomise, tiny
from miniflux.variants import Variant, variant

MODELS = ("flux1-dev", "flux2-klein-4b", "flux3-klein")
SIDE, TEXT, MOST = 1024, 512, 28  # pixels, tokens, steps


@dataclass(frozen=True)
class Given:
    """A network and what it reads, and the autoencoder behind it."""

    network: Any
    autoencoder: Any
    about: Variant
    told: Told
    steps: int
    sides: tuple[int, int]

    @property
    def sigmas(self) -> list[float]:
        return torch.linspace(1, 0, self.steps + 1).tolist()

    def drawn(self, **more: Any) -> Tensor:
        """All steps of a picture."""
        told, velocity = self.told, FAMILIES[self.about.family].velocity
        return denoise(self.network, told.img, told.img_ids, told.words, timesteps=self.sigmas,
                       guidance=None if self.about.guidance is None else 3.5, velocity=velocity, **more)  # fmt: skip

    def two(self, beside: bool) -> list[Tensor]:
        """Two pictures, decoded while the next one is denoised, or one after the other."""
        dtype = self.autoencoder.decoder.conv_in.weight.dtype

        def decoded(tokens: Tensor) -> Tensor:
            latents = FAMILIES[self.about.family].unpack(tokens, *self.sides)
            return self.autoencoder.decode(latents.to(dtype), through)

        with Aside(lane_of(self.told.img.device)) if beside else nullcontext(directly) as start:
            waiting = [start(partial(decoded, self.drawn())) for _ in range(2)]
            return [wait() for wait in waiting]

    def offloaded(self, folder: Path) -> Given:
        """The same with blocks that wait in RAM."""
        path = folder / "transformer.safetensors"
        save(self.network, path)
        with torch.device("meta"):
            network = type(self.network)(self.network.config)
        source = open_part(path, type(network))
        offload(partitioned(network, source, self.told.img.dtype), source, self.told.img.device)
        return replace(self, network=network.eval())

    def theirs(self) -> Callable[[], Tensor]:
        """The same by diffusers."""
        told = self.told
        peer = peers.transformer(self.network).to(told.img.device, told.img.dtype)
        inputs = {"encoder_hidden_states": told.words.txt, "img_ids": told.img_ids[0], "txt_ids": told.words.txt_ids[0]}
        if told.words.vec is not None:
            inputs["pooled_projections"] = told.words.vec
        guided, jumps = self.about.guidance is not None, getattr(self.network.config, "flow_map", False)

        def draw() -> Tensor:
            x = told.img
            for now, after in zip(self.sigmas, self.sigmas[1:], strict=False):
                at = torch.full((1,), now, dtype=x.dtype, device=x.device)
                more = {"guidance": torch.full_like(at, 3.5)} if guided else {}
                more |= {"target_timestep": torch.full_like(at, after)} if jumps else {}
                x = x + (after - now) * peer(x, timestep=at, **inputs, **more, return_dict=False)[0]
            return x

        return draw


def given(name: str, small: bool, steps: int | None) -> Given:
    about = variant(name)
    device, dtype = ("cpu", torch.float32) if small else ("cuda", torch.bfloat16)
    if small:
        pipe = tiny(name)
        about, network, autoencoder = pipe.variant, pipe.transformer, pipe.autoencoder
    else:
        with torch.device("meta"):
            both: list[Any] = [
                BY_CONFIG[type(config)].kind(config) for config in (about.transformer, about.autoencoder)
            ]
        network, autoencoder = (randomise(one.to(dtype).to_empty(device=device)) for one in both)
        for buffer_name, buffer in autoencoder.named_buffers():  # statistics of latents
            buffer.fill_(buffer_name.endswith("var"))
    network.eval().requires_grad_(False)
    config, family = network.config, FAMILIES[about.family]
    places = (2, 4) if small else (SIDE // 16, SIDE // 16)
    shared: dict[str, Any] = {"device": device, "dtype": dtype}
    txt = torch.randn(1, 8 if small else TEXT, config.context_in_dim, **shared)
    vec = torch.randn(1, config.vec_in_dim, **shared) if hasattr(config, "vec_in_dim") else None
    words = Words(txt, family.text_ids(*txt.shape[:2]).to(device), vec=vec)
    img = torch.randn(1, places[0] * places[1], config.in_channels, **shared)
    told = Told(img, family.image_ids(1, *places).to(device), words, torch.ones(1, **shared), None)
    return Given(network, autoencoder, about, told, steps or min(about.steps, MOST), (16 * places[0], 16 * places[1]))


def gap_of(ours: Tensor, other: Tensor) -> float:
    """How far another result is from ours, over the largest number."""
    return float((ours - other).abs().max() / ours.abs().max())


def float8(network: Any) -> str | None:
    """Make the linears of the blocks float8; or why not."""
    if importlib.util.find_spec("torchao") is None:
        return "torchao is not installed"
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9):
        return "no GPU with float8"
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, quantize_  # pyright: ignore

    def in_blocks(module: Any, name: str) -> bool:
        return isinstance(module, torch.nn.Linear) and "blocks" in name and "mod" not in name

    quantize_(network, Float8DynamicActivationFloat8WeightConfig(), in_blocks)
    return None


@torch.inference_mode()
def main() -> None:
    arguments = options(__doc__, rounds=3)
    arguments.add_argument("--models", nargs="*", default=list(MODELS), choices=MODELS)
    arguments.add_argument("--steps", type=int, help="other than those of each model")
    arguments.add_argument("--tflops", type=float, help="what the GPU can do a second in bfloat16, for the limit")
    arguments.add_argument("--tiny", action="store_true")
    asked = arguments.parse_args()
    if not asked.tiny and not torch.cuda.is_available():
        print("not run: there is no GPU here (--tiny runs small networks on the CPU)")
        return
    where = "small networks on a CPU: NOT a measurement" if asked.tiny else torch.cuda.get_device_name()
    report = Report(f"Whole pictures without text and decoding, {where}", "diffusers, eager", "the arithmetic alone")
    for name in asked.models:
        case = given(name, asked.tiny, asked.steps)
        with FlopCounterMode(display=False) as counted:
            ours = case.drawn()
        floor = None if asked.tflops is None else Taken(counted.get_total_flops() / asked.tflops / 1e12, 0.0)
        flops = f"{counted.get_total_flops() / case.steps / 1e12:.3g} TFLOP a step"
        theirs = case.theirs()
        if torch.cuda.is_available():
            flops += f"; {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB with theirs"
        gap = gap_of(ours, theirs())
        eager, peer = times(case.drawn, theirs, rounds=asked.rounds)
        report.add(f"{name}, {case.steps} steps, eager", eager, peer, floor, f"{flops}; apart by {gap:.0e}")
        if case.about.family == "flux1":
            (cached,) = times(lambda: case.drawn(cache=FirstBlockCache(threshold=0.12)), rounds=asked.rounds)  # noqa: B023
            report.add(f"{name}, step cache", cached, peer, floor)
        with tempfile.TemporaryDirectory() as folder:
            waits = case.offloaded(Path(folder))
            same = f"the same: {torch.equal(ours, waits.drawn())}"
            report.add(
                f"{name}, blocks wait in RAM; peer: they stay",
                times(waits.drawn, rounds=asked.rounds)[0],
                eager,
                floor,
                same,
            )
        beside, apart = (partial(case.two, beside) for beside in (True, False))
        same = f"the same: {all(map(torch.equal, beside(), apart()))}"
        report.add(
            f"{name}, two decoded meanwhile; peer: one after the other",
            *times(beside, apart, rounds=asked.rounds),
            note=same,
        )
        if asked.tiny:
            print(f"{name}, compiled, CUDA graphs, float8: not run on a CPU")
            continue
        for what, graphs in (("compiled", False), ("compiled, CUDA graphs", True)):
            compile_blocks(case.network, graphs=graphs)
            case.drawn()
            taken, peer = times(case.drawn, theirs, rounds=asked.rounds)
            report.add(f"{name}, {what}", taken, peer, floor, f"apart by {gap_of(ours, case.drawn()):.0e}")
        compile_blocks(case.network)
        why = float8(case.network)
        if why is not None:
            print(f"{name}, float8: not run, {why}")
            continue
        case.drawn()
        report.add(f"{name}, compiled, float8", times(case.drawn, rounds=asked.rounds)[0], peer, floor)
    report.write(asked.json)


if __name__ == "__main__":
    main()
