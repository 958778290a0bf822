"""What an ATOM-Max export says of a device that is not here: rules, operators, memory, and Rebellions' own front end.

The contract test, in an environment of its own, puts the real optimum-rbln over the files.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rbln_students import CASES, Exported, export, maker

from gori.errors import GoriError
from gori.export import atom_max as target
from gori.export import atom_max_checks as checks
from gori.export import atom_max_ops as ops
from gori.export import atom_max_plan as planning
from gori.export.weights import read_weights


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return maker(tmp_path_factory.mktemp("atom-max"))


def test_a_float16_product_is_exact_for_four_bits_and_within_a_sixteenth_of_a_step_for_eight() -> None:
    # every mantissa of a portable scale, with every integer, at the smallest scale and at a large one
    for bits, bound in ((4, 0.0), (8, 1 / 16)):
        q = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1), dtype=torch.int8).repeat(256, 1)
        for exponent in (-14, 3):
            scale = (1 + torch.arange(256) % 128 / 128).unsqueeze(1) * 2.0**exponent
            exact = q.float() * scale
            worst = ((exact.half().float() - exact).abs() / scale).max()
            assert worst <= bound
            assert torch.equal((exact.half().float() / scale).round().to(torch.int8), q)


@pytest.mark.parametrize("table", [[0, 1], [1, 0]])
@pytest.mark.parametrize(("start", "tokens"), [(0, 4), (3, 3), (6, 4), (7, 1)])
def test_paged_attention_is_causal_attention_over_the_blocks_of_a_table(
    table: list[int], start: int, tokens: int
) -> None:
    g = torch.Generator().manual_seed(0)
    K, G, d, block = 2, 3, 8, 4
    past_k, past_v, k, v = (torch.randn(K, n, d, generator=g) for n in (start, start, tokens, tokens))
    q = torch.randn(1, K, G, tokens, d, generator=g)
    caches = [torch.full((2, K, 1, block, d), torch.nan) for _ in range(2)]
    for cache, past in zip(caches, (past_k, past_v), strict=True):
        for i in range(start):
            cache[table[i // block], :, 0, i % block] = past[:, i]
    ops.register()
    got = torch.ops.rbln_custom_ops.paged_causal_attn_prefill(
        q, k[None, :, None], v[None, :, None], *caches, torch.tensor([[start]], dtype=torch.int32),
        torch.tensor(d**-0.5), torch.tensor(table, dtype=torch.int16), block,
    )  # fmt: skip
    room = min(tokens, 2 * block - start)  # what is past the last block is a chunk's padding
    keys, values = torch.cat((past_k, k[:, :room]), 1), torch.cat((past_v, v[:, :room]), 1)
    mask = torch.ones(tokens, start + room, dtype=torch.bool).tril(start)
    want = F.scaled_dot_product_attention(q[0], keys.unsqueeze(1), values.unsqueeze(1), attn_mask=mask)
    torch.testing.assert_close(got[0], want, rtol=1e-5, atol=1e-6)
    assert got.is_contiguous()
    assert not caches[0][table[1 if start + room > block else 0]].isnan().all()


def test_rounding_counts_what_leaves_a_format_and_leaves_float32_sums_alone() -> None:
    rounded = checks.Rounded(torch.float16)
    got = rounded("mul", torch.tensor([1.0, 70000.0, torch.inf, 1 + 2**-12]))
    assert got.tolist() == [1.0, torch.inf, torch.inf, 1.0]
    assert dict(rounded.overflows) == {"mul": 1}
    assert checks.Rounded(torch.bfloat16)("mul", torch.tensor([70000.0])).tolist() == [70144.0]


@pytest.mark.parametrize(
    ("name", "state"),
    [("silu", "accelerated"), ("rbln_custom_ops::x", "accelerated"), ("argmax", "host"), ("view", "unknown")],
)
def test_an_operator_is_accelerated_host_or_unknown(name: str, state: str) -> None:
    assert checks.state(name) == state


def test_memory_and_bound_are_those_of_a_published_run() -> None:
    # Qwen3-4B in fp16: 4.02e9 parameters, 36 layers, 8 key/value heads of 128; on 4 devices the bound is 7.86 ms
    load = planning.Load(round(2 * 4.02e9), 0, layers=36, kv_heads=8, head_dim=128)
    plan = planning.make_plan(32768, 128, None)
    assert planning.roofline(load, plan, 4)["empty_cache_ms"] == pytest.approx(7.86, abs=0.01)
    # 72 tensors of 32768 × 2 heads × 128 × 2 bytes on each of 4
    assert load.kv_bytes(plan, 4) == 72 * 32768 * 2 * 128 * 2
    # a tensor of 1 MiB takes the 2 MiB to which it is aligned
    assert load.kv_bytes(planning.make_plan(1024, 128, None), 2) == 72 * 2 * 2**20
    assert planning.choose_devices(load, plan) == 1
    assert planning.choose_devices(dataclasses.replace(load, split_bytes=40 * 2**30), plan) == 4
    huge = dataclasses.replace(load, split_bytes=40 * 2**30)
    with pytest.raises(GoriError, match=r"choose devices=4, a shorter --context"):
        planning.choose_devices(huge, dataclasses.replace(plan, devices=1))
    with pytest.raises(GoriError, match=r"on each of 4 devices exceed the 15.7 GiB"):
        planning.choose_devices(dataclasses.replace(load, split_bytes=80 * 2**30), plan)


@pytest.mark.parametrize(
    ("context", "chunk", "settings", "message"),
    [
        (128, 127, None, "chunk 127 is not a multiple of 64.*--chunk 64"),
        (160, 64, None, "context 160 is not a multiple of chunk 64.*--context 128"),
        (40960, 128, None, "partitions of 16384: choose --context 32768"),
        (128, 64, "devices=3", r"3 devices .*choose one of \(1, 2, 4\)"),
        (128, 64, "batch=0", "a batch of 0 is not in 1..256"),
        (128, 64, "batch=8+999", "a batch of 999 is not"),
        (128, 64, "batch=x", "is no number"),
        (128, 64, "qnn", "'qnn' sets nothing on target atom-max"),
    ],
)
def test_what_the_compilers_front_end_would_refuse_is_refused_with_the_mend(
    context: int, chunk: int, settings: str | None, message: str
) -> None:
    with pytest.raises(GoriError, match=message):
        planning.make_plan(context, chunk, settings)


def run_driver(out: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(out / target.COMPILE)], capture_output=True, text=True, check=False)


@pytest.mark.skipif(target.sdk_python() is not None, reason="Rebellions' SDK is installed")
def test_without_the_sdk_the_driver_says_what_to_install_and_an_export_does_not_pretend(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = exported("llama float")
    run = run_driver(out)
    assert run.returncode == 3
    assert "SDK absent" in run.stderr
    assert "pip install rebel-compiler optimum-rbln==0.12.0" in run.stderr
    assert not (out / "compiled").exists()
    monkeypatch.setenv(target.PYTHON, sys.executable)
    with pytest.raises(GoriError, match=r"compiling for ATOM-Max failed with exit 3 .*: nothing was written"):
        export(source, tmp_path / "out")
    monkeypatch.setenv(target.PYTHON, str(tmp_path / "none"))
    with pytest.raises(GoriError, match=r"GORI_RBLN_PYTHON names .*none, which does not run"):
        export(source, tmp_path / "other")


@pytest.mark.skipif(target.sdk_python() is None, reason="needs Rebellions' SDK (rebel-compiler), which is not public")
def test_with_the_sdk_the_same_export_compiles(exported: Exported) -> None:
    for case in CASES:
        _, out = exported(case)
        report = json.loads((out / "report.json").read_text())
        assert report["compiled"]
        assert {"prefill.rbln", "decoder_batch_1.rbln", "rbln_config.json"} <= set(report["compiled_files"])


RBLN_PACKAGES = (
    ("torch==2.13.0+cpu",),
    ("transformers==5.15.1", "tokenizers==0.22.1", "accelerate", "diffusers==0.38.0", "numpy"),
    ("--no-deps", f"optimum-rbln=={target.OPTIMUM_RBLN}"),
)


@pytest.fixture(scope="session")
def rbln_python(request: pytest.FixtureRequest) -> Path:
    """An environment with optimum-rbln, made once; the audio and video packages that it names are left out."""
    cache = request.config.cache
    assert cache is not None
    place = Path(os.environ.get("GORI_RBLN_ENV") or cache.mkdir("rbln") / f"env-{target.OPTIMUM_RBLN}")
    python = place / "bin" / "python"
    if not (place / "complete").exists():
        venv.create(place, with_pip=True, clear=True)
        for packages in RBLN_PACKAGES:
            run = subprocess.run(
                [str(python), "-m", "pip", "install", "-q", *packages], capture_output=True, text=True, check=False
            )
            if run.returncode:
                pytest.skip(f"{packages} cannot be installed: {run.stderr.strip().splitlines()[-1]}")
        (place / "complete").write_text("")
    return python


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_real_optimum_rbln_takes_the_checkpoint_and_computes_the_students_logits(
    case: str, exported: Exported, rbln_python: Path, tmp_path: Path
) -> None:
    source, out = exported(case)
    ids = np.random.default_rng(0).integers(0, 200, 100)
    np.save(tmp_path / "ids.npy", ids)
    script = Path(__file__).with_name("rbln_contract.py")
    command = [str(rbln_python), str(script), str(out), ops.__file__, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "compiler calls 2 devices {1}" in run.stdout
    assert {"prefill.rbln", "decoder_batch_1.rbln"} <= {p.name for p in (tmp_path / "compiled").iterdir()}
    with torch.inference_mode():
        want = checks.decoder_of(read_weights(source), carried=True)(torch.tensor([ids.tolist()]))[0, 95:].numpy()
    # a float checkpoint is loaded, and computed, in float16
    bound = 1e-5 if read_weights(source).integers else 4 * 2**-11
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), want, atol=bound * np.abs(want).max())


@pytest.mark.slow
def test_an_export_compiles_in_the_interpreter_that_has_the_sdk(
    exported: Exported, rbln_python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The SDK is the contract's stub: what is shown is that the command calls it and says what it wrote."""
    (tmp_path / "sitecustomize.py").write_text(
        f"import pathlib, rbln_contract; rbln_contract.install_stub(pathlib.Path({ops.__file__!r}))"
    )
    python = tmp_path / "python"
    paths = f"{tmp_path}:{Path(__file__).parent}"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{paths}" exec "{rbln_python}" "$@"\n')
    python.chmod(0o755)
    monkeypatch.setenv(target.PYTHON, str(python))
    source, _ = exported("llama, shared int4 table, rope scaling")
    report = json.loads((export(source, tmp_path / "out", backend="batch=2+1") / "report.json").read_text())
    assert (report["compiled"], report["executed_on_npu"]) == (True, False)
    wanted = {"prefill.rbln", "decoder_batch_1.rbln", "decoder_batch_2.rbln", "rbln_config.json"}
    assert wanted <= set(report["compiled_files"])
    asked = json.loads((tmp_path / "out" / "compiled" / "rbln_config.json").read_text())
    assert (asked["batch_size"], asked["decoder_batch_sizes"]) == (2, [2, 1])
    assert asked["quantization"]["weights"] == "int4"
