"""IP-Adapters of FLUX.1: XLabs', also as diffusers names it, and InstantX', which that cannot load."""

from __future__ import annotations

from typing import Any

from miniflux.checkpoints.networks.record import DIFFUSERS, Layout, Network, Shapes, count, row
from miniflux.models.ip_adapter import InstantxIPAdapter, IPAdapterConfig, XlabsIPAdapter
from miniflux.variants import VARIANTS

KEYS = "double_blocks.{i}.processor.ip_adapter_double_stream"


def _xlabs_sizes(shapes: Shapes, default: object) -> dict[str, Any]:
    made, embedding = shapes["ip_adapter_proj_model.proj.weight"]
    (context,) = shapes["ip_adapter_proj_model.norm.weight"]
    return {
        "embedding": embedding,
        "context": context,
        "words": made // context,
        "hidden_size": shapes["double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight"][0],
        "double": count(shapes, r"double_blocks\.(\d+)\."),
    }


def _instantx_sizes(shapes: Shapes, default: object) -> dict[str, Any]:
    """How many of its pairs are for double blocks, no shape tells: those of the released model of this width; else a
    third, as there."""
    (made, _), (context,) = shapes["image_proj.proj.2.weight"], shapes["image_proj.norm.weight"]
    pairs, hidden = count(shapes, r"ip_adapter\.(\d+)\."), shapes["ip_adapter.0.to_k_ip.weight"][0]
    sizes = (variant.transformer for variant in VARIANTS.values())
    known = (c.depth for c in sizes if (c.hidden_size, c.depth + c.depth_single_blocks) == (hidden, pairs))
    double = next(known, pairs // 3)
    return {
        "embedding": shapes["image_proj.proj.0.weight"][1],
        "context": context,
        "words": made // context,
        "hidden_size": hidden,
        "double": double,
        "single": pairs - double,
    }


XLABS_IP_ADAPTER = Network(
    part="ip-adapter",
    word="IP-Adapter",
    phrase="an IP-Adapter",
    kind=XlabsIPAdapter,
    config=IPAdapterConfig,
    signs=("ip_adapter_proj_model.proj.weight",),
    layouts={
        DIFFUSERS: Layout(
            [
                row("ip_adapter_proj_model.**", "image_proj.**"),
                *(row(f"{KEYS}_{x}_proj.*", f"ip_adapter.{{i}}.to_{x}_ip.*") for x in "kv"),
            ],
            ("image_proj.",),
        )
    },
    sizes=_xlabs_sizes,
)
INSTANTX_IP_ADAPTER = Network(
    part="ip-adapter",
    word="IP-Adapter",
    phrase="an IP-Adapter",
    kind=InstantxIPAdapter,
    config=IPAdapterConfig,
    signs=("image_proj.proj.0.weight",),
    layouts={},
    sizes=_instantx_sizes,
)
