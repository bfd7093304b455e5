"""More folders of AdapterHub's `adapters` 1.3.0, in float64 and for a batch with padding: adapterhub_padded/record.py
wrote them with the outputs of its models."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peftcore
from peftcore import Fuse
from peftcore.errors import CheckpointError, ExportError, HostMismatch
from peftcore.files.formats.format import recognize

HERE = Path(__file__).parent / "adapterhub_padded"
SIZES: dict[str, Any] = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 3}
SIZES |= {"num_attention_heads": 4, "max_position_embeddings": 16}
SIDES: dict[str, Any] = {"vocab_size": 11, "d_model": 8, "encoder_layers": 2, "decoder_layers": 3}
SIDES |= {"encoder_ffn_dim": 12, "decoder_ffn_dim": 12, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
SIDES |= {"max_position_embeddings": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
EAGER: dict[str, Any] = {"attn_implementation": "eager"}  # whose softmax is in float32
HOSTS: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, **EAGER)),
    "tagger": lambda: transformers.RobertaForTokenClassification(
        transformers.RobertaConfig(**SIZES, **EAGER, pad_token_id=0)
    ),
    "llama": lambda: transformers.LlamaModel(transformers.LlamaConfig(**SIZES, **EAGER, num_key_value_heads=2)),
    "bart": lambda: transformers.BartModel(transformers.BartConfig(**SIDES, **EAGER)),
}
IDS = torch.tensor([[1, 5, 3, 9, 2, 7], [4, 4, 10, 6, 0, 0]])
MASK = (IDS != 0).long()
METHODS = {
    "bert-prefix": "prefix_tuning",
    "bert-prefix_network": "prefix_tuning",
    "bert-prefix_ejected": "prefix_tuning",
    "llama-prefix": "prefix_tuning",
    "llama-prefix_network": "prefix_tuning",
    "bart-prefix": "prefix_tuning",
    "bart-prefix_network": "prefix_tuning",
    "bert-mam": "config_union",
    "llama-union": "config_union",
    "bert-prompt": "prompt_tuning",
    "bert-reft": "loreft",
    "llama-reft_ends": "loreft",
    "bert-reft_tied": "loreft",
    "llama-reft_free": "loreft",
    "bert-reft_direct": "loreft",
    "tagger-prompt": "prompt_tuning",
    "bert-branch": "houlsby_adapter",
    "tagger-branch_attention": "houlsby_adapter",
    "bert-behind": "pfeiffer_adapter",
    "llama-behind": "pfeiffer_adapter",
}
CHANGES: list[tuple[str, dict[str, Any], str]] = [
    ("bert-prefix", {"use_gating": True}, "'use_gating' is True"),
    ("bert-prefix", {"unheard_of": 1}, "unheard_of"),
    ("bert-prefix", {"prefix_length": 4}, r"control_trans has shape \(144,\), expected \(192,\)"),
    ("bert-prefix_network", {"non_linearity": "leakyrelu"}, "'non_linearity' is 'leakyrelu'"),
    ("bart-prefix", {"leave_out": [1]}, "control_trans has shape"),
    ("bert-prompt", {"combine": "suffix"}, "'combine' is 'suffix'"),
    ("bert-prompt", {"prompt_length": 2}, r"prompt_embedding.weight has shape \(3, 8\), expected \(2, 8\)"),
    ("bert-reft", {"non_linearity": "leakyrelu"}, "'non_linearity' is 'leakyrelu'"),
    ("bert-reft", {"subtract_projection": False}, "'subtract_projection' is False"),
    ("bert-reft", {"r": 3}, r"units.0.learned_source.weight has shape \(2, 8\), expected \(3, 8\)"),
    ("llama-union", {"configs": []}, "'configs' is"),
    ("bert-behind", {"residual_before_ln": True}, "'residual_before_ln' = True"),
    ("bert-behind", {"original_ln_after": True}, "'residual_before_ln' = False"),
    ("bert-branch", {"residual_before_ln": "post_add"}, "'residual_before_ln' = 'post_add'"),
    (
        "bert-branch",
        {"mh_adapter": True, "original_ln_before": True},
        "no method of peftcore has an adapter at this place",
    ),
]


OPTIONS = {"llama-reft_free": {"subtract_projection": True}, "bert-reft_direct": {"subtract_projection": False}}
"""Options that the package does not write, though outputs depend on them."""


@torch.no_grad()
def host(folder: str) -> Any:
    """The same numbers as in record.py."""
    model: Any = HOSTS[folder.partition("-")[0]]().double().eval()
    for index, (_, parameter) in enumerate(sorted(model.named_parameters())):
        wave = torch.sin(torch.arange(parameter.numel(), dtype=torch.float64) * (0.1 + 0.37 * index) + index)
        parameter.copy_(0.5 * wave.view(parameter.shape))
    return model


@torch.no_grad()
def output(model: nn.Module, folder: str) -> Tensor:
    """The first output, of a model of tokens those that are no padding."""
    decoded = {"decoder_input_ids": torch.tensor([[2, 3, 4], [2, 5, 6]])} if folder.startswith("bart") else {}
    first: Tensor = model(input_ids=IDS, attention_mask=MASK, **decoded)[0]
    return compared(first)


def compared(output: Tensor) -> Tensor:
    return output[MASK.bool()] if output.shape[:2] == MASK.shape else output


def difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def changed(folder: str, to: Path, changes: dict[str, Any]) -> Path:
    shutil.copytree(HERE / folder, to)
    config = json.loads((to / "adapter_config.json").read_text())
    config["config"] |= changes
    (to / "adapter_config.json").write_text(json.dumps(config))
    return to


@pytest.mark.parametrize("folder", METHODS)
def test_what_the_package_computed(folder: str, tmp_path: Path) -> None:
    expected = compared(load_file(HERE / folder / "expected.safetensors")["output"])
    model, error = host(folder).to(expected.dtype), 1e-9 if expected.dtype == torch.float64 else 1e-5
    assert difference(output(model, folder), expected) > 1e-2
    injection = peftcore.load(model, changed(folder, tmp_path / "adapter", OPTIONS.get(folder, {})))
    assert injection.method.name == METHODS[folder]
    torch.testing.assert_close(output(model, folder), expected, atol=error, rtol=error)
    injection.save(tmp_path / "native")
    again = host(folder).to(expected.dtype)
    peftcore.load(again, tmp_path / "native")
    assert torch.equal(output(again, folder), output(model, folder))


@pytest.mark.parametrize(("folder", "changes", "message"), CHANGES)
def test_what_is_not_computed_is_refused_by_name(
    folder: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = host(folder)
    before = output(model, folder)
    with pytest.raises(CheckpointError, match=message):
        peftcore.load(model, changed(folder, tmp_path / "adapter", changes))
    assert torch.equal(output(model, folder), before)


def test_copies_of_a_prefix_have_to_agree(tmp_path: Path) -> None:
    """In each layer the package has the prefix under a name of its own."""
    folder = changed("bert-prefix", tmp_path / "adapter", {})
    tensors = load_file(folder / "adapter.safetensors")
    assert len(tensors) == 4
    name = next(each for each in tensors if "layer.2" in each)
    save_file({key: value for key, value in tensors.items() if key != name}, folder / "adapter.safetensors")
    peftcore.load(host("bert"), folder)
    save_file({**tensors, name: tensors[name] + 1e-3}, folder / "adapter.safetensors")
    with pytest.raises(CheckpointError, match=r"differs from bert\.encoder\.layer\.0"):
        peftcore.load(host("bert"), folder)


def test_prefixes_with_relative_positions_are_refused() -> None:
    sizes: dict[str, Any] = {"vocab_size": 11, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_heads": 2}
    model = transformers.T5Model(transformers.T5Config(**sizes, num_layers=2, num_decoder_layers=3))
    with pytest.raises(HostMismatch, match=r"relative positions, from .*relative_attention_bias"):
        peftcore.load(model, HERE / "bart-prefix_network")


def test_parts_of_a_union_with_one_holder_are_refused(tmp_path: Path) -> None:
    folder = changed("llama-union", tmp_path / "adapter", {})
    config = json.loads((folder / "adapter_config.json").read_text())
    config["config"]["configs"] *= 2
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="use the same tensor names"):
        peftcore.load(host("llama"), folder)


def test_prompts_whose_first_row_is_pooled_are_refused(tmp_path: Path) -> None:
    folder = changed("bert-prompt", tmp_path / "adapter", {"combine": "prefix"})
    for name in ("bert", "bare"):
        model = host("bert") if name == "bert" else host("bert").bert
        with pytest.raises(HostMismatch, match="pools a prompt's first row"):
            peftcore.load(model, folder)
    encoder = host("bert").bert
    encoder.pooler = None
    peftcore.load(encoder, folder, strict=False)  # without the head


def test_prompts_of_encoders_fit_no_decoder() -> None:
    with pytest.raises(HostMismatch, match="cannot insert rows without positions after its embeddings"):
        peftcore.load(host("llama"), HERE / "bert-prompt", strict=False)


@pytest.mark.parametrize("folder", ["llama-reft_free", "bert-reft_direct"])
def test_reft_that_may_be_direft_is_read_as_the_package_reads_it(folder: str) -> None:
    """The package does not say in its files whether the projection is subtracted, and takes it that it is."""
    expected, model = compared(load_file(HERE / folder / "expected.safetensors")["output"]), host(folder)
    with pytest.warns(UserWarning, match="read as NoReFT"):
        assert peftcore.load(model, HERE / folder).config.kind == "noreft"
    assert (difference(output(model, folder), expected) < 1e-9) == (folder == "llama-reft_free")


def test_rows_that_are_not_orthonormal_are_refused(tmp_path: Path) -> None:
    folder = changed("llama-reft_ends", tmp_path / "adapter", {})
    tensors = load_file(folder / "adapter.safetensors")
    name = next(each for each in tensors if each.endswith("units.1.projection.parametrizations.weight.0.base"))
    save_file({**tensors, name: tensors[name] * 1.1}, folder / "adapter.safetensors")
    with pytest.raises(CheckpointError, match=r"units.1.*base yields rows that differ from orthonormal ones by 0.21"):
        peftcore.load(host("llama"), folder)


def test_nothing_is_drawn_while_it_is_read() -> None:
    model = host("llama")
    torch.manual_seed(3)
    peftcore.load(model, HERE / "llama-reft_ends")
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(1), drawn)


FUSIONS = {
    "llama-dynamic": False,
    "llama-static": False,
    "llama-both": False,
    "bert-dynamic": True,
    "bert-static": True,
    "tagger-static": True,
    "tagger-full": True,
    "bert-branch": False,
    "bert-both": False,
    "bert-behind": False,
}
"""Whether it mixes inputs of norms."""
STATIC = ("llama-static", "llama-both", "bert-static", "tagger-static")


def with_adapters(kind: str) -> Any:
    model = host(kind)
    for name in ("trained", "other"):
        peftcore.load(model, HERE / f"fusion-{kind}" / name, name=name)
    return model


@pytest.mark.parametrize("kind", FUSIONS)
def test_a_fusion_over_adapters_that_were_loaded_before(kind: str, tmp_path: Path) -> None:
    folder, model = HERE / f"fusion-{kind}", host(kind)
    expected = compared(load_file(folder / "expected.safetensors")["output"])
    with pytest.raises(CheckpointError, match="first load trained, other"):
        peftcore.load(model, folder / "fusion")
    model = with_adapters(kind)
    assert difference(output(model, kind), expected) > 1e-3
    fusion: Any = peftcore.load(model, folder / "fusion", name="fusion")
    assert (fusion.method.name, fusion.config.value) == ("adapter_fusion", kind not in STATIC)
    assert len(fusion.operators) == (6 if kind.endswith("both") else 3)
    assert {each.mixes_inputs for each in fusion.operators.values()} == {FUSIONS[kind]}
    fuse = Fuse("other", "trained", by="fusion")
    peftcore.activate(model, fuse)
    assert difference(output(model, kind), expected) < 1e-9
    peftcore.save_composition(model, fuse, tmp_path)
    again = host(kind)
    assert peftcore.load_composition(again, tmp_path) == fuse
    assert torch.equal(output(again, kind), output(model, kind))


@pytest.mark.parametrize("kind", [kind for kind in FUSIONS if not kind.startswith("llama")])
def test_a_fusion_is_written_as_the_package_writes_it(kind: str, tmp_path: Path) -> None:
    """But for the bias of K, which adds the same to all scores, and options of where it starts."""
    model, folder = with_adapters(kind), HERE / f"fusion-{kind}" / "fusion"
    fusion: Any = peftcore.load(model, folder, name="fusion")
    fusion.save(tmp_path, format="adapterhub_fusion")
    theirs, ours = (load_file(each / "model_adapter_fusion.safetensors") for each in (folder, tmp_path))
    assert theirs.keys() == ours.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], torch.zeros_like(value) if name.endswith("key.bias") else value), name
    written, said = (json.loads((each / "adapter_fusion_config.json").read_text()) for each in (tmp_path, folder))
    dropped = said["config"].pop("dropout_prob") or 0.1  # that of the model's attention
    assert written["config"].pop("dropout_prob") == dropped
    for key in ("value_before_softmax", "regularization", "value_initialized"):
        written["config"].pop(key), said["config"].pop(key)
    assert said.pop("version") == "adapters.1.3.0"
    assert written == said
    again = with_adapters(kind)
    assert peftcore.load(again, tmp_path, name="fusion").config == fusion.config
    for each in (model, again):
        peftcore.activate(each, Fuse("trained", "other", by="fusion"))
    assert torch.equal(output(again, kind), output(model, kind))


def test_scores_that_nothing_drops_are_written_so(tmp_path: Path) -> None:
    """For 0 the package takes the probability of the model's attention, which is 0.1 in a BERT."""
    model = with_adapters("bert-dynamic")
    fusion = peftcore.apply(model, "adapter_fusion", adapters=["trained", "other"])
    fusion.save(tmp_path, format="adapterhub_fusion")
    probability = json.loads((tmp_path / "adapter_fusion_config.json").read_text())["config"]["dropout_prob"]
    assert probability and nn.Dropout(probability)(torch.ones(1000)).equal(torch.ones(1000))
    assert peftcore.load(with_adapters("bert-dynamic"), tmp_path, name="by").config.dropout == 0.0


