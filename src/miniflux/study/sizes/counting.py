"""What a model costs: parameters, bytes, operations and memory, by kind of block, by call of a network, by picture.

    print(study.count("flux1-dev", width=1024, height=1024))

Nothing is loaded and nothing computed: the networks are built on the meta device, where tensors have sizes alone. So
every model that is known can be counted, whether its files are here or not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from miniflux.arguments import MAX_STEPS, MAX_TEXT, size_for
from miniflux.checkpoints.formats.base import WEIGHT
from miniflux.checkpoints.formats.encodings import Encoding, find_format, kinds_of
from miniflux.checkpoints.formats.ggml import Ggml
from miniflux.checkpoints.loading import bare
from miniflux.checkpoints.networks import BY_CONFIG, BY_KIND, networks_of
from miniflux.checks import whole
from miniflux.conversion.tensors import fitting
from miniflux.families import FAMILIES
from miniflux.memory import bands
from miniflux.models.autoencoder import AutoencoderSizes, Level
from miniflux.models.t5 import T5Config
from miniflux.pipeline import Pipeline
from miniflux.sampling import Told, Words
from miniflux.study.sizes.activations import peaks_of
from miniflux.study.sizes.counts import Counts, Line, NetworkCounts
from miniflux.study.sizes.flops import Work, encoding_flops, flops_of
from miniflux.variants import Variant
from miniflux.variants import variant as find_variant

MAX_REFERENCES = 10  # of one size with the picture


def count(
    model: str | Variant | Pipeline,
    *,
    width: int | None = None,
    height: int | None = None,
    steps: int | None = None,
    text_tokens: int | None = None,
    references: int = 0,
    dtype: str | None = None,
) -> Counts:
    """What a picture costs.

    Args:
        model: a name of `miniflux.variants.names()`, a variant, or a pipeline, of which the networks it has are
            counted.
        width, height: in pixels, rounded up to whole tokens; None for the model's own.
        steps: None for the model's own; each calls the transformer once (solvers of a higher order more often), with
            classifier-free guidance twice.
        text_tokens: of T5 or the language model; None for the model's own, or a window of them where it takes as many
            as a prompt needs.
        references: pictures that it looks at at every step, each as large as the one that is drawn.
        dtype: what weights are stored in: float32, bfloat16, float16, or a format of packed weights as
            `convert --format` has them (`Q4_K`, `fp8_scaled` ...), with bfloat16 to compute in. None for bfloat16 with
            an autoencoder in float32, as `load` has it on a GPU; of a pipeline, what it has.

    Activations are those of a GPU, or of this CPU if the model is a pipeline that computes there.

    Raises:
        InputError: an unknown model or format, or a number out of its range.
    """
    chosen = find_variant(model) if isinstance(model, str) else model.variant if isinstance(model, Pipeline) else model
    steps = chosen.steps if steps is None else whole("steps", steps, 1, MAX_STEPS)
    width, height = size_for(chosen, chosen.autoencoder, width, height)
    usual = chosen.t5_length or (chosen.chat.multiple if chosen.chat is not None else 0)
    text = usual if text_tokens is None else whole("text_tokens", text_tokens, 1, MAX_TEXT)
    unit = chosen.autoencoder.unit
    tokens = (width // unit) * (height // unit)
    seen = whole("references", references, 0, MAX_REFERENCES) * tokens
    work = Work(width=width, height=height, text=text, references=seen, unit=unit)
    rows = 1 if chosen.cfg is None else 2
    encoding = None if dtype is None else find_format(dtype)
    host = isinstance(model, Pipeline) and model.device.type == "cpu"
    found: list[NetworkCounts] = []
    for part, network in _networks(chosen, model, encoding).items():
        does, calls, run = _calls(chosen, part, work, rows, steps)
        flops = flops_of(network, work)
        if part == "autoencoder" and references:
            flops |= {name: references * n for name, n in encoding_flops(cast(Any, network), width, height).items()}
        empty = bare(BY_KIND[type(network)].kind, network.config)
        computed = _computed(network, encoding)
        peaks = _peaks(network.config, computed, run, work, host)
        lines = _lines(empty, _sizes(network, encoding), flops, peaks)
        found.append(NetworkCounts(part, does, calls, lines, peaks[""]))
    order = ("clip", "t5", "lm", "transformer", "autoencoder")
    found.sort(key=lambda one: order.index(one.part))
    stored = "bfloat16, autoencoder in float32" if dtype is None else dtype
    if dtype is None and isinstance(model, Pipeline):
        stored = "as it is loaded"
    return Counts(chosen.name, width, height, tokens, text, seen, steps, rows, stored, tuple(found))


def _networks(chosen: Variant, model: str | Variant | Pipeline, encoding: Encoding | None) -> dict[str, nn.Module]:
    """The networks by part: those of a pipeline, or empty ones in the dtypes that they would have."""
    if isinstance(model, Pipeline):
        return {"transformer": model.transformer, "autoencoder": model.autoencoder, **model.text.networks}
    made: dict[str, nn.Module] = {}
    for part, record in networks_of(chosen).items():
        usual = torch.bfloat16 if record.packed else torch.float32
        made[part] = bare(record.kind, record.of(chosen)).to(usual if encoding is None else _compute(encoding))
    return made


def _compute(encoding: Encoding) -> torch.dtype:
    return encoding if isinstance(encoding, torch.dtype) else torch.bfloat16


def _computed(network: nn.Module, encoding: Encoding | None) -> torch.dtype:
    """What it computes in: by the dtype of its own small tensors, where weights are packed."""
    if encoding is not None:
        return _compute(encoding)
    return next(one.dtype for one in network.parameters() if one.dtype.is_floating_point)


def _peaks(
    config: Any, dtype: torch.dtype, run: Callable[[nn.Module], object], work: Work, host: bool
) -> dict[str, int]:
    """Bytes at the worst moment of each module of a network, and by the empty name of the whole."""
    pixels = work.width * work.height
    if isinstance(config, AutoencoderSizes) and pixels > bands.WHOLE:
        decoder = replace(config, ch=getattr(config, "decoder_ch", None) or config.ch)
        return {"": bands.activations(decoder, pixels, dtype.itemsize, reserved=True)}
    network = bare(BY_CONFIG[type(config)].kind, _shallow(config)).to(dtype).eval()
    return peaks_of(network, lambda: run(network), host)


def _shallow(config: Any) -> Any:
    """A network with one block of each kind, where all of a kind take the same: a language model keeps some layers'
    results, an autoencoder has no two levels alike."""
    depths = {"depth", "depth_single_blocks", *({"num_layers"} if isinstance(config, T5Config) else ())}
    return replace(config, **{f.name: min(1, getattr(config, f.name)) for f in fields(config) if f.name in depths})


def _sizes(network: nn.Module, encoding: Encoding | None) -> dict[str, int]:
    """Bytes of every parameter and buffer, by name, as they would be stored; None for as they are."""
    packed = BY_KIND[type(network)].packed
    linears = {f"{name}.{WEIGHT}" for name, one in network.named_modules() if isinstance(one, nn.Linear)}

    def size(name: str, tensor: Tensor) -> int:
        if encoding is None or not tensor.dtype.is_floating_point:
            return tensor.numel() * tensor.itemsize
        if isinstance(encoding, torch.dtype):
            return tensor.numel() * encoding.itemsize
        shape = tuple(tensor.shape)
        form = fitting(encoding, shape) if packed and name in linears and name.startswith(packed) else None
        if form is not None:
            return sum(torch.Size(s).numel() * kind.itemsize for kind, s in kinds_of(form, shape).values())
        vector = isinstance(encoding, Ggml) and len(shape) == 1  # ggml's are float32
        return tensor.numel() * (torch.float32 if vector else torch.bfloat16).itemsize

    return {name: size(name, tensor) for name, tensor in network.state_dict().items()}


def _calls(
    chosen: Variant, part: str, work: Work, rows: int, steps: int
) -> tuple[str, int, Callable[[nn.Module], object]]:
    """What one call of a network is, in words; how many a picture takes; and the call, of an empty network."""
    if part == "transformer":
        return "a call for one text", rows * steps, lambda network: _predict(chosen, network, work)
    if part == "autoencoder":
        what = "decoding" + (", and encoding the references" if work.references else "")
        return what, 1, lambda network: _decode(network, work)
    length = chosen.clip.max_position_embeddings if part == "clip" and chosen.clip is not None else work.text
    layers = {} if chosen.chat is None else {"layers": chosen.chat.layers}

    def read(network: Any) -> object:
        ids = torch.zeros(1, length, dtype=torch.long)
        return network(ids, torch.ones(1, length, dtype=torch.bool), **layers) if layers else network(ids)

    return f"a text of {length} tokens", rows, read


def _predict(chosen: Variant, network: Any, work: Work) -> object:
    """One call of a transformer."""
    family, config = FAMILIES[chosen.family], network.config
    dtype = next(network.parameters()).dtype
    rows, columns = work.height // work.unit, work.width // work.unit
    count = work.references // work.image
    ids = [family.image_ids(1, rows, columns), *(family.reference_ids(i + 1, rows, columns) for i in range(count))]
    vec = torch.empty(1, config.vec_in_dim, dtype=dtype) if hasattr(config, "vec_in_dim") else None
    told = Told(
        img=torch.empty(1, work.image + work.references, config.in_channels, dtype=dtype),
        img_ids=torch.cat(ids, dim=1),
        words=Words(
            torch.empty(1, work.text, config.context_in_dim, dtype=dtype), family.text_ids(1, work.text), vec, None
        ),
        timesteps=torch.empty(1),
        guidance=torch.empty(1) if config.guidance_embed else None,
        target=torch.empty(1),
        drawn=work.image,
    )
    return family.velocity(network, told)


def _decode(network: Any, work: Work) -> object:
    config, dtype = network.config, network.decoder.conv_in.weight.dtype
    size = work.height // config.downscale, work.width // config.downscale
    return network.decode(torch.empty(1, config.latent_channels, *size, dtype=dtype), bands.through)


def _lines(
    empty: nn.Module, sizes: Mapping[str, int], flops: Mapping[str, int], peaks: Mapping[str, int]
) -> tuple[Line, ...]:
    """A line for each kind of module."""
    numbers = {name: parameter.numel() for name, parameter in empty.named_parameters()}
    kinds = {name: kind_of(empty, name) for name in (*numbers, *sizes, *flops)}

    def of(table: Mapping[str, int], kind: str) -> int:
        return sum(n for name, n in table.items() if kinds[name] == kind)

    def most(kind: str) -> int | None:
        return max((n for name, n in peaks.items() if name and f"{name}.".startswith(f"{kind}.")), default=None)

    def one(kind: str) -> Line:
        module = empty.get_submodule(kind)
        number = len(module) if isinstance(module, nn.ModuleList) else 1
        return Line(kind, number, of(numbers, kind), of(sizes, kind), of(flops, kind), most(kind))

    return tuple(one(kind) for kind in dict.fromkeys(kinds[name] for name in (*numbers, *sizes)))


def kind_of(network: nn.Module, name: str) -> str:
    """What kind a module or tensor of a network is of: the list of blocks that it is in, or the level of an
    autoencoder, which are all different; else what is at the top, or right below what holds lists."""
    parts = name.split(".")
    for i in range(1, len(parts)):
        inside = network.get_submodule(".".join(parts[:i]))
        if isinstance(inside, nn.ModuleList):
            return ".".join(parts[: i + isinstance(inside[0], Level)])
    top = network.get_submodule(parts[0])
    return ".".join(parts[: 1 + any(isinstance(one, nn.ModuleList) for one in top.modules())])
