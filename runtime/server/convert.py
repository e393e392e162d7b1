"""The contract's messages to the runtime's types, and back."""

import dataclasses

from runtime.errors import InvalidArgument
from runtime.server.pipeline import Completion, Resume
from runtime.server.reply import Final, Piece
from runtime.types import EngineInfo, FinishReason, Load, SamplingParams
from tramontane.v1 import generate_pb2, inference_service_pb2, sampling_pb2, score_pb2

FINISH_REASONS = {
    FinishReason.STOP: generate_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: generate_pb2.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: generate_pb2.FINISH_REASON_CANCELLED,
    FinishReason.DEADLINE: generate_pb2.FINISH_REASON_DEADLINE,
    FinishReason.ERROR: generate_pb2.FINISH_REASON_ERROR,
    FinishReason.FAILED: generate_pb2.FINISH_REASON_ERROR,
}

_SAMPLING_FIELDS = frozenset(field.name for field in dataclasses.fields(SamplingParams))


def completion(request: generate_pb2.GenerateRequest, request_id: str, deadline: float | None) -> Completion:
    """`deadline`: seconds that remain. Raises InvalidArgument where no prompt was sent."""
    form = request.WhichOneof("prompt")
    if form is None:
        raise InvalidArgument("prompt", "send one of text, token_ids and messages")
    return Completion(
        request_id=request_id,
        text=request.text if form == "text" else None,
        token_ids=request.token_ids.ids if form == "token_ids" else None,
        messages=messages(request.messages) if form == "messages" else None,
        params=sampling(request.sampling),
        deadline=deadline,
        priority=request.priority,
        cache_salt=request.cache_salt,
        n=request.n if request.HasField("n") else 1,
        resume=_resume(request.resume) if request.HasField("resume") else None,
    )


def _resume(resume: generate_pb2.Resume) -> Resume:
    return Resume(
        choices=tuple(tuple(choice.ids) for choice in resume.choices),
        numerics=resume.numerics,
        seed=resume.seed if resume.HasField("seed") else None,
        prompt_digest=resume.prompt_digest,
        max_tokens=resume.max_tokens,
    )


def messages(conversation: generate_pb2.ChatMessages) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in conversation.messages]


def sampling(params: sampling_pb2.SamplingParams) -> SamplingParams:
    """Fields that were not sent keep SamplingParams' own defaults."""
    sent = {field.name: value for field, value in params.ListFields()}
    # Maps have no order of their own, and the runtime's types are immutable.
    sent["logit_bias"] = tuple(sorted(params.logit_bias.items()))
    sent["stop"] = tuple(params.stop)
    sent["stop_token_ids"] = tuple(params.stop_token_ids)
    return SamplingParams(**sent)


def contract_field(error: InvalidArgument) -> InvalidArgument:
    """The error with its field as a path in GenerateRequest: sampling parameters lie in `sampling`."""
    name = error.field.split("[", 1)[0]
    return InvalidArgument(f"sampling.{error.field}", error.reason) if name in _SAMPLING_FIELDS else error


def response(piece: Piece, request_id: str, model: str) -> generate_pb2.GenerateResponse:
    message = generate_pb2.GenerateResponse(text=piece.text, token_ids=piece.token_ids, choice=piece.choice)
    for entry in piece.logprobs:
        logprobs = message.logprobs.add(logprob=entry.logprob)
        for candidate in entry.top:
            logprobs.top.add(token_id=candidate.token, logprob=candidate.logprob)
    if (begun := piece.begun) is not None:
        message.begin.seed = begun.seed
        message.begin.numerics = begun.numerics
        message.begin.prompt_digest = begun.prompt_digest
        message.begin.max_tokens = begun.max_tokens
        message.begin.request_id = request_id
        message.begin.model = model
    if piece.final is not None:
        message.finish.CopyFrom(_finish(piece.final, request_id, model))
    return message


def scoring(request: score_pb2.ScoreRequest, request_id: str, deadline: float | None) -> Completion:
    """`deadline`: seconds that remain. Raises InvalidArgument where no prompt was sent."""
    form = request.WhichOneof("prompt")
    if form is None:
        raise InvalidArgument("prompt", "send one of text and token_ids")
    return Completion(
        request_id=request_id,
        text=request.text if form == "text" else None,
        token_ids=request.token_ids.ids if form == "token_ids" else None,
        params=SamplingParams(logprobs=request.top),
        deadline=deadline,
        priority=request.priority,
        cache_salt=request.cache_salt,
    )


def score_response(piece: Piece, request_id: str, model: str) -> score_pb2.ScoreResponse:
    """A stream that is cut off has no finish: its status says why."""
    message = score_pb2.ScoreResponse()
    for token, entry in zip(piece.token_ids, piece.logprobs, strict=True):
        scored = message.tokens.add(token_id=token, logprob=entry.logprob)
        for candidate in entry.top:
            scored.top.add(token_id=candidate.token, logprob=candidate.logprob)
    if piece.final is not None and piece.final.finish_reason is FinishReason.LENGTH:
        message.finish.usage.prompt_tokens = piece.final.prompt_tokens
        message.finish.usage.cached_tokens = piece.final.cached_tokens
        message.finish.numerics = piece.final.numerics
        message.finish.request_id = request_id
        message.finish.model = model
    return message


def _finish(final: Final, request_id: str, model: str) -> generate_pb2.Finish:
    return generate_pb2.Finish(
        reason=FINISH_REASONS[final.finish_reason],
        stop_string=final.matched_stop,
        stop_token_id=final.stop_token,
        usage=generate_pb2.Usage(
            prompt_tokens=final.prompt_tokens,
            cached_tokens=final.cached_tokens,
            completion_tokens=final.completion_tokens,
            drafted_tokens=final.drafted_tokens,
            accepted_tokens=final.accepted_tokens,
        ),
        seed=final.seed,
        numerics=final.numerics,
        detail=final.detail,
        request_id=request_id,
        model=model,
    )


def model(info: EngineInfo, bos_id: int | None, eos_ids: tuple[int, ...]) -> inference_service_pb2.Model:
    return inference_service_pb2.Model(
        name=info.model,
        numerics=info.numerics,
        context_length=info.context_length,
        vocab_size=info.vocab_size,
        bos_token_id=bos_id,
        eos_token_ids=eos_ids,
        tp=info.tp,
        units=info.units,
        block_size=info.block_size,
        total_blocks=info.total_blocks,
        max_num_seqs=info.max_num_seqs,
        rank_nodes=info.rank_nodes,
        pp=info.pp,
    )


def load(load: Load, open_streams: int) -> inference_service_pb2.GetLoadResponse:
    return inference_service_pb2.GetLoadResponse(**dataclasses.asdict(load), open_streams=open_streams)
