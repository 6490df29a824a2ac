"""What was counted of a model, and how it is shown: a table."""

from __future__ import annotations

from dataclasses import dataclass

from miniflux.errors import InputError

PREFIXES = ("", "k", "M", "G", "T", "P", "E")


@dataclass(frozen=True)
class Line:
    """One kind of module in a network, and what all of that kind cost together.

    Attributes:
        kind: its place in the network; blocks by the name of their list.
        number: how many there are.
        parameters, bytes: of their weights.
        flops: operations of one call of the network.
        activations: bytes at the worst moment of one of them, with all that its caller holds meanwhile; None where they
            are not called by themselves.
    """

    kind: str
    number: int
    parameters: int
    bytes: int
    flops: int
    activations: int | None


@dataclass(frozen=True)
class NetworkCounts:
    """One network of a model.

    Attributes:
        part: transformer, autoencoder, clip, t5 or lm.
        does: what one call of it is, in words.
        calls: of it for a picture.
        lines: by kind, in the order of its modules.
        activations: bytes at the worst moment of a call.
    """

    part: str
    does: str
    calls: int
    lines: tuple[Line, ...]
    activations: int

    @property
    def parameters(self) -> int:
        return sum(line.parameters for line in self.lines)

    @property
    def bytes(self) -> int:
        return sum(line.bytes for line in self.lines)

    @property
    def flops(self) -> int:
        """Operations of one call."""
        return sum(line.flops for line in self.lines)


@dataclass(frozen=True)
class Counts:
    """What a picture of a model costs. `str()` is a table.

    Attributes:
        model: its name.
        width, height: of the picture, in pixels.
        image_tokens, text_tokens, reference_tokens: that the transformer works on.
        steps: of the picture.
        rows: texts that the transformer is called with in every step: two with classifier-free guidance.
        stored: what the weights are stored in.
        networks: in the order in which they work.
    """

    model: str
    width: int
    height: int
    image_tokens: int
    text_tokens: int
    reference_tokens: int
    steps: int
    rows: int
    stored: str
    networks: tuple[NetworkCounts, ...]

    @property
    def parameters(self) -> int:
        return sum(one.parameters for one in self.networks)

    @property
    def bytes(self) -> int:
        """Of all weights."""
        return sum(one.bytes for one in self.networks)

    @property
    def flops(self) -> int:
        """Operations of a picture."""
        return sum(one.calls * one.flops for one in self.networks)

    @property
    def step_flops(self) -> int:
        """Operations of a step."""
        transformer = self.of("transformer")
        return self.rows * transformer.flops

    @property
    def activations(self) -> int:
        """Bytes at the worst moment of a picture, beside the weights."""
        return max(one.activations for one in self.networks)

    def of(self, part: str) -> NetworkCounts:
        """One of the networks.

        Raises:
            InputError: the model has no such part.
        """
        found = next((one for one in self.networks if one.part == part), None)
        if found is None:
            parts = ", ".join(one.part for one in self.networks)
            raise InputError(f"{self.model} has no part {part!r}; its parts are {parts}")
        return found

    def __str__(self) -> str:
        seen = f", {self.reference_tokens} of references" if self.reference_tokens else ""
        lines = [
            f"{self.model}: {self.width}x{self.height}, {self.image_tokens} tokens of the picture, {self.text_tokens} "
            f"of the text{seen}; {self.steps} steps; {self.stored}",
            "",
            f"{'':34} {'number':>6} {'parameters':>15} {'weights':>9} {'FLOP':>9} {'activations':>11}",
        ]
        for one in self.networks:
            lines += [f"{one.part}: {one.does}"]
            lines += [_row(f"  {x.kind}", x.number, x.parameters, x.bytes, x.flops, x.activations) for x in one.lines]
            lines += [_row("  one call", None, one.parameters, one.bytes, one.flops, one.activations), ""]
        calls = ", ".join(f"{one.calls} x {one.part}" for one in self.networks)
        lines += [
            _row("a step", None, None, None, self.step_flops, self.of("transformer").activations),
            _row("a picture", None, self.parameters, self.bytes, self.flops, self.activations),
            f"  ({calls})",
        ]
        return "\n".join(lines)


def _row(
    what: str, number: int | None, parameters: int | None, size: int | None, flops: int, activations: int | None
) -> str:
    of = "" if number is None else str(number)
    count = "" if parameters is None else f"{parameters:,}"
    weights, most = ("" if x is None else with_prefix(x, "B") for x in (size, activations))
    return f"{what:<34} {of:>6} {count:>15} {weights:>9} {with_prefix(flops, ''):>9} {most:>11}"


def with_prefix(number: int, unit: str) -> str:
    """A number of four digits with a prefix of powers of 1000: 74.31 T; a zero is a dash."""
    if not number:
        return "-"
    power = min(max(0, (len(str(number)) - 1) // 3), len(PREFIXES) - 1)
    value = number / 1000**power
    digits = 0 if power == 0 else 2 if value < 100 else 1
    return f"{value:.{digits}f} {PREFIXES[power]}{unit}".rstrip()
