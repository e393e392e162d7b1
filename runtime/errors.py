"""The errors a user can cause or must act on. Each one reads as one line and says what to do.

The command line prints `str(error)` and exits non-zero; the gateway maps the classes to gRPC statuses.
Anything that is not one of these is a defect and shows its traceback. Knows nothing of gRPC.
"""


class TramontaneError(Exception):
    """Base of every error that is meant for a person to read."""

    def __reduce__(self):
        # Ray carries errors out of actors; the default would call the class with the finished message.
        return _restore, (type(self), str(self), self.__dict__)


def _restore(kind: type[TramontaneError], message: str, fields: dict) -> TramontaneError:
    error = kind.__new__(kind)
    Exception.__init__(error, message)
    error.__dict__.update(fields)
    return error


class InvalidArgument(TramontaneError):
    """A request's field has a value that cannot be served."""

    def __init__(self, field: str, reason: str):
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason


class NotFound(TramontaneError):
    """A model, file or resource that was named does not exist."""

    def __init__(self, kind: str, name: str, hint: str = ""):
        super().__init__(f"{kind} {name!r} not found" + (f": {hint}" if hint else ""))
        self.kind = kind
        self.name = name


class BadModelFile(TramontaneError):
    """A model file cannot be trusted. `where` is the tensor or metadata key at fault, if one is."""

    def __init__(self, file: str, where: str, reason: str):
        super().__init__(f"{file}: {where}: {reason}" if where else f"{file}: {reason}")
        self.file = str(file)
        self.where = where
        self.reason = reason


class UnsupportedModel(TramontaneError):
    """The file is sound, but this runtime does not serve what it holds."""


class QueueFull(TramontaneError):
    """Admission refused; trying again after `retry_after` seconds may succeed."""

    def __init__(self, retry_after: float, reason: str = "the queue is full"):
        super().__init__(f"{reason}; retry in {retry_after:.1f} s")
        self.retry_after = retry_after


class Unavailable(TramontaneError):
    """The engine is draining, gone or not ready."""


class ModelFailed(TramontaneError):
    """A model gives no number to choose a token by: the same request fails the same way everywhere."""


class NotEnough(TramontaneError):
    """Memory, ranks, GPUs or ports are too few for what was asked."""
