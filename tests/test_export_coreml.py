"""An .mlpackage against the eager model of the same integers: its constants, its program, its logits, its refusals.

Core ML does not run here, so what runs is gori's interpreter of the saved program. It is itself checked, operation by
operation, against what coremltools computes for constants, and the package is read by coremltools' own readers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from gori import checkpoint, quantized
from gori.errors import GoriError
from gori.export import build, coreml, golden, parity
from gori.export.contents import compare, unpack_int4
from gori.export.coreml_read import PACKAGE, SPEC, WEIGHTS, read, read_program
from gori.export.coreml_run import open_directory
from gori.export.mil_ops import OPERATIONS
from gori.export.weights import Options, packed_bytes, read_weights, wanted
from gori.quantized import EMBEDDING, HEAD
from gori.runtime.eager import session_of
from gori.targets import TARGETS
from students import CHUNK, CONTEXT, LLAMA, LLAMA3, Case, Exported, each_once, of, write_checkpoint

ROW = TARGETS["coreml"]
CASES = {
    "llama, shared table, rope scaling": Case(of("llama", rope_scaling=LLAMA3, layers=2), "w4a8-g32"),
    "qwen2 untied": Case(of("qwen2", tied=False), "w8a8-channel", "w4-channel"),
    "qwen3, tied but apart, mixed": Case(
        of("qwen3"), "w4a16-channel", "w8-g32", {"q_proj": "w4a16-g64", "down_proj": "w8a16-g128"}
    ),
    "as many key heads as heads, heads wider than the model": Case(of("llama", kv_heads=4, head_dim=64), "w8a16-g64"),
    "float table, untied": Case(of("qwen3", tied=False), "w4a8-g32", "float"),
    "qwen2 float, tied": Case(of("qwen2"), "float"),
    "llama float, untied": Case(of("llama", tied=False), "float"),
}


def write(source: Path, out: Path) -> Path:
    out.mkdir(parents=True)
    coreml.write(read_weights(source), out, Options(source, CONTEXT, CHUNK, 1, (2, 3)))
    shutil.copyfile(source / "config.json", out / "config.json")
    return out


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Case name → (checkpoint, directory with its package), each made once."""
    return each_once(tmp_path_factory.mktemp("coreml"), CASES, write)


def held(source: Path) -> dict[str, Any]:
    return wanted(read_weights(source), float_bits=16)


@pytest.mark.parametrize("case", CASES)
def test_every_integer_scale_and_float_comes_back_as_it_was(case: str, written: Exported) -> None:
    source, out = written(case)
    assert compare(read(out), held(source), PACKAGE) == len(held(source))


@pytest.mark.parametrize("case", CASES)
def test_the_saved_program_gives_the_checkpoints_logits_within_float16s_noise_floor(
    case: str, written: Exported
) -> None:
    source, out = written(case)
    prompts = parity.default_prompts(200, CONTEXT, CHUNK, seed=7)
    model = quantized.load(source, ROW.activations)
    found = parity.measure_parity(open_directory(out, None), model, prompts, ROW.arithmetic)
    assert found.met, parity.describe(found)
    # without the allowance for rare flips, too: nothing flips where inputs are not rounded
    assert found.engine.kl_mean <= 1.5 * found.floor.kl_mean, parity.describe(found)


@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens_are_those_of_the_eager_model(case: str, written: Exported) -> None:
    source, out = written(case)
    reference = session_of(quantized.load(source, ROW.activations), source, CONTEXT)
    session = open_directory(out, None)
    for prompt in ([5, 6, 7], [11], list(range(20, 60 - CHUNK))):
        assert golden.greedy(session, prompt, ()) == golden.greedy(reference, prompt, ())


