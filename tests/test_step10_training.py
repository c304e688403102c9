"""Step 10: the learning rate, the batches, the steps, and what training must leave alone."""
import copy
import math
import random
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, strategies as st
from helpers import PROGRAM, TEXT, note_questions, story_llm, tiny, trained, weights_equal
from story_llm import (IGNORED, TrainConfig, TrainingBatches, batch_loss, corpus_from_text, deal, generate_text,
                       learning_rate, load_checkpoint, make_optimizer, mean_loss, measure_recall, new_run,
                       optimizer_state, save_checkpoint, start_optimizer, train, training_step, use_bf16)


def same_state(a, b):
    """Whether two optimizers remember the same, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name][what], b[name][what]) for name in a for what in a[name])


# the learning rate

@given(total=st.integers(1, 500), warmup=st.integers(0, 600), highest=st.floats(1e-6, 1.0))
def test_the_learning_rate_rises_to_the_highest_then_falls_and_is_never_zero(total, warmup, highest):
    config = TrainConfig(warmup_steps=warmup, learning_rate=highest)
    rates = [learning_rate(step, total, config) for step in range(total)]
    top = rates.index(max(rates))
    assert all(0 < rate <= highest * (1 + 1e-9) for rate in rates) and max(rates) == pytest.approx(highest)
    assert top <= min(warmup, total // 10)
    assert rates[:top + 1] == sorted(rates[:top + 1]) and rates[top:] == sorted(rates[top:], reverse=True)


def test_the_learning_rate_is_a_line_up_and_a_longer_one_down():
    config = TrainConfig(warmup_steps=10, learning_rate=2.0)
    rates = [learning_rate(step, 110, config) for step in range(110)]
    assert rates[:10] == pytest.approx([0.2 * i for i in range(1, 11)])
    assert rates[10:] == pytest.approx([2 - 0.02 * i for i in range(100)])


# dealing

cards = {"count": st.integers(1, 50), "hand": st.integers(0, 60), "turns": st.integers(0, 12),
         "seed": st.integers(0, (1 << 63) + 2)}


@given(**cards)
def test_dealing_gives_out_every_number_before_it_shuffles_anew(count, hand, turns, seed):
    dealt = deal(count, hand, turns, seed)
    assert dealt.shape == (turns, hand)
    in_order = dealt.flatten().tolist()
    for start in range(0, len(in_order), count):
        deck = in_order[start:start + count]
        assert len(set(deck)) == len(deck) and set(deck) <= set(range(count))
    times = [in_order.count(number) for number in range(count)]
    assert max(times) - min(times) <= 1


@given(more=st.integers(0, 30), **cards)
def test_more_turns_begin_with_the_same_ones(count, hand, turns, seed, more):
    assert torch.equal(deal(count, hand, turns + more, seed)[:turns], deal(count, hand, turns, seed))


def test_dealing_depends_on_the_seed_and_every_deck_is_shuffled_anew():
    one, two = deal(50, 50, 2, 1), deal(50, 50, 2, 2)
    assert not torch.equal(one, two) and not torch.equal(one[0], one[1])
    assert not torch.equal(one[0], torch.arange(50))


# the batches

def rows_of(batches, steps):
    """All (input, target) rows of these steps, as tuples."""
    return [(tuple(inputs), tuple(targets)) for step in steps
            for inputs, targets in zip(*(part.tolist() for part in batches[step]))]


def place_batches(**changed):
    """Batches of a text whose token ids are the numbers 0, 1, 2, ..., so a window says where it stands: 96 places."""
    _, corpus = tiny()
    config, train_config = story_llm.GPTConfig(context_length=8, emb_dim=8), TrainConfig(openings=0.0, **changed)
    corpus = replace(corpus, train_ids=torch.arange(96 + 8))
    run = new_run(corpus, config, train_config)
    return TrainingBatches(corpus, run), run


def test_every_piece_of_the_text_is_read_as_often_as_any_and_time_brings_every_window():
    batches, run = place_batches(batch_size=5, epochs=60)
    assert run.steps_per_epoch == 3 and run.total_steps == 180         # 12 pieces of 8 tokens, 5 windows in a step
    times, seen = [0] * 12, set()
    for step in range(180):
        for inputs, _ in rows_of(batches, [step]):
            times[inputs[0] // 8] += 1
            seen.add(inputs[0])
        if step == 2:
            assert min(times) >= 1                                      # an epoch is one reading
        assert max(times) - min(times) <= 1
    assert seen == set(range(96))


def test_a_window_is_what_stands_side_by_side_and_its_targets_come_one_place_later():
    batches, run = place_batches(batch_size=3, max_steps=50)
    for inputs, targets in rows_of(batches, range(50)):
        assert inputs == tuple(range(inputs[0], inputs[0] + 8)) and targets == tuple(i + 1 for i in inputs)


@pytest.mark.parametrize("tokenizer", ["word", "story"])
@pytest.mark.parametrize("openings", [0.0, 0.5, 0.9])
def test_a_batch_has_windows_of_the_text_and_openings_as_a_prompt_is_encoded(tokenizer, openings):
    """An opening is the text from the start of a word on, encoded by itself; behind the text's end nothing is asked."""
    run, corpus = tiny(tokenizer=tokenizer, context_length=10, openings=openings, batch_size=16, max_steps=40)
    text, length = corpus.train_text, 10
    windows = {(tuple(w[:-1]), tuple(w[1:])) for w in corpus.train_ids.unfold(0, length + 1, 1).tolist()}
    starts = [i for i in range(len(text)) if not text[i].isspace() and (i == 0 or text[i - 1].isspace())]
    expected = {}
    for start in starts:
        ids = run.tokenizer.encode(text[start:])[:length + 1]
        missing = length + 1 - len(ids)
        expected[tuple((ids + [0] * missing)[:length]), tuple((ids + [-100] * missing)[1:])] = start
    batches, seen = TrainingBatches(corpus, run), set()
    for step in range(40):
        rows = rows_of(batches, [step])
        assert all(row in windows or row in expected for row in rows)
        assert sum(row in expected for row in rows) >= int(16 * openings)
        assert sum(row in windows for row in rows) >= 16 - int(16 * openings)
        seen.update(expected[row] for row in rows if row in expected)
    sentences = {0, *(start for start in starts if text[start - 2:start] in (".\n", "! ", ". "))}
    assert openings == 0 or sentences <= seen and len(seen) > len(starts) / 2


