"""Step 2: a text is loaded, split in two and cut into words, in any script, and its sentences are found."""
import contextlib
import gzip
import io
import itertools
import os
import re
import signal
import sys
import textwrap
import threading
import unicodedata
import zipfile

import pytest
from hypothesis import given, strategies as st

from helpers import STORY, TEXT, some_text
from scripts import ARABIC, BETWEEN, CHINESE, JAPANESE, SCRIPTS, SENTENCES, SPACED, THAI, UNSPACED
from story_llm import (FILE_TYPES, StoryError, decode, find_words, first_words, load_text, recall_tests,
                       sentence_starts, split_text, split_words, word_starts)


def is_mark(character):
    return unicodedata.category(character).startswith("M")


def is_punctuation(character):
    return unicodedata.category(character).startswith("P")


def is_space(character):
    """Whether a character is white space in Unicode. Python's isspace includes four control characters as well."""
    return character.isspace() and character not in "\x1c\x1d\x1e\x1f"


def with_their_marks(text):
    """The characters of a text, each with the marks that follow it."""
    characters = []
    for character in text:
        if characters and is_mark(character):
            characters[-1] += character
        else:
            characters.append(character)
    return characters


def bare_words(text):
    """The words of a text that has spaces, without the punctuation around them."""
    words = []
    for word in text.split():
        while is_punctuation(word[0]):
            word = word[1:]
        while is_punctuation(word[-1]):
            word = word[:-1]
        words.append(word)
    return words


@contextlib.contextmanager
def at_most(seconds):
    """Fail a test that has not finished after so many seconds, instead of waiting for ever."""
    def give_up(number, frame):
        raise AssertionError(f"not finished after {seconds} seconds")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# loading

@pytest.mark.parametrize("content", [b"\xef\xbb\xbfOne.\nTwo.\n", b"One.\r\nTwo.\r\n", b"One.\rTwo.\r",
                                     b"One.\nTwo.\n"])
def test_byte_order_mark_and_line_ends_make_no_difference(tmp_path, content):
    (tmp_path / "story.txt").write_bytes(content)
    assert load_text(tmp_path / "story.txt") == "One.\nTwo.\n"


