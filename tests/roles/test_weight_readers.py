"""Which module reads a weight in place of calling the one that holds it."""

import torch
from torch import Tensor, nn

from peftcore.roles import derive


class Apart(nn.Module):
    """An attention that adds the biases of its fused projection itself; `bias` gives the projection one of its own."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24, bias=bias), nn.Linear(8, 8)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(8)), nn.Parameter(torch.zeros(8))
        self.num_heads = 2


class Holder(nn.Module):
    """Stacked experts whose forward is given the matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Parameter(torch.randn(32, 8)), nn.Parameter(torch.randn(32, 8))

    def forward(self, x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return (x @ up.T) @ down


class Reads(nn.Module):
    """Hands the matrices of another module to it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.mlp = inner

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.mlp(x, self.mlp.w1, self.mlp.w2)
        return output


class OwnReader(Holder):
    """Reads its own, too."""

    def forward(self, x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return super().forward(x, self.w1, self.w2)


class NotCalled(Holder):
    """Has no forward to call: its parent has other functions of it do the work."""

    def forward(self, *inputs: Tensor) -> Tensor:
        raise NotImplementedError("is not called")


class Handed(nn.Module):
    """Hands weights of children on; one child is called, too, and one is read in code that no forward runs."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.both, self.fused = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self._inner(self.both(x).to(self.both.weight.dtype))

    def _inner(self, x: Tensor) -> Tensor:
        output: Tensor = self.fused(nn.functional.linear(x, self.read.weight, self.read.bias))
        return output

    def fuse(self) -> Tensor:
        return self.fused.weight + self.fused.bias


class Calls(nn.Module):
    """Calls another module, and does not know what it holds."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.mlp = inner

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.mlp(x, x, x)
        return output


def block(attention: nn.Module) -> nn.Module:
    return nn.ModuleDict(
        {"norm": nn.LayerNorm(8), "attn": attention, "mlp": nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8))}
    )


def reader(model: nn.Module, path: str) -> str | None:
    [entry] = [entry for entry in derive(model).at(path) if entry.kind != "container"]
    assert entry.called is (entry.tensor is None and entry.reader is None)
    return entry.reader


def test_an_attention_that_adds_biases_itself_reads_the_projection() -> None:
    for bias, expected in ((False, "blocks.0.attn"), (True, None)):
        model = nn.ModuleDict({"blocks": nn.ModuleList([block(Apart(bias)), block(Apart(bias))])})
        assert reader(model, "blocks.0.attn.qkv") == expected
        assert reader(model, "blocks.0.attn.proj") is None


def test_a_module_whose_code_does_not_name_its_tensor_holds_it_for_the_one_above() -> None:
    assert reader(Reads(Holder()), "mlp.w1") == ""
    assert reader(Reads(OwnReader()), "mlp.w1") is None
    assert reader(Calls(Holder()), "mlp.w1") is None


def test_a_module_that_cannot_be_called_holds_its_tensor_for_the_one_above() -> None:
    assert reader(Calls(NotCalled()), "mlp.w1") == ""


def test_a_module_takes_nothing_but_tensors_of_a_child_that_it_does_not_call() -> None:
    model = Handed()
    assert [reader(model, path) for path in ("read", "both", "fused")] == ["", None, None]
