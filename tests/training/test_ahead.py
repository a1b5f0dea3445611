"""The thread that prepares the next step's batches: same runs, errors at their step, nothing left behind."""

import threading

import pytest
import torch
from safetensors.torch import load_file

from fastdiff.training import checkpoint as checkpoints
from fastdiff.training import trainer as trainers
from fastdiff.training.ahead import Ahead, pays


@pytest.fixture
def prepared(monkeypatch):
    """Trainers prepare batches ahead, whatever the machine."""
    monkeypatch.setattr(trainers, "pays", lambda device: True)


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("next batch")]


def test_results_in_order_and_one_step_ahead():
    made, main = [], threading.current_thread()

    def make(step):
        made.append((step, threading.current_thread() is main))
        return 10 * step

    ahead = Ahead(make, True)
    assert [ahead.take(step, following=step < 3) for step in (2, 3)] == [20, 30]
    assert made == [(2, True), (3, False)]
    assert ahead.take(7, following=True) == 70 and ahead.take(9) == 90  # another step than what was prepared
    ahead.close()
    assert not threads() and ahead.take(1, following=True) == 10 and not threads()


def test_an_error_belongs_to_its_step():
    def make(step):
        if step == 1:
            raise OSError("gone")
        return step

    ahead = Ahead(make, True)
    assert ahead.take(0, following=True) == 0
    ahead.settle()
    with pytest.raises(OSError, match="gone"):
        ahead.take(1, following=True)
    assert ahead.take(2) == 2
    ahead.close()


def weights(folder):
    newest = checkpoints.list_checkpoints(folder / "checkpoints")[-1]
    return newest.name, load_file(newest / checkpoints.WEIGHTS)


def test_a_run_is_the_same_and_resumes_the_same(make_trainer, tmp_path, monkeypatch):
    """Bit for bit: at once without the thread, and in two parts with it."""
    options = ("--training.max_steps", 8, "--training.accumulation_steps", 2)
    make_trainer(tmp_path / "plain", *options).train(stop_at=7)
    monkeypatch.setattr(trainers, "pays", lambda device: True)
    make_trainer(tmp_path / "ahead", *options).train(stop_at=3)
    make_trainer(tmp_path / "ahead", *options, "--training.resume", "true").train(stop_at=7)
    (name, plain), (other, ahead) = weights(tmp_path / "plain"), weights(tmp_path / "ahead")
    assert name == other == "step_7" and plain.keys() == ahead.keys()
    assert all(torch.equal(plain[key], ahead[key]) for key in plain)
    assert not threads()


def test_data_that_fails_ends_the_run_at_its_step(make_trainer, tmp_path, prepared):
    trainer = make_trainer(tmp_path / "run", "--training.max_steps", 9)
    batch = trainer.task.batch

    def fails(step, slots):
        if step == 4:
            raise OSError("the data has gone")
        return batch(step, slots)

    trainer.task.batch = fails
    with pytest.raises(OSError, match="the data has gone"):
        trainer.train()
    assert trainer.steps_done == 4 and weights(tmp_path / "run")[0] == "step_4"
    assert not threads()
    trainer.folder.unlock()


def test_it_is_used_where_a_core_is_free(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1}, raising=False)
    for count, expected in ((1, True), (2, False)):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=count: count)
        assert pays(torch.device("cpu")) == expected
        assert pays(torch.device("cuda"))
