"""The jobs, for those who draw them: who has which, how far it is, what came of it.

A worker owns what it has claimed until it is finished, failed or put back. All that it says of a job asks for that:
what another has taken over meanwhile is not touched.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from typing import Any

from sqlalchemy import Connection, delete, insert, select, update

from miniflux.service.jobs.database import IN_LINE, Database, told_from
from miniflux.service.jobs.records import COLUMNS, Job, Picture, Shown, Told, job_of
from miniflux.service.jobs.tables import JOBS, PACES, PICTURES, PREVIEWS, WORKERS

CRASHES = 3  # so many workers have crashed with a job that is taken for what makes them
TRIES = 100  # the same, whatever has ended them: the system ends those that take too much memory
NEWEST = 0.2  # weight of the newest measurement in a running mean
BUCKETS = (0.1, 0.5, 1, 2, 5, 10, 30, 60, 300, 1800)  # seconds of waiting, as they are counted


class Workbench(Database):
    """The jobs, for workers; arguments and errors as of `Database`."""

    def claim(self, worker: str) -> Job | None:
        """The next in line, which is this worker's from now on; None if nobody waits."""
        line = select(JOBS.c.id).where(JOBS.c.state == "waiting").order_by(*IN_LINE).limit(1)
        with self.writing() as c:
            found = c.execute(line.with_for_update(skip_locked=True)).scalar()
            return None if found is None else self._take(c, [found], worker)[0]

    def claim_alike(self, worker: str, kin: str, pictures: int) -> list[Job]:
        """Those that follow in line, as long as they are of this kin and have no more pictures together. Nobody is
        passed by: the line goes on where the first that is different stands."""
        line = select(JOBS.c.id, JOBS.c.kin, JOBS.c.pictures).where(JOBS.c.state == "waiting")
        if pictures < 1:
            return []
        with self.writing() as c:
            found: list[str] = []
            rows = c.execute(line.order_by(*IN_LINE).limit(pictures).with_for_update(skip_locked=True)).all()
            for row in rows:
                pictures -= row.pictures
                if row.kin != kin or pictures < 0:
                    break
                found.append(row.id)
            return self._take(c, found, worker)

    def _take(self, c: Connection, ids: Sequence[str], worker: str) -> list[Job]:
        now = time.time()
        taken = update(JOBS).where(JOBS.c.id.in_(ids), JOBS.c.state == "waiting")
        values = {"state": "running", "worker": worker, "tries": JOBS.c.tries + 1, "steps_done": 0}
        c.execute(taken.values(**values, started=now))
        rows = c.execute(select(*COLUMNS).where(JOBS.c.id.in_(ids)).order_by(*IN_LINE)).all()
        buckets = Counter(f"waits {_bucket(now - row.created)}" for row in rows)
        self.count(c, {"begun": len(rows), "waited": sum(now - row.created for row in rows), **buckets})
        return [job_of(row) for row in rows]

    def told(self, ids: Sequence[str]) -> dict[str, Told]:
        """What the worker that draws them is to know."""
        asked = select(JOBS.c.id, JOBS.c.stopping, JOBS.c.previews).where(JOBS.c.id.in_(ids))
        with self.reading() as c:
            return {row.id: Told(stopping=row.stopping, previews=row.previews) for row in c.execute(asked)}

    def advance(self, worker: str, done: Mapping[str, int], shown: Sequence[tuple[str, Shown]] = ()) -> None:
        """Steps that are done, of jobs that this worker draws, and previews that it has made."""
        alike: dict[int, list[str]] = {}  # those of a batch mostly are: one statement for all of them
        for id, steps in done.items():
            alike.setdefault(steps, []).append(id)
        with self.writing() as c:
            for steps, ids in alike.items():
                c.execute(update(JOBS).where(*own(ids, worker)).values(steps_done=steps))
            for id, one in shown:
                if c.execute(select(JOBS.c.id).where(*own([id], worker))).scalar() is not None:
                    row = {"job": id, "number": one.number, "step": one.step, "blob": one.blob}
                    c.execute(self.insert(PREVIEWS).values(row).on_conflict_do_nothing())

    def finish(self, worker: str, drawn: Mapping[str, Sequence[Picture]], seconds: float) -> set[str]:
        """A batch is drawn.

        Args:
            drawn: the pictures of each job.
            seconds: that it took.

        Returns:
            The jobs that were still this worker's: the others were given to another, and are not changed.
        """
        now, batch = time.time(), sum(map(len, drawn.values()))
        with self.writing() as c:
            done = update(JOBS).where(*own(drawn, worker)).returning(JOBS.c.id, JOBS.c.kin, JOBS.c.steps)
            values = {"state": "done", "ended": now, "steps_done": JOBS.c.steps, **told_from(now)}
            jobs = c.execute(done.values(values)).all()
            if not jobs:
                return set()
            rows = [
                {f.name: getattr(one, f.name) for f in fields(one)}
                | {"job": job.id, "seed": str(one.seed), "made": now}
                for job in jobs
                for one in drawn[job.id]
            ]
            c.execute(insert(PICTURES), rows)
            counted = {"done": len(jobs), "pictures": len(rows), "steps": sum(job.steps for job in jobs)}
            self.count(c, {**counted, "drawing": seconds, f"batch {batch}": 1})
            for kin in {job.kin for job in jobs}:
                self._learn(c, kin, seconds / batch)
            return {job.id for job in jobs}

    def fail(self, id: str, worker: str, kind: str, error: str) -> bool:
        """A job cannot be drawn, or was stopped (kind `cancelled`); whether it was still this worker's."""
        now = time.time()
        state = "cancelled" if kind == "cancelled" else "failed"
        with self.writing() as c:
            values = {"state": state, "ended": now, "error_kind": kind, "error": error, **told_from(now)}
            if state == "failed":
                values["charged"] = 0
            if not c.execute(update(JOBS).where(*own([id], worker)).values(values)).rowcount:
                return False
            self.count(c, {state: 1})
        return True

    def put_back(self, worker: str, ids: Sequence[str] | None = None, crashed: bool = False) -> int:
        """Jobs of a worker that will not draw them go back to where they stood in line; returns how many.

        Args:
            ids: None for all of a worker that has ended, with whatever it did not finish. What was to be stopped is.
            crashed: whether it ended by itself, or hung: the jobs may be to blame, and those that have been there
                several times are not begun again. Whoever was ended from outside says nothing about its jobs, but for
                being ended over and over.
        """
        now = time.time()
        with self.writing() as c:
            own = (JOBS.c.worker == worker, JOBS.c.state == "running")
            if ids is not None:
                back = update(JOBS).where(*own, JOBS.c.id.in_(ids))
                values = {"state": "waiting", "worker": None, "tries": JOBS.c.tries - 1}
                return c.execute(back.values(**values, steps_done=0)).rowcount
            stopped = c.execute(
                update(JOBS)
                .where(*own, JOBS.c.stopping)
                .values(state="cancelled", ended=now, error_kind="cancelled", error="cancelled", **told_from(now))
            ).rowcount
            if crashed:
                c.execute(update(JOBS).where(*own).values(crashes=JOBS.c.crashes + 1))
            why = "workers ended again and again while they drew it"
            failed = c.execute(
                update(JOBS)
                .where(*own, (JOBS.c.crashes >= CRASHES) | (JOBS.c.tries >= TRIES))
                .values(state="failed", ended=now, charged=0, error_kind="fault", error=why, **told_from(now))
            ).rowcount
            self.count(c, {"cancelled": stopped, "failed": failed})
            lost = select(JOBS.c.id).where(*own).scalar_subquery()
            c.execute(delete(PREVIEWS).where(PREVIEWS.c.job.in_(lost)))
            back = c.execute(update(JOBS).where(*own).values(state="waiting", worker=None, steps_done=0))
            c.execute(delete(WORKERS).where(WORKERS.c.id == worker))
            self.count(c, {"again": back.rowcount})
            return back.rowcount

    def see(self, worker: str, host: str, pid: int, about: Mapping[str, Any]) -> None:
        """A worker is alive."""
        now = time.time()
        row = {"id": worker, "host": host, "pid": pid, "started": now, "seen": now, "about": json.dumps(dict(about))}
        with self.writing() as c:
            again = self.insert(WORKERS).values(row)
            c.execute(again.on_conflict_do_update(index_elements=["id"], set_={"seen": now, "about": row["about"]}))

    def lost(self, silent: float) -> list[str]:
        """Workers that have said nothing for so many seconds, and those that hold jobs and were never seen."""
        with self.reading() as c:
            quiet = c.execute(select(WORKERS.c.id).where(WORKERS.c.seen < time.time() - silent)).scalars().all()
            known = select(WORKERS.c.id)
            asked = select(JOBS.c.worker).where(JOBS.c.state == "running", JOBS.c.worker.not_in(known))
            unseen = c.execute(asked.where(JOBS.c.started < time.time() - silent).distinct()).scalars().all()
        return [*quiet, *unseen]

    def _learn(self, c: Connection, kin: str, seconds: float) -> None:
        row = self.insert(PACES).values(kin=kin, seconds=seconds)
        mean = PACES.c.seconds * (1 - NEWEST) + row.excluded.seconds * NEWEST
        c.execute(row.on_conflict_do_update(index_elements=["kin"], set_={"seconds": mean}))


def _bucket(seconds: float) -> str:
    return next((str(bound) for bound in BUCKETS if seconds <= bound), "inf")


def own(ids: Collection[str], worker: str) -> tuple[Any, ...]:
    """Jobs, as long as they are this worker's."""
    return JOBS.c.id.in_(ids), JOBS.c.worker == worker, JOBS.c.state == "running"
