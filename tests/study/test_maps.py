"""Attention maps: against softmax(q k^T) computed whole in float64, and refused where they would lie."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import miniflux
from miniflux.conditions import Reference
from miniflux.errors import InputError, OutputError
from miniflux.models.flux1 import RunBlock
from miniflux.models.layers import apply_rope
from miniflux.sampling import cache
from miniflux.sampling.observing import Call, observed
from miniflux.study.mapping import attention as module
from miniflux.study.mapping.attention import AttentionWatch, Groups, attention_between, attention_maps, patch_maps
from miniflux.study.mapping.maps import Maps, blocks_for
from miniflux.study.mapping.words import find, words_in
from tests.tiny import FLUX3, randn

PROMPT = "a red circle on blue background"
SMALL: dict[str, Any] = {"width": 64, "height": 48, "seed": 1}


class Whole:
    """Keeps softmax(q k^T / sqrt(D)) of every block, whole, in float64 (H, L, L)."""

    alters = None

    def __init__(self) -> None:
        self.seen: dict[tuple[int, str], Tensor] = {}
        self.told: Any = None

    def began(self, pictures: Sequence[int]) -> None: ...

    def calling(self, call: Call) -> None:
        self.step, self.told = call.step, call.told

    def wrap(self, run: RunBlock) -> RunBlock:
        def whole(name: str, block: Any, streams: tuple[Tensor, ...], context: tuple[Any, ...]) -> tuple[Tensor, ...]:
            def attend(q: Tensor, k: Tensor, v: Tensor, pe: Tensor, mask: Tensor | None = None) -> Tensor:
                a, b = (apply_rope(x.double(), pe).double()[0] for x in (q, k))
                scores = a @ b.transpose(1, 2) / q.shape[-1] ** 0.5
                if mask is not None:
                    scores = scores.masked_fill(~mask[0], -torch.inf)
                self.seen[self.step, name] = scores.softmax(dim=-1)
                return context[-1](q, k, v, pe, mask)

            return run(name, block, streams, (*context[:-1], attend))

        return whole


def picture(size: tuple[int, int] = (48, 32)) -> Any:
    from PIL import Image

    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8))


CASES: list[tuple[str, dict[str, Any]]] = [
    ("flux1-dev", {}),
    ("flux1-dev", {"padding": "masked"}),
    ("flux1-kontext-dev", {"conditions": [Reference(picture(), size=(48, 32))]}),
    ("flux2-dev", {}),
    ("flux2-klein-4b", {"conditions": [Reference(picture((64, 64)))]}),
    ("flux3-klein", {"conditions": [Reference(picture()), Reference(picture((32, 64)), index=2)]}),
]


@pytest.mark.parametrize(
    ("name", "more"), CASES, ids=[f"{name}-{len(more)}-{i}" for i, (name, more) in enumerate(CASES)]
)
@pytest.mark.parametrize("direction", ["image_to_text", "text_to_image"])
def test_maps_are_parts_of_softmax(name: str, more: dict[str, Any], direction: Any) -> None:
    """Every block, step and head: what was computed piece by piece is what stands in the whole matrix."""
    pipe, whole = miniflux.tiny(name), Whole()
    asked = {**SMALL, "steps": 2, **more}
    plain = pipe.generate(PROMPT, **asked)
    heads = range(pipe.transformer.config.num_heads)
    with observed(whole):
        maps = attention_maps(pipe, PROMPT, ["circle", "blue background"], direction=direction, heads=heads, **asked)
    assert torch.equal(plain.latents, maps.result.latents) and "wrapped" not in maps.result.settings[0]
    assert plain.images[0].tobytes() == maps.image.tobytes()
    assert maps.values.shape == (2, 2, len(maps.blocks), len(heads), 3, 4)
    text = whole.told.words.txt.shape[1]
    at = torch.arange(text, text + 12)
    for n, word in enumerate(find(pipe.text, PROMPT, maps.names)):
        places = torch.tensor(word.places(text))
        for s, step in enumerate(maps.steps):
            for b, block in enumerate(maps.blocks):
                matrix = whole.seen[step, block]
                if direction == "image_to_text":
                    wanted = matrix[:, at][:, :, places].sum(dim=2)
                else:
                    wanted = matrix[:, places][:, :, at].mean(dim=1)
                found = torch.from_numpy(maps.values[n, s, b]).flatten(1).double()
                torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    mean = attention_maps(pipe, PROMPT, ["circle"], direction=direction, **asked)
    np.testing.assert_allclose(mean["circle"], maps.values[0].mean(axis=(0, 1, 2)), atol=1e-6)


@pytest.mark.parametrize("direction", ["from_patch", "to_patch"])
def test_patches_of_picture_and_references(direction: Any) -> None:
    """From a patch of the picture to the second reference, and the other way round."""
    pipe, whole = miniflux.tiny("flux3-klein"), Whole()
    asked: dict[str, Any] = {**SMALL, "steps": 1, "conditions": CASES[-1][1]["conditions"]}
    with observed(whole):
        maps = patch_maps(pipe, PROMPT, [(2, 1)], on=2, direction=direction, **asked)
    assert maps.values.shape == (1, 1, len(maps.blocks), 1, 4, 2)
    text = whole.told.words.txt.shape[1]
    patch, first = text + 2 * 4 + 1, text + 12 + 2 * 3
    for b, block in enumerate(maps.blocks):
        matrix = whole.seen[0, block].mean(dim=0)
        wanted = matrix[patch, first : first + 8] if direction == "from_patch" else matrix[first : first + 8, patch]
        torch.testing.assert_close(
            torch.from_numpy(maps.values[0, 0, b, 0]).flatten().double(), wanted, rtol=0, atol=1e-5
        )


def test_references_that_are_looked_at_once_stand_in_front_of_the_keys() -> None:
    """The word and the picture are found behind them; together all keys have a weight of 1."""
    pipe = miniflux.tiny("flux2-klein-4b")
    asked: dict[str, Any] = {**SMALL, "steps": 1}
    conditions = [Reference(picture((64, 64)), once=True)]
    maps = attention_maps(pipe, PROMPT, ["circle"], **asked, conditions=conditions)
    without = attention_maps(pipe, PROMPT, ["circle"], **asked)
    assert maps.values.shape == without.values.shape and (maps.values[:, :, 0] < without.values[:, :, 0]).all()
    with pytest.raises(InputError, match="once=False"):
        attention_maps(pipe, PROMPT, ["circle"], on=1, **asked, conditions=conditions)


def test_the_matrix_is_never_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """No product has more numbers than the bound, and pieces of any size give the same."""
    q, k = randn(3, 50, 8, seed=1), randn(3, 60, 8, seed=2)
    queries, keys = Groups.each(torch.arange(10, 50)), Groups.of([[3, 4], [7]])
    largest: list[int] = []
    product = Tensor.__matmul__

    def counted(a: Tensor, b: Tensor) -> Tensor:
        made = product(a, b)
        largest.append(made.numel())
        return made

    monkeypatch.setattr(Tensor, "__matmul__", counted)
    parts = attention_between(q, k, queries, keys, most=130)
    assert max(largest) <= 130 and len(largest) == 3 * 20
    monkeypatch.undo()
    whole = (q.double() @ k.double().transpose(1, 2) / 8**0.5).softmax(dim=-1).mean(dim=0)[10:]
    wanted = torch.stack((whole[:, 3] + whole[:, 4], whole[:, 7]), dim=1)
    torch.testing.assert_close(parts[0].double(), wanted, rtol=0, atol=1e-6)
    torch.testing.assert_close(attention_between(q, k, queries, keys), parts)


def test_the_bound_holds_in_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a picture of 192 tokens no more than the bound, and 4 numbers a row beside it, is there at once."""
    pipe, most, seen = miniflux.tiny("flux1-schnell"), 1000, []
    softmax = Tensor.softmax

    def counted(x: Tensor, dim: int) -> Tensor:
        seen.append(x.numel())
        return softmax(x, dim=dim)

    monkeypatch.setattr(Tensor, "softmax", counted)
    watch = module.word_watch(pipe, PROMPT, ["circle"])
    watch.most = most
    with observed(watch):
        result = pipe.generate(PROMPT, seed=1, steps=1, width=256, height=192)
    assert watch.maps(result).values.shape[-2:] == (12, 16)
    assert seen and max(seen) <= most


