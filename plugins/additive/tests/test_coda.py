"""CoDA: the kit; the soft top-k found in another way; the equation a row at a time, on the chosen tokens alone;
padding; what is chosen and how it starts; what is refused."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn

import peftcore
from peftcore.errors import SequenceError, UnsupportedSite
from peftcore.testing import HOSTS, conformance
from peftcore.testing.kit import fill
from peftcore.testing.tools import without_fast_paths
from peftcore_additive.coda import soft_top_k

SOFT: dict[str, Any] = {"reduction": 2.0, "bottleneck": 4, "temperature": 0.5, "steps": 400}


@conformance("coda", telling=["bert", "encoder"], options={"*": {"reduction": 1.5, "bottleneck": 4}})
def test_conformance(check: Callable[[], None]) -> None:
    check()


def shares_of(scores: Tensor, k: float, temperature: float) -> Tensor:
    """lambda of one row, by bisection for the number that is added to its scores; then one step of Newton's, so that
    gradients are those of the solution."""
    if k >= len(scores):
        return torch.ones_like(scores)
    low, high = -scores.detach().max() - 60, -scores.detach().min() + 60
    for _ in range(200):
        a = (low + high) / 2
        total = ((scores.detach() + a).clamp(max=0) / temperature).exp().sum()
        low, high = (a, high) if total < k else (low, a)
    shares = ((scores + a).clamp(max=0) / temperature).exp()
    slope = (shares.detach() * (scores.detach() + a < 0)).sum() / temperature
    a = a - (shares.sum() - k) / slope
    return ((scores + a).clamp(max=0) / temperature).exp()


@pytest.mark.parametrize("temperature", [0.3, 0.05])
def test_soft_top_k_is_the_solution(temperature: float) -> None:
    """Of sharp and of flat scores, with padding; ``sum = k``, and gradients."""
    torch.manual_seed(0)
    scores = (torch.randn(4, 9).double() * torch.tensor([[0.1], [1.0], [3.0], [1.0]])).requires_grad_()
    real = torch.arange(9) < torch.tensor([[9], [9], [9], [4]])
    k = torch.tensor([[3], [3], [3], [2]])
    shares = soft_top_k(scores, k, real, temperature, 3000)
    torch.testing.assert_close(shares.sum(-1), k[:, 0].double(), rtol=1e-6, atol=0)
    expected = [shares_of(row[seen], each.item(), temperature) for row, seen, each in zip(scores, real, k, strict=True)]
    direction = torch.randn(4, 9).double()
    first = torch.autograd.grad((shares * direction).sum(), scores)[0]
    second = torch.autograd.grad(
        sum((each * d[seen]).sum() for each, d, seen in zip(expected, direction, real, strict=True)), scores
    )[0]
    for row, seen, each in zip(shares, real, expected, strict=True):
        torch.testing.assert_close(row[seen], each, rtol=1e-6, atol=1e-7)
        assert not row[~seen].any()
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)


def test_twenty_steps_get_near() -> None:
    scores = torch.randn(8, 60, generator=torch.Generator().manual_seed(0))
    shares = soft_top_k(scores, torch.full((8, 1), 20), torch.ones(1, 60).bool(), 0.1, 20)
    assert shares.sum(-1).min() > 15 and shares.sum(-1).max() <= 20.01 and shares.max() <= 1.01
    assert (shares.topk(20).values.sum(-1) > 0.9 * shares.sum(-1)).all()


# Of each host: its blocks, and what it is told of padding.
BLOCKS = {"bert": "bert.encoder.layer.{}", "vit": "vit.layers.{}", "encoder": "encoder.layers.{}"}
REAL = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])


def built(name: str) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    model, inputs = HOSTS[name].build()
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    return model.double().eval().requires_grad_(False), inputs


def run(name: str, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    return HOSTS[name].output(model(**inputs))


def by_row(block: nn.Module, t: dict[str, Tensor], real: Tensor | None) -> Callable[..., Any]:
    """What a block returns, a row at a time, with its tokens that are no padding, and no mask."""
    inner = block.forward

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        rows = []
        for number, row in enumerate(x):
            seen = torch.ones(len(row)).bool() if real is None else real[number]
            tokens = row[seen]
            k = -(-len(tokens) // 2)
            shares = shares_of(tokens @ t["router"], k, 0.5)
            chosen = shares.argsort(descending=True)[:k].sort().values
            output = inner(tokens[chosen][None])
            z = (output[0] if isinstance(output, tuple) else output)[0]
            centred = row - row.mean(-1, keepdim=True)
            normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
            y = row + (normed @ t["down.weight"].T + t["down.bias"]).clamp(min=0) @ t["up.weight"].T + t["up.bias"]
            places = seen.nonzero()[:, 0][chosen]
            for place, share, after in zip(places.tolist(), shares[chosen], z, strict=True):
                moved = torch.zeros_like(y).index_put((torch.tensor([place]),), (share * (after - row[place]))[None])
                y = y + moved
            rows.append(y)
        return torch.stack(rows)

    return forward


@pytest.mark.parametrize("name", BLOCKS)
def test_equation(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base, inputs = built(name)
    model, copies = deepcopy(base), []
    with without_fast_paths():
        plain = run(name, base, inputs)
    injection = peftcore.apply(model, "coda", **SOFT, dtype="float64")
    fill(injection)
    for number in (0, 1):
        block, path = base.get_submodule(BLOCKS[name].format(number)), BLOCKS[name].format(number)
        tensors = {k: p.detach().clone().requires_grad_() for k, p in injection.operators[path].named_parameters()}
        copies.append((path, tensors))
        monkeypatch.setattr(block, "forward", by_row(block, tensors, None if name == "vit" else REAL))
    with without_fast_paths():
        ours, expected = run(name, model, inputs), run(name, base, inputs)
    real = ours if name != "encoder" else ours[REAL]
    wanted = expected if name != "encoder" else expected[REAL]
    assert (expected - plain).abs().max() > 1e-2 * plain.abs().max()
    torch.testing.assert_close(real, wanted, rtol=1e-6, atol=1e-7)
    direction = torch.randn_like(real)
    for output in (real, wanted):
        (output * direction).sum().backward()
    for path, tensors in copies:
        for key, parameter in injection.operators[path].named_parameters():
            assert tensors[key].grad.abs().max() > 0
            torch.testing.assert_close(parameter.grad, tensors[key].grad, rtol=1e-4, atol=1e-6, msg=f"{path}.{key}")


def test_padding_changes_nothing() -> None:
    """Rows that are padded on either side are what they are by themselves."""
    model, _ = built("bert")
    fill(peftcore.apply(model, "coda", **SOFT, dtype="float64"))
    ids = torch.tensor([[7, 3, 9, 11, 20], [5, 30, 8, 4, 39]])
    alone = model(input_ids=ids).logits
    pads, ones = torch.zeros(2, 4, dtype=torch.long), torch.ones(2, 5, dtype=torch.long)
    right = model(input_ids=torch.cat([ids, pads], 1), attention_mask=torch.cat([ones, pads], 1)).logits
    torch.testing.assert_close(right, alone, rtol=1e-9, atol=1e-9)


def test_the_block_gets_the_chosen_tokens_alone() -> None:
    model, inputs = built("vit")
    injection = peftcore.apply(model, "coda", reduction=2.5)
    sizes: list[int] = []
    model.vit.layers[0].attention.register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape[1]))
    count = model.vit.embeddings(inputs["pixel_values"]).shape[1]
    run("vit", model, inputs)
    assert sizes == [2] and count == 5
    assert sum(p.numel() for p in injection.operators["vit.layers.0"].parameters()) == 2 * 16 * 64 + 64 + 2 * 16


def test_with_all_tokens_it_starts_as_the_model() -> None:
    model, inputs = built("bert")
    plain = run("bert", model, inputs)
    operator: Any = peftcore.apply(model, "coda", reduction=1).operators["bert.encoder.layer.0"]
    assert operator.router.any() and operator.router.abs().max() <= 0.25 and operator.steps == 20
    torch.testing.assert_close(run("bert", model, inputs), plain)


@pytest.mark.parametrize(
    ("name", "target", "reason"),
    [
        ("llama", None, "later tokens would influence"),
        ("gpt2", None, "later tokens would influence"),
        ("t5", "encoder.block.0", "computes positions inside its block"),
        ("t5", "decoder.block.1", "later tokens would influence"),
        ("convnet", "last", "not a block"),
    ],
)
def test_where_it_cannot_be(name: str, target: str | None, reason: str) -> None:
    with pytest.raises(UnsupportedSite, match=reason):
        peftcore.apply(built(name)[0], "coda", target=target)


def test_arguments_that_nobody_can_cut_are_refused() -> None:
    model, inputs = built("t5")
    peftcore.apply(model, "coda", target="encoder.block.1")
    with pytest.raises(SequenceError, match="position_bias"):
        run("t5", model, inputs)
    layers: Any = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 1).eval()
    peftcore.apply(layers, "coda")
    with pytest.raises(SequenceError, match="later tokens would influence"):
        layers(torch.randn(2, 5, 8), mask=nn.Transformer.generate_square_subsequent_mask(5))


def test_tokens_that_stand_in_rows_and_columns_are_refused() -> None:
    """As those of timm's Swin: a row of an image is no token."""
    model = timm.create_model("swinv2_tiny_window8_256", img_size=32, window_size=4, num_classes=3).eval()
    peftcore.apply(model, "coda")
    with pytest.raises(SequenceError, match="2, 8, 8, 96"):
        model(torch.randn(2, 3, 32, 32))


