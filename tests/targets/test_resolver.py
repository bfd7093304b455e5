"""Every form of a target, what is left out, and what is told when nothing fits."""

from typing import Any

import pytest
import torch
from core_toys import Shift, perceptron, snapshot, stir, token_ids, transformer
from torch import Tensor, nn

import peftcore
from peftcore.errors import TargetError
from peftcore.roles import derive

QUERIES = [f"layers.{i}.self_attn.q_proj" for i in (0, 1)]
VALUES = [f"layers.{i}.self_attn.v_proj" for i in (0, 1)]
INNER = [
    f"layers.{i}.{rest}"
    for i in (0, 1)
    for rest in (
        *(f"self_attn.{letter}_proj" for letter in "qkvo"),
        "mlp.up_proj",
        "mlp.down_proj",
    )
]


def paths(model: nn.Module, method: Any = Shift, **arguments: Any) -> list[str]:
    return [site.path for site in peftcore.plan(model, method, **arguments).sites]


class Listed(nn.Module):
    """Rows in a list of parameters, which has no forward."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.ParameterList([torch.randn(3, 4), torch.randn(2, 4)])

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, *self.rows])


def test_lists_of_parameters_are_read_by_what_holds_them() -> None:
    model, x = nn.Sequential(Listed()), torch.randn(1, 4)
    base = model(x)
    injection = peftcore.apply(model, Shift, target="0.rows.1")
    assert list(injection.operators) == ["0.rows.1"]
    moved = torch.tensor([0.0, 0, 0, 0, 1, 1]).unsqueeze(1)
    assert torch.allclose(model(x) - base, moved.expand(6, 4), atol=1e-6)
    injection.merge()
    assert torch.allclose(model(x) - base, moved.expand(6, 4), atol=1e-6)
    injection.remove()
    assert torch.equal(model(x), base)


def by_class(path: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and module.out_features == 16


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        pytest.param("*.q_proj", QUERIES, id="glob"),
        pytest.param("layers.?.self_attn.q_proj", QUERIES, id="glob with a question mark"),
        pytest.param("layers.[1-9].*.q_proj", QUERIES[1:], id="glob with a class, star crosses dots"),
        pytest.param("q_proj", QUERIES, id="end of a path"),
        pytest.param("self_attn.q_proj", QUERIES, id="longer end of a path"),
        pytest.param("layers.1.self_attn.q_proj", QUERIES[1:], id="whole path"),
        pytest.param(["v_proj", "q_proj"], sorted(QUERIES + VALUES), id="ends, in the order of the host"),
        pytest.param(("q_proj", ["v_proj", ["q_proj"]]), sorted(QUERIES + VALUES), id="nested lists, no site twice"),
        pytest.param(r"re:layers\.\d\.self_attn\.[qv]_proj", sorted(QUERIES + VALUES), id="regular expression"),
        pytest.param(nn.Embedding, ["embed_tokens"], id="type"),
        pytest.param(by_class, ["layers.0.mlp.up_proj", "layers.1.mlp.up_proj"], id="predicate"),
        pytest.param(lambda path, module: path == "classifier", ["classifier"], id="predicate of the path"),
        pytest.param("attn.q", QUERIES, id="role"),
        pytest.param("head", ["classifier"], id="role without a dot"),
        pytest.param("embed", ["embed_tokens"], id="role of the table"),
        pytest.param(
            "norm",
            ["layers.0.attn_norm", "layers.0.mlp_norm", "layers.1.attn_norm", "layers.1.mlp_norm"],
            id="role only",
        ),
        pytest.param(
            "norm.*",
            ["layers.0.attn_norm", "layers.0.mlp_norm", "layers.1.attn_norm", "layers.1.mlp_norm", "norm"],
            id="family",
        ),
        pytest.param("all-linear", INNER, id="all-linear: inside blocks only"),
        pytest.param("classifier.bias", ["classifier.bias"], id="path of a parameter"),
        pytest.param("*.q_proj.bias", [f"{path}.bias" for path in QUERIES], id="glob for parameters"),
        pytest.param(["q_proj", nn.Embedding, "head"], ["embed_tokens", *QUERIES, "classifier"], id="mixed"),
    ],
)
def test_forms(target: Any, expected: list[str]) -> None:
    model = transformer()
    assert paths(model, target=target) == expected
    assert list(peftcore.apply(model, Shift, target=target).operators) == expected


def test_end_of_a_path_is_no_substring() -> None:
    with pytest.raises(TargetError):
        paths(transformer(), target="proj")


def test_regular_expression_is_for_the_whole_path() -> None:
    with pytest.raises(TargetError):
        paths(transformer(), target="re:q_proj")


@pytest.mark.parametrize(
    ("exclude", "expected"),
    [
        pytest.param("layers.0", QUERIES[1:], id="module above"),
        pytest.param("layers.0.self_attn", QUERIES[1:], id="module right above"),
        pytest.param("layers.1.*", QUERIES[:1], id="glob"),
        pytest.param(r"re:layers\.0\..*", QUERIES[1:], id="regular expression"),
        pytest.param(lambda path, module: "0" in path, QUERIES[1:], id="predicate"),
        pytest.param(["head", "layers.1"], QUERIES[:1], id="list"),
        pytest.param("attn.k", QUERIES, id="role of others"),
        pytest.param("no_such_thing", QUERIES, id="nothing"),
    ],
)
def test_exclude(exclude: Any, expected: list[str]) -> None:
    assert paths(transformer(), target="attn.q", exclude=exclude) == expected


@pytest.mark.parametrize(
    ("exclude", "left"),
    [("attn.q", "kvo"), ("*.q_proj", "kvo"), (["attn.q", "attn.out"], "kv"), ("re:.*[qk]_proj", "vo")],
    ids=str,
)
def test_exclude_by_role_from_all_linear(exclude: Any, left: str) -> None:
    found = paths(transformer(), target="all-linear", exclude=exclude)
    assert [path for path in found if "attn" in path] == [
        f"layers.{i}.self_attn.{letter}_proj" for i in (0, 1) for letter in left
    ]
    assert len([path for path in found if "mlp" in path]) == 4


def test_exclude_applies_to_default_targets() -> None:
    assert paths(transformer(), exclude="layers.0") == QUERIES[1:]


def test_name_that_only_begins_alike_is_not_excluded() -> None:
    model = nn.ModuleDict({"first": nn.Linear(2, 2), "first_more": nn.Linear(2, 2)})
    assert paths(model, target=nn.Linear, exclude="first") == ["first_more"]


def test_excluding_everything_is_an_error() -> None:
    with pytest.raises(TargetError, match="excludes everything"):
        paths(transformer(), target="attn.q", exclude="layers")


@pytest.mark.parametrize(
    ("target", "close"),
    [("q_porj", "q_proj"), ("attn.qq", "attn.q"), ("all_linear", "all-linear"), ("clasifier", "classifier")],
)
def test_nothing_shows_close_names_and_changes_nothing(target: str, close: str) -> None:
    model = transformer()
    before = snapshot(model)
    with pytest.raises(TargetError) as caught:
        peftcore.apply(model, Shift, target=target)
    assert repr(target) in str(caught.value) and close in str(caught.value).partition("Its roles")[0]
    assert "attn.q" in str(caught.value).partition("Its roles")[2]
    assert snapshot(model) == before


@pytest.mark.parametrize("target", [[], ()], ids=str)
def test_empty_target_is_an_error(target: Any) -> None:
    with pytest.raises(TargetError):
        paths(transformer(), target=target)


def test_regular_expression_that_cannot_be_read_is_a_target_error() -> None:
    with pytest.raises(TargetError, match=r"re:\("):
        paths(transformer(), target="re:(")


def test_what_is_no_target_at_all_is_a_target_error() -> None:
    with pytest.raises(TargetError):
        paths(transformer(), target=7)
    with pytest.raises(TargetError):
        paths(transformer(), target=["q_proj", None])


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (["q_proj", "v_porj"], r"target 'v_porj' matches nothing in this Transformer; similar names: v_proj, "),
        (["q_proj", "v_porj", nn.Conv2d], r"target 'v_porj', Conv2d matches nothing"),
        (["attn.q", "cross.q"], r"target 'cross.q' matches nothing .*: it has no such roles\..*'all-layers'"),
    ],
)
def test_one_part_that_matches_nothing_is_an_error(target: Any, message: str) -> None:
    model = transformer()
    before = snapshot(model)
    with pytest.raises(TargetError, match=message):
        peftcore.apply(model, Shift, target=target)
    assert snapshot(model) == before
    with pytest.raises(TargetError, match=message):
        peftcore.quantize(model, "nf4", target=target)
    assert snapshot(model) == before


def test_near_names_are_said_once() -> None:
    with pytest.raises(TargetError, match=r"similar names: q_proj, \w+, \w+\. Its roles"):
        paths(transformer(), target=["q_porj", "q_proj_"])


def test_an_exclusion_that_matches_nothing_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """It is no error: one list of what to leave out serves several models."""
    peftcore.apply(transformer(), Shift, target="attn.*", exclude=["k_proj", "v_porj"])
    assert [each for each in caplog.messages if "v_porj" in each and "similar names: v_proj" in each] == caplog.messages


@pytest.mark.parametrize(
    "target", ["0", "*0", "re:0.*", lambda path, module: "0" in path], ids=["name", "glob", "pattern", "predicate"]
)
def test_the_inside_of_a_parametrization_is_no_target(target: Any) -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 2))
    found = [path for path in paths(model, target=target) if path]
    assert found and not [path for path in found if "parametrizations" in path]
    assert "0" in found


def test_default_roles_that_a_host_lacks_are_passed_over_in_silence(recwarn: pytest.WarningsRecorder) -> None:
    assert paths(transformer(), "lora") == sorted(QUERIES + VALUES)  # its default asks for cross attention too
    assert not recwarn.list


def test_method_without_any_default_role_here_is_an_error() -> None:
    with pytest.raises(TargetError, match=r"attn\.q"):
        paths(perceptron())


def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    shape = {"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 13, "n_positions": 16}
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, bos_token_id=0, eos_token_id=0)).eval()


def clip() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    tower = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "projection_dim": 8}
    config = transformers.CLIPConfig(
        text_config={**tower, "hidden_size": 8, "vocab_size": 13, "bos_token_id": 0, "eos_token_id": 0},
        vision_config={**tower, "hidden_size": 16, "image_size": 8, "patch_size": 4},
        projection_dim=8,
    )
    return transformers.CLIPModel(config).eval()


def encoder_of(attention: nn.MultiheadAttention) -> nn.TransformerEncoder:
    """Two layers around such an attention."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    layer.self_attn = attention
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


