import math

import pytest
import torch
from hypothesis import given, strategies as st

from conftest import TEXT, tiny_run, trained_run, weights_equal
from story_llm import (TrainConfig, TrainingBatches, deal, generate_text, learning_rate, measure_recall,
                       save_checkpoint, train)


# the learning rate

@given(total=st.integers(1, 500), warmup=st.integers(0, 600), highest=st.floats(1e-6, 1.0))
def test_the_learning_rate_rises_to_the_highest_then_falls_and_is_never_zero(total, warmup, highest):
    config = TrainConfig(warmup_steps=warmup, learning_rate=highest)
    rates = [learning_rate(step, total, config) for step in range(total)]
    top = rates.index(max(rates))
    assert all(0 < rate <= highest * (1 + 1e-9) for rate in rates) and max(rates) == pytest.approx(highest)
    assert top <= min(warmup, total)
    assert rates[:top + 1] == sorted(rates[:top + 1]) and rates[top:] == sorted(rates[top:], reverse=True)


def test_the_learning_rate_is_a_line_and_then_half_a_cosine():
    config = TrainConfig(warmup_steps=10, learning_rate=2.0)
    rates = [learning_rate(step, 110, config) for step in range(110)]
    assert rates[:10] == pytest.approx([0.2 * i for i in range(1, 11)])
    assert rates[10:] == pytest.approx([1 + math.cos(math.pi * i / 100) for i in range(100)])


# the batches

@given(count=st.integers(1, 50), hand=st.integers(1, 60), first=st.integers(0, 5))
def test_dealing_gives_out_every_number_before_it_shuffles_anew(count, hand, first):
    turns = math.ceil(count / hand)
    dealt = [deal(count, hand, first * turns + i, "name") for i in range(turns)]
    assert all(len(one) == hand for one in dealt)
    assert torch.cat(dealt).unique().tolist() == list(range(count))
    assert len(torch.cat(dealt)[:count].unique()) == count  # nothing twice before all are out


def test_dealing_depends_on_all_names_and_on_the_round():
    dealt = [(0, "a"), (0, "a"), (1, "a"), (0, "b"), (0, ("a", "b"))]
    hands = [deal(50, 50, turn, *names).tolist() for turn, names in dealt]
    assert hands[0] == hands[1] and len({tuple(hand) for hand in hands}) == 4


def window_starts(batches, steps):
    """The places of the windows, where the token ids are the numbers 0, 1, 2, ..."""
    return [inputs[:, 0].tolist() for inputs, targets in (batches[step] for step in steps)]


def test_windows_at_every_offset_come_in_time():
    batches = TrainingBatches(torch.arange(100), 8, TrainConfig(batch_size=5))
    seen = {start for row in window_starts(batches, range(60 * batches.steps_per_epoch)) for start in row}
    assert seen == set(range(100 - 8))


@pytest.mark.parametrize("stride", [0, 3, 8, 500])
def test_an_epoch_has_each_of_its_windows_once_stride_tokens_apart(stride):
    batches = TrainingBatches(torch.arange(100), 8, TrainConfig(batch_size=5, stride=stride))
    offsets = set()
    for epoch in range(4):
        first = epoch * batches.steps_per_epoch
        starts = sum(window_starts(batches, range(first, first + batches.steps_per_epoch)), [])
        step = min(stride or 8, 92)
        assert len(set(starts)) == math.ceil(92 / step) and len(starts) < len(set(starts)) + 5
        assert len({start % step for start in starts if start >= step or 92 % step == 0}) <= 2
        offsets.add(frozenset(starts))
    assert len(offsets) > 1  # another epoch, other places


@pytest.mark.parametrize("tokenizer", ["word", "story"])
@pytest.mark.parametrize("openings", [0.0, 0.5, 0.9])
def test_a_batch_has_windows_of_the_text_and_openings_as_a_prompt_is_encoded(tokenizer, openings):
    """An opening is the text from the start of a word, encoded by itself; behind the text's end no target counts."""
    length = 10
    run = tiny_run(tokenizer=tokenizer)
    token_ids = torch.tensor(run.tokenizer.encode(TEXT))
    batches = TrainingBatches(token_ids, length, TrainConfig(batch_size=16, openings=openings), TEXT, run.tokenizer)
    windows = {(tuple(w[:-1]), tuple(w[1:])) for w in token_ids.unfold(0, length + 1, 1).tolist()}
    starts = [i for i in range(len(TEXT)) if not TEXT[i].isspace() and (i == 0 or TEXT[i - 1].isspace())]
    expected = set()
    for start in starts:
        ids = run.tokenizer.encode(TEXT[start:])[:length + 1]
        missing = length + 1 - len(ids)
        expected.add((tuple((ids + [0] * missing)[:length]), tuple((ids + [-100] * missing)[1:])))
    seen_sentences = set()
    for step in range(40):
        rows = [(tuple(x), tuple(y)) for x, y in zip(*(part.tolist() for part in batches[step]))]
        assert set(rows) <= windows | expected
        assert sum(row in expected for row in rows) >= int(16 * openings) - 1  # see the next test
        seen_sentences |= set(rows) & expected
    assert openings == 0 or len(seen_sentences) > len(starts) / 2


