"""Parses values as users write them in YAML: on a command line, or in a file."""

from __future__ import annotations

import re
from typing import Any

import yaml

from peftcore.errors import BadInput


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """A YAML loader that reads ``1e-3`` as a number: YAML 1.1 reads it as text."""


POWERS = re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", POWERS, list("-+0123456789"))


def parse(text: str, where: object) -> Any:
    """Parse a text as YAML that contains only plain values. `where` names the text in error messages.

    Raises:
        BadInput: the text is not valid YAML.
    """
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise BadInput(f"{where}: not YAML: {' '.join(str(error).split())}") from None