@pytest.mark.parametrize("scheme", ROW.linears)
def test_every_scheme_of_the_row_is_carried_and_computed(scheme: str, tmp_path: Path) -> None:
    table = ROW.tables[ROW.linears.index(scheme) % len(ROW.tables)]
    source = write_checkpoint(Case(LLAMA, scheme, table), tmp_path / "c")
    out = write(source, tmp_path / "out")
    compare(read(out), held(source), PACKAGE)
    model = quantized.load(source, ROW.activations)
    found = parity.measure_parity(open_directory(out, None), model, [[7], [9], [5, 6, 7, 8]], ROW.arithmetic)
    assert found.met, parity.describe(found)


def test_a_tied_table_is_in_the_file_once_and_the_file_has_no_waste(written: Exported) -> None:
    source, out = written("llama, shared table, rope scaling")
    program = read_program(out / PACKAGE)
    users = [o.kind for o in program.operations for a in o.inputs.values() if "model_embed_tokens_weight" in a]
    assert sorted(users) == ["gather", "linear"]
    assert HEAD not in read(out)
    assert (out / PACKAGE / WEIGHTS).stat().st_size <= 1.15 * packed_bytes(held(source))


def test_the_same_checkpoint_gives_the_same_bytes_and_the_driver_says_that_no_device_ran(tmp_path: Path) -> None:
    source = write_checkpoint(CASES["qwen2 untied"], tmp_path / "c")
    first, second = (tmp_path / name for name in ("one", "two"))
    for out in (first, second):
        body = build.export("coreml", source, out, context=CONTEXT, chunk=CHUNK)
    files = [p.relative_to(first) for p in sorted((first / PACKAGE).rglob("*")) if p.is_file()]
    assert [str(f.relative_to(PACKAGE)) for f in files] == [str(SPEC), str(WEIGHTS), "Manifest.json"]
    assert all((first / f).read_bytes() == (second / f).read_bytes() for f in files)
    entry = json.loads((first / "parity.json").read_text())
    assert (entry["executed"], entry["engine"]) == (False, "MIL interpreter")
    assert "graph parity, not device" in entry["ran"]
    assert all(g["met"] for g in body["gates"])


def test_the_manifest_names_both_parts_by_paths_that_exist(written: Exported) -> None:
    package = written("qwen2 untied")[1] / PACKAGE
    body = json.loads((package / "Manifest.json").read_text())
    paths = {key: entry["path"] for key, entry in body["itemInfoEntries"].items()}
    assert paths[body["rootModelIdentifier"]] == "com.apple.CoreML/model.mlmodel"
    assert all((package / "Data" / path).exists() for path in paths.values())


@pytest.mark.parametrize("case", CASES)
def test_coremltools_reads_the_package_and_finds_the_same_constants(case: str, written: Exported) -> None:
    coreml.load_exporter()
    from coremltools import models
    from coremltools.converters.mil.frontend.milproto.load import load

    source, out = written(case)
    weights = (out / PACKAGE / WEIGHTS).parent
    spec = models.utils.load_spec(str(out / PACKAGE))
    # parses the program again and infers every type and shape anew
    functions = load(spec, spec.specificationVersion, str(weights)).functions
    variables = {v.name: v.op for o in functions["main"].operations for v in o.outputs}
    for name, want in held(source).items():
        op = variables[name.replace(".", "_")]
        data = op.outputs[0].val if want.scale is None else op.data.val
        np.testing.assert_array_equal(np.asarray(data).astype(np.float32), want.weight.astype(np.float32))
        if want.scale is not None:
            np.testing.assert_array_equal(op.scale.val.astype(np.float32), want.scale)


