"""What the hypercomplex adapter of Compacter's authors makes of a token, on tensors of sines:
``python -m peftcore.testing.freeze compacter.py CHECKOUT``."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from peftcore.registry.evidence import Source
from peftcore.testing import HOSTS, drawn
from peftcore.testing.checkouts import load

SOURCE = Source("authors", "rabeehk/compacter", "e123daa", "seq2seq/hypercomplex/layers.py")
VERSIONS = ("torch", "transformers")


def wave(like: Tensor, k: float) -> Tensor:
    return torch.sin(torch.arange(like.numel(), dtype=torch.float64) * k + k).view_as(like)


def adapter(module: Any, activation: nn.Module, **options: Any) -> dict[str, list[float]]:
    """Returns the output, the token itself added, and the gradient of the rules: of shared ones, or of the first
    matrix'."""
    down, up = (
        module.PHMLinear(*each, phm_dim=2, c_init="normal", w_init="normal", **options).double()
        for each in ((6, 4), (4, 6))
    )
    rule, k = nn.Parameter(torch.empty(2, 2, 2).double()), 1.0
    with torch.no_grad():
        rule.copy_(wave(rule, 0.7))
        for part in (down, up):
            if options["factorized_phm"]:
                tensors = [part.W_left, part.W_right, part.b]
                part.set_phm_rule(rule)
            else:
                tensors = [part.phm_rule, part.W, part.b]
            for tensor in tensors:
                k += 0.3
                tensor.copy_(wave(tensor, k))
    x = wave(torch.empty(1, 6), 0.4)
    y = x + up(activation(down(x)))
    y.square().sum().backward()
    return {"outputs": y.flatten().tolist(), "rule": down.phm_rule.grad.flatten().tolist()}


def numbers(checkout: Path) -> dict[str, dict[str, list[float]]]:
    """Returns them of Compacter, with shared rules and factors of rank 2, and of PHM, without."""
    module = load(checkout / SOURCE.script, root=checkout)
    activation = load(checkout / "seq2seq/adapters/adapter_utils.py").Activations("gelu_new")
    return {
        "compacter": adapter(module, activation, shared_phm_rule=True, factorized_phm=True, phm_rank=2),
        "phm": adapter(module, activation, factorized_phm=False),
    }


def start(checkout: Path) -> dict[str, Any]:
    """Returns what the factors of a map ``[20,000, 40,000]`` in four products are drawn from, and its bias; and of PHM,
    of a map ``[80, 800]`` in 20 products, the blocks and the rules."""
    module = load(checkout / SOURCE.script, root=checkout)
    options = json.loads((checkout / "seq2seq/configs/compacter.json").read_text())
    drawing = {"c_init": options["phm_c_init"], "w_init": options["hypercomplex_nonlinearity"]}
    one = module.PHMLinear(20_000, 40_000, 4, **drawing, shared_phm_rule=True, factorized_phm=True)
    phm = module.PHMLinear(80, 8000, 40, **drawing)
    return {
        **{"left": drawn(one.W_left), "right": drawn(one.W_right), "bias": drawn(one.b)},
        **{"blocks": drawn(phm.W), "rules": drawn(phm.phm_rule)},
    }


def trains(checkout: Path) -> list[str]:
    """Returns the names of what trains of a small T5 itself, by their configuration."""
    root, moved = str(checkout), "seq2seq.third_party.models.t5"
    sys.path[:0] = [root, f"{root}/seq2seq"]
    sys.modules[moved] = SimpleNamespace(T5LayerNorm=transformers.models.t5.modeling_t5.T5LayerNorm)  # type: ignore
    utils = load(checkout / "seq2seq/utils/utils.py", root=checkout, absent=("projections", "projections.intrinsic"))
    names = ("prefix_tuning", "bitfit", "unfreeze_model", "freeze_model", "low_rank_adapters", "prompt_tuning")
    options = {**dict.fromkeys(names, False), **json.loads((checkout / "seq2seq/configs/compacter.json").read_text())}
    options |= {"shared_W_phm": False}
    model: Any = HOSTS["t5"].build()[0]
    model.phm_rule = nn.Parameter(torch.empty(4, 4, 4))
    utils.freeze_model_params(model, SimpleNamespace(**options))
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def defaults(checkout: Path) -> dict[str, Any]:
    """Returns the options of their configuration, and the rank that it leaves to the code, by the names here."""
    told = json.loads((checkout / "seq2seq/configs/compacter.json").read_text())
    left = load(checkout / "seq2seq/adapters/adapter_configuration.py").AdapterConfig
    names = {"phm_dim": "hypercomplex_division", "rules": "hypercomplex_adapters", "shared_rule": "shared_phm_rule"}
    names |= {"factorized": "factorized_phm", "rule_std": "phm_init_range", "train_layer_norm": "unfreeze_layer_norms"}
    found = {ours: told[name] for ours, name in names.items()}
    width = {"t5-base": 768}[told["model_name_or_path"]]
    activation = {"gelu_new": "gelu_tanh"}[told["non_linearity"]]
    bottleneck = width // told["task_reduction_factor"]
    return {**found, "rank": left.phm_rank, "bottleneck": bottleneck, "activation": activation}
