"""Text to image, in images/s: training and sampling of LLM2DiT and latent Fashion-MNIST diffusion, ours and plain.

The plain models and loops are those that the tests hold ours against (tests/models/plain_*.py): eager PyTorch with
scaled_dot_product_attention, as the authors of both wrote them. A step is theirs: noise, autocast, forward, mean
squared error, backward, torch's AdamW as it comes, and for the latent system a moving average a parameter at a time.
"""

from collections.abc import Callable

import measure
import pytest
import torch
from accelerate import Accelerator
from models import plain_latent_diffusion as latent
from models import plain_llm2dit as llm2dit
from torch import Tensor, nn
from transformers import GPT2Config, GPT2Model

from fastdiff.device import autocast
from fastdiff.diffusion import Diffusion, DiffusionConfig, sample_classes, sample_prompts
from fastdiff.models import TextToImage
from fastdiff.training.ema import Ema
from fastdiff.training.setup import parameter_groups
from fastdiff.training.update import WeightUpdate

BF16 = torch.bfloat16
LEVELS = Diffusion(DiffusionConfig("epsilon", "linear", time_scale=1.0))
IMAGES = Diffusion(DiffusionConfig("sample", "beta", time_scale=100.0))
TOKENS = 16  # of the longest caption
Update = Callable[[int], object]


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().to(measure.DEVICE).train()


def awake(linear: nn.Linear) -> None:
    """A final layer of zeros lets no gradient through."""
    nn.init.normal_(linear.weight, std=0.02, generator=torch.Generator(measure.DEVICE).manual_seed(0))


def as_trainers_do(model: nn.Module) -> Update:
    """The end of a step of fastdiff's trainer, for what is trained of a model; it always keeps an average."""
    accelerator = Accelerator(cpu=measure.DEVICE == "cpu")
    optimizer = accelerator.prepare(torch.optim.AdamW(parameter_groups(model, 0.01), lr=1e-4, fused=True))
    return WeightUpdate(accelerator, model, optimizer, Ema(model, 0.999), 0.0)


def plainly(model: nn.Module, average: float | None) -> Update:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.01)
    kept = [] if average is None else [parameter.detach().clone() for parameter in trained]

    @torch.no_grad()
    def update(step: int) -> None:
        optimizer.step()
        optimizer.zero_grad()
        for mean, parameter in zip(kept, trained, strict=False):
            mean.mul_(average).add_(parameter, alpha=1 - average)

    return update


def stepping(loss: Callable[[], Tensor], update: Update) -> Callable[[], float]:
    done = [0]

    def step() -> float:
        value = loss()
        value.backward()
        update(done[0])
        done[0] += 1
        return value.item()

    return step


def check(steps: dict[str, Callable[[], float]]) -> None:
    """Ours runs fused operators, the plain ones none, and all see the same loss: raises otherwise."""
    for name, step in steps.items():
        with torch.profiler.profile() as profile:
            loss = step()
        fused = any(event.name.startswith("fastdiff") for event in profile.events())
        assert fused == name.startswith("fastdiff"), f"{name}: the wrong operators ran"
        assert 0.3 < loss < 3.0, f"{name}: loss {loss}; expected about 1"


