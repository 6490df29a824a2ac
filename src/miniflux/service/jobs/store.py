"""Jobs in a database, so that they survive: who waits, who draws what, what came of it.

    store = Store("sqlite:////srv/miniflux/jobs.sqlite")      # or postgresql+psycopg://user:password@host/name
    job = store.submit(Wanted(request=request, kin=kin(request), steps=4))
    store.place(job), store.job(job.id).state, store.pictures(job.id)     # what workers do with it: `workbench`

Every change is one transaction, and asks for the state that it changes: whatever ends in the middle of one, and however
often it is tried again, a job is drawn once, charged once, and never lost. SQLite (in its WAL mode) and PostgreSQL.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterable

from sqlalchemy import Connection, delete, func, insert, select, tuple_, update
from sqlalchemy.exc import IntegrityError

from miniflux.errors import InputError, QueueFullError, QuotaError
from miniflux.service.jobs.database import IN_LINE, Database, told_from
from miniflux.service.jobs.records import (
    COLUMNS,
    NO_BOUNDS,
    OVER,
    Bounds,
    Job,
    JobState,
    Picture,
    Shown,
    Wanted,
    job_of,
)
from miniflux.service.jobs.tables import COUNTS, JOBS, KEYS, PACES, PICTURES, PREVIEWS
from miniflux.settings import Request

DAY, MINUTE = 86_400.0, 60.0
PRIORITY = 60.0  # seconds of waiting that one level of priority is worth: whoever waits long enough is next


class Store(Database):
    """The jobs, for those who ask for them and look at them; arguments and errors as of `Database`."""

    # Asking

    def submit(self, wanted: Wanted, bounds: Bounds = NO_BOUNDS) -> Job:
        """Put a job into the line; or, of a request that was asked before under the same name, the job that it is.

        A job whose pictures are there already is over at once, and costs nothing.

        Raises:
            QueueFullError: too many wait.
            QuotaError: the key has used what it may.
            InputError: the name `once` was that of another request.
        """
        id, now, text = secrets.token_hex(16), time.time(), wanted.request.text()
        values = {
            "id": id,
            "key": wanted.key,
            "once": wanted.once,
            "request": text,
            "kin": wanted.kin,
            "identity": wanted.identity,
            "output": json.dumps(dict(wanted.output)),
            "pictures": wanted.request.images,
            "previews": wanted.previews,
            "charged": wanted.request.images,
            "due": now - PRIORITY * wanted.priority,
            "state": "waiting",
            "stopping": False,
            "tries": 0,
            "crashes": 0,
            "steps": wanted.steps,
            "steps_done": 0,
            "seconds": wanted.seconds,
            "created": now,
            "cached": False,
            "webhook": wanted.webhook,
            "webhook_secret": wanted.webhook_secret,
            "webhook_tries": 0,
        }
        with self.writing() as c:
            if wanted.key:  # so that two requests of one key do not both take the last picture
                c.execute(select(KEYS.c.id).where(KEYS.c.id == wanted.key).with_for_update())
            if wanted.once is not None:
                known = c.execute(
                    select(*COLUMNS).where(JOBS.c.key == wanted.key, JOBS.c.once == wanted.once)
                ).one_or_none()
                if known is not None:
                    if known.request != text or json.loads(known.output) != dict(wanted.output):
                        raise InputError(f"the name {wanted.once!r} was given to another request before")
                    return job_of(known)
            alike = self._alike(c, wanted)
            if alike is not None:
                values |= {"state": "done", "charged": 0, "cached": True, "started": now, "ended": now}
                values |= {"steps_done": wanted.steps, "webhook_due": now if wanted.webhook else None}
            else:
                self._check(c, wanted, bounds, now)
            try:
                c.execute(insert(JOBS).values(values))
            except IntegrityError:  # asked twice at the same moment
                c.rollback()
                return self.submit(wanted, bounds)
            if alike is not None:
                taken = select(PICTURES).where(PICTURES.c.job == alike)
                c.execute(insert(PICTURES), [{**row, "job": id} for row in c.execute(taken).mappings()])
            self.count(c, {"requests": 1, **({"cached": 1} if alike is not None else {})})
            return job_of(c.execute(select(*COLUMNS).where(JOBS.c.id == id)).one())

    def _alike(self, c: Connection, wanted: Wanted) -> str | None:
        """A job that made the same pictures, and still has them."""
        if wanted.identity is None:
            return None
        whole = (
            select(func.count()).where(PICTURES.c.job == JOBS.c.id).scalar_subquery()
        )  # those that expired are not there
        found = select(JOBS.c.id).where(
            JOBS.c.identity == wanted.identity, JOBS.c.state == "done", whole == JOBS.c.pictures
        )
        return c.execute(found.order_by(JOBS.c.ended.desc()).limit(1)).scalar()

    def _check(self, c: Connection, wanted: Wanted, bounds: Bounds, now: float) -> None:
        if bounds.waiting is not None:
            waiting = c.execute(select(func.count()).where(JOBS.c.state == "waiting")).scalar_one()
            if waiting >= bounds.waiting:
                seconds = max(1, round(self.seconds_of_line(c)))
                raise QueueFullError(f"{waiting} jobs wait, and no more are taken; try again in about {seconds} s")
        if bounds.per_minute is not None:
            recent = select(JOBS.c.created).where(JOBS.c.key == wanted.key, JOBS.c.created > now - MINUTE)
            times = sorted(c.execute(recent).scalars())
            if len(times) >= bounds.per_minute:
                wait = times[-bounds.per_minute] + MINUTE - now
                raise QuotaError(f"{bounds.per_minute} requests in a minute are all that this key may make", wait)
        if bounds.per_day is not None:
            charged = select(JOBS.c.created, JOBS.c.charged).where(
                JOBS.c.key == wanted.key, JOBS.c.created > now - DAY, JOBS.c.charged > 0
            )
            rows = c.execute(charged.order_by(JOBS.c.created)).all()
            over = sum(row.charged for row in rows) + wanted.request.images - bounds.per_day
            if over > 0:
                wait, left = DAY, over
                for row in rows:  # the oldest are free again first
                    left -= row.charged
                    if left <= 0:
                        wait = row.created + DAY - now
                        break
                raise QuotaError(f"{bounds.per_day} pictures in a day are all that this key may make", wait)

    def used(self, key: str) -> tuple[int, int]:
        """Pictures of the last 24 hours, and requests of the last minute, of one key."""
        now = time.time()
        with self.reading() as c:
            day = select(func.coalesce(func.sum(JOBS.c.charged), 0)).where(
                JOBS.c.key == key, JOBS.c.created > now - DAY
            )
            minute = select(func.count()).where(JOBS.c.key == key, JOBS.c.created > now - MINUTE)
            return int(c.execute(day).scalar_one()), int(c.execute(minute).scalar_one())

    def cancel(self, id: str) -> None:
        """Stop a job: at once if it waits, which then costs nothing; within one step if it runs."""
        now = time.time()
        with self.writing() as c:
            own = JOBS.c.id == id
            waits = update(JOBS).where(own, JOBS.c.state == "waiting")
            ended = c.execute(
                waits.values(state="cancelled", ended=now, charged=0, error="cancelled", **told_from(now))
            )
            if ended.rowcount:
                self.count(c, {"cancelled": 1})
            else:
                c.execute(update(JOBS).where(own, JOBS.c.state == "running").values(stopping=True))

    def want_previews(self, id: str, count: int) -> None:
        """Somebody looks on: keep at least so many previews of each picture."""
        with self.writing() as c:
            c.execute(
                update(JOBS)
                .where(JOBS.c.id == id, JOBS.c.previews < count, JOBS.c.state.not_in(OVER))
                .values(previews=count)
            )

    # Looking

    def job(self, id: str) -> Job | None:
        """One job, or None."""
        return self.jobs([id]).get(id)

    def jobs(self, ids: Iterable[str]) -> dict[str, Job]:
        """Those of them that there are."""
        with self.reading() as c:
            return {row.id: job_of(row) for row in c.execute(select(*COLUMNS).where(JOBS.c.id.in_(list(ids))))}

    def moved(self, ids: Iterable[str]) -> dict[str, tuple[JobState, int, int]]:
        """State, steps done, and previews kept of many jobs: what is asked for again and again."""
        shown = select(func.count()).where(PREVIEWS.c.job == JOBS.c.id).scalar_subquery()
        asked = select(JOBS.c.id, JOBS.c.state, JOBS.c.steps_done, shown.label("shown"))
        with self.reading() as c:
            rows = c.execute(asked.where(JOBS.c.id.in_(list(ids))))
            return {row.id: (row.state, row.steps_done, row.shown) for row in rows}

    def pictures(self, id: str) -> list[Picture]:
        """The finished pictures of a job, in order."""
        with self.reading() as c:
            rows = c.execute(select(PICTURES).where(PICTURES.c.job == id).order_by(PICTURES.c.number)).all()
        return [
            Picture(
                number=row.number,
                blob=row.blob,
                bytes=row.bytes,
                width=row.width,
                height=row.height,
                seed=int(row.seed),
            )
            for row in rows
        ]

    def shown(self, id: str) -> list[Shown]:
        """The previews of a job, in the order of steps, those after the same step in that of the pictures."""
        asked = select(PREVIEWS).where(PREVIEWS.c.job == id).order_by(PREVIEWS.c.step, PREVIEWS.c.number)
        with self.reading() as c:
            return [Shown(number=row.number, step=row.step, blob=row.blob) for row in c.execute(asked)]

    def place(self, job: Job) -> int:
        """0 if it runs or is over, 1 for the next in line ..."""
        with self.reading() as c:
            waits = JOBS.c.state == "waiting"
            own = c.execute(select(*IN_LINE).where(JOBS.c.id == job.id, waits)).one_or_none()
            if own is None:
                return 0
            before = tuple_(*IN_LINE) < tuple_(*own)
            return 1 + c.execute(select(func.count()).where(waits, before)).scalar_one()

    def seconds_of_line(self, c: Connection | None = None) -> float:
        """How long all that wait will take one after the other, as far as that is known from those before."""
        if c is None:
            with self.reading() as mine:
                return self.seconds_of_line(mine)
        usual = select(func.coalesce(func.avg(PACES.c.seconds), 1.0)).scalar_subquery()
        pace = func.coalesce(PACES.c.seconds, usual)
        line = select(func.coalesce(func.sum(JOBS.c.pictures * pace), 0.0)).select_from(
            JOBS.outerjoin(PACES, PACES.c.kin == JOBS.c.kin)
        )
        return float(c.execute(line.where(JOBS.c.state == "waiting")).scalar_one())

    def numbers(self) -> dict[str, float]:
        """How many jobs are in each state, and all that was counted."""
        with self.reading() as c:
            states = c.execute(select(JOBS.c.state, func.count()).group_by(JOBS.c.state)).all()
            counts = c.execute(select(COUNTS)).all()
        return {**{f"state {state}": count for state, count in states}, **{row.name: row.value for row in counts}}

    # Telling and forgetting

    def to_tell(self, count: int = 8, again: float = 120.0) -> list[Job]:
        """Jobs that are over and whose webhooks are due. Whoever asks has so many seconds to tell them, before somebody
        else may."""
        now = time.time()
        due = select(JOBS.c.id).where(JOBS.c.webhook_due <= now).order_by(JOBS.c.webhook_due).limit(count)
        with self.writing() as c:
            ids = c.execute(due.with_for_update(skip_locked=True)).scalars().all()
            c.execute(update(JOBS).where(JOBS.c.id.in_(ids)).values(webhook_due=now + again))
            return [job_of(row) for row in c.execute(select(*COLUMNS).where(JOBS.c.id.in_(ids)))]

    def was_told(self, id: str, again: float | None) -> None:
        """A webhook was called; `again`: seconds until it is to be tried once more, None if it is done with."""
        due = None if again is None else time.time() + again
        with self.writing() as c:
            values = {"webhook_due": due, "webhook_tries": JOBS.c.webhook_tries + 1}
            c.execute(update(JOBS).where(JOBS.c.id == id).values(values))

    def forget(self, seconds: float) -> int:
        """Forget jobs that were over so long ago, at least a day, for which quotas are counted; returns how many."""
        before = time.time() - max(seconds, DAY)
        with self.writing() as c:
            old = select(JOBS.c.id).where(JOBS.c.ended < before, JOBS.c.webhook_due.is_(None)).scalar_subquery()
            for table in (PICTURES, PREVIEWS):
                c.execute(delete(table).where(table.c.job.in_(old)))
            return c.execute(delete(JOBS).where(JOBS.c.ended < before, JOBS.c.webhook_due.is_(None))).rowcount

    def forget_pictures(self, there: Callable[[str], bool]) -> None:
        """Forget pictures and previews whose files have expired.

        Args:
            there: whether there is a file of this name. Asked after the names are known: files are written before
                they are named here, so that none is missed which has just come.
        """
        with self.writing() as c:
            for table in (PICTURES, PREVIEWS):
                for name in c.execute(select(table.c.blob).distinct()).scalars().all():
                    if not there(name):
                        c.execute(delete(table).where(table.c.blob == name))

    def needed(self) -> set[str]:
        """SHA-256 of the pictures that jobs that are not over were given."""
        with self.reading() as c:
            rows = c.execute(select(JOBS.c.request).where(JOBS.c.state.not_in(OVER))).scalars()
            return {digest for text in rows for digest in Request.from_json(text).pictures}
