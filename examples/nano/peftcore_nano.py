"""The idea of peftcore in plain torch: adapt a model in place, train, merge, save, load, and undo all of it.

1. A *site* is one tensor of one module. Methods see it as ``[out, in, *kernel]``, however the module stores it
   (`Layout`): a method is written once, and works on linear layers, convolutions and embeddings.
2. An *operator* is an ``nn.Module`` with the parameters that train. It maps the weight of its site to the *effective
   weight*, with which the module runs instead.
3. `apply` swaps the class of each target module for a subclass of it, whose forward runs the original forward on a
   *view*: an object of the original class that shares everything with the module but the effective tensors. Paths,
   state dict and ``isinstance`` stay as they were, and `Adapter.remove` puts the class back.
4. The base model is never written to: `Adapter.merge` puts new parameters in the place of the old ones, and
   `Adapter.unmerge` puts the old ones back, bit for bit.

    adapter = apply(model, LoRA, target=["query", "value"], rank=8)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-3)
    ...
    adapter.save("adapter.safetensors")
    load(other_model, "adapter.safetensors").merge()
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


@dataclass(frozen=True)
class Layout:
    """How a kind of module stores its weight: `logical` returns ``[out, in, *kernel]``, and `stored` is its inverse."""

    logical: Callable[[Tensor], Tensor] = lambda weight: weight
    stored: Callable[[Tensor], Tensor] = lambda weight: weight


AS_IT_IS = Layout()
TRANSPOSED = Layout(lambda weight: weight.mT, lambda weight: weight.mT)
SWAPPED = Layout(lambda weight: weight.transpose(0, 1), lambda weight: weight.transpose(0, 1))

LAYOUTS: dict[type[nn.Module], Layout] = {
    nn.Linear: AS_IT_IS,
    nn.Conv1d: AS_IT_IS,
    nn.Conv2d: AS_IT_IS,
    nn.Conv3d: AS_IT_IS,
    nn.ConvTranspose2d: SWAPPED,
    nn.LayerNorm: AS_IT_IS,
    nn.GroupNorm: AS_IT_IS,
    nn.Embedding: TRANSPOSED,  # a linear map of one-hot vectors, stored [vocabulary, features]
}
"""The layout by kind of module. Another kind is one more line: ``LAYOUTS[transformers.pytorch_utils.Conv1D] =
TRANSPOSED``."""


@dataclass(frozen=True)
class Site:
    """A weight at which a method may act."""

    path: str
    module: nn.Module
    layout: Layout

    def weight(self) -> Tensor:
        """Returns the weight ``[out, in, *kernel]``."""
        return self.layout.logical(self.module.weight)  # type: ignore[arg-type]

    @property
    def shape(self) -> torch.Size:
        """``[out, in, *kernel]``."""
        return self.weight().shape


def sites(model: nn.Module, target: str | Sequence[str]) -> list[Site]:
    """Returns the sites whose paths match: globs over whole paths, or ends of paths.

    Raises:
        ValueError: a part of `target` matches nothing.
    """
    patterns = [target] if isinstance(target, str) else [*target]
    found: dict[str, Site] = {}
    for pattern in patterns:
        matches = [
            Site(path, module, layout)
            for path, module in model.named_modules()
            for layout in [next((LAYOUTS[cls] for cls in type(module).__mro__ if cls in LAYOUTS), None)]
            if layout is not None and (fnmatch(path, pattern) or path.endswith(f".{pattern}"))
        ]
        if not matches:
            raise ValueError(f"{pattern!r} matches no module of the model that nano knows")
        found |= {site.path: site for site in matches}
    return [*found.values()]


class Operator(nn.Module):
    """Maps a weight ``[out, in, *kernel]`` to the effective one. Subclasses make their parameters of a site."""

    def forward(self, weight: Tensor) -> Tensor:
        raise NotImplementedError

    def bias(self, bias: Tensor | None, weight: Tensor) -> Tensor | None:
        """Returns the effective bias; most methods leave it as it is."""
        return bias


class LoRA(Operator):
    """``W' = W + alpha / rank * B A`` (arXiv 2106.09685), with B = 0 at the start."""

    def __init__(self, site: Site, rank: int = 8, alpha: float = 8.0) -> None:
        super().__init__()
        self.scale = alpha / rank
        out_features, *inputs = site.shape
        self.A = nn.Parameter(torch.randn(rank, *inputs) / rank)
        self.B = nn.Parameter(torch.zeros(out_features, rank))

    def update(self) -> Tensor:
        return self.scale * torch.tensordot(self.B, self.A, 1)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.update()


