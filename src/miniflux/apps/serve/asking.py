"""From what a client asks for, in either shape, to a job: models by name, sizes, seeds, LoRAs, pictures, conditions."""

from __future__ import annotations

import asyncio
import hashlib
import math
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from miniflux.apps.serve.asked import Asked, LoraAsked, at, said
from miniflux.apps.serve.fetching import fetched, is_address
from miniflux.apps.serve.names import named
from miniflux.apps.serve.offers import Offer
from miniflux.apps.serve.refusals import UnfitError
from miniflux.apps.serve.site import Site
from miniflux.apps.serve.steered import (
    brought,
    changed_by,
    conditions_of,
    control_of,
    learned,
    looked_at,
    mask_of,
    opened_as,
    redux_of,
    whole_tokens,
)
from miniflux.apps.serve.webhooks import check
from miniflux.checks import shown
from miniflux.conditions.making import canny
from miniflux.lora.attaching import BUNDLED_LORAS, resolved
from miniflux.sampling import guide
from miniflux.sampling.latents import PIXELS_PER_TOKEN
from miniflux.service.jobs.keys import Key
from miniflux.service.jobs.records import Wanted
from miniflux.service.models import kin
from miniflux.settings import ConditionUse, LoraUse, Request
from miniflux.variants import Variant
from miniflux.version import __version__
from miniflux.weights.origin import Stamp, stamps

SEEDS = 2**32  # random ones are below: every client's whole numbers hold them
NARROWEST = 3.0  # a side of a picture whose shape is asked for, of the other; BFL's shapes end at 21:9
RATIO = re.compile(r"(\d{1,2}):(\d{1,2})", re.ASCII)
RESOLUTIONS = {"768sq": 768, "0.75k": 768, "1k": 1024, "1.5k": 1536, "2k": 2048, "4k": 4096}
"""Sides of a square of as many pixels: 0.6, 1, 2.4, 4.2 and 16.8 megapixels."""
CHECKED = ("Reference", "Control")  # conditions without a network: whether they fit is known before anything is loaded
ONCE = re.compile(r"[\x21-\x7e]{1,200}")


async def with_pictures(site: Site, asked: Asked) -> Asked:
    """The same, with the pictures that were given by address.

    Raises:
        UnfitError: one cannot be fetched.
    """
    found = {given.strip(): name for name, given in asked.given() if isinstance(given, str)}
    addresses = {address: name for address, name in found.items() if is_address(address)}
    data = await asyncio.gather(*(_fetched(site, address, name) for address, name in addresses.items()))
    return replace(asked, fetched=dict(zip(addresses, data, strict=True)))


async def _fetched(site: Site, address: str, name: str) -> bytes:
    async with site.fetching:
        with at(name):
            return await fetched(address, allowed=site.options.hosts)


def wanted(site: Site, asked: Asked, key: Key | None, base: str) -> Wanted:
    """The job that is asked for. Opens pictures: takes as long as that takes.

    Args:
        asked: with its pictures, see `with_pictures`.
        base: where the client reaches the server.

    Raises:
        UnknownModelError: there is no such model here.
        UnfitError, InputError: a parameter is not what it may be, or has no effect with this model.
        OutputError: a picture cannot be kept.
    """
    if asked.once is not None and not ONCE.fullmatch(asked.once):
        raise UnfitError("Idempotency-Key", f"1 to 200 visible characters are expected, got {shown(asked.once)}")
    _check_webhook(site, asked)
    offer = site.offers.find(site.offers.default if asked.model is None else asked.model)
    request = _request(site, asked, offer, "" if key is None else key.id)
    output = {"format": asked.format, **({} if asked.quality is None else {"quality": asked.quality})}
    with said(asked.names):
        known = ("Reference",) if request.loras else CHECKED  # a control LoRA makes room for its picture
        conditions = site.inputs.conditions(request, known)
        plan = request.plan(offer.variant, conditions)
    _check_pixels(site, asked, plan.width, plan.height)
    needs = plan.needs()
    usage = {"text": needs.text_tokens, "image": needs.more_tokens + needs.kept_tokens}
    return Wanted(
        request=request,
        kin=kin(request),
        steps=request.images * plan.steps,
        identity=None if asked.seed is None else _identity(site, offer, request, output),
        key="" if key is None else key.id,
        output={**output, **asked.output, "base": base, "size": [plan.width, plan.height], "usage": usage},
        previews=asked.previews,
        priority=0 if key is None else key.priority,
        seconds=site.options.seconds,
        once=asked.once,
        webhook=asked.webhook,
        webhook_secret=asked.webhook_secret,
    )


