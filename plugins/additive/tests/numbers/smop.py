"""The prompt that SMoP's authors make for one text, and gradients, on tensors of sines; in training with noise that is
said: ``python -m peftcore.testing.freeze smop.py CHECKOUT``."""

import ast
import importlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from peftcore.registry.evidence import Source
from peftcore.testing import drawn
from peftcore.testing.checkouts import flags

SOURCE = Source("authors", "jyjohnchoi/SMoP", "34da5e2", "peft_models/tuners/prompt_routing.py")
VERSIONS = ("torch",)
MASKS = [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]


def wave(shape: tuple[int, ...], k: float) -> Tensor:
    size = torch.Size(shape).numel()
    return torch.sin(torch.arange(size, dtype=torch.float64) * k + k).view(shape)


def on_the_cpu(name: str) -> None:
    """Let a function of torch, which their code asks for tensors on a GPU, make them here."""
    make = getattr(torch, name)
    setattr(torch, name, lambda *args, **kwargs: make(*args, **{**kwargs, "device": "cpu"}))


def theirs(checkout: Path) -> Any:
    """Returns the module of their prompts."""
    sys.path.insert(0, str(checkout))
    for name in ("peft_models", "peft_models.tuners"):  # without all that they import
        package = ModuleType(name)
        package.__path__ = [str(checkout / name.replace(".", "/"))]
        sys.modules[name] = package
    utils: Any = ModuleType("peft_models.utils")
    sys.modules["peft_models.utils"] = utils
    utils.__path__ = [str(checkout / "peft_models/utils")]
    config = importlib.import_module("peft_models.utils.config")
    utils.PeftType, utils.PromptLearningConfig = config.PeftType, config.PromptLearningConfig
    module = importlib.import_module("peft_models.tuners.prompt_routing")
    return module


def numbers(checkout: Path) -> dict[str, Any]:
    """Returns for each text, in evaluation and in training, which prompt it gets, its rows ``[3, 6]`` and the gradients
    of all prompts and of the router, flat."""
    module = theirs(checkout)
    for name in ("zeros", "arange"):
        on_the_cpu(name)
    sizes = {"num_virtual_tokens": 3, "num_virtual_tokens_full": 12, "token_dim": 6}
    told = module.PromptRoutingConfig(**sizes, perturb_router=True, stochastic=False)
    network = module.PromptRoutingEmbedding(told, None).double()
    prompts, router = network.embedding.weight, network.router[0].weight
    with torch.no_grad():
        prompts.copy_(wave((12, 6), 0.41))
        router.copy_(2 * wave((4, 6), 0.37))
    embeds = wave((3, 4, 6), 0.29)
    normal = Tensor.normal_
    Tensor.normal_ = lambda self, *args: self.copy_(wave(tuple(self.shape), 0.71))  # type: ignore[method-assign]
    found: dict[str, Any] = {}
    for training in (False, True):
        network.train(training)
        for index, mask in enumerate(MASKS):
            rows = network(None, None, embeds[index : index + 1], torch.tensor([mask]))
            gradients = torch.autograd.grad((rows * wave((1, 3, 6), 0.23)).sum(), [prompts, router])
            found[f"{'training' if training else 'evaluation'} {index}"] = {
                "chosen": network.load_routes.tolist(),
                "rows": rows.flatten().tolist(),
                "prompts": gradients[0].flatten().tolist(),
                "router": gradients[1].flatten().tolist(),
            }
    Tensor.normal_ = normal  # type: ignore[method-assign]
    return found


def start(checkout: Path) -> dict[str, Any]:
    """Returns what 4 prompts of 5 rows are drawn from, 4,000 wide, and the scalar products of the router's rows."""
    on_the_cpu("zeros")
    options = {"num_virtual_tokens": 5, "num_virtual_tokens_full": 20, "token_dim": 4000}
    module = theirs(checkout)
    network = module.PromptRoutingEmbedding(module.PromptRoutingConfig(**options, stochastic=False), None)
    (router,) = (tensor for name, tensor in network.named_parameters() if name.startswith("router"))
    return {"prompts": drawn(network.embedding.weight), "router": (router @ router.T).tolist()}


def trains(checkout: Path) -> list[int]:
    """Returns how many numbers each group has of what their script gives to the optimizer: 4 prompts of 5 rows, 16
    wide."""
    on_the_cpu("zeros")
    module, made = theirs(checkout), {"num_virtual_tokens": 5, "num_virtual_tokens_full": 20, "token_dim": 16}
    network = module.PromptRoutingEmbedding(module.PromptRoutingConfig(**made, stochastic=False), None)
    script = ast.parse((checkout / "scripts/train.py").read_text(encoding="utf-8"))
    told = [each for each in ast.walk(script) if ast.unparse(each).startswith("tuning_params = [{")]
    known: dict[str, Any] = {"model": SimpleNamespace(prompt_encoder=network), "args": SimpleNamespace(lr=0.5)}
    exec(compile(ast.Module(told, []), "train.py", "exec"), known)  # type: ignore[arg-type]
    return [sum(p.numel() for p in group["params"] if p.requires_grad) for group in known["tuning_params"]]


def defaults(checkout: Path) -> dict[str, Any]:
    """Returns the sizes of the command in their README."""
    told = flags((checkout / "README.md").read_text())
    prompts = told["num_virtual_tokens_full"] // told["num_virtual_tokens"]
    return {"prompts": prompts, "length": told["num_virtual_tokens"], "top_k": told["topk"]}
