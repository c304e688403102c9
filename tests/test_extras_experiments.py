"""extras/experiments.py: each experiment changes what it says, and has the result that it promises."""
import functools
import json
import math
import re
import sys

import pytest
import torch
from helpers import PROGRAM, ROOT, STORY, TEXT, story_llm, tiny, train_to

sys.path.insert(0, str(ROOT / "extras"))
import experiments  # noqa: E402
from experiments import EXPERIMENTS, changed_program, train_changed  # noqa: E402

SOURCE = PROGRAM.read_text(encoding="utf-8")
# A part of the story and a small model, which begins to recite it within these few steps
PART = STORY.read_text(encoding="utf-8")[:3000]
SMALL = {"emb_dim": 128, "batch_size": 16, "max_steps": 60, "precision": "fp32"}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_what_an_experiment_changes_occurs_once_in_the_step_that_it_names(name):
    experiment = EXPERIMENTS[name]
    changed = [old for old, _ in experiment.replacements]
    for setting, value in experiment.settings.items():
        changed.append(f"    {setting}: {story_llm.FIELDS[setting].type.__name__} = setting(")
        assert value != story_llm.FIELDS[setting].default
    assert changed
    for text in changed:
        assert SOURCE.count(text) == 1, text
        before = SOURCE[:SOURCE.index(text)]
        headings = re.findall(r"^# ═══ (?:Step (\d+): |Workshop|The command line)", before, re.MULTILINE)
        assert headings[-1] == str(experiment.step)


@pytest.mark.parametrize("text", ["nowhere in the source of the program", "(B, T, C)"])
def test_a_replacement_that_does_not_fit_the_source_is_refused(text):
    with pytest.raises(story_llm.StoryError, match=f"{SOURCE.count(text)} times and not once"):
        changed_program([(text, "")])


def test_gradient_descent_is_that_of_torch():
    program = changed_program(EXPERIMENTS["gradient-descent"].replacements)
    ours, theirs = torch.nn.Parameter(torch.ones(2, 3)), torch.nn.Parameter(torch.ones(2, 3))
    optimizer, expected = program.AdamW([("w", ours)]), torch.optim.SGD([theirs], lr=0.3)
    for step in range(4):
        ours.grad = theirs.grad = torch.randn(2, 3, generator=torch.Generator().manual_seed(step))
        optimizer.step(lr=0.3)
        expected.step()
    assert torch.allclose(ours, theirs)


# the result of each experiment, with a small model

@functools.cache
def result(name):
    """(The losses after a ninth, a third and all steps, recall) of an experiment."""
    changes = EXPERIMENTS.get(name, experiments.Experiment(step=0, change="", shows=""))
    corpus = story_llm.corpus_from_text(PART, "word")
    losses, recall, _ = train_changed(corpus, changes.replacements, {**SMALL, **changes.settings})
    assert list(losses) == [0, 1, 3, *range(6, 61, 6)]
    return losses[6], losses[18], losses[60], recall


def test_the_unchanged_program_recites_most_of_the_text():
    _, _, loss, recall = result("unchanged")
    assert loss < 1 and recall > 0.6


# How the results differ from those of the unchanged program: the bounds of the loss and of recall
DIFFERENCES = {
    "no-scaling": (0.1, 9, -1, 0.1), "no-mask": (-9, 0.1, -1, -0.3), "one-head": (-0.35, 0.35, -0.35, 0.35),
    "no-attention": (0.4, 9, -1, -0.5), "average": (-0.35, 0.35, -0.5, 0.35),
    "no-feed-forward": (0.5, 9, -1, -0.4), "one-block": (-0.35, 0.35, -0.35, 0.35),
    "no-clipping": (0.02, 0.6, -0.5, 0.2), "no-residual": (2, 9, -1, -0.5), "no-norm": (1.2, 9, -1, -0.5),
    "post-norm": (0.3, 9, -1, -0.3),
    "no-positions": (-9, 0.2, -0.1, 1), "gradient-descent": (0.9, 9, -1, -0.5),
    "high-learning-rate": (1.5, 9, -1, -0.5), "no-warm-up": (-0.35, 0.35, -0.35, 0.35),
    "no-prompt-windows": (-0.2, 0.2, -1, -0.1)}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_has_its_result(name):
    _, early, loss, recall = result("unchanged")
    _, changed_early, changed_loss, changed_recall = result(name)
    lowest, highest, least, most = DIFFERENCES[name]
    assert lowest < changed_loss - loss < highest
    assert least <= changed_recall - recall <= most
    if name in ("no-scaling", "no-positions"):      # slower, and faster, from the beginning
        assert (changed_early - early) * (1 if name == "no-scaling" else -1) > 0.3


# training and measuring

