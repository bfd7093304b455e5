"""What the adapters of VL-Adapter's authors give for rows of two tasks, on tensors of sines; what they start from,
what trains, and their options: ``python -m peftcore.testing.freeze vl_adapter.py CHECKOUT``."""

import ast
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BartConfig, BartForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5LayerNorm

from peftcore.registry.evidence import Source
from peftcore.testing import drawn
from peftcore.testing.checkouts import flags, load

SOURCE = Source("authors", "ylsung/VL_adapter", "545fcbb", "VL-T5/src/adapters/adapter_controller.py")
VERSIONS = ("torch", "transformers")
WIDTH, TASKS = 6, ("0", "1", "2")
SHARED = {"all": {"use_single_adapter"}, "down": {"share_down_sampler"}, "up": {"share_up_sampler"}, "none": set()}


def wave(shape: Sequence[int], k: float) -> Tensor:
    """Returns sin(k), sin(2 k), ... in a shape."""
    return torch.sin(torch.arange(math.prod(shape), dtype=torch.float64) * k + k).view(tuple(shape))


def controller(checkout: Path, width: int, reduction: int, shared: str = "all") -> Any:
    """Returns the controller of adapters of which tasks share something."""
    module = load(checkout / SOURCE.script, root=checkout / "VL-T5/src")
    config: Any = load(checkout / "VL-T5/src/adapters/config.py", root=checkout / "VL-T5/src").AdapterConfig()
    config.tasks, config.d_model, config.input_dim, config.reduction_factor = [*TASKS], width, width, reduction
    config.track_z = config.shared_phm_rule_over_tasks = False
    for flag in ("use_single_adapter", "share_down_sampler", "share_up_sampler"):
        setattr(config, flag, flag in SHARED[shared])
    return module.AdapterController(config)


def methods(path: Path, names: set[str], known: dict[str, Any]) -> dict[str, Any]:
    """Returns functions of a file that imports what transformers no longer has."""
    tree = ast.parse(path.read_text())
    tree.body = [each for each in ast.walk(tree) if getattr(each, "name", "") in names]  # type: ignore[misc]
    exec(compile(tree, str(path), "exec"), known)  # code of a checkout that whoever runs this has chosen
    return known


def numbers(checkout: Path) -> dict[str, dict[str, list[float]]]:
    """Returns the output for rows of the tasks 2 and 0, and the gradients of the input and of all maps, flat: of each
    kind of tensor those of all tasks one behind the other, or the one that they share."""
    found = {}
    for shared in SHARED:
        adapters = controller(checkout, WIDTH, 2, shared).double()
        tables: dict[str, list[Tensor]] = {}
        for side, part in (("down", "down_sampler"), ("up", "up_sampler")):
            maps = list(dict.fromkeys(getattr(adapters.adapters[task], part) for task in TASKS))
            tables[side] = [each.weight for each in maps]
            tables[f"{side}_bias"] = [each.bias for each in maps]
        with torch.no_grad():
            for index, rows in enumerate(tables.values()):
                for row, value in zip(rows, wave((len(rows), *rows[0].shape), 0.5 + 0.37 * index), strict=True):
                    row.copy_(value)
        x: Any = wave((2, 3, WIDTH), 0.9).requires_grad_()
        y: Any = torch.cat([adapters(row[None], task) for row, task in zip(x, ("2", "0"), strict=True)])
        (y * wave((2, 3, WIDTH), 0.3)).sum().backward()
        found[shared] = {"y": y.flatten().tolist(), "x": x.grad.flatten().tolist()}
        for name, rows in tables.items():
            gradients = [torch.zeros_like(row) if row.grad is None else row.grad for row in rows]
            found[shared][name] = torch.stack(gradients).flatten().tolist()
    return found


def start(checkout: Path) -> dict[str, Any]:
    """Returns what the maps of an adapter between 400 features and 100 are drawn from: by their BART, whose function
    transformers calls for what a checkpoint lacks."""
    found = controller(checkout, 400, 4)
    path = checkout / "VL-T5/src/my_transformers/modeling_bart.py"
    init, bart = methods(path, {"_init_weights"}, {"nn": nn})["_init_weights"], SimpleNamespace(config=BartConfig())
    found.apply(lambda module: init(bart, module))
    own = found.adapters[TASKS[0]]
    tensors = {"down": own.down_sampler.weight, "down_bias": own.down_sampler.bias}
    tensors |= {"up": own.up_sampler.weight, "up_bias": own.up_sampler.bias}
    return {name: drawn(each) for name, each in tensors.items()}


class Told(SimpleNamespace):
    """Options, of which all that were not said are False."""

    def __getattr__(self, name: str) -> bool:
        return False


def command(checkout: Path) -> dict[str, Any]:
    return flags((checkout / "VL-T5/scripts/image/single_adapter.sh").read_text())


def trains(checkout: Path) -> dict[str, Any]:
    """Returns how many numbers of an adapter train, with 8 features and a reduction of 2, and which tensors of a BART
    besides, with the options of their script."""
    sizes = {"encoder_layers": 2, "decoder_layers": 1, "d_model": 8, "vocab_size": 40, "max_position_embeddings": 32}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    model = BartForConditionalGeneration(BartConfig(**sizes))
    own = controller(checkout, 8, 2)
    model.model.encoder.layers[0].adapter = own
    names = {"freeze_whole_model", "unfreeze_parameters"}
    known: dict[str, Any] = {"nn": nn, "T5LayerNorm": T5LayerNorm, "AdapterController": type(own)}
    theirs = methods(checkout / "VL-T5/src/trainer_base.py", names, known)
    trainer = SimpleNamespace(
        model=model, args=Told(**{name.replace("-", "_"): on for name, on in command(checkout).items()})
    )
    for name in sorted(names):
        theirs[name](trainer)
    trained = {name: each.numel() for name, each in model.named_parameters() if each.requires_grad}
    adapter = sum(trained.pop(name) for name in [*trained] if ".adapter." in name)
    return {"adapter": adapter, "others": sorted(trained)}


def defaults(checkout: Path) -> dict[str, Any]:
    """Returns the options of their script for one adapter, and its program's own, for the 768 features of BART-base."""
    told = command(checkout)
    own = load(checkout / "VL-T5/src/adapters/config.py", root=checkout / "VL-T5/src").AdapterConfig
    return {
        "shared": "all" if told["use_single_adapter"] else "none",
        "bottleneck": 768 // told["reduction_factor"],
        "activation": {"gelu_new": "gelu_tanh"}[own.non_linearity],
        "train_layer_norm": told["unfreeze_layer_norms"],
        "init_std": BartConfig().init_std,
        "up_init_std": BartConfig().init_std,
    }
