"""Models on the Hugging Face Hub: recognised, downloaded and uploaded. Errors are one line."""

import difflib
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from fastdiff.errors import reason_of

_LONGEST_NAME = 96  # of an owner or a model on the hub
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def local_folder(path: str | Path, files: Sequence[str] | None = None) -> Path:
    """A local path as it is; for a hub id the folder of its snapshot, downloaded or from huggingface_hub's cache.

    Args:
        path: a file, a folder, or a hub id. What is not there but lies in a folder that is there is meant as a path.
        files: patterns of the files to download, such as "*.json"; None takes all.

    Raises:
        FileNotFoundError: nothing there, no such repository, or the hub cannot be reached. A hub that cannot be reached
            is asked once, so that this takes no longer than huggingface_hub's timeout of one request (10 seconds).
    """
    local, name = Path(path), str(path)
    if _exists(local):
        return local
    _exists(local.parent)
    is_path = not _HUB_ID.fullmatch(name) or any(len(part) > _LONGEST_NAME for part in name.split("/"))
    if local.parent.is_dir() and (is_path or "/" in name):
        close = difflib.get_close_matches(local.name, (each.name for each in local.parent.iterdir()), n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise FileNotFoundError(f"{path}: no such folder in {local.parent}; name one that is there{hint}, or a hub id")
    if is_path:
        raise FileNotFoundError(f"{path}: no such folder; expected a run, a checkpoint, a saved model or a hub id")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=None if files is None else list(files)))
    except Exception as error:  # huggingface_hub and its HTTP library raise what they like
        raise FileNotFoundError(
            f"{path}: not a local folder, and could not be downloaded from the Hugging Face Hub: {_reason(error)}"
        ) from error


def _exists(path: Path) -> bool:
    """Whether something is there; raises FileNotFoundError for a link that leads nowhere, which is no hub id."""
    try:
        if path.exists():
            return True
        is_link = path.is_symlink()
    except (OSError, RuntimeError):  # a name that no file can have; links in a circle, which Python 3.10 raises of
        is_link = os.path.islink(path)
    if is_link:
        target = os.readlink(path)
        raise FileNotFoundError(
            f"{path}: got a link to {target!r}, which leads nowhere; mend it, or name another folder"
        )
    return False


def upload(repo_id: str, fill: Callable[[Path, str], object], *, private: bool | None, commit_message: str) -> str:
    """Makes a repository where there is none, and uploads a folder to it in one commit.

    Args:
        repo_id: "name" or "owner/name".
        fill: writes the files into the folder that it is given, the whole repo_id beside. It is called when the
            repository is there.
        private, commit_message: as of `Run.push_to_hub`.

    Returns:
        The commit's address.

    Raises:
        ValueError: a repo_id that cannot be one, or files that the hub does not take.
        PermissionError: no login, or one that may not write there.
        ConnectionError: the hub cannot be reached, or fails.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token

    if not _HUB_ID.fullmatch(repo_id):
        raise ValueError(f"repo_id: got {repo_id!r}; expected name or owner/name")
    if get_token() is None:
        raise PermissionError(
            f"push_to_hub: got no login at {constants.ENDPOINT}; expected a token that may write; run hf auth login, "
            "or set HF_TOKEN"
        )
    api = HfApi()
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as name:
            fill(Path(name), repo_id)
            files = sorted(path for path in Path(name).rglob("*") if path.is_file())
            added = [CommitOperationAdd(path.relative_to(name).as_posix(), path) for path in files]
            done = api.create_commit(repo_id, added, commit_message=commit_message)
    except Exception as error:  # of the hub one line, ours as they are
        kind = _kind_of_failure(error)
        if kind is None:
            raise
        raise kind(f"push_to_hub: {repo_id}: {_reason(error)}") from error
    return str(done.commit_url)


def _kind_of_failure(error: Exception) -> type[Exception] | None:
    """What an error of huggingface_hub is to a caller; None where it is not one of huggingface_hub."""
    from huggingface_hub.errors import BadRequestError, HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    if isinstance(error, HFValidationError | BadRequestError):
        return ValueError
    if isinstance(error, HfHubHTTPError):
        return PermissionError if error.response.status_code in (401, 403, 404) else ConnectionError
    return ConnectionError if isinstance(error, OfflineModeIsEnabled) or _is_of_http(error) else None


def _is_of_http(error: BaseException) -> bool:
    """Whether an error comes from the HTTP library of the installed huggingface_hub (httpx2, httpx or requests)."""
    return type(error).__module__.split(".")[0] in ("httpx2", "httpx", "httpcore2", "httpcore", "requests", "urllib3")


def _reason(error: BaseException) -> str:
    """Why the hub did not do what was asked, and what to do about it; no line break."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    hub, login = constants.ENDPOINT, "run hf auth login, or set HF_TOKEN"
    if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, and it is not in the cache"
    if isinstance(error, GatedRepoError):
        return f"its owner grants access to it; ask at {hub}, then {login}"
    if isinstance(error, RepositoryNotFoundError):
        return f"{hub} has no such repository, or a private one; where it is private, {login}"
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        told = error.server_message or error.response.reason_phrase
        advice = f"; {login} with a token that may write there" if status in (401, 403) else ""
        return f"{hub} answered {status} ({' '.join(str(told).split())[:200]}){advice}"
    if _is_of_http(error):
        return f"{hub} cannot be reached ({reason_of(error)})"
    return reason_of(error)
