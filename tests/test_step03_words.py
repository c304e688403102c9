"""Step 3: the word tokenizer."""
import pytest
from hypothesis import given

from helpers import TEXT, some_text
from scripts import SCRIPTS
from story_llm import (END_OF_TEXT, UNKNOWN, StoryError, WordTokenizer, build_vocabulary, recall_tests,
                       restore_tokenizer, split_words)

OF_TEXT = WordTokenizer(build_vocabulary(TEXT))


def special_ids(tokenizer):
    return {tokenizer.ids[END_OF_TEXT], tokenizer.ids[UNKNOWN]}


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
    assert special_ids(tokenizer).isdisjoint(ids)


@given(some_text)
def test_any_other_text_has_a_token_for_each_piece_which_is_the_piece_or_unknown(text):
    """It may also be the piece with a space before it, because the story may have the first word of a prompt only after
    a space."""
    ids, pieces = OF_TEXT.encode(text), split_words(text)
    assert len(ids) == len(pieces) and OF_TEXT.ids[END_OF_TEXT] not in ids
    for token_id, piece in zip(ids, pieces):
        known = [known for known in (piece, " " + piece) if known in OF_TEXT.tokens]
        assert OF_TEXT.decode([token_id]) == (known[0] if known else UNKNOWN)


def test_an_unknown_word_becomes_unk_and_the_words_around_it_are_kept():
    assert OF_TEXT.decode(OF_TEXT.encode("At night the ferryman bought a laptop.")) == (
        "At night the ferryman<|unk|> a<|unk|>.")


def test_a_word_at_the_start_of_a_prompt_is_the_one_that_came_after_a_space():
    assert " ferryman" in OF_TEXT.tokens and "ferryman" not in OF_TEXT.tokens
    assert OF_TEXT.encode("ferryman tied") == OF_TEXT.encode(" ferryman tied")
    both = WordTokenizer(build_vocabulary("king and king"))
    assert both.encode("king") != both.encode(" king")      # if the story has both, they are different tokens


@pytest.mark.parametrize("text", [END_OF_TEXT, UNKNOWN, "a <|endoftext|> b <|unk|>", "<|endoftext|><|unk|>" * 3])
def test_special_tokens_in_a_text_are_encoded_like_any_other_characters(text):
    tokenizer = WordTokenizer(build_vocabulary(text))
    assert special_ids(tokenizer).isdisjoint(tokenizer.encode(text))
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.tokens.count(END_OF_TEXT) == tokenizer.tokens.count(UNKNOWN) == 1
    assert OF_TEXT.ids[END_OF_TEXT] not in OF_TEXT.encode(text)


def test_special_tokens_are_decoded_as_they_are_written():
    assert OF_TEXT.decode([OF_TEXT.ids[END_OF_TEXT], OF_TEXT.ids[UNKNOWN]]) == END_OF_TEXT + UNKNOWN
    assert OF_TEXT.decode([]) == "" and OF_TEXT.encode("") == []


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_is_given_back_and_the_beginnings_of_its_sentences_are_known(name):
    text = SCRIPTS[name]
    tokenizer = WordTokenizer(build_vocabulary(text))
    assert tokenizer.decode(tokenizer.encode(text)) == text
    for prompt, _ in recall_tests(text):
        ids = tokenizer.encode(prompt)
        assert tokenizer.ids[UNKNOWN] not in ids and tokenizer.decode(ids).strip() == prompt.strip()


def test_a_saved_vocabulary_makes_the_same_tokenizer_again_and_a_damaged_one_is_refused():
    """With a duplicate, with another type, or without the special tokens."""
    again = restore_tokenizer(OF_TEXT.kind, OF_TEXT.tokens)
    assert type(again) is WordTokenizer and again.kind == "word" and again.tokens == OF_TEXT.tokens
    assert again.encode(TEXT) == OF_TEXT.encode(TEXT)
    for tokens in (["a", "b"], ["a", UNKNOWN], ["a", END_OF_TEXT], ["a", *build_vocabulary("a")],
                   [b"a", END_OF_TEXT, UNKNOWN], [1, END_OF_TEXT, UNKNOWN], []):
        with pytest.raises(StoryError, match="tokenizer"):
            restore_tokenizer("word", tokens)
