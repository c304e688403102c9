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
import ctypes
import dataclasses
import functools
import hashlib
import heapq
import itertools
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
import zipfile
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

if sys.platform == "linux":  # glibc: keep freed memory for the next step, instead of returning it to the kernel
    with contextlib.suppress(OSError, AttributeError):  # and clearing it anew (measured: a sixth of the time)
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
        for threshold in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
            ctypes.CDLL(None).mallopt(threshold, 1 << 30)

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

GPT2_SMALL = GPTConfig(context_length=256, emb_dim=768, n_heads=12, n_layers=12, drop_rate=0.1)
PRESETS = {"story": GPTConfig(), "gpt2-small": GPT2_SMALL}

@dataclass(frozen=True)
class TrainConfig(Settings):
    """How the model is trained. An epoch is one reading of the training text."""
    epochs: int = setting(0, "readings of the text; 0: as many as usually suffice to know it by heart", 0)
    batch_size: int = setting(32, "windows in one step", 1, 1 << 16)
    stride: int = setting(0, "tokens from one window of an epoch to the next; 0: the context length", 0)
    learning_rate: float = setting(2e-3, "the highest one: it rises to this at first, then falls", 1e-9)
    warmup_steps: int = setting(20, "steps of rising", 0)
    weight_decay: float = setting(0.0, "pull of the weights towards zero: helps to generalise, hinders recall", 0)
    grad_clip: float = setting(1.0, "the longest gradient that a step follows", 1e-9)
    openings: float = setting(0.5, "share of windows that begin as a prompt begins (see step 10)", 0, 1)
    val_fraction: float = setting(0.1, "share of the text, at its end, that is kept for validation", 0, 1)
    eval_every: int = setting(25, "steps from one evaluation to the next", 1)
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

def load_text(path):
    """Read a UTF-8 text file, with or without a byte order mark; every line then ends in a plain \\n.

    Raises OSError if the file cannot be read, ValueError if it is empty or not UTF-8.
    """
    check(not Path(path).exists() or Path(path).is_file(), f"{path} is not a file: give a text file with --text")
    try:
        text = Path(path).read_bytes().decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text: byte {error.start} is 0x{error.object[error.start]:02x}. Convert it first, "
            f"for example: iconv -f WINDOWS-1252 -t UTF-8 {path} > story_utf8.txt") from None
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
    the rank too: earlier entries are merged first. `<|endoftext|>` comes after the last.
    """

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

    tiktoken waits for a silent network for ever, so it waits in a thread that we can leave behind.
    """
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
    if isinstance(found[0], OSError):
        raise found[0]
    return found[0]

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
    waiting = [encoding.decode_single_token_bytes(i) for i in set(encoding.encode_ordinary(text))]
    while waiting:
        token = waiting.pop()
        if token not in needed:
            needed.add(token)
            parts = [token[i:i + 1] for i in range(len(token))]
            while len(parts) > 2:  # repeat its merges up to the last one, which joins two halves
                best = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], math.inf))
                parts[best:best + 2] = [parts[best] + parts[best + 1]]
            waiting += parts
    return sorted(needed, key=ranks.get)

# Without GPT-2's files we learn the merges ourselves, from the story. Counting all pairs anew after
# each merge would be slow, so we note which words contain a pair, and recount only those. A heap hands
# us the most frequent pair; what it holds of counts that have changed since is stale, and skipped.

def learn_byte_pairs(text, vocab_size, log=lambda first, second, count: None):
    """Learn a byte-pair vocabulary from text: the 256 bytes, then merges, most frequent pair first.

    Returns at most `vocab_size - 1` byte strings (`<|endoftext|>` takes the last id), fewer if no pair
    occurs twice any more. `log` is called at each merge.
    """
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

