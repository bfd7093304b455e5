"""What the module of MoLoRA's authors adds to two tokens, on tensors of sines, in float32:
``python -m peftcore.testing.freeze molora_moe.py CHECKOUT``. The dense layer of flaxformer is flax's own here."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from peftcore.registry.evidence import Source
from peftcore.testing.checkouts import load

SOURCE = Source("authors", "for-ai/parameter-efficient-moe", "e2683fe", "src/molora.py")
VERSIONS = ("jax", "flax")
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
