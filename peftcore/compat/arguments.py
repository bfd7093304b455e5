"""Arguments of peft's functions for which peftcore supports only one behaviour. Callers such as TRL may pass the value
for this behaviour. Any other value raises an error."""

from __future__ import annotations

from typing import Any

from peftcore.errors import ConfigError

SO_ANYWAY: dict[str, tuple[tuple[Any, ...], str]] = {
    "autocast_adapter_dtype": ((True,), "adapters are float32 unless dtype= of the method says otherwise"),
    "low_cpu_mem_usage": ((False, True), ""),
    "ephemeral_gpu_offload": ((False,), "nothing is moved to a GPU for a moment"),
    "mixed": ((False,), "adapters of several methods need no other class"),
    "config": ((None,), "the folder has the configuration"),
    "key_mapping": ((None,), "names are those of the model"),
    "token": ((None,), "set HF_TOKEN, or log in: hf auth login"),
    "torch_device": ((None,), "values go to where the model's are"),
    "offload_folder": ((None,), "what the model offloads stays offloaded"),
}
"""Maps the name of each argument to its accepted values, and to the text for the error about any other value."""


def without_peft_arguments(options: dict[str, Any]) -> dict[str, Any]:
    """Returns the options without the arguments in `SO_ANYWAY`, after a check of their values.

    Raises:
        ConfigError: an argument of peft has a value that peftcore does not support.
    """
    for name in options.keys() & SO_ANYWAY.keys():
        values, instead = SO_ANYWAY[name]
        if not any(options[name] is value for value in values):
            raise ConfigError(f"{name}={options[name]!r} is not supported; remove it: {instead}")
    return {name: value for name, value in options.items() if name not in SO_ANYWAY}


def check_no_more(options: dict[str, Any]) -> None:
    """Check that all options are arguments in `SO_ANYWAY` with accepted values.

    Raises:
        ConfigError: an option is unknown, or has a value that peftcore does not support.
    """
    if rest := sorted(without_peft_arguments(options)):
        raise ConfigError(f"{rest[0]}= is an unknown argument; remove it")
