"""`batch`: exactly one line a request, whatever interrupts it, and the same replies as without."""

from __future__ import annotations

import collections
import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from runtime.commands import batch as batch_command
from runtime.commands.batch_files import Requests, Results, key
from runtime.commands.batch_lines import Failure, failure_line, parse, read_line, refusal
from runtime.errors import InvalidArgument, NotEnough
from runtime.local import LocalRanks
from tests.cli.command import finish, refused, run, serving, spawn

CHAT = "/v1/chat/completions"


def write(path: Path, values: list) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return path


def read(path: Path) -> dict[str, dict]:
    """Results by custom_id; no two share one, and every line is whole."""
    text = path.read_text(encoding="utf-8")
    assert text == "" or text.endswith("\n")
    values = [json.loads(line) for line in text.splitlines()]
    assert max(collections.Counter(value["custom_id"] for value in values).values(), default=1) == 1
    return {value["custom_id"]: value for value in values}


def plain(number: int, **fields) -> dict:
    return {"custom_id": f"r{number}", "prompt": "Once upon", "max_tokens": 4, "seed": number} | fields


def openai(name: str, url: str = CHAT, **body) -> dict:
    return {"custom_id": name, "method": "POST", "url": url, "body": body}


@pytest.fixture
def template(tmp_path) -> Path:
    path = tmp_path / "template.jinja"
    path.write_text("{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}:")
    return path


# ---- from end to end ------------------------------------------------------------------------------------


def batch(model, requests: Path, results: Path, *options: str):
    return run("batch", str(requests), str(results), "--model", str(model), "--local", *options)


def test_each_form_is_answered_in_its_own(tiny, tmp_path, template):
    requests = write(
        tmp_path / "in.jsonl",
        [
            {"custom_id": "plain", "prompt": "The", "max_tokens": 5, "seed": 3, "ignore_eos": True},
            openai("text", "/v1/completions", model="tiny", prompt="The", max_tokens=5, seed=3,
                   ignore_eos=True),
            openai(
                "chat", messages=[{"role": "user", "content": [{"type": "text", "text": "The"}]}],
                max_completion_tokens=5, seed=3, logprobs=True, top_logprobs=2, user="someone", stream=False,
            ),
            {"custom_id": "two", "messages": [{"role": "user", "content": "The"}], "n": 2, "max_tokens": 2},
        ],
    )  # fmt: skip
    result = batch(tiny, requests, tmp_path / "out.jsonl", "--chat-template", str(template), "--json")
    assert result.json.items() >= {"requests": 4, "done": 4, "failed": 0, "before": 0, "replies": 4}.items()
    found = read(tmp_path / "out.jsonl")
    options = ["--max-tokens", "5", "--seed", "3", "--temperature", "1", "--json"]
    one = run("generate", str(tiny), "--local", "--prompt", "The", "--ignore-eos", *options).json
    assert found["plain"]["text"] == one["text"] and found["plain"]["error"] is None
    assert found["plain"].items() >= {"seed": 3, "numerics": one["numerics"], "model": "tiny"}.items()
    response = found["text"]["response"]
    assert found["text"]["error"] is None and response["status_code"] == 200
    assert response["body"]["choices"][0].items() >= {"text": one["text"], "finish_reason": "length"}.items()
    assert (
        response["body"]["usage"]["completion_tokens"]
        == 5
        == response["body"]["usage"]["total_tokens"] - (one["usage"]["prompt_tokens"])
    )
    assert response["body"]["seed"] == 3 and response["body"]["object"] == "text_completion"
    chat = found["chat"]["response"]["body"]["choices"][0]
    options += ["--chat", "--chat-template", str(template), "--logprobs", "2"]
    spelled = run("generate", str(tiny), "--local", "--prompt", "The", *options).json
    assert chat["message"] == {"role": "assistant", "content": spelled["text"]}
    entries = chat["logprobs"]["content"]
    assert [e["logprob"] for e in entries] == [e["logprob"] for e in spelled["logprobs"]]
    assert [len(e["top_logprobs"]) for e in entries] == [2] * len(entries)
    assert len(found["two"]["choices"]) == 2 and found["two"]["choices"][0]["text"] == found["two"]["text"]
    assert isinstance(found["two"]["seed"], int)  # one was drawn, and the line says which


