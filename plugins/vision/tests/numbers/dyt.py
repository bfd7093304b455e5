"""The loss of a training step of DyT's authors with its gradients, and what their ViT says in training and evaluation,
on tensors of sines: ``python -m peftcore.testing.freeze dyt.py CHECKOUT``."""

import importlib
import math
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, patch

import torch
from torch import Tensor

from peftcore.registry.evidence import Source

SOURCE = Source("authors", "NUS-HPC-AI-Lab/Dynamic-Tuning", "d1744f0", "models/vision_transformer_IN21K.py")
VERSIONS = ("torch", "timm")
SIZES: dict[str, Any] = {"img_size": 16, "patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2, "num_classes": 3}
BOTTLENECK, RATE, LABELS = 4, 0.3, torch.tensor([2, 0, 1])


def wave(shape: Sequence[int], key: str) -> Tensor:
    """Sines around 0, of norms' gains around 1."""
    around = 1.0 if "norm" in key and key.endswith("weight") else 0.0
    steps = torch.arange(math.prod(shape), dtype=torch.float64) * 1.7 + zlib.crc32(key.encode()) % 97
    return around + 0.5 * torch.sin(steps).view(*shape)


def images() -> Tensor:
    return wave((len(LABELS), 3, 16, 16), "images")


def drawing() -> Callable[[Tensor], Tensor]:
    """What stands for draws of an exponential distribution: other positive numbers at each call."""
    count = iter(range(1000))

    def exponential(tensor: Tensor) -> Tensor:
        return tensor.copy_((2.5 * wave(tensor.shape, f"draw {next(count)}")).exp())

    return exponential


def imported(checkout: Path) -> tuple[Any, Any, Any]:
    """The modules of the model, of the loss and of the training step; what they import for data and logs is not."""
    for name in ("misc", "util", "util.metrics", "util.lr_sched", "block_flops_dict", "numpy.lib.arraysetops"):
        sys.modules[name] = MagicMock()
    sys.path.insert(0, str(checkout))
    names = ("models.vision_transformer_IN21K", "models.losses", "engine_finetune")
    model, losses, engine = (importlib.import_module(name) for name in names)
    return model, losses, engine


class Batches:
    """What stands for their logger: it gives the batches."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.meters: dict[str, Any] = {}

    def log_every(self, batches: list[Any], *args: Any) -> Iterator[Any]:
        yield from batches

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


def numbers(checkout: Path) -> dict[str, Any]:
    """Returns the loss, the logits and the shares of open gates of both modes, and the gradients of what trains."""
    module, losses, engine = imported(checkout)
    adapter = {"ffn_num": BOTTLENECK, "ffn_adapter_init_option": "lora", "ffn_adapter_scalar": "0.1", "d_model": 8}
    model: Any = module.VisionTransformer(
        **SIZES,
        tuning_config=SimpleNamespace(**adapter, ffn_adapter_layernorm_option="none"),
        select_config=SimpleNamespace(open=True, keep_layers=0),
    ).double()
    for block in model.blocks:
        block.adaptmlp.dropout = 0.0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(wave(parameter.shape, name))
    weights = {"token_target_ratio": RATE, "token_loss_ratio": 2.0, "token_minimal": 0.0, "token_minimal_weight": 0.0}
    criterion, steps = losses.AdaLoss(torch.nn.CrossEntropyLoss(), **weights), []
    engine.misc.MetricLogger = Batches

    def step(loss: Tensor, *args: Any, **kwargs: Any) -> None:
        steps.append(loss.item())
        loss.backward()

    engine.misc.MetricLogger = Batches
    given = (MagicMock(param_groups=[{"lr": 0.0}]), torch.device("cpu"), 0, step)
    with patch.object(torch.Tensor, "exponential_", drawing()), patch.object(torch.cuda, "synchronize"):
        engine.train_one_epoch(model, criterion, [(images(), LABELS)], *given, args=SimpleNamespace(accum_iter=1))
    found: dict[str, Any] = {"loss": steps[0]}
    for name, parameter in model.named_parameters():
        if "adaptmlp" in name or "mlp_token_select" in name:
            found[name] = parameter.grad.flatten().tolist()
    with torch.no_grad(), patch.object(torch.Tensor, "exponential_", drawing()):
        for mode in ("train", "eval"):
            logits, selected = model.train(mode == "train")(images())
            found[mode] = logits.tolist()
            found[f"{mode} share"] = selected["token_select"].mean().item()
    return found
