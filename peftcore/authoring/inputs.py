"""Records the inputs of linear layers while the model runs on the user's data: as vectors without padding, or their
second moments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.contract.batches import Batches, Data
from peftcore.injection.injection import Injection
from peftcore.injection.switching import activate
from peftcore.targets.sites import Site
from peftcore.utils.journal import Journal

IGNORED = -100
"""The label of positions that losses ignore."""
Look = Callable[[nn.Module, Tensor, Tensor], None]
"""Type of functions that get a module, its input, and the same input as vectors ``[tokens, in]`` in float32 or
better."""


def sees_vectors(site: Site) -> bool:
    """Returns whether the site is a linear layer that the host calls, so that its inputs can be recorded as vectors."""
    return site.form == "activation" and site.layer.called and site.layer.of_vectors and not site.batch


@contextmanager
def watched_inputs(model: nn.Module, modules: Iterable[nn.Module], look: Look, labels: bool = False) -> Iterator[None]:
    """Context manager that calls `look` with the input of each given module whenever the module is called.

    Positions that are masked in the model's `attention_mask` are left out of the vectors. With `labels`, positions with
    the label -100 are left out too. A mask, or labels, whose shape does not fit the input is ignored.
    """
    masks: list[Tensor] = []

    def called(host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**inspect.signature(host.forward).bind_partial(*args, **kwargs).arguments, **kwargs}
        unseen = {"attention_mask": 0, "labels": IGNORED} if labels else {"attention_mask": 0}
        told = [(given.get(name), left_out) for name, left_out in unseen.items()]
        masks[:] = [each != left_out for each, left_out in told if isinstance(each, Tensor)]

    def entered(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given: Tensor = next(iter((*args, *kwargs.values())))
        x = given.detach()
        if x.is_nested:  # an encoder's padded sequences
            vectors = torch.cat(x.unbind())
        else:
            fitting = [mask for mask in masks if mask.shape == x.shape[:-1]]
            vectors = x[torch.stack(fitting).all(0)] if fitting else x.reshape(-1, x.shape[-1])
        look(module, given, vectors.to(torch.promote_types(x.dtype, torch.float32)))

    with ExitStack() as hooks:
        hooks.callback(model.register_forward_pre_hook(called, with_kwargs=True).remove)
        for module in modules:
            hooks.callback(module.register_forward_pre_hook(entered, with_kwargs=True).remove)
        yield


@torch.no_grad()
def second_moments(injection: Injection, data: Data) -> dict[str, Tensor]:
    """Returns the second moment of the inputs of each adapted linear layer, by the path of its site. It is the mean of
    ``x x'`` ``[in, in]`` over the inputs x, in float32 or better. Padding is left out. The model runs on `data` in
    evaluation mode, with only this adapter active.

    Raises:
        CalibrationError: `data` has no batches, or the model cannot be called with one.
    """
    model = injection.model
    sites = [graft.site for graft in injection.grafts if graft.by_method]
    seen = {site.path: site for site in sites if site.layer.called and site.layer.of_vectors and not site.batch}
    sums: dict[nn.Module, Tensor] = {}
    counts: dict[nn.Module, int] = {}

    def look(module: nn.Module, given: Tensor, vectors: Tensor) -> None:
        product = vectors.T @ vectors
        sums[module] = sums[module] + product if module in sums else product
        counts[module] = counts.get(module, 0) + len(vectors)

    modules = {site.module for site in seen.values()}
    with Journal(temporary=True) as journal:
        for module in model.modules():
            journal.set(module, "training", module.training)
        model.eval()
        with activate(model, injection.name), watched_inputs(model, modules, look):
            for batch in Batches(model, data, f"inputs with {injection.name}"):
                batch.output()
    return {path: sums[site.module] / counts[site.module] for path, site in seen.items() if counts.get(site.module)}
