"""Learning from bags: what every system that classifies bags of instances (multiple instance learning) is made of.

`model` says what a classifier of bags takes and returns, `attention` pools, `masking` hides the strongest instances in
training (`keys` does it in the attention of any host), `losses` are minimised by `training`, and `maps` show what was
attended to.
"""

from heed.predict.mil.attention import GatedAttention, HeadBranches, HeadPooling
from heed.predict.mil.keys import MaskTopKeys
from heed.predict.mil.losses import BagLosses, attention_diversity, bag_losses
from heed.predict.mil.maps import cumulative_attention, heatmap, instance_scores
from heed.predict.mil.masking import choose_top_instances, mask_top_instances
from heed.predict.mil.model import BagModel
from heed.predict.mil.output import BagOutput
from heed.predict.mil.training import BagRecipe, BagScores, BagTrainer, BestCheckpoint, evaluate, fit, predict

__all__ = [
    "BagLosses",
    "BagModel",
    "BagOutput",
    "BagRecipe",
    "BagScores",
    "BagTrainer",
    "BestCheckpoint",
    "GatedAttention",
    "HeadBranches",
    "HeadPooling",
    "MaskTopKeys",
    "attention_diversity",
    "bag_losses",
    "choose_top_instances",
    "cumulative_attention",
    "evaluate",
    "fit",
    "heatmap",
    "instance_scores",
    "mask_top_instances",
    "predict",
]
