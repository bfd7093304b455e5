"""Lets commands accept options of methods as flags, ``--rank 8``, in addition to their own flags."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import typer
from typer.core import TyperCommand

from peftcore.errors import BadInput

GIVEN = "peftcore.options"
PLACES = ("target", "exclude", "train")
"""Arguments of `peftcore.apply` that are the same for all methods."""


class WithMethodOptions(TyperCommand):
    """A command that accepts each option of a method as a flag; `for_methods` parses these flags."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the command's own flags, and store all other flags with their values."""
        own = {name: each for each in self.get_params(ctx) for name in (*each.opts, *each.secondary_opts)}
        rest, found, left = [], [], [*args]
        while left:
            word = left.pop(0)
            name, equals, value = word.partition("=")
            if not name.startswith("--") or name == "--" or name in own:
                rest.append(word)
                if name == "--":
                    rest, left = [*rest, *left], []
                elif name in own and not equals and left and not getattr(own[name], "is_flag", False):
                    rest.append(left.pop(0))
                continue
            if not equals:
                value = left.pop(0) if left and not left[0].startswith("--") else "true"
            found.append((name[2:].replace("-", "_"), value))
        ctx.meta[GIVEN] = found, [name[2:] for name in own if name.startswith("--")]
        return super().parse_args(ctx, rest)


def for_methods(
    context: typer.Context, methods: Sequence[Mapping[str, Any]], bare: Collection[str] = ()
) -> list[dict[str, Any]]:
    """Return the passed flags that are options of each method, with values parsed as YAML. The values of a flag that is
    passed several times become a list. If only some of the methods have an option, a message names the others, which
    are used without it.

    Args:
        context: the click context of the command.
        methods: mappings with the key "name", as in files.
        bare: names in `methods` that are not methods and have no options, such as the name for full fine-tuning.

    Raises:
        BadInput: a flag belongs neither to the command nor to any of the methods.
        ConfigError: the same for a single method. If the flag is another library's name for an option, the message may
            suggest peftcore's name.
    """
    from peftcore.utils.yaml_values import parse

    given, own = context.meta.get(GIVEN, ((), ()))
    values: dict[str, list[Any]] = {}
    for name, text in given:
        values.setdefault(name, []).append(parse(text, f"--{name}"))
    options: Mapping[str, Any] = {name: each[0] if len(each) == 1 else each for name, each in values.items()}
    names = [str(each.get("name", "")) for each in methods]
    having = [_options_of(name) if options and name not in bare else set() for name in names]
    for name, value in options.items():
        lacking = [method for method, each in zip(names, having, strict=True) if name not in each]
        if len(lacking) == len(names):
            _refuse(name, value, [each for each in names if each not in bare], own)
        if lacking:
            print(f"--{name.replace('_', '-')}: no option of {', '.join(lacking)}", file=sys.stderr)
    return [{name: value for name, value in options.items() if name in each} for each in having]


def _options_of(method: str) -> set[str]:
    """Return the names of a method's options, and of the arguments that all methods have."""
    import peftcore

    return set() if not method else {*peftcore.method(method).Config.model_fields, *PLACES} - {"method"}


def _refuse(name: str, value: Any, methods: Sequence[str], own: Sequence[str]) -> None:
    import peftcore
    from peftcore.registry.preset_methods import method_of

    flag = name.replace("_", "-")
    if close := difflib.get_close_matches(flag, own, n=1, cutoff=0.75):
        raise BadInput(f"there is no option --{flag}; did you mean --{close[0]}?")
    known = [method for method in methods if _options_of(method)]
    if len(known) == 1:
        method_of(peftcore.method(known[0]), {name: value})
    raise BadInput(f"there is no option --{flag}, neither of the command nor of {', '.join(known) or 'a --method'}")
