"""Adapters from a model hub, through the package ``huggingface_hub`` and its cache."""

from __future__ import annotations

import os
import re
from pathlib import Path

from peftcore.errors import CheckpointError

FILES = ["*.safetensors", "adapter_config.json", "head_config.json"]
"""The files that are fetched of a repository: nothing that could be a program, and no pickle."""
IDENTIFIER = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


def located(path: str | os.PathLike[str]) -> Path:
    """Returns the path of an adapter: the path itself, or, of an identifier such as ``"owner/name"`` or
    ``"owner/name@revision"`` that is no path here, that in the cache of the hub, fetched first unless it is there or
    ``HF_HUB_OFFLINE`` is set.

    Raises:
        CheckpointError: there is no such path, and the package is missing or the hub has nothing of the name.
    """
    place, name = Path(path), os.fspath(path)
    if place.exists() or not isinstance(path, str) or not IDENTIFIER.fullmatch(name):
        return place
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError:
        raise CheckpointError(
            f"{name} is no path here; to fetch it from the hub: pip install 'peftcore[interop]'"
        ) from None
    repository, _, revision = name.partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=FILES))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise CheckpointError(f"{name} is no path here, and cannot be fetched from the hub: {error}") from None
