"""A MODEL means the same for all commands: under each of its names it is the same model, or it is refused before
anything happens."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
import typer.main
from click.testing import Result
from named_models import made_names, names
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

import peftcore
from peftcore.cli.commands import app
from peftcore.models.model_names import MODEL

__all__ = ["made_names", "names"]

TEXT = ("folder", "hub", "package", "gguf", "gguf-folder")
PICTURES = ("timm-folder", "timm-hub", "timm")
SHORT = ("--steps", 1, "--batch-size", 2, "--set", "training.warmup=0")


def invoke(*arguments: object, told: str = "") -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)], input=told)


def done(*arguments: object) -> Any:
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0, (result.output, result.exception)
    return json.loads(result.stdout)


@pytest.fixture(scope="session")
def adapters(made_names: Any, tmp_path_factory: pytest.TempPathFactory) -> Mapping[bool, Path]:
    """An adapter for the model of text (False) and one for that of pictures (True)."""
    folder = tmp_path_factory.mktemp("adapters")
    models = {
        False: transformers.AutoModelForCausalLM.from_pretrained(made_names[1]["folder"]),
        True: timm.create_model("test_vit"),
    }
    for pictures, model in models.items():
        injection = peftcore.apply(model, "lora", rank=2)
        with torch.no_grad():
            for number, parameter in enumerate(injection.parameters()):
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(number))
        injection.save(folder / str(pictures))
    return {pictures: folder / str(pictures) for pictures in models}


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Mapping[bool, tuple[object, ...]]:
    """Conversations, and pictures of two classes."""
    place = tmp_path_factory.mktemp("data")
    said = [{"prompt": "my phone", "completion": "so fine"}, {"prompt": "the phone", "completion": "so awful"}] * 5
    (place / "talk.jsonl").write_text("\n".join(map(json.dumps, said)), encoding="utf-8")
    for name, light in {"dark": 0, "light": 200}.items():
        (place / "pictures" / name).mkdir(parents=True)
        for number in range(5):
            Image.new("RGB", (16, 16), (light + number, 100, 50)).save(place / "pictures" / name / f"{number}.png")
    return {
        False: ("--task", "chat", "--data", place / "talk.jsonl"),
        True: ("--task", "image-classification", "--data", place / "pictures"),
    }


def trained(model: str, adapter: Path, data: Any, out: str) -> Any:
    found = done("train", "--model", model, *data, "--method", "lora", *SHORT, "--out", out)
    return [found[name] for name in ("before", "after", "losses", "trainable", "total")]


def compared(model: str, adapter: Path, data: Any, out: str) -> Any:
    [found] = done("compare", "--model", model, *data, "--methods", "lora", *SHORT, "--out", out)["trials"]
    return [found[name] for name in ("before", "after", "trainable", "total")]


def searched(model: str, adapter: Path, data: Any, out: str) -> Any:
    found = done("search", "--model", model, *data, "--methods", "lora", "--trials", 1, *SHORT, "--out", out)
    return [[each[name] for name in ("before", "after", "trainable", "total")] for each in found["report"]["trials"]]


def planned(model: str, adapter: Path, data: Any, out: str) -> Any:
    found = done("plan", model, "lora", "--dtype", "float32")
    return [found[name] for name in ("class", "sites", "trainable", "total", "memory", "batch")]


def seen(model: str, adapter: Path, data: Any, out: str) -> Any:
    found = done("tree", model, "lora")
    return [found[name] for name in ("class", "entries", "methods")]


def merged(model: str, adapter: Path, data: Any, out: str) -> Any:
    done("merge", model, adapter, "--out", out)
    return load_file(Path(out) / "model.safetensors")


def converted(model: str, adapter: Path, data: Any, out: str) -> Any:
    done("convert", adapter, "--model", model, "--to", "native", "--out", out)
    return load_file(Path(out) / "adapter.safetensors")


def exported(model: str, adapter: Path, data: Any, out: str) -> Any:
    done("export-lora", model, adapter, "--rank", 2, "--format", "native", "--out", out)
    return load_file(Path(out) / "adapter.safetensors")


def exported_for(model: str, adapter: Path, data: Any, out: str) -> Any:
    done("export", adapter, out, "--for", "peft", "--model", model)
    return load_file(Path(out) / "adapter_model.safetensors")


def answered(model: str, adapter: Path, data: Any, out: str) -> Any:
    result = invoke("chat", adapter, "--model", model, "--max-tokens", 5, told="my phone\n/base\n")
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


COMMANDS: Mapping[str, Callable[[str, Path, Any, str], Any]] = {
    "train": trained,
    "compare": compared,
    "search": searched,
    "chat": answered,
    "plan": planned,
    "tree": seen,
    "merge": merged,
    "convert": converted,
    "export-lora": exported,
    "export": exported_for,
}
REFUSED = {
    ("merge", "gguf"): "is a GGUF file, which peftcore reads but does not write: merge into the folder",
    ("merge", "gguf-folder"): "is a GGUF file, which peftcore reads but does not write: merge into the folder",
    ("chat", "timm"): "is a model of pictures: pass a folder, a GGUF file or a name on the Hub",
    ("chat", "timm-folder"): "cannot load a tokenizer from it",
    ("chat", "timm-hub"): "cannot load a tokenizer from it",
    **{
        ("export", kind): "is a part of a fused projection; peft adapts only whole"
        for kind in ("timm", "timm-folder", "timm-hub")
    },
}
LONG = [("compare", kind) for kind in (*TEXT[1:], *PICTURES)]
"""What `make test-slow` tries."""
CELLS = [(command, kind) for command in COMMANDS for kind in (*TEXT, *PICTURES)]


@pytest.fixture(scope="session")
def first() -> dict[tuple[str, bool], Any]:
    """Results of each command under the first name of the model, by command and whether it is one of pictures."""
    return {}


@pytest.mark.share(3)
@pytest.mark.parametrize(
    ("command", "kind"),
    [
        pytest.param(*each, marks=[pytest.mark.slow] if each[0] == "search" or each in LONG else [])
        for each in CELLS
        if each not in REFUSED
    ],
)
def test_each_name_is_the_same_model(
    command: str, kind: str, names: Any, adapters: Any, data: Any, first: dict[tuple[str, bool], Any]
) -> None:
    pictures = kind in PICTURES
    task = COMMANDS[command], adapters[pictures], data[pictures]

    def result(of: str) -> Any:
        return task[0](names[of], task[1], task[2], f"out-{of}")

    reference = PICTURES[0] if pictures else TEXT[0]
    if (command, pictures) not in first:
        first[command, pictures] = result(reference)
    if kind != reference:  # which is the first
        assert_same(result(kind), first[command, pictures])


def assert_same(one: Any, other: Any) -> None:
    """Numbers but for rounding, all else as it is."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        one, other = list(one.values()), [other[key] for key in one]
    if isinstance(one, list):
        assert len(one) == len(other)
        for each in zip(one, other, strict=True):
            assert_same(*each)
    elif isinstance(one, torch.Tensor | float):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    else:
        assert one == other


