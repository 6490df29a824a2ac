"""What the service costs: memory over 300 pictures, 64 requests of 8 sessions, cached answers, previews."""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from miniflux.cache import ResultCache
from miniflux.result import Result
from miniflux.sampling import Moment
from miniflux.service import History, Job, Models, Queue, new_session
from miniflux.settings import LoraUse, Request

SMALL = {"model": "nano-schnell", "width": 64, "height": 64, "steps": 2}


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def memory(folder: Path, pictures: int) -> None:
    """Growth over so many pictures, after ten to warm up; prompts, LoRA strengths and seeds all differ."""
    models, history = Models(cache=ResultCache(folder / "cache", max_bytes=2_000_000)), History(folder, per_session=20)
    with Queue(models.draw, models.cost, deliver=history.deliver, answer=models.answer) as queue:
        session, start, seen = new_session(), 0, list[int]()
        began = time.perf_counter()
        for i in range(pictures + 10):
            lora = (LoraUse("realism", 0.1 * (i % 7)),) if i % 2 else ()
            job = queue.submit(session, Request(prompt=f"star number {i}", seed=i, loras=lora, **SMALL))
            while not job.wait(0.005):
                job.preview()
            job.results()
            if i == 9:
                gc.collect()
                start, began = resident_bytes(), time.perf_counter()
            seen.append(resident_bytes())
        seconds = time.perf_counter() - began
        gc.collect()
    grown, most = resident_bytes() - start, max(seen[10:]) - start
    print(f"memory over {pictures} pictures: {grown / 1e6:+.1f} MB at the end, {most / 1e6:+.1f} MB at most", end="; ")
    print(f"{1000 * seconds / pictures:.0f} ms each")


def order(folder: Path) -> None:
    """64 requests from 8 threads: what came out."""
    models, history = Models(), History(folder)
    delivered: list[tuple[str, int]] = []

    def deliver(job: Job, which: int, result: Result) -> None:
        history.deliver(job, which, result)
        delivered.append((job.session, result.settings[0]["seed"]))

    with Queue(models.draw, models.cost, deliver=deliver) as queue:
        sessions = [new_session() for _ in range(8)]

        def ask(number: int) -> list[Job]:
            base = 100 * number
            return [queue.submit(sessions[number], Request(prompt="a star", seed=base + i, **SMALL)) for i in range(8)]

        with ThreadPoolExecutor(8) as pool:
            jobs = [job for run in [pool.submit(ask, n) for n in range(8)] for job in run.result()]
        results = [job.results() for job in jobs]
    right = sum(one.settings[0]["seed"] == job.requests[0].seed for job, (one,) in zip(jobs, results, strict=True))
    kept = sum(len(history.listed(session)) for session in sessions)
    each = {session: [seed for who, seed in delivered if who == session] for session in sessions}
    ordered = all(seeds == sorted(seeds) for seeds in each.values())
    print(f"64 requests of 8 sessions: {right} answered with their own picture, {len(delivered)} delivered, ", end="")
    print(f"{len(set(delivered))} different, {kept} in the history; in order: {ordered}")


def answers(folder: Path) -> None:
    """A repeated request, from submitting it to having its result in the history."""
    print(f"{'cached answers':<24} {'drawn ms':>9} {'cached ms':>10}")
    for where, cache in (("memory", ResultCache()), ("folder", ResultCache(folder / "cache"))):
        models, history = Models(cache=cache), History(folder)
        with Queue(models.draw, models.cost, deliver=history.deliver, answer=models.answer) as queue:
            for size in (64, 256):
                request = Request(prompt="a star", **{**SMALL, "width": size, "height": size, "steps": 1})
                times: list[float] = []
                for _ in range(4):
                    start = time.perf_counter()
                    queue.submit(new_session(), request).results()
                    times.append(1000 * (time.perf_counter() - start))
                print(f"{where + f', {size}x{size}':<24} {times[0]:9.1f} {sorted(times[1:])[1]:10.1f}")


def previews() -> None:
    """One preview against one step."""
    models = Models()
    with models.use(Request(prompt="a star", **SMALL)) as pipe:
        moments: list[tuple[float, Moment]] = []  # with the seconds of this process, since the machine may be shared
        pipe.generate(
            "a star", width=128, height=128, steps=8, watch=lambda _, m: moments.append((time.process_time(), m))
        )
        step = (moments[-1][0] - moments[0][0]) / (len(moments) - 1)
        start = time.process_time()
        for _, moment in moments:
            pipe.preview(moment, 128, 128, "table")
        preview = (time.process_time() - start) / len(moments)
    print(f"a preview of nano at 128x128: {1000 * preview:.2f} ms, {100 * preview / step:.1f} % of a step")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=300)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        memory(Path(folder) / "memory", options.pictures)
        order(Path(folder) / "order")
        answers(Path(folder) / "answers")
        previews()


if __name__ == "__main__":
    main()