TOKENIZERS = ("auto", "gpt2", "story", "word")
GPT2_HELP = """\
GPT-2's encoding could not be loaded ({}). tiktoken needs two files, vocab.bpe and encoder.json, from
https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/. Without a network, put them into a folder as
    6d1cbeee0f20b3d9449abfede4726ed8212e3aee   (vocab.bpe)
    6c7ea1a7e38e3a7f062df639a5b80947f075ffe6   (encoder.json)
and set TIKTOKEN_CACHE_DIR to that folder; or use --tokenizer story, which is learned from the text itself"""

def make_tokenizer(kind, text, train_text, vocab_size=2048, full_vocab=False, log=print):
    """The tokenizer for a text: `kind` is one of TOKENIZERS; what must be learned is learned from `train_text`."""
    check(kind in TOKENIZERS, f"the tokenizer must be one of {', '.join(TOKENIZERS)}, not {kind!r}")
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
    return BPETokenizer(learn_byte_pairs(train_text, vocab_size), "story")


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
    attention weights (..., T, S), each row of which adds up to 1.
    """
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
        x = self.tok_emb(token_ids) + self.pos_emb(places)  # (B, T, C): what the token is, and where
        x = self.drop_emb(x)
        for i, block in enumerate(self.trf_blocks):
            x = block(x, None if cache is None else cache[i], start)
        return self.out_head(self.final_norm(x))            # (B, T, vocabulary)

    def new_cache(self, batch_size):
        """Room for the keys and values of a full context: (layers, 2, B, H, context_length, D).

        On a CPU in float32, also for a model in bfloat16: one query looks around in it four times as fast.
        """
        config, weight = self.config, self.out_head.weight
        shape = (batch_size, config.n_heads, config.context_length, config.emb_dim // config.n_heads)
        dtype = weight.dtype if weight.is_cuda else torch.float32
        return torch.zeros(config.n_layers, 2, *shape, dtype=dtype, device=weight.device)


# ═══ Step 7: a batch through the untrained model ═════════════════════════════════════════════════
# Before we train anything, we push one batch through and look at what becomes of it: from (B, T)
# numbers to (B, T, C) vectors, which keep that shape through all the blocks, to (B, T, vocabulary)
# scores. And we count the weights, part by part, to see where a model is large.

def trace_shapes(model, token_ids):
    """Run token_ids (B, T) through the model; returns [(name of a part, shape of its output), ...] on the way."""
    shapes, parts = [("token_ids", tuple(token_ids.shape))], dict(model.named_children())
    del parts["trf_blocks"], parts["drop_emb"]
    parts.update((f"trf_blocks.{i}", block) for i, block in enumerate(model.trf_blocks))
    hooks = [part.register_forward_hook(lambda _, __, output, name=name: shapes.append((name, tuple(output.shape))))
             for name, part in parts.items()]
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


# ═══ Step 8: greedy generation ═══════════════════════════════════════════════════════════════════
# To write, we ask for the likeliest next token, append it, and ask again. That is all. The untrained
# model answers with noise, but it answers. (Step 13 does the same faster, and with some chance.)

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

def mean_loss(model, token_ids, max_windows=64):
    """Mean cross-entropy over token_ids (N,), in nats per token; None if N < 2.

    The windows do not overlap; of more than `max_windows`, as many are taken at even distances.
    """
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
        for column in generate(model, torch.tensor(rows, device=model.out_head.weight.device), max_new_tokens=320):
            for row, token in zip(rows, column.tolist()):
                row.append(token)
            texts = [tokenizer.decode(row)[len(prompt):] for row, (_, prompt, _) in zip(rows, group)]
            if all(len(text) >= 80 + 4 for text in texts):  # 4: the last character may lack a byte as yet
                break
        hits += sum(text.startswith(target) for text, (_, _, target) in zip(texts, group))
    return hits / max(len(exercises), 1)


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

@functools.lru_cache(maxsize=8)
def shuffled(count, *names):
    return torch.randperm(count, generator=random_numbers(*names))

def deal(count, hand, turn, *names):
    """Shuffle the numbers below `count`, deal `hand` at a time, shuffle anew when all are dealt; gives hand `turn`."""
    turns = math.ceil(count / max(hand, 1))
    return shuffled(count, *names, turn // turns)[(turn % turns * hand + torch.arange(hand)) % count]

class TrainingBatches:
    """`batches[step]` is the pair (inputs, targets) of a step, (B, T) token ids each.

    `token_ids` (N,) and `text`: the training text in both forms; without `text` there are no openings.
    """

    def __init__(self, token_ids, context_length, config, text="", tokenizer=None):
        self.windows = SlidingWindowDataset(token_ids, context_length).windows  # one at every offset
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
        windows = self.windows[(order * self.stride + offset) % len(self.windows)]
        starts = self.sentences[deal(len(self.sentences), self.n_sentences, step, self.seed, "sentences")].tolist()
        anywhere = torch.rand(self.n_words, generator=random_numbers(self.seed, "words", step)) * len(self.text)
        starts += [(WORD_START.search(self.text, int(place)) or WORD_START.search(self.text)).start()
                   for place in anywhere.tolist()]
        openings = [self.opening(start) for start in starts]
        batch = torch.cat([windows, torch.tensor(openings, dtype=windows.dtype).view(-1, self.length)])
        return batch[:, :-1].clamp(min=0), batch[:, 1:]

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
    def total_steps(self):
        usual = max(USUAL_EPOCHS * self.steps_per_epoch, FEWEST_STEPS)
        return self.train_config.epochs * self.steps_per_epoch or usual

def memory_gigabytes():
    """The memory of this machine, infinite where we cannot ask."""
    pages = hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names and os.sysconf("SC_PHYS_PAGES")
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e9 if pages else math.inf

def hash_text(text):
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()

def encode_split(text, tokenizer, val_fraction):
    """(training text, its token ids (N,), the validation ids (M,)); M is 0 where val_fraction is 0."""
    train_text, val_text = split_text(text, val_fraction)
    return train_text, *(torch.tensor(tokenizer.encode(part), dtype=torch.long) for part in (train_text, val_text))

def new_run(text, config=PRESETS["story"], train_config=TrainConfig(), tokenizer="auto", vocab_size=2048,
            full_vocab=False, device="auto", log=print):
    """An untrained model for a text. `tokenizer`, `vocab_size`, `full_vocab`: as for `make_tokenizer`.

    A text too short for a validation split, or for the context, does without or gets a smaller one, and
    `log` a line that says so. Raises ValueError if there are fewer than 2 tokens.
    """
    tokenizer = make_tokenizer(tokenizer, text, split_text(text, train_config.val_fraction)[0] or text,
                               vocab_size, full_vocab, log)
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
    gigabytes = 16 * config.rough_size / 1e9  # 4 bytes each for weight, gradient, and AdamW's two means
    check(gigabytes < memory_gigabytes(), f"this model takes {gigabytes:,.1f} GB of memory to train, and the machine "
          f"has {memory_gigabytes():,.1f}: make it smaller by --emb-dim, --n-layers or --context-length")
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

def use_bf16(device, precision):
    """Whether to calculate in bfloat16, with 8 bits of precision instead of 24: for precision "auto", if the
    machine has instructions for it, which makes it much faster."""
    able = torch.cpu.get_capabilities() if device.type == "cpu" else {"cuda": device.type == "cuda"}
    fast = any(able.get(name) for name in ("avx512_bf16", "amx_bf16", "cuda"))
    return precision == "bf16" or precision == "auto" and fast

def autocast(device, precision):
    """Within this, matrix products run in bfloat16 if `use_bf16` says so, while the weights stay in float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=use_bf16(device, precision))

