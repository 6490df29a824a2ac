"""The sampling arguments of `Pipeline.generate`: what they do to pictures, and what they refuse."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import miniflux
from miniflux.arguments import levels_for
from miniflux.errors import InputError
from miniflux.pictures import from_image
from miniflux.pipeline import Pipeline
from miniflux.result import Result, psnr, to_image
from miniflux.sampling import SOLVERS, Moment, guide, initial_noise
from miniflux.settings import read_picture

PROMPT, OTHER = "a red circle on a blue background", "a green star on a white background"
SMALL = {"width": 64, "height": 64}


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return miniflux.load("nano")


def draw(pipe: Pipeline, prompt: str = PROMPT, **settings) -> Result:
    return pipe.generate(prompt, **{"steps": 6, **SMALL, **settings})


@pytest.mark.parametrize("solver", ["euler", "heun", "dpmpp-2m", "unipc-3", "dpmpp-2m-sde", "euler-ancestral:0.5"])
def test_resumed_is_uninterrupted(pipe: Pipeline, solver: str) -> None:
    """A run stopped after 2 of 6 steps and gone on with is the same bit for bit."""
    whole = draw(pipe, solver=solver)
    first = draw(pipe, solver=solver, stop=2)
    assert first.moment is not None and first.moment.step == 2
    assert not torch.equal(first.latents, whole.latents)
    rest = draw(pipe, solver=solver, resume=first.moment)
    assert torch.equal(rest.latents, whole.latents)


def test_what_stop_shows(pipe: Pipeline) -> None:
    """The latents are still noisy; the picture is the one they point to, near the finished one late in a run."""
    whole, late = draw(pipe, steps=12), draw(pipe, steps=12, stop=10)
    assert psnr(whole.images[0], late.images[0]) > 20
    assert late.settings[0]["stop"] == 10


def test_strength_is_continuous(pipe: Pipeline) -> None:
    """No cliff at any step boundary: latents a hair apart in strength are a hair apart."""
    source = draw(pipe, OTHER).latents
    for strength in (0.25, 0.5, 0.75):
        below, above = (draw(pipe, image=source, strength=strength + d, steps=4).latents for d in (-1e-6, 1e-6))
        assert (above - below).norm() / below.norm() < 1e-4


@pytest.mark.parametrize("solver", SOLVERS)
def test_strength_is_continuous_for_every_solver(pipe: Pipeline, solver: str) -> None:
    """Across the place where a step more begins, and up to a whole picture: in proportion to the change of strength."""
    source = draw(pipe, OTHER, steps=4).latents

    def change(low: float, high: float) -> float:
        below, above = (draw(pipe, image=source, strength=s, steps=2, solver=solver).latents for s in (low, high))
        return float((above - below).norm())

    assert change(0.5 - 1e-5, 0.5 + 1e-5) < change(0.5 - 1e-4, 0.5 + 1e-4) / 5
    assert change(1 - 1e-5, 1.0) < change(1 - 1e-4, 1.0) / 5


def test_strength_keeps_or_replaces(pipe: Pipeline) -> None:
    """A little changes little; all of it is a picture from noise alone; latents stand for the image they decode to."""
    source = draw(pipe, OTHER, steps=10)
    little = draw(pipe, image=source.images[0], strength=0.1)
    much = draw(pipe, image=source.images[0], strength=0.9)
    assert psnr(little.images[0], source.images[0]) > psnr(much.images[0], source.images[0]) + 6
    assert torch.equal(draw(pipe, image=source.images[0], strength=1.0).latents, draw(pipe).latents)
    same = draw(pipe, image=source.latents, strength=0.1)
    assert psnr(same.images[0], little.images[0]) > 30


def test_variation_goes_from_one_seed_to_the_other(pipe: Pipeline) -> None:
    base, other = draw(pipe, seed=3), draw(pipe, seed=8)
    assert torch.equal(draw(pipe, seed=3, variation=(8, 0.0)).latents, base.latents)
    assert torch.equal(draw(pipe, seed=3, variation=(8, 1.0)).latents, other.latents)
    near = draw(pipe, seed=3, variation=(8, 0.1)).latents
    assert 0 < (near - base.latents).norm() < (near - other.latents).norm()
    second = pipe.generate(PROMPT, seed=2, images=2, variation=(7, 0.1), steps=6, **SMALL)  # type: ignore[arg-type]
    assert torch.equal(second.latents[1:], near)


def test_stochastic_pictures_depend_on_their_seed_alone(pipe: Pipeline) -> None:
    """Image i of a call equals that seed alone, with noise drawn at every step."""
    both = draw(pipe, seed=5, images=2, solver="euler-ancestral")
    assert torch.equal(both.latents[1:], draw(pipe, seed=6, solver="euler-ancestral").latents)
    assert not torch.equal(both.latents[:1], draw(pipe, seed=5).latents)


def test_threads_equal_serial_runs(pipe: Pipeline) -> None:
    """Four threads, eight requests of different solvers, schedules and guides on one pipeline: bitwise the same."""
    kinds = [
        {"solver": "heun", "schedule": "karras"},
        {"solver": "dpmpp-2m", "steps": 5},
        {"solver": "euler-ancestral", "shift": 3.0},
        {"guide": guide("apg", scale=2.0, momentum=0.5), "negative": OTHER},
        {"guide": guide("nag", scale=3.0, alpha=0.5), "negative": OTHER},
        {"cache": "taylor", "schedule": "beta"},
        {"guide": guide("skip-layer", scale=1.5, skip_window=(0.0, 1.0))},
        {"solver": "unipc-3", "schedule": [1.0, 0.7, 0.5, 0.2, 0.0], "steps": None},
    ]
    serial = [draw(pipe, seed=i, **kind).latents for i, kind in enumerate(kinds)]
    with ThreadPoolExecutor(4) as pool:
        runs = [pool.submit(draw, pipe, seed=i, **kind) for i, kind in enumerate(kinds)]
    assert all(torch.equal(run.result().latents, latents) for run, latents in zip(runs, serial, strict=True))


def test_guides_change_pictures_and_are_told(pipe: Pipeline) -> None:
    plain = draw(pipe)
    strong = draw(pipe, guide=guide("cfg", scale=lambda sigma: 1 + sigma, window=(0.0, 0.5)), negative=OTHER)
    assert not torch.equal(strong.latents, plain.latents)
    told = strong.settings[0]["guide"]
    assert told["method"] == "cfg" and told["scale"][0] == 2.0 and len(told["scale"]) == 6
    assert json.loads(json.dumps(strong.settings)) == strong.settings
    assert torch.equal(draw(pipe, guide=guide("cfg", scale=1.0), negative=OTHER).latents, plain.latents)


def test_cache_tells_its_bill(pipe: Pipeline) -> None:
    """Blocks computed and spared make all blocks of all calls; the check is against the run without a cache."""
    result = draw(pipe, cache="taylor", check_cache=True, steps=8)
    told, exact = result.settings[0]["cache"], draw(pipe, steps=8)
    assert told["evaluated"] + told["skipped"] == 8 * 5 and told["skipped"] == 2 * 5
    assert told["psnr"] == pytest.approx(psnr(result.images[0], exact.images[0]))
    assert told["latent_l2"] == pytest.approx(
        float((result.latents - exact.latents).norm() / exact.latents.norm()), 1e-4
    )


def test_callback_reads_and_replaces(pipe: Pipeline) -> None:
    """It sees every step of every picture; what it returns is gone on with."""
    seen: list[tuple[int, int, float]] = []
    plain = pipe.generate(
        PROMPT, images=2, steps=3, **SMALL, callback=lambda i, m: seen.append((i, m.step, m.sigma))  # type: ignore[arg-type]
    )  # fmt: skip
    assert [(i, step) for i, step, _ in seen] == [(i, step) for i in range(2) for step in (1, 2, 3)]
    assert [sigma for _, _, sigma in seen[:3]] == plain.settings[0]["sigmas"][1:]

    def fresh(_: int, moment: Moment) -> torch.Tensor | None:
        return torch.zeros_like(moment.x) if moment.step == 3 else None

    assert not draw(pipe, steps=3, callback=fresh).latents.any()


def test_cancelling_leaves_the_pipeline_usable(pipe: Pipeline) -> None:
    expected = draw(pipe).latents

    def stop(_: int, moment: Moment) -> None:
        if moment.step == 2:
            raise KeyboardInterrupt

    for options in ({}, {"cache": "first-block"}, {"guide": guide("nag", scale=3.0)}):
        with pytest.raises(KeyboardInterrupt):
            draw(pipe, callback=stop, **options)
    assert torch.equal(draw(pipe).latents, expected)


def test_previews_resemble_the_picture(pipe: Pipeline) -> None:
    """At the size asked for, and already near the picture before the last step."""
    previews: list[Image.Image] = []
    result = draw(
        pipe, width=96, height=64, steps=8, callback=lambda _, moment: previews.append(pipe.preview(moment, 96, 64))
    )
    assert previews[-1].size == (96, 64)
    assert psnr(previews[-1], result.images[0]) > 15
    assert result.moment is not None
    table = pipe.preview(result.moment, 96, 64, "table")
    assert psnr(table, result.images[0]) > 15
    # The tiny decoder is the better one, and so the one that is taken.
    assert psnr(previews[-1], result.images[0]) > psnr(table, result.images[0]) + 3
    assert pipe.preview(result.moment, 96, 64, "tiny").tobytes() == previews[-1].tobytes()


def test_previews_that_are_not_there(pipe: Pipeline) -> None:
    """Without a tiny decoder the table is taken; what is asked for by name must be there."""
    moment = draw(pipe, steps=1).moment
    assert moment is not None
    parts = pipe.transformer, pipe.autoencoder, pipe.text
    without, bare = Pipeline(pipe.variant, *parts), Pipeline(replace(pipe.variant, preview=()), *parts)
    assert without.preview(moment, 64, 64).tobytes() == pipe.preview(moment, 64, 64, "table").tobytes()
    with pytest.raises(InputError, match=r"no preview tiny: its file .* goes beside the others"):
        without.preview(moment, 64, 64, "tiny")
    with pytest.raises(InputError, match=r"no preview table: sampling\.previews\.fit makes one"):
        bare.preview(moment, 64, 64)
    with pytest.raises(InputError, match="unknown preview decoder 'large'; known: tiny, table"):
        pipe.preview(moment, 64, 64, "large")


def test_auto_is_what_suits_the_solver(pipe: Pipeline) -> None:
    """Solvers in lambda take small steps at both ends; models made for few levels keep theirs; the settings say it."""
    plain, smooth = draw(pipe).settings[0], draw(pipe, solver="dpmpp-2m").settings[0]
    assert (plain["schedule"], smooth["schedule"]) == ("uniform", "beta-flow")
    assert smooth["sigmas"][1] > plain["sigmas"][1] and smooth["sigmas"][-2] < 0.6 * plain["sigmas"][-2]
    asked = draw(pipe, solver="dpmpp-2m", schedule="uniform")
    assert asked.settings[0]["sigmas"] == plain["sigmas"]
    schnell = miniflux.variants.VARIANTS["nano-schnell"]
    assert list(levels_for(schnell, "auto", 4, 64, None, SOLVERS["dpmpp-2m"])) == [1.0, 0.75, 0.5, 0.25, 0.0]
    with pytest.raises(InputError, match="unknown schedule 'smooth'; known: auto, uniform"):
        draw(pipe, schedule="smooth")


def test_restarts_draw_the_same_scene(pipe: Pipeline) -> None:
    result = draw(pipe, restart=(0.3, 0.6, 2), steps=8)
    assert result.settings[0]["restart"] == [0.3, 0.6, 2]
    assert result.settings[0]["steps"] > 8 and not torch.equal(result.latents, draw(pipe, steps=8).latents)


def test_pixels_there_and_back() -> None:
    """from_image inverts to_image; transparency is white."""
    image = Image.effect_noise((32, 16), 90).convert("RGB")
    assert to_image(from_image(image)).tobytes() == image.tobytes()
    clear = from_image(Image.new("RGBA", (2, 2), (255, 0, 0, 0)))
    assert torch.equal(clear, torch.ones(3, 2, 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "leapfrog"}, "unknown solver 'leapfrog'"),
        ({"schedule": [1.0, 0.5, 0.5, 0.0], "steps": None}, "noise level 2 is 0.5"),
        ({"schedule": [1.0, 0.5, 0.0]}, "steps 6 and a schedule of 2 steps"),
        ({"schedule": [1.0, 0.5, 0.0], "steps": None, "shift": 2.0}, "shift 2.0 cannot be applied"),
        ({"steps": 0}, "steps must be a whole number from 1"),
        ({"shift": float("nan")}, "shift must be a positive number"),
        ({"negative": "a star"}, "no effect without a guide"),
        ({"strength": 0.5}, "no image is given"),
        ({"image": Image.new("RGB", (64, 64)), "strength": 0.0}, "strength must be a number above 0"),
        ({"image": Image.new("RGB", (60, 64))}, "the image is 60x64"),
        ({"image": Image.new("RGB", (128, 64))}, "the image is 128x64, to be drawn at 64x64"),
        ({"image": torch.zeros(1, 4, 8, 8)}, r"latents must be \(1, 16, h, w\)"),
        ({"variation": (1, 2.0)}, "amount of variation"),
        ({"cache": "magic"}, "unknown cache 'magic'"),
        ({"check_cache": True}, "no cache is given"),
        ({"stop": 7}, "stop must be a number of steps from 1 to 6, got 7"),
        ({"restart": (0.6, 0.3, 1)}, "a restart needs"),
        ({"width": 8192, "height": 8192}, "262144 tokens is beyond the noise levels of nano-dev"),
    ],
)
def test_bad_input_is_refused_before_any_call(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch, options: dict, message: str
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("the network was called")

    monkeypatch.setattr(pipe.transformer, "forward", never)
    with pytest.raises(InputError, match=message):
        draw(pipe, **options)


def test_resume_from_elsewhere_is_refused(pipe: Pipeline) -> None:
    moment = draw(pipe, stop=2).moment
    with pytest.raises(InputError, match="from a run of 6 steps; this one has 7"):
        draw(pipe, resume=moment, steps=7)
    with pytest.raises(InputError, match="resume is for a single picture, got 2"):
        draw(pipe, resume=moment, images=2)
    with pytest.raises(InputError, match="nothing is left"):
        draw(pipe, resume=draw(pipe).moment)


def test_noise_of_a_stochastic_step_is_not_the_first_noise(pipe: Pipeline) -> None:
    """The seed's own noise is not drawn again by a solver: steps have a generator of their own."""
    fresh = miniflux.sampling.step_noise([4])(0, torch.empty(1, 16, 64))
    assert abs(float(torch.corrcoef(torch.stack([fresh.flatten(), initial_noise(64, 64, 4).flatten()]))[0, 1])) < 0.2