# ------------------------------------------------------------------------------------------------ LLM2DiT
class Captions:
    """Images, levels and captions of one batch, each with a text of its own."""

    def __init__(self, batch: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x0 = torch.randn(batch, 3, 32, 32, generator=generator).to(measure.DEVICE)
        self.level = torch.randint(1, 1001, (batch,), generator=generator).to(measure.DEVICE)
        lengths = torch.randint(6, TOKENS + 1, (batch, 1), generator=generator)
        self.mask = (torch.arange(TOKENS) < lengths).to(measure.DEVICE)
        self.states = torch.randn(batch, TOKENS, 768, generator=generator).to(measure.DEVICE)
        self.ids = torch.randint(50257, (batch, TOKENS), generator=generator).to(measure.DEVICE)


def our_q_former(data: Captions, states: Callable[[], Tensor]) -> Callable[[], float]:
    model = seeded(lambda: TextToImage.from_preset("llm2dit"))
    model.dit.requires_grad_(False)
    awake(model.dit.final_layer.linear)

    def predict(x: Tensor, time: Tensor) -> Tensor:
        with autocast(measure.DEVICE, BF16):
            return model(x, time, text_states=states(), text_mask=data.mask)

    def loss() -> Tensor:
        return LEVELS.loss(predict, data.x0, data.level - 1, torch.randn_like(data.x0)).mean()

    return stepping(loss, as_trainers_do(model))


def plain_q_former(data: Captions, states: Callable[[], Tensor]) -> Callable[[], float]:
    model = seeded(llm2dit.PlainLLM2DiT)
    model.requires_grad_(False)
    model.query_embedder.requires_grad_(True)
    awake(model.final_layer.linear)
    products = llm2dit.schedule(1000)[1].float().to(measure.DEVICE)

    def loss() -> Tensor:
        noise, kept = torch.randn_like(data.x0), products[data.level][:, None, None, None]
        with autocast(measure.DEVICE, BF16):
            noisy = kept.sqrt() * data.x0 + (1 - kept).sqrt() * noise
            predicted = model(noisy, data.level / 1000, text_states=states(), text_mask=data.mask)
        return nn.functional.mse_loss(predicted.float(), noise)

    return stepping(loss, plainly(model, None))


def test_q_former_step(benchmark, report):
    """The DiT is frozen. "in the loop": a GPT-2 (random weights) reads the captions at every step, as one would first
    write it; else its states are there already."""
    batch, data = 16, Captions(16)
    reader = seeded(lambda: GPT2Model(GPT2Config())).eval()

    @torch.no_grad()
    def read() -> Tensor:
        return reader(data.ids, attention_mask=data.mask.long()).last_hidden_state

    steps = {
        "fastdiff": our_q_former(data, lambda: data.states),
        "plain": plain_q_former(data, lambda: data.states),
        "in the loop": plain_q_former(data, read),
    }
    check(steps)
    seconds = measure.in_turns(benchmark, steps, rounds=6)
    case = f"Q-Former's training step, DiT frozen, 32x32x3, batch {batch}, {TOKENS} tokens, bf16"
    report(measure.rate_row(case, seconds, batch, {"plain": 1.3, "in the loop": 1.3}))


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_sampling_by_text(scale, benchmark, report):
    """Ten prompts against ten class labels, the same model and steps. The prompts' states are there, and are read."""
    count, steps = 10, 20
    model = seeded(lambda: TextToImage.from_preset("llm2dit")).eval()
    awake(model.dit.final_layer.linear)
    data, labels = Captions(count), torch.arange(count).to(measure.DEVICE)
    options = dict(num_inference_steps=steps, guidance_scale=scale, sampler="ddpm", autocast_dtype=BF16)

    def by_text() -> Tensor:
        with torch.no_grad(), autocast(measure.DEVICE, BF16):
            condition = model.condition(data.states, data.mask)
        return sample_prompts(model, LEVELS, condition, **options)

    def by_label() -> Tensor:
        return sample_classes(model.dit, LEVELS, labels, **options)

    seconds = measure.in_turns(benchmark, {"fastdiff": by_text, "by class label": by_label}, rounds=6)
    case = f"sampling LLM2DiT by text, {count} prompts, {steps} steps, guidance {scale:g}, bf16"
    report(measure.rate_row(case, seconds, count, {"by class label": 0.95}))


# ------------------------------------------------------------------------------------------------ latents
def test_latent_step(benchmark, report):
    batch = 128
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(batch, 4, 8, 8, generator=generator).to(measure.DEVICE)
    text = nn.functional.one_hot(torch.arange(batch) % 10, 10).float().to(measure.DEVICE)
    t = torch.rand(batch, generator=generator).to(measure.DEVICE)
    ours, plain = seeded(lambda: TextToImage.from_preset("fmnist_t2i")), seeded(latent.PlainLatentDiffusion)

    def predict(x: Tensor, time: Tensor, dropped: Tensor) -> Tensor:
        with autocast(measure.DEVICE, BF16):
            return ours(x, time, text_states=text[:, None], dropped=dropped)

    def drawn() -> tuple[Tensor, Tensor]:
        return torch.randn_like(x0), torch.rand(batch, device=measure.DEVICE) < 0.1

    def our_loss() -> Tensor:
        noise, dropped = drawn()
        return IMAGES.loss(lambda x, time: predict(x, time, dropped), x0, t, noise).mean()

    def plain_loss() -> Tensor:
        noise, dropped = drawn()
        with autocast(measure.DEVICE, BF16):
            return latent.loss(plain, x0, t, noise, text, dropped)

    steps = {
        "fastdiff": stepping(our_loss, as_trainers_do(ours)),
        "plain": stepping(plain_loss, plainly(plain, 0.999)),
    }
    check(steps)
    seconds = measure.in_turns(benchmark, steps, rounds=4)
    case = f"training step of latent Fashion-MNIST diffusion, 384 x 12, 64 tokens, batch {batch}, bf16"
    report(measure.rate_row(case, seconds, batch, {"plain": 1.5}))
