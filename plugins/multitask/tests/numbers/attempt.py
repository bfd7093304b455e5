"""The prompts that ATTEMPT's authors mix for two texts of two tasks, with gradients, on tensors of sines: their encoder
without its blocks; which source their target prompts start as, and what their network does; which tensors their script
trains, and its options:
``python -m peftcore.testing.freeze attempt.py CHECKOUT``."""

import ast
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor, nn

from peftcore.registry.evidence import Source
from peftcore.testing import drawn

SOURCE = Source("authors", "AkariAsai/ATTEMPT", "b5121e5", "attempt/third_party/models/t5/modeling_t5.py")
VERSIONS = ("torch",)
WIDTH, LENGTH, SOURCES = 6, 3, 2
IDS, TASKS = [[5, 1, 3, 8], [2, 9, 4, 0]], [1, 0]


def wave(*shape: int, step: float) -> Tensor:
    return (torch.arange(math.prod(shape), dtype=torch.float64) * step + step).sin().view(shape)


class Base(nn.Module):
    """What their encoder needs of the base class of transformers."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    init_weights = get_extended_attention_mask = get_head_mask = lambda self, *args: None


def stack(path: Path) -> Any:
    """Returns the class of their encoder; its file imports what transformers no longer has."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [each for each in tree.body if getattr(each, "name", "") == "T5Stack"]
    found: dict[str, Any] = {
        "torch": torch,
        "nn": nn,
        "F": nn.functional,
        "T5PreTrainedModel": Base,
        "T5LayerNorm": lambda width, eps: nn.Identity(),
        "add_start_docstrings": lambda text: lambda function: function,
        "PARALLELIZE_DOCSTRING": "",
        "DEPARALLELIZE_DOCSTRING": "",
        "logger": MagicMock(),
    }
    exec(compile(tree, str(path), "exec"), found)  # code of a checkout that whoever runs this has chosen
    return found["T5Stack"]


def trained(checkout: Path, encoder: nn.Module, prompts: nn.Parameter) -> list[str]:
    """Returns the names of what trains after their function that freezes parameters."""
    path = checkout / "attempt/utils/utils.py"
    names = "freeze_params", "freeze_model_params"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [each for each in tree.body if isinstance(each, ast.FunctionDef) and each.name in names]
    found: dict[str, Any] = {"nn": nn}
    exec(compile(tree, str(path), "exec"), found)
    model = nn.Module()
    model.encoder, model.prefix_shared = encoder, prompts
    others = dict.fromkeys(("train_task_adapters", "unfreeze_lm_head", "unfreeze_layer_norms", "bitfit"), False)
    told = SimpleNamespace(attn_prefix=True, attn_method="sub", ignore_target=False, fix_attention=False)
    found["freeze_model_params"](model, SimpleNamespace(prefix_tuning=True, **others), told)
    return sorted({name for name, each in model.named_parameters() if each.requires_grad})


def started(checkout: Path, shared: bool) -> int:
    """Returns the number of the source that their script gives to the prompt of the task, or of all of several."""
    path = checkout / "attempt/run_seq2seq.py"
    (load,) = (
        node
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.If) and ast.unparse(node.test) == "model_args.load_prefix_embeddings is True"
    )
    model, files = MagicMock(), [str(number) for number in range(3)]
    told = SimpleNamespace(
        load_prefix_embeddings=True,
        prompt_embedding_path=files,
        target_prompt_embedding_path=None,
        attn_prefix_tuning=True,
        multi_task=False,
        shared_attn=shared,
    )
    training, loads = SimpleNamespace(do_train=True), SimpleNamespace(load=int)
    around = {"model": model, "model_args": told, "training_args": training, "torch": loads, "config": MagicMock()}
    exec(compile(ast.Module([load], []), str(path), "exec"), around)
    call = model.update_prefix_weights_multi if shared else model.update_prefix_weights_single
    return int(call.call_args.args[0])


def encoder(checkout: Path, width: int, prompts: Any, sources: Any, table: nn.Module) -> Any:
    sizes = {"d_model": width, "num_layers": 0, "layer_norm_epsilon": 1e-6, "dropout_rate": 0.0}
    told = {"is_decoder": False, "prefix_tuning": True, "use_cache": False, "use_return_dict": False}
    config = SimpleNamespace(**sizes, **told, output_attentions=False, output_hidden_states=False)
    return stack(checkout / SOURCE.script)(
        config, table, MagicMock(prefix_dim=LENGTH), prompts, True, sources, width, "sub", True, temperature=1.5
    )


def numbers(checkout: Path) -> dict[str, Any]:
    """Returns the rows of the texts and the gradients of all tensors, flat."""
    prompts = nn.Parameter(wave(2, LENGTH, WIDTH, step=0.41))
    sources = nn.Parameter(wave(SOURCES, LENGTH, WIDTH, step=0.53))
    table = nn.Embedding.from_pretrained(wave(10, WIDTH, step=0.29), freeze=False)
    model = encoder(checkout, WIDTH, prompts, sources, table).double()
    down, up, norm = model.attn_W_down.weight, model.attn_W_up.weight, model.layer_norm
    with torch.no_grad():
        down.copy_(wave(100, WIDTH, step=0.37))
        up.copy_(wave(WIDTH, 100, step=0.31))
        norm.weight.copy_(1 + 0.3 * wave(WIDTH, step=0.7))
        norm.bias.copy_(0.3 * wave(WIDTH, step=0.9))
    (states,) = model(torch.tensor(IDS), task_ids=torch.tensor(TASKS))
    rows = states[:, :LENGTH]
    (rows * wave(2, LENGTH, WIDTH, step=0.23)).sum().backward()
    tensors = {"prompts": prompts, "sources": sources, "down": down, "up": up, "weight": norm.weight, "bias": norm.bias}
    found = {"rows": rows, "embeddings": table.weight.grad, **{name: each.grad for name, each in tensors.items()}}
    return {name: each.flatten().tolist() for name, each in found.items()}


def start(checkout: Path) -> dict[str, Any]:
    """Returns the number of the source that the prompt of the only task starts as, and those of several tasks; and what
    the network is drawn from, at a width of 400."""
    model = encoder(checkout, 400, None, None, nn.Embedding(2, 400))
    sources = [started(checkout, shared) for shared in (False, True)]
    return {"source": sources, "down": drawn(model.attn_W_down.weight), "up": drawn(model.attn_W_up.weight)}


def trains(checkout: Path) -> list[str]:
    """Returns the names of their tensors that train."""
    prompts = nn.Parameter(torch.zeros(LENGTH, WIDTH))
    sources = nn.Parameter(torch.zeros(SOURCES, LENGTH, WIDTH))
    return trained(checkout, encoder(checkout, WIDTH, prompts, sources, nn.Embedding(2, WIDTH)), prompts)


def defaults(checkout: Path) -> dict[str, Any]:
    """Returns the options of their configuration for one task, and those that their code writes out."""
    told = json.loads((checkout / "attempt/configs/attempt/sinlge_task.json").read_text())
    model = encoder(checkout, WIDTH, None, None, nn.Embedding(2, WIDTH))
    return {
        "tasks": len(told["task_name"]),
        "parts": [{"method": "prompt_tuning", "length": told["prefix_dim"]}] * told["prefix_num"],
        "temperature": told["temperature"],
        "hidden": model.attn_W_down.out_features,
        "train_parts": any("mul_prefix_emb" in name for name in trains(checkout)),
        "train_norm": any("layer_norm" in name for name in trains(checkout)),
    }
