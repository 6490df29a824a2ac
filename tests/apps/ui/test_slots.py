"""Pictures in the page's slots, without a browser: what is asked of them, whose they are, how long they stay."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from miniflux.apps.ui.fitting import size_like
from miniflux.apps.ui.site import MAX_GIVEN, opened
from miniflux.apps.ui.slots import ITSELF, Slots, steering_from
from miniflux.conditions.masks import feathered, grown
from miniflux.errors import InputError
from miniflux.families import Family
from miniflux.families.flux1 import FLUX1
from miniflux.families.flux2 import FLUX2
from miniflux.families.flux3 import FLUX3
from miniflux.pictures import digest_of
from miniflux.settings import ConditionUse, Request
from tests.apps.ui.test_handlers import ANN, BOB, People
from tests.steered import network, photo


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Iterator[People]:
    folder = tmp_path_factory.mktemp("shelf")
    network(folder / "union.safetensors", modes=3)
    with opened(tmp_path_factory.mktemp("slots"), shelf=str(folder)) as site:
        yield People(site)


def layer(path: Path, box: tuple[int, int, int, int], alpha: int = 255, size: tuple[int, int] = (64, 64)) -> str:
    """What the editor sends of a stroke: nothing but where it is."""
    made = Image.new("RGBA", size)
    made.paste((224, 33, 138, alpha), box)
    made.save(path)
    return str(path)


class Kept:
    """Takes pictures and masks, and gives them their names."""

    def __init__(self) -> None:
        self.all: dict[str, Image.Image | torch.Tensor] = {}

    def __call__(self, picture: Image.Image | torch.Tensor) -> str:
        name = str(len(self.all))
        self.all[name] = picture
        return name


def asked(slots: Slots, family: Family = FLUX1, **other: Any) -> tuple[dict[str, Any], Kept]:
    values = {"width": 64, "height": 64, "as_picture": False, "strength": 0.75, "grow": 0, "feather": 0, "outpaint": ""}
    kept, given = Kept(), {**values, "network": ITSELF, "network_scale": 0.5, "network_mode": "", **other}
    networks = {"net": ("ControlNet", Path("/n")), "redux": ("Redux", Path("/r")), "ip": ("IPAdapter", Path("/i"))}
    found = steering_from(given, slots, networks, lambda size: (size[0] // 2, size[1] // 2), kept, family)
    return found, kept


def test_as_large_as_the_first_reference(tmp_path: Path) -> None:
    """As its family sees it; of FLUX.3 cut back to it, of several or of whole tokens there is nothing to cut."""
    Image.new("RGB", (100, 70)).save(tmp_path / "odd.png")
    Image.new("RGB", (96, 64)).save(tmp_path / "even.png")
    odd, even = str(tmp_path / "odd.png"), str(tmp_path / "even.png")
    for family, references, size, crop in (
        (FLUX1, (odd,), (96, 64), None),
        (FLUX2, (odd, even), (96, 64), None),
        (FLUX3, (odd,), (112, 80), True),
        (FLUX3, (odd, even), (96, 64), None),
        (FLUX3, (even,), (96, 64), None),
    ):
        found, _ = asked(Slots(references=references), family, as_reference=True)
        assert (found["width"], found["height"]) == size and found["conditions"][0].get("crop") is crop
    assert "width" not in asked(Slots(references=(odd,)), FLUX3)[0]
    assert asked(Slots(background=odd, references=(even,)), FLUX3, as_reference=True)[0]["width"] == 64
    with pytest.raises(InputError, match="no reference that the picture could be as large as"):
        asked(Slots(), as_reference=True)
    Image.new("RGB", (16, 96)).save(tmp_path / "thin.png")
    with pytest.raises(InputError, match="sides of at least 64 pixels"):
        asked(Slots(references=(str(tmp_path / "thin.png"),)), FLUX2, as_reference=True)


def test_what_is_painted_is_the_mask(tmp_path: Path) -> None:
    """Layers together, as strongly as they cover; grown and feathered as the library does it."""
    photo(tmp_path / "a.png")
    layers = (layer(tmp_path / "1.png", (0, 0, 20, 20)), layer(tmp_path / "2.png", (10, 10, 40, 30), 51))
    slots = Slots(background=str(tmp_path / "a.png"), layers=layers)
    found, kept = asked(slots)
    assert found == {"image": "0", "width": 64, "height": 64, "strength": 0.75, "mask": "1"}
    wanted = torch.zeros(64, 64)
    wanted[10:30, 10:40] = 0.2
    wanted[:20, :20] = 1
    assert torch.equal(kept.all["1"], wanted)  # type: ignore
    assert digest_of(kept.all["0"]) == digest_of(Image.open(tmp_path / "a.png"))
    found, kept = asked(slots, grow=3, feather=6)
    assert torch.equal(kept.all["1"], feathered(grown(wanted, 3), 6))  # type: ignore


def test_outpainting_adds_to_what_is_painted(tmp_path: Path) -> None:
    photo(tmp_path / "a.png")
    painted = (layer(tmp_path / "1.png", (0, 0, 20, 20)),)
    found, kept = asked(Slots(background=str(tmp_path / "a.png"), layers=painted), outpaint="16, 0, 0,32", strength=1)
    mask: Any = kept.all["1"]
    assert (found["width"], found["height"]) == (80, 96) and "strength" not in found
    assert mask[:, :16].all() and mask[64:].all() and mask[:20, 16:36].all() and not mask[20:64, 16:].any()


def test_pictures_are_brought_to_the_size_that_is_drawn(tmp_path: Path) -> None:
    """The middle of it is kept, and where it was painted goes with it."""
    Image.effect_noise((200, 100), 50).convert("RGB").save(tmp_path / "wide.png")
    stroke = layer(tmp_path / "1.png", (100, 0, 200, 100), size=(200, 100))
    _, kept = asked(Slots(background=str(tmp_path / "wide.png"), layers=(stroke,)))
    mask: Any = kept.all["1"]
    assert kept.all["0"].size == (64, 64) and mask[:, 33:].eq(1).all() and not mask[:, :31].any()  # type: ignore
    found, kept = asked(Slots(background=str(tmp_path / "wide.png"), layers=(stroke,)), as_picture=True)
    assert (found["width"], found["height"]) == kept.all["0"].size == (100, 50)  # type: ignore


@pytest.mark.parametrize(
    ("chosen", "mode", "wanted"),
    [
        (ITSELF, "", {"kind": "Control", "picture": "0"}),
        ("net", "tile", {"kind": "ControlNet", "picture": "0", "scale": 0.5, "network": "net", "mode": "tile"}),
        ("net", "2", {"kind": "ControlNet", "picture": "0", "scale": 0.5, "network": "net", "mode": 2}),
        ("redux", "", {"kind": "Redux", "pictures": ["0"], "scale": [0.5], "network": "redux"}),
        ("ip", "", {"kind": "IPAdapter", "picture": "0", "scale": 0.5, "network": "ip"}),
    ],
)
def test_the_control_picture_goes_to_what_sees_it(
    tmp_path: Path, chosen: str, mode: str, wanted: dict[str, Any]
) -> None:
    found, _ = asked(Slots(control=photo(tmp_path / "a.png")), network=chosen, network_mode=mode)
    assert found == {"conditions": [wanted]}


def test_references_are_told_apart(tmp_path: Path) -> None:
    paths = tuple(photo(tmp_path / f"{i}.png", 20 + i) for i in range(3))
    found, _ = asked(Slots(references=paths))
    assert [(one["kind"], one["index"]) for one in found["conditions"]] == [("Reference", i) for i in (1, 2, 3)]


@pytest.mark.parametrize(
    ("slots", "other", "said"),
    [
        ({"layers": "stroke"}, {}, "there is no picture to change"),
        ({}, {"outpaint": "0,0,16,0"}, "there is no picture to change"),
        ({"background": "photo"}, {"outpaint": "16"}, "outpaint: expected left, top, right, bottom"),
        ({"background": "photo"}, {"outpaint": "0,0,-16,0"}, "outpaint: expected left, top, right, bottom"),
        ({"background": "photo"}, {"outpaint": "0,0,5,0"}, "multiples of 16"),
        ({"control": "photo"}, {"network": "other"}, "network 'other' is not in the folder"),
        ({"control": "photo"}, {"network": "net", "network_mode": "sketch"}, "mode must be one of canny"),
        ({}, {"network": "net"}, "net has no picture to see"),
        ({"control": "text"}, {}, "text.png"),
        ({"references": "text"}, {}, "text.png"),
        ({"background": "cut"}, {}, "cut.png"),
    ],
)
def test_what_makes_no_sense_is_refused_in_words(
    tmp_path: Path, slots: dict[str, str], other: dict[str, Any], said: str
) -> None:
    photo(tmp_path / "photo.png")
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "cut.png").write_bytes((tmp_path / "photo.png").read_bytes()[:500])
    layer(tmp_path / "stroke.png", (0, 0, 9, 9))
    files = {slot: str(tmp_path / f"{name}.png") for slot, name in slots.items()}
    listed: dict[str, Any] = {slot: (file,) if slot[-1] == "s" else file for slot, file in files.items()}
    with pytest.raises(InputError, match=said):
        asked(Slots(**listed), **other)


# At the site


def test_drawn_from_the_slots_and_again_from_the_history(people: People, tmp_path: Path) -> None:
    """A painted picture, a reference and a network of the folder in one; its settings come back into the controls,
    where they draw the same, without the slots; its entry tells the network's name, not its path."""
    stroke = {"background": photo(tmp_path / "a.png"), "layers": [layer(tmp_path / "1.png", (0, 0, 30, 64))]}
    slots = {"image": stroke, "references": [photo(tmp_path / "b.png", 30)], "control": photo(tmp_path / "c.png", 40)}
    more = {"network": "union.safetensors", "network_mode": "tile", "network_scale": 0.5, "seed": "3"}
    assert people.does("draw", **slots, **more)["stage"]["kind"] == "info"
    first = people.drawn()
    assert [use.kind for use in first.request.conditions] == ["Reference", "ControlNet"]
    assert len(first.request.pictures) == 4
    filled = people.tells("use", first.id)
    rest = filled["rest"]["value"]
    assert rest["conditions"][1]["network"] == "union.safetensors" and "also in use" in filled["stage"]["text"]
    again = people.does("draw", seed="3", rest=rest)
    assert again["stage"]["kind"] == "cached" and people.drawn().request == first.request
    other = {**rest, "conditions": [{**rest["conditions"][1], "network": "/etc/passwd"}]}
    refused = people.does("draw", seed="3", rest=other)["stage"]
    assert refused["kind"] == "error" and "'/etc/passwd' is not in the folder of models" in refused["text"]
    people.tells("again", first.id)
    assert people.drawn().request.image == first.request.image


