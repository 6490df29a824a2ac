"""Settings of A1111, Forge, SD.Next and Civitai as people meet them: understood, or listed."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miniflux.errors import InputError
from miniflux.settings import LoraUse, a1111

LINE = "\nSteps: 12, Sampler: Euler, CFG scale: 2, Seed: 5, Size: 512x768"


def told(text: str) -> str:
    return "\n".join(a1111.read(text).not_understood)


def test_negative_prompt_counts_only_at_the_beginning_of_a_line() -> None:
    request = a1111.read("a sign that says Negative prompt: no\nmore" + LINE).request
    assert request.prompt == "a sign that says Negative prompt: no\nmore" and request.negative is None
    request = a1111.read("a star\n Negative prompt: blur, Negative prompt: x\nmore" + LINE).request
    assert (request.prompt, request.negative) == ("a star", "blur, Negative prompt: x\nmore")
    request = a1111.read("Negative prompt: blur" + LINE).request
    assert (request.prompt, request.negative) == ("", "blur")


@pytest.mark.parametrize(
    "line",
    [
        "Sampler: Euler, Steps: 7, Seed: 9, Size: 640x480",
        "Size: 640x480, Seed: 9, Model: flux1-dev, Steps: 7, App: SD.Next, Version: 9ab",
        "Seed: 9| Steps: 7| Size: 640x480| CFG scale: 6| App: SD.Next| Parser: native",
        "Steps: 7 | Seed: 9 | Sampler: Euler a | Size: 640x480 | Operations: txt2img",
        "Steps: 7, Seed: 9, Size: 640 x 480",
        "Steps:7,Seed:9,Size:640x480",
    ],
)
def test_the_line_of_settings_need_not_begin_with_steps(line: str) -> None:
    text = f"a star, note: five\nNegative prompt: blur\n{line}"
    assert a1111.looks_like_it(text)
    request = a1111.read(text).request
    assert (request.prompt, request.steps, request.seed) == ("a star, note: five", 7, 9)
    assert (request.width, request.height) == (640, 480)


def test_two_lines_of_settings_and_lines_below_them() -> None:
    text = "a star\nNegative prompt: x\nVersion: aa62f6d, Pipeline: Original,\nSteps: 25 | Seed: 7 | Size: 64x64"
    text += "\nTemplate: a {star|moon}"
    read = a1111.read(text)
    assert (read.request.prompt, read.request.steps, read.request.seed) == ("a star", 25, 7)
    assert {"Version: aa62f6d", "Pipeline: Original", "Template: a {star|moon}"} <= set(read.not_understood)
    assert "x" not in read.request.prompt and "Version" not in (read.request.negative or "")


def test_prompts_with_colons_are_no_settings() -> None:
    for text in ("a star", "Steps: up, down", "style: film, light: soft, mood: calm", "", "\n", "{}"):
        assert not a1111.looks_like_it(text)


def test_civitai_writes_json_and_everything_on_one_line() -> None:
    text = "a star\nNegative prompt: blur\nSteps: 28, Sampler: Euler, CFG scale: 7, Seed: 33, Size: 832x1216, "
    text += 'Civitai resources: [{"type":"lora","weight":0.65,"name":"dark, Seed: 3"}], Civitai metadata: {"a":1}'
    read = a1111.read(text)
    assert (read.request.seed, read.request.steps, read.request.width) == (33, 28, 832)
    assert any(line.startswith("Civitai resources: [{") and "dark, Seed: 3" in line for line in read.not_understood)
    assert 'Civitai metadata: {"a":1}' in read.not_understood

    joined = "a star, gold. Negative prompt: blur. Steps: 9, Sampler: Euler, CFG scale: 2.5, Seed: 3, Size: 64x64"
    assert a1111.looks_like_it(joined)
    read = a1111.read(joined)
    assert (read.request.prompt, read.request.negative, read.request.steps) == ("a star, gold", "blur", 9)
    assert any("one line" in line for line in read.not_understood)
    read = a1111.read(joined.replace(". Negative", "\nNegative"))
    assert (read.request.prompt, read.request.negative, read.request.steps) == ("a star, gold", "blur", 9)


@pytest.mark.parametrize(
    ("tag", "uses", "said"),
    [
        ("<lora:s:0.8>", [("s", 0.8)], ""),
        ("<lora:s>", [("s", 1.0)], ""),
        ("<lora: s : .5 >", [("s", 0.5)], ""),
        ("<lora:s:-0.5>", [("s", -0.5)], ""),
        ("<lora:s:0.5:0.9>", [("s", 0.9)], "the strength 0.5 of its text encoders"),
        ("<lora:s:0.5:0.9:16>", [("s", 0.9)], "16"),
        ("<lora:s:te=1:unet=0.7>", [("s", 0.7)], "the strength 1 of its text encoders"),
        ("<lora:s:unet=0.7>", [("s", 0.7)], "the strength 1 of its text encoders"),
        ("<lora:s:te=0.7>", [("s", 0.7)], ""),
        ("<lora:s:0.6:lbw=OUTALL>", [("s", 0.6)], "lbw"),
        ("<lora:s:0.6:dyn=8>", [("s", 0.6)], "dyn"),
        ("<lyco:s:0.6>", [("s", 0.6)], ""),
        ("<lora:a:1><lora:b:0.2>", [("a", 1.0), ("b", 0.2)], ""),
        ("<lora:s:strong>", [], "'strong'"),
        ("<lora:s:nan>", [], "'nan'"),
        ("<lora::1>", [], "must be named"),
        ("<hypernet:h:1>", [], "<hypernet:h:1>"),
    ],
)
def test_lora_tags_of_all_forms(tag: str, uses: list[tuple[str, float]], said: str) -> None:
    read = a1111.read(f"a star {tag}, gold{LINE}")
    assert read.request.loras == tuple(LoraUse(*use) for use in uses)
    assert read.request.prompt == "a star , gold"
    assert said in "\n".join(read.not_understood)
    if not said:
        assert "lora" not in "\n".join(read.not_understood).lower()


def test_numbers_are_never_cut_and_nothing_is_lost() -> None:
    lines = told(
        "a\nNegative prompt: bad <lora:x:1>\nSteps: 7.5, Seed: 12345678901234567890123, CFG scale: many, foo, Steps: 8"
    )
    for part in (
        "CFG scale: many",
        "foo",
        "Negative prompt",
        "negative prompt are read as they stand",
        "is there twice",
    ):
        assert part in lines
    read = a1111.read("a\nSteps: 7.5, Seed: 1e3, CFG scale: 1, Sampler: Euler")
    assert read.request.steps is None and "steps '7.5': no whole number" in "\n".join(read.not_understood)
    assert read.request.seed == 1000


def test_half_characters_in_a_prompt_are_listed() -> None:
    read = a1111.read("a \ud800 star" + LINE)
    assert read.request.prompt == "" and "half a character" in "\n".join(read.not_understood)


PIECES = st.sampled_from(
    [
        *("a star", "Negative prompt:", "Steps: 3", "Steps:", "Seed: 4", "Size: 64x64", "CFG scale: 3", ", ", " | "),
        *("\n", "<lora:s:1>", "<lora:", ">", ":", '"', "[", "{", "Model: flux1-dev", "Sampler: Euler", "\ud83d", "\0"),
        *("Sampler: DPM++ 2M Karras", "Shift: 3", "Distilled CFG Scale: 3.5", "Schedule type: Beta", "Steps: 1e400"),
    ]
)


@given(st.lists(PIECES | st.text(max_size=5), max_size=30).map("".join))
def test_any_text_is_read_or_refused(text: str) -> None:
    if a1111.looks_like_it(text):
        with suppress(InputError):
            a1111.read(text)
