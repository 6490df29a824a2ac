"""A condition from what settings say of it, and the pictures and networks that it had: for replay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from miniflux.conditions.condition import Condition
from miniflux.conditions.control import Control
from miniflux.conditions.controlnet import ControlNet
from miniflux.conditions.ip_adapter import IPAdapter
from miniflux.conditions.redux import Redux
from miniflux.conditions.reference import Reference
from miniflux.conditions.steering import Steering
from miniflux.errors import InputError, MinifluxError, ReplayError
from miniflux.models import controlnet, redux
from miniflux.models.flux2_controlnet import Flux2ControlNet
from miniflux.models.ip_adapter import InstantxIPAdapter, XlabsIPAdapter
from miniflux.pictures import digest_of, on_white, open_picture

NETWORKS = {
    "ControlNet": (controlnet.ControlNet, Flux2ControlNet),
    "Redux": (redux.Redux,),
    "IPAdapter": (XlabsIPAdapter, InstantxIPAdapter),
}
KINDS = {"Control": Control, "Reference": Reference, "ControlNet": ControlNet, "Redux": Redux, "IPAdapter": IPAdapter}
# Settings that are the SHA-256 of a picture, or of several.
PICTURES = ("picture", "pictures", "negative", "image", "mask")


def again(
    described: Sequence[Mapping[str, Any]], pictures: Sequence[str | Image.Image], networks: Sequence[Steering]
) -> list[Condition]:
    """The conditions of a picture, in their order.

    Args:
        described: `kind`, and what `Condition.described` told.
        pictures: that they had, in any order.
        networks: that they had; several of a kind in the order of their conditions.

    Raises:
        ReplayError: a kind that is not known, a picture or a network is not given, or a scale was a function.
        InputError: a picture or a network is given that none of them had.
    """
    opened = {digest_of(one): one for one in (on_white(open_picture(one)) for one in pictures)}
    unused, left = set(opened), list(networks)
    made: list[Condition] = []
    for about in described:
        kind, told = str(about.get("kind")), {name: value for name, value in about.items() if name != "kind"}
        if kind not in KINDS:
            raise ReplayError(f"it was steered by a {kind}, which is not known here")
        if told.get("scale") == "a function":
            raise ReplayError(f"the scale of a {kind} was a function of the noise level, which no file holds")
        for name in PICTURES:
            if name in told:
                digests = told[name] if isinstance(told[name], list) else [told[name]]
                if not all(isinstance(digest, str) for digest in digests):
                    raise ReplayError(f"what its file says of the picture of a {kind} is no SHA-256")
                missing = next((digest for digest in digests if digest not in opened), None)
                if missing is not None:
                    raise ReplayError(
                        f"it was steered by a {kind} with another picture (SHA-256 {str(missing)[:12]}...), "
                        "which its file does not hold: give that one as well (--picture FILE)"
                    )
                unused -= set(digests)
                found = [opened[digest] for digest in digests]
                told[name] = found if isinstance(told[name], list) else found[0]
        if kind in NETWORKS:
            network = next((one for one in left if isinstance(one.network, NETWORKS[kind])), None)
            if network is None:
                raise ReplayError(f"it was steered by a {kind}, whose network is not given (--network FILE)")
            left.remove(network)
            told["network"] = network
        if "pictures" in told:
            told["picture"] = told.pop("pictures")
        for name in ("window", "size"):
            if isinstance(told.get(name), list):
                told[name] = tuple(told[name])
        try:
            made.append(KINDS[kind](**told))
        except (TypeError, ValueError, OverflowError) as error:
            if isinstance(error, MinifluxError):
                raise
            raise ReplayError(f"what its file says of a {kind} is not understood: {error}") from error
    if unused:
        raise InputError("a picture was given (--picture) that did not steer this one")
    if left:
        raise InputError(f"a {type(left[0].network).__name__} was given (--network) that did not steer this picture")
    return made
