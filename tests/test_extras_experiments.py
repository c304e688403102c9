"""extras/experiments.py: each experiment changes what it says, and has the result that it promises."""
import functools
import math
import re
import sys

import pytest
from helpers import PROGRAM, ROOT, STORY, TEXT, story_llm, tiny, train_to

sys.path.insert(0, str(ROOT / "extras"))
import experiments  # noqa: E402
from experiments import EXPERIMENTS, changed_program, train_changed  # noqa: E402

SOURCE = PROGRAM.read_text(encoding="utf-8")
# A part of the story and a small model, which begins to recite it within these few steps
PART = STORY.read_text(encoding="utf-8")[:3000]
SMALL = {"emb_dim": 128, "batch_size": 16, "max_steps": 60, "precision": "fp32"}


def step_of(text):
    """The step of the lesson in which a text stands, which must occur once."""
    assert SOURCE.count(text) == 1, f"this must occur once in {PROGRAM.name}, not {SOURCE.count(text)} times: {text}"
    headings = re.findall(r"^# ═══ (?:Step (\d+): |Workshop|The command line)", SOURCE[:SOURCE.index(text)], re.MULTILINE)
    return int(headings[-1] or 0)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_what_an_experiment_changes_occurs_once_in_the_step_that_it_names(name):
    experiment = EXPERIMENTS[name]
    changed = [old for old, _ in experiment.replacements]
    for setting in experiment.settings:
        changed.append(f"    {setting}: {story_llm.FIELDS[setting].type.__name__} = setting(")
    assert changed and {step_of(text) for text in changed} == {experiment.step}
    for setting, value in experiment.settings.items():
        assert value != story_llm.FIELDS[setting].default


@pytest.mark.parametrize("replacement, count", [(("nowhere in the source of the program", ""), 0),
                                                (("(B, T, C)", ""), "\\d+")])
def test_a_replacement_that_does_not_fit_the_source_is_refused(replacement, count):
    with pytest.raises(story_llm.StoryError, match=f"{count} times and not once"):
        changed_program([replacement])


# the result of each experiment, with a small model

@functools.cache
def corpus():
    return story_llm.corpus_from_text(PART, "word")


@functools.cache
def result(name):
    """(The losses after a ninth, a third and all steps, recall) of an experiment."""
    replacements, settings = (), {}
    if name != "unchanged":
        replacements, settings = EXPERIMENTS[name].replacements, EXPERIMENTS[name].settings
    losses, recall, _ = train_changed(corpus(), replacements, {**SMALL, **settings})
    assert list(losses) == [6, 20, 60]
    return *losses.values(), recall


def test_the_unchanged_program_recites_most_of_the_text():
    _, _, loss, recall = result("unchanged")
    assert loss < 1 and recall > 0.6


def test_without_the_mask_the_loss_is_as_low_but_the_model_cannot_continue_a_sentence():
    """With the default model, it is much lower: see test_failures.py."""
    _, _, loss, recall = result("no-mask")
    assert loss < result("unchanged")[2] + 0.1
    assert recall < result("unchanged")[3] - 0.3


@pytest.mark.parametrize("name, least, share", [
    ("no-scaling", 0.1, 1.1), ("post-norm", 0.3, 0.5), ("no-norm", 1.2, 0.1), ("no-residual", 2, 0.1),
    ("gradient-descent", 0.9, 0.1), ("high-learning-rate", 1.5, 0.1)])
def test_it_learns_more_slowly(name, least, share):
    """The final loss is higher at least by `least`, and recall at most this share of the unchanged program's."""
    _, _, loss, recall = result(name)
    assert loss > result("unchanged")[2] + least
    assert recall <= result("unchanged")[3] * share


def test_without_scaling_it_learns_more_slowly_from_the_beginning():
    assert result("no-scaling")[1] > result("unchanged")[1] + 0.3


@pytest.mark.parametrize("name", ["one-head", "no-warm-up"])
def test_it_makes_little_difference(name):
    _, _, loss, recall = result(name)
    assert abs(loss - result("unchanged")[2]) < 0.35
    assert abs(recall - result("unchanged")[3]) < 0.35


def test_without_positions_it_learns_faster_at_first_and_recites_as_well():
    _, early_loss, _, recall = result("no-positions")
    assert early_loss < result("unchanged")[1] - 0.3
    assert recall > result("unchanged")[3] - 0.1


def test_without_prompt_windows_the_loss_is_as_low_but_recall_is_lower():
    _, _, loss, recall = result("no-prompt-windows")
    assert abs(loss - result("unchanged")[2]) < 0.2
    assert recall < result("unchanged")[3] - 0.1


def test_every_experiment_has_a_test_of_its_result():
    """The tests above trained them all. (Run alone, this test does it.)"""
    assert all(math.isfinite(value) for name in ("unchanged", *EXPERIMENTS) for value in result(name))


# training and measuring

def test_without_a_change_it_trains_as_story_llm_does():
    run, tiny_corpus = tiny(max_steps=9, precision="fp32")
    names = ("context_length", "emb_dim", "n_heads", "n_layers", "batch_size", "eval_every", "warmup_steps")
    settings = {**vars(run.config), **vars(run.train_config)}
    losses, _, sample = train_changed(tiny_corpus, (), {**{name: settings[name] for name in names},
                                                        "max_steps": 9, "precision": "fp32"}, prompt="The old")
    expected = {}
    for _ in story_llm.train(run, tiny_corpus):
        expected[run.step] = story_llm.mean_loss(run.model, tiny_corpus.train_ids)
    assert losses == {step: expected[step] for step in (1, 3, 9)}
    text = "".join(story_llm.generate_text(run.model, run.tokenizer, "The old", 20))
    assert sample == f"The old ...{text}"


