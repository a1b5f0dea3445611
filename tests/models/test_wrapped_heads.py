"""Heads that somebody wrapped: peft's adapters, torch's parametrizations and hooks, DDP and FSDP.

Loss, gradients, tokens, length probe and likelihood are those of the wrapped module's own forward pass, and of the
model into which an adapter is merged.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

from fastdiff.diffusion import Diffusion, DiffusionConfig, MaskedDiffusion, MaskedDiffusionConfig, sample_classes
from fastdiff.evaluation.likelihood import likelihood_bound
from fastdiff.generation import MaskedDiffusionGenerationConfig, generate
from fastdiff.generation.length import LengthPredictor
from fastdiff.models import DiT, MaskedDiffusionLM, MaskedDiffusionLMConfig, QGFDConfig
from fastdiff.models.qgfd.adapters.text import TextAdapter, TextAdapterConfig
from fastdiff.nn import LanguageModelHead, TimestepEmbedding
from fastdiff.nn import head as head_module

MASK = 3
TOLERANCE = dict(rtol=1e-4, atol=2e-5)  # seen: 3e-6 (fp32, losses of size 10)


def model(**options):
    torch.manual_seed(0)
    fields = dict(
        architecture="llada", vocab_size=61, hidden_size=32, num_attention_heads=4, num_hidden_layers=1,
        intermediate_size=48, max_position_embeddings=24, length_format="eos_fill", initializer_range=0.3,
    )  # fmt: skip
    return MaskedDiffusionLM(MaskedDiffusionLMConfig(**{**fields, **options})).eval()


def adapted(built, **options):
    """A peft model whose adapter does something."""
    peft = pytest.importorskip("peft", reason="NOT TESTED: peft is not installed (the extra 'lora')")
    torch.manual_seed(1)
    wrapped = peft.get_peft_model(built, peft.LoraConfig(r=4, **options))
    for _, parameter in trained(wrapped):
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    return wrapped.eval()


def trained(module):
    return [(name, p) for name, p in module.named_parameters() if p.requires_grad]


IDS = torch.randint(5, 61, (3, 10), generator=torch.Generator().manual_seed(0))
MASKED = IDS.masked_fill(torch.rand(IDS.shape, generator=torch.Generator().manual_seed(1)) < 0.5, MASK)
LABELS = torch.where(MASKED == MASK, IDS, -100)
WEIGHT = torch.tensor([[1.0], [2.0], [0.5]])


def plain_loss(built, label_smoothing=0.0):
    """The loss from all logits of the head's own forward pass."""
    states = built.predicting_states(built.hidden_states(MASKED))
    logits = built.lm_head(states)[..., torch.arange(61) != MASK]
    targets = torch.where(LABELS > MASK, LABELS - 1, LABELS)
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none", label_smoothing=label_smoothing)
    return (losses.view(LABELS.shape) * WEIGHT).sum() / (LABELS >= 0).sum()


def loss_of(built, **options):
    return built(MASKED, labels=LABELS, row_weight=WEIGHT, **options).loss


def assert_own_forward(built):
    for smoothing in (0.0, 0.1):
        gradients = []
        for loss in (loss_of(built, label_smoothing=smoothing), plain_loss(built, smoothing)):
            built.zero_grad()
            loss.backward()
            gradients.append([loss.detach(), *(p.grad for _, p in trained(built))])
        assert all(g is not None for g in gradients[0])
        torch.testing.assert_close(*gradients, **TOLERANCE)


def everything(built):
    """What is drawn and measured: tokens (greedy, at random, guided), the probe, two length rules, a likelihood."""
    prompts, results = IDS[:, :4], []
    for options in ({}, dict(temperature=0.7, seed=3), dict(guidance_scale=1.5)):
        config = MaskedDiffusionGenerationConfig(max_new_tokens=6, num_inference_steps=3, **options)
        results.append(generate(built, prompts, None, config).sequences.double())
    for rule in ("argmax", "rho"):
        predictor = LengthPredictor(built, window=8, rule=rule)
        probe = predictor.probe(prompts)
        results += [probe.end_log_prob.double(), torch.tensor(predictor(prompts).bounds).double()]
    process = MaskedDiffusion(MaskedDiffusionConfig(), MASK)
    results.append(torch.tensor(likelihood_bound(built, process, IDS, num_samples=32).nats_per_token))
    return results


