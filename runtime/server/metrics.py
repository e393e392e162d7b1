"""What a server counts of itself, for Prometheus, in a registry of its own.

Calls, replies, tokens and times are counted as they pass; what the engine says of itself is read when someone
asks (engine_metrics.py). Every label's values are few and known beforehand: methods of the contract, gRPC's
statuses, reasons of finishing. Nothing that a user sends becomes a label. Names and units follow Prometheus'
practices: base units, `_total` for what only grows. docs/metrics.md lists them. Knows nothing of ports.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib import metadata

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info
from prometheus_client.exposition import choose_encoder

from runtime.server.engine_metrics import EngineCollector, Seen
from runtime.server.reply import Piece
from runtime.types import EngineInfo, FinishReason
from tramontane.v1 import inference_service_pb2

_SERVICE = inference_service_pb2.DESCRIPTOR.services_by_name["InferenceService"]
METHODS = tuple(method.name for method in _SERVICE.methods)
_OPENMETRICS = "application/openmetrics-text"
# Upper bounds in seconds. A first token waits for a queue and a prefill, a further one for a step.
_FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_BETWEEN_TOKENS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)
_REQUEST = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)


class Metrics:
    """The metrics of one server over one engine."""

    def __init__(self, info: EngineInfo, clock: Callable[[], float] = time.monotonic):
        """`clock`: seconds, from any beginning."""
        self._clock = clock
        self._registry = registry = CollectorRegistry()
        self._engine = EngineCollector(info.max_num_seqs)
        registry.register(self._engine)
        about = Info("tramontane_server", "What this server serves, and in which numbers.", registry=registry)
        about.info(
            {"model": info.model, "numerics": info.numerics, "tp": str(info.tp), "version": _version()}
        )
        self._ready = Gauge(
            "tramontane_ready", "1 while replies are admitted, as gRPC's health reports.", registry=registry
        )
        self._open_streams = Gauge("tramontane_open_streams", "Streams open now.", registry=registry)
        self._requests = Counter(
            "tramontane_requests", "Calls that ended, by gRPC status.", ["method", "code"], registry=registry
        )
        self._request_seconds = Histogram(
            "tramontane_request_duration_seconds",
            "From a call's arrival to its status.",
            ["method"],
            buckets=_REQUEST,
            registry=registry,
        )
        self._replies = Counter(
            "tramontane_replies",
            "Replies that began and ended; one a choice of Generate.",
            ["reason"],
            registry=registry,
        )
        self._prompt = Counter(
            "tramontane_prompt_tokens", "Prompt tokens of streams that came to an end.", registry=registry
        )
        self._cached = Counter(
            "tramontane_cached_prompt_tokens",
            "Of those prompt tokens, the ones whose KV came from the prefix cache.",
            registry=registry,
        )
        self._completion = Counter(
            "tramontane_completion_tokens", "Reply tokens made here, as they come.", registry=registry
        )
        self._resumed = Counter(
            "tramontane_resumed_streams", "Streams that went on after tokens they brought.", registry=registry
        )
        self._first_token = Histogram(
            "tramontane_time_to_first_token_seconds",
            "From a call's arrival to its first new token.",
            buckets=_FIRST_TOKEN,
            registry=registry,
        )
        self._between_tokens = Histogram(
            "tramontane_time_between_tokens_seconds",
            "Between two tokens of a reply, as they come from the engine.",
            buckets=_BETWEEN_TOKENS,
            registry=registry,
        )
        # A series that begins at its first count has no rate before its second.
        for method in METHODS:
            self._requests.labels(method, "OK")
            self._request_seconds.labels(method)
        for reason in FinishReason:
            self._replies.labels(reason.value)

    def call(self, path: str) -> Callable[[str], None]:
        """Begin to time a call of "/package.Service/Method"; what is returned takes its status's name at
        the end. Other services' calls are not counted."""
        service, _, method = path.removeprefix("/").partition("/")
        if service != _SERVICE.full_name or method not in METHODS:
            return _ignore
        started = self._clock()

        def ended(code: str) -> None:
            self._requests.labels(method, code).inc()
            self._request_seconds.labels(method).observe(self._clock() - started)

        return ended

    def stream(self, *, replies: bool, resumed: bool = False) -> StreamMeter:
        """Follow a stream from its arrival. `replies`: its tokens are replies', not a scored text's.
        `resumed`: it brings tokens that it goes on after."""
        return StreamMeter(self, replies, resumed)

    def render(self, seen: Seen, *, ready: bool, open_streams: int, accept: str = "") -> tuple[str, bytes]:
        """Content type and text of everything: OpenMetrics where an Accept header names it, else Prometheus'
        own text form."""
        self._engine.seen = seen
        self._ready.set(ready)
        self._open_streams.set(open_streams)
        form = _OPENMETRICS if _OPENMETRICS in accept else ""  # the rest of the header can be anything
        encode, content_type = choose_encoder(form)
        return content_type, encode(self._registry)


class StreamMeter:
    """Follows the pieces of one stream as they come from the engine."""

    def __init__(self, metrics: Metrics, replies: bool, resumed: bool):
        self._metrics = metrics
        self._replies = replies
        self._resumed = resumed  # and not counted yet
        self._started = metrics._clock()
        self._last: dict[int, float] = {}  # when a token came, by choice, of replies that go on
        self._begun = False
        self._finished = False

    def piece(self, piece: Piece) -> None:
        metrics = self._metrics
        if self._resumed:
            self._resumed = False
            metrics._resumed.inc()
        if self._replies and piece.token_ids:
            now = metrics._clock()
            if not self._begun:
                self._begun = True
                metrics._first_token.observe(now - self._started)
            elif piece.choice in self._last:
                metrics._between_tokens.observe(now - self._last[piece.choice])
            self._last[piece.choice] = now
            metrics._completion.inc(len(piece.token_ids))
        if piece.final is not None:
            self._last.pop(piece.choice, None)
            if self._replies:
                metrics._replies.labels(piece.final.finish_reason.value).inc()
            if not self._finished:  # all replies share the prompt
                self._finished = True
                metrics._prompt.inc(piece.final.prompt_tokens)
                metrics._cached.inc(piece.final.cached_tokens)

    def cut_off(self, reason: FinishReason) -> None:
        """The stream ended before its replies did."""
        for _ in self._last:
            self._metrics._replies.labels(reason.value).inc()
        self._last.clear()


def _ignore(code: str) -> None:
    pass


def _version() -> str:
    try:
        return metadata.version("tramontane")
    except metadata.PackageNotFoundError:  # a checkout on the path
        return "unknown"
