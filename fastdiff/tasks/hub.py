"""Models on the Hugging Face Hub, for kinds whose loaders read local folders."""

from pathlib import Path

from fastdiff.errors import reason_of


def local_folder(path: str | Path) -> Path:
    """A local path as it is; of a hub id the repository's snapshot, downloaded or from the cache.

    Raises FileNotFoundError: neither; one line.
    """
    if Path(path).exists():
        return Path(path)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path)))
    except Exception as error:  # huggingface_hub and its HTTP library raise what they like
        raise FileNotFoundError(
            f"{path}: not a local folder, and could not be downloaded from the Hugging Face Hub: {reason_of(error)}"
        ) from error


def hub_file(repo_id: str, name: str) -> Path:
    """A file of a repository on the Hub, downloaded or from the cache. Raises FileNotFoundError; one line."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo_id, name))
    except Exception as error:  # as above
        raise FileNotFoundError(
            f"{repo_id}: not a local folder, and could not be downloaded from the Hugging Face Hub: {reason_of(error)}"
        ) from error
