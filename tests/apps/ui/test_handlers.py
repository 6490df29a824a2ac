"""What handlers answer, asked without a browser: values by component in, values and updates by component out."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from miniflux.apps.cli import main
from miniflux.apps.ui import form
from miniflux.apps.ui.handlers import Handlers, _telling
from miniflux.apps.ui.launch import blocks
from miniflux.apps.ui.routes import COOKIE, state_of
from miniflux.apps.ui.site import Site, opened
from miniflux.sampling import cache, guide
from miniflux.settings import Request, read_picture

ANN, BOB = "a" * 32, "b" * 32


class People:
    """Handlers, and what somebody has in the controls."""

    def __init__(self, site: Site) -> None:
        self.site = site
        _, self.c = blocks(site)
        self.handlers = Handlers(site, self.c)

    def given(self, session: str = ANN, **other: Any) -> dict[Any, Any]:
        """The controls as they are at first, with a quick picture, the seed locked; some of them otherwise."""
        found = {component: getattr(component, "value", None) for component in vars(self.c).values()}
        found |= {self.c.loras: form.rows(self.site.shelf(session), "nano-dev"), self.c.lock: True}
        quick = {"steps": 2, "width": 64, "height": 64, **other}
        return found | {getattr(self.c, name): value for name, value in quick.items()}

    def does(self, name: str, session: str = ANN, **other: Any) -> dict[str, Any]:
        """Press something; what was answered, by the names of the controls."""
        handler = _telling(getattr(self.handlers, name), self.c)
        return self.named(handler(self.given(session, **other), self.web(session)))

    def tells(self, name: str, id: str, session: str = ANN) -> dict[str, Any]:
        """Press something of the stage, which says what it belongs to."""
        handler = _telling(getattr(self.handlers, name), self.c)
        return self.named(handler(SimpleNamespace(id=id), self.web(session)))

    def web(self, session: str) -> Any:
        return SimpleNamespace(cookies={COOKIE: session})

    def named(self, answer: dict[Any, Any]) -> dict[str, Any]:
        names = {component: name for name, component in vars(self.c).items()}
        return {names[component]: value for component, value in answer.items()}

    def drawn(self, session: str = ANN) -> Any:
        """The newest picture, when everything is done."""
        for job in self.site.queue.jobs(session):
            job.wait(60)
        return self.site.history.listed(session)[0]


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Iterator[People]:
    with opened(tmp_path_factory.mktemp("site")) as site:
        yield People(site)


def picture(path: Path, **texts: str) -> Path:
    """A picture with texts in it."""
    info = PngInfo()
    for name, text in texts.items():
        info.add_text(name, text)
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    return path


def test_draws_and_answers_again_from_the_cache(people: People) -> None:
    answer = people.does("draw", seed="5")
    assert (answer["seed"], answer["stage"]["text"]) == ("5", "")
    assert people.drawn().request.seed == 5
    assert "From the cache" in people.does("draw", seed="5")["stage"]["text"]
    assert people.drawn().cached


def test_without_the_lock_every_press_has_its_own_seed(people: People) -> None:
    seeds = {people.does("draw", lock=False, seed="5")["seed"] for _ in range(3)}
    assert len(seeds) == 3 and "5" not in seeds
    people.drawn()


@pytest.mark.parametrize("empty", ["", "-1", None])
def test_empty_or_minus_one_is_a_random_seed_also_while_locked(people: People, empty: str | None) -> None:
    """And the field goes on saying so; in batches and grids too."""
    seeds: set[int] = set()
    for name, more in (
        ("draw", {}),
        ("draw", {}),
        ("draw_all", {"prompts": "a"}),
        ("draw_grid", {"x": "steps", "y": ""}),
    ):
        answer = people.does(name, seed=empty, x_values="1", **more)
        assert answer["stage"]["kind"] != "error" and answer.get("seed", empty) == empty
        seeds.add(people.drawn().request.seed)
    assert len(seeds) == 4


def test_page_and_command_line_draw_the_same(people: People, tmp_path: Path) -> None:
    """The controls as they are at first, and `generate` without any option but the seed: pixel by pixel."""
    first = {"steps": people.c.steps.value, "width": people.c.width.value, "height": people.c.height.value}
    people.does("draw", seed="7", prompt=people.c.prompt.value, **first)
    main(["generate", people.c.prompt.value, "--seed", "7", "-o", str(tmp_path / "cli.png")])
    with Image.open(tmp_path / "cli.png") as cli, Image.open(people.site.history.path(ANN, people.drawn().id)) as page:
        assert np.array_equal(np.asarray(cli), np.asarray(page))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"seed": "x"}, "seed"),
        ({"images": 2.5}, "number of images"),
        ({"prompt": "x" * 200_000}, "prompt"),
        ({"schedule": "1, what"}, "schedule"),
        ({"restart": "a, b"}, "restart"),
    ],
)
def test_what_cannot_be_drawn_is_said_in_a_line(people: People, wrong: dict[str, Any], said: str) -> None:
    before = people.site.history.listed(ANN)
    answer = people.does("draw", **wrong)
    assert answer["stage"]["kind"] == "error" and said in answer["stage"]["text"]
    assert "\n" not in answer["stage"]["text"] and set(answer) == {"stage"}
    assert people.site.history.listed(ANN) == before


def test_batches_and_grids(people: People) -> None:
    people.does("draw_all", prompts="a\n\nb", seed="1")
    assert people.drawn().request.prompt == "b"
    people.does("draw_grid", x="seed", x_values="1-2", y="shift", y_values="1, 3", seed="1")
    sheet = people.site.history.path(ANN, people.drawn().id)
    assert [(r.seed, r.shift) for r in read_picture(sheet).requests] == [(s, h) for h in (1.0, 3.0) for s in (1, 2)]
    for wrong in ({"x": "model", "x_values": "/etc/passwd"}, {"x": "steps", "x_values": "a"}, {"prompts": " "}):
        name = "draw_grid" if "x" in wrong else "draw_all"
        assert people.does(name, **wrong)["stage"]["kind"] == "error"


def test_nobody_touches_what_belongs_to_others(people: People) -> None:
    people.does("draw", seed="77")
    entry = people.drawn()
    for name in ("use", "again", "remove"):
        assert "no picture" in people.tells(name, entry.id, BOB)["stage"]["text"]
    job = people.site.submit(ANN, [Request(prompt="a", width=64, height=64, steps=90, seed=people.site.queue.waiting)])
    people.tells("cancel", job.id, BOB)
    assert not job.stopping
    people.tells("cancel", job.id)
    assert job.wait(60) and job.state in ("cancelled", "done")
    assert [end["id"] for end in state_of(people.site, BOB)["ended"]] == []
    people.tells("remove", entry.id)
    assert entry not in people.site.history.listed(ANN)


def test_browser_without_a_cookie_is_told_so(people: People) -> None:
    handler = _telling(people.handlers.draw, people.c)
    answer = handler(people.given(), SimpleNamespace(cookies={}))
    assert "cookie" in answer[people.c.stage]["text"]


EVERYTHING = Request(
    prompt="a", model="nano-dev", seed=3, steps=12, width=64, height=96, guidance=2.0, solver="heun", schedule="karras",
    guide=guide("apg", scale=2.5, window=(0.1, 0.6), eta=0.5), negative="fog", shift=1.5, restart=(0.3, 0.6, 2),
    cache=cache("taylor", interval=3), variation=(9, 0.25), padding="masked",
)  # fmt: skip


def test_every_setting_of_a_picture_is_in_a_control_or_named(people: People) -> None:
    """And drawing then asks for exactly the same."""
    people.site.submit(BOB, [EVERYTHING]).results(60)
    answer = people.does("files", files=[str(people.site.history.path(BOB, people.drawn(BOB).id))])
    text = answer["stage"]["text"]
    for part in ("variation 9, 0.25", "padding masked", "eta 0.5", "interval 3"):
        assert part in text and part in answer["also"]["value"]
    assert answer["also"]["visible"] and answer["more"]["open"] and answer["lock"]
    values = {name: update["value"] for name, update in answer.items()
              if name in people.c.settings and isinstance(update, dict) and name != "rest"}  # fmt: skip
    values |= {"loras": answer["loras"], "rest": answer["rest"]["value"]}
    assert (values["shift"], values["restart"], values["step_cache"]) == ("1.5", "0.3, 0.6, 2", "taylor")
    assert (values["window_from"], values["window_to"]) == (0.1, 0.6)
    assert form.request_from(values, people.site.shelf(ANN), people.site.listed) == EVERYTHING
    assert people.named(people.handlers.forget())["rest"] == {}


def test_plain_picture_of_ours_fills_the_controls_and_leaves_nothing_to_say(people: People) -> None:
    people.does("draw", seed="41")
    answer = people.does("files", files=[str(people.site.history.path(ANN, people.drawn().id))])
    assert answer["stage"]["kind"] == "ok" and "\n" not in answer["stage"]["text"]
    assert answer["rest"]["value"] == {} and not answer["also"]["visible"] and "more" not in answer


def test_grid_that_is_dropped_says_which_of_its_pictures_was_taken(people: People) -> None:
    people.does("draw_grid", x="seed", x_values="4-6", y="", seed="1")
    sheet = people.site.history.path(ANN, people.drawn().id)
    answer = people.does("files", files=[str(sheet)])
    assert "first of its 3 pictures" in answer["stage"]["text"]
    assert answer["seed"]["value"] == "4"


def bomb(path: Path) -> Path:
    """A picture with 100 MB of text, compressed."""
    plain = picture(path).read_bytes()
    body = b"miniflux\0\0" + zlib.compress(b"[" * 100_000_000)
    chunk = struct.pack(">I", len(body)) + b"zTXt" + body + struct.pack(">I", zlib.crc32(b"zTXt" + body))
    path.write_bytes(plain[:33] + chunk + plain[33:])
    return path


def test_hostile_files_are_refused_by_name_and_the_good_one_is_taken(people: People, tmp_path: Path) -> None:
    """Six at once: each bad one has its line, nothing of them is in the controls, and the field is free again."""
    (tmp_path / "cut.png").write_bytes(picture(tmp_path / "whole.png", miniflux="{}").read_bytes()[:90])
    (tmp_path / "deep.png").write_bytes(picture(tmp_path / "x.png", miniflux="[" * 100_000).read_bytes())
    (tmp_path / "types.png").write_bytes(picture(tmp_path / "y.png", miniflux='{"prompt": 3, "seed": []}').read_bytes())
    (tmp_path / "fake.safetensors").write_bytes(struct.pack("<Q", 2**50) + b"{}")
    (tmp_path / "what.bin").write_bytes(b"x")
    bad = [bomb(tmp_path / "bomb.png"), *(tmp_path / f"{name}" for name in ("cut.png", "deep.png", "types.png",
           "fake.safetensors", "what.bin"))]  # fmt: skip
    good = tmp_path / "list.txt"
    good.write_text("one\ntwo\n", "utf-8")
    rows = form.rows(people.site.shelf(ANN), "nano-dev")
    answer = people.does("files", files=[*map(str, bad), str(good)])
    lines = answer["stage"]["text"].splitlines()
    assert [path.name for path in bad if not any(path.name in line for line in lines)] == []
    assert len(lines) == 7 and str(tmp_path) not in answer["stage"]["text"]
    assert set(answer) == {"files", "stage", "prompts"} and answer["files"] is None
    assert answer["prompts"] == "one\ntwo"
    assert form.rows(people.site.shelf(ANN), "nano-dev") == rows


def test_fault_of_ours_leaves_the_field_for_files_usable(
    people: People, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(path: Path) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr("miniflux.apps.ui.handlers.read_picture", fails)
    answer = people.does("files", files=[str(picture(tmp_path / "x.png"))])
    assert answer["files"] is None
    assert "fault of ours" in answer["stage"]["text"] and "secret" not in answer["stage"]["text"]


@pytest.mark.parametrize(
    "prompt",
    ["<script>alert(1)</script>", "\x00\x07\x1b[31m\u202e\u2066", "\N{GRINNING FACE}" * 50, "x" * 100_000, ""],
    ids=["markup", "control characters", "emoji", "long", "empty"],
)
def test_any_prompt_is_kept_as_it_is(people: People, prompt: str) -> None:
    """In the history, in the file, and in what the page is told."""
    assert people.does("draw", prompt=prompt, seed="12")["stage"]["kind"] != "error"
    entry = people.drawn()
    assert entry.request.prompt == prompt
    assert read_picture(people.site.history.path(ANN, entry.id)).requests[0].prompt == prompt
    told = json.loads(json.dumps(state_of(people.site, ANN)))["entries"][0]["caption"]
    assert told.removesuffix(" …") == prompt[:300]


def test_controls_without_effect_say_why(people: People) -> None:
    answer = people.does("model", model="nano-schnell")
    assert not answer["guidance"]["interactive"] and "no input" in answer["guidance"]["info"]
    assert answer["steps"] == 4
    for method, works in (("cfg", True), (form.PLAIN, False)):
        handler = _telling(people.handlers.method, people.c)
        answer = people.named(handler(people.given(method=method)))
        assert all(answer[name]["interactive"] == works for name in ("scale", "negative", "window_from", "window_to"))
        assert works or "Without effect" in answer["window_to"]["info"]


def test_presets_and_sizes_of_ones_own(people: People) -> None:
    wide = people.named(people.handlers.aspect(people.given(aspect="16:9")))
    assert wide["width"] > wide["height"]
    assert people.named(people.handlers.side(people.given(**wide)))["aspect"] == "16:9"
    assert people.named(people.handlers.side(people.given(width=64, height=208)))["aspect"] == "own size"


def test_dropped_lora_is_drawn_with(people: People, tmp_path: Path) -> None:
    copy = tmp_path / "mine.safetensors"
    copy.write_bytes(Path(people.site.models.lora("realism").source).read_bytes())
    answer = people.does("files", BOB, files=[str(copy)])
    assert "8 of 8 modules" in answer["stage"]["text"]
    bundled = [("Realism", False), ("Canny edges", False)]
    assert [(row["label"], row["on"]) for row in answer["loras"]] == [*bundled, ("mine", True)]
    answer["loras"][0]["on"] = True
    people.does("draw", BOB, loras=answer["loras"], seed="1")
    assert len(people.drawn(BOB).request.loras) == 2
    late = people.does("arrive", BOB)["loras"]
    assert [(row["label"], row["on"]) for row in late] == [*bundled, ("mine", False)] and all(
        row["late"] for row in late
    )


@pytest.mark.parametrize("ending", [".sft", ".SafeTensors"])
def test_dropped_lora_keeps_its_whole_name(people: People, tmp_path: Path, ending: str) -> None:
    """However long; under another name it is the same one, and the first file goes."""
    data = Path(people.site.models.lora("realism").source).read_bytes()
    session = ending[1:].ljust(32, "-")
    for name in ("short", "a-long-name-" * 14):
        (tmp_path / f"{name}{ending}").write_bytes(data)
        answer = people.does("files", session, files=[str(tmp_path / f"{name}{ending}")])
        assert [row["label"] for row in answer["loras"]] == ["Realism", "Canny edges", name]
    digest = Path(people.site.shelf(session).loras[answer["loras"][-1]["id"]].file).parent
    assert [path.name for path in digest.iterdir() if path.suffix == ending] == [f"{name}{ending}"]


def test_line_about_a_lora_names_a_few_models(people: People, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("miniflux.apps.ui.site.MAX_NAMED", 1)
    copy = tmp_path / "some.safetensors"
    copy.write_bytes(Path(people.site.models.lora("realism").source).read_bytes())
    assert "for nano-dev and 4 more" in people.does("files", "s" * 32, files=[str(copy)])["stage"]["text"]


def test_picture_is_that_of_the_library(people: People) -> None:
    people.does("draw", seed="31", loras=[])
    entry = people.drawn()
    with people.site.models.use(entry.request) as pipe:
        own = pipe.generate(**entry.request.arguments()).images[0]
    with Image.open(people.site.history.path(ANN, entry.id)) as kept:
        assert np.array_equal(np.asarray(kept), np.asarray(own))
