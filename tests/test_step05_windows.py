"""Step 5: sliding windows, and the corpus from which they are cut."""
from unittest import mock

import pytest
import torch
from hypothesis import given, strategies as st

from helpers import TEXT, some_text, story_llm
from scripts import SCRIPTS
from story_llm import SlidingWindowDataset, StoryError, UNKNOWN, corpus_from_text, split_text, train_bpe_fast

sizes = dict(extra=st.integers(1, 60), length=st.integers(1, 20), stride=st.integers(1, 25))


@given(**sizes)
def test_the_windows_are_those_of_a_naive_loop(extra, length, stride):
    tokens = list(range(100, 100 + length + extra))
    expected = [(tokens[i:i + length], tokens[i + 1:i + length + 1]) for i in range(0, len(tokens) - length, stride)]
    dataset = SlidingWindowDataset(torch.tensor(tokens), length, stride)
    assert len(dataset) == len(expected)
    assert [(x.tolist(), y.tolist()) for x, y in (dataset[i] for i in range(len(dataset)))] == expected


@given(**sizes)
def test_every_token_but_the_first_is_a_target_unless_a_last_window_would_not_fill(extra, length, stride):
    dataset = SlidingWindowDataset(torch.arange(length + extra), length, min(stride, length))
    seen = torch.cat([targets for _, targets in (dataset[i] for i in range(len(dataset)))]).unique().tolist()
    assert seen == list(range(1, seen[-1] + 1)) and length + extra - 1 - seen[-1] < min(stride, length)


def test_windows_are_views_and_not_copies_of_the_token_ids():
    token_ids = torch.arange(30)
    dataset = SlidingWindowDataset(token_ids, 4, 3)
    for i in range(len(dataset)):
        inputs, targets = dataset[i]
        assert inputs.data_ptr() == token_ids.data_ptr() + i * 3 * token_ids.element_size()
        assert targets.data_ptr() == inputs.data_ptr() + token_ids.element_size()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_token_ids_of_a_smaller_type_give_windows_of_the_type_that_an_embedding_takes(dtype):
    inputs, targets = SlidingWindowDataset(torch.arange(9).to(dtype), 4)[1]
    assert inputs.dtype == targets.dtype == torch.long
    assert inputs.tolist() == [1, 2, 3, 4] and targets.tolist() == [2, 3, 4, 5]


def test_an_index_tensor_gives_a_batch():
    dataset = SlidingWindowDataset(torch.arange(30), 4, 3)
    inputs, targets = dataset[torch.tensor([2, 0, 5])]
    assert inputs.tolist() == [[6, 7, 8, 9], [0, 1, 2, 3], [15, 16, 17, 18]] and torch.equal(targets, inputs + 1)


def test_a_data_loader_can_read_it():
    loader = torch.utils.data.DataLoader(SlidingWindowDataset(torch.arange(9), 4, 2), batch_size=3)
    (inputs, targets), = loader
    assert inputs.tolist() == [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 7]] and torch.equal(targets, inputs + 1)


@pytest.mark.parametrize("n, length", [(4, 4), (1, 1), (0, 1), (3, 32)])
def test_too_few_tokens_for_a_window_and_its_targets_are_refused_with_both_numbers(n, length):
    with pytest.raises(StoryError, match=rf"{n} tokens.*\b{length} tokens"):
        SlidingWindowDataset(torch.arange(n), length)
    assert len(SlidingWindowDataset(torch.arange(length + 1), length)) == 1


# the corpus

def check_corpus(corpus, text, val_fraction, context_length):
    """What must be true of every corpus."""
    assert corpus.train_ids.dtype == corpus.val_ids.dtype == torch.long
    *token_ids, last = corpus.train_ids.tolist()
    assert corpus.tokenizer.decode(token_ids) == corpus.train_text
    assert last == corpus.tokenizer.end_of_text and corpus.tokenizer.decode([last]) == "<|endoftext|>"
    assert last not in token_ids and last not in corpus.val_ids
    if len(corpus.val_ids):
        assert len(corpus.val_ids) > context_length      # a window and its last target
        train_text, val_text = split_text(text, val_fraction)
        assert corpus.train_text == train_text and corpus.val_ids.tolist() == corpus.tokenizer.encode(val_text)
    else:
        assert corpus.train_text == text


words = st.lists(st.sampled_from("a king, who gave his salt away; the ferryman\nwaited".split(" ")), min_size=2)


@pytest.mark.parametrize("kind", ["word", "story"])
@given(text=words.map(" ".join), val_fraction=st.floats(0, 0.99), context_length=st.integers(1, 12))
def test_a_corpus_has_a_validation_split_if_that_fills_a_window(kind, text, val_fraction, context_length):
    corpus = corpus_from_text(text, kind, val_fraction, context_length, vocab_size=260)
    check_corpus(corpus, text, val_fraction, context_length)
    if kind == "word":
        assert corpus.tokenizer.ids[UNKNOWN] not in corpus.train_ids


def test_there_is_no_validation_split_exactly_if_it_would_not_fill_a_window_and_its_targets():
    val_ids = corpus_from_text(TEXT, "word", 0.2, 1).val_ids
    for context_length, kept in [(len(val_ids) - 1, len(val_ids)), (len(val_ids), 0)]:
        assert len(corpus_from_text(TEXT, "word", 0.2, context_length).val_ids) == kept


