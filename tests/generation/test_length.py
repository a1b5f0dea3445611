"""LengthPredictor on tiny models, against plain passes over whole sequences with every logit."""

import pytest
import torch
from generation.plain import padded, prompts, randomise, tiny
from torch import nn

from fastdiff.generation.length import LENGTH_RULES, LengthPredictor, Probe, mean_embedding, prompt_inputs, rules

MASK, PAD, EOS, WINDOW = 3, 0, 2, 10
HEADS = ("classifier", "regression")
ENDS = 1e-6  # float64 models; end_log_prob is float32: up to 2e-7 of its value


class Classifier(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.layer = nn.Linear(width, 1)

    def forward(self, x):
        return self.layer(x)[..., 0]


def head_of(rule):
    torch.manual_seed(5)
    return Classifier() if rule in HEADS else None


def ending_model(architecture="llada", push=2.0, seed=3, **options):
    """A random model that ends texts now and then, with learned positions rather late than early."""
    options = {"length_format": "eos_fill", "head_bias": True, **options}
    model = randomise(tiny(architecture, **options), seed)
    with torch.no_grad():
        model.head_bias[EOS] += push
        if model.model.embed_positions is not None:
            positions = model.model.embed_positions.weight
            positions += 3 * torch.linspace(-0.5, 0.5, len(positions)).double()[:, None] * model.head_weight[EOS]
    return model


@torch.no_grad()
def plain_probabilities(model, prompt, window, **inputs):
    """Probabilities [W, V] of the window behind one prompt [1, P], the mask token left out, and the states [W, D]."""
    start = prompt.shape[1]
    ids = torch.cat([prompt, torch.full((1, window), MASK)], dim=1)
    if model.config.timestep_embedding:
        inputs["timesteps"] = torch.ones(1)
    states = model.predicting_states(model.hidden_states(ids, **inputs))[0, start:]
    logits = model.lm_head(states)
    logits[:, MASK] = -torch.inf
    return logits.softmax(-1), states


@pytest.fixture(scope="module")
def model():
    return ending_model()


@pytest.fixture(scope="module")
def rows():
    return prompts(11, 3, 7, 5, 1)


@pytest.mark.parametrize(
    "architecture, options",
    [("llada", {}), ("mdlm", {"timestep_embedding": True}), ("gpt2", {}), ("dream", {"eos_token_id": [2, 7]})],
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_probe_is_a_whole_pass_over_each_prompt_alone(architecture, options, side, rows):
    model = ending_model(architecture, **options)
    predictor = LengthPredictor(model, window=WINDOW)
    ids, mask = padded(rows, side)
    probe = predictor.probe(ids, mask)
    assert probe.end_log_prob.dtype == torch.float32 and probe.end_is_likeliest is None
    for row, prompt in enumerate(rows):
        probability, states = plain_probabilities(model, prompt, WINDOW)
        ends = probability[:, list(predictor.end_token_ids)].sum(-1)
        assert torch.allclose(probe.end_log_prob[row].double(), ends.log(), rtol=ENDS, atol=ENDS)
        assert torch.allclose(probe.states[row], states, rtol=1e-9, atol=1e-9)
        mean = model.model.embed_tokens.weight[prompt[0]].mean(0).float()
        assert torch.allclose(probe.prompt_mean[row], mean, rtol=1e-6, atol=1e-6)


def test_a_probe_is_one_pass_whose_last_block_computes_the_windows_alone(model, rows, monkeypatch):
    passes, hidden_states = [], type(model).hidden_states

    def spy(self, ids, *args, **inputs):
        passes.append((tuple(ids.shape), tuple(inputs["output_columns"].shape)))
        return hidden_states(self, ids, *args, **inputs)

    monkeypatch.setattr(type(model), "hidden_states", spy)
    ids, mask = padded(rows)
    for rule in LENGTH_RULES:
        passes.clear()
        prediction = LengthPredictor(model, window=WINDOW, rule=rule, head=head_of(rule))(ids, mask)
        assert prediction.passes == len(passes)
        if rule not in rules.EXPANSION_RULES:
            assert passes == ([] if rule == "constant" else [((4, 7 + WINDOW), (4, WINDOW))])


def test_training_mode_is_left_as_it_was_and_dropout_off():
    model = ending_model(dropout=0.5)
    predictor = LengthPredictor(model, window=WINDOW)
    expected = predictor.probe(prompts(1, 4)[0]).end_log_prob
    assert not model.training
    model.train()
    got = predictor.probe(prompts(1, 4)[0])
    assert model.training and torch.equal(got.end_log_prob, expected) and not got.states.requires_grad


def plain_reading(rule, probability, states, prompt, model, head):
    """What a rule reads off one prompt's window, from its definition."""
    ends = probability[:, EOS]
    if rule == "argmax":
        logits = states @ model.head_weight[EOS] + model.head_bias[EOS]
        return int(logits.argmax())
    if rule == "quantile":
        return int((ends >= torch.quantile(ends, 0.75)).nonzero()[0])
    if rule == "regression":
        return min(max(int(head(model.model.embed_tokens.weight[prompt[0]].mean(0).float()).ceil()), 0), WINDOW)
    if rule == "cdf":
        curve = ends
    elif rule == "crossing":
        curve = torch.stack([ends[j : j + 8].mean() for j in range(WINDOW)])
    else:
        curve = torch.sigmoid(head(states.float())).double()
    return next((i for i in range(WINDOW) if curve[i] > 0.5), WINDOW)


@pytest.mark.parametrize("rule", ["cdf", "argmax", "quantile", "crossing", *HEADS])
def test_bounds_are_those_of_the_rules_definition(rule, rows):
    model = ending_model("mdlm", push=2.5)
    head = head_of(rule)
    parameter = 0.5 if rule == "cdf" else None
    predictor = LengthPredictor(model, window=WINDOW, rule=rule, parameter=parameter, head=head)
    many = [*rows, *prompts(12, *range(1, 13))]
    with torch.no_grad():
        if rule in HEADS:  # else every row has the same bound
            head.layer.weight.mul_({"classifier": 1, "regression": 20}[rule])
            head.layer.bias.add_({"classifier": -0.2, "regression": 5}[rule])
        expected = [
            plain_reading(rule, *plain_probabilities(model, prompt, WINDOW), prompt, model, head) for prompt in many
        ]
    ids, mask = padded(many)
    got = predictor(ids, mask)
    assert len(set(expected)) > 2  # the prompts matter
    assert got.bounds == expected
    assert predictor.bounds(got.probe) == expected
    assert [predictor(prompt).bounds[0] for prompt in many] == expected


def test_formats_read_the_end_tokens_that_they_call_for(rows):
    ids, mask = padded(rows)
    for length_format, ends in (("eos_fill", (EOS,)), ("pad_fill", (PAD, EOS)), ("eos_only", (EOS,))):
        model = ending_model(length_format=length_format)
        predictor = LengthPredictor(model, window=WINDOW)
        assert predictor.end_token_ids == ends and predictor.length_format == length_format
        for row, prompt in enumerate(rows):
            probability = plain_probabilities(model, prompt, WINDOW)[0][:, list(ends)].sum(-1)
            survival = (1 - probability).cumprod(0) if length_format == "eos_only" else 1 - probability.cummax(0).values
            levels = predictor(ids, mask).reading[row]
            assert torch.allclose(levels, -survival.log(), rtol=1e-5, atol=ENDS)
    assert LengthPredictor(model, window=4, rule="argmax").end_token_ids == (EOS,)
    assert LengthPredictor(model, window=4, end_token_ids=[9, 5, 9]).end_token_ids == (5, 9)


def plain_search(model, prompt, rule, longest):
    """DAEDAL's initial length and ρ's, one prompt at a time: (window - 1, windows asked)."""
    window, asked, before = min(64, longest), [], 0
    while True:
        probability, _ = plain_probabilities(model, prompt, window)
        asked.append(window)
        likeliest = probability.argmax(-1) == EOS
        if rule == "daedal":
            last = likeliest.nonzero()[-32:, 0]
            confidence = float(probability[last, EOS].sum()) / 32
            step = int(confidence < 0.5)
        else:
            rho = float(likeliest.double().mean())
            step = (rho < 0.4) - (rho > 0.6)
        after = min(max(window + 8 * step, min(8, longest)), longest)
        if step * before < 0 or after == window:
            return window - 1, asked
        window, before = after, step


@pytest.mark.parametrize("longest", [5, 64, 90])
@pytest.mark.parametrize("rule", ["daedal", "rho"])
def test_windows_grow_and_shrink_as_each_row_alone_would(rule, longest):
    model = ending_model("mdlm", push=3.5, max_position_embeddings=120)
    many = prompts(21, *range(1, 13))
    expected, asked = zip(*(plain_search(model, prompt, rule, longest) for prompt in many), strict=True)
    ids, mask = padded(many)
    got = LengthPredictor(model, window=longest, rule=rule)(ids, mask)
    assert got.bounds == list(expected)
    assert got.passes == len(set().union(*asked)) and got.probe is None
    if longest == 90:
        assert len(set(expected)) > 2 and got.passes > 3


def test_constant_asks_nothing_of_the_model(model, rows):
    ids, mask = padded(rows)
    got = LengthPredictor(model, window=WINDOW, rule="constant")(ids, mask)
    assert (got.bounds, got.probe, got.passes) == ([WINDOW] * 4, None, 0)
    assert LengthPredictor(model, window=WINDOW, rule="constant", parameter=3)(ids, mask).bounds == [3] * 4


def test_scores_of_a_probe_and_of_a_prediction(model, rows):
    predictor = LengthPredictor(model, window=WINDOW)
    got = predictor(*padded(rows))
    scores = predictor.scores(got, [0, 1, 5, WINDOW])
    levels = rules.level(got.probe.end_log_prob)
    assert scores.tolist() == [0, float(levels[1, 0]), float(levels[2, :5].max()), torch.inf]
    assert torch.equal(predictor.scores(got.probe, torch.tensor([0, 1, 5, WINDOW])), scores)
    expanding = LengthPredictor(model, window=WINDOW, rule="daedal")
    with pytest.raises(ValueError, match="'daedal' makes passes of its own"):
        expanding.bounds(got.probe)
    assert expanding.scores(expanding(*padded(rows)), [9, 0, 9, 20]).tolist() == [0, -9, 0, torch.inf]
    with pytest.raises(ValueError, match="probe: got one of 4 masks per row; expected window = 10"):
        predictor.bounds(predictor.probe(rows[0], window=4))


def test_prompts_behind_an_encoder(rows):
    model = ending_model("mdlm", num_encoder_layers=1)
    conditions = [row[0].tolist() for row in rows]
    inputs = prompt_inputs(model, conditions)
    assert inputs["input_ids"].tolist() == [[1]] * 4
    predictor = LengthPredictor(model, window=WINDOW)
    probe = predictor.probe(**inputs)
    for row, condition in enumerate(rows):
        encoded = model.encode(condition)
        expected, _ = plain_probabilities(model, torch.tensor([[1]]), WINDOW, encoder_hidden_states=encoded)
        assert torch.allclose(probe.end_log_prob[row].double(), expected[:, EOS].log(), rtol=ENDS, atol=ENDS)
        assert torch.allclose(probe.prompt_mean[row], mean_embedding(model, condition)[0], rtol=1e-6, atol=1e-6)
    for rule in rules.EXPANSION_RULES:  # rows leave, with what they attend to
        longer = ending_model("mdlm", num_encoder_layers=1, push=3.0, max_position_embeddings=120)
        expanding = LengthPredictor(longer, window=90, rule=rule)
        alone = [expanding(**prompt_inputs(longer, [condition])).bounds[0] for condition in conditions]
        assert expanding(**prompt_inputs(longer, conditions)).bounds == alone
    regressor = LengthPredictor(model, window=WINDOW, rule="regression", head=head_of("regression"))
    assert regressor(**inputs).bounds == regressor.bounds(
        Probe(probe.end_log_prob, probe.states, inputs["prompt_mean"])
    )
    with pytest.raises(ValueError, match="prompt_mean: got None"):
        regressor(**{**inputs, "prompt_mean": None})
    model.config.bos_token_id = None
    with pytest.raises(ValueError, match="bos_token_id: the model's config has none"):
        prompt_inputs(model, conditions)


def test_bfloat16_reads_what_float32_does_within_its_rounding(rows):
    ids, mask = padded(rows)
    model = ending_model().float()
    expected = LengthPredictor(model, window=WINDOW)(ids, mask).reading
    got = LengthPredictor(model.bfloat16(), window=WINDOW, rule="cdf")(ids, mask).reading
    assert torch.allclose(got, expected, rtol=0, atol=0.1)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(rule="oracle"), r"rule: got 'oracle'; expected one of cdf, constant"),
        (dict(window=0), r"window: got 0; expected a number of tokens"),
        (dict(window=True), r"window: got True"),
        (dict(coverage=1.0), r"coverage: got 1.0; expected a number between 0 and 1"),
        (dict(coverage=0), r"coverage: got 0; expected"),
        (dict(coverage="0.9"), r"coverage: got '0.9'"),
        (dict(length_format="eos"), r"length_format: got 'eos'; expected one of eos_fill, pad_fill, eos_only"),
        (dict(length_format="pad_fill"), r"got 'pad_fill'; expected 'eos_fill', the one that the model's config names"),
        (dict(end_token_ids=[]), r"end_token_ids: got \[\]; expected ids from 0 to 40"),
        (dict(end_token_ids=[41]), r"end_token_ids: got \[41\]"),
        (dict(end_token_ids=[MASK]), r"not the mask token 3"),
        (dict(parameter=0.4), r"parameter: got 0.4 with the rule 'cdf'; expected a probability in \[0.5, 1\)"),
        (dict(rule="quantile", parameter=1), r"parameter: got 1 with the rule 'quantile'"),
        (dict(rule="constant", parameter=float("inf")), r"expected a whole number of tokens"),
        (dict(rule="rho", parameter=0.5), r"the rule 'rho' has none: leave it out"),
        (
            dict(rule="classifier"),
            r"head: got NoneType with the rule 'classifier'; expected one of fastdiff.models.length_heads",
        ),
        (dict(head=Classifier()), r"head: got Classifier with the rule 'cdf'; expected None"),
    ],
)
def test_wrong_options_are_named(model, options, message):
    with pytest.raises(ValueError, match=message) as error:
        LengthPredictor(model, **{"window": WINDOW, **options})
    assert "\n" not in str(error.value)