FIVE_SCRIPTS = {"english": TEXT, "russian": "Старый паромщик привязал лодку к столбу и ждал.\n\nДождь всё шёл.",
                **{name: SCRIPTS[name] for name in ("hindi", "arabic", "chinese")}}


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["without a mark", "with a mark"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("name", FIVE_SCRIPTS)
def test_every_unicode_encoding_is_recognized(tmp_path, name, encoding, mark):
    text = FIVE_SCRIPTS[name]
    (tmp_path / "story.txt").write_bytes((mark + text).encode(encoding))
    assert load_text(tmp_path / "story.txt") == load_text(tmp_path / "story.txt", encoding) == text


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("text", ["Hi", "Donaudampfschifffahrtsgesellschaft", "x = 1\r\n", "“Yes” — café"])
def test_a_short_text_without_spaces_in_another_unicode_encoding_is_recognized_too(encoding, text):
    assert decode(text.encode(encoding), "story.txt") == text


@pytest.mark.parametrize("text", ["The king and the ferryman\0.", "\0a lamp", "a\0b c", TEXT + "\0"])
def test_a_zero_in_a_text_is_a_character_like_any_other(text):
    assert decode(text.encode(), "story.txt") == text


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf", b"One.\nTwo.\n\n"])
def test_one_wrong_byte_is_refused_with_its_line_its_value_and_the_remedies(tmp_path, start):
    (tmp_path / "story.txt").write_bytes(start + "Die Königin von Saba\n".encode("latin-1") + b"weint.")
    with pytest.raises(StoryError, match=r"story\.txt is not in UTF-8") as refusal:
        load_text(tmp_path / "story.txt")
    assert f"line {start.count(10) + 1} contains the byte 0xf6" in str(refusal.value)
    assert "--encoding cp1252" in str(refusal.value) and "--encoding utf-8" in str(refusal.value)
    beginning = start.decode("utf-8-sig")
    assert load_text(tmp_path / "story.txt", "cp1252").endswith("Die Königin von Saba\nweint.")
    assert load_text(tmp_path / "story.txt", "utf-8") == beginning + "Die K\ufffdnigin von Saba\nweint."


@pytest.mark.parametrize("encoding", ["utf-9", "klingon", "hex", "rot13", "undefined"])
def test_an_encoding_that_python_does_not_know_is_refused_by_name(tmp_path, encoding):
    (tmp_path / "story.txt").write_text(TEXT)
    with pytest.raises(StoryError, match=f"{encoding}.*try utf-8"):
        load_text(tmp_path / "story.txt", encoding)


@pytest.mark.parametrize("beginning", FILE_TYPES, ids=repr)
def test_a_file_that_is_no_text_is_named_for_what_it_is(tmp_path, beginning):
    (tmp_path / "story.txt").write_bytes(beginning + TEXT.encode())
    for encoding in ("", "utf-8", "cp1252"):
        with pytest.raises(StoryError) as refusal:
            load_text(tmp_path / "story.txt", encoding)
        assert f"story.txt is {FILE_TYPES[beginning]}" in str(refusal.value) and "UTF-8" in str(refusal.value)
        assert "\n" not in str(refusal.value)


def test_what_other_programs_write_is_recognized(tmp_path):
    """The beginnings are those of real files."""
    (tmp_path / "a.txt").write_bytes(gzip.compress(TEXT.encode()))
    with zipfile.ZipFile(tmp_path / "b.txt", "w") as document:
        document.writestr("word/document.xml", TEXT)
    for name, kind in (("a.txt", "gzip"), ("b.txt", "Word")):
        with pytest.raises(StoryError, match=kind):
            load_text(tmp_path / name)


def test_several_files_are_one_text_with_an_empty_line_between_them(tmp_path):
    names = [tmp_path / f"{name}.txt" for name in "bca"]
    for number, name in enumerate(names):
        name.write_bytes(f"This is file {number}.\r\n".encode(["utf-8", "utf-16", "utf-8-sig"][number]))
    assert load_text(names) == "This is file 0.\n\n\nThis is file 1.\n\n\nThis is file 2.\n"
    assert sentence_starts(load_text(names)) == [0, 18, 36]
    (tmp_path / "notes.md").write_text("not a story")
    assert load_text(tmp_path) == load_text([tmp_path]) == load_text(sorted(names))
    assert load_text([names[0], tmp_path]) == "\n\n".join(map(load_text, [names[0], *sorted(names)]))


def test_standard_input_is_read_as_it_is(tmp_path, monkeypatch):
    (tmp_path / "story.txt").write_text("On the disk.")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("Où est-il ?\r\n".encode("utf-16"))))
    assert load_text([tmp_path / "story.txt", "-"]) == "On the disk.\n\nOù est-il ?\n"


def test_a_folder_without_a_text_is_refused_by_name(tmp_path):
    (tmp_path / "story.md").write_text(TEXT)
    with pytest.raises(StoryError, match=f"{re.escape(str(tmp_path))} contains no .txt file"):
        load_text(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf", b" \r\n\t \xc2\xa0"])
def test_a_text_without_a_word_is_refused(tmp_path, content):
    (tmp_path / "story.txt").write_bytes(content)
    with pytest.raises(StoryError, match="empty"):
        load_text(tmp_path / "story.txt")


@pytest.mark.parametrize("name", ["missing.txt", "nowhere/story.txt", "story.txt/more.txt", "x" * 300])
def test_a_missing_file_is_refused_by_name(tmp_path, name):
    (tmp_path / "story.txt").write_text(TEXT)
    for paths in (tmp_path / name, str(tmp_path / name), [tmp_path / "story.txt", tmp_path / name]):
        with pytest.raises(StoryError, match=re.escape(str(tmp_path / name))):
            load_text(paths)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_read_to_its_end(tmp_path):
    """As in `--text <(zcat story.gz)`."""
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=(TEXT,))
    writer.start()
    with at_most(seconds=30):
        assert load_text(tmp_path / "pipe") == TEXT
    writer.join()


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_is_loaded_as_it_was_written(tmp_path, name):
    (tmp_path / "story.txt").write_text(SCRIPTS[name], encoding="utf-8")
    assert load_text(str(tmp_path / "story.txt")) == SCRIPTS[name]


# splitting in two

