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
     9  the loss before training             python story_llm.py evaluate --untrained
    10  training                             python story_llm.py train
    11  save and load                        python story_llm.py train
    12  loss curves                          python story_llm.py plot
    13  inference from the saved file        python story_llm.py generate
"""

import argparse
import array
import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import heapq
import itertools
import json
import math
import mmap
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import time
import warnings
import zipfile
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

if sys.platform == "linux":  # glibc: keep freed memory for the next step, instead of returning it to the kernel
    with contextlib.suppress(OSError, AttributeError):  # and clearing it anew (a sixth to a third of the time)
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, mallopt = -1, -3, ctypes.CDLL(None).mallopt
        if mallopt(M_MMAP_THRESHOLD, 1 << 30):
            mallopt(M_TRIM_THRESHOLD, -1)  # never

import torch
from torch import nn
from torch.nn import functional as F

# ═══ Step 1: what to install, and the settings ═══════════════════════════════════════════════════
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

def check(condition, message):
    """Raise `ValueError(message)` unless the condition holds: how every wrong setting is refused."""
    if not condition:
        raise ValueError(message)

def setting(default, meaning, smallest=None, below=math.inf, among=None):
    """A field with its limits; `meaning` is also its help text on the command line."""
    return field(default=default, metadata={"help": meaning, "smallest": smallest, "below": below, "among": among})

class Settings:
    def __post_init__(self):
        for f in dataclasses.fields(self):
            value, (_, smallest, below, among) = getattr(self, f.name), f.metadata.values()
            if among:
                check(value in among, f"{f.name} must be one of {', '.join(among)}, not {value!r}")
            elif smallest is not None:
                number = type(value) is int or type(value) is float and f.type is float
                check(number and smallest <= value < below, f"{f.name} must be a {'whole ' * (f.type is int)}number, "
                      f"{smallest} or more{f', below {below}' * (below < math.inf)}, not {value!r}")

@dataclass(frozen=True)
class GPTConfig(Settings):
    """The shape of the model. The defaults are the small model that learns one story in seconds."""
    vocab_size: int = setting(50257, "how many tokens there are; always taken from the tokenizer in use", 1, 1 << 24)
    context_length: int = setting(32, "how many tokens the model sees at once", 1, 1 << 20)
    emb_dim: int = setting(256, "numbers that stand for one token inside the model: its width", 1, 1 << 16)
    n_heads: int = setting(4, "attention heads, which share the width among them", 1, 1 << 16)
    n_layers: int = setting(2, "transformer blocks, one after the other", 1, 1 << 10)
    drop_rate: float = setting(0.0, "share of values dropped in training; 0 to learn a story by heart", 0, 1)
    qkv_bias: bool = setting(False, "biases in the query, key and value projections, as in GPT-2")
    tie_weights: bool = setting(False, "one matrix for token embedding and output head, as in GPT-2")
    position: str = setting("learned", "how tokens know their places: learned, sinusoidal or rotary",
                            among=("learned", "sinusoidal", "rotary"))

    def __post_init__(self):
        super().__post_init__()
        check(self.emb_dim % self.n_heads == 0, f"the width ({self.emb_dim}) must be divisible by the number of heads "
              f"({self.n_heads}), for each head gets an equal part of it")
        check(self.position == "learned" or self.emb_dim // self.n_heads % 2 == 0, f"{self.position} positions go by "
              f"pairs of numbers, so the width per head must be even, not {self.emb_dim // self.n_heads}")

    @property
    def rough_size(self):
        """How many numbers the model learns, but for the biases and norms, which are few."""
        tables = (2 - self.tie_weights) * self.vocab_size + self.context_length
        return 12 * self.n_layers * self.emb_dim ** 2 + tables * self.emb_dim

PRESETS = {"story": GPTConfig(), "gpt2-small": GPTConfig(context_length=256, emb_dim=768, n_heads=12, n_layers=12)}

@dataclass(frozen=True)
class TrainConfig(Settings):
    """How the model is trained. An epoch is one reading of the training text."""
    epochs: int = setting(0, "readings of the text; 0: as many as usually suffice to know it by heart", 0)
    max_steps: int = setting(0, "steps to take, whatever the epochs; 0: as the epochs say", 0)
    batch_size: int = setting(32, "windows in one step", 1, 1 << 16)
    stride: int = setting(0, "tokens from one window of an epoch to the next; 0: the context length", 0)
    learning_rate: float = setting(2e-3, "the highest one: it rises to this at first, then falls", 1e-9)
    warmup_steps: int = setting(20, "steps of rising, but a fifth of all at most", 0)
    weight_decay: float = setting(0.0, "pull of the weights towards zero: helps to generalise, hinders recall", 0)
    grad_clip: float = setting(1.0, "the longest gradient that a step follows", 1e-9)
    openings: float = setting(0.5, "share of windows that begin as a prompt begins (see step 10)", 0, 1)
    val_fraction: float = setting(0.1, "share of the text, at its end, that is kept for validation", 0, 1)
    eval_every: int = setting(45, "steps from one evaluation to the next", 1)
    accumulate: int = setting(1, "parts in which a step's windows are calculated, one after the other: less memory", 1)
    precision: str = setting("auto", "bf16, fp32, or auto: what is fast here", among=("auto", "bf16", "fp32"))
    seed: int = setting(42, "where all randomness starts: same seed, same model", 0, 1 << 63)

# ═══ Step 2: load the text and split it into words ═══════════════════════════════════════════════
# A model calculates, so text must become numbers. The plainest way: cut the text into words and
# punctuation marks, list every different piece once, and use its place in the list as its number.
#
#     Yes, said the king.   ->   Yes  ,  said  the  king  .
#
# One regular expression does the cutting. What about the spaces? Most stand where anybody would
# put them: between two words, after a comma, not before one. Such a space we leave out, and put it
# back by the same rule when we join. Only where the text departs from the rule do we write down
# what stands there instead: a line break, two spaces, or nothing at all, which is the piece
# `<|join|>`. That way the pieces keep the whole text, and joining them gives it back.

END_OF_TEXT, UNKNOWN, JOIN = "<|endoftext|>", "<|unk|>", "<|join|>"
PIECE = re.compile(r"(\s*)(\w+(?:['’]\w+)*|[^\w\s]|\Z)")  # white space, then a word or one other mark
NO_SPACE_BEFORE = {"", *".,:;!?)]}%”’…-—"}
NO_SPACE_AFTER = {"", *"([{“‘-—"}
NOT_UTF8 = "{0} is not UTF-8 text ({1}). Convert it first, for example: iconv -f WINDOWS-1252 -t UTF-8 {0} > utf8.txt"

def load_text(path):
    """Read a UTF-8 text file, with or without a byte order mark; every line then ends in a plain \\n.
    Raises OSError if the file cannot be read, ValueError if it is empty or not UTF-8."""
    check(Path(path).is_file(), f"{path} is not a file: give a text file with --text")
    check(Path(path).suffix != ".bin", f"{path} is a file of tokens: here, a text is needed")
    megabytes = os.path.getsize(path) / 1e6
    check(megabytes <= 200, f"{path} has {megabytes:,.0f} MB, too much to hold in memory as tokens: write them to a "
          f"file (python story_llm.py tokenize --text {path} --out tokens.bin) and give that: --text tokens.bin")
    try:
        text = Path(path).read_bytes().decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        place = f"byte {error.start} is 0x{error.object[error.start]:02x}"
        raise ValueError(NOT_UTF8.format(path, place)) from None
    text = re.sub("\r\n?", "\n", text)
    check(text.strip(), f"{path} is empty: there is nothing to learn from. Give a text of five words or more.")
    return text

def split_text(text, val_fraction):
    """Cut the text in two, between words: the first part to train on, the end for validation."""
    cut = len(text) - int(len(text) * val_fraction)
    ends = [match.start() for match in re.finditer(r"\s", text[max(cut - 50, 0):cut + 1])]  # some scripts have none
    if ends and cut < len(text):
        cut = max(cut - 50, 0) + ends[-1]
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
    return sorted(set(split_words(text)) - {JOIN}) + [JOIN, END_OF_TEXT, UNKNOWN]

# ═══ Step 3: a tokenizer of words ════════════════════════════════════════════════════════════════
# A tokenizer goes both ways: `encode` turns text into token ids, `decode` turns ids into text.
# With the vocabulary of step 2 it is a dictionary look-up. It fails on the first word that the
# story does not contain, hence the token `<|unk|>` for "unknown": the word is lost, but we go on.
# `<|endoftext|>` marks where a text ends. Both are tokens of ours, not text: somebody's story that
# happens to contain the letters "<|endoftext|>" is taken as the letters that it is.

class WordTokenizer:
    """Words and punctuation marks as tokens. `vocabulary`: list of distinct pieces; id = place in it."""
    kind = "word"

    def __init__(self, vocabulary):
        self.tokens = list(vocabulary)
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        check(len(self.ids) == len(self.tokens) and {UNKNOWN, END_OF_TEXT, JOIN} <= self.ids.keys(),
              "a word vocabulary needs distinct entries, and the special ones among them")
        self.end_of_text, self.vocab_size = self.ids[END_OF_TEXT], len(self.tokens)

    def encode(self, text):
        """Text to token ids. Unknown words become `<|unk|>`, unknown white space the usual one."""
        unknown = self.ids[UNKNOWN]
        return [self.ids.get(piece, unknown) for piece in split_words(text)
                if piece in self.ids or not piece.isspace()]

    def decode(self, ids):
        """Token ids to text."""
        return join_words(self.tokens[i] for i in ids)

# ═══ Step 4: byte-pair encoding ══════════════════════════════════════════════════════════════════
# Words are crude tokens: there are many, and each new one is `<|unk|>`. GPT-2 cuts finer. It starts
# from the 256 possible bytes, so no text in the world is unknown to it, and joins the most frequent
# pair of neighbours into a new token; then again, and again:
#
#     a b a b c   ->   ab ab c   ->   abab c
#
# GPT-2 learned 50,000 such merges from the web, and tiktoken, OpenAI's library, applies them fast. A
# merge never crosses a word: first the text is split into words, each with the space before it
# (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.2).

GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
#               's 't 'll ...        word     number   punctuation      white space

class BPETokenizer:
    """A byte-pair encoding, run by one `tiktoken.Encoding`.
    `tokens`: distinct byte strings, the 256 single bytes among them; the place in the list is the id, and
    the rank too: earlier entries are merged first. `<|endoftext|>` comes after the last."""

    def __init__(self, tokens, kind):
        import tiktoken
        self.kind, self.tokens, ranks = kind, list(tokens), {token: rank for rank, token in enumerate(tokens)}
        check(len(ranks) == len(self.tokens) and all(bytes([b]) in ranks for b in range(256)),
              "a byte-pair vocabulary needs distinct entries, and all 256 single bytes among them")
        self.end_of_text, self.vocab_size = len(ranks), len(ranks) + 1
        self.encoding = tiktoken.Encoding(kind, pat_str=GPT2_SPLIT, mergeable_ranks=ranks,
                                          special_tokens={END_OF_TEXT: self.end_of_text})

    def encode(self, text):
        """Text to token ids, all of it as plain text: "<|endoftext|>" in a story is just letters."""
        return self.encoding.encode(text, disallowed_special=())

    def decode(self, ids):
        """Token ids to text; bytes that make no whole character become the sign U+FFFD."""
        return self.encoding.decode(ids)

def load_gpt2_encoding(seconds=10):
    """GPT-2's own encoding, from tiktoken's cache or the network; OSError if that fails or takes too long.
    tiktoken waits for a silent network for ever, so it waits in a thread that we can leave behind."""
    found = [OSError(f"no answer within {seconds} seconds")]

    def fetch():
        try:
            import tiktoken
            found.insert(0, tiktoken.get_encoding("gpt2"))
        except Exception as error:  # whatever the network, the disk or a damaged cache comes up with
            found.insert(0, OSError(f"{type(error).__name__}"))

    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    thread.join(seconds)
    encoding = found[0]
    if isinstance(encoding, OSError):
        raise encoding
    return encoding

# A short story uses few of GPT-2's 50,257 tokens, and a model would spend most of its time on the
# others. So we keep the tokens that occur, the smaller ones that they are merged from, and all bytes.
# In GPT-2's order, these split the story exactly as GPT-2 does: every merge that happened there is
# still here, and none is new. Any other text falls into smaller pieces, at worst into bytes.

def all_tokens(encoding):
    """The byte strings of a tiktoken encoding in the order of their ids, without the special ones."""
    return [encoding.decode_single_token_bytes(i) for i in range(encoding.eot_token)]

def keep_needed(encoding, text):
    """Those of `all_tokens(encoding)` that it takes to split `text` in the same way, in the same order."""
    ranks = {token: rank for rank, token in enumerate(all_tokens(encoding))}
    needed = {bytes([b]) for b in range(256)}
    for token in encoding.decode_tokens_bytes(set(encoding.encode_ordinary(text))):
        parts = [bytes([b]) for b in token]
        while len(parts) > 1:  # repeat the merges that make this token
            best = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], math.inf))
            parts[best:best + 2] = [parts[best] + parts[best + 1]]
            needed.add(parts[best])
    return sorted(needed, key=ranks.get)

# Without GPT-2's files we learn the merges ourselves, from the story. Counting all pairs anew after
# each merge would be slow, so we note which words contain a pair, and recount only those. A heap hands
# us the most frequent pair; what it holds of counts that have changed since is stale, and skipped.

def learn_byte_pairs(text, vocab_size, log=lambda first, second, count: None):
    """Learn a byte-pair vocabulary from text: the 256 bytes, then merges, most frequent pair first.
    Returns at most `vocab_size - 1` byte strings (`<|endoftext|>` takes the last id), fewer if no pair
    occurs twice any more. `log` is called at each merge."""
    import regex  # comes with tiktoken; unlike re it knows \p{L}, "any letter of any script"
    check(vocab_size > 256, f"vocab_size must be 257 or more (256 bytes and {END_OF_TEXT}), not {vocab_size!r}")
    occurrences = Counter(regex.findall(GPT2_SPLIT, text))
    times = list(occurrences.values())
    words = [[bytes([b]) for b in word.encode("utf-8", "replace")] for word in occurrences]
    pair_count, words_with = Counter(), defaultdict(set)

    def count_pairs(i, sign):
        for pair in zip(words[i], words[i][1:]):
            pair_count[pair] += sign * times[i]
            words_with[pair].add(i)
            yield pair

    heap = [(-pair_count[pair], pair) for pair in {pair for i in range(len(words)) for pair in count_pairs(i, +1)}]
    heapq.heapify(heap)
    tokens = {bytes([b]): None for b in range(256)}  # a dictionary: in order, and nothing twice
    while heap and len(tokens) < vocab_size - 1 and heap[0][0] <= -2:
        count, pair = heapq.heappop(heap)
        if -count != pair_count[pair]:
            continue
        log(*pair, -count)
        tokens[pair[0] + pair[1]] = None
        changed = set()
        for i in words_with.pop(pair):
            changed.update(count_pairs(i, -1))
            merged = []
            for part in words[i]:
                if merged and (merged[-1], part) == pair:
                    merged[-1] += part
                else:
                    merged.append(part)
            words[i] = merged
            changed.update(count_pairs(i, +1))
        for pair in changed:
            heapq.heappush(heap, (-pair_count[pair], pair))
    return list(tokens)

TOKENIZERS, LEARN_FROM = ("auto", "gpt2", "story", "word"), 10_000_000
GPT2_HELP = """\
GPT-2's encoding could not be loaded ({}). tiktoken needs two files, vocab.bpe and encoder.json, from
https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/. Without a network, put them into a folder as
    6d1cbeee0f20b3d9449abfede4726ed8212e3aee   (vocab.bpe)
    6c7ea1a7e38e3a7f062df639a5b80947f075ffe6   (encoder.json)
