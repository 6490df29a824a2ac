"""What the store holds: keys, jobs, their pictures and previews, workers, and counts.

Times are seconds since 1970; ids are random hexadecimal digits, so that nobody guesses that of another.
"""

from __future__ import annotations

from sqlalchemy import Boolean, Column, Float, Index, Integer, MetaData, String, Table, Text, UniqueConstraint

METADATA = MetaData()

KEYS = Table(
    "keys",
    METADATA,
    Column("id", String(32), primary_key=True),
    Column("name", String(200), nullable=False, unique=True),
    Column("digest", String(64), nullable=False, unique=True),  # SHA-256 of the key, which itself is kept nowhere
    Column("per_day", Integer),  # pictures; None for no bound
    Column("per_minute", Integer),  # requests; None for no bound
    Column("priority", Integer, nullable=False),
    Column("created", Float, nullable=False),
)

JOBS = Table(
    "jobs",
    METADATA,
    Column("id", String(32), primary_key=True),
    Column("key", String(32), nullable=False),  # empty where the server asks for none
    Column("once", String(200)),  # the client's own name of the request: the same one again is the same job
    Column("request", Text, nullable=False),  # `Request` as JSON
    Column("kin", String(64), nullable=False),  # jobs of one kin may be drawn in one batch
    Column("identity", String(64)),  # what makes its pictures, weights included; None where it may not be shared
    Column("output", Text, nullable=False),  # how the pictures are written, and what else the answer repeats, as JSON
    Column("pictures", Integer, nullable=False),
    Column("previews", Integer, nullable=False),  # kept of each picture
    Column("charged", Integer, nullable=False),  # pictures that count against the quota of its key
    Column("due", Float, nullable=False),  # its place in line: when it came, earlier by its priority
    Column("state", String(16), nullable=False),  # waiting, running, done, failed, cancelled
    Column("stopping", Boolean, nullable=False),
    Column("worker", String(32)),
    Column("tries", Integer, nullable=False),  # how often a worker has begun it
    Column("crashes", Integer, nullable=False),  # how many workers crashed while they had it
    Column("steps", Integer, nullable=False),  # of all its pictures
    Column("steps_done", Integer, nullable=False),
    Column("seconds", Float, nullable=False),  # that it may take once it runs
    Column("created", Float, nullable=False),
    Column("started", Float),
    Column("ended", Float),
    Column("cached", Boolean, nullable=False),
    Column("error_kind", String(16)),  # input, memory, time, fault
    Column("error", Text),
    Column("webhook", Text),
    Column("webhook_secret", Text),
    Column("webhook_tries", Integer, nullable=False),
    Column("webhook_due", Float),  # when to tell it next; None where there is nothing to tell
    UniqueConstraint("key", "once"),
    Index("jobs_in_line", "state", "due"),
    Index("jobs_of_a_key", "key", "created"),
    Index("jobs_alike", "identity", "state"),
    Index("jobs_to_tell", "webhook_due"),
)

PICTURES = Table(
    "pictures",
    METADATA,
    Column("job", String(32), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("blob", String(80), nullable=False),
    Column("bytes", Integer, nullable=False),
    Column("width", Integer, nullable=False),
    Column("height", Integer, nullable=False),
    Column("seed", Text, nullable=False),  # up to 2^64 - 1, more than a column of integers holds
    Column("made", Float, nullable=False),
    Index("pictures_of_a_blob", "blob"),
)

PREVIEWS = Table(
    "previews",
    METADATA,
    Column("job", String(32), primary_key=True),
    Column("number", Integer, primary_key=True),  # of the picture
    Column("step", Integer, primary_key=True),
    Column("blob", String(80), nullable=False),
)

WORKERS = Table(
    "workers",
    METADATA,
    Column("id", String(32), primary_key=True),
    Column("host", String(200), nullable=False),
    Column("pid", Integer, nullable=False),
    Column("started", Float, nullable=False),
    Column("seen", Float, nullable=False),
    Column("about", Text, nullable=False),  # models and memory, as JSON
)

PACES = Table(
    "paces",
    METADATA,
    Column("kin", String(64), primary_key=True),
    Column("seconds", Float, nullable=False),  # per picture, a running mean
)

COUNTS = Table(
    "counts",
    METADATA,
    Column("name", String(80), primary_key=True),
    Column("value", Float, nullable=False),
)
