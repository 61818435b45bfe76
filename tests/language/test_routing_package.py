"""The PyTorch package's rule of routing: what its clusters may see, when its centroids move, bad settings."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from heed.language.routing import (
    PackageAttention,
    PackageConfig,
    PackageLM,
    PackageSeq2Seq,
    generate,
    routing_lm,
)

PACKAGE: dict[str, Any] = {
    "vocab": 17, "dim": 16, "layers": 2, "heads": 2, "head_dim": 8, "length": 24, "window": 6, "local_window": 8,
    "local_heads": (1, 0),
}  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [{}, {"share_qk": False}, {"memory": 2, "norm": "scale"}, {"norm": "rezero", "glu": True}, {"causal": False}],
)
def test_package_rule_learns_and_moves_its_centroids(options: dict[str, Any]) -> None:
    model = routing_lm("lucidrains", **PACKAGE | options)
    assert isinstance(model, PackageLM)
    for name, p in model.named_parameters():
        if name.endswith("_g"):
            torch.nn.init.ones_(p)
    ids = torch.randint(17, (2, 21))  # padded to 24
    model.train()(ids)
    kmeans = model.blocks[1].attn.kmeans
    assert kmeans.initted
    before = kmeans.means.clone()
    logits = model(torch.randint(17, (2, 21)))
    assert torch.equal(kmeans.means, before)
    (logits.square().sum() + model.auxiliary_loss).backward()
    assert not torch.equal(kmeans.means, before)
    silent = {n for n, p in model.named_parameters() if p.numel() and (p.grad is None or not p.grad.any())}
    assert silent == set()
    before = kmeans.means.clone()
    model.eval()(ids)
    model.update_kmeans()
    assert torch.equal(kmeans.means, before)


def test_package_rule_sees_no_later_tokens_in_a_cluster() -> None:
    model = routing_lm("lucidrains", **PACKAGE | {"window": 24}).eval()
    ids = torch.randint(17, (1, 24))
    before = model(ids)
    ids[:, 13] = (ids[:, 13] + 1) % 17
    moved = (model(ids) - before).abs().amax((0, 2)) > 1e-6
    assert not moved[:13].any()
    assert moved[13]
    assert generate(model, ids[:, :5], 3, temperature=0).shape == (1, 8)


def test_package_encoder_decoder() -> None:
    model = PackageSeq2Seq(PackageConfig(**PACKAGE, source_vocab=11, source_layers=1, source_length=12))
    source, ids = torch.randint(11, (2, 10)), torch.randint(17, (2, 24))
    logits = model(source, ids, torch.arange(10).expand(2, 10) < 7)
    assert logits.shape == (2, 24, 17)
    (logits.square().sum() + model.auxiliary_loss).backward()
    assert model.encoder.token_emb.weight.grad is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 25}, "length=25 must be a multiple of window=6"),
        ({"local_heads": 3}, "local_heads=3 must lie in 0 .. heads=2"),
        ({"local_heads": (1,)}, "needs one number for each of the 2 layers"),
        ({"dim": 15, "head_dim": None}, "dim=15 is not divisible by heads=2"),
        ({"head_dim": 7}, "need heads of even width"),
        ({"norm": "batch"}, "unknown norm"),
    ],
)
def test_bad_package_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        routing_lm("lucidrains", **PACKAGE | options)


def test_bad_package_input() -> None:
    config = PackageConfig(**PACKAGE)
    reader = dataclasses.replace(config, causal=False)
    model = routing_lm("lucidrains", **PACKAGE)
    x = torch.zeros(1, 24, 16)
    for wrong, message in (
        (lambda: model(torch.zeros(1, 30, dtype=torch.long)), "up to length=24"),
        (lambda: PackageAttention(config, 1)(x[:, :9]), "9 tokens are not a multiple of local_window=8"),
        (lambda: PackageAttention(reader, 0, context=True)(x), "context=True takes a memory"),
        (lambda: PackageAttention(reader, 1, context=True), "causal=False, local_heads=1"),
        (lambda: PackageAttention(config, 0, context=True), "causal=True, local_heads=0"),
        (lambda: PackageSeq2Seq(dataclasses.replace(config, causal=False)), "must not see what it predicts"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()
