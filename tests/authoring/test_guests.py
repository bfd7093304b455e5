"""A guest network: a smaller one of the stack's own class, over the same tokens, with a place of its own in caches."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any, Literal

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, StaticCache

import peftcore
from peftcore.author import (
    GuestNetwork,
    GuestOperator,
    Method,
    MethodConfig,
    Operator,
    Tags,
    Tap,
    TokenStacks,
    guest_network,
)
from peftcore.errors import ConfigError, UnsupportedSite
from peftcore.testing.hosts import HOSTS


class HostWithGuestConfig(MethodConfig):
    method: Literal["host_with_guest"] = "host_with_guest"
    own_table: bool = False
    width: int = 16
    encoders: bool = False


class Adds(Operator):
    """Adds what the guest made to what the head reads."""

    def __init__(self, site: peftcore.author.Site, states: Tap) -> None:
        super().__init__(site)
        self.states = states

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        return call(x + self.states.get().to(x.dtype))


class HostWithGuest(Method):
    """The smallest method with a guest."""

    name = "host_with_guest"
    Config = HostWithGuestConfig
    tags = Tags(category="additive", paper="none", identity_at_init=False)
    target = ("block",)

    def inject(self, model: nn.Module, config: HostWithGuestConfig, surgeon: peftcore.author.Surgeon) -> None:
        stack = TokenStacks(surgeon).around(surgeon.sites())
        sizes = {"num_hidden_layers": 1, "hidden_size": config.width}
        guest = guest_network(surgeon, stack, sizes, config.own_table, encoders=config.encoders)
        states = Tap()
        surgeon.graft(stack, lambda at: GuestOperator(at, guest, states))
        for site in surgeon.sites("head"):
            surgeon.graft(site, lambda at: Adds(at, states))

    @staticmethod
    def parameter_count(site: peftcore.author.Site, config: HostWithGuestConfig) -> int:
        return 0


def llama(**options: Any) -> Any:
    torch.manual_seed(0)
    model = HOSTS["llama"].build()[0].double().eval()
    config = deepcopy(model.config)
    for name, value in options.items():
        setattr(config, name, value)
    return transformers.LlamaForCausalLM(config).double().eval() if options else model


IDS = torch.tensor([[3, 7, 5, 9], [2, 8, 6, 4]])


@pytest.mark.parametrize("options", [{}, {"own_table": True}, {"width": 8}])
def test_it_runs_over_the_tokens_of_the_stack(options: dict[str, Any]) -> None:
    model = llama()
    base = deepcopy(model)
    injection = peftcore.apply(model, HostWithGuest, dtype="float64", **options)
    guest = injection.shared["guest"]
    assert isinstance(guest, GuestNetwork) and type(guest.network) is transformers.LlamaModel
    assert guest.own_table == bool(options) and isinstance(guest.projection, nn.Linear) == ("width" in options)
    table = [name for name, _ in guest.named_parameters() if "embed_tokens" in name]
    assert table == (["network.embed_tokens.weight"] if options else [])
    alone = deepcopy(guest.network)
    if not options:
        alone.embed_tokens = base.model.embed_tokens
    states = guest.projection(alone(IDS).last_hidden_state)
    expected = base.lm_head(base.model(IDS).last_hidden_state + states)
    torch.testing.assert_close(model(IDS).logits, expected)
    model(IDS).logits.square().mean().backward()
    assert all(parameter.grad is not None for parameter in injection.parameters())


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_caches_hold_its_tokens(kind: Any) -> None:
    model = llama()
    peftcore.apply(model, HostWithGuest, dtype="float64", width=8)
    cache = kind(config=model.config, **({"max_cache_len": 6} if kind is StaticCache else {}))
    whole = model(IDS, use_cache=False).logits
    pieces = [model(IDS[:, :2], cache=cache).logits, model(IDS[:, 2:3], cache=cache).logits]
    torch.testing.assert_close(torch.cat(pieces, 1), whole[:, :3])
    assert len(cache.layers) == 3 and type(cache.layers[2]) is type(cache.layers[0])
    assert cache.layers[2].keys.shape[-1] == cache.layers[0].keys.shape[-1]  # heads are as wide in both
    cache.reorder_cache(torch.tensor([1, 1]))
    torch.testing.assert_close(model(IDS[[1, 1], 3:], cache=cache).logits, whole[[1, 1], 3:])


@pytest.mark.parametrize("cuts", [[2], [5], [1, 2], [4, 6]])
@pytest.mark.parametrize("window", [True, False])
def test_a_window_may_go_on_from_a_cache_that_keeps_all(window: bool, cuts: list[int]) -> None:
    """Both networks look through the window; the cache drops what is behind it, or keeps it."""
    torch.manual_seed(0)
    model: Any = HOSTS["mistral"].build()[0].double().eval()
    peftcore.apply(model, HostWithGuest, dtype="float64")
    ids = torch.randint(3, 40, (2, 8))
    cache = DynamicCache(config=model.config) if window else DynamicCache()
    found = [model(piece, past_key_values=cache, use_cache=True).logits for piece in ids.tensor_split(cuts, 1)]
    torch.testing.assert_close(torch.cat(found, 1), model(ids, use_cache=False).logits)


def test_it_starts_from_what_is_handed_in() -> None:
    model = llama()
    small = llama(num_hidden_layers=1, hidden_size=8)
    injection = peftcore.apply(model, HostWithGuest, dtype="float64", width=8)
    guest = injection.shared["guest"]
    guest.take(small.model)
    torch.testing.assert_close(guest.network(IDS).last_hidden_state, small.model(IDS).last_hidden_state)
    sharing = peftcore.apply(llama(), HostWithGuest, dtype="float64").shared["guest"]
    sharing.take(llama(num_hidden_layers=1).model)
    with pytest.raises(ConfigError, match=r"is \[16.*and \[8.* pass the given network's sizes"):
        sharing.take(small.model)
    with pytest.raises(ConfigError, match="is missing in the guest"):
        sharing.take(llama(num_hidden_layers=2).model)


def test_what_a_fresh_one_costs_and_computes_with() -> None:
    """A table that the guest does not have is not made; flash attention, which has no float32, is left out."""
    model = llama(vocab_size=10**5, pad_token_id=3)
    model.config._attn_implementation_internal = "flash_attention_2"
    made: list[int] = []
    embedding = nn.Embedding.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            nn.Embedding, "__init__", lambda self, *args, **kw: (made.append(args[0]), embedding(self, *args, **kw))[1]
        )
        guest = peftcore.apply(model, HostWithGuest).shared["guest"]
    assert made == [4] and guest.network.embed_tokens is None
    assert guest.network.config._attn_implementation == "sdpa"


SMALL: dict[str, Any] = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL |= {"intermediate_size": 24, "max_position_embeddings": 20}


@pytest.mark.parametrize("own_table", [False, True])
@pytest.mark.parametrize("family", ["Bert", "Roberta"])
def test_encoders_have_guests_without_poolers(family: str, own_table: bool) -> None:
    """With types of tokens, and positions that count as the stack does: RoBERTa's leave padding on the left out."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SMALL, type_vocab_size=2, pad_token_id=0)
    model = getattr(transformers, f"{family}ForTokenClassification")(config).double().eval()
    base = deepcopy(model)
    injection = peftcore.apply(model, HostWithGuest, dtype="float64", encoders=True, own_table=own_table)
    guest: Any = injection.shared["guest"]
    assert guest.network.pooler is None
    alone = deepcopy(guest.network)
    if not own_table:
        alone.embeddings.word_embeddings = base.get_input_embeddings()
    ids, types = torch.tensor([[0, 0, 5, 9], [2, 8, 6, 4]]), torch.tensor([[0, 0, 1, 1], [0, 1, 0, 1]])
    given = {"attention_mask": (ids != 0).long(), "token_type_ids": types}
    stack = base.get_submodule(family.lower())
    expected = base.classifier(stack(ids, **given).last_hidden_state + alone(ids, **given).last_hidden_state)
    torch.testing.assert_close(model(ids, **given).logits[ids != 0], expected[ids != 0])
    model(ids, **given).logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in injection.parameters())


