"""The adapters that peft's own test suite makes, made by the real peft and opened here, and written back for peft.

    python tests/side_by_side/peft_cases.py CHECKOUT [--suite NAME ...] [--only EXPRESSION] [--write]

CHECKOUT is a checkout of huggingface/peft, at the tag of the installed version or the nearest one there is: its tests
are imported, for their lists of configurations and their models, and none of them is kept here. For each configuration
peft adapts a copy of the model, all that trains gets noise N(0, 0.1) (more, and another model, where that does not move
the output), and the folder that it saves is loaded by
`peftcore.load` on a copy with the same weights. Then ours is written as a folder of peft, and `PeftModel` opens that on
a third copy. Verdicts: *read* and *written*, *differs* with how much, *refused* with the reason, and *peft refuses*
where peft itself does not take the configuration for the model.

Models that the suites fetch are built here from their class, small and random. With `--write` the verdicts go into
`peft_cases.json`, which `test_peft_cases.py` holds in an ordinary run and whose table is in docs/moving-from-peft.md.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
import tempfile
import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import peft
import torch
import transformers
from peft_folders import fill
from peft_pairs import MOVED, OUTPUTS, difference
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import peftcore
from peftcore.errors import PeftcoreError
from peftcore.files.formats.composing import literally
from peftcore.injection.injection import Injection

LIST = Path(__file__).with_suffix(".json")
READ, WRITTEN, DIFFERS, REFUSED, PEFT = "read", "written", "differs", "refused", "peft refuses"
ATTEMPTS = 7
OFF = (AttributeError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError, IndexError)
"""What peft raises where it does not take a configuration for a model."""

Run = Callable[[nn.Module], Tensor]
Made = tuple[nn.Module, Run]


@dataclass
class Case:
    """One configuration of a suite, or a pair of them that act together."""

    suite: str
    name: str
    host: str
    configs: list[tuple[type, dict[str, Any]]]
    build: Callable[[], Made]


@dataclass
class Verdict:
    """What became of a case."""

    suite: str
    name: str
    type: str
    options: str
    read: str
    written: str = ""
    reason: str = ""
    error: float | None = None
    ours: dict[str, Any] = field(default_factory=dict)
    """The adapter in our own words: layers or model of the host, method, options, target, what trains along."""


# --- models -----------------------------------------------------------------------------------------------------------

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
FAMILIES: Mapping[str, tuple[str, str, dict[str, Any]]] = {
    "opt": ("OPTConfig", "OPTForCausalLM", {"hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2,
                                            "num_attention_heads": 2, "word_embed_proj_dim": 16}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {"n_embd": 16, "n_layer": 2, "n_head": 2}),
    "gptj": ("GPTJConfig", "GPTJForCausalLM", {"n_embd": 16, "n_layer": 2, "n_head": 2, "rotary_dim": 4}),
    "llama": ("LlamaConfig", "LlamaForCausalLM", SMALL),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {**SMALL, "num_key_value_heads": 2}),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {**SMALL, "num_key_value_heads": 1, "head_dim": 8}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**SMALL, "num_key_value_heads": 2}),
    "t5": ("T5Config", "T5ForConditionalGeneration", {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2,
                                                     "num_heads": 2}),
    "bart": ("BartConfig", "BartForConditionalGeneration", {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2,
             "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "encoder_attention_heads": 2,
             "decoder_attention_heads": 2}),
    "resnet": ("ResNetConfig", "ResNetForImageClassification", {"embedding_size": 8, "hidden_sizes": [8, 16],
               "depths": [1, 1], "num_labels": 3, "layer_type": "basic"}),
}  # fmt: skip
"""Models of transformers, by the word that names of checkpoints have for them."""
TOKENS = {"vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def family(name: str) -> str:
    """The key in FAMILIES for the name of a checkpoint."""
    return next(key for key in sorted(FAMILIES, key=len, reverse=True) if key in name.lower())


def transformers_model(kind: str) -> Made:
    """A small random model of a family, and how it is run: its logits for words, without rows in front."""
    config, model, sizes = FAMILIES[kind]
    both = kind in ("t5", "bart")
    beside = {} if kind == "resnet" else {**TOKENS, "decoder_start_token_id": 2} if both else TOKENS
    torch.manual_seed(0)
    host = getattr(transformers, model)(getattr(transformers, config)(**sizes, **beside)).eval()
    with torch.no_grad():
        for parameter in host.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    if kind == "resnet":
        pixels = torch.randn(2, 3, 32, 32)
        return host, lambda adapted: adapted(pixel_values=pixels).logits
    ids = torch.tensor([[1, 5, 9, 7], [1, 4, 1, 3]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if both:
        inputs["decoder_input_ids"] = torch.tensor([[2, 8, 6, 3], [2, 1, 5, 4]])
    return host, lambda adapted: adapted(**inputs).logits[:, -4:]


class Weight(nn.Module):
    """A product with a bare parameter."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


