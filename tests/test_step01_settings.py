"""The settings of model, training, sampling and command line, and what they refuse."""
import dataclasses
import math

import pytest
import torch
from hypothesis import given, strategies as st

from helpers import story_llm
from story_llm import GPTConfig, GPTModel, Options, Sampling, StoryError, TrainConfig, override_settings

ALL_SETTINGS = [GPTConfig, TrainConfig, Sampling, Options]
EVERY_FIELD = [(settings, f) for settings in ALL_SETTINGS for f in dataclasses.fields(settings)]
WRONG_TYPES = {bool: ["no", "False", "", 0, 1, None, 0.0, [], math.nan],
               int: ["1", b"1", True, None, 1.0, 2.5, math.nan, math.inf, [1], 1 + 0j, torch.tensor(1), -1, 10**30],
               float: ["0.5", True, None, math.nan, math.inf, -math.inf, [0.5], 0.5j, torch.tensor(0.5), -0.1, 10**400],
               str: [None, True, 0, 1.5, b"auto", [], ["auto"]],
               tuple: ["story.txt", None, True, 0, [], ["story.txt"], b"story.txt"]}


def refusal(settings, **values):
    with pytest.raises(StoryError) as refused:
        settings(**values)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("settings, field", EVERY_FIELD, ids=lambda value: getattr(value, "name", None))
def test_every_setting_has_a_meaning_a_valid_default_and_refuses_wrong_values_in_one_line(settings, field):
    assert field.metadata["meaning"] and settings(**{field.name: field.default}) == settings()
    wrong = list(WRONG_TYPES[field.type])
    if "choices" in field.metadata:
        assert field.default in field.metadata["choices"]
        wrong += ["", "none", field.default.upper()]
        allowed = field.metadata["choices"]
    elif field.type in (int, float):
        allowed = (str(field.metadata.get("minimum", 0)), str(field.metadata.get("below", "")))
    else:
        allowed = (field.type.__name__,)
    for value in wrong:
        message = refusal(settings, **{field.name: value})
        assert field.name in message and not [word for word in allowed if word not in message]
        assert repr(value)[:10] in message      # a long value may be cut


@pytest.mark.parametrize("settings", ALL_SETTINGS)
def test_settings_are_frozen_and_given_by_name_only(settings):
    for f in dataclasses.fields(settings):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(settings(), f.name, f.default)
    with pytest.raises(TypeError):
        settings(dataclasses.fields(settings)[0].default)


@pytest.mark.parametrize("settings, names, refused, accepted", [
    (GPTConfig, ["vocab_size", "context_length", "n_layers"], [0], [1, 1024]),
    (GPTConfig, ["emb_dim"], [0], [4, 768]), (GPTConfig, ["n_heads"], [0], [1, 192]),
    (TrainConfig, ["batch_size"], [0], [1, 512]), (Options, ["vocab_size"], [0, 256], [257, 50000]),
    (TrainConfig, ["epochs", "max_steps", "warmup_steps", "eval_every"], [], [0, 1, 10**6]),
    (Sampling, ["top_k"], [], [0, 1, 10**6]), (Options, ["max_new_tokens", "sentences", "stride"], [], [0, 1000]),
    (GPTConfig, ["drop_rate"], [1.0, 1, 1.5], [0, 0.0, 0.999]),
    (TrainConfig, ["val_fraction", "prompt_windows"], [1.0, 1, 10], [0, 0.0, 0.999]),
    (TrainConfig, ["learning_rate", "weight_decay"], [], [1e-9, 1, 2.5]),
    (TrainConfig, ["grad_clip"], [0, 0.0], [1e-3, 1]),
    (Sampling, ["temperature"], [], [0, 0.0, 1, 100.0]), (Sampling, ["top_p"], [0, 0.0], [1e-9, 0.5, 1.0]),
    (TrainConfig, ["seed"], [1 << 32], [0, (1 << 32) - 1]), (Sampling, ["seed"], [1 << 32], [0, (1 << 32) - 1])])
def test_numbers_are_accepted_up_to_their_limits_and_refused_beyond(settings, names, refused, accepted):
    for name in names:
        for value in refused:
            assert name in refusal(settings, **{name: value})
        for value in accepted:
            assert getattr(settings(**{name: value}), name) == value


def test_the_number_of_heads_must_divide_the_embedding_dimension_also_in_a_changed_copy():
    message = refusal(GPTConfig, emb_dim=30, n_heads=4)
    assert "30" in message and "4" in message
    with pytest.raises(StoryError, match="emb_dim"):
        dataclasses.replace(GPTConfig(), emb_dim=30)


@pytest.mark.parametrize("position, works", [("learned", True), ("sinusoidal", True), ("rotary", False)])
def test_heads_of_odd_dimension_work_except_with_rotary_positions(position, works):
    """Rotary positions rotate pairs of numbers."""
    config = dict(vocab_size=9, context_length=4, emb_dim=15, n_heads=3, n_layers=1, position=position)
    if works:
        assert GPTModel(GPTConfig(**config))(torch.zeros(1, 4, dtype=torch.long)).shape == (1, 4, 9)
    else:
        assert "5" in refusal(GPTConfig, **config)


numbers = st.integers(-2, 40) | st.floats(-1, 2) | st.sampled_from([None, True, "8", float("nan"), [], b""])


@given(st.fixed_dictionaries({}, optional={
    "vocab_size": numbers, "context_length": numbers, "emb_dim": numbers, "n_heads": numbers, "drop_rate": numbers,
    "n_layers": st.integers(-1, 3) | st.sampled_from([None, 1.5, "2"]),
    "qkv_bias": st.booleans() | st.sampled_from([None, "no", 1]), "tie_weights": st.booleans(),
    "gelu": st.sampled_from(["exact", "tanh", "relu", True]),
    "position": st.sampled_from(["learned", "sinusoidal", "rotary", "", None])}))
def test_any_values_build_a_model_or_raise_story_error(values):
    try:
        with torch.device("meta"):
            model = GPTModel(GPTConfig(**{"vocab_size": 7, "context_length": 5, "emb_dim": 24, "n_heads": 2, **values}))
    except StoryError as refused:
        assert str(refused)
    else:
        assert model.tok_emb.weight.shape == (model.config.vocab_size, model.config.emb_dim)


def test_values_for_other_settings_are_left_alone_and_wrong_ones_refused():
    values = {"emb_dim": 64, "epochs": 3, "text": ("a.txt",)}
    assert override_settings(GPTConfig(), values) == GPTConfig(emb_dim=64)
    assert override_settings(TrainConfig(seed=1), values) == TrainConfig(seed=1, epochs=3)
    with pytest.raises(StoryError, match="emb_dim"):
        override_settings(GPTConfig(), {"emb_dim": -1})


def test_check_raises_its_message_only_if_the_condition_fails():
    story_llm.check(True, "fine")
    with pytest.raises(StoryError, match="^not fine$"):
        story_llm.check(False, "not fine")
