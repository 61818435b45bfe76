"""Routing Transformer (card 08): some heads attend by content, inside clusters of online k-means, the others locally.

    kmeans.py      centroids, distances, commitment loss         clustered.py   members, attention inside, scatter mean
    local.py       blocks and strides                            relative.py    learned relative positions
    layer.py       the layer of mixed heads                      stack.py       blocks of a model
    model.py       language model, encoder, encoder-decoder      image.py       images value by value
    config.py      settings and the authors' configurations      decode.py      caches, nucleus sampling
    checkpoint.py  the authors' names                            training.py    Adafactor, schedule, cut texts
    package*.py    the rule of the PyTorch package, variant="lucidrains"

Roy, Saffar, Vaswani, Grangier, "Efficient Content-Based Sparse Attention with Routing Transformers", TACL 2021, arXiv
2003.05997.
"""

from __future__ import annotations

from heed.catalogue import provides
from heed.errors import unknown
from heed.language.routing.cache import LayerCache
from heed.language.routing.checkpoint import from_tensorflow, package_key
from heed.language.routing.clustered import (
    RoutedHeads,
    gather_members,
    nearest_members,
    scatter_mean,
    strided_members,
)
from heed.language.routing.config import RoutingConfig, RoutingSettings
from heed.language.routing.decode import generate
from heed.language.routing.image import RoutingImageConfig, RoutingImageModel
from heed.language.routing.kmeans import HashedClusters, OnlineKMeans, normalise
from heed.language.routing.layer import RoutingAttention
from heed.language.routing.local import LocalHeads, StridedHeads, from_blocks, to_blocks
from heed.language.routing.model import (
    RoutingEncoder,
    RoutingSeq2Seq,
    RoutingSeq2SeqConfig,
    RoutingTransformerLM,
    Score,
    shift_right,
)
from heed.language.routing.package import PackageLM, PackageSeq2Seq
from heed.language.routing.package_attention import PackageAttention, UnitKMeans
from heed.language.routing.package_config import PackageConfig
from heed.language.routing.relative import RelativePositions, attend_group, visible_bias
from heed.language.routing.training import adafactor, cut_randomly

__all__ = [
    "HashedClusters",
    "LayerCache",
    "LocalHeads",
    "OnlineKMeans",
    "PackageAttention",
    "PackageConfig",
    "PackageLM",
    "PackageSeq2Seq",
    "RelativePositions",
    "RoutedHeads",
    "RoutingAttention",
    "RoutingConfig",
    "RoutingEncoder",
    "RoutingImageConfig",
    "RoutingImageModel",
    "RoutingSeq2Seq",
    "RoutingSeq2SeqConfig",
    "RoutingSettings",
    "RoutingTransformerLM",
    "Score",
    "StridedHeads",
    "UnitKMeans",
    "adafactor",
    "attend_group",
    "cut_randomly",
    "from_blocks",
    "from_tensorflow",
    "gather_members",
    "generate",
    "nearest_members",
    "normalise",
    "package_key",
    "routing_lm",
    "scatter_mean",
    "shift_right",
    "strided_members",
    "to_blocks",
    "visible_bias",
]


@provides("08-routing")
def routing_lm(variant: str = "official", **settings: object) -> RoutingTransformerLM | PackageLM:
    """A new language model by one of the two rules; both map ids (B, T) to logits (B, T, V).

    Args:
        variant: "official", the authors' rule, or "lucidrains", that of the PyTorch package.
        settings: fields of `RoutingConfig` or of `PackageConfig`.

    Raises:
        ValueError: another variant, or settings that do not fit each other.
        TypeError: a setting that the variant does not have.
    """
    if variant == "official":
        return RoutingTransformerLM(RoutingConfig(**settings))  # type: ignore[arg-type]
    if variant == "lucidrains":
        return PackageLM(PackageConfig(**settings))  # type: ignore[arg-type]
    raise ValueError(unknown("variant", variant, ("official", "lucidrains")))
