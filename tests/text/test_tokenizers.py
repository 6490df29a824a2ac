"""The tokenizers: exact ids from every file form, padding and cutting, and refusal of files of another kind."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from miniflux.errors import InputError, TokenizerError
from miniflux.text import load_clip_tokenizer, load_t5_tokenizer
from miniflux.text.tokenizers import TextTokenizer
from tests import reference

Tokenizers = Callable[[str], Path]
START, END = "<|startoftext|>", "<|endoftext|>"


@pytest.fixture(scope="module")
def prompts() -> list[dict]:
    return reference.prompts()


def wrong(tokenizer: TextTokenizer, prompts: list[dict], expected: list[list[int]], length: int) -> dict:
    """Prompts whose ids differ: {name: (ours, expected)}."""
    rows = tokenizer([p["text"] for p in prompts], length)
    assert rows.shape == (len(prompts), length)
    assert rows.dtype == torch.int64
    pairs = zip(prompts, rows.tolist(), expected, strict=True)
    return {p["name"]: (ours, theirs) for p, ours, theirs in pairs if ours != theirs}


@pytest.mark.parametrize("form", ["folder", "vocab.json", "merges.txt", "tokenizer.json", "folder with tokenizer.json"])
def test_clip_ids(tokenizer: Tokenizers, prompts: list[dict], tmp_path: Path, form: str) -> None:
    """All 77 ids of 70 prompts: unicode, emoji, control characters, digits, special tokens in the text."""
    path = tokenizer("clip_l")
    if "tokenizer.json" in form:
        transformers = pytest.importorskip("transformers")
        theirs = transformers.CLIPTokenizer.from_pretrained(path).backend_tokenizer
        theirs.enable_padding(length=99)  # as some published files have it: must be undone
        theirs.enable_truncation(5)
        theirs.save(str(tmp_path / "tokenizer.json"))
        path = tmp_path
    tokenizer = load_clip_tokenizer(path if form.startswith("folder") else path / form)
    assert not wrong(tokenizer, prompts, [p["clip_77"] for p in prompts], 77)


@pytest.mark.parametrize("length", [512, 256])
@pytest.mark.parametrize("form", ["folder", "tokenizer.json", "spiece.rebuilt.model", "folder with spiece.model"])
def test_t5_ids(tokenizer: Tokenizers, prompts: list[dict], tmp_path: Path, form: str, length: int) -> None:
    """All ids of 70 prompts, padded and cut to both lengths that FLUX uses."""
    path = tokenizer("t5_v1_1_xxl")
    if form == "folder with spiece.model":
        shutil.copy(path / "spiece.rebuilt.model", tmp_path / "spiece.model")
        path = tmp_path
    tokenizer = load_t5_tokenizer(path if form.startswith("folder") else path / form)
    ids = [p["t5_512"] if p[f"t5_{length}"] == "same as t5_512" else p[f"t5_{length}"] for p in prompts]
    assert not wrong(tokenizer, prompts, [row + [0] * (length - len(row)) for row in ids], length)


# From here on: a CLIP tokenizer of one merge and a T5 tokenizer of a few sentences, made on the spot.


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """256 bytes, each also as the end of a word, `at</w>`, `cat</w>` and the two special tokens."""
    folder = tmp_path_factory.mktemp("clip")
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's table: the others move beyond 255
    others = (chr(256 + i) for i in range(256))
    letters = [chr(b) if b in printable else next(others) for b in range(256)]
    pieces = [*letters, *(c + "</w>" for c in letters), "at</w>", "cat</w>", START, END]
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}), "utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\na t</w>\nc at</w>\n", "utf-8")
    return folder


def train_pieces(folder: Path, **options: int) -> Path:
    """A SentencePiece model with T5's special pieces unless told otherwise."""
    sentences = ["a photo of a cat", "a red square on a blue ground", "two cats and a dog"] * 20
    size = {"vocab_size": 30, "hard_vocab_limit": False}
    special = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1} | options
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=model, minloglevel=2, num_threads=1, **size, **special
    )
    path = folder / "spiece.model"
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="module")
def clip(clip_folder: Path) -> TextTokenizer:
    return load_clip_tokenizer(clip_folder)


