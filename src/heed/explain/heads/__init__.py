"""How does attention work in vision transformers? Which heads matter, how far each looks, what pattern it has learned.

    report = analyse(model, images, labels);   report.table();   report.to_csv("heads.csv")

`analyse` does everything in one go; its parts stand on their own as well. The method is that of Li, Wang, Dai, Wang,
Yeh, Zheng, Zhang and Ma, "How Does Attention Work in Vision Transformers? A Visual Analytics Attempt" (IEEE TVCG 29(6),
2023; arXiv 2303.13731). Its authors published no code; the formulas here are explicit readings of heed's own.
"""

from heed.explain.heads.importance import DEFAULT_METRICS, METRICS, head_importance, jensen_shannon
from heed.explain.heads.names import NAMES, name_patterns
from heed.explain.heads.patterns import (
    PatternAutoencoder,
    PatternOptions,
    Patterns,
    prepare_maps,
    summarise_patterns,
    train_autoencoder,
)
from heed.explain.heads.profile import StrengthProfile, strength_profile
from heed.explain.heads.pruning import PruningCurve, prune_order, pruning_curve
from heed.explain.heads.report import Report, analyse, compare_reports, write_tables
from heed.explain.heads.watch import HeadGate, WatchAttention

__all__ = [
    "DEFAULT_METRICS",
    "METRICS",
    "NAMES",
    "HeadGate",
    "PatternAutoencoder",
    "PatternOptions",
    "Patterns",
    "PruningCurve",
    "Report",
    "StrengthProfile",
    "WatchAttention",
    "analyse",
    "compare_reports",
    "head_importance",
    "jensen_shannon",
    "name_patterns",
    "prepare_maps",
    "prune_order",
    "pruning_curve",
    "strength_profile",
    "summarise_patterns",
    "train_autoencoder",
    "write_tables",
]
