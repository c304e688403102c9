"""The settings of model, training, sampling and command line, and what they refuse."""
import dataclasses
import math

import pytest
import torch
from hypothesis import given, strategies as st

from helpers import story_llm
from story_llm import (CHOICES, FIELDS, LIMITS, GPTConfig, GPTModel, Options, PRESETS, Sampling, StoryError,
                       TrainConfig, override_settings, settings_for_size)

ALL_SETTINGS = [GPTConfig, TrainConfig, Sampling, Options]
EVERY_FIELD = [(settings, f) for settings in ALL_SETTINGS for f in dataclasses.fields(settings)]
WRONG_TYPES = {bool: ["no", "False", "", 0, 1, None, 0.0, [], math.nan],
               int: ["1", b"1", True, None, 1.0, 2.5, math.nan, math.inf, [1], 1 + 0j, torch.tensor(1)],
               float: ["0.5", True, None, math.nan, math.inf, -math.inf, [0.5], 0.5j, torch.tensor(0.5)],
               str: [None, True, 0, 1.5, "", "no", b"auto", [], ["auto"]],
               tuple: ["story.txt", None, True, 0, [], ["story.txt"], b"story.txt"]}


@pytest.mark.parametrize("settings", ALL_SETTINGS)
def test_settings_are_frozen(settings):
    for f in dataclasses.fields(settings):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(settings(), f.name, f.default)


@pytest.mark.parametrize("settings", ALL_SETTINGS)
def test_settings_are_given_by_name_only(settings):
    with pytest.raises(TypeError):
        settings(dataclasses.fields(settings)[0].default)


@pytest.mark.parametrize("settings, field", EVERY_FIELD, ids=lambda value: getattr(value, "name", None))
def test_every_setting_refuses_values_of_a_wrong_type_and_names_itself_and_the_value(settings, field):
    any_text = field.type is str and field.name not in CHOICES      # a path, a prompt or a device
    for value in [b"story.txt", None, True, 0, 1.5, []] if any_text else WRONG_TYPES[field.type]:
        with pytest.raises(StoryError) as refusal:
            settings(**{field.name: value})
        assert field.name in str(refusal.value) and repr(value) in str(refusal.value)


def test_the_error_about_a_wrong_setting_names_the_values_that_are_allowed():
    for settings, values, words in [
            (GPTConfig, {"qkv_bias": "no"}, ["qkv_bias", "bool", "'no'"]),
            (GPTConfig, {"position": "none"}, ["position", "learned", "sinusoidal", "rotary", "'none'"]),
            (TrainConfig, {"epochs": -1}, ["epochs", "integer", "at least 0", "-1"]),
            (TrainConfig, {"val_fraction": 1.5}, ["val_fraction", "number", "at least 0", "below 1", "1.5"])]:
        with pytest.raises(StoryError) as refusal:
            settings(**values)
        assert all(word in str(refusal.value) for word in words)


@pytest.mark.parametrize("settings, name, refused, accepted", [
    (GPTConfig, "vocab_size", [0, -1, 10**12, 10**30], [1, 50257]),
    (GPTConfig, "context_length", [0, -1, 10**12, 10**30], [1, 1024]),
    (GPTConfig, "emb_dim", [0, -4, 10**12, 10**30], [4, 768]),
    (GPTConfig, "n_heads", [0, -1], [1, 192]), (GPTConfig, "n_layers", [0, -1, 10**9], [1, 48]),
    (GPTConfig, "drop_rate", [1.0, 1, 1.5, -0.1], [0, 0.0, 0.999]),
    (TrainConfig, "epochs", [-1], [0, 1, 1000]), (TrainConfig, "max_steps", [-1], [0, 1, 1000]),
    (TrainConfig, "batch_size", [0, -1, 10**9], [1, 512]),
    (TrainConfig, "learning_rate", [0, 0.0, -1e-3], [1e-9, 1, 2.5]),
    (TrainConfig, "warmup_steps", [-1], [0, 10**6]), (TrainConfig, "weight_decay", [-0.1], [0, 0.1, 2]),
    (TrainConfig, "grad_clip", [0, 0.0, -1.0], [1e-3, 1, 1e9]),
    (TrainConfig, "prompt_windows", [1, 1.0, -0.1], [0, 0.5, 0.999]),
    (TrainConfig, "val_fraction", [1, 1.0, 10, -0.1], [0, 0.999]),
    (TrainConfig, "eval_every", [-1, -45], [0, 10**6]), (TrainConfig, "seed", [-1, 1 << 32], [0, (1 << 32) - 1]),
    (TrainConfig, "precision", ["fp8", "BF16"], ["auto", "bf16", "fp32"]),
    (Sampling, "temperature", [-0.1], [0, 0.0, 1, 100.0]), (Sampling, "top_k", [-1], [0, 1, 10**6]),
    (Sampling, "top_p", [-0.1, 0], [1e-9, 0.5, 1.0]), (Sampling, "seed", [-1, 1 << 32], [0, (1 << 32) - 1]),
    (Options, "vocab_size", [0, -1, 1 << 24], [1, 257, 50000]), (Options, "max_new_tokens", [-1], [0, 1000]),
    (Options, "stride", [-1], [0, 1])])