def choose_device(name="auto"):
    """A torch.device: "cpu", "cuda", "mps", or for "auto" CUDA where there is one, else the CPU."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    check(name in ("cpu", "cuda", "mps"), f"the device must be auto, cpu, cuda or mps, not {name!r}")
    check(name == "cpu" or getattr(torch.backends, name).is_built() and getattr(torch, name).is_available(),
          f"there is no {name} device on this machine: leave out --device, or give cpu")
    return torch.device(name)

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

def train(run, text, log=print, save=lambda run: None, stop=lambda: False, prompt=None):
    """Train `run` on `text` from `run.step` to `run.total_steps`, or until `stop()` is true after a step.

    Every `eval_every` steps and at the end, the losses and a continuation of `prompt` (the text's first
    words) are added to `run.history` and told to `log`. `save(run)` is called at the end and at those
    times, but not so often as to take over 2 % of the time. Raises ValueError if the loss is not finite.
    """
    model, config, device = run.model, run.train_config, run.model.out_head.weight.device
    train_text, train_ids, val_ids = encode_split(text, run.tokenizer, config.val_fraction)
    batches = TrainingBatches(train_ids, run.config.context_length, config, train_text, run.tokenizer)
    prompt = prompt or " ".join(train_text.split()[:5])
    optimizer = new_optimizer(model, config)
    if run.optimizer_state:
        optimizer.load_state_dict(run.optimizer_state)
    model.train()
    seconds, steps_timed, next_save, due = 0.0, 0, 0.0, False
    while True:
        last = run.step >= run.total_steps
        if (last or run.step % config.eval_every == 0) and run.step not in [entry["step"] for entry in run.history]:
            with autocast(device, config.precision):
                losses = {"train_loss": mean_loss(model, train_ids), "val_loss": mean_loss(model, val_ids)}
            check_finite(losses["train_loss"], run.step)
            run.history.append({"step": run.step, "epoch": run.step / run.steps_per_epoch, **losses,
                                "tokens": run.step * config.batch_size * run.config.context_length,
                                "sample": "".join(generate_text(model, run.tokenizer, prompt, 24))})
            log_progress(run, prompt, seconds / max(steps_timed, 1), log)
            due = run.step > 0 and time.perf_counter() >= next_save
        last = last or stop()
        if last or due:
            began, run.optimizer_state = time.perf_counter(), optimizer.state_dict()
            save(run)
            next_save, due = time.perf_counter() + 50 * (time.perf_counter() - began), False
        if last:
            model.eval()
            return
        began = time.perf_counter()
        inputs, targets = (ids.to(device) for ids in batches[run.step])
        torch.manual_seed(random_numbers(config.seed, "dropout", run.step).initial_seed())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(run.step, run.total_steps, config)
        with autocast(device, config.precision):
            loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
        check_finite(loss.item(), run.step)
        loss.backward()
        check_finite(nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip).item(), run.step)
        optimizer.step()
        optimizer.zero_grad()
        run.step, seconds, steps_timed = run.step + 1, seconds + time.perf_counter() - began, steps_timed + 1

def log_progress(run, prompt, seconds_per_step, log):
    """Tell `log` about the last entry of the history."""
    now, epoch = run.history[-1], min(run.step, run.total_steps - 1) // run.steps_per_epoch + 1
    line = f"Ep {epoch} (Step {run.step:06d}): Train loss {now['train_loss']:.3f}"
    if now["val_loss"] is not None:
        line += f", Val loss {now['val_loss']:.3f}"
    if seconds_per_step:
        left = round((run.total_steps - run.step) * seconds_per_step)
        tokens = run.train_config.batch_size * run.config.context_length / seconds_per_step
        line += f", {tokens:,.0f} tokens/s, {left // 60}:{left % 60:02} left"
    log(line)
    log("    " + " ".join(f"{prompt} ...{now['sample']}".split()))
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

FORMAT, DIGEST_BYTES = 1, 32

def save_checkpoint(path, run):
    """Write `run` to `path` in one go: if that fails, OSError is raised and the old file is still there."""
    temporary, tokens = Path(f"{path}.tmp"), run.tokenizer.tokens
    state = {"format": FORMAT, "config": dataclasses.asdict(run.config), "kind": run.tokenizer.kind,
             "tokens": [token if isinstance(token, str) else token.decode("latin-1") for token in tokens],
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
        with contextlib.suppress(OSError):  # there is none any more if all went well
            temporary.unlink()

def check_room(path, run):
    """Notice before the training, not after it, that a checkpoint cannot be written. Raises OSError, ValueError."""
    check(not Path(path).is_dir(), f"{path} is a folder: give the path of a file with --model")
    needed = 12 * sum(count_parameters(run.model).values())  # the weights and AdamW's two means, 4 bytes each
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

    Raises OSError if there is no such file, ValueError if it is damaged or not one of ours.
    """
    check(not Path(path).exists() or Path(path).is_file(), f"{path} is not a file: give a checkpoint with --model")
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
        tokens, config, weights = state["tokens"], GPTConfig(**state["config"]), state["model"]
        tokenizer = (WordTokenizer(tokens) if state["kind"] == "word" else
                     BPETokenizer([token.encode("latin-1") for token in tokens], state["kind"]))
        check(config.vocab_size == tokenizer.vocab_size and 4 * config.rough_size < size, "its parts do not fit")
        model = GPTModel(config).to(device)
        shapes, found = ({name: (t.shape, t.dtype) for name, t in w.items()} for w in (model.state_dict(), weights))
        check(shapes == found, "its weights are not those of its settings")
        check(all(type(count) is int and count >= 0 for count in (state["step"], state["steps_per_epoch"] - 1)) and
              all({"step", "epoch", "tokens", "train_loss", "val_loss", "sample"} == {*h} for h in state["history"]),
              "its counts or its history are not right")
        model.load_state_dict(weights)
        return Run(model.eval(), tokenizer, TrainConfig(**state["train_config"]), state["steps_per_epoch"],
                   state["fingerprint"], state["step"], state["history"], state["optimizer_state"])
    except FileNotFoundError as error:
        raise OSError(f"there is no model at {path}: train one first (python story_llm.py train)") from error
    except OSError:
        raise
    except Exception as error:  # a file that is not ours may break anything in here
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is damaged or no checkpoint of story_llm ({reason}): train again, or give another "
                         "--model") from error


