"""One method with its operators in a model, for that method's own functions to read: an injection, or a part of a
hybrid."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peftcore.contract.method import Method
from peftcore.contract.operators import _Base
from peftcore.errors import ExportError, NoWeights, PluginError
from peftcore.injection.freezing import freeze
from peftcore.layers.pieces import is_empty
from peftcore.registry.plugins import registry
from peftcore.surgery.surgeon import Graft, Surgeon
from peftcore.targets.sites import Site
from peftcore.utils.journal import Journal

if TYPE_CHECKING:
    from peftcore.injection.injection import Injection


class AppliedMethod(ABC):
    """One method in a model, with its operators. The functions of `Method` get one: an `Injection`, or a `HybridPart`
    where the method is a part of a hybrid. Both read the same: a part names things as if it were applied by itself.
    `trainable` gets a `Planned` too, for a plan.

    Attributes:
        name: of an injection, its name on this model; of a part, its name in the hybrid.
        model: the model.
        method: the method.
        config: its options.
        grafts: the operators, each with its sites.
        steps_taken: which step the method's schedule saw last, if it has one.
    """

    def __init__(self, name: str, surgeon: Surgeon) -> None:
        self.name = name
        self.model = surgeon.model
        self.method: Method = surgeon.method
        self.config: Any = surgeon.config  # of the method's own `Config`
        self.grafts: list[Graft] = surgeon.grafts
        self.steps_taken = 0
        self._surgeon = surgeon

    @property
    @abstractmethod
    def whole(self) -> Injection:
        """The injection itself, or of a part the injection that it belongs to, which is switched, merged, saved,
        removed."""

    @property
    def operators(self) -> dict[str, _Base]:
        """The operators by site path (of a hybrid, with the part before it: ``0/model.layers.0.mlp``)."""
        return {graft.key.removeprefix(self._surgeon.part): graft.operator for graft in self.grafts}

    @property
    def sites(self) -> list[Site]:
        """The sites of the operators, in the order in which the method recorded them."""
        return [graft.site for graft in self.grafts]

    @property
    def shared(self) -> dict[str, Any]:
        """State that several operators use, by name."""
        return {name: shared.module for name, shared in self._surgeon.owned.items()}

    @property
    def parts(self) -> dict[str, HybridPart]:
        """The methods of a hybrid, by name of the part."""
        return {name: HybridPart(name, surgeon, self.whole) for name, surgeon in self._surgeon.parts.items()}

    @property
    def reads_tokens(self) -> bool:
        """Whether an operator asks for the tokens of the model's forward."""
        return any(each.method.reads_tokens for each in self.family())

    def family(self) -> Iterator[AppliedMethod]:
        """Yields it itself and, of a hybrid, all its parts."""
        yield self
        for part in self.parts.values():
            yield from part.family()

    def modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Yields operators and shared modules under the names that files use."""
        yield from self.operators.items()
        for name, module in self.shared.items():
            yield f"shared:{name}", module

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yields every parameter of the adapter, each once; all of them, trainable or not."""
        tensors: list[nn.Parameter | None] = []
        for module in (*(g.operator for g in self.grafts), *(shared.module for shared in self._surgeon.owned.values())):
            for inner in module.modules() if module._modules else (module,):
                tensors += inner._parameters.values()
        yield from {id(each): each for each in tensors if each is not None}.values()

    def state_dict(self) -> dict[str, Tensor]:
        """Returns its tensors by ``<site path>.<operator tensor>``, without the injection's name, as files have them;
        the operators' own, no copies. They may be pieces (FSDP2).

        Raises:
            ExportError: DeepSpeed has cut them apart (ZeRO-3), and they are empty.
        """
        if any(map(is_empty, self.parameters())):
            raise ExportError(
                "DeepSpeed's ZeRO-3 has cut the adapter apart, and its tensors are empty: call save(folder) in all "
                "processes, which gathers, or gather them yourself, with deepspeed.zero.GatheredParameters("
                "list(injection.parameters()))"
            )
        return {f"{path}.{key}": value for path, module in self.modules() for key, value in module.state_dict().items()}


class HybridPart(AppliedMethod):
    """One method of a hybrid, to be read, and its parameters to be trained or frozen. It is neither switched nor
    merged, saved or removed by itself, but the `whole` is."""

    def __init__(self, name: str, surgeon: Surgeon, whole: Injection) -> None:
        super().__init__(name, surgeon)
        self._whole = whole

    @property
    def whole(self) -> Injection:
        return self._whole

    def __repr__(self) -> str:
        return f"HybridPart({self.name!r} of {self.whole.name!r}: {self.method.name}, {len(self.grafts)} sites)"


class Planned(HybridPart):
    """One method whose operators are recorded and not installed, to be read as a part is: a method chooses from it what
    would train. A part of a planned hybrid is one too."""

    def __init__(self, surgeon: Surgeon, name: str = "planned") -> None:
        AppliedMethod.__init__(self, name, surgeon)

    @property
    def whole(self) -> Injection:
        raise PluginError(
            f"{self.method.name}: `trainable` asks for the injection, and a plan has none: choose by `operators`, "
            "`shared`, `parts` and `config`"
        )

    @property
    def parts(self) -> dict[str, HybridPart]:
        return {name: Planned(surgeon, name) for name, surgeon in self._surgeon.parts.items()}

    def __repr__(self) -> str:
        return f"Planned({self.method.name}, {len(self.grafts)} sites)"


def choose_trained(journal: Journal, applied: AppliedMethod) -> None:
    """Make the parameters trainable that the method selects, and the modules that the user named in ``train``; freeze
    all other parameters of the adapter.
    """
    freeze(journal, applied.parameters())
    hook = registry().hook
    hook.peftcore_select(model=applied.model, method=applied.method, config=applied.config, injection=applied)
    for graft in applied.grafts:
        if not graft.by_method:  # modules named in `train` train, whatever the method selects
            graft.operator.requires_grad_(True)


@torch.no_grad()
def fill(applied: AppliedMethod, tensors: Mapping[str, Tensor]) -> None:
    """Copy values into the tensors of an adapter, by their names in `state_dict`; tensors that are not named keep their
    values.
    """
    for path, module in applied.modules():
        for key, value in module.state_dict(keep_vars=True).items():
            saved = tensors.get(f"{path}.{key}")
            if saved is not None and value.is_meta:  # it was to start from the host's weight
                _put(module, key, saved.to(value.dtype))
            elif saved is not None:
                value.data.copy_(saved)


def _put(module: nn.Module, key: str, value: Tensor) -> None:
    """Give a value to a tensor that has no memory."""
    below, _, name = key.rpartition(".")
    owner = module.get_submodule(below)
    if name in owner._parameters:
        owner._parameters[name] = nn.Parameter(value, requires_grad=False)
    else:
        owner._buffers[name] = value


def check_filled(applied: AppliedMethod) -> None:
    """Check that all tensors of an adapter have values.

    Raises:
        NoWeights: some were to start from weights of a host that is on the meta device.
    """
    held = ((path, name, each) for path, module in applied.modules()
            for name, each in (*module.named_parameters(), *module.named_buffers()))  # fmt: skip
    lacking = [f"{path}.{name}" for path, name, each in held if each.is_meta]
    if lacking:
        what = f"{applied.method.name} starts from its weights: {', '.join(lacking[:4])}"
        raise NoWeights(f"the host is on the meta device, and {what}")
