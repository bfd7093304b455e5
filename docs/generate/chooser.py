"""Writes the marked sections of choose.md and moving-from-peft.md: ``python docs/generate/chooser.py``.

What the pages say of methods comes from tags, plans in reference hosts, and results that are written elsewhere in the
repository. Advice whose methods no longer have what it claims is an error, here and in the test.
"""

from __future__ import annotations

import functools
import json
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import transformers

import peftcore
from peftcore.authoring.budgets import reference
from peftcore.contract.method import Tags
from peftcore.contract.presets import Preset
from peftcore.errors import PeftcoreError
from peftcore.files.formats.peft_method import peft_methods
from peftcore.models.costs import costs
from peftcore.models.dry_run import RequestedMethod
from peftcore.models.example_inputs import Size
from peftcore.registry.catalogue import COMBINES, QUANTIZED, TRAINS
from peftcore.registry.plugins import imported
from peftcore.utils.numbers import size

ROOT = Path(__file__).parents[2]
HOSTS = ("Llama 2 7B", "BERT base", "ViT base", "ResNet-50", "SD 1.5 UNet")
LARGE = HOSTS[0]
FEW = 1_000_000
MARK = re.compile(r"(<!-- begin: ([\w ]+) -->\n).*?(<!-- end -->)", re.DOTALL)

Holds = Callable[[str, Tags], bool]


@functools.cache
def trained(name: str, host: str) -> int | None:
    """Values that a method trains in a reference host by default; None where it has no place, or wants options."""
    model = reference(host)
    assert model is not None, f"{host} needs its library"
    try:
        return peftcore.plan(model, name).trainable
    except PeftcoreError:
        return None


def has_a_place(host: str) -> Holds:
    return lambda name, tags: trained(name, host) is not None


CLAIMS: Mapping[str, Holds] = {
    "merge": lambda name, tags: tags.mergeable,
    "do not merge": lambda name, tags: not tags.mergeable,
    "per-sample adapters": lambda name, tags: tags.per_row,
    "low rank": lambda name, tags: tags.low_rank,
    "look at data": lambda name, tags: tags.needs_data,
    "start as the base model": lambda name, tags: tags.identity_at_init,
    "made for quantized models": lambda name, tags: tags.category == "quantized",
    "for several tasks": lambda name, tags: tags.category == "multitask",
    f"under {FEW:,} parameters in a {LARGE}": lambda name, tags: 0 < (trained(name, LARGE) or 0) < FEW,
    **{f"act in {host}": has_a_place(host) for host in HOSTS[2:]},
}
"""What advice may say of its methods, and how it is found out."""


@dataclass(frozen=True)
class Advice:
    """One row of the table that somebody in a hurry reads."""

    need: str
    methods: tuple[str, ...]
    claims: tuple[str, ...]
    why: str


