"""The scores of the track `slides`; methods are ranked by the first."""

from __future__ import annotations

from heed.compare.results import Metric

AUC = Metric("auc", "AUC", form="number")
METRICS = (
    AUC,
    Metric("f1", "macro F1", form="number"),
    Metric("accuracy", "accuracy"),
    Metric("instance_auc", "instance AUC", form="number"),
)
