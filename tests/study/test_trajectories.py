"""Paths: their geometry in closed form, the lens against the network itself, and the picture as without looking."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import miniflux
from miniflux.apps.cli import main
from miniflux.conditions import Reference
from miniflux.errors import InputError, OutputError
from miniflux.families import FAMILIES
from miniflux.pipeline import Pipeline
from miniflux.result import to_image
from miniflux.sampling import Moment, guide
from miniflux.sampling.forwards import Told
from miniflux.sampling.observing import observed
from miniflux.study.paths import geometry, pictures, trajectories
from miniflux.study.paths.lens import Lens, lens, picture_blocks
from miniflux.study.paths.trajectories import Trajectory, trajectory
from tests.tiny import randn

PROMPT = "a red circle on a blue background"
SMALL: dict[str, Any] = {"seed": 3, "width": 64, "height": 48, "steps": 3}
MODELS = ["nano", "nano2", "nano3"]


# Geometry in closed form


def test_a_constant_velocity_is_a_straight_line() -> None:
    """No angle, at any pace of steps; and the length is the chord's."""
    sigmas, v = (1.0, 0.9, 0.4, 0.0), randn(4, 3, 3).double()
    latents = torch.stack([sigma * v + 2 for sigma in sigmas])
    assert geometry.turns(torch.stack([v, v, v])) == [0, 0]
    assert geometry.straightness(latents, sigmas) < 1e-30
    assert geometry.length(latents) == pytest.approx(1, abs=1e-15)


def test_half_a_circle() -> None:
    """Chords of n equal arcs turn by 180 / n degrees; d / h is the mean of unit speed over half a circle."""
    n = 64
    angles = torch.linspace(0, math.pi, n + 1, dtype=torch.float64)
    points = torch.stack((angles.cos(), angles.sin()), dim=1)
    sigmas = [1 - k / n for k in range(n + 1)]
    assert geometry.turns(points[1:] - points[:-1]) == pytest.approx([180 / n] * (n - 1), abs=1e-9)
    # each chord is 2 sin(pi / 2n), so S = (n * chord / 2)^2 - 1, which tends to (pi / 2)^2 - 1
    expected = (n * math.sin(math.pi / (2 * n))) ** 2 - 1
    assert geometry.straightness(points, sigmas) == pytest.approx(expected, rel=1e-12)
    assert geometry.length(points) == pytest.approx(math.sqrt(1 + expected), rel=1e-12)  # at an even pace
    assert geometry.length(points) <= math.sqrt(1 + geometry.straightness(points, [s**2 for s in sigmas]))


def test_angles_and_distances() -> None:
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1e-6])
    assert geometry.angle(a, b) == pytest.approx(math.degrees(1e-6), rel=1e-6)  # of which an arc cosine leaves nothing
    assert geometry.angle(a, -3 * a) == 180 and geometry.angle(a, 0 * a) is None
    assert (
        geometry.relative(3 * a, a) == 2
        and geometry.relative(0 * a, 0 * a) == 0
        and geometry.relative(a, 0 * a) == math.inf
    )
    assert geometry.spread(21, 3) == [0, 10, 20]
    assert geometry.spread(2, 5) == [0, 1] and geometry.spread(1, 5) == [0] and geometry.spread(0, 5) == []


@pytest.mark.parametrize("sigmas", [(1.0, 0.0), (1.0, 0.5, 0.5), (0.0, 0.5, 1.0)])
def test_what_is_no_path_has_no_straightness(sigmas: tuple[float, ...]) -> None:
    with pytest.raises(InputError, match="falling noise levels, one for each"):
        geometry.straightness(randn(3, 4), sigmas)


def test_a_round_trip_has_no_direction() -> None:
    with pytest.raises(InputError, match="ends where it began"):
        geometry.straightness(torch.tensor([[1.0], [2.0], [1.0]]), (1.0, 0.5, 0.0))


# The lens


