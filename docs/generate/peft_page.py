"""Writes docs/peft-names.md: every public name of peft, every method of its model, every option of its configurations,
with what to write here: ``python docs/generate/peft_page.py``. It needs peft."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import peft

import peftcore
from peftcore.registry.peft_names import peft_advice

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/peft-names.md"
LOAD = "`peftcore.load(model, folder)`; with the model, `peftcore.load_base(folder)`"
ITSELF = "the model itself, which keeps its class: `peftcore.apply(model, ...)` wraps nothing"
PARAMETERS = "`injection.state_dict()`, `injection.parameters()`"
NAMES: Mapping[str, str] = {
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING": "nothing: no class depends on the task",
    "PEFT_TYPE_TO_CONFIG_MAPPING": "`peftcore.method(name).Config`",
    "PEFT_TYPE_TO_MIXED_MODEL_MAPPING": "nothing: all methods mix",
    "PEFT_TYPE_TO_TUNER_MAPPING": "`peftcore.methods()`, `peftcore.method(name)`",
    "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING": "nothing: attention is edited in any model",
    "CPTEmbedding": "the operators of `cpt`: `injection.operators`",
    "CartridgeEncoder": "the operators of `cartridge`: `injection.operators`",
    "MultitaskPromptTuningInit": "the option `init` of `multitask_prompt_tuning`",
    "NoMatchingPeftModuleError": "`peftcore.errors.TargetError`",
    "PeftError": "`peftcore.errors.PeftcoreError`",
    "PeftWarning": "`UserWarning`, and the logger `peftcore`",
    "PeftType": "names of methods: `peftcore.methods()`",
    "TaskType": "nothing: any model is adapted as it is",
    "PrefixEncoder": "the option `projection` of `prefix_tuning`",
    "PromptEmbedding": "`prompt_tuning`",
    "PromptEncoder": "`p_tuning`",
    "PromptEncoderReparameterizationType": "the option `encoder` of `p_tuning`",
    "PromptTuningInit": "the option `init` of `prompt_tuning`",
    "bloom_model_postprocess_past_key_value": "nothing: attention is edited in any model",
    "cast_mixed_precision_params": "`apply(..., dtype=...)`: the base keeps its own",
    "compose_cartridge_adapters": '`peftcore.activate(model, "first", "second")`: both caches are seen',
    "convert_to_lora": "`peftcore.to_lora(injection, rank=...)`",
    "save_as_lora": '`peftcore.to_lora(injection, rank=...).save(folder, format="peft")`',
    "create_arrow_model": '`peftcore.gather(model, "arrow", {folder: 1.0, ...})`',
    "XLoraConfig": '`peftcore.gather(model, "xlora", {folder: 1.0, ...}, train_parts=False)`; files: `peftcore.load`',
    "find_kappa_target_modules": "not there",
    "get_base_model_state_dict": "`with peftcore.saving_base(model): model.state_dict()`",
    "set_base_model_state_dict": "`model.load_state_dict(...)`: adapted models take the base's",
    "get_layer_status": "`print(injection.summary())`, `peftcore.injections(model)`",
    "get_model_status": "`print(injection.summary())`, `peftcore.injections(model)`",
    "get_peft_config": "`peftcore.method(name).Config(...)`",
    "get_peft_model": "`peftcore.apply(model, name_or_config, ...)`",
    "get_peft_model_state_dict": "`injection.state_dict()`",
    "set_peft_model_state_dict": "`injection.load_state_dict(...)`, or `injection.swap(source)`",
    "load_peft_weights": "`peftcore.load(model, folder)`, or `injection.swap(folder)`",
    "inject_adapter_in_model": "`peftcore.apply(model, ...)`, which wraps nothing either",
    "initialize_kv_prefix_from_past_key_values": '`peftcore.apply(model, "cartridge", length=..., data=[text])`',
    "initialize_kv_prefix_from_text": '`peftcore.apply(model, "cartridge", length=..., data=[text])`',
    "prompt_embeddings_from_past_key_values": '`peftcore.apply(model, "cartridge", length=..., data=[text])`',
    "initialize_lora_eva_weights": '`peftcore.apply(model, "eva", data=batches)`',
    "get_eva_state_dict": '`peftcore.apply(model, "eva", data=batches).state_dict()`',
    "preprocess_loraga": '`peftcore.apply(model, "lora_ga", data=batches)`',
    "replace_lora_weights_loftq": '`peftcore.apply(model, "loftq")`',
    "prepare_model_for_kbit_training": "nothing: quantized models are adapted as they are",
    "shift_tokens_right": "`transformers`' own",
    "PeftModel": f"{ITSELF}; an adapter is an `Injection`",
    "PeftMixedModel": f"{ITSELF}; all methods mix",
    "LoraRuntimeConfig": "nothing",
    "PromptLearningConfig": "`MethodConfig`",
    "PeftConfig": "`MethodConfig`; a configuration of peft can be applied as it is",
}
"""Names of `peft.__all__` that are no configuration, and no class of models."""
METHODS: Mapping[str, str] = {
    "active_adapter": "`peftcore.injections(model)`: `injection.active`",
    "active_adapters": "`peftcore.injections(model)`: `injection.active`",
    "active_peft_config": "`injection.config`",
    "add_adapter": "`peftcore.apply(model, ..., name=...)`",
    "add_weighted_adapter": "`peftcore.combine(model, {...}, how=...)`",
    "base_model_torch_dtype": "`model.dtype`",
    "create_or_update_model_card": "`injection.save` writes it",
    "delete_adapter": "`injection.remove()`",
    "disable_adapter": "`with injection.disabled():`, or `with peftcore.activate(model):`",
    "disable_adapter_layers": "`peftcore.activate(model)`",
    "enable_adapter_layers": "`peftcore.activate(model, name)`",
    "forward": "`model(...)`",
    "from_pretrained": LOAD,
    "generate": "`model.generate(...)`; `adapter_names=` is `peftcore.route(model, [...])`",
    "get_base_model": "the model itself; without adapters `with peftcore.activate(model):`",
    "get_layer_status": "`print(injection.summary())`",
    "get_model_config": "`model.config`",
    "get_model_status": "`print(injection.summary())`",
    "get_nb_trainable_parameters": "`sum(p.numel() for p in injection.parameters())`, or `peftcore.plan(...)` before",
    "get_prompt": PARAMETERS,
    "get_prompt_embedding_to_save": PARAMETERS,
    "has_active_enabled_adapter": "`any(each.active for each in peftcore.injections(model).values())`",
    "inject_adapter": "`peftcore.apply(model, ...)`",
    "load_adapter": "`peftcore.load(model, folder, name=...)`",
    "merge_adapter": "`injection.merge()`",
    "merge_and_unload": "`injection.bake()`",
    "modules_to_save": "`apply(..., train=[...])`",
    "peft_config": "`injection.config`",
    "prefix": "nothing: parameters are under `adapters.NAME`",
    "prepare_model_for_gradient_checkpointing": "nothing: `model.gradient_checkpointing_enable()`",
    "print_trainable_parameters": "`print(injection.summary())`",
    "save_pretrained": '`injection.save(folder)`, `injection.save(folder, format="peft")`',
    "set_adapter": "`peftcore.activate(model, name)`",
    "set_modules_to_save": "`apply(..., train=[...])`",
    "set_requires_grad": "`injection.trainable(True)`",
    "subtract_mutated_init": "nothing: PiSSA and OLoRA leave the base as it is",
    "supports_lora_conversion": "`peftcore.to_lora` says what it cannot do",
    "target_module_mapping": "[roles](roles.md), in any architecture",
    "tuner_layer_cls": "nothing: layers keep their classes",
    "unload": "`injection.remove()`",
    "unmerge_adapter": "`injection.unmerge()`",
    "uses_shared_state": "nothing to ask: files have what methods share",
}
"""Methods and attributes of `PeftModel`, `PeftMixedModel` and of a tuner, that torch's modules have not."""
COMMON = {each.name for each in dataclasses.fields(peft.PeftConfig)}
"""Options that say nothing of a method."""


