"""What the modules of MoV's authors make of two tokens, on tensors of sines, in float32; what they
start from and train, and their options: ``python -m peftcore.testing.freeze mov.py CHECKOUT``. The
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

SOURCE = Source("authors", "for-ai/parameter-efficient-moe", "e2683fe", "src/mov.py")
VERSIONS = ("jax", "flax")
NAMES = {"gain": "mov_scaling", "router": "router"}
"""Their names of tensors, in the order of the tree, by ours."""
ABSENT = ("flaxformer.types", "flaxformer.components")


def wave(*shape: int, step: float) -> Any:
    return np.sin(np.arange(np.prod(shape), dtype=np.float64) * step).reshape(shape).astype(np.float32)


def dense(kernel_axis_names: Any, reshape_kernel: bool, **options: Any) -> nn.DenseGeneral:
    return nn.DenseGeneral(**options)


def numbers(checkout: Path) -> dict[str, dict[str, list[float]]]:
    """Returns the output, and the gradients of the scalings and of the router's weights ``[experts, features]``, all
    flat: of a feed-forward of 5 features, and of an attention of two heads of 3."""
    module = load(checkout / SOURCE.script, root=checkout, absent=ABSENT)
    routing, found = module.routing, {}
    routing.dense = SimpleNamespace(DenseGeneral=dense)
    for place, kind, shape in (("feed-forward", "MoV", (5,)), ("attention", "MoVAttention", (2, 3))):
        *heads, width = shape
        weights = routing.RouterWeights(use_bias=False, dtype=jnp.float32)
        router = routing.Router(router_weights=weights, jitter_noise=0.0, dtype=jnp.float32)
        layer = getattr(module, kind)(router=router, num_experts=3)
        x, direction = (wave(1, 2, *shape, step=step) for step in (0.9, 0.3))
        gain, kernel = 1 + wave(*heads, 3, width, step=1.7), wave(3, width, step=0.7).T
        leaves, form = jax.tree_util.tree_flatten(layer.init(jax.random.PRNGKey(0), x)["params"])
        assert [leaf.shape for leaf in leaves] == [gain.shape, kernel.shape]
        parameters = jax.tree_util.tree_unflatten(form, [gain, kernel])

        def loss(parameters: Any, layer: Any = layer, x: Any = x, direction: Any = direction) -> Any:
            y = layer.apply({"params": parameters}, x)
            return (y * direction).sum(), y

        gradients, y = jax.grad(loss, has_aux=True)(parameters)
        by_gain, by_kernel = jax.tree_util.tree_leaves(gradients)
        parts = {"y": y, "gain": by_gain, "router": by_kernel.T}
        found[place] = {name: np.asarray(value).flatten().tolist() for name, value in parts.items()}
    return found


def gin(checkout: Path) -> str:
    return (checkout / "configs/mov.gin").read_text()


def made(checkout: Path, features: int, experts: int) -> Any:
    """Returns the parameters of a module for the feed-forward, whose router starts as their configuration says."""
    module = load(checkout / SOURCE.script, root=checkout, absent=ABSENT)
    module.routing.dense = SimpleNamespace(DenseGeneral=dense)
    (std,) = {float(each) for each in re.findall(r"normal:\s+stddev = (\S+)", gin(checkout))}
    init = nn.initializers.normal(stddev=std)
    weights = module.routing.RouterWeights(use_bias=False, dtype=jnp.float32, kernel_init=init)
    router = module.routing.Router(router_weights=weights, jitter_noise=0.0, dtype=jnp.float32)
    layer = module.MoV(router=router, num_experts=experts)
    return layer.init(jax.random.PRNGKey(0), wave(1, 2, features, step=0.9))["params"]


def start(checkout: Path) -> dict[str, Any]:
    """Returns what the tensors of a module for 2000 features are drawn from, with 20 experts."""
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
    """Returns the experts of their configuration, as many for attention and for the feed-forward."""
    (experts,) = {int(each) for each in re.findall(r"num_experts = (\d+)", gin(checkout))}
    return {"experts": experts}
