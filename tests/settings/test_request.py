"""Requests: there and back through JSON, refused by name, and by the same checks as `generate`."""

from __future__ import annotations

import contextlib
import json
from dataclasses import fields, replace
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

import miniflux
from miniflux.errors import InputError, MinifluxError, SettingsError
from miniflux.pipeline import Pipeline
from miniflux.sampling import CACHES, GUIDES, SOLVERS, cache, guide
from miniflux.sampling.latents import MAX_SEED
from miniflux.sampling.schedules import SPACINGS
from miniflux.settings import AtLevels, ConditionUse, LoraUse, Request, strict
from miniflux.text import Padding
from miniflux.variants import variant

words = st.text(max_size=60).filter(lambda text: not any("\ud800" <= letter <= "\udfff" for letter in text))
scales = st.floats(-4, 4) | st.dictionaries(words, st.floats(-4, 4), min_size=1, max_size=3).map(
    lambda found: tuple(found.items())
)
loras = st.builds(
    LoraUse, words.filter(bool), scales, st.none() | st.text("0123456789abcdef", min_size=64, max_size=64)
)
guides = st.sampled_from(sorted(GUIDES)).flatmap(
    lambda name: st.builds(
        lambda scale, rescale: guide(name, scale=scale, rescale=rescale), st.floats(0, 9), st.floats(0, 1)
    )
)
caches = st.sampled_from(["first-block", "tea", "taylor"]).map(cache)
levels = st.lists(st.floats(0.01, 0.99), min_size=1, max_size=6, unique=True).map(
    lambda found: (1.0, *sorted(found, reverse=True), 0.0)
)


digests = st.text("0123456789abcdef", min_size=64, max_size=64)
steered = st.builds(
    ConditionUse,
    st.sampled_from(["ControlNet", "Redux"]),
    st.tuples(
        st.tuples(st.just("picture"), digests), st.tuples(st.just("scale"), st.floats(0, 2) | st.just((0.5, 1.0)))
    ),
    st.none() | words.filter(bool),
)


@st.composite
def requests(draw: st.DrawFn) -> Request:
    """Any request that nano-dev could be asked for."""
    chosen = draw(st.none() | guides)
    own = draw(st.none() | levels)
    return Request(
        prompt=draw(words),
        negative=draw(words) if chosen is not None and draw(st.booleans()) else None,
        loras=tuple(draw(st.lists(loras, max_size=3))),
        seed=draw(st.integers(0, MAX_SEED - 8)),
        images=draw(st.integers(1, 8)),
        steps=draw(st.none() | st.integers(1, 50)) if own is None else None,
        width=draw(st.none() | st.integers(16, 8192)),
        height=draw(st.none() | st.integers(16, 8192)),
        guidance=draw(
            st.none()
            | st.floats(0, 30)
            | st.builds(lambda x: AtLevels((1.0, 0.5), x), st.tuples(st.floats(0, 9), st.floats(0, 9)))
        ),
        guide=chosen,
        solver=draw(st.sampled_from([*SOLVERS, "ddim:0.25"])),
        schedule=draw(st.sampled_from(sorted(SPACINGS))) if own is None else own,
        shift=draw(st.none() | st.floats(0.1, 10)) if own is None else None,
        variation=draw(st.none() | st.tuples(st.integers(0, MAX_SEED - 8), st.floats(0, 1))),
        cache=draw(st.none() | caches),
        t5_length=draw(st.none() | st.integers(1, 512)),
        padding=draw(st.sampled_from(get_args(Padding))),
        dtype=draw(st.sampled_from([None, "float32", "bfloat16"])),
        conditions=tuple(draw(st.lists(steered, max_size=2))),
    )


@given(requests())
def test_there_and_back(request: Request) -> None:
    """Through JSON text and through a JSON object that any other program could have written."""
    assert Request.from_json(request.text()) == request
    assert Request.from_json(json.loads(json.dumps(request.as_json()))) == request


