import socket
import subprocess
import sys
from collections import Counter

import pytest
import regex
from hypothesis import given, settings, strategies as st

import story_llm
from conftest import STORY, TEXT, bare_environment, closed_port, some_text
from story_llm import BPETokenizer, all_tokens, keep_needed, learn_byte_pairs, load_gpt2_encoding, make_tokenizer

BYTES = [bytes([b]) for b in range(256)]
GPT2_PAPER_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def learn_naively(text, vocab_size):
    """Count all pairs anew for each merge; of pairs that are equally frequent, the smallest."""
    words = [[bytes([b]) for b in word.encode()] for word in regex.findall(GPT2_PAPER_SPLIT, text)]
    tokens, merges = list(BYTES), []
    while len(tokens) < vocab_size - 1:
        counts = Counter(pair for word in words for pair in zip(word, word[1:]))
        if not counts or max(counts.values()) < 2:
            break
        first, second = best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append((first, second, counts[best]))
        if first + second not in tokens:
            tokens.append(first + second)
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i:i + 2] = [first + second]
                i += 1
    return tokens, merges


def pieces(encoding, text):
    return [encoding.decode_single_token_bytes(i) for i in encoding.encode_ordinary(text)]


# learning

@pytest.mark.parametrize("text", [TEXT, "a b a b c", "aaaaaaa aaa aa a", "abab abab ab",
                                  "don't can't won't  \n\n  x", "漢漢 漢 é é 😀😀",
                                  "the then them there " * 3])
def test_the_learned_merges_are_those_of_a_naive_learner(text):
    merges = []
    tokens = learn_byte_pairs(text, 400, lambda *merge: merges.append(merge))
    assert (tokens, merges) == learn_naively(text, 400)


@given(st.text(st.sampled_from("aab \nbé"), max_size=60))
def test_the_learned_merges_are_those_of_a_naive_learner_for_any_text(text):
    assert learn_byte_pairs(text, 300) == learn_naively(text, 300)[0]


def test_the_vocabulary_has_at_most_the_size_asked_for():
    assert len(learn_byte_pairs(TEXT, 257)) == 256
    assert len(learn_byte_pairs(TEXT, 300)) == 299
    assert BPETokenizer(learn_byte_pairs(TEXT, 300), "story").vocab_size == 300


@pytest.mark.parametrize("size", [256, 0, -1])
def test_a_vocabulary_too_small_for_all_bytes_is_refused(size):
    with pytest.raises(ValueError, match=f"257.*{size}"):
        learn_byte_pairs(TEXT, size)


# encoding and decoding

LEARNED = BPETokenizer(learn_byte_pairs(TEXT, 400), "story")


@given(some_text)
def test_decoding_what_was_encoded_gives_any_text_back(text):
    ids = LEARNED.encode(text)
    assert LEARNED.decode(ids) == text
    assert all(0 <= i < LEARNED.vocab_size for i in ids) and LEARNED.end_of_text not in ids


def test_a_learned_encoding_makes_its_text_shorter_and_no_merge_crosses_a_word():
    ids = LEARNED.encode(TEXT)
    assert len(ids) < len(TEXT.encode()) * 2 / 3
    words = {word.encode() for word in regex.findall(GPT2_PAPER_SPLIT, TEXT)}
    assert all(any(LEARNED.tokens[i] in word for word in words) for i in ids)


def test_bytes_that_make_no_character_are_decoded_as_the_replacement_sign():
    assert LEARNED.decode(LEARNED.encode("é")[:0] + [0xC3]) == "\ufffd"


def test_a_lone_surrogate_does_not_raise():
    assert LEARNED.decode(LEARNED.encode("a\ud800b"))[0] == "a"
    assert learn_byte_pairs("a\ud800 a\ud800", 300)


def test_a_byte_pair_vocabulary_with_a_double_or_without_a_byte_is_refused():
    for tokens in (BYTES[1:], BYTES + [b"ab", b"ab"]):
        with pytest.raises(ValueError):
            BPETokenizer(tokens, "story")


# choosing a tokenizer

def test_an_unknown_kind_is_refused_by_name():
    with pytest.raises(ValueError, match="'bytes'"):
        make_tokenizer("bytes", TEXT)


def test_the_learned_tokenizers_learn_from_the_training_text_alone():
    text, share = TEXT + " Vikram" * len(TEXT), 0.9
    train_text, _ = story_llm.split_text(text, share)
    assert "Vikram" not in make_tokenizer("word", text, share).tokens and 0 < len(train_text) < len(TEXT)
    assert make_tokenizer("story", text, share, 300).tokens == learn_byte_pairs(train_text, 300)


def test_without_files_and_network_auto_learns_from_the_story_and_says_so_in_one_line(bare):
    lines = []
    tokenizer = make_tokenizer("auto", TEXT, 0.0, 300, log=lines.append)
    assert tokenizer.kind == "story" and tokenizer.tokens == learn_byte_pairs(TEXT, 300)
    assert len(lines) == 1 and "\n" not in lines[0] and "--tokenizer gpt2" in lines[0]


