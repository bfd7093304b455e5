"""SparseAdapter: bottleneck adapters that are pruned before training.   He et al. 2022, arXiv 2210.04284.

Equation:
    y = h + (m_up * W_up) drop f((m_down * W_down) LN(h) + b_down) + b_up,   m in {0, 1}, fixed before training

    s(w) = |w dL/dw| (snip),   w (H g) (grasp),   |w| (magnitude),   a draw (random),   g = dL/dw, H its derivative

The adapter is a serial one as in `houlsby_adapter`: it changes the outputs of attention and feed-forward before they
are added to the stream. One ranking over all adapters keeps the weights with the highest s, a share of 1 - `sparsity`.
Biases and norms are not pruned. Scores are computed once, at the start; snip and grasp need ``data=``, run the model in
eval mode, and sum gradients over the batches. Only the kept weights are stored and trained, as one vector for all
adapters with the weights' positions, so momentum and weight decay cannot revive pruned weights. The adapter has a layer
norm in front of W_down and dropout on f's output.

Parameters: a share of 1 - `sparsity` of the 2 d r of all adapters, and r + d an adapter, or r + 3 d with `norm`. The
file also stores the positions of the kept weights.

Start: Both matrices from N(0, 0.02), biases at zero; the kept weights start with these values. This is nearly an
identity; ``up_init_std=0`` with ``score="random"`` makes it exact.

Differs from the authors' code: Where the paper is not specific, this follows the code (Shwai-He/SparseAdapter): grasp
keeps the weights with the largest w (H g), whose removal would lower the norm of the gradient most. The code's
attention adapter is in front of the host's dropout, and its feed-forward adapter after it; here `joins` sets the place
for both. The code's score synflow is zero for adapters after the norm, and is left out.

Use it: `peftcore.apply(model, "sparse_adapter", data=batches)`, where a `houlsby_adapter` is too large to store, or
where you want a wider adapter of the same size: the paper's Large-Sparse doubles `bottleneck` and prunes half. The
method is not faster, since each forward builds the full matrices.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import Any, Literal, Self

import torch
from pydantic import NonNegativeFloat, PositiveInt, model_validator
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from peftcore.author import (
    ACTIVATIONS,
    OUTPUTS,
    AppliedMethod,
    AtBranchEnd,
    Batches,
    Checked,
    Joins,
    LearningRate,
    Method,
    MethodConfig,
    Share,
    Shared,
    Site,
    Surgeon,
    Tags,
    branch_end,
)
from peftcore.errors import CalibrationError, ConfigError
from peftcore_additive._bottleneck import width_of


class SparseAdapterConfig(MethodConfig):
    """Options of SparseAdapter."""

    overridable = ("bottleneck", "activation", "norm", "dropout", "joins", "init_std", "up_init_std")

    method: Literal["sparse_adapter"] = "sparse_adapter"
    bottleneck: PositiveInt = 64
    """Width r of the bottleneck before pruning."""
    sparsity: Share = 0.4
    """The share of the weights of all adapters that is pruned."""
    score: Literal["snip", "grasp", "magnitude", "random"] = "snip"
    """The score by which the weights are ranked; snip and grasp need data."""
    activation: Literal["gelu", "relu", "silu", "tanh"] = "relu"
    """The non-linearity f."""
    norm: bool = True
    """Put a trained layer norm in front of the adapter's first matrix W_down."""
    dropout: Share = 0.1
    """Dropout probability of the bottleneck's activations in training."""
    joins: Joins = "stream"
    """Where the adapter reads and adds: after the host's dropout, layer scale and stochastic depth on a branch's output
    ("stream"), or before them, at the branch's last matrix ("matrix")."""
    init_std: NonNegativeFloat = 0.02
    """Standard deviation of W_down at the start."""
    up_init_std: NonNegativeFloat = 0.02
    """Standard deviation of W_up at the start; 0 makes an exact identity, and is allowed only with the random score."""

    @model_validator(mode="after")
    def _ranks(self) -> Self:
        if self.score != "random" and not (self.init_std and self.up_init_std):
            raise ValueError(
                f"score={self.score!r} cannot rank the weights of a matrix that starts at zero; set score='random', or "
                "positive init_std and up_init_std"
            )
        return self


