"""The short benchmarks, each in a process of its own; what they found goes to `RESULTS.md` and `results.json` beside
this file, with the machine that it was found on: `make bench`, seven to fourteen minutes on two cores."""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from timing import HEADER, Figure, Taken

HERE = Path(__file__).parent
SHORT = (
    ("startup.py", "--rounds", "5"),
    ("linear.py", "--rounds", "5"),
    ("forward.py", "--hidden", "64", "256", "768", "--rounds", "4"),
    ("forward.py", "--hidden", "3072", "--families", "flux1", "--rounds", "3"),
    ("pictures.py", "--rounds", "8"),
    ("batches.py", "--rounds", "3"),
    ("autoencoder.py", "--only", "peers", "times", "--rounds", "2", "--sides", "512", "512", "512"),
)
LIBRARIES = ("miniflux", "torch", "diffusers", "transformers")


def machine() -> dict[str, Any]:
    """Where it was measured."""
    named = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "processor": named[0] if named else platform.processor() or platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        **{name: _version(name) for name in LIBRARIES},
        "day": datetime.date.today().isoformat(),
    }


def _lines(path: str) -> list[str]:
    place = Path(path)
    return place.read_text().splitlines() if place.exists() else []


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def measured(script: str, *arguments: str) -> dict[str, Any]:
    """The report of one of them."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.json"
        subprocess.run([sys.executable, str(HERE / script), *arguments, "--json", str(path)], check=True)
        return {"command": " ".join((script, *arguments)), **json.loads(path.read_text("utf-8"))}


def table(report: dict[str, Any]) -> str:
    """A report in Markdown."""
    told = [f"{word}: {report[word]}." for word in ("peer", "limit") if report[word]]
    lines = [f"## {report['question']}", "", f"`python benchmarks/{report['command']}`.", *told, ""]
    lines += [f"| {HEADER} |", "| --- |" + " ---: |" * 6 + " --- |"]
    for figure in report["figures"]:
        taken = {name: None if figure[name] is None else Taken(**figure[name]) for name in ("ours", "peer", "limit")}
        lines.append(f"| {Figure(**{**figure, **taken})} |")
    return "\n".join([*lines, ""])


def main() -> None:
    about = machine()
    reports = [measured(*command) for command in SHORT]
    said = ", ".join(f"{name} {value}" for name, value in about.items())
    head = f"# Results\n\nMade by `make bench`. Seconds of shared machines are noisy: read the ratios.\n\n{said}.\n"
    (HERE / "RESULTS.md").write_text("\n".join([head, *map(table, reports)]), "utf-8")
    (HERE / "results.json").write_text(json.dumps({"machine": about, "reports": reports}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
