"""ConceptAttention: against the formula of the paper, computed here with plain torch from the weights alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import miniflux
from miniflux import study
from miniflux.conditions import Reference
from miniflux.errors import InputError
from miniflux.models.flux1 import RunBlock
from miniflux.pipeline import Pipeline
from miniflux.sampling import Told, cache
from miniflux.sampling.observing import Call, observed
from miniflux.study.mapping.concepts import ConceptWatch, concept_maps, read
from tests.study.test_maps import picture

PROMPT, CONCEPTS = "a red circle", ["circle", "sky blue"]
SMALL: dict[str, Any] = {"width": 64, "height": 48, "seed": 1, "steps": 1}


class Calls:
    """Keeps what the network is told."""

    alters = None

    def __init__(self) -> None:
        self.told: list[Told] = []

    def began(self, pictures: Sequence[int]) -> None: ...

    def calling(self, call: Call) -> None:
        self.told.append(call.told)

    def wrap(self, run: RunBlock) -> RunBlock:
        return run


class Formula:
    """FLUX.1 and FLUX.2 with a third stream for concepts, written down once more, in float64."""

    def __init__(self, pipe: Pipeline) -> None:
        config: Any = pipe.transformer.config
        self.w = {key: tensor.double() for key, tensor in pipe.transformer.state_dict().items()}
        self.first = "vector_in.in_layer.weight" in self.w  # FLUX.1
        self.heads, self.axes, self.theta = config.num_heads, config.axes_dim, config.theta
        self.depths = config.depth, config.depth_single_blocks

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))

    def embedded(self, name: str, x: Tensor) -> Tensor:
        return self.linear(f"{name}.out_layer", F.silu(self.linear(f"{name}.in_layer", x)))

    def waves(self, t: Tensor) -> Tensor:
        """Of angles in float32, as in the releases: an angle of 1000 is 6e-5 off there."""
        angles = 1000 * t.float()[:, None] * torch.exp(-math.log(10_000) * torch.arange(128).float() / 128)
        return torch.cat((angles.cos(), angles.sin()), dim=1).double()

    def turned(self, x: Tensor, ids: Tensor) -> Tensor:
        """Rotary positions: each pair of channels of x (H, L, D) by its angle."""
        angles = [
            ids[:, i : i + 1].double() * self.theta ** -(torch.arange(0, dim, 2).double() / dim)
            for i, dim in enumerate(self.axes)
        ]
        angle = torch.cat(angles, dim=1)
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack((a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()), dim=-1).flatten(-2)

    def normed(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return (1 + scale) * F.layer_norm(x, x.shape[-1:], eps=1e-6) + shift

    def split(self, qkv: Tensor, norm: str) -> tuple[Tensor, Tensor, Tensor]:
        """(L, 3 * hidden) -> q, k, v, each (H, L, D)."""
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(1, 2, 0, 3)

        def rms(x: Tensor, scale: Tensor) -> Tensor:
            return x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() * scale

        scales = (self.w[f"{norm}.{which}_norm.scale"] for which in ("query", "key"))
        return rms(q, next(scales)), rms(k, next(scales)), v

    def attention(self, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
        q, k = self.turned(q, ids), self.turned(k, ids)
        weights = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).softmax(dim=-1)
        return (weights @ v).transpose(0, 1).flatten(1)

    def active(self, x: Tensor) -> Tensor:
        if self.first:
            return F.gelu(x, approximate="tanh")
        a, b = x.chunk(2, dim=-1)
        return F.silu(a) * b

    def vector(self, told: Told, pooled: Tensor | None) -> Tensor:
        vec = self.embedded("time_in", self.waves(told.timesteps))
        if "guidance_in.in_layer.weight" in self.w:
            vec = vec + self.embedded("guidance_in", self.waves(cast(Tensor, told.guidance)))
        return vec if pooled is None else vec + self.embedded("vector_in", pooled.double())

    def maps(self, told: Told, concepts: Tensor, concept_ids: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """By block: dot products of outputs, and of queries and keys (concepts, L)."""
        txt, img = self.linear("txt_in", told.words.txt[0].double()), self.linear("img_in", told.img[0].double())
        con = self.linear("txt_in", concepts.double())
        vec = self.vector(told, told.words.vec)
        con_vec = self.vector(told, None if told.words.vec is None else torch.zeros_like(told.words.vec))
        T, C, L, hidden = len(txt), len(con), len(img), txt.shape[1]
        ids, con_ids = torch.cat((told.words.txt_ids[0], told.img_ids[0])), torch.cat((concept_ids, told.img_ids[0]))
        found: dict[str, tuple[Tensor, Tensor]] = {}

        def seen(name: str, out: Tensor, img_out: Tensor, q: Tensor, k: Tensor) -> None:
            dots = (q[:, :C] @ k[:, -L:].transpose(1, 2)).mean(dim=0) / math.sqrt(q.shape[-1])
            found[name] = out[:C] @ img_out.T, dots

        for i in range(self.depths[0]):
            name = f"double_blocks.{i}"
            streams = {"img": (img, vec), "txt": (txt, vec), "con": (con, con_vec)}
            mods, qkv = {}, {}
            for stream, (x, v) in streams.items():
                weights = "img" if stream == "img" else "txt"
                lin = f"{name}.{weights}_mod.lin" if self.first else f"double_stream_modulation_{weights}.lin"
                mods[stream] = self.linear(lin, F.silu(v))[0].chunk(6)
                attn = f"{name}.{weights}_attn"
                qkv[stream] = self.split(self.linear(f"{attn}.qkv", self.normed(x, *mods[stream][:2])), f"{attn}.norm")
            both = [torch.cat((a, b), dim=1) for a, b in zip(qkv["txt"], qkv["img"], strict=True)]
            beside = [torch.cat((a, b), dim=1) for a, b in zip(qkv["con"], qkv["img"], strict=True)]
            attn, con_attn = self.attention(*both, ids), self.attention(*beside, con_ids)  # type: ignore[misc]
            seen(name, con_attn, attn[T:], beside[0], beside[1])
            outs = {"img": attn[T:], "txt": attn[:T], "con": con_attn[:C]}
            new = {}
            for stream, (x, _) in streams.items():
                weights = f"{name}.{'img' if stream == 'img' else 'txt'}"
                _, _, gate1, shift2, scale2, gate2 = mods[stream]
                x = x + gate1 * self.linear(f"{weights}_attn.proj", outs[stream])
                inner = self.active(self.linear(f"{weights}_mlp.0", self.normed(x, shift2, scale2)))
                new[stream] = x + gate2 * self.linear(f"{weights}_mlp.2", inner)
            img, txt, con = new["img"], new["txt"], new["con"]

        x = torch.cat((txt, img))
        for i in range(self.depths[1]):
            name = f"single_blocks.{i}"
            parts = {}
            for stream, (y, v) in {"x": (x, vec), "con": (con, con_vec)}.items():
                lin = f"{name}.modulation.lin" if self.first else "single_stream_modulation.lin"
                shift, scale, gate = self.linear(lin, F.silu(v))[0].chunk(3)
                both_parts = self.linear(f"{name}.linear1", self.normed(y, shift, scale))
                parts[stream] = (
                    self.split(both_parts[:, : 3 * hidden], f"{name}.norm"),
                    both_parts[:, 3 * hidden :],
                    gate,
                )
            (qkv_x, mlp_x, gate_x), (qkv_c, mlp_c, gate_c) = parts["x"], parts["con"]
            beside = [torch.cat((a, b[:, T:]), dim=1) for a, b in zip(qkv_c, qkv_x, strict=True)]
            attn, con_attn = self.attention(*qkv_x, ids), self.attention(*beside, con_ids)  # type: ignore[misc]
            seen(name, con_attn, attn[T:], beside[0], beside[1])
            x = x + gate_x * self.linear(f"{name}.linear2", torch.cat((attn, self.active(mlp_x)), dim=1))
            con = con + gate_c * self.linear(f"{name}.linear2", torch.cat((con_attn[:C], self.active(mlp_c)), dim=1))
        return found


@pytest.mark.parametrize("name", ["flux1-dev", "flux1-schnell", "flux2-dev", "flux2-klein-4b"])
@pytest.mark.parametrize("space", ["output", "query_key"])
def test_maps_are_the_paper_s(name: str, space: Any) -> None:
    """All blocks, double and single, of two steps; the picture is the same, bit for bit."""
    pipe, calls = miniflux.tiny(name), Calls()
    pipe.transformer.double()  # or its own rounding would be ten times what is looked for
    asked = {**SMALL, "steps": 2}
    plain = pipe.generate(PROMPT, **asked)
    with observed(calls):
        maps = concept_maps(pipe, PROMPT, CONCEPTS, space=space, **asked)
    assert torch.equal(plain.latents, maps.result.latents) and plain.images[0].tobytes() == maps.image.tobytes()
    assert "wrapped" not in maps.result.settings[0] and "changed" not in maps.result.settings[0]
    texts = [pipe.text.encode([concept]).txt[0] for concept in CONCEPTS]
    window = len(texts[0])
    if name.startswith("flux1"):  # the first token, at no place
        places, ids = [0, 0], torch.zeros(2, 3)
    else:
        tokenizer, left = pipe.text.tokenizers["lm_tokenizer"], name == "flux2-dev"
        ends = [window if left else len(tokenizer.tokens(concept)) for concept in CONCEPTS]
        places = [end - 1 - _after(tokenizer) for end in ends]
        ids = torch.tensor([[0.0, 0.0, 0.0, place] for place in places])
        if left:
            assert places == [window - 2, window - 2]  # 510 of 512, in the release of the paper
    concepts = torch.stack([text[place] for text, place in zip(texts, places, strict=True)])
    for step, told in enumerate(calls.told):
        wanted = Formula(pipe).maps(told, concepts, ids)
        assert tuple(wanted) == maps.blocks
        for block, both in wanted.items():
            found = torch.from_numpy(maps.values[:, step, maps.blocks.index(block), 0]).flatten(1).double()
            one = both[0 if space == "output" else 1]
            torch.testing.assert_close(found, one, rtol=1e-5, atol=1e-5 * float(one.abs().max()))
    mean = maps.values[0].mean(axis=(0, 1, 2))
    np.testing.assert_allclose(maps["circle"], mean, rtol=1e-5, atol=1e-5 * np.abs(mean).max())


def _after(tokenizer: Any) -> int:
    """Tokens behind a prompt: what two that end differently have in common at their ends."""
    one, two = tokenizer.tokens("ab")[::-1], tokenizer.tokens("cd")[::-1]
    return next(i for i, (a, b) in enumerate(zip(one, two, strict=True)) if a != b)


def test_flux3_reads_a_concept_as_a_prompt_of_its_own() -> None:
    """A concept that is the prompt has the queries of the prompt's last word where text and picture meet first."""
    pipe = miniflux.tiny("flux3-klein")
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    class Joint(Calls):
        def wrap(self, run: RunBlock) -> RunBlock:
            def block(name: str, one: Any, streams: tuple[Tensor, ...], context: tuple[Any, ...]) -> tuple[Tensor, ...]:
                def attend(q: Tensor, k: Tensor, *more: Any) -> Tensor:
                    seen[name] = q[0].double(), k[0].double()
                    return context[-1](q, k, *more)

                return run(name, one, streams, (*context[:-1], attend))

            return block

    joint = Joint()
    plain = pipe.generate(PROMPT, **SMALL)
    with observed(joint):
        maps = concept_maps(pipe, PROMPT, [PROMPT, "sky"], space="query_key", **SMALL)
    assert torch.equal(plain.latents, maps.result.latents)
    assert maps.blocks == tuple(name for name in pipe.transformer.config.blocks if name.startswith("single"))
    tokenizer = pipe.text.tokenizers["lm_tokenizer"]
    q, k = seen["single_blocks.0"]
    place, text = len(tokenizer.tokens(PROMPT)) - 1 - _after(tokenizer), joint.told[0].words.txt.shape[1]
    wanted = (q[:, place : place + 1] @ k[:, text:].transpose(1, 2)).mean(dim=0) / q.shape[-1] ** 0.5
    found = torch.from_numpy(maps.values[0, 0, 0, 0]).flatten()[None].double()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["nano", "nano2", "nano3", "nano-kontext"])
