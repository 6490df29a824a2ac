"""Whether the server lives, is ready, and how it does: for those who look after it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.requests import Request as WebRequest
from starlette.responses import PlainTextResponse, Response

from miniflux.apps.serve.refusals import SOON, Answer
from miniflux.apps.serve.site import Site, site_of
from miniflux.service.jobs.database import GONE
from miniflux.service.jobs.workbench import BUCKETS

SEEN = 30.0  # seconds after whose last sign of life a worker counts as gone
STATES = ("waiting", "running", "done", "failed", "cancelled")
COUNTERS = {  # of the store: its name, what it is called here, and what it is
    "requests": ("jobs_asked", "Jobs that were asked for"),
    "cached": ("jobs_cached", "Jobs whose pictures were there already"),
    "begun": ("jobs_begun", "Times that a worker has begun a job"),
    "done": ("jobs_done", "Jobs that were drawn"),
    "failed": ("jobs_failed", "Jobs that could not be drawn"),
    "cancelled": ("jobs_cancelled", "Jobs that were stopped"),
    "again": ("jobs_again", "Jobs that went back into the line because their worker ended"),
    "pictures": ("pictures", "Pictures that were drawn"),
    "steps": ("steps", "Steps of pictures that were drawn"),
    "drawing": ("drawing_seconds", "Seconds of drawing, shared among the pictures of a batch"),
}


class Measures:
    """What `/metrics` tells: of the store, when it is asked; of HTTP, as it happens."""

    def __init__(self, site: Site) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(Stored(site))
        self.requests = Counter(
            "miniflux_http_requests", "Answers", ("method", "route", "status"), registry=self.registry
        )
        self.seconds = Histogram(
            "miniflux_http_seconds",
            "Seconds until an answer was complete",
            ("route",),
            registry=self.registry,
            buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600),
        )

    def seen(self, method: str, route: str, status: int, seconds: float) -> None:
        """A request was answered."""
        self.requests.labels(method, route, str(status)).inc()
        self.seconds.labels(route).observe(seconds)


class Stored(Collector):
    """What the store has counted, of all processes that share it."""

    def __init__(self, site: Site) -> None:
        self.site = site

    def describe(self) -> list[Metric]:
        """Nothing beforehand: registering must not ask the store."""
        return []

    def collect(self) -> Iterator[Metric]:
        store = self.site.store
        try:
            numbers, workers, line = store.numbers(), store.workers(), store.seconds_of_line()
        except GONE:
            yield _gauge("up", "Whether the database answers", 0)
            return
        yield _gauge("up", "Whether the database answers", 1)
        jobs = GaugeMetricFamily("miniflux_jobs", "Jobs in each state", labels=["state"])
        for state in STATES:
            jobs.add_metric([state], numbers.get(f"state {state}", 0))
        yield jobs
        yield _gauge("queue_length", "Jobs that wait", numbers.get("state waiting", 0))
        yield _gauge("queue_seconds", "Seconds that all who wait will take, one after the other", line)
        for name, (called, what) in COUNTERS.items():
            yield CounterMetricFamily(f"miniflux_{called}", what, value=numbers.get(name, 0))
        yield _waits(numbers)
        batches = CounterMetricFamily("miniflux_batches", "Batches by the pictures in them", labels=["pictures"])
        for name, value in sorted(numbers.items()):
            if name.startswith("batch "):
                batches.add_metric([name.removeprefix("batch ")], value)
        yield batches
        yield from _about(workers)


def _gauge(name: str, what: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"miniflux_{name}", what, value=value)


def _waits(numbers: dict[str, float]) -> Metric:
    """How long jobs have waited before they were begun."""
    buckets: list[tuple[str, float]] = []
    below = 0.0
    for bound in (*BUCKETS, "inf"):
        below += numbers.get(f"waits {bound}", 0)
        buckets.append(("+Inf" if bound == "inf" else str(float(bound)), below))
    found = HistogramMetricFamily("miniflux_wait_seconds", "Seconds in line")
    found.add_metric([], buckets, sum_value=numbers.get("waited", 0.0))  # pyright: ignore[reportArgumentType]
    return found


def _about(workers: list[dict[str, Any]]) -> Iterator[Metric]:
    """Every worker's own numbers: its memory, what of it models take, what it may take."""
    now = time.time()
    seen = GaugeMetricFamily("miniflux_worker_seen_seconds", "Since its last sign of life", labels=["worker"])
    about = GaugeMetricFamily("miniflux_worker", "What a worker tells of itself", labels=["worker", "what"])
    for worker in workers:
        seen.add_metric([worker["id"]], max(0.0, now - worker["seen"]))
        for what, value in sorted(worker["about"].items()):
            if isinstance(value, int | float):
                about.add_metric([worker["id"], what], value)
    yield seen
    yield about


def router() -> APIRouter:
    """The routes."""
    routes = APIRouter(tags=["health"])

    @routes.get("/healthz", response_class=PlainTextResponse)
    async def healthz() -> str:
        """The process lives."""
        return "ok\n"

    @routes.get("/readyz", responses={503: {"description": "The database does not answer, or no worker lives."}})
    def readyz(web: WebRequest) -> Response:
        """The database answers, and a worker was seen a short time ago."""
        try:
            workers = site_of(web).store.workers()
        except GONE:
            return _unready("the database does not answer")
        alive = [worker for worker in workers if time.time() - worker["seen"] < SEEN]
        return Answer({"ready": True, "workers": len(alive)}) if alive else _unready("no worker lives")

    @routes.get("/metrics", response_class=PlainTextResponse)
    def metrics(web: WebRequest) -> Response:
        """For Prometheus."""
        measures: Any = web.app.state.measures
        return Response(generate_latest(measures.registry), media_type=CONTENT_TYPE_LATEST)

    return routes


def _unready(why: str) -> Response:
    return Answer({"ready": False, "detail": why}, 503, {"Retry-After": str(SOON)})