@pytest.mark.parametrize("openings", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_every_batch_has_its_full_size(openings, batch_size):
    run, corpus = tiny(openings=openings, batch_size=batch_size, max_steps=60)
    batches = TrainingBatches(corpus, run)
    assert {tuple(part.shape) for step in range(60) for part in batches[step]} == {(batch_size, 12)}
    assert {part.dtype for step in range(60) for part in batches[step]} == {torch.long}


@pytest.mark.parametrize("tokenizer", ["word", "story"])
@pytest.mark.parametrize("space", [" ", "\n", "\n\n", "  ", " \n\n\t"], ids=repr)
def test_openings_are_as_in_the_text_and_end_between_words(tokenizer, space):
    """However long the words, and whatever stands between them."""
    text = space.join(["incomprehensibilities", "counterrevolutionaries", "electroencephalographically."] * 9)
    for context_length in (3, 8, 20):
        run, corpus = tiny(text, tokenizer, val_fraction=0.0, context_length=context_length)
        batches = TrainingBatches(corpus, run)
        for start in story_llm.word_starts(text):
            asked = [token for token in batches.opening(start) if token != IGNORED]
            assert len(asked) > min(context_length, len(run.tokenizer.encode(text[start:]))) / 2
            assert asked == run.tokenizer.encode(text[start:])[:len(asked)]


def test_a_batch_is_a_function_of_seed_and_step_alone():
    def make(seed=1, **changed):
        run, corpus = tiny(seed=seed, **changed)
        return TrainingBatches(corpus, run)

    one, two = make(max_steps=12), make(max_steps=12)
    in_order = [one[step] for step in range(12)]
    torch.manual_seed(99)
    for step in (11, 3, 7, 3):
        assert all(torch.equal(a, b) for a, b in zip(two[step], in_order[step]))
    assert not torch.equal(one[3][0], one[4][0]) and not torch.equal(one[3][0], make(2, max_steps=12)[3][0])
    longer = make(max_steps=500, drop_rate=0.3, learning_rate=1.0)      # what else is set changes nothing
    for step in range(12):
        assert all(torch.equal(a, b) for a, b in zip(longer[step], in_order[step]))


# training, from outside

@pytest.fixture(scope="module")
def usual():
    """(a run with the usual number of steps, what `after_step` saw of it)"""
    seen = []
    return trained(epochs=0, eval_every=40, after_step=lambda run: seen.append((run.step, run.loss))), seen


def test_the_loss_falls_and_the_history_tells_of_every_evaluation(usual):
    run, _ = usual
    steps = [evaluation.step for evaluation in run.history]
    assert run.total_steps == 150 and steps == [0, 3, 8, 30, 40, 80, 120, 150]     # 0, 2, 5, 20, 100 %, and every 40
    losses = [evaluation.train_loss for evaluation in run.history]
    assert losses[-1] < losses[0] / 3 and abs(losses[0] - math.log(run.config.vocab_size)) < 0.5
    assert all(evaluation.epoch * run.steps_per_epoch == pytest.approx(evaluation.step) for evaluation in run.history)
    assert all(evaluation.tokens == evaluation.step * 8 * 12 for evaluation in run.history)
    assert {evaluation.prompt for evaluation in run.history} == {"The old ferryman tied his"}
    assert run.history[-1].sample.startswith(" boat") and not run.history[0].sample.startswith(" boat")


def test_an_evaluation_says_what_the_model_is_then(usual):
    run, _ = usual
    _, corpus = tiny()
    last = run.history[-1]
    assert last.train_loss == pytest.approx(mean_loss(run.model, corpus.train_ids), rel=1e-5)
    assert last.val_loss == pytest.approx(mean_loss(run.model, corpus.val_ids), rel=1e-5)
    assert last.recall == measure_recall(run.model, run.tokenizer, corpus.train_text, max_sentences=25)
    assert last.sample == "".join(generate_text(run.model, run.tokenizer, run.prompt, 24))


def test_what_cannot_be_measured_is_none_and_a_prompt_is_no_whole_text():
    run, corpus = tiny("They went upriver. " * 50, max_steps=1)
    train(run, corpus)
    assert {evaluation.recall for evaluation in run.history} == {None} and run.history[0].val_loss is not None
    assert len(tiny("ACGT" * 500, "story")[0].prompt) == 200


def test_long_trainings_are_evaluated_as_often_as_shorter_ones_and_not_more():
    """Otherwise, where a step takes a moment, as on a GPU, most of the time would go into evaluations."""
    counts = {}
    for total in (1, 44, 180, 900, 10_000, 1_000_000):
        run, _ = tiny(max_steps=total, eval_every=0)
        due = []
        for run.step in range(0, total + 1, 45 if total == 180 else 1 if total < 45 else total // 20):
            due.append(story_llm.evaluation_due(run))
        counts[total] = sum(due)
    assert counts[180] == 5 and counts[900] == counts[10_000] == counts[1_000_000] == 21 and counts[1] == 2


def test_after_step_is_called_before_the_first_step_and_after_each(usual):
    run, seen = usual
    assert [step for step, _ in seen] == list(range(151))
    assert seen[0][1] is None and all(0 < loss < 10 for _, loss in seen[1:]) and not run.model.training


def test_max_steps_and_epochs_say_how_many_steps():
    assert tiny(epochs=9, max_steps=4)[0].total_steps == 4
    run, _ = tiny(epochs=9)
    assert run.total_steps == 9 * run.steps_per_epoch
    assert tiny(batch_size=1, epochs=0)[0].total_steps == 20 * tiny(batch_size=1)[0].steps_per_epoch


@pytest.mark.parametrize("stop_at", [0, 1, 3])
def test_training_stops_where_after_step_says_so(stop_at):
    run = trained(after_step=lambda run: run.step >= stop_at)
    assert run.step == stop_at and not run.model.training


def test_another_function_can_take_the_steps():
    run, corpus = tiny(max_steps=5)
    batches, got, before = TrainingBatches(corpus, run), [], copy.deepcopy(run.model)

    def take_step(its_run, inputs, targets):
        assert its_run is run and run.model.training
        got.append((inputs, targets))
        run.step += 1

    train(run, corpus, take_step=take_step)
    assert len(got) == 5 and weights_equal(run.model, before)
    assert all(torch.equal(a, b) for step in range(5) for a, b in zip(got[step], batches[step]))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_same_seed_same_weights_bit_for_bit_another_seed_others(precision):
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


def test_the_largest_seed_is_as_good_as_any():
    assert trained(seed=(1 << 63) - 1, max_steps=2).step == 2


def test_weights_that_were_fixed_stay_fixed():
    run, corpus = tiny(position="sinusoidal", weight_decay=0.5)
    before = run.model.pos_emb.weight.clone()
    train(run, corpus)
    assert torch.equal(run.model.pos_emb.weight, before) and before.abs().sum() > 0


@pytest.mark.parametrize("kind", [{"tokenizer": "story", "precision": "bf16"}, {"position": "sinusoidal"},
                                  {"position": "rotary"}, {"tie_weights": True, "qkv_bias": True}, {"gelu": "tanh"}], ids=str)
def test_training_comes_to_know_the_text_whatever_the_kind_of_model(kind):
    run = trained(emb_dim=64, epochs=70, eval_every=1000, val_fraction=0.0, batch_size=16, learning_rate=4e-3, **kind)
    assert measure_recall(run.model, run.tokenizer, TEXT) == 1.0


# one step, calculated by hand

def hand_written_step(model, inputs, targets, config, lr, step, means, sizes):
    """AdamW after clipping, as the paper has it, in float64; changes model, means and sizes. Returns the norm."""
    for p in model.parameters():
        p.grad = None
    batch_loss(model, inputs, targets).backward()
    learned = {name: p for name, p in model.named_parameters() if p.requires_grad}
    norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in learned.values()))
    for name, p in learned.items():
        gradient = p.grad.double() * min(1.0, config.grad_clip / norm)
        means[name] = 0.9 * means.get(name, 0) + 0.1 * gradient
        sizes[name] = 0.98 * sizes.get(name, 0) + 0.02 * gradient ** 2
        mean, size = means[name] / (1 - 0.9 ** (step + 1)), sizes[name] / (1 - 0.98 ** (step + 1))
        decay = config.weight_decay if name.endswith("weight") and "norm" not in name else 0.0
        p.data = (p.double() * (1 - lr * decay) - lr * mean / (size.sqrt() + 1e-8)).float()
    return norm


