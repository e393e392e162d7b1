"""The HTTP port for those who watch a server, not for those who use it: metrics and probes.

One GET, one answer, then the connection is closed. Bodies are not read, requests are bounded in length and in
time, and pages come from a table of functions. Knows nothing of metrics and health.
"""

from __future__ import annotations

import asyncio
import contextlib
import http
import logging
import socket
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

log = logging.getLogger(__name__)

LONGEST_HEAD = 16 << 10  # bytes of request line and headers
PATIENCE = 10.0  # seconds that a request has to arrive, and its answer to be taken


@dataclass(frozen=True, slots=True)
class Page:
    body: bytes
    content_type: str = "text/plain; charset=utf-8"
    status: http.HTTPStatus = http.HTTPStatus.OK


Pages = Mapping[str, Callable[[str], Awaitable[Page]]]  # by path; each takes the Accept header


class WatchPort:
    """Answers until it is closed. `port` is the one it is bound to."""

    def __init__(self, server: asyncio.Server):
        self._server = server
        self.port: int = server.sockets[0].getsockname()[1]

    @classmethod
    async def open(cls, bound: socket.socket, pages: Pages) -> WatchPort:
        """Serve `pages` on a socket that is bound already, and take it over."""

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(ConnectionError):
                try:
                    async with asyncio.timeout(PATIENCE):
                        await _answer(reader, writer, pages)
                except (TimeoutError, asyncio.IncompleteReadError):
                    pass  # nothing to answer, or nobody who takes it
                finally:
                    writer.close()

        return cls(await asyncio.start_server(answer, sock=bound, limit=LONGEST_HEAD))

    def close(self) -> None:
        """Take no more connections."""
        self._server.close()


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, pages: Pages) -> None:
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    except asyncio.LimitOverrunError:
        page, method = _error(http.HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE), "GET"
    else:
        page, method = await _page(head, pages)
    reason = f"{page.status.value} {page.status.phrase}"
    headers = [
        f"HTTP/1.1 {reason}",
        f"Content-Type: {page.content_type}",
        f"Content-Length: {len(page.body)}",
        "Cache-Control: no-store",
        "Connection: close",
    ]
    if page.status is http.HTTPStatus.METHOD_NOT_ALLOWED:
        headers.append("Allow: GET, HEAD")
    writer.write("\r\n".join([*headers, "", ""]).encode("latin-1"))
    if method != "HEAD":
        writer.write(page.body)
    await writer.drain()


async def _page(head: str, pages: Pages) -> tuple[Page, str]:
    """What a request's line and headers ask for, and by which method."""
    line, *rest = head.split("\r\n")
    words = line.split(" ")
    if len(words) != 3 or not words[2].startswith("HTTP/1."):
        return _error(http.HTTPStatus.BAD_REQUEST), "GET"
    method, path = words[0], words[1].partition("?")[0]
    if method not in ("GET", "HEAD"):
        return _error(http.HTTPStatus.METHOD_NOT_ALLOWED), method
    if path not in pages:
        return _error(http.HTTPStatus.NOT_FOUND, f"; there are {', '.join(pages)}"), method
    headers = {
        name.strip().lower(): value.strip() for name, _, value in (each.partition(":") for each in rest)
    }
    try:
        return await pages[path](headers.get("accept", "")), method
    except Exception:
        log.exception("GET %s failed by a defect", path)
        return _error(http.HTTPStatus.INTERNAL_SERVER_ERROR), method


def _error(status: http.HTTPStatus, more: str = "") -> Page:
    return Page(f"{status.phrase}{more}\n".encode(), status=status)
