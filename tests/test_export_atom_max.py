"""An ATOM-Max export against the eager model: integers, logits of the static graphs, bytes, refusals.

Nothing here runs on an NPU.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from rbln_students import CASES, CHUNK, CONTEXT, Exported, export, maker, wide
from safetensors.torch import load_file, save_file

from gori import quantized
from gori.errors import GoriError
from gori.export import atom_max as target
from gori.export import atom_max_checks as checks
from gori.export import atom_max_graph as graph
from gori.export import atom_max_plan as planning
from gori.export import atom_max_read as reader
from gori.export import atom_max_run as runner
from gori.export import parity
from gori.export.contents import compare
from gori.export.weights import check_schemes, read_weights, wanted
from gori.quantized import EMBEDDING, HEAD, QuantizedTensor
from gori.runtime.eager import session_of
from gori.runtime.generate import generate
from gori.targets import TARGETS
from students import Case, write_checkpoint

PROJECTION = "model.layers.0.self_attn.v_proj.weight"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return maker(tmp_path_factory.mktemp("atom-max"))


@pytest.mark.parametrize("case", CASES)
def test_the_file_holds_the_checkpoints_integers_and_the_graphs_compute_its_logits(
    case: str, exported: Exported
) -> None:
    source, out = exported(case)
    want = wanted(read_weights(source), copied_head=True, float_bits=16)
    assert compare(reader.read(out), want, "checkpoint") == 7 * CASES[case].cfg.layers + 2
    check_schemes(read_weights(source).spec, TARGETS["atom-max"])
    # bounds are what float16 does to the eager model itself, see gori.export.parity
    prompts = parity.default_prompts(200, CONTEXT, CHUNK, seed=7)
    session, model = runner.open_directory(out, 1), quantized.load(source, rounding="none")
    found = parity.measure_parity(session, model, prompts, TARGETS["atom-max"].arithmetic)
    assert found.met, parity.describe(found)
    reference = session_of(quantized.load(source, rounding="none"), source, CONTEXT)
    for prompt in ([5, 6, 7], list(range(70))):
        session.reset(), reference.reset()
        tokens = list(generate(session, prompt, (), max_new=16))
        assert tokens == list(generate(reference, prompt, (), max_new=16))
        assert len(tokens) == 16


@pytest.mark.parametrize("case", CASES)
def test_the_report_claims_no_more_than_was_done(case: str, exported: Exported) -> None:
    _, out = exported(case)
    report = json.loads((out / "report.json").read_text())
    assert (report["compiled"], report["executed_on_npu"]) == (False, False)
    assert not [p for p in out.rglob("*") if p.suffix == ".rbln" or p.name == "rbln_config.json"]
    numbers = report["numbers"]
    assert numbers["float32"]["against_carried_weights"] <= numbers["float32"]["bound"]
    assert (numbers["float16"]["overflows"], numbers["bfloat16"]["overflows"]) == (0, 0)
    # bfloat16 has 8 bits of mantissa, float16 11: 2^3 in a logit, 2^6 in KL; within a factor of four
    assert 16 < numbers["bfloat16"]["kl_mean"] / numbers["float16"]["kl_mean"] < 256
    assert report["operators"]["host"] == []
    assert {"linear", "rbln_custom_ops::paged_causal_attn_prefill"} <= set(report["operators"]["accelerated"])
    assert report["roofline"]["label"] == "bandwidth lower bound, not latency"


def test_the_checkpoint_is_optimum_rblns_layout_and_wastes_nothing(exported: Exported) -> None:
    source, out = exported("llama, shared int4 table, rope scaling")
    tensors = load_file(out / "checkpoint" / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.int8, torch.float16}
    assert tensors[PROJECTION].shape == (32, 128)
    assert tensors[f"{PROJECTION}_scale"].shape == (32, 1)
    torch.testing.assert_close(tensors[HEAD], tensors[EMBEDDING], rtol=0, atol=0)
    size = sum(p.stat().st_size for p in (out / "checkpoint").iterdir())
    assert size <= 1.01 * target.layout_bytes(read_weights(source)) + 10_000
    request = json.loads((out / "compile_request.json").read_text())["rbln_config"]
    assert request["quantization"] == {"format": "rbln", "weights": "int4", "activations": "fp16"}
    assert (request["npu"], request["max_seq_len"], request["prefill_chunk_size"]) == ("RBLN-CA25", CONTEXT, CHUNK)


def test_four_bits_beside_eight_travel_as_int8_and_eight_bit_activations_are_spoken_of(exported: Exported) -> None:
    _, out = exported("qwen2 untied, mixed, 8-bit activations")
    request = json.loads((out / "compile_request.json").read_text())["rbln_config"]
    assert request["quantization"]["weights"] == "int8"
    notes = " ".join(json.loads((out / "report.json").read_text())["notes"])
    assert "activations stay 16-bit floats" in notes
    assert "travel as int8" in notes


def files(directory: Path) -> dict[str, bytes]:
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def test_another_process_writes_the_same_bytes(exported: Exported, tmp_path: Path) -> None:
    source, out = exported("llama, shared int4 table, rope scaling")
    script = (
        "import sys; from pathlib import Path; from gori.export import atom_max, weights as w; s = Path(sys.argv[1]);"
        f"o = w.Options(s, {CONTEXT}, {CHUNK}, 1, (2, 3), None);"
        "atom_max.write(w.read_weights(s), Path(sys.argv[2]), o)"
    )
    (tmp_path / "again").mkdir()
    env = {**os.environ, "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", script, str(source), str(tmp_path / "again")], check=True, env=env)
    first, again = files(out), files(tmp_path / "again")
    assert first.keys() == again.keys()
    assert [n for n in first if first[n] != again[n]] == []
    assert not [n for n, body in first.items() if str(Path(__file__).parents[1]).encode() in body]


def test_larger_batches_are_written_checked_and_asked_for(exported: Exported, tmp_path: Path) -> None:
    source, _ = exported("llama float")
    out = export(source, tmp_path / "out", backend="batch=1+4,devices=2")
    request = json.loads((out / "compile_request.json").read_text())["rbln_config"]
    assert (request["batch_size"], request["decoder_batch_sizes"], request["num_devices"]) == (4, [4, 1], 2)
    assert {p.name for p in (out / "reference").iterdir()} == {"prefill.pt2", "decode_b1.pt2", "decode_b4.pt2"}
    assert "quantization" not in request


def test_a_long_context_is_kept_in_partitions_that_compute_the_same(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, _ = exported("llama float")
    monkeypatch.setattr(planning, "LONGEST_EAGER", 64)
    monkeypatch.setattr(planning, "PARTITION", 64)
    monkeypatch.setattr(graph, "PARTITION", 64)
    out = export(source, tmp_path / "out")  # raises unless the graphs compute the student's logits
    assert json.loads((out / "compile_request.json").read_text())["rbln_config"]["kvcache_partition_len"] == 64
    assert "rbln_custom_ops::paged_flash_causal_attn_decode" in (out / "report.json").read_text()


def test_a_graph_that_computes_something_else_stops_the_export(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, _ = exported("llama float")
    monkeypatch.setattr(graph, "rotate", lambda x, rope: x)
    with pytest.raises(GoriError, match="the static graphs are off by"):
        export(source, tmp_path / "out")


def test_scales_of_groups_are_refused_with_the_schemes_that_keep_them(tmp_path: Path) -> None:
    source = write_checkpoint(Case(wide("llama"), "w4a16-g32"), tmp_path / "c")
    with pytest.raises(GoriError, match=r"quantize with one of .*w4a16-channel"):
        check_schemes(read_weights(source).spec, TARGETS["atom-max"])
    with pytest.raises(GoriError, match=r"collapses to one a row .*--scheme w4a16-channel or w8a16-channel"):
        export(source, tmp_path / "out")


def test_a_float_projection_among_integers_and_a_weight_beyond_float16_are_refused(exported: Exported) -> None:
    w = read_weights(exported("qwen3, shared int8 table, two layers")[0])
    part = dict(w.integers)
    moved: QuantizedTensor = part.pop(PROJECTION)
    with pytest.raises(GoriError, match=f"{PROJECTION} is float and others are integers"):
        target.check_weights(dataclasses.replace(w, integers=part, floats=w.floats | {PROJECTION: moved.dequantize()}))
    norm = "model.norm.weight"
    with pytest.raises(GoriError, match=f"{norm} holds 100000, float16 ends at 65504"):
        target.check_weights(dataclasses.replace(w, floats=w.floats | {norm: torch.full((128,), 1e5)}))
    with pytest.raises(GoriError, match=f"lacks {norm}"):
        checks.decoder_of(dataclasses.replace(w, floats={k: v for k, v in w.floats.items() if k != norm}), carried=True)


def test_the_reader_needs_no_torch() -> None:
    script = "import sys, gori.export.atom_max_read; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


def damage(out: Path, name: str, change: Callable[[torch.Tensor], object]) -> None:
    path = out / "checkpoint" / "model.safetensors"
    tensors = load_file(path)
    change(tensors[name].view(torch.uint8) if name != "all" else tensors[name])
    save_file(tensors, path, metadata={"format": "pt"})


def flip_last(t: torch.Tensor) -> None:
    t.view(-1)[-1] ^= 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (PROJECTION, f"{PROJECTION} .1 of 8192 values differ"),
        (f"{PROJECTION}_scale", f"{PROJECTION} .scales differ"),
        (EMBEDDING, f"row 199 of {EMBEDDING} is not 8-bit integers times the scales"),
        (HEAD, f"row 199 of {HEAD} is not 8-bit integers times the scales"),
    ],
)
def test_the_reader_finds_one_changed_bit(name: str, message: str, exported: Exported, tmp_path: Path) -> None:
    source, out = exported("qwen3, shared int8 table, two layers")
    out = Path(shutil.copytree(out, tmp_path / "out"))
    damage(out, name, flip_last)
    with pytest.raises(GoriError, match=message):
        compare(reader.read(out), wanted(read_weights(source), copied_head=True, float_bits=16), "checkpoint")


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "gori.json", "embed_tokens.scale.npy"])
def test_a_damaged_file_is_refused_in_one_sentence_or_read_as_it_is(
    file: str, exported: Exported, tmp_path: Path
) -> None:
    _, out = exported("llama, shared int4 table, rope scaling")
    out = Path(shutil.copytree(out, tmp_path / "out"))
    path, random = out / "checkpoint" / file, np.random.default_rng(0)
    whole, refused = path.read_bytes(), 0
    for i in range(60):
        body = bytearray(whole)
        if i % 3 == 0:
            body = body[: int(random.integers(0, len(body)))]
        else:  # within the first kilobyte, where the structure is, and anywhere
            at = int(random.integers(0, min(len(body), 1000 if i % 3 == 1 else len(body))))
            body[at] ^= 1 << int(random.integers(0, 8))
        path.write_bytes(body)
        try:
            reader.read(out)
        except GoriError as e:
            refused += 1
            assert "\n" not in str(e)  # noqa: PT017  (most, not all, must be refused)
    assert refused >= 20  # every truncation at least


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: (d / "extra.safetensors").write_bytes(b""), "would load both"),
        (lambda d: (d / "gori.json").write_text('{"schema_version": 2, "bits": {}}'), "is not gori's, version 1"),
        (lambda d: (d / "model.safetensors").unlink(), "model.safetensors"),
        (lambda d: (d / "embed_tokens.scale.npy").unlink(), "embed_tokens.scale.npy"),
    ],
)
def test_a_directory_that_is_not_what_was_written_is_refused(
    change: Callable[[Path], object], message: str, exported: Exported, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(exported("llama, shared int4 table, rope scaling")[1], tmp_path / "out"))
    change(out / "checkpoint")
    with pytest.raises(GoriError, match=message):
        reader.read(out)


def test_a_session_runs_what_the_directory_holds_and_says_that_it_stands_in(exported: Exported, tmp_path: Path) -> None:
    source, out = exported("llama float")
    info = runner.open_directory(out, 1).info
    assert (info.stand_in, info.context, info.chunk, info.bos_id, info.eos_ids) == (True, CONTEXT, CHUNK, 1, (2, 3))
    other = Path(shutil.copytree(out, tmp_path / "out"))
    damage(other, "model.norm.weight", lambda t: t.view(torch.float16).mul_(1.01))
    prompts = parity.default_prompts(200, CONTEXT, CHUNK, seed=7)
    found = parity.measure_parity(runner.open_directory(other, 1), quantized.load(source), prompts, "float16")
    assert not found.met
    (other / "reference" / "prefill.pt2").write_bytes((out / "reference" / "prefill.pt2").read_bytes()[:5000])
    with pytest.raises(GoriError, match=r"prefill.pt2 is not a graph that this torch loads"):
        runner.open_directory(other, 1)
    (other / "compile_request.json").write_text("{}")
    with pytest.raises(GoriError, match="has no rbln_config"):
        runner.open_directory(other, 1)


def test_a_prompt_that_starts_late_in_the_context_is_read_to_its_end(exported: Exported) -> None:
    source, out = exported("llama float")
    session, reference = runner.open_directory(out, 1), session_of(quantized.load(source), source, CONTEXT)
    ids = torch.randint(0, 200, (CONTEXT,), generator=torch.Generator().manual_seed(3)).tolist()
    for s in (session, reference):
        s.prefill(ids[:100])
    # float16 weights: 2^-11 of the largest logit at a matrix, a few of them in a row
    got, want = session.prefill(ids[100:]), reference.prefill(ids[100:])
    np.testing.assert_allclose(got, want, atol=4 * 2**-11 * np.abs(want).max())
    with pytest.raises(GoriError, match=f"{CONTEXT} tokens are in the context"):
        session.decode(7)


def test_the_check_asks_for_torch_and_not_for_the_sdk(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    from gori.errors import MissingEngine
    from gori.export import atom_max_run

    atom_max_run.check()
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingEngine, match="needs torch and safetensors"):
        atom_max_run.check()
