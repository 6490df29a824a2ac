"""Requests of several people in one batch: each gets bit for bit what it gets alone."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from miniflux import batching
from miniflux.cache import ResultCache
from miniflux.checkpoints.writing import write_tensors
from miniflux.errors import CancelledError, InputError, MinifluxError
from miniflux.result import Result
from miniflux.sampling import cache, guide
from miniflux.service import Given, Models, kin
from miniflux.service.together import Previews, in_one_line
from miniflux.settings import LoraUse, Request
from tests.lora.test_attach import encoder_lora
from tests.service.test_models import REALISM, quiet
from tests.tiny import randn

LIT, DIM = LoraUse("realism", 1.0), LoraUse("realism", 0.5)


def ask(prompt: str = "a star", seed: int = 0, *loras: LoraUse, **options: Any) -> Request:
    return Request(prompt=prompt, seed=seed, loras=loras, **{"width": 128, "height": 128, "steps": 2, **options})


def silent(which: int, done: int, previews: Previews) -> None:
    """Nobody watches."""


@pytest.fixture(scope="module")
def shared() -> Models:
    return Models()


@pytest.fixture(scope="module")
def style(tmp_path_factory: pytest.TempPathFactory) -> LoraUse:
    """Another file."""
    path = tmp_path_factory.mktemp("loras") / "style.safetensors"
    layer = "single_blocks.1.linear1"
    write_tensors(path, {f"{layer}.lora_A.weight": randn(4, 192) / 9, f"{layer}.lora_B.weight": randn(1344, 4) / 9}, {})
    return LoraUse(str(path), 0.75)


def check(models: Models, requests: Sequence[Request], batches: Sequence[int | None]) -> list[Result]:
    """Pictures, latents, settings and files are those of each request alone; so many were drawn at once."""
    found = models.draw_together(requests, silent)
    alone = [models.draw(request, quiet) for request in requests]
    for one, other in zip(found, alone, strict=True):
        assert torch.equal(one.latents, other.latents)
        assert [image.tobytes() for image in one.images] == [image.tobytes() for image in other.images]
        told = [{name: value for name, value in said.items() if name != "batch"} for said in one.settings]
        assert json.dumps(told) == json.dumps(other.settings)
        assert one.files == other.files and one.keys == other.keys
    assert [said.get("batch") for one in found for said in one.settings] == list(batches)
    return found


def test_two_to_eight_of_other_words_seeds_and_loras(shared: Models, style: LoraUse) -> None:
    requests = [
        ask("a star", 3),
        ask("a red circle", 9, DIM),
        ask("a blue square", 3, LIT, style),
        ask("a star", 3, style, LIT),  # in another order
        ask("a green ring", 1, style, replace(style, scale=-0.5)),  # one file twice
        ask("a star", 3, LoraUse(str(REALISM), (("double_blocks", 0.5), ("double_blocks.1", 0.0)))),
        ask("", 2**63, replace(style, scale=0)),
        ask("a heart", 7, LIT),
    ]
    check(shared, requests, [8] * 8)
    check(shared, requests[:2], [2, 2])


def test_several_pictures_of_a_request(shared: Models) -> None:
    check(shared, [ask(seed=3, images=3), ask("two rings", 8, DIM), ask(seed=5, images=2)], [6] * 6)


@pytest.mark.parametrize(
    "options",
    [
        {"guide": guide("cfg", scale=2.0), "negative": "a ring"},
        {"guide": guide("nag")},
        {"solver": "ddim:0.5"},
        {"stop": 1},
        {"model": "nano-schnell"},
        {"dtype": "bfloat16"},
    ],
    ids=lambda options: "-".join(options),
)
def test_whatever_guides_and_solves(shared: Models, options: dict[str, Any]) -> None:
    requests = [ask("a star", 1, DIM, **options), ask("a ring", 4, **options), ask("a star", 1, **options)]
    if "dtype" not in options:
        check(shared, requests, [3] * 3)
        return
    found = shared.draw_together(requests, silent)
    for one, request in zip(found, requests, strict=True):
        torch.testing.assert_close(one.latents, shared.draw(request, quiet).latents, rtol=0, atol=0.1)


def test_others_are_drawn_apart(shared: Models) -> None:
    """Other steps, sizes, lengths of words; with a variation or a step cache each alone."""
    requests = [
        ask(),
        ask(seed=1, steps=3),
        ask(seed=2, width=64),
        ask("a", 3, padding="trimmed"),
        ask("a red circle on a blue background", 3, padding="trimmed"),
        ask(seed=4, images=2, variation=(7, 0.5)),
        ask(seed=5, images=2, variation=(7, 0.5)),
        ask(seed=6, cache=cache("first-block")),
        ask(seed=7, cache=cache("first-block")),
        ask(seed=8),
    ]
    check(shared, requests, [2, None, None, None, None, 2, 2, 2, 2, None, None, 2])


def test_equal_pictures_may_be_shared(tmp_path: Path) -> None:
    """Requests that change one image, with words and LoRAs of their own."""
    given = Given(tmp_path / "given")
    photo, other = (given.add(Image.new("RGB", (128, 128), color)) for color in ("orange", "navy"))
    models = Models(given=given)
    options: dict[str, Any] = {"strength": 0.6, "steps": 4}
    requests = [ask(seed=1, image=photo, **options), ask("a ring", 2, LIT, image=photo, **options)]
    check(models, [*requests, ask(seed=1, image=other, **options)], [2, 2, None])
    given.close()
    with pytest.raises(InputError, match="not here: give it again") as caught:
        models.draw_together(requests, silent)
    assert caught.value.which == 0


def test_loras_that_cannot_differ_are_drawn_apart(shared: Models, tmp_path: Path) -> None:
    """Of text encoders, and such as replace norms: with those of the same set, the others together."""
    with shared.use(ask()) as pipe:
        made = {"words": encoder_lora(pipe)}
    made["norm"] = {"double_blocks.0.txt_attn.norm.query_norm.diff": randn(32) / 4}
    uses = {}
    for name, tensors in made.items():
        write_tensors(tmp_path / f"{name}.safetensors", tensors, {})
        uses[name] = LoraUse(str(tmp_path / f"{name}.safetensors"), 0.5)
    requests = [
        ask(seed=1),
        ask("a star", 2, uses["words"]),
        ask("a star", 3, DIM),
        ask("a ring", 4, uses["norm"], LIT),
        ask("a ring", 5, uses["words"]),
    ]
    check(shared, requests, [2, 2, 2, None, 2])


def test_steps_are_told_to_each(shared: Models) -> None:
    """After every step, over its own pictures; with previews, made when asked for."""
    told: list[tuple[int, int]] = []
    seen: list[tuple[int, int, int]] = []

    def step(which: int, done: int, previews: Previews) -> None:
        told.append((which, done))
        for number, (at, preview) in previews.items():
            picture = preview()
            assert picture is not None and picture.size == (128, 128)
            seen.append((which, number, at))

    shared.draw_together([ask(steps=3), ask(seed=1, images=2, steps=3), ask(seed=9, steps=1)], step)
    assert told == [(0, 1), (1, 2), (0, 2), (1, 4), (0, 3), (1, 6), (2, 1)]
    assert seen == [
        (0, 0, 1),
        (1, 0, 1),
        (1, 1, 1),
        (0, 0, 2),
        (1, 0, 2),
        (1, 1, 2),
        (0, 0, 3),
        (1, 0, 3),
        (1, 1, 3),
        (2, 0, 1),
    ]


def test_a_preview_shows_its_own_picture(shared: Models) -> None:
    """Pictures of a batch have the previews that they have alone."""

    def shown(seed: int, images: int) -> list[bytes]:
        found: dict[int, bytes] = {}

        def step(which: int, done: int, previews: Previews) -> None:
            for number, (at, preview) in previews.items():
                picture = preview()
                assert picture is not None
                if at == 3:
                    found[number] = picture.tobytes()

        shared.draw_together([ask(seed=seed, images=images, steps=4)], step)
        return [found[number] for number in range(images)]

    first, second = shown(1, 2)
    assert first != second
    for together, alone in ((first, *shown(1, 1)), (second, *shown(2, 1))):
        assert max(abs(a - b) for a, b in zip(together, alone, strict=True)) <= 1


def test_raising_stops_all(shared: Models) -> None:
    """Within a step; what comes after is drawn as ever, and other threads are let in."""
    steps: list[int] = []

    def step(which: int, done: int, previews: Previews) -> None:
        steps.append(done)
        if done == 2 and which == 1:
            raise CancelledError("cancelled")

    with pytest.raises(CancelledError):
        shared.draw_together([ask(steps=50), ask("a ring", 1, LIT, steps=50)], step)
    assert steps == [1, 1, 2, 2]
    check(shared, [ask(), ask("a ring", 1, LIT)], [2, 2])


def test_a_lora_that_cannot_be_attached_is_whose_it_is(shared: Models, tmp_path: Path) -> None:
    """By its name and the number of its request, before anything is drawn; the others can be drawn."""
    text = tmp_path / "text.safetensors"
    text.write_text("hello")
    steps: list[int] = []
    bad: list[tuple[LoraUse, str]] = [
        (LoraUse(str(text)), "text.safetensors"),
        (LoraUse(str(tmp_path / "none.safetensors")), "none.safetensors"),
        (LoraUse("realism", 1.0, "0" * 64), "its SHA-256 differs"),
        (LoraUse("realism", (("single_blocks.99", 1.0),)), "begins with 'single_blocks.99'"),
    ]
    for use, said in bad:
        requests = [ask(seed=1), ask("a star", 2, DIM), ask("a ring", 3, LIT, use), ask("a star", 4, LIT)]
        with pytest.raises(MinifluxError, match=said) as caught:
            shared.draw_together(requests, lambda which, done, preview: steps.append(done))
        assert caught.value.which == 2 and not steps
    assert len(shared.draw_together([ask(), ask("a star", 2, DIM)], silent)) == 2


def test_what_was_drawn_before_is_not_drawn_again(style: LoraUse) -> None:
    """One cache for both ways to draw; equal requests of a call are drawn once; answers are given at once."""
    models = Models(cache=ResultCache())
    first = models.draw(ask("a ring", 2, DIM), quiet)
    requests = [ask(seed=1), ask("a ring", 2, DIM), ask(seed=1), ask("a star", 3, style, LIT)]
    told: dict[int, int] = {}
    found = models.draw_together(requests, lambda which, done, preview: told.update({which: done}))
    assert [one.cached for one in found] == [False, True, True, False]
    assert [one.settings[0].get("batch") for one in found] == [2, None, 2, 2]
    assert told == dict.fromkeys(range(4), 2)
    assert torch.equal(found[1].latents, first.latents) and torch.equal(found[0].latents, found[2].latents)
    for request, one in zip(requests, found, strict=True):
        answer = models.answer(request)
        assert answer is not None and answer.cached and torch.equal(answer.latents, one.latents)
        again = models.draw(request, quiet)
        assert again.cached and again.settings[0]["loras"] == one.settings[0]["loras"]


def test_fewer_at_once_where_more_do_not_fit(shared: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as pay, and as many as there is memory for."""
    requests = [ask(seed=seed) for seed in range(3)]
    monkeypatch.setattr(batching, "PAYS", 2 * (64 + 48) * 192)
    assert shared.most_at_once(requests[0]) == 2
    check(shared, requests, [2, 2, None])
    monkeypatch.undo()
    assert shared.most_at_once(requests[0]) > 2
    monkeypatch.setattr(batching, "fitting", lambda *_: 1)
    monkeypatch.setattr("miniflux.pipeline.fitting", lambda *_: 1)
    assert shared.most_at_once(requests[0]) == 1
    check(shared, requests, [None] * 3)


