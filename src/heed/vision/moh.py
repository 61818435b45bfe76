"""Mixture-of-Head attention in timm's vision transformers (card 27): the model's own weights, and new routers.

    y = sum_i g_i(x) H_i(x) W_O^i       H_i, W_O: those of the model; g: a new `MoHRouter` in every block

Jin, Zhu, Yuan, Yan, "MoH", ICML 2025, arXiv 2410.11842. The routers start random and small, so the model needs some
more training; the loss adds 0.01 times that of `heed.layers.moh.collect_balance`.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from timm.layers import trunc_normal_
from timm.layers.attention import Attention
from torch import Tensor, nn

from heed.catalogue import provides
from heed.layers.moh import MoHAttention


class TimmMoHAttention(MoHAttention):
    """`MoHAttention` as timm's blocks call it, with the projections and norms of the attention that it replaces."""

    def __init__(self, host: Attention, shared: int, routed: int) -> None:
        super().__init__(
            host.qkv.in_features,
            host.num_heads,
            shared=shared,
            routed=routed,
            head_dim=host.head_dim,
            attn_drop=host.attn_drop.p,
        )
        if not isinstance(host.norm, nn.Identity) or host.gate is not None:
            raise ValueError(
                "attention with scale_norm or gated=True is not converted: both act between heads and proj"
            )
        for layer in self.router.children():
            trunc_normal_(layer.weight, std=0.02)  # type: ignore[arg-type]
        self.router.to(host.qkv.weight)
        self.qkv, self.proj, self.proj_drop = host.qkv, host.proj, host.proj_drop
        self.q_norm, self.k_norm = host.q_norm, host.k_norm
        self.train(host.training)

    def forward(
        self, x: Float[Tensor, "B N C"], attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Float[Tensor, "B N C"]:
        if attn_mask is not None or is_causal:
            raise ValueError("attn_mask and is_causal are not supported: every token attends to all tokens")
        return super().forward(x)


@provides("27-moh")
def moh_vit(model: nn.Module, shared: int | Sequence[int], routed: int | Sequence[int]) -> nn.Module:
    """Replace the attention of a timm vision transformer by Mixture-of-Head attention, in place.

    Names and values of qkv and proj stay, so that timm's checkpoints still load (strict=False leaves the routers).

    Args:
        model: with timm's `Attention` (vit, deit and others).
        shared: the first heads, which every token uses; one number, or one per block.
        routed: how many of the others a token chooses; one number, or one per block.

    Returns:
        The model.

    Raises:
        ValueError: no attention found, heads that do not fit, or lists of another length than the blocks. The model is
            then as it was.
    """
    hosts = {name: module for name, module in model.named_modules() if type(module) is Attention}
    if not hosts:
        raise ValueError(f"{type(model).__name__} has no attention of timm's class Attention to convert")
    lists = [[heads] * len(hosts) if isinstance(heads, int) else list(heads) for heads in (shared, routed)]
    if any(len(heads) != len(hosts) for heads in lists):
        raise ValueError(
            f"shared has {len(lists[0])} entries, routed {len(lists[1])}; the model has {len(hosts)} attention layers"
        )
    layers = {name: TimmMoHAttention(host, *heads) for (name, host), *heads in zip(hosts.items(), *lists, strict=True)}
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    return model