def test_a_developer_finds_inputs_states_and_facts_in_the_description(written: Exported) -> None:
    coreml.load_exporter()
    from coremltools import models

    d = models.utils.load_spec(str(written("llama, shared table, rope scaling")[1] / PACKAGE)).description
    assert [i.name for i in d.input] == ["input_ids", "position"]
    ranges = d.input[0].type.multiArrayType.shapeRange.sizeRanges
    assert [(r.lowerBound, r.upperBound) for r in ranges] == [(1, 1), (1, CHUNK)]
    assert [(s.name, list(s.type.stateType.arrayType.shape)) for s in d.state] == [
        ("keyCache", [2, 2, CONTEXT, 32]), ("valueCache", [2, 2, CONTEXT, 32])
    ]  # fmt: skip
    assert list(d.output[0].type.multiArrayType.shape) == [1, 1, 200]
    facts = dict(d.metadata.userDefined)
    assert (facts["context"], facts["chunk"], facts["eos_ids"]) == (str(CONTEXT), str(CHUNK), "[2, 3]")


def operands() -> dict[str, dict[str, Any]]:
    """MIL operation → constant inputs, of the kinds that gori's programs give it."""
    r = np.random.default_rng(0)

    def x(*shape: int, dtype: Any = np.float16) -> np.ndarray[Any, Any]:
        return r.standard_normal(shape).astype(dtype)

    def ints(*values: int) -> np.ndarray[Any, Any]:
        return np.array(values, np.int32)

    corner = {"begin": ints(1, 0, 2), "end": ints(2, 3, 4)}
    attention = {"query": x(1, 2, 3, 4), "key": x(1, 2, 5, 4), "value": x(1, 2, 5, 4), "attn_mask": x(3, 5)}
    scattered = {"data": x(5, 3), "indices": np.array([[4], [0]], np.int32), "updates": x(2, 3), "mode": "update"}
    return {
        "abs": {"x": x(2, 3)},
        "add": {"x": x(2, 3), "y": x(3)},
        "cast": {"x": x(2, 3), "dtype": "fp32"},
        "concat": {"values": [x(2, 3), x(2, 1)], "axis": -1},
        "equal": {"x": ints(1, 2, 3), "y": ints(2)},
        "expand_dims": {"x": x(2, 3), "axes": ints(1)},
        "gather": {"x": x(5, 3), "indices": ints(4, 0, 4), "axis": 0},
        "greater": {"x": ints(1, 2, 3), "y": ints(2)},
        "greater_equal": {"x": ints(1, 2, 3), "y": ints(2)},
        "inverse": {"x": np.abs(x(2, 3)) + np.float16(1), "epsilon": np.float16(0)},
        "less_equal": {"x": ints(1, 2, 3), "y": ints(2)},
        "linear": {"x": x(2, 4), "weight": x(3, 4), "bias": x(3)},
        "mul": {"x": x(2, 3), "y": x(2, 1)},
        "range_1d": {"start": np.int32(3), "end": np.int32(9), "step": np.int32(1)},
        "real_div": {"x": x(2, 3), "y": np.abs(x(2, 3)) + np.float16(1)},
        "reduce_max": {"x": x(2, 7), "axes": ints(-1), "keep_dims": True},
        "reduce_mean": {"x": x(2, 7, dtype=np.float32), "axes": ints(-1), "keep_dims": True},
        "reshape": {"x": x(2, 6), "shape": ints(1, -1, 4)},
        "rsqrt": {"x": np.abs(x(2, 3, dtype=np.float32)), "epsilon": np.float32(0)},
        "scaled_dot_product_attention": attention,
        "scatter_nd": scattered,
        "select": {"cond": np.array([True, False]), "a": x(2), "b": x(2)},
        "shape": {"x": x(2, 5)},
        "silu": {"x": x(2, 3)},
        "slice_by_index": {"x": x(2, 3, 4), **corner},
        "slice_update": {"x": x(2, 3, 4), "update": x(1, 3, 2), **corner},
        "split": {"x": x(2, 6), "num_splits": 2, "axis": -1},
        "squeeze": {"x": x(1, 3), "axes": ints(0)},
        "sub": {"x": x(2, 3), "y": x(2, 3)},
        "tile": {"x": x(2, 3), "reps": ints(3, 1)},
        "transpose": {"x": x(2, 3, 4), "perm": ints(2, 0, 1)},
    }


