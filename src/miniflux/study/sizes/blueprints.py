"""A drawing of a transformer's architecture, made from its modules: streams, blocks, what is shared, and where the
parameters are.

    study.blueprint("flux1-dev", "flux1-dev.svg")

Everything in it is read from the network on the meta device: which embedders there are, how many blocks of which kind,
their widths, which modulations are shared. Nothing is drawn that has no module.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape, quoteattr

from torch import nn

from miniflux.checkpoints.loading import bare
from miniflux.checkpoints.networks import BY_CONFIG, BY_KIND
from miniflux.disk import write_beside
from miniflux.models.layers import MLPEmbedder
from miniflux.pipeline import Pipeline
from miniflux.result import checked_output
from miniflux.study.sizes.counting import kind_of
from miniflux.study.sizes.counts import with_prefix
from miniflux.variants import Variant
from miniflux.variants import variant as find_variant

STYLE = """
svg { --paper: #ffffff; --ink: #1c2430; --soft: #5b6675; --line: #9aa5b4; --text: #2f6fb5; --image: #b4552d;
  --cond: #7a4fa3; --block: #eef2f7; --last: #3d7f4f; }
@media (prefers-color-scheme: dark) { svg { --paper: #12161c; --ink: #e6ebf2; --soft: #9eabbb; --line: #5d6a7b;
  --text: #78b1ee; --image: #eb9a6d; --cond: #bd9be4; --block: #1e2631; --last: #85c898; } }
text { font: 12px system-ui, sans-serif; fill: var(--ink); }
.title { font-weight: 600; } .head { font-size: 18px; font-weight: 600; } .small { font-size: 11px; fill: var(--soft); }
.paper { fill: var(--paper); } .box { fill: var(--block); stroke: var(--line); }
.text { stroke: var(--text); fill: none; } .image { stroke: var(--image); fill: none; }
.cond { stroke: var(--cond); fill: none; } .last { stroke: var(--last); fill: none; }
.wire { stroke-width: 2.5; } .frame { stroke-width: 1.5; }
.bar.text { fill: var(--text); stroke: none; } .bar.image { fill: var(--image); stroke: none; }
.bar.cond { fill: var(--cond); stroke: none; } .bar.last { fill: var(--last); stroke: none; }
"""
WIDTH, MARGIN, LANE, TOP = 1200, 24, 92, 222  # pixels; the last: where the first lane begins
IN, EMBED, EARLY, JOINT, LAST = 24, 160, 328, 618, 916  # where columns begin
NARROW, WIDE = 148, 270  # of boxes
NAMES = {"text": "text tokens", "image": "image tokens", "references": "reference tokens"}
VECTORS = {"time_in": "time", "ref_time_in": "time aimed at", "guidance_in": "guidance", "vector_in": "pooled text"}


@dataclass(frozen=True)
class Lane:
    """A stream of tokens.

    Attributes:
        name: of `NAMES`.
        embedder: the module that lifts it to the hidden size.
        blocks: the list of blocks that it goes through alone; empty if there is none.
    """

    name: str
    embedder: str
    blocks: str = ""

    @property
    def colour(self) -> str:
        return "text" if self.name == "text" else "image"


def lanes_of(network: nn.Module) -> tuple[Lane, ...]:
    """The streams of a transformer: where each has blocks of its own, or where they meet in double blocks."""
    if not hasattr(network, "double_blocks"):
        return (
            Lane("text", "txt_in", "txt_mode_blocks"),
            Lane("image", "emb_in.image", "content_mode_blocks.image"),
            Lane("references", "emb_in.image_cond", "content_mode_blocks.image_cond"),
        )
    return Lane("text", "txt_in"), Lane("image", "img_in")


class _Paper:
    """Elements of the drawing, in the order in which they are painted."""

    def __init__(self) -> None:
        self.parts: list[str] = []

    def add(self, tag: str, text: str = "", **attributes: Any) -> None:
        told = "".join(f" {name.strip('_').replace('_', '-')}={quoteattr(str(x))}" for name, x in attributes.items())
        self.parts.append(f"<{tag}{told}>{escape(text)}</{tag}>" if text else f"<{tag}{told}/>")

    def text(self, x: float, y: float, text: str, kind: str = "", **more: Any) -> None:
        self.add("text", text, x=x, y=y, **({"class": kind} if kind else {}), **more)

    def box(
        self, x: float, y: float, width: float, height: float, colour: str, lines: Sequence[str], **more: Any
    ) -> None:
        """A frame with a title and lines below it; `more`: what it is of, for programs."""
        self.add("rect", x=x, y=y, width=width, height=height, rx=6, **{"class": "box"})
        self.add("rect", x=x, y=y, width=width, height=height, rx=6, **{"class": f"{colour} frame"}, **more)
        for i, line in enumerate(lines):
            self.text(x + 10, y + 18 + 15 * i, line, "title" if i == 0 else "small")

    def wire(self, colour: str, *points: tuple[float, float]) -> None:
        way = " ".join(f"{x:g},{y:g}" for x, y in points)
        self.add("polyline", points=way, marker_end=f"url(#{colour})", **{"class": f"{colour} wire"})


def drawing(network: Any, name: str) -> str:
    """The drawing as the text of an SVG file; of a transformer on any device, under a name for people."""
    return _Drawing(network, name).svg()


class _Drawing:
    """One drawing: what is in the network, and where it goes."""

    def __init__(self, network: Any, name: str) -> None:
        self.network, self.name, self.paper, self.lanes = network, name, _Paper(), lanes_of(network)
        self.sizes = {key: parameter.numel() for key, parameter in network.named_parameters()}
        self.total = sum(self.sizes.values())
        self.bottom = TOP + LANE * len(self.lanes)

    def count(self, *parts: str) -> int:
        """Parameters of modules."""
        return sum(n for key, n in self.sizes.items() if any(key.startswith(f"{part}.") for part in parts))

    def told(self, *parts: str) -> str:
        return f"{with_prefix(self.count(*parts), '')}, {100 * self.count(*parts) / self.total:.1f} %"

    def box(self, x: float, y: float, size: tuple[float, float], colour: str, lines: list[str], *parts: str) -> None:
        """A box of these modules."""
        told = {"data_of": " ".join(parts), "data_parameters": self.count(*parts)}
        self.paper.box(x, y, *size, colour, [*lines, self.told(*parts)], **told)

    def svg(self) -> str:
        """All of it."""
        config, paper = self.network.config, self.paper
        heads, width = config.num_heads, config.hidden_size
        paper.text(MARGIN, 34, f"{self.name}: {BY_KIND[type(self.network)].title}", "head")
        about = f"{self.total:,} parameters; hidden size {width:,}, {heads} heads of {width // heads}"
        axes = f"rotary axes {', '.join(map(str, config.axes_dim))}, theta {config.theta:,}"
        paper.text(MARGIN, 54, f"{about}; {axes}", "small", data_of="", data_parameters=self.total)
        self.conditioning()
        self.streams()
        self.shares()
        height = self.bottom + 88
        markers = "".join(
            f'<marker id="{colour}" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="5" markerHeight="5" orient="auto">'
            f'<path d="M0,0 L8,4 L0,8 z" class="bar {colour}"/></marker>'
            for colour in ("text", "image", "cond")
        )
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
                f'height="{height}" role="img" aria-label={quoteattr(f"Architecture of {self.name}")}>',
                f"<style>{STYLE}</style><defs>{markers}</defs>",
                f'<rect class="paper" width="{WIDTH}" height="{height}"/>',
                *paper.parts,
                "</svg>\n",
            ]
        )

    def conditioning(self) -> None:
        """The vector that all modulations see, and the modulations that blocks share."""
        children = list(self.network.named_children())
        x = IN
        for key, one in children:
            if isinstance(one, MLPEmbedder):
                self.box(x, 78, (NARROW, 56), "cond", [key, f"{VECTORS[key]}: {one.in_layer.in_features}"], key)
                x += NARROW + 12
        last = LAST + NARROW / 2, TOP + LANE - 14
        self.paper.wire("cond", (x - 12, 106), (last[0], 106), last)
        for place, begin in ((EARLY, "early" if self.lanes[0].blocks else "double"), (JOINT, "single")):
            middle = place + WIDE / 2
            shared = [key for key, _ in children if key.startswith(begin) and "modulation" in key]
            begins = 134 if middle < x - 12 else 106  # below the embedders, or where the wire goes on
            self.paper.wire("cond", (middle, begins), (middle, 137 if shared else TOP - 4))
            if shared:
                many = len(shared) > 1 or isinstance(self.network.get_submodule(shared[0]), nn.ModuleDict)
                what = "one for each stream, shared by blocks" if many else "shared by all blocks"
                title = shared[0].removesuffix("_img")
                self.box(place, 140, (WIDE, 58), "cond", [title, what], *shared)
                self.paper.wire("cond", (middle, 198), (middle, TOP - 4))

    def streams(self) -> None:
        """From tokens to the velocity."""
        config, paper, tall = self.network.config, self.paper, self.bottom - TOP - 16
        width, out = config.hidden_size, config.out_channels
        for i, lane in enumerate(self.lanes):
            y, channels = TOP + LANE * i + 38, self.network.get_submodule(lane.embedder).in_features
            paper.text(IN, y - 4, NAMES[lane.name], "title")
            paper.text(IN, y + 12, f"{channels:,} channels", "small")
            paper.wire(lane.colour, (IN + 116, y), (EMBED - 3, y))
            lines = [lane.embedder, f"{channels:,} \u2192 {width:,}"]
            self.box(EMBED, y - 30, (NARROW, 56), lane.colour, lines, lane.embedder)
            paper.wire(lane.colour, (EMBED + NARROW, y), (EARLY - 3, y))
            if lane.blocks:
                number = len(self.network.get_submodule(lane.blocks))
                lines = [f"{number} \u00d7 {lane.blocks}", "this stream alone"]
                self.box(EARLY, y - 30, (WIDE, 56), lane.colour, lines, lane.blocks)
            paper.wire(lane.colour, (EARLY + WIDE, y), (JOINT - 3, y))
        if not self.lanes[0].blocks:
            self.box(EARLY, TOP, (WIDE, tall), "last", _double_lines(self.network), "double_blocks")
        self.box(JOINT, TOP, (WIDE, tall), "last", _single_lines(self.network), "single_blocks")
        y = TOP + LANE + 38
        paper.wire("image", (JOINT + WIDE, y), (LAST - 3, y))
        lines = ["final_layer", "norm, shift and scale,", f"{width:,} \u2192 {out:,}"]
        self.box(LAST, y - 44, (NARROW, 84), "image", lines, "final_layer")
        paper.wire("image", (LAST + NARROW, y), (LAST + NARROW + 32, y))
        paper.text(LAST + NARROW + 40, y - 4, "velocity", "title")
        paper.text(LAST + NARROW + 40, y + 12, f"{out:,} channels", "small")

    def shares(self) -> None:
        """Where the parameters are: a bar for each kind of module, as long as its share."""
        x, y = float(MARGIN), self.bottom + 34
        self.paper.text(MARGIN, y - 8, "where the parameters are", "small")
        for kind in dict.fromkeys(kind_of(self.network, key) for key in self.sizes):
            part = self.count(kind) / self.total
            length = (WIDTH - 2 * MARGIN) * part
            self.paper.add(
                "rect",
                x=round(x, 2),
                y=y,
                width=round(max(length - 1, 0.3), 2),
                height=18,
                **{"class": f"bar {_colour(kind)}"},
                data_share=kind,
                data_parameters=self.count(kind),
            )
            if part > 0.1:
                self.paper.text(round(x, 2), y + 33, f"{kind} {100 * part:.1f} %", "small")
            x += length


def _colour(kind: str) -> str:
    """Of a kind of module: that of what it works on."""
    if kind in VECTORS or "modulation" in kind:
        return "cond"
    return "text" if kind.startswith("txt") else "last" if kind in ("double_blocks", "single_blocks") else "image"


def _double_lines(network: Any) -> list[str]:
    """What is in a double block."""
    block = network.double_blocks[0]
    own = "modulation, " if hasattr(block, "img_mod") else ""
    return [
        f"{len(network.double_blocks)} \u00d7 double_blocks",
        f"of each stream: {own}q, k, v, norms,",
        f"MLP of {block.img_mlp[2].in_features:,} ({type(block.img_mlp[1]).__name__})",
        "one attention over text and picture",
    ]


def _single_lines(network: Any) -> list[str]:
    """What is in a single block."""
    block = network.single_blocks[0]
    joined = hasattr(block, "linear2")  # attention and MLP share their linears
    mlp = block.linear2.in_features - network.config.hidden_size if joined else block.mlp_out.in_features
    return [
        f"{len(network.single_blocks)} \u00d7 single_blocks",
        "all tokens are one sequence; side by side",
        f"attention and MLP of {mlp:,} ({type(block.mlp_act).__name__})",
        f"{'two' if joined else 'six'} linears{', own modulation' if hasattr(block, 'modulation') else ''}",
    ]


def blueprint(model: str | Variant | Pipeline | nn.Module, path: str | Path | None = None) -> str:
    """The architecture of a transformer as the text of an SVG file, which is readable on light and on dark pages.

    Args:
        model: a name of `miniflux.variants.names()`, a variant, a pipeline, or a transformer of ours.
        path: where it is written to as well.

    Raises:
        InputError: an unknown model.
        OutputError: the place cannot be written to.
    """
    place = None if path is None else checked_output(path, (".svg",))
    if isinstance(model, nn.Module):
        network, name = model, type(model).__name__
    elif isinstance(model, Pipeline):
        network, name = model.transformer, model.variant.name
    else:
        chosen = find_variant(model) if isinstance(model, str) else model
        network, name = bare(BY_CONFIG[type(chosen.transformer)].kind, chosen.transformer), chosen.name
    made = drawing(bare(BY_KIND[type(network)].kind, network.config), name)
    if place is not None:
        write_beside(place, lambda beside: beside.write_text(made, "utf-8"))
    return made
