"""`python -m miniflux` is the command `miniflux`."""

import sys

from miniflux.apps.cli import main

sys.exit(main())
