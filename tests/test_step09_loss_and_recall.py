"""Step 9: how wrong a model is, and how much of a text it knows by heart, held against one-by-one counts."""
import math
import random
import re
import types

import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn
from torch.nn import functional as F

from helpers import STORY, TEXT, lively_model, some_text, story_llm, tiny, trained
from scripts import SCRIPTS, SENTENCES
from story_llm import (IGNORED, GPTConfig, batch_loss, count_hits, generate_text_simple, inference, load_text,
                       make_tokenizer, mean_loss, measure_recall, recall_exercises)


def some_ids(*shape):
    return torch.randint(40, shape, generator=torch.Generator().manual_seed(shape[-1]))


def loss_naively(logits, target):
    """-ln of the softmax of one row of logits at one place, in Python's numbers."""
    return math.log(sum(math.exp(x - logits[target]) for x in logits))


# the loss

@pytest.mark.parametrize("ignored", [[], [(0, 2)], [(0, 0), (0, 1), (0, 2), (1, 1)]])
def test_the_loss_of_a_batch_is_the_mean_of_those_of_its_guesses(ignored):
    model, inputs, targets = lively_model(), some_ids(2, 3), some_ids(2, 4)[:, 1:].clone()
    for place in ignored:
        targets[place] = IGNORED
    logits = model(inputs).tolist()
    losses = [loss_naively(logits[b][t], targets[b, t]) for b in range(2) for t in range(3) if (b, t) not in ignored]
    assert batch_loss(model, inputs, targets).item() == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def windows_loss_naively(model, token_ids, starts, T=8):
    losses = []
    for start in starts:
        logits = model(token_ids[start:start + T][None])[0].tolist()
        losses += [loss_naively(logits[i], token_ids[start + i + 1]) for i in range(T)]
    return sum(losses) / len(losses)


@pytest.mark.parametrize("more", [1, 3, 8])     # 8: one short of another window and its last target
def test_the_mean_loss_is_that_of_the_windows_one_by_one(more):
    model, token_ids = lively_model(), some_ids(8 * 5 + more)
    expected = windows_loss_naively(model, token_ids, range(0, 40, 8))
    assert mean_loss(model, token_ids) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("n_windows, max_windows", [(5, 2), (50, 32), (33, 32), (7, 1), (300, 299)])
