"""Captured values against hooks on diffusers' networks with the same weights, at the same places."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from miniflux import study
from miniflux.models.flux1 import RunBlock
from miniflux.sampling.observing import Call, observed
from miniflux.study.divergence.sides import diffusers_of, theirs
from miniflux.testing import tiny

ASKED: dict[str, Any] = {"seed": 3, "width": 64, "height": 32, "steps": 1}
View = Callable[[Tensor], Tensor]
Places = Iterator[tuple[str, tuple[str, ...], str]]
"""Of a module of diffusers' its path, the points that are its outputs, and how they are looked at."""


def flux1() -> Places:
    yield "x_embedder", ("img_in.out",), ""
    yield "context_embedder", ("txt_in.out",), ""
    for i in range(2):
        ours, b = f"double_blocks.{i}", f"transformer_blocks.{i}"
        yield b, (f"{ours}.txt_out", f"{ours}.img_out"), ""
        yield f"{b}.attn.to_q", (f"{ours}.img_attn.q_raw",), "heads"
        yield f"{b}.attn.add_k_proj", (f"{ours}.txt_attn.k_raw",), "heads"
        yield f"{b}.attn.to_out.0", (f"{ours}.img_attn.proj.out",), ""
        yield f"{b}.attn.to_add_out", (f"{ours}.txt_attn.proj.out",), ""
        yield f"{b}.ff.net.0", (f"{ours}.img_mlp.post",), ""
        yield f"{b}.ff.net.0.proj", (f"{ours}.img_mlp.pre",), ""
        yield f"{b}.ff_context", (f"{ours}.txt_mlp.out",), ""
    for i in range(2):
        ours, b = f"single_blocks.{i}", f"single_transformer_blocks.{i}"
        yield f"{b}.attn.norm_q", (f"{ours}.q",), "swapped"
        yield f"{b}.attn.norm_k", (f"{ours}.k",), "swapped"
        yield f"{b}.attn.to_v", (f"{ours}.v",), "heads"
        yield f"{b}.proj_mlp", (f"{ours}.mlp.pre",), ""
        yield f"{b}.act_mlp", (f"{ours}.mlp.post",), ""
        yield f"{b}.proj_out", (f"{ours}.linear2.out",), ""
    yield "norm_out", ("final_layer.norm_final.out",), ""
    yield "proj_out", ("final_layer.out",), ""


def flux2() -> Places:
    yield "x_embedder", ("img_in.out",), ""
    yield "context_embedder", ("txt_in.out",), ""
    for i in range(2):
        ours, b = f"double_blocks.{i}", f"transformer_blocks.{i}"
        yield b, (f"{ours}.txt_out", f"{ours}.img_out"), ""
        for stream, q, out, ff in (
            ("img", "to_q", "to_out.0", "ff"),
            ("txt", "add_q_proj", "to_add_out", "ff_context"),
        ):
            yield f"{b}.attn.{q}", (f"{ours}.{stream}_attn.q_raw",), "heads"
            yield f"{b}.attn.{out}", (f"{ours}.{stream}_attn.proj.out",), ""
            yield f"{b}.{ff}.linear_in", (f"{ours}.{stream}_mlp.pre",), ""
            yield f"{b}.{ff}.act_fn", (f"{ours}.{stream}_mlp.post",), ""
            yield f"{b}.{ff}", (f"{ours}.{stream}_mlp.out",), ""
    for i in range(2):
        ours, b = f"single_blocks.{i}", f"single_transformer_blocks.{i}"
        yield f"{b}.attn.to_qkv_mlp_proj", (f"{ours}.linear1.out",), ""
        yield f"{b}.attn.norm_q", (f"{ours}.q",), "swapped"
        yield f"{b}.attn.norm_k", (f"{ours}.k",), "swapped"
        yield f"{b}.attn.mlp_act_fn", (f"{ours}.mlp.post",), ""
        yield f"{b}.attn.to_out", (f"{ours}.linear2.out",), ""
        yield b, (f"{ours}.out",), ""
    yield "norm_out", ("final_layer.norm_final.out",), ""
    yield "proj_out", ("final_layer.out",), ""


def flux3() -> Places:
    yield "x_embedders.image", ("emb_in.image.out",), ""
    yield "context_embedder", ("txt_in.out",), ""
    streams = {"txt_mode_blocks": "txt_mode_blocks", "content_mode_blocks.image": "mode_blocks.image"}
    for mine, other in {**streams, "single_blocks": "single_transformer_blocks"}.items():
        for i in range(2):
            ours, b = f"{mine}.{i}", f"{other}.{i}"
            yield b, (f"{ours}.out",), ""
            yield f"{b}.attn.to_q", (f"{ours}.q_raw",), "heads"
            yield f"{b}.attn.to_k", (f"{ours}.k_raw",), "heads"
            yield f"{b}.attn.to_v", (f"{ours}.v",), "heads"
            yield f"{b}.attn.to_out.0", (f"{ours}.attn_out.out",), ""
            yield f"{b}.ff.linear_in", (f"{ours}.mlp.pre",), ""
            yield f"{b}.ff.act_fn", (f"{ours}.mlp.post",), ""
            yield f"{b}.ff", (f"{ours}.mlp.out",), ""
    yield "norm_out", ("final_layer.image.norm_final.out",), ""
    yield "proj_out", ("final_layer.image.out",), ""


class Listener:
    """Remembers what the network was told."""

    alters: str | None = None

    def began(self, pictures: Sequence[int]) -> None: ...

    def calling(self, call: Call) -> None:
        self.told = call.told

    def wrap(self, run: RunBlock) -> RunBlock:
        return run


@pytest.mark.parametrize(
    ("model", "places"), [("flux1-dev", flux1), ("flux2-dev", flux2), ("flux2-klein-4b", flux2), ("flux3-klein", flux3)]
)
def test_values_are_those_of_diffusers(model: str, places: Callable[[], Places]) -> None:
    pipe = tiny(model)
    module = diffusers_of(pipe.transformer)
    other = theirs(module, pipe.transformer)
    heads = pipe.transformer.config.num_heads
    views: dict[str, View] = {
        "": lambda x: x,
        "heads": lambda x: x.unflatten(-1, (heads, -1)).transpose(1, 2),
        "swapped": lambda x: x.transpose(1, 2),
    }
    found: dict[str, Tensor] = {}
    with observed(listener := Listener()):
        pipe.generate("a red circle", **ASKED)

    def keep(path: str, names: tuple[str, ...], view: View) -> None:
        def hook(_: Any, inputs: Any, output: Any) -> None:
            outputs = output if isinstance(output, tuple) else (output,)
            if len(outputs) > len(names):  # FLUX.3's joint blocks: text, and all else
                outputs = (torch.cat(outputs, dim=1),)
            found.update({name: view(x)[0].clone() for name, x in zip(names, outputs, strict=True)})

        module.get_submodule(path).register_forward_hook(hook)

    for path, names, view in places():
        keep(path, names, views[view])
    with torch.inference_mode():
        other.call(other.told(listener.told))
    assert len(found) == sum(len(names) for _, names, _ in places())
    with study.capture(pipe, list(found)) as seen:
        pipe.generate("a red circle", **ASKED)
    for name, value in found.items():
        assert_close(seen.get(name), value, rtol=0, atol=1e-5 * max(1.0, float(value.abs().max())), msg=name)
