"""A .litertlm: that LiteRT-LM says what the .tflite says, that its parts are those beside it, and what is refused."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
import shutil
from pathlib import Path

import pytest
import torch

from decoders import random_decoder
from gori import checkpoint
from gori import tokenizer as tokenizers
from gori.errors import GoriError
from gori.export import golden, litert, litert_bundle
from gori.export.build import export
from gori.export.litert_bundle import write_bundle
from gori.export.litert_bundle_read import BUNDLE, MODEL, check_bundle, fields, sections
from gori.export.litert_read import read
from gori.export.weights import Options, read_weights
from gori.runtime.generate import generate
from gori.runtime.litert import open_litert
from gori.runtime.litert_lm import open_bundle
from gori.runtime.session import open_session
from gori.tokenizer import Tokenizer, copy_files
from students import CONTEXT, LLAMA

END = (1,)
"""<|end|> of gori's tokenizers."""
SPOKEN = ("온도를 올려 줘", "set it to 22 degrees", "창문 open")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A student that speaks printable ASCII, with a tokenizer, and its export: other bytes of a random model are no
    text, and LiteRT-LM's strings end at a zero."""
    source, out = tmp_path_factory.mktemp("bundle") / "c", tmp_path_factory.mktemp("bundle") / "out"
    source.mkdir()
    tokenizer = tokenizers.train([f" {t}" for t in SPOKEN], {}, 300)
    tokenizer.save(source)
    cfg = dataclasses.replace(LLAMA, vocab_size=300, tied=False)
    model = random_decoder(cfg)
    said = [tokenizer.token_bytes(i) for i in range(300)]
    spoken = [t.isascii() and t.decode().isprintable() and t != b"<|end|>" for t in said]
    with torch.no_grad():
        model.lm_head.weight[~torch.tensor(spoken)] = 0
    checkpoint.save(model, source)
    export("litert", source, out, context=64, chunk=32)
    return source, out


def test_litert_lm_says_what_the_tflite_says(bundle: tuple[Path, Path]) -> None:
    source, out = bundle
    tokenizer, session = Tokenizer.load(source), open_session(out)
    with open_bundle(out) as engine:
        assert engine.eos_ids == [tokenizer.id("<|end|>")]
        for text in SPOKEN:
            prompt = f"<|user|> {text}<|assistant|>"
            ids = tokenizer.encode_markup(prompt)
            assert engine.encode(prompt) == ids
            assert engine.render(text) == prompt
            session.reset()
            want = tokenizer.decode(list(generate(session, ids, (), max_new=12)))
            assert len(want) >= 6
            assert engine.complete(prompt, 12) == want
            assert engine.answer(text, 12) == want


def test_a_bundle_holds_the_model_and_the_same_bytes_again(bundle: tuple[Path, Path], tmp_path: Path) -> None:
    source, out = bundle
    assert bytes(sections(out / BUNDLE)[MODEL]) == (out / "model.tflite").read_bytes()
    litert.write(read_weights(source), tmp_path, Options(source, 64, 32, None, END))
    for name in ("model.tflite", "model.litertlm"):
        assert (tmp_path / name).read_bytes() == (out / name).read_bytes()