def test_concepts_change_no_picture(name: str) -> None:
    """Bit for bit, also beside guidance by another text and from weights that come and go."""
    more: dict[str, Any] = {"conditions": [Reference(picture((64, 64)))]} if name == "nano-kontext" else {}
    more |= {"guide": "cfg", "negative": "a star"} if name == "nano2" else {}
    asked = {**SMALL, "steps": 2, **more}
    for memory in ("auto", "stream"):
        pipe = miniflux.load(name, memory=memory)
        plain = pipe.generate(PROMPT, **asked)
        maps = concept_maps(pipe, PROMPT, CONCEPTS, **asked)
        assert torch.equal(plain.latents, maps.result.latents) and plain.images[0].tobytes() == maps.image.tobytes()
        assert np.isfinite(maps.values).all()


def test_concepts_on_a_reference_and_all_of_their_tokens() -> None:
    pipe = miniflux.tiny("flux2-klein-4b")
    asked = {**SMALL, "conditions": [Reference(picture((64, 80)), once=False)]}
    maps = concept_maps(pipe, PROMPT, CONCEPTS, on=1, pieces="all", **asked)
    assert maps.on == 1 and maps.values.shape[-2:] == (5, 4) and maps.canvas == (64, 80)
    counts = [len(concept.places) for concept in read(pipe, CONCEPTS, "all")]
    assert counts == [len("circle"), len("sky blue")]  # it reads bytes
    once = {**SMALL, "conditions": [Reference(picture((64, 80)), once=True)]}
    assert np.isfinite(concept_maps(pipe, PROMPT, CONCEPTS, **once).values).all()


