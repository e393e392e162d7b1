"""Connections over real sockets: who may speak, what is carried whole, and how the end is noticed."""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time
from collections.abc import Iterator

import pytest

import runtime.wire.connection as module
from runtime.wire.connection import LENGTH, MAX_FRAME, TURNS, Connection, Listener
from runtime.wire.messages import Hello, WireError, encode

TOKEN = "a secret"
LONG = 60.0  # seconds for what is to happen at once: a loaded machine may stand still for several


@pytest.fixture
def door(monkeypatch) -> Iterator[tuple[Listener, queue.SimpleQueue]]:
    """A listener, and the (hello, connection) pairs it let in."""
    # Whoever is hung up on within LONG is so for what they said, not for the time they took.
    monkeypatch.setattr(module, "HELLO_SECONDS", 10 * LONG)
    let_in: queue.SimpleQueue = queue.SimpleQueue()
    listener = Listener("127.0.0.1", TOKEN, lambda hello, connection: let_in.put((hello, connection)))
    yield listener, let_in
    listener.close()
    while not let_in.empty():
        let_in.get()[1].close()


@contextlib.contextmanager
def dial(listener: Listener) -> Iterator[socket.socket]:
    with socket.create_connection((listener.host, listener.port), timeout=LONG) as sock:
        yield sock


def hung_up(sock: socket.socket) -> bool:
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True


def frame(raw: bytes) -> bytes:
    return LENGTH.pack(len(raw)) + raw


def pair(door) -> tuple[Connection, Connection]:
    listener, let_in = door
    near = Connection.connect(listener.host, listener.port, Hello("gateway", TOKEN, 3))
    hello, far = let_in.get(timeout=LONG)
    assert (hello.role, hello.rank) == ("gateway", 3)
    return near, far


def read_little(connection: Connection) -> None:
    """Have the kernel keep little of what is not read, for else it may keep tens of megabytes."""
    connection.detach().setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)


def test_both_ways(door):
    near, far = pair(door)
    near.send("beat", 1)
    far.send("failed", "no reason")
    assert far.receive() == ("beat", 1) and near.receive() == ("failed", "no reason")


@pytest.mark.parametrize("size", [0, 1, 70_000, 20 << 20])
def test_a_message_of_any_size_comes_whole(door, size):
    near, far = pair(door)
    sender = threading.Thread(target=near.send, args=("failed", "x" * size))
    sender.start()
    assert far.receive() == ("failed", "x" * size)
    sender.join()


def test_messages_from_many_threads_do_not_mix(door):
    near, far = pair(door)

    def send(n: int) -> None:
        for i in range(50):
            near.send("failed", str(n) * (1000 * n + i))

    threads = [threading.Thread(target=send, args=(n,)) for n in range(1, 9)]
    for thread in threads:
        thread.start()
    counts = dict.fromkeys(range(1, 9), 0)
    for _ in range(400):
        _, text = far.receive()
        n = int(text[0])
        assert text == str(n) * (1000 * n + counts[n])  # its own order, nothing in between
        counts[n] += 1
    for thread in threads:
        thread.join()


@pytest.mark.parametrize(
    "first",
    [
        frame(encode("hello", Hello("gateway", "a guess"))),
        frame(encode("hello", Hello("gateway", ""))),
        frame(encode("hello", Hello("gateway", "ä secret"))),
        frame(encode("hello", Hello("gateway", TOKEN, protocol=99))),
        frame(encode("beat", 1)),
        frame(b"no msgpack"),
        frame(b""),
        frame(b"\x92\xa5hello" + b"\x91" * 1000),
        LENGTH.pack(0xFFFFFFFF),
        LENGTH.pack(MAX_FRAME),
        b"GET / HTTP/1.1\r\nHost: here\r\n\r\n",
    ],
    ids=[
        "wrong token", "no token", "beyond ASCII", "another protocol", "no hello", "garbage", "nothing",
        "deep", "huge", "large", "a browser",
    ],
)  # fmt: skip
def test_a_stranger_is_hung_up_on(door, first):
    listener, let_in = door
    with dial(listener) as sock:
        sock.sendall(first)
        assert hung_up(sock)
    assert let_in.empty()
    near, far = pair(door)  # and others are still served
    near.send("beat", 2)
    assert far.receive() == ("beat", 2)


def test_a_stranger_may_not_hold_a_connection(door, monkeypatch):
    """Neither by silence nor by a byte now and then."""
    monkeypatch.setattr(module, "HELLO_SECONDS", 0.5)
    listener, let_in = door
    with dial(listener) as silent, dial(listener) as slow:
        # A hello that is still not whole when LONG is over, however slowly this loop runs.
        started = time.monotonic()
        with contextlib.suppress(OSError):
            slow.sendall(LENGTH.pack(module.HELLO_BYTES))
            while time.monotonic() - started < LONG:
                slow.sendall(b"\x00")
                time.sleep(LONG / module.HELLO_BYTES * 2)
        assert time.monotonic() - started < LONG, "a byte now and then keeps it open"
        assert hung_up(silent) and hung_up(slow)
    assert let_in.empty()


