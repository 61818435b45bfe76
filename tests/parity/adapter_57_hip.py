"""HiP's tree search against the authors' CPU draft, and its sparse attention against their kernel."""

from __future__ import annotations

from case import Case
from torch import Tensor

from heed.language.hip import HiPBudget, search_blocks, sparse_attention


def run(case: Case) -> dict[str, Tensor]:
    if case.kind != "tree":
        raise ValueError(f"no adapter for kind {case.kind!r}")
    return tree(case)


def tree(case: Case) -> dict[str, Tensor]:
    c = case.config
    if c.get("oracle_rep") or c.get("num_sifter", 1) > 1:
        raise NotImplementedError("oracle_rep and sifters of the authors' draft are not part of heed")
    budget = HiPBudget(
        mask_k=c["mask_k"],
        block_q=c["block_size_q"],
        block_k=c["block_size_k"],
        group=c["block_size_k_group"],
        window=c["sliding_window_size"] or None,
        sinks=c["num_sink_tokens"],
    )
    q, k, v = (case.inputs[name][None] for name in ("q", "k", "v"))
    selection = search_blocks(q, k, budget)
    return {
        "output.indices": selection.index[0].int(),
        "output.ks": selection.count.expand(q.shape[1], -1).int(),
        "output.context": sparse_attention(q, k, v, selection, scale=1.0)[0],
    }