LAYERS: Mapping[str, Callable[..., nn.Module]] = {
    each.__name__: each
    for each in (nn.Linear, nn.Embedding, nn.LayerNorm, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention, Conv1D,
                 Weight)
}  # fmt: skip


def described(module: nn.Module) -> list[Any] | None:
    """A layer by its class and arguments; None for what has no weights of a kind that `SideBySide` has."""
    match module:
        case Conv1D():
            return ["Conv1D", [module.nf, module.nx], {}]
        case nn.Linear():
            return ["Linear", [module.in_features, module.out_features], {"bias": module.bias is not None}]
        case nn.Embedding():
            return ["Embedding", [module.num_embeddings, module.embedding_dim], {}]
        case nn.LayerNorm():
            return ["LayerNorm", [list(module.normalized_shape)], {}]
        case nn.Conv1d() | nn.Conv2d() | nn.Conv3d():
            sizes = [module.in_channels, module.out_channels, list(module.kernel_size)]
            options = {"stride": list(module.stride), "padding": module.padding, "groups": module.groups}
            return [type(module).__name__, sizes, {**options, "bias": module.bias is not None}]
        case nn.MultiheadAttention():
            return ["MultiheadAttention", [module.embed_dim, module.num_heads], {}]
    if isinstance(module._parameters.get("weight"), nn.Parameter):
        return ["Weight", list(module._parameters["weight"].shape), {}]
    return None


def layers_of(host: nn.Module) -> dict[str, list[Any]] | None:
    """The layers of a host by name, where `SideBySide` can hold them."""
    found = {name: described(module) for name, module in host.named_children() if next(module.parameters(), None) is not
             None}  # fmt: skip
    return None if None in found.values() else {name: each for name, each in found.items() if each}


class SideBySide(nn.Module):
    """Layers that each get an input of their own; the output is all of theirs, one behind the other."""

    def __init__(self, layers: Mapping[str, list[Any]]) -> None:
        super().__init__()
        self.names = list(layers)
        for name, (kind, sizes, options) in layers.items():
            self.add_module(name, LAYERS[kind](*map(_sized, sizes), **{k: _sized(v) for k, v in options.items()}))

    def forward(self) -> Tensor:
        found = []
        for layer in map(self.get_submodule, self.names):
            x = _input_of(layer)
            y = layer(x, x, x)[0] if isinstance(_inner(layer), nn.MultiheadAttention) else layer(x)
            found.append(y.flatten())
        return torch.cat(found)


