"""transformers' Dinat classes on heed's engine, with their own weights.

transformers' `Dinat*` call two functions that current releases of natten no longer have, with axes in the wrong order
(its heads stay behind the columns of the map), so they run with no natten at all. `DinatAttention` replaces the
forward of their attention:

    y_i = sum_{j in neighborhood(i)} softmax_j(q_i . k_j / sqrt(d) + rpb[i - j]) v_j       (card 58)
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from heed.catalogue import provides
from heed.engine.attend import attend
from heed.engine.bias import RelativeBias
from heed.engine.patterns import Neighborhood
from heed.errors import MissingExtra
from heed.layers.natten import natten2dav, natten2dqkrpb
from heed.methods import Handle, Host, Method


@provides("58-dinat")
class DinatAttention(Method):
    """Makes transformers' Dinat models run, on any device and with their released checkpoints.

    Applied to a class, models can be made and loaded while it is applied; applied to a model, that model runs:

        with heed.apply(DinatForImageClassification, DinatAttention()):
            model = DinatForImageClassification.from_pretrained(...)
            logits = model(images).logits

    A model that holds a Dinat backbone (Mask2Former, OneFormer) is made under `heed.apply(DinatBackbone, ...)`.
    """

    def attach(self, host: Host, handle: Handle) -> None:
        """See `heed.apply`.

        Raises:
            TypeError: neither a Dinat class nor a model that contains Dinat's attention.
            MissingExtra: transformers is not installed.
        """
        try:
            from transformers.models.dinat import modeling_dinat
        except ImportError as error:
            raise MissingExtra("transformers", "language") from error
        if isinstance(host, type):
            if not issubclass(host, modeling_dinat.DinatPreTrainedModel | modeling_dinat.DinatBackbone):
                raise TypeError(f"{host.__name__} is not one of transformers' Dinat classes")
            handle.replace(modeling_dinat, "requires_backends", lambda *_: None)  # natten is not needed
            handle.replace(modeling_dinat.NeighborhoodAttention, "forward", _forward)
            return
        layers = [layer for layer in host.modules() if isinstance(layer, modeling_dinat.NeighborhoodAttention)]
        if not layers:
            raise TypeError(f"{type(host).__name__} contains no NeighborhoodAttention of transformers' Dinat")
        for layer in layers:
            handle.replace(layer, "forward", _forward.__get__(layer))


def _forward(
    self: nn.Module, hidden_states: Float[Tensor, "B H W C"], output_attentions: bool | None = False
) -> tuple[Tensor, ...]:
    """(B, H, W, C) to the same, and where asked for the weights (B, heads, H, W, kernel_size ** 2)."""
    layer: Any = self
    batch, height, width, channels = hidden_states.shape
    q, k, v = (
        project(hidden_states).view(batch, height * width, layer.num_attention_heads, -1).transpose(1, 2)
        for project in (layer.query, layer.key, layer.value)
    )
    if not output_attentions and not (layer.training and layer.dropout.p):
        windows = Neighborhood((height, width), layer.kernel_size, layer.dilation)
        out = attend(q, k, v, windows, bias=RelativeBias(layer.rpb))
        return (out.transpose(1, 2).reshape(hidden_states.shape),)
    # The weights are asked for, per window: the two halves of the attention apart.
    q, k, v = (x.unflatten(2, (height, width)) for x in (q, k, v))
    scores = natten2dqkrpb(q * q.shape[-1] ** -0.5, k, layer.rpb, layer.kernel_size, layer.dilation)
    weights = layer.dropout(scores.softmax(-1))
    out = natten2dav(weights, v, layer.kernel_size, layer.dilation)
    out = out.permute(0, 2, 3, 1, 4).reshape(batch, height, width, channels)
    return (out, weights) if output_attentions else (out,)