BAD = {
    "field": (plain(0, temprature=1), "temprature", 400),
    "value": (plain(0, temperature=-1), "temperature", 400),
    "type": (plain(0, max_tokens="four"), "max_tokens", 400),
    "both": (plain(0, messages=[]), "prompt", 400),
    "long": (plain(0, max_tokens=100_000), "max_tokens", 400),
    "chat": ({"custom_id": "r", "messages": [{"role": "user"}]}, "messages[0]", 400),
    "seed": (plain(0, seed=1 << 70), "seed", 400),
    "choices": (plain(0, n=2**31 - 1), "n", 400),
    "huge": (plain(0, top_p=10**400), "top_p", 400),
    "bias": (plain(0, logit_bias={"1": 10**400}), "logit_bias", 400),
    "url": (openai("r", "/v1/embeddings", input="x"), "url", 400),
    "body": ({"custom_id": "r", "method": "POST", "url": CHAT}, "body", 400),
    "stream": (openai("r", messages=[], stream=True), "stream", 400),
    "model": (openai("r", "/v1/completions", prompt="x", model="other"), "model", 404),
    "surrogate": (plain(0, prompt="\ud800"), "text", 400),
}


def test_failures_stand_in_their_lines(tiny, tmp_path):
    lines = [value | {"custom_id": name} for name, (value, _, _) in BAD.items()]
    requests = write(tmp_path / "in.jsonl", [plain(1), *lines, plain(2)])
    out = tmp_path / "out.jsonl"
    result = batch(tiny, requests, out)
    assert result.status == 1
    assert (
        result.err == f"error: {len(BAD)} of {len(BAD) + 2} requests failed; their lines in {out} say why\n"
    )
    found = read(out)
    assert found["r1"]["error"] is None is found["r2"]["error"]
    for name, (value, field, status) in BAD.items():
        line = found[name]
        assert line["error"]["param"] == field and field in line["error"]["message"], line
        assert ("response" in line) == ("url" in value)
        if "response" in line:
            assert line["response"]["status_code"] == status
            assert line["response"]["body"]["error"]["message"] == line["error"]["message"]
    again = batch(tiny, requests, out)  # nothing is left to do, and the status stays what it was
    assert again.status == 1 and read(out) == found and f"{len(lines) + 2} done before" in again.out


