#!/usr/bin/env python3
"""story_llm: how a language model works, in one file that learns your story and goes on with it.

    python story_llm.py train
    python story_llm.py generate --prompt "Once Aadhan renounced his kingdom"

Read it from top to bottom as a tutorial of 13 steps, or run it as a tool on a text of your own.
Every step is a section of this file, and most have a command that shows the step at work:

     1  install, settings                    python story_llm.py
     2  load the text, split it into words   python story_llm.py words
     3  a tokenizer of words                 python story_llm.py words
     4  byte-pair encoding                   python story_llm.py bpe
     5  sliding windows                      python story_llm.py windows
     6  attention and the GPT model          python story_llm.py model
     7  a batch through the untrained model  python story_llm.py model
     8  greedy generation                    python story_llm.py generate --untrained
     9  the loss before training             python story_llm.py evaluate
    10  training                             python story_llm.py train
    11  save and load                        python story_llm.py train
    12  loss curves                          python story_llm.py plot
    13  inference from the saved file        python story_llm.py generate
"""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import heapq
import math
import mmap
import os
import re
import sys
import threading
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

# ═════════════════════════════════════════════════════════════════════════════════════════════════
# Step 1: what to install, and the settings
# ═════════════════════════════════════════════════════════════════════════════════════════════════
#
# `pip install -r requirements.txt` brings three packages: torch does the arithmetic, tiktoken runs
# byte-pair encodings, matplotlib draws the loss curves. The last two are imported where they are
# first needed, so nobody waits for what is not used.
#
# A language model does one thing: it reads some text and says, for every token it knows, how likely
# that token comes next. Do that again and again, and it writes. The 13 steps take a story apart
# into tokens (2-4), cut it into exercises (5), build the model (6-8), let it practise (9-12), and
# then let it speak (13). All the numbers that we may turn are fields of two classes. They are
# frozen: once made, a setting never changes behind our back, and a wrong one is refused here, in
# words, not later from deep inside torch.

END_OF_TEXT = "<|endoftext|>"
PRECISIONS = ("auto", "bf16", "fp32")
POSITIONS = ("learned", "sinusoidal", "rotary")


def check(condition, message):
    """Raise `ValueError(message)` unless the condition holds: how every wrong setting is refused."""
    if not condition:
        raise ValueError(message)


def check_whole_numbers(settings, names, smallest):
    for name in names:
        value = getattr(settings, name)
        check(type(value) is int and value >= smallest,
              f"{name} must be a whole number, {smallest} or more, not {value!r}")


def setting(default, meaning):
    """A field of a settings class; its meaning is also the help text of the command line."""
    return field(default=default, metadata={"help": meaning})


@dataclass(frozen=True)
class GPTConfig:
    """The shape of the model. The defaults are the small model that learns one story in seconds."""
    vocab_size: int = setting(50257, "how many tokens there are; always taken from the tokenizer in use")
    context_length: int = setting(32, "how many tokens the model sees at once")
    emb_dim: int = setting(256, "numbers that stand for one token inside the model: its width")
    n_heads: int = setting(4, "attention heads, which share the width among them")
    n_layers: int = setting(2, "transformer blocks, one after the other")
    drop_rate: float = setting(0.0, "share of values dropped in training; 0 to learn a story by heart")
    qkv_bias: bool = setting(False, "biases in the query, key and value projections, as in GPT-2")
    tie_weights: bool = setting(False, "one matrix for token embedding and output head, as in GPT-2")
    position: str = setting("learned", "how tokens know their places: learned, sinusoidal or rotary")

    def __post_init__(self):
        check_whole_numbers(self, ("vocab_size", "context_length", "emb_dim", "n_heads", "n_layers"), 1)
        check(self.emb_dim % self.n_heads == 0, f"the width ({self.emb_dim}) must be divisible by the "
              f"number of heads ({self.n_heads}), for each head gets an equal part of it")
        check(0 <= self.drop_rate < 1, f"drop_rate must be from 0 to below 1, not {self.drop_rate!r}")
        check(self.position in POSITIONS, f"position must be one of {POSITIONS}, not {self.position!r}")
        check(self.position == "learned" or self.emb_dim // self.n_heads % 2 == 0,
              f"{self.position} positions turn pairs of numbers, so width / heads must be even, "
              f"not {self.emb_dim // self.n_heads}")


PRESETS = {
    "story": GPTConfig(),
    "gpt2-small": GPTConfig(context_length=256, emb_dim=768, n_heads=12, n_layers=12, drop_rate=0.1),
}


@dataclass(frozen=True)
class TrainConfig:
    """How the model is trained. An epoch is one reading of the training text."""
    epochs: int = setting(0, "readings of the text; 0: 24, and more where the text is short")
    batch_size: int = setting(32, "windows in one step")
    stride: int = setting(0, "tokens from one window of an epoch to the next; 0: the context length")
    learning_rate: float = setting(3e-3, "the highest one: it rises to this at first, then falls")
    warmup_steps: int = setting(20, "steps of rising")
    weight_decay: float = setting(0.0, "pull of the weights towards zero: helps to generalise, hinders recall")
    grad_clip: float = setting(1.0, "the longest gradient that a step follows")
    openings: float = setting(0.5, "share of windows that begin as a prompt begins (see step 10)")
    val_fraction: float = setting(0.1, "share of the text, at its end, that is kept for validation")
    eval_every: int = setting(25, "steps from one evaluation to the next")
    precision: str = setting("auto", "bf16, fp32, or auto: what is fast on this machine")
    seed: int = setting(42, "where all randomness starts: same seed, same model")

    def __post_init__(self):
        check_whole_numbers(self, ("epochs", "stride", "warmup_steps", "seed"), 0)
        check_whole_numbers(self, ("batch_size", "eval_every"), 1)
        for name in ("learning_rate", "grad_clip"):
            value = getattr(self, name)
            check(0 < value < math.inf, f"{name} must be a number above 0, not {value!r}")
        check(0 <= self.weight_decay < math.inf, f"weight_decay must be 0 or more, not {self.weight_decay!r}")
        check(0 <= self.openings <= 1, f"openings must be a share from 0 to 1, not {self.openings!r}")
        check(self.precision in PRECISIONS, f"precision must be one of {PRECISIONS}, not {self.precision!r}")
        check(0 <= self.val_fraction < 1, f"val_fraction must be from 0 to below 1, not {self.val_fraction!r}")


# ═════════════════════════════════════════════════════════════════════════════════════════════════
# Step 2: load the text and split it into words
# ═════════════════════════════════════════════════════════════════════════════════════════════════
#
# A model calculates, so text must become numbers. The plainest way: cut the text into words and
# punctuation marks, list every different piece once, and use its place in the list as its number.
#
#     "Yes," said the king.   ->   "  Yes  ,  "  said  the  king  .
#
# One regular expression does the cutting. What about the spaces? Most stand where anybody would
# put them: between two words, after a comma, not before one. Such a space we leave out, and put it
# back by the same rule when we join. Only where the text departs from the rule do we write down
# what stands there instead: a line break, two spaces, or nothing at all, which is the piece
# `<|join|>`. That way the pieces keep the whole text, and joining them gives it back.

JOIN = "<|join|>"
PIECE = re.compile(r"(\s*)(\w+(?:['’]\w+)*|[^\w\s]|\Z)")  # white space, then a word or one other mark
NO_SPACE_BEFORE = {"", *".,:;!?)]}%”’…-—"}
NO_SPACE_AFTER = {"", *"([{“‘-—"}


