"""Masked autoencoders of mmpretrain, facebookresearch and transformers, in heed and in timm."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor

from heed.pretrain.color import ColorMask
from heed.pretrain.mae import MaskedAutoencoder, MaskedViTConfig, masked_vit
from heed.pretrain.mae_checkpoints import encoder_weights, fill_vitmae_positions, mae_weights
from heed.pretrain.masks import RandomMask, order_tokens
from heed.pretrain.noise import NoiseBank
from heed.pretrain.positions import sincos_positions

GOLDEN = Path(__file__).parents[1] / "golden" / "06-colormae"
CONFIG = MaskedViTConfig(32, 8, dim=24, depth=2, num_heads=2, decoder_dim=16, decoder_depth=1, decoder_heads=2)
MASK = ColorMask(NoiseBank.make("green", patterns=4, size=8))


def released() -> dict[str, Tensor]:
    tensors = load_file(GOLDEN / "tiny_mae.safetensors")
    return {key.removeprefix("state."): value for key, value in tensors.items() if key.startswith("state.")}


def test_a_released_file_nests_its_weights(tmp_path: Path) -> None:
    assert json.loads((GOLDEN / "tiny_mae.json").read_text())["config"]["embed_dims"] == CONFIG.dim
    torch.save({"state_dict": released(), "meta": {"epoch": 300}}, tmp_path / "colormae.pth")
    model = masked_vit(CONFIG, MASK).load_authors(tmp_path / "colormae.pth")
    assert torch.equal(model.decoder.mask_token, released()["neck.mask_token"])


def test_stored_tables_of_positions_are_kept() -> None:
    model = masked_vit(CONFIG, MASK, positions="column").load_authors(released())
    assert torch.equal(model.encoder.backbone.pos_embed, released()["backbone.pos_embed"])
    torch.testing.assert_close(released()["backbone.pos_embed"][0], sincos_positions((4, 4), 24, prefix=1))


def test_facebooks_names_are_read() -> None:
    first = masked_vit(CONFIG, MASK)
    renames = {"embed": "decoder_embed", "blocks": "decoder_blocks", "norm": "decoder_norm", "head": "decoder_pred"}
    weights = {}
    for key, value in first.state_dict().items():
        if key.startswith("encoder.backbone."):
            weights[key.removeprefix("encoder.backbone.")] = value
        else:
            part, _, rest = key.removeprefix("decoder.").partition(".")
            part = {"pos_embed": "decoder_pos_embed", "mask_token": "mask_token", **renames}[part]
            weights[f"{part}.{rest}" if rest else part] = value
    second = masked_vit(CONFIG, MASK).load_authors(weights)
    assert all(torch.equal(v, second.state_dict()[k]) for k, v in first.state_dict().items())


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(ValueError, match="missing: decoder.blocks.1"):
        masked_vit(CONFIG, MASK, decoder_depth=2).load_authors(released())


def test_the_encoder_goes_on_in_timm() -> None:
    """Hand-off: timm's classifier and its maps for dense heads, from a checkpoint and from a pre-trained objective."""
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, **options)
    vit.load_state_dict(encoder_weights(released()))
    golden = load_file(GOLDEN / "tiny_mae.safetensors")
    images = golden["input.images"]
    torch.testing.assert_close(
        vit.eval().forward_features(images), golden["output.features_unmasked"], rtol=1e-4, atol=2e-5
    )
    model = masked_vit(CONFIG, MASK).load_authors(released())
    backbone = model.encoder.backbone
    backbone.reset_classifier(5, "token")
    assert backbone(images).shape == (2, 5)
    maps = backbone.forward_intermediates(images, indices=[0, 1], intermediates_only=True)
    assert [tuple(m.shape) for m in maps] == [(2, 24, 4, 4)] * 2


def test_other_sizes_get_interpolated_positions() -> None:
    model = masked_vit(CONFIG, MASK).load_authors(released())
    before = model.encoder.backbone.pos_embed
    model.encoder.backbone.set_input_size(img_size=(64, 48))
    assert model.encoder.backbone.pos_embed.shape == (1, 8 * 6 + 1, 24)
    assert torch.equal(model.encoder.backbone.pos_embed[:, :1], before[:, :1])
    assert model.encoder(torch.randn(1, 3, 64, 48)).shape == (1, 49, 24)


class TestTransformers:
    """Through transformers' own ViTMAEForPreTraining."""

    @pytest.fixture
    def host(self):
        transformers = pytest.importorskip("transformers")
        config = transformers.ViTMAEConfig(
            image_size=32,
            patch_size=8,
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=96,
            decoder_hidden_size=16,
            decoder_num_hidden_layers=1,
            decoder_num_attention_heads=2,
            decoder_intermediate_size=64,
            layer_norm_eps=1e-6,
            norm_pix_loss=True,
            hidden_dropout_prob=0.0,
        )
        model = transformers.ViTMAEForPreTraining(config).eval()
        fill_vitmae_positions(model)
        return model

    def heed_twin(self, host, weights: dict[str, Tensor] | None = None) -> MaskedAutoencoder:
        return masked_vit(CONFIG, MASK).load_authors(host.state_dict() if weights is None else weights).eval()

    def test_positions_are_filled_column_first(self, host) -> None:
        wanted = sincos_positions((4, 4), 24, first="column", prefix=1)
        assert torch.equal(host.vit.embeddings.position_embeddings[0], wanted)
        with pytest.raises(TypeError, match="Linear is no ViTMAEForPreTraining"):
            fill_vitmae_positions(torch.nn.Linear(2, 2))

    @pytest.mark.parametrize("mask", [MASK, RandomMask(0.75)], ids=["green", "random"])
    def test_a_masks_scores_are_its_noise(self, host, mask) -> None:
        images = torch.randn(2, 3, 32, 32)
        scores = mask.scores(2, (4, 4), torch.Generator().manual_seed(0))
        theirs = host(images, noise=-scores)
        order = order_tokens(scores, mask.visible((4, 4)))
        assert torch.equal(theirs.mask.bool(), order.mask)
        assert torch.equal(theirs.ids_restore, order.restore)
        assert torch.equal(order.mask, mask(2, (4, 4), generator=torch.Generator().manual_seed(0)))
        ours = self.heed_twin(host)
        prediction = ours.decoder(ours.encoder(images, order.keep), order.restore)
        torch.testing.assert_close(prediction, theirs.logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.loss(prediction, images, order.mask), theirs.loss, rtol=1e-4, atol=1e-5)

    def test_the_names_of_older_releases_are_read(self, host) -> None:
        def old(key: str) -> str:
            key = key.replace("vit.layers.", "vit.encoder.layer.")
            for now, then in (
                ("attention.q_proj", "attention.attention.query"),
                ("attention.k_proj", "attention.attention.key"),
                ("attention.v_proj", "attention.attention.value"),
                ("attention.o_proj", "attention.output.dense"),
                ("mlp.fc1", "intermediate.dense"),
                ("mlp.fc2", "output.dense"),
            ):
                key = key.replace(now, then)
            return key

        before = {old(key): value for key, value in host.state_dict().items()}
        assert any("attention.attention.query" in key for key in before)
        one, other = mae_weights(before), mae_weights(host.state_dict())
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
        bare = {key.removeprefix("vit."): v for key, v in before.items() if key.startswith("vit.")}
        assert encoder_weights(bare).keys() == encoder_weights(before).keys()
