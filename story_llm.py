#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "tiktoken==0.14.0", "matplotlib==3.11.2"]
# ///
"""story_llm: how a language model works, in one file that learns your story and goes on with it.

    python story_llm.py train
    python story_llm.py generate --prompt "Once Aadhan renounced his kingdom"

The lesson, 13 steps, is for anybody who programs in Python, to be read from top to bottom in an
evening. The workshop after it makes the same code sturdy and fast; in the command line, each step
has its command: `python story_llm.py` prints a map of them, `python story_llm.py tour` runs them.
What follows `>>>` is an example, and below it stands what Python answers.
"""
import math
import os
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path

if __name__ == "__main__":      # for speed, before torch is loaded: explained at the very end
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import torch
from torch import nn
from torch.nn import functional as F
import regex    # comes with tiktoken; like re, but it knows the letters of every script

# ═══ Step 1: what to install, and the settings ═════════════════════════════════════════════════
# A language model does one thing: it reads the beginning of a text and says, for every token it
# knows, how likely it is to come next. (A token is a word, or a piece of one.) Take the likeliest,
# append it to the text, and ask again: so it writes.
#
# It is told no rules. It guesses the next token at a thousand places of a story, sees what really
# came there, and is changed a little, so that it would have guessed better; this happens 180 times:
#
#      2-4   take the story apart into tokens, and make numbers of them
#       5    cut the numbers into exercises: some tokens, and the one that came next
#      6-8   build the model, which guesses, and let it write (noise, at first)
#      9-10  say in a number how wrong the guesses are, and change the model to lower it
#     11-13  save the model, look back at how it learned, and let it write the story
#
# `pip install -r requirements.txt` installs three packages: torch calculates, tiktoken applies
# byte-pair encodings (step 4), matplotlib draws (step 12).
#
# All numbers that we choose ourselves are fields of two classes: come back to them when their words
# mean more. `setting` stores a default, its meaning, and limits: the smallest value, and one that
# it must stay below (often huge: only against slips). Checks and options are made of them.
def setting(default, meaning, at_least=None, below=math.inf, choices=None):
    limits = {"at_least": at_least, "below": below, "choices": choices}
    return field(default=default, metadata={"meaning": meaning, **limits})

class Settings:
    def __post_init__(self):    # a dataclass calls this once its fields are filled
        check_settings(self)

@dataclass(frozen=True)     # frozen: no setting can change behind our back
class GPTConfig(Settings):
    """The shape of the model. The defaults are a small one, which learns a story in seconds.
    >>> GPTConfig(emb_dim=30)
    Traceback (most recent call last):
    ValueError: emb_dim (30) must be divisible by n_heads (4), for each head gets an equal part
    """
    vocab_size: int = setting(50257, "how many tokens there are; the tokenizer says", 1, 1 << 24)
    context_length: int = setting(32, "tokens that the model sees at once", 1, 1 << 20)
    emb_dim: int = setting(192, "numbers that stand for one token: the model's width", 1, 1 << 16)
    n_heads: int = setting(4, "attention heads, which share the width", 1, 1 << 16)
    n_layers: int = setting(2, "transformer blocks, one after the other", 1, 1 << 10)
    drop_rate: float = setting(0.0, "share of numbers dropped in training", 0, 1)
    qkv_bias: bool = setting(False, "biases in queries, keys and values, as GPT-2 has them")
    tie_weights: bool = setting(False, "one matrix for tokens in and tokens out, as GPT-2 has it")
    gelu: str = setting("exact", "its form; GPT-2 has tanh", choices=("exact", "tanh"))
    position: str = setting("learned", "how tokens know their places",
                            choices=("learned", "sinusoidal", "rotary"))

@dataclass(frozen=True)
class TrainConfig(Settings):
    """How the model is trained. An epoch is one reading of the training text."""
    epochs: int = setting(0, "readings of the text; 0: as many as usually suffice", 0)
    max_steps: int = setting(0, "steps to take, whatever the epochs; 0: as the epochs say", 0)
    batch_size: int = setting(32, "windows in one step", 1, 1 << 16)
    optimizer: str = setting("adamw", "what moves the weights", choices=("adamw", "muon"))
    learning_rate: float = setting(2.5e-3, "how far a step moves a weight, about", 1e-9)
    warmup_steps: int = setting(20, "steps of a rising learning rate; at most a tenth of all", 0)
    weight_decay: float = setting(0.0, "pull of the weights towards zero", 0)
    grad_clip: float = setting(1.0, "the longest gradient that a step follows", 1e-9)
    openings: float = setting(0.5, "share of windows that begin as a prompt begins", 0, 1)
    val_fraction: float = setting(0.1, "share of the text, its end, for validation", 0, 1)
    eval_every: int = setting(0, "steps between evaluations; 0: 45, or a 20th of all if more", 0)
    precision: str = setting("auto", "auto: as is fast here", choices=("auto", "bf16", "fp32"))
    seed: int = setting(42, "where randomness starts: same seed, same model", 0, 1 << 63)

# ═══ Step 2: load the text, split it into words ════════════════════════════════════════════════
# A model calculates, so text must become numbers. A file holds bytes, numbers from 0 to 255; an
# encoding says which characters they mean. Ours is UTF-8, in which an English letter is one byte,
# an é two, and a Tamil or Chinese character three.
def load_text(path):
    """The text of a UTF-8 file, with line ends as Python has them, `\\n`.
    Raises OSError or ValueError if there is no such file, no UTF-8 in it, or no text."""
    with what_is_wrong_with(path):                  # workshop: says it in words, and what to do
        text = Path(path).read_text("utf-8-sig")    # without the mark (sig) of some editors
    check(text.strip(), f"{path} is empty: give a text of five words or more")
    return text

# The model practises on most of the story. The end is kept away from it, to see how well it guesses
# in a text that it has never read: that is the validation split.
def split_text(text, val_fraction):
    """The text in two, cut before white space: the part to train on, the rest for validation.
    >>> split_text("They went upriver by boat.", 0.3)
    ('They went upriver', ' by boat.')
    """
    check(0 <= val_fraction < 1, f"val_fraction must be 0 or more, below 1, not {val_fraction}")
    cut = len(text) - int(len(text) * val_fraction)
    space = max(text.rfind(white, max(cut - 50, 0), cut + 1) for white in " \n")     # the last one
    if space > 0 and cut < len(text):       # -1: there is none, as in Chinese: then cut anywhere
        cut = space
    return text[:cut], text[cut:]

# Now the words. The plainest way to make numbers of them: cut the text into words and punctuation
# marks, write down every different one in a list, and take its place in the list as its number.
#
# A regular expression does the cutting. For English, r" ?[\w']+| ?[^\w\s]|\s+" would do: a word, or
# a mark, or white space. (The workshop's, PIECE, knows all scripts; in those that put no spaces
# between words, as Chinese, each character is a piece.) A space goes with the word after it, so no
# character is lost: joined, the pieces give the text back.
def split_words(text):
    """A text as a list of words and marks, each with the space before it, and other white space.
    >>> split_words("Yes, said the king's son.")
    ['Yes', ',', ' said', ' the', " king's", ' son', '.']
    """
    return PIECE.findall(text)

END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "<|unk|>"

def build_vocabulary(text):
    """All different pieces of the text, sorted, and two that stand for something else.
    >>> build_vocabulary("the king and the ferryman")
    [' and', ' ferryman', ' king', ' the', 'the', '<|endoftext|>', '<|unk|>']
    """
    return sorted(set(split_words(text))) + [END_OF_TEXT, UNKNOWN]

# ═══ Step 3: a tokenizer of words ══════════════════════════════════════════════════════════════
# A tokenizer goes both ways: `encode` makes token ids of a text, `decode` makes the text of them.
# An id is the place of a token in the vocabulary.
#
# What if a word comes that is not in the list? For that there is `<|unk|>`, "unknown": we can go
# on, but the word is lost. `<|endoftext|>` marks the end of a text, in models that learn from many;
# we have one text, and never use it.
class WordTokenizer:
    """Words and punctuation marks as tokens; `vocabulary` is a list like `build_vocabulary`'s.
    >>> tokenizer = WordTokenizer(build_vocabulary("the king and the ferryman"))
    >>> tokenizer.encode("the ferryman and the king")
    [4, 1, 0, 3, 2]
    >>> tokenizer.decode([4, 1])
    'the ferryman'
    >>> tokenizer.decode(tokenizer.encode("the laptop and the king"))
    'the<|unk|> and the king'
    """
    kind = "word"

    def __init__(self, vocabulary):
        self.tokens = list(vocabulary)
        self.ids = {token: place for place, token in enumerate(self.tokens)}
        self.end_of_text = self.ids[END_OF_TEXT]
        self.vocab_size = len(self.tokens)

    def encode(self, text):
        token_ids = []
        for piece in split_words(text):
            if piece not in self.ids:       # perhaps a first word: the list has it with a space
                piece = " " + piece
            token_ids.append(self.ids.get(piece, self.ids[UNKNOWN]))
        return token_ids

    def decode(self, token_ids):
        return "".join(self.tokens[token_id] for token_id in token_ids)

# ═══ Step 4: byte-pair encoding ════════════════════════════════════════════════════════════════
# Words are crude tokens. A language has hundreds of thousands; "king", "kings" and "kingdom" are as
# different as any three; and every new word is `<|unk|>`. Letters would do for any word, but then a
# text is long, and each token says little. GPT-2, OpenAI's model of 2019, whose design we follow,
# takes the middle way (Radford et al. 2019, section 2.2): it starts from the 256 bytes, so no text
# is unknown to it, and then joins the two neighbours that stand side by side most often into a new
# token; then again, and again:
#
#     l o w    _ l o w e r    _ l o w l y     l o and o w: 3 times (_ is the space); l o is first
#     lo w     _ lo w e r     _ lo w l y      in the alphabet. Now lo w: 3 times
#     low      _ low e r      _ low l y       now _ low: 2 times, more than any other
#     low      _low e r       _low l y
#
# Frequent words end up as one token, rare ones as a few. A pair never reaches across two words: the
# text is split first, in much the same way as in step 2 (STORY_SPLIT, in the workshop).
def learn_byte_pairs(text, vocab_size):
    """Learn a byte-pair vocabulary: the 256 bytes, then the joined tokens in the order of joining.
    Returns `vocab_size - 1` byte strings (`<|endoftext|>` comes on top), or fewer, if no pair
    occurs twice any more. Raises ValueError if not even the bytes have room.
    >>> learn_byte_pairs("low lower lowly", 300)[256:]
    [b'lo', b'low', b' low']
    """
    check(vocab_size > 256, f"vocab_size must be 257 or more (256 bytes and {END_OF_TEXT}), "
          f"not {vocab_size}")
    occurrences = Counter(regex.findall(STORY_SPLIT, text))     # {word: how often it stands there}
    words = [[bytes([byte]) for byte in word.encode("utf-8", "replace")] for word in occurrences]
    times = list(occurrences.values())
    tokens = [bytes([byte]) for byte in range(256)]
    # How often does each pair stand in the text, and in which words? Counted once; a join then
    # changes the counts of the few words that it touches.
    pair_count = Counter()
    words_with = defaultdict(set)

    def count_pairs(number, sign):      # sign +1: of a word that comes in; -1: that goes out
        for pair in pairwise(words[number]):
            pair_count[pair] += sign * times[number]
            words_with[pair].add(number)

    for number in range(len(words)):
        count_pairs(number, +1)
    while len(tokens) < vocab_size - 1:
        most = max(pair_count.values(), default=0)
        if most < 2:
            break
        best = min(pair for pair, count in pair_count.items() if count == most)
        tokens.append(best[0] + best[1])
        for number in list(words_with[best]):       # list: a copy, for the sets change meanwhile
            count_pairs(number, -1)
            words[number] = join_pair(words[number], best)
            count_pairs(number, +1)
    return tokens

def join_pair(parts, pair):
    """The parts of a word, with each occurrence of the pair joined."""
    joined = []
    for part in parts:
        if joined and (joined[-1], part) == pair:
            joined[-1] += part
        else:
            joined.append(part)
    return joined

# To encode a text, the joins are made again in the same order. tiktoken, OpenAI's library, does
# that fast: its Encoding takes the tokens with their ranks; the lowest rank is joined first.
class BPETokenizer:
    """A byte-pair encoding. `tokens`: byte strings as `learn_byte_pairs` gives them; a token's id
    is its place and its rank. `kind` says where they come from: "gpt2" or "story".
    >>> tokenizer = BPETokenizer(learn_byte_pairs("low lower lowly", 300), "story")
    >>> tokenizer.encode("slow slower")         # two new words, and nothing is lost
    [115, 257, 32, 115, 257, 101, 114]
    >>> [tokenizer.tokens[token_id] for token_id in tokenizer.encode("slower")]
    [b's', b'low', b'e', b'r']
    >>> tokenizer.decode(tokenizer.encode("漢字 <|endoftext|>"))
    '漢字 <|endoftext|>'
    """
    def __init__(self, tokens, kind):
        import tiktoken     # here, so that nobody waits for it who does not use it
        self.tokens = list(tokens)
        self.kind = kind
        ranks = {token: rank for rank, token in enumerate(self.tokens)}     # its place in the list
        self.end_of_text = len(ranks)
        self.vocab_size = len(ranks) + 1
        self.encoding = tiktoken.Encoding(
            kind, pat_str=GPT2_SPLIT if kind == "gpt2" else STORY_SPLIT, mergeable_ranks=ranks,
            special_tokens={END_OF_TEXT: self.end_of_text})

    def encode(self, text):
        return self.encoding.encode_ordinary(text)      # ordinary: `<|endoftext|>` is just letters

    def decode(self, token_ids):
        return self.encoding.decode(token_ids)          # bytes that make no character become a �

# GPT-2 has learned 50,000 joins, from eight million web pages (with the 256 bytes and
# `<|endoftext|>`, 50,257 tokens). They are better than what one story can teach, so we take
# them, from tiktoken. The story that comes with this file needs 2,079 of them, with the steps to
# longer ones, the bytes, and `<|endoftext|>`; the workshop (`make_tokenizer`) keeps those alone,
# so that the model spends no time on the others.

