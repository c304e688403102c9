"""Step 9: the loss, compared with sums in plain Python, and recall, compared with generating token by token."""
import math
import re
import types

import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn

from helpers import STORY, TEXT, lively_model, some_text, story_llm, tiny, train_to, trained
from scripts import SCRIPTS, SENTENCES
from story_llm import (IGNORE_INDEX, batch_loss, describe_loss, evenly_spaced, generate,
                       generate_text_simple, load_text, make_tokenizer, mean_loss, measure_recall, recall_tests, recites)


def some_ids(*shape):
    return torch.randint(40, shape, generator=torch.Generator().manual_seed(shape[-1]))


def naive_loss(logits, target):
    """-ln of the softmax of one row of logits at the target, in Python's numbers."""
    return math.log(sum(math.exp(x - logits[target]) for x in logits))


# the loss

@pytest.mark.parametrize("ignored", [[], [(0, 2)], [(0, 0), (0, 1), (0, 2), (1, 1)]])
def test_the_loss_of_a_batch_is_the_mean_over_its_examples_without_padding(ignored):
    model, inputs, targets = lively_model(), some_ids(2, 3), some_ids(2, 4)[:, 1:].clone()
    for position in ignored:
        targets[position] = IGNORE_INDEX
    logits = model(inputs).tolist()
    losses = [naive_loss(logits[b][t], targets[b, t]) for b in range(2) for t in range(3) if (b, t) not in ignored]
    assert batch_loss(model, inputs, targets).item() == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def naive_mean_loss(model, token_ids, starts, T=8):
    losses = []
    for start in starts:
        logits = model(token_ids[start:start + T][None])[0].tolist()
        losses += [naive_loss(logits[i], token_ids[start + i + 1]) for i in range(T)]
    return sum(losses) / len(losses)


