"""Models: what is here, loaded once, kept while there is room; LoRAs of jobs do not mix."""

from __future__ import annotations

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import miniflux
from miniflux import lora
from miniflux.cache import ResultCache
from miniflux.errors import CancelledError, CheckpointError, InputError, LoraError, MinifluxError, WeightsNotFoundError
from miniflux.result import Result
from miniflux.service import History, Models, Queue, models, new_session
from miniflux.service.queue import Step
from miniflux.settings import LoraUse, Request
from miniflux.variants import VARIANTS
from miniflux.weights.finding import BUNDLED, WEIGHTS_VARIABLE

REALISM = BUNDLED / "loras" / "realism.safetensors"


def ask(seed: int = 0, *loras: LoraUse, **options: Any) -> Request:
    return Request(prompt="a star", seed=seed, loras=loras, **{"width": 32, "height": 32, "steps": 2, **options})


def quiet(done: int, preview: object) -> None:
    """Nobody watches."""


@pytest.fixture(scope="module")
def shared() -> Models:
    return Models()


def alone(request: Request) -> torch.Tensor:
    """The latents of a pipeline that nothing else was done with."""
    pipe = miniflux.load(request.model)
    for i, use in enumerate(request.loras):
        lora.attach(pipe, use.file, use.strength, str(i))
    return pipe.generate(**request.arguments()).latents


