"""Gives a trained language model a temperature for every query and value, without changing what it is at first (card 18).

    q_n = tau_q[n] W_q x_n   (before or after rotation: the same)        v_n = tau_v[n] W_v x_n   (before the cache)

tau is 1 + g ln n + tanh(a . GELU(q)), see `heed.layers.temperature`. The factors are put on what the host's projections make,
by torch's hooks, so that caches, rotation, masks and every attention kernel stay the host's own. Where a host norms its
queries after projecting them (Qwen3, Gemma3), which would undo a factor, it is put on in attention itself; the token's score
is still that of the projected query. Zhang et al., NeurIPS 2024 (arXiv 2411.12892); the value's temperature and the token's
part are not in the authors' code and follow the paper's words.
"""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from heed.catalogue import provides
from heed.checkpoint import load_weights, read_weights, write_atomically
from heed.hosts.attach import attach_rule, attention_layers, is_transformers
from heed.hosts.projections import PARTS, Part, Projections, find_projections
from heed.hosts.rules import AttentionCall, AttentionRule
from heed.layers.temperature import Selective, Temperature
from heed.methods import Handle, Method, apply

_NAME = "temperatures"  # attribute of an attention layer
_HEADER = "heed.selective"  # in the file of temperatures
_CACHES = ("past_key_values", "layer_past", "past_key_value")  # how layers call their cache
_OTHER_LAYERS = ("linear", "mamba", "conv", "recurrent")  # in a hybrid model's names of kinds of layers


@provides("18-selective-ssa")
@dataclass(frozen=True)
class SelectiveTemperatures(Selective, Method):
    """Temperatures in a decoder of transformers; the settings are those of `Selective`.

        handle = heed.apply(model, SelectiveTemperatures())
        train_temperatures_only(handle)
        ...
        save_temperatures(handle, "temperatures.safetensors")

    Temperatures are parameters of the model: its optimiser, `model.train()`, `model.to()` and `state_dict()` have them until
    the handle is removed. Position ids must count real tokens, as generate() does; where only a mask is given, it is counted.
    The handle's `state` is a `SelectiveState`.
    """

    def attach(self, host: nn.Module, handle: Handle) -> SelectiveState:
        if not is_transformers(host):
            raise TypeError(
                f"{type(host).__name__} is no model of transformers; SelectiveAttention is the layer by itself"
            )
        layers = attention_layers(host)
        _warn_of_other_layers(host, len(layers))
        counter = _Counter(host, handle)
        state = SelectiveState(self, host)
        scaled_in_attention: dict[int, _Scaling] = {}
        for number, layer in enumerate(layers):
            if hasattr(layer, _NAME):
                raise ValueError(f"{type(layer).__name__} {number} has temperatures already; remove them first")
            projections = _projections(layer, self)
            temperatures = LayerTemperatures(self, projections)
            device = next(projections.query.parameters()).device
            layer.add_module(_NAME, temperatures.to(device).train(layer.training))
            handle.on_remove(lambda layer=layer: delattr(layer, _NAME))
            state.layers[number] = temperatures
            scaling = _Scaling(temperatures, projections, counter)
            scaling.hook(layer, handle)
            if projections.query_norm is not None and temperatures.query is not None:
                scaled_in_attention[number] = scaling
        if scaled_in_attention:
            attach_rule(host, _ScaleQueries(scaled_in_attention), handle, scaled_in_attention)
        return state


@provides("18-selective-ssa")
class LayerTemperatures(nn.Module):
    """The temperatures of one attention layer: `query`, `value` and `key`, each a `Temperature` or None.

    Attributes:
        last: tau of the last call (B, heads, N) per part, while `watch` is set.
    """

    def __init__(self, settings: Selective, projections: Projections) -> None:
        super().__init__()
        p, width = projections, _input_width(projections.query)
        self.query = settings.temperature("query", p.heads, p.head_dim, width)
        self.value = settings.temperature("value", p.key_heads, p.head_dim, width)
        self.key = settings.temperature("key", p.key_heads, p.head_dim, width)
        self.watch = False
        self.last: dict[Part, Tensor] = {}

    def of(self, part: Part) -> Temperature | None:
        """The temperature of a part."""
        return getattr(self, part)