@given(some_text, st.floats(0, 1, exclude_max=True))
def test_the_two_splits_add_up_to_the_text_and_cut_no_word_but_a_very_long_one(text, fraction):
    train_text, val_text = split_text(text, fraction)
    assert train_text + val_text == text
    if train_text and val_text and val_text[0] not in " \n":
        assert not any(character in " \n" for character in train_text[1:][-50:])
    assert fraction or not val_text


@pytest.mark.parametrize("title", ["", "A title\n"])
def test_a_text_in_a_script_without_spaces_is_not_all_kept_for_validation(title):
    train_text, val_text = split_text(title + "天地玄黄宇宙洪荒" * 500, 0.1)
    assert len(train_text) > 3000 and len(val_text) > 300


def test_the_validation_split_is_about_as_large_as_asked_for():
    assert len(TEXT) * 0.2 <= len(split_text(TEXT, 0.2)[1]) <= len(TEXT) * 0.2 + 12


# words

@given(some_text)
def test_the_pieces_add_up_to_the_text(text):
    pieces = split_words(text)
    assert "".join(pieces) == text and "" not in pieces


@given(some_text)
def test_a_piece_is_white_space_or_something_with_at_most_one_space_before_it(text):
    for piece in split_words(text):
        assert all(map(is_space, piece)) or not any(map(is_space, piece.removeprefix(" ")))


def test_words_and_marks_are_pieces_and_the_space_goes_with_what_follows_it():
    assert split_words("Yes, said the king's son (twice)...") == [
        "Yes", ",", " said", " the", " king's", " son", " (", "twice", ")", ".", ".", "."]
    assert split_words("a\n\nb c-d so(on 3rd's_9") == ["a", "\n\n", "b", " c", "-", "d", " so", "(", "on", " 3rd's_9"]


def test_an_apostrophe_within_a_word_belongs_to_it_and_a_quote_around_it_does_not():
    assert split_words("'tis 'the king’s' o'er") == ["'", "tis", " '", "the", " king’s", "'", " o'er"]


@pytest.mark.parametrize("name", SPACED)
def test_where_spaces_separate_the_words_each_piece_is_a_whole_word(name):
    text = SPACED[name]
    assert any(is_mark(character) for character in text)
    words = [piece.strip() for piece in split_words(text) if not is_punctuation(piece.strip()[0])]
    assert words == bare_words(text)


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("name", UNSPACED)
def test_where_no_spaces_separate_the_words_each_piece_is_one_character_with_its_marks(name, form):
    text = unicodedata.normalize(form, UNSPACED[name])
    pieces = [piece.removeprefix(" ") for piece in split_words(text) if not piece.isspace()]
    assert pieces == [character for character in with_their_marks(text) if not character.isspace()]


def test_some_characters_of_thai_and_of_decomposed_japanese_have_marks():
    """Otherwise the test above would not say much."""
    for text in (THAI, unicodedata.normalize("NFD", JAPANESE)):
        assert sum(is_mark(character) for character in text) > 10


@given(st.text(st.sampled_from("aé कகா்ि\u0301\u0651سب天かが\u3099น้ั漢9’' \n")))
def test_no_mark_is_separated_from_its_letter(text):
    """Thai marks after letters of another script are left out, because they cannot occur there."""
    at = 0
    for piece in split_words(text)[:-1]:
        at += len(piece)
        before, after = text[at - 1], text[at]
        if is_mark(after) and after not in "้ั":
            assert not before.isalpha() and not is_mark(before)


def test_a_foreign_word_in_a_text_without_spaces_stays_whole():
    assert split_words("我用GPT模型2019年写故事") == [*"我用", "GPT", *"模型", "2019", *"年写故事"]


# sentences

def starts_of(sentences, between):
    """Where each sentence starts in the text that they make."""
    steps = [len(sentence) + len(between) for sentence in sentences]
    return list(itertools.accumulate(steps[:-1], initial=0))


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_sentences_of_every_script_are_found(name):
    assert sentence_starts(SCRIPTS[name]) == starts_of(SENTENCES[name], BETWEEN[name])


