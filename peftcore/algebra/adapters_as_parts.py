"""`gather`: makes a new hybrid whose parts are existing adapters."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.algebra.combining import Source, established, opened, warn_of_heads
from peftcore.contract.installed_methods import AppliedMethod
from peftcore.injection.injection import Injection
from peftcore.layers.model_locks import changing
from peftcore.registry.catalogue import method as find_method
from peftcore.registry.preset_methods import method_of


@torch.no_grad()
def gather(
    model: nn.Module,
    method: str,
    sources: Mapping[Source, float],
    *,
    name: str | None = None,
    **options: Any,
) -> Injection:
    """Returns an injection of a hybrid whose parts are copies of existing adapters, each with a weight. The injection
    is frozen; call ``trainable()`` on it to train it. It is activated, and the existing adapters are deactivated.

    Args:
        model: the host.
        method: the name of a method with the options `parts` and `weights`: "task_arithmetic", "ties_merging", "dare",
            "regmean", "adapter_soup"; or of a preset of such a method, "mix_of_show".
        sources: the weight of each adapter, by the name of an injection on this host or the folder of a saved adapter.
        name: the name of the new injection; by default the name of the method.
        options: the method's other options.

    Raises:
        PeftcoreError: any error that `peftcore.load` or `peftcore.apply` raises. Nothing was changed.
    """
    kind = find_method(method)
    with changing(model):
        with opened(model, sources) as adapters:
            warn_of_heads(adapters)
            parts = [each.config.model_dump(mode="json") for each in adapters]
            found = [(_tensors(each), each.selections, each.wishes.dtype) for each in adapters]
            instead = [each.name for each in adapters]
        own, config = method_of(kind, {"parts": parts, "weights": list(sources.values()), **options})
        selections = {f"{index}/{key}": sites for index, each in enumerate(found) for key, sites in each[1].items()}
        dtype = functools.reduce(torch.promote_types, (each[2] for each in found))

        def give(made: Injection) -> None:
            for part, (tensors, _, _) in zip(made.parts.values(), found, strict=True):
                for key, value in _tensors(part).items():
                    value.copy_(tensors[key])
            made.method.parts_gathered(made)

        return established(
            model, type(own), config, name or kind.name, selections, dtype=dtype, instead=instead, fill=give
        )


def _tensors(injection: AppliedMethod) -> dict[str, Tensor]:
    """Returns the tensors of an injection or a part by name. The names of a part's tensors do not have the prefix of
    the part."""
    ours = [(graft.site.path, graft.operator) for graft in injection.grafts if graft.by_method]
    shared = [(f"shared:{name}", module) for name, module in injection.shared.items()]
    modules: Sequence[tuple[str, nn.Module]] = [*ours, *shared]
    return {f"{path}.{key}": value for path, module in modules for key, value in module.state_dict().items()}
