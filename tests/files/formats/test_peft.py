"""LoRA and DoRA in folders of peft, with every option that changes what is computed, both ways; adapters of a bare
encoder; names without a prefix; and what is refused by name.

Each way in: peft makes and saves an adapter, ours gives the same outputs, and natively saved the same to the bit. The
way back: what was loaded gets other numbers, is saved for peft, and peft gives the same outputs."""

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from one_layer import One
from peft_folders import assert_reads, assert_same, assert_writes, fill, saved_by_peft
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

import peftcore
from peftcore.errors import CheckpointError, ExportError, HostMismatch
from peftcore.injection.injection import Injection
from peftcore.testing.hosts import HOSTS

pytestmark = pytest.mark.filterwarnings("ignore:::peft")
Run = Callable[[nn.Module], Tensor]
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def host(name: str) -> tuple[nn.Module, Run]:
    model, inputs = HOSTS[name].build()
    return model.eval(), lambda adapted: HOSTS[name].output(adapted(**inputs))


def both_ways(base: nn.Module, config: peft.PeftConfig, run: Run, path: Path) -> tuple[Injection, dict[str, Any]]:
    """The injection that was read, and the options that were written."""
    injection = assert_reads(base, config, run, path)
    fill(injection.parameters())
    injection.save(path / "back", format="peft")
    theirs = peft.PeftModel.from_pretrained(deepcopy(base), str(path / "back")).eval()
    with torch.no_grad():
        assert_same(run(base), run(injection.model), run(theirs))
    return injection, json.loads((path / "back" / CONFIG).read_text())


def lora(**options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 6, **options})


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "scale": ("llama", {"target_modules": ["q_proj", "v_proj"], "lora_alpha": 3}),
    "rslora": ("llama", {"target_modules": ["q_proj", "v_proj"], "use_rslora": True}),
    "dora": ("llama", {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "dora, rslora": ("llama", {"target_modules": ["q_proj"], "use_dora": True, "use_rslora": True}),
    "rank and alpha by name": (
        "llama",
        {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 9}},
    ),
    "rank and alpha by expression": (
        "llama",
        {
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {r"layers\.[1-9]\.self_attn\.\w+": 2, "^model.layers.0.self_attn.q_proj": 3, "v_proj": 5},
            "alpha_pattern": {r".*\.0\..*(q|v)_proj": 9},
        },
    ),
    "dora, patterns, rslora": (
        "llama",
        {
            "target_modules": ["q_proj", "v_proj"],
            "use_dora": True,
            "use_rslora": True,
            "rank_pattern": {"v_proj": 2},
            "alpha_pattern": {"layers.1.self_attn.q_proj": 9},
        },
    ),
    "Conv1D of transformers": ("gpt2", {"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True}),
    "dora in Conv1D": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": True}),
    "all biases": ("bert", {"target_modules": ["query", "value"], "bias": "all"}),
    "biases of adapted modules": ("bert", {"target_modules": ["query", "value"], "bias": "lora_only"}),
    "biases of Conv1D": ("gpt2", {"target_modules": ["c_attn"], "bias": "lora_only"}),
    "one layer": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": 1}),
    "layers by their list": (
        "llama",
        {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
    ),
    "layers of several lists": (
        "t5",
        {"target_modules": ["q", "wo"], "layers_to_transform": [1], "layers_pattern": ["blocks", "block"]},
    ),
    "regex": ("llama", {"target_modules": r".*layers\.(0\.self_attn\.(q|k)|1\.mlp\.down)_proj"}),
    "excluded names": (
        "llama",
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
    ),
    "excluded by regex": ("llama", {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.1\..*v_proj"}),
    "all linear": ("llama", {"target_modules": "all-linear"}),
    "a head": ("bert", {"target_modules": ["query"], "modules_to_save": ["classifier"]}),
    "a head and biases": (
        "bert",
        {"target_modules": ["query"], "modules_to_save": ["classifier"], "bias": "lora_only"},
    ),
    "experts": ("moe", {"target_modules": [], "target_parameters": ["experts.down_proj"]}),
    "several parameters of one module": (
        "moe",
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    ),
    "parameters, other order": (
        "moe",
        {"target_modules": [], "target_parameters": ["experts.down_proj", "experts.gate_up_proj"], "use_rslora": True},
    ),
    "rank of one parameter": (
        "moe",
        {
            "target_modules": [],
            "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
            "rank_pattern": {"down_proj": 2},
            "alpha_pattern": {r"layers\.0\..*gate_up_proj": 9},
        },
    ),
    "a router that is no layer": (
        "moe",
        {"target_modules": [], "target_parameters": ["mlp.gate.weight", "experts.down_proj"]},
    ),
    "tokens": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [9, 3, 5]}),
    "tokens of a tied table": ("gpt2", {"target_modules": ["c_attn"], "trainable_token_indices": {"wte": [9, 3]}}),
    "tokens, tied and said twice": (
        "gpt2",
        {"target_modules": ["c_attn"], "trainable_token_indices": {"lm_head": [9, 3], "wte": [9, 3]}},
    ),
    "tokens of several tables": (
        "llama",
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [9, 3, 5], "lm_head": [1, 7]}},
    ),
    "tokens and a dora": ("llama", {"target_modules": ["q_proj"], "use_dora": True, "trainable_token_indices": [4]}),
    "a table": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "dora in a table": ("bert", {"target_modules": ["word_embeddings"], "use_dora": True}),
}


@pytest.mark.share(3)
@pytest.mark.parametrize("case", CASES)
def test_options(case: str, tmp_path: Path) -> None:
    name, options = CASES[case]
    base, run = host(name)
    both_ways(base, lora(**options), run, tmp_path)


LAYERS: dict[str, Any] = {
    "linear": (lambda: nn.Linear(6, 5), (3, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), padding=(1, 0), stride=2), (2, 4, 7, 6)),
    "conv3d": (lambda: nn.Conv3d(4, 3, 2), (2, 4, 3, 4, 3)),
}


