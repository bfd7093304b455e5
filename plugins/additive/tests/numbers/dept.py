"""The logits that DePT's authors' fork of peft gives for a T5, and gradients, on tensors of sines:
``python -m peftcore.testing.freeze dept.py CHECKOUT``."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from peftcore.registry.evidence import Source
from peftcore.testing import drawn
from peftcore.testing.checkouts import flags, load
from peftcore.testing.hosts import HOSTS

SOURCE = Source("authors", "ZhengxiangShi/DePT", "f0266a7", "peft/peft_model.py")
VERSIONS = ("torch", "transformers")
LENGTH, RANK, TOKENS = 3, 2, 5
IDS, MASK, LABELS = [[7, 9, 4, 2, 3], [5, 8, 1, 0, 0]], [[1] * 5, [1, 1, 1, 0, 0]], [[4, 6, 1], [9, 1, 3]]


def wave(shape: tuple[int, ...], k: float) -> Tensor:
    size = torch.Size(shape).numel()
    return torch.sin(torch.arange(size, dtype=torch.float64) * k + k).view(shape)


def host() -> Any:
    """Returns the kit's T5, filled with sines."""
    model: Any = HOSTS["t5"].build()[0].double().eval().requires_grad_(False)
    with torch.no_grad():
        for index, each in enumerate(model.parameters()):
            each.copy_(0.3 * wave(tuple(each.shape), 0.37 + 0.011 * index))
    return model


def adapted(checkout: Path, rank: int = RANK, tokens: int = TOKENS) -> Any:
    """Returns the T5 with their adapter."""
    sys.modules["pkg_resources"] = SimpleNamespace(get_distribution=lambda name: SimpleNamespace(version="0.0.0"))  # type: ignore
    peft = load(checkout / SOURCE.script, root=checkout)
    tuner = load(checkout / "peft/tuners/prompt_tuning_lora.py", root=checkout)
    sizes = {"r": rank, "max_length": tokens, "num_virtual_tokens": LENGTH, "token_dim": 16, "num_layers": 2}
    config = tuner.PromptTuningLoRAConfig(
        task_type="SEQ_2_SEQ_LM", **sizes, num_attention_heads=2, num_transformer_submodules=1
    )
    base = host()
    base._prepare_encoder_decoder_kwargs_for_generation = None  # since gone, and asked for
    base.config.decoder_start_token_id = base.config.pad_token_id = 0
    return peft.PeftModelForSeq2SeqLM(base, config).double().eval()


def numbers(checkout: Path) -> dict[str, list[float]]:
    """Returns the logits ``[2, 3, vocabulary]`` flat, the loss, and the gradients of the prompt and of both factors."""
    model = adapted(checkout)
    encoder = model.prompt_encoder["default"]
    tensors = {"prompt": encoder.embedding.weight, "A": encoder.lora_embedding_A, "B": encoder.lora_embedding_B}
    with torch.no_grad():
        for index, each in enumerate(tensors.values()):
            each.copy_(0.5 * wave(tuple(each.shape), 0.41 + 0.13 * index))
    output = model(torch.tensor(IDS), torch.tensor(MASK), labels=torch.tensor(LABELS))
    output.loss.backward()
    found = {"logits": output.logits.flatten().tolist(), "loss": [output.loss.item()]}
    return found | {name: each.grad.flatten().tolist() for name, each in tensors.items()}


def start(checkout: Path) -> dict[str, Any]:
    """Returns what A, of rank 45 and 1,000 tokens, and B are drawn from."""
    encoder = adapted(checkout, 45, 1000).prompt_encoder["default"]
    return {"A": drawn(encoder.lora_embedding_A), "B": drawn(encoder.lora_embedding_B)}


def trains(checkout: Path) -> dict[str, int]:
    """Returns how many numbers train, by name."""
    return {name: each.numel() for name, each in adapted(checkout).named_parameters() if each.requires_grad}


def defaults(checkout: Path) -> dict[str, Any]:
    """Returns the sizes of the command in their README, and the scale's numerator, which it leaves to their code."""
    adapted(checkout)  # for the packages that it imports
    told = flags((checkout / "README.md").read_text())
    names = {"length": "prefix_length", "rank": "r", "max_length": "max_seq_length"}
    alpha = load(checkout / "peft/tuners/prompt_tuning_lora.py", root=checkout).PromptTuningLoRAConfig.lora_alpha
    return {**{ours: told[name] for ours, name in names.items()}, "alpha": alpha}
