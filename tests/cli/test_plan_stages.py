"""`plan` with stages: bytes are shared out whole, what should fit does, the slowest stage sets the pace."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.capacity import GPU_SPARE
from runtime.commands import plan_layouts
from runtime.commands.plan_layouts import (
    BLOCK_SIZE,
    CONTEXT_BYTES,
    Layout,
    Layouts,
    make_layouts,
    parse_machines,
    preference,
    stage_counts,
)
from runtime.config import EngineConfig, ModelConfig
from runtime.errors import InvalidArgument
from runtime.footprint import rank_footprint
from runtime.gpus import GPUS, NETWORK_LATENCY
from runtime.local import local_runners
from runtime.model.header import OpenModel, open_model
from runtime.model.load import load_shard
from runtime.model.stages import stage_layers
from runtime.model.units import rank_units
from runtime.roofline import Link, Rank, Shape, Stage, decode, prefill
from tests.cli.command import refused, run
from tests.cli.test_plan import held_by_a_real_shard
from tests.weights.sparse import write_sparse_70b
from tests.weights.tiny import write_tiny_llama


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    return write_sparse_70b(tmp_path_factory.mktemp("large") / "hole.gguf")


@pytest.fixture(scope="module")
def short(tmp_path_factory) -> OpenModel:
    """The flagship's shape with ten layers."""
    path = write_sparse_70b(tmp_path_factory.mktemp("short") / "hole.gguf", layers=10)
    return open_model(ModelConfig(str(path)), "cuda")


@pytest.fixture(scope="module")
def layouts(short) -> Layouts:
    return Layouts(short)


def of(made: list[Layout], tp: int, pp: int) -> Layout:
    return next(layout for layout in made if (layout.tp, layout.pp) == (tp, pp))


# ---- bytes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("types", ["Q8_0", "Q4_0", "BF16"])
def test_stages_share_the_model_out(tmp_path, types, tied):
    """All that one stage holds, and no more; where embedding and head share a table, it is read twice."""
    path = write_tiny_llama(
        tmp_path / "m.gguf", types=types, tied=tied, layers=7, hidden=128, heads=8, kv_heads=4, ffn=352
    )
    opened = open_model(ModelConfig(str(path)), "cuda")
    made = make_layouts(opened, parse_machines("4xH100", 5), 256, 1)
    table = opened.checkpoint.tensors["token_embd.weight"].nbytes
    assert {layout.pp for layout in made} == {1, 2, 4, 5}
    assert sum(of(made, 1, 1).file_bytes) == sum(info.nbytes for info in opened.checkpoint.tensors.values())
    for layout in made:
        whole = of(made, layout.tp, 1)
        again = table if tied and layout.pp > 1 else 0
        assert sum(layout.gpu_bytes) == sum(whole.gpu_bytes)
        assert sum(layout.file_bytes) == sum(whole.file_bytes) + again
        assert len(layout.gpu_bytes) == len(layout.file_bytes) == layout.tp * layout.pp
        spans = layout.stages
        assert spans[0][0] == 0 and spans[-1][1] == 7
        assert all(a[1] == b[0] for a, b in pairwise(spans))


def test_bytes_are_those_of_real_stages(tmp_path):
    """Four ranks on CPUs read what the plan says, hold the same weights and the same KV: bf16 there is as
    wide as fp16, and 128 columns need no padding. Norms alone are not among a shard's own count."""
    path = write_tiny_llama(
        tmp_path / "m.gguf", types="BF16", layers=5, hidden=256, heads=4, kv_heads=2, ffn=512, vocab=384
    )
    layout = of(
        make_layouts(open_model(ModelConfig(str(path)), "cuda"), parse_machines("2xH100", 2), 256, 1), 2, 2
    )
    opened = open_model(ModelConfig(str(path)))
    assert layout.stages == stage_layers(opened, 2)
    loaded = [load_shard(opened, rank, 2, pp=2) for rank in range(4)]
    assert layout.file_bytes == [report.bytes_read for _, report in loaded]
    for rank, (shard, _) in enumerate(loaded):
        norms = 4 * 256 * (2 * len(shard.layers) + (1 if shard.last else 0))
        rows = sum(head.table.nbytes for head in shard.heads)  # a CPU keeps the head in a second form too
        assert layout.gpu_bytes[rank] == shard.nbytes + norms - rows, rank
    config = EngineConfig(total_blocks=3)
    kept = [runner.cache_bytes for runner in local_runners([s for s, _ in loaded], 2, config, 192)]
    assert max(kept) == layout.kv_bytes * BLOCK_SIZE * config.total_blocks


