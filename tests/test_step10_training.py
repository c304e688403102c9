"""Step 10: the learning rate, the batches, the training steps, and what training must leave alone."""
import copy
import contextlib
import dataclasses
import itertools
import math
import random
import subprocess
import sys
from itertools import islice

import pytest
import torch
from hypothesis import given, strategies as st

from helpers import PROGRAM, TEXT, same, story_llm, tiny, train_to, trained, weights_equal
from story_llm import (IGNORE_INDEX, StoryError, TrainConfig, batch_loss, corpus_from_text, generate_text,
                       learning_rate, load_checkpoint, make_optimizer, mean_loss, measure_recall, new_run,
                       optimizer_state, prompt_window, save_checkpoint, shuffled, start_optimizer, train,
                       training_batches, training_step, use_bf16, window_starts, word_starts)


# the learning rate

@given(total=st.integers(1, 500), warmup=st.integers(0, 600), peak=st.floats(1e-6, 1.0))
def test_the_learning_rate_rises_to_its_peak_then_falls_and_is_never_0(total, warmup, peak):
    config = TrainConfig(warmup_steps=warmup, learning_rate=peak)
    rates = [learning_rate(step, total, config) for step in range(total)]
    top = rates.index(max(rates))
    assert all(0 < rate <= peak * (1 + 1e-9) for rate in rates) and max(rates) == pytest.approx(peak)
    assert top <= min(warmup, total // 10)
    assert rates[:top + 1] == sorted(rates[:top + 1]) and rates[top:] == sorted(rates[top:], reverse=True)


def test_the_learning_rate_follows_two_straight_lines():
    config = TrainConfig(warmup_steps=10, learning_rate=2.0)
    rates = [learning_rate(step, 110, config) for step in range(110)]
    assert rates[:10] == pytest.approx([0.2 * i for i in range(1, 11)])
    assert rates[10:] == pytest.approx([2 - 0.02 * i for i in range(100)])


def test_every_step_is_taken_with_its_learning_rate():
    run, corpus = tiny(max_steps=20, learning_rate=0.5, warmup_steps=2)
    used = []
    for _ in train(run, corpus):
        used.append({group["lr"] for group in run.optimizer.param_groups})
    assert used == [{learning_rate(step, 20, run.train_config)} for step in range(20)]


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


def test_a_sliding_window_is_consecutive_tokens_and_its_targets_are_shifted_by_one():
    run, corpus = run_on_numbers(batch_size=3, max_steps=50)
    for batch in batches_from(run, corpus, 50):
        for inputs, targets in rows_of(batch):
            assert inputs == tuple(range(inputs[0], inputs[0] + 8))
            assert targets == tuple(token + 1 for token in inputs)


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


@pytest.mark.parametrize("tokenizer", ["word", "story"])
def test_prompt_windows_of_the_tiny_text_are_the_beginnings_of_its_encoded_rest(tokenizer):
    for T in (3, 12, 500):
        _, corpus = tiny(tokenizer=tokenizer, context_length=T)
        for start in word_starts(corpus.train_text):
            token_ids = corpus.tokenizer.encode(corpus.train_text[start:])
            token_ids = [*token_ids, corpus.tokenizer.end_of_text][:T + 1]
            padding = [IGNORE_INDEX] * (T + 1 - len(token_ids))
            assert prompt_window(corpus, start, T) == token_ids + padding


LONG_WORDS = ["incomprehensibilities", "counterrevolutionaries", "electroencephalographically."] * 9


@pytest.mark.parametrize("tokenizer, space", [
    ("word", " "), ("word", "\n"), ("word", "  "), ("word", " \n\n\t"), ("story", " "), ("story", "\n\n")], ids=repr)
def test_prompt_windows_end_between_tokens_however_long_the_words_are(tokenizer, space):
    text = space.join(LONG_WORDS)
    for T in (3, 8, 20):
        _, corpus = tiny(text, tokenizer, val_fraction=0.0, context_length=T)
        for start in word_starts(text):
            token_ids = [token for token in prompt_window(corpus, start, T) if token != IGNORE_INDEX]
            whole = [*corpus.tokenizer.encode(text[start:]), corpus.tokenizer.end_of_text]
            assert len(token_ids) > min(T, len(whole)) / 2 and token_ids == whole[:len(token_ids)]


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
    run, corpus = tiny(max_steps=5)
    expected, taken = batches_from(run, corpus, 5), []
    monkeypatch.setattr(story_llm, "training_step", lambda run, inputs, targets: taken.append((inputs, targets)))
    train_to(run, corpus)
    assert same(taken, expected) and run.step == 5


# training as a whole

@pytest.fixture(scope="module")
def usual():
    """(a run with the default number of steps, the (step, loss) after each of them)"""
    run, corpus = tiny(epochs=0, eval_every=40)
    return run, [(run.step, run.loss) for _ in train(run, corpus)]


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
    _, corpus = tiny()
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


def test_one_batch_can_be_overfitted():
    run, corpus = tiny(max_steps=1000, learning_rate=0.01)
    start_optimizer(run)
    batch, = batches_from(run, corpus, 1)
    for run.step in range(100):
        training_step(run, *batch)
    assert run.loss < 0.3


def test_what_cannot_be_measured_is_none_and_a_prompt_is_no_whole_text():
    run, corpus = tiny("They went upriver. " * 50, max_steps=1)
    train_to(run, corpus)
    assert {evaluation.recall for evaluation in run.history} == {None} and run.history[0].val_loss is not None
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


def test_control_returns_to_the_caller_after_every_step(usual):
    run, seen = usual
    assert [step for step, _ in seen] == list(range(1, 151))
    assert all(0 < loss < 10 for _, loss in seen)


def test_the_model_is_in_evaluation_mode_between_the_steps():
    run, corpus = tiny(drop_rate=0.5)
    assert not run.model.training
    for _ in train(run, corpus):
        assert not any(module.training for module in run.model.modules())


def test_dropout_is_on_in_a_step_and_off_in_an_evaluation():
    run, corpus = tiny(drop_rate=0.5, eval_every=1)
    modes = []
    run.model.out_head.register_forward_hook(lambda module, inputs, output: modes.append(run.model.training))
    train_to(run, corpus)
    steps = modes.count(True)
    assert steps == run.total_steps and modes.count(False) > steps and modes[0] is False


def test_max_steps_overrides_epochs_and_without_either_there_is_a_default():
    assert tiny(epochs=9, max_steps=4)[0].total_steps == 4
    run, _ = tiny(epochs=9)
    assert run.total_steps == 9 * run.steps_per_epoch
    assert tiny(batch_size=1, epochs=0)[0].total_steps == 20 * tiny(batch_size=1)[0].steps_per_epoch


@pytest.mark.parametrize("stop_at", [1, 3])
def test_a_caller_who_leaves_the_loop_stops_the_training(stop_at, tmp_path):
    run, corpus = tiny()
    for _ in train(run, corpus):
        if run.step == stop_at:
            break
    assert run.step == stop_at and not run.model.training and torch.is_grad_enabled()
    save_checkpoint(tmp_path / "run.pt", run)
    loaded = load_checkpoint(tmp_path / "run.pt")
    assert loaded.step == stop_at and weights_equal(loaded.model, run.model) and loaded.history == run.history


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


def test_an_untrained_run_has_the_weights_of_its_seed():
    torch.manual_seed(1)
    one = tiny(seed=1)[0].model
    torch.manual_seed(2)
    assert weights_equal(one, tiny(seed=1)[0].model) and not weights_equal(one, tiny(seed=2)[0].model)


def test_the_largest_seed_works():
    assert trained(seed=(1 << 32) - 1, max_steps=2).step == 2


def test_fixed_positions_stay_fixed():
    run, corpus = tiny(position="sinusoidal", weight_decay=0.5)
    before = run.model.pos_emb.weight.clone()
    train_to(run, corpus)
    assert torch.equal(run.model.pos_emb.weight, before) and before.abs().sum() > 0


@pytest.mark.parametrize("kind", [{"tokenizer": "story", "precision": "bf16"}, {"position": "sinusoidal"},
                                  {"position": "rotary"}, {"tie_weights": True, "qkv_bias": True}, {"gelu": "tanh"}],
                         ids=str)
def test_every_kind_of_model_can_memorize_the_text(kind):
    run = trained(emb_dim=64, epochs=70, eval_every=1000, val_fraction=0.0, batch_size=16, learning_rate=4e-3, **kind)
    assert measure_recall(run.model, run.tokenizer, TEXT) == 1.0


OTHER_VALUES = {"epochs": 5, "max_steps": 7, "batch_size": 9, "optimizer": "muon", "learning_rate": 1e-3,
                "warmup_steps": 2, "weight_decay": 0.5, "grad_clip": 0.01, "prompt_windows": 0.9, "val_fraction": 0.3,
                "eval_every": 4, "keep_best": True, "precision": "bf16", "seed": 1}


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(TrainConfig)])
def test_every_training_setting_has_an_effect_and_is_saved(name, tmp_path):
    """A new setting needs another value in the dictionary above, so none can be without effect or get lost."""
    value = OTHER_VALUES[name]
    usual, changed = trained(epochs=10), trained(**{"epochs": 10, name: value})
    assert getattr(changed.train_config, name) == value != getattr(usual.train_config, name)
    assert not weights_equal(changed.model, usual.model) or changed.history != usual.history
    save_checkpoint(tmp_path / "run.pt", changed)
    assert load_checkpoint(tmp_path / "run.pt").train_config == changed.train_config