ROWS = {"q": slice(0, 8), "k": slice(8, 16), "v": slice(16, 24)}


@pytest.mark.parametrize("part", "qkv")
def test_rows_of_gpt2s_transposed_projection(part: str) -> None:
    model = gpt2()
    fused = model.transformer.h[0].attn.c_attn
    base = fused.weight.detach().clone()
    injection = peftcore.apply(model, Shift, target=f"attn.{part}")
    assert list(injection.operators) == [f"transformer.h.0.attn.c_attn:attn.{part}"]
    (site,) = injection.sites
    assert site.weight_shape == (8, 8)
    injection.merge()
    moved = (fused.weight - base).T  # Conv1D keeps [in, out]
    assert torch.allclose(moved[ROWS[part]], torch.ones(8, 8), atol=1e-6)
    assert moved.abs().sum().item() == pytest.approx(64, abs=1e-4)


@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
def test_rows_of_gpt2_act_on_these_rows_of_the_output_alone(method: str) -> None:
    model = gpt2()
    fused = model.transformer.h[0].attn.c_attn
    x = torch.randn(2, 3, 8)
    base = fused(x)
    injection = peftcore.apply(model, method, target="attn.k")
    stir(injection, 0.5)
    moved = (fused(x) - base).abs().amax((0, 1))
    assert moved[ROWS["k"]].min() > 1e-4
    assert moved[ROWS["q"]].max() < 1e-6 and moved[ROWS["v"]].max() < 1e-6