def test_every_batch_has_its_full_size():
    run = tiny_run()
    token_ids = torch.tensor(run.tokenizer.encode(TEXT))
    batches = TrainingBatches(token_ids, 8, TrainConfig(batch_size=16), TEXT, run.tokenizer)
    assert {tuple(part.shape) for step in range(400) for part in batches[step]} == {(16, 8)}


def test_openings_of_long_words_are_whole():
    """Whatever the length of its words, an opening begins as the text from there on does, and has no other targets."""
    text = "incomprehensibilities counterrevolutionaries electroencephalographically. " * 9
    run = tiny_run(text, val_fraction=0.0)
    token_ids = torch.tensor(run.tokenizer.encode(text))
    batches = TrainingBatches(token_ids, 8, TrainConfig(batch_size=8, openings=0.9), text, run.tokenizer)
    for step in range(20):
        assert run.tokenizer.ids["<|unk|>"] not in batches[step][1]


def test_a_batch_is_a_function_of_seed_and_step_alone():
    run = tiny_run()
    token_ids = torch.tensor(run.tokenizer.encode(TEXT))

    def make(seed):
        return TrainingBatches(token_ids, 8, TrainConfig(batch_size=8, seed=seed), TEXT, run.tokenizer)

    one, two = make(1), make(1)
    in_order = [one[step] for step in range(12)]
    torch.manual_seed(99)
    for step in (11, 3, 7, 3):
        assert all(torch.equal(a, b) for a, b in zip(two[step], in_order[step]))
    assert not torch.equal(one[3][0], one[4][0]) and not torch.equal(one[3][0], make(2)[3][0])


# training

def test_the_loss_falls_and_the_history_tells_of_every_evaluation():
    run = trained_run(epochs=0, eval_every=40)
    steps = [entry["step"] for entry in run.history]
    assert tiny_run(epochs=9, max_steps=4).total_steps == 4
    assert run.total_steps == 150 and steps == [0, 3, 8, 30, 40, 80, 120, 150]  # 0, 2, 5, 20, 100 %, and every 40
    losses = [entry["train_loss"] for entry in run.history]
    assert losses[-1] < losses[0] / 3 and abs(losses[0] - math.log(run.config.vocab_size)) < 0.5
    assert all(entry["epoch"] * run.steps_per_epoch == pytest.approx(entry["step"]) for entry in run.history)
    assert all(entry["tokens"] == entry["step"] * 8 * 12 for entry in run.history)


def test_progress_is_told_in_lines_of_the_promised_form_with_a_sample():
    lines = []
    run = trained_run(log=lines.append)
    progress = [line for line in lines if line.startswith("Ep ")]
    assert len(progress) == len(run.history) and progress[0].startswith("Ep 1 (Step 000000): Train loss ")
    assert all(", Val loss " in line for line in progress)
    assert all("tokens/s" in line and "left" in line for line in progress[1:])
    assert sum("The old ferryman tied his ..." in line for line in lines) == len(progress)


def test_memorising_is_explained_once_when_validation_loss_rises():
    lines = []
    trained_run(log=lines.append, epochs=30)
    assert sum("memorising" in line for line in lines) == 1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_same_seed_same_weights_bit_for_bit_another_seed_others(precision):
    torch.manual_seed(1)
    first = trained_run(precision=precision, drop_rate=0.1)
    torch.manual_seed(2)
    again = trained_run(precision=precision, drop_rate=0.1)
    other = trained_run(precision=precision, drop_rate=0.1, seed=7)
    assert weights_equal(first.model, again.model) and first.history == again.history
    assert not weights_equal(first.model, other.model)


def test_training_asks_after_each_step_whether_to_stop():
    run = tiny_run()
    train(run, TEXT, lambda line: None, stop=lambda: run.step >= 3)
    assert run.step == 3


def test_training_saves_at_evaluations_and_at_the_end():
    saved = []
    run = trained_run(save=lambda run: saved.append(run.step))
    assert saved[-1] == run.step == run.total_steps and set(saved) <= {entry["step"] for entry in run.history}


def test_what_is_saved_at_a_stop_is_the_step_it_stopped_at():
    for step in (0, 3):
        saved, run = [], tiny_run()
        train(run, TEXT, lambda line: None, lambda run: saved.append(run.step), lambda: run.step >= step)
        assert saved[-1:] == [step]