# keeping the best weights

BEST = {"keep_best": True, "val_fraction": 0.3, "epochs": 0, "max_steps": 100, "eval_every": 5, "learning_rate": 0.01,
        "drop_rate": 0.1}


def test_training_ends_with_the_weights_of_the_lowest_validation_loss_and_not_long_after_it():
    run, corpus = tiny(**BEST)
    weights = {0: copy.deepcopy(run.model)}
    for _ in train(run, corpus):
        if run.history[-1].step == run.step < run.total_steps:
            weights[run.step] = copy.deepcopy(run.model)
    losses = {evaluation.step: evaluation.val_loss for evaluation in run.history}
    best = min(losses, key=losses.get)
    assert 0 < best < run.step == run.total_steps < 100 and max(losses) == run.step
    assert best + 20 < run.step <= best + 25        # a fifth of the steps, and then the next evaluation
    assert weights_equal(run.model, weights[best]) and not weights_equal(run.model, weights[max(weights)])
    assert mean_loss(run.model, corpus.val_ids) == pytest.approx(losses[best], rel=1e-6)


@pytest.mark.parametrize("stop_at", [3, 10, 13])
def test_a_training_that_keeps_the_best_weights_can_be_resumed(stop_at, tmp_path):
    whole = trained(**BEST)
    run, corpus = tiny(**BEST)
    save_checkpoint(tmp_path / "run.pt", train_to(run, corpus, stop_at))
    run = train_to(load_checkpoint(tmp_path / "run.pt"), corpus)
    assert run.history == whole.history and run.step == whole.step and weights_equal(run.model, whole.model)
    assert same(run.best_weights, whole.best_weights)


