"""A checkpoint's chat template, for every format that carries one, and what it writes around a turn.

Knows where transformers keeps templates; nothing of any format. No torch.
"""

from __future__ import annotations

from pathlib import Path

from gori.artifact import read_object
from gori.errors import GoriError

DEFAULT = "default"
"""The one of several named templates that transformers takes when none is asked for."""
USER_SAYS, MODEL_SAYS = "gori-user-text", "gori-model-text"
"""Texts by whose places in a rendered template the text around a turn is found."""
RENDERING = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""What a template's own expressions end in."""


def read_template(source: Path) -> str:
    """The folder's chat template: chat_template.jinja, or else tokenizer_config.json's, of several the one named
    `default`; empty if it has none. GoriError for a list without a default, and for what is no template."""
    own, config = source / "chat_template.jinja", source / "tokenizer_config.json"
    if own.exists():
        return own.read_text(encoding="utf-8")
    found = read_object(config).get("chat_template") if config.exists() else None
    if isinstance(found, list):
        named = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
        if DEFAULT not in named:
            raise GoriError(
                f"{config} names the chat templates {', '.join(map(str, named)) or 'of none'}, and none is "
                f"{DEFAULT!r}: save the one that answers are asked with as chat_template.jinja"
            )
        found = named[DEFAULT]
    if not isinstance(found, str | None):
        raise GoriError(
            f"chat_template of {config} is a {type(found).__name__}, not a text: save it as chat_template.jinja"
        )
    return found or ""


def affixes(template: str, source: Path) -> tuple[tuple[str, str], tuple[str, str]]:
    """What the template writes before and behind a user's turn, and a model's."""
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    user, model = {"role": "user", "content": USER_SAYS}, {"role": "assistant", "content": MODEL_SAYS}
    try:
        compiled = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(template)
        asked = compiled.render(messages=[user])
        opened = compiled.render(messages=[user], add_generation_prompt=True)
        answered = compiled.render(messages=[user, model])
        before, after = asked.split(USER_SAYS)
        closing = answered.split(MODEL_SAYS)[1]
        if not opened.startswith(asked):
            raise ValueError("the text of a turn changes when an answer is asked for")
    except (jinja2.TemplateError, *RENDERING) as e:
        raise GoriError(
            f"the chat template of {source} does not render a question and an answer ({e}): LiteRT-LM needs both; "
            "mend chat_template.jinja, or remove it to bundle without a template"
        ) from e
    return (before, after), (opened.removeprefix(asked), closing)