def load_text(path):
    """Read a UTF-8 text file, with or without a byte order mark; every line then ends in a plain \\n.

    Raises OSError if the file cannot be read, ValueError if it is empty or not UTF-8.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text: byte {error.start} is 0x{error.object[error.start]:02x}. Convert it first, "
            f"for example: iconv -f WINDOWS-1252 -t UTF-8 {path} > story_utf8.txt") from None
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    check(text.strip(), f"{path} is empty: there is nothing to learn from. Give a text of five words or more.")
    return text


def split_text(text, val_fraction):
    """Cut the text in two, between words: the first part to train on, the end for validation."""
    cut = len(text) - int(len(text) * val_fraction)
    while 0 < cut < len(text) and not text[cut].isspace():
        cut -= 1
    return text[:cut], text[cut:]


def usual_space(left, right):
    """The white space that usually stands between two pieces of a text."""
    return "" if left in NO_SPACE_AFTER or right in NO_SPACE_BEFORE else " "


def split_words(text):
    """Text to a list of words, punctuation marks, and the white space that is not as usual."""
    pieces, previous = [], ""
    for space, piece in PIECE.findall(text):
        if space != usual_space(previous, piece):
            pieces.append(space or JOIN)
        if piece:
            pieces.append(piece)
        previous = piece
    return pieces


def join_words(pieces):
    """The way back: `join_words(split_words(text)) == text`."""
    text, previous = [], ""
    for piece in pieces:
        if piece == JOIN or piece.isspace():
            text.append(piece.replace(JOIN, ""))
            previous = ""  # what is written down replaces the usual space
        else:
            text.append(usual_space(previous, piece) + piece)
            previous = piece
    return "".join(text)


def build_vocabulary(text):
    """All different pieces of the text, sorted, and after them the special ones."""
    return sorted(set(split_words(text)) - {JOIN}) + [JOIN, END_OF_TEXT, WordTokenizer.UNKNOWN]


# ═════════════════════════════════════════════════════════════════════════════════════════════════
# Step 3: a tokenizer of words
# ═════════════════════════════════════════════════════════════════════════════════════════════════
#
# A tokenizer goes both ways: `encode` turns text into token ids, `decode` turns ids into text.
# With the vocabulary of step 2 it is a dictionary look-up. It fails on the first word that the
# story does not contain, hence the token `<|unk|>` for "unknown": the word is lost, but we go on.
# `<|endoftext|>` marks where a text ends. Both are tokens of ours, not text: somebody's story that
# happens to contain the letters "<|endoftext|>" is taken as the letters that it is.

class WordTokenizer:
    """Words and punctuation marks as tokens. `vocabulary`: list of distinct pieces; id = place in it."""
    UNKNOWN = "<|unk|>"
    kind = "word"

    def __init__(self, vocabulary):
        self.tokens = list(vocabulary)
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        check(len(self.ids) == len(self.tokens) and {self.UNKNOWN, END_OF_TEXT, JOIN} <= self.ids.keys(),
              "a word vocabulary needs distinct entries, and the special ones among them")
        self.end_of_text = self.ids[END_OF_TEXT]

    @property
    def vocab_size(self):
        return len(self.tokens)

    def encode(self, text):
        """Text to token ids. Unknown words become `<|unk|>`, unknown white space the usual one."""
        unknown = self.ids[self.UNKNOWN]
        return [self.ids.get(piece, unknown) for piece in split_words(text)
                if piece in self.ids or not piece.isspace()]

    def decode(self, ids):
        """Token ids to text."""
        return join_words(self.tokens[i] for i in ids)


# ═════════════════════════════════════════════════════════════════════════════════════════════════
# Step 4: byte-pair encoding
# ═════════════════════════════════════════════════════════════════════════════════════════════════
#
# Words are crude tokens: there are too many of them, and a new one is always `<|unk|>`. GPT-2 cuts
# finer. It starts from the 256 possible bytes, so no text in the world is unknown, and joins the
# pair of neighbours that is most frequent into a new token; then again, and again:
#
#     a b a b c   ->   ab ab c   ->   abab c
#
# GPT-2 made 50,000 such merges on the text of the web, and tiktoken, OpenAI's library, applies them.
# A merge never crosses a word: the text is first split into words, each with the space before it
# (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.2).

GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
#               's 't 'll ...        word     number  punctuation         space
FETCH_SECONDS = 10


class BPETokenizer:
    """A byte-pair encoding, run by one `tiktoken.Encoding`.

    `tokens`: list of distinct byte strings, all 256 single bytes among them; the place in the list is
    both the id and the rank: earlier merges are done first. `<|endoftext|>` comes after the last.
    """

    def __init__(self, tokens, kind):
        import tiktoken
        self.kind, self.tokens, ranks = kind, list(tokens), {token: rank for rank, token in enumerate(tokens)}
        check(len(ranks) == len(self.tokens) and all(bytes([b]) in ranks for b in range(256)),
              "a byte-pair vocabulary needs distinct entries, and all 256 single bytes among them")
        self.end_of_text = len(ranks)
        self.encoding = tiktoken.Encoding(kind, pat_str=GPT2_SPLIT, mergeable_ranks=ranks,
                                          special_tokens={END_OF_TEXT: self.end_of_text})

    @property
    def vocab_size(self):
        return self.encoding.n_vocab

    def encode(self, text):
        """Text to token ids, all of it as plain text: "<|endoftext|>" in a story is just letters."""
        return self.encoding.encode(text, disallowed_special=())

    def decode(self, ids):
        """Token ids to text; bytes that are no whole character become the sign U+FFFD."""
        return self.encoding.decode(ids)


def load_gpt2_encoding(seconds=FETCH_SECONDS):
    """GPT-2's own encoding from tiktoken's cache or the network; OSError if that takes too long or fails.

    tiktoken waits for the network without limit, so it does so in a thread that we can leave behind.
    """
    result = []

    def fetch():
        try:
            import tiktoken
            result.append(tiktoken.get_encoding("gpt2"))
        except Exception as error:  # whatever the network, the disk or a damaged file comes up with
            result.append(error)

    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    thread.join(seconds)
    if not result:
        raise OSError(f"no answer within {seconds} seconds")
    if isinstance(result[0], Exception):
        raise OSError(f"{type(result[0]).__name__}") from result[0]
    return result[0]


# A short story uses few of GPT-2's 50,257 tokens, and the model would spend most of its time on
# the others. So we keep those that occur, the smaller tokens that they are merged from, and all
# bytes. In GPT-2's order, these make an encoding that splits the story exactly as GPT-2 does: every
# merge that happened there is still here, and none is new. Any other text falls into smaller pieces.

def all_tokens(encoding):
    """The byte strings of a tiktoken encoding, in the order of their ids, without special tokens."""
    return [encoding.decode_single_token_bytes(i) for i in range(encoding.eot_token)]


def keep_needed(encoding, text):
    """The entries of a tiktoken encoding that `text` needs, as a list of byte strings in its order."""
    every_rank = {token: rank for rank, token in enumerate(all_tokens(encoding))}
    needed = {bytes([b]) for b in range(256)}
    waiting = [encoding.decode_single_token_bytes(i) for i in set(encoding.encode_ordinary(text))]
    while waiting:
        token = waiting.pop()
        if token in needed:
            continue
        needed.add(token)
        parts = [token[i:i + 1] for i in range(len(token))]
        while len(parts) > 2:  # repeat the merges up to the last, which joins the token's two halves
            pairs = [every_rank.get(a + b, math.inf) for a, b in zip(parts, parts[1:])]
            best = pairs.index(min(pairs))
            parts[best:best + 2] = [parts[best] + parts[best + 1]]
        waiting += parts
    return sorted(needed, key=every_rank.get)


# Without GPT-2's files we learn the merges ourselves, from the story. Recounting all pairs after
# each merge would be slow, so we note in which words a pair occurs, and touch only those. A heap
# hands us the most frequent pair; entries whose count has changed since are stale and skipped.

def learn_byte_pairs(text, vocab_size, log=None):
    """Learn a byte-pair vocabulary from text: the 256 bytes, then merges, most frequent pair first.

    Returns a list of at most `vocab_size - 1` byte strings (`<|endoftext|>` takes the last id), fewer
    if no pair occurs twice any more. `log(first, second, count)` is called at each merge.
    """
    import regex  # comes with tiktoken; unlike re it knows \p{L}, "any letter of any script"
    check(vocab_size > 256, f"a byte-pair vocabulary needs at least 257 entries "
          f"(256 bytes and {END_OF_TEXT}), not {vocab_size!r}")
    counts = Counter(regex.findall(GPT2_SPLIT, text))
    words = [[bytes([b]) for b in word.encode("utf-8", "replace")] for word in counts]
    counts = list(counts.values())
    pair_count, words_with = Counter(), defaultdict(set)
    for i, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pair_count[pair] += counts[i]
            words_with[pair].add(i)
    heap = [(-count, pair) for pair, count in pair_count.items()]
    heapq.heapify(heap)
    tokens = {bytes([b]): None for b in range(256)}  # a dictionary: in order, and without doubles
    while heap and len(tokens) < vocab_size - 1:
        count, pair = heapq.heappop(heap)
        if -count != pair_count[pair]:
            continue
        if -count < 2:
            break
        joined = pair[0] + pair[1]
        tokens[joined] = None
        if log:
            log(*pair, -count)
        changed = set()
        for i in words_with.pop(pair):
            old, new, k = words[i], [], 0
            while k < len(old):
                hit = old[k] == pair[0] and k + 1 < len(old) and old[k + 1] == pair[1]
                new.append(joined if hit else old[k])
                k += 2 if hit else 1
            for sign, word in ((-1, old), (1, new)):
                for neighbours in zip(word, word[1:]):
                    pair_count[neighbours] += sign * counts[i]
                    changed.add(neighbours)
            for neighbours in zip(new, new[1:]):
                words_with[neighbours].add(i)
            words[i] = new
        for neighbours in changed:
            if pair_count[neighbours] > 0:
                heapq.heappush(heap, (-pair_count[neighbours], neighbours))
    return list(tokens)


TOKENIZERS = ("auto", "gpt2", "story", "word")
GPT2_HELP = """\
GPT-2's encoding could not be loaded ({reason}). tiktoken needs two files once: vocab.bpe and encoder.json, from
https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/. Without a network, put them into a folder as
    6d1cbeee0f20b3d9449abfede4726ed8212e3aee   (vocab.bpe)
    6c7ea1a7e38e3a7f062df639a5b80947f075ffe6   (encoder.json)
