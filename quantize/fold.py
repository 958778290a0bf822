"""Factors on the inputs of linears, folded into the weights that make those inputs: the network computes the same
function, and no operation is added. Also the walk in which a method proposes factors and the least error chooses.

Knows nothing of how a method proposes them. Shapes in names: B rows, T tokens, N tokens that count, I inputs and O
outputs of a linear, K key/value heads, H query heads of each, d head width, D model width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from gori import console
from gori.model import Attention, Block, Decoder, ModelConfig
from gori.quantize.blocks import SITES, Stream, blocks, dense, kept, linear, weight_name
from gori.quantize.calibration import Batch
from gori.quantize.layout import weight_of
from gori.quantize.rtn import METHODS, round_to_nearest
from gori.quantized import HEAD, Quantization, QuantizedLinear, TensorScheme, quantizable

TOKENS = 4096
"""Tokens of whole calibration rows, evenly spread, on which errors are measured: time is in proportion, and a site's
choice is one or two numbers."""
HEAD_ROWS = 4096
"""Rows of a head, evenly spread over the vocabulary, on which its error is measured."""


def copied(model: Decoder) -> Decoder:
    """A dense decoder of the same weights for a transform to change; GoriError for a mixture of experts."""
    quantizable(model)
    new = copy.deepcopy(model)
    for p in new.parameters():
        p.requires_grad_(False)
    return new


def untie(model: Decoder) -> nn.Linear:
    """The head as a linear of its own, in place: the copy of a tied table, and `cfg.tied` false."""
    if model.cfg.tied:
        table = model.head.weight
        assert isinstance(table, Tensor)
        head = nn.Linear(model.cfg.hidden_size, model.cfg.vocab_size, bias=False, device="meta")
        head.weight = nn.Parameter(table.detach().clone(), requires_grad=table.requires_grad)
        model.lm_head, model.cfg = head, replace(model.cfg, tied=False)
    assert isinstance(model.lm_head, nn.Linear)
    return model.lm_head


def common(cfg: ModelConfig, factor_I: Tensor) -> Tensor:
    """Factors of `o_proj`'s inputs that a value head can carry: all query heads that read one value head get the
    geometric mean of theirs."""
    by_head = factor_I.log().view(cfg.kv_heads, -1, cfg.head_dim)
    return by_head.mean(1, keepdim=True).expand_as(by_head).exp().reshape(-1)


def divide_rows(made: nn.Linear, factor_O: Tensor) -> None:
    """Divide a linear's outputs, its bias among them, in place."""
    made.weight.div_(factor_O.unsqueeze(1))
    if made.bias is not None:
        made.bias.div_(factor_O)


@torch.no_grad()
def scale_inputs(block: Block, site: int, factor_I: Tensor) -> None:
    """Multiply the input columns of a site's linears (SITES) by positive factors, and divide by the same what makes the
    inputs, in place: a norm's weight, the rows and bias of `v_proj`, or the rows of `up_proj`.

    For `o_proj` the factors must be equal for all query heads of a value head (see `common`).
    """
    for name in SITES[site]:
        linear(block, name).weight.mul_(factor_I)
    attention = block.self_attn
    if site == 0:
        block.input_layernorm.weight.div_(factor_I)
    elif site == 1:
        assert isinstance(attention, Attention)
        cfg = attention.cfg
        heads_KHd = factor_I.view(cfg.kv_heads, -1, cfg.head_dim)
        assert torch.equal(heads_KHd, heads_KHd[:, :1].expand_as(heads_KHd)), "query heads that share a value head"
        divide_rows(attention.v_proj, heads_KHd[:, 0].reshape(-1))
    elif site == 2:
        block.post_attention_layernorm.weight.div_(factor_I)
    else:
        divide_rows(linear(block, "mlp.up_proj"), factor_I)


@torch.no_grad()
def scale_head_inputs(model: Decoder, factor_D: Tensor) -> None:
    """Multiply the head's columns by positive factors and divide the final norm's weight, in place. A tied head gets a
    weight of its own."""
    untie(model).weight.mul_(factor_D)
    model.norm.weight.div_(factor_D)


@dataclass
class Seen:
    """Linears with one input in common and what they met: what a method may look at to propose factors."""

    inputs: list[Tensor]
    """`[B, T, I]` for each batch, float32."""
    valid: list[Tensor]
    """bool `[B, T]`: the tokens that count."""
    linears: list[nn.Linear]
    schemes: list[TensorScheme | None]
    """How each weight will be held; None: as it is."""
    compute: Callable[[Sequence[nn.Module], Tensor], Tensor]
    """What the network's next sum gets, `[B, T, O]`, from modules in place of the linears and from their input."""

    def __post_init__(self) -> None:
        self._wanted = [self.compute(self.linears, x)[v] for x, v in zip(self.inputs, self.valid, strict=True)]

    @property
    def x_NI(self) -> Tensor:  # noqa: N802 (a tensor's shape)
        """The inputs that count."""
        return torch.cat([x[v] for x, v in zip(self.inputs, self.valid, strict=True)])

    def error(self, factor_I: Tensor) -> float:
        """Squared error of what is computed over its squares: weights times factors, rounded with searched portable
        scales, on inputs over factors, rounded per token where a scheme has 8-bit activations."""
        trial = [_held(m, s, factor_I) for m, s in zip(self.linears, self.schemes, strict=True)]
        error = power = 0.0
        for x, v, wanted_NO in zip(self.inputs, self.valid, self._wanted, strict=True):
            error += float((self.compute(trial, x / factor_I)[v] - wanted_NO).square_().sum())
            power += float(wanted_NO.square().sum())
        return error / (power or 1.0)

    def best(self, proposals: Iterable[Tensor]) -> Tensor:
        """The factors with the least error; none at all (ones) where no proposal has less."""
        best = torch.ones(self.inputs[0].shape[-1])
        least = self.error(best)
        for tried in proposals:
            error = self.error(tried)
            if error < least:
                best, least = tried, error
        return best


