"""The Session contract: chunks, contexts, prefixes and refusals, on a counted engine and on the eager one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from gori import checkpoint, quantized
from gori.errors import GoriError
from gori.model import Decoder, ModelConfig
from gori.quantize.rtn import rtn
from gori.runtime.session import Logits, Session, SessionInfo, Snapshot, open_session

CONFIG = ModelConfig(
    kind="llama", vocab_size=61, hidden_size=32, layers=2, heads=4, kv_heads=2, head_dim=8, intermediate_size=32,
    max_position=24, init_std=0.2,
)  # fmt: skip


class CountedSession(Session):
    """An engine that remembers its calls and gives the cache's content as logits."""

    def __init__(self) -> None:
        super().__init__()
        self.info = SessionInfo("counted", "0", "", 61, 10, 4, None, (), 1, 0)
        self.calls: list[tuple[list[int], int]] = []
        self.cache = [0] * 10

    def _run(self, ids: Sequence[int], start: int) -> Logits:
        assert len(ids) <= self.info.chunk
        self.calls.append((list(ids), start))
        self.cache[start : start + len(ids)] = ids
        return np.array(self.cache[: start + len(ids)], dtype=np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("checkpoint")
    model = Decoder(CONFIG).initialise(torch.Generator().manual_seed(0)).eval()
    tensors, spec = rtn(model, "w8a8-channel")
    quantized.save(model, tensors, spec, out)
    (out / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": [2, 3]}))
    return out


def test_a_prompt_longer_than_a_chunk_is_run_in_chunks_at_their_positions() -> None:
    session = CountedSession()
    assert session.prefill(range(9)).tolist() == list(range(9))
    assert session.calls == [([0, 1, 2, 3], 0), ([4, 5, 6, 7], 4), ([8], 8)]


def test_a_full_context_is_refused_before_anything_is_run_and_the_history_stays() -> None:
    session = CountedSession()
    session.prefill(range(9))
    with pytest.raises(GoriError, match="9 tokens are in the context and 2 more exceed its 10"):
        session.prefill([1, 2])
    assert session.length == 9
    session.decode(5)
    with pytest.raises(GoriError, match="10 tokens are in the context and 1 more exceed its 10"):
        session.decode(5)


@pytest.mark.parametrize(("ids", "message"), [([], "0 tokens"), ([3, 61], "token id 61"), ([-1], "token id -1")])
def test_a_prompt_without_meaning_is_refused(ids: list[int], message: str) -> None:
    with pytest.raises(GoriError, match=message):
        CountedSession().prefill(ids)


def test_going_back_to_a_prefix_of_the_history_computes_nothing() -> None:
    session = CountedSession()
    session.prefill([1, 2, 3])
    prefix = session.snapshot()
    session.prefill([4, 5])
    session.calls.clear()
    session.restore(prefix)
    assert session.calls == []
    assert session.prefill([9]).tolist() == [1, 2, 3, 9]


def test_an_overwritten_prefix_is_computed_again_from_where_it_differs() -> None:
    session = CountedSession()
    session.prefill([1, 2, 3, 4])
    prefix = session.snapshot()
    session.reset()
    session.prefill([1, 2, 7])
    session.calls.clear()
    session.restore(prefix)
    assert session.calls == [([3, 4], 2)]
    assert session.prefill([9]).tolist() == [1, 2, 3, 4, 9]


def test_a_failed_call_does_not_leave_ids_that_the_cache_may_not_hold() -> None:
    session = CountedSession()
    session.prefill([1, 2])
    session.calls = None  # type: ignore[assignment]
    session.reset()
    with pytest.raises(AttributeError):
        session.prefill([5, 6])
    session.calls = []
    session.restore(Snapshot((1, 2)))
    assert session.calls == [([1, 2], 0)]


def test_the_eager_session_gives_the_models_logits(folder: Path) -> None:
    session, model = open_session(folder), quantized.load(folder)
    ids = torch.randint(0, 61, (24,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        want = model(ids.unsqueeze(0))[0].numpy()
    # the same float32 operations on other shapes; int8 activations may round the other way, so only short prefixes
    np.testing.assert_allclose(session.prefill(ids[:3].tolist()), want[2], atol=0.05)
    np.testing.assert_allclose(session.decode(int(ids[3])), want[3], atol=0.05)
    assert session.prefill(ids[4:].tolist()).dtype == np.float32
    with pytest.raises(GoriError, match="exceed its 24"):
        session.decode(0)


def test_the_eager_sessions_prefix_gives_the_same_logits_again(folder: Path) -> None:
    session = open_session(folder)
    session.prefill([5, 6, 7])
    prefix = session.snapshot()
    want = session.decode(8)
    session.prefill([1, 2])
    session.restore(prefix)
    np.testing.assert_array_equal(session.decode(8), want)


def test_what_was_opened_is_told(folder: Path) -> None:
    info = open_session(folder).info
    assert (info.engine, info.vocab_size, info.context, info.bos_id, info.eos_ids) == ("eager", 61, 24, 1, (2, 3))
    assert info.file_bytes == (folder / checkpoint.WEIGHTS).stat().st_size


def test_a_path_that_no_engine_runs_is_refused_with_what_would_be(tmp_path: Path) -> None:
    with pytest.raises(GoriError, match=r"holds nothing that gori runs.*\*\.pte \(executorch\)"):
        open_session(tmp_path)
    with pytest.raises(GoriError, match="0 threads"):
        open_session(tmp_path, threads=0)
    for name in ("a.pte", "b.pte"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(GoriError, match="holds 2 files"):
        open_session(tmp_path)


def test_a_missing_wheel_is_one_sentence_with_the_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "executorch.extension.pybindings._C", None)
    (tmp_path / "model.pte").write_bytes(b"")
    with pytest.raises(GoriError, match=r"pip install 'gori\[executorch\]'"):
        open_session(tmp_path)


def test_importing_the_contract_imports_neither_torch_nor_an_engine() -> None:
    code = "import sys, gori.runtime.session; print(sorted({'torch', 'executorch'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
