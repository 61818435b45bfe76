"""Every objective around every encoder, and what cannot be an encoder."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import timm
import torch
from torch import nn

import heed
from heed.pretrain.color import ColorMask
from heed.pretrain.encoders import Encoder, encoder_for
from heed.pretrain.mae import CONFIGS, MaskedAutoencoder, MaskedViTConfig, masked_vit
from heed.pretrain.masks import GridMask, RandomMask, order_of, take
from heed.pretrain.noise import NoiseBank
from heed.pretrain.objective import Objective, objectives
from heed.pretrain.patches import normalise_patches, patchify, restore_patches, unpatchify
from heed.pretrain.positions import sincos_positions

BANK = NoiseBank.make("green", patterns=4, size=8)
TIMM = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 3}
DECODER = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}


def timm_vit(**options: object) -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", **{**TIMM, **options})


def heed_vit(**options: object) -> nn.Module:
    given = {"img_size": 32, "patch_size": 8, "in_chans": 3, "dim": 24, "depth": 2, "num_heads": 2, **options}
    return heed.create_model("vit_micro", num_classes=3, **given)


# A new kind of encoder, or a new objective, adds a line.
ENCODERS: dict[str, Callable[[], nn.Module]] = {
    "heed": heed_vit,
    "timm, class token": timm_vit,
    "timm, registers": partial(timm_vit, reg_tokens=2, no_embed_class=True),
    "timm, no prefix": partial(timm_vit, class_token=False, global_pool="avg"),
}
OBJECTIVES: dict[str, Callable[[nn.Module], Objective]] = {
    "mae": lambda model: MaskedAutoencoder(model, RandomMask(0.75), **DECODER),
    "colormae": lambda model: MaskedAutoencoder(model, ColorMask(BANK), norm_pix=False, **DECODER),
}


@pytest.fixture(params=ENCODERS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return ENCODERS[request.param]()


@pytest.fixture(params=OBJECTIVES)
def make(request: pytest.FixtureRequest) -> Callable[[nn.Module], Objective]:
    return OBJECTIVES[request.param]


def images(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_the_generator_alone_decides(make, model) -> None:
    objective = make(model)
    one, other = objective(images(), rng()), objective(images(), rng())
    assert one.loss.shape == ()
    assert torch.equal(one.loss, other.loss)
    assert all(not shown.requires_grad for shown in one.shown.values())


def test_everything_learns_but_fixed_positions_and_the_classifier(make, model) -> None:
    objective = make(model)
    objective(images(), rng()).loss.backward()
    silent = {
        name for name, p in objective.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())
    }
    assert all(".head." in name or "fc_norm" in name for name in silent), silent
    assert not objective.encoder.position_table()[0].requires_grad


def test_it_gets_better(make, model) -> None:
    objective = make(model)
    optimizer = torch.optim.AdamW(objective.parameters(), 3e-3)
    losses = []
    for _ in range(20):
        loss = objective(images(), rng()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_pictures_have_the_images_form(make, model) -> None:
    objective = make(model)
    before = torch.get_rng_state()
    pictures = objective.pictures(images(), rng())
    assert pictures
    for picture in pictures.values():
        assert picture.shape == images().shape
        assert not picture.requires_grad
    assert torch.equal(torch.get_rng_state(), before)
    masked = pictures["masked"]
    assert torch.equal(masked[~masked.isnan()], images()[~masked.isnan()])
    seen = torch.where(masked.isnan(), pictures["reconstructed"], masked)
    torch.testing.assert_close(pictures["reconstructed"], seen)


def test_bfloat16_autocast_stays_near(make, model) -> None:
    objective = make(model)
    with torch.autocast("cpu", torch.bfloat16):
        low = objective(images(), rng()).loss
    torch.testing.assert_close(low.float(), objective(images(), rng()).loss, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("name", ENCODERS)
def test_state_comes_back(make, name: str) -> None:
    objective, other = make(ENCODERS[name]()), make(ENCODERS[name]())
    assert not torch.equal(objective(images(), rng()).loss, other(images(), rng()).loss)
    other.load_state_dict(objective.state_dict())
    assert torch.equal(objective(images(), rng()).loss, other(images(), rng()).loss)


def test_an_encoder_of_all_tokens_in_any_order_is_the_backbone(model) -> None:
    encoder = encoder_for(model).eval()
    everything = encoder(images())
    assert everything.shape == (2, encoder.prefix + 16, encoder.dim)
    shuffled = torch.stack([torch.randperm(16) for _ in range(2)])
    got = encoder(images(), shuffled)
    torch.testing.assert_close(got[:, encoder.prefix :], take(everything[:, encoder.prefix :], shuffled))
    torch.testing.assert_close(got[:, : encoder.prefix], everything[:, : encoder.prefix])
    logits = model.forward_head(model.forward_features(images()))
    torch.testing.assert_close(encoder.backbone.get_classifier()(encoder.pooled(images())), logits)


def test_dropped_tokens_have_no_influence(model) -> None:
    encoder = encoder_for(model)
    order = order_of(RandomMask(0.5)(2, encoder.grid, generator=rng()))
    pixels = images().requires_grad_()
    encoder(pixels, order.keep).square().sum().backward()
    touched = patchify(pixels.grad, encoder.patch).abs().sum(-1) > 0  # type: ignore[arg-type]
    assert torch.equal(touched, ~order.mask)


def test_encoders_stay_what_they_are(model) -> None:
    encoder = encoder_for(model)
    assert encoder_for(encoder) is encoder
    assert encoder.backbone is model


@pytest.mark.parametrize("attention", ["neighborhood", "hilo"])
def test_mechanisms_that_need_the_grid_are_refused(attention: str) -> None:
    with pytest.raises(ValueError, match=f"attention='{attention}' needs the whole grid"):
        MaskedAutoencoder(heed_vit(attention=attention), RandomMask())


def test_what_is_no_encoder_is_refused() -> None:
    with pytest.raises(TypeError, match="Linear is no encoder"):
        MaskedAutoencoder(nn.Linear(2, 2), RandomMask())
    with pytest.raises(ValueError, match="not tiled by cells of side 3"):
        MaskedAutoencoder(heed_vit(), GridMask(3))
    with pytest.raises(ValueError, match="no table of positions"):
        MaskedAutoencoder(timm_vit(pos_embed="none"), RandomMask())
    with pytest.raises(ValueError, match="single value"):
        MaskedAutoencoder(heed.create_model("vit_micro", patch_size=1), RandomMask())
    with pytest.raises(ValueError, match="dim=15 is not divisible by num_heads=2"):
        MaskedAutoencoder(heed_vit(), RandomMask(), decoder_dim=15, decoder_heads=2)
    with pytest.raises(ValueError, match="takes images"):
        MaskedAutoencoder(heed_vit(), RandomMask())(torch.zeros(1, 1, 32, 32))


def test_color_costs_nothing() -> None:
    """The card's claim: the same parameters and the same number of visible tokens as with random masks."""
    sizes = {
        mask: sum(p.numel() for p in masked_vit("vit_base", mask, depth=2, decoder_depth=1).parameters())
        for mask in (RandomMask(), ColorMask(BANK))
    }
    assert len(set(sizes.values())) == 1
    assert RandomMask().visible((14, 14)) == ColorMask(BANK).visible((14, 14)) == 49


