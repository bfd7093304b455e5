"""Holds the rules of programs, and their column of readers.md, against the programs' own code, out of a checkout:
``python docs/generate/readers_in_programs.py comfyui|sglang|tgi CHECKOUT [METHOD...]`` (five minutes each).

Each method is written twice: as it is, where the program's format can hold it, and by `peftcore export`. The program's
code reads both. What `peftcore check` says is held against that: what is *read* or exported computes what the adapter
does, what is *changed* loads and computes something else, what is *dropped* loads (and may act in training alone), what
is *refused* does not load.

comfyui: its loader and its UNet, on a CPU, and for Control-LoRA its ControlNet. sglang and tgi: what makes the tensors
of one adapter ready; their kernels are not called, the stacked factors are multiplied here. Modules of theirs that need
a GPU or a server are replaced by empty ones. A checkout of sglang may be its wheel, unpacked.
"""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.machinery
import sys
import tempfile
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import peftcore
import readers_matrix as matrix
from files_matrix import EQUAL, quiet
from peftcore.algebra.exporting import export
from peftcore.errors import ExportError, PeftcoreError
from peftcore.files.readers.check import check
from peftcore.files.readers.reader import Reader, Verdict, readers

REFUSALS = (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError, AssertionError)


class Unfit(Exception):
    """What was loaded has shapes that do not fit together, so that whatever is computed is something else."""


class Empty(types.ModuleType):
    """A module that has every name, each a class of its own of which nothing is an instance."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (), {"__getattr__": lambda self, name: lambda *args, **options: None})
        setattr(self, name, made)
        return made


class Emptied:
    """Finds modules of a package: empty ones, but for those that are named."""

    def __init__(self, package: str, real: Sequence[str], instead: Sequence[str] = ()) -> None:
        self.package, self.real, self.instead = package, {*real}, {*instead}

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name in self.real or (name.partition(".")[0] != self.package and name not in self.instead):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: Any) -> types.ModuleType:
        return Empty(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def packages(root: Path, *names: str) -> None:
    """Puts packages into the table of modules whose own code is not run."""
    for name in names:
        made = types.ModuleType(name)
        made.__path__ = [str(root.joinpath(*name.split(".")))]
        sys.modules[name] = made


class ComfyUI(matrix.Pictures):
    """ComfyUI's UNet, its loader of adapters, and its ControlNet."""

    CONFIG: ClassVar[dict[str, Any]] = {
        "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [1, 1],
        "channel_mult": (1, 2), "transformer_depth": [1, 0], "transformer_depth_output": [1, 1, 0, 0],
        "transformer_depth_middle": 1, "context_dim": 16, "num_heads": 4, "use_spatial_transformer": True,
        "legacy": False, "use_linear_in_transformer": False,
    }  # fmt: skip

    def __init__(self, checkout: Path) -> None:
        sys.path.insert(0, str(checkout))
        arguments = importlib.import_module("comfy.cli_args")
        arguments.args.cpu = True
        self.lora = importlib.import_module("comfy.lora")
        self.control = importlib.import_module("comfy.controlnet")

    @functools.cached_property
    def _made(self) -> tuple[nn.Module, dict[str, Any]]:
        import diffusers

        torch.manual_seed(0)
        blocks = {
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        }
        sizes = {"block_out_channels": (32, 64), "layers_per_block": 1, "cross_attention_dim": 16}
        model = diffusers.UNet2DConditionModel(sample_size=8, attention_head_dim=4, **sizes, **blocks)
        inputs = {
            "sample": torch.randn(2, 4, 8, 8),
            "timestep": torch.tensor([3, 5]),
            "encoder_hidden_states": torch.randn(2, 5, 16),
        }
        return model.eval(), inputs

    def _theirs(self) -> Any:
        """Their UNet with the weights of ours, as their code wants the whole model."""
        opened = importlib.import_module("comfy.ldm.modules.diffusionmodules.openaimodel")
        unet = opened.UNetModel(
            **self.CONFIG, dtype=torch.float32, device="cpu", operations=self.control.comfy.ops.disable_weight_init
        ).eval()
        names = self.lora.comfy.utils.unet_to_diffusers(self.CONFIG)
        unet.load_state_dict({names[name]: value.clone() for name, value in self.base.state_dict().items()})
        model = nn.Module()
        model.diffusion_model = unet
        model.model_config = types.SimpleNamespace(unet_config=dict(self.CONFIG))  # type: ignore[assignment]
        model.manual_cast_dtype = None
        model.get_dtype = lambda: torch.float32  # type: ignore[assignment]
        return model

    @torch.no_grad()
    def _run(self, model: Any, control: Any = None) -> Tensor:
        inputs = self._made[1]
        found: Tensor = model.diffusion_model(
            inputs["sample"], torch.zeros(2, dtype=torch.long), context=inputs["encoder_hidden_states"], control=control
        )
        return found

    @torch.no_grad()
    def their_reading(self, path: Path) -> Tensor:
        model = self._theirs()
        tensors = load_file(next(path.glob("*.safetensors")))
        places = self.lora.model_lora_keys_unet(model, {})
        state = model.state_dict()
        for name, patch in self.lora.load_lora(tensors, places).items():
            state[name].copy_(self.lora.calculate_weight([(1.0, patch, 1.0, None, None)], state[name].clone(), name))
        return self._run(model)

    @torch.no_grad()
    def controlled(self, path: Path, image: Tensor) -> Tensor:
        """What its ControlNet and its UNet make of a file of Control-LoRA."""
        model, inputs = self._theirs(), self._made[1]
        network = self.control.ControlLora(load_file(path))
        model.model_sampling = None
        network.pre_run(model, lambda percent: percent)
        times, states = torch.zeros(2, dtype=torch.long), inputs["encoder_hidden_states"]
        out = network.control_model(x=inputs["sample"], hint=image, timesteps=times, context=states)
        return self._run(model, network.control_merge(out, None, torch.float32))


