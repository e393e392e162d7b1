"""A server in a process of its own, to be killed: python -m tests.server.process PORT HELD TEXT.

After HELD tokens of a reply no more come; 0 is for all of them.
"""

import asyncio
import sys

from runtime.server.lifecycle import serve
from runtime.server.pipeline import Pipeline
from tests.server.scripted import PieceTokenizer, ScriptedEngine, info_for


async def main(port: int, held: int, text: str) -> None:
    tokenizer = PieceTokenizer()
    engine = ScriptedEngine(text.encode(), gate=asyncio.Event() if held else None, held=held)
    server = await serve(Pipeline(tokenizer, None, engine, info_for(tokenizer)), port=port)
    await server.ready()
    print(server.port, flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]))
