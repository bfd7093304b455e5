"""Where branches end: on real hosts by hand, and each way in which code can lead there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from more_hosts import build
from torch import Tensor, nn

from peftcore.layers.layer import plain_class
from peftcore.roles import derive
from peftcore.roles.branch_ends import End, find_end


def ends(name: str, role: str) -> dict[str, End]:
    """The ends of the branches of the first block, by the path of the last matrix."""
    model = build(name)[0]
    host, modules = derive(model), dict(model.named_modules())
    places = [entry for entry, _ in host.select(role)]
    return {
        entry.module: find_end(modules, entry.module, entry.block, plain_class)
        for entry in places
        if entry.block == places[0].block
    }


@pytest.mark.parametrize(
    ("name", "role", "last", "end"),
    [
        ("bert", "mlp.output", "bert.encoder.layer.0.output.dense", "bert.encoder.layer.0.output.dropout"),
        ("gpt2", "attn.output", "transformer.h.0.attn.c_proj", "transformer.h.0.attn.resid_dropout"),
        ("gpt2", "mlp.output", "transformer.h.0.mlp.c_proj", "transformer.h.0.mlp.dropout"),
        ("t5", "attn.output", "encoder.block.0.layer.0.SelfAttention.o", "encoder.block.0.layer.0.dropout"),
        # and not the one beside the matrix, which drops what the matrix reads
        ("t5", "mlp.output", "encoder.block.0.layer.1.DenseReluDense.wo", "encoder.block.0.layer.1.dropout"),
        ("timm_vit", "attn.output", "blocks.0.attn.proj", "blocks.0.drop_path1"),
        ("timm_vit", "mlp.output", "blocks.0.mlp.fc2", "blocks.0.drop_path2"),
        ("llama", "attn.output", "model.layers.0.self_attn.o_proj", None),
        ("llama", "mlp.output", "model.layers.0.mlp.down_proj", None),
        ("gemma2", "mlp.output", "model.layers.0.mlp.down_proj", "model.layers.0.post_feedforward_layernorm"),
        ("flux", "mlp.output", "transformer_blocks.0.ff.net.2", None),
        ("timm_resnet18", "conv.output", "layer1.0.conv2", "layer1.0.bn2"),
    ],
)  # fmt: skip
def test_real_hosts(name: str, role: str, last: str, end: str | None) -> None:
    assert ends(name, role)[last].path == end


@pytest.mark.parametrize(
    ("name", "role", "reader"),
    [
        ("timm_vit", "attn.output", "blocks.0.norm2"),
        ("timm_vit", "mlp.output", None),  # the block returns the sum
        ("llama", "attn.output", "model.layers.0.post_attention_layernorm"),
        ("bert", "attn.output", "bert.encoder.layer.0.attention.output.LayerNorm"),
    ],
)
def test_what_reads_the_sum(name: str, role: str, reader: str | None) -> None:
    assert {end.reader for end in ends(name, role).values()} == {reader}


class Windowed(nn.Module):
    """Puts rows and columns into one dimension behind the sum, as Swin does."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.norm, self.mlp = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.last(x)
        y = y.reshape(len(x), -1, 4)
        return y + self.mlp(self.norm(y))


def test_what_reads_the_sum_in_another_shape() -> None:
    end = find_end(dict(Windowed().named_modules()), "last", None, plain_class)
    assert (end.reader, end.entered, end.left) == ("norm", None, None)


@pytest.mark.parametrize(
    ("name", "role", "rest"),
    [
        ("bart", "attn.output", "dropout"),
        ("bart", "mlp.output", "dropout"),
        ("granite_moe", "mlp.output", "scale"),
        ("flux", "mlp.output", "scale"),
        ("wavlm", "attn.output", "unknown"),
        ("timm_swinv2", "attn.output", "unknown"),  # windows are put together before the drop path
        ("ibert", "mlp.output", "unknown"),  # adds the residual inside of another module
        ("llama", "mlp.output", ""),
    ],
)
def test_what_is_no_module_is_told(name: str, role: str, rest: str) -> None:
    assert {end.rest for end in ends(name, role).values()} == {rest}


def test_a_permuted_output_says_its_order() -> None:
    [end] = ends("convnext", "mlp.output").values()
    assert (end.path, end.order, end.rest) == ("convnext.encoder.stages.0.layers.0.drop_path", (0, 3, 1, 2), "")