# ═══ Step 12: loss curves ════════════════════════════════════════════════════════════════════════
# Two curves tell what happened. Both fall: the model learns. Training falls and validation rises: it
# learns this text by heart. Both stay near ln(vocabulary): it learns nothing.

def check_picture(path):
    check(Path(path).suffix in (".png", ".svg", ".pdf"), f"a picture ends in .png, .svg or .pdf, not like {path}")
    check(Path(path).absolute().parent.is_dir(), f"there is no folder for the picture {path}")

def plot_losses(history, path, vocab_size):
    """Draw the losses of a history to `path` (.png, .svg, .pdf); epochs below, tokens seen above."""
    from matplotlib.figure import Figure
    check_picture(path)
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


# ═══ Step 13: inference from the saved file ══════════════════════════════════════════════════════
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
    check(max_new_tokens >= 0, f"max_new_tokens must be 0 or more, not {max_new_tokens}")
    check(0 <= temperature < math.inf, f"temperature must be a number, 0 or more, not {temperature}")
    check(top_k is None or top_k >= 1, f"top_k must be 1 or more, not {top_k}")
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


# ═══ The command line ════════════════════════════════════════════════════════════════════════════
# One function per command. Each calls the parts of its step and prints what they return: results on
# stdout, notes on stderr. The tables at the end say which command has which options.