ADAPTERS = {
    "LoRA": dict(target_modules=["lm_head"]),
    "LoRA with dropout and a bias": dict(target_modules=["lm_head", "q_proj"], lora_dropout=0.2, bias="lora_only"),
    "DoRA": dict(target_modules=["lm_head"], use_dora=True),
    "modules_to_save": dict(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "trainable tokens": dict(target_modules=["q_proj"], trainable_token_indices={"lm_head": [2, 7]}),
    "trainable tokens, tied": dict(target_modules=["q_proj"], trainable_token_indices=[2, 7]),
    "saved embedding, tied": dict(
        target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True
    ),
}


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")
@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_of_the_head_counts_everywhere(name):
    options = dict(tie_word_embeddings="tied" in name, head_bias="bias" in name)
    wrapped = adapted(model(**options), **ADAPTERS[name])
    assert_own_forward(wrapped)
    before, loss = everything(wrapped), loss_of(wrapped).detach()
    assert abs(loss - loss_of(model(**options))) > 0.01  # it does something
    merged = wrapped.merge_and_unload()
    assert LanguageModelHead(merged.lm_head).plain is not None
    torch.testing.assert_close(loss_of(merged).detach(), loss, **TOLERANCE)
    torch.testing.assert_close(everything(merged), before, **TOLERANCE)


def weight_norm_by_hooks(linear):
    with pytest.warns(FutureWarning, match="weight_norm"):
        return nn.utils.weight_norm(linear)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def own_class(linear):
    linear.__class__ = Doubled
    return linear


def own_forward(linear):  # as accelerate's offloading does
    inner = linear.forward
    linear.forward = lambda x: 3 * inner(x)
    return linear


def output_hook(linear):
    linear.register_forward_hook(lambda module, inputs, output: output - 1.5 * output[..., :1].detach())
    return linear


WRAPPERS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "weight_norm by hooks": weight_norm_by_hooks,
    "pruning": lambda linear: prune.l1_unstructured(linear, "weight", 0.5),
    "a class of one's own": own_class,
    "a forward of one's own": own_forward,
    "a hook on the output": output_hook,
    "torch.compile": lambda linear: torch.compile(linear, backend="eager"),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapped_head_is_called(name):
    built, untouched = model(head_bias=True), model(head_bias=True)
    built.lm_head = WRAPPERS[name](built.lm_head)
    with torch.no_grad():
        for key, parameter in built.lm_head.named_parameters():
            if "original0" in key or key.endswith("weight_g"):
                parameter.mul_(2)
    assert_own_forward(built)
    fused = LanguageModelHead(built.lm_head).plain is not None
    assert fused == (name in ("weight_norm", "spectral_norm"))
    if not fused and name != "torch.compile":
        with pytest.raises(ValueError, match="lm_head: a .*, whose weight does not say all that it does; use model.h"):
            built.head_weight  # noqa: B018
    with torch.no_grad():  # the same function as a plain layer, from what it gives for the unit vectors
        bias = built.lm_head(torch.zeros(32))
        untouched.lm_head.weight.copy_((built.lm_head(torch.eye(32)) - bias).T)
        untouched.lm_head.bias.copy_(bias)
    torch.testing.assert_close(everything(built), everything(untouched), **TOLERANCE)


def test_the_logits_of_a_wrapped_head_are_made_some_rows_at_a_time(monkeypatch):
    built = model()
    fused, states = LanguageModelHead(built.lm_head), torch.randn(4, 9, 32)
    called = LanguageModelHead(own_class(model().lm_head))
    seen = []
    called.module.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    monkeypatch.setattr(head_module, "_LOGITS_AT_ONCE", 61 * 4 * 5)  # five rows
    found = called.eos_log_prob(states, (2, 5), suppress_tokens=(MASK,))
    torch.testing.assert_close(found, fused.eos_log_prob(2 * states, (2, 5), suppress_tokens=(MASK,)), **TOLERANCE)
    assert max(shape[1] for shape in seen) == 5 and sum(shape[1] for shape in seen) == 36
    options = dict(temperature=0.8, seed=5, suppress_tokens=(MASK,), sequence_ids=torch.arange(36) // 9)
    options["positions"] = torch.arange(36) % 9
    drawn = [head.sample(x.flatten(0, 1), **options) for head, x in ((called, states), (fused, 2 * states))]
    assert torch.equal(drawn[0].token, drawn[1].token)
    torch.testing.assert_close(drawn[0].log_prob, drawn[1].log_prob, **TOLERANCE)
    ids = torch.tensor([4, 60])
    torch.testing.assert_close(called.logits_of(states, ids), fused.logits_of(2 * states, ids), **TOLERANCE)
    empty = called.eos_log_prob(states[:0], (2,))
    assert empty.shape == (0, 9)


def test_a_batch_without_masks_costs_a_wrapped_head_nothing():
    wrapped = adapted(model(), target_modules=["lm_head"])
    loss = wrapped(IDS, labels=torch.full_like(IDS, -100)).loss
    loss.backward()
    assert loss == 0 and all((p.grad == 0).all() for _, p in trained(wrapped))
    with pytest.raises(ValueError, match=r"targets\[0\]: got 61 in a masked row; expected an id from 0 to 60"):
        wrapped(IDS, labels=torch.full_like(IDS, 61))
    with pytest.raises(ValueError, match=r"an id that suppress_tokens names"):
        wrapped(IDS, labels=torch.full_like(IDS, MASK))


def test_a_wrapped_head_computes_under_autocast():
    wrapped = adapted(model(), target_modules=["lm_head"])
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(wrapped)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, loss_of(wrapped), rtol=0.02, atol=0)  # seen: 3e-3


def test_the_loss_still_compiles_into_one_graph():
    built = model()
    compiled = torch.compile(built, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(MASKED, labels=LABELS).loss, built(MASKED, labels=LABELS).loss, **TOLERANCE)


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", ["DDP", "FSDP", "FSDP of the head by itself", "DDP of LoRA"])
def test_training_in_several_processes_gives_the_same_loss(one_process, kind):
    from torch.distributed.fsdp import fully_shard

    def build():
        return adapted(model(), target_modules=["lm_head", "q_proj"]) if "LoRA" in kind else model()

    alone, wrapped = build(), build()
    if "FSDP" in kind:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        if "head" in kind:
            fully_shard(wrapped.lm_head, mesh=mesh)
        wrapped = fully_shard(wrapped, mesh=mesh)
    else:
        wrapped = nn.parallel.DistributedDataParallel(wrapped)
    gradients = []
    for each in (alone, wrapped):
        loss = loss_of(each)
        loss.backward()
        grads = [p.grad for _, p in trained(each)]
        gradients.append([loss.detach(), *(g.full_tensor() if hasattr(g, "full_tensor") else g for g in grads)])
    torch.testing.assert_close(*gradients, **TOLERANCE)
    config = MaskedDiffusionGenerationConfig(max_new_tokens=2)
    message = "a part; expected a whole one" if "FSDP" in kind else "got a DistributedDataParallel; .* model.module"
    with pytest.raises(ValueError, match=message) as caught:
        generate(wrapped, IDS[:, :4], None, config)
    assert "\n" not in str(caught.value)
    if "FSDP" not in kind:
        assert torch.equal(
            generate(wrapped.module, IDS[:, :4], None, config).sequences,
            generate(alone, IDS[:, :4], None, config).sequences,
        )


def test_an_adapter_of_the_whole_models_input_is_refused():
    peft = pytest.importorskip("peft", reason="NOT TESTED: peft is not installed (the extra 'lora')")
    config = peft.PromptTuningConfig(
        num_virtual_tokens=3, num_layers=1, token_dim=32, num_attention_heads=4, task_type="FEATURE_EXTRACTION"
    )
    wrapped = peft.get_peft_model(model(), config)
    process = MaskedDiffusion(MaskedDiffusionConfig(), MASK)
    for call in (
        lambda: generate(wrapped, IDS, None, MaskedDiffusionGenerationConfig(max_new_tokens=2)),
        lambda: likelihood_bound(wrapped, process, IDS, num_samples=32),
        lambda: LengthPredictor(wrapped, window=4).probe(IDS),
    ):
        with pytest.raises(ValueError, match="with PromptTuningConfig, which changes inputs .*; expected adapters"):
            call()


@pytest.mark.parametrize("posterior", [True, False])
def test_token_embeddings_of_qgfd_with_an_adapter(posterior):
    """Embeddings and head of the text adapter are read as tables: those of the model into which LoRA is merged."""
    peft = pytest.importorskip("peft", reason="NOT TESTED: peft is not installed (the extra 'lora')")
    torch.manual_seed(0)
    config = TextAdapterConfig(vocab_size=20, token_posterior=posterior, decoder="nearest")
    adapter = TextAdapter(config, QGFDConfig(latent_dim=8, hidden_size=16, num_layers=1, num_heads=2))
    targets = ["embedding"] + ["token_head"] * posterior
    lora = peft.get_peft_model(adapter, peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)).eval()
    batch, noisy = {"input_ids": torch.randint(20, (2, 5))}, torch.randn(2, 5, 8)

    def numbers(wrapped):
        latents = wrapped.encode(batch)
        found = [
            latents.tokens,
            wrapped.reconstruction_loss(batch, latents),
            wrapped.decode(noisy)["input_ids"].float(),
        ]
        if posterior:
            evidence = wrapped.evidence(noisy, torch.full((2,), 0.6), torch.full((2,), 0.8))
            found += [wrapped.clean(noisy, evidence), wrapped.token_errors(noisy, evidence, batch)]
        return found

    before, plain = numbers(lora), numbers(adapter)
    torch.testing.assert_close(plain, before)  # peft wraps in place: the same modules
    merged = lora.merge_and_unload()
    torch.testing.assert_close(numbers(merged), before, rtol=1e-4, atol=1e-5)