@pytest.mark.parametrize("extra", ["plain", "use_rslora", "use_dora", "lora_bias", "lora_only"])
@pytest.mark.parametrize("kind", LAYERS)
def test_kinds_of_layers(kind: str, extra: str, tmp_path: Path) -> None:
    build, shape = LAYERS[kind]
    base, x = One(build()), torch.randn(shape)
    options = {"bias": extra} if extra == "lora_only" else {} if extra == "plain" else {extra: True}
    injection, written = both_ways(base, lora(target_modules=["layer"], r=2, **options), lambda m: m(x), tmp_path)
    assert injection.method.name == ("dora" if extra == "use_dora" else "lora")
    assert written["bias"] == ("lora_only" if extra in ("lora_only", "lora_bias") else "none")


@pytest.mark.parametrize("kind", ["plain", "use_dora"])
def test_tables(kind: str, tmp_path: Path) -> None:
    base, ids = One(nn.Embedding(9, 5)), torch.tensor([[1, 8, 0], [3, 3, 2]])
    options = {} if kind == "plain" else {kind: True}
    both_ways(base, lora(target_modules=["layer"], r=2, **options), lambda model: model(ids), tmp_path)


@pytest.mark.parametrize("kind", ["plain", "use_dora"])
def test_tables_that_scale_what_they_look_up(kind: str, tmp_path: Path) -> None:
    base, ids = One(Gemma3TextScaledWordEmbedding(9, 6, 0, embed_scale=3.0)), torch.tensor([[1, 8, 0]])
    options = {} if kind == "plain" else {kind: True}
    both_ways(base, lora(target_modules=["layer"], r=2, **options), lambda model: model(ids), tmp_path)


