"""A resolved call at work: words, noise from a picture's seed, denoising, pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from typing import Any, Protocol, cast

import torch
from PIL import Image
from torch import Tensor

from miniflux.cache import Drawn
from miniflux.conditions import Added, Scene, joined
from miniflux.conditions.once import look, remembering
from miniflux.errors import MinifluxError
from miniflux.memory.bands import through
from miniflux.memory.lanes import Start, directly
from miniflux.memory.modes import Memory
from miniflux.memory.modulation import foreseen
from miniflux.models.autoencoder import Autoencoder, Flux2Autoencoder
from miniflux.models.flux1 import run_block
from miniflux.models.layers import attention
from miniflux.models.transformer import Transformer
from miniflux.pictures import from_image
from miniflux.plan import Plan, Watchers
from miniflux.result import psnr, to_image
from miniflux.sampling import Bill, Moment, Told, Words, add_noise, denoise, initial_noise, step_noise, varied_noise
from miniflux.sampling.denoising import model_calls
from miniflux.text import TextReader


def of_each(shared: Tensor, count: int) -> Tensor:
    """What all pictures of a batch share (1, ...), for each of them (count, ...)."""
    return shared.expand(count, *shared.shape[1:])


class Parts(Protocol):
    """What a pipeline draws with."""

    transformer: Transformer
    autoencoder: Autoencoder | Flux2Autoencoder
    text: TextReader
    memory: Memory | None

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...


@dataclass(frozen=True)
class _Begun:
    """What the pictures of a call share: the words of each prompt, the other texts, what conditions add."""

    texts: list[Words]
    negative: Words | None
    empty: Words | None
    added: Added


class Drawing:
    """One call at work.

    Attributes:
        begun: what its pictures share; None before the first of them, because where all were drawn before, no text is
            needed.
    """

    def __init__(self, parts: Parts, plan: Plan) -> None:
        self.parts, self.plan = parts, plan
        self.begun: _Begun | None = None

    def together(self, pictures: Sequence[int], divisor: int) -> list[int]:
        """Those of the pictures, from the first on, that can be drawn with it: their words are of one length, which
        divides so."""
        begun = self.begun = self.begun or self._begin()
        first, *others = pictures
        lengths = {i: begun.texts[i // self.plan.images].txt.shape[1] for i in pictures}
        same = takewhile(lambda i: lengths[i] == lengths[first] and not lengths[i] % divisor, others)
        return [first, *same]

    def draw(
        self, pictures: Sequence[int], watchers: Watchers, decode: Start[Drawn] = directly
    ) -> list[Callable[[], Drawn]]:
        """Pictures of these numbers, all in one batch. Each can be asked for; they are decoded as `decode` has it.

        Raises:
            MinifluxError: the numbers overflowed in this dtype; where decoding is not at once, when it is asked for.
        """
        plan = self.plan
        begun = self.begun = self.begun or self._begin()
        noise, start = torch.cat([self._noise(i) for i in pictures]), begun.added.start
        begin = noise if start is None else add_noise(start, 0.0, plan.levels[0], noise)
        for observer in plan.observers:
            observer.began(pictures)
        moments, bill = self._denoise(plan, begun, pictures, begin, noise, watchers)
        exact = None
        if plan.check_cache:
            alone = replace(plan, cache=None, observers=())
            ((exact,), _) = self._denoise(alone, begun, pictures, begin, noise, Watchers(pictures))
        about: dict[str, Any] = {}
        if len(pictures) > 1:
            about["batch"] = len(pictures)
        if plan.resume is not None:
            about["resumed"] = plan.resume.step
        if plan.cache is not None:
            about["cache"] = {**plan.cache_described(), "evaluated": bill.evaluated, "skipped": bill.skipped}

        def finished(moment: Moment, replaced: bool) -> Drawn:
            image = self._image(moment.picture if moment.step < moment.steps else moment.x, begun.added)
            said: dict[str, Any] = {**about, "replaced": True} if replaced else dict(about)
            if exact is not None:
                said["cache"] |= {
                    "latent_l2": float((moment.x - exact.x).norm() / exact.x.norm()),
                    "psnr": psnr(image, self._image(exact.x, begun.added)),
                }
            return Drawn(image, self._unpacked(moment.x).cpu(), said, moment)

        return [decode(partial(finished, *each)) for each in zip(moments, watchers.replaced, strict=True)]

    def _begin(self) -> _Begun:
        """T5's tokens and CLIP's summary of all texts, and the latents of the picture to change."""
        plan, memory = self.plan, self.parts.memory
        # Cut to the longest of a call, prompts would depend on each other.
        alone = plan.padding == "trimmed" or plan.t5_length is None
        groups = [[prompt] for prompt in plan.prompts] if alone else [plan.prompts]
        texts = [words for group in groups for words in self._words(group)]
        negative, empty = plan.negative or "", ""
        groups = [] if plan.guide is None else [[negative], [empty]] if plan.t5_length is None else [[negative, empty]]
        others = [words for group in groups for words in self._words(group)] or [None, None]
        if memory is not None:
            memory.free_text()
        scene = Scene(
            plan.family,
            self.parts.transformer.config,
            plan.width,
            plan.height,
            plan.rows,
            plan.columns,
            plan.levels,
            self._encode,
        )
        added = joined([condition.added(scene) for condition in plan.conditions])
        if plan.once and added.tokens is not None:
            added = self._remembered(added)
        if added.words is not None:
            texts = [added.words(words) for words in texts]
        return _Begun(texts, others[0], others[1], added)

    def _remembered(self, added: Added) -> Added:
        """What conditions add, with references looked at now instead of at every step. What they say is kept in RAM
        where blocks wait there, too."""
        assert added.tokens is not None and added.ids is not None
        memory, device, dtype = self.parts.memory, self.parts.device, self.parts.dtype
        waits = memory is not None and memory.transformer is not None
        tokens, ids = added.tokens.to(device, dtype), added.ids.to(device)
        kept = look(self.plan.family, self.parts.transformer, tokens, ids, torch.device("cpu") if waits else device)
        return replace(added, tokens=None, ids=None, wraps=(remembering(kept), *added.wraps))

    def _denoise(
        self, plan: Plan, begun: _Begun, pictures: Sequence[int], begin: Tensor, noise: Tensor, watch: Watchers
    ) -> tuple[list[Moment], Bill]:
        """The last moment of each picture's run, and what all cost."""
        bill, added, memory, count = Bill(), begun.added, self.parts.memory, len(pictures)
        device, dtype, model = self.parts.device, self.parts.dtype, self.parts.transformer
        arguments: dict[str, Any] = {
            "img": plan.family.pack(begin).to(device, dtype),
            "img_ids": plan.family.image_ids(count, plan.rows, plan.columns).to(device),
            "img_cond": None if added.channels is None else of_each(added.channels.to(device, dtype), count),
            "img_cond_seq": None if added.tokens is None else of_each(added.tokens.to(device, dtype), count),
            "img_cond_seq_ids": None if added.ids is None else of_each(added.ids.to(device), count),
            "txt": Words.joined([begun.texts[i // plan.images] for i in pictures]),
            "timesteps": plan.levels,
            "guidance": plan.guidance,
            "method": plan.method,
            "guide": plan.guide,
            "negative": None if begun.negative is None else Words.joined([begun.negative] * count),
            "empty": None if begun.empty is None else Words.joined([begun.empty] * count),
            "resume": plan.resume,
            "stop": plan.stop,
        }

        def kept(moment: Moment) -> Tensor:
            assert added.keep is not None
            latents = added.keep(plan.family.unpack(moment.x, *plan.sides), noise, moment.sigma)
            moment = replace(moment, x=plan.family.pack(latents))
            replaced = watch(moment)
            return moment.x if replaced is None else replaced

        def velocity(model: Transformer, told: Told, **hooks: Any) -> Tensor:
            for hear in added.hears:
                hear(told)
            return plan.family.velocity(model, told, **hooks)

        calls = partial(model_calls, model, **arguments)
        stays = memory is None or memory.transformer is None
        ahead = foreseen(model, plan.family.conditioning, calls) if stays else nullcontext()
        with nullcontext() if memory is None else memory.denoising(calls), ahead:
            denoise(
                model,
                **arguments,
                callback=watch if added.keep is None else kept,
                rng=step_noise([plan.seeds[i] for i in pictures]),
                cache=plan.cache,
                bill=bill,
                run=plan.run or run_block,
                wraps=(*added.wraps, *plan.wraps),
                attend=plan.attend or attention,
                velocity=velocity if added.hears else plan.family.velocity,
                observers=plan.observers,
            )
        return watch.moments, bill

    def _words(self, prompts: Sequence[str]) -> tuple[Words, ...]:
        """Embeddings of each prompt, in the dtype and on the device of the transformer."""
        plan, device, dtype = self.plan, self.parts.device, self.parts.dtype
        text = self.parts.text.encode(prompts, plan.t5_length, plan.padding)
        return tuple(
            Words(
                text.txt[i : i + 1].to(dtype),
                plan.family.text_ids(1, text.txt.shape[1]).to(device),
                None if text.vec is None else text.vec[i : i + 1].to(dtype),
                None if text.mask is None else text.mask[i : i + 1],
            )
            for i in range(len(prompts))
        )

    def _noise(self, i: int) -> Tensor:
        plan, variation = self.plan, self.plan.varied(i)
        config = self.parts.autoencoder.config
        height, width, channels, patch = *plan.sides, config.latent_channels, config.patch
        if variation is None:
            return initial_noise(height, width, plan.seeds[i], channels, patch)
        return varied_noise(height, width, plan.seeds[i], variation, channels, patch)

    def _unpacked(self, tokens: Tensor) -> Tensor:
        return self.plan.family.unpack(tokens, *self.plan.sides).float()

    def _image(self, tokens: Tensor, added: Added) -> Image.Image:
        """The picture, cut back to its reference where that is less."""
        image = to_image(self._decode(tokens, added))
        return image if self.plan.crop is None else image.crop(self.plan.crop)

    def _decode(self, tokens: Tensor, added: Added) -> Tensor:
        autoencoder = self.parts.autoencoder
        decode = cast(Callable[..., Tensor], autoencoder.decode)
        pixels = decode(self._unpacked(tokens).to(autoencoder.decoder.conv_in.weight.dtype), through)
        if not bool(torch.isfinite(pixels).all()):
            dtype = str(self.parts.dtype).removeprefix("torch.")
            raise MinifluxError(f"the picture is not finite: the numbers overflowed in {dtype}; try dtype float32")
        return pixels[0] if added.paste is None else added.paste(pixels[0])

    def _encode(self, image: Image.Image | Tensor) -> Tensor:
        """Latents (1, C, h, w) of a picture, float32 on the CPU; latents are themselves."""
        if isinstance(image, Tensor) and image.ndim == 4:
            return image.float().cpu()
        autoencoder = self.parts.autoencoder
        weight = autoencoder.encoder.conv_in.weight
        pixels = image if isinstance(image, Tensor) else from_image(image)
        return autoencoder.encode(pixels[None].to(weight.device, weight.dtype), through).float().cpu()
