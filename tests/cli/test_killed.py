"""A server that is killed in mid-reply and started again: the reply is that of a server that lived."""

from __future__ import annotations

import pytest

from tests.cli.command import serving
from tests.weights.tiny import write_tiny_llama
from tramontane import Client

OPTIONS = {"max_tokens": 1000, "temperature": 0.9, "seed": 11, "logprobs": 1, "frequency_penalty": 0.4}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "long.gguf"
    return write_tiny_llama(path, hidden=96, heads=6, kv_heads=3, ffn=160, context=2048)


def test_the_reply_is_the_same_on_other_ranks(model):
    """Killed with one rank, going on with three: same tokens, logprobs and text."""
    with serving(model, "--local") as (process, ready):
        target = f"{ready['host']}:{ready['port']}"
        with Client(target) as client:
            want = client.generate("Once", ignore_eos=True, **OPTIONS)
            with client.stream_generate("Once", ignore_eos=True, **OPTIONS) as stream:
                next(stream)
                process.kill()
                process.communicate()
                with serving(model, "--local", "--tp", "3", "--port", str(ready["port"])):
                    reply = stream.result()
    assert (want.resumed, reply.resumed) == (0, 1)
    assert len(reply.token_ids) == 1000
    for name in ("text", "token_ids", "logprobs", "finish_reason", "seed", "numerics"):
        assert getattr(reply, name) == getattr(want, name), name
