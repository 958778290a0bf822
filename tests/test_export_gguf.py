"""A .gguf against the eager quantized model: its logits by llama.cpp, its integers, its bytes, and what is refused.

An export takes milliseconds, so every scheme that the format holds is written, read back and run.
"""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize

from decoders import random_decoder
from gori import checkpoint, quantized
from gori.errors import GoriError, MissingEngine
from gori.export import gguf as target
from gori.export import gguf_read, parity
from gori.export.build import export
from gori.export.contents import compare
from gori.export.golden import greedy
from gori.export.weights import Options, check_schemes, read_weights, wanted
from gori.quantize.rtn import rtn
from gori.quantized import EMBEDDING, HEAD, round_q8_0
from gori.runtime import gguf as runtime
from gori.runtime.eager import session_of, special_ids
from gori.runtime.session import open_session
from gori.targets import TARGETS
from students import CHUNK, CONTEXT, LLAMA, LLAMA3, Case, Exported, each_once, of, write_checkpoint

ROW = TARGETS["gguf"]
CASES = {
    "llama, shared table, rope scaling": Case(of("llama", rope_scaling=LLAMA3), "w4a8-g32"),
    "llama, heads wider than the model": Case(of("llama", head_dim=48), "w8a16-g64", "w8-g128"),
    "qwen2 untied": Case(of("qwen2", tied=False), "w8a8-channel", "w4-channel"),
    "qwen3, tied but apart, mixed": Case(
        of("qwen3", layers=2), "w4a8-channel", "w8-g32", {"q_proj": "w4a8-g64", "down_proj": "w8a8-g128"}
    ),
    "qwen3, five bits": Case(
        of("qwen3", layers=2), "w5a16-g32", "w5-g64", {"k_proj": "w4a16-g32", "up_proj": "w8a16-g32"}
    ),
    "qwen2, float table": Case(of("qwen2"), "w4a16-g128", "float"),
    "llama float": Case(of("llama", rope_scaling=LLAMA3, tied=False), "float"),
    "qwen3 float": Case(of("qwen3"), "float"),
}


