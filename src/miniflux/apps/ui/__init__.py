"""The page: FLUX with LoRAs, sliders, a queue, a cache and a history. It only parses, calls and shows.

    miniflux ui

What it calls: `miniflux.service` (queue, history, models), `miniflux.settings` (requests, pictures), `miniflux.cache`.
"""

from miniflux.apps.ui.command import add

__all__ = ["add"]
