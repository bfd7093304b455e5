"""Operations with other libraries or with whole folders, each with the scene on which it runs with a fault at every
point: conversions of files, uploads to a hub, the Trainer's files, and bases that other libraries packed.

The hub is an object with the methods of `huggingface_hub.HfApi` that an upload calls: a server would run in threads,
whose files and connections count as left open.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import packed_folders
import torch
import transformers
from fault_scenes import FOLDER, Case, a, adapt, llama, on_a
from torch import Tensor, nn
from training_hosts import arguments, host, rows

import peftcore
from peftcore.cli.adapters import jobs
from peftcore.cli.adapters.adapter_hosts import ModelOptions, base_of
from peftcore.cli.commands.adapters import output_of
from peftcore.files.save_load import describe
from peftcore.testing.faults import Make
from peftcore.testing.snapshots import Scene
from peftcore.training import PeftcoreCallback


@cache
def _folder(name: str) -> Path:
    """Returns an empty folder that stays until the end of the process."""
    return Path(tempfile.mkdtemp(dir=FOLDER.name, prefix=name))


@cache
def _base() -> Path:
    """Returns the folder of a small Llama."""
    folder = _folder("base")
    host("llama").save_pretrained(folder)
    return folder


def _quiet(name: str, *args: Any) -> None:
    """A display that shows nothing."""


DISPLAY = SimpleNamespace(phase=_quiet)


def _converting(was: str, now: str, over: bool = False) -> Case:
    def make(folder: Path) -> Scene:
        model = transformers.AutoModelForCausalLM.from_pretrained(_base())
        adapt(model, "a", seed=9).save(folder / "saved", format=was)
        if over:
            adapt(model, "b", seed=8).save(folder / "new", format=now)
        return Scene(nn.Identity(), folder=folder)

    def operation(scene: Scene) -> None:
        assert scene.folder is not None
        read = jobs.read(str(scene.folder / "saved"))
        wanted = ModelOptions(base_of(read), None, None)
        output = output_of(scene.folder / "new", True, [scene.folder / "saved"])
        jobs.convert(wanted, read, now, output, DISPLAY)

    return Case(make, operation)


def _conversions() -> dict[str, Case]:
    pairs = [("peftcore", "peft"), ("peft", "peftcore"), ("peftcore", "mlx"), ("peftcore", "gguf"), ("peft", "kohya")]
    found = {f"convert {was} to {now}": _converting(was, now) for was, now in pairs}
    return found | {"convert peft to peftcore, over another one": _converting("peft", "peftcore", over=True)}


def _reading() -> dict[str, Case]:
    """Descriptions of all formats; those of mlx and gguf are never loaded."""
    formats = ("peftcore", "peft", "kohya", "diffusers", "mlx", "gguf")
    return {
        f"describe {format}": Case(partial(llama, saved=format, names=()), lambda s: describe(s.folder / "saved"))
        for format in formats
    }


class Hub:
    """A hub with one repository, in which a commit puts all files or none."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}

    def model_info(self, repository: str, **options: Any) -> None:
        """The repository exists."""

    def create_repo(self, repository: str, **options: Any) -> SimpleNamespace:
        return SimpleNamespace(repo_id=repository)

    def create_branch(self, repository: str, **options: Any) -> None:
        """The branch exists."""

    def hf_hub_download(self, repository: str, name: str, local_dir: str, **options: Any) -> str:
        file = Path(local_dir, name)
        file.write_bytes(self.files[name])
        return str(file)

    def upload_folder(self, *, folder_path: Path, **options: Any) -> None:
        found = {each.name: each.read_bytes() for each in sorted(Path(folder_path).iterdir())}
        self.files = {**self.files, **found}


def _pushing() -> dict[str, Case]:
    def make(folder: Path) -> Scene:
        made, hub = llama(folder), Hub()
        a(made.model).save(folder / "first")
        hub.files = {each.name: each.read_bytes() for each in sorted((folder / "first").iterdir())}
        computed = made.outputs
        assert computed is not None
        made.outputs, made.needs = lambda model: {"outputs": computed(model), "hub": hub.files}, hub
        return made

    def operation(scene: Scene, **options: Any) -> None:
        hub = patch("huggingface_hub.HfApi", lambda **_: scene.needs)
        with hub, patch("huggingface_hub.constants.HF_HUB_OFFLINE", False):
            a(scene.model).push_to_hub("owner/name", token="hf_writes", **options)

    return {
        "push_to_hub": Case(make, operation),
        "push_to_hub in peft's format, to a branch": Case(make, partial(operation, format="peft", revision="other")),
    }


