"""IP-Adapters of FLUX.1: keys and values of a picture, for the image tokens of blocks to look at (arXiv 2308.06721).

Sources: `src/flux/modules/layers.py` of XLabs-AI/x-flux (19 double blocks, CLIP's embedding);
`infer_flux_ipa_siglip.py` of InstantX/FLUX.1-dev-IP-Adapter (all blocks, SigLIP's pooled vector). Letters in shapes: B
batch, P words of the picture.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from miniflux.models.linear import Linear

NORM_EPS = 1e-5  # of InstantX's keys


@dataclass(frozen=True, kw_only=True)
class IPAdapterConfig:
    """Sizes of an IP-Adapter.

    Attributes:
        embedding: width of what a vision tower says of the picture.
        context: width of a word of the picture; words: how many it becomes.
        hidden_size: of the transformer.
        double, single: how many of its blocks look at them.
    """

    embedding: int
    context: int
    words: int
    hidden_size: int
    double: int
    single: int = 0


class XlabsProjection(nn.Module):
    def __init__(self, config: IPAdapterConfig) -> None:
        super().__init__()
        self.proj = Linear(config.embedding, config.words * config.context)
        self.norm = nn.LayerNorm(config.context)


class XlabsProcessor(nn.Module):
    def __init__(self, config: IPAdapterConfig) -> None:
        super().__init__()
        self.ip_adapter_double_stream_k_proj = Linear(config.context, config.hidden_size)
        self.ip_adapter_double_stream_v_proj = Linear(config.context, config.hidden_size)


class XlabsBlock(nn.Module):
    def __init__(self, config: IPAdapterConfig) -> None:
        super().__init__()
        self.processor = XlabsProcessor(config)


class XlabsIPAdapter(nn.Module):
    """XLabs' adapter; names as in their file."""

    def __init__(self, config: IPAdapterConfig) -> None:
        super().__init__()
        self.config = config
        self.ip_adapter_proj_model = XlabsProjection(config)
        self.double_blocks = nn.ModuleList(XlabsBlock(config) for _ in range(config.double))

    def words(self, embedding: Tensor) -> Tensor:
        """(B, embedding) -> (B, P, context)."""
        made = self.ip_adapter_proj_model.get_submodule("proj")(embedding)
        return self.ip_adapter_proj_model.get_submodule("norm")(made.unflatten(-1, (self.config.words, -1)))

    def look(self, block: str, q: Tensor, words: Tensor) -> Tensor | None:
        """What the image tokens of a block find there: (B, L, hidden) for their queries (B, H, L, D); None of blocks
        that do not look."""
        kind, _, number = block.partition(".")
        if kind != "double_blocks" or int(number) >= self.config.double:
            return None
        parts = self.get_submodule(f"double_blocks.{number}.processor")
        names = ("ip_adapter_double_stream_k_proj", "ip_adapter_double_stream_v_proj")
        return _attended(q, *(parts.get_submodule(name)(words) for name in names))


class InstantxPair(nn.Module):
    def __init__(self, config: IPAdapterConfig) -> None:
        super().__init__()
        self.to_k_ip = Linear(config.context, config.hidden_size, bias=False)
        self.to_v_ip = Linear(config.context, config.hidden_size, bias=False)


class InstantxProjection(nn.Module):
    def __init__(self, config: IPAdapterConfig) -> None:
        super().__init__()
        inner = 2 * config.embedding
        self.proj = nn.Sequential(
            Linear(config.embedding, inner), nn.GELU(), Linear(inner, config.words * config.context)
        )
        self.norm = nn.LayerNorm(config.context)


class InstantxIPAdapter(nn.Module):
    """InstantX's adapter; names as in their file, its two parts side by side."""

    def __init__(self, config: IPAdapterConfig) -> None:
        super().__init__()
        self.config = config
        self.image_proj = InstantxProjection(config)
        self.ip_adapter = nn.ModuleList(InstantxPair(config) for _ in range(config.double + config.single))

    def words(self, embedding: Tensor) -> Tensor:
        """(B, embedding) -> (B, P, context)."""
        made = self.image_proj.get_submodule("proj")(embedding)
        return self.image_proj.get_submodule("norm")(made.unflatten(-1, (self.config.words, -1)))

    def look(self, block: str, q: Tensor, words: Tensor) -> Tensor | None:
        """As `XlabsIPAdapter.look`; double blocks first, then the single ones."""
        kind, _, number = block.partition(".")
        place = int(number) + (0 if kind == "double_blocks" else self.config.double)
        if place >= len(self.ip_adapter):
            return None
        pair = self.ip_adapter[place]
        k, v = (pair.get_submodule(name)(words) for name in ("to_k_ip", "to_v_ip"))
        return _attended(q, k, v, NORM_EPS)


def _attended(q: Tensor, k: Tensor, v: Tensor, norm: float | None = None) -> Tensor:
    """Queries (B, H, L, D) over keys and values (B, P, hidden): (B, L, hidden); without positions."""
    k, v = (rearrange(one, "B P (H D) -> B H P D", H=q.shape[1]) for one in (k, v))
    if norm is not None:
        k = F.rms_norm(k.float(), k.shape[-1:], eps=norm).to(v)
    found = F.scaled_dot_product_attention(q.to(v), k, v)
    return rearrange(found, "B H L D -> B L (H D)")
