"""Networks of the FLUX family, and near it, that are recognised by name though no pipeline is made of them: as data.

Each is told by keys that no other network has, behind whatever prefix; what exactly it is, by its shapes under one
spelling of its names. Many of them have keys of FLUX.1 too, so they are looked for first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from miniflux.checkpoints.networks.record import DIFFUSERS, ORIGINAL, Row, Shapes, count, row
from miniflux.models.controlnet import ControlNet
from miniflux.models.flux2_controlnet import Flux2ControlNet
from miniflux.models.ip_adapter import InstantxIPAdapter, XlabsIPAdapter
from miniflux.models.redux import Redux
from miniflux.models.vision import ClipVision, SiglipVision
from miniflux.variants import CLIP_VISION_SIZES, REDUX_SIZES, SIGLIP_SIZES

Released = Mapping[Any, Any]
STEERS = "for conditions.load"
XLABS, INSTANTX, TRANSFORMERS, WITHOUT_PREFIX = "XLabs", "InstantX", "transformers", "without prefix"


@dataclass(frozen=True)
class Spelling:
    """One way in which a network is written.

    Attributes:
        layout: the naming of its tensors.
        signs: keys that tell it apart; all must be there, behind one prefix.
        rows: its own names and these, of all that `Known.named` looks at; none if they are its own.
        without: keys of which none may be there: of a larger network that it is a half of.
        alone: whether only keys without a prefix count.
    """

    layout: str
    signs: tuple[str, ...]
    rows: tuple[Row, ...] = ()
    without: tuple[str, ...] = ()
    alone: bool = False


@dataclass(frozen=True)
class Known:
    """One such network.

    Attributes:
        network: what it is.
        named: its exact name, from the shapes of its tensors under its own names and `released`.
        spellings: the ways in which it is written, the first that is there counts.
        released: names by sizes, or sizes by names, of those that were published.
        kind: what `conditions.load` makes of it.
    """

    network: str
    named: Callable[[Shapes, Released], str]
    spellings: tuple[Spelling, ...]
    released: Released = field(default_factory=dict[Any, Any])
    kind: type[nn.Module] = field(kw_only=True)


def _controlnet(shapes: Shapes, released: Released) -> str:
    double, single = (count(shapes, rf"{kind}_blocks\.([^.]*)") for kind in ("double", "single"))
    if "input_hint_block.0.weight" in shapes:
        return f"FLUX.1 ControlNet of XLabs, {double} blocks"
    modes = shapes.get("controlnet_mode_embedder.weight", (0,))[0]
    return f"FLUX.1 ControlNet, {double} + {single} blocks" + (f", union of {modes} modes" if modes else "")


def _flux2_controlnet(shapes: Shapes, released: Released) -> str:
    return f"FLUX.2 ControlNet, {count(shapes, r'control_transformer_blocks[.]([^.]*)')} blocks"


def _tower(kind: str) -> Callable[[Shapes, Released], str]:
    """The name of a vision tower of a kind."""

    def named(shapes: Shapes, released: Released) -> str:
        width, patch = shapes["vision_model.embeddings.patch_embedding.weight"][0::3]
        tokens, _ = _matrix(shapes, "vision_model.embeddings.position_embedding.weight")
        known = released.get((width, patch, tokens))
        return known or f"a {kind} of width {width}, patches of {patch} pixels, {tokens} tokens"

    return named


def _redux(shapes: Shapes, released: Released) -> str:
    known = released.get((_matrix(shapes, "redux_up.weight")[1], _matrix(shapes, "redux_down.weight")[0]))
    return known or "a Redux image encoder of another size"


def _ip_adapter(shapes: Shapes, released: Released) -> str:
    return f"FLUX.1 IP-Adapter for {count(shapes, r'double_blocks[.]([^.]*)')} double blocks"


def _instantx_ip_adapter(shapes: Shapes, released: Released) -> str:
    return f"FLUX.1 IP-Adapter of InstantX for {count(shapes, r'ip_adapter[.]([^.]*)')} blocks"


def _matrix(shapes: Shapes, name: str) -> tuple[int, int]:
    rows, columns = shapes[name]
    return rows, columns


TOWER = (row("vision_model.**", "**"),)
TOKENS = "text_model.embeddings.token_embedding.weight"  # a whole CLIP, whose half for texts is loaded
TEXT = row("txt_in.*", "context_embedder.*")
SINGLE = row("single_blocks.{i}.**", "single_transformer_blocks.{i}.**")

KNOWN = (
    Known(
        "ControlNet",
        _controlnet,
        (
            Spelling(
                DIFFUSERS,
                ("controlnet_x_embedder.weight",),
                (
                    row("double_blocks.{i}.**", "transformer_blocks.{i}.**"),
                    SINGLE,
                    row("controlnet_mode_embedder.*", "controlnet_mode_embedder.*"),
                ),
            ),
            Spelling(XLABS, ("pos_embed_input.weight", "controlnet_blocks.0.weight")),
        ),
        kind=ControlNet,
    ),
    Known(  # a second sign, because ControlNets of this kind for Qwen-Image have the first
        "ControlNet",
        _flux2_controlnet,
        (
            Spelling(DIFFUSERS, ("control_img_in.weight", "control_transformer_blocks.0.ff.linear_in.weight")),
            Spelling(ORIGINAL, ("control_img_in.weight", "control_transformer_blocks.0.img_mlp.0.weight")),
        ),
        kind=Flux2ControlNet,
    ),
    Known(
        "IP-Adapter",
        _ip_adapter,
        (
            Spelling(XLABS, ("ip_adapter_proj_model.proj.weight",)),
            Spelling(
                DIFFUSERS,
                ("ip_adapter.0.to_k_ip.weight", "image_proj.proj.weight"),
                (row("double_blocks.{i}.**", "ip_adapter.{i}.**"),),
            ),
        ),
        kind=XlabsIPAdapter,
    ),
    Known(
        "IP-Adapter",
        _instantx_ip_adapter,
        (Spelling(INSTANTX, ("ip_adapter.0.to_k_ip.weight", "image_proj.proj.0.weight")),),
        kind=InstantxIPAdapter,
    ),
    Known("Redux", _redux, (Spelling(ORIGINAL, ("redux_up.weight", "redux_down.weight")),), REDUX_SIZES, kind=Redux),
    Known(
        "SigLIP",
        _tower("SigLIP"),
        (
            Spelling(TRANSFORMERS, ("vision_model.head.probe",)),
            Spelling(WITHOUT_PREFIX, ("head.probe", "embeddings.patch_embedding.weight"), TOWER, alone=True),
        ),
        SIGLIP_SIZES,
        kind=SiglipVision,
    ),
    Known(
        "CLIP vision",
        _tower("CLIP vision tower"),
        (
            Spelling(TRANSFORMERS, ("vision_model.pre_layrnorm.weight",), without=(TOKENS,)),
            Spelling(WITHOUT_PREFIX, ("pre_layrnorm.weight", "embeddings.class_embedding"), TOWER, alone=True),
        ),
        CLIP_VISION_SIZES,
        kind=ClipVision,
    ),
)
