"""Gates learn from the attention of a model that stays as it is (SeerAttention, card 22).

    prompts    L = mean of G (log G - log softmax S)      over rows n / 4 ... n of blocks; summed over layers
    decoding   L = mean of R (log R - log softmax S)      over tokens T / 2 ... T; R the maximum over a group, rows sum to 1

G, R are the true maps (`truth.py`), S the gate's scores. Gates are trained on 10 L; to fine-tune the model with them, add
that to its own loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from heed.catalogue import provides
from heed.engine.attend import attend
from heed.engine.patterns import Causal
from heed.hosts.attach import attach_rule
from heed.hosts.rules import AttentionCall
from heed.language.seer.decode import DecodeGate
from heed.language.seer.gate import AttnGate
from heed.language.seer.gates import SeerGates
from heed.language.seer.inputs import GateInputs
from heed.language.seer.pooling import Tables
from heed.language.seer.truth import pooled_truth, row_maxima
from heed.language.spans import Span
from heed.language.sparse import SpanRule
from heed.methods import Handle, Method, apply


@provides("22-seerattention")
def gate_loss(
    scores: Float[Tensor, "B H m n"], truth: Float[Tensor, "B H m n"], skip: int
) -> tuple[Float[Tensor, ""], int]:
    """The sum of G (log G - log softmax S) without the first `skip` rows, and how many elements it is over."""
    scores, truth = scores[:, :, skip:], truth[:, :, skip:]
    return F.kl_div(scores.float().log_softmax(-1), truth, reduction="sum"), truth.numel()


@provides("22-seerattention")
def decode_truth(
    q: Float[Tensor, "B H Q D"], k: Float[Tensor, "B G K D"], *, block: int = 64, scale: float | None = None
) -> Float[Tensor, "B G Q n"]:
    """What the gate for decoding learns: the maxima of a group's rows over the blocks before the token's, summing to 1.

    Arguments as in `pooled_truth`. Tokens of the first block have none before theirs: their rows are 0.
    """
    queries, keys = q.shape[2], k.shape[2]
    maxima = row_maxima(q, k, block=block, scale=scale).unflatten(1, (k.shape[1], -1)).amax(2)
    own = torch.arange(keys - queries, keys, device=q.device)[:, None] // block
    maxima = maxima.masked_fill(torch.arange(maxima.shape[-1], device=q.device) >= own, 0)
    return maxima / (maxima.sum(-1, keepdim=True) + 1e-9)


@provides("22-seerattention")
@dataclass(frozen=True)
class GateDistillation(Method):
    """Attention of the model as it is, and beside it the loss of its gates.

        with heed.apply(model, GateDistillation(gates)) as handle:
            loss = model(ids, labels=ids).loss + 10 * handle.state.loss()      # fine-tuning both
            loss.backward()

    The loss reaches queries and keys of the model where they are part of a graph, as the authors have it; freeze the model,
    or run it under `torch.no_grad()`, to train the gates alone, as `distill` does. Padding does not count.

    Args:
        gates: for prompts or for decoding.
        slice_ratio: fraction of a text's tokens, the first ones, that gates for decoding do not learn from.
    """

    gates: SeerGates
    slice_ratio: float = 0.5

    def attach(self, host: nn.Module, handle: Handle) -> DistillationState:
        layers = self.gates.check(host)
        state = DistillationState()
        attach_rule(host, _DistillationRule(self, state, GateInputs(host, layers, handle)), handle, layers)
        return state


@dataclass(frozen=True, eq=False)
class _Part:
    """The loss of some rows of a batch: its sum, and what it is over. `texts` is 0 for prompts."""

    total: Tensor
    rows: int
    columns: int
    texts: int


def _mean(parts: list[_Part]) -> Tensor:
    """Over all elements for prompts; for decoding over texts, each one's rows, and the columns of the longest."""
    if not parts[0].texts:
        return torch.stack([part.total for part in parts]).sum() / sum(part.rows * part.columns for part in parts)
    widest, texts = max(part.columns for part in parts), sum(part.texts for part in parts)
    return torch.stack([part.total / part.rows * part.texts for part in parts]).sum() / (widest * texts)


class DistillationState:
    """Losses of the layers at the model's last call.

    Attributes:
        keep: set it True to keep the maps below, for looking at them.
        scores, truths: per layer the gate's scores and the true map of the last call; with padding, of its last rows.
    """

    def __init__(self) -> None:
        self.keep = False
        self.scores: dict[int, Tensor] = {}
        self.truths: dict[int, Tensor] = {}
        self._parts: dict[int, list[_Part]] = {}

    def losses(self) -> dict[int, Tensor]:
        """The loss of every layer."""
        return {layer: _mean(parts) for layer, parts in self._parts.items() if parts}

    def loss(self) -> Float[Tensor, ""]:
        """The sum of the layers' losses; to be multiplied by 10 for training, as the authors do.

        Raises:
            RuntimeError: the model was not called.
        """
        losses = self.losses()
        if not losses:
            raise RuntimeError("the model was not called since its gates were attached, so they have no loss")
        return torch.stack(list(losses.values())).sum()


