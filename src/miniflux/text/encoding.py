"""From prompts to what the transformer reads: text encoders at work, and the cache of what they said."""

from __future__ import annotations

import logging
import threading
import warnings
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from miniflux.errors import InputError
from miniflux.models.clip import ClipTextEncoder
from miniflux.models.t5 import T5Encoder
from miniflux.text.decoding import repaired
from miniflux.text.tokenizers import TextTokenizer

log = logging.getLogger(__name__)

Padding = Literal["released", "masked", "trimmed"]
"""What happens to the empty places behind a short prompt.

released: they are padding that everybody attends to, as FLUX.1 was trained and released.
masked: they are padding that nobody attends to.
trimmed: as masked, and cut to the longest prompt, which costs less time.
"""


def check_padding(padding: str, known: Sequence[str] = get_args(Padding)) -> None:
    """Raises InputError unless it is one of `Padding`, and of those that a model knows."""
    if padding not in known:
        raise InputError(f"padding must be one of {', '.join(known)}, got {padding!r}")


@dataclass(frozen=True)
class TextEmbedding:
    """What the transformer needs to know of B prompts.

    Attributes:
        txt: hidden states (B, T, width): T5's, or of the chosen layers of a language model side by side.
        vec: CLIP's pooled vectors (B, hidden); None of language models.
        mask: (B, T) booleans, False for padding that is not attended to; None when all is.
    """

    txt: Tensor
    vec: Tensor | None
    mask: Tensor | None


@dataclass(frozen=True)
class Read:
    """One prompt that was read: hidden states (1, T, width), summary (1, hidden), and how many tokens are its own."""

    txt: Tensor
    vec: Tensor | None
    count: int


_anew: ContextVar[bool] = ContextVar("anew", default=False)


@contextmanager
def read_anew() -> Generator[None]:
    """In here, in this thread, every prompt is read, and none is kept: for those who look into the encoders, or change
    them."""
    token = _anew.set(True)
    try:
        yield
    finally:
        _anew.reset(token)


class TextReader(ABC):
    """What reads prompts: text encoders, tokenizers, and a cache of the last prompts.

    Attributes:
        length: tokens that a prompt is padded or cut to, unless a call says otherwise; None for what it needs.
        cache_size: prompts whose embeddings are kept; the least recently used goes first.
        encoded: prompts that went through the encoders, not the cache.
        paddings: what may become of the places behind a short prompt.
    """

    paddings: tuple[Padding, ...] = get_args(Padding)

    def __init__(self, length: int | None, cache_size: int) -> None:
        self.length, self.cache_size = length, cache_size
        self.encoded = 0
        self._cache: OrderedDict[tuple[str, int | None, bool], Read] = OrderedDict()
        self._lock = threading.Lock()

    @property
    @abstractmethod
    def networks(self) -> dict[str, nn.Module]:
        """The encoders by their parts of a model, in the order in which they run."""

    @property
    @abstractmethod
    def tokenizers(self) -> dict[str, Any]:
        """The tokenizers, likewise."""

    @abstractmethod
    def _embed(self, prompt: str, length: int | None, masked: bool) -> Read:
        """Read one prompt. `masked`: padding is not attended to."""

    @torch.inference_mode()
    def encode(self, prompts: Sequence[str], length: int | None = None, padding: Padding = "released") -> TextEmbedding:
        """Embed prompts, in order; those seen before come from the cache.

        A prompt over CLIP's limit is no error: the summary vector sees its beginning, T5 sees all of it.

        Args:
            prompts: several only where all have one length.
            length: tokens per prompt; None for the model's own (512 dev, 256 schnell).
            padding: see `Padding`.

        Raises:
            InputError: a prompt is no string or holds half a character, the length is below 1, or the padding has
                another name or is not for this model.
        """
        length = self.length if length is None else length
        if length is not None and (isinstance(length, bool) or not isinstance(length, int) or length < 1):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InputError(f"t5_length must be a whole number of at least 1, got {length!r}")
        check_padding(padding, self.paddings)
        prompts = [repaired("a prompt", prompt) for prompt in prompts]
        masked = padding != "released"
        with self._lock:
            read = [self._read(prompt, length, masked) for prompt in prompts]
        txt, vecs = torch.cat([one.txt for one in read]), [one.vec for one in read if one.vec is not None]
        vec = torch.cat(vecs) if vecs else None
        if not masked:
            return TextEmbedding(txt, vec, None)
        counts = torch.tensor([one.count for one in read], device=txt.device)
        places = torch.arange(txt.shape[1], device=txt.device)
        mask = self._own(places, counts[:, None], txt.shape[1])
        kept = int(counts.max()) if padding == "trimmed" else txt.shape[1]
        return TextEmbedding(txt[:, :kept], vec, mask[:, :kept])

    def _own(self, places: Tensor, counts: Tensor, length: int) -> Tensor:
        """Which places are a prompt's own, and no padding."""
        return places < counts

    def _read(self, prompt: str, length: int | None, masked: bool) -> Read:
        key = (prompt, length, masked)
        found = None if _anew.get() else self._cache.get(key)
        if found is None:
            found = self._embed(prompt, length, masked)
            self.encoded += 1
        if _anew.get():
            return found
        self._cache[key] = found
        if len(self._cache) > self.cache_size:
            self._cache.popitem(last=False)
        self._cache.move_to_end(key)
        return found

    def clear(self) -> None:
        """Forget all cached prompts, after the encoders were changed."""
        with self._lock:
            self._cache.clear()


class Text(TextReader):
    """The text side of FLUX.1: both encoders and both tokenizers.

    Args:
        length: T5 tokens a prompt is padded or cut to, unless a call says otherwise.
        cache_size: see `TextReader`.
    """

    def __init__(
        self,
        clip: ClipTextEncoder,
        t5: T5Encoder,
        clip_tokenizer: TextTokenizer,
        t5_tokenizer: TextTokenizer,
        length: int,
        cache_size: int = 32,
    ) -> None:
        super().__init__(length, cache_size)
        self.clip, self.t5 = clip, t5
        self.clip_tokenizer, self.t5_tokenizer = clip_tokenizer, t5_tokenizer
        self._said_clip_limit = False

    @property
    def networks(self) -> dict[str, nn.Module]:
        return {"clip": self.clip, "t5": self.t5}

    @property
    def tokenizers(self) -> dict[str, Any]:
        return {"clip_tokenizer": self.clip_tokenizer, "t5_tokenizer": self.t5_tokenizer}

    def _embed(self, prompt: str, length: int | None, masked: bool) -> Read:
        assert length is not None
        count, limit = len(self.t5_tokenizer.tokens(prompt)), self.clip.config.max_position_embeddings
        warn_if_cut(count, length, "T5 tokens")
        if not self._said_clip_limit and len(self.clip_tokenizer.tokens(prompt)) > limit:
            self._said_clip_limit = True
            log.info("CLIP's summary vector sees the first %d tokens of the prompt; T5 sees all of it", limit)
        device = self.t5.encoder.final_layer_norm.weight.device  # in every memory mode
        count = min(count, length)
        mask = (torch.arange(length, device=device) < count)[None] if masked else None
        txt = self.t5(self.t5_tokenizer(prompt, length).to(device), mask)
        _, vec = self.clip(self.clip_tokenizer(prompt, limit).to(device))
        return Read(txt, vec, count)


def warn_if_cut(count: int, length: int, what: str) -> None:
    """Warns that a prompt is longer than what is read of it."""
    if count > length:
        warnings.warn(
            f"the prompt has {count} {what}, {count - length} over the limit of {length}: its end was cut off",
            stacklevel=2,
        )
