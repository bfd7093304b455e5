"""What a user does with a quantized model, each compared with the model in float32 that has the same weights: the cells
of the second table in docs/quantization.md."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Any

import packed_folders
import tokenizers
import torch
import transformers
from packed_folders import FORMS
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

import peftcore
from peftcore.errors import BadInput, PeftcoreError
from peftcore.training import PeftcoreCallback

IDS = torch.arange(3, 15).view(2, 6)
WORDS = ["<unk>", "<end>", *(f"w{index}" for index in range(packed_folders.VOCABULARY - 2))]


def off(one: Tensor, other: Tensor) -> float:
    """The difference, relative to the norm of what it should be."""
    return float((one.detach() - other.detach()).norm() / other.detach().norm())


def logits(model: Any) -> Tensor:
    """In training mode, in which no library takes a kernel of lower precision."""
    with torch.no_grad():
        found: Tensor = model.train()(IDS).logits
    return found


@torch.no_grad()
def fill(injection: peftcore.Injection, seed: int = 1) -> None:
    """Every tensor that trains becomes N(0, 0.1), by its name."""
    generator = torch.Generator().manual_seed(seed)
    for _, tensor in sorted(injection.state_dict().items()):
        tensor.normal_(0, 0.1, generator=generator)


class Inapplicable(Exception):
    """There is nothing of that kind to be done: its message says what there is."""


class Pair:
    """A packed model and the one in float32, with the same adapter."""

    def __init__(self, name: str, folder: Path, method: str = "lora") -> None:
        self.name, self.folder, self.form = name, folder, FORMS[name]
        self.model = packed_folders.load(name, folder)
        self.base = packed_folders.reference(name, folder)
        self.injection = peftcore.apply(self.model, method, target="all-linear", seed=0)
        self.theirs = peftcore.apply(self.base, method, target="all-linear", seed=0)
        fill(self.injection), fill(self.theirs)
        with self.theirs.disabled():
            assert off(logits(self.base), before := logits(copy.deepcopy(self.base))) < 1 and before.any()

    def near(self, found: Tensor, expected: Tensor, times: float = 1) -> None:
        """Verify that outputs are within the tolerance of the form."""
        assert off(found, expected) <= times * self.form.tolerance, off(found, expected)

    def loaded(self, folder: Path) -> Any:
        """A dense model from a folder that was written."""
        assert "quantization_config" not in json.loads((folder / "config.json").read_text())
        return transformers.AutoModelForCausalLM.from_pretrained(folder)


def trains(name: str, folder: Path, out: Path) -> None:
    """LoRA and DoRA: outputs, and the gradient of every tensor."""
    for method in ("lora", "dora"):
        pair = Pair(name, folder, method)
        found = []
        for model in (pair.model, pair.base):
            output = model.train()(IDS).logits
            (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
            found.append((output, {key: p.grad for key, p in model.named_parameters() if ".peft." in key}))
        pair.near(found[0][0], found[1][0])
        for key, gradient in found[1][1].items():
            assert gradient.abs().max() > 0
            pair.near(found[0][1][key], gradient, 10)


def resumes(name: str, folder: Path, out: Path) -> None:
    """`peftcore train` on the folder, and again from its checkpoint: the same adapter, and no weight of the base."""
    from peftcore.cli.commands import app

    out.mkdir(exist_ok=True)
    (out / "texts.jsonl").write_text(
        "".join(json.dumps({"text": f"w{i} w{i + 1} w{i + 2} w3"}) + "\n" for i in range(20))
    )
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", unk_token="<unk>")
    fast.model_max_length = 16
    fast.save_pretrained(folder)
    form, data = FORMS[name], str(out / "texts.jsonl")
    command = [
        "train",
        "--model",
        str(folder),
        "--task",
        "causal-lm",
        "--data",
        data,
        "--method",
        "lora",
        "--steps",
        "4",
    ]
    command += ["--out", "run", "--set", "training.evaluate_every=2"]
    if form.scheme:
        command += ["--set", f"quantize={form.scheme}"]
    elif "quantization_config" not in json.loads((folder / "config.json").read_text()):
        raise Inapplicable("no folder")
    with chdir(out):
        _run(app, command)
        first = load_file("run/adapter/adapter.safetensors")
        held = load_file("run/checkpoints/checkpoint-4/model.safetensors")
        assert len(held) == len(first) and all(".peft." in key for key in held)
        for each in ("adapter", "checkpoints/checkpoint-4"):
            os.rename(Path("run", each), Path(f"gone-{Path(each).name}"))
        _run(app, [*command, "--resume"])
        again = load_file("run/adapter/adapter.safetensors")
    assert all(torch.equal(again[key], value) for key, value in first.items())


def _run(app: Any, command: list[str]) -> None:
    result = CliRunner().invoke(app, command)
    if result.exit_code == 2:
        raise BadInput(" ".join(result.stderr.split()))
    assert result.exit_code == 0, (result.output, result.exception)


def saves(name: str, folder: Path, out: Path) -> None:
    """The adapted model's ``save_pretrained`` writes the packed base, the adapter goes onto it when it is loaded."""
    pair = Pair(name, folder)
    expected = logits(pair.model)
    pair.injection.save(out / "adapter")
    fresh = packed_folders.load(name, folder)
    peftcore.load(fresh, out / "adapter")
    assert off(logits(fresh), expected) <= 1e-5
    pair.model.save_pretrained(out / "base")
    fresh = packed_folders.load(name, out / "base")
    peftcore.load(fresh, out / "adapter")
    assert off(logits(fresh), expected) <= 1e-5


