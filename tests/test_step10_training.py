"""Step 10: the learning rate, the batches, the training steps, and what training must leave alone."""
import copy
import dataclasses
import itertools
import math
import random
from itertools import islice

import pytest
import torch
from hypothesis import given, strategies as st

from helpers import ROOT, TEXT, note_questions, same, story_llm, tiny, train_to, trained, weights_equal
from story_llm import (IGNORE_INDEX, StoryError, TrainConfig, batch_loss, corpus_from_text, generate_text,
                       learning_rate, load_checkpoint, mean_loss, measure_recall, new_run, optimizer_averages,
                       prompt_window, save_checkpoint, shuffled, start_training, train, training_batches,
                       training_steps, use_bf16, window_starts)


# the learning rate

@given(total=st.integers(1, 500), warmup=st.integers(0, 600), peak=st.floats(1e-6, 1.0))
def test_the_learning_rate_rises_to_its_peak_then_falls_and_is_never_0(total, warmup, peak):
    config = TrainConfig(warmup_steps=warmup, learning_rate=peak)
    rates = [learning_rate(step, total, config) for step in range(total)]
    top = rates.index(max(rates))
    assert all(0 < rate <= peak * (1 + 1e-9) for rate in rates) and max(rates) == pytest.approx(peak)
    assert top <= min(warmup, total // 10)
    assert rates[:top + 1] == sorted(rates[:top + 1]) and rates[top:] == sorted(rates[top:], reverse=True)


def test_every_step_is_taken_with_its_learning_rate_and_the_clipped_gradient(monkeypatch):
    """After the first step, AdamW's first average is a tenth of the gradient."""
    for grad_clip in (0.01, 1e6):
        run, corpus = tiny(max_steps=20, learning_rate=0.5, warmup_steps=2, grad_clip=grad_clip)
        used, (batch,) = [], batches_from(run, corpus, 1)
        start_training(run, corpus)
        batch_loss(run.model, *batch).backward()
        gradients = torch.cat([p.grad.flatten() for p in run.model.parameters()])
        step = run.optimizer.step
        monkeypatch.setattr(run.optimizer, "step", lambda lr: (used.append(lr), step(lr)))
        for _ in training_steps(run, corpus):
            if run.step == 1:
                averages = torch.cat([10 * m.flatten() for m, _ in run.optimizer.averages.values()])
        assert used == [learning_rate(step, 20, run.train_config) for step in range(20)]
        clipped = gradients * min(1, grad_clip / gradients.norm().item())
        torch.testing.assert_close(averages, clipped, rtol=1e-3, atol=1e-7)


# which windows are in a batch

@given(count=st.integers(1, 50), passes=st.integers(1, 5), seed=st.integers(0, (1 << 63) + 2))
def test_shuffling_gives_every_item_once_before_any_comes_again(count, passes, seed):
    items = list(range(100, 100 + count))
    stream = list(islice(shuffled(items, seed), count * passes))
    for start in range(0, len(stream), count):
        assert sorted(stream[start:start + count]) == items


def test_every_pass_is_shuffled_anew_and_the_seed_decides_how():
    one, two = [list(islice(shuffled(range(50), seed), 100)) for seed in (1, 2)]
    assert one[:50] != one[50:] and one[:50] != sorted(one[:50])
    assert one != two and one == list(islice(shuffled(range(50), 1), 100))


@given(n_windows=st.integers(1, 200), T=st.integers(1, 40), seed=st.integers(0, 1000))
def test_sliding_windows_cover_the_text_once_per_epoch(n_windows, T, seed):
    """Let N = n_windows + T be the number of tokens. The last one is only a target, so there are N - 1 inputs. If the
    text were a ring, an epoch would consist of as few windows as can cover it. Because it is not, there is a gap of
    fewer than T inputs, at its ends and at another position in each epoch."""
    per_epoch = math.ceil(n_windows / T)
    stream = list(islice(window_starts(n_windows, T, seed), 3 * per_epoch))
    for first in range(0, len(stream), per_epoch):
        starts = sorted(stream[first:first + per_epoch])
        assert len(set(starts)) == per_epoch and 0 <= starts[0] and starts[-1] < n_windows
        ring = [*starts, starts[0] + n_windows]
        assert all(later - earlier <= T for earlier, later in itertools.pairwise(ring))
        covered = {position for start in starts for position in range(start, start + T)}
        assert n_windows + T - 1 - len(covered) < T


def test_the_windows_of_every_epoch_are_shuffled_and_start_at_another_offset():
    stream = list(islice(window_starts(8 * 20, 8, seed=1), 2 * 20))
    first, second = stream[:20], stream[20:]
    assert first != sorted(first) and {start % 8 for start in first} != {start % 8 for start in second}
    assert stream != list(islice(window_starts(8 * 20, 8, seed=2), 2 * 20))


def batches_from(run, corpus, count):
    """The batches of the next steps of a run, as they would be if it were long enough. No step is taken."""
    run = dataclasses.replace(run, total_steps=run.step + count)
    return list(islice(training_batches(run, corpus), count))


def rows_of(batch):
    """All (input, target) pairs of a batch, as tuples."""
    return list(zip(*(map(tuple, part.tolist()) for part in batch)))


def run_on_numbers(**changed):
    """A run and a corpus of the tokens 0, 1, 2, ..., so that a window shows where it starts. There are 96 windows."""
    _, corpus = tiny()
    config = story_llm.GPTConfig(context_length=8, emb_dim=8)
    corpus = dataclasses.replace(corpus, train_ids=torch.arange(96 + 8))
    return new_run(corpus, config, TrainConfig(prompt_windows=0.0, **changed)), corpus


def test_training_sees_every_part_of_the_text_equally_often_and_every_window_in_the_end():
    run, corpus = run_on_numbers(batch_size=5, epochs=60)
    assert run.steps_per_epoch == 3 and run.total_steps == 180      # 12 windows of 8 tokens, 5 in each step
    counts, seen = [0] * 12, set()
    for step, batch in enumerate(batches_from(run, corpus, 180)):
        for inputs, _ in rows_of(batch):
            counts[inputs[0] // 8] += 1
            seen.add(inputs[0])
        if step == 2:
            assert min(counts) >= 1                                 # after one epoch
        assert max(counts) - min(counts) <= 1
    assert seen == set(range(96))


@pytest.mark.parametrize("tokenizer", ["word", "story"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
def test_a_batch_has_sliding_windows_and_windows_that_are_tokenized_like_prompts(tokenizer, share):
    """A prompt window is the text from the beginning of a word on, encoded by itself. Behind the end of the text stands
    `<|endoftext|>`, and beyond it the targets are padding."""
    run, corpus = tiny(tokenizer=tokenizer, context_length=10, prompt_windows=share, batch_size=16, max_steps=40)
    text, T = corpus.train_text, 10
    sliding = {(tuple(w[:-1]), tuple(w[1:])) for w in corpus.train_ids.unfold(0, T + 1, 1).tolist()}
    starts = [i for i in range(len(text)) if not text[i].isspace() and (i == 0 or text[i - 1].isspace())]
    prompts = {}
    for start in starts:
        ids = [*run.tokenizer.encode(text[start:]), run.tokenizer.end_of_text][:T + 1]
        missing = T + 1 - len(ids)
        prompts[tuple((ids + [0] * missing)[:T]), tuple((ids + [IGNORE_INDEX] * missing)[1:])] = start
    n_prompts, seen = int(16 * share), []
    for batch in batches_from(run, corpus, 40):
        rows = rows_of(batch)
        assert all(row in sliding for row in rows[:16 - n_prompts])
        assert all(row in prompts for row in rows[16 - n_prompts:])
        seen.append([prompts[row] for row in rows[16 - n_prompts:]])
    sentences = {start for start in starts if start == 0 or text[start - 1] == "\n"}
    for batch in seen:                                              # one in five starts at any word
        assert sum(start in sentences for start in batch) >= n_prompts - n_prompts // 5
    seen = set(sum(seen, []))
    assert share == 0 or sentences < seen and len(seen) > len(starts) / 3


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_every_batch_has_its_full_size(share, batch_size):
    run, corpus = tiny(prompt_windows=share, batch_size=batch_size, max_steps=60)
    batches = batches_from(run, corpus, 60)
    assert {tuple(part.shape) for batch in batches for part in batch} == {(batch_size, 12)}
    assert {part.dtype for batch in batches for part in batch} == {torch.long}


def test_padding_is_no_input_and_does_not_count():
    """A window that is half padding has the loss and the gradient of its first half."""
    run, corpus = tiny(context_length=10, val_fraction=0.0)
    window = torch.tensor([prompt_window(corpus, len(TEXT) - 20, 10)])
    length = (window[0] != IGNORE_INDEX).sum().item()
    assert 2 < length < 8
    gradients = []
    for part in (window, window[:, :length]):
        run.model.zero_grad()
        batch_loss(run.model, part[:, :-1].clamp(min=0), part[:, 1:]).backward()
        gradients.append(run.model.trf_blocks[0].att.query.weight.grad.clone())
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("tokenizer", ["word", "story"])
def test_the_batch_of_a_step_depends_on_the_seed_alone(tokenizer):
    def make(seed=1, **changed):
        return tiny(tokenizer=tokenizer, seed=seed, **changed)

    in_order = batches_from(*make(), 12)
    run, corpus = make()
    torch.manual_seed(99)
    for step in (11, 3, 7, 0):              # a resumed training begins like this
        run.step = step
        assert same(batches_from(run, corpus, 12 - step), in_order[step:])
    other = make(max_steps=500, drop_rate=0.3, learning_rate=1.0, emb_dim=16, optimizer="muon")
    assert same(batches_from(*other, 12), in_order)
    assert not same(in_order[3], in_order[4])
    assert not same(batches_from(*make(seed=2), 12)[3], in_order[3])


def test_training_takes_these_batches_one_after_the_other(monkeypatch):
    run, corpus = tiny(max_steps=5, eval_every=100)
    expected, taken, original = batches_from(run, corpus, 5), [], story_llm.batch_loss

    def noted(model, inputs, targets):
        if model.training:
            taken.append((inputs, targets))
        return original(model, inputs, targets)
    monkeypatch.setattr(story_llm, "batch_loss", noted)
    train_to(run, corpus)
    assert same(taken, expected) and run.step == 5


# training as a whole

@pytest.fixture(scope="module")
def usual():
    """(a run with the default number of steps, the (step, loss) after each of them)"""
    run, corpus = tiny(epochs=0, eval_every=40, val_fraction=0.2)
    return run, [(run.step, run.loss) for _ in training_steps(run, corpus)]


def test_the_loss_falls_and_the_history_has_every_evaluation(usual):
    run, _ = usual
    steps = [evaluation.step for evaluation in run.history]
    assert run.total_steps == 150
    assert steps == [0, 3, 8, 40, 80, 120, 150]             # 0, 2, 5 and 100 %, and every 40 steps
    losses = [evaluation.train_loss for evaluation in run.history]
    assert losses[-1] < losses[0] / 3 and abs(losses[0] - math.log(run.config.vocab_size)) < 0.5
    assert all(evaluation.epoch * run.steps_per_epoch == pytest.approx(evaluation.step) for evaluation in run.history)
    assert {evaluation.prompt for evaluation in run.history} == {"The old ferryman tied his"}
    assert run.history[-1].sample.startswith(" boat") and not run.history[0].sample.startswith(" boat")


def test_an_evaluation_describes_the_model_at_that_step(usual):
    run, _ = usual
    _, corpus = tiny(val_fraction=0.2)
    last = run.history[-1]
    assert last.train_loss == pytest.approx(mean_loss(run.model, corpus.train_ids), rel=1e-5)
    assert last.val_loss == pytest.approx(mean_loss(run.model, corpus.val_ids), rel=1e-5)
    assert last.recall == measure_recall(run.model, run.tokenizer, corpus.train_text, max_sentences=25)
    assert last.sample == "".join(generate_text(run.model, run.tokenizer, run.prompt, 24))


def test_the_loss_of_a_run_is_that_of_its_last_batch_before_the_step():
    run, corpus = tiny(max_steps=3)
    for batch in batches_from(run, corpus, 1):
        expected = batch_loss(run.model, *batch).item()
    train_to(run, corpus, 1)
    assert run.loss == pytest.approx(expected, rel=1e-5)


def test_what_cannot_be_measured_is_none_and_a_prompt_is_no_whole_text():
    for count, is_split in ((50, False), (60, True)):        # of 950 characters, a tenth would be 95
        run = trained("They went upriver. " * count, max_steps=1)
        assert {evaluation.recall for evaluation in run.history} == {None}
        assert {evaluation.val_loss is not None for evaluation in run.history} == {is_split}
    assert len(tiny("ACGT" * 500, "story")[0].prompt) == 200


def test_long_trainings_are_evaluated_about_as_often_as_short_ones():
    """Otherwise evaluations would take most of the time where a step takes a millisecond, as on a GPU."""
    counts = {}
    for total in (1, 44, 180, 900, 10_000, 1_000_000):
        run, _ = tiny(max_steps=total, eval_every=0)
        due = []
        for run.step in range(0, total + 1, 45 if total == 180 else 1 if total < 45 else total // 20):
            due.append(story_llm.evaluation_due(run))
        counts[total] = sum(due)
    assert counts[180] == 5 and counts[900] == counts[10_000] == counts[1_000_000] == 21 and counts[1] == 2


def test_control_returns_after_every_step_with_dropout_off(usual):
    _, seen = usual
    assert [step for step, _ in seen] == list(range(1, 151)) and all(0 < loss < 10 for _, loss in seen)
    run, corpus = tiny(drop_rate=0.5, eval_every=1)
    modes = []
    run.model.out_head.register_forward_hook(lambda module, inputs, output: modes.append(run.model.training))
    for _ in training_steps(run, corpus):
        assert not any(module.training for module in run.model.modules())
    assert modes.count(True) == run.total_steps < modes.count(False) and modes[0] is False


def test_an_exception_in_the_forward_pass_leaves_the_model_ready_to_write_to_be_saved_and_to_go_on(tmp_path):
    """Otherwise dropout would stay on: greedy text would differ each time, and a saved file could not be loaded."""
    run, corpus = tiny(drop_rate=0.5, precision="bf16")
    train_to(run, corpus, 2)
    before = global_state()

    def fail(module, inputs, output):
        raise KeyboardInterrupt
    with run.model.final_norm.register_forward_hook(fail), pytest.raises(KeyboardInterrupt):
        train_to(run, corpus)
    assert run.step == 2 and global_state() == before and not any(part.training for part in run.model.modules())
    assert len({run.write("The old", 9) for _ in range(5)}) == 1
    save_checkpoint(tmp_path / "run.pt", run)
    assert weights_equal(load_checkpoint(tmp_path / "run.pt").model, run.model)
    whole = trained(drop_rate=0.5, precision="bf16")
    assert weights_equal(train_to(run, corpus).model, whole.model) and run.history == whole.history


def test_a_step_asks_the_device_for_one_number_and_touches_no_random_state_without_dropout(monkeypatch):
    run, corpus = tiny(max_steps=8, eval_every=100, precision="auto")
    train_to(run, corpus, 3)
    events = note_questions(monkeypatch, run)
    forks = []
    monkeypatch.setattr(torch.random, "fork_rng", lambda *args: forks.append(args) or pytest.fail("forked"))
    train_to(run, corpus, 7)
    numbers = [event for event in events if event != "tolist"]      # of positions of windows, on the CPU
    assert numbers == ["backward", "step", "item"] * 4 and not forks


def test_called_plainly_train_trains_and_with_a_path_there_is_always_a_file(tmp_path, capsys):
    run, corpus = tiny(max_steps=6)
    train(run, corpus)
    assert run.step == 6 and capsys.readouterr().out.count("Train loss") == len(run.history) > 2
    train(run, corpus, tmp_path / "run.pt")                 # nothing is left to do
    assert capsys.readouterr().out == "" and weights_equal(load_checkpoint(tmp_path / "run.pt").model, run.model)
    run, corpus = tiny(max_steps=6)
    for _ in training_steps(run, corpus):
        pass
    train(run, corpus, tmp_path / "loop.pt")
    assert same(*(torch.load(tmp_path / name, weights_only=True) for name in ("run.pt", "loop.pt")))


def test_a_caller_who_leaves_the_loop_stops_the_training_which_can_go_on_without_a_file():
    whole, (run, corpus) = trained(), tiny()
    for stop_at in (1, 3, 4, 7, None):
        train_to(run, corpus, stop_at)
        assert run.step == (stop_at or 12) and not run.model.training and torch.is_grad_enabled()
    assert run.history == whole.history and weights_equal(run.model, whole.model)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_same_seed_gives_the_same_weights_bit_for_bit_and_another_seed_others(precision):
    changed = {"precision": precision, "drop_rate": 0.1, "max_steps": 6, "eval_every": 100}
    torch.manual_seed(1)
    first = trained(**changed)
    torch.manual_seed(2)
    again = trained(**changed)
    other = trained(**changed, seed=7)
    assert weights_equal(first.model, again.model) and first.history == again.history
    assert not weights_equal(first.model, other.model)


@pytest.mark.parametrize("kind", [
    {"tokenizer": "story", "precision": "bf16"}, {"position": "sinusoidal"},
    {"position": "rotary", "tie_weights": True, "qkv_bias": True, "gelu": "tanh"}], ids=str)
def test_every_kind_of_model_can_memorize_the_text(kind):
    run = trained(emb_dim=64, epochs=70, eval_every=1000, val_fraction=0.0, batch_size=16, learning_rate=4e-3, **kind)
    assert measure_recall(run.model, run.tokenizer, TEXT) == 1.0


OTHER_VALUES = {"epochs": 5, "max_steps": 7, "batch_size": 9, "optimizer": "muon", "learning_rate": 1e-3,
                "warmup_steps": 1, "weight_decay": 0.5, "grad_clip": 0.01, "prompt_windows": 0.9, "val_fraction": 0.3,
                "eval_every": 4, "keep_best": True, "precision": "bf16", "seed": 1}


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(TrainConfig)])
def test_every_training_setting_has_an_effect_and_is_saved(name, tmp_path):
    """A new setting needs another value in the dictionary above, so none can be without effect or get lost."""
    value = OTHER_VALUES[name]
    usual = {"epochs": 10, "val_fraction": 0.2}
    usual, changed = trained(**usual), trained(**{**usual, name: value})
    assert getattr(changed.train_config, name) == value != getattr(usual.train_config, name)
    assert not weights_equal(changed.model, usual.model) or changed.history != usual.history
    save_checkpoint(tmp_path / "run.pt", changed)
    assert load_checkpoint(tmp_path / "run.pt").train_config == changed.train_config


# keeping the best weights

BEST = {"keep_best": True, "val_fraction": 0.3, "epochs": 0, "max_steps": 100, "eval_every": 5, "learning_rate": 0.01,
        "drop_rate": 0.1}


def lowest(history):
    return min(history, key=lambda evaluation: evaluation.val_loss)


@pytest.fixture(scope="module")
def best_run():
    """(a run that kept its best weights, its corpus, {step: the model after it})"""
    run, corpus = tiny(**BEST)
    models = {0: copy.deepcopy(run.model)}
    for _ in training_steps(run, corpus):
        if run.step < run.total_steps:
            models[run.step] = copy.deepcopy(run.model)
    return run, corpus, models


def test_training_ends_with_the_weights_of_the_lowest_validation_loss_and_not_long_after_it(best_run):
    run, corpus, models = best_run
    best = lowest(run.history)
    assert 0 < best.step < run.step == run.total_steps < 100
    assert best.step + 20 < run.step <= best.step + 25      # a fifth of the steps, and then the next evaluation
    assert weights_equal(run.model, models[best.step]) and story_llm.step_of_weights(run) == best.step
    assert mean_loss(run.model, corpus.val_ids) == pytest.approx(best.val_loss, rel=1e-6)
    plain = train_to(*tiny(**{**BEST, "keep_best": False}), step=run.step)
    assert same(run.last_weights, dict(plain.model.state_dict()))


@pytest.mark.parametrize("stop_at", [1, 5, 13, 27])
def test_a_file_of_an_unfinished_training_has_the_best_weights_so_far_and_goes_on_from_the_last(
        best_run, stop_at, tmp_path):
    whole, corpus, models = best_run
    save_checkpoint(tmp_path / "run.pt", train_to(tiny(**BEST)[0], corpus, stop_at))
    run = load_checkpoint(tmp_path / "run.pt")
    best = lowest(run.history)
    assert story_llm.step_of_weights(run) == best.step and weights_equal(run.model, models[best.step])
    save_checkpoint(tmp_path / "again.pt", run)
    again = train_to(load_checkpoint(tmp_path / "again.pt"), corpus, stop_at + 1)
    assert weights_equal(again.model, models[stop_at + 1])
    train_to(again, corpus)
    assert again.history == whole.history and again.step == whole.step and weights_equal(again.model, whole.model)


@pytest.mark.parametrize("from_file", [True, False])
def test_a_finished_training_that_kept_the_best_goes_on_from_the_last_weights_and_their_averages(
        best_run, from_file, tmp_path):
    """As a training that never kept any, with the same rates."""
    if from_file:
        save_checkpoint(tmp_path / "run.pt", best_run[0])
        run, corpus = load_checkpoint(tmp_path / "run.pt"), best_run[1]
    else:
        run, corpus = tiny(**BEST)
        train_to(run, corpus)
    end = run.step
    plain = train_to(*tiny(**{**BEST, "keep_best": False}), step=end)
    for one in (run, plain):
        one.total_steps, one.first_step = end + 15, end
        train_to(one, corpus, end + 1)
    assert weights_equal(run.model, plain.model) and run.loss == plain.loss
    assert same(optimizer_averages(run), optimizer_averages(plain))
    train_to(run, corpus)
    train_to(plain, corpus)
    assert end < run.step and run.history == [e for e in plain.history if e.step <= run.step]
    assert mean_loss(run.model, corpus.val_ids) == pytest.approx(lowest(run.history).val_loss, rel=1e-6)


def test_patience_counts_from_where_a_resumed_training_begins(best_run):
    """If the best weights are from long before, it still takes a fifth of its steps after the lowest loss since."""
    run = train_to(tiny(**BEST)[0], best_run[1])
    run.first_step, run.total_steps = run.step, run.step + 50
    first = run.step
    train_to(run, best_run[1])
    since = lowest([e for e in run.history if e.step > first])
    assert since.val_loss > lowest(run.history).val_loss
    assert since.step + 10 < run.step <= since.step + 15 < first + 50


@pytest.mark.parametrize("losses, steps, best", [
    ([3.0, 2.9, 2.8, 2.7, 2.6, 2.5, 2.4, 2.3, 2.2, 2.1], 50, None),      # above the lowest so far, but it falls
    ([3.0, 2.9, 2.8, 2.7, 2.6, 2.5, 2.4, 1.0, 0.4, 0.3], 50, 50),
    ([3.0, 2.9, 2.8, 2.8, 2.8, 2.8, 2.4, 1.0, 0.4, 0.3], 30, None)], ids=str)
def test_a_resumed_training_goes_on_while_its_loss_falls_even_from_above_the_lowest(
        best_run, losses, steps, best, monkeypatch):
    run = train_to(tiny(**BEST)[0], best_run[1])
    before, first = lowest(run.history), run.step
    run.first_step, run.total_steps = first, first + 50
    later = iter([loss * before.val_loss for loss in losses])       # 1 is the lowest so far
    monkeypatch.setattr(story_llm, "evaluation_due", lambda run: (run.step - first) % 5 == 0)
    monkeypatch.setattr(story_llm, "evaluate", lambda run, corpus: story_llm.Evaluation(
        run.step, 1.0, 1.0, next(later), None, "", ""))
    train_to(run, best_run[1])
    assert run.step == run.total_steps == first + steps
    assert story_llm.step_of_weights(run) == (before.step if best is None else first + best)
    assert best is not None or weights_equal(run.model, best_run[0].model)


def test_if_the_validation_loss_never_falls_the_untrained_weights_are_kept_and_if_it_falls_to_the_end_the_last():
    run, corpus = tiny(**{**BEST, "learning_rate": 5.0, "warmup_steps": 0})
    untrained = copy.deepcopy(run.model)
    train_to(run, corpus)
    assert lowest(run.history).step == 0 and weights_equal(run.model, untrained) and run.step < 100
    run, other = [trained(4 * TEXT, **{**BEST, "max_steps": 10, "keep_best": keep_best}) for keep_best in (True, False)]
    assert run.step == 10 and weights_equal(run.model, other.model) and other.best_weights is other.last_weights is None


def test_without_a_validation_split_keeping_the_best_weights_is_refused():
    with pytest.raises(StoryError, match="--keep-best.* needs a validation split"):
        train_to(*tiny(**{**BEST, "val_fraction": 0.0}), step=1)


# gradients that are left over

FEW_STEPS = {"max_steps": 6, "eval_every": 100, "drop_rate": 0.1}


@pytest.mark.parametrize("step", [0, 3])
def test_a_step_that_was_interrupted_after_the_gradient_can_be_taken_again(step, monkeypatch):
    run, corpus = tiny(**FEW_STEPS)
    clip = torch.nn.utils.clip_grad_norm_

    def interrupted(*arguments):
        if run.step == step:
            monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
            raise KeyboardInterrupt
        return clip(*arguments)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_to(run, corpus)
    assert run.step == step and any(p.grad is not None for p in run.model.parameters())
    train_to(run, corpus)
    whole = trained(**FEW_STEPS)
    assert weights_equal(run.model, whole.model) and run.step == whole.step


# NaN and infinity

def spoil_weight(run):
    with torch.no_grad():
        run.model.trf_blocks[0].ff.expand.weight[0, 0] = math.nan


def spoil_gradient(run):
    run.model.final_norm.bias.register_hook(lambda grad: grad * math.inf)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("spoil, last", [(spoil_weight, 20), (spoil_gradient, 21)])
@pytest.mark.parametrize("eval_every", [1, 1000])
def test_a_model_that_computes_nan_stops_its_training_in_one_line_and_never_replaces_a_good_one(
        optimizer, spoil, last, eval_every, tmp_path, capsys):
    """After step 20. If only the gradient is spoiled, the loss of the step is still finite."""
    run, corpus = tiny(optimizer=optimizer, eval_every=eval_every, max_steps=100)
    train_to(run, corpus, 20)
    save_checkpoint(tmp_path / "run.pt", run)
    spoil(run)
    with pytest.raises(StoryError) as caught:
        for _ in training_steps(run, corpus):
            assert run.step <= last
            save_checkpoint(tmp_path / "run.pt", run)
    assert "\n" not in str(caught.value) and "--learning-rate" in str(caught.value)
    loaded = load_checkpoint(tmp_path / "run.pt")
    assert loaded.step == 20 and all(p.isfinite().all() for p in loaded.model.parameters())


# what training must not change

def global_state():
    return (torch.get_rng_state().tolist(), random.getstate(), torch.get_default_dtype(), torch.is_grad_enabled(),
            torch.get_num_threads(), torch.is_autocast_enabled("cpu"), torch.are_deterministic_algorithms_enabled(),
            torch.get_float32_matmul_precision(), torch.is_anomaly_enabled())


def test_making_training_saving_and_loading_a_run_leave_the_global_state_alone(tmp_path):
    torch.manual_seed(7)
    torch.rand(3)
    before = global_state()
    run, corpus = tiny(drop_rate=0.3, precision="bf16")
    assert global_state() == before
    for _ in training_steps(run, corpus):
        assert global_state() == before
    assert global_state() == before
    save_checkpoint(tmp_path / "model.pt", run)
    load_checkpoint(tmp_path / "model.pt")
    assert global_state() == before


# precision

def test_weights_and_optimizer_state_are_float32_whatever_the_precision():
    run = trained(precision="bf16", max_steps=2)
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}
    assert {average.dtype for entry in optimizer_averages(run).values() for average in entry} == {torch.float32}


CAPABILITIES = [({"avx512_bf16": True, "amx_bf16": False}, True), ({"amx_bf16": True}, True), ({"bf16": True}, True),
                ({}, False), ({"avx512_bf16": False, "amx_bf16": False, "avx2": True, "avx512_f": True}, False)]


@pytest.mark.parametrize("capabilities, expected", CAPABILITIES, ids=str)
def test_auto_chooses_bf16_on_a_cpu_with_instructions_for_it(capabilities, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    cpu = torch.device("cpu")
    assert use_bf16(cpu, "auto") is expected
    for device in ("cpu", "cuda"):
        assert [use_bf16(torch.device(device), wish) for wish in ("bf16", "fp32")] == [True, False]
    assert use_bf16(torch.device("mps"), "auto") is False
    seen = {True: set(), False: set()}
    run, corpus = tiny(precision="auto", max_steps=2)
    run.model.out_head.register_forward_hook(lambda part, inputs, output: seen[run.model.training].add(output.dtype))
    train_to(run, corpus)
    wanted = torch.bfloat16 if expected else torch.float32
    assert seen[True] == {wanted} and wanted in seen[False]


@pytest.mark.parametrize("capability, expected", [((7, 5), False), ((8, 0), True), ((9, 0), True), ((12, 1), True)])
def test_auto_chooses_bf16_on_gpus_since_ampere(capability, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"bf16": True}, raising=False)   # says nothing of a GPU
    assert use_bf16(torch.device("cuda"), "auto") is expected


# dropout

def loss_of_a_step(torch_seed, step=0, seed=42, drop_rate=0.5):
    """Of the first batch, as if it were that of another step or another seed."""
    run, corpus = tiny(max_steps=9, drop_rate=drop_rate)
    batch, = batches_from(run, corpus, 1)
    run.train_config, run.step = dataclasses.replace(run.train_config, seed=seed), step
    torch.manual_seed(torch_seed)
    with story_llm.training_mode(run):
        return batch_loss(run.model, *batch).item()


def test_what_dropout_drops_depends_on_seed_and_step_alone():
    dropping = loss_of_a_step(1)
    assert dropping == loss_of_a_step(2)
    assert dropping != loss_of_a_step(1, step=1) and dropping != loss_of_a_step(1, seed=43)
    without = loss_of_a_step(1, drop_rate=0.0)
    assert without == loss_of_a_step(1, step=1, drop_rate=0.0) == loss_of_a_step(1, seed=43, drop_rate=0.0) != dropping


# resuming

@pytest.mark.parametrize("kind", [
    {"drop_rate": 0.1}, {"precision": "bf16", "tokenizer": "story"},
    {"tie_weights": True, "position": "rotary", "drop_rate": 0.2, "precision": "bf16"},
    {"position": "sinusoidal", "weight_decay": 0.1, "qkv_bias": True},
    {"optimizer": "muon", "gelu": "tanh", "drop_rate": 0.1, "weight_decay": 0.1},
    {"optimizer": "muon", "tie_weights": True, "precision": "bf16"},
    {"keep_best": True, "val_fraction": 0.3, "max_steps": 20, "learning_rate": 0.01, "drop_rate": 0.1},
    {"keep_best": True, "val_fraction": 0.3, "optimizer": "muon", "max_steps": 20}], ids=str)
def test_training_that_is_resumed_at_every_step_ends_bit_for_bit_as_without_a_stop(kind, tmp_path):
    kind = {"max_steps": 8, "eval_every": 3, **kind}
    path = tmp_path / "model.pt"
    whole, corpus = tiny(**kind)
    on_the_way = [(copy.deepcopy(whole.model), copy.deepcopy(optimizer_averages(whole)), whole.loss)
                  for _ in training_steps(whole, corpus)]
    run, corpus = tiny(**kind)
    save_checkpoint(path, run)
    for step, (model, state, loss) in enumerate(on_the_way, start=1):
        torch.manual_seed(step)
        run = load_checkpoint(path)
        train_to(run, corpus, step)
        assert run.step == step and run.loss == loss
        assert weights_equal(run.model, model) and same(optimizer_averages(run), state)
        save_checkpoint(path, run)
    assert len(on_the_way) == whole.step >= 6 and run.history == whole.history


def test_more_steps_go_on_with_the_batches_that_would_have_come():
    run, corpus = tiny()
    in_order = batches_from(run, corpus, 24)
    train_to(run, corpus)
    assert run.step == run.total_steps == 12
    run.total_steps = 24
    assert same(batches_from(run, corpus, 12), in_order[12:])
    train_to(run, corpus)
    steps = [evaluation.step for evaluation in run.history]
    assert run.step == 24 and steps == sorted(set(steps)) and steps[-1] == 24


def test_a_run_that_is_beyond_its_last_step_is_left_alone():
    """This happens with --resume and fewer steps than were taken."""
    run = trained()
    _, corpus = tiny()
    before, history = copy.deepcopy(run.model), list(run.history)
    run.total_steps = 6
    train_to(run, corpus)
    assert run.step == 12 and weights_equal(run.model, before) and run.history == history


# short and strange texts

FIVE_WORDS = "Once there was a king"
STRANGE = [FIVE_WORDS, FIVE_WORDS + ".", "Once there was a king who gave his whole kingdom away for love.", "a b",
           "ha " * 300, "😀\u200d👩 e\u0301 " * 60, "One.\n\nTwo.\n\nThree.\n"]
WITHOUT_SPACES = [("story", "a" * 100), ("story", "天地玄黄宇宙洪荒日月盈昃" * 30), ("word", "—" * 100)]


@pytest.mark.parametrize("tokenizer, text", [(kind, text) for text in STRANGE for kind in ("word", "story")]
                         + WITHOUT_SPACES, ids=lambda value: value[:12])
def test_short_and_strange_texts_can_be_trained_on_and_no_loss_is_nan(tokenizer, text):
    run = trained(text, tokenizer=tokenizer, max_steps=3)
    assert run.step == 3 and run.history[-1].step == 3
    for evaluation in run.history:
        losses = [loss for loss in (evaluation.train_loss, evaluation.val_loss) if loss is not None]
        assert all(map(math.isfinite, losses)) and isinstance(evaluation.sample, str)
    assert isinstance("".join(generate_text(run.model, run.tokenizer, text[:3], 5)), str)
    assert 0.0 <= measure_recall(run.model, run.tokenizer, text) <= 1.0


def test_a_text_of_five_words_gets_a_smaller_context_and_no_validation_split():
    run, corpus = tiny(FIVE_WORDS, context_length=16, max_steps=2)
    assert run.config.context_length == 5       # five inputs, and `<|endoftext|>` as the last target
    assert corpus.train_text == FIVE_WORDS and len(corpus.val_ids) == 0
    train_to(run, corpus)
    assert [evaluation.val_loss for evaluation in run.history] == [None] * len(run.history) != []


@pytest.mark.parametrize("text", ["a", "word"])
def test_a_text_of_one_token_is_refused(text):
    with pytest.raises(StoryError, match="short"):
        new_run(corpus_from_text(text, "word"))


def test_a_corpus_that_was_split_otherwise_is_refused():
    corpus = corpus_from_text(TEXT, "word", TrainConfig(val_fraction=0.3))
    for other in (None, TrainConfig(val_fraction=0.2)):
        with pytest.raises(StoryError, match="TrainConfig"):
            new_run(corpus, train_config=other)
    assert new_run(corpus, train_config=TrainConfig(val_fraction=0.3, seed=3)).step == 0


@pytest.mark.parametrize("path", [ROOT / "story_llm.py", ROOT / "Short_Story.txt"], ids=lambda path: path.name)
def test_the_path_of_a_file_is_refused_as_a_text(path):
    with pytest.raises(StoryError, match="path"):
        corpus_from_text(str(path), "word")
