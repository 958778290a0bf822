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

from gori.errors import GoriError, MissingEngine
from gori.export.litert_bundle_read import BUNDLE, PLAIN_CONTENT
from gori.export.litert_read import FILE
from gori.export.template import affixes, read_template
from gori.export.weights import Options
from gori.runtime.flatbuffer import mapped


def write_bundle(out: Path, o: Options) -> int:
    """Write model.litertlm beside the model.tflite of `out`; its bytes. GoriError for a checkpoint that names no end of
    an answer, without which LiteRT-LM runs no bundle. What it holds is checked by its reader."""
    if not o.eos_ids:
        raise GoriError(
            f"{o.source} names no token that ends an answer, and LiteRT-LM runs no bundle without one: name "
            "eos_token_id in generation_config.json, or export a copy of the folder without tokenizer.json"
        )
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
    return (out / BUNDLE).stat().st_size


def load_builder() -> Any:
    """The builder's module; MissingEngine if the wheel is missing."""
    try:
        from litert_lm_builder import litertlm_builder
    except ImportError as e:
        raise MissingEngine("a .litertlm needs the builder of LiteRT-LM: pip install 'gori[litert]'") from e
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
