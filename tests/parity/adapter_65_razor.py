"""Razor's head scores against the authors' tool, and its compressed heads against the paper's equations."""

from __future__ import annotations

import torch
from case import Case
from torch import Tensor, nn

from heed.hosts.rules import AttentionCall, plain_attention
from heed.language.razor import HeadScores, Razor, RetrievalHeads, WindowStore, repeated_scores, top_heads


def run(case: Case) -> dict[str, Tensor]:
    if case.kind == "head_scores":
        return head_scores(case)
    if case.kind == "compensation":
        return compensation(case)
    raise ValueError(f"unknown kind {case.kind!r}")


def head_scores(case: Case) -> dict[str, Tensor]:
    c, attention = case.config, case.inputs["attention"]
    rows = torch.arange(c["segment"], c["segment"] * c["repeats"])
    maps = attention[:, :, rows + 1]  # after BOS
    induction, echo = (x.mean(-1) for x in repeated_scores(maps, rows, c["segment"], begin=1))
    scores = HeadScores(induction, echo, c["kv_heads"])
    induction_kv, echo_kv = scores.grouped()
    ratios = c["induction_head_ratio"], c["echo_head_ratio"]
    return {
        "output.induction_score": induction,
        "output.echo_score": echo,
        "output.induction_score_kv": induction_kv,
        "output.echo_score_kv": echo_kv,
        "output.induction_heads": top_heads(induction_kv, ratios[0]).to(torch.uint8),
        "output.echo_heads": top_heads(echo_kv, ratios[1]).to(torch.uint8),
        "output.retrieval_heads": scores.select(*ratios).mask().to(torch.uint8),
    }


def compensation(case: Case) -> dict[str, Tensor]:
    c = case.config
    q, k, v = (case.inputs[name] for name in ("q", "k", "v"))
    heads = RetrievalHeads.of(case.inputs["retrieval_kv_heads"].bool()[None])
    razor = Razor(heads, window=c["S0"], divisor=c["C"], sinks=c["sink"])
    rule = razor.rule()
    layer = razor.layer(0, rule)
    scale = q.shape[-1] ** -0.5

    def step(query: Tensor, begin: int, stop: int) -> Tensor:
        keys, values = layer.update(k[:, :, begin:stop], v[:, :, begin:stop])
        call = AttentionCall(nn.Identity(), 0, query, keys, values, None, causal=stop - begin > 1, scale=scale)
        out = rule.core(call)
        return rule.after(call, plain_attention(call) if out is None else out).transpose(1, 2)

    prompt = c["prefill"]
    step(torch.zeros(len(q), c["heads"], prompt, q.shape[-1]), 0, prompt)  # whose output the case does not look at
    out = torch.cat([step(q[:, :, t : t + 1], prompt + t, prompt + t + 1) for t in range(c["decode"])], 2)
    # The case has the mean token of the retrieval heads too, which do not use one.
    every = WindowStore.empty(k, v).append(k[:, :, :prompt], v[:, :, :prompt], 0).compress(razor.budget)
    start, number = int(every.at[0, 0]), int(every.dropped[0])
    means = [x for x in (every.mean_keys, every.mean_values) if x is not None]
    call = AttentionCall(nn.Identity(), 0, q, k, v, None, causal=True, scale=scale)
    return {
        "output.k_comp": means[0],
        "output.v_comp": means[1],
        "output.dropped": torch.tensor([start, start + number, number], dtype=torch.int32),
        "output.out": out,
        "output.full_attention": plain_attention(call).transpose(1, 2),
    }
