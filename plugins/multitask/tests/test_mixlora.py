"""MixLoRA: the kit; numbers of the authors' layer; the balancing loss of transformers' Mixtral, with padding;
generation with caches and beams; what is refused."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_pairs import difference
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

import peftcore
from peftcore.errors import ConfigError, NotMergeable, RouteError, UnsupportedSite
from peftcore.testing import HOSTS, against, conformance, drawn, frozen, same_defaults, same_start
from peftcore.testing.kit import fill

D, INNER, EXPERTS, RANK = 6, 10, 4, 2
MATRICES = ("gate_proj", "up_proj", "down_proj")
OPTIONS: dict[str, Any] = {"experts": EXPERTS, "rank": RANK, "alpha": 3.0, "dropout": 0.0}
NUMBERS = Path(__file__).parent / "numbers" / "mixlora.json"
CODE: Any = {"repository": "TUDB-Labs/MixLoRA", "commit": "d59d09b", "script": "mixlora/model.py"}


# A rank for which nothing that is kept is as large as a weight of the hosts.
ONE_A_TOKEN = {"experts": 4, "rank": 3, "top_k": 1}


# With two experts a token, the tokens of an expert would be as large as a matrix in three hosts.
@conformance(
    "mixlora",
    options={"*": {"experts": 4, "rank": 3}, "t5": ONE_A_TOKEN, "unet": ONE_A_TOKEN, "dit": ONE_A_TOKEN},
)
def test_conformance(check: Callable[[], None]) -> None:
    check()


def wave(*shape: int, step: float) -> Tensor:
    """Numbers that are the same everywhere: sin(0), sin(step), sin(2 step), ..."""
    return (torch.arange(math.prod(shape), dtype=torch.float64) * step).sin().view(shape)


def host(width: int = D, inner: int = INNER, layers: int = 1) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=1,
        num_key_value_heads=1, max_position_embeddings=64, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


def operators(injection: Any, block: str = "model.layers.0.mlp") -> tuple[Any, list[Any]]:
    found = {path.partition(":")[0]: each for path, each in injection.operators.items()}
    return found[block], [found[f"{block}.{name}"] for name in MATRICES]


@against("authors", "mixlora", **CODE)
def test_numbers_of_the_authors() -> None:
    """The feed-forward of a Llama: its output, and the gradients of input, router and factors."""
    model = host()
    mlp = model.model.layers[0].mlp
    injection = peftcore.apply(model, "mixlora", **OPTIONS, dtype="float64")
    router, matrices = operators(injection)
    with torch.no_grad():
        router.router.copy_(wave(EXPERTS, D, step=0.7))
        for number, (name, op) in enumerate(zip(MATRICES, matrices, strict=True)):
            weight = mlp.get_submodule(name).weight
            weight.copy_(wave(*weight.shape, step=1.1 + number))
            op.A.copy_(wave(*op.A.shape, step=1.7 + number))
            op.B.copy_(wave(*op.B.shape, step=2.3 + number))
    x = wave(2, 4, D, step=0.9).requires_grad_()
    y = mlp(x)
    (y * wave(2, 4, D, step=0.3)).sum().backward()
    found = {"y": y, "x": x.grad, "router": router.router.grad}
    for name, op in zip(MATRICES, matrices, strict=True):
        found |= {f"{name}.A": op.A.grad, f"{name}.B": op.B.grad}
    numbers = frozen(NUMBERS)
    assert numbers.keys() == found.keys()
    for name, value in found.items():
        expected = torch.tensor(numbers[name], dtype=torch.float64)
        torch.testing.assert_close(value.flatten(), expected, rtol=1e-9, atol=1e-10, msg=name)


@against("authors", "mixlora", **CODE, part="start")
def test_start_is_the_authors() -> None:
    """Of the router their code has the deviation alone."""
    told = frozen(NUMBERS, "start")
    router, (gate, *_) = operators(peftcore.apply(host(2000, 4), "mixlora", experts=20, rank=4))
    same_start(gate.A, told["A"])
    same_start(gate.B, told["B"])
    assert (
        router.router.std().item() == pytest.approx(told["router"], rel=0.02) and drawn(router.router)["kurtosis"] > 2.8
    )


@against("authors", "mixlora", **CODE, part="defaults")
def test_defaults_are_the_authors() -> None:
    same_defaults(peftcore.apply(host(), "mixlora").config, frozen(NUMBERS, "defaults"))


@pytest.mark.parametrize("padded", [False, True])
def test_the_balancing_loss_is_that_of_mixtral(padded: bool) -> None:
    """All layers together, over the tokens that are no padding: values and gradients of the routers."""
    model = host(16, 24, layers=2).train()
    injection = peftcore.apply(model, "mixlora", **OPTIONS, balance=0.7, dtype="float64")
    fill(injection)
    ids = torch.randint(1, 40, (3, 7), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :3] = 0
        mask[1, 5:] = 0
    routers = [operators(injection, f"model.layers.{layer}.mlp")[0] for layer in range(2)]
    seen: list[Tensor] = []
    hooks = [
        model.model.layers[layer].mlp.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        for layer in range(2)
    ]
    model(input_ids=ids, attention_mask=mask)
    for hook in hooks:
        hook.remove()
    ours = injection.losses()
    logits = tuple(x.flatten(0, 1) @ each.router.T for x, each in zip(seen, routers, strict=True))
    theirs = 0.7 * load_balancing_loss_func(logits, EXPERTS, 2, mask if padded else None)
    torch.testing.assert_close(ours.float(), theirs, rtol=1e-6, atol=1e-8)  # theirs counts in float32
    weights = [each.router for each in routers]
    pairs = zip(
        torch.autograd.grad(ours, weights, retain_graph=True), torch.autograd.grad(theirs, weights), strict=True
    )
    for own, their in pairs:
        assert difference(own, their) < 1e-5 and own.abs().max() > 1e-6


def test_the_loss_joins_that_of_the_model() -> None:
    model = host(16, 24, layers=2).train()
    injection = peftcore.apply(model, "mixlora", **OPTIONS, balance=0.7, dtype="float64")
    ids = torch.randint(1, 40, (3, 7))
    with_it = model(input_ids=ids, labels=ids).loss
    model.eval()
    assert 1.0 < (with_it - model(input_ids=ids, labels=ids).loss) / 0.7 < 4.0  # top_k where all are alike
    assert injection.losses() == 0


@pytest.mark.parametrize("way", ["greedy", "beams", "static", "left"])
def test_a_cache_changes_nothing(way: str) -> None:
    model = host(16, 24, layers=2)
    injection = peftcore.apply(model, "mixlora", **OPTIONS, dtype="float64")
    with torch.no_grad():
        for parameter in injection.parameters():
            parameter.normal_(0, 0.5)
    ids = torch.randint(1, 40, (3, 7), generator=torch.Generator().manual_seed(4))
    told: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    if way == "beams":
        told |= {"num_beams": 3}
    if way == "left":
        ids[0, :3] = 0
    told["attention_mask"] = ids.ne(0).long()
    cached = {**told, "use_cache": True, **({"cache_implementation": "static"} if way == "static" else {})}
    whole = {"return_dict_in_generate": True, "output_logits": True}
    plain = model.generate(ids, **told, **whole, use_cache=False)
    found = model.generate(ids, **cached, **whole)
    assert torch.equal(found.sequences, plain.sequences)
    assert difference(torch.stack(found.logits), torch.stack(plain.logits)) < 1e-10
    assert not torch.equal(host(16, 24, layers=2).generate(ids, **told), plain.sequences)


def test_other_matrices_have_one_update() -> None:
    """Beside the mixture, as in the authors' code, plain LoRA; targets by path are told by where they stand."""
    injection = peftcore.apply(host(), "mixlora", **OPTIONS, target=["*.q_proj", "*.up_proj"])
    shapes = {path.rpartition(".")[2]: len(each.A) for path, each in injection.operators.items() if "_proj" in path}
    assert shapes == {"q_proj": 1, "up_proj": EXPERTS}


def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match="top_k=3 is more than the 2"):
        peftcore.apply(host(), "mixlora", experts=2, top_k=3)
    with pytest.raises(UnsupportedSite, match="use lora"):
        peftcore.apply(host(), "mixlora", target="attn.q")
    bert, _ = HOSTS["bert"].build()
    with pytest.raises(UnsupportedSite, match="not a separate module"):
        peftcore.apply(bert, "mixlora")
    with pytest.raises(UnsupportedSite):
        peftcore.apply(nn.Sequential(nn.Linear(4, 4)), "mixlora", target="0")
    model = host()
    injection = peftcore.apply(model, "mixlora", name="mixed")
    with pytest.raises(NotMergeable):
        injection.merge()
    with pytest.raises(RouteError, match="whole batch"), peftcore.route(model, ["mixed", None]):
        model(input_ids=torch.ones(2, 3, dtype=torch.long))
