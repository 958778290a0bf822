"""Teachers of transformers' own classes: imported by reference, they say what transformers says, and are checked."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cached import make_cache, write_teacher
from foreign_folders import CONFIGS, write_foreign
from torch import nn
from transformers import AutoModelForCausalLM

from gori import checkpoint, evaluate
from gori.artifact import read_manifest
from gori.calls import END, Call, Function
from gori.cli import root
from gori.corpus import Corpus
from gori.data import Conversation, Turn, prompt_ids
from gori.errors import GoriError
from gori.recipe import parse
from gori.teacher import foreign
from gori.teacher.cache_read import CachedRows
from gori.teacher.foreign import Loading, import_teacher, open_foreign
from gori.teacher.foreign_answers import answer_all, read_answer
from gori.teacher.foreign_bits import Packed
from gori.teacher.foreign_recipe import check_teacher
from gori.teacher.foreign_rows import definitions, spoken_by, token_bytes
from gori.tokenizer import Tokenizer

FLOAT = Loading(dtype="float32")
FUNCTIONS = {
    "set_temp": Function("set_temp", "", {"zone": {"type": "string"}, "celsius": {"type": "integer"}}, ("zone",)),
    "go": Function("go", "", {"place": {"type": "string"}}, ("place",)),
}


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Kind → an imported teacher, beside whose folder lie its weights in shards."""
    base = tmp_path_factory.mktemp("teachers")
    for kind in CONFIGS:
        import_teacher(write_foreign(base / "of" / kind, kind), FLOAT, base / kind)
    return {kind: base / kind for kind in CONFIGS}


def folder_of(directory: Path) -> Path:
    return Path(read_manifest(directory)["settings"]["folder"])


