"""Time and extra memory of the chunked linear-KL loss against the plain one: logits whole, gradients by autograd.

    python benchmarks/losses.py --tokens 8192 --vocabulary 131072 --width 512 --rounds 3

Every measurement is a process of its own, the variants in turn: loss, forward and backward once to warm up (not with
--cold), then once measured. Extra memory is the peak resident size over what the process held before (inputs
included). The plain loss of 8,192 tokens and 128k entries needs some 18 GB. liger-kernel's losses are Triton kernels:
they are measured where a GPU and the package are there, and said to be missing where not.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from gori.distill.losses import distillation_loss, sparse_loss

Loss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def plain(h: Tensor, W: Tensor, th: Tensor, tW: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        p = (th @ tW.T).log_softmax(-1)
    return torch.nn.functional.kl_div((h @ W.T).log_softmax(-1), p, log_target=True, reduction="batchmean")


def chunked(h: Tensor, W: Tensor, th: Tensor, tW: Tensor, y: Tensor) -> Tensor:
    return distillation_loss(h, W, th, tW, y, {"forward_kl": 1.0})[0]


def compiled(h: Tensor, W: Tensor, th: Tensor, tW: Tensor, y: Tensor) -> Tensor:
    return distillation_loss(h, W, th, tW, y, {"forward_kl": 1.0}, compiled=True)[0]


def cached(h: Tensor, W: Tensor, th: Tensor, tW: Tensor, y: Tensor) -> Tensor:
    ids = (y.unsqueeze(1) + torch.arange(12)) % len(W)
    return sparse_loss(h, W, ids, torch.full(ids.shape, 1 / 12), y, {"forward_kl": 1.0})[0]


def plain_ce(h: Tensor, W: Tensor, th: Tensor, tW: Tensor, y: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(h @ W.T, y)


def liger(h: Tensor, W: Tensor, th: Tensor, tW: Tensor, y: Tensor) -> Tensor:
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDFunction  # pyright: ignore

    return LigerFusedLinearJSDFunction.apply(h, W, th, tW, y, None, None, 0.0, 1.0, 0.0)


VARIANTS: dict[str, Loss] = {
    "plain": plain,
    "chunked": chunked,
    "compiled": compiled,
    "12 entries": cached,
    "plain ce": plain_ce,
    "liger": liger,
}


def resident_bytes(field: str = "VmRSS") -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


class Peak:
    """The largest resident size from now on; the kernel's own peak cannot be reset without rights, so it is sampled."""

    def __init__(self) -> None:
        self.bytes, self._stop = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self.bytes = max(self.bytes, resident_bytes())

    def end(self) -> int:
        self._stop.set()
        self._thread.join()
        return max(self.bytes, resident_bytes())


def measure(name: str, tokens: int, vocabulary: int, width: int, teacher_width: int, warm: bool) -> dict[str, float]:
    """One measurement in this process."""
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    g = torch.Generator().manual_seed(0)
    h, W = torch.randn(tokens, width, generator=g), torch.randn(vocabulary, width, generator=g) * width**-0.5
    th, tW = (
        torch.randn(tokens, teacher_width, generator=g),
        torch.randn(vocabulary, teacher_width, generator=g) * teacher_width**-0.5,
    )
    y = torch.randint(0, vocabulary, (tokens,), generator=g)
    h, W, th, tW, y = (t.to(device) for t in (h, W, th, tW, y))
    h.requires_grad_(), W.requires_grad_()
    if warm:
        few = tokens // 16
        VARIANTS[name](h[:few].detach().requires_grad_(), W, th[:few], tW, y[:few]).backward()
        W.grad = None
    before, peak, began = resident_bytes(), Peak(), time.monotonic()
    value = VARIANTS[name](h, W, th, tW, y)
    value.backward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    spent = time.monotonic() - began
    extra = torch.cuda.max_memory_allocated() if device.type == "cuda" else peak.end() - before
    assert h.grad is not None
    return {"seconds": spent, "extra_bytes": extra, "loss": value.item(), "gradient": float(h.grad.norm())}


def missing(name: str) -> str | None:
    """Why a variant cannot run here."""
    if name == "liger" and importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed"
    if name == "liger" and not torch.cuda.is_available():
        return "its kernels are Triton's and need a GPU"
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--vocabulary", type=int, default=131072)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--teacher-width", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--variants", default="plain,chunked,liger")
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.one:
        found = measure(a.one, a.tokens, a.vocabulary, a.width, a.teacher_width, not a.cold)
        print(json.dumps(found | {"peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))
        return
    results: dict[str, list[dict[str, float]]] = {}
    for name in a.variants.split(","):
        if why := missing(name):
            print(f"{name}: not measured, {why}")
        else:
            results[name] = []
    for _ in range(a.rounds):
        for name in results:
            done = subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], "--one", name], capture_output=True, text=True
            )
            if done.returncode:
                print(f"{name}: failed with {done.returncode}: {done.stderr.strip()[-300:]}")
                continue
            results[name].append(json.loads(done.stdout.splitlines()[-1]))
    reference = next((rows for rows in results.values() if rows), None)
    if reference is None:
        sys.exit("nothing was measured")
    middle = lambda rows, key: statistics.median(r[key] for r in rows)  # noqa: E731
    print(f"{a.tokens} tokens, {a.vocabulary} entries, widths {a.width} and {a.teacher_width}, one thread")
    print("| variant | seconds | × | extra MiB | share | loss | gradient |\n|---|---|---|---|---|---|---|")
    for name, rows in results.items():
        if not rows:
            continue
        s, extra = middle(rows, "seconds"), middle(rows, "extra_bytes")
        ratio, share = s / middle(reference, "seconds"), extra / middle(reference, "extra_bytes")
        tail = f"{rows[0]['loss']:.5f} | {rows[0]['gradient']:.4e}"
        print(f"| {name} | {s:.2f} | {ratio:.2f} | {extra / 2**20:.0f} | {share:.3f} | {tail} |")
    if a.out:
        a.out.write_text(json.dumps({"settings": vars(a) | {"out": str(a.out)}, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