and set TIKTOKEN_CACHE_DIR to that folder; or use --tokenizer story, which is learned from the text itself"""

def make_tokenizer(kind, text, val_fraction=0.1, vocab_size=2048, full_vocab=False, log=print):
    """The tokenizer for a text: `kind` is one of TOKENIZERS; what must be learned is learned from the training part."""
    check(kind in TOKENIZERS, f"the tokenizer must be one of {', '.join(TOKENIZERS)}, not {kind!r}")
    if isinstance(text, TokenFile):  # see "A library instead of a story"
        check(kind in ("auto", text.tokenizer.kind), f"{text.path} was made with --tokenizer {text.tokenizer.kind}")
        return text.tokenizer
    train_text = split_text(text, val_fraction)[0] or text
    if kind == "word":
        return WordTokenizer(build_vocabulary(train_text))
    if kind != "story":
        try:
            encoding = load_gpt2_encoding()
            return BPETokenizer(all_tokens(encoding) if full_vocab else keep_needed(encoding, text), "gpt2")
        except OSError as error:
            check(kind == "auto", GPT2_HELP.format(error))
            log(f"note: GPT-2's encoding is not at hand ({error}), so a byte-pair encoding is learned from the story; "
                "how to get GPT-2's: --tokenizer gpt2")
    if len(train_text) > LEARN_FROM:
        log(f"note: the byte-pair encoding is learned from the first {LEARN_FROM / 1e6:.0f} million characters")
    return BPETokenizer(learn_byte_pairs(train_text[:LEARN_FROM], vocab_size), "story")

# ═══ Step 5: sliding windows ═════════════════════════════════════════════════════════════════════
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
    `token_ids`: (N,) integers of any type with N > context_length, else ValueError. Item i is the pair
    (input, target), each (context_length,); an index tensor of shape (B,) gives (B, context_length) each."""

    def __init__(self, token_ids, context_length, stride=1):
        check(context_length >= 1 and stride >= 1, "context length and stride must be 1 or more")
        check(len(token_ids) > context_length, f"{len(token_ids)} tokens are too few for a window of "
              f"{context_length} and its targets: give a longer text or a smaller context length")
        self.windows = token_ids.unfold(0, context_length + 1, stride)

    def __len__(self):
        return len(self.windows)

    def __getitem__(self, index):
        window = self.windows[index].long()
        return window[..., :-1], window[..., 1:]

# ═══ Step 6: attention and the GPT model ═════════════════════════════════════════════════════════
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

def attention(queries, keys, values, drop_rate=0.0):
    """Causal scaled dot-product attention, written out: queries (..., T, D), keys and values (..., S, D).
    The queries are those of the last T of S tokens. Returns the context vectors (..., T, D) and the
    attention weights (..., T, S), each row of which adds up to 1."""
    (T, D), S = queries.shape[-2:], keys.shape[-2]
    attention_scores = queries @ keys.transpose(-2, -1) / math.sqrt(D)  # (..., T, S); unscaled, softmax would saturate
    future = torch.ones(T, S, dtype=torch.bool, device=queries.device).triu(diagonal=1 + S - T)
    attention_scores = attention_scores.masked_fill(future, -math.inf)
    attention_weights = F.dropout(attention_scores.softmax(dim=-1), drop_rate)
    return attention_weights @ values, attention_weights

# Attention does not see order: shuffle the tokens and the same products come out. So their places
# must be told. Three ways are usual. "learned": one trained vector per place, added to the token's
# (GPT-2). "sinusoidal": the same with fixed vectors of sines and cosines (Vaswani, section 3.5).
# "rotary": nothing is added; queries and keys are turned by an angle that grows with the place, so
# their product depends on the distance between two tokens alone (Su et al. 2021, RoFormer).

def position_angles(places, dim):
    """(T, dim / 2) angles for places (T,): place times 1 for the first pair of numbers, 1/10000 near the last."""
    return places[:, None] * 10000.0 ** (-torch.arange(0, dim, 2, device=places.device) / dim)

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

    def queries_keys_values(self, x, start=0):
        """x (B, T, C), whose first token stands at place `start`, to one tensor (3, B, H, T, D)."""
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.n_heads, C // self.n_heads).permute(2, 0, 3, 1, 4)
        if self.rotary:
            angles = position_angles(torch.arange(start, start + T, device=x.device), C // self.n_heads)
            qkv = torch.cat([rotate(qkv[:2], angles), qkv[2:]])
        return qkv

    def forward(self, x, cache=None, start=0):
        B, T, C = x.shape
        qkv = self.queries_keys_values(x, start)
        queries, keys, values = qkv
        if cache is not None:  # (2, B, H, context, D): the keys and values of earlier tokens (step 13)
            cache[:, :, :, start:start + T] = qkv[1:]
            keys, values = cache[:, :, :, :start + T]
            queries = queries.to(cache.dtype)
        drop_rate = self.drop_rate if self.training else 0.0
        if T == 1 or start == 0 and (x.is_cuda or queries.dtype == torch.float32):  # the same in one fused call
            context_vectors = F.scaled_dot_product_attention(queries, keys, values, None, drop_rate, is_causal=T > 1)
        else:  # in bfloat16 on a CPU, written out is faster than fused
            context_vectors, _ = attention(queries, keys, values, drop_rate)
        return self.out_proj(context_vectors.transpose(1, 2).reshape(B, T, C).to(qkv.dtype))  # the heads side by side

class FeedForward(nn.Module):
    """Each token by itself: widen fourfold, GELU, narrow. (B, T, C) -> (B, T, C).
    GELU(x) = x * P(Z <= x), Z normal: like "keep what is positive", but smooth (Hendrycks & Gimpel 2016);
    GPT-2 approximates it by a tanh, which is slower today."""

    def __init__(self, config):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(config.emb_dim, 4 * config.emb_dim), nn.GELU(),
                                    nn.Linear(4 * config.emb_dim, config.emb_dim))

    def forward(self, x):
        return self.layers(x)