class _DistillationRule(SpanRule):
    def __init__(self, method: GateDistillation, state: DistillationState, inputs: GateInputs) -> None:
        super().__init__()
        self.method, self.state, self.inputs = method, state, inputs

    def core(self, call: AttentionCall) -> Tensor | None:
        self.state._parts[call.layer] = []
        out = super().core(call)
        self.inputs.forget(call.layer)
        return out

    def attend(self, call: AttentionCall, span: Span) -> Tensor:
        gate = self.method.gates[call.layer]
        q, k, v = span.queries(call.query), span.keys(call.key), span.keys(call.value)
        offset = k.shape[2] - q.shape[2]
        values = v if not _graph(q, k, v) else None
        options = {"block": gate.block, "scale": call.scale}
        if isinstance(gate, DecodeGate):
            truth, out = decode_truth(q, k, **options), None
        else:
            truth, out = pooled_truth(q, k, values, **options)  # type: ignore[call-overload]
        before = self.inputs(call, span)
        with torch.enable_grad():
            scores, part = _loss(gate, before, truth, self.method.slice_ratio)
        self.state._parts[call.layer].append(part)
        if self.state.keep:
            self.state.scores[call.layer], self.state.truths[call.layer] = scores.detach(), truth
        return attend(q, k, v, Causal(offset), scale=call.scale, dropout=call.dropout) if out is None else out


def _graph(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _loss(
    gate: AttnGate | DecodeGate, before: tuple[Tensor, Tensor, Tables | None], truth: Tensor, ratio: float
) -> tuple[Tensor, _Part]:
    """A gate's scores, and the loss of them."""
    q, k, tables = before
    if isinstance(gate, DecodeGate):
        scores, skip, texts = gate(q, k, tables), int(q.shape[2] * ratio), len(q)
    else:
        starts = None if tables is None else (tables[0][:, :: gate.block], tables[1][:, :: gate.block])
        scores, skip, texts = gate(q, k, starts), truth.shape[2] // 4, 0
    total, elements = gate_loss(scores, truth, skip)
    columns = truth.shape[3]
    return scores, _Part(total, elements // columns, columns, texts)


@provides("22-seerattention")
def distill(
    host: nn.Module,
    gates: SeerGates,
    batches: Iterable[Tensor | Mapping[str, Tensor]],
    *,
    steps: int,
    lr: float = 1e-3,
    warmup: int = 20,
    loss_scale: float = 10.0,
    after: Callable[[int, float], object] | None = None,
) -> list[float]:
    """Train gates on a model that stays as it is: AdamW without weight decay, warm-up and then a cosine to 0.

    The authors take 500 steps of 16 texts of 64k tokens; with a few hundred steps of what fits into memory gates of small
    models are useful.

    Args:
        host: the model. It is run without gradient, and without its head.
        gates: trained in place, in their own dtype; float32 is best.
        batches: token ids (B, T), or the model's inputs; the first `steps` of them.
        steps: how many.
        lr: the highest learning rate.
        warmup: steps until it is reached.
        loss_scale: factor on the loss.
        after: called after every step with its number and loss; the host is then as it was.

    Returns:
        The loss of every step, summed over layers and not scaled.

    Raises:
        ValueError: fewer batches than steps, or gates of another model.
    """
    optimiser = torch.optim.AdamW(gates.parameters(), lr, weight_decay=0)
    ramp = torch.optim.lr_scheduler.LinearLR(optimiser, 1 / (warmup + 1), total_iters=warmup)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(1, steps - warmup))
    schedule = torch.optim.lr_scheduler.SequentialLR(optimiser, [ramp, cosine], [warmup])
    losses: list[float] = []
    runner = getattr(host, "base_model", host)
    for step, batch in zip(range(steps), batches, strict=False):
        inputs = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
        with apply(host, GateDistillation(gates)) as handle:
            with torch.no_grad():
                runner(**inputs, use_cache=False)
            loss = handle.state.loss()
        optimiser.zero_grad()
        (loss_scale * loss).backward()
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
        if after is not None:
            after(step, losses[-1])
    if len(losses) < steps:
        raise ValueError(f"{len(losses)} batches are fewer than steps={steps}; give more of them")
    return losses
