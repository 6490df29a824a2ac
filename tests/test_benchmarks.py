"""The benchmarks run: small ones here, for their answers alone, and what needs a GPU says so. No time is judged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def run(script: str, *arguments: str) -> str:
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_passes_are_equal_and_told_in_numbers(tmp_path: Path) -> None:
    """All three families against diffusers, each in turn with its products alone."""
    pytest.importorskip("diffusers")
    said = run("forward.py", "--hidden", "64", "--rounds", "1", "--json", str(tmp_path / "a.json"))
    figures = json.loads((tmp_path / "a.json").read_text("utf-8"))["figures"]
    assert [one["what"].partition(",")[0] for one in figures] == ["flux1", "flux2", "flux3"]
    for one in figures:
        assert all(one[side]["median"] > 0 for side in ("ours", "peer", "limit")) and one["peak"] > 2**20
        assert one["what"] in said


def test_the_one_for_a_gpu_runs_small_and_says_that_it_is_no_measurement() -> None:
    pytest.importorskip("diffusers")
    said = run("gpu.py", "--tiny", "--rounds", "1", "--steps", "2")
    assert "NOT a measurement" in said and said.count("not run on a CPU") == 3
    apart = [float(line.rpartition("apart by ")[2]) for line in said.splitlines() if "apart by" in line]
    assert len(apart) == 3 and max(apart) < 1e-4
    assert said.count("the same: True") == 6 and "the same: False" not in said  # waiting blocks, two decoded
    assert said.count("compiled, CUDA graphs, float8: not run on a CPU") == 3