and set TIKTOKEN_CACHE_DIR to that folder; or use --tokenizer story, which is learned from the text itself"""


def make_tokenizer(kind, text, train_text, vocab_size=1024, full_vocab=False, log=print):
    """The tokenizer for a text: `kind` is one of TOKENIZERS. What is learned, is learned from `train_text`."""
    check(kind in TOKENIZERS, f"the tokenizer must be one of {TOKENIZERS}, not {kind!r}")
    if kind in ("auto", "gpt2"):
        try:
            encoding = load_gpt2_encoding()
            return BPETokenizer(all_tokens(encoding) if full_vocab else keep_needed(encoding, text), "gpt2")
        except OSError as error:
            if kind == "gpt2":
                raise OSError(GPT2_HELP.format(reason=error)) from error
            log(f"note: GPT-2's encoding is not at hand ({error}), so a byte-pair encoding is learned from the "
                "story instead; `--tokenizer gpt2` tells how to get GPT-2's.")
    if kind == "word":
        return WordTokenizer(build_vocabulary(train_text))
    return BPETokenizer(learn_byte_pairs(train_text, vocab_size), "story")


# ═════════════════════════════════════════════════════════════════════════════════════════════════
# Step 5: sliding windows
# ═════════════════════════════════════════════════════════════════════════════════════════════════
#
# What does the model practise? Guessing the next token. A window of the text is a row of such
# exercises: the input is the window, the target is the same window one token later.
#
#     input     Once    Aadhan     renounced  his
#     target    Aadhan  renounced  his        kingdom
#
# So four tokens give four exercises: after "Once" comes "Aadhan", after "Once Aadhan" comes
# "renounced", and so on. The window slides over the text by `stride` tokens. A million windows cost
# no memory: `unfold` makes views, other ways of looking at the one row of tokens that we have.

class SlidingWindowDataset(torch.utils.data.Dataset):
    """Windows of `context_length` tokens and their targets, `stride` tokens apart; views, not copies.

    `token_ids`: (N,) integers with N > context_length, else ValueError. Item i is the pair (input,
    target), each (context_length,); an index tensor of shape (B,) gives (B, context_length) each.
    """

    def __init__(self, token_ids, context_length, stride=1):
        check(context_length >= 1 and stride >= 1, "context length and stride must be 1 or more")
        check(len(token_ids) > context_length, f"{len(token_ids)} tokens are too few for a window of "
              f"{context_length} and its targets: give a longer text or a smaller context length")
        self.windows = token_ids.unfold(0, context_length + 1, stride)

    def __len__(self):
        return len(self.windows)

    def __getitem__(self, index):
        window = self.windows[index]
        return window[..., :-1], window[..., 1:]


# ═════════════════════════════════════════════════════════════════════════════════════════════════
# Step 6: attention and the GPT model
# ═════════════════════════════════════════════════════════════════════════════════════════════════
#
# Inside the model every token is a vector, a row of numbers. At first the vector says only which
# token this is and where it stands. Then, block by block, each token looks at the tokens before it
# and takes over what it needs from them (attention), and thinks about what it has gathered (the
# feed-forward network). After the last block the vector of a token is a guess at the next one.
#
# The shapes, here and below:
#
#     B  windows in a batch         C  width of the model, numbers per token (emb_dim)
#     T  tokens in a window         H  attention heads         D  numbers per head, C / H
#
# How does a token know whom to look at? From its vector we compute three: a query ("what am I
# looking for?"), a key ("what do I have?") and a value ("this is what you get"). Where a query and
# a key point the same way, their product is large, and much of that value is taken. Nobody may look
# at a later token, since that is what it is to guess: those scores are set to minus infinity, which
# the softmax turns into 0. Vaswani et al. 2017, "Attention Is All You Need", section 3.2.1:
#
#     attention(Q, K, V) = softmax(Q K^T / sqrt(D)) V

def attention(queries, keys, values):
    """Causal scaled dot-product attention, written out. All arguments (..., T, D).

    Returns the context vectors (..., T, D) and the attention weights (..., T, T), each row of which
    adds up to 1. Training runs the same in one fused call; a test holds the two equal.
    """
    attention_scores = queries @ keys.transpose(-2, -1)             # (..., T, T): each query with each key
    attention_scores = attention_scores / math.sqrt(queries.shape[-1])  # else softmax saturates as D grows
    future = torch.ones(attention_scores.shape[-2:], dtype=torch.bool, device=queries.device).triu(diagonal=1)
    attention_scores = attention_scores.masked_fill(future, -math.inf)
    attention_weights = attention_scores.softmax(dim=-1)
    return attention_weights @ values, attention_weights


# Attention does not see order: shuffle the tokens and the same products come out. So their places
# must be told. Three ways are usual. "learned": one trained vector per place, added to the token's
# (GPT-2). "sinusoidal": the same with fixed vectors of sines and cosines (Vaswani, section 3.5).
# "rotary": nothing is added; queries and keys are turned by an angle that grows with the place, so
# their product depends on the distance between two tokens alone (Su et al. 2021, RoFormer).

def position_angles(context_length, dim):
    """(context_length, dim / 2) angles: place times 1 for the first pair of numbers, 1/10000 near the last."""
    frequencies = 10000.0 ** (-torch.arange(0, dim, 2) / dim)
    return torch.arange(context_length)[:, None] * frequencies


def rotate(x, angles):
    """Turn the pairs (x[i], x[i + D/2]) of x (..., T, D) by angles (T, D/2)."""
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1).to(x.dtype)


class MultiHeadAttention(nn.Module):
    """H attentions side by side, each on its own D of the C numbers: (B, T, C) -> (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        self.n_heads, self.drop_rate = config.n_heads, config.drop_rate
        self.rotary = config.position == "rotary"
        self.qkv = nn.Linear(config.emb_dim, 3 * config.emb_dim, bias=config.qkv_bias)  # three in one product
        self.out_proj = nn.Linear(config.emb_dim, config.emb_dim)
        angles = position_angles(config.context_length, config.emb_dim // config.n_heads)
        self.register_buffer("angles", angles, persistent=False)

    def queries_keys_values(self, x, start=0):
        """x (B, T, C), whose first token stands at place `start`, to three tensors (B, H, T, D)."""
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.n_heads, C // self.n_heads)
        queries, keys, values = qkv.permute(2, 0, 3, 1, 4)
        if self.rotary:
            angles = self.angles[start:start + T]
            queries, keys = rotate(queries, angles), rotate(keys, angles)
        return queries, keys, values

    def forward(self, x, cache=None, start=0):
        B, T, C = x.shape
        queries, keys, values = self.queries_keys_values(x, start)
        if cache is not None:  # (2, B, H, context, D): the keys and values of earlier tokens (step 13)
            cache[:, :, :, start:start + T] = torch.stack([keys, values])
            keys, values = cache[:, :, :, :start + T]
        context_vectors = F.scaled_dot_product_attention(  # `attention` above, in one fused call
            queries, keys, values, is_causal=T > 1, dropout_p=self.drop_rate if self.training else 0.0)
        return self.out_proj(context_vectors.transpose(1, 2).reshape(B, T, C))  # the heads side by side


class FeedForward(nn.Module):
    """Each token by itself: widen fourfold, GELU, narrow. (B, T, C) -> (B, T, C).

    GELU(x) = x * P(Z <= x), Z normal: like "keep what is positive", but smooth (Hendrycks & Gimpel 2016);
    GPT-2 computes it by a tanh.
    """

    def __init__(self, config):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(config.emb_dim, 4 * config.emb_dim), nn.GELU(approximate="tanh"),
                                    nn.Linear(4 * config.emb_dim, config.emb_dim))

    def forward(self, x):
        return self.layers(x)


class TransformerBlock(nn.Module):
    """Attention, then feed-forward, each added to what was there (the residual): (B, T, C) -> (B, T, C).

    LayerNorm before each part ("pre-norm") brings every vector to mean 0 and variance 1, then scales and
    shifts it: (x - mean) / sqrt(variance + eps) * weight + bias. The sum itself is never normalised, so a
    straight road leads from the output back to the input, and the gradient arrives undiminished.
    """

    def __init__(self, config):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(config.emb_dim), nn.LayerNorm(config.emb_dim)
        self.att, self.ff = MultiHeadAttention(config), FeedForward(config)
        self.dropout = nn.Dropout(config.drop_rate)

    def forward(self, x, cache=None, start=0):
        x = x + self.dropout(self.att(self.norm1(x), cache, start))
        return x + self.dropout(self.ff(self.norm2(x)))


class GPTModel(nn.Module):
    """Token ids (B, T) to logits (B, T, vocabulary): for every place, a score for each next token.

    The model of Radford et al. 2019 (GPT-2). Raises ValueError if T exceeds the context length.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.tok_emb = nn.Embedding(config.vocab_size, config.emb_dim)
        self.pos_emb = nn.Embedding(config.context_length, config.emb_dim)
        self.drop_emb = nn.Dropout(config.drop_rate)
        self.trf_blocks = nn.ModuleList(TransformerBlock(config) for _ in range(config.n_layers))
        self.final_norm = nn.LayerNorm(config.emb_dim)
        self.out_head = nn.Linear(config.emb_dim, config.vocab_size, bias=False)
        self.initialize()

    def initialize(self):
        """Small random weights, as in GPT-2: then all tokens are about equally likely at first."""
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:  # what is added to the residual starts smaller, for 2 per block add up
                into_residual = name.endswith(("out_proj.weight", "layers.2.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.config.n_layers) if into_residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        if self.config.position != "learned":  # a fixed table takes the place of the learned one
            angles = position_angles(*self.pos_emb.weight.shape)
            table = torch.cat([angles.sin(), angles.cos()], dim=-1)
            scale = 0.02 if self.config.position == "sinusoidal" else 0.0  # no louder than the token embeddings
            self.pos_emb.weight.data = scale * table
            self.pos_emb.weight.requires_grad_(False)
        if self.config.tie_weights:
            self.out_head.weight = self.tok_emb.weight

    def forward(self, token_ids, cache=None, start=0):
        """`cache` (from `new_cache`) holds the keys and values of the `start` tokens that came before."""
        T = token_ids.shape[1]
        check(start + T <= self.config.context_length, f"{start + T} tokens are more than the context of "
              f"{self.config.context_length}: give the model only the last ones")
        places = torch.arange(start, start + T, device=token_ids.device)
        x = self.tok_emb(token_ids) + self.pos_emb(places)  # (B, T, C): what the token is, and where
        x = self.drop_emb(x)
        for i, block in enumerate(self.trf_blocks):
            x = block(x, None if cache is None else cache[i], start)
        return self.out_head(self.final_norm(x))            # (B, T, vocabulary)

    def new_cache(self, batch_size):
        """Room for the keys and values of a full context: (layers, 2, B, H, context_length, D)."""
        config, weight = self.config, self.out_head.weight
        return torch.zeros(config.n_layers, 2, batch_size, config.n_heads, config.context_length,
                           config.emb_dim // config.n_heads, dtype=weight.dtype, device=weight.device)


# ═════════════════════════════════════════════════════════════════════════════════════════════════
# Step 7: a batch through the untrained model
# ═════════════════════════════════════════════════════════════════════════════════════════════════
#
# Before we train anything, we push one batch through and look at what becomes of it: from (B, T)
# numbers to (B, T, C) vectors, which keep that shape through all the blocks, to (B, T, vocabulary)
# scores. And we count the weights, part by part, to see where a model is large.

def trace_shapes(model, token_ids):
    """Run token_ids (B, T) through the model; returns [(name of the part, shape of its output), ...]."""
    shapes = [("token ids", tuple(token_ids.shape))]
    parts = [("tok_emb", model.tok_emb), ("pos_emb", model.pos_emb)]
    parts += [(f"trf_blocks.{i}", block) for i, block in enumerate(model.trf_blocks)]
    parts += [("final_norm", model.final_norm), ("out_head: the logits", model.out_head)]
    hooks = [part.register_forward_hook(lambda _, __, out, name=name: shapes.append((name, tuple(out.shape))))
             for name, part in parts]
    with inference(model):
        model(token_ids)
    for hook in hooks:
        hook.remove()
    return shapes


def count_parameters(model):
    """How many numbers each part of the model has to learn: {name: count}; shared ones count once."""
    counts, seen = {}, set()
    for name, part in model.named_children():
        own = {id(p): p.numel() for p in part.parameters() if p.requires_grad and id(p) not in seen}
        counts[name] = sum(own.values())
        seen |= own.keys()
    return counts


# ═════════════════════════════════════════════════════════════════════════════════════════════════
# Step 8: greedy generation
# ═════════════════════════════════════════════════════════════════════════════════════════════════
#
# To write, we ask for the likeliest next token, append it, and ask again. That is all. The untrained
# model answers with noise, but it answers. (Step 13 does the same faster, and with some chance.)

@contextlib.contextmanager
def inference(model):
    """Within this, no gradients are kept and nothing is dropped; after it, the model is as it was."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def generate_text_simple(model, idx, max_new_tokens, context_size):
    """Append `max_new_tokens` greedily chosen tokens to idx (B, T); the model sees the last `context_size`."""
    for _ in range(max_new_tokens):
        idx_cond = idx[:, -context_size:]
        with torch.no_grad():
            logits = model(idx_cond)[:, -1, :]                     # (B, vocabulary): only the last place counts
        idx_next = torch.argmax(logits, dim=-1, keepdim=True)      # (B, 1)
        idx = torch.cat([idx, idx_next], dim=1)                    # (B, T + 1)
    return idx


# ═════════════════════════════════════════════════════════════════════════════════════════════════
# Step 9: the loss before training, and recall
# ═════════════════════════════════════════════════════════════════════════════════════════════════
#
# How wrong is the model? For each exercise we take the probability p that it gave to the token that
# really came, and note -ln(p): 0 for a sure hit, more for a surprise. The mean is the cross-entropy
# loss. Who guesses blindly among V tokens gives each 1/V and has a loss of ln(V); an untrained
# model must come out near that, or something is wrong with it.
#
# We measure it on the training text and on the end of the text, which the model never practises on.

def mean_loss(model, token_ids, max_windows=64):
    """Mean cross-entropy over token_ids (N,), N >= 2, in nats per token.

    The windows do not overlap; of more than `max_windows`, as many are taken at even distances.
    """
    config = model.config
    dataset = SlidingWindowDataset(token_ids, min(config.context_length, len(token_ids) - 1), config.context_length)
    chosen = torch.linspace(0, len(dataset) - 1, min(len(dataset), max_windows)).round().long()
    total = 0.0
    with inference(model):
        for part in chosen.split(16):
            inputs, targets = (ids.to(model.out_head.weight.device) for ids in dataset[part])
            total += F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).item() * len(part)
    return total / len(chosen)


