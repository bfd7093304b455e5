"""Prompts and prefixes in peft's files (checked against peft 0.21).

``prompt_embeddings`` are the rows of the prompt, [length, width]. For P-tuning, peft saves the output of the network
instead of the network, so such a file is read as a plain prompt. In a prefix each row contains [key | value] of all
layers, concatenated. If a file has rows for both halves of an encoder-decoder, peft's forward uses only the first half
of the rows, those of the encoder.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Size, Tensor, nn

from peftcore.author import SequenceSite
from peftcore.author.formats import BOTH, ROWS, Found, Keys, Place, SavedSite, SoftPrompt, halves
from peftcore.errors import CheckpointError, ExportError
from peftcore_additive._prefix import FrontOperator
from peftcore_additive.cpt import CPTOperator


class PeftPrompt(SoftPrompt):
    """Translates prompt rows in front of the tokens."""

    methods = ("prompt_tuning",)
    advice: ClassVar[Mapping[str, str]] = {
        "prompt_tuning_init": "use init=",
        "prompt_tuning_init_text": "use init_ids=",
        "tokenizer_name_or_path": "leave it out: init_ids= has the ids",
        "tokenizer_kwargs": "leave it out: init_ids= has the ids",
    }

    def options(self, keys: Keys, shapes: Mapping[str, Size]) -> dict[str, Any]:
        keys.pass_over("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs")
        self.check_rows(keys, shapes)
        return {"method": "prompt_tuning", "length": self.shared_options(keys)}

    def selections(self, keys: Keys, sites: Sequence[SavedSite], model: nn.Module) -> dict[str, tuple[SavedSite, ...]]:
        return {"": self.stacks(keys, model)}

    def read(self, place: Place, found: Found) -> dict[str, Tensor]:
        length, width = place.operator.prompt.shape
        held = found.shape(ROWS)[0] if found.has(ROWS) else length
        return {"prompt": found.take(ROWS, (max(held, length), width))[:length]}

    def write_options(self, config: Any) -> dict[str, Any]:
        return {"num_virtual_tokens": config.length, "prompt_tuning_init": "RANDOM"}

    def write_all(self, places: Sequence[Place]) -> dict[str, Tensor]:
        (place,) = places
        with torch.no_grad():
            return {ROWS: place.operator.rows(next(place.operator.parameters()))}


class PeftPTuning(PeftPrompt):
    """Translates prompt rows that a network generated."""

    methods = ("p_tuning",)
    advice: ClassVar[Mapping[str, str]] = {
        "encoder_reparameterization_type": "use encoder=",
        "encoder_hidden_size": "use hidden=",
        "encoder_num_layers": 'use encoder="mlp" or "lstm", both of two layers',
        "encoder_dropout": "use lstm_dropout=",
    }

    def options(self, keys: Keys, shapes: Mapping[str, Size]) -> dict[str, Any]:
        keys.pass_over("encoder_reparameterization_type", "encoder_hidden_size")
        keys.pass_over("encoder_num_layers", "encoder_dropout")
        return super().options(keys, shapes)

    def write_options(self, config: Any) -> dict[str, Any]:
        kind = "LSTM" if config.encoder == "lstm" else "MLP"  # peft builds no network where it finds the rows
        return {"num_virtual_tokens": config.length, "encoder_reparameterization_type": kind}

    def write_options_of_all(self, places: Sequence[Place], model: nn.Module) -> dict[str, Any]:
        options = super().write_options_of_all(places, model)
        return options | {"encoder_hidden_size": places[0].config.hidden or options["token_dim"]}

    def write_all(self, places: Sequence[Place]) -> dict[str, Tensor]:
        (place,) = places
        operator, training = place.operator, place.operator.training
        operator.eval()  # no dropout inside the network
        with torch.no_grad():
            rows = operator.rows(operator.start)
        operator.train(training)
        return {ROWS: rows}


class PeftCPT(PeftPrompt):
    """Translates prompts of examples; a file stores the sum of the examples' embeddings and their change."""

    methods = ("cpt",)
    advice: ClassVar[Mapping[str, str]] = {
        "num_virtual_tokens": "leave it out: ids= has the number of tokens",
        "cpt_token_ids": "use ids=",
        "cpt_mask": "leave it out: it has no effect in peft either",
        "cpt_tokens_type_mask": "use types=",
        "opt_weighted_loss_type": "use decay=",
        "opt_loss_decay_factor": "use decay=",
        "opt_projection_epsilon": "use epsilon=",
        "opt_projection_format_epsilon": "use format_epsilon=",
        "tokenizer_name_or_path": "leave it out: init_ids= has the ids",
    }

    def options(self, keys: Keys, shapes: Mapping[str, Size]) -> dict[str, Any]:
        length, ids = super().options(keys, shapes)["length"], keys.take("cpt_token_ids", list)
        keys.pass_over("cpt_mask")  # which peft does not use
        decays = keys.take("opt_weighted_loss_type", str, "none") == "decay"
        decay = keys.take("opt_loss_decay_factor", float, 1.0)
        if len(ids) != length:
            raise CheckpointError(f"{keys.where} has {length} rows, but {len(ids)} token ids")
        return {
            "method": "cpt",
            "ids": ids,
            "types": keys.take("cpt_tokens_type_mask", list, [1] * length),
            "epsilon": keys.take("opt_projection_epsilon", float, 0.1),
            "format_epsilon": keys.take("opt_projection_format_epsilon", float, 0.1),
            "decay": decay if decays else 1.0,
        }

    def read(self, place: Place, found: Found) -> dict[str, Tensor]:
        if not isinstance(place.operator, CPTOperator):  # the head's has no tensors
            return {}
        shape = place.operator.start.shape
        return {"start": found.take(ROWS, tuple(shape)), "delta": torch.zeros(shape)}

    def write_options(self, config: Any) -> dict[str, Any]:
        return {
            "num_virtual_tokens": len(config.ids),
            "cpt_token_ids": config.ids,
            "cpt_mask": [1] * len(config.ids),
            "cpt_tokens_type_mask": config.kinds(),
            "opt_weighted_loss_type": "decay" if config.decay < 1 else "none",
            "opt_loss_decay_factor": config.decay,
            "opt_projection_epsilon": config.epsilon,
            "opt_projection_format_epsilon": config.format_epsilon,
        }

    def write_all(self, places: Sequence[Place]) -> dict[str, Tensor]:
        (operator,) = (each.operator for each in places if isinstance(each.operator, CPTOperator))
        with torch.no_grad():
            return {ROWS: operator.rows(operator.start)}


