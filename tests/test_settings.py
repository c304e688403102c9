import dataclasses

import pytest
import torch
from hypothesis import given, strategies as st

import story_llm
from story_llm import GPTConfig, GPTModel, PRESETS, TrainConfig


@pytest.mark.parametrize("settings", [GPTConfig, TrainConfig])
def test_settings_are_frozen(settings):
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(settings(), dataclasses.fields(settings)[0].name, 1)


@pytest.mark.parametrize("settings, name, value", [
    (GPTConfig, "vocab_size", 0), (GPTConfig, "context_length", -1), (GPTConfig, "emb_dim", 0),
    (GPTConfig, "n_heads", 0), (GPTConfig, "n_layers", 1.0), (GPTConfig, "emb_dim", "64"),
    (GPTConfig, "n_heads", True), (GPTConfig, "drop_rate", 1.0),
    (GPTConfig, "drop_rate", -0.1), (GPTConfig, "drop_rate", float("nan")), (GPTConfig, "position", "none"),
    (GPTConfig, "vocab_size", None), (TrainConfig, "epochs", -1), (TrainConfig, "batch_size", 0),
    (TrainConfig, "learning_rate", 0), (TrainConfig, "learning_rate", float("inf")), (TrainConfig, "grad_clip", 0.0),
    (TrainConfig, "weight_decay", float("nan")), (TrainConfig, "openings", 1), (TrainConfig, "val_fraction", 1.5),
    (TrainConfig, "eval_every", 0), (TrainConfig, "warmup_steps", -1), (TrainConfig, "stride", 0.5),
    (TrainConfig, "precision", "fp8"), (TrainConfig, "seed", -1)])
def test_a_wrong_setting_is_refused_by_name_and_value(settings, name, value):
    with pytest.raises(ValueError) as refusal:
        settings(**{name: value})
    assert name in str(refusal.value) and repr(value) in str(refusal.value)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="(?s)30.*4"):
        GPTConfig(emb_dim=30, n_heads=4)


@pytest.mark.parametrize("position, works", [("learned", True), ("sinusoidal", False), ("rotary", False)])
def test_an_odd_width_works_just_where_places_are_not_pairs(position, works):
    config = dict(vocab_size=9, context_length=4, emb_dim=15, n_heads=3, n_layers=1, position=position)
    if works:
        assert GPTModel(GPTConfig(**config))(torch.zeros(1, 4, dtype=torch.long)).shape == (1, 4, 9)
    else:
        with pytest.raises(ValueError, match="even"):
            GPTConfig(**config)


numbers = st.integers(-2, 40) | st.floats(-1, 2) | st.sampled_from([None, True, "8", float("nan"), [], b""])


@given(st.fixed_dictionaries({}, optional={
    "vocab_size": numbers, "context_length": numbers, "emb_dim": numbers, "n_heads": numbers, "drop_rate": numbers,
    "n_layers": st.integers(-1, 3) | st.sampled_from([None, 1.5, "2"]), "qkv_bias": st.booleans(),
    "tie_weights": st.booleans(), "position": st.sampled_from(["learned", "sinusoidal", "rotary", "", None])}))
def test_any_values_build_a_model_or_raise_value_error(values):
    try:
        with torch.device("meta"):
            model = GPTModel(GPTConfig(**{"vocab_size": 7, "context_length": 5, "emb_dim": 24, "n_heads": 2, **values}))
    except ValueError as refusal:
        assert str(refusal)
    else:
        assert model.tok_emb.weight.shape == (model.config.vocab_size, model.config.emb_dim)


@pytest.mark.parametrize("name", ["vocab_size", "context_length", "emb_dim"])
@pytest.mark.parametrize("value", [10**12, 10**30])
def test_a_setting_too_large_for_any_machine_is_refused(name, value):
    with pytest.raises(ValueError):
        GPTModel(GPTConfig(**{"vocab_size": 7, "context_length": 5, "emb_dim": 8, "n_heads": 1, name: value}))


def test_the_presets_are_the_small_default_and_gpt2s_architecture():
    small = PRESETS["gpt2-small"]
    assert PRESETS["story"] == GPTConfig()
    assert (small.vocab_size, small.context_length, small.emb_dim, small.n_heads, small.n_layers) == (
        50257, 256, 768, 12, 12)


def test_check_raises_its_message_only_if_the_condition_fails():
    story_llm.check(True, "fine")
    with pytest.raises(ValueError, match="^not fine$"):
        story_llm.check(False, "not fine")