def test_the_step_of_the_weights_is_the_best_one_only_once_training_is_complete():
    run, corpus = tiny(**BEST)
    for _ in train(run, corpus):
        if run.step < run.total_steps:
            assert story_llm.step_of_weights(run) == run.step
    best = min(run.history, key=lambda evaluation: evaluation.val_loss)
    assert story_llm.step_of_weights(run) == best.step < run.step and story_llm.evaluate(run, corpus).val_loss == best.val_loss


def test_if_the_validation_loss_never_falls_the_untrained_weights_are_kept():
    run, corpus = tiny(**{**BEST, "learning_rate": 5.0, "warmup_steps": 0})
    untrained = copy.deepcopy(run.model)
    train_to(run, corpus)
    assert min(run.history, key=lambda evaluation: evaluation.val_loss).step == 0
    assert weights_equal(run.model, untrained) and run.step < 100


def test_if_the_validation_loss_falls_to_the_end_all_steps_are_taken():
    """The validation split repeats what the training split says."""
    run, other = [trained(4 * TEXT, **{**BEST, "max_steps": 10, "keep_best": keep_best}) for keep_best in (True, False)]
    assert run.step == 10 and weights_equal(run.model, other.model) and other.best_weights is None


def test_without_a_validation_split_keeping_the_best_weights_is_refused_before_the_first_step():
    run, corpus = tiny(**{**BEST, "val_fraction": 0.0})
    with pytest.raises(StoryError, match="--keep-best, .* needs a validation split"):
        train_to(run, corpus)
    assert run.step == 0


