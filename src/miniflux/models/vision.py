"""Vision towers: what Redux and IP-Adapters see a picture with. SigLIP (arXiv 2303.15343) and CLIP (arXiv 2103.00020).

Keys and numbers: `model.safetensors` and `config.json` of google/siglip-so400m-patch14-384 and
openai/clip-vit-large-patch14 in the Hugging Face layout, their vision halves. Letters in shapes: B batch, N patches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from miniflux.errors import InputError
from miniflux.models.clip import ClipEncoder, ClipMLP, check_layers
from miniflux.models.linear import Linear, linear


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Sizes of a vision tower; field names as in the published `config.json` (its `vision_config`, if it has one).

    Attributes:
        image_size, patch_size: sides in pixels of the picture and of what one token sees.
        projection_dim: width of the embedding, of CLIP; 0 for SigLIP, which has none.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int
    hidden_act: str
    layer_norm_eps: float
    projection_dim: int = 0

    def __post_init__(self) -> None:
        check_layers(self)

    @property
    def patches(self) -> int:
        """Tokens of a picture."""
        return (self.image_size // self.patch_size) ** 2


class SiglipEmbeddings(nn.Module):
    """A linear map of each patch, and its learned position."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, config.hidden_size, config.patch_size, stride=config.patch_size)
        self.position_embedding = nn.Embedding(config.patches, config.hidden_size)

    def forward(self, pixels: Tensor) -> Tensor:
        return rearrange(self.patch_embedding(pixels), "B C h w -> B (h w) C") + self.position_embedding.weight


class AttentionPool(nn.Module):
    """One learned query that looks at all patches. Its attention has the names of torch's own."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.heads, dim = config.num_attention_heads, config.hidden_size
        self.probe = nn.Parameter(torch.zeros(1, 1, dim))
        self.attention = nn.Module()
        self.attention.in_proj_weight = nn.Parameter(torch.zeros(3 * dim, dim))
        self.attention.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.attention.out_proj = Linear(dim, dim)
        self.layernorm = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.mlp = ClipMLP(config)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.attention.get_parameter("in_proj_weight").chunk(3)
        biases = self.attention.get_parameter("in_proj_bias").chunk(3)
        seen = (self.probe.expand(len(x), -1, -1), x, x)
        q, k, v = (
            rearrange(linear(one, weight, bias), "B L (H D) -> B H L D", H=self.heads)
            for one, weight, bias in zip(seen, weights, biases, strict=True)
        )
        found = rearrange(F.scaled_dot_product_attention(q, k, v), "B H L D -> B L (H D)")
        pooled = self.attention.get_submodule("out_proj")(found)
        return (pooled + self.mlp(self.layernorm(pooled)))[:, 0]


class SiglipVisionTransformer(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.embeddings = SiglipEmbeddings(config)
        self.encoder = ClipEncoder(config, causal=False)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.head = AttentionPool(config)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.post_layernorm(self.encoder(self.embeddings(pixels)))
        return hidden, self.head(hidden)


class SiglipVision(nn.Module):
    """SigLIP's vision tower, with exactly the keys of the published file's `vision_model.` half."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_model = SiglipVisionTransformer(config)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels (B, 3, image_size, image_size) -> every patch (B, N, hidden), and one vector (B, hidden).

        Raises:
            InputError: a picture of another size.
        """
        check_size(pixels, self.config)
        return self.vision_model(pixels)


class ClipVisionEmbeddings(nn.Module):
    """A token for the whole picture, then a linear map of each patch; and their learned positions."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        patch = config.patch_size
        self.class_embedding = nn.Parameter(torch.zeros(config.hidden_size))
        self.patch_embedding = nn.Conv2d(3, config.hidden_size, patch, stride=patch, bias=False)
        self.position_embedding = nn.Embedding(config.patches + 1, config.hidden_size)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = rearrange(self.patch_embedding(pixels), "B C h w -> B (h w) C")
        whole = self.class_embedding.expand(len(pixels), 1, -1)
        return torch.cat((whole, patches), dim=1) + self.position_embedding.weight


class ClipVisionTransformer(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.embeddings = ClipVisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)  # so spelled in the files
        self.encoder = ClipEncoder(config, causal=False)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.encoder(self.pre_layrnorm(self.embeddings(pixels)))
        return hidden, self.post_layernorm(hidden[:, 0])


class ClipVision(nn.Module):
    """CLIP's vision tower and its projection, with the keys of the published file."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_model = ClipVisionTransformer(config)
        self.visual_projection = Linear(config.hidden_size, config.projection_dim, bias=False)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels (B, 3, image_size, image_size) -> every token (B, 1 + N, hidden), the embedding (B, projection_dim).

        Raises:
            InputError: a picture of another size.
        """
        check_size(pixels, self.config)
        hidden, whole = self.vision_model(pixels)
        return hidden, self.visual_projection(whole)


def check_size(pixels: Tensor, config: VisionConfig) -> None:
    """Raises InputError unless the positions that were learned are those of the picture's patches."""
    side = config.image_size
    if tuple(pixels.shape[1:]) != (3, side, side):
        raise InputError(f"this vision tower sees pictures of (3, {side}, {side}), got {tuple(pixels.shape[1:])}")
