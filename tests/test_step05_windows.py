"""Step 5: sliding windows, and the corpus from which they and the prompt windows are cut."""
import pytest
import torch
from hypothesis import given, strategies as st

from helpers import STORY, TEXT, some_text
from scripts import SCRIPTS
from story_llm import (BPETokenizer, SlidingWindowDataset, StoryError, TrainConfig, UNKNOWN, corpus_from_text,
                       fingerprint, gpt2_tokens, load_text, prompt_window, split_text)

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


@pytest.mark.parametrize("n, length", [(4, 4), (1, 1), (0, 1), (3, 32)])
def test_too_few_tokens_for_a_window_and_its_targets_are_refused_with_both_numbers(n, length):
    with pytest.raises(StoryError, match=rf"{n} tokens.*\b{length} tokens"):
        SlidingWindowDataset(torch.arange(n), length)
    assert len(SlidingWindowDataset(torch.arange(length + 1), length)) == 1


# the corpus

def corpus_of(text, tokenizer="word", val_fraction=0.0, vocab_size=300):
    return corpus_from_text(text, tokenizer, TrainConfig(val_fraction=val_fraction), vocab_size)


def check_corpus(corpus, text, val_fraction):
    """What must be true of every corpus."""
    assert corpus.text == text
    assert corpus.train_ids.dtype == corpus.val_ids.dtype == torch.long
    *token_ids, last = corpus.train_ids.tolist()
    assert corpus.tokenizer.decode(token_ids) == corpus.train_text
    assert last == corpus.tokenizer.end_of_text and corpus.tokenizer.decode([last]) == "<|endoftext|>"
    assert last not in token_ids and last not in corpus.val_ids
    train_text, val_text = split_text(text, TrainConfig(val_fraction=val_fraction))
    assert corpus.train_text == train_text and corpus.val_ids.tolist() == corpus.tokenizer.encode(val_text)
    if corpus.tokenizer.kind == "word":
        assert corpus.tokenizer.ids[UNKNOWN] not in corpus.train_ids


FIVE_WORDS = "Once there was a king"
STRANGE = [FIVE_WORDS, FIVE_WORDS + ".", "a b", "a", "ha " * 300, "😀\u200d👩 e\u0301 " * 60, "One.\n\nTwo.\n\nThree.\n",
           "天地玄黄宇宙洪荒日月盈昃辰宿列張寒来暑往" * 20, "—" * 400, "a" * 400, "<|endoftext|> <|unk|>" * 29, *SCRIPTS.values()]


@pytest.mark.parametrize("kind", ["word", "story"])
@pytest.mark.parametrize("text", STRANGE, ids=lambda text: text[:12])
def test_short_and_strange_texts_and_every_script_make_a_corpus_in_which_special_tokens_are_plain_letters(text, kind):
    for val_fraction in (0.0, 0.1, 0.5):
        check_corpus(corpus_of(text, kind, val_fraction), text, val_fraction)


def test_words_that_only_the_validation_split_has_stay_unknown():
    corpus = corpus_of(TEXT, "word", 0.3)
    assert corpus.tokenizer.ids[UNKNOWN] in corpus.val_ids


def test_with_gpt2s_merges_the_validation_split_is_encoded_as_gpt2_does(gpt2):
    corpus = corpus_of(TEXT, "gpt2", 0.3)
    check_corpus(corpus, TEXT, 0.3)
    _, val_text = split_text(TEXT, TrainConfig(val_fraction=0.3))
    assert [corpus.tokenizer.tokens[i] for i in corpus.val_ids.tolist()] == [
        gpt2.decode_single_token_bytes(i) for i in gpt2.encode_ordinary(val_text)]
    full = corpus_of(TEXT, BPETokenizer(gpt2_tokens(), "gpt2"), 0.3)
    assert full.val_ids.tolist() == gpt2.encode_ordinary(val_text) and full.fingerprint == corpus.fingerprint


def test_a_tokenizer_that_is_given_is_used_as_it_is():
    """A saved run brings its own. It must not learn the words of another text, even if there is no validation split."""
    given = corpus_of("the king and the ferryman").tokenizer
    for val_fraction in (0.0, 0.3):
        corpus = corpus_of(TEXT, given, val_fraction)
        assert corpus.tokenizer is given and (len(corpus.val_ids) > 0) == (val_fraction > 0)
        assert corpus.train_ids.tolist() == [*given.encode(corpus.train_text), given.end_of_text]


def test_the_path_of_a_file_in_place_of_a_text_is_refused(tmp_path, monkeypatch):
    """It would be trained on without a word."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.txt").write_text(TEXT)
    for path in ("my.txt", str(tmp_path / "my.txt"), str(STORY)):
        with pytest.raises(StoryError, match="load_text") as refusal:
            corpus_of(path)
        assert path in str(refusal.value)
        assert corpus_of(load_text(path)).train_text == load_text(path)
    assert corpus_of("your.txt").train_text == "your.txt"


@given(st.lists(st.tuples(some_text, some_text), min_size=2, max_size=2), st.data())
def test_two_fingerprints_are_equal_exactly_if_the_texts_and_their_splits_are(pairs, data):
    one, other = pairs
    assert (fingerprint(*one) == fingerprint(*other)) == (one == other)
    text = "".join(one)
    cut = data.draw(st.integers(0, len(text)))
    assert (fingerprint(text[:cut], text[cut:]) == fingerprint(*one)) == (cut == len(one[0]))


def test_a_number_at_the_start_of_a_text_is_not_mistaken_for_the_length_of_the_training_split():
    """That split has 1 or 11 characters. The length with the text right behind it is "11abcdefghijk" in both cases."""
    assert fingerprint("1", "abcdefghijk") != fingerprint("abcdefghijk", "")


def test_a_fingerprint_depends_on_the_text_and_its_split_and_not_on_the_tokenizer():
    prints = {(kind, share): corpus_of(TEXT, kind, share).fingerprint for kind in ("word", "story")
              for share in (0.0, 0.2, 0.3)}
    assert all(prints["word", share] == prints["story", share] for share in (0.0, 0.2, 0.3))
    assert len(set(prints.values())) == 3
    assert corpus_of(TEXT.replace("old", "odd"), "word", 0.2).fingerprint != prints["word", 0.2]


# prompt windows

LONG = {"words of 33 letters": " ".join("abcdefghijklmnopqrstuvwxyz012345" + letter for letter in "abcdefgh" * 30),
        "long runs of spaces": (" " * 200).join("abcdefgh" * 6), "long rules": f"\n{'-' * 300}\n".join("abcdefgh" * 6),
        "a word of 2,000 letters": "Taumata" * 300 + " is a hill. " + TEXT, "ordinary words": TEXT, **SCRIPTS}


@pytest.mark.parametrize("kind", ["word", "story", "gpt2"])
@pytest.mark.parametrize("name", LONG)
def test_a_prompt_window_has_the_tokens_of_the_whole_rest_of_the_text_however_long_its_words_are(name, kind, request):
    """Then the end of the text, then padding. No word is cut, so with the word tokenizer no word is unknown."""
    if kind == "gpt2":
        request.getfixturevalue("gpt2")
    corpus = corpus_of(LONG[name], kind, vocab_size=270)
    tokenizer, text = corpus.tokenizer, corpus.train_text
    for start in [*range(0, len(text), 1 + len(text) // 40), *range(len(text) - 3, len(text))]:
        rest = [*tokenizer.encode(text[start:]), tokenizer.end_of_text]
        for T in (1, 4, 31):
            assert prompt_window(corpus, start, T) == (rest + [-100] * T)[:T + 1]