ADVICE = (
    Advice(
        "nothing special, or do not know yet",
        ("lora",),
        ("merge", "per-sample adapters", "low rank", "start as the base model"),
        "suits nearly every task; other programs read its files",
    ),
    Advice(
        "updates of another form than LoRA's, and a step may cost more",
        ("dora", "hira", "randlora"),
        ("merge", "start as the base model"),
        "other or more directions with as many parameters; [no rule says that they are better](#dora-or-lora)",
    ),
    Advice(
        "hardly any memory for adapters, or thousands of them",
        ("ia3", "vera", "lora_xs"),
        (f"under {FEW:,} parameters in a {LARGE}", "merge"),
        "part of the matrices is random and frozen, or shared",
    ),
    Advice(
        "one model serves many users in one batch",
        ("lora", "vera", "lora_xs", "miss"),
        ("per-sample adapters", "low rank"),
        "two batched products for all low-rank adapters of a batch",
    ),
    Advice(
        "inference may cost nothing more",
        ("lora", "dora", "oft", "ia3", "bitfit", "ssf"),
        ("merge",),
        "a merged model computes nothing more",
    ),
    Advice(
        "a state-space model (Mamba)",
        ("lora", "state_offset_tuning"),
        ("per-sample adapters", "start as the base model"),
        "the second one trains what is added to the states, with fewer numbers; prompts do little there",
    ),
    Advice(
        "only the input may change",
        ("prompt_tuning", "p_tuning", "idpg", "smop"),
        ("do not merge",),
        "trained vectors in front of the tokens; each takes a position of the context; the last two read the text",
    ),
    Advice(
        "an adapter between modules, as the adapters package has them",
        ("pfeiffer_adapter", "houlsby_adapter", "parallel_adapter", "compacter"),
        ("do not merge", "per-sample adapters"),
        "a bottleneck beside or behind a block; `adapter_plus`, `llm_adapters_series` and others are options of these",
    ),
    Advice(
        "a base model in 4 or 8 bits",
        ("qlora", "loftq", "qpissa", "qa_lora"),
        ("made for quantized models", "merge"),
        "any method works there; these compensate for the rounding, or merge into the codes",
    ),
    Advice(
        "the trained weights to be selected by the data",
        ("fish_mask", "child_tuning_d", "spt_lora"),
        ("look at data", "merge"),
        "a mask from gradients; the last one has low-rank updates where many weights count; `apply(..., data=batches)`",
    ),
    Advice(
        "several tasks that are learned together",
        ("polytropon", "mtl_lora", "hyperformer_pp", "hydralora", "multitask_prompt_tuning"),
        ("for several tasks", "do not merge"),
        "parts are shared between tasks, and `peftcore.call(model, task=...)` or a router chooses",
    ),
    Advice(
        "tokens of many kinds, and room for several updates",
        ("molora_moe", "mola", "loramoe", "mixlora"),
        ("for several tasks", "do not merge"),
        "[mixtures](mixtures.md): a router gives each token shares of experts",
    ),
    Advice(
        "several adapters, to be combined into one",
        ("task_arithmetic", "ties_merging", "dare", "adapter_soup"),
        ("for several tasks", "merge"),
        "sums and averages of updates; `peftcore.combine` makes a LoRA of them",
    ),
    Advice(
        "pictures, with a ViT",
        ("lora", "ln_tuning", "adaptformer", "convpass", "vpt_deep"),
        ("act in ViT base",),
        "here they were compared on digits alone, where `convpass` learns most, and the model loses half of what it "
        "knew ([benchmarks](benchmarks.md#reading-other-digits))",
    ),
    Advice(
        "videos, with a ViT or CLIP of pictures",
        ("st_adapter", "aim"),
        ("act in ViT base", "do not merge"),
        "frames are rows of the batch; the first sees the next frames and the second all of a clip; `frames=` says how "
        "many those are",
    ),
    Advice(
        "pictures and names of classes, with a CLIP",
        ("coop", "clip_adapter", "tip_adapter", "maple", "cocoop"),
        ("do not merge",),
        "1 to 16 pictures a class; `tip_adapter` is good before it trains; the last two hold for other names too",
    ),
    Advice(
        "pictures, with a ConvNet",
        ("lora", "locon", "ssf"),
        ("act in ResNet-50", "merge"),
        "`dora`, `loha`, `lokr` and others adapt convolutions too",
    ),
    Advice(
        "a diffusion model that learns a style or a subject",
        ("lora", "locon", "loha", "oft"),
        ("act in SD 1.5 UNet", "merge", "start as the base model"),
        "files that other programs read",
    ),
    Advice(
        "one of many faces or subjects, in a file as small as a picture",
        ("lidb", "svdiff"),
        ("act in SD 1.5 UNet", "merge", "start as the base model"),
        "the first knows 150 numbers a matrix, between random bases that no file holds",
    ),
    Advice(
        "a text encoder that learns a word for it, and a model that stays as it is",
        ("textual_inversion", "xti"),
        ("merge",),
        "files of kilobytes; the second has a word for each cross-attention of a UNet",
    ),
    Advice(
        "a subject in a few kilobytes, which prompts go on changing",
        ("perfusion",),
        ("act in SD 1.5 UNet",),
        "looks at many captions and at some of the subject's class first; several subjects act at once",
    ),
    Advice(
        "several subjects in one picture",
        ("ed_lora", "custom_diffusion"),
        ("act in SD 1.5 UNet", "merge", "start as the base model"),
        "words with their own updates; ED-LoRAs are merged by `mix_of_show`",
    ),
    Advice(
        "a diffusion model that follows a picture",
        (
            "controlnet",
            "controlnet_lora",
            "controlnet_xs",
            "controlnext",
            "t2i_adapter",
            "scedit",
            "ip_adapter",
            "ominicontrol",
        ),
        ("do not merge",),
        "a second network, or with a DiT LoRA alone (the last); `peftcore.call(model, condition=...)`",
    ),
)


