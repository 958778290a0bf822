"""A .tflite for LiteRT against the eager quantized model: logits, integers, bytes, the bundle, and what is refused."""

from __future__ import annotations

import contextlib
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from gori import quantized
from gori.errors import GoriError, MissingEngine
from gori.export import litert, parity
from gori.export.build import export
from gori.export.contents import compare, digests
from gori.export.litert_read import read
from gori.export.weights import Options, Weights, read_weights, wanted
from gori.quantized import EMBEDDING, HEAD
from gori.runtime import litert as runtime
from gori.runtime import litert_lm as runtime_lm
from gori.runtime.litert import choose_length
from gori.runtime.session import Snapshot, open_session
from gori.targets import TARGETS
from students import CHUNK, CONTEXT, LLAMA, LLAMA3, Case, Exported, each_once, of, write_checkpoint

CASES = {
    "llama, shared table, rope scaling": Case(of("llama", layers=2, rope_scaling=LLAMA3), "w4a8-g32"),
    "qwen2 untied, narrow heads": Case(of("qwen2", tied=False, head_dim=16), "w8a8-channel", "w4-channel"),
    "qwen3, tied but apart, mixed, wide heads": Case(
        of("qwen3", head_dim=64), "w4a8-channel", "w8-g32", {"q_proj": "w4a8-g64", "down_proj": "w4a8-g128"}
    ),
    "qwen2 float": Case(of("qwen2"), "float"),
}
LINEARS, TABLES = TARGETS["litert"].linears, TARGETS["litert"].tables
PAIRS = [(LINEARS[i % len(LINEARS)], TABLES[i]) for i in range(len(TABLES))]
"""Every scheme that the row in TARGETS names, of linears and of tables."""