def test_how_many_it_pays_to_draw_at_once(shared: Models) -> None:
    """The same before the model is loaded; 1 where pictures are drawn one after the other."""
    assert Models().most_at_once(ask()) == shared.most_at_once(ask()) == 2**20 // ((64 + 48) * 192)
    assert shared.most_at_once(ask(variation=(1, 0.5))) == 1
    assert shared.most_at_once(ask(cache=cache("first-block"))) == 1
    assert shared.most_at_once(ask(width=1024, height=1024)) == 1


def test_kin(style: LoraUse) -> None:
    """Alike but for what each picture has for itself; the same in another process."""
    one = kin(ask())
    assert len(one) == 64 and set(one) <= set("0123456789abcdef")
    for same in (ask("other words", 7, LIT, style, images=3), ask(model="nano"), ask(model="nano-dev")):
        assert kin(same) == one
    others = [
        *(ask(steps=3), ask(width=64), ask(guidance=2.0), ask(solver="heun"), ask(model="nano-schnell"), ask(stop=1)),
        *(ask(dtype="bfloat16"), ask(padding="masked"), ask(image="0" * 64), ask(image="1" * 64)),
        *(ask(guide=guide("cfg", scale=s), negative=n) for s in (2.0, 3.0) for n in ("a", "b")),
        *(ask(seed=seed, variation=(1, 0.5)) for seed in (1, 2)),
    ]
    assert len({one, *map(kin, others)}) == len(others) + 1
    program = "from miniflux.service import kin; from miniflux.settings import Request; import sys\n"
    program += "print(kin(Request.from_json(sys.argv[1])))"
    said = subprocess.run([sys.executable, "-c", program, ask().text()], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == one


@given(st.lists(st.lists(st.integers(0, 4), max_size=5), max_size=5))
def test_a_line_holds_all_in_their_order(sequences: list[list[int]]) -> None:
    """Each is found at its places, which rise; nothing is in the line that nobody has."""
    line, places = in_one_line(sequences)
    for items, own in zip(sequences, places, strict=True):
        assert [line[place] for place in own] == items and own == sorted(set(own))
    assert len(line) <= sum(map(len, sequences)) and {*line} == {item for items in sequences for item in items}


def test_several_threads_do_not_mix(shared: Models) -> None:
    """Batches of other LoRAs and a picture alone, at once: every one as by itself."""
    jobs = [[ask("a star", 1, DIM), ask("a ring", 2)], [ask("a heart", 3, LIT), ask("a star", 4, DIM)], [ask(seed=5)]]
    expected = [[shared.draw(request, quiet).latents for request in job] for job in jobs]
    found: dict[int, list[Result]] = {}
    threads = [
        threading.Thread(target=lambda i=i: found.update({i: shared.draw_together(jobs[i], silent)})) for i in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for i, latents in enumerate(expected):
        assert all(torch.equal(one.latents, own) for one, own in zip(found[i], latents, strict=True))


def test_what_is_no_request_is_refused(shared: Models) -> None:
    assert shared.draw_together([], silent) == []
    with pytest.raises(InputError, match=r"requests\[1\] must be a Request, got 'a star'") as caught:
        shared.draw_together([ask(), "a star"], silent)  # type: ignore[list-item]
    assert caught.value.which == 1
