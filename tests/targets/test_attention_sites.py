"""Where attention can be edited: which module, what sizes, which projections; and what is refused before anything
changes."""

from typing import Any

import pytest
import torch
import transformers
from attention_hosts import METHODS, BesideConfig, host, method
from host_zoo import build
from torch import Tensor, nn

import peftcore
from peftcore.author import Attend, AttentionOperator, AttentionSite
from peftcore.errors import TargetError, UnsupportedSite
from peftcore.testing.tools import differences, trace

# Heads, heads of keys, widths of keys and of values, by hand from the configurations in the zoo.
SIZES = {
    "llama": (4, 2, 16, 16),
    "qwen2": (4, 2, 12, 12),
    "gemma3_text": (4, 2, 16, 16),
    "phi3": (4, 2, 12, 12),
    "gpt_neox": (4, 4, 12, 12),
    "opt": (4, 4, 12, 12),
    "deepseek_v2": (4, 4, 20, 10),
    "deepseek_v3": (4, 4, 20, 10),
    "zamba": (4, 4, 24, 24),
    "gpt2_cross": (4, 4, 12, 12),
    "bert_decoder": (4, 4, 12, 12),
    "distilbert": (4, 4, 12, 12),
    "albert": (4, 4, 12, 12),
    "modernbert": (4, 4, 12, 12),
    "t5": (4, 4, 16, 16),
    "whisper": (4, 4, 12, 12),
    "wav2vec2": (4, 4, 12, 12),
    "vit": (4, 4, 12, 12),
    "codegen": (4, 4, 12, 12),
    "bigcode_mq": (4, 1, 12, 12),
    "glm4": (4, 2, 16, 16),
    "gpt_oss": (4, 2, 16, 16),
    "qwen2_vl": (4, 2, 12, 12),
}