def test_positions_are_cut_too() -> None:
    """Of a bidirectional encoder with rotary positions: the chosen tokens keep theirs."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.ModernBertConfig(
        **sizes, vocab_size=40, pad_token_id=0, layer_types=["full_attention"] * 2, attn_implementation="eager"
    )
    model = transformers.ModernBertModel(config).double().eval()
    injection = peftcore.apply(model, "coda", **SOFT, target="layers.1", dtype="float64")
    ids = torch.tensor([[7, 3, 9, 11, 20]])
    operator: Any = injection.operators["layers.1"]
    seen: list[Any] = []
    model.layers[1].attn.register_forward_hook(lambda *told: seen.append(told), with_kwargs=True)
    model(input_ids=ids)
    (_, _, kwargs, _) = seen[0]
    cos = next(iter(kwargs["position_embeddings"]))
    whole = model.rotary_emb(torch.zeros(1, 5, 16).double(), torch.arange(5)[None], "full_attention")[0]
    states = model.layers[0](model.embeddings(ids), position_embeddings=model.rotary_emb(
        torch.zeros(1, 5, 16).double(), torch.arange(5)[None], "full_attention"))  # fmt: skip
    shares = operator.shares(states, torch.tensor([[3]]), torch.ones(1, 5).bool())
    chosen = shares[0].topk(3).indices.sort().values
    assert chosen.tolist() != [0, 1, 2]
    torch.testing.assert_close(cos, whole[:, chosen], rtol=1e-6, atol=1e-6)
