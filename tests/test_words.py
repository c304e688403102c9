import os
import re

import pytest
from hypothesis import given, strategies as st

from conftest import STORY, TEXT, some_text
from story_llm import JOIN, WordTokenizer, build_vocabulary, join_words, load_text, split_text, split_words


@pytest.mark.parametrize("content", [b"\xef\xbb\xbfOne.\nTwo.\n", b"One.\r\nTwo.\r\n", b"One.\rTwo.\r",
                                     b"One.\nTwo.\n"])
def test_byte_order_mark_and_line_ends_make_no_difference(tmp_path, content):
    (tmp_path / "story.txt").write_bytes(content)
    assert load_text(tmp_path / "story.txt") == "One.\nTwo.\n"


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
def test_another_encoding_is_refused_with_the_byte_and_a_remedy(tmp_path, start):
    content = start + "Die Königin".encode("latin-1")
    (tmp_path / "story.txt").write_bytes(content)
    with pytest.raises(ValueError, match="iconv") as refusal:
        load_text(tmp_path / "story.txt")
    place, value = re.search(r"byte (\d+) is 0x(\w\w)", str(refusal.value)).groups()
    assert content[int(place)] == int(value, 16) == ord("ö")


@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf", b" \r\n\t \xc2\xa0"])
def test_a_text_of_nothing_is_refused(tmp_path, content):
    (tmp_path / "story.txt").write_bytes(content)
    with pytest.raises(ValueError, match="empty"):
        load_text(tmp_path / "story.txt")


def test_a_missing_file_a_folder_and_a_pipe_are_refused_by_name(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "missing.txt", tmp_path, tmp_path / "pipe"):
        with pytest.raises((OSError, ValueError), match=re.escape(str(path))):
            load_text(path)


@given(some_text, st.floats(0, 1, exclude_max=True))
def test_the_two_parts_of_a_text_are_the_text_and_no_word_is_cut_but_a_very_long_one(text, fraction):
    train_text, val_text = split_text(text, fraction)
    assert train_text + val_text == text
    if train_text and val_text and not train_text[-1].isspace() and not val_text[0].isspace():
        assert not any(character.isspace() for character in train_text[1:][-50:])
    assert fraction or not val_text


@pytest.mark.parametrize("title", ["", "A title\n"])
def test_a_text_in_a_script_without_spaces_is_not_all_kept_for_validation(title):
    train_text, val_text = split_text(title + "天地玄黄宇宙洪荒" * 500, 0.1)
    assert len(train_text) > 3000 and len(val_text) > 300


def test_the_validation_part_is_about_as_large_as_asked_for():
    assert len(TEXT) * 0.2 <= len(split_text(TEXT, 0.2)[1]) <= len(TEXT) * 0.2 + 12


@given(some_text)
def test_joining_the_pieces_of_a_text_gives_it_back(text):
    assert join_words(split_words(text)) == text


def test_words_and_marks_are_pieces_and_usual_spaces_are_not():
    assert split_words("Yes, said the king's son (twice)...") == [
        "Yes", ",", "said", "the", "king's", "son", "(", "twice", ")", ".", ".", "."]


def test_the_example_of_step_2_is_true():
    assert split_words("Yes, said the king.") == ["Yes", ",", "said", "the", "king", "."]
    assert split_words("a\n\nb  c-d") == ["a", "\n\n", "b", "  ", "c", "-", "d"]
    assert split_words("so(on") == ["so", JOIN, "(", "on"]


def test_the_vocabulary_is_every_different_piece_once_sorted_with_the_special_ones_last():
    words = {"The", "king", "gave", "the", "away", ".", ",", "kingdom"}
    *ordinary, _, _, _ = vocabulary = build_vocabulary("The king gave the kingdom away, away the kingdom.")
    assert set(ordinary) == words and ordinary == sorted(words)
    assert {"<|unk|>", "<|endoftext|>"} < set(vocabulary[-3:])


@given(some_text)
def test_the_text_that_the_vocabulary_comes_from_is_given_back(text):
    tokenizer = WordTokenizer(build_vocabulary(text))
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.end_of_text not in ids and tokenizer.ids["<|unk|>"] not in ids


@given(some_text)
def test_any_other_text_can_be_encoded_and_decoded_too(text):
    tokenizer = WordTokenizer(build_vocabulary(TEXT))
    ids = tokenizer.encode(text)
    assert tokenizer.encode(tokenizer.decode(ids)) is not None and tokenizer.end_of_text not in ids


def test_an_unknown_word_becomes_unk_and_the_words_around_it_survive():
    tokenizer = WordTokenizer(build_vocabulary(TEXT))
    assert tokenizer.decode(tokenizer.encode("the ferryman bought a laptop.")) == "the ferryman <|unk|> a <|unk|>."


def test_a_word_vocabulary_with_a_double_or_without_the_special_entries_is_refused():
    for vocabulary in (["a", "b"], ["a", *build_vocabulary("a")]):
        with pytest.raises(ValueError):
            WordTokenizer(vocabulary)


@pytest.mark.skipif(not STORY.exists(), reason="the story stands elsewhere")
def test_the_story_holds_the_promised_line_before_its_last_tenth():
    story = load_text(STORY)
    promised = ("Once Aadhan renounced his kingdom for the love of Thamarai, its people living in fear and oppression. "
                "Aadhan knew he had to act swiftly to overthrow his brother's oppressive regime.")
    assert story.count(promised) == 1 and promised in split_text(story, 0.1)[0]
    assert 20_000 <= os.path.getsize(STORY) <= 25_600
    paragraphs = [p for p in re.split(r"\n\s*\n", story) if len(p) > 40]
    assert len(paragraphs) == len(set(paragraphs))
