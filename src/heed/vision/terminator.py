"""Terminator (card 36): five blocks of generated kernels, without attention and without residual connections.

Ten branches of a block (slow-fast neural encoding, SFNE), all (B, C, S, S), see `heed.layers.hyperzzw` for the operator:

    W, Z.W, fast = operator(x);   mix = IS(Linear(x));   hci = IS(HCI(x))
    out = (Z.W) @ fast;   out_x = (Z.W) @ mix;   out_hci = (Z.W) @ hci;   out_glu = sigmoid(out) * out
    local1..4 = depthwise kernels (3, 9, 5, 7) of (x, hci, mix, x) on (hci, x, x, mix)
    hyper = x * sigmoid(channel score of out * spatial score of out)
    y = Dropout(GELU(G-IBS(Linear([out, local2, ..., hyper]))) + b)             (B, C', S, S)

Between blocks:   o0 = B0(x);  o1 = B1(o0);  o2 = B2(o1, o0);  o3 = B3(o2, o1);  o4 = B4(o3, o2, o1)
                  logits = head(mean of o4)

Zhang, "HyperZ.Z.W Operator Connects Slow-Fast Networks for Full Context Interaction", 2024, arXiv 2401.17948. The paper
counts nine branches, the author's code has ten. Losses and optimisers are in `heed.vision.terminator_training`.

What a sample gets depends on the others of its batch, in evaluation too: standardisation uses the statistics of the
batch, and local kernels its mean.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from heed.catalogue import provides
from heed.layers.hyperzzw import (
    GlobalHyperZZW,
    GroupStandardisation,
    HyperChannelInteraction,
    HyperInteraction,
    LocalHyperZZW,
    hyperzzw_global,
    si_glu,
    standardise_instance,
)
from heed.layers.slow_net import OMEGA, ContextSlowNet, SlowNet, channel_mixer
from heed.models import HeedModel, register_models
from heed.vision.backbone import Backbone

_GROUPS = 12  # of G-IBS
_BRANCHES = 10


@provides("36-hyperzzw")
@dataclass(frozen=True)
class SFNEConfig:
    """What networks of SFNE blocks have in common; settings per block have one entry per block. Defaults: CIFAR.

    Args:
        in_chans: input channels.
        num_classes: outputs; 0 for features only.
        dims: output channels per block: multiples of 12, and each of the one before, the first of in_chans.
        previous: earlier outputs, from two blocks before on, that a block concatenates as well: 0, 1 or 2.
        local_sizes: sides of the four local kernels, odd.
        global_hidden, global_layers: width and products of the slow nets of global kernels, layers per block.
        local_hidden, local_layers: of the slow nets of local kernels.
        channel_hidden, channel_layers: of the slow nets of channel kernels.
        interaction_channel_hidden, interaction_spatial_hidden, interaction_layers: of those of the hyper interaction.
        dropout: of whole maps at the end of a block.
        omega: scale of the slow nets' initial frequencies, see `heed.layers.slow_net.SlowNet`.
        learnable: make parameters of three settings that the paper calls learned and the author's code keeps constant:
            alpha and beta of the local kernels' renormalisation, and a bias before every block.
    """

    in_chans: int = 3
    num_classes: int = 10
    dims: tuple[int, ...] = (12, 36, 72, 144, 288)
    previous: tuple[int, ...] = (0, 0, 1, 1, 2)
    local_sizes: tuple[int, ...] = (3, 9, 5, 7)
    global_hidden: int = 64
    global_layers: tuple[int, ...] = (3, 2, 2, 2, 2)
    local_hidden: int = 32
    local_layers: int = 2
    channel_hidden: int = 32
    channel_layers: int = 2
    interaction_channel_hidden: int = 16
    interaction_spatial_hidden: int = 64
    interaction_layers: int = 2
    dropout: tuple[float, ...] = (0.0, 0.05, 0.05, 0.05, 0.05)
    omega: float = OMEGA
    learnable: bool = False

    def __post_init__(self) -> None:
        if not len(self.dims) == len(self.previous) == len(self.global_layers) == len(self.dropout) > 0:
            raise ValueError(
                f"dims={self.dims}, previous={self.previous}, global_layers={self.global_layers} and "
                f"dropout={self.dropout} need one entry per block"
            )
        if len(self.local_sizes) != 4:
            raise ValueError(f"local_sizes={self.local_sizes}: a block has four local kernels")
        for width, dim in zip((self.in_chans, *self.dims), self.dims, strict=False):
            if dim % width:
                raise ValueError(
                    f"dims={self.dims} with in_chans={self.in_chans}: {dim} is not a multiple of the {width} channels "
                    "before it, so that these could not be repeated to as many"
                )
            if dim % _GROUPS:
                raise ValueError(f"dims={self.dims}: {dim} channels do not divide into G-IBS's {_GROUPS} groups")
        for i, count in enumerate(self.previous):
            if not 0 <= count <= min(2, max(0, i - 1)):
                raise ValueError(f"previous={self.previous}: block {i} can concatenate {min(2, max(0, i - 1))} at most")


@provides("36-hyperzzw")
@dataclass(frozen=True)
class TerminatorConfig(SFNEConfig):
    """Settings of `Terminator`: those of `SFNEConfig`, and

    Args:
        img_size: side of the square images in pixels, at least 2; the kernels have this size.
    """

    img_size: int = 32


@provides("36-hyperzzw")
@dataclass(frozen=True)
class SequenceTerminatorConfig(SFNEConfig):
    """Settings of `SequenceTerminator`: those of `SFNEConfig`, and

    Args:
        length: positions of a sequence, at least 2; the kernels have this size.
    """

    length: int = 784


@provides("36-hyperzzw")
def tile_channels(x: Float[Tensor, "B C *S"], channels: int) -> Float[Tensor, "B D *S"]:
    """Repeat all channels of x until there are so many.

    Raises:
        ValueError: a number that is not a multiple of x's channels.
    """
    if channels % x.shape[1]:
        raise ValueError(f"{x.shape[1]} channels, of {tuple(x.shape)}, cannot be repeated to {channels}")
    return x.repeat(1, channels // x.shape[1], *(1,) * (x.ndim - 2))


@provides("36-hyperzzw")
class SFNEBlock(nn.Module):
    """One block, (B, in_dim, *S) -> (B, dim, *S); the equations open this module.

    Args:
        in_dim: channels of the input, and of every branch.
        dim: channels of the output, a multiple of 12.
        size: positions per axis S.
        config: hidden widths, local sizes, omega.
        axes: 2 for maps, 1 for sequences.
        previous: earlier outputs that are concatenated, 0 to 2.
        global_layers: products of the global kernel's slow net.
        dropout: of whole maps.

    Raises:
        ValueError: dim not a multiple of 12; an even local size; earlier outputs whose channels do not divide in_dim.
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        size: int,
        config: SFNEConfig,
        *,
        axes: int = 2,
        previous: int = 0,
        global_layers: int = 2,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        c = config
        common: dict[str, Any] = {"axes": axes, "omega": c.omega}
        self.in_dim = in_dim
        self.previous = previous
        self.operator = GlobalHyperZZW(in_dim, size, c.global_hidden, global_layers, **common)
        self.mixer = channel_mixer(in_dim, in_dim, axes)
        self.channel_interaction = HyperChannelInteraction(in_dim, c.channel_hidden, c.channel_layers, omega=c.omega)
        self.locals = nn.ModuleList(
            LocalHyperZZW(in_dim, side, c.local_hidden, c.local_layers, learnable=c.learnable, **common)
            for side in c.local_sizes
        )
        self.hyper_interaction = HyperInteraction(
            in_dim,
            size,
            c.interaction_channel_hidden,
            c.interaction_spatial_hidden,
            c.interaction_layers,
            **common,
        )
        self.bottleneck = channel_mixer((_BRANCHES + previous) * in_dim, dim, axes)
        self.norm = GroupStandardisation(dim, _GROUPS)
        self.bias = nn.Parameter(torch.zeros(1))
        self.drop = (nn.Dropout1d if axes == 1 else nn.Dropout2d)(dropout)

    def branches(self, x: Float[Tensor, "B C *S"], *previous: Tensor) -> dict[str, Float[Tensor, "B C *S"]]:
        """The maps that are concatenated, by name and in order."""
        if len(previous) != self.previous:
            raise ValueError(f"{len(previous)} earlier outputs given; this block takes {self.previous}")
        _, context, fast = self.operator.parts(x)
        mix, hci = self.sources(x)
        out = hyperzzw_global(context, fast)
        local = [
            module(target, source)
            for module, target, source in zip(self.local_branches(), (hci, x, x, mix), (x, hci, mix, x), strict=True)
        ]
        earlier = [{f"previous{i}": tile_channels(maps, self.in_dim)} for i, maps in enumerate(previous)] + [{}, {}]
        return (
            {"out": out, "local2": local[1]}
            | earlier[0]
            | {"fast": fast, "out_x": hyperzzw_global(context, mix), "local1": local[0], "out_glu": si_glu(out)}
            | {"local3": local[2], "out_hci": hyperzzw_global(context, hci), "local4": local[3]}
            | earlier[1]
            | {"hyper": self.hyper_interaction(x, out)}
        )

    def sources(self, x: Float[Tensor, "B C *S"]) -> tuple[Float[Tensor, "B C *S"], Float[Tensor, "B C *S"]]:
        """mix and hci, from which the operators' other factors and the local kernels come."""
        return standardise_instance(self.mixer(x)), standardise_instance(self.channel_interaction(x))

    def local_branches(self) -> Iterator[LocalHyperZZW]:
        return (module for module in self.locals if isinstance(module, LocalHyperZZW))

    def kernel_weights(self) -> list[Tensor]:
        """Weights of the linear maps and filters in slow nets, those over channels left out, and in the RGUs."""
        parts = (self.operator, *(local.slow for local in self.local_branches()), self.hyper_interaction.spatial_slow)
        return [p for part in parts for name, p in part.named_parameters() if name.endswith(".weight")]

    def finish(self, standardised: Float[Tensor, "B C *S"]) -> Float[Tensor, "B C *S"]:
        """From G-IBS's output to the block's."""
        return self.drop(F.gelu(standardised) + self.bias)

    def forward(self, x: Float[Tensor, "B C *S"], *previous: Tensor) -> Float[Tensor, "B D *S"]:
        return self.finish(self.norm(self.bottleneck(torch.cat(list(self.branches(x, *previous).values()), 1))))