@pytest.mark.parametrize("changed", [
    {"grad_clip": 0.05}, {"grad_clip": 1e6, "weight_decay": 0.3}, {"grad_clip": 0.3, "weight_decay": 2.0},
    {"tie_weights": True, "qkv_bias": True, "grad_clip": 0.1, "weight_decay": 0.5},
    {"position": "sinusoidal", "grad_clip": 0.1, "weight_decay": 0.5}], ids=str)
def test_steps_are_those_of_adamw_written_by_hand(changed):
    """Clipping shows in what Adam remembers: in the weights of a first step it would cancel out."""
    run, corpus = tiny(max_steps=40, learning_rate=0.05, **changed)
    start_optimizer(run)
    run.model.train()
    by_hand, batches, means, sizes = copy.deepcopy(run.model), TrainingBatches(corpus, run), {}, {}
    for step in range(3):
        lr = 0.05 * (step + 1) / 3                      # warm-up in 3 steps
        norm = hand_written_step(by_hand, *batches[step], run.train_config, lr, step, means, sizes)
        assert (norm > run.train_config.grad_clip) == (run.train_config.grad_clip < 1)       # so it is really clipped
        training_step(run, *batches[step])
        for name, remembered in optimizer_state(run).items():
            torch.testing.assert_close(remembered["exp_avg"], means[name].float(), rtol=2e-3, atol=1e-6)
            torch.testing.assert_close(remembered["exp_avg_sq"], sizes[name].float(), rtol=5e-3, atol=1e-9)
            assert remembered["step"] == step + 1
        assert optimizer_state(run).keys() == means.keys()
        with torch.no_grad():               # where a gradient is next to nothing, Adam divides noise by noise
            for (name, p), q in zip(run.model.named_parameters(), by_hand.parameters()):
                clear = sizes[name].sqrt() > 1e-6 if name in sizes else torch.ones_like(p, dtype=torch.bool)
                torch.testing.assert_close(p[clear], q[clear], rtol=1e-3, atol=2e-5)
                q.copy_(p)                              # small differences must not grow
    assert run.step == 3


