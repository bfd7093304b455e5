"""Task arithmetic: adding and negating what tasks did to weights.   Ilharco et al. 2022, arXiv 2212.04089.

Equation:
    W' = W + s sum_t w_t tau_t,   tau_t = W_t - W,   s = 0.4

tau_t is the change of the weight by part t: B A for a LoRA, and the difference of weights if they were trained
directly. w_t = -1 forgets a task, w = (1, 1, -1) is an analogy.

If all parts are low-rank, their sum is low-rank too (`factors`), and its rank is the sum of their ranks.

Parameters: those of the parts.

Start: Nothing is drawn. Fresh parts change nothing.

Differs from the authors' code: The authors sum over the whole of models that were trained in full
(mlfoundations/task_vectors); here all sites of the parts are summed, and parts may differ in method and sites. The
combination "linear" of peft sums the factors of LoRAs instead of their products, which is different. The combination
"cat" of peft is the same as this method.

Use it: `peftcore.apply(model, "task_arithmetic")`, with `peftcore_multitask.gather` to combine trained adapters. Choose
s on validation data; use a smaller s for more tasks.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from peftcore.author import Factors, Method, Site, Surgeon, Tags, merge_math
from peftcore_multitask._merging import Members, MergingOperator, OfMergedParts, PartsConfig, merge_parts


class TaskArithmeticConfig(PartsConfig):
    """Options of task arithmetic."""

    method: Literal["task_arithmetic"] = "task_arithmetic"
    scale: float = 0.4
    """The factor s of the sum."""


class TaskArithmeticOperator(MergingOperator):
    """The scaled sum of deltas."""

    def __init__(self, site: Site, config: TaskArithmeticConfig, members: Members, number: int = 0) -> None:
        super().__init__(site, config, members, number)
        self.scale = config.scale

    def combined(self, deltas: dict[str, Tensor]) -> Tensor:
        return self.scale * merge_math.linear(list(deltas.values()), [self.weights[index] for index in deltas])

    def factors(self) -> Factors | None:
        operators: list[Any] = list(self.parts.values())
        every = [operator.factors() for operator in operators]
        given = [factors for factors in every if factors is not None]
        if len(given) < len(every):
            return None
        return merge_math.cat(given, [self.scale * weight for weight in self.weights.values()])


class TaskArithmetic(OfMergedParts, Method):
    """A weighted sum of changes of weights."""

    name = "task_arithmetic"
    Config = TaskArithmeticConfig
    tags = Tags(category="multitask", paper="2212.04089", mergeable=True, low_rank=True)
    target = ()

    def inject(self, model: nn.Module, config: TaskArithmeticConfig, surgeon: Surgeon) -> None:
        merge_parts(surgeon, config, TaskArithmeticOperator)