def test_blocks_that_a_cache_leaves_out() -> None:
    """Behind a block that was left out nothing is known of concepts; the steps that were whole are as without."""
    pipe = miniflux.load("nano")
    asked = {**SMALL, "steps": 5, "cache": cache("taylor", interval=4, warmup=1)}
    maps = concept_maps(pipe, PROMPT, CONCEPTS, **asked)
    gone = [bool(np.isnan(maps.values[:, i, -1]).all()) for i in range(5)]
    assert gone == [False, True, True, True, False]
    plain = concept_maps(pipe, PROMPT, CONCEPTS, **{**asked, "cache": None, "at_steps": [0]})
    np.testing.assert_array_equal(maps.values[:, :1], plain.values)
    with pytest.raises(InputError, match="left all of these blocks out"):
        concept_maps(pipe, PROMPT, CONCEPTS, blocks=["single_blocks"], at_steps=[2, 3], **asked)


@pytest.mark.parametrize(
    ("concepts", "more", "said"),
    [
        ([], {}, "concepts is empty"),
        ([""], {}, "not empty"),
        (["a", "a"], {}, "twice"),
        ("circle", {}, "must be a list"),
        (["a"], {"space": "values"}, "space must be one of output, query_key"),
        (["a"], {"pieces": "some"}, "pieces must be one of one, all"),
        (["a"], {"blocks": ["double_blocks.7"]}, "no block"),
        (["a"], {"at_steps": [1]}, "step 1 was asked for"),
        (["a"], {"on": 2}, "no reference 2"),
        (["a"], {"images": 3}, "images=3"),
    ],
)
def test_what_is_refused(concepts: Any, more: dict[str, Any], said: str) -> None:
    pipe = miniflux.tiny("flux1-schnell")
    with pytest.raises(InputError, match=said):
        concept_maps(pipe, PROMPT, concepts, **{**SMALL, **more})


