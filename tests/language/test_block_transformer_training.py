"""Block Transformers in training: documents in blocks, up-training from a vanilla model, bytes that are learnt."""

from __future__ import annotations

import pydoc_data.topics
from typing import Any

import pytest
import torch
from torch import nn

import heed
from heed.language.block_transformer import BlockTransformer, from_vanilla, pack_documents, vanilla


def test_packing() -> None:
    documents = [list(range(1, 8)), torch.arange(10, 15), [], [20]]
    packed = pack_documents(documents, 4, 3, eos_id=40, random_start=False)
    assert packed.ids.tolist() == [
        [[1, 2, 3, 4], [5, 6, 7, 40], [10, 11, 12, 13]],
        [[14, 40, 0, 0], [40, 0, 0, 0], [20, 40, 0, 0]],
    ]
    assert packed.mask.flatten().tolist() == [1] * 14 + [0, 0, 1, 0, 0, 0, 1, 1, 0, 0]
    assert pack_documents([[1]], 4, 2, random_start=False).block_mask.tolist() == [[1, 0]]
    fronts = set()
    for seed in range(20):
        packed = pack_documents([range(1, 9)], 4, 4, generator=torch.Generator().manual_seed(seed))
        assert packed.ids[packed.mask == 1].tolist() == list(range(1, 9))
        fronts.add(int(packed.mask.flatten().argmax()))
    assert fronts == {0, 1, 2, 3}
    with pytest.raises(ValueError, match="no tokens"):
        pack_documents([[]], 4, 3)
    with pytest.raises(ValueError, match="at least 1"):
        pack_documents([[1]], 0, 3)


@pytest.mark.parametrize(("split", "lower", "upper"), [
    ("partition", [0, 1], [2, 3]), ("skip", [0, 2], [0, 2]), ("duplicate", [0, 1, 2, 3], [0, 1, 2, 3]),
])  # fmt: skip
def test_up_training_begins_with_the_vanilla_weights(split: Any, lower: list[int], upper: list[int]) -> None:
    old = vanilla("31m", vocab_size=41, width=32, layers=4, num_attention_heads=2)
    nn.init.normal_(old.gpt_neox.final_layer_norm.weight)
    new = from_vanilla(old, split, block_length=4)
    token_decoder: Any = new.token_decoder
    for part, chosen in ((new.block_decoder, lower), (token_decoder, upper)):
        layers: Any = part.gpt_neox.layers
        assert len(layers) == len(chosen)
        for mine, number in zip(layers, chosen, strict=True):
            theirs = old.gpt_neox.layers[number].state_dict()
            assert all(torch.equal(value, theirs[key]) for key, value in mine.state_dict().items())
    ids = torch.randint(1, 41, (2, 5, 4))
    out = new(ids, labels=ids)
    torch.testing.assert_close(out.block_embeddings[:, :, 0], old.gpt_neox.embed_in(ids).mean(2))
    state = torch.randn(3, 1, 32)
    assert torch.equal(new.token_decoder.expand(state), state.expand(3, 2, 32))
    assert torch.equal(token_decoder.embed_out.weight, old.get_output_embeddings().weight)  # type: ignore[union-attr]
    assert torch.equal(token_decoder.gpt_neox.final_layer_norm.weight, old.gpt_neox.final_layer_norm.weight)
    out.loss.backward()


def test_up_training_says_what_it_cannot_start_from() -> None:
    sizes: dict[str, Any] = {"vocab_size": 41, "width": 32, "layers": 3, "num_attention_heads": 2}
    with pytest.raises(ValueError, match="unknown split 'half'"):
        from_vanilla(vanilla("31m", **sizes), "half")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="even number of layers"):
        from_vanilla(vanilla("31m", **sizes))
    with pytest.raises(ValueError, match="use_parallel_residual=False"):
        from_vanilla(vanilla("31m", use_parallel_residual=False, **sizes), "duplicate")
    with pytest.raises(ValueError, match="unknown vanilla baseline"):
        vanilla("70b")


def test_it_learns_bytes() -> None:
    """Below the entropy of single bytes in few steps, and the later in a block, the better."""
    text = pydoc_data.topics.topics["assignment"] + pydoc_data.topics.topics["compound"]
    ids = torch.tensor(list(text.encode()))
    share = ids.bincount().float() / len(ids)
    entropy = -(share * share.clamp(min=1e-9).log()).sum().item()
    model = heed.create_model(
        "block_bytes_b4", block_layers=2, block_width=64, embedder_width=16, token_layers=2, token_width=64
    )
    assert isinstance(model, BlockTransformer)
    optimiser = torch.optim.AdamW(model.parameters(), 4e-3)
    generator = torch.Generator().manual_seed(0)
    for step in range(70):
        starts = torch.randint(len(ids) - 128, (16,), generator=generator).tolist()
        losses = model.token_losses(torch.stack([ids[s : s + 128] for s in starts]), padding=step % 4)
        optimiser.zero_grad()
        losses.nanmean().backward()
        optimiser.step()
    cut = ids[: len(ids) // 512 * 512].view(-1, 128, 4)
    with torch.no_grad():
        out = model(cut, labels=cut)
    assert out.loss.item() < entropy - 0.3
    by_position = out.loss_by_position
    assert by_position is not None
    assert by_position[0] == by_position.max()
    assert by_position[0] > by_position[3] + 0.2