def test_only_matrices_decay():
    """With gradients of zero, decay alone moves the weights."""
    for changed in ({}, {"tie_weights": True, "qkv_bias": True}):
        run, _ = tiny(weight_decay=0.5, learning_rate=0.1, **changed)
        start_optimizer(run)
        with torch.no_grad():
            for p in run.model.parameters():
                p.add_(1.0)
                p.grad = torch.zeros_like(p)
        before = copy.deepcopy(run.model)
        for group in run.optimizer.param_groups:
            group["lr"] = 0.1
        run.optimizer.step()
        for p, old in zip(run.model.parameters(), before.parameters()):
            torch.testing.assert_close(p, old * (1 - 0.1 * 0.5) if p.dim() > 1 else old)


def test_every_learned_weight_is_in_the_optimizer_once():
    for changed in ({}, {"tie_weights": True}, {"position": "rotary", "qkv_bias": True}):
        run, _ = tiny(**changed)
        kept = [p for group in make_optimizer(run.model, run.train_config).param_groups for p in group["params"]]
        learned = [p for p in run.model.parameters() if p.requires_grad]
        assert len(kept) == len(learned) and {id(p) for p in kept} == {id(p) for p in learned}


# gradients that are left over

FEW = {"max_steps": 6, "eval_every": 100, "drop_rate": 0.1}