# ─── A few words of torch ──────────────────────────────────────────────────────────────────────
def a_few_words_of_torch():
    """What we need of torch fits on a page. A tensor is a block of numbers, in rows and columns or
    in more directions; its shape says how many. What is done to it is done to all its numbers.
    >>> x = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    >>> x.shape, (10 * x)[1], x[:, -1]        # row 1, counted from 0; of all rows, the last number
    (torch.Size([2, 3]), tensor([40., 50., 60.]), tensor([3., 6.]))

    `dim` names a direction: 0 the rows, 1 what stands in them; -1 is the last. sum(dim=-1) adds up
    along it. What has no rows is used for each row of the other, as [1000, 2000, 0] here:
    >>> x.sum(dim=-1), x + torch.tensor([1000, 2000, 0])
    (tensor([ 6., 15.]), tensor([[1001., 2002.,    3.],
            [1004., 2005.,    6.]]))

    `@` multiplies two tables: each row of the first with each column of the second, number by
    number, added up. What has more directions is a stack of tables: `@` goes table by table, and
    `...` in a shape means the other directions. nn.Linear does that with a table of learned
    numbers, its weights; to each column of the result it adds one more number, its bias.
    nn.Embedding is a table with a learned row for every token.
    >>> x @ torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 2.0]])
    tensor([[ 6.,  6.],
            [15., 12.]])
    >>> nn.Linear(3, 2)(x).shape, nn.Embedding(50, 4)(torch.tensor([7, 7, 30])).shape
    (torch.Size([2, 2]), torch.Size([3, 4]))

    Each is an nn.Module, a part with weights; so are whole models, whose attributes are such parts,
    or lists of them (nn.ModuleList); `parameters()` gives all their weights. Call a module like a
    function, and torch runs its `forward`. To learn, we must know how a result changes with a
    weight. (2w - 10)^2 is 16 for w = 3, and 15.84 for w = 3.01: it falls 16 times as fast as w
    grows; its slope is -16. torch notes what was calculated from what; `backward` goes that way
    back: 2w - 10 grows twice as fast as w; at -4, a square falls 8 times as fast as what is squared
    grows; it multiplies the slopes and adds 2 x -8 to the weight's `.grad`, its gradient.
    >>> w = torch.tensor(3.0, requires_grad=True)       # it is to be learned
    >>> result = (2 * w - 10) ** 2
    >>> result.backward()
    >>> w.grad
    tensor(-16.)

    A small step against the gradient makes the result smaller: that is how a model learns. Where
    we only want an answer, `with torch.no_grad():` tells torch to remember nothing."""

# ═══ Step 5: sliding windows ═══════════════════════════════════════════════════════════════════
# What does the model practise? To guess the next token. The input is a window, some tokens that
# stand side by side. The targets are what is to be guessed: the same tokens, one place later.
#
#     input     Once     Aadhan      renounced   his
#     target    Aadhan   renounced   his         kingdom
#
# Read it in columns: each is an exercise. After "Once" comes "Aadhan"; after "Once Aadhan" comes
# "renounced"; after all four, "kingdom". So four tokens give four exercises, done all at once: at
# each place, the model sees what stands there and to the left. Without the shift, it could copy.
class SlidingWindowDataset:
    """Windows of `context_length` tokens and their targets, `stride` tokens apart.
    `token_ids` (N,) must be more than a window, else ValueError. Item i is (input, target), each of
    shape (context_length,); for a tensor of several i, a row for each of them.
    >>> windows = SlidingWindowDataset(torch.tensor([10, 11, 12, 13, 14, 15, 16]), 4, stride=2)
    >>> len(windows)
    2
    >>> windows[1]
    (tensor([12, 13, 14, 15]), tensor([13, 14, 15, 16]))
    """
    def __init__(self, token_ids, context_length, stride=1):
        check(context_length > 0 and stride > 0, "context_length and stride must be 1 or more")
        check(len(token_ids) > context_length, f"{len(token_ids)} tokens are too few for a window "
              f"of {context_length} and its targets: give a longer text or a shorter context")
        # One token more than a window, for the last target. unfold gives all pieces of that length;
        # it copies nothing, but looks at the same numbers again and again.
        self.windows = token_ids.unfold(0, context_length + 1, stride)

    def __len__(self):
        return len(self.windows)

    def __getitem__(self, index):
        window = self.windows[index].long()     # long: torch's whole numbers of 64 bits
        return window[..., :-1], window[..., 1:]        # all but its last token; all but its first

# A text is split and encoded once. That makes a corpus, on which all that follows works.
@dataclass
class Corpus:
    """A text, ready to learn from. Ids are tensors (N,) and (M,); M is 0 without validation."""
    tokenizer: WordTokenizer | BPETokenizer
    train_text: str
    train_ids: torch.Tensor
    val_ids: torch.Tensor
    fingerprint: str        # by which we know the same text, split in the same way, again

def corpus_from_text(text, kind="auto", val_fraction=0.1, context_length=32, **options):
    """The corpus of a text. `kind` and the options are for `make_tokenizer`. If the end of the text
    is too short to fill a window, nothing is kept for validation.
    >>> corpus = corpus_from_text("They went upriver for nine days.", "word", 0.3, context_length=2)
    >>> corpus.train_text, len(corpus.train_ids), len(corpus.val_ids)
    ('They went upriver for', 4, 3)
    """
    train_text, val_text = split_text(text, val_fraction)
    tokenizer = make_tokenizer(kind, train_text, val_text, **options)   # learns from the first only
    corpus = encode_corpus(tokenizer, train_text, val_text)
    if val_text and len(corpus.val_ids) <= context_length:
        return corpus_from_text(text, kind, 0.0, context_length, **options)
    return corpus

# ═══ Step 6: attention and the GPT model ═══════════════════════════════════════════════════════
# An id means nothing: 7 is not more than 6. So each token has a row of C numbers, its vector or
# embedding, random at first, then learned; its place adds another (below). That does not tell what
# comes next: in "Once Aadhan renounced his", "his" must find out who "he" is, and what he did. So
# in every block, each token first looks at itself and those before it, and takes over what it needs
# (attention); then it works on that, alone (the feed-forward network). The letters of shapes:
#
#     B  windows in a batch        C  numbers per token, the width of the model (emb_dim)
#     T  tokens in a window        H  attention heads         D  numbers per head, C / H
#     S  tokens that may be looked at: the same T; in step 13 all so far, and T are the new ones
#
# How does a token know whom to look at? From each token's vector, three Linears make three more: a
# query ("whom do I look for?"), a key ("who am I?") and a value ("what I give"). Why three? "his"
# looks for a person, but is none: query and key must differ. "Aadhan" is found as a person, but
# what "his" needs of him is which one: key and value must differ, too. Nobody sets that: training
# finds what makes the guesses better. The score is the dot product of a query and a key (multiply
# number by number, add up): large where both are large in the same places, with the same signs.
#
# Softmax turns a row of scores into shares that add up to 1: e to the score (e is 2.718...),
# divided by the sum of them all:
#
#     softmax(2, 1, 0) = (7.39, 2.72, 1) / 11.11 = 0.67, 0.24, 0.09
#
# The scores must not be large. A dot product adds up D products (here 192 / 4 = 48). If each is +1
# or -1 by chance, their sum is usually about sqrt(D) from 0, as one who goes left or right by the
# toss of a coin is after D steps: after 48, about 7. But softmax(7, 0) is 0.9991, 0.0009; raise the
# score by a tenth, and softmax(7.7, 0) is 0.9995, 0.0005: next to no change, so next to nothing is
# learned. With scores divided by sqrt(D), the two are 0.73, 0.27 and 0.75, 0.25.
#
# One thing is forbidden: to look ahead. In training, the token to be guessed stands in the same
# window, one place to the right. Without this rule the model would copy it, and when it is to
# write, there would be nothing to copy. So the scores of later tokens become minus infinity, and e
# to that is 0: no share. What a token gets is the sum of the values, each times its share:
#
#     attention(Q, K, V) = softmax(Q K^T / sqrt(D)) V     Vaswani et al. 2017, section 3.2.1
#
# Q, K and V have a row for each token. K^T is K with rows and columns swapped, so Q K^T is the
# table of all scores: a row for each query, a column for each key.
def causal_mask(T, S, device=None):
    """(T, S) table, a row for each of the last T tokens, a column for each of all S: True where the
    row's token may not look, since the column's stands after it. `device`: where it lies.
    >>> causal_mask(3, 3).int()
    tensor([[0, 1, 1],
            [0, 0, 1],
            [0, 0, 0]], dtype=torch.int32)
    """
    places = torch.arange(S, device=device)
    return places > places[S - T:, None]     # a row (S,) against a column (T, 1): each with each

def attend(queries, keys, values, mask, drop_rate=0.0):
    """What each query gathers, (..., T, D): queries (..., T, D), keys and values (..., S, D).
    Two tokens, D = 2. The second one's query is like the first one's key: its scores are 2 and 0;
    divided by sqrt(2), 1.41 and 0; and its shares 0.80 and 0.20. The first one sees only itself:
    >>> queries = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    >>> keys = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    >>> attend(queries, keys, torch.tensor([[10.0, 0.0], [0.0, 30.0]]), causal_mask(2, 2))
    tensor([[10.0000,  0.0000],
            [ 8.0443,  5.8671]])

    8.04 is 80.4 % of 10, and 5.87 is 19.6 % of 30.
    """
    if fused_is_faster(queries):      # on a GPU (workshop): torch's own, the same in one call
        return F.scaled_dot_product_attention(queries, keys, values, ~mask, drop_rate)
    D = queries.shape[-1]
    scores = queries @ keys.transpose(-2, -1) / math.sqrt(D)      # (..., T, S); K^T: see above
    scores = scores.masked_fill(mask, -math.inf)
    shares = scores.softmax(dim=-1)                               # each row by itself
    shares = F.dropout(shares, drop_rate)     # see TransformerBlock; by default nothing is dropped
    return shares @ values

