"""Mixture-of-Head attention inside diffusers' own DiT transformer, built small."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from heed.diffusion.moh import MoHAttnProcessor, moh_dit
from heed.layers.moh import active_heads, collect_balance

diffusers = pytest.importorskip("diffusers")


def transformer() -> torch.nn.Module:
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=4,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=1000,  # DiTPipeline's number for no class
        norm_num_groups=4,
    ).eval()


def sample(model: torch.nn.Module) -> Tensor:
    torch.manual_seed(1)
    with torch.no_grad():
        return model(torch.randn(2, 4, 8, 8), torch.tensor([5, 900]), torch.tensor([1, 7])).sample


def test_even_gates_are_the_model_itself_and_back() -> None:
    model = transformer()
    before, names = sample(model), set(model.state_dict())
    processors = [block.attn1.processor for block in model.transformer_blocks]
    moh_dit(model, 2, 2)
    assert not torch.allclose(sample(model), before, atol=1e-4)
    for name, parameter in model.named_parameters():
        if ".router." in name:
            torch.nn.init.zeros_(parameter)
    torch.testing.assert_close(sample(model), before)
    for block, processor in zip(model.transformer_blocks, processors, strict=True):
        block.attn1.set_processor(processor)
    assert torch.equal(sample(model), before)
    assert set(model.state_dict()) == names


def test_routers_belong_to_the_model() -> None:
    model = transformer()
    moh_dit(model, [1, 4], [2, 0])
    assert [(x.active, x.heads) for x in active_heads(model).values()] == [(3, 4), (4, 4)]
    assert "transformer_blocks.0.attn1.processor.router.wg.weight" in model.state_dict()
    with collect_balance(model) as balance:
        model(torch.randn(2, 4, 8, 8), torch.tensor([5, 9]), torch.tensor([1, 7])).sample.sum().backward()
    assert len(balance.routings) == 1
    assert model.transformer_blocks[0].attn1.processor.router.wg.weight.grad.any()


def test_the_pipeline_samples() -> None:
    """DiTPipeline guides the first in_channels channels, as its own transformer."""
    model = transformer()
    moh_dit(model, 1, 2)
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    pipeline = diffusers.DiTPipeline(model, vae, diffusers.DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline([3], generator=torch.Generator().manual_seed(0), num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 8, 8, 3)


def test_bad_input() -> None:
    model = transformer()
    with pytest.raises(ValueError, match="shared has 1 entries, routed 2; the transformer has 2 blocks"):
        moh_dit(model, [1], [1, 1])
    with pytest.raises(ValueError, match="Linear has no transformer_blocks"):
        moh_dit(torch.nn.Linear(2, 2), 1, 1)
    attn = model.transformer_blocks[0].attn1
    attn.set_processor(MoHAttnProcessor(16, 8, 2, 2))
    with pytest.raises(ValueError, match="4 heads, its processor heads=8"):
        sample(model)
    attn.set_processor(MoHAttnProcessor(16, 4, 2, 2))
    with pytest.raises(ValueError, match="only self-attention"):
        attn(torch.randn(1, 3, 16), encoder_hidden_states=torch.randn(1, 3, 16))