def _request(site: Site, asked: Asked, offer: Offer, key: str) -> Request:
    opened = [(name, opened_as(asked, name, given)) for name, given in asked.pictures]
    conditions = conditions_of(site, asked, offer)
    control = control_of(site, asked, offer, conditions)
    size = _size(asked, offer.variant, [picture for _, picture in opened], control)
    changed, mask = changed_by(site, asked, offer, opened)
    if changed is not None:
        target = size or learned(offer.variant, *changed.size)
        changed = brought(changed, target)
        mask = None if mask is None else mask_of(brought(mask, target, Image.Resampling.BILINEAR))
        size, opened = target, opened[1:]
    if control is not None:
        size = size or learned(offer.variant, *control.size)
        made = control if asked.edged else canny(control, size, **asked.edges)
        conditions.append(ConditionUse("Control", (("picture", site.inputs.add(made)),)))
    conditions += looked_at(site, offer, opened, conditions)
    if asked.varied:
        conditions.append(redux_of(site, asked))
    width, height = size or (None, None)
    if width is not None and height is not None:
        _check_pixels(site, asked, width, height)
    if asked.negative is not None and asked.cfg is None and offer.variant.cfg is None:
        raise UnfitError(
            asked.names["negative"], f"has no effect with {offer.name} without {asked.names['cfg']}, the scale of it"
        )
    if asked.guidance is not None and not offer.variant.transformer.guidance_embed and offer.variant.cfg is None:
        raise UnfitError(asked.names["guidance"], f"has no effect with {offer.name}, which is not told any")
    with said(asked.names):
        return Request(
            prompt=asked.prompt,
            negative=asked.negative,
            model=offer.model,
            loras=tuple(_lora(site, i, one) for i, one in enumerate(asked.loras)),
            seed=_seed(asked, key),
            images=asked.images,
            steps=asked.steps,
            width=width,
            height=height,
            guidance=asked.guidance,
            guide=None if asked.cfg is None else guide("cfg", scale=asked.cfg),
            image=None if changed is None else site.inputs.add(changed),
            mask=None if mask is None else site.inputs.add(mask),
            strength=1.0 if asked.strength is None else asked.strength,
            conditions=tuple(conditions),
        )


def _check_webhook(site: Site, asked: Asked) -> None:
    if asked.webhook is None:
        if asked.webhook_secret is not None:
            raise UnfitError("webhook_secret", "signs what a webhook is told, and there is no webhook_url")
        return
    with at("webhook_url"):
        check(asked.webhook, None, site.options.hosts)
    with at("webhook_secret"):
        check(asked.webhook, asked.webhook_secret, site.options.hosts)


# Numbers


def _seed(asked: Asked, key: str) -> int:
    """As asked for; of a request with a name of its own one that follows from it, so that it is the same when it is
    asked again; else a random one."""
    if asked.seed is not None:
        return asked.seed
    if asked.once is not None:
        digest = hashlib.sha256(f"{key} {asked.once}".encode()).digest()
        return int.from_bytes(digest[:8], "big") % (SEEDS - asked.images)
    return secrets.randbelow(SEEDS - asked.images)


def _check_pixels(site: Site, asked: Asked, width: int, height: int) -> None:
    most = site.options.pixels
    if width * height > most:
        raise UnfitError(asked.names["width"], f"pictures have at most {most:,} pixels here, got {width}x{height}")


def _size(
    asked: Asked, variant: Variant, pictures: Sequence[Image.Image], control: Image.Image | None
) -> tuple[int, int] | None:
    """Width and height in pixels, as asked for; None to leave them to the model, or to the pictures."""
    names, shaped = asked.names, asked.ratio is not None or asked.resolution is not None
    for name, side in (("width", asked.width), ("height", asked.height)):
        if side is not None and shaped:
            raise UnfitError(names[name], "contradicts aspect_ratio and resolution: give one or the other")
        if side is not None and (side < PIXELS_PER_TOKEN or side % PIXELS_PER_TOKEN):
            raise UnfitError(names[name], f"a multiple of {PIXELS_PER_TOKEN} is expected, got {shown(side)}")
    if shaped:
        return _shaped(asked, variant, control or (pictures[0] if pictures else None))
    if asked.width is None and asked.height is None:
        return None
    return asked.width or variant.size, asked.height or variant.size


def _shaped(asked: Asked, variant: Variant, like: Image.Image | None) -> tuple[int, int]:
    """The size of a shape and of about as many pixels as a resolution has."""
    side = variant.size
    if asked.resolution is not None:
        if asked.resolution.lower() not in RESOLUTIONS:
            there = ", ".join(RESOLUTIONS)
            raise UnfitError("resolution", f"one of {there} is expected, got {shown(asked.resolution)}")
        side = RESOLUTIONS[asked.resolution.lower()]
    ratio = 1.0 if like is None else like.width / like.height
    if asked.ratio not in (None, "auto"):
        found = RATIO.fullmatch(asked.ratio or "")
        if found is None or not int(found[1]) or not int(found[2]):
            raise UnfitError("aspect_ratio", f"auto or WIDTH:HEIGHT is expected, got {shown(asked.ratio)}")
        ratio = int(found[1]) / int(found[2])
    if not 1 / NARROWEST <= ratio <= NARROWEST:
        raise UnfitError("aspect_ratio", f"shapes from 1:{NARROWEST:g} to {NARROWEST:g}:1 are drawn")
    return whole_tokens(side * math.sqrt(ratio), side / math.sqrt(ratio))


# What is named


def _lora(site: Site, i: int, one: LoraAsked) -> LoraUse:
    """A bundled LoRA, or one of the operator's folder; nothing else on this machine can be named."""
    folder, where = site.options.loras, f"loras.{i}.name"
    if one.name in {path.stem for path in BUNDLED_LORAS.glob("*.safetensors")}:
        return LoraUse(str(BUNDLED_LORAS / f"{one.name}.safetensors"), one.strength)
    if folder is None:
        raise UnfitError(where, f"there is no LoRA {shown(one.name)} here")
    with at(where):
        return LoraUse(str(named(folder, one.name, (".safetensors",))), one.strength)


# What makes the same picture


def _identity(site: Site, offer: Offer, request: Request, output: Mapping[str, Any]) -> str:
    """Equal for requests that make the same files: of the same settings, written in the same way, by the same files."""
    found: list[Stamp] = list(site.offers.files(offer))
    for use in request.loras:
        found += stamps(Path(str(resolved(use.file))))
    for use in request.conditions:
        found += [] if use.network is None else stamps(Path(use.network))
    files = [(stamp.path, stamp.size, stamp.modified) for stamp in found]
    return hashlib.sha256(repr((__version__, request.text(), sorted(output.items()), files)).encode()).hexdigest()
