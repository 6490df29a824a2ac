"""What people pass to `generate`: numbers of numpy and torch, names, paths, arrays, functions - and what is refused."""

from __future__ import annotations

import io
import json
import math
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import miniflux
from miniflux.errors import InputError
from miniflux.models.flux1 import run_block
from miniflux.models.layers import attention
from miniflux.pipeline import Pipeline
from miniflux.result import Result
from miniflux.sampling import CACHES, GUIDES, cache, guide
from miniflux.sampling.guidance import USUAL

BOOK = {"steps": 3, "width": 48, "height": 32}
FORMS = [np.int64, np.uint8, np.int16, lambda x: np.array(x), lambda x: torch.tensor(x)]
FLOATS = [np.float32, np.float64, np.float16, lambda x: np.array(x, np.float32), lambda x: torch.tensor(x)]


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return miniflux.tiny()


def draw(pipe: Pipeline, prompt: Any = "a red circle", **options: Any) -> Result:
    return pipe.generate(prompt, **{**BOOK, **options})


@pytest.mark.parametrize("form", FORMS)
def test_whole_numbers_of_numpy(pipe: Pipeline, form: Any) -> None:
    """The picture and its settings are those of Python's own numbers."""
    asked = {"seed": 7, "steps": 3, "width": 48, "height": 32, "images": 2, "t5_length": 8, "stop": 2}
    plain = draw(pipe, variation=(9, 0.5), restart=None, **{**asked, "images": 1})
    given = draw(
        pipe, variation=(form(9), 0.5), **{name: form(value) for name, value in {**asked, "images": 1}.items()}
    )
    assert torch.equal(plain.latents, given.latents)
    assert json.dumps(given.settings) == json.dumps(plain.settings)
    assert len(draw(pipe, images=form(2)).images) == 2


@pytest.mark.parametrize("form", FLOATS)
def test_other_numbers_of_numpy(pipe: Pipeline, form: Any) -> None:
    """Values that float16 holds exactly, so that nothing is rounded."""
    source = draw(pipe).latents

    def options(f: Any) -> dict[str, Any]:
        return {
            "guidance": f(2.5),
            "shift": f(1.5),
            "strength": f(0.5),
            "guide": guide("apg", scale=f(2.0), window=(f(0.0), f(0.75)), momentum=f(-0.5)),
            "cache": cache("first-block", threshold=f(0.125)),
            "variation": (1, f(0.25)),
        }

    plain, given = (draw(pipe, image=source, **options(f)) for f in (float, form))
    assert torch.equal(plain.latents, given.latents)
    assert json.dumps(given.settings) == json.dumps(plain.settings)
    restart = draw(pipe, restart=(form(0.25), form(0.75), 1), steps=4)
    assert json.dumps(restart.settings) == json.dumps(draw(pipe, restart=(0.25, 0.75, 1), steps=4).settings)


def test_noise_levels_of_any_kind(pipe: Pipeline) -> None:
    levels = [1.0, 0.5, 0.25, 0.0]
    expected = draw(pipe, schedule=levels, steps=None)
    for given in (tuple(levels), np.array(levels), torch.tensor(levels), [np.float32(x) for x in levels], iter(levels)):
        result = draw(pipe, schedule=given, steps=None)
        assert json.dumps(result.settings) == json.dumps(expected.settings)


@pytest.mark.parametrize("form", [np.float64, np.array, lambda x: torch.tensor(x, dtype=torch.float64)])
def test_a_function_may_answer_in_numpy(pipe: Pipeline, form: Any, tmp_path: Path) -> None:
    """Of guidance, and of a guide; and its picture can be written, with its numbers."""
    plain = draw(pipe, guidance=lambda s: 2.0 + s, guide=guide("cfg", scale=lambda s: 1.5 + s))
    same = draw(pipe, guidance=lambda s: form(2.0 + s), guide=guide("cfg", scale=lambda s: form(1.5 + s)))
    assert torch.equal(same.latents, plain.latents)
    assert json.dumps(same.settings) == json.dumps(plain.settings)
    same.save(tmp_path / "x.png")