@provides("36-hyperzzw")
class SFNENetwork(HeedModel):
    """The blocks, what connects them, and what can be asked of them, for maps (axes=2) and sequences (axes=1)."""

    config: SFNEConfig
    head: nn.Module

    def build_blocks(self, size: int, axes: int) -> None:
        c = self.config
        self.blocks = nn.ModuleList(
            SFNEBlock(width, dim, size, c, axes=axes, previous=previous, global_layers=layers, dropout=dropout)
            for width, dim, previous, layers, dropout in zip(
                (c.in_chans, *c.dims), c.dims, c.previous, c.global_layers, c.dropout, strict=False
            )
        )
        self.fast_bias = nn.Parameter(torch.zeros(1)) if c.learnable else 0.0
        self.num_classes = c.num_classes
        self.num_features = c.dims[-1]
        self.head = self.classifier(c.num_classes)

    def classifier(self, num_classes: int) -> nn.Module:
        """A linear classifier, or nothing for num_classes=0."""
        if num_classes == 0:
            return nn.Identity()
        head = nn.Linear(self.num_features, num_classes)
        nn.init.kaiming_normal_(head.weight)
        nn.init.zeros_(head.bias)
        return head

    def run_blocks(self, x: Float[Tensor, "B C *S"]) -> list[Tensor]:
        """The outputs of all blocks."""
        outputs: list[Tensor] = []
        for block in self.sfne_blocks():
            earlier = outputs[-2 : -2 - block.previous : -1]  # the latest first
            x = block(x + self.fast_bias, *earlier)
            outputs.append(x)
        return outputs

    def sfne_blocks(self) -> Iterator[SFNEBlock]:
        for block in self.blocks:
            assert isinstance(block, SFNEBlock)
            yield block

    def global_kernels(self) -> list[Float[Tensor, "1 C *S"]]:
        """The kernels W of all blocks, for the slow neural loss; they depend on no image."""
        return [block.operator.slow() for block in self.sfne_blocks()]

    @torch.no_grad()
    def feature_means(self, x: Float[Tensor, "B C *S"]) -> list[float]:
        """Mean of what G-IBS gives in each block: zero, as the paper says of the features."""
        found: list[float] = []
        hooks = [block.norm.register_forward_hook(lambda *args: found.append(args[-1].mean().item()))
                 for block in self.sfne_blocks()]  # fmt: skip
        try:
            self.run_blocks(x)
        finally:
            for hook in hooks:
                hook.remove()
        return found

    def parameter_split(self) -> dict[str, int]:
        """Numbers of parameters: "slow" of the slow nets, "context" those of them that read features, and "fast", others."""
        slow = {id(p): p.numel() for net in self.slow_nets() for p in net.parameters()}
        context = [p for net in self.slow_nets() if isinstance(net, ContextSlowNet) for p in net.context_parameters()]
        total = sum(p.numel() for p in self.parameters())
        return {
            "slow": sum(slow.values()),
            "context": sum(p.numel() for p in context),
            "fast": total - sum(slow.values()),
        }

    def slow_nets(self) -> Iterator[SlowNet]:
        return (module for module in self.modules() if isinstance(module, SlowNet))

    def idle_parameters(self) -> list[str]:
        """Biases that a standardisation takes away again, so that their gradients are zero but for rounding."""
        return [
            f"blocks.{i}.{name}.bias"
            for i in range(len(self.blocks))
            for name in (
                "mixer",
                "bottleneck",
                "operator.rgu_x.y",
                "operator.rgu_context.y",
                *(f"locals.{n}{part}" for n in range(4) for part in ("", ".mixer")),
            )
        ]

    @classmethod
    def authors_key(cls, key: str) -> str | None:
        if key.endswith(".train_length"):
            return None
        for theirs, ours in _RENAMES:
            key = re.sub(theirs, ours, key)
        return key

    def load_authors(self, weights: dict[str, Tensor], source: str = "the authors' weights") -> Self:
        """Load a state dict that uses the author's names, in either of his spellings.

        With learnable=True the parameters that the author keeps constant stay as they are.
        """
        constant = {k: v for k, v in self.state_dict().items() if k.endswith((".alpha", ".beta")) or k == "fast_bias"}
        return super().load_authors(weights | constant, source)


