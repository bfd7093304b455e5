"""What the authors' BERT with projected attention layers computes for two tasks, in float64, all tensors sines;
what they start from, what trains of it, and its options: ``python -m peftcore.testing.freeze pal.py CHECKOUT``."""

import ast
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from peftcore.registry.evidence import Source
from peftcore.testing import drawn
from peftcore.testing.checkouts import load

SOURCE = Source("authors", "AsaCooperStickland/Bert-n-Pals", "9b40f4f", "modeling.py")
VERSIONS = ("torch",)
IDS = [[1, 5, 3, 9, 2], [4, 4, 10, 0, 0]]
MASK = [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
SIZES = {"vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def wave(like: Tensor, k: float) -> Tensor:
    return torch.sin(torch.arange(like.numel(), dtype=torch.float64) * k + k).view(like.shape)


def numbers(checkout: Path) -> dict[str, dict[str, list[float]]]:
    """Returns by task the last states of tokens, ``[2, 5, 8]``, and the gradients of the table of words and of the
    task's own tensors, by their names; flat."""
    module = load(checkout / SOURCE.script, absent=["six"])
    config = module.BertConfig(**SIZES, **DROPOUT, pals=True, mult=True, num_tasks=2, hidden_size_aug=12)
    model = module.BertModel(config).double().train()
    tensors = dict(sorted(model.named_parameters()))
    with torch.no_grad():
        for index, tensor in enumerate(tensors.values()):
            tensor.copy_(0.5 * wave(tensor, 0.3 + 0.37 * index))
    ids, mask = torch.tensor(IDS), torch.tensor(MASK)
    found = {}
    for task in range(2):
        model.zero_grad()
        y = model(ids, attention_mask=mask, i=task)[0][-1]
        y = y * mask[..., None]  # what stands at padding nobody reads
        (y * wave(y, 0.3)).sum().backward()
        own = {name: p.grad for name, p in tensors.items() if f".multi_layers.{task}." in name or "word_emb" in name}
        found[str(task)] = {"y": rounded(y), **{name: rounded(grad) for name, grad in own.items()}}
    return found


def rounded(tensor: Tensor | None) -> list[float]:
    assert tensor is not None
    return [round(each, 10) for each in tensor.flatten().tolist()]


def start(checkout: Path) -> dict[str, Any]:
    """Returns what the tensors of a task are drawn from, between 204 features and 198."""
    module = load(checkout / SOURCE.script, absent=["six"])
    sizes = {**SIZES, "hidden_size": 204, "num_hidden_layers": 1, "hidden_size_aug": 198}
    model = module.BertForMultiTask(module.BertConfig(**sizes, pals=True, mult=True, num_tasks=1), [2])
    (own,) = model.bert.encoder.layer[0].multi_layers
    parts = (own.attn.query, own.attn.key, own.attn.value)
    found = {"down": own.aug_dense.weight, "down_bias": own.aug_dense.bias}
    found |= {"up": own.aug_dense2.weight, "up_bias": own.aug_dense2.bias}
    found |= {"qkv": torch.cat([each.weight for each in parts]), "qkv_bias": torch.cat([each.bias for each in parts])}
    return {name: drawn(each) for name, each in found.items()}


def trains(checkout: Path) -> dict[str, Any]:
    """Returns how many numbers of two tasks train, and which other tensors of the encoder, by their names in
    transformers, where their script is told to freeze."""
    module = load(checkout / SOURCE.script, absent=["six"])
    model = module.BertForMultiTask(
        module.BertConfig(**SIZES, pals=True, mult=True, num_tasks=2, hidden_size_aug=12), [2, 2]
    )
    script = ast.parse((checkout / "run_multi_task.py").read_text())
    (freeze,) = (
        each for each in ast.walk(script) if isinstance(each, ast.If) and ast.unparse(each.test) == "args.freeze"
    )
    exec(compile(ast.Module([freeze], []), "freeze", "exec"), {"args": SimpleNamespace(freeze=True), "model": model})
    trained = {name: each.numel() for name, each in model.bert.named_parameters() if each.requires_grad}
    others = [name for name in trained if "aug" not in name and "mult" not in name]
    return {
        "tasks": sum(trained[name] for name in trained.keys() - {*others}),
        "others": sorted(name.replace("gamma", "weight").replace("beta", "bias") for name in others),
    }


def defaults(checkout: Path) -> dict[str, Any]:
    """Returns the options of their configuration, and the heads that their code writes out."""
    module = load(checkout / SOURCE.script, absent=["six"])
    config = module.BertConfig.from_json_file(checkout / "configs/pals_config.json")
    return {
        "tasks": config.num_tasks,
        "width": config.hidden_size_aug,
        "heads": module.BERTPals(config).attn.num_attention_heads,
        "dropout": config.attention_probs_dropout_prob,
        "init_std": config.initializer_range,
        "up_std": config.initializer_range,
    }
