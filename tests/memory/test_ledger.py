"""What the ledger promises: sums that are right, a table, and a warning where a run was not as predicted."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

import miniflux
from miniflux.memory import ledger, modes
from miniflux.memory.ledger import Ledger, Line, Run
from tests.memory.conftest import Make

RUN = Run(width=32, height=24, text_tokens=6, calls=3)


def lines(found: Ledger, phase: str) -> dict[str, Line]:
    return {line.what: line for line in found.phases[phase]}


def test_weights_are_counted_exactly(make: Make) -> None:
    """Resident: every parameter. Streamed: what stays, two areas as large as the largest block, the table of a run."""
    pipes = {mode: miniflux.load(make(), memory=mode, device="cpu") for mode in ("resident", "stream", "offload")}
    memories = {mode: pipe.memory for mode, pipe in pipes.items()}
    resident = pipes["resident"].transformer.state_dict()
    total = sum(4 * tensor.numel() for tensor in resident.values())
    for mode, memory in memories.items():
        assert memory is not None
        found, kept = lines(memory.ledger(RUN), "denoising"), pipes[mode].transformer.state_dict().values()
        stays = sum(4 * tensor.numel() for tensor in kept if not tensor.is_meta)
        if mode == "resident":
            assert found["transformer: weights"].ram == total == stays
            continue
        assert found["transformer: weights outside the blocks"].ram == stays
        assert ("transformer: weights that wait" in found) == (mode == "offload")
        held: list[int] = []
        assert memory.transformer is not None and memory.ahead is not None
        pipes[mode].generate(
            "x",
            steps=3,
            width=32,
            height=24,
            t5_length=6,
            callback=lambda *_, m=memory, h=held: h.append(m.transformer.held),
        )
        assert found["transformer: running blocks"].ram == held[0]
        assert found["modulation of all calls"].ram == memory.ahead.size


def test_the_encoders_run_one_after_the_other(make: Make) -> None:
    """T5 first, then CLIP beside the areas that T5 leaves: these are what is held when both are done."""
    pipe = miniflux.load(make(), memory="stream", device="cpu")
    assert pipe.memory is not None
    found = pipe.memory.ledger(RUN)
    first, second = lines(found, "text, T5"), lines(found, "text, CLIP")
    assert "clip: running blocks" not in first and "t5: activations" not in second
    held = list[tuple[int, ...]]()
    pipe.text.clip.register_forward_hook(lambda *_: held.append(tuple(part.held for part in pipe.memory.text)))
    pipe.text.encode(["x"], 6)
    assert sorted(held[0]) == sorted(second[f"{name}: running blocks"].ram for name in ("clip", "t5"))
    assert first["t5: running blocks"] == second["t5: running blocks"]


def test_on_another_device_weights_are_its_own(make: Make) -> None:
    """Blocks that wait are in RAM, those that run on the device; nothing is there twice."""
    memory = miniflux.load(make(), memory="resident", device="cpu").memory
    assert memory is not None
    device, ledgers = torch.device("cuda"), dict[str, Ledger]()
    for mode in modes.MODES:
        parts = modes.in_mode(mode, memory.parts)
        ledgers[mode] = ledger.predict(mode, parts, RUN, device, torch.float32, process=0)
    assert ledgers["resident"].vram > ledgers["text-freed"].vram > ledgers["offload"].vram == ledgers["stream"].vram
    assert ledgers["resident"].ram == ledger.LIBRARIES < ledgers["stream"].ram < ledgers["offload"].ram


def test_more_asked_for_needs_more(make: Make) -> None:
    memory = miniflux.load(make(), memory="stream", device="cpu").memory
    assert memory is not None
    base = memory.ledger(RUN)
    for more in ({"width": 4096}, {"text_tokens": 4096}, {"calls": 10_000}):
        assert memory.ledger(replace(RUN, **more)).ram > base.ram


def test_a_table_for_people() -> None:
    found = Ledger("stream", 10**6, {"a": (Line("x", ram=3 * 10**6),), "b": (Line("y", 2 * 10**6, 5 * 10**6),)})
    assert (found.ram, found.vram) == (3 * 10**6, 5 * 10**6)
    assert re.search(r"^peak +3 +5$", str(found), re.MULTILINE) and re.search(r"^  y +2 +5$", str(found), re.MULTILINE)


@pytest.mark.parametrize(("measured", "warned"), [(1.04, False), (1.2, True), (0.8, True), (None, False)])
def test_a_run_is_compared(
    make: Make,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    measured: float | None,
    warned: bool,
) -> None:
    """More than 5 % off is said, with the ledger; where the peak is an older one, nothing is known."""
    memory = miniflux.load(make(), memory="stream", device="cpu").memory
    assert memory is not None
    memory.process = 10**10
    predicted = memory.ledger(RUN).ram
    peaks = iter([1, 1 if measured is None else int(measured * predicted)])
    monkeypatch.setattr(modes, "peak_size", lambda: next(peaks))
    with memory.checked(RUN):
        pass
    assert any("predicted" in message for message in caplog.messages) == warned
