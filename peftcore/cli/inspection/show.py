"""The work of ``peftcore show``: the complete description of a method, and its numbers of trainable parameters in
well-known models."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import Any

from pydantic.fields import FieldInfo
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

import peftcore
from peftcore.cli.pages import columns, spelled
from peftcore.contract.method import Method
from peftcore.registry.catalogue import MethodInfo
from peftcore.registry.method_text import sections, text_of
from peftcore.utils.quiet import quiet

INDENT = 4
ARXIV = re.compile(r"\d{4}\.\d{4,5}")
TAGS = {
    "mergeable": "merges into the weights of the model",
    "identity_at_init": "changes nothing until it has trained",
    "per_row": "per-sample adapters: each sample of a batch can have its own",
    "routes": "a mixture: it gives shares of experts, and reports them",
    "low_rank": "its update is two factors: it can be turned into LoRA",
    "needs_data": "looks at data before it trains",
    "scheduled": "changes while it trains, by the number of steps",
    "random": "draws random numbers while it trains",
    "whole_graph": "torch.compile makes one graph of the model",
    "reentrant": "trains under reentrant checkpoints",
    "exact_gradient": "its gradients are those of what it computes",
}
"""The meaning of each tag, in the order in which tags are shown."""
RULES = {
    "exclusiveMinimum": "> {}",
    "minimum": "≥ {}",
    "exclusiveMaximum": "< {}",
    "maximum": "≤ {}",
    "multipleOf": "multiple of {}",
    "minItems": "at least {} of them",
    "maxItems": "at most {} of them",
    "minLength": "at least {} characters",
    "maxLength": "at most {} characters",
    "pattern": "matches {}",
}
"""Rules of JSON schema, in words."""


@dataclass(frozen=True)
class Option:
    """One option of a method, from its JSON schema."""

    name: str
    type: str
    required: bool
    default: Any
    rule: str
    description: str

    @classmethod
    def of(cls, name: str, field: FieldInfo, schema: Mapping[str, Any]) -> Option:
        default = None if field.is_required() else field.get_default(call_default_factory=True)
        description = " ".join(schema.get("description", "").replace("``", "").split())
        return cls(name, type_of(schema), field.is_required(), default, rule_of(schema), description)

    @property
    def default_text(self) -> str:
        return "required" if self.required else spelled(self.default)


@dataclass(frozen=True)
class MethodDescription:
    """The description of a method, made from its class."""

    info: MethodInfo
    cls: type[Method]

    @classmethod
    def of(cls, name: str) -> MethodDescription:
        """Return the description of the method with this name.

        Raises:
            UnknownMethod, AmbiguousMethod, PluginError: the method does not exist, or the name is ambiguous.
        """
        found = peftcore.method(name)
        named = [info for info in peftcore.methods(presets=True) if info.name == found.name]
        info = next(info for info in named if peftcore.method(f"{info.plugin}/{info.name}") is found)
        return cls(info, found)

    @property
    def text(self) -> str:
        """Return the docstring of the method's module."""
        return text_of(self.cls)

    @property
    def sections(self) -> dict[str, str]:
        """Return the text below each heading of the docstring, keyed by heading. The part before the first heading has
        the key ``""``."""
        return sections(self.text)

    @property
    def link(self) -> str:
        """Return the link to the method's paper; if the paper is not on arXiv, its reference."""
        paper = self.cls.tags.paper
        return f"https://arxiv.org/abs/{paper}" if ARXIV.fullmatch(paper) else paper

    @property
    def options(self) -> list[Option]:
        schemas = self.cls.Config.model_json_schema()["properties"]
        fields = self.cls.Config.model_fields
        names = sorted((name for name in fields if name != "method"), key=lambda name: name == "overrides")
        *options, overrides = [Option.of(name, fields[name], schemas[name]) for name in names]
        return [*options, replace(overrides, rule=self._overridable)]

    @property
    def _overridable(self) -> str:
        """Return the rule of the option `overrides`: the options that it may change; empty if it may change all."""
        names = self.cls.Config.overridable
        return "" if names is None else f"of {', '.join(names)} alone" if names else "takes none"

    @cached_property
    def budgets(self) -> Mapping[str, int]:
        """Return the number of trainable parameters, with default options, on each reference model."""
        if self.info.preset is not None and self.info.preset.workflow:
            return {}
        with quiet():
            return self.info.budgets

    @property
    def targets(self) -> list[str]:
        target = self.cls.target
        return [target] if isinstance(target, str) else list(target)

    @property
    def alternatives(self) -> list[list[str]]:
        """Return the default targets for models that have none of the roles in `targets`. They are tried in this
        order."""
        return [[each] if isinstance(each, str) else list(each) for each in self.cls.alternatives]

    def as_dict(self) -> dict[str, Any]:
        tags = self.cls.tags
        return {
            "name": self.info.name,
            "aliases": list(self.info.aliases),
            "plugin": self.info.plugin,
            "distribution": self.info.distribution,
            "category": tags.category,
            "paper": tags.paper,
            "link": self.link,
            "text": self.text,
            "sections": self.sections,
            "options": [vars(option) for option in self.options],
            "tags": {name: vars(tags)[name] for name in TAGS},
            "identity_options": None if tags.identity_options is None else dict(tags.identity_options),
            "targets": self.targets,
            "alternatives": self.alternatives,
            "parameters": dict(self.budgets),
            "learning_rate": None if self.cls.learning_rate is None else vars(self.cls.learning_rate),
            "checked": self.info.checked,
            "checked_against": self.info.checked_against,
            "compared": {source: list(parts) for source, parts in self.info.compared.items()},
            "preset": None if self.info.preset is None else str(self.info.preset),
            "note": "" if self.info.preset is None else self.info.preset.note,
        }

    def page(self) -> RenderableType:
        """Return the description as a page."""
        tags = self.cls.tags
        return Group(
            Text.assemble((self.info.name, "bold"), f"  {tags.category}, {self.info.distribution}"),
            Text(self.link, f"link {self.link}" if self.link.startswith("https:") else ""),
            *(Text(line) for line in preset_lines(self.info)),
            "",
            *(line for heading, text in self.sections.items() for line in section(heading, text)),
            options_table(self.options),
            "",
            self.facts(),
            "",
            budgets_table(self.budgets),
        )

    def facts(self) -> Table:
        """Return a table of tags and other facts, one line each."""
        tags = self.cls.tags
        table = columns("", "", header=False)
        table.add_row("acts at", ", ".join(self.targets) or "what its options say")
        if self.alternatives:
            table.add_row("else at", "; or ".join(map(", ".join, self.alternatives)))
        if self.info.aliases:
            table.add_row("also called", ", ".join(self.info.aliases))
        for name, meaning in TAGS.items():
            table.add_row(meaning, yes_or_no(vars(tags)[name]))
        for meaning, words in self.remarks():
            table.add_row(meaning, words)
        return table

    def remarks(self) -> Iterator[tuple[str, str]]:
        """Yield the label and the text of each property that is not a boolean."""
        tags = self.cls.tags
        if tags.identity_options:
            options = " ".join(f"{name}={spelled(value)}" for name, value in tags.identity_options.items())
            yield "changes nothing at first with", options
        yield "learning rate", str(self.cls.learning_rate or "none was found in its paper or its authors' code")
        yield "checked against", ", ".join(self.sources()) or "no other code: equation only"

    def sources(self) -> Iterator[str]:
        """Yield the implementations with which tests compare the method. Each is followed by the compared parts, unless
        only outputs are compared."""
        for source, parts in self.info.compared.items():
            yield source if parts == ("outputs",) else f"{source} ({', '.join(parts)})"