def _sized(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _inner(layer: nn.Module) -> nn.Module:
    """The layer inside of peft's."""
    while hasattr(layer, "base_layer"):
        layer = layer.base_layer
    return layer.original_module if hasattr(layer, "original_module") else layer


def _input_of(layer: nn.Module) -> Tensor:
    layer = _inner(layer)
    draw = torch.Generator().manual_seed(0)
    match layer:
        case nn.Embedding():
            return torch.randint(layer.num_embeddings, (2, 5), generator=draw)
        case nn.Conv1d() | nn.Conv2d() | nn.Conv3d():
            shape = (2, layer.in_channels, *(size + 1 for size in layer.kernel_size))
        case nn.LayerNorm():
            shape = (2, *layer.normalized_shape)
        case nn.MultiheadAttention():
            shape = (3, 2, layer.embed_dim)
        case Conv1D():
            shape = (3, layer.nx)
        case nn.Linear():
            shape = (3, layer.in_features)
        case _:
            shape = (3, len(layer.weight))
    return torch.randn(shape, generator=draw)


# --- the suites -------------------------------------------------------------------------------------------------------


class _Parameterized(types.ModuleType):
    """Stands for the package of that name, and keeps the lists of configurations that it is given."""

    class parameterized:
        @staticmethod
        def expand(cases: Iterable[Any], **_: Any) -> Callable[[Any], Any]:
            def keep(test: Any) -> Any:
                test.cases = list(cases)
                return test

            return keep


def suite_module(name: str) -> Any:
    """A module of the checkout's tests. Nothing is fetched: what they load as they are imported is replaced."""
    held = sys.modules.get("parameterized")
    sys.modules["parameterized"] = _Parameterized("parameterized")
    try:
        with mock.patch("datasets.load_dataset"):
            return importlib.import_module(f"tests.{name}")
    finally:
        del sys.modules["parameterized"]
        if held is not None:
            sys.modules["parameterized"] = held


def custom() -> Iterator[Case]:
    module = suite_module("test_custom_models")

    def build(model_id: str) -> Made:
        inputs = torch.arange(90).view(9, 10)
        return module.MockTransformerWrapper.from_pretrained(model_id).eval(), lambda adapted: adapted(inputs)

    for name, model_id, cls, kwargs in module.TEST_CASES:
        yield Case("custom", name, model_id, [(cls, kwargs)], lambda model_id=model_id: build(model_id))


def of_transformers(suite: str, module: Any, models: Iterable[str]) -> Iterator[Case]:
    for kind in dict.fromkeys(map(family, models)):
        for cls, kwargs in module.ALL_CONFIGS:
            yield Case(suite, kind, kind, [(cls, kwargs)], lambda kind=kind: transformers_model(kind))


def decoder() -> Iterator[Case]:
    module = suite_module("test_decoder_models")
    yield from of_transformers("decoder", module, [*module.PEFT_DECODER_MODELS_TO_TEST, *module.SMALL_GRID_MODELS])


def encoder_decoder() -> Iterator[Case]:
    module = suite_module("test_encoder_decoder_models")
    yield from of_transformers("encoder_decoder", module, module.PEFT_ENCODER_DECODER_MODELS_TO_TEST)


def vision() -> Iterator[Case]:
    for name, config in suite_module("test_vision_models").CONFIGS.items():
        options = {key: value for key, value in vars(config).items() if key in _changed(config)}
        yield Case("vision", name, "resnet", [(type(config), options)], lambda: transformers_model("resnet"))


def _changed(config: Any) -> set[str]:
    """The options that a configuration does not leave as they are."""
    needed = {"total_step": 1} if isinstance(config, peft.AdaLoraConfig) else {}
    needed |= {"r": 1, "oft_block_size": 0} if isinstance(config, peft.OFTConfig) else {}
    plain = type(config)(**needed).to_dict()
    return {key for key, value in config.to_dict().items() if value != plain.get(key)} | needed.keys()


def mixed() -> Iterator[Case]:
    module = suite_module("test_mixed")
    for test in vars(module.TestMixedAdapterTypes).values():
        for pair in getattr(test, "cases", ()):
            made = []
            for config, layer in zip(pair, ("lin0", "lin1"), strict=True):
                options = {key: value for key, value in config.to_dict().items() if key in _changed(config)}
                made.append((type(config), {"target_modules": [layer], **options}))
            name = " + ".join(type(config).__name__.removesuffix("Config") for config in pair)
            yield Case("mixed", name, "MLP", made, lambda host=module.SimpleNet: _simple(host))


def _simple(host: type[nn.Module]) -> Made:
    torch.manual_seed(0)
    inputs = torch.arange(90).reshape(9, 10)
    return host().eval(), lambda adapted: adapted(inputs)


SUITES = {each.__name__: each for each in (custom, decoder, encoder_decoder, vision, mixed)}


# --- one case ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def stirred(base: nn.Module, attempt: int) -> nn.Module:
    """The model as the suite makes it at first, then others: of some the output does not depend on what is adapted."""
    torch.manual_seed(attempt)
    for parameter in base.parameters() if attempt else ():
        parameter.add_(torch.randn_like(parameter) * 0.3)
    return base


def judged(case: Case, folder: Path) -> Verdict:
    """Makes a case with peft, opens it here, writes it, and opens that with peft."""
    for attempt in range(ATTEMPTS):
        verdict, moved = tried(case, folder / str(attempt), attempt)
        if DIFFERS in (verdict.read, verdict.written):  # more than rounding?
            precise, _ = tried(case, folder / "precise", attempt, torch.float64)
            verdict = verdict if precise.read == PEFT else precise
        if moved is None or moved >= MOVED:
            return verdict
    verdict.reason = f"the output moves by {moved:.1e} alone. {verdict.reason}"
    return verdict


def tried(case: Case, folder: Path, attempt: int, dtype: torch.dtype = torch.float32) -> tuple[Verdict, float | None]:
    """As `judged`, with how far the output has moved; None where peft does not take the configuration."""
    kinds = " + ".join(type_of(cls, kwargs) for cls, kwargs in case.configs)
    options = " + ".join(shown(kwargs) for _, kwargs in case.configs)
    verdict = Verdict(case.suite, case.name, kinds, f"{case.host}: {options}", PEFT)
    base, run = case.build()
    base = stirred(base, attempt).to(dtype)
    if "dtype" in vars(base):  # to which it casts what it is given
        base.dtype = dtype
    folders, alone = [], None
    try:
        for index, (cls, kwargs) in enumerate(case.configs):
            torch.manual_seed(index)
            theirs = peft.get_peft_model(deepcopy(base), cls(**deepcopy(kwargs))).eval()
            for _ in range(2**attempt):
                fill(parameter for parameter in theirs.parameters() if parameter.requires_grad)
            if not any(parameter.requires_grad for parameter in theirs.parameters()):
                raise ValueError("it adapts nothing of this model")
            theirs.save_pretrained(str(folder / f"theirs{index}"))
            folders.append(folder / f"theirs{index}")
            alone = theirs
        opened = together(base, folders) if len(folders) > 1 else peft_opens(base, folders[0])
        with torch.no_grad():
            plain, before, expected = run(base), run(alone), run(opened)
    except OFF as error:
        verdict.reason = first_line(error)
        return verdict, None
    moved = difference(expected, plain)
    return compared(case, verdict, folder, folders, base, run, (before, expected)), moved


def compared(
    case: Case,
    verdict: Verdict,
    folder: Path,
    folders: list[Path],
    base: nn.Module,
    run: Run,
    theirs: tuple[Tensor, Tensor],
) -> Verdict:
    """The verdict on folders of peft.

    Args:
        theirs: the output of peft's model before it was saved, and opened.
    """
    before, expected = theirs
    if len(folders) == 1 and difference(before, expected) > OUTPUTS:
        verdict.reason = f"peft's own file opens with a difference of {difference(before, expected):.1e}"
    try:
        ours = deepcopy(base)
        injections = [peftcore.load(ours, path, name=f"a{index}") for index, path in enumerate(folders)]
    except PeftcoreError as error:
        verdict.read, verdict.reason = REFUSED, reason_of(error, folder)
        return verdict
    with torch.no_grad():
        output = run(ours)
    verdict.error = difference(output, expected)
    verdict.read = READ if verdict.error <= OUTPUTS else DIFFERS
    if len(injections) > 1:
        return verdict
    (injection,) = injections
    verdict.ours = in_our_words(injection, case, base)
    try:
        injection.save(folder / "ours", format="peft")
        again = peft_opens(base, folder / "ours")
        with torch.no_grad():
            error = difference(run(again), output)
    except PeftcoreError as refusal:
        verdict.written, verdict.reason = REFUSED, reason_of(refusal, folder)
        return verdict
    except OFF as refusal:
        verdict.written, verdict.reason = DIFFERS, f"peft does not open what is written: {first_line(refusal)}"
        return verdict
    verdict.written = WRITTEN if error <= OUTPUTS else DIFFERS
    if verdict.written == DIFFERS:
        verdict.reason = f"written, it differs by {error:.1e}"
    return verdict


def peft_opens(base: nn.Module, path: Path) -> nn.Module:
    """A copy of a model with a folder of peft, opened by peft."""
    return peft.PeftModel.from_pretrained(deepcopy(base), str(path)).eval()


def together(base: nn.Module, folders: list[Path]) -> nn.Module:
    """A copy of a model with several folders of peft that act at once."""
    mix = peft.PeftMixedModel.from_pretrained(deepcopy(base), str(folders[0]), adapter_name="a0")
    for index, path in enumerate(folders[1:], 1):
        mix.load_adapter(str(path), adapter_name=f"a{index}")
    mix.set_adapter([f"a{index}" for index in range(len(folders))])
    return mix.eval()


def in_our_words(injection: Injection, case: Case, base: nn.Module) -> dict[str, Any]:
    """An adapter so that `applied` makes it again; empty where that takes more than one call."""
    layers = case.host if case.suite not in ("custom", "mixed") else layers_of(base)
    if injection.parts or layers is None:
        return {}
    options = injection.config.model_dump(mode="json", exclude_defaults=True)
    found = any(isinstance(graft.operator, peftcore.author.SequenceOperator) for graft in injection.grafts)
    sites = [] if found else _short([site.path for site in injection.main_selection if not site.slices], base)
    return {
        "host": layers,
        "method": injection.method.name,
        "options": {key: value for key, value in options.items() if key != "method"},
        "target": sites or None,
        "train": list(injection.trained_along),
    }


def _short(paths: list[str], base: nn.Module) -> list[str]:
    """Paths as a target: their last names, where no other module is called so."""
    leaves = {path.rpartition(".")[2] for path in paths}
    called = {path for path, _ in base.named_modules() if path.rpartition(".")[2] in leaves}
    return sorted(leaves) if called == set(paths) else [literally(path) for path in paths]


def applied(ours: Mapping[str, Any]) -> tuple[nn.Module, nn.Module, Run, Injection]:
    """The base, the adapted model, how both are run, and the adapter, from an adapter in our own words."""
    if isinstance(ours["host"], str):
        base, run = transformers_model(ours["host"])
    else:
        torch.manual_seed(0)
        base, run = SideBySide(ours["host"]).eval(), lambda adapted: adapted()
    model = deepcopy(base)
    target = {"target": ours["target"]} if ours["target"] else {}
    injection = peftcore.apply(model, ours["method"], **ours["options"], **target, train=ours["train"], seed=0)
    torch.manual_seed(1)
    model.eval()
    for _ in range(ATTEMPTS):
        fill(injection.parameters())
        if moved(base, model, run) >= MOVED:
            break
    return base, model, run, injection


@torch.no_grad()
def moved(base: nn.Module, model: nn.Module, run: Run) -> float:
    """How far the output of an adapted model is from that of the base."""
    return difference(run(model), run(base))


def type_of(cls: type, options: Mapping[str, Any]) -> str:
    """The name of peft's type that a configuration has; of one that peft refuses, that of its class."""
    try:
        return str(cls(**deepcopy(dict(options))).peft_type.value)
    except OFF:
        return cls.__name__.removesuffix("Config").upper()


def shown(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in options.items() if key not in ("task_type",))


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:200]


