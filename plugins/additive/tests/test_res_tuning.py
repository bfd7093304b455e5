"""Res-Tuning's bypass: the authors' numbers, its equation at the hosts of the kit, and what backward touches."""

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftcore
from peftcore.errors import ConfigError
from peftcore.testing import against, conformance, frozen, same_defaults, same_start
from peftcore.testing.hosts import HOSTS
from peftcore.testing.kit import fill
from peftcore.testing.tools import without_fast_paths

NUMBERS = Path(__file__).parent / "numbers" / "res_tuning.json"
BLOCKS = {
    "llama": "model.layers.{}",
    "bert": "bert.encoder.layer.{}",
    "t5": "decoder.block.{}",
    "vit": "vit.layers.{}",
}


@conformance("res_tuning", options={"*": {"bottleneck": 4}})
def test_conformance(check: Callable[[], None]) -> None:
    check()


@pytest.fixture(autouse=True)
def plain_attention(request: pytest.FixtureRequest) -> Iterator[None]:
    """Without gradients torch's encoder takes a path of its own, on nested tensors. The kit has its own ways."""
    with nullcontext() if "check" in request.fixturenames else without_fast_paths():
        yield


def wave(shape: Sequence[int], key: str) -> Tensor:
    count = torch.Size(shape).numel()
    return torch.cos(torch.arange(count, dtype=torch.float64) * 1.7 + zlib.crc32(key.encode()) % 97).view(*shape) / 2


CODE: Any = {"repository": "modelscope/ms-swift", "commit": "3602360", "script": "swift/tuners/restuning.py"}


@against("authors", "res_tuning", **CODE)
def test_the_bypass_of_the_authors_with_the_same_numbers() -> None:
    numbers = frozen(NUMBERS)
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True, norm_first=True)
    model = nn.TransformerEncoder(layer, 3, norm=nn.LayerNorm(8), enable_nested_tensor=False).double().train()
    injection = peftcore.apply(model, "res_tuning", bottleneck=4, dtype="float64")
    tensors = {}
    for part, shared in injection.shared.items():
        tensors |= {theirs(part, name): parameter for name, parameter in shared.named_parameters()}
    assert tensors.keys() == numbers["gradients"].keys()
    for name, parameter in (*model.named_parameters(), *tensors.items()):
        parameter.data.copy_(wave(parameter.shape, name))
    output = model(wave((2, 5, 8), "states"))
    expected = torch.tensor(numbers["output"], dtype=torch.float64)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)
    (output * wave((2, 5, 8), "direction")).sum().backward()
    for name, parameter in tensors.items():
        assert parameter.grad.flatten().tolist() == pytest.approx(numbers["gradients"][name], rel=1e-9, abs=1e-10), name


def theirs(part: str, name: str) -> str:
    """The authors' name of a tensor of the bypass at a block."""
    own = name.replace(".", "_tuner.tuner.", 1).replace("down", "ln1").replace("up", "ln2")
    return f"bypass_blocks.{part.rpartition('_')[2]}.{own}"


@against("authors", "res_tuning", **CODE, part="start")
@pytest.mark.parametrize(("shape", "width", "bottleneck"), [("through", 16, 12_000), ("back", 12_000, 16)])
def test_start_is_the_authors(shape: str, width: int, bottleneck: int) -> None:
    told = frozen(NUMBERS, "start")[shape]
    injection: Any = peftcore.apply(HOSTS["llama"].build()[0], "res_tuning")
    step = type(injection.shared["model_layers_0"])(width, bottleneck, False)
    for name, tensor in step.named_parameters():
        if tensor.numel() > 16:
            same_start(tensor, told.pop(theirs("block_0", name)))
    assert not told


@against("authors", "res_tuning", **CODE, part="trains")
def test_what_trains_is_what_the_authors_train() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 3, norm=nn.LayerNorm(8))
    injection = peftcore.apply(model, "res_tuning", bottleneck=4)
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in injection.parameters()}
    own = [theirs(part, name) for part, shared in injection.shared.items() for name, _ in shared.named_parameters()]
    assert len(own) == len(list(injection.parameters()))
    assert {"model": [], "bypass": sorted(own)} == frozen(NUMBERS, "trains")


@against("authors", "res_tuning", **CODE, part="defaults")
def test_defaults_are_the_authors() -> None:
    same_defaults(peftcore.apply(HOSTS["llama"].build()[0], "res_tuning").config, frozen(NUMBERS, "defaults"))


def tuned(t: dict[str, Tensor], x: Tensor) -> Tensor:
    """An adapter with its residual, by the error function."""
    inner = torch.einsum("rd,...d->...r", t["down.weight"], x) + t["down.bias"]
    inner = inner * (1 + torch.erf(inner / 2**0.5)) / 2
    return x + torch.einsum("dr,...r->...d", t["up.weight"], inner) + t["up.bias"]


@pytest.mark.parametrize("name", BLOCKS)
def test_the_equation(name: str) -> None:
    torch.manual_seed(0)
    model, inputs = HOSTS[name].build()
    base, _ = HOSTS[name].build()
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    base.double().eval().requires_grad_(False).load_state_dict(model.double().eval().requires_grad_(False).state_dict())
    injection = peftcore.apply(model, "res_tuning", bottleneck=5, dtype="float64")
    fill(injection)
    steps = [dict(shared.named_parameters()) for shared in injection.shared.values()]
    path, z = BLOCKS[name], []

    def before(module: Any, args: Any, kwargs: Any) -> None:
        z.append(args[0] if args else kwargs["hidden_states"])

    def after(module: Any, args: Any, output: Any) -> Any:
        number, h = len(z) - 1, output if isinstance(output, Tensor) else output[0]
        parts: list[dict[str, Tensor]] = [
            {key.removeprefix(kind): each for key, each in steps[number].items() if key.startswith(kind)}
            for kind in ("lateral.", "vertical.")
        ]
        z.append(tuned(parts[0], h) + tuned(parts[1], z[-1]))
        if number + 1 < len(steps):
            return None
        return z[-1] if isinstance(output, Tensor) else (z[-1], *output[1:])

    base.get_submodule(path.format(0)).register_forward_pre_hook(before, with_kwargs=True)
    for number in range(len(steps)):
        base.get_submodule(path.format(number)).register_forward_hook(after)
    ours, expected = (HOSTS[name].output(each(**inputs)) for each in (model, base))
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-10)
    direction, parameters = torch.randn_like(ours), list(injection.parameters())
    found = [torch.autograd.grad((each * direction).sum(), parameters) for each in (ours, expected)]
    torch.testing.assert_close(found[0], found[1], rtol=1e-7, atol=1e-9)
    assert all(each.abs().max() > 0 for each in found[0])


def test_the_start_of_the_last_step() -> None:
    model, _ = HOSTS["llama"].build()
    injection = peftcore.apply(model, "res_tuning", zero_last=True)
    *others, last = (shared for shared in injection.shared.values())
    assert not any(each.up.weight.any() or each.up.bias.any() for each in (last.lateral, last.vertical))
    assert all(each.lateral.up.weight.any() for each in others)
    with pytest.raises(ConfigError, match="takes no overrides"):
        peftcore.apply(HOSTS["llama"].build()[0], "res_tuning", overrides={"model.layers.0": {"bottleneck": 2}})
