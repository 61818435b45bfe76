"""SeerAttention on a language model of transformers: sparse prompts by learned gates, dense decoding (card 22).

prompt      the gate of a layer scores blocks, `BlockChoice` keeps the best, attention visits those
decoding    as without it
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from heed.catalogue import provides
from heed.hosts.attach import attach_rule
from heed.hosts.rules import AttentionCall
from heed.language.seer.attention import block_sparse_attention
from heed.language.seer.gate import AttnGate
from heed.language.seer.gates import GateSettings, SeerGates
from heed.language.seer.inputs import GateInputs
from heed.language.seer.select import BlockChoice, causal_blocks
from heed.language.spans import Span
from heed.language.sparse import SpanRule
from heed.methods import Handle, Method


@provides("22-seerattention")
@dataclass(frozen=True)
class SeerAttention(Method):
    """Attention of prompts over the blocks that gates choose.

        gates = SeerGates(model)
        distill(model, gates, batches, steps=500)
        with heed.apply(model, SeerAttention(gates, BlockChoice("threshold", 2e-3))) as handle:
            model.generate(ids)
            print(handle.state.report())
            handle.state.choice = BlockChoice("nz_ratio", 0.1)      # at any time

    Prompts in parts, padding, grouped-query heads, beams, training and static caches work; layers with a sliding window of
    their own are left as they are. Each row has its own blocks, counted from its first token, so that a batch gives what
    its rows give alone (the authors' blocks are counted from the padding). In a prompt in parts, the parts' first and
    last blocks may be short; a ratio, and the dense last blocks, are then those of each part.

    Args:
        gates: trained gates; or settings, for fresh ones, which choose by chance.
        choice: how many blocks are visited.
        seed, std: of fresh gates; std None for the model's own.
        keep: keep the gates' scores and the visited blocks of the last prompt, for looking at them.
    """

    gates: SeerGates | GateSettings = field(default_factory=GateSettings)
    choice: BlockChoice = field(default_factory=BlockChoice)
    seed: int = 0
    std: float | None = None
    keep: bool = False

    def attach(self, host: nn.Module, handle: Handle) -> SeerState:
        gates = self.gates
        if isinstance(gates, GateSettings):
            gates = SeerGates.fresh(host, gates, self.seed, self.std)
        layers = gates.check(host, decode=False)
        state = SeerState(gates, self.choice, self.keep)
        attach_rule(host, _SeerRule(state, GateInputs(host, layers, handle)), handle, layers)
        return state


@dataclass(frozen=True, eq=False)
class Visited:
    """What a layer did with some rows of the last prompt.

    Args:
        rows: their numbers in the batch.
        scores: (b, H, m, n) of the gate, float32.
        blocks: (b, H, m, n) which were visited.
    """

    rows: tuple[int, ...]
    scores: Float[Tensor, "b H m n"]
    blocks: Bool[Tensor, "b H m n"]


class SeerState:
    """What SeerAttention keeps about a host.

    Attributes:
        gates: the gates.
        choice: how many blocks are visited; set it to change that from the next prompt on.
        keep: whether `visited` is filled.
        visited: per layer what it did with the rows of the last prompt.
    """

    def __init__(self, gates: SeerGates, choice: BlockChoice, keep: bool) -> None:
        self.gates, self.choice, self.keep = gates, choice, keep
        self.visited: dict[int, list[Visited]] = {}
        self._counts: dict[int, tuple[Tensor, int]] = {}

    def density(self) -> Float[Tensor, "L H"]:
        """Visited blocks over those that causality allows in the last prompt, for every layer with a gate and head.

        Raises:
            RuntimeError: there was no prompt yet.
        """
        if not self._counts:
            raise RuntimeError("no prompt has passed since the gates were attached")
        return torch.stack([self._counts[layer][0].float() / self._counts[layer][1] for layer in sorted(self._counts)])

    def report(self) -> str:
        """The density of the last prompt as a table: a line per layer, a column per head."""
        density = self.density()
        rows = zip(sorted(self._counts), density.tolist(), strict=True)
        lines = [f"layer {layer:3d}: {' '.join(f'{share:4.0%}' for share in row)}" for layer, row in rows]
        return "\n".join([f"density {density.mean():.1%} of the causal blocks, per head:", *lines])

    def begin(self, layer: int) -> None:
        """A new prompt, or more of it."""
        self._counts.pop(layer, None)
        self.visited.pop(layer, None)

    def count(self, layer: int, rows: tuple[int, ...], scores: Tensor, blocks: Tensor) -> None:
        """Take note of what was visited."""
        allowed = len(blocks) * causal_blocks(*blocks.shape[2:])
        number, of = self._counts.get(layer, (torch.zeros(blocks.shape[1], dtype=torch.long, device=blocks.device), 0))
        self._counts[layer] = number + blocks.sum((0, 2, 3)), of + allowed
        if self.keep:
            self.visited.setdefault(layer, []).append(Visited(rows, scores.detach(), blocks))


class _SeerRule(SpanRule):
    def __init__(self, state: SeerState, inputs: GateInputs) -> None:
        super().__init__()
        self.state, self.inputs = state, inputs

    def core(self, call: AttentionCall) -> Tensor | None:
        if call.query.shape[2] == 1:
            out = None  # the host's own
        else:
            self.state.begin(call.layer)
            out = super().core(call)
        self.inputs.forget(call.layer)
        return out

    def attend(self, call: AttentionCall, span: Span) -> Tensor:
        gate = self.state.gates[call.layer]
        assert isinstance(gate, AttnGate)  # checked when attached
        q, k, tables = self.inputs(call, span)
        starts = None if tables is None else (tables[0][:, :: gate.block], tables[1][:, :: gate.block])
        with torch.no_grad():  # the choice has no gradient
            scores = gate(q, k, starts)
            blocks = self.state.choice.of_prompt(scores)
        self.state.count(call.layer, span.rows, scores, blocks)
        return block_sparse_attention(
            span.queries(call.query), span.keys(call.key), span.keys(call.value), blocks, gate.block,
            scale=call.scale, dropout=call.dropout,
        )  # fmt: skip