DEFAULT_TEXT, DEFAULT_PROMPT = Path(__file__).with_name("Short_Story.txt"), "Once Aadhan renounced his kingdom"

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # what could move a terminal's cursor, colour or title

def log(message="", file=None, **options):
    file = file or sys.stdout
    print(CONTROL.sub("\ufffd", str(message)) if file.isatty() else message, flush=True, file=file, **options)

def note(message):
    log(message, file=sys.stderr)

def given(settings_class, args):
    """Those settings of a class that were given on the command line."""
    values = {f.name: getattr(args, f.name, None) for f in dataclasses.fields(settings_class)}
    return {name: value for name, value in values.items() if value is not None}

def untrained_run(args, text):
    config = dataclasses.replace(PRESETS[args.preset], **given(GPTConfig, args))
    return new_run(text, config, TrainConfig(**given(TrainConfig, args)), args.tokenizer, args.entries,
                   args.full_vocab, args.device, note)

def resumed_run(args, text):
    """The saved run, to go on with; ValueError if text or settings are not those that it was begun with."""
    run = load_checkpoint(args.model, args.device)
    begun = {"text": run.fingerprint[:12], "tokenizer": run.tokenizer.kind,
             **dataclasses.asdict(run.config), **dataclasses.asdict(run.train_config)}
    wanted = {"text": hash_text(text)[:12], **given(GPTConfig, args), **given(TrainConfig, args)}
    if args.tokenizer != "auto":
        wanted["tokenizer"] = args.tokenizer
    changes = {name: wanted.pop(name) for name in ("epochs", "eval_every") if name in wanted}  # these may change
    for name, value in wanted.items():
        check(value == begun[name], f"{args.model} was begun with {name} {begun[name]}, not {value}: "
              f"give the same --{name.replace('_', '-')} as then, or train anew without --resume")
    run.train_config = dataclasses.replace(run.train_config, **changes)
    return run

