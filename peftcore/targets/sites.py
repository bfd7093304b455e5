"""A site: a target module or tensor of a host at which a method acts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.errors import UnsupportedSite
from peftcore.layers.detect import dense_layer
from peftcore.layers.layer import SLOT, Layer, Slices, plain_class, take
from peftcore.layers.pieces import whole
from peftcore.roles.stacks import arguments

LayerOf = Callable[[nn.Module, str], Layer]
SEVERAL = (
    "runs several times in one forward, for several layers of the model, so this method cannot choose one of them; use "
    "a method that acts at each of them in the same way, such as lora or houlsby_adapter"
)
"""The text of the error for a module that runs several times in one forward and has to run once."""
MIXES_ROWS = ("experts", "pos")
"""Families of roles whose modules receive chosen tokens or positions instead of rows of the batch."""
CHOOSE_AMONG_TOKENS = (("top_k_index", "top_k_weights"), ("router_indices", "routing_weights"))
"""Names of the arguments that follow the tokens in the forward of transformers' experts: the experts of each token, and
their weights."""


def is_not_turned(path: str) -> bool:
    """Returns False: without a host map, modules are assumed to receive rows first."""
    return False


class _Memory:
    """Base class with slots that cache computed values of a site, since methods read them many times. The slots are not
    in ``vars(site)``, so a copy made from ``**vars(site)`` computes its own values."""

    __slots__ = ("__dict__", "__weakref__", "_path", "_shape")
    _path: str
    _shape: torch.Size

    def __getstate__(self) -> dict[str, Any]:
        return vars(self)


@dataclass(frozen=True, eq=False)
class Site(_Memory):
    """A module of the host, a tensor of a module, or some slices of a tensor, at which a method acts.

    Attributes:
        module: the module itself.
        module_path: path of the module, "" for the host itself.
        tensor: path of the tensor below the module; "weight" for most.
        layer: how the module stores the tensor.
        role: the role by which it was found, if any.
        slices: the slices of the logical output dimension, for one part of a fused projection.
        form: "activation" if an operator may wrap the module's forward; "weight" if operators can only change the
            tensor; "attention" for queries, keys and values inside an attention module; "sequence" for a token stack (a
            module that embeds token ids and runs blocks).
        layer_of: a function that finds the `layer` of the module's other tensors.
        meta: True while planning, when only shapes are needed.
        turned: a function that returns whether the module at a path receives inputs with tokens as the first dimension.
    """

    module: nn.Module
    module_path: str
    tensor: str
    layer: Layer
    role: str | None = None
    slices: Slices | None = None
    form: str = "weight"
    layer_of: LayerOf = dense_layer
    meta: bool = False
    turned: Callable[[str], bool] = is_not_turned
    once: bool = False
    """Whether the first forward must check that it runs the module once, and raise an error otherwise."""
    among_experts: bool = False
    """Whether the module is part of one expert in a list of experts, each of which receives only the tokens chosen for
    it."""

    @property
    def path(self) -> str:
        """The name of the site in files and messages: ``h.0.attn.c_attn``, ``mha.in_proj_weight``,
        ``h.0.attn.c_attn:attn.q``."""
        try:
            return self._path
        except AttributeError:
            object.__setattr__(self, "_path", self._make_path())
            return self._path

    def _make_path(self) -> str:
        if self.form == "attention":
            return f"{self.module_path}:attention"
        plain = self.tensor == "weight" or self.form == "activation"
        path = self.module_path if plain else f"{self.module_path}.{self.tensor}".lstrip(".")
        return path if self.slices is None else f"{path}:{self.role or self.slices[0][0]}"

    @property
    def mixes_rows(self) -> bool:
        """Whether the rows of the batch cannot be separated at the module. This is so if the module receives tokens
        chosen for experts, positions, or inputs with tokens as the first dimension. It is also so if its forward takes
        no arguments (a relative position bias for all rows and windows)."""
        family = (self.role or "").partition(".")[0]
        for_all = self.role == "embed.pos" or not self.arguments
        return self.among_experts or family in MIXES_ROWS or for_all or self.tokens_first

    @property
    def tokens_first(self) -> bool:
        """Whether the module receives inputs ``[tokens, rows, ...]``, according to the host's code. Always False for
        attention and sequence sites, where the order does not matter."""
        return self.form not in ("attention", "sequence") and self.turned(self.module_path)

    def check_rows_first(self) -> None:
        """Verify that the module receives rows first, for methods that join or separate rows or tokens.

        Raises:
            UnsupportedSite: the module receives tokens first.
        """
        if self.tokens_first:
            raise UnsupportedSite(
                f"{self.path} gets tokens in front of rows of the batch, but this method needs the rows first; exclude "
                "it, or use a method that acts on each token separately, such as lora (for torch's own layers: set "
                "batch_first=True)"
            )

    @property
    def separable(self) -> bool:
        """Whether the module can run separately on some rows of the batch: it receives rows, or is a stack of experts
        that receives all tokens in order and routes them itself."""
        chooses = self.layer.batch_dims == 1 and self.arguments[1:3] in CHOOSE_AMONG_TOKENS
        return chooses or not self.mixes_rows

    @property
    def of_tokens(self) -> bool:
        """Whether the module acts on each token independently: a linear map of vectors, an embedding of tokens, a norm,
        or experts that route all tokens."""
        layer = self.layer_of(self.module, "weight") if self.tensor == "bias" else self.layer
        maps = layer.called and (layer.of_vectors or layer.one_hot)
        known = (self.role or "").partition(".")[0] in ("norm", "embed")
        inside = self.form in ("attention", "sequence")
        return self.separable and not inside and (maps or known or self.layer.batch_dims > 0)

    @property
    def arguments(self) -> tuple[str, ...]:
        """The names of the arguments of the module's forward."""
        return arguments(plain_class(self.module))

    @property
    def weight_shape(self) -> torch.Size:
        """The logical shape ``[*batch, out, in, *kernel]``, also of a quantized weight; with `slices`, the shape of the
        slices.

        Raises:
            UnsupportedSite: the module lacks the tensor, and the tensor is not a bias that could be added.
        """
        try:
            return self._shape
        except AttributeError:
            object.__setattr__(self, "_shape", self._find_shape())
            return self._shape

    def _find_shape(self) -> torch.Size:
        if not self.layer.has(self.module, self.tensor):
            return torch.Size([self._beside().out_features])
        shape = self.layer.shape(self.module, self.tensor)
        if self.slices is None:
            return shape
        dim, height = self.layer.batch_dims, sum(stop - start for start, stop in self.slices)
        return torch.Size([*shape[:dim], height, *shape[dim + 1 :]])

    @property
    def batch(self) -> tuple[int, ...]:
        """``(experts,)`` for stacked weights of experts, otherwise an empty tuple."""
        dims = self.layer.batch_dims
        return tuple(self.weight_shape[:dims]) if dims else ()

    @property
    def out_features(self) -> int:
        """The number of outputs of the linear map, or the length of a vector."""
        return self.weight_shape[self.layer.batch_dims]

    @property
    def in_features(self) -> int:
        """The number of inputs of the linear map (of one group, for grouped convolutions).

        Raises:
            UnsupportedSite: the tensor is a vector.
        """
        return self.weight_shape[self._first_input()]

    @property
    def kernel(self) -> tuple[int, ...]:
        """The kernel size of a convolution, such as ``(height, width)``; an empty tuple for other layers.

        Raises:
            UnsupportedSite: the tensor is a vector.
        """
        first, shape = self._first_input(), self.weight_shape
        return tuple(shape[first + 1 :]) if len(shape) > first + 1 else ()

    @property
    def numel(self) -> int:
        """The number of values in the tensor (or in its slices)."""
        return math.prod(self.weight_shape)

    def _first_input(self) -> int:
        """Returns the dimension of the inputs."""
        dim = self.layer.batch_dims + 1
        if dim >= len(self.weight_shape):
            raise UnsupportedSite(
                f"{self.path} is a vector of {self.out_features}, but this method needs a matrix; exclude it"
            )
        return dim

    @property
    def device(self) -> torch.device:
        """The device on which the module computes."""
        held: Tensor | None = self.module._parameters.get(self.tensor)  # as nearly always
        if held is not None:
            return held.device
        if self.layer.has(self.module, self.tensor):
            held = self.layer.like(self.module, self.tensor)
        else:
            held = next(self.module.parameters(), None)
        return torch.device("cpu") if held is None else held.device

    def weight(self) -> Tensor:
        """Returns the dense logical weight ``[*batch, out, in, *kernel]`` with the active injections, in the dtype of
        the module (for a quantized module: the dtype in which it computes). For a missing bias it is zeros. While
        planning, it is on the meta device.

        Raises:
            UnsupportedSite: no plugin can read the weight, or the module lacks it.
        """
        self.layer.check_readable(self.module, self.tensor)
        if self.meta:
            return torch.empty(self.weight_shape, device="meta")
        if not self.layer.has(self.module, self.tensor):
            return self._beside().weight().new_zeros(self.weight_shape)
        stored = self.layer.read(self.module, self.tensor)
        assert stored is not None, "a tensor that is there can be read"
        stored, slot = whole(stored), self.module.__dict__.get(SLOT)
        return self.logical(stored if slot is None else slot.with_active(self.tensor, stored))

    def base_weight(self) -> Tensor:
        """Returns the weight as `weight` does, but without injections.

        Raises:
            UnsupportedSite: no plugin can read the weight, or the module lacks it.
        """
        stored = None if self.meta else self.layer.read(self.module, self.tensor)
        return self.weight() if stored is None else self.logical(whole(stored))

    def logical(self, stored: Tensor) -> Tensor:
        """Returns the site's part (its slices) of a tensor ``[*batch, out, in, *kernel]`` that is laid out like the
        module's stored tensor, such as its gradient."""
        return take(self.layer.logical(stored), self.slices, self.layer.batch_dims)

    def _beside(self) -> Site:
        """Returns the site of the weight that belongs to a missing bias."""
        owner, _, name = self.tensor.rpartition(".")
        if name != "bias":
            hint = "; it is a whole block: target a part of it, such as the role mlp.output" * (self.role == "block")
            raise UnsupportedSite(f"{self.module_path or 'the host'} has no tensor {self.tensor!r} to act on{hint}")
        return self.at(f"{owner}.weight".lstrip("."))

    def tensors(self) -> tuple[str, ...]:
        """Returns the paths of all parameters in the same module as the site's tensor, relative to the site's module.
        Parameters that are None are included."""
        owner = self.tensor.rpartition(".")[0]
        module = self.module.get_submodule(owner)
        return tuple(f"{owner}.{name}".lstrip(".") for name in self.layer_of(module, "weight").slots(module))

    def missing(self, tensor: str) -> bool:
        """Whether the module lacks this tensor (its parameter is None)."""
        return not self.layer_of(self.module, tensor).has(self.module, tensor)

    def at(self, tensor: str) -> Site:
        """Returns the site of another tensor of the module, with the same slices."""
        return replace(self, tensor=tensor, layer=self.layer_of(self.module, tensor), form="weight")


class BesideSite(Site):
    """The site of an operator that calls the module for an additional computation, without changing it. Other operators
    may adapt or replace the same module."""

    def _make_path(self) -> str:
        return f"{super()._make_path()}:beside"