# The loss does not tell what we came for: can the model go on with the story? So we try. Recall is
# the share of sentences that it continues to the letter, for 80 characters, from the first five
# words alone. That is hard: nothing stands before those words that would show where we are.

SENTENCE_START = re.compile(r"(?:\A\s*|[.!?…][\"'”’)\]]*\s+|\n\s*\n\s*)(?=\S)")
WORD = re.compile(r"\S+")


def sentence_starts(text):
    """The places in the text where a sentence begins."""
    return [match.end() for match in SENTENCE_START.finditer(text)]


def recall_exercises(text, max_sentences=1000):
    """[(first five words, the 80 characters that follow)] of the sentences that have 8 words or more."""
    starts, exercises = sentence_starts(text), []
    for start, end in zip(starts, starts[1:] + [len(text)]):
        words = [match.end() for match in WORD.finditer(text, start, end)]
        if len(words) >= 8:
            exercises.append((text[start:words[4]], text[words[4]:words[4] + 80].rstrip()))
    every = math.ceil(len(exercises) / max_sentences) or 1
    return exercises[::every]


def measure_recall(model, tokenizer, text, max_sentences=1000):
    """The share, 0 to 1, of the sentences of `text` that greedy generation continues verbatim for 80
    characters, given their first five words alone; 0.0 if no sentence has 8 words. A text with more
    than `max_sentences` is tested on as many or fewer, at even distances.
    """
    exercises, same_length, hits = recall_exercises(text, max_sentences), defaultdict(list), 0
    for prompt, continuation in exercises:
        ids = tokenizer.encode(prompt)
        same_length[len(ids)].append((ids, tokenizer.decode(ids), continuation))
    for group in same_length.values():  # prompts of one length make a batch
        rows = [list(ids) for ids, _, _ in group]
        for column in generate(model, torch.tensor(rows), max_new_tokens=320):
            for row, token in zip(rows, column.tolist()):
                row.append(token)
            texts = [tokenizer.decode(row)[len(prompt):] for row, (_, prompt, _) in zip(rows, group)]
            if all(len(text) >= 80 + 4 for text in texts):  # 4: the last character may lack a byte as yet
                break
        hits += sum(text.startswith(target) for text, (_, _, target) in zip(texts, group))
    return hits / max(len(exercises), 1)


