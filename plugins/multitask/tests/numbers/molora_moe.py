"""What the module of MoLoRA's authors adds to two tokens, on tensors of sines, in float32; what it starts
from and trains, and their options: ``python -m peftcore.testing.freeze molora_moe.py CHECKOUT``. The
dense layer of flaxformer is flax's own here."""

import ast
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch

from peftcore.registry.evidence import Source
from peftcore.testing import drawn
from peftcore.testing.checkouts import load

SOURCE = Source("authors", "for-ai/parameter-efficient-moe", "e2683fe", "src/molora.py")
VERSIONS = ("jax", "flax")
NAMES = {"A": "lora_A", "B": "lora_B", "router": "router"}
"""Their names of tensors, in the order of the tree, by ours."""
ABSENT = ("flaxformer.types", "flaxformer.components")


def wave(*shape: int, step: float) -> Any:
    return np.sin(np.arange(np.prod(shape), dtype=np.float64) * step).reshape(shape).astype(np.float32)


def dense(kernel_axis_names: Any, reshape_kernel: bool, **options: Any) -> nn.DenseGeneral:
    return nn.DenseGeneral(**options)


def numbers(checkout: Path) -> dict[str, list[float]]:
    """Returns what is added, and the gradients of A ``[experts, rank, in]``, B ``[experts, out, rank]`` and the router
    ``[experts, in]``, all flat."""
    module = load(checkout / SOURCE.script, root=checkout, absent=ABSENT)
    module.routing.dense = SimpleNamespace(DenseGeneral=dense)
    weights = module.routing.RouterWeights(use_bias=False, dtype=jnp.float32)
    router = module.routing.Router(router_weights=weights, jitter_noise=0.0, dtype=jnp.float32)
    layer = module.MoLoRa(router=router, rank=2, num_experts=3, output_dim=4)
    x, direction = wave(1, 2, 5, step=0.9), wave(1, 2, 4, step=0.3)
    A, B, gate = wave(3, 2, 5, step=1.7), wave(3, 4, 2, step=2.3), wave(3, 5, step=0.7)
    leaves, form = jax.tree_util.tree_flatten(layer.init(jax.random.PRNGKey(0), x)["params"])
    values = [A.swapaxes(1, 2), B.swapaxes(1, 2), gate.T]
    assert [leaf.shape for leaf in leaves] == [value.shape for value in values]

    def loss(parameters: Any) -> Any:
        y = layer.apply({"params": parameters}, x)
        return (y * direction).sum(), y

    gradients, y = jax.grad(loss, has_aux=True)(jax.tree_util.tree_unflatten(form, values))
    by_A, by_B, by_gate = jax.tree_util.tree_leaves(gradients)
    parts = {"y": y, "A": by_A.swapaxes(1, 2), "B": by_B.swapaxes(1, 2), "router": by_gate.T}
    return {name: np.asarray(value).flatten().tolist() for name, value in parts.items()}


def gin(checkout: Path) -> str:
    return (checkout / "configs/molora.gin").read_text()


def made(checkout: Path, features: int, experts: int) -> Any:
    """Returns the parameters of a module for the feed-forward, whose router starts as their configuration says."""
    module = load(checkout / SOURCE.script, root=checkout, absent=ABSENT)
    module.routing.dense = SimpleNamespace(DenseGeneral=dense)
    (std,) = {float(each) for each in re.findall(r"normal:\s+stddev = (\S+)", gin(checkout))}
    init = nn.initializers.normal(stddev=std)
    weights = module.routing.RouterWeights(use_bias=False, dtype=jnp.float32, kernel_init=init)
    router = module.routing.Router(router_weights=weights, jitter_noise=0.0, dtype=jnp.float32)
    layer = module.MoLoRa(router=router, rank=2, num_experts=experts, output_dim=4)
    return layer.init(jax.random.PRNGKey(0), wave(1, 2, features, step=0.9))["params"]


def start(checkout: Path) -> dict[str, Any]:
    """Returns what the tensors of a module for 2000 features are drawn from, with 20 experts of rank 2."""
    leaves = jax.tree_util.tree_leaves(made(checkout, 2000, 20))
    return {name: drawn(torch.tensor(np.array(leaf))) for name, leaf in zip(NAMES, leaves, strict=True)}


def trains(checkout: Path) -> dict[str, int]:
    """Returns how many numbers their optimizer updates of a module for 5 features in a model, by our names."""
    (listed,) = re.findall(r"TRAINABLE_REGEX = (.*)", gin(checkout))
    updated = load(checkout / "src/utils.py", root=checkout).match_any(ast.literal_eval(listed))
    model = {"mlp": {"wi": {"kernel": np.zeros((5, 4))}, "conv": made(checkout, 5, 3)}}
    leaves, _ = jax.tree_util.tree_flatten_with_path(model)
    names = {"/".join(["", *(each.key for each in path)]): leaf.size for path, leaf in leaves}
    found = {path.removeprefix("/mlp/conv/").split("/")[0]: size for path, size in names.items() if updated(path, None)}
    return {name: found.pop(theirs) for name, theirs in NAMES.items()} | found


def defaults(checkout: Path) -> dict[str, Any]:
    """Returns the options of their configuration, which are alike for all matrices, and the scale of their code."""
    module = load(checkout / SOURCE.script, root=checkout, absent=ABSENT)
    (rank,), (experts,) = (
        {int(each) for each in re.findall(rf"{name} = (\d+)", gin(checkout))} for name in ("rank", "num_experts")
    )
    return {"experts": experts, "rank": rank, "alpha": module.MoLoRa.alpha}