@pytest.mark.parametrize("tied", [False, True])
def test_bytes_are_those_of_real_stages_in_the_form_of_a_gpu(tmp_path, tied):
    types = {"*": "Q4_K", "attn_v": "Q6_K", "ffn_down": "Q5_K", "token_embd": "Q6_K", "output": "Q6_K"}
    path = write_tiny_llama(
        tmp_path / "m.gguf",
        types=types,
        tied=tied,
        layers=3,
        hidden=256,
        heads=4,
        kv_heads=2,
        ffn=512,
        vocab=301,
    )
    opened = open_model(ModelConfig(str(path)), "cuda")
    for layout in make_layouts(opened, parse_machines("2xH100", 3), 256, 1):
        runs = rank_units(2, layout.tp)
        held = [held_by_a_real_shard(opened, run, span) for span in layout.stages for run in runs]
        assert layout.gpu_bytes == [all_of_it for all_of_it, _ in held], (layout.tp, layout.pp)


machines = st.builds(
    parse_machines,
    st.builds("{}x{}".format, st.integers(1, 10), st.sampled_from(sorted(GPUS))),
    st.integers(1, 6),
)
contexts, users = st.integers(1, 40_000), st.integers(1, 3000)


@settings(deadline=None, max_examples=40)
@given(machines, contexts, users)
def test_what_is_said_to_fit_does(short, layouts, on, context, asked):
    """Counted rank by rank: its weights, and its own layers' and units' KV of every user."""
    room = on.gpu.memory.value - CONTEXT_BYTES - GPU_SPARE
    blocks = -(-context // BLOCK_SIZE)
    for layout in layouts.on(on, context, asked):
        taken = []
        runs = rank_units(8, layout.tp)
        for index, held in enumerate(layout.gpu_bytes):
            start, stop = layout.stages[index // layout.tp]
            own = runs[index % layout.tp]
            assert held == rank_footprint(short, own, (start, stop)).held
            kv = 2 * (own[1] - own[0]) * 128 * 2 * (stop - start)  # of a position: fp16 keys and values
            assert kv <= layout.kv_bytes
            taken.append(held + kv * blocks * BLOCK_SIZE * layout.users)
        if layout.fits:
            assert max(taken) <= room
        else:
            most = max(layout.gpu_bytes) + layout.kv_bytes * blocks * BLOCK_SIZE * layout.users
            assert most > room
        assert layout.users * layout.replicas >= asked > (layout.users - 1) * layout.replicas
        assert layout.gpus <= on.gpus * on.nodes
        assert layout.replicas * layout.pp <= on.nodes * (on.gpus // layout.tp)


@settings(deadline=None, max_examples=40)
@given(machines, contexts, users, st.integers(0, 4000), st.integers(0, 100))
def test_more_is_never_easier(layouts, on, context, asked, longer, more):
    """Nothing fits with more context or users that did not with less, and no token comes sooner."""
    small, large = layouts.on(on, context, asked), layouts.on(on, context + longer, asked + more)
    for one, other in zip(small, large, strict=True):
        assert (one.tp, one.pp, one.replicas) == (other.tp, other.pp, other.replicas)
        assert one.fits or not other.fits
        for name in ("alone", "full"):
            assert getattr(one, name).seconds <= getattr(other, name).seconds * (1 + 1e-9)
        assert one.prefill <= other.prefill * (1 + 1e-9)


# ---- rates ----------------------------------------------------------------------------------------------

SHAPE = Shape(hidden=8192, head_dim=128, vocab=32000)
LINK = Link(bandwidth=1e9, latency=1e-3)


def stage(layers: int, *, last: bool = False, ranks: int = 1) -> Stage:
    rank = Rank(layers * 430_000_000 // ranks, layers * 855_000_000 // ranks, layers * 4096 // ranks, 64)
    return Stage(layers, (rank,) * ranks, last=last)


def test_a_token_passes_all_stages_and_the_slowest_sets_the_pace():
    gpu, stages = GPUS["H200"], [stage(10), stage(20), stage(10, last=True)]
    each = [decode(gpu, SHAPE, [one], 1, 1000).seconds for one in stages]
    row = 8192 * 4 / LINK.bandwidth
    alone = decode(gpu, SHAPE, stages, 1, 1000, LINK)
    assert alone.microbatches == 1
    assert alone.seconds == pytest.approx(sum(each) + 3 * LINK.latency + 2 * row)
    assert alone.term("transfer") == pytest.approx(3 * LINK.latency + 2 * row)
    terms = max(alone.term("weights"), alone.term("matrix")) + alone.term("kv") + alone.term("transfer")
    assert alone.seconds == pytest.approx(terms)
    assert alone.bound == "weights"
    # Six users are three microbatches of two: the stage of twenty layers is never idle, others wait for it.
    slow = decode(gpu, SHAPE, [stages[1]], 2, 1000).seconds + LINK.latency + 2 * row
    full = decode(gpu, SHAPE, stages, 6, 1000, LINK)
    assert (full.microbatches, full.stages[0].users) == (3, 2)
    assert full.seconds == pytest.approx(3 * slow)
    # Two users fill two of three places: their way through all stages takes longest.
    assert decode(gpu, SHAPE, stages, 2, 1000, LINK).seconds == pytest.approx(
        max(alone.seconds, 2 * (each[1] + LINK.latency + row))
    )


def test_chunks_of_a_prompt_follow_each_other_through_the_stages():
    gpu, stages = GPUS["H200"], [stage(10), stage(30, last=True)]
    quick, slow = (prefill(gpu, SHAPE, [one], 5120) / 10 for one in stages)
    rows = 512 * 8192 * 4 / LINK.bandwidth
    first, second = quick + LINK.latency + rows, slow + LINK.latency
    expected = first + second + 9 * max(first, second)
    assert prefill(gpu, SHAPE, stages, 5120, LINK) == pytest.approx(expected)


def test_ranks_of_a_stage_wait_for_its_layers_alone():
    assert stage(10, ranks=2).exchanges + stage(30, ranks=2, last=True).exchanges == 2 * 40 + 3
    assert stage(40, ranks=1).exchanges == 0


def test_a_slow_network_is_seen_between_nodes_alone(layouts):
    fast, slow = (layouts.on(parse_machines("8xH200", 2, network), 4096, 64) for network in (400, 1))
    for one, other in zip(fast, slow, strict=True):
        assert (one.full.seconds < other.full.seconds) == (one.pp > 1)
        assert one.alone.term("transfer") == 0 or one.pp > 1
        assert one.pp == 1 or one.alone.term("transfer") > one.pp * NETWORK_LATENCY.value
    within = make_layouts_of_three_units(parse_machines("8xH200", 1, 1))
    assert of(within, 1, 8).alone.term("transfer") < 8 * 30e-6  # NVLink, not the network


def make_layouts_of_three_units(on) -> list[Layout]:
    """Of a model whose units are fewer than a node's GPUs."""
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        path = write_tiny_llama(
            Path(folder) / "m.gguf", types="Q8_0", layers=12, hidden=192, heads=6, kv_heads=3, ffn=192
        )
        return make_layouts(open_model(ModelConfig(str(path)), "cuda"), on, 256, 1)


def test_stages_share_a_node_where_it_has_more_gpus_than_the_model_units():
    one = make_layouts_of_three_units(parse_machines("8xH200", 1))
    assert [(layout.tp, layout.pp, layout.gpus) for layout in one] == [
        (1, 1, 8), (1, 8, 8), (2, 1, 8), (2, 4, 8), (3, 1, 6), (3, 2, 6),
    ]  # fmt: skip
    assert stage_counts(parse_machines("8xH200", 3), 8, 80, 4) == [1, 2, 3]
    assert stage_counts(parse_machines("8xH200", 1000), 8, 80, 4) == [1, 2, 4, 8, 16]
    assert stage_counts(parse_machines("8xH200", 16), 8, 5, 4) == [1, 2, 4]


# ---- what is said ---------------------------------------------------------------------------------------

SMALL = ["--users", "4", "--context", "2048"]


def no_stages(opened, pp: int) -> tuple:
    """As `stage_layers` where stages cannot run."""
    if pp > 1:
        raise InvalidArgument("pp", "stages cannot run here: give --pp 1")
    return ()


def test_stages_are_recommended_where_nothing_else_fits(large):
    arguments = ["plan", str(large), "--gpus", "1xA100-40", "--nodes", "2", *SMALL]
    value = run(*arguments, "--json").json
    assert value["best"] == {"tp": 1, "pp": 2, "replicas": 1, "refused": None}
    assert [(one["fits"], one["refused"]) for one in value["layouts"]] == [(False, None), (True, None)]
    assert "network between nodes" in value["constants"] and "--pp 2" in value["command"]
    shown = run(*arguments).out
    assert "not yet" not in shown and "Recommended: " in shown


def test_what_cannot_run_yet_is_marked_in_the_words_of_the_code(large, monkeypatch):
    monkeypatch.setattr(plan_layouts, "stage_layers", no_stages)
    arguments = ["plan", str(large), "--gpus", "1xA100-40", "--nodes", "2", *SMALL]
    said = "pp: stages cannot run here: give --pp 1"
    value = run(*arguments, "--json").json
    assert value["best"] == {"tp": 1, "pp": 2, "replicas": 1, "refused": said}
    assert [(one["fits"], one["refused"]) for one in value["layouts"]] == [(False, None), (True, said)]
    shown = run(*arguments).out
    assert said in shown and "not yet" in shown and "Recommended, once it runs: " in shown
    said = run("plan", str(large), "--gpus", "1xA100-40", *SMALL).err
    assert "--nodes 2 (--tp 1 --pp 2, which cannot run yet)" in said


@pytest.mark.parametrize("can_run", [True, False])
def test_what_runs_is_preferred_then_fewer_stages_then_more_tokens(layouts, monkeypatch, can_run):
    if not can_run:
        monkeypatch.setattr(plan_layouts, "stage_layers", no_stages)
    on = parse_machines("8xH200", 4)
    best = max(layouts.on(on, 4096, 64), key=preference)
    rest = [layout for layout in layouts.on(on, 4096, 64) if layout.pp == 1 and layout.fits]
    assert best.refused is None and best.pp == 1
    assert best.tokens_per_second == max(layout.tokens_per_second for layout in rest)
    made = layouts.on(on, 4096, 64)
    one, two = (replace(of(made, 4, pp), refused=None) for pp in (1, 2))
    assert max(one, two, key=preference) is one
    assert max(replace(one, refused="not so far"), two, key=preference) is two


def test_nodes_are_offered_where_they_would_do(large):
    said = run("plan", str(large), "--gpus", "1xA100-40", *SMALL).err
    assert "--nodes 2, larger" in said
    said = run("plan", str(large), "--gpus", "8xL40S").err
    nodes = said.split("--nodes ")[1].split(",")[0]
    assert run("plan", str(large), "--gpus", "8xL40S", "--nodes", nodes, "--json").json["best"]["pp"] == 1
    refused(run("plan", str(large), "--gpus", "8xL40S", "--nodes", str(int(nodes) // 2)), "do not fit")


def test_a_draft_models_memory_counts(tmp_path, large, short):
    path = write_sparse_70b(tmp_path / "draft.gguf", layers=4)
    value = run("plan", str(large), "--gpus", "8xH200", "--nodes", "2", "--draft", str(path), "--json").json
    plain = run("plan", str(large), "--gpus", "8xH200", "--nodes", "2", "--json").json
    draft = open_model(ModelConfig(str(path)), "cuda")
    without = {one["tp"]: one for one in plain["layouts"] if one["pp"] == 1}
    assert [one["tp"] for one in value["layouts"]] == sorted(without)
    for one in value["layouts"]:
        other = without[one["tp"]]
        for own, mine, theirs in zip(rank_units(8, one["tp"]), one["ranks"], other["ranks"], strict=True):
            assert mine["gpu_bytes"] == theirs["gpu_bytes"] + rank_footprint(draft, own).held
        assert one["kv"]["bytes_per_token_rank"] * 80 == other["kv"]["bytes_per_token_rank"] * 84
    assert value["notes"] == ["left out: draft: is not possible with --pp 2: give one or the other"]
    assert "--draft" in value["command"]


def test_a_draft_model_of_another_vocabulary_is_refused(tmp_path, large):
    path = write_tiny_llama(tmp_path / "draft.gguf")
    refused(run("plan", str(large), "--gpus", "8xH200", "--draft", str(path)), "draft", "384", "32000")


@pytest.mark.parametrize("network", ["0", "-1", "nan", "1e9"])
def test_a_network_that_is_none_is_refused(large, network):
    refused(run("plan", str(large), "--gpus", "8xH200", "--network", network), "network: ", "Gbit/s")
