"""What the encoder of adapter-bert gives with adapters in it, with gradients, in float64, on tensors of cosines, what
an adapter starts from, which tensors train, and its options:
``python -m peftcore.testing.freeze houlsby_adapter.py CHECKOUT``.

TensorFlow 1 does not run here. The encoder asks little of it, which torch has under other names.
"""

import ast
import functools
import inspect
import re
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from peftcore.registry.evidence import Source
from peftcore.testing import drawn
from peftcore.testing.checkouts import load

SOURCE = Source("authors", "google-research/adapter-bert", "1a31fc6", "modeling.py")
VERSIONS = ("torch",)
WIDTH, HEADS, INNER, LAYERS, BOTTLENECK = 8, 2, 12, 2, 3


def wave(shape: Sequence[int], key: str) -> Tensor:
    count = torch.Size(shape).numel()
    return torch.cos(torch.arange(count, dtype=torch.float64) * 1.7 + zlib.crc32(key.encode()) % 97).view(*shape) / 2


def states() -> Tensor:
    """What the first layer reads, of two rows of four tokens."""
    return torch.nn.functional.layer_norm(wave((2, 4, WIDTH), "states"), [WIDTH], eps=1e-12)


class TensorFlow:
    """The functions that the encoder asks for. A variable is a wave by its name, and told apart by its collections."""

    GraphKeys = SimpleNamespace(GLOBAL_VARIABLES="variables")
    reshape, multiply, tanh, pow = torch.reshape, torch.multiply, torch.tanh, torch.pow

    def __init__(self) -> None:
        self.scopes: list[str] = []
        self.variables: dict[str, Tensor] = {}
        self.collections: dict[str, list[str]] = {}
        self.starts: dict[str, Any] = {}
        self.layers = SimpleNamespace(dense=self.dense)
        self.contrib = SimpleNamespace(layers=SimpleNamespace(layer_norm=self.layer_norm))
        self.nn = SimpleNamespace(softmax=lambda x: x.softmax(-1))

    @contextmanager
    def variable_scope(self, name: str) -> Iterator[None]:
        self.scopes.append(name)
        yield
        self.scopes.pop()

    def get_variable(self, name: str, shape: Any, initializer: Any = None, collections: Sequence[str] = ()) -> Tensor:
        path = "/".join([*self.scopes, name])
        self.variables[path] = wave(shape, path).requires_grad_()
        self.collections[path], self.starts[path] = list(collections), initializer
        return self.variables[path]

    def truncated_normal_initializer(self, stddev: float) -> float:
        return stddev

    def zeros_initializer(self) -> float:
        return 0.0

    def dense(self, x: Tensor, units: int, activation: Any = None, name: str = "dense", **start: Any) -> Tensor:
        with self.variable_scope(name):
            y = x @ self.get_variable("kernel", [x.shape[-1], units]) + self.get_variable("bias", [units])
        return y if activation is None else activation(y)

    def layer_norm(self, inputs: Tensor, variables_collections: Sequence[str], **options: Any) -> Tensor:
        with self.variable_scope("LayerNorm"):
            names = {"weight": "gamma", "bias": "beta"}
            own = {k: self.get_variable(v, inputs.shape[-1:], None, variables_collections) for k, v in names.items()}
        return torch.nn.functional.layer_norm(inputs, inputs.shape[-1:], **own, eps=1e-12)

    def tensordot(self, a: Tensor, b: Tensor, axes: Any) -> Tensor:
        return torch.tensordot(a, b, axes)

    def transpose(self, x: Tensor, order: Sequence[int]) -> Tensor:
        return x.permute(*order)

    def matmul(self, a: Tensor, b: Tensor, transpose_b: bool = False) -> Tensor:
        return a @ (b.mT if transpose_b else b)


def authors(checkout: Path) -> tuple[TensorFlow, Any]:
    """Returns what stands for TensorFlow, and their module on it."""
    tf = TensorFlow()
    sys.modules["tensorflow"] = tf  # type: ignore[assignment]
    modeling = load(checkout / SOURCE.script, root=checkout, absent=("six",))
    modeling.get_shape_list = lambda tensor, *args, **kwargs: list(tensor.shape)
    modeling.reshape_to_matrix = lambda tensor: tensor.reshape(-1, tensor.shape[-1])
    Tensor.get_shape = lambda self: SimpleNamespace(as_list=lambda: list(self.shape))  # type: ignore[attr-defined]
    modeling.tf = tf
    return tf, modeling


def trained(checkout: Path, tf: TensorFlow) -> dict[str, Tensor]:
    """Returns the variables of the collections that their optimizer takes."""
    found = re.search(r"for collection in (\[.*\]):", (checkout / "optimization.py").read_text())
    assert found
    taken = set(ast.literal_eval(found[1]))
    return {name: each for name, each in tf.variables.items() if set(tf.collections[name]) & taken}


def encoded(checkout: Path) -> tuple[TensorFlow, Tensor]:
    """Returns what stands for TensorFlow after a run of the encoder, and the last states ``[2, 4, 8]``."""
    tf, modeling = authors(checkout)
    y = modeling.transformer_model(
        states(),
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=INNER,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        adapter_fn=functools.partial(modeling.feedforward_adapter, hidden_size=BOTTLENECK),
    )
    return tf, y


def numbers(checkout: Path) -> dict[str, Any]:
    """Returns the last states, and the gradients of all that trains."""
    tf, y = encoded(checkout)
    (y.square() * wave(y.shape, "direction")).sum().backward()
    own = trained(checkout, tf)
    return {
        "output": y.flatten().tolist(),
        "gradients": {name: each.grad.flatten().tolist() for name, each in own.items() if each.grad is not None},
    }


def start(checkout: Path) -> dict[str, Any]:
    """Returns what an adapter on 800 numbers starts from. A truncated normal is cut at two deviations, as TensorFlow's
    documentation says."""
    tf, modeling = authors(checkout)
    modeling.feedforward_adapter(torch.zeros(2, 800, dtype=torch.float64))
    found = {}
    for name, each in tf.variables.items():
        std, fresh = tf.starts[name], torch.zeros(each.shape)
        found[name] = drawn(torch.nn.init.trunc_normal_(fresh, std=std, a=-2 * std, b=2 * std) if std else fresh)
    return found


def trains(checkout: Path) -> dict[str, int]:
    """Returns what trains of the encoder, by name: how many numbers."""
    return {name: each.numel() for name, each in trained(checkout, encoded(checkout)[0]).items()}


def defaults(checkout: Path) -> dict[str, Any]:
    """Returns the defaults of the adapter, and which of torch's two GELUs its non-linearity is."""
    modeling, x = authors(checkout)[1], torch.linspace(-3, 3, 13, dtype=torch.float64)
    told = inspect.signature(modeling.feedforward_adapter).parameters
    kinds = {"gelu": "none", "gelu_tanh": "tanh"}
    is_close = {
        k: torch.allclose(modeling.gelu(x), torch.nn.functional.gelu(x, approximate=v)) for k, v in kinds.items()
    }
    (activation,) = (kind for kind, close in is_close.items() if close)
    scale = told["init_scale"].default
    found = {"bottleneck": told["hidden_size"].default, "init_std": scale, "up_init_std": scale}
    return found | {"activation": activation}
