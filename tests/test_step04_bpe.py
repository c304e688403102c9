"""Step 4: byte-pair encoding, with merges that are learned from the story or taken from GPT-2."""
import contextlib
import itertools
import socket
import subprocess
import sys
import threading
import unicodedata
from collections import Counter

import pytest
import regex
from hypothesis import given, settings, strategies as st

from helpers import GPT2_FILES, ROOT, STORY, TEXT, bare_environment, some_text, story_llm
from scripts import ARABIC, CHINESE, HINDI, JAPANESE, SCRIPTS, SPACED, TAMIL, THAI
from story_llm import (BPETokenizer, SPLIT_PATTERNS, STORY_SPLIT, StoryError, corpus_from_text, gpt2_tokens,
                       load_gpt2_encoding, make_tokenizer, restore_tokenizer, train_bpe)

BYTES = [bytes([b]) for b in range(256)]
UNSPACED = ("CJK UNIFIED", "HIRAGANA LETTER", "KATAKANA LETTER", "THAI CHARACTER")


def kinds_of(text):
    """The kind of each character. A joiner inside an emoji has the kind of what precedes it. Elsewhere it is a letter.
    In scripts without spaces, each character, together with its marks, is a kind of its own: its position."""
    kinds = []
    for position, character in enumerate(text):
        category = unicodedata.category(character)[0]
        if category == "M" and kinds and type(kinds[-1]) is int:
            kinds.append(kinds[-1])
        elif unicodedata.name(character, "").startswith(UNSPACED):
            kinds.append(position)
        elif character in "\u200c\u200d":
            kinds.append("others" if kinds[-1:] == ["others"] else "letters")
        elif character.isspace():
            kinds.append("space")
        else:
            kinds.append({"L": "letters", "M": "letters", "N": "digits"}.get(category, "others"))
    return kinds


def words_of(text):
    """The words within which pairs are merged: characters of one kind with the space before them, and white space.
    After 20 characters, a new word begins."""
    runs = ["".join(character for _, character in run)
            for _, run in itertools.groupby(zip(kinds_of(text), text), lambda pair: pair[0])]
    words, space = [], ""
    for number, run in enumerate(runs, 1):
        if not run.isspace():
            first, *others = in_twenties(run)
            words += [space + first, *others]
            space = ""
        elif number == len(runs):
            words += in_twenties(run)
        else:
            space = " " if run.endswith(" ") else ""
            words += in_twenties(run[:-1]) + in_twenties(run[-1].removeprefix(" "))
    return words


def in_twenties(text):
    return [text[start:start + 20] for start in range(0, len(text), 20)]


def learn_naively(text, vocab_size):
    """Count all pairs again for each merge. Of equally frequent pairs, the first in order is merged."""
    words = [[bytes([b]) for b in word.encode()] for word in words_of(text)]
    tokens = list(BYTES)
    while len(tokens) < vocab_size - 1:
        counts = Counter(pair for word in words for pair in zip(word, word[1:]))
        if not counts or max(counts.values()) < 2:
            break
        first, second = best = min(counts, key=lambda pair: (-counts[pair], pair))
        tokens.append(first + second)
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i:i + 2] = [first + second]
                i += 1
    return tokens


def pieces(tokenizer, text):
    return [tokenizer.tokens[token_id] for token_id in tokenizer.encode(text)]


def gpt2_pieces(encoding, text):
    return [encoding.decode_single_token_bytes(i) for i in encoding.encode_ordinary(text)]


# where a text is split before pairs are merged

@given(st.text(st.sampled_from("abé 's \n\t12½.,-—😀_கா்ि\u0301\u200dعَ漢か\u3099")))
def test_the_story_is_split_where_letters_digits_others_and_white_space_meet(text):
    assert STORY_SPLIT.findall(text) == words_of(text)


@given(st.lists(st.tuples(
    st.sampled_from(["", " ", "x", "1", "-", "\n"]),
    st.sampled_from(["b", "\u00e9", "\u0b95\u0bbe", "7", ".", "\N{DROMEDARY CAMEL}", " ", "\n", "\u6f22", "\u0301"]),
    st.integers(15, 70))))
def test_a_run_of_more_than_20_characters_is_split(runs):
    text = "".join(before + repeated * count for before, repeated, count in runs)
    assert STORY_SPLIT.findall(text) == words_of(text)


