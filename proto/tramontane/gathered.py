"""A reply as its messages come in, over as many calls as it takes. Makes no calls."""

from __future__ import annotations

from tramontane import messages as make
from tramontane.errors import Error
from tramontane.types import (
    Candidate,
    Choice,
    Chunk,
    FinishReason,
    Reply,
    Resume,
    Score,
    ScoredToken,
    TokenLogprobs,
    Usage,
)
from tramontane.v1 import generate_pb2, score_pb2

_REASONS = {
    generate_pb2.FINISH_REASON_STOP: FinishReason.STOP,
    generate_pb2.FINISH_REASON_LENGTH: FinishReason.LENGTH,
    generate_pb2.FINISH_REASON_CANCELLED: FinishReason.CANCELLED,
    generate_pb2.FINISH_REASON_DEADLINE: FinishReason.DEADLINE,
    generate_pb2.FINISH_REASON_ERROR: FinishReason.ERROR,
}
_COMPLETE = (generate_pb2.FINISH_REASON_STOP, generate_pb2.FINISH_REASON_LENGTH)


class Gathered:
    """All that came in answer to a request."""

    def __init__(self, request: generate_pb2.GenerateRequest):
        self._request = request
        # Nothing is held a choice before it has come: the server may refuse this many.
        self._n = max(1, request.n)
        self._chunks: dict[int, list[Chunk]] = {}
        self._finishes: dict[int, generate_pb2.Finish] = {}
        self._begin: generate_pb2.Begin | None = None
        # What came before the first call: the user's own, where the request brought tokens itself.
        self._before = [tuple(choice.ids) for choice in request.resume.choices[: self._n]]

    def add(self, message: generate_pb2.GenerateResponse) -> Chunk | None:
        """Take in the next message. None where it brings nothing: a stream that is taken up again begins with
        the last message, text and all, of each choice that has ended, and this one has come before. Raises
        Error for a choice that was not asked for."""
        if message.choice >= self._n:
            raise Error(f"the server sent choice {message.choice} of a reply with {self._n}")
        if self._ended(message.choice):
            return None
        logprobs = tuple(
            TokenLogprobs(entry.logprob, tuple(Candidate(top.token_id, top.logprob) for top in entry.top))
            for entry in message.logprobs
        )
        chunk = Chunk(message.text, tuple(message.token_ids), logprobs, message.choice)
        if message.HasField("begin"):
            self._begin = message.begin
        self._chunks.setdefault(message.choice, []).append(chunk)
        if message.HasField("finish"):
            self._finishes[message.choice] = message.finish
        return chunk

    def advances(self, message: generate_pb2.GenerateResponse) -> bool:
        """Whether a message that is not added yet brings the reply further: it has tokens, or ends a choice
        other than by failing, and does not say again how one ended."""
        news = bool(message.token_ids) or message.finish.reason in _COMPLETE
        return news and not self._ended(message.choice)

    @property
    def whole(self) -> bool:
        """Whether nothing is missing but the stream's status."""
        return len(self._finishes) == self._n and all(map(self._ended, self._finishes))

    def _ended(self, choice: int) -> bool:
        """Whether all of a choice has come; one that was cut off can go on."""
        finish = self._finishes.get(choice)
        return finish is not None and finish.reason in _COMPLETE

    def resume(self) -> Resume | None:
        """What asks for the rest; None where nothing has come that must be kept."""
        if self._begin is None:
            return None
        tokens = [self._before[i] if i < len(self._before) else () for i in range(self._n)]
        for choice, chunks in self._chunks.items():
            tokens[choice] += tuple(token for chunk in chunks for token in chunk.token_ids)
        begin = self._begin
        return Resume(tuple(tokens), begin.numerics, begin.seed, begin.prompt_digest, begin.max_tokens)

    def request(self) -> generate_pb2.GenerateRequest:
        """The request for what has not come yet."""
        resume = self.resume()
        if resume is None:
            return self._request
        request = generate_pb2.GenerateRequest()
        request.CopyFrom(self._request)
        make.fill_resume(request, resume)
        return request

    def reply(self, resumed: int) -> Reply | None:
        """The whole reply, None where the last message of a choice has not come."""
        if len(self._finishes) < self._n:
            return None
        choices = tuple(self._choice(self._chunks[i], self._finishes[i]) for i in range(self._n))
        finish, first = self._finishes[0], choices[0]
        return Reply(
            text=first.text,
            token_ids=first.token_ids,
            logprobs=first.logprobs,
            finish_reason=first.finish_reason,
            stop_string=first.stop_string,
            stop_token_id=first.stop_token_id,
            usage=Usage(
                finish.usage.prompt_tokens,
                finish.usage.cached_tokens,
                sum(choice.completion_tokens for choice in choices),
                sum(finish.usage.drafted_tokens for finish in self._finishes.values()),
                sum(finish.usage.accepted_tokens for finish in self._finishes.values()),
            ),
            seed=finish.seed,
            numerics=finish.numerics,
            model=finish.model,
            request_id=finish.request_id,
            choices=choices,
            resumed=resumed,
            max_tokens=0 if self._begin is None else self._begin.max_tokens,
        )

    @staticmethod
    def _choice(chunks: list[Chunk], finish: generate_pb2.Finish) -> Choice:
        matched = finish.WhichOneof("matched_stop")
        return Choice(
            text="".join(chunk.text for chunk in chunks),
            token_ids=tuple(token for chunk in chunks for token in chunk.token_ids),
            logprobs=tuple(entry for chunk in chunks for entry in chunk.logprobs),
            finish_reason=_REASONS[finish.reason],
            stop_string=finish.stop_string if matched == "stop_string" else None,
            stop_token_id=finish.stop_token_id if matched == "stop_token_id" else None,
            completion_tokens=finish.usage.completion_tokens,
        )


class GatheredScore:
    """The tokens of a text that is scored, as their messages come in."""

    def __init__(self) -> None:
        self._tokens: list[ScoredToken] = []
        self._finish: score_pb2.ScoreFinish | None = None

    def add(self, message: score_pb2.ScoreResponse) -> None:
        for entry in message.tokens:
            top = tuple(Candidate(each.token_id, each.logprob) for each in entry.top)
            logprob = entry.logprob if entry.HasField("logprob") else None
            self._tokens.append(ScoredToken(entry.token_id, logprob, top))
        if message.HasField("finish"):
            self._finish = message.finish

    def score(self) -> Score:
        """All of it. Raises Error where the last message has not come."""
        if self._finish is None:
            raise Error("the server ended the stream without its last message")
        finish = self._finish
        return Score(tuple(self._tokens), finish.numerics, finish.model, finish.request_id)
