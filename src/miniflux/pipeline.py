"""The one place where the parts meet: prompt -> embeddings -> noise -> denoising -> pixels.

`load` puts a pipeline together from files; `Pipeline.generate` reads as numbered steps.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image

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
from miniflux.batching import ROWS, Batches, Later, at_once, check_batch, fitting
from miniflux.cache import Drawn, ResultCache, not_keyed, picture_key, result_cache
from miniflux.conditions import Condition
from miniflux.drawing import Drawing
from miniflux.errors import InputError
from miniflux.families import FAMILIES
from miniflux.loaded import Baseline, claimed, summary
from miniflux.lora import pictures as loras
from miniflux.lora.adapters import described, files_of
from miniflux.memory.lanes import Aside, Start, directly, lane_of
from miniflux.memory.ledger import Run, activations
from miniflux.memory.modes import Memory
from miniflux.memory.shortage import Fits, told
from miniflux.models.autoencoder import Autoencoder, Flux2Autoencoder
from miniflux.models.compiling import how_compiled
from miniflux.models.flux1 import Attend, RunBlock
from miniflux.models.tiny_autoencoder import TinyDecoder
from miniflux.models.transformer import Transformer
from miniflux.plan import Plan, Steps, Watchers
from miniflux.result import Result, checked_output, to_image
from miniflux.sampling import (
    Moment,
    Wrap,
    previews,
)
from miniflux.sampling.caches import Cache
from miniflux.sampling.guidance import Cfg, Scale
from miniflux.sampling.latents import PIXELS_PER_TOKEN
from miniflux.sampling.observing import observers
from miniflux.text import Padding, TextReader
from miniflux.variants import Variant
from miniflux.version import __version__
from miniflux.weights.origin import Origin, Stamp

__all__ = ["Callback", "Pipeline", "Progress", "Result", "checked_output", "load"]


class Pipeline:
    """A model of FLUX.1, FLUX.2 or FLUX.3, ready to draw.

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
        transformer: Transformer,
        autoencoder: Autoencoder | Flux2Autoencoder,
        text: TextReader,
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
        seed: int | Sequence[int] = 0,
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
        batch: int | Literal["auto"] | None = None,
    ) -> Result:
        """Draw.

        Each picture is drawn from its own seed and does not depend on its neighbours. Small ones are drawn several at
        once, see `batch`.

        Args:
            prompt: one prompt, or several for several pictures.
            seed: picture i of the call is drawn from seed + i; or a list of seeds, one for each picture of the call.
            steps: number of steps; None for the variant's default, or as many as a list of noise levels has.
            guidance: strength of the prompt, at least 0, or a function of the noise level; None for the default. Of
                models that are drawn with classifier-free guidance it is the scale; others without that input refuse
                it.
            width, height: in pixels; None for the default, or the size of `image` or of the first `Reference`. Rounded
                up to a multiple of 16, with a warning in the log.
            images: pictures per prompt.
            t5_length: tokens of T5, or of the language model, per prompt; None for the variant's own.
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
            batch: pictures that are drawn together at most, with memory for all of them; 1 for one after the other.
                None for as many as are faster so and fit, see `batching`: large ones are not, and a callback, `watch`,
                `run`, `wraps` and `attend` then see one picture at a time; "auto" for as many then, too. A picture of
                a batch is the one that is drawn alone, if need be but for rounding; its `settings` say how many were
                drawn at once.

        Numbers may be those of numpy and torch.

        Raises:
            InputError: an argument is out of its range or of another kind; the message names it and its value.
            OutOfMemoryError: it does not fit into what is free, or ran out of it; the message names a size that fits.
            MinifluxError: the numbers overflowed in this dtype.
        """
        # 1. Resolve the call, so that everything is checked before anything is computed.
        check_called(progress=progress, callback=callback, watch=watch)
        plan = Plan.of(
            self.as_it_is(),
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
            batch=batch,
        ).seen_by(observers(self.transformer))
        check_batch(plan)
        if (own_loras := loras.given(self)) is not None:
            own_loras.check(plan.total, plan.once)
        check_channels(self.transformer, plan.conditions)
        warn_of_result(self.variant, plan.width, plan.height, plan.levels)

        # 2. What will be said of the pictures: also the key under which those drawn before are kept.
        changed = self.changed()
        files = self._files(changed, plan.conditions)
        said: dict[str, Any] = {
            **self._described(),
            **plan.described(),
            **({"changed": summary(changed)} if changed else {}),
        }
        unkeyed = None if self.results is None else not_keyed(plan, said, files, callback is not None)

        settings = [{**said, **plan.described_picture(i)} for i in range(plan.total)]
        if own_loras is not None:
            for i, about in enumerate(settings):
                about["loras"] = own_loras.described(i, said["loras"])
        results = self.results if unkeyed is None else None
        keys = [] if results is None else [picture_key(about, files) for about in settings]

        # 3. Every picture from its own seed: text, noise, denoising, decoding - unless it was drawn before.
        work, needs, fits, done = Drawing(self, plan), plan.needs(self.device), self._fits(), Steps(plan, progress)
        looked_at = bool(plan.wrapped or plan.observers) or callback is not None or watch is not None
        most = at_once(plan, looked_at, self.transformer.config.hidden_size, needs)
        asked = plan.batch if isinstance(plan.batch, int) else None

        def needed(i: int) -> bool:
            return results is None or (keys[i] not in results and keys.index(keys[i]) == i)

        def draw(wanted: Sequence[int]) -> list[Later]:
            with self._watched(needs, fits):
                if not work.begun:
                    fits.check(needs)
                together = work.together(wanted[:most], 1 if asked else ROWS)
                together = together[: fitting(len(together), asked, needs, fits)]
            with (
                self._watched(replace(needs, batch=len(together) * needs.batch), fits),
                nullcontext() if own_loras is None else own_loras.drawing(together),
            ):
                watchers = Watchers(together, partial(done.reached, wanted[0]), callback, watch)
                return work.draw(together, watchers, decode)

        pictures: list[Drawn] = []
        aside = plan.total > most and not plan.observers  # who look on from this thread alone
        with self._decoding(needs, fits, asked or 1, aside) as (needs, decode):
            batches = Batches(plan.total, draw, needed, needs.decoding)
            for i, about in enumerate(settings):
                if results is None:
                    picture, cached = batches.picture(i), {} if unkeyed is None else {"not_cached": unkeyed}
                else:
                    picture, was = results.once(keys[i], partial(batches.picture, i), partial(done.reached, i, 0))
                    cached = {"cached": was}
                    if was:
                        done.reached(i + 1, 0)
                pictures.append(picture)
                about |= picture.about | cached
        latents = torch.cat([picture.latents for picture in pictures])
        moment = pictures[0].moment if plan.total == 1 else None
        return Result([picture.image for picture in pictures], latents, settings, moment, files, tuple(keys))

    def at_once(self, plan: Plan) -> int:
        """How many pictures of such a call it pays to draw together, that fit into what is free now."""
        needs = plan.needs(self.device)
        most = at_once(plan, False, self.transformer.config.hidden_size, needs)
        return fitting(most, None, needs, self._fits())

    def as_it_is(self) -> Variant:
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

    @contextmanager
    def _decoding(self, needs: Run, fits: Fits, batch: int, several: bool) -> Generator[tuple[Run, Start[Drawn]]]:
        """What a picture of a call needs, and how it is decoded: at once, or, where the device can do two things at a
        time and memory allows it, while the next one is denoised.

        Args:
            batch: pictures that are denoised together, if that was asked for.
            several: whether others will be denoised after it.
        """
        lane, more = lane_of(self.device), replace(needs, decoding=True)
        if not several or not lane.beside or not fits(replace(more, batch=batch * needs.batch)):
            yield needs, directly
            return
        with Aside(lane, lambda: told("decoding", partial(fits.advice, more))) as decode:
            yield more, decode

    def _fits(self) -> Fits:
        """Whether a run fits into what is free now."""
        memory, autoencoder = self.memory, self.autoencoder.config
        unit = autoencoder.unit
        if memory is not None:
            return Fits(lambda run: memory.ledger(run).working, self.device, unit, memory.fitting)

        def needs(run: Run) -> tuple[int, int]:
            floats = self.autoencoder.decoder.conv_in.weight.element_size()
            networks = {"transformer": self.transformer, "autoencoder": self.autoencoder, **self.text.networks}
            configs = {part: network.config for part, network in networks.items()}
            computed = activations(configs, run, self.dtype.itemsize, floats)
            most = max(computed.values()) + run.steering
            if run.decoding:
                most = max(most, computed["transformer"] + computed["autoencoder"] + run.steering)
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
            **({"compiled": compiled} if (compiled := how_compiled(self.transformer)) else {}),
        }

    def _files(self, changed: Sequence[str], conditions: Sequence[Condition] = ()) -> tuple[tuple[str, Stamp], ...]:
        """Every file that the next picture is made from, LoRAs and networks that steer last; none if it cannot be
        known. `changed`: what claims no hash."""
        if self.origin is None:
            return ()
        loras = tuple((f"lora {name}", stamp) for name, stamps in files_of(self).items() for stamp in stamps)
        steering = tuple(file for condition in conditions for file in getattr(condition, "files", ()))
        return claimed(self.origin.files + loras + steering, changed)

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
        latent = FAMILIES[self.variant.family].unpack(
            moment.picture, rows * PIXELS_PER_TOKEN, columns * PIXELS_PER_TOKEN
        )
        pixels = previews.decode(latent, self.variant.preview, self.tiny, decoder)
        return to_image(pixels[0]).resize((width, height), Image.Resampling.BILINEAR)


def load(
    name_or_path: str | Path,
    *,
    weights: str | Path | Mapping[str, str | Path] | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    memory: str = "auto",
    modulation_ahead: bool = True,
    compile: bool | str = False,
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
        compile: have `torch.compile` make programs of the transformer's blocks, with the first picture; other prompts
            and sizes use the same ones. Weights must stay where they compute (resident or text-freed). `graphs` has
            CUDA graphs made of them as well, for calls from one thread.
        cache: a folder for pictures, or a `ResultCache`: what was drawn before, of the same things, is not drawn again;
            `settings` say which. Hashes of all weights are computed for it, once per file.

    Raises:
        InputError: an unknown variant, device, dtype or memory mode, or nothing can be compiled here.
        WeightsNotFoundError: files are missing; all of them are named.
        OutOfMemoryError: the weights do not fit.
        CheckpointError: a file does not hold what it should.
    """
    results = result_cache(cache)
    with told(f"loading {name_or_path}", lambda: "memory='stream' takes the least"):
        parts = assemble(
            name_or_path,
            weights=weights,
            device=device,
            dtype=dtype,
            memory=memory,
            modulation_ahead=modulation_ahead,
            compile=compile,
        )
    return Pipeline(**parts._asdict(), results=results)