def test_no_run_makes_a_word_longer_than_20_characters_and_a_space():
    """Long words would make the merges slow. Marks need a look of their own, because they can follow any letter."""
    for repeated in ("a", "1", ".", " ", "\n", "\u0e01", "\u6f22", "\u0301", "\u200d"):
        for text in (repeated * 1000, " a" + repeated * 1000, " \u0e01" + repeated * 1000 + " x"):
            assert max(map(len, STORY_SPLIT.findall(text))) <= 1 + 20


def test_tiktoken_gets_the_pattern_with_which_the_merges_were_learned():
    assert STORY_SPLIT.pattern == SPLIT_PATTERNS["story"]
    assert make_tokenizer("story", TEXT, vocab_size=300).encoding._pat_str == SPLIT_PATTERNS["story"]


@given(text=some_text)
def test_the_pattern_of_gpt2_splits_any_text_as_gpt2s_own_does(gpt2, text):
    assert regex.findall(SPLIT_PATTERNS["gpt2"], text) == regex.findall(gpt2._pat_str, text)


@pytest.mark.parametrize("name", SPACED)
def test_any_word_of_a_script_with_marks_can_become_one_token(name):
    words = {word.strip(".,:?!؟،।") for word in SPACED[name].split()}
    assert sum(unicodedata.category(c).startswith("M") for word in words for c in word) > 5
    for word in words:
        tokenizer = BPETokenizer(train_bpe(f" {word}" * 3, 1000), "story")
        assert pieces(tokenizer, f" {word}") == [f" {word}".encode()]


@pytest.mark.parametrize("word", ["நான்\u200cகு", "क्\u200dष", "می\u200cروم", "مُحَمَّد", "น้ำ"[:2], "か\u3099"])
def test_joiners_and_several_marks_keep_a_word_together(word):
    tokenizer = BPETokenizer(train_bpe(word + " x " + word, 1000), "story")
    assert pieces(tokenizer, word) == [word.encode()]


@pytest.mark.parametrize("word, parts", [("ไม่ไป", ["ไ", "ม่", "ไ", "ป"]), ("か\u3099く", ["か\u3099", "く"]), ("山下に", [*"山下に"])])
def test_where_no_spaces_separate_the_words_each_character_is_a_token_so_a_prompt_may_end_anywhere(word, parts):
    tokenizer = BPETokenizer(train_bpe(word + " x " + word, 1000), "story")
    assert pieces(tokenizer, word) == [part.encode() for part in parts]
    for end in range(len(parts)):
        prompt = "".join(parts[:end])
        assert tokenizer.encode(word)[:end] == tokenizer.encode(prompt)


# learning

@pytest.mark.parametrize("text", [TEXT, "a b a b c", "aaaaaaa aaa aa a", "abab abab ab", "don't can't won't  \n\n  x",
                                  "漢漢 漢 é é 😀😀", "the then them there " * 3, *SCRIPTS.values()],
                         ids=lambda text: text[:12])
def test_the_learned_tokens_are_those_of_a_naive_learner(text):
    assert train_bpe(text, 400) == learn_naively(text, 400)


@given(text=st.text(st.sampled_from("aab \nbé்க9."), max_size=60), vocab_size=st.integers(257, 300))
def test_the_learned_tokens_are_those_of_a_naive_learner_for_any_text(text, vocab_size):
    tokens = train_bpe(text, vocab_size)
    assert tokens == learn_naively(text, vocab_size) and tokens[:256] == BYTES and len(tokens) < vocab_size
    assert BPETokenizer(tokens, "story").vocab_size == len(tokens) + 1


@pytest.mark.parametrize("size", [256, 0, -1])
def test_a_vocabulary_too_small_for_all_bytes_is_refused(size):
    with pytest.raises(StoryError, match=f"257.*{size}"):
        make_tokenizer("story", TEXT, vocab_size=size)


# encoding and decoding

LEARNED = BPETokenizer(train_bpe(TEXT, 400), "story")


@given(some_text)
def test_decoding_what_was_encoded_gives_any_text_back(text):
    ids = LEARNED.encode(text)
    assert LEARNED.decode(ids) == text
    assert all(0 <= i < LEARNED.vocab_size for i in ids) and LEARNED.end_of_text not in ids


@pytest.mark.parametrize("text", [TEXT, TAMIL, HINDI, ARABIC, THAI, CHINESE, JAPANESE], ids=lambda text: text[:12])
def test_a_learned_encoding_makes_its_text_shorter_and_no_token_crosses_a_word(text):
    tokenizer = BPETokenizer(train_bpe(text, 500), "story")
    tokens = pieces(tokenizer, text)
    assert len(tokens) < len(text.encode()) * 2 / 3
    ends = set(itertools.accumulate(len(token) for token in tokens))
    assert ends >= set(itertools.accumulate(len(word.encode()) for word in words_of(text)))


