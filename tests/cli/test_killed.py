"""A server that is killed in mid-reply and started again: the reply is that of a server that lived."""

from __future__ import annotations

import pytest

from tests.cli.command import run, serving
from tests.weights.tiny import write_tiny_llama
from tramontane import Client

OPTIONS = {"max_tokens": 1000, "temperature": 0.9, "seed": 11, "logprobs": 1, "frequency_penalty": 0.4}
# The command line, but its ranks take 300 steps and then no more: a reply of 1000 tokens cannot be whole when
# the server is killed, however late that is.
STUCK = """
import sys
from runtime.cli import main
from runtime.local import LocalRanks
submit, steps = LocalRanks.submit, iter(range(300))
LocalRanks.submit = lambda ranks, plan: None if next(steps, None) is None else submit(ranks, plan)
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "long.gguf"
    return write_tiny_llama(path, hidden=96, heads=6, kv_heads=3, ffn=160, context=2048)


def test_the_reply_is_the_same_on_other_ranks(model):
    """Killed with one rank, going on with three: same tokens, logprobs and text."""
    options = [f"--{name.replace('_', '-')}={value}" for name, value in OPTIONS.items()]
    want = run("generate", str(model), "--local", "--json", "--prompt", "Once", "--ignore-eos", *options).json
    with serving(model, "--local", code=(STUCK,)) as (process, ready):
        target = f"{ready['host']}:{ready['port']}"
        # The next server may take longer to start than a client by itself has patience.
        with Client(target, resumes=100) as client:
            stream = client.stream_generate("Once", ignore_eos=True, **OPTIONS)
            next(stream)
            process.kill()
            process.communicate()
            with stream, serving(model, "--local", "--tp", "3", "--port", str(ready["port"])):
                reply = stream.result()
    assert reply.resumed == 1
    assert len(reply.token_ids) == 1000
    assert list(reply.token_ids) == want["token_ids"]
    assert [entry.logprob for entry in reply.logprobs] == [entry["logprob"] for entry in want["logprobs"]]
    assert reply.finish_reason.value == want["finish_reason"]
    for name in ("text", "seed", "numerics"):
        assert getattr(reply, name) == want[name], name
