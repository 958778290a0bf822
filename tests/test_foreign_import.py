"""Folders that are not whole are refused when they are imported, in one sentence; what rightly lacks is not."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from foreign_folders import CONFIGS, SMALL, foreign_tokenizer, write_foreign
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from gori.errors import GoriError
from gori.teacher import foreign
from gori.teacher.foreign import Loading, import_teacher, open_foreign

FLOAT = Loading(dtype="float32")
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_foreign(tmp_path / "of", "qwen3_moe", shard="1GB")


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(foreign.console, "log", lines.append)
    return lines


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def set_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def test_a_tensor_that_is_missing_is_named(folder: Path, tmp_path: Path) -> None:
    change(folder, lambda t: t.pop(Q_PROJ))
    with pytest.raises(GoriError, match=rf"lacks {Q_PROJ}, which would be random"):
        import_teacher(folder, FLOAT, tmp_path / "t")
    change(folder, lambda t: [t.pop(k) for k in list(t) if "layers.0.self_attn" in k])
    with pytest.raises(GoriError, match=r"k_norm\.weight, .*, .* and 4 more tensors"):
        import_teacher(folder, FLOAT, tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_tensors_of_another_shape_are_named_with_both(folder: Path, tmp_path: Path) -> None:
    set_config(folder, intermediate_size=48, moe_intermediate_size=48)
    with pytest.raises(GoriError, match=r"down_proj \(\(4, 32, 32\), config\.json asks for \(4, 32, 48\)\)"):
        import_teacher(folder, FLOAT, tmp_path / "t")


def test_an_untied_head_may_not_be_missing_and_a_tied_one_may(folder: Path, tmp_path: Path) -> None:
    change(folder, lambda t: t.pop("lm_head.weight"))
    with pytest.raises(GoriError, match=r"lacks lm_head\.weight"):
        import_teacher(folder, FLOAT, tmp_path / "t")
    set_config(folder, tie_word_embeddings=True)
    import_teacher(folder, FLOAT, tmp_path / "t")
    open_foreign(tmp_path / "t")


def test_what_is_not_read_is_no_error_and_told_where_it_is_a_layer(tmp_path: Path, said: list[str]) -> None:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SMALL, vocab_size=320)).save_pretrained(tmp_path / "of")
    foreign_tokenizer().save_pretrained(tmp_path / "of")
    change(tmp_path / "of", lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    import_teacher(tmp_path / "of", FLOAT, tmp_path / "t")
    assert not said
    set_config(tmp_path / "of", num_hidden_layers=1)
    import_teacher(tmp_path / "of", FLOAT, tmp_path / "one")
    assert "does not read model.layers.1.input_layernorm.weight" in said[0]


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path, kind: str) -> None:
    folder = write_foreign(tmp_path / "of", kind)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(GoriError, match=r"gives no tokens for .*tokenizer\.json|transformers cannot load"):
        import_teacher(folder, FLOAT, tmp_path / "t")


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"hidden_size": "wide"}, "transformers cannot load .*hidden_size"),
        ({"hidden_act": "nope"}, "transformers cannot load"),
        ({"num_experts_per_tok": 9}, "cannot be asked .*: see its config"),
    ],
)
def test_a_config_of_nothing_is_refused_in_one_sentence(
    folder: Path, tmp_path: Path, values: dict[str, object], why: str
) -> None:
    set_config(folder, **values)
    with pytest.raises(GoriError, match=why) as e:
        import_teacher(folder, FLOAT, tmp_path / "t")
    assert "\n" not in str(e.value)


def test_a_tokenizer_of_a_larger_vocabulary_is_refused(folder: Path, tmp_path: Path) -> None:
    set_config(folder, vocab_size=40)
    change(folder, lambda t: t.update({k: t[k][:40].clone() for k in ("model.embed_tokens.weight", "lm_head.weight")}))
    with pytest.raises(GoriError, match=r"gives token \d+ of a vocabulary of 40"):
        import_teacher(folder, FLOAT, tmp_path / "t")


@pytest.mark.parametrize(
    ("template", "lack"), [("", "a chat template:"), ("{{ messages }}", "that shows tools:"), (None, "")]
)
def test_a_template_that_cannot_show_tools_is_told(
    folder: Path, tmp_path: Path, said: list[str], template: str | None, lack: str
) -> None:
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    import_teacher(folder, FLOAT, tmp_path / "t")
    assert len(said) == bool(lack)
    assert not lack or lack in said[0]


def test_the_command_says_nothing_of_other_libraries(
    folder: Path, tmp_path: Path, gori: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    done = gori("teacher", "import", folder, "--out", tmp_path / "t", "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    change(folder, lambda t: t.pop(Q_PROJ))
    refused = gori("teacher", "import", folder, "--out", tmp_path / "t2")
    assert refused.returncode == 1
    assert len(refused.stderr.splitlines()) == 1