class Look(AttentionOperator):
    """Changes nothing; checks what it is given against what was said before the forward."""

    def __init__(self, site: AttentionSite, config: Any) -> None:
        super().__init__(site)
        self.unused = nn.Parameter(torch.zeros(1))
        self.looked: list[dict[str, Tensor]] = []

    def forward(self, attend: Attend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self.looked.append({"query": query, "key": key, "value": value})
        return attend(query, key, value)


def look(model: nn.Module, inputs: dict[str, Any]) -> peftcore.Injection:
    injection = peftcore.apply(model, method(Look, BesideConfig, "beside"))
    with torch.no_grad():
        model(**inputs)
    return injection


@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_those_that_come(name: str) -> None:
    model, inputs = build(name)
    injection = look(model, inputs)
    heads, kv_heads, head_dim, value_dim = SIZES[name]
    assert injection.operators
    for path, operator in injection.operators.items():
        assert isinstance(operator, Look) and operator.looked, path
        seen = operator.looked[0]
        for part, count, width in (
            ("query", heads, head_dim),
            ("key", kv_heads, head_dim),
            ("value", kv_heads, value_dim),
        ):
            assert (seen[part].shape[1], seen[part].shape[3]) == (count, width), f"{part} of {path}"
        assert injection.sites[0].weight_shape == torch.Size([heads, kv_heads, head_dim, value_dim])


@pytest.mark.parametrize(
    "name", ["llama", "phi3", "gpt_neox", "gpt2_cross", "bert_decoder", "t5", "codegen", "bigcode_mq"]
)
def test_projections_are_the_own_ones(name: str) -> None:
    """Separate, fused in blocks, fused by heads, transposed, with biases: what they make of the attention's own input
    is what came in (values carry no positions)."""
    model, inputs = build(name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases start at zero
                parameter.add_(torch.randn_like(parameter) * 0.1)
    taken: dict[str, Tensor] = {}

    def take(path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            states = kwargs.get("key_value_states", kwargs.get("encoder_hidden_states"))
            taken[path] = states if states is not None else args[0] if args else kwargs["hidden_states"]

        return hook

    injection = look(model, inputs)
    for site in injection.sites:
        site.module.register_forward_pre_hook(take(site.path), with_kwargs=True)
    with torch.no_grad():
        model(**inputs)
        for site in injection.sites:
            operator = injection.operators[site.path]
            value = operator.looked[-1]["value"][0]  # of the first row
            projection = operator.projections["v"]
            for base in (False, True):  # through the module, or from its tensors
                made = projection.apply(site.module, taken[site.path][0], base=base)
                torch.testing.assert_close(made.unflatten(-1, (len(value), -1)).transpose(0, 1), value)


@pytest.mark.parametrize(
    "name", ["falcon_old", "falcon_new", "bloom", "mpt", "gpt_neo", "deberta_v2", "xlnet", "timm_levit"]
)
def test_hosts_that_ignore_the_implementation_are_refused(name: str) -> None:
    model, _ = build(name)
    before = trace(model)
    with pytest.raises(UnsupportedSite, match="attention interface"):
        peftcore.apply(model, METHODS["in_front"])
    assert differences(before, trace(model)) == ""


def test_hosts_without_attention_have_no_target() -> None:
    with pytest.raises(TargetError):
        peftcore.apply(build("mamba")[0], METHODS["in_front"])


@pytest.mark.parametrize("implementation", ["flex_attention", "flash_attention_2", "paged|eager"])
def test_implementations_that_cannot_be_edited_are_refused(implementation: str) -> None:
    model = host("llama", "sdpa")
    model.config._attn_implementation = implementation
    before = trace(model)
    with pytest.raises(UnsupportedSite, match=implementation.replace("|", r"\|")):
        peftcore.apply(model, METHODS["in_front"])
    assert differences(before, trace(model)) == ""


def test_a_detour_by_option_is_refused() -> None:
    config = transformers.GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2, reorder_and_upcast_attn=True)
    model = transformers.GPT2LMHeadModel(config)
    with pytest.raises(UnsupportedSite, match="reorder_and_upcast_attn"):
        peftcore.apply(model, METHODS["in_front"])


def test_keys_picked_by_position_are_refused() -> None:
    config = transformers.DeepseekV32Config(
        vocab_size=9,
        hidden_size=16,
        intermediate_size=24,
        moe_intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
        first_k_dense_replace=1,
        n_routed_experts=2,
        num_experts_per_tok=1,
        n_group=1,
        topk_group=1,
    )
    with pytest.raises(UnsupportedSite, match="indices"):
        peftcore.apply(transformers.DeepseekV32ForCausalLM(config), METHODS["in_front"])


def test_the_module_inside_is_found() -> None:
    """BERT's attention also holds the output matrix and the norm: either path means the module that computes."""
    for target in (
        "*.0.attention",
        "*.0.attention.self",
        "re:.*layer.0.attention",
        lambda path, module: path.endswith("0.attention"),
    ):
        injection = peftcore.apply(host("bert"), METHODS["in_front"], target=target)
        assert [site.path for site in injection.sites] == ["bert.encoder.layer.0.attention.self:attention"]
    injection = peftcore.apply(host("bert"), METHODS["in_front"], exclude="*.0.attention.self")
    assert [site.path for site in injection.sites] == ["bert.encoder.layer.1.attention.self:attention"]


def test_a_module_with_several_attentions_is_ambiguous() -> None:
    with pytest.raises(UnsupportedSite, match="several attention modules"):
        peftcore.apply(host("t5"), METHODS["in_front"], target="decoder.block.0")
    with pytest.raises(UnsupportedSite, match="attention interface"):
        peftcore.apply(host("llama"), METHODS["in_front"], target="model.layers.0.mlp")


def test_sizes_that_cannot_be_told_are_refused() -> None:
    model = host("llama")
    model.model.layers[0].self_attn.head_dim = 5
    with pytest.raises(UnsupportedSite, match="sizes of its heads"):
        peftcore.apply(model, METHODS["in_front"])


def test_sizes_that_turn_out_otherwise_are_an_error() -> None:
    """The last line of defence, where a host changes after it was adapted."""
    model = host("llama")
    injection = peftcore.apply(model, METHODS["in_front"])
    operator = next(iter(injection.operators.values()))
    operator.geometry = peftcore.forward.attention.attention.Geometry(4, 4, 8, 8)
    with pytest.raises(UnsupportedSite, match="this attention computes with"):
        model(torch.ones(1, 3).long())


def test_plans_and_files_say_what_it_is(tmp_path: Any) -> None:
    model = host("llama")
    plan = peftcore.plan(model, METHODS["in_front"])
    assert "model.layers.0.self_attn:attention" in plan.tree()
    peftcore.register(METHODS["in_front"])
    injection = peftcore.apply(model, METHODS["in_front"])
    injection.save(tmp_path)
    other = host("llama")
    loaded = peftcore.load(other, tmp_path)
    for key, value in injection.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)