def test_every_field_is_read_and_written() -> None:
    """No field of the record is without a reader, and none of generate's arguments is lost on the way."""
    from miniflux.settings.request import READ

    names = {f.name for f in fields(Request)}
    assert set(READ) == names
    arguments = set(Pipeline.generate.__annotations__) - {"return"}
    watching = {"progress", "callback", "watch", "resume", "check_cache", "run", "wraps", "attend", "batch"}
    assert arguments - watching == names - {"model", "loras", "dtype"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", 5),
        ("prompt", ["a"]),
        ("negative", {"a": 1}),
        ("model", None),
        ("seed", "3"),
        ("seed", 1.5),
        ("seed", True),
        ("steps", "20"),
        ("steps", [1]),
        ("width", 64.0),
        ("guidance", "3"),
        ("guidance", 1e999),
        ("guidance", {"sigmas": [1.0], "values": []}),
        ("guidance", {"sigmas": [1.0], "numbers": [1.0]}),
        ("guide", "cfg"),
        ("guide", {"method": "cfg", "scale": "3"}),
        ("guide", {"method": "cfg", "power": 3}),
        ("guide", {"method": "telepathy"}),
        ("guide", {"scale": 3}),
        ("guide", {"method": "cfg", "window": [0.5]}),
        ("guide", {"method": "cfg", "window": 3}),
        ("guide", {"method": "skip-layer", "layers": [["x"]]}),
        ("cache", {"name": "tea", "threshold": [1]}),
        ("cache", {"name": "measure"}),
        ("cache", {"name": ["tea"]}),
        ("solver", 3),
        ("solver", "leapfrog"),
        ("schedule", 5),
        ("schedule", [1.0, "x", 0.0]),
        ("schedule", [0.5] * 5000),
        ("restart", [0.3, 0.6]),
        ("restart", {"low": 0.3}),
        ("variation", [1]),
        ("variation", ["1", 0.5]),
        ("loras", {"file": "x"}),
        ("loras", [{"file": "x", "scale": "1"}]),
        ("loras", [{"scale": 1}]),
        ("loras", [{"file": "x", "strength": 1}]),
        ("loras", [{"file": "x", "sha256": "abc"}]),
        ("loras", ["x"] * 100),
        ("images", 0),
        ("images", 10**9),
        ("t5_length", 0),
        ("padding", "odd"),
        ("dtype", "int3"),
        ("prompt", None),
        ("conditions", [{"kind": "Reference"}]),
        ("strength", 0.5),
        ("stop", 100000),
        ("sampler", "euler"),
    ],
)
def test_bad_fields_are_refused_by_name(field: str, value: Any) -> None:
    about = {"prompt": "a star", field: value}
    if value is None:
        about.pop("prompt")
        field = "prompt"
    with pytest.raises(InputError) as caught:
        Request.from_json(about)
    assert field in str(caught.value).replace(" ", "_") or field.rstrip("s") in str(caught.value).replace(
        "LoRA", "lora"
    )
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("[]", "must be an object"),
        ('{"prompt": "a"', "not JSON"),
        ('{"prompt": "a", "prompt": "b"}', "'prompt' is there twice"),
        ('{"prompt": "a", "guidance": NaN}', "NaN is no number"),
        ('{"prompt": "a", "guidance": Infinity}', "Infinity is no number"),
        ('{"prompt": "a", "seed": ' + "9" * 10_000 + "}", "not JSON|seed must be"),
        ("[" * 100_000, "nested deeper than 32 levels"),
        ('{"prompt":' * 1000 + "1" + "}" * 1000, "nested deeper|is there"),
        ('{"a":' * 40 + "1" + "}" * 40, "nested deeper than 32 levels"),
        ('{"prompt": "' + "x" * 3_000_000 + '"}', "bytes of JSON; at most"),
        (b'{"prompt": "\xff"}', "not JSON"),
        ('{"prompt": "\\ud800"}', "half a character"),
        ('{"prompt": "' + "x" * 131_073 + '"}', "131073 characters; at most 131072"),
    ],
)
def test_hostile_json_is_refused(text: str | bytes, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        Request.from_json(text)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
        lambda x: (
            st.lists(x, max_size=3)
            | st.dictionaries(st.sampled_from([f.name for f in fields(Request)]) | st.text(max_size=5), x, max_size=4)
        ),
        max_leaves=12,
    )
)
def test_any_json_is_a_request_or_refused(value: Any) -> None:
    """Whatever comes, there is no other exception."""
    with contextlib.suppress(MinifluxError):
        Request.from_json({"prompt": "a", **value} if isinstance(value, dict) else value)


