"""Jobs in the database: nothing lost, nothing doubled, quotas right; the same on SQLite and PostgreSQL."""

from __future__ import annotations

import random
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import text, update

from miniflux.errors import InputError, MissingExtraError, QueueFullError, QuotaError
from miniflux.service.jobs import keys, workbench
from miniflux.service.jobs import store as stores
from miniflux.service.jobs.database import GONE, Database, sqlite_url
from miniflux.service.jobs.migrations import migrate
from miniflux.service.jobs.records import Bounds, Picture, Shown, Wanted
from miniflux.service.jobs.store import Store
from miniflux.service.jobs.tables import JOBS, METADATA
from miniflux.service.jobs.workbench import Workbench
from miniflux.settings import Request

BLOB = "0" * 64 + ".png"


def wanted(prompt: str = "a red circle", images: int = 1, **more: Any) -> Wanted:
    return Wanted(request=Request(prompt=prompt, images=images), **{"kin": "k", "steps": 4 * images} | more)


def picture(number: int = 0, seed: int = 0) -> Picture:
    return Picture(number=number, blob=BLOB, bytes=9, width=64, height=64, seed=seed)


def finished(bench: Workbench, id: str, worker: str, pictures: list[Picture], seconds: float) -> bool:
    return bench.finish(worker, {id: pictures}, seconds) == {id}


def later(store: Store, id: str, seconds: float) -> None:
    """As if a job had been asked for so much earlier."""
    with store.writing() as c:
        c.execute(
            update(JOBS).where(JOBS.c.id == id).values(created=JOBS.c.created - seconds, ended=JOBS.c.ended - seconds)
        )


def test_tables_are_what_the_migrations_make(store: Store) -> None:
    with store.reading() as c:
        assert not compare_metadata(MigrationContext.configure(c), METADATA)
    migrate(store)  # again: nothing happens


def test_first_in_first_out_and_each_once(store: Store, bench: Workbench) -> None:
    asked = [store.submit(wanted(f"{i}")).id for i in range(5)]
    assert [store.place(store.job(id)) for id in asked] == [1, 2, 3, 4, 5]  # type: ignore[arg-type]
    taken = [bench.claim("w") for _ in range(6)]
    assert [job and job.id for job in taken] == [*asked, None]
    assert all(job.state == "running" and job.worker == "w" and job.tries == 1 for job in taken if job)


def test_a_finished_job(store: Store, bench: Workbench) -> None:
    id = store.submit(wanted("ünïcode \U0001f600", images=2, output={"format": "png"})).id
    job = bench.claim("w")
    assert job is not None and job.request.prompt == "ünïcode \U0001f600" and job.output == {"format": "png"}
    bench.advance("w", {id: 3}, [(id, Shown(number=0, step=2, blob=BLOB))])
    bench.advance("w", {id: 5}, [(id, Shown(number=0, step=2, blob=BLOB))])  # told twice
    assert store.moved([id]) == {id: ("running", 5, 1)}
    made = [picture(0, seed=2**64 - 2), picture(1, seed=2**64 - 1)]
    assert finished(bench, id, "w", made, 1.0)
    assert store.pictures(id) == made and store.moved([id, "none"]) == {id: ("done", 8, 1)}
    assert store.shown(id) == [Shown(number=0, step=2, blob=BLOB)]
    assert store.seconds_of_line() == 0
    store.submit(wanted(images=3))
    assert store.seconds_of_line() == pytest.approx(3 * 0.5)  # half a second for each picture of that batch


def test_a_worker_that_lost_a_job_changes_nothing(store: Store, bench: Workbench) -> None:
    id = store.submit(wanted()).id
    assert bench.claim("slow") and bench.put_back("slow") == 1
    assert bench.claim("quick")
    bench.advance("slow", {id: 3}, [(id, Shown(number=0, step=1, blob=BLOB))])
    assert store.moved([id]) == {id: ("running", 0, 0)}
    assert not finished(bench, id, "slow", [picture()], 1.0) and not bench.fail(id, "slow", "fault", "x")
    assert finished(bench, id, "quick", [picture()], 1.0) and not finished(bench, id, "quick", [picture()], 1.0)
    assert len(store.pictures(id)) == 1 and store.used("")[0] == 1


def test_a_batch_takes_those_that_follow_and_passes_nobody_by(store: Store, bench: Workbench) -> None:
    alike = [store.submit(wanted(f"{i}", images=1 + (i == 2))).id for i in range(3)]
    store.submit(wanted("other", kin="other"))
    store.submit(wanted("behind"))
    first = bench.claim("w")
    assert first is not None
    assert [job.id for job in bench.claim_alike("w", "k", 2)] == [alike[1]]  # the next has two pictures
    assert [job.id for job in bench.claim_alike("w", "k", 9)] == [alike[2]]  # behind it stands another kin
    assert bench.claim_alike("w", "k", 0) == []


