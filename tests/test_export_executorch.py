"""A .pte against the eager quantized model: its logits, its integers, its bytes, and what is refused.

An export takes seconds, so each case is exported once for the file; the cases cross kinds, heads and schemes.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from gori import checkpoint, quantized
from gori.errors import GoriError, MissingEngine
from gori.export.build import export
from gori.export.commands import export_command
from gori.export.contents import compare
from gori.export.executorch_warnings import upstream_warnings
from gori.export.weights import Options, read_weights, resolve_lengths, wanted
from gori.quantize.rtn import round_to_nearest
from gori.quantize.schemes import SCHEMES
from gori.quantized import EMBEDDING, HEAD
from gori.runtime.session import open_session
from students import CHUNK, CONTEXT, LLAMA, LLAMA3, Case, Exported, each_once, of, write_checkpoint

CASES = {
    "llama, shared table, rope scaling": Case(of("llama", rope_scaling=LLAMA3), "w4a8-g32"),
    "qwen2 untied": Case(of("qwen2", tied=False), "w8a8-channel", "w4-channel"),
    "qwen3, tied but apart, mixed": Case(
        of("qwen3"), "w4a8-channel", "w8-g32", {"q_proj": "w4a8-g64", "down_proj": "w4a8-g128"}
    ),
    "qwen2 float": Case(of("qwen2"), "float"),
}


def make(source: Path, out: Path) -> None:
    export("executorch", source, out, context=CONTEXT, chunk=CHUNK, prompts=[[5, 6, 7]])


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Case name → (checkpoint, exported directory), each made once."""
    return each_once(tmp_path_factory.mktemp("executorch"), CASES, make)


@pytest.mark.parametrize("case", CASES)
def test_the_manifest_has_the_evidence_and_the_file_no_waste(case: str, exported: Exported) -> None:
    body = json.loads((exported(case)[1] / "manifest.json").read_text())
    m, linears = body["metrics"], 7 * CASES[case].cfg.layers + 1
    assert (m["delegated_linears"], m["linears"], m["tensors_read_back"]) == (linears, linears, linears + 1)
    assert m["file_bytes"] <= 1.15 * m["packed_bytes"] + 100_000
    assert [g["met"] for g in body["gates"]] == [True] * 4
    assert {"model.pte", "config.json", "generation_config.json", "tools.json"} <= set(body["files"])


def test_the_float_export_is_float32s_own_rounding_from_eager(exported: Exported) -> None:
    source, out = exported("qwen2 float")
    ids = torch.randint(0, 200, (CONTEXT,), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        want = quantized.load(source)(ids.unsqueeze(0))[0].numpy()
    session = open_session(out)
    # prompts beyond a chunk, then token by token; nothing is rounded, so 1e-5 of the largest logit holds everywhere
    np.testing.assert_allclose(session.prefill(ids[:40].tolist()), want[39], atol=1e-5 * np.abs(want).max() * 3)
    for i in range(40, CONTEXT):
        np.testing.assert_allclose(session.decode(int(ids[i])), want[i], atol=1e-5 * np.abs(want).max() * 3)


def test_the_session_knows_what_the_file_says(exported: Exported) -> None:
    out = exported("qwen2 untied")[1]
    info = open_session(out / "model.pte").info
    assert (info.engine, info.vocab_size, info.context, info.chunk) == ("executorch", 200, CONTEXT, CHUNK)
    assert (info.bos_id, info.eos_ids, info.file_bytes) == (1, (2, 3), (out / "model.pte").stat().st_size)
    with pytest.raises(GoriError, match="its pool cannot be resized"):
        open_session(out, threads=info.threads + 1)


def test_a_broken_file_is_refused(exported: Exported, tmp_path: Path) -> None:
    pte = (exported("qwen2 untied")[1] / "model.pte").read_bytes()
    (tmp_path / "model.pte").write_bytes(pte[:200])
    with pytest.raises(GoriError, match="that this ExecuTorch loads"):
        open_session(tmp_path)


class Program:
    """A .pte whose metadata answer and whose `forward` does not: one flipped bit was seen to do that."""

    def __init__(self, loads: bool) -> None:
        self.loads = loads

    def load_method(self, name: str) -> Callable[[tuple[torch.Tensor, ...]], list[int]]:
        if name == "forward" and not self.loads:
            raise RuntimeError("Failed to load method forward,\n error: 0x:23")

        def answer(arguments: tuple[torch.Tensor, ...]) -> list[int]:
            if arguments:
                raise RuntimeError("method->execute() failed with\n error 0x12")
            return [8]

        return answer


def test_a_program_that_does_not_load_or_does_not_run_is_refused_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gori.runtime import executorch as runtime

    (tmp_path / "model.pte").write_bytes(b"0")
    monkeypatch.setattr(runtime, "set_threads", lambda *_: 1)
    for loads in (False, True):
        engine = SimpleNamespace(_load_program=lambda _, loads=loads: Program(loads))
        monkeypatch.setattr(runtime, "load_engine", lambda engine=engine: engine)
        with pytest.raises(GoriError, match=r"(load method forward, error: 0x:23|does not run .* error 0x12)") as e:
            runtime.open_pte(tmp_path / "model.pte", None).prefill([1])
        assert "\n" not in str(e.value)


def test_without_the_wheel_the_engine_is_missing_and_the_check_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from gori.runtime import executorch as runtime

    runtime.check()

    def fail(_: str) -> None:
        raise ImportError("no\nwheel")

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(MissingEngine, match=r"does not load here \(no wheel\): pip install 'gori\[executorch\]'"):
        runtime.load_engine()
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingEngine, match="needs torch and executorch"):
        runtime.check()


