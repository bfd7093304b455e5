"""InfoPrompt: the kit; the authors' prompts and losses with gradients; the losses on hosts, written a second time."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from prompted_hosts import host
from sines import wave
from torch import Tensor

import peftcore
from peftcore.errors import ConfigError
from peftcore.testing import against, conformance, frozen, same_defaults, same_start
from peftcore.testing.kit import fill
from peftcore_additive.infoprompt import HeadLoss, info_nce

NUMBERS = Path(__file__).parent / "numbers" / "infoprompt.json"
CODE: Any = {"repository": "JoshuaWu1997/infoprompt", "commit": "cc56fba", "script": "model/RoBertaPrompt.py"}
SMALL = {"length": 2, "hidden": 4}
BREAKS = "the first pass, in which another choice holds, breaks the graph"
HOST_NAMES = ("llama", "bert", "t5", "gpt2", "moe", "mistral")
IDS, MASK = torch.tensor([[5, 6, 7, 8], [9, 3, 4, 1]]), torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])


@conformance(
    "infoprompt",
    options={"*": SMALL},
    context=lambda model, picture: {"prompt_length": 3},
    expected_failures={f"compiled_equals_eager-{host}": BREAKS for host in HOST_NAMES},
)
def test_conformance(check: Callable[[], None]) -> None:
    check()


def narrow(width: int = 6) -> Any:
    """A model as wide as the authors' networks there."""
    import transformers

    sizes = {"hidden_size": width, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    model: Any = transformers.BertModel(transformers.BertConfig(vocab_size=11, **sizes), add_pooling_layer=False)
    return model.double().eval()


def hold_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise that is the same for everybody."""
    monkeypatch.setattr(torch, "randn", lambda *shape, **kwargs: wave(shape, 0.47))


def theirs(operator: Any) -> dict[str, Tensor]:
    """Our tensors by the names of the authors'."""
    layers = {
        "prompt.bn.0": operator.down,
        "prompt.bn.2": operator.up,
        "lm.mean": operator.critic.mean,
        "lm.log_std": operator.critic.log_std,
        "lm.mean_prp": operator.critic.of_prompt,
    }
    found = {f"tune.{name}.{kind}": getattr(each, kind) for name, each in layers.items() for kind in ("weight", "bias")}
    return {**found, "tune.lm.output.weight": operator.critic.up.weight}


@pytest.mark.parametrize(("case", "texts", "scale"), [("one", 1, 1.0), ("two", 2, 1.5)])
@against("authors", "infoprompt", **CODE)
def test_the_authors_numbers(case: str, texts: int, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows and losses, with the gradients of each loss. The bias of theirs that moves all scores alike is not here."""
    numbers = frozen(NUMBERS)[case]
    injection = peftcore.apply(narrow(), "infoprompt", **SMALL, ceiling=2.0, dtype="float64")
    (operator,) = injection.operators.values()
    tensors, head = theirs(operator), torch.nn.Parameter(torch.empty(3, 6).double())
    bias = "tune.lm.output.bias"
    assert {*tensors, "head", bias} == numbers["tensors"].keys()
    with torch.no_grad():
        for name, tensor in [*tensors.items(), ("head", head)]:
            tensor.copy_(torch.tensor(numbers["tensors"][name], dtype=torch.float64).view(tensor.shape))
    hold_draws(monkeypatch)
    words = 0.5 * scale * wave((11, 6), 0.37)[torch.tensor([[0, 7, 9, 4, 2], [0, 5, 8, 2, 1]])[:texts]]
    without = 0.7 * words[:, 0]
    rows = operator.up(torch.nn.functional.gelu(operator.down(without))).view(texts, 2, 6)
    assert rows.flatten().tolist() == pytest.approx(numbers["rows"], abs=1e-12)
    within = rows.mean(1) @ wave((6, 6), 0.53) + without
    representation, divergence = operator.critic(without, within, rows.mean(1), 2.0)
    text = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]).bool()[:texts]
    scores = HeadLoss.scores(lambda x: x @ head.T, (rows.mean(1), words, text), [])
    losses = {"head": 0.1 * info_nce(*scores, 2.0), "representation": 0.2 * representation, "kl": 0.1 * divergence}
    for kind, loss in losses.items():
        assert loss.item() == pytest.approx(numbers["losses"][kind], abs=1e-12), kind
        values = torch.autograd.grad(loss, [*tensors.values(), head], retain_graph=True, allow_unused=True)
        found = {name: g for name, g in zip([*tensors, "head"], values, strict=True) if g is not None}
        expected = numbers["gradients"][kind]
        assert max(map(abs, expected.pop(bias, [0.0]))) < 1e-12
        assert found.keys() == expected.keys(), kind
        for name, gradient in found.items():
            assert gradient.flatten().tolist() == pytest.approx(expected[name], abs=1e-12), (kind, name)


def expected_losses(name: str, base: Any, operator: Any, outputs: list[int], ceiling: float) -> Tensor:
    """Return all that is added, from the equations: text by text, with the whole of each product."""
    stack = base.get_submodule({"bert": "bert", "t5": "encoder", "llama": "model"}[name])
    head = {"bert": "classifier", "t5": "lm_head", "llama": "lm_head"}[name]
    c = base.get_submodule(head).weight[outputs or slice(None)].mean(0)
    critic, total = operator.critic, torch.zeros(()).double()
    for index, count in enumerate((4, 3)):
        words = base.get_input_embeddings()(IDS[index : index + 1, :count])
        token = -1 if name == "llama" else 0
        u = stack(inputs_embeds=words)[0][0, token].detach()
        hidden = torch.nn.functional.gelu(operator.down.weight @ u + operator.down.bias)
        rows = (operator.up.weight @ hidden + operator.up.bias).view(1, 2, 16)
        states = stack(inputs_embeds=torch.cat([rows, words], 1))[0][0]
        v = states[-1 if name == "llama" else 2]
        p = rows[0].mean(0)
        exps = torch.stack([p @ c, *(words[0] @ c)]).div(4).exp()
        total = total + 0.1 * (-(exps[0] / exps.sum()).log()).clamp(max=ceiling) / 2
        context = critic.of_prompt(p.detach())
        found = []
        for state, noise in ((v, wave((2, 1, 4), 0.47)[index]), (u, wave((2, 6, 4), 0.47)[index])):
            normal = torch.distributions.Normal(critic.mean(state), critic.log_std(state).clamp(-2, 10).exp())
            found += [(critic.up.weight @ (normal.loc + normal.scale * each)) @ context / 4 for each in noise]
            standard = torch.distributions.Normal(torch.zeros(4).double(), torch.ones(4).double())
            total = total + 0.3 * torch.distributions.kl_divergence(normal, standard).mean() / 2
        exps = torch.stack(found).exp()
        total = total + 0.2 * (-(exps[0] / exps.sum()).log()).clamp(max=ceiling) / 2
    return total


@pytest.mark.parametrize(("outputs", "ceiling"), [([], None), ([1, 0], 1.7)])
@pytest.mark.parametrize("name", ["bert", "t5", "llama"])
def test_what_is_added_in_training(
    name: str, outputs: list[int], ceiling: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On whole models: values and gradients, those of a head that trains too."""
    model, _ = host(name)
    base = deepcopy(model)
    options = {**SMALL, "draws": 3, "kl_weight": 0.3, "outputs": outputs, "ceiling": ceiling}
    injection = peftcore.apply(model, "infoprompt", **options, dtype="float64")
    fill(injection)
    operator = next(each for each in injection.operators.values() if not isinstance(each, HeadLoss))
    pair = [each.get_submodule("classifier" if name == "bert" else "lm_head").weight for each in (model, base)]
    for head in pair:
        head.requires_grad_(True)
    for each in (model, *injection.operators.values()):
        each.training = True  # and none of what drops
    hold_draws(monkeypatch)
    more = {"decoder_input_ids": IDS[:, :2]} if name == "t5" else {}
    model(input_ids=IDS, attention_mask=MASK, **more)
    ours = injection.losses()
    expected = expected_losses(name, base, operator, outputs, ceiling or 100.0)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    tensors = list(operator.parameters())
    mine = torch.autograd.grad(ours, [*tensors, pair[0]])
    others = torch.autograd.grad(expected, [*tensors, pair[1]])
    for (key, _), one, other in zip([*operator.named_parameters(), ("head", None)], mine, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10, msg=key)
        assert ceiling or one.abs().max() > 1e-8, key


def test_evaluation_is_the_prompt_alone() -> None:
    """That of `idpg` with the same network, and nothing is added or drawn."""
    model, inputs = host("llama")
    injection = peftcore.apply(model, "infoprompt", **SMALL, dtype="float64")
    fill(injection)
    other, _ = host("llama")
    plain = peftcore.apply(other, "idpg", length=2, hidden=4, phm=None, dtype="float64")
    (mine, _), (theirs,) = injection.operators.values(), plain.operators.values()
    theirs.down.load_state_dict(mine.down.state_dict())
    theirs.up.load_state_dict(mine.up.state_dict())
    state = torch.get_rng_state()
    torch.testing.assert_close(model(**inputs).logits, other(**inputs).logits)
    assert torch.equal(state, torch.get_rng_state()) and not injection.losses()


def test_losses_of_no_weight_have_no_critics() -> None:
    model, inputs = host("llama")
    injection = peftcore.apply(model, "infoprompt", **SMALL, head_weight=0.0, representation_weight=0.0)
    assert sum(p.numel() for p in injection.parameters()) == 17 * 4 + 5 * 32 and len(injection.operators) == 1
    model.train()
    model(**inputs)
    assert not injection.losses()


def test_a_model_without_a_head_has_the_other_loss() -> None:
    model, inputs = host("llama")
    injection = peftcore.apply(model.model, "infoprompt", **SMALL)
    model.model.train()
    model.model(**inputs)
    assert injection.losses() > 0


def test_outputs_that_the_head_does_not_have_are_refused() -> None:
    model, _ = host("bert")
    with pytest.raises(ConfigError, match="outputs"):
        peftcore.apply(model, "infoprompt", outputs=[4000])
    assert not peftcore.injections(model)


def test_counts() -> None:
    injection = peftcore.apply(host("llama")[0], "infoprompt", **SMALL)
    assert sum(p.numel() for p in injection.parameters()) == 17 * 4 + 5 * 32 + 3 * 16 * 4 + 2 * 4 + 16 * 17


@against("authors", "infoprompt", **CODE, part="start")
@pytest.mark.parametrize(("case", "width", "hidden", "length"), [("wide", 8, 12_000, 5), ("square", 128, 128, 100)])
def test_start_is_the_authors(case: str, width: int, hidden: int, length: int) -> None:
    """Of what is large: networks 12,000 wide, and those of a hundred rows."""
    injection = peftcore.apply(narrow(width).float(), "infoprompt", hidden=hidden, length=length)
    own = theirs(next(iter(injection.operators.values())))
    for name, told in frozen(NUMBERS, "start")[case].items():
        same_start(own[name], told)


@against("authors", "infoprompt", **CODE, part="trains")
def test_what_trains_is_what_the_authors_train() -> None:
    """The head is the model's, without its bias. The bias of theirs that moves all scores alike is not here."""
    import transformers

    sizes = {"hidden_size": 6, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=11, num_labels=3, **sizes))
    injection = peftcore.apply(model, "infoprompt", **SMALL, train=["classifier.weight"])
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained == {id(p) for p in injection.parameters()}
    (operator,) = (each for path, each in injection.operators.items() if not path.startswith("classifier"))
    own = theirs(operator)
    assert len(trained) == len(own) + 1
    assert sorted([*own, "tune.lm.head.head", "tune.lm.output.bias"]) == frozen(NUMBERS, "trains")


@against("authors", "infoprompt", **CODE, part="defaults")
def test_defaults_are_the_authors() -> None:
    same_defaults(peftcore.apply(narrow(), "infoprompt").config, frozen(NUMBERS, "defaults"))