def test_an_oversized_message_is_not_read(door):
    near, far = pair(door)
    near.detach().sendall(LENGTH.pack(MAX_FRAME + 1))
    with pytest.raises(WireError, match=str(MAX_FRAME + 1)):
        far.receive()


def test_an_end_in_the_middle_is_an_error(door):
    near, far = pair(door)
    near.detach().sendall(LENGTH.pack(100) + b"only this")
    near.close()
    with pytest.raises(WireError, match="hung up"):
        far.receive()


def test_close_wakes_who_waits(door):
    near, _far = pair(door)
    errors: queue.SimpleQueue = queue.SimpleQueue()

    def wait() -> None:
        try:
            near.receive()
        except WireError as error:
            errors.put(error)

    threading.Thread(target=wait, daemon=True).start()
    time.sleep(0.1)
    near.close()
    assert isinstance(errors.get(timeout=LONG), WireError)
    near.close()  # twice is fine
    with pytest.raises(WireError):
        near.send("beat", 1)


def test_sending_to_who_is_gone_fails(door):
    near, far = pair(door)
    far.close()
    with pytest.raises(WireError):
        for _ in range(1000):
            near.send("failed", "x" * 10_000)


def test_silence_beyond_a_timeout_is_an_error(door):
    near, _far = pair(door)
    near.set_timeout(0.2)
    with pytest.raises(WireError, match=r"nothing was heard of the peer for 0\.2 s"):
        near.receive()


class Expiring:
    """A socket whose wait for bytes runs out so many times, whatever has come: as when its machine stood
    still for as long."""

    def __init__(self, sock, times):
        self._sock, self.left = sock, times

    def recv_into(self, view):
        self.left -= 1
        if self.left >= 0:
            raise BlockingIOError
        return self._sock.recv_into(view)


def test_a_peer_has_several_turns_to_be_heard(door):
    near, far = pair(door)
    near.set_timeout(LONG)
    far.send("beat", 1)
    near._sock = Expiring(near._sock, TURNS - 1)
    assert near.receive() == ("beat", 1)
    far.send("beat", 2)
    near._sock.left = TURNS
    with pytest.raises(WireError, match="nothing was heard"):
        near.receive()


def test_a_timeout_bounds_receiving_alone(door):
    """A message that the peer takes its time to read is sent for as long as that is."""
    near, far = pair(door)
    read_little(far)
    near.set_timeout(0.2)
    sent = threading.Thread(target=near.send, args=("failed", "x" * (20 << 20)), daemon=True)
    sent.start()
    time.sleep(0.4)
    assert sent.is_alive()
    assert far.receive() == ("failed", "x" * (20 << 20))
    sent.join(timeout=LONG)
    near.set_timeout(None)
    threading.Timer(0.3, far.send, ("beat", 1)).start()
    assert near.receive() == ("beat", 1)


def test_what_goes_at_once_is_sent_at_once(door):
    near, far = pair(door)
    read_little(far)
    raw = frame(encode("failed", "x" * (20 << 20)))
    count = near.write_now(raw)
    assert 0 < count < len(raw)
    while more := near.write_now(raw[count:]):  # the peer's side of the buffers may still grow
        count += more
    got: queue.SimpleQueue = queue.SimpleQueue()
    threading.Thread(target=lambda: got.put(far.receive()), daemon=True).start()
    near.write(memoryview(raw)[count:])
    assert got.get(timeout=LONG) == ("failed", "x" * (20 << 20))
    far.close()
    ends = time.monotonic() + LONG
    with pytest.raises(WireError):
        while time.monotonic() < ends:  # the answer to the first of them takes its time
            near.write_now(raw[:10])
            time.sleep(0.001)


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="the kernel does not offer it")
def test_what_nobody_reads_is_given_up_where_a_reader_is_expected(door):
    near, far = pair(door)
    read_little(far)
    near.expect_reader(0.3)
    started = time.monotonic()
    with pytest.raises(WireError, match="timed out"):
        near.write(b"x" * (40 << 20))
    assert time.monotonic() - started < LONG  # else it waits as long as the peer's host lives


def test_nobody_answers():
    with socket.socket() as taken:  # which nobody else can take meanwhile
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        with pytest.raises(WireError, match=f"127.0.0.1:{port} does not answer"):
            Connection.connect("127.0.0.1", port, Hello("gateway", TOKEN), timeout=LONG)


def test_a_closed_listener_lets_nobody_in(door):
    listener, let_in = door
    listener.close()
    try:
        near = Connection.connect(listener.host, listener.port, Hello("gateway", TOKEN), timeout=LONG)
    except WireError:
        return
    # Somebody answers: the listener, or another process that has been given its port since.
    with pytest.raises(queue.Empty):
        let_in.get(timeout=5)
    near.close()
