"""Modules of torch that must be held in a stance while they are adapted."""

import pytest
import torch
from core_toys import run_without_gradients, stir
from torch import Tensor, nn

import peftcore


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.bn(self.conv(x))).mean((2, 3)))


def test_statistics_of_a_frozen_base_stay() -> None:
    model = Normed().train()
    injection = peftcore.apply(model, "lora", target="head")  # nowhere near the norm
    before = {name: value.clone() for name, value in model.bn.named_buffers()}
    for _ in range(2):
        model(torch.randn(4, 3, 6, 6)).sum().backward()
    assert all(torch.equal(before[name], value) for name, value in model.bn.named_buffers())
    assert model.bn.training, "the user's mode is the user's"
    injection.remove()
    model(torch.randn(4, 3, 6, 6))
    assert not all(torch.equal(before[name], value) for name, value in model.bn.named_buffers())


def test_statistics_stay_while_every_injection_is_disabled() -> None:
    model = Normed().train()
    injection = peftcore.apply(model, "lora", target="head")
    before = model.bn.running_mean.clone()
    with injection.disabled():
        model(torch.randn(4, 3, 6, 6))
    assert torch.equal(model.bn.running_mean, before)


def test_batch_norm_without_statistics_still_uses_the_batch() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False))
    x = torch.randn(6, 4)
    base = model(x)
    peftcore.apply(model, "lora", target="0")
    assert torch.allclose(model(x), base, atol=1e-6)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("method", ["lora", "ia3", "bitfit", "houlsby_adapter", "ln_tuning", "dora"])
def test_fused_path_of_the_encoder_does_not_pass_adapters_by(method: str, mask: bool) -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    x = torch.randn(2, 5, 8)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if mask else None
    base = run_without_gradients(lambda: model(x, src_key_padding_mask=padding))
    injection = peftcore.apply(model, method)
    stir(injection, 0.3)
    with_gradients = model(x, src_key_padding_mask=padding)
    without = run_without_gradients(lambda: model(x, src_key_padding_mask=padding))
    real = ~padding if mask else torch.ones(2, 5, dtype=torch.bool)
    assert torch.allclose(with_gradients[real], without[real], atol=1e-5)
    assert (without[real] - base[real]).abs().max() > 1e-2
    with injection.disabled():
        assert torch.allclose(
            run_without_gradients(lambda: model(x, src_key_padding_mask=padding))[real], base[real], atol=1e-6
        )
    injection.remove()
    assert torch.equal(run_without_gradients(lambda: model(x, src_key_padding_mask=padding))[real], base[real])


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "linear_probe"])
def test_tables_with_sparse_gradients_are_adapted_as_any(method: str) -> None:
    found = []
    for sparse in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(10, 4, sparse=sparse), nn.Linear(4, 4))
        injection = peftcore.apply(model, method, target="0", seed=1)
        for seed, parameter in enumerate(injection.parameters()):
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(seed))
        output = model(torch.tensor([[1, 2, 2]]))
        output.square().sum().backward()
        found.append([output.detach(), *(parameter.grad for parameter in injection.parameters())])
    assert all(map(torch.equal, *found))
