"""The LoRA recipe of LongLoRA and SinkLoRA: what is trained, for which context, and how.

    W -> W + (alpha / r) B A    for the projections of attention, r = 8, alpha = 16;   embeddings and norms are trained whole
    angle -> angle / factor,    factor = ceil(target length / original length)         linear position interpolation

Chen et al., "LongLoRA", arXiv 2309.12307; Chen et al., "Extending Context Window of Large Language Models via Positional
Interpolation", arXiv 2306.15595.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from heed.catalogue import provides
from heed.errors import MissingExtra

# Projections of attention, by the kind of model: Llama and its like, GPT-NeoX.
_TARGETS = (("q_proj", "k_proj", "v_proj", "o_proj"), ("query_key_value", "dense"))
_OTHERS = "trainable_params"  # the file with what is trained beside the adapters
_PREFIX = "base_model.model."  # what peft puts before the names of a model's parameters


@provides("70-sinklora")
@dataclass(frozen=True)
class LoRARecipe:
    """What is trained and how; the defaults are the papers'.

    Args:
        rank, alpha, dropout: of the adapters, without bias.
        targets: names of the projections that get adapters; None for those of attention (Llama, Mistral, Qwen, Gemma, ...:
            q_proj, k_proj, v_proj, o_proj; GPT-NeoX: query_key_value, dense).
        trainable: parameters with one of these in their name are trained whole. () is plain LoRA.
        learning_rate, weight_decay, warmup: of AdamW with a constant rate after `warmup` steps.
        steps: 1000 for LongLoRA's long-context models.
        accumulate: batches of one sequence to a step; 8 in LongLoRA, 1 in SinkLoRA.
    """

    rank: int = 8
    alpha: float = 16
    dropout: float = 0.0
    targets: tuple[str, ...] | None = None
    trainable: tuple[str, ...] = ("embed", "norm")
    learning_rate: float = 2e-5
    weight_decay: float = 0.0
    warmup: int = 20
    steps: int = 1000
    accumulate: int = 8

    def __post_init__(self) -> None:
        for name, least in (("rank", 1), ("warmup", 0), ("steps", 1), ("accumulate", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must lie in [0, 1)")

    def target_modules(self, model: nn.Module) -> list[str]:
        """Names of the modules of a model that get adapters, for peft's `target_modules`.

        Raises:
            ValueError: the model has none of them.
        """
        present = {name.rpartition(".")[2] for name, _ in model.named_modules()}
        choices = _TARGETS if self.targets is None else (self.targets,)
        found = next((list(names) for names in choices if present.issuperset(names)), None)
        if found is None:
            wanted = " or ".join(", ".join(names) for names in choices)
            raise ValueError(
                f"{type(model).__name__} has no modules {wanted}; name its projections with targets=(...), such as "
                "('c_attn', 'c_proj') for GPT-2"
            )
        return found

    def trained_whole(self, model: nn.Module) -> list[str]:
        """Names of the parameters that are trained beside the adapters."""
        names = [name for name, _ in model.named_parameters() if "lora_" not in name]
        return [name for name in names if any(part in name for part in self.trainable)]

    def prepare(self, model: nn.Module) -> Any:
        """Give a model of transformers adapters, and freeze all else but embeddings and norms.

        Returns:
            peft's model around it. `heed.apply` takes either.

        Raises:
            MissingExtra: peft is not installed.
            ValueError: the model has no projections of that name.
        """
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError as error:
            raise MissingExtra("peft", "lora") from error
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type] - any number will do
            lora_dropout=self.dropout,
            target_modules=self.target_modules(model),
            bias="none",
            task_type="CAUSAL_LM",
        )
        adapted = get_peft_model(model, config)  # type: ignore[arg-type]
        parameters = dict(adapted.named_parameters())
        for name in self.trained_whole(adapted):
            parameters[name].requires_grad_(True)
        return adapted

    def training_arguments(self) -> dict[str, Any]:
        """Settings for transformers' `TrainingArguments(output_dir, **these)`."""
        return {
            "learning_rate": self.learning_rate,
            "weight_decay": self.weight_decay,
            "warmup_steps": self.warmup,
            "lr_scheduler_type": "constant_with_warmup",
            "max_steps": self.steps,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": self.accumulate,
            "bf16": True,
        }