def test_a_chunk_of_one_token_is_lowered_with_a_fixed_length(tmp_path: Path) -> None:
    source = write_checkpoint(Case(LLAMA, "w4a8-g32"), tmp_path / "c")
    body = export("executorch", source, tmp_path / "out", context=2, chunk=1)
    assert body["metrics"]["parity"]["met"]
    assert open_session(tmp_path / "out").info.chunk == 1


def test_nothing_of_a_lowering_stays_in_memory(tmp_path: Path) -> None:
    from gori.export import executorch

    source = write_checkpoint(Case(LLAMA, "w4a8-g32"), tmp_path / "c")
    weights = read_weights(source)
    tensors = {name: weakref.ref(t.q) for name, t in weights.integers.items()}
    executorch.write(weights, tmp_path, Options(source, CONTEXT, CHUNK, 1, (2, 3)))
    del weights
    gc.collect()
    # one small linear of a layer may stay, in a cache that was not found
    alive = [name for name, t in tensors.items() if t() is not None]
    assert len(alive) <= 1, alive
    assert EMBEDDING not in alive


@pytest.mark.parametrize("scheme", ["w4a16-g32", "w8a16-channel", "w8a8-g32"])
def test_a_scheme_that_xnnpack_does_not_hold_is_refused_with_those_that_it_does(scheme: str, tmp_path: Path) -> None:
    source = write_checkpoint(Case(LLAMA, scheme), tmp_path / "c")
    with pytest.raises(GoriError, match=rf"{scheme}.*quantize with one of w8a8-channel, .*w4a8-g32") as e:
        export("executorch", source, tmp_path / "out")
    assert "model.layers.0." in str(e.value)


def test_a_shared_head_without_rounded_activations_is_refused(tmp_path: Path) -> None:
    source = write_checkpoint(Case(LLAMA, "w4a8-g32"), tmp_path / "c")
    body = json.loads((source / "quantization.json").read_text())
    (source / "quantization.json").write_text(json.dumps(body | {"head_activation_bits": 16}))
    with pytest.raises(GoriError, match=f"does not hold {HEAD} .scheme w4a8-g32., 4-bit .* of 32, 16-bit"):
        export("executorch", source, tmp_path / "out")


@pytest.mark.parametrize(("context", "chunk"), [(1, None), (65, None), (32, 32), (32, 0)])
def test_lengths_that_the_model_does_not_allow_are_refused(context: int, chunk: int | None) -> None:
    with pytest.raises(GoriError, match="is not in"):
        resolve_lengths(LLAMA, context, chunk)


def test_a_linear_that_xnnpack_does_not_take_is_refused_by_name() -> None:
    from gori.export.executorch_graph import FloatTable, Integers, project
    from gori.export.executorch_lower import lower

    class TwoHeads(torch.nn.Module):
        """One head as gori writes it, and one weight-only: the partitioner leaves that to a slow kernel silently."""

        def __init__(self) -> None:
            super().__init__()
            t = round_to_nearest(torch.eye(32) + 0.1, SCHEMES["w8a8-channel"])
            self.table, self.good, self.bad = FloatTable(t.dequantize()), Integers(t, None), Integers(t, None)

        def forward(self, tokens: torch.Tensor, input_pos: torch.Tensor) -> torch.Tensor:
            x = self.table(tokens)[:, -1, :]
            return project(x, self.good)[0] + self.bad(x)

    refused = pytest.raises(GoriError, match=r"did not take 1 of 2 linear layers \(bad\)")
    with upstream_warnings(), refused:
        lower(TwoHeads(), CHUNK, {})


