"""Ray started here: tried again, told in one line, nothing left of it; and what each of its actors is to have.

Ray itself is in `tests/apps/serve/test_ray.py`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from miniflux.errors import InputError, MinifluxError, MissingExtraError
from miniflux.service import cluster

NICE = "RAY_worker_niceness"
SAID = (
    "[2026-11-29 03:56:13,758 I 15055 15055] (raylet) main.cc:711: Setting node ID\n"
    "[2026-11-29 03:56:13,758 C 15055 15055] (raylet) node_manager.cc:3588:  An unexpected system state has occurred. "
    "Check failed: statussetor3588.has_value() Timed out waiting for file /tmp/ray-1/s_2/metrics_agent_port_13784\n"
    "*** StackTrace\n"
)


class Ray(types.ModuleType):
    """The package, of which `fails` starts leave a process behind and fail."""

    def __init__(self, fails: int, error: BaseException | None = None) -> None:
        super().__init__("ray")
        self.exceptions = types.SimpleNamespace(RayError=OSError)
        self.fails, self.error, self.begun = fails, error or Exception("timed out\nduring startup"), 0
        self.folders: list[str] = []

    def init(self, **options: Any) -> None:
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number))  # as Ray does
        self.begun += 1
        folder = options.get("_temp_dir")
        if folder is not None:
            self.folders.append(folder)
            logs = Path(folder, "session_latest", "logs")
            logs.mkdir(parents=True)
            subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", folder])
            if self.begun <= self.fails:
                (logs / "raylet.out").write_text(SAID)
        if self.begun <= self.fails:
            raise self.error

    def shutdown(self) -> None:
        pass


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    for name in {*cluster.ALWAYS, *cluster.OWN, "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"}:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setattr(cluster, "LONGEST", 200)  # pytest's folders are long; nothing listens in them
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    before = signal.getsignal(signal.SIGTERM)
    yield
    assert signal.getsignal(signal.SIGTERM) == before
    signal.signal(signal.SIGTERM, before)


def begun(tmp_path: Path) -> list[psutil.Process]:
    return [one for one in psutil.Process().children() if any(str(tmp_path) in word for word in one.cmdline())]


def test_a_start_that_fails_is_tried_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "ray", ray := Ray(fails=2))
    found = cluster.started(cluster.LOCAL)
    assert ray.begun == 3 and found.ray is ray and len(begun(tmp_path)) == 1
    assert os.environ["RAY_DEDUP_LOGS"] == os.environ[NICE] == "0"
    assert os.environ["RAY_AUTH_MODE"] == "token" and len(os.environ["RAY_AUTH_TOKEN"]) == 64
    found.close()
    assert not begun(tmp_path) and not list(tmp_path.iterdir())


def test_a_start_that_fails_again_and_again_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "ray", ray := Ray(fails=99))
    with pytest.raises(MinifluxError, match=r"\(raylet: Timed out waiting for file metrics_agent_port_13784\)") as told:
        cluster.started(cluster.LOCAL)
    assert ray.begun == cluster.TRIES and "\n" not in str(told.value) and ray.folders[-1] in str(told.value)
    assert not begun(tmp_path) and [str(path) for path in tmp_path.iterdir()] == ray.folders[-1:]  # for who reads them


def test_asked_to_end_while_it_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Asked(KeyboardInterrupt):
        pass

    def ours(*_: object) -> None:
        raise Asked

    before = signal.signal(signal.SIGTERM, ours)
    try:
        monkeypatch.setitem(sys.modules, "ray", Ray(fails=99, error=SystemExit(15)))
        with pytest.raises(Asked):
            cluster.started(cluster.LOCAL)
        assert not begun(tmp_path) and not list(tmp_path.iterdir())
    finally:
        signal.signal(signal.SIGTERM, before)


def test_what_is_set_already_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", Ray(fails=0))
    monkeypatch.setenv(NICE, "7")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    cluster.started(cluster.LOCAL).close()
    assert os.environ[NICE] == "7" and "RAY_AUTH_TOKEN" not in os.environ


def test_a_process_that_ends_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", Ray(fails=0))
    monkeypatch.setattr(cluster, "NEEDED", (Path(sys.executable).name,))
    found = cluster.started(cluster.LOCAL)
    try:
        (one,) = found.processes
        assert not found.ended()
        one[1].kill()
        one[1].wait(10)
        assert "has ended" in found.ended()
    finally:
        found.close()


def test_no_cluster_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", ray := Ray(fails=99, error=ConnectionError("no\nanswer")))
    with pytest.raises(InputError, match="--ray auto: no answer"):
        cluster.started("auto")
    assert ray.begun == 1 and NICE not in os.environ
    for address in ("127.0.0.1:9", "[::1]:9", "127.0.0.1:99999", "ray://127.0.0.1:9"):
        with pytest.raises(InputError, match="nothing answers there"):
            cluster.started(address)
    assert ray.begun == 1


def test_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"miniflux\[ray\]"):
        cluster.started(cluster.LOCAL)


def test_folders_that_sockets_can_have(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cluster, "LONGEST", 30)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / ("long" * 20)))
    folder = Path(cluster._folder())
    assert folder.parent == Path("/tmp") and len(str(folder)) <= 44
    folder.rmdir()
    monkeypatch.setenv("RAY_TMPDIR", "/nowhere")
    with pytest.raises(InputError, match="set RAY_TMPDIR"):
        cluster._folder()


@pytest.mark.parametrize(
    ("machines", "count", "cpus"),
    [
        ([8], 1, 8),
        ([8], 3, 2),
        ([2], 4, 0.5),
        ([2], 3, 0.5),
        ([4, 4, 4], 2, 4),
        ([4, 2], 3, 2),
        ([], 2, 0),
        ([0], 1, 0),
    ],
)
def test_shares_of_cpus(machines: list[int], count: int, cpus: float) -> None:
    assert cluster.cpus_of_each(machines, count) == cpus


@given(st.lists(st.integers(1, 64), min_size=1, max_size=5), st.integers(1, 64))
def test_all_have_a_place(machines: list[int], count: int) -> None:
    cpus = cluster.cpus_of_each(machines, count)
    assert sum(int(machine / cpus + 1e-9) for machine in machines) >= count
    assert cpus <= max(machines)


def test_a_gpu_for_each() -> None:
    nodes = [{"Alive": True, "Resources": {"CPU": 4.0}}, {"Alive": True, "Resources": {"CPU": 4.0, "GPU": 2.0}}]
    assert cluster.share(types.SimpleNamespace(nodes=lambda: nodes), 2) == {"num_gpus": 1.0}
    nodes[1]["Alive"] = False  # type: ignore[assignment]
    assert cluster.share(types.SimpleNamespace(nodes=lambda: nodes), 2) == {"num_cpus": 2.0}
