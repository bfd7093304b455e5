"""The loss of a training step of DyT's authors with its gradients, and what their ViT says in training and evaluation,
on tensors of sines, what their blocks start from, what trains, and its options:
``python -m peftcore.testing.freeze dyt.py CHECKOUT``."""

import importlib
import math
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, patch

import timm
import torch
from torch import Tensor

from peftcore.registry.evidence import Source
from peftcore.testing import drawn

SOURCE = Source("authors", "NUS-HPC-AI-Lab/Dynamic-Tuning", "d1744f0", "models/vision_transformer_IN21K.py")
VERSIONS = ("torch", "timm")
SIZES: dict[str, Any] = {"img_size": 16, "patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2, "num_classes": 3}
MANY: dict[str, Any] = {**SIZES, "embed_dim": 400, "depth": 40, "mlp_ratio": 0.1}
"""Blocks with 16,000 numbers of dispatchers, and 40,000 and more of bottlenecks."""
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


def transformer(module: Any, sizes: dict[str, Any], adapter: dict[str, Any]) -> Any:
    return module.VisionTransformer(
        **sizes,
        tuning_config=SimpleNamespace(**adapter, ffn_adapter_layernorm_option="none"),
        select_config=SimpleNamespace(open=True, keep_layers=0),
    )


def numbers(checkout: Path) -> dict[str, Any]:
    """Returns the loss, the logits and the shares of open gates of both modes, and the gradients of what trains."""
    module, losses, engine = imported(checkout)
    adapter = {"ffn_num": BOTTLENECK, "ffn_adapter_init_option": "lora", "ffn_adapter_scalar": "0.1", "d_model": 8}
    model: Any = transformer(module, SIZES, adapter).double()
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


def start(checkout: Path) -> dict[str, Any]:
    """Returns what the dispatchers and bottlenecks of many blocks start from, taken together."""
    module, width = imported(checkout)[0], MANY["embed_dim"]
    adapter = {"ffn_num": 4, "ffn_adapter_init_option": "lora", "ffn_adapter_scalar": "0.1", "d_model": width}
    parts: dict[str, list[Tensor]] = {}
    for name, parameter in transformer(module, MANY, adapter).named_parameters():
        if "adaptmlp" in name or "mlp_token_select" in name:
            parts.setdefault(name.split(".", 2)[2], []).append(parameter.flatten())
    return {name: drawn(torch.cat(each)) for name, each in parts.items()}


class Made(Exception):
    """The criterion was made."""


def command(checkout: Path) -> tuple[Any, dict[str, Any], Any, set[int]]:
    """Returns what a command with no options makes: its options, those of its criterion, the model, and what the
    optimizer is given, by identity. The pretrained model is as wide as theirs, and has one block."""
    module, _, _ = imported(checkout)
    names = ("configs", "util.pos_embed", "util.logger", "datasets", "datasets.image_datasets", "easydict")
    stand_ins = {name: MagicMock() for name in (*names, "torch.utils.tensorboard", "timm.models.layers")}
    stand_ins["easydict"].EasyDict = SimpleNamespace
    with patch.dict(sys.modules, stand_ins):
        main = importlib.import_module("main_image")
    told = main.get_args_parser().parse_args(["--finetune", "VIT_BASE_IN21K", "--device", "cpu"])
    told.pretrain_ckpts, told.distributed = {"VIT_BASE_IN21K": "file"}, False
    main.misc.get_world_size, main.misc.get_rank = lambda: 1, lambda: 0
    main.build_image_dataset = lambda args: ([], [], SIZES["num_classes"], "accuracy")
    sizes, models = {**SIZES, "embed_dim": 768, "depth": 1, "mlp_ratio": 0.1, "qkv_bias": True}, []

    def build(**options: Any) -> Any:
        models.append(module.VisionTransformer(**{**sizes, **options}))
        return models[-1]

    main.vit_base_patch16_224_in21k = build
    with (
        patch("os.makedirs"),
        patch.object(torch, "load", lambda *args, **kwargs: timm.models.VisionTransformer(**sizes).state_dict()),
        patch("torch.utils.data.DataLoader"),
        patch("torch.utils.data.DistributedSampler"),
        patch("torch.optim.AdamW") as optimizer,
        patch.object(main, "AdaLoss", side_effect=Made) as criterion,
        suppress(Made),
    ):
        main.main(told)
    return told, criterion.call_args.kwargs, models[0], {id(each) for each in optimizer.call_args.args[0]}


def trains(checkout: Path) -> dict[str, int]:
    """Returns the sizes of what trains in a transformer of one block, by name."""
    *_, model, given = command(checkout)
    return {name: each.numel() for name, each in model.named_parameters() if id(each) in given}


def defaults(checkout: Path) -> dict[str, Any]:
    """Returns the options of a command that names none, and what a dispatcher has by default."""
    told, weights, model, _ = command(checkout)
    (block,) = model.blocks
    adapter, dispatcher = block.adaptmlp, block.mlp_token_select
    found = {"bottleneck": told.ffn_num, "scale": adapter.scale, "dropout": adapter.dropout}
    found |= {"rate": weights["token_target_ratio"], "rate_weight": weights["token_loss_ratio"]}
    return {**found, "temperature": dispatcher.tau, "threshold": dispatcher.threshold}
