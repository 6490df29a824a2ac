"""What is known of a released model: `Variant`."""

from __future__ import annotations

from dataclasses import dataclass

from miniflux.models.autoencoder import AutoencoderConfig, Flux2AutoencoderConfig
from miniflux.models.causal_lm import CausalLmConfig
from miniflux.models.clip import ClipTextConfig
from miniflux.models.t5 import T5Config
from miniflux.models.tiny_autoencoder import TinyDecoderConfig
from miniflux.models.transformer import TransformerConfig
from miniflux.text.chat import ChatForm


@dataclass(frozen=True)
class Sizes:
    """Which sizes of pictures a model learned. `(width, height) in sizes` asks; `str()` says it in words.

    Attributes:
        sides: the shortest and the longest side in pixels; None if only the area matters.
        area: the smallest and the largest width times height in pixels; None if only the sides matter.
    """

    sides: tuple[int, int] | None = None
    area: tuple[int, int] | None = None

    def __contains__(self, size: tuple[int, int]) -> bool:
        width, height = size
        if self.sides is not None and not self.sides[0] <= min(size) <= max(size) <= self.sides[1]:
            return False
        return self.area is None or self.area[0] <= width * height <= self.area[1]

    def __str__(self) -> str:
        said: list[str] = []
        if self.sides is not None:
            said.append(f"sides of {self.sides[0]} to {self.sides[1]} pixels")
        if self.area is not None:
            low, high = (f"{pixels / 2**20:.1f}".removesuffix(".0") for pixels in self.area)
            said.append(f"up to {high} megapixels" if low == "0" else f"{low} to {high} megapixels")
        return " and ".join(said)


@dataclass(frozen=True)
class Download:
    """What of a repository makes one part of a model.

    Attributes:
        part: a field of `checkpoints.finding.Files`.
        files: their paths in the repository; `folder/*` for all files in a folder.
        bytes: together; of tensors without the headers of their files, which add 0.1 MB at most.
    """

    part: str
    files: tuple[str, ...]
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One released text-to-image model: its networks, its files and the settings it was made for.

    Attributes:
        name: what `miniflux.load` and `--model` call it.
        repository: where the files come from; empty for the bundled models.
        file: the transformer's single file.
        licence: of the weights; `gated` if it must be accepted before downloading.
        transformer, autoencoder, clip, t5, lm: sizes of its networks; None of those that it has not.
        lm_file: the language model's single file, as ComfyUI has it.
        chat: the form in which the language model reads a prompt.
        t5_length: tokens of T5, or of the language model, that a prompt is padded or cut to; None for as many as it
            needs.
        shift: whether the noise levels are shifted, in the way of its family.
        steps, guidance: defaults; guidance is None for models without a guidance input.
        cfg: the scale of classifier-free guidance that it is drawn with; None for models that need no second text.
        size: default width and height in pixels.
        learned: the sizes that it was trained on; others are drawn, with a warning.
        bundled: whether the weights are inside the package.
        preview: the table of `sampling.previews` for its autoencoder; empty if none was fitted.
        tiny, tiny_file: the tiny decoder for its latents, if there is one, and the file that holds it.
        mag_ratios: what `sampling.caches.MagCache` wants to know; empty if it was not measured.
        once: whether it looks at references once, for all steps.
        downloads: what `miniflux fetch` takes from the repository; empty for the bundled models.
        family: the name of its record in `miniflux.families`.
    """

    name: str
    repository: str
    file: str
    licence: str
    gated: bool = True
    transformer: TransformerConfig
    autoencoder: AutoencoderConfig | Flux2AutoencoderConfig
    clip: ClipTextConfig | None = None
    t5: T5Config | None = None
    lm: CausalLmConfig | None = None
    lm_file: str = ""
    chat: ChatForm | None = None
    t5_length: int | None = 512
    shift: bool = True
    steps: int
    guidance: float | None
    cfg: float | None = None
    size: int = 1024
    learned: Sizes
    bundled: bool = False
    preview: tuple[tuple[float, float, float], ...] = ()
    tiny: TinyDecoderConfig | None = None
    tiny_file: str = ""
    mag_ratios: tuple[float, ...] = ()
    once: bool = False
    downloads: tuple[Download, ...] = ()
    family: str = "flux1"
