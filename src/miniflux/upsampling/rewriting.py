"""A language model that writes a longer prompt: greedy or sampled, with keys and values kept.

Sources: `flux2/text_encoder.py` of the original release and `pipelines/flux2/pipeline_flux2.py` of diffusers (the form,
temperature 0.15, 2048 tokens read and 512 written); the chat templates of Mistral-Small, Qwen3 and Qwen3-VL.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from miniflux.checks import check_number, shown, whole
from miniflux.errors import CheckpointError, InputError, TokenizerError
from miniflux.models.causal_lm import CausalLm, KeyValues
from miniflux.strictjson import open_regular
from miniflux.text.chat import QWEN_USER
from miniflux.text.decoding import decoded, repaired

log = logging.getLogger(__name__)

MAX_SYSTEM = 1_000_000  # bytes of a file; the released texts have 5,000
MAX_NEW = 512  # tokens that are written, as in the release

SYSTEM = (
    "Rewrite the request of the user as one description of a picture: what is in it and where, what surrounds it, the "
    "light, the style. Keep everything that the request names, and every text in quotation marks as it stands. Answer "
    "with the description alone."
)
"""What a language model is to do where nobody says: words of ours, not those of the release."""


@dataclass(frozen=True)
class Turns:
    """How a language model is asked something.

    Attributes:
        begin: what stands before all.
        system, user: what stands around a system text, and around a prompt; the answer comes behind it.
        ends: tokens that end an answer, as far as the vocabulary has them; the first one it must have.
        left_out: texts that are taken out of a prompt: the model would read them as something else.
        temperature: the release's, where it gives one; else 0.
    """

    begin: str
    system: tuple[str, str]
    user: tuple[str, str]
    ends: tuple[str, ...]
    left_out: tuple[str, ...] = ()
    temperature: float = 0.0

    def text(self, prompt: str, system: str | None) -> str:
        """All that the model reads."""
        for text in self.left_out:
            prompt = prompt.replace(text, "")
        before = "" if system is None else system.join(self.system)
        return self.begin + before + prompt.join(self.user)


MISTRAL = Turns("<s>", ("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"), ("[INST]", "[/INST]"), ("</s>",), ("[IMG]",), 0.15)
"""FLUX.2 dev: Mistral-Small."""
QWEN_VL = Turns("", ("<|im_start|>system\n", "<|im_end|>\n"), QWEN_USER, ("<|im_end|>", "<|endoftext|>"))
"""Qwen3-VL, which has no thoughts to switch off."""
QWEN = replace(QWEN_VL, user=(QWEN_USER[0], f"{QWEN_USER[1]}<think>\n\n</think>\n\n"))
"""Qwen3 with thinking switched off."""
KNOWN = {"[INST]": MISTRAL, "<|im_start|>": QWEN}


class Upsampler:
    """Rewrites prompts with a language model.

    Args:
        lm: all of it: the layers after those that a transformer reads, the last norm and the output layer, too.
        tokenizer: the model's own, as `load_tokenizer` gives it.
        turns: how it is asked; None to tell it from the vocabulary.

    Raises:
        InputError: the model is there in part only, or has a smaller vocabulary than the tokenizer.
        TokenizerError: the vocabulary has the marks of no known form.
    """

    def __init__(self, lm: CausalLm, tokenizer: Tokenizer, turns: Turns | None = None) -> None:
        if lm.config.layers_read is not None:
            raise InputError(
                f"a language model writes with all of its {lm.config.num_hidden_layers} layers, and of this one "
                f"{lm.config.layers_read} are there: it reads prompts only"
            )
        if tokenizer.get_vocab_size() > lm.config.vocab_size:
            raise InputError(
                f"the tokenizer has {tokenizer.get_vocab_size()} tokens and the language model {lm.config.vocab_size}: "
                "they do not belong together"
            )
        known = (turns for mark, turns in KNOWN.items() if tokenizer.token_to_id(mark) is not None)
        turns = turns or next(known, None)
        if turns is None:
            raise TokenizerError(f"no token of this vocabulary begins a turn: expected {' or '.join(KNOWN)}")
        ends = [tokenizer.token_to_id(end) for end in turns.ends]
        if ends[0] is None:
            raise TokenizerError(f"{turns.ends[0]} is no token of this vocabulary, and an answer ends with it")
        self.lm, self.tokenizer, self.turns = lm, tokenizer, turns
        self.ends = frozenset(end for end in ends if end is not None)

    def rewrite(
        self,
        prompt: str,
        *,
        system: str | Path | None = None,
        temperature: float = 0.0,
        max_new_tokens: int = MAX_NEW,
        seed: int = 0,
        length: int = 2048,
        images: Sequence[object] | None = None,
    ) -> str:
        """What the language model answers to a prompt, without the white space around it.

        The release pads what is read to 2048 tokens on the left. Nothing looks at that padding and positions count
        behind it, so it changes nothing; here there is none.

        Args:
            prompt: what to rewrite.
            system: what the model is to do: a text, or a `Path` of a file that holds it. None for no system turn. The
                texts of the release are in its `flux2/system_messages.py`.
            temperature: 0 takes the likeliest token each time; above it, tokens are drawn from
                softmax(logits / temperature). The release has 0.15 for FLUX.2 dev.
            max_new_tokens: after so many the answer is cut, with a warning.
            seed: of the draws, which are made on the CPU; it counts for nothing at temperature 0.
            length: tokens that may be read. A longer prompt is refused: cut, it would lose the mark that ends the
                turn, and the model would write on instead of answering.
            images: refused.

        Raises:
            InputError: an argument is outside its range, there is more to read than `length`, images are given, or the
                model answers nothing.
        """
        if images is not None:
            raise InputError(
                f"images: {len(images)} given; the language model alone is here, and pictures are seen by a vision "
                "encoder before it (Pixtral in FLUX.2 dev), which is not: rewrite the prompt without them"
            )
        temperature = check_number("temperature", temperature, 0)
        max_new_tokens, length = whole("max_new_tokens", max_new_tokens, 1), whole("length", length, 1)
        generator = torch.Generator().manual_seed(whole("seed", seed, 0, 2**64 - 1))
        text = self.turns.text(repaired("the prompt", prompt), system_text(system))
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        if len(ids) > length:
            raise InputError(
                f"the prompt has {len(ids)} tokens with what stands around it, {len(ids) - length} over the limit of "
                f"{length}: shorten it, or give a larger length"
            )
        started = time.monotonic()
        said = generate(self.lm, ids, self.ends, max_new_tokens, temperature, generator)
        log.info("%d tokens read, %d written in %.1f s", len(ids), len(said), time.monotonic() - started)
        if len(said) == max_new_tokens:
            warnings.warn(
                f"the answer was cut off after {max_new_tokens} tokens: give more max_new_tokens", stacklevel=2
            )
        answer = self.tokenizer.decode(said, skip_special_tokens=True).strip()
        if not answer:
            raise InputError(f"the language model answered nothing to {shown(prompt)}")
        return answer


def system_text(given: str | Path | None) -> str | None:
    """The system text that is meant. A file's last end of line, which editors add, is no part of it.

    Raises:
        InputError: it is empty, or its file cannot be read.
    """
    if given is None:
        return None
    if isinstance(given, str):
        what, text = "system", repaired("system", given)
    elif isinstance(given, Path):  # pyright: ignore[reportUnnecessaryIsInstance]
        what = f"system {given}"
        try:
            with open_regular(given) as file:
                data = file.read(MAX_SYSTEM + 1)
        except (OSError, CheckpointError) as error:
            raise InputError(f"{what} cannot be read: {getattr(error, 'strerror', None) or error}") from error
        if len(data) > MAX_SYSTEM:
            raise InputError(f"{what} has more than {MAX_SYSTEM:,} bytes, which are not read")
        text = decoded(what, data).removesuffix("\n").removesuffix("\r")
    else:
        raise InputError(f"system must be a text, a Path of a file, or None, got {shown(given)}")
    if not text.strip():
        raise InputError(f"{what} is empty; give what the model is to do, or None for no system turn")
    return text


@torch.inference_mode()
def generate(
    lm: CausalLm,
    ids: Sequence[int],
    ends: Collection[int],
    max_new_tokens: int,
    temperature: float,
    generator: torch.Generator,
) -> list[int]:
    """The tokens that a language model writes behind others.

    Args:
        ids: what it reads, without padding.
        ends: it stops before it writes one of these,
        max_new_tokens: and after so many.
        temperature, generator: see `next_token`.

    Raises:
        InputError: there is nothing to read, or logits are not finite.
    """
    if not ids:
        raise InputError("a language model writes on; there must be at least one token before")
    cache, said, new = KeyValues(), list[int](), torch.tensor([list(ids)])
    while len(said) < max_new_tokens:
        (hidden,) = lm(new.to(lm.device), cache=cache)
        token = next_token(lm.logits(hidden[0, -1]), temperature, generator)
        if token in ends:
            break
        said.append(token)
        new = torch.tensor([[token]])
    return said


def next_token(logits: Tensor, temperature: float, generator: torch.Generator) -> int:
    """The likeliest token at temperature 0, else one drawn from softmax(logits / temperature).

    Args:
        logits: (vocab_size).
        generator: on the CPU, so that the same seed draws the same number on every device.

    Raises:
        InputError: logits are not finite, which float16 makes of large models.
    """
    logits = logits.double().cpu()
    if not torch.isfinite(logits).all():
        raise InputError("the language model gave numbers that are not finite: compute in bfloat16 or float32")
    if not temperature:
        return int(logits.argmax())
    likely = ((logits - logits.max()) / temperature).softmax(0)  # from the largest: no temperature is too small
    return int(torch.multinomial(likely, 1, generator=generator))
