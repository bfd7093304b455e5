"""``peftcore train``: from a model and a file to an adapter, resumed to the bit, ended clearly."""

import csv
import importlib.util
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import packed_folders
import pytest
import torch
import transformers
from safetensors.torch import load_file
from typer.testing import CliRunner

import peftcore
from peftcore.cli.commands import app
from peftcore.files.save_load import describe
from peftcore.utils.numbers import size
from peftcore_lab.runs.folder import COMPLETE
from peftcore_lab.training import train as job


def trained(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["train", *map(str, arguments)])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def refused(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["train", *map(str, arguments)])
    assert result.exit_code == 2, (result.output, result.exception)
    return " ".join(result.stderr.split())


@pytest.fixture
def tweets(encoder: Path, csv_file: Path) -> tuple[object, ...]:
    return (
        *("--model", encoder, "--task", "text-classification", "--data", csv_file, "--method", "lora"),
        *("--steps", 30, "--batch-size", 16, "--lr", "3e-2"),
    )


def test_a_classifier_learns_and_its_folder_holds_all_of_it(tweets: Any, encoder: Path, tmp_path: Path) -> None:
    outcome = json.loads(
        trained(
            *tweets,
            "--steps",
            150,
            "--lr",
            1e-2,
            "--out",
            "run",
            "--set",
            "method.rank=4",
            "--set",
            "method.target=all-linear",
            "--json",
        )
    )
    assert outcome["after"]["accuracy"] > outcome["before"]["accuracy"] + 0.15
    assert outcome == json.loads(Path("run/metrics.json").read_text(encoding="utf-8"))
    assert list(Path("run/logs").glob("events.*"))
    found = peftcore.load(transformers.AutoModelForSequenceClassification.from_pretrained(encoder), "run/adapter")
    assert found.config.rank == 4
    assert sum(p.numel() for p in found.parameters()) == outcome["trainable"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--steps", 0], "training.steps=0: Input should be greater than 0"),
        (["--set", "training.stepz=3"], "there is no option 'training.stepz'; did you mean 'steps'?"),
        (["--set", "training.epochs=1"], "set steps or epochs, not both"),
        (["--set", "data.txt=x"], "there is no option 'txt'; did you mean 'text'?"),
        (["--set", "patience"], "write it as NAME=VALUE"),
        (["--set", "method.rank=0"], "rank=0"),
        (["--method", "lorra"], "did you mean 'lora'"),
        (["--task", "text-clasification"], "did you mean 'text-classification'?"),
        (["--data", "nothing.csv"], "nothing.csv: cannot be read"),
        (["--model", "./nothing"], "no such folder"),
        (["--resume"], "holds no run to resume"),
    ],
    ids=str,
)
def test_what_is_wrong_is_named_and_nothing_is_written(tweets: Any, changes: list[Any], words: str) -> None:
    assert words in refused(*tweets, "--out", "run", *changes)
    assert not Path("run/adapter").exists()


def test_a_folder_holds_one_run(tweets: Any) -> None:
    trained(*tweets, "--steps", 4, "--out", "run")
    assert "add --resume to continue it" in refused(*tweets, "--out", "run")
    assert "training.learning_rate was 0.03 and is 0.0001" in refused(
        *tweets, "--lr", "1e-4", "--out", "run", "--resume"
    )


