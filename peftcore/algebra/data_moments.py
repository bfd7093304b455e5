"""What the user's data says of the inputs of an adapter's modules: their second moments, by which an update that has to
be cut to a low rank loses where inputs are rare."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peftcore.authoring.inputs import watched_inputs
from peftcore.injection.injection import Injection
from peftcore.injection.switching import activate
from peftcore.training.batches import Batches, Data


@torch.no_grad()
def second_moments(injection: Injection, data: Data) -> dict[str, Tensor]:
    """Returns the mean of ``x x'`` ``[in, in]`` over the inputs x of each linear layer that is called, by the path of
    its site, in float32 or better. The model runs on `data` in evaluation with the adapter alone; padding counts for
    nothing.

    Raises:
        CalibrationError: there are no batches, or the model cannot be called with one.
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

    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        modules = {site.module for site in seen.values()}
        with activate(model, injection.name), watched_inputs(model, modules, look):
            for batch in Batches(model, data, f"inputs with {injection.name}"):
                batch.output()
    finally:
        for module, mode in modes.items():
            module.training = mode
    return {path: sums[site.module] / counts[site.module] for path, site in seen.items() if counts.get(site.module)}
