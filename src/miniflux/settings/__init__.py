"""What makes a picture, as a record: checked, written into files, read back from them and from those of others."""

from miniflux.settings.request import LoraUse, Request

__all__ = ["LoraUse", "Request"]
