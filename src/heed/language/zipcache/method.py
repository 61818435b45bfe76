"""ZipCache's settings, and the method that gives a model its cache; see the package for the equations."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, get_args

import torch
from jaxtyping import Int
from torch import Tensor

from heed.catalogue import provides
from heed.errors import unknown
from heed.language.caches.method import CacheMethod
from heed.language.caches.rule import CacheRule
from heed.language.quantise import BITS, Grouping
from heed.language.saliency import Probes, Saliency
from heed.language.zipcache.store import Precision

if TYPE_CHECKING:
    from heed.language.zipcache.layer import ZipLayer


@provides("34-zipcache")
@dataclass(frozen=True)
class ZipCache(CacheMethod):
    """Keeps salient tokens in 4 bits and the others in 2, with a full-precision tail while generating.

        with heed.apply(model, ZipCache()) as handle:
            cache = handle.state.cache()
            model.generate(ids, past_key_values=cache)
            print(cache.report())

    Works on decoders of transformers (Llama, Mistral, Qwen, Gemma, GPT-2 and others), prompts in one piece or in chunks,
    batches with padding, beam search. `regular=0` is plain quantisation with `salient_bits`, which needs no `apply`;
    `saliency="accumulated"` with `recent=1, random=0` ranks tokens as H2O and MiKV do.

    Args:
        salient_bits, regular_bits: of a number, 2, 4 or 8.
        regular: fraction of the tokens that are regular, those of least saliency in their key-value head.
        gap: new tokens in full precision before everything is compressed again.
        recent, random: fractions of the queries that are probes, see `heed.language.saliency.Probes`.
        saliency: "normalised" by the number of queries that see a token, or "accumulated".
        keys, values: what shares a step, see `heed.language.quantise.quantise`.
        group: channels of a group, where keys or values are quantised in groups.
        value_salient_bits, value_regular_bits: of values; None for those of keys.
        value_regular: fraction for the values of tokens that come after the prompt; None for that of keys. In the prompt
            both have the same regular tokens, as in the authors' code.
        shared_parameters: one minimum, step and scale of a channel for the whole batch, as in the authors' code. By
            default each sequence has its own and does not depend on the others.
        seed: of the random probes. Every prompt draws the same ones.
        random_rows: (layers, R), the random probes of the prompt, in the place of drawing them.

    Raises:
        ValueError: bits, fractions or a gap that are not possible, or an unknown way to quantise.
    """

    salient_bits: int = 4
    regular_bits: int = 2
    regular: float = 0.4
    gap: int = 100
    recent: float = 0.05
    random: float = 0.05
    saliency: Saliency = "normalised"
    keys: Grouping = "channel"
    values: Grouping = "channel-separable"
    group: int = 32
    value_salient_bits: int | None = None
    value_regular_bits: int | None = None
    value_regular: float | None = None
    shared_parameters: bool = False
    seed: int = 0
    random_rows: Int[Tensor, "L R"] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("salient_bits", "regular_bits", "value_salient_bits", "value_regular_bits"):
            if getattr(self, name) not in (*BITS, *([None] if name.startswith("value") else [])):
                raise ValueError(f"{name}={getattr(self, name)} cannot be packed; choose 2, 4 or 8")
        for name in ("regular", "value_regular"):
            if not 0 <= (getattr(self, name) or 0) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be a fraction between 0 and 1")
        if self.gap < 1:
            raise ValueError(f"gap={self.gap} must be 1 or more; a large one keeps all new tokens in full precision")
        if self.group < 1:
            raise ValueError(f"group={self.group} must be 1 or more")
        for name, kind, known in (
            ("keys", "quantisation", get_args(Grouping)),
            ("values", "quantisation", get_args(Grouping)),
            ("saliency", "saliency", get_args(Saliency)),
        ):
            if getattr(self, name) not in known:
                raise ValueError(unknown(kind, getattr(self, name), known))
        _ = self.probes  # checks the fractions

    @property
    def probes(self) -> Probes:
        return Probes(self.recent, self.random)

    @property
    def precisions(self) -> tuple[Precision, Precision]:
        """Of keys and of values."""
        bits = self.salient_bits, self.regular_bits
        own = self.value_salient_bits or bits[0], self.value_regular_bits or bits[1]
        return (
            Precision(*bits, self.keys, self.group, self.shared_parameters),
            Precision(*own, self.values, self.group, self.shared_parameters),
        )

    @property
    def fractions(self) -> tuple[float, float]:
        """Of regular tokens after the prompt, for keys and for values."""
        return self.regular, self.regular if self.value_regular is None else self.value_regular

    @property
    def needs_attention(self) -> bool:
        return any(self.fractions)

    def layer(self, index: int, rule: CacheRule | None) -> ZipLayer:
        from heed.language.zipcache.layer import ZipLayer

        return ZipLayer(self, index, rule)

    def probe_rows(self, queries: int, index: int, compression: int) -> Int[Tensor, " R"]:
        """Numbers of the probes among `queries` queries, for a layer at its first (0), second ... compression."""
        if self.random_rows is not None and compression == 0:
            recent = Probes(self.recent, 0).rows(queries, torch.empty(0))
            return torch.cat([recent, self.random_rows[index].long()])
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * index + 10_007 * compression)
        return self.probes.rows(queries, torch.rand(queries, generator=generator, dtype=torch.float64))