def test_who_waits_long_enough_is_next(store: Store, bench: Workbench) -> None:
    old = store.submit(wanted("old"))
    with store.writing() as c:
        c.execute(update(JOBS).values(due=JOBS.c.due - 2.5 * stores.PRIORITY))
    usual, urgent = store.submit(wanted("usual")), store.submit(wanted("urgent", priority=2))
    assert store.place(usual) == 3
    assert [job.id for _ in range(3) if (job := bench.claim("w"))] == [old.id, urgent.id, usual.id]


def test_places_are_the_order_of_drawing(store: Store, bench: Workbench) -> None:
    """Also where two came at the same moment."""
    asked = [store.submit(wanted(f"{i}")) for i in range(6)]
    with store.writing() as c:
        c.execute(update(JOBS).values(due=1.0))
        c.execute(update(JOBS).where(JOBS.c.id.in_([job.id for job in asked[3:]])).values(created=2.0))
    places = {job.id: store.place(job) for job in asked}
    drawn = [job.id for _ in asked if (job := bench.claim("w"))]
    assert [places[id] for id in drawn] == [1, 2, 3, 4, 5, 6]


def test_many_workers_take_each_job_once(store: Store, url: str) -> None:
    asked = [store.submit(wanted(f"{i}", kin=str(i % 2))).id for i in range(40)]

    def work(worker: int) -> list[str]:
        bench, taken = Workbench(url), list[str]()
        while (job := bench.claim(str(worker))) is not None:
            jobs = [job, *bench.claim_alike(str(worker), job.kin, 2)]
            for one in jobs:
                assert finished(bench, one.id, str(worker), [picture()], 0.1)
            taken += [one.id for one in jobs]
        bench.close()
        return taken

    with ThreadPoolExecutor(4) as pool:
        taken = [id for part in pool.map(work, range(4)) for id in part]
    assert sorted(taken) == sorted(asked)
    assert store.numbers()["done"] == 40 and store.numbers()["pictures"] == 40


def test_cancelled_while_waiting_costs_nothing(store: Store, bench: Workbench) -> None:
    id = store.submit(wanted(webhook="http://x")).id
    store.cancel(id)
    store.cancel(id)  # again
    job = store.job(id)
    assert job is not None and job.state == "cancelled" and store.used("") == (0, 1)
    assert bench.claim("w") is None
    assert [told.id for told in store.to_tell()] == [id]


def test_cancelled_while_running(store: Store, bench: Workbench) -> None:
    id = store.submit(wanted()).id
    bench.claim("w")
    store.cancel(id)
    assert bench.told([id])[id].stopping
    assert bench.fail(id, "w", "cancelled", "cancelled")
    job = store.job(id)
    assert job is not None and job.state == "cancelled" and job.charged == 1  # it was begun
    store.cancel(id)
    assert store.job(id) == job


def test_failed_costs_nothing(store: Store, bench: Workbench) -> None:
    id = store.submit(wanted(images=4)).id
    bench.claim("w")
    assert bench.fail(id, "w", "memory", "too large")
    job = store.job(id)
    assert job is not None and (job.state, job.error_kind, job.error) == ("failed", "memory", "too large")
    assert store.used("")[0] == 0


def test_workers_that_end_give_back(store: Store, bench: Workbench) -> None:
    first, second, stopped = (store.submit(wanted(name)).id for name in "abc")
    for _ in range(3):
        bench.claim("w")
    bench.see("w", "here", 1, {"models": []})
    store.cancel(stopped)
    assert bench.put_back("w") == 2 and bench.put_back("w") == 0 and store.workers() == []
    assert store.job(stopped).state == "cancelled"  # type: ignore[union-attr]
    assert [job.id for _ in range(3) if (job := bench.claim("v"))] == [first, second]  # in their old places


def test_a_job_that_ends_workers_is_given_up(store: Store, bench: Workbench) -> None:
    id = store.submit(wanted()).id
    for i in range(workbench.CRASHES):
        assert bench.claim(f"w{i}") is not None
        bench.put_back(f"w{i}", crashed=True)
    job = store.job(id)
    assert job is not None and job.state == "failed" and "workers ended again" in (job.error or "") and not job.charged


def test_a_job_is_not_blamed_for_what_others_end(store: Store, bench: Workbench) -> None:
    id = store.submit(wanted()).id
    for _ in range(workbench.TRIES - 1):
        assert bench.claim("w") is not None
        assert bench.put_back("w") == 1
    assert store.job(id).state == "waiting"  # type: ignore[union-attr]
    bench.claim("w")
    assert bench.put_back("w") == 0 and store.job(id).state == "failed"  # type: ignore[union-attr]