def section(heading: str, text: str) -> Iterator[RenderableType]:
    """Yield a section of the description: its title, then its paragraphs."""
    if heading:
        yield Text(heading, "bold")
    yield from paragraphs(text)


def paragraphs(text: str) -> Iterator[RenderableType]:
    """Yield the paragraphs of a text, each as one line that the console wraps. Indented lines, such as equations, stay
    separate lines."""
    for paragraph in text.split("\n\n"):
        for indented, lines in groupby(paragraph.splitlines(), lambda line: line.startswith(" ")):
            if indented:
                yield from (Padding(Text(line.strip()), (0, 0, 0, INDENT)) for line in lines)
            else:
                yield Text(" ".join(lines))
        yield ""


def preset_lines(info: MethodInfo) -> list[str]:
    """Return lines that describe a preset: the method and options that it means, and the parts of its paper that are
    missing; empty for a method."""
    if info.preset is None:
        return []
    return [f"a preset: {info.preset}", *([info.preset.note] if info.preset.note else [])]


def yes_or_no(value: bool) -> Text:
    return Text("yes", "green") if value else Text("no", "dim")


def options_table(options: list[Option]) -> Table:
    table = columns("option", "type", "default", "rule", "")
    for each in options:
        name = Text(each.name, "bold")
        table.add_row(name, Text(each.type), Text(each.default_text), Text(each.rule), Text(each.description))
    return table


def budgets_table(budgets: Mapping[str, int]) -> RenderableType:
    """Return a table of the numbers of trainable parameters, with default options, on the reference models."""
    if not budgets:
        return "What it trains depends on its options, or it has no target module in the models that are planned here."
    table = columns("trained by default in", "parameters", right=frozenset({"parameters"}))
    for host, count in budgets.items():
        table.add_row(host, f"{count:,}")
    return table


def type_of(schema: Mapping[str, Any]) -> str:
    """Return the Python name for a type in a JSON schema."""
    if "anyOf" in schema:
        return " | ".join(dict.fromkeys(type_of(each) for each in schema["anyOf"]))
    if "enum" in schema:
        return " | ".join(map(spelled, schema["enum"]))
    if "const" in schema:
        return spelled(schema["const"])
    if "$ref" in schema:
        return str(schema["$ref"].rpartition("/")[2])
    if schema.get("type") == "array":
        inner = [schema["items"]] if "items" in schema else schema.get("prefixItems", ())
        return f"list[{' | '.join(dict.fromkeys(map(type_of, inner))) or 'any'}]"
    return NAMED.get(schema.get("type", ""), "any")


NAMED = {
    "integer": "int",
    "number": "float",
    "string": "str",
    "boolean": "bool",
    "null": "none",
    "object": "dict",
}
"""Python's names for types of JSON schema."""


def rule_of(schema: Mapping[str, Any]) -> str:
    """Return the rules for a value as short text. If the schema has alternatives, the rules of each are listed."""
    own = [text.format(schema[rule]) for rule, text in RULES.items() if rule in schema]
    inner = [rule_of(each) for each in (*schema.get("anyOf", ()), schema.get("items")) if isinstance(each, Mapping)]
    return ", ".join(dict.fromkeys(filter(None, (*own, *inner))))