@pytest.mark.parametrize("kind", sorted({*OPERATIONS} - {"scatter_nd", "silu"}))
def test_the_interpreters_operations_are_coremltools_own(kind: str) -> None:
    coreml.load_exporter()
    from coremltools.converters.mil.mil import Function

    from gori.export.coreml_graph import OPSET, mb

    arguments = operands()[kind]
    with Function({}, opset_version=OPSET):
        made = getattr(mb, kind)(**arguments)
    got = OPERATIONS[kind]({k: v if isinstance(v, list) else [v] for k, v in arguments.items()})
    for mine, theirs in zip(*(v if isinstance(v, list | tuple) else [v] for v in (got, made)), strict=True):
        assert theirs.val is not None
        # coremltools sums and rounds in an order of its own: two last places of float16
        np.testing.assert_allclose(mine, theirs.val, rtol=2e-3, atol=2e-3)
        assert mine.dtype.kind == np.asarray(theirs.val).dtype.kind


def test_two_operations_of_which_coremltools_folds_no_constant_are_torchs() -> None:
    x = operands()["silu"]["x"]
    want = torch.nn.functional.silu(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(OPERATIONS["silu"]({"x": [x]}), want, rtol=1e-3)
    s = operands()["scatter_nd"]
    rows = torch.from_numpy(s["data"]).index_copy(0, torch.tensor([4, 0]), torch.from_numpy(s["updates"]))
    np.testing.assert_array_equal(OPERATIONS["scatter_nd"]({k: [v] for k, v in s.items()}), rows.numpy())


def test_nibbles_are_twos_complement_and_low_first() -> None:
    values = np.arange(-8, 8, dtype=np.int8)
    packed = ((values[0::2] & 0xF) | ((values[1::2] & 0xF) << 4)).view(np.uint8)
    np.testing.assert_array_equal(unpack_int4(packed), values)


def test_reading_and_running_import_neither_torch_nor_coremltools(written: Exported) -> None:
    out = written("llama, shared table, rope scaling")[1]
    code = (
        "import sys; from pathlib import Path; from gori.export.coreml_read import read\n"
        "from gori.export.coreml_run import open_directory as o\n"
        f"p = Path({str(out)!r}); read(p); o(p, None).prefill([1, 2])\n"
        "print([m for m in ('torch', 'coremltools') if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.stdout == "[]\n", ran.stderr


def changed(source: Path, out: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    shutil.copytree(source, out)
    tensors = load_file(source / checkpoint.WEIGHTS)
    tensors[name] = change(tensors[name])
    save_file(tensors, out / checkpoint.WEIGHTS)
    return out


REFUSED = {
    "a value beyond float16": (
        "model.norm.weight", lambda w: w * 1e6, "model.norm.weight reaches .* ends at 65504: export with --target exec"
    ),
    "a scale that float16 flushes": (
        f"{EMBEDDING}.scale", lambda s: s * 0 + 2.0**-20, f"scales of {EMBEDDING} begin at 9.5.*: quantize the float"
    ),
    "a scale that overflows with its integers": (
        f"{EMBEDDING}.scale", lambda s: s * 0 + 2.0**13, f"{EMBEDDING} reaches 65536"
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", REFUSED)
def test_what_float16_does_not_hold_is_refused_by_name(fault: str, written: Exported, tmp_path: Path) -> None:
    name, change, message = REFUSED[fault]
    source = changed(written("llama, shared table, rope scaling")[0], tmp_path / "c", name, change)
    with pytest.raises(GoriError, match=message):
        write(source, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_activations_that_overflow_float16_are_said_and_not_given_as_logits(written: Exported, tmp_path: Path) -> None:
    source = changed(written("qwen2 float, tied")[0], tmp_path / "c", "model.norm.weight", lambda w: w * 0 + 6e4)
    with pytest.raises(GoriError, match="overflows float16, its logits are not finite: export to executorch"):
        open_directory(write(source, tmp_path / "out"), None).prefill([1])


def record(package: Path, variable: str, argument: str) -> int:
    """Where the data of a weight's integers or scales begin in weight.bin, by coremltools' classes."""
    from coremltools import models

    function = models.utils.load_spec(str(package)).mlProgram.functions["main"]
    operations = function.block_specializations[function.opset].operations
    op = next(o for o in operations if any(v.name == variable for v in o.outputs))
    at = op.inputs[argument].arguments[0].value.blobFileValue.offset
    return int(np.frombuffer((package / WEIGHTS).read_bytes(), np.uint64, 1, at + 16)[0])


@pytest.mark.parametrize(("argument", "message"), [("data", "1 of 16384 values differ"), ("scale", "scales differ")])
@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "model.layers.0.self_attn.o_proj.weight"])
def test_the_reader_finds_one_changed_number(
    name: str, argument: str, message: str, written: Exported, tmp_path: Path
) -> None:
    source, out = written("llama, shared table, rope scaling")
    shutil.copytree(out, tmp_path / "out")
    package = tmp_path / "out" / PACKAGE
    blob = bytearray((package / WEIGHTS).read_bytes())
    blob[record(package, name.replace(".", "_"), argument) + 10] ^= 1
    (package / WEIGHTS).write_bytes(blob)
    with pytest.raises(GoriError, match=rf"1 of 15 tensors in .* are not the checkpoint's: {name} .{message}"):
        compare(read(tmp_path / "out"), held(source), PACKAGE)


def test_two_tensors_in_each_others_place_are_found(written: Exported) -> None:
    source, out = written("llama, shared table, rope scaling")
    want, (k, v) = held(source), (f"model.layers.0.self_attn.{p}_proj.weight" for p in "kv")
    want[k], want[v] = want[v], want[k]
    with pytest.raises(GoriError, match=r"2 of 15 tensors .*k_proj"):
        compare(read(out), want, PACKAGE)


@pytest.mark.parametrize("file", [SPEC, WEIGHTS])
def test_a_damaged_package_is_refused_in_one_sentence_or_read_but_never_crashes(
    file: Path, written: Exported, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(written("qwen2 untied")[1], out)
    good, chance = (out / PACKAGE / file).read_bytes(), random.Random(0)
    refused = 0
    for i in range(120):
        bad = bytearray(good)
        if i % 3 == 0:
            del bad[chance.randrange(len(bad)) :]
        else:
            bad[chance.randrange(len(bad)) if file == SPEC else chance.randrange(64)] ^= 1 << chance.randrange(8)
        (out / PACKAGE / file).write_bytes(bad)
        with contextlib.suppress(GoriError):
            read(out)
            refused -= 1
        refused += 1
    assert refused >= 30


def test_a_package_without_its_weights_and_another_kind_of_model_are_refused(written: Exported, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(written("qwen2 untied")[1], out)
    (out / PACKAGE / WEIGHTS).unlink()
    with pytest.raises(GoriError, match=r"lacks .*weight\.bin .*: copy the whole package"):
        read(out)
    (out / PACKAGE / WEIGHTS).write_bytes(b"")
    (out / PACKAGE / SPEC).write_bytes(b"")
    with pytest.raises(GoriError, match="holds a None, gori writes an mlProgram"):
        open_directory(out, None)


def test_a_program_with_another_operation_is_refused_before_it_runs(written: Exported) -> None:
    from gori.export.coreml_run import Interpreter

    program = read_program(written("qwen2 untied")[1] / PACKAGE)
    odd = dataclasses.replace(program.operations[-1], kind="conv")
    with pytest.raises(GoriError, match="uses MIL's conv, which gori does not write"):
        Interpreter(dataclasses.replace(program, operations=[*program.operations, odd]))
