"""Networks of the FLUX family, and near it, that are recognised by name though they cannot be loaded.

Each is told by keys that no other network has, behind whatever prefix; what exactly it is, by its shapes. Many of them
have keys of FLUX.1 too, so they are looked for first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from miniflux.checkpoints.files import Entry
from miniflux.variants import (
    FLUX2_SIZES,
    FLUX3_SIZES,
    LANGUAGE_MODELS,
    REDUX_SIZES,
    SIGLIP_SIZES,
    VISION_LANGUAGE_MODELS,
)

Shapes = Mapping[str, tuple[int, ...]]
NOT_YET = "not loadable yet"
SEEING = "model.language_model."  # where a model that reads pictures too has its language model
# Ways to pack weights that are not read, by how the name of a part ends.
FOREIGN = {
    ".weight._data": "optimum-quanto",
    ".SCB": "bitsandbytes' LLM.int8()",
    ".qweight": "SVDQuant (Nunchaku) or GPTQ",
}


def _flux2(shapes: Shapes) -> str:
    """dev, klein 4B, klein 9B; or its sizes."""
    native = "img_in.weight" in shapes
    image, text = ("img_in", "txt_in") if native else ("x_embedder", "context_embedder")
    (hidden, channels), (_, context) = _matrix(shapes, image), _matrix(shapes, text)
    double, single = (
        ("double_blocks.", "single_blocks.") if native else ("transformer_blocks.", "single_transformer_blocks.")
    )
    found = (hidden, count_blocks(shapes, double), count_blocks(shapes, single), context, channels)
    for name, sizes in FLUX2_SIZES.items():
        known = (sizes.hidden_size, sizes.depth, sizes.depth_single_blocks, sizes.context_in_dim, sizes.in_channels)
        if found == known:
            return f"{name} transformer"
    return f"a FLUX.2 transformer of another size (hidden size {hidden}, {found[1]} + {found[2]} blocks)"


def _flux3(shapes: Shapes) -> str:
    """klein or klein base, which has no embedding of the time aimed at; or its sizes."""
    native = "txt_in.weight" in shapes
    single = "single_blocks." if native else "single_transformer_blocks."
    hidden, context = _matrix(shapes, "txt_in" if native else "context_embedder")
    found = (hidden, count_blocks(shapes, "txt_mode_blocks."), count_blocks(shapes, single), context)
    if name := FLUX3_SIZES.get(found):
        target = "ref_time_in.in_layer.weight" if native else "target_timestep_embedder.linear_1.weight"
        return f"{name} transformer" if target in shapes else f"{name} base transformer"
    return f"a FLUX.3 transformer of another size (hidden size {hidden}, {found[1]} + {found[2]} blocks)"


def _flux2_autoencoder(shapes: Shapes) -> str:
    return f"FLUX.2 autoencoder, {shapes['decoder.conv_in.weight'][1]} latent channels"


def _controlnet(shapes: Shapes) -> str:
    double, single = count_blocks(shapes, "transformer_blocks."), count_blocks(shapes, "single_transformer_blocks.")
    modes = shapes.get("controlnet_mode_embedder.weight", (0,))[0]
    return f"FLUX.1 ControlNet, {double} + {single} blocks" + (f", union of {modes} modes" if modes else "")


def _language_model(shapes: Shapes) -> str:
    """Which text encoder of FLUX.2 or FLUX.3, by width and number of layers."""
    inside = next(at for at in (SEEING, "model.", "") if f"{at}embed_tokens.weight" in shapes)
    width, layers = _matrix(shapes, f"{inside}embed_tokens")[1], count_blocks(shapes, f"{inside}layers.")
    known = VISION_LANGUAGE_MODELS if inside == SEEING else LANGUAGE_MODELS
    return known.get((width, layers), f"a language model of {layers} layers of width {width}")


def _siglip(shapes: Shapes) -> str:
    width, patch = shapes["vision_model.embeddings.patch_embedding.weight"][0::3]
    tokens, _ = _matrix(shapes, "vision_model.embeddings.position_embedding")
    known = SIGLIP_SIZES.get((width, patch, tokens))
    return known or f"a SigLIP of width {width}, patches of {patch} pixels, {tokens} tokens"


def _redux(shapes: Shapes) -> str:
    known = REDUX_SIZES.get((_matrix(shapes, "redux_up")[1], _matrix(shapes, "redux_down")[0]))
    return known or "a Redux image encoder of another size"


def _ip_adapter(shapes: Shapes) -> str:
    blocks = count_blocks(shapes, "double_blocks.") or count_blocks(shapes, "ip_adapter.")
    return f"FLUX.1 IP-Adapter for {blocks} double blocks"


@dataclass(frozen=True)
class Other:
    """One way in which such a network is written.

    Attributes:
        network: what it is.
        layout: the naming of its tensors.
        signs: keys that tell it apart; all must be there, behind one prefix.
        named: its exact name, from the shapes of its tensors.
    """

    network: str
    layout: str
    signs: tuple[str, ...]
    named: Callable[[Shapes], str]


OTHERS = (
    Other("FLUX.2 transformer", "original", ("double_stream_modulation_img.lin.weight", "img_in.weight"), _flux2),
    Other("FLUX.2 transformer", "diffusers", ("double_stream_modulation_img.linear.weight",), _flux2),
    Other("FLUX.3 transformer", "original", ("early_stream_modulations.txt.lin.weight",), _flux3),
    Other("FLUX.3 transformer", "diffusers", ("early_stream_modulations.txt.linear.weight",), _flux3),
    Other("FLUX.2 autoencoder", "original", ("bn.running_mean", "encoder.quant_conv.weight"), _flux2_autoencoder),
    Other("FLUX.2 autoencoder", "diffusers", ("bn.running_mean", "quant_conv.weight"), _flux2_autoencoder),
    Other("ControlNet", "diffusers", ("controlnet_x_embedder.weight",), _controlnet),
    Other("ControlNet", "XLabs", ("input_hint_block.0.weight", "controlnet_blocks.0.weight"),
          lambda shapes: f"FLUX.1 ControlNet of XLabs, {count_blocks(shapes, 'double_blocks.')} blocks"),
    Other("IP-Adapter", "XLabs", ("ip_adapter_proj_model.proj.weight",), _ip_adapter),
    Other("IP-Adapter", "diffusers", ("ip_adapter.0.to_k_ip.weight", "image_proj.proj.weight"), _ip_adapter),
    Other("Redux", "original", ("redux_up.weight", "redux_down.weight"), _redux),
    Other("SigLIP", "transformers", ("vision_model.head.probe",), _siglip),
    *(
        Other(network, "transformers", (f"{at}layers.0.self_attn.{sign}", f"{at}embed_tokens.weight"), _language_model)
        for network, sign, places in (
            ("Qwen3-VL", "q_norm.weight", (SEEING,)),
            ("Qwen3", "q_norm.weight", ("model.", "")),
            ("Mistral", "q_proj.weight", ("model.", "")),
        )
        for at in places
    ),
)  # fmt: skip
_FIRST = tuple(other.signs[0] for other in OTHERS)


@dataclass(frozen=True)
class Found:
    """A network that cannot be loaded, in a file.

    Attributes:
        other: which one.
        prefix: what stands before the names of its tensors.
        name: what it is, in a few words.
    """

    other: Other
    prefix: str
    name: str


def others_in(entries: Mapping[str, Entry]) -> list[Found]:
    """The networks among these keys that are known by name only, at most one behind each prefix.

    Args:
        entries: of a file; packed weights by the shapes that they unpack to.
    """
    signs = [key for key in entries if key.endswith(_FIRST)]
    found: dict[str, Found] = {}
    for other in OTHERS:
        for key in signs:
            prefix = key[: -len(other.signs[0])]
            outer = any(prefix.startswith(at) for at, known in found.items() if known.other.named is other.named)
            if key != prefix + other.signs[0] or (prefix and not prefix.endswith(".")) or prefix in found or outer:
                continue
            if all(prefix + sign in entries for sign in other.signs):
                found[prefix] = Found(other, prefix, _named(other, prefix, entries))
    return list(found.values())


def foreign_packing(keys: Iterable[str]) -> str | None:
    """What to say of weights that are packed in a way that is known by name only; None if there are none."""
    for key in keys:
        for ending, name in FOREIGN.items():
            if key.endswith(ending):
                return f"weights packed by {name}, which are not read, such as {key}"
    return None


def _named(other: Other, prefix: str, entries: Mapping[str, Entry]) -> str:
    shapes = {key[len(prefix) :]: entry.shape for key, entry in entries.items() if key.startswith(prefix)}
    try:
        name = other.named(shapes)
    except (KeyError, ValueError, IndexError):  # a tensor that tells the size is not there, or has other axes
        name = f"an incomplete {other.network}"
    return f"{name}, {NOT_YET}"


def _matrix(shapes: Shapes, name: str) -> tuple[int, int]:
    rows, columns = shapes[f"{name}.weight"]
    return rows, columns


def count_blocks(keys: Iterable[str], prefix: str) -> int:
    """How many different names stand behind a prefix, up to the next dot."""
    return len({key[len(prefix) :].partition(".")[0] for key in keys if key.startswith(prefix)})