@pytest.mark.parametrize("part", "qkv")
def test_rows_of_multihead_attention(part: str) -> None:
    encoder = encoder_of(nn.MultiheadAttention(8, 2, batch_first=True))
    attention = encoder.layers[0].self_attn
    base = attention.in_proj_weight.detach().clone()
    injection = peftcore.apply(encoder, Shift, target=f"attn.{part}", exclude="layers.1")
    assert list(injection.operators) == [f"layers.0.self_attn.in_proj_weight:attn.{part}"]
    injection.merge()
    moved = attention.in_proj_weight - base
    assert torch.allclose(moved[ROWS[part]], torch.ones(8, 8), atol=1e-6)
    assert moved.abs().sum().item() == pytest.approx(64, abs=1e-4)


@pytest.mark.parametrize(
    ("host", "prefix"),
    [
        (nn.MultiheadAttention(8, 2), ""),
        (nn.TransformerEncoderLayer(8, 2, 16), "self_attn."),
    ],
    ids=["attention", "layer"],
)
def test_roles_of_a_host_that_is_one_attention_or_one_layer(host: nn.Module, prefix: str) -> None:
    assert paths(host) == [f"{prefix}in_proj_weight:attn.q"]
    assert paths(host, target="attn.out") == [f"{prefix}out_proj.weight"]