@pytest.mark.parametrize("name", ["nano", "nano2", "nano3"])
def test_words_are_found_by_the_tokenizer(name: str) -> None:
    """The tokens of a word, read alone behind the same words, say the word again."""
    pipe = miniflux.load(name)
    prompt = "a red circle left of a red heart on a cyan background"
    tokenizer = pipe.text.tokenizers["t5_tokenizer" if name == "nano" else "lm_tokenizer"]
    ids = tokenizer.tokens(prompt)
    words = find(pipe.text, prompt, ["circle", "red:2", "heart", "cyan background"])
    assert [word.name for word in words] == ["circle", "red:2", "heart", "cyan background"]
    for word in words:
        said = word.name.partition(":")[0]
        assert ids[word.first : word.stop] == find_ids(tokenizer, f"a {said}", f"a {said} on", said)
        assert word.stop - word.first >= len(said.split())
    assert words[0].stop <= words[1].first < words[1].stop <= words[2].first
    window = 64 + len(ids)
    left = name != "nano" and tokenizer.form.side == "left"
    assert words[0].places(window)[0] == words[0].first + (window - len(ids) if left else 0)


def find_ids(tokenizer: Any, shorter: str, longer: str, said: str) -> list[int]:
    """Ids of the last words of `shorter`: what it has, and the longer one too, behind "a"."""
    before, one, two = (tokenizer.tokens(text) for text in ("a", shorter, longer))
    first = next(i for i, (a, b) in enumerate(zip(before, one, strict=False)) if a != b)
    last = next(i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b)
    return one[first:last]