class Servers(matrix.Language):
    """What servers make of a folder of peft: factors by module, which are added to the weights here."""

    @torch.no_grad()
    def with_updates(self, updates: Iterator[tuple[str, Tensor]]) -> Tensor:
        base = copy.deepcopy(self.base)
        for path, update in updates:
            base.get_submodule(path).weight += update
        return self.returned(base)


class SGLang(Servers):
    """Its configuration of an adapter, and what stacks the factors of its projections."""

    STACKS: ClassVar[dict[str, tuple[str, ...]]] = {
        "qkv_proj": ("q_proj", "k_proj", "v_proj"),
        "gate_up_proj": ("gate_proj", "up_proj"),
    }
    FILES = ("lora.lora", "lora.lora_config", "lora.utils", "layers.utils.common")

    def __init__(self, checkout: Path) -> None:
        real = [f"sglang.srt.{name}" for name in self.FILES]
        sys.meta_path.insert(0, Emptied("sglang", real))
        packages(checkout, "sglang", "sglang.srt", "sglang.srt.lora", "sglang.srt.layers")
        layers = types.ModuleType("sglang.srt.layers.utils")
        layers.__path__ = [str(checkout / "sglang/srt/layers/utils")]
        sys.modules["sglang.srt.layers.utils"] = layers
        layers.get_layer_id = importlib.import_module("sglang.srt.layers.utils.common").get_layer_id  # type: ignore
        self.lora, self.config, self.utils = (importlib.import_module(each) for each in real[:3])

    def their_reading(self, folder: Path) -> Tensor:
        config = self.config.LoRAConfig(str(folder))
        if config.use_dora:  # as their manager, which needs a server
            raise ValueError("DoRA")
        adapter = self.lora.LoRAAdapter("a", config, self.base.config, None, None)
        adapter.initialize_weights_from_tensors(load_file(folder / "adapter_model.safetensors"))
        return self.with_updates(self._updates(adapter))

    def _updates(self, adapter: Any) -> Iterator[tuple[str, Tensor]]:
        leaves = {"qkv_proj", "o_proj", "gate_up_proj", "down_proj", "embed_tokens", "lm_head"}
        held = [*(layer.weights for layer in adapter.layers), adapter.embedding_layers]
        for weights in held:
            buffers: dict[str, dict[str, Tensor]] = {}
            for name, value in weights.items():  # as mem_pool.py: by substrings, the last one stays
                try:
                    leaf = self.utils.get_target_module_name(name, leaves)
                except ValueError:
                    continue
                path = name[: name.index(leaf)].removeprefix("base_model.model.") + leaf
                buffers.setdefault(path, {})["A" if "lora_A" in name or "embedding_A" in name else "B"] = value
            for path, both in buffers.items():
                parent, _, leaf = path.rpartition(".")
                parts = self.STACKS.get(leaf, (leaf,))
                A, B, rank, row = both["A"], both["B"], adapter.config.r, 0
                rows = [self.base.get_submodule(f"{parent}.{part}".lstrip(".")).weight.shape[0] for part in parts]
                if len(A) != len(parts) * rank or B.shape != (sum(rows), rank):  # their buffers are of these shapes
                    raise ValueError(f"{path} has factors {tuple(A.shape)} and {tuple(B.shape)}")
                for index, (part, high) in enumerate(zip(parts, rows, strict=True)):
                    yield (
                        f"{parent}.{part}".lstrip("."),
                        adapter.scaling * (B[row : row + high] @ A[index * rank : (index + 1) * rank]),
                    )
                    row += high