def _held(m: nn.Linear, s: TensorScheme | None, factor_I: Tensor) -> nn.Module:
    """A linear with factors on its inputs, as its scheme will hold it."""
    weight = m.weight.detach() * factor_I
    if s is not None:
        return QuantizedLinear(round_to_nearest(weight, s, factors=METHODS["mse"]), m.bias)
    plain = nn.Linear(*reversed(weight.shape), bias=False, device="meta")
    plain.weight, plain.bias = nn.Parameter(weight, requires_grad=False), m.bias
    return plain


def log_level(size_I: Tensor) -> Tensor:
    """Logarithms of sizes >= 0 about their mean. Channels of no size, which no factor helps or harms, count as a
    ten-thousandth of the largest."""
    log_I = size_I.clamp(min=1e-4 * float(size_I.max()) or 1.0).log()
    return log_I - log_I.mean()


Propose = Callable[[Seen], Iterable[Tensor]]
"""What a method is: positive float32 factors `[I]` to try for some linears."""


def thinned(batches: Sequence[Batch]) -> list[Batch]:
    """Rows of TOKENS tokens or somewhat less or more, evenly spread (all rows, where they have no more)."""
    step, start, found = -(-sum(int(b.valid_BT.sum()) for b in batches) // TOKENS), 0, []
    for b in batches:
        kept_rows = slice(-start % step, None, step)
        start += len(b.rows_B)
        few = Batch(b.ids_BT[kept_rows], b.valid_BT[kept_rows], b.answer_BT[kept_rows], b.rows_B[kept_rows])
        found += [few] if len(few.rows_B) else []
    return found


@torch.no_grad()
def folded(
    model: Decoder, batches: Sequence[Batch], spec: Quantization, propose: Propose, title: str, on_disk: Path | None
) -> Decoder:
    """A new decoder of the same function, with the best of the proposed factors at every site (and at the head, where
    the layout has that as a weight of its own) for the schemes of a layout. Sites that stay float get none.

    Errors are measured where a site reaches the residual stream: for queries, keys and values after attention, for gate
    and up after the MLP, all else in float. Of the queries' and keys' own outputs the error says little: a softmax
    follows. Holds the new weights, a float copy of one block, one site's rounded weights and the activations of TOKENS
    tokens (with `on_disk` in mapped files).
    """
    new, few = copied(model), thinned(batches)
    with kept(on_disk) as place, console.steps(title, len(new.layers)) as bar:
        stream = Stream(model, few, place)
        for layer, block in enumerate(blocks(model)):
            trial = copy.deepcopy(block).float()
            for site, names in enumerate(SITES):
                stream.advance(block, site)
                schemes = [spec.tensors.get(weight_name(layer, name)) for name in names]
                if not any(schemes):
                    continue
                seen = _seen(model, trial, site, schemes, [x.float() for x in stream.inputs], few)
                tried = (common(model.cfg, f) if site == 1 else f for f in propose(seen))
                changed = new.layers[layer]
                assert isinstance(changed, Block)
                scale_inputs(changed, site, seen.best(tried))
            stream.leave(block)
            bar.update(layer + 1, "")
        if HEAD in spec.tensors:
            hidden = [model.norm(x).float() for x in stream.residual]
            scale_head_inputs(new, _best_of_head(model, spec.tensors[HEAD], propose, hidden, few))
    return new


def _seen(
    model: Decoder, trial: Block, site: int, schemes: list[TensorScheme | None], x: list[Tensor], few: list[Batch]
) -> Seen:
    """A site of a block that may be changed meanwhile; afterwards it is what it was."""
    linears = [linear(trial, name) for name in SITES[site]]
    attention, mlp = trial.self_attn, dense(trial)

    def compute(modules: Sequence[nn.Module], x_BTI: Tensor) -> Tensor:
        for name, module in zip(SITES[site], modules, strict=True):
            trial.set_submodule(name, module)
        if site == 0:
            cos, sin = model.rope(torch.arange(x_BTI.shape[1]).unsqueeze(0))
            y_BTO = attention.o_proj(attention(x_BTI, (cos.to(x_BTI.dtype), sin.to(x_BTI.dtype)), None, None))
        else:
            y_BTO = (attention.o_proj, mlp, mlp.down_proj)[site - 1](x_BTI)
        for name, module in zip(SITES[site], linears, strict=True):
            trial.set_submodule(name, module)
        return y_BTO

    return Seen(x, [b.valid_BT for b in few], linears, schemes, compute)


def _best_of_head(model: Decoder, s: TensorScheme, propose: Propose, hidden: list[Tensor], few: list[Batch]) -> Tensor:
    """Factors for the head by the error of its logits (HEAD_ROWS of them) where something is said."""
    weight = weight_of(model, HEAD)
    weight = weight[:: -(-len(weight) // HEAD_ROWS)].float()
    head = nn.Linear(*reversed(weight.shape), bias=False, device="meta")
    head.weight = nn.Parameter(weight, requires_grad=False)
    said = [x[b.answer_BT].unsqueeze(0) for x, b in zip(hidden, few, strict=True)]
    everywhere = [torch.ones(x.shape[:2]) > 0 for x in said]
    seen = Seen(said, everywhere, [head], [s], lambda modules, x: modules[0](x))
    return seen.best(propose(seen))