def test_left_padded_words() -> None:
    """FLUX.2 dev: text stands at the end of its window."""
    pipe = miniflux.tiny("flux2-dev")
    (word,) = find(pipe.text, PROMPT, ["circle"])
    tokens = pipe.text.tokenizers["lm_tokenizer"]([PROMPT])
    ids = tokens.ids[0, word.places(tokens.ids.shape[1])]
    read = pipe.text.tokenizers["lm_tokenizer"].tokens(PROMPT)
    assert ids.tolist() == read[word.first : word.stop]
    assert len(ids) == len("circle")  # it reads bytes


def test_words_of_all_kinds() -> None:
    """Beside marks, with marks inside, and in a script without spaces; its own tokens and no others."""
    text = miniflux.tiny("flux2-klein-4b").text
    prompt = "(Red-hot) café, 一只猫在草地上; it's \U0001f600!"
    read = text.tokenizers["lm_tokenizer"].tokens(prompt)
    for name in ("Red", "Red-hot", "café", "猫", "草地", "it's", "\U0001f600"):
        (word,) = find(text, prompt, [name])
        assert word.stop - word.first == len(name.encode())  # it reads bytes
        alone = text.tokenizers["lm_tokenizer"].tokens(name)
        assert any(alone[i:][: len(name.encode())] == read[word.first : word.stop] for i in range(len(alone)))
    for name in ("caf", "hot caf", "t"):
        with pytest.raises(InputError, match="not in the prompt"):
            find(text, prompt, [name])


def test_words_that_are_refused() -> None:
    text = miniflux.load("nano").text
    assert words_in("a red circle, a red ring") == ["a:1", "red:1", "circle", "a:2", "red:2", "ring"]
    for words, said in {
        ("square",): "'square' is not in the prompt; its words are a, red, circle, on, blue, background",
        ("circ",): "not in the prompt",
        ("a:3",): "'a' occurs 1 times",
        (): "words is empty",
        ("red", "red"): "twice",
        (" ",): "not empty",
        (3,): "not empty",
    }.items():
        with pytest.raises(InputError, match=said):
            find(text, PROMPT, words)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="occurs 2 times in the prompt: ask for red:1, red:2"):
        find(text, "a red circle, a red ring", ["red"])
    with pytest.raises(InputError, match="must be a list"):
        find(text, PROMPT, "circle")
    (word,) = find(text, PROMPT, ["background"])
    with pytest.raises(InputError, match="cut off behind 4"):
        word.places(5)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"blocks": ["double_blocks.9"]}, "no block 'double_blocks.9'; there are double_blocks.0"),
        ({"blocks": []}, "at least one"),
        ({"blocks": "double_blocks"}, "must be a list"),
        ({"at_steps": [4]}, "step 4 was asked for, and there are 2"),
        ({"at_steps": []}, "at least one"),
        ({"at_steps": [-1]}, "a step must be"),
        ({"heads": [99]}, "a head must be"),
        ({"heads": []}, "at least one"),
        ({"direction": "sideways"}, "direction must be one of image_to_text, text_to_image"),
        ({"on": 1}, "no reference 1"),
        ({"images": 2}, "one picture at a time"),
    ],
)
def test_what_is_refused(asked: dict[str, Any], said: str) -> None:
    pipe = miniflux.tiny("flux1-schnell")
    with pytest.raises(InputError, match=said):
        attention_maps(pipe, PROMPT, ["circle"], **{**SMALL, "steps": 2, **asked})


