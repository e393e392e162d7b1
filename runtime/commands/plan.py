"""`tramontane plan`: which layouts of a model fit some GPUs, and how fast they could be. Reads headers.

A layout is a degree of tensor parallelism inside a node, and as many servers of that degree as the nodes have
room for, users shared evenly among them. Stages over several nodes are not served on GPUs, so no model is
planned larger than a node. Every rate is a prediction from `runtime.roofline`; nothing here was measured.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass

from runtime.capacity import GPU_SPARE
from runtime.commands.output import write_json
from runtime.config import EngineConfig, ModelConfig
from runtime.errors import InvalidArgument, NotEnough
from runtime.footprint import rank_footprint
from runtime.gpus import ASSUMED, GPUS, OTHER_NAMES, Constant, Gpu
from runtime.model.header import OpenModel, open_model
from runtime.model.layout import RunShare, shard_slices
from runtime.model.units import rank_units
from runtime.roofline import Rank, Shape, Step, decode, exchanges, prefill
from runtime.sizes import show_size
from runtime.weights.plan import plan_reads

_CONTEXT_BYTES = 1_000_000_000  # of a GPU, for the driver's context and the libraries' own buffers
MAX_NODES = 1024
BLOCK_SIZE = EngineConfig().block_size  # positions


@dataclass(frozen=True, slots=True)
class Machines:
    nodes: int
    gpus: int  # a node
    gpu: Gpu

    def __str__(self) -> str:
        one = f"{self.gpus}x{self.gpu.name}"
        return one if self.nodes == 1 else f"{self.nodes} nodes of {one}"


@dataclass(frozen=True, slots=True)
class Layout:
    """One degree. Of its ranks the first holds most; KV blocks are as many as the fullest rank can hold."""

    tp: int
    servers: int
    file_bytes: list[int]  # a rank
    gpu_bytes: list[int]  # a rank
    kv_bytes: int  # a position, on the rank that holds most
    kv_blocks: int  # a server; negative: not even the weights fit
    sequences: int  # of the whole context, a server
    users: int  # a server has to hold, where they do not divide evenly
    asked: int  # users, over all servers
    alone: Step
    full: Step
    prefill: float

    @property
    def fits(self) -> bool:
        return self.sequences >= self.users

    @property
    def tokens_per_second(self) -> float:
        """Of all servers, every user decoding."""
        return self.asked / self.full.seconds


def plan(
    model: ModelConfig, gpus: str, *, nodes: int, context: int | None, users: int, as_json: bool
) -> None:
    """Print the layouts. Raises InvalidArgument, and NotEnough where none of them holds what is asked."""
    machines = parse_machines(gpus, nodes)
    for name, value in (("users", users), ("context", context or 1)):
        if value < 1:
            raise InvalidArgument(name, f"must be at least 1, not {value}")
    opened = open_model(model, "cuda")
    longest = opened.spec.context_length
    length = min(context or 32768, longest)
    layouts = make_layouts(opened, machines, length, users)
    if not any(layout.fits for layout in layouts):
        raise NotEnough(_why_none(machines, layouts, length, users))
    value = describe(opened, machines, layouts, length, users)
    if context is not None and context > longest:
        value["note"] = f"the model's context is {longest} tokens: planned with that, not with {context}"
    if as_json:
        write_json(value)
    else:
        _show(value)


def parse_machines(text: str, nodes: int) -> Machines:
    """ "8xH200" or "H200". Raises InvalidArgument."""
    match = re.fullmatch(r"(?:(\d{1,4})[xX*])?([A-Za-z][\w-]*)", text.strip(), re.ASCII)
    name = match[2].upper() if match else ""
    gpu = GPUS.get(OTHER_NAMES.get(name, name))
    if gpu is None:
        raise InvalidArgument("gpus", f"{text[:40]!r} is not COUNTxNAME; names are {', '.join(GPUS)}")
    count = int(match[1] or 1)
    if count < 1:
        raise InvalidArgument("gpus", "a node needs at least one")
    if not 1 <= nodes <= MAX_NODES:
        raise InvalidArgument("nodes", f"must be from 1 to {MAX_NODES}, not {nodes}")
    return Machines(nodes, count, gpu)


def make_layouts(opened: OpenModel, machines: Machines, context: int, users: int) -> list[Layout]:
    """One for each degree from 1 to the model's units or the node's GPUs."""
    most = min(len(opened.units), machines.gpus)
    return [_layout(opened, machines, tp, context, users) for tp in range(1, most + 1)]


def _layout(opened: OpenModel, machines: Machines, tp: int, context: int, users: int) -> Layout:
    spec, gpu, units = opened.spec, machines.gpu, len(opened.units)
    block = BLOCK_SIZE
    servers = machines.nodes * (machines.gpus // tp)
    here = -(-users // servers)
    runs = rank_units(units, tp)
    # Equal runs do not hold equal bytes: units cut the FFN and the vocabulary unevenly.
    footprints = [rank_footprint(opened, run) for run in runs]
    ranks, reads = [], []
    for (start, stop), footprint in zip(runs, footprints, strict=True):
        heads = RunShare.of(opened.units[start:stop]).heads
        kv_bytes = opened.kv_bytes_per_position * (stop - start) // units
        ranks.append(Rank(footprint.streamed, footprint.weights, kv_bytes, heads[1] - heads[0]))
        slices = shard_slices(spec, opened.units, (start, stop))
        reads.append(sum(read.total for read in plan_reads(opened.checkpoint, slices, opened.quantize)))
    # As runtime.capacity counts: blocks of the largest share, as many as the fullest rank has room for.
    kv_bytes = opened.kv_bytes_per_position * -(-units // tp) // units
    room = int(gpu.memory.value) - _CONTEXT_BYTES - GPU_SPARE - max(f.held for f in footprints)
    blocks = room // (kv_bytes * block)
    shape = Shape(spec.layers, spec.hidden, spec.head_dim, spec.vocab)
    return Layout(
        tp=tp,
        servers=servers,
        file_bytes=reads,
        gpu_bytes=[footprint.held for footprint in footprints],
        kv_bytes=kv_bytes,
        kv_blocks=blocks,
        sequences=max(0, blocks // -(-context // block)),
        users=here,
        asked=users,
        alone=decode(gpu, shape, ranks, 1, context),
        full=decode(gpu, shape, ranks, here, context),
        prefill=prefill(gpu, shape, ranks, context),
    )


def _why_none(machines: Machines, layouts: list[Layout], context: int, users: int) -> str:
    last = layouts[-1]
    if last.kv_blocks < 1:
        return (
            f"the weights do not fit on {machines}: at --tp {last.tp} a rank keeps "
            f"{show_size(max(last.gpu_bytes))} of them and a {machines.gpu.name} has "
            f"{show_size(int(machines.gpu.memory.value))}; give larger GPUs, more of them in a node where "
            "--tp can rise, or a file of fewer bits (stages over nodes, --pp, run on CPUs alone so far)"
        )
    best = max(layouts, key=lambda layout: layout.sequences * layout.servers)
    # The longest context that the same users would fit with, in whole blocks.
    longest = max(layout.kv_blocks // layout.users for layout in layouts) * BLOCK_SIZE
    held = best.sequences * best.servers
    ways = ([f"--users {held}"] if held else []) + ([f"--context {longest}"] if longest > 0 else [])
    return (
        f"{users} users of {context} tokens do not fit on {machines}: --tp {best.tp} holds {held}; "
        f"give {', '.join(ways)}{', ' if ways else ''}or more or larger GPUs"
    )


# ---- what is shown --------------------------------------------------------------------------------------


def describe(opened: OpenModel, machines: Machines, layouts: list[Layout], context: int, users: int) -> dict:
    """All of it in plain values: bytes and seconds."""
    fitting = [layout for layout in layouts if layout.fits]
    best = max(fitting, key=lambda layout: layout.tokens_per_second)
    shape = Shape(opened.spec.layers, opened.spec.hidden, opened.spec.head_dim, opened.spec.vocab)
    gpu = machines.gpu
    constants = {
        "memory": gpu.memory,
        "memory kept free": Constant(GPU_SPARE, "B", "runtime/capacity.py: activations, graphs, libraries"),
        "driver and libraries": Constant(_CONTEXT_BYTES, "B", ASSUMED),
        "bandwidth": gpu.bandwidth,
        "matrix rate": gpu.flops,
        "link between GPUs": gpu.link,
        "one exchange": gpu.exchange,
    }
    return {
        "model": opened.spec.name,
        "machines": str(machines),
        "nodes": machines.nodes,
        "gpus_per_node": machines.gpus,
        "gpu": gpu.name,
        "context": context,
        "users": users,
        "units": len(opened.units),
        "kv_bytes_per_token": opened.kv_bytes_per_position,
        "streamed_bytes_per_step": rank_footprint(opened, (0, len(opened.units))).streamed,
        "constants": {name: asdict(constant) for name, constant in constants.items()},
        "layouts": [_layout_value(layout, shape) for layout in layouts],
        "best": best.tp,
        "command": _command(best, context),
    }


def _layout_value(layout: Layout, shape: Shape) -> dict:
    tokens = max(0, layout.kv_blocks) * BLOCK_SIZE
    return {
        "tp": layout.tp,
        "servers": layout.servers,
        "fits": layout.fits,
        "users_per_server": layout.users,
        "ranks": [
            {"file_bytes": read, "gpu_bytes": held}
            for read, held in zip(layout.file_bytes, layout.gpu_bytes, strict=True)
        ],
        "kv": {
            "bytes_per_token_rank": layout.kv_bytes,
            "tokens": tokens,
            "sequences": layout.sequences,
        },
        "predicted": {
            "is": "a bound from the roofline, not measured",
            "first_token_s": layout.prefill,
            "exchanges_per_step": exchanges(shape, layout.tp),
            "one_stream": _step_value(layout.alone),
            "all_users": _step_value(layout.full) | {"tokens_per_s_all": layout.tokens_per_second},
        },
    }


def _step_value(step: Step) -> dict:
    return {
        "users": step.users,
        "context": step.context,
        "weights_s": step.weights,
        "matrix_s": step.matrix,
        "kv_s": step.kv,
        "exchange_s": step.exchange,
        "step_s": step.seconds,
        "bound_by": step.bound,
        "tokens_per_s_stream": 1 / step.seconds,
    }


def _command(layout: Layout, context: int) -> str:
    many = f" --max-num-seqs {layout.users}" if layout.users > EngineConfig().max_num_seqs else ""
    return f"tramontane serve MODEL --device cuda --tp {layout.tp} --max-model-len {context}{many}"


def _show(value: dict) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    console.print(
        f"{escape(value['model'])} on {value['machines']}, "
        f"{value['users']} users of {value['context']} tokens each"
    )
    if "note" in value:
        console.print(value["note"])
    console.print(
        f"{show_size(value['streamed_bytes_per_step'])} of weights a step as a GPU keeps them, "
        f"{show_size(value['kv_bytes_per_token'])} of KV a token"
    )
    fit = Table("--tp", "servers", box=None, title="\nWhat fits", title_justify="left")
    for name in ("weights a rank", "KV tokens", "sequences", "users", "fits"):
        fit.add_column(name, justify="right")
    for one in value["layouts"]:
        fit.add_row(
            str(one["tp"]),
            str(one["servers"]),
            show_size(max(rank["gpu_bytes"] for rank in one["ranks"])),
            f"{one['kv']['tokens']:,}",
            str(one["kv"]["sequences"]),
            str(one["users_per_server"]),
            "yes" if one["fits"] else "no",
        )
    console.print(fit)
    console.print("(KV, sequences and users are one server's; weights its fullest rank's)")
    rates = Table("--tp", "users", box=None, title_justify="left")
    rates.title = "\nPredicted, not measured: ms of a step = max(weights, matrix) + KV + exchange"
    for name in ("weights", "matrix", "KV", "exchange", "step", "tok/s each", "in all"):
        rates.add_column(name, justify="right")
    for one in value["layouts"]:
        if one["fits"]:
            _add_rates(rates, one)
    console.print(rates)
    first = ", ".join(
        f"{one['predicted']['first_token_s']:.1f} s at --tp {one['tp']}"
        for one in value["layouts"]
        if one["fits"]
    )
    console.print(f"First token after a prompt of the whole context, alone: {first}", soft_wrap=True)
    facts = Table(box=None, show_header=False, title="\nAssumed", title_justify="left")
    for name, constant in value["constants"].items():
        facts.add_row(name, f"{constant['value']:.4g} {constant['unit']}", escape(constant["source"]))
    console.print(facts)
    console.print(f"\nMost tokens a second: {value['command']}", soft_wrap=True)


def _add_rates(table, one: dict) -> None:
    """A row for a stream that is alone, and one for all users."""
    predicted = one["predicted"]
    alone, full = predicted["one_stream"], predicted["all_users"]
    rows = [("1", alone, alone["tokens_per_s_stream"])]
    if (full["users"], one["servers"]) != (1, 1):
        rows.append((f"{full['users']} x {one['servers']}", full, full["tokens_per_s_all"]))
    for users, step, total in rows:
        names = ("weights_s", "matrix_s", "kv_s", "exchange_s", "step_s")
        times = (f"{1000 * step[name]:.2f}" for name in names)
        table.add_row(str(one["tp"]), users, *times, f"{step['tokens_per_s_stream']:.1f}", f"{total:.0f}")
