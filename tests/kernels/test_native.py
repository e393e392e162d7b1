"""What `kernels.native` compiles: values, loops and branches do what they say; bad code is refused."""

from __future__ import annotations

import pytest
import torch

from kernels.native import machine
from kernels.native.ir import FLOATS, Function, constant, module
from tests.bits import torch_threads

needs_compiler = pytest.mark.skipif(not machine.supported(), reason="no AMX, or no compiler for it")


def compiled(function: Function) -> machine.Code:
    return machine.compile_and_place(module([function]))[function.name]


@needs_compiler
def test_nested_loops_carry_values():
    """out[i] = sum over j < i + 1 of i * j, for i < n."""
    f = Function("sums", {"arguments": "ptr"}, internal=False)
    a = f.arguments({"out": "ptr", "n": "i64"})

    def outer(i, _):
        def inner(j, carried):
            return [carried[0] + i * j]

        (total,) = f.loop(i + 1, inner, [("i64", "0")])
        (a["out"] + i * 8).store(total, 8)

    f.loop(a["n"], outer)
    out = torch.full((10,), -1, dtype=torch.int64)
    compiled(f)(out.data_ptr(), 9, threads=1)
    assert out.tolist() == [i * sum(range(i + 1)) for i in range(9)] + [-1]


@needs_compiler
def test_branches_and_whole_numbers():
    f = Function("pick", {"arguments": "ptr"}, internal=False)
    a = f.arguments({"out": "ptr", "x": "i64"})
    f.when(f.compare("slt", a["x"], 5), lambda: a["out"].store(a["x"].minimum(3) * 10, 8))
    (a["out"] + 8).store(a["x"] % 4 + a["x"] // 4 - 1, 8)
    for x, want in ((2, [20, 1]), (4, [30, 0]), (9, [-1, 2])):
        out = torch.full((2,), -1, dtype=torch.int64)
        compiled(f)(out.data_ptr(), x, threads=1)
        assert out.tolist() == want


@needs_compiler
def test_every_thread_takes_part():
    f = Function("count", {"arguments": "ptr"}, internal=False)
    a = f.arguments({"out": "ptr", "number": "ptr", "count": "ptr"})
    number, count = (
        f.emit("i64", f"zext i32 {f.emit('i32', f'call i32 {a[name]}()')} to i64")
        for name in ("number", "count")
    )
    (a["out"] + number * 8).store(count, 8)
    code = compiled(f)
    for threads in (1, 2, 4):
        out = torch.zeros(4, dtype=torch.int64)
        with torch_threads(threads):
            code(out.data_ptr(), code.thread_number, code.thread_count)
        assert out.tolist() == [threads] * threads + [0] * (4 - threads)


@needs_compiler
def test_constants_are_placed_too():
    """A vector that no instruction can hold lies in a section of its own."""
    f = Function("write", {"arguments": "ptr"}, internal=False)
    a = f.arguments({"x": "ptr"})
    order = constant("i32", [(7 * lane) % 16 for lane in range(16)])
    x = a["x"].load(FLOATS, 4)
    x = f.emit(FLOATS, f"shufflevector {FLOATS} {x}, {FLOATS} {x}, <16 x i32> {order}")
    a["x"].store(f.floats("fmul", x, f.splat(0.1)), 4)
    values = torch.arange(16.0)
    code = compiled(f)
    code(values.data_ptr(), threads=1)
    assert values.tolist() == (torch.arange(16.0)[[(7 * lane) % 16 for lane in range(16)]] * 0.1).tolist()


@needs_compiler
def test_code_that_refers_to_something_else_is_refused():
    text = "declare void @elsewhere()\ndefine void @f() {\n call void @elsewhere()\n ret void\n}\n"
    with pytest.raises(ValueError, match="elsewhere"):
        machine.compile_and_place(text)


@pytest.mark.parametrize("lacks", ["_llvm", "_threads", "amx"])
def test_whatever_is_missing_is_answered_with_no(monkeypatch, lacks):
    def missing(*_):
        raise AttributeError("LLVMInitializeX86Target")

    if lacks == "amx":
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    else:
        monkeypatch.setattr(machine, lacks, missing)
    assert machine.supported.__wrapped__() is False