class TGI(Servers):
    """Its configuration of an adapter, and what stacks the factors of one kind of module over the blocks."""

    KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "qkv_proj", "lm_head")

    def __init__(self, checkout: Path) -> None:
        root, name = checkout / "server", "text_generation_server"
        real = [f"{name}.{each}" for each in ("adapters.config", "adapters.weights", "adapters.lora", "utils.adapter")]
        instead = () if importlib.util.find_spec("loguru") else ("loguru",)
        sys.meta_path.insert(0, Emptied(name, real, instead))
        packages(root, name, f"{name}.adapters", f"{name}.utils")
        importlib.import_module(f"{name}.utils.import_utils").SYSTEM = "ipex"  # factors are stacked as they are
        hub = importlib.import_module(f"{name}.utils.hub")
        hub._weight_files_from_dir = lambda folder, extension: [*map(str, Path(folder).glob(f"*{extension}"))]
        importlib.import_module(f"{name}.utils.log").log_master = lambda *args, **options: None
        _, _, self.lora, self.adapter = (importlib.import_module(each) for each in real)

    def their_reading(self, folder: Path) -> Tensor:
        blocks = len(self.base.model.layers)
        layer = types.SimpleNamespace(
            base_layer=types.SimpleNamespace(linear=types.SimpleNamespace(weight=torch.zeros(1)))
        )
        group = types.SimpleNamespace(size=lambda: 1, rank=lambda: 0)
        paths = {(index, kind): self._path(index, kind) for index in range(blocks) for kind in self.KINDS}
        names = tuple(dict.fromkeys(paths.values()))
        self.adapter.load_module_map.cache_clear()
        found, config, used, _ = self.adapter.load_module_map("base", None, "a", str(folder), names)
        updates = []
        for kind in self.KINDS:
            count = 1 if kind == "lm_head" else blocks
            targets = {(index, kind): (paths[index, kind], layer) for index in range(count)}
            stacked = self.lora.LoraWeights.prepare_weights(
                config, found, kind, {*used}, count, torch.float32, 1, group, targets
            )
            if stacked is not None:
                for index in range(count):
                    A, B = stacked._weights_a[index], stacked._weights_b[index]  # [rank, in], [out, rank]
                    if (
                        A.shape[0] != B.shape[1]
                        or A.shape[1] != self.base.get_submodule(paths[index, kind]).in_features
                    ):
                        raise Unfit(f"{kind} has factors {tuple(A.shape)} and {tuple(B.shape)}")
                    updates.append((paths[index, kind], B @ A))
        return self.with_updates(iter(updates))

    @staticmethod
    def _path(index: int, kind: str) -> str:
        if kind == "lm_head":
            return kind
        return f"model.layers.{index}.{'mlp' if kind in ('gate_proj', 'up_proj', 'down_proj') else 'self_attn'}.{kind}"


