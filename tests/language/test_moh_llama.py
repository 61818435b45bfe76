"""Query-norm Mixture-of-Head attention inside transformers' own models, built small."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from heed.language.moh import QueryNormMoH, QueryNormRouter, convert_to_moh
from heed.layers.moh import active_heads, collect_balance

transformers = pytest.importorskip("transformers")
SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 4,
}


def build(family: str = "Llama", **settings: object) -> torch.nn.Module:
    config = getattr(transformers, f"{family}Config")(**SIZES, **settings)
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


def tokens(length: int = 9) -> Tensor:
    return torch.randint(0, 40, (2, length))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2"])
@torch.no_grad()
def test_conversion_and_back(family: str, attention: str) -> None:
    model, ids = build(family, attn_implementation=attention), tokens()
    before, state = model(ids).logits, {key: value.clone() for key, value in model.state_dict().items()}
    handle = convert_to_moh(model)
    after = model(ids).logits
    assert not torch.allclose(after, before, atol=1e-3)
    assert [x.share for x in active_heads(handle.state).values()] == [0.75, 0.75]
    assert model.state_dict().keys() == state.keys()
    handle.remove()
    assert torch.equal(model(ids).logits, before)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert model.config._attn_implementation == attention


@torch.no_grad()
def test_all_heads_are_the_model_itself() -> None:
    model, ids = build(), tokens()
    before = model(ids).logits
    with convert_to_moh(model, shared=0.5, active=1.0):
        torch.testing.assert_close(model(ids).logits, before)


@torch.no_grad()
def test_closed_heads_are_zero_before_the_projection() -> None:
    model, ids = build(), tokens()
    seen: list[Tensor] = []
    with convert_to_moh(model) as handle, collect_balance(handle.state) as balance:
        hook = model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        model(ids)
        hook.remove()
    heads = seen[0].unflatten(-1, (8, 4))
    gates = balance.routings[0][1].gates
    assert torch.equal(heads.abs().sum(-1) > 0, gates > 0)
    assert torch.equal(gates.sum(-1), torch.full((2, 9), 6.0))


def test_cached_generation_is_that_without_a_cache() -> None:
    model, ids = build(), tokens(5)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    plain = model.generate(ids, **settings)
    with convert_to_moh(model):
        cached = model.generate(ids, **settings)
        assert torch.equal(cached, model.generate(ids, use_cache=False, **settings))
    assert torch.equal(plain, model.generate(ids, **settings))


@torch.no_grad()
def test_left_padding_changes_nothing() -> None:
    model, ids = build(), tokens(6)[:1]
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
    keep = torch.tensor([[0] * 3 + [1] * 6])
    with convert_to_moh(model) as handle:
        with collect_balance(handle.state) as alone:
            plain = model(ids).logits
        positions = (keep.cumsum(1) - 1).clamp(min=0)
        with collect_balance(handle.state) as balance:
            logits = model(padded, attention_mask=keep, position_ids=positions).logits
    torch.testing.assert_close(logits[:, 3:], plain, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(balance.loss(padding=keep == 0), alone.loss(), rtol=1e-4, atol=1e-5)


def test_training_moves_through_the_router() -> None:
    """Gates are 0 or 1 forward; the gradient is that of the softmax of the queries' norms."""
    router = QueryNormRouter(8, 4, 2)
    query = torch.randn(2, 8, 5, 4, requires_grad=True)
    cotangent = torch.randn(2, 5, 8)
    routing = router(query, straight_through=True)
    torch.testing.assert_close(routing.gates, router(query).gates)
    (grad,) = torch.autograd.grad((routing.gates * cotangent).sum(), [query])
    (soft,) = torch.autograd.grad((router(query).probs * cotangent[..., 4:]).sum(), [query])
    torch.testing.assert_close(grad, soft)
    assert not router(query).gates.requires_grad


def test_continued_training_lowers_the_loss() -> None:
    model, ids = build().train(), tokens()
    optimiser = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    with convert_to_moh(model) as handle:
        for _ in range(6):
            with collect_balance(handle.state) as balance:
                loss = model(ids, labels=ids).loss
            optimiser.zero_grad()
            (loss + 0.01 * balance.loss()).backward()
            optimiser.step()
            losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5


def test_equal_norms_give_finite_gradients() -> None:
    query = torch.ones(1, 8, 3, 4, requires_grad=True)
    routing = QueryNormRouter(8, 4, 2)(query, straight_through=True)
    routing.gates.square().sum().backward()
    assert torch.isfinite(query.grad).all()
    torch.testing.assert_close(routing.probs, torch.full((1, 3, 4), 0.25))
    assert (routing.mask.sum(-1) == 2).all()


def test_rotation_and_scale_do_not_matter() -> None:
    query = torch.randn(2, 8, 5, 4)
    turn, _ = torch.linalg.qr(torch.randn(4, 4))
    plain, turned = (QueryNormRouter(8, 4, 2)(q) for q in (query, 3 * query @ turn))
    torch.testing.assert_close(plain.probs, turned.probs)
    assert torch.equal(plain.mask, turned.mask)


def test_normalised_queries_and_no_routed_heads_are_warned_of() -> None:
    with pytest.warns(UserWarning, match="normalises its queries"):
        convert_to_moh(build("Qwen3")).remove()
    with pytest.warns(UserWarning, match="no routed heads"):
        convert_to_moh(build(), shared=0.5, active=0.55).remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert_to_moh(build()).remove()


def test_fractions_become_whole_heads() -> None:
    assert QueryNormMoH().heads(32) == (16, 8)
    assert QueryNormMoH(0.5, 0.7).heads(10) == (5, 2)


@pytest.mark.parametrize(("shared", "active"), [(0.75, 0.5), (-0.1, 0.5), (0.5, 1.5), (0.0, 0.0)])
def test_bad_fractions(shared: float, active: float) -> None:
    with pytest.raises(ValueError, match=f"active={active}"):
        convert_to_moh(build(), shared, active)


def test_other_models_are_refused() -> None:
    config = transformers.GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=8)
    with pytest.raises(ValueError, match="no q_proj and o_proj"):
        convert_to_moh(transformers.GPT2LMHeadModel(config))