def test_multihead_attention_with_separate_projections_has_its_three_tensors() -> None:
    encoder = encoder_of(nn.MultiheadAttention(8, 2, kdim=4, vdim=6, batch_first=True))
    found = peftcore.plan(encoder, Shift, target=["attn.q", "attn.k", "attn.v"], exclude="layers.1").sites
    assert {site.path: tuple(site.weight_shape) for site in found} == {
        "layers.0.self_attn.q_proj_weight": (8, 8),
        "layers.0.self_attn.k_proj_weight": (8, 4),
        "layers.0.self_attn.v_proj_weight": (8, 6),
    }


def test_rows_of_timms_fused_projection() -> None:
    timm = pytest.importorskip("timm")
    shape = {"img_size": 16, "patch_size": 8, "embed_dim": 8, "depth": 1, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", **shape).eval()
    base = model.blocks[0].attn.qkv.weight.detach().clone()
    injection = peftcore.apply(model, Shift, target="attn.v")
    assert list(injection.operators) == ["blocks.0.attn.qkv:attn.v"]
    injection.merge()
    assert torch.allclose((model.blocks[0].attn.qkv.weight - base)[ROWS["v"]], torch.ones(8, 8), atol=1e-6)
    assert torch.equal(model.blocks[0].attn.qkv.weight[:16], base[:16])


def test_part_of_a_fused_projection_is_excluded() -> None:
    model = gpt2()
    fused = "transformer.h.0.attn.c_attn"
    assert paths(model, target=["attn.q", "attn.v"], exclude="attn.q") == [f"{fused}:attn.v"]
    with pytest.raises(TargetError, match="excludes everything"):
        paths(model, target=["attn.q", "attn.v"], exclude="c_attn")


def test_out_proj_is_redirected_to_the_attention_that_reads_it() -> None:
    layer = encoder_of(nn.MultiheadAttention(8, 2, batch_first=True))
    for target in ("attn.out", "out_proj", "self_attn.out_proj", "*.out_proj"):
        (site, _) = peftcore.plan(layer, Shift, target=target).sites
        assert (site.module_path, site.tensor, site.form) == ("layers.0.self_attn", "out_proj.weight", "weight")
        assert site.module is layer.layers[0].self_attn
        assert site.path == "layers.0.self_attn.out_proj.weight"
    x = torch.randn(2, 3, 8)
    base = layer(x)
    injection = peftcore.apply(layer, "lora", target="out_proj")
    stir(injection)
    assert (layer(x) - base).abs().max() > 1e-3
    injection.merge()
    merged = layer(x)
    injection.unmerge()
    assert torch.allclose(layer(x), merged, atol=1e-5) and not torch.allclose(layer(x), base, atol=1e-3)


def test_multihead_attention_as_a_whole_is_its_packed_projection() -> None:
    (site,) = peftcore.plan(nn.TransformerEncoderLayer(8, 2, 16), Shift, target="self_attn").sites
    assert (site.path, tuple(site.weight_shape)) == ("self_attn.in_proj_weight", (24, 8))


def test_operators_of_another_injection_are_never_matched() -> None:
    model = transformer()
    peftcore.apply(model, "houlsby_adapter")  # its operators hold linear layers
    bare = transformer()
    for target in (nn.Linear, "re:.*(proj|down|up).*", lambda path, module: isinstance(module, nn.Linear), "*proj*"):
        assert paths(model, target=target) == paths(bare, target=target)
    second = peftcore.apply(model, "lora", target=nn.Linear)
    assert not [path for path in second.operators if "peft" in path.split(".")]
    plan = peftcore.plan(model, "bitfit")
    assert [site.path for site in plan.sites] == paths(bare, "bitfit")
    assert plan.total == peftcore.plan(bare, "bitfit").total


def test_users_map_decides_the_roles() -> None:
    model = perceptron()
    host = derive(model).override({"first": "attn.q"})
    assert paths(model, host=host) == ["first"]
    assert list(peftcore.apply(model, Shift, host=host).operators) == ["first"]

    swapped = derive(transformer()).override(
        {"layers.0.self_attn.q_proj": "attn.k", "layers.0.self_attn.k_proj": "attn.q"}
    )
    assert paths(transformer(), host=swapped) == ["layers.0.self_attn.k_proj", QUERIES[1]]


def test_override_of_the_map_refuses_what_it_does_not_know() -> None:
    host = derive(perceptron())
    with pytest.raises(TargetError, match="first"):
        host.override({"frist": "attn.q"})
    with pytest.raises(TargetError, match=r"attn\.q"):
        host.override({"first": "attn.qq"})


def test_defaults_stay_in_one_tower_and_users_targets_do_not() -> None:
    model = clip()
    default = paths(model)
    assert default == ["vision_model.encoder.layers.0.self_attn.q_proj"]
    both = paths(model, target="attn.q")
    assert both == ["text_model.encoder.layers.0.self_attn.q_proj", *default]
    assert paths(model, target="attn.q", exclude="vision_model") == both[:1]


TEXT, VISION = "text_model.encoder.layers.0", "vision_model.encoder.layers.0"


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        pytest.param("vision:attn.q", [f"{VISION}.self_attn.q_proj"], id="role"),
        pytest.param("text:attn.q", [f"{TEXT}.self_attn.q_proj"], id="role in the smaller tower"),
        pytest.param("text:mlp.*", [f"{TEXT}.mlp.fc1", f"{TEXT}.mlp.fc2"], id="family"),
        pytest.param("text:q_proj", [f"{TEXT}.self_attn.q_proj"], id="end of a path"),
        pytest.param("vision:*.fc?", [f"{VISION}.mlp.fc1", f"{VISION}.mlp.fc2"], id="glob"),
        pytest.param("vision:re:.*fc1", [f"{VISION}.mlp.fc1"], id="regular expression"),
        pytest.param("text:*.fc1.bias", [f"{TEXT}.mlp.fc1.bias"], id="parameter"),
        pytest.param(["vision:attn.q", "text:attn.v"], [f"{TEXT}.self_attn.v_proj", f"{VISION}.self_attn.q_proj"]),
    ],
)
def test_a_tower_in_front_of_a_target(target: Any, expected: list[str]) -> None:
    assert paths(clip(), target=target) == expected


