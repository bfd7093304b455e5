"""ReFT in AdapterHub's files (checked against adapters 1.3.0).

A layer has two interventions, one of them unused if the method acts only at one end of the prompt. The package stores R
as torch's `orthogonal` does, as a product of reflections times a base; here the product is computed when a file is
read. DiReFT does not subtract the projection, but the options usually do not record this. So the package reads its own
DiReFT files as NoReFT. peftcore does the same, with a warning, unless the options contain "subtract_projection".

In the package each input of a layer counts as a prompt, so in generation with a cache each new token is changed as a
first position. peftcore does not change generated tokens, as in the paper.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.author import Resolver
from peftcore.author.formats import Found, HubArchitecture, HubPlace, Keys, preserved_rng
from peftcore.errors import CheckpointError
from peftcore_additive.interop.adapterhub import ACTIVATIONS

STEP = ".reft_layer"
ENDS = {"prefix": "units.0", "both": "units.0", "suffix": "units.1"}
BASE, ORIGINAL = "projection.parametrizations.weight.0.base", "projection.parametrizations.weight.original"
CLOSE = 1e-2
"""How much R R^T may differ from the identity, in view of the errors of half precision."""


class HubReft(HubArchitecture):
    """Translates low-rank interventions on the outputs of layers."""

    holder = "refts"

    def options(self, keys: Keys, shapes: Mapping[str, Any], resolver: Resolver) -> dict[str, Any]:
        keys.pass_over("layers", "dtype", "init_weights_seed")
        keys.only("output_reft", True)
        orthogonal, subtracts = keys.take("orthogonality", bool), keys.take("subtract_projection", bool, True)
        if orthogonal and not subtracts:
            raise CheckpointError(
                f"{keys.where}: 'subtract_projection' is False with 'orthogonality'; peftcore supports that only with "
                "'orthogonality' = False"
            )
        if not orthogonal and "subtract_projection" not in keys.data:
            keys.warn(
                "this file may be of DiReFT: the adapters package saves and loads DiReFT as NoReFT, so it is read as "
                "NoReFT here too"
            )
        name = keys.take("non_linearity", (str, type(None)), None)
        if name is not None and name not in ACTIVATIONS:
            raise CheckpointError(f"{keys.where}: 'non_linearity' is {name!r}; supported are {', '.join(ACTIVATIONS)}")
        return {
            "method": "loreft",
            "kind": "loreft" if orthogonal else "noreft" if subtracts else "direft",
            "rank": keys.take("r", int),
            "prefix_positions": keys.take("prefix_positions", int),
            "suffix_positions": keys.take("suffix_positions", int),
            "short_prompts": "last",
            "tied": keys.take("tied_weights", bool, False),
            "activation": ACTIVATIONS[name] if name else None,
            "dropout": float(keys.take("dropout", float, 0.0)),
        }

    def module(self, place: str) -> str:
        return place.removesuffix(STEP)

    def read(self, place: HubPlace, operator: Any, found: Found) -> dict[str, Tensor]:
        tensors, idle = dict[str, Tensor](), set(ENDS.values())
        for end, intervention in operator.ends.items():
            tensors |= {f"ends.{end}.{name}": value for name, value in _unit(ENDS[end], intervention, found).items()}
            idle.discard(ENDS[end])
        some = next(iter(operator.ends.values()))
        for unit in idle:  # it has tensors too, if the ends are not tied
            if any(name.startswith(f"{unit}.") for name in found.names):
                _unit(unit, some, found)
        return tensors


def _unit(unit: str, intervention: Any, found: Found) -> dict[str, Tensor]:
    """Returns the tensors of one intervention from a file, by their names in peftcore."""
    rank, width = intervention.R.shape
    tensors = {
        "learned.weight": found.take(f"{unit}.learned_source.weight", (rank, width)),
        "learned.bias": found.take(f"{unit}.learned_source.bias", (rank,)),
    }
    if not intervention.orthonormal:
        return {**tensors, "R": found.take(f"{unit}.projection.weight", (rank, width))}
    original, base = found.take(f"{unit}.{ORIGINAL}", (rank, width)), found.take(f"{unit}.{BASE}", (width, width))
    R = _rows(original, base)
    away = (R @ R.T - torch.eye(rank, dtype=R.dtype)).abs().max()
    if not away < CLOSE and found.has(f"{unit}.{BASE}"):
        found.wrong.append(
            f"{found.names[f'{unit}.{BASE}']} yields rows that differ from orthonormal ones by {away:.2g}"
        )
    return {**tensors, "R": R.to(original.dtype)}


def _rows(original: Tensor, base: Tensor) -> Tensor:
    """Returns the rows of R, which torch's `orthogonal` computes from its tensors, in float32 at least."""
    rank, width = original.shape
    dtype = torch.promote_types(original.dtype, torch.float32)
    linear = nn.utils.skip_init(nn.Linear, width, rank, bias=False, dtype=dtype)
    with torch.no_grad(), preserved_rng():
        linear.weight.copy_(torch.eye(rank, width))
        nn.utils.parametrizations.orthogonal(linear)
        linear.load_state_dict({ORIGINAL.removeprefix("projection."): original, BASE.removeprefix("projection."): base})
        return linear.weight.detach().clone()
