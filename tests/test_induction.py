"""The copying circuit works before any training: random text said twice is continued from its first time."""

from __future__ import annotations

import pytest
import torch

from gori.errors import GoriError
from gori.induction import start_with_induction
from gori.model import Decoder, ModelConfig

VOCABULARY, SAID = 500, 20


def config(kind: str, **changes: int) -> ModelConfig:
    moe = {"experts": 4, "experts_per_token": 2} if kind == "qwen3_moe" else {}
    shape = {"hidden_size": 128, "layers": 3, "heads": 4, "kv_heads": 4, "head_dim": 32, "intermediate_size": 64}
    return ModelConfig(kind=kind, vocab_size=VOCABULARY, rope_theta=1e6, **{**shape, **moe, **changes})  # type: ignore[arg-type]


def copied(model: Decoder) -> float:
    """Share of tokens that are the first guess when 20 distinct random tokens are said again; chance is 1/500."""
    g = torch.Generator().manual_seed(1)
    said = torch.stack([torch.randperm(VOCABULARY, generator=g)[:SAID] for _ in range(40)])
    with torch.no_grad():
        guess = model.eval()(torch.cat((said, said), dim=1)).argmax(-1)
    return (guess[:, SAID:-1] == said[:, 1:]).float().mean().item()


CASES = {
    **{kind: config(kind) for kind in ("qwen3", "llama", "qwen2", "qwen3_moe")},
    "qwen3, shared key/value heads": config("qwen3", heads=8),
    "qwen3, as narrow as can be": config("qwen3", hidden_size=64),
}


@pytest.mark.parametrize("case", CASES)
def test_untrained_weights_with_the_circuit_copy_and_random_ones_do_not(case: str) -> None:
    cfg = CASES[case]
    assert copied(Decoder(cfg).initialise(torch.Generator().manual_seed(0))) < 0.05
    g = torch.Generator().manual_seed(0)
    assert copied(start_with_induction(Decoder(cfg).initialise(g), g)) > 0.25


def test_one_layer_cannot_hold_the_circuit() -> None:
    with pytest.raises(GoriError, match="induction needs 2 layers and the model has 1"):
        start_with_induction(Decoder(config("qwen3", layers=1)), torch.Generator())


def test_a_model_too_narrow_for_the_circuit_is_refused() -> None:
    with pytest.raises(GoriError, match=r"induction needs a hidden_size of 2 \* head_dim = 64, got 48"):
        start_with_induction(Decoder(config("qwen3", hidden_size=48)), torch.Generator())