# the optimizer of a resumed run

def test_a_resumed_run_has_the_averages_of_the_file_but_the_options_of_the_program(monkeypatch):
    """Whoever edits `make_optimizer` and resumes gets what is written there now."""
    run, corpus = tiny(max_steps=9)
    saved = train_to(run, corpus, 3).optimizer.state_dict()
    averages = [state["exp_avg"].clone() for state in saved["state"].values()]

    def edited(model, config):
        optimizer = make_optimizer(model, config)
        for group in optimizer.param_groups:
            group["betas"] = (0.5, 0.6)
        return optimizer

    monkeypatch.setattr(story_llm, "make_optimizer", edited)
    run.optimizer, run.saved_optimizer = None, saved
    start_optimizer(run)
    assert [group["betas"] for group in run.optimizer.param_groups] == [(0.5, 0.6)] * 2
    loaded = [state["exp_avg"] for state in run.optimizer.state_dict()["state"].values()]
    assert len(loaded) == len(averages) > 0 and all(map(torch.equal, loaded, averages))


def test_an_optimizer_state_whose_parameters_are_grouped_otherwise_is_refused():
    """Its averages could reach parameters that they do not belong to."""
    run, corpus = tiny(max_steps=9)
    saved = train_to(run, corpus, 3).optimizer.state_dict()
    first, second = saved["param_groups"]
    for groups in ([first], [second, first], [{**first, "params": first["params"] + second["params"]}]):
        run.optimizer, run.saved_optimizer = None, {**saved, "param_groups": groups}
        with pytest.raises(StoryError, match="optimizer state"):
            start_optimizer(run)


# one step, computed by hand

def step_by_hand(model, inputs, targets, config, lr, step, means, squares):
    """One step of AdamW after clipping, as in the paper, in float64. Changes the model and the moving averages, and
    returns the norm of the gradient."""
    for p in model.parameters():
        p.grad = None
    batch_loss(model, inputs, targets).backward()
    learned = {name: p for name, p in model.named_parameters() if p.requires_grad}
    norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in learned.values()))
    for name, p in learned.items():
        gradient = p.grad.double() * min(1.0, config.grad_clip / norm)
        means[name] = 0.9 * means.get(name, 0) + 0.1 * gradient
        squares[name] = 0.98 * squares.get(name, 0) + 0.02 * gradient ** 2
        mean, square = means[name] / (1 - 0.9 ** (step + 1)), squares[name] / (1 - 0.98 ** (step + 1))
        decay = config.weight_decay if name.endswith("weight") and "norm" not in name else 0.0
        p.data = (p.double() * (1 - lr * decay) - lr * mean / (square.sqrt() + 1e-8)).float()
    return norm


@pytest.mark.parametrize("changed", [
    {"grad_clip": 0.05}, {"grad_clip": 1e6, "weight_decay": 0.3}, {"grad_clip": 0.3, "weight_decay": 2.0},
    {"tie_weights": True, "qkv_bias": True, "grad_clip": 0.1, "weight_decay": 0.5},
    {"position": "sinusoidal", "grad_clip": 0.1, "weight_decay": 0.5}], ids=str)