def test_without_a_validation_split_the_words_at_the_end_are_learned_too():
    """The tokenizer is made again, from the whole text."""
    story = "Once there was a king who gave his whole kingdom away for love of one unforgettable ferrywoman."
    assert "ferrywoman" in split_text(story, 0.1)[1] and "ferrywoman" not in split_text(story, 0.1)[0]
    corpus = corpus_from_text(story, "word", 0.1, 32)
    assert len(corpus.val_ids) == 0 and corpus.train_text == story
    assert corpus.tokenizer.ids[UNKNOWN] not in corpus.train_ids
    assert corpus.tokenizer.decode(corpus.train_ids[:-1].tolist()) == story
    ends_oddly = TEXT + "ferrywoman ferrywoman ferrywoman"
    corpus = corpus_from_text(ends_oddly, "story", 0.05, 32, vocab_size=600)
    assert len(corpus.val_ids) == 0 and corpus.tokenizer.tokens == train_bpe_fast(ends_oddly, 600)


def test_words_that_only_the_validation_split_has_stay_unknown():
    corpus = corpus_from_text(TEXT, "word", 0.2, 4)
    assert corpus.tokenizer.ids[UNKNOWN] not in corpus.train_ids and corpus.tokenizer.ids[UNKNOWN] in corpus.val_ids


def test_with_gpt2s_merges_the_validation_split_is_encoded_as_gpt2_does(gpt2):
    corpus = corpus_from_text(TEXT, "gpt2", 0.2, 4)
    check_corpus(corpus, TEXT, 0.2, 4)
    _, val_text = split_text(TEXT, 0.2)
    assert [corpus.tokenizer.tokens[i] for i in corpus.val_ids.tolist()] == [
        gpt2.decode_single_token_bytes(i) for i in gpt2.encode_ordinary(val_text)]
    full = corpus_from_text(TEXT, "gpt2", 0.2, 4, full_vocab=True)
    assert full.val_ids.tolist() == gpt2.encode_ordinary(val_text) and full.fingerprint == corpus.fingerprint


FIVE_WORDS = "Once there was a king"
STRANGE = [FIVE_WORDS, FIVE_WORDS + ".", "a b", "a", "ha " * 300, "😀\u200d👩 e\u0301 " * 60, "One.\n\nTwo.\n\nThree.\n",
           "天地玄黄宇宙洪荒日月盈昃辰宿列張寒来暑往" * 20, "—" * 100, "a" * 100, "<|endoftext|> <|unk|>" * 9, *SCRIPTS.values()]


@pytest.mark.parametrize("kind", ["word", "story"])
@pytest.mark.parametrize("text", STRANGE, ids=lambda text: text[:12])
def test_short_and_strange_texts_and_every_script_make_a_corpus(text, kind):
    for val_fraction in (0.0, 0.1, 0.5):
        check_corpus(corpus_from_text(text, kind, val_fraction, 16, vocab_size=300), text, val_fraction, 16)


def test_a_tokenizer_that_is_given_is_used_as_it_is():
    """A saved run brings its own. It must not learn the words of another text, even if there is no validation split."""
    given = corpus_from_text("the king and the ferryman", "word", 0.0).tokenizer
    for context_length, kept in [(4, True), (1000, False)]:
        corpus = corpus_from_text(TEXT, given, 0.2, context_length)
        assert corpus.tokenizer is given and (len(corpus.val_ids) > 0) == kept
        assert corpus.train_ids.tolist() == [*given.encode(corpus.train_text), given.end_of_text]


@pytest.mark.parametrize("val_fraction", [1, 1.5, 10, -0.1])
def test_a_validation_fraction_that_leaves_nothing_to_train_on_is_refused(val_fraction):
    with pytest.raises(StoryError, match="val_fraction"):
        corpus_from_text(TEXT, "word", val_fraction, 4)


# fingerprints

def fingerprint(train_text, val_text, tokenizer=corpus_from_text("a", "word").tokenizer):
    """The fingerprint of a text that is split just there."""
    with mock.patch.object(story_llm, "split_text", lambda text, val_fraction: (train_text, val_text)):
        return corpus_from_text(train_text + val_text, tokenizer, context_length=0).fingerprint


@given(st.lists(st.tuples(some_text, some_text), min_size=2, max_size=2))
def test_two_fingerprints_are_equal_exactly_if_the_texts_and_their_splits_are(pairs):
    one, other = pairs
    assert (fingerprint(*one) == fingerprint(*other)) == (one == other)


@given(some_text, st.data())
def test_the_same_text_split_elsewhere_has_another_fingerprint(text, data):
    cuts = [data.draw(st.integers(0, len(text))) for _ in range(2)]
    one, other = [fingerprint(text[:cut], text[cut:]) for cut in cuts]
    assert (one == other) == (cuts[0] == cuts[1])


def test_a_fingerprint_depends_on_the_text_and_its_split_and_not_on_the_tokenizer():
    prints = {(kind, share): corpus_from_text(TEXT, kind, share, 4, vocab_size=300).fingerprint
              for kind in ("word", "story") for share in (0.0, 0.1, 0.3)}
    for share in (0.0, 0.1, 0.3):
        assert prints["word", share] == prints["story", share]
    assert len(set(prints.values())) == 3
    changed = TEXT.replace("old", "odd")
    assert corpus_from_text(changed, "word", 0.1, 4).fingerprint != prints["word", 0.1]


def test_a_number_at_the_start_of_a_text_is_not_mistaken_for_the_length_of_the_training_split():
    """That split has 1 or 11 characters. The length with the text right behind it is "11abcdefghijk" in both cases."""
    assert fingerprint("1", "abcdefghijk") != fingerprint("abcdefghijk", "")