def write(source: Path, out: Path, context: int = CONTEXT) -> Path:
    """The file alone, without the driver's proofs."""
    out.mkdir()
    bos_id, eos_ids = special_ids(source)
    target.write(read_weights(source), out, Options(source, context, CHUNK, bos_id, eos_ids))
    return out


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Case name → (checkpoint, directory of model.gguf), each made once."""
    return each_once(tmp_path_factory.mktemp("gguf"), CASES, write)


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_gives_the_checkpoints_logits_within_their_noise_floor(case: str, written: Exported) -> None:
    source, out = written(case)
    prompts = parity.default_prompts(200, CONTEXT, CHUNK, seed=7)
    session = open_session(out)
    found = parity.measure_parity(session, quantized.load(source, rounding=ROW.activations), prompts)
    assert found.met, parity.describe(found)
    # not met by chance: a prompt of one token is the model's to the last places of float32
    assert found.single.engine_p05 < 1e-5
    assert not session.info.log_probabilities


def test_the_gap_to_the_plain_model_is_llama_cpps_rounding_of_inputs_and_nothing_else(written: Exported) -> None:
    source, out = written("llama, heads wider than the model")
    prompts = [[i] for i in range(0, 200, 5)]

    def median(rounding: str) -> float:
        model = quantized.load(source, rounding=rounding)
        got, (want, _) = parity.engine_runs(open_session(out), prompts), parity.reference_runs(model, prompts)
        return parity.gap(torch.cat(got), torch.cat(want)).abs_median

    assert median("none") > 1000 * median("q8_0")  # 4e-2 and 5e-7


def test_inputs_are_rounded_as_ggml_rounds_rows_to_q8_0() -> None:
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    x[3, :32] = 0
    # gguf-py's own quantizer rounds halves away from zero; random numbers have none
    want = dequantize(gguf.quants.quantize(x.numpy(), gguf.GGMLQuantizationType.Q8_0), gguf.GGMLQuantizationType.Q8_0)
    got = round_q8_0(x).numpy()
    scale = np.abs(x.numpy().reshape(64, 8, 32)).max(-1) / 127
    off = np.abs(got - want).reshape(64, 8, 32) / np.maximum(scale, 1e-9)[..., None]
    assert (off < 1e-6).mean() > 0.999  # 127 / max and 1 / scale differ in the last place
    assert off.max() < 1.01
    assert not got[3, :32].any()


@pytest.mark.parametrize("scheme", ROW.linears)
def test_every_scheme_is_read_back_to_the_integer_and_answers_as_the_eager_model_does(
    scheme: str, tmp_path: Path
) -> None:
    index = ROW.linears.index(scheme)
    cfg = of(("llama", "qwen2", "qwen3")[index % 3], tied=index % 2 == 0)
    source = write_checkpoint(Case(cfg, scheme, ROW.tables[index % len(ROW.tables)]), tmp_path / "c")
    w = read_weights(source)
    check_schemes(w.spec, ROW)
    out = write(source, tmp_path / "out")
    want = wanted(w)
    assert compare(gguf_read.read(out), want, "model.gguf") == len(want)
    session = open_session(out)
    reference = session_of(quantized.load(source, rounding="q8_0"), source, CONTEXT)
    for prompt in ([5, 6, 7], [100, 101, 102, 103, 104]):
        assert greedy(session, prompt, session.info.eos_ids) == greedy(reference, prompt, session.info.eos_ids)


@pytest.mark.parametrize("table", ROW.tables)
def test_every_scheme_of_the_table_is_read_back_and_looked_up(table: str, tmp_path: Path) -> None:
    source = write_checkpoint(Case(LLAMA, "w8a8-channel", table), tmp_path / "c")
    out = write(source, tmp_path / "out")
    want = wanted(read_weights(source))
    compare(gguf_read.read(out), want, "model.gguf")
    model = quantized.load(source, rounding="q8_0")
    with torch.inference_mode():
        logits = model(torch.tensor([[9]]))[0, 0].numpy()
    np.testing.assert_allclose(open_session(out).prefill([9]), logits, atol=1e-5)


@pytest.mark.parametrize("case", ["llama, shared table, rope scaling", "qwen3, tied but apart, mixed"])
def test_ggufs_own_reader_finds_the_dequantized_weights(case: str, written: Exported) -> None:
    source, out = written(case)
    tensors = {t.name: t for t in gguf.GGUFReader(out / "model.gguf").tensors}
    w = read_weights(source)
    assert ("output.weight" in tensors) == (w.head_name == HEAD)
    pairs = {EMBEDDING: "token_embd", "model.layers.0.self_attn.o_proj.weight": "blk.0.attn_output"}
    for name, own in pairs.items():
        t = tensors[f"{own}.weight"]
        np.testing.assert_array_equal(dequantize(t.data, t.tensor_type), w.integers[name].dequantize().numpy())


def test_a_shared_table_is_stored_once_and_the_file_has_no_waste(written: Exported) -> None:
    source, out = written("llama, shared table, rope scaling")
    w = read_weights(source)
    floats = sum(t.numel() * 4 for t in w.floats.values())
    packed = sum(t.packed_bytes() for t in w.integers.values())
    # metadata and placeholders of tokens: 200 tokens of at most 5 letters and 8 bytes of length each, and types
    assert (out / "model.gguf").stat().st_size < packed + floats + 200 * 17 + 2500


def test_the_same_checkpoint_gives_the_same_bytes(written: Exported, tmp_path: Path) -> None:
    source, out = written("qwen3, tied but apart, mixed")
    assert (write(source, tmp_path / "again") / "model.gguf").read_bytes() == (out / "model.gguf").read_bytes()


def test_the_driver_proves_an_export_and_verifies_with_the_engine(tmp_path: Path) -> None:
    source = write_checkpoint(Case(LLAMA, "w4a8-g32"), tmp_path / "c")
    body = export("gguf", source, tmp_path / "out", context=CONTEXT, chunk=CHUNK)
    assert all(g["met"] for g in body["gates"])
    assert body["metrics"]["tokenizer"]["exact"] is False
    assert json.loads((tmp_path / "out" / "parity.json").read_text())["executed"] is True


def test_the_session_knows_what_the_file_says(written: Exported) -> None:
    _, out = written("qwen2 untied")
    info = open_session(out / "model.gguf").info
    assert (info.engine, info.vocab_size, info.context, info.chunk) == ("llama.cpp", 200, CONTEXT, CHUNK)
    assert (info.bos_id, info.eos_ids, info.file_bytes) == (1, (2, 3), (out / "model.gguf").stat().st_size)
    assert open_session(out, threads=2).info.threads == 2


def test_a_closed_session_is_refused(written: Exported) -> None:
    session = open_session(written("llama float")[1])
    assert isinstance(session, runtime.GgufSession)
    session.close()
    with pytest.raises(GoriError, match="is closed"):
        session.decode(8)


def test_a_running_session_needs_no_torch(written: Exported) -> None:
    out = written("qwen2 untied")[1]
    code = (
        "import sys; from gori.runtime.session import open_session; import gori.export.gguf_read as r; "
        f"open_session({str(out)!r}).prefill([1, 2]); from pathlib import Path; r.read(Path({str(out)!r})); "
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("module", "call"), [("gguf", target.check), ("xllamacpp.xllamacpp", runtime.check)], ids=["gguf", "xllamacpp"]
)
def test_a_missing_wheel_is_a_missing_engine(
    module: str, call: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    call()
    runtime.load_engine.cache_clear()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingEngine, match=r"pip install 'gori\[gguf\]'"):
        call()


def test_a_wheel_with_another_layout_of_settings_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime.load_engine.cache_clear()
    monkeypatch.setattr(runtime, "CONTEXT_DEFAULTS", b"\0\4" + runtime.CONTEXT_DEFAULTS[2:])
    with pytest.raises(MissingEngine, match=r"holds another llama\.cpp than gori knows"):
        runtime.load_engine()


def test_integers_whose_rows_are_no_blocks_are_refused(tmp_path: Path) -> None:
    cfg = dataclasses.replace(LLAMA, hidden_size=48, heads=2, kv_heads=1, head_dim=32)
    source = write_checkpoint(Case(cfg, "w8a8-channel"), tmp_path / "c")
    with pytest.raises(GoriError, match="has 48 inputs and a GGUF block has 32: choose a student"):
        write(source, tmp_path / "out")


def test_a_rotation_that_llama_cpp_does_not_compute_is_refused(tmp_path: Path) -> None:
    source = write_checkpoint(Case(of("qwen3", rope_scaling=LLAMA3), "w8a8-channel"), tmp_path / "c")
    with pytest.raises(GoriError, match="does not compute rope_type llama3 for qwen3"):
        write(source, tmp_path / "out")


def test_a_qwen2_whose_heads_are_not_its_width_is_refused_with_what_takes_it(tmp_path: Path) -> None:
    source = write_checkpoint(Case(of("qwen2", head_dim=16), "w8a8-channel"), tmp_path / "c")
    with pytest.raises(GoriError, match=r"4 heads of 16 make up .* 128, here they make 64: export to executorch or l"):
        write(source, tmp_path / "out")


def changed(out: Path, tmp_path: Path, tensor: str, byte: int) -> Path:
    """A copy of a file with one bit of one byte of a tensor flipped."""
    shutil.copytree(out, tmp_path / "changed")
    data = bytearray((out / "model.gguf").read_bytes())
    place = next(t for t in gguf.GGUFReader(out / "model.gguf").tensors if t.name == tensor)
    data[place.data_offset + byte] ^= 0x10
    (tmp_path / "changed" / "model.gguf").write_bytes(data)
    return tmp_path / "changed"


FLIPS = {
    "an integer of a query": ("blk.0.attn_q.weight", 5, r"q_proj.weight .1 of \d+ values differ"),
    "a scale": ("blk.0.ffn_up.weight", 0, "up_proj.weight .scales differ"),
    "the table": ("token_embd.weight", 18 * 7 + 3, r"embed_tokens.weight .1 of \d+ values differ"),
}


@pytest.mark.parametrize("flip", FLIPS)
def test_the_reader_finds_one_changed_number(flip: str, written: Exported, tmp_path: Path) -> None:
    source, out = written("llama, shared table, rope scaling")
    tensor, byte, message = FLIPS[flip]
    with pytest.raises(GoriError, match=message):
        compare(gguf_read.read(changed(out, tmp_path, tensor, byte)), wanted(read_weights(source)), "model.gguf")


def test_repeated_scales_that_differ_are_refused(written: Exported, tmp_path: Path) -> None:
    out = changed(written("qwen2 untied")[1], tmp_path, "blk.0.attn_v.weight", 34)
    with pytest.raises(GoriError, match=r"blocks of blk.0.attn_v.weight that share a scale hold different ones"):
        gguf_read.read(out)


def test_damaged_files_are_refused_in_a_sentence_or_read(written: Exported, tmp_path: Path) -> None:
    data = (written("llama, shared table, rope scaling")[1] / "model.gguf").read_bytes()
    rng, refused = random.Random(0), list[str]()
    head = data.rfind(b"rope_freqs.weight") + 40
    for i in range(600):
        broken = bytearray(data[: rng.randrange(len(data))] if i % 3 == 0 else data)
        if i % 3 == 1:
            broken[rng.randrange(head)] ^= 1 << rng.randrange(8)
        elif i % 3 == 2:
            at = rng.randrange(head - 8)
            broken[at : at + 8] = rng.choice((b"\xff" * 8, bytes(8), rng.randbytes(8)))
        (tmp_path / "model.gguf").write_bytes(broken)
        try:
            gguf_read.read(tmp_path)
        except GoriError as e:
            refused.append(str(e))
    assert not any("\n" in said for said in refused)
    assert len(refused) > 300  # the rest hit names of tokens and numbers that the integers do not depend on


ENDED = {
    "rotation beyond the head": ("llama.rope.dimension_count", 5, 1, "288 turned dimensions in heads of 32"),
    "a negative epsilon": ("llama.attention.layer_norm_rms_epsilon", 7, 0x80, "a norm's epsilon of -"),
    "a norm of another type": ("output_norm.weight", 12, 1, "a vector output_norm.weight of ggml's type 1"),
}


@pytest.mark.parametrize("flip", ENDED)
def test_a_flipped_bit_over_which_llama_cpp_ends_the_process_is_refused_before(
    flip: str, written: Exported, tmp_path: Path
) -> None:
    data = bytearray((written("llama, shared table, rope scaling")[1] / "model.gguf").read_bytes())
    name, behind, bit, message = ENDED[flip]
    data[data.find(name.encode()) + len(name) + behind] ^= bit
    (tmp_path / "model.gguf").write_bytes(data)
    with pytest.raises(GoriError, match=message):
        open_session(tmp_path)


def test_a_file_that_gori_did_not_write_is_run_as_it_says_of_itself(written: Exported, tmp_path: Path) -> None:
    out = written("qwen2 untied")[1]
    data = (out / "model.gguf").read_bytes()
    (tmp_path / "other.gguf").write_bytes(data.replace(b"gori.context", b"else.context"))
    session = open_session(tmp_path / "other.gguf")
    assert (session.info.context, session.info.chunk, session.info.eos_ids) == (64, 64, (2,))
    np.testing.assert_allclose(session.prefill([5, 6, 7]), open_session(out).prefill([5, 6, 7]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"PK\3\4" + bytes(60), "is not a GGUF"), (b"GGUF" + bytes(60), "GGUF version 0"), (b"", "is not a GGUF")],
)
def test_a_foreign_file_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    for opened in (open_session, gguf_read.read):
        with pytest.raises(GoriError, match=message):
            opened(tmp_path)


def test_a_file_that_llama_cpp_does_not_load_is_refused_with_its_reason(written: Exported, tmp_path: Path) -> None:
    data = (written("qwen2 untied")[1] / "model.gguf").read_bytes()
    (tmp_path / "model.gguf").write_bytes(data.replace(b"blk.0.ffn_gate.weight", b"blk.0.ffn_gale.weight"))
    with pytest.raises(GoriError, match=r"loads \(tensor 'blk.0.ffn_gate.weight' not found\): export it again"):
        open_session(tmp_path)


def test_a_checkpoint_with_float_layers_keeps_them_unrounded(tmp_path: Path) -> None:
    model = random_decoder(LLAMA)
    tensors, spec = rtn(model, "w4a8-g32")
    name = "model.layers.0.mlp.down_proj.weight"
    del tensors[name], spec.tensors[name]
    spec.float_tensors[name] = "kept for the test"
    (tmp_path / "c").mkdir()
    quantized.save(model, tensors, spec, tmp_path / "c")
    assert name in checkpoint.read_tensors(tmp_path / "c")
    out = write(tmp_path / "c", tmp_path / "out")
    assert gguf_read.read(out)[name].scale is None
    found = parity.measure_parity(
        open_session(out), quantized.load(tmp_path / "c", rounding="q8_0"), parity.default_prompts(200, 32, 16, 1)
    )
    assert found.met, parity.describe(found)
