"""Streams slices of a checkpoint into tensors: several threads read ahead, one slice is handed out at a time.

Reads exactly the ranges that `plan` makes, with preadv into buffers of its own; keeps no file mapped. Knows
neither ranks nor devices: what it yields lies in host memory.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from runtime.errors import BadModelFile
from runtime.weights.checkpoint import Checkpoint, check_tensor, open_to_read
from runtime.weights.formats import TensorType
from runtime.weights.packed import PackedInfo
from runtime.weights.plan import ByteRange, Read, Slice, SlicePlan, plan_reads, plan_slice
from runtime.weights.planar import Planar, from_gguf_bytes
from runtime.weights.quantize import quantize_int4
from runtime.weights.repack import repack

__all__ = ["LoadReport", "Loader", "Slice", "check_tensor", "load", "plan_reads"]

READ_BYTES = 8 << 20  # of one task: a few of them hide a disk's latency, and the buffers stay small
READ_AHEAD = 64 << 20  # bytes that may be in flight or wait beside the slice in hand
_DTYPES = {
    TensorType.F32: torch.float32,
    TensorType.F16: torch.float16,
    TensorType.BF16: torch.bfloat16,
}


@dataclass(frozen=True, slots=True)
class LoadReport:
    """`bytes_read` were asked of files and came; `seconds` is from the first read to the last slice handed
    out, repacking by us and by the caller included."""

    bytes_read: int
    seconds: float

    @property
    def bytes_per_second(self) -> float:
        return self.bytes_read / self.seconds if self.seconds else 0.0


class Loader:
    """An iterator over (slice, weights), in the order asked. `report` holds the numbers once it is exhausted
    (None before)."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        slices: Iterable[Slice],
        *,
        threads: int = 4,
        quantize: Literal["int4"] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ):
        if quantize not in (None, "int4"):
            raise ValueError(f"quantize: {quantize!r} is not int4")
        self._plans = [plan_slice(checkpoint, wanted, quantize) for wanted in slices]
        self._threads, self._progress = threads, progress
        self.total_bytes = sum(plan.total for plan in self._plans)
        self.report: LoadReport | None = None
        self._iterator = self._run()

    def __iter__(self) -> Iterator[tuple[Slice, torch.Tensor | Planar]]:
        return self._iterator

    def __next__(self) -> tuple[Slice, torch.Tensor | Planar]:
        return next(self._iterator)

    def _run(self) -> Iterator[tuple[Slice, torch.Tensor | Planar]]:
        started, done, in_flight = time.perf_counter(), 0, 0
        waiting = deque(self._plans)
        reading: deque[tuple[SlicePlan, dict[str, np.ndarray], list[Future[int]]]] = deque()
        names = (read.range.file for plan in self._plans for read in plan.reads.values())
        with ExitStack() as stack:
            files = {file: open_to_read(file, stack) for file in dict.fromkeys(names)}
            pool = stack.enter_context(ThreadPoolExecutor(self._threads, "weights-read"))
            stack.callback(pool.shutdown, wait=True, cancel_futures=True)
            while waiting or reading:
                while waiting and (not reading or in_flight + waiting[0].total <= READ_AHEAD):
                    plan = waiting.popleft()
                    buffers = {
                        part: np.empty(read.range.total, np.uint8) for part, read in plan.reads.items()
                    }
                    tasks = [
                        pool.submit(_read, files[piece.file], piece, buffers[part][at : at + piece.total])
                        for part, read in plan.reads.items()
                        for at, piece in _pieces(read.range)
                    ]
                    reading.append((plan, buffers, tasks))
                    in_flight += plan.total
                plan, buffers, tasks = reading.popleft()
                done += sum(task.result() for task in tasks)
                in_flight -= plan.total
                weights = _convert(plan, buffers)
                del buffers, tasks  # so that only the caller holds the slice while it repacks
                if self._progress:
                    self._progress(done, self.total_bytes)
                yield plan.slice, weights
                del weights
        self.report = LoadReport(done, time.perf_counter() - started)


