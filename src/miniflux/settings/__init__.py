"""What makes a picture, as a record: checked, written into files, read back from them and from those of others."""

from miniflux.settings.reading import Reading, read_picture
from miniflux.settings.record import FileFact, Record, Sheet
from miniflux.settings.request import AtLevels, LoraUse, Request
from miniflux.settings.steered import ConditionUse

__all__ = ["AtLevels", "ConditionUse", "FileFact", "LoraUse", "Reading", "Record", "Request", "Sheet", "read_picture"]