def test_a_step_is_that_of_adamw_written_by_hand(changed):
    """Clipping shows in Adam's moving averages. In the weights of a first step it would cancel out."""
    run, corpus = tiny(max_steps=40, learning_rate=0.05, **changed)
    start_optimizer(run)
    by_hand, batches, means, squares = copy.deepcopy(run.model), batches_from(run, corpus, 3), {}, {}
    for run.step in range(3):
        lr = 0.05 * (run.step + 1) / 3                  # warm-up in 3 steps
        norm = step_by_hand(by_hand, *batches[run.step], run.train_config, lr, run.step, means, squares)
        assert (norm > run.train_config.grad_clip) == (run.train_config.grad_clip < 1)      # it is really clipped
        training_step(run, *batches[run.step])
        learned = {name: p for name, p in run.model.named_parameters() if p.requires_grad}
        assert learned.keys() == means.keys() and len(run.optimizer.state) == len(means)
        for name, p in learned.items():
            state = run.optimizer.state[p]
            torch.testing.assert_close(state["exp_avg"], means[name].float(), rtol=2e-3, atol=1e-6)
            torch.testing.assert_close(state["exp_avg_sq"], squares[name].float(), rtol=5e-3, atol=1e-9)
            assert state["step"] == run.step + 1
        with torch.no_grad():               # where a gradient is almost 0, Adam divides noise by noise
            for (name, p), q in zip(run.model.named_parameters(), by_hand.parameters()):
                clear = squares[name].sqrt() > 1e-6 if name in squares else torch.ones_like(p, dtype=torch.bool)
                torch.testing.assert_close(p[clear], q[clear], rtol=1e-3, atol=2e-5)
                q.copy_(p)                              # small differences must not grow


def test_a_step_does_not_count_itself():
    """`train` counts the steps."""
    run, corpus = tiny()
    start_optimizer(run)
    training_step(run, *batches_from(run, corpus, 1)[0])
    assert run.step == 0


def test_only_matrices_decay():
    """If all gradients are 0, only weight decay moves the weights."""
    for changed in ({}, {"tie_weights": True, "qkv_bias": True}):
        run, _ = tiny(weight_decay=0.5, learning_rate=0.1, **changed)
        start_optimizer(run)
        with torch.no_grad():
            for p in run.model.parameters():
                p.add_(1.0)
                p.grad = torch.zeros_like(p)
        before = copy.deepcopy(run.model)
        run.optimizer.step()
        for p, old in zip(run.model.parameters(), before.parameters()):
            torch.testing.assert_close(p, old * (1 - 0.1 * 0.5) if p.dim() > 1 else old)


def test_the_optimizer_has_every_learned_parameter_once():
    for changed in ({}, {"tie_weights": True}, {"position": "rotary", "qkv_bias": True}):
        run, _ = tiny(**changed)
        held = [p for group in make_optimizer(run.model, run.train_config).param_groups for p in group["params"]]
        learned = [p for p in run.model.parameters() if p.requires_grad]
        assert {id(p) for p in held if p.requires_grad} == {id(p) for p in learned}
        assert len(held) == len({id(p) for p in held})


# gradients that are left over

FEW_STEPS = {"max_steps": 6, "eval_every": 100, "drop_rate": 0.1}


def test_gradients_from_before_the_training_change_nothing():
    run, corpus = tiny(**FEW_STEPS)
    (1000 * batch_loss(run.model, *batches_from(run, corpus, 1)[0])).backward()
    train_to(run, corpus)
    assert weights_equal(run.model, trained(**FEW_STEPS).model)


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

def steps_until_it_stops(run, corpus, after_step=lambda: None):
    """Train until the training stops because of NaN or infinity; return the steps after which it still went on."""
    steps = []
    with pytest.raises(StoryError, match="--learning-rate") as caught:
        for _ in train(run, corpus):
            steps.append(run.step)
            after_step()
    assert "\n" not in str(caught.value)
    return steps


def test_a_model_with_nan_weights_is_not_trained_and_the_message_says_what_to_try():
    run, corpus = tiny()
    with torch.no_grad():
        run.model.final_norm.weight.fill_(math.nan)
    assert steps_until_it_stops(run, corpus) == [] and not run.history


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_stops_the_training_though_the_loss_is_finite(number):
    run, corpus = tiny(eval_every=1000, max_steps=100)
    run.model.final_norm.bias.register_hook(lambda grad: grad + number if run.step == 20 else grad)
    assert steps_until_it_stops(run, corpus) == list(range(1, 21)) and math.isfinite(run.loss)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_with_a_gradient_that_is_not_finite_leaves_weights_and_optimizer_as_they_were(optimizer):
    run, corpus = tiny(optimizer=optimizer, eval_every=1000, max_steps=100)
    train_to(run, corpus, 3)
    model, state = copy.deepcopy(run.model), copy.deepcopy(run.optimizer.state_dict())
    run.model.final_norm.bias.register_hook(lambda grad: grad * math.nan)
    assert steps_until_it_stops(run, corpus) == []
    assert weights_equal(run.model, model) and same(run.optimizer.state_dict()["state"], state["state"])


