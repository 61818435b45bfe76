"""SeerAttention-R on a language model of transformers: dense prompts, sparse decoding by learned gates (card 22).

M = the best blocks of the cache by the gate's scores, and the last block     per key-value head
o = softmax(scale q K[M]^T) V[M]
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from heed.catalogue import provides
from heed.engine.attend import attend
from heed.engine.patterns import Full
from heed.hosts.attach import attach_rule
from heed.hosts.rules import AttentionCall
from heed.language.seer.decode import CompressedKeys, DecodeGate
from heed.language.seer.gates import GateSettings, SeerGates
from heed.language.seer.inputs import GateInputs
from heed.language.seer.select import BlockChoice
from heed.language.seer.truth import row_maxima
from heed.language.spans import Span
from heed.language.sparse import SpanRule
from heed.methods import Handle, Method


@provides("22-seerattention")
def decode_attention(
    q: Float[Tensor, "B H 1 D"],
    k: Float[Tensor, "B G K D"],
    v: Float[Tensor, "B G K E"],
    blocks: Bool[Tensor, "B G 1 n"],
    block: int = 64,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "B H 1 E"]:
    """Attention of one token per row to the blocks that were chosen for each key-value head.

    Args:
        q: (B, H, 1, d) the query.
        k, v: (B, G, K, d) and (B, G, K, E); G divides H.
        blocks: (B, G, 1, n) what is visited, n = ceil(K / b).
        block: tokens per block.
        scale: factor on q k^T, default d ** -0.5.
        dropout: on the weights.
    """
    (batch, groups, keys, _), heads = k.shape, q.shape[1]
    number = blocks.sum(-1)
    listed = blocks.to(torch.uint8).topk(int(number.max()), -1)
    tokens = listed.indices[..., None] * block + torch.arange(block, device=q.device)
    seen = (listed.values > 0)[..., None] & (tokens < keys)
    tokens, seen = tokens.clamp(max=keys - 1).flatten(2), seen.flatten(2)
    some, values = (x.take_along_dim(tokens[..., None], 2).flatten(0, 1)[:, None] for x in (k, v))
    asked = q.reshape(batch * groups, 1, heads // groups, -1)
    out = attend(asked, some, values, Full(), key_mask=seen.flatten(0, 1), scale=scale, dropout=dropout)
    return out.reshape(batch, heads, 1, -1)


@provides("22-seerattention")
@dataclass(frozen=True)
class SeerAttentionR(Method):
    """Decoding over the blocks of the cache that gates choose; prompts are dense.

        gates = SeerGates(model, GateSettings("Qproj_Kmaxminavg", decode=True))
        distill(model, gates, batches, steps=800)
        with heed.apply(model, SeerAttentionR(gates, BlockChoice("token_budget", 2048))):
            model.generate(ids)

    The cache is as large as before, and a little more for the compressed keys. These are made again from the cache where it
    is not the one of the step before (another prompt, other beams); blocks that had filled while decoding are then rotated
    as their first token, not as their last.

    Args:
        gates: trained gates; or settings, for fresh ones, which choose by chance.
        choice: a threshold or a token budget.
        oracle: choose by the true maxima of attention instead of the gates' scores, to see what gates could reach.
        first_token: see `CompressedKeys`.
        seed, std: of fresh gates; std None for the model's own.
    """

    gates: SeerGates | GateSettings = field(default_factory=lambda: GateSettings("Qproj_Kmaxminavg", decode=True))
    choice: BlockChoice = field(default_factory=lambda: BlockChoice("token_budget", 2048))
    oracle: bool = False
    first_token: bool = False
    seed: int = 0
    std: float | None = None

    def attach(self, host: nn.Module, handle: Handle) -> SeerRState:
        gates = self.gates
        if isinstance(gates, GateSettings):
            gates = SeerGates.fresh(host, gates, self.seed, self.std)
        layers = gates.check(host, decode=True)
        state = SeerRState(gates, self.choice)
        inputs = GateInputs(host, layers, handle)
        attach_rule(host, _SeerRRule(self, state, inputs), handle, layers)
        return state


class SeerRState:
    """What SeerAttention-R keeps about a host.

    Attributes:
        gates: the gates.
        choice: how many blocks are visited; set it to change that from the next token on.
        blocks: per layer what the last token visited, (rows, G, 1, n); with padding, that of the last rows.
    """

    def __init__(self, gates: SeerGates, choice: BlockChoice) -> None:
        self.gates, self.choice = gates, choice
        self.blocks: dict[int, Tensor] = {}
        self._caches: dict[tuple[int, tuple[int, ...], int], _Compressed] = {}

    def forget(self, layer: int) -> None:
        """A new prompt, or more of it."""
        for place in [place for place in self._caches if place[0] == layer]:
            del self._caches[place]


@dataclass
class _Compressed:
    """Compressed keys, and the last key that is in them, as the cache has it."""

    keys: CompressedKeys
    last: Tensor

    def fits(self, k: Tensor) -> bool:
        """Whether k (B, G, K, D) are the same keys and one more: not another prompt, nor other beams."""
        same = k.shape[2] == self.keys.tokens + 1 and k.shape[:2] == self.last.shape[:2]
        return same and torch.equal(k[:, :, -2], self.last)


class _SeerRRule(SpanRule):
    def __init__(self, method: SeerAttentionR, state: SeerRState, inputs: GateInputs) -> None:
        super().__init__()
        self.method, self.state, self.inputs = method, state, inputs

    def core(self, call: AttentionCall) -> Tensor | None:
        if call.query.shape[2] == 1:
            out = super().core(call)
        else:
            self.state.forget(call.layer)
            out = None  # the host's own
            if not torch.is_grad_enabled():
                for span in self.spans(call):
                    self._begin(call, span, span.last - span.first)
        self.inputs.forget(call.layer)
        return out

    @torch.no_grad()
    def _begin(self, call: AttentionCall, span: Span, tokens: int) -> _Compressed:
        """Compress the first so many keys of a span."""
        gate = self.state.gates[call.layer]
        assert isinstance(gate, DecodeGate)  # checked when attached
        _, k, tables = self.inputs(call, span)
        found = CompressedKeys(gate, first_token=self.method.first_token)
        found.prefill(k[:, :, :tokens], None if tables is None else (tables[0][:, :tokens], tables[1][:, :tokens]))
        made = _Compressed(found, span.keys(call.key)[:, :, tokens - 1].clone())
        self.state._caches[call.layer, span.rows, span.first] = made
        return made

    def attend(self, call: AttentionCall, span: Span) -> Tensor:
        q, k, v = span.queries(call.query), span.keys(call.key), span.keys(call.value)
        gate = self.state.gates[call.layer]
        assert isinstance(gate, DecodeGate)  # checked when attached
        with torch.no_grad():
            if self.method.oracle:
                scores = row_maxima(q, k, block=gate.block, scale=call.scale).unflatten(1, (k.shape[1], -1)).amax(2)
                scores = (scores / scores.sum(-1, keepdim=True)).log()
            else:
                scores = self._scores(call, span, k, gate)
            blocks = self.state.choice.of_token(scores, gate.block)
        self.state.blocks[call.layer] = blocks
        return decode_attention(q, k, v, blocks, gate.block, scale=call.scale, dropout=call.dropout)

    def _scores(self, call: AttentionCall, span: Span, k: Tensor, gate: DecodeGate) -> Tensor:
        """The gate's scores of all blocks, after the token's key has joined them."""
        found = self.state._caches.get((call.layer, span.rows, span.first))
        if k.shape[2] > 1 and (found is None or not found.fits(k)):
            found = self._begin(call, span, k.shape[2] - 1)
        q, now, tables = self.inputs(call, span, cached=False)
        if found is None:
            found = self._begin(call, span, 1)
        else:
            found.keys.append(now, tables)
            found.last = k[:, :, -1].clone()
        return gate.scores(gate.ask(q, tables), found.keys.blocks)
