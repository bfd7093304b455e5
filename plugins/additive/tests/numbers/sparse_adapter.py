"""Which weights of two adapters the authors of SparseAdapter keep, and what these give then, on tensors of sines:
``python -m peftcore.testing.freeze sparse_adapter.py CHECKOUT``."""

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.registry.evidence import Source
from peftcore.testing import drawn
from peftcore.testing.checkouts import flags, load

SOURCE = Source("authors", "Shwai-He/SparseAdapter", "b190084", "src/transformers/pruning/pruners.py")
VERSIONS = ("torch",)
MODEL = "src/transformers/models/roberta/modeling_roberta.py"
ABSENT = ("transformers.activations", "transformers.file_utils", "transformers.modeling_outputs", "transformers.utils")
ABSENT += ("transformers.modeling_utils", "transformers.models.roberta.configuration_roberta")
SIZES = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_labels": 2}
SIZES |= {"num_attention_heads": 2, "max_position_embeddings": 16, "pad_token_id": 1, "type_vocab_size": 1}
HOST: dict[str, Any] = {"layer_norm_eps": 1e-5, "hidden_act": "gelu", "is_decoder": False, "add_cross_attention": False}
HOST |= {"chunk_size_feed_forward": 0, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
HOST |= {"classifier_dropout": None}
SCORES = {"grasp": "GraSP", "magnitude": "Mag", "snip": "SNIP"}
KEPT = 0.6
WIDTHS, BOTTLENECK = (8, 5), 3


def wave(*shape: int, step: float) -> Tensor:
    return (torch.arange(math.prod(shape), dtype=torch.float64) * step + step).sin().view(shape)


class Stack(nn.Module):
    """Two maps, each with an adapter behind it; the loss of a batch is the mean square of what comes out."""

    def __init__(self, adapters: nn.ModuleList) -> None:
        super().__init__()
        self.first, self.second, self.adapters = nn.Linear(6, 8), nn.Linear(8, 5), adapters

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.adapters[1](self.second(torch.tanh(self.adapters[0](self.first(x)))))
        return y


class Outer(nn.Module):
    """What their code expects around a model."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.module(x)
        return y


@torch.no_grad()
def built(layer: Any) -> Outer:
    adapters = nn.ModuleList([layer(d_model=width, bottleneck=BOTTLENECK) for width in WIDTHS])
    model = Stack(adapters).double()
    for index, each in enumerate((model.first, model.second)):
        each.weight.copy_(wave(*each.weight.shape, step=0.7 + index))
        each.bias.copy_(wave(*each.bias.shape, step=0.3 + index))
    for index, each in enumerate(adapters):
        each.down_proj.weight.copy_(wave(BOTTLENECK, WIDTHS[index], step=1.7 + index))
        each.up_proj.weight.copy_(wave(WIDTHS[index], BOTTLENECK, step=1.3 + index))
    return Outer(model)


def numbers(checkout: Path) -> dict[str, list[float]]:
    """Returns the places of what is kept by each score, in one row of all matrices; and of snip, with biases and norms
    that are not zero, outputs and gradients."""
    factory = load(checkout / "petl/petl_factory.py", checkout)
    pruners: Any = load(checkout / SOURCE.script)
    generator: Any = load(checkout / "src/transformers/pruning/generator.py")
    found: dict[str, list[float]] = {}

    def masks(outer: Outer) -> Iterator[Tensor]:
        adapters: Any = outer.module.adapters
        for each in adapters:
            yield from (each.down_mask, each.up_mask)

    for score, name in SCORES.items():
        model = built(factory.Adapter_Layer)
        pruner = getattr(pruners, name)(generator.masked_parameters(model))
        data = [{"x": wave(4, 6, step=0.9)}, {"x": wave(3, 6, step=1.9)}]
        pruner.score(
            model.eval(), data, torch.device("cpu"), lambda outer, given, **_: outer(given["x"]).square().mean()
        )
        pruner.mask(KEPT, "global")
        found[score] = torch.cat([each.detach().flatten() for each in masks(model)]).nonzero().flatten().tolist()
    model.zero_grad()
    adapters: Any = model.module.adapters
    with torch.no_grad():
        for index, each in enumerate(adapters):
            for place, tensor in enumerate(
                (each.down_proj.bias, each.up_proj.bias, each.adapter_layer_norm_before.bias)
            ):
                tensor.copy_(wave(*tensor.shape, step=0.4 + index + place))
            each.adapter_layer_norm_before.weight.copy_(1 + wave(WIDTHS[index], step=0.6 + index))
    x = wave(4, 6, step=0.5).requires_grad_()
    y = model(x)
    (y * wave(4, 5, step=0.2)).sum().backward()
    whole = torch.cat(
        [g.flatten() for each in adapters for g in (each.down_proj.weight.grad, each.up_proj.weight.grad)]
    )
    values = whole[torch.tensor(found["snip"], dtype=torch.long)]
    tensors = {"y": y, "x": x.grad, "values": values}
    for index, each in enumerate(adapters):
        norm = each.adapter_layer_norm_before
        named = {"down": each.down_proj.bias, "up": each.up_proj.bias, "gain": norm.weight, "shift": norm.bias}
        tensors |= {f"{name} {index}": tensor.grad for name, tensor in named.items()}
    return found | {name: tensor.flatten().tolist() for name, tensor in tensors.items()}


def told(checkout: Path) -> dict[str, Any]:
    """Returns the options of their command."""
    return flags((checkout / "examples/pytorch/text-classification/run_glue.sh").read_text(encoding="utf-8"))


def start(checkout: Path) -> dict[str, Any]:
    """Returns what tensors of an adapter start from that is 100 wide in a width of 400."""
    each = load(checkout / "petl/petl_factory.py", checkout).Adapter_Layer(d_model=400, bottleneck=100)
    norm = each.adapter_layer_norm_before
    found = {"down": each.down_proj.weight, "up": each.up_proj.weight, "norm.weight": norm.weight}
    found |= {"down_bias": each.down_proj.bias, "up_bias": each.up_proj.bias, "norm.bias": norm.bias}
    return {name: drawn(tensor) for name, tensor in found.items()}


def trains(checkout: Path) -> dict[str, int]:
    """Returns how many numbers train in a RoBERTa of two layers with a head, by the last names of tensors."""
    petl: Any = load(checkout / "petl/petl_enc_model.py", checkout)
    options: Any = load(checkout / "petl/options.py", checkout)
    command = told(checkout)
    names = ("attn_mode", "attn_option", "ffn_mode", "ffn_option", "ffn_adapter_init_option", "unfreeze_params")
    tuned = options.TuneArguments(**{name: command[name] for name in names}, attn_bn=BOTTLENECK, ffn_bn=BOTTLENECK)
    whole = petl.RobertaConfig(**SIZES)
    for name in ("transformers", "transformers.models", "transformers.models.roberta"):
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__path__ = [str(checkout / "src" / name.replace(".", "/"))]
    sys.modules["transformers"].__dict__["RobertaConfig"] = SimpleNamespace
    roberta = load(checkout / MODEL, root=checkout / "src", absent=ABSENT)
    roberta.ACT2FN = {"gelu": nn.functional.gelu}
    config = SimpleNamespace(**SIZES | HOST | vars(tuned))
    model = nn.ModuleDict({"embeddings": roberta.RobertaEmbeddings(config), "encoder": roberta.RobertaEncoder(config)})
    model["classifier"] = roberta.RobertaClassificationHead(config)
    petl.PETLEncModel(whole, tuned, model)
    found: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            last = ".".join(name.split(".")[-2:]) if ".ef_" in name else name
            found[last] = found.get(last, 0) + parameter.numel()
    return found


def defaults(checkout: Path) -> dict[str, Any]:
    """Returns the options of their command, by the names here; where it has the adapter's own, those of its places."""
    command, options = told(checkout), load(checkout / "petl/options.py", checkout)
    tuned = options.TuneArguments()
    assert command["attn_bn"] == command["ffn_bn"]
    score = {"rand": "random", "mag": "magnitude"}.get(command["pruner"], command["pruner"])
    pruned, norm = 1 - command["sparsity"], tuned.ffn_adapter_layernorm_option == "in"
    return {"bottleneck": command["attn_bn"], "score": score, "sparsity": pruned, "norm": norm}