def test_the_published_size() -> None:
    with torch.device("meta"):
        model = masked_vit("vit_base", RandomMask())
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    assert (sum(count.values()), count["encoder"], count["decoder"]) == (111_907_840, 85_798_656, 26_109_184)
    assert sum(p.numel() for p in model.parameters() if not p.requires_grad) == 252_160
    assert CONFIGS["vit_large"].depth == 24


def test_settings_of_a_masked_vit() -> None:
    with pytest.raises(ValueError, match="did you mean 'vit_base'"):
        masked_vit("vit_bass", RandomMask())
    with pytest.raises(ValueError, match="did you mean 'depth'"):
        masked_vit("vit_base", RandomMask(), depht=2)


def test_registered_objectives_have_small_decoders() -> None:
    assert {"mae-random", "mae-block", "mae-grid", "mae-green"} <= set(objectives.names())
    objective = objectives.get("mae-grid")(heed_vit(), ratio=0.75)
    assert isinstance(objective, MaskedAutoencoder)
    assert objective.mask == GridMask(2)
    with pytest.raises(ValueError, match=r"ratio=0.6: a grid mask keeps one token of 4, 9"):
        objectives.get("mae-grid")(heed_vit(), ratio=0.6)


def test_a_target_taken_for_a_constant_changes_the_gradient_alone() -> None:
    results = []
    for detach in (False, True):
        torch.manual_seed(0)
        config = MaskedViTConfig(32, 8, dim=24, depth=1, num_heads=2, detach_target=detach, **DECODER)
        pixels = images().requires_grad_()
        loss = masked_vit(config, RandomMask())(pixels, rng()).loss
        loss.backward()
        results.append((loss.detach(), pixels.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert not torch.allclose(results[0][1], results[1][1])


def test_patches_go_and_come_back() -> None:
    x = torch.randn(2, 3, 8, 12)
    patches = patchify(x, 4)
    assert torch.equal(unpatchify(patches, 4, (2, 3)), x)
    assert torch.equal(patches[0, 1].view(4, 4, 3), x[0, :, :4, 4:8].permute(1, 2, 0))
    normal = normalise_patches(patches)
    torch.testing.assert_close(normal.mean(-1), torch.zeros(2, 6), rtol=0, atol=1e-5)
    torch.testing.assert_close(normal.var(-1), torch.ones(2, 6))
    torch.testing.assert_close(restore_patches(normal, patches), patches)
    with pytest.raises(ValueError, match="8 x 12 pixels are not tiled"):
        patchify(x, 5)


def test_positions() -> None:
    rows, columns = (sincos_positions((3, 2), 8, first=first) for first in ("row", "column"))
    assert torch.equal(rows, torch.cat([columns[:, 4:], columns[:, :4]], 1))
    assert torch.equal(rows[0, :4], rows[1, :4])  # tokens 0 and 1 share the row
    assert torch.equal(sincos_positions((3, 2), 8, prefix=1)[1:], rows)
    assert not sincos_positions((3, 2), 8, prefix=1)[0].any()
    with pytest.raises(ValueError, match="dim=6"):
        sincos_positions((2, 2), 6)
    with pytest.raises(ValueError, match="'colum'; did you mean 'column'"):
        sincos_positions((2, 2), 8, first="colum")  # type: ignore[arg-type]


def test_an_encoder_of_ones_own() -> None:
    class Mean(Encoder):
        """The mean colour of every patch."""

        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.dim, self.channels, self.patch, self.grid, self.prefix = None, 8, 3, 8, (4, 4), 0
            self.embed, self.table = nn.Linear(192, 8), nn.Parameter(torch.zeros(16, 8))

        def forward(self, images, keep=None):
            x = self.embed(patchify(images, self.patch)) + self.table
            return x if keep is None else take(x, keep)

        def pooled(self, images):
            return self(images).mean(1)

        def position_table(self):
            return self.table, 0

    objective = MaskedAutoencoder(Mean(), RandomMask(), **DECODER)
    assert objective(images()).loss.isfinite()
