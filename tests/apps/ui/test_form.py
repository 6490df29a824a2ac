"""Controls into requests and back, and what the site keeps per session; no browser and no Gradio."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miniflux.apps.arguments import Parser
from miniflux.apps.ui import form
from miniflux.apps.ui.command import add
from miniflux.apps.ui.site import MAX_LORAS, Shelf, Site, opened
from miniflux.errors import InputError, MinifluxError
from miniflux.sampling import GUIDES, SOLVERS, cache, guide
from miniflux.sampling.latents import MAX_SEED
from miniflux.sampling.schedules import SPACINGS
from miniflux.settings import AtLevels, LoraUse, Request

ANN, BOB = "a" * 32, "b" * 32


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with opened(tmp_path_factory.mktemp("site")) as site:
        yield site


def values(site: Site, **other: Any) -> dict[str, Any]:
    """What the page sends when it was just opened."""
    usual = {"prompt": "a", "negative": "", "model": "nano-dev", "steps": 20, "guidance": 3.0, "method": "none"}
    more = {
        "scale": 3.0,
        "solver": "euler",
        "schedule": "uniform",
        "window_from": 0,
        "window_to": 1,
        "shift": "",
        "step_cache": "none",
        "restart": "",
        "seed": "0",
        "images": 1,
        "width": 128,
        "height": 128,
    }
    return {**usual, **more, "loras": form.rows(site.shelf(ANN), "nano-dev"), "rest": {}, **other}


@given(data=st.data())
def test_request_comes_back_from_the_controls(site: Site, data: st.DataObject) -> None:
    """Whatever a picture was made with, *use these settings* and *draw* ask for exactly that again."""
    method = data.draw(st.sampled_from([None, *GUIDES]))
    guided = st.floats(0, 20)
    windows = st.sampled_from([(0.0, 1.0), (0.0, 0.75), (0.1, 1 / 3)])
    model = data.draw(st.sampled_from(["nano-dev", "nano-schnell"]))
    lora = site.bundled["realism"]
    request = Request(
        prompt=data.draw(st.text(st.characters(exclude_categories=["Cs"]), max_size=40)),
        model=model,
        loras=data.draw(st.sampled_from([(), (LoraUse(lora.file, 0.35, lora.sha256),)])),
        seed=data.draw(st.integers(0, MAX_SEED)),
        steps=data.draw(st.integers(1, 200)),
        guidance=data.draw(guided) if model == "nano-dev" else None,
        guide=None if method is None else guide(method, scale=data.draw(guided), window=data.draw(windows)),
        negative=data.draw(st.sampled_from([None, "fog"])) if method else None,
        solver=data.draw(st.sampled_from([*SOLVERS, "ddim:0.5"])),
        schedule=data.draw(st.sampled_from([*SPACINGS])),
        width=16 * data.draw(st.integers(1, 20)),
        height=16 * data.draw(st.integers(1, 20)),
        shift=data.draw(st.sampled_from([None, 2.5, math.exp(1.15)])),
        cache=data.draw(st.sampled_from([None, cache("tea"), cache("taylor", interval=3)])),
        variation=data.draw(st.sampled_from([None, (7, 0.25)])),
    )
    shelf = Shelf(dict(site.bundled))
    filled, notes = form.values_from(request, shelf, site.listed)
    assert not notes
    assert form.request_from(json.loads(json.dumps(filled)), shelf, site.listed) == request


@pytest.mark.parametrize("empty", ["", "  ", "-1", " -1 ", -1, None])
def test_empty_or_minus_one_is_a_random_seed(site: Site, empty: Any) -> None:
    seeds = {form.request_from(values(site, seed=empty), site.shelf(ANN), site.listed).seed for _ in range(4)}
    assert len(seeds) == 4 and all(0 <= seed < 2**32 for seed in seeds)


def test_strength_at_noise_levels_is_kept(site: Site) -> None:
    request = Request(prompt="a", steps=2, guidance=AtLevels((1.0, 0.5), (3.0, 2.0)), width=128, height=128)
    filled, _ = form.values_from(request, site.shelf(ANN), site.listed)
    assert form.request_from(filled, site.shelf(ANN), site.listed) == request


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"model": "/etc/passwd"}, "model '/etc/passwd'"),
        ({"seed": "-2"}, "seed"),
        ({"seed": "- 1"}, "seed"),
        ({"seed": "1.5"}, "seed"),
        ({"seed": "1e3"}, "seed"),
        ({"seed": str(MAX_SEED + 1)}, "seed"),
        ({"steps": 2.5}, "steps"),
        ({"steps": None}, "steps"),
        ({"steps": 10**400}, "steps"),
        ({"guidance": float("nan")}, "guidance"),
        ({"width": True}, "width"),
        ({"solver": "x"}, "solver"),
        ({"schedule": "1, x"}, "schedule"),
        ({"method": "x"}, "guid"),
        ({"prompt": "x" * 200_000}, "prompt"),
        ({"method": "cfg", "window_from": 0.5, "window_to": 0.5}, "window"),
        ({"method": "cfg", "window_from": None}, "the method's from"),
        ({"shift": "x"}, "shift"),
        ({"shift": "0"}, "shift"),
        ({"shift": "nan"}, "shift"),
        ({"step_cache": "x"}, "cache"),
        ({"step_cache": "measure"}, "measure"),
        ({"restart": "0.3, 0.6"}, "restart"),
        ({"restart": "0.3, 0.6, 1.5"}, "restart"),
        ({"restart": "0.6, 0.3, 1"}, "restart"),
    ],
)
def test_bad_input_is_refused_by_name(site: Site, wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(MinifluxError, match=named):
        form.request_from(values(site, **wrong), site.shelf(ANN), site.listed)


def test_only_ids_and_strengths_of_loras_are_believed(site: Site) -> None:
    """A page that was tampered with cannot make us open a file."""
    rows = [
        {"id": "/etc/passwd", "on": True, "strength": 1},
        {"id": "realism", "file": "/etc/passwd", "on": True, "strength": 2},
    ]
    request = form.request_from(values(site, loras=rows), site.shelf(ANN), site.listed)
    assert [(use.file, use.scale) for use in request.loras] == [("realism", 2.0)]
    assert form.request_from(values(site, loras="nonsense"), site.shelf(ANN), site.listed).loras == ()


def test_no_lora_is_on_at_first(site: Site) -> None:
    rows = form.rows(site.shelf("d" * 32), "nano-dev")
    assert [(row["id"], row["on"]) for row in rows] == [("realism", False), ("canny", False)]
    assert form.request_from(values(site), site.shelf(ANN), site.listed).loras == ()


def test_path_in_a_picture_is_not_opened(site: Site, tmp_path: Path) -> None:
    """A LoRA that is not on the shelf is named, and left out."""
    request = Request(prompt="a", loras=(LoraUse("/etc/passwd", 1.0), LoraUse("C:\\loras\\realism.safetensors", 0.5)))
    filled, notes = form.values_from(request, site.shelf(ANN), site.listed)
    assert len(notes) == 1 and "passwd" in notes[0]
    assert [(row["id"], row["on"], row["strength"]) for row in filled["loras"] if row["on"]] == [("realism", True, 0.5)]


def test_greyed_controls_say_why(site: Site) -> None:
    assert "guidance" not in form.greyed(site.listed["nano-dev"], "cfg")
    assert "no input" in form.greyed(site.listed["nano-schnell"], "cfg")["guidance"]
    assert set(form.greyed(site.listed["nano-dev"], form.PLAIN)) == {
        *("scale", "negative", "window_from", "window_to"),
    }


@pytest.mark.parametrize("base", [128, 1024])
@pytest.mark.parametrize("aspect", form.ASPECTS)
def test_presets_keep_the_number_of_pixels(aspect: str, base: int) -> None:
    width, height = form.size_of(aspect, base)
    wide, high = form.ASPECTS[aspect]
    assert width % 16 == height % 16 == 0
    assert abs(width * height / base**2 - 1) < 0.13
    assert (width > height, width == height) == (wide > high, wide == high)
    assert form.aspect_of(width, height, base) == aspect


def test_sessions_have_shelves_of_their_own(site: Site, tmp_path: Path) -> None:
    source = Path(site.models.lora("realism").source)
    dropped = tmp_path / "mine.safetensors"
    dropped.write_bytes(source.read_bytes())
    lora = site.keep_lora(ANN, dropped)
    dropped.unlink()
    assert Path(lora.file).read_bytes() == source.read_bytes()
    assert lora.id in site.shelf(ANN).loras and lora.id not in site.shelf(BOB).loras
    assert str(tmp_path) not in lora.receipt


def test_broken_lora_leaves_nothing_behind(site: Site, tmp_path: Path) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(struct.pack("<Q", 2**40) + b"{}")
    before, files = dict(site.shelf(BOB).loras), sorted(site.folder.rglob("*"))
    with pytest.raises(MinifluxError, match="broken"):
        site.keep_lora(BOB, broken)
    assert site.shelf(BOB).loras == before
    assert sorted(site.folder.rglob("*")) == files


def test_number_of_dropped_loras_is_bounded(site: Site, tmp_path: Path) -> None:
    session = "c" * 32
    site.shelf(session).loras.update({str(i): site.bundled["realism"] for i in range(MAX_LORAS)})
    (tmp_path / "one more.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="already"):
        site.keep_lora(session, tmp_path / "one more.safetensors")


def test_model_that_is_not_here_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="flux1-dev"), opened(tmp_path, first="flux1-dev"):
        pass


@pytest.mark.parametrize("auth", ["user", ":password", "user:"])
def test_auth_must_name_both(auth: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = Parser()
    add(parser.add_subparsers())
    with pytest.raises(SystemExit):
        parser.parse_args(["ui", "--auth", auth])
    assert "USER:PASSWORD" in capsys.readouterr().err