def tags_of(name: str) -> Tags:
    return peftcore.method(name).tags


def broken() -> list[str]:
    """Claims that do not hold."""
    return [
        f"{name} does not {claim}"
        for advice in ADVICE
        for name in advice.methods
        for claim in advice.claims
        if not CLAIMS[claim](name, tags_of(name))
    ]


def table(head: Iterable[str], rows: Iterable[Iterable[str]], right: int = 0) -> str:
    """Markdown; the last `right` columns hold numbers."""
    names = list(head)
    rule = ["---"] * (len(names) - right) + ["---:"] * right
    return "\n".join(f"| {' | '.join(each)} |" for each in (names, rule, *rows)) + "\n"


def named(methods: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in methods)


def advice() -> str:
    rows = [(each.need, named(each.methods), ", ".join(each.claims), each.why) for each in ADVICE]
    return table(("you have, or want", "try", "which all", "why"), rows)


def sizes() -> str:
    """What the methods of the advice train by default, the smallest first."""
    names = {name for each in ADVICE for name in each.methods}
    found = {name: [trained(name, host) for host in HOSTS] for name in names}
    ordered = sorted(found, key=lambda name: (next((n for n in found[name] if n is not None), 0), name))
    rows = [(f"`{name}`", *(f"{n:,}" if n else "" for n in found[name])) for name in ordered if any(found[name])]
    return table(("method", *HOSTS), rows, right=len(HOSTS))


def kinds() -> str:
    """Methods by what their tags say."""
    infos = peftcore.methods()
    tags = {info.name: info.tags for info in infos}
    groups = {
        "combines adapters that are trained already": [info.name for info in infos if info.kind == COMBINES],
        "is for quantized models": [info.name for info in infos if info.kind == QUANTIZED],
        "does not merge": [name for name, each in tags.items() if not each.mergeable],
        "no per-sample adapters": [name for name, each in tags.items() if not each.per_row],
        "looks at data before training": [name for name, each in tags.items() if each.needs_data],
        "changes with the steps: use `injection.optimizer`": [name for name, each in tags.items() if each.scheduled],
        "is low rank: per-sample adapters are fast, can be written as a LoRA": [
            name for name, each in tags.items() if each.low_rank
        ],
        "changes outputs before it is trained": [name for name, each in tags.items() if not each.identity_at_init],
    }
    rows = [(what, str(len(names)), named(names)) for what, names in groups.items()]
    trains = sum(info.kind == TRAINS for info in infos)
    rows.insert(0, ("trains parameters of its own", str(trains), "all but those of the next two rows"))
    return table((f"of {len(tags)} methods", "", "which"), rows)


def preset_text(preset: Preset) -> str:
    """The call of a preset, or its instructions, and what it leaves out of its paper."""
    return " ".join(filter(None, (preset.workflow or f"`{preset}`", preset.note and f"*{preset.note}*")))


def presets() -> str:
    rows = [
        (f"`{info.name}`", preset_text(info.preset), info.preset.paper)
        for info in peftcore.methods(presets=True)
        if info.preset is not None
    ]
    return table(("name", "is", "paper"), rows)


def memory() -> str:
    """One step of training a Llama 2 7B in bfloat16, one row of 512 tokens, with AdamW."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        transformers.LlamaConfig(architectures=["LlamaForCausalLM"]).save_pretrained(folder)
        for name in ("lora", "dora", "ia3", "houlsby_adapter"):
            found = costs(folder, RequestedMethod(name, {}), Size(1, 512), "bfloat16")
            rows.append((f"`{name}`", found.memory))
    parts = [(name, m.weights, m.adapter, m.gradients + m.optimizer, m.activations, m.total) for name, m in rows]
    full = found.full
    trained_state = full.gradients + full.optimizer
    parts.append(("full fine-tuning", full.weights, 0, trained_state, full.activations, full.total))
    head = ("", "weights", "adapter", "gradients, optimizer", "activations", "together")
    return table(head, [(name, *(size(n) if n else "" for n in numbers)) for name, *numbers in parts], right=5)


def steps() -> str:
    """From the benchmarks' own record."""
    rows = json.loads((ROOT / "benchmarks/results-1.json").read_text(encoding="utf-8"))["rows"]
    found: dict[str, dict[str, str]] = {}
    for row in rows:
        if match := re.fullmatch(r"step, (\w+): (time|peak memory).*", row["figure"]):
            found.setdefault(match[1], {})[match[2]] = row["ours"]
    lines = [(f"`{name}`", each["time"], each["peak memory"]) for name, each in found.items()]
    return table(("method", "time of a step", "peak memory"), sorted(lines, key=lambda line: line[1]), right=2)