# ═════════════════════════════════════════════════════════════════════════════════════════════════
# Step 10: training
# ═════════════════════════════════════════════════════════════════════════════════════════════════
#
# Now we practise: take a batch of windows, compute the loss, ask for every weight in which direction
# it makes the loss smaller (the gradient), and let AdamW take a small step that way. A few hundred
# times, and noise turns into the story.
#
# Which windows? If they always start at the same places of the text, the model learns to go on
# from those places, and is lost elsewhere. So an epoch covers the text once, from a new offset each
# time. And then we practise what will be asked for: a prompt starts with a word, at place 0, with
# nothing before it, not even the space which that word has inside a text (" king" and "king" are
# different tokens). So a part of each batch are openings: pieces of text that begin at a sentence or
# at any word, encoded by themselves, as a prompt is.
#
# Batch number 17 of a seed is always the same, whatever was computed before it. Training that was
# interrupted can thus go on as if nothing had been.

USUAL_EPOCHS = 24     # readings of the text if none are asked for
FEWEST_STEPS = 160    # and for a text of a few sentences, as many as make this many steps
SENTENCE_SHARE = 0.7  # of the openings; the others begin at any word
IGNORED = -100        # as a target, what F.cross_entropy leaves out


def random_numbers(*names):
    """A random generator of its own for each combination of seed, purpose and number."""
    digest = hashlib.sha256(repr(names).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@functools.lru_cache(maxsize=8)
def shuffled(count, *names):
    return torch.randperm(count, generator=random_numbers(*names))


def deal(count, hand, turn, *names):
    """The cards 0 to count - 1 are shuffled and dealt `hand` at a time, and then anew: hand number `turn`."""
    turns = math.ceil(count / hand) if hand else 1
    deck = shuffled(count, *names, turn // turns)
    return deck[(turn % turns * hand + torch.arange(hand)) % count]


class TrainingBatches:
    """`batches[step]` is the pair (inputs, targets), (B, T) token ids each, of that step.

    `token_ids` (N,): the training text; `text` and `tokenizer`: the same as text, for the openings.
    """

    def __init__(self, token_ids, context_length, config, text, tokenizer):
        self.dataset = SlidingWindowDataset(token_ids, context_length)  # windows at every offset
        self.stride = min(config.stride or context_length, len(self.dataset))
        self.windows_per_epoch = math.ceil(len(self.dataset) / self.stride)
        n_openings = int(config.batch_size * config.openings)
        self.n_windows = config.batch_size - n_openings or 1
        self.n_sentences = round(n_openings * SENTENCE_SHARE)
        self.n_words = n_openings - self.n_sentences
        self.steps_per_epoch = math.ceil(self.windows_per_epoch / self.n_windows)
        self.context_length, self.seed, self.text, self.tokenizer = context_length, config.seed, text, tokenizer
        self.sentences = torch.tensor(sentence_starts(text) or [0])

    def __getitem__(self, step):
        epoch = step // self.steps_per_epoch
        offset = torch.randint(self.stride, (1,), generator=random_numbers(self.seed, "offset", epoch))
        order = deal(self.windows_per_epoch, self.n_windows, step, self.seed, "windows")
        windows = self.dataset.windows[(order * self.stride + offset) % len(self.dataset)]
        starts = self.sentences[deal(len(self.sentences), self.n_sentences, step, self.seed, "sentences")].tolist()
        anywhere = torch.randint(len(self.text), (self.n_words,), generator=random_numbers(self.seed, "words", step))
        starts += [self.next_word(place) for place in anywhere.tolist()]
        openings = torch.tensor([self.opening(start) for start in starts], dtype=torch.long)
        batch = torch.cat([windows, openings.view(-1, windows.shape[1])])
        return batch[:, :-1].clamp(min=0), batch[:, 1:]

    def next_word(self, place):
        """Where the first word begins that starts after `place`; the text's first word if there is none."""
        match = re.compile(r"(?<=\s)\S").search(self.text, place)
        return match.start() if match else 0

    def opening(self, start):
        """The text from `start` as one window, filled up where the text ends before it."""
        length = self.context_length + 1
        ids = self.tokenizer.encode(self.text[start:start + 10 * length])[:length]
        return ids + [IGNORED] * (length - len(ids))


@dataclass
class Run:
    """A model with all that belongs to it: what training works on and a checkpoint holds."""
    model: GPTModel
    tokenizer: WordTokenizer | BPETokenizer
    train_config: TrainConfig
    total_steps: int
    fingerprint: str                             # SHA-256 of the text
    step: int = 0                                # steps done
    history: list = field(default_factory=list)  # one dictionary per evaluation
    optimizer_state: dict | None = None

    @property
    def config(self):
        return self.model.config


def encode_split(text, tokenizer, val_fraction):
    """(training text, its token ids (N,), the validation ids (M,)); M is 0 where val_fraction is 0."""
    train_text, val_text = split_text(text, val_fraction)
    return train_text, torch.tensor(tokenizer.encode(train_text)), torch.tensor(tokenizer.encode(val_text))


def new_run(text, config=PRESETS["story"], train_config=TrainConfig(), tokenizer="auto", vocab_size=1024,
            full_vocab=False, device="cpu", log=print):
    """An untrained model for a text. `tokenizer`, `vocab_size`, `full_vocab`: as for `make_tokenizer`.

    A text too short for the validation split or the context does without, and `log` gets a line that
    says so. Raises ValueError if there are fewer than 2 tokens.
    """
    made = make_tokenizer(tokenizer, text, split_text(text, train_config.val_fraction)[0] or text,
                          vocab_size, full_vocab, log)
    train_text, train_ids, val_ids = encode_split(text, made, train_config.val_fraction)
    if train_config.val_fraction and len(val_ids) <= config.context_length:
        log(f"note: the last {train_config.val_fraction:.0%} of the text are less than one window of "
            f"{config.context_length} tokens, so there is no validation split: the model trains on all of it.")
        train_config = dataclasses.replace(train_config, val_fraction=0.0)
        train_text, train_ids, val_ids = encode_split(text, made, 0.0)
    check(len(train_ids) >= 2, f"the text is too short to learn from ({len(train_ids)} tokens): give five words or more")
    if len(train_ids) <= config.context_length:
        log(f"note: the text has only {len(train_ids)} tokens, so the context is {len(train_ids) - 1} tokens "
            f"instead of {config.context_length}.")
        config = dataclasses.replace(config, context_length=len(train_ids) - 1)
    torch.manual_seed(train_config.seed)
    model = GPTModel(dataclasses.replace(config, vocab_size=made.vocab_size)).to(device)
    steps_per_epoch = TrainingBatches(train_ids, config.context_length, train_config, train_text, made).steps_per_epoch
    total_steps = steps_per_epoch * train_config.epochs or max(steps_per_epoch * USUAL_EPOCHS, FEWEST_STEPS)
    return Run(model, made, train_config, total_steps, hash_text(text))


def hash_text(text):
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()


# The size of the steps matters most. Too large at first, and the random weights are thrown about; so
# it rises over some steps (warm-up). Too large at the end, and the model jumps around the best
# place; so it falls, along half a cosine, to nothing.

def learning_rate(step, total_steps, config):
    """The learning rate of a step, 0 <= step < total_steps."""
    warmup = min(config.warmup_steps, total_steps // 5)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(total_steps - warmup, 1)
    return config.learning_rate * (1 + math.cos(math.pi * progress)) / 2


def autocast(device, precision):
    """Within this, matrix products run in bfloat16, at half the memory and twice the speed, where the
    precision is "bf16", or "auto" and the machine is made for it. The weights stay in float32."""
    if precision == "auto":
        able = torch.cpu.get_capabilities() if device.type == "cpu" else {}
        fast = device.type == "cuda" or able.get("avx512_bf16") or able.get("amx_bf16")
    else:
        fast = precision == "bf16"
    return torch.autocast(device.type, torch.bfloat16, enabled=bool(fast))


def new_optimizer(model, config):
    """AdamW (Loshchilov & Hutter 2019): each weight moves by a running mean of its gradient, divided
    by the root of a running mean of its square; weight decay pulls on the matrices only."""
    weights = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in weights if p.dim() > 1], "weight_decay": config.weight_decay},
              {"params": [p for p in weights if p.dim() < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98), fused=True)


def train(run, text, log=print, save=lambda run: None, stop=lambda: False, prompt=None):
    """Train `run` on `text` from `run.step` to `run.total_steps`, or until `stop()` is true after a step.

    Every `eval_every` steps and at the end, losses and a continuation of `prompt` (default: the first
    words of the text) go to `run.history` and, as lines, to `log`; then `save(run)` is called, but never
    so often that it takes more than about 2 % of the time. Raises ValueError if the loss is not finite.
    """
    model, config, device = run.model, run.train_config, run.model.out_head.weight.device
    train_text, train_ids, val_ids = encode_split(text, run.tokenizer, config.val_fraction)
    batches = TrainingBatches(train_ids, run.config.context_length, config, train_text, run.tokenizer)
    prompt = prompt or " ".join(train_text.split()[:5])
    optimizer = new_optimizer(model, config)
    if run.optimizer_state:
        optimizer.load_state_dict(run.optimizer_state)
    model.train()
    seconds, timed_steps, next_save = 0.0, 0, 0.0
    while True:
        finished = run.step >= run.total_steps
        if (finished or run.step % config.eval_every == 0) and [run.step] != [h["step"] for h in run.history[-1:]]:
            with autocast(device, config.precision):
                entry = {"step": run.step, "epoch": run.step / batches.steps_per_epoch,
                         "tokens": run.step * config.batch_size * run.config.context_length,
                         "train_loss": mean_loss(model, train_ids), "val_loss": mean_loss(model, val_ids) if len(val_ids) else None}
            entry["sample"] = "".join(generate_text(model, run.tokenizer, prompt, 24))
            run.history.append(entry)
            log_progress(run, prompt, seconds / max(timed_steps, 1), log)
        if run.step and (finished or stop() or time.perf_counter() > next_save and run.history[-1]["step"] == run.step):
            run.optimizer_state, began = optimizer.state_dict(), time.perf_counter()
            save(run)
            next_save = time.perf_counter() + 50 * (time.perf_counter() - began)
        if finished or stop():
            return
        began = time.perf_counter()
        inputs, targets = (ids.to(device) for ids in batches[run.step])
        torch.manual_seed(random_numbers(config.seed, "dropout", run.step).initial_seed())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(run.step, run.total_steps, config)
        with autocast(device, config.precision):
            loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
        check(math.isfinite(loss.item()), f"the loss is {loss.item()} at step {run.step}, so training stops here; the last "
              "checkpoint is not touched. Try a smaller --learning-rate, or --precision fp32")
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        run.step += 1
        seconds, timed_steps = seconds + time.perf_counter() - began, timed_steps + 1


def log_progress(run, prompt, seconds_per_step, log):
    """The lines on an evaluation, which is the last entry of the history."""
    history, new = run.history, run.history[-1]
    line = f"Ep {int(new['epoch']) + 1} (Step {new['step']:06d}): Train loss {new['train_loss']:.3f}"
    if new["val_loss"] is not None:
        line += f", Val loss {new['val_loss']:.3f}"
    if seconds_per_step:
        speed = run.train_config.batch_size * run.config.context_length / seconds_per_step
        left = (run.total_steps - run.step) * seconds_per_step
        line += f" | {speed:,.0f} tokens/s, {left // 60:.0f}:{left % 60:02.0f} left"
    log(line)
    log("    " + " ".join(f"{prompt}[{new['sample']}]".split()))
    rising = [b["val_loss"] > a["val_loss"] and b["train_loss"] < a["train_loss"]
              for a, b in zip(history, history[1:]) if b["val_loss"] is not None]
    if rising and rising[-1] and not any(rising[:-1]):
        log("    (Validation loss rises while training loss falls: the model is memorising. With one short story that is "
            "normal, and wanted here:\n     there is too little text to learn the language from, but enough to know it by heart.)")


# ═════════════════════════════════════════════════════════════════════════════════════════════════
# Step 11: save and load
# ═════════════════════════════════════════════════════════════════════════════════════════════════
#
# All that the run is goes into one file: settings, tokenizer, weights, the optimizer's memory, the
# history. Nothing else is needed to generate, not even the story. The file is written beside the
# old one and takes its place only when it is whole, so a crash at any moment leaves a good one. Its
# last 32 bytes are the SHA-256 of the others: a damaged file is recognised, not believed. And it is
# read with `weights_only`, which builds tensors and plain values and never runs code from the file.

FORMAT = 1
DIGEST_BYTES = 32


def save_checkpoint(path, run):
    """Write `run` to `path`, atomically. Raises OSError; then the file that was there is still there."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    state = {"format": FORMAT, "config": dataclasses.asdict(run.config),
             "train_config": dataclasses.asdict(run.train_config),
             "tokenizer": {"kind": run.tokenizer.kind, "tokens": [
                 t if isinstance(t, str) else t.decode("latin-1") for t in run.tokenizer.tokens]},
             "model": run.model.state_dict(), "optimizer": run.optimizer_state, "total_steps": run.total_steps,
             "step": run.step, "history": run.history, "fingerprint": run.fingerprint}
    try:
        with open(temporary, "w+b") as file:
            torch.save(state, file)
            file.seek(0)
            file.write(hashlib.file_digest(file, "sha256").digest())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise OSError(f"{path} could not be written ({error}); free some space or give another --model") from error


def digest_matches(file):
    """Whether the last 32 bytes of a file are the SHA-256 of the bytes before them."""
    if os.fstat(file.fileno()).st_size <= DIGEST_BYTES:
        return False
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as contents, memoryview(contents) as view:
        return hashlib.sha256(view[:-DIGEST_BYTES]).digest() == view[-DIGEST_BYTES:]


def load_checkpoint(path, device="cpu"):
    """The `Run` saved at `path`, with `.model` (in eval mode), `.tokenizer`, `.config`, `.step`, `.history`.

    Raises OSError if there is no such file, ValueError if it is damaged or not one of ours.
    """
    path = Path(path)
    if not path.exists():
        raise OSError(f"there is no model at {path}: train one first (python story_llm.py train)")
    check(path.is_file(), f"{path} is not a file: give the path of a checkpoint")
    with open(path, "rb") as file:
        check(digest_matches(file), f"{path} is damaged or not a checkpoint of story_llm: train again, or give another --model")
        state = torch.load(file, map_location=device, weights_only=True)
    check(state["format"] == FORMAT, f"{path} has format {state['format']}, and this program reads {FORMAT}: "
          "use the version that wrote it, or train again")
    kind, tokens = state["tokenizer"]["kind"], state["tokenizer"]["tokens"]
    tokenizer = WordTokenizer(tokens) if kind == "word" else BPETokenizer([t.encode("latin-1") for t in tokens], kind)
    with torch.device("meta"):  # the shape without the memory; the saved weights then take their places
        model = GPTModel(GPTConfig(**state["config"]))
    model.load_state_dict(state["model"], assign=True)
    return Run(model.eval(), tokenizer, TrainConfig(**state["train_config"]), state["total_steps"],
               state["fingerprint"], state["step"], state["history"], state["optimizer"])


# ═════════════════════════════════════════════════════════════════════════════════════════════════
# Step 12: loss curves
# ═════════════════════════════════════════════════════════════════════════════════════════════════
#
# Two curves tell what happened. Both fall: the model learns. Training falls and validation rises: it
# learns this text by heart. Both stay near ln(vocabulary): it learns nothing.

def plot_losses(history, path, vocab_size):
    """Draw the losses of a history to `path` (.png, .svg, .pdf); epochs below, tokens seen above."""
    from matplotlib.figure import Figure
    check(len(history) > 0, "there is no history to draw: train first")
    epochs, tokens = [h["epoch"] for h in history], [h["tokens"] for h in history]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="epochs", ylabel="loss (nats per token)")
    axes.plot(epochs, [h["train_loss"] for h in history], color="#0072b2", marker="o", markersize=4, label="training")
    if history[-1]["val_loss"] is not None:
        axes.plot(epochs, [h["val_loss"] for h in history], color="#d55e00", marker="s", markersize=4,
                  linestyle="--", label="validation")
    axes.axhline(math.log(vocab_size), color="#777777", linestyle=":", label=f"blind guess, ln({vocab_size:,})")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.legend()
    per_epoch = tokens[-1] / epochs[-1] if epochs[-1] else 1.0
    above = axes.secondary_xaxis("top", functions=(lambda e: e * per_epoch, lambda t: t / per_epoch))
    above.set_xlabel("tokens seen")
    above.xaxis.set_major_formatter("{x:,.0f}")
    figure.savefig(path, dpi=150)


# ═════════════════════════════════════════════════════════════════════════════════════════════════
# Step 13: inference from the saved file
# ═════════════════════════════════════════════════════════════════════════════════════════════════
#
# `generate_text_simple` reads the whole text again for each new token. But the keys and values of
# earlier tokens never change, since no token looks ahead. So we keep them in a cache and feed only
# the new token. When the context is full, the window slides, every token gets a new place, and
# all is computed afresh.
#
# Always the likeliest token: that is greedy, and right for a story known by heart. With a temperature
# the choice is by chance: the logits are divided by it before the softmax, so that below 1 the
# likely become likelier, above 1 all become more alike. `top_k` leaves only the k best to choose from.

def choose_token(logits, temperature=0.0, top_k=None, generator=None):
    """logits (B, vocabulary) to token ids (B,): the likeliest, or for temperature > 0 one drawn by chance."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    if top_k:
        kth_best = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth_best, -math.inf)
    probabilities = torch.softmax(logits.float() / temperature, dim=-1)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(1)


