"""What is known of the prompt a host is working on: where its image tokens are, what is padding, what was seen before.

A prompt begins with a forward that has no past (`past_key_values` None or empty). Forwards of several tokens with a
past are more of the prompt (a chunk, the next turn of a talk); a forward of one token with a past is a decoding step,
and what it brings is text. Everything is kept per row of the batch and by position, so padding on the left, several
images and chunks need nothing special. Beam search asks for each row several times over, from the first forward on, and
exchanges beams of one prompt only: what is known of a prompt holds for all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from heed.methods import Handle
from heed.multimodal.host import VisionHost

# Where image tokens are: (B, T) for one prompt, or a function of the ids (B, N) of any part of a prompt.
ImageMask = Tensor | Callable[[Tensor], Tensor]


class Prompt:
    """The prompt under way; read it from inside a forward of the host's language part.

    Attributes:
        image: (B, T) True at image tokens, for the positions of the prompt so far.
        real: (B, T) False at padding.
        past: positions before this forward.
        total: positions with this forward.
        decoding: this forward is a decoding step.
        text: (B, Q) the queries of this forward that come after an image token and are none.
        seen: (B, Q) image tokens up to each query of this forward.
        first: the first query that is in `text` in any row; Q when there is none.
    """

    image: Bool[Tensor, "B T"]
    real: Bool[Tensor, "B T"]
    text: Bool[Tensor, "B Q"]
    seen: Int[Tensor, "B Q"]

    def __init__(self, host: VisionHost, image_mask: ImageMask | None, strict: bool) -> None:
        self.host = host
        self.image = self.real = torch.zeros(0, 0, dtype=torch.bool)
        self.past = self.total = self.first = 0
        self.decoding = False
        self._given = image_mask
        self._strict = strict
        self._ids: Tensor | None = None  # of the forward that is to come
        self._by_host = False
        self._on_new: list[Callable[[], None]] = []

    def on_new(self, call: Callable[[], None]) -> None:
        """Call `call` whenever a new prompt begins."""
        self._on_new.append(call)

    def keys(self, mask: Bool[Tensor, "B T"], count: int) -> Bool[Tensor, "B K"]:
        """A mask over positions, for the keys of an attention layer in this forward.

        Args:
            mask: over positions from the first on; positions it does not reach are False.
            count: of keys. More than the positions so far (a static cache) are filled up behind, fewer (a sliding
                window) are the last ones.
        """
        whole = fit(mask, max(self.total, count))
        return whole if count >= self.total else whole[:, -count:]

    # How it is kept up to date: hooks on the host, its embedding and its language part.

    def follow(self, handle: Handle) -> None:
        """Keep up to date until the handle is removed."""
        from heed.hosts.transformers import NAME

        host, self._needed = self.host, NAME
        if host.model is not host.language:
            handle.hook(host.model.register_forward_pre_hook(self._host_begins, with_kwargs=True))
            handle.hook(host.model.register_forward_hook(self._host_ends, always_call=True))
        handle.hook(host.embedding.register_forward_pre_hook(self._embedding))
        handle.hook(host.language.register_forward_pre_hook(self._language_begins, with_kwargs=True))

    def _host_begins(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if isinstance(ids, Tensor):
            self._ids, self._by_host = ids, True

    def _host_ends(self, *_: Any) -> None:
        self._ids, self._by_host = None, False

    def _embedding(self, _: Any, args: tuple[Any, ...]) -> None:
        # Where the host's own forward is passed by, as InstructBLIP's generate does, this is the place that sees the ids.
        if not self._by_host and args and args[0].ndim == 2:
            self._ids = args[0]

    def _language_begins(self, language: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if language.config._attn_implementation != self._needed:
            raise ValueError(
                f"the host's attention was set to {language.config._attn_implementation!r} while a method is applied, "
                f"which needs the attention weights that only heed's function forms; leave it at {self._needed!r}"
            )
        tokens: Any = kwargs.get("inputs_embeds")
        if tokens is None:
            self._ids = tokens = kwargs.get("input_ids", args[0] if args else None)
        rows, count = tokens.shape[:2]
        cache = kwargs.get("past_key_values")
        self.past = 0 if cache is None else int(cache.get_seq_length())
        self.total = self.past + count
        self.decoding = self.past > 0 and count == 1
        ids, self._ids, self._by_host = self._ids, None, False
        if self.past == 0 or not len(self.image):  # a new prompt, or one that was begun before the method was applied
            self.image = self.real = torch.zeros(rows, self.past, dtype=torch.bool, device=tokens.device)
            for call in self._on_new:
                call()
        self.image, self.real = (_rows(mask, rows) for mask in (self.image, self.real))
        if not self.decoding:
            self.image = torch.cat([fit(self.image, self.past), self._locate(ids, rows, count, tokens.device)], 1)
            self.real = torch.cat([fit(self.real, self.past), _real(kwargs.get("attention_mask"), self, rows)], 1)
            if self._strict and not (found := self.image.any(1)).all():
                raise ValueError(f"row {int((~found).nonzero()[0])} of the prompt has no image token; give it an image")
        self._place_queries(count)

    def _place_queries(self, count: int) -> None:
        if self.decoding:
            self.seen = self.image.sum(1, keepdim=True)
            self.text, self.first = self.seen > 0, 0
            return
        self.seen = self.image.cumsum(1)[:, self.past :]
        self.text = (self.seen > 0) & ~self.image[:, self.past :]
        columns = self.text.any(0)
        self.first = int(columns.int().argmax()) if columns.any() else count

    def _locate(self, ids: Tensor | None, rows: int, count: int, device: torch.device) -> Tensor:
        """Where the image tokens of this forward are (B, Q)."""
        remedy = "pass `image_mask`, True where image features stand (B, T), or a function of the ids that gives that"
        if isinstance(self._given, Tensor):
            return fit(_rows(self._given.bool(), rows), self.total)[:, self.past :].to(device)
        if ids is None or ids.shape[1] != count:
            raise ValueError(f"the host was called with inputs_embeds and heed does not know its token ids; {remedy}")
        if self._given is not None:
            found = self._given(ids)
            if found.shape != ids.shape:
                raise ValueError(f"image_mask gave {tuple(found.shape)} for ids of {tuple(ids.shape)}; give one per id")
        elif self.host.image_ids:
            found = torch.isin(ids, torch.tensor(self.host.image_ids, device=ids.device))
        else:
            raise ValueError(f"{type(self.host.model).__name__} does not say which ids are image tokens; {remedy}")
        return _rows(found.bool(), rows).to(device)


def _real(mask: Any, prompt: Prompt, rows: int) -> Tensor:
    """What is no padding among the tokens of this forward (B, Q)."""
    count = prompt.total - prompt.past
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] >= prompt.total:
        return mask[:, prompt.past : prompt.total].bool().to(prompt.image.device)
    return torch.ones(rows, count, dtype=torch.bool, device=prompt.image.device)


def fit(mask: Tensor, length: int) -> Tensor:
    """The first `length` positions, False where the mask does not reach."""
    if mask.shape[1] >= length:
        return mask[:, :length]
    return torch.nn.functional.pad(mask, (0, length - mask.shape[1]))


def _rows(mask: Tensor, rows: int) -> Tensor:
    """One row for every row of the forward; beams of one prompt lie side by side."""
    if mask.shape[0] == rows:
        return mask
    if mask.ndim != 2 or rows % mask.shape[0]:
        raise ValueError(
            f"a mask of shape {tuple(mask.shape)} does not fit a forward of {rows} rows; give one row for each"
        )
    return mask.repeat_interleave(rows // mask.shape[0], 0)
