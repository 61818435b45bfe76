"""Block Transformers against the authors' classes: losses, logits, gradient of the token table, greedy generation."""

from __future__ import annotations

from typing import Any

from case import Case
from torch import Tensor

from heed.language.block_transformer import BlockTransformer, BlockTransformerConfig


def run(case: Case) -> dict[str, Tensor]:
    if case.kind != "block_transformer":
        raise ValueError(f"no adapter for kind {case.kind!r}")
    return block_transformer(case)


def block_transformer(case: Case) -> dict[str, Tensor]:
    model = BlockTransformer(settings(case.config)).load_authors(case.state).eval()
    ids, mask, block_mask = (
        case.inputs[name].long() for name in ("input_ids", "attention_mask", "block_attention_mask")
    )
    trained = model(ids, mask, block_mask, labels=ids)
    trained.loss.backward()
    plain = model(ids, mask, block_mask)
    result = {
        "output.block_embeddings": plain.block_embeddings,
        "output.block_hidden": plain.block_hidden,
        "output.logits": plain.logits,
        "output.loss": trained.loss[None],
        "output.token_decoding_loss": trained.token_loss[None],
        "grad.embedder_embedding": model.embedder.table.grad,
    }
    if trained.block_loss is not None:
        result["output.block_decoding_loss"] = trained.block_loss[None]
    if "prompt" in case.inputs:
        longest = case.config.get("max_length", 19)  # the card's; the file only says that there is one
        result["output.generated"] = model.generate(
            case.inputs["prompt"].long(), max_length=longest, prefix_positions="authors"
        )
    return {name: value.detach() for name, value in result.items()}


def settings(c: dict[str, Any]) -> BlockTransformerConfig:
    # The note of the cases: a quarter of a head's features rotates where they are a multiple of 8, else half of them.
    rotary = {p: 0.25 if c[f"{p}_hidden"] // c[f"{p}_heads"] % 8 == 0 else 0.5 for p in ("block", "token")}
    return BlockTransformerConfig(
        vocab_size=c["vocab"],
        block_length=c["block_length"],
        n_embedding_tokens=c["n_embedding_tokens"],
        embedder=c["embedder"],
        embedder_width=c["emb_hidden"],
        embedder_layers=c.get("emb_layers", 1),
        embedder_heads=c.get("emb_heads"),
        embedder_positions=40,
        n_cls=c.get("n_cls", 1),
        projection=c["projection"],
        block_layers=c["block_layers"],
        block_width=c["block_hidden"],
        block_heads=c["block_heads"],
        token_layers=c["token_layers"],
        token_width=c["token_hidden"],
        token_heads=c["token_heads"],
        strategy=c["strategy"],
        expansion_method=c["expansion_method"],
        expansion_ratio=c.get("expansion_ratio"),
        block_loss=c.get("block_loss"),
        block_loss_weight=c.get("block_w", 1.0),
        block_rotary_pct=rotary["block"],
        token_rotary_pct=rotary["token"],
    )
