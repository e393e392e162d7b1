"""`tramontane plan`: which layouts of a model fit some GPUs, and how fast they could be. Reads headers.

Layouts are made in `plan_layouts`, and shown here. Every rate is a prediction from `runtime.roofline`;
nothing here was measured.
"""

from __future__ import annotations

from dataclasses import asdict

from runtime.capacity import GPU_SPARE
from runtime.commands.output import write_json
from runtime.commands.plan_layouts import (
    BLOCK_SIZE,
    CONTEXT_BYTES,
    Layout,
    Layouts,
    Machines,
    enough_nodes,
    parse_machines,
    preference,
)
from runtime.config import EngineConfig, ModelConfig
from runtime.errors import InvalidArgument, NotEnough
from runtime.footprint import rank_footprint
from runtime.gpus import ASSUMED, NETWORK_LATENCY, Constant
from runtime.model.header import OpenModel, open_model
from runtime.roofline import Round
from runtime.sizes import show_size


def plan(
    model: ModelConfig,
    gpus: str,
    *,
    nodes: int,
    network: float,
    context: int | None,
    users: int,
    as_json: bool,
) -> None:
    """Print the layouts. `network` is in Gbit/s. Raises InvalidArgument, and NotEnough where none of them
    holds what is asked."""
    machines = parse_machines(gpus, nodes, network)
    for name, value in (("users", users), ("context", context or 1)):
        if value < 1:
            raise InvalidArgument(name, f"must be at least 1, not {value}")
    opened = open_model(model, "cuda")
    longest = opened.spec.context_length
    length = min(context or 32768, longest)
    layouts = Layouts(opened, model.draft)
    made = layouts.on(machines, length, users)
    if not any(layout.fits for layout in made):
        raise NotEnough(_why_none(layouts, machines, made, length, users))
    value = describe(opened, machines, made, length, users, draft=model.draft is not None)
    if context is not None and context > longest:
        value["notes"].append(
            f"the model's context is {longest} tokens: planned with that, not with {context}"
        )
    value["notes"] += layouts.left_out(machines)
    if as_json:
        write_json(value)
    else:
        _show(value)


