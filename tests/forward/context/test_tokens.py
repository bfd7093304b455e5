"""The tokens of one forward: what is counted before it, and where a sequence of ids begins."""

import copy
from typing import Any

import pytest
import torch
import transformers
from call_toys import adapted
from core_toys import token_ids
from torch import Tensor
from transformers import DynamicCache

import peftcore
from peftcore import activate, call, route
from peftcore.errors import MissingContext, SequenceError
from peftcore.forward.context.tokens import NEVER, Prompt, Tokens
from peftcore.forward.state.host_state import state_of


class Counted:
    """A cache that holds so many columns."""

    def __init__(self, held: int) -> None:
        self.held = held

    def get_seq_length(self) -> int:
        return self.held


def tokens(ids: Any, cache: Any = None, prompt: Prompt | None = None) -> Tokens:
    found = Tokens({"input_ids": torch.tensor(ids), "past_key_values": cache}, prompt=prompt)
    if cache is not None:
        cache.held += found.new  # as the blocks do, one after the other
    return found


def test_columns_are_counted_before_the_cache_grows() -> None:
    cache = Counted(5)
    found = tokens([[1, 2, 3], [4, 5, 6]], cache)
    assert (found.held, found.new, found.batch, found.counted) == (5, 3, 2, True)
    assert found.held == 5 and cache.held == 8


@pytest.mark.parametrize(
    ("ids", "since"),
    [
        ([7, 8, 1, 2], 0),
        ([1, 7, 8, 2], 1),
        ([1, 2, 7, 8], 2),
        ([7, 8, 7, 8], 2),
        ([7, 7, 8, 8], 1),
        ([7, 1, 8, 2], NEVER),
        ([8, 7, 1, 7], NEVER),
    ],
)
def test_the_last_occurrence_counts(ids: list[int], since: int) -> None:
    assert tokens([ids, [7, 8, 0, 0]]).since([7, 8]).tolist() == [since, 0]
    assert tokens([[7]]).since([7, 8]).tolist() == [NEVER], "shorter than the sequence"


def test_what_was_found_is_kept_with_the_cache_and_its_copies() -> None:
    cache = Counted(0)
    assert tokens([[1, 7, 8], [1, 2, 3]], cache).since([7, 8]).tolist() == [1, NEVER]
    other = copy.deepcopy(cache)
    assert tokens([[9], [4]], cache).since([7, 8]).tolist() == [1, NEVER]
    assert tokens([[7], [9]], cache).since([7, 8]).tolist() == [1, NEVER]
    assert tokens([[8], [9]], cache).since([7, 8]).tolist() == [1, NEVER], "generated again, token by token"
    assert tokens([[9], [9]], other).since([7, 8]).tolist() == [1, NEVER]


def test_rows_may_be_repeated_and_a_cache_cropped() -> None:
    cache = Counted(0)
    tokens([[1, 7, 8], [7, 8, 1]], cache).since([7, 8])
    assert tokens([[9]] * 4, copy.deepcopy(cache)).since([7, 8]).tolist() == [1, 1, 0, 0]
    cache.held = 2
    assert tokens([[8, 9], [9, 9]], cache).since([7, 8]).tolist() == [1, 0]
    cache.held = 1
    with pytest.raises(SequenceError, match="ran without the part of it in this forward"):
        tokens([[7, 8], [9, 9]], cache).since([7, 8])  # the second row's cache ends inside its first occurrence
    cache = Counted(0)
    tokens([[1, 2, 7, 8], [3, 1, 7, 8]], cache).since([7, 8])
    cache.held = 2
    assert tokens([[9], [9]], cache).since([7, 8]).tolist() == [NEVER, NEVER]
    cache.held = 2
    assert tokens([[7, 8], [9, 9]], cache).since([7, 8]).tolist() == [2, NEVER]
    with pytest.raises(MissingContext, match="does not have one column for each of 3 rows"):
        tokens([[9]] * 3, cache).since([7, 8])


def test_what_nobody_saw_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(MissingContext, match=r"the 4 tokens in the cache were not searched.*call\(model, since="):
        tokens([[9]], Counted(4)).since([7, 8])
    assert tokens([[7, 8]], Counted(4)).since([7, 8]).tolist() == [4]
    assert tokens([[9]], Counted(4)).since([7, 8], told=[2]).tolist() == [2]
    embeds = Tokens({"inputs_embeds": torch.randn(1, 3, 8)})
    assert embeds.counted and embeds.ids is None
    with pytest.raises(MissingContext, match="token ids of this forward are not known"):
        embeds.since([7, 8])
    assert not Tokens({"pixel_values": torch.randn(1, 3, 8, 8)}).counted


@pytest.mark.parametrize(
    "pieces",
    [
        ([1, 7], [8, 2]),
        ([1, 7], [8]),
        ([7, 8, 1], [7, 8]),
        ([7, 8, 7], [8, 2]),
    ],
)
def test_pieces_of_which_the_next_decides_for_the_first_are_an_error(pieces: tuple[list[int], ...]) -> None:
    """The whole has its last occurrence elsewhere than the first piece, which ran by what it saw alone."""
    cache = Counted(0)
    tokens([pieces[0]], cache).since([7, 8])
    with pytest.raises(SequenceError, match=r"tokens in the cache ran without.*call\(model, since="):
        tokens([pieces[1]], cache).since([7, 8])
    assert tokens([pieces[1]], cache).since([7, 8], told=[1]).tolist() == [1]