@given(st.lists(st.tuples(st.sampled_from(["a", "king", "I'll", "é", "漢字", "42", "...", "\x1c", "<|endoftext|>"]),
                          st.sampled_from(["", " ", "  ", 3 * " ", 5 * " ", "\n", "\n ", " \n", "\u3000", "\r\n\n"]))),
       st.sampled_from(["gpt2", "story"]), st.integers(25, 60))
def test_a_text_that_is_encoded_in_parts_gets_the_ids_that_tiktoken_gives_the_whole(words, kind, size):
    text = "".join(f"a{word}{space}k " for word, space in words) + "a"      # a space that begins a word comes soon
    tokenizer = BPETokenizer(BYTES + [b" a", b"  ", b" k", b"ki", b"..", b"\n ", b" \n", b"\n\n", b"a "], kind)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(story_llm, "PART", regex.compile(story_llm.PART.pattern.replace("200000", str(size))))
        parts = story_llm.PART.findall(text)
        assert "".join(parts) == text and all(len(part) <= size for part in parts)
        assert tokenizer.encode(text) == tokenizer.encoding.encode_ordinary(text)


@pytest.mark.parametrize("size", [40, 47, 53])
def test_the_parts_of_the_story_end_between_words(monkeypatch, size):
    """Also if there are several spaces after each sentence, some of which are one token."""
    monkeypatch.setattr(story_llm, "PART", regex.compile(story_llm.PART.pattern.replace("200000", str(size))))
    story = story_llm.load_text(STORY).replace(". ", ".     ")
    tokenizer = BPETokenizer(train_bpe(story[:5000], 400), "story")
    parts = story_llm.PART.findall(story)
    assert len(parts) > 300 and all(regex.match(r" \S", part) for part in parts[1:])
    assert tokenizer.encode(story) == tokenizer.encoding.encode_ordinary(story)


