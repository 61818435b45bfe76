"""Models with routing attention: decoding, the authors' names and counts, training, images."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import heed
from heed.language.routing import (
    RoutingAttention,
    RoutingConfig,
    RoutingEncoder,
    RoutingImageConfig,
    RoutingImageModel,
    RoutingSeq2Seq,
    RoutingSeq2SeqConfig,
    RoutingSettings,
    RoutingTransformerLM,
    adafactor,
    cut_randomly,
    generate,
    routing_lm,
    to_blocks,
)

EXACT = {"rtol": 1e-4, "atol": 1e-5}
SMALL: dict[str, Any] = {
    "dim": 32, "cluster_heads": 2, "local_heads": 2, "clusters": 3, "window": 6, "block": (4,), "max_relative": 5,
}  # fmt: skip
ALL_KINDS = SMALL | {"cluster_heads": 1, "cluster_strided_heads": 1, "strided_heads": 1, "local_heads": 1}
TEXT: dict[str, Any] = SMALL | {"vocab": 17, "layers": 2, "ffn_dim": 32, "length": 24}


def layer_of(**options: Any) -> RoutingAttention:
    torch.manual_seed(0)
    layer = RoutingAttention(RoutingSettings(**SMALL | options)).eval()
    for p in (p for p in layer.parameters() if p.requires_grad):
        torch.nn.init.normal_(p, std=0.3)
    return layer


# ---- decoding


def text_model(**options: Any) -> RoutingTransformerLM:
    torch.manual_seed(0)
    model = RoutingTransformerLM(RoutingConfig(**TEXT | options)).eval()
    for name, p in model.named_parameters():
        if p.ndim == 2 and p.requires_grad and "norm" not in name:
            torch.nn.init.normal_(p, std=0.3)
    return model


@pytest.mark.parametrize("options", [{}, {"share_qk": False}, {"relative": ()}])
def test_a_step_is_the_last_row_of_a_full_pass(options: dict[str, Any]) -> None:
    """With clusters that have to choose: a pass over what there is so far."""
    layer = layer_of(**ALL_KINDS | {"cluster_heads": 2, "cluster_strided_heads": 0} | options)
    x = torch.randn(2, 16, 32)
    (cache,) = RoutingTransformerLM(RoutingConfig(**TEXT | {"layers": 1})).caches(16)
    for t in range(16):
        y = layer.step(x[:, t : t + 1], cache)
        if (t + 1) % 4 == 0 and t >= 6:  # where a full pass adds no zeros, and has enough tokens
            torch.testing.assert_close(y, layer(x[:, : t + 1])[0][:, -1:], **EXACT)


def test_strided_members_are_those_of_a_full_pass_at_the_end() -> None:
    layer = layer_of(**ALL_KINDS)
    x = torch.randn(2, 16, 32)
    (cache,) = RoutingTransformerLM(RoutingConfig(**TEXT | {"layers": 1})).caches(16)
    steps = [layer.step(x[:, t : t + 1], cache) for t in range(16)]
    torch.testing.assert_close(steps[-1], layer(x)[0][:, -1:], **EXACT)


@pytest.mark.parametrize("options", [{}, {"timing": True, "embed_dim": 12}, {"skip_first": 1}])
def test_steps_are_a_full_pass_where_clusters_take_everything(options: dict[str, Any]) -> None:
    model = text_model(window=24, **options)
    ids = torch.randint(17, (2, 24))
    full, caches = model(ids), model.caches()
    steps = torch.stack([model.step(column, caches) for column in ids.unbind(1)], 1)
    torch.testing.assert_close(steps, full, **EXACT)
    caches = model.caches(25)
    torch.testing.assert_close(model(ids, caches=caches), full, **EXACT)  # all of it in one pass, and then a step
    torch.testing.assert_close(model.step(ids[:, 0], caches), text_step(model, ids), **EXACT)


def text_step(model: RoutingTransformerLM, ids: Tensor) -> Tensor:
    """Logits after ids and their first again, step by step."""
    caches = model.caches(25)
    return [model.step(column, caches) for column in (*ids.unbind(1), ids[:, 0])][-1]


def test_generate() -> None:
    model = text_model().train()
    prompt = torch.randint(1, 17, (2, 8))
    greedy = generate(model, prompt, 5, temperature=0)
    assert model.training
    assert torch.equal(greedy[:, :8], prompt)
    assert torch.equal(generate(model, prompt, 5, top_p=1e-6), greedy)  # the nucleus is the likeliest id

    def sampled(seed: int, **options: Any) -> Tensor:
        return generate(model, prompt, 16, generator=torch.Generator().manual_seed(seed), **options)

    assert torch.equal(sampled(0), sampled(0))
    assert not torch.equal(sampled(0, temperature=3.0), sampled(1, temperature=3.0))
    assert generate(model, prompt[:, :0], 4, start=0).shape == (2, 4)
    assert generate(model, prompt, 4, parallel_prompt=True).shape == (2, 12)
    each = torch.cat([generate(model, row[None], 5, temperature=0) for row in prompt])
    assert torch.equal(each, greedy)


def test_generate_takes_transformers_processors() -> None:
    from transformers import LogitsProcessorList, SuppressTokensLogitsProcessor

    barred = LogitsProcessorList([SuppressTokensLogitsProcessor(list(range(1, 16)), device="cpu")])
    found = generate(text_model(), torch.ones(1, 8, dtype=torch.long), 10, processors=barred)
    assert set(found[0, 8:].tolist()) <= {0, 16}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 30}, "38 ids do not fit the model's length=24"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"temperature": -1.0}, "temperature=-1.0"),
    ],
)
def test_generate_says_what_is_wrong(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(text_model(), torch.ones(1, 8, dtype=torch.long), **{"tokens": 2} | options)
    with pytest.raises(ValueError, match="the prompt is empty"):
        generate(text_model(), torch.ones(1, 0, dtype=torch.long), 2)


# ---- models


def test_score_shifts_and_leaves_padding_out() -> None:
    model = text_model()
    targets = torch.randint(1, 17, (2, 24))
    targets[1, 20:] = 0
    score = model.score(targets)
    read = torch.cat([torch.zeros(2, 1, dtype=torch.long), targets[:, :-1]], 1)
    assert torch.equal(score.logits, model(read))
    kept = targets != 0
    expected = F.cross_entropy(score.logits[kept], targets[kept])
    torch.testing.assert_close(score.cross_entropy, expected)
    torch.testing.assert_close(score.total, expected + model.auxiliary_loss)
    torch.manual_seed(0)
    blind = text_model(target_dropout=0.999).train().score(targets).logits
    assert (blind[:, 5] - blind[:, 6]).abs().max() < (score.logits[:, 5] - score.logits[:, 6]).abs().max()


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("routing_wikitext103_4k", 332_567_255),
        ("routing_wikitext103_1k", 415_945_943),
        ("routing_enwik8_8k", 171_805_952),
        ("routing_enwik8_12k", 168_856_832),
        ("routing_pg19_8k", 583_327_944),
    ],
)
def test_released_configurations_have_the_parameters_of_the_authors_graph(name: str, parameters: int) -> None:
    with torch.device("meta"):
        model = heed.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_authors_names_lead_back(tmp_path: Any) -> None:
    """Every parameter has a TensorFlow name, and a scope in front of it does not matter."""
    model = text_model(skip_first=1, embed_dim=12)
    theirs = {f"sparse_transformer/body/{name}": value for name, value in _tensorflow_names(model).items()}
    other = RoutingTransformerLM(model.config).load_authors(theirs).eval()
    ids = torch.randint(17, (1, 12))
    assert torch.equal(other(ids), model(ids))
    theirs.popitem()
    with pytest.raises(ValueError, match="missing"):
        other.load_authors(theirs)


def _tensorflow_names(model: RoutingTransformerLM) -> dict[str, Tensor]:
    replaced = (
        (".attn.routed.clusters.", ".attn.attention_nd.cluster_attention.cluster_attention."),
        (".attn.routed.", ".attn.attention_nd.cluster_attention.cluster_attention."),
        (".attn.local.", ".attn.attention_nd.local_nd."),
        (".attn.mix.", ".attn.attention_nd.dense."),
        (".attn.out.", ".attn.output_transform."),
        (".norm1.weight", ".layer_postprocess.layer_norm.layer_norm_scale"),
        (".norm1.bias", ".layer_postprocess.layer_norm.layer_norm_bias"),
        (".norm2.weight", ".layer_postprocess_1.layer_norm.layer_norm_scale"),
        (".norm2.bias", ".layer_postprocess_1.layer_norm.layer_norm_bias"),
        ("relative.keys", "relative_positions_keys.embeddings"),
        ("relative.values", "relative_positions_values.embeddings"),
        ("tokens.embed.weight", "embeddings.embedding"),
        ("tokens.embed_map", "emb_dense"),
        ("unembed_map", "final_dense_1"),
        ("head.", "final_dense_2."),
        (".attn.", ".self_attention."),
    )
    found = {}
    for key, value in model.state_dict().items():
        for ours, theirs in replaced:
            key = key.replace(ours, theirs)
        if key.startswith("blocks."):
            _, number, rest = key.split(".", 2)
            key = f"decoder_layer_{number}.self_attention.{rest}"
        if key.endswith(".weight"):
            key, value = key.removesuffix("weight") + "kernel", value.T
        found[key.replace(".", "/")] = value
    return found


def test_bad_input_of_models() -> None:
    model = text_model()
    ids = torch.randint(17, (1, 12))
    for wrong, message in (
        (lambda: model(ids.float()), "ids must be integers"),
        (lambda: model(ids[0]), "ids must be integers"),
        (lambda: model(ids + 9), "but vocab=17"),
        (lambda: RoutingTransformerLM(RoutingConfig(**TEXT | {"masked": False})), "needs masked=True"),
        (lambda: RoutingEncoder(RoutingConfig(**TEXT)), "an encoder needs both to be False"),
        (lambda: RoutingConfig(**TEXT | {"skip_first": 3}), "skip_first=3 must lie in"),
        (lambda: RoutingConfig(**TEXT | {"ffn": "swish"}), "unknown ffn"),
        (lambda: RoutingConfig(**TEXT | {"layers": 0}), "layers=0"),
        (lambda: routing_lm("oficial"), "did you mean 'official'"),
        (lambda: [model.step(ids[:, 0], caches) for caches in [model.caches(2)] for _ in range(3)], "cache of 2"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()


def test_encoder_and_encoder_decoder() -> None:
    settings = TEXT | {"share_qk": False, "masked": False}
    encoder = RoutingEncoder(RoutingConfig(**settings)).eval()
    ids = torch.randint(17, (2, 12))
    padding = torch.arange(12).expand(2, 12) > 8
    assert encoder(ids, padding).shape == (2, 12, 32)
    model = RoutingSeq2Seq(RoutingSeq2SeqConfig(**TEXT, source_vocab=11, encoder_layers=1))
    logits = model(torch.randint(11, (2, 9)), ids, torch.arange(9).expand(2, 9) > 6)
    assert logits.shape == (2, 12, 17)
    (logits.square().sum() + model.auxiliary_loss).backward()
    silent = {n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())}
    assert silent == set()


def test_training_recipe() -> None:
    model = text_model().train()
    optimizer, schedule = adafactor(model, warmup=4)
    rates = []
    for _ in range(20):
        loss = model.score(torch.arange(1, 13).expand(2, 12)).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.append(schedule.get_last_lr()[0])
        schedule.step()
    assert rates[:5] == [0.01] * 5
    assert rates[16] == pytest.approx(0.01 / 2)
    lengths = {cut_randomly(torch.zeros(1, 9, dtype=torch.long), 3).shape[1] for _ in range(60)}
    assert lengths == set(range(3, 10))
    with pytest.raises(ValueError, match="least=10 must lie in"):
        cut_randomly(torch.zeros(1, 9, dtype=torch.long), 10)


# ---- images

PICTURE: dict[str, Any] = SMALL | {
    "vocab": 5, "layers": 2, "ffn_dim": 32, "relative": (), "max_relative": None, "img_size": (4, 4), "in_chans": 2,
    "initial_count": 1.0,
}  # fmt: skip


@pytest.mark.parametrize("block", [(8,), (2, 4)])
def test_image_model_predicts_from_earlier_values(block: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = RoutingImageModel(RoutingImageConfig(**PICTURE | {"block": block, "window": 32})).eval()
    images = torch.randint(5, (2, 2, 4, 4))
    logits = model(images)
    assert logits.shape == (2, 2, 4, 4, 5)
    torch.testing.assert_close(
        model.bits_per_dim(images) * torch.tensor(2.0).log(), F.cross_entropy(logits.movedim(-1, 1), images)
    )
    grid = torch.arange(32.0).view((32,) if len(block) == 1 else (4, 8))
    order = to_blocks(grid[None, ..., None], block).flatten().long()
    for place in (0, 9, 31):
        flat = images.permute(0, 2, 3, 1).reshape(2, -1).clone()
        flat[:, order[place]] = (flat[:, order[place]] + 1) % 5
        changed = model(flat.view(2, 4, 4, 2).permute(0, 3, 1, 2))
        moved = (changed - logits).abs().amax((0, 4)).permute(1, 2, 0).flatten()[order] > 1e-6
        assert not moved[: place + 1].any()
        assert place == 31 or moved[place + 1]
    drawn = model.sample(2, temperature=1e-5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(drawn).argmax(-1), drawn)  # clusters take everything: steps are a full pass
    with pytest.raises(ValueError, match="images must be integers"):
        model(images[:, :1])
    with pytest.raises(ValueError, match="must not see"):
        RoutingImageConfig(**PICTURE | {"masked": False})
