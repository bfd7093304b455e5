"""Finds how an attention module calls the function that computes ``softmax(q k^T) v``, and makes it call edits
(operators inside attention) instead.

Where edits act, the module's forward runs on a view: a second object with the same tensors and other attributes (see
`peftcore.forward.tensors.view`). Neither the module nor any global function changes.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import CodeType, FunctionType
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from peftcore.errors import TargetError, UnsupportedSite
from peftcore.forward.attention.attention import HostAttention, run_edits
from peftcore.forward.attention.multihead_attention import MultiheadCalls
from peftcore.forward.attention.transformers_attention import TransformersCalls
from peftcore.forward.state.slot import Edits
from peftcore.layers.layer import plain_class
from peftcore.roles.hostmap import under
from peftcore.targets.attention_sites import AttentionSite, Geometry, Projection
from peftcore.targets.resolver import Resolver
from peftcore.targets.sites import Site


class AttentionCalls(Protocol):
    """How a kind of attention module calls the function that computes ``softmax(q k^T) v``. Two objects are equal if
    they describe the same kind of call."""

    @property
    def view_class(self) -> type[nn.Module] | None:
        """The class of the object on which the forward runs (the module's view); None for the module's own class."""

    def check(self, path: str, module: nn.Module) -> None:
        """Raise UnsupportedSite if the module's configuration makes it bypass edits (operators inside attention)."""

    def prepare(self) -> None:
        """Prepare this process for a forward; never called while a compiler traces."""

    def attributes(self, module: nn.Module, edits: Edits) -> Mapping[str, Any]:
        """Returns the attributes that the module's view has in place of the module's own."""

    def run(self, stand_in: nn.Module, edits: Edits, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Returns the output of the forward of `stand_in`, the module's view. Edits run in it."""


def calls_of(module: nn.Module) -> AttentionCalls | None:
    """Returns how a module calls its attention function, determined from the module's code; None if edits (operators
    inside attention) cannot be called."""
    if plain_class(module).forward is nn.MultiheadAttention.forward:
        return MultiheadCalls()
    names = {name for code in _codes(module) for name in code.co_names}
    if {"get_interface", *_OWN_CHOICE} <= names:
        return TransformersCalls.of(module)
    return TorchCalls(plain_class(module)) if names & _TORCHS and not names >= _OWN_CHOICE else None


_OWN_CHOICE = frozenset(("_attn_implementation", "config"))
"""Names in the code of modules of transformers that choose their attention implementation."""
_TORCHS = frozenset(("scaled_dot_product_attention", "dispatch_attention_fn"))
"""The names of torch's attention function, and of the function of diffusers that calls it."""


def _codes(module: nn.Module) -> Iterator[CodeType]:
    """Yields the code of the module's forward, and the code of the processor that runs inside diffusers' modules."""
    processor = vars(module).get("processor")
    for function in (plain_class(module).forward, *([type(processor).__call__] if callable(processor) else [])):
        unwrapped = inspect.unwrap(function)
        if isinstance(unwrapped, FunctionType):
            yield unwrapped.__code__


@dataclass
class TorchCalls:
    """Makes edits (operators inside attention) act in modules that call `F.scaled_dot_product_attention`, directly
    (timm) or through a processor (diffusers). The forward runs under a torch function mode that intercepts this
    call."""

    plain: type[nn.Module]
    """The module's own class."""
    view_class: type[nn.Module] | None = field(default=None, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return {"plain": self.plain, "view_class": None}

    def check(self, path: str, module: nn.Module) -> None:
        """Does nothing, because `run` checks each forward."""

    def prepare(self) -> None:
        """Create the class of the module's views. A new class is needed because torch.compile treats modules of
        diffusers' classes as single operations, in which edits (operators inside attention) cannot act."""
        plain: Any = self.plain
        self.view_class = _traced(plain)

    def attributes(self, module: nn.Module, edits: Edits) -> Mapping[str, Any]:
        """Returns the attribute that makes timm's modules call torch's function instead of timm's code."""
        return {"fused_attn": True}

    def run(self, stand_in: nn.Module, edits: Edits, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Returns the output of the forward, in which edits (operators inside attention) replace
        `F.scaled_dot_product_attention`.

        Raises:
            UnsupportedSite: the forward did not call `F.scaled_dot_product_attention` exactly once.
        """
        mode = _SeesAttention(stand_in, edits)
        with mode:
            output = type(stand_in).forward(stand_in, *args, **kwargs)
        if mode.calls != 1:
            raise UnsupportedSite(
                f"{edits.slot.path or 'the host'} called torch's scaled_dot_product_attention {mode.calls} times in "
                "this forward, but operators inside attention need exactly one call: target other modules"
            )
        return output


@functools.cache
def _traced(plain: type[nn.Module]) -> type[nn.Module]:
    return type(plain.__name__, (plain,), {"forward": plain.forward, "__module__": plain.__module__})


_SDPA = F.scaled_dot_product_attention
"""The original function of torch, since other code may replace it in `torch.nn.functional`."""


class _SeesAttention(TorchFunctionMode):
    """Torch function mode that runs edits (operators inside attention) in place of `F.scaled_dot_product_attention`."""

    def __init__(self, module: nn.Module, edits: Edits) -> None:
        super().__init__()
        self.module, self.edits = module, edits
        self.calls = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is _SDPA:
            self.calls += 1
            return self._attention(*args, **(kwargs or {}))
        if func is Tensor.unflatten:  # torch.compile can trace it as a method only
            return args[0].unflatten(*args[1:], **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if is_causal:  # from the top left, as torch has it
            attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
        if attn_mask is not None:
            attn_mask = attn_mask[(None,) * (4 - attn_mask.dim())]
        options = {"dropout_p": dropout_p, "scale": scale, "enable_gqa": enable_gqa}
        host = HostAttention(self.module, _attention, False, key, attn_mask, options, self.edits.route is not None)
        return run_edits(self.edits, host, query, key, value)[0]


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool = False,
    **more: Any,
) -> tuple[Tensor, None]:
    return _SDPA(query, key, value, mask, **more).transpose(1, 2), None


def locate_attention(site: Site, resolver: Resolver) -> AttentionSite:
    """Returns the attention at a site: the site's module, or the module inside it that computes attention (such as
    BERT's ``attention.self``).

    Raises:
        UnsupportedSite: the site contains several attention modules or none, or the module computes attention in an
            unsupported way.
    """
    known_calls = {path: calls_of(resolver.modules[path]) for path in _paths(site, resolver)}
    inside = {path: calls for path, calls in known_calls.items() if calls is not None}
    if len(inside) != 1:
        found = f"contains several attention modules ({', '.join(inside)}): target one of them" if inside else _REASON
        raise UnsupportedSite(f"{site.path or 'the host'} {found}")
    ((path, calls),) = inside.items()
    module = resolver.modules[path]
    calls.check(path, module)
    projections = {part: _projection(resolver, path, part) for part in ("q", "k", "v")}
    known = {part: projection for part, projection in projections.items() if projection is not None}
    return AttentionSite(
        module,
        path,
        "weight",
        site.layer,
        site.role,
        form="attention",
        layer_of=site.layer_of,
        meta=site.meta,
        geometry=_geometry(path, module, known),
        projections=known,
        calls=calls,
    )


# Names of these sizes in attention classes; the first that a module has counts.
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")
_HEAD_DIM = ("qk_head_dim", "head_dim", "attention_head_size", "key_value_proj_dim", "head_size")
_VALUE_DIM = ("v_head_dim",)
_GROUPS = ("num_key_value_groups",)
_REASON = (
    "does not compute attention through transformers' attention interface or torch's scaled_dot_product_attention, so "
    "no operator can act between its projections and its softmax: target another module"
)


def _paths(site: Site, resolver: Resolver) -> Iterator[str]:
    """Returns the paths of the site's module and its submodules."""
    top = site.module_path
    return (path for path in resolver.modules if under(path, top))


def _projection(resolver: Resolver, path: str, part: str) -> Projection | None:
    """Returns the matrix of the attention for one part ("q", "k" or "v"), or its slices of a fused matrix. None if the
    host map does not contain it."""
    for family in ("attn", "cross"):
        try:
            places = resolver.host.select(f"{family}.{part}")
        except TargetError:  # fused, and its slices are not known
            continue
        for entry, slices in places:
            if under(entry.module, path):
                site = resolver.site(entry.module, entry.tensor or "weight", f"{family}.{part}", slices)
                below = site.module_path[len(path) :].lstrip(".")
                shape = site.weight_shape
                return Projection(below, site.tensor, site.layer, slices, shape[1], shape[0])
    return None


def _size(module: nn.Module, names: tuple[str, ...]) -> int | None:
    """Returns the value of the first of the named attributes that is an integer; None if there is none."""
    return next((size for name in names if isinstance(size := getattr(module, name, None), int)), None)


def _geometry(path: str, module: Any, projections: Mapping[str, Projection]) -> Geometry:
    """Returns the sizes of an attention, read from the module's attributes and checked against its projections."""
    heads = _size(module, _HEADS) or int(module.config.num_attention_heads)
    kv_heads = heads // (_size(module, _GROUPS) or 1)
    made = {part: projection.out_features for part, projection in projections.items()}
    head_dim = _size(module, _HEAD_DIM) or made.get("k", 0) // kv_heads
    value_dim = _size(module, _VALUE_DIM) or head_dim
    if made.get("v", kv_heads * value_dim) != kv_heads * value_dim or not head_dim:
        raise UnsupportedSite(
            f"{path}: cannot determine the sizes of its heads ({heads} heads, {kv_heads} of them for keys, head size "
            f"{head_dim}, projections of {made}): exclude it from the adapter's target modules"
        )
    return Geometry(heads, kv_heads, head_dim, value_dim)