KILLED = """
import os, signal, sys
from peftcore_lab.training import train as job
from peftcore.files.save_load import describe
end = job.DisplayCallback.on_step_end
def killed(self, args, state, control, **kwargs):
    end(self, args, state, control, **kwargs)
    if state.global_step == {step}:
        os.kill(os.getpid(), signal.SIGKILL)
job.DisplayCallback.on_step_end = killed
from peftcore.cli.entry import main
sys.argv = ["peftcore", "train", {config!r}, "--out", {out!r}]
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("more", ["", ", ema: 0.9"])
def test_killed_and_resumed_it_ends_the_same_to_the_bit(
    tweets: Any, encoder: Path, csv_file: Path, tmp_path: Path, more: str
) -> None:
    """AdaLoRA has a schedule and statistics; dropout and the order of the data draw random numbers."""
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: {encoder}\ntask: text-classification\ndata: {{train: {csv_file}}}\n"
        "method: {name: adalora, rank: 4, dropout: 0.1}\n"
        f"training: {{steps: 12, batch_size: 16, evaluate_every: 4, learning_rate: 1e-2{more}}}\n",
        encoding="utf-8",
    )
    trained(config, "--out", "whole")
    code = KILLED.format(step=10, config=str(config), out="cut")
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    assert not Path("cut/adapter").exists()
    broken = Path("cut/checkpoints/checkpoint-11")  # killed while it was written
    shutil.copytree("cut/checkpoints/checkpoint-8", broken)
    (broken / COMPLETE).unlink()
    (broken / "trainer_state.json").unlink()
    trained(config, "--out", "cut", "--resume")
    whole, cut = (load_file(f"{folder}/adapter/adapter.safetensors") for folder in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[key], cut[key]) for key in whole)


@pytest.mark.parametrize("checkpoints", [True, False])
def test_averages_are_what_is_scored_and_saved(tweets: Any, monkeypatch: Any, checkpoints: bool) -> None:
    """The best of them, where there are checkpoints: they are those of the values that the optimizer left."""
    seen: list[dict[str, torch.Tensor]] = []
    begin, end = job.DisplayCallback.on_train_begin, job.DisplayCallback.on_step_end

    def values(model: Any) -> dict[str, torch.Tensor]:
        return {name: each.detach().clone() for name, each in model.named_parameters() if each.requires_grad}

    def begun(self: Any, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        seen.append(values(model))
        begin(self, args, state, control, **kwargs)

    def stepped(self: Any, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        seen.append(values(model))
        end(self, args, state, control, **kwargs)

    monkeypatch.setattr(job.DisplayCallback, "on_train_begin", begun)
    monkeypatch.setattr(job.DisplayCallback, "on_step_end", stepped)
    settings = ("--set", "training.ema=0.8", "--set", f"training.checkpoints={str(checkpoints).lower()}")
    outcome = json.loads(trained(*tweets, *settings, "--set", "training.evaluate_every=5", "--out", "run", "--json"))
    last = outcome["steps"]
    if checkpoints:
        state = Path("run/checkpoints", f"checkpoint-{last}", "trainer_state.json").read_text(encoding="utf-8")
        last = json.loads(state)["best_global_step"]
    average = seen[0]
    for step in range(1, last + 1):
        share = min(0.8, (1 + step) / (10 + step))
        average = {name: share * value + (1 - share) * seen[step][name] for name, value in average.items()}
    saved = load_file("run/adapter/adapter.safetensors")
    sums = sorted(value.double().sum().item() for value in average.values())
    assert sums == pytest.approx(sorted(value.double().sum().item() for value in saved.values()), abs=1e-4)
    raw = sorted(value.double().sum().item() for value in seen[last].values())
    assert sums != pytest.approx(raw, abs=1e-3)


def test_a_loss_that_is_no_number_ends_the_run_with_a_whole_checkpoint(tweets: Any, monkeypatch: Any) -> None:
    compute = job.AdapterTrainer.compute_loss

    def broken(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = compute(self, *args, **kwargs)
        return loss * float("nan") if self.model.training and self.state.global_step == 7 else loss

    with monkeypatch.context() as patch:
        patch.setattr(job.AdapterTrainer, "compute_loss", broken)
        message = refused(*tweets, "--out", "run", "--set", "training.evaluate_every=5")
    assert "the loss became nan in step 8" in message
    assert json.loads(trained(*tweets, "--out", "run", "--set", "training.evaluate_every=5", "--resume", "--json"))


def test_a_full_disk_ends_the_run_with_a_whole_checkpoint(tweets: Any, monkeypatch: Any) -> None:
    save = torch.save

    def full(value: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        if "checkpoint-10" in str(path):
            raise OSError(28, "No space left on device")
        save(value, path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        assert "No space left on device" in refused(*tweets, "--out", "run", "--set", "training.evaluate_every=5")
    assert "checkpoint-5" in {path.name for path in Path("run/checkpoints").iterdir()}
    trained(*tweets, "--out", "run", "--set", "training.evaluate_every=5", "--resume")


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: not enough memory: you tried to allocate"),
    MemoryError("Unable to allocate 20 GiB"),
]


@pytest.mark.share(3)
@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("where", ["AdapterTrainer.training_step", "AdapterTrainer.__init__", "told"])
def test_out_of_memory_says_what_takes_less(tweets: Any, error: Exception, where: str, monkeypatch: Any) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(f"peftcore_lab.training.train.{where}", full)
    message = refused(*tweets, "--out", "run", "--set", "training.checkpoint_gradients=true")
    assert "out of memory" in message and str(error)[:20] in message
    for advice in ("batch_size=8 --set training.accumulate=2", "--set dtype=bfloat16", "--set quantize=nf4"):
        assert advice in message
    assert "checkpoint_gradients" not in message


def test_what_logs_and_cannot_is_one_line(tweets: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = type("UsageError", (Exception,), {"__module__": "tensorboard.errors"})

    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise problem("no server answers")

    monkeypatch.setattr("peftcore_lab.training.train.AdapterTrainer.train", unreachable)
    assert "training.report_to: tensorboard cannot log the run: no server" in refused(*tweets, "--out", "run")


def out_of_memory(monkeypatch: Any, *arguments: object) -> str:
    def full(*args: Any, **kwargs: Any) -> None:
        raise MemoryError("Unable to allocate 20 GiB")

    with monkeypatch.context() as patch:
        patch.setattr("peftcore_lab.training.train.AdapterTrainer.training_step", full)
        return refused(*arguments)


@pytest.fixture
def small(decoder: Path, tmp_path: Path) -> tuple[object, ...]:
    path = tmp_path / "lines.txt"
    path.write_text("my phone is fine\n\nthe plane was late today\n" * 20, encoding="utf-8")
    return ("--model", decoder, "--task", "causal-lm", "--data", path, "--method", "dora", "--rank", 3, "--steps", 2)


@pytest.mark.slow
def test_out_of_memory_says_what_plan_counts_now_and_with_each_setting(
    small: Any, decoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = out_of_memory(monkeypatch, *small, "--batch-size", 6)
    found = re.fullmatch(
        r".* A step needs about ([\d.]+ .?B) as peftcore plan estimates it \(the peak is higher\)\. "
        r"To need less memory, use: "
        r"--set training\.batch_size=3 --set training\.accumulate=2: about ([\d.]+ .?B); "
        r"--set training\.checkpoint_gradients=true: about ([\d.]+ .?B); --set dtype=bfloat16: about ([\d.]+ .?B)",
        message,
    )
    assert found is not None, message

    longest = len(transformers.AutoTokenizer.from_pretrained(decoder)("the plane was late today")["input_ids"]) + 1

    def planned(*options: object) -> str:
        arguments = ("plan", decoder, "dora", "--rank", 3, "--length", longest, *options, "--json")
        result = CliRunner().invoke(app, [*map(str, arguments)])
        return size(json.loads(result.stdout)["memory"]["adapted"]["total"]).replace("\N{NO-BREAK SPACE}", " ")

    single = ("--dtype", "float32")
    now, half, checkpointed, narrow = found.groups()
    assert now == planned(*single, "--batch-size", 6)
    assert half == planned(*single, "--batch-size", 3) != now
    assert narrow == planned("--dtype", "bfloat16", "--batch-size", 6) != now
    assert checkpointed not in (now, half, narrow)


@pytest.mark.parametrize(
    "settings",
    [["quantize=int8"], ["training.autocast=true"], ["training.shard=true"]],
    ids=lambda settings: settings[0],
)
def test_what_plan_does_not_count_is_advised_without_numbers(
    settings: list[str], small: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if settings == ["training.shard=true"]:
        monkeypatch.setattr("peftcore_lab.training.train.trainer_for", _no_memory)
    message = out_of_memory(monkeypatch, *small, *(each for name in settings for each in ("--set", name)))
    assert "To need less memory, use: --set training.batch_size=4 --set training.accumulate=2; --set" in message
    assert "about" not in message


def _no_memory(*args: Any, **kwargs: Any) -> None:
    raise MemoryError("Unable to allocate 20 GiB")


@pytest.mark.parametrize("error", [MemoryError("none left"), RuntimeError("what models raise"), KeyError("x")])
def test_an_estimate_that_fails_is_left_out(error: Exception, small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise error

    monkeypatch.setattr("peftcore_lab.training.estimates.skeleton", fail)
    message = out_of_memory(monkeypatch, *small)
    assert "To need less memory, use: --set training.batch_size=4" in message and "about" not in message


def test_plain_text(decoder: Path, tmp_path: Path) -> None:
    path = tmp_path / "lines.txt"
    path.write_text("my phone is fine\n\nthe plane was late today\n" * 20, encoding="utf-8")
    outcome = json.loads(
        trained(
            *("--model", decoder, "--task", "causal-lm", "--data", path, "--method", "lora", "--steps", 60),
            *(
                "--lr",
                "3e-2",
                "--set",
                "method.target=all-linear",
                "--set",
                'data.prompts=["my phone"]',
                "--set",
                "data.answer_length=3",
                "--json",
            ),
        )
    )
    assert outcome["after"]["perplexity"] < 0.9 * outcome["before"]["perplexity"]
    assert len(outcome["samples"]) == 1


def test_chats(talker: Path, chats: Path) -> None:
    outcome = json.loads(
        trained(
            *("--model", talker, "--task", "chat", "--data", chats, "--method", "lora", "--steps", 40),
            *(
                "--lr",
                "3e-2",
                "--set",
                "method.target=all-linear",
                "--set",
                'data.prompts=["the phone"]',
                "--set",
                "data.answer_length=3",
                "--json",
            ),
        )
    )
    assert outcome["after"]["perplexity"] < 0.9 * outcome["before"]["perplexity"]


def test_a_model_inside_a_package_that_is_not_imported(
    talker: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "installed" / "holds_a_model"
    shutil.copytree(talker, package / "model")
    (package / "__init__.py").write_text("raise AssertionError", encoding="utf-8")
    monkeypatch.syspath_prepend(str(package.parent))
    options = ("--task", "chat", "--data", chats, "--method", "lora", "--steps", 1)
    trained("--model", "package:holds_a_model/model", *options)
    for name in ("holds_no_model", "holds_a_model.model", "__main__", ""):
        assert f"the package {name!r} is not installed" in refused(
            "--model", f"package:{name}", "--out", tmp_path / "other", *options
        )
    assert "holds_a_model" not in sys.modules


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_a_folder_that_is_quantized_already(scheme: str, talker: Path, chats: Path, tmp_path: Path) -> None:
    """Its checkpoints are of the adapter, and a run goes on from them."""
    pytest.importorskip("bitsandbytes")
    options = {"load_in_4bit": True} if scheme == "nf4" else {"load_in_8bit": True}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokenizer = transformers.AutoTokenizer.from_pretrained(talker)
    torch.manual_seed(0)
    dense = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=len(tokenizer), **sizes))
    dense.save_pretrained(tmp_path / "dense")
    packed = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=transformers.BitsAndBytesConfig(**options), device_map="cpu"
    )
    folder = tmp_path / "packed"
    packed.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    command = ("--model", folder, "--task", "chat", "--data", chats, "--method", "lora", "--steps", 4, "--out", "run")
    trained(*command, "--set", "training.evaluate_every=2")
    for each in ("adapter", "checkpoints/checkpoint-4"):
        shutil.rmtree(Path("run", each))
    trained(*command, "--set", "training.evaluate_every=2", "--resume")
    model = transformers.LlamaForCausalLM.from_pretrained(folder, device_map="cpu")
    assert peftcore.load(model, "run/adapter").summary().sites == 4


@pytest.mark.parametrize("name", ["GPTQ", "AWQ"])
def test_a_packed_folder_whose_package_is_missing_is_refused(
    name: str, talker: Path, chats: Path, tmp_path: Path
) -> None:
    """transformers raises ImportError, which ended in a traceback."""
    if packed_folders.FORMS[name].installed:
        pytest.skip("gptqmodel is installed")
    tokenizer = transformers.AutoTokenizer.from_pretrained(talker)
    folder = packed_folders.write(name, tmp_path / "packed", len(tokenizer))
    tokenizer.save_pretrained(folder)
    said = refused("--model", folder, "--task", "chat", "--data", chats, "--method", "lora", "--out", "run")
    assert "pip install" in said and ("gptqmodel" in said or "optimum" in said)
    assert not list(Path("run").glob("adapter*"))


def test_a_tokenizer_without_a_template_is_refused(decoder: Path, chats: Path) -> None:
    assert "no chat template" in refused("--model", decoder, "--task", "chat", "--data", chats, "--method", "lora")


def test_a_run_gets_longer(tweets: Any) -> None:
    """It goes on from its last checkpoint, along the schedule of the new length."""
    options = (*tweets, "--out", "run", "--set", "training.evaluate_every=2")
    trained(*options, "--steps", 4)
    first = json.loads(Path("run/metrics.json").read_text(encoding="utf-8"))
    assert "training.steps was 4 and is 2" in refused(*options, "--steps", 2, "--resume")
    assert "training.learning_rate was" in refused(*options, "--steps", 6, "--lr", "1e-4", "--resume")
    outcome = json.loads(trained(*options, "--steps", 8, "--resume", "--json"))
    assert [step for step, _ in outcome["curve"]] == [0, 2, 4, 6, 8]
    assert outcome["before"] == first["before"] and outcome["losses"][:2] == first["losses"]
    assert outcome["steps"] == 8
    file = Path("run/adapter/adapter.safetensors").read_bytes()
    again = json.loads(trained(*options, "--steps", 8, "--resume", "--json"))  # there is nothing left to do
    assert Path("run/adapter/adapter.safetensors").read_bytes() == file
    assert (again["steps"], again["curve"], again["losses"]) == (8, outcome["curve"], outcome["losses"])


def test_a_schedule_over_all_steps_does_not_get_longer(encoder: Path, csv_file: Path) -> None:
    options = ("--model", encoder, "--task", "text-classification", "--data", csv_file, "--method", "adalora")
    trained(*options, "--steps", 4, "--out", "run")
    assert "adalora follows a schedule over all steps" in refused(*options, "--steps", 6, "--out", "run", "--resume")


def test_an_adapter_is_gone_on_from(encoder: Path, csv_file: Path, tweets: Any) -> None:
    """With its method, its options and its head."""
    trained(*tweets, "--rank", 3, "--out", "first")
    data = ("--model", encoder, "--task", "text-classification", "--data", csv_file, "--adapter", "first/adapter")
    second = json.loads(trained(*data, "--steps", 1, "--lr", "1e-9", "--out", "second", "--json"))
    first = json.loads(Path("first/metrics.json").read_text(encoding="utf-8"))
    assert second["method"] == "lora" and second["trainable"] == first["trainable"]
    assert second["before"] == pytest.approx(first["after"], rel=1e-5)
    before, after = (load_file(f"{folder}/adapter/adapter.safetensors") for folder in ("first", "second"))
    assert before.keys() == after.keys() and all(torch.allclose(before[key], after[key]) for key in before)
    assert "remove method" in refused(*data, "--method", "lora", "--rank", 8, "--out", "third")
    assert "remove method" in refused(*data, "--method", "ia3", "--out", "third")
    assert "nothing" in refused(*data[:-1], "nothing", "--out", "third")


def relabelled(csv_file: Path, name: str, **names: str) -> Path:
    """The same rows, whose classes are called otherwise."""
    table = csv_file.read_text(encoding="utf-8")
    lines = [line.rsplit(",", 1) for line in table.splitlines()[1:]]
    text = "\n".join([table.splitlines()[0], *(f"{text},{names[label]}" for text, label in lines)])
    Path(name).write_text(text + "\n", encoding="utf-8")
    return Path(name)


def test_a_head_is_gone_on_from_by_the_names_of_its_classes(tweets: Any, encoder: Path, csv_file: Path) -> None:
    """Those of the adapter, in the order in which it has them, whatever the order by alphabet is; no other ones."""
    labels = sorted({row["label"] for row in csv.DictReader(csv_file.open(encoding="utf-8"))})
    named = relabelled(csv_file, "named.csv", **dict(zip(labels, ("no", "yes"), strict=True)))
    options = ("--steps", 60, "--set", "training.checkpoints=last", "--out")
    first = json.loads(trained(*tweets[:4], "--data", named, *tweets[6:], *options, "first", "--json"))
    assert describe("first/adapter").classes == ("no", "yes")
    on = ("--model", encoder, "--task", "text-classification", "--adapter", "first/adapter", "--steps", 1)
    same = json.loads(trained(*on, "--data", named, "--lr", 1e-9, "--out", "same", "--json"))
    assert same["before"]["accuracy"] == first["after"]["accuracy"]
    for number, names in enumerate((("no", "maybe"), ("fine", "yes"), ("a", "b"))):
        other = relabelled(csv_file, f"other{number}.csv", **dict(zip(labels, names, strict=True)))
        said = refused(*on, "--data", other, "--out", f"other{number}")
        assert "the 2 classes of the adapter's head, 'no', 'yes'" in said and "--method instead of --adapter" in said
        assert not Path(f"other{number}", "adapter").exists()
    # An adapter whose classes stand in another order than by alphabet, as another program may write it.
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        encoder, num_labels=2, id2label={0: "yes", 1: "no"}
    )
    swapped = peftcore.load(model, "first/adapter", trainable=True)
    with torch.no_grad():
        for name, value in swapped.state_dict().items():
            if name.startswith("classifier") and value.shape[0] == 2:
                value.copy_(value.flip(0))
    swapped.save("swapped")
    assert describe("swapped").classes == ("yes", "no")
    on = ("--model", encoder, "--task", "text-classification", "--adapter", "swapped", "--steps", 1, "--lr", 1e-9)
    turned = json.loads(trained(*on, "--data", named, "--out", "turned", "--json"))
    assert turned["before"] == pytest.approx(same["before"])
    assert describe("turned/adapter").classes == ("yes", "no")


def test_an_adapter_without_the_head_of_the_task_is_refused(encoder: Path, csv_file: Path) -> None:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=2)
    peftcore.apply(model, "lora").save("headless")
    data = ("--model", encoder, "--task", "text-classification", "--data", csv_file, "--adapter", "headless")
    assert "has no head classifier" in refused(*data, "--steps", 1)


def test_what_reports_are_made_to_is_installed(tweets: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == "mlflow" else find(name))
    assert "pip install 'mlflow'" in refused(*tweets, "--set", "training.report_to=mlflow", "--out", "run")
    assert not Path("run").exists()
    assert "report_to" in refused(*tweets, "--set", "training.report_to=mlfow", "--out", "run")
    trained(*tweets, "--steps", 1, "--set", "training.report_to=none", "--out", "run")
    assert not Path("run/logs").exists()


def test_options_of_the_method_are_flags(encoder: Path, csv_file: Path) -> None:
    options = ("--model", encoder, "--task", "text-classification", "--data", csv_file, "--steps", 1)
    trained(*options, "--method", "lora", "--rank", 3, "--target=attn.q", "--alpha=6", "--out", "run")
    about = peftcore.files.save_load.describe("run/adapter")
    assert (about.options["rank"], about.options["alpha"]) == (3, 6.0) and len(about.sites) == 2


def test_packed_chats(talker: Path, chats: Path) -> None:
    options = ("--model", talker, "--task", "chat", "--data", chats, "--steps", 20, "--lr", "3e-2", "--json")
    packed = ("--set", "data.pack=true", "--set", "data.max_length=32")
    outcome = json.loads(trained(*options, "--method", "lora", "--target", "all-linear", *packed, "--out", "run"))
    assert outcome["after"]["perplexity"] < 0.9 * outcome["before"]["perplexity"] and outcome["train_size"] < 10
    assert "data.pack" in refused(*options, "--method", "prompt_tuning", *packed, "--out", "other")