def make(source: Path, out: Path) -> None:
    export("litert", source, out, context=CONTEXT, chunk=CHUNK)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Case name → (checkpoint, exported directory), each made once."""
    return each_once(tmp_path_factory.mktemp("litert"), CASES, make)


def write(source: Path, out: Path) -> Weights:
    """The engine's files alone, without the driver's proofs."""
    out.mkdir(exist_ok=True)
    weights = read_weights(source)
    litert.write(weights, out, Options(source, CONTEXT, CHUNK, 1, (2, 3)))
    return weights


@pytest.mark.parametrize(("linears", "table"), PAIRS)
def test_every_scheme_of_the_row_is_held_exactly_and_runs_as_it_says(linears: str, table: str, tmp_path: Path) -> None:
    source = write_checkpoint(Case(of("llama"), linears, table), tmp_path / "c")
    weights = write(source, tmp_path / "out")
    assert compare(read(tmp_path / "out"), wanted(weights), "model.tflite") == len(wanted(weights))
    prompts = [[i] for i in range(5)] + [list(range(40)), list(range(60, 77))]
    found = parity.measure_parity(open_session(tmp_path / "out"), quantized.load(source), prompts)
    assert found.met, parity.describe(found)


def test_activations_are_rounded_where_the_scheme_says_so_and_nowhere_else(tmp_path: Path) -> None:
    prompts, met = [[i] for i in range(5)] + [list(range(40))], {}
    for scheme in ("w8a8-channel", "w8a16-channel"):
        source = write_checkpoint(Case(of("llama"), scheme), tmp_path / scheme)
        write(source, tmp_path / f"{scheme}.out")
        session = open_session(tmp_path / f"{scheme}.out")
        for rounding in ("scheme", "none"):
            model = quantized.load(source, rounding=rounding)
            met[scheme, rounding] = parity.measure_parity(session, model, prompts).met
    assert met == {
        ("w8a8-channel", "scheme"): True,
        ("w8a8-channel", "none"): False,
        ("w8a16-channel", "scheme"): True,
        ("w8a16-channel", "none"): True,
    }


def test_the_float_export_is_float32s_own_rounding_from_eager_up_to_the_last_row_of_the_cache(
    exported: Exported,
) -> None:
    source, out = exported("qwen2 float")
    ids = torch.randint(0, 200, (CONTEXT,), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        want = quantized.load(source)(ids.unsqueeze(0))[0].numpy()
    session, close = open_session(out), 3e-5 * np.abs(want).max()
    np.testing.assert_allclose(session.prefill(ids[:40].tolist()), want[39], atol=close)
    half = session.snapshot()
    for i in range(40, CONTEXT):
        np.testing.assert_allclose(session.decode(int(ids[i])), want[i], atol=close)
    # a call of 16 rows at position 40 of 48: what it would write behind the end must not land on the prompt
    session.restore(Snapshot(half.ids[:39]))
    np.testing.assert_allclose(session.prefill(ids[39:].tolist()), want[-1], atol=close)


def test_a_prompt_is_cut_into_the_calls_that_waste_least() -> None:
    assert [choose_length(n, (128, 16)) for n in (300, 128, 113, 112, 17, 16, 1)] == [128, 128, 128, 16, 16, 16, 16]
    assert choose_length(1, (16,)) == 16


def test_a_large_chunk_has_a_short_call_beside_it_and_both_write_the_same_cache(tmp_path: Path) -> None:
    source = write_checkpoint(Case(of("qwen3"), "float"), tmp_path / "c")
    out = tmp_path / "out"
    out.mkdir()
    metrics = litert.write(read_weights(source), out, Options(source, 48, 32, None, ()))
    assert metrics["signatures"] == ["prefill_32", "prefill_16", "decode"]
    session, ids = open_session(out), list(range(100, 140))
    whole = session.prefill(ids)  # 32 and 7 of 16
    session.reset()
    session.prefill(ids[:15])
    session.prefill(ids[15:30])
    np.testing.assert_allclose(session.prefill(ids[30:]), whole, rtol=1e-4, atol=1e-4)


def test_the_session_knows_what_the_file_says(exported: Exported) -> None:
    out = exported("qwen2 float")[1]
    info = open_session(out / "model.tflite").info
    assert (info.engine, info.vocab_size, info.context, info.chunk) == ("LiteRT", 200, CONTEXT, CHUNK)
    assert (info.bos_id, info.eos_ids, info.file_bytes) == (1, (2, 3), (out / "model.tflite").stat().st_size)


def test_nothing_that_runs_or_reads_a_tflite_loads_torch() -> None:
    modules = "gori.export.litert_read, gori.runtime.litert, gori.runtime.litert_lm, gori.runtime.tflite"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_tied_table_is_in_the_file_once(exported: Exported) -> None:
    source, out = exported("llama, shared table, rope scaling")
    packed = quantized.pack_int4(read_weights(source).integers[EMBEDDING].q).numpy().tobytes()
    assert (out / "model.tflite").read_bytes().count(packed) == 1
    assert HEAD not in read(out)


def test_weights_lie_at_multiples_of_16_bytes(exported: Exported) -> None:
    source, out = exported("qwen3, tied but apart, mixed, wide heads")
    data, weights = (out / "model.tflite").read_bytes(), read_weights(source)
    for t in weights.integers.values():
        raw = quantized.pack_int4(t.q) if t.scheme.bits == 4 else t.q
        assert data.find(raw.numpy().tobytes()) % 16 == 0


def flipped(source: Path, out: Path, raw: bytes, at: int, bit: int) -> Path:
    """A copy of an exported directory with one bit of one weight's stored bytes changed."""
    shutil.copytree(source, out)
    data = bytearray((source / "model.tflite").read_bytes())
    start = data.find(raw)
    assert start > 0
    data[start + at] ^= 1 << bit
    (out / "model.tflite").write_bytes(data)
    return out