def test_a_backward_before_training_changes_nothing():
    run, corpus = tiny(**FEW)
    (1000 * batch_loss(run.model, *TrainingBatches(corpus, run)[0])).backward()
    train(run, corpus)
    assert weights_equal(run.model, trained(**FEW).model)


@pytest.mark.parametrize("step", [0, 3])
def test_a_step_that_breaks_off_after_backward_changes_nothing_of_those_that_follow(step, monkeypatch):
    run, corpus = tiny(**FEW)
    clip = torch.nn.utils.clip_grad_norm_

    def interrupted(*arguments):
        if run.step == step:
            monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
            raise KeyboardInterrupt
        return clip(*arguments)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(run, corpus)
    assert run.step == step and any(p.grad is not None for p in run.model.parameters())
    train(run, corpus)
    whole = trained(**FEW)
    assert weights_equal(run.model, whole.model) and run.step == whole.step


# numbers that go wrong

def test_a_model_that_is_not_finite_is_not_trained_and_the_advice_says_what_to_try():
    run, corpus = tiny()
    with torch.no_grad():
        run.model.final_norm.weight.fill_(math.nan)
    called = []
    with pytest.raises(ValueError, match="--learning-rate") as caught:
        train(run, corpus, called.append)
    assert not called and not run.history and "\n" not in str(caught.value)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_stops_training_though_the_loss_is(number):
    run, corpus = tiny(eval_every=1000, max_steps=100)
    run.model.final_norm.bias.register_hook(lambda grad: grad + number if run.step == 20 else grad)
    called = []
    with pytest.raises(ValueError, match="--learning-rate"):
        train(run, corpus, lambda run: called.append(run.step))
    assert called == list(range(21)) and math.isfinite(run.loss)


def test_a_loss_that_is_not_finite_stops_training_and_what_saves_is_not_called_any_more():
    run, corpus = tiny(eval_every=1000, max_steps=100)
    called = []

    def after_step(run):
        called.append(run.step)
        if run.step == 21:
            with torch.no_grad():
                run.model.trf_blocks[0].ff.widen.weight[0, 0] = math.nan

    with pytest.raises(ValueError, match="--learning-rate"):
        train(run, corpus, after_step)
    assert called == list(range(22))


@pytest.mark.parametrize("eval_every", [1, 1000])
def test_whatever_was_saved_before_training_blew_up_is_a_good_model(eval_every, tmp_path):
    """A model whose weights are beyond all numbers never takes the place of a good one."""
    run, corpus = tiny(learning_rate=1e37, eval_every=eval_every, warmup_steps=0, max_steps=100)

    def save(run):
        save_checkpoint(tmp_path / "model.pt", run)

    with pytest.raises(ValueError):
        train(run, corpus, save)
    loaded = load_checkpoint(tmp_path / "model.pt")
    assert all(p.isfinite().all() for p in loaded.model.parameters())
    assert all(math.isfinite(evaluation.train_loss) for evaluation in loaded.history)


# what is not training's to change

def global_state():
    return (torch.get_rng_state().tolist(), random.getstate(), torch.get_default_dtype(), torch.is_grad_enabled(),
            torch.get_num_threads(), torch.is_autocast_enabled("cpu"), torch.are_deterministic_algorithms_enabled(),
            torch.get_float32_matmul_precision(), torch.is_anomaly_enabled())


