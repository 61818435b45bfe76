"""Generation: one step of the block decoder per L tokens, and the token decoder's loop inside the block (card 15).

    pad the prompt on the left to whole blocks, embed them, h = block decoder(e)          no logits of the prompt
    repeat: t_1 ... t_L = token decoder(. | h of the last block);  e = embedder(t);  h = block decoder(e | cache)

The block decoder's cache has a position per block; the token decoder's is written over with every block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from heed.errors import unknown
from heed.language.block_transformer.neox import causal_mask
from heed.language.block_transformer.packing import to_blocks
from heed.language.block_transformer.token_decoder import BlockSteps, PrefixPositions

if TYPE_CHECKING:
    from transformers import LogitsProcessorList

    from heed.language.block_transformer.model import BlockTransformer

Choose = Callable[[Int[Tensor, "M T"], Float[Tensor, "M V"]], Int[Tensor, " M"]]


@torch.no_grad()
def generate(
    model: BlockTransformer,
    ids: Int[Tensor, "B P"],
    attention_mask: Int[Tensor, "B P"] | None = None,
    *,
    max_new_tokens: int | None = None,
    max_length: int | None = None,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    logits_processor: LogitsProcessorList | None = None,
    generator: torch.Generator | None = None,
    prefix_positions: PrefixPositions = "trained",
) -> Int[Tensor, "B T"]:
    """Continue prompts, greedily or by sampling.

    A row ends with the block in which it produces eos: the rest of that block is `generation_pad_id`, what follows is
    `pad_id`. Rows of a batch do not depend on each other.

    Args:
        ids: (B, P) prompts, shorter ones padded on the left.
        attention_mask: (B, P), 0 for that padding.
        max_new_tokens: tokens to produce. Exactly that many come, unless every row has ended.
        max_length: in its place, the authors' way to say how many: prompt and new tokens. As in their code, padding of the
            prompt to whole blocks counts when deciding to go on, so up to L - 1 tokens fewer can come back.
        do_sample: draw tokens instead of taking the most likely one.
        temperature, top_k, top_p: of sampling, as in transformers.
        logits_processor: of transformers, applied before these to what the block holds so far, bos first.
        generator: of sampling.
        prefix_positions: "trained" counts positions in a block as training does, 0 ... r n - 1 for the prefix and r n for
            the first token. "authors" is what their code does in generation alone: all prefix tokens at 0, the j-th token
            at j. The two are the same for a prefix of one token, and where there is none.

    Returns:
        (B, T), the prompts as given, with what follows them.

    Raises:
        ValueError: unknown prefix_positions; not exactly one length; an empty prompt; one longer than max_length; a
            mask of another shape, or that is not padding on the left.
        NotImplementedError: n_embedding_tokens above 1.
    """
    c = model.config
    if c.n_embedding_tokens > 1:
        raise NotImplementedError(
            f"generation with n_embedding_tokens={c.n_embedding_tokens}; the authors' code has it for 1 only"
        )
    total, stop = _lengths(ids, max_new_tokens, max_length, c.block_length)
    front = -ids.shape[1] % c.block_length
    blocks = to_blocks(ids, attention_mask, c.block_length, front, c.pad_id)
    if attention_mask is not None and bool((attention_mask.diff(dim=1) < 0).any()):
        raise ValueError("attention_mask must be padding on the left: zeros, then ones, in every row")
    if attention_mask is not None and not bool(attention_mask[:, -1].all()):
        raise ValueError("attention_mask must end with a token in every row: prompts are padded on the left")
    if prefix_positions not in get_args(PrefixPositions):
        raise ValueError(unknown("prefix_positions", prefix_positions, get_args(PrefixPositions)))
    choose = _chooser(do_sample, temperature, top_k, top_p, logits_processor, generator)

    steps = model.block_decoder.stepper(-(-(stop + front) // c.block_length))
    inner = model.token_decoder.start(prefix_positions)
    seen = blocks.block_mask != 0
    padded = not bool(seen.all())
    embeddings = model.embedder(blocks.ids, blocks.mask)[:, :, 0]
    mask = causal_mask(seen, seen.shape[1], 1, embeddings) if padded else None
    state = steps(embeddings, mask)[:, -1]
    made = [blocks.ids.flatten(1)]
    length = made[0].shape[1]
    alive = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
    while True:
        count = min(total + front - length, c.block_length)
        block = ids.new_full((len(ids), c.block_length), c.pad_id)
        rows = slice(None) if bool(alive.all()) else alive
        block[rows, :count] = _block(model, inner, state[rows, None], count, choose).to(ids.dtype)
        made.append(block)
        length += c.block_length
        if c.eos_id is not None:
            alive = alive & ~(block[:, :count] == c.eos_id).any(1)
        if length >= stop + front or not bool(alive.any()):
            break
        embeddings = model.embedder(block[:, None], None)[:, :, 0]
        if padded:
            seen = torch.cat([seen, alive[:, None]], 1)
            mask = causal_mask(seen, 1, 1, embeddings)
        state = steps(embeddings, mask if padded else None)[:, -1]
    return torch.cat(made, 1)[:, front : length - (c.block_length - count)]


def _block(model: BlockTransformer, inner: BlockSteps, state: Tensor, count: int, choose: Choose) -> Tensor:
    """The first `count` tokens (M, count) of the blocks that follow the states (M, 1, D_b)."""
    c = model.config
    inner.begin(model.token_decoder.expand(state))
    tokens = torch.full((len(state), count + 1), c.start_id, device=state.device)
    ended = torch.zeros(len(state), dtype=torch.bool, device=state.device)
    for i in range(count):
        token = choose(tokens[:, : i + 1], inner.next(tokens[:, i]))
        if c.eos_id is not None:
            token = token.masked_fill(ended, c.generation_pad_id)
            ended = ended | (token == c.eos_id)
        tokens[:, i + 1] = token
    return tokens[:, 1:]


def _lengths(ids: Tensor, new: int | None, longest: int | None, block: int) -> tuple[int, int]:
    """Length of the result, and from which length on no further block is begun; the authors' rule counts padding in."""
    prompt = ids.shape[1]
    if prompt == 0:
        raise ValueError(f"ids {tuple(ids.shape)} hold no prompt; give at least one token")
    if (new is None) == (longest is None):
        raise ValueError(f"give either max_new_tokens or max_length, not max_new_tokens={new} and max_length={longest}")
    if new is not None:
        if new < 1:
            raise ValueError(f"max_new_tokens={new} must be at least 1")
        return prompt + new, prompt + new
    if longest <= prompt:  # type: ignore[operator]
        raise ValueError(f"max_length={longest} counts the prompt of {prompt} tokens, and must be larger")
    return longest, max(longest - (-prompt % block), prompt + 1)  # type: ignore[operator,return-value]


def _chooser(
    sample: bool,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    given: LogitsProcessorList | None,
    generator: torch.Generator | None,
) -> Choose:
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    steps: list[Any] = [] if given is None else list(given)
    if sample:
        if temperature != 1:
            steps.append(TemperatureLogitsWarper(temperature))
        if top_k is not None:
            steps.append(TopKLogitsWarper(top_k))
        if top_p is not None:
            steps.append(TopPLogitsWarper(top_p))
    elif (temperature, top_k, top_p) != (1.0, None, None):
        raise ValueError(f"temperature={temperature}, top_k={top_k} and top_p={top_p} need do_sample=True")
    process: Any = LogitsProcessorList(steps)

    def choose(before: Tensor, logits: Tensor) -> Tensor:
        scores = process(before, logits.float()) if steps else logits
        if not sample:
            return scores.argmax(-1)
        return torch.multinomial(scores.softmax(-1), 1, generator=generator)[:, 0]

    return choose