class Raw(nn.Module):
    """A module with matrices of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(5, 6)), nn.Parameter(torch.randn(4, 5))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.first.T @ self.second.T


def test_matrices_of_a_module_that_is_no_layer(tmp_path: Path) -> None:
    base, x = One(Raw()), torch.randn(3, 6)
    for names in (["layer.second"], ["layer.first", "layer.second"]):
        config = lora(target_modules=[], target_parameters=names, rank_pattern={"second": 3})
        path = tmp_path / str(len(names))
        injection, written = both_ways(base, config, lambda model: model(x), path)
        assert list(injection.operators) == written["target_parameters"] == names
    changed(tmp_path / "1" / "theirs", target_parameters=["layer.first", "layer.second"])
    with pytest.raises(CheckpointError, match=r"missing tensors for layer\.first, which target_parameters matches"):
        peftcore.load(deepcopy(base), tmp_path / "1" / "theirs")


@pytest.mark.parametrize("declared", [None, True])
def test_experts_stored_by_inputs(declared: bool | None, tmp_path: Path) -> None:
    """Llama 4's, which do not say so, so that peft takes inputs for outputs; and the same that do."""
    config = transformers.Llama4TextConfig(num_local_experts=3, hidden_size=6, intermediate_size=5)
    base, x = One(Llama4TextExperts(config)), torch.randn(12, 6)
    for parameter in base.parameters():
        nn.init.normal_(parameter)
    if declared is not None:
        base.layer.is_transposed = declared
    names = ["layer.gate_up_proj", "layer.down_proj"]
    both_ways(base, lora(target_modules=[], target_parameters=names), lambda model: model(x), tmp_path)


def test_attention_of_torch(tmp_path: Path) -> None:
    """Its packed projection and the one behind it, whose update peft adds twice, in its forward and merged."""
    base, x = One(nn.MultiheadAttention(8, 2, batch_first=True)), torch.randn(2, 3, 8)
    nn.init.normal_(base.layer.in_proj_bias)
    config = lora(target_modules=["layer"], rank_pattern={"layer": 3})
    injection, written = both_ways(base, config, lambda model: model(x, x, x)[0], tmp_path)
    assert sorted(injection.operators) == ["layer.in_proj_weight", "layer.out_proj.weight"]
    assert written["target_modules"] == ["layer"]


@pytest.mark.parametrize(
    ("name", "method", "options"),
    [
        ("llama", "lora", {}),
        ("llama", "lora", {"scaling": "sqrt_rank", "rank": 3, "alpha": 7.0, "target": "all-linear"}),
        ("llama", "dora", {"overrides": {"*layers.1.*": {"rank": 2, "alpha": 30.0}}}),
        ("llama", "lora", {"overrides": {"*q_proj": {"rank": 2}, "*layers.0.*v_proj": {"alpha": 3.0}}}),
        ("llama", "lora_plus", {}),
        ("gpt2", "lora", {"target": ["*c_attn", "*mlp.c_proj"]}),
        ("bert", "lora", {"train": ["classifier"]}),
        ("moe", "lora", {"target": ["attn.q", "experts.gate_up", "experts.down"]}),
    ],
)
def test_adapters_made_here(name: str, method: str, options: dict[str, Any], tmp_path: Path) -> None:
    base, run = host(name)
    assert_writes(base, method, options, run, tmp_path)


def test_a_union_made_here(tmp_path: Path) -> None:
    """One file holds a LoRA and the tokens of several tables, in whatever order the parts stand."""
    base, run = host("llama")
    tables = {"model.embed_tokens": [9, 3], "lm_head": [1, 7, 5]}
    parts = [{"method": "trainable_tokens", "token_indices": ids, "target": path} for path, ids in tables.items()]
    parts.insert(1, {"method": "lora", "rank": 3, "target": "attn.q"})
    written = assert_writes(base, "config_union", {"parts": parts}, run, tmp_path)
    assert written["peft_type"] == "LORA" and written["target_modules"] == ["q_proj"]
    assert written["trainable_token_indices"] == {"embed_tokens": [3, 9], "lm_head": [1, 5, 7]}
    again = deepcopy(base)
    injection = peftcore.load(again, tmp_path / "ours")
    assert [part.method.name for part in injection.parts.values()] == ["lora", "trainable_tokens", "trainable_tokens"]


# --- bases with a head and without