WRONG: list[tuple[dict[str, Any], str]] = [
    *(({name: value}, name) for name in ("seed", "steps", "images", "width", "height", "t5_length", "stop")
      for value in ("4", [4], (4,), {}, 4.0, np.float64(4), math.nan, True, np.bool_(True), np.array([4]), b"4",
                    torch.tensor(True), Decimal(4), -1, 10**5000, 1j)
      if name != "seed" or not isinstance(value, (list, tuple, np.ndarray))),  # a list of seeds: see below
    *(({name: value}, name) for name in ("seed", "images") for value in (None,)),
    *(({name: value}, name) for name in ("guidance", "shift", "strength")
      for value in ("1", [1.0], math.nan, math.inf, -math.inf, True, np.bool_(True), np.array([1.0]), 10**400, -1, 1j)),
    *(({"restart": value}, "restart") for value in (3, "abc", (0.3, 0.6), (0.3, "x", 1), (0.3, 0.6, 1.5))),
    *(({"variation": value}, "variation") for value in
      (3, "ab", (1,), (1, None), ("1", 0.5), (1.5, 0.5), (1, math.nan))),
    *(({"schedule": value, "steps": None}, "schedule|noise level") for value in
      (None, 5, [1.0, None], [1.0, "0.5", 0.0], [[1.0, 0.0]], b"uniform", [], [True, False])),
    *(({"guide": value}, "guid") for value in (3.0, "CFG", "", {"method": "cfg"}, ["cfg"], GUIDES["cfg"])),
    *(({"cache": value}, "cache") for value in (3.0, "TEA", {"name": "tea"}, CACHES["tea"])),
    *(({"solver": value}, "solver") for value in (None, 5, ["euler"], "EULER", b"euler")),
    *(({"padding": value}, "padding") for value in (None, 5, ["masked"], b"masked")),
    *(({name: 5}, name) for name in ("progress", "callback", "watch", "run", "attend", "resume")),
    ({"negative": 5, "guide": "cfg"}, "negative"),
    ({"width": (48, 32)}, r"width must be a whole number .* got \(48, 32\)"),
    ({"seed": torch.Generator()}, "torch.Generator.*initial_seed"),
    *(({"seed": seeds}, f"{len(seeds)} seeds for 1 pictures") for seeds in ([], [1, 2], range(3), np.arange(4))),
    *(({"seed": [seed]}, r"seed\[0\] must be a whole number") for seed in (-1, 2**64, 1.5, True, None, "1")),
]  # fmt: skip


@pytest.mark.parametrize(("options", "name"), WRONG)
def test_other_kinds_are_refused_by_name(pipe: Pipeline, options: dict[str, Any], name: str) -> None:
    """One line, of a length that can be read."""
    more = {"image": draw(pipe).latents} if "strength" in options else {}
    with pytest.raises(InputError, match=name) as caught:
        draw(pipe, **more, **options)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("prompts", [["a", "b"], ("a", "b"), np.array(["a", "b"]), (x for x in "ab"), iter(["a", "b"])])
def test_prompts_of_any_kind(pipe: Pipeline, prompts: Any) -> None:
    result = draw(pipe, prompts)
    assert [about["prompt"] for about in result.settings] == ["a", "b"]
    assert all(type(about["prompt"]) is str for about in result.settings)


def test_the_empty_prompt_is_a_prompt(pipe: Pipeline) -> None:
    assert draw(pipe, "").settings[0]["prompt"] == ""
    assert draw(pipe, np.str_("a")).settings[0]["prompt"] == draw(pipe, np.array("a")).settings[0]["prompt"] == "a"