def test_noise_left_in_the_picture_and_unlearned_sizes_are_said(
    pipe: Pipeline, caplog: pytest.LogCaptureFixture
) -> None:
    draw(pipe, steps=None, schedule=[1, 0.5])
    assert "the noise levels end at 0.5, not at 0" in caplog.text and "48" not in caplog.text
    caplog.clear()
    draw(pipe, steps=2, width=48)
    assert "48x64 is not a size that nano-dev was trained on" in caplog.text
    assert "it learned sides of 64 to 192 pixels" in caplog.text and "noise levels" not in caplog.text
    caplog.clear()
    draw(pipe, steps=2)
    assert not caplog.records


def test_half_characters_in_texts(pipe: Pipeline, tmp_path: Path) -> None:
    """Joined where they belong together, else refused in a line; never an error of the tokenizers."""
    whole = draw(pipe, "a \U0001f600 star, café", steps=1)
    halves = draw(pipe, "a \ud83d\ude00 star, caf\udcc3\udca9", steps=1)
    assert halves.settings[0]["prompt"] == whole.settings[0]["prompt"]
    assert torch.equal(halves.latents, whole.latents)
    assert read_picture(halves.save(tmp_path / "a.png")).requests[0].prompt == "a \U0001f600 star, café"
    for given in ({"prompt": "a \ud800"}, {"prompt": ["a", "b\udce9"]}, {"negative": "\udfff", "guide": guide("cfg")}):
        with pytest.raises(InputError, match="holds (half a character|the byte 0xe9)"):
            draw(pipe, **{"prompt": PROMPT, **given})
    with pytest.raises(InputError, match="must be a string"):
        draw(pipe, [3])  # type: ignore[arg-type]


def test_names_that_are_no_text_leave_the_picture_readable(pipe: Pipeline, tmp_path: Path) -> None:
    """A LoRA's file may be named in bytes that are not UTF-8."""
    made = draw(pipe, steps=1)
    loras = [
        {"name": "caf\udce9", "source": "caf\udce9.safetensors", "scale": 1.0, "scheduled": False, "merged": False}
    ]
    made.settings[0]["loras"] = loras
    for name in ("a.png", "a.jpg", "a.webp"):
        (use,) = read_picture(made.save(tmp_path / name)).requests[0].loras
        assert use.file.startswith("caf") and use.file.endswith(".safetensors")