def test_configs_without_format_or_end_tokens():
    foreign = tiny()
    with pytest.raises(ValueError, match="the model's config names none; pass the one it was trained with: eos_fill"):
        LengthPredictor(foreign, window=4)
    assert LengthPredictor(foreign, window=4, length_format="eos_fill").length_format == "eos_fill"
    with pytest.raises(ValueError, match="eos_token_id: the model's config has none, so no answer has an end"):
        LengthPredictor(tiny(length_format="eos_fill", eos_token_id=None), window=4)
    without_pad = tiny(length_format="pad_fill", pad_token_id=None)
    with pytest.raises(ValueError, match="pad_token_id: the model's config has none, which 'pad_fill' needs"):
        LengthPredictor(without_pad, window=4)
    assert LengthPredictor(without_pad, window=4, rule="argmax").end_token_ids == (EOS,)


@pytest.mark.parametrize("rule", ["cdf", "constant", "daedal"])
def test_prompts_that_leave_no_room_are_refused_before_a_pass(model, rule, monkeypatch):
    predictor = LengthPredictor(model, window=WINDOW, rule=rule)
    monkeypatch.setattr(type(model), "hidden_states", None)
    with pytest.raises(ValueError, match="prompt of 15 tokens and max_new_tokens = 10; expected at most .* 24"):
        predictor(torch.full((2, 15), 5))
    with pytest.raises(ValueError, match="row 1 has no token"):
        predictor(torch.full((2, 3), 5), torch.tensor([[1, 1, 1], [0, 0, 0]]))
    with pytest.raises(TypeError, match="input_ids: got torch.float32"):
        predictor(torch.ones(2, 3))


def test_a_head_of_the_wrong_shape_is_named(model, rows):
    predictor = LengthPredictor(model, window=WINDOW, rule="classifier", head=nn.Linear(16, 1))
    with pytest.raises(ValueError, match=r"head: gave shape \[4, 10, 1\]; expected \[4, 10\] for 'classifier'"):
        predictor(*padded(rows))
