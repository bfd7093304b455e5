"""Downloads adapters from a model hub and uploads them, with the package ``huggingface_hub`` and its cache."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftcore.errors import CheckpointError, HubError, said
from peftcore.files.formats.card import CARD, MARK

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

FILES = ["*.safetensors", "adapter.json", "adapter_config.json", "*/adapter_config.json", "head_config.json"]
"""The files that are downloaded from an adapter's repository: no code, and no pickles."""
COMMIT = re.compile(r"[0-9a-f]{40}")
IDENTIFIER = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?")
PATIENCE = 10.0
"""The timeout of the first request to the hub, in seconds, unless ``HF_HUB_ETAG_TIMEOUT`` sets another. Most other
requests of ``huggingface_hub`` have no timeout."""
BELOW = ("httpx", "httpx2", "requests", "urllib3")
"""The libraries that make the requests of ``huggingface_hub``."""
LOGIN = "log in (hf auth login), or set HF_TOKEN"
INSTALL = "pip install 'peftcore[interop]'"


def located(path: str | os.PathLike[str], revision: str | None = None) -> Path:
    """Returns the local path of an adapter. If `path` does not exist and is an identifier such as ``"owner/name"`` or
    ``"owner/name@revision"``, it returns the folder in the hub's cache, which is downloaded first unless it is cached
    or ``HF_HUB_OFFLINE`` is set.

    Args:
        revision: a branch, a tag or a commit of the repository, instead of ``@revision``.

    Raises:
        CheckpointError: the package ``huggingface_hub`` is missing, two different revisions are passed, or a revision
            is passed with a local path.
        HubError: the hub has no such repository, refuses access, or does not answer.
    """
    place, name = Path(path), os.fspath(path)
    if place.exists() or not isinstance(path, str) or not IDENTIFIER.fullmatch(name):
        if revision is not None:
            raise CheckpointError(
                f"revision={revision!r} belongs to a repository on the hub, and {name} is a path: remove it"
            )
        return place
    repository, _, after = name.partition("@")
    if after and revision is not None and after != revision:
        raise CheckpointError(f"{name} names the revision {after!r}, and revision= is {revision!r}: pass only one")
    return fetched(
        repository, after or revision, FILES, f"{name} is not a local path, and cannot be fetched from the hub"
    )


def is_fetched(folder: Path) -> bool:
    """True if a folder is a snapshot in the hub's cache, which holds a repository at one commit."""
    return COMMIT.fullmatch(folder.name) is not None and folder.parent.name == "snapshots"


def fetched(repository: str, revision: str | None, files: Sequence[str], failed: str) -> Path:
    """Returns the folder in the hub's cache with the files of a repository; they are downloaded first unless they are
    cached.

    Args:
        repository: its identifier.
        revision: a branch, a tag or a commit; the main branch by default.
        files: patterns of the names of the files to download.
        failed: the first part of error messages.

    Raises:
        CheckpointError: the package ``huggingface_hub`` is missing.
        HubError: the hub has no such repository, refuses access, or does not answer, and the cache lacks the files.
    """
    try:
        from huggingface_hub import HfApi, constants, snapshot_download
        from huggingface_hub.errors import RevisionNotFoundError
    except ImportError:
        raise CheckpointError(f"{failed}: {INSTALL}") from None
    with _explained(failed, repository, revision):
        refused: Exception | None = None
        if not constants.HF_HUB_OFFLINE:
            try:
                HfApi().model_info(repository, revision=revision, timeout=_patience())
            except RevisionNotFoundError:
                raise
            except Exception as error:
                refused = error  # what is in the cache will do
        cached = refused is not None
        try:
            return Path(
                snapshot_download(repository, revision=revision, allow_patterns=list(files), local_files_only=cached)
            )
        except Exception:
            if refused is not None:
                raise refused from None
            raise


