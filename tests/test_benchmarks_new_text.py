"""benchmarks/new_text.py keeps the test part apart, and counts nats per character as the definition says, for any tokens."""
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, strategies as st

from helpers import ROOT, STORY, TEXT, lively_model, story_llm, tiny, train_to

sys.path.insert(0, str(ROOT / "benchmarks"))
import new_text  # noqa: E402

MODEL = lively_model(context_length=8, vocab_size=40)


def surprise(model, context, token):
    """-ln of the probability of a token after a context, in float64, from the definition of softmax."""
    with torch.no_grad():
        logits = model(torch.tensor([context]))[0, -1].double().tolist()
    return math.log(sum(math.exp(x - logits[token]) for x in logits))


@given(ids=st.lists(st.integers(0, 39), min_size=2, max_size=30), T=st.integers(1, 8), n_characters=st.integers(1, 90))
def test_every_token_is_predicted_once_from_the_tokens_of_its_window_before_it(ids, T, n_characters):
    losses = []
    for i in range(1, len(ids)):
        first = (i - 1) // T * T        # windows of T inputs: 0 to T - 1, T to 2 T - 1, ...
        losses.append(surprise(MODEL, ids[first:i], ids[i]))
    expected = sum(losses) / len(losses) * len(ids) / n_characters
    measured = new_text.nats_per_character(MODEL, torch.tensor(ids), T, n_characters)
    assert measured == pytest.approx(expected, rel=1e-4)


def test_the_tokenizer_does_not_matter_if_the_predictions_are_the_same():
    """Every pair of characters as one token is as uncertain as two characters, one after the other."""
    def uniform(vocab_size):
        return lambda token_ids: torch.zeros(*token_ids.shape, vocab_size)

    by_character = new_text.nats_per_character(uniform(26), torch.zeros(200, dtype=torch.long), 16, 200)
    by_pair = new_text.nats_per_character(uniform(26 ** 2), torch.zeros(100, dtype=torch.long), 7, 200)
    assert by_character == pytest.approx(math.log(26), rel=1e-5)
    assert by_pair == pytest.approx(by_character, rel=1e-5)


@given(text=st.text(max_size=200), n_bytes=st.integers(0, 300))
def test_the_last_tenth_is_the_test_part_and_the_first_comes_last(text, n_bytes):
    part, test_part = new_text.split(text, n_bytes)
    whole = text.encode()[:n_bytes or None].decode(errors="ignore")
    assert len(whole) * 0.9 - 1 < len(part) <= len(whole) * 0.9
    n = len(part) // 10
    assert part[len(part) - n:] + part[:len(part) - n] == whole[:len(part)]
    assert [c for c in whole[len(part):] if c in part] == list(test_part)


@pytest.mark.parametrize("tokenizer", ["word", "story"])
def test_a_checkpoint_is_measured_on_the_whole_test_part(tmp_path, tokenizer):
    run, corpus = tiny(TEXT * 3, tokenizer, max_steps=30, val_fraction=0.3)
    story_llm.save_checkpoint(tmp_path / "story_llm.pt", train_to(run, corpus))
    test_text = TEXT[50:350]
    (tmp_path / "test.txt").write_text(test_text, encoding="utf-8")
    result = new_text.measure_story_llm(tmp_path, 40)
    T, ids = run.config.context_length, run.tokenizer.encode(test_text)
    losses = [surprise(run.model, ids[(i - 1) // T * T:i], ids[i]) for i in range(1, len(ids))]
    assert result["nats"] == pytest.approx(sum(losses) / len(losses) * len(ids) / len(test_text), rel=1e-4)
    assert result["steps"] == 30 and result["parameters"] == story_llm.count_parameters(run.model)
    line = new_text.first_line(test_text)
    assert line in test_text and line.endswith("\n") and result["sample"].startswith(line)
    assert len(result["sample"]) <= len(line) + 40


def test_a_missing_peer_is_absent_with_a_reason(tmp_path):
    assert "give --nanogpt PATH" in new_text.train_nanogpt("", tmp_path, [])["absent"]
    assert "model.py" in new_text.train_nanogpt(tmp_path, tmp_path, [])["absent"]
    assert "give --nanogpt PATH" in new_text.train_equal_nanogpt("", tmp_path, 9.0)["absent"]


@given(st.integers(1, 5000))
def test_the_last_iteration_of_nanogpt_is_saved(wanted):
    values = dict(setting.removeprefix("--").split("=") for setting in new_text.length_settings(wanted))
    iterations, interval = int(values["max_iters"]), int(values["eval_interval"])
    assert iterations % interval == 0 and 1 <= interval <= 250
    assert wanted - wanted / 250 - 1 < iterations <= wanted and int(values["lr_decay_iters"]) == max(iterations, 200)


@given(start=st.floats(0, 9), each=st.floats(0.01, 2), seconds=st.floats(50, 999))
def test_a_training_for_a_time_takes_that_time(start, each, seconds):
    """If iterations take equally long, however long the start takes."""
    done = new_text.train_for(seconds, lambda iterations: {"seconds": start + iterations * each})
    assert done["seconds"] == pytest.approx(seconds, abs=0.51 * each + 1e-6)


def test_the_table_lists_what_is_absent_and_compares_seconds_with_the_quick_start(capsys):
    measured = {"seconds": 30.0, "steps": 7, "parameters": 9, "context": "4 tokens", "nats": 1.5, "sample": "Once."}
    titles = {"quick": "nanoGPT", "3": "short", "9": "long"}
    results = {"quick": [{**measured, "seconds": 60.0}], "3": [measured],
               "9": [{"absent": "failed: no text"}]}
    new_text.print_trainings(results, titles)
    printed = capsys.readouterr().out
    row = [cell.strip() for line in printed.splitlines() if line.startswith("| short") for cell in line.split("|")]
    assert row[2] == "30" and row[4] == "0.50" and "1.500" in row
    assert "long: failed: no text" in printed and "short, at temperature 0.8:\n\nOnce." in printed


def test_the_program_runs_from_training_to_the_table():
    """With the short story and a single epoch, and without nanoGPT."""
    done = subprocess.run([sys.executable, ROOT / "benchmarks" / "new_text.py", "--text", STORY, "--epochs", "1",
                           "--characters", "20"], capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert "give --nanogpt PATH" in done.stdout and "at temperature 0.8" in done.stdout
    row = next(line for line in done.stdout.splitlines() if line.startswith("| story_llm"))
    nats = float(row.split("|")[-3])
    assert 0.5 < nats < math.log(256)