@pytest.mark.parametrize(("command", "kind"), REFUSED)
def test_what_a_command_cannot_do_with_a_kind_is_refused(command: str, kind: str, names: Any, adapters: Any) -> None:
    arguments = {
        "merge": (names[kind], adapters[False], "--out", "out"),
        "chat": (adapters[False], "--model", names[kind]),
        "export": (adapters[True], "out", "--for", "peft", "--model", names[kind]),
    }
    result = invoke(command, *arguments[command])
    assert (result.exit_code, result.stdout) == (2, "") and REFUSED[command, kind] in " ".join(result.stderr.split())
    assert not Path("out").exists()


@pytest.mark.parametrize("command", ["train", "compare", "search"])
@pytest.mark.parametrize(
    ("kind", "pictures", "says"),
    [
        ("gguf", True, "is a GGUF file, which contains a language model: pass a folder, timm:NAME"),
        ("timm", False, "is a model of pictures: pass a folder, a GGUF file"),
    ],
)
def test_a_task_refuses_a_model_of_another_kind_before_it_reads_anything(
    command: str, kind: str, pictures: bool, says: str, names: Any
) -> None:
    task = "image-classification" if pictures else "causal-lm"
    method = "--method" if command == "train" else "--methods"
    where = ("--task", task, "--data", "nowhere", method, "lora", "--out", "out")
    result = invoke(command, "--model", names[kind], *where)
    assert (result.exit_code, result.stdout) == (2, "") and says in " ".join(result.stderr.split())
    assert not Path("out").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_nothing_of_that_name(command: str, adapters: Any, data: Any, names: Any) -> None:
    """A path, a package, a file and a name on the Hub, of which there is none; and what says so changes nothing."""
    adapter, rest = adapters[False], ("--out", "out")
    arguments: Mapping[str, Callable[[str], tuple[object, ...]]] = {
        "train": lambda name: ("--model", name, *data[False], "--method", "lora", *rest),
        "compare": lambda name: ("--model", name, *data[False], "--methods", "lora", *rest),
        "search": lambda name: ("--model", name, *data[False], "--methods", "lora", *rest),
        "chat": lambda name: (adapter, "--model", name),
        "plan": lambda name: (name, "lora"),
        "tree": lambda name: (name,),
        "merge": lambda name: (name, adapter, *rest),
        "convert": lambda name: (adapter, "--model", name, "--to", "native", *rest),
        "export-lora": lambda name: (name, adapter, "--rank", 2, *rest),
        "export": lambda name: (adapter, "out", "--for", "peft", "--model", name),
    }
    for name, says in {
        "no/such/folder": "no/such/folder: no such folder; a model is a folder with config.json",
        "none.gguf": "none.gguf: no such folder",
        "package:holds_none": "the package 'holds_none' is not installed",
        "timm:no_net": "timm has no model 'no_net'",
        "someone/else": "someone/else",
    }.items():
        if name.startswith("timm:") and command in ("train", "compare", "search", "chat"):
            continue  # which is refused for what it is
        result = invoke(command, *arguments[command](name))
        assert (result.exit_code, result.stdout) == (2, "") and says in " ".join(result.stderr.split()), result.output
        assert list(Path.cwd().rglob("*.safetensors")) == []


@pytest.mark.slow
def test_all_say_the_same_of_it() -> None:
    group: Any = typer.main.get_command(app)
    context = typer.Context(group)
    commands = {name: group.get_command(context, name) for name in group.list_commands(context)}
    helps = {
        name: next(each.help for each in command.params if each.name == "model")
        for name, command in commands.items()
        if any(each.name == "model" for each in command.params)
    }
    assert helps.keys() == COMMANDS.keys() and all(each.startswith(MODEL) for each in helps.values())
    for kind in ("train", "compare", "search"):
        found = json.loads(invoke("schema", kind).stdout)
        assert found["properties"]["model"]["description"] == MODEL
