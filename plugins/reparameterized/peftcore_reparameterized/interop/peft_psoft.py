"""PSOFT in peft's files (checked against peft 0.21): below ``psoft_R``, ``weight`` is peftcore's K, and ``vector_b``
and ``vector_a`` are b and a.

The file lacks the singular vectors: peft computes them from the base when it loads the file, with arbitrary signs. So
reading and writing compute them as peft does, exactly or by peft's approximation. When K is written, its rows and
columns get the signs of these singular vectors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Size, Tensor, nn

from peftcore.author.formats import Found, Keys, PeftMethod, Place, not_added
from peftcore.errors import ExportError

WAYS = (None, (10, 0))
"""The ways in which peft computes singular vectors: exactly (None), or with a number of iterations and a seed, which
are the defaults of peft."""
EQUAL = 2e-5
"""If the cosine of two singular vectors deviates from 1 by no more than this, they are considered equal."""
NAMES = {"K": "psoft_R.weight", "b": "psoft_R.vector_b", "a": "psoft_R.vector_a"}


class PeftPSOFT(PeftMethod):
    """Translates rotations of principal subspaces."""

    methods = ("psoft",)
    below = tuple(NAMES.values())
    kinds = (nn.Linear,)
    advice: ClassVar[Mapping[str, str]] = {
        "psoft_alpha": "leave it out: it has no effect in peft either",
        "ab_svd_init": "use singular_values=",
        "psoft_svd": "use iterations=",
        "psoft_svd_lowrank_niter": "use iterations=",
        "random_seed": "use seed=",
        "psoft_orth": "use orthogonal=",
        "psoft_mag_b": "use scale_outputs=",
        "psoft_mag_a": "use scale_inputs=",
        "use_cayley_neumann": "use series=",
        "num_cayley_neumann_terms": "use series=",
        "cayley_neumann_eps": "use eps=",
    }
    found_by: tuple[int, int] | None = None
    """Iterations and seed of the approximation that computes the file's singular vectors; None if they are computed
    exactly."""

    def options(self, keys: Keys, shapes: Mapping[str, Size]) -> dict[str, Any]:
        keys.only("psoft_svd", "full", "lowrank")
        steps, seed = keys.take("psoft_svd_lowrank_niter", int, 10), keys.take("random_seed", int, 0)
        self.found_by = (steps, seed) if keys.take("psoft_svd", str, "full") == "lowrank" else None
        keys.pass_over("psoft_alpha")  # divided out of what it multiplies
        keys.only("ab_svd_init", "psoft_init", "pissa_init")
        both = keys.take("ab_svd_init", str, "psoft_init") == "pissa_init"
        series, terms = keys.take("use_cayley_neumann", bool, False), keys.take("num_cayley_neumann_terms", int, 5)
        eps = keys.take("cayley_neumann_eps", (float, type(None)), None)
        return {
            "method": "psoft",
            "rank": keys.take("r", int, 32),
            "orthogonal": keys.take("psoft_orth", bool, True),
            "scale_outputs": keys.take("psoft_mag_b", bool, True),
            "scale_inputs": keys.take("psoft_mag_a", bool, True),
            "singular_values": "both" if both else "outputs",
            "series": terms if series else None,
            "eps": eps if series else None,
            "dropout": float(keys.take("psoft_dropout", float, 0.0)),
        }

    def differs(self, place: Place) -> str:
        if place.operator.rank < place.config.rank:
            return f"rank={place.config.rank} above that of the weight, which it refuses"
        return not_added(place.site)

    def read(self, place: Place, found: Found) -> dict[str, Tensor]:
        operator = place.operator
        U, S, V = self._vectors(place)
        left, right = (S, torch.ones_like(S)) if place.config.singular_values == "outputs" else (S.sqrt(), S.sqrt())
        tensors = {"A": right[:, None] * V, "B": U * left}
        trained = dict(operator.named_parameters())
        return tensors | {ours: found.take(NAMES[ours], value.shape) for ours, value in trained.items()}

    def write_options(self, config: Any) -> dict[str, Any]:
        return {
            "r": config.rank,
            "psoft_alpha": config.rank,
            "psoft_dropout": config.dropout,
            "ab_svd_init": "pissa_init" if config.singular_values == "both" else "psoft_init",
            "psoft_orth": config.orthogonal,
            "psoft_mag_b": config.scale_outputs,
            "psoft_mag_a": config.scale_inputs,
            "use_cayley_neumann": config.series is not None,
            "num_cayley_neumann_terms": config.series or 5,
            "cayley_neumann_eps": config.eps if config.series else None,
        }

    def write_options_of_all(self, places: Sequence[Place], model: nn.Module) -> dict[str, Any]:
        for self.found_by in WAYS:
            other = [place for place in places if self._signs(place) is None]
            if not other:
                return {"psoft_svd": "full" if self.found_by is None else "lowrank"}
        raise ExportError(
            f"{other[0].site.path}: peft would compute other singular vectors from this base than the adapter was made "
            "of; use peftcore's own format"
        )

    def write(self, place: Place) -> dict[str, Tensor]:
        operator, signs = place.operator, self._signs(place)
        assert signs is not None, "that is how it was found"
        rank, K = operator.rank, operator.K.detach()
        turned = torch.outer(signs, signs).to(K)
        if operator.orthogonal:
            turned = turned[*torch.triu_indices(rank, rank, 1)]
        tensors = dict(operator.named_parameters()) | {"K": K * turned}
        return {NAMES[ours]: value for ours, value in tensors.items()}

    def _signs(self, place: Place) -> Tensor | None:
        """Return the signs of the adapter's singular vectors relative to those that peft computes; None if peft
        computes others."""
        rows = nn.functional.normalize(place.operator.A.detach().to(torch.float32), dim=-1)
        overlap = rows @ self._vectors(place)[2].T
        signs = overlap.diagonal().sign()
        return None if (overlap - signs.diag()).abs().max() > EQUAL else signs

    def _vectors(self, place: Place) -> tuple[Tensor, Tensor, Tensor]:
        """Return U [out, rank], S [rank] and V' [rank, in] as peft computes them."""
        site, rank = replace(place.site, meta=False), place.operator.rank  # also while loading, where all is a shape
        weight = site.base_weight().detach().to(torch.float32)
        if self.found_by is None:
            U, S, V = torch.linalg.svd(weight, full_matrices=False)
            return U[:, :rank], S[:rank], V[:rank]
        steps, seed = self.found_by
        with torch.random.fork_rng(devices=[] if weight.device.type == "cpu" else [weight.device]):
            torch.manual_seed(seed)
            U, S, V = torch.svd_lowrank(weight, q=rank, niter=steps)
        return U, S, V.T