def test_what_the_package_does_not_fuse_is_not_written(tmp_path: Path) -> None:
    def refused(match: str, model: Any, **options: Any) -> None:
        fusion = peftcore.apply(model, "adapter_fusion", name="by", **options)
        with pytest.raises(ExportError, match=match):
            fusion.save(tmp_path / "none", format="adapterhub_fusion")
        assert not (tmp_path / "none").exists()

    both: dict[str, Any] = {"adapters": ["trained", "other"]}
    refused(r"with mixes=\"inputs\"", with_adapters("bert-dynamic"), mixes="outputs", **both)
    refused("not a fusion of the model's adapters", host("bert"))
    refused("2 of the 3 modules", with_adapters("bert-dynamic"), exclude="bert.encoder.layer.1", **both)
    model = with_adapters("bert-dynamic")
    peftcore.apply(model, "parallel_adapter", name="c")
    refused("c acts at .* not a Pfeiffer or Houlsby adapter", model, adapters=["trained", "c"])
    model = with_adapters("bert-dynamic")
    peftcore.apply(model, "pfeiffer_adapter", name="c", placement="pre")
    refused("c has another position at", model, adapters=["trained", "c"])
    model = with_adapters("bert-dynamic")
    peftcore.apply(model, "pfeiffer_adapter", name="v1,2")
    refused("'v1,2'", model, adapters=["trained", "v1,2"])
    refused("fusions can be saved for blocks", with_adapters("llama-dynamic"), **both)
    lora = peftcore.apply(host("bert"), "lora")
    with pytest.raises(ExportError, match=r"\(lora\) is not a fusion"):
        lora.save(tmp_path / "none", format="adapterhub_fusion")


