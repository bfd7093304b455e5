"""Compares the default options of a method with those of reference code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftcore.contract.config import MethodConfig
from peftcore.testing.failures import CheckFailed


def same_defaults(config: MethodConfig, told: Mapping[str, Any], otherwise: Mapping[str, str] | None = None) -> None:
    """Verify that the default options of a method equal those of reference code.

    Args:
        config: ``injection.config`` of an injection or a plan that was made without passing these options.
        told: the defaults of the reference code, by the names of the options in peftcore.
        otherwise: the options whose defaults differ on purpose, by name, each with the reason.

    Raises:
        CheckFailed: an option is unknown, or a value was passed for it. Or its default differs although it is not in
            `otherwise`, or equals the other default although it is in `otherwise`.
    """
    otherwise = {} if otherwise is None else otherwise
    ours = config.model_dump(mode="json")
    if unknown := sorted({*told, *otherwise} - ours.keys() | otherwise.keys() - told.keys()):
        raise CheckFailed(
            f"{', '.join(unknown)}: not in {type(config).__name__}, or without a default of the other code in `told`"
        )
    if given := sorted(told.keys() & config.model_fields_set):
        raise CheckFailed(
            f"{', '.join(given)}: was given a value, so it is not the default; apply the method without it"
        )
    for option, value in told.items():
        if (ours[option] == value) is (option in otherwise):
            remedy = (
                "remove it from `otherwise`" if option in otherwise else "change it, or add the reason to `otherwise`"
            )
            raise CheckFailed(f"{option} is {ours[option]!r} by default here, {value!r} in their code: {remedy}")
