"""The tiny decoder for previews: TAEF1's decoder half."""

from __future__ import annotations

from miniflux.checkpoints.networks.record import DIFFUSERS, Layout, Network, row
from miniflux.models.tiny_autoencoder import TinyDecoder, TinyDecoderConfig

# The encoder of TAEF1 in diffusers' file: five plain convolutions, three of them without bias, and ten blocks of three.
_TINY_ENCODER = [
    *(f"encoder.layers.{place}.weight" for place in (0, 2, 6, 10, 14)),
    *(f"encoder.layers.{place}.bias" for place in (0, 14)),
    *(
        f"encoder.layers.{place}.conv.{n}.{kind}"
        for place in (1, 3, 4, 5, 7, 8, 9, 11, 12, 13)
        for n in (0, 2, 4)
        for kind in ("weight", "bias")
    ),
]


TINY_DECODER = Network(
    part="tiny",
    word="tiny decoder",
    phrase="a tiny decoder for previews",
    kind=TinyDecoder,
    config=TinyDecoderConfig,
    signs=("3.conv.0.weight", "decoder.layers.2.conv.0.weight"),
    behind_prefix=False,  # signs that are too short to tell there
    # AutoencoderTiny: no place for the clamp, which has no tensors. `{i-1}` is one less.
    layouts={DIFFUSERS: Layout([row("{i}.**", "decoder.layers.{i-1}.**")], ("decoder.layers.",))},
    redundant=dict.fromkeys(_TINY_ENCODER, "previews only decode"),
    names=("{tiny_file}", "taef1"),
)
