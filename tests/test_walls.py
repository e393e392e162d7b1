"""Holds the walls between the parts of the project: who may import whom, function-level imports included."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.imports import OURS, Modules, imports_of, under
from tests.support import REPOSITORY

ROOTS = {REPOSITORY: ("runtime", "kernels"), REPOSITORY / "proto": ("tramontane",)}
PLAIN = ("runtime.errors", "runtime.types", "runtime.config")
NUMERIC = ("runtime.weights", "runtime.sampling", "runtime.model")
NUMERIC_LIBRARIES = {"torch", "triton", "numpy", "safetensors"}
IMPURE = {
    "asyncio", "datetime", "io", "logging", "multiprocessing", "os", "pathlib", "queue", "random", "secrets",
    "select", "shutil", "signal", "socket", "subprocess", "sys", "tempfile", "threading", "time", "uuid",
}  # fmt: skip


def breaches(modules: Modules) -> list[str]:
    """Every import that a wall forbids, as one line each."""
    found: list[str] = []

    def forbid(module: str, names: set[str], why: str) -> None:
        found.extend(f"{module} imports {name}: {why}" for name in sorted(names))

    def beyond(allowed: tuple[str, ...]) -> set[str]:
        return {name for name in project if not under(name, allowed)}

    for module in modules.files:
        imported = modules.imports[module]
        tops = {name.partition(".")[0] for name in imported}
        project = modules.inside(module) - {"runtime"}
        forbid(module, tops & {"?"}, "not a name that can be checked")
        forbid(module, tops & {"pickle", "cloudpickle", "marshal", "shelve"}, "nothing is ever pickled")
        forbid(module, tops & {"transformers", "tests", "gguf"}, "not at run time")
        if not under(module, ("runtime.cluster",)):
            forbid(module, tops & {"ray"}, "Ray appears in runtime/cluster only")
        if not under(module, ("runtime.server", "tramontane")):
            grpc = {top for top in tops if top.startswith("grpc")}
            forbid(module, grpc, "gRPC appears in runtime/server and proto only")
        if under(module, ("kernels",)):
            forbid(module, modules.outside(module) - {"torch", "triton"}, "torch and triton alone")
            forbid(module, beyond(("kernels",)), "kernels stands alone")
        if under(module, PLAIN):
            forbid(module, modules.outside(module), "standard library only")
            forbid(module, beyond(PLAIN), "stands alone")
        if under(module, NUMERIC):
            forbid(module, modules.outside(module) - NUMERIC_LIBRARIES, "not a library of this part")
            allowed = (*NUMERIC, *PLAIN, "kernels")
            forbid(module, beyond(allowed), "not its to know")
        if under(module, ("runtime.engine",)):
            forbid(module, modules.outside(module) | tops & IMPURE, "the engine is pure")
            allowed = (*PLAIN, "runtime.engine")
            forbid(module, beyond(allowed), "the engine is pure")
        if under(module, ("tramontane",)):
            forbid(module, tops & {"runtime", "kernels", "torch", "ray"}, "a client needs the contract alone")
    for module in modules.within("kernels", *NUMERIC, *PLAIN, "runtime.engine"):
        reached = set().union(*(modules.outside(name) for name in modules.reached(module)))
        forbid(module, reached & {"ray", "grpc", "msgspec"}, "not even through another module")
    return found


@pytest.fixture(scope="module")
def modules() -> Modules:
    return Modules(ROOTS)


def test_every_part_is_looked_at(modules):
    for package in (*PLAIN, *NUMERIC, "runtime.engine", "runtime.cluster", "runtime.server", "kernels"):
        assert modules.within(package), package
    assert all(top in {name.partition(".")[0] for name in modules.files} for top in OURS)


def test_nobody_climbs_a_wall(modules):
    assert breaches(modules) == []


def test_engine_does_no_io_of_its_own(modules):
    for module in modules.within("runtime.engine"):
        tree = ast.parse(modules.files[module].read_text())
        called = {
            n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
        }
        assert not called & {"open", "print", "input", "eval", "exec", "hash"}, module


def test_nothing_unpickles_through_torch(modules):
    for module, path in modules.files.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in {("torch", "load"), ("torch", "save")}, module
                assert node.attr != "load" or not node.value.id.endswith("pickle"), module


PLANTED = {
    "kernels/bad.py": "def f():\n    import numpy\n",
    "kernels/knows.py": "from runtime.types import Request\n",
    "runtime/types.py": "import torch\n",
    "runtime/weights/bad.py": "def f():\n    from ray import get\n",
    "runtime/model/bad.py": "from runtime import loop\n",
    "runtime/model/wire.py": "from ..wire import messages\n",
    "runtime/sampling/bad.py": "import importlib\nimportlib.import_module('msgspec')\n",
    "runtime/sampling/worse.py": "import importlib\nimportlib.import_module(f())\n",
    "runtime/engine/clock.py": "import time\n",
    "runtime/engine/torch.py": "class A:\n  def f(self):\n    if 1:\n      import torch.nn as nn\n",
    "runtime/engine/model.py": "from runtime.model.units import rank_units\n",
    "runtime/local.py": "import ray.util as u\n",
    "runtime/commands/serve.py": "import grpc.aio\n",
    "runtime/cluster/codec.py": "from pickle import loads\n",
    "proto/tramontane/client.py": "import runtime.types\n",
}


@pytest.mark.parametrize("file", PLANTED)
def test_a_planted_breach_is_found(tmp_path: Path, file: str):
    package = file.removeprefix("proto/")
    sound = {
        "kernels/a.py": "import torch, triton\nimport math\n",
        "runtime/__init__.py": "",
        "runtime/loop.py": "import queue\nfrom runtime.engine import a\n",
        "runtime/wire/messages.py": "import msgspec\n",
        "runtime/engine/__init__.py": "from dataclasses import dataclass\n",
        "runtime/engine/a.py": "from runtime import types\nfrom . import b\n",
        "runtime/engine/b.py": "import heapq\n",
        "runtime/types.py": "import enum\n",
        "runtime/model/a.py": "import torch, numpy\nfrom kernels.a import x\nfrom runtime.types import y\n",
        "runtime/model/units.py": "",
        "runtime/cluster/a.py": "import ray\n",
        "proto/tramontane/__init__.py": "import grpc\n",
    }
    for name, text in sound.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    roots = {tmp_path: ("runtime", "kernels"), tmp_path / "proto": ("tramontane",)}
    assert breaches(Modules(roots)) == []
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(PLANTED[file])
    found = breaches(Modules(roots))
    module = package.removesuffix(".py").replace("/", ".")
    assert found and any(line.startswith(f"{module} imports ") for line in found)


def test_a_breach_through_another_module_is_found(tmp_path: Path):
    for name, text in {
        "kernels/__init__.py": "",
        "runtime/errors.py": "import msgspec\n",
        "runtime/engine/a.py": "from runtime.errors import E\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = breaches(Modules({tmp_path: ("runtime", "kernels")}))
    assert any(line.startswith("runtime.engine.a imports msgspec") for line in found)


def test_relative_and_nested_imports_are_read():
    source = "from . import a\nfrom ..x.y import z\nif 0:\n  try:\n    import q.r\n  finally:\n    pass\n"
    assert imports_of(source, "p.s.t") == {"p.s", "p.s.a", "p.x.y", "p.x.y.z", "q.r"}
    assert imports_of("from . import a", "p.s", package=True) == {"p.s", "p.s.a"}
    assert imports_of("from __future__ import annotations", "m") == {"__future__", "__future__.annotations"}


@pytest.mark.parametrize(
    ("wanted", "kept_out"),
    [
        (
            ["runtime.server.pipeline", "runtime.server.grpc_service", "runtime.server.lifecycle"],
            ["torch", "ray"],
        ),
        (["runtime.tokenizer", "runtime.weights.gguf"], ["torch", "ray", "grpc", "msgspec"]),
        (["runtime.wire.gateway_channel"], ["torch", "ray", "grpc"]),
        (["tramontane"], ["torch", "ray", "runtime", "msgspec"]),
        (["runtime.engine"], ["torch", "numpy", "ray", "grpc", "msgspec"]),
        (
            ["runtime.model.runner", "runtime.model.load"],
            ["ray", "grpc", "msgspec", "sentencepiece", "tokenizers"],
        ),
        (["runtime.local"], ["ray", "grpc", "msgspec"]),
    ],
    ids=lambda value: value[0],
)
def test_what_a_process_loads(wanted, kept_out):
    """What really gets imported, in a fresh interpreter: a gateway loads no torch, a rank no gRPC."""
    code = (
        f"import sys, importlib\nfor name in {wanted!r}: importlib.import_module(name)\n"
        f"print(*[name for name in {kept_out!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""
