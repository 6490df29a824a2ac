"""How long it takes to start: `import miniflux` against `import torch`, and the first picture of the bundled model.

Each figure is the median over fresh processes, both sides taking turns, because machines are shared and noisy.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROUNDS = 7
DRAW = ("generate", "a red circle on a blue background", "-o")


def seconds(*arguments: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        picture = str(Path(folder) / "x.png")
        cases = {
            "import torch": ["-c", "import torch"],
            "import torch, miniflux": ["-c", "import torch, miniflux"],
            "miniflux generate (nano, 20 steps, 128x128)": [
                "-m",
                "miniflux",
                "generate",
                "a red circle",
                "-o",
                picture,
            ],
        }
        times: dict[str, list[float]] = {name: [] for name in cases}
        for _ in range(ROUNDS):
            for name, arguments in cases.items():
                times[name].append(seconds(*arguments))
    medians = {name: statistics.median(values) for name, values in times.items()}
    base = medians["import torch"]
    print(f"{'median of ' + str(ROUNDS):<46} {'seconds':>8} {'ratio':>6} {'beyond torch':>13}")
    for name, value in medians.items():
        print(f"{name:<46} {value:8.2f} {value / base:6.2f} {value - base:12.2f}s")


if __name__ == "__main__":
    main()
