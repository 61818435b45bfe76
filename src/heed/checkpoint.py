"""Reading and writing weights. No pickle is ever executed: safetensors, or torch.load(weights_only=True)."""

from __future__ import annotations

import os
import pickle
import tempfile
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

# Where the repositories keep the weights inside a checkpoint, in the order of preference.
_NESTS = ("state_dict", "model", "model_state_dict", "module")


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a .safetensors file or in a PyTorch checkpoint (bare, or under one of the usual keys).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, holds no weights, or is a pickle that would run code.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} is not a readable safetensors file (truncated?): {error}") from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is refused: it holds more than tensors, and unpickling it could run code. "
            f"Convert it to safetensors where you trust it. ({str(error).splitlines()[0]})"
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path} is not a readable checkpoint (truncated?): {error}") from error
    while isinstance(content, dict) and not any(isinstance(value, Tensor) for value in content.values()):
        nest = next((key for key in _NESTS if isinstance(content.get(key), dict)), None)
        if nest is None:
            raise ValueError(f"{path} holds no weights; its keys are {sorted(map(str, content))[:8]}")
        content = content[nest]
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a state dict")
    weights = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    if all(key.startswith("module.") for key in weights):  # saved from DataParallel
        weights = {key.removeprefix("module."): value for key, value in weights.items()}
    return weights


def load_weights(module: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """Load `weights` into `module`; every key must be there, none left over, and every shape must fit."""
    own = module.state_dict()
    missing = sorted(own.keys() - weights.keys())
    surplus = sorted(weights.keys() - own.keys())
    shapes = [
        f"{key} {tuple(weights[key].shape)} for {tuple(own[key].shape)}"
        for key in own.keys() & weights.keys()
        if own[key].shape != weights[key].shape
    ]
    problems = [
        f"{title}: {', '.join(keys[:6])}{f' and {len(keys) - 6} more' if len(keys) > 6 else ''}"
        for title, keys in (("missing", missing), ("not known to the model", surplus), ("wrong shapes", sorted(shapes)))
        if keys
    ]
    if problems:
        raise ValueError(f"{source} does not fit {type(module).__name__}; {'; '.join(problems)}")
    module.load_state_dict(weights)


def write_weights(module: nn.Module, path: str | Path) -> None:
    """Write a module's state dict as safetensors, atomically."""
    path = Path(path)
    state = {key: value.detach().cpu().contiguous() for key, value in module.state_dict().items()}
    write_atomically(path, safetensors.torch.save(state, metadata={"format": "pt"}))


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a file so that a reader sees either the old content or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