def test_numbers_are_accepted_up_to_their_limits_and_refused_beyond(settings, name, refused, accepted):
    for value in refused:
        with pytest.raises(StoryError, match=name):
            settings(**{name: value})
    for value in accepted:
        assert getattr(settings(**{name: value}), name) == value


def test_the_number_of_heads_must_divide_the_embedding_dimension():
    with pytest.raises(StoryError, match="(?s)30.*4"):
        GPTConfig(emb_dim=30, n_heads=4)


@pytest.mark.parametrize("position, works", [("learned", True), ("sinusoidal", True), ("rotary", False)])
def test_heads_of_odd_dimension_work_except_with_rotary_positions(position, works):
    """Rotary positions rotate pairs of numbers."""
    config = dict(vocab_size=9, context_length=4, emb_dim=15, n_heads=3, n_layers=1, position=position)
    if works:
        assert GPTModel(GPTConfig(**config))(torch.zeros(1, 4, dtype=torch.long)).shape == (1, 4, 9)
    else:
        with pytest.raises(StoryError, match=rf"{position}.*even.*\b5\b"):
            GPTConfig(**config)


def test_a_changed_copy_is_checked_too():
    with pytest.raises(StoryError, match="emb_dim"):
        dataclasses.replace(GPTConfig(), emb_dim=30)


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
    except StoryError as refusal:
        assert str(refusal)
    else:
        assert model.tok_emb.weight.shape == (model.config.vocab_size, model.config.emb_dim)


def of_preset(name):
    return [override_settings(settings(), PRESETS[name]) for settings in (GPTConfig, TrainConfig)]


def test_the_presets_are_the_small_default_and_gpt2s_architecture():
    assert set(PRESETS) == set(CHOICES["preset"]) and of_preset("story") == [GPTConfig(), TrainConfig()]
    small, training = of_preset("gpt2-small")
    assert (small.vocab_size, small.context_length, small.emb_dim, small.n_heads, small.n_layers) == (
        50257, 256, 768, 12, 12)
    assert (small.qkv_bias, small.tie_weights, small.gelu, training.learning_rate) == (True, True, "tanh", 6e-4)


def test_the_preset_of_a_writer_is_one_that_generalizes():
    config, training = of_preset("writer")      # its weight decay depends on the text, see test_workshop_presets
    assert config.context_length > GPTConfig().context_length and training.keep_best and training.prompt_windows == 0


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_has_only_settings_that_exist(preset):
    assert set(PRESETS[preset]) <= set(FIELDS)


def test_values_for_other_settings_are_left_alone_and_wrong_ones_refused():
    values = {"emb_dim": 64, "epochs": 3, "text": ("a.txt",)}
    assert override_settings(GPTConfig(), values) == GPTConfig(emb_dim=64)
    assert override_settings(TrainConfig(seed=1), values) == TrainConfig(seed=1, epochs=3)
    with pytest.raises(StoryError, match="emb_dim"):
        override_settings(GPTConfig(), {"emb_dim": -1})


def test_a_longer_text_gets_a_wider_model_and_a_short_one_the_defaults():
    sizes = [0, 100, 20_000, 59_999, 60_000, 200_000, 10**6, 10**7, 10**9]
    widths = [override_settings(GPTConfig(), settings_for_size(size)).emb_dim for size in sizes]
    assert settings_for_size(20_000) == settings_for_size(59_999) == {} != settings_for_size(60_000)
    assert widths == sorted(widths) and widths[3] < widths[-1] < 1024
    for size in sizes:
        override_settings(TrainConfig(), settings_for_size(size))


def test_every_setting_has_a_meaning_and_a_default_within_its_own_limits():
    for settings, field in EVERY_FIELD:
        assert field.metadata["meaning"]
        assert settings(**{field.name: field.default}) == settings()


def test_every_number_has_limits_and_no_limit_or_choice_is_left_over():
    """A name that was changed in one of two places would leave its setting unchecked."""
    names = {field.name for _, field in EVERY_FIELD}
    assert set(FIELDS) == names
    assert {field.name for _, field in EVERY_FIELD if field.type in (int, float)} <= set(LIMITS)
    assert set(LIMITS) | set(CHOICES) <= names and not set(LIMITS) & set(CHOICES)


def test_check_raises_its_message_only_if_the_condition_fails():
    story_llm.check(True, "fine")
    with pytest.raises(StoryError, match="^not fine$"):
        story_llm.check(False, "not fine")
