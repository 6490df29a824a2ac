"""What a server needs, whatever it speaks: a queue, a history, models that come and go, batches and grids.

No code of the web is in here: the page and later an HTTP server parse, call these, and show.
"""

from miniflux.service.catalogue import Catalogue, Listed
from miniflux.service.given import Given
from miniflux.service.grids import Axis, Grid, batch, parse_prompts
from miniflux.service.history import Entry, History, new_session
from miniflux.service.models import Models
from miniflux.service.queue import Cost, Job, Queue, Status
from miniflux.service.together import kin

__all__ = [
    "Axis",
    "Catalogue",
    "Cost",
    "Entry",
    "Given",
    "Grid",
    "History",
    "Job",
    "Listed",
    "Models",
    "Queue",
    "Status",
    "batch",
    "kin",
    "new_session",
    "parse_prompts",
]
