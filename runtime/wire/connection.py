"""One TCP connection that carries messages, for threads that may block. Sending is safe from any thread."""

from __future__ import annotations

import contextlib
import hmac
import socket
import struct
import threading
from collections.abc import Callable

from runtime.wire.messages import PROTOCOL, Hello, WireError, decode, encode

LENGTH = struct.Struct("<I")
TIMEVAL = struct.Struct("@ll")  # seconds and microseconds, as the kernel takes them
MAX_FRAME = 64 << 20  # bytes; a 128k-token prompt takes less than one
LOST_SECONDS = 4
TURNS = 8  # in which a wait for the peer is bounded
HELLO_SECONDS = 10.0  # a stranger may hold a connection no longer
HELLO_BYTES = 4096  # nor announce a larger first message


def prepare(sock: socket.socket) -> None:
    """Set a connected socket up: what is written goes out at once, and who waits on it gets an error within
    LOST_SECONDS after the other host has vanished, where the kernel offers that. It does not while something
    written is not acknowledged, which it repeats for a quarter of an hour, nor, on Linux, while this host's
    own cable is out: whoever cannot wait for that long also needs `give_up_on_writes`."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in {"TCP_KEEPIDLE": 1, "TCP_KEEPINTVL": 1, "TCP_KEEPCNT": LOST_SECONDS - 1}.items():
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def give_up_on_writes(sock: socket.socket, seconds: float = LOST_SECONDS) -> None:
    """An error within so many seconds for what was written and nobody has acknowledged, and for a host that
    has vanished at all. Not for ends that may stop reading for as long, as ranks do while they compute: once
    their buffers are full, those would be taken for lost."""
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(seconds * 1000))


class Connection:
    def __init__(self, sock: socket.socket):
        prepare(sock)
        self._sock = sock
        self._lock = threading.Lock()
        self._patience = 0.0  # seconds; see set_timeout

    @staticmethod
    def connect(host: str, port: int, hello: Hello, *, timeout: float = 30.0) -> Connection:
        """Dial and introduce oneself. Raises WireError if nobody answers."""
        try:
            sock = socket.create_connection((host, port), timeout=timeout)
        except OSError as error:
            raise WireError(f"{host}:{port} does not answer: {error}") from None
        sock.settimeout(None)
        connection = Connection(sock)
        connection.send("hello", hello)
        return connection

    def send(self, kind: str, body: object) -> None:
        """Raises WireError when the peer is gone."""
        self.send_frame(encode(kind, body))

    def send_frame(self, frame: bytes) -> None:
        self.write(LENGTH.pack(len(frame)) + frame)

    def write(self, data: bytes | memoryview) -> None:
        """Send bytes of frames, however long the peer takes. Raises WireError."""
        try:
            with self._lock:
                self._sock.sendall(data)
        except OSError as error:
            raise WireError(f"the peer is gone: {error}") from None

    def write_now(self, data: bytes | memoryview) -> int:
        """Send as much as goes without waiting; returns how many bytes that was. The rest has to follow
        before anything else does. Raises WireError."""
        if not self._lock.acquire(blocking=False):
            return 0
        try:
            return self._sock.send(data, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise WireError(f"the peer is gone: {error}") from None
        finally:
            self._lock.release()

    def receive(self, limit: int = MAX_FRAME) -> tuple[str, object]:
        """Wait for the next message, of at most `limit` bytes. Raises WireError when the peer is gone or
        talks nonsense."""
        (length,) = LENGTH.unpack(self._read(LENGTH.size))
        if length > limit:
            raise WireError(f"a message of {length} bytes was announced")
        return decode(self._read(length))

    def set_timeout(self, seconds: float | None) -> None:
        """Bound the wait for the peer's next bytes in each later `receive`; None waits for ever. Sending is
        not bounded: a timeout of Python's would be, so it is the kernel's. The time is waited for in turns: a
        machine that stands still for as long ends one of them, and the peer has the others to be heard."""
        self._patience = seconds or 0.0
        micros = round(self._patience / TURNS * 1e6)
        if self._patience:
            micros = max(1, micros)  # 0 would wait for ever
        limit = TIMEVAL.pack(*divmod(micros, 10**6))
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)

    def expect_reader(self, seconds: float = LOST_SECONDS) -> None:
        """Take a peer that acknowledges nothing for so long for lost: one that else reads at any time."""
        give_up_on_writes(self._sock, seconds)

    def close(self) -> None:
        """Hang up; a thread that waits in `receive` gets a WireError."""
        with contextlib.suppress(OSError):  # the peer was faster
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()

    def detach(self) -> socket.socket:
        """The bare socket, for a protocol of another kind; the connection is no longer used."""
        return self._sock

    def _read(self, size: int) -> bytearray:
        data = bytearray(size)
        view = memoryview(data)
        silent = 0  # turns
        while view:
            try:
                count = self._sock.recv_into(view)
            except BlockingIOError:
                silent += 1
                if silent < TURNS:
                    continue
                raise WireError(f"nothing was heard of the peer for {self._patience:g} s") from None
            except OSError as error:
                raise WireError(f"the peer is gone: {error}") from None
            if count == 0:
                raise WireError("the peer hung up")
            silent = 0
            view = view[count:]
        return data


class Listener:
    """Accepts connections, checks who they are, and hands each to `handler` on a thread of its own."""

    def __init__(self, host: str, token: str, handler: Callable[[Hello, Connection], None]):
        """Binds `host` on a free port. Strangers (no token, another protocol) are hung up on."""
        self._token = token
        self._handler = handler
        self._sock = socket.create_server((host, 0), backlog=128)
        self.host, self.port = self._sock.getsockname()[:2]
        threading.Thread(target=self._accept, name="listener", daemon=True).start()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._sock.accept()
            except OSError:
                return  # closed
            threading.Thread(target=self._greet, args=(sock,), name="connection", daemon=True).start()

    def _greet(self, sock: socket.socket) -> None:
        connection = Connection(sock)
        # Bounds the whole hello: a timeout of the socket would start anew with every byte.
        hang_up = threading.Timer(HELLO_SECONDS, connection.close)
        hang_up.daemon = True
        hang_up.start()
        try:
            kind, hello = connection.receive(HELLO_BYTES)
        except WireError:
            connection.close()
            return
        finally:
            hang_up.cancel()
        known = (
            kind == "hello"
            and isinstance(hello, Hello)
            and hmac.compare_digest(hello.token.encode(), self._token.encode())
            and hello.protocol == PROTOCOL
        )
        if not known or not isinstance(hello, Hello):
            connection.close()
            return
        self._handler(hello, connection)
