"""The one place where the parts meet: prompt -> embeddings -> noise -> denoising -> pixels.

`load` puts a pipeline together from files; `Pipeline.generate` reads as numbered steps.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from miniflux.arguments import (
    AUTO,
    Callback,
    Mask,
    Progress,
    Source,
    Watch,
    check_called,
    check_channels,
    image_for,
    mask_for,
    warn_of_result,
)
from miniflux.assembly import assemble
from miniflux.cache import Drawn, ResultCache, not_keyed, picture_key, result_cache
from miniflux.conditions import Added, Condition, Scene, joined
from miniflux.errors import InputError, MinifluxError
from miniflux.loaded import Baseline, claimed, summary
from miniflux.lora.adapters import described, files_of
from miniflux.memory.ledger import Run, activations
from miniflux.memory.modes import Memory
from miniflux.memory.shortage import Fits, told
from miniflux.models.autoencoder import Autoencoder
from miniflux.models.flux1 import Attend, Flux1, RunBlock, run_block
from miniflux.models.layers import attention
from miniflux.models.tiny_autoencoder import TinyDecoder
from miniflux.pictures import from_image
from miniflux.plan import Plan, Watcher
from miniflux.result import Result, checked_output, psnr, to_image
from miniflux.sampling import (
    Bill,
    Moment,
    Words,
    Wrap,
    add_noise,
    denoise,
    previews,
    step_noise,
    unpack,
    varied_noise,
)
from miniflux.sampling.caches import Cache
from miniflux.sampling.denoising import model_calls
from miniflux.sampling.guidance import Cfg, Scale
from miniflux.sampling.latents import PATCH, PIXELS_PER_TOKEN
from miniflux.text import Padding, Text
from miniflux.variants import Variant
from miniflux.version import __version__
from miniflux.weights.origin import Origin, Stamp

__all__ = ["Callback", "Pipeline", "Progress", "Result", "checked_output", "load"]


class Pipeline:
    """A FLUX.1 text-to-image model, ready to draw.

    Attributes:
        variant: what was loaded, with its defaults.
        transformer, autoencoder, text: the parts, for people who came to study them.
        origin: the files they were read from; None if they were not.
        results: pictures drawn before, or None.
        tiny: a tiny decoder for previews; None where there is none.
        memory: where the weights are; None if all are simply there.

    Calls may come from several threads at once: nothing in here changes while it draws, except the caches of prompts
    and of results, which are locked.
    """

    def __init__(
        self,
        variant: Variant,
        transformer: Flux1,
        autoencoder: Autoencoder,
        text: Text,
        origin: Origin | None = None,
        tiny: TinyDecoder | None = None,
        results: ResultCache | None = None,
        memory: Memory | None = None,
    ) -> None:
        self.variant = variant
        self.transformer, self.autoencoder, self.text, self.tiny = transformer, autoencoder, text, tiny
        self.origin, self.results, self.memory = origin, results, memory
        self._baseline = None if origin is None else origin.kept.setdefault("baseline", Baseline(self))

    @property
    def device(self) -> torch.device:
        return next(self.transformer.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.transformer.parameters()).dtype  # of a bias, where weights are packed

    def changed(self) -> tuple[str, ...]:
        """What has been changed in memory since the files were loaded, a part and a name each; what LoRAs and memory
        modes do is no change. Nothing, if it was not loaded from files."""
        return () if self._baseline is None else self._baseline.changes(self)

    def __getstate__(self) -> Any:
        raise InputError(
            "a pipeline is neither copied nor pickled, because its weights are shared with the files they are in: load "
            "another one, or make it of parts: Pipeline(pipe.variant, transformer, pipe.autoencoder, pipe.text)"
        )

    @torch.inference_mode()
    def generate(
        self,
        prompt: str | Iterable[str],
        *,
        seed: int = 0,
        steps: int | None = None,
        guidance: Scale | None = None,
        width: int | None = None,
        height: int | None = None,
        images: int = 1,
        t5_length: int | None = None,
        padding: Padding = "released",
        solver: str = "euler",
        schedule: str | Sequence[float] = AUTO,
        shift: float | None = None,
        restart: tuple[float, float, int] | None = None,
        guide: Cfg | str | None = None,
        negative: str | None = None,
        variation: tuple[int, float] | None = None,
        image: Source | None = None,
        mask: Mask | None = None,
        strength: float = 1.0,
        conditions: Sequence[Condition] = (),
        cache: Cache | str | None = None,
        check_cache: bool = False,
        progress: Progress | None = None,
        callback: Callback | None = None,
        watch: Watch | None = None,
        resume: Moment | None = None,
        stop: int | None = None,
        run: RunBlock | None = None,
        wraps: Sequence[Wrap] = (),
        attend: Attend | None = None,
    ) -> Result:
        """Draw.

        Pictures are drawn one after the other, each from its own seed, so a picture does not depend on its neighbours
        and memory is that of one.

        Args:
            prompt: one prompt, or several for several pictures.
            seed: picture i of the call is drawn from seed + i.
            steps: number of steps; None for the variant's default, or as many as a list of noise levels has.
            guidance: strength of the prompt, at least 0, or a function of the noise level; None for the default.
                Refused by models without that input.
            width, height: in pixels; None for the default, or the size of `image`. Rounded up to a multiple of 16, with
                a warning in the log.
            images: pictures per prompt.
            t5_length: T5 tokens per prompt; None for the variant's own.
            padding: what becomes of the places behind a short prompt, see `miniflux.text.Padding`.
            solver: a name of `sampling.SOLVERS`; some take a number, `ddim:0.5`.
            schedule: a name of `sampling.schedules.SPACINGS`, or noise levels of your own. `auto` for what suits the
                solver; `settings` then names it.
            shift: a static shift of the noise levels, 1 for none; None for the model's own, which depends on the size.
            restart: (low, high, times), see `sampling.with_restarts`.
            guide: how other texts steer, see `sampling.guide`; or its name, for a usual strength.
            negative: what the picture should not show; for guides only. None for the empty prompt.
            variation: (another seed, how far to go towards its noise, 0 to 1); picture i goes towards that seed + i.
            image: a picture to change, of the size to be drawn: a path, a Pillow picture, an array (H, W, 3) of uint8,
                pixels (3, H, W) in [-1, 1]; or latents (1, C, h, w) as in `Result.latents`.
            mask: where to change it: grey, white for what is drawn anew, black for what stays bit for bit; grey pixels
                are drawn anew in so large a share of the steps. A path, a Pillow picture, a tensor (H, W) from 0 to 1.
            strength: how much of it to change, above 0 up to 1; 1 keeps nothing. Of the steps of a whole picture, this
                last share is made.
            conditions: what else steers the pictures, see `miniflux.conditions`.
            cache: a step cache or its name, see `sampling.cache`; `settings` then says what it spared.
            check_cache: draw every picture without the cache as well, and say in `settings` how far the two are apart.
            progress: called after every step with (steps done, steps in all).
            callback: called after every step with (number of the picture, `sampling.Moment`); latents that it returns
                replace those of the run. May raise to stop, which leaves the pipeline as it was.
            watch: as callback, but it only looks on; not called for pictures that come from the result cache.
            resume: a moment of an earlier run with the same arguments, to go on from, bit for bit; for one picture,
                and without a step cache.
            stop: end after so many steps: latents are as they then are, the picture is the one they point to.
            run, attend: called in place of every block that is computed, and of attention, see `Flux1.forward`; step
                caches and guides work around them. `settings` then says so, and the result cache keeps nothing.
            wraps: functions that make of what runs a block another one, each around those before it and all around
                `run`, see `sampling.denoise`.

        Numbers may be those of numpy and torch.

        Raises:
            InputError: an argument is out of its range or of another kind; the message names it and its value.
            OutOfMemoryError: it does not fit into what is free, or ran out of it; the message names a size that fits.
            MinifluxError: the numbers overflowed in this dtype.
        """
        # 1. Resolve the call, so that everything is checked before anything is computed.
        check_called(progress=progress, callback=callback, watch=watch)
        plan = Plan.of(
            self._as_it_is(),
            prompt,
            seed=seed,
            steps=steps,
            guidance=guidance,
            width=width,
            height=height,
            images=images,
            t5_length=t5_length,
            padding=padding,
            solver=solver,
            schedule=schedule,
            shift=shift,
            restart=restart,
            guide=guide,
            negative=negative,
            variation=variation,
            image=(picture := image_for(image, self.autoencoder.config)),
            mask=mask_for(mask, picture, self.autoencoder.config.downscale),
            strength=strength,
            conditions=conditions,
            cache=cache,
            check_cache=check_cache,
            resume=resume,
            stop=stop,
            run=run,
            wraps=wraps,
            attend=attend,
        )
        check_channels(self.transformer, plan.conditions)
        warn_of_result(self.variant, plan.width, plan.height, plan.levels)

        # 2. What will be said of the pictures: also the key under which those drawn before are kept.
        changed = self.changed()
        files = self._files(changed)
        said = {**self._described(), **plan.described(), **({"changed": summary(changed)} if changed else {})}
        unkeyed = None if self.results is None else not_keyed(plan, said, files, callback is not None)

        # 3. Each picture on its own: text, noise from its seed, denoising, decoding - unless it was drawn before.
        begun: list[_Begun] = []
        needs, fits = plan.needs(), self._fits()

        def draw(i: int) -> Drawn:
            with self._watched(needs, fits):
                if not begun:  # text has a cache of its own, and is not needed where all pictures were drawn before
                    fits.check(needs)
                    begun.append(self._begin(plan))
                return self._draw(plan, begun[0], i, Watcher(i, plan.total, progress, callback, watch))

        keys: list[str] = []
        pictures: list[Drawn] = []
        settings: list[dict[str, Any]] = []
        for i in range(plan.total):
            about = {**said, **plan.described_picture(i)}
            if self.results is None or unkeyed is not None:
                pictures.append(draw(i))
                about |= pictures[i].about | ({} if unkeyed is None else {"not_cached": unkeyed})
            else:
                keys.append(picture_key(about, files))
                picture, cached = self.results.once(keys[i], partial(draw, i), partial(plan.tell, progress, i))
                if cached:
                    plan.tell(progress, i + 1)
                pictures.append(picture)
                about |= picture.about | {"cached": cached}
            settings.append(about)
        latents = torch.cat([picture.latents for picture in pictures])
        moment = pictures[0].moment if plan.total == 1 else None
        return Result([picture.image for picture in pictures], latents, settings, moment, files, tuple(keys))

    def _as_it_is(self) -> Variant:
        """The variant with the sizes that the networks have now."""
        sizes = {"transformer": self.transformer.config, "autoencoder": self.autoencoder.config}
        return replace(self.variant, **sizes, t5_length=self.text.length)

    @contextmanager
    def _watched(self, needs: Run, fits: Fits) -> Generator[None]:
        """Around the work on a picture: its memory is compared with the ledger, and running out of it is told."""
        with (
            told(f"drawing {needs.width}x{needs.height}", partial(fits.advice, needs)),
            nullcontext() if self.memory is None else self.memory.checked(needs),
        ):
            yield

    def _fits(self) -> Fits:
        """Whether a run fits into what is free now."""
        memory, autoencoder = self.memory, self.autoencoder.config
        unit = autoencoder.downscale * PATCH
        if memory is not None:
            return Fits(lambda run: memory.ledger(run).working, self.device, unit, memory.fitting)

        def needs(run: Run) -> tuple[int, int]:
            floats = self.autoencoder.decoder.conv_in.weight.element_size()
            computed = activations(
                self.transformer.config, self.text.t5.config, autoencoder, run, self.dtype.itemsize, floats
            )
            most = max(computed.values())
            return (most, 0) if self.device.type == "cpu" else (0, most)

        return Fits(needs, self.device, unit, lambda run, free: [])

    def _described(self) -> dict[str, Any]:
        """What of the settings of a picture is the pipeline's own."""
        origin = self.origin
        return {
            "version": __version__,
            "torch": str(torch.__version__),
            "model": self.variant.name,
            "model_path": None if origin is None or origin.name == self.variant.name else origin.name,
            "dtype": str(self.dtype).removeprefix("torch."),
            "dtype_asked": None if origin is None else origin.dtype,
            "device": self.device.type,
            "memory": "resident" if self.memory is None else self.memory.mode,
            "threads": torch.get_num_threads(),
            "loras": described(self),
        }

    def _files(self, changed: Sequence[str]) -> tuple[tuple[str, Stamp], ...]:
        """Every file that the next picture is made from, LoRAs last; none if it cannot be known. `changed`: what claims
        no hash."""
        if self.origin is None:
            return ()
        loras = tuple((f"lora {name}", stamp) for name, stamps in files_of(self).items() for stamp in stamps)
        return claimed(self.origin.files + loras, changed)

    def _begin(self, plan: Plan) -> _Begun:
        """T5's tokens and CLIP's summary of all texts, and the latents of the picture to change."""
        # Cut to the longest of a call, prompts would depend on each other.
        groups = [[prompt] for prompt in plan.prompts] if plan.padding == "trimmed" else [plan.prompts]
        texts = [words for group in groups for words in self._words(group, plan)]
        others = (None, None) if plan.guide is None else self._words([plan.negative or "", ""], plan)
        if self.memory is not None:
            self.memory.free_text()
        scene = Scene(plan.family, plan.width, plan.height, plan.levels, self._encode)
        return _Begun(texts, others[0], others[1], joined([condition.added(scene) for condition in plan.conditions]))

    def _draw(self, plan: Plan, begun: _Begun, i: int, watcher: Watcher) -> Drawn:
        """Picture i."""
        words, seed = (begun.texts[i // plan.images], begun.negative, begun.empty), plan.seed + i
        noise = self._noise(plan, i)
        start = begun.added.start
        begin = noise if start is None else add_noise(start, 0.0, plan.levels[0], noise)
        moment, bill = self._denoise(plan, begun.added, words, begin, noise, seed, watcher)
        tokens = moment.picture if moment.step < moment.steps else moment.x
        image = to_image(self._decode(tokens, plan, begun.added))
        about: dict[str, Any] = {}
        if watcher.replaced:
            about["replaced"] = True
        if plan.resume is not None:
            about["resumed"] = plan.resume.step
        if plan.cache is not None:
            about["cache"] = {**plan.cache_described(), "evaluated": bill.evaluated, "skipped": bill.skipped}
        if plan.check_cache:
            exact, _ = self._denoise(replace(plan, cache=None), begun.added, words, begin, noise, seed, Watcher(0, 1))
            about["cache"] |= {
                "latent_l2": float((moment.x - exact.x).norm() / exact.x.norm()),
                "psnr": psnr(image, to_image(self._decode(exact.x, plan, begun.added))),
            }
        return Drawn(image, self._unpacked(moment.x, plan).cpu(), about, moment)

    def _denoise(
        self,
        plan: Plan,
        added: Added,
        words: tuple[Words, Words | None, Words | None],
        begin: Tensor,
        noise: Tensor,
        seed: int,
        watch: Watcher,
    ) -> tuple[Moment, Bill]:
        """The last moment of one picture's run, and what it cost."""
        bill, (text, negative, empty) = Bill(), words
        arguments: dict[str, Any] = {
            "img": plan.family.pack(begin).to(self.device, self.dtype),
            "img_ids": plan.family.image_ids(1, plan.rows, plan.columns).to(self.device),
            "img_cond": None if added.channels is None else added.channels.to(self.device, self.dtype),
            "img_cond_seq": None if added.tokens is None else added.tokens.to(self.device, self.dtype),
            "img_cond_seq_ids": None if added.ids is None else added.ids.to(self.device),
            "txt": text,
            "timesteps": plan.levels,
            "guidance": plan.guidance,
            "method": plan.method,
            "guide": plan.guide,
            "negative": negative,
            "empty": empty,
            "resume": plan.resume,
            "stop": plan.stop,
        }

        def kept(moment: Moment) -> Tensor:
            assert added.keep is not None
            latents = added.keep(plan.family.unpack(moment.x, *plan.sides), noise, moment.sigma)
            moment = replace(moment, x=plan.family.pack(latents))
            replaced = watch(moment)
            return moment.x if replaced is None else replaced

        calls = partial(model_calls, self.transformer, **arguments)
        with nullcontext() if self.memory is None else self.memory.denoising(calls):
            denoise(
                self.transformer,
                **arguments,
                callback=watch if added.keep is None else kept,
                rng=step_noise([seed]),
                cache=plan.cache,
                bill=bill,
                run=plan.run or run_block,
                wraps=(*added.wraps, *plan.wraps),
                attend=plan.attend or attention,
                velocity=plan.family.velocity,
            )
        assert watch.moment is not None
        return watch.moment, bill

    @torch.inference_mode()
    def preview(self, moment: Moment, width: int, height: int, decoder: str | None = None) -> Image.Image:
        """The picture a run points to, roughly and at once, enlarged to the size.

        Args:
            decoder: `tiny` for the tiny decoder; `table` for one pixel per place of the latent; None for the better one
                that there is.

        Raises:
            InputError: another decoder, or this model has none of that kind.
        """
        rows, columns = (math.ceil(side / PIXELS_PER_TOKEN) for side in (height, width))
        latent = unpack(moment.picture, rows * PIXELS_PER_TOKEN, columns * PIXELS_PER_TOKEN)
        pixels = previews.decode(latent, self.variant.preview, self.tiny, decoder)
        return to_image(pixels[0]).resize((width, height), Image.Resampling.BILINEAR)

    def _words(self, prompts: Sequence[str], plan: Plan) -> tuple[Words, ...]:
        """Embeddings of each prompt, in the dtype and on the device of the transformer."""
        text = self.text.encode(prompts, plan.t5_length, plan.padding)
        return tuple(
            Words(
                text.txt[i : i + 1].to(self.dtype),
                plan.family.text_ids(1, text.txt.shape[1]).to(self.device),
                text.vec[i : i + 1].to(self.dtype),
                None if text.mask is None else text.mask[i : i + 1],
            )
            for i in range(len(prompts))
        )

    def _noise(self, plan: Plan, i: int) -> Tensor:
        height, width, channels = *plan.sides, self.autoencoder.config.z_channels
        variation = plan.varied(i)
        if variation is None:
            return plan.family.noise(height, width, plan.seed + i, channels)
        return varied_noise(height, width, plan.seed + i, variation, channels)

    def _unpacked(self, tokens: Tensor, plan: Plan) -> Tensor:
        return plan.family.unpack(tokens, *plan.sides).float()

    def _decode(self, tokens: Tensor, plan: Plan, added: Added) -> Tensor:
        pixels = self.autoencoder.decode(self._unpacked(tokens, plan).to(self.autoencoder.decoder.conv_in.weight.dtype))
        if not bool(torch.isfinite(pixels).all()):
            dtype = str(self.dtype).removeprefix("torch.")
            raise MinifluxError(f"the picture is not finite: the numbers overflowed in {dtype}; try dtype float32")
        return pixels[0] if added.paste is None else added.paste(pixels[0])

    def _encode(self, image: Image.Image | Tensor) -> Tensor:
        """Latents (1, C, h, w) of a picture, float32 on the CPU; latents are themselves."""
        if isinstance(image, Tensor) and image.ndim == 4:
            return image.float().cpu()
        weight = self.autoencoder.encoder.conv_in.weight
        pixels = image if isinstance(image, Tensor) else from_image(image)
        return self.autoencoder.encode(pixels[None].to(weight.device, weight.dtype)).float().cpu()


@dataclass(frozen=True)
class _Begun:
    """What the pictures of a call share: the words of each prompt, the other texts, what conditions add."""

    texts: list[Words]
    negative: Words | None
    empty: Words | None
    added: Added


def load(
    name_or_path: str | Path,
    *,
    weights: str | Path | Mapping[str, str | Path] | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    memory: str = "auto",
    modulation_ahead: bool = True,
    cache: ResultCache | str | Path | None = None,
) -> Pipeline:
    """Put a pipeline together from files.

    Args:
        name_or_path: a variant (`nano`, `flux1-dev`, `flux1-schnell` ...); a folder: a diffusers pipeline, or one that
            holds a transformer's single file and the other parts; or a transformer's single file, the other parts
            being looked for beside it and in the usual places.
        weights: a folder to look in first, or a dict from part (transformer, autoencoder, clip, t5, clip_tokenizer,
            t5_tokenizer) to its file or folder. Then come the folder named by MINIFLUX_WEIGHTS and the Hugging Face
            cache. Nothing is downloaded.
        device: None for the best there is.
        dtype: float32, bfloat16 or float16 for transformer and text encoders; None to choose for the device. The
            autoencoder, published in float32, keeps that unless a dtype is given.
        memory: where weights are while they work. resident: on the device; text-freed: the text encoders' are read for
            every new prompt; offload: the blocks' wait in RAM, in the precision of the file; stream: in the file;
            auto: the first of these that fits into what is free.
        modulation_ahead: with blocks that come and go, compute the modulations of all steps before the first.
        cache: a folder for pictures, or a `ResultCache`: what was drawn before, of the same things, is not drawn again;
            `settings` say which. Hashes of all weights are computed for it, once per file.

    Raises:
        InputError: an unknown variant, device, dtype or memory mode.
        WeightsNotFoundError: files are missing; all of them are named.
        OutOfMemoryError: the weights do not fit.
        CheckpointError: a file does not hold what it should.
    """
    results = result_cache(cache)
    with told(f"loading {name_or_path}", lambda: "memory='stream' takes the least"):
        parts = assemble(
            name_or_path, weights=weights, device=device, dtype=dtype, memory=memory, modulation_ahead=modulation_ahead
        )
    return Pipeline(**parts._asdict(), results=results)
