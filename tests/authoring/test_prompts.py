"""Where the prompt begins and ends in one forward, and which token sees which: with caches, padding and labels."""

from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from history_world import case_of
from torch import Tensor
from transformers import DynamicCache

import peftcore
from peftcore.author import Method, MethodConfig, PromptPositions, Tags, TokenStacks, VisibleTokens, cached_tokens
from peftcore.errors import MissingContext, RouteError, SequenceError, UnsupportedSite
from peftcore.forward.choice.active_adapters import Choice
from peftcore.forward.context import context as contexts
from peftcore.forward.context.context import ForwardContext
from peftcore.testing import HOSTS
from peftcore.testing.kit import fill


class Cache:
    """A cache that holds so many tokens."""

    def __init__(self, held: int) -> None:
        self.held = held

    def get_seq_length(self, depth: int = 0) -> int:
        return self.held


@pytest.fixture
def inside() -> Any:
    """Opens the context of a forward with these inputs and this call."""
    opened: list[ForwardContext] = []

    class Host(torch.nn.Module):
        def forward(self, **inputs: Any) -> None: ...

    def opens(inputs: dict[str, Any] | None = None, **told: Any) -> None:
        call = ForwardContext(None, Choice(context=told), Host(), (), inputs or {})
        contexts.HERE.calls.append(call)
        opened.append(call)

    yield opens
    for _ in opened:
        contexts.HERE.calls.pop()


Inside = Callable[..., None]


def ends(first: int, last: int, tokens: int, rows: int = 1, **how: Any) -> list[list[list[int]]] | None:
    """The first and the last positions of each row."""
    given, halves = how.get("given", {}), how.get("halves", False)
    found = PromptPositions(0, True, first, last, halves, how.get("last_wins", False)).positions(
        torch.zeros(rows, tokens, 4), given, how.get("training", True)
    )
    return None if found is None else [[row.nonzero().flatten().tolist() for row in mask] for mask in found]


def test_without_a_word_the_whole_input_is_the_prompt(inside: Inside) -> None:
    inside()
    assert ends(2, 1, 5) == [[[0, 1]], [[4]]]
    assert ends(3, 3, 4) == [[[0, 1, 2]], [[3]]], "the first ones come first"
    assert ends(3, 3, 4, last_wins=True) == [[[0]], [[1, 2, 3]]], "or the last ones do"
    assert ends(3, 3, 4, halves=True) == [[[0, 1]], [[2, 3]]]


def test_a_call_says_where_it_ends_for_each_row(inside: Inside) -> None:
    inside(prompt_length=[2, 4])
    assert ends(1, 1, 6, 2) == [[[0], [0]], [[1], [3]]]
    with pytest.raises(RouteError, match="prompt_length has 2 entries, but the batch has 4 rows"):
        ends(1, 1, 6, 4)
    inside(prompt_length=[2, 4], copies=2)
    assert ends(1, 1, 6, 4) == [[[0]] * 4, [[1], [1], [3], [3]]], "beams are repeated"


def test_a_whole_prompt_is_no_piece(inside: Inside) -> None:
    inside(prompt_length=[2, 4])
    whole = PromptPositions(0, True, 0, 1, False, whole=True)
    assert whole.positions(torch.zeros(2, 4, 8), {}, False) is not None
    with pytest.raises(
        SequenceError, match=r"\[3\] tokens are fewer than those of the prompt.* the prompt has \[2, 4\]"
    ):
        whole.positions(torch.zeros(2, 3, 8), {}, False)


def test_labels_say_where_it_ends_and_padding_is_no_prompt(inside: Inside) -> None:
    labels = torch.tensor([[-100, -100, 5, 6], [-100, 7, 7, 7]])
    inside({"labels": labels, "attention_mask": torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])})
    assert ends(1, 1, 4, 2) == [[[1], [0]], [[], []]]


def test_a_step_of_one_token_is_no_prompt_and_more_must_be_said(inside: Inside) -> None:
    inside()
    assert ends(2, 0, 1, given={"past_key_values": Cache(4)}) is None
    assert ends(2, 0, 3, given={"past_key_values": Cache(4)}) == [[[]], [[]]], "the first ones were in the cache"
    with pytest.raises(MissingContext, match="prompt_length"):
        ends(2, 1, 3, given={"past_key_values": Cache(4)})
    with pytest.raises(MissingContext, match="fewer than 4 tokens"):
        ends(2, 0, 3, given={"past_key_values": Cache(2)}, halves=True)
    for halves, held in ((True, 3), (False, 1)):  # one more token of the prompt would be at, or move, a position
        with pytest.raises(MissingContext, match=f"fewer than {held + 1} tokens"):
            ends(2, 0, 1, given={"past_key_values": Cache(held)}, halves=halves)
        assert ends(2, 0, 1, given={"past_key_values": Cache(held + 1)}, halves=halves) is None


def test_generation_without_a_cache_needs_a_word(inside: Inside) -> None:
    inside({"use_cache": False})
    with pytest.raises(MissingContext, match="generated tokens are part of the input"):
        ends(1, 1, 5, training=False)
    assert ends(2, 0, 5, training=False) == [[[0, 1]], [[]]]


