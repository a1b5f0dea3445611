"""The choice of a backend: where it holds, in threads, in autograd, in tasks and under torch.compile."""

import asyncio
import sys
import threading
import warnings

import pytest
import torch

import fastdiff
from fastdiff import backends, use_backend
from fastdiff.ops import _adaln_backends, adaln


def need_packages_of_models():
    """Nothing else of the operators' tests needs these."""
    for package in ("safetensors", "transformers"):
        pytest.importorskip(package, reason=f"NOT TESTED: operators in threads of models: {package} is not installed")


@pytest.fixture(autouse=True)
def as_it_was():
    before = backends.requested()
    yield
    use_backend(before)


@pytest.fixture
def ran(monkeypatch):
    """The backends that operators chose, with the thread: (operator, backend, thread)."""
    chosen, search = [], backends.select

    def select(operator, *rest):
        chosen.append((operator, search(operator, *rest), threading.get_ident()))
        return chosen[-1][1]

    for module in ("_checks", "token_sampling", "unmask", "eos_log_prob"):
        monkeypatch.setattr(sys.modules[f"fastdiff.ops.{module}"], "select", select)
    return chosen


X, M = torch.randn(2, 5, 16), torch.randn(2, 16)


def test_a_call_alone_holds_until_the_next_and_with_gives_back(ran):
    use_backend("reference")
    adaln(X, M, M)
    with use_backend("cpu"):
        adaln(X, M, M)
    adaln(X, M, M)
    fastdiff.use_backend("auto")
    adaln(X, M, M)
    assert [backend for _, backend, _ in ran] == ["reference", "cpu", "reference", "cpu"]
    outer = use_backend("reference")
    with outer, use_backend("cuda"):
        pass
    assert backends.requested() == "auto"
    with outer:  # once more
        assert backends.requested() == "reference"
    with pytest.raises(KeyError), use_backend("triton"):
        raise KeyError
    assert backends.requested() == "auto"


def test_an_unknown_name_raises_at_the_call_and_changes_nothing():
    use_backend("reference")
    with pytest.raises(ValueError, match="use_backend: unknown backend 'no such thing'; expected one of auto"):
        use_backend("no such thing")
    assert backends.requested() == "reference"


def test_threads_and_tasks_have_their_own():
    seen = {}

    async def task(name):
        with use_backend(name):
            await asyncio.sleep(0)
            seen[name] = backends.requested()

    async def both():
        await asyncio.gather(task("reference"), task("cpu"))

    with use_backend("triton"):
        thread = threading.Thread(target=lambda: seen.update(thread=backends.requested()))
        thread.start()
        thread.join()
        asyncio.run(both())
    assert seen == {"thread": "auto", "reference": "reference", "cpu": "cpu"}


def test_eight_threads_generate_each_on_its_backend(ran):
    need_packages_of_models()
    from generation.plain import randomise, tiny

    from fastdiff.generation import MaskedDiffusionGenerationConfig, generate

    model, prompt = randomise(tiny("llada"), 7).float(), torch.tensor([[5, 9, 4]])
    config = MaskedDiffusionGenerationConfig(max_new_tokens=6, num_inference_steps=3, temperature=1.0, seed=3)

    def run():
        return generate(model, prompt, None, config).sequences

    names, alone = ["reference", "cpu", "auto", "reference"] * 2, {}
    for name in set(names):
        with use_backend(name):
            alone[name] = run()
    results, barrier = [None] * len(names), threading.Barrier(len(names))

    def work(place, name):
        barrier.wait()
        with use_backend(name):
            for _ in range(3):
                results[place] = run(), threading.get_ident()

    threads = [threading.Thread(target=work, args=each) for each in enumerate(names)]
    ran.clear()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, (result, identity) in zip(names, results, strict=True):
        chosen = {backend for _, backend, thread in ran if thread == identity}
        assert chosen == {"cpu" if name == "auto" else name}
        assert torch.equal(result, alone[name])
    assert backends.requested() == "auto"


def test_backward_runs_on_the_backend_of_its_forward_in_any_thread(monkeypatch):
    used, native = [], _adaln_backends.IMPLEMENTATIONS["cpu"]
    backward = native.adaln_backward
    monkeypatch.setattr(native, "adaln_backward", lambda *a: (used.append(threading.get_ident()), backward(*a))[1])
    x = X.clone().requires_grad_()
    with use_backend("cpu"):
        loss = adaln(x, M, M).square().sum()

    def work():
        use_backend("reference")
        loss.backward()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(used) == 1 and x.grad.isfinite().all()


def test_what_a_checkpoint_computes_again_runs_on_the_backend_of_its_forward(ran):
    need_packages_of_models()
    from fastdiff.models import DiT, DiTConfig

    model = DiT(DiTConfig(
        input_size=4, patch_size=2, in_channels=1, hidden_size=16, depth=2, num_heads=2, num_classes=3,
        gradient_checkpointing=True,
    ))  # fmt: skip
    with use_backend("reference"):
        loss = model(torch.randn(2, 1, 4, 4), torch.tensor([1, 2]), torch.tensor([0, 1])).square().mean()
    ran.clear()
    thread = threading.Thread(target=loss.backward)  # as autograd's own threads on a GPU
    thread.start()
    thread.join()
    assert {backend for _, backend, _ in ran} == {"reference"} and backends.requested() == "auto"


def test_compiled_code_follows_the_choice():
    graphs = []

    def count(graph, inputs):
        graphs.append(" ".join(str(node.target) for node in graph.graph.nodes))
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(lambda x, m: adaln(x, m, m), backend=count, fullgraph=True)
    for name, times in (("auto", 2), ("reference", 2), ("cpu", 2), ("reference", 1), ("auto", 1)):
        with use_backend(name):
            for _ in range(times):
                compiled(X, M)
    assert len(graphs) == 3
    assert ["fastdiff.adaln_forward" in graph for graph in graphs] == [True, False, True]
    in_thread = threading.Thread(target=lambda: (use_backend("reference"), compiled(X, M)))
    in_thread.start()
    in_thread.join()
    assert len(graphs) == 3
    with use_backend("cuda"), pytest.raises(Exception, match="backend 'cuda' was asked for and cannot run"):
        compiled(X, M)


def test_compiled_code_that_chooses_itself_leaves_the_graph():
    def function(x, m):
        with use_backend("reference"):
            inner = adaln(x, m, m), backends.requested()
        return *inner, adaln(x, m, m), backends.requested()

    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inner, name, outer, after = torch.compile(function, backend="eager")(X, M)
    assert (name, after) == ("reference", "auto")
    torch.testing.assert_close(inner, outer)
