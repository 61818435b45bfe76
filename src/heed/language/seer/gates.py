"""The gates of all layers of a model, as one module that lives beside it: to be trained, saved and loaded on its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from heed.catalogue import provides
from heed.hosts.attach import attention_layers
from heed.hosts.projections import find_projections
from heed.language.seer.decode import DecodeGate
from heed.language.seer.gate import AttnGate
from heed.language.seer.pooling import HeadLinear, check_size, poolings
from heed.language.sparse import sparse_layers

_STD = 0.02


@provides("22-seerattention")
@dataclass(frozen=True)
class GateSettings:
    """What the gates of a model look like.

    Args:
        kind: what queries and keys are pooled by, see `AttnGate` and, for decoding, `DecodeGate`. Released gates for
            prompts are "Qavg_Kmaxminavg", those for decoding "Qproj_Kmaxminavg".
        block: b, tokens per block.
        width: g; None for the width of the model's heads.
        force_double: two maps also where one would do; for prompts.
        decode: gates for decoding (SeerAttention-R), not for prompts.
        qk_norm: RMS norms after the maps, for decoding.

    Raises:
        ValueError: sizes below 1, an unknown kind, or a setting of the other sort of gates.
    """

    kind: str = "Qavg_Kmaxminavg"
    block: int = 64
    width: int | None = None
    force_double: bool = False
    decode: bool = False
    qk_norm: bool = False

    def __post_init__(self) -> None:
        check_size("block", self.block)
        if self.width is not None:
            check_size("width", self.width)
        poolings(self.kind, decode=self.decode)
        if self.decode and self.force_double:
            raise ValueError("force_double=True is for the gates of prompts; gates for decoding have one form")
        if self.qk_norm and not self.decode:
            raise ValueError("qk_norm=True is for the gates of decoding; set decode=True")

    def gate(self, heads: int, key_heads: int, head_dim: int) -> AttnGate | DecodeGate:
        """A gate of one layer."""
        sizes = (heads, key_heads, head_dim, self.block, self.width, self.kind)
        return DecodeGate(*sizes, self.qk_norm) if self.decode else AttnGate(*sizes, self.force_double)


@provides("22-seerattention")
class SeerGates(nn.Module):
    """Gates for the attention layers of a decoder that see the whole text; the decoder does not hold them.

        gates = SeerGates(model)
        distill(model, gates, batches, steps=500)
        heed.apply(model, SeerAttention(gates))

    Args:
        host: a model of transformers with rotary embedding in halves (Llama, Qwen2, Qwen3, Mistral, Gemma, GPT-NeoX) or
            without any (GPT-2).
        settings: what they look like.
        generator: of the first weights, which are normal with the model's `initializer_range`.
        std: instead of that.
        dense_layers: numbers of layers that get none; negative ones count from the last.

    Raises:
        TypeError: no decoder of transformers, or projections that heed does not know.
        ValueError: sizes that do not fit the model, or gates narrower than its rotary table.
    """

    def __init__(
        self,
        host: nn.Module,
        settings: GateSettings | None = None,
        *,
        generator: torch.Generator | None = None,
        std: float | None = None,
        dense_layers: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.settings = GateSettings() if settings is None else settings
        layers = attention_layers(host) if (numbers := sparse_layers(host, "SeerAttention", dense_layers)) else []
        names = {id(module): name for name, module in host.named_modules()}
        self.names = {number: names[id(layers[number])] for number in numbers}
        self.layers = nn.ModuleDict()
        for number in numbers:
            found = find_projections(layers[number])
            weight = next((x for x in layers[number].parameters() if x.is_floating_point()), torch.empty(0))
            gate = self.settings.gate(found.heads, found.key_heads, found.head_dim)
            self.layers[str(number)] = gate.to(weight.device, weight.dtype)
        for module in host.modules():
            table = getattr(module, "inv_freq", None)
            if isinstance(table, torch.Tensor) and 2 * table.numel() > min(gate.width for gate in self):
                raise ValueError(
                    f"width={self.settings.width} is narrower than the host's rotary table, {2 * table.numel()}; widen it"
                )
        config: Any = host.config
        spread: float = getattr(config, "initializer_range", _STD) if std is None else std
        for module in self.modules():
            if isinstance(module, HeadLinear):
                nn.init.normal_(module.weight, std=spread, generator=generator)

    @classmethod
    def fresh(cls, host: nn.Module, settings: GateSettings, seed: int, std: float | None = None) -> SeerGates:
        """Gates that have learned nothing, drawn from a seed."""
        device = next((x.device for x in host.parameters()), torch.device("cpu"))
        return cls(host, settings, generator=torch.Generator(device).manual_seed(seed), std=std)

    def __iter__(self) -> Iterator[AttnGate | DecodeGate]:
        return iter(self.layers.values())  # type: ignore[arg-type]

    def __getitem__(self, layer: int) -> AttnGate | DecodeGate:
        return self.layers[str(layer)]  # type: ignore[return-value]

    def check(self, host: nn.Module, *, decode: bool | None = None) -> list[int]:
        """Numbers of the host's layers that have a gate.

        Raises:
            ValueError: gates of another model, or of the other sort (`decode` says which is wanted).
        """
        if decode is not None and decode != self.settings.decode:
            wanted, given = ("decoding", "prompts") if decode else ("prompts", "decoding")
            raise ValueError(f"these are gates for {given}, and gates for {wanted} are needed; see GateSettings.decode")
        numbers = sparse_layers(host, "SeerAttention")
        layers = attention_layers(host)
        for number in self.names:
            if number not in numbers:
                raise ValueError(f"there is a gate for layer {number}, of {numbers} that see the whole text")
            found, gate = find_projections(layers[number]), self[number]
            theirs, ours = (found.heads, found.key_heads), (gate.heads, gate.key_heads)
            if theirs != ours:
                raise ValueError(
                    f"layer {number} ({self.names[number]}): gates for (heads, key heads) = {ours} do not fit a model "
                    f"with {theirs}; they belong to another one"
                )
        return list(self.names)
