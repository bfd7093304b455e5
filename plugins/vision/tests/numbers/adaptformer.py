"""What the adapter of AdaptFormer's authors adds to tokens, on tensors of sines, what it starts from and trains:
``python -m peftcore.testing.freeze adaptformer.py CHECKOUT``."""

import ast
import importlib.util
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from peftcore.registry.evidence import Source
from peftcore.testing import drawn
from peftcore.testing.checkouts import load

SOURCE = Source("authors", "ShoufaChen/AdaptFormer", "6967d67", "models/adapter.py")
VERSIONS = ("torch", "timm")
STEPS = {"down_proj.weight": 1.1, "down_proj.bias": 1.3, "up_proj.weight": 1.7, "up_proj.bias": 1.9}
STEPS |= {"adapter_layer_norm_before.weight": 2.3, "adapter_layer_norm_before.bias": 2.9}


def wave(*shape: int, step: float) -> Tensor:
    return 0.3 * torch.sin(step * torch.arange(1, math.prod(shape) + 1, dtype=torch.float64)).view(shape)


@torch.no_grad()
def numbers(checkout: Path) -> dict[str, list[list[float]]]:
    """Returns what is added to two tokens of width 6, ``[2, 6]``, by the place of the norm."""
    spec = importlib.util.spec_from_file_location("authors", checkout / SOURCE.script)
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = {}
    for place in ("none", "in", "out"):
        adapter = module.Adapter(
            d_model=6, bottleneck=4, init_option="lora", adapter_scalar="0.1", adapter_layernorm_option=place
        ).double()
        for name, parameter in adapter.named_parameters():
            parameter.copy_(wave(*parameter.shape, step=STEPS[name]) + (name == "adapter_layer_norm_before.weight"))
        found[place] = adapter(5 * wave(1, 2, 6, step=2.1), add_residual=False)[0].tolist()
    return found


def run_statements(file: Path, kind: type[ast.stmt], holding: str, **names: Any) -> dict[str, Any]:
    """Runs the statements of one kind that hold some text, wherever they stand in a file; returns the names then."""
    found = [each for each in ast.walk(ast.parse(file.read_text())) if isinstance(each, kind)]
    found = [each for each in found if holding in ast.unparse(each)]
    assert found, f"{file}: no {kind.__name__} holds {holding}"
    exec(compile(ast.Module(found, []), str(file), "exec"), names)  # code that whoever runs this has chosen
    return names


def tuning(checkout: Path) -> SimpleNamespace:
    """Returns the options of the authors' script for images where it is told to adapt feed-forwards and no more."""
    absent = ["easydict", "torch.utils.tensorboard", "util.misc", "util.pos_embed", "datasets.image_datasets"]
    module = load(checkout / "main_image.py", absent=[*absent, "util", "datasets", "engine_finetune"])
    args = module.get_args_parser().parse_args(["--ffn_adapt"])
    file = checkout / "main_image.py"
    found = run_statements(file, ast.Assign, "tuning_config = ", EasyDict=SimpleNamespace, args=args)
    config: SimpleNamespace = found["tuning_config"]
    return config


def transformer(checkout: Path, width: int, depth: int) -> Any:
    """Returns their vision transformer."""
    config = tuning(checkout)
    config.d_model = width
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": width, "depth": depth, "num_heads": 2, "num_classes": 5}
    return load(checkout / "models/vit_image.py", root=checkout).VisionTransformer(**sizes, tuning_config=config)


def start(checkout: Path) -> dict[str, Any]:
    """Returns what an adapter of 768 and 64 starts from."""
    adapter = transformer(checkout, 768, 1).blocks[0].adaptmlp
    names = {"down_proj": "down", "up_proj": "up"}
    return {
        f"{ours}.{kind}": drawn(getattr(getattr(adapter, theirs), kind))
        for theirs, ours in names.items()
        for kind in ("weight", "bias")
    }


def trains(checkout: Path) -> dict[str, int]:
    """Returns the sizes of what trains of a transformer of two blocks, once a checkpoint without adapters is loaded."""
    model = transformer(checkout, 24, 2)
    told = model.load_state_dict({k: v for k, v in model.state_dict().items() if "adaptmlp" not in k}, strict=False)
    args = SimpleNamespace(fulltune=False)
    run_statements(checkout / "main_image.py", ast.For, "requires_grad = True", model=model, msg=told, args=args)
    return {name: parameter.numel() for name, parameter in model.named_parameters() if parameter.requires_grad}


def defaults(checkout: Path) -> dict[str, Any]:
    """Returns the options of the script for images, and the dropout of the block."""
    config = tuning(checkout)
    told = {"bottleneck": config.ffn_num, "scale": float(config.ffn_adapter_scalar)}
    told["layer_norm"] = config.ffn_adapter_layernorm_option
    return told | {"dropout": transformer(checkout, 24, 1).blocks[0].adaptmlp.dropout}
