"""Checks that a training continues with the same adapter as in its checkpoint.

Code that writes checkpoints (fleets, the Trainer's callback) writes a record of the adapter into each checkpoint, and
compares that record with the installed adapter when training continues. `differences` is also used to compare the
settings of runs, comparisons and studies.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from peftcore.errors import CheckpointError, shown
from peftcore.files.envelope import Envelope, envelope_of, options_of, parse_envelope
from peftcore.injection.injection import Injection
from peftcore.layers.layer import is_dense
from peftcore.layers.pieces import is_cut
from peftcore.targets.sites import Site

COMPARED = ("method", "train", "rows", "dtype")
"""Fields of an adapter's envelope (its description) that must be equal, in addition to the options and the target
modules."""
SAMPLE = 64
"""The number of values of each base tensor that the digest includes."""
NAMED = 8
"""The largest number of differences that a message lists."""


def record_of(injection: Injection) -> dict[str, Any]:
    """Returns the facts that decide how training continues, as plain data: method, options, target modules, modules
    that train with the adapter, dtype, and a digest of some weights of the base."""
    envelope = envelope_of(injection).model_dump(mode="json", exclude_defaults=True)
    return {"adapter": envelope, "base": base_sample(_read_sites(injection))}


def check_record(held: Mapping[str, Any], injection: Injection, where: object) -> None:
    """Check that the adapter of an injection matches the record `held` of a checkpoint.

    Raises:
        CheckpointError: they differ; the message lists the differences.
    """
    envelope = parse_envelope(held["adapter"], where)
    mine = envelope_of(injection)
    lines = [line for name in COMPARED for line in differences(_plain(envelope)[name], _plain(mine)[name], name)]
    if envelope.method == mine.method:
        theirs = options_of(type(injection.method), envelope).model_dump(mode="json")
        lines += differences(theirs, mine.model_dump(mode="json")["config"])
    elsewhere, here = _other_places(envelope, mine), base_sample(_read_sites(injection))
    lines += elsewhere
    if not elsewhere and held["base"] is not None and here is not None and held["base"] != here:
        lines.append("the weights of the base have other values, or another dtype")
    if lines:
        raise CheckpointError(
            f"{where} belongs to another adapter than {injection.name!r}: {listed(lines)}. Apply the adapter as it was "
            "when it was saved, to the same base; or start a new training from its values: peftcore.load(model, "
            "folder, trainable=True)"
        )


def differences(held: Any, here: Any, name: str = "") -> list[str]:
    """Returns one line for each value in which two pieces of plain data differ, such as ``training.steps was 4 and is
    8``."""
    if isinstance(held, Mapping) and isinstance(here, Mapping):
        keys = dict.fromkeys((*held, *here))
        pairs = ((f"{name}.{key}" if name else str(key), held.get(key), here.get(key)) for key in keys)
        return [line for each, one, other in pairs for line in differences(one, other, each)]
    return [] if held == here else [f"{name} was {shown(held)} and is {shown(here)}"]


def listed(lines: list[str]) -> str:
    """Returns the first differences as text for a message, with the number of the remaining ones."""
    more = len(lines) - NAMED
    return "; ".join(lines[:NAMED]) + (f"; and {more} more" if more > 0 else "")


def base_sample(sites: Iterable[Site]) -> str | None:
    """Returns a digest of some values of each frozen tensor at these sites; None if there are no such tensors.
    Quantized tensors and tensors that are sharded over processes are left out. The digest distinguishes bases that were
    trained differently, but reads only few of their values."""
    digest, found = hashlib.sha256(), dict[str, Tensor]()
    for site in sites:
        value = site.layer.read(site.module, site.tensor)
        if value is None or value.is_meta or value.requires_grad or not value.numel():
            continue
        if is_dense(value) and not is_cut(value):
            found[f"{site.module_path}.{site.tensor}"] = value.detach()
    for path, value in sorted(found.items()):
        flat = value.reshape(-1)
        places = torch.linspace(0, len(flat) - 1, min(SAMPLE, len(flat)), dtype=torch.float64).long()
        taken = flat[places.to(flat.device)].cpu().contiguous().view(torch.uint8)
        digest.update(f"{path} {tuple(value.shape)} {value.dtype}".encode() + taken.numpy().tobytes())
    return digest.hexdigest() if found else None


def _read_sites(injection: Injection) -> list[Site]:
    """Returns the adapter's sites, without tensors of the base that the adapter replaces with trained values."""
    return [graft.site for graft in injection.grafts if not graft.trained_along]


def _plain(envelope: Envelope) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(envelope.text)
    return plain


def _other_places(held: Envelope, here: Envelope) -> list[str]:
    """Returns one line that describes how the target modules differ; an empty list if they are the same."""
    then, now = ({json.dumps(each) for sites in _plain(it)["selections"].values() for each in sites} for it in
                 (held, here))  # fmt: skip
    gone, new = (sorted(json.loads(each)["module_path"] for each in it) for it in (then - now, now - then))
    words = [f"{len(gone)} are missing, such as {gone[0]}"] if gone else []
    words += [f"{len(new)} are new, such as {new[0]}"] if new else []
    return [f"target modules: {' and '.join(words)}"] if words else []
