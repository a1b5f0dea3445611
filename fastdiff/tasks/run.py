"""What the loaded runs of all kinds have in common."""

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from torch import nn

from fastdiff.tasks.model_card import write_model_card
from fastdiff.training.run_folder import RunFolder


@dataclass(frozen=True)
class Run:
    """Something trained, loaded to be used. `fastdiff.load` makes one.

    Attributes:
        model: in eval mode.
        source: the folder (or hub id) that the weights came from.
        folder: the run's folder; None for what is not a run of fastdiff.train.
        recipe: what the run was trained by, or None.
        step: optimizer steps behind the checkpoint; None for what is not a checkpoint of fastdiff.train.
    """

    kind: ClassVar[str]

    model: nn.Module
    source: Path
    folder: RunFolder | None = None
    recipe: Any = None
    step: int | None = None

    def sample(self, *_: Any, **__: Any) -> Any:
        """Draws samples, where the kind has any."""
        self._cannot("sample")

    def generate(self, *_: Any, **__: Any) -> Any:
        """Generates text, where the kind does."""
        self._cannot("generate")

    def _cannot(self, what: str) -> NoReturn:
        others = [name for name in ("sample", "generate") if getattr(type(self), name) is not getattr(Run, name)]
        advice = f"use .{others[0]}(…)" if others else "use its .model"
        raise TypeError(f"{what}: got a run of {self.kind}, which has none; {advice}")

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Writes a folder that `fastdiff.load` reads: weights, configuration, and a model card README.md.

        The card has the recipe, the numbers of the last `fastdiff.evaluate` and the picture of samples, where the run
        has them. Raises OSError where the folder cannot be written.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self._save(directory)
        write_model_card(directory, self)

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, commit_message: str | None = None) -> str:
        """Uploads what `save_pretrained` writes to the Hugging Face Hub, in one commit; makes the repository first.

        Args:
            repo_id: "name" or "owner/name".
            private: of a new repository; None is the owner's default.
            commit_message: None is "Upload with fastdiff".

        Returns:
            The commit's address.

        Raises what huggingface_hub raises: no login, no network, no permission.
        """
        from huggingface_hub import HfApi

        api = HfApi()
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            done = api.upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message=commit_message or "Upload with fastdiff"
            )
        return str(done.commit_url)

    def _save(self, directory: Path) -> None:
        """Writes all but the model card."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it is saved")

    def numbers(self) -> dict[str, Any]:
        """What the last `fastdiff.evaluate` measured of this checkpoint; {} where it has not."""
        if self.folder is None:
            return {}
        try:
            content = json.loads((self.folder.path / "evaluation.json").read_text())
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) and content.get("step") == self.step else {}
