"""Heads of vision transformers: what is measured, on hosts of three libraries, and how wrong input is refused."""

from __future__ import annotations

import copy
import csv
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import heed
from heed.explain.heads import (
    METRICS,
    HeadGate,
    PatternOptions,
    WatchAttention,
    analyse,
    compare_reports,
    head_importance,
    name_patterns,
    prepare_maps,
    prune_order,
    pruning_curve,
    strength_profile,
    summarise_patterns,
    train_autoencoder,
    write_tables,
)
from heed.explain.heads.names import NAMES, statistics
from heed.explain.heads.profile import AgreementSums, Rings
from heed.explain.vit import Vit

HF = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 32, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip
TIMM = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
FEW = PatternOptions(maps_per_head=2, clusters=3, epochs=1)


def hosts() -> dict[str, tuple[Callable[[], nn.Module], int, bool]]:
    """Name -> how it is built, tokens before the patches, whether it classifies. One resident per kind of host."""
    t = transformers
    return {
        "heed vit": (lambda: heed.create_model("vit_micro", img_size=16, patch_size=4, in_chans=3, depth=2), 0, True),
        "heed vit, neighborhood": (
            lambda: heed.create_model(
                "vit_micro", img_size=16, patch_size=4, in_chans=3, depth=2, attention="neighborhood"
            ),
            0,
            True,
        ),
        "timm vit": (lambda: timm.create_model("vit_tiny_patch16_224", **TIMM), 1, True),
        "timm vit, mean of patches": (
            lambda: timm.create_model(
                "vit_tiny_patch16_224", **TIMM, global_pool="avg", class_token=False, fc_norm=True
            ),
            0,
            True,
        ),
        "timm deit, distilled": (lambda: timm.create_model("deit_tiny_distilled_patch16_224", **TIMM), 2, True),
        "timm vit, registers": (lambda: timm.create_model("vit_tiny_patch16_224", **TIMM, reg_tokens=4), 5, True),
        "hf vit": (lambda: t.ViTModel(t.ViTConfig(**HF)), 1, False),
        "hf vit classifier": (lambda: t.ViTForImageClassification(t.ViTConfig(**HF, num_labels=5)), 1, True),
        "hf deit": (lambda: t.DeiTForImageClassificationWithTeacher(t.DeiTConfig(**HF, num_labels=5)), 2, True),
        "hf clip": (lambda: t.CLIPVisionModel(t.CLIPVisionConfig(**HF)), 1, False),
        "hf siglip": (lambda: t.SiglipVisionModel(t.SiglipVisionConfig(**HF)), 0, False),
        "hf dinov2": (lambda: t.Dinov2ForImageClassification(t.Dinov2Config(**HF, num_labels=5)), 1, True),
        "hf dinov2, registers": (lambda: t.Dinov2WithRegistersModel(t.Dinov2WithRegistersConfig(**HF)), 5, False),
    }


def pictures(count: int = 4, size: tuple[int, int] = (16, 16)) -> Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1))


