"""The last lines of a training script, on 27 architectures: `save_model`, `push_to_hub`, the best checkpoint at the end
and resuming keep what was trained, with transformers' own Trainer and `PeftcoreCallback()`."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import more_hosts
import pytest
import torch
import transformers
from safetensors.torch import load_file
from slowly import quick
from torch import Tensor, nn
from training_hosts import Bare, Squares, arguments, tensors

import peftcore
from peftcore.training import PeftcoreCallback, PeftcoreTrainer

torch.set_num_threads(1)

DEIT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
Inputs = dict[str, Any]


def deit() -> tuple[nn.Module, Inputs]:
    torch.manual_seed(0)
    config = transformers.DeiTConfig(**DEIT, image_size=32, patch_size=8, num_labels=3)
    return transformers.DeiTForImageClassification(config).eval(), {"pixel_values": torch.randn(2, 3, 32, 32)}


ARCHITECTURES: Mapping[str, tuple[str, ...]] = {
    "vit": ("classifier",),
    "deit": ("classifier",),
    "beit_hf": ("classifier",),
    "segformer": (),
    "swin": ("classifier",),
    "dinov2": ("classifier",),
    "detr": ("class_labels_classifier", "bbox_predictor"),
    "rt_detr": (),
    "clip": ("visual_projection",),
    "siglip": (),
    "llava": ("multi_modal_projector",),
    "gemma3": (),
    "qwen2_vl": (),
    "wav2vec2": ("lm_head",),
    "whisper": (),
    "mixtral": (),
    "qwen2_moe": (),
    "phimoe": (),
    "jamba": (),
    "nemotron_h": (),
    "esm": (),
    "bert_cls": ("classifier",),
    "deberta_v2": (),
    "t5": (),
    "gpt2": (),
    "llama": (),
    "mamba": (),
}
"""Hosts, and the modules that people train whole beside the adapter."""
QUICK = ("vit", "detr", "llava", "mixtral", "wav2vec2")
EXPERTS = ["attn.q", "experts.gate_up", "experts.down"]


def build(name: str) -> tuple[nn.Module, Inputs]:
    """A host with inputs, and labels where it computes a loss from a class or from the text itself."""
    model, inputs = deit() if name == "deit" else more_hosts.build(name)
    if "Classification" in type(model).__name__:
        inputs = inputs | {"labels": torch.tensor([0, 1])}
    if type(model).__name__.endswith("ForCausalLM"):
        inputs = inputs | {"labels": inputs["input_ids"]}
    return model, inputs


class Losses(Squares):
    """A Trainer with the model's own loss, and where it has none, the mean square of its outputs."""

    def compute_loss(self, model: Any, inputs: Any, *rest: Any, **kwargs: Any) -> Any:
        return model(**inputs).loss if "labels" in inputs else super().compute_loss(model, inputs, *rest, **kwargs)


@torch.no_grad()
def outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """What the model gives in evaluation."""
    was = model.training
    found = [each.clone() for each in tensors(model.eval()(**inputs))]
    model.train(was)
    return found