def test_what_is_listed(shared: Models, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The bundled ones always; others where their files are found, with what is missing."""
    for variable in (WEIGHTS_VARIABLE, "HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.setenv(variable, str(tmp_path))
    listed = {model.name: model for model in shared.listed()}
    assert set(listed) == set(VARIANTS) and [m.name for m in shared.listed()][:2] == ["nano-dev", "nano-schnell"]
    assert not listed["nano-dev"].missing and listed["nano-dev"].bundled and listed["nano-dev"].previews
    assert listed["nano-dev"].guided and not listed["nano-schnell"].guided
    assert "transformer (flux1-dev.safetensors" in listed["flux1-dev"].missing
    with pytest.raises(WeightsNotFoundError, match="flux1-dev: not on this machine"):
        shared.cost(ask(model="flux1-dev"))


def test_loras_of_jobs_are_exactly_theirs(shared: Models) -> None:
    """Strengths, order, none at all: bitwise as on a pipeline of one's own."""
    requests = [
        ask(1),
        ask(1, LoraUse("realism", 1.0)),
        ask(1, LoraUse("realism", 0.5)),
        ask(1, LoraUse(str(REALISM), 0.5), LoraUse("realism", -0.25)),
        ask(1, LoraUse("realism", (("double_blocks", 0.5), ("double_blocks.1", 0.0)))),
        ask(1),
    ]
    latents = [shared.draw(request, quiet).latents for request in requests]
    for request, found in zip(requests[:-1], latents, strict=False):
        assert torch.equal(found, alone(request))
    assert torch.equal(latents[0], latents[-1])
    assert len({tuple(found.flatten()[:8].tolist()) for found in latents}) == 5


def test_a_change_of_strength_loads_nothing(shared: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does another LoRA load the base again."""
    shared.draw(ask(1, LoraUse("realism", 1.0)), quiet)
    monkeypatch.setattr(models, "load", lambda *_, **__: pytest.fail("the base was loaded again"))
    shared.draw(ask(1), quiet)
    shared.draw(ask(1, LoraUse("realism", 1.0)), quiet)
    monkeypatch.setattr(models.lora, "attach", lambda *_, **__: pytest.fail("a LoRA was loaded again"))
    encoded = []
    with shared.use(ask()) as pipe:
        encoded.append(pipe.text.encoded)
    monkeypatch.undo()
    shared.draw(ask(1, LoraUse("realism", 1.0)), quiet)
    monkeypatch.setattr(models.lora, "attach", lambda *_, **__: pytest.fail("a LoRA was loaded again"))
    shared.draw(ask(2, LoraUse("realism", 0.25)), quiet)
    shared.draw(ask(3, LoraUse("realism", 0.75)), quiet)
    with shared.use(ask(0, LoraUse("realism", 0.75))) as pipe:
        assert pipe.text.encoded == encoded[0]  # the text encoders are not the LoRA's: embeddings are kept


def test_a_broken_lora_changes_nothing_else(shared: Models, tmp_path: Path) -> None:
    """Not a LoRA, cut off, for another model, absent: said, and the next request is drawn as before."""
    expected = shared.draw(ask(3), quiet).latents
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(REALISM.read_bytes()[:-100])
    text = tmp_path / "text.safetensors"
    text.write_text("hello")
    other = tmp_path / "other.safetensors"
    miniflux.checkpoints.writing.write_tensors(
        other, {f"double_blocks.0.img_attn.proj.lora_{x}.weight": torch.ones(4, 4) for x in "AB"}, {}
    )
    for file in (cut, text, other, tmp_path / "none.safetensors"):
        with pytest.raises((LoraError, CheckpointError), match=file.name):
            shared.draw(ask(3, LoraUse("realism", 1.0), LoraUse(str(file))), quiet)
        assert torch.equal(shared.draw(ask(3), quiet).latents, expected)
        if file.exists():
            with pytest.raises(MinifluxError, match=file.name):
                shared.lora(file)
    assert shared.lora("realism").applied > 0 and shared.lora(REALISM, "nano-dev").dialect


def test_a_lora_file_that_was_exchanged(shared: Models, tmp_path: Path) -> None:
    """Under the same name it is read again; by its hash it is refused."""
    file = tmp_path / "style.safetensors"
    shutil.copy(REALISM, file)
    digest = miniflux.weights.origin.Stamp.of(file).sha256()
    first = shared.draw(ask(1, LoraUse(str(file), 1.0, digest)), quiet).latents
    tensors = {key: 2 * tensor for key, tensor in miniflux.checkpoints.files.open_tensors(REALISM).items()}
    file.unlink()
    miniflux.checkpoints.writing.write_tensors(file, tensors, {})
    assert not torch.equal(shared.draw(ask(1, LoraUse(str(file), 1.0)), quiet).latents, first)
    with pytest.raises(LoraError, match="its SHA-256 differs"):
        shared.draw(ask(1, LoraUse(str(file), 1.0, digest)), quiet)


def test_jobs_with_other_loras_do_not_mix(shared: Models) -> None:
    """Four threads on one pipeline, three sets of LoRAs: every picture bitwise as alone."""
    sets = [(), (LoraUse("realism", 1.0),), (LoraUse("realism", 0.3),)]
    requests = [ask(seed, *sets[seed % 3]) for seed in range(9)]
    expected = [shared.draw(request, quiet).latents for request in requests]
    with ThreadPoolExecutor(4) as pool:
        found = [run.result().latents for run in [pool.submit(shared.draw, request, quiet) for request in requests]]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_equal_loras_may_draw_at_once_and_others_wait(shared: Models) -> None:
    request, other = ask(0, LoraUse("realism", 1.0)), ask(0)
    entered = threading.Event()
    with shared.use(request) as one, shared.use(request) as two:
        assert one is two

        def enter() -> None:
            with shared.use(other):
                entered.set()

        thread = threading.Thread(target=enter)
        thread.start()
        assert not entered.wait(0.1)
    thread.join(10)
    assert entered.is_set()


def test_models_are_loaded_once_and_let_go_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads that want the same; the least recently used goes, one that is used stays."""
    loads: list[str] = []

    def counted(name: str, **options: Any) -> Any:
        loads.append(name)
        return miniflux.load(name, **options)

    monkeypatch.setattr(models, "load", counted)
    dev, schnell = ask(model="nano"), ask(model="nano-schnell")
    small = Models(max_bytes=40_000_000)  # one of them in float32 takes 27 MB
    with ThreadPoolExecutor(2) as pool:
        for run in [pool.submit(small.draw, dev, quiet) for _ in range(2)]:
            run.result()
    assert loads == ["nano-dev"]
    small.draw(schnell, quiet)
    assert [key[0] for key in small._loaded] == ["nano-schnell"]
    with small.use(schnell):
        small.draw(dev, quiet)
        assert {key[0] for key in small._loaded} == {"nano-dev", "nano-schnell"}
    assert loads == ["nano-dev", "nano-schnell", "nano-dev"]
    large = Models()
    for request in (dev, schnell, dev, schnell):
        large.draw(request, quiet)
    assert len(loads) == 5
    monkeypatch.setattr(models, "free_ram", lambda: 10_000_000)  # the file of another one takes 13 MB
    large.draw(ask(model="nano-kontext"), quiet)
    assert [key[0] for key in large._loaded] == ["nano-kontext"]


def test_through_queue_and_history(tmp_path: Path) -> None:
    """Steps, previews, cancelling, a repeated request answered at once, another strength another picture."""
    own = Models(cache=ResultCache())
    history, session = History(tmp_path), new_session()
    with Queue(own.draw, own.cost, deliver=history.deliver, answer=own.answer) as queue:
        request = ask(1, LoraUse("realism", 1.0), model="nano-dev", steps=3)
        first = queue.submit(session, request).results(60)[0]
        assert not first.cached
        again = queue.submit(session, request)
        assert again.over and again.results()[0].cached
        assert again.results()[0].images[0].tobytes() == first.images[0].tobytes()
        spelled = queue.submit(session, replace(request, model="nano", guidance=3.0)).results(60)[0]
        assert spelled.cached  # another way to ask for the same: by way of the queue
        weaker = replace(request, loras=(LoraUse("realism", 0.5),))
        assert queue.submit(session, weaker).results(60)[0].images[0].tobytes() != first.images[0].tobytes()
        long = queue.submit(session, ask(5, steps=400))
        while not long.status().steps_done:
            assert not long.wait(0.01)
        preview = long.preview()
        assert preview is None or preview.size == (32, 32)
        long.cancel()
        with pytest.raises(CancelledError):
            long.results(60)
        assert long.status().steps_done < 400
        assert queue.submit(session, ask(6)).results(60)[0].images[0].size == (32, 32)
    entries = history.listed(session)
    assert [entry.cached for entry in entries] == [False, False, True, True, False]
    assert entries[-1].request == request


def test_answers_are_given_only_while_they_are_true(tmp_path: Path) -> None:
    """Not without a cache, not once it has forgotten, not when a LoRA file is another one."""
    file = tmp_path / "style.safetensors"
    shutil.copy(REALISM, file)
    request = ask(1, LoraUse(str(file), 1.0))
    kept = ResultCache()
    own = Models(cache=kept)
    assert own.answer(request) is None
    own.draw(request, quiet)
    answer = own.answer(request)
    assert answer is not None and answer.cached and answer.settings[0]["seed"] == 1
    kept.clear()
    assert own.answer(request) is None
    own.draw(request, quiet)
    assert own.answer(request) is not None
    with own.use(request) as pipe:
        handle = pipe.transformer.register_forward_hook(lambda *_: None)
        assert own.answer(request) is None  # changed in memory
        handle.remove()
    assert own.answer(request) is not None
    file.write_bytes(file.read_bytes() + b"")
    file.touch()
    assert own.answer(request) is None
    bare = Models()
    bare.draw(ask(1), quiet)
    assert bare.answer(ask(1)) is None


def test_without_a_place_for_pictures_none_can_be_changed(shared: Models) -> None:
    with pytest.raises(InputError, match="no place for pictures"):
        shared.draw(ask(0, image="0" * 64), quiet)


@pytest.mark.parametrize(("free", "at_once"), [(1, 1), (None, 2)])
def test_runs_at_once_are_bounded_by_memory(
    shared: Models, monkeypatch: pytest.MonkeyPatch, free: int | None, at_once: int
) -> None:
    """Whatever the number of workers: where there is room for one run, the second waits; both are drawn."""
    monkeypatch.setattr("miniflux.memory.room.free_ram", lambda: free)
    go, change = threading.Event(), threading.Semaphore(0)
    at_work, waits = set[int](), set[int]()

    def draw(request: Request, step: Step) -> Result:
        def told(done: int, preview: Any) -> None:
            step(done, preview)
            (at_work if done else waits).add(request.seed)
            change.release()
            assert not done or go.wait(60)

        return shared.draw(request, told)

    with Queue(draw, shared.cost, workers=2) as queue:
        jobs = [queue.submit("x" * 32, Request(prompt="a", width=64, height=64, steps=2, seed=s)) for s in (1, 2)]
        while len(at_work) + len(waits - at_work) < 2:
            assert change.acquire(timeout=60)
        assert len(at_work) == at_once
        go.set()
        assert [len(job.results(60)) for job in jobs] == [1, 1]