class TransformerBlock(nn.Module):
    """Attention, then feed-forward, each added to what was there (the residual): (B, T, C) -> (B, T, C).
    LayerNorm before each part ("pre-norm") brings every vector to mean 0 and variance 1, then scales and
    shifts it: (x - mean) / sqrt(variance + eps) * weight + bias. The sum itself is never normalised, so a
    straight road leads from the output back to the input, and the gradient arrives undiminished."""

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
    The model of Radford et al. 2019 (GPT-2). Raises ValueError if T exceeds the context length."""

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
        """Small random weights: then all tokens are about equally likely at first."""
        std = 0.02 * math.sqrt(768 / self.config.emb_dim)  # GPT-2's 0.02 at its width, 768; more if narrower
        for name, parameter in self.named_parameters():
            if name.endswith(("out_proj.weight", "layers.2.weight")):  # these add to the residual, 2 in each block,
                nn.init.normal_(parameter, std=std / math.sqrt(2 * self.config.n_layers))  # so their sum would grow
            elif parameter.dim() > 1:
                nn.init.normal_(parameter, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        if self.config.position != "learned":  # a fixed table takes the place of the learned one
            angles = position_angles(torch.arange(self.config.context_length), self.config.emb_dim)
            table = torch.cat([angles.sin(), angles.cos()], dim=-1)
            scale = std if self.config.position == "sinusoidal" else 0.0  # no louder than the token embeddings
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
        x = self.drop_emb(self.tok_emb(token_ids) + self.pos_emb(places))  # (B, T, C): what the token is, and where
        for i, block in enumerate(self.trf_blocks):
            x = block(x, None if cache is None else cache[i], start)
        return self.out_head(self.final_norm(x))            # (B, T, vocabulary)

    def new_cache(self, batch_size):
        """Room for the keys and values of a full context: (layers, 2, B, H, context_length, D).
        On a CPU in float32, also for a model in bfloat16: one query looks around in it four times as fast."""
        config, weight = self.config, self.out_head.weight
        shape = (batch_size, config.n_heads, config.context_length, config.emb_dim // config.n_heads)
        dtype = weight.dtype if weight.is_cuda else torch.float32
        return torch.zeros(config.n_layers, 2, *shape, dtype=dtype, device=weight.device)

# ═══ Step 7: a batch through the untrained model ═════════════════════════════════════════════════
# Before we train anything, we push one batch through and look at what becomes of it: from (B, T)
# numbers to (B, T, C) vectors, which keep that shape through all the blocks, to (B, T, vocabulary)
# scores. And we count the weights, part by part, to see where a model is large.

@contextlib.contextmanager
def inference(model):
    """Within this, no gradients are kept and nothing is dropped; after it, the model is as it was."""
    was_training = model.training
    if was_training:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        if was_training:
            model.train()

def watch(model, token_ids, parts, look):
    """Run token_ids (B, T) through the model; returns what `look(part, inputs, output)` gives for each of the parts."""
    seen = []
    with inference(model), contextlib.ExitStack() as hooks:
        for part in parts:
            hooks.enter_context(part.register_forward_hook(lambda *what: seen.append(look(*what))))
        model(token_ids)
    return seen

def trace_shapes(model, token_ids):
    """Run token_ids (B, T) through the model; returns [(name of a part, shape of its output), ...] on the way."""
    names = {part: name for name, part in model.named_modules()}
    parts = [model.tok_emb, model.pos_emb, *model.trf_blocks, model.final_norm, model.out_head]
    return [("token_ids", tuple(token_ids.shape)),
            *watch(model, token_ids, parts, lambda part, _, output: (names[part], tuple(output.shape)))]

def count_parameters(model):
    """How many numbers each part of the model has to learn: {name: count}; shared ones count once."""
    counts = Counter()
    for name, parameter in model.named_parameters():  # gives a shared one once
        counts[name.split(".")[0]] += parameter.numel() * parameter.requires_grad
    return counts

# ═══ Step 8: greedy generation ═══════════════════════════════════════════════════════════════════
# To write, we ask for the likeliest next token, append it, and ask again. That is all. The untrained
# model answers with noise, but it answers. (Step 13 does the same faster, and with some chance.)

def generate_text_simple(model, idx, max_new_tokens, context_size):
    """Append `max_new_tokens` greedily chosen tokens to idx (B, T); the model sees the last `context_size`."""
    for _ in range(max_new_tokens):
        idx_cond = idx[:, -context_size:]
        with torch.no_grad():
            logits = model(idx_cond)[:, -1, :]                     # (B, vocabulary): only the last place counts
        idx_next = torch.argmax(logits, dim=-1, keepdim=True)      # (B, 1)
        idx = torch.cat([idx, idx_next], dim=1)                    # (B, T + 1)
    return idx

# ═══ Step 9: the loss before training, and recall ════════════════════════════════════════════════
# How wrong is the model? For each exercise we take the probability p that it gave to the token that
# really came, and note -ln(p): 0 for a sure hit, more for a surprise. The mean is the cross-entropy
# loss. Who guesses blindly among V tokens gives each 1/V and has a loss of ln(V); an untrained
# model must come out near that, or something is wrong with it.
#
# We measure it on the training text and on the end of the text, which the model never practises on.

def mean_loss(model, token_ids, max_windows=32):
    """Mean cross-entropy over token_ids (N,), in nats per token; None if N < 2.
    The windows do not overlap; of more than `max_windows`, as many are taken at even distances."""
    if len(token_ids) < 2:
        return None
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
WORD, WORD_START = re.compile(r"\S+"), re.compile(r"(?<!\S)\S")

def sentence_starts(text):
    """The places in the text where a sentence begins."""
    return [match.end() for match in SENTENCE_START.finditer(text)]

def recall_exercises(text, max_sentences=1000):
    """[(first five words, the 80 characters that follow)] of the sentences that have 8 words or more."""
    starts, exercises = sentence_starts(text), []
    for start, end in zip(starts, starts[1:] + [len(text)]):
        words = [match.end() for match in WORD.finditer(text, start, end)]
        if len(words) >= 8:
            exercises.append((text[start:words[4]], text[words[4]:words[4] + 80]))
    every = math.ceil(len(exercises) / max_sentences) or 1
    return exercises[::every]

def measure_recall(model, tokenizer, text, max_sentences=1000):  # by `generate`, which comes in step 13
    """The share, 0 to 1, of the sentences of `text` that greedy generation continues verbatim for 80
    characters, given their first five words alone; 0.0 if no sentence has 8 words. A text with more
    than `max_sentences` is tested on as many or fewer, at even distances."""
    exercises, same_length, hits = recall_exercises(text, max_sentences), defaultdict(list), 0
    for prompt, continuation in exercises:
        ids = tokenizer.encode(prompt)
        same_length[len(ids)].append((ids, tokenizer.decode(ids), continuation))
    for group in same_length.values():  # prompts of one length make a batch
        rows = [list(ids) for ids, _, _ in group]
        for column in generate(model, torch.tensor(rows, device=model.out_head.weight.device), max_new_tokens=320):
            for row, token in zip(rows, column.tolist()):
                row.append(token)
            texts = [tokenizer.decode(row)[len(prompt):] for row, (_, prompt, _) in zip(rows, group)]
            if all(len(text) >= 80 + 4 or not target.startswith(text.rstrip("\ufffd")[:80])  # the last character may
                   for text, (_, _, target) in zip(texts, group)):                           # lack a byte as yet
                break
        hits += sum(text.startswith(target) for text, (_, _, target) in zip(texts, group))
    return hits / max(len(exercises), 1)

# ═══ The machine: device, precision, memory, processes ═══════════════════════════════════════════
# This section may be skipped on a first reading. It is not about what is calculated, but where: on
# which device, in which precision, and by how many processes. Started by torchrun, several of them
# share the work: each has the whole model and takes its rows of every batch, and their gradients are
# added up. So they all take the same step, the one that a single process would take.

RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets these

def sum_over_processes(tensors):
    """Replace each tensor, in place, by its sum over all processes; returns them."""
    if RANKS > 1:
        together = torch.cat([tensor.flatten() for tensor in tensors])  # one long message takes less than many short
        torch.distributed.all_reduce(together)
        for tensor, part in zip(tensors, together.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(part.view_as(tensor))
    return tensors

def first_decides(decide):
    """What `decide()` returns, or raises, in the first process, which alone calls it and tells the others."""
    try:
        answer = [decide() if RANK == 0 else None]
    except (OSError, ValueError) as error:
        answer = [error]
    if RANKS > 1:
        torch.distributed.broadcast_object_list(answer)
    if isinstance(answer[0], Exception):
        raise answer[0]
    return answer[0]

def choose_device(name="auto"):
    """A torch.device: "cpu", "cuda", "mps", or for "auto" CUDA where there is one, else the CPU."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    check(name in ("cpu", "cuda", "mps"), f"the device must be auto, cpu, cuda or mps, not {name!r}")
    check(name == "cpu" or getattr(torch.backends, name).is_built() and getattr(torch, name).is_available(),
          f"there is no {name} device on this machine: leave out --device, or give cpu")
    if name != "cuda":
        return torch.device(name)
    torch.set_float32_matmul_precision("high")  # TF32, with 11 bits, for the products that stay in float32
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cuda", torch.cuda.current_device())

def use_bf16(device, precision):
    """Whether to calculate in bfloat16, with 8 bits of precision instead of 24: for precision "auto", if the
    machine has instructions for it, which makes it much faster."""
    able = (torch.cpu.get_capabilities() if device.type == "cpu" else
            {"cuda": device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)})
    fast = any(able.get(name) for name in ("avx512_bf16", "amx_bf16", "cuda"))
    return precision == "bf16" or precision == "auto" and fast

def autocast(device, precision):
    """Within this, matrix products run in bfloat16 if `use_bf16` says so, while the weights stay in float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=use_bf16(device, precision))

def compile_model(model, token_ids, log):
    """The model made faster by torch.compile; where that fails, as for want of a C++ compiler, the model as it is."""
    compiled = torch.compile(model)
    try:
        compiled(token_ids)
    except Exception as error:  # whatever a compiler comes up with
        log(f"note: the model could not be compiled ({type(error).__name__}), so it is trained as it is")
        return model
    return compiled

def memory_gigabytes():
    """The memory of this machine, infinite where we cannot ask."""
    pages = hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names and os.sysconf("SC_PHYS_PAGES")
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e9 if pages else math.inf

def training_gigabytes(config, train_config):
    """About how much memory it takes to train: the weights, and what a step keeps for its way back."""
    weights = 16 * config.rough_size  # 4 bytes each for weight, gradient, and AdamW's two means
    tokens = config.context_length * math.ceil(train_config.batch_size / train_config.accumulate / RANKS)
    per_layer = 40 * config.emb_dim + 8 * config.n_heads * config.context_length  # the latter for attention
    return 0.4 + (weights + tokens * (config.n_layers * per_layer + 16 * config.vocab_size)) / 1e9  # 0.4: torch itself

# ═══ Step 10: training ═══════════════════════════════════════════════════════════════════════════
# Now the model practises: take a batch of windows, compute the loss, ask for every weight in which
# direction the loss falls (the gradient), let AdamW take a small step that way. Some hundred times,
# and the noise turns into the story.
#
# Which windows? If they always start at the same places, the model learns to go on from there and is
# lost elsewhere. So an epoch covers the text once, but from a new offset each time. And we practise
# what will be asked for: a prompt begins at place 0 with a word, nothing before it, not even the
# space that the word has inside a text (" king" and "king" are different tokens). So a part of each
# batch are openings: the text from a sentence or from any word on, encoded by itself, as a prompt is.
#
# Batch 17 of a seed is always the same, whatever came before it: every random choice has a generator
# of its own. So training that was interrupted can go on as if nothing had been.

USUAL_EPOCHS = 20     # readings of the text if none are asked for
FEWEST_STEPS = 150    # a text of a few sentences is read more often, to make this many steps
SENTENCE_SHARE = 0.8  # of the openings; the others begin at any word
IGNORED = -100        # as a target: what F.cross_entropy leaves out

def random_numbers(*names):
    """A generator for each combination of seed, purpose and number, independent of the others."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(repr(names).encode()).digest()[:7], "big"))