def test_making_training_saving_and_loading_leave_torchs_global_state_as_it_was(tmp_path):
    torch.manual_seed(7)
    torch.rand(3)
    before = global_state()
    run, corpus = tiny(drop_rate=0.3, precision="bf16")
    assert global_state() == before
    train(run, corpus)
    assert global_state() == before
    save_checkpoint(tmp_path / "model.pt", run)
    load_checkpoint(tmp_path / "model.pt")
    assert global_state() == before


def test_a_step_that_breaks_off_leaves_torchs_global_state_as_it_was():
    run, corpus = tiny(drop_rate=0.3, precision="bf16")
    before = global_state()

    def interrupt(*_):
        if run.step == 2:
            raise KeyboardInterrupt

    run.model.final_norm.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(run, corpus)
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


def test_gradients_of_the_weights_are_kept_in_float32_whatever_the_precision():
    run = trained(precision="bf16", max_steps=2)
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}
    assert {tensor.dtype for remembered in optimizer_state(run).values() for tensor in remembered.values()} == \
        {torch.float32}


# precision

ABLE = [({"avx512_bf16": True, "amx_bf16": False}, True), ({"amx_bf16": True}, True), ({}, False),
        ({"avx512_bf16": False, "amx_bf16": False, "avx2": True, "avx512_f": True}, False)]