def tiny() -> nn.Module:
    """A timm ViT whose heads differ enough to be told apart."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **TIMM)
    for name, parameter in model.named_parameters():
        if "qkv" in name or "head" in name:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.mark.parametrize("name", hosts())
def test_every_host_has_a_report_and_is_left_as_it_was(name: str) -> None:
    torch.manual_seed(0)
    build, prefix, classifies = hosts()[name]
    model = build().train()  # dropout and stochastic depth are off while it is analysed
    before, attributes = copy.deepcopy(model.state_dict()), {id(m): set(vars(m)) for m in model.modules()}
    with torch.no_grad():
        plain = Vit(model.eval(), pictures()).predict(pictures())
    model.train()
    report = analyse(model, pictures(), patterns=FEW, batch_size=3, random_curves=1)
    assert all(part.training for part in model.modules())
    assert (report.grid, report.prefix) == ((4, 4), prefix)
    assert set(report.importance) == ({"prob", "jsd", "cls_l2", "sensitivity"} if classifies else {"cls_l2"})
    assert all(values.isfinite().all() and values.abs().max() > 0 for values in report.importance.values())
    total = report.profile.ring_total.sum(-1) + report.profile.patch_to_cls + report.profile.patch_to_other
    torch.testing.assert_close(total, torch.ones_like(total))
    assert report.profile.cls_to_cls.isnan().all() == (prefix == 0)
    assert bool(report.curves) == classifies
    with torch.no_grad():
        after = Vit(model.eval(), pictures()).predict(pictures())
    assert torch.equal(after.feature, plain.feature)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
    assert {id(m): set(vars(m)) for m in model.modules()} == attributes


@pytest.mark.parametrize("name", ["timm vit", "hf vit classifier", "heed vit"])
@torch.no_grad()
def test_open_gates_are_exact_and_closed_gates_leave_the_bias(name: str) -> None:
    torch.manual_seed(0)
    model = hosts()[name][0]().eval()
    vit = Vit(model, pictures())
    plain = vit.predict(pictures()).feature
    with heed.apply(model, HeadGate()):
        assert torch.equal(vit.predict(pictures()).feature, plain)
    every = [(layer, head) for layer in range(vit.layers) for head in range(vit.heads)]
    with heed.apply(model, HeadGate(every)) as handle:
        off = vit.predict(pictures()).feature
        handle.state.fill_(1.0)
        assert torch.equal(vit.predict(pictures()).feature, plain)
    bare = copy.deepcopy(model)
    for part in bare.modules():  # the output projection without its weights
        for projection in ("proj", "o_proj", "out_proj"):
            if "Attention" in type(part).__name__ and isinstance(getattr(part, projection, None), nn.Linear):
                getattr(part, projection).weight.zero_()
    torch.testing.assert_close(off, Vit(bare, pictures()).predict(pictures()).feature)
    assert torch.equal(vit.predict(pictures()).feature, plain)


def test_gates_per_image() -> None:
    model = tiny()
    gates = torch.ones(2, 4, 3)
    gates[1, 2, 0] = 0
    with torch.no_grad():
        with heed.apply(model, HeadGate(gates=gates)):
            mixed = model(pictures())
        with heed.apply(model, HeadGate([(1, 0)])):
            off = model(pictures())
        plain = model(pictures())
    torch.testing.assert_close(mixed, torch.stack([plain[0], plain[1], off[2], plain[3]]))


def test_permuting_heads_permutes_the_metrics() -> None:
    model, order = tiny(), torch.tensor([2, 0, 1])
    labels = torch.tensor([0, 3, 1, 4])
    plain = head_importance(model, pictures(), labels, metrics=METRICS)
    layer = model.blocks[1].attn  # type: ignore[index, union-attr]
    with torch.no_grad():
        for values in (layer.qkv.weight, layer.qkv.bias):
            values.copy_(values.unflatten(0, (3, 3, 8))[:, order].flatten(0, 2))
        layer.proj.weight.copy_(layer.proj.weight.unflatten(1, (3, 8))[:, order].flatten(1))
    permuted = head_importance(model, pictures(), labels, metrics=METRICS)
    for name, values in plain.items():
        torch.testing.assert_close(permuted[name][1], values[1][order], atol=1e-6, rtol=1e-3, msg=name)
        torch.testing.assert_close(permuted[name][0], values[0], atol=1e-6, rtol=1e-3, msg=name)


def test_batches_and_loaders_do_not_matter() -> None:
    model, labels = tiny(), torch.tensor([0, 3, 1, 4])
    whole = analyse(model, pictures(), labels, patterns=None)
    loader = [{"pixel_values": pictures()[:1], "labels": labels[:1]}, (pictures()[1:], labels[1:])]
    parts = analyse(model, loader, patterns=None)
    for name, values in whole.importance.items():
        torch.testing.assert_close(parts.importance[name], values)
    for name, values in vars(whole.profile).items():
        torch.testing.assert_close(getattr(parts.profile, name), values)
    torch.testing.assert_close(parts.content_agnostic, whole.content_agnostic, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(parts.collected.displacement, whole.collected.displacement)
    assert parts.accuracy == whole.accuracy
    limited = analyse(model, loader, patterns=None, limit=2)
    assert limited.images == 2


@given(rows=st.integers(1, 5), columns=st.integers(1, 5), prefix=st.integers(0, 3), seed=st.integers(0, 99))
@settings(max_examples=20)
def test_rings_share_out_all_attention(rows: int, columns: int, prefix: int, seed: int) -> None:
    tokens = rows * columns + prefix
    weights = torch.randn(2, tokens, tokens, generator=torch.Generator().manual_seed(seed)).mul(3).softmax(-1)
    found = strength_profile(weights, (rows, columns))
    total = found.ring_total.sum(-1) + found.patch_to_cls + found.patch_to_other
    torch.testing.assert_close(total, torch.ones(2))
    if prefix:
        others = weights[:, 0, 1:prefix].sum(-1)
        torch.testing.assert_close(found.cls_to_patches + found.cls_to_cls + others, torch.ones(2))
    uniform = strength_profile(torch.full((tokens, tokens), 1 / tokens), (rows, columns))
    torch.testing.assert_close(uniform.ring_mean, torch.full((max(rows, columns),), 1 / tokens))
    assert float(uniform.entropy) == pytest.approx(math.log(tokens), abs=1e-4)
    assert Rings((rows, columns)).sizes.sum(-1).eq(rows * columns).all()


def test_content_agnostic_score_is_the_mean_correlation_of_pairs() -> None:
    maps = torch.rand(5, 2, 9, 9, generator=torch.Generator().manual_seed(0))
    maps[:, 1] = maps[0, 1]
    sums = AgreementSums(1, 0)
    sums.add(0, maps[:2])
    sums.add(0, maps[2:])
    pairs = torch.corrcoef(maps[:, 0].flatten(1))[torch.triu_indices(5, 5, 1).unbind()]
    torch.testing.assert_close(sums.result()[0], torch.stack([pairs.mean(), torch.tensor(1.0)]))


def test_pruning_follows_the_order_and_ends_without_heads() -> None:
    model, labels = tiny(), torch.tensor([0, 3, 1, 4])
    metric = torch.tensor([[0.2, 0.1, 0.1], [0.3, 0.0, 0.4]])
    order = prune_order(metric)
    assert order.tolist() == [4, 1, 2, 0, 3, 5]
    assert prune_order(metric, most_important_first=True).tolist() == [5, 3, 0, 2, 1, 4]
    curve = pruning_curve(model, pictures(), order, labels)
    with torch.no_grad():
        for k in (0, 2, 6):
            with heed.apply(model, HeadGate([(n // 3, n % 3) for n in order[:k].tolist()])):
                p = model(pictures()).softmax(-1)
            assert float(curve.true_prob[k]) == pytest.approx(float(p.gather(1, labels[:, None]).mean()), abs=1e-6)
            assert float(curve.accuracy[k]) == float((p.argmax(-1) == labels).float().mean())


# Patterns


def planted(grid: tuple[int, int]) -> dict[str, Tensor]:
    """One map (N, 1 + N) of every plain pattern, with a class token before the patches."""
    rings = Rings(grid)
    down, right, distance = rings.down, rings.right, rings.distance
    keys = torch.zeros_like(down, dtype=torch.bool)
    keys[:, [3, 4, 11]] = True
    places = {
        "self": distance == 0,
        "near": distance == 1,
        "row": down == 0,
        "column": right == 0,
        "left": (down == 0) & (right == -1),
        "right": (down == 0) & (right == 1),
        "up": (right == 0) & (down == -1),
        "down": (right == 0) & (down == 1),
        "global": distance >= 0,
        "content": keys,
    }
    maps = {name: torch.cat([~p.any(1, keepdim=True), p], 1).float() for name, p in places.items()}
    maps["CLS"] = torch.zeros_like(maps["self"])
    maps["CLS"][:, 0] = 1
    return {name: values / values.sum(-1, keepdim=True) for name, values in maps.items()}


@given(noise=st.floats(0, 0.3), rows=st.integers(4, 9), columns=st.integers(4, 9))
@settings(max_examples=15)
def test_plain_patterns_get_their_names(noise: float, rows: int, columns: int) -> None:
    maps = planted((rows, columns))
    weights = torch.stack(list(maps.values()))
    weights = (1 - noise) * weights + noise * torch.rand_like(weights).softmax(-1)
    assert name_patterns(weights, (rows, columns), 1) == list(maps)
    assert set(maps) == set(NAMES)


def test_summary_of_planted_patterns() -> None:
    grid, copies = (8, 8), 6
    maps = [values[:, 1:] for name, values in planted(grid).items() if name in ("self", "row", "column", "left")]
    noise = torch.rand(4, copies, 64, 64, generator=torch.Generator().manual_seed(0)) * 0.02
    weights = torch.stack(maps)[:, None] + noise / 64
    weights = (weights / weights.sum(-1, keepdim=True)).flatten(0, 1)
    heads = torch.arange(4).repeat_interleave(copies)
    found = summarise_patterns(
        prepare_maps(weights), heads, statistics(weights, Rings(grid), 0), grid, PatternOptions(clusters=4, epochs=60)
    )
    assert found.codes.shape == (24, 16)
    assert found.prototypes.shape == (4, 48, 48)
    assert found.group_cluster.shape == (4,)
    assert set(found.names) <= set(NAMES)
    near = torch.cdist(found.codes, found.codes).fill_diagonal_(torch.inf).argmin(1)
    assert (heads[near] == heads).float().mean() >= 0.9
    again = summarise_patterns(
        prepare_maps(weights), heads, statistics(weights, Rings(grid), 0), grid, PatternOptions(clusters=4, epochs=60)
    )
    assert torch.equal(found.codes, again.codes)
    assert torch.equal(found.cluster, again.cluster)


def test_autoencoder_has_the_size_it_should_and_leaves_the_random_state() -> None:
    state = torch.get_rng_state()
    model, error = train_autoencoder(torch.rand(4, 48, 48, generator=torch.Generator().manual_seed(0)), FEW)
    assert sum(p.numel() for p in model.parameters()) == 140_609
    assert 0 < error < 1
    assert torch.equal(torch.get_rng_state(), state)


# Reports


def test_report_as_table_csv_and_json(tmp_path: Path) -> None:
    report = analyse(tiny(), pictures(), torch.tensor([0, 3, 1, 4]), name="tiny", metrics=METRICS, patterns=FEW)
    rows = report.table()
    assert [(row["layer"], row["head"]) for row in rows] == [(layer, head) for layer in range(2) for head in range(3)]
    assert set(METRICS) < set(rows[0])
    assert all(row["pattern"] in NAMES and 0 <= row["cluster"] < 3 and 0 <= row["dominant_ring"] < 4 for row in rows)
    report.to_csv(tmp_path / "heads.csv")
    with (tmp_path / "heads.csv").open() as file:
        assert [float(row["jsd"]) for row in csv.DictReader(file)] == [row["jsd"] for row in rows]
    report.to_json(tmp_path / "tiny.json")
    read = json.loads((tmp_path / "tiny.json").read_text())
    assert read["heads"] == rows
    assert len(read["trend"]["mean_distance"]["mean"]) == 2, "the trend over layers is part of every report"
    assert set(read["curves"]) == {"jsd, least first", "jsd, most first", "random 0", "random 1", "random 2"}
    assert read["agreement"]["prob/loss"] == report.agreement()["prob", "loss"]


def test_several_models_side_by_side(tmp_path: Path) -> None:
    first = analyse(tiny(), pictures(), name="one", patterns=None, curves=False)
    second = analyse(hosts()["hf clip"][0](), pictures(), name="two/b", patterns=None)
    rows = compare_reports([first, second])
    assert [row["model"] for row in rows] == ["one", "two/b"]
    assert rows[1]["harmful_heads"] is None
    write_tables([first, second], tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"heads.csv", "models.csv", "one.json", "two-b.json"}
    assert len((tmp_path / "heads.csv").read_text().splitlines()) == 1 + 6 + 6
    with pytest.raises(ValueError, match="name of its own"):
        compare_reports([first, first])


def test_a_classifier_of_ones_own() -> None:
    torch.manual_seed(0)
    model, text = hosts()["hf clip"][0](), torch.randn(24, 7)
    found = head_importance(model, pictures(), metrics=["prob", "sensitivity"], classifier=lambda f: f @ text)
    assert all(values.shape == (2, 3) and values.abs().max() > 0 for values in found.values())


def test_other_sizes_and_oblong_grids() -> None:
    oblong = timm.create_model("vit_tiny_patch16_224", **{**TIMM, "img_size": (16, 24)})
    assert analyse(oblong, pictures(size=(16, 24)), patterns=None, curves=False).grid == (4, 6)
    larger = hosts()["hf vit classifier"][0]()
    assert analyse(larger, pictures(size=(16, 24)), patterns=None, curves=False).grid == (4, 6)


# Bad input


def test_models_that_cannot_be_analysed() -> None:
    with pytest.raises(TypeError, match="has no attention layers"):
        head_importance(nn.Sequential(nn.Flatten(), nn.Linear(768, 5)), pictures())
    windows = transformers.SwinConfig(
        image_size=16, patch_size=4, embed_dim=8, depths=[1], num_heads=[2], window_size=2
    )
    for swin in (
        transformers.SwinModel(windows),
        timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1)),
    ):
        with pytest.raises(TypeError, match=r"Swin\w* attends inside windows.*timm's VisionTransformer"):
            head_importance(swin, pictures())
    text = transformers.BertModel(transformers.BertConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1))
    with pytest.raises(TypeError, match="heads of BertModel cannot be analysed"):
        head_importance(text, pictures())


def test_grids_that_do_not_fit() -> None:
    weights = torch.full((1, 14, 14), 1 / 14)
    with pytest.raises(ValueError, match=r"14 tokens are no square of patches; pass grid=\(h, w\)"):
        strength_profile(weights)
    assert strength_profile(weights, (2, 6)).ring_total.shape == (1, 6)
    with pytest.raises(ValueError, match=r"grid=\(5, 5\) does not fit 14 tokens"):
        strength_profile(weights, (5, 5))
    with pytest.raises(ValueError, match=r"grid=\(4, 5\) does not fit 17 tokens"):
        analyse(tiny(), pictures(), grid=(4, 5))
    with pytest.raises(ValueError, match="has 3 queries"):
        strength_profile(torch.ones(3, 14), (2, 6))


@pytest.mark.parametrize("label", [-1, 5])
def test_labels_outside_the_classes(label: int) -> None:
    with pytest.raises(ValueError, match=f"label {label} is no class of the model, which has 5, 0 to 4"):
        head_importance(tiny(), pictures(), torch.tensor([0, 1, label, 2]))


@pytest.mark.parametrize(
    ("off", "words"),
    [((2, 0), "layer 2: layers are numbered 0 to 1"), ((0, -1), "head -1: heads of layer 0 are numbered 0 to 2")],
)
def test_heads_that_are_not_there(off: tuple[int, int], words: str) -> None:
    with pytest.raises(IndexError, match=words):
        heed.apply(tiny(), HeadGate([off]))


def test_orders_with_heads_that_are_not_there() -> None:
    with pytest.raises(IndexError, match="layer 2"):
        pruning_curve(tiny(), pictures(), torch.tensor([6]))


def test_wrong_arguments() -> None:
    model = tiny()
    with pytest.raises(ValueError, match="no images to analyse"):
        head_importance(model, [])
    with pytest.raises(ValueError, match="unknown metric 'prop'; did you mean 'prob'"):
        head_importance(model, pictures(), metrics=["prop"])
    with pytest.raises(ValueError, match="3 labels for 4 images"):
        head_importance(model, pictures(), torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match="some batches have labels"):
        head_importance(model, [(pictures(), torch.tensor([0, 1, 2, 3])), pictures()])
    with pytest.raises(ValueError, match="gates of shape"):
        heed.apply(model, HeadGate(gates=torch.ones(3, 3)))
    with pytest.raises(ValueError, match="has no classifier; pass"):
        head_importance(hosts()["hf clip"][0](), pictures(), metrics=["jsd"])
    with pytest.raises(ValueError, match="unknown projection 'umap'"):
        PatternOptions(projection="umap")
    with pytest.raises(ValueError, match="clusters=0"):
        PatternOptions(clusters=0)
    with pytest.raises(ValueError, match="not among the metrics computed"):
        analyse(model, pictures(), curves=["flip"], patterns=None)


def test_fused_attention_forced_on() -> None:
    class Forced(transformers.ViTForImageClassification):
        calls = 0

        def forward(self, *args: object, **kwargs: object) -> object:
            self.calls += 1
            if self.calls == 2:
                self.set_attn_implementation("sdpa")
            return super().forward(*args, **kwargs)  # type: ignore[arg-type]

    with pytest.raises(RuntimeError, match="fused attention is forced on; switch to eager"):
        analyse(Forced(transformers.ViTConfig(**HF)), pictures(), patterns=None)


def test_watching_keeps_nothing_and_sees_every_layer() -> None:
    model, seen = tiny(), []
    with torch.no_grad(), heed.apply(model, WatchAttention(lambda layer, a: seen.append((layer, tuple(a.shape))))):
        model(pictures())
    assert seen == [(0, (4, 3, 17, 17)), (1, (4, 3, 17, 17))]