def test_more_that_is_refused() -> None:
    pipe = miniflux.tiny("flux1-schnell")
    with pytest.raises(InputError, match="one text"):
        attention_maps(pipe, [PROMPT], ["circle"])  # type: ignore[arg-type]
    with pytest.raises(InputError, match="the row of a patch must be"):
        patch_maps(pipe, PROMPT, [(9, 0)], steps=1, **SMALL)
    with pytest.raises(InputError, match="at least one"):
        patch_maps(pipe, PROMPT, [])
    with pytest.raises(InputError, match="attend each within itself"):
        blocks_for(FLUX3, ["content_mode_blocks.image.0"])
    assert blocks_for(FLUX3, None) == tuple(f"single_blocks.{i}" for i in range(3))
    with pytest.raises(InputError, match="left all of these blocks out"):
        attention_maps(
            miniflux.load("nano"), PROMPT, ["circle"], blocks=["single_blocks"], at_steps=[2, 3], steps=5,
            cache=cache("taylor", interval=4, warmup=1), **SMALL,
        )  # fmt: skip


def test_steps_that_a_cache_leaves_out() -> None:
    """They have no numbers, and the mean is that of the others."""
    pipe = miniflux.load("nano")
    asked: dict[str, Any] = {**SMALL, "steps": 5, "cache": cache("taylor", interval=2, warmup=1)}
    maps = attention_maps(pipe, PROMPT, ["circle"], **asked)
    gone = np.isnan(maps.values).any(axis=(0, 2, 3, 4, 5))
    assert gone.any() and not gone.all()
    rest = [step for step, without in zip(maps.steps, gone, strict=True) if not without]
    np.testing.assert_allclose(maps["circle"], maps.of("circle", steps=rest))
    with pytest.raises(InputError, match="left out all"):
        maps.of("circle", steps=[int(np.flatnonzero(gone)[0])], blocks=[maps.blocks[-1]])


def test_maps_by_step_block_and_head(tmp_path: Path) -> None:
    pipe = miniflux.tiny("flux1-schnell")
    maps: Maps = attention_maps(pipe, PROMPT, ["circle", "blue"], heads=[1], at_steps=[1, 0], steps=2, **SMALL)
    assert maps.steps == (0, 1) and maps.blocks == tuple(pipe.transformer.config.blocks) and maps.heads == (1,)
    np.testing.assert_allclose(maps.by_step("blue")[1], maps.of("blue", steps=[1]))
    np.testing.assert_allclose(maps.by_block("blue")[2], maps.of("blue", blocks=[maps.blocks[2]]))
    np.testing.assert_allclose(maps.of("blue", head=1), maps["blue"])
    assert "circle, blue, 3 x 4, 2 steps" in repr(maps)
    shares = maps.share("circle") + maps.share("blue")
    np.testing.assert_allclose(shares, 1, atol=1e-6)
    with np.load(maps.save(tmp_path / "maps.npz")) as file:
        np.testing.assert_array_equal(file["values"], maps.values)
        assert file["names"].tolist() == ["circle", "blue"] and file["steps"].tolist() == [0, 1]
        assert file["blocks"].tolist() == list(maps.blocks)
    for wrong in ({"name": "red"}, {"name": "blue", "steps": [5]}, {"name": "blue", "blocks": ["x"]}):
        with pytest.raises(InputError, match="among these maps"):
            maps.of(**wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no head 0"):
        maps.of("blue", head=0)
    with pytest.raises(OutputError, match=".npz"):
        maps.save(tmp_path / "maps.csv")
    one = attention_maps(pipe, PROMPT, ["circle"], steps=1, **SMALL)
    with pytest.raises(InputError, match="only 'circle'"):
        one.share("circle")
    with pytest.raises(InputError, match="temperature"):
        maps.share("circle", 0)
    with pytest.raises(InputError, match="heads were not kept apart"):
        one.of("circle", head=0)


def test_of_two_texts_the_prompt_s_counts() -> None:
    """With guidance by a second text, also in one batch, and beside another observer."""
    pipe = miniflux.load("nano2")
    asked: dict[str, Any] = {**SMALL, "steps": 2, "at_steps": [0]}
    plain = attention_maps(pipe, PROMPT, ["circle"], **asked)
    guided = attention_maps(pipe, PROMPT, ["circle"], guide="cfg", negative="a blue star", **asked)
    np.testing.assert_allclose(plain["circle"], guided["circle"], atol=1e-6)  # of the first step, from the same noise


def test_only_one_picture() -> None:
    pipe = miniflux.tiny("flux1-schnell")
    watch = module.word_watch(pipe, PROMPT, ["circle"])
    assert isinstance(watch, AttentionWatch)
    with observed(watch), pytest.raises(InputError, match="one picture at a time"):
        pipe.generate(PROMPT, images=2, steps=1, **SMALL)