def generate(model, token_ids, max_new_tokens, temperature=0.0, top_k=None, generator=None):
    """Continue token_ids (B, T), T >= 1; yields one tensor (B,) of new tokens at a time.

    At temperature 0 the same tokens as `generate_text_simple`, only faster.
    """
    context_length, window = model.config.context_length, token_ids[:, -model.config.context_length:]
    cache, start, new = model.new_cache(len(window)), 0, window
    for _ in range(max_new_tokens):
        with inference(model):
            logits = model(new, cache, start)[:, -1]
            token = choose_token(logits, temperature, top_k, generator)
        yield token
        window = torch.cat([window, token[:, None]], dim=1)[:, -context_length:]
        cached = start + new.shape[1]
        start, new = (cached, token[:, None]) if cached < context_length else (0, window)


def generate_text(model, tokenizer, prompt, max_new_tokens, temperature=0.0, top_k=None, seed=0):
    """Continue a prompt; yields pieces of text as they come, never half a character."""
    ids = tokenizer.encode(prompt)
    check(ids, "the prompt is empty: give the first words of what the model is to write")
    device = model.out_head.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    recent, shown = ids, tokenizer.decode(ids)  # what may still grow into text, and what of it is out
    for token in generate(model, torch.tensor([ids], device=device), max_new_tokens, temperature, top_k, generator):
        if token.item() == tokenizer.end_of_text:
            break
        recent = recent + [token.item()]
        text = tokenizer.decode(recent)
        if not text.endswith("\ufffd"):  # else the rest of a character is still to come
            yield text[len(shown):]
            recent = recent[-1:]
            shown = tokenizer.decode(recent)


