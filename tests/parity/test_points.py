"""Captured values against hooks on diffusers' network with the same weights, at the same places."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.testing import assert_close

from miniflux import study
from miniflux.testing import tiny
from tests.parity.peers import flux1_pair

ASKED: dict[str, Any] = {"seed": 3, "width": 64, "height": 32, "steps": 1}


def test_values_are_those_of_diffusers() -> None:
    pipe = tiny("flux1-dev")
    theirs, pipe.transformer = flux1_pair(pipe.transformer.config)
    told: dict[str, Any] = {}
    names = ("img", "img_ids", "txt", "txt_ids", "timesteps", "y", "guidance")
    handle = pipe.transformer.register_forward_pre_hook(lambda _, given: told.update(zip(names, given, strict=False)))
    pipe.generate("a red circle", **ASKED)
    handle.remove()
    found: dict[str, Tensor] = {}

    def keep(path: str, *names: str, view: Any = lambda x: x) -> None:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            outputs = output if isinstance(output, tuple) else (output,)
            found.update({name: view(x)[0].clone() for name, x in zip(names, outputs, strict=True)})

        theirs.get_submodule(path).register_forward_hook(hook)

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (pipe.transformer.config.num_heads, -1)).transpose(1, 2)

    keep("x_embedder", "img_in.out")
    keep("context_embedder", "txt_in.out")
    for i in range(2):
        ours, b = f"double_blocks.{i}", f"transformer_blocks.{i}"
        keep(b, f"{ours}.txt_out", f"{ours}.img_out")
        keep(f"{b}.attn.to_q", f"{ours}.img_attn.q_raw", view=heads)
        keep(f"{b}.attn.add_k_proj", f"{ours}.txt_attn.k_raw", view=heads)
        keep(f"{b}.attn.to_out.0", f"{ours}.img_attn.proj.out")
        keep(f"{b}.attn.to_add_out", f"{ours}.txt_attn.proj.out")
        keep(f"{b}.ff.net.0", f"{ours}.img_mlp.post")
        keep(f"{b}.ff.net.0.proj", f"{ours}.img_mlp.pre")
        keep(f"{b}.ff_context", f"{ours}.txt_mlp.out")
    for i in range(2):
        ours, b = f"single_blocks.{i}", f"single_transformer_blocks.{i}"
        keep(f"{b}.attn.norm_q", f"{ours}.q", view=lambda x: x.transpose(1, 2))
        keep(f"{b}.attn.norm_k", f"{ours}.k", view=lambda x: x.transpose(1, 2))
        keep(f"{b}.attn.to_v", f"{ours}.v", view=heads)
        keep(f"{b}.proj_mlp", f"{ours}.mlp.pre")
        keep(f"{b}.act_mlp", f"{ours}.mlp.post")
        keep(f"{b}.proj_out", f"{ours}.linear2.out")
    keep("norm_out", "final_layer.norm_final.out")
    keep("proj_out", "final_layer.out")
    with torch.inference_mode():
        theirs(
            hidden_states=told["img"],
            encoder_hidden_states=told["txt"],
            pooled_projections=told["y"],
            timestep=told["timesteps"],
            img_ids=told["img_ids"][0],
            txt_ids=told["txt_ids"][0],
            guidance=told["guidance"],
            return_dict=False,
        )
    assert len(found) == 2 + 2 * 9 + 2 * 6 + 2
    with study.capture(pipe, list(found)) as seen:
        pipe.generate("a red circle", **ASKED)
    for name, value in found.items():
        assert_close(seen.get(name), value, rtol=0, atol=1e-5 * max(1.0, float(value.abs().max())), msg=name)