def test_long_prompts_and_their_bound() -> None:
    """100,000 characters of any kind pass; what is over the bound is refused with the bound."""
    for prompt in ("x" * 100_000, "\U0001f600" * 100_000, "\x00\x1b[31m<script>" * 7000):
        assert Request.from_json(Request(prompt=prompt).text()).prompt == prompt
    longest = Request(
        prompt="\x00" * strict.MAX_PROMPT, negative="\x00" * strict.MAX_PROMPT, guide=guide("cfg", scale=2.0)
    )
    assert Request.from_json(longest.text()) == longest
    with pytest.raises(SettingsError, match="at most 131072"):
        Request(prompt="x" * (strict.MAX_PROMPT + 1))


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return miniflux.load("nano-schnell")


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 0},
        {"steps": 1001},
        {"width": 8},
        {"height": 9000},
        {"guidance": 3.0},
        {"solver": "leapfrog"},
        {"schedule": "sometimes"},
        {"schedule": (1.0, 0.5, 0.5, 0.0)},
        {"schedule": (1.0, 0.5, 0.0), "steps": 5},
        {"schedule": (1.0, 0.5, 0.0), "shift": 2.0},
        {"shift": -1.0},
        {"restart": (0.6, 0.3, 1)},
        {"seed": -1},
        {"seed": 2**64},
        {"images": 0},
        {"negative": "a star"},
        {"variation": (1, 2.0)},
        {"padding": "odd"},
        {"strength": 0.5},
        {"stop": 0},
    ],
)
def test_what_generate_refuses_is_refused_before(pipe: Pipeline, options: dict[str, Any]) -> None:
    """By the same error, without a model."""
    with pytest.raises(InputError) as before:
        Request(prompt="a star", model="nano-schnell", **options)
    with pytest.raises(InputError) as late:
        pipe.generate("a star", **options)
    if "stop" not in options and "variation" not in options:
        assert str(before.value).split(":")[0][:30] == str(late.value).split(":")[0][:30]


def test_single_pictures_of_a_request() -> None:
    request = Request(prompt="a star", seed=4, images=3, variation=(7, 0.5))
    assert request.single(2) == replace(request, images=1, seed=6, variation=(9, 0.5))
    assert request.steps_in_all(variant("nano")) == 60 and request.size(variant("nano")) == (128, 128)


def test_caches_all_have_a_form_as_json() -> None:
    assert set(CACHES) == {"first-block", "tea", "mag", "taylor", "measure"}
    request = Request(prompt="a", cache=cache("mag", ratios=variant("nano").mag_ratios))
    assert Request.from_json(request.text()) == request


def test_a_strength_at_levels() -> None:
    strength = AtLevels((1.0, 0.5), (3.0, 2.0))
    assert strength(0.5) == 2.0
    with pytest.raises(InputError, match="noise level 0.7 is not known"):
        strength(0.7)
    with pytest.raises(InputError, match="lists"):
        Request(prompt="a", schedule=[1.0, 0.0])  # type: ignore[arg-type]
    skipping = (
        Request(prompt="a", guide=guide("skip-layer", layers=kind(["double_blocks.0"]))) for kind in (list, tuple)
    )
    assert next(skipping) == next(skipping)
