"""From chat messages to prompt tokens, so that no message can forge a control token.

Templates write control tokens as text, <|im_end|> say, and a message may hold the same text. What a template
wrote and what a message held cannot be told apart in the rendered text alone, so some characters of the
messages are swapped for private ones before rendering: at least one of each control token's name (`guards`).
A name found in the rendered text then has its guards from the template. The private characters are swapped
back before the plain text between control tokens is encoded. A message without guard characters is not
touched at all, and each character stays one character, so that a template's trimming, slicing and testing of
contents goes as it would. What a template does not see is a control token's name inside a message.
"""

from __future__ import annotations

from typing import Any

from runtime.errors import InvalidArgument
from runtime.tokenizer.template import ChatTemplate
from runtime.tokenizer.tokenizer import Tokenizer

__all__ = ["MISTRAL_TEMPLATE", "ROLES", "default_template", "guards", "render_chat"]

# A role is part of the prompt's frame (<|system|> is written as '<|' + role + '|>'): only known ones.
ROLES = ("system", "developer", "user", "assistant", "tool", "ipython")

# <s> [INST] QUERY_1 [/INST] ANSWER_1</s> [INST] QUERY_2 [/INST], the form of Mistral's first instruct models
# and of miqu-1-70b's model card. It has no system turn: that text goes before the first query.
MISTRAL_TEMPLATE = """\
{%- set first = messages[0]['role'] == 'system' -%}
{%- set turns = messages[1:] if first else messages -%}
{{- bos_token -}}
{%- for message in turns -%}
  {%- if message['role'] != ('user' if loop.index0 is even else 'assistant') -%}
    {%- set index = loop.index0 + (1 if first else 0) -%}
    {{- raise_exception("after an optional system message, user and assistant must take turns; message "
                        ~ index ~ " is of the role " ~ message['role']) -}}
  {%- elif message['role'] == 'user' -%}
    {{- ' [INST] ' ~ (messages[0]['content'] ~ '\\n\\n' if first and loop.first else '')
        ~ message['content'] ~ ' [/INST]' -}}
  {%- else -%}
    {{- ' ' ~ message['content'] | trim ~ eos_token -}}
  {%- endif -%}
{%- else -%}
  {{- raise_exception("a system message alone has no form here; add a user message") -}}
{%- endfor -%}
"""

_PREFERRED = "|｜▁"  # characters of control tokens' names that plain text and templates' tests seldom have
_PRIVATE = range(0x10FFFD, 0xF0000, -1)  # the planes of private use, from the top


def default_template(metadata: dict[str, Any]) -> str | None:
    """The chat template of a GGUF: its own, Mistral's for a Llama-type (SPM) vocabulary without one, else
    None. Raises nothing: load_tokenizer has checked the type."""
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str) and template:
        return template
    return MISTRAL_TEMPLATE if metadata.get("tokenizer.ggml.model") == "llama" else None


def guards(names: list[str]) -> str:
    """Characters such that each name holds one at least: a preferred one where it can be, else its first."""
    found: dict[str, None] = {}
    for name in names:
        if not any(character in found for character in name):
            found[next((c for c in _PREFERRED if c in name), name[0])] = None
    return "".join(found)


def render_chat(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: list[dict[str, str]],
    add_generation_prompt: bool = True,
) -> list[int]:
    """The prompt tokens of a conversation, a BOS first where the model wants one.

    A message is {"role": one of ROLES, "content": text}. Raises InvalidArgument naming messages, or the one
    at fault, where they are malformed or the template refuses them."""
    _check(messages)
    contents = "".join(message["content"] for message in messages)
    used = set(contents)
    present = [guard for guard in guards(sorted(tokenizer.control_tokens)) if guard in used]
    free = (chr(code) for code in _PRIVATE if chr(code) not in used and chr(code) not in template.source)
    private = dict(zip(present, free, strict=False))
    if len(private) < len(present):
        raise InvalidArgument("messages", "they hold every private-use character")
    hide = str.maketrans(private)
    show = str.maketrans({hidden: guard for guard, hidden in private.items()})
    text = template.render(
        [{**message, "content": message["content"].translate(hide)} for message in messages],
        add_generation_prompt=add_generation_prompt,
    )
    parts = [part if isinstance(part, int) else part.translate(show) for part in tokenizer.split(text)]
    return tokenizer.encode_parts(parts)


def _check(messages: list[dict[str, str]]) -> None:
    if not messages:
        raise InvalidArgument("messages", "there are none")
    for index, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise InvalidArgument(f"messages[{index}].role", f"{role!r:.40} is not one of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise InvalidArgument(f"messages[{index}].content", "not a text")
        try:
            content.encode()
        except UnicodeEncodeError as error:
            raise InvalidArgument(
                f"messages[{index}].content", f"not valid Unicode at character {error.start}"
            ) from None