def reason_of(error: Exception, folder: Path) -> str:
    """The reason of a refusal, without the path of the file."""
    return re.sub(rf"{re.escape(str(folder))}/[^:]*: ", "", str(error).replace("\n", " "))[:400]


# --- the table --------------------------------------------------------------------------------------------------------


def summary(verdicts: Iterable[Verdict]) -> str:
    """How many of each suite and type are read, written, differ, are refused."""
    rows: dict[tuple[str, str], Counter[str]] = {}
    for each in verdicts:
        for key in ((each.suite, "all"), (each.suite, each.type)):
            rows.setdefault(key, Counter()).update([each.read, f"w {each.written}"])
    lines = [f"{'suite':16}{'type':28}{'read':>6}{'differ':>8}{'refused':>9}{'(peft)':>8}   {'written':>8}{'differ':>8}"
             f"{'refused':>9}"]  # fmt: skip
    for (suite, kind), count in rows.items():
        one = [count[key] for key in (READ, DIFFERS, REFUSED, PEFT)]
        two = [count[f"w {key}"] for key in (WRITTEN, DIFFERS, REFUSED)]
        lines.append(f"{suite:16}{kind:28}{one[0]:6}{one[1]:8}{one[2]:9}{one[3]:8}   {two[0]:8}{two[1]:8}{two[2]:9}")
    return "\n".join(lines)


