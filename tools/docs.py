"""Builds the documentation as a site, build/site, by mkdocs.yml: `make docs`.

The documents lie where people read them in the repository: README.md at the top, docs/, a README.md beside each kernel.
They are copied to build/docs in the same places, so that every relative link holds in the site as it does here. A link
to something that is not there, or to a heading that is not there, fails the build.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("*.md", "LICENSE", "docs/**/*", "kernels/*/README.md", "examples/*", "recipes/*.yaml", "benchmarks/results/*")


def copy_documents(target: Path) -> None:
    """Copies the documents, and the files that they link to, into a folder that is made anew."""
    shutil.rmtree(target, ignore_errors=True)
    for pattern in COPIED:
        for source in ROOT.glob(pattern):
            if source.is_file():
                copy = target / source.relative_to(ROOT)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, copy)


def main() -> int:
    copy_documents(ROOT / "build" / "docs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]  # with --quiet it would not count its warnings
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1"}  # an advertisement of mkdocs-material's
    status = subprocess.run(command, cwd=ROOT, env=env).returncode
    if status == 0:
        print(f"documentation: {ROOT / 'build' / 'site' / 'index.html'}")
    return status


if __name__ == "__main__":
    sys.exit(main())