def test_a_loss_that_is_not_finite_stops_the_training():
    run, corpus = tiny(eval_every=1000, max_steps=100)

    def spoil_a_weight():
        if run.step == 21:
            with torch.no_grad():
                run.model.trf_blocks[0].ff.expand.weight[0, 0] = math.nan

    assert steps_until_it_stops(run, corpus, spoil_a_weight) == list(range(1, 22))


@pytest.mark.parametrize("eval_every", [1, 1000])
def test_a_model_that_diverges_never_replaces_a_good_one(eval_every, tmp_path):
    run, corpus = tiny(learning_rate=1e8, eval_every=eval_every, warmup_steps=0, max_steps=100, grad_clip=1e9)
    save_checkpoint(tmp_path / "model.pt", run)
    with pytest.raises(StoryError):
        for _ in train(run, corpus):
            with torch.no_grad():
                run.model.out_head.weight.mul_(1e30)
            save_checkpoint(tmp_path / "model.pt", run)
    loaded = load_checkpoint(tmp_path / "model.pt")
    assert all(p.isfinite().all() for p in loaded.model.parameters())
    assert all(math.isfinite(evaluation.train_loss) for evaluation in loaded.history)


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
    for _ in train(run, corpus):
        assert global_state() == before
    assert global_state() == before
    save_checkpoint(tmp_path / "model.pt", run)
    load_checkpoint(tmp_path / "model.pt")
    assert global_state() == before


def test_an_interrupted_step_leaves_the_global_state_alone():
    run, corpus = tiny(drop_rate=0.3, precision="bf16")
    before = global_state()

    def interrupt(*_):
        if run.step == 2:
            raise KeyboardInterrupt

    run.model.final_norm.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        train_to(run, corpus)
    assert run.step == 2 and global_state() == before


def test_importing_the_program_changes_nothing_global():
    code = """if True:
        import random, sys, torch
        def state():
            return (torch.get_rng_state().tolist(), random.getstate(), torch.get_default_dtype(),
                    torch.is_grad_enabled(), torch.get_num_threads(), torch.get_num_interop_threads(), sys.path)
        torch.set_num_threads(3)
        torch.set_default_dtype(torch.float64)
        before = state()
        import story_llm
        assert state() == before
        assert "tiktoken" not in sys.modules and "matplotlib" not in sys.modules"""
    done = subprocess.run([sys.executable, "-c", code], cwd=PROGRAM.parent, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# precision

def test_weights_and_optimizer_state_are_float32_whatever_the_precision():
    run = trained(precision="bf16", max_steps=2)
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}
    state = optimizer_state(run)["state"]
    assert {tensor.dtype for entry in state.values() for tensor in entry.values()} == {torch.float32}


CAPABILITIES = [({"avx512_bf16": True, "amx_bf16": False}, True), ({"amx_bf16": True}, True), ({}, False),
                ({"avx512_bf16": False, "amx_bf16": False, "avx2": True, "avx512_f": True}, False)]