# One head has one row of shares, which add up to 1: what it gives to one token, it takes from
# another. But a token has several questions: "his" wants to know who "he" is, and also what he did.
# One head might look for the last person that was named, another for the last verb. So there are H
# heads. Each Linear still reads all C numbers of a token; its C results are cut into H pieces of D:
# 0 to 47 for the first head, 48 to 95 for the second, ...; and each attends by itself. It costs no
# more: three Linears, and one that mixes what the heads have found, are 4 C^2 weights for any H.
# (`linear`, below, makes an nn.Linear whose weights begin small.)
class MultiHeadAttention(nn.Module):
    """H attentions side by side: (B, T, C) -> (B, T, C).
    >>> MultiHeadAttention(GPTConfig(emb_dim=32, n_heads=4))(torch.zeros(2, 3, 32)).shape
    torch.Size([2, 3, 32])
    """
    def __init__(self, config):
        super().__init__()
        C = config.emb_dim
        self.config = config
        self.query = linear(C, C, config, bias=config.qkv_bias)
        self.key = linear(C, C, config, bias=config.qkv_bias)
        self.value = linear(C, C, config, bias=config.qkv_bias)
        self.out_proj = linear(C, C, config, into_sum=True)

    def split_heads(self, x):
        """(B, T, C) -> (B, H, T, D)."""
        B, T, C = x.shape
        H = self.config.n_heads
        pieces = x.reshape(B, T, H, C // H)      # the last direction is cut into H pieces
        return pieces.transpose(1, 2)            # swaps T and H: `attend` works on the last two

    def queries_keys_values(self, x, cache=None):
        """(B, T, C) -> three times (B, H, T, D); with a cache, keys and values of all S tokens."""
        queries = self.split_heads(self.query(x))
        keys = self.split_heads(self.key(x))
        values = self.split_heads(self.value(x))
        if cache is not None:                         # step 13: it knows the tokens before these
            keys, values = cache.append(self, keys, values)
        if self.config.position == "rotary":          # another way to tell the places (workshop)
            queries, keys = rotate(queries, keys)
        return queries, keys, values

    def gather(self, queries, keys, values):
        mask = causal_mask(queries.shape[2], keys.shape[2], queries.device)
        drop_rate = self.config.drop_rate if self.training else 0.0     # set by `train`, step 10
        return attend(queries, keys, values, mask, drop_rate)

    def forward(self, x, cache=None):
        queries, keys, values = self.queries_keys_values(x, cache)
        gathered = self.gather(queries, keys, values)             # (B, H, T, D)
        side_by_side = gathered.transpose(1, 2).flatten(2)        # (B, T, H, D), joined: (B, T, C)
        return self.out_proj(side_by_side)                        # mixes what the heads have found

class FeedForward(nn.Module):
    """Each token alone: widen to 4 C (4 by convention), bend, narrow. (B, T, C) -> (B, T, C).
    Two Linears without a bend are one: 3 (2 x) is just 6 x. GELU bends softly at 0: what is clearly
    positive passes, what is clearly negative does not (Hendrycks & Gimpel 2016). So each of the 4 C
    numbers can be an "if": attention has brought "renounced" to "his"; if both are there (with a
    bias of -1.5, 1 + 1 is above 0, and 1 alone is not), `narrow` adds what points to "kingdom" or
    "throne"; if not, next to nothing.
    >>> F.gelu(torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]))
    tensor([-0.0455, -0.1587,  0.0000,  0.8413,  1.9545])
    """
    def __init__(self, config):
        super().__init__()
        self.form = {"exact": "none", "tanh": "tanh"}[config.gelu]      # torch: how approximated?
        self.widen = linear(config.emb_dim, 4 * config.emb_dim, config)
        self.narrow = linear(4 * config.emb_dim, config.emb_dim, config, into_sum=True)

    def forward(self, x):
        return self.narrow(F.gelu(self.widen(x), approximate=self.form))

# A gradient goes back from the loss (step 9: how wrong the guesses were) and is multiplied by the
# slope of every layer on its way: twelve slopes of 0.5 make 0.0002, and the first layers learn
# nothing. So a block does not replace the vectors, it adds to them: x + f(x), the residual. If f
# has the slope f', that has 1 + f'; two in a row have (1 + f')(1 + g') = 1 + f' + g' + f'g'.
# However small f' and g' are, the 1 remains: on that way the gradient arrives whole, at any depth.
#
# But what only adds grows. Ten times larger queries and keys make scores a hundred times larger,
# and softmax gives all to one. So each part reads x through a LayerNorm: it subtracts their mean
# from a token's C numbers, and divides them by their spread, the root of the mean of their squares.
# (2, 4, 6, less their mean: -2, 0, 2; their spread is 1.63.) Then it scales and shifts them as it
# has learned. That is x + f(norm(x)), "pre-norm": only f reads the normed x, the 1 stays as it is.
# In norm(x + f(x)), the 1, too, would be multiplied by the norm's slope, twice in every block.
#
# Every table starts at random: were it all one number, all heads would learn the same. And small,
# so that sums of C products are not large: GPT-2 takes a spread of 0.02 for C = 768; with fewer to
# add up, they may be larger. The blocks add to x 2 n_layers times in all; as with the coins, the
# sum grows with the root of that number, so each starts smaller by the root.
def linear(inputs, outputs, config, bias=True, into_sum=False):
    """An nn.Linear with weights as above, and biases of 0; `into_sum` if its results are added."""
    layer = nn.Linear(inputs, outputs, bias=bias)
    shrink = math.sqrt(2 * config.n_layers) if into_sum else 1
    nn.init.normal_(layer.weight, std=spread(config) / shrink)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer

def spread(config):
    """The spread (standard deviation) of first weights: two of three lie within it."""
    return 0.02 * math.sqrt(768 / config.emb_dim)

def norm(config):
    return nn.LayerNorm(config.emb_dim)

class TransformerBlock(nn.Module):
    """Attention, then feed-forward, each added to what was there: (B, T, C) -> (B, T, C).
    In training, dropout sets some of the added numbers to 0 at random (`drop_rate` of them), so
    that the model relies on none. That helps on unread text; ours is learned by heart, so it is 0.
    >>> nn.LayerNorm(3)(torch.tensor([2.0, 4.0, 6.0])).detach()    # detach: just the numbers
    tensor([-1.2247,  0.0000,  1.2247])
    """
    def __init__(self, config):
        super().__init__()
        self.norm1 = norm(config)
        self.att = MultiHeadAttention(config)
        self.norm2 = norm(config)
        self.ff = FeedForward(config)
        self.dropout = nn.Dropout(config.drop_rate)

    def forward(self, x, cache=None):
        x = x + self.dropout(self.att(self.norm1(x), cache))
        x = x + self.dropout(self.ff(self.norm2(x)))
        return x

# So far, nothing tells a score where two tokens stand: in the first block, "dog bites man" and "man
# bites dog" would give the token after them the same values in the same shares. So each place of
# the window, 0 to 31, has a vector too, learned like the tokens' own, and what enters the first
# block is the sum of both (Radford et al. 2019; two other ways are in the workshop).
class GPTModel(nn.Module):
    """Token ids (B, T) to logits (B, T, vocabulary): at each place, a number for every token that
    could come next, larger if likelier. Raises ValueError if T is more than the context.
    >>> model = GPTModel(GPTConfig(vocab_size=50, context_length=8, emb_dim=32))
    >>> model(torch.tensor([[4, 8, 15], [16, 23, 42]])).shape
    torch.Size([2, 3, 50])
    """
    def __init__(self, config):
        super().__init__()
        self.config = config
        C = config.emb_dim
        self.tok_emb = nn.Embedding(config.vocab_size, C)           # a vector for each token
        nn.init.normal_(self.tok_emb.weight, std=spread(config))
        self.pos_emb = nn.Embedding(config.context_length, C)       # and one for each place
        nn.init.normal_(self.pos_emb.weight, std=spread(config))
        if config.position != "learned":
            self.pos_emb = fixed_positions(config)                  # workshop
        self.drop_emb = nn.Dropout(config.drop_rate)
        self.trf_blocks = nn.ModuleList(TransformerBlock(config) for _ in range(config.n_layers))
        self.final_norm = norm(config)         # x itself was never normed
        self.out_head = linear(C, config.vocab_size, config, bias=False)    # a logit for each token
        if config.tie_weights:
            self.out_head.weight = self.tok_emb.weight

    def forward(self, token_ids, cache=None):
        token_ids = token_ids.to(self.tok_emb.weight.device)        # to where the weights are
        T = token_ids.shape[1]
        start = 0 if cache is None else cache.length
        check(start + T <= self.config.context_length, f"{start + T} tokens are more than the "
              f"context of {self.config.context_length}: give the model only the last ones")
        places = torch.arange(start, start + T, device=token_ids.device)
        x = self.drop_emb(self.tok_emb(token_ids) + self.pos_emb(places))   # (B, T, C)
        for block in self.trf_blocks:
            x = block(x, cache)                                             # (B, T, C)
        if cache is not None:                # step 13: then only the last place is asked for, T = 1
            x = x[:, -1:]
        return self.out_head(self.final_norm(x))                            # (B, T, vocabulary)

# ═══ Step 7: a batch through the untrained model ═══════════════════════════════════════════════
# Before we train anything, the command `model` pushes a batch through, two windows of 32 tokens,
# and shows what becomes of it. And where is the model large? Nearly half of its numbers say what
# the tokens are (tok_emb, and out_head for the way back); nearly all others are in the blocks,
# 12 C^2 in each (4 for attention, 8 for the feed-forward).
#
#     $ python story_llm.py model
#     ...
#       part         shape of the output    learns
#       tok_emb              (2, 32, 192)   399,168
#       pos_emb                 (32, 192)     6,144
#       trf_blocks.0         (2, 32, 192)   444,288
#       trf_blocks.1         (2, 32, 192)   444,288
#       final_norm           (2, 32, 192)       384
#       out_head            (2, 32, 2079)   399,168
def count_parameters(part):
    """How many numbers a model, or a part of one, has to learn: here 3 x 2 weights and 2 biases.
    >>> count_parameters(nn.Linear(3, 2))
    8
    """
    return sum(weight.numel() for weight in part.parameters() if weight.requires_grad)

# ═══ Step 8: greedy generation ═════════════════════════════════════════════════════════════════
# Now the model writes, as step 1 said. "Greedy" means to take the likeliest token each time; argmax
# is the place of the largest number in a row, here the token's id. The untrained model answers with
# noise, but it answers:
#
#     $ python story_llm.py generate --untrained --max-new-tokens 8
#     Once Aadhan renounced his kingdom keeps reached keeps reachedum mor wrote mor
def generate_text_simple(model, idx, max_new_tokens, context_size):
    """Append `max_new_tokens` greedily chosen tokens to idx, (B, T); returns the longer rows.
    The model sees the last `context_size` tokens.
    Anything that makes logits of ids will do as a model. This one knows five tokens, and that after
    each comes the next, and after the last the first (one_hot: a 1 in its place, else 0):
    >>> def counting(idx):
    ...     return F.one_hot((idx + 1) % 5, num_classes=5)
    >>> counting(torch.tensor([[3]]))
    tensor([[[0, 0, 0, 0, 1]]])
    >>> generate_text_simple(counting, torch.tensor([[3]]), max_new_tokens=4, context_size=8)
    tensor([[3, 4, 0, 1, 2]])
    """
    for _ in range(max_new_tokens):
        idx_cond = idx[:, -context_size:]
        with torch.no_grad():
            logits = model(idx_cond)                                # (B, T, vocabulary)
        last = logits[:, -1, :]                                     # only the last place is asked
        idx_next = torch.argmax(last, dim=-1, keepdim=True)         # (B, 1), not (B,)
        idx = torch.cat([idx, idx_next.to(idx.device)], dim=1)      # side by side: (B, T + 1)
    return idx

# ═══ Step 9: the loss before training, and recall ══════════════════════════════════════════════
# How wrong is the model? Softmax makes probabilities of its logits. For each exercise, take the
# probability p that it gave to the token that really came, and note -ln(p): 0 for a sure hit, more
# for a surprise: 0.69 for p = 1/2, 2.3 for 1/10, 9.2 for 1/10,000. The mean over all exercises is
# the loss, called cross-entropy.
#
# The weights of an untrained model are small, so its logits are near 0, and softmax makes of them
# about 1/2079 each: the loss is about -ln(1/2079) = ln(2079) = 7.64. A little more is normal, for
# near is not at: with only two tokens, 0.5 for each costs 0.69; 0.6 and 0.4 cost 0.51 or 0.92, 0.71
# in the mean. Much more would mean a mistake in the program.
def batch_loss(model, inputs, targets):
    """The mean loss on a batch, inputs and targets (B, T) ids each.
    >>> def model(inputs):                                        # sure of token 1, whatever comes
    ...     return torch.tensor([0.0, 2.0, 0.0]).expand(*inputs.shape, 3)     # at every place
    >>> batch_loss(model, torch.tensor([[0, 0]]), torch.tensor([[1, 2]]))
    tensor(1.2395)
    >>> p = math.e ** 2 / (math.e ** 2 + 1 + 1)                   # softmax: 0.79 for token 1
    >>> hit, miss = -math.log(p), -math.log((1 - p) / 2)
    >>> round(hit, 4), round(miss, 4), round((hit + miss) / 2, 4)
    (0.2395, 2.2395, 1.2395)
    """
    logits = model(inputs)                            # (B, T, vocabulary)
    guesses = logits.flatten(0, 1)                    # every place is a guess: (B * T, vocabulary)
    answers = targets.flatten().to(logits.device)     # (B * T,)
    # Softmax, -ln, and the mean. Some windows of step 10 are filled up with IGNORED: not asked.
    return F.cross_entropy(guesses, answers, ignore_index=IGNORED)

# The loss does not tell what we want to know: can the model go on with the story? So we try. Recall
# is the share of sentences that it continues to the letter, for 80 characters, from their first
# five words alone. That is hard: nothing before those words shows where in the story we are. It is
# measured on the text that the model practises: the end, which it never sees, nobody could guess.
def measure_recall(model, tokenizer, text, max_sentences=1000):
    """Recall on `text`, from 0 to 1, of its sentences with 8 words or more (or of some of them)."""
    exercises = recall_exercises(text, max_sentences)       # [(five words, what follows), ...]
    hits = count_hits(model, tokenizer, exercises)          # as step 8, prompt by prompt
    return hits / max(len(exercises), 1)

# Before training, both are as bad as expected:
#
#     $ python story_llm.py evaluate --untrained
#     an untrained model:
#       Train loss               7.775
#       Val loss                 7.803
#       ln(2079), a blind guess  7.640
#     Recall 0.0%: 0 of 173 sentences continued to the letter after five words

# ═══ Step 10: training ═════════════════════════════════════════════════════════════════════════
# Now the model practises. It takes only the five lines of the loop below. Here, a small model
# learns to count to three, from 1 2 3 1 2 3 ...; for our story, the loop runs 180 times.
def a_training_loop():
    """
    >>> windows = SlidingWindowDataset(torch.tensor([1, 2, 3] * 9), context_length=4)
    >>> model = GPTModel(GPTConfig(vocab_size=4, context_length=4, emb_dim=16))
    >>> optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    >>> for step in range(50):
    ...     inputs, targets = windows[torch.randint(len(windows), (8,))]    # 8 of them, by chance
    ...     optimizer.zero_grad()                        # forget the gradients of the step before
    ...     loss = batch_loss(model, inputs, targets)    # how wrong is the model?
    ...     loss.backward()                              # how does the loss grow with each weight?
    ...     optimizer.step()                             # move each a little, the other way
    >>> generate_text_simple(model, torch.tensor([[2, 3, 1]]), max_new_tokens=4, context_size=4)
    tensor([[2, 3, 1, 2, 3, 1, 2]])
    """

# The real loop has a run to work on: a model with all that belongs to it while it learns.
@dataclass
class Run:
    """A model, how it is trained, and how far it has come."""
    model: GPTModel
    tokenizer: WordTokenizer | BPETokenizer
    train_config: TrainConfig
    fingerprint: str                                 # of the corpus that it learns
    steps_per_epoch: int
    total_steps: int
    prompt: str                                      # the words that it continues at evaluations
    step: int = 0                                    # steps done
    history: list = field(default_factory=list)      # of Evaluations
    loss: float | None = None                        # of the last step
    optimizer: torch.optim.Optimizer | None = None
    optimizer_state: dict = field(default_factory=dict)      # what a saved one remembers
    asked: dict = field(default_factory=dict)        # options of the command line

    @property
    def config(self):
        return self.model.config

def train(run, corpus, after_step=lambda run: False, take_step=None):
    """Train `run` from `run.step` to `run.total_steps`. `after_step(run)` is called at first and
    after each step, to print and to save; if it returns True, training stops there. `take_step` may
    replace `training_step` (extras). Raises ValueError if the loss is no longer a number."""
    take_step = take_step or training_step
    batches = TrainingBatches(corpus, run)      # windows for each step: "Which windows?", below
    start_optimizer(run)                        # `make_optimizer`, and what a saved one remembers
    while True:
        if evaluation_due(run):                 # now and then: the losses, recall, a sample
            run.history.append(evaluate(run, corpus))
        if after_step(run) or run.step >= run.total_steps:
            break
        run.model.train()                       # the model's own `train`: dropout on
        inputs, targets = batches[run.step]
        take_step(run, inputs, targets)
    run.model.eval()                            # dropout off

def training_step(run, inputs, targets):
    """One step on a batch, (B, T) ids each; leaves the loss on it in `run.loss`."""
    config = run.train_config
    run.optimizer.zero_grad()         # `backward` adds to the gradients that are there
    with precision_of(run):           # where the machine is faster so: with fewer digits (workshop)
        loss = batch_loss(run.model, inputs, targets)
    loss.backward()
    # One odd batch can have a gradient a hundred times as long as the others. In Adam's means
    # (below) it would outweigh them for many steps. All gradients together are one vector: if its
    # length (the root of the sum of squares) is above grad_clip, it is shortened to that.
    length = nn.utils.clip_grad_norm_(run.model.parameters(), config.grad_clip)
    for group in run.optimizer.param_groups:       # all weights have the same learning rate
        group["lr"] = learning_rate(run.step, run.total_steps, config)
    run.optimizer.step()
    run.step += 1
    run.loss = loss.item()                         # item: as a number of Python
    check_finite(run.loss + length.item(), run)    # if either is no number: stop, save nothing

# The plainest optimizer moves each weight by -lr * gradient (lr: the learning rate). Adam takes the
# mean of a weight's last gradients, divided by their usual size (the root of their mean square): 3,
# 1, 2 and 0.03, 0.01, 0.02 both give 0.9, so all weights move at a similar pace; 3, -3, 3, -3, mere
# noise, gives 0. The W is for weight decay: a pull towards zero, which keeps small what nothing
# needs. That helps on unread text; ours is learned by heart, so there is no decay.
def make_optimizer(model, config):
    """AdamW (Loshchilov & Hutter 2019), with decay for matrices, not for biases and norms."""
    if config.optimizer == "muon":
        return MuonAndAdamW(model, config)      # workshop
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [{"params": [p for p in learned if p.dim() > 1], "weight_decay": config.weight_decay},
              {"params": [p for p in learned if p.dim() < 2], "weight_decay": 0.0}]
    # betas: 0.9: a mean over some 10 gradients; 0.98: over some 50 squares. fused: all in one go.
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)

