"""A prompt that looks at the text is shown it, as labels, calls and masks say; once, where the rows enter."""

from typing import Any

import pytest
import torch
from plugin_toys import method_members
from torch import Tensor, nn

import peftcore
from peftcore.author import InstanceOperator, Method, MethodConfig, Tags
from peftcore.errors import MissingContext, SequenceError, UnsupportedSite
from peftcore.testing.hosts import HOSTS

LENGTH = 2


class Looking(InstanceOperator):
    """Rows that are the mean of the text, scaled; it notes what it was shown, and doubles the text's embeddings."""

    def __init__(self, site: Any, config: Any) -> None:
        super().__init__(site, LENGTH)
        self.gain = nn.Parameter(torch.ones(LENGTH, 1))
        self.shown: list[list[list[bool]]] = []
        self.looked: list[bool] = []
        self.learned: list[tuple[Tensor, Tensor]] = []

    def look(self, call: Any, given: Any, text: Tensor) -> None:
        self.looked.append("input_ids" in given)

    def learn(self, states: Tensor, text: Tensor) -> None:
        self.learned.append((states, text))

    def rows_of(self, embeds: Tensor, text: Tensor) -> Tensor:
        self.shown.append(text.tolist())
        mean = (embeds * text[..., None]).sum(1, keepdim=True) / text.sum(1)[:, None, None].clamp(min=1)
        return mean * self.gain.to(embeds.dtype)

    def tokens(self, embeds: Tensor, text: Tensor) -> Tensor:
        return torch.where(text[..., None], 2 * embeds, embeds)


class Config(MethodConfig):
    """No options."""

    method: str = "toy_looking"


class Looks(Method):
    """A prompt that is made of the text."""

    locals().update(method_members())
    name, Config, target = "toy_looking", Config, "stack"
    tags = Tags(category="additive", paper="none", identity_at_init=False, per_row=False)

    def inject(self, model: nn.Module, config: Any, surgeon: peftcore.author.Surgeon) -> None:
        for site in surgeon.sites():
            surgeon.sequence(site, Looking, config)


def adapted(name: str, **options: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model: Any = HOSTS[name].build()[0].double().eval()
    (operator,) = peftcore.apply(model, Looks, dtype="float64", **options).operators.values()
    return model, operator


IDS = torch.tensor([[5, 6, 7, 8], [9, 3, 4, 1]])


def test_the_text_is_the_whole_input_but_for_padding() -> None:
    for name in ("llama", "bert", "t5"):
        model, operator = adapted(name)
        more = {"decoder_input_ids": IDS[:, :2]} if name == "t5" else {}
        model(input_ids=IDS, attention_mask=torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]]), **more)
        assert operator.shown == [[[True] * 4, [False, True, True, True]]]
        assert operator.looked == [True]


def test_labels_and_calls_end_it() -> None:
    model, operator = adapted("llama")
    model(input_ids=IDS, labels=torch.tensor([[-100, -100, 7, 8], [-100, -100, -100, 1]]))
    with peftcore.call(model, prompt_length=[1, 4]):
        model(input_ids=IDS, labels=torch.tensor([[-100, -100, 7, 8], [-100, -100, -100, 1]]))
    assert operator.shown[0] == [[True, True, False, False], [True, True, True, False]]
    assert operator.shown[1] == [[True, False, False, False], [True, True, True, True]]


def test_rows_and_tokens_stand_where_they_should() -> None:
    """The same in front of the model itself: the mean of what the text became, then the text, twice as large."""
    model, _ = adapted("llama")
    with peftcore.call(model, prompt_length=3):
        ours = model(input_ids=IDS).logits
    peftcore.injections(model)["toy_looking"].remove()
    words = model.get_input_embeddings()(IDS) * torch.tensor([2, 2, 2, 1])[:, None]
    rows = words[:, :3].mean(1, keepdim=True).expand(-1, LENGTH, -1)
    expected = model(inputs_embeds=torch.cat([rows, words], 1)).logits[:, LENGTH:]
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


def test_it_is_looked_at_once() -> None:
    model, operator = adapted("llama")
    model.generate(input_ids=IDS, max_new_tokens=3, min_new_tokens=3, do_sample=False, use_cache=True)
    assert operator.shown == [[[True] * 4] * 2] and operator.looked == [True]


def test_what_nobody_told_is_refused() -> None:
    model, _ = adapted("llama")
    with pytest.raises(MissingContext, match="prompt_length"):
        model(input_ids=IDS, use_cache=False)
    cache = model(input_ids=IDS[:, :2], use_cache=True).past_key_values
    with pytest.raises(MissingContext, match="may or may not belong to the prompt"):
        model(input_ids=IDS[:, 2:], past_key_values=cache)
    for told in (5, [4, 5], torch.tensor([5, 1])):
        with peftcore.call(model, prompt_length=told), pytest.raises(SequenceError, match="prefill in one forward"):
            model(input_ids=IDS)


def test_what_reads_an_encoder_is_refused() -> None:
    with pytest.raises(UnsupportedSite, match="target the encoder"):
        adapted("t5", target="decoder")


@pytest.mark.parametrize(("name", "stack"), [("llama", "model"), ("bert", "bert"), ("t5", "encoder")])
def test_what_the_stack_made_of_the_tokens_is_shown_in_training(name: str, stack: str) -> None:
    """Behind the rows, wherever these stand, also in a stack of which a decoder reads them; no more where a cache holds
    them."""
    model, operator = adapted(name)
    more = {"decoder_input_ids": IDS[:, :2]} if name == "t5" else {}
    mask, made = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]]), []
    model.get_submodule(stack).register_forward_hook(lambda module, args, output: made.append(output[0]))
    model(input_ids=IDS, attention_mask=mask, **more)
    assert not operator.learned
    operator.training = True
    model(input_ids=IDS, attention_mask=mask, **more)
    ((states, text),) = operator.learned
    assert states.shape == (2, 4, 16) and states.requires_grad and torch.equal(text, mask.bool())
    torch.testing.assert_close(states, made[1][:, -4:])
    if name == "llama":
        with torch.no_grad(), peftcore.call(model, prompt_length=4):
            held = model(input_ids=IDS, use_cache=True).past_key_values
            model(input_ids=IDS[:, :1], past_key_values=held)
        assert len(operator.learned) == 2
