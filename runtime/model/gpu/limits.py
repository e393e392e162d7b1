"""Which models and block sizes the kernels take, said before weights are read.

Standard library alone: headers are opened where there is neither torch nor Triton. The kernels refuse the
same by themselves (tests/gpu/test_limits.py holds the two together), a request at a time and too late.
"""

from __future__ import annotations

from runtime.errors import InvalidArgument, UnsupportedModel
from runtime.model.spec import ModelSpec

WIDEST_HEAD = 256  # head_dim, in steps of 8
MOST_SHARERS = 64  # query heads that read one KV head
WIDEST = 32_768  # hidden
MOST_TOKENS = 1 << 20  # vocabulary
BLOCK_SIZES = (16, 32, 64, 128)


def check_spec(file: str, spec: ModelSpec) -> None:
    """Raises UnsupportedModel naming the dimension that no kernel takes."""
    sharers = spec.heads // spec.kv_heads
    for name, value, fits, wanted in (
        ("head_dim", spec.head_dim, 8 <= spec.head_dim <= WIDEST_HEAD and spec.head_dim % 8 == 0,
         f"a multiple of 8 up to {WIDEST_HEAD}"),
        ("heads a KV head", sharers, sharers <= MOST_SHARERS, f"at most {MOST_SHARERS}"),
        ("hidden", spec.hidden, spec.hidden <= WIDEST, f"at most {WIDEST:,}"),
        ("vocab", spec.vocab, spec.vocab <= MOST_TOKENS, f"at most {MOST_TOKENS:,}"),
    ):  # fmt: skip
        if not fits:
            raise UnsupportedModel(f"{file}: {name} is {value:,}; on a GPU it must be {wanted}: --device cpu")


def check_block_size(block_size: int) -> None:
    """Raises InvalidArgument for a KV block that attention cannot read."""
    if block_size not in BLOCK_SIZES:
        sizes = ", ".join(map(str, BLOCK_SIZES))
        raise InvalidArgument("block-size", f"{block_size} is none of {sizes}, which GPUs take")
