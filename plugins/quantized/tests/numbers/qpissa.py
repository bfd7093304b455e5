"""How QPiSSA's authors take a weight apart, with NF4 of bitsandbytes, what the factors start from, what trains of a
small Llama, and the defaults of their script:
``python -m peftcore.testing.freeze qpissa.py CHECKOUT``."""

import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, patch

import peft
import torch
import transformers

from peftcore.registry.evidence import Source
from peftcore.testing.checkouts import load

SOURCE = Source("authors", "GraphPKU/PiSSA", "87f4db6", "utils/init_qpissa.py")
VERSIONS = ("torch", "bitsandbytes", "transformers", "peft")
SHARED = Path(__file__).parents[4] / "tests" / "side_by_side" / "beside_packed.py"


def initialized(checkout: Path, output: str) -> Any:
    """Returns the module of their script, which it runs on a small Llama at rank 2."""
    sys.argv = ["init_qpissa.py", "--base_model_dir=none", f"--output_path={output}", "--rank=2", "--device=cpu"]
    sys.argv += ["--target_modules", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    sys.modules.pop("init_qpissa", None)  # it runs anew
    with (
        patch.object(transformers.AutoModelForCausalLM, "from_pretrained", lambda *args, **kwargs: llama()),
        patch.object(transformers.AutoTokenizer, "from_pretrained", MagicMock()),
    ):
        return load(checkout / SOURCE.script)


def llama() -> Any:
    sizes: Any = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12, "vocab_size": 9}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(hidden_size=8, **sizes))


def numbers(checkout: Path) -> dict[str, Any]:
    """Returns, by the iterations, a corner of the factors' product and of all that the layer holds then, ``[2, 6]``
    each, and how far the latter is from the weight."""
    weight, found = load(SHARED).host()[0][0].weight, {}
    with tempfile.TemporaryDirectory() as output:
        module = initialized(checkout, output)
    for iterations in (1, 5):
        _, base, A, B = module.pissa_quant(weight, 3, iterations)
        product, distance = B @ A, torch.linalg.norm(weight - base - B @ A).item()
        whole = base + product
        parts = {"product": product[:2, :6].tolist(), "weight": whole[:2, :6].tolist(), "distance": distance}
        found[str(iterations)] = parts
    return found


@torch.no_grad()
def start(checkout: Path) -> dict[str, Any]:
    """Returns the factors after one iteration, of 4 outputs and 6 inputs."""
    with tempfile.TemporaryDirectory() as output:
        module = initialized(checkout, output)
    _, _, A, B = module.pissa_quant(load(SHARED).host()[0][0].weight, 3, 1)
    return {"A": A[:, :6].tolist(), "B": B[:4].tolist()}


def trains(checkout: Path) -> dict[str, int]:
    """Returns what trains of what their script has written, loaded as their train.py does, by name: how many
    numbers."""
    with tempfile.TemporaryDirectory() as output:
        initialized(checkout, output)
        model = peft.PeftModel.from_pretrained(llama(), output, subfolder="pissa_init", is_trainable=True)
    named = ((name.removeprefix("base_model.model."), each) for name, each in model.named_parameters())
    return {name: each.numel() for name, each in named if each.requires_grad}


def defaults(checkout: Path) -> dict[str, Any]:
    """Returns the defaults of their script, in which the scale's numerator is the rank."""
    with tempfile.TemporaryDirectory() as output:
        module = initialized(checkout, output)
    told = {name: module.parser.get_default(name) for name in ("rank", "iter")}
    assert module.lora_config.lora_alpha == module.lora_config.r
    return {"rank": told["rank"], "alpha": told["rank"], "iterations": told["iter"]}