def test_tokens_of_a_cache_that_were_not_seen_are_an_error() -> None:
    cache = Counted(0)
    tokens([[1, 2]], cache).since([7, 8])
    cache.held += 2  # with the adapter off
    with pytest.raises(MissingContext, match="the 4 tokens in the cache were not searched"):
        tokens([[9]], cache).since([7, 8])


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_the_prompt_of_generate_decides_for_all_its_pieces(size: int) -> None:
    prompt = torch.tensor([[7, 8, 1, 7, 8], [1, 2, 7, 8, 3], [1, 2, 3, 4, 7]])
    cache = Counted(0)
    for begin in range(0, 5, size):
        piece = prompt[:, begin : begin + size].repeat_interleave(2, 0)  # of beams
        found = tokens(piece.tolist(), cache, Prompt(prompt, 0)).since([7, 8])
        assert found.tolist() == [3, 3, 2, 2, NEVER, NEVER]
    for generated in (7, 8, 8):
        assert tokens([[generated]] * 6, cache, Prompt(prompt, 0)).since([7, 8])[-1] == NEVER
    other = tokens([[7, 8]], Counted(0), Prompt(prompt[:1, 1:], 0))
    assert other.since([7, 8]).tolist() == [0], "tokens of no prompt (guidance without one)"


def test_a_prompt_goes_on_from_a_cache() -> None:
    cache = Counted(0)
    tokens([[1, 7, 8]], cache).since([7, 8])
    behind = copy.deepcopy(cache)
    assert tokens([[5, 6]], behind, Prompt(torch.tensor([[5, 6]]), 3)).since([7, 8]).tolist() == [1]
    behind = copy.deepcopy(cache)
    whole = Prompt(torch.tensor([[1, 7, 8, 7, 8]]), 0)
    assert tokens([[7]], behind, whole).since([7, 8]).tolist() == [3], "a turn of its own"
    assert tokens([[8]], behind, whole).since([7, 8]).tolist() == [3]
    with pytest.raises(SequenceError, match="begins among the 3 tokens in the cache"):
        tokens([[9]], Counted(3), Prompt(torch.tensor([[1, 7, 8, 9]]), 0)).since([7, 8])
    with pytest.raises(MissingContext, match="the 3 tokens in the cache were not searched"):
        tokens([[9]], Counted(3), Prompt(torch.tensor([[9]]), 3)).since([7, 8])


def test_a_cache_of_states_counts_no_tokens() -> None:
    class States:
        pass

    assert not Tokens({"input_ids": torch.ones(1, 3, dtype=torch.long), "past_key_values": States()}).counted


def test_real_caches_keep_it() -> None:
    cache = DynamicCache()
    Tokens({"input_ids": torch.tensor([[7, 8]]), "past_key_values": cache}).since([7, 8])
    grown: Tensor = torch.zeros(1, 1, 2, 4)
    cache.update(grown, grown, 0)
    later = Tokens({"input_ids": torch.tensor([[1]]), "past_key_values": copy.deepcopy(cache)})
    assert later.since([7, 8]).tolist() == [0]


def test_nobody_counts_where_nobody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (injection,) = adapted("lora")
    counted: list[int] = []
    inner = Tokens.__init__
    monkeypatch.setattr(Tokens, "__init__", lambda self, *given: (counted.append(1), inner(self, *given))[1])
    with torch.no_grad(), activate(model, injection.name), call(model, task=1):
        model(token_ids(2))
    assert not counted


def test_what_has_an_encoder_and_a_decoder_has_tokens_of_two_kinds() -> None:
    ids = torch.ones(1, 3, dtype=torch.long)
    assert not Tokens({"input_ids": ids}, ["input_ids", "decoder_input_ids"]).counted
    shape = {"d_model": 16, "d_ff": 24, "d_kv": 4, "num_layers": 1, "num_heads": 2, "vocab_size": 16}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**shape)).eval()
    name = peftcore.apply(model, "lora").name
    with (
        torch.no_grad(),
        route(model, [name], since=[1]),
        pytest.raises(MissingContext, match="the tokens of this forward are not known"),
    ):
        model(input_ids=ids, decoder_input_ids=ids)


def test_nobody_counts_for_an_adapter_that_did_not_come_or_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = adapted("lora")
    state = state_of(model)
    assert state is not None
    kept = peftcore.apply(model, "alora", name="kept")
    assert state.reads_tokens == 1
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("peftcore.surgery.installation.install", _interrupted)
        peftcore.apply(model, "alora", name="failed")
    assert state.reads_tokens == 1
    kept.remove()
    assert state.reads_tokens == 0


def _interrupted(*_: Any) -> None:
    raise KeyboardInterrupt
