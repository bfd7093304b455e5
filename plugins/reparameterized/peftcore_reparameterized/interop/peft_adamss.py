"""AdaMSS in peft's files (checked against peft 0.21).

``adamss_newB`` is peftcore's V', and ``adamss_A.0``, ``adamss_B.0``, ``.1``, … are A and B of each cluster, without the
directions beyond its rank. The file does not contain which outputs belong to a cluster. peft computes that again from
the model, and so does this translation. A file is refused if the computed V' or sizes of clusters differ from those in
the file. This may happen on another machine or with another base. An adapter is not written if its clusters differ from
those that peft would compute.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Size, Tensor, nn

from peftcore.author.formats import Found, Keys, PeftMethod, Place, not_added
from peftcore.errors import CheckpointError, ExportError
from peftcore_reparameterized.adamss.clusters import approximate, clustered, with_bias

MOST = 512
"""Maximum number of clusters of a module in a file."""
CLOSE = 1e-4
"""The largest accepted difference between V' in the file and the computed V', whose rows have length one."""
ROUNDING = 2e-7
"""Standard deviation of the random changes of U that simulate rounding, relative to the largest entry of U."""


class PeftAdaMSS(PeftMethod):
    """Translates updates of clusters of outputs."""

    methods = ("adamss",)
    below = ("adamss_newB", *(f"adamss_{factor}.{index}" for index in range(MOST) for factor in "AB"))
    kinds = (nn.Linear,)
    advice: ClassVar[Mapping[str, str]] = {
        "r": "use components=",
        "num_subspaces": "use subspaces=",
        "subspace_rank": "use rank=",
        "use_asa": "use target_subspaces=",
        "asa_target_subspaces": "use target_subspaces=",
        "init_warmup": "use warmup=",
        "final_warmup": "use until=",
        "mask_interval": "use interval=",
        "asa_importance_beta": "use beta1=",
        "asa_uncertainty_beta": "use beta2=",
        "asa_schedule_exponent": "use exponent=",
        "use_dynamic_rank": "use threshold=",
        "svd_threshold": "use threshold=",
        "random_seed": "use projection_seed=",
    }

    def options(self, keys: Keys, shapes: Mapping[str, Size]) -> dict[str, Any]:
        dynamic, competing = keys.take("use_dynamic_rank", bool, False), keys.take("use_asa", bool, False)
        threshold, target = keys.take("svd_threshold", float, 0.1), keys.take("asa_target_subspaces", int, 50)
        return {
            "method": "adamss",
            "components": keys.take("r", int, 100),
            "subspaces": keys.take("num_subspaces", int, 5),
            "rank": keys.take("subspace_rank", int, 1),
            "threshold": float(threshold) if dynamic else None,
            "target_subspaces": target if competing else None,
            "warmup": keys.take("init_warmup", int, 50),
            "until": keys.take("final_warmup", int, 1000),
            "interval": keys.take("mask_interval", int, 100),
            "beta1": float(keys.take("asa_importance_beta", float, 0.85)),
            "beta2": float(keys.take("asa_uncertainty_beta", float, 0.85)),
            "exponent": float(keys.take("asa_schedule_exponent", float, 3.0)),
            "projection_seed": keys.take("random_seed", int, 0),
        }

    def differs(self, place: Place) -> str:
        return not_added(place.site)

    def read(self, place: Place, found: Found) -> dict[str, Tensor]:
        operator = place.operator
        (count, rank, components), out = operator.A.shape, operator.B.shape[0]
        V = found.take("adamss_newB", operator.V.shape)
        mine, cluster = _found(place, with_bias(replace(place.site, meta=False)), CheckpointError)
        if (V.float().cpu() - mine).abs().max() > CLOSE:
            found.wrong.append(
                f"{place.site.path}: the singular vectors of adamss_newB differ from those of this base, so the "
                "clusters of outputs, which the file does not hold, may differ: load it on the same base and machine"
            )
        A, B = torch.zeros(count, rank, components, dtype=V.dtype), torch.zeros(out, rank, dtype=V.dtype)
        ranks = torch.ones(count, dtype=torch.long)
        for index in range(count):
            size, name = int((cluster == index).sum()), f"adamss_A.{index}"
            held = int(found.shape(name)[0]) if found.has(name) and len(found.shape(name)) else 0
            own = held if 0 < held <= rank else rank
            A[index, :own] = found.take(name, (own, components))
            B[cluster == index, :own] = found.take(f"adamss_B.{index}", (size, own))
            ranks[index] = own
        return {"V": V, "cluster": cluster, "ranks": ranks, "A": A, "B": B}

    def write_options(self, config: Any) -> dict[str, Any]:
        return {
            "r": config.components,
            "num_subspaces": config.subspaces,
            "subspace_rank": config.rank,
            "use_dynamic_rank": config.threshold is not None,
            "svd_threshold": 0.1 if config.threshold is None else config.threshold,
            "use_asa": config.target_subspaces is not None,
            "asa_target_subspaces": config.target_subspaces or 50,
            "init_warmup": config.warmup,
            "final_warmup": config.until,
            "mask_interval": config.interval,
            "asa_importance_beta": config.beta1,
            "asa_uncertainty_beta": config.beta2,
            "asa_schedule_exponent": config.exponent,
            "random_seed": config.projection_seed,
        }

    def write(self, place: Place) -> dict[str, Tensor]:
        operator = place.operator
        A, B, cluster = operator.A.detach(), operator.B.detach(), operator.cluster.cpu()
        if not torch.equal(_found(place, with_bias(place.site, base=True), ExportError)[1], cluster):
            raise ExportError(
                f"{place.site.path}: peft computes the clusters of outputs from the model, and they differ from the "
                "adapter's: the weights or the machine are others"
            )
        tensors = {"adamss_newB": operator.V}
        for index, own in enumerate(operator.ranks.tolist()):
            tensors[f"adamss_A.{index}"] = A[index, :own].contiguous()
            tensors[f"adamss_B.{index}"] = B[cluster == index, :own].contiguous()
        return tensors


def _found(place: Place, matrix: Tensor, error: type[CheckpointError] | type[ExportError]) -> tuple[Tensor, Tensor]:
    """Return V' and the cluster of each output, computed from the weight of the model.

    Raises:
        CheckpointError, ExportError: the weight is not loaded, or the clusters depend on rounding.
    """
    if matrix.is_meta:
        raise error(
            "the clusters of outputs are computed from the model's weights, which are not loaded: load the model with "
            "its weights"
        )
    count, _, components = place.operator.A.shape
    U, V = approximate(matrix, components, place.config.projection_seed)
    cluster, noise = clustered(U, count), torch.Generator().manual_seed(0)
    for _ in range(3):
        moved = U + ROUNDING * float(U.abs().max()) * torch.randn(U.shape, generator=noise)
        if not torch.equal(clustered(moved, count), cluster):
            raise error(
                f"{place.site.path}: rounding decides the clusters of some outputs, and a file of peft does not hold "
                "them; train with fewer components, or use peftcore's own format"
            )
    return V, cluster