def test_concepts_that_are_too_long() -> None:
    pipe = miniflux.tiny("flux2-klein-4b")
    with pytest.raises(InputError, match="cut off"), pytest.warns(UserWarning, match="cut off"):
        read(pipe, ["x" * 200])


def test_who_captures_would_take_concepts_for_the_prompt() -> None:
    """Attention maps look at the network's own attention, and agree beside a capture."""
    pipe = miniflux.tiny("flux1-schnell")
    alone = study.attention_maps(pipe, PROMPT, ["circle"], **SMALL)
    with study.capture(pipe, "double_blocks.*.txt_attn.qkv.out"):
        with pytest.raises(InputError, match="once for each"):
            concept_maps(pipe, PROMPT, CONCEPTS, **SMALL)
        beside = study.attention_maps(pipe, PROMPT, ["circle"], **SMALL)
    np.testing.assert_array_equal(alone.values, beside.values)


def test_compiled_blocks_have_no_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = miniflux.tiny("flux1-schnell")
    monkeypatch.setattr("miniflux.study.mapping.attention.is_compiled", lambda network: network is pipe.transformer)
    for maps in (study.attention_maps, concept_maps):
        with pytest.raises(InputError, match="without compile"):
            maps(pipe, PROMPT, ["circle"], **SMALL)


def test_a_watch_needs_a_space() -> None:
    pipe = miniflux.tiny("flux1-schnell")
    with pytest.raises(InputError, match="space must be"):
        ConceptWatch(pipe, read(pipe, ["a"]), spaces=("keys",))  # type: ignore[arg-type]
