"""From prompts to what the transformer reads: T5's tokens, CLIP's summary, and the cache between."""

from __future__ import annotations

import logging
import threading
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

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


def check_padding(padding: str) -> None:
    """Raises InputError unless it is one of `Padding`."""
    if padding not in get_args(Padding):
        raise InputError(f"padding must be one of {', '.join(get_args(Padding))}, got {padding!r}")


@dataclass(frozen=True)
class TextEmbedding:
    """What the transformer needs to know of B prompts.

    Attributes:
        txt: T5's hidden states (B, T, d_model).
        vec: CLIP's pooled vectors (B, hidden).
        mask: (B, T) booleans, False for padding that is not attended to; None when all is.
    """

    txt: Tensor
    vec: Tensor
    mask: Tensor | None


@dataclass(frozen=True)
class _Entry:
    txt: Tensor
    vec: Tensor
    count: int


class Text:
    """The text side of FLUX.1: both encoders, both tokenizers, and a cache of the last prompts.

    Args:
        length: T5 tokens a prompt is padded or cut to, unless a call says otherwise.
        cache_size: prompts whose embeddings are kept; the least recently used goes first.
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
        self.clip, self.t5 = clip, t5
        self.clip_tokenizer, self.t5_tokenizer = clip_tokenizer, t5_tokenizer
        self.length, self.cache_size = length, cache_size
        self.encoded = 0  # prompts that went through the encoders, not the cache
        self._cache: OrderedDict[tuple[str, int, bool], _Entry] = OrderedDict()
        self._lock = threading.Lock()
        self._said_clip_limit = False

    @torch.inference_mode()
    def encode(self, prompts: Sequence[str], length: int | None = None, padding: Padding = "released") -> TextEmbedding:
        """Embed prompts, in order; those seen before come from the cache.

        A prompt over CLIP's limit is no error: the summary vector sees its beginning, T5 sees all of it.

        Args:
            length: T5 tokens per prompt; None for the model's own (512 dev, 256 schnell).
            padding: see `Padding`.

        Raises:
            InputError: a prompt is no string or holds half a character, the length is below 1, or the padding has
                another name.
        """
        length = self.length if length is None else length
        if isinstance(length, bool) or not isinstance(length, int) or length < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InputError(f"t5_length must be a whole number of at least 1, got {length!r}")
        check_padding(padding)
        prompts = [repaired("a prompt", prompt) for prompt in prompts]
        masked = padding != "released"
        with self._lock:
            entries = [self._entry(prompt, length, masked) for prompt in prompts]
        txt, vec = torch.cat([entry.txt for entry in entries]), torch.cat([entry.vec for entry in entries])
        if not masked:
            return TextEmbedding(txt, vec, None)
        counts = torch.tensor([entry.count for entry in entries], device=txt.device)
        kept = int(counts.max()) if padding == "trimmed" else length
        return TextEmbedding(txt[:, :kept], vec, torch.arange(kept, device=txt.device) < counts[:, None])

    def _entry(self, prompt: str, length: int, masked: bool) -> _Entry:
        key = (prompt, length, masked)
        entry = self._cache.get(key)
        if entry is None:
            entry = self._cache[key] = self._embed(prompt, length, masked)
            if len(self._cache) > self.cache_size:
                self._cache.popitem(last=False)
        self._cache.move_to_end(key)
        return entry

    def _embed(self, prompt: str, length: int, masked: bool) -> _Entry:
        count, limit = len(self.t5_tokenizer.tokens(prompt)), self.clip.config.max_position_embeddings
        if count > length:
            warnings.warn(
                f"the prompt has {count} T5 tokens, {count - length} over the limit of {length}: its end was cut off",
                stacklevel=2,
            )
        if not self._said_clip_limit and len(self.clip_tokenizer.tokens(prompt)) > limit:
            self._said_clip_limit = True
            log.info("CLIP's summary vector sees the first %d tokens of the prompt; T5 sees all of it", limit)
        device = self.t5.encoder.final_layer_norm.weight.device  # in every memory mode
        count = min(count, length)
        mask = (torch.arange(length, device=device) < count)[None] if masked else None
        txt = self.t5(self.t5_tokenizer(prompt, length).to(device), mask)
        _, vec = self.clip(self.clip_tokenizer(prompt, limit).to(device))
        self.encoded += 1
        return _Entry(txt, vec, count)

    def clear(self) -> None:
        """Forget all cached prompts, after the encoders were changed."""
        with self._lock:
            self._cache.clear()