def test_without_a_change_it_trains_as_story_llm_does():
    run, corpus = tiny(max_steps=9, precision="fp32")
    names = ("context_length", "emb_dim", "n_heads", "n_layers", "batch_size", "eval_every", "warmup_steps")
    settings = {**vars(run.config), **vars(run.train_config)}
    settings = {name: settings[name] for name in (*names, "max_steps", "precision")}
    losses, _, sample = train_changed(corpus, (), settings, prompt="The old")
    expected = {0: story_llm.mean_loss(run.model, corpus.train_ids)}
    for _ in story_llm.training_steps(run, corpus):
        expected[run.step] = story_llm.mean_loss(run.model, corpus.train_ids)
    assert losses == expected
    assert sample == "The old ..." + run.write("The old", 20).removeprefix("The old")


def test_recall_of_what_it_writes_is_the_recall_of_the_lesson():
    run, corpus = tiny(emb_dim=64, max_steps=150, batch_size=16, val_fraction=0.0)
    seen = set()
    for _ in story_llm.training_steps(run, corpus):
        if run.step % 10 == 0:
            recall = experiments.written_recall(story_llm, run, TEXT)
            assert recall == story_llm.measure_recall(run.model, run.tokenizer, TEXT)
            seen.add(recall)
    assert len(seen) > 2 and {0, 1} <= seen
    assert experiments.written_recall(story_llm, run, "One two three.") is None


@pytest.mark.parametrize("total, steps", [
    (180, [20, 60, 180]), (9, [1, 3, 9]), (2, [1, 2]), (1, [1]), (100, [11, 33, 100])])
def test_the_table_has_the_losses_after_a_ninth_a_third_and_all_steps(total, steps, capsys):
    losses = {step: float(step) for step in range(total + 1)}
    experiments.log_results({"unchanged": (losses, 1.0, ""), "no-mask": (losses, None, "")})
    head, first, *_ = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert head[3:-1] == [str(step) for step in steps] and first[1:-1] == [f"{step:.3f}" for step in steps]


# recording

def test_a_prediction_is_followed_through_the_training():
    """Against a training of its own, whose probabilities are computed from the logits."""
    (run, corpus), (other, _) = (tiny(max_steps=20) for _ in range(2))
    recorded = experiments.record_prediction(run, corpus, "The old", every=7, n_best=2)
    ids = torch.tensor([other.tokenizer.encode("The old")])
    expected = {}

    def note():
        logits = other.model(ids)[0, -1].detach().double()
        expected[other.step] = logits.exp() / logits.exp().sum()

    note()
    for _ in story_llm.training_steps(other, corpus):
        note()
    assert recorded["prompt"] == "The old" and recorded["steps"] == [0, 7, 14, 20]
    best = {int(i) for step in recorded["steps"] for i in expected[step].argsort(descending=True)[:2]}
    names = dict(zip(story_llm.token_names(run.tokenizer, sorted(best)), sorted(best)))
    assert recorded["tokens"].keys() == names.keys()
    for name, values in recorded["tokens"].items():
        assert values == pytest.approx([expected[step][names[name]].item() for step in recorded["steps"]], rel=1e-4)
    assert len(best) > 3


def test_the_averages_are_those_of_the_gradients():
    run, corpus = tiny(max_steps=30)
    recorded = experiments.record_averages(run, corpus, "trf_blocks.0.ff.expand.weight", (2, 5), n_steps=12)
    m = v = 0
    for step, gradient in enumerate(recorded["gradients"]):
        m, v = 0.9 * m + 0.1 * gradient, 0.98 * v + 0.02 * gradient ** 2
        assert (recorded["m"][step], recorded["v"][step]) == pytest.approx((m, v), rel=1e-4)
    assert run.step == len(recorded["gradients"]) == 12 and len(set(recorded["gradients"])) == 12
    assert recorded["gradients"][-1] == run.model.trf_blocks[0].ff.expand.weight.grad[2, 5].item()


def test_what_is_recorded_has_four_digits_and_no_nan():
    assert experiments.rounded({"a": [1.23456, 12345.6, 3, "x"], "b": (1.23456e-9, math.nan, math.inf)}) == {
        "a": [1.235, 12350, 3, "x"], "b": [1.235e-9, None, None]}


@pytest.mark.parametrize("prompt, start", [
    ("Once Aadhan renounced his kingdom", "Once Aadhan renounced his"), ("Once", "Once")])
def test_the_last_word_of_the_prompt_is_predicted(prompt, start):
    assert experiments.without_last_word(prompt) == start


def test_a_training_that_diverges_is_a_result_and_no_error(capsys):
    _, corpus = tiny()
    diverged = train_changed(corpus, (), {"emb_dim": 32, "learning_rate": 1e8, "max_steps": 27, "precision": "fp32"})
    assert math.isnan(diverged[0][27])
    experiments.log_results({"unchanged": diverged})
    assert re.search(r"^  unchanged .* nan +\d", capsys.readouterr().out, re.MULTILINE)


# the command line

@pytest.fixture
def call(capsys):
    """call(*arguments) runs experiments.py in this process: (exit status, stdout, stderr)."""
    def run(*arguments):
        return experiments.main([*arguments]), *capsys.readouterr()
    return run


