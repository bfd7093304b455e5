"""How SAPT's authors share their LoRAs among two texts, with the loss of replayed texts and gradients, on tensors of
sines: their stack without its blocks; what it starts from, what trains, and their options:
``python -m peftcore.testing.freeze sapt.py CHECKOUT``."""

import ast
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor, nn
from transformers import LlamaConfig

from peftcore.registry.evidence import Source
from peftcore.testing import drawn

SOURCE = Source("authors", "circle-hit/SAPT", "52a52b9", "src/llama_prompt.py")
VERSIONS = ("torch", "transformers")
WIDTH, HIDDEN, TASKS, RANK = 8, 5, 3, 2
IDS, REPLAYED = [[5, 1, 3, 8], [2, 9, 4, 6]], [[7, 7, 2, 0], [3, 5, 5, 8]]
TOLD = [0.0, 0.3, 0.7]  # the newest task first


class Base(nn.Module):
    """What their stack needs of the base class of transformers, and their blocks."""

    def __init__(self, config: Any, *others: Any) -> None:
        super().__init__()
        self.config = config

    post_init = lambda self: None  # noqa: E731


def wave(*shape: int, step: float) -> Tensor:
    return (torch.arange(math.prod(shape), dtype=torch.float64) * step + step).sin().view(shape)