def test_recall_of_what_it_writes_is_the_recall_of_the_lesson():
    run, tiny_corpus = tiny(emb_dim=64, max_steps=150, batch_size=16, val_fraction=0.0)
    seen = set()
    for _ in story_llm.train(run, tiny_corpus):
        if run.step % 5 == 0:
            recall = experiments.written_recall(story_llm, run, TEXT)
            assert recall == story_llm.measure_recall(run.model, run.tokenizer, TEXT)
            seen.add(recall)
    assert len(seen) > 2 and {0, 1} <= seen


def test_a_text_without_a_long_sentence_has_no_recall():
    run, tiny_corpus = tiny("One two three. " * 9)
    assert experiments.written_recall(story_llm, run, tiny_corpus.train_text) is None


def test_a_training_that_diverges_is_a_result_and_no_error(capsys):
    run, tiny_corpus = tiny()
    result = train_changed(tiny_corpus, (), {"emb_dim": 32, "learning_rate": 1e8, "max_steps": 27, "precision": "fp32"})
    assert math.isnan(result[0][27])
    experiments.log_results({"unchanged": result})
    assert re.search(r"^  unchanged .* nan +\d", capsys.readouterr().out, re.MULTILINE)


# the command line

@pytest.fixture
def call(capsys):
    """call(*arguments) runs experiments.py in this process: (exit status, stdout, stderr)."""
    def run(*arguments):
        capsys.readouterr()
        return experiments.main([*map(str, arguments)]), *capsys.readouterr()
    return run


def test_list_says_of_each_experiment_what_it_changes_and_shows(call, monkeypatch):
    monkeypatch.setattr(experiments, "train_changed", None)         # nothing is trained
    status, out, err = call("--list")
    assert (status, err) == (0, "")
    blocks = out.strip().split("\n\n")
    assert len(blocks) == len(EXPERIMENTS)
    for block, (name, experiment) in zip(blocks, EXPERIMENTS.items()):
        assert block.startswith(f"{name} (step {experiment.step}): {experiment.change}\n")
        assert " ".join(experiment.shows.split()) in " ".join(block.split())
        removed, added = [[line[6:] for line in block.splitlines() if line.startswith(f"    {sign} ")] for sign in "-+"]
        assert len(removed) == len(added) == len(experiment.replacements) + len(experiment.settings)
        if experiment.replacements:
            changed_source = SOURCE
            for old, new in experiment.replacements:
                changed_source = changed_source.replace(old, new)
            assert all(line in SOURCE for line in removed[:len(experiment.replacements)])
            assert all(line in changed_source for line in added[:len(experiment.replacements)])
    assert call("--list", "no-mask")[1] == next(block for block in blocks if block.startswith("no-mask")) + "\n\n"


@pytest.mark.parametrize("arguments, message", [
    (["no-hat"], "there is no experiment 'no-hat': choose one of " + ", ".join(EXPERIMENTS)),
    (["--list", "no-hat"], "there is no experiment 'no-hat'"),
    (["--list", "--seed", "1"], "--list trains nothing"),
    (["no-mask", "--text", "missing.txt"], "missing.txt"),
    (["no-mask", "--max-steps", "-1"], "max_steps must be")])
def test_a_mistake_is_one_line(arguments, message, call, bare, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    status, out, err = call(*arguments)
    assert (status, out) == (1, "") and err.count("\n") == 1
    assert err.startswith("error: ") and message in err


def test_one_prints_its_table_beside_the_unchanged_run(call, folder):
    status, out, err = call("no-residual", "--text", "my.txt", "--max-steps", "9", "--seed", "3")
    assert (status, err) == (0, "")
    assert out.startswith("story tokenizer, 9 steps\n\nno-residual (step 6)")
    assert re.search(r"^  loss after step +1 +3 +9 +recall$", out, re.MULTILINE)
    corpus = story_llm.corpus_from_text(TEXT, "story")
    run = train_to(story_llm.new_run(corpus, train_config=story_llm.TrainConfig(max_steps=9, seed=3)), corpus)
    losses = dict(re.findall(r"^  (\S+) +[\d.]+ +[\d.]+ +([\d.]+) +0.0%$", out, re.MULTILINE))
    assert list(losses) == ["unchanged", "no-residual"]
    assert losses["unchanged"] == f"{story_llm.mean_loss(run.model, corpus.train_ids):.3f}"
    assert losses["no-residual"] != losses["unchanged"]
    assert out.count(f"    {story_llm.first_words(TEXT)} ...") == 2


def test_without_a_name_all_of_them_run_with_equal_steps(call, folder, monkeypatch):
    """What a training does is tested above, so here it only notes what it was given."""
    given = []

    def note_arguments(corpus, replacements, settings, prompt):
        given.append((replacements, settings))
        return {1: 0.5}, 0.0, "..."
    monkeypatch.setattr(experiments, "train_changed", note_arguments)
    status, out, err = call("--text", "my.txt", "--seed", "7")
    assert (status, err) == (0, "")
    assert re.findall(r"^  ([a-z-]+) +0\.500 ", out, re.MULTILINE)[1::2] == [*EXPERIMENTS]
    steps = story_llm.new_run(story_llm.corpus_from_text(TEXT, "story")).total_steps
    usual = {"seed": 7, "max_steps": steps}
    assert given == [((), usual), *((e.replacements, usual | e.settings) for e in EXPERIMENTS.values())]
