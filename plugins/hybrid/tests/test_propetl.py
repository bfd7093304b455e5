"""ProPETL: the kit; numbers of the authors' masks over one adapter; where a layer has it, beside Pfeiffer adapters with
masked matrices; masks as bits; groups of the optimizer, and what is refused."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftcore
from peftcore.errors import ConfigError
from peftcore.testing import HOSTS, against, conformance, frozen, same_defaults, same_start
from peftcore.testing.kit import fill
from peftcore_hybrid.propetl import MAPS, from_bits, take_masks, to_bits

KEPT = 0.3
NUMBERS = Path(__file__).parent / "numbers" / "propetl.json"
CODE: Any = {
    "repository": "ChaosCodes/ProPETL",
    "commit": "1c08f19",
    "script": "propetl-roberta/src/transformers/adapters/modeling.py",
}


@conformance("propetl", options={"*": {"bottleneck": 6}})
def test_conformance(check: Callable[[], None]) -> None:
    check()


def wave(*shape: int, step: float) -> Tensor:
    return (torch.arange(math.prod(shape), dtype=torch.float64) * step).sin().view(shape)


@against("authors", "propetl", **CODE)
def test_numbers_of_the_authors() -> None:
    """Two layers under masks of their own, in training: the output and all gradients."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)).double().train()
    options: dict[str, Any] = {"bottleneck": 4, "kept": KEPT, "placement": "branch", "dtype": "float64"}
    injection = peftcore.apply(model, "propetl", target=["0", "2"], **options)
    [prototype] = injection.shared.values()
    operators: list[Any] = [injection.operators[path] for path in ("0", "2")]
    with torch.no_grad():
        for index, operator in enumerate(operators):
            layer = model[2 * index]
            layer.weight.copy_(wave(6, 6, step=1.1 + index))
            layer.bias.copy_(wave(6, step=1.3 + index))
            operator.down_scores.copy_(wave(4, 6, step=1.9 + index))
            operator.up_scores.copy_(wave(6, 4, step=2.9 + index))
        for name, value in (("down.weight", wave(4, 6, step=1.7)), ("down.bias", wave(4, step=0.7))):
            prototype.get_parameter(name).copy_(value)
        for name, value in (("up.weight", wave(6, 4, step=2.3)), ("up.bias", wave(6, step=0.3))):
            prototype.get_parameter(name).copy_(value)
    x = wave(2, 3, 6, step=0.9).requires_grad_()
    y = model(x)
    (y * wave(2, 3, 6, step=0.37)).sum().backward()
    found: dict[str, Any] = {"y": y, "x": x.grad, **{n: p.grad for n, p in prototype.named_parameters()}}
    for index, operator in enumerate(operators):
        found |= {f"{index}.down": operator.down_scores.grad, f"{index}.up": operator.up_scores.grad}
    numbers = frozen(NUMBERS)
    assert numbers.keys() == found.keys()
    for name, value in found.items():
        assert value.any()
        assert value.flatten().tolist() == pytest.approx(numbers[name], abs=1e-10), name


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_layers_are_pfeiffer_adapters_with_masked_matrices(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    kind = {"llama": "Llama", "bert": "Bert"}[name]
    config = getattr(transformers, f"{kind}Config")(**sizes, vocab_size=12)
    model, twin = (getattr(transformers, f"{kind}Model")(config).double().eval() for _ in range(2))
    twin.load_state_dict(model.state_dict())
    injection = peftcore.apply(model, "propetl", bottleneck=5, kept=KEPT, dtype="float64")
    fill(injection)
    theirs = peftcore.apply(twin, "pfeiffer_adapter", bottleneck=5, dtype="float64")
    [prototype] = injection.shared.values()
    assert injection.operators.keys() == theirs.operators.keys() and len(theirs.operators) == 3
    with torch.no_grad():
        for path, operator in injection.operators.items():
            for side in ("down", "up"):
                sizes_of = operator.get_tensor(f"{side}_scores").abs()
                kept = sizes_of.numel() - int((1 - KEPT) * sizes_of.numel())
                mask = sizes_of >= sizes_of.flatten().sort().values[-kept]
                assert mask.sum() == kept == 24
                own, other = (each.get_submodule(side) for each in (prototype, theirs.operators[path]))
                other.weight.copy_(own.weight * mask)  # type: ignore[operator]
                other.bias.copy_(own.bias)
    ids = torch.randint(12, (2, 5))
    found, expected = model(ids)[0], twin(ids)[0]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    with injection.disabled():
        assert (model(ids)[0] - found).abs().max() > 1e-2


def test_bits_are_the_mask() -> None:
    torch.manual_seed(0)
    for shape in ((3, 5), (4, 4), (1, 1), (7, 9)):
        mask = torch.rand(shape) > 0.5
        stored = to_bits(mask.float())
        assert stored.dtype == torch.uint8 and len(stored) == math.ceil(mask.numel() / 8)
        assert torch.equal(from_bits(stored, mask.shape), mask)
        for index, entry in enumerate(mask.flatten().tolist()):
            assert (stored[index // 8].item() >> index % 8) % 2 == entry


def test_fixed_masks_compute_the_same_in_a_file_of_bits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, inputs = HOSTS["llama"].build()
    trained = peftcore.apply(model, "propetl", name="trained")
    fill(trained)
    small = peftcore.apply(model, "propetl", name="small", masks="fixed")
    with peftcore.activate(model, "trained"), torch.no_grad():
        expected = model(**inputs).logits
    with peftcore.activate(model, "small"), torch.no_grad():
        assert not torch.allclose(model(**inputs).logits, expected)
    take_masks(small, trained)
    with peftcore.activate(model, "small"), torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=0, atol=0)
    small.save(tmp_path)
    bits = sum(b.numel() for each in small.operators.values() for b in each.buffers())
    scores = sum(p.numel() for each in trained.operators.values() for p in each.parameters())
    assert 8 * bits == scores
    assert all(each.state_dict().keys() == {"down_bits", "up_bits"} for each in small.operators.values())
    torch.manual_seed(0)
    fresh, _ = HOSTS["llama"].build()
    peftcore.load(fresh, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(fresh(**inputs).logits, expected, rtol=0, atol=0)


def test_fixed_masks_let_the_prototype_train() -> None:
    model, inputs = HOSTS["llama"].build()
    small = peftcore.apply(model, "propetl", masks="fixed")
    model.train()(**inputs).logits.square().mean().backward()
    [prototype] = small.shared.values()
    assert {id(p) for p in small.parameters()} == {id(p) for p in prototype.parameters()}
    assert all(p.grad is not None and p.grad.any() for p in prototype.parameters())
    before = [each.clone() for operator in small.operators.values() for each in operator.buffers()]
    small.optimizer(torch.optim.AdamW, lr=1e-2).step()
    assert all(map(torch.equal, before, (b for operator in small.operators.values() for b in operator.buffers())))


def test_masks_are_taken_between_the_same_layers_alone() -> None:
    model, _ = HOSTS["llama"].build()
    trained = peftcore.apply(model, "propetl", name="trained")
    small = peftcore.apply(model, "propetl", name="small", masks="fixed")
    other = peftcore.apply(model, "propetl", name="other", masks="fixed", bottleneck=5)
    lora = peftcore.apply(model, "lora", name="lora")
    for pair in ((trained, small), (small, small), (other, trained), (small, lora), (lora, trained)):
        before = {name: value.clone() for name, value in pair[0].state_dict().items()}
        with pytest.raises(ConfigError, match='masks="fixed"'):
            take_masks(*pair)
        torch.testing.assert_close(dict(pair[0].state_dict()), before)


def test_scores_learn_faster_and_biases_do_not_decay() -> None:
    """As in the script of the authors: 1e-4, and 3e-3 for masks."""
    model, _ = HOSTS["llama"].build()
    injection = peftcore.apply(model, "propetl")
    optimizer = injection.optimizer(torch.optim.AdamW, lr=1e-4, weight_decay=0.1)
    found = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    named = [(name, p) for _, module in injection.modules() for name, p in module.named_parameters()]
    assert len(found) == len(named)
    for name, parameter in named:
        lr, decay = found[id(parameter)]
        assert lr == pytest.approx(3e-3 if "scores" in name else 1e-4) and decay == (0.0 if "bias" in name else 0.1)


@against("authors", "propetl", **CODE, part="start")
def test_start() -> None:
    """Each layer has scores of its own."""
    model, told = nn.Sequential(nn.Linear(2, 400), nn.Linear(2, 400)), frozen(NUMBERS, "start")
    injection = peftcore.apply(model, "propetl", target=["0", "1"], placement="branch", bottleneck=100)
    (prototype,), (first, second) = injection.shared.values(), injection.operators.values()
    for name in MAPS:
        one, other = (each.get_tensor(f"{name}_scores") for each in (first, second))
        same_start(one, told.pop(f"{name}_scores"))
        assert not torch.equal(one, other)
    assert told.keys() == dict(prototype.named_parameters()).keys()
    for name, each in told.items():
        same_start(prototype.get_parameter(name), each)


@against("authors", "propetl", **CODE, part="trains")
def test_what_trains_is_what_the_authors_train() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.Linear(3, 8))
    injection = peftcore.apply(model, "propetl", target=["0", "1"], placement="branch", bottleneck=4)
    (prototype,) = injection.shared.values()
    names = {"down": "adapter_down.0", "up": "adapter_up"}
    sizes = {}
    for name in MAPS:
        for kind, own in prototype.get_submodule(name).named_parameters():
            sizes[f"0.adapters.it.{names[name]}.{kind}"] = own.numel()
        for path, operator in injection.operators.items():
            sizes[f"{path}.adapters_mask.it.{name}_mask"] = operator.get_parameter(f"{name}_scores").numel()
    assert sizes == frozen(NUMBERS, "trains")
    assert sum(value.numel() for value in injection.parameters()) == sum(sizes.values())


@against("authors", "propetl", **CODE, part="defaults")
def test_defaults_are_the_authors() -> None:
    same_defaults(peftcore.apply(HOSTS["llama"].build()[0], "propetl").config, frozen(NUMBERS, "defaults"))
