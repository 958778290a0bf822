"""model.litertlm: the .tflite with its tokenizer and prompt template, as LiteRT-LM loads them.

Stop tokens and template are the checkpoint's, written out: nothing is derived by the builder. The same inputs give the
same bytes: what the builder would draw by chance and by the clock is taken from the content.
"""

from __future__ import annotations

import hashlib
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gori.artifact import read_object
from gori.errors import GoriError
from gori.export.litert_read import BUNDLE, FILE, bundled_model, same_bytes
from gori.export.weights import Options
from gori.runtime.flatbuffer import mapped

PLAIN_CONTENT = """\
{%- set plain = namespace(messages=[]) -%}
{%- for m in messages -%}
{%- if m.content is defined and m.content is sequence and m.content is not string -%}
{%- set plain.messages = plain.messages + [dict(m, content=m.content | map(attribute='text') | join(''))] -%}
{%- else -%}
{%- set plain.messages = plain.messages + [m] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = plain.messages -%}
"""
"""Put before a template: LiteRT-LM hands a message's content over as a list of parts, templates expect text."""
USER_SAYS, MODEL_SAYS = "gori-user-text", "gori-model-text"
"""Texts by whose places in a rendered template the text around a turn is found."""


def write_bundle(out: Path, o: Options) -> int:
    """Write model.litertlm beside the model.tflite of `out`; its bytes. GoriError if it does not hold that model."""
    builder = load_builder()
    tokenizer, model = o.source / "tokenizer.json", out / FILE
    with tempfile.TemporaryDirectory() as scratch, fixed_identity(builder, content_id(model, tokenizer)):
        facts = Path(scratch) / "metadata.pb"
        facts.write_bytes(llm_metadata(o))
        file = builder.LitertLmFileBuilder()
        file.add_llm_metadata(str(facts))
        file.add_hf_tokenizer(str(tokenizer))
        file.add_tflite_model(str(model), builder.TfLiteModelType.PREFILL_DECODE)
        with open(out / BUNDLE, "wb") as f:
            file.build(f)
    if not same_bytes(bundled_model(out / BUNDLE), mapped(model)):
        raise GoriError(f"{BUNDLE} holds another model than {FILE}: install constraints.txt's litert-lm-builder")
    return (out / BUNDLE).stat().st_size


def load_builder() -> Any:
    """The builder's module; GoriError if the wheel is missing."""
    try:
        from litert_lm_builder import litertlm_builder
    except ImportError as e:
        raise GoriError("a .litertlm needs the builder of LiteRT-LM: pip install 'gori[litert]'") from e
    return litertlm_builder


def content_id(*files: Path) -> str:
    """A UUID from the content of files."""
    digest = hashlib.sha256(b"".join(hashlib.sha256(mapped(f)).digest() for f in files))
    return str(uuid.UUID(bytes=digest.digest()[:16]))


@contextmanager
def fixed_identity(builder: Any, identity: str) -> Iterator[None]:
    """Let bundles bear this UUID and no time. The builder (0.18.1) overwrites both on every build and has no option."""
    kept = builder.populate_system_metadata
    entry = builder.Metadata(key="uuid", value=identity, dtype=builder.DType.STRING)
    builder.populate_system_metadata = lambda entries: [*entries, entry]
    try:
        yield
    finally:
        builder.populate_system_metadata = kept


def llm_metadata(o: Options) -> bytes:
    """A serialized LlmMetadata: stop tokens by id, context, template. No start token: a template that wants one
    writes it, and a second would be put before it."""
    from litert_lm_builder.runtime.proto import llm_metadata_pb2

    message: Any = vars(llm_metadata_pb2)["LlmMetadata"](max_num_tokens=o.context)  # protobuf makes it at import
    for eos in o.eos_ids:
        message.stop_tokens.add().token_ids.ids.append(eos)
    message.llm_model_type.generic_model.SetInParent()
    template = read_template(o.source)
    if template:
        message.jinja_prompt_template = PLAIN_CONTENT + template
        user, model = affixes(PLAIN_CONTENT + template, o.source)
        message.prompt_templates.user.prefix, message.prompt_templates.user.suffix = user
        message.prompt_templates.model.prefix, message.prompt_templates.model.suffix = model
    return message.SerializeToString(deterministic=True)


def read_template(source: Path) -> str:
    """The checkpoint's chat template, a file of its own or in tokenizer_config.json; empty if it has none."""
    own, config = source / "chat_template.jinja", source / "tokenizer_config.json"
    if own.exists():
        return own.read_text(encoding="utf-8")
    template = read_object(config).get("chat_template") if config.exists() else None
    return template if isinstance(template, str) else ""


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
    except (jinja2.TemplateError, ValueError, IndexError) as e:
        raise GoriError(
            f"the chat template of {source} does not render a question and an answer ({e}): LiteRT-LM needs both; "
            "mend chat_template.jinja, or remove it to bundle without a template"
        ) from e
    return (before, after), (opened.removeprefix(asked), closing)