def test_a_block_that_runs_several_times_has_no_guest() -> None:
    albert = transformers.AlbertForTokenClassification(transformers.AlbertConfig(**SMALL, embedding_size=16))
    with pytest.raises(UnsupportedSite, match="is not a stack of transformers"):
        peftcore.apply(albert, HostWithGuest, encoders=True)


def test_what_is_refused() -> None:
    for name in ("bert", "encoder"):
        with pytest.raises(UnsupportedSite):
            peftcore.apply(HOSTS[name].build()[0], HostWithGuest)
    with pytest.raises(ConfigError, match="hidden_size=32 is too large for a guest network: the model has 16"):
        peftcore.apply(llama(), HostWithGuest, width=32)
    with pytest.raises(ConfigError, match="no GPT2Model can be built"):
        peftcore.apply(HOSTS["gpt2"].build()[0], HostWithGuest, width=9)
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
    hybrid = transformers.Qwen3NextConfig(**sizes, intermediate_size=24, num_experts=2, pad_token_id=0)
    with pytest.raises(UnsupportedSite, match="first 1 layers of Qwen3NextModel have no attention"):
        peftcore.apply(transformers.Qwen3NextForCausalLM(hybrid), HostWithGuest)
    sizes = {"decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 24, "is_decoder": True}
    decoder = transformers.BartConfig(vocab_size=40, d_model=16, **sizes)
    with pytest.raises(UnsupportedSite, match="is not a causal stack of transformers"):
        peftcore.apply(transformers.BartForCausalLM(decoder), HostWithGuest)