@functools.lru_cache(maxsize=4)
def shuffled(count, *names):
    return torch.randperm(count, generator=random_numbers(*names))

def deal(count, hand, turn, *names):
    """Shuffle the numbers below `count`, deal `hand` at a time, shuffle anew when all are dealt; gives hand `turn`."""
    turns = math.ceil(count / max(hand, 1))
    return shuffled(count, *names, turn // turns)[(turn % turns * hand + torch.arange(hand)) % count]

class TrainingBatches:
    """`batches[step]` is the pair (inputs, targets) of a step, (B, T) token ids each.
    `token_ids` (N,) and `text`: the training text in both forms; without `text` there are no openings."""

    def __init__(self, token_ids, context_length, config, text="", tokenizer=None):
        self.windows = SlidingWindowDataset(token_ids, context_length)  # one at every offset
        self.length, self.seed, self.text, self.tokenizer = context_length + 1, config.seed, text, tokenizer
        self.stride = min(config.stride or context_length, len(self.windows))
        self.windows_per_epoch = math.ceil(len(self.windows) / self.stride)
        n_openings = int(config.batch_size * config.openings) if text else 0
        self.n_windows, self.n_sentences = config.batch_size - n_openings, round(n_openings * SENTENCE_SHARE)
        self.n_words = n_openings - self.n_sentences
        self.steps_per_epoch = math.ceil(self.windows_per_epoch / self.n_windows)
        self.sentences = torch.tensor(sentence_starts(text) or [0])

    def __getitem__(self, step):
        epoch = step // self.steps_per_epoch
        offset = torch.randint(self.stride, (1,), generator=random_numbers(self.seed, "offset", epoch))
        order = deal(self.windows_per_epoch, self.n_windows, step, self.seed, "windows")
        inputs, targets = self.windows[(order * self.stride + offset) % len(self.windows)]
        starts = self.sentences[deal(len(self.sentences), self.n_sentences, step, self.seed, "sentences")].tolist()
        anywhere = torch.rand(self.n_words, generator=random_numbers(self.seed, "words", step)) * len(self.text)
        starts += [(WORD_START.search(self.text, int(place)) or WORD_START.search(self.text)).start()
                   for place in anywhere.tolist()]
        openings = torch.tensor([self.opening(start) for start in starts], dtype=torch.long).view(-1, self.length)
        return torch.cat([inputs, openings[:, :-1].clamp(min=0)]), torch.cat([targets, openings[:, 1:]])

    def opening(self, start):
        """The text from `start` as one window, filled up where the text ends before it."""
        ids, end = [], start
        while len(ids) <= self.length and end < len(self.text):  # one token more, for the last may be cut in two
            end = start + max(2 * (end - start), 8 * self.length)
            ids = self.tokenizer.encode(self.text[start:end])
        return ids[:self.length] + [IGNORED] * (self.length - len(ids))

@dataclass
class Run:
    """A model with all that belongs to it: what training works on and a checkpoint holds."""
    model: GPTModel
    tokenizer: WordTokenizer | BPETokenizer
    train_config: TrainConfig
    steps_per_epoch: int
    fingerprint: str                             # SHA-256 of the text
    step: int = 0                                # steps done
    history: list = field(default_factory=list)  # one dictionary per evaluation
    optimizer_state: dict | None = None

    @property
    def config(self):
        return self.model.config

    @property
    def epoch(self):
        return min(self.step, self.total_steps - 1) // self.steps_per_epoch + 1

    @property
    def total_steps(self):
        usual, asked = max(USUAL_EPOCHS * self.steps_per_epoch, FEWEST_STEPS), self.train_config
        return asked.max_steps or asked.epochs * self.steps_per_epoch or usual

def hash_text(text):
    """SHA-256 of a text, by which we know it again."""
    return text.sha256 if isinstance(text, TokenFile) else hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()

def encode_split(text, tokenizer, val_fraction):
    """(training text, its token ids (N,), the validation ids (M,)); M is 0 where val_fraction is 0."""
    if isinstance(text, TokenFile):  # has only ids; these stay on the disk
        check(text.tokenizer.tokens == tokenizer.tokens, f"{text.path} is not of the model's tokenizer")
        cut = len(text.ids) - int(len(text.ids) * val_fraction)
        return "", text.ids[:cut], text.ids[cut:]
    train_text, val_text = split_text(text, val_fraction)
    return train_text, *(torch.tensor(tokenizer.encode(part), dtype=torch.long) for part in (train_text, val_text))

def new_run(text, config=PRESETS["story"], train_config=TrainConfig(), tokenizer="auto", vocab_size=2048,
            full_vocab=False, device="auto", log=print):
    """An untrained model for a text (or a `TokenFile`). `tokenizer` is the kind, for `make_tokenizer`.
    A text too short for a validation split, or for the context, does without or gets a smaller one, and
    `log` a line that says so. Raises ValueError if there are fewer than 2 tokens."""
    tokenizer = first_decides(lambda: make_tokenizer(  # by one process, for a network may answer only some of them
        tokenizer, text, train_config.val_fraction, vocab_size, full_vocab, log))
    train_text, train_ids, val_ids = encode_split(text, tokenizer, train_config.val_fraction)
    if train_config.val_fraction and len(val_ids) <= config.context_length:
        log(f"note: the last {train_config.val_fraction:.0%} of the text do not fill one window of "
            f"{config.context_length} tokens, so there is no validation split: the model trains on the whole text")
        train_config = dataclasses.replace(train_config, val_fraction=0.0)
        train_text, train_ids, _ = encode_split(text, tokenizer, 0.0)
    check(len(train_ids) > 1, f"the text is too short, only {len(train_ids)} tokens: give five words or more")
    if len(train_ids) <= config.context_length:
        log(f"note: the text has only {len(train_ids)} tokens, so the context is not {config.context_length} "
            f"but {len(train_ids) - 1} tokens")
        config = dataclasses.replace(config, context_length=len(train_ids) - 1)
    config = dataclasses.replace(config, vocab_size=tokenizer.vocab_size)
    gigabytes = training_gigabytes(config, train_config)
    check(gigabytes < memory_gigabytes(), f"this model takes {gigabytes:,.1f} GB of memory to train, and the machine "
          f"has {memory_gigabytes():,.1f}: make it smaller by --emb-dim, --n-layers, --context-length or --batch-size, "
          "or calculate each batch in parts, by --accumulate")
    torch.manual_seed(train_config.seed)
    model = GPTModel(config).to(choose_device(device))
    batches = TrainingBatches(train_ids, config.context_length, train_config, train_text, tokenizer)
    return Run(model, tokenizer, train_config, batches.steps_per_epoch, hash_text(text))

# How large a step? Too large at first, and the random weights are thrown about; so the learning rate
# rises over some steps (warm-up). Too large at the end, and the model jumps around the best place; so
# it falls, along half a cosine, to nothing.

def learning_rate(step, total_steps, config):
    """The learning rate of a step, 0 <= step < total_steps."""
    warmup = min(config.warmup_steps, total_steps // 5)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    return config.learning_rate * (1 + math.cos(math.pi * (step - warmup) / (total_steps - warmup))) / 2

def new_optimizer(model, config):
    """AdamW: each weight moves by the mean of its last gradients, divided by their usual size, and is
    pulled towards zero by `weight_decay`, if it is part of a matrix (Loshchilov & Hutter 2019)."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
              {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)

def check_finite(number, step):
    check(math.isfinite(number), f"loss or gradient became {number} at step {step}, so training stops; the last "
          "checkpoint stays as it is. Try a smaller --learning-rate, or --precision fp32")

def training_step(run, forward, optimizer, inputs, targets):
    """One step of AdamW on a batch, (B, T) each; returns the loss before it. Raises ValueError if it is not finite.
    `forward` is the model, or what it was compiled to. The loss is a mean over all exercises of the batch, so
    it does not matter in how many parts, and by how many processes, its sum is calculated."""
    config, device, parameters = run.train_config, run.model.out_head.weight.device, list(run.model.parameters())
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(run.step, run.total_steps, config)
    torch.manual_seed(random_numbers(config.seed, "dropout", run.step, RANK).initial_seed())
    exercises, loss = (targets != IGNORED).sum().item(), torch.zeros((), device=device)
    parts = (ids[RANK::RANKS].to(device).tensor_split(config.accumulate) for ids in (inputs, targets))
    for part, answers in zip(*parts):
        with autocast(device, config.precision):
            logits = forward(part).flatten(0, 1)
            share = F.cross_entropy(logits, answers.flatten(), ignore_index=IGNORED, reduction="sum") / exercises
        share.backward()
        loss += share.detach()
    sum_over_processes([loss, *(p.grad for p in parameters if p.requires_grad)])
    loss, norm = torch.stack([loss, nn.utils.clip_grad_norm_(parameters, config.grad_clip)]).tolist()
    check_finite(loss + norm, run.step)
    optimizer.step()
    optimizer.zero_grad()
    return loss

HISTORY = {"step", "epoch", "tokens", "train_loss", "val_loss", "recall", "prompt", "sample"}  # of an entry
MILESTONES = (0, 0.02, 0.05, 0.2, 1)  # shares of the training after which we look in any case, to see it learn

def train(run, text, log=print, save=lambda run: None, stop=lambda: False, prompt=None, live=lambda line: None,
          compiled=False):
    """Train `run` on `text` from `run.step` to `run.total_steps`, or until `stop()` is true after a step.
    Every `eval_every` steps, at the milestones and at the end, the losses and a continuation of `prompt` (the
    text's first words) are added to `run.history` and told to `log`; `live` is told of each step. `save(run)`
    is called at the end and after evaluations, but not so often as to take over 2 % of the time. `compiled`:
    let torch.compile make the model faster first, if it can. Raises ValueError if the loss is not finite."""
    model, config, device = run.model, run.train_config, run.model.out_head.weight.device
    check(config.batch_size >= config.accumulate * RANKS, f"{config.batch_size} windows in a step are too few for "
          f"{config.accumulate * RANKS} parts: give a larger --batch-size or fewer parts")
    train_text, train_ids, val_ids = encode_split(text, run.tokenizer, config.val_fraction)
    batches = TrainingBatches(train_ids, run.config.context_length, config, train_text, run.tokenizer)
    prompt = prompt or " ".join(run.tokenizer.decode(train_ids[:200].tolist()).split()[:5])
    optimizer = new_optimizer(model, config)
    if run.optimizer_state:
        optimizer.load_state_dict(run.optimizer_state)
    model.train()
    with autocast(device, config.precision):
        part = batches[0][0][RANK::RANKS].tensor_split(config.accumulate)[0].to(device)
        forward = compile_model(model, part, log) if compiled else model
    milestones = {round(share * run.total_steps) for share in MILESTONES}
    seconds, steps_timed, next_save, due = 0.0, 0, 0.0, False
    while True:
        last = run.step >= run.total_steps
        look = last or run.step % config.eval_every == 0 or run.step in milestones
        if look and run.step not in [entry["step"] for entry in run.history]:
            with autocast(device, config.precision):
                losses = {"train_loss": mean_loss(model, train_ids), "val_loss": mean_loss(model, val_ids)}
            check_finite(losses["train_loss"], run.step)
            recall = measure_recall(model, run.tokenizer, train_text[:100_000], 25) if train_text else None
            run.history.append({"step": run.step, "epoch": run.step / run.steps_per_epoch, **losses, "recall": recall,
                                "tokens": run.step * config.batch_size * run.config.context_length, "prompt": prompt,
                                "sample": "".join(generate_text(model, run.tokenizer, prompt, 24))})
            log_progress(run, seconds / max(steps_timed, 1), log)
            due = run.step > 0 and time.perf_counter() >= next_save
        last = last or sum_over_processes([torch.tensor(float(stop()))])[0] > 0  # all stop after the same step
        if last or due:
            began, run.optimizer_state = time.perf_counter(), optimizer.state_dict()
            save(run)
            next_save, due = time.perf_counter() + 50 * (time.perf_counter() - began), False
        if last:
            model.eval()
            return
        began = time.perf_counter()
        loss = training_step(run, forward, optimizer, *batches[run.step])
        run.step, seconds, steps_timed = run.step + 1, seconds + time.perf_counter() - began, steps_timed + 1
        live(f"epoch {run.epoch}, step {run.step} of {run.total_steps}, loss {loss:.3f}"
             f"{pace(run, seconds / steps_timed)}")

def pace(run, seconds_per_step):
    """How fast it goes and how long it will take, in words; nothing at all if no step was timed."""
    if not seconds_per_step:
        return ""
    left = round((run.total_steps - run.step) * seconds_per_step)
    tokens = run.train_config.batch_size * run.config.context_length / seconds_per_step
    return f", {tokens:,.0f} tokens/s, {left // 60}:{left % 60:02} left"

def log_progress(run, seconds_per_step, log):
    """Tell `log` about the last entry of the history."""
    now = run.history[-1]
    val_loss = "" if now["val_loss"] is None else f", Val loss {now['val_loss']:.3f}"
    recall = "" if now["recall"] is None else f", recall {now['recall']:.0%}"
    log(f"Ep {run.epoch} (Step {run.step:06d}): Train loss {now['train_loss']:.3f}{val_loss}{recall}"
        f"{pace(run, seconds_per_step)}")
    log("    " + " ".join(f"{now['prompt']} ...{now['sample']}".split()))
    rises = [now["val_loss"] > before["val_loss"] and now["train_loss"] < before["train_loss"]
             for before, now in itertools.pairwise(run.history) if now["val_loss"] is not None]
    if rises and rises[-1] and not any(rises[:-1]):
        log("    Validation loss rises while training loss falls: the model is memorising. With one short story that\n"
            "    is normal, and wanted: too little text to learn the language from, but enough to know it by heart.")

# ═══ Step 11: save and load ══════════════════════════════════════════════════════════════════════
# All that the run is goes into one file: settings, tokenizer, weights, the optimizer's memory, the
# history. Nothing else is needed to generate, not even the story. The file is written beside the old
# one and takes its place when it is whole, so a crash at any moment leaves a good one behind. Its last
# 32 bytes are the SHA-256 of the others, so a damaged file is recognised, not believed. It is read
# with `weights_only`: that makes tensors and plain values, and never runs code from the file.

FORMAT, DIGEST_BYTES = 2, 32

def tokenizer_state(tokenizer):
    """A tokenizer as plain values, from which `tokenizer_from_state` makes it again."""
    return {"kind": tokenizer.kind, "tokens": [token if isinstance(token, str) else token.decode("latin-1")
                                               for token in tokenizer.tokens]}

def tokenizer_from_state(state):
    tokens, kind = state["tokens"], state["kind"]
    return (WordTokenizer(tokens) if kind == "word" else
            BPETokenizer([token.encode("latin-1") for token in tokens], kind))

def save_checkpoint(path, run):
    """Write `run` to `path` in one go: if that fails, OSError is raised and the old file is still there."""
    temporary = Path(f"{path}.tmp")
    state = {"format": FORMAT, "config": dataclasses.asdict(run.config), **tokenizer_state(run.tokenizer),
             "train_config": dataclasses.asdict(run.train_config), "steps_per_epoch": run.steps_per_epoch,
             "fingerprint": run.fingerprint, "step": run.step, "history": run.history,
             "model": run.model.state_dict(), "optimizer_state": run.optimizer_state}
    try:
        with open(temporary, "w+b") as file:
            torch.save(state, file)
            file.seek(0)
            file.write(hashlib.file_digest(file, "sha256").digest())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # a full disk is a RuntimeError if torch comes upon it
        raise OSError(f"{path} could not be written ({error}): make room, or give another --model") from error
    finally:
        temporary.unlink(missing_ok=True)  # there is none any more if all went well

def check_room(path, run):
    """Notice before the training, not after it, that a checkpoint cannot be written. Raises OSError, ValueError."""
    check(not Path(path).is_dir(), f"{path} is a folder: give the path of a file with --model")
    needed = 12 * count_parameters(run.model).total()  # the weights and AdamW's two means, 4 bytes each
    try:
        with open(f"{path}.tmp", "wb"):
            free = shutil.disk_usage(Path(path).absolute().parent).free
        os.remove(f"{path}.tmp")
    except OSError as error:
        raise OSError(f"{path} cannot be written ({error}): give another --model") from error
    check(free > needed, f"{path} takes {needed / 1e6:,.0f} MB, and {free / 1e6:,.0f} MB are free: make room, "
          "or give another --model")

def load_checkpoint(path, device="cpu"):
    """The `Run` saved at `path`, its `.model` in eval mode.
    Raises OSError if there is no such file, ValueError if it is damaged or not one of ours."""
    if not Path(path).is_file():
        raise OSError(f"there is no model at {path}: train one first (python story_llm.py train)")
    device = choose_device(device)
    try:
        with open(path, "rb") as file:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as contents, memoryview(contents) as view:
                whole = hashlib.sha256(view[:-DIGEST_BYTES]).digest() == view[-DIGEST_BYTES:]
            check(whole, "its checksum is wrong")
            size = os.fstat(file.fileno()).st_size
            check(sum(entry.file_size for entry in zipfile.ZipFile(file).infolist()) <= size, "it is packed")
            file.seek(0)
            state = torch.load(file, map_location=device, weights_only=True)
        check(state["format"] == FORMAT, f"it has format {state['format']}, and this program reads format {FORMAT}")
        tokenizer, config, weights = tokenizer_from_state(state), GPTConfig(**state["config"]), state["model"]
        check(config.vocab_size == tokenizer.vocab_size and 4 * config.rough_size < size, "its parts do not fit")
        model = GPTModel(config).to(device)
        shapes, found = ({name: (t.shape, t.dtype) for name, t in w.items()} for w in (model.state_dict(), weights))
        check(shapes == found, "its weights are not those of its settings")
        check(all(type(count) is int and count >= 0 for count in (state["step"], state["steps_per_epoch"] - 1)) and
              all(HISTORY == {*entry} for entry in state["history"]),
              "its counts or its history are not right")
        model.load_state_dict(weights)
        return Run(model.eval(), tokenizer, TrainConfig(**state["train_config"]), state["steps_per_epoch"],
                   state["fingerprint"], state["step"], state["history"], state["optimizer_state"])
    except OSError:
        raise
    except Exception as error:  # a file that is not ours may break anything in here
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is damaged or no checkpoint of story_llm ({reason}): train again, or give another "
                         "--model") from error

# ═══ Step 12: loss curves ════════════════════════════════════════════════════════════════════════
# Two curves tell what happened. If both fall, the model learns; if training falls and validation rises,
# it learns this text by heart; if both stay near ln(vocabulary), it learns nothing. Below them, how
# the recall grows, as measured on some of the sentences.

def check_picture(path):
    check(Path(path).suffix in (".png", ".svg", ".pdf"), f"a picture ends in .png, .svg or .pdf, not like {path}")
    check(Path(path).absolute().parent.is_dir(), f"there is no folder for the picture {path}")

def save_figure(figure, path):
    """Write a figure to `path`, if given, and return it; for characters that the fonts lack, there are boxes."""
    if path is not None:
        check_picture(path)
        with warnings.catch_warnings(action="ignore", category=UserWarning):
            figure.savefig(path, dpi=150)
    return figure

def plot_losses(history, vocab_size, path=None):
    """Draw the losses of a history, and recall if it was measured; epochs below, tokens seen above.
    To `path` (.png, .svg, .pdf), or to nowhere if it is None. Returns the figure, which a notebook shows."""
    from matplotlib.figure import Figure
    check(len(history) > 0, "there is no history to draw: train first")
    epochs, tokens, recall = ([h[name] for h in history] for name in ("epoch", "tokens", "recall"))
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes, below = figure.subplots(2, height_ratios=(4, 1), sharex=True)
    axes.plot(epochs, [h["train_loss"] for h in history], color="#0072b2", marker="o", markersize=4, label="training")
    if history[-1]["val_loss"] is not None:
        best = min(history, key=lambda h: h["val_loss"])
        axes.plot(epochs, [h["val_loss"] for h in history], color="#d55e00", marker="s", markersize=4,
                  linestyle="--", label="validation")
        axes.plot(best["epoch"], best["val_loss"], color="#d55e00", marker="o", markersize=12, fillstyle="none",
                  linestyle="none", label=f"best validation loss, at step {best['step']}")
    axes.axhline(math.log(vocab_size), color="#555555", linestyle=":", label=f"blind guess, ln({vocab_size:,})")
    axes.set(ylabel="loss (nats per token)", ylim=(0, None))
    axes.legend()
    per_epoch = tokens[-1] / epochs[-1] if epochs[-1] else 1.0
    above = axes.secondary_xaxis("top", functions=(lambda e: e * per_epoch, lambda t: t / per_epoch))
    above.set_xlabel("tokens seen")
    above.xaxis.set_major_formatter("{x:,.0f}")
    if None in recall:
        below.remove()
        axes.tick_params(labelbottom=True)
    else:
        below.plot(epochs, recall, color="#009e73", marker="D", markersize=4)
        below.set(ylabel="recall", ylim=(-0.05, 1.05), yticks=(0, 1))
        below.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    for each in figure.axes:
        each.grid(alpha=0.25)
    figure.axes[-1].set_xlabel("epochs")
    return save_figure(figure, path)

# ═══ Step 13: inference from the saved file ══════════════════════════════════════════════════════
# `generate_text_simple` reads the whole text again for each new token. But the keys and values of
# earlier tokens never change, since no token looks ahead. So we keep them in a cache and feed only
# the new token. When the context is full, the window slides, every token gets a new place, and
# all is computed afresh.
#
# Always the likeliest token: that is greedy, and right for a story known by heart. With a temperature
# the choice is by chance: the logits are divided by it before the softmax, so that below 1 the
# likely become likelier, above 1 all become more alike. `top_k` leaves only the k best to choose from.

def check_choice(temperature, top_k):
    check(0 <= temperature < math.inf, f"temperature must be a number, 0 or more, not {temperature}")
    check(top_k is None or top_k >= 1, f"top_k must be 1 or more, not {top_k}")

def softmax_of(logits, temperature=1.0, top_k=None):
    """logits (B, vocabulary) to probabilities (B, vocabulary); of all but the `top_k` likeliest, 0."""
    if top_k:
        kth_best = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth_best, -math.inf)
    return torch.softmax(logits.float() / temperature, dim=-1)

def choose_token(logits, temperature=0.0, top_k=None, generator=None):
    """logits (B, vocabulary) to token ids (B,): the likeliest, or for temperature > 0 one drawn by chance."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    return torch.multinomial(softmax_of(logits, temperature, top_k), 1, generator=generator).squeeze(1)

def generate(model, token_ids, max_new_tokens, temperature=0.0, top_k=None, generator=None):
    """Continue token_ids (B, T), T >= 1; yields one tensor (B,) of new tokens at a time.
    At temperature 0 the same tokens as `generate_text_simple`, only faster."""
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

# For one token, a large model reads all its weights once, and that takes the time, not the arithmetic. So
# we halve them (bfloat16), and on a CPU lay them out in the order in which its kernels read them best.

class PackedLinear(nn.Module):
    """What an nn.Linear does, for inference on a CPU: weights as oneDNN wants them (half as fast again or more)."""

    def __init__(self, linear):
        super().__init__()
        self.weight, self.bias = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 1), linear.bias

    def forward(self, x):
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")

def pack(model, precision="auto"):
    """Prepare a large model for generating, in place: in bfloat16 if `use_bf16`. It can not be trained any more."""
    device = model.out_head.weight.device
    if count_parameters(model).total() > 50e6:
        model.to(torch.bfloat16 if use_bf16(device, precision) else torch.float32)
        onednn = device.type == "cpu" and torch.backends.mkldnn.is_available()
        if onednn and (model.out_head.weight.dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()):
            for name, part in list(model.named_modules()):
                if isinstance(part, nn.Linear):
                    model.set_submodule(name, PackedLinear(part))

def generate_text(model, tokenizer, prompt, max_new_tokens, temperature=0.0, top_k=None, seed=0):
    """Continue a prompt; yields pieces of text as they come, never half a character."""
    check(max_new_tokens >= 0, f"max_new_tokens must be 0 or more, not {max_new_tokens}")
    check_choice(temperature, top_k)
    ids = tokenizer.encode(prompt)
    check(ids, f"the prompt {prompt!r} is empty: give the first words of what the model is to write")
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

# ═══ Looking inside ══════════════════════════════════════════════════════════════════════════════
# Two questions to a trained model: whom did each token look at (step 6), and which tokens did it think
# of as the next one? How sure was it, and what do temperature and top-k make of that (step 13)?

def attention_maps(model, token_ids):
    """The attention weights of all layers and heads for token_ids (1, T): (layers, H, T, T)."""
    maps = watch(model, token_ids, [block.att for block in model.trf_blocks],
                 lambda part, inputs, _: attention(*part.queries_keys_values(inputs[0]))[1][0])
    return torch.stack(maps).float().cpu()

def plot_attention(maps, pieces, path=None, layer=None, head=None):
    """Draw `attention_maps` for the T tokens `pieces`; of one `layer` or `head` alone (from 1), if given."""
    from matplotlib.figure import Figure
    chosen = [range(count) if one is None else [one - 1] for one, count in zip((layer, head), maps.shape)]
    for name, one, count in zip(("layer", "head"), (layer, head), maps.shape):
        check(one is None or 1 <= one <= count, f"the {name} must be 1 to {count}, not {one}")
    rows, columns = map(len, chosen)
    side = max(1.6, len(pieces) * (0.28 if rows * columns == 1 else 0.16))  # inches
    figure = Figure(figsize=(columns * side + 2, rows * (side + 0.3) + 1), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    future = torch.ones(maps.shape[-2:], dtype=torch.bool).triu(1)
    for i, j in itertools.product(range(rows), range(columns)):
        weights = maps[chosen[0][i], chosen[1][j]].masked_fill(future, math.nan)
        image = grid[i, j].imshow(weights.tolist(), vmin=0, vmax=1, cmap="Blues")
        grid[i, j].set_title(f"layer {chosen[0][i] + 1}, head {chosen[1][j] + 1}", fontsize=9)
        grid[i, j].set_xticks(range(len(pieces)), pieces, rotation=90, fontsize=7, parse_math=False)
        grid[i, j].set_yticks(range(len(pieces)), pieces, fontsize=7, parse_math=False)
        grid[i, j].spines[:].set_visible(False)
    figure.supylabel("this token ...", fontsize=9)
    figure.supxlabel("... looks at this one", fontsize=9)
    figure.colorbar(image, ax=grid, shrink=0.6, label="attention weight; each row adds up to 1")
    return save_figure(figure, path)

def next_tokens(model, token_ids, count=10, temperature=1.0, top_k=None):
    """The likeliest next tokens after token_ids (1, T): [(id, logit, probability, the same as they are drawn), ...]."""
    with inference(model):
        logits = model(token_ids[:, -model.config.context_length:])[:, -1].float()
    best = logits[0].topk(min(count, logits.shape[-1])).indices
    columns = [values[0, best].tolist() for values in
               (logits, softmax_of(logits), softmax_of(logits, temperature, top_k))]
    return list(zip(best.tolist(), *columns))

def plot_next_tokens(pieces, columns, path=None):
    """Draw bars for the tokens `pieces`; `columns`: {what the bars show: a probability for each}."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(7, 0.4 * len(pieces) + 1), layout="constrained")
    axes = figure.add_subplot(xlabel="probability", xlim=(0, 1.15 * max(map(max, columns.values()))))
    height = 0.8 / len(columns)
    for i, (label, values) in enumerate(columns.items()):
        places = [place + (i - (len(columns) - 1) / 2) * height for place in range(len(pieces))]
        bars = axes.barh(places, values, height, color=("#0072b2", "#e69f00")[i % 2], label=label)
        axes.bar_label(bars, [f"{value:.1%}" if value else "" for value in values], padding=3, fontsize=8)
    axes.set_yticks(range(len(pieces)), pieces, parse_math=False)
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right")
    return save_figure(figure, path)

# ═══ A library instead of a story ════════════════════════════════════════════════════════════════
# This section may be skipped, too. A text of a gigabyte has no place in memory as a list of tokens. So
# `tokenize` writes its token ids to a file, block by block, two bytes each (four if the vocabulary is
# larger than 65,536), and nothing else: the format of nanoGPT's train.bin. A second file beside it tells
# the tokenizer. Training maps the file into memory: the disk is read where a window is taken.

BLOCK = 1 << 20  # characters that are encoded in one go
CUT = re.compile(r"(?<=\S)\s(?=\S)")  # a single white space: no token reaches across the place before it

def text_blocks(file, size):
    """The text of an open file in blocks of about `size` characters, cut so that tokens stay as in the whole."""
    rest = ""
    while more := file.read(size):
        rest += more
        cuts = [match.start() for match in CUT.finditer(rest, max(len(rest) - 1000, 0))]
        cuts += [len(rest)] * (not cuts and len(rest) >= 16 * size)  # a text without spaces is cut anywhere
        if cuts:
            yield rest[:cuts[-1]]
            rest = rest[cuts[-1]:]
    if rest:
        yield rest

def tokenize_file(path, out, kind="auto", vocab_size=2048, log=print, live=lambda line: None):
    """Write the token ids of the UTF-8 text file `path` to `out`, and its tokenizer to `out`.json.
    In memory that does not grow with the text. GPT-2's vocabulary is kept whole, another one is learned from
    the beginning of the text. Raises OSError or ValueError as `load_text` does. Returns the number of tokens."""
    check(kind != "word", "a file of tokens is for byte-pair encodings: give --tokenizer gpt2 or story")
    check(Path(out).suffix == ".bin", f"a file of tokens ends in .bin, not like {out}")
    check(Path(path).suffix != ".bin", f"{path} is a file of tokens: here, a text is needed")
    threads, digest, count, began = os.cpu_count() or 1, hashlib.sha256(), 0, time.perf_counter()
    try:
        with open(path, encoding="utf-8-sig") as file, open(f"{out}.tmp", "wb") as ids_file:
            beginning = file.read(LEARN_FROM)
            check(beginning.strip(), f"{path} is empty: there is nothing to tokenize")
            tokenizer = make_tokenizer(kind, beginning, 0.0, vocab_size, True, log)
            typecode = "H" if tokenizer.vocab_size <= 1 << 16 else "I"
            file.seek(0)
            blocks = text_blocks(file, BLOCK)
            while batch := list(itertools.islice(blocks, 2 * threads)):
                for ids in tokenizer.encoding.encode_ordinary_batch(batch, num_threads=threads):
                    data = array.array(typecode, ids).tobytes()
                    count += len(ids)
                    digest.update(data)
                    ids_file.write(data)
                done, speed = file.buffer.tell() / os.path.getsize(path), count / (time.perf_counter() - began)
                live(f"{done:.0%}, {count:,} tokens, {speed:,.0f} tokens/s")
        about = {"dtype": {"H": "uint16", "I": "uint32"}[typecode], "sha256": digest.hexdigest(),
                 **tokenizer_state(tokenizer)}
        Path(f"{out}.json").write_text(json.dumps(about))
        os.replace(f"{out}.tmp", out)
    except UnicodeDecodeError as error:
        raise ValueError(NOT_UTF8.format(path, error.reason)) from None
    finally:
        Path(f"{out}.tmp").unlink(missing_ok=True)
    return count

class TokenFile:
    """What `tokenize_file` wrote: `ids` (N,), mapped from the disk; the `tokenizer`; the file's `sha256`.
    It stands wherever a text stands. Raises OSError or ValueError if a file is missing or they do not fit."""

    def __init__(self, path):
        self.path = path
        try:
            about = json.loads(Path(f"{path}.json").read_text())
            self.tokenizer, self.sha256 = tokenizer_from_state(about), about["sha256"]
            dtype = {"uint16": torch.uint16, "uint32": torch.uint32}[about["dtype"]]
            with open(path, "rb") as file:
                whole = hashlib.file_digest(file, "sha256").hexdigest() == self.sha256
        except OSError as error:
            raise OSError(f"{error.filename} cannot be read: a file of tokens, and the .json beside it, are made by "
                          f"python story_llm.py tokenize --text story.txt --out {path}") from error
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}.json is not the description of a file of tokens ({error})") from error
        check(whole, f"{path} and {path}.json do not fit: make them anew by python story_llm.py tokenize")
        self.ids = torch.from_file(str(path), size=os.path.getsize(path) // dtype.itemsize, dtype=dtype)
        largest = max((part.long().max().item() for part in self.ids.split(1 << 23)), default=0)
        check(largest < self.tokenizer.vocab_size, f"{path} has tokens that its tokenizer ({path}.json) does not know")

# ═══ The command line ════════════════════════════════════════════════════════════════════════════
# One function per command. Each calls the parts of its step and prints what they return: results on
# stdout, notes on stderr. The tables at the end say which command has which options.

DEFAULT_TEXT, DEFAULT_PROMPT = Path(__file__).with_name("Short_Story.txt"), "Once Aadhan renounced his kingdom"

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # what could move a terminal's cursor, colour or title

def live(line):
    """One line that moves, on a terminal; nothing elsewhere."""
    if sys.stderr.isatty() and RANK == 0:
        print(f"\r\x1b[K{line[:shutil.get_terminal_size().columns - 1]}", end="", flush=True, file=sys.stderr)
        live.shown = bool(line)

live.shown = False

def log(message="", file=None, **options):
    """Print, from the first process only."""
    file = file or sys.stdout
    if live.shown:
        live("")
    if RANK == 0:
        print(CONTROL.sub("\ufffd", str(message)) if file.isatty() else message, flush=True, file=file, **options)

def note(message):
    log(message, file=sys.stderr)

def visible(piece):
    """A token's text on one line: spaces and line breaks as signs."""
    return CONTROL.sub("\ufffd", piece.replace("\n", "⏎")).replace(" ", "␣").replace("\t", "→")

def log_tokens(pieces):
    """Print the pieces of a text side by side: on two backgrounds in turn, in brackets where there are no colours."""
    if sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
        colours = itertools.cycle(("\x1b[30;46m", "\x1b[30;43m"))
        print("  " + "".join(next(colours) + visible(piece).replace("␣", " ") + "\x1b[0m" for piece in pieces))
    else:
        log("  " + "".join(f"[{visible(piece)}]" for piece in pieces))

def given(settings_class, args):
    """Those settings of a class that were given on the command line."""
    return {f.name: getattr(args, f.name) for f in dataclasses.fields(settings_class) if hasattr(args, f.name)}

def read_text(args):
    """The text of --text, or the file of tokens that it names."""
    return TokenFile(args.text) if Path(args.text).suffix == ".bin" else load_text(args.text)

def untrained_run(args, text):
    config = dataclasses.replace(PRESETS[args.preset], **given(GPTConfig, args))
    return new_run(text, config, TrainConfig(**given(TrainConfig, args)), args.tokenizer, args.entries,
                   args.full_vocab, args.device, note)

def saved_or_untrained_run(args):
    return untrained_run(args, read_text(args)) if args.untrained else load_checkpoint(args.model, args.device)

def resumed_run(args, text):
    """The saved run, to go on with; ValueError if text or settings are not those that it was begun with."""
    run = load_checkpoint(args.model, args.device)
    begun = {"text": run.fingerprint[:12], "tokenizer": run.tokenizer.kind,
             **dataclasses.asdict(run.config), **dataclasses.asdict(run.train_config)}
    wanted = {"text": hash_text(text)[:12], **given(GPTConfig, args), **given(TrainConfig, args)}
    if args.tokenizer != "auto":
        wanted["tokenizer"] = args.tokenizer
    if run.train_config.val_fraction == 0:  # what a short text took away then, it takes away again
        wanted.pop("val_fraction", None)
    if wanted.get("context_length", 0) > begun["context_length"] == len(encode_split(text, run.tokenizer, 0.0)[1]) - 1:
        del wanted["context_length"]
    if "epochs" in wanted:
        run.train_config = dataclasses.replace(run.train_config, max_steps=0)
    for name, value in wanted.items():
        check(value == begun[name] or name in ("epochs", "max_steps", "eval_every", "accumulate"),
              f"{args.model} was begun with {name} {begun[name]}, not {value}: "
              f"give the same --{name.replace('_', '-')} as then, or train anew without --resume")
    changes = {name: value for name, value in wanted.items() if hasattr(run.train_config, name)}
    run.train_config = dataclasses.replace(run.train_config, **changes)
    return run

def log_recall(run, text):
    val_fraction = run.train_config.val_fraction
    train_text = (split_text(text, val_fraction)[0] if isinstance(text, str) else
                  run.tokenizer.decode(encode_split(text, run.tokenizer, val_fraction)[1][:100_000].tolist()))
    total = len(recall_exercises(train_text))
    share = measure_recall(run.model, run.tokenizer, train_text)
    log(f"Recall {share:.1%}: {round(share * total)} of {total} sentences continued to the letter after five words"
        if total else "Recall: not measured, for no sentence of the text has 8 words")

def command_overview(args):
    log(__doc__.strip())

def show_tokenizer(tokenizer, text, prompt):
    """What a tokenizer makes of the text that it was made for, of a few words, and of a sentence with strange ones."""
    ids = tokenizer.encode(text)
    log(f"the text: {len(text):,} characters; {len(split_words(text)):,} words, marks and unusual spaces; "
        f"{len(ids):,} {tokenizer.kind} tokens\n"
        f"the vocabulary: {tokenizer.vocab_size:,} entries, of which the text uses {len(set(ids)):,}\n"
        f"the text, encoded and decoded, is the same again: {tokenizer.decode(ids) == text}")
    for sentence in (prompt or text[:200], "Thamarai bought a laptop <|endoftext|>"):
        ids = tokenizer.encode(sentence)
        log()
        log_tokens(tokenizer.decode([i]) or JOIN for i in ids)
        log(f"  encoded: {' '.join(map(str, ids))}\n  decoded: {tokenizer.decode(ids)}")

def command_words(args):
    train_text, _ = split_text(load_text(args.text), TrainConfig().val_fraction)
    tokenizer = WordTokenizer(build_vocabulary(train_text))
    log(f"some of the different pieces: {tokenizer.tokens[20::tokenizer.vocab_size // 12 + 1]}")
    show_tokenizer(tokenizer, train_text, args.prompt)

def command_bpe(args):
    text = load_text(args.text)
    tokenizer = make_tokenizer(args.tokenizer, text, vocab_size=args.entries, full_vocab=args.full_vocab, log=note)
    if tokenizer.kind == "story":
        log("the first merges, as they happen:")
        learn_byte_pairs(split_text(text, TrainConfig().val_fraction)[0], 256 + 13, lambda a, b, count: log(
            f"  {a.decode('latin-1')!r:>6} + {b.decode('latin-1')!r:<6} {count:,} times"))
    show_tokenizer(tokenizer, text, args.prompt)

def command_windows(args):
    text = read_text(args)
    run = untrained_run(args, text)
    _, token_ids, _ = encode_split(text, run.tokenizer, run.train_config.val_fraction)
    length, stride = run.config.context_length, run.train_config.stride or run.config.context_length
    windows = SlidingWindowDataset(token_ids, length, stride)
    log(f"{len(token_ids):,} tokens make {len(windows):,} windows of {length} tokens, {stride} tokens apart")
    for i in range(min(3, len(windows))):
        log(f"\nwindow {i}, its first tokens:")
        for name, ids in zip(("input", "target"), windows[i]):
            log(f"  {name:<8}" + "".join(f"{run.tokenizer.decode([t])!r:<13}" for t in ids[:6].tolist()).rstrip())

def command_model(args):
    text = read_text(args)
    run = untrained_run(args, text)
    _, token_ids, _ = encode_split(text, run.tokenizer, run.train_config.val_fraction)
    device = run.model.out_head.weight.device
    log(f"{run.config}\n\na window, twice, on its way through the untrained model:")
    for name, shape in trace_shapes(run.model, token_ids[:run.config.context_length].long().expand(2, -1).to(device)):
        log(f"  {name:<14} {shape}")
    counts = count_parameters(run.model)
    log("\nnumbers to learn:")
    for name, count in [*counts.items(), ("altogether", counts.total())]:
        count and log(f"  {name:<14} {count:>12,}")

def command_evaluate(args):
    text, named = read_text(args), args.model != OPTIONS["--model"]["default"]
    saved = (named or Path(args.model).exists()) and not args.untrained
    run = load_checkpoint(args.model, args.device) if saved else untrained_run(args, text)
    if saved and run.fingerprint != hash_text(text):
        note(f"note: {args.model} was trained on another text than {args.text}")
    _, train_ids, val_ids = encode_split(text, run.tokenizer, run.train_config.val_fraction)
    log(f"{f'{args.model}, after {run.step} steps of training' if saved else 'an untrained model'}:")
    with autocast(run.model.out_head.weight.device, run.train_config.precision):
        losses = {"Train loss": mean_loss(run.model, train_ids), "Val loss": mean_loss(run.model, val_ids)}
    losses[f"ln({run.config.vocab_size}), a blind guess"] = math.log(run.config.vocab_size)
    for name, loss in losses.items():
        if loss is not None:
            log(f"  {name:<24} {loss:.3f}")
    log_recall(run, text)

def command_tokenize(args):
    began = time.perf_counter()
    count = tokenize_file(args.text, args.out, args.tokenizer, args.entries, note, live)
    seconds = time.perf_counter() - began
    log(f"wrote {args.out}: {count:,} tokens in {seconds:.1f} s, {count / seconds:,.0f} tokens/s\n"
        f"wrote {args.out}.json: its tokenizer")

def command_train(args):
    text = read_text(args)
    run = (resumed_run if args.resume else untrained_run)(args, text)
    log(f"{run.tokenizer.kind} tokenizer, vocabulary {run.config.vocab_size:,}; "
        f"{count_parameters(run.model).total():,} parameters; {run.total_steps} steps; "
        f"about {training_gigabytes(run.config, run.train_config):.1f} GB of memory; "
        f"loss of a blind guess {math.log(run.config.vocab_size):.3f}")
    prompt = args.prompt or (DEFAULT_PROMPT if args.text == DEFAULT_TEXT else None)
    first_decides(lambda: check_room(args.model, run))
    check_picture(args.plot or "loss.png")
    asked = threading.Event()

    def ask(signum, frame):  # the first Ctrl-C asks to stop after this step, a second one stops at once
        asked.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    main_thread = threading.current_thread() is threading.main_thread()  # no other may ask for signals
    before = main_thread and signal.signal(signal.SIGINT, ask)
    try:
        train(run, text, log, lambda run: RANK or save_checkpoint(args.model, run), asked.is_set, prompt, live,
              args.compile)
    finally:
        main_thread and signal.signal(signal.SIGINT, before)
    if run.step < run.total_steps:
        again = shlex.join([*args.argv, *["--resume"] * (not args.resume)])
        note(f"stopped after step {run.step} of {run.total_steps}, saved {args.model}; to go on: "
             f"python story_llm.py {again}")
        raise KeyboardInterrupt
    log_recall(run, text)
    log(f"saved {args.model}")
    try:
        RANK or draw_losses(args, run)
    except Exception as error:  # the model is saved; a picture is not worth an error
        note(f"note: the losses could not be drawn: {error}")

def draw_losses(args, run):
    plot_losses(run.history, run.config.vocab_size, args.plot or "loss.png")
    log(f"drew {args.plot or 'loss.png'}")

def command_plot(args):
    run = load_checkpoint(args.model)
    if not args.samples:
        return draw_losses(args, run)
    text, at = read_text(args), {round(share * run.total_steps): share for share in MILESTONES}
    check(hash_text(text) == run.fingerprint, "the model was trained on another text: give that with --text")
    story = text if isinstance(text, str) else ""
    for entry in run.history:
        if entry["step"] in at:  # the beginning of the sample that is the story to the letter: in brackets
            prompt, sample = entry["prompt"], entry["sample"]
            known = max((n for n in range(len(sample) + 1) if prompt + sample[:n] in story), default=0)
            marked = f"[{sample[:known]}]" if sample[:known].strip() else sample[:known]
            log(f"{at[entry['step']]:4.0%}  " + " ".join(f"{prompt}{marked}{sample[known:]}".split()))

def prompt_of(args, run):
    """--prompt, or the one that the model was trained with an eye on."""
    return args.prompt if args.prompt is not None else run.history[-1]["prompt"] if run.history else DEFAULT_PROMPT

def prompt_tokens(args, run):
    """(the ids (1, T) of the prompt's last tokens, at most a context; the text of each)."""
    ids = run.tokenizer.encode(prompt_of(args, run))[-run.config.context_length:]
    check(ids, "the prompt is empty: give some words")
    device = run.model.out_head.weight.device
    return torch.tensor([ids], device=device), [visible(run.tokenizer.decode([i])) for i in ids]

def command_attention(args):
    run = load_checkpoint(args.model, args.device)
    ids, pieces = prompt_tokens(args, run)
    plot_attention(attention_maps(run.model, ids), pieces, args.plot or "attention.png", args.layer, args.head)
    log_tokens(pieces)
    log(f"drew {args.plot or 'attention.png'}")

def command_next(args):
    run = saved_or_untrained_run(args)
    ids, pieces = prompt_tokens(args, run)
    check_choice(args.temperature, args.top_k)
    if args.plot:
        check_picture(args.plot)
    temperature = args.temperature or 1.0
    found = next_tokens(run.model, ids, 10, temperature, args.top_k)
    drawn = f"temperature {temperature:g}" + f", top {args.top_k}" * bool(args.top_k)
    log_tokens(pieces)
    log(f"\n  {'next token':<16}{'logit':>7}{'softmax':>9}  {drawn}")
    names = [visible(run.tokenizer.decode([i])) for i, *_ in found]
    for name, (_, logit, probability, changed) in zip(names, found):
        log(f"  {name:<16}{logit:>7.2f}{probability:>9.2%}  {changed:>7.2%} {'█' * round(40 * changed)}")
    log(f"\ngreedy generation takes {names[0]!r}; with a temperature, one is drawn by these chances")
    if args.plot:
        columns = {"softmax of the logits": [p for *_, p, _ in found]}
        if args.temperature or args.top_k:
            columns[drawn] = [p for *_, p in found]
        plot_next_tokens(names, columns, args.plot)
        log(f"drew {args.plot}")

def command_tour(args):
    """Each section of this file opens with what it is about: its first two sentences are the tour's."""
    steps = re.findall(r"^ +\d+  (.+?)  +python story_llm.py ?(.*)$", __doc__, re.M)
    steps += [("looking inside", command) for command in ("attention", "next --plot next.png", "plot --samples")]
    prose = re.findall(r"^# ═══ (?:Step|Looking).*\n((?:# .+\n)+)", Path(__file__).read_text(encoding="utf-8"), re.M)
    shown = set()
    for number, (title, command) in enumerate(steps, 1):
        if number <= len(prose):
            sentences = re.split(r"(?<=[.?!]) ", " ".join(prose[number - 1].replace("# ", "").split()))
            heading = f"Step {number}: {title}" if number <= 13 else title.capitalize()
            log(f"\n\n═══ {heading} ═══\n\n{' '.join(sentences[:2])}")
        log(f"\n$ python story_llm.py {command}\n" if command not in shown else "\n(its command has run above)")
        if command not in shown:
            shown.add(command)
            step = make_parser().parse_args(shlex.split(command))
            step.argv = shlex.split(command)
            step.handler(step)
        if args.pause:
            log("\n[Enter] ", end="")
            sys.stdin.readline()

def command_generate(args):
    run = saved_or_untrained_run(args)
    settings = TrainConfig(**given(TrainConfig, args))
    pack(run.model, settings.precision)
    prompt = prompt_of(args, run)
    for piece in itertools.chain([prompt], generate_text(
            run.model, run.tokenizer, prompt, args.max_new_tokens, args.temperature, args.top_k, settings.seed)):
        log(piece, end="")
    log()

OPTIONS = {
    "--text": dict(default=DEFAULT_TEXT, metavar="FILE", help="the story, a UTF-8 text file (Short_Story.txt)"),
    "--out": dict(required=True, metavar="FILE", help="the file of tokens to write, FILE.bin"),
    "--model": dict(default="story_llm.pt", metavar="FILE", help="the checkpoint (story_llm.pt)"),
    "--plot": dict(metavar="FILE", help="the picture to draw: .png, .svg or .pdf"),
    "--samples": dict(action="store_true", help="what it wrote as it learned, in words, instead of the picture"),
    "--layer": dict(type=int, metavar="N", help="only this layer, from 1"),
    "--head": dict(type=int, metavar="N", help="only this head, from 1"),
    "--pause": dict(action="store_true", help="wait for the Enter key after each step"),
    "--prompt": dict(metavar="WORDS", help="the first words, to be continued"),
    "--max-new-tokens": dict(type=int, default=100, metavar="N", help="how many tokens to write (100)"),
    "--temperature": dict(type=float, default=0.0, metavar="T", help="0: the likeliest token; more: more chance (0)"),
    "--top-k": dict(type=int, metavar="K", help="choose among the K likeliest tokens only (all)"),
    "--untrained": dict(action="store_true", help="take an untrained model"),
    "--resume": dict(action="store_true", help="go on from the checkpoint; --epochs may be more than before"),
    "--tokenizer": dict(choices=TOKENIZERS, default="auto", help="auto: gpt2 if at hand, else story (auto)"),
    "--vocab-size": dict(type=int, default=2048, dest="entries", metavar="N", help="entries of a learned one (2048)"),
    "--full-vocab": dict(action="store_true", help="all 50,257 entries of GPT-2, not only those needed"),
    "--preset": dict(choices=PRESETS, default="story", help="where the settings of the model start from (story)"),
    "--compile": dict(action="store_true", help="train a compiled model: a slow start, then faster on a GPU"),
    "--device": dict(default="auto", metavar="NAME", help="cpu, cuda, mps, or auto: cuda if there is one (auto)"),
}
TOKENIZER_OPTIONS = "--text --tokenizer --vocab-size --full-vocab "
SETTINGS = {  # an option for each field of the two classes but the first, vocab_size, which the tokenizer says
    "--" + f.name.replace("_", "-"): dict(default=argparse.SUPPRESS, help=f"{f.metadata['help']} ({f.default})", **(
        dict(action="store_true") if f.type is bool else dict(type=f.type, metavar="N")))
    for f in (*dataclasses.fields(GPTConfig)[1:], *dataclasses.fields(TrainConfig))}
ALL_SETTINGS = TOKENIZER_OPTIONS + f"--preset --device {' '.join(SETTINGS)} "
COMMANDS = {
    "words": (command_words, "steps 2 and 3: the text as words, the words as numbers", "--text --prompt"),
    "bpe": (command_bpe, "step 4: the text as byte-pair tokens", TOKENIZER_OPTIONS + "--prompt"),
    "windows": (command_windows, "step 5: windows, inputs and targets", ALL_SETTINGS),
    "model": (command_model, "steps 6 and 7: shapes and sizes of the model", ALL_SETTINGS),
    "evaluate": (command_evaluate, "step 9: losses and recall of a model", ALL_SETTINGS + "--model --untrained"),
    "train": (command_train, "steps 10 to 12: train and save",
              ALL_SETTINGS + "--prompt --model --resume --plot --compile"),
    "tokenize": (command_tokenize, "a large text as a file of tokens, for train --text",
                 "--text --out --tokenizer --vocab-size"),
    "plot": (command_plot, "step 12: draw the loss curves of a saved model", "--model --plot --samples --text"),
    "generate": (command_generate, "steps 8 and 13: continue a prompt", ALL_SETTINGS +
                 "--model --untrained --prompt --max-new-tokens --temperature --top-k"),
    "attention": (command_attention, "draw whom each token looks at",
                  "--model --device --prompt --plot --layer --head"),
    "next": (command_next, "the likeliest next tokens, and how they are chosen",
             ALL_SETTINGS + "--model --untrained --prompt --temperature --top-k --plot"),
    "tour": (command_tour, "all 13 steps, one after the other", "--pause"),
}

def make_parser():
    parser = argparse.ArgumentParser(prog="story_llm.py", description="How a language model works, on your own story.")
    parser.set_defaults(handler=command_overview)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, (handler, meaning, options) in COMMANDS.items():
        command = commands.add_parser(name, help=meaning, description=meaning)
        command.set_defaults(handler=handler)
        for option in options.split():
            command.add_argument(option, **(OPTIONS | SETTINGS)[option])
    return parser

def main(argv=None):
    """Run the program; returns the exit status: 0, 1 after a mistake, 130 after Ctrl-C (argparse exits with 2)."""
    args = make_parser().parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # in a notebook or a test it may be something else
            stream.reconfigure(errors="replace")   # a terminal that lacks a character shows "?"
    try:
        if RANKS > 1:
            torch.distributed.init_process_group()
        args.handler(args)
    except BrokenPipeError:  # who reads our output, head for example, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as error:
        note(f"error: {error}")
        if RANK:  # whose notes are not shown
            print(f"error in process {RANK}: {error}", file=sys.stderr)
        return 1
    except ImportError as error:
        note(f"error: {error}: python -m pip install -r requirements.txt brings what is needed")
        return 1
    except torch.OutOfMemoryError:
        note("error: the memory of the GPU is too small for this: try --accumulate 4, or a smaller --batch-size")
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        if RANKS > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0

if __name__ == "__main__":
    sys.exit(main())
