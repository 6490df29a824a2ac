"""Steering from the command line, and made again from the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import miniflux
from miniflux.apps.cli import main
from tests.steered import network, photo

QUICK = ("--steps", "2", "--size", "64")


def test_steered_pictures_are_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """References, a Union ControlNet with its mode: the same pixels from the file, with what it cannot hold; refused
    without, and with something else."""
    first, second, out = photo(tmp_path / "a.png"), photo(tmp_path / "b.png", 40), str(tmp_path / "out.png")
    net = network(tmp_path / "net.safetensors", modes=3)
    command = (
        "generate",
        "a star",
        "-o",
        out,
        *QUICK,
        "--reference",
        first,
        "--controlnet",
        f"{net}={second}:0.5:tile",
    )
    assert main([*command]) == 0
    about = miniflux.settings.read_picture(out).requests[0].conditions
    assert [(one.kind, dict(one.about).get("mode")) for one in about] == [("Reference", None), ("ControlNet", 1)]
    again = ("replay", out, "--picture", first, "--picture", second, "--network", net)
    assert main([*again]) == 0 and "the same pixels" in capsys.readouterr().out
    for given, said in (
        ((), "steered by a Reference with another picture"),
        (("--picture", first, "--picture", second), "steered by a ControlNet, whose network is not given"),
        ((*again[2:], "--picture", photo(tmp_path / "c.png", 9)), "that did not steer this one"),
    ):
        assert main(["replay", out, *given]) != 0 and said in capsys.readouterr().err
    other = network(tmp_path / "other.safetensors", modes=4)
    assert main([*again[:-1], other]) != 0 and "other.safetensors is another one" in capsys.readouterr().err


def test_masks_and_outpainting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Grown and feathered; enlarged, with every byte of the picture kept; both are made again by the same options."""
    given, out = photo(tmp_path / "a.png"), str(tmp_path / "out.png")
    mask = np.zeros((64, 64), np.uint8)
    mask[20:40, 20:40] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    edge = ("--image", given, "--mask", str(tmp_path / "mask.png"), "--mask-grow", "4", "--mask-feather", "6")
    assert main(["generate", "a star", "-o", out, "--steps", "2", *edge]) == 0
    drawn, before = np.asarray(Image.open(out)), np.asarray(Image.open(given))
    assert np.array_equal(drawn[:9], before[:9]) and not np.array_equal(drawn[17:20], before[17:20])
    assert main(["replay", out, *edge]) == 0 and "the same pixels" in capsys.readouterr().out
    assert main(["replay", out, *edge[:4]]) != 0 and "the mask is not the one" in capsys.readouterr().err
    wide = ("--image", given, "--outpaint", "16,0,0,32")
    assert main(["generate", "a star", "-o", out, "--force", "--steps", "2", *wide]) == 0
    drawn = np.asarray(Image.open(out))
    assert drawn.shape == (96, 80, 3) and np.array_equal(drawn[:64, 16:], before)
    assert main(["replay", out, *wide]) == 0 and "the same pixels" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--outpaint", "16,0,0,0"), "--outpaint enlarges a picture, and no --image is given"),
        (("--outpaint", "16,0"), "expected four numbers LEFT,TOP,RIGHT,BOTTOM, got '16,0'"),
        (("--mask-grow", "3"), "--mask-grow changes a mask, and none is given"),
        (("--controlnet", "edges.png"), "--controlnet NET=FILE names the file or folder of its network first"),
        (("--redux", "a.png"), "no flux1-redux-dev.safetensors or FLUX.1-Redux-dev in --weights"),
        (("--vision", "x"), "--vision is what --redux and --ip-adapter see with, and neither is given"),
        (("--ip-adapter", "none.safetensors=a.png"), "none.safetensors"),
        (("--reference", "none.png"), "none.png: cannot be read: No such file"),
    ],
)
def test_refused_before_the_model_is_loaded(
    options: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MINIFLUX_WEIGHTS", raising=False)
    try:
        code = main(["generate", "a star", "--model", "flux1-dev", *options])
    except SystemExit as stop:  # of the parser
        code = stop.code
    assert code == 2 and said in capsys.readouterr().err


def test_networks_are_told_by_their_hashes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In any order, and one that steered twice is given once; rows of a Union network's table by their number."""
    picture, out = photo(tmp_path / "a.png"), str(tmp_path / "out.png")
    nets = [network(tmp_path / f"{name}.safetensors", modes=modes) for name, modes in (("first", 3), ("second", 0))]
    steered = ("--controlnet", f"{nets[0]}={picture}:0.5:1", "--controlnet", f"{nets[1]}={picture}:0.7")
    assert main(["generate", "a star", "-o", out, *QUICK, *steered]) == 0
    conditions = miniflux.settings.read_picture(out).requests[0].conditions
    assert [(dict(one.about)["scale"], dict(one.about).get("mode")) for one in conditions] == [(0.5, 1), (0.7, None)]
    again = ("replay", out, "--picture", picture)
    capsys.readouterr()
    assert main([*again, "--network", nets[1], "--network", nets[0]]) == 0 and "the same" in capsys.readouterr().out
    twice = str(tmp_path / "twice.png")
    assert main(["generate", "a star", "-o", twice, *QUICK, *steered[2:], *steered[2:]]) == 0
    assert main(["replay", twice, "--picture", picture, "--network", nets[1]]) == 0
    assert main(["generate", "a star", "-o", out, *QUICK, "--controlnet", f"{nets[0]}={picture}:1:9"]) == 2
    assert "mode" in (said := capsys.readouterr().err) and "9" in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--redux", "net=PICTURE:0.5:canny"), "--redux: a mode, 'canny', is for ControlNets alone"),
        (("--ip-adapter", "net=PICTURE:0.5:depth"), "--ip-adapter: a mode, 'depth', is for ControlNets alone"),
        (("--outpaint=99999984,0,0,0", "--image", "PICTURE"), "outpaint left"),
    ],
)
def test_options_without_effect_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], said: str
) -> None:
    picture = photo(tmp_path / "a.png")
    given = [option.replace("PICTURE", picture) for option in options]
    assert main(["generate", "a star", "-o", str(tmp_path / "out.png"), *QUICK, *given]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out.png").exists()


def test_previews_have_the_size_of_the_reference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And a tower that nobody sees with is refused when a picture is made again."""
    Image.new("RGB", (96, 64), "red").save(tmp_path / "a.png")
    out = str(tmp_path / "out.png")
    command = ["generate", "a star", "-o", out, "--steps", "2", "--preview-every", "1"]
    assert main([*command, "--reference", str(tmp_path / "a.png")]) == 0
    assert Image.open(tmp_path / "out-step001.png").size == Image.open(out).size == (96, 64)
    assert main(["replay", out, "--picture", str(tmp_path / "a.png"), "--vision", "nope"]) == 2
    assert "--vision is what a --network sees with" in capsys.readouterr().err


def test_a_picture_with_a_sign_in_its_name(tmp_path: Path) -> None:
    from miniflux.apps.arguments import steering

    path = photo(tmp_path / "a=b.png")
    assert steering(path) == ("", path, 1.0, None)
    assert steering("net=c:/a.png:0.5:tile") == ("net", "c:/a.png", 0.5, "tile")
    assert steering("net=a.png:0.5") == ("net", "a.png", 0.5, None)
    assert steering("net=a.png:1:2") == ("net", "a.png", 1.0, "2")
    assert steering("net=a.png") == ("net", "a.png", 1.0, None)
