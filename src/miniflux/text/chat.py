"""Prompts as the language models of FLUX.2 and FLUX.3 read them: in the form of a chat, padded as each family pads.

Sources: `flux2/text_encoder.py` and `flux2/system_messages.py` of the original release; the chat templates of Qwen3,
Qwen3-VL and Mistral-Small; `tokenizer_config.json` of Qwen3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE
from tokenizers.normalizers import NFC
from torch import Tensor, nn

from miniflux.errors import InputError, TokenizerError
from miniflux.models.causal_lm import CausalLm
from miniflux.strictjson import json_file
from miniflux.text.decoding import repaired
from miniflux.text.encoding import Padding, Read, TextReader, warn_if_cut
from miniflux.text.tekken import TEKKEN, from_tekken
from miniflux.text.tokenizers import bounded, byte_words, from_json

# Contractions, words with a mark before them, single digits, runs of other marks, ends of lines, spaces
# (`tokenization_qwen2.py` of transformers).
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json")
WANTED = f"tokenizer.json, {TEKKEN}, or {', '.join(QWEN_FILES)}"
MAX_BYTES = 40_000_000  # of tokenizer.json: Qwen's has 11 MB, Mistral's 17
MAX_WINDOW = 8192  # tokens, of the form without a length of its own
DEV_SYSTEM = (
    "You are an AI that reasons about image descriptions. You give structured responses focusing on object "
    "relationships, object\nattribution and actions without speculation."
)
"""The system text of the release; its newest commit has a space in place of the end of line, which gives other ids."""


@dataclass(frozen=True)
class ChatForm:
    """How a family hands a prompt to its language model.

    Attributes:
        before, after: the text around it.
        pad: the token that fills the rest; padding stands on this side.
        length: tokens in all; None for the next multiple of `multiple`.
        pad_position: the position that padding is given; None to count it like any other token.
        left_out: texts that are taken out of a prompt: the model would read them as something else.
        layers: whose hidden states the transformer reads, side by side.
        paddings: what may become of padding, see `Padding`.
    """

    before: str
    after: str
    pad: str
    side: Literal["left", "right"] = "right"
    length: int | None = 512
    multiple: int = 1
    pad_position: int | None = None
    left_out: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    paddings: tuple[Padding, ...] = ("released", "masked")

    def text(self, prompt: str) -> str:
        """All that the model reads for a prompt."""
        for text in self.left_out:
            prompt = prompt.replace(text, "")
        return self.before + prompt + self.after


QWEN_USER = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
KLEIN_FORM = ChatForm(
    QWEN_USER[0],
    f"{QWEN_USER[1]}<think>\n\n</think>\n\n",
    "<|endoftext|>",
    layers=(9, 18, 27),
    paddings=("released", "masked", "trimmed"),
)
"""FLUX.2 klein: Qwen3 with thinking switched off."""
FLUX3_FORM = ChatForm(
    *QWEN_USER,
    "<|endoftext|>",
    length=None,
    multiple=80,
    pad_position=1,
    layers=tuple(range(4, 33, 4)),
    paddings=("released",),
)
"""FLUX.3 klein: Qwen3-VL. Its transformer has no way to pass padding over."""


def dev_form(system: str = DEV_SYSTEM) -> ChatForm:
    """FLUX.2 dev: Mistral-Small.

    Args:
        system: what stands before every prompt.
    """
    before = f"<s>[SYSTEM_PROMPT]{system}[/SYSTEM_PROMPT][INST]"
    return ChatForm(before, "[/INST]", "<pad>", side="left", left_out=("[IMG]",), layers=(10, 20, 30))


@dataclass(frozen=True)
class ChatTokens:
    """What a language model is given; each (B, T).

    Attributes:
        ids: int64.
        mask: true for tokens that are no padding.
        positions: of every token; None to count from 0.
    """

    ids: Tensor
    mask: Tensor
    positions: Tensor | None


class ChatTokenizer:
    """Prompts to ids in the form of a chat.

    Raises:
        TokenizerError: a token that the form needs is not in the vocabulary.
    """

    def __init__(self, encode: Callable[[str], list[int]], form: ChatForm) -> None:
        self._encode, self.form = encode, form
        self.pad = self._one(form.pad)

    def _one(self, token: str) -> int:
        ids = self._encode(token)
        if len(ids) != 1:
            raise TokenizerError(f"{token} is no token of this vocabulary, and the form of a chat needs it")
        return ids[0]

    def tokens(self, prompt: str) -> list[int]:
        """All ids of one prompt, neither cut nor padded.

        Raises:
            InputError: it holds half a character.
        """
        return self._encode(self.form.text(repaired("the prompt", prompt)))

    def __call__(self, prompts: Sequence[str], length: int | None = None) -> ChatTokens:
        """All prompts at one length: that of the form, or what its longest prompt needs; cut on the right.

        Args:
            length: tokens in all instead of that.

        Raises:
            InputError: there is no prompt, it holds half a character, or the length is not one of the form's windows.
        """
        rows = [self.tokens(prompt) for prompt in prompts]
        if not rows:
            raise InputError("no prompt was given")
        if self.form.length is None and length is not None and length % self.form.multiple:
            raise InputError(f"a prompt is read in windows of {self.form.multiple} tokens, got a length of {length}")
        window = length or self.form.length
        if window is None:
            window = min(MAX_WINDOW, self.form.multiple * math.ceil(max(map(len, rows)) / self.form.multiple))
        ids = torch.full((len(rows), window), self.pad, dtype=torch.long)
        mask = torch.zeros(len(rows), window, dtype=torch.bool)
        for i, row in enumerate(rows):
            count = min(len(row), window)
            place = slice(window - count, window) if self.form.side == "left" else slice(0, count)
            ids[i, place], mask[i, place] = torch.tensor(row[:count]), True
        positions = None
        if self.form.pad_position is not None:
            positions = torch.arange(window).repeat(len(rows), 1).masked_fill(~mask, self.form.pad_position)
        return ChatTokens(ids, mask, positions)


def load_chat_tokenizer(path: str | Path, form: ChatForm) -> ChatTokenizer:
    """The tokenizer of a language model, for prompts in a form; arguments and errors as of `load_tokenizer`, and

    Raises:
        TokenizerError: it is of another model than the form is for.
    """
    tokenizer = load_tokenizer(path)
    try:
        return chat_tokenizer(tokenizer, form)
    except TokenizerError as error:
        raise TokenizerError(f"{path}: {error}") from None


def chat_tokenizer(tokenizer: Tokenizer, form: ChatForm) -> ChatTokenizer:
    """A tokenizer that is loaded, for prompts in a form; errors as of `load_chat_tokenizer`."""
    return ChatTokenizer(lambda text: tokenizer.encode(text, add_special_tokens=False).ids, form)


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds what `load_tokenizer` reads."""
    single = any((folder / name).is_file() for name in ("tokenizer.json", TEKKEN))
    return single or all((folder / name).is_file() for name in QWEN_FILES)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a language model, to ids and back, from `tokenizer.json`, Mistral's `tekken.json`, or Qwen's
    three files.

    Args:
        path: the folder that holds them (of several the first of these is read), or the one file.

    Raises:
        TokenizerError: a file is missing or cannot be read.
    """
    path = Path(path)
    single, tekken = (path if path.name == name else path / name for name in ("tokenizer.json", TEKKEN))
    if single.is_file():
        return from_json(single, MAX_BYTES)
    if tekken.is_file():
        return from_tekken(tekken)
    if not has_tokenizer(path):
        raise TokenizerError(f"no tokenizer in {path}: expected {WANTED}")
    try:
        return _qwen(path)
    except TokenizerError:
        raise
    except Exception as error:  # the library raises bare Exception for merges that do not fit the vocabulary
        raise TokenizerError(f"cannot read {path}: {error}") from error


def qwen_pipeline(tokenizer: Tokenizer) -> Tokenizer:
    """Give a bare BPE model Qwen's text cleaning (NFC) and word splitting."""
    tokenizer.normalizer = NFC()  # pyright: ignore
    return byte_words(tokenizer, QWEN_WORDS)