PROGRAMS: dict[str, Callable[[Path], Any]] = {"comfyui": ComfyUI, "sglang": SGLang, "tgi": TGI}


@dataclass(frozen=True)
class Found:
    """What a program made of one file."""

    said: str
    """What our rules say of it."""
    agrees: bool
    what: str


def met(host: Any, path: Path, said: Verdict, ours: Tensor) -> Found:
    """Holds a verdict against what comes of a file."""
    try:
        theirs = host.their_reading(path)
    except REFUSALS as error:
        return Found(said.value, said is Verdict.REFUSED, f"refused, {type(error).__name__}: {error}"[:120])
    except Unfit as error:
        return Found(said.value, said is Verdict.CHANGED, f"loaded, {error}")
    difference = float((theirs - ours).abs().max() / ours.abs().max())
    equal = difference <= EQUAL
    agrees = {Verdict.READ: equal, Verdict.CHANGED: not equal, Verdict.DROPPED: True, Verdict.REFUSED: False}[said]
    return Found(said.value, agrees, f"differs by {difference:.1g}")


def of_method(host: Any, reader: Reader, name: str) -> Iterator[tuple[str, Found]]:
    """Yields what comes of a method's own file and of its export."""
    if name == matrix.CONDITIONED:
        if isinstance(host, ComfyUI):
            yield "format control_lora", control_lora(host)
        return
    injection = matrix.applied(host, name)
    if injection is None or not matrix.moved(host, injection):
        return
    ours = host.returned(injection.model)
    with tempfile.TemporaryDirectory() as place:
        own, exported = Path(place) / "own", Path(place) / "exported"
        try:
            injection.save(own, format=reader.writes[0])
        except PeftcoreError:
            pass
        else:
            yield "as saved", met(host, own, check(own, reader).verdict, ours)
        try:
            done = export(injection, exported, reader)
        except ExportError:
            try:
                done = export(injection, exported, reader, rank=matrix.RANK)
            except PeftcoreError:
                return
        except PeftcoreError:
            return
        if done.how == "projected":
            ours = host.read(reader, exported)
        yield done.how, met(host, exported, Verdict.READ, ours)


def control_lora(host: ComfyUI) -> Found:
    """Holds a file of Control-LoRA against ComfyUI's ControlNet."""
    injection = matrix.applied(host, matrix.CONDITIONED)
    assert injection is not None, "it has a place in a UNet"
    ours, base = host.returned(injection.model), host.returned(host.base)
    with tempfile.TemporaryDirectory() as place:
        injection.save(Path(place) / "a.safetensors", format="control_lora")
        said = check(Path(place) / "a.safetensors", readers()["comfyui"]).verdict
        theirs = host.controlled(Path(place) / "a.safetensors", matrix.PICTURE)
    difference, moved = (float((theirs - each).abs().max() / ours.abs().max()) for each in (ours, base))
    agrees = said is Verdict.READ and difference <= EQUAL < moved
    return Found(said.value, agrees, f"differs by {difference:.1g}, from the base by {moved:.1g}")


def main() -> None:
    """Print a line for each file, and a count."""
    program, checkout, *names = sys.argv[1:]
    sys.path[:0] = [each for each in matrix.HELPERS if each not in sys.path]
    host, reader = PROGRAMS[program](Path(checkout).resolve()), readers()[program]
    counts = dict.fromkeys((True, False), 0)
    for name in names or [info.name for info in peftcore.methods(presets=False)]:
        with quiet():
            lines = list(of_method(host, reader, name))
        for how, found in lines:
            counts[found.agrees] += 1
            print("ok " if found.agrees else "BAD", name, f"{how}: {found.said};", found.what, flush=True)
    print(f"{program}: {counts[True]} files as our rules say, {counts[False]} not")
    raise SystemExit(bool(counts[False]))


if __name__ == "__main__":
    main()
