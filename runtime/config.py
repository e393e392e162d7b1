"""Settings, a frozen dataclass a part. Standard library only; defaults are what a laptop wants."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Which weights, and in what numbers they are computed."""

    path: str
    name: str = ""  # served name; empty: the file's own
    quantize: str | None = None  # "int4" quantises dense safetensors on load
    dtype: str = "auto"  # activations: "bf16", "fp32" (CPU; auto: fp32 for F32/F16 files), "fp16" (GPU)
    kv_dtype: str = "auto"  # keys and values: "auto" is as activations; "fp8" (GPU), scaled a token and head
    max_model_len: int | None = None  # None: the model's own context length
    chat_template: str | None = None  # a template's text; None: the model's own
    draft: str | None = None  # a smaller model of the same vocabulary that guesses ahead


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Scheduling. All counts are tokens or sequences unless the name says otherwise."""

    block_size: int = 64  # positions a KV block
    total_blocks: int = 0  # set from the ranks' memory
    max_num_seqs: int = 64  # sequences that run at once
    max_step_tokens: int = 512  # token budget of a step, decode first, prefill with what is left
    max_chunk: int | None = None  # most prompt tokens of one sequence in a step; None: the budget
    max_model_len: int = 2048
    max_waiting: int = 1024  # more are refused with QueueFull
    prefix_cache: bool = True
    draft_tokens: int = 8  # most tokens guessed ahead for a sequence in a step; 0: none
    draft_cost: float | None = None  # of a draft model's guess, in steps of the model; None: no draft model
    microbatches: int = 1  # plans over which running sequences are spread: at least the stages of a pipeline


@dataclass(frozen=True, slots=True)
class ParallelConfig:
    tp: int = 1
    pp: int = 1  # stages: runs of neighbouring layers, each of `tp` ranks
    device: str = "auto"  # "auto" | "cpu" | "cuda"
    kv_memory: int | None = None  # bytes a rank for KV; None: what the device can spare
    threads: int | None = None  # intra-op threads a rank; None: cores divided among the ranks
    replicas: int = 1  # whole copies of the model behind one gateway


@dataclass(frozen=True, slots=True)
class AccessConfig:
    """Who may talk to the gateway. Names of files, read where the gateway runs; never what is in them."""

    tls_cert: str | None = None  # PEM: the server's certificate, then those between it and its authority
    tls_key: str | None = None  # PEM: its private key
    tls_client_ca: str | None = None  # PEM: a client must show a certificate of one of these
    auth_token_file: str | None = None  # a token a line; a call must bring one


@dataclass(frozen=True, slots=True)
class ServeConfig:
    model: ModelConfig
    engine: EngineConfig = field(default_factory=EngineConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    host: str = "127.0.0.1"
    port: int = 50051
    metrics_port: int | None = None  # None: no metrics
    access: AccessConfig = field(default_factory=AccessConfig)