@pytest.mark.parametrize(
    "prompt", [None, 5, b"a", {"a": 1}, {"a"}, [None], ["a", 5], [b"a"], [["a"]], [], (), True, np.array(5)]
)
def test_what_is_no_prompt_is_refused(pipe: Pipeline, prompt: Any) -> None:
    with pytest.raises(InputError, match="prompt must be"):
        draw(pipe, prompt)


@pytest.mark.parametrize("name", GUIDES)
def test_guides_by_name_do_something(pipe: Pipeline, name: str) -> None:
    """As the guide of that name with a usual scale; it works, and the settings say which."""
    named = draw(pipe, guide=name, negative="a star", steps=12)
    made = guide(name, **({"scale": USUAL[name]} if name in USUAL else {}))
    assert torch.equal(named.latents, draw(pipe, guide=made, negative="a star", steps=12).latents)
    assert not torch.equal(named.latents, draw(pipe, steps=12).latents)
    assert named.settings[0]["guide"]["method"] == name


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return Image.effect_noise((48, 32), 90).convert("RGB")


def test_images_of_any_kind_are_one_picture(pipe: Pipeline, photo: Image.Image, tmp_path: Path) -> None:
    photo.save(tmp_path / "photo.png")
    pixels = torch.from_numpy(np.array(photo)).permute(2, 0, 1).float() / 127.5 - 1
    expected = draw(pipe, image=photo, strength=0.5)
    for given in (
        tmp_path / "photo.png",
        str(tmp_path / "photo.png"),
        np.array(photo),
        np.array(photo)[::1, ::-1][:, ::-1],
    ):
        result = draw(pipe, image=given, strength=0.5)
        assert torch.equal(result.latents, expected.latents)
        assert result.settings == expected.settings
    assert torch.equal(draw(pipe, image=pixels, strength=0.5).latents, expected.latents)
    assert torch.equal(draw(pipe, image=pixels.requires_grad_(), strength=0.5).latents, expected.latents)
    assert draw(pipe, image=pixels, strength=0.5, width=None, height=None).images[0].size == (48, 32)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((32, 48, 3)), "uint8"),
        (np.zeros((3, 32, 48), np.uint8), r"\(H, W, 3\)"),
        (np.zeros((32, 48), np.uint8), r"\(H, W, 3\)"),
        (np.zeros((0, 48, 3), np.uint8), r"\(H, W, 3\)"),
        (torch.zeros(32, 48, 3), r"\(3, H, W\)"),
        (torch.zeros(1, 3, 32, 48), r"\(3, H, W\)"),
        (torch.zeros(3, 0, 0), r"\(3, H, W\)"),
        (torch.zeros(3, 32, 48, dtype=torch.uint8), "floating"),
        (torch.full((3, 32, 48), 255.0), r"\[-1, 1\].*255"),
        (torch.full((3, 32, 48), math.nan), "finite"),
        (torch.full((1, 16, 4, 6), math.inf), "finite"),
        ("missing.png", "missing.png"),
        (Path("missing.png"), "missing.png"),
        (5, "path, a Pillow picture"),
        ([[0, 0, 0]], "path, a Pillow picture"),
    ],
)  # fmt: skip
def test_what_is_no_image_is_refused(pipe: Pipeline, image: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        draw(pipe, image=image, strength=0.5)


def test_functions_in_the_place_of_blocks_and_attention(pipe: Pipeline, tmp_path: Path) -> None:
    """They see every block of every step, also inside guides and caches; what they change is drawn, and said."""
    names, heads = list[str](), list[int]()

    def run(name: str, block: Any, streams: Any, context: Any) -> Any:
        names.append(name)
        return run_block(name, block, streams, context)

    def attend(q: Tensor, k: Tensor, v: Tensor, pe: Tensor, mask: Tensor | None = None) -> Tensor:
        heads.append(q.shape[1])
        return attention(q, k, v, pe, mask)

    plain, watched = draw(pipe), draw(pipe, run=run, attend=attend)
    assert torch.equal(plain.latents, watched.latents)
    assert names == ["double_blocks.0", "double_blocks.1", "single_blocks.0", "single_blocks.1"] * 3
    assert heads == [4] * 12
    assert watched.settings[0]["wrapped"] == ["run", "attend"] and "wrapped" not in plain.settings[0]
    assert json.loads(json.dumps(watched.settings)) == watched.settings
    changed = draw(pipe, attend=lambda q, k, v, pe, mask=None: 0.5 * attention(q, k, v, pe, mask))
    assert not torch.equal(plain.latents, changed.latents)
    for options in ({"guide": "nag"}, {"guide": "cfg"}, {"guide": "skip-layer", "steps": 12}, {"cache": "taylor"}):
        heads.clear(), names.clear()
        given = draw(pipe, run=run, attend=attend, **options)
        assert torch.equal(given.latents, draw(pipe, **options).latents)
        assert len(heads) == len(names) > 0
    path = draw(pipe, attend=attend).save(tmp_path / "a.png")
    from miniflux.settings.reading import read_picture

    assert any("attend" in doubt for record in read_picture(path).records for doubt in record.doubts)


def test_functions_make_a_picture_that_is_not_kept(tmp_path: Path) -> None:
    pipe = miniflux.load("nano", cache=tmp_path)
    first, second = (pipe.generate("x", steps=1, width=32, height=32, run=run_block) for _ in range(2))
    assert not first.cached and not second.cached and not first.keys
    assert "run" in first.settings[0]["not_cached"]


def test_a_callback_that_returns_nonsense_is_refused(pipe: Pipeline) -> None:
    with pytest.raises(InputError, match="callback must return None or latents"):
        draw(pipe, callback=lambda i, moment: moment.x[:, :2])
    with pytest.raises(InputError, match="callback must return"):
        draw(pipe, callback=lambda i, moment: 5)
    with pytest.raises(InputError, match="callback must return None or a torch tensor, got ndarray"):
        draw(pipe, callback=lambda i, moment: moment.x.numpy())


def test_a_moment_of_another_size_is_refused(pipe: Pipeline) -> None:
    moment = draw(pipe, stop=1).moment
    with pytest.raises(InputError, match="resume is from a picture of 6 tokens; this one has 8"):
        draw(pipe, resume=moment, width=64)


def test_public_names_are_shown() -> None:
    assert {"load", "tiny", "Pipeline", "Result", "lora", "sampling", "__version__"} <= set(dir(miniflux))
    assert not [name for name in dir(miniflux) if not name.startswith("__") and name not in miniflux.__all__]
    assert all(getattr(miniflux, name) is not None for name in miniflux.__all__)


def test_results_can_be_compared_and_kept_in_sets(pipe: Pipeline) -> None:
    one, again = draw(pipe), draw(pipe)
    assert one == one and one != again and len({one, again, one}) == 2


def test_a_result_shows_itself(pipe: Pipeline) -> None:
    """In a notebook as a picture, in text as a line."""
    one, four = draw(pipe, seed=3), draw(pipe, seed=3, images=4)
    for result in (one, four):
        with Image.open(io.BytesIO(result._repr_png_())) as shown:
            assert shown.size == result.grid().size and shown.tobytes() == result.grid().tobytes()
    assert repr(one) == "<Result: 1 picture of 48x32, tiny-flux1-dev, seed 3>"
    assert repr(four) == "<Result: 4 pictures of 48x32, tiny-flux1-dev, seeds 3 to 6>"


# What models want that read more than the noisy picture, by how many channels: Canny and Depth, Fill.
PHOTO = Image.effect_noise((64, 64), 90).convert("RGB")
NEEDED: dict[int, dict[str, Any]] = {
    64: {"conditions": [miniflux.conditions.Control(PHOTO)]},
    320: {"image": PHOTO, "mask": torch.ones(64, 64)},
}


@pytest.mark.parametrize("name", [*miniflux.variants.names(), "nano"])
def test_tiny_pipelines(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Of every variant, the same for the same seed, with the variant's own defaults."""
    pipe, again, other = miniflux.tiny(name, seed=1), miniflux.tiny(name, seed=1), miniflux.tiny(name, seed=2)
    variant = miniflux.variants.variant(name)
    given = NEEDED.get(variant.transformer.in_channels - variant.transformer.out_channels, {})
    first = pipe.generate("x", **given)
    assert first.settings[0]["steps"] == variant.steps and first.settings[0]["guidance"] == variant.guidance
    assert torch.equal(first.latents, again.generate("x", **given).latents)
    assert not torch.equal(first.latents, other.generate("x", **given).latents)
    assert not torch.equal(first.latents, pipe.generate("y", **given).latents)
    assert not torch.equal(first.latents, pipe.generate("x", seed=1, **given).latents)
    assert len(np.unique(np.array(first.images[0]).reshape(-1, 3), axis=0)) > 1000
    assert not caplog.records  # no size is better than another
    assert pipe.transformer.config.guidance_embed == variant.transformer.guidance_embed


def test_a_tiny_pipeline_takes_every_option(pipe: Pipeline, photo: Image.Image) -> None:
    moment = draw(pipe, stop=1).moment
    for options in (
        {"solver": "unipc-3", "schedule": "karras", "shift": 2.0}, {"padding": "masked"}, {"padding": "trimmed"},
        {"guide": "perp-neg", "negative": "x"}, {"cache": "tea"}, {"image": photo, "strength": 0.5}, {"resume": moment},
        {"cache": "mag", "check_cache": True, "steps": 10}, {"t5_length": 64}, {"width": 40, "height": 100},
    ):  # fmt: skip
        assert torch.isfinite(draw(pipe, **options).latents).all()
    assert pipe.preview(moment, 48, 32).size == (48, 32)
    assert miniflux.tiny(dtype="bfloat16").dtype == torch.bfloat16


def test_tiny_refuses_what_it_cannot_make() -> None:
    with pytest.raises(InputError, match="unknown model 'flux9'; known: flux1-dev"):
        miniflux.tiny("flux9")
    for seed in (-1, 1.5, "1", None):
        with pytest.raises(InputError, match="seed must be"):
            miniflux.tiny(seed=seed)  # type: ignore[arg-type]


def test_tiny_leaves_the_generator_of_torch_alone() -> None:
    state = torch.get_rng_state()
    miniflux.tiny()
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("form", [list, tuple, np.array, torch.tensor])
def test_a_seed_for_each_picture(pipe: Pipeline, form: Any) -> None:
    """Noise, steps of a stochastic solver, settings: of each as with its seed alone; by twos, and in any order."""
    more: dict[str, Any] = {"solver": "euler-ancestral", "variation": (7, 0.25)}
    own = draw(pipe, ["a red circle", "a star"], images=2, seed=form([9, 4, 9, 2]), batch=2, **more)
    for i, seed in enumerate([9, 4, 9, 2]):
        prompt = ["a red circle", "a star"][i // 2]
        one = draw(pipe, prompt, seed=seed, **{**more, "variation": (7 + i, 0.25)})
        torch.testing.assert_close(own.latents[i], one.latents[0], rtol=0, atol=1e-4)
        told = {name: value for name, value in own.settings[i].items() if name != "batch"}
        assert json.dumps(told) == json.dumps(one.settings[0])
    with pytest.raises(InputError, match="3 seeds for 4 pictures"):
        draw(pipe, ["a", "b"], images=2, seed=form([1, 2, 3]))
    counted = draw(pipe, images=3, seed=range(5, 8))
    assert torch.equal(counted.latents, draw(pipe, images=3, seed=5).latents)
