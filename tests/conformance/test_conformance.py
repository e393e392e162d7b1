"""The part of the suite that every run of the tests has: all ways and 200 random scenarios on tiny models."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels.native import machine
from runtime.model.load import numerics
from runtime.types import FinishReason, TokenLogprob
from tests.conformance.cluster import run_cluster
from tests.conformance.compare import PREEMPTED, RIGHT, TEXT, WRONG, Tally, differing_bits, encode_reply
from tests.conformance.gateway import run_gateway
from tests.conformance.models import CONTEXT, LARGE_CONTEXT, TINY, Model
from tests.conformance.replicas import run_replicas
from tests.conformance.scenario import Arrival, Play, Scenario
from tests.conformance.search import search
from tests.conformance.ways import Idle, Way, run_way, ways
from tests.replies import Reply
from tests.support import REPOSITORY, fixture_path

SEED = int(os.environ.get("TRAMONTANE_SEED") or int.from_bytes(os.urandom(4), "little"))
# Meets all that is counted, whatever the seed: of 130 random scenarios, three to seven preempted anyone, so
# that now and then a seed would have had none.
EVERYTHING = Scenario(
    block_size=4,
    total_blocks=20,  # what six prompts take, without their replies
    draft="plan",
    arrivals=(
        *(Arrival(request) for request in (0, 8, 2, 10)),
        *(Arrival(3, known=2), Arrival(11, leaves=1)),
        *(Arrival(request, at=60) for request in (0, 8, 2, 10, 12)),
        *(Arrival(4, at=90, scores=True), Arrival(10, at=120)),
    ),
)
# The same of guesses from the text. Those that come alone repeat themselves all the time, and at times.
REPEATING = Scenario(block_size=16, arrivals=(Arrival(18), Arrival(17, at=40), Arrival(15, at=90)))
SCENARIOS = {"mixed-u3": 130, "fp32-u5": 50, "int4-u8": 20}  # 200 in all, most where a step costs least


@pytest.fixture(scope="module")
def models(tiny) -> dict[str, Model]:
    return {name: Model(tiny(context=CONTEXT, **shape)) for name, shape in TINY.items()}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def none_differ(tally: Tally) -> None:
    assert tally.runs and not tally.bits, "\n".join([f"seed {SEED}", *tally.differences, tally.line()])


@pytest.mark.parametrize("name", TINY)
def test_every_way(models, name):
    """All of them over eight units, every other one on the other models."""
    model, tally = models[name], Tally()
    for way in list(ways(model))[:: 1 if model.units == 8 else 2]:
        tally.take(run_way(model, way, SEED))
    tally.take(run_gateway(model))
    none_differ(tally)
    for met in ("stop strings found", "replies resumed", WRONG.format(TEXT)):  # ways ask for the rest
        assert tally.seen[met] > 0, met


@pytest.mark.parametrize("name", TINY)
def test_random_scenarios(models, name):
    tally = search(models[name], SCENARIOS[name], SEED)
    none_differ(tally)
    assert tally.seen["scenarios"] == SCENARIOS[name]
    if name == "mixed-u3":  # enough of them to meet nearly everything
        assert sum(times > 0 for times in tally.seen.values()) >= 7, tally.seen
        every = Play(models[name], EVERYTHING).run()
        none_differ(every)
        assert len(every.seen) == 10 and all(every.seen.values()), every.seen
        repeating = Play(models[name], REPEATING).run()
        none_differ(repeating)
        assert repeating.seen[RIGHT.format(TEXT)] > 10 and repeating.seen[WRONG.format(TEXT)], repeating.seen


def test_a_way_must_meet_what_it_is_about(models):
    """Else it would show nothing, and say that nothing differs."""
    idle = Way("roomy", {"block_size": 16}, meets=(PREEMPTED,))
    with pytest.raises(Idle, match="roomy: no preemptions"):
        run_way(models["mixed-u3"], idle, SEED)
    narrow = Way("narrow", {"max_num_seqs": 2}, batch=3)
    with pytest.raises(Idle, match="narrow: no plan sampled for more than 2"):
        run_way(models["mixed-u3"], narrow, SEED)


@pytest.mark.skipif(
    not machine.supported(), reason="operations of our own do not serve here: torch's do anyway"
)
@pytest.mark.parametrize("name", ["int4-u8", "mixed-u3"])
def test_by_torchs_operators(tiny, monkeypatch, name):
    """What serves where there is no AMX."""
    monkeypatch.setattr(machine, "supported", lambda: False)
    model, tally = Model(tiny(context=CONTEXT, **TINY[name])), Tally()
    assert ".native" not in numerics(model.opened)
    for way in list(ways(model))[1 :: 6 if model.units == 8 else 4]:
        tally.take(run_way(model, way, SEED))
    none_differ(tally)


def test_engines_that_are_lost(models):
    tally = run_replicas(models["int4-u8"], SEED)
    none_differ(tally)
    assert tally.seen["replies carried to another engine"] > 20


@pytest.mark.cluster
def test_on_ray(models, local_ray):
    """Eight units on three ranks, each a process."""
    none_differ(run_cluster(models["int4-u8"], 3, SEED))


@pytest.mark.parametrize("file", ["stories260K.f32", "stories260K-pad256.Q4_K_M"])
def test_a_trained_model(file):
    model = Model(fixture_path(f"stories260K/{file}.gguf"), every=3)
    tally = Tally()
    for way in list(ways(model))[:: 3 if "f32" in file else 4]:
        tally.take(run_way(model, way, SEED))
    tally.take(run_gateway(model))
    tally.take(search(model, 5, SEED))
    none_differ(tally)


LARGE = {
    "in batches of 3",
    "chunks of 7",
    "preempted again and again",
    "prefix cache, evicted all the time",
    "resumed after every number of tokens",
    "3 ranks",
}


@pytest.mark.slow
def test_smollm2(smollm2):
    large(smollm2)


@pytest.mark.slow
def test_padded_smollm2():
    large(fixture_path("smollm2/smollm2-135m-pad768.Q4_K_M.gguf"))


def large(path: Path) -> None:
    model, tally = Model(path, every=5, longest=5, context=LARGE_CONTEXT), Tally()
    for way in ways(model):
        if way.name in LARGE:
            tally.take(run_way(model, way, SEED))
    assert tally.seen["ways"] == len(LARGE)
    tally.take(search(model, 2, SEED))
    none_differ(tally)


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(700)  # a minute, where nothing else runs: all ways, a gateway, and a Ray of its own
def test_the_command(models, tmp_path):
    """It ends with the one line, and its record says the same."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "tests.conformance", "--model", str(models["mixed-u3"].path)),
            *("--scenarios", "40", "--seed", "7", "--record", str(tmp_path / "record.json")),
        ],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'proto'}"},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert lines[0] == "seed 7"
    assert lines[-1].startswith("conformance: ") and lines[-1].endswith(" runs compared, 0 bits differ")
    assert f'"runs": {lines[-1].split()[1]}' in (tmp_path / "record.json").read_text()


def test_bits_are_counted():
    top = (TokenLogprob(3, -0.25),)
    reply = Reply((3, 7), (-0.25, None), (top, ()), FinishReason.LENGTH, None)
    items = encode_reply(reply)
    assert differing_bits(items, encode_reply(reply)) == 0
    (above,) = struct.unpack(
        "<d", (struct.unpack("<Q", struct.pack("<d", -0.25))[0] + 1).to_bytes(8, "little")
    )
    changed = Reply((3, 7), (above, None), (top, ()), FinishReason.LENGTH, None)
    assert differing_bits(encode_reply(changed), items) == 1
    zeros = [Reply((3,), (zero,), ((),), FinishReason.LENGTH, None) for zero in (0.0, -0.0)]
    assert differing_bits(*map(encode_reply, zeros)) == 1
    assert differing_bits(items[:1], items) > 0
    assert differing_bits(encode_reply(reply, whole=False), items[:2]) == 0
    tally = Tally()
    tally.compare("r", items, items)
    tally.compare("s", items[:2], items)
    assert (tally.runs, len(tally.differences)) == (2, 1)
    assert tally.line() == f"conformance: 2 runs compared, {tally.bits} bits differ"