def test_pictures_of_others_are_not_drawn_from(people: People, tmp_path: Path) -> None:
    """Knowing the SHA-256 is not enough."""
    digest = people.site.give(ANN, Image.open(photo(tmp_path / "a.png", 77)))
    for rest in (
        {"image": digest},
        {"conditions": [{"kind": "Reference", "picture": digest}]},
    ):
        refused = people.does("draw", BOB, rest=rest)["stage"]
        assert refused["kind"] == "error" and "put it into its slot again" in refused["text"]
    assert people.site.has(ANN, [digest]) and not people.site.has(BOB, [digest])


def test_a_session_has_its_latest_pictures(people: People) -> None:
    names = [people.site.give(BOB, Image.new("RGB", (16, 16), (i, 0, 0))) for i in range(MAX_GIVEN + 1)]
    assert not people.site.has(BOB, names[:1]) and people.site.has(BOB, names[1:])


def test_settings_of_a_picture_that_is_not_here_say_so(people: People) -> None:
    use = ConditionUse("Reference", (("picture", "1" * 64),))
    for request in (Request(prompt="a", image="0" * 64), Request(prompt="a", conditions=(use,))):
        _, notes = people.handlers._filled(request, people.site.shelf(BOB))
        assert "it was made from another picture, which is not inside it" in notes


@pytest.mark.parametrize(
    ("given", "drawn"),
    [((1000, 500), (192, 96)), ((150, 90), (144, 96)), ((20, 30), (64, 96)), ((10, 2000), (64, 192))],
)
def test_the_picture_gives_the_size(people: People, given: tuple[int, int], drawn: tuple[int, int]) -> None:
    assert size_like(given, people.site.listed["nano-dev"]) == drawn


def test_edges_are_shown_in_the_slot(people: People, tmp_path: Path) -> None:
    pytest.importorskip("cv2")
    shown = people.does("edges", control=photo(tmp_path / "a.png"))["control"]
    assert people.site.uploads.own(ANN, Path(shown)) and not people.site.uploads.own(BOB, Path(shown))
    assert set(np.unique(np.asarray(Image.open(shown)))) == {0, 255}
    assert "no control picture" in people.does("edges", control=None)["stage"]["text"]
