"""FRoD in peft's files (checked against peft 0.21).

``frod_lambda_l`` and ``frod_lambda_s_values`` are peftcore's L and S. V and the positions of S are stored once for each
role, such as ``frod_V.self_attn_q_proj``. Files of peft do not contain U. peftcore computes U from the V in the file,
with which the adapter was trained. peft computes U from the V that it computes when it loads the file. So a file is
written only if this V equals that of the adapter. A file without V (`save_projection` is false) is refused, because V
of the machine that trained the adapter is unknown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Size, Tensor, nn

from peftcore.author import Transposed
from peftcore.author.formats import Found, Keys, PeftMethod, Place, not_added
from peftcore.errors import CheckpointError, ExportError
from peftcore_reparameterized._decomposed import as_matrix
from peftcore_reparameterized.frod import Joint, by_role, joint, role, within

CLOSE = 1e-3
"""The largest accepted difference of V, or of the weight computed from it, relative to the largest entry."""


class PeftFRoD(PeftMethod):
    """Translates the trained parameters and the bases of roles."""

    methods = ("frod",)
    below = ("frod_lambda_l", "frod_lambda_s_values")
    root = ("frod_V.", "frod_s_indices.", "frod_s_size.")
    bias = "frod_only"
    kinds = (nn.Linear, Transposed)
    advice: ClassVar[Mapping[str, str]] = {
        "projection_prng_key": "use projection_seed=",
        "save_projection": "leave it out: files have the frozen tensors",
        "sparse_rate": "use sparsity=",
        "regularization_alpha": "use ridge=",
        "progressbar": "leave it out: there is no progress bar to configure",
        "runtime_offload_base_weight": "leave it out: the base's weights are not offloaded",
    }

    def options(self, keys: Keys, shapes: Mapping[str, Size]) -> dict[str, Any]:
        keys.pass_over("progressbar", "runtime_offload_base_weight")
        if not keys.take("save_projection", bool, True):
            raise CheckpointError(
                f"{keys.where}: save_projection is false, so the file lacks V, which another machine computes "
                "differently; save it where it was trained with save_projection=True"
            )
        return {
            "method": "frod",
            "sparsity": float(keys.take("sparse_rate", float, 0.01)),
            "ridge": float(keys.take("regularization_alpha", float, 1e-3)),
            "dropout": float(keys.take("frod_dropout", float, 0.0)),
            "projection_seed": keys.take("projection_prng_key", int, 0),
        }

    def differs(self, place: Place) -> str:
        return not_added(place.site)

    def read(self, place: Place, found: Found) -> dict[str, Tensor]:
        operator, name = place.operator, f"frod_V.{role(place.site.path)}"
        full = next((each for each in found.shapes if each in (name, f"base_model.{name}")), "")
        size = operator.U.shape[-1]
        if tuple(found.shapes.get(full, ())) != (size, size):
            found.wrong.append(f"missing {name} of shape {(size, size)}")
            return {}
        V, W = found.read(full), as_matrix(replace(place.site, meta=False))
        U, L0 = within(V, W)
        if not _close((U * L0) @ V.to(U).mT, W):
            found.wrong.append(f"{full} does not have the singular directions of the weight of {place.site.path}")
        L = found.take("frod_lambda_l", operator.L.shape)
        return {"U": U, "L0": L0, "L": L, "S": found.take("frod_lambda_s_values", operator.S.shape)}

    def read_shared(self, name: str, module: nn.Module, found: Found) -> dict[str, Tensor]:
        assert isinstance(module, Joint)
        kind, size = name.rpartition("_")[0], module.size
        places = found.take(f"frod_s_indices.{kind}", (2, len(module.index)))
        shape = found.take(f"frod_s_size.{kind}", (2,))
        if not (shape.eq(size).all() and places.ge(0).all() and places.lt(size).all()):
            found.wrong.append(f"frod_s_indices.{kind} has entries outside of a matrix of {size} by {size}")
        index = places[0].long() * size + places[1].long()
        return {"V": found.take(f"frod_V.{kind}", module.V.shape), "index": index}

    def write_options(self, config: Any) -> dict[str, Any]:
        return {
            "sparse_rate": config.sparsity,
            "regularization_alpha": config.ridge,
            "frod_dropout": config.dropout,
            "projection_prng_key": config.projection_seed,
            "save_projection": True,
        }

    def write_options_of_all(self, places: Sequence[Place], model: nn.Module) -> dict[str, Any]:
        bases = {place.site.path: place.operator.joint.module.V for place in places}
        kinds = set()
        for name, sites, counted in by_role([place.site for place in places]):
            if (kind := name.rpartition("_")[0]) in kinds:
                raise ExportError(
                    f"peft has one V for all of {kind}, but their numbers of inputs differ; use peftcore's own format"
                )
            kinds.add(kind)
            theirs = joint([site.base_weight().detach().float() for site in counted], places[0].config.ridge)
            if not _close(bases[sites[0].path].cpu(), theirs):
                raise ExportError(
                    f"peft computes V from the model, and for {kind} it differs from the V the adapter was trained "
                    "with: the weights or the machine are others"
                )
        return {}

    def write(self, place: Place) -> dict[str, Tensor]:
        return {"frod_lambda_l": place.operator.L, "frod_lambda_s_values": place.operator.S}

    def write_shared(self, name: str, module: nn.Module) -> dict[str, Tensor]:
        assert isinstance(module, Joint)
        kind, size = name.rpartition("_")[0], module.size
        return {
            f"base_model.frod_V.{kind}": module.V,
            f"base_model.frod_s_indices.{kind}": torch.stack([module.index // size, module.index % size]),
            f"base_model.frod_s_size.{kind}": module.index.new_full((2,), size),
        }


def _close(mine: Tensor, other: Tensor) -> bool:
    scale = float(other.abs().max())
    return bool((mine.double().cpu() - other.double().cpu()).abs().max() <= CLOSE * scale)