def _qwen(folder: Path) -> Tokenizer:
    """Qwen's byte pairs, with the special tokens that its config adds."""
    lines = bounded(folder / "merges.txt").read_text("utf-8").splitlines()
    pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version:")]
    tokenizer = qwen_pipeline(Tokenizer(BPE(json_file(folder / "vocab.json"), [(a, b) for a, b in pairs])))
    added = json_file(folder / "tokenizer_config.json").get("added_tokens_decoder", {})
    for number, about in sorted(added.items(), key=lambda item: int(item[0])):
        token = AddedToken(about["content"], normalized=False, special=bool(about.get("special")))
        (tokenizer.add_special_tokens if about.get("special") else tokenizer.add_tokens)([token])
        if tokenizer.token_to_id(about["content"]) != int(number):
            raise TokenizerError(f"{folder}: the token {about['content']!r} should have the number {number}")
    return tokenizer


class ChatText(TextReader):
    """The text side of FLUX.2 and FLUX.3: a language model whose hidden states are read, and its tokenizer.

    Args:
        layers: after which layers; those of the tokenizer's form unless given.
        cache_size: see `TextReader`.
    """

    def __init__(
        self,
        lm: CausalLm,
        lm_tokenizer: ChatTokenizer,
        layers: Sequence[int] | None = None,
        length: int | None = None,
        cache_size: int = 32,
    ) -> None:
        form = lm_tokenizer.form
        super().__init__(form.length if length is None else length, cache_size)
        self.lm, self.lm_tokenizer = lm, lm_tokenizer
        self.layers = form.layers if layers is None else tuple(layers)
        self.paddings = form.paddings

    @property
    def networks(self) -> dict[str, nn.Module]:
        return {"lm": self.lm}

    @property
    def tokenizers(self) -> dict[str, Any]:
        return {"lm_tokenizer": self.lm_tokenizer}

    def _embed(self, prompt: str, length: int | None, masked: bool) -> Read:
        tokens, device = self.lm_tokenizer([prompt], length), self.lm.device
        count = int(tokens.mask.sum())
        warn_if_cut(len(self.lm_tokenizer.tokens(prompt)), tokens.ids.shape[1], "tokens")
        positions = None if tokens.positions is None else tokens.positions.to(device)
        hidden = self.lm(tokens.ids.to(device), tokens.mask.to(device), positions, self.layers)
        return Read(torch.cat(hidden, dim=-1), None, count)

    def _own(self, places: Tensor, counts: Tensor, length: int) -> Tensor:
        return places >= length - counts if self.lm_tokenizer.form.side == "left" else places < counts
