"""What is asked for, without the shape in which it was: fields that both shapes share, and the record of a request."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from miniflux.apps.serve.refusals import UnfitError
from miniflux.conditions.again import NETWORKS
from miniflux.errors import CheckpointError, InputError, LoraError

NO_EFFECT: dict[str, str] = {
    "safety_tolerance": "nothing is moderated",
    "prompt_upsampling": "prompts are drawn as they are",
    "grounding": "nothing is looked up",
    "raw": "there is one way to draw",
    "interval": "it belongs to a model that is not published",
    "quality": "`num_inference_steps` decides how good a picture becomes",
    "style": "say it in the prompt",
    "moderation": "nothing is moderated",
    "user": "nothing is kept about users",
    "safety_identifier": "nothing is kept about users",
    "input_fidelity": "pictures are always looked at as closely as the model can",
}
"""Parameters of either shape that are taken and change nothing, and why. All others have an effect or are refused."""


class Strict(BaseModel):
    """Fields of a request: those that are not there are refused, and no value is bent into another kind."""

    model_config = ConfigDict(extra="forbid", strict=True)


class LoraAsked(Strict):
    """A LoRA of this request."""

    name: str = Field(min_length=1, max_length=200, description="A bundled one, or a file of the operator's folder.")
    strength: float = Field(1.0, ge=-100, le=100, allow_inf_nan=False)


class ConditionAsked(Strict):
    """What else than words steers the picture."""

    kind: str = Field(description=f"Reference, Control, {', '.join(NETWORKS)}.", max_length=40)
    image: str | None = Field(None, description="Base64, a data: URL or an http(s) URL.")
    network: str | None = Field(None, max_length=200, description="By name, for kinds that have one.")
    strength: float = Field(1.0, ge=-100, le=100, allow_inf_nan=False, description="`scale` of the condition.")
    start: float = Field(0.0, ge=0, le=1, description="The share of the steps after which it begins.")
    stop: float = Field(1.0, ge=0, le=1, description="The share of the steps after which it ends.")
    mode: str | int | None = Field(None, description="The kind of control, for a Union ControlNet.")


Given = str | bytes
"""A picture as it came: base64, a data: URL, a URL; or the bytes of a file."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request, whichever shape it had. Pictures stand beside the names of their parameters.

    Attributes:
        names: what the shape calls the fields of `settings.Request`.
        pictures: to look at, or the first one to change: that follows from the model, and from `mask` and `strength`.
        clear: whether the mask says by its transparency what is drawn anew (OpenAI's); else white says it (BFL's).
        control: a picture whose structure is kept; `edged`: whether edges or depth were made of it already.
        edges: thresholds for them.
        varied: pictures for Redux.
        previews: of each picture, while it is drawn.
        output: what the answer needs, beside the format.
        fetched: pictures by their addresses.
    """

    names: Mapping[str, str]
    model: str | None
    prompt: str
    negative: str | None = None
    cfg: float | None = None
    seed: int | None = None
    images: int = 1
    steps: int | None = None
    guidance: float | None = None
    width: int | None = None
    height: int | None = None
    ratio: str | None = None
    resolution: str | None = None
    pictures: Sequence[tuple[str, Given]] = ()
    mask: Given | None = None
    clear: bool = False
    strength: float | None = None
    control: tuple[str, Given] | None = None
    edged: bool = True
    edges: Mapping[str, float] = field(default_factory=dict[str, float])
    varied: Sequence[tuple[str, Given]] = ()
    loras: Sequence[LoraAsked] = ()
    conditions: Sequence[ConditionAsked] = ()
    format: str = "png"
    quality: int | None = None
    previews: int = 0
    output: Mapping[str, Any] = field(default_factory=dict[str, Any])
    once: str | None = None
    webhook: str | None = None
    webhook_secret: str | None = None
    fetched: Mapping[str, bytes] = field(default_factory=dict[str, bytes], repr=False)

    def given(self) -> Iterator[tuple[str, Given]]:
        """Every picture of it, and the name of its parameter."""
        yield from (*self.pictures, *self.varied)
        if self.mask is not None:
            yield "mask", self.mask
        if self.control is not None:
            yield self.control
        for i, one in enumerate(self.conditions):
            if one.image is not None:
                yield f"conditions.{i}.image", one.image


@contextmanager
def said(names: Mapping[str, str]) -> Generator[None]:
    """Errors of the library that begin with the name of one of its fields, as errors about the client's parameter."""
    try:
        yield
    except UnfitError:
        raise
    except InputError as error:
        field, _, rest = str(error).partition("\n")[0].partition(" ")
        if field not in names:
            raise
        raise UnfitError(names[field], f"{names[field]} {rest}") from error


@contextmanager
def at(param: str) -> Generator[None]:
    """Refusals of the library, as errors about a parameter."""
    try:
        yield
    except UnfitError:
        raise
    except (InputError, LoraError, CheckpointError) as error:
        raise UnfitError(param, str(error).partition("\n")[0]) from error