def _why_none(layouts: Layouts, machines: Machines, made: list[Layout], context: int, users: int) -> str:
    more = enough_nodes(layouts, machines, context, users)
    nodes = ""
    if more:
        count, layout = more
        # A way out that serve refuses today is no way out, unless there is no other.
        nodes = f"--nodes {count}" + (f" ({layout.options}, which cannot run yet)" if layout.refused else "")
    last = min(made, key=lambda layout: max(layout.gpu_bytes))
    if last.kv_blocks < 1:
        ways = [nodes] if nodes else []
        ways += ["larger GPUs", "more of them in a node where --tp can rise", "a file of fewer bits"]
        return (
            f"the weights do not fit on {machines}: at {last.options} a rank keeps "
            f"{show_size(max(last.gpu_bytes))} of them and a {machines.gpu.name} has "
            f"{show_size(int(machines.gpu.memory.value))}; give {', '.join(ways[:-1])}, or {ways[-1]}"
        )
    best = max(made, key=lambda layout: layout.sequences * layout.replicas)
    # The longest context that the same users would fit with, in whole blocks.
    longest = max(layout.kv_blocks // layout.users for layout in made) * BLOCK_SIZE
    held = best.sequences * best.replicas
    ways = ([f"--users {held}"] if held else []) + ([f"--context {longest}"] if longest > 0 else [])
    ways += [nodes] if nodes else []
    return (
        f"{users} users of {context} tokens do not fit on {machines}: {best.options} holds {held}; "
        f"give {', '.join(ways)}{', ' if ways else ''}or more or larger GPUs"
    )


# ---- what is shown --------------------------------------------------------------------------------------


def describe(
    opened: OpenModel,
    machines: Machines,
    layouts: list[Layout],
    context: int,
    users: int,
    *,
    draft: bool = False,
) -> dict:
    """All of it in plain values: bytes and seconds."""
    best = max((layout for layout in layouts if layout.fits), key=preference)
    gpu = machines.gpu
    constants = {
        "memory": gpu.memory,
        "memory kept free": Constant(GPU_SPARE, "B", "runtime/capacity.py: activations, graphs, libraries"),
        "driver and libraries": Constant(CONTEXT_BYTES, "B", ASSUMED),
        "bandwidth": gpu.bandwidth,
        "matrix rate": gpu.flops,
        "link between GPUs": gpu.link,
        "one exchange": gpu.exchange,
    }
    if machines.nodes > 1:
        constants |= {
            "network between nodes": Constant(machines.network / 8, "B/s", f"{ASSUMED}: --network"),
            "one transfer": NETWORK_LATENCY,
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
        "layers": opened.spec.layers,
        "draft": draft,
        "kv_bytes_per_token": opened.kv_bytes_per_position,
        "streamed_bytes_per_step": rank_footprint(opened, (0, len(opened.units))).streamed,
        "constants": {name: asdict(constant) for name, constant in constants.items()},
        "layouts": [_layout_value(layout) for layout in layouts],
        "best": {"tp": best.tp, "pp": best.pp, "replicas": best.replicas, "refused": best.refused},
        "command": _command(best, machines, context, draft=draft, fp8=opened.kv_dtype == "fp8"),
        "notes": [],
    }


def _layout_value(layout: Layout) -> dict:
    tokens = max(0, layout.kv_blocks) * BLOCK_SIZE
    return {
        "tp": layout.tp,
        "pp": layout.pp,
        "replicas": layout.replicas,
        "fits": layout.fits,
        "refused": layout.refused,
        "users_per_replica": layout.users,
        "stages": [{"layers": list(span)} for span in layout.stages],
        "ranks": [
            {"stage": index // layout.tp, "file_bytes": read, "gpu_bytes": held}
            for index, (read, held) in enumerate(zip(layout.file_bytes, layout.gpu_bytes, strict=True))
        ],
        "kv": {
            "bytes_per_token_rank": layout.kv_bytes,
            "tokens": tokens,
            "sequences": layout.sequences,
        },
        "predicted": {
            "is": "a bound from the roofline, not measured",
            "first_token_s": layout.prefill,
            "exchanges_per_token": layout.exchanges,
            "one_stream": _round_value(layout.alone),
            "all_users": _round_value(layout.full) | {"tokens_per_s_all": layout.tokens_per_second},
        },
    }


def _round_value(one: Round) -> dict:
    return {
        "users": one.users,
        "context": one.context,
        "microbatches": one.microbatches,
        "weights_s": one.term("weights"),
        "matrix_s": one.term("matrix"),
        "kv_s": one.term("kv"),
        "exchange_s": one.term("exchange"),
        "transfer_s": one.term("transfer"),
        "stage_step_s": [stage.seconds for stage in one.stages],
        "step_s": one.seconds,
        "bound_by": one.bound,
        "tokens_per_s_stream": 1 / one.seconds,
    }


def _command(layout: Layout, machines: Machines, context: int, *, draft: bool, fp8: bool) -> str:
    words = f"tramontane serve MODEL --device cuda {layout.options}"
    words += f" --replicas {layout.replicas}" if layout.replicas > 1 else ""
    words += f" --max-model-len {context}"
    words += f" --max-num-seqs {layout.users}" if layout.users > EngineConfig().max_num_seqs else ""
    words += " --draft DRAFT" if draft else ""
    words += " --kv-dtype fp8" if fp8 else ""
    return words + (" --ray-address auto" if machines.nodes > 1 else "")


def _show(value: dict) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    console.print(
        f"{escape(value['model'])} on {value['machines']}, "
        f"{value['users']} users of {value['context']} tokens each"
    )
    for note in value["notes"]:
        console.print(escape(note), soft_wrap=True)
    console.print(
        f"{show_size(value['streamed_bytes_per_step'])} of weights a step as a GPU keeps them, "
        f"{show_size(value['kv_bytes_per_token'])} of KV a token"
    )
    fit = Table("--tp", "--pp", "replicas", box=None, title="\nWhat fits", title_justify="left")
    for name in ("weights a rank", "KV tokens", "sequences", "users", "fits"):
        fit.add_column(name, justify="right")
    for one in value["layouts"]:
        fit.add_row(
            str(one["tp"]),
            str(one["pp"]),
            str(one["replicas"]),
            show_size(max(rank["gpu_bytes"] for rank in one["ranks"])),
            f"{one['kv']['tokens']:,}",
            str(one["kv"]["sequences"]),
            str(one["users_per_replica"]),
            ("no" if not one["fits"] else "not yet" if one["refused"] else "yes"),
        )
    console.print(fit)
    console.print(
        "(KV, sequences and users are one replica's; weights its fullest rank's"
        + (", with the draft model's)" if value["draft"] else ")")
    )
    refused = {one["pp"]: one["refused"] for one in reversed(value["layouts"]) if one["refused"]}
    if refused:
        console.print(f"(not yet, in serve's words: {escape(refused[min(refused)])})", soft_wrap=True)
    rates = Table("--tp", "--pp", "users", box=None, title_justify="left")
    rates.title = "\nPredicted, not measured; ms a token: max(weights, matrix) + KV + exch. + send"
    for name in ("weights", "matrix", "KV", "exch.", "send", "token", "tok/s", "in all"):
        rates.add_column(name, justify="right")
    for one in value["layouts"]:
        if one["fits"]:
            _add_rates(rates, one)
    console.print(rates)
    fitting = [one for one in value["layouts"] if one["fits"]]
    shown = [one for one in fitting if one["pp"] == 1] or fitting
    first = ", ".join(f"{one['predicted']['first_token_s']:.1f} s at {_options(one)}" for one in shown)
    console.print(f"First token after a prompt of the whole context, alone: {first}", soft_wrap=True)
    facts = Table(box=None, show_header=False, title="\nAssumed", title_justify="left")
    for name, constant in value["constants"].items():
        facts.add_row(name, f"{constant['value']:.4g} {constant['unit']}", escape(constant["source"]))
    console.print(facts)
    when = "Recommended, once it runs" if value["best"]["refused"] else "Recommended"
    console.print(f"\n{when}: {value['command']}", soft_wrap=True)


def _options(one: dict) -> str:
    return f"--tp {one['tp']}" + (f" --pp {one['pp']}" if one["pp"] > 1 else "")


def _add_rates(table, one: dict) -> None:
    """A row for a stream that is alone, and one for all users."""
    predicted = one["predicted"]
    alone, full = predicted["one_stream"], predicted["all_users"]
    rows = [("1", alone, alone["tokens_per_s_stream"])]
    if (full["users"], one["replicas"]) != (1, 1):
        rows.append((f"{full['users']} x {one['replicas']}", full, full["tokens_per_s_all"]))
    for users, step, total in rows:
        names = ("weights_s", "matrix_s", "kv_s", "exchange_s", "transfer_s", "step_s")
        times = (f"{1000 * step[name]:.2f}" for name in names)
        each = f"{step['tokens_per_s_stream']:.1f}"
        table.add_row(str(one["tp"]), str(one["pp"]), users, *times, each, f"{total:.0f}")