def assert_equal(one: list[Tensor], other: list[Tensor]) -> None:
    """To the bit."""
    assert len(one) == len(other) > 0
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def assert_close(one: list[Tensor], other: list[Tensor]) -> None:
    """But for rounding, which depends on where in memory tensors lie."""
    assert len(one) == len(other) > 0
    for found, wanted in zip(one, other, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


class Script:
    """What a training script has: a base from a folder, an adapter, a Trainer of four steps, two checkpoints."""

    def __init__(self, name: str, folder: Path, *callbacks: Any, **options: Any) -> None:
        built, self.inputs = build(name)
        self.base = folder / "base"
        built.save_pretrained(self.base)
        self.model = type(built).from_pretrained(self.base)
        target = EXPERTS if name == "mixtral" else "all-linear"
        self.start = outputs(self.model, self.inputs)
        train = list(ARCHITECTURES[name])
        self.injection = peftcore.apply(self.model, "lora", target=target, train=train, rank=2, seed=0)
        given = {"max_steps": 4, "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "label_names": []}
        given |= {"metric_for_best_model": "loss", "greater_is_better": True, "learning_rate": 1e-2}
        self.trainer = Losses(
            self.model,
            arguments(folder / "run", remove_unused_columns=False, **{**given, **options}),
            train_dataset=[{}] * 12,
            eval_dataset=[{}] * 2,
            data_collator=lambda _: dict(self.inputs),
            callbacks=[PeftcoreCallback(), *callbacks],
        )
        self.trainer.remove_callback(transformers.PrinterCallback)
        self.checkpoint = str(folder / "run" / "checkpoint-2")

    def now(self) -> list[Tensor]:
        return outputs(self.model, self.inputs)

    def values(self) -> list[Tensor]:
        """All tensors of the model: a run may change buffers of the base too."""
        return [value.clone() for value in self.model.state_dict().values()]

    def read(self, folder: Path, base: Path | None = None) -> list[Tensor]:
        """What another process gets that reads the folder, which has the base too, or one that had it."""
        model = type(self.model).from_pretrained(base or folder)
        peftcore.load(model, folder)
        return outputs(model, self.inputs)


class Noted(transformers.TrainerCallback):
    """Notes all tensors at each checkpoint."""

    def __init__(self) -> None:
        self.at: dict[int, list[Tensor]] = {}

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.at[state.global_step] = [value.clone() for value in kwargs["model"].state_dict().values()]


class Hub:
    """Takes what is uploaded: the names of files by which `peftcore.load` knows an adapter, and their tensors."""

    def __init__(self) -> None:
        self.pushed: list[dict[str, Tensor]] = []

    def create_repo(self, repo_id: str, **_: Any) -> Any:
        return type("Url", (), {"repo_id": repo_id})()

    def upload_folder(self, folder_path: str, **_: Any) -> Any:
        file = Path(folder_path, "adapter.safetensors")
        self.pushed.append(load_file(file) if file.exists() and Path(folder_path, "adapter.json").exists() else {})
        done: Future[None] = Future()
        done.set_result(None)
        done.is_done = done.done  # type: ignore[attr-defined]
        return done


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub()
    monkeypatch.setattr(transformers.trainer, "hf_api", lambda: made)
    monkeypatch.setattr(transformers.Trainer, "create_model_card", lambda self, **_: None)
    return made


@pytest.mark.parametrize("name", quick(ARCHITECTURES, QUICK))
def test_what_was_trained_is_kept(name: str, tmp_path: Path, hub: Hub) -> None:
    noted = Noted()
    options = {"load_best_model_at_end": True, "push_to_hub": True, "hub_model_id": "a/b"}
    whole = Script(name, tmp_path, noted, **options)
    whole.trainer.train()

    # the best is at one of two checkpoints, and the two are not the same
    best = int(Path(whole.trainer.state.best_model_checkpoint).name.removeprefix("checkpoint-"))
    assert any(not torch.equal(a, b) for a, b in zip(noted.at[2], noted.at[4], strict=True))
    assert_equal(whole.values(), noted.at[best])

    trained = whole.now()
    assert any(not torch.allclose(a, b, atol=1e-4) for a, b in zip(trained, whole.start, strict=True))
    whole.trainer.save_model(str(tmp_path / "out"))
    for base in (None, whole.base):
        assert_close(whole.read(tmp_path / "out", base), trained)

    during = len(hub.pushed)
    assert during
    whole.trainer.push_to_hub()
    assert len(hub.pushed) > during
    values = whole.injection.state_dict()
    assert all(pushed.keys() == hub.pushed[-1].keys() for pushed in hub.pushed)
    assert sum(each.numel() for each in hub.pushed[-1].values()) == sum(each.numel() for each in values.values())
    assert_close(whole.read(tmp_path / "run", whole.base), trained)

    resumed = Script(name, tmp_path)
    resumed.trainer.train(resume_from_checkpoint=whole.checkpoint)
    assert_equal(resumed.values(), noted.at[4])


def test_there_are_twenty_seven_of_them() -> None:
    assert len(ARCHITECTURES) == 27


class Averaged(transformers.TrainerCallback):
    """An average of what trains, which takes the model's place in evaluation and in what is saved."""

    def __init__(self, decay: float = 0.5) -> None:
        self.decay = decay
        self.average: dict[str, Tensor] = {}
        self.kept: dict[str, Tensor] = {}
        self.at: dict[int, list[Tensor]] = {}

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                mean = self.average.setdefault(name, parameter.detach().clone())
                mean.lerp_(parameter, 1 - self.decay)
        if control.should_evaluate or control.should_save:
            self.kept = self.swap(model, self.average)

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.at[state.global_step] = [each.clone() for each in model.state_dict().values()]
        self.swap(model, self.kept)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.swap(model, self.average)

    @torch.no_grad()
    def swap(self, model: nn.Module, values: dict[str, Tensor]) -> dict[str, Tensor]:
        own = dict(model.named_parameters())
        before = {name: own[name].clone() for name in values}
        for name, value in values.items():
            own[name].data.copy_(value)
        return before


class Copied(transformers.TrainerCallback):
    """An average in a copy of the model, of all that its state dict has, as users write it by hand."""

    def __init__(self) -> None:
        self.copy: Any = None

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if self.copy is None and state.global_step >= 2:  # after a warm-up, at a step of which a checkpoint is written
            self.copy = copy.deepcopy(model)
        if state.global_step >= 2:
            values = model.state_dict()
            for key, value in self.copy.state_dict().items():
                value.lerp_(values[key], 0.5) if value.is_floating_point() else value.copy_(values[key])


class Wanted(transformers.TrainerCallback):
    """Asks for a checkpoint at a step, and is told of it after the others."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_save |= state.global_step == 3


AVERAGED = quick(("vit", "llama", "detr", "mixtral"), ("vit", "llama"))


@pytest.mark.parametrize("name", AVERAGED)
def test_an_average_that_takes_the_models_place_is_what_is_kept(name: str, tmp_path: Path) -> None:
    average, noted = Averaged(), Noted()
    script = Script(name, tmp_path, noted, average, load_best_model_at_end=True)
    script.trainer.train()
    best = int(Path(script.trainer.state.best_model_checkpoint).name.removeprefix("checkpoint-"))
    assert_equal(noted.at[best], average.at[best])
    own = dict(script.model.named_parameters())
    assert all(torch.equal(own[key], value) for key, value in average.average.items())
    script.trainer.save_model(str(tmp_path / "out"))
    for base in (None, script.base):
        assert_close(script.read(tmp_path / "out", base), script.now())


@pytest.mark.parametrize("name", AVERAGED)
def test_an_average_in_a_copy_is_the_copys_own(name: str, tmp_path: Path) -> None:
    """It was made, and reads the model, between a step and the step's checkpoint."""
    average, noted = Copied(), Noted()
    script = Script(name, tmp_path, average, noted, save_steps=1, eval_strategy="no")
    script.trainer.train()
    assert average.copy.state_dict().keys() == script.model.state_dict().keys()
    got, raw = outputs(average.copy, script.inputs), script.now()
    assert any(not torch.equal(a, b) for a, b in zip(got, raw, strict=True))
    (injection,) = peftcore.injections(average.copy).values()
    injection.save(tmp_path / "average")
    assert_close(script.read(tmp_path / "average", script.base), got)
    assert_equal([*average.copy.state_dict().values()], [*copy.deepcopy(average.copy).state_dict().values()])
    resumed = Script(name, tmp_path, save_steps=1, eval_strategy="no")
    resumed.trainer.train(resume_from_checkpoint=script.checkpoint)
    assert_equal(resumed.values(), noted.at[4])
    written = [Path(script.checkpoint).with_name(f"checkpoint-{n}") for n in (1, 2, 3, 4)]
    sizes = {(each / "model.safetensors").stat().st_size for each in written}
    assert len(sizes) == 1, sizes


@pytest.mark.parametrize("name", AVERAGED)
def test_a_checkpoint_that_another_callback_asks_for_resumes_too(name: str, tmp_path: Path) -> None:
    noted = Noted()
    script = Script(name, tmp_path, noted, Wanted(), save_steps=4, eval_strategy="no")
    script.trainer.train()
    resumed = Script(name, tmp_path, save_steps=4, eval_strategy="no")
    resumed.trainer.train(resume_from_checkpoint=str(Path(script.checkpoint).with_name("checkpoint-3")))
    assert_equal(resumed.values(), noted.at[4])


class Saves(transformers.TrainerCallback):
    """Saves the model by the Trainer's own means, where it likes it best so far."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.script: Any = None
        self.found: list[Tensor] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 2:
            self.script.trainer.save_model(str(self.folder))
            self.found = self.script.now()


@pytest.mark.parametrize("name", AVERAGED)
def test_what_a_callback_saves_before_a_checkpoint_is_no_checkpoint(name: str, tmp_path: Path) -> None:
    saves, noted = Saves(tmp_path / "out"), Noted()
    saves.script = Script(name, tmp_path, saves, noted, eval_strategy="no")
    saves.script.trainer.train()
    for base in (None, saves.script.base):
        assert_close(saves.script.read(tmp_path / "out", base), saves.found)
    resumed = Script(name, tmp_path, eval_strategy="no")
    resumed.trainer.train(resume_from_checkpoint=saves.script.checkpoint)
    assert_equal(resumed.values(), noted.at[4])


@pytest.mark.parametrize("other", [Copied, Wanted])
def test_our_trainer_has_other_callbacks_beside_models_that_are_not_of_transformers(
    other: type[transformers.TrainerCallback], tmp_path: Path
) -> None:
    data = [{"x": torch.randn(4), "labels": torch.tensor(index % 3)} for index in range(12)]
    ends: list[dict[str, Tensor]] = []
    others: list[transformers.TrainerCallback] = []
    for checkpoint in (None, str(tmp_path / "checkpoint-3")):
        model = Bare()
        injection = peftcore.apply(model, "lora", target=["up", "down"], rank=2, seed=0)
        given = arguments(tmp_path, label_names=["labels"], max_steps=4, save_steps=4 if other is Wanted else 1)
        run = PeftcoreTrainer(model, given, train_dataset=data)
        others.append(other())
        run.add_callback(others[-1])
        run.train(resume_from_checkpoint=checkpoint)
        ends.append({key: value.clone() for key, value in model.state_dict().items()})
        found = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
        assert len(found) == len(injection.state_dict())
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())
    if isinstance(others[0], Copied):
        copied = others[0].copy.state_dict()
        assert copied.keys() == ends[0].keys()
        assert any(not torch.equal(value, ends[0][key]) for key, value in copied.items())


class Thaws(transformers.TrainerCallback):
    """Lets a module of the base train from the second step on, as users do with heads and last blocks."""

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        model.lm_head.requires_grad_(False)

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        model.lm_head.requires_grad_(state.global_step > 0)


def test_what_begins_to_train_later_is_in_checkpoints(tmp_path: Path) -> None:
    noted = Noted()
    script = Script("llama", tmp_path, noted, Thaws(), load_best_model_at_end=True)
    head = script.model.lm_head.weight
    head.requires_grad_(True)
    before = head.detach().clone()
    script.trainer.create_optimizer()
    head.requires_grad_(False)
    script.trainer.train()
    best = int(Path(script.trainer.state.best_model_checkpoint).name.removeprefix("checkpoint-"))
    assert best == 2
    assert_equal(script.values(), noted.at[2])
    assert not torch.equal(head, before)
    script.trainer.save_model(str(tmp_path / "out"))
    assert_close(script.read(tmp_path / "out"), script.now())


@pytest.mark.slow
@pytest.mark.parametrize("name", ("vit", "llama"))
def test_a_compiled_model_is_kept_too(name: str, tmp_path: Path) -> None:
    noted, compiled = Noted(), {"torch_compile": True, "torch_compile_backend": "eager"}
    script = Script(name, tmp_path, noted, load_best_model_at_end=True, **compiled)
    script.trainer.train()
    best = int(Path(script.trainer.state.best_model_checkpoint).name.removeprefix("checkpoint-"))
    assert_equal(script.values(), noted.at[best])
    script.trainer.save_model(str(tmp_path / "out"))
    assert_close(script.read(tmp_path / "out"), script.now())
    resumed = Script(name, tmp_path, **compiled)
    resumed.trainer.train(resume_from_checkpoint=script.checkpoint)
    assert_equal(resumed.values(), noted.at[4])