class PeftPrefix(SoftPrompt):
    """Translates keys and values in front of the keys and values of every attention."""

    methods = ("prefix_tuning",)
    advice: ClassVar[Mapping[str, str]] = {
        "encoder_hidden_size": "use projection=",
        "prefix_projection": "use projection=",
    }

    def options(self, keys: Keys, shapes: Mapping[str, Size]) -> dict[str, Any]:
        keys.pass_over("prefix_projection", "encoder_hidden_size", "init_weights")
        if halves(keys) != 1:
            raise CheckpointError(
                f"{keys.where}: in an encoder-decoder, peft puts prefixes of some layers into other layers, with "
                "relative positions; peftcore does not read such files"
            )
        self.check_rows(keys, shapes)
        return {"method": "prefix_tuning", "length": self.shared_options(keys), "projection": None, "behind": True}

    def selections(self, keys: Keys, sites: Sequence[SavedSite], model: nn.Module) -> dict[str, tuple[SavedSite, ...]]:
        _warn_of_window(model)
        return {}

    def read(self, place: Place, found: Found) -> dict[str, Tensor]:
        if not isinstance(place.operator, FrontOperator):  # positions have no tensors
            return {}
        return {"prefix": self.rows(place, found)}

    def rows(self, place: Place, found: Found) -> Tensor:
        """Returns the rows of a prefix that belong to one attention, [length, width]."""
        length, width = place.operator.flat().shape
        rows = found.take(ROWS, (length, place.count * width))
        return rows[:, place.index * width : (place.index + 1) * width]

    def write_options(self, config: Any) -> dict[str, Any]:
        if config.gate:
            raise ExportError("peft's prefixes have no gate; apply prefix_tuning with gate=False to export it")
        if not config.behind:
            raise ExportError(
                "peft counts the positions of tokens from the end of the prefix, but this one was trained with "
                "behind=False; apply it with behind=True to export it to peft"
            )
        return {"num_virtual_tokens": config.length, "prefix_projection": False}

    def write_options_of_all(self, places: Sequence[Place], model: nn.Module) -> dict[str, Any]:
        _warn_of_window(model)
        if not all(place.site.stack.causal for place in places if isinstance(place.site, SequenceSite)):
            raise ExportError(
                "peft stores a prefix in a decoder's cache, but this host is an encoder; save it in peftcore's format"
            )
        options = super().write_options_of_all(places, model)
        prefixes = _prefixes(places)
        sizes, *others = {each.operator.geometry for each in prefixes}
        if options["task_type"] == BOTH or len(places) != len(prefixes) + 1 or len(prefixes) != options["num_layers"]:
            raise ExportError(
                "peft's prefixes cover every attention of one decoder stack, and no other attention; target exactly "
                "these to export it"
            )
        if others or sizes.head_dim != sizes.value_dim:
            raise ExportError(
                "peft's prefixes have one width for keys and values of all layers; this host's attentions differ in "
                "width"
            )
        return options | {"token_dim": sizes.kv_heads * sizes.head_dim, "num_attention_heads": sizes.kv_heads}

    def write_all(self, places: Sequence[Place]) -> dict[str, Tensor]:
        with torch.no_grad():
            return {ROWS: torch.cat([each.operator.flat() for each in _prefixes(places)], dim=1)}


