"""Step 5: sliding windows, and the corpus that they are cut from."""
import pytest
import torch
from hypothesis import given, strategies as st

from helpers import TEXT, some_text
from scripts import SCRIPTS
from story_llm import SlidingWindowDataset, UNKNOWN, corpus_from_text, encode_corpus, learn_byte_pairs, split_text

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


def test_windows_are_views_of_the_one_tensor():
    token_ids = torch.arange(30)
    dataset = SlidingWindowDataset(token_ids, 4, 3)
    for i in range(len(dataset)):
        inputs, targets = dataset[i]
        assert inputs.data_ptr() == token_ids.data_ptr() + i * 3 * token_ids.element_size()
        assert targets.data_ptr() == inputs.data_ptr() + token_ids.element_size()


def test_an_index_tensor_gives_a_batch():
    dataset = SlidingWindowDataset(torch.arange(30), 4, 3)
    inputs, targets = dataset[torch.tensor([2, 0, 5])]
    assert inputs.tolist() == [[6, 7, 8, 9], [0, 1, 2, 3], [15, 16, 17, 18]] and torch.equal(targets, inputs + 1)


def test_a_data_loader_can_read_it():
    loader = torch.utils.data.DataLoader(SlidingWindowDataset(torch.arange(9), 4, 2), batch_size=3)
    (inputs, targets), = loader
    assert inputs.tolist() == [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 7]] and torch.equal(targets, inputs + 1)


@pytest.mark.parametrize("n, length, stride", [(4, 4, 1), (0, 1, 1), (9, 0, 1), (9, 4, 0), (9, -1, 1), (9, 4, -2)])
def test_too_few_tokens_and_senseless_sizes_are_refused(n, length, stride):
    with pytest.raises(ValueError):
        SlidingWindowDataset(torch.arange(n), length, stride)


# the corpus

def check_corpus(corpus, text, val_fraction, context_length):
    """What must be true of every corpus."""
    assert corpus.train_ids.dtype == corpus.val_ids.dtype == torch.long
    assert corpus.tokenizer.decode(corpus.train_ids.tolist()) == corpus.train_text
    if len(corpus.val_ids):
        assert len(corpus.val_ids) > context_length      # a window, and its last target
        train_text, val_text = split_text(text, val_fraction)
        assert corpus.train_text == train_text and corpus.val_ids.tolist() == corpus.tokenizer.encode(val_text)
    else:
        assert corpus.train_text == text


words = st.lists(st.sampled_from("a king, who gave his salt away; the ferryman\nwaited".split(" ")), min_size=2)


@pytest.mark.parametrize("kind", ["word", "story"])
@given(text=words.map(" ".join), val_fraction=st.floats(0, 0.99), context_length=st.integers(1, 12))
def test_a_corpus_is_the_training_text_in_ids_and_the_rest_if_that_fills_a_window(kind, text, val_fraction,
                                                                                  context_length):
    corpus = corpus_from_text(text, kind, val_fraction, context_length, vocab_size=260)
    check_corpus(corpus, text, val_fraction, context_length)
    if kind == "word":
        assert corpus.tokenizer.ids[UNKNOWN] not in corpus.train_ids


def test_validation_is_given_up_exactly_if_it_does_not_fill_a_window_and_its_targets():
    val_ids = corpus_from_text(TEXT, "word", 0.2, 1).val_ids
    for context_length, kept in [(len(val_ids) - 1, len(val_ids)), (len(val_ids), 0)]:
        assert len(corpus_from_text(TEXT, "word", 0.2, context_length).val_ids) == kept


def test_where_validation_is_given_up_the_words_of_the_end_are_learned_too():
    """The tokenizer is made again, of all that is trained on."""
    story = "Once there was a king who gave his whole kingdom away for love of one unforgettable ferrywoman."
    assert "ferrywoman" in split_text(story, 0.1)[1] and "ferrywoman" not in split_text(story, 0.1)[0]
    corpus = corpus_from_text(story, "word", 0.1, 32)
    assert len(corpus.val_ids) == 0 and corpus.train_text == story
    assert corpus.tokenizer.ids[UNKNOWN] not in corpus.train_ids
    assert corpus.tokenizer.decode(corpus.train_ids.tolist()) == story
    ends_oddly = TEXT + "ferrywoman ferrywoman ferrywoman"
    byte_pairs = corpus_from_text(ends_oddly, "story", 0.05, 32, vocab_size=600)
    assert len(byte_pairs.val_ids) == 0 and byte_pairs.tokenizer.tokens == learn_byte_pairs(ends_oddly, 600)


def test_where_validation_is_kept_its_words_stay_unknown():
    corpus = corpus_from_text(TEXT, "word", 0.2, 4)
    assert corpus.tokenizer.ids[UNKNOWN] not in corpus.train_ids and corpus.tokenizer.ids[UNKNOWN] in corpus.val_ids


def test_with_gpt2s_encoding_the_validation_text_is_encoded_as_gpt2_does(gpt2):
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


@pytest.mark.parametrize("val_fraction", [1, 1.5, 10, -0.1])
def test_a_share_for_validation_that_leaves_nothing_to_train_on_is_refused(val_fraction):
    with pytest.raises(ValueError, match="val_fraction"):
        corpus_from_text(TEXT, "word", val_fraction, 4)


# fingerprints

def fingerprint(train_text, val_text, tokenizer=corpus_from_text("a", "word").tokenizer):
    return encode_corpus(tokenizer, train_text, val_text).fingerprint


@given(st.lists(st.tuples(some_text, some_text), min_size=2, max_size=2))
def test_two_fingerprints_are_alike_exactly_if_the_texts_and_their_splits_are(pairs):
    one, other = pairs
    assert (fingerprint(*one) == fingerprint(*other)) == (one == other)


@given(some_text, st.data())
def test_the_same_text_split_at_another_place_has_another_fingerprint(text, data):
    cuts = [data.draw(st.integers(0, len(text))) for _ in range(2)]
    one, other = [fingerprint(text[:cut], text[cut:]) for cut in cuts]
    assert (one == other) == (cuts[0] == cuts[1])


def test_a_fingerprint_is_of_the_text_and_its_split_and_not_of_the_tokenizer():
    prints = {(kind, share): corpus_from_text(TEXT, kind, share, 4, vocab_size=300).fingerprint
              for kind in ("word", "story") for share in (0.0, 0.1, 0.3)}
    for share in (0.0, 0.1, 0.3):
        assert prints["word", share] == prints["story", share]
    assert len(set(prints.values())) == 3
    changed = TEXT.replace("old", "odd")
    assert corpus_from_text(changed, "word", 0.1, 4).fingerprint != prints["word", 0.1]


def test_a_number_in_front_of_a_text_does_not_pass_for_the_place_of_its_split():
    """Part 1 is 1 or 11 characters long: both are "11abcdefghijk", if lengths and texts are just put in a row."""
    assert fingerprint("1", "abcdefghijk") != fingerprint("abcdefghijk", "")