@provides("70-sinklora")
def rope_factor(target: int, original: int, existing: float = 1.0) -> float:
    """By how much positions are divided, ceil(target / (original * existing)); 1 where they fit already.

    Args:
        target: tokens of the context that is wanted.
        original: tokens that the model was pre-trained for.
        existing: a factor that its config has already. LongLoRA's scripts count the context as that much longer and then
            put the new factor in the old one's place; with the default the product is right.
    """
    if target < 1 or original < 1 or existing < 1:
        raise ValueError(f"target={target}, original={original} and existing={existing} must be at least 1")
    return float(max(1, math.ceil(target / (original * existing))))


@provides("70-sinklora")
def extended_config(config: Any, target: int) -> Any:
    """A copy of a config for a longer context, by linear position interpolation.

        model = AutoModelForCausalLM.from_pretrained(name, config=extended_config(config, 16384))

    max_position_embeddings stays what the model was pre-trained for, so that it and the factor tell the context together.

    Args:
        config: of transformers, with rope_parameters and max_position_embeddings.
        target: tokens of the context that is wanted; a config that reaches so far comes back as it is.

    Raises:
        ValueError: the model has no rotary positions, or scales them in another way already.
    """
    longer = copy.deepcopy(config)
    rope = getattr(config, "rope_parameters", None)
    if rope is None or "rope_type" not in rope:
        raise ValueError(
            f"{type(config).__name__} has no rotary positions that all layers share (rope_parameters={rope}), so they "
            "cannot be interpolated"
        )
    linear = rope["rope_type"] in ("default", "linear")
    if target <= config.max_position_embeddings * (rope.get("factor", 1.0) if linear else 1):
        return longer
    if not linear:
        raise ValueError(
            f"rope_type={rope['rope_type']!r} scales the positions in a way of its own; start from a model with 'default' "
            "or 'linear' positions"
        )
    factor = rope_factor(target, config.max_position_embeddings)
    longer.rope_parameters = {**rope, "rope_type": "linear", "factor": factor}
    return longer


@provides("70-sinklora")
def save_adapter(model: Any, folder: str | Path) -> None:
    """Save what was trained: peft's adapter, and the embeddings and norms in trainable_params.safetensors beside it.

    Args:
        model: what `LoRARecipe.prepare` returned.
        folder: is made where it is missing.
    """
    model.save_pretrained(folder)
    whole = {
        name.removeprefix(_PREFIX): parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and "lora_" not in name
    }
    if whole:
        save_file(whole, Path(folder) / f"{_OTHERS}.safetensors")


@provides("70-sinklora")
def load_adapter(model: nn.Module, folder: str | Path, *, trainable: bool = False) -> Any:
    """Put an adapter on the model it was trained for: one of `save_adapter`, or LongLoRA's with its trainable_params.bin.

    `load_adapter(model, folder).merge_and_unload()` is a plain model of transformers with everything in its weights.

    Args:
        model: with the config it was trained with, see `extended_config`; its embeddings and norms are overwritten.
        folder: local, with peft's adapter_config.json.
        trainable: go on training the adapters.

    Raises:
        MissingExtra: peft is not installed.
        ValueError: embeddings or norms that do not fit the model.
    """
    try:
        from peft import PeftModel
    except ImportError as error:
        raise MissingExtra("peft", "lora") from error
    whole = {name.removeprefix(_PREFIX): value for name, value in _whole(Path(folder)).items()}
    parameters = dict(model.named_parameters())
    for name, value in whole.items():
        if name not in parameters or parameters[name].shape != value.shape:
            has = f"is {tuple(parameters[name].shape)}" if name in parameters else "is not there"
            raise ValueError(
                f"{folder} has {name} {tuple(value.shape)}, which {has} in {type(model).__name__}; take the model it was "
                "trained for, after model.resize_token_embeddings where tokens were added"
            )
    with torch.no_grad():
        for name, value in whole.items():
            parameters[name].copy_(value)
    adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)  # type: ignore[arg-type]
    if trainable:
        for name, parameter in adapted.named_parameters():
            if name.removeprefix(_PREFIX) in whole:
                parameter.requires_grad_(True)
    return adapted


def _whole(folder: Path) -> dict[str, Tensor]:
    """What was trained beside the adapters, by name."""
    if (folder / f"{_OTHERS}.safetensors").exists():
        return load_file(folder / f"{_OTHERS}.safetensors")
    if (folder / f"{_OTHERS}.bin").exists():
        return torch.load(folder / f"{_OTHERS}.bin", weights_only=True, map_location="cpu")
    return {}
