"""RegMean: weights merged so that each task's outputs stay nearest.   Jin et al. 2022, arXiv 2212.09849.

Equation:
    W' = W + sum_t (W_t - W) P_t,   P_t = w_t G_t (sum_u w_u G_u)^-1
    G_t = a X_t' X_t / n + (1 - a) diag(X_t' X_t / n),   a = `off_diagonal`

X_t [n, in] are the inputs that a linear layer gets in the model of part t, on data of task t, padding left out. With a
= 1, W' minimizes sum_t w_t |X_t W'' - X_t W_t''|^2 / n_t: a linear regression, whose solution needs no data but the
matrices G_t. The owner of an adapter and its data computes them with `grams`, and a merge uses them with `take_grams`:

    first = grams(peftcore.load(model, "first"), batches)      # tensors by path, to pass on with the adapter
    merged = gather(model, "regmean", {"first": 1.0, "second": 1.0})
    take_grams(merged, [first, second])

Without these matrices all P_t are w_t / sum w: a plain mean. All tensors except weights of linear layers (biases,
norms, convolutions, embeddings, experts) always have the plain mean, as in the authors' code
(bloomberg/dataless-model-merging). In their notebook a is 0.9 (it is not used for RoBERTa), and 0.1 in most of their
scripts; a = 0 is their diagonal variant.

With `unseen` = "base" the inverse is a pseudo-inverse. In directions that no task's inputs have, W' is the base weight,
so a few prompts are enough. Changes of an embedding table are added, since parts train different rows of it. With a = 1
and a weight for each row of X_t, this is the gradient fusion of Mix-of-Show (arXiv 2305.18292, `mix_of_show`). Its
authors compute it by L-BFGS, starting from the base weight.

A merge of low-rank parts is low-rank too (`factors`). `peftcore.to_lora`, with the sum of their ranks, converts it to a
LoRA that does not need the P_t. The P_t are large: [in, in] for each part and site.

Parameters: those of the parts.

Start: All P_t are w_t / sum w: a plain mean, which changes nothing while the parts are fresh.

Differs from the authors' code: An input that is zero in all tasks keeps the plain mean; the authors' inverse does not
exist there, and they count padding.

Use it: `peftcore.apply(model, "regmean")`, where a few batches of each task are available after its adapter was
trained; not without data (`ties_merging`, `task_arithmetic`), nor where adapters should be chosen for each input
(`arrow`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from peftcore import Injection, activate
from peftcore.author import AppliedMethod, Batches, Factors, Method, Site, Surgeon, Tags, merge_math, watched_inputs
from peftcore.errors import CalibrationError, ConfigError
from peftcore_multitask._merging import Members, MergingOperator, OfMergedParts, PartsConfig, merge_parts

__all__ = ["RegMean", "grams", "take_grams"]


class RegMeanConfig(PartsConfig):
    """Options of RegMean."""

    method: Literal["regmean"] = "regmean"
    off_diagonal: Annotated[float, Field(ge=0.0, le=1.0)] = 0.9
    """The factor a of the off-diagonal entries of the matrices, which are products of two different inputs."""
    unseen: Literal["mean", "base"] = "mean"
    """The merged weight in directions that no task's inputs have. "mean": the mean of the parts; this is possible only
    for single inputs, and other unseen directions are an error. "base": the weight of the base model."""

    @model_validator(mode="after")
    def _positive(self) -> Self:
        if self.weights is not None and min(self.weights) <= 0:
            raise ValueError("weights of a mean must be above 0; use task_arithmetic to subtract a part")
        return self


LEAST = 1e-6
"""Eigenvalues of the inputs' correlation matrix below this share of the largest eigenvalue are treated as rounding
errors of float32."""
LARGEST_ERROR = 1e-3
"""The largest accepted error of an inverse: the largest difference between the sum of all P_t and the identity
matrix."""


def gram_sites(sites: Iterable[Site]) -> list[Site]:
    """Return the sites that are weights of linear layers whose module the model calls with vectors."""
    layers = [(site, site.layer_of(site.module, site.tensor)) for site in sites]
    return [site for site, layer in layers if layer.called and layer.of_vectors and not layer.batch_dims]


def grams(injection: Injection, data: Iterable[Any], also: Sequence[str] = ()) -> dict[str, Tensor]:
    """Return the matrices X' X / n ``[in, in]`` of the linear layers at which an adapter acts, by path. X [n, in] are
    the inputs of the layer without padding, while only this adapter is active. Layers in `also`, at which other parts
    of a merge act, are included.

    Args:
        injection: the adapter.
        data: batches of its task, as for `peftcore.apply`; labels are not needed.
        also: paths of more linear layers.

    Raises:
        ConfigError: the adapter changes no called linear layer, a path is unknown, or the adapter is merged.
        CalibrationError: data is missing, a layer was not called, or inputs are not finite.
    """
    model = injection.model
    if injection.merged:
        raise ConfigError(f"{injection.name!r} is merged into the weights; call unmerge() first")
    modules = {site.module: site.module_path for site in gram_sites(injection.sites)}
    named = dict(model.named_modules())
    if missing := [path for path in also if path not in named]:
        raise ConfigError(f"the model has no module {missing[0]!r}")
    modules |= {named[path]: path for path in also}
    if not modules:
        raise ConfigError(
            f"{injection.name!r} changes no weight of a linear layer that is called, so it has no matrices: its parts "
            "are averaged as they are"
        )
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def look(module: nn.Module, given: Tensor, x: Tensor) -> None:
        path = modules[module]
        sums[path] = sums.get(path, 0) + (x.mT @ x)
        counts[path] = counts.get(path, 0) + len(x)

    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad(), activate(model, injection.name), watched_inputs(model, modules, look):
            for batch in Batches(model, data, f"inputs with {injection.name}"):
                batch.output()
    finally:
        for module, mode in modes.items():
            module.training = mode
    for path in modules.values():
        if not counts.get(path) or not sums[path].isfinite().all():
            raise CalibrationError(f"{path} got no inputs, or some that are not finite; pass other data")
    return {path: total / counts[path] for path, total in sums.items()}


def matrices_of(path: str, every: Sequence[Mapping[str, Tensor]], like: Tensor) -> Tensor:
    """Return the matrices of one layer for all parts, in float64 and in the shape of `like` ``[parts, in, in]``.

    Raises:
        ConfigError: a part lacks a matrix, or its matrix has another shape.
    """
    for index, given in enumerate(every):
        G = given.get(path)
        if G is None or G.shape != like.shape[1:] or not (G.isfinite().all() and (G.diagonal() >= 0).all()):
            raise ConfigError(
                f"part {index} has no matrix of the inputs of {path}, or one that does not fit: if it does not act at "
                f"{path}, compute one with grams(injection, data, also=[{path!r}])"
            )
    return torch.stack([given[path].to(like.device, torch.float64) for given in every])


def shares_of(path: str, G: Tensor, weights: Sequence[float], off_diagonal: float, base: bool = False) -> Tensor:
    """Return the P_t of one layer, ``[parts, in, in]``, computed from its matrices `G`. With `base`, they are zero in
    directions that no inputs have.

    Raises:
        CalibrationError: the sum of the matrices is singular.
    """
    diagonal = G.diagonal(dim1=-2, dim2=-1)
    if base:  # not scaled as below: what is orthogonal to the inputs is to stay so
        G = off_diagonal * G + torch.diag_embed((1 - off_diagonal) * diagonal)
        G = torch.tensor(weights, dtype=G.dtype, device=G.device)[:, None, None] * G
        return G @ torch.linalg.pinv(G.sum(0), rtol=LEAST, hermitian=True)
    unseen = (diagonal == 0).all(0)  # such an input has the same weight in all parts
    G = off_diagonal * G + torch.diag_embed((1 - off_diagonal) * diagonal + unseen.to(G))
    G = torch.tensor(weights, dtype=G.dtype, device=G.device)[:, None, None] * G
    total = G.sum(0)
    root = total.diagonal().rsqrt()  # inputs differ much in size, and the inverse should not feel it
    inverse = torch.linalg.pinv(root[:, None] * total * root, rtol=LEAST, hermitian=True)
    shares = G @ (root[:, None] * inverse * root)
    error = shares.sum(0) * root[:, None] / root - torch.eye(len(root)).to(G)
    if error.abs().max() > LARGEST_ERROR:
        raise CalibrationError(
            f"the inputs of {path} were too few or too similar for a regression: pass more data, set off_diagonal "
            "below 1, or set unseen='base'"
        )
    return shares


class RegMeanOperator(MergingOperator):
    """Merges the changes of all parts, each multiplied by its P_t."""

    shares: Tensor | None

    def __init__(self, site: Site, config: RegMeanConfig, members: Members, number: int = 0) -> None:
        super().__init__(site, config, members, number)
        weights = [1.0] * len(config.parts) if config.weights is None else config.weights
        self.importance = [weight / sum(weights) for weight in weights]
        self.plain = [1.0] * len(weights) if config.unseen == "base" and site.layer.one_hot else self.importance
        self.matrix = site.layer_of(site.module, site.tensor)  # where parts bring whole values, the site knows none
        inputs = self.matrix.shape(site.module, site.tensor)[-1] if gram_sites([site]) else 0
        mean = [each * torch.eye(inputs) for each in self.importance]
        self.register_buffer("shares", torch.stack(mean) if inputs else None)  # [parts, in, in]

    def _share(self, index: str, like: Tensor) -> Tensor:
        assert self.shares is not None, "inputs are vectors"
        return self.shares[int(index)].to(like)

    def combined(self, deltas: dict[str, Tensor]) -> Tensor:
        matrices = all(delta.dim() == 2 for delta in deltas.values())
        if self.shares is None or not matrices:
            return merge_math.linear(list(deltas.values()), [self.plain[int(index)] for index in deltas])
        taus = {index: self.matrix.logical(self.layer.stored(delta)) for index, delta in deltas.items()}
        changes = [tau @ self._share(index, tau) for index, tau in taus.items()]
        return self.layer.logical(self.matrix.stored(merge_math.linear(changes, [1.0] * len(changes))))

    def factors(self) -> Factors | None:
        operators: dict[str, Any] = dict(self.parts.items())
        given: dict[str, Factors | None] = {index: operator.factors() for index, operator in operators.items()}
        known = {index: factors for index, factors in given.items() if factors is not None}
        if len(known) < len(given):
            return None
        if self.shares is None:
            return merge_math.cat([*known.values()], [self.plain[int(index)] for index in known])
        turned = [(A @ self._share(index, A), B, scale) for index, (A, B, scale) in known.items()]
        return merge_math.cat(turned, [1.0] * len(turned))


class RegMean(OfMergedParts, Method):
    """Changes of weights, merged by a regression on the inputs of their tasks."""

    name = "regmean"
    Config = RegMeanConfig
    tags = Tags(category="multitask", paper="2212.09849", mergeable=True, low_rank=True)
    target = ()

    def inject(self, model: nn.Module, config: RegMeanConfig, surgeon: Surgeon) -> None:
        merge_parts(surgeon, config, RegMeanOperator)


@torch.no_grad()
def take_grams(merged: AppliedMethod, every: Sequence[Mapping[str, Tensor]]) -> None:
    """Set the P_t of a merge from the matrices of the parts, as returned by `grams`, in the order of the parts.

    Raises:
        ConfigError: the injection is not a regmean, it is merged into the model, or matrices are missing or do not fit.
        CalibrationError: the inputs were too few to determine all directions.
    """
    found = [graft for graft in merged.grafts if isinstance(graft.operator, RegMeanOperator)]
    if not found or len(every) != len(merged.config.parts):
        raise ConfigError(
            f"take_grams needs a regmean adapter and one dictionary of matrices for each part; {merged.name!r} is a "
            f"{merged.method.name}, and {len(every)} were passed"
        )
    if merged.whole.merged:
        raise ConfigError(f"{merged.name!r} is merged, so new matrices would have no effect; call unmerge() first")
    made: list[tuple[Tensor, Tensor]] = []
    for graft in found:
        operator: Any = graft.operator
        if operator.shares is not None:
            path, options = graft.site.module_path, merged.config.at(graft.site.path)
            matrices = matrices_of(path, every, operator.shares)
            base = options.unseen == "base"
            made.append((operator.shares, shares_of(path, matrices, operator.importance, options.off_diagonal, base)))
    for shares, new in made:
        shares.copy_(new)
