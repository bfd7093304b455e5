"""What the merges of side-tuning's authors make of two small GPT-2s, one of three layers and one of one, in float64,
all numbers waves: ``python -m peftcore.testing.freeze side_tuning.py CHECKOUT``.

Their networks for text are not in their repository. Those of transformers stand in the places of base and side.
"""

from collections.abc import Iterable
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from peftcore.registry.evidence import Source
from peftcore.testing import drawn
from peftcore.testing.checkouts import load

SOURCE = Source("authors", "jozhang97/side-tuning", "dea3456", "tlkit/models/sidetune_architecture.py")
TASKS = "tlkit/models/lifelong_framework.py"
MERGES = "tlkit/models/merge_operators.py"
VERSIONS = ("torch", "transformers")
ABSENT = ("tlkit.utils", "tlkit.models.student_models", "tlkit.models.resnet_cifar", "evkit.models.taskonomy_network")
ABSENT += ("tlkit.models.superposition",)
SIZES = {"vocab_size": 11, "n_embd": 8, "n_head": 2, "n_positions": 8, "n_inner": 12}
WITHOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
IDS = [[2, 5, 3, 9, 4], [8, 10, 7, 6, 2]]
ALPHA = 0.7


class Features(nn.Module):
    """A GPT-2 called as their networks are: the last states of some ids."""

    def __init__(self, layers: int, start: float) -> None:
        super().__init__()
        self.network = transformers.GPT2Model(transformers.GPT2Config(**SIZES, **WITHOUT, n_layer=layers)).double()
        waves(self.network.named_parameters(), start)

    def forward(self, ids: Tensor) -> Tensor:
        states: Tensor = self.network(ids).last_hidden_state
        return states


def wave(like: Tensor, k: float) -> Tensor:
    return torch.sin(torch.arange(like.numel(), dtype=torch.float64) * k + k).view_as(like)


@torch.no_grad()
def waves(tensors: Iterable[tuple[str, Tensor]], start: float) -> None:
    """Fill tensors in the order of their names."""
    for index, (_, tensor) in enumerate(sorted(tensors)):
        tensor.copy_(0.5 * wave(tensor, start + 0.37 * index))


def rounded(tensor: Tensor | None) -> list[float]:
    assert tensor is not None
    return [round(each, 9) for each in tensor.flatten().tolist()]


def numbers(checkout: Path) -> dict[str, Any]:
    """Returns for each merge the features ``[2, 5, 8]``, flat, and gradients: those of the
    whole side network and of alpha; where there is none, of its last norm."""
    module = load(checkout / SOURCE.script, root=checkout, absent=ABSENT)
    merges = load(checkout / MERGES, root=checkout)
    found = {}
    for name in ("alpha", "sum", "product"):
        base, side = Features(3, 0.4).train().requires_grad_(False), Features(1, 0.9).train()
        trained = dict(side.network.named_parameters())
        if name == "alpha":
            whole = module.GenericSidetuneNetwork(
                8, 8, normalize_pre_transfer=False, alpha_kwargs={"init_value": ALPHA}
            )
            whole.base, whole.side, trained["alpha"] = base, side, whole.double().alpha
            whole.alpha.data.fill_(ALPHA)
            y = whole(torch.tensor(IDS))
        else:
            merge = {"sum": merges.Summation, "product": merges.Product}[name](False, 0, "icifar")
            y = merge(base(torch.tensor(IDS)), side(torch.tensor(IDS)))
        (y.square() * wave(y, 0.3)).sum().backward()
        gradients = {key: rounded(p.grad) for key, p in trained.items() if name == "alpha" or key.startswith("ln_f")}
        found[name] = {"output": rounded(y), "gradients": gradients}
    return found


def start(checkout: Path) -> dict[str, Any]:
    """Returns what alpha starts from."""
    whole = load(checkout / SOURCE.script, root=checkout, absent=ABSENT).GenericSidetuneNetwork(8, 8)
    return {"alpha": drawn(whole.alpha)}


def trains(checkout: Path) -> dict[str, list[str]]:
    """Returns the names of what their first task trains in the base, in the side network, and of alpha."""
    module = load(checkout / TASKS, root=checkout, absent=(*ABSENT, "tlkit.models.fusion"))
    basic = load(checkout / "tlkit/models/basic_models.py", root=checkout)

    class Base(basic.EvalOnlyModel):  # type: ignore[name-defined,misc]
        """A GPT-2 as the base that their networks derive from."""

        def __init__(self) -> None:
            super().__init__(eval_only=True)
            self.network = Features(3, 0.4).network

    module.Base, module.Side, cuda = Base, Features, nn.Module.cuda
    nn.Module.cuda = lambda self: self  # type: ignore[method-assign,assignment]
    side = {"layers": 1, "start": 0.9}
    classes = {"base_class": "Base", "side_class": "Side", "transfer_class": "nn.Identity"}
    model = module.LifelongSidetuneNetwork(**classes, side_kwargs=side, tasks=[0])
    trained = {id(p) for p in model.train().start_task(0, True)}
    nn.Module.cuda = cuda  # type: ignore[method-assign]
    parts = {"base": model.base.network, "side": model.sides["0"].network, "blend": model.merge_operators["0"]}
    return {part: sorted(name for name, p in of.named_parameters() if id(p) in trained) for part, of in parts.items()}


def defaults(checkout: Path) -> dict[str, Any]:
    """Returns how their network for tasks merges, and its first alpha."""
    module = load(checkout / TASKS, root=checkout, absent=(*ABSENT, "tlkit.models.fusion"))
    merge = signature(module.LifelongSidetuneNetwork.__init__).parameters["merge_method"].default
    alpha = getattr(module.merge_operators, merge.rpartition(".")[2])(dense=False, task_idx=0, dataset="").alphas
    return {"merge": merge.rpartition(".")[2].lower(), "alpha": alpha.item()}