def test_a_job_put_back_on_purpose_is_not_to_blame(store: Store, bench: Workbench) -> None:
    id = store.submit(wanted()).id
    for _ in range(2 * workbench.CRASHES):
        assert bench.claim("w") is not None
        assert bench.put_back("w", [id]) == 1
    assert store.job(id).tries == 0  # type: ignore[union-attr]


def test_silent_workers_are_lost(store: Store, bench: Workbench) -> None:
    bench.see("w", "here", 7, {"models": ["nano"]})
    assert bench.lost(60) == [] and bench.lost(-1) == ["w"]
    (about,) = store.workers()
    assert about["pid"] == 7 and about["about"] == {"models": ["nano"]}
    store.submit(wanted())
    bench.claim("never seen")
    assert set(bench.lost(-1)) == {"w", "never seen"}


def test_the_same_request_is_answered_from_what_is_there(store: Store, bench: Workbench) -> None:
    one = wanted(identity="x", webhook="http://x")
    id = store.submit(one).id
    assert store.submit(one).state == "waiting"  # nothing is there yet
    bench.claim("w")
    finished(bench, id, "w", [picture(seed=5)], 1.0)
    again = store.submit(one)
    assert again.state == "done" and again.cached and again.charged == 0 and again.steps_done == 4
    assert store.pictures(again.id) == [picture(seed=5)]
    assert {job.id for job in store.to_tell()} == {id, again.id}
    assert store.submit(replace(one, identity="y")).state == "waiting"
    store.forget_pictures(lambda name: True)
    assert store.pictures(id)
    store.forget_pictures(lambda name: False)
    assert store.pictures(id) == [] and store.submit(one).state == "waiting"  # they have expired


def test_a_request_of_the_same_name_is_the_same_job(store: Store) -> None:
    first = store.submit(wanted(once="mine", key="a"), Bounds(per_minute=1))
    assert store.submit(wanted(once="mine", key="a"), Bounds(per_minute=1)).id == first.id
    assert store.submit(wanted(once="mine", key="b")).id != first.id
    with pytest.raises(InputError, match="'mine' was given to another request"):
        store.submit(wanted("another", once="mine", key="a"))


def test_the_same_name_at_the_same_moment(store: Store) -> None:
    with ThreadPoolExecutor(8) as pool:
        ids = {job.id for job in pool.map(lambda _: store.submit(wanted(once="mine")), range(16))}
    assert len(ids) == 1


def test_a_full_line(store: Store, bench: Workbench) -> None:
    bounds = Bounds(waiting=2)
    for _ in range(2):
        store.submit(wanted(), bounds)
    with pytest.raises(QueueFullError, match=r"2 jobs wait, .* try again in about 2 s"):
        store.submit(wanted(), bounds)
    bench.claim("w")
    store.submit(wanted(), bounds)


def test_pictures_of_a_day(store: Store) -> None:
    keys.add(store, "me", per_day=5)
    (key,) = keys.listed(store)
    bounds = key.bounds(None)
    first = store.submit(wanted(images=3, key=key.id), bounds)
    with pytest.raises(QuotaError, match="5 pictures in a day") as refused:
        store.submit(wanted(images=3, key=key.id), bounds)
    assert 86_000 < refused.value.seconds <= 86_400
    store.submit(wanted(images=2, key=key.id), bounds)
    store.submit(wanted(images=2), Bounds(per_day=5))  # another's
    assert store.used(key.id) == (5, 2)
    later(store, first.id, 86_000)
    with pytest.raises(QuotaError) as refused:
        store.submit(wanted(key=key.id), bounds)
    assert refused.value.seconds < 401
    later(store, first.id, 500)
    store.submit(wanted(images=3, key=key.id), bounds)


def test_requests_of_a_minute(store: Store) -> None:
    bounds = Bounds(per_minute=2)
    first = store.submit(wanted(key="k"), bounds)
    store.submit(wanted(key="k"), bounds)
    with pytest.raises(QuotaError, match="2 requests in a minute") as refused:
        store.submit(wanted(key="k"), bounds)
    assert 50 < refused.value.seconds <= 60
    later(store, first.id, 61)
    store.submit(wanted(key="k"), bounds)


def test_two_at_once_do_not_both_take_the_last(store: Store) -> None:
    keys.add(store, "me", per_day=3)
    (key,) = keys.listed(store)

    def ask(i: int) -> bool:
        try:
            store.submit(wanted(f"{i}", key=key.id), key.bounds(None))
        except QuotaError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert Counter(pool.map(ask, range(12))) == {True: 3, False: 9}