def test_of_many_windows_some_are_taken_at_even_distances(n_windows, max_windows):
    """The first one always; and of the 299, which go through the model in three parts, each counts as much."""
    model, token_ids = lively_model(), some_ids(8 * n_windows + 1)
    starts = [8 * (i * n_windows // max_windows) for i in range(max_windows)]
    expected = windows_loss_naively(model, token_ids, starts)
    assert mean_loss(model, token_ids, max_windows) == pytest.approx(expected, rel=1e-5)


def test_the_loss_of_a_long_text_is_estimated_from_a_part_of_it():
    model, token_ids = lively_model(), some_ids(8 * 400 + 1)
    estimate, exact = mean_loss(model, token_ids), mean_loss(model, token_ids, max_windows=400)
    assert estimate == pytest.approx(exact, rel=0.05) and estimate != exact


class Listing(nn.Module):
    """Guesses from the last token alone, by a table, and notes what it was asked."""
    def __init__(self, vocab_size):
        super().__init__()
        self.config = types.SimpleNamespace(context_length=1)
        self.table = torch.randn(vocab_size, vocab_size, generator=torch.Generator().manual_seed(0))
        self.asked = []

    def forward(self, inputs):
        self.asked += inputs.flatten().tolist()
        return self.table[inputs]


def test_the_windows_of_a_huge_text_are_found_in_whole_numbers():
    """20 million places: a float32 knows only every second of the later ones."""
    N, count = 19_999_999, 1000
    token_ids = torch.randint(251, (N + 1,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    model = Listing(251)
    found = mean_loss(model, token_ids, max_windows=count)
    places = [i * N // count for i in range(count)]
    assert model.asked == [token_ids[place].item() for place in places]
    rows = model.table.tolist()
    losses = [loss_naively(rows[token_ids[place].item()], token_ids[place + 1].item()) for place in places]
    assert found == pytest.approx(sum(losses) / count, rel=1e-6)


def test_fewer_tokens_than_the_context_have_a_loss_too_and_fewer_than_two_have_none():
    model = lively_model()
    for n in (2, 5, 8):
        token_ids = some_ids(n)
        expected = windows_loss_naively(model, token_ids, [0], n - 1)
        assert mean_loss(model, token_ids) == pytest.approx(expected, rel=1e-5)
    for n in (0, 1):
        assert mean_loss(model, some_ids(n)) is None


def test_inference_keeps_no_gradients_and_leaves_the_mode_as_it_was_even_after_an_error():
    for training in (True, False):
        model = lively_model().train(training)
        with pytest.raises(KeyError), inference(model):
            assert not any(part.training for part in model.modules()) and not torch.is_grad_enabled()
            raise KeyError
        assert all(part.training is training for part in model.modules()) and torch.is_grad_enabled()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("measure", [
    lambda run, corpus: mean_loss(run.model, corpus.train_ids),
    lambda run, corpus: measure_recall(run.model, run.tokenizer, TEXT),
    lambda run, corpus: count_hits(run.model, run.tokenizer, recall_exercises(TEXT)),
    lambda run, corpus: story_llm.evaluate(run, corpus)])
def test_measuring_drops_nothing_and_leaves_mode_chance_and_gradients_as_they_were(measure, training):
    run, corpus = tiny(drop_rate=0.5)
    expected = measure(run, corpus)
    run.model.train(training)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert measure(run, corpus) == expected
    assert run.model.training is training and torch.is_grad_enabled() and torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in run.model.parameters())


# what recall asks

def test_exercises_are_the_sentences_of_eight_words_or_more():
    seven, eight = "One two three four five six seven.", "Once two three four five six seven eight."
    long = "What " + "a very long sentence this " * 9 + "is!"
    assert [prompt for prompt, _ in recall_exercises(f"{seven} {eight} {seven} {long}")] == [
        "Once two three four five", "What a very long sentence"]


@pytest.mark.parametrize("text", [TEXT, load_text(STORY)], ids=["tiny", "story"])
def test_an_exercise_is_five_words_and_the_80_characters_that_follow_in_the_text(text):
    exercises = recall_exercises(text)
    assert len(exercises) >= 6
    for prompt, answer in exercises:
        assert prompt + answer in text and len(prompt.split()) == 5 and not prompt[0].isspace()
        assert 20 < len(answer) <= 80 and answer[0].isspace()
        assert answer == text[text.index(prompt + answer) + len(prompt):][:80]


def test_every_long_enough_sentence_of_the_tiny_text_is_an_exercise():
    sentences = [sentence.split() for sentence in re.split(r"(?<=[.!?\"])\n", TEXT)]
    starts = [" ".join(words[:5]) for words in sentences if len(words) >= 8]
    assert [prompt for prompt, _ in recall_exercises(TEXT)] == starts and len(starts) == 6


@given(st.lists(some_text).map(". ".join))
def test_exercises_of_any_text_are_pieces_of_it(text):
    for prompt, answer in recall_exercises(text):
        assert prompt + answer in text and prompt.strip() and 1 <= len(answer) <= 80


@pytest.mark.parametrize("count, most, expected", [(100, 10, range(0, 100, 10)), (10, 10, range(10)),
                                                   (11, 10, range(0, 11, 2)), (3, 1, [0])])
def test_of_a_long_text_exercises_are_taken_at_even_distances(count, most, expected):
    text = " ".join(f"Sentence {i} has a few more words than eight of them." for i in range(count))
    assert [int(prompt.split()[1]) for prompt, _ in recall_exercises(text, most)] == list(expected)


# what recall counts

CHINESE = """老船夫把小船系在断了的木桩上，等着大雨停下来。那一天没有人到河边来，因为新国王封了运盐的大路。
夜里有一个男孩提着灯沿河岸跑，喊着一个大家都认识的名字。“阿丹王子回家了，”他说，“他问谁愿意送他过河。”
于是村里的门一扇接一扇慢慢地打开，人们走进泥泞的街道！我母亲一句话也没说，从墙上取下长桨，交给了船夫。"""
LETTERS = [chr(number) for number in range(0x10330, 0x1034b)]       # Gothic: four bytes each
GOTHIC = " ".join("".join(random.Random(i).choices(LETTERS, k=13)) for i in range(12)) + "."
TEXTS = {       # what the model knows, and what it is asked in addition, beginning as it knows, or as it does not
    "English": (TEXT, "The old ferryman tied his horse to the broken post, and nobody ever came back for it. "
                "Nobody came down to the market that day, because it rained on the king's new road. "
                "Twelve angry geese crossed the frozen bridge in silence, one after another."),
    "Chinese": (CHINESE, "老船夫把小马系在断了的木桩上，再也没有人来牵走它。那一天没有人到市场来，因为新的大路上下着雨。"),
    "Gothic": (GOTHIC, f" {GOTHIC[:75]}{GOTHIC[90:]} {GOTHIC[::-1]}")}


class Parrot(nn.Module):
    """Knows some tokens by heart: after the longest end of what it reads that it knows, what came there first."""
    def __init__(self, token_ids, vocab_size, context_length=24):
        super().__init__()
        self.config = GPTConfig(vocab_size=vocab_size, context_length=context_length)
        self.tok_emb = nn.Embedding(1, 1)       # by which one asks for its device
        self.after = {}
        for place in range(len(token_ids)):
            for n in range(1, min(place, context_length) + 1):
                self.after.setdefault(tuple(token_ids[place - n:place]), token_ids[place])

    def forward(self, token_ids, cache=None):
        if cache is not None:
            numbers = token_ids[:, None, :, None]
            token_ids = cache.append(self, numbers, numbers)[0][:, 0, :, 0]
        logits = torch.zeros(*token_ids.shape, self.config.vocab_size)
        for row, token_ids in enumerate(token_ids.tolist()):
            for end in range(1, len(token_ids) + 1):
                known = (self.after.get(tuple(token_ids[start:end])) for start in range(end))
                logits[row, end - 1, next((token for token in known if token is not None), 0)] = 1.0
        return logits if cache is None else logits[:, -1:]


def count_naively(model, tokenizer, exercises):
    """Prompt by prompt, to the end, without a batch and without a cache."""
    hits = 0
    for prompt, answer in exercises:
        ids = tokenizer.encode(prompt)
        out = generate_text_simple(model, torch.tensor([ids]), 320, model.config.context_length)[0].tolist()
        hits += tokenizer.decode(out)[len(tokenizer.decode(ids)):].startswith(answer)
    return hits


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("kind", ["word", "story", "gpt2"])
def test_hits_are_those_of_a_naive_count(kind, name, request):
    if kind == "gpt2":
        request.getfixturevalue("gpt2")
    known, more = TEXTS[name]
    tokenizer = make_tokenizer(kind, known, more, vocab_size=300)
    model = Parrot(tokenizer.encode(known), tokenizer.vocab_size)
    knows_all, exercises = recall_exercises(known), recall_exercises(known + "\n" + more)
    expected = count_naively(model, tokenizer, exercises)
    assert 0 < expected < len(exercises)
    assert count_hits(model, tokenizer, exercises) == expected
    assert measure_recall(model, tokenizer, known + "\n" + more) == expected / len(exercises)
    assert count_hits(model, tokenizer, knows_all) == count_naively(model, tokenizer, knows_all) == len(knows_all)


def test_one_who_writes_the_answer_in_other_tokens_has_a_hit_too():
    tokenizer = make_tokenizer("story", TEXT)
    (prompt, answer), *_ = recall_exercises(TEXT)
    beginning, letters = tokenizer.encode(prompt), [tokenizer.encode(letter)[0] for letter in answer]
    assert len(tokenizer.encode(prompt + answer)) < len(beginning) + len(letters) - 30
    for written, hits in ((letters, 1), (letters[:40] + letters[41:], 0)):
        model = Parrot(beginning + written, tokenizer.vocab_size)
        assert count_hits(model, tokenizer, [(prompt, answer)]) == hits


def test_what_a_model_knows_by_heart_is_seen_in_one_pass_or_two():
    exercises = recall_exercises(TEXT)
    tokenizer = make_tokenizer("word", TEXT)
    model = Parrot(tokenizer.encode(TEXT), tokenizer.vocab_size, context_length=64)
    passes = []
    model.register_forward_hook(lambda module, inputs, output: passes.append(len(inputs[0])))
    assert count_hits(model, tokenizer, exercises) == len(exercises) <= len(passes) < 2 * len(exercises)


def test_hits_of_many_prompts_of_many_lengths_are_those_of_the_sentences_that_were_not_changed():
    sentences = [f"{'Our ' * (i % 3)}traveller number {i} of many went past gate {i} and then on past tower {i} and "
                 f"then past well {i} and then on to bridge {i} on foot." for i in range(300)]
    asked = [sentence.replace("then past well", "then past wall") if i % 7 == 0 else sentence
             for i, sentence in enumerate(sentences)]
    tokenizer = make_tokenizer("word", " ".join(sentences))
    model = Parrot(tokenizer.encode(" ".join(sentences)), tokenizer.vocab_size)
    exercises = recall_exercises(" ".join(asked))
    assert len(exercises) == 300
    assert count_hits(model, tokenizer, exercises) == sum(i % 7 > 0 for i in range(300))


def test_recall_of_a_trained_model_is_the_share_of_sentences_continued_one_by_one(knows_text):
    run = knows_text
    text = TEXT + "\n" + TEXTS["English"][1]
    exercises = recall_exercises(text)
    expected = count_naively(run.model, run.tokenizer, exercises) / len(exercises)
    assert 0 < expected < 1 and measure_recall(run.model, run.tokenizer, text) == expected
    assert measure_recall(run.model, run.tokenizer, TEXT) == 1.0


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_text_in_any_script_is_learned_by_heart(name):
    run = trained(SCRIPTS[name], tokenizer=make_tokenizer("story", SCRIPTS[name]), emb_dim=64, context_length=32,
                  batch_size=16, max_steps=140, optimizer="muon", learning_rate=0.003, eval_every=1000, val_fraction=0.0)
    exercises = recall_exercises(SCRIPTS[name])
    assert len(exercises) == len(SENTENCES[name])
    assert count_hits(run.model, run.tokenizer, exercises) >= 0.95 * len(exercises)


@pytest.mark.parametrize("tokenizer", ["word", "story"])
def test_an_untrained_model_knows_nothing(tokenizer):
    run, _ = tiny(tokenizer=tokenizer)
    assert measure_recall(run.model, run.tokenizer, TEXT) == 0.0


@pytest.mark.parametrize("text", ["Too short. All of it.", "", "\n \n"])
def test_recall_of_a_text_without_long_sentences_is_zero_and_no_nan(text):
    run, _ = tiny()
    assert measure_recall(run.model, run.tokenizer, text) == 0.0