class Kept(Checked):
    """The kept weights, and their ascending positions in the concatenated weights of all adapters."""

    index: Tensor

    def __init__(self, total: int, count: int) -> None:
        super().__init__()
        self.total = total
        self.values = nn.Parameter(torch.zeros(count))
        self.register_buffer("index", torch.randperm(total)[:count].sort().values.to(torch.int32))

    @torch.no_grad()
    def take(self, start: Tensor, score: Tensor | None = None) -> None:
        """Store the start values of the kept weights; with scores, first select the weights with the highest scores."""
        start = start.to(self.values)
        if score is not None:
            self.index.copy_(score.topk(len(self.index)).indices.sort().values)
        self.values.copy_(start[self.index.long()])

    def wrong_values(self, values: Mapping[str, Tensor]) -> Iterator[str]:
        index = values.get("index")
        if index is not None and not (index.diff().gt(0).all() and int(index[0]) >= 0 and int(index[-1]) < self.total):
            yield f"index must hold ascending positions in {self.total} weights"

    def between(self, first: int, size: int, device: torch.device) -> Tensor:
        """Return `size` weights from the position `first` on, with zeros for pruned weights."""
        values, index = (each.to(device) for each in (self.values, self.index))
        # How many places lie here is only known on the device, but not more than this; the rest go behind the end.
        order = torch.searchsorted(index, first) + torch.arange(min(len(index), size), device=device)
        found = order.clamp(max=len(index) - 1)
        place = index[found].long() - first
        place = torch.where((order < len(index)) & (place < size), place, size)
        return values.new_zeros(size + 1).scatter(0, place, values[found])[:size]


def drawn(width: int, config: SparseAdapterConfig) -> Tensor:
    """Draw both matrices of an adapter, and return them flattened, W_down first."""
    stds = (config.init_std, config.up_init_std)
    return torch.cat([torch.randn(width * config.bottleneck) * std for std in stds])


def gradients(loss: Tensor, weights: list[Tensor], again: bool = False) -> list[Tensor]:
    """Return the gradients of a loss. With `again`, the gradients can be differentiated again."""
    return list(torch.autograd.grad(loss, weights, create_graph=again, allow_unused=True, materialize_grads=True))


def slopes(weights: list[Tensor], data: Batches) -> list[Tensor]:
    """Return the gradients of the sum of the losses of all batches."""
    sums = [torch.zeros_like(w) for w in weights]
    for batch in data:
        for total, gradient in zip(sums, gradients(batch.loss(), weights), strict=True):
            total += gradient
    return sums


def snip(weights: list[Tensor], data: Batches) -> list[Tensor]:
    """Return |w dL/dw| for each weight."""
    return [(w.detach() * g).abs() for w, g in zip(weights, slopes(weights, data), strict=True)]


def grasp(weights: list[Tensor], data: Batches) -> list[Tensor]:
    """Return w (H g) for each weight, where g and H are the gradient and the Hessian of the sum of the losses.

    Raises:
        CalibrationError: an operation of the model lacks a second derivative.
    """
    first = slopes(weights, data)
    with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
        for batch in data:
            again = gradients(batch.loss(), weights, again=True)
            product = torch.stack([(a * b).sum() for a, b in zip(first, again, strict=True)]).sum()
            try:
                product.backward()  # the whole graph: without it, what has no second derivative would count as zero
            except RuntimeError as error:
                raise CalibrationError(f"the model has no second derivative ({error}); use score='snip'") from error
    return [torch.zeros_like(w) if w.grad is None else w.detach() * w.grad for w in weights]


SCORES = {"snip": snip, "grasp": grasp}


