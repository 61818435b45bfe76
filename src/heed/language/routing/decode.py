"""Writing texts: step by step with caches, as the authors decode, and with nucleus sampling.

    at step t, every cluster chooses its w members among tokens 0 .. t;   y_t = sum of softmax(q_t k[members]^T) v[members]
    over the clusters that chose t, / (their number + 0.01)

The authors run the routing of the whole cache and read one row; here only the row of the new token is computed, from
distances that the caches keep. A full pass over a finished text can choose other members for early tokens, since later
ones compete for the places: its logits are those of the steps only where that does not happen, such as at the last token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from heed.catalogue import provides
from heed.errors import MissingExtra
from heed.language.routing.model import RoutingTransformerLM
from heed.language.routing.package import PackageLM

if TYPE_CHECKING:
    from transformers import LogitsProcessorList

NextLogits = Callable[[Int[Tensor, "B T"]], Float[Tensor, "B V"]]


@provides("08-routing")
@torch.no_grad()
def generate(
    model: RoutingTransformerLM | PackageLM,
    prompt: Int[Tensor, "B T"],
    tokens: int,
    *,
    temperature: float = 1.0,
    top_p: float = 0.9,
    processors: LogitsProcessorList | None = None,
    start: int | None = None,
    parallel_prompt: bool = False,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "B N"]:
    """Continue texts by sampling from the nucleus; puts the model into evaluation mode and back.

    Args:
        model: `RoutingTransformerLM` decodes with caches; `PackageLM` reads the last `length` ids anew for every id, as the
            package does.
        prompt: (B, T), without padding; T may be 0 with `start`.
        tokens: how many ids to add.
        temperature: divides the logits; 0 takes the likeliest id.
        top_p: share of the probability that is sampled from; 1 for all. The authors' is 0.9.
        processors: transformers' logits processors, in the place of temperature and top_p.
        start: an id to begin with that is not returned: 0 for models trained by `RoutingTransformerLM.score`.
        parallel_prompt: read the prompt in one full pass instead of step by step. Faster, and prompts choose clusters as in
            training; `RoutingTransformerLM` only, T at least the window.
        generator: makes the samples repeatable.

    Returns:
        (B, T + tokens).

    Raises:
        ValueError: nothing to begin with, more ids than the model's length, or settings outside their ranges.
    """
    read = prompt if start is None else torch.cat([prompt.new_full((len(prompt), 1), start), prompt], 1)
    if not read.shape[1]:
        raise ValueError("the prompt is empty: give an id to start with, such as start=0")
    if tokens < 0 or temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(f"tokens={tokens} and temperature={temperature} must not be negative, top_p={top_p} in (0, 1]")
    process = processors if processors is not None else _nucleus(temperature, top_p)
    training = model.training
    model.eval()
    try:
        after = (
            _steps(model, read, tokens, parallel_prompt) if isinstance(model, RoutingTransformerLM) else _anew(model)
        )
        for _ in range(tokens):
            logits = after(read)
            if process is not None:
                logits = process(read, logits)  # type: ignore[arg-type]
            if temperature == 0 and processors is None:
                new = logits.argmax(-1, keepdim=True)
            else:
                new = torch.multinomial(logits.float().softmax(-1), 1, generator=generator)
            read = torch.cat([read, new.to(read.dtype)], 1)
    finally:
        model.train(training)
    return read if start is None else read[:, 1:]


def _steps(model: RoutingTransformerLM, read: Tensor, tokens: int, parallel: bool) -> NextLogits:
    """A function that is given all ids and steps over those it has not seen."""
    needed = read.shape[1] + tokens
    if needed > model.config.length:
        raise ValueError(f"{needed} ids do not fit the model's length={model.config.length}; ask for fewer")
    caches = model.caches()

    def after(ids: Tensor) -> Tensor:
        if parallel and not caches[0].length:
            return model(ids, caches=caches)[:, -1]
        new = ids[:, caches[0].length :]
        return [model.step(column, caches) for column in new.unbind(1)][-1]

    return after


def _anew(model: PackageLM) -> NextLogits:
    return lambda ids: model(ids[:, -model.config.length :])[:, -1]


def _nucleus(temperature: float, top_p: float) -> LogitsProcessorList | None:
    if temperature == 0 or (temperature == 1 and top_p == 1):
        return None
    try:
        from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper
    except ImportError as error:
        raise MissingExtra("transformers", "language") from error
    return LogitsProcessorList([TemperatureLogitsWarper(float(temperature)), TopPLogitsWarper(top_p)])