def word_ends(text, has_spaces):
    """Where the words of a text end: before white space, or, in a script without spaces, before every letter too."""
    def separates(character):
        return character.isspace() or not (has_spaces or is_mark(character) or is_punctuation(character))

    return [end for end in range(1, len(text) + 1)
            if not text[end - 1].isspace() and (end == len(text) or separates(text[end]))]


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_sentence_of_every_script_gives_a_recall_test_of_five_words_and_what_follows(name):
    """What follows has 80 characters and the rest of the word in which these end."""
    text, tests = SCRIPTS[name], recall_tests(SCRIPTS[name])
    assert len(tests) == len(SENTENCES[name])
    for (prompt, continuation), sentence in zip(tests, SENTENCES[name]):
        assert sentence.startswith(prompt)
        if name in SPACED:
            assert prompt.split() == sentence.split()[:5]
        else:
            letters = [c for c in prompt if not (is_mark(c) or is_punctuation(c) or c.isspace())]
            assert len(letters) == 5
        rest = text.partition(prompt)[2]
        end = min([end for end in word_ends(rest, name in SPACED) if end >= 80], default=len(rest))
        assert continuation == rest[:end]


@pytest.mark.parametrize("end", ["।", "॥", "۔", "؟", "?", "!", ".", "…", "?!", '."', "!’", ".)", "۔”"])
@pytest.mark.parametrize("space", [" ", "\n", "  ", "\n\n"])
def test_after_these_ends_and_white_space_a_sentence_starts(end, space):
    first = f"एक दो तीन{end}{space}"
    assert sentence_starts(first + "چار پانچ") == [0, len(first)]


@pytest.mark.parametrize("end", ["。", "！", "？", "。”", "！」", "？』", "。）"])
@pytest.mark.parametrize("space", ["", "\n", " ", "\u3000"])
def test_after_these_ends_no_space_is_needed(end, space):
    first = f"山下有人{end}{space}"
    assert sentence_starts(first + "天亮了") == [0, len(first)]


def test_what_does_not_end_a_sentence_starts_none():
    for text in ("Pi is 3.14 or so", "one, two; three: four", "a line\nand the next one", "山下，有人、走了", "end."):
        assert sentence_starts(text) == [0]


@pytest.mark.parametrize("gap", ["\n\n", "\n \t\n", "\n\n\n\n", "\n\u3000\n  "])
def test_an_empty_line_starts_a_sentence_whatever_stands_before_it(gap):
    assert sentence_starts(f"The Title{gap}It begins") == [0, len(f"The Title{gap}")]


@pytest.mark.parametrize("between", ["\n", "\n    ", " \n\n"], ids=repr)
def test_where_hardly_any_sentence_ends_as_in_some_poems_every_line_starts_one(between):
    lines = [f"the river took the {thing} away and never gave it back" for thing in
             "boat oar lamp post road salt rain king door name hand bank".split()]
    assert sentence_starts(between.join(lines)) == starts_of(lines, between)
    assert [prompt for prompt, _ in recall_tests(between.join(lines))] == [line.rsplit(" ", 6)[0] for line in lines]


def test_prose_in_short_lines_has_the_sentences_that_it_has_in_long_ones():
    story = load_text(STORY)
    short = "\n\n".join(textwrap.fill(paragraph, 40) for paragraph in story.split("\n\n"))
    assert len(sentence_starts(short)) == len(sentence_starts(story)) < short.count("\n") / 2