class DropPath(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class Layer(nn.Module):
    """A branch of one matrix; its forward is what a test is about."""

    follow: bool = True

    def __init__(self) -> None:
        super().__init__()
        self.last, self.drop, self.path = nn.Linear(4, 4), nn.Dropout(0.1), DropPath()
        self.norm, self.next, self.gone = nn.LayerNorm(4), nn.Linear(4, 4), None
        self.several = nn.ModuleList([nn.Dropout(0.1), DropPath()])
        self.gain, self.p = nn.Parameter(torch.ones(4)), 0.1


class Nested(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.path(self.drop(self.last(x)))


class Parts(Layer):
    def _branch(self, x: Tensor, scale: float = 1.0) -> tuple[Tensor, None]:
        return self.drop(self.last(x)), None

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self._branch(x)
        return x + self.path(y)


class Conditions(Layer):
    def forward(self, x: Tensor) -> Tensor:
        y = self.last(x)
        if self.gone is not None:
            y = self.gone(y)
        if not self.follow:
            y = self.next(y)
        if self.training and x.requires_grad:
            y = self.drop(y)
        return x + y


class Loops(Layer):
    def forward(self, x: Tensor) -> Tensor:
        y = self.last(x)
        for each in self.several:
            y = each(y)
        y += x
        return self.drop(y)


class Listed(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return x.add(self.several[-1](self.last(x)))


class Scaled(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.last(x)) * self.gain


class ScaledBefore(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.path(self.gain * self.last(x))


class Functional(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return x + F.dropout(self.last(x), p=self.p, training=self.training)


class WithoutDropout(Functional):
    def __init__(self) -> None:
        super().__init__()
        self.p = 0.0


def helper(x: Tensor, residual: Tensor, p: float) -> Tensor:
    return residual + F.dropout(x, p)


class Helped(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return helper(self.last(x), x, self.p)


class GivenMore(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.joint: Any = DropPath()

    def forward(self, x: Tensor) -> Tensor:
        return self.joint(self.last(x), x)


class NotLast(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.next(self.drop(self.last(x)))


class PostNorm(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.drop(self.last(x)))


class Between(Layer):
    def forward(self, x: Tensor) -> Tensor:
        y = x + F.dropout(self.last(x))
        return y + self.next(self.norm(y))  # so the norm is not all that reads the sum


class Overwritten(Layer):
    def forward(self, x: Tensor) -> Tensor:
        y = x + F.dropout(self.last(x))
        y = self.norm(y)
        return y + self.next(y)


class Bounded(Layer):
    def forward(self, x: Tensor) -> Tensor:
        y = x + self.last(x)
        if y.dtype == torch.float16:
            y = torch.clamp(y, max=torch.finfo(y.dtype).max)
        return y


class Reshaped(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.path(self.drop(self.last(x)).reshape(x.shape))


Permuted = type("Permuted", (Layer,), {})


def _permuted(self: Any, x: Tensor) -> Tensor:
    return x.permute(2, 0, 1) + self.path(self.last(x).permute(0, 2, 1).permute(1, 0, 2))


Permuted.forward = _permuted  # type: ignore[attr-defined]

Unread = type("Unread", (Layer,), {})
exec("def forward(self, x): return x + self.drop(self.last(x))", made := {})
Unread.forward = made["forward"]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (Nested, End("path", None, True, left="")),
        (Parts, End("path", None, True, left="")),
        (Conditions, End("drop", left="")),
        (Loops, End("several.1", None, True, reader="drop")),
        (Listed, End("several.1", None, True)),
        (Scaled, End("drop", rest="scale", left="")),
        (ScaledBefore, End("path", None, True, left="")),
        (Functional, End(rest="dropout", left="")),
        (WithoutDropout, End(left="")),
        (Helped, End(rest="dropout", left="")),
        (GivenMore, End(rest="unknown")),
        (NotLast, End(rest="unknown")),
        (PostNorm, End("drop", entered="norm", reader="norm")),
        (Between, End(rest="dropout", reader="norm")),
        (Overwritten, End(rest="dropout", entered="norm", reader="norm")),
        (Bounded, End(left="")),
        (Reshaped, End("drop", rest="unknown")),
        (Permuted, End("path", (2, 0, 1), True)),
        (Unread, End(rest="unknown")),
    ],
)
def test_code(layer: type[Layer], expected: End) -> None:
    model = nn.ModuleList([layer()])
    found = find_end(dict(model.named_modules()), "0.last", "0", plain_class)
    path, entered, left, reader = (
        None if each is None else f"0.{each}".rstrip(".")
        for each in (expected.path, expected.entered, expected.left, expected.reader)
    )
    assert found == replace(expected, path=path, entered=entered, left=left, reader=reader)


def test_elements_of_a_sequential_follow_each_other() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1), nn.Identity())
    assert find_end(dict(model.named_modules()), "0", None, plain_class) == End("2")
