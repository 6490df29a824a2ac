"""Waiting for jobs: one question to the store, again and again, for all who wait."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from typing import Any, NamedTuple

from miniflux.service.jobs.database import GONE
from miniflux.service.jobs.records import OVER, JobState
from miniflux.service.jobs.store import Store

log = logging.getLogger(__name__)

EVERY = 0.025  # seconds between two questions, at least
SHARE = 0.05  # of the time, at most, in which questions are asked: they take it from whoever draws on this machine
SELDOM = 0.25  # seconds between two questions, at most, of a database that answers
AGAIN = 1.0  # the same, while the database does not answer


class ClosingError(Exception):
    """The server ends, and a job that somebody waits for is not over."""

    def __init__(self) -> None:
        super().__init__("the server ends; try again")


class Moved(NamedTuple):
    """How far a job is: its state, the steps that are done, and the previews that are kept."""

    state: JobState
    steps: int
    previews: int

    @property
    def over(self) -> bool:
        return self.state in OVER


class _Seen:
    """A job that somebody waits for; `here` is set whenever there is news."""

    def __init__(self) -> None:
        self.news: Moved | None = None
        self.known = False  # whether the store was asked since somebody waits
        self.listeners: set[asyncio.Event] = set()


@asynccontextmanager
async def meanwhile(work: Coroutine[Any, Any, None]) -> AsyncGenerator[None]:
    """In here something else is done, too; it is stopped at the end."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


class Watch:
    """Who waits for which jobs. One for each process; a thousand who wait cost one question."""

    def __init__(self, store: Store, every: float = EVERY) -> None:
        self.store, self.every = store, every
        self._jobs: defaultdict[str, _Seen] = defaultdict(_Seen)
        self._somebody = asyncio.Event()
        self.closing = False

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None]:
        """While the server runs."""
        self._jobs.clear()
        self.closing = False
        self._somebody = asyncio.Event()  # of this event loop
        # A thread of its own: never behind requests that are slow.
        with ThreadPoolExecutor(1, "miniflux-watching") as thread:
            async with meanwhile(self._ask(thread)):
                yield

    def close(self) -> None:
        """The server ends: nobody waits any longer. To be called in the loop that serves."""
        self.closing = True
        for seen in self._jobs.values():
            for event in seen.listeners:
                event.set()

    async def _ask(self, thread: ThreadPoolExecutor) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._somebody.wait()
            ids, wait, began = list(self._jobs), self.every, time.monotonic()
            try:
                found = await loop.run_in_executor(thread, self.store.moved, ids)
                wait = max(wait, min(SELDOM, (time.monotonic() - began) / SHARE))
            except GONE as error:
                log.warning("the database does not answer: %s", str(error).partition("\n")[0])
                wait = AGAIN
            except Exception:  # whoever waits must not wait for ever because of a mistake of ours
                log.exception("jobs are not watched")
                wait = AGAIN
            else:
                for id in ids:
                    self._tell(id, Moved(*found[id]) if id in found else None)
            await asyncio.sleep(wait)

    def _tell(self, id: str, news: Moved | None) -> None:
        seen = self._jobs.get(id)
        if seen is None or (seen.known and seen.news == news):
            return
        seen.known, seen.news = True, news
        for event in seen.listeners:
            event.set()

    async def follow(self, id: str, patience: float | None = None) -> AsyncGenerator[Moved | None]:
        """What becomes of a job, from now until it is over: each time that something is new.

        Args:
            patience: seconds after which None comes if nothing is new.

        Yields:
            How far it is; None if nothing was new for so long. It ends when there is no such job, or not any more.

        Raises:
            ClosingError: the server ends before the job is over.
        """
        event = asyncio.Event()
        seen = self._jobs[id]
        seen.listeners.add(event)
        if seen.known or self.closing:
            event.set()
        self._somebody.set()
        try:
            while True:
                try:
                    await asyncio.wait_for(event.wait(), patience)
                except asyncio.TimeoutError:
                    yield None
                    continue
                event.clear()
                news = seen.news
                if self.closing and (news is None or not news.over):
                    raise ClosingError
                if news is None:
                    return
                yield news
                if news.over:
                    return
        finally:
            seen.listeners.discard(event)
            if not seen.listeners and self._jobs.get(id) is seen:
                del self._jobs[id]
            if not self._jobs:
                self._somebody.clear()