# A | stands before each beginning. In these texts, most sentences begin in upper case.
MARKED = {
    "titles": "|Mr. Okafor sold the mill to Mrs. Lindqvist. |Dr. Hale of St. Brannock's and Prof. Ito signed for "
              "him. |Ms. Roy read it aloud.",
    "initials": "|The deed named J. R. Castellan and Å. Ek, but nobody else. |The clerk sealed it.",
    "the word I": "|The next in line was I. |Nobody else came.",
    "a reported question": '|"Is the bridge down?" asked the miller. |"It is!" his wife called. |He sat down.',
    "speech that goes on": '|"We wait," said he. |"Sit down. |Eat something," she said, "and sleep. |It is late."',
    "speech that is complete": '|"The tide is out." |Nobody moved. |"Go!" |She shut the book.',
    "speech in speech": "|\"'Leave it!' was all she wrote. |'Burn it.' |Then her pen failed.\" |He burned it.",
    "curly quotation marks": "|“Is it far?” asked Odd. |‘Very!’ said the boy. |“Then ride.” |They rode.",
    "German quotation marks": "|„Ist es weit?“ fragte Odd. |„Sehr.“ |Er ritt. |»Halt!« rief er. |»Nein.« |Er floh.",
    "French quotation marks": "|« Est-ce loin ? » demanda Odd. |« Très. » |Il partit. |«Non!» cria le garde.",
    "Spanish dashes": "|—¿Está lejos? —preguntó Odd. |—¡Mucho! —dijo el niño. |Nadie habló. |¿Quién era?",
    "Russian": "|А. К. Лодкин пришёл. |«Далеко?» спросил он. |Никто не ответил.",
    "exclamations": "|Oh! how cold the water was. |Alas! no boat came. |What! |Nobody at all?",
    "the time of day": "|She left at 5 p.m. in the rain. |It was dark.",
    "three dots": "|He waited... and waited… and slept. |Then... |The gate was open… |He ran.",
    "three dots with spaces": "|He waited . . . and slept. . . . |The gate was open.",
    "dashes": '|"Stop!" -- he ran -- "or I fire!" |She hid. |He saw--no! not her--a cat.',
    "brackets": "|(Nobody had asked.) |It was open. |He left (so late!) and slept. |[A page is lost.] |He woke.",
    "emphasis": "|_Never again._ |So it was written. |He read _Never!_ and left.",
    "headings": "|Chapter V.\n\n|THE WEIR\n\n|It rained. |They stayed.",
    "paragraphs in lower case": '|He stopped.\n\n|"--or so they say," said she. |"Go!"\n\n|and he went. |It rained.',
    "an empty line after a title": "|They sent for the Dr.\n\n|He came.",
}

# The same for texts whose sentences begin in lower case, or in a script that knows no upper case.
MARKED_LOWER = {
    "a chat": '|hi. |is anyone there? |yes! |wait... |he said "no!" and left. |ask mr. okafor. |I did. |ok, bye.',
    "a chat in paragraphs": "|hi. |is anyone there?\n\n|me\n\n|good. |come over.",
    "a story in lower case": '|"is it far?" asked odd. |the boy nodded. |oh! |how dark it was.',
    "Georgian": "|ქარი ქროდა. |მებადური სახლში იყო. |„სად არის ნავი?“ იკითხა ქალმა. |ღამე გათენდა!",
}


def unmarked(marked):
    """The text without its marks, and where they stood."""
    pieces = marked.split("|")[1:]
    return "".join(pieces), list(itertools.accumulate(map(len, pieces[:-1]), initial=0))


@pytest.mark.parametrize("name", MARKED | MARKED_LOWER)
def test_the_beginnings_marked_by_hand_are_found(name):
    text, starts = unmarked((MARKED | MARKED_LOWER)[name])
    found = sentence_starts(text)
    assert [text[start:] for start in found] == [text[start:] for start in starts]


@pytest.mark.parametrize("name", MARKED | MARKED_LOWER)
def test_it_makes_no_difference_where_the_lines_of_a_paragraph_end(name):
    text, starts = unmarked((MARKED | MARKED_LOWER)[name])
    for space in range(3):
        spaces = [match.start() for match in re.finditer(" ", text)][space::3]
        broken = "".join("\n" if i in spaces else character for i, character in enumerate(text))
        assert sentence_starts(broken) == starts


def test_one_after_another_the_texts_in_which_most_sentences_begin_in_upper_case_keep_their_beginnings():
    text, starts = unmarked("\n\n".join(MARKED.values()))
    assert sentence_starts(text) == starts


def test_a_chat_in_lower_case_loses_no_sentence_to_the_letters_that_follow():
    text = " ".join(unmarked(MARKED_LOWER["a chat"])[0] for _ in range(50))
    assert len(sentence_starts(text)) == 50 * MARKED_LOWER["a chat"].count("|")


def test_a_title_in_every_line_does_not_hide_that_a_poem_has_no_sentences():
    lines = [f"the river took old Mr. {name} away and never gave him back" for name in
             "Oar Lamp Post Road Salt Rain King Door Hand Bank Reed Hull".split()]
    assert sentence_starts("\n".join(lines)) == starts_of(lines, "\n")


