"""Stage 0 of the nano recipe: the ways people write, and the two small tokenizers learned from them."""

from __future__ import annotations

import json
import random
import string
from collections import Counter
from io import BytesIO
from itertools import pairwise
from pathlib import Path

import sentencepiece
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn

from miniflux.models.clip import ClipTextEncoder
from miniflux.models.t5 import T5Encoder
from miniflux.nano import scenes
from miniflux.text import TextEmbedding
from miniflux.text.special import CLIP_END, CLIP_START
from miniflux.text.tokenizers import TextTokenizer, clip_pipeline
from miniflux.variants import NANO_CLIP, NANO_LENGTH, NANO_T5

CLIP_LENGTH, T5_LENGTH = NANO_CLIP.max_position_embeddings, NANO_LENGTH

OPENINGS = ("a picture of", "an image of", "a drawing of", "a photo of", "please draw", "show me", "a painting of")
CLOSINGS = (
    ", high quality",
    ", 4k",
    ", minimalist",
    ", in the style of a poster",
    ", simple",
    ", highly detailed",
    ".",
)
FILLERS = (
    "very really beautiful bright dark shiny old new flat plain simple lovely cute strange digital modern vivid clean "
    "realistic cinematic photo art poster icon logo design cat dog tree house sky sun moon water wooden glass metal"
).split()

# Words that carry the meaning are one piece each, never a colour and a shape that share their syllables.
WORDS = (
    *sorted((*scenes.PALETTE, *scenes.SHAPES, "background", "on", "the", "at", "an", "small", "large")),
    *("left", "right", "top", "bottom", "above", "below", "of"),
)


def _unknown_word(rng: random.Random) -> str:
    if rng.random() < 0.5:
        return rng.choice(FILLERS)
    return "".join(rng.choice(string.ascii_lowercase) for _ in range(rng.randint(2, 8)))


def varied(caption: str, rng: random.Random) -> str:
    """A caption as somebody might type it: mostly as it is; else with an opening, a closing, capitals, stray words."""
    if rng.random() < 0.6:
        return caption
    words = caption.split()
    if rng.random() < 0.5:
        words = ["an" if w == "a" and words[i + 1 : i + 2] == ["orange"] else w for i, w in enumerate(words)]
    if rng.random() < 0.3:
        for _ in range(rng.randint(1, 2)):
            words.insert(rng.randint(0, len(words)), _unknown_word(rng))
    text = " ".join(words)
    if rng.random() < 0.3:
        text = f"{rng.choice(OPENINGS)} {text}"
    if rng.random() < 0.3:
        text += rng.choice(CLOSINGS)
    return text[0].upper() + text[1:] if rng.random() < 0.3 else text


def corpus(count: int = 20_000) -> list[str]:
    """Captions to learn the tokenizers from, and every printable character at least a few times."""
    rng = random.Random(0)
    lines = [varied((scenes.two_objects if i % 2 else scenes.one_object)(rng).caption, rng) for i in range(count)]
    return lines + [" ".join(string.ascii_letters + string.digits + string.punctuation)] * 3 + list(FILLERS) * 20


def byte_pair_merges(lines: list[str], cleaning: Tokenizer, end: str) -> list[tuple[str, str]]:
    """The byte pairs to merge, most frequent first (arXiv 1508.07909), over words seen at least 50 times.

    Ties go to the alphabetically first pair, so that the result is the same on every machine.

    Args:
        cleaning: cleans texts and splits them into words.
        end: what marks the last byte of a word.
    """
    counts = Counter(
        word
        for line in lines
        for word, _ in cleaning.pre_tokenizer.pre_tokenize_str(cleaning.normalizer.normalize_str(line))  # pyright: ignore
    )
    words = {(*word[:-1], word[-1] + end): count for word, count in counts.items() if count >= 50}
    merges: list[tuple[str, str]] = []
    while True:
        pairs: Counter[tuple[str, str]] = Counter()
        for parts, count in words.items():
            for pair in pairwise(parts):
                pairs[pair] += count
        if not pairs:
            return merges
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        words = {_merged(parts, best): count for parts, count in words.items()}


def _merged(parts: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    merged: list[str] = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return tuple(merged)


def train_tokenizers(folder: Path) -> None:
    """Write CLIP's `tokenizer/vocab.json` and `merges.txt`, and T5's `tokenizer_2/spiece.model`, below `folder`."""
    (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer_2").mkdir(parents=True, exist_ok=True)
    lines = corpus()
    merges = byte_pair_merges(lines, clip_pipeline(Tokenizer(BPE())), "</w>")
    # The order of the published vocabulary: bytes, bytes that end a word, merges, the two special tokens.
    alphabet = sorted(ByteLevel.alphabet())
    tokens = [*alphabet, *(c + "</w>" for c in alphabet), *("".join(pair) for pair in merges), CLIP_START, CLIP_END]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), "utf-8")
    text = "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges)
    (folder / "tokenizer" / "merges.txt").write_text(text, "utf-8")
    pieces = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=pieces,
        model_type="unigram",
        vocab_size=NANO_T5.vocab_size,
        hard_vocab_limit=False,
        character_coverage=1.0,
        normalization_rule_name="nmt_nfkc_cf",  # lower case, as the captions are
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        user_defined_symbols=["\u2581" + word for word in WORDS],
        minloglevel=2,
    )
    (folder / "tokenizer_2" / "spiece.model").write_bytes(pieces.getvalue())


class TextEncoders(nn.Module):
    """Both text encoders with their tokenizers, trainable together with the transformer."""

    def __init__(self, clip_tokenizer: TextTokenizer, t5_tokenizer: TextTokenizer) -> None:
        super().__init__()
        self.clip_tokenizer, self.t5_tokenizer = clip_tokenizer, t5_tokenizer
        assert clip_tokenizer.end == NANO_CLIP.eos_token_id, "the registry states another vocabulary"
        self.clip = ClipTextEncoder(NANO_CLIP)
        self.t5 = T5Encoder(NANO_T5)
        for module in self.modules():  # small embeddings: the first steps of the transformer should not be noise
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.5 if module is self.t5.shared else 0.05)

    def forward(self, prompts: list[str], length: int = T5_LENGTH, masked: bool = False) -> TextEmbedding:
        """What the transformer reads: T5's `length` tokens, with their padding masked or not, and CLIP's vector."""
        ids = self.clip_tokenizer(prompts, CLIP_LENGTH)
        used = int((ids == self.clip_tokenizer.end).int().argmax(dim=1).max()) + 1  # the rest is causally invisible
        _, pooled = self.clip(ids[:, :used])
        tokens = self.t5_tokenizer(prompts, length)
        mask = tokens != self.t5_tokenizer.pad if masked else None
        return TextEmbedding(self.t5(tokens, mask), pooled, mask)
