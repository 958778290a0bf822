"""A .pte for Core ML or Vulkan: all of it delegated, its integers read back, and what is refused.

Neither delegate runs here. The MIL program inside Core ML's is interpreted, which Vulkan's shaders cannot be.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from gori import quantized
from gori.errors import GoriError, MissingEngine
from gori.export import executorch_backends as backends
from gori.export import executorch_backends_qnn as qnn
from gori.export import parity
from gori.export.build import export
from gori.export.contents import compare
from gori.export.verify import verify_one
from gori.export.weights import read_weights, wanted
from students import CHUNK, CONTEXT, LLAMA, LLAMA3, Case, of, write_checkpoint

pytestmark = [
    # coremltools leaves its copy of a package to the garbage collector
    pytest.mark.filterwarnings("ignore:Implicitly cleaning up:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated. Use files:DeprecationWarning"),
]
CASES = {
    "coreml": Case(of("qwen3", rope_scaling=LLAMA3), "w4a8-g32", "w8-channel", {"q_proj": "w8a16-channel"}),
    "coreml, shared table": Case(of("llama"), "w4a16-g64"),
    "vulkan": Case(of("qwen2", tied=False), "w4a8-g32", "w4-g64", {"q_proj": "w4a16-g64"}),
}
Lowered = Callable[[str], tuple[Path, Path, dict[str, object]]]


def lower(source: Path, out: Path, backend: str) -> dict[str, object]:
    return export("executorch", source, out, context=CONTEXT, chunk=CHUNK, backend=backend)["metrics"]


@pytest.fixture(scope="module")
def lowered(tmp_path_factory: pytest.TempPathFactory) -> Lowered:
    """Case name → (checkpoint, directory with its .pte, metrics), each made once."""
    root, made = tmp_path_factory.mktemp("backends"), dict[str, tuple[Path, Path, dict[str, object]]]()

    def once(name: str) -> tuple[Path, Path, dict[str, object]]:
        if name not in made:
            source, out = write_checkpoint(CASES[name], root / f"{len(made)}"), root / f"{len(made)}.et"
            made[name] = (source, out, lower(source, out, name.partition(",")[0]))
        return made[name]

    return once


@pytest.mark.parametrize("case", CASES)
def test_everything_is_delegated_and_every_integer_and_scale_comes_back(case: str, lowered: Lowered) -> None:
    from gori.export.executorch_backends_read import read

    source, out, metrics = lowered(case)
    v = backends.VARIANTS[case.partition(",")[0]]
    want = wanted(read_weights(source), copied_head=v.copied_head, float_bits=v.float_bits)
    assert compare(read(out), want, "model.pte") == len(want)
    assert (metrics["tensors_read_back"], metrics["linears"]) == (len(want), 8)


@pytest.mark.parametrize(("case", "ran"), [("coreml", "MIL interpreter"), ("vulkan", None)])
def test_the_ledger_says_what_ran_and_that_it_was_not_the_device(case: str, ran: str | None, lowered: Lowered) -> None:
    row = verify_one(lowered(case)[1])
    assert row.ok, row.problem
    assert (row.entry["backend"], row.entry["executed"], row.here.get("engine")) == (case, False, ran)
    assert (row.not_run == "") == bool(ran)


@pytest.mark.parametrize("case", ["coreml", "coreml, shared table"])
def test_the_program_in_the_core_ml_delegate_gives_the_checkpoints_logits(case: str, lowered: Lowered) -> None:
    from gori.export.executorch_backends_read import open_coreml

    source, out, _ = lowered(case)
    session = open_coreml(out, None)
    assert (session.info.stand_in, session.info.context, session.info.eos_ids) == (True, CONTEXT, (2, 3))
    prompts = parity.default_prompts(200, CONTEXT, CHUNK, seed=7)
    found = parity.measure_parity(session, quantized.load(source, "none"), prompts, "float16")
    assert found.met, parity.describe(found)


def test_a_core_ml_delegate_is_the_same_bytes_twice(lowered: Lowered, tmp_path: Path) -> None:
    source, out, _ = lowered("coreml, shared table")
    lower(source, tmp_path / "again", "coreml")
    assert (tmp_path / "again" / "model.pte").read_bytes() == (out / "model.pte").read_bytes()


@pytest.mark.parametrize("case", ["coreml", "vulkan"])
def test_the_reader_finds_one_changed_number(case: str, lowered: Lowered) -> None:
    from gori.export.executorch_backends_read import read

    source, out, _ = lowered(case)
    v = backends.VARIANTS[case]
    want = wanted(read_weights(source), copied_head=v.copied_head, float_bits=v.float_bits)
    name = "model.layers.0.mlp.up_proj.weight"
    want[name].weight[3, 4] ^= 1
    with pytest.raises(GoriError, match=rf"1 of {len(want)} tensors .*{name} .1 of 16384 values differ"):
        compare(read(out), want, "model.pte")


def test_a_broken_file_and_a_vulkan_file_are_not_opened_as_core_mls(lowered: Lowered, tmp_path: Path) -> None:
    from gori.export.executorch_backends_read import open_coreml, read

    with pytest.raises(GoriError, match="is for VulkanBackend, which nothing runs here"):
        open_coreml(lowered("vulkan")[1], None)
    (tmp_path / "model.pte").write_bytes((lowered("coreml")[1] / "model.pte").read_bytes()[:3000])
    with pytest.raises(GoriError, match=r"is not a \.pte that can be read"):
        read(tmp_path)


@pytest.mark.parametrize(("scheme", "table"), [("w8a8-channel", "w4-g32"), ("w4a8-channel", "w4-g32")])
def test_vulkan_refuses_what_its_shaders_do_not_hold(scheme: str, table: str, tmp_path: Path) -> None:
    source = write_checkpoint(Case(LLAMA, scheme, table), tmp_path / "c")
    with pytest.raises(
        GoriError, match=rf"ExecuTorch .Vulkan. does not hold .*{scheme}.*quantize with one of w4a8-g32"
    ):
        lower(source, tmp_path / "out", "vulkan")
    assert not (tmp_path / "out" / "model.pte").exists()


def test_vulkan_refuses_a_float_checkpoint_and_a_table_of_8_bits(tmp_path: Path) -> None:
    with pytest.raises(GoriError, match="is written from integers alone: quantize with"):
        lower(write_checkpoint(Case(LLAMA, "float"), tmp_path / "a"), tmp_path / "out", "vulkan")
    with pytest.raises(GoriError, match="does not hold the embedding table's 8-bit rows"):
        lower(write_checkpoint(Case(LLAMA, "w4a8-g32", "w8-g32"), tmp_path / "b"), tmp_path / "out2", "vulkan")


def test_vulkan_takes_outputs_in_fours(tmp_path: Path) -> None:
    source = write_checkpoint(Case(of("llama", vocab_size=201, tied=False), "w4a8-g32", "w4-g32"), tmp_path / "c")
    with pytest.raises(GoriError, match=r"lm_head.weight has 201 outputs .* multiples of 4: train with a voc.* of 204"):
        lower(source, tmp_path / "out", "vulkan")


def test_a_pass_that_fails_is_named_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_checkpoint(Case(of("llama", vocab_size=201, tied=False), "w4a8-g32", "w4-g32"), tmp_path / "c")
    monkeypatch.setattr(backends, "check_shapes", lambda _: None)
    with pytest.raises(GoriError, match=r"^FusePatternsPass of the partitioner for .*Vulkan.* failed .*201, 4, 1"):
        lower(source, tmp_path / "out", "vulkan")


def test_a_chunk_of_one_token_is_lowered_with_a_fixed_length(tmp_path: Path) -> None:
    source = write_checkpoint(Case(LLAMA, "w4a16-g32"), tmp_path / "c")
    body = export("executorch", source, tmp_path / "out", context=2, chunk=1, backend="coreml")
    assert body["metrics"]["parity"]["met"]


def test_openvino_and_unknown_backends_are_refused_with_what_is_known() -> None:
    with pytest.raises(GoriError, match=r"--backend openvino .*carries no integers: .*dequantize_affine outside"):
        backends.row("openvino")
    with pytest.raises(GoriError, match="backend 'vulcan' is unknown: did you mean 'vulkan'"):
        backends.row("vulcan")


@pytest.mark.parametrize(("backend", "soc"), [("qnn", "SA8295"), ("qnn:SA8255", "SA8255"), ("qnn:SA8797", "SA8797")])
def test_qnn_without_the_sdk_names_the_chip_and_what_is_missing(
    backend: str, soc: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for root, said in ((None, "QNN_SDK_ROOT is not set"), (str(tmp_path / "no"), "which is no directory")):
        monkeypatch.delenv(qnn.SDK, raising=False)
        if root:
            monkeypatch.setenv(qnn.SDK, root)
        with pytest.raises(MissingEngine, match=rf"--backend qnn:{soc} lacks .*{said}.*never run this path"):
            backends.row(backend)
    monkeypatch.setattr(qnn, "BINDINGS", "executorch.no_such_bindings")
    with pytest.raises(MissingEngine, match=r"no directory.* and the wheel's Python bindings .executorch.no_such"):
        backends.row(backend)


def test_qnn_refuses_another_chip_and_a_flexible_length(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(GoriError, match="chip 'SA8155' of --backend qnn:SA8155 is unknown"):
        backends.row("qnn:SA8155")
    monkeypatch.setenv(qnn.SDK, str(tmp_path))
    source = write_checkpoint(Case(LLAMA, "w8a16-channel"), tmp_path / "c")
    with pytest.raises(GoriError, match=f"up to {CHUNK} tokens .* fixed shapes: export with --chunk 1"):
        lower(source, tmp_path / "out", "qnn:SA8255")


@pytest.mark.parametrize("soc", qnn.SOCS)
def test_qnns_compile_specs_are_those_of_the_chip(soc: str) -> None:
    from executorch.backends.qualcomm.serialization.qc_schema import QcomChipset
    from executorch.backends.qualcomm.serialization.qc_schema_serialize import flatbuffer_to_option

    options = flatbuffer_to_option(qnn.compile_specs(soc)[0].value)
    assert options.soc_info.soc_model == QcomChipset[soc]


def test_qnns_lowering_goes_as_far_as_the_sdks_first_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty directory for the SDK: every pass before Qualcomm's own code ran, and its absence is one sentence."""
    monkeypatch.setenv(qnn.SDK, str(tmp_path))
    source = write_checkpoint(Case(LLAMA, "w8a16-channel"), tmp_path / "c")
    with pytest.raises(GoriError, match=r"the lowering for .*HTP of SA8255. failed .*Failed to initialize QNN backend"):
        export("executorch", source, tmp_path / "out", context=CONTEXT, chunk=1, backend="qnn:SA8255")
