"""Soft prompts in folders of peft: what peft wants to know of the host, and what it refuses."""

import json
from pathlib import Path

import pytest
from core_toys import perceptron

import peftcore
from peftcore.errors import CheckpointError
from peftcore.files.formats.file_options import Keys
from peftcore.files.formats.peft_prompts import halves, task_of
from peftcore.testing import HOSTS

WHERE = Path("adapter_config.json")

pytest.importorskip("transformers")


@pytest.mark.parametrize(
    ("options", "count"), [({}, 1), ({"task_type": "CAUSAL_LM"}, 1), ({"task_type": "SEQ_2_SEQ_LM"}, 2)]
)
def test_an_encoder_and_a_decoder_have_a_prompt_each(options: dict[str, str], count: int) -> None:
    assert halves(Keys(options, WHERE)) == count
    assert halves(Keys({**options, "num_transformer_submodules": 1}, WHERE)) == 1


def test_no_model_has_three_halves() -> None:
    with pytest.raises(CheckpointError, match="'num_transformer_submodules' is 3, expected 1 or 2"):
        halves(Keys({"num_transformer_submodules": 3}, WHERE))


@pytest.mark.parametrize(("host", "task"), [("llama", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM")])
def test_tasks_are_those_of_the_models_class(host: str, task: str) -> None:
    model, _ = HOSTS[host].build()
    assert task_of(model) == task
    peftcore.apply(model, "prompt_tuning")
    assert task_of(model) == task


def test_other_models_have_no_task_and_no_prompts_of_peft() -> None:
    assert task_of(perceptron()) is None


def test_written_options_tell_of_the_stack(tmp_path: Path) -> None:
    model, _ = HOSTS["llama"].build()
    peftcore.apply(model, "prompt_tuning", length=3).save(tmp_path, format="peft")
    options = json.loads((tmp_path / "adapter_config.json").read_text())
    config = model.config
    assert options["task_type"] == "CAUSAL_LM" and options["num_virtual_tokens"] == 3
    assert (options["token_dim"], options["num_layers"]) == (config.hidden_size, config.num_hidden_layers)
    assert options["num_attention_heads"] == config.num_attention_heads and options["num_transformer_submodules"] == 1
    options["num_virtual_tokens"] = 4
    (tmp_path / "adapter_config.json").write_text(json.dumps(options))
    with pytest.raises(CheckpointError, match="3 rows, but its options say 4"):
        peftcore.load(HOSTS["llama"].build()[0], tmp_path)
