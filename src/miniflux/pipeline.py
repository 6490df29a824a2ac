"""The one place where the parts meet: prompt -> embeddings -> noise -> denoising -> pixels.

`load` puts a pipeline together from files; `Pipeline.generate` reads as numbered steps.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from PIL import Image, PngImagePlugin
from torch import Tensor

from miniflux.checkpoints.assembly import assemble
from miniflux.errors import InputError, MinifluxError, OutputError
from miniflux.lora.adapters import described
from miniflux.models.autoencoder import Autoencoder
from miniflux.models.flux1 import Flux1
from miniflux.sampling import denoise, flux1_schedule, image_ids, initial_noise, pack, text_ids, unpack
from miniflux.sampling.latents import MAX_SEED, PATCH
from miniflux.text import Padding, Text
from miniflux.variants import Variant
from miniflux.version import __version__

log = logging.getLogger(__name__)

MAX_SIDE = 8192  # pixels; far beyond what the models were trained on, small enough to catch a slip of the finger
MAX_STEPS = 1000
MAX_IMAGES = 1000
LATENT_ROW = 8  # pixels per latent row that `initial_noise` counts in
SETTINGS_KEY = "miniflux"  # text chunk of a PNG, and what JPEG and WebP keep as the EXIF description
EXIF_DESCRIPTION = 0x010E

Progress = Callable[[int, int], None]
"""Called after every step with (steps done, steps in all), over all pictures of a call. May raise to stop the run."""


@dataclass(frozen=True)
class Result:
    """What a call of `generate` made.

    Attributes:
        images: RGB pictures, in order.
        latents: the final latents (N, C, h, w), float32, on the CPU.
        settings: one dict per picture with all that made it; the values are plain JSON.
    """

    images: list[Image.Image]
    latents: Tensor
    settings: list[dict[str, Any]]

    def grid(self) -> Image.Image:
        """All pictures on one sheet, row by row, about as many columns as rows; a single picture is itself."""
        if len(self.images) == 1:
            return self.images[0]
        width, height = self.images[0].size
        columns = math.ceil(math.sqrt(len(self.images)))
        sheet = Image.new("RGB", (columns * width, math.ceil(len(self.images) / columns) * height), "white")
        for i, image in enumerate(self.images):
            sheet.paste(image, (i % columns * width, i // columns * height))
        return sheet

    def save(self, path: str | Path) -> Path:
        """Write the picture, or the grid of several, with the settings inside. Written beside and renamed.

        Args:
            path: ends in .png, .jpg, .jpeg or .webp.

        Raises:
            OutputError: another ending, or the place cannot be written to.
        """
        path = checked_output(path)
        text = json.dumps(self.settings[0] if len(self.settings) == 1 else self.settings)
        options: dict[str, Any]
        if path.suffix.lower() == ".png":
            info = PngImagePlugin.PngInfo()
            info.add_text(SETTINGS_KEY, text)
            options = {"format": "PNG", "pnginfo": info}
        else:
            exif = Image.Exif()
            exif[EXIF_DESCRIPTION] = text
            kind = "WEBP" if path.suffix.lower() == ".webp" else "JPEG"
            options = {"format": kind, "quality": 95, "exif": exif}
        beside = path.with_name(path.name + ".part")
        try:
            self.grid().save(beside, **options)
            beside.replace(path)
        except OSError as error:
            raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error
        finally:
            beside.unlink(missing_ok=True)
        return path


def checked_output(path: str | Path) -> Path:
    """The path, if a picture can be written there; asked before the work is done.

    Raises:
        OutputError: unknown ending, no such folder, or no permission.
    """
    path = Path(path)
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise OutputError(f"{path}: a picture is written as .png, .jpg or .webp, got the ending {path.suffix!r}")
    if path.is_dir():
        raise OutputError(f"{path}: is a folder")
    if not path.parent.is_dir():
        raise OutputError(f"{path}: the folder {path.parent} does not exist")
    if not os.access(path.parent, os.W_OK):
        raise OutputError(f"{path}: the folder {path.parent} cannot be written to")
    return path


class Pipeline:
    """A FLUX.1 text-to-image model, ready to draw.

    Attributes:
        variant: what was loaded, with its defaults.
        transformer, autoencoder, text: the parts, for people who came to study them.

    Calls may come from several threads at once: nothing in here changes while it draws, except the prompt cache,
    which is locked.
    """

    def __init__(self, variant: Variant, transformer: Flux1, autoencoder: Autoencoder, text: Text) -> None:
        self.variant = variant
        self.transformer, self.autoencoder, self.text = transformer, autoencoder, text

    @property
    def device(self) -> torch.device:
        return self.transformer.img_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.transformer.img_in.weight.dtype

    @torch.inference_mode()
    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        width: int | None = None,
        height: int | None = None,
        images: int = 1,
        t5_length: int | None = None,
        padding: Padding = "released",
        progress: Progress | None = None,
    ) -> Result:
        """Draw.

        Pictures are drawn one after the other, each from its own seed, so a picture does not depend on its neighbours
        and memory is that of one.

        Args:
            prompt: one prompt, or several for several pictures.
            seed: picture i of the call is drawn from seed + i.
            steps: number of Euler steps; None for the variant's default.
            guidance: strength of the prompt, at least 0; None for the default. Refused by models without that input.
            width, height: in pixels; None for the default. Rounded up to a multiple of 16, with a warning in the log.
            images: pictures per prompt.
            t5_length: T5 tokens per prompt; None for the variant's own.
            padding: what becomes of the places behind a short prompt, see `miniflux.text.Padding`.
            progress: called after every step with (steps done, steps in all).

        Raises:
            InputError: an argument is out of its range; the message names it and its value.
            MinifluxError: the numbers overflowed in this dtype.
        """
        # 1. Check everything before anything is computed.
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts:
            raise InputError("prompt must be a string or a list of at least one, got an empty list")
        steps = self.variant.steps if steps is None else whole("steps", steps, 1, MAX_STEPS)
        images = whole("images", images, 1, MAX_IMAGES)
        seed = whole("seed", seed, 0, MAX_SEED + 1 - images * len(prompts))
        guidance = self._guidance(guidance)
        width, height = self._side("width", width), self._side("height", height)

        # 2. Text: T5's tokens and CLIP's summary, from the cache where the prompt was seen before.
        text = self.text.encode(prompts, t5_length, padding)

        # 3. Noise levels, from 1 to 0.
        scale = self.autoencoder.config.downscale
        rows, columns = height // (scale * PATCH), width // (scale * PATCH)
        sigmas = flux1_schedule(steps, rows * columns, shift=self.variant.shift)

        # 4. Each picture on its own: noise from its seed, denoising, decoding.
        pictures: list[Image.Image] = []
        latents: list[Tensor] = []
        settings: list[dict[str, Any]] = []
        loras = described(self)
        total = len(prompts) * images
        for i in range(total):
            p = i // images
            noise = initial_noise(
                rows * PATCH * LATENT_ROW, columns * PATCH * LATENT_ROW, seed + i, self.autoencoder.config.z_channels
            )
            tokens = denoise(
                self.transformer,
                pack(noise).to(self.device, self.dtype),
                image_ids(1, rows, columns).to(self.device),
                text.txt[p : p + 1].to(self.dtype),
                text_ids(1, text.txt.shape[1]).to(self.device),
                text.vec[p : p + 1].to(self.dtype),
                sigmas,
                guidance,
                txt_mask=None if text.mask is None else text.mask[p : p + 1],
                callback=None if progress is None else _counted(progress, i * steps, total * steps),
            )
            latent = unpack(tokens, rows * PATCH * LATENT_ROW, columns * PATCH * LATENT_ROW)
            pixels = self.autoencoder.decode(latent.to(self.autoencoder.decoder.conv_in.weight.dtype))
            if not bool(torch.isfinite(pixels).all()):
                dtype = str(self.dtype).removeprefix("torch.")
                raise MinifluxError(f"the picture is not finite: the numbers overflowed in {dtype}; try dtype float32")
            pictures.append(to_image(pixels[0]))
            latents.append(latent.float().cpu())
            settings.append(
                {
                    "version": __version__,
                    "torch": str(torch.__version__),
                    "model": self.variant.name,
                    "prompt": prompts[p],
                    "seed": seed + i,
                    "steps": steps,
                    "guidance": guidance,
                    "width": width,
                    "height": height,
                    "t5_length": self.text.length if t5_length is None else t5_length,
                    "padding": padding,
                    "sigmas": sigmas,
                    "dtype": str(self.dtype).removeprefix("torch."),
                    "device": self.device.type,
                    "loras": loras,
                }
            )
        return Result(pictures, torch.cat(latents), settings)

    def _guidance(self, guidance: float | None) -> float | None:
        if not self.transformer.config.guidance_embed:
            if guidance is not None:
                raise InputError(f"{self.variant.name} has no guidance input: leave guidance out, got {guidance!r}")
            return None
        if guidance is None:
            return self.variant.guidance
        number = isinstance(guidance, (int, float)) and not isinstance(guidance, bool)  # pyright: ignore[reportUnnecessaryIsInstance]
        if not number or not math.isfinite(guidance) or guidance < 0:
            raise InputError(f"guidance must be a finite number of at least 0, got {guidance!r}")
        return float(guidance)

    def _side(self, name: str, side: int | None) -> int:
        multiple = self.autoencoder.config.downscale * PATCH
        side = self.variant.size if side is None else whole(name, side, multiple, MAX_SIDE)
        rounded = multiple * math.ceil(side / multiple)
        if rounded != side:
            log.warning("%s %d is not a multiple of %d: drawing %d", name, side, multiple, rounded)
        return rounded


def whole(name: str, value: int, low: int, high: int) -> int:
    """The value, if it is a whole number from low to high.

    Raises:
        InputError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InputError(f"{name} must be a whole number from {low} to {high}, got {value!r}")
    return value


def _counted(progress: Progress, before: int, total: int) -> Callable[[int, Tensor], None]:
    return lambda step, _latents: progress(before + step, total)


def to_image(pixels: Tensor) -> Image.Image:
    """Pixels (3, H, W) in [-1, 1], clamped, to an 8-bit RGB picture."""
    levels = (127.5 * (pixels.float().clamp(-1, 1) + 1)).round().to(torch.uint8)
    return Image.fromarray(rearrange(levels, "C H W -> H W C").cpu().numpy())


def load(
    name_or_path: str | Path,
    *,
    weights: str | Path | Mapping[str, str | Path] | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    memory: str = "auto",
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
        memory: where weights live while they work; `auto` and `resident` keep them on the device.

    Raises:
        InputError: an unknown variant, device, dtype or memory mode.
        WeightsNotFoundError: files are missing; all of them are named.
        CheckpointError: a file does not hold what it should.
    """
    return Pipeline(*assemble(name_or_path, weights=weights, device=device, dtype=dtype, memory=memory))