@pytest.mark.parametrize("capabilities, expected", CAPABILITIES, ids=str)
def test_auto_chooses_bf16_on_a_cpu_with_instructions_for_it(capabilities, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    cpu = torch.device("cpu")
    assert use_bf16(cpu, "auto") is expected
    assert use_bf16(cpu, "bf16") is True and use_bf16(cpu, "fp32") is False
    assert use_bf16(torch.device("mps"), "auto") is False
    seen = {True: set(), False: set()}
    run, corpus = tiny(precision="auto", max_steps=2)
    run.model.out_head.register_forward_hook(lambda part, inputs, output: seen[run.model.training].add(output.dtype))
    train_to(run, corpus)
    wanted = torch.bfloat16 if expected else torch.float32
    assert seen[True] == {wanted} and wanted in seen[False]


@pytest.mark.parametrize("emulated, native", [(True, True), (True, False), (False, False)])
def test_auto_chooses_bf16_on_a_gpu_that_does_not_only_emulate_it(emulated, native, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                        lambda including_emulation=True: emulated if including_emulation else native)
    assert use_bf16(torch.device("cuda"), "auto") is native


# dropout

def loss_of_a_step(torch_seed, step=0, seed=42, **changed):
    run, corpus = tiny(max_steps=9, **changed)
    batch, = batches_from(run, corpus, 1)
    run.train_config = dataclasses.replace(run.train_config, seed=seed)
    run.step = step
    start_optimizer(run)
    torch.manual_seed(torch_seed)
    training_step(run, *batch)
    return run.loss


def test_what_dropout_drops_depends_on_seed_and_step_alone():
    dropping = loss_of_a_step(1, drop_rate=0.5)
    assert dropping == loss_of_a_step(2, drop_rate=0.5)
    assert dropping != loss_of_a_step(1, drop_rate=0.5, step=1)
    assert dropping != loss_of_a_step(1, drop_rate=0.5, seed=43)
    without = loss_of_a_step(1)
    assert without == loss_of_a_step(1, step=1) == loss_of_a_step(1, seed=43) != dropping


# resuming

@pytest.mark.parametrize("kind", [
    {"drop_rate": 0.1}, {"precision": "bf16", "tokenizer": "story"},
    {"tie_weights": True, "position": "rotary", "drop_rate": 0.2, "precision": "bf16"},
    {"position": "sinusoidal", "weight_decay": 0.1, "qkv_bias": True},
    {"optimizer": "muon", "gelu": "tanh", "drop_rate": 0.1, "weight_decay": 0.1},
    {"optimizer": "muon", "tie_weights": True, "precision": "bf16"}], ids=str)
def test_training_that_is_resumed_at_every_step_ends_bit_for_bit_as_without_a_stop(kind, tmp_path):
    kind = {"max_steps": 8, "eval_every": 3, **kind}
    path = tmp_path / "model.pt"
    whole, corpus = tiny(**kind)
    on_the_way = [(copy.deepcopy(whole.model), copy.deepcopy(optimizer_state(whole)), whole.loss)
                  for _ in train(whole, corpus)]
    run, corpus = tiny(**kind)
    save_checkpoint(path, run)
    for step, (model, state, loss) in enumerate(on_the_way, start=1):
        torch.manual_seed(step)
        run = load_checkpoint(path)
        train_to(run, corpus, step)
        assert run.step == step and run.loss == loss
        assert weights_equal(run.model, model) and same(optimizer_state(run), state)
        assert run.saved_optimizer is None
        save_checkpoint(path, run)
    assert len(on_the_way) == 8 and run.history == whole.history


def test_training_can_be_stopped_and_go_on_without_a_file():
    whole, (run, corpus) = trained(), tiny()
    for stop_at in (1, 3, 4, 7, None):
        train_to(run, corpus, stop_at)
    assert run.history == whole.history and weights_equal(run.model, whole.model)


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
    assert run.train_config.val_fraction == 0 and corpus.train_text == FIVE_WORDS
    train_to(run, corpus)
    assert [evaluation.val_loss for evaluation in run.history] == [None] * len(run.history) != []


def test_a_text_that_is_long_enough_keeps_its_context_and_its_validation_split():
    run, corpus = tiny(context_length=8)
    assert run.config.context_length == 8 and run.train_config.val_fraction == 0.1
    assert corpus.train_text + TEXT[len(corpus.train_text):] == TEXT and len(corpus.val_ids) > 8


@pytest.mark.parametrize("text", ["a", "word"])
def test_a_text_of_one_token_is_refused(text):
    with pytest.raises(StoryError, match="short"):
        new_run(corpus_from_text(text, "word"))


@pytest.mark.parametrize("changed", [{"epochs": 10**9}, {"max_steps": 10**9}, {"epochs": (1 << 22) - 1}])
def test_far_too_many_steps_are_refused_in_one_line(changed):
    with pytest.raises(StoryError) as caught:
        tiny(**{"epochs": 0, **changed})
    message = str(caught.value)
    assert "\n" not in message and ("too many" in message or "below" in message)
