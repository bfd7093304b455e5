"""The vocabulary: all names by which the rules recognize modules.

Rules use structure first (shapes, containment, repetition). Names are used only if the structure is ambiguous: which of
three square matrices is the query, which table has positions. Names are compared token by token, never as substrings,
except where a pattern below says so. If a rule must look at the name of a *class*, the pattern is below with the other
class patterns and a comment with the reason.
"""

from __future__ import annotations

import re
from functools import lru_cache


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Names that say nothing about the place: the holder's name counts instead (`attention.output.dense`, `conv1.conv`,
# `to_out.0`).
GENERIC = _words("linear ln dense conv fc layer module c l bn conv_d convd convolution base_layer")

QUERY = _words("q query queries wq")
KEY = _words("k key keys wk")
VALUE = _words("v value values wv")
KEY_VALUE = _words("kv")
# Looked for in the joined tokens: Wqkv, in_proj_qkvz, query_key_value, c_attn.
FUSED_NAMES = ("qkv", "querykeyvalue", "cattn")

POSITION = _words("pos position positions positional wpe rel relative cpb biases r")
RELATIVE = _words("rel relative biases")
SEGMENT = _words("type types segment seg")
WORD = _words("word words token tokens tok wte shared")
GATE = _words("gate g")
UP = _words("up wi")
CONTEXT = _words("add added")  # diffusers: add_q_proj, to_add_out, norm_added_q
CONTEXT_BRANCH = CONTEXT | _words("context")  # ff_context, norm1_context, in blocks that hold a context stream
OUT = _words("o out output proj projection dense wo post c")

# Small side networks that are no MLP branch.
CONDITION = _words("emb ada adaln mod modulation se router bottleneck time")
MODULATION = _words("time ada adaln mod modulation")
RESAMPLE = _words("downsample downsampling downsampler downsamplers upsample upsampler upsamplers")
# What these merge or reduce may be patches (Swin, DenseNet) or anything else.
MAY_RESAMPLE = _words("merging reduction transition")
PATCH = _words("patch patches")
EARLY = _words("emb embed embedding embeddings embedder pre patch stem projection caption txt")
LATE = _words("final last after post out head")
HEAD = _words("head heads classifier fc score logits decoder vocab out projector projection predictor lm cls outputs")
NO_HEAD = _words("in input pooler transform query")

CROSS = re.compile(r"cross|enc\w*_?(dec\w*)?_?attn|enc\w*attention|[a-z]_to_[a-z]{2}|^attn2$")
FEED_FORWARD = re.compile(r"mlp|ffn|feed_?forward|^ff$|^ff_")
RAW_PROJECTION = re.compile(r"w?[qkvo]")  # XLNet keeps q, k, v, o as bare parameters
NUMBERED = re.compile(r"[a-z]+\d+")  # layer1, layer2, ... ; b1, b2, ...

# Class names. A norm and a learned scale are both one vector, an expert stack and a bank of tokens are both one bare
# tensor, and an attention whose query is not called q still says that it is one: no shape tells them apart, the class
# does.
NORM_CLASS = re.compile(r"norm|ln|bn")
EXPERT_CLASS = re.compile(r"expert")
TABLE_CLASS = re.compile(r"embedding")
ATTENTION_CLASS = re.compile(r"atten|attn")
CROSS_CLASS = re.compile(r"cross_?att")
PATCH_CLASS = re.compile(r"patchembed")
DROP_PATH_CLASS = re.compile(r"drop_?path|stochastic_?depth")  # it drops whole rows, and has no weight

_WEIGHTS = {
    "attn": "q k v kv qkv q_a q_b kv_a kv_b out",
    "cross": "q k v kv qkv q_a q_b kv_a kv_b out",
    "pool": "q k v qkv out",
    "mlp": "gate up gate_up down",
    "experts": "gate up gate_up down",
    "attn_mlp": "in out",
    "ssm": "in conv x dt out",
    "embed": "pos type",
    "norm": "inner embed final",
    "pos": "proj",
    "stack": "decoder",
}
_SINGLE = "stack block attn cross mlp ssm embed norm patch head router conv se down mod"

#: Every role a weight or a module can have.
ROLES = frozenset(_SINGLE.split()) | {
    f"{family}.{part}" for family, parts in _WEIGHTS.items() for part in parts.split()
}
#: Roles of weights whose slices serve several operands, or all of one after a low-rank factor.
FUSED_ROLES = frozenset(
    role for role in ROLES if role.partition(".")[2] in ("qkv", "kv", "kv_b", "q_b", "gate_up") or role == "attn_mlp.in"
)
OTHER = "other"


@lru_cache(maxsize=65536)
def tokens(text: str) -> tuple[str, ...]:
    """Returns the tokens of a name: `embeddings.LayerNorm_2b` -> ('embeddings', 'layer', 'norm', 'b')."""
    spaced = re.sub(r"([a-z])([A-Z])", r"\1_\2", text).lower()
    return tuple(token for token in re.split(r"[^a-z]+", spaced) if token)


@lru_cache(maxsize=65536)
def words(text: str) -> frozenset[str]:
    """Returns the tokens of a name as a set, to test whether the name mentions, for example, positions."""
    return frozenset(tokens(text))


@lru_cache(maxsize=65536)
def is_generic(component: str) -> bool:
    """Whether one path component is generic: a number, or a generic word with or without a number (`conv2d`, `fc1`)."""
    return component.isdigit() or re.sub(r"\d+d?$", "", component) in GENERIC


@lru_cache(maxsize=65536)
def operands(component: str) -> str:
    """Returns the attention operands that a name mentions: "q", "k", "v", "kv", "qkv", or "" for none."""
    named = words(component)
    joined = "".join(tokens(component))
    if named & POSITION:  # pos_key_proj projects positions, not keys
        return ""
    if any(fused in joined for fused in FUSED_NAMES):
        return "qkv"
    if named & KEY_VALUE:
        return "kv"
    return "".join(letter for letter, known in (("q", QUERY), ("k", KEY), ("v", VALUE)) if named & known)


@lru_cache(maxsize=65536)
def is_feed_forward(text: str) -> bool:
    return FEED_FORWARD.search(text) is not None
