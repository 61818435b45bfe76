"""Gates on their own, saved and loaded: 0.1 GB for a model of 8 billion weights, which stays where it is.

Keys are those of the authors' attn_gate_weights.pth: "model.layers.3.self_attn.attn_gate.mask_linear_k.weight". Layers are
told apart by their number, so a model's own names may be others.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import safe_open
from torch import Tensor, nn

from heed.catalogue import provides
from heed.checkpoint import read_weights, write_atomically
from heed.hosts.attach import attention_layers
from heed.language.seer.gates import GateSettings, SeerGates

_KEY = re.compile(r"(?:^|\.)(\d+)\.[^.]+\.attn_gate\.(.+)$")
_AUTHORS = "attn_gate_weights.pth"


@provides("22-seerattention")
def save_gates(gates: SeerGates, path: str | Path) -> None:
    """Write gates and their settings as one safetensors file."""
    state = {
        f"{gates.names[int(number)]}.attn_gate.{name}": value.detach().cpu().contiguous()
        for number, gate in gates.layers.items()
        for name, value in gate.state_dict().items()
    }
    settings = {"seer_gates": json.dumps(asdict(gates.settings)), "format": "pt"}
    write_atomically(Path(path), safetensors.torch.save(state, metadata=settings))


@provides("22-seerattention")
def load_gates(host: nn.Module, path: str | Path, settings: GateSettings | None = None) -> SeerGates:
    """Gates for a model, from a file of heed's or of the authors'.

    Args:
        host: the model they were trained for.
        path: what `save_gates` wrote, the authors' attn_gate_weights.pth, or the folder it is in.
        settings: what the gates look like. None reads them from heed's file, or from the weights and the config.json beside
            the authors' (blocks of 64 and "Qavg_Kmaxminavg" where that says nothing).

    Raises:
        FileNotFoundError: no such file.
        ValueError: not gates, or gates of another model: the message names layer and shapes.
    """
    path = Path(path)
    path = path / _AUTHORS if path.is_dir() else path
    weights: dict[int, dict[str, Tensor]] = {}
    for key, value in read_weights(path).items():
        found = _KEY.search(key)
        if found is None:
            raise ValueError(f"{path} holds {key}, which is no gate's weight; those have 'attn_gate' in their names")
        weights.setdefault(int(found[1]), {})[found[2]] = value
    settings = _settings(path, next(iter(weights.values()))) if settings is None else settings
    number = len(attention_layers(host))
    gates = SeerGates(host, settings, dense_layers=tuple(set(range(number)) - set(weights)))
    for layer, given in sorted(weights.items()):
        if str(layer) not in gates.layers:
            raise ValueError(f"{path} has a gate for layer {layer}; the model has gates in {list(gates.names)} only")
        own = {name: tuple(value.shape) for name, value in gates[layer].state_dict().items()}
        theirs = {name: tuple(value.shape) for name, value in given.items()}
        if own != theirs:
            raise ValueError(
                f"{path} does not fit the model: in layer {layer} the gate has the shapes {theirs}, the model needs {own}; "
                "the gates belong to another model, or have other settings"
            )
        gates[layer].load_state_dict(given)
    return gates


def _settings(path: Path, weights: dict[str, Tensor]) -> GateSettings:
    """What a file says about its gates."""
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            said = (file.metadata() or {}).get("seer_gates")
        if said is not None:
            return GateSettings(**json.loads(said))
    beside = path.parent / "config.json"
    config: dict[str, Any] = json.loads(beside.read_text()) if beside.is_file() else {}
    block = config.get("seerattn_gate_block_size", 64)
    if "attngate_linear_k.weight" not in weights:
        kind = config.get("seerattn_gate_type", "Qavg_Kmaxminavg")
        width = weights["mask_linear_k.weight"].shape[-1] if "mask_linear_k.weight" in weights else None
        return GateSettings(kind, block, width, config.get("seerattn_gate_force_double", False))
    queries = weights.get("attngate_linear_q.weight")
    if queries is None:
        raise ValueError(
            f"{path} does not say what its gates make of queries; give settings, e.g. GateSettings('Qavg_...')"
        )
    kind = f"{'Qproj' if queries.ndim == 4 else 'Qavgproj'}_Kmaxminavg"
    width = weights["attngate_linear_k.weight"].shape[-1]
    return GateSettings(kind, block, width, decode=True, qk_norm="attngate_qnorm.weight" in weights)
