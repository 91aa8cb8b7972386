"""What the streamed step refuses.

    StreamError             a request that cannot be met: shapes, a policy, a device
      Unsupported           a model feature that cannot be exact here
      StoreFull             the disk of the input store is full
"""


class StreamError(ValueError):
    """The request cannot be met; the message says what to change."""


class Unsupported(StreamError):
    """The model has a feature that the streamed step cannot reproduce exactly."""


class StoreFull(StreamError):
    """No space is left where layer inputs are kept; the file is gone by the time this is raised."""
