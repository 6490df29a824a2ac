"""What a job is: as it is asked for, as the store has it, and what comes of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from miniflux.service.jobs.tables import JOBS
from miniflux.settings import Request

JobState = Literal["waiting", "running", "done", "failed", "cancelled"]
OVER = ("done", "failed", "cancelled")


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A job to be.

    Attributes:
        request: what is drawn, with its seed.
        kin: jobs of one kin may be drawn in one batch, see `miniflux.service.models.kin`.
        steps: of all its pictures.
        identity: equal for jobs that make the same pictures of the same files; None to draw it in any case.
        key: the id of whose it is; empty for nobody's.
        output: plain JSON that the answer needs.
        previews: kept of each picture while it is drawn.
        priority: see `store.PRIORITY`.
        seconds: that it may take once it runs.
        once: the client's name of this request: asked again with the same name, it is the same job.
        webhook, webhook_secret: who is told when it is over.
    """

    request: Request
    kin: str
    steps: int
    identity: str | None = None
    key: str = ""
    output: Mapping[str, Any] = field(default_factory=dict[str, Any])
    previews: int = 0
    priority: int = 0
    seconds: float = 600.0
    once: str | None = None
    webhook: str | None = None
    webhook_secret: str | None = None


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What may be asked for at once; None for no bound.

    Attributes:
        waiting: jobs in line.
        per_day: pictures of one key in any 24 hours.
        per_minute: requests of one key in any 60 seconds.
    """

    waiting: int | None = None
    per_day: int | None = None
    per_minute: int | None = None


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job as it is in the store; the attributes are the columns of `tables.JOBS`."""

    id: str
    key: str
    request: Request
    kin: str
    output: dict[str, Any]
    pictures: int
    previews: int
    charged: int
    state: JobState
    stopping: bool
    worker: str | None
    tries: int
    steps: int
    steps_done: int
    seconds: float
    created: float
    started: float | None
    ended: float | None
    cached: bool
    error_kind: str | None
    error: str | None
    webhook: str | None
    webhook_secret: str | None
    webhook_tries: int

    @property
    def over(self) -> bool:
        return self.state in OVER


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A finished picture of a job: where it is, how large, and of which seed."""

    number: int
    blob: str
    bytes: int
    width: int
    height: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A preview: of which picture, after how many steps, and where it is."""

    number: int
    step: int
    blob: str


@dataclass(frozen=True, kw_only=True)
class Told:
    """What a worker is told about a job that it draws: whether to stop, and how many previews are wanted."""

    stopping: bool
    previews: int


COLUMNS = [JOBS.c[f.name] for f in fields(Job)]
NO_BOUNDS = Bounds()


def job_of(row: Any) -> Job:
    """The job in a row of these columns."""
    values: dict[str, Any] = {f.name: getattr(row, f.name) for f in fields(Job)}
    values |= {"request": Request.from_json(row.request), "output": json.loads(row.output)}
    return Job(**values)
