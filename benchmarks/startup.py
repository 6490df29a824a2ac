"""How long it takes to start: `import miniflux` against `import torch`, and the first picture of the bundled model.

Each figure is the median over fresh processes, both sides taking turns, because machines are shared and noisy.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from timing import Report, options, taken_of, times

FIRST = """
import time, torch, miniflux
start = time.perf_counter()
miniflux.load("nano").generate("a red circle on a blue background")
print(time.perf_counter() - start)
"""


def started(*arguments: str) -> None:
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)


def main() -> None:
    asked = options(__doc__, rounds=7).parse_args()
    report = Report("The start of a process", "import torch")
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
        torch, *others = times(*(partial(started, *arguments) for arguments in cases.values()), rounds=asked.rounds)
        for name, taken in zip(list(cases)[1:], others, strict=True):
            report.add(name, taken, torch)
    inside = [subprocess.run([sys.executable, "-c", FIRST], check=True, capture_output=True, text=True).stdout
              for _ in range(asked.rounds)]  # fmt: skip
    report.add("load and first picture, after the import", taken_of([float(one) for one in inside]))
    report.write(asked.json)


if __name__ == "__main__":
    main()
