"""ConceptAttention (arXiv 2502.04320): where in a picture a concept is, also one that the prompt does not name.

Concepts go through the blocks as a third stream, with the weights of the text. They look at themselves and at the
picture; nobody looks at them, so the picture stays what it is, bit for bit. A map is the dot product of what a block's
attention gives a concept and an image token, before projection and gate (section 4 of the paper).

From the paper and its code: double blocks of FLUX.1 and FLUX.2 dev, and how concepts are read there. Ours: single
blocks, where concepts are treated as the text is; FLUX.2 klein; FLUX.3; references; concepts of several tokens.

In FLUX.3 each concept goes through the early blocks of the text as a prompt of its own would, with all of its form and
its padding. In the joint blocks its token goes on, as in FLUX.2.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from miniflux.checks import shown, whole
from miniflux.errors import InputError
from miniflux.families import FAMILIES
from miniflux.models import flux1
from miniflux.models.flux1 import Flux1, RunBlock
from miniflux.models.flux3 import Parts, StreamBlock
from miniflux.models.layers import Attend, DoubleStream, Shift, SingleStream, attention, heads, rope_rotations
from miniflux.pipeline import Pipeline
from miniflux.sampling import Told
from miniflux.sampling.observing import Call, observed, observers
from miniflux.study.mapping.attention import check_inside, check_single, one_prompt, only_one
from miniflux.study.mapping.maps import Gathering, Layout, Maps, blocks_for
from miniflux.study.mapping.words import listed, own
from miniflux.study.values.tapping import Tap
from miniflux.text import Text

log = logging.getLogger(__name__)

Space = Literal["output", "query_key"]
"""output: the dot product of attention's outputs; query_key: that of the concept's query and the image token's key,
before they are rotated, over sqrt(D), the mean over heads."""

Pieces = Literal["one", "all"]
"""Which tokens of a concept count. one: as in the paper's code, the first for FLUX.1, the last for the others; all: the
mean of the maps of all of its tokens."""


@dataclass(frozen=True)
class Concept:
    """A concept that was read.

    Attributes:
        txt: the text encoder's tokens (1, T, width).
        places: which of them are the concept.
    """

    name: str
    txt: Tensor
    places: tuple[int, ...]


def read(pipe: Pipeline, concepts: Sequence[str], pieces: Pieces = "one", **reading: Any) -> list[Concept]:
    """Concepts as the text encoder reads each of them, alone, in the form of a prompt.

    Args:
        reading: `length` and `padding`, as of `TextReader.encode`.

    Raises:
        InputError: there is none, one is empty, there twice, or longer than the encoder reads.
    """
    if pieces not in get_args(Pieces):
        raise InputError(f"pieces must be one of {', '.join(get_args(Pieces))}, got {shown(pieces)}")
    found: list[Concept] = []
    for name in listed("concepts", concepts):
        txt = pipe.text.encode([name], **reading).txt
        places = own(pipe.text, name).places(txt.shape[1])
        one, which = (places[:1], "first") if isinstance(pipe.text, Text) else (places[-1:], "last")
        if pieces == "one" and len(places) > 1:
            log.warning("%r has %d tokens, and its %s counts; of all of them: pieces='all'", name, len(places), which)
        found.append(Concept(name, txt, tuple(one if pieces == "one" else places)))
    return found


class ConceptWatch:
    """Takes concepts along through a run, and keeps their maps; for `sampling.observing.observed`, beside others.

    Where a step cache leaves a block out, concepts do not know what it would have made of them: there are no maps of
    the blocks behind it in that call.
    """

    alters: str | None = None

    def __init__(
        self,
        pipe: Pipeline,
        concepts: Sequence[Concept],
        *,
        spaces: Sequence[Space] = ("output",),
        on: int = 0,
        blocks: Sequence[str] | None = None,
        steps: Sequence[int] | None = None,
    ) -> None:
        check_inside(pipe)
        for space in spaces:
            if space not in get_args(Space):
                raise InputError(f"space must be one of {', '.join(get_args(Space))}, got {shown(space)}")
        self.network, self.family = pipe.transformer, FAMILIES[pipe.variant.family]
        self.unit, self.on, self.concepts = pipe.autoencoder.config.unit, whole("on", on, 0), concepts
        config = self.network.config
        wanted = blocks_for(config, blocks)
        self.gathered = {space: Gathering(wanted, steps) for space in spaces}
        order = [name for name in config.blocks if config.joined or name.split("_")[0] in ("txt", "single")]
        self.order = order[: order.index(wanted[-1]) + 1]
        self.step: int | None = None

    def began(self, pictures: Sequence[int]) -> None:
        only_one(pictures)

    def calling(self, call: Call) -> None:
        wants = [each.wants(call) for each in self.gathered.values()]
        self.step = call.step if any(wants) else None
        if self.step is None:
            return
        if any(isinstance(each, Tap) for each in observers()):
            raise InputError(
                "concepts go through the network's own modules: who captures or edits there would take them for the "
                "prompt: draw the picture once for each"
            )
        told = call.told
        self.row, self.layout, self.next = told.texts.index("positive"), Layout.of(told), 0
        self.grid = self.layout.grid(self.on)
        self._begin(told)

    def _begin(self, told: Told) -> None:
        """The concepts as the blocks are given them."""
        network, row, like = self.network, slice(self.row, self.row + 1), told.words.txt
        self.texts = [network.txt_in(concept.txt.to(like)) for concept in self.concepts]
        ids = [self.family.text_ids(1, text.shape[1]).to(told.img_ids) for text in self.texts]
        self.turns = [rope_rotations(each, network.config.axes_dim, network.config.theta) for each in ids]
        places = [list(concept.places) for concept in self.concepts]
        self.pe = torch.cat([pe[:, :, these] for pe, these in zip(self.turns, places, strict=True)], dim=2)
        self.x: Tensor | None = None  # their own tokens (1, tokens, hidden), from where they meet the picture on
        self.vec = None
        if isinstance(network, Flux1):
            vec, guidance = cast(Tensor, told.words.vec)[row], None if told.guidance is None else told.guidance[row]
            self.vec = network.conditioning(told.timesteps[row], torch.zeros_like(vec), guidance, told.img.dtype)

    def wrap(self, run: RunBlock) -> RunBlock:
        def beside(name: str, block: Any, streams: tuple[Tensor, ...], context: tuple[Any, ...]) -> tuple[Tensor, ...]:
            if self.step is None or name not in self.order:
                return run(name, block, streams, context)
            if self.order[self.next : self.next + 1] != [name]:  # one was left out
                self.step = None
                return run(name, block, streams, context)
            self.next += 1
            return run(name, block, streams, (*context[:-1], self._taking(name, block, context)))

        return beside

    def _taking(self, name: str, block: Any, context: tuple[Any, ...]) -> Attend:
        """Attention, which takes concepts through the block while it runs: then its weights are there."""
        attend: Attend = context[-1]

        def take(q: Tensor, k: Tensor, v: Tensor, pe: Tensor, mask: Tensor | None = None) -> Tensor:
            out = attend(q, k, v, pe, mask)
            if name.startswith("txt_mode_blocks."):
                parts = self._text_parts(context[0])
                self.texts = [
                    block.forward(x, Parts((x.shape[1],), parts), turn, attention)
                    for x, turn in zip(self.texts, self.turns, strict=True)
                ]
                return out
            if self.x is None:
                places = [list(concept.places) for concept in self.concepts]
                self.x = torch.cat([x[:, these] for x, these in zip(self.texts, places, strict=True)], dim=1)
            self.x = self._through(name, block, context, (q, k, v, pe), out, self.x)
            return out

        return take

    def _text_parts(self, parts: Parts) -> tuple[Shift, ...]:
        """Modulation of the text of this picture, in FLUX.3."""
        return (self._own(parts.shifts[0]),)

    def _own(self, shift: Shift) -> Shift:
        """Of a batch, this picture's."""
        row = slice(self.row, self.row + 1)
        return Shift(shift.shift[row], shift.scale[row], shift.gate[row])

    def _through(
        self, name: str, block: Any, context: tuple[Any, ...], seen: tuple[Tensor, ...], out: Tensor, x: Tensor
    ) -> Tensor:
        """Take concepts x (1, tokens, hidden) through a block in which text and picture meet, and keep their maps."""
        if isinstance(block, DoubleStream):
            mods = block.txt_mod(self.vec) if isinstance(block, flux1.DoubleStreamBlock) else context[1]
            first, second = mods if self.vec is not None else [self._own(mod) for mod in mods]
            q, k, v = block.txt_attn.heads(block.txt_norm1(x, first))
            attended = self._attended(name, q, k, v, seen, out)
            x = first.added(x, block.txt_attn.proj(attended))
            return second.added(x, block.txt_mlp(block.txt_norm2(x, second)))
        if isinstance(block, SingleStream):
            mod = block.modulation(self.vec)[0] if isinstance(block, flux1.SingleStreamBlock) else self._own(context[0])
            qkv, mlp = block.linear1(block.pre_norm(x, mod)).split(block.split, dim=-1)
            q, k, v = heads(qkv, block.num_heads, block.norm)
            attended = self._attended(name, q, k, v, seen, out)
            return mod.added(x, block.linear2(torch.cat((attended, block.mlp_act(mlp)), dim=-1)))
        assert isinstance(block, StreamBlock)

        def attend(q: Tensor, k: Tensor, v: Tensor, pe: Tensor, mask: Tensor | None) -> Tensor:
            return self._attended(name, q, k, v, seen, out)

        return block.forward(x, Parts((x.shape[1],), self._text_parts(context[0])), self.pe, attend)

    def _attended(
        self,
        name: str,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        seen: tuple[Tensor, ...],
        out: Tensor,
    ) -> Tensor:
        """What concepts see of themselves and the picture (1, tokens, hidden); keeps what the map is made of.

        Args:
            q, k, v: of the concepts (1, H, tokens, D).
            seen: queries, keys, values and rotations of the network's own attention; out: its result (B, L, hidden).
        """
        row = slice(self.row, self.row + 1)
        all_q, all_k, all_v, pe = (x[row] if len(x) > 1 else x for x in seen)
        before = all_k.shape[2] - all_q.shape[2]  # references that are looked at once stand in front of the text

        def but_text(x: Tensor) -> Tensor:
            return torch.cat((x[:, :, :before], x[:, :, before + self.layout.text :]), dim=2)

        keys, values, turns = (
            torch.cat((but_text(theirs), ours), dim=2) for theirs, ours in ((all_k, k), (all_v, v), (pe, self.pe))
        )
        attended = attention(q, keys, values, turns)
        if self.step is None or name not in next(iter(self.gathered.values())).blocks:
            return attended
        start = self.layout.text + self.grid.start
        place = slice(start, start + self.grid.size)
        for space, gathered in self.gathered.items():
            if space == "output":
                scores = attended[0].float() @ out[self.row, place].float().T
            else:
                theirs = all_k[0, :, before + place.start : before + place.stop]
                scores = (q[0].float() @ theirs.float().transpose(1, 2)).mean(dim=0) * q.shape[-1] ** -0.5
            each = [part.mean(dim=0) for part in scores.split([len(concept.places) for concept in self.concepts])]
            gathered.add(self.step, name, torch.stack(each).unflatten(-1, (1, self.grid.rows, self.grid.columns)))
        return attended

    def maps(self, result: Any, space: Space = "output") -> Maps:
        """All that was seen, once the picture is drawn; errors as of `Gathering.values`."""
        gathered, canvas = self.gathered[space], (self.grid.columns * self.unit, self.grid.rows * self.unit)
        names = tuple(concept.name for concept in self.concepts)
        kind = f"concept attention, {space}"
        return Maps(kind, names, tuple(gathered.ran), gathered.blocks, (), gathered.values(), result, canvas, self.on)