@pytest.mark.parametrize("n_windows, max_windows", [(5, 32), (5, 2), (33, 32), (7, 1), (300, 299)])
@pytest.mark.parametrize("more", [1, 8])        # with 8, a last target is missing for one more window
def test_the_mean_loss_is_the_mean_over_windows_that_do_not_overlap_at_most_so_many_evenly_spaced(
        n_windows, max_windows, more):
    """The first window is always taken. The 299 go through the model in three parts and count the same."""
    model, token_ids, count = lively_model(), some_ids(8 * n_windows + more), min(n_windows, max_windows)
    expected = naive_mean_loss(model, token_ids, [8 * (i * n_windows // count) for i in range(count)])
    assert mean_loss(model, token_ids, max_windows) == pytest.approx(expected, rel=1e-5)


class LookupModel(nn.Module):
    """Predicts from the last token alone, by a matrix of logits, and records its inputs."""
    def __init__(self, vocab_size):
        super().__init__()
        self.config = types.SimpleNamespace(context_length=1)
        self.logits = torch.randn(vocab_size, vocab_size, generator=torch.Generator().manual_seed(0))
        self.tok_emb = nn.Embedding.from_pretrained(self.logits)
        self.inputs = []

    def forward(self, inputs):
        self.inputs += inputs.flatten().tolist()
        return self.logits[inputs]


def test_the_windows_of_a_huge_text_are_located_with_integers():
    """There are 20 million positions. Above 16.8 million, a float32 cannot represent the odd ones."""
    N, count = 19_999_999, 1000
    token_ids = torch.randint(251, (N + 1,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    model = LookupModel(251)
    found = mean_loss(model, token_ids, max_windows=count)
    positions = [i * N // count for i in range(count)]
    assert model.inputs == [token_ids[position].item() for position in positions]
    rows = model.logits.tolist()
    losses = [naive_loss(rows[token_ids[position].item()], token_ids[position + 1].item()) for position in positions]
    assert found == pytest.approx(sum(losses) / count, rel=1e-6)


def test_fewer_tokens_than_a_window_have_a_loss_and_fewer_than_two_have_none():
    model = lively_model()
    for n in (2, 5, 8):
        token_ids = some_ids(n)
        expected = naive_mean_loss(model, token_ids, [0], n - 1)
        assert mean_loss(model, token_ids) == pytest.approx(expected, rel=1e-5)
    for n in (0, 1):
        assert mean_loss(model, some_ids(n)) is None


@pytest.mark.parametrize("tokenizer", ["word", "story"])
def test_perplexity_and_bits_per_character_are_those_of_the_right_tokens_probabilities(tokenizer):
    """Their product is 1 / perplexity ** N, and what a code of the text needs is -log2 of it. `<|endoftext|>` is one of
    the tokens, but no character of the text."""
    run, corpus = tiny(tokenizer=tokenizer)
    loss = mean_loss(run.model, corpus.train_ids, max_windows=len(corpus.train_ids))
    found = re.fullmatch(r"([\d.]+) \(perplexity ([\d.,]+); ([\d.]+) bits per character\)",
                         describe_loss(loss, corpus.train_ids, run.tokenizer))
    perplexity = 2 ** (float(found[3]) * len(corpus.train_text) / len(corpus.train_ids))
    assert float(found[1]) == pytest.approx(loss, abs=6e-4)
    for expected in (perplexity, math.exp(loss)):
        assert float(found[2].replace(",", "")) == pytest.approx(expected, rel=0.01)


def test_a_uniform_guess_among_four_letters_takes_two_bits_per_character():
    letters = Letters()
    letters.end_of_text = 99
    assert describe_loss(math.log(4), torch.arange(10), letters) == "1.386 (perplexity 4.00; 2.000 bits per character)"
    assert "perplexity inf; " in describe_loss(5000.0, torch.arange(10), letters)


@pytest.mark.parametrize("measure", [
    lambda run, corpus: mean_loss(run.model, corpus.train_ids),
    lambda run, corpus: measure_recall(run.model, run.tokenizer, TEXT),
    lambda run, corpus: story_llm.evaluate(run, corpus)], ids=["loss", "recall", "evaluate"])
def test_measuring_uses_no_dropout_and_leaves_random_state_and_gradients_alone(measure):
    run, corpus = tiny(drop_rate=0.5)
    expected = measure(run, corpus)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert measure(run, corpus) == expected
    assert torch.equal(torch.get_rng_state(), before) and torch.is_grad_enabled() and not run.model.training
    assert all(parameter.grad is None for parameter in run.model.parameters())


# the recall tests of a text

def test_recall_is_tested_on_the_sentences_of_at_least_eight_words():
    seven, eight = "One two three four five six seven.", "Once two three four five six seven eight."
    long = "What " + "a very long sentence this " * 9 + "is!"
    assert [prompt for prompt, _ in recall_tests(f"{seven} {eight} {long}")] == [
        "Once two three four five", "What a very long sentence"]


def naive_continuation(rest):
    """80 characters, and more up to the end of a word; if there are not so many, all."""
    found = re.match(r".{79}\s*\S+", rest, re.DOTALL)
    return found[0] if found else rest


@pytest.mark.parametrize("text", [TEXT, load_text(STORY)], ids=["tiny", "story"])
def test_a_recall_test_is_five_words_and_at_least_80_characters_up_to_the_end_of_a_word(text):
    tests = recall_tests(text)
    assert len(tests) >= 6
    for prompt, continuation in tests:
        assert len(prompt.split()) == 5 and not prompt[0].isspace()
        assert prompt + continuation in text
        assert continuation == naive_continuation(text[text.index(prompt + continuation) + len(prompt):])
    if text == TEXT:
        assert [prompt for prompt, _ in tests] == [" ".join(line.split()[:5]) for line in TEXT.splitlines()]


def test_a_word_without_end_does_not_make_the_continuation_endless():
    (_, continuation), = recall_tests("One two three four five six seven " + "eight" * 1000)
    assert len(continuation) == 200


@given(st.lists(some_text).map(". ".join))
def test_the_recall_tests_of_any_text_are_parts_of_it(text):
    for prompt, continuation in recall_tests(text):
        assert prompt + continuation in text and prompt.strip() and 1 <= len(continuation) <= 200


def test_sentences_that_five_words_cannot_tell_apart_are_no_recall_tests():
    """No model could continue both. If they are continued alike, there is nothing to tell apart."""
    same = "The king said to him"
    end = " that the river was his, and that he gave it to the ferryman and to his old dog."
    others = TEXT.replace("Nobody came", "Many came").replace("\n", " ")
    assert recall_tests(f"{same}{end} {same} that it was late. {others}") == recall_tests(others)
    (prompt, continuation), *rest = recall_tests(f"{same}{end} {same}{end} {others}")
    assert (prompt, rest) == (same, recall_tests(others)) and continuation in end and len(continuation) >= 80
    # Five words are too few for a test, but begin like another sentence. With two spaces, it begins differently.
    assert recall_tests(f"{same}\n\n{same}{end} {others}") == recall_tests(others)
    two_spaces = f"{same} that it was late. {same.replace('said', 'said ')} that nobody had come yet."
    assert [prompt.split(" ") for prompt, _ in recall_tests(two_spaces)] == [
        ["The", "king", "said", "to", "him"], ["The", "king", "said", "", "to", "him"]]


def test_in_a_chat_the_lines_are_tested_and_in_an_endless_line_every_twentieth_word():
    lines = [f"[09:{i:02}] Meena: day number {i} has begun" for i in range(20)]        # of seven words
    assert [prompt for prompt, _ in recall_tests("\n".join(lines))] == [" ".join(line.split()[:5]) for line in lines]
    words = [f"word{i}" for i in range(2000)]
    tests = recall_tests(" ".join(words))
    assert [prompt for prompt, _ in tests] == [" ".join(words[i:i + 5]) for i in range(0, 2000, 20)]
    assert all(prompt + continuation in " ".join(words) for prompt, continuation in tests)


@pytest.mark.parametrize("count, most, expected", [(100, 10, range(0, 100, 10)), (10, 10, range(10)),
                                                   (11, 10, range(0, 11, 2)), (3, 1, [0]), (0, 5, [])])
def test_of_many_sentences_some_are_taken_evenly_spaced(count, most, expected):
    assert evenly_spaced(list(range(count)), most) == list(expected)


# recall

class Letters:
    """A tokenizer for tests, in which each character is a token: the id of chr(200 + n) is n."""
    def encode(self, text):
        return [ord(character) - 200 for character in text]

    def decode(self, token_ids):
        return "".join(chr(200 + token_id) for token_id in token_ids)


@given(context_length=st.integers(1, 12), prompt_length=st.integers(1, 15), length=st.integers(1, 20),
       changed=st.integers(0, 19), seed=st.integers(0, 20))
def test_a_model_recites_what_it_generates_and_nothing_else(context_length, prompt_length, length, changed, seed):
    """The prompt may be longer than the window, and the window may slide along. One wrong token is noticed, wherever
    it is."""
    model = lively_model(seed, context_length=context_length, n_layers=1)
    prompt = torch.randint(40, (1, prompt_length), generator=torch.Generator().manual_seed(seed))
    generated = [token.item() for token in generate(model, prompt, length)]
    prompt = Letters().decode(prompt[0].tolist())
    assert recites(model, Letters(), prompt, Letters().decode(generated))
    generated[changed % length] = (generated[changed % length] + 1) % 40
    assert not recites(model, Letters(), prompt, Letters().decode(generated))


def recites_naively(run, prompt, continuation):
    """Generate token by token, without a cache, and compare."""
    wanted = run.tokenizer.encode(continuation)
    token_ids = torch.tensor([run.tokenizer.encode(prompt)])
    out = generate_text_simple(run.model, token_ids, len(wanted), run.config.context_length)
    return out[0, token_ids.shape[1]:].tolist() == wanted


OTHER = """The old ferryman tied his horse to the broken post, and nobody ever came back for it in all those years.
Nobody came down to the market that day, because it rained on the king's new road and on the old one.
Twelve angry geese crossed the frozen bridge in silence, one after another, and none of them looked back.
"""


@pytest.mark.parametrize("kind, context_length, steps", [
    ("word", 24, (12, 18, 24, 36)), ("story", 12, (84, 96, 108, 120)), ("gpt2", 6, (42, 48, 54, 66))], ids=str)
def test_recall_in_one_pass_equals_recall_by_generating(kind, context_length, steps, request):
    """Before training, when the model knows a part of the text, and when it knows most of it. Some prompts are longer
    than the short windows."""
    if kind == "gpt2":
        request.getfixturevalue("gpt2")
    run, corpus = tiny(tokenizer=kind, context_length=context_length, emb_dim=64, batch_size=16, epochs=0,
                       max_steps=120, learning_rate=4e-3, eval_every=1000, val_fraction=0.0)
    known, unknown = recall_tests(TEXT), recall_tests(OTHER)
    counts = []
    for step in (0, *steps):
        if step > 0:
            train_to(run, corpus, step)
        expected = [recites_naively(run, *test) for test in known + unknown]
        assert [recites(run.model, run.tokenizer, *test) for test in known + unknown] == expected
        counts.append(sum(expected[:6]))
        assert measure_recall(run.model, run.tokenizer, TEXT) == counts[-1] / 6
    assert counts[0] == 0 and any(0 < count < 6 for count in counts) and max(counts) >= 3, counts


def test_recall_is_measured_on_as_many_sentences_as_asked(knows_text):
    """Of the five sentences of this text, the model can continue the first. (The second one is followed by another.)"""
    other = OTHER.replace("The old", "A young").replace("Nobody", "Everybody")
    text = "\n".join(TEXT.splitlines()[:2]) + "\n" + other
    recalls = [measure_recall(knows_text.model, knows_text.tokenizer, text, n) for n in (5, 2, 1)]
    assert recalls == [1 / 5, 1 / 2, 1.0]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_text_in_any_script_is_memorized(name):
    run = trained(SCRIPTS[name], tokenizer=make_tokenizer("story", SCRIPTS[name]), emb_dim=64, context_length=32,
                  batch_size=16, max_steps=150, optimizer="muon", learning_rate=0.012, eval_every=1000,
                  val_fraction=0.0)
    assert len(recall_tests(SCRIPTS[name])) == len(SENTENCES[name])
    assert measure_recall(run.model, run.tokenizer, SCRIPTS[name]) >= 0.95


@pytest.mark.parametrize("text", ["Too short. All of it.", "", "\n \n"])
def test_the_recall_of_a_text_without_long_sentences_is_0(text):
    run, _ = tiny()
    assert story_llm.share_recited(run.model, run.tokenizer, recall_tests(text)) is None
    assert measure_recall(run.model, run.tokenizer, text) == 0.0
