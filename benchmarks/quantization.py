"""How much of what round-to-nearest loses each method gives back: KL and perplexity on rows that no method saw.

    python benchmarks/quantization.py CHECKPOINT --schemes w4a8-g32,w4a16-g32 --methods mse,gptq,tune,qat --seeds 0,1,2

Prints one line for each scheme, method and seed, and writes JSON with --out. The share of the gap is
(rtn - method) / rtn for KL and (rtn - method) / (rtn - float) for the log of perplexity, with a 95 % interval from a
bootstrap over rows (all three models on the same drawn rows).
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gori import checkpoint, quantized
from gori.quantize import calibration
from gori.quantize.fidelity import Fidelity, Reference
from gori.quantize.methods import method, options
from gori.quantize.stage import frozen, run, with_floats
from gori.tokenizer import Tokenizer

RESAMPLES = 2000


def by_row(found: Fidelity, values: torch.Tensor) -> np.ndarray:
    """Sums over each row's tokens."""
    return np.bincount(found.rows_N.numpy(), weights=values.double().numpy())


def shares(rtn: Fidelity, other: Fidelity, seed: int = 0) -> dict[str, Any]:
    """Recovered shares of the KL and of the perplexity gap with their intervals."""
    kl = [by_row(f, f.kl_N) for f in (rtn, other)]
    nll = [by_row(f, f.nll_N) for f in (rtn, other)]
    plain = by_row(rtn, rtn.nll_float_N)
    draws = np.random.default_rng(seed).integers(0, len(plain), (RESAMPLES, len(plain)))
    every = np.concatenate((np.arange(len(plain))[None], draws))
    kl_rtn, kl_other, nll_rtn, nll_other, nll_float = (v[every].sum(1) for v in (*kl, *nll, plain))
    found: dict[str, Any] = {}
    for name, top, bottom in (
        ("kl", kl_rtn - kl_other, kl_rtn),
        ("perplexity", nll_rtn - nll_other, nll_rtn - nll_float),
    ):
        with np.errstate(divide="ignore", invalid="ignore"):
            share = top / bottom
        low, high = np.quantile(share[1:][np.isfinite(share[1:])], (0.025, 0.975))
        # a gap whose sign is not sure has no share
        sure = bool((bottom[1:] > 0).mean() > 0.975)
        found[name] = {"share": float(share[0]), "low": float(low), "high": float(high), "gap_is_sure": sure}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--schemes", default="w4a8-g32,w4a16-g32")
    parser.add_argument("--embedding", default="w8-channel")
    parser.add_argument("--methods", default="mse,hqq,gptq,tune,qat")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--rows", type=int, default=1500, help="held-out rows (test split)")
    parser.add_argument("--option", action="append", default=[])
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = frozen(checkpoint.load(a.checkpoint, mapped=True)), Tokenizer.load(a.checkpoint)
    files, longest = calibration.beside(a.checkpoint), model.cfg.max_position
    train, test = (calibration.read_rows(files[k], files["tools"][0]) for k in ("train", "test"))
    reference = Reference(model, calibration.sample(test, tokenizer, a.rows, longest, seed=1).batches)
    lines = []

    def measure(scheme: str, name: str, seed: int) -> tuple[Fidelity, float]:
        how = method(name)
        sample = calibration.sample(train, tokenizer, a.samples, longest, seed)
        chosen = options(how, [o for o in a.option if o.split(".")[0] in how.steps])
        began = time.process_time()
        made = run(model, scheme, a.embedding, how, chosen, sample, seed)
        spent = time.process_time() - began
        return reference.compare(quantized.apply(with_floats(made.model, {}), made.tensors, made.spec)), spent

    for scheme in a.schemes.split(","):
        rtn, _ = measure(scheme, "rtn", 0)
        for name in a.methods.split(","):
            for seed in map(int, a.seeds.split(",")):
                found, spent = measure(scheme, name, seed)
                line = {"scheme": scheme, "method": method(name).name, "seed": seed, "core_s": round(spent, 1)}
                line |= {"kl_mean": found.kl_mean, "kl_mean_rtn": rtn.kl_mean, **shares(rtn, found)}
                line |= {"perplexity_ratio": float((found.nll_N.mean() - rtn.nll_float_N.mean()).exp())}
                line |= {"top1": found.summary()["top1"], "rows": a.rows}
                lines.append(line)
                shown = "  ".join(
                    f"{k} {line[k]['share']:+.2f} [{line[k]['low']:+.2f}, {line[k]['high']:+.2f}]"
                    + ("" if line[k]["gap_is_sure"] else " (gap within noise)")
                    for k in ("kl", "perplexity")
                )
                head = f"{scheme:<14}{line['method']:<16} seed {seed}  KL {found.kl_mean:.2e}"
                print(f"{head}  {shown}  {spent:.0f} core-s", flush=True)
    print(f"peak RSS {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")
    if a.out:
        a.out.write_text(json.dumps(lines, indent=1) + "\n")


if __name__ == "__main__":
    main()
