"""AdaMix: the kit; numbers of the authors' RoBERTa in training, with both passes and their loss, and in evaluation; the
loss once more for tokens, for rows of a route, and in steps; what it has and what it refuses."""

import itertools
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftcore
from peftcore.author import forward_context
from peftcore.errors import TrainingError
from peftcore.testing import HOSTS, against, conformance, frozen, same_defaults, same_start
from peftcore.testing.kit import fill

SIZES = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_labels": 3}
SIZES |= {"num_attention_heads": 2, "max_position_embeddings": 16, "pad_token_id": 1, "type_vocab_size": 1}
STILL: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
IDS = torch.tensor([[2, 5, 3, 9, 4], [4, 10, 7, 1, 1], [8, 3, 6, 2, 9]])
GIVEN = {"input_ids": IDS, "attention_mask": (IDS != 1).long(), "labels": torch.tensor([0, 2, 1])}
DRAWS = [0, 2, 1, 2, 2, 1, 0, 0]
"""Down and up map of the first layer, of the second one; then those of the second pass."""
NUMBERS = Path(__file__).parent / "numbers" / "adamix.json"
CODE: Any = {
    "repository": "microsoft/AdaMix",
    "commit": "d361e9d",
    "script": "src/transformers/models/roberta/modeling_roberta.py",
}


# Most hosts of the kit have no logits, and its training takes no losses that wait.
@conformance(
    "adamix",
    options={
        "*": {"consistency": 0.0},
        "mlp": {"consistency": 0.0, "bottleneck": 5},  # at 16 it would be as wide as the host
        **{name: {} for name in ("llama", "gpt2", "t5")},
    },
)
def test_conformance(check: Callable[[], None]) -> None:
    check()


def wave(shape: torch.Size, key: str) -> Tensor:
    """The cosines that a tensor of this name has where numbers of the authors' code are made."""
    count = shape.numel()
    return torch.cos(torch.arange(count, dtype=torch.float64) * 1.7 + zlib.crc32(key.encode()) % 97).view(shape) / 2


