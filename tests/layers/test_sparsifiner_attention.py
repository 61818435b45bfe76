"""The connectivity predictor and its attention: what is kept, that the sparse path is exact, and bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from heed.layers.registry import create_layer
from heed.layers.sparsifiner import ConnectivityPredictor, SparsifinerAttention, largest

TOKENS = 17
quick = settings(max_examples=15, deadline=None)


def layer_and_input(tokens: int = TOKENS, **options: Any) -> tuple[SparsifinerAttention, Tensor]:
    torch.manual_seed(0)
    settings = {"keep": 0.3, "reduce_n": 2, "coef_topk": 3} | options
    layer = SparsifinerAttention(24, 3, tokens, **settings).eval()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer, torch.randn(2, tokens, 24)


@quick
@given(st.floats(0.05, 1.0), st.sampled_from([1, 3, 8]), st.sampled_from(["auto", "tiled", "reference"]))
def test_only_kept_pairs_computed_equals_masked_dense(keep: float, share: int, backend: str) -> None:
    layer, x = layer_and_input(keep=keep, share=share)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HEED_BACKEND", backend)
        y = layer(x)
    q, k, v = (t.unflatten(-1, (3, 8)).transpose(1, 2) for t in layer.qkv(x).chunk(3, -1))
    mask = layer.mask_predictor.mask(layer.mask_predictor(q, k))
    weights = (q @ k.mT / 8**0.5).masked_fill(~mask, -torch.inf).softmax(-1)
    dense = layer.proj((weights @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(y, dense, rtol=1e-4, atol=1e-5)
    trace = layer.trace(x)
    torch.testing.assert_close(trace.output, dense, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(trace.masked.sum(-1), torch.ones(2, 3, TOKENS))
    torch.testing.assert_close(trace.masked, weights, rtol=1e-4, atol=1e-5)


@quick
@given(st.floats(0.01, 1.0), st.integers(0, 2), st.integers(1, 5))
def test_every_row_keeps_its_budget_and_prefix_rows_all(keep: float, prefix: int, share: int) -> None:
    layer, x = layer_and_input(keep=keep, prefix=prefix, share=share)
    mask = layer.trace(x).mask
    budget = -(-int(keep * TOKENS * 2**20) // 2**20)
    assert (mask[:, :, :prefix].sum(-1) == TOKENS).all()
    assert ((mask[:, :, prefix:].sum(-1) - budget).abs() <= 1).all()
    assert len(mask[:, :, prefix:].sum(-1).unique()) == 1


@pytest.mark.parametrize("share", [1, 4])
def test_keeping_all_is_dense_attention(share: int) -> None:
    layer, x = layer_and_input(keep=1.0, share=share)
    dense = Attention(24, 3, qkv_bias=True)
    dense.qkv.load_state_dict(layer.qkv.state_dict())
    dense.proj.load_state_dict(layer.proj.state_dict())
    torch.testing.assert_close(layer(x), dense(x), rtol=1e-4, atol=1e-5)


def test_gradients_are_those_of_the_masked_dense_layer_and_spare_the_predictor() -> None:
    layer, x = layer_and_input()
    layer, x, grads = layer.double(), x.double(), []
    for run in (lambda: layer(x), lambda: layer.trace(x).output):
        layer.zero_grad()
        run().square().sum().backward()
        assert all(p.grad is None for p in layer.mask_predictor.parameters())
        grads.append([p.grad for n, p in layer.named_parameters() if "mask_predictor" not in n])
    torch.testing.assert_close(*grads)


@quick
@given(st.randoms(use_true_random=False))
def test_permuting_patches_permutes_the_mask(random: Any) -> None:
    layer, x = layer_and_input()
    order = torch.tensor([0, *random.sample(range(1, TOKENS), TOKENS - 1)])
    mask = layer.trace(x).mask
    with torch.no_grad():
        for weight in (layer.mask_predictor.proj_n, layer.mask_predictor.up):
            weight.copy_(weight[order])
    assert torch.equal(layer.trace(x[:, order]).mask, mask[:, :, order][..., order])


def test_queries_that_share_decide_by_their_mean() -> None:
    layer, _ = layer_and_input(share=5)
    q = torch.randn(1, 3, TOKENS, 8)
    flat = q.clone()
    for first in (1, 6, 11, 16):
        flat[:, :, first : first + 5] = q[:, :, first : first + 5].mean(2, keepdim=True)
    alone = ConnectivityPredictor(8, 3, TOKENS, keep=0.3, reduce_n=2, coef_topk=3)
    alone.load_state_dict(layer.mask_predictor.state_dict())
    k = torch.randn(1, 3, TOKENS, 8)
    assert torch.equal(layer.mask_predictor.mask(layer.mask_predictor(q, k)), alone.mask(alone(flat, k)))


def test_thresholds_keep_what_scores_above_them() -> None:
    layer, x = layer_and_input(keep=None, score_threshold=0.8, coef_topk=None, coef_threshold=0.0)
    trace = layer.trace(x)
    assert torch.equal(trace.mask[:, :, 1:], trace.connectivity.scores > 0.8)
    assert 0 < trace.mask[:, :, 1:].float().mean() < 1
    torch.testing.assert_close(layer(x), trace.output, rtol=1e-4, atol=1e-5)


@quick
@given(st.integers(1, 12), st.integers(0, 1000))
def test_of_equal_scores_the_first_are_taken(count: int, seed: int) -> None:
    scores = torch.randint(0, 4, (5, 12), generator=torch.Generator().manual_seed(seed)).float()
    expected = [sorted(sorted(range(12), key=lambda i: (-row[i].item(), i))[:count]) for row in scores]
    assert largest(scores, count).sort(-1).values.tolist() == expected


def test_a_pruned_token_is_neither_seen_nor_matters() -> None:
    layer, x = layer_and_input(prune_rows=True, keep=0.9)
    token_mask = torch.arange(TOKENS - 1).expand(2, -1) % 3 != 0
    trace = layer.trace(x, token_mask)
    patches = trace.mask[:, :, 1:]
    assert not patches[..., 1:][~token_mask[:, None, None].expand_as(patches[..., 1:])].any()
    assert (patches.sum(-1) == torch.where(token_mask, int(token_mask[0].sum()), 0)[:, None]).all()
    torch.testing.assert_close(layer(x, token_mask), trace.output, rtol=1e-4, atol=1e-5)
    other = x.clone()
    other[:, 1:][~token_mask] = 9.0
    torch.testing.assert_close(layer(other, token_mask), layer(x, token_mask))
    assert layer.mask_predictor.keep == 0.9


def test_reconstruction_is_unmasked_and_reaches_the_predictor() -> None:
    layer, x = layer_and_input(shared_projection=True)
    layer.train().mask_predictor.reconstructing = True
    trace = layer.trace(x)
    torch.testing.assert_close(layer(x), trace.output, rtol=1e-4, atol=1e-5)
    assert torch.equal(trace.masked, trace.unmasked)
    trace.connectivity.scores.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in layer.mask_predictor.parameters())
    assert layer.eval().trace(x).connectivity.scores.min() >= 0


def test_multiply_adds_of_the_card() -> None:
    saved = {0.5: (0.19, 0.25), 0.25: (0.44, 0.50), 0.1: (0.59, 0.65), 0.05: (0.64, 0.70)}
    for keep, bounds in saved.items():
        layer = SparsifinerAttention(384, 6, 197, keep=keep)
        for density, bound in zip((1.0, 0.1), bounds, strict=True):
            macs = layer.macs(density=density)
            work = macs["predictor"] + macs["up"] + macs["attention"]
            assert macs["dense"] == 2 * 197**2 * 384
            assert 1 - work / macs["dense"] == pytest.approx(bound, abs=0.006)


def test_takes_over_timms_attention() -> None:
    theirs = Attention(24, 3, qkv_bias=True, qk_norm=True, norm_layer=nn.LayerNorm).eval()
    ours = SparsifinerAttention.from_attention(theirs, TOKENS, keep=1.0, coef_topk=1).eval()
    x = torch.randn(2, TOKENS, 24)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    assert ours.qkv is theirs.qkv
    with pytest.raises(ValueError, match="it has gate"):
        SparsifinerAttention.from_attention(Attention(24, 3, gated=True), TOKENS)
    with pytest.raises(ValueError, match="no joint projection"):
        SparsifinerAttention.from_attention(nn.Linear(2, 2), TOKENS)
    with pytest.raises(ValueError, match="heads do not make up its channels"):
        SparsifinerAttention.from_attention(Attention(24, 3, attn_head_dim=4), TOKENS)


def test_works_on_grids() -> None:
    layer = create_layer("sparsifiner", 24, 3, (4, 6), keep=0.5)
    x = torch.randn(2, 4, 6, 24)
    torch.testing.assert_close(layer(x), layer(x.flatten(1, 2)).view(x.shape))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0.0}, r"keep=0.0 must lie in \(0, 1\]"),
        ({"keep": 1.5}, r"keep=1.5 must lie in"),
        ({"keep": None}, "give one of them"),
        ({"score_threshold": 0.1}, "give one of them"),
        ({"reduce_n": 20}, "0 basis vectors for 17 tokens"),
        ({"reduce_c": 9}, "leave 0 channels of 8"),
        ({"coef_topk": 9}, r"coef_topk=9 must lie in 1..8"),
        ({"share": 0}, "share=0 be at least 1"),
        ({"prefix": 17}, r"prefix=17 must lie in 0..16"),
    ],
)
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer_and_input(**options)


def test_bad_input() -> None:
    layer, x = layer_and_input()
    with pytest.raises(ValueError, match="dim=25 is not divisible by num_heads=3"):
        SparsifinerAttention(25, 3, TOKENS)
    with pytest.raises(ValueError, match="input of 16 tokens: this layer's predictor takes 17"):
        layer(x[:, 1:])
    with pytest.raises(ValueError, match="16 queries and 17 keys given"):
        layer.mask_predictor(torch.randn(1, 3, 16, 8), torch.randn(1, 3, 17, 8))
    with pytest.raises(ValueError, match=r"takes \(B, N, 24\)"):
        layer(x[..., 1:])
    with pytest.raises(ValueError, match=r"token_mask must be bool \(2, 16\), not torch.bool \(2, 17\)"):
        layer(x, torch.ones(2, 17, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"leaves \[16, 15\] patches"):
        layer(x, torch.tensor([[True] * 16, [False] + [True] * 15]))
    with pytest.raises(ValueError, match="predicts its own mask"):
        layer(x, is_causal=True)
    shared, _ = layer_and_input(share=2)
    with pytest.raises(ValueError, match="token_mask with share=2"):
        shared(x, torch.ones(2, 16, dtype=torch.bool))