def test_a_bundle_of_another_model_or_a_broken_one_is_refused(bundle: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(bundle[1], tmp_path, dirs_exist_ok=True)
    data = bytearray((bundle[1] / "model.litertlm").read_bytes())
    at = data.find(b"TFL3") + 100_000
    data[at] ^= 1
    (tmp_path / "model.litertlm").write_bytes(data)
    with pytest.raises(GoriError, match="holds another model than"):
        read(tmp_path)
    (tmp_path / "model.litertlm").write_bytes(data[: at // 2])
    with pytest.raises(GoriError, match=r"is not a \.litertlm of gori's"):
        read(tmp_path)
    with pytest.raises(GoriError, match="does not exist: export a checkpoint"):
        open_bundle(tmp_path / "other")


def test_a_template_without_a_question_is_refused_with_the_mend(bundle: tuple[Path, Path], tmp_path: Path) -> None:
    source = tmp_path / "c"
    shutil.copytree(bundle[0], source)
    (source / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role }}{% endfor %}")
    (tmp_path / "out").mkdir()
    with pytest.raises(GoriError, match=r"does not render a question and an answer .* remove it to bundle without"):
        litert.write(read_weights(source), tmp_path / "out", Options(source, CONTEXT, 32, None, END))


def test_golden_answers_of_the_driver_are_the_engines(bundle: tuple[Path, Path]) -> None:
    written = golden.read(bundle[1])
    assert written.answers
    assert golden.check(open_litert(bundle[1] / "model.tflite", 1), written).met


OTHERS = {
    "tokenizer": ("tokenizer.json", lambda t: t.replace('"merges"', '"merges" '), r"tokenizer than tokenizer\.json"),
    "stop tokens": ("generation_config.json", lambda _: '{"eos_token_id": 7}', r"set of stop tokens \(\[1\]\) than"),
    "template": ("chat_template.jinja", lambda t: t + "{# other #}", r"chat template than chat_template\.jinja"),
}  # fmt: skip


@pytest.mark.parametrize("part", OTHERS)
def test_a_bundle_with_other_text_than_the_directory_is_refused(
    part: str, bundle: tuple[Path, Path], tmp_path: Path
) -> None:
    name, change, message = OTHERS[part]
    shutil.copytree(bundle[1], tmp_path / "out")
    path = tmp_path / "out" / name
    path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(GoriError, match=f"model.litertlm holds another {message}"):
        read(tmp_path / "out")
    if part == "tokenizer":
        path.unlink()
        with pytest.raises(GoriError, match="holds another tokenizer"):
            read(tmp_path / "out")


def test_a_writer_that_bundles_another_checkpoints_text_stops_the_export(
    bundle: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, other = bundle[0], tmp_path / "other"
    shutil.copytree(source, other)
    (other / "tokenizer.json").write_text((source / "tokenizer.json").read_text(encoding="utf-8") + " ")
    wrong = {
        "tokenizer": lambda out, o: write_bundle(out, dataclasses.replace(o, source=other)),
        "set of stop tokens": lambda out, o: write_bundle(out, dataclasses.replace(o, eos_ids=(77,))),
        "context": lambda out, o: write_bundle(out, dataclasses.replace(o, context=o.context + 1)),
    }
    for part, write_wrong in wrong.items():
        monkeypatch.setattr(litert, "write_bundle", write_wrong)
        with pytest.raises(GoriError, match=f"model.litertlm holds another {part}"):
            export("litert", source, tmp_path / "out", context=64, chunk=32)
    monkeypatch.setattr(litert, "write_bundle", write_bundle)
    monkeypatch.setattr(litert_bundle, "affixes", lambda *_: (("<|user|>", ""), ("", "")))
    with pytest.raises(GoriError, match=r"model.litertlm holds another text around a turn"):
        export("litert", source, tmp_path / "out", context=64, chunk=32)
    assert [p.name for p in tmp_path.iterdir()] == ["other"]


def test_damaged_metadata_of_a_bundle_is_refused(bundle: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(bundle[1], tmp_path / "out")
    path, rng = tmp_path / "out" / BUNDLE, random.Random(0)
    good, parts = path.read_bytes(), sections(path)
    model, head = (tmp_path / "out" / "model.tflite").read_bytes(), good.find(b"TFL3")
    facts = good.find(bytes(parts[5]))
    for i in range(300):
        data = bytearray(good)
        if i % 3:
            data[facts + rng.randrange(len(parts[5]))] ^= 1 << rng.randrange(8)
        else:
            data[rng.randrange(32, min(head, 300))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        with contextlib.suppress(GoriError):
            check_bundle(path, memoryview(model))
            assert i % 3 == 0  # the builder's own record of who made it


@pytest.mark.parametrize("message", [b"\x0a", b"\x0a\x05ab", b"\x0d\0\0\0\0", b"\xff" * 11, b"\x08"])
def test_bytes_that_are_no_protobuf_are_refused(message: bytes) -> None:
    with pytest.raises(ValueError, match="its metadata"):
        fields(message)


def test_a_checkpoint_that_names_no_end_is_not_bundled(bundle: tuple[Path, Path], tmp_path: Path) -> None:
    source = tmp_path / "c"
    shutil.copytree(bundle[0], source)
    (source / "generation_config.json").write_text("{}")
    with pytest.raises(GoriError, match=r"names no token that ends an answer.*name eos_token_id in generation_config"):
        export("litert", source, tmp_path / "out", context=64, chunk=32)


def test_what_the_engine_of_a_bundle_refuses_is_one_sentence(bundle: tuple[Path, Path]) -> None:
    with open_bundle(bundle[1]) as engine:

        class Refuses:
            def __getattr__(self, name: str) -> object:
                raise RuntimeError(f"INTERNAL:\n  {name}\n" + "at native\n" * 99)

        real, engine._engine = engine._engine, Refuses()
        for what, call in (("tokenize", engine.encode), ("render", engine.render), ("answer", engine.answer)):
            with pytest.raises(GoriError, match=rf"LiteRT-LM does not {what} .*INTERNAL: .*export it again") as e:
                call("a")
            assert "\n" not in str(e.value)
            assert len(str(e.value)) < 500
        engine._engine = real
    with pytest.raises(GoriError, match="is closed"):
        engine.answer("a")


def test_a_list_of_named_templates_is_bundled_as_its_default(bundle: tuple[Path, Path], tmp_path: Path) -> None:
    source = tmp_path / "c"
    shutil.copytree(bundle[0], source)
    default = (source / "chat_template.jinja").read_text(encoding="utf-8")
    (source / "chat_template.jinja").unlink()
    named = [{"name": "tool_use", "template": "{{ 1 }}"}, {"name": "default", "template": default}]
    config = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    (source / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": named}))
    (tmp_path / "out").mkdir()
    copy_files(source, tmp_path / "out")
    litert.write(read_weights(source), tmp_path / "out", Options(source, 64, 32, None, END))
    assert (tmp_path / "out" / BUNDLE).read_bytes() == (bundle[1] / BUNDLE).read_bytes()
    read(tmp_path / "out")
