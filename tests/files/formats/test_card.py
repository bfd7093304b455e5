"""The card beside a saved adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from file_toys import adapted
from torch import nn

import peftcore
from peftcore.errors import ExportError
from peftcore.files.formats.card import CARD, MARK


def test_the_card_says_what_it_is(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config)
    model.config._name_or_path = "someone/tiny-llama"
    injection = peftcore.apply(model, "lora", rank=4)
    values = injection.summary().parameters
    base = sum(each.numel() for each in host_parameters(model))
    injection.save(tmp_path)
    card = (tmp_path / CARD).read_text()
    head, _, body = card.removeprefix("---\n").partition("---\n")
    assert "base_model: someone/tiny-llama\nbase_model_relation: adapter\n" in head
    assert "pipeline_tag: text-generation\n" in head and "license" not in head
    assert "library_name: peftcore" in head and "- lora" in head
    for told in ("`someone/tiny-llama`", "method: lora", "`rank=4`", "2106.09685", f"{values:,} values", f"{base:,}"):
        assert told in body, told
    assert f"{values / base:.3%}" in body and MARK in body
    code = body.partition("```python\n")[2].partition("```")[0]
    there = code.replace("path of this folder", str(tmp_path))
    exec(there, {"model": transformers.LlamaForCausalLM(config)})


def test_tied_embeddings_are_counted_once_and_quantized_weights_as_dense_ones(tmp_path: Path) -> None:
    model = nn.Module()
    model.table, model.head = nn.Embedding(50, 8), nn.Linear(8, 50, bias=False)
    model.inner = nn.Linear(8, 8)
    model.head.weight = model.table.weight
    injection = peftcore.apply(model, "lora", target="inner", rank=2)
    injection.save(tmp_path)
    assert f"{32 / (400 + 72):.3%} of the base's 472" in (tmp_path / CARD).read_text()
    injection.remove()
    peftcore.quantize(model, "int8", target="inner")
    peftcore.apply(model, "lora", target="inner", rank=2).save(tmp_path)
    assert "of the base's 472" in (tmp_path / CARD).read_text()


def host_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The base's own."""
    return [each for name, each in model.named_parameters() if ".peft." not in f".{name}"]


def test_a_card_of_the_users_own_is_kept(tmp_path: Path) -> None:
    injection = adapted()
    (tmp_path / CARD).write_text("# mine\n")
    injection.save(tmp_path)
    assert (tmp_path / CARD).read_text() == "# mine\n"
    (tmp_path / CARD).write_text(f"an older one\n{MARK}\n")
    injection.save(tmp_path)
    assert "method: lora" in (tmp_path / CARD).read_text()
    (tmp_path / CARD).unlink()
    (tmp_path / CARD).mkdir()
    injection.save(tmp_path)
    assert (tmp_path / CARD).is_dir()


def test_a_base_in_a_folder_is_no_name_on_a_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hubs refuse a card that names one."""
    monkeypatch.chdir(tmp_path)
    Path("models/bert").mkdir(parents=True)
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, num_attention_heads=2))
    for name in (str(tmp_path), "../somewhere", "someone/a: b", "models/bert"):
        model.config._name_or_path = name
        injection = peftcore.apply(model, "lora")
        injection.save(tmp_path / "adapter")
        text = (tmp_path / "adapter" / CARD).read_text()
        assert "base_model" not in text and f"`{name}`" in text and "pipeline_tag: text-classification" in text
        injection.remove()


METRICS = {"accuracy": 0.93, "loss": 1e-05, 'glue/sst2: "dev"': {"f1": 0.5, "steps": 7}}


def test_metrics_are_what_hubs_read(tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    injection = adapted()
    injection.save(tmp_path, metrics=METRICS)
    data = hub.ModelCard((tmp_path / CARD).read_text()).data
    assert (data.library_name, data.model_name, data.tags, data.license) == ("peftcore", "lora", ["peft", "lora"], None)
    assert data.pipeline_tag is None and data.get("base_model") is None
    found = {(each.dataset_name, each.metric_type): each.metric_value for each in data.eval_results}
    named = 'glue/sst2: "dev"'
    assert found == {("unknown", "accuracy"): 0.93, ("unknown", "loss"): 1e-05, (named, "f1"): 0.5, (named, "steps"): 7}
    assert all(isinstance(each, float) for each in found.values())
    assert {each.task_type for each in data.eval_results} == {"other"}
    text = (tmp_path / CARD).read_text()
    assert "- accuracy: 0.93\n" in text and f"- f1 on {named}: 0.5\n" in text


@pytest.mark.parametrize(
    "metrics",
    [{"accuracy": "0.93"}, {"a": float("nan")}, {"a": None}, {"a": True}, {"": 1}, {"a\nb": 1}, {"d": {"a": {"b": 1}}}],
    ids=str,
)
def test_what_is_no_metric(metrics: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="is not a finite number with a name"):
        adapted().save(tmp_path / "adapter", metrics=metrics)
    with pytest.raises(ExportError, match="pass a folder"):
        adapted().save(tmp_path / "adapter.safetensors", metrics={"accuracy": 1})
    assert not list(tmp_path.iterdir())
