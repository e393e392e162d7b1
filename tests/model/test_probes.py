"""Probes stand still where bits do, and move where a library's choice changes them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from runtime.model import probes
from runtime.model.numerics import numerics_name
from runtime.model.probes import host_probes, host_results, torch_results
from tests.bits import torch_threads
from tests.model.dispatch import digest
from tests.support import REPOSITORY

CHOOSING = (
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    "ONEDNN_MAX_CPU_ISA",
    "NPY_DISABLE_CPU_FEATURES",
    "GLIBC_TUNABLES",
)
HOST = (
    "exp",
    "log",
    "cos and sin",
)  # operations of tests/model/dispatch.py that the host computes for a GPU too


def results() -> dict[str, str]:
    return {name: digest(value) for name, value in {**host_results(), **torch_results()}.items()}


def process(**environment: str) -> dict:
    """What a new process says of itself."""
    kept = {name: value for name, value in os.environ.items() if name not in CHOOSING}
    done = subprocess.run(
        [sys.executable, "-m", "tests.model.dispatch"],
        cwd=REPOSITORY, env=kept | environment, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def plain() -> dict:
    return process()


def test_threads_repetition_and_memory_do_not_matter():
    wanted = results()
    junk = []
    for threads in (1, 2, 4):
        with torch_threads(threads):
            for size in (1, 77, 4099):
                junk.append(torch.ones(size))  # the next tensors lie elsewhere
                assert results() == wanted, threads


def test_other_threads_at_work_do_not_matter():
    wanted = results()
    with ThreadPoolExecutor(2) as pool:
        assert all(found == wanted for found in pool.map(lambda _: results(), range(4)))


@pytest.mark.parametrize(
    "environment",
    [
        {"OMP_NUM_THREADS": "1", "MALLOC_PERTURB_": "90"},
        {"OMP_NUM_THREADS": "3", "OMP_WAIT_POLICY": "passive", "MKL_NUM_THREADS": "2"},
    ],
    ids=str,
)
def test_another_process_says_the_same(plain, environment):
    found = process(**environment)
    assert found == plain | {"computed": found["computed"]}


@pytest.mark.parametrize(
    "environment",
    [
        {"MKL_CBWR": "AVX2"},
        {"MKL_CBWR": "COMPATIBLE"},
        {"MKL_ENABLE_INSTRUCTIONS": "AVX2"},
        {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
        {"NPY_DISABLE_CPU_FEATURES": "X86_V4 AVX512_ICL AVX512_SPR"},
        {"GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX2,-FMA,-AVX2_Usable,-FMA_Usable"},
    ],
    ids=str,
)
def test_other_bits_have_another_name(plain, environment):
    found = process(**environment)
    differing = [name for name, bits in found["computed"].items() if bits != plain["computed"][name]]
    if not differing:
        pytest.skip("nothing computes otherwise here with that variable")
    assert found["name"] != plain["name"], differing
    if set(differing) & set(HOST):
        assert found["host"] != plain["host"], differing


@pytest.mark.parametrize("variable, value", [("MKL_ENABLE_INSTRUCTIONS", "AVX2"), ("MKL_CBWR", "COMPATIBLE")])
def test_one_name_where_threads_change_bits(variable, value):
    """MKL's other code divides sums among threads."""
    one, two, four = (process(**{variable: value, "OMP_NUM_THREADS": threads}) for threads in "124")
    assert one["name"] == two["name"] == four["name"]


def test_products_are_nothing_but_the_rounding_of_their_sums():
    for name, value in torch_results().items():
        if "product" in name or "attention" in name:
            assert value.isfinite().all(), name
            assert (value != 0).double().mean() > 0.5, name
            assert value.abs().max() < (2 if "bf16" in name or "bfloat16" in name else 0.5), name


def other_order(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return real_linear(x.flip(1).contiguous(), w.flip(1).contiguous())


def other_exp(x, out=None):
    """One value of a thousand with another last bit."""
    y = real_exp(x)
    y[::1000] = np.nextafter(y[::1000], 1)
    return y


real_linear, real_exp = torch.nn.functional.linear, np.exp


@pytest.mark.parametrize(
    ("where", "name", "other"), [(torch.nn.functional, "linear", other_order), (np, "exp", other_exp)]
)
def test_another_order_or_last_bit_shows(monkeypatch, where, name, other):
    """Where no library has a choice: the same by hand."""
    before = results()
    monkeypatch.setattr(where, name, other)
    after = results()
    changed = [key for key in before if before[key] != after[key]]
    assert changed and all(
        ("fp32 product" if name == "linear" else "exp") in key or "sum" in key for key in changed
    )


def test_a_name_holds_the_probes_which_run_once(monkeypatch):
    def name() -> str:
        return numerics_name(dtype=torch.bfloat16, dense=frozenset(), units=3, quantize=None)

    device, version, sources, probed, types, units = name().split("/")
    assert device.startswith("cpu.") and version.startswith("torch") and (types[:4], units) == ("bf16", "u3")
    assert len(sources) == 8 and probed == f"p{probes.probes()}" and len(probed) == 9
    assert host_probes() != probes.probes()
    monkeypatch.setattr(probes, "torch_results", lambda: 1 / 0)
    monkeypatch.setattr(probes, "host_results", lambda: 1 / 0)
    assert name().split("/")[3] == probed
