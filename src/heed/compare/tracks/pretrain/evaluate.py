"""What an encoder has learnt without labels, by two classifiers on its frozen features.

- k-NN: cosine distance, votes weighted by its inverse.
- linear probe: features standardised on the training images, logistic regression with scikit-learn's settings.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from heed.compare.tracks.classify.learner import ImageLearner
from heed.data.images import ImageData
from heed.errors import MissingExtra
from heed.pretrain.encoders import Encoder

_ITERATIONS = 500  # of the logistic regression at most


def frozen_scores(encoder: Encoder, learner: ImageLearner, data: ImageData, neighbours: int) -> dict[str, float]:
    """Accuracy on the test images by "knn" and "probe".

    Args:
        encoder: whose pooled features are classified.
        learner: normalises the images as in pre-training.
        data: the labelled images.
        neighbours: of the k-NN classifier; fewer where there are fewer images.
    """
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
        from sklearn.neighbors import KNeighborsClassifier
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise MissingExtra("scikit-learn", "compare") from error
    train, test = (_features(encoder, learner, images) for images in (data.train_images, data.test_images))
    near = min(neighbours, len(train))
    classifiers = {
        "knn": KNeighborsClassifier(near, weights="distance", metric="cosine"),
        "probe": make_pipeline(StandardScaler(), LogisticRegression(max_iter=_ITERATIONS)),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # all methods get the same number of iterations
        return {
            name: float(one.fit(train, data.train_labels.numpy()).score(test, data.test_labels.numpy()))
            for name, one in classifiers.items()
        }


@torch.no_grad()
def _features(encoder: Encoder, learner: ImageLearner, images: UInt8[Tensor, "n C S S"]) -> Float[np.ndarray, "n D"]:
    encoder.eval()
    parts = [encoder.pooled(learner.normalise(part)).float().cpu() for part in images.split(learner.batch)]
    return torch.cat(parts).numpy()
