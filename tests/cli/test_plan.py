"""`peftcore plan`: what it says of a model that is not loaded is what happens when it is."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from looking import folder_of, real
from slowly import quick
from typer.testing import CliRunner

import peftcore
from peftcore.cli.commands import app
from peftcore.models.activation_memory import ExampleBatch, kept, named_tensors
from peftcore.models.dry_run import RequestedMethod
from peftcore.models.example_inputs import Size
from peftcore.models.skeletons import skeleton

Folders = Callable[[str], Path]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Folders of models by name, each made once."""
    made: dict[str, Path] = {}
    return lambda name: made.setdefault(name, made.get(name) or folder_of(name, tmp_path_factory.mktemp("models")))


def planned(*arguments: object) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["plan", *map(str, arguments), "--json"])
    assert result.exit_code == 0, (result.output, result.exception)
    return json.loads(result.stdout)


def page(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["plan", *map(str, arguments)])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def refused(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["plan", *map(str, arguments)])
    assert (result.exit_code, result.stdout) == (2, ""), (result.output, result.exception)
    assert isinstance(result.exception, SystemExit)
    return " ".join(result.stderr.split())


REAL = [
    ("llama", "vera"),
    ("llama", "prompt_tuning"),
    ("bert", "houlsby_adapter"),
    ("bert", "bitfit"),
    ("gpt2", "prefix_tuning"),
    ("t5", "ia3"),
    ("clip", "lora"),
    ("vit", "vpt_deep"),
    ("unet", "dora"),
]


@pytest.mark.parametrize(("host", "method"), quick(REAL, REAL[2:4]))
def test_numbers_are_those_of_the_real_thing(host: str, method: str, folders: Folders, tmp_path: Path) -> None:
    found = planned(folders(host), method, "--batch-size", 3)
    model = real(host, folders(host))
    assert found["class"] == type(model).__name__
    assert found["memory"]["full"]["gradients"] == sum(p.numel() * 4 for p in model.parameters())
    built = skeleton(str(folders(host)))

    def run(inputs: dict[str, Any]) -> Any:
        return model(**inputs)

    batch = ExampleBatch.of(type(built)(built.source, model), Size(3), run)
    assert (found["batch"], found["with_loss"]) == (batch.shapes, batch.loss)
    assert found["memory"]["full"]["activations"] == kept(named_tensors(model), run, batch.inputs)

    injection = peftcore.apply(model, method)
    assert found["memory"]["adapted"]["activations"] == kept(named_tensors(model), run, batch.inputs)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert found["trainable"] == sum(parameter.numel() for parameter in trained)
    assert found["memory"]["adapted"]["gradients"] == sum(parameter.numel() * 4 for parameter in trained)
    assert len(found["sites"]) == len(injection.sites)
    injection.save(tmp_path / "saved")
    assert found["file_size"] == (tmp_path / "saved" / "adapter.safetensors").stat().st_size


def test_weights_are_not_looked_at(folders: Folders, tmp_path: Path) -> None:
    damaged = folder_of("llama", tmp_path)
    (damaged / "model.safetensors").write_bytes(b"garbage")
    there, here = planned(folders("llama"), "lora"), planned(damaged, "lora")
    assert {**there, "model": ""} != there == {**here, "model": there["model"], "file_size": there["file_size"]}


def test_the_page_folds_layers(folders: Folders) -> None:
    text = page(folders("llama"), "lora", "--option", "rank=4")
    assert "lora rank=4 on LlamaForCausalLM (transformers, float32)" in text
    assert "model.layers.{0,1}.self_attn.q_proj  ×2  16×16   A 4×16, B 16×4        256" in text
    assert "activations" in text and "full fine-tuning" in text and "input_ids 8×128" in text
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 100


def test_a_step_in_half_precision(folders: Folders) -> None:
    """The base is halved, its gradients and AdamW's states too; the adapter stays in float32."""
    single = planned(folders("llama"), "lora", "--length", 8)
    half = planned(folders("llama"), "lora", "--length", 8, "--dtype", "bfloat16")
    assert (single["dtype"], half["dtype"]) == ("float32", "bfloat16")
    one, other = single["memory"], half["memory"]
    assert one["full"]["gradients"] == 2 * other["full"]["gradients"]
    assert one["adapted"]["gradients"] == other["adapted"]["gradients"] == 4 * single["trainable"]
    assert one["full"]["weights"] > other["full"]["weights"] > one["full"]["weights"] / 2  # rotary tables stay
    for each in (*one.values(), *other.values()):
        assert each["optimizer"] == 2 * each["gradients"]
        assert each["total"] == sum(value for name, value in each.items() if name not in ("total", "peak"))
    assert other["full"]["activations"] < one["full"]["activations"]


def test_activations_grow_with_the_batch(folders: Folders) -> None:
    short, long = (planned(folders("llama"), "lora", "--length", n, "--batch-size", 2) for n in (8, 16))
    assert long["batch"] == {"input_ids": [2, 16], "labels": [2, 16]}
    assert 1.7 < long["memory"]["adapted"]["activations"] / short["memory"]["adapted"]["activations"] < 2.3