def test_without_files_and_network_gpt2_is_refused_with_all_that_is_needed_to_get_it(bare):
    with pytest.raises(ValueError) as refusal:
        make_tokenizer("gpt2", TEXT)
    for needed in ("vocab.bpe", "encoder.json", "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
                   "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6", "TIKTOKEN_CACHE_DIR"):
        assert needed in str(refusal.value)


def test_damaged_files_are_as_good_as_none(bare):
    for name in ("6d1cbeee0f20b3d9449abfede4726ed8212e3aee", "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6"):
        (bare / name).write_bytes(b"#version: 0.2\n")
    with pytest.raises(OSError):
        load_gpt2_encoding()


def test_a_network_that_never_answers_is_given_up(tmp_path):
    """In a process of its own, which must end too, although a thread of it still waits."""
    program = ("import story_llm\n"
               "try:\n    story_llm.load_gpt2_encoding(seconds=1)\n"
               "except OSError as error:\n    print('gave up:', error)")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        done = subprocess.run([sys.executable, "-c", program], env=bare_environment(tmp_path, silent.getsockname()[1]),
                              capture_output=True, text=True, timeout=60)
        silent.settimeout(5)
        silent.accept()  # it did ask this network
    assert done.stdout.startswith("gave up: ") and done.returncode == 0, done.stderr


def test_a_closed_port_is_really_closed():
    with pytest.raises(OSError), socket.create_connection(("127.0.0.1", closed_port()), timeout=5):
        pass


# GPT-2's own encoding

KNOWN = {"Hello, I am": [15496, 11, 314, 716],
         "Once Aadhan renounced his kingdom": [7454, 38746, 7637, 8851, 8918, 465, 13239]}
ODD = "I'll we've it's  two  spaces\n\n\ttab\r\n  café 漢字 😀 e\u0301 1234567 ...!? <|endoftext|> İ"


def test_the_full_vocabulary_gives_gpt2s_own_ids(gpt2):
    tokenizer = make_tokenizer("gpt2", TEXT, full_vocab=True)
    assert tokenizer.vocab_size == 50257 and tokenizer.end_of_text == 50256
    for text, ids in KNOWN.items():
        assert tokenizer.encode(text) == ids and tokenizer.decode(ids) == text
    for text in (ODD, TEXT):
        assert tokenizer.encode(text) == gpt2.encode_ordinary(text)


@pytest.mark.parametrize("text", [TEXT, ODD, *KNOWN])
def test_the_kept_vocabulary_splits_its_text_as_gpt2_does(gpt2, text):
    tokenizer = make_tokenizer("gpt2", text)
    assert [tokenizer.tokens[i] for i in tokenizer.encode(text)] == pieces(gpt2, text)


@pytest.mark.skipif(not STORY.exists(), reason="the story stands elsewhere")
def test_the_kept_vocabulary_splits_the_story_as_gpt2_does_and_is_much_smaller(gpt2):
    story = story_llm.load_text(STORY)
    tokenizer = make_tokenizer("auto", story)
    assert tokenizer.kind == "gpt2" and tokenizer.vocab_size < 50257 / 10
    assert [tokenizer.tokens[i] for i in tokenizer.encode(story)] == pieces(gpt2, story)


@settings(max_examples=15)
@given(text=some_text)
def test_the_kept_vocabulary_splits_any_text_as_gpt2_does(gpt2, text):
    tokenizer = BPETokenizer(keep_needed(gpt2, text), "gpt2")
    assert [tokenizer.tokens[i] for i in tokenizer.encode(text)] == pieces(gpt2, text)


@pytest.fixture(scope="module")
def kept(gpt2):
    return BPETokenizer(keep_needed(gpt2, TEXT), "gpt2")


@given(text=some_text)
def test_the_kept_vocabulary_gives_any_other_text_back(kept, text):
    assert kept.decode(kept.encode(text)) == text


def test_the_kept_entries_are_what_the_text_needs_and_no_more(gpt2):
    """In GPT-2's order, with all bytes; each longer entry is one that occurs, or part of another one that is kept."""
    everything, kept = all_tokens(gpt2), keep_needed(gpt2, TEXT)
    places = [everything.index(token) for token in kept]
    assert len(everything) == 50256 and places == sorted(set(places)) and set(BYTES) <= set(kept)
    occur = set(pieces(gpt2, TEXT))
    assert occur <= set(kept)
    ranks = dict(zip(everything, range(len(everything))))
    for token in set(kept) - occur - set(BYTES):
        assert any(token in other and ranks[token] < ranks[other] for other in kept if other != token)
    for token in set(kept) - set(BYTES):
        assert any(token[:i] in kept and token[i:] in kept for i in range(1, len(token))), token