class OneStep:
    """A training of a small Llama after its first step, at which it ended without a checkpoint."""

    def __init__(self, model: nn.Module, folder: Path) -> None:
        self.callback = PeftcoreCallback()
        self.trainer = transformers.Trainer(
            model, arguments(folder, save_strategy="no", max_steps=1), train_dataset=rows("llama", 2),
            callbacks=[self.callback],
        )  # fmt: skip
        self.trainer.remove_callback(transformers.PrinterCallback)
        self.trainer.train()

    def call(self, event: str) -> None:
        """Call the callback as the Trainer does."""
        made = self.trainer
        getattr(self.callback, event)(made.args, made.state, made.control, model=made.model, optimizer=made.optimizer)

    def begin(self) -> None:
        self.call("on_train_begin")

    def checkpoint(self) -> None:
        self.trainer._save_checkpoint(self.trainer.model, trial=None)
        self.call("on_save")

    def load(self, folder: str) -> None:
        self.trainer._load_from_checkpoint(folder)  # type: ignore[operator]


def _training() -> dict[str, Case]:
    def make(folder: Path, then: Callable[[OneStep], object] = lambda run: None) -> Scene:
        torch.manual_seed(0)
        model = host("llama").eval()
        adapt(model, "a")
        run = OneStep(model, folder / "run")
        then(run)
        return Scene(model, llama(folder, names=()).outputs, folder, needs=run)

    def begun(run: OneStep) -> None:
        run.begin()

    def saved(run: OneStep) -> None:
        run.begin()
        run.checkpoint()
        run.call("on_train_end")
        run.call("on_init_end")

    def resume(scene: Scene) -> None:
        scene.needs.load(str(scene.folder / "run/checkpoint-1"))
        scene.needs.begin()

    # The Trainer writes its own files one after the other. A training that an error ends tells no callback so.
    leave = ("file run", "the model.save_pretrained")
    return {
        "begin a training": Case(make, lambda s: s.needs.begin(), leave),
        "the Trainer's checkpoint": Case(partial(make, then=begun), lambda s: s.needs.checkpoint(), leave),
        "the Trainer's last model": Case(make, lambda s: s.needs.trainer.save_model(str(s.folder / "run")), leave),
        "resume from the Trainer's checkpoint": Case(partial(make, then=saved), resume, leave),
    }


PACKED = ("bitsandbytes nf4", "bitsandbytes int8", "torchao int8", "torchao int4", "torchao float8")
"""What transformers loads packed on a CPU, and a merge unpacks."""


def _loaded(name: str, then: Callable[[peftcore.Injection], object] = lambda injection: None) -> Make:
    def make(folder: Path) -> Scene:
        written = _written(name)
        model = packed_folders.load(name, written).eval()
        injection = peftcore.apply(model, "lora", name="a", rank=2, target=["model.layers.0.self_attn.v_proj"])
        with torch.no_grad():
            for parameter in injection.parameters():
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))

        def computed(model: nn.Module) -> Tensor:
            with torch.no_grad():
                found: Tensor = model(torch.arange(3, 9)[None]).logits
            return found

        computed(model)  # bitsandbytes prepares its int8 weights in the first forward
        then(injection)
        return Scene(model, computed, folder)

    return make


@cache
def _written(name: str) -> Path:
    return packed_folders.write(name, _folder("packed"))


def _merging() -> dict[str, Case]:
    def merge(injection: peftcore.Injection) -> None:
        injection.merge(into="float")

    found, leave = {}, ("the model.hf_quantizer",)  # it has another object in each copy
    for name in PACKED:
        if packed_folders.FORMS[name].installed:
            found[f"merge into loaded {name}"] = Case(_loaded(name), on_a(merge), leave)
            found[f"unmerge from loaded {name}"] = Case(_loaded(name, merge), on_a(lambda i: i.unmerge()), leave)
    return found


OUTSIDE: dict[str, Case] = {**_conversions(), **_reading(), **_pushing(), **_training(), **_merging()}