class Outputs:
    """Writes down what the network answers and what its blocks make, without the lens."""

    def __init__(self, pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[Told, Tensor]] = []
        family = FAMILIES[pipe.variant.family]

        def velocity(model: Any, told: Told, **hooks: Any) -> Tensor:
            v = family.velocity(model, told, **hooks)
            self.calls.append((told, v[:, : told.drawn].float().clone()))
            return v

        monkeypatch.setitem(FAMILIES, family.name, replace(family, velocity=velocity))


def unpacked(pipe: Pipeline, tokens: Tensor) -> Tensor:
    return FAMILIES[pipe.variant.family].unpack(tokens, SMALL["height"], SMALL["width"])


@pytest.mark.parametrize("model", MODELS)
def test_the_last_block_is_the_network(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lens equals the network's own output bit for bit, in every step; and the picture is the same."""
    pipe = miniflux.load(model)
    plain = pipe.generate(PROMPT, **SMALL)
    outputs = Outputs(pipe, monkeypatch)
    path = trajectory(pipe, PROMPT, **SMALL)
    assert torch.equal(path.result.latents, plain.latents)
    assert path.result.images[0].tobytes() == plain.images[0].tobytes()
    assert path.result.settings == plain.settings
    assert list(path.blocks) == picture_blocks(pipe.transformer.config)
    own = torch.cat([unpacked(pipe, v) for told, v in outputs.calls if told.texts == ("positive",)])
    assert torch.equal(path.seen[:, -1], own)
    assert torch.equal(path.positive, own)
    last = trajectories.blocks(path)[-1]
    assert last.distances == (0, 0, 0) and last.cosines == pytest.approx([1, 1, 1], abs=1e-12)
    assert all(distance > 0 for block in trajectories.blocks(path)[:-1] for distance in block.distances)


@pytest.mark.parametrize(
    ("variant", "references"), [("flux1-kontext-dev", 1), ("flux2-dev", 2), ("flux3-klein", 2), ("flux1-fill-dev", 0)]
)
def test_beside_references_and_channels_too(variant: str, references: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens behind the picture's, and channels beside its own, are no part of what the lens reads."""
    pipe = miniflux.tiny(variant)
    photos = [Image.effect_noise((64, 64), 80 + i).convert("RGB") for i in range(references)]
    more: dict[str, Any] = {"conditions": [Reference(photo, index=i) for i, photo in enumerate(photos, 1)]}
    if variant == "flux1-fill-dev":
        more = {"image": Image.new("RGB", (64, 48), "blue"), "mask": torch.ones(48, 64)}
    outputs = Outputs(pipe, monkeypatch)
    path = trajectory(pipe, PROMPT, **SMALL, **more)
    own = torch.cat([unpacked(pipe, v) for told, v in outputs.calls if told.texts[0] == "positive"])
    assert torch.equal(path.seen[:, -1], own[: len(path.seen)])
    assert path.seen.shape[2:] == path.latents.shape[1:]


def test_what_blocks_say_is_the_last_layer_on_their_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Computed by hand from what a plain hook sees of FLUX.1's blocks."""
    pipe = miniflux.tiny("flux1-dev")
    outputs = Outputs(pipe, monkeypatch)
    made: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: Any, given: Any, out: Any) -> None:
            made.setdefault(name, (out[0] if isinstance(out, tuple) else out).clone())

        return hook

    network = pipe.transformer
    for name in network.config.blocks:
        network.get_submodule(name).register_forward_hook(keep(name))
    path = trajectory(pipe, PROMPT, **SMALL)
    told = outputs.calls[0][0]
    assert told.words.vec is not None
    vec: Tensor = network.conditioning(told.timesteps, told.words.vec, told.guidance, torch.float32)  # type: ignore
    last: Any = network.final_layer
    shift, scale = torch.nn.functional.silu(vec).matmul(last.adaLN_modulation[1].weight.T).add(
        last.adaLN_modulation[1].bias
    ).chunk(2, dim=-1)  # fmt: skip
    for n, name in enumerate(path.blocks):
        x = made[name][:, -told.img.shape[1] :]
        x = torch.nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift
        v = last.linear(x).detach()
        torch.testing.assert_close(path.seen[0, n], unpacked(pipe, v)[0], rtol=2e-5, atol=2e-5)


def test_a_network_that_says_the_same_everywhere() -> None:
    """A last layer of nothing but a bias: a constant velocity, which no block changes and no step turns."""
    pipe = miniflux.tiny("flux1-dev")
    last: Any = pipe.transformer.final_layer
    last.linear.weight.zero_()
    last.linear.bias.copy_(randn(len(last.linear.bias)))
    path = trajectory(pipe, PROMPT, **SMALL)
    assert {d for block in trajectories.blocks(path) for d in block.distances} == {0.0}
    assert [step.turn for step in trajectories.steps(path)] == [None, 0, 0]
    assert geometry.straightness(path.latents, path.sigmas) < 1e-10  # the latents are float32
    assert geometry.length(path.latents) == pytest.approx(1, abs=1e-6)


def test_a_block_without_the_picture_is_refused() -> None:
    pipe = miniflux.tiny("flux3-klein")
    with pytest.raises(InputError, match="'txt_mode_blocks.0' holds no tokens of the picture; known: content_mode"):
        lens(pipe.transformer, None, torch.zeros(1), "txt_mode_blocks.0", ())  # type: ignore
    with pytest.raises(InputError, match="no block 'txt_mode_blocks.0' with the picture's tokens; known: content_mode"):
        trajectory(pipe, PROMPT, blocks=["txt_mode_blocks.0"], **SMALL)


# Paths


@pytest.mark.parametrize("asked", [{}, {"solver": "heun"}, {"solver": "dpmpp-2m"}, {"guide": "cfg"}, {"stop": 2}])
def test_steps_are_those_of_the_run(asked: dict[str, Any]) -> None:
    """Latents and pictures equal those of the moments, the first latents the noise; the last picture is the result."""
    pipe, moments = miniflux.load("nano"), list[Moment]()
    plain = pipe.generate(PROMPT, watch=lambda _, moment: moments.append(moment), **SMALL, **asked)
    path = trajectory(pipe, PROMPT, blocks=["double_blocks.1"], **SMALL, **asked)
    assert torch.equal(path.latents[1:], torch.cat([unpacked(pipe, moment.x) for moment in moments]))
    assert torch.equal(path.pictures, torch.cat([unpacked(pipe, moment.picture) for moment in moments]))
    assert path.sigmas[1:] == tuple(moment.sigma for moment in moments) and path.sigmas[0] == 1
    assert torch.equal(path.latents[0], miniflux.sampling.initial_noise(48, 64, 3)[0])
    assert torch.equal(path.result.latents, plain.latents)
    assert path.blocks == ("double_blocks.1",) and path.seen.shape[1] == 1
    if asked.get("solver") is None:  # Euler ends at the picture it points to
        shown = pictures.decoded(pipe, path.pictures[-1:])[0]
        assert shown.tobytes() == plain.images[0].tobytes()
        v = path.velocities[0]
        torch.testing.assert_close(path.latents[1], path.latents[0] + (path.sigmas[1] - 1) * v, rtol=0, atol=1e-5)


def test_a_run_that_goes_on_begins_where_it_stopped() -> None:
    pipe = miniflux.load("nano", dtype="bfloat16")
    first = pipe.generate(PROMPT, stop=1, **SMALL)
    assert first.moment is not None
    path, whole = trajectory(pipe, PROMPT, resume=first.moment, **SMALL), trajectory(pipe, PROMPT, **SMALL)
    assert torch.equal(path.latents, whole.latents[1:]) and torch.equal(path.seen, whole.seen[1:])
    assert [path.guided(k) for k in range(2)] == [0, 0]  # to the last bit, in bfloat16 too


def test_the_share_of_guidance() -> None:
    """v = n + s (p - n), so v - p = (s - 1) (p - n): doubled from scale 2 to 3, at the same latents; 0 without."""
    pipe = miniflux.load("nano")
    shares = [
        trajectory(pipe, PROMPT, blocks=(), guide=guide("cfg", scale=scale), negative="a star", **SMALL).guided(0)
        for scale in (1.0, 2.0, 3.0)
    ]
    assert shares[0] == 0 and shares[1] > 0.01
    assert shares[2] == pytest.approx(2 * shares[1], rel=1e-4)


def test_a_guide_that_stands_still() -> None:
    """The first step of CFG-Zero* has the velocity zero: all of the prediction is taken away, and nothing turns."""
    path = trajectory(miniflux.load("nano"), PROMPT, guide="cfg-zero", **SMALL)
    found = trajectories.steps(path)
    assert found[0].guided == pytest.approx(1, rel=1e-5)
    assert found[0].from_start == 0 and [step.turn is None for step in found] == [True, True, False]


def test_the_same_run_at_another_guidance() -> None:
    """Both begin alike; with itself nothing is apart."""
    pipe = miniflux.load("nano")
    path, other = (trajectory(pipe, PROMPT, blocks=(), guidance=g, **SMALL) for g in (3.0, 1.0))
    found = trajectories.apart(path, other)
    assert found[0].velocities > 0 and found[0].angle is not None and found[0].angle > 0
    assert found[0].latents == geometry.relative(path.latents[1], other.latents[1])
    assert all(step.latents == step.velocities == step.angle == 0 for step in trajectories.apart(path, path))
    with pytest.raises(InputError, match="3 steps from 1 .* and 2 from 1 "):
        trajectories.apart(path, trajectory(pipe, PROMPT, blocks=(), **{**SMALL, "steps": 2}))


def test_weights_that_come_and_go_say_the_same() -> None:
    path = trajectory(miniflux.load("nano"), PROMPT, **SMALL)
    streamed = trajectory(miniflux.load("nano", memory="stream"), PROMPT, **SMALL)
    assert torch.equal(path.latents, streamed.latents) and torch.equal(path.seen, streamed.seen)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"prompt": ["a", "b"]}, "the prompt must be a text, got"),
        ({"images": 2}, "images must be 1, got 2"),
        ({"watch": print}, "watch is not taken"),
        ({"callback": print}, "callback is not taken .* could change the path"),
        ({"cache": "first-block"}, "a step cache leaves blocks out"),
        ({"restart": (0.3, 0.6, 1)}, "several paths of one"),
        ({"schedule": [1.0, 0.5, 0.7, 0.0], "steps": None}, "schedule rises, got"),
        ({"blocks": ["double_blocks.99"]}, "no block 'double_blocks.99' .* known: double_blocks.0, "),
        ({"steps": 0}, "steps"),
    ],
)
def test_bad_input_is_refused(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        trajectory(miniflux.load("nano"), **{"prompt": PROMPT, **SMALL, **asked})


def test_a_lens_follows_one_picture() -> None:
    pipe = miniflux.load("nano")
    seen = Lens(pipe.transformer, FAMILIES["flux1"].conditioning, ["double_blocks.0"])
    with observed(seen), pytest.raises(InputError, match="one picture is followed, got picture 1"):
        pipe.generate(PROMPT, images=2, **SMALL)


# What is shown of them


@pytest.fixture(scope="module")
def path() -> Trajectory:
    return trajectory(miniflux.load("nano"), PROMPT, **SMALL)


def test_sheets(path: Trajectory) -> None:
    """A row of pictures for every block; the last of them is what the step points to, and the last step the result."""
    pipe = miniflux.load("nano")
    sheet = pictures.grid(pipe, path, side=None)
    assert sheet.height > len(path.blocks) * 48
    corner = sheet.crop((sheet.width - 68, sheet.height - 52, sheet.width - 4, sheet.height - 4))
    assert corner.tobytes() == path.result.images[0].tobytes()
    assert pictures.strip(pipe, path, side=None).crop(corner.getbbox()).size == corner.size
    assert pictures.decoded(pipe, path.pictures[:1], 32)[0].size == (32, 24)
    with torch.inference_mode():
        pixels = pipe.autoencoder.decode(path.block_pictures(1)[:1])  # type: ignore
    assert pictures.decoded(pipe, path.block_pictures(1)[:1])[0].tobytes() == to_image(pixels[0]).tobytes()


def test_guidance_has_a_row_of_its_own(path: Trajectory) -> None:
    pipe = miniflux.load("nano")
    guided = trajectory(pipe, PROMPT, guide="cfg", blocks=path.blocks[-1:], **SMALL)
    plain = replace(path, blocks=path.blocks[-1:], seen=path.seen[:, -1:])
    assert pictures.grid(pipe, guided).height == pictures.grid(pipe, plain).height + 52


def test_tables(path: Trajectory) -> None:
    text = trajectories.table(path)
    assert len(text.splitlines()) == 1 + 3 + 1 and "straightness" in text
    text = trajectories.block_table(path)
    assert [line.split()[0] for line in text.splitlines()[1:]] == list(path.blocks)
    assert len(trajectories.apart_table(trajectories.apart(path, path)).splitlines()) == 4
    assert repr(path).startswith("<Trajectory: 3 steps, ")


def test_nothing_to_show(path: Trajectory, tmp_path: Path) -> None:
    bare = replace(path, blocks=(), seen=path.seen[:, :0])
    for draw in (
        lambda: pictures.grid(miniflux.load("nano"), bare),
        lambda: pictures.plot_blocks(bare, tmp_path / "a.png"),
    ):
        with pytest.raises(InputError, match="no blocks were looked at"):
            draw()
    with pytest.raises(OutputError, match="ending"):
        pictures.plot(path, tmp_path / "a.gif")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    asked = ["study", "path", PROMPT, "--size", "64x48", "--steps", "1", "--seed", "3"]
    assert main([*asked, "-o", "found/", "--beside", "1"]) == 0
    said = capsys.readouterr().out
    assert "straightness" in said and "apart" in said and "single_blocks.0" in said
    assert {file.name for file in Path("found").iterdir()} == {
        *("steps.png", "blocks.png", "path.svg", "cosines.svg", "path.npz")
    }
    kept = np.load("found/path.npz")
    again = trajectory(miniflux.load("nano"), PROMPT, seed=3, width=64, height=48, steps=1)
    assert np.array_equal(kept["seen"], again.seen.numpy()) and list(kept["blocks"]) == list(again.blocks)
    assert main([*asked, "-o", "sheet.png"]) == 0
    assert Image.open("sheet.png").height > 48 * len(again.blocks)
    assert main([*asked, "-o", "sheet.gif"]) == 2
    assert main([*asked, "--steps", "0"]) == 2


def test_wraps_of_the_caller_are_inside_of_the_lens() -> None:
    """What is read is what the block gave in the end."""
    pipe = miniflux.load("nano")

    def turned(run: Any) -> Any:
        def turn(name: str, block: Any, streams: Any, context: Any) -> Any:
            out = run(name, block, streams, context)
            return tuple(-x for x in out) if name == "single_blocks.0" else out

        return turn

    plain, changed = (trajectory(pipe, PROMPT, wraps=wraps, **{**SMALL, "steps": 1}) for wraps in ((), (turned,)))
    n = plain.blocks.index("single_blocks.0")
    assert torch.equal(plain.seen[0, :n], changed.seen[0, :n])
    assert not torch.equal(plain.seen[0, n], changed.seen[0, n])
