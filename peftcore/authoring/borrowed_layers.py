"""A network in parallel with the model that uses the model's own layers. It has only low-rank updates of these layers,
and no copies of their weights.

A `BorrowedLayer` calls the model's layer of the same path, and adds a low-rank update. So the model's tensors exist
only once. If the model is moved, cast, quantized or offloaded, or its weights are changed, the network uses the new
state. The tensors are neither among the network's parameters nor in its file.

Other adapters of the layer do not act in the borrowed layer. They cannot be merged into the layer's weight either,
because the operator that runs the network lists the weight in `reads_from_base`.
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
        path: the layer's path, relative to the module in `lender`.
        lender: a `Tap` (a value that operators share during a forward). It contains the module of the model that has
            the layer; an operator stores it there before the network runs.
        down: ``[rank, in, *kernel]``; None if the layer has no update.
        up: ``[out, rank]``, zeros at the start.
        bias: the change of the layer's bias, ``[out]``, zeros at the start; None if the bias does not change, or the
            layer has no bias.
    """

    def __init__(self, path: str, lender: Tap, like: nn.Module, rank: int, vectors: bool) -> None:
        """Build the layer's update.

        Args:
            path: the path of the layer.
            lender: as described for the class.
            like: a layer of the same class and sizes. Its values are not used.
            rank: the rank of the update, which is limited to the number of inputs and of outputs; 0 for no update.
            vectors: whether the bias changes too.

        Raises:
            UnsupportedSite: `rank` is not 0, but the layer is not a linear map: it has groups or its own forward.
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
        """Returns the output of the model's layer plus the update, in the dtype of that output.

        Raises:
            MissingContext: no forward of the model is running.
            UnsupportedHost: another adapter acts at the layer, and the layer cannot be called without it.
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
    """Returns a module that computes a layer of the model without the adapters at the layer."""
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
    """Replace layers of a network by layers that use those of the model (`BorrowedLayer`), in place. The network was
    built on the meta device.

    Layers with a matrix get a low-rank update. Norms, and other layers with only vectors, become the network's own
    layers, with the model's values as initial values. Layers that the model does not have are initialized by their
    `reset_parameters`.

    Args:
        network: the network. Its layers have the same paths as the layers in `model`.
        model: the module of the model that contains the layers.
        lender: a `Tap` (a value that operators share during a forward). An operator must store that module there before
            the network runs.
        layer_of: the function that returns the `Layer` of a tensor, ``surgeon.resolver.layer_of``.
        rank: the rank of the updates.
        vectors: whether norms and biases can train; otherwise the model's are used unchanged.

    Raises:
        UnsupportedSite: a layer has a matrix that is not the weight of a linear map, or it has both tensors and child
            layers.
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
    """Copy the values of the model's layer into a layer. If the model is on the meta device, the layer gets the values
    of its `reset_parameters`."""
    layer.reset_parameters()  # type: ignore[operator]
    for name in tensors:
        held = layer_of(lent, name).read(lent, name)
        if held is not None and not held.is_meta:
            layer.get_parameter(name).copy_(held)
