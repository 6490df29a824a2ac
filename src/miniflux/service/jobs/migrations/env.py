"""What Alembic runs: the migrations that are missing, within the transaction that `migrate` has begun."""

from alembic import context

from miniflux.service.jobs.tables import METADATA

context.configure(connection=context.config.attributes["connection"], target_metadata=METADATA)
context.run_migrations()