def learning_rate(step, total_steps, config):
    """How far the weights move in a step. At first Adam's means rest on few batches and are not to
    be trusted, so it rises for some steps (warm-up). Near the end, large steps would jump around
    the best place, so it falls, along a straight line, to nothing.
    >>> config = TrainConfig(learning_rate=1.0, warmup_steps=2)
    >>> [round(learning_rate(step, 22, config), 2) for step in (0, 1, 2, 7, 12, 17, 21)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.05]
    """
    warmup = min(config.warmup_steps, total_steps // 10)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    return config.learning_rate * (total_steps - step) / (total_steps - warmup)

# After 2, 5 and 20 % of the way, and every 45 steps, we look how far the model has come: at the
# losses, at recall (on some of the sentences), and at a sample of its writing.
@dataclass
class Evaluation:
    """What we saw of a run at some step. What could not be measured is None."""
    step: int
    epoch: float
    tokens: int                          # seen so far
    train_loss: float
    val_loss: float | None
    recall: float | None
    prompt: str
    sample: str                          # how the model goes on from the prompt

# Which windows? If they began at the same places in every epoch, each word of the story would
# always stand at the same place of its window, and the model would know it only there. So in an
# epoch, one reading of the text, a window begins at a random place in each stretch of T tokens.
#
# A prompt stands at place 0, and its first word has no space before it, so it is another token than
# in the text. Windows hardly ever begin so. So half of a batch, 16 of its 32, are openings: cut at
# a sentence's start (some at any word, for other prompts) and encoded as a prompt is. Without them,
# recall is 91 % after as many steps. The other 16 read the whole text in nine steps; twenty such
# epochs are a run. Below each line of figures, the model's words are those after the dots:
#
#     $ python story_llm.py train
#     ...
#     Ep 1 (Step 000009): Train loss 6.187, Val loss 6.261, recall 0%, 21,741 tokens/s, 0:08 left
#         Once Aadhan renounced his kingdom ...., and., and, and, and, and, and, and, and., and,
#     Ep 4 (Step 000036): Train loss 3.430, Val loss 5.097, recall 0%, 18,650 tokens/s, 0:08 left
#         Once Aadhan renounced his kingdom ..., and a hand, and the wall, and the wall. "I have in
#     Ep 20 (Step 000180): Train loss 0.231, Val loss 6.239, recall 100%, 21,744 tokens/s, 0:00 left
#         Once Aadhan renounced his kingdom ... for the love of Thamarai, its people living in fear
#
# Why does the validation loss get worse while recall gets better? They ask about different texts:
# recall about the practised one, the validation loss about the unread end. At its best, the model
# gave the right token there, say, 1/165, which costs 5.1. Then it becomes sure: it takes every
# "Aadhan thanked" for the one it knows; what really comes there then has 1/10,000, which costs 9.2.
# To be wrong and sure costs more than to be unsure. It memorises: with one short story, as wanted.

# ═══ Step 11: save and load ════════════════════════════════════════════════════════════════════
# A whole run goes into one file: settings, tokenizer, weights, what the optimizer remembers,
# history. To generate from it, nothing else is needed, not even the story.

def save_checkpoint(path, run):
    """Write `run` to `path` in one go; on failure, it raises OSError and keeps the old file.
    >>> import tempfile
    >>> run = new_run(corpus_from_text("They went upriver for nine days.", "word"))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_checkpoint(folder + "/run.pt", run)
    ...     loaded = load_checkpoint(folder + "/run.pt")
    >>> loaded.config == run.config, loaded.tokenizer.encode("They went")
    (True, [6, 4])
    """
    state = state_of(run)                # a dictionary of plain values and tensors (workshop)
    write_whole(path, state)             # written beside the old file, then moved to its place

# Reading takes more care than writing, for the file may be from anybody. Python's own format for
# such things, pickle, can run code when it is read. torch's `weights_only` refuses that: it makes
# tensors and plain values, and nothing else. The file also keeps the loss on a few fixed tokens: if
# the same weights have another loss than when they were saved, the program has been changed since.
def load_checkpoint(path, device="cpu"):
    """The run saved at `path`, ready to generate (`.model`, `.tokenizer`) or to be trained on.
    Raises OSError if there is no such file, ValueError if it is not one of ours, or damaged."""
    device = choose_device(device)
    with what_is_wrong_with_model(path):
        state = read_whole(path)         # with weights_only, and held against what we write
        return run_from(state, device)

# ═══ Step 12: loss curves ══════════════════════════════════════════════════════════════════════
# Two curves tell what the model learns. While both fall, what holds for other texts, too; when
# validation rises again, this text only, by heart; if both stay near ln(vocabulary), nothing.
def plot_losses(history, vocab_size, path=None):
    """Draw losses and recall of a history, to `path` (.png, .svg, .pdf) too. Returns the figure.
    >>> history = [Evaluation(0, 0.0, 0, 7.8, 7.8, 0.0, "", ""),
    ...            Evaluation(9, 1.0, 9216, 6.1, 6.2, 0.0, "", "")]
    >>> [curve.get_label() for curve in plot_losses(history, vocab_size=2079).axes[0].lines]
    ['training', 'validation', 'blind guess, ln(2,079)']
    """
    from matplotlib.figure import Figure
    check(len(history) > 0, "there is no history to draw: train first")
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    losses, recalls = figure.subplots(2, height_ratios=(4, 1), sharex=True)
    epochs = [evaluation.epoch for evaluation in history]
    curves = [("train_loss", losses, "#0072b2", "o", "training"),
              ("val_loss", losses, "#d55e00", "s", "validation"),
              ("recall", recalls, "#009e73", "D", "recall")]
    for name, axes, color, marker, label in curves:
        values = [getattr(evaluation, name) for evaluation in history]
        if None not in values:
            axes.plot(epochs, values, color=color, marker=marker, label=label)
    guess = math.log(vocab_size)
    losses.axhline(guess, color="gray", linestyle=":", label=f"blind guess, ln({vocab_size:,})")
    losses.set(ylabel="loss per token", ylim=(0, None))
    losses.legend()
    recalls.set(xlabel=f"epochs ({history[-1].tokens:,} tokens in all)", ylabel="recall",
                ylim=(-0.05, 1.05))
    return save_figure(figure, path)

# ═══ Step 13: inference from the saved file ════════════════════════════════════════════════════
# `generate_text_simple` calculates the whole window again for each new token. That is wasteful:
# since no token looks ahead, what a token has made of those before it cannot change when another
# comes after it. Only the new token has to be calculated, and all that it needs of the others are
# their keys and values. So we keep those, in a cache. It is valid as long as the window grows. When
# the context is full, each new token pushes the first one out, and all others move to another
# place, whose vector is part of what they are: the cache begins anew, and saves nothing any more.
class KeyValueCache:
    """Keys and values of the tokens so far, (B, H, S, D) each, for every attention layer."""
    def __init__(self):
        self.known = {}         # {layer: (keys, values)}
        self.length = 0         # how many tokens they are of

    def append(self, layer, keys, values):
        """Append the keys and values of new tokens to a layer's; returns all of them."""
        if layer in self.known:
            old_keys, old_values = self.known[layer]
            keys = torch.cat([old_keys, keys], dim=2)
            values = torch.cat([old_values, values], dim=2)
        self.known[layer] = (keys, values)
        self.length = keys.shape[2]
        return keys, values

# A story known by heart is continued by the likeliest token. In any other, that soon goes in
# circles: there, one lets chance choose, by the probabilities. A temperature makes them sharper
# (below 1) or flatter (above 1): the logits are divided by it before the softmax. top_k leaves only
# the k likeliest tokens to choose from; top_p the likeliest, until they add up to it.
@dataclass(frozen=True)
class Sampling(Settings):
    """How the next token is chosen."""
    temperature: float = setting(0.0, "0: the likeliest token; more: more chance", 0)
    top_k: int = setting(0, "choose among so many of the likeliest; 0: all", 0)
    top_p: float = setting(1.0, "choose among the likeliest that add up to it; from 1: all", 1e-9)
    seed: int = setting(42, "where chance starts: same seed, same text", 0, 1 << 63)

def next_token_probabilities(logits, sampling):
    """Logits (..., vocabulary) to the probabilities by which the next token is chosen.
    >>> logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    >>> next_token_probabilities(logits, Sampling(temperature=1.0))
    tensor([0.6439, 0.2369, 0.0871, 0.0321])
    >>> next_token_probabilities(logits, Sampling(temperature=0.5))     # as if 4, 2, 0, -2
    tensor([0.8650, 0.1171, 0.0158, 0.0021])
    >>> next_token_probabilities(logits, Sampling(temperature=2.0))     # as if 1, 0.5, 0, -0.5
    tensor([0.4551, 0.2760, 0.1674, 0.1015])
    >>> next_token_probabilities(logits, Sampling(temperature=1.0, top_k=2))
    tensor([0.7311, 0.2689, 0.0000, 0.0000])
    >>> next_token_probabilities(logits, Sampling(temperature=1.0, top_p=0.9))    # two: only 0.88
    tensor([0.6652, 0.2447, 0.0900, 0.0000])
    """
    temperature = max(sampling.temperature, 1e-6)             # so small, only the likeliest is left
    probabilities = (logits / temperature).softmax(dim=-1)
    in_order, order = probabilities.sort(dim=-1, descending=True)      # the likeliest first; its id
    if sampling.top_k:
        in_order[..., sampling.top_k:] = 0
        in_order = in_order / in_order.sum(dim=-1, keepdim=True)
    if sampling.top_p < 1:
        likelier = in_order.cumsum(dim=-1) - in_order         # of all likelier ones together
        in_order[likelier >= sampling.top_p] = 0
    kept = torch.zeros_like(probabilities).scatter(-1, order, in_order)      # back to their places
    return kept / kept.sum(dim=-1, keepdim=True)

def generate(model, token_ids, max_new_tokens, sampling=None):
    """Continue token_ids (B, T), T > 0: yields one tensor (B,) after the other, the new token of
    each row. Greedy, it chooses the same tokens as `generate_text_simple`, only faster."""
    sampling = sampling or Sampling()
    context_length = model.config.context_length
    window = token_ids[:, -context_length:].cpu()       # on the CPU: chance is alike everywhere
    generator = torch.Generator().manual_seed(sampling.seed)
    cache = KeyValueCache()
    new = window
    for _ in range(max_new_tokens):
        if cache.length + new.shape[1] > context_length:      # full: the window slides
            cache = KeyValueCache()
            new = window
        with inference(model):                                # no_grad, and dropout off (workshop)
            logits = model(new, cache)[:, -1, :].cpu()        # (B, vocabulary)
        new = logits.argmax(dim=-1, keepdim=True)             # (B, 1): greedy, as in step 8
        if sampling.temperature > 0:
            probabilities = next_token_probabilities(logits, sampling)
            new = torch.multinomial(probabilities, 1, generator=generator)      # one by chance
        yield new[:, 0]
        window = torch.cat([window, new], dim=1)[:, -context_length:]

# That is the whole way. The model was noise, and now:
#
#     $ python story_llm.py generate --prompt "Once Aadhan renounced" --max-new-tokens 14
#     Once Aadhan renounced his kingdom for the love of Thamarai, its people living in
#
# What it cannot do: it knows no English, only one story, by heart. A model that talks is in essence
# the same, with a library in place of the story, and many machines for months.

# ═══ Workshop: checks, texts, random numbers ═══════════════════════════════════════════════════
# From here on, nothing new is taught. What stands below makes the lesson's code sturdy (it says in
# words what is wrong), fast, and at home on more machines. The lesson calls it by name.

import argparse
import contextlib
import ctypes
import functools
import glob
import hashlib
import itertools
import pickletools
import reprlib
import shlex
import signal
import sys
import threading
import time
import warnings
import zipfile
from dataclasses import fields

def check(condition, message):
    """Raise ValueError(message) unless the condition holds: how every mistake is told."""
    if not condition:
        raise ValueError(message)

def allowed(f):
    """In words, which values a field of a settings class may have."""
    meaning, at_least, below, choices = f.metadata.values()
    if choices:
        return "one of " + ", ".join(choices)
    kind = {int: "a whole number", float: "a number", bool: "True or False", str: "a text"}[f.type]
    lower = "" if at_least is None else f", {at_least} or more"
    return kind + lower + ("" if below == math.inf else f", below {below}")

def check_settings(settings):
    """Hold every field of a settings class against its limits. Raises ValueError."""
    for f in fields(settings):
        value = getattr(settings, f.name)
        meaning, at_least, below, choices = f.metadata.values()
        right = type(value) is f.type or (f.type is float and type(value) is int)
        if choices:
            right = value in choices
        elif right and at_least is not None:
            right = at_least <= value < below
        check(right or value is f.default is None,
              f"{f.name} must be {allowed(f)}, not {reprlib.repr(value)}")
    if isinstance(settings, GPTConfig):
        width, heads = settings.emb_dim, settings.n_heads
        check(width % heads == 0, f"emb_dim ({width}) must be divisible by n_heads ({heads}), "
              "for each head gets an equal part")
        check(settings.position == "learned" or width // heads % 2 == 0, f"{settings.position} "
              f"positions take numbers in pairs: the width per head ({width // heads}) is odd")

@contextlib.contextmanager
def what_is_wrong_with(path):
    """Within this a text file is read; what goes wrong is said in words."""
    check(Path(path).is_file(), f"{path} is not a file: give a text file with --text")
    try:
        yield
    except UnicodeDecodeError as error:
        mark = len(Path(path).read_bytes()) - len(error.object)      # "utf-8-sig" does not count it
        byte = f"byte {error.start + mark} is 0x{error.object[error.start]:02x}"
        encoding = "UTF-16" if error.object[:2] in (b"\xff\xfe", b"\xfe\xff") else "WINDOWS-1252"
        raise ValueError(f"{path} is not UTF-8 text ({byte}). Convert it first, for example: "
                         f"iconv -f {encoding} -t UTF-8 {path} > utf8.txt") from None

def encode_corpus(tokenizer, train_text, val_text):
    """The corpus of a text that is split already, with a tokenizer that is made already."""
    train_ids, val_ids = [torch.tensor(tokenizer.encode(text), dtype=torch.long)
                          for text in (train_text, val_text)]
    both = f"{len(train_text)} {train_text}{val_text}".encode("utf-8", "replace")
    return Corpus(tokenizer, train_text, train_ids, val_ids, hashlib.sha256(both).hexdigest())

# The pieces of steps 2 and 4, for all scripts. \p{L} is any letter, \p{N} any digit, and \p{M} a
# sign that belongs to the letter before it: without it, Hindi and Tamil are torn at every vowel.
# `--` means "but for". Chinese, Japanese, Thai and some others put no spaces between words.
UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"
LETTER = rf"[[\p{{L}}\p{{M}}\p{{N}}_\u200c\u200d]--{UNSPACED}]"
WORD = rf"{UNSPACED}\p{{M}}*|{LETTER}+(?:['’]{LETTER}+)*"            # a character, or a whole word
PIECE = regex.compile(rf" ?(?:{WORD}|\S)|\s+", regex.V1)             # or a mark; or white space
GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
#               's 't 'll ...         word     number    other marks          white space
STORY_SPLIT = (rf" ?(?:(?!{UNSPACED})[\p{{L}}\p{{M}}\u200c\u200d])+| ?{UNSPACED}\p{{M}}*"
               r"| ?\p{N}+| ?[^\s\p{L}\p{M}\p{N}]+|\s+(?!\S)|\s+")

# A sentence starts at the beginning, after . ! ? and the like, or after an empty line; in a text
# that has hardly any, as some poems do, with every line.
SENTENCE_START = regex.compile(
    r"""(?:\A|[.!?…।॥؟۔።។။]["'”’)\]]*\s|[。！？]["'”’」』）]*|\n[^\S\n]*\n)\s*""")
SPOKEN_WORD = regex.compile(rf"\p{{P}}*{UNSPACED}\p{{M}}*\p{{P}}*|[\S--{UNSPACED}]+", regex.V1)

def sentence_starts(text):
    starts = [match.end() for match in SENTENCE_START.finditer(text)]
    lines = [match.end() for match in regex.finditer(r"(?:\A|\n)\s*", text)]
    if len(lines) > 10 * len(starts):
        starts = lines
    return [start for start in starts if start < len(text)] or [0]

def word_starts(text):
    return [match.start() for match in SPOKEN_WORD.finditer(text)] or [0]

def first_words(text, count=5):
    ends = [match.end() for match in itertools.islice(SPOKEN_WORD.finditer(text), count)]
    return text[:ends[-1]][:200].strip() if ends else text

def recall_exercises(text, max_sentences=1000):
    """[(first five words, the 80 characters that follow)] of the sentences with 8 words or more; of
    more than `max_sentences`, at most as many are taken, evenly spread."""
    exercises = []
    for start, end in pairwise([*sentence_starts(text), len(text)]):
        ends = [word.end() for word in SPOKEN_WORD.finditer(text, start, end)]
        if len(ends) >= 8:
            exercises.append((text[start:ends[4]], text[ends[4]:ends[4] + 80]))
    every = max(1, math.ceil(len(exercises) / max_sentences))
    return exercises[::every]

IGNORED = -100      # as a target: nothing is asked, where a window is longer than the text

def mean_loss(model, token_ids, max_windows=32):
    """Mean loss over token_ids (N,); None if N < 2. The windows stand side by side; of more than
    `max_windows`, as many are taken, evenly spread."""
    if len(token_ids) < 2:
        return None
    T = min(model.config.context_length, len(token_ids) - 1)
    windows = SlidingWindowDataset(token_ids, T, stride=T)
    count = min(len(windows), max_windows)
    chosen = torch.arange(count) * len(windows) // count      # evenly spread, in whole numbers
    total = 0.0
    with inference(model):                                    # no gradients, no dropout
        for some in chosen.split(max(1, 1024 // T)):          # not all at once, to save memory
            inputs, targets = windows[some]
            total += batch_loss(model, inputs, targets).item() * len(some)    # item: Python's float
    return total / count

def count_hits(model, tokenizer, exercises):
    """How many of the prompts the model continues, greedily, with their answers."""
    hits = 0
    for prompt, answer in exercises:
        row = tokenizer.encode(prompt)
        wanted = tokenizer.decode(row) + answer
        for _ in range(320):        # 80 characters of 4 bytes each; mostly, once is enough
            row = continued(model, tokenizer, row, wanted)
            text = tokenizer.decode(row).rstrip("\ufffd")
            if text == wanted or not wanted.startswith(text):
                break
        hits += text.startswith(wanted)
    return hits

def continued(model, tokenizer, row, wanted):
    """Token ids that should become the text `wanted`, continued by a token or more. The model is
    shown what it should write: as far as its guesses are just that, it would have written the same
    by itself, so all of them are known after one pass (Leviathan et al. 2023)."""
    T = model.config.context_length
    draft = tokenizer.encode(wanted)
    if draft[:len(row)] != row:         # its end can change how the beginning is cut
        draft = row
    window = draft[max(0, len(row) - T):][:T]
    with inference(model):
        guesses = model(torch.tensor([window]))[0].argmax(dim=-1).tolist()
    place = min(len(row), T) - 1        # of its last token in the window
    row = [*row, guesses[place]]
    while place + 1 < len(window) and window[place + 1] == row[-1]:
        place += 1
        row.append(guesses[place])
    return row

@contextlib.contextmanager
def inference(model):
    """Within this, no gradients are kept and nothing is dropped; after it, all is as before."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)

@contextlib.contextmanager
def own_random_numbers(*names, device=torch.device("cpu")):
    """Within this, chance is made of the names alone; after it, torch's is as before."""
    seed = int.from_bytes(hashlib.sha256(repr(names).encode()).digest()[:7], "big")
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            torch.cuda.manual_seed(seed)
        yield

def new_model(config, seed=0):
    """An untrained model; same seed, same weights."""
    with own_random_numbers("weights", seed):
        return GPTModel(config).eval()

# ═══ Workshop: GPT-2's encoding ════════════════════════════════════════════════════════════════
TOKENIZERS = ("auto", "gpt2", "story", "word")

def make_tokenizer(kind, train_text, val_text="", vocab_size=2048, full_vocab=False):
    """The tokenizer for a story; `kind` may be one that is made already. "auto" is "gpt2" if that
    can be had within 10 seconds and suits the text, else "story". What must be learned is learned
    from `train_text`, to at most `vocab_size` entries; "gpt2" is cut down to what both texts need,
    unless `full_vocab`. Raises OSError if "gpt2" cannot be had."""
    if isinstance(kind, (WordTokenizer, BPETokenizer)):
        return kind
    check(kind in TOKENIZERS, f"the tokenizer is one of {', '.join(TOKENIZERS)}, not {kind!r}")
    if kind == "auto":
        kind = "story" if why_not_gpt2(train_text) else "gpt2"
    if kind == "word":
        return WordTokenizer(build_vocabulary(train_text))
    if kind == "story":
        return BPETokenizer(learn_byte_pairs(train_text[:LEARN_FROM], vocab_size), kind)
    return BPETokenizer(gpt2_tokens([] if full_vocab else [train_text, val_text]), kind)

LEARN_FROM = 1_000_000      # characters; a longer text hardly teaches other byte pairs
GPT2_HELP = """GPT-2's encoding could not be loaded ({}). Offline, tiktoken needs two files from
https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/ in the folder TIKTOKEN_CACHE_DIR:
    6d1cbeee0f20b3d9449abfede4726ed8212e3aee   (vocab.bpe)
    6c7ea1a7e38e3a7f062df639a5b80947f075ffe6   (encoder.json)
or use --tokenizer story, which is learned from the text itself"""

@functools.cache        # asked once: tiktoken keeps a lock while it waits
def ask_for_gpt2(seconds=10):
    """GPT-2's encoding, from tiktoken's cache or the network, or the OSError that came instead.
    tiktoken waits for a silent network for ever, so it waits in a thread that we can leave behind.
    """
    answer = []

    def fetch():
        try:
            import tiktoken
            answer.append(tiktoken.get_encoding("gpt2"))
        except Exception as error:      # whatever the network, the disk or the cache comes up with
            answer.append(OSError(type(error).__name__))

    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    thread.join(seconds)
    return answer[0] if answer else OSError(f"no answer within {seconds} seconds")

def why_not_gpt2(text):
    """Why "auto" does not take GPT-2's encoding for a text; "" if it does. GPT-2 has read English:
    of a word in Hindi or Chinese it makes so many pieces that a window holds only a few words."""
    encoding, some = ask_for_gpt2(), text[:10_000]
    if isinstance(encoding, OSError):
        return f"GPT-2's encoding is not at hand ({encoding})"
    pieces = len(encoding.encode_ordinary(some))
    return "GPT-2's encoding cuts this text into tiny pieces" if 2 * pieces > len(some) else ""

def gpt2_tokens(texts=()):
    """GPT-2's tokens, in its order: those that it takes to split the texts as GPT-2 does, or all if
    there are no texts. It takes the tokens that occur, those that they are joined from, and all
    bytes: then every join of GPT-2's can still happen in these texts, and no other."""
    encoding = ask_for_gpt2()
    if isinstance(encoding, OSError):
        raise OSError(GPT2_HELP.format(encoding))
    tokens = [encoding.decode_single_token_bytes(rank) for rank in range(encoding.eot_token)]
    if not texts:
        return tokens
    ranks = {token: rank for rank, token in enumerate(tokens)}
    needed = {bytes([byte]) for byte in range(256)}
    occurring = set(itertools.chain(*[encoding.encode_ordinary(text) for text in texts]))
    for token_id in occurring:
        parts = [bytes([byte]) for byte in tokens[token_id]]
        while len(parts) > 1:       # make the joins again that make this token
            joined = [first + second for first, second in pairwise(parts)]
            place = min(range(len(joined)), key=lambda i: ranks.get(joined[i], math.inf))
            parts[place:place + 2] = [joined[place]]
            needed.add(joined[place])
    return sorted(needed, key=ranks.get)

# ═══ Workshop: other positions, fused attention ════════════════════════════════════════════════
# "sinusoidal": the vector of a place is not learned, but made of sines and cosines, slower and
# slower from the first number to the last (Vaswani et al. 2017, section 3.5). "rotary": nothing is
# added to a token; queries and keys are turned by an angle that grows with the place, so a score
# depends on how far apart two tokens stand (Su et al. 2021, RoFormer, section 3.2).
def position_angles(n_places, dim, device=None):
    """(n_places, dim / 2) angles: the place times 1 for the first pair, 1/10000 near the last."""
    slowness = torch.arange(0, dim, 2, device=device) / dim
    return torch.arange(n_places, device=device)[:, None] * 10000.0 ** -slowness

def fixed_positions(config):
    """A position embedding that is not learned: sines and cosines; zeros for rotary positions."""
    angles = position_angles(config.context_length, config.emb_dim)
    table = torch.cat([angles.sin(), angles.cos()], dim=-1)
    loudness = spread(config) if config.position == "sinusoidal" else 0.0
    return nn.Embedding.from_pretrained(loudness * table, freeze=True)

def rotate(queries, keys):
    """Turn keys (B, H, S, D), at places 0 to S - 1, and queries (B, H, T, D), at the last T."""
    angles = position_angles(*keys.shape[-2:], keys.device)

    def turn(x, angles):
        first, second = x.chunk(2, dim=-1)      # the pairs are (x[i], x[i + D / 2])
        turned = [first * angles.cos() - second * angles.sin(),
                  first * angles.sin() + second * angles.cos()]
        return torch.cat(turned, dim=-1).to(x.dtype)

    return turn(queries, angles[-queries.shape[-2]:]), turn(keys, angles)

def fused_is_faster(queries):
    """On a GPU it saves memory and time; on a CPU, in bf16, it takes three times as long."""
    return queries.is_cuda

# ═══ Workshop: device and precision ════════════════════════════════════════════════════════════
def choose_device(name="auto"):
    """A torch.device: "cpu", "cuda", "mps", or for "auto" CUDA where there is one, else the CPU.
    Raises ValueError if there is no such device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    check(name in ("cpu", "cuda", "mps"), f"the device is auto, cpu, cuda or mps, not {name!r}")
    check(name == "cpu" or getattr(torch, name).is_available(),
          f"there is no {name} device on this machine: leave out --device, or give cpu")
    return torch.device(name)

def use_bf16(device, precision):
    """Whether to multiply matrices in bfloat16, with 8 bits instead of 24: for "auto", where the
    machine has instructions for it, which make it much faster."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))

@contextlib.contextmanager
def precision_of(run, *names):
    """Within this, the run's model calculates in its precision, while its weights stay in float32;
    and what is dropped depends on seed, step and names alone."""
    device, config = run.model.tok_emb.weight.device, run.train_config
    bf16 = use_bf16(device, config.precision)
    with own_random_numbers("dropout", config.seed, run.step, *names, device=device):
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            yield

# ═══ Workshop: runs ════════════════════════════════════════════════════════════════════════════
USUAL_EPOCHS = 20        # readings that usually suffice to know a story by heart
FEWEST_STEPS = 150       # a text of a few lines is read more often, to make so many steps
SENTENCE_SHARE = 0.8     # of the openings; the others begin at any word, as a prompt may
MILESTONES = (0, 0.02, 0.05, 0.2, 1)     # shares of the training, to see it learn to speak

def new_run(corpus, config=GPTConfig(), train_config=TrainConfig(), device="cpu"):
    """A run with an untrained model for a corpus. If that is too short for the context, the context
    becomes shorter. Raises ValueError if it is shorter than two tokens."""
    n_tokens = len(corpus.train_ids)
    check(n_tokens > 1, f"the text is too short, only {n_tokens} tokens: give five words or more")
    T = min(config.context_length, n_tokens - 1)
    config = replace(config, context_length=T, vocab_size=corpus.tokenizer.vocab_size)
    if len(corpus.val_ids) == 0:
        train_config = replace(train_config, val_fraction=0.0)
    n_windows = train_config.batch_size - int(train_config.openings * train_config.batch_size)
    steps_per_epoch = math.ceil(math.ceil((n_tokens - T) / T) / n_windows)
    beginning = corpus.train_text or corpus.tokenizer.decode(corpus.train_ids[:100].tolist())
    model = new_model(config, train_config.seed).to(choose_device(device))
    return Run(model, corpus.tokenizer, train_config, corpus.fingerprint, steps_per_epoch,
               count_steps(steps_per_epoch, train_config), first_words(beginning))

def count_steps(steps_per_epoch, config):
    """How many steps a training takes in all."""
    usual = max(USUAL_EPOCHS * steps_per_epoch, FEWEST_STEPS)
    if config.optimizer == "muon":
        usual = math.ceil(usual * MUON_READINGS)
    steps = config.max_steps or config.epochs * steps_per_epoch or usual
    check(steps < 1 << 22, f"{steps:,} steps are too many: give fewer --epochs or --max-steps")
    return steps

def start_optimizer(run):
    """Give a run its optimizer, with what that remembers from before."""
    memory = optimizer_state(run)
    run.optimizer = make_optimizer(run.model, run.train_config)
    weights = dict(run.model.named_parameters())
    for name, remembered in memory.items():
        run.optimizer.state[weights[name]] = {
            what: tensor.to(weights[name].device).clone() for what, tensor in remembered.items()}

def optimizer_state(run):
    """What the optimizer remembers of the weights that it has moved: {name: {what: tensor}}."""
    if run.optimizer is None:
        return run.optimizer_state
    return {name: dict(run.optimizer.state[weight]) for name, weight in
            run.model.named_parameters() if weight in run.optimizer.state}

class TrainingBatches:
    """`batches[step]` is the pair (inputs, targets) of a step, (B, T) ids each. It depends on the
    seed and the step alone; so with the weights and the optimizer's memory in the file, training
    that was interrupted goes on as if it had not been."""
    def __init__(self, corpus, run):
        config, T = run.train_config, run.config.context_length
        self.corpus, self.length = corpus, T + 1
        n_openings = int(config.openings * config.batch_size)
        n_sentences = round(SENTENCE_SHARE * n_openings)
        n_windows = config.batch_size - n_openings
        self.windows = SlidingWindowDataset(corpus.train_ids, T, stride=1)

        turns, seed = run.total_steps, config.seed
        pieces = deal(math.ceil(len(self.windows) / T), n_windows, turns, seed)
        self.starts = (pieces * T + deal(T, n_windows, turns, seed + 1)) % len(self.windows)
        sentences = torch.tensor(sentence_starts(corpus.train_text))
        words = torch.tensor(word_starts(corpus.train_text))
        self.opening_starts = torch.cat([
            sentences[deal(len(sentences), n_sentences, turns, seed + 2)],
            words[deal(len(words), n_openings - n_sentences, turns, seed + 3)]], dim=1)

    def __getitem__(self, step):
        inputs, targets = self.windows[self.starts[step]]
        openings = [self.opening(start) for start in self.opening_starts[step].tolist()]
        openings = torch.tensor(openings, dtype=torch.long).view(-1, self.length)
        # IGNORED is no token; as an input any will do, since nothing is asked after it.
        inputs = torch.cat([inputs, openings[:, :-1].clamp(min=0)])
        return inputs, torch.cat([targets, openings[:, 1:]])

    def opening(self, start):
        """The text from `start` on as one window, filled up where the text ends before it."""
        text = self.corpus.train_text[start:start + 32 * self.length]     # more than is needed
        token_ids = self.corpus.tokenizer.encode(text)[:self.length]
        return token_ids + [IGNORED] * (self.length - len(token_ids))

def deal(count, hand, turns, seed):
    """Numbers below `count`, as if dealt from shuffled decks of cards, a hand in each turn: (turns,
    hand). All come equally often; drawn at random, a third of them would be missed in the time of
    one deck. More turns begin with the same ones, so training can be made longer later."""
    generator = torch.Generator().manual_seed(seed)
    decks = 1 + hand * turns // count
    cards = torch.cat([torch.randperm(count, generator=generator) for _ in range(decks)])
    return cards[:hand * turns].view(turns, hand)

def evaluation_due(run):
    """Whether it is time to look, and we have not looked already."""
    if run.history and run.history[-1].step == run.step:
        return False
    milestones = [round(share * run.total_steps) for share in MILESTONES]
    every = run.train_config.eval_every or max(45, run.total_steps // 20)
    return run.step % every == 0 or run.step in milestones

def evaluate(run, corpus):
    """The Evaluation of a run as it is now."""
    with precision_of(run):
        train_loss, val_loss = [mean_loss(run.model, token_ids)
                                for token_ids in (corpus.train_ids, corpus.val_ids)]
    check_finite(train_loss, run)
    text = corpus.train_text[:100_000]
    recall = (measure_recall(run.model, run.tokenizer, text, max_sentences=25)
              if recall_exercises(text) else None)
    sample = "".join(generate_text(run.model, run.tokenizer, run.prompt, 24))
    tokens = run.step * run.train_config.batch_size * run.config.context_length
    epoch = run.step / run.steps_per_epoch
    return Evaluation(run.step, epoch, tokens, train_loss, val_loss, recall, run.prompt, sample)

def check_finite(number, run):
    check(math.isfinite(number), f"loss or gradient became {number} at step {run.step}: training "
          "stops, the last checkpoint stays. Try a smaller --learning-rate, or --precision fp32")

def generate_text(model, tokenizer, prompt, max_new_tokens, sampling=None):
    """Continue a prompt: yields pieces of text as they come, never half a character."""
    token_ids = tokenizer.encode(prompt)
    check(token_ids, f"the prompt {prompt!r} is empty: give the words that the text begins with")
    check(max_new_tokens >= 0, f"max_new_tokens must be 0 or more, not {max_new_tokens}")
    shown = tokenizer.decode(token_ids)
    for token in generate(model, torch.tensor([token_ids]), max_new_tokens, sampling):
        token_ids = [*token_ids, token.item()]
        text = tokenizer.decode(token_ids)
        if not text.endswith("\ufffd"):          # else the character's other bytes are to come
            yield text[len(shown):]
            token_ids = token_ids[-1:]           # nothing before it can change any more
            shown = tokenizer.decode(token_ids)

# ═══ Workshop: another optimizer ═══════════════════════════════════════════════════════════════
# AdamW looks at each number of a matrix alone. Muon (Jordan et al. 2024) looks at the matrix as a
# whole, as what turns one vector into another. The mean of its last gradients is large in a few
# directions, those of what many tokens share, and small in all others, where the rare things are
# told apart: who did what in which sentence. Muon makes them all about equally large, so the rare
# is learned as fast as the common. The products for it make a step a third longer. It is for the
# matrices within the blocks; AdamW moves the rest: embeddings, head, biases and norms.
MUON_READINGS = 0.5      # of those that AdamW needs
MUON_STRIDE = 4          # and the learning rate may be so many times as large, for all weights
MUON_MEMORY = 0.9        # a mean over about the last ten gradients

def muon_matrices(model):
    return [weight for weight in model.trf_blocks.parameters() if weight.dim() == 2]

class MuonAndAdamW:
    """Two optimizers that act as one."""
    def __init__(self, model, config):
        self.matrices = muon_matrices(model)
        bf16 = use_bf16(self.matrices[0].device, config.precision)
        self.dtype = torch.bfloat16 if bf16 else torch.float32
        self.adamw = make_optimizer(model, replace(config, optimizer="adamw"))
        self.param_groups, self.state = self.adamw.param_groups, self.adamw.state
        self.zero_grad = self.adamw.zero_grad

    def step(self):
        for group in self.param_groups:
            group["lr"] *= MUON_STRIDE
        same_shape = defaultdict(list)      # those of one shape go through all products together
        for weight in self.matrices:
            if weight.grad is not None:
                same_shape[lying(weight).shape].append(weight)
        with torch.no_grad():
            for weights in same_shape.values():
                self.move(weights, self.param_groups[0]["lr"], self.param_groups[0]["weight_decay"])
        self.adamw.step()                   # passes over those that have no gradient

    def move(self, weights, lr, decay):
        directions = torch.stack([lying(self.direction(weight)) for weight in weights])
        steps = evened(directions.to(self.dtype))
        length = 0.2 * math.sqrt(steps.shape[2])        # as AdamW's (Liu et al. 2025, section 2.2)
        for weight, step in zip(weights, steps):
            weight.mul_(1 - lr * decay)
            lying(weight).sub_(step, alpha=lr * length)
            weight.grad = None

    def direction(self, weight):
        """The mean of the last gradients, in which the last one counts once more (Nesterov)."""
        state = self.state[weight]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        mean = state["momentum_buffer"].lerp_(weight.grad, 1 - MUON_MEMORY)
        return weight.grad.lerp(mean, MUON_MEMORY)

def lying(matrix):
    """The matrix, or what it is with rows and columns swapped: no more rows than columns."""
    return matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix

def evened(X):
    """Matrices (n, R, C), R <= C, with all their directions about equally large. X X^T X has the
    same directions, and what was x large is x^3 large. So a X + b X X^T X + c X X^T X X^T X makes
    a x + b x^3 + c x^5 of every x at once (a Newton-Schulz iteration). The two below take all from
    0.02 to 1 to between 0.48 and 1.52, about the best that two can do (Amsel et al. 2025).
    >>> evened(torch.tensor([[[3.0, 0.0, 0.0], [0.0, 0.15, 0.0]]]))
    tensor([[[0.5304, 0.0000, 0.0000],
             [0.0000, 1.0832, 0.0000]]])
    """
    gram = X @ X.mT                                                     # (n, R, R)
    largest = 1.04 * gram.norm(dim=(1, 2), keepdim=True).clamp(min=1e-20)   # no x^2 is larger, even
    X = X / largest.sqrt()                                                  # when it is rounded
    X = polynomial(X, gram / largest, 7.711, -22.114, 16.249)
    return polynomial(X, X @ X.mT, 3.215, -2.411, 0.501)

def polynomial(X, gram, a, b, c):
    return a * X + (b * gram + c * gram @ gram) @ X

# ═══ Workshop: files that are whole ════════════════════════════════════════════════════════════
# A checkpoint is what torch.save writes, and behind it 32 bytes, the SHA-256 of it, by which a
# damaged file is told. A file may also be whole and mean harm, or be another program's: nothing is
# believed before it has been held against what we write ourselves.
PLAIN = ("fingerprint", "steps_per_epoch", "total_steps", "prompt", "step", "asked")
IN_A_FILE = {*PLAIN, "format", "config", "train_config", "tokenizer", "history", "weights",
             "optimizer_state", "fixed_loss"}
IN_A_PICKLE = {"torch._utils _rebuild_tensor_v2", "torch FloatStorage", "collections OrderedDict"}
DIGEST_BYTES = 32
FORMAT = 4      # goes up when what is in the file, or how it is to be read, changes

def state_of(run):
    """A run as plain values and tensors, of which `run_from` makes it again."""
    state = {name: getattr(run, name) for name in PLAIN}
    state["format"] = FORMAT
    state["config"] = asdict(run.config)
    state["train_config"] = asdict(run.train_config)
    state["tokenizer"] = tokenizer_state(run.tokenizer)
    state["history"] = [asdict(evaluation) for evaluation in run.history]
    state["weights"] = dict(run.model.state_dict())
    state["optimizer_state"] = optimizer_state(run)
    state["fixed_loss"] = fixed_loss(run.model)
    finite = all(weight.isfinite().all() for weight in state["weights"].values())
    check(finite and math.isfinite(state["fixed_loss"]), "the model calculates with numbers "
          "that are infinite, or none: it is not saved, an old file remains")
    return state

def run_from(state, device):
    model = new_model(GPTConfig(**state["config"]))
    shapes = {name: weight.shape for name, weight in model.state_dict().items()}
    if shapes != {name: weight.shape for name, weight in state["weights"].items()}:
        raise AnotherProgram("its weights have other names or shapes than this program gives them")
    model.load_state_dict(dict(state["weights"]))
    run = Run(model.to(device).eval(), tokenizer_from(state["tokenizer"]),
              TrainConfig(**state["train_config"]), optimizer_state=state["optimizer_state"],
              history=[Evaluation(**evaluation) for evaluation in state["history"]],
              **{name: state[name] for name in PLAIN})
    check_run(run, state["fixed_loss"])
    return run

def write_whole(path, state):
    """Write a dictionary to `path` in one go: to a file of its own beside it, which then takes its
    place. A link stays a link. Raises OSError, and leaves the old file, if that fails."""
    path = Path(os.path.realpath(path))
    for orphan in path.parent.glob(f"{glob.escape(path.name)}.*.tmp"):     # of a killed process
        with contextlib.suppress(OSError):
            if time.time() - orphan.stat().st_mtime > 3600:
                orphan.unlink()
    temporary = Path(f"{path}.{os.getpid()}-{threading.get_ident()}.tmp")       # no other's name
    try:
        with open(temporary, "x+b") as file:
            torch.save(state, file)
            file.seek(0)
            file.write(hashlib.file_digest(file, "sha256").digest())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:      # a full disk is a RuntimeError if torch meets it
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise OSError(f"{path} could not be written ({reason}): make room, or give another path")
    finally:
        temporary.unlink(missing_ok=True)         # there is none any more if all went well

def read_whole(path):
    """The dictionary that `write_whole` wrote, checked. Raises ValueError with what is wrong."""
    check(Path(path).is_file() or not Path(path).exists(), "it is no file")
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size - DIGEST_BYTES
        check(size > 0, "it is too short")
        digest = hashlib.sha256()
        for start in range(0, size, 1 << 20):
            digest.update(file.read(min(1 << 20, size - start)))
        check(digest.digest() == file.read(), "its checksum is wrong")
        archive = zipfile.ZipFile(file)
        check(sum(entry.file_size for entry in archive.infolist()) <= size, "it is packed")
        pickled = [name for name in archive.namelist() if name.lower().endswith("data.pkl")]
        check(len(pickled) == 1, "its parts are others")
        for operation, argument, _ in pickletools.genops(archive.read(pickled[0])):
            if "GLOBAL" in operation.name:
                check(argument in IN_A_PICKLE, f"it asks for {argument}")
        file.seek(0)
        state = torch.load(file, map_location="cpu", weights_only=True)
    check(type(state) is dict and "format" in state, "it holds something else")
    found = state["format"]
    check(found == FORMAT, f"it has format {reprlib.repr(found)}, this program reads {FORMAT}")
    check(state.keys() == IN_A_FILE, "its entries are others")
    # Before a model of its size is made, the file must hold as much: a block has C by C numbers.
    config = GPTConfig(**state["config"])
    rows = max(config.vocab_size, config.context_length, config.n_layers * config.emb_dim)
    numbers = config.emb_dim * rows
    check(4 * numbers <= size, "it is smaller than its settings say")
    return state

def check_run(run, expected_loss):
    """Hold what was read into a run against all that can be in one. Raises ValueError."""
    for part in (run, *run.history):
        for f in fields(part):
            value = getattr(part, f.name)
            check(isinstance(value, f.type) and type(value) is not bool and value == value,
                  f"its {f.name} is of another type")
    counts = run.step, run.total_steps - 1, run.steps_per_epoch - 1
    check(min(counts) >= 0 and max(counts) < 1 << 53, "its counts are wrong")
    check(run.tokenizer.vocab_size == run.config.vocab_size, "its tokenizer is of another model")
    check(all(type(value) in (str, int, float, bool) for value in run.asked.values()),
          "its options are of another type")
    weights = dict(run.model.named_parameters())
    by_muon = set(muon_matrices(run.model) if run.train_config.optimizer == "muon" else [])
    for name, remembered in run.optimizer_state.items():
        shape = weights[name].shape
        shapes = {"step": (), "exp_avg": shape, "exp_avg_sq": shape}
        if weights[name] in by_muon:
            shapes = {"momentum_buffer": shape}
        check(remembered.keys() == shapes.keys(), f"it remembers something else of {name}")
        for what, tensor in remembered.items():
            check(type(tensor) is torch.Tensor and tensor.shape == shapes[what]
                  and tensor.dtype == torch.float32 and tensor.is_contiguous()
                  and tensor.isfinite().all(), f"it remembers {name} wrongly")
    found = fixed_loss(run.model)
    if not math.isclose(found, expected_loss, rel_tol=1e-4):
        raise AnotherProgram(f"it is of another version of this program: on the same tokens, its "
                             f"weights had a loss of {expected_loss:.4f}, now it is {found:.4f}")

class AnotherProgram(ValueError):
    """A checkpoint is whole, but the program that wrote it was another."""

def fixed_loss(model):
    """The loss on a full window of fixed tokens, on the CPU, in float32."""
    if model.tok_emb.weight.device.type != "cpu":
        on_cpu = new_model(model.config)
        on_cpu.load_state_dict(model.state_dict())
        model = on_cpu
    window = torch.arange(1 + model.config.context_length) % model.config.vocab_size
    return mean_loss(model, window)

def tokenizer_state(tokenizer):
    """A tokenizer as plain values, of which `tokenizer_from` makes it again."""
    tokens = [token if isinstance(token, str) else token.decode("latin-1")
              for token in tokenizer.tokens]
    return {"kind": tokenizer.kind, "tokens": tokens}

def tokenizer_from(state):
    kind, tokens = state["kind"], state["tokens"]
    check(kind in TOKENIZERS and all(type(token) is str for token in tokens)
          and len(set(tokens)) == len(tokens), "its tokenizer is wrong")
    if kind == "word":
        check({END_OF_TEXT, UNKNOWN} <= set(tokens), "its tokenizer lacks the special tokens")
        return WordTokenizer(tokens)
    check({chr(byte) for byte in range(256)} <= set(tokens), "its tokenizer lacks some bytes")
    return BPETokenizer([token.encode("latin-1") for token in tokens], kind)

@contextlib.contextmanager
def what_is_wrong_with_model(path):
    """Within this a checkpoint is read; whatever goes wrong is said in one line."""
    try:
        yield
    except FileNotFoundError:
        raise OSError(f"there is no model at {path}: python story_llm.py train makes one") from None
    except OSError as error:
        raise OSError(f"{path} cannot be read ({error}): give another --model") from error
    except (ImportError, torch.OutOfMemoryError):       # not the file's fault
        raise
    except AnotherProgram as error:
        raise ValueError(f"{path}: {error}. Use that version, or train again") from None
    except Exception as error:      # a file that is not ours may break anything in here
        first_line = (str(error) or type(error).__name__).split("\n")[0]
        reason = CONTROL.sub("?", first_line)[:200]
        raise ValueError(f"{path} is damaged or no checkpoint of story_llm ({reason}): train again "
                         "or give another --model") from error

def keep_other_model(path, run):
    """Move a model of another text to NAME.old.pt, .old2.pt, ...; returns that path, or None."""
    path = Path(path).resolve()
    if not path.exists():
        return None
    with contextlib.suppress(ValueError, OSError):
        if load_checkpoint(path).fingerprint == run.fingerprint:
            return None
    for number in itertools.count(1):
        old = path.with_name(f"{path.stem}.old{number if number > 1 else ''}{path.suffix}")
        if not old.exists():
            return path.replace(old)

# ═══ Workshop: pictures, and looking inside ════════════════════════════════════════════════════
PICTURES = (".png", ".svg", ".pdf")

def check_writable(path, endings=()):
    """Notice before the work, not after it, that a file cannot be written. Raises ValueError."""
    path = Path(path).resolve()
    check(not endings or path.suffix in endings, f"{path.name} must end in {', '.join(endings)}")
    check(not path.is_dir(), f"{path} is a folder: give the path of a file")
    check(os.access(path.parent, os.W_OK), f"{path} cannot be written: give another path")

def save_figure(figure, path):
    """Write a figure to `path`, if it is given, and return it."""
    if path is not None:
        check_writable(path, PICTURES)
        figure.savefig(path, dpi=150)
    return figure

def watch(parts, listen):
    """Within this, `listen(part, inputs, output)` is called whenever one of the parts has run."""
    hooks = contextlib.ExitStack()
    for part in parts:
        hooks.enter_context(part.register_forward_hook(listen))
    return hooks

def trace_shapes(model, token_ids):
    """Run token_ids (B, T) through the model: {name of a part: shape of what it gave}."""
    names = {part: name for name, part in model.named_modules()}
    shapes = {}

    def listen(part, inputs, output):
        shapes[names[part]] = tuple(output.shape)

    parts = [model.tok_emb, model.pos_emb, *model.trf_blocks, model.final_norm, model.out_head]
    with inference(model), watch(parts, listen):
        model(token_ids)
    return shapes

def attention_maps(model, token_ids):
    """The shares of attention of all layers and heads for token_ids (1, T): (layers, H, T, T)."""
    maps = []

    def listen(part, inputs, output):
        queries, keys, values = part.queries_keys_values(inputs[0])
        T = keys.shape[-2]
        # If each token gives a 1 in a column of its own, what is gathered are the shares.
        ones = torch.eye(T, dtype=keys.dtype, device=keys.device).expand(*keys.shape[:2], T, T)
        maps.append(part.gather(queries, keys, ones)[0])

    with inference(model), watch([block.att for block in model.trf_blocks], listen):
        model(token_ids)
    return torch.stack(maps).float().cpu()

def plot_attention(maps, names, path=None):
    """Draw `attention_maps` of T tokens with these names; returns the figure."""
    from matplotlib.figure import Figure
    layers, heads = maps.shape[:2]
    side = max(1.6, min(len(names) * 0.16, 60 / max(layers, heads)))        # inches
    figure = Figure(figsize=(heads * side + 2, layers * side + 2), layout="constrained")
    grid = figure.subplots(layers, heads, squeeze=False, sharex=True, sharey=True)
    for layer, head in itertools.product(range(layers), range(heads)):
        axes = grid[layer, head]
        image = axes.imshow(maps[layer, head].tolist(), vmin=0, vmax=1, cmap="Blues")
        axes.set_title(f"layer {layer + 1}, head {head + 1}", fontsize=9)
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7, parse_math=False)
        axes.set_yticks(range(len(names)), names, fontsize=7, parse_math=False)
    figure.supylabel("this token ...", fontsize=9)
    figure.supxlabel("... looks at this one", fontsize=9)
    figure.colorbar(image, ax=grid, shrink=0.6, label="share of attention; a row adds up to 1")
    return save_figure(figure, path)

# ═══ The command line ══════════════════════════════════════════════════════════════════════════
# A function for each command. It calls the parts of its step and prints what they return: results
# on stdout, notes on stderr. The tables at the end say which command has which options.
DEFAULT_TEXT = str(Path(__file__).with_name("Short_Story.txt"))
DEFAULT_PROMPT = "Once Aadhan renounced his kingdom"
CONTROL = regex.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")       # what could steer a terminal
STEPS = (       # title, command, and a sentence for the tour
    ("install, settings", "", "All that follows, and the command that shows it."),
    ("load the text, split it into words", "words", "Text becomes numbers: cut, list, count."),
    ("a tokenizer of words", "words", "There and back; but this story knows no laptop."),
    ("byte-pair encoding", "bpe", "Pieces between letter and word: the laptop comes back whole."),
    ("sliding windows", "windows", "To be guessed: the same tokens, one place later."),
    ("attention and the GPT model", "model", "Each token takes what it needs from those before."),
    ("a batch through the untrained model", "model", "Ids go in, a number per token comes out."),
    ("greedy generation", "generate --untrained", "The likeliest token, again and again: noise."),
    ("the loss before training", "evaluate --untrained", "As surprised as a blind guess."),
    ("training", "train", "Guess, see what came, change every weight a little: a story emerges."),
    ("save and load", "train", "All that a run is went into one file, story_llm.pt."),
    ("loss curves", "plot", "One falls, one rises: it learns this story, not the language."),
    ("inference from the saved file", f'generate --prompt "{DEFAULT_PROMPT}"',
     "From the file alone, it continues the story."),
    ("whom does a token look at?", "attention", "A row for each token; dark is much."),
    ("what else did it think of?", "next --temperature 2", "And what chance would make of that."),
)

def log(message="", file=None, end="\n"):
    file = file or sys.stdout
    message = CONTROL.sub("\ufffd", message) if file.isatty() else message
    print(message, end=end, file=file, flush=True)

def note(message):
    log(message, file=sys.stderr)

def token_names(tokenizer, token_ids):
    """The text of each token on one line; one that is part of a character is shown as its bytes."""
    names = []
    for token_id in token_ids:
        name = tokenizer.decode([token_id])
        if "\ufffd" in name and tokenizer.kind != "word":
            name = f"<{tokenizer.tokens[token_id].hex()}>"
        name = name.replace("\n", "⏎").replace(" ", "␣").replace("\t", "→")
        names.append(CONTROL.sub("\ufffd", name))
    return names

def draw(function, *arguments):
    """Call a function that draws a picture; what the fonts lack becomes one note."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function(*arguments)
    if any("missing from" in str(warning.message) for warning in caught):
        note("note: matplotlib's fonts lack some of the characters: in the picture they are boxes")
    log(f"drew {arguments[-1]}")

def dashed(name):
    return "--" + name.replace("_", "-")

def chosen(settings, args):
    """The settings, with those that were given on the command line."""
    names = args.given.keys() & {f.name for f in fields(settings)}
    return replace(settings, **{name: args.given[name] for name in names})

def untrained(args):
    """(a new run, its corpus) of the settings given; notes say what is not as it was asked for."""
    for option, kind in (("vocab_size", "story"), ("full_vocab", "gpt2")):
        check(option not in args.given or args.tokenizer == kind,
              f"{dashed(option)} goes with --tokenizer {kind}")
    config = chosen(PRESETS[args.preset], args)
    train_config = chosen(TrainConfig(), args)
    corpus = corpus_from_text(load_text(args.text), args.tokenizer, train_config.val_fraction,
                              config.context_length, vocab_size=args.vocab_size,
                              full_vocab=args.full_vocab)
    if args.tokenizer == "auto" and corpus.tokenizer.kind == "story":
        note(f"note: {why_not_gpt2(corpus.train_text)}, so byte pairs are learned from the story; "
             "to have it all the same: --tokenizer gpt2")
    return begun(args, corpus, config, train_config), corpus

def begun(args, corpus, config, train_config):
    """A new run for a corpus; notes say what is not as it was asked for."""
    run = new_run(corpus, config, train_config, args.device)
    if train_config.val_fraction > run.train_config.val_fraction:
        note(f"note: {train_config.val_fraction:.0%} of the text do not fill a window of "
             f"{config.context_length} tokens: all of it is trained on, without validation")
    if config.context_length > run.config.context_length:
        note(f"note: the text has only {len(corpus.train_ids)} tokens: the context is not "
             f"{config.context_length} but {run.config.context_length} tokens")
    if args.text == DEFAULT_TEXT:
        run.prompt = DEFAULT_PROMPT
    run.asked = {name: args.given[name] for name in args.given.keys() & ASKED}
    return run

def started(args):
    """As `untrained`, but with the weights and the tokenizer of the model --start."""
    start = load_checkpoint(args.start)
    for name in args.given.keys() & IN_THE_FILE:
        raise ValueError(f"{dashed(name)} cannot be used with --start: that model has its own")
    check(start.tokenizer.kind != "word", f"{args.start} cannot be started from: its tokenizer "
          "knows the words of its own story only")
    # Half the usual rate learns the new story as well, and forgets less of the old one.
    train_config = chosen(TrainConfig(learning_rate=1.25e-3), args)
    config = chosen(start.config, args)
    check(config.context_length <= start.config.context_length, f"the context of {args.start} is "
          f"{start.config.context_length} tokens, which is less than {config.context_length}")
    corpus = corpus_from_text(load_text(args.text), start.tokenizer, train_config.val_fraction,
                              config.context_length)
    run = begun(args, corpus, config, train_config)
    weights = start.model.state_dict()
    weights["pos_emb.weight"] = weights["pos_emb.weight"][:run.config.context_length]
    run.model.load_state_dict(weights)
    return run, corpus

def saved(args):
    """(the saved run, the corpus of --text as its tokenizer and its split make it)."""
    run = load_checkpoint(args.model, args.device)
    parts = split_text(load_text(args.text), run.train_config.val_fraction)
    return run, encode_corpus(run.tokenizer, *parts)

def resumed(args):
    """As `saved`, to train on. ValueError if it was begun with another text or other settings."""
    run, corpus = saved(args)
    check(corpus.fingerprint == run.fingerprint, f"{args.model} was begun with another text than "
          f"{args.text}: give the same as then, or train anew without --resume")
    before = {**USUAL, **asdict(run.train_config), **asdict(run.config), **run.asked}
    for name in args.given.keys() & ASKED - MAY_CHANGE:
        then, now = before[name], args.given[name]
        check(now == then, f"{args.model} was begun with {dashed(name)} {then}, not {now}: "
              "give the same, or train anew without --resume")
    changed = {name: args.given[name] for name in args.given.keys() & MAY_CHANGE}
    if "epochs" in changed:
        changed = {"max_steps": 0, **changed}
    run.train_config = replace(run.train_config, **changed)
    run.total_steps = count_steps(run.steps_per_epoch, run.train_config)
    return run, corpus

def to_train(args):
    """(the run to be trained, its corpus), once it is clear that the results can be written."""
    check_writable(args.model)
    check_writable(args.plot, PICTURES)
    if args.resume:
        run, corpus = resumed(args)
    else:
        run, corpus = untrained(args) if args.start is None else started(args)
    run.prompt = args.given.get("prompt", run.prompt)
    return run, corpus

def saved_or_untrained(args):
    return untrained(args)[0] if args.untrained else load_checkpoint(args.model, args.device)

def log_recall(run, text):
    total = len(recall_exercises(text))
    share = measure_recall(run.model, run.tokenizer, text)
    log(f"Recall {share:.1%}: {round(share * total)} of {total} sentences continued to the letter "
        "after five words" if total else "Recall: not measured, for no sentence has 8 words")

def command_map(args):
    log(__doc__.strip() + "\n")
    for number, (title, command, _) in enumerate(STEPS[:13], 1):
        log(f"{number:>4}  {title:<38}python story_llm.py {command}")

def command_words(args):
    args.tokenizer = "word"
    command_bpe(args)

def command_bpe(args):
    run, corpus = untrained(args)
    tokenizer, text = run.tokenizer, corpus.train_text
    start = min(256, max(0, tokenizer.vocab_size - 14))      # behind the bytes, or the last ones
    some = token_names(tokenizer, range(start, min(start + 14, tokenizer.vocab_size)))
    log(f"the text: {len(text):,} characters; {len(corpus.train_ids):,} {tokenizer.kind} tokens\n"
        f"the vocabulary: {tokenizer.vocab_size:,} entries, for example {' '.join(some)}\n"
        f"encoded and decoded, it is the same: {tokenizer.decode(tokenizer.encode(text)) == text}")
    prompt = args.given.get("prompt", run.prompt)
    for sentence in (prompt, "Thamarai bought a laptop <|endoftext|>"):
        token_ids = tokenizer.encode(sentence)
        log(f"\n  [{']['.join(token_names(tokenizer, token_ids))}]\n  encoded: {token_ids}\n"
            f"  decoded: {tokenizer.decode(token_ids)}")

def command_windows(args):
    run, corpus = untrained(args)
    T = run.config.context_length
    windows = SlidingWindowDataset(corpus.train_ids, T, args.stride or T)
    log(f"{len(corpus.train_ids):,} tokens make {len(windows):,} windows of {T} tokens")
    for number in range(min(3, len(windows))):
        log(f"\nwindow {number}, its first tokens:")
        for name, token_ids in zip(("input", "target"), windows[number]):
            names = token_names(run.tokenizer, token_ids[:6].tolist())
            log(f"  {name:<8}" + "".join(f"{name:<13}" for name in names).rstrip())

def command_model(args):
    run, corpus = untrained(args)
    log(f"{run.config}\n\ntwo windows on their way through the untrained model:")
    windows = corpus.train_ids[:run.config.context_length].expand(2, -1)
    log(f"  {'part':<12}{'shape of the output':>20}{'learns':>10}")
    for name, shape in trace_shapes(run.model, windows).items():
        learns = count_parameters(run.model.get_submodule(name))
        log(f"  {name:<12}{str(shape):>20}{learns:>10,}")
    log(f"  {'altogether':<12}{count_parameters(run.model):>30,}")

def command_evaluate(args):
    run, corpus = untrained(args) if args.untrained else saved(args)
    log("an untrained model:" if args.untrained else f"{args.model}, after {run.step} steps:")
    if corpus.fingerprint != run.fingerprint:
        note(f"note: {args.model} was trained on another text than {args.text}")
    V = run.config.vocab_size
    with precision_of(run):
        losses = {"Train loss": mean_loss(run.model, corpus.train_ids),
                  "Val loss": mean_loss(run.model, corpus.val_ids),
                  f"ln({V}), a blind guess": math.log(V)}
    for name, loss in losses.items():
        if loss is not None:
            log(f"  {name:<25}{loss:.3f}")
    log_recall(run, corpus.train_text)

class Progress:
    """What `train` calls after each step: it prints, saves, and says when to stop. The first
    Ctrl-C, or request to end, asks to stop after the step; a second one stops at once."""
    def __init__(self, path):
        self.path = path
        self.stop = self.saved_before = False
        self.next_save = self.seconds = self.steps = 0      # seconds of steps without an evaluation

    def __enter__(self):
        def ask(number, frame):
            self.stop = True
            for each in self.handlers:
                signal.signal(each, signal.default_int_handler)

        here = threading.current_thread() is threading.main_thread()       # no other may do this
        signals = (signal.SIGINT, signal.SIGTERM) if here else ()
        self.handlers = {number: signal.signal(number, ask) for number in signals}
        self.clock = time.perf_counter()
        return self

    def __exit__(self, *error):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def __call__(self, run):
        looked = run.history[-1].step == run.step
        if run.loss is not None and not looked:
            self.seconds += time.perf_counter() - self.clock
            self.steps += 1
        speed = ""
        if self.steps:
            each = self.seconds / self.steps
            left = round(each * (run.total_steps - run.step))
            tokens = run.train_config.batch_size * run.config.context_length / each
            speed = f", {tokens:,.0f} tokens/s, {left // 60}:{left % 60:02} left"
        stop = self.stop                         # asked once: it may change at any moment
        last = stop or run.step >= run.total_steps
        if last or (looked and run.step > 0 and time.perf_counter() > self.next_save):
            self.save(run)                       # first, for printing may fail: `train | tee log`
        if looked:
            log_evaluation(run, speed)
        elif sys.stderr.isatty():                # a line that the next one replaces
            log(f"step {run.step} of {run.total_steps}{speed}", sys.stderr, end="\x1b[K\r")
        self.clock = time.perf_counter()
        return stop

    def save(self, run):
        """Save, but not so often that it takes more than 2 % of the time."""
        began = time.perf_counter()
        old = None if self.saved_before else keep_other_model(self.path, run)
        if old:
            note(f"note: the model of another text that stood at {self.path} is now {old.name}")
        save_checkpoint(self.path, run)
        self.saved_before = True
        self.next_save = time.perf_counter() + 50 * (time.perf_counter() - began)

def log_evaluation(run, speed):
    now = run.history[-1]
    epoch = max(1, math.ceil(run.step / run.steps_per_epoch))
    val_loss = "" if now.val_loss is None else f", Val loss {now.val_loss:.3f}"
    recall = "" if now.recall is None else f", recall {now.recall:.0%}"
    loss = f"Train loss {now.train_loss:.3f}"
    log(f"Ep {epoch} (Step {run.step:06d}): {loss}{val_loss}{recall}{speed}")
    log("    " + " ".join(f"{now.prompt} ...{now.sample}".split()))

def command_train(args):
    run, corpus = to_train(args)
    weights = count_parameters(run.model)
    log(f"{run.tokenizer.kind} tokenizer, vocabulary {run.config.vocab_size:,}; {weights:,} "
        f"parameters, {16 * weights / 1e6:,.0f} MB with all that training keeps of them; "
        f"{run.total_steps} steps; loss of a blind guess {math.log(run.config.vocab_size):.3f}")
    with Progress(args.model) as progress:
        train(run, corpus, progress)
    if run.step < run.total_steps:
        again = shlex.join([*args.argv, *([] if args.resume else ["--resume"])])
        note(f"stopped after step {run.step} of {run.total_steps}, saved {args.model}; to go on: "
             f"python story_llm.py {again}")
        raise KeyboardInterrupt
    log_recall(run, corpus.train_text)
    log(f"saved {args.model}")
    draw(plot_losses, run.history, run.config.vocab_size, args.plot)

def command_plot(args):
    run = load_checkpoint(args.model)
    draw(plot_losses, run.history, run.config.vocab_size, args.plot)

def prompt_tokens(args, run):
    """The ids (1, T) of the prompt's last tokens, at most a context."""
    token_ids = run.tokenizer.encode(args.given.get("prompt", run.prompt))
    check(token_ids, "the prompt is empty: give some words")
    return torch.tensor([token_ids[-run.config.context_length:]])

def command_attention(args):
    check_writable(args.plot, PICTURES)
    run = load_checkpoint(args.model)
    token_ids = prompt_tokens(args, run)
    names = token_names(run.tokenizer, token_ids[0].tolist())
    draw(plot_attention, attention_maps(run.model, token_ids), names, args.plot)

def command_next(args):
    sampling = chosen(Sampling(temperature=1.0), args)
    run = saved_or_untrained(args)
    with inference(run.model):
        logits = run.model(prompt_tokens(args, run))[0, -1].cpu()
    by_model = next_token_probabilities(logits, Sampling(temperature=1.0))
    by_chance = next_token_probabilities(logits, sampling)
    best = logits.topk(min(10, len(logits))).indices
    log(f"  {'next token':<16}{'logit':>7}{'softmax':>9}   with {sampling}")
    for name, token in zip(token_names(run.tokenizer, best.tolist()), best):
        row = f"  {name:<16}{logits[token]:>7.2f}{by_model[token]:>9.2%}{by_chance[token]:>9.2%}"
        log(f"{row}  {''.ljust(round(40 * by_chance[token].item()), '█')}".rstrip())

def command_generate(args):
    sampling = chosen(Sampling(), args)
    of_chance = {"top_k", "top_p"} if args.untrained else {"top_k", "top_p", "seed"}
    for name in args.given.keys() & of_chance:
        check(sampling.temperature > 0, f"{dashed(name)} is for chance: give a --temperature, too")
    run = saved_or_untrained(args)
    if args.untrained and sampling.temperature == 0:       # step 8's own function
        longer = generate_text_simple(run.model, prompt_tokens(args, run), args.max_new_tokens,
                                      run.config.context_length)
        log(run.tokenizer.decode(longer[0].tolist()))
        return
    for prompt in typed_prompts() if args.prompt is None else [args.prompt]:
        pieces = generate_text(run.model, run.tokenizer, prompt, args.max_new_tokens, sampling)
        first = next(pieces, "")        # before the prompt is printed: it may be refused
        for piece in itertools.chain([prompt, first], pieces):
            log(piece, end="")
        log()

def typed_prompts():
    """Lines of stdin; on a terminal, until an empty one."""
    asking = sys.stdin.isatty()
    if asking:
        note("Type the first words of a sentence, and Enter; an empty line ends it.")
    for line in sys.stdin:
        if line.strip():
            yield line.rstrip("\r\n")
        elif asking:
            return

def command_tour(args):
    """All steps, one after the other, in a folder of its own."""
    folder = Path("story_llm_tour")
    folder.mkdir(exist_ok=True)
    log(f"All 13 steps, and a look inside; what they write is in the folder {folder}.")
    shown = set()
    with contextlib.chdir(folder):
        for number, (title, command, sentence) in enumerate(STEPS, 1):
            log(f"\n\n═══ {number}: {title} ═══\n\n{sentence}\n\n$ python story_llm.py {command}\n")
            status = log("(see above)") if command in shown else main(shlex.split(command))
            if status:
                return status
            shown.add(command)

PRESETS = {"story": GPTConfig(),
           "gpt2-small": GPTConfig(context_length=256, emb_dim=768, n_heads=12, n_layers=12)}

@dataclass(frozen=True)
class Options(Settings):
    """The options that are no settings of a model, of training or of sampling."""
    text: str = setting(DEFAULT_TEXT, "the story, a UTF-8 text file")
    tokenizer: str = setting("auto", "auto: gpt2 if it is fit, else story", choices=TOKENIZERS)
    vocab_size: int = setting(2048, "entries of a vocabulary learned from the story", 257)
    full_vocab: bool = setting(False, "all 50,257 entries of GPT-2, not just those needed")
    preset: str = setting("story", "where the model's settings start from", choices=tuple(PRESETS))
    model: str = setting("story_llm.pt", "the checkpoint")
    untrained: bool = setting(False, "an untrained model; the settings are for it")
    resume: bool = setting(False, "go on from the checkpoint; --epochs may be more")
    start: str = setting(None, "begin with the weights and tokenizer of this checkpoint")
    device: str = setting("auto", "cpu, cuda, mps, or auto: cuda if there is one")
    prompt: str = setting(None, "the first words, to be continued")
    max_new_tokens: int = setting(100, "how many tokens to write", 0)
    stride: int = setting(0, "tokens from one window to the next; 0: a window's length", 0)
    plot: str = setting(None, "the picture to draw: .png, .svg or .pdf")

FIELDS = {}
for settings in (Sampling, TrainConfig, GPTConfig, Options):
    FIELDS |= {f.name: f for f in fields(settings)}
USUAL = {name: f.default for name, f in FIELDS.items()}
TOKENIZER = "text tokenizer vocab_size full_vocab"
CHOICE = " ".join(f.name for f in fields(Sampling))
TRAINING = " ".join(f.name for f in fields(TrainConfig))
SHAPE = " ".join(f.name for f in fields(GPTConfig)[1:])      # all but the size of the vocabulary
NEW_MODEL = f"{TOKENIZER} preset val_fraction seed {SHAPE}"
ASKED = set(f"{NEW_MODEL} {TRAINING} start".split()) - {"text"}
IN_THE_FILE = set(f"{TOKENIZER} preset {SHAPE}".split()) - {"text", "context_length", "drop_rate"}
MAY_CHANGE = {"epochs", "max_steps", "eval_every"}
COMMANDS = {    # the function, its meaning, its options, and those that go with --untrained alone
    "words": (command_words, "steps 2 and 3: text as words, words as numbers", "text prompt", ""),
    "bpe": (command_bpe, "step 4: text as byte-pair tokens", f"{TOKENIZER} prompt", ""),
    "windows": (command_windows, "step 5: windows, inputs and targets",
                f"{TOKENIZER} context_length stride val_fraction", ""),
    "model": (command_model, "steps 6, 7: the model's shapes and sizes", f"{NEW_MODEL} device", ""),
    "evaluate": (command_evaluate, "step 9: losses and recall of a model",
                 "text model device untrained", f"{NEW_MODEL} precision"),
    "train": (command_train, "steps 10 to 12: train, save and draw",
              f"{NEW_MODEL} {TRAINING} prompt model start resume plot device", ""),
    "plot": (command_plot, "step 12: draw the loss curves of a saved model", "model plot", ""),
    "generate": (command_generate, "steps 8 and 13: continue a prompt",
                 f"model prompt max_new_tokens {CHOICE} device untrained", NEW_MODEL),
    "attention": (command_attention, "draw whom each token looks at", "model prompt plot", ""),
    "next": (command_next, "the likeliest next tokens, and how one is chosen",
             "model prompt temperature top_k top_p device untrained", NEW_MODEL),
    "tour": (command_tour, "all 13 steps, one after the other", "", ""),
}

def add_option(parser, name):
    """Make an option of a field: its meaning, what it may be and its default stand in the help."""
    f = FIELDS[name]
    meaning, at_least, below, choices = f.metadata.values()
    how = {"action": "store_true"} if f.type is bool else {"type": f.type, "choices": choices}
    if f.type is not bool and not choices:
        how["metavar"] = "TEXT" if f.type is str else "N"
    meaning += "" if at_least is None else f"; {allowed(f)}"
    meaning += "" if f.default is None or f.default is False else f" ({f.default})"
    meaning = meaning.replace("%", "%%")        # argparse fills in what stands behind a single one
    parser.add_argument(dashed(name), default=argparse.SUPPRESS, help=meaning, **how)

def parse(argv):
    """The command line as a namespace, with `given`: what of it was really given."""
    parser = argparse.ArgumentParser(prog="story_llm.py",
                                     description="How a language model works, on your own story.")
    parsers = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    for name, (_, meaning, options, if_untrained) in COMMANDS.items():
        command = parsers.add_parser(name, help=meaning, description=meaning, allow_abbrev=False)
        for option in dict.fromkeys(f"{options} {if_untrained}".split()):
            add_option(command, option)
    given = vars(parser.parse_args(argv))
    command = given.pop("command")
    handler, _, options, if_untrained = COMMANDS.get(command, (command_map, "", "", ""))
    for name in given.keys() & set(if_untrained.split()) - set(options.split()):
        if "untrained" not in given:
            parsers.choices[command].error(f"{dashed(name)} goes with --untrained: a "
                                           "saved model has its settings in its file")
    if "untrained" in given and "model" in given:
        parsers.choices[command].error("give --untrained or --model, not both")
    usual = {**USUAL, "plot": "attention.png" if command == "attention" else "loss.png"}
    args = argparse.Namespace(**usual | given, handler=handler, given=given, argv=argv)
    Options(**{f.name: getattr(args, f.name) for f in fields(Options)})      # checks them
    return args

def main(argv=None):
    """Run the program on the words of a command line; returns the exit status."""
    return exit_status(run_command, sys.argv[1:] if argv is None else argv)

def run_command(argv):
    args = parse(argv)
    return args.handler(args)

def exit_status(work, *arguments):
    """What a program ends with that does `work(*arguments)`: what this returns, or 0; 1 after a
    mistake, told in one line; 2 after wrong usage; 130 after Ctrl-C or a request to end."""
    forgiving_streams()
    try:
        return work(*arguments) or 0
    except SystemExit as end:       # argparse has said what is wrong
        return end.code
    except BrokenPipeError:         # who reads our output, head for example, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    except ImportError as error:
        mistake = f"{error}: python -m pip install -r requirements.txt brings what is needed"
    except RuntimeError as error:
        if "memory" not in str(error):
            raise
        mistake = "there is too little memory: try a smaller --batch-size or model"
    except (ValueError, OSError) as error:
        mistake = error
    note(f"error: {mistake}")
    return 1

def forgiving_streams():
    """A terminal that lacks a character shows ?; a closed stream is as good as /dev/null."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r+"))
        with contextlib.suppress(AttributeError, OSError):      # none of Python's, or read already
            getattr(sys, name).reconfigure(errors="replace")

# Threads that wait for each other look again and again, so as not to lose time; while another
# program has the processor, that takes many times as long as the work itself. GOMP_SPINCOUNT, at
# the beginning of this file, makes them fall asleep after some thousand looks.

def keep_memory():
    """Let glibc keep freed memory for the next step: clearing it anew takes a third of the time."""
    with contextlib.suppress(OSError, AttributeError):      # another system
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-3, 1 << 30)        # M_MMAP_THRESHOLD: blocks up to 1 GB come from the heap
        mallopt(-1, -1)             # M_TRIM_THRESHOLD: which is never given back

if __name__ == "__main__":
    keep_memory()
    sys.exit(main())
