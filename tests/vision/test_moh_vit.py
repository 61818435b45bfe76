"""Mixture-of-Head attention in timm's own vision transformers."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from heed.layers.moh import active_heads, collect_balance
from heed.vision.moh import moh_vit


def vit(**settings: object) -> VisionTransformer:
    options = {
        "img_size": 16,
        "patch_size": 4,
        "embed_dim": 24,
        "depth": 2,
        "num_heads": 4,
        "num_classes": 3,
    } | settings
    return VisionTransformer(**options).eval()  # type: ignore[arg-type]


X = torch.randn(2, 3, 16, 16)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_even_gates_are_the_model_itself(qk_norm: bool) -> None:
    model = vit(qk_norm=qk_norm)
    before, names = model(X), set(model.state_dict())
    state = {key: value.clone() for key, value in model.state_dict().items()}
    moh_vit(model, 2, 2)
    assert {key for key in model.state_dict() if ".router." not in key} == names
    for name, parameter in model.named_parameters():
        if ".router." in name:
            nn.init.zeros_(parameter)
    torch.testing.assert_close(model(X), before)
    assert model.load_state_dict(state, strict=False).unexpected_keys == []


def test_heads_per_block_and_training() -> None:
    model = moh_vit(
        timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3, num_classes=2), [1, 1, 3], [1, 1, 0]
    )
    assert [(x.active, x.heads) for x in active_heads(model).values()] == [(2, 3), (2, 3), (3, 3)]
    with collect_balance(model) as balance:
        loss = model(torch.randn(2, 3, 32, 32)).square().mean()
    (loss + 0.01 * balance.loss()).backward()
    grad = model.get_parameter("blocks.0.attn.router.wg.weight").grad
    assert grad is not None
    assert grad.any()


def test_bad_input() -> None:
    model = vit()
    with pytest.raises(ValueError, match="shared has 1 entries, routed 2; the model has 2"):
        moh_vit(model, [2], [1, 1])
    with pytest.raises(ValueError, match="shared=4 and routed=1 of heads=4"):
        moh_vit(model, [2, 4], 1)
    assert not active_heads(model)
    with pytest.raises(ValueError, match="Sequential has no attention"):
        moh_vit(nn.Sequential(), 1, 1)
    with pytest.raises(ValueError, match="scale_norm or gated"):
        moh_vit(vit(scale_attn_norm=True), 2, 1)
    layer = moh_vit(model, 2, 1).get_submodule("blocks.0.attn")
    with pytest.raises(ValueError, match="attn_mask and is_causal"):
        layer(torch.randn(1, 3, 24), is_causal=True)
