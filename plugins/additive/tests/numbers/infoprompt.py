"""The prompts that InfoPrompt's authors make of texts, and their losses with gradients, on tensors of sines:
``python -m peftcore.testing.freeze infoprompt.py CHECKOUT``.

Their encoder is stood in for by a linear map of the mean of what it is given: as published it finds no rows for all
places of its prompt. The losses, and the networks that they train, are theirs.
"""

import ast
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.registry.evidence import Source
from peftcore.testing import drawn
from peftcore.testing.checkouts import load

SOURCE = Source("authors", "JoshuaWu1997/infoprompt", "cc56fba", "model/RoBertaPrompt.py")
VERSIONS = ("torch",)
WIDTH, HIDDEN, LENGTH, CLASSES, VOCABULARY = 6, 4, 2, 3, 11
IDS = [[0, 7, 9, 4, 2], [0, 5, 8, 2, 1]]
MASK = [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
CASES = {"one": (1, 1.0), "two": (2, 1.5)}
"""How many texts there are, and a factor of all tensors. Two have more negatives than what the losses end at."""


def wave(shape: Sequence[int], k: float) -> Tensor:
    size = torch.Size(shape).numel()
    return torch.sin(torch.arange(size, dtype=torch.float64) * k + k).view(tuple(shape))


def module_of(checkout: Path) -> Any:
    """Returns the module of their model, without that of its encoder."""
    absent = ModuleType("model.modeling_roberta_prompt")
    absent.RobertaModel = nn.Module  # type: ignore[attr-defined]
    sys.modules["model.modeling_roberta_prompt"] = absent
    return load(checkout / SOURCE.script, root=checkout)


def theirs(checkout: Path, scale: float) -> Any:
    """Returns their model, without its encoder, in float64."""
    module = module_of(checkout)
    config = SimpleNamespace(n_latent=HIDDEN, n_prompt=LENGTH, beta=0.2, gamma=0.1)
    model = module.BertDIBPromptRE.__new__(module.BertDIBPromptRE)
    nn.Module.__init__(model)
    model.cfg = config
    model.bert = nn.Module()
    model.bert.embeddings = nn.Module()
    model.bert.embeddings.word_embeddings = nn.Embedding(VOCABULARY, WIDTH)
    prompt = module.InstancePrompt(config, LENGTH, torch.zeros(1, WIDTH))
    model.tune = nn.ModuleDict({"prompt": prompt, "lm": module.VariationalLM(HIDDEN, torch.ones(CLASSES, WIDTH), 1)})
    model = model.double()
    with torch.no_grad():
        for index, each in enumerate(model.parameters()):
            each.copy_(0.5 * scale * wave(each.shape, 0.37 + 0.011 * index))
        model.tune["lm"].log_std.bias[1].sub_(6 * (scale - 1))  # below the least
    return model


def losses(model: Any, texts: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the rows and the three losses, by their weights, as the model's forward has them."""
    ids, mask = torch.tensor(IDS[:texts]), torch.tensor(MASK[:texts])
    lm, words = model.tune["lm"], model.bert.embeddings.word_embeddings(ids).detach()
    without = words[:, 0] * 0.7  # what a first pass made of each text
    rows = model.tune["prompt"](without.detach())
    within = rows.mean(1) @ wave((WIDTH, WIDTH), 0.53) + without
    draws = torch.randn
    torch.randn = lambda shape, **kwargs: wave(shape, 0.47)  # type: ignore[assignment]
    torch.randn_like = lambda like: wave(like.shape, 0.47)  # type: ignore[assignment]
    try:
        _, *first = lm(without)
        _, *second = lm(within)
        found = {
            "head": model.promptHead_loss({"attention_mask": mask, "input_ids": ids}, rows),
            "representation": model.bottleneck_nce(*first, *second, rows),
            "kl": 0.1 * model.vae_loss(*first, *second),
        }
    finally:
        torch.randn = draws
    return rows, found


def numbers(checkout: Path) -> dict[str, Any]:
    """Returns for either case the rows, the losses, tensors by their names, and gradients of each loss; all flat."""
    found: dict[str, Any] = {}
    for name, (texts, scale) in CASES.items():
        model = theirs(checkout, scale)
        tensors = {key: t for key, t in model.named_parameters() if key.startswith("tune") and "head" not in key}
        rows, each = losses(model, texts)
        head = model.tune["lm"].head.head
        gradients = {}
        for kind, loss in each.items():
            values = torch.autograd.grad(loss, [*tensors.values(), head], retain_graph=True, allow_unused=True)
            keys = [*tensors, "head"]
            gradients[kind] = {key: g.flatten().tolist() for key, g in zip(keys, values, strict=True) if g is not None}
        found[name] = {
            "rows": rows.flatten().tolist(),
            "losses": {kind: loss.item() for kind, loss in each.items()},
            "tensors": {key: t.flatten().tolist() for key, t in [*tensors.items(), ("head", head)]},
            "gradients": gradients,
        }
    return found


def start(checkout: Path) -> dict[str, Any]:
    """Returns what large tensors start from, by their names: of networks 12,000 wide in a width of 8, and of those 128
    wide in as much, for a hundred rows."""
    module, found = module_of(checkout), {}
    for case, (width, hidden, length) in {"wide": (8, 12_000, 5), "square": (128, 128, 100)}.items():
        prompt = module.InstancePrompt(SimpleNamespace(n_latent=hidden), length, torch.zeros(1, width))
        tune = nn.ModuleDict({"prompt": prompt, "lm": module.VariationalLM(hidden, torch.ones(CLASSES, width), length)})
        found[case] = {f"tune.{name}": drawn(p) for name, p in tune.named_parameters() if p.numel() >= 12_000}
    return found


def trains(checkout: Path) -> list[str]:
    """Returns the names of what trains, after the statement of their script that says so."""
    script = ast.parse((checkout / "infoprompt.py").read_text(encoding="utf-8"))
    (told,) = (each for each in ast.walk(script) if isinstance(each, ast.For) and "[FROZE]" in ast.unparse(each))
    model = theirs(checkout, 1.0)
    layers = next(each for each in ast.walk(script) if ast.unparse(each).startswith("unfrozen_layers ="))
    exec(compile(ast.Module([layers, told], []), "infoprompt.py", "exec"), {"model": model})  # type: ignore[list-item]
    return sorted(name for name, p in model.named_parameters() if p.requires_grad)


def defaults(checkout: Path) -> dict[str, Any]:
    """Returns the defaults of their options, by the names here."""
    sys.argv = ["run.py"]
    told = load(checkout / "trainers/options.py").parser.parse_args([])
    names = {"length": "n_prompt", "hidden": "n_latent", "head_weight": "gamma", "representation_weight": "beta"}
    return {ours: getattr(told, name) for ours, name in names.items()}
