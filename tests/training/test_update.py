"""The end of a step in one pass over the weights: against accelerate's clipping, torch's AdamW and `Ema.update`."""

import torch
from safetensors.torch import load_file

from fastdiff.backends import use_backend
from fastdiff.training import checkpoint as checkpoints


def tensors_of(folder):
    newest = checkpoints.list_checkpoints(folder / "checkpoints")[-1]
    files = (checkpoints.WEIGHTS, checkpoints.AVERAGED, checkpoints.OPTIMIZER)
    return {(file, name): tensor for file in files for name, tensor in load_file(newest / file).items()}


def assert_alike(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-3, atol=2e-5, msg=str(name))


def test_a_run_is_that_of_torchs_optimizer(make_trainer, tmp_path):
    """Weights, averages, moments and their names, with clipping; and a run of the one goes on as the other."""
    options = ("--training.max_steps", 9, "--training.weight_decay", 0.1, "--training.max_grad_norm", 0.3)
    ours, plain, mixed = tmp_path / "ours", tmp_path / "plain", tmp_path / "mixed"
    make_trainer(ours, *options).train(stop_at=6)
    with use_backend("reference"):
        make_trainer(plain, *options).train(stop_at=6)
        make_trainer(mixed, *options).train(stop_at=3)
    make_trainer(mixed, *options, "--training.resume", "true").train(stop_at=6)
    assert_alike(tensors_of(ours), tensors_of(plain))
    assert_alike(tensors_of(mixed), tensors_of(plain))


def test_a_step_without_any_gradient_moves_the_average_alone(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path / "run")
    weight = trainer.task.model.final_layer.linear.bias
    before = weight.detach().clone()
    average = trainer.ema.module.final_layer.linear.bias
    average.fill_(1.0)
    assert trainer._update(0) == 0
    assert torch.equal(weight, before)
    torch.testing.assert_close(average, torch.lerp(torch.ones_like(before), before, 0.9))  # the first decay is 0.1
    trainer.folder.unlock()


def test_parameters_without_a_gradient_stay_and_their_average_follows(make_trainer, tmp_path):
    def run(backend):
        with use_backend(backend):
            trainer = make_trainer(tmp_path / backend, "--training.weight_decay", 0.1)
            table = trainer.task.model.y_embedder.embedding_table.weight
            with torch.no_grad():
                trainer.ema.module.y_embedder.embedding_table.weight.zero_()
            before = table.detach().clone()
            table.requires_grad_(False)
            trainer.train_step(0)
            trainer.folder.unlock()
        average = trainer.ema.module.y_embedder.embedding_table.weight
        assert torch.equal(table, before) and table not in trainer.optimizer.state
        return average

    torch.testing.assert_close(run("cpu"), run("reference"))
