"""ACMIL (card 09): classify a bag of instance features by several attention branches that are made to differ.

    h = ReLU(W x)                         (B, N, D)     no bias
    A = attention(h)                      (B, K, H, N)  gated (H = 1) or multi-head, see heed.predict.mil.attention
    A = STKIM(A) in training              (B, K, H, N)  some of the strongest instances at -1e9, heed.predict.mil.masking
    a = softmax(A);  F_i = a_i h          (B, K, D)     branch i says Linear_i(F_i)
    slide = Linear((mean_i a_i) h)        (B, C)

Multi-head: F_i and the slide's features go through value and output projections and a LayerNorm, without a residual.
ABMIL is the gated form with one branch, without masking and branch classifiers.

Zhang, Li, Sun, Zheng, Zhu, Yang, "Attention-Challenging Multiple Instance Learning for Whole Slide Image
Classification", ECCV 2024, arXiv 2311.07125.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from heed.catalogue import provides
from heed.errors import unknown
from heed.models import register_models
from heed.predict.mil.attention import GatedAttention, HeadBranches, HeadPooling, hide_padding
from heed.predict.mil.masking import check_masking, mask_top_instances
from heed.predict.mil.model import BagModel
from heed.predict.mil.output import BagOutput

ARCHITECTURES = ("ga", "mha")

# Width of an encoder's features, and the width D the authors reduce them to.
ENCODERS: dict[str, dict[str, int]] = {
    "medical_ssl": {"in_features": 384, "dim": 128},
    "natural_supervised": {"in_features": 512, "dim": 256},
    "clip_b": {"in_features": 512, "dim": 256},
    "clip_l_336": {"in_features": 768, "dim": 384},
    "uni": {"in_features": 1024, "dim": 512},
    "gigapath": {"in_features": 1536, "dim": 768},
}


@provides("09-acmil")
@dataclass(frozen=True)
class ABMILConfig:
    """Settings of `ABMIL`.

    Args:
        in_features: width of the instances' features; see `ENCODERS`.
        dim: width D that they are reduced to.
        num_classes: classes of bags C.
        hidden: width of the gates.
    """

    in_features: int = 384
    dim: int = 128
    num_classes: int = 2
    hidden: int = 128

    def __post_init__(self) -> None:
        for name in ("in_features", "dim", "num_classes", "hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


@provides("09-acmil")
@dataclass(frozen=True)
class ACMILConfig(ABMILConfig):
    """Settings of `ACMIL`, beside those of `ABMILConfig`.

    Args:
        arch: "ga" for gated attention, "mha" for multi-head attention.
        n_token: branches K.
        n_masked_patch: how many of the strongest instances of a row may be masked in training; 0 turns masking off.
        mask_drop: share of them that is masked. The authors found 0 to work better with some encoders.
        num_heads: H of "mha"; must divide `dim`.
        dropout: of "mha", after the output projections.
    """

    arch: str = "ga"
    n_token: int = 5
    n_masked_patch: int = 10
    mask_drop: float = 0.6
    num_heads: int = 8
    dropout: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.arch not in ARCHITECTURES:
            raise ValueError(unknown("arch", self.arch, ARCHITECTURES))
        if self.n_token < 1:
            raise ValueError(f"n_token={self.n_token}: at least one branch is needed")
        try:
            check_masking(self.n_masked_patch, self.mask_drop)
        except ValueError as error:
            raise ValueError(
                f"n_masked_patch={self.n_masked_patch}, mask_drop={self.mask_drop}: the first must be at least 0, the "
                "second lie in [0, 1]"
            ) from error
        if self.arch == "mha" and (self.num_heads < 1 or self.dim % self.num_heads):
            raise ValueError(f"dim={self.dim} is not divisible by num_heads={self.num_heads}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must lie in [0, 1)")


# The authors' names and ours, in the order in which they are replaced.
_RENAMES = (
    (r"^dimreduction\.fc1\.", "reduction."),
    (r"^attention\.attention_V\.0\.", "attention.tanh."),
    (r"^attention\.attention_U\.0\.", "attention.gate."),
    (r"^attention\.attention_weights\.", "attention.score."),
    (r"^Slide_classifier\.fc\.", "slide_classifier."),
    (r"^classifier\.(\d+)\.fc\.", r"branch_classifiers.\1."),
    (r"^q$", "attention.query"),
    (r"^sub_attention\.", "attention.branches."),
    (r"^bag_attention\.", "slide_pooling."),
    (r"\.(q|k|v|out)_proj\.", r".\1."),
    (r"\.layer_norm\.", ".norm."),
)


def _our_key(key: str) -> str:
    for theirs, ours in _RENAMES:
        key = re.sub(theirs, ours, key)
    return key


@provides("09-acmil")
class ABMIL(BagModel):
    """Gated attention pooling with one classifier; see the module for the equations and `forward` for the shapes.

    `from_authors` reads their ACMIL with gated attention and one token, whose branch classifier it leaves out.
    """

    Config = ABMILConfig

    def __init__(self, config: ABMILConfig) -> None:
        super().__init__(config)
        self.reduction = nn.Linear(config.in_features, config.dim, bias=False)
        self.attention = GatedAttention(config.dim, config.hidden)
        self.slide_classifier = nn.Linear(config.dim, config.num_classes)

    def embed(self, x: Float[Tensor, "*bag N C"]) -> Float[Tensor, "*bag N D"]:
        return self.reduction(x).relu()

    def classify(
        self,
        h: Float[Tensor, "B N D"],
        valid: Bool[Tensor, "B N"] | None,
        generator: torch.Generator | None,
        draws: Tensor | None,
    ) -> BagOutput:
        del generator, draws
        logits = hide_padding(self.attention(h), valid)
        features = (logits[:, 0].softmax(-1).to(h.dtype) @ h)[:, 0]
        return BagOutput(self.slide_classifier(features), logits, features)

    @classmethod
    def authors_key(cls, key: str) -> str | None:
        return None if key.startswith("classifier.") else _our_key(key)


@provides("09-acmil")
class ACMIL(BagModel):
    """Attention branches with random masking of the strongest; see the module for the equations.

    `BagOutput` holds what branches and bag say, and the masked attention logits. Nothing is drawn in eval mode.
    """

    Config = ACMILConfig

    def __init__(self, config: ACMILConfig) -> None:
        super().__init__(config)
        c = config
        self.reduction = nn.Linear(c.in_features, c.dim, bias=False)
        if c.arch == "ga":
            self.attention = GatedAttention(c.dim, c.hidden, c.n_token)
        else:
            self.attention = HeadBranches(c.dim, c.n_token, c.num_heads, c.dropout)
            self.slide_pooling = HeadPooling(c.dim, c.num_heads, c.dropout)
        self.branch_classifiers = nn.ModuleList(nn.Linear(c.dim, c.num_classes) for _ in range(c.n_token))
        self.slide_classifier = nn.Linear(c.dim, c.num_classes)

    def embed(self, x: Float[Tensor, "*bag N C"]) -> Float[Tensor, "*bag N D"]:
        return self.reduction(x).relu()

    def classify(
        self,
        h: Float[Tensor, "B N D"],
        valid: Bool[Tensor, "B N"] | None,
        generator: torch.Generator | None,
        draws: Tensor | None,
    ) -> BagOutput:
        c = self.config
        logits = self.attention(h)
        if self.training and c.n_masked_patch:
            present = None if valid is None else valid[:, None, None]
            logits = mask_top_instances(
                logits, c.n_masked_patch, c.mask_drop, valid=present, draws=draws, generator=generator
            )
        logits = hide_padding(logits, valid)
        pooled = logits.softmax(-1).to(h.dtype) @ h[:, None]  # (B, K, H, D)
        if c.arch == "ga":
            features = pooled[:, :, 0]
            slide = features.mean(1)  # equal to pooling by the mean of the branches' weights
        else:
            features = cast(HeadBranches, self.attention).features(pooled)
            slide = self.slide_pooling(pooled.mean(1))
        said = [classifier(f) for classifier, f in zip(self.branch_classifiers, features.unbind(1), strict=True)]
        return BagOutput(self.slide_classifier(slide), logits, slide, torch.stack(said, 1))

    @classmethod
    def authors_key(cls, key: str) -> str | None:
        return _our_key(key)


register_models(ABMIL, abmil=ABMILConfig())
register_models(ACMIL, acmil_ga=ACMILConfig(), acmil_mha=ACMILConfig(arch="mha"))
