"""Block Transformers: the paper's sizes, what may see what, losses, generation, caches, packing, up-training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

import heed
from heed.language.block_transformer import (
    CONFIGS,
    BlockTransformer,
    BlockTransformerConfig,
    cache_bytes,
    to_blocks,
    vanilla,
    vanilla_cache_bytes,
)
from heed.language.block_transformer.losses import block_loss
from heed.language.block_transformer.neox import Stepper
from heed.language.block_transformer.reserved import ReservedCache
from heed.models import from_pretrained

# Used parameters, and those in the layers of both stacks, as the authors' classes have them.
PAPER = {
    "block_main_b4_5": (33_846_272, 4_738_560),
    "block_main_b4_19": (77_391_872, 18_914_304),
    "block_main_b4_85": (173_164_032, 85_054_464),
    "block_main_b4_300": (420_313_088, 302_309_376),
    "block_main_b4_800": (1_045_934_080, 805_732_352),
    "block_main_b4_1.2b": (1_448_800_256, 1_208_598_528),
    "block_megabyte_b4_5": (20_971_520, 4_741_888),
    "block_megabyte_b4_19": (51_642_368, 18_920_960),
    "block_megabyte_b4_85": (153_323_264, 90_576_128),
}
SMALL: dict[str, Any] = {
    "vocab_size": 41, "embedder_width": 8, "block_layers": 2, "block_width": 32, "block_heads": 2, "token_layers": 2,
    "token_width": 16, "token_heads": 2, "eos_id": None, "generation_pad_id": 0, "embedder_layers": 1,
    "embedder_heads": 2,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "prefix": {},
    "prefix of one": {"expansion_ratio": 1},
    "summation": {"strategy": "summation", "expansion_ratio": None},
    "cross-attention": {"strategy": "cross_attention", "expansion_ratio": None},
    "untied": {"strategy": "cross_attention", "tie_word_embeddings": False},
    "projection": {"projection": "projection_layer", "embedder_width": 6},
    "repeated": {"expansion_method": None, "token_width": 32, "expansion_ratio": 3},
    "roberta": {"embedder": "roberta"},
    "cls": {"embedder": "roberta_cls", "projection": "projection_layer"},
    "one token": {"block_length": 1, "embedder_width": 32, "expansion_ratio": 1},
    "two embeddings": {"n_embedding_tokens": 2, "embedder_width": 16},
    "all losses": {"block_loss": "mse", "auto_encoding_weight": 0.5},
}
GENERATING = [kind for kind in KINDS if kind != "two embeddings"]


def small(kind: str = "prefix", **other: Any) -> BlockTransformer:
    """Weights large enough for every input to matter."""
    torch.manual_seed(0)
    model = BlockTransformer(BlockTransformerConfig(**(SMALL | KINDS[kind] | other)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    return model.eval()


def blocks(model: BlockTransformer, rows: int = 2, count: int = 5) -> Tensor:
    return torch.randint(1, 41, (rows, count, model.config.block_length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", CONFIGS)
def test_the_paper_s_sizes(name: str) -> None:
    with torch.device("meta"):
        model = heed.create_model(name)
    assert isinstance(model, BlockTransformer)
    assert PAPER.get(name) in (None, (model.used_parameters(), model.layer_parameters()))


@settings(max_examples=6)
@given(kind=st.sampled_from(sorted(KINDS)), block=st.integers(0, 4), place=st.integers(0, 3), seed=st.integers(0, 9))
def test_a_token_changes_only_what_comes_after_it(kind: str, block: int, place: int, seed: int) -> None:
    model = small(kind)
    length, generator = model.config.block_length, torch.Generator().manual_seed(seed)
    place = place % length
    ids = torch.randint(1, 41, (1, 5, length), generator=generator)
    other = ids.clone()
    other[0, block, place] = (ids[0, block, place] + 7) % 40 + 1
    with torch.no_grad():
        before, after = model(ids).logits, model(other).logits
    changed = (before - after).abs().amax(-1)[0].flatten() > 1e-4
    first = (block - 1) * length + place + 1  # logits[0] predict block 1
    assert not changed[: max(first, 0)].any()
    if first < len(changed):
        assert changed[max(first, 0) :].any()


@pytest.mark.parametrize("kind", KINDS)
def test_the_past_comes_through_the_block_states_alone(kind: str) -> None:
    model = small(kind)
    ids = blocks(model)
    out = model(ids)
    state = out.block_hidden.unflatten(1, out.block_embeddings.shape[1:3])[:, 2]
    begun = F.pad(ids[:, 3], (1, 0), value=model.config.start_id)
    alone = model.token_decoder(state, begun).logits
    torch.testing.assert_close(alone.view(2, model.config.block_length, -1), out.logits[:, 2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_padding_do_not_change_the_loss(kind: str) -> None:
    model = small(kind, block_loss="contrastive", block_loss_weight=0.3)
    ids = blocks(model)
    longer = F.pad(ids, (0, 0, 0, 3))
    mask = F.pad(torch.ones_like(ids), (0, 0, 0, 3))
    short, long = model(ids, labels=ids), model(longer, mask, labels=longer)
    torch.testing.assert_close(short.loss, long.loss)
    assert long.losses is not None
    assert long.losses[:, 4:].isnan().all()
    logits = model(longer, mask).logits
    assert (logits[:, 4:] == (model.config.eos_id or 0)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_learns_and_comes_back(kind: str, tmp_path: Path) -> None:
    model = small(kind)
    ids = blocks(model, rows=4)
    model(ids, labels=ids).loss.backward()
    silent = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    silent -= {"block_decoder.gpt_neox.embed_in.weight", "embedder.embeddings.token_type_embeddings.weight"}
    if model.config.block_length == 1:  # the prefix stands in the place of the only token before
        silent -= {"token_decoder.gpt_neox.embed_in.weight"}
    assert not {name for name in silent if "key.bias" not in name}  # which moves all scores of a query alike
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    model.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path)
    assert isinstance(again, BlockTransformer)
    assert again.config == model.config
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_bfloat16_autocast_stays_near() -> None:
    for kind in ("prefix", "two embeddings", "roberta", "cross-attention"):
        model = small(kind)
        ids = blocks(model)
        mask = torch.ones_like(ids)
        mask[0, 0] = 0
        with torch.autocast("cpu", torch.bfloat16):
            low = model(ids, mask, labels=ids).loss
        torch.testing.assert_close(low, model(ids, mask, labels=ids).loss, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("kind", GENERATING)
@pytest.mark.parametrize("prompt", [3, 8])
def test_generation_equals_recomputation(kind: str, prompt: int) -> None:
    model = small(kind)
    length = model.config.block_length
    ids = blocks(model).flatten(1)[:, :prompt].repeat(1, 1 if length > 1 else 3)
    made = model.generate(ids, max_new_tokens=9)
    assert made.shape[1] == ids.shape[1] + 9
    front = -ids.shape[1] % length
    whole = to_blocks(made, None, length, front, 0)
    best = model(whole.ids, whole.mask).logits.flatten(1, 2).argmax(-1)
    begin = front + ids.shape[1] - length
    assert torch.equal(made[:, ids.shape[1] :], best[:, begin : begin + 9])
    assert torch.equal(made[:, : ids.shape[1]], ids)


@pytest.mark.parametrize("kind", GENERATING)
def test_a_padded_batch_equals_its_rows(kind: str) -> None:
    model = small(kind)
    ids = torch.randint(1, 41, (3, 11), generator=torch.Generator().manual_seed(3))
    keep = torch.arange(11) >= torch.tensor([0, 3, 9])[:, None]
    made = model.generate(ids * keep, keep.long(), max_new_tokens=7)
    losses = model.token_losses(ids * keep, keep.long())
    for row in range(3):
        alone = ids[row, keep[row]][None]
        assert torch.equal(made[row, 11:], model.generate(alone, max_new_tokens=7)[0, alone.shape[1] :])
        if alone.shape[1] > model.config.block_length:
            padding = (model.config.block_length - 1 + 11 - alone.shape[1]) % model.config.block_length
            want = model.token_losses(alone, padding=padding)[0]
            torch.testing.assert_close(losses[row, keep[row]], want, equal_nan=True, rtol=1e-4, atol=1e-4)


def test_a_row_ends_with_its_eos() -> None:
    """The likeliest token of the third step of row 0 is made the eos: its row then holds padding, the other goes on."""
    model = small()
    ids = blocks(model).flatten(1)[:, :6]
    free = model.generate(ids, max_new_tokens=12)
    eos = int(free[0, 8])
    ended = small(eos_id=eos, bos_id=0, generation_pad_id=40)
    made = ended.generate(ids, max_new_tokens=12)
    where = int((free[0, 6:] == eos).nonzero()[0]) + 6
    assert torch.equal(made[0, : where + 1], free[0, : where + 1])
    end = where + (-(where + 2) - 1) % 4 + 1  # the prompt has 2 pad tokens in front
    assert (made[0, where + 1 : end] == 40).all()
    assert (made[0, end:] == 0).all()
    assert made.shape[1] <= 18
    alone = ended.generate(ids[1:], max_new_tokens=12)
    assert torch.equal(made[1, : alone.shape[1]], alone[0])
    # The authors count the 2 pad tokens in front: 2 tokens fewer than max_length allows.
    assert model.generate(ids, max_length=16).shape[1] == 14
    assert model.generate(ids, max_length=15).shape[1] == 14
    assert model.generate(ids, max_length=17).shape[1] == 17


def test_sampling_is_that_of_transformers() -> None:
    model = small()
    ids = blocks(model).flatten(1)[:, :6]
    greedy = model.generate(ids, max_new_tokens=8)
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=True, top_k=1), greedy)
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=True, top_p=1e-6, temperature=0.7), greedy)
    drawn = [
        model.generate(ids, max_new_tokens=8, do_sample=True, generator=torch.Generator().manual_seed(5))
        for _ in range(2)
    ]
    assert torch.equal(*drawn)
    assert not torch.equal(drawn[0], greedy)
    banned = int(greedy[0, 6])
    ban = transformers.LogitsProcessorList([transformers.SuppressTokensLogitsProcessor([banned])])
    assert not (model.generate(ids, max_new_tokens=8, logits_processor=ban)[:, 6:] == banned).any()


def test_the_authors_positions_of_a_prefix() -> None:
    for kind, same in (("prefix", False), ("prefix of one", True), ("summation", True), ("cross-attention", True)):
        model = small(kind)
        ids = blocks(model, rows=6).flatten(1)[:, :7]
        pair = [model.generate(ids, max_new_tokens=9, prefix_positions=how) for how in ("trained", "authors")]
        assert torch.equal(*pair) == same, kind


@pytest.mark.parametrize("kind", KINDS)
def test_losses_of_plain_tokens(kind: str) -> None:
    model = small(kind)
    length = model.config.block_length
    ids = blocks(model).flatten(1)[:, : 4 * length + (length > 1)]
    losses = model.token_losses(ids)
    assert losses.shape == ids.shape
    assert losses[:, 0].isnan().all()
    assert losses[:, 1:].isfinite().all()
    for padding in range(length):
        losses = model.token_losses(ids, padding=padding)
        first = length - padding
        assert losses[:, :first].isnan().all()
        whole = to_blocks(ids, None, length, padding, 0)
        logits = model(whole.ids, whole.mask).logits.flatten(1, 2)[:, : ids.shape[1] - first]
        want = F.cross_entropy(logits.transpose(1, 2), ids[:, first:], reduction="none")
        torch.testing.assert_close(losses[:, first:], want, rtol=1e-4, atol=1e-4)
    losses.nanmean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_block_losses() -> None:
    hidden, embeddings, mask = torch.randn(2, 4, 6), torch.randn(2, 4, 1, 6), torch.ones(2, 4)
    target = embeddings[:, 1:, 0]
    torch.testing.assert_close(block_loss("mse", hidden, embeddings, None), F.mse_loss(hidden[:, :-1], target))
    pairs = F.normalize(hidden[:, :-1], dim=-1).flatten(0, 1) @ F.normalize(target, dim=-1).flatten(0, 1).T / 0.07
    torch.testing.assert_close(
        block_loss("contrastive", hidden, embeddings, mask), F.cross_entropy(pairs, torch.arange(6))
    )
    mask[1, 3] = 0
    assert block_loss("contrastive", hidden, embeddings, mask).isfinite()
    # Zeros in the place of padding, which count: 3 of the 18 pairs of numbers per feature are equal.
    want = F.mse_loss(hidden[:, :-1] * mask[:, 1:, None], target * mask[:, 1:, None])
    torch.testing.assert_close(block_loss("mse", hidden, embeddings, mask), want)


def test_auto_encoding_reads_the_block_itself() -> None:
    model = small("all losses")
    ids = blocks(model)
    out = model(ids, labels=ids)
    assert out.auto_encoding_loss is not None
    assert out.block_loss is not None
    torch.testing.assert_close(out.loss, out.token_loss + out.block_loss + out.auto_encoding_loss)
    begun = F.pad(ids[:, 1:].flatten(0, 1), (1, 0), value=0)
    labels = begun.clone()
    labels[:, 0] = -100
    own = model.token_decoder(out.block_embeddings[:, 1:].flatten(0, 1), begun, None, labels).losses
    assert own is not None
    torch.testing.assert_close(out.auto_encoding_loss, 0.5 * own.mean())


@pytest.mark.parametrize("kind", ["prefix", "summation", "cross-attention"])
def test_the_cache_formula_is_what_is_held(kind: str) -> None:
    model = small(kind)
    ids = blocks(model).flatten(1)[:, :14]
    said = cache_bytes(model.config, 26, torch.float32)
    steps, inner = model.block_decoder.stepper(-(-26 // 4)), model.token_decoder.start()
    with torch.no_grad():
        state = steps(model.embedder(to_blocks(ids, None, 4, 2, 0).ids)[:, :, 0])
        inner.begin(model.token_decoder.expand(state[:, -1:]))
        for _ in range(4):
            inner.next(torch.zeros(2, dtype=torch.long))
    assert steps.cache.nbytes == 2 * said.blocks
    assert inner.nbytes == 2 * said.tokens
    assert said.total == said.blocks + said.tokens


def test_the_cache_of_the_paper_s_largest_model_is_an_eighth() -> None:
    """12 layers over 2048 / 4 blocks against 24 layers over 2048 tokens of the same width."""
    ours = cache_bytes(CONFIGS["block_main_b4_1.2b"], 2048)
    assert vanilla_cache_bytes(24, 2048, 2048) / ours.blocks == 8
    assert 7.8 < vanilla_cache_bytes(24, 2048, 2048) / ours.total < 8


def test_the_reserved_cache_serves_transformers_generate() -> None:
    model = vanilla("31m", vocab_size=41, width=32, layers=2, num_attention_heads=2).eval()
    ids = torch.randint(1, 41, (2, 9))
    plain: dict[str, Any] = {"max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 0}
    want = model.generate(ids, **plain)  # type: ignore[operator]
    cache = ReservedCache(2, 6)  # too small: it grows
    assert torch.equal(model.generate(ids, past_key_values=cache, **plain), want)  # type: ignore[operator]
    assert cache.get_seq_length() == 16
    assert cache.nbytes == 2 * 2 * 2 * 32 * 4 * cache.layers[0].keys.shape[2]  # type: ignore[union-attr]
    cache.crop(-3)
    assert cache.get_seq_length() == 13
    with pytest.raises(ValueError, match="crop"):
        cache.crop(-14)
    beams = model.generate(ids, num_beams=3, past_key_values=ReservedCache(2, 20), **plain)  # type: ignore[operator]
    assert torch.equal(beams, model.generate(ids, num_beams=3, **plain))  # type: ignore[operator]
    steps = Stepper(model.gpt_neox, 9)
    with torch.no_grad():
        embedded = model.gpt_neox.embed_in(ids)
        parts = torch.cat([steps(embedded[:, :5]), *(steps(embedded[:, i, None]) for i in range(5, 9))], 1)
        torch.testing.assert_close(parts, model.gpt_neox(ids).last_hidden_state, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="reserved"):
        steps(embedded[:, :1])


@pytest.mark.parametrize(("change", "message"), [
    ({"embedder_width": 9}, "36, not block_width=32"),
    ({"expansion_ratio": None}, "prefix' needs expansion_ratio"),
    ({"strategy": "summation", "expansion_ratio": 2}, "must be block_length=4"),
    ({"expansion_method": None}, "repeats block embeddings of width 32"),
    ({"strategy": "cross"}, "cross_attention"),
    ({"embedder": "bert"}, "roberta"),
    ({"block_loss": "l1"}, "contrastive"),
    ({"block_length": 0}, "block_length=0"),
    ({"expansion_ratio": 0}, "expansion_ratio=0"),
    ({"n_embedding_tokens": 3}, "must divide"),
    ({"token_heads": 3}, "token_heads=3"),
    ({"block_rotary_pct": 0.05}, "even number"),
    ({"eos_id": 41}, "eos_id=41"),
    ({"embedder_positions": 5}, "embedder_positions=5"),
])  # fmt: skip
def test_settings_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BlockTransformerConfig(**(SMALL | change))


def test_shapes_that_do_not_fit() -> None:
    model = small()
    ids = blocks(model)
    for wrong in (ids[:, :, :3], ids.flatten(1)):
        with pytest.raises((ValueError, TypeError), match="block_length=4|B N L"):
            model(wrong)
    for name, value in (("attention_mask", ids[:, :3]), ("labels", ids[:1]), ("block_mask", ids[..., 0].T)):
        with pytest.raises(ValueError, match=rf"{name} \(.*\) must be \(2, 5.*\) for ids \(2, 5, 4\)"):
            model(ids, **{name: value})
    with pytest.raises(ValueError, match="nothing to predict"):
        model(ids[:, :1], labels=ids[:, :1])
    state, begun = torch.randn(2, 1, 32), F.pad(ids[:, 0], (1, 0), value=0)
    ones = torch.ones_like(begun)
    decoder = model.token_decoder
    with pytest.raises(ValueError, match=r"ids\[:, 0\] must be 0"):
        decoder(state, begun + 1)
    with pytest.raises(ValueError, match=r"mask\[:, 0\] must be 1"):
        decoder(state, begun, 1 - ones)
    with pytest.raises(ValueError, match=r"labels\[:, 0\] must be -100"):
        decoder(state, begun, ones, begun)
    with pytest.raises(ValueError, match=r"ids \(2, 4\) must be \(2, 5\)"):
        decoder(state, ids[:, 0])
    with pytest.raises(ValueError, match="padding=4 must be 0 to 3"):
        model.token_losses(ids.flatten(1), padding=4)


def test_prompts_that_do_not_fit() -> None:
    model = small()
    ids = blocks(model).flatten(1)
    mask = torch.ones_like(ids)
    with pytest.raises(NotImplementedError, match="n_embedding_tokens=2"):
        small("two embeddings").generate(ids, max_new_tokens=3)
    with pytest.raises(ValueError, match="max_length=20 counts the prompt of 20"):
        model.generate(ids, max_length=20)
    with pytest.raises(ValueError, match="either max_new_tokens or max_length"):
        model.generate(ids)
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        model.generate(ids, max_new_tokens=0)
    with pytest.raises(ValueError, match="hold no prompt"):
        model.generate(ids[:, :0], max_new_tokens=3)
    with pytest.raises(ValueError, match="shape of the ids"):
        model.generate(ids, mask[:, :3], max_new_tokens=3)
    for place in (-1, 3):
        hole = mask.clone()
        hole[0, place] = 0
        with pytest.raises(ValueError, match="left"):
            model.generate(ids, hole, max_new_tokens=3)
    with pytest.raises(ValueError, match="do_sample=True"):
        model.generate(ids, max_new_tokens=3, top_k=3)
    with pytest.raises(ValueError, match="prefix_positions"):
        model.generate(ids, max_new_tokens=3, prefix_positions="others")


def test_authors_checkpoints(tmp_path: Path) -> None:
    """One file of safetensors with the authors' names; tied tables under some or all of their names."""
    model = small("cross-attention")
    state: dict[str, Any] = {key: value.clone() for key, value in model.state_dict().items()}
    table = state.pop("token_decoder.shared.weight")
    others = ("token_decoder.lm_head.weight", "token_decoder.decoder.embed_tokens.weight")
    ids = blocks(model)
    for names in (others, others[:1], ("token_decoder.shared.weight",)):
        tied: dict[str, Any] = dict.fromkeys(names, table)
        again = small("cross-attention").load_authors(state | tied)
        assert torch.equal(again(ids).logits, model(ids).logits)
    with pytest.raises(ValueError, match="differ"):
        again.load_authors(state | {others[0]: table, others[1]: table + 1})
    with pytest.raises(ValueError, match="missing: token_decoder.shared.weight"):
        again.load_authors(state)
    sizes = {key: value for key, value in SMALL.items() if not key.startswith("embedder_") or key == "embedder_width"}
    plain = small()
    old = plain.state_dict() | {"block_decoder.gpt_neox.layers.0.attention.bias": torch.ones(1)}
    save_file({key: value.contiguous() for key, value in old.items()}, tmp_path / "model.safetensors")
    loaded = BlockTransformer.from_authors(tmp_path / "model.safetensors", "block_main_b4_5", **sizes)
    assert torch.equal(loaded(ids).logits, plain(ids).logits)