def test_webhooks_are_due_until_told(store: Store, bench: Workbench) -> None:
    id = store.submit(wanted(webhook="http://x", webhook_secret="s")).id
    assert store.to_tell() == []
    bench.claim("w")
    finished(bench, id, "w", [picture()], 1.0)
    (job,) = store.to_tell(again=60)
    assert job.webhook == "http://x" and job.webhook_secret == "s" and store.to_tell() == []  # another tells it now
    store.was_told(id, again=-1)
    (job,) = store.to_tell()
    assert job.webhook_tries == 1
    store.was_told(id, again=None)
    assert store.to_tell() == []


def test_forgetting(store: Store, bench: Workbench) -> None:
    old, told, new = (store.submit(wanted(name, webhook="http://x" if name == "b" else None)).id for name in "abc")
    for id in (old, told):
        bench.claim("w")
        finished(bench, id, "w", [picture()], 1.0)
        later(store, id, 100_000)
    assert store.forget(3600) == 1  # the other is still to be told
    assert set(store.jobs([old, told, new])) == {told, new} and store.pictures(old) == []


def test_what_jobs_need(store: Store, bench: Workbench) -> None:
    digest = "a" * 64
    id = store.submit(Wanted(request=Request(prompt="x", image=digest, strength=0.5), kin="k", steps=4)).id
    assert store.needed() == {digest}
    bench.claim("w")
    assert store.needed() == {digest}
    finished(bench, id, "w", [picture()], 1.0)
    assert store.needed() == set()


def test_previews_are_wanted_later(store: Store, bench: Workbench) -> None:
    id = store.submit(wanted(previews=2)).id
    bench.claim("w")
    store.want_previews(id, 8)
    store.want_previews(id, 1)
    assert bench.told([id])[id].previews == 8
    finished(bench, id, "w", [picture()], 1.0)
    store.want_previews(id, 9)
    assert store.job(id).previews == 8  # type: ignore[union-attr]


def test_keys(store: Store) -> None:
    key = keys.add(store, "me", per_day=5, per_minute=2, priority=3)
    assert key.startswith(keys.PREFIX) and len(key) > 40 and keys.any_there(store)
    found = keys.known(store, key)
    assert found is not None and (found.name, found.per_day, found.per_minute, found.priority) == ("me", 5, 2, 3)
    for wrong in ("", key[:-1], key + "x", key.upper(), "x" * 10_000, "\udc80"):
        assert keys.known(store, wrong) is None
    with store.reading() as c:
        kept = str(c.execute(text("SELECT * FROM keys")).all())
    assert key not in kept and key.removeprefix(keys.PREFIX) not in kept
    keys.remove(store, "me")
    assert keys.known(store, key) is None and not keys.any_there(store)


@pytest.mark.parametrize("name", ["", " ", "x" * 201, "a\nb", "a\0b"])
def test_names_of_keys(store: Store, name: str) -> None:
    with pytest.raises(InputError):
        keys.add(store, name)


def test_keys_that_cannot_be(store: Store) -> None:
    keys.add(store, "me")
    with pytest.raises(InputError, match="there is a key of the name 'me'"):
        keys.add(store, "me")
    with pytest.raises(InputError, match="no key of the name 'you'"):
        keys.remove(store, "you")
    for wrong in ({"per_day": -1}, {"per_minute": -1}, {"priority": 11}, {"per_day": 2.5}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            keys.add(store, "other", **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("url", ["", "jobs.sqlite", "mysql://host/name", "http://host"])
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises((InputError, MissingExtraError)):
        Database(url)


def test_a_database_that_is_away_and_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "jobs.sqlite"
    store = Store(sqlite_url(path))
    with pytest.raises(GONE):
        store.submit(wanted())
    path.parent.mkdir()
    migrate(store)
    assert store.submit(wanted()).state == "waiting"


def test_random_lives(store: Store, bench: Workbench) -> None:
    """Whatever happens in whatever order: every job ends once, or waits, or runs; nobody pays twice."""
    rng, asked = random.Random(4), list[str]()
    for _ in range(150):
        act, worker = rng.randrange(7), f"w{rng.randrange(3)}"
        if act < 2:
            asked.append(store.submit(wanted(f"{len(asked)}", images=rng.randint(1, 3), key="k")).id)
        elif act == 2 and asked:
            store.cancel(rng.choice(asked))
        elif act == 3:
            bench.put_back(worker)
        elif (job := bench.claim(worker)) is not None and act < 6:
            finished(bench, job.id, worker, [picture(i) for i in range(job.pictures)], 0.1)
            assert not bench.fail(job.id, worker, "fault", "late")
    jobs = store.jobs(asked)
    assert len(jobs) == len(set(asked)) == len(asked)
    for job in jobs.values():
        assert len(store.pictures(job.id)) == (job.pictures if job.state == "done" else 0)
        assert job.charged in (0, job.pictures) and (job.charged or job.state in ("cancelled", "failed"))
    assert store.used("k")[0] == sum(job.charged for job in jobs.values())
    assert time.time() >= max(job.created for job in jobs.values())
