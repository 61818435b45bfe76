"""Methods that give a language model a smaller cache, and where the cache comes from.

with heed.apply(model, method) as handle:
    model.generate(ids)                              an empty cache that comes along becomes a compressed one
    cache = handle.state.cache()
    model.generate(ids, past_key_values=cache)       or a cache of your own, to look at or to ask again
    print(cache.report())

cache = method.cache(model.config)                   without `apply`, where the method never looks at queries
"""

from __future__ import annotations

import inspect
import warnings
from abc import abstractmethod
from typing import TYPE_CHECKING, Any

from torch import nn

from heed.errors import MissingExtra
from heed.hosts.attach import attach_rule
from heed.language.caches.rule import CacheRule
from heed.methods import Handle, Method

if TYPE_CHECKING:
    from heed.language.caches.layer import CompressedCache, CompressedLayer

_SOURCE = "_heed_cache_source"  # attribute of a host whose caches are compressed


class CacheMethod(Method):
    """A method that replaces the cache of a language model; a subclass makes the cache's layers.

    The handle's `state` is a `CacheSource`.
    """

    @abstractmethod
    def layer(self, index: int, rule: CacheRule | None) -> CompressedLayer:
        """An empty cache layer.

        Args:
            index: number of the layer in the cache.
            rule: to be given to the layer; None where the method is not applied to a model.
        """

    def rule(self) -> CacheRule:
        """The rule that sees the attention of a host; a subclass may have one that computes it."""
        return CacheRule()

    @property
    def needs_attention(self) -> bool:
        """Whether the cache has to see queries and masks, and so works only where the method is applied."""
        return True

    def cache(self, config: Any) -> CompressedCache:
        """A cache for `past_key_values`, without applying the method. Padding is then taken for tokens.

        Args:
            config: of the model, or of its language model.

        Raises:
            ValueError: the method looks at queries, or the model has no layers that could be compressed.
        """
        if self.needs_attention:
            raise ValueError(
                f"{self!r} looks at the model's queries, which a cache never sees: use `with heed.apply(model, method) as "
                "handle:` and there model.generate(ids), or handle.state.cache() as past_key_values"
            )
        return CacheSource(self, config, None).cache()

    def attach(self, host: nn.Module, handle: Handle) -> CacheSource:
        config = getattr(host, "config", None)
        if config is None or "past_key_values" not in inspect.signature(host.forward).parameters:
            raise TypeError(
                f"{type(host).__name__} takes no past_key_values, so it has no cache to compress; pass a language model of "
                "transformers, such as AutoModelForCausalLM gives"
            )
        if getattr(config, "is_encoder_decoder", False):
            raise TypeError(
                f"{type(host).__name__} has an encoder; only the cache of a decoder alone can be compressed"
            )
        for part in host.modules():
            if _SOURCE in vars(part):
                raise ValueError(
                    f"{type(self).__name__} cannot be applied beside {type(vars(part)[_SOURCE].method).__name__}: a model "
                    "has one cache; remove the other method first"
                )
        rule = self.rule()
        source = CacheSource(self, config, rule)
        if source.skipped:
            warnings.warn(
                f"{type(self).__name__} leaves {len(source.skipped)} of {source.layers} layers as they are, since they "
                f"hold no more than a window or a state: {', '.join(map(str, source.skipped))}",
                stacklevel=4,
            )
        attach_rule(host, rule, handle)
        handle.on_remove(rule.remove)
        handle.replace(host, _SOURCE, source)
        handle.hook(host.register_forward_pre_hook(source.provide, with_kwargs=True))
        return source


class CacheSource:
    """Makes the caches of a host: the handle's `state` of a `CacheMethod`.

    Args:
        method: makes the layers.
        config: of the model.
        rule: brings the host's attention to the layers; None without a host.

    Attributes:
        layers: how many the model has.
        skipped: numbers of those that are left as they are.
    """

    def __init__(self, method: CacheMethod, config: Any, rule: CacheRule | None) -> None:
        self.method, self.rule = method, rule
        self._config = config.get_text_config(decoder=True)
        plain, dynamic = self._plain()
        self.layers = len(plain.layers)
        self.skipped = [i for i, layer in enumerate(plain.layers) if type(layer) is not dynamic]
        if len(self.skipped) == self.layers:
            raise ValueError(
                f"all {self.layers} layers of this model keep a sliding window or a state only, which is small already: "
                f"nothing for {type(method).__name__} to compress; choose a model with full attention, or give a Mistral-"
                "like config sliding_window=None"
            )

    def cache(self) -> CompressedCache:
        """A new, empty cache for `past_key_values`."""
        from heed.language.caches.layer import CompressedCache

        cache = CompressedCache(layers=self._plain()[0].layers)
        self._fill(cache)
        return cache

    def provide(self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """A forward pre-hook of the host: any cache it uses is a compressed one.

        An empty `DynamicCache`, such as `generate` makes, is given compressed layers and stays the same object.

        Raises:
            ValueError: a cache with tokens of another origin, or of a kind that cannot grow.
        """
        kwargs = dict(zip(inspect.signature(host.forward).parameters, args, strict=False)) | kwargs
        cache, used = kwargs.get("past_key_values"), kwargs.get("use_cache")
        if cache is None:
            if used or (used is None and self._config.use_cache and not host.training):
                kwargs["past_key_values"] = self.cache()
        elif not self._made(cache):
            self._adopt(cache)
        return (), kwargs

    def _made(self, cache: Any) -> bool:
        """Whether the layers of a cache are of this source."""
        return any(getattr(layer, "rule", None) is self.rule for layer in cache.layers)

    def _adopt(self, cache: Any) -> None:
        from transformers import DynamicCache

        from heed.language.caches.layer import CompressedCache, CompressedLayer

        foreign = any(isinstance(layer, CompressedLayer) for layer in cache.layers)
        plain = isinstance(cache, DynamicCache | CompressedCache) and not cache.offloading
        if foreign or not plain or cache.get_seq_length():
            raise ValueError(
                f"{type(self.method).__name__} is applied, and cannot take over {type(cache).__name__} with "
                f"{cache.get_seq_length()} tokens: leave past_key_values and cache_implementation out, or start with "
                "handle.state.cache()"
            )
        if not cache.layers:
            cache.layers, cache.layer_class_to_replicate = self._plain()[0].layers, None
        self._fill(cache)

    def _fill(self, cache: Any) -> None:
        for index in range(self.layers):
            if index not in self.skipped:
                cache.layers[index] = self.method.layer(index, self.rule)

    def _plain(self) -> tuple[Any, type]:
        """transformers' own cache for this model, and the class of its layers that keep all tokens."""
        try:
            from transformers.cache_utils import DynamicCache, DynamicLayer
        except ImportError as error:
            raise MissingExtra("transformers", "language") from error
        return DynamicCache(config=self._config), DynamicLayer
