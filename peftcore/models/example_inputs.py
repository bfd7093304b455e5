"""Example inputs of a model's forward, from its configuration: zeros of the right shapes and kinds.

There is one table for each library. It maps the name of an argument to a function. The function computes a tensor for
the argument from the configuration, or returns None if the model does not have this input.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftcore.errors import BadInput

Config = Mapping[str, Any]

TOKENS, PROMPT, SOUND = 128, 77, 16_000
"""Default lengths: the tokens of a text, the tokens of a denoiser's prompt (as CLIP's text encoder has), and the
samples of a sound (one second)."""
PICTURE = 224
"""Height and width of a picture, if the configuration does not define them. Convolutions accept any size."""
LATENTS = 4096
"""The number of positions of a picture of 1024 x 1024, for denoisers that take the positions as a sequence."""


@dataclass(frozen=True)
class Size:
    """The size of a batch."""

    batch: int
    length: int | None = None
    """The number of tokens in each row, if the user set it."""


class UnknownInputs(Exception):
    """Raised if the inputs of a model's forward cannot be determined; the message says what is missing."""


@dataclass(frozen=True)
class Given:
    """The arguments of the functions that build inputs: the configuration, the size of the batch, and the dtype."""

    config: Config
    size: Size
    dtype: torch.dtype

    def ids(self, *shape: int) -> Tensor:
        return torch.zeros(self.size.batch, *shape, dtype=torch.long)

    def numbers(self, *shape: int) -> Tensor:
        return torch.zeros(self.size.batch, *shape, dtype=self.dtype)

    def first(self, *names: str) -> Any:
        """Return the value of the first key among `names` that the configuration has; None if it has none of them."""
        return next((self.config[name] for name in names if self.config.get(name) is not None), None)


Build = Callable[[Given], Tensor | None]


def pair(size: Any) -> tuple[int, ...]:
    """Return height and width as a tuple, for a size in a configuration. If the size is a single number, it is both
    height and width."""
    if isinstance(size, Mapping):
        return int(size["height"]), int(size["width"])
    return tuple(size) if isinstance(size, list | tuple) else (size, size)


# transformers


def _length(given: Given, limit: str) -> int:
    longest = given.first(limit, "max_position_embeddings")
    if given.size.length is None:
        return min(TOKENS, longest or TOKENS)
    if longest and given.size.length > longest:
        raise BadInput(f"--length {given.size.length} is too long: the model has {longest} positions")
    return given.size.length


def _tokens(given: Given) -> Tensor | None:
    return given.ids(_length(given, "max_position_embeddings")) if given.first("vocab_size") else None


def _decoder_tokens(given: Given) -> Tensor | None:
    return given.ids(_length(given, "max_target_positions")) if given.first("is_encoder_decoder") else None


def _pixels(given: Given) -> Tensor:
    return given.numbers(given.first("num_channels") or 3, *pair(given.first("image_size") or PICTURE))


def _waveform(given: Given) -> Tensor:
    return given.numbers(given.size.length or SOUND)


def _spectrogram(given: Given) -> Tensor | None:
    bins, frames = given.first("num_mel_bins"), given.first("max_source_positions")
    return None if bins is None or frames is None else given.numbers(bins, 2 * frames)


TRANSFORMERS: Mapping[str, Build] = {
    "input_ids": _tokens,
    "pixel_values": _pixels,
    "input_values": _waveform,
    "input_features": _spectrogram,
    "decoder_input_ids": _decoder_tokens,
}


def for_transformers(
    config: Any, main: Collection[str], accepted: Collection[str], size: Size, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return example inputs for a model of transformers: its main inputs, and decoder tokens if it has a decoder."""
    given = Given(flattened(config), size, dtype)
    wanted = {*main, "decoder_input_ids"} & {*accepted}
    found = {name: build(given) for name, build in TRANSFORMERS.items() if name in wanted}
    inputs = {name: value for name, value in found.items() if value is not None}
    if not inputs.keys() & {*main}:
        raise UnknownInputs(
            f"its configuration does not define the shape of {' or '.join(sorted({*main} & {*TRANSFORMERS}))}"
        )
    return inputs


def flattened(config: Any) -> dict[str, Any]:
    """Return the values of a configuration of transformers, and of the configurations inside it, in one dictionary with
    transformers' common names. If several configurations have a name, the outer configuration has priority, then the
    text configuration."""
    values: dict[str, Any] = {}
    inner = [part for name in config.sub_configs if (part := vars(config).get(name)) is not None]
    for each in (config, config.get_text_config(), *inner):
        plain = each.to_dict()
        plain |= {usual: plain[own] for usual, own in each.attribute_map.items() if own in plain}
        values = {**plain, **{name: value for name, value in values.items() if value is not None}}
    return values


# diffusers


def _sample(given: Given) -> Tensor | None:
    size, channels = given.first("sample_size"), given.first("in_channels")
    return None if size is None or channels is None else given.numbers(channels, *pair(size))


def _prompt(given: Given) -> Tensor | None:
    width = given.first("cross_attention_dim", "joint_attention_dim", "caption_channels")
    return given.numbers(given.size.length or PROMPT, width) if isinstance(width, int) else None


def _pooled(given: Given) -> Tensor | None:
    width = given.first("pooled_projection_dim")
    return None if width is None else given.numbers(width)


def _latents(given: Given) -> Tensor | None:
    in_a_row = given.first("axes_dims_rope") is not None
    return given.numbers(LATENTS, given.first("in_channels")) if in_a_row else _sample(given)


def _places(count: Callable[[Given], int]) -> Build:
    """Return a function that builds the positions of `count` tokens, ``[tokens, axes]``, the same for the whole
    batch."""
    return lambda given: torch.zeros(count(given), len(given.config["axes_dims_rope"]), dtype=given.dtype)


def _guidance(given: Given) -> Tensor | None:
    return given.numbers() if given.first("guidance_embeds") else None


def _classes(given: Given) -> Tensor | None:
    return given.ids() if given.first("num_embeds_ada_norm", "num_class_embeds") else None


DIFFUSERS: Mapping[str, Build] = {
    "sample": _sample,
    "hidden_states": _latents,
    "timestep": lambda given: given.ids(),
    "encoder_hidden_states": _prompt,
    "pooled_projections": _pooled,
    "class_labels": _classes,
    "guidance": _guidance,
    "img_ids": _places(lambda given: LATENTS),
    "txt_ids": _places(lambda given: given.size.length or PROMPT),
}


def for_diffusers(config: Config, accepted: Mapping[str, Any], size: Size, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return example inputs for a model of diffusers: all arguments of forward whose shapes the configuration
    defines."""
    given = Given(config, size, dtype)
    found = {name: build(given) for name, build in DIFFUSERS.items() if name in accepted}
    inputs: dict[str, Any] = {name: value for name, value in found.items() if value is not None}
    if config.get("addition_embed_type") == "text_time":
        inputs["added_cond_kwargs"] = _size_and_text(given)
    missing = [name for name, each in accepted.items() if each.default is each.empty and name not in inputs]
    if missing:
        raise UnknownInputs(f"its configuration does not define the shape of {', '.join(missing)}, which forward needs")
    return inputs


def _size_and_text(given: Given) -> dict[str, Tensor]:
    """Return SDXL's additional conditions: six numbers for the sizes of the picture, and the text as one vector."""
    ids = 6
    width = given.config["projection_class_embeddings_input_dim"] - ids * given.config["addition_time_embed_dim"]
    return {"text_embeds": given.numbers(width), "time_ids": given.numbers(ids)}