@pytest.mark.parametrize("piece", ['"', "Mr. ", "\n", " ", "A. ", ".", "...", ". »", '."', "—", "\n "], ids=repr)
def test_a_megabyte_of_the_same_characters_takes_a_moment(piece):
    """To try again from each of its characters would take hours."""
    with at_most(seconds=60):
        for text in (piece * (1_000_000 // len(piece)), "The end." + piece * (1_000_000 // len(piece)) + "x"):
            assert sentence_starts(text)


@given(some_text)
def test_sentences_start_in_order_never_at_white_space_and_the_first_one_where_the_text_begins(text):
    starts = sentence_starts(text)
    solid = [i for i in range(len(text)) if not is_space(text[i])]
    assert starts == sorted(set(starts))
    assert starts == [0] if not solid else starts[0] == solid[0] and set(starts) <= set(solid)


@given(st.text(st.sampled_from("ab’é9_-.,!? \n\t\u3000கி"), min_size=1))
def test_where_spaces_separate_the_words_they_start_after_white_space(text):
    starts = [i for i in range(len(text)) if not text[i].isspace() and (i == 0 or text[i - 1].isspace())]
    assert word_starts(text) == (starts or [0])


@given(some_text)
def test_words_are_found_in_order_and_together_are_all_that_is_not_white_space(text):
    words = find_words(text)
    assert "".join(word.group() for word in words) == "".join(c for c in text if not is_space(c))
    assert all(one.end() <= other.start() for one, other in itertools.pairwise(words))


@pytest.mark.parametrize("text, count, expected", [
    ("The old ferryman tied his boat", 5, "The old ferryman tied his"), ("The old  ferryman", 2, "The old"),
    ("The old", 5, "The old"), ("  \n The old ferryman", 2, "The old"), ("山下有人，天亮了", 5, "山下有人，天"),
    ("\n" * 300 + "The old ferryman", 2, "The old"), ("\n" * 3000 + "The old ferryman", 2, "The old"),
    ("a" * 300, 5, "a" * 200), (" \n", 5, " \n")], ids=lambda value: repr(value)[:20])
def test_the_first_words_of_a_text_are_found_after_any_white_space(text, count, expected):
    assert first_words(text, count) == expected


@given(some_text)
def test_the_first_words_of_a_text_are_part_of_it_and_empty_only_if_it_is(text):
    words = first_words(text)
    assert words in text and len(words) <= 200 and bool(words) == bool(text)


@pytest.mark.parametrize("name", UNSPACED)
def test_without_spaces_every_character_starts_a_word(name):
    text = UNSPACED[name]
    letters = [i for i in range(len(text)) if not (is_mark(text[i]) or is_punctuation(text[i]) or text[i].isspace())]
    assert word_starts(text) == letters


BLANK_LINES = ["\n", " \n", "\n\t", "\n\u3000"]


@pytest.mark.parametrize("blank", BLANK_LINES)
def test_a_thousand_blank_lines_at_the_end_are_no_sentence(blank):
    text = TEXT + 1000 * blank
    assert sentence_starts(text) == sentence_starts(TEXT)
    assert [prompt for prompt, _ in recall_tests(text)] == [prompt for prompt, _ in recall_tests(TEXT)]


def test_the_search_for_sentences_reads_blank_lines_once_and_not_once_for_each_of_them():
    """To read them once takes a moment. To read a million lines a million times would take hours."""
    with at_most(seconds=30):
        assert sentence_starts(TEXT + 250_000 * "".join(BLANK_LINES)) == sentence_starts(TEXT)


# the story

def test_the_story_contains_the_promised_line_before_its_last_tenth():
    story = load_text(STORY)
    promised = ("Once Aadhan renounced his kingdom for the love of Thamarai, its people living in fear and oppression. "
                "Aadhan knew he had to act swiftly to overthrow his brother's oppressive regime.")
    assert story.count(promised) == 1 and promised in split_text(story, 0.1)[0]
    assert 20_000 <= os.path.getsize(STORY) <= 25_600
    paragraphs = [p for p in re.split(r"\n\s*\n", story) if len(p) > 40]
    assert len(paragraphs) == len(set(paragraphs))


def test_mixed_scripts_in_one_text_keep_their_own_sentences():
    text = f"{ARABIC} {CHINESE}{JAPANESE}\n\n{TEXT}"
    assert len(sentence_starts(text)) == sum(len(SENTENCES[name]) for name in ("arabic", "chinese", "japanese")) + 6
