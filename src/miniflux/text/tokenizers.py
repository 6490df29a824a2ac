"""The two tokenizers of FLUX.1: CLIP's byte-level BPE and T5's SentencePiece unigram model.

Both return ids padded and cut as FLUX does. Where OpenAI's own CLIP tokenizer (which repairs broken unicode with ftfy
and unescapes HTML first) and the one of transformers differ, this follows transformers, as the FLUX releases do.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.normalizers import NFC, Lowercase, Replace
from tokenizers.normalizers import Sequence as Normalizers
from tokenizers.pre_tokenizers import ByteLevel, Split
from tokenizers.pre_tokenizers import Sequence as PreTokenizers
from torch import Tensor

from miniflux.errors import InputError, TokenizerError
from miniflux.strictjson import MAX_JSON, json_file
from miniflux.text.decoding import repaired
from miniflux.text.special import CLIP_END, CLIP_START, T5_END, T5_PAD, T5_UNKNOWN

# Contractions, runs of letters, single digits, runs of anything else but spaces (openai/CLIP, simple_tokenizer.py)
CLIP_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
T5_SPECIAL = re.compile(r"(<pad>|</s>|<unk>|<extra_id_\d{1,2}>)")


class TextTokenizer:
    """Prompts to ids of one fixed length.

    Attributes:
        start: ids put before every prompt.
        end: id put after every prompt, kept when the prompt is cut.
        pad: id that fills the rest.
    """

    def __init__(self, encode: Callable[[str], list[int]], start: tuple[int, ...], end: int, pad: int) -> None:
        self._encode = encode
        self.start, self.end, self.pad = start, end, pad

    def tokens(self, prompt: str) -> list[int]:
        """All ids of one prompt, start and end included, neither cut nor padded.

        Raises:
            InputError: it holds half a character.
        """
        return [*self.start, *self._encode(repaired("the prompt", prompt)), self.end]

    def __call__(self, prompts: str | Sequence[str], max_length: int) -> Tensor:
        """Ids (B, max_length), int64: cut on the right with the end id kept, padded on the right.

        Raises:
            InputError: there is no room for the start and end ids.
        """
        shortest = len(self.start) + 1
        if max_length < shortest:
            raise InputError(f"max_length must be at least {shortest}, got {max_length}")
        rows: list[list[int]] = []
        for prompt in [prompts] if isinstance(prompts, str) else prompts:
            ids = self.tokens(prompt)
            if len(ids) > max_length:
                ids = [*ids[: max_length - 1], self.end]
            rows.append(ids + [self.pad] * (max_length - len(ids)))
        return torch.tensor(rows, dtype=torch.long).reshape(len(rows), max_length)


def byte_words(tokenizer: Tokenizer, pattern: str) -> Tokenizer:
    """Give a bare BPE model words that a pattern splits off, as bytes, and the way back."""
    words = Split(Regex(pattern), behavior="isolated")
    bytewise = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = PreTokenizers([words, bytewise])  # pyright: ignore
    tokenizer.decoder = ByteLevelDecoder()  # pyright: ignore
    return tokenizer


def clip_pipeline(tokenizer: Tokenizer) -> Tokenizer:
    """Give a bare BPE model CLIP's text cleaning (NFC, one space, lower case) and word splitting."""
    tokenizer.normalizer = Normalizers([NFC(), Replace(Regex(r"\s+"), " "), Lowercase()])  # pyright: ignore
    tokenizer.pre_tokenizer = PreTokenizers(  # pyright: ignore
        [Split(Regex(CLIP_WORDS), behavior="removed", invert=True), ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


def load_clip_tokenizer(path: str | Path) -> TextTokenizer:
    """CLIP's tokenizer from `vocab.json` + `merges.txt`, or from `tokenizer.json`.

    Args:
        path: the folder that holds them (the `tokenizer` folder of FLUX.1), or one of the files.

    Raises:
        TokenizerError: a file is missing or cannot be read.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    single = path if path.name == "tokenizer.json" else folder / "tokenizer.json"
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    try:
        if not path.exists():
            raise TokenizerError(f"no {path}: expected a folder with vocab.json and merges.txt, or tokenizer.json")
        if path.name != "tokenizer.json" and vocab.is_file() and merges.is_file():
            vocabulary = json_file(vocab)
            pairs = [tuple(line.split()) for line in bounded(merges).read_text("utf-8").splitlines()]
            pairs = [(p[0], p[1]) for p in pairs if len(p) == 2 and p[0] != "#version:"]
            bpe = BPE(
                vocabulary,
                pairs,
                unk_token=CLIP_END,
                continuing_subword_prefix="",
                end_of_word_suffix="</w>",
            )
            tokenizer = clip_pipeline(Tokenizer(bpe))
            if CLIP_START in vocabulary and CLIP_END in vocabulary:  # never as new ids: refused below
                tokenizer.add_special_tokens([AddedToken(token, special=True) for token in (CLIP_START, CLIP_END)])
        elif single.is_file():
            tokenizer = from_json(single)
        else:
            raise TokenizerError(f"no CLIP tokenizer in {path}: expected vocab.json and merges.txt, or tokenizer.json")
    except TokenizerError:
        raise
    except Exception as error:  # the library raises bare Exception for merges that do not fit the vocabulary
        raise TokenizerError(f"cannot read {path}: {error}") from error
    start, end = tokenizer.token_to_id(CLIP_START), tokenizer.token_to_id(CLIP_END)
    if start is None or end is None:
        raise TokenizerError(f"{path} is no CLIP tokenizer: {CLIP_START} and {CLIP_END} are not in its vocabulary")
    return TextTokenizer(_plain(tokenizer), (start,), end, end)


def load_t5_tokenizer(path: str | Path) -> TextTokenizer:
    """T5's tokenizer from `tokenizer.json`, or from `spiece.model`.

    Args:
        path: the folder that holds them (the `tokenizer_2` folder of FLUX.1), or one of the files. In a folder with
            both, `tokenizer.json` is read.

    Raises:
        TokenizerError: a file is missing or cannot be read.
    """
    path = Path(path)
    single = path / "tokenizer.json" if path.is_dir() else path
    pieces = path / "spiece.model" if path.is_dir() else path
    if single.is_file() and single.suffix == ".json":
        tokenizer = from_json(single)
        pad, end = tokenizer.token_to_id(T5_PAD), tokenizer.token_to_id(T5_END)
        if pad is None or end is None:
            raise TokenizerError(f"{path} is no T5 tokenizer: {T5_PAD} and {T5_END} are not in its vocabulary")
        return TextTokenizer(_plain(tokenizer), (), end, pad)
    if not pieces.is_file():
        raise TokenizerError(f"no T5 tokenizer in {path}: expected tokenizer.json or spiece.model")
    try:
        model = SentencePieceProcessor(model_file=str(bounded(pieces)))
    except (OSError, RuntimeError) as error:
        raise TokenizerError(f"cannot read {pieces}: not a SentencePiece model") from error
    for name, number, piece in (("end", model.eos_id(), T5_END), ("padding", model.pad_id(), T5_PAD)):
        if number < 0 or model.id_to_piece(number) != piece:  # -1: the model has none
            raise TokenizerError(f"{pieces} is no T5 tokenizer: its {name} piece is not {piece}")
    return TextTokenizer(_pieces(model), (), model.eos_id(), model.pad_id())


def bounded(path: Path, most: int = MAX_JSON) -> Path:
    """The path, if the file is not too large to be a tokenizer's: those of CLIP and T5 have 2.5 MB at most."""
    size = path.stat().st_size
    if size > most:
        raise TokenizerError(f"{path}: {size:,} bytes; a tokenizer's file of more than {most:,} is not read")
    return path


def from_json(path: Path, most: int = MAX_JSON) -> Tokenizer:
    """A tokenizer as `tokenizer.json` describes it, without padding or cutting; errors as of `bounded`."""
    try:
        tokenizer = Tokenizer.from_file(str(bounded(path, most)))
    except TokenizerError:
        raise
    except Exception as error:  # the library raises bare Exception for every kind of bad file
        raise TokenizerError(f"cannot read {path}: {error}") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _plain(tokenizer: Tokenizer) -> Callable[[str], list[int]]:
    return lambda prompt: tokenizer.encode(prompt, add_special_tokens=False).ids


def _pieces(model: SentencePieceProcessor) -> Callable[[str], list[int]]:
    """Encoding with the special tokens recognised in the text, which SentencePiece alone would spell out.

    T5 numbers `<extra_id_0>` ... `<extra_id_99>` downwards after the pieces of the model.
    """

    def encode(prompt: str) -> list[int]:
        ids: list[int] = []
        for part in T5_SPECIAL.split(prompt):
            if part.startswith("<extra_id_") and T5_SPECIAL.fullmatch(part):
                ids.append(model.get_piece_size() + 99 - int(part[len("<extra_id_") : -1]))
            elif T5_SPECIAL.fullmatch(part):
                ids.append({T5_PAD: model.pad_id(), T5_END: model.eos_id(), T5_UNKNOWN: model.unk_id()}[part])
            elif part:
                ids.extend(model.encode(part))
        return ids

    return encode
