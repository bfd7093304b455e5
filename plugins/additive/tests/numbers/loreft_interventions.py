"""What the interventions of LoReFT's authors make of a small Llama, in float64, on waves, their start, what trains, and
the options of a command: ``python -m peftcore.testing.freeze loreft_interventions.py CHECKOUT``.

Their file derives from classes of pyvene, of which the numbers need only the width. What pyvene does besides, hooks do
here: they intervene on what a layer returns, at the first two tokens and at the last one. Which tensors train, pyvene
itself says: PYTHONPATH ends with a folder into which ``pip install --target FOLDER --no-deps pyvene==0.1.8`` put it.
"""

import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import transformers
from torch import Tensor, nn
from torch.nn.utils.parametrize import cached

from peftcore.registry.evidence import Source
from peftcore.testing import drawn
from peftcore.testing.checkouts import load

SOURCE = Source("authors", "stanfordnlp/pyreft", "dafd099", "pyreft/interventions.py")
VERSIONS = ("torch", "transformers", "pyvene")
SIZES = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "max_position_embeddings": 16}
IDS = [[1, 5, 3, 9, 2], [4, 4, 10, 0, 7]]
ABSENT = ("wandb", "evaluate", "datasets", "task_config", "dataset", "compute_metrics", "pyreft")
ENDS = {"prefix": [0, 1], "suffix": [4]}
KINDS = {"loreft": "LoreftIntervention", "noreft": "NoreftIntervention", "direft": "NodireftIntervention"}
RANK = 3
NAMES = {"learned_source.weight": "learned.weight", "learned_source.bias": "learned.bias", "proj_layer.weight": "R"}
NAMES |= {"rotate_layer.parametrizations.weight.original": "R"}
"""Of tensors of an intervention, by theirs."""


def wave(like: Tensor, k: float) -> Tensor:
    return torch.sin(torch.arange(like.numel(), dtype=torch.float64) * k + k).view_as(like)


@torch.no_grad()
def waves(tensors: Iterable[Tensor], start: float) -> None:
    for index, tensor in enumerate(tensors):
        tensor.copy_(0.5 * wave(tensor, start + 0.37 * index))


class Wide(nn.Module):
    """Stands for pyvene's interventions."""

    def __init__(self, embed_dim: int, **kwargs: Any) -> None:
        super().__init__()
        self.embed_dim = embed_dim


def authors(checkout: Path) -> Any:
    pyvene = ModuleType("pyvene")
    others = ("ConstantSourceIntervention", "SourcelessIntervention", "DistributedRepresentationIntervention")
    vars(pyvene).update({"TrainableIntervention": Wide, **{name: type(name, (), {}) for name in others}})
    sys.modules["pyvene"] = pyvene
    return load(checkout / SOURCE.script)


@torch.no_grad()
def made(module: Any, kind: str, start: float) -> Any:
    """Returns an intervention with waves in its tensors, and rows made orthonormal where they have to be."""
    options = {"embed_dim": 8, "low_rank_dimension": RANK, "dtype": torch.float64, "add_bias": False}
    intervention = getattr(module, KINDS[kind])(**options).train()
    W, b, R = (0.5 * wave(torch.empty(shape), start + 0.37 * i) for i, shape in enumerate(((RANK, 8), RANK, (RANK, 8))))
    if kind == "loreft":
        intervention.load_state_dict({"weight": W, "bias": b, "rotate_layer": torch.linalg.qr(R.T).Q})
    else:
        intervention.load_state_dict({"learned_source.weight": W, "learned_source.bias": b, "proj_layer.weight": R})
    return intervention


def rows(intervention: Any) -> Tensor:
    """Returns R of an intervention; inside of `cached` the tensor that its forward uses."""
    rotate = getattr(intervention, "rotate_layer", None)
    found: Tensor = intervention.proj_layer.weight if rotate is None else rotate.weight
    return found


def intervene(interventions: dict[str, Any], layer: nn.Module, args: Any, output: Any) -> Any:
    h = (output[0] if isinstance(output, tuple) else output).clone()
    for end, positions in ENDS.items():
        h[:, positions] = interventions[end](h[:, positions])
    return (h, *output[1:]) if isinstance(output, tuple) else h