# ═════════════════════════════════════════════════════════════════════════════════════════════════
# The command line
# ═════════════════════════════════════════════════════════════════════════════════════════════════
#
# One function per command; each calls the parts of its step and prints what they return. Results go
# to stdout, notes to stderr.

DEFAULT_PROMPT = "Once Aadhan renounced his kingdom"


def note(message):
    print(message, file=sys.stderr, flush=True)


def log(message):
    print(message, flush=True)


def settings(cls, args, base=None):
    """A settings object from the command line; what was not given there comes from `base`."""
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(cls) if getattr(args, f.name, None) is not None}
    return dataclasses.replace(base or cls(), **given)


def untrained_run(args, text):
    return new_run(text, settings(GPTConfig, args, PRESETS[args.preset]), settings(TrainConfig, args),
                   args.tokenizer, args.vocab_size, args.full_vocab, args.device, note)


def open_run(args, text):
    """The saved model, or an untrained one if none was saved yet or --untrained is given."""
    if args.untrained or not Path(args.model).exists():
        if not args.untrained:
            note(f"note: there is no model at {args.model} yet, so this is an untrained one")
        return untrained_run(args, text)
    run = load_checkpoint(args.model, args.device)
    if run.fingerprint != hash_text(text):
        note(f"note: {args.model} was trained on another text than {args.text}")
    return run


def show_pieces(tokenizer, ids):
    """[15496 'Hello'] [11 ','] ..."""
    return " ".join(f"[{i} {tokenizer.decode([i])!r}]" for i in ids)


def command_overview(args):
    log(__doc__)