def method_of_types() -> dict[str, str]:
    """The method of each of peft's types whose files are read, from the page for those who move."""
    page = (ROOT / "docs/moving-from-peft.md").read_text(encoding="utf-8")
    return dict(re.findall(r"\| `([A-Z_0-9]+)` \| `(\w+)`", page))


def kinds() -> Iterator[tuple[str, type[peft.PeftConfig], str | None]]:
    """Each of peft's types with its configuration, and our method."""
    known = method_of_types()
    for kind, config in sorted(peft.PEFT_TYPE_TO_CONFIG_MAPPING.items(), key=lambda each: each[1].__name__):
        yield kind.value, config, known.get(kind.value)


def answer(name: str) -> str | None:
    """What to write for one name of `peft.__all__`; None where nobody knows."""
    if name in NAMES:
        return NAMES[name]
    methods = {config.__name__: method for _, config, method in kinds()}
    if name in methods:
        method = methods[name]
        return f'`peftcore.apply(model, {name}(...))`, or `"{method}"`' if method else "not there yet"
    if name in LORA_OPTIONS:
        option = LORA_OPTIONS[name]
        known = {info.name for presets in (False, True) for info in peftcore.methods(presets=presets)}
        return f'`"{option}"`' if option in known else "not there yet"
    if name.startswith(("AutoPeftModelFor", "PeftModelFor")):
        return LOAD if name.startswith("Auto") else ITSELF
    return ITSELF if name.endswith("Model") else None


