"""A network in parallel with the model that uses the model's layers: it holds low-rank updates of the layers, not their
weights.

A borrowed layer calls the model's layer of the same path in its current state, and adds a low-rank update. So the
model's tensors exist once: they are moved, cast, quantized, offloaded, written to and replaced with the model, and are
neither in the network's file nor among its parameters. Other adapters of the layer do not act in the borrowed layer.
They are not merged into its weight either: the operator that runs the network names the tensors in `reads_from_base`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from peftcore.errors import MissingContext, UnsupportedHost, UnsupportedSite
from peftcore.forward.class_swap import FORWARDS
from peftcore.forward.context.taps import Tap
from peftcore.forward.state.slot import slot_of
from peftcore.forward.tensors.view import with_tensors
from peftcore.layers.detect import dense_layer
from peftcore.targets.sites import LayerOf


class BorrowedLayer(nn.Module):
    """A layer of the model with a low-rank update: ``W x + b + up down x + bias``.

    Attributes:
        path: the layer's path, below the module that `lender` holds.
        lender: the `Tap` into which an operator puts the module of the model that has the layer, before the network
            runs.
        down: ``[rank, in, *kernel]``; None if the layer is borrowed without an update.
        up: ``[out, rank]``, zeros at the start.
        bias: the change of its bias, ``[out]``, zeros at the start; None if the bias does not change, or the layer
            lacks one.
    """

    def __init__(self, path: str, lender: Tap, like: nn.Module, rank: int, vectors: bool) -> None:
        """Stand for a layer.

        Args:
            path: of the layer.
            lender: see the class.
            like: a layer of the same kind and sizes; its values do not matter.
            rank: that of the update, at most the number of inputs or outputs; 0 for none.
            vectors: whether its bias changes, too.

        Raises:
            UnsupportedSite: there is to be an update, and it is no linear map: it has groups, or a forward of its own.
        """
        super().__init__()
        self.path, self.lender, self.layer = path, lender, dense_layer(like, "weight")
        self.down = self.up = self.bias = None
        if rank:
            if not self.layer.called:
                raise UnsupportedSite(f"{path} computes more than a linear map, so it cannot get a low-rank update")
            out, *inputs = self.layer.logical(like.weight).shape  # type: ignore[arg-type]
            rank = min(rank, out, inputs[0])
            self.down = nn.Parameter(torch.empty(rank, *inputs))
            self.up = nn.Parameter(torch.zeros(out, rank))
            nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
            if vectors and like._parameters.get("bias") is not None:
                self.bias = nn.Parameter(torch.zeros(out))

    def forward(self, x: Tensor) -> Tensor:
        """Call the layer, and add the update in the dtype of its output.

        Raises:
            MissingContext: no forward of the model runs.
            UnsupportedHost: another adapter acts at the layer, and cannot be bypassed here.
        """
        lender = self.lender.get()
        if lender is None:
            raise MissingContext(
                "this network borrows layers of a model and can run only within a forward of that model: call the model"
            )
        call = _bare(lender.get_submodule(self.path), self.path)
        if self.down is None or self.up is None:
            y: Tensor = call(x)
            return y
        y = self.layer.update(call, x, self.down, self.up, 1.0)
        return y if self.bias is None else y + self.layer.along_channels(self.bias.to(y.dtype), y)


def _bare(module: nn.Module, path: str) -> nn.Module:
    """Returns what computes a layer of the model without the adapters that act there."""
    if slot_of(module) is None:
        return module
    if not vars(module).keys().isdisjoint(FORWARDS):
        raise UnsupportedHost(
            f"{path}: a network that borrows this layer must run it without its adapters, but a forward that was set "
            "on the instance (offloading of single layers) runs them: remove() that adapter, or offload whole models"
        )
    return with_tensors(module, {})


def borrow(
    network: nn.Module, model: nn.Module, lender: Tap, layer_of: LayerOf, rank: int, vectors: bool = True
) -> None:
    """Let a network, built on the meta device, borrow its layers of a module of the model, in place.

    Layers with a matrix get an update. Norms, and all other vectors, are the network's own: they start from the
    model's. Layers that the model does not have get the values of their `reset_parameters`.

    Args:
        network: its layers have the paths that they have in the model.
        model: the module of the model that has them.
        lender: the `Tap` into which an operator puts that module, before the network runs.
        layer_of: how the model's modules store their tensors, ``surgeon.resolver.layer_of``.
        rank: the rank of the updates.
        vectors: whether norms and biases change; otherwise they are borrowed unchanged.

    Raises:
        UnsupportedSite: a layer has a matrix that is not the weight of a linear map, or both tensors and child layers.
    """
    lent = dict(model.named_modules())
    for path, layer in list(network.named_modules()):
        tensors = {name: each for name, each in layer._parameters.items() if each is not None}
        if not tensors:
            continue
        matrix = any(each.dim() > 1 for each in tensors.values())
        if path not in lent:
            layer.to_empty(device=torch.get_default_device())
            layer.reset_parameters()
        elif layer._modules or (matrix and "weight" not in tensors):
            raise UnsupportedSite(
                f"{path} cannot be borrowed: it has both tensors and child layers, or a matrix that is not called "
                "weight"
            )
        elif matrix or not vectors:
            above, _, name = path.rpartition(".")
            borrowed = BorrowedLayer(path, lender, layer, rank if matrix else 0, vectors)
            setattr(network.get_submodule(above), name, borrowed)
        else:
            layer.to_empty(device=torch.get_default_device())
            _start(layer, tensors, lent[path], layer_of)


@torch.no_grad()
def _start(layer: nn.Module, tensors: Mapping[str, Tensor], lent: nn.Module, layer_of: LayerOf) -> None:
    """Set the values of a layer to those of the model's; a model without values has none to give."""
    layer.reset_parameters()  # type: ignore[operator]
    for name in tensors:
        held = layer_of(lent, name).read(lent, name)
        if held is not None and not held.is_meta:
            layer.get_parameter(name).copy_(held)