def log_recall(run, train_text):
    total = len(recall_exercises(train_text))
    share = measure_recall(run.model, run.tokenizer, train_text)
    log(f"Recall {share:.1%}: {round(share * total)} of {total} sentences continued to the letter after five words"
        if total else "Recall: not measured, for no sentence of the text has 8 words")

def command_overview(args):
    log(__doc__.strip())

def command_words(args):
    text = load_text(args.text)
    train_text, val_text = split_text(text, TrainConfig().val_fraction)
    pieces, tokenizer = split_words(train_text), WordTokenizer(build_vocabulary(train_text))
    log(f"{len(text):,} characters: {len(train_text):,} to train on, {len(val_text):,} for validation\n"
        f"{len(pieces):,} words and punctuation marks to train on, the first of them: {pieces[:12]}\n"
        f"{tokenizer.vocab_size:,} different ones make the vocabulary, for example "
        f"{tokenizer.tokens[20::tokenizer.vocab_size // 12 + 1]}")
    for sentence in (args.prompt or " ".join(train_text.split()[:8]), "Thamarai bought a laptop <|endoftext|>"):
        ids = tokenizer.encode(sentence)
        log(f"\n{sentence}\n  encoded: {ids}\n  decoded: {tokenizer.decode(ids)}")
    same = tokenizer.decode(tokenizer.encode(train_text)) == train_text
    log(f"\nthe training text, encoded and decoded, is the same again: {same}")

def command_bpe(args):
    text = load_text(args.text)
    train_text, _ = split_text(text, TrainConfig().val_fraction)
    tokenizer = make_tokenizer(args.tokenizer, text, train_text, args.entries, args.full_vocab, note)
    if tokenizer.kind == "story":
        log("the first merges, as they happen:")
        learn_byte_pairs(train_text, 256 + 13, lambda a, b, count: log(
            f"  {a.decode('latin-1')!r:>6} + {b.decode('latin-1')!r:<6} {count:,} times"))
    ids = tokenizer.encode(text)
    log(f"the text: {len(split_words(text)):,} words and punctuation marks; {len(ids):,} {tokenizer.kind} tokens\n"
        f"the vocabulary: {tokenizer.vocab_size:,} entries, of which the text uses {len(set(ids)):,}\n"
        f"the text, encoded and decoded, is the same again: {tokenizer.decode(ids) == text}")
    for sentence in (args.prompt or " ".join(train_text.split()[:12]), "Thamarai bought a laptop <|endoftext|>"):
        log(f"\n{sentence}\n  {' '.join(f'{tokenizer.decode([i])!r}:{i}' for i in tokenizer.encode(sentence))}")

