"""What can go wrong on purpose: the exception types a caller can catch.

Every one of them is a `ValueError`, so `except ValueError` is enough for a script; `MinifluxError`
tells our own refusals from those of the libraries underneath.
"""


class MinifluxError(ValueError):
    """The root of everything the library raises on purpose.

    Attributes:
        which: of several requests that are drawn together, the number of the one that it is about; None if it is about
            none or all of them.
    """

    which: int | None = None


class InputError(MinifluxError):
    """An argument is outside its range: a size, a number of steps, a seed, a device."""


class ConfigError(MinifluxError):
    """The fields of a network's config contradict each other."""


class CheckpointError(MinifluxError):
    """A file cannot be read, or its tensors are not those of the network it is loaded into."""


class WeightsNotFoundError(MinifluxError):
    """The files of a variant are not on this machine; the message says where they were looked for."""


class FetchError(MinifluxError):
    """A file could not be fetched: no network, no access, no room, or not the file that was announced."""


class TokenizerError(MinifluxError):
    """A tokenizer file is missing or is not of the expected kind."""


class OutputError(MinifluxError):
    """A result cannot be written where it was asked to be."""


class OutOfMemoryError(MinifluxError):
    """There is too little memory; the message says what it would take, and what would fit."""


class LoraError(MinifluxError):
    """A LoRA file is damaged, of no known dialect, made for another model, or would change nothing."""


class SettingsError(InputError):
    """Settings from a file or from another program are not what they should be; the message names the field."""


class ReplayError(MinifluxError):
    """A picture cannot be made again as it was; the message names what differs."""


class QueueFullError(MinifluxError):
    """More wait already than the queue takes; the message says how many, and when to try again."""


class QuotaError(MinifluxError):
    """A key has used what it may use for now; the message says how much that is, and when to try again.

    Attributes:
        seconds: until then.
    """

    def __init__(self, message: str, seconds: float) -> None:
        super().__init__(message)
        self.seconds = seconds


class CancelledError(MinifluxError):
    """Work was stopped because somebody asked for it."""


class MissingExtraError(MinifluxError):
    """An optional package is not installed; the message names the extra that brings it."""
