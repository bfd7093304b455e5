"""Edits (operators inside attention) in attention modules of transformers, which look up their attention function by
the name in their config.

Such a module runs on a view: a second object with the same tensors (see `peftcore.forward.tensors.view`). The config of
the view contains the name of a function of peftcore, which runs the edits around the real function. Nothing global
changes. The model makes its masks for the implementation that the user chose, a later `set_attn_implementation` takes
effect at once, and saved configs do not change.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from peftcore.errors import UnsupportedSite
from peftcore.forward.attention.attention import HostAttention, run_edits
from peftcore.forward.state.slot import Edits
from peftcore.layers.layer import plain_class

SUPPORTED = ("eager", "sdpa")
"""The attention implementations that edits (operators inside attention) support. Both accept any mask."""
_PER_KEY_INDICES = {"indices", "block_indices"}
"""Arguments by which an attention selects keys by position. Added keys would shift these positions."""
_DETOURS = ("reorder_and_upcast_attn",)
"""Config options that make an attention bypass transformers' attention interface."""


@dataclass(frozen=True)
class TransformersCalls:
    """Makes edits (operators inside attention) act in modules that use transformers' attention interface."""

    view_class: ClassVar[None] = None
    eager: Callable[..., Any]
    """The attention function of the module's own file, which transformers uses for "eager"."""

    @classmethod
    def of(cls, module: nn.Module) -> TransformersCalls:
        """Returns the `TransformersCalls` of a module. Its forward must use transformers' attention interface, with the
        function `eager_attention_forward` of its file as default."""
        forward = inspect.unwrap(plain_class(module).forward)
        name = next(name for name in forward.__code__.co_names if name.endswith("eager_attention_forward"))
        return cls(forward.__globals__[name])

    def check(self, path: str, module: nn.Module) -> None:
        """Raise UnsupportedSite for implementations and options that edits (operators inside attention) do not
        support."""
        implementation_of(module.config)
        constants = inspect.unwrap(plain_class(module).forward).__code__.co_consts
        named = {name for each in constants for name in (each if isinstance(each, tuple) else (each,))}
        if chosen := named & _PER_KEY_INDICES:
            raise UnsupportedSite(
                f"{path} selects keys by position ({', '.join(chosen)}), and keys that an adapter adds in front would "
                "shift these positions: exclude it from the adapter's target modules"
            )
        for option in _DETOURS:
            if getattr(module.config, option, False):
                raise UnsupportedSite(
                    f"{path} bypasses its attention interface with {option}=True: set config.{option} = False"
                )

    def prepare(self) -> None:
        """Register peftcore's attention functions with transformers, once per process."""
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        for implementation in SUPPORTED:
            if _named(implementation) not in ALL_ATTENTION_FUNCTIONS:
                function = _edited(ALL_ATTENTION_FUNCTIONS, implementation)
                ALL_ATTENTION_FUNCTIONS.register(_named(implementation), function)

    def attributes(self, module: nn.Module, edits: Edits) -> Mapping[str, Any]:
        """Returns the attributes of the module's view: a config with the name of peftcore's attention function, and the
        values that this function reads."""
        return {"config": ConfigStandIn(module.config), "_peftcore_edits": edits, "_peftcore_eager": self.eager}

    def run(self, stand_in: nn.Module, edits: Edits, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Returns the output of the forward of the module's view."""
        return type(stand_in).forward(stand_in, *args, **kwargs)


def _edited(interface: Mapping[str, Callable[..., Any]], implementation: str) -> Callable[..., Any]:
    """Returns peftcore's attention function, which runs edits (operators inside attention) around one of transformers'
    implementations."""

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        **more: Any,
    ) -> tuple[Tensor, Tensor | None]:
        edits: Edits = module.__dict__["_peftcore_edits"]
        eager = implementation == "eager"
        function = module.__dict__["_peftcore_eager"] if eager else interface[implementation]
        host = HostAttention(module, function, not eager, key, attention_mask, more, edits.route is not None)
        output, weights = run_edits(edits, host, query, key, value)
        return output.transpose(1, 2).contiguous(), weights

    return attention


def _named(implementation: str) -> str:
    return f"peftcore_{implementation}"


class ConfigStandIn:
    """A config that differs from the real one only in the name of its attention implementation. The real config is read
    at each access, so later changes of it take effect."""

    def __init__(self, config: Any) -> None:
        self._config = config

    def __getattr__(self, name: str) -> Any:
        if name == "_config":  # while being copied or unpickled
            raise AttributeError(name)
        return getattr(self._config, name)

    @property
    def _attn_implementation(self) -> str:
        return _named(implementation_of(self._config))


def implementation_of(config: Any) -> str:
    """Returns the name of the attention implementation in a config.

    Raises:
        UnsupportedSite: edits (operators inside attention) do not support this implementation.
    """
    name: str = config._attn_implementation or "eager"
    if name not in SUPPORTED:
        raise UnsupportedSite(
            f"operators inside attention work with {' and '.join(SUPPORTED)}, not with {name!r}: call "
            "model.set_attn_implementation('sdpa')"
        )
    return name