def command_windows(args):
    text = load_text(args.text)
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
    text = load_text(args.text)
    run = untrained_run(args, text)
    _, token_ids, _ = encode_split(text, run.tokenizer, run.train_config.val_fraction)
    device = run.model.out_head.weight.device
    log(f"{run.config}\n\ntwo windows on their way through the untrained model:")
    for name, shape in trace_shapes(run.model, token_ids[:run.config.context_length].expand(2, -1).to(device)):
        log(f"  {name:<14} {shape}")
    counts = count_parameters(run.model)
    log("\nnumbers to learn:")
    for name, count in [*counts.items(), ("altogether", sum(counts.values()))]:
        log(f"  {name:<14} {count:>12,}")

def command_evaluate(args):
    text, saved = load_text(args.text), Path(args.model).exists() and not args.untrained
    run = load_checkpoint(args.model, args.device) if saved else untrained_run(args, text)
    if saved and run.fingerprint != hash_text(text):
        note(f"note: {args.model} was trained on another text than {args.text}")
    train_text, train_ids, val_ids = encode_split(text, run.tokenizer, run.train_config.val_fraction)
    log(f"{f'{args.model}, after {run.step} steps of training' if saved else 'an untrained model'}:")
    for name, loss in (("Train loss", mean_loss(run.model, train_ids)), ("Val loss", mean_loss(run.model, val_ids)),
                       (f"ln({run.config.vocab_size}), a blind guess", math.log(run.config.vocab_size))):
        if loss is not None:
            log(f"  {name:<24} {loss:.3f}")
    log_recall(run, train_text)

def command_train(args):
    text = load_text(args.text)
    run = (resumed_run if args.resume else untrained_run)(args, text)
    log(f"{run.tokenizer.kind} tokenizer, vocabulary {run.config.vocab_size:,}; "
        f"{sum(count_parameters(run.model).values()):,} parameters; {run.total_steps} steps; "
        f"loss of a blind guess {math.log(run.config.vocab_size):.3f}")
    prompt = args.prompt or (DEFAULT_PROMPT if DEFAULT_PROMPT in text else None)
    check_room(args.model, run)
    check_picture(args.plot)
    asked = threading.Event()

    def ask(signum, frame):  # the first Ctrl-C asks to stop after this step, a second one stops at once
        asked.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, ask)
    try:
        train(run, text, log, lambda run: save_checkpoint(args.model, run), asked.is_set, prompt)
    finally:
        signal.signal(signal.SIGINT, before)
    if run.step < run.total_steps:
        again = shlex.join([*args.argv, *["--resume"] * (not args.resume)])
        note(f"stopped after step {run.step} of {run.total_steps}, saved {args.model}; to go on: "
             f"python story_llm.py {again}")
        raise KeyboardInterrupt
    log_recall(run, split_text(text, run.train_config.val_fraction)[0])
    log(f"saved {args.model}")
    try:
        command_plot(args, run)
    except Exception as error:  # the model is saved; a picture is not worth an error
        note(f"note: {args.plot} could not be drawn: {error}")

def command_plot(args, run=None):
    run = run or load_checkpoint(args.model)
    plot_losses(run.history, args.plot, run.config.vocab_size)
    log(f"drew {args.plot}")

def command_generate(args):
    run = untrained_run(args, load_text(args.text)) if args.untrained else load_checkpoint(args.model, args.device)
    settings = TrainConfig(**given(TrainConfig, args))
    large = sum(count_parameters(run.model).values()) > 50e6  # then reading the weights takes the time, and bfloat16
    if large and use_bf16(run.model.out_head.weight.device, settings.precision):  # halves them
        run.model.to(torch.bfloat16)
    prompt = DEFAULT_PROMPT if args.prompt is None else args.prompt
    for piece in itertools.chain([prompt], generate_text(
            run.model, run.tokenizer, prompt, args.max_new_tokens, args.temperature, args.top_k, settings.seed)):
        log(piece, end="")
    log()

