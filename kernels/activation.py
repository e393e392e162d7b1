"""The gated activation of the feed-forward network: silu(gate) * up."""

from __future__ import annotations

import torch

from kernels.native import machine, rows

_SERIAL = 32768  # torch runs a pointwise loop of at most so many elements on one thread
_LANES = 64  # a vector loop over a multiple of this leaves no scalar tail


def silu_mul(gate: torch.Tensor, up: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """out = silu(gate) * up, all [..., C] of one type, bf16 or fp32.

    bf16: silu rounds to the same bits in torch's vector loop and in its scalar tail for every one of the
    65,536 inputs (a test goes through them), so the shape does not matter. fp32: it does not, so the loop
    is given shapes that have no tail and run on one thread.
    """
    if gate.dtype == torch.bfloat16:
        return torch.mul(torch.nn.functional.silu(gate), up, out=out)
    flat = gate.reshape(-1)
    size = flat.numel()
    padded = flat.new_zeros(-(-size // _LANES) * _LANES)
    padded[:size] = flat
    for at in range(0, padded.numel(), _SERIAL):
        piece = padded[at : at + _SERIAL]
        piece.copy_(torch.nn.functional.silu(piece))
    return torch.mul(padded[:size].view(gate.shape), up, out=out)


def gate(both: torch.Tensor, out: torch.Tensor) -> None:
    """`silu_mul` of the halves of `both` [M, 2 * C], the gate before the up -> out [M, C].

    Which operation serves must not hang on C, a rank's share: they differ in subnormals."""
    width = out.shape[1]
    if out.dtype != torch.bfloat16 or not machine.supported():
        silu_mul(both[:, :width], both[:, width:], out=out)
        return
    over = -width % rows.LANES
    if not over:
        rows.gate(both, out)
        return
    padded = torch.nn.functional.pad(both.view(-1, 2, width), (0, over)).view(both.shape[0], -1)
    wide = out.new_empty(out.shape[0], width + over)
    rows.gate(padded, wide)
    out.copy_(wide[:, :width])
