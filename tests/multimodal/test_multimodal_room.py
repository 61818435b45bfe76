"""Every steering method of the room on every family of hosts: a new method adds a line to METHODS."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hosts_for_tests import HOSTS, IMAGE, Host, Inputs, make_host
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

import heed
from heed.methods import Method
from heed.multimodal.host import read_host
from heed.multimodal.removal import RemoveVisualTokens
from heed.multimodal.sinks import find_sink_dimensions
from heed.multimodal.var import VAR

TAU = 1.6
Make = Callable[[tuple[int, ...]], Method]
# name -> the method, made with sink dimensions that the host has; it must change what the host says
METHODS: dict[str, Make] = {
    "var": lambda dims: VAR(sink_dimensions=dims, tau=TAU, rho=0.9, summ=0.02),
    "remove-sinks": lambda dims: RemoveVisualTokens(sink_dimensions=dims, tau=TAU),
}
GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
_HOSTS: dict[str, tuple[Host, tuple[int, ...]]] = {}

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(params=HOSTS)
def host(request: pytest.FixtureRequest) -> str:
    if request.param not in _HOSTS:
        made = make_host(request.param)
        _HOSTS[request.param] = made, find_sink_dimensions(made[0], [made[1]], tau=TAU).dimensions
    return request.param


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest, host: str) -> Method:
    return METHODS[request.param](_HOSTS[host][1])


def parts(host: str) -> Host:
    return _HOSTS[host][0]


def logits(model: nn.Module, inputs: Inputs, **options: object) -> Tensor:
    with torch.no_grad():
        return model(**inputs, **options).logits


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def test_it_changes_the_answer_and_leaves_no_trace(host: str, method: Method) -> None:
    model, batch, _ = parts(host)
    state, plain = copy.deepcopy(model.state_dict()), logits(model, batch)
    attributes = {id(part): set(vars(part)) for part in model.modules()}
    hooks = sum(len(part._forward_pre_hooks) + len(part._forward_hooks) for part in model.modules())
    with heed.apply(model, method):
        steered = logits(model, batch)
    assert not torch.allclose(steered, plain, atol=1e-4)
    assert torch.equal(logits(model, batch), plain)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
    assert {id(part): set(vars(part)) for part in model.modules()} == attributes
    assert sum(len(part._forward_pre_hooks) + len(part._forward_hooks) for part in model.modules()) == hooks


def test_a_batch_is_the_loop_over_its_rows(host: str, method: Method) -> None:
    model, batch, alone = parts(host)
    with heed.apply(model, method):
        together = logits(model, batch)
        for row, real in enumerate(batch["attention_mask"].bool()):
            close(together[row][real], logits(model, alone(row))[0])


def test_what_comes_before_the_image_and_the_image_stay_as_they_are(host: str, method: Method) -> None:
    model, batch, _ = parts(host)
    plain = logits(model, batch)
    with heed.apply(model, method):
        steered = logits(model, batch)
    for row, ids in enumerate(batch["input_ids"]):
        first, real = int((ids == IMAGE).nonzero()[0]), batch["attention_mask"][row].bool()
        before = real & (torch.arange(len(ids)) <= first)
        close(steered[row][before], plain[row][before])


def test_every_prompt_is_seen_anew(host: str, method: Method) -> None:
    model, _, alone = parts(host)
    fresh = []
    for row in (0, 1):
        with heed.apply(model, method):
            fresh.append(model.generate(**alone(row), **GREEDY))
    with heed.apply(model, method):
        for row in (0, 1, 0):
            assert torch.equal(model.generate(**alone(row), **GREEDY), fresh[row])


def test_generation_with_a_cache_is_generation_step_by_step(host: str, method: Method) -> None:
    model, batch, _ = parts(host)
    if host == "instructblip":
        pytest.skip("its own forward has no way to go on from a cache")
    with heed.apply(model, method):
        written = model.generate(**batch, **GREEDY, output_logits=True, return_dict_in_generate=True)
        start = batch["input_ids"].shape[1]
        close(written.logits[0], logits(model, batch)[:, -1])
        assert torch.equal(written.sequences[:, start], written.logits[0].argmax(-1))
        static = model.generate(**batch, **GREEDY, cache_implementation="static", disable_compile=True)
        assert torch.equal(static, written.sequences)


def test_beams_of_a_batch_are_those_of_its_rows(host: str, method: Method) -> None:
    model, batch, alone = parts(host)
    options = {**GREEDY, "num_beams": 3}
    with heed.apply(model, method):
        together = model.generate(**batch, **options)
        for row in (0, 1):
            assert torch.equal(together[row, -6:], model.generate(**alone(row), **options)[0, -6:])


def test_sampling_repeats(host: str, method: Method) -> None:
    model, batch, _ = parts(host)
    written = []
    with heed.apply(model, method):
        for _ in range(2):
            torch.manual_seed(1)
            written.append(model.generate(**batch, max_new_tokens=5, do_sample=True))
    assert torch.equal(*written)


def test_a_prompt_in_chunks_is_the_prompt(host: str, method: Method) -> None:
    """The language part is fed the embedded prompt at once and in three pieces, as chunked prefill does."""
    model, _, alone = parts(host)
    if host == "qwen2-vl":
        pytest.skip("its positions in pieces are for the caller to give")
    language, inputs, seen = read_host(model).language, alone(1), {}
    handle = language.register_forward_pre_hook(lambda _, a, kwargs: seen.update(kwargs), with_kwargs=True)
    logits(model, inputs)
    handle.remove()
    embedded, image = seen["inputs_embeds"], inputs["input_ids"] == IMAGE
    settings = {"image_mask": image}
    with torch.no_grad(), heed.apply(model, type(method)(**{**vars(method), **settings})):
        whole = language(inputs_embeds=embedded).last_hidden_state
        cache, pieces, last = DynamicCache(), [], embedded.shape[1] - 3
        for piece in (embedded[:, :7], embedded[:, 7:last], embedded[:, last:]):
            pieces.append(language(inputs_embeds=piece, past_key_values=cache, use_cache=True).last_hidden_state)
    close(torch.cat(pieces, 1), whole)


def test_no_image_leaves_a_row_alone_unless_strict(host: str, method: Method) -> None:
    model, _, _ = parts(host)
    words = {"input_ids": torch.tensor([[1, 5, 9, 12, 4]])}
    if host == "instructblip":
        pytest.skip("it always has an image")
    plain = logits(model, words)
    with heed.apply(model, method):
        close(logits(model, words), plain)
    with (
        heed.apply(model, type(method)(**{**vars(method), "strict": True})),
        pytest.raises(ValueError, match="row 0 of the prompt has no image token"),
    ):
        logits(model, words)


def test_static_caches_work_by_hand(host: str, method: Method) -> None:
    model, _, alone = parts(host)
    if host in ("instructblip", "qwen2-vl"):
        pytest.skip("generate covers it")
    inputs = alone(0)
    with heed.apply(model, method):
        cache = StaticCache(config=model.config.get_text_config(), max_cache_len=96)
        close(logits(model, inputs, past_key_values=cache, use_cache=True), logits(model, inputs))