def test_a_forward_that_needs_values_is_said_to_be_unknown(folders: Folders) -> None:
    found = planned(folders("wav2vec2"), "lora")
    assert found["activations_unknown"] == "its forward depends on values, not only on shapes"
    assert found["memory"]["adapted"]["activations"] is found["memory"]["adapted"]["total"] is None
    assert found["memory"]["adapted"]["optimizer"] == 8 * found["trainable"] > 0
    assert "activations: not known: its forward depends on values" in " ".join(
        page(folders("wav2vec2"), "lora").split()
    )


def test_a_method_that_wants_more_than_inputs(folders: Folders) -> None:
    found = planned(folders("unet"), "controlnet", "--option", "widths=[4, 8]")
    assert found["options"] == {"widths": [4, 8]}
    assert "condition" in found["activations_unknown"]
    assert found["memory"]["full"]["activations"] > 0 and found["memory"]["adapted"]["activations"] is None


def test_where_and_what_else_trains(folders: Folders) -> None:
    where = ("--target", "attn.q", "--target", "*.dense", "--exclude", "*.layer.0.*", "--exclude", "nowhere")
    found = planned(folders("bert"), "lora", *where, "--train", "classifier", "--length", 4)
    assert {site["path"] for site in found["sites"]} == {
        "bert.encoder.layer.1.attention.self.query",
        "bert.encoder.layer.1.attention.output.dense",
        "bert.encoder.layer.1.intermediate.dense",
        "bert.encoder.layer.1.output.dense",
        "bert.pooler.dense",
        "classifier",
        "classifier.bias",
    }
    assert [note.partition(" in this")[0] for note in found["notes"]] == ["exclude 'nowhere' matches nothing"]


def test_options_are_read_as_yaml_or_as_they_stand() -> None:
    from peftcore.cli.app import settings

    given = ["rank=4", "scaling=sqrt_rank", "alpha=2.5", "x=null", "y=true", 'z={"a": [1]}', "s=a=b", 'q="4"']
    assert settings(given) == {
        "rank": 4,
        "scaling": "sqrt_rank",
        "alpha": 2.5,
        "x": None,
        "y": True,
        "z": {"a": [1]},
        "s": "a=b",
        "q": "4",
    }
    assert RequestedMethod("convpass", {"grid": [4, 8]}).resolved()[1].model_dump()["grid"] == (4, 8)


def test_bad_options(folders: Folders) -> None:
    bert = folders("bert")
    assert "write it as NAME=VALUE" in refused(bert, "lora", "--option", "rank")
    assert "rank is given twice" in refused(bert, "lora", "--option", "rank=1", "--option", "rank=2")
    assert "no option 'rnk'; did you mean 'rank'" in refused(bert, "lora", "--option", "rnk=1")
    assert "rank=0: Input should be greater than 0" in refused(bert, "lora", "--option", "rank=0")
    assert "did you mean" in refused(bert, "lore")
    assert "use one of float64, float32" in refused(bert, "lora", "--dtype", "int8")
    assert "--length 65 is too long: the model has 64 positions" in refused(bert, "lora", "--length", 65)
    assert "matches nothing" in refused(bert, "lora", "--target", "nowhere")
    assert "'nowhere' matches nothing" in refused(bert, "lora", "--target", "attn.q", "--target", "nowhere")
    assert "--batch-size" in refused(bert, "lora", "--batch-size", 0)


@pytest.mark.slow
def test_sharded_weights_and_many_adapters(folders: Folders) -> None:
    llama = folders("llama")
    found = planned(llama, "lora", "--length", 8, "--shards", 2, "--resident", 10_000)
    plan = peftcore.plan(real("llama", llama), "lora", shards=2)
    assert found["resident"] == {"adapters": 10_000, "bytes": 10_000 * plan.resident}
    for said, each in zip(found["shards"], plan.shards, strict=True):
        assert {name: said[name] for name in vars(each)} == vars(each)
        assert (said["activations"], said["peak"]) == (found["memory"]["adapted"]["activations"], None)
    assert found["memory"]["adapted"]["peak"] > found["memory"]["adapted"]["weights"]
    text = page(llama, "lora", "--length", 8, "--shards", 2, "--resident", 10_000)
    assert "each of 2" in text and "gathered" in text and "10,000 adapters resident" in text
    assert "gathered" not in page(llama, "lora", "--length", 8)


def test_blocks_that_run_again(folders: Folders) -> None:
    plain, again = (planned(folders("llama"), "lora", *more) for more in ((), ("--checkpoint-gradients",)))
    assert again["memory"]["adapted"]["activations"] < plain["memory"]["adapted"]["activations"]
    assert again["memory"]["adapted"]["peak"] < plain["memory"]["adapted"]["peak"]
    assert again["flops"]["adapted"] > plain["flops"]["adapted"]
    assert "does not support gradient checkpointing" in refused(folders("vit"), "lora", "--checkpoint-gradients")
