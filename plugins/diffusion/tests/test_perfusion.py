"""Perfusion: the promises of the kit, and the numbers of lucidrains/perfusion-pytorch (`numbers/perfusion.json`)."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from runpy import run_path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from words_and_unet import WordsAndUNet

import peftcore
from peftcore.errors import (
    CalibrationError,
    ConfigError,
    MissingContext,
    PeftcoreError,
    RouteError,
    SequenceError,
    TrainingError,
    UnsupportedSite,
)
from peftcore.testing import HOSTS, against, conformance, frozen

EXACT = 1e-12
NUMBERS = Path(__file__).parent / "numbers" / "perfusion.json"
SCRIPT = run_path(str(NUMBERS.with_suffix(".py")))
WHERE, CONCEPTS, TEXT, CLASS = SCRIPT["WHERE"], SCRIPT["CONCEPTS"], SCRIPT["text"], SCRIPT["superclass"]
OPTIONS = {**SCRIPT["OPTIONS"], "damping": SCRIPT["DAMPING"]}
KEYS = ("attn2.to_k", "EncDecAttention.k")


ALIKE = {"beta": 0.7, "tau": 0.15, "ema": 1 - 1e-7}
"""So that the gate of training is that of evaluation, and the mean of a batch counts for next to nothing."""


def prompts(model: nn.Module, picture: Tensor) -> dict[str, Tensor]:
    """Where the concept is, and the states of a prompt with the class in its place: the same for all rows."""
    width = next(layer.in_features for name, layer in model.named_modules() if name.endswith(KEYS))
    assert isinstance(width, int)
    return {
        "concept": torch.tensor([1], device=picture.device),
        "superclass": picture.flatten()[: 4 * width].view(1, 4, width),
    }


FAILURES = {"it_learns-task": "its texts have no word of a class; what it learns is in test_it_learns_the_looks"}


@conformance("perfusion", telling=["unet", "t5"], options={"*": ALIKE}, context=prompts, expected_failures=FAILURES)
def test_conformance(check: Callable[[], None]) -> None:
    check()


class CrossAttention(nn.Module):
    """What makes keys and values of a text of which pictures read; returned as they are."""

    def __init__(self, **options: bool) -> None:
        super().__init__()
        sizes = SCRIPT["WIDTH"], SCRIPT["OUTPUTS"]
        self.to_q, self.to_out = nn.Linear(4, sizes[1]), nn.Linear(sizes[1], 4)
        self.to_k, self.to_v = (nn.Linear(*sizes, **options) for _ in range(2))

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        self.to_out(self.to_q(hidden_states))
        return self.to_k(encoder_hidden_states), self.to_v(encoder_hidden_states)


class Model(nn.Module):
    def __init__(self, **options: bool) -> None:
        super().__init__()
        self.attn2 = CrossAttention(bias=False, **options)
        self.double().requires_grad_(False)
        for kind, layer in (("cross.k", self.attn2.to_k), ("cross.v", self.attn2.to_v)):
            layer.weight.data.copy_(SCRIPT["weight"](kind))

    def forward(self, text: Tensor) -> dict[str, Tensor]:
        keys, values = self.attn2(text.new_zeros(1, 1, 4), encoder_hidden_states=text)
        return {"cross.k": keys, "cross.v": values}


def texts(concept: int) -> list[Any]:
    """The data: captions, and those with the class of the concept."""
    return [(SCRIPT["captions"](concept),), peftcore.Labelled((CLASS(concept, 0),), WHERE[concept])]


def applied(model: nn.Module, concept: int = 0, **options: Any) -> Any:
    target = ["attn2.to_k", "attn2.to_v"]
    options = {**OPTIONS, "target": target, "data": texts(concept), "dtype": "float64", **options}
    return peftcore.apply(model, "perfusion", name=f"concept {concept}", **options)


def step(model: nn.Module, concept: int, number: int) -> tuple[dict[str, Tensor], Tensor]:
    """What a step of training computes, backward included, and the text."""
    text = TEXT(concept, number).requires_grad_()
    with peftcore.call(model, concept=WHERE[concept], superclass=CLASS(concept, number)):
        found = model(text)
    return found, text


def backward(outputs: dict[str, Tensor], text: Tensor, kind: str) -> Tensor:
    """The gradient of a text by keys, or by values."""
    y = outputs[kind]
    (grad,) = torch.autograd.grad((y * SCRIPT["direction"](y)).sum(), text, retain_graph=True)
    return grad


def assert_close(name: str, **found: Tensor | None) -> None:
    for what, value in found.items():
        expected = torch.tensor(frozen(NUMBERS)[name][what], dtype=torch.float64)
        assert value is not None
        assert (value - expected).abs().max() < EXACT * expected.abs().max(), (name, what)


def taught(model: nn.Module, concept: int) -> Any:
    """An adapter after the steps of the script."""
    injection = applied(model, concept)
    peftcore.activate(model, injection.name)
    v = injection.operators["attn2.to_v"].v
    assert [*injection.parameters()] == [v]
    model.train()
    for number in SCRIPT["STEPS"]:
        outputs, text = step(model, concept, number)
        (outputs["cross.v"] * SCRIPT["direction"](outputs["cross.v"])).sum().backward(retain_graph=True)
        for kind, output in outputs.items():
            learned = {"v": v.grad} if kind == "cross.v" else {}
            assert_close(f"{kind} {concept} {number}", output=output, text=backward(outputs, text, kind), **learned)
        v.grad = None
        v.data += SCRIPT["noise"](concept, number)
    model.eval()
    return injection


@against(
    "others",
    "perfusion",
    repository="lucidrains/perfusion-pytorch",
    commit="9032150",
    script="perfusion_pytorch/perfusion.py",
)
def test_numbers_of_training_of_evaluation_and_of_two_concepts() -> None:
    """Outputs, and gradients of v and of texts; concepts at once add up, one behind the other or beside it."""
    model = Model()
    for concept in CONCEPTS:
        taught(model, concept)
    names = [f"concept {concept}" for concept in CONCEPTS]
    for name, active in (("0", names[:1]), ("1", names[1:]), ("both", names), ("both", names[::-1])):
        with peftcore.activate(model, *active):
            text = TEXT(0, 3).requires_grad_()
            outputs = model(text)
            for kind, output in outputs.items():
                assert_close(f"{kind} {name} eval", output=output, text=backward(outputs, text, kind))
    with peftcore.activate(model, peftcore.Sum(*names)):
        for kind, output in model(TEXT(0, 3)).items():
            assert_close(f"{kind} both eval", output=output)
    model.train()
    for several in (names, [peftcore.Sum(*names)]):
        with pytest.raises(TrainingError, match="activate one"), peftcore.activate(model, *several):
            step(model, 0, 3)


def test_the_file_has_what_training_kept_and_data_is_not_looked_at_again(tmp_path: Path) -> None:
    model, other = Model(), Model()
    taught(model, 0).save(tmp_path / "concept")
    peftcore.load(other.eval(), tmp_path / "concept")
    text = TEXT(0, 3)
    for kind, output in model(text).items():
        assert torch.equal(other(text)[kind], output)
    model.train()
    other.train()
    one, kept = (step(each, 0, 4)[0] for each in (model, other))
    for kind, output in one.items():
        assert torch.equal(kept[kind], output)


@pytest.mark.parametrize("name", ["inverse", "i"])
def test_a_file_without_a_concept_is_refused(name: str, tmp_path: Path) -> None:
    injection = applied(Model())
    own = injection.operators["attn2.to_k"]
    (own.concept if name == "i" else own.texts.module).get_buffer(name).zero_()
    injection.save(tmp_path / "concept")
    with pytest.raises(PeftcoreError, match=rf"{name} holds"):
        peftcore.load(Model(), tmp_path / "concept")


def test_rows_of_several_concepts() -> None:
    """Each row has the concept of its own, and in training moves that alone."""
    model = Model()
    injections = [taught(model, concept) for concept in CONCEPTS]
    names, text, separate = [each.name for each in injections], TEXT(0, 3), []
    for name in names:
        with peftcore.activate(model, name):
            separate.append(model(text))
    with peftcore.route(model, names):
        for kind, output in model(text).items():
            torch.testing.assert_close(output, torch.stack([separate[n][kind][n] for n in CONCEPTS]))
        model.train()
        before = [each.operators["attn2.to_k"].concept.i.clone() for each in injections]
        with peftcore.call(model, concept=WHERE[0]):
            model(text)
    for row, (old, each) in enumerate(zip(before, injections, strict=True)):
        new = text[row, WHERE[0][row]]
        i = each.operators["attn2.to_k"].concept.i
        torch.testing.assert_close(i, OPTIONS["ema"] * old + (1 - OPTIONS["ema"]) * new)


def test_what_is_told_has_to_fit() -> None:
    model = Model()
    injection = applied(model)
    kept = {name: tensor.clone() for name, tensor in injection.operators["attn2.to_k"].named_buffers()}
    model.train()
    told = {"concept": WHERE[0], "superclass": CLASS(0, 0)}
    wrong: list[tuple[type[Exception], dict[str, Tensor]]] = [
        (SequenceError, told | {"concept": torch.tensor([1, 5])}),
        (SequenceError, told | {"concept": torch.tensor([-1, 2])}),
        (SequenceError, told | {"superclass": CLASS(0, 0)[:, :3]}),
        (RouteError, told | {"concept": torch.tensor([1, 2, 3])}),
        (RouteError, told | {"superclass": torch.cat([CLASS(0, 0)] * 2)}),
        (MissingContext, {"superclass": CLASS(0, 0)}),
    ]
    for error, each in wrong:
        with pytest.raises(error), peftcore.call(model, **each):
            model(TEXT(0, 0))
    for name, tensor in injection.operators["attn2.to_k"].named_buffers():
        assert torch.equal(tensor, kept[name])


def test_a_checkpoint_repeats_the_averages_of_its_forward() -> None:
    """Two forwards before one backward, which goes through the second one first."""

    class Checkpointed(Model):
        def forward(self, text: Tensor) -> dict[str, Tensor]:
            found: dict[str, Tensor] = checkpoint(super().forward, text, use_reentrant=False)
            return found

    grads = []
    for model in (Model(), Checkpointed()):
        injection = applied(model)
        model.train()
        steps = [step(model, 0, number) for number in (0, 1)]
        sum((y * SCRIPT["direction"](y)).sum() for outputs, _ in steps for y in outputs.values()).backward()
        operator = injection.operators["attn2.to_v"]
        grads.append([*(text.grad for _, text in steps), operator.v.grad, operator.concept.i])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-13)


def test_a_concept_has_the_keys_of_its_class() -> None:
    """Where the concept is, r = 1: with an open gate its key is that of its class, which is kept however i moves on."""
    model, base = Model(), Model()
    applied(model, beta=-100.0, ema=0.0)
    model.train()
    where, text = torch.tensor([2]), TEXT(0, 1)[:1]
    with peftcore.call(model, concept=where):
        found = model(text)
    encoding = CLASS(0, 0)[torch.arange(2), WHERE[0]].mean(0)
    for kind, output in base(encoding.expand(1, 1, -1)).items():
        torch.testing.assert_close(found[kind][:, 2], output[:, 0])


@pytest.mark.slow
def test_it_learns_the_looks() -> None:
    """Of another Perfusion, in a UNet; texts that have little of the concept hardly change."""
    pytest.importorskip("diffusers")
    base, inputs = HOSTS["unet"].build()
    width, where = base.config.cross_attention_dim, torch.tensor([2, 3])
    text = 3 * torch.randn(2, 5, width)
    captions = [{**inputs, "encoder_hidden_states": torch.randn(2, 5, width)} for _ in range(20)]
    data = [*captions, peftcore.Labelled({**inputs, "encoder_hidden_states": text}, where)]
    teacher, pupil = deepcopy(base).eval(), deepcopy(base).eval()
    for operator in peftcore.apply(teacher, "perfusion", data=data).operators.values():
        if operator.v is not None:
            nn.init.normal_(operator.v)
    injection = peftcore.apply(pupil, "perfusion", data=data)
    optimizer = injection.optimizer(torch.optim.AdamW, lr=0.1, weight_decay=0.0)

    def loss(text: Tensor) -> Tensor:
        given = {**inputs, "encoder_hidden_states": text}
        return nn.functional.mse_loss(pupil(**given).sample, teacher(**given).sample)

    before = loss(text).item(), loss(captions[0]["encoder_hidden_states"]).item()
    assert before[1] < 0.1 * before[0]
    teacher.train(), pupil.train()
    for _ in range(60):
        with peftcore.call(teacher, concept=where), peftcore.call(pupil, concept=where):
            loss(text).backward()
        optimizer.step()
        optimizer.zero_grad()
    teacher.eval(), pupil.eval()
    assert loss(text).item() < 0.1 * before[0]


def test_what_is_no_text_is_refused() -> None:
    unet, inputs = HOSTS["unet"].build()
    with pytest.raises(UnsupportedSite, match=r"attn1\.to_k is not a linear layer for keys or values of a text"):
        peftcore.apply(unet, "perfusion", target="attn.k", data=[peftcore.Labelled(inputs, torch.tensor([1, 2]))])
    with pytest.raises(CalibrationError, match="more texts"):
        applied(Model(), data=[peftcore.Labelled((CLASS(0, 0)[:1, :3],), torch.tensor([1]))], damping=0.0)
    for labels in (torch.tensor([1, 5]), torch.tensor([1])):
        with pytest.raises(CalibrationError, match="one for each text"):
            applied(Model(), data=[peftcore.Labelled((CLASS(0, 0),), labels)])
    with pytest.raises(CalibrationError, match="position of the concept's class"):
        applied(Model(), data=texts(0)[:1])
    with pytest.raises(ConfigError, match="set initializer="):
        applied(Model(), tokens=[-1])


def test_words_train_along_where_the_host_has_them() -> None:
    """With the share of the gradient that is theirs."""
    pytest.importorskip("diffusers")
    inputs, ids = HOSTS["unet"].build()[1], torch.tensor([[1, 19, 4], [1, 2, 19]])
    del inputs["encoder_hidden_states"]
    base, grads = WordsAndUNet(), []
    for share in (1.0, 0.5):
        model = deepcopy(base)
        data = [peftcore.Labelled({"ids": torch.arange(20).view(2, 10), **inputs}, torch.tensor([3, 4]))]
        options = {"tokens": [-1], "initializer": 3, "target": ["cross.k", "cross.v"], "text_gradient": share}
        injection = peftcore.apply(model, "perfusion", data=data, **options)
        words: Any = injection.operators["words/words"]
        assert torch.equal(words.vectors, model.words.weight[3:4])
        model.train()
        with peftcore.call(model, concept=torch.tensor([1, 2])):
            model(ids, **inputs).square().sum().backward()
        assert words.vectors.grad.any()
        grads.append(words.vectors.grad)
    torch.testing.assert_close(grads[1], 0.5 * grads[0])
