"""Pictures and networks that steer what is drawn: opened, brought to size, kept, and named in the request."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from miniflux.apps.serve.asked import Asked, ConditionAsked, Given, at
from miniflux.apps.serve.fetching import picture_from
from miniflux.apps.serve.names import named
from miniflux.apps.serve.offers import Offer
from miniflux.apps.serve.refusals import UnfitError
from miniflux.apps.serve.site import Site
from miniflux.checks import shown
from miniflux.conditions.again import NETWORKS
from miniflux.pictures import on_white
from miniflux.sampling.latents import PIXELS_PER_TOKEN
from miniflux.settings import ConditionUse
from miniflux.steering import BUNDLED_CONTROLNETS
from miniflux.variants import Variant

FAR = 0.9  # a picture to look at is brought to a size that the model learned if that has so much less of its pixels


def learned(variant: Variant, width: int, height: int) -> tuple[int, int]:
    """The size of a given picture, in whole tokens, brought down to what a model has learned."""
    factor = 1.0
    if variant.learned.area is not None:
        factor = min(factor, math.sqrt(variant.learned.area[1] / (width * height)))
    if variant.learned.sides is not None:
        factor = min(factor, variant.learned.sides[1] / max(width, height))
    return whole_tokens(width * factor, height * factor, down=factor < 1)


def whole_tokens(width: float, height: float, down: bool = False) -> tuple[int, int]:
    """The nearest sides in whole tokens; `down`: those below."""
    near = math.floor if down else round
    sides = [PIXELS_PER_TOKEN * max(1, near(side / PIXELS_PER_TOKEN)) for side in (width, height)]
    return sides[0], sides[1]


# Pictures


def opened_as(asked: Asked, name: str, given: Given) -> Image.Image:
    """A picture; errors name the parameter that it came as."""
    with at(name):
        return picture_from(asked.fetched.get(given.strip(), given) if isinstance(given, str) else given)


def brought(
    picture: Image.Image, size: tuple[int, int], how: Image.Resampling = Image.Resampling.LANCZOS
) -> Image.Image:
    return picture if picture.size == size else picture.resize(size, how)


def changed_by(
    site: Site, asked: Asked, offer: Offer, opened: Sequence[tuple[str, Image.Image]]
) -> tuple[Image.Image | None, Image.Image | None]:
    """The picture that is changed, and where (white), if it is one that is; else the pictures are looked at."""
    name, picture = opened[0] if opened else ("", None)
    first = asked.names["image"]
    if picture is None:
        for what, given in (("mask", asked.mask), ("strength", asked.strength)):
            if given is not None:
                raise UnfitError(what, f"says how a picture is changed, and there is no {first}")
        if offer.fills:
            raise UnfitError(first, f"is missing: {offer.name} completes pictures, and wants one with a mask")
        return None, None
    hollow = _clear(picture) if offer.fills or offer.blind else None
    mask = hollow if asked.mask is None else _given_mask(asked, picture)
    if offer.controlled:
        raise UnfitError(name, f"{offer.name} reads a control picture, and looks at no others")
    if mask is None and offer.fills:
        raise UnfitError("mask", f"is missing: {offer.name} completes pictures where a mask says")
    if mask is None and asked.strength is None:
        if offer.blind:
            there = ", ".join(site.offers.looking())
            raise UnfitError(
                name,
                f"{offer.name} looks at no pictures: give a mask or a strength, by which it changes one, or ask a "
                f"model that does: {there}",
            )
        return None, None
    return on_white(picture), mask


def _clear(picture: Image.Image) -> Image.Image | None:
    """Where a picture is transparent, white; None if it is nowhere."""
    if picture.mode != "RGBA":
        return None
    alpha = np.asarray(picture.getchannel("A"))
    return None if alpha.min() == 255 else Image.fromarray(255 - alpha)


def _given_mask(asked: Asked, picture: Image.Image) -> Image.Image:
    """The mask of a picture, white where it is drawn anew, from either convention."""
    assert asked.mask is not None
    mask = opened_as(asked, "mask", asked.mask)
    if mask.size != picture.size:
        sizes = ["x".join(map(str, one.size)) for one in (mask, picture)]
        raise UnfitError("mask", f"is {sizes[0]}, the picture {sizes[1]}: make them equal")
    clear = _clear(mask)
    if clear is not None and not asked.clear:
        raise UnfitError("mask", "is transparent in places; white is what is drawn anew, black what stays")
    return on_white(mask).convert("L") if clear is None else clear


def mask_of(picture: Image.Image) -> Tensor:
    """As `Inputs.add` takes one."""
    mask = torch.from_numpy(np.asarray(picture).astype(np.float32)) / 255
    if not bool(mask.any()):
        raise UnfitError("mask", "is black everywhere: nothing would be drawn")
    return mask


def looked_at(
    site: Site, offer: Offer, opened: Sequence[tuple[str, Image.Image]], others: Sequence[ConditionUse]
) -> list[ConditionUse]:
    """References, numbered behind those that are there already."""
    if opened and (offer.blind or offer.fills or offer.controlled):
        there = ", ".join(site.offers.looking())
        raise UnfitError(opened[0][0], f"{offer.name} looks at no pictures beside the one it changes; {there} do")
    begin = 1 + sum(use.kind == "Reference" for use in others)
    found: list[ConditionUse] = []
    for i, (_, picture) in enumerate(opened):
        seen = on_white(picture)
        smaller = learned(offer.variant, *seen.size)
        least = 0 if (sides := offer.variant.learned.sides) is None else sides[0]
        if smaller[0] * smaller[1] < FAR * seen.width * seen.height and min(smaller) >= least:
            seen = brought(seen, smaller)
        found.append(ConditionUse("Reference", (("picture", site.inputs.add(seen)), ("index", begin + i))))
    return found


def control_of(site: Site, asked: Asked, offer: Offer, others: Sequence[ConditionUse]) -> Image.Image | None:
    """The control picture of a model that reads one."""
    if asked.control is None:
        if offer.controlled and not any(use.kind == "Control" for use in others):
            raise UnfitError(asked.names["control"], f"is missing: {offer.name} reads a control picture")
        return None
    name, given = asked.control
    if not offer.controlled:
        raise UnfitError(name, f"{offer.name} reads no control picture; a ControlNet does, named in conditions")
    if not asked.edged and not offer.edges:
        raise UnfitError(name, "depth is not measured here: give a depth map as preprocessed_image")
    return on_white(opened_as(asked, name, given))


# What is named


def conditions_of(site: Site, asked: Asked, offer: Offer) -> list[ConditionUse]:
    """Those of the list, references numbered as they come."""
    found: list[ConditionUse] = []
    for i, one in enumerate(asked.conditions):
        if one.kind == "Reference" and (offer.blind or offer.fills or offer.controlled):
            raise UnfitError(f"conditions.{i}", f"{offer.name} looks at no pictures")
        index = 1 + sum(use.kind == "Reference" for use in found)
        found.append(_condition(site, asked, f"conditions.{i}", one, index))
    return found


def _condition(site: Site, asked: Asked, where: str, one: ConditionAsked, index: int) -> ConditionUse:
    """One of them, whose settings are those of `miniflux.conditions`."""
    if one.kind not in ("Reference", "Control", *NETWORKS):
        there = ", ".join(("Reference", "Control", *NETWORKS))
        raise UnfitError(f"{where}.kind", f"one of {there} is expected, got {shown(one.kind)}")
    if one.image is None:
        raise UnfitError(f"{where}.image", f"is missing: a {one.kind} sees a picture")
    steers = one.kind in NETWORKS
    for name, default in (("network", None), ("strength", 1.0), ("start", 0.0), ("stop", 1.0), ("mode", None)):
        told = getattr(one, name) != default
        if told and (not steers or (name == "mode" and one.kind != "ControlNet")):
            raise UnfitError(f"{where}.{name}", f"a {one.kind} has none")
        if told and name in ("start", "stop") and one.kind == "Redux":
            raise UnfitError(f"{where}.{name}", "a Redux is there at all steps")
    if one.start >= one.stop:
        raise UnfitError(f"{where}.start", "must be less than stop")
    digest = site.inputs.add(on_white(opened_as(asked, f"{where}.image", one.image)))
    if one.kind == "Control":
        return ConditionUse("Control", (("picture", digest),))
    if one.kind == "Reference":
        return ConditionUse("Reference", (("picture", digest), ("index", index)))
    if one.network is None:
        raise UnfitError(f"{where}.network", f"is missing: a {one.kind} has a network")
    network = str(_network(site, f"{where}.network", one.kind, one.network))
    if one.kind == "Redux":
        return ConditionUse("Redux", (("pictures", (digest,)), ("scale", (one.strength,))), network)
    about = (("picture", digest), ("scale", one.strength), ("window", (one.start, one.stop)))
    return ConditionUse(one.kind, about if one.mode is None else (*about, ("mode", one.mode)), network)


def _network(site: Site, where: str, kind: str, name: str) -> Path:
    """A network that steers: a bundled one, one beside the models, or one of the operator's folder."""
    if kind == "ControlNet" and name in BUNDLED_CONTROLNETS:
        return BUNDLED_CONTROLNETS[name]
    beside = {called: path for called, (what, path) in site.offers.catalogue.networks.items() if what == kind}
    if name in beside:
        return beside[name]
    if site.options.networks is not None:
        with at(where):
            return named(site.options.networks, name, (".safetensors",))
    there = ", ".join(sorted({*beside, *(BUNDLED_CONTROLNETS if kind == "ControlNet" else ())})) or "none"
    raise UnfitError(where, f"there is no {kind} {shown(name)} here; there are: {there}")


def redux_of(site: Site, asked: Asked) -> ConditionUse:
    """Pictures to vary, by the first Redux network that is here."""
    name = asked.varied[0][0]
    found = [path for kind, path in site.offers.catalogue.networks.values() if kind == "Redux"]
    if not found:
        raise UnfitError(name, "is varied by a Redux network, and none is here")
    digests = tuple(site.inputs.add(on_white(opened_as(asked, where, given))) for where, given in asked.varied)
    scale = (1.0,) * len(digests)
    return ConditionUse("Redux", (("pictures", digests), ("scale", scale)), str(found[0]))