def _local(rest: str) -> Callable[[re.Match[str]], str]:
    """The author numbers local branches from 1."""
    return lambda found: f".locals.{int(found[1]) - 1}.{rest}"


# The author holds a block's parts side by side in `fast_multi_branch`; his later files leave out "_hi" and write
# "fast_bias_p" in the RGUs.
_RENAMES: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (r"\.fast_multi_branch\.", "."),
    (r"\.slow_net_l(\d)\.", _local("slow.")),
    (r"\.local_interact_conv_(\d)\.channel_mixer\.", _local("mixer.")),
    (r"\.bias([1-4])$", _local("bias")),
    (r"\.hyper_interact\.slow_net_g([cs])(?:_hi)?\.", r".hyper_interaction.\1."),
    (r"\.hyper_interaction\.c\.", ".hyper_interaction.channel_slow."),
    (r"\.hyper_interaction\.s\.", ".hyper_interaction.spatial_slow."),
    (r"\.channel_mixer_hci\.slow_net_gc\.", ".channel_interaction.slow."),
    (r"\.slow_net_g\.", ".operator.slow."),
    (r"\.Fast_Kernel_rgu_2\.", ".operator.rgu_context."),
    (r"\.Fast_Kernel_rgu\.", ".operator.rgu_x."),
    (r"\.fast_linear_([kvqy])\.", r".\1."),
    (r"\.channel_mixer_mlp\.", ".mixer."),
    (r"\.bottleneck_layer\.", ".bottleneck."),
    (r"\.Kernel\.", "."),
    (r"\.(filters\.\d+)\.linear\.", r".\1."),
    (r"\.output_linear\.", ".output."),
    (r"\.fast_reduce\.", ".reduce."),
    (r"\.fast_fc1\.", ".context."),
    (r"\.fast_linears_x\.", ".context_linears."),
    (r"\.(?:fast_)?bias_pk?$", ".bias"),
    (r"^out_layer\.", "head."),
)


