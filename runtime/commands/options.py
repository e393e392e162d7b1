"""The options that several commands share, each with its help."""

from pathlib import Path
from typing import Annotated

import typer

from runtime.sizes import parse_size


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


_SOURCES = "A GGUF file, a folder of safetensors, hf:owner/repo/file, hf:owner/repo or pypi:name==version."
Model = Annotated[str, typer.Argument(metavar="MODEL", show_default=False, help=_SOURCES)]
ModelA = Annotated[str, typer.Argument(metavar="A", show_default=False, help=_SOURCES)]
ModelB = Annotated[str, typer.Argument(metavar="B", show_default=False, help="Another, as A.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one line of JSON.")]
Tp = Annotated[int, typer.Option(help="Ranks that share the model: from 1 to its units (see inspect).")]
Pp = Annotated[
    int,
    typer.Option(help="Stages, runs of layers that follow each other, of --tp ranks each."),
]
Replicas = Annotated[
    int, typer.Option(help="Copies of the model, of so many ranks each, that share the work.")
]
Local = Annotated[bool, typer.Option("--local", help="Run in this process, without Ray.")]
RayAddress = Annotated[
    str | None, typer.Option(metavar="ADDRESS", help="Join this Ray cluster; without it, start a local one.")
]
ServiceRay = Annotated[
    str, typer.Option("--ray-address", metavar="ADDRESS", help="Of the Ray cluster. auto: this machine's.")
]
Device = Annotated[str, typer.Option(metavar="auto|cpu|cuda", help="Where ranks compute.")]
MaxModelLen = Annotated[
    int | None, typer.Option(help="Most tokens of prompt and reply together. Default: what the model takes.")
]
MaxNumSeqs = Annotated[int, typer.Option(help="Most replies that run at once; more wait.")]
Draft = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="A smaller model of the same vocabulary, which guesses ahead; replies stay the same.",
    ),
]
DraftTokens = Annotated[
    int, typer.Option(help="Most tokens guessed ahead for a reply in a step; 0 turns speculation off.")
]
MaxStepTokens = Annotated[int, typer.Option(help="Most tokens of one forward step.")]
KvMemory = Annotated[
    int | None,
    typer.Option(
        parser=_size,
        metavar="SIZE",
        help="Memory a rank keeps for KV, as 512MiB or 2GiB. By default on a CPU a quarter of what is free, "
        "shared by all ranks, at most 512MiB but room for one context; on a GPU all but 2GiB and what a step "
        "works in.",
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        metavar="auto|bf16|fp32|fp16",
        help="Activations. auto: on a CPU fp32 for F32 and F16 files, else bf16; on a GPU fp16.",
    ),
]
KvDtype = Annotated[
    str,
    typer.Option(
        metavar="auto|fp8", help="Keys and values. fp8, on GPUs: half the memory, scaled a token and head."
    ),
]
Quantize = Annotated[str | None, typer.Option(metavar="int4", help="Quantise safetensors while loading.")]
ChatTemplate = Annotated[
    Path | None, typer.Option(metavar="FILE", help="A Jinja chat template in place of the model's own.")
]
Target = Annotated[str, typer.Option(metavar="HOST:PORT", help="A running server.")]
TlsCa = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Certificates (PEM) that vouch for the server. Default: no TLS."),
]
TlsCert = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="A certificate (PEM) to show to a server that asks for one."),
]
TlsKey = Annotated[Path | None, typer.Option(metavar="FILE", help="Its private key (PEM).")]
TokenFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        envvar="TRAMONTANE_TOKEN_FILE",
        help="The token for a server that wants one, in the first line.",
    ),
]
Temperature = Annotated[
    float, typer.Option(help="0 always takes the most likely token; 1 samples as the model was trained.")
]
TopK = Annotated[int, typer.Option(help="Sample among the K most likely tokens; 0 is all.")]
TopP = Annotated[float, typer.Option(help="Sample among the most likely tokens that make up this mass.")]
MinP = Annotated[float, typer.Option(help="Leave out tokens below this share of the most likely one's.")]
Repetition = Annotated[float, typer.Option(help="Above 1 makes tokens of prompt and reply less likely.")]
Presence = Annotated[float, typer.Option(help="Lowers tokens that the reply has; -2 to 2.")]
Frequency = Annotated[float, typer.Option(help="Lowers tokens by how often the reply has them; -2 to 2.")]
Seed = Annotated[
    int | None, typer.Option(help="The same seed gives the same reply, bit for bit. Default: one is drawn.")
]
Stop = Annotated[list[str] | None, typer.Option(help="End before this text. May be given several times.")]
IgnoreEos = Annotated[bool, typer.Option("--ignore-eos", help="Go on after an end-of-sequence token.")]
Logprobs = Annotated[
    int | None,
    typer.Option(metavar="N", help="With --json: log probabilities, and the N most likely tokens."),
]