def test_weights_that_were_fixed_stay_fixed():
    run = tiny_run(position="sinusoidal", weight_decay=0.5)
    before = run.model.pos_emb.weight.clone()
    train(run, TEXT, lambda line: None)
    assert torch.equal(run.model.pos_emb.weight, before)


@pytest.mark.parametrize("kind", [{"tokenizer": "story", "precision": "bf16"}, {"position": "sinusoidal"},
                                  {"position": "rotary"},
                                  {"tie_weights": True, "qkv_bias": True}], ids=str)
def test_training_comes_to_know_the_text_whatever_the_kind_of_model(kind):
    run = trained_run(emb_dim=64, epochs=80, eval_every=1000, val_fraction=0.0, batch_size=16, **kind)
    assert measure_recall(run.model, run.tokenizer, TEXT) == 1.0


# numbers that go wrong

def test_a_loss_that_is_not_finite_stops_training_with_advice():
    run = tiny_run()
    with torch.no_grad():
        run.model.final_norm.weight.fill_(math.nan)
    saved, lines = [], []
    with pytest.raises(ValueError, match="--learning-rate"):
        train(run, TEXT, lines.append, saved.append)
    assert not saved and not any("nan" in line for line in lines)


def test_weights_that_are_not_finite_are_neither_saved_nor_shown():
    saved, lines = [], []

    def save(run):
        saved.append(all(p.isfinite().all() for p in run.model.parameters())
                     and math.isfinite(run.history[-1]["train_loss"]))

    with pytest.raises(ValueError, match="--learning-rate"):
        trained_run(learning_rate=1e37, eval_every=1, warmup_steps=0, log=lines.append, save=save)
    assert all(saved) and not any(word in line for line in lines for word in ("loss nan", "loss inf"))


# short and strange texts

FIVE_WORDS = "Once there was a king"


def finite(run):
    return all(value is None or math.isfinite(value) for entry in run.history
               for value in (entry["train_loss"], entry["val_loss"], entry["epoch"], entry["tokens"]))


STRANGE = [FIVE_WORDS, FIVE_WORDS + ".", "Once there was a king who gave his whole kingdom away for love.", "a b",
           "ha " * 300,
           "😀\u200d👩 e\u0301 " * 60, "One.\n\nTwo.\n\nThree.\n"]


@pytest.mark.parametrize("tokenizer, text", [(kind, text) for text in STRANGE for kind in ("word", "story")]
                         + [("story", "a" * 100)],
                         ids=lambda value: value[:12])
def test_short_and_strange_texts_are_learned_and_no_loss_is_nan(tokenizer, text):
    lines = []
    run = trained_run(text, tokenizer=tokenizer, epochs=1, log=lines.append)
    assert run.step == run.total_steps > 0 and finite(run) and not any("nan" in line for line in lines)
    assert isinstance("".join(generate_text(run.model, run.tokenizer, text[:3], 5)), str)
    assert 0.0 <= measure_recall(run.model, run.tokenizer, text) <= 1.0


def test_five_words_get_a_smaller_context_no_validation_and_a_line_for_each():
    lines = []
    run = tiny_run(FIVE_WORDS, log=lines.append, context_length=16)
    assert run.config.context_length == 4 and run.train_config.val_fraction == 0
    assert sum("validation" in line for line in lines) == 1 and sum("context" in line for line in lines) == 1
    train(run, FIVE_WORDS, lines.append)
    assert all(entry["val_loss"] is None for entry in run.history) and not any("Val loss" in line for line in lines)


def test_a_text_that_is_long_enough_gets_no_notes():
    lines = []
    run = tiny_run(log=lines.append, context_length=8)
    assert not lines and run.config.context_length == 8 and run.train_config.val_fraction == 0.1


@pytest.mark.parametrize("text", ["a", "word"])
def test_a_text_of_one_token_is_refused(text):
    with pytest.raises(ValueError, match="short"):
        tiny_run(text)


@pytest.mark.parametrize("tokenizer, text", [("story", "天地玄黄宇宙洪荒日月盈昃辰宿列張寒来暑往" * 20), ("word", "—" * 100)],
                         ids=lambda value: value[:12])
def test_a_text_without_any_white_space_is_trained_on(tokenizer, text):
    run = trained_run(text, tokenizer=tokenizer, epochs=1)
    assert run.config.context_length == 12 and run.step > 0


def test_saving_a_run_that_was_never_trained_works(tmp_path):
    save_checkpoint(tmp_path / "m.pt", tiny_run())
    assert (tmp_path / "m.pt").stat().st_size > 1000
