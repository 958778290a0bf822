"""Core ML's reader against packages that lie: it goes by what is computed, not by names, and leaves no
integer unread."""

from __future__ import annotations

import dataclasses
import importlib.util
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gori.errors import GoriError, MissingEngine
from gori.export import coreml, coreml_read, coreml_run
from gori.export.contents import compare
from gori.export.coreml_read import PACKAGE, SPEC, read, read_program
from gori.export.weights import Options, read_weights, wanted
from students import CHUNK, CONTEXT, Case, of, write_checkpoint


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(checkpoint, directory with its package and config.json)."""
    root = tmp_path_factory.mktemp("coreml")
    source, out = write_checkpoint(Case(of("llama"), "w4a8-g32"), root / "c"), root / "out"
    out.mkdir()
    coreml.write(read_weights(source), out, Options(source, CONTEXT, CHUNK, 1, (2, 3)))
    shutil.copyfile(source / "config.json", out / "config.json")
    return source, out


def test_weights_that_trade_their_names_are_known_by_the_linears_that_use_them(
    written: tuple[Path, Path], tmp_path: Path
) -> None:
    source, out = written
    shutil.copytree(out, tmp_path / "out")
    spec: Any = coreml_read.load_messages().Model()
    spec.ParseFromString((out / PACKAGE / SPEC).read_bytes())
    function = spec.mlProgram.functions["main"]
    k, v = (f"model_layers_0_self_attn_{p}_proj_weight" for p in "kv")
    swap = {k: v, v: k}
    # each linear now computes with the other's integers, under the name that was right
    for op in function.block_specializations[function.opset].operations:
        if op.type == "linear":
            argument = op.inputs["weight"].arguments[0]
            argument.name = swap.get(argument.name, argument.name)
    (tmp_path / "out" / PACKAGE / SPEC).write_bytes(spec.SerializeToString())
    want = wanted(read_weights(source), float_bits=16)
    assert compare(read(out), want, PACKAGE) == len(want)
    with pytest.raises(GoriError, match=r"2 of 8 tensors in .*k_proj"):
        compare(read(tmp_path / "out"), want, PACKAGE)


@pytest.mark.parametrize("kind", ["scaled", "plain"])
def test_integers_that_no_linear_uses_are_refused(kind: str, written: tuple[Path, Path]) -> None:
    program = read_program(written[1] / PACKAGE)
    extra = np.ones((2, 2), np.int8)
    if kind == "scaled":
        program.integers["smuggled"] = (8, extra, np.ones((2, 1), np.float16))
    else:
        program.constants["smuggled"] = extra
    with pytest.raises(GoriError, match="1 constants of integers, smuggled among them, belong to no linear"):
        coreml_read.weights(program, "input_ids")


def test_a_linear_whose_weight_is_computed_and_a_second_table_are_refused(written: tuple[Path, Path]) -> None:
    program = read_program(written[1] / PACKAGE)
    at = next(i for i, o in enumerate(program.operations) if o.kind == "linear")
    odd = dataclasses.replace(program.operations[at], inputs={**program.operations[at].inputs, "weight": ["made_up"]})
    with pytest.raises(GoriError, match="made_up is no matrix of integers"):
        coreml_read.weights(dataclasses.replace(program, operations=[odd, *program.operations]), "input_ids")
    gathers = [o for o in program.operations if o.inputs.get("indices") == ["input_ids"]]
    with pytest.raises(GoriError, match="looks up 2 embedding tables"):
        coreml_read.weights(dataclasses.replace(program, operations=gathers[:1] * 2), "input_ids")


def test_another_number_of_layers_than_config_json_says_is_refused(written: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(written[1], tmp_path / "out")
    config = (tmp_path / "out" / "config.json").read_text()
    (tmp_path / "out" / "config.json").write_text(config.replace('"num_hidden_layers": 1', '"num_hidden_layers": 2'))
    with pytest.raises(GoriError, match=r"holds 8 linear layers, config\.json asks for 15"):
        read(tmp_path / "out")


def test_what_a_library_says_over_many_lines_is_one_sentence(
    written: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("dataType: 7\ndimensions {\n  size: 3\n}")

    monkeypatch.setattr(coreml_read, "_program", fail)
    with pytest.raises(GoriError) as e:
        read(written[1])
    assert "dataType: 7 dimensions { size: 3 }" in str(e.value)


def test_without_coremltools_the_check_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    coreml_run.check()
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingEngine, match=r"needs coremltools: pip install 'gori\[coreml\]'"):
        coreml_run.check()


def test_the_interpreter_takes_the_integers_from_the_program_as_it_goes(written: tuple[Path, Path]) -> None:
    program = read_program(written[1] / PACKAGE)
    _, q, scale = program.integers["model_embed_tokens_weight"]
    interpreter = coreml_run.Interpreter(program)
    assert program.integers == {}
    products = q.reshape(len(q), scale.shape[1], -1) * scale.astype(np.float32)[:, :, None]
    want = products.astype(np.float16).reshape(q.shape)
    np.testing.assert_array_equal(interpreter.constants["model_embed_tokens_weight"], want)