def test_causal_tokens_see_those_before_and_none_sees_padding(inside: Inside) -> None:
    inside({"attention_mask": torch.tensor([[0, 1, 1, 1]])})

    class Stack:
        causal, reads = True, False

    causal: Tensor = VisibleTokens(Stack()).mask(2, 2, {}, torch.device("cpu"))  # type: ignore[arg-type]
    assert causal.int().tolist() == [[[[0, 1, 1, 0], [0, 1, 1, 1]]]]
    told_so: Tensor = VisibleTokens(None).mask(2, 2, {"is_causal": True}, torch.device("cpu"))
    assert told_so.equal(causal), "CLIP's attentions declare not to be causal, and their blocks are told to be"
    both = VisibleTokens(None).mask(0, 4, {}, torch.device("cpu"))
    assert both[0, 0].int().tolist() == [[1, 1, 1, 1], [0, 1, 1, 1], [0, 1, 1, 1], [0, 1, 1, 1]], "each sees itself"
    told = {"attention_mask": torch.tensor([[[[0.0, 0.0, -9.0]]]])}
    assert VisibleTokens(None).real(3, told, torch.device("cpu")).int().tolist() == [[1, 1, 0]], "what the block sees"


@pytest.mark.parametrize("held", [0, 2])
def test_a_mask_of_a_block_may_say_what_is_hidden(held: int) -> None:
    visible = torch.ones(4, 4, dtype=torch.bool).tril()
    padded = visible & torch.tensor([False, True, True, True])
    for mask, wanted in ((visible, 1), (~visible, 1), (padded, 0), (padded.long(), 0)):
        told = {"attention_mask": mask[None, None, held:]}
        found = VisibleTokens(None).real(4, told, torch.device("cpu"))
        assert found.int().tolist() == [[wanted, 1, 1, 1]]


def test_what_a_window_does_not_show_of_a_cache_is_no_padding(inside: Inside) -> None:
    """Where the model was told of none; where all tokens are there, each sees itself, so the mask tells."""
    inside({"input_ids": torch.ones(1, 2)})
    at = torch.arange(5)
    window = (at <= at[:, None]) & (at > at[:, None] - 2)  # each sees itself and the one before

    class Stack:
        causal, reads = True, False

    visible, cpu = VisibleTokens(Stack()), torch.device("cpu")  # type: ignore[arg-type]
    found = visible.mask(3, 2, {"attention_mask": window[None, None, 3:]}, cpu)
    assert torch.equal(found[0, 0], torch.ones(5, 5, dtype=torch.bool).tril()[3:])
    padded = window & (at > 0)
    found = visible.mask(0, 5, {"attention_mask": padded[None, None]}, cpu)
    assert found[0, 0, 1:, 0].sum() == 0 and bool(found[0, 0, 4, 1:].all())


@pytest.mark.parametrize("name", ["apt", "k_adapter", "lst", "pal", "tiny_attention_adapter"])
def test_networks_beside_a_window_see_all_of_a_cache_that_keeps_all(name: str) -> None:
    torch.manual_seed(0)
    model: Any = HOSTS["mistral"].build()[0].double().eval()
    fill(case_of(name, "mistral").apply(model, dtype="float64", seed=0))
    ids, found, cache = torch.randint(3, 40, (2, 8)), [], DynamicCache()
    for piece in ids.split([5, 3], 1):
        found.append(model(piece, past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(found, 1), model(ids, use_cache=False).logits)


def test_what_a_cache_holds_is_counted_or_refused(inside: Inside) -> None:
    inside()
    assert cached_tokens({}, 0, 3) == 0 and cached_tokens({"past_key_values": Cache(7)}, 0, 1) == 7

    class States:
        pass

    with pytest.raises(SequenceError, match="use_cache=False"):
        cached_tokens({"past_key_values": States()}, 0, 1)


def test_masks_that_do_not_tell_padding_are_refused(inside: Inside) -> None:
    inside({"attention_mask": torch.ones(1, 2)})
    with pytest.raises(SequenceError, match="separates padding from tokens"):
        ends(1, 0, 5)


class NoOptions(MethodConfig):
    method: Literal["looks_for_a_prompt"] = "looks_for_a_prompt"


def stack_of(host: Any, target: Any) -> tuple[str, int, bool] | None:
    """The path and the width of the stack that is given the prompt of some modules, and whether others read it."""
    seen: list[tuple[str, int, bool] | None] = []

    class Looks(Method):
        name = "looks_for_a_prompt"
        Config = NoOptions
        tags = Tags(category="additive", paper="none")
        target = ("all-layers",)

        def inject(self, model: torch.nn.Module, config: Any, surgeon: Any) -> None:
            found = TokenStacks(surgeon).reading(surgeon.sites())
            seen.append(None if found is None else (found[1].path, found[1].out_features, bool(found[0].readers)))
            surgeon.train(surgeon.sites()[0].module_path)

        parameter_count = staticmethod(lambda site, config: site.numel)

    model = HOSTS[host].build()[0] if isinstance(host, str) else host
    peftcore.apply(model, Looks, target=target)
    return seen[0]


def test_the_stack_that_is_given_the_prompt() -> None:
    assert stack_of("llama", "attn.q") == ("model", 16, False)
    assert stack_of("t5", "attn.q") == stack_of("t5", "encoder.block.*.q") == ("encoder", 16, True)
    assert stack_of("t5", "decoder.block.*.q") == ("encoder", 16, True)
    assert stack_of("vit", "attn.q") is None
    two = torch.nn.ModuleDict({name: HOSTS[name].build()[0] for name in ("llama", "bert")})
    with pytest.raises(UnsupportedSite, match=r"llama.*\bbert.*get different tokens"):
        stack_of(two, ["llama.model.layers.*.q_proj", "bert.bert.encoder.layer.*.query"])
