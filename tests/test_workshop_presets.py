"""The presets: which one a text gets, that their settings are valid, and that what the program says is what it sets."""
import dataclasses
import re

import pytest

from helpers import TEXT, story_llm
from story_llm import FIELDS, PRESETS, GPTConfig, Options, TrainConfig, override_settings, preset_settings

SIZES = (1, 60_000, 100_000, 1_000_000, 10_000_000, 10**9)


def text_of(n_bytes):
    return (TEXT * (n_bytes // len(TEXT) + 1))[:n_bytes]


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("n_bytes", SIZES)
def test_every_preset_consists_of_valid_settings_whatever_the_size_of_the_text(name, n_bytes):
    settings = preset_settings(name, n_bytes)
    changed = set()
    for known in (GPTConfig, TrainConfig, Options):
        ours = {f.name: settings[f.name] for f in dataclasses.fields(known) if f.name in settings}
        assert dataclasses.asdict(override_settings(known(), settings)).items() >= ours.items()     # or a StoryError
        changed |= ours.keys()
    assert changed == settings.keys() and name in FIELDS["preset"].metadata["choices"]


def test_the_longer_a_text_the_wider_the_model_that_learns_it_by_heart_and_the_less_a_writer_is_limited():
    assert preset_settings("story", 10**6) == {}
    novels = [preset_settings("novel", n_bytes) for n_bytes in SIZES]
    widths = [novel["emb_dim"] for novel in novels]
    assert widths == sorted(widths) and widths[0] == widths[2] < widths[3]
    assert all(novel["emb_dim"] == 64 * novel["n_heads"] for novel in novels)
    decays = [preset_settings("writer", n_bytes)["weight_decay"] for n_bytes in (500, 100_000, 400_000, 1_600_000)]
    assert decays == [6.4, 6.4, 1.6, 0.4]


def test_gpt2_small_has_gpt2s_architecture_and_a_writer_is_one_that_generalizes():
    small, training = [override_settings(settings(), preset_settings("gpt2-small", 20_000))
                       for settings in (GPTConfig, TrainConfig)]
    assert (small.vocab_size, small.context_length, small.emb_dim, small.n_heads, small.n_layers) == (
        50257, 256, 768, 12, 12)
    assert (small.qkv_bias, small.tie_weights, small.gelu, training.learning_rate) == (True, True, "tanh", 6e-4)
    writer = preset_settings("writer", 20_000)
    assert writer["context_length"] > GPTConfig().context_length and writer["keep_best"] and writer["prompt_windows"] == 0


@pytest.mark.parametrize("n_bytes, preset", [(60_000, "story"), (60_001, "novel")])
def test_a_text_of_up_to_60_kilobytes_is_a_story_and_a_longer_one_a_novel(n_bytes, preset, folder, call):
    """Bytes, not characters, decide. Here, the last character is one of two bytes."""
    (folder / "long.txt").write_text(text_of(n_bytes - 2) + "é", encoding="utf-8")
    status, out, err = call("model", "--text", "long.txt")
    assert status == 0 and ("preset novel, because the text has 60 KB: " in err) == (preset == "novel")
    config = override_settings(GPTConfig(), preset_settings(preset, n_bytes))
    for name in ("emb_dim", "n_heads", "n_layers", "context_length"):
        assert re.search(rf"^  {name} +{getattr(config, name)}$", out, re.MULTILINE), out


@pytest.mark.parametrize("given", [
    [], ["--preset", "writer"], ["--preset", "gpt2-small", "--emb-dim", "24"], ["--emb-dim", "64", "--n-heads", "1"],
    ["--preset", "writer", "--tokenizer", "word", "--no-keep-best"]], ids=" ".join)
def test_the_note_says_what_is_set_all_of_it_and_in_options_that_are_allowed(given, folder, monkeypatch):
    """Typed after --preset story, these options give the same run."""
    (folder / "long.txt").write_text(text_of(61_000), encoding="utf-8")
    monkeypatch.setattr(story_llm, "note_once", lambda message: notes.append(message))

    def run_from(*words):
        run, corpus = story_llm.new_run_from_args(story_llm.parse(["train", "--text", "long.txt", *words]))
        return run.config, run.train_config, corpus.tokenizer.kind

    notes = []
    expected = run_from(*given)
    (note,) = [message for message in notes if message.startswith("preset ")]
    named = note.split(": ", 1)[1].split()
    assert not {word for word in named if word.startswith("--")} & set(given)
    assert run_from(*given, "--preset", "story", *named) == expected


def test_with_gpt2s_tokens_the_note_names_no_vocabulary_size_which_is_refused_there(gpt2, tmp_path, call):
    (tmp_path / "long.txt").write_text(text_of(61_000), encoding="utf-8")
    arguments = ["model", "--text", tmp_path / "long.txt", "--tokenizer", "gpt2"]
    story_llm.note_once.cache_clear()
    status, _, err = call(*arguments)
    assert status == 0 and "--vocab-size" not in err and "--emb-dim 256" in err
    status, _, err = call(*arguments, "--vocab-size", "4096")
    assert status == 1 and "--vocab-size" in err


def test_what_a_user_gives_takes_the_place_of_what_a_preset_sets(folder):
    args = story_llm.parse(["train", "--preset", "writer", "--text", "my.txt", "--weight-decay", "0.25",
                            "--no-keep-best", "--val-fraction", "0"])
    run, corpus = story_llm.new_run_from_args(args)
    assert (run.train_config.weight_decay, run.train_config.keep_best, run.train_config.epochs) == (0.25, False, 9)
    assert corpus.tokenizer.kind == "story" and run.config.position == "rotary"


@pytest.mark.parametrize("given, steps", [({"epochs": 0}, 20 * 13), ({"epochs": 3}, 3 * 13), ({"max_steps": 7}, 7),
                                          ({"epochs": 3, "max_steps": 7}, 7)], ids=str)
def test_the_number_of_steps_follows_from_the_settings_alone(given, steps):
    """With either optimizer. Without a length, it is 20 epochs, and at least 150 steps."""
    for optimizer in ("adamw", "muon"):
        assert story_llm.count_steps(13, TrainConfig(optimizer=optimizer, **given)) == steps
        assert story_llm.count_steps(2, TrainConfig(optimizer=optimizer)) == 150