@pytest.fixture(scope="module")
def t5_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_pieces(tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="module")
def t5(t5_file: Path) -> TextTokenizer:
    return load_t5_tokenizer(t5_file)


def test_clip_by_hand(clip: TextTokenizer) -> None:
    """Lower case, one space, merges in order, one token per digit, `</w>` on the last byte of a word."""
    at, cat, start, end = 512, 513, 514, 515
    assert clip.tokens("  CAT \n at") == [start, cat, at, end]
    assert clip.tokens("bat") == [start, ord("b"), at, end]
    assert clip.tokens("12") == [start, 256 + ord("1"), 256 + ord("2"), end]
    assert clip.tokens("é") == clip.tokens("e\u0301") == [start, 0xC3, 256 + 0xA9, end]
    assert clip("cat", 5).tolist() == [[start, cat, end, end, end]]
    assert clip(["cat", "bat"], 3).tolist() == [[start, cat, end], [start, ord("b"), end]]


def test_t5_specials_by_hand(t5: TextTokenizer, t5_file: Path) -> None:
    """Special tokens written in the text become their ids; a name that only looks like one stays text."""
    model = SentencePieceProcessor(model_file=str(t5_file))
    size, cat = model.get_piece_size(), model.encode("cat")
    assert t5.tokens("<extra_id_0>cat</s><extra_id_99>") == [size + 99, *cat, 1, size, 1]
    assert t5.tokens("<pad><unk>") == [0, 2, 1]
    assert t5.tokens("<extra_id_100>") == [*model.encode("<extra_id_100>"), 1]


@pytest.mark.parametrize("which", ["clip", "t5"])
@given(texts=st.lists(st.text(max_size=30), max_size=3), length=st.integers(2, 12))
def test_rows(request: pytest.FixtureRequest, which: str, texts: list[str], length: int) -> None:
    """Whatever the text: a row of the asked length that starts and ends right, and is a prefix of all its tokens."""
    tokenizer: TextTokenizer = request.getfixturevalue(which)
    rows = tokenizer(texts, length)
    assert rows.shape == (len(texts), length)
    assert rows.dtype == torch.int64
    for text, row in zip(texts, rows.tolist(), strict=True):
        tokens = tokenizer.tokens(text)
        assert tokens[: len(tokenizer.start)] == list(tokenizer.start)
        assert tokens[-1] == tokenizer.end
        if len(tokens) > length:
            assert row == [*tokens[: length - 1], tokenizer.end]
        else:
            assert row == tokens + [tokenizer.pad] * (length - len(tokens))


def test_one_prompt_is_a_batch_of_one(t5: TextTokenizer) -> None:
    """A string is not a list of its letters."""
    assert torch.equal(t5("a cat", 6), t5(["a cat"], 6))


@pytest.mark.parametrize("length", [1, 0, -3])
def test_length_must_hold_the_special_tokens(clip: TextTokenizer, length: int) -> None:
    """A length without room for start and end cannot be honoured."""
    with pytest.raises(InputError, match=f"max_length must be at least 2, got {length}"):
        clip(["cat"], length)


def test_t5_length_has_room_for_the_end(t5: TextTokenizer) -> None:
    """T5 has no start token, so one id is enough."""
    assert t5("a cat", 1).tolist() == [[1]]
    with pytest.raises(InputError, match="max_length must be at least 1, got 0"):
        t5("a cat", 0)


@pytest.mark.parametrize("load", [load_clip_tokenizer, load_t5_tokenizer])
def test_nothing_there(load, tmp_path: Path) -> None:
    """An empty folder and a path that does not exist; the message says what was expected."""
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "nowhere" / "tokenizer.json"):
        with pytest.raises(TokenizerError, match=r"expected .*tokenizer\.json"):
            load(path)


