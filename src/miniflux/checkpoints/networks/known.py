"""Networks of the FLUX family, and near it, that are recognised by name though they cannot be loaded.

Each is told by keys that no other network has, behind whatever prefix; what exactly it is, by its shapes. Many of them
have keys of FLUX.1 too, so they are looked for first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from miniflux.checkpoints.files import Entry
from miniflux.checkpoints.networks.record import Shapes
from miniflux.variants import (
    FLUX2_SIZES,
    FLUX3_SIZES,
    LANGUAGE_MODELS,
    REDUX_SIZES,
    SIGLIP_SIZES,
    VISION_LANGUAGE_MODELS,
)

Names = Mapping[str, str]
NOT_YET = "not loadable yet"
SEEING = "model.language_model."  # where a model that reads pictures too has its language model


def _flux2(shapes: Shapes, names: Names) -> str:
    """dev, klein 4B, klein 9B; or its sizes."""
    (hidden, channels), (_, context) = _matrix(shapes, names["image"]), _matrix(shapes, names["text"])
    found = (hidden, count_blocks(shapes, names["double"]), count_blocks(shapes, names["single"]), context, channels)
    for name, sizes in FLUX2_SIZES.items():
        known = (sizes.hidden_size, sizes.depth, sizes.depth_single_blocks, sizes.context_in_dim, sizes.in_channels)
        if found == known:
            return f"{name} transformer"
    return f"a FLUX.2 transformer of another size (hidden size {hidden}, {found[1]} + {found[2]} blocks)"


def _flux3(shapes: Shapes, names: Names) -> str:
    """klein or klein base, which has no embedding of the time aimed at; or its sizes."""
    hidden, context = _matrix(shapes, names["text"])
    found = (hidden, count_blocks(shapes, "txt_mode_blocks."), count_blocks(shapes, names["single"]), context)
    if name := FLUX3_SIZES.get(found):
        return f"{name} transformer" if names["target"] in shapes else f"{name} base transformer"
    return f"a FLUX.3 transformer of another size (hidden size {hidden}, {found[1]} + {found[2]} blocks)"


def _flux2_autoencoder(shapes: Shapes, names: Names) -> str:
    return f"FLUX.2 autoencoder, {shapes['decoder.conv_in.weight'][1]} latent channels"


def _controlnet(shapes: Shapes, names: Names) -> str:
    double, single = count_blocks(shapes, "transformer_blocks."), count_blocks(shapes, "single_transformer_blocks.")
    modes = shapes.get("controlnet_mode_embedder.weight", (0,))[0]
    return f"FLUX.1 ControlNet, {double} + {single} blocks" + (f", union of {modes} modes" if modes else "")


def _language_model(shapes: Shapes, names: Names) -> str:
    """Which text encoder of FLUX.2 or FLUX.3, by width and number of layers."""
    inside = names["inside"]
    width, layers = _matrix(shapes, f"{inside}embed_tokens.weight")[1], count_blocks(shapes, f"{inside}layers.")
    known = VISION_LANGUAGE_MODELS if inside == SEEING else LANGUAGE_MODELS
    return known.get((width, layers), f"a language model of {layers} layers of width {width}")


def _siglip(shapes: Shapes, names: Names) -> str:
    width, patch = shapes["vision_model.embeddings.patch_embedding.weight"][0::3]
    tokens, _ = _matrix(shapes, "vision_model.embeddings.position_embedding.weight")
    known = SIGLIP_SIZES.get((width, patch, tokens))
    return known or f"a SigLIP of width {width}, patches of {patch} pixels, {tokens} tokens"


def _redux(shapes: Shapes, names: Names) -> str:
    known = REDUX_SIZES.get((_matrix(shapes, "redux_up.weight")[1], _matrix(shapes, "redux_down.weight")[0]))
    return known or "a Redux image encoder of another size"


def _ip_adapter(shapes: Shapes, names: Names) -> str:
    return f"FLUX.1 IP-Adapter for {count_blocks(shapes, names['blocks'])} double blocks"


@dataclass(frozen=True)
class Known:
    """One way in which such a network is written.

    Attributes:
        network: what it is.
        layout: the naming of its tensors.
        signs: keys that tell it apart; all must be there, behind one prefix.
        named: its exact name, from the shapes of its tensors and `names`.
        names: how this layout calls what `named` looks at.
    """

    network: str
    layout: str
    signs: tuple[str, ...]
    named: Callable[[Shapes, Names], str]
    names: Names = field(default_factory=dict[str, str])


FLUX2 = {"image": "img_in.weight", "text": "txt_in.weight", "double": "double_blocks.", "single": "single_blocks."}
FLUX2_DIFFUSERS = {
    "image": "x_embedder.weight",
    "text": "context_embedder.weight",
    "double": "transformer_blocks.",
    "single": "single_transformer_blocks.",
}
FLUX3 = {"text": "txt_in.weight", "single": "single_blocks.", "target": "ref_time_in.in_layer.weight"}
FLUX3_DIFFUSERS = {
    "text": "context_embedder.weight",
    "single": "single_transformer_blocks.",
    "target": "target_timestep_embedder.linear_1.weight",
}
KNOWN = (
    Known("FLUX.2 transformer", "original", ("double_stream_modulation_img.lin.weight", "img_in.weight"), _flux2,
          FLUX2),
    Known("FLUX.2 transformer", "diffusers", ("double_stream_modulation_img.linear.weight",), _flux2, FLUX2_DIFFUSERS),
    Known("FLUX.3 transformer", "original", ("early_stream_modulations.txt.lin.weight",), _flux3, FLUX3),
    Known("FLUX.3 transformer", "diffusers", ("early_stream_modulations.txt.linear.weight",), _flux3, FLUX3_DIFFUSERS),
    Known("FLUX.2 autoencoder", "original", ("bn.running_mean", "encoder.quant_conv.weight"), _flux2_autoencoder),
    Known("FLUX.2 autoencoder", "diffusers", ("bn.running_mean", "quant_conv.weight"), _flux2_autoencoder),
    Known("ControlNet", "diffusers", ("controlnet_x_embedder.weight",), _controlnet),
    Known("ControlNet", "XLabs", ("input_hint_block.0.weight", "controlnet_blocks.0.weight"),
          lambda shapes, _: f"FLUX.1 ControlNet of XLabs, {count_blocks(shapes, 'double_blocks.')} blocks"),
    Known("IP-Adapter", "XLabs", ("ip_adapter_proj_model.proj.weight",), _ip_adapter, {"blocks": "double_blocks."}),
    Known("IP-Adapter", "diffusers", ("ip_adapter.0.to_k_ip.weight", "image_proj.proj.weight"), _ip_adapter,
          {"blocks": "ip_adapter."}),
    Known("Redux", "original", ("redux_up.weight", "redux_down.weight"), _redux),
    Known("SigLIP", "transformers", ("vision_model.head.probe",), _siglip),
    *(
        Known(network, "transformers", (f"{at}layers.0.self_attn.{sign}", f"{at}embed_tokens.weight"), _language_model,
              {"inside": at})
        for network, sign, places in (
            ("Qwen3-VL", "q_norm.weight", (SEEING,)),
            ("Qwen3", "q_norm.weight", ("model.", "")),
            ("Mistral", "q_proj.weight", ("model.", "")),
        )
        for at in places
    ),
)  # fmt: skip
_FIRST = tuple(known.signs[0] for known in KNOWN)


@dataclass(frozen=True)
class Found:
    """A network that cannot be loaded, in a file.

    Attributes:
        what: which one.
        prefix: what stands before the names of its tensors.
        name: what it is, in a few words.
    """

    what: Known
    prefix: str
    name: str


def found_by_name(entries: Mapping[str, Entry]) -> list[Found]:
    """The networks among these keys that are known by name only, at most one behind each prefix.

    Args:
        entries: of a file; packed weights by the shapes that they unpack to.
    """
    signs = [key for key in entries if key.endswith(_FIRST)]
    found: dict[str, Found] = {}
    for known in KNOWN:
        for key in signs:
            prefix = key[: -len(known.signs[0])]
            outer = any(prefix.startswith(at) for at, one in found.items() if one.what.named is known.named)
            if key != prefix + known.signs[0] or (prefix and not prefix.endswith(".")) or prefix in found or outer:
                continue
            if all(prefix + sign in entries for sign in known.signs):
                found[prefix] = Found(known, prefix, _named(known, prefix, entries))
    return list(found.values())


def _named(known: Known, prefix: str, entries: Mapping[str, Entry]) -> str:
    shapes = {key[len(prefix) :]: entry.shape for key, entry in entries.items() if key.startswith(prefix)}
    try:
        name = known.named(shapes, known.names)
    except (KeyError, ValueError, IndexError):  # a tensor that tells the size is not there, or has other axes
        name = f"an incomplete {known.network}"
    return f"{name}, {NOT_YET}"


def _matrix(shapes: Shapes, name: str) -> tuple[int, int]:
    rows, columns = shapes[name]
    return rows, columns


def count_blocks(keys: Iterable[str], prefix: str) -> int:
    """How many different names stand behind a prefix, up to the next dot."""
    return len({key[len(prefix) :].partition(".")[0] for key in keys if key.startswith(prefix)})
