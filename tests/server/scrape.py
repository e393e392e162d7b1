"""Reads a server's HTTP port as Prometheus would."""

import asyncio
from dataclasses import dataclass

from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_plain


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: str


async def ask_http(port: int, request: str | bytes) -> Answer:
    """Send a request as it is; all that comes back until the connection is closed."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request if isinstance(request, bytes) else request.encode())
        head, _, body = (await asyncio.wait_for(reader.read(), 60)).decode().partition("\r\n\r\n")
    finally:
        writer.close()
    line, *rest = head.split("\r\n")
    return Answer(int(line.split()[1]), dict(each.split(": ", 1) for each in rest), body)


async def get(port: int, path: str, accept: str = "*/*") -> Answer:
    return await ask_http(port, f"GET {path} HTTP/1.1\r\nHost: here\r\nAccept: {accept}\r\n\r\n")


class Samples(dict):
    """Values by name and labels: samples("x_total", method="Generate"). 0 for a label never seen."""

    def __call__(self, name: str, **labels: str) -> float:
        assert any(known == name for known, _ in self), f"no metric {name}"
        return self.get((name, frozenset(labels.items())), 0.0)

    @property
    def names(self) -> set[str]:
        return {name for name, _ in self}


def parse(text: str, *, openmetrics: bool = False) -> Samples:
    families = (parse_openmetrics if openmetrics else parse_plain)(text)
    return Samples(
        ((sample.name, frozenset(sample.labels.items())), sample.value)
        for family in families
        for sample in family.samples
    )


async def scrape(port: int) -> Samples:
    answer = await get(port, "/metrics")
    assert answer.status == 200, answer
    return parse(answer.body)