# The command line, but it kills itself, with all that runs, where it is to write its twentieth line: before,
# amid or after that. Whoever watched the file from outside could come when all is done.
KILLED = """
import os, signal, sys
from runtime.cli import main
where, plain, lines = sys.argv.pop(1), os.pwrite, 0

def pwrite(descriptor, data, at):
    global lines
    data = bytes(data)
    lines += data.count(b"\\n")
    if lines >= 20 and where != "before":
        last = data[:-1].rfind(b"\\n") + 1
        plain(descriptor, data[: (last + len(data)) // 2] if where == "amid" else data, at)
    if lines >= 20:
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(descriptor, data, at)

os.pwrite = pwrite
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_killed_three_times(tiny, tmp_path):
    """No request is lost, none done twice, and replies are those of a batch that ran through."""
    lines = [plain(i, max_tokens=24 + i % 5, ignore_eos=True, temperature=0.8) for i in range(300)]
    requests, out = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    seen, torn = 0, 0
    for where in ("after", "amid", "before"):
        options = ["--model", str(tiny), "--local", "--concurrency", "8"]
        killed = finish(spawn("batch", str(requests), str(out), *options, code=(KILLED, where)))
        assert killed.status == -signal.SIGKILL, killed
        before, seen = seen, out.read_bytes().count(b"\n")
        torn += not out.read_bytes().endswith(b"\n")
        assert before + 19 - 8 < seen < before + 20 + 8  # up to eight are written at once
    assert torn == 1 and seen < 300
    with out.open("ab") as file:  # what a torn write may leave of a line, too little to tell whose it was
        file.write(b'{"custom_id": "r29')
    value = batch(tiny, requests, out, "--json").json
    assert value.items() >= {"requests": 300, "done": 300, "failed": 0, "before": seen}.items()
    assert value["replies"] == 300 - seen
    whole = tmp_path / "whole.jsonl"
    assert batch(tiny, requests, whole, "--tp", "3", "--concurrency", "50").status == 0
    texts = [{name: line["text"] for name, line in read(path).items()} for path in (out, whole)]
    assert texts[0] == texts[1] and len(texts[0]) == 300


def when_it_has(path: Path, lines: int, act) -> threading.Thread:
    """Calls `act` as soon as a file has that many lines; not where they never come, since a signal to a batch
    that is no more would end pytest."""

    def watch() -> None:
        until = time.monotonic() + 120
        while not (path.exists() and path.read_bytes().count(b"\n") >= lines):
            if time.monotonic() > until:
                return
            time.sleep(0.002)
        act()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_lets_running_requests_finish(tiny, tmp_path, number, status):
    lines = [plain(i, max_tokens=50, ignore_eos=True) for i in range(3000)]
    requests, out = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    thread = when_it_has(out, 5, lambda: os.kill(os.getpid(), number))
    result = batch(tiny, requests, out, "--concurrency", "4", "--json")
    thread.join()
    assert result.status == status and result.err in ("error: interrupted\n", "error: terminated\n")
    value, found = json.loads(result.out), read(out)
    assert 5 <= value["done"] == value["replies"] == len(found) < 3000
    assert all(line["usage"]["completion_tokens"] == 50 for line in found.values())


def test_a_second_signal_drops_them(tiny, tmp_path, monkeypatch):
    lines = [plain(i, max_tokens=240 if i else 1, ignore_eos=True) for i in range(500)]
    requests, out = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    submit, steps = LocalRanks.submit, iter(range(20))

    def stuck(ranks: LocalRanks, plan) -> None:
        """After some steps no more are taken: the first reply of one token has come, and of the others none
        can be whole, however late the signals come."""
        if next(steps, None) is not None:
            submit(ranks, plan)

    monkeypatch.setattr(LocalRanks, "submit", stuck)
    made, init = [], batch_command._Run.__init__

    def kept(one: batch_command._Run, *arguments) -> None:
        init(one, *arguments)
        made.append(one)

    monkeypatch.setattr(batch_command._Run, "__init__", kept)

    def twice() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        until = time.monotonic() + 60
        while not made[0]._stopping and time.monotonic() < until:  # else two signals may arrive as one
            time.sleep(0.002)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = when_it_has(out, 1, twice)
    result = batch(tiny, requests, out, "--concurrency", "64", "--json")
    thread.join()
    assert result.status == 143
    # What ran has no line, and none is half there.
    assert list(read(out)) == ["r0"] and json.loads(result.out)["done"] == 1


def test_through_running_servers(tiny, server, tmp_path):
    """Two share the work; one that goes away leaves its part to the other."""
    lines = [plain(i, max_tokens=20, ignore_eos=True) for i in range(60)] + [plain(60, top_p=7)]
    requests, out = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    with serving(tiny, "--local") as (other, ready):
        targets = [f"{each['host']}:{each['port']}" for each in (server, ready)]
        named = [word for target in targets for word in ("--target", target)]
        thread = when_it_has(out, 5, other.kill)
        result = run("batch", str(requests), str(out), *named, "--concurrency", "4")
        thread.join()
    assert result.status == 1 and "1 of 61 requests failed" in result.err
    found = read(out)
    assert len(found) == 61 and found["r60"]["error"]["param"] == "top_p"
    here = tmp_path / "here.jsonl"
    batch(tiny, requests, here)
    assert {n: x.get("text") for n, x in read(here).items()} == {n: x.get("text") for n, x in found.items()}


def test_without_a_server_nothing_is_written(tmp_path):
    requests, out = write(tmp_path / "in.jsonl", [plain(1)]), tmp_path / "out.jsonl"
    result = run("batch", str(requests), str(out), "--target", "127.0.0.1:9")
    assert result.status == 1 and result.err.startswith("error: ") and len(result.err.splitlines()) == 1
    assert out.read_bytes() == b""


# ---- refusals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            '{"custom_id": "a", "prompt": "x"}\n{"custom_id": "a", "prompt": "y"}\n',
            ["line 2", "repeats", "'a'"],
        ),
        ('{"custom_id": "a"}\n\n{"custom_id": "b"\n', ["line 3", "not JSON"]),
        ('{"custom_id": "a", "prompt": "x", "seed": NaN}', ["line 1", "NaN"]),
        ("[1]\n", ["line 1", "not a JSON object"]),
        ('{"prompt": "x"}\n', ["line 1", "custom_id"]),
        ('{"custom_id": 7, "prompt": "x"}\n', ["line 1", "custom_id"]),
        (b'{"custom_id": "\xff"}\n', ["line 1", "UTF-8"]),
        ("[" * 100_000 + "\n", ["line 1", "deep"]),
    ],
)
def test_requests_that_no_line_could_answer(tiny, tmp_path, content, words):
    path = tmp_path / "in.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(batch(tiny, path, tmp_path / "out.jsonl"), str(path), *words)
    assert not (tmp_path / "out.jsonl").exists()


def test_what_else_is_refused(tiny, tmp_path):
    requests, out = write(tmp_path / "in.jsonl", [plain(1)]), tmp_path / "out.jsonl"
    refused(batch(tiny, tmp_path / "none", out), "not found")
    refused(batch(tiny, tmp_path, out), "in: ")
    refused(batch(tiny, requests, requests), "out: ", "the file of requests")
    refused(batch(tiny, requests, tmp_path / "no" / "out"), "out: ", "No such file")
    refused(batch(tiny, requests, out, "--concurrency", "0"), "concurrency")
    refused(batch(tiny, requests, out, "--max-tokens", "0"), "max-tokens")
    refused(batch(tiny, requests, out, "--target", "a:1"), "one of --model and --target")
    refused(run("batch", str(requests), str(out)), "one of --model and --target")
    refused(run("batch", str(requests), str(out), "--target", "nowhere"), "HOST:PORT")
    refused(batch(tiny, requests, out, "--tp", "9"), "tp")
    other = write(tmp_path / "other.jsonl", [{"custom_id": "a", "prompt": "x"}])
    refused(batch(tiny, requests, other), "out: ", "line 1", "not a result")
    for notes in (b"my notes\n", b"my notes", b"{}", b'{"custom'[:-1] + b"x"):
        other.write_bytes(notes)
        refused(batch(tiny, requests, other), "out: ", "line 1")
        assert other.read_bytes() == notes  # what is not ours is left alone


def test_an_empty_batch_is_done(tiny, tmp_path):
    (tmp_path / "in.jsonl").write_text("\n\n")
    assert batch(tiny, tmp_path / "in.jsonl", tmp_path / "out.jsonl", "--json").json["requests"] == 0


# ---- files ----------------------------------------------------------------------------------------------

SLOW = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
names = st.lists(st.text(min_size=1, max_size=6), max_size=6, unique=True)


def written(path: Path, found: list[str], failed: bool = False) -> None:
    results = Results(path)
    for name in found:
        error = Failure(400, "k", "m") if failed else None
        results.append([failure_line(name, "plain", error) if error else {"custom_id": name, "error": None}])
    results.close()


@SLOW
@given(names, st.data())
@example(["a"], None)
def test_a_torn_file_gives_back_every_whole_line(tmp_path, found, data):
    """Cut anywhere: lines before the cut stand, and going on makes the file what it would have been."""
    path = tmp_path / "out.jsonl"
    path.unlink(missing_ok=True)
    written(path, found)
    whole = path.read_bytes()
    cut = data.draw(st.integers(0, len(whole))) if data else len(whole) - 1
    path.write_bytes(whole[:cut])
    results = Results(path)
    ends = [len(line) for line in whole.splitlines(keepends=True)]
    # A line that lacks its end alone is whole.
    kept = sum(cut >= sum(ends[: i + 1]) - 1 for i in range(len(ends)))
    assert list(results.done) == [key(name) for name in found[:kept]]
    results.close()
    assert path.read_bytes() == whole[: sum(ends[:kept])]
    written(path, found[kept:])
    assert path.read_bytes() == whole


@SLOW
@given(st.binary(max_size=40), st.booleans())
def test_what_is_not_ours_is_refused_and_kept(tmp_path, tail, ended):
    path = tmp_path / "out.jsonl"
    path.unlink(missing_ok=True)
    written(path, ["a"])
    path.write_bytes(path.read_bytes() + tail + (b"\n" if ended else b""))
    before = path.read_bytes()
    try:
        Results(path).close()
    except InvalidArgument:
        assert path.read_bytes() == before
    else:
        dropped = before.removeprefix(path.read_bytes())
        ours = (b'{"custom_id": "', b'{"id": "batch_req_')
        assert (
            not dropped.strip(b"\0") or any(s.startswith(dropped[: len(s)]) for s in ours) or not tail.strip()
        )


def test_a_hole_at_the_end_is_dropped(tmp_path):
    """File systems may leave zeros where a write was under way."""
    path = tmp_path / "out.jsonl"
    written(path, ["a"])
    whole = path.read_bytes()
    path.write_bytes(whole + bytes(100))
    results = Results(path)
    assert results.torn == 100 and path.read_bytes() == whole
    results.close()


def test_failures_are_remembered(tmp_path):
    path = tmp_path / "out.jsonl"
    written(path, ["a"])
    written(path, ["b"], failed=True)
    results = Results(path)
    assert results.done == {key("a"): False, key("b"): True}
    with pytest.raises(NotEnough, match="another batch"):
        Results(path)
    results.close()


def test_a_custom_id_twice_in_the_results(tmp_path):
    path = tmp_path / "out.jsonl"
    written(path, ["a"])
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(InvalidArgument, match=r"line 2 of .* repeats"):
        Results(path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_disk_that_is_full_is_one_line(tmp_path, monkeypatch):
    path = tmp_path / "out.jsonl"
    written(path, ["a"])
    whole = path.read_bytes()
    results = Results(path)
    real = os.pwrite

    def some(descriptor, data, at):
        if at > len(whole):
            raise OSError(28, "No space left on device")
        return real(descriptor, data[:5], at)

    monkeypatch.setattr(os, "pwrite", some)
    with pytest.raises(NotEnough, match="No space left"):
        results.append([{"custom_id": "b", "error": None}])
    results.close()
    assert path.read_bytes() == whole


def test_requests_are_not_held_in_memory(tmp_path):
    """50 MB of requests, read twice, in a few MB."""
    import tracemalloc

    path = tmp_path / "in.jsonl"
    with path.open("w") as file:
        for i in range(5000):
            file.write(json.dumps(plain(i, prompt="x" * 10_000)) + "\n")
    requests = Requests(path)
    tracemalloc.start()
    assert len(requests.check()) == 5000
    assert sum(1 for _ in requests.without({key("r1")})) == 4999
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    requests.close()
    assert peak < 5 << 20


# ---- lines ----------------------------------------------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
fields = st.sampled_from(
    ["prompt", "messages", "url", "method", "body", "n", "stop", "logit_bias", "logprobs"]
)


@settings(deadline=None)
@given(st.dictionaries(fields, json_values, max_size=4), st.dictionaries(fields, json_values, max_size=4))
def test_any_object_is_parsed_or_refused_by_field(value, body):
    for outer in (value, value | {"url": CHAT, "body": body}, {"url": "/v1/completions", "body": body}):
        line = read_line(json.dumps(outer | {"custom_id": "a"}).encode())
        try:
            ask = parse(line)
        except InvalidArgument as error:
            assert error.field
        else:
            assert (ask.prompt is None) != (ask.messages is None)


@settings(deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_are_an_object_with_a_name_or_refused(data):
    try:
        assert isinstance(read_line(data)["custom_id"], str)
    except ValueError as error:
        assert str(error)


def test_a_servers_refusal_names_the_field():
    assert refusal("sampling.top_p: must be 1").field == "top_p"
    assert refusal("messages[0].content: no").field == "messages[0].content"
    assert refusal("something else").field is None


def test_openais_spellings():
    ask = parse(
        openai("a", messages=[], logit_bias={"5": 1.5}, max_completion_tokens=3, logprobs=True, user=None)
    )
    assert ask.options == {"logit_bias": {5: 1.5}, "max_tokens": 3, "logprobs": 0}
    ask = parse(openai("a", "/v1/completions", prompt=[1, 2], logprobs=4, stop="x", echo=False))
    assert ask.prompt == [1, 2] and ask.options == {"logprobs": 4, "stop": "x"}
    for wrong in (
        {"prompt": "x"},
        {"messages": [], "top_logprobs": 2},
        {"messages": [], "max_tokens": 3, "max_completion_tokens": 4},
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        {"messages": [], "logit_bias": {"x": 1}},
        {"messages": "hi"},
        {"messages": [], "tools": []},
    ):
        with pytest.raises(InvalidArgument):
            parse(openai("a", **wrong))