@pytest.mark.parametrize("exclude", ["text:attn.q", "text:q_proj", "text:self_attn", "text:*.layers.*"])
def test_a_tower_in_front_of_what_is_left_out(exclude: str) -> None:
    assert paths(clip(), target="attn.q", exclude=exclude) == [f"{VISION}.self_attn.q_proj"]


@pytest.mark.parametrize("target", ["audio:attn.q", "vison:attn.q", "vision:attn.qq"])
def test_towers_are_told_where_nothing_matches(target: str) -> None:
    with pytest.raises(TargetError, match=r"Its towers: text:, vision:$"):
        paths(clip(), target=target)


def test_a_host_that_is_one_tower_has_that_alone() -> None:
    assert paths(gpt2(), target="text:attn.q") == paths(gpt2(), target="attn.q")
    with pytest.raises(TargetError, match=r"Its towers: text:$"):
        paths(gpt2(), target="vision:attn.q")


def test_tower_that_is_not_used_does_not_raise() -> None:
    """CLIP's text tower runs without its vision tower; the sites there have not had their chance yet."""
    model = clip()
    peftcore.apply(model, "lora", target="attn.q")
    model.get_text_features(input_ids=torch.tensor([[1, 2, 3]]))


def test_targets_do_not_disturb_the_host() -> None:
    model = transformer()
    before, output = snapshot(model), model(token_ids())
    peftcore.plan(model, "lora", target="all-linear", exclude="attn.q")
    assert snapshot(model) == before
    assert torch.equal(model(token_ids()), output)