@pytest.mark.parametrize("able, expected", ABLE, ids=str)
def test_auto_takes_bf16_on_a_cpu_that_has_instructions_for_it(able, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    cpu = torch.device("cpu")
    assert use_bf16(cpu, "auto") is expected
    assert use_bf16(cpu, "bf16") is True and use_bf16(cpu, "fp32") is False
    assert use_bf16(torch.device("mps"), "auto") is False
    seen = {True: set(), False: set()}
    run, corpus = tiny(precision="auto", max_steps=2)
    run.model.out_head.register_forward_hook(lambda part, inputs, output: seen[run.model.training].add(output.dtype))
    train(run, corpus)
    wanted = torch.bfloat16 if expected else torch.float32
    assert seen[True] == {wanted} and wanted in seen[False]


@pytest.mark.parametrize("emulated, native", [(True, True), (True, False), (False, False)])
def test_auto_takes_bf16_on_a_gpu_that_does_not_only_emulate_it(emulated, native, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                        lambda including_emulation=True: emulated if including_emulation else native)
    assert use_bf16(torch.device("cuda"), "auto") is native


# dropout

def loss_of_a_step(seed_of_torch, step=0, **changed):
    run, corpus = tiny(max_steps=9, **changed)
    start_optimizer(run)
    run.model.train()
    run.step = step
    torch.manual_seed(seed_of_torch)
    training_step(run, *TrainingBatches(corpus, run)[0])
    return run.loss


def test_what_is_dropped_depends_on_seed_and_step_alone():
    assert loss_of_a_step(1, drop_rate=0.5) == loss_of_a_step(2, drop_rate=0.5)
    assert loss_of_a_step(1, drop_rate=0.5) != loss_of_a_step(1, drop_rate=0.5, step=1)
    assert loss_of_a_step(1) == loss_of_a_step(1, step=1)      # nothing is dropped, and the rest is the same
    assert loss_of_a_step(1) != loss_of_a_step(1, drop_rate=0.5)


# going on

@pytest.mark.parametrize("kind", [
    {"drop_rate": 0.1}, {"precision": "bf16", "tokenizer": "story"},
    {"tie_weights": True, "position": "rotary", "drop_rate": 0.2, "precision": "bf16"},
    {"position": "sinusoidal", "weight_decay": 0.1, "qkv_bias": True}, {"optimizer": "muon", "gelu": "tanh"}], ids=str)
def test_training_can_stop_after_every_single_step_and_ends_as_if_it_had_not(kind, tmp_path):
    kind = {"max_steps": 8, "eval_every": 3, **kind}
    on_the_way, path = [], tmp_path / "model.pt"
    whole = trained(**kind, after_step=lambda run: on_the_way.append(
        (copy.deepcopy(run.model), copy.deepcopy(optimizer_state(run)))))
    run, corpus = tiny(**kind)
    save_checkpoint(path, run)
    while run.step < whole.step:
        torch.manual_seed(run.step)
        run = load_checkpoint(path)
        before = run.step
        train(run, corpus, lambda run: run.step > before)
        assert run.step == before + 1
        model, remembered = on_the_way[run.step]
        assert weights_equal(run.model, model) and same_state(optimizer_state(run), remembered)
        save_checkpoint(path, run)
    assert run.history == whole.history and len(on_the_way) == 9


def test_training_can_stop_and_go_on_without_a_file():
    whole, (run, corpus) = trained(), tiny()
    for stop_at in (0, 3, 4, 7, 100):
        train(run, corpus, lambda run: run.step >= stop_at)
    assert run.history == whole.history and weights_equal(run.model, whole.model)


def test_more_epochs_train_on_with_the_batches_that_would_have_come():
    run, corpus = tiny()
    train(run, corpus)
    run.total_steps *= 2
    batches, got = TrainingBatches(corpus, run), []

    def take_step(run, inputs, targets):
        got.append(torch.equal(inputs, batches[run.step][0]))
        training_step(run, inputs, targets)

    train(run, corpus, take_step=take_step)
    assert run.step == run.total_steps == 24 and got == [True] * 12
    assert [evaluation.step for evaluation in run.history] == sorted({evaluation.step for evaluation in run.history})


def test_a_run_that_has_come_further_than_it_should_is_left_as_it_is():
    """As with --resume and fewer epochs than were trained."""
    run = trained()
    _, corpus = tiny()
    before = copy.deepcopy(run.model)
    run.total_steps = 6
    try:
        train(run, corpus)
    except ValueError as error:
        assert "\n" not in str(error)
    assert run.step == 12 and weights_equal(run.model, before)


# short and strange texts

FIVE_WORDS = "Once there was a king"
STRANGE = [FIVE_WORDS, FIVE_WORDS + ".", "Once there was a king who gave his whole kingdom away for love.", "a b",
           "ha " * 300, "😀\u200d👩 e\u0301 " * 60, "One.\n\nTwo.\n\nThree.\n"]


WITHOUT_SPACES = [("story", "a" * 100), ("story", "天地玄黄宇宙洪荒日月盈昃" * 30), ("word", "—" * 100)]


@pytest.mark.parametrize("tokenizer, text", [(kind, text) for text in STRANGE for kind in ("word", "story")]
                         + WITHOUT_SPACES, ids=lambda value: value[:12])
def test_short_and_strange_texts_are_learned_and_no_loss_is_nan(tokenizer, text):
    run = trained(text, tokenizer=tokenizer, max_steps=3)
    assert run.step == 3 and run.history[-1].step == 3
    for evaluation in run.history:
        losses = [loss for loss in (evaluation.train_loss, evaluation.val_loss) if loss is not None]
        assert all(map(math.isfinite, losses)) and isinstance(evaluation.sample, str)
    assert isinstance("".join(generate_text(run.model, run.tokenizer, text[:3], 5)), str)
    assert 0.0 <= measure_recall(run.model, run.tokenizer, text) <= 1.0


def test_five_words_get_a_smaller_context_and_no_validation():
    run, corpus = tiny(FIVE_WORDS, context_length=16, max_steps=2)
    assert run.config.context_length == 4 and run.train_config.val_fraction == 0 and corpus.train_text == FIVE_WORDS
    train(run, corpus)
    assert [evaluation.val_loss for evaluation in run.history] == [None] * len(run.history) != []


def test_a_text_that_is_long_enough_keeps_its_context_and_its_validation():
    run, corpus = tiny(context_length=8)
    assert run.config.context_length == 8 and run.train_config.val_fraction == 0.1
    assert corpus.train_text + TEXT[len(corpus.train_text):] == TEXT and len(corpus.val_ids) > 8


@pytest.mark.parametrize("text", ["a", "word"])
def test_a_text_of_one_token_is_refused(text):
    with pytest.raises(ValueError, match="short"):
        new_run(corpus_from_text(text, "word"))


# on a GPU, whoever asks for a number waits until it is there

@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_no_number_is_asked_for_between_backward_and_step(optimizer, monkeypatch):
    run, corpus = tiny(optimizer=optimizer, max_steps=9)
    start_optimizer(run)
    events = note_questions(monkeypatch, run)
    training_step(run, *TrainingBatches(corpus, run)[0])
    assert events.count("backward") == 1 and "item" in events      # the loss, at the end
    assert events[events.index("backward"):][:2] == ["backward", "step"]


@pytest.mark.parametrize("changed", [{"epochs": 10**9}, {"max_steps": 10**9}])
def test_more_steps_than_memory_could_hold_the_plan_of_are_refused(changed):
    with pytest.raises(ValueError, match=r"0,000 steps are too many"):
        tiny(**{"epochs": 0, **changed})
