"""A joint decomposition of many weights: the sites that share a role, the basis of a role, and the factors of a weight
in that basis."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from peftcore.author import Checked, Site
from peftcore_reparameterized._basis import columns, drawn_entries
from peftcore_reparameterized._decomposed import as_matrix


def role(path: str) -> str:
    """Return the role of a site: the last two parts of its path, or only the last part where a number precedes it."""
    *before, last = path.split(".")
    if not before or before[-1].isdigit():
        return last
    name = f"{before[-1]}_{last}"
    return "attention_output" if name == "output_dense" and before[-2:-1] == ["attention"] else name


def number(path: str, otherwise: int) -> int:
    """Return the number of a site's block: the number after ``layers``, or the first number in its path."""
    parts = path.split(".")
    behind = parts[parts.index("layers") + 1 :][:1] if "layers" in parts else []
    return next((int(part) for part in (*behind, *parts) if part.isdigit()), otherwise)


def by_role(sites: Sequence[Site]) -> Iterator[tuple[str, list[Site], list[Site]]]:
    """Yield the sites that share V, with its name, and the sites from which V is computed, by number."""
    found: dict[str, list[tuple[int, Site]]] = {}
    for index, site in enumerate(sites):
        found.setdefault(f"{role(site.path)}_{columns(site)}", []).append((number(site.path, index), site))
    for name, each in found.items():
        yield name, [site for _, site in each], [site for _, site in sorted(dict(each).items())]


def joint(matrices: Sequence[Tensor], ridge: float) -> Tensor:
    """Return V, [in, in], of matrices [out, in]: found on the CPU, in float32 at least."""
    stacked = torch.cat([each.cpu() for each in matrices])
    if len(stacked) < stacked.shape[1]:
        return torch.linalg.svd(stacked, full_matrices=True).Vh.mT
    Q, R = torch.linalg.qr(stacked)
    eye = ridge * torch.eye(len(R), dtype=R.dtype)
    inverses = [torch.linalg.inv(each.mT @ each + eye) for each in Q.split([len(each) for each in matrices])]
    mean = torch.stack(inverses).mean(0)
    return R.mT @ torch.linalg.eigh(mean).eigenvectors


def within(V: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return U ``[*batch, out, in]`` and L0 ``[*batch, in]`` of a weight ``[*batch, out, in]``, in float64."""
    if matrix.is_meta:
        return torch.empty_like(matrix), matrix.new_empty(*matrix.shape[:-2], len(V))
    V, W = V.double().cpu(), matrix.double().cpu()
    solved, singular = torch.linalg.solve_ex(V, W.mT)
    B = W @ torch.linalg.pinv(V, rtol=1e-6).mT if singular.any() else solved.mT
    length = torch.linalg.vector_norm(B, dim=-2)
    there = length > 1e-12
    return B * torch.where(there, length, math.inf).reciprocal().unsqueeze(-2), length


class Joint(Checked):
    """The V that the sites of a role share, and the entries of S that train, as places in S flattened by rows."""

    V: Tensor
    index: Tensor

    def __init__(self, sites: Sequence[Site], count: int, ridge: float, seed: int) -> None:
        """Find V of these sites, and draw `count` places off the diagonal."""
        super().__init__()
        batches = [as_matrix(site) for site in sites]
        matrices = [matrix for each in batches for matrix in (each.flatten(0, -3) if each.dim() > 2 else [each])]
        self.size, first = matrices[0].shape[-1], matrices[0]
        place = first.new_empty(count, dtype=torch.long)
        if not first.is_meta and count:
            place = drawn_entries(self.size * (self.size - 1), count, seed)
        V = first.new_empty(self.size, self.size) if first.is_meta else joint(matrices, ridge)
        self.register_buffer("V", V.contiguous())
        self.register_buffer("index", place + place // self.size + 1)  # behind as many entries of the diagonal

    def wrong_values(self, values: Mapping[str, Tensor]) -> Iterator[str]:
        if "index" in values:
            places, _ = values["index"].sort()
            if places.numel() and not 0 <= int(places.min()) <= int(places.max()) < self.size**2:
                yield f"index holds places outside of the {self.size**2} entries of a matrix"
            elif places.diff().eq(0).any():
                yield "index holds a place twice"