def roberta(**options: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.RobertaConfig(**SIZES, **STILL, layer_norm_eps=1e-5, **options)
    model: nn.Module = transformers.RobertaForSequenceClassification(config)
    return model.double().train()


def drawing(monkeypatch: pytest.MonkeyPatch, draws: Iterator[int]) -> None:
    monkeypatch.setattr(torch, "randint", lambda high, size, device: torch.tensor([next(draws)], device=device))


def places(injection: peftcore.Injection) -> dict[str, tuple[nn.Parameter, int]]:
    """Our tensors, and the copies in them, by the names of the authors' tensors."""
    found = {}
    for layer in range(2):
        for name, own in injection.operators[f"roberta.encoder.layer.{layer}.output.dense"].named_parameters():
            side, kind = ("MoA_A" if "down" in name else "MoA_B"), ("bias" if "bias" in name else "weight")
            for index in range(len(own)):
                path = f"roberta.encoder.layer.{layer}.output.ExpertSoup.{side}.deepspeed_experts.{index}.{kind}"
                found[path] = own, index
    return found


@pytest.mark.parametrize("shared", ["up", "down", None])
@against("authors", "adamix", **CODE)
def test_numbers_of_the_authors(shared: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss of two passes, all gradients, the logits; those of the mean in evaluation."""
    model, numbers = roberta(), frozen(NUMBERS)[str(shared).lower()]
    injection = peftcore.apply(model, "adamix", experts=3, bottleneck=5, shared=shared, dtype="float64")
    owned = places(injection)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(wave(parameter.shape, name) * (4 if name.startswith("classifier") else 1))
        for path, (own, index) in owned.items():
            own[index].copy_(4 * wave(own[index].shape, path))
    of_one = [shared == "down", shared == "up"] * 4
    drawing(monkeypatch, iter([draw for draw, alone in zip(DRAWS, of_one, strict=True) if not alone]))
    output = model(**GIVEN)
    output.loss.backward()
    assert output.logits.flatten().tolist() == pytest.approx(numbers["logits"], abs=1e-8)
    assert output.loss.item() == pytest.approx(numbers["loss"][0], rel=1e-6)
    assert output.loss - nn.functional.cross_entropy(output.logits, GIVEN["labels"]) > 1e-3
    assert numbers["gradients"].keys() == owned.keys()
    for path, (own, index) in owned.items():
        assert own.grad is not None
        wanted = torch.tensor(numbers["gradients"][path], dtype=torch.float64)
        torch.testing.assert_close(own.grad[index].flatten(), wanted.expand(own[index].numel()), rtol=1e-5, atol=1e-6)
    model.eval()
    assert model(**GIVEN).logits.flatten().tolist() == pytest.approx(numbers["evaluated"], abs=1e-8)


def divergence(one: Tensor, other: Tensor) -> Tensor:
    """(KL(p | q) + KL(q | p)) / 2 = sum (p - q) (log p - log q) / 2."""
    p, q = one.softmax(-1), other.softmax(-1)
    return 0.5 * ((p - q) * (p.log() - q.log())).sum(-1)


def llama() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, inputs = HOSTS["llama"].build()
    return model.double().train(), inputs["input_ids"][:, :5]


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loss_is_of_tokens_that_are_no_padding(side: str) -> None:
    """Beside two forwards with the same draws."""
    model, ids = llama()
    injection = peftcore.apply(model, "adamix", consistency=3.0, dtype="float64")
    fill(injection)
    mask = torch.ones_like(ids)
    mask[0, slice(2) if side == "left" else slice(3, None)] = 0
    torch.manual_seed(0)
    one = model(input_ids=ids, attention_mask=mask).logits
    found = injection.losses()
    plain, _ = llama()
    twin = peftcore.apply(plain, "adamix", consistency=0.0, dtype="float64")
    fill(twin)
    torch.manual_seed(0)
    first, other = (plain(input_ids=ids, attention_mask=mask).logits for _ in range(2))
    assert torch.equal(one, first)
    torch.testing.assert_close(found, 3 * divergence(first, other)[mask == 1].mean(), rtol=1e-10, atol=1e-14)
    assert found > 1e-6


def test_in_a_route_the_loss_is_of_the_adapters_own_rows() -> None:
    model, ids = llama()
    rows = ids[:1].repeat(3, 1)
    rows[2] = ids[1] if len(ids) > 1 else rows[2].flip(0)
    for name in ("one", "other"):
        fill(peftcore.apply(model, "adamix", name=name, dtype="float64", experts=2), seed=len(name))
    one, other = (peftcore.injections(model)[name] for name in ("one", "other"))
    draws = itertools.cycle([0, 1, 1, 0, 1])
    passes: list[Tensor] = []
    model.lm_head.register_forward_hook(lambda module, args, output: passes.append(output.detach()))  # type: ignore[union-attr,operator]
    with pytest.MonkeyPatch.context() as patch, peftcore.route(model, ["one", None, "other"]):
        drawing(patch, draws)
        model(input_ids=rows)
    first, *others = passes
    assert len(others) == 2
    found = torch.stack([one.losses(), other.losses()])
    wanted = torch.stack([divergence(first[row], each[row]).mean() for row, each in zip((0, 2), others, strict=True)])
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-14)
    assert wanted.min() > 1e-8
    assert torch.equal(first[1], others[0][1])


def test_copies_that_are_alike_have_no_loss_and_the_mean_in_training_neither() -> None:
    for options in ({"experts": 1}, {"routing": "mean"}):
        model, ids = llama()
        injection = peftcore.apply(model, "adamix", **options, dtype="float64")
        fill(injection)
        trained = model(input_ids=ids).logits
        assert injection.losses() == 0
        torch.testing.assert_close(trained, model.eval()(input_ids=ids).logits)


def test_the_host_runs_once_without_the_loss_and_in_evaluation() -> None:
    for consistency, training, wanted in ((0.0, True, 1), (1.0, False, 1), (1.0, True, 2)):
        model, ids = llama()
        peftcore.apply(model, "adamix", consistency=consistency)
        passes: list[Any] = []
        model.lm_head.register_forward_hook(lambda *_, passes=passes: passes.append(forward_context().extra))  # type: ignore[union-attr,operator]
        model.train(training)(input_ids=ids)
        assert passes == [False, True][:wanted]


def test_a_step_under_checkpoints_is_one_without() -> None:
    found = []
    for again in (False, True):
        model, ids = llama()
        injection = peftcore.apply(model, "adamix", dtype="float64")
        fill(injection)
        if again:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
        torch.manual_seed(0)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        found.append([loss, *(p.grad for p in injection.parameters())])
    torch.testing.assert_close(*found)


def test_what_has_no_logits_is_refused() -> None:
    transformers = pytest.importorskip("transformers")
    backbone = transformers.RobertaModel(transformers.RobertaConfig(**SIZES)).train()
    peftcore.apply(backbone, "adamix")
    with pytest.raises(TrainingError, match="consistency=0"):
        backbone(input_ids=IDS)
    backbone.eval()(input_ids=IDS)


def test_a_cache_is_refused() -> None:
    transformers = pytest.importorskip("transformers")
    model, ids = llama()
    peftcore.apply(model, "adamix")
    with pytest.raises(TrainingError, match="past_key_values"):
        model(input_ids=ids, past_key_values=transformers.DynamicCache())


def test_a_tuple_has_its_logits_behind_the_loss() -> None:
    torch.manual_seed(0)
    model = roberta(initializer_range=0.5)
    injection = peftcore.apply(model, "adamix", dtype="float64")
    fill(injection)
    losses = []
    for given in (GIVEN, {**GIVEN, "labels": None}):
        for as_dict in (True, False):
            torch.manual_seed(0)
            output = model(**given, return_dict=as_dict)
            waiting = injection.losses()
            losses.append(waiting if waiting else output[0] - nn.functional.cross_entropy(output[1], given["labels"]))
    for each in losses[1:]:
        torch.testing.assert_close(each, losses[0], rtol=1e-6, atol=1e-12)
    assert losses[0] > 1e-6


@pytest.mark.parametrize(
    ("sizes", "bottleneck", "head", "trained", "file", "printed"),
    [
        ((1024, 4096, 24, 16), 16, 1024 * 1024 + 1024 + 3 * 1024 + 3, 0.8, 11.7, 811_392),
        ((768, 3072, 12, 12), 48, 3 * 768 + 3, 0.9, 8.5, 894_528),
    ],
)
def test_parameters_are_those_of_the_paper_and_of_the_authors_files(
    sizes: tuple[int, ...], bottleneck: int, head: int, trained: float, file: float, printed: int
) -> None:
    """RoBERTa-large with 0.8 and BERT-base with 0.9 million for one adapter, as the tables have it; the README's files
    of all copies and the head, in MB of 2**20 bytes."""
    transformers = pytest.importorskip("transformers")
    width, inner, layers, heads = sizes
    config = transformers.RobertaConfig(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads
    )
    with torch.device("meta"):
        model = transformers.RobertaForSequenceClassification(config)
    one = peftcore.plan(model, "adamix", bottleneck=bottleneck, experts=1).trainable
    assert one == printed and round(one / 1e6, 1) == trained
    every = peftcore.plan(model, "adamix", bottleneck=bottleneck).trainable
    assert (every + head) * 4 / 2**20 == pytest.approx(file, abs=0.1)


@against("authors", "adamix", **CODE, part="start")
def test_start() -> None:
    """Each copy by itself."""
    injection = peftcore.apply(nn.Sequential(nn.Linear(2, 400)), "adamix", target="0", bottleneck=100, shared=None)
    op: Any = injection.operators["0"]
    for name, told in frozen(NUMBERS, "start").items():
        same_start(op.get_tensor(name), told)
    assert not torch.equal(op.down[0], op.down[1]) and not torch.equal(op.up[0], op.up[1])


@against("authors", "adamix", **CODE, part="trains")
def test_what_trains_is_what_the_authors_train() -> None:
    """The copies, and the head, which `train` names here."""
    model, told = roberta(), frozen(NUMBERS, "trains")
    head = {name: value.numel() for name, value in model.named_parameters() if name.startswith("classifier")}
    injection = peftcore.apply(model, "adamix", experts=3, bottleneck=5, train=["classifier"])
    assert sum(value.numel() for value in injection.parameters()) == sum(told.values())
    assert head | {path: own[index].numel() for path, (own, index) in places(injection).items()} == told


@against("authors", "adamix", **CODE, part="defaults")
def test_defaults_are_the_authors() -> None:
    same_defaults(peftcore.apply(llama()[0], "adamix").config, frozen(NUMBERS, "defaults"))
