"""FRoD: full-rank fine-tuning with rotational degrees.   AAAI 2026, doi 10.1609/aaai.v40i31.39813 (in peft).

Equation:
    W_i = U_i diag(L0_i) V',     V [in, in] one for all sites of a role, columns of U_i of length one
    W_i' = W_i + U_i (S_i + diag(L_i - L0_i)) V',    L_i [in] = L0_i,    S_i zero but for n entries off the diagonal

V is computed from all weights of the role. Let W = Q R be these weights, stacked vertically, and Q_i the rows of Q for
one weight. Then V = R' E, where E contains the eigenvectors of the mean of (Q_i' Q_i + ridge)^-1. If W has fewer rows
than columns, V contains its right singular vectors. U and L0 are computed from V and the weight. The n = sparsity *
in^2 trained entries of S_i are at positions that are drawn once for each role. As in peft, sites whose paths have the
same ending have one role. If two sites of a role have the same block number, only the later one is used to compute V.
So in T5, V of the encoder is computed from the decoder. In directions that are zero in all weights, U contains scaled
rounding errors of V.

Files contain V, U and L0, because eigenvectors computed on another machine would differ, at least by signs. So files
are larger than the weights.

Kernels of convolutions count as columns (in * kernel). Each expert is a separate weight. V of an embedding is [num,
num], so only small embeddings can be adapted.

Parameters: in * kernel + n a site, times the number of experts.

Start: L_i = L0_i, S_i at zero: the identity.

Differs from the authors' code: The method is in peft, which was compared. peft supports linear layers only. Files of
peft contain V without U. peft computes U from a newly computed V, not from the V in the file, so on a machine where V
differs, an adapter gives different outputs. peftcore computes U from the V in the file.

Use it: `peftcore.apply(model, "frod")`, where the update should have full rank and few parameters, and memory for V and
U is available.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from peftcore.author import (
    MATRICES,
    Checked,
    LearningRate,
    Method,
    MethodConfig,
    Operator,
    Share,
    Shared,
    Site,
    Surgeon,
    Tags,
)
from peftcore_reparameterized._basis import columns, drawn_entries
from peftcore_reparameterized._decomposed import as_matrix
from peftcore_reparameterized._low_rank import input_dropout


class FRoDConfig(MethodConfig):
    """Options of FRoD."""

    overridable = ("dropout",)

    method: Literal["frod"] = "frod"
    sparsity: Annotated[float, Field(ge=0.0, le=1.0)] = 0.01
    """Share of the entries of S that train. Unless it is 0, at least one entry trains."""
    ridge: PositiveFloat = 1e-3
    """The number that is added to the diagonals before matrices are inverted to compute V."""
    dropout: Share = 0.0
    """Probability with which inputs of the update are dropped in training."""
    projection_seed: NonNegativeInt = 0
    """Seed of the positions in S."""


def role(path: str) -> str:
    """Return the role of a site: the last two parts of its path, or only the last part if a number precedes it."""
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
    """Yield, for each V: its name, the sites that share it, and the sites from which it is computed, sorted by block
    number."""
    found: dict[str, list[tuple[int, Site]]] = {}
    for index, site in enumerate(sites):
        found.setdefault(f"{role(site.path)}_{columns(site)}", []).append((number(site.path, index), site))
    for name, each in found.items():
        yield name, [site for _, site in each], [site for _, site in sorted(dict(each).items())]


def joint(matrices: Sequence[Tensor], ridge: float) -> Tensor:
    """Return V, [in, in], of matrices [out, in] in float32 or better. It is computed on the CPU."""
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
    """The matrix V that the sites of a role share, and the positions of the trained entries of S, as indices into S
    flattened by rows."""

    V: Tensor
    index: Tensor

    def __init__(self, sites: Sequence[Site], count: int, ridge: float, seed: int) -> None:
        """Compute V from `sites`, and draw `count` positions off the diagonal."""
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
                yield f"index has entries outside of the {self.size**2} entries of a matrix"
            elif places.diff().eq(0).any():
                yield "index has an entry twice"


def entries(inputs: int, config: FRoDConfig) -> int:
    """Return n, the number of entries off the diagonal that train."""
    most = inputs * (inputs - 1)
    return min(max(int(inputs * inputs * config.sparsity), int(config.sparsity > 0)), most)


class FRoDOperator(Operator):
    """The trained values of one site, the frozen U of the site and the frozen V of its role."""

    U: Tensor
    L0: Tensor

    def __init__(self, site: Site, config: FRoDConfig, joint: Shared) -> None:
        super().__init__(site)
        self.joint, self.input_dropout = joint, input_dropout(site, config.dropout)
        self.inputs = (site.in_features, *site.kernel)
        U, L = within(joint.module.V, as_matrix(site))
        self.register_buffer("U", U.contiguous())
        self.register_buffer("L0", L)
        self.L = nn.Parameter(L.clone())
        self.S = nn.Parameter(torch.zeros(*site.batch, len(joint.module.index)))

    def core(self) -> Tensor:
        """Return ``S + diag(L - L0)``, [*batch, in, in]. It is exactly zero at first."""
        core = torch.diag_embed(self.L - self.L0)
        return core.flatten(-2).index_add(-1, self.joint.module.index, self.S).view(core.shape)

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        y = call(x)
        V, U = self.cast(y, self.joint.module.V, self.U)
        low = self.layer.apply_dropped(x, V.mT.unflatten(-1, self.inputs), self.input_dropout if self.training else 0.0)

        def turned(low: Tensor, *trained: Tensor) -> Tensor:
            return self.layer.mix(low, self.core().to(low.dtype))

        # computed again in backward, which keeps no matrix of V's size
        low = checkpoint(turned, low, self.L, self.S, use_reentrant=False)
        return self.layer.add(y, low, U, 1.0)

    def merged(self, weight: Tensor) -> Tensor:
        V = self.joint.module.V.to(self.U)
        return weight + (self.U @ (self.core() @ V.mT)).view(weight.shape)


class FRoD(Method):
    """Full-rank fine-tuning with rotational degrees."""

    name = "frod"
    Config = FRoDConfig
    tags = Tags(category="reparameterized", paper="AAAI 2026, doi 10.1609/aaai.v40i31.39813", mergeable=True)
    learning_rate = LearningRate(
        2e-2, "huggingface/peft@5d602fd, examples/frod_finetuning/frod_text_classification.py", on="BERT-base, SST-2"
    )
    target = ("attn.q", "attn.v", "cross.q", "cross.v")
    alternatives = MATRICES

    def inject(self, model: nn.Module, config: FRoDConfig, surgeon: Surgeon) -> None:
        for name, sites, counted in by_role(surgeon.sites()):
            count = entries(columns(sites[0]), config)
            basis = surgeon.own(name, partial(Joint, counted, count, config.ridge, config.projection_seed))
            for site in sites:
                surgeon.graft(site, FRoDOperator, config, joint=basis)

    @staticmethod
    def parameter_count(site: Site, config: FRoDConfig) -> int:
        return math.prod(site.batch) * (columns(site) + entries(columns(site), config))
