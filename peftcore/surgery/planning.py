"""The plan of an injection: its sites, shapes, parameters and bytes, computed before anything is changed."""

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
    """Returns the number of values in the modules' parameters, each counted once; a quantized weight counts as the
    dense one."""
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
    """The tensors of the adapter, by their name in its file."""
    dtypes: dict[str, torch.dtype]
    """The dtypes of the tensors in `shapes`, by the same names."""
    trainable: int
    """Number of values that would train; frozen values of the adapter are not counted."""
    total: int
    """Values in the host, each parameter counted once."""
    bytes: int
    """Size of the adapter's tensors in its file, in bytes."""
    host: HostMap
    """The host map that was used."""
    notes: tuple[str, ...] = ()
    """Lines about the method's default targets: the alternative that was taken, and the parts of the host that are left
    out.
    """
    parameters: int = 0
    """Number of values in the adapter's parameters, those that would stay frozen included."""
    resident: int = 0
    """Bytes that one adapter takes on the model: all its parameters and buffers, including those that are not saved in
    files. Each further adapter takes the same again."""
    shards: tuple[Shard, ...] = ()
    """The bytes that each process holds, if a number of processes was given; otherwise empty."""

    @classmethod
    def of(cls, surgeon: Surgeon, shards: int | None = None) -> Plan:
        """Make the plan from the operators that a surgeon recorded. Their parameters that require gradients now count
        as trainable.

        Raises:
            ConfigError: `shards` is not a valid number of processes.
            UnsupportedHost: some parameter cannot be sharded.
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
        """Returns the differences of a file's tensors from the plan, in words; with `strict` also missing and unknown
        ones."""
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
        """Trainable values over values of the host: 0.01 is one percent."""
        return self.trainable / max(self.total, 1)

    @property
    def frozen(self) -> int:
        """Number of values in the adapter's parameters that would not train."""
        return self.parameters - self.trainable

    def tree(self) -> str:
        """Returns the host's map as a tree, and below it the sites that would change."""
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