def load(
    checkpoint: Checkpoint,
    slices: Iterable[Slice],
    *,
    threads: int = 4,
    quantize: Literal["int4"] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Loader:
    """Reads `slices` one after another: each comes as (slice, weights), where weights are

    - a torch tensor of the file's float type, [rows, cols], or [cols] of a vector; or
    - a Planar of the slice, if the file's type is quantised, GPTQ and AWQ too, or `quantize` made it so (see
      `plan.is_quantizable`): int4 groups lie where they do in the whole tensor, however it is cut.

    All slices are checked when this is called (ValueError); BadModelFile if a file has shrunk or fails while
    it is read. progress(bytes done, bytes in all) is called after each slice."""
    return Loader(checkpoint, slices, threads=threads, quantize=quantize, progress=progress)


def _pieces(whole: ByteRange) -> Iterator[tuple[int, ByteRange]]:
    """Cuts a range into tasks of READ_BYTES: (position in the buffer, range)."""
    if whole.count == 1:
        for at in range(0, whole.nbytes, READ_BYTES):
            yield at, ByteRange(whole.file, whole.offset + at, min(READ_BYTES, whole.nbytes - at))
        return
    step = max(1, READ_BYTES // whole.nbytes)
    for run in range(0, whole.count, step):
        count = min(step, whole.count - run)
        offset = whole.offset + run * whole.stride
        yield run * whole.nbytes, ByteRange(whole.file, offset, whole.nbytes, count, whole.stride)


def _read(descriptor: int, part: ByteRange, buffer: np.ndarray) -> int:
    """Fills `buffer` with the runs of `part`; returns the bytes that were read."""
    view, size, offset, total = memoryview(buffer), part.nbytes, part.offset, 0
    try:
        for at in range(0, part.total, size):
            got = os.preadv(descriptor, (view[at : at + size],), offset)
            while got < size:  # a signal, the end of a file, or more than the kernel gives at once
                more = os.preadv(descriptor, (view[at + got : at + size],), offset + got)
                if more == 0:
                    raise BadModelFile(part.file, "", f"ends at byte {offset + got}: it shrank after opening")
                got += more
            total += got
            offset += part.stride
    except OSError as error:
        raise BadModelFile(part.file, "", f"cannot be read: {error.strerror or error}") from None
    return total


def _convert(plan: SlicePlan, buffers: dict[str, np.ndarray]) -> torch.Tensor | Planar:
    info, (col, col_stop) = plan.info, plan.slice.cols
    rows = plan.slice.rows[1] - plan.slice.rows[0]
    held = {part: _wanted(read, buffers[part]) for part, read in plan.reads.items()}
    if isinstance(info, PackedInfo):
        return repack(info, plan.slice.rows, plan.slice.cols, held)
    if info.type.quantized:
        return from_gguf_bytes(held[""], info.type, rows, info.cols, col, col_stop)
    dense = torch.from_numpy(held[""]).view(_DTYPES[info.type])
    if not plan.quantize:
        return dense[0] if len(info.shape) == 1 else dense
    try:
        whole = quantize_int4(dense)
    except ValueError as error:
        raise BadModelFile(info.file, info.name, str(error)) from None
    start = col - plan.cols[0]
    cut = (start, start + col_stop - col)
    return whole if cut == (0, whole.cols) else whole.select_cols(*cut)


def _wanted(read: Read, buffer: np.ndarray) -> np.ndarray:
    """What was read, without the gaps: uint8 [rows, bytes], contiguous."""
    shape = (read.rows, read.row_bytes)
    if not read.gap:
        return buffer.reshape(shape)
    steps = (read.row_bytes + read.gap, 1)
    return np.ascontiguousarray(np.lib.stride_tricks.as_strided(buffer, shape, steps, writeable=False))