def test_misspelt_folder_beside_a_tokenizer(clip_folder: Path) -> None:
    """A folder that does not exist must not be answered with the files of its parent."""
    with pytest.raises(TokenizerError, match="tokenzier"):
        load_clip_tokenizer(clip_folder / "tokenzier")


@pytest.mark.parametrize("load", [load_clip_tokenizer, load_t5_tokenizer])
@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": "1.0"}', "\0binary"])
def test_broken_tokenizer_json(load, tmp_path: Path, content: str) -> None:
    """What is no tokenizer file is refused with its path."""
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(TokenizerError, match=r"cannot read .*tokenizer\.json"):
        load(tmp_path)


@pytest.mark.parametrize("load", [load_clip_tokenizer, load_t5_tokenizer])
def test_tokenizer_json_of_another_model(load, tmp_path: Path) -> None:
    """A valid tokenizer without the special tokens of this one would pad and end with the wrong ids."""
    Tokenizer(WordLevel({"cat": 0, "[UNK]": 1}, unk_token="[UNK]")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match=r"is no (CLIP|T5) tokenizer: .* not in its vocabulary"):
        load(tmp_path)


@pytest.mark.parametrize("vocab", ["{", "[]", "[1, 2]", '{"a": "b"}', '{"a": 1}', '"text"', "\0"])
def test_broken_clip_vocabulary(clip_folder: Path, tmp_path: Path, vocab: str) -> None:
    """No JSON, JSON of another kind, or a vocabulary that lacks the pieces of the merges."""
    shutil.copy(clip_folder / "merges.txt", tmp_path)
    (tmp_path / "vocab.json").write_text(vocab)
    with pytest.raises(TokenizerError, match=str(tmp_path)):
        load_clip_tokenizer(tmp_path)


def test_clip_files_that_are_not_text(clip_folder: Path, tmp_path: Path) -> None:
    """A merges file that is not UTF-8."""
    shutil.copy(clip_folder / "vocab.json", tmp_path)
    (tmp_path / "merges.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(TokenizerError, match="cannot read"):
        load_clip_tokenizer(tmp_path)


def test_clip_vocabulary_without_special_tokens(clip_folder: Path, tmp_path: Path) -> None:
    """Adding them at the end would give them ids the model has never seen."""
    vocab = json.loads((clip_folder / "vocab.json").read_text("utf-8"))
    del vocab[START], vocab[END]
    (tmp_path / "vocab.json").write_text(json.dumps(vocab), "utf-8")
    shutil.copy(clip_folder / "merges.txt", tmp_path)
    with pytest.raises(TokenizerError, match="not in its vocabulary"):
        load_clip_tokenizer(tmp_path)


def test_half_of_the_clip_files(clip_folder: Path, tmp_path: Path) -> None:
    """A vocabulary without merges is no tokenizer."""
    shutil.copy(clip_folder / "vocab.json", tmp_path)
    with pytest.raises(TokenizerError, match=r"expected vocab\.json and merges\.txt"):
        load_clip_tokenizer(tmp_path / "vocab.json")


def test_broken_pieces(tmp_path: Path) -> None:
    """A file that is no SentencePiece model."""
    (tmp_path / "spiece.model").write_bytes(b"junk" * 100)
    with pytest.raises(TokenizerError, match="not a SentencePiece model"):
        load_t5_tokenizer(tmp_path)


@pytest.mark.parametrize("options", [{"pad_id": -1}, {"eos_id": -1}, {"eos_piece": "<end>"}])
def test_pieces_of_another_model(tmp_path: Path, options: dict) -> None:
    """Without T5's end and padding pieces (as in LLaMA's files) every row would be padded with -1, or end wrongly."""
    with pytest.raises(TokenizerError, match="is no T5 tokenizer"):
        load_t5_tokenizer(train_pieces(tmp_path, **options))
