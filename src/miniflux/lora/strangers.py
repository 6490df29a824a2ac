"""What a file is that was given as a LoRA and is none: said in one line, before anything else goes wrong with it."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from torch import nn

from miniflux.checkpoints.beginnings import HEAD, kind_of_file
from miniflux.checkpoints.files import TensorSource
from miniflux.checkpoints.formats.reading import contents_of
from miniflux.checkpoints.networks import BY_KIND
from miniflux.checkpoints.opened import known_in, network_of, parts_of
from miniflux.errors import CheckpointError, LoraError
from miniflux.strictjson import open_regular

# Keys of networks and LoRAs of other families, by a piece that only they have.
FAMILIES: tuple[tuple[str, str], ...] = (
    ("lora_unet_down_blocks_", "a LoRA for Stable Diffusion (its U-Net has down_blocks)"),
    ("lora_unet_up_blocks_", "a LoRA for Stable Diffusion (its U-Net has up_blocks)"),
    ("lora_unet_mid_block_", "a LoRA for Stable Diffusion (its U-Net has a mid_block)"),
    ("lora_unet_input_blocks_", "a LoRA for Stable Diffusion XL (its U-Net has input_blocks)"),
    ("lora_unet_middle_block_", "a LoRA for Stable Diffusion XL (its U-Net has a middle_block)"),
    ("lora_unet_output_blocks_", "a LoRA for Stable Diffusion XL (its U-Net has output_blocks)"),
    ("unet.down_blocks.", "a LoRA for Stable Diffusion (its U-Net has down_blocks)"),
    ("unet.up_blocks.", "a LoRA for Stable Diffusion (its U-Net has up_blocks)"),
    ("unet.mid_block.", "a LoRA for Stable Diffusion (its U-Net has a mid_block)"),
    ("lora_unet_joint_blocks_", "a LoRA for Stable Diffusion 3 (it has joint_blocks)"),
    ("model.diffusion_model.input_blocks.", "a checkpoint of Stable Diffusion"),
    ("model.diffusion_model.joint_blocks.", "a checkpoint of Stable Diffusion 3"),
    ("down_blocks.0.resnets.", "a U-Net of Stable Diffusion, or a network for one"),
    ("control_model.", "a ControlNet of Stable Diffusion"),
)
EMBEDDINGS = {"emb_params", "string_to_param", "clip_l", "clip_g", "t5xxl", "t5_xxl", "<concept>"}


def refuse_other_files(path: Path) -> None:
    """Refuse what cannot be a file of tensors.

    Raises:
        LoraError: the file begins as one of another kind, or the folder is that of a whole model.
    """
    if path.is_dir():
        if (path / "model_index.json").is_file() or (path / "transformer").is_dir():
            raise LoraError(f"{path}: this is the folder of a whole model, not a LoRA")
        return
    try:
        with open_regular(path) as file:
            head = file.read(HEAD)
    except OSError:
        return  # which whoever opens it says better
    kind = kind_of_file(head)
    if kind is not None:
        raise LoraError(f"{path}: this is {kind}, not a LoRA")


def refuse_other_tensors(source: TensorSource, signs: bool) -> None:
    """Refuse the tensors of something else.

    Args:
        signs: whether there are keys that only LoRA files have.

    Raises:
        LoraError: they are those of a network, an embedding, or of another family of models.
    """
    kind = other_kind(source, signs)
    if kind is not None:
        raise LoraError(f"{source}: this is {kind}, not a LoRA{' for FLUX' if kind.startswith('a LoRA') else ''}")


def other_kind(source: TensorSource, signs: bool) -> str | None:
    """What tensors are that are no LoRA for FLUX; None if they may be one. `signs`: see `refuse_other_tensors`."""
    kind = next((kind for piece, kind in FAMILIES if any(piece in key for key in source.entries)), None)
    return kind or (None if signs else _network(source))


def _network(source: TensorSource) -> str | None:
    """What network, or networks, tensors are of; None if that is not known."""
    entries = contents_of(source).entries
    others = [found.name.rpartition(", ")[0] for found in known_in(source)]
    if others:
        return " and ".join(f"{'an' if name[0] in 'aeiouAEIO' else 'a'} {name}" for name in others)
    try:
        kinds: Collection[type[nn.Module]] = parts_of(source).keys()
    except CheckpointError:
        kinds = ()
    single = network_of(source)
    named = [BY_KIND[kind].phrase for kind in kinds or ([] if single is None else [single])]
    if len(named) > 1:
        return f"a whole checkpoint ({', '.join(named)})"
    if named:
        return named[0]
    embedding = len(entries) <= len(EMBEDDINGS) and all(key in EMBEDDINGS or key.startswith("<") for key in entries)
    return "an embedding of words (textual inversion)" if entries and embedding else None