def test_list_says_of_each_experiment_what_it_changes_and_shows(call, monkeypatch):
    monkeypatch.setattr(experiments, "train_changed", None)         # nothing is trained
    status, out, err = call("--list")
    blocks = out.strip().split("\n\n")
    assert (status, err, len(blocks)) == (0, "", len(EXPERIMENTS))
    for block, (name, experiment) in zip(blocks, EXPERIMENTS.items()):
        assert block.startswith(f"{name} (step {experiment.step}): {experiment.change}\n")
        assert " ".join(experiment.shows.split()) in " ".join(block.split())
        removed, added = [[line[6:] for line in block.splitlines() if line.startswith(f"    {sign} ")] for sign in "-+"]
        assert len(removed) == len(added) == len(experiment.replacements) + len(experiment.settings)
        for line, new, (old_part, new_part) in zip(removed, added, experiment.replacements):
            assert line in SOURCE and line.replace(old_part, new_part) == new
    assert call("--list", "no-mask")[1] == next(block for block in blocks if block.startswith("no-mask")) + "\n\n"


@pytest.mark.parametrize("arguments, message", [
    (["no-hat"], "choose one of " + ", ".join(EXPERIMENTS)), (["--list", "--seed", "1"], "--list trains nothing"),
    (["no-mask", "--json", "a.json"], "--json records all experiments"),
    (["--list", "--json", "a.json"], "--list trains"),
    (["--json", "a.txt"], ".json"), (["--json", "missing/a.json"], "cannot be written"),
    (["no-mask", "--text", "missing.txt"], "missing.txt"), (["no-mask", "--max-steps", "-1"], "max_steps"),
    (["no-mask", "--max-steps", "x"], "--max-steps")])
def test_a_mistake_is_one_line(arguments, message, call, bare, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    status, out, err = call(*arguments)
    assert status == (2 if arguments[-1] == "x" else 1)
    assert out == "" and err.count("\n") == 1 and err.startswith("error: ") and message in err


def test_one_prints_its_table_beside_the_unchanged_run(call, folder):
    status, out, err = call("no-residual", "--text", "my.txt", "--max-steps", "9", "--seed", "3")
    assert status == 0 and re.findall("training .*(unchanged|no-residual)", err) == ["unchanged", "no-residual"]
    assert out.startswith("story tokenizer, 9 steps") and "no-residual (step 6)" in out
    assert re.search(r"^  loss after step +1 +3 +9 +recall$", out, re.MULTILINE)
    corpus = story_llm.corpus_from_text(TEXT, "story")
    run = train_to(story_llm.new_run(corpus, train_config=story_llm.TrainConfig(max_steps=9, seed=3)), corpus)
    losses = dict(re.findall(r"^  (\S+) +[\d.]+ +[\d.]+ +([\d.]+) +0.0%$", out, re.MULTILINE))
    assert list(losses) == ["unchanged", "no-residual"]
    assert losses["unchanged"] == f"{story_llm.mean_loss(run.model, corpus.train_ids):.3f}"
    assert losses["no-residual"] != losses["unchanged"]
    assert out.count(f"    {story_llm.first_words(TEXT)} ...") == 2


def test_without_a_name_all_of_them_run_with_equal_steps_and_the_unchanged_program_once(call, folder, monkeypatch):
    """What a training does is tested above, so here it only notes what it was given."""
    given = []

    def note_arguments(corpus, replacements, settings, prompt):
        given.append((replacements, settings))
        return {1: 0.5}, 0.0, "..."
    monkeypatch.setattr(experiments, "train_changed", note_arguments)
    status, out, err = call("--text", "my.txt", "--seed", "7")
    assert status == 0 and err.count("training ") == 1 + len(EXPERIMENTS)
    assert re.findall(r"^  ([a-z-]+) +0\.500 ", out, re.MULTILINE)[1::2] == [*EXPERIMENTS]
    usual = {"seed": 7, "max_steps": story_llm.new_run(story_llm.corpus_from_text(TEXT, "story")).total_steps}
    assert given == [((), usual), *((e.replacements, usual | e.settings) for e in EXPERIMENTS.values())]


def test_all_that_was_measured_goes_into_the_file(call, folder, monkeypatch):
    def note_settings(corpus, replacements, settings, prompt):
        return {0: 2.0, 3: 1 / 3 if replacements else math.nan}, 0.25, "a sample"
    monkeypatch.setattr(experiments, "train_changed", note_settings)
    assert call("--text", "my.txt", "--max-steps", "3", "--seed", "5", "--json", "a.json")[0] == 0
    record = json.loads((folder / "a.json").read_text(encoding="utf-8"))
    assert list(record["experiments"]) == ["unchanged", *EXPERIMENTS]
    assert record["experiments"]["unchanged"] == {"losses": {"0": 2.0, "3": None}, "recall": 0.25, "sample": "a sample"}
    assert record["experiments"]["no-mask"]["losses"] == {"0": 2.0, "3": 0.3333}
    assert (record["settings"]["seed"], record["settings"]["max_steps"], record["tokenizer"]) == (5, 3, "story")
    assert record["prediction"]["prompt"] == "The old ferryman tied"        # the first five words without the last
    assert record["prediction"]["steps"] == [0, 3] and len(record["averages"]["gradients"]) == 3