@pytest.mark.parametrize("option", ["query_before_ln", "residual_before", "temperature", "unheard_of"])
def test_fusions_of_other_options_are_refused(option: str, tmp_path: Path) -> None:
    shutil.copytree(HERE / "fusion-llama-dynamic", tmp_path / "copy")
    path, model = tmp_path / "copy" / "fusion" / "adapter_fusion_config.json", host("llama")
    config = json.loads(path.read_text())
    config["config"][option] = True
    path.write_text(json.dumps(config))
    for name in ("trained", "other"):
        peftcore.load(model, tmp_path / "copy" / name, name=name)
    with pytest.raises(CheckpointError, match=option):
        peftcore.load(model, path.parent)


def test_a_fusion_of_adapters_that_stand_otherwise_is_refused() -> None:
    folder, model = HERE / "fusion-bert-dynamic", host("bert")
    peftcore.load(model, folder / "trained", name="trained")
    peftcore.load(model, HERE / "fusion-bert-branch" / "other", name="other")
    with pytest.raises(HostMismatch, match=r"other has another position at .*\.0\.output\.dense"):
        peftcore.load(model, folder / "fusion")
    model = with_adapters("bert-dynamic")
    with pytest.raises(HostMismatch, match=r"fuses at the attention of bert\.encoder\.layer\.0"):
        peftcore.load(model, HERE / "fusion-bert-both" / "fusion")
    assert list(peftcore.injections(model)) == ["trained", "other"]


def test_a_fusion_is_described() -> None:
    about = recognize(HERE / "fusion-bert-dynamic" / "fusion").describe(HERE / "fusion-bert-dynamic" / "fusion")
    assert (about.format, about.kind, about.methods) == ("adapterhub_fusion", "fusion", ("adapter_fusion",))
    assert about.sites == tuple(f"bert.encoder.layer.{layer}.output" for layer in range(3))
    assert about.options["adapter_names"] == ["trained", "other"]
