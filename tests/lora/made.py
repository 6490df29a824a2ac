"""LoRA files made for the tests, and what they must do: the formulas of their papers, in float64, from the file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from miniflux.models.clip import ClipTextConfig, ClipTextEncoder
from miniflux.models.flux1 import Flux1, Flux1Config
from miniflux.models.t5 import T5Config, T5Encoder
from tests.tiny import randn, randomise

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
ALPHA = 3.0  # of every tensor that is one, so that it is no file's rank

# The files of `lora_dialects`; a test compares the list with the folder.
FLUX1_DIALECTS = """
    ai-toolkit bfl-control comfyui-lora-a-b comfyui-lora-down-up diffusers-lora-down-up diffusers-no-prefix
    diffusers-peft diffusers-peft-with-text-encoder diffusers-with-alpha dora-kohya-per-input dora-kohya-per-output
    dora-peft fal-kontext kohya kohya-all-linears kohya-with-clip kohya-with-clip-and-t5 loha-kohya lokr-kohya
    lokr-lycoris lora-unet-diffusers-names onetrainer simpletuner-base-model xlabs-diffusion-model-prefix
    xlabs-double-and-single xlabs-double-only
""".split()
FLUX2_DIALECTS = """
    ai-toolkit comfyui dev-diffusers-peft diffusers-peft diffusion-model-diffusers-names fal-peft kohya
    lokr-ai-toolkit lokr-dotted lokr-lycoris sformer-blocks
""".split()


@dataclass
class Encoders:
    """The text side of a pipeline, as far as adapters look at it."""

    clip: nn.Module
    t5: nn.Module
    cleared: int = 0

    @property
    def networks(self) -> dict[str, nn.Module]:
        return {"clip": self.clip, "t5": self.t5}

    def clear(self) -> None:
        self.cleared += 1


@dataclass
class Networks:
    """What stands for a pipeline."""

    transformer: Flux1
    text: Encoders = field(default_factory=lambda: Encoders(nn.Identity(), nn.Identity()))

    def layer(self, target: str) -> nn.Module:
        """A module by the name that receipts and the reference data give it."""
        network, colon, name = target.partition(":")
        if not colon:
            return self.transformer.get_submodule(target)
        return getattr(self.text, network).get_submodule(name)


def tensors_of(listed: Mapping[str, Mapping[str, Any]]) -> dict[str, Tensor]:
    """Random tensors of the listed shapes and dtypes; magnitudes are positive."""
    made: dict[str, Tensor] = {}
    for seed, (key, about) in enumerate(listed.items()):
        value = torch.tensor(ALPHA) if key.endswith(".alpha") else 0.3 * randn(*about["shape"], seed=seed)
        if "dora_scale" in key or "magnitude" in key or key.endswith(".scale"):
            value = value.abs() + 0.5
        made[key] = value.to(DTYPES[about["dtype"]])
    return made


def empty_tensors_of(listed: Mapping[str, Mapping[str, Any]]) -> dict[str, Tensor]:
    """The same without numbers."""
    return {k: torch.empty(v["shape"], dtype=DTYPES[v["dtype"]], device="meta") for k, v in listed.items()}


def networks_of(config: Mapping[str, Any]) -> Networks:
    """Tiny networks with random weights, of the sizes that the reference data name."""
    sizes = dict(config)
    clip, t5 = sizes.pop("clip", None), sizes.pop("t5", None)
    found = Networks(randomise(Flux1(Flux1Config(**sizes))))
    if clip is not None:
        found.text.clip = randomise(
            ClipTextEncoder(
                ClipTextConfig(
                    vocab_size=99,
                    hidden_size=clip["hidden"],
                    intermediate_size=clip["intermediate"],
                    num_hidden_layers=clip["layers"],
                    num_attention_heads=2,
                )
            ),
            seed=1,
        )
    if t5 is not None:
        found.text.t5 = randomise(
            T5Encoder(
                T5Config(
                    vocab_size=99,
                    d_model=t5["d_model"],
                    d_kv=t5["inner"] // 2,
                    d_ff=t5["d_ff"],
                    num_layers=t5["blocks"],
                    num_heads=2,
                )
            ),
            seed=2,
        )
    return found


def difference(tensors: Mapping[str, Tensor], prefix: str) -> Tensor:
    """dW of one module of a file, without DoRA: LoRA (arXiv 2106.09685), LoHa (2108.06098), LoKr (2212.10650)."""

    def get(*names: str) -> Tensor | None:
        return next((tensors[f"{prefix}.{name}"].double() for name in names if f"{prefix}.{name}" in tensors), None)

    alpha = get("alpha")
    down, up = (
        get("lora_A.weight", "lora_down.weight", "down.weight"),
        get("lora_B.weight", "lora_up.weight", "up.weight"),
    )
    if down is not None and up is not None:
        return up @ down * (1 if alpha is None else alpha / len(down))
    parts = [get(f"hada_w{n}_{half}") for n in (1, 2) for half in "ab"]
    if parts[0] is not None:
        return (parts[0] @ parts[1]) * (parts[2] @ parts[3]) * (1 if alpha is None else alpha / len(parts[1]))
    rank, halves = None, []
    for n in (1, 2):
        whole, a, b = get(f"lokr_w{n}"), get(f"lokr_w{n}_a"), get(f"lokr_w{n}_b")
        if whole is None:
            whole, rank = a @ b, len(b)
        halves.append(whole)
    return torch.kron(*halves) * (1 if rank is None or alpha is None else alpha / rank)


def changed(weight: Tensor, tensors: Mapping[str, Tensor], prefix: str, swapped: bool = False) -> Tensor:
    """W + dW in float64 of one module of a file, DoRA (arXiv 2402.09353) included; `swapped`: its halves."""
    theirs = swap(weight.double()) if swapped else weight.double()
    total = theirs + difference(tensors, prefix)
    for name in ("dora_scale", "lora_magnitude_vector.weight", "lora_magnitude_vector"):
        magnitude = tensors.get(f"{prefix}.{name}")
        if magnitude is not None:
            columns = magnitude.ndim == 2 and magnitude.shape[0] == 1
            norms = total.norm(dim=0 if columns else 1, keepdim=True)
            total = total / norms * magnitude.double().reshape(norms.shape)
    return swap(total) if swapped else total


def swap(matrix: Tensor) -> Tensor:
    """The two halves of the rows change places."""
    half = len(matrix) // 2
    return torch.cat([matrix[half:], matrix[:half]])


def lora(
    network: nn.Module, *layers: str, rank: int = 3, seed: int = 0, alpha: float | None = 2.0
) -> dict[str, Tensor]:
    """A LoRA with the network's own names that changes these layers."""
    made: dict[str, Tensor] = {}
    for i, layer in enumerate(layers):
        module = network.get_submodule(layer)
        made[f"{layer}.lora_down.weight"] = randn(rank, module.in_features, seed=seed + 2 * i) / module.in_features**0.5
        made[f"{layer}.lora_up.weight"] = randn(module.out_features, rank, seed=seed + 2 * i + 1) / rank**0.5
        if alpha is not None:
            made[f"{layer}.alpha"] = torch.tensor(alpha)
    return made


def relative(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected| in float64."""
    return float((found.double() - expected.double()).detach().norm() / expected.detach().double().norm())