class DoRA(LoRA):
    """``W' = m (W + BA) / |W + BA|``, norms over inputs (arXiv 2402.09353), with m = \\|W\\| at the start."""

    def __init__(self, site: Site, rank: int = 8, alpha: float = 8.0) -> None:
        super().__init__(site, rank, alpha)
        self.magnitude = nn.Parameter(self._norm(site.weight()).detach().clone())

    def forward(self, weight: Tensor) -> Tensor:
        direction = weight + self.update()
        return self.magnitude * direction / self._norm(direction).detach()

    @staticmethod
    def _norm(weight: Tensor) -> Tensor:
        return weight.flatten(1).norm(dim=1).view(-1, *[1] * (weight.dim() - 1))


METHODS: dict[str, type[Operator]] = {"lora": LoRA, "dora": DoRA}
"""The methods that files may name; a method of your own is one more line."""
SLOT = "_nano_slot"
"""The attribute of a target module that lists what acts there: pairs of an adapter and a site, the first one applied
first."""


@cache
def adapted(base: type[nn.Module]) -> type[nn.Module]:
    """Returns the subclass of a module's class that runs the class's own forward with effective tensors."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        view = object.__new__(base)
        view.__dict__ = {**self.__dict__, "_parameters": {**self._parameters, **effective_tensors(self)}}
        return base.forward(view, *args, **kwargs)

    return type(base.__name__, (base,), {"forward": forward, "__module__": base.__module__, "__doc__": base.__doc__})


def effective_tensors(module: nn.Module, merging: Adapter | None = None) -> dict[str, Tensor | None]:
    """Returns weight and bias of a target module with all active operators, or with those of one adapter alone."""
    weight, bias = module._parameters["weight"], module._parameters.get("bias")
    for adapter, site in module.__dict__[SLOT]:
        acts = adapter.active and not adapter.merged if merging is None else adapter is merging
        if acts:
            operator, logical = adapter.operators[site.path], site.layout.logical(weight)
            bias = operator.bias(bias, logical)
            weight = site.layout.stored(operator(logical).to(weight.dtype))
    return {"weight": weight, "bias": bias} if "bias" in module._parameters else {"weight": weight}


class Adapter:
    """A method applied to a model; what `apply` and `load` return.

    Attributes:
        active: whether it acts. Set it to False for the outputs of the base model.
        merged: whether it is in the base model's weights.
        operators: its operators by path of the site.
    """

    def __init__(self, model: nn.Module, method: type[Operator], options: dict[str, Any], chosen: list[Site]) -> None:
        self.model, self.method, self.options, self.sites = model, method, options, chosen
        self.active, self.merged = True, False
        self.operators: dict[str, Operator] = {}
        self._originals: dict[str, dict[str, nn.Parameter | None]] = {}
        self._frozen: list[nn.Parameter] = []

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yields what trains, for an optimizer."""
        for operator in self.operators.values():
            yield from operator.parameters()

    def install(self) -> None:
        """Build the operators, freeze the base, and swap the classes; nothing has changed if building one fails."""
        self.operators = {site.path: self.method(site, **self.options).to(site.weight()) for site in self.sites}
        self._frozen = [each for each in self.model.parameters() if each.requires_grad]
        for parameter in self._frozen:
            parameter.requires_grad_(False)
        for site in self.sites:
            if SLOT not in site.module.__dict__:
                site.module.__dict__[SLOT] = []
                site.module.__class__ = adapted(type(site.module))
            site.module.__dict__[SLOT].append((self, site))

    def remove(self) -> None:
        """Undo `install`: the model is as it was."""
        self.unmerge()
        for site in self.sites:
            slot = site.module.__dict__[SLOT]
            slot.remove((self, site))
            if not slot:
                del site.module.__dict__[SLOT]
                site.module.__class__ = type(site.module).__mro__[1]
        left = [adapter for module in self.model.modules() for adapter, _ in module.__dict__.get(SLOT, ())]
        if left:  # the last adapter thaws the base
            left[0]._frozen += self._frozen
        for parameter in self._frozen if not left else ():
            parameter.requires_grad_(True)
        self.sites, self.operators, self._frozen = [], {}, []

    @torch.no_grad()
    def merge(self) -> None:
        """Put the effective tensors in the place of the base model's, so that inference costs nothing more.

        Raises:
            ValueError: another adapter is merged into one of these weights.
        """
        if any(other.merged for site in self.sites for other, _ in site.module.__dict__[SLOT]):
            raise ValueError("unmerge the adapter that is in these weights first")
        new = {site.path: effective_tensors(site.module, merging=self) for site in self.sites}  # all, then write
        for site in self.sites:
            held = site.module._parameters
            self._originals[site.path] = {name: held[name] for name in new[site.path]}
            for name, value in new[site.path].items():
                held[name] = None if value is None else nn.Parameter(value.clone(), requires_grad=False)
        self.merged = True

    def unmerge(self) -> None:
        """Put the base model's own parameters back."""
        for site in self.sites if self.merged else ():
            site.module._parameters.update(self._originals.pop(site.path))
        self.merged = False

    def save(self, file: str | Path) -> None:
        """Write method, options, paths and tensors into one safetensors file; nothing in it is code."""
        name = next(name for name, method in METHODS.items() if method is self.method)
        about = {"method": name, "options": self.options, "sites": [site.path for site in self.sites]}
        save_file(self.tensors(), file, {"peftcore_nano": json.dumps(about)})

    def tensors(self) -> dict[str, Tensor]:
        """Returns the tensors of all operators by ``path:name``; they share memory with the operators."""
        named = self.operators.items()
        return {f"{path}:{key}": value for path, each in named for key, value in each.state_dict().items()}


