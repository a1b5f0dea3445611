"""An optimizer's file, also where some parameters had no gradient yet, and weights with two names."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fastdiff.models.pretrained import untied_state
from fastdiff.training.checkpoint import load_optimizer, load_weights, save_optimizer, save_weights


class Two(nn.Module):
    def __init__(self, width=3):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Parameter(torch.randn(2, width)), nn.Parameter(torch.randn(width))


def optimizer_of(model):
    names = {parameter: name for name, parameter in model.named_parameters()}
    return torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.01, fused=True), names


def step(model, optimizer, second):
    optimizer.zero_grad()
    loss = model.first.square().sum() + (model.second.sin().sum() if second else 0)
    loss.backward()
    optimizer.step()


@pytest.mark.parametrize("second", [False, True])
def test_parameters_without_a_gradient_have_no_state(tmp_path, second):
    """One parameter is first used after resuming, or never: the run equals one that was not interrupted."""
    straight, path = Two(), tmp_path / "optimizer.safetensors"
    optimizer, names = optimizer_of(straight)
    for _ in range(3):
        step(straight, optimizer, False)
    save_optimizer(optimizer, names, path)
    assert {key.split("|")[1] for key in load_file(path)} == {"first"}
    resumed = Two()
    resumed.load_state_dict(straight.state_dict())
    fresh, names = optimizer_of(resumed)
    load_optimizer(fresh, names, path)
    for model, used in ((straight, optimizer), (resumed, fresh)):
        for _ in range(2):
            step(model, used, second)
    assert torch.equal(straight.first, resumed.first) and torch.equal(straight.second, resumed.second)
    assert (resumed.second in fresh.state and len(fresh.state[resumed.second]) > 0) == second


def test_a_file_before_the_first_step(tmp_path):
    optimizer, names = optimizer_of(Two())
    save_optimizer(optimizer, names, tmp_path / "optimizer.safetensors")
    load_optimizer(optimizer, names, tmp_path / "optimizer.safetensors")
    assert not optimizer.state


def test_state_of_another_model_is_refused(tmp_path):
    model, path = Two(), tmp_path / "optimizer.safetensors"
    optimizer, names = optimizer_of(model)
    step(model, optimizer, True)
    save_optimizer(optimizer, names, path)
    wider, wider_names = optimizer_of(Two(width=4))
    with pytest.raises(ValueError, match=r"exp_avg\w* of 'first' in shape \[2, 3\]; expected \[2, 4\]") as error:
        load_optimizer(wider, wider_names, path)
    assert "\n" not in str(error.value) and not wider.state
    save_file({**load_file(path), "step|third": torch.tensor(1.0)}, path)
    with pytest.raises(ValueError, match="holds the state of 'third', which the model has not"):
        load_optimizer(optimizer, names, path)


class Tied(nn.Module):
    """One weight under two names, another that only shares its memory, and two empty tensors."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.b.weight = self.a.weight
        self.shared = nn.Parameter(self.a.weight.data)
        self.register_buffer("empty", torch.empty(0))
        self.register_buffer("hollow", torch.empty(0))


def test_tied_tensors_have_one_name(tmp_path):
    model, other = Tied(), Tied()
    assert list(untied_state(model)) == ["shared", "empty", "hollow"]
    save_weights(model, tmp_path / "model.safetensors")
    load_weights(other, tmp_path / "model.safetensors")
    for name in ("a", "b"):
        assert torch.equal(getattr(other, name).weight, model.a.weight)
    with torch.device("meta"):
        assert set(untied_state(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))) == {
            "0.weight", "0.bias", "1.weight", "1.bias",
        }  # fmt: skip
    square = nn.Module()
    square.register_buffer("w", torch.randn(2, 2))
    square.register_buffer("turned", square.w.T)
    assert set(untied_state(square)) == {"w", "turned"}  # other values under the same address