def encoder_and_classifier() -> tuple[nn.Module, nn.Module]:
    """Both with the same encoder; what the classifier adds stands behind it."""
    config = transformers.BertConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    classifier = transformers.BertForSequenceClassification(config).eval()
    bare = transformers.BertModel(config).eval()
    bare.load_state_dict(classifier.bert.state_dict())
    return bare, classifier


@pytest.mark.parametrize("fmt", ["peftcore", "peft"])
def test_an_adapter_of_a_bare_encoder_on_a_classifier_and_back(fmt: str, tmp_path: Path) -> None:
    bare, classifier = encoder_and_classifier()
    base, ids = deepcopy(bare), torch.randint(1, 40, (2, 6))
    options = {"rank": 3, "overrides": {"encoder.layer.0.*": {"rank": 2}}, "train": ["pooler"]}
    injection = peftcore.apply(bare, "lora", **options)
    fill(injection.parameters())
    expected = bare(ids).last_hidden_state
    assert (expected - base(ids).last_hidden_state).abs().max() > 0.01
    injection.save(tmp_path / "bare", format=fmt)
    there = peftcore.load(classifier, tmp_path / "bare")
    assert torch.equal(classifier.bert(ids).last_hidden_state, expected)
    assert all(path.startswith("bert.") for path in (*there.operators, *there.trained_along))
    assert there.config.at("bert.encoder.layer.0.attention.self.query").rank == 2
    there.save(tmp_path / "below", format=fmt)
    back = deepcopy(base)
    peftcore.load(back, tmp_path / "below")
    assert torch.equal(back(ids).pooler_output, bare(ids).pooler_output)


def test_an_adapter_of_a_bare_encoder_that_peft_made(tmp_path: Path) -> None:
    bare, classifier = encoder_and_classifier()
    ids = torch.randint(1, 40, (2, 6))
    config = lora(target_modules=["query", "output.dense"], layers_to_transform=[1], rank_pattern={"query": 2})
    theirs = saved_by_peft(bare, config, tmp_path / "bare")
    peftcore.load(classifier, tmp_path / "bare")
    torch.testing.assert_close(classifier.bert(ids)[0], theirs(ids)[0])
    with pytest.raises(HostMismatch, match="belongs to another base: this model has no encoder"):
        peftcore.load(host("llama")[0], tmp_path / "bare")
    two = nn.ModuleDict({"one": deepcopy(bare), "other": deepcopy(bare)})
    with pytest.raises(HostMismatch, match="fits at several places of this host: 'one', 'other'"):
        peftcore.load(two, tmp_path / "bare")


# --- names and damage


def changed(path: Path, **options: Any) -> None:
    config = json.loads((path / CONFIG).read_text())
    (path / CONFIG).write_text(json.dumps(config | options))


def saved(path: Path, **options: Any) -> tuple[nn.Module, nn.Module, Tensor]:
    """A host of two layers, peft's adapter on it, and inputs."""
    base, x = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)), torch.randn(3, 6)
    return base, saved_by_peft(base, lora(**{"target_modules": ["0", "2"], **options}), path), x


def test_statistics_come_with_a_norm_that_trains_along(tmp_path: Path) -> None:
    """Here they are the host's, so those of a file have to be the same; how many batches there were is of no matter."""
    base, x = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 5)).eval(), torch.randn(3, 6)
    nn.init.normal_(base[1].running_mean)
    both_ways(base, lora(target_modules=["0"], modules_to_save=["1"]), lambda model: model(x), tmp_path)
    file = tmp_path / "theirs" / TENSORS
    tensors = load_file(file)
    name = "base_model.model.1.{}"
    assert {name.format(each) for each in ("running_mean", "running_var", "num_batches_tracked")} <= tensors.keys()
    assert load_file(tmp_path / "back" / TENSORS).keys() == tensors.keys()
    count = tensors[name.format("num_batches_tracked")]
    save_file(tensors | {name.format("num_batches_tracked"): count + 7}, file)
    peftcore.load(deepcopy(base), tmp_path / "theirs")
    for other in (tensors[name.format("running_mean")] + 1, torch.zeros(3)):
        save_file(tensors | {name.format("running_mean"): other}, file)
        with pytest.raises(CheckpointError, match=r"running_mean differs from the host's buffer 1\.running_mean"):
            peftcore.load(deepcopy(base), tmp_path / "theirs")