def ragged() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, valid and wanted of two rows, the second one padded."""
    ids = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    valid = torch.ones_like(ids, dtype=torch.bool)
    valid[1, 6:] = False
    wanted = valid.clone()
    wanted[:, :3] = False
    return ids, valid, wanted


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_imported_teacher_says_what_transformers_says(imported: dict[str, Path], kind: str) -> None:
    folder = folder_of(imported[kind])
    assert len(list(folder.glob("*.safetensors"))) > 2
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids, valid, wanted = ragged()
    with torch.no_grad():
        mine = open_foreign(imported[kind]).logits(ids, valid, wanted)
        alone = model(ids[1:, :6]).logits[0, 3:]  # the padded row without its padding
        theirs = torch.cat((model(ids[:1]).logits[0, 3:], alone))
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_manifest_tells_all_parameters_and_those_of_one_token(imported: dict[str, Path], kind: str) -> None:
    m = read_manifest(imported[kind])["metrics"]
    model = AutoModelForCausalLM.from_pretrained(folder_of(imported[kind]))
    assert m["parameters"] == sum(p.numel() for p in model.parameters())
    layers, experts, chosen = {"deepseek_v3": (1, 8, 2)}.get(kind, (2, 4, 2))
    width = 64 if kind in ("mixtral", "olmoe") else 32
    assert m["parameters"] - m["active_parameters"] == layers * (experts - chosen) * 3 * 32 * width
    assert m["architecture"] == type(model).__name__


def test_the_tokenizer_and_template_stay_as_they_are(imported: dict[str, Path]) -> None:
    directory = imported["qwen3_moe"]
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json", "chat_template.jinja"):
        assert (directory / name).read_bytes() == (folder_of(directory) / name).read_bytes()
    assert not list(directory.glob("*.safetensors"))


def test_a_vocabulary_of_164k_is_carried(tmp_path: Path) -> None:
    folder = write_foreign(tmp_path / "wide", "deepseek_v3", vocab_size=163_840, shard="4MB")
    import_teacher(folder, FLOAT, tmp_path / "imported")
    teacher = open_foreign(tmp_path / "imported")
    ids, valid, wanted = ragged()
    logits = teacher.logits(ids, valid, wanted)
    assert logits.shape == (int(wanted.sum()), 163_840)
    assert read_manifest(tmp_path / "imported")["metrics"]["vocab_size"] == teacher.vocab_size == 163_840


def test_weights_that_changed_are_seen_by_what_they_say(tmp_path: Path) -> None:
    folder = write_foreign(tmp_path / "of", "mixtral")
    import_teacher(folder, FLOAT, tmp_path / "t")
    other = write_foreign(tmp_path / "other", "mixtral", seed=1)
    for shard in folder.glob("*.safetensors"):
        shard.write_bytes((other / shard.name).read_bytes())  # the same names and sizes
    with pytest.raises(GoriError, match=r"no longer says what it said when it was imported.*import it again"):
        open_foreign(tmp_path / "t")
    shard.unlink()
    with pytest.raises(GoriError, match=f"{shard.name} is missing"):
        open_foreign(tmp_path / "t")


def test_another_rounding_is_told_and_taken(
    tmp_path: Path, imported: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(foreign.console, "log", said.append)
    directory = imported["olmoe"]
    probe = json.loads((directory / "probe.json").read_text())
    other = json.loads(json.dumps(probe))
    other["sha256"] = "0" * 64
    other["texts"][0]["logprob"][0] += 1e-4
    foreign._check_probe(probe, other, "float32", directory)
    assert "rounds otherwise" in said[0]
    other["texts"][1]["top"] = [9, 8, 7, 6, 5]
    with pytest.raises(GoriError, match="no longer says"):
        foreign._check_probe(probe, other, "float32", directory)


@pytest.mark.parametrize("kind", ["qwen3_moe", "deepseek_v3"])
def test_four_bits_compute_with_the_rounded_weights(tmp_path: Path, imported: dict[str, Path], kind: str) -> None:
    folder = folder_of(imported[kind])
    import_teacher(folder, Loading(dtype="float32", bits=4), tmp_path / "four")
    four = open_foreign(tmp_path / "four")
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    packed = 0
    with torch.no_grad():
        for name, module in model.named_modules():
            for key, p in module._parameters.items():
                stack = name.endswith("experts") and p.dim() == 3
                linear = isinstance(module, nn.Linear) and module is not model.lm_head and key == "weight"
                if stack or linear:
                    rounded = Packed(p)
                    assert (rounded() - p).abs().max() <= p.abs().max() / 13  # half a step is 1/14
                    assert rounded.packed.numel() * 2 == p.numel()
                    p.copy_(rounded())
                    packed += 1
        ids, valid, wanted = ragged()
        theirs = model(ids, attention_mask=valid.long()).logits[wanted]
        torch.testing.assert_close(four.logits(ids, valid, wanted), theirs, rtol=1e-4, atol=1e-4)
    assert packed > 8
    metrics = read_manifest(tmp_path / "four")["metrics"]
    assert metrics["parameters"] == sum(p.numel() for p in model.parameters())


def test_what_cannot_be_loaded_is_refused_in_one_sentence(tmp_path: Path, imported: dict[str, Path]) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(GoriError, match=r"has no config\.json"):
        import_teacher(tmp_path / "empty", FLOAT, tmp_path / "t")
    folder = folder_of(imported["mixtral"])
    with pytest.raises(GoriError, match="needs accelerate: pip install accelerate"):
        import_teacher(folder, Loading(device_map="auto"), tmp_path / "t")
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "nothing"}')
    with pytest.raises(GoriError, match="transformers cannot load"):
        import_teacher(tmp_path / "empty", FLOAT, tmp_path / "t")
    cut = write_foreign(tmp_path / "cut", "mixtral")
    shard = max(cut.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(GoriError, match="transformers cannot load"):
        import_teacher(cut, FLOAT, tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_the_command_imports(tmp_path: Path, imported: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_of(imported["mixtral"])
    root.main(
        ["teacher", "import", str(folder), "--out", str(tmp_path / "t"), "--dtype", "float32", "--json"],
        standalone_mode=False,
    )
    body = json.loads(capsys.readouterr().out)
    assert body["metrics"]["architecture"] == "MixtralForCausalLM"
    assert body["settings"]["trust_remote_code"] is False


def test_a_row_is_the_template_of_its_turns_and_answers_are_found(imported: dict[str, Path]) -> None:
    tokenizer = open_foreign(imported["qwen3_moe"]).tokenizer
    call = Turn("assistant", None, (Call("go", {"place": "서울역"}),))
    turns = (Turn("user", "안녕"), Turn("assistant", "hello there"), Turn("user", "서울역으로 가자"), call)
    pieces, _ = token_bytes(tokenizer)
    ids, said = spoken_by(tokenizer, Conversation(turns), definitions(FUNCTIONS), pieces)
    text = tokenizer.decode(ids)
    assert text.startswith("<|im_start|>system\n[")
    assert '"name": "set_temp"' in text
    answer = '<tool_call>\n{"name": "go", "arguments": {"place": "서울역"}}\n</tool_call><|im_end|>\n'
    assert [s.text.decode() for s in said] == ["hello there<|im_end|>\n", answer]
    for s in said:
        assert b"".join(pieces[i] for i in ids[s.first : s.first + len(s.at) - 1]) == s.text
    assert b"".join(pieces[i] for i in ids).decode() == text


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('<tool_call>\n{"name": "go", "arguments": {"place": "a"}}\n</tool_call>', (Call("go", {"place": "a"}),)),
        ('<think>{"name": "go"}</think> {"name": "go", "parameters": {"place": "b"}}', (Call("go", {"place": "b"}),)),
        ('[{"name": "go", "arguments": {"place": "{"}}, {"name": "go", "arguments": {"place": "d"}}]',
         (Call("go", {"place": "{"}), Call("go", {"place": "d"}))),
        ("I cannot do that.", ()),
        ('{"name": "fly", "arguments": {}}', None),
        ('{"name": "go", "arguments": {}}', None),
        ('{"name": "go", "arguments": "x"}', None),
        ("<think>endless", None),
        ("", None),
    ],
)  # fmt: skip
def test_what_a_teacher_writes_is_read_as_calls(text: str, wanted: tuple[Call, ...] | None) -> None:
    turn = read_answer(text, FUNCTIONS, calls_wanted=True)
    assert (turn.calls if turn else None) == wanted
    if wanted == ():
        assert read_answer(text, FUNCTIONS, calls_wanted=False) == Turn("assistant", text)


@pytest.mark.parametrize(
    ("sections", "why"),
    [
        ({"teacher": {"path": "T"}}, "learns from its cache: add a section"),
        ({"teacher": {"path": "T"}, "cache": {}}, r"distill\.init teacher takes weights of gori's own decoder"),
        ({"teacher": {"path": "T"}, "cache": {}, "distill": {"init": "random"}}, "to align .* or to sequence"),
        ({"distill": {"tokenizers": "align"}}, "works through a cache"),
        ({"cache": {}, "distill": {"tokenizers": "align"}}, "is for an imported teacher"),
        ({"cache": {"path": "missing"}}, "missing has no manifest"),
    ],
)
def test_what_does_not_go_together_is_refused_before_any_work(
    imported: dict[str, Path], sections: dict[str, Any], why: str
) -> None:
    data = {"train": "a", "dev": "b", "test": "c", "tools": "d"}
    body = json.loads(json.dumps({"name": "n", "data": data, **sections}).replace('"T"', f'"{imported["mixtral"]}"'))
    with pytest.raises(GoriError, match=why):
        check_teacher(parse(body, "recipe"))


def test_a_template_of_nothing_is_refused(tmp_path: Path) -> None:
    folder = write_foreign(tmp_path / "of", "mixtral")
    (folder / "chat_template.jinja").write_text("")
    import_teacher(folder, FLOAT, tmp_path / "t")
    distill = {"init": "random", "tokenizers": "align", "control": "none"}
    body = {"name": "n", "data": {"builtin": "incar"}, "teacher": {"path": str(tmp_path / "t")}, "cache": {}}
    with pytest.raises(GoriError, match="has no chat template"):
        check_teacher(parse({**body, "distill": distill}, "recipe"))


def test_gori_and_transformers_read_one_folder_alike(tmp_path: Path, toy_corpus: Corpus, toy_tokenizer: Path) -> None:
    """A teacher of gori's own, imported as if it were another's: the same cache and the same answers."""
    own = write_teacher(tmp_path / "own", toy_tokenizer)
    import_teacher(own, FLOAT, tmp_path / "imported")
    how = {"method": "topk", "k": 30, "epochs": 1}
    made = [
        CachedRows(make_cache(t, toy_corpus, toy_tokenizer, tmp_path / f"cache-{t.name}", **how)).epoch(0)
        for t in (own, tmp_path / "imported")
    ]
    for a, b in zip(*made, strict=True):
        assert a.soft is not None
        assert b.soft is not None
        assert list(a.ids) == list(b.ids)
        np.testing.assert_allclose(np.sort(a.soft.weights), np.sort(b.soft.weights), rtol=2e-3, atol=1e-6)
    tokenizer = Tokenizer.load(toy_tokenizer)
    rows = toy_corpus.tests["test"]
    answers = answer_all(tmp_path / "imported", toy_corpus.tests, toy_corpus.functions)
    mine = evaluate.batched(checkpoint.load(own).eval(), tokenizer.id(END))([prompt_ids(c, tokenizer) for c in rows])
    for (split, scored), ids in zip(answers, mine, strict=True):
        assert split == "test"
        assert scored.text.startswith(tokenizer.decode(ids[:40]))


@pytest.mark.parametrize("tokenizers", ["align", "sequence"])
def test_a_teacher_with_another_tokenizer_is_cached(
    tmp_path: Path, imported: dict[str, Path], toy_corpus: Corpus, toy_tokenizer: Path, tokenizers: str
) -> None:
    few = dataclasses.replace(toy_corpus, train=toy_corpus.train[:12])
    out = make_cache(imported["mixtral"], few, toy_tokenizer, tmp_path / "cache", tokenizers, epochs=1)
    rows = CachedRows(out)
    m = read_manifest(out)["metrics"]
    assert rows.hard == (tokenizers == "sequence")
    for e in rows.epoch(0):
        assert e.soft is not None
        assert (e.soft.weights.sum(1) <= 1 + 3e-5).all()
    if tokenizers == "align":
        assert m["from_truth_per_answer_token"] < m["mass_per_answer_token"] < 1
        assert m["weight_per_answer_token"] == pytest.approx(m["mass_per_answer_token"], abs=0.05)
    else:
        assert m["entries_per_answer_token"] == 1
    answers = answer_all(imported["mixtral"], {"dev": few.train[:2]}, few.functions)
    assert [s.exact for _, s in answers] == [False, False]


def test_a_row_beyond_the_teachers_context_is_refused(tmp_path: Path, toy_corpus: Corpus, toy_tokenizer: Path) -> None:
    folder = write_foreign(tmp_path / "of", "mixtral")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 64}))
    import_teacher(folder, FLOAT, tmp_path / "t")
    for tokenizers in ("align", "sequence"):
        with pytest.raises(GoriError, match=r"of the teacher's tokens, its context is 64"):
            make_cache(tmp_path / "t", toy_corpus, toy_tokenizer, tmp_path / "cache", tokenizers)