@pytest.mark.parametrize("case", ["llama, shared table, rope scaling", "qwen3, tied but apart, mixed", "qwen2 untied"])
@pytest.mark.parametrize("what", ["integer", "scale", "table", "swapped"])
def test_the_reader_finds_one_changed_number(case: str, what: str, exported: Exported) -> None:
    source, out = exported(case)
    from gori.export.executorch_read import read

    weights = read_weights(source)
    found, want = read(out), wanted(weights, copied_head=True)
    assert compare(found, want, "model.pte") == 7 * weights.cfg.layers + 2
    name = EMBEDDING if what == "table" else "model.layers.0.self_attn.v_proj.weight"
    t = weights.integers[name]
    if what in ("integer", "table"):
        t.q[-1, -1] += 1 if t.q[-1, -1] < 0 else -1
        want = wanted(weights, copied_head=True)
    elif what == "scale":
        t.scale[0, 0] *= 2
        want = wanted(weights, copied_head=True)
    else:  # two tensors of one shape in each other's place
        other = "model.layers.0.self_attn.k_proj.weight"
        want[name], want[other] = want[other], want[name]
    with pytest.raises(GoriError, match=rf"tensors in the \.pte are not the checkpoint's: .*{name.split('.')[-2]}"):
        compare(found, want, "the .pte")


def changed_checkpoint(source: Path, out: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    shutil.copytree(source, out)
    tensors = load_file(source / checkpoint.WEIGHTS)
    tensors[name] = change(tensors[name])
    save_file(tensors, out / checkpoint.WEIGHTS)
    return out


def flip(q: torch.Tensor) -> torch.Tensor:
    q[3, 4] ^= 1
    return q


FAULTS = {
    "an integer": ("model.layers.0.mlp.up_proj.weight.q", flip, r"1 of 9 tensors .*up_proj.weight .1 of 16384"),
    "a norm": ("model.layers.0.input_layernorm.weight", lambda w: w * 1.001, "does not compute the checkpoint's"),
    "a bias": ("model.layers.0.self_attn.q_proj.bias", lambda w: w + 0.01, "does not compute the checkpoint's"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_is_not_the_checkpoints_stops_the_export_and_nothing_is_left(
    fault: str, exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gori.export import executorch_lower as lowering

    source, out = exported("qwen2 untied")
    name, change, message = FAULTS[fault]
    other = changed_checkpoint(source, tmp_path / "c", name, change)
    # lowering that carries something else than what it was given: another checkpoint's file
    lowered = lowering.Lowered((out / "model.pte").read_bytes(), ("",) * 8, 0)
    monkeypatch.setattr(lowering, "lower", lambda *_: lowered)
    with pytest.raises(GoriError, match=message):
        export("executorch", other, tmp_path / "out", context=CONTEXT, chunk=CHUNK)
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_the_command_prints_one_json_object_and_the_bytes_are_the_same_again(
    exported: Exported, tmp_path: Path
) -> None:
    source, first = exported("qwen2 untied")
    (tmp_path / "prompts.jsonl").write_text("[1, 2, 3]\n\n[4]\n")
    out = tmp_path / "out"
    arguments = [str(source), "--target", "executorch", "--out", str(out), "--context", str(CONTEXT), "--json"]
    arguments += ["--chunk", str(CHUNK), "--prompts", str(tmp_path / "prompts.jsonl")]
    run = CliRunner().invoke(export_command, arguments)
    assert run.exit_code == 0, run.output
    assert json.loads(run.stdout)["delegated_linears"] == 8
    assert json.loads((out / "manifest.json").read_text())["settings"]["prompts"] == [[1, 2, 3], [4]]
    assert (out / "model.pte").read_bytes() == (first / "model.pte").read_bytes()


@pytest.mark.parametrize(
    ("line", "message"), [("[1, 2", "line 2 column"), ('["a"]', "line 2 is"), ("[]", "line 2 is"), ("[true]", "line 2")]
)
def test_a_bad_line_of_prompts_is_refused_with_its_place(line: str, message: str, tmp_path: Path) -> None:
    from gori.export.commands import read_prompts

    (tmp_path / "p").write_text(f"[1]\n{line}\n")
    with pytest.raises(GoriError, match=message):
        read_prompts(tmp_path / "p")
