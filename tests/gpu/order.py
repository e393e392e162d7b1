"""Prints how add_norm's sum of squares is laid out, a JSON line a compilation: `python -m tests.gpu.order`.

The order of a sum follows from the layout of its operand, so equal layouts are equal orders. `wide`
counts its loads of 16 bytes a thread, `loads` all."""

from __future__ import annotations

import json
import os
import re

os.environ.pop("TRITON_INTERPRET", None)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.gpu.norm import add_norm_kernel, block_of, warps_of

_TYPES = {"residual_ptr": "*fp32", "partials_ptr": "*fp32", "weight_ptr": "*fp32", "eps": "fp32"}


def compiled(width: int, count: int, stride: str, aligned: bool) -> dict:
    names = add_norm_kernel.arg_names
    constants = {"S": count, "H": width, "BLOCK": block_of(width), "NORM": True}
    types = {**_TYPES, "out_ptr": "*fp16", "stride": stride}
    divisible = [n for n in names if n.endswith("_ptr") or (n == "stride" and aligned)]
    source = ASTSource(
        fn=add_norm_kernel,
        signature={n: types.get(n, "constexpr") for n in names},
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in divisible},
    )
    options = {"num_warps": warps_of(width), "num_stages": 1, "enable_fp_fusion": False}
    target = GPUTarget("cuda", 90, 32)
    code = triton.compile(source, target=target, options=options).asm
    sums = re.findall(r"\) : \(tensor<[^,>]+, (#\w+)>\) -> f32", code["ttgir"])
    assert len(sums) == 1, sums
    return {
        "width": width,
        "layout": re.search(rf"^{sums[0]} = (.*)$", code["ttgir"], re.MULTILINE)[1],
        "wide": len(re.findall(r"ld\.global\S*\.v4\.b32", code["ptx"])),
        "loads": len(re.findall(r"ld\.global", code["ptx"])),
    }


def main() -> None:
    for width in (8192, 301):
        # No partial sums, one, many; strides that are wide, or multiples of 16 where the width is not.
        for count, stride in ((0, "i32"), (1, "i64"), (3, "i32"), (8, "i32")):
            aligned = width % 16 == 0 or count == 8
            print(json.dumps(compiled(width, count, stride, aligned)), flush=True)


if __name__ == "__main__":
    main()