def of_page(page: str, row: str) -> list[list[str]]:
    """The cells of a page's table rows that match."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in re.findall(row, text, re.MULTILINE)]


def digits() -> str:
    """From the example of digits that lie on their side."""
    rows = of_page("examples/digits-classifiers/README.md", r"^\| (?:ViT|ConvNet) \|.*")
    chosen = [(host, method, accuracy, values) for host, method, accuracy, values, _ in rows]
    chosen.sort(key=lambda row: (row[0] != "ViT", int(row[3].replace(",", ""))))
    return table(("model", "method", "accuracy", "trainable"), chosen, right=2)


def demo() -> str:
    """What ``make demo`` found, as recorded: MiniLM on tweets, one seed."""
    found = json.loads((ROOT / "docs/generate/demo.json").read_text(encoding="utf-8"))
    rows = sorted(found["rows"], key=lambda row: int(row["trainable"]))
    lines = [(f"`{row['method']}`", f"{row['trainable']:,}", f"{row['accuracy']:.3f}") for row in rows]
    return table(("method", "trainable", "accuracy"), lines, right=2)


def types_of_peft() -> str:
    rows = [(f"`{kind}`", named(imported(place).methods)) for kind, place in sorted(peft_methods().items())]
    return table(("peft's type", "method"), rows)


def cases_of_peft() -> str:
    """What became of the configurations of peft's own tests: how many of each type, and why some are refused."""
    cases = [each for each in json.loads(CASES.read_text(encoding="utf-8")) if each["read"] != "peft refuses"]
    rows = []
    for kind in sorted({each["type"] for each in cases if each["suite"] != "mixed"}):
        of = [each for each in cases if each["type"] == kind]
        refused = sorted({_reason(each) for each in of if "refused" in (each["read"], each.get("written"))})
        counts = [f"{sum(each['count'] for each in of if test(each))}" for test in COUNTED]
        rows.append((f"`{kind}`", *counts, "; ".join(refused)))
    return table(("peft's type", "configurations", "read", "written", "why others are refused"), rows)


CASES = ROOT / "tests/side_by_side/peft_cases.json"
COUNTED: tuple[Callable[[Mapping[str, str]], bool], ...] = (
    lambda each: True,
    lambda each: each["read"] == "read",
    lambda each: each.get("written") == "written",
)


def _reason(case: Mapping[str, str]) -> str:
    """Why a configuration is refused, without the module that it is about, for a cell of a table."""
    if "no installed plugin" in case["reason"]:
        return "peftcore has no such method"
    if option := re.search(r"may matter: (\w+)|with init_lora_weights = '(\w+)'", case["reason"]):
        return f"`{option[1] or option[2]}`"
    return re.sub(r"^.*?(?=peft computes|in an encoder)", "", case["reason"]).replace("|", "/")


SECTIONS: Mapping[str, Callable[[], str]] = {
    "advice": advice,
    "sizes": sizes,
    "kinds": kinds,
    "presets": presets,
    "memory": memory,
    "steps": steps,
    "digits": digits,
    "demo": demo,
    "types of peft": types_of_peft,
    "cases of peft": cases_of_peft,
}
PAGES = ("docs/choose.md", "docs/moving-from-peft.md")


def filled(page: str, only: Iterable[str] = SECTIONS) -> str:
    """A page with its sections written anew."""
    wanted = set(only)

    def section(match: re.Match[str]) -> str:
        return f"{match[1]}\n{SECTIONS[match[2]]()}\n{match[3]}" if match[2] in wanted else match[0]

    return MARK.sub(section, page)


def main() -> None:
    """Write the pages."""
    if wrong := broken():
        raise SystemExit("\n".join(wrong))
    for name in PAGES:
        path = ROOT / name
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
