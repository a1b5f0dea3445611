"""The arrows of fastdiff's rooms run one way, and there is no circle. Imports inside functions count, too."""

import ast
import graphlib
from pathlib import Path

import fastdiff

ROOT = Path(fastdiff.__file__).parent
COMMANDS = ("train", "sample", "generate", "evaluate", "prepare", "demo", "tune", "info", "__main__")
# From the top down: a room may import its own floor and those below. `__init__` of fastdiff itself is not a room.
FLOORS = (
    COMMANDS,
    ("cli", "commands"),
    ("tasks",),
    ("training", "evaluation", "integrations", "serving", "export"),
    ("generation",),
    ("visualization",),
    ("models",),
    ("data", "diffusion"),
    ("nn",),
    ("ops",),
    ("kernels",),
    ("recipes", "device"),
    ("arguments",),
    ("tuning", "files", "reading", "errors", "backends", "shipped", "lazy", "version"),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def imports() -> dict[str, set[str]]:
    """Module → modules of fastdiff that it imports anywhere; names imported for type checkers alone are left out."""
    modules = {".".join(("fastdiff", *p.relative_to(ROOT).with_suffix("").parts)) for p in ROOT.rglob("*.py")}
    modules = {name.removesuffix(".__init__") for name in modules if not name.startswith("fastdiff.kernels")}
    found: dict[str, set[str]] = {}
    for name in modules:
        path = ROOT.joinpath(*name.split(".")[1:])
        tree = ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text())
        typing_only = {id(inner) for node in ast.walk(tree) if isinstance(node, ast.If)
                       and ast.unparse(node.test) == "TYPE_CHECKING" for inner in ast.walk(node)}  # fmt: skip
        targets: set[str] = set()
        for node in ast.walk(tree):
            if id(node) in typing_only:
                continue
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module.split(".")[0] == "fastdiff":
                targets |= {f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Import):
                targets |= {alias.name for alias in node.names if alias.name.split(".")[0] == "fastdiff"}
        found[name] = {t if t in modules else t.rpartition(".")[0] for t in targets} - {name, "fastdiff"}
    return found


def room(module: str) -> str:
    return module.split(".")[1]


def test_arrows_run_down():
    up = [f"{name} imports {target}" for name, targets in imports().items() for target in targets
          if name != "fastdiff" and FLOOR[room(target)] < FLOOR[room(name)]]  # fmt: skip
    assert not up, up


def test_rooms_and_files_have_no_circle():
    files = {name: {t for t in targets if t != name.rpartition(".")[0]} for name, targets in imports().items()}
    rooms: dict[str, set[str]] = {}
    for name, targets in imports().items():
        if name != "fastdiff":
            rooms.setdefault(room(name), set()).update({room(t) for t in targets} - {room(name)})
    for graph in (files, rooms):
        try:
            graphlib.TopologicalSorter(graph).prepare()
        except graphlib.CycleError as error:
            raise AssertionError(f"circle: {' → '.join(error.args[1])}") from None


def test_cli_is_for_commands_alone():
    users = {name for name, targets in imports().items() if targets & {"fastdiff.cli", "fastdiff.commands"}}
    assert {room(name) for name in users} <= set(COMMANDS)