@pytest.mark.parametrize("fmt", ["peft", "diffusers", "kohya"])
def test_a_file_beside_another_adapter(fmt: str, tmp_path: Path) -> None:
    """The operators that are on the host already have names that end as the modules do which the file means."""
    model, run = host("llama")
    injection = peftcore.apply(model, "lora", target=["q_proj"], rank=2)
    fill(injection.parameters())
    injection.save(tmp_path, format=fmt)
    expected = run(model)
    again = peftcore.load(model, tmp_path, name="again")
    with peftcore.activate(model, again.name):
        assert torch.equal(run(model), expected)


@pytest.mark.parametrize("prefix", ["", "base_model."])
def test_names_without_a_prefix(prefix: str, tmp_path: Path) -> None:
    base, theirs, x = saved(tmp_path, modules_to_save=["2"], target_modules=["0"])
    tensors = load_file(tmp_path / TENSORS)
    short = {prefix + name.removeprefix("base_model.model."): value for name, value in tensors.items()}
    assert short.keys().isdisjoint(tensors)
    save_file(short, tmp_path / TENSORS)
    peftcore.load(base, tmp_path)
    torch.testing.assert_close(base(x), theirs(x))


@pytest.mark.parametrize(
    "options",
    [
        {"alora_invocation_tokens": "yes"},
        {"use_qalora": True},
        {"use_bdlora": {"nblocks": 2}},
        {"arrow_config": {"top_k": 2}},
        {"megatron_config": {"tensor_model_parallel_size": 1}},
        {"invented": 0.5},
        {"invented": "on"},
        {"invented": True},
    ],
    ids=lambda options: " ".join(map(str, *options.items())),
)
def test_options_that_are_not_understood_are_refused_by_name(options: dict[str, Any], tmp_path: Path) -> None:
    base, _, _ = saved(tmp_path)
    changed(tmp_path, **options)
    before = deepcopy(base.state_dict())
    (name,) = options
    with pytest.raises(CheckpointError, match=name):
        peftcore.load(base, tmp_path)
    assert not peftcore.injections(base) and all(torch.equal(base.state_dict()[k], v) for k, v in before.items())


@pytest.mark.parametrize("start", ["pissa_niter_4", "corda", "loftq"])
def test_starts_that_change_the_base_are_refused(start: str, tmp_path: Path) -> None:
    base, _, _ = saved(tmp_path)
    changed(tmp_path, init_lora_weights=start)
    with pytest.raises(CheckpointError, match=f"init_lora_weights = '{start}'"):
        peftcore.load(base, tmp_path)


@pytest.mark.parametrize("off", [None, False, "", [], {}])
def test_an_unknown_option_that_is_off_is_passed_over(off: Any, tmp_path: Path) -> None:
    base, theirs, x = saved(tmp_path)
    changed(tmp_path, invented=off, peft_version="9.9", init_lora_weights="gaussian", lora_dropout=0.5)
    peftcore.load(base.eval(), tmp_path)
    torch.testing.assert_close(base(x), theirs(x))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"r": "4"}, "'r' is '4', expected int"),
        ({"r": True}, "'r' is True"),
        ({"r": 0}, "a rank is 1 or more"),
        ({"r": 3}, r"lora_A\.weight has shape \(4, 6\), expected \(3, 6\)"),
        ({"rank_pattern": {"2": 3}}, r"2\.lora_A\.weight has shape"),
        ({"rank_pattern": {"(": 3}}, "cannot be matched"),
        ({"target_modules": ["0"]}, "unknown tensors for 2, which target_modules does not match"),
        ({"target_modules": ["0", "1", "2"]}, "missing tensors for 1, which target_modules matches"),
        ({"exclude_modules": ["2"]}, "unknown tensors for 2"),
        ({"use_dora": True}, "missing lora_magnitude_vector"),
        ({"peft_type": "INVENTED"}, "no installed plugin reads peft's INVENTED"),
        ({"peft_type": None}, "'peft_type' is None"),
    ],
)
def test_options_that_the_tensors_contradict(options: dict[str, Any], match: str, tmp_path: Path) -> None:
    base, _, _ = saved(tmp_path)
    changed(tmp_path, **options)
    with pytest.raises(CheckpointError, match=match):
        peftcore.load(base, tmp_path)
    assert not peftcore.injections(base)