@pytest.mark.parametrize("case", [c for c in CASES if "float" not in c])
@pytest.mark.parametrize("what", ["integer", "scale"])
@pytest.mark.parametrize("name", [EMBEDDING, "model.layers.0.self_attn.v_proj.weight"])
def test_the_reader_finds_one_changed_number(
    case: str, what: str, name: str, exported: Exported, tmp_path: Path
) -> None:
    source, out = exported(case)
    weights = read_weights(source)
    t = weights.integers[name]
    if what == "integer":
        raw = (quantized.pack_int4(t.q) if t.scheme.bits == 4 else t.q).numpy().tobytes()
    else:  # blocks in float16 but where they are gathered, channels in float32
        blocks = t.scheme.group_size and t.scheme.bits == 4
        raw = (t.scale.half() if blocks else t.scale).numpy().tobytes()
    bad = flipped(out, tmp_path / "bad", raw, len(raw) // 2, 1)
    with pytest.raises(GoriError, match=f"1 of {len(wanted(weights))} tensors .*{name.split('.')[-2]}"):
        compare(read(bad), wanted(weights), "model.tflite")


def test_two_layers_in_each_others_place_are_found_whatever_they_are_called(exported: Exported, tmp_path: Path) -> None:
    out = exported("qwen2 float")[1]
    data = (out / "model.tflite").read_bytes()
    names = [f"model.layers.0.self_attn.{p}_proj.weight".encode() for p in "kvx"]
    for a, b in ((0, 2), (1, 0), (2, 1)):
        data = data.replace(names[a], names[b])
    (tmp_path / "model.tflite").write_bytes(data)
    with pytest.raises(GoriError, match=r"v_proj.weight where model.layers.0.self_attn.k_proj.weight belongs"):
        read(tmp_path)


def test_damaged_files_are_refused_in_one_sentence_or_read_as_what_they_are(exported: Exported, tmp_path: Path) -> None:
    good = (exported("qwen3, tied but apart, mixed, wide heads")[1] / "model.tflite").read_bytes()
    rng, refused = random.Random(0), 0
    for i in range(600):
        data = bytearray(good)
        if i % 3:
            data[rng.randrange(len(data) // (1 if i % 2 else 40))] ^= 1 << rng.randrange(8)
        else:
            del data[rng.randrange(len(data)) :]
        (tmp_path / "model.tflite").write_bytes(data)
        with contextlib.suppress(GoriError):
            digests(read(tmp_path))
            continue
        refused += 1
    assert refused >= 200  # every truncation and many flips; the rest are weights, which their hashes tell


@pytest.mark.parametrize("content", [b"", b"\0" * 64, b"PK\3\4" * 40, b"\x1c\0\0\0TFL3" + b"\0" * 60])
def test_a_foreign_file_is_refused_by_reader_and_session(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.tflite").write_bytes(content)
    with pytest.raises(GoriError, match=r"is not a \.tflite of gori's that can be read"):
        read(tmp_path)
    with pytest.raises(GoriError, match=r"is not a \.tflite that gori wrote"):
        open_session(tmp_path)


@pytest.mark.parametrize("scheme", ["w4a16-g32", "w8a16-g32", "w8a8-g32"])
def test_a_scheme_that_litert_does_not_hold_is_refused_with_those_that_it_does(scheme: str, tmp_path: Path) -> None:
    source = write_checkpoint(Case(LLAMA, scheme), tmp_path / "c")
    with pytest.raises(GoriError, match=rf"LiteRT does not hold model.layers.0.*{scheme}.*quantize with one of w8a8-c"):
        export("litert", source, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize(
    ("module", "call", "extra"),
    [
        ("ai_edge_litert", runtime.check, r"needs LiteRT: pip install 'gori\[litert\]'"),
        ("litert_lm", runtime_lm.check, "needs LiteRT-LM: pip install"),
        ("litert_lm_builder", litert.check, "needs the builder of LiteRT-LM: pip install"),
    ],
)
def test_a_missing_wheel_is_a_missing_engine(
    module: str, call: Callable[[], None], extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    call()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingEngine, match=extra):
        call()


def test_what_a_process_needs_besides_the_file_is_said_with_its_bytes(tmp_path: Path) -> None:
    source = write_checkpoint(Case(of("llama"), "w8a16-channel"), tmp_path / "c")
    (tmp_path / "out").mkdir()
    found = litert.write(read_weights(source), tmp_path / "out", Options(source, CONTEXT, CHUNK, 1, (2, 3)))
    cache, linears = 2 * 2 * 32 * CONTEXT * 4, 4 * (128 * (128 + 64 + 64 + 128) + 3 * 128 * 128 + 128 * 200)
    said = ", ".join(found["memory_notes"])
    assert f"once more, as output ({cache:,} bytes)" in said
    assert f"in each of 2 signatures (up to {linears:,} bytes each)" in said
