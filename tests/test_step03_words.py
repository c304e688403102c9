"""Step 3: a tokenizer of words."""
import pytest
from hypothesis import given

from helpers import TEXT, some_text
from scripts import SCRIPTS
from story_llm import (END_OF_TEXT, UNKNOWN, WordTokenizer, build_vocabulary, recall_exercises, split_words,
                       tokenizer_from)

OF_TEXT = WordTokenizer(build_vocabulary(TEXT))


def test_the_vocabulary_is_every_different_piece_once_sorted_with_the_special_ones_last():
    words = {"The", " king", " gave", " the", " away", ".", ",", " kingdom"}
    *ordinary, end_of_text, unknown = build_vocabulary("The king gave the kingdom away, away the kingdom.")
    assert set(ordinary) == words and ordinary == sorted(words)
    assert (end_of_text, unknown) == ("<|endoftext|>", "<|unk|>")


@given(some_text)
def test_the_text_that_the_vocabulary_comes_from_is_given_back(text):
    tokenizer = WordTokenizer(build_vocabulary(text))
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and len(ids) == len(split_words(text))
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.end_of_text not in ids and tokenizer.ids[UNKNOWN] not in ids


@given(some_text)
def test_any_other_text_has_a_token_for_each_piece_which_is_the_piece_or_unknown(text):
    """Or the piece with a space before it, for a prompt begins with a word that stood behind a space in the story."""
    ids, pieces = OF_TEXT.encode(text), split_words(text)
    assert len(ids) == len(pieces) and OF_TEXT.end_of_text not in ids
    for token_id, piece in zip(ids, pieces):
        known = [known for known in (piece, " " + piece) if known in OF_TEXT.tokens]
        assert OF_TEXT.decode([token_id]) == (known[0] if known else UNKNOWN)


def test_an_unknown_word_becomes_unk_and_the_words_around_it_survive():
    assert OF_TEXT.decode(OF_TEXT.encode("At night the ferryman bought a laptop.")) == (
        "At night the ferryman<|unk|> a<|unk|>.")


def test_a_word_at_the_start_of_a_prompt_is_the_one_that_stood_behind_a_space():
    assert " ferryman" in OF_TEXT.tokens and "ferryman" not in OF_TEXT.tokens
    assert OF_TEXT.encode("ferryman tied") == OF_TEXT.encode(" ferryman tied")
    both = WordTokenizer(build_vocabulary("king and king"))
    assert both.encode("king") != both.encode(" king")      # but one that can tell them apart does


@pytest.mark.parametrize("text", [END_OF_TEXT, UNKNOWN, "a <|endoftext|> b <|unk|>", "<|endoftext|><|unk|>" * 3])
def test_a_text_in_which_the_special_tokens_stand_makes_none_of_them(text):
    tokenizer = WordTokenizer(build_vocabulary(text))
    assert {tokenizer.end_of_text, tokenizer.ids[UNKNOWN]}.isdisjoint(tokenizer.encode(text))
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.tokens.count(END_OF_TEXT) == tokenizer.tokens.count(UNKNOWN) == 1
    assert OF_TEXT.end_of_text not in OF_TEXT.encode(text)


def test_special_tokens_are_decoded_as_they_are_written():
    assert OF_TEXT.decode([OF_TEXT.end_of_text, OF_TEXT.ids[UNKNOWN]]) == END_OF_TEXT + UNKNOWN
    assert OF_TEXT.decode([]) == "" and OF_TEXT.encode("") == []


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_is_given_back_and_the_beginnings_of_its_sentences_are_known(name):
    text = SCRIPTS[name]
    tokenizer = WordTokenizer(build_vocabulary(text))
    assert tokenizer.decode(tokenizer.encode(text)) == text
    for prompt, _ in recall_exercises(text):
        ids = tokenizer.encode(prompt)
        assert tokenizer.ids[UNKNOWN] not in ids and tokenizer.decode(ids).strip() == prompt.strip()


@pytest.mark.parametrize("tokens", [["a", "b"], ["a", UNKNOWN], ["a", END_OF_TEXT], ["a", *build_vocabulary("a")]])
def test_a_saved_vocabulary_with_a_double_or_without_the_special_tokens_is_refused(tokens):
    assert tokenizer_from({"kind": "word", "tokens": build_vocabulary("a")}).tokens == ["a", END_OF_TEXT, UNKNOWN]
    with pytest.raises(ValueError, match="tokenizer"):
        tokenizer_from({"kind": "word", "tokens": tokens})
