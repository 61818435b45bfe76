"""What every image backbone offers: features, intermediate maps, a head that can be exchanged."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from heed.models import HeedModel
from heed.vision.parts import channels_last


class Backbone(HeedModel):
    """Base of image models (B, C, H, W) -> (B, num_classes), with timm's methods.

    A subclass sets `num_classes`, `num_features`, `feature_info` (one dict per stage with num_chs, reduction, module),
    creates its classifier as `self.head = self.classifier(num_classes)`, implements `stage_maps`, and sets
    `takes_any_size` when images need not have the configuration's img_size.

    Who trains a model on images normalised otherwise than `describe_input` says sets `model.pretrained_cfg` to a dict
    with the "mean" and "std" per channel; both are saved with the model and there again when it is loaded.
    """

    pretrained_cfg: dict[str, Any]

    num_classes: int
    num_features: int
    feature_info: list[dict[str, Any]]
    head: nn.Module
    takes_any_size: ClassVar[bool] = False

    @property
    def head_hidden_size(self) -> int:
        return self.num_features

    def classifier(self, num_classes: int) -> nn.Module:
        """A linear classifier, or nothing for num_classes=0."""
        return nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()

    def stage_maps(self, x: Tensor) -> list[Tensor]:
        """Run the stages: the maps (B, C, H, W) that `feature_info` describes."""
        raise NotImplementedError

    @property
    def least_side(self) -> int:
        """The smallest side of an image that the model takes, in pixels."""
        return 1

    def check_images(self, x: Tensor) -> None:
        """Raise ValueError for what is no batch of images of a size that this model takes."""
        channels = self.config.in_chans
        if x.ndim != 4 or x.shape[1] != channels:
            raise ValueError(f"input {tuple(x.shape)}: this model takes images (B, {channels}, H, W)")
        rows, columns = x.shape[2:]
        side = None if self.takes_any_size else self.config.img_size
        if side is not None and (rows, columns) != (side, side):
            raise ValueError(f"images of {rows} x {columns} pixels given; this model takes {side} x {side}")
        if min(rows, columns) < self.least_side:
            raise ValueError(
                f"images of {rows} x {columns} pixels are too small; sides of at least {self.least_side} are needed"
            )

    def finish(self, x: Tensor) -> Tensor:
        """From the last map (B, C, H, W) to the features that are pooled, usually a norm."""
        return x

    def maps_and_features(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """The maps of all stages, and the features that are pooled, from one run."""
        maps = self.stage_maps(x)
        return maps, self.finish(maps[-1])

    def forward_features(self, x: Tensor) -> Tensor:
        """The features before pooling, (B, C, H, W)."""
        self.check_images(x)
        return self.maps_and_features(channels_last(x))[1]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool features (B, C, H, W) and classify; with `pre_logits` stop before the classifier."""
        pooled = x.mean((2, 3))
        return pooled if pre_logits else self.head(pooled)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Exchange the classifier; 0 removes it."""
        if global_pool not in (None, "avg"):
            raise ValueError(f"global_pool={global_pool!r}: {type(self).__name__} pools by average only")
        self.num_classes = num_classes
        self.head = self.classifier(num_classes)
        self.config = dataclasses.replace(self.config, num_classes=num_classes)

    @property
    def first_conv(self) -> str | None:
        """Name of the convolution that reads the image, which timm adapts to another number of channels."""
        return next((name for name, module in self.named_modules() if isinstance(module, nn.Conv2d)), None)

    @classmethod
    def describe_input(cls, config: Any) -> dict[str, Any]:
        """timm's `pretrained_cfg` of a configuration: the images that the model takes, and where its classifier is."""
        channels, side = getattr(config, "in_chans", 3), getattr(config, "img_size", None)
        colour = channels == 3
        return {
            "input_size": (channels, side or 224, side or 224),
            "fixed_input_size": not cls.takes_any_size,
            "mean": IMAGENET_DEFAULT_MEAN if colour else (0.5,) * channels,
            "std": IMAGENET_DEFAULT_STD if colour else (0.5,) * channels,
            "num_classes": config.num_classes,
            "classifier": "head",
        }

    def _describe(self) -> dict[str, Any]:
        own = getattr(self, "pretrained_cfg", {})
        normalisation = {key: own[key] for key in ("mean", "std") if key in own}
        images = self.describe_input(self.config) | normalisation | {"first_conv": self.first_conv}
        return super()._describe() | {"num_features": self.num_features, "pretrained_cfg": images}

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | tuple[int, ...] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """The maps of chosen stages, and the final features unless `intermediates_only`.

        Args:
            x: (B, C, H, W) images.
            indices: which stages (negative counts from the end), an int for the last so many, None for all.
            norm: apply the final norm to the intermediate maps (not offered).
            stop_early: accepted for timm's sake; all stages run.
            output_fmt: "NCHW" is what there is.
            intermediates_only: return the list alone.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt={output_fmt!r}: maps are given as 'NCHW'")
        if norm:
            raise ValueError("norm=True: intermediate maps are given as the stages leave them")
        self.check_images(x)
        maps, features = self.maps_and_features(channels_last(x))
        count = len(maps)
        if indices is None:
            indices = count
        stages = range(count - indices, count) if isinstance(indices, int) else indices
        for index in stages:
            if not -count <= index < count or (isinstance(indices, int) and index < 0):
                raise ValueError(f"indices={indices}: {type(self).__name__} has {count} stages")
        chosen = [maps[index] for index in stages]
        return chosen if intermediates_only else (features, chosen)


class ClassTokenBackbone(Backbone):
    """A backbone that classifies a token of its own: its features are one place, (B, C, 1, 1), beside the maps.

    A subclass implements `maps_and_token` in the place of `stage_maps`.
    """

    def maps_and_token(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """Run the stages: the maps (B, C, H, W) that `feature_info` describes, and the class token (B, C), normed."""
        raise NotImplementedError

    def stage_maps(self, x: Tensor) -> list[Tensor]:
        return self.maps_and_token(x)[0]

    def maps_and_features(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        maps, token = self.maps_and_token(x)
        return maps, token[:, :, None, None]
