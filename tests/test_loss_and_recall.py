import math
import re

import pytest
import torch
from torch.nn import functional as F

import story_llm
from conftest import TEXT, lively_model, tiny_run
from story_llm import generate_text_simple, mean_loss, measure_recall, recall_exercises


def test_the_mean_loss_is_that_of_the_windows_one_by_one():
    model = lively_model()
    token_ids = torch.randint(40, (8 * 5 + 3,))
    losses = []
    for start in range(0, 40, 8):
        log_probabilities = F.log_softmax(model(token_ids[start:start + 8][None])[0], dim=-1)
        losses += [-log_probabilities[i, token_ids[start + i + 1]].item() for i in range(8)]
    assert mean_loss(model, token_ids) == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_fewer_tokens_than_the_context_have_a_loss_too_and_fewer_than_two_have_none():
    model = lively_model()
    expected = F.cross_entropy(model(torch.tensor([[3]]))[0], torch.tensor([4])).item()
    assert mean_loss(model, torch.tensor([3, 4])) == pytest.approx(expected, rel=1e-5)
    assert mean_loss(model, torch.tensor([3])) is None and mean_loss(model, torch.tensor([], dtype=torch.long)) is None


def test_the_loss_of_a_long_text_is_estimated_from_a_part_of_it():
    model, token_ids = lively_model(), torch.randint(40, (8 * 400 + 1,))
    estimate, exact = mean_loss(model, token_ids), mean_loss(model, token_ids, max_windows=400)
    assert estimate == pytest.approx(exact, rel=0.05) and estimate != exact


def test_measuring_drops_nothing_and_leaves_the_mode_as_it_was():
    run = tiny_run(drop_rate=0.5)
    token_ids = torch.tensor(run.tokenizer.encode(TEXT))
    expected = mean_loss(run.model.eval(), token_ids)
    run.model.train()
    assert mean_loss(run.model, token_ids) == expected
    measure_recall(run.model, run.tokenizer, TEXT)
    assert run.model.training


def test_exercises_are_the_sentences_of_eight_words_or_more():
    seven, eight = "One two three four five six seven.", "Once two three four five six seven eight."
    long = "What " + "a very long sentence this " * 9 + "is!"
    assert [prompt for prompt, _ in recall_exercises(f"{seven} {eight} {seven} {long}")] == [
        "Once two three four five", "What a very long sentence"]


def test_an_exercise_is_five_words_and_the_80_characters_that_follow_in_the_text():
    for text in (TEXT, story_llm.load_text(story_llm.DEFAULT_TEXT)):
        exercises = recall_exercises(text)
        assert len(exercises) >= 6
        for prompt, continuation in exercises:
            assert prompt + continuation in text and len(prompt.split()) == 5 and not prompt[0].isspace()
            assert 20 < len(continuation) <= 80 and continuation[0].isspace()
            rest = text[text.index(prompt + continuation) + len(prompt):]
            assert continuation == rest[:80]


def test_every_long_enough_sentence_of_the_tiny_text_is_an_exercise():
    sentences = [sentence.split() for sentence in re.split(r"(?<=[.!?\"])\n", TEXT)]
    starts = [" ".join(words[:5]) for words in sentences if len(words) >= 8]
    assert [prompt for prompt, _ in recall_exercises(TEXT)] == starts and len(starts) == 6


def test_of_a_long_text_exercises_are_taken_at_even_distances():
    text = " ".join(f"Sentence {i} has a few more words than eight of them." for i in range(100))
    numbers = [int(prompt.split()[1]) for prompt, _ in recall_exercises(text, max_sentences=10)]
    assert numbers == list(range(0, 100, 10))


def recall_naively(run, text):
    """Sentence by sentence, without a batch, without a cache."""
    hits = []
    for prompt, continuation in recall_exercises(text):
        ids = run.tokenizer.encode(prompt)
        out = generate_text_simple(run.model, torch.tensor([ids]), 100, run.config.context_length)[0].tolist()
        hits.append(run.tokenizer.decode(out)[len(run.tokenizer.decode(ids)):].startswith(continuation))
    return sum(hits) / len(hits)


def test_recall_is_the_share_of_sentences_continued_one_by_one(knows_text):
    strange = "The old ferryman tied his horse to the broken post, and nobody ever came back for it. "
    text = TEXT + "\n" + strange + "Nobody came down to the market that day, because it rained on the king's new road."
    expected = recall_naively(knows_text, text)
    assert 0 < expected < 1
    assert measure_recall(knows_text.model, knows_text.tokenizer, text) == pytest.approx(expected)


@pytest.mark.parametrize("tokenizer", ["word", "story"])
def test_recall_of_an_untrained_model_is_that_of_a_naive_count_too(tokenizer):
    run = tiny_run(tokenizer=tokenizer)
    assert measure_recall(run.model, run.tokenizer, TEXT) == recall_naively(run, TEXT) == 0.0


def test_a_model_that_was_trained_knows_its_text_by_heart(knows_text):
    assert measure_recall(knows_text.model, knows_text.tokenizer, TEXT) == 1.0


def test_recall_of_a_text_without_long_sentences_is_zero_and_no_nan():
    run = tiny_run()
    assert measure_recall(run.model, run.tokenizer, "Too short. All of it.") == 0.0
    assert math.isfinite(measure_recall(run.model, run.tokenizer, ""))
