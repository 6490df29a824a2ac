"""The notebooks of docs run as they stand, offline, on a CPU, and say what is seen."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8"))


def run(stem: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that a notebook leaves, its code cells run one after the other in an empty folder."""
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in read(FOLDER / f"{stem}.ipynb")["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{stem}.ipynb, {cell['id']}", "exec"), names)
    matplotlib.pyplot.close("all")
    return names


def test_there_are_six() -> None:
    assert [path.stem[0] for path in NOTEBOOKS] == list("123456")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_a_notebook_without_outputs(path: Path) -> None:
    """What nbformat 4.5 asks of a file; it is not installed here."""
    book = read(path)
    assert set(book) == {"cells", "metadata", "nbformat", "nbformat_minor"}
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5)
    assert book["metadata"]["kernelspec"] == {"display_name": "Python 3", "language": "python", "name": "python3"}
    ids = [cell["id"] for cell in book["cells"]]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,64}", one) for one in ids)
    for cell in book["cells"]:
        code = {"execution_count", "outputs"} if cell["cell_type"] == "code" else set[str]()
        assert cell["cell_type"] in ("code", "markdown")
        assert set(cell) == {"cell_type", "id", "metadata", "source"} | code
        assert cell["metadata"] == {}
        assert cell.get("execution_count") is None
        assert not cell.get("outputs")
        assert cell["source"]
        assert all(line.endswith("\n") for line in cell["source"][:-1])
        assert not cell["source"][-1].endswith("\n")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_links_lead_somewhere(path: Path) -> None:
    text = "\n".join("".join(cell["source"]) for cell in read(path)["cells"] if cell["cell_type"] == "markdown")
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert "://" in target or (path.parent / target).exists(), target


def test_anatomy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = run("1-anatomy", tmp_path, monkeypatch)
    assert (tmp_path / "nano.svg").is_file()
    assert bool((names["again"].latents == names["result"].latents).all())
    assert names["share"]["double_blocks"] > names["share"]["single_blocks"]
    assert names["work"]["double_blocks"] < names["work"]["single_blocks"]


def test_positions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = run("2-positions", tmp_path, monkeypatch)
    plain, apart = names["plain"], names["apart"]
    assert apart(plain, names["together"]) < 1e-4
    assert apart(plain, names["shuffled"]) < 1e-4
    for other in (*names["shifted"].values(), names["zero"], names["exchanged"], names["mirrored"]):
        assert apart(plain, other) > 1
    assert "positions" in names["mirrored"].settings[0]["wrapped"]


def test_guidance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = run("3-guidance", tmp_path, monkeypatch)
    bent, found, shares = names["bent"], names["found"], names["shares"]
    assert min(bent, key=bent.get) == 1.0
    assert bent[6.0] > 3 * bent[3.0] > 6 * bent[1.0]
    assert found[3.0][0].velocities > 2 * max(step.velocities for step in found[3.0][4:])
    assert shares[0] == max(shares) > 1
    assert min(shares) < 0.4 < shares[-1]


@pytest.mark.slow
def test_solvers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = run("4-solvers", tmp_path, monkeypatch)
    exact, measured = names["exact"], names["measured"]
    for solver, order in (("euler", 1), ("heun", 2), ("dpmpp-2m", 2)):
        assert names["orders"][solver] == pytest.approx(order, abs=0.25)
    few = {error.solver: error.error for error in exact if error.calls in (7, 8)}
    assert few["dpmpp-2m"] < few["heun"] / 3 < few["euler"] / 3
    for calls in (6, 12, 24):
        errors = {error.solver: error.error for error in measured if error.calls in (calls, calls - 1)}
        assert errors["dpmpp-2m"] < errors["euler"] < errors["heun"]
        crossed = {key[:2]: error for key, error in names["crossed"].items() if key[2] == calls}
        assert crossed["beta-flow", "dpmpp-2m"] < crossed["beta-flow", "euler"] < crossed["uniform", "dpmpp-2m"]


def test_lora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = run("5-lora", tmp_path, monkeypatch)
    assert names["receipt"].applied == names["receipt"].expected == 8
    for module in names["receipt"].modules:  # the product of the file's own matrices
        assert names["norms"][module.target] == pytest.approx(module.norm, rel=1e-3)
    assert [row.name for row in names["found"].rows if names["own"][row.name] > 0] == [
        "double_blocks.0",
        "double_blocks.1",
    ]
    changes = names["changes"]
    assert changes["nowhere"] == 0
    assert changes["block 0"] < changes["block 1"] < changes["image's weights"]
    assert changes["everywhere"] < changes["image's weights"]


@pytest.mark.slow
def test_left_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = run("6-left-of", tmp_path, monkeypatch)
    assert all(abs(cell.recovered) < 0.05 for cell in names["words"].cells)
    (vector,) = names["vector"].cells
    assert vector.recovered > 0.95
    best = names["inside"].best()
    assert best.point == "double_blocks.0.txt_mod.mlp_gate"
    assert best.recovered > 0.95
    assert all(cell.recovered < 0.1 for cell in names["inside"].cells if cell is not best)
    early, late = names["when"].cells
    assert early.recovered < 0.2 < 0.9 < late.recovered
    assert names["flux2"].best().tokens == "blue"
