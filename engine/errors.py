"""Errors that a user reads. Each message is one clear sentence: what happened and what to do.

Everything raised on purpose by the engine derives from :class:`SlipstreamError`; the app shows
``str(error)`` and writes the traceback to the log.
"""

from __future__ import annotations


class SlipstreamError(Exception):
    """Base of all errors meant for the user."""


class InvalidRequestError(SlipstreamError):
    """A request asks for something impossible: a negative temperature, a prompt over the context."""


class ModelFileError(SlipstreamError):
    """A model file is missing, truncated, corrupt, or of a kind that is never loaded (pickles)."""


class UnsupportedModelError(SlipstreamError):
    """The architecture, tensor type or weight format cannot be run here."""


class DownloadError(SlipstreamError):
    """A download could not be completed; what has arrived is kept for the next try."""


class OutOfMemoryError(SlipstreamError):
    """The model or its cache does not fit into the memory at hand."""


class AdapterError(SlipstreamError):
    """An adapter file is damaged or belongs to another model."""


class ExpertStoreError(SlipstreamError):
    """The file with a model's experts is missing, damaged or cannot be read."""
