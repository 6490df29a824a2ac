"""Pictures that were given to a service, and requests that are steered by them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

import miniflux
from miniflux.conditions import Control, ControlNet, Reference
from miniflux.errors import CheckpointError, InputError, ReplayError, SettingsError
from miniflux.pictures import digest_of
from miniflux.service import Given, Models, Queue
from miniflux.service.queue import Preview
from miniflux.settings import ConditionUse, LoraUse, Request
from miniflux.steering import load
from tests.steered import network, photo


def ask(**other: object) -> Request:
    return Request(prompt="a red star", steps=2, seed=3, width=64, height=64, dtype="float32", **other)  # type: ignore


def quiet(_: int, __: Preview | None) -> None:
    """Nobody is told."""


def disc() -> torch.Tensor:
    """A mask with a soft edge, of 256 levels."""
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    return ((2 - ((y - 30) ** 2 + (x - 34) ** 2).sqrt() / 16).clamp(0, 1) * 255).round() / 255


def test_a_request_that_names_pictures_is_drawn_as_generate_draws_it(tmp_path: Path) -> None:
    """A picture with a mask, a reference and a ControlNet, all at once: the same pixels, through JSON and the queue."""
    given, pipe = Given(tmp_path / "given"), miniflux.load("nano", dtype="float32")
    image, reference, hint = (Image.open(photo(tmp_path / f"{i}.png", 20 * i + 20)) for i in range(3))
    file, mask = network(tmp_path / "net.safetensors"), disc()
    conditions = [Reference(reference), ControlNet(load(file), hint, 0.5)]
    options = {"width": 64, "height": 64, "image": image, "mask": mask, "strength": 0.75}
    alone = pipe.generate("a red star", steps=2, seed=3, conditions=conditions, **options)
    uses = (
        ConditionUse("Reference", (("picture", given.add(reference)), ("index", 1))),
        ConditionUse("ControlNet", (("picture", given.add(hint)), ("scale", 0.5)), file),
    )
    request = ask(image=given.add(image), mask=given.add(mask), strength=0.75, conditions=uses)
    assert Request.from_json(request.text()) == request and len(request.pictures) == 4
    assert alone.settings[0]["image"] == request.image and alone.settings[0]["mask"] == request.mask
    models = Models(given=given)
    with Queue(models.draw, models.cost) as queue:
        (made,) = queue.submit("a session of a test", request).results(60)
    assert torch.equal(made.latents, alone.latents) and made.images[0].tobytes() == alone.images[0].tobytes()


def test_references_make_steps_longer(tmp_path: Path) -> None:
    given = Given(tmp_path)
    picture = ConditionUse("Reference", (("picture", given.add(Image.new("RGB", (64, 128)))),))
    models = Models(given=given)
    assert models.cost(ask(conditions=(picture,))).size == 3 * models.cost(ask()).size


def test_what_is_given_is_kept_once_as_it_looks(tmp_path: Path) -> None:
    given = Given(tmp_path / "given")
    clear = Image.new("RGBA", (20, 10), (255, 0, 0, 0))
    name = given.add(clear)
    assert name == given.add(clear) == digest_of(given.picture(name)) == digest_of(clear)
    assert torch.equal(given.mask(given.add(disc())), disc()) and len(list(given.folder.iterdir())) == 2
    seen = given.conditions(ask(conditions=(ConditionUse("Reference", (("picture", name),)),)))[0]
    assert seen.described()["picture"] == digest_of(Image.new("RGB", (20, 10), "white"))
    given.close()
    assert not given.folder.exists() and name not in given


def test_the_folder_is_for_them_alone(tmp_path: Path) -> None:
    """Nothing of others is removed; what an earlier service left is."""
    left = Given(tmp_path / "given").add(Image.new("RGB", (9, 9)))
    (tmp_path / "given" / f"{'0' * 16}.part").touch()
    assert (tmp_path / "given" / f"{left}.png").exists() and left not in Given(tmp_path / "given")
    assert not list((tmp_path / "given").iterdir())
    photo(tmp_path / "given" / "mine.png")
    with pytest.raises(InputError, match=r"mine\.png is in it"):
        Given(tmp_path / "given")
    assert (tmp_path / "given" / "mine.png").exists()


def test_masks_that_are_none_are_refused(tmp_path: Path) -> None:
    given = Given(tmp_path / "given")
    for wrong in (torch.full((4, 4), 5.0), torch.full((4, 4), float("nan")), torch.ones(1, 4, 4)):
        with pytest.raises(InputError, match="a mask must be"):
            given.add(wrong)


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (("Bogus", ()), "kind must be one of"),
        (("Reference", (("picture", 5),)), "picture of a Reference"),
        (("Reference", (("index", 1), ("index", 2))), "index of a Reference is there twice"),
        (("Reference", (("index", [1]),)), "must be numbers or texts"),
        (("Reference", 5), "must be .name, value."),
        (("ControlNet", (), 5), "network must be a string"),
        (("Reference", (), "net"), "a Reference has no network"),
    ],
)
def test_conditions_are_checked_when_they_are_made(made: tuple[object, ...], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        ConditionUse(*made)  # type: ignore
    with pytest.raises(InputError, match="must be a ConditionUse"):
        ask(conditions=("Reference",))


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    noise = [Image.effect_noise((64, 64), 40 + i).convert("RGB") for i in range(3)]
    given = Given(tmp_path, max_bytes=40_000)
    names = [given.add(one) for one in noise[:2]]
    assert given.picture(names[0]).size == (64, 64)
    given.max_bytes = sum(given._sizes.values()) + 1000
    names.append(given.add(noise[2]))
    assert [name in given for name in names] == [True, False, True]
    with pytest.raises(InputError, match="is not here: give it again"):
        given.picture(names[1])


def test_what_is_missing_or_no_picture_is_refused(tmp_path: Path) -> None:
    given, models = Given(tmp_path), Models(given=Given(tmp_path / "other"))
    with pytest.raises(InputError, match="is not here: give it again"):
        models.draw(ask(image=given.add(Image.new("RGB", (64, 64)))), quiet)
    name = given.add(Image.new("RGB", (64, 64)))
    with pytest.raises(ReplayError, match="a ControlNet, whose network is not given"):
        given.conditions(ask(conditions=(ConditionUse("ControlNet", (("picture", name),)),)))
    with pytest.raises(CheckpointError, match=r"none\.safetensors"):
        given.conditions(ask(conditions=(ConditionUse("ControlNet", (("picture", name),), "none.safetensors"),)))
    with pytest.raises(InputError):
        given.add("nothing.png")  # type: ignore


@pytest.mark.parametrize(
    ("about", "said"),
    [
        (3, "conditions must be a list"),
        ([3], r"conditions\[0\] must be an object"),
        ([{}], "kind must be a string"),
        ([{"kind": "Img2Img"}], "kind must be one of Control, Reference"),
        ([{"kind": "Reference", "network": "a"}], "a Reference has no network 'a'"),
        ([{"kind": "Redux", "network": 3}], "network must be a string"),
        ([{"kind": "Control", "picture": {"a": 1}}], "picture of a Control must be numbers or texts"),
        ([{"kind": "Control", "picture": [[1]]}], "picture of a Control must be numbers or texts"),
        ([{"kind": "Control"}] * 17, "17"),
    ],
)
def test_conditions_of_strangers_are_refused_by_name(about: object, said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        Request.from_json({"prompt": "a", "conditions": about})


def test_a_control_picture_is_seen_through_a_control_lora(tmp_path: Path) -> None:
    """The plan counts the channels that the LoRA gives the network, not those of the model."""
    given, pipe = Given(tmp_path / "given"), miniflux.load("nano", dtype="float32")
    hint = Image.open(photo(tmp_path / "hint.png", 20))
    miniflux.lora.attach(pipe, "canny")
    alone = pipe.generate("a red star", steps=2, seed=3, width=64, height=64, conditions=[Control(hint)])
    use = ConditionUse("Control", (("picture", given.add(hint)),))
    with Queue((models := Models(given=given)).draw, models.cost) as queue:
        (made,) = queue.submit("a", ask(loras=(LoraUse("canny", 1.0),), conditions=(use,))).results(60)
    assert torch.equal(made.latents, alone.latents)
