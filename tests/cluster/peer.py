"""A rank's process for the tests of exchanges: joins its peers, exchanges what it is told, says what it saw.

    python -m tests.cluster.peer RANK SIZE TOKEN SCRIPT

Prints its address as one line of JSON, reads all addresses as one line, runs the script, prints "done" or
the error. Scripts are the functions below.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from runtime.cluster.gpu_peers import GpuCommunicator
from runtime.cluster.mesh import Mesh, PeerAddress, PeerListener
from runtime.cluster.peers import SocketCommunicator
from runtime.cluster.stage_pipe import StagePipe
from runtime.errors import TramontaneError

SIZES = (0, 1, 1000, 32 * 1024, 32 * 1024 + 1, 100_000, 256 * 1024, 256 * 1024 + 1, 1 << 20, 3_000_001)


def payload(size: int, *key: int) -> torch.Tensor:
    """Bytes that say who sent them, to whom, and in which round."""
    seed = sum(k * 1009**i for i, k in enumerate(key, start=1))
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def expect(got: torch.Tensor, size: int, *key: int) -> None:
    if not torch.equal(got, payload(size, *key)):
        raise AssertionError(f"{key}: {size} bytes did not come as they were sent")


def exchange(comm: SocketCommunicator, of: Sequence[int] = SIZES, rounds: int = 40) -> None:
    """All four operations, in every size and in sizes that differ from rank to rank, many times over."""
    rank, size, ranks = comm.rank, comm.size, range(comm.size)
    mixes = [[n] * size for n in of]
    chosen = torch.Generator().manual_seed(5)
    for _ in range(rounds):
        picks = torch.randint(0, len(of), (size,), generator=chosen).tolist()
        mixes.append([of[pick] for pick in picks])
    for turn, sizes in enumerate(mixes):
        got = comm.all_gather(payload(sizes[rank], turn, rank), sizes)
        for peer in ranks:
            expect(got[peer], sizes[peer], turn, peer)
        out = [payload(sizes[rank] // 2, turn, rank, peer) for peer in ranks]
        got = comm.all_to_all(out, [n // 2 for n in sizes])
        for peer in ranks:
            expect(got[peer], sizes[peer] // 2, turn, peer, rank)
        gathered = comm.gather(payload(sizes[rank], turn, rank), sizes)
        if rank == 0:
            for peer in ranks:
                expect(gathered[peer], sizes[peer], turn, peer)
        elif gathered is not None:
            raise AssertionError("only rank 0 gathers")
        mine = payload(sizes[0], turn) if rank == 0 else None
        expect(comm.broadcast(mine, sizes[0]), sizes[0], turn)


def lose(size: int) -> Callable[[SocketCommunicator], None]:
    """The last rank dies; the others find out in the middle of an exchange of this size."""

    def script(comm: SocketCommunicator) -> None:
        sizes = [size] * comm.size
        comm.all_gather(payload(size, comm.rank), sizes)
        if comm.rank == comm.size - 1:
            os._exit(9)
        started = time.monotonic()
        try:
            for _ in range(100):
                comm.all_gather(payload(size, comm.rank), sizes)
        finally:
            print(json.dumps({"noticed": time.monotonic() - started}), flush=True)

    return script


def pipe(comm: SocketCommunicator, tp: int = 2) -> None:
    """Tensors of every size go down the stages, each stage's neighbours busy with others meanwhile; tokens
    come back; nobody waits for who reads late."""
    ends = StagePipe(comm.mesh, tp)
    within = comm.mesh.rank % tp
    tensors = [(n, rows) for n, rows in enumerate((1, 3, 200, 1100, 5000, 1, 1100, 17))]
    for n, rows in tensors:  # a whole round lies in the pipe before anyone is told anything
        if ends.stage > 0:
            x = ends.receive(rows * 64)
            expect(x.view(-1).view(torch.uint8), rows * 256, n, within)
        if not ends.last:
            ends.send(payload(rows * 256, n, within).view(torch.float32).view(rows, 64))
        else:
            ends.tell(torch.tensor([[n, within]] * rows))
    if not ends.last:
        for n, rows in tensors:
            told = ends.told(wait=True)
            if told.view(-1, 2).tolist() != [[n, within]] * rows:
                raise AssertionError(f"{n}: other tokens were told")


def lose_stage(comm: SocketCommunicator) -> None:
    """The middle stage dies; those before and after it find out."""
    comm.all_gather(payload(1, comm.rank), [1] * comm.size)  # a loss among ranks that still join is another
    ends = StagePipe(comm.mesh, 1)
    if ends.stage == 1:
        os._exit(9)
    started = time.monotonic()
    try:
        ends.receive(1) if ends.last else ends.told(wait=True)
    finally:
        print(json.dumps({"noticed": time.monotonic() - started}), flush=True)
        ends.close()


def by_torch(script: Callable[[SocketCommunicator], None]) -> Callable[[SocketCommunicator], None]:
    """The script over the exchanges of GPU ranks, with gloo and host memory in the place of NCCL's."""
    return lambda comm: script(GpuCommunicator(comm, "gloo", "cpu"))


def stage_by_torch(comm: SocketCommunicator) -> None:
    """As GPU ranks of stages of two: each exchanges with its own alone."""
    first = comm.mesh.rank // 2 * 2
    exchange(GpuCommunicator(SocketCommunicator(comm.mesh, first, 2), "gloo", "cpu"), of=SIZES[:6], rounds=4)


SCRIPTS = {
    "exchange": exchange,
    "pipe": pipe,
    "lose stage": lose_stage,
    "exchange by torch": by_torch(partial(exchange, of=SIZES[:6], rounds=8)),
    "exchange in stages by torch": stage_by_torch,
    "lose large by torch": by_torch(lose(1 << 20)),
    "lose small": lose(1000),
    "lose middle": lose(100_000),
    "lose large": lose(1 << 20),
}


def main() -> None:
    rank, size, token, script = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:5]
    torch.set_num_threads(1)
    listener = PeerListener("127.0.0.1", token)
    print(json.dumps([listener.address.host, listener.address.port]), flush=True)
    addresses = [PeerAddress(*address) for address in json.loads(sys.stdin.readline())]
    assert len(addresses) == size
    comm = SocketCommunicator(Mesh(rank, addresses, listener, token))
    try:
        SCRIPTS[script](comm)
        print("done", flush=True)
    except TramontaneError as error:
        print(f"{type(error).__name__}: {error}", flush=True)
    comm.close()


if __name__ == "__main__":
    main()
