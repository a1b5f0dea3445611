"""The CUDA kernels under ThreadSanitizer, on the CPU: python tools/race.py (make race)

Exit status: 0 no race, 1 a race or another fault (reported with both places), 2 this machine cannot build the check.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "emulator"))

from build_emulator import Unavailable, race  # noqa: E402


def main() -> int:
    try:
        done = race()
    except Unavailable as reason:
        print(f"the race check cannot run: {reason}", file=sys.stderr)
        return 2
    print(done.stdout, end="")
    print(done.stderr, end="", file=sys.stderr)
    print("no races" if done.returncode == 0 else f"FAILED with exit status {done.returncode}")
    return 1 if done.returncode else 0


if __name__ == "__main__":
    sys.exit(main())