def upload(
    folder: Path,
    repository: str,
    *,
    private: bool | None,
    revision: str | None,
    message: str,
    token: str | bool | None,
    create_pr: bool,
) -> CommitInfo:
    """Upload the files of a folder to a repository, which is created if it does not exist. Returns the commit. If the
    repository has a model card that peftcore did not write, that card is kept.

    Args:
        folder: its files are added to the repository; files with the same names are replaced.
        repository: its identifier.
        private: whether a new repository is private; the account's default if None.
        revision: a branch, which is created if it does not exist; the main branch by default.
        message: the commit message.
        token: the token, as in huggingface_hub.
        create_pr: create a pull request with the commit.

    Raises:
        HubError: the package ``huggingface_hub`` or a token is missing, or the hub refuses access, or does not answer.
    """
    failed = f"cannot push to {repository}"
    try:
        from huggingface_hub import HfApi, constants, get_token
    except ImportError:
        raise HubError(f"{failed}: {INSTALL}") from None
    if constants.HF_HUB_OFFLINE:
        raise HubError(f"{failed}: HF_HUB_OFFLINE is set; unset it to push")
    if token is False or (token in (None, True) and get_token() is None):
        raise HubError(f"{failed}: there is no token; {LOGIN}, or pass token=; it needs write access")
    api = HfApi(token=token)
    with _explained(failed, repository, revision, writing=True):
        try:
            api.model_info(repository, timeout=_patience())
        except Exception as error:
            if _status(error) is None:  # not even an answer: the requests to come would wait for ever
                raise
        repository = api.create_repo(repository, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr and not revision.startswith("refs/"):
            api.create_branch(repository, branch=revision, exist_ok=True)
        theirs = _text_of(api, repository, CARD, revision)
        return api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            revision=revision,
            commit_message=message,
            create_pr=create_pr,
            ignore_patterns=[CARD] if theirs is not None and MARK not in theirs else None,
        )


def _text_of(api: Any, repository: str, name: str, revision: str | None) -> str | None:
    """Returns the text of a file in a repository; None if the repository lacks the file."""
    from huggingface_hub.errors import EntryNotFoundError

    with tempfile.TemporaryDirectory() as folder:
        try:
            file = api.hf_hub_download(repository, name, revision=revision, local_dir=folder)
        except EntryNotFoundError as error:
            if _status(error) is None:  # none that the hub told
                raise
            return None
        return Path(file).read_text(encoding="utf-8", errors="replace")


def _patience() -> float:
    from huggingface_hub import constants

    return float(constants.HF_HUB_ETAG_TIMEOUT or PATIENCE)


def _status(error: BaseException) -> int | None:
    """Returns the HTTP status of the hub's answer; None if the hub did not answer."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _is_of_network(error: BaseException) -> bool:
    """Whether an error means that the hub was not reached. This is recognized by the library that raised it; versions
    of ``huggingface_hub`` use different ones."""
    own = (ConnectionError, TimeoutError)
    return any(isinstance(each, own) or type(each).__module__.partition(".")[0] in BELOW for each in _chain(error))


@contextmanager
def _explained(failed: str, repository: str, revision: str | None, writing: bool = False) -> Iterator[None]:
    """Context manager that turns errors of ``huggingface_hub`` into a `HubError` that says what to do."""
    try:
        yield
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:
        raise HubError(f"{failed}: {_reason(error, repository, revision, writing)}") from error


def _reason(error: Exception, repository: str, revision: str | None, writing: bool) -> str:
    """Returns the reason why a download or an upload failed, and what to do about it, for an error message."""
    from huggingface_hub import constants, errors

    address = f"{constants.ENDPOINT}/{repository}"
    chain = list(_chain(error))

    def found(*kinds: type[Exception]) -> bool:
        return any(isinstance(each, kinds) for each in chain)

    if found(errors.OfflineModeIsEnabled) or constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set, and the cache lacks it; unset it, or pass a folder"
    if found(errors.GatedRepoError):
        return f"it is gated; ask for access at {address}, and {LOGIN} of the account that has it"
    if found(errors.RevisionNotFoundError):
        return f"it has no revision {revision or 'main'!r}; {address}/tree/main lists its branches and tags"
    status = next((each for each in map(_status, chain) if each is not None), None)
    who = "may not write there" if writing else "may not read it"
    if found(errors.RepositoryNotFoundError) and status in (401, 404):
        missing = "the hub has no repository of this name, or it is private"
        return f"{missing}; check the name {repository!r}, and {LOGIN} of an account that may see it"
    reasons = {
        401: f"the hub does not know the token; {LOGIN} with a valid one (https://huggingface.co/settings/tokens)",
        403: f"the token {who}; {LOGIN} with one that may",
        429: "the hub refuses more requests from this address; wait some minutes, and try again",
    }
    if status in reasons:
        return reasons[status]
    if status is not None and status >= 500:
        return f"the hub failed (status {status}); try again later"
    if any("timeout" in type(each).__name__.lower() for each in chain):
        return (
            f"{constants.ENDPOINT} does not answer in time; check the network and its proxies, or allow more seconds "
            "with HF_HUB_ETAG_TIMEOUT and HF_HUB_DOWNLOAD_TIMEOUT"
        )
    if status is None and _is_of_network(error):
        return f"{constants.ENDPOINT} cannot be reached; check the network, its proxies and HF_ENDPOINT"
    return said(error)
