"""Names are compared token by token, and never as substrings."""

import pytest

from peftcore.roles import vocabulary as V


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("embeddings.LayerNorm_2b", ("embeddings", "layer", "norm", "b")),
        ("to_q", ("to", "q")),
        ("qkv", ("qkv",)),
        ("12.0", ()),
    ],
)
def test_tokens_end_at_signs_numbers_and_capitals(name: str, tokens: tuple[str, ...]) -> None:
    assert V.tokens(name) == tokens


@pytest.mark.parametrize(
    ("name", "operands"),
    [
        ("q_proj", "q"),
        ("key", "k"),
        ("to_kv", "kv"),
        ("c_attn", "qkv"),
        ("query_key_value", "qkv"),
        ("pos_key_proj", ""),  # it projects positions
        ("quantize", ""),  # begins like a query, and is none
        ("o_proj", ""),
    ],
)
def test_operands_that_a_name_speaks_of(name: str, operands: str) -> None:
    assert V.operands(name) == operands


def test_a_name_may_say_nothing() -> None:
    assert all(map(V.is_generic, ("0", "dense", "fc1", "conv2d")))
    assert not any(map(V.is_generic, ("query", "head", "fcs")))


def test_feed_forward_by_its_usual_names() -> None:
    assert all(map(V.is_feed_forward, ("mlp", "ffn", "feed_forward", "ff", "ff_context")))
    assert not any(map(V.is_feed_forward, ("off", "diff", "attn")))


def test_fused_roles_are_roles_of_weights() -> None:
    assert V.FUSED_ROLES <= V.ROLES and {"attn.qkv", "mlp.gate_up", "attn_mlp.in"} <= V.FUSED_ROLES
    assert V.OTHER not in V.ROLES
