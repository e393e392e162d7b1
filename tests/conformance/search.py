"""Random scenarios by hypothesis: so many from a seed, the first that differs shrunk to a small one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from hypothesis import strategies as st

from tests.conformance.compare import Tally
from tests.conformance.models import Model
from tests.conformance.scenario import Arrival, Play, Scenario


class OutOfTime(BaseException):
    """Not an Exception: hypothesis lets it through at once, as it does an interrupt."""


class Different(AssertionError):
    """A scenario with a bit that differs."""


def scenarios(model: Model) -> st.SearchStrategy[Scenario]:
    """Engines that can serve each of the requests alone, however tight; arrivals in any order."""

    def arrivals(requests: list[int], latest: int) -> st.SearchStrategy[Arrival]:
        return st.builds(
            Arrival,
            request=st.sampled_from(requests),
            at=st.integers(0, latest),
            choices=st.sampled_from([1, 1, 1, 1, 2, 3]),
            known=st.sampled_from([0, 0, 0, *range(1, 8)]),
            leaves=st.sampled_from([0, 0, 0, 0, 1, 4]),
            scores=st.sampled_from([False] * 7 + [True]),
            priority=st.sampled_from([0, 0, 0, 1]),
            salt=st.sampled_from(["", "", "", "a"]),
        )

    @st.composite
    def draw_one(draw) -> Scenario:
        any_request = list(range(len(model.requests)))
        # Sequences that grow to several times what they began with: in a small room they take it from each
        # other, again and again.
        by_growth = sorted(any_request, key=lambda i: len(model.requests[i].prompt))
        # Every number of ranks, the small ones twice as often.
        ranks = sorted([*range(1, model.units + 1), *range(1, min(3, model.units) + 1)])
        tight = draw(st.sampled_from([False, True]))  # so often, since few of them are short in the end
        if tight:
            crowd, block = 0, 4
            coming = draw(st.lists(arrivals(by_growth[:6], 3), min_size=1, max_size=9))
        else:
            crowd = draw(st.sampled_from([0] * 16 + [16, 58]))  # rarely, for it takes the longest
            block = draw(st.sampled_from([64, 16, 8, 4]))
            coming = draw(st.lists(arrivals(any_request, 12), min_size=1, max_size=6))
        asked = [model.requests[i % len(model.requests)] for i in range(crowd)]
        asked += [model.requests[a.request] for a in coming]
        largest = max(-(-(len(r.prompt) + r.params.max_tokens) // block) for r in asked)
        begun = sum(-(-len(r.prompt) // block) for r in asked)
        rooms = [begun, begun + 1, begun // 2, 0] if tight else [16 * model.context // block, begun]
        rooms += [] if crowd else [0]
        draft = draw(st.sampled_from(["", "", "plan", "right", "doubtful"]))
        return Scenario(
            tp=draw(st.sampled_from(ranks)),
            pp=1 if draft in ("right", "doubtful") else draw(st.sampled_from([1, 1, 2])),
            block_size=block,
            total_blocks=max(largest, draw(st.sampled_from(rooms))),
            max_num_seqs=64 if tight else draw(st.sampled_from([64, 8, 3, 2])),
            max_step_tokens=draw(st.sampled_from([512, 256, 100, 40])),
            max_chunk=draw(st.none() | st.integers(8, 100)),
            prefix_cache=draw(st.sampled_from([True, True, False])),
            draft_tokens=draw(st.sampled_from([8, 8, 3, 0])),
            draft=draft,
            steps_in_flight=draw(st.sampled_from([2, 1, 3])),
            crowd=crowd,
            arrivals=tuple(coming),
        )

    return draw_one()


def search(
    model: Model, count: int, seed_number: int, *, shrink: bool = True, until: float | None = None
) -> Tally:
    """Play `count` scenarios, or as many as it takes to find one that differs, or as begin before `until` on
    the monotonic clock. If one differs, the tally counts the
    bits of the smallest one found, and its lines show it and its plans."""
    tally, found = Tally(), []

    @seed(seed_number)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink] if shrink else [Phase.generate],
        verbosity=Verbosity.quiet,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )
    @given(scenarios(model))
    def explore(scenario: Scenario) -> None:
        if until is not None and time.monotonic() >= until and not found:
            raise OutOfTime
        play = Play(model, scenario)
        outcome = play.run()
        if outcome.bits:
            found.append((scenario, outcome, play.trace))
            raise Different(outcome.differences[0])
        if not found:
            tally.take(outcome)

    try:
        explore()
    except OutOfTime:
        pass
    except Exception:
        if not found:
            raise
        scenario, outcome, trace = min(found, key=lambda f: _size(f[0], f[2]))
        tally.take(replace(outcome, differences=[]))
        tally.differences.append("\n".join([*outcome.differences, str(scenario), *trace]))
    return tally


def _size(scenario: Scenario, trace: Sequence[str]) -> tuple[int, int]:
    return len(scenario.arrivals) + scenario.crowd, len(trace)