@pytest.mark.parametrize("kind", ["word", "story", "gpt2"])
@pytest.mark.parametrize("repeated", ["a", " ", "\u0301", "漢", ".", "\n"], ids=repr)
def test_a_million_equal_characters_are_encoded_and_given_back(kind, repeated, request):
    if kind == "gpt2":
        request.getfixturevalue("gpt2")
    text = repeated * 1_000_000
    tokenizer = make_tokenizer(kind, text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_bytes_that_form_no_character_are_decoded_as_the_replacement_character():
    assert LEARNED.decode([0xC3]) == "\ufffd"


def test_a_lone_surrogate_does_not_raise():
    assert LEARNED.decode(LEARNED.encode("a\ud800b"))[0] == "a"
    assert train_bpe("a\ud800 a\ud800", 300) == train_bpe("a? a?", 300)


def test_the_special_token_is_decoded_as_it_is_written_and_never_encoded():
    assert LEARNED.decode([LEARNED.end_of_text]) == "<|endoftext|>"
    assert LEARNED.end_of_text == len(LEARNED.tokens) not in LEARNED.encode("<|endoftext|>")


@pytest.mark.parametrize("kind", ["story", "gpt2"])
def test_a_saved_vocabulary_makes_the_same_tokenizer_again_and_a_damaged_one_is_refused(kind):
    again = restore_tokenizer(kind, LEARNED.tokens)
    assert (again.kind, again.tokens) == (kind, LEARNED.tokens)
    assert again.encode(TEXT) == BPETokenizer(LEARNED.tokens, kind).encode(TEXT)
    for tokens in (BYTES[1:], BYTES + [b"ab", b"ab"], BYTES + [b"a"], BYTES + ["ab"], []):
        with pytest.raises(StoryError, match="tokenizer"):
            restore_tokenizer(kind, tokens)


@pytest.mark.parametrize("kind", ["bytes", "auto", None, ["story"]])
def test_a_saved_vocabulary_of_an_unknown_kind_is_refused(kind):
    with pytest.raises(StoryError, match="tokenizer"):
        restore_tokenizer(kind, BYTES)


# choosing a tokenizer

@pytest.mark.parametrize("kind", ["bytes", "", None, "GPT2"])
def test_an_unknown_kind_is_refused_by_name(kind):
    with pytest.raises(StoryError, match=repr(kind)):
        make_tokenizer(kind, TEXT)


def test_a_learned_tokenizer_knows_nothing_of_the_validation_text():
    assert " Vikram" not in make_tokenizer("word", TEXT, " Vikram" * 99).tokens
    assert make_tokenizer("story", TEXT, " Vikram" * 99, 300).tokens == train_bpe(TEXT, 300)


def test_merges_are_learned_from_the_beginning_of_a_long_text(monkeypatch):
    monkeypatch.setattr(story_llm, "MAX_BPE_CHARS", len(TEXT))
    tokenizer = make_tokenizer("story", TEXT + "Vikram " * 999, vocab_size=300)
    assert tokenizer.tokens == train_bpe(TEXT, 300)


# without GPT-2's files

def test_without_files_and_network_gpt2_is_refused_and_the_readme_tells_how_to_get_it(bare):
    with pytest.raises(StoryError) as refusal:
        make_tokenizer("gpt2", TEXT)
    assert "--tokenizer story" in str(refusal.value) and "README" in str(refusal.value)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [needed for needed in ("vocab.bpe", "encoder.json", *GPT2_FILES, "TIKTOKEN_CACHE_DIR")
            if needed not in readme] == []


def test_damaged_files_count_as_missing(bare):
    for name in GPT2_FILES:
        (bare / name).write_bytes(b"#version: 0.2\n")
    assert isinstance(load_gpt2_encoding(), str) and make_tokenizer("auto", TEXT).kind == "story"
    with pytest.raises(StoryError):
        gpt2_tokens()


@pytest.fixture
def hangs_up():
    """(The port of a network that closes every connection, the list of those who connected.)"""
    asked = []

    def serve():
        with contextlib.suppress(OSError):      # until it is shut
            while True:
                connection, address = listener.accept()
                asked.append(address)
                connection.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listener.getsockname()[1], asked
        listener.shutdown(socket.SHUT_RDWR)     # wakes the thread
    thread.join()


def test_a_network_that_failed_is_not_asked_again(bare, hangs_up, monkeypatch):
    port, asked = hangs_up
    for name, value in bare_environment(bare, port).items():
        monkeypatch.setenv(name, value)
    failure = load_gpt2_encoding()
    once = len(asked)
    assert isinstance(failure, str) and once > 0
    assert load_gpt2_encoding() is failure
    assert corpus_from_text(TEXT).tokenizer.kind == "story"
    with pytest.raises(StoryError):
        gpt2_tokens([TEXT])
    assert len(asked) == once
    load_gpt2_encoding.cache_clear()
    load_gpt2_encoding()
    assert len(asked) == 2 * once       # so further questions would have been counted


def test_a_network_that_never_answers_is_given_up_and_not_waited_for_again(tmp_path):
    """In a process of its own, which must end although one of its threads still waits. There is never a second one."""
    program = ("import requests, story_llm, threading, tiktoken\n"       # so that the second is spent on waiting alone
               "before = threading.active_count()\n"
               "first = story_llm.load_gpt2_encoding(seconds=1)\n"
               "second = story_llm.load_gpt2_encoding(seconds=1)\n"
               "print(type(first).__name__, second is first, threading.active_count() - before, first)\n")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        done = subprocess.run([sys.executable, "-c", program], env=bare_environment(tmp_path, silent.getsockname()[1]),
                              capture_output=True, text=True, timeout=60)
        silent.setblocking(False)
        silent.accept()     # it connected to this network,
        with pytest.raises(BlockingIOError):
            silent.accept()     # and only once
    assert done.stdout.startswith("str True 1 no answer") and done.returncode == 0, done.stderr


# GPT-2's own encoding

KNOWN = {"Hello, I am": [15496, 11, 314, 716],
         "Once Aadhan renounced his kingdom": [7454, 38746, 7637, 8851, 8918, 465, 13239]}
ODD = "I'll we've it's they're you'd I'm don't  two  spaces\n\n\ttab\r\n  café 漢字 😀 e\u0301 123456 ...! <|endoftext|> İ"
GERMAN = "Der alte Fährmann band sein Boot an den zerbrochenen Pfahl und wartete, bis der Regen aufhörte."


@pytest.mark.parametrize("name", [*SCRIPTS, "russian"])
def test_auto_does_not_choose_gpt2s_merges_for_a_text_that_they_split_into_very_small_tokens(gpt2, name):
    text = SCRIPTS.get(name, "Старый паромщик привязал лодку к сломанному столбу и ждал, пока не кончится дождь.")
    assert len(gpt2.encode_ordinary(text)) > len(text) / 2
    assert make_tokenizer("auto", text).kind == "story" and make_tokenizer("gpt2", text).kind == "gpt2"


@pytest.mark.parametrize("text", [TEXT, GERMAN, "hi", "Two words."])
def test_auto_chooses_gpt2s_merges_for_other_texts(gpt2, text):
    assert make_tokenizer("auto", text).kind == "gpt2"


def test_a_note_says_why_gpt2s_merges_were_not_chosen(gpt2, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hindi.txt").write_text(HINDI, encoding="utf-8")
    assert story_llm.main(["bpe", "--text", "hindi.txt"]) == 0
    out, err = capsys.readouterr()
    assert "story tokenizer" in out and "very small tokens" in err and "--tokenizer story" in err
    assert err.startswith("note: ") and err.count("\n") == 1
    assert story_llm.main(["bpe", "--text", "hindi.txt", "--tokenizer", "gpt2"]) == 0
    out, err = capsys.readouterr()
    assert "gpt2 tokenizer" in out and err == ""


def test_with_all_of_its_tokens_the_ids_are_gpt2s_own(gpt2):
    tokenizer = BPETokenizer(gpt2_tokens(), "gpt2")
    assert tokenizer.vocab_size == 50257 and tokenizer.end_of_text == 50256
    for text, ids in KNOWN.items():
        assert tokenizer.encode(text) == ids and tokenizer.decode(ids) == text
    for text in (ODD, TEXT, *SCRIPTS.values()):
        assert tokenizer.encode(text) == gpt2.encode_ordinary(text)


def test_the_sample_that_decides_comes_from_the_middle_of_the_text(gpt2):
    """There may be an introduction, or notes at the end, in English."""
    english, hindi = TEXT * 30, HINDI * 30
    assert len(english) > 10_000 < len(hindi)
    assert make_tokenizer("auto", english + hindi + hindi + english, vocab_size=300).kind == "story"
    assert make_tokenizer("auto", hindi + english + english + hindi).kind == "gpt2"


@pytest.mark.parametrize("text", [TEXT, ODD, *KNOWN, *SCRIPTS.values()], ids=lambda text: text[:12])
def test_the_kept_vocabulary_splits_its_text_as_gpt2_does(gpt2, text):
    tokenizer = make_tokenizer("gpt2", text)
    assert pieces(tokenizer, text) == gpt2_pieces(gpt2, text) and tokenizer.vocab_size < 1000


def test_the_kept_vocabulary_splits_the_story_as_gpt2_does_and_is_much_smaller(gpt2):
    story = story_llm.load_text(STORY)
    parts = story_llm.split_text(story, story_llm.TrainConfig())
    tokenizer = make_tokenizer("auto", *parts)
    assert tokenizer.kind == "gpt2" and tokenizer.vocab_size == 2079        # as the lesson says
    for part in parts:
        assert pieces(tokenizer, part) == gpt2_pieces(gpt2, part)


@settings(max_examples=20)
@given(train_text=some_text, val_text=some_text)
def test_the_kept_vocabulary_tokenizes_both_splits_of_any_text_as_gpt2_does(gpt2, train_text, val_text):
    tokenizer = make_tokenizer("gpt2", train_text, val_text)
    for text in (train_text, val_text):
        assert pieces(tokenizer, text) == gpt2_pieces(gpt2, text)
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.fixture(scope="module")
def kept(gpt2):
    return make_tokenizer("gpt2", TEXT)


@given(words=st.lists(st.sampled_from(regex.findall(r" [^\s\W]+(?=\W)", TEXT))))
def test_the_kept_vocabulary_splits_the_same_words_in_another_order_as_gpt2_does(gpt2, kept, words):
    assert pieces(kept, "".join(words)) == gpt2_pieces(gpt2, "".join(words))


def test_the_kept_tokens_are_those_that_the_text_needs_and_no_others(gpt2):
    """In GPT-2's order, with all bytes. Each longer token occurs in the text or is part of another one that is kept."""
    everything, kept = gpt2_tokens(), gpt2_tokens([TEXT])
    ranks = {token: rank for rank, token in enumerate(everything)}
    kept_ranks = [ranks[token] for token in kept]
    assert len(everything) == 50256 and kept_ranks == sorted(set(kept_ranks)) and set(BYTES) <= set(kept)
    occur = set(gpt2_pieces(gpt2, TEXT))
    assert occur <= set(kept)
    for token in set(kept) - occur - set(BYTES):
        assert any(token in other and ranks[token] < ranks[other] for other in kept if other != token)
    for token in set(kept) - set(BYTES):
        assert any(token[:i] in kept and token[i:] in kept for i in range(1, len(token))), token