@provides("18-selective-ssa")
class SelectiveState:
    """The temperatures of a host.

    Attributes:
        settings: what they are.
        host: where they are.
        layers: number of the attention layer -> `LayerTemperatures`.
    """

    def __init__(self, settings: SelectiveTemperatures, host: nn.Module) -> None:
        self.settings, self.host = settings, host
        self.layers: dict[int, LayerTemperatures] = {}

    def parameters(self) -> Iterator[nn.Parameter]:
        """The new parameters."""
        for layer in self.layers.values():
            yield from layer.parameters()

    def count(self) -> int:
        """How many numbers were added: layers * (H d + G d + 2) by default."""
        return sum(parameter.numel() for parameter in self.parameters())

    def module(self) -> nn.ModuleDict:
        """All of them as one module, by number."""
        return nn.ModuleDict({str(number): layer for number, layer in self.layers.items()})


class _Counter:
    """How many real tokens each query sees, itself included, for the layers of a running forward pass."""

    def __init__(self, host: nn.Module, handle: Handle) -> None:
        self._signature = inspect.signature(type(host).forward)
        self._counts: Tensor | None = None
        handle.hook(host.register_forward_pre_hook(self._look, with_kwargs=True))

    def _look(self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Where the user gives a padding mask and no positions, columns are counted in the mask."""
        given = self._signature.bind_partial(host, *args, **kwargs).arguments
        given |= given.get("kwargs", {})
        mask = given.get("attention_mask")
        counted = isinstance(mask, Tensor) and mask.ndim == 2 and given.get("position_ids") is None
        self._counts = mask.long().cumsum(1) if counted and isinstance(mask, Tensor) else None

    def positions(self, layer: nn.Module, tokens: int, device: torch.device, kwargs: dict[str, Any]) -> Tensor:
        """(B or 1, N) from 1 on.

        Raises:
            ValueError: the layer is not told positions, and there are earlier tokens in a cache.
        """
        ids = kwargs.get("position_ids")
        if ids is None:
            cache = next((kwargs[name] for name in _CACHES if kwargs.get(name) is not None), None)
            if cache is not None and cache.get_seq_length(layer.layer_idx) > 0:  # type: ignore[arg-type]
                raise ValueError(
                    f"{type(layer).__name__} was given a cache of earlier tokens and no position_ids: how many tokens there "
                    "were cannot be known; pass position_ids to the model"
                )
            ids = torch.arange(tokens, device=device)[None]
        if self._counts is not None:
            counts = self._counts.to(ids.device)
            return counts.gather(1, ids.expand(len(counts), -1).clamp(max=counts.shape[1] - 1)).clamp(min=1)
        return (ids + 1).clamp(min=1)


class _Scaling:
    """Puts one layer's temperatures on what its projections make."""

    def __init__(self, temperatures: LayerTemperatures, projections: Projections, counter: _Counter) -> None:
        self.temperatures, self.projections, self.counter = temperatures, projections, counter
        self.raw = replace(projections, query_norm=None, key_norm=None)  # scores are of what was projected
        self.tau_query: Tensor | None = None  # for queries that are normed after they are projected
        self._positions: Tensor | None = None
        self._inputs: Tensor | None = None

    def hook(self, layer: nn.Module, handle: Handle) -> None:
        """Scale what the layer's projections make, until removal."""
        handle.hook(layer.register_forward_pre_hook(self._begin, with_kwargs=True))
        modules: dict[nn.Module, list[Part]] = {}
        for part in PARTS:
            if self.temperatures.of(part) is not None:
                modules.setdefault(self.projections.module(part), []).append(part)
        for module, parts in modules.items():
            handle.hook(module.register_forward_hook(partial(self._scaled, parts)))

    def _begin(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs: Tensor = args[0] if args else kwargs["hidden_states"]
        self._inputs = inputs
        self._positions = self.counter.positions(layer, inputs.shape[1], inputs.device, kwargs)

    def _scaled(self, parts: list[Part], module: nn.Module, args: object, made: Tensor) -> Tensor:
        taus: dict[Part, Tensor] = {}
        for part in parts:
            temperature = self.temperatures.of(part)
            assert temperature is not None  # such a part has no hook
            tau = temperature(self.raw.split(part, made), self._positions, self._inputs)
            if self.temperatures.watch:
                self.temperatures.last[part] = tau.detach()
            if part == "query" and self.projections.query_norm is not None:
                self.tau_query = tau
            else:
                taus[part] = tau.transpose(1, 2).to(made.dtype)
        return _times(made, taus, self.projections) if taus else made


def _times(made: Tensor, taus: dict[Part, Tensor], projections: Projections) -> Tensor:
    """What a module made (B, N, W), with the heads of some parts times tau (B, N, heads)."""
    p = projections
    if not p.packed:
        (tau,) = taus.values()
        return (made.unflatten(-1, (-1, p.head_dim)) * tau[..., None]).flatten(-2)
    heads = {"query": p.heads, "key": p.key_heads, "value": p.key_heads}
    all_three = [taus.get(part, made.new_ones(*made.shape[:2], heads[part])) for part in PARTS]
    factors = torch.stack(all_three, -1).flatten(-2) if p.by_head else torch.cat(all_three, -1)
    return (made.unflatten(-1, (-1, p.head_dim)) * factors[..., None]).flatten(-2)


class _ScaleQueries(AttentionRule):
    """Puts tau on queries that the host has normed."""

    def __init__(self, scalings: dict[int, _Scaling]) -> None:
        self.scalings = scalings

    def before(self, call: AttentionCall) -> AttentionCall:
        tau = self.scalings[call.layer].tau_query
        assert tau is not None  # the projection ran before
        return call.replace(query=call.query * tau[..., None].to(call.query.dtype))


def _projections(layer: nn.Module, settings: Selective) -> Projections:
    """The layer's projections, or a ValueError that says why temperatures cannot be put on them."""
    name = type(layer).__name__
    norms = [
        child
        for child, module in layer.named_children()
        if "norm" in child and child.startswith(("q_", "qk_", "query_")) and not isinstance(module, nn.Identity)
    ]
    unknown = [child for child in norms if child not in ("q_norm", "q_a_layernorm")]
    if settings.query and unknown:
        raise ValueError(
            f"{name} norms its queries by {unknown[0]}, which would undo a factor on them; query=() leaves them"
        )
    if settings.key and getattr(layer, "k_norm", None) is not None:
        raise ValueError(f"{name} norms its keys by k_norm, which would undo a factor on them; key=() leaves them")
    if settings.value and getattr(layer, "v_norm", None) is not None:
        raise ValueError(f"{name} norms its values by v_norm, which would undo a factor on them; value=() leaves them")
    try:
        return find_projections(layer)
    except TypeError as error:
        latent = getattr(layer, "q_b_proj", None) or getattr(layer, "q_proj", None)
        width = getattr(layer, "qk_head_dim", None)
        if not hasattr(layer, "kv_b_proj") or latent is None or width is None:
            raise ValueError(str(error)) from error
        if settings.value or settings.key:
            raise ValueError(
                f"{name} makes keys and values from one latent vector and has no v_proj; only queries can have "
                "temperatures there: value=(), key=()"
            ) from error
        return Projections(latent, nn.Identity(), nn.Identity(), latent.out_features // width, 0, width)


def _warn_of_other_layers(host: nn.Module, found: int) -> None:
    kinds = getattr(host.config, "layer_types", None) or getattr(host.config, "layers_block_type", None) or ()  # type: ignore[union-attr]
    others = [kind for kind in kinds if any(other in str(kind) for other in _OTHER_LAYERS)]
    if others:
        warnings.warn(
            f"{len(others)} of {type(host).__name__}'s {len(kinds)} layers are {', '.join(sorted(set(others)))}: they have "
            f"no softmax and get no temperatures; {found} attention layers do",
            stacklevel=5,
        )


def _input_width(module: nn.Module) -> int:
    """Channels that a projection reads: of nn.Linear, or of GPT-2's Conv1D."""
    width = getattr(module, "in_features", getattr(module, "nx", None))
    if not isinstance(width, int):
        raise ValueError(f"{type(module).__name__} does not say how many channels it reads")
    return width


@provides("18-selective-ssa")
def convert_to_selective(model: nn.Module, settings: Selective | None = None) -> Handle:
    """Give a decoder of transformers temperatures; by default it stays almost the same function at first.

    Args:
        model: GPT-2, GPT-NeoX, Llama, Mistral, Qwen, Gemma and their like.
        settings: default `Selective()`; for a new model, `Selective(scratch=True)`.

    Returns:
        A handle; `handle.remove()` undoes the conversion.

    Raises:
        TypeError: no model of transformers.
        ValueError: converted already, or projections or norms that are not known.
    """
    return apply(model, SelectiveTemperatures(**asdict(settings or Selective())))


@provides("18-selective-ssa")
def train_temperatures_only(handle: Handle) -> list[nn.Parameter]:
    """Freeze everything but the temperatures, until the handle is removed; returns what is left to train."""
    state: SelectiveState = handle.state
    trained = list(state.parameters())
    kept = {id(parameter) for parameter in trained}
    for parameter in state.host.parameters():
        if id(parameter) not in kept and parameter.requires_grad:
            parameter.requires_grad_(False)
            handle.on_remove(lambda parameter=parameter: parameter.requires_grad_(True))
    return trained


@provides("18-selective-ssa")
def temperature_groups(
    handle: Handle,
    lr: float = 1e-5,
    *,
    scalar_lr: float = 1e-2,
    token_lr: float | None = None,
    weight_decay: float = 0.01,
) -> list[dict[str, Any]]:
    """Groups for an optimiser: the host's weights, the token's vectors, and the scalars of positions.

    No group of temperatures decays: decay would pull their scalars to a gain of 0.5 or 0.37, not to none.

    Args:
        handle: of applied temperatures.
        lr: of the host's weights; the defaults are those of the authors' fine-tuning.
        scalar_lr: of the positions' scalars.
        token_lr: of the vectors and networks of token scores; default `lr`.
        weight_decay: of the host's weights.

    Returns:
        Groups without empty ones, of parameters that are trained, for AdamW(groups, betas=(0.9, 0.95)).
    """
    state: SelectiveState = handle.state
    named = [(name, p) for layer in state.layers.values() for name, p in layer.named_parameters() if p.requires_grad]
    scalars = [p for name, p in named if name.endswith("alpha")]
    tokens = [p for name, p in named if not name.endswith("alpha")]
    ours = {id(parameter) for parameter in state.parameters()}
    host = [p for p in state.host.parameters() if id(p) not in ours and p.requires_grad]
    groups = [
        {"params": host, "lr": lr, "weight_decay": weight_decay},
        {"params": tokens, "lr": lr if token_lr is None else token_lr, "weight_decay": 0.0},
        {"params": scalars, "lr": scalar_lr, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


@provides("18-selective-ssa")
def save_temperatures(handle: Handle, path: str | Path) -> None:
    """Write the temperatures alone, with their settings, as safetensors."""
    state: SelectiveState = handle.state
    weights = {name: value.detach().cpu().contiguous() for name, value in state.module().state_dict().items()}
    header = {_HEADER: json.dumps(asdict(state.settings))}
    write_atomically(Path(path), safetensors.torch.save(weights, metadata=header))


@provides("18-selective-ssa")
def load_temperatures(model: nn.Module, path: str | Path) -> Handle:
    """Convert a model as a file of `save_temperatures` says, and load its temperatures.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no such file, or does not fit the model. The model is then as it was.
    """
    if Path(path).suffix != ".safetensors":
        raise ValueError(f"{path} is no .safetensors file; write temperatures with save_temperatures")
    weights = read_weights(path)
    with safetensors.safe_open(path, "pt") as file:
        header = (file.metadata() or {}).get(_HEADER)
    if header is None:
        raise ValueError(f"{path} holds no temperatures; write it with save_temperatures")
    handle = apply(model, SelectiveTemperatures(**json.loads(header)))
    try:
        load_weights(handle.state.module(), weights, str(path))
    except ValueError:
        handle.remove()
        raise
    return handle
