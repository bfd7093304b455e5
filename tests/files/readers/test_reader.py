"""The rules of programs: complete, and those of peft are what the installed peft says of itself."""

import dataclasses

import peft
import pytest

from peftcore.errors import ExportError
from peftcore.files.formats.format import formats
from peftcore.files.readers.reader import RULES, Verdict, reader_named, readers


def test_each_file_of_rules_is_a_program_of_its_name_and_says_where_it_was_read() -> None:
    assert {f"{name}.toml" for name in readers()} == {path.name for path in RULES.iterdir()}
    for name, reader in readers().items():
        assert reader.name == name and reader.version and reader.files
        owner, _, commit = reader.source.partition("@")
        assert owner.count("/") == 1 and commit
        assert {*reader.writes} <= {*reader.formats} <= {*formats()} and reader.writes


@pytest.mark.parametrize("name", readers())
def test_no_option_and_no_tensor_is_without_a_verdict_and_a_reason(name: str) -> None:
    reader = reader_named(name)
    rules = [*reader.options.values(), reader.other_options, *(each.rule for each in reader.tensors)]
    assert all(rule.why or rule.verdict is Verdict.READ for rule in [*rules, reader.other_types])
    for strange in ("", "x", "a.b.c.weight", "base_model.model.q_proj.lora_Q.weight"):
        reader.tensor(strange, (3, 4), "peft")


def test_the_module_is_what_is_in_front_of_the_name() -> None:
    for name in ("peft", "vllm", "sglang", "tgi", "llama.cpp"):
        module, rule = reader_named(name).tensor(
            "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight", (3, 4), "peft"
        )
        assert module.endswith("mlp.up_proj") and rule.verdict is Verdict.READ


def test_a_program_without_rules_is_refused_with_the_names_of_the_others() -> None:
    with pytest.raises(ExportError, match=r"no rules for the program 'ollama'; there are rules for comfyui, .*vllm"):
        reader_named("ollama")


def test_the_types_and_options_of_peft_are_those_of_its_classes() -> None:
    reader, known = reader_named("peft"), peft.PEFT_TYPE_TO_CONFIG_MAPPING
    if not peft.__version__.startswith(reader.version.rpartition(".")[0]):
        pytest.skip(f"the rules are of peft {reader.version}")
    assert set(reader.types) == {kind.value for kind in known}
    assert set(reader.options) == {field.name for config in known.values() for field in dataclasses.fields(config)}


def test_a_rank_needs_the_next_size_of_the_flag() -> None:
    ranks = reader_named("vllm").ranks
    assert ranks is not None
    assert [ranks.needed(rank) for rank in (8, 16, 17, 300)] == ["", "", "--max-lora-rank 32", "--max-lora-rank 320"]


def test_what_an_export_has_to_adapt_too() -> None:
    known = [f"layers.{block}.{leaf}_proj" for block in (0, 1) for leaf in ("q", "k", "v", "up")]
    sglang, tgi, vllm = (reader_named(name) for name in ("sglang", "tgi", "vllm"))
    assert sglang.lacking(["layers.0.k_proj"], known) == ["layers.0.q_proj", "layers.0.v_proj"]
    assert sglang.lacking(["layers.0.up_proj"], known) == []  # the model has no gate
    assert tgi.lacking(["layers.1.k_proj"], known) == ["layers.0.k_proj"]
    assert vllm.lacking(["layers.1.k_proj"], known) == []
    experts = [f"layers.0.{place}.{leaf}_proj" for place in ("mlp", "experts.3") for leaf in ("gate", "up", "down")]
    assert vllm.lacking(["layers.0.experts.3.up_proj", "layers.0.mlp.up_proj"], experts) == [experts[3], experts[5]]