def concept_maps(
    pipe: Pipeline,
    prompt: str,
    concepts: Sequence[str],
    *,
    space: Space = "output",
    pieces: Pieces = "one",
    on: int = 0,
    blocks: Sequence[str] | None = None,
    at_steps: Sequence[int] | None = None,
    **asked: Any,
) -> Maps:
    """Draw a picture, and see where concepts are in it. The picture is the same, bit for bit.

    Args:
        concepts: words or more, in the prompt or not. They see each other: a map depends a little on which others there
            are. `Maps.share` says which of them a place is most.
        space: what a map is made of, see `Space`.
        pieces: which tokens of a concept count, see `Pieces`.
        on: what the maps lie on: 0 the picture, 1 the first reference ...
        blocks: see `blocks_for`; concepts go through all up to the last of these. None for all in which text and
            picture meet; the paper takes double blocks only.
        at_steps: which steps count, from 0; None for all.
        asked: all else, as of `Pipeline.generate`, for one picture.

    Returns:
        (N concepts, S, K, 1, rows, columns); dot products, of any size and sign.

    Raises:
        InputError: there is no concept, it is empty, there twice or too long, there is no such block, step or
            reference, more than one picture is asked for, a step cache left out all of the blocks, or as of `generate`.
    """
    check_single(asked)
    prompt = one_prompt(prompt)
    reading = {"length": asked.get("t5_length"), "padding": asked.get("padding", "released")}
    watch = ConceptWatch(
        pipe, read(pipe, concepts, pieces, **reading), spaces=(space,), on=on, blocks=blocks, steps=at_steps
    )
    with observed(watch):
        result = pipe.generate(prompt, **asked)
    return watch.maps(result, space)