def text_of(verdicts: Iterable[Verdict]) -> str:
    """The list that is kept, a row a line: how many cases have come to which verdict with which adapter. Names and
    options of peft's tests are not in it, and an adapter stands there in our words alone."""
    rows: Counter[str] = Counter()
    for each in verdicts:
        kept = {key: value for key, value in asdict(each).items() if key in KEPT and value}
        rows[json.dumps(kept, sort_keys=True)] += 1
    lines = (json.dumps({"count": count, **json.loads(row)}) for row, count in rows.items())
    return "[\n" + ",\n".join(lines) + "\n]\n"


KEPT = ("suite", "type", "read", "written", "reason", "ours")


def main() -> None:
    """Run the suites and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--suite", nargs="*", choices=SUITES, default=list(SUITES))
    parser.add_argument("--only", default="", help="an expression for type, model or options")
    parser.add_argument("--write", action="store_true", help=f"write {LIST.name}")
    arguments = parser.parse_args()
    sys.path.insert(0, str(arguments.checkout))
    warnings.simplefilter("ignore")
    verdicts = []
    for suite in arguments.suite:
        for case in SUITES[suite]():
            text = f"{case.name} {case.host} {[cls.__name__ for cls, _ in case.configs]} {case.configs}"
            if not re.search(arguments.only, text):
                continue
            with tempfile.TemporaryDirectory() as folder:
                verdict = judged(case, Path(folder))
            verdicts.append(verdict)
            print(f"{verdict.suite} | {verdict.name} | {verdict.type} | {verdict.options} | {verdict.read} | "
                  f"{verdict.written} | {verdict.reason}", flush=True)  # fmt: skip
    print(summary(verdicts))
    if arguments.write:
        LIST.write_text(text_of(verdicts), encoding="utf-8")


if __name__ == "__main__":
    main()