def command_words(args):
    text = load_text(args.text)
    train_text, val_text = split_text(text, TrainConfig().val_fraction)
    pieces, tokenizer = split_words(train_text), WordTokenizer(build_vocabulary(train_text))
    log(f"{args.text}: {len(text):,} characters, {len(train_text):,} to train on, {len(val_text):,} for validation")
    log(f"words and punctuation of the training text: {len(pieces):,}\nthe first of them: {pieces[:16]}")
    log(f"different ones, which are the vocabulary: {tokenizer.vocab_size:,}\nsome of them: "
        f"{tokenizer.tokens[::max(tokenizer.vocab_size // 12, 1)]}")
    log(f"there and back gives the same text: {tokenizer.decode(tokenizer.encode(train_text)) == train_text}")
    for sentence in (args.prompt or " ".join(train_text.split()[:8]), "Once upon a time there was a <|endoftext|> laptop."):
        ids = tokenizer.encode(sentence)
        log(f"\n{sentence}\n  -> {ids}\n  -> {tokenizer.decode(ids)}")


def command_bpe(args):
    text = load_text(args.text)
    train_text, _ = split_text(text, TrainConfig().val_fraction)
    tokenizer = make_tokenizer(args.tokenizer, text, train_text, args.vocab_size, args.full_vocab, note)
    ids, sentence = tokenizer.encode(text), args.prompt or " ".join(train_text.split()[:12])
    if tokenizer.kind == "story":
        log("the first merges:")
        merges = []
        learn_byte_pairs(train_text, 256 + 13, lambda a, b, count: merges.append((a, b, count)))
        for first, second, count in merges:
            show = [part.decode("utf-8", "replace") for part in (first, second, first + second)]
            log(f"  {show[0]!r:>8} + {show[1]!r:<8} -> {show[2]!r:<10} {count:,} times")
    log(f"{args.text} in tokens of its words: {len(split_words(text)):,}; of the {tokenizer.kind} tokenizer: {len(ids):,}")
    log(f"vocabulary: {tokenizer.vocab_size:,}, of which the text uses {len(set(ids)):,}; characters per token: "
        f"{len(text) / len(ids):.2f}; there and back gives the same text: {tokenizer.decode(ids) == text}")
    for sentence in (sentence, "Hello, I am unhappyish."):
        log(f"\n{sentence}\n  -> {show_pieces(tokenizer, tokenizer.encode(sentence))}")


def command_windows(args):
    run = untrained_run(args, load_text(args.text))
    _, token_ids, _ = encode_split(load_text(args.text), run.tokenizer, run.train_config.val_fraction)
    length, stride = run.config.context_length, run.train_config.stride or run.config.context_length
    windows = SlidingWindowDataset(token_ids, length, stride)
    log(f"{len(token_ids):,} tokens make {len(windows):,} windows of {length} tokens, {stride} apart; the first tokens of some:")
    for i in range(min(3, len(windows))):
        for name, ids in zip(("input ", "target"), windows[i]):
            log(f"  {name} {' '.join(f'{run.tokenizer.decode([t])!r:<11}' for t in ids[:7].tolist())}")
        log("")


def command_model(args):
    text = load_text(args.text)
    run = untrained_run(args, text)
    _, token_ids, _ = encode_split(text, run.tokenizer, run.train_config.val_fraction)
    batch, _ = SlidingWindowDataset(token_ids, run.config.context_length)[torch.arange(2) % (len(token_ids) - run.config.context_length)]
    log(f"{run.config}\n\na batch on its way through the untrained model:")
    for name, shape in trace_shapes(run.model, batch.to(args.device)):
        log(f"  {name:<22} {shape}")
    log("\nnumbers to learn:")
    counts = count_parameters(run.model)
    for name, count in [*counts.items(), ("all together", sum(counts.values()))]:
        log(f"  {name:<22} {count:>12,}")


def command_evaluate(args):
    text = load_text(args.text)
    run = open_run(args, text)
    train_text, train_ids, val_ids = encode_split(text, run.tokenizer, run.train_config.val_fraction)
    log(f"after {run.step} of {run.total_steps} training steps:")
    log(f"  Train loss {mean_loss(run.model, train_ids):.3f}")
    if len(val_ids) > 1:
        log(f"  Val loss   {mean_loss(run.model, val_ids):.3f}")
    log(f"  blind guess among {run.config.vocab_size:,} tokens: ln({run.config.vocab_size}) = {math.log(run.config.vocab_size):.3f}")
    log_recall(run, train_text)


def log_recall(run, train_text):
    exercises = len(recall_exercises(train_text))
    recall = measure_recall(run.model, run.tokenizer, train_text)
    log(f"Recall {recall:.1%}: {round(recall * exercises)} of {exercises} sentences are continued word for word from their first five words"
        if exercises else "Recall: not measured, for no sentence of the training text has 8 words")


def command_train(args):
    text = load_text(args.text)
    run = untrained_run(args, text)
    log(f"{args.text}: {run.tokenizer.kind} tokenizer, {run.config.vocab_size:,} tokens; "
        f"{sum(count_parameters(run.model).values()):,} parameters; {run.total_steps} steps; "
        f"blind guess: loss {math.log(run.config.vocab_size):.3f}")
    began = time.perf_counter()
    train(run, text, log, lambda run: save_checkpoint(args.model, run), prompt=args.prompt or (DEFAULT_PROMPT if DEFAULT_PROMPT in text else None))
    log(f"trained in {time.perf_counter() - began:.1f} s")
    log_recall(run, split_text(text, run.train_config.val_fraction)[0])
    log(f"saved {args.model}")
    command_plot(args)


def command_plot(args):
    run = load_checkpoint(args.model)
    plot_losses(run.history, args.plot, run.config.vocab_size)
    log(f"drew {args.plot}")


def command_generate(args):
    run = untrained_run(args, load_text(args.text)) if args.untrained else load_checkpoint(args.model, args.device)
    print(args.prompt or DEFAULT_PROMPT, end="", flush=True)
    for piece in generate_text(run.model, run.tokenizer, args.prompt or DEFAULT_PROMPT, args.max_new_tokens, args.temperature, args.top_k, args.seed or 0):
        print(piece, end="", flush=True)
    print()


COMMANDS = {
    "words": (command_words, "steps 2-3: the text as words, and as ids"),
    "bpe": (command_bpe, "step 4: the text as byte-pair tokens"),
    "windows": (command_windows, "step 5: inputs and targets"),
    "model": (command_model, "steps 6-7: the model's shapes and sizes"),
    "evaluate": (command_evaluate, "step 9: losses and recall, before or after training"),
    "train": (command_train, "steps 10-12: train, save, draw the loss"),
    "plot": (command_plot, "step 12: draw the loss curves of a saved model"),
    "generate": (command_generate, "steps 8 and 13: continue a prompt"),
}


def make_parser():
    parser = argparse.ArgumentParser(prog="story_llm.py", description="How a language model works, on your own story.")
    parser.set_defaults(handler=command_overview)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, (handler, meaning) in COMMANDS.items():
        command = commands.add_parser(name, help=meaning, description=meaning)
        command.set_defaults(handler=handler)
        add = command.add_argument
        add("--text", default=str(Path(__file__).with_name("Short_Story.txt")), help="a UTF-8 text file")
        add("--model", default="story_llm.pt")
        add("--plot", default="loss.png")
        add("--prompt")
        add("--tokenizer", choices=TOKENIZERS, default="auto")
        add("--vocab-size", type=int, default=1024)
        add("--full-vocab", action="store_true")
        add("--untrained", action="store_true")
        add("--device", default="cpu")
        add("--preset", choices=PRESETS, default="story")
        add("--max-new-tokens", type=int, default=100)
        add("--temperature", type=float, default=0.0)
        add("--top-k", type=int)
        for cls in (GPTConfig, TrainConfig):
            for f in dataclasses.fields(cls):
                if f.name != "vocab_size":
                    kind = {"action": "store_true", "default": None} if f.type is bool else {"type": f.type}
                    add("--" + f.name.replace("_", "-"), help=f"{f.metadata['help']} ({f.default})", **kind)
    return parser


def main(argv=None):
    args = make_parser().parse_args(argv)
    try:
        args.handler(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
