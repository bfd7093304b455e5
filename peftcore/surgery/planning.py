"""The result of `plan`: the sites, shapes, parameters and bytes of an adapter that is not installed yet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Size, nn

from peftcore.layers.layer import is_dense
from peftcore.registry.plugins import layer_of
from peftcore.roles import HostMap
from peftcore.surgery.sharding import Shard, shards_of
from peftcore.targets.sites import Site

if TYPE_CHECKING:
    from peftcore.contract.surgeon_protocol import Surgeon


def size_of(modules: Iterable[nn.Module]) -> int:
    """Returns the number of values in the modules' parameters. A parameter that several modules share is counted once.
    A quantized weight counts as many values as the dense weight."""
    sizes: dict[int, int] = {}
    for module in modules:
        own = {name: each for name, each in module._parameters.items() if each is not None}
        may_be_packed = any(module._buffers) or not all(is_dense(each) for each in own.values())
        if may_be_packed and (layer := layer_of(module, "weight")).packed:
            sizes[id(module)] = layer.shape(module, "weight").numel()
            own = {name: each for name, each in own.items() if name == "bias"}
        sizes |= {id(each): each.numel() for each in own.values()}
    return sum(sizes.values())


@dataclass(frozen=True)
class Plan:
    """The result of `plan`."""

    sites: tuple[Site, ...]
    """The sites at which operators would be installed."""
    shapes: dict[str, Size]
    """The shapes of the adapter's tensors, by their names in the adapter's file."""
    dtypes: dict[str, torch.dtype]
    """The dtypes of the adapter's tensors, by the names of `shapes`."""
    trainable: int
    """The number of trainable values. Frozen values of the adapter are not counted."""
    total: int
    """The number of values in the host. Shared parameters are counted once."""
    bytes: int
    """Size of the adapter's tensors in its file, in bytes."""
    host: HostMap
    """The host map that was used."""
    notes: tuple[str, ...] = ()
    """Lines about the method's default targets: the chosen alternative, and the parts of the host without a site."""
    parameters: int = 0
    """The number of values in the adapter's parameters, including frozen ones."""
    resident: int = 0
    """The bytes of one adapter on the model: all its parameters and buffers, including those that are not saved in
    files. A second adapter takes the same amount again."""
    shards: tuple[Shard, ...] = ()
    """The memory of each process, if a number of processes was passed; otherwise empty."""

    @classmethod
    def of(cls, surgeon: Surgeon, shards: int | None = None) -> Plan:
        """Returns the plan for the operators that a surgeon recorded. Parameters that require gradients now count as
        trainable.

        Raises:
            ConfigError: `shards` is not a valid number of processes.
            UnsupportedHost: one of the parameters cannot be sharded.
        """
        modules = [(graft.key, graft.operator) for graft in surgeon.grafts]
        modules += [(f"shared:{name}", shared.module) for name, shared in surgeon.owned.items()]
        tensors = {f"{path}.{key}": tensor for path, module in modules for key, tensor in module.state_dict().items()}
        parameters = {each for _, module in modules for each in module.parameters()}
        held = parameters.union(each for _, module in modules for each in module.buffers())
        return cls(
            sites=tuple(graft.site for graft in surgeon.grafts),
            shapes={key: tensor.shape for key, tensor in tensors.items()},
            dtypes={key: tensor.dtype for key, tensor in tensors.items()},
            trainable=sum(each.numel() for each in parameters if each.requires_grad),
            total=size_of(surgeon.resolver.modules.values()),
            bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()),
            host=surgeon.resolver.host,
            notes=tuple(surgeon.notices),
            parameters=sum(each.numel() for each in parameters),
            resident=sum(each.nbytes for each in held),
            shards=() if shards is None else shards_of(surgeon, shards),
        )

    def differences(
        self, shapes: Mapping[str, Size], dtypes: Mapping[str, torch.dtype], strict: bool = True
    ) -> list[str]:
        """Returns descriptions of the differences between the tensors of a file and the plan. With `strict`, missing
        and unknown tensors are differences too."""
        wrong = []
        if strict:
            wrong += [f"missing {key}" for key in sorted(self.shapes.keys() - shapes.keys())]
            wrong += [f"unknown {key}" for key in sorted(shapes.keys() - self.shapes.keys())]
        for key in sorted(self.shapes.keys() & shapes.keys()):
            if self.shapes[key] != shapes[key]:
                wrong.append(f"{key} has shape {tuple(shapes[key])}, expected {tuple(self.shapes[key])}")
            if self.dtypes[key] != dtypes[key]:
                wrong.append(f"{key} has dtype {dtypes[key]}, expected {self.dtypes[key]}")
        return wrong

    @property
    def share(self) -> float:
        """The trainable values as a fraction of the values of the host: 0.01 is one percent."""
        return self.trainable / max(self.total, 1)

    @property
    def frozen(self) -> int:
        """The number of values in the adapter's parameters that do not train."""
        return self.parameters - self.trainable

    def tree(self) -> str:
        """Returns the host map as a tree, followed by the sites, with the numbers of values and bytes."""
        frozen = f", {self.frozen:,} frozen in the adapter" if self.frozen else ""
        lines = [
            self.host.tree(),
            "",
            f"{len(self.sites)} sites, {self.trainable:,} trainable ({self.share:.3%}){frozen}, {self.bytes:,} bytes",
        ]
        lines += [f"note: {note}" for note in self.notes]
        lines += [f"process {number}: {shard}" for number, shard in enumerate(self.shards)]
        lines += [f"  {site.path}  {tuple(site.weight_shape)}  {site.form}" for site in self.sites]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.tree()