OPTIONS = {
    "--text": dict(default=DEFAULT_TEXT, metavar="FILE", help="the story, a UTF-8 text file (Short_Story.txt)"),
    "--model": dict(default="story_llm.pt", metavar="FILE", help="the checkpoint (story_llm.pt)"),
    "--plot": dict(default="loss.png", metavar="FILE", help="the picture to draw: .png, .svg or .pdf (loss.png)"),
    "--prompt": dict(metavar="WORDS", help=f"the first words, to be continued ({DEFAULT_PROMPT})"),
    "--max-new-tokens": dict(type=int, default=100, metavar="N", help="how many tokens to write (100)"),
    "--temperature": dict(type=float, default=0.0, metavar="T", help="0: the likeliest token; more: more chance (0)"),
    "--top-k": dict(type=int, metavar="K", help="choose among the K likeliest tokens only (all)"),
    "--untrained": dict(action="store_true", help="take an untrained model"),
    "--resume": dict(action="store_true", help="go on from the checkpoint; --epochs may be more than before"),
    "--tokenizer": dict(choices=TOKENIZERS, default="auto", help="auto: gpt2 if at hand, else story (auto)"),
    "--vocab-size": dict(type=int, default=2048, dest="entries", metavar="N", help="entries of a learned one (2048)"),
    "--full-vocab": dict(action="store_true", help="all 50,257 entries of GPT-2, not only those needed"),
    "--preset": dict(choices=PRESETS, default="story", help="where the settings of the model start from (story)"),
    "--device": dict(default="auto", metavar="NAME", help="cpu, cuda, mps, or auto: cuda if there is one (auto)"),
}
TOKENIZER_OPTIONS = "--text --tokenizer --vocab-size --full-vocab "
ALL_SETTINGS = TOKENIZER_OPTIONS + "--preset --device GPTConfig TrainConfig "
COMMANDS = {
    "words": (command_words, "steps 2 and 3: the text as words, the words as numbers", "--text --prompt"),
    "bpe": (command_bpe, "step 4: the text as byte-pair tokens", TOKENIZER_OPTIONS + "--prompt"),
    "windows": (command_windows, "step 5: windows, inputs and targets", ALL_SETTINGS),
    "model": (command_model, "steps 6 and 7: shapes and sizes of the model", ALL_SETTINGS),
    "evaluate": (command_evaluate, "step 9: losses and recall of a model", ALL_SETTINGS + "--model --untrained"),
    "train": (command_train, "steps 10 to 12: train and save", ALL_SETTINGS + "--prompt --model --resume --plot"),
    "plot": (command_plot, "step 12: draw the loss curves of a saved model", "--model --plot"),
    "generate": (command_generate, "steps 8 and 13: continue a prompt", ALL_SETTINGS +
                 "--model --untrained --prompt --max-new-tokens --temperature --top-k"),
}

def make_parser():
    parser = argparse.ArgumentParser(prog="story_llm.py", description="How a language model works, on your own story.")
    parser.set_defaults(handler=command_overview)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, (handler, meaning, options) in COMMANDS.items():
        command = commands.add_parser(name, help=meaning, description=meaning)
        command.set_defaults(handler=handler)
        for option in options.split():
            if option.startswith("--"):
                command.add_argument(option, **OPTIONS[option])
                continue
            for f in dataclasses.fields(globals()[option]):  # a settings class: an option for each field
                value = dict(action="store_true", default=None) if f.type is bool else dict(type=f.type, metavar="N")
                if f.name != "vocab_size":
                    meaning = f"{f.metadata['help']} ({f.default})"
                    command.add_argument("--" + f.name.replace("_", "-"), help=meaning, **value)
    return parser

def main(argv=None):
    """Run the program; returns the exit status: 0, 1 after a mistake, 130 after Ctrl-C (argparse exits with 2)."""
    args = make_parser().parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # in a notebook or a test it may be something else
            stream.reconfigure(errors="replace")   # a terminal that lacks a character shows "?"
    try:
        args.handler(args)
    except (ValueError, OSError) as error:
        note(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        return 130
    return 0

if __name__ == "__main__":
    sys.exit(main())