LORA_OPTIONS: Mapping[str, str] = {
    "ArrowConfig": "arrow",
    "BdLoraConfig": "bd_lora",
    "CordaConfig": "corda",
    "EvaConfig": "eva",
    "KasaConfig": "kasa",
    "LoftQConfig": "loftq",
    "LoraGAConfig": "lora_ga",
    "MontecloraConfig": "monteclora",
    "VeloraConfig": "velora",
}
"""Configurations that are options of LoraConfig, and the method that they are here."""


def table(head: tuple[str, str], rows: Mapping[str, str]) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|", *(f"| `{name}` | {text} |" for name, text in rows.items())]
    return "\n".join(lines)


def options(config: type[peft.PeftConfig], method: str) -> dict[str, str]:
    """What to write for each option of a configuration."""
    ours = peftcore.method(method).Config.model_fields
    found = {}
    for each in dataclasses.fields(config):
        if each.name not in COMMON:
            instead = peft_advice(method, each.name, ours)
            found[each.name] = "the same" if each.name in ours else _code(instead) if instead else "not there yet"
    return found


def _code(text: str) -> str:
    """Put what is to be written between marks of code."""
    verb, _, rest = text.partition(" ")
    return f"`{rest}`" if verb == "use" and " " not in rest else text


def page() -> str:
    """The whole page."""
    parts = [
        "# Every name of peft",
        "What stands in peft's public API, and what to write here; [from peft in five minutes](moving-from-peft.md) "
        f"has the order of need. Made from peft {peft.__version__} by `python docs/generate/peft_page.py`.",
        "## Classes and functions",
        table(("peft", "peftcore"), {name: answer(name) or "?" for name in sorted(peft.__all__)}),
        "## Methods of its models",
        table(("`PeftModel`, `PeftMixedModel` and tuners", "peftcore"), METHODS),
        "## Options",
        "A configuration can be applied as it is: `peftcore.apply(model, LoraConfig(...))`. By name, options are "
        "called otherwise; whoever writes peft's is told.",
    ]
    for kind, config, method in kinds():
        if method:
            parts += [f"### {config.__name__}", f"`{kind}` is `{method}`."]
            parts.append(table(("option", "peftcore"), options(config, method)))
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
