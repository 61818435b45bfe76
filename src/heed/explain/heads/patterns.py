"""The attention patterns a model has learned: an autoencoder's codes of its maps, in clusters, each with a prototype.

    x = resize(sqrt(A / max A), 48 x 48)          A a patch-patch map of one head in one image
    z = encoder(x) (16),  x^ = decoder(z);        || x - x^ ||^2 is minimised with Adam
    clusters = k-means(z), label(head) = the cluster with most of its maps, prototype = decoder(cluster's centre)

After Li et al., "How Does Attention Work in Vision Transformers?" (TVCG 2023), who summarise patterns with an
autoencoder; its architecture here, like the rest, is heed's own choice.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from heed.catalogue import provides
from heed.errors import MissingExtra, unknown
from heed.explain.heads.names import nearest_names

SIDE = 48
PROJECTIONS = ("pca", "tsne")


@provides("51-vit-analytics")
class PatternAutoencoder(nn.Module):
    """Maps (n, 1, 48, 48) in [0, 1] to codes of 16 numbers and back; 140,609 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU(),
            nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(),
            nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(),
            nn.Flatten(), nn.Linear(64 * 6 * 6, 16),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.Linear(16, 64 * 6 * 6), nn.ReLU(), nn.Unflatten(1, (64, 6, 6)),
            nn.ConvTranspose2d(64, 32, 4, 2, 1), nn.ReLU(),
            nn.ConvTranspose2d(32, 16, 4, 2, 1), nn.ReLU(),
            nn.ConvTranspose2d(16, 1, 4, 2, 1), nn.Sigmoid(),
        )  # fmt: skip

    def forward(self, x: Float[Tensor, "n 1 48 48"]) -> Float[Tensor, "n 1 48 48"]:
        return self.decoder(self.encoder(x))


@provides("51-vit-analytics")
@dataclass(frozen=True)
class PatternOptions:
    """How patterns are summarised.

    Args:
        maps_per_head: images whose maps of every head are taken.
        clusters: how many patterns; at most as many as there are maps.
        epochs, learning_rate, batch_size: of the autoencoder.
        projection: "pca", which is always the same, or "tsne".
        seed: of the autoencoder, the clusters and t-SNE.
    """

    maps_per_head: int = 16
    clusters: int = 8
    epochs: int = 40
    learning_rate: float = 1e-3
    batch_size: int = 32
    projection: str = "pca"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.projection not in PROJECTIONS:
            raise ValueError(unknown("projection", self.projection, PROJECTIONS))
        for name in ("maps_per_head", "clusters", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


@provides("51-vit-analytics")
@dataclass(frozen=True, eq=False)
class Patterns:
    """The patterns of a set of maps.

    Args:
        codes: (n, 16) of the maps.
        projected: (n, 2) the codes in the plane.
        cluster: (n,) of each map, numbered from the largest cluster to the smallest.
        prototypes: (clusters, 48, 48) decoded centres, in [0, 1].
        names: the plain pattern that each cluster resembles.
        groups: (n,) which head each map comes from, as l * H + h.
        group_cluster: (L * H,) the cluster with most of the head's maps.
        error: mean squared error of the reconstruction, and variance of the maps.
    """

    codes: Float[Tensor, "n 16"]
    projected: Float[Tensor, "n 2"]
    cluster: Int[Tensor, " n"]
    prototypes: Float[Tensor, "c 48 48"]
    names: tuple[str, ...]
    groups: Int[Tensor, " n"]
    group_cluster: Int[Tensor, " g"]
    error: float
    variance: float


@provides("51-vit-analytics")
def prepare_maps(attention: Float[Tensor, "*maps N N"]) -> Float[Tensor, "*maps 48 48"]:
    """Patch-patch maps as the autoencoder takes them: sqrt(A / max A) at 48 x 48."""
    scaled = (attention.float() / attention.float().amax((-2, -1), keepdim=True).clamp_min(1e-8)).sqrt()
    flat = scaled.flatten(0, -3) if scaled.ndim > 2 else scaled[None]
    return F.interpolate(flat[:, None], (SIDE, SIDE), mode="area")[:, 0].view(*attention.shape[:-2], SIDE, SIDE)


@provides("51-vit-analytics")
def train_autoencoder(
    maps: Float[Tensor, "n 48 48"], options: PatternOptions | None = None
) -> tuple[PatternAutoencoder, float]:
    """An autoencoder of the maps, and the mean squared error it ends with. The same maps give the same autoencoder."""
    options = options or PatternOptions()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        model = PatternAutoencoder().to(maps.device)
        optimiser = torch.optim.Adam(model.parameters(), options.learning_rate)
        data = maps[:, None]
        with torch.enable_grad():
            for _ in range(options.epochs):
                for chosen in torch.randperm(len(data)).split(options.batch_size):
                    optimiser.zero_grad()
                    F.mse_loss(model(data[chosen]), data[chosen]).backward()
                    optimiser.step()
    model.eval()
    with torch.no_grad():
        error = sum(F.mse_loss(model(part), part, reduction="sum").item() for part in data.split(256)) / data.numel()
    return model, error


@provides("51-vit-analytics")
def summarise_patterns(
    maps: Float[Tensor, "n 48 48"],
    groups: Int[Tensor, " n"],
    statistics: Float[Tensor, "n S"],
    grid: tuple[int, int],
    options: PatternOptions | None = None,
) -> Patterns:
    """Codes, clusters, prototypes and names of maps.

    Args:
        maps: what `prepare_maps` gives.
        groups: (n,) which head each map comes from, from 0.
        statistics: (n, S) of `heed.explain.heads.names.statistics`, which the names are made from.
        grid: rows and columns of patches.
        options: see `PatternOptions`.

    Raises:
        MissingExtra: scikit-learn is not installed.
    """
    try:
        from sklearn.cluster import KMeans
        from sklearn.decomposition import PCA
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise MissingExtra("scikit-learn", "compare") from error
    options = options or PatternOptions()
    model, error = train_autoencoder(maps, options)
    with torch.no_grad():
        codes = torch.cat([model.encoder(part[:, None]) for part in maps.split(256)]).cpu()
    points = codes.double().numpy()
    if options.projection == "pca":
        projection = PCA(2, svd_solver="full")
    else:
        projection = TSNE(
            2, init="pca", perplexity=min(30.0, max(1.0, (len(points) - 1) / 3)), random_state=options.seed
        )
    projected = projection.fit_transform(points)
    count = min(options.clusters, len(np.unique(points, axis=0)))
    found = KMeans(count, init="k-means++", n_init=10, random_state=options.seed)  # type: ignore[arg-type]
    members = found.fit_predict(points)
    rank = np.argsort(np.argsort(-np.bincount(members, minlength=count), kind="stable"))
    cluster = torch.from_numpy(rank[members]).long()
    centres = torch.from_numpy(found.cluster_centers_[np.argsort(rank)]).to(maps)
    with torch.no_grad():
        prototypes = model.decoder(centres)[:, 0].cpu()
    means = torch.stack([statistics[cluster == number].mean(0) for number in range(count)])
    heads = int(groups.max()) + 1
    label = [Counter(cluster[groups == head].tolist()).most_common(1)[0][0] for head in range(heads)]
    return Patterns(
        codes=codes,
        projected=torch.from_numpy(np.asarray(projected)).float(),
        cluster=cluster,
        prototypes=prototypes,
        names=tuple(nearest_names(means, grid)),
        groups=groups,
        group_cluster=torch.tensor(label),
        error=error,
        variance=float(maps.var(correction=0)),
    )
