"""Chat templates by themselves: Hugging Face's dialect, errors, and limits that no template passes."""

import datetime
import os
import resource
import sys
import threading
import time
from pathlib import Path

import pytest

from runtime.errors import BadModelFile, InvalidArgument, UnsupportedModel
from runtime.tokenizer import ChatTemplate
from runtime.tokenizer.chat import MISTRAL_TEMPLATE

HI = [{"role": "user", "content": "hi"}]


def render(source, messages=HI, **options):
    return ChatTemplate(source, bos="<s>", eos="</s>", file="m.gguf").render(messages, **options)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}", "<s>hi</s>"),
        ("{% if true %}\n  {% for m in messages %}\n{{ m.role }}\n  {% endfor %}\n{% endif %}\n", "user\n"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{{ {'a': 'é<'} | tojson }}", '{"a": "é<"}'),
        ("{% generation %}{{ messages[0].content | trim }}{% endgeneration %}!", "hi!"),
        ("{% if tools is none and not tools %}no tools{% endif %}", "no tools"),
        ("{% if add_generation_prompt %}go{% endif %}", "go"),
        ("{{ strftime_now('%d %b %Y') }}", "26 Jul 2024"),
        (
            "{% set a = namespace(n=0) %}{% for m in messages %}{% set a.n = a.n + 1 %}{% endfor %}{{ a.n }}",
            "1",
        ),
        ("{{ ''.__class__ }}{{ messages.__init__ }}", ""),
    ],
)
def test_dialect(source, expected):
    assert render(source) == expected


def test_the_date_is_the_templates():
    template = ChatTemplate("{{ strftime_now('%F') }}", bos="", eos="", date=datetime.date(2031, 5, 4))
    assert template.render(HI) == "2031-05-04"


def test_what_a_template_raises():
    with pytest.raises(InvalidArgument, match=r"^messages: no user here$"):
        render("{{ raise_exception('no ' + messages[0].role + ' here') }}")
    with pytest.raises(InvalidArgument, match=r"the chat template failed: UndefinedError: .*nothing"):
        render("{{ nothing.at.all }}")
    with pytest.raises(InvalidArgument, match="the sandbox forbids"):
        render("{{ messages.append(1) }}")


@pytest.mark.parametrize("source", ["{% if %}", "{{ 1 | random }}", "{% include 'x' %}{% for %}", "{{ 'a }}"])
def test_broken_templates(source):
    with pytest.raises(BadModelFile, match=r"m\.gguf: chat_template: line 1: "):
        ChatTemplate(source, bos="", eos="", file="m.gguf")


def test_too_long_templates():
    with pytest.raises(BadModelFile, match=r"m\.gguf: chat_template: longer than"):
        ChatTemplate("x" * (1 << 19), bos="", eos="", file="m.gguf")


DOUBLING = "{% set n = namespace(x='ab', y=[1], z=[1]) %}{% for i in range(40) %}"
BOMBS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "range": "{% for i in range(10 ** 12) %}x{% endfor %}",
    "output": "{% for i in range(99999) %}" + "x" * 1000 + "{% endfor %}",
    "string": "{{ messages[0].role * 10 ** 10 }}",
    "doubling": DOUBLING + "{% set n.x = n.x ~ n.x %}{% endfor %}",
    "nested lists": DOUBLING + "{% set n.y = [n.y, n.y] %}{% endfor %}{{ n.y }}",
    "comparison": DOUBLING
    + "{% set n.y = [n.y, n.y] %}{% set n.z = [n.z, n.z] %}{% endfor %}{{ n.y == n.z }}",
    "power": "{{ (messages | length + 9) ** (10 ** 9) }}",
    "padding": "{{ messages[0].role.center(10 ** 11) }}",
    "format": "{{ '%99999999999d' | format(1) }}",
    "macro": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
}


def processor_seconds() -> float:
    """That processes of this one have taken, which have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.alone
@pytest.mark.parametrize("name", sorted(BOMBS))
def test_bombs_end(name):
    template = ChatTemplate(BOMBS[name], bos="", eos="", file="m.gguf")
    started, taken = time.monotonic(), processor_seconds()
    with pytest.raises(InvalidArgument, match=r"^messages: "):
        template.render(HI)
    template.close()
    # One second of processor time for it, and what starting took. On the clock a busy machine, or one that
    # stands still for a while, takes as long as it likes; a bomb that nothing ends takes minutes.
    assert processor_seconds() - taken < 4
    assert time.monotonic() - started < 60


def test_a_bomb_for_the_compiler():
    """jinja2 folds constants when it compiles."""
    try:
        template = ChatTemplate("{{ 10 ** 10 ** 8 }}{{ 'a' * 10 ** 12 }}", bos="", eos="", file="m.gguf")
    except UnsupportedModel as error:
        assert "m.gguf: chat_template: compiling it ran out of its limits" in str(error)
    else:
        with pytest.raises(InvalidArgument):
            template.render(HI)


def test_a_template_lives_on_after_a_bomb_while_threads_wait():
    source = (
        "{% if messages[0].content == 'bomb' %}" + BOMBS["loops"] + "{% endif %}{{ messages[0].content }}"
    )
    template = ChatTemplate(source, bos="", eos="")
    results = {}

    def ask(content):
        try:
            results[content] = template.render([{"role": "user", "content": content}])
        except InvalidArgument as error:
            results[content] = error.reason

    threads = [threading.Thread(target=ask, args=(c,)) for c in ["bomb", *map(str, range(20))]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert "limits" in results.pop("bomb")
    assert results == {str(n): str(n) for n in range(20)}


def test_the_worker_ends_and_starts_again():
    template = ChatTemplate("{{ messages[0].content }}", bos="", eos="")
    first = template._worker
    template.close()
    assert first.poll() is not None
    assert template.render(HI) == "hi"
    second = template._worker
    del template
    assert second.poll() is not None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_worker_knows_no_secrets(monkeypatch):
    monkeypatch.setenv("A_TOKEN", "hush")
    template = ChatTemplate("x", bos="", eos="")
    environment = Path(f"/proc/{template._worker.pid}/environ").read_bytes()
    assert b"hush" not in environment and b"PYTHONHASHSEED" in environment
    assert b"hush" in os.environb[b"A_TOKEN"]


def test_mistral_form():
    system, user, assistant = ({"role": r, "content": r[0].upper()} for r in ("system", "user", "assistant"))
    assert render(MISTRAL_TEMPLATE, [user]) == "<s> [INST] U [/INST]"
    assert render(MISTRAL_TEMPLATE, [system, user]) == "<s> [INST] S\n\nU [/INST]"
    expected = "<s> [INST] S\n\nU [/INST] A</s> [INST] U [/INST]"
    assert render(MISTRAL_TEMPLATE, [system, user, assistant, user]) == expected
    for wrong in ([user, user], [assistant], [user, system], [user, {"role": "tool", "content": ""}]):
        with pytest.raises(InvalidArgument, match=r"^messages: .* take turns; message [01] is of the role"):
            render(MISTRAL_TEMPLATE, wrong)
    with pytest.raises(InvalidArgument, match="add a user message"):
        render(MISTRAL_TEMPLATE, [system])
