"""The first form of the tables."""

from alembic import op
from sqlalchemy import Boolean, Column, Float, Integer, String, Text, UniqueConstraint

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "keys",
        Column("id", String(32), primary_key=True),
        Column("name", String(200), nullable=False, unique=True),
        Column("digest", String(64), nullable=False, unique=True),
        Column("per_day", Integer),
        Column("per_minute", Integer),
        Column("priority", Integer, nullable=False),
        Column("created", Float, nullable=False),
    )
    op.create_table(
        "jobs",
        Column("id", String(32), primary_key=True),
        Column("key", String(32), nullable=False),
        Column("once", String(200)),
        Column("request", Text, nullable=False),
        Column("kin", String(64), nullable=False),
        Column("identity", String(64)),
        Column("output", Text, nullable=False),
        Column("pictures", Integer, nullable=False),
        Column("previews", Integer, nullable=False),
        Column("charged", Integer, nullable=False),
        Column("due", Float, nullable=False),
        Column("state", String(16), nullable=False),
        Column("stopping", Boolean, nullable=False),
        Column("worker", String(32)),
        Column("tries", Integer, nullable=False),
        Column("crashes", Integer, nullable=False),
        Column("steps", Integer, nullable=False),
        Column("steps_done", Integer, nullable=False),
        Column("seconds", Float, nullable=False),
        Column("created", Float, nullable=False),
        Column("started", Float),
        Column("ended", Float),
        Column("cached", Boolean, nullable=False),
        Column("error_kind", String(16)),
        Column("error", Text),
        Column("webhook", Text),
        Column("webhook_secret", Text),
        Column("webhook_tries", Integer, nullable=False),
        Column("webhook_due", Float),
        UniqueConstraint("key", "once"),
    )
    op.create_index("jobs_in_line", "jobs", ["state", "due"])
    op.create_index("jobs_of_a_key", "jobs", ["key", "created"])
    op.create_index("jobs_alike", "jobs", ["identity", "state"])
    op.create_index("jobs_to_tell", "jobs", ["webhook_due"])
    op.create_table(
        "pictures",
        Column("job", String(32), primary_key=True),
        Column("number", Integer, primary_key=True),
        Column("blob", String(80), nullable=False),
        Column("bytes", Integer, nullable=False),
        Column("width", Integer, nullable=False),
        Column("height", Integer, nullable=False),
        Column("seed", Text, nullable=False),
        Column("made", Float, nullable=False),
    )
    op.create_index("pictures_of_a_blob", "pictures", ["blob"])
    op.create_table(
        "previews",
        Column("job", String(32), primary_key=True),
        Column("number", Integer, primary_key=True),
        Column("step", Integer, primary_key=True),
        Column("blob", String(80), nullable=False),
    )
    op.create_table(
        "workers",
        Column("id", String(32), primary_key=True),
        Column("host", String(200), nullable=False),
        Column("pid", Integer, nullable=False),
        Column("started", Float, nullable=False),
        Column("seen", Float, nullable=False),
        Column("about", Text, nullable=False),
    )
    op.create_table(
        "paces",
        Column("kin", String(64), primary_key=True),
        Column("seconds", Float, nullable=False),
    )
    op.create_table(
        "counts",
        Column("name", String(80), primary_key=True),
        Column("value", Float, nullable=False),
    )


def downgrade() -> None:
    for name in ("counts", "paces", "workers", "previews", "pictures", "jobs", "keys"):
        op.drop_table(name)
