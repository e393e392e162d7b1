"""The messages that cross process borders, and their encoding.

A message is the msgpack array [kind, body]; the kind decides the body's type, and a body that does not have
that type is refused as a whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from runtime.errors import (
    InvalidArgument,
    NotEnough,
    NotFound,
    QueueFull,
    TramontaneError,
    Unavailable,
)
from runtime.types import (
    EngineInfo,
    Finished,
    FinishReason,
    Load,
    Request,
    ScoreOutput,
    StepPlan,
    StepResult,
    TokenOutput,
)

PROTOCOL = 4  # raised when a message changes its meaning


class WireError(TramontaneError):
    """A peer sent what is not a message, or hung up."""


@dataclass(frozen=True, slots=True)
class Hello:
    """The first message of every connection."""

    role: str  # "rank" (step channel), "peer" (between ranks) or "gateway"
    token: str  # the group's secret
    rank: int = -1
    protocol: int = PROTOCOL


@dataclass(frozen=True, slots=True)
class Abort:
    """Ends a request, or with `choice` one of its replies."""

    request_id: str
    reason: FinishReason
    keep: int | None = None
    choice: int | None = None


@dataclass(frozen=True, slots=True)
class Refused:
    """A request that was never admitted; `kind` names the error's class."""

    request_id: str
    kind: str
    detail: tuple[str, ...]  # the error's own arguments, as text


BODIES: dict[str, type] = {
    "hello": Hello,
    "welcome": EngineInfo,
    "plan": StepPlan,
    "result": StepResult,
    "beat": int,  # a rank is alive; the last step it finished
    "failed": str,  # why a rank stops
    "add": Request,
    "abort": Abort,
    "get_load": int,  # a number that the answer repeats
    "load": tuple[int, Load],
    "token": TokenOutput,
    "scored": ScoreOutput,
    "finished": Finished,
    "refused": Refused,
    "lost": str,  # the engine has lost its ranks
}

_ENCODER = msgspec.msgpack.Encoder()
_OUTER = msgspec.msgpack.Decoder(tuple[str, msgspec.Raw])
_DECODERS = {kind: msgspec.msgpack.Decoder(body) for kind, body in BODIES.items()}


def encode(kind: str, body: object) -> bytes:
    return _ENCODER.encode((kind, body))


def decode(frame: bytes | bytearray | memoryview) -> tuple[str, object]:
    """The kind and the typed body of a frame. Raises WireError for anything else."""
    try:
        kind, raw = _OUTER.decode(frame)
        return kind, _DECODERS[kind].decode(raw)
    except KeyError:
        raise WireError("a message of unknown kind arrived") from None
    except RecursionError:
        raise WireError("a message nested too deeply arrived") from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise WireError(f"a malformed message arrived: {error}") from None


def refusal(request_id: str, error: TramontaneError) -> Refused:
    """An error as a message, so that the gateway raises the same one."""
    match error:
        case QueueFull():
            return Refused(request_id, "QueueFull", (str(error.retry_after),))
        case InvalidArgument():
            return Refused(request_id, "InvalidArgument", (error.field, error.reason))
        case NotFound():
            return Refused(request_id, "NotFound", (error.kind, error.name))
        case NotEnough():
            return Refused(request_id, "NotEnough", (str(error),))
        case _:
            return Refused(request_id, "Unavailable", (str(error),))


def refusal_error(refused: Refused) -> TramontaneError:
    match refused.kind, refused.detail:
        case "QueueFull", (seconds,) if _is_delay(seconds):
            return QueueFull(float(seconds))
        case "InvalidArgument", (field, reason):
            return InvalidArgument(field, reason)
        case "NotFound", (kind, name):
            return NotFound(kind, name)
        case "NotEnough", (detail,):
            return NotEnough(detail)
        case _:
            return Unavailable(" ".join(refused.detail))


def _is_delay(text: str) -> bool:
    """Whether a peer's text is a number of seconds that one can wait."""
    try:
        return 0 <= float(text) < float("inf")
    except ValueError:
        return False