def parts(path: Path, names: set[str], known: dict[str, Any]) -> dict[str, Any]:
    """Returns classes and functions of a file, also inner ones; the file imports what transformers no longer has."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for each in ast.walk(tree):
        if isinstance(each, ast.FunctionDef | ast.ClassDef):
            each.decorator_list = []
    tree.body = [each for each in ast.walk(tree) if getattr(each, "name", "") in names]  # type: ignore[misc]
    exec(compile(tree, str(path), "exec"), known)  # code of a checkout that whoever runs this has chosen
    return known


def code(checkout: Path, *names: str) -> dict[str, Any]:
    head = SimpleNamespace(num_heads=2, head_dim=4)
    known: dict[str, Any] = {"torch": torch, "nn": nn, "math": math, "bsz": 2, "self": head}
    known |= {"LlamaPreTrainedModel": Base, "LlamaDecoderLayer": Base, "LlamaRMSNorm": MagicMock(), "List": list}
    known |= {name: MagicMock() for name in ("LlamaConfig", "Optional", "Union", "Tuple", "BaseModelOutputWithPast")}
    return parts(checkout / SOURCE.script, {*names}, known)


def stack(theirs: dict[str, Any], width: int = WIDTH, hidden: int = HIDDEN) -> Any:
    config = SimpleNamespace(pad_token_id=None, vocab_size=10, hidden_size=width, num_hidden_layers=0, rms_norm_eps=1)
    told = {"run_single": False, "trans_hidden_dim": hidden, "attn_temperature": 1, "previous_prompt_key_path": None}
    return theirs["LlamaModel"](config, told)


def numbers(checkout: Path) -> dict[str, list[float]]:
    """Returns shares, the loss, what is added to the outputs of one matrix, and gradients, flat."""
    theirs = code(checkout, "LlamaModel", "LoRALayer", "agg_lora_states", "memory_replay")
    model = stack(theirs).double()
    own, *former = (theirs["LoRALayer"](WIDTH, WIDTH, RANK, lora_alpha=32).double() for _ in range(TASKS))
    down, up, _, norm = model.trans_input
    model.previous_prompts_keys = nn.Parameter(wave(TASKS - 1, WIDTH, step=0.43), requires_grad=False)
    tensors = {"words": model.embed_tokens.weight, "key": model.prompt_key, "down": down.weight, "up": up.weight}
    tensors |= {"weight": norm.weight, "bias": norm.bias, "A": own.lora_A, "B": own.lora_B}
    with torch.no_grad():
        for index, each in enumerate(tensors.values()):
            each.copy_(wave(*each.shape, step=0.29 + 0.04 * index))
        for index, each in enumerate(former):
            each.lora_A.copy_(wave(RANK, WIDTH, step=0.67 + 0.04 * index))
            each.lora_B.copy_(wave(WIDTH, RANK, step=0.81 + 0.04 * index))
    x = wave(2, 3, WIDTH, step=0.37).requires_grad_()
    keys = torch.cat([model.prompt_key.repeat(2, 1, 1), model.previous_prompts_keys.repeat(2, 1, 1)], 1)
    shares = model.cal_attention(keys, model.embed_tokens(torch.tensor(IDS)))
    added = theirs["agg_lora_states"](x, own, former, shares)
    replayed = theirs["memory_replay"](
        SimpleNamespace(model=model), torch.tensor(REPLAYED), torch.tensor(TOLD, dtype=torch.float64)
    )
    ((added * wave(*added.shape, step=0.23)).sum() + replayed).backward()
    found = {"shares": shares, "added": added, "loss": replayed, "x": x.grad}
    found |= {f"d {name}": each.grad for name, each in tensors.items()}
    return {name: each.flatten().tolist() for name, each in found.items()}


def start(checkout: Path) -> dict[str, Any]:
    """Returns what a key of width 40,000 is drawn from, the network between 400 features and 100, a LoRA of rank 20.
    The version of transformers that they name calls `_init_weights` for what a checkpoint lacks, so for the network."""
    theirs = code(checkout, "LlamaModel", "LoRALayer", "_init_weights")
    model, lora = stack(theirs, 400, 100), theirs["LoRALayer"](2000, 4, 20)
    loaded = SimpleNamespace(config=SimpleNamespace(initializer_range=LlamaConfig().initializer_range))
    for each in model.trans_input:
        theirs["_init_weights"](loaded, each)
    down, up, _, norm = model.trans_input
    found = {"key": stack(theirs, 40_000, 1).prompt_key, "down": down.weight, "up": up.weight, "A": lora.lora_A}
    found |= {"weight": norm.weight, "bias": norm.bias, "B": lora.lora_B}
    return {name: drawn(each) for name, each in found.items()}


def trains(checkout: Path) -> dict[str, int]:
    """Returns how many numbers train for the last of three tasks, with two matrices, by our names."""
    theirs, block, model = code(checkout, "LlamaModel", "LoRALayer"), nn.Module(), nn.Module()
    for kind in "qv":
        own, *former = (theirs["LoRALayer"](WIDTH, WIDTH, RANK) for _ in range(TASKS))
        setattr(block, f"lora_{kind}", own)
        setattr(block, f"previous_lora_weights_{kind}", nn.ModuleList(former))
    model.model, model.self_attn = stack(theirs), block
    model.model.previous_prompts_keys = nn.Parameter(torch.zeros(TASKS - 1, WIDTH))
    script = ast.parse((checkout / "src/run_llama.py").read_text())
    (loop,) = (
        each
        for each in ast.walk(script)
        if isinstance(each, ast.For) and any("param.requires_grad = False" in ast.unparse(line) for line in each.body)
    )
    exec(compile(ast.Module([loop], []), "freeze", "exec"), {"model": model})
    found = dict.fromkeys(("A", "B", "keys", "network"), 0)
    kinds = {"lora_A": "A", "lora_B": "B", "prompt_key": "keys"}
    for name, each in model.named_parameters():
        if each.requires_grad:
            found[kinds.get(name.rpartition(".")[2], "network")] += each.numel()
    return found


def defaults(checkout: Path) -> dict[str, Any]:
    """Returns the options of the script that writes their commands for Llama."""
    told = {
        ast.unparse(each.targets[0]): each.value.value
        for each in ast.parse((checkout / "gen_script_superni_llama.py").read_text()).body
        if isinstance(each, ast.Assign) and isinstance(each.value, ast.Constant)
    }
    names = {"rank": "lora_r", "alpha": "lora_alpha", "hidden": "trans_hidden_dim", "replay": "kl_ratio"}
    return {ours: told[name] for ours, name in names.items()}