@provides("36-hyperzzw")
class Terminator(SFNENetwork, Backbone):
    """(B, in_chans, img_size, img_size) images to (B, num_classes) logits; all maps keep the images' size."""

    Config = TerminatorConfig

    def __init__(self, config: TerminatorConfig) -> None:
        super().__init__(config)
        self.build_blocks(config.img_size, axes=2)
        self.feature_info = [
            {"num_chs": dim, "reduction": 1, "module": f"blocks.{i}"} for i, dim in enumerate(config.dims)
        ]

    @property
    def first_conv(self) -> str:
        """The first block reads the image in all its branches; this is the plainest of them."""
        return "blocks.0.mixer"

    def stage_maps(self, x: Float[Tensor, "B C S S"]) -> list[Tensor]:
        return self.run_blocks(x)


@provides("36-hyperzzw")
class SequenceTerminator(SFNENetwork):
    """(B, in_chans, length) sequences to (B, num_classes) logits: the same blocks with kernels of one axis.

    For sequential MNIST (length 784) and sequential CIFAR-10 (length 1024, in_chans 3) flatten the images; for permuted
    MNIST permute the positions as well. The author reports these tasks and released no code for them: this is heed's own
    reading, in which the global product is a circular convolution.
    """

    Config = SequenceTerminatorConfig

    def __init__(self, config: SequenceTerminatorConfig) -> None:
        super().__init__(config)
        self.build_blocks(config.length, axes=1)

    def forward(self, x: Float[Tensor, "B C L"]) -> Float[Tensor, "B classes"]:
        c = self.config
        if x.ndim != 3 or x.shape[1:] != (c.in_chans, c.length):  # type: ignore[attr-defined]
            raise ValueError(f"input {tuple(x.shape)}: this model takes sequences (B, {c.in_chans}, {c.length})")  # type: ignore[attr-defined]
        return self.head(self.run_blocks(x)[-1].mean(2))


register_models(
    Terminator,
    # For images of 8 to 32 pixels: four blocks, and frequencies low enough for kernels that are smooth at first.
    terminator_micro=TerminatorConfig(
        img_size=8,
        in_chans=1,
        dims=(12, 24, 24, 48),
        previous=(0, 0, 1, 2),
        local_sizes=(3, 7, 5, 7),
        global_hidden=16,
        global_layers=(3, 2, 2, 2),
        local_hidden=16,
        channel_hidden=8,
        interaction_channel_hidden=8,
        interaction_spatial_hidden=16,
        dropout=(0.0,) * 4,
        omega=0.2,
    ),
    terminator_cifar=TerminatorConfig(),
)
register_models(
    SequenceTerminator,
    terminator_smnist=SequenceTerminatorConfig(in_chans=1),
    terminator_scifar10=SequenceTerminatorConfig(length=1024),
)
