"""The client of Tramontane's gRPC API. Start at `Client` or `AsyncClient`; the contract is in v1/*.proto."""

from tramontane.client import AsyncClient, Client
from tramontane.errors import (
    Cancelled,
    DeadlineExceeded,
    Error,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    Unauthenticated,
    Unavailable,
)
from tramontane.secret_files import BadFile
from tramontane.streams import AsyncStream, Stream
from tramontane.types import (
    Candidate,
    Choice,
    Chunk,
    FinishReason,
    Load,
    Model,
    Reply,
    Resume,
    Score,
    ScoredToken,
    TokenLogprobs,
    Usage,
)

__all__ = [
    "AsyncClient",
    "AsyncStream",
    "BadFile",
    "Cancelled",
    "Candidate",
    "Choice",
    "Chunk",
    "Client",
    "DeadlineExceeded",
    "Error",
    "FinishReason",
    "InvalidRequest",
    "Load",
    "Model",
    "ModelNotFound",
    "Overloaded",
    "Reply",
    "Resume",
    "Score",
    "ScoredToken",
    "Stream",
    "TokenLogprobs",
    "Unauthenticated",
    "Unavailable",
    "Usage",
]