def merges(name: str, folder: Path, out: Path) -> None:
    """Into floating point, and back to the bit."""
    for method in ("lora", "dora"):
        pair = Pair(name, folder, method)
        before = logits(pair.model)
        pair.injection.merge()
        pair.near(logits(pair.model), logits(pair.base))
        pair.injection.unmerge()
        assert torch.equal(logits(pair.model), before)


def packs_again(name: str, folder: Path, out: Path) -> None:
    """Into the same format; what is off then is the rounding."""
    pair = Pair(name, folder)
    before, expected = logits(pair.model), logits(pair.base)
    report = pair.injection.merge(into="same", max_error=0.5)
    if not report.repacked:
        raise Inapplicable("loaded dense")
    assert off(logits(pair.model), expected) < 0.5
    pair.injection.unmerge()
    assert torch.equal(logits(pair.model), before)


def bakes(name: str, folder: Path, out: Path) -> None:
    """Baked, and written: it loads as a model that never was quantized."""
    pair = Pair(name, folder)
    pair.injection.bake()
    pair.near(logits(pair.model), logits(pair.base))
    pair.model.save_pretrained(out)
    pair.near(logits(pair.loaded(out)), logits(pair.base))


def becomes_dense(name: str, folder: Path, out: Path) -> None:
    """`dequantize`, and the model is written."""
    model, base = packed_folders.load(name, folder), packed_folders.reference(name, folder)
    peftcore.dequantize(model)
    assert off(logits(model), logits(base)) <= FORMS[name].tolerance
    model.save_pretrained(out)
    found = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert off(logits(found), logits(base)) <= FORMS[name].tolerance


def routes(name: str, folder: Path, out: Path) -> None:
    """Each row has its adapter, or none."""
    pair = Pair(name, folder)
    with pair.theirs.disabled():
        bare = logits(pair.base)
    expected = torch.stack([logits(pair.base)[0], bare[1]])
    with peftcore.route(pair.model, [pair.injection.name, None]):
        pair.near(logits(pair.model), expected)


def has_a_trainer(name: str, folder: Path, out: Path) -> None:
    """transformers' Trainer with `PeftcoreCallback()`: it trains, resumes to the bit, and saves what can be loaded."""
    rows = [{"input_ids": IDS[0], "labels": IDS[0]} for _ in range(8)]

    def made() -> tuple[Any, peftcore.Injection, transformers.Trainer]:
        model = packed_folders.load(name, folder)
        injection = peftcore.apply(model, "lora", seed=0)
        arguments = transformers.TrainingArguments(
            str(out), max_steps=4, save_steps=2, per_device_train_batch_size=2, learning_rate=0.05, use_cpu=True,
            report_to="none", disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = transformers.Trainer(model, arguments, train_dataset=rows, callbacks=[PeftcoreCallback()])
        trainer.remove_callback(transformers.PrinterCallback)
        return model, injection, trainer

    model, injection, trainer = made()
    start = {key: value.clone() for key, value in injection.state_dict().items()}
    trainer.train()
    assert not any(torch.equal(value, start[key]) for key, value in injection.state_dict().items())
    held = load_file(out / "checkpoint-4" / "model.safetensors")
    assert len(held) == len(start)
    _, resumed, again = made()
    again.train(resume_from_checkpoint=str(out / "checkpoint-2"))
    assert all(torch.equal(value, injection.state_dict()[key]) for key, value in resumed.state_dict().items())
    trainer.save_model(str(out / "saved"))
    base = out / "saved" if (out / "saved" / "config.json").exists() else folder
    fresh = packed_folders.load(name, base)
    peftcore.load(fresh, out / "saved")
    assert off(logits(fresh), logits(model)) <= 1e-5


ACTIONS: dict[str, Callable[[str, Path, Path], None]] = {
    "apply, train": trains,
    "`peftcore train`, `--resume`": resumes,
    "save, load": saves,
    "`merge`, `unmerge`": merges,
    'merge `into="same"`': packs_again,
    "`bake`, written": bakes,
    "`dequantize`, written": becomes_dense,
    "route": routes,
    "`Trainer`": has_a_trainer,
}


def cell(name: str, action: str, folder: Path, out: Path) -> str:
    """What one action comes to: it works, or is refused by a typed error before anything has changed."""
    try:
        ACTIONS[action](name, folder, out)
    except PeftcoreError as error:
        return f"refused: {type(error).__name__}"
    except Inapplicable as error:
        return str(error)
    return "works"