def test_tables_that_are_tied_have_the_same_tokens(tmp_path: Path) -> None:
    base, _ = host("gpt2")
    tokens = {"wte": [9, 3], "lm_head": [9, 4]}
    saved_by_peft(base, lora(target_modules=["c_attn"], trainable_token_indices=tokens), tmp_path)
    with pytest.raises(CheckpointError, match="tied to a table in which other tokens train"):
        peftcore.load(base, tmp_path)


def test_what_peft_cannot_hold(tmp_path: Path) -> None:
    def refused(match: str, name: str, method: str, **options: Any) -> None:
        injection = peftcore.apply(host(name)[0], method, **options)
        with pytest.raises(ExportError, match=match):
            injection.save(tmp_path / "none", format="peft")
        assert not (tmp_path / "none").exists()

    refused("a part of a fused projection", "gpt2", "lora", target="attn.q")
    refused(r"classifier\.weight", "bert", "lora", train=["classifier.weight"])
    refused("one use_rslora for all", "llama", "lora", overrides={"*q_proj": {"scaling": "sqrt_rank"}})
    refused("no method that computes what houlsby_adapter does", "bert", "houlsby_adapter")
    refused(
        "peft computes something else with tensors other than biases of linear layers", "bert", "bitfit", head=False
    )
    tokens = {"method": "trainable_tokens", "token_indices": [3]}
    refused("at one module", "llama", "config_union", parts=[{"method": "lora", "target": "embed"}, tokens])
    ia3 = {"method": "ia3"}
    refused("the types IA3 and TRAINABLE_TOKENS in one file", "llama", "config_union", parts=[ia3, tokens])
    loras = [{"method": "lora"}, {"method": "lora", "target": "mlp.down"}]
    refused("several parts of the types LORA in one file", "llama", "config_union", parts=loras)


def test_what_peft_computes_otherwise(tmp_path: Path) -> None:
    for layer, match in (
        (nn.Conv2d(4, 6, 3, groups=2), "groups"),
        (nn.Conv2d(4, 6, 3, dilation=2), "a dilation"),
        (nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular"), "padding_mode='circular'"),
        (nn.Embedding(9, 4, max_norm=1.0), "max_norm"),
    ):
        injection = peftcore.apply(One(layer), "lora", target="layer", rank=2)
        with pytest.raises(ExportError, match=f"peft computes something else with {match}"):
            injection.save(tmp_path / "none", format="peft")
    base = One(nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"))
    saved_by_peft(base, lora(target_modules=["layer"]), tmp_path / "theirs")
    with pytest.raises(CheckpointError, match="padding_mode='circular'"):
        peftcore.load(base, tmp_path / "theirs")
    injection = peftcore.apply(host("moe")[0], "dora", target="experts.down")
    with pytest.raises(ExportError, match="neither DoRA nor dropout at parameters"):
        injection.save(tmp_path / "none", format="peft")
    attention = One(nn.MultiheadAttention(8, 2))
    injection = peftcore.apply(attention, "lora", target="layer.out_proj.weight")
    with pytest.raises(ExportError, match="peft adapts all of layer"):
        injection.save(tmp_path / "none", format="peft")


def test_an_expression_that_takes_too_long_is_stopped(tmp_path: Path) -> None:
    base = nn.ModuleDict({"a" * 60: nn.Linear(6, 5)})
    saved_by_peft(base, lora(target_modules=["a" * 60]), tmp_path)
    changed(tmp_path, rank_pattern={"(a|aa)+!": 3})
    with pytest.raises(CheckpointError, match="cannot be matched"):
        peftcore.load(base, tmp_path)