class SparseOperator(AtBranchEnd):
    """One adapter: its kept weights, its biases and its norm."""

    def __init__(self, site: Site, config: SparseAdapterConfig, first: int, kept: Shared, starts: list[Tensor]) -> None:
        super().__init__(site)
        self.width, self.first, self.kept = width_of(site), first, kept
        starts.append(drawn(self.width, config))  # here the generator is seeded for the site
        self.activation, self.dropout = ACTIVATIONS[config.activation](), nn.Dropout(config.dropout)
        self.down_bias = nn.Parameter(torch.zeros(config.bottleneck))
        self.up_bias = nn.Parameter(torch.zeros(self.width))
        self.norm = nn.LayerNorm(self.width) if config.norm else None
        self.whole: Tensor | None = None  # both matrices before they are pruned, while they are ranked

    def adapt(self, h: Tensor) -> Tensor:
        return h + self.layer.channels_back(self._mapped(self.layer.channels_last(h)))

    def _mapped(self, h: Tensor) -> Tensor:
        size = 2 * self.width * len(self.down_bias)
        flat = self.kept.module.between(self.first, size, h.device) if self.whole is None else self.whole
        flat, down_bias, up_bias = self.cast(h, flat, self.down_bias, self.up_bias)
        down, up = flat.chunk(2)
        if self.norm is not None:
            weight, bias = self.cast(h, self.norm.weight, self.norm.bias)
            h = nn.functional.layer_norm(h, weight.shape, weight, bias, self.norm.eps)
        inner = self.activation(nn.functional.linear(h, down.view(-1, self.width), down_bias))  # [..., r]
        return nn.functional.linear(self.dropout(inner), up.view(self.width, -1), up_bias)


class SparseAdapter(Method):
    """Serial adapters that are pruned by one ranking before training."""

    name = "sparse_adapter"
    Config = SparseAdapterConfig
    tags = Tags(
        category="additive",
        paper="2210.04284",
        identity_at_init=False,
        identity_options={"up_init_std": 0.0, "score": "random"},
        needs_data=True,
        data_options={"score": ("snip", "grasp")},
        random=True,
    )
    learning_rate = LearningRate(
        1e-4,
        "Shwai-He/SparseAdapter@b190084, examples/pytorch/text-classification/run_glue.sh",
        on="RoBERTa-base, MRPC",
    )
    target = ("attn.output", "mlp.output")
    alternatives = OUTPUTS
    starts: list[Tensor]

    def inject(self, model: nn.Module, config: SparseAdapterConfig, surgeon: Surgeon) -> None:
        sites = surgeon.sites()
        owns = [config.at(site.path) for site in sites]
        places = [branch_end(surgeon, site, own.joins) for site, own in zip(sites, owns, strict=True)]
        sizes = [2 * width_of(place) * own.bottleneck for place, own in zip(places, owns, strict=True)]
        total = sum(sizes)
        count = total - math.ceil(config.sparsity * total)
        if not count:
            raise ConfigError(f"sparsity={config.sparsity} leaves none of the {total} weights; lower it")
        kept = surgeon.own("kept", lambda: Kept(total, count))
        self.starts = []
        for place, first in zip(places, accumulate(sizes, initial=0), strict=False):
            surgeon.graft(place, SparseOperator, config, place.places, first=first, kept=kept, starts=self.starts)
        start = torch.cat(self.starts)
        kept.module.take(start, start.abs() if config.score == "magnitude" else None)

    def calibrate(self, model: nn.Module, data: Batches, config: SparseAdapterConfig, injection: AppliedMethod) -> None:
        operators: list[Any] = [graft.operator for graft in injection.grafts if graft.by_method]
        weights = [start.to(each.up_bias).requires_grad_() for start, each in zip(self.starts, operators, strict=True)]
        for each, whole in zip(operators, weights, strict=True):
            each.whole = whole
        model.eval()
        try:
            found = SCORES[config.score](weights, data)
        finally:
            self.starts = []
            for each in operators:
                each.whole = None
        kept: Any = injection.shared["kept"]
        start, score = (torch.cat([each.detach().to(kept.values) for each in held]) for held in (weights, found))
        if not (score.isfinite().all() and score.any()):
            raise CalibrationError(
                f"{config.score}: the loss has no finite, non-zero gradient in any adapter; pass other data"
            )
        kept.take(start, score)

    @staticmethod
    def parameter_count(site: Site, config: SparseAdapterConfig) -> int:
        return config.bottleneck + width_of(site) * (1 + 2 * config.norm)  # all else is in one vector, of no site
