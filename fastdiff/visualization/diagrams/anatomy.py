"""The parts of a model, found by walking its modules; what a call of it shows of their order and shapes."""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.visualization.diagrams.words import Words, describe, named_parameter

# Modules whose outputs condition the others: they stand beside the column.
_BESIDE = {"TimestepEmbedding", "FourierEmbedding", "LabelEmbedding", "QFormer", "StateMix"}
_BESIDE_NAMES = {"text_proj", "mix", "cond_proj", "context_norm", "embed_positions", "block_embedders",
                 "condition_encoder", "final_modulation"}  # fmt: skip
Shape = tuple[int, ...]


@dataclass
class Trace:
    """What was seen of a call: by a module's path, the place of its last call, and the shapes of its tensors."""

    order: dict[str, int] = field(default_factory=dict)
    inputs: dict[str, Shape] = field(default_factory=dict)
    outputs: dict[str, Shape] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """A part of a model as one box, or a run of like blocks.

    Attributes:
        path: of the (first) module, as `named_modules` has it; of bare parameters, theirs.
        module: the (first) module; None for bare parameters.
        words: what it is called.
        count: how many blocks follow each other.
        parameters: of all of them, without those of stages before.
        each: of one block, where all have as many.
        section: the part of the model that it lies in, "" for the model itself.
        beside: whether it conditions the column instead of standing in it.
        input, output: shapes of the tensors that go in first and come out last, where they are known.
    """

    path: str
    module: nn.Module | None
    words: Words
    count: int
    parameters: int
    each: int | None
    section: str
    beside: bool
    input: Shape | None
    output: Shape | None


@contextlib.contextmanager
def tracing(model: nn.Module) -> Iterator[Trace]:
    """A block in which calls of the model's modules are seen."""
    trace, counter = Trace(), itertools.count()

    def see(path: str) -> Callable:
        def hook(_: nn.Module, args: tuple, kwargs: Mapping, output: Any) -> None:
            trace.order[path] = next(counter)
            for found, value in ((trace.inputs, (args, kwargs)), (trace.outputs, output)):
                tensor = _first_tensor(value)
                if tensor is not None:
                    found[path] = tuple(tensor.shape)

        return hook

    hooks = [module.register_forward_hook(see(path), with_kwargs=True) for path, module in model.named_modules()]
    try:
        with torch.no_grad():
            yield trace
    finally:
        for hook in hooks:
            hook.remove()


def _first_tensor(value: Any) -> Tensor | None:
    """The first tensor in nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        return value
    if hasattr(value, "sample") and isinstance(value.sample, Tensor):  # diffusers' outputs
        return value.sample
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ()
    return next((tensor for part in parts if (tensor := _first_tensor(part)) is not None), None)


def stages_of(model: nn.Module, trace: Trace) -> list[Stage]:
    """The model's stages in the order of their calls; in that of their registration where it was not called.

    Each parameter is counted once, in the first stage that has it.
    """
    found = list(_walk(model, "", "", False, trace))
    if trace.order:
        found = [each for _, each in sorted(zip(_places(found, trace), found, strict=True), key=lambda pair: pair[0])]
    counted: set[int] = set()
    return [stage for each in found if (stage := _stage(*each, trace, counted)) is not None]


def _places(found: list[tuple], trace: Trace) -> list[int]:
    """When each was called last; what was not goes before the next one of its section that was, or to the end."""
    places, following = [], {}
    for modules, _, section, _ in reversed(found):
        called = [trace.order[path] for path, _ in modules if path in trace.order]
        following[section] = max(called) if called else following.get(section, len(trace.order))
        places.append(following[section])
    return places[::-1]


def _stage(modules, words, section, beside, trace: Trace, counted: set[int]) -> Stage | None:
    parameters = [_own(module) for _, module in modules]
    each = {sum(parameter.numel() for parameter in some) for some in parameters}
    fresh = {id(p): p.numel() for some in parameters for p in some if id(p) not in counted}
    if not any(parameters):  # activations and dropout
        return None
    counted.update(fresh)
    (first, module), (last, _) = modules[0], modules[-1]
    is_module = isinstance(module, nn.Module)
    return Stage(
        first, module if is_module else None, words, len(modules), sum(fresh.values()),
        each.pop() if len(each) == 1 and len(modules) > 1 else None, section, beside,
        trace.inputs.get(first), trace.outputs.get(last),
    )  # fmt: skip


def _own(module: nn.Module | nn.Parameter) -> list[nn.Parameter]:
    return [module] if isinstance(module, nn.Parameter) else list(module.parameters())


def _walk(module: nn.Module, path: str, section: str, beside: bool, trace: Trace) -> Iterator[tuple]:
    """(modules with their paths, words, section, beside) of each stage below a module."""
    for name, parameter in module.named_parameters(recurse=False):
        words = Words(named_parameter(name), " × ".join(map(str, parameter.shape)), "embed")
        yield [(_join(path, name), parameter)], words, section, True
    for name, child in module.named_children():
        place = _join(path, name)
        kinds = {kind.__name__ for kind in type(child).__mro__}
        aside = beside or name in _BESIDE_NAMES or bool(kinds & _BESIDE) or _is_encoder(module, name)
        if isinstance(child, nn.ModuleList):
            yield from ((run, words, section, aside) for run, words in _runs(child, place, name))
        elif isinstance(child, nn.ParameterDict):
            tokens = [(_join(place, key), value) for key, value in child.items()]
            words = Words(named_parameter(name), ", ".join(child.keys()), "condition")
            yield from [(tokens, words, section, True)] if tokens else []
        elif _is_made_of_blocks(child) or _is_passed_by(place, child, trace):
            yield from _walk(child, place, section if isinstance(child, nn.ModuleDict) else place, aside, trace)
        else:
            yield [(place, child)], describe(child, name), section, aside


def _is_encoder(module: nn.Module, name: str) -> bool:
    """Whether it is the encoder that a language model's own blocks attend to."""
    return name == "encoder" and type(module).__name__ == "MaskedDiffusionLM"


def _is_passed_by(path: str, module: nn.Module, trace: Trace) -> bool:
    """Whether parts of it were called, and it was not."""
    return path not in trace.order and any(_join(path, name) in trace.order for name, _ in module.named_children())


def _is_made_of_blocks(module: nn.Module) -> bool:
    """Whether it is no block itself, and holds a list of modules, or what does."""
    kind = type(module).__name__
    if "block" in kind.lower() or kind == "TokenStack" or isinstance(module, nn.Sequential):
        return False
    parts = [each for each in module.modules() if each is not module]
    return any(isinstance(each, nn.ModuleList | nn.ModuleDict) and len(each) for each in parts)


def _runs(blocks: nn.ModuleList, path: str, name: str) -> Iterator[tuple[list, Words]]:
    """Neighbours that are alike: of one class, and, unless they are single layers, of the same shapes."""

    def sort(pair: tuple[str, nn.Module]) -> tuple:
        shapes = () if not list(pair[1].children()) else tuple(tuple(p.shape) for p in pair[1].parameters())
        return type(pair[1]), shapes

    numbered = [(_join(path, key), block) for key, block in blocks.named_children()]
    for _, group in itertools.groupby(numbered, key=sort):
        run = list(group)
        words = describe(run[0][1], name)
        yield run, words


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
