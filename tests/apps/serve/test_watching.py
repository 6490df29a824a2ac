"""Many who wait cost one question at a time; trouble makes nobody wait for ever."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable
from contextlib import aclosing
from typing import Any, cast

import pytest
from sqlalchemy.exc import OperationalError

from miniflux.apps.serve import watching
from miniflux.apps.serve.watching import Watch
from miniflux.service.jobs.store import Store

STATES = ("waiting", "running", "running", "done")


class Counted:
    """A store whose jobs move on with every question."""

    def __init__(self, trouble: tuple[Exception, ...] = ()) -> None:
        self.asked: list[int] = []
        self.trouble, self.go = list(trouble), threading.Event()

    def moved(self, ids: Iterable[str]) -> dict[str, Any]:
        ids = list(ids)
        self.asked.append(len(ids))
        if self.trouble:
            raise self.trouble.pop()
        self.go.wait(30)
        state = STATES[min(len(self.asked) - 1, 3)]
        return {id: (state, len(self.asked), 0) for id in ids if id != "gone"}


async def followed(watch: Watch, id: str) -> list[str]:
    async with aclosing(watch.follow(id)) as news:
        return [moved.state async for moved in news if moved is not None]


async def many(store: Counted, ids: list[str]) -> list[list[str]]:
    watch = Watch(cast(Store, store), every=0.001)
    async with watch.running():
        tasks = [asyncio.create_task(followed(watch, id)) for id in ids]
        await asyncio.sleep(0.05)
        store.go.set()
        found = await asyncio.wait_for(asyncio.gather(*tasks), 30)
        assert not watch._jobs  # pyright: ignore[reportPrivateUsage]
        asked = len(store.asked)
        await asyncio.sleep(0.05)
        assert len(store.asked) <= asked + 1  # nobody waits: nothing is asked
    return found


def test_a_thousand_who_wait() -> None:
    store = Counted()
    found = asyncio.run(many(store, [f"job {i // 4}" for i in range(1000)]))
    assert {states[-1] for states in found} == {"done"} and len(found) == 1000
    assert len(store.asked) < 10 and max(store.asked) == 250  # each job once, whoever waits for it


def test_a_job_that_is_not_there() -> None:
    assert asyncio.run(many(Counted(), ["gone"])) == [[]]


def test_trouble_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "AGAIN", 0.01)
    store = Counted((ValueError("a mistake"), OperationalError("select", {}, Exception("locked"))))
    (states,) = asyncio.run(many(store, ["job"]))
    assert states[-1] == "done"


def test_nothing_new_for_a_while() -> None:
    async def waited() -> list[Any]:
        store = Counted()
        watch = Watch(cast(Store, store), every=0.001)
        found: list[Any] = []
        async with watch.running(), aclosing(watch.follow("job", 0.02)) as news:
            async for moved in news:
                found.append(moved)
                if len(found) == 2:
                    store.go.set()
        return found

    found = asyncio.run(waited())
    assert found[:2] == [None, None] and found[-1].over