def test_a_time_embedding_that_is_trained_beside_an_adapter():
    peft = pytest.importorskip("peft", reason="NOT TESTED: peft is not installed (the extra 'lora')")
    embedding = nn.ModuleDict({"time": TimestepEmbedding(8), "x": nn.Linear(8, 8)}).to(torch.bfloat16)
    expected = embedding["time"](torch.ones(2))
    peft.get_peft_model(embedding, peft.LoraConfig(target_modules=["x"], modules_to_save=["mlp"]))
    assert torch.equal(embedding["time"](torch.ones(2)), expected)


def test_a_dit_samples_through_its_adapters():
    """Final layer, projections and labels are called as modules."""
    peft = pytest.importorskip("peft", reason="NOT TESTED: peft is not installed (the extra 'lora')")
    torch.manual_seed(0)
    sizes = dict(input_size=8, hidden_size=16, depth=1, num_heads=2, num_classes=3)
    dit = DiT.from_preset("DiT-tiny", **sizes)
    for parameter in dit.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    diffusion, options = Diffusion(DiffusionConfig("flow")), dict(num_inference_steps=3, guidance_scale=2.0)
    before = sample_classes(dit, diffusion, [0, 1, 2], **options)
    targets = ["qkv", "linear", "embedding_table", "mlp.0", "adaLN_modulation.1"]
    config = peft.LoraConfig(target_modules=targets, modules_to_save=["t_embedder"], init_lora_weights=False)
    wrapped = peft.get_peft_model(dit, config)
    found = sample_classes(wrapped, diffusion, [0, 1, 2], **options)
    merged = sample_classes(wrapped.merge_and_unload(), diffusion, [0, 1, 2], **options)
    torch.testing.assert_close(found, merged, rtol=1e-4, atol=1e-4)  # seen: 1e-5, of numbers up to 30
    assert (found - before).abs().max() > 0.1