def numbers(checkout: Path) -> dict[str, dict[str, Any]]:
    """Returns the output, ``[2, 5, 8]``, R, and gradients of W, b and R, flat, by the equation's name; in training.

    The gradient of rows that are orthonormal is that part of it along which they stay so: their parametrization has
    coordinates of its own.
    """
    torch.set_default_dtype(torch.float64)  # of rows that their `load_state_dict` makes anew
    module, found = authors(checkout), {}
    for kind in KINDS:
        model: Any = transformers.LlamaModel(transformers.LlamaConfig(**SIZES)).double().train()
        waves(model.parameters(), 0.1)
        own: dict[str, Any] = {}
        for number, layer in enumerate(model.layers):
            ends = {end: made(module, kind, 0.2 + number + 0.5 * place) for place, end in enumerate(ENDS)}
            own |= {f"{number}.{end}": intervention for end, intervention in ends.items()}
            layer.register_forward_hook(partial(intervene, ends))
        with cached():
            leaves = {}
            for name, each in own.items():
                leaves[name] = {"W": each.learned_source.weight, "b": each.learned_source.bias, "R": rows(each)}
            y = model(input_ids=torch.tensor(IDS))[0]
            tensors = [tensor for each in leaves.values() for tensor in each.values()]
            gradients = iter(torch.autograd.grad((y.square() * wave(y, 0.3)).sum(), tensors))
        found[kind] = {"output": rounded(y), "interventions": {}}
        for name, each in leaves.items():
            told = {letter: next(gradients) for letter in each}
            R = each["R"].mT if kind == "loreft" else each["R"]
            if kind == "loreft":
                told["R"] = along(told["R"].mT, R)
            told = {"rows": R, **told}
            found[kind]["interventions"][name] = {key: rounded(value) for key, value in told.items()}
    return found


def along(gradient: Tensor, R: Tensor) -> Tensor:
    """Returns the part of the gradient of orthonormal rows, ``[r, d]``, along which they stay orthonormal."""
    inner = gradient @ R.mT
    return gradient - (inner + inner.mT) / 2 @ R


def rounded(tensor: Tensor) -> list[float]:
    return [round(each, 10) for each in tensor.flatten().tolist()]


def start(checkout: Path) -> dict[str, Any]:
    """Returns what tensors of a hundred interventions on states that are 128 wide start from, taken together."""
    module, found = authors(checkout), {}
    for kind, name in KINDS.items():
        options = {"embed_dim": 128, "low_rank_dimension": 128, "dtype": torch.float32, "add_bias": False}
        made = [getattr(module, name)(**options) for _ in range(100)]
        learned = {
            f"learned.{part}": drawn(torch.cat([getattr(each.learned_source, part).flatten() for each in made]))
            for part in ("weight", "bias")
        }
        found[kind] = {"R": drawn(torch.cat([rows(each).flatten() for each in made])), **learned}
    return found


def trains(checkout: Path) -> dict[str, dict[str, list[str]]]:
    """Returns the names of what trains in a Llama, and in an intervention on each of its two layers, by the names
    here."""
    for name in [each for each in sys.modules if each.partition(".")[0] in ("pyvene", "pyreft")]:
        del sys.modules[name]
    load(checkout / "pyreft/utils.py", root=checkout)
    theirs: Any = sys.modules["pyreft"]
    found = {}
    for kind, name in KINDS.items():
        options = {"embed_dim": 8, "low_rank_dimension": RANK, "dtype": torch.float32, "add_bias": False}
        representations = [
            {
                "layer": layer,
                "component": "block_output",
                "low_rank_dimension": RANK,
                "intervention": getattr(theirs, name)(**options),
            }
            for layer in (0, 1)
        ]
        model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
        whole = theirs.get_reft_model(model, theirs.ReftConfig(representations=representations))
        own = [
            f"{layer}.{NAMES[key]}"
            for layer, each in enumerate(whole.interventions.values())
            for key, p in each.named_parameters()
            if p.requires_grad
        ]
        found[kind] = {"model": [key for key, p in whole.model.named_parameters() if p.requires_grad], "own": own}
    return found


def defaults(checkout: Path) -> dict[str, Any]:
    """Returns the options of a command that names none: of f1+l1, the first position and the last one."""
    modules = {name: mock.MagicMock() for name in ABSENT}
    with mock.patch.dict(sys.modules, modules):
        command = load(checkout / "examples/loreft/train.py")
    with mock.patch.object(command, "finetune") as finetune, mock.patch.object(sys, "argv", ["train.py"]):
        command.main()
    told = finetune.call_args.kwargs
    first, last = (int(end[1:]) for end in told["position"].split("+"))
    found = {"rank": told["rank"], "prefix_positions": first, "suffix_positions": last}
    found |= {"layers": [int(each) for each in told["layers"].split(";")], "tied": told["share_weights"]}
    return {**found, "dropout": told["dropout"], "activation": told["act_fn"]}
