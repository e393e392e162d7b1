"""From a model as a command names it to settings with all that is named at hand."""

from __future__ import annotations

from pathlib import Path

from runtime.commands.output import watched
from runtime.config import ModelConfig
from runtime.errors import InvalidArgument, NotFound


def named_model(
    source: str, *, template: Path | None = None, draft: str | None = None, **settings: object
) -> ModelConfig:
    """A model's settings with what is named in them at hand: weights downloaded, template read."""
    from runtime.hub import resolve

    text = None
    if template is not None:
        try:
            text = template.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise NotFound("chat template", str(template), "no such file") from None
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidArgument("chat-template", f"{template} cannot be read: {error}") from None
    path = str(resolve(source, quiet=not watched()))
    guesser = None if draft is None else str(resolve(draft, quiet=not watched()))
    return ModelConfig(path, chat_template=text, draft=guesser, **settings)
