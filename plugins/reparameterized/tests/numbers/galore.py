"""What the AdamW of GaLore's authors makes of three matrices in eight steps, on tensors that look random; what their
script trains in which way; and the options of their page:
``python -m peftcore.testing.freeze galore.py CHECKOUT``. (At this commit it is `galore_torch` 1.0.)

Both sides at once are left out: off the diagonal that gradient is zero but for rounding, which Adam blows up to full
steps.
"""

import ast
import math
import re
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from peftcore.registry.evidence import Source

SOURCE = Source("authors", "jiaweizzhao/GaLore", "33f2c4f", "galore_torch/adamw.py")
VERSIONS = ("torch", "transformers")
SHAPES = ((20, 12), (9, 20), (9, 9))
SIZES: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}


def wave(shape: tuple[int, ...], seed: int) -> Tensor:
    steps = torch.arange(1.0, math.prod(shape) + 1, dtype=torch.float64)
    return torch.sin(steps**1.5 * (0.37 + 0.11 * seed)).view(shape).float()


def numbers(checkout: Path) -> dict[str, list[list[float]]]:
    """Returns every fifth entry of the three weights, by the side that is projected."""
    sys.path.insert(0, str(checkout))
    from galore_torch.adamw import AdamW

    found = {}
    for side in ("std", "reverse_std", "left", "right"):
        weights = [torch.nn.Parameter(wave(shape, 10 + index)) for index, shape in enumerate(SHAPES)]
        group = {"params": weights, "rank": 4, "update_proj_gap": 3, "scale": 0.25, "proj_type": side}
        optimizer = AdamW([group], lr=0.05, eps=1e-12, weight_decay=0.1, no_deprecation_warning=True)
        for step in range(8):
            for index, weight in enumerate(weights):
                weight.grad = wave(SHAPES[index], step + index)
            optimizer.step()
        found[side] = [[round(each, 7) for each in weight.flatten()[::5].tolist()] for weight in weights]
    return found


def trains(checkout: Path) -> dict[str, list[str]]:
    """Returns the names of what the lines of their script give to the optimizer, of a small Llama: in low rank, and
    otherwise."""
    text, model = (checkout / "torchrun_main.py").read_text(), LlamaForCausalLM(LlamaConfig(vocab_size=9, **SIZES))
    lines = text[
        text.index("    if 'galore' in args.optimizer") : text.index("    # print params and trainable params")
    ]
    told = SimpleNamespace(optimizer="galore_adamw", rank=2, update_proj_gap=2, galore_scale=1.0, proj_type="std")
    space: dict[str, Any] = {"args": told, "model": model, "nn": torch.nn, "print": lambda *args: None}
    exec(compile(textwrap.dedent(lines), "torchrun_main.py", "exec"), space)
    name = {parameter: name for name, parameter in model.named_parameters()}
    regular, projected = ([name[each] for each in group["params"]] for group in space["param_groups"])
    return {"projected": projected, "regular": regular}


def defaults(checkout: Path) -> dict[str, Any]:
    """Returns the options of the first example on their page."""
    text = re.search(r"'rank':[^}]*", (checkout / "README.md").read_text())
    assert text
    found = ast.literal_eval(f"{{{text[0]}}}")
    names = {"rank": "rank", "gap": "update_proj_gap", "scale": "scale", "side": "proj_type"}
    return {ours: found[theirs] for ours, theirs in names.items()}