def apply(model: nn.Module, method: type[Operator], target: str | Sequence[str], **options: Any) -> Adapter:
    """Adapt a model in place: the base is frozen, the operators of the method train.

    Args:
        model: any module.
        method: a class of operators.
        target: paths of modules; see `sites`, which raises ValueError where one matches nothing.
        options: keyword arguments of the method.
    """
    adapter = Adapter(model, method, options, sites(model, target))
    adapter.install()
    return adapter


def load(model: nn.Module, file: str | Path) -> Adapter:
    """Apply a saved adapter; the model has not changed if the file does not fit it.

    Raises:
        ValueError: the file is no adapter, names an unknown method, or its tensors do not fit the model.
    """
    with safe_open(file, framework="pt") as opened:
        about = json.loads((opened.metadata() or {}).get("peftcore_nano", "{}"))
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118  (it is no dict)
    if about.get("method") not in METHODS:
        raise ValueError(f"{file} is no adapter of {', '.join(METHODS)}")
    adapter = apply(model, METHODS[about["method"]], about["sites"], **about["options"])
    try:
        own = adapter.tensors()
        if {key: each.shape for key, each in own.items()} != {key: each.shape for key, each in tensors.items()}:
            raise ValueError(f"the tensors of {file} do not fit this model")
        for key, value in own.items():
            value.copy_(tensors[key])
    except BaseException:
        adapter.remove()
        raise
    return adapter
