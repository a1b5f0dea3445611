"""The process of one step: imports, waits to be told to begin, runs.

python -m gpu_steps.worker MODULE --rows FILE --device cuda|cpu, and then one line of JSON on standard input.
"""

import argparse
import importlib
import json
import sys
from pathlib import Path

from gpu_steps.record import Record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("module")
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    options = parser.parse_args()
    module = importlib.import_module(options.module)  # the slow part, done while the step before runs
    line = sys.stdin.readline()
    if not line:  # whoever was to tell it is gone
        return
    state = json.loads(line)
    with options.rows.open("a") as file:
        module.run(module.Bench(options.device, Record(file), state))


if __name__ == "__main__":
    main()