class PeftCartridge(PeftPrefix):
    """Translates trained caches of texts: their first rows are frozen."""

    methods = ("cartridge",)
    advice: ClassVar[Mapping[str, str]] = {
        "num_frozen_tokens": "use frozen=",
    }

    def options(self, keys: Keys, shapes: Mapping[str, Size]) -> dict[str, Any]:
        found = super().options(keys, shapes)
        frozen = keys.take("num_frozen_tokens", int, 1)
        if not 0 <= frozen < found["length"]:
            raise CheckpointError(
                f"{keys.where}: {frozen} of {found['length']} tokens are frozen, which leaves no trainable token"
            )
        return {"method": "cartridge", "length": found["length"], "frozen": frozen}

    def read(self, place: Place, found: Found) -> dict[str, Tensor]:
        if not isinstance(place.operator, FrontOperator):
            return {}
        sink, rows = self.rows(place, found).tensor_split([len(place.operator.get_tensor("sink"))])
        return {"sink": sink, "rows": rows}

    def write_options(self, config: Any) -> dict[str, Any]:
        return {"num_virtual_tokens": config.length, "num_frozen_tokens": config.frozen}


def _prefixes(places: Sequence[Place]) -> list[Place]:
    return [place for place in places if isinstance(place.operator, FrontOperator)]


def _warn_of_window(model: nn.Module) -> None:
    """Warn if the host's attention has a window: peft stores the prefix in the cache, so for long inputs the window
    does not contain it any more."""
    window = getattr(vars(model).get("config"), "sliding_window", None)
    if window:
        warnings.warn(
            f"this host attends within a window of {window} keys; in peft the prefix leaves the window, in peftcore it "
            "stays, so outputs differ for longer inputs",
            UserWarning,
            stacklevel=2,
        )
