"""VL-Adapter: bottleneck adapters of several tasks, which share what they have in common.   Sung, Cho and Bansal 2021,
arXiv 2112.06825 (code: ylsung/VL_adapter).

Equation:
    y = h + U_t f(D_t h + b_t) + c_t,   D_t [r, d],  U_t [d, r],   t the task

h is the output of the last matrix of an attention (self and cross) or of the feed-forward, in front of the host's
dropout. `shared` sets what all tasks share: everything (the single adapter of the paper, its best variant), D with b or
U with c (half-shared), or nothing (separate adapters). Paper and code adapt only the language model, BART or T5, which
reads pictures as tokens. So do the default targets in a model with separate towers for texts and pictures. All norms
train too. To train the map from visual features to tokens, name it: ``train=["multi_modal_projector"]``.

The call passes the task by ``with peftcore.call(model, task=...)``: one task for all rows, or one for each row. With
``shared="all"`` calls need not pass the task, and names of tasks are ignored.

Parameters: n_D (d r + r) + n_U (d r + d) per adapter, where n is 1 for a shared side and else the number of tasks; and
the norms with `train_layer_norm`.

Start: Matrices from N(0, 0.02), biases at zero. A fresh adapter is near the identity. ``up_init_std=0`` makes the start
an exact identity.

Differs from the authors' code: The authors' batches have one task; here each row may have its own. The other adapters
of the paper are separate methods here. Its Hyperformer is similar to `hyperformer`, but has separate generators for the
places in a block. Its Compacter is `compacter`, trained for all tasks together.

Use it: `peftcore.apply(model, "vl_adapter", shared="down", tasks=["questions", "captions"])`, for similar tasks on one
model, such as questions and captions for pictures; not where tasks interfere with each other (`polytropon`,
`mtl_lora`), nor where a new task should cost next to nothing (`hyperformer_pp`).
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor, nn

from peftcore.author import (
    ACTIVATIONS,
    OUTPUTS,
    AtBranchEnd,
    Joins,
    LearningRate,
    Method,
    Site,
    Surgeon,
    Tags,
    branch_end,
)
from peftcore_multitask._tasks import TaskConfig, Tasks, task_count


class VLAdapterConfig(TaskConfig):
    """Options of VL-Adapter."""

    method: Literal["vl_adapter"] = "vl_adapter"
    shared: Literal["all", "down", "up", "none"] = "all"
    """The part that all tasks share: the whole adapter, the matrix of one side with its bias, or nothing."""
    bottleneck: PositiveInt = 96
    """Width r of the adapters; an eighth of the hidden size in the authors' scripts."""
    activation: Literal["gelu_tanh", "gelu", "relu", "silu"] = "gelu_tanh"
    """The non-linearity f."""
    joins: Joins = "matrix"
    """Where an adapter reads and adds. "matrix": at the output of a branch's last matrix. "stream": after the host's
    dropout, layer scale and stochastic depth on the branch's output."""
    train_layer_norm: bool = True
    """Train the norms of the host too, as the authors do."""
    init_std: NonNegativeFloat = 0.02
    """Standard deviation of D at the start."""
    up_init_std: NonNegativeFloat = 0.02
    """Standard deviation of U at the start; 0 makes a fresh adapter an exact identity."""

    def copies(self, side: str) -> int:
        """Return the number of matrices of a side, "down" or "up": 1 if all tasks share it, else one for each task."""
        return 1 if self.shared in ("all", side) else task_count(self)


class VLAdapterOperator(AtBranchEnd):
    """The adapters of one site, for all tasks."""

    def __init__(self, site: Site, config: VLAdapterConfig) -> None:
        super().__init__(site)
        d, r = site.out_features, config.bottleneck
        down, up = config.copies("down"), config.copies("up")
        self.down = nn.Parameter(torch.randn(down, r, d) * config.init_std)
        self.down_bias = nn.Parameter(torch.zeros(down, 1, r))
        self.up = nn.Parameter(torch.randn(up, d, r) * config.up_init_std)
        self.up_bias = nn.Parameter(torch.zeros(up, 1, d))
        self.activation, self.tasks = ACTIVATIONS[config.activation](), Tasks(site, config)

    def adapt(self, h: Tensor) -> Tensor:
        x = self.layer.channels_last(h)  # [rows, ..., d]
        rows = self.layer.rows(h)
        tables = (self.down, self.down_bias, self.up, self.up_bias)
        chosen = (each if len(each) == 1 else self.tasks.of_rows(each, rows) for each in tables)
        down, down_bias, up, up_bias = self.cast(h, *chosen)  # each [rows or 1, ...]
        inner = self.activation(x.reshape(rows, -1, x.shape[-1]) @ down.mT + down_bias)  # [rows, positions, r]
        return h + self.layer.channels_back((inner @ up.mT + up_bias).view(x.shape))


class VLAdapter(Method):
    """Bottleneck adapters that tasks share wholly, by half or not at all.

    Example:
        injection = peftcore.apply(model, "vl_adapter", shared="down", tasks=["questions", "captions"])
        peftcore.call(model, task="captions")  # or a list, one for each row; with `with`, for a while
    """

    name = "vl_adapter"
    Config = VLAdapterConfig
    tags = Tags(category="multitask", paper="2112.06825", identity_at_init=False, identity_options={"up_init_std": 0.0})
    learning_rate = LearningRate(
        1e-3, "ylsung/VL_adapter@545fcbb, VL-T5/scripts/image/single_adapter.sh", on="BART-base, VQA, GQA, NLVR, COCO"
    )
    target = ("attn.output", "mlp.output")
    alternatives = OUTPUTS

    def inject(self, model: nn.Module, config: VLAdapterConfig, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            place = branch_end(surgeon, site, config.at(site.path).joins)
            surgeon.graft(place, VLAdapterOperator, config, place.places)
        for site in surgeon.at("norm.*") if config.train_layer_norm else ():
            surgeon.train(site.module_path)

    @staticmethod
    def parameter_count(site: Site, config: VLAdapterConfig) -> int:
        if site.form == "weight":  # a norm's gain or bias
            return site.numel
        d, r = site.out_features, config.bottleneck
        return config.copies("down") * (d * r + r) + config.copies("up") * (d * r + d)
