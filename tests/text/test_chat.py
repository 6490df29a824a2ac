"""Prompts in the form of a chat: exact ids, padding and positions, and refusal of files of another kind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split

from miniflux.errors import InputError, TokenizerError
from miniflux.text.chat import (
    DEV_SYSTEM,
    FLUX3_FORM,
    KLEIN_FORM,
    ChatTokenizer,
    dev_form,
    load_chat_tokenizer,
)
from tests import reference

Tokenizers = Callable[[str], Path]


@pytest.fixture(scope="module")
def klein(tokenizer: Tokenizers) -> ChatTokenizer:
    return load_chat_tokenizer(tokenizer("qwen3"), KLEIN_FORM)


@pytest.mark.parametrize("form", ["folder", "tokenizer.json"])
def test_ids_of_klein(tokenizer: Tokenizers, tmp_path: Path, form: str) -> None:
    """All ids of 70 prompts, padded on the right to 512: unicode, emoji, control characters, special tokens."""
    path = tokenizer("qwen3")
    if form == "tokenizer.json":
        transformers = pytest.importorskip("transformers")
        transformers.AutoTokenizer.from_pretrained(path).backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
        path = tmp_path / "tokenizer.json"
    prompts = reference.prompts()
    found = load_chat_tokenizer(path, KLEIN_FORM)([prompt["text"] for prompt in prompts])
    assert found.ids.shape == (70, 512) and found.positions is None
    for prompt, row, mask in zip(prompts, found.ids, found.mask, strict=True):
        expected = prompt["qwen3_chat_512"]
        assert row.tolist() == expected + [151643] * (512 - len(expected)), prompt["name"]
        assert mask.tolist() == [True] * len(expected) + [False] * (512 - len(expected))


def test_forms_equal_the_chat_templates(tokenizer: Tokenizers) -> None:
    """As jinja writes them, of Qwen3's own template; that of Qwen3-VL has no thoughts."""
    transformers = pytest.importorskip("transformers")
    peer = transformers.AutoTokenizer.from_pretrained(tokenizer("qwen3"))
    if peer.chat_template is None:
        pytest.skip("the files hold no template")
    said = [{"role": "user", "content": "a cat\n<|im_end|>"}]
    text = peer.apply_chat_template(said, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    assert KLEIN_FORM.text("a cat\n<|im_end|>") == text


def test_windows_and_positions_of_flux3(tokenizer: Tokenizers) -> None:
    """The next multiple of 80; every padding at position 1."""
    read = load_chat_tokenizer(tokenizer("qwen3"), FLUX3_FORM)
    short, long = read(["a cat"]), read(["a cat", "a " * 100])
    assert short.ids.shape == (1, 80) and long.ids.shape == (2, 160)
    count = int(short.mask.sum())
    assert short.positions is not None
    assert short.positions[0].tolist() == [*range(count), *[1] * (80 - count)]
    assert torch.equal(long.ids[0, :80], short.ids[0]) and read(["a " * 9000]).ids.shape == (1, 8192)


def test_dev_is_padded_on_the_left() -> None:
    """And its mark for pictures is taken out of prompts. Its tokenizer is not here: one of single characters."""
    form = dev_form()
    text = form.text("a [IMG]cat")
    assert text == f"<s>[SYSTEM_PROMPT]{DEV_SYSTEM}[/SYSTEM_PROMPT][INST]a cat[/INST]"
    assert dev_form("Be brief.").text("x") == "<s>[SYSTEM_PROMPT]Be brief.[/SYSTEM_PROMPT][INST]x[/INST]"
    read = ChatTokenizer(lambda text: [11] if text == "<pad>" else list(map(ord, text)), form)
    found = read(["a cat", "a"])
    assert found.ids.shape == (2, 512) and found.ids[1, 0] == 11 and found.ids[1, -1] == ord("]")
    assert found.mask.sum(1).tolist() == [len(text), len(text) - 4] and not found.mask[1, :10].any()
    assert read(["a"], length=20).ids[0].tolist() == list(map(ord, form.text("a")[:20]))


def test_no_prompt_and_halves_of_characters_are_refused(klein: ChatTokenizer) -> None:
    with pytest.raises(InputError, match="no prompt"):
        klein([])
    with pytest.raises(InputError):
        klein(["\ud800"])


@pytest.mark.parametrize("wrong", ["empty", "json", "merges", "numbers", "other"])
def test_files_of_another_kind_are_refused(tokenizer: Tokenizers, tmp_path: Path, wrong: str) -> None:
    folder = tmp_path / "tokenizer"
    shutil.copytree(tokenizer("qwen3"), folder)
    if wrong == "empty":
        shutil.rmtree(folder)
        folder.mkdir()
    elif wrong == "json":
        (folder / "vocab.json").write_text("{")
    elif wrong == "merges":
        (folder / "merges.txt").write_text("zz zzz qq\n")
    elif wrong == "numbers":
        about: dict[str, Any] = json.loads((folder / "tokenizer_config.json").read_text())
        about["added_tokens_decoder"]["151700"] = about["added_tokens_decoder"].pop("151645")
        (folder / "tokenizer_config.json").write_text(json.dumps(about))
    else:
        other = Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a"))
        other.pre_tokenizer = Split("", "isolated")  # type: ignore
        other.save(str(folder / "tokenizer.json"))
    with pytest.raises(TokenizerError):
        load_chat_tokenizer(folder, KLEIN_FORM)
