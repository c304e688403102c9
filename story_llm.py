#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.6", "tiktoken>=0.8", "matplotlib>=3.9"]
# ///
"""story_llm: a language model that explains itself, learns your story and continues it.

    python story_llm.py train
    python story_llm.py generate --prompt "Once Aadhan renounced his kingdom"

The first half of this file is a lesson in 13 steps, for people who program in Python, know numpy
and school mathematics, and have never looked inside a language model. Read it from top to bottom,
in an evening or two. Every step names a command that runs it or gives examples for an interactive
session: start `python`, enter `from story_llm import *`, and type what follows `>>>`. After the
lesson, the workshop makes the same code robust and fast, and the command line comes last.

Every result in the lesson was measured. Yours will differ a little, as results do between machines,
and more without a network connection, because the program then builds a different vocabulary (step
4)."""
import functools
import math
import os
import sys
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import islice, pairwise
from pathlib import Path

if sys.version_info < (3, 11):
    sys.exit("error: story_llm needs Python 3.11 or later, but this is " + sys.version.split()[0])
if "torch" not in sys.modules:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")     # the end of this file says why
try:
    import torch
    import regex    # comes with tiktoken; like re, with extra classes such as \p{L} (any letter)
except (ModuleNotFoundError, KeyboardInterrupt) as error:
    if __name__ != "__main__":
        raise
    if isinstance(error, KeyboardInterrupt):
        sys.exit(130)
    sys.exit(f"error: the package {error.name} is not installed in this Python: activate the "
             "environment that has it, or run python -m pip install -r requirements.txt")
from torch import nn
from torch.nn import functional as F

# ═══ Step 1: the idea, the map, what to install ════════════════════════════════════════════════
# Cover the end of a sentence with your hand, and you can often guess the next word. A language
# model does nothing else. It reads the beginning of a text as a sequence of tokens, each a word or
# a piece of a word; it gives every possible next token a probability; then it appends one of the
# likely ones and goes on with the longer text. A model that predicts each token from those before
# it is called autoregressive, and ChatGPT is built around such a model. Ours is far smaller, and
# all that it will ever read is one story of 20 KB, Short_Story.txt: Prince Aadhan gives away his
# kingdom for the love of a ferryman's daughter, and that is where his troubles begin.
#
# Nobody writes rules into the model. It is a list of 1.7 million numbers, its parameters, and
# because nearly all of them are random at first, its first predictions are worthless. In training,
# it reads passages of the story and predicts, at every position, which token comes next. The story
# shows which token really came, so we can score every prediction and move every parameter a little
# in the direction that improves the score. After 180 such training steps, which take ten seconds to
# a minute on a laptop, the model needs only the first five words of a sentence to continue it word
# for word.
#
#      2-4    split the text into tokens, and turn the tokens into numbers
#       5     cut these numbers into training examples: some tokens, and the token that follows them
#      6-8    build the model, and let it write while it is still untrained
#      9-10   measure how wrong the predictions are, and train the model to make them better
#     11-13   save the model, look at how it learned, and let it continue the story
#
# `pip install -r requirements.txt` installs what the program needs: torch for the arithmetic,
# tiktoken for byte-pair encodings, matplotlib for pictures. Train the model now, because some later
# steps need it:
#
#     $ python story_llm.py train
#
# Or let the program run all the steps, one after the other:
#
#     $ python story_llm.py tour

# ═══ Step 2: load the text, split it into words ════════════════════════════════════════════════
# A model computes with numbers, and a story seems to contain none. On disk, however, it consists of
# nothing but numbers: bytes, from 0 to 255, which an encoding maps to characters. In UTF-8, the
# usual encoding, an English letter takes one byte, an é two, and a Tamil or Chinese character
# three. The bytes will come back in step 4. First we read the characters, and because operating
# systems end lines differently, we turn every line end into "\n".
def load_text(paths, encoding=""):
    """Return the text of a file, or of several files one after the other; "-" is standard input.
    Files are read as UTF-8, as UTF-16 if they begin with its byte-order mark, or in `encoding` if
    it is given. Raises StoryError if a file cannot be read, is not plain text, or contains none."""
    if isinstance(paths, (str, os.PathLike)):
        paths = [paths]
    texts = [decode(read_file(path), path, encoding) for path in paths]         # workshop
    text = "\n\n".join(texts).replace("\r\n", "\n").replace("\r", "\n")
    check(text.strip(), "the text is empty: give at least five words")
    return text

# How will we know, later, whether the model has learned anything beyond this text or has only
# memorized it? By holding some of the text back. The model is trained on the first nine tenths of
# the story, the training split, and sees the rest, the validation split, only when we test it.
# `split_text` in the workshop makes the cut.
#
# Now for the numbers. The simplest way to get them is to split the text into words and punctuation
# marks and to list every distinct piece once. This list is the vocabulary, and a piece's place in
# the list is its number.
#
# A regular expression does the splitting. For English, r" ?[\w']+| ?[^\w\s]|\s+" would do: a word,
# a punctuation mark, or white space. Our WORD_OR_MARK, in the workshop, does the same for every
# script. The " ?" at the start of the pattern keeps a space with the word after it. Nothing is
# lost: joined together, the pieces are the text again.
def split_words(text):
    """Split a text into words, punctuation marks and white space. A single space is kept with the
    piece that follows it.

    >>> split_words("Yes, said the king's son.")
    ['Yes', ',', ' said', ' the', " king's", ' son', '.']
    """
    return WORD_OR_MARK.findall(text)

END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "<|unk|>"

def build_vocabulary(text):
    """Return the distinct pieces of a text, sorted, and then the two special tokens of step 3.

    >>> build_vocabulary("the king and the ferryman")
    [' and', ' ferryman', ' king', ' the', 'the', '<|endoftext|>', '<|unk|>']
    """
    return sorted(set(split_words(text))) + [END_OF_TEXT, UNKNOWN]

# So every piece has a number, and the story is a list of numbers, at least as long as it says
# nothing new.

# ═══ Step 3: a simple tokenizer ════════════════════════════════════════════════════════════════
# A tokenizer translates in both directions: `encode` turns a text into token ids, which are places
# in the vocabulary, and `decode` turns token ids back into a text. But what happens to a word that
# the vocabulary does not contain?
#
# It becomes `<|unk|>`, a special token that stands for anything unknown. The text can then be
# processed, but the word is lost. Worse, `<|unk|>` never occurs in training, where every word is
# known, so the model never learns what it stands for. The other special token, `<|endoftext|>`,
# fares better: the program appends it once to the ids of the training text, and when the model
# predicts it, the program stops writing. With a validation split, the training text ends where we
# cut the story, and the model learns to stop there.
class WordTokenizer:
    """Words and punctuation marks as tokens. `vocabulary` is what `build_vocabulary` returns.

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
        self.ids = {token: token_id for token_id, token in enumerate(self.tokens)}
        self.vocab_size = len(self.tokens)
        self.end_of_text = self.ids[END_OF_TEXT]

    def encode(self, text):
        token_ids = []
        for piece in split_words(text):
            # the first word of a text may be in the vocabulary only with a space before it
            if piece not in self.ids:
                piece = " " + piece
            token_ids.append(self.ids.get(piece, self.ids[UNKNOWN]))
        return token_ids

    def decode(self, token_ids):
        return "".join(self.tokens[token_id] for token_id in token_ids)

    def decode_bytes(self, token_ids):      # for generate_text (workshop)
        return self.decode(token_ids).encode(errors="replace")

#     $ python story_llm.py words
#     ...
#       text:    Thamarai bought a laptop <|endoftext|>
#       tokens:  [Thamarai][<|unk|>][␣a][<|unk|>][<|unk|>][<|unk|>][<|unk|>][<|unk|>][<|unk|>]
#
# Thamarai is in the vocabulary, but "bought" never occurs in the story, let alone a laptop; and
# `<|endoftext|>`, when it is typed as text, is cut into five unknown pieces like any other marks.
# Seven of these nine tokens say nothing.

# ═══ Step 4: byte-pair encoding ════════════════════════════════════════════════════════════════
# Words make poor tokens. A language has hundreds of thousands of them; a rare one, such as
# "ferryman", is hardly ever seen, although "ferry" and "man" are common; and whatever is new is
# lost. Characters do no better: although they can spell every word, the text becomes long, and each
# character says little.
#
# Byte-pair encoding lies in between. It begins with the 256 possible bytes as tokens, so no text is
# unknown to it. Then it looks for the pair of neighbouring tokens that occurs most often in the
# text it learns from, merges it into a new token, and repeats this until the vocabulary is as large
# as we want. Frequent words end up as one token, rare ones as several. Three words, with _ for the
# space, are merged like this:
#
#     l o w   _ l o w e r   _ l o w l y     merge l + o, which occurs 3 times (o + w does too; the
#                                           pair that comes first in alphabetical order wins)
#     lo w    _ lo w e r    _ lo w l y      merge lo + w, 3 times
#     low     _ low e r     _ low l y       merge _ + low, 2 times
#     low     _low e r      _low l y        every remaining pair occurs only once, so we stop
#
# The idea comes from data compression (Gage 1994). Machine translation adopted it, with characters
# as the first tokens (Sennrich et al. 2016); GPT-2 started from bytes, and most language models
# since have done something similar.
#
# Merges never cross a word boundary: the text is first split much as in step 2, and pairs are
# counted within each word. Since a merge changes only the words that contain the pair, `train_bpe`
# recounts only their pairs. Recounting all pairs would give the same tokens and take minutes for a
# novel.
def train_bpe(text, vocab_size):
    """Learn byte-pair tokens from a text. Return at most `vocab_size - 1` of them as byte strings,
    the 256 bytes first, then the merged tokens in the order of merging. (The remaining id is for
    `<|endoftext|>`.)

    >>> train_bpe("low lower lowly", 300)[256:]
    [b'lo', b'low', b' low']
    """
    word_counts = Counter(STORY_SPLIT.findall(text))            # {word: how often it occurs}
    splits = {word: split_bytes(word) for word in word_counts}  # {word: its tokens at present}
    pair_counts = Counter()
    words_with = defaultdict(set)       # {pair: the words that contain it, or once did}

    def count_pairs(word, sign):
        for pair in pairwise(splits[word]):
            pair_counts[pair] += sign * word_counts[word]
            words_with[pair].add(word)

    for word in splits:
        count_pairs(word, +1)
    tokens = [bytes([byte]) for byte in range(256)]
    while len(tokens) < vocab_size - 1:
        best = most_frequent_pair(pair_counts)
        if best is None:
            break
        tokens.append(best[0] + best[1])
        for word in words_with.pop(best):
            count_pairs(word, -1)
            splits[word] = merge_pair(splits[word], best)
            count_pairs(word, +1)
    return tokens

def split_bytes(word):
    return tuple(bytes([byte]) for byte in word.encode("utf-8", errors="replace"))

def most_frequent_pair(pair_counts):
    """Return the most frequent pair (in a tie, the smallest), or None if no pair occurs twice."""
    highest = max(pair_counts.values(), default=0)
    if highest < 2:
        return None
    return min(pair for pair, count in pair_counts.items() if count == highest)

def merge_pair(word, pair):
    """Return a word, a tuple of tokens, with every occurrence of the pair merged into one token."""
    merged = []
    for token in word:
        if merged and (merged[-1], token) == pair:
            merged[-1] += token
        else:
            merged.append(token)
    return tuple(merged)

# To encode a text, the merges are applied again in the order in which they were learned. The
# library tiktoken does this quickly, and all it needs is the rank of every token, its place in the
# list: within a word, it always merges the pair whose result has the lowest rank.
class BPETokenizer:
    """A byte-pair encoding. `tokens` is a list of byte strings such as `train_bpe` returns. A
    token's index in this list is both its id and its rank. `kind`, "gpt2" or "story", says where it
    comes from.

    >>> tokenizer = BPETokenizer(train_bpe("low lower lowly", 300), "story")
    >>> tokenizer.encode("slow slower")         # two new words, and yet nothing is unknown
    [115, 257, 32, 115, 257, 101, 114]
    >>> [tokenizer.tokens[token_id] for token_id in tokenizer.encode("slower")]
    [b's', b'low', b'e', b'r']
    >>> tokenizer.decode(tokenizer.encode("漢字 <|endoftext|>"))
    '漢字 <|endoftext|>'
    """
    def __init__(self, tokens, kind):
        import tiktoken     # imported here, because the word tokenizer does not need it
        self.tokens = list(tokens)
        self.kind = kind
        self.end_of_text = len(self.tokens)         # the id of `<|endoftext|>`
        self.vocab_size = len(self.tokens) + 1
        ranks = {token: rank for rank, token in enumerate(self.tokens)}
        self.encoding = tiktoken.Encoding(kind, pat_str=SPLIT_PATTERNS[kind], mergeable_ranks=ranks,
                                          special_tokens={END_OF_TEXT: self.end_of_text})

    def encode(self, text):
        token_ids = []
        for part in PART.findall(text):     # in parts (workshop): tiktoken fails on very long words
            # encode_ordinary treats `<|endoftext|>` in a text like any other characters
            token_ids += self.encoding.encode_ordinary(part)
        return token_ids

    def decode_bytes(self, token_ids):
        return self.encoding.decode_bytes(token_ids)

    def decode(self, token_ids):        # bytes that form no character become a �
        return self.decode_bytes(token_ids).decode(errors="replace")

# Whose merges do we use? By default not the story's, but those of GPT-2, OpenAI's model of 2019
# (Radford et al.): 50,000 merges, learned from a large amount of English text. tiktoken downloads
# them. Where the download fails or GPT-2's merges do not suit the language, the program learns
# merges from the story, as it does with `--tokenizer story`.
#
# Most of GPT-2's 50,257 tokens are useless to us, and each of them would make the model larger and
# slower. `make_tokenizer` in the workshop keeps those that occur in the story, in either split,
# plus the intermediate ones from which they are merged, such as "lo" for "low", and the 256 bytes:
# 2,079 in all. With these, the story is split exactly as GPT-2 splits it.
#
#     $ python story_llm.py bpe
#     ...
#       text:    Thamarai bought a laptop <|endoftext|>
#       tokens:  [Th][amar][ai][␣b][ough][t][␣a][␣l][a][pt][op][␣][<][|][end][of][te][xt][|][>]
#
# Nothing is unknown any more. What has no token of its own is put together from smaller ones, even
# the name Thamarai, which was too rare in English text to be merged into one token.

# ─── PyTorch in one page ───────────────────────────────────────────────────────────────────────
def pytorch_in_one_page():
    """A tensor is what numpy calls an array, and most of numpy carries over: elementwise
    arithmetic, slicing, reshape, broadcasting, and `@` for the matrix product over the last two
    dimensions. What numpy calls `axis` is `dim` here; `x.transpose(1, 2)` swaps dimensions 1 and 2;
    `x.flatten(0, 1)` merges the first two, and `x.flatten(2)` all from the third on.

    >>> x = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    >>> x.shape, x.sum(dim=-1)
    (torch.Size([2, 3]), tensor([ 6., 15.]))

    Two things are new. The first is the layer, a function with parameters that can be trained.
    nn.Linear(3, 2) has a weight matrix W of shape (2, 3) and a bias b of shape (2,), both random at
    first, and computes x @ W.T + b over the last dimension of x; whatever dimensions come before it
    are left alone, so many inputs go through in one call. nn.Embedding(50, 4) is a matrix of 50
    rows of four numbers, and returns the rows whose indices you pass.

    >>> nn.Linear(3, 2)(x).shape, nn.Embedding(50, 4)(torch.tensor([7, 7, 30])).shape
    (torch.Size([2, 2]), torch.Size([3, 4]))

    F, torch.nn.functional, has the functions without parameters. A trailing underscore, as in
    `x.add_(1)`, means that x itself is changed, and `torch.cat` is numpy's concatenate.

    Every layer is an nn.Module, and so is a whole model, a module made of modules. A layer that is
    assigned to an attribute of a module is registered there, which is how `model.parameters()`
    finds the parameters of all its layers. Calling a module like a function runs its `forward`.

    The second new thing is the gradient. torch records every operation on a parameter and on
    whatever is computed from it; then `backward` goes through this record once, from the result
    back to the parameters, and applies the chain rule at every operation. That is backpropagation,
    and it yields the derivative of the result with respect to each parameter. Together, these
    derivatives are the gradient. At w = 3, the derivative of (2w - 10)^2 is 2 (2w - 10) * 2 = -16:

    >>> w = torch.tensor(3.0, requires_grad=True)       # record what is computed from w
    >>> result = (2 * w - 10) ** 2
    >>> result.backward()       # adds the derivative to w.grad, which was empty
    >>> w.grad
    tensor(-16.)

    If w grows a little, the result falls. So we move w a little against its gradient, and again,
    and again, until there is nothing left to gain. This is gradient descent:

    >>> for _ in range(20):
    ...     w.grad = None                               # forget the last derivative
    ...     result = (2 * w - 10) ** 2
    ...     result.backward()
    ...     with torch.no_grad():                       # the change itself is not recorded
    ...         w -= 0.1 * w.grad
    >>> w
    tensor(5., requires_grad=True)

    Nobody told w that 2 * 5 is 10. Training a language model is the same loop, except that w is 1.7
    million parameters. The result is the loss, which says how wrong the predictions are: 0 if every
    token was predicted with certainty, 7.6 if all were pure guesses (step 9)."""

# ═══ Step 5: sliding windows ═══════════════════════════════════════════════════════════════════
# What exactly does the model train on? On windows: stretches of consecutive tokens. The length of a
# window, the context length, is the largest number of tokens that the model can see at once. The
# input is such a window, and the targets, the tokens to predict, are the window moved on by one
# token:
#
#     input     Once     Aadhan      renounced   his
#     target    Aadhan   renounced   his         kingdom
#
# Before you read on: how many training examples are in this window?
#
# Four, one in each column. After "Once" comes "Aadhan", after "Once Aadhan" comes "renounced", and
# after all four comes "kingdom". At each position the model sees the token there and everything to
# its left, nothing to its right, and it works on all four examples at once. It is always shown the
# true text so far, not what it would have written itself, a method called teacher forcing.
class SlidingWindowDataset:
    """Windows that start `stride` tokens apart, over token ids of shape (N,). Item i is a pair
    (input, target), each of shape (context_length,); if i is a tensor of indices, both have a
    leading batch dimension. Raises StoryError if N <= context_length.

    >>> windows = SlidingWindowDataset(torch.tensor([10, 11, 12, 13, 14, 15, 16]), 4, stride=2)
    >>> len(windows)
    2
    >>> windows[1]
    (tensor([12, 13, 14, 15]), tensor([13, 14, 15, 16]))
    """
    def __init__(self, token_ids, context_length, stride=1):
        # check(condition, message) raises StoryError unless the condition holds
        check(len(token_ids) > context_length, f"{len(token_ids)} tokens are too few for a window "
              f"of {context_length} tokens: give a longer text or a smaller --context-length")
        # one token more, for the last target; a view of shape (windows, context_length + 1)
        self.windows = token_ids.unfold(0, context_length + 1, stride)

    def __len__(self):
        return len(self.windows)

    def __getitem__(self, index):
        window = self.windows[index].long()             # 64-bit integers, as torch's loss requires
        return window[..., :-1], window[..., 1:]        # all but the last token, all but the first

#     $ python story_llm.py windows
#     ...
#     first tokens of window 0:
#       input   The          ␣Lotus       ␣and         ␣the         ␣Salt        ␣Gate
#       target  ␣Lotus       ␣and         ␣the         ␣Salt        ␣Gate        ⏎
#
# The targets cost nothing: nobody had to write an answer down, because the text is its own answer.

# ═══ Step 6: attention and the GPT model ═══════════════════════════════════════════════════════
# A token id is only a name; whether it is large or small means nothing. The model therefore begins
# by looking up the embedding of each token, a vector of C numbers, in the rows of an nn.Embedding.
# These vectors are parameters, random at first, and training turns them into whatever improves the
# predictions.
#
# The model that we are about to build is a decoder-only transformer, like GPT-2 and nearly every
# large language model since. It reads token ids and returns, at every position, one number for each
# token of the vocabulary, the token's logit. The higher the logit, the more probable the model
# considers this token as the next. Below, a batch consists of B windows of T tokens, and the values
# on the right are those of our story model:
#
#     token ids     (B, T)       B = 32 windows, T = 32 tokens
#         |      look up the vector of each token, and add the vector of its position
#         x         (B, T, C)    C = 192, the embedding dimension
#         |      x = x + attention(norm(x))        tokens exchange information     ┐ these two lines
#         |      x = x + feed_forward(norm(x))     each token is processed alone   ┘ are one block
#         x         (B, T, C)    after 2 blocks
#         |      normalize, then compute a dot product with one vector per vocabulary token
#     logits        (B, T, V)    V = 2,079, the size of the vocabulary
#
# A value that we choose and that training does not change is a hyperparameter. The hyperparameters
# below define the model, and each will turn up where it is used. `setting` stores a default value,
# its meaning and its limits.
def setting(default, meaning, **limits):
    return field(default=default, metadata={"meaning": meaning, **limits})

class Settings:
    def __post_init__(self):            # a dataclass calls this as soon as its fields are set
        check_settings(self)            # workshop

@dataclass(frozen=True, kw_only=True)
class GPTConfig(Settings):
    """The shape of the model. The defaults give a small one, which learns a story in seconds."""
    vocab_size: int = setting(50257, "vocabulary size; the tokenizer determines it", minimum=1)
    context_length: int = setting(32, "maximum number of tokens that the model sees", minimum=1)
    emb_dim: int = setting(192, "embedding dimension: numbers that represent a token", minimum=1)
    n_heads: int = setting(4, "attention heads in each block", minimum=1)
    n_layers: int = setting(2, "transformer blocks", minimum=1)
    drop_rate: float = setting(0.0, "dropout probability in training", below=1)
    qkv_bias: bool = setting(False, "add biases to the query, key and value layers, as in GPT-2")
    tie_weights: bool = setting(False, "tie the output head to the token embedding, as in GPT-2")
    gelu: str = setting("exact", "exact GELU, or GPT-2's approximation", choices=("exact", "tanh"))
    position: str = setting("learned", "kind of position encoding",
                            choices=("learned", "sinusoidal", "rotary"))

# ─── Attention ─────────────────────────────────────────────────────────────────────────────────
# What follows "Once Aadhan renounced his"? In the story it is "kingdom". But you cannot tell that
# from the vector of "his", which says nothing about who "he" is or what he did; the model must mix
# in information from the earlier tokens. The simplest mixture, the average of all four vectors,
# would treat "Once" and "Aadhan" alike, although "Once" is of no use here. Attention is an average
# too, but not an equal one: each token decides how much of every token so far goes into its own
# average.
#
# Three linear layers make the decision possible. They turn the vector of each token into three new
# vectors:
#
#     query    what this token is looking for
#     key      what this token can be found by
#     value    what this token passes on to those that find it
#
# Why three? "his" is looking for a person but does not name one, so its query must differ from its
# key. "Aadhan" can be found because it names a person, but what it has to pass on is that this
# person is the prince who left; hence a value that differs from the key. Nobody decides what
# queries look for. The three layers are trained like all others, and they learn whatever makes the
# predictions better.
#
# How well a query matches a key is measured by their dot product, the attention score. Softmax
# turns the scores of a query into its attention weights: it raises e to the power of each score and
# divides by the sum, so that the results are positive and add up to 1. Suppose that "his" has a
# score of 0 with "Once", 2 with "Aadhan", 1 with "renounced", and 0 with itself:
#
#     softmax([0, 2, 1, 0]) = [1, 7.39, 2.72, 1] / 12.11 = [0.08, 0.61, 0.22, 0.08]
#
# The sum of the values, each multiplied by its attention weight, is the context vector of "his". It
# consists mostly of what "Aadhan" passes on.
#
# The scores can be too large, however. Suppose that those of the example were four times as large:
#
#     softmax([0, 8, 4, 0]) = [0.000, 0.981, 0.018, 0.000]
#
# Now "his" listens to a single token, which is right only if that token was well chosen, and before
# training, chance does the choosing. A score is a sum of D products, where D is the length of a
# query: 48 here, because each query of 192 numbers will be cut into four. Since variances (mean
# squared distances from the mean) of independent numbers add up, the standard deviation of a score
# is sqrt(48) = 6.9 times that of one product: in our untrained model, 2.1 against 0.3. With such
# scores, the last token in a window of 32 gives its favourite an attention weight of 0.34 on
# average, where an equal share would be 0.03. The favourite is random, and training has to undo
# that choice before it can make a good one.
#
# Dividing every score by sqrt(D) cancels the influence of D, and 0.34 becomes 0.05. This is scaled
# dot-product attention (Vaswani et al. 2017, section 3.2.1), and the division earns its place:
# trained without it, our model can continue only 23% of the sentences by heart instead of 100%.
#
#     Try it: python extras/experiments.py no-scaling      (each experiment takes a minute or two)
def attention_weights(queries, keys, mask):
    """Return how much each query attends to each key. Queries (..., T, D) and keys (..., S, D) give
    weights (..., T, S). Each row adds up to 1. An attention weight is 0 where `mask` (T, S) is
    True; the causal mask, below, says where and why. In the model, S equals T until step 13; here,
    T is 1 and S is 4.

    With D = 2, the dot products of the query `his` with the four keys are 0, 2.8, 1.4 and 0.
    Divided by sqrt(2), they are close to the scores 0, 2, 1 and 0 of the example.

    >>> his = torch.tensor([[1.4, 1.4]])
    >>> keys = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 1.0], [1.0, -1.0]])
    >>> weights = attention_weights(his, keys, mask=torch.tensor([[False, False, False, False]]))
    >>> weights
    tensor([[0.0838, 0.6069, 0.2255, 0.0838]])
    >>> values = torch.tensor([[0.0, 1.0], [10.0, 0.0], [0.0, 10.0], [1.0, 0.0]])
    >>> weights @ values        # the context vector: 0.61 of Aadhan's 10, a little of the others
    tensor([[6.1526, 2.3390]])
    """
    D = queries.shape[-1]
    # row t, column s: the dot product of query t and key s
    scores = queries @ keys.transpose(-2, -1) / math.sqrt(D)        # (..., T, S)
    scores = scores.masked_fill(mask, -math.inf)                    # e^-inf is 0
    return scores.softmax(dim=-1)

# One shortcut has to be forbidden. In training, the model reads a whole window at once and predicts
# the next token at every position, but for all positions except the last, this next token is
# already in the window. Before you read on: what would a model learn that could attend to that
# token?
#
# To copy it, and to predict nothing. We let one try. After 60 of 180 training steps, its loss is
# 0.36, against 2.04 for the model that follows the rules: a splendid figure, and a useless model,
# because when it writes, there is no next token to copy. It continues "Once Aadhan renounced his
# kingdom" like this:
#
#     for his kingdom Aadhan Aadhan his kingdom for his kingdom for Aadhan Aadhanhan his kingdom
#
#     Try it: python extras/experiments.py no-mask
#
# So no token may attend to a token after it. The causal mask enforces this, and attention becomes
# causal self-attention, where "self" means that queries, keys and values come from the same tokens.
# In the first row of the mask, a single entry is False: the first token can attend only to itself,
# with an attention weight of 1.
def causal_mask(T, S, device=None):
    """Return a mask (T, S) for the last T of S tokens, True where the token of the row must not
    attend to the token of the column.

    >>> causal_mask(3, 3)
    tensor([[False,  True,  True],
            [False, False,  True],
            [False, False, False]])
    """
    positions = torch.arange(S, device=device)
    return positions > positions[S - T:, None]      # broadcasting: a row against a column

# But "his" needs both the person and the deed. One head could attend to both, yet it has a single
# query to find two different things with, and their values would arrive already added up. That is
# why attention is computed several times in parallel, by heads, each with queries, keys and values
# of its own. These are the attention weights of "his" in two of the four heads of the first block,
# before and after training:
#
#                     Once    Aad     han     ren     ounced  his
#     head 3 before   0.14    0.16    0.08    0.28    0.15    0.20
#            after    0.12    0.36    0.07    0.17    0.16    0.13       most on Aad
#     head 4 before   0.16    0.18    0.18    0.16    0.24    0.09
#            after    0.11    0.20    0.13    0.19    0.32    0.05       most on ounced
#
# (GPT-2's tokens split "Aadhan" and "renounced".) Both tokens matter: if head 3 may not attend to
# "Aad", the probability of "kingdom" falls from 96% to 91%, and if head 4 may not attend to
# "ounced", to 93%. In other sentences, the same heads look at other things, and in a short story,
# the choice matters little: if all four heads of this block averaged equally, "kingdom" would still
# have 92%.
#
#     $ python story_llm.py attention --prompt "Once Aadhan renounced his"         (after training)
#
# Heads cost no parameters. With H of them, the query, key and value layers still map C numbers to
# C; their outputs are cut into H pieces of D = C / H numbers, and each head works with its own
# piece:
#
#     the vector of a token    192 numbers
#     its query                192 numbers = [ 48 | 48 | 48 | 48 ]    likewise its key and its value
#                                               |    |    |    |    each head compares, averages
#     context vectors                         [ 48 | 48 | 48 | 48 ] = 192 numbers
#     out_proj mixes them      192 numbers     what the heads have found, in one vector
class MultiHeadAttention(nn.Module):
    """Causal self-attention with H heads, (B, T, C) -> (B, T, C).

    >>> attention = MultiHeadAttention(GPTConfig(emb_dim=32, n_heads=4))
    >>> attention(torch.zeros(2, 3, 32)).shape
    torch.Size([2, 3, 32])
    """
    def __init__(self, config):
        super().__init__()
        C = config.emb_dim
        self.config = config
        # make_linear (below) is an nn.Linear with small random weights
        self.query = make_linear(C, C, config, bias=config.qkv_bias)
        self.key = make_linear(C, C, config, bias=config.qkv_bias)
        self.value = make_linear(C, C, config, bias=config.qkv_bias)
        self.out_proj = make_linear(C, C, config, added_to_x=True)
        self.dropout = nn.Dropout(config.drop_rate)

    def split_heads(self, x):
        """(B, T, C) -> (B, H, T, D): cut the C numbers of each token into H pieces of D, then swap
        T and H, because `@` works on the last two dimensions."""
        B, T, _ = x.shape
        D = self.config.emb_dim // self.config.n_heads
        return x.reshape(B, T, -1, D).transpose(1, 2)

    def forward(self, x, cache=None):
        queries = self.split_heads(self.query(x))                   # (B, H, T, D)
        keys = self.split_heads(self.key(x))
        values = self.split_heads(self.value(x))
        if cache is not None:           # step 13 explains these two lines
            keys, values = cache.append(self, keys, values)         # (B, H, S, D)
        contexts = self.average(queries, keys, values)              # (B, H, T, D)
        return self.out_proj(contexts.transpose(1, 2).flatten(2))   # (B, T, H, D), then (B, T, C)

    def average(self, queries, keys, values):
        """The context vectors (B, H, T, D): the values, averaged with the attention weights."""
        if queries.is_cuda:     # the same, but faster; if you edit what follows, delete this
            return fused_attention(queries, keys, values, self.dropout)
        mask = causal_mask(queries.shape[2], keys.shape[2], queries.device)
        weights = self.dropout(attention_weights(queries, keys, mask))
        return weights @ values

# This is a good place to rest. The hardest idea is behind you: each token asks with its query; the
# keys of the tokens up to it show how well they fit; softmax turns the scores into attention
# weights; and what comes back is an average of values. The other half of a block is shorter, and
# then there is a model.

# ─── The block ─────────────────────────────────────────────────────────────────────────────────
# Attention moves information between tokens. What a token then makes of it is the business of the
# feed-forward network, which processes each token on its own: it maps the C numbers to 4 C hidden
# units, applies an activation function to each, and maps the result back to C numbers. The two maps
# are linear layers; without the activation function between them, they would amount to a single
# one, just as 3 (2x) is 6x. With it, the network can combine facts.
#
# Suppose that one of the C numbers is 1 if the token is "his" and 0 otherwise, and that another is
# 1 if attention has found "renounced". A hidden unit with weight 10 for both numbers and bias -15
# computes 5 if both are 1, -5 if only one is, and -15 if neither is. GELU (Hendrycks & Gimpel 2016)
# is a smooth version of max(0, x): it leaves the 5 almost unchanged and turns the negative numbers
# into almost 0. Now the second layer can add something in favour of "kingdom" if both facts hold,
# and only then.
class FeedForward(nn.Module):
    """Two linear layers with an activation function in between, (B, T, C) -> (B, T, C).

    >>> F.gelu(torch.tensor([-5.0, -1.0, 0.0, 1.0, 5.0])).round(decimals=2)
    tensor([-0.0000, -0.1600,  0.0000,  0.8400,  5.0000])
    """
    def __init__(self, config):
        super().__init__()
        self.approximate = {"exact": "none", "tanh": "tanh"}[config.gelu]       # torch's names
        self.expand = make_linear(config.emb_dim, 4 * config.emb_dim, config)
        self.project = make_linear(4 * config.emb_dim, config.emb_dim, config, added_to_x=True)

    def forward(self, x):
        return self.project(F.gelu(self.expand(x), approximate=self.approximate))

# Attention and the feed-forward network are both used in the form x = x + f(norm(x)). Before you
# read on: what would be lost with x = f(x)?
#
# Everything that f does not pass on. Early in training, attention returns something close to the
# average of all tokens so far, nearly the same for two neighbours; if that replaced x, the next
# block could hardly tell the two apart. Thanks to the `x +`, the residual connection (He et al.
# 2016), f only has to contribute what is new. Without the residual connection, our loss is still
# 4.34 after 180 steps instead of 0.22, and the model cannot recite a single sentence.
#
#     Try it: python extras/experiments.py no-residual
#
# The gradient benefits as well. Picture a deep network whose layers each pass on one number: every
# layer multiplies the gradient by a derivative f', and after 24 layers with an f' of 0.5, less than
# a ten-millionth of it would be left. But the derivative of x + f(x) is 1 + f'(x), and the 1 passes
# the gradient on unchanged.
#
# And the norm? It keeps the input of f on one scale. LayerNorm (Ba et al. 2016) brings the C
# numbers of each token to mean 0 and standard deviation 1, then scales and shifts them by
# parameters of its own. Without any norm, x enters the first block with a standard deviation of
# 0.06, because the initial weights are small, and the scores, the inputs of the feed-forward
# networks and the logits are all almost 0. After 180 steps, the loss is 2.23, and the model recites
# nothing. In a deep model, where every block adds to x, the norm also keeps the input of f from
# growing.
#
# The original transformer normalized the sum: norm(x + f(x)). A norm divides by the standard
# deviation s of its input, so its derivative contains a factor 1 / s. Because f(x) is added to an x
# that has just been normalized, s is usually above 1, and in a deep model the gradient shrinks with
# every block on its way back: it is large in the last blocks and small in the first, and training
# is unstable unless it starts with small steps (Xiong et al. 2020). In pre-norm, x + f(norm(x)),
# the factor affects only the second term, and the 1 stays a 1. Our model has only two blocks, yet
# with norm(x + f(x)) its loss ends at 0.63, partly because the first attention layer then reads an
# x that nothing has normalized.
#
#     Try it: python extras/experiments.py no-norm        (or post-norm)
#
# The last part is dropout (Srivastava et al. 2014). In training, it sets randomly chosen numbers in
# its input to 0 and enlarges the others to make up for it, so that the network does not come to
# rely on any one of them. That helps a model that should do well on unseen text. Ours is meant to
# memorize its text, so its dropout probability is 0.
def make_norm(config):
    return nn.LayerNorm(config.emb_dim)

class TransformerBlock(nn.Module):
    """Attention, then the feed-forward network, (B, T, C) -> (B, T, C).

    >>> nn.LayerNorm(3)(torch.tensor([2.0, 4.0, 6.0])).detach()   # detach: drop the gradient record
    tensor([-1.2247,  0.0000,  1.2247])
    """
    def __init__(self, config):
        super().__init__()
        self.norm1 = make_norm(config)
        self.att = make_attention(config)       # MultiHeadAttention, unless positions are rotary
        self.norm2 = make_norm(config)
        self.ff = FeedForward(config)
        self.dropout = nn.Dropout(config.drop_rate)

    def forward(self, x, cache=None):
        x = x + self.dropout(self.att(self.norm1(x), cache))
        x = x + self.dropout(self.ff(self.norm2(x)))
        return x

# Each block works on what the one before has found. We can watch "his" on its way through our
# trained model if we turn x into logits before its time, with the two layers that come after the
# last block, a norm and a dot product for each token. This trick, the logit lens, shows the
# probability of "kingdom" at every stage:
#
#     at first    after attention 1    feed-forward 1    attention 2    feed-forward 2
#        2%              2%                 79%              75%              96%
#
# In the first block, attention gathers, and the feed-forward network draws the conclusion; in the
# second, attention adds nothing here, and the feed-forward network makes sure. (The lens shows only
# what the output head can already read.)

# ─── Initialization ────────────────────────────────────────────────────────────────────────────
# What values do the parameters start from? If all were equal, all heads would compute the same
# result, receive the same gradient, and stay equal forever, so the weights are random. They are
# also small, so that no token is strongly preferred at first. GPT-2 draws most of its weights from
# a normal distribution with a standard deviation of 0.02. With 192 numbers in a vector instead of
# 768, our dot products have fewer terms, so our standard deviation is larger, 0.04: sqrt(192) times
# 0.04 is sqrt(768) times 0.02.
#
# The layers whose output is added to x start with smaller weights still, as in GPT-2. There are n =
# 2 n_layers such layers, and a sum of n independent outputs has sqrt(n) times the standard
# deviation of one. Dividing their weights by sqrt(n) keeps the initial x about as large in a deep
# model as in a shallow one.
def init_std(config):
    """The standard deviation of the initial weights: 0.04 for our C = 192."""
    return 0.02 * math.sqrt(768 / config.emb_dim)

def make_linear(n_inputs, n_outputs, config, bias=True, added_to_x=False):
    layer = nn.Linear(n_inputs, n_outputs, bias=bias)
    n_sums = 2 * config.n_layers if added_to_x else 1
    nn.init.normal_(layer.weight, std=init_std(config) / math.sqrt(n_sums))
    if bias:
        nn.init.zeros_(layer.bias)
    return layer

def make_embedding(n_vectors, config):
    embedding = nn.Embedding(n_vectors, config.emb_dim)
    nn.init.normal_(embedding.weight, std=init_std(config))
    return embedding

# ─── The model ─────────────────────────────────────────────────────────────────────────────────
# The order of the tokens is still missing. Scores depend on what the tokens are, not on where they
# stand, so after "dog bites man" and after "man bites dog", the next token would find the same
# three keys, and the first block could not tell who bites. Each position therefore has a learned
# vector of its own, its positional embedding, which is added to the embedding of the token.
#
# Doesn't adding them blur the two? If tokens used only the first hundred numbers and positions only
# the rest, nothing would be lost, and a linear layer could read either part. Training need not be
# so tidy, because in 192 dimensions even random vectors are nearly at right angles to each other:
# the cosine of the angle between a token's vector and a position's is 0.06 in magnitude, on
# average. A row of a linear layer that points in the direction of one token therefore gives a large
# output for this token and little for any position. The workshop has two other kinds of position
# encoding.
#
# The output head is a linear layer without bias. Its weight matrix has one row of C numbers for
# every token, and the logit of a token is the dot product of x with this row. The embedding, too,
# has one vector per token, and in both matrices, tokens that are used alike should have similar
# vectors. So one matrix can serve twice (Press & Wolf 2017). GPT-2 uses this weight tying; here it
# is an option, `--tie-weights`, which saves V C = 399,168 parameters.
class GPTModel(nn.Module):
    """Token ids (B, T) -> logits (B, T, V). Raises StoryError if T exceeds the context length.

    >>> model = GPTModel(GPTConfig(vocab_size=50, context_length=8, emb_dim=32))
    >>> logits = model(torch.tensor([[4, 8, 15, 16]]))
    >>> logits.shape
    torch.Size([1, 4, 50])

    Change the last token, and the logits of the positions before it stay as they were:

    >>> changed = model(torch.tensor([[4, 8, 15, 23]]))
    >>> [torch.allclose(logits[0, t], changed[0, t]) for t in range(4)]
    [True, True, True, False]
    """
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.tok_emb = make_embedding(config.vocab_size, config)
        if config.position == "learned":
            self.pos_emb = make_embedding(config.context_length, config)
        else:
            self.pos_emb = fixed_positions(config)                  # workshop: sines, or zeros
        self.dropout = nn.Dropout(config.drop_rate)
        self.trf_blocks = nn.ModuleList(TransformerBlock(config) for _ in range(config.n_layers))
        self.final_norm = make_norm(config)
        self.out_head = make_linear(config.emb_dim, config.vocab_size, config, bias=False)
        if config.tie_weights:
            self.out_head.weight = self.tok_emb.weight

    def forward(self, token_ids, cache=None):
        start = 0 if cache is None else cache.length                # always 0 until step 13
        end = start + token_ids.shape[1]
        check(end <= self.config.context_length, f"{end} tokens are more than the context length "
              f"of {self.config.context_length}: pass only the last {self.config.context_length}")
        positions = torch.arange(start, end, device=token_ids.device)
        x = self.tok_emb(token_ids) + self.pos_emb(positions)       # (B, T, C) + (T, C)
        x = self.dropout(x)
        for block in self.trf_blocks:
            x = block(x, cache)                                     # (B, T, C)
        return self.out_head(self.final_norm(x))                    # (B, T, V)

# That is the whole model: look up, mix, process, mix, process, compare with every token of the
# vocabulary. Is every part of it needed? For one short story, some parts are a luxury, as training
# without them shows:
#
#     without ...                                  loss     recited
#     (the model as it is)                         0.22      100%
#     attention                                    2.15        0%    no-attention
#     the residual connection                      4.34        0%    no-residual
#     the norms                                    2.23        0%    no-norm
#     scaling by sqrt(D)                           0.95       23%    no-scaling
#     the feed-forward network                     0.65       55%    no-feed-forward
#     attention weights (a plain average instead)  0.37       98%    average
#     a second block                               0.23      100%    one-block
#     several heads (one instead)                  0.22      100%    one-head
#     positional embeddings                        0.22       99%    no-positions
#
# The first three are indispensable, and the next two nearly so. The rest is a luxury here: in a
# story of 4,000 words, the last word and those before it nearly always settle the next one,
# whatever their order. (Nor does a model without positional embeddings miss the order altogether.
# In the first block, an early token averages few tokens and a late one many, so the vectors that
# enter the second block already tell how much stood before them.) Even a plain average beats
# unscaled attention, perhaps because it loses no token, while random favourites hide most of the
# others.
#
#     Try it: python extras/experiments.py one-block      (or another name from the last column)

# ═══ Step 7: a batch through the untrained model ═══════════════════════════════════════════════
# Do the parts fit together? Follow one sentence of four tokens through the whole model. The weights
# are random, so the numbers mean nothing yet; the shapes are final. The function below is all
# docstring, to read and to try.
def one_sentence_through_the_model():
    """We look up the embedding of each token id, and add the vectors of the positions 0 to 3:

    >>> tokenizer = WordTokenizer(build_vocabulary("He noticed the leaves"))
    >>> ids = torch.tensor([tokenizer.encode("He noticed the leaves")])             # (B, T)
    >>> ids
    tensor([[3, 1, 2, 0]])
    >>> model = new_model(GPTConfig(vocab_size=tokenizer.vocab_size), seed=42)
    >>> x = model.tok_emb(ids) + model.pos_emb(torch.arange(4))
    >>> x.shape, x[0, 3, :3].detach()           # (B, T, C), and the first numbers of "leaves"
    (torch.Size([1, 4, 192]), tensor([-0.0964,  0.0765, -0.0037]))

    In the first block, the query, key and value layers map 192 numbers to 192, which are cut into
    four heads of 48. In each head, a token spreads its attention over itself and the tokens before
    it:

    >>> att, x_normed = model.trf_blocks[0].att, model.trf_blocks[0].norm1(x)
    >>> queries, keys = att.split_heads(att.query(x_normed)), att.split_heads(att.key(x_normed))
    >>> queries.shape                           # (B, H, T, D)
    torch.Size([1, 4, 4, 48])
    >>> weights = attention_weights(queries, keys, causal_mask(4, 4))               # (B, H, T, T)
    >>> weights[0, 0].detach().round(decimals=2)
    tensor([[1.0000, 0.0000, 0.0000, 0.0000],
            [0.6400, 0.3600, 0.0000, 0.0000],
            [0.3000, 0.3900, 0.3100, 0.0000],
            [0.1500, 0.3200, 0.3600, 0.1700]])

    That is the first head. "He", in the first row, can attend only to itself; "leaves", in the
    last, attends to all four. After both blocks, the output head computes six logits at each
    position, one for each of the four words and the two special tokens, and softmax turns the
    logits into probabilities. These are for the token after "leaves":

    >>> model(ids).shape                        # (B, T, V)
    torch.Size([1, 4, 6])
    >>> model(ids)[0, -1].softmax(dim=-1).detach().round(decimals=2)
    tensor([0.2500, 0.1700, 0.1800, 0.0600, 0.1200, 0.2300])

    Pure guessing would give every token one sixth. These preferences are accidents of the initial
    weights, and training still has all its work to do."""

# Three kinds of numbers are easily confused. Parameters are learned and stored. Activations, such
# as x and the attention weights above, are computed anew for every batch. Gradients exist only in
# training, one number for each parameter. This command sends two windows through the model:
#
#     $ python story_llm.py model
#     ...
#       part         shape of the output    parameters
#       tok_emb              (2, 32, 192)       399,168
#       pos_emb                 (32, 192)         6,144
#       trf_blocks.0         (2, 32, 192)       444,288
#       trf_blocks.1         (2, 32, 192)       444,288
#       final_norm           (2, 32, 192)           384
#       out_head            (2, 32, 2079)       399,168
#       total                                 1,693,440
#
# More than half of the parameters are in the blocks. Each block has 12 C^2 weights, 4 C^2 in
# attention and 8 C^2 in the feed-forward network, plus 10 C biases and scales. Almost all the rest
# belong to the vocabulary.

# ═══ Step 8: greedy generation ═════════════════════════════════════════════════════════════════
# What does a model write that has learned nothing? Give it the beginning of a text, the prompt, and
# let it go on. Using a model in this way, without training it, is called inference. In training,
# the predictions at all positions count; now only the last one does, because the others predict
# tokens that we already have. Greedy decoding takes the token with the highest logit, appends it,
# and runs the model again.
def generate_text_simple(model, idx, max_new_tokens, context_size):
    """Append `max_new_tokens` tokens to the token ids idx (B, T), chosen greedily. The model sees
    the last `context_size` tokens.

    Any function from ids to logits can serve as the model. This one knows the tokens 0 to 4, and
    counts through them, starting again at 0:

    >>> def counting(idx):
    ...     return F.one_hot((idx + 1) % 5, num_classes=5)
    >>> generate_text_simple(counting, torch.tensor([[3]]), max_new_tokens=4, context_size=8)
    tensor([[3, 4, 0, 1, 2]])
    """
    for _ in range(max_new_tokens):
        idx_cond = idx[:, -context_size:]
        with torch.no_grad():                                       # inference needs no gradients
            logits = model(idx_cond)                                # (B, T, V)
        logits = logits[:, -1, :]                                   # the last position, (B, V)
        idx_next = torch.argmax(logits, dim=-1, keepdim=True)       # (B, 1)
        idx = torch.cat([idx, idx_next], dim=1)                     # (B, T + 1)
    return idx

#     $ python story_llm.py generate --untrained --max-new-tokens 8
#     Once Aadhan renounced his kingdomouncedorslf Hors nailssel yet
#
# Noise.

# ═══ Step 9: the loss before training, and recall ══════════════════════════════════════════════
# How wrong is noise? Softmax turns the logits into probabilities. For each example, take the
# probability p that the model gave to the token that really came next; the cross-entropy loss is
# -ln(p). It is 0 for a model that was certain and right, and it grows as p falls:
#
#     p       1       1/2     1/10    1/100   1/10,000
#     loss    0       0.69    2.3     4.6     9.2
#
# The loss of a batch is the mean over all its examples. Before you read on: what should it be for
# our untrained model, whose vocabulary has 2,079 tokens?
#
# All its logits are fairly close to 0, so every token gets about 1/2079, whatever the text says,
# and the loss should be about -ln(1/2079) = ln(2079) = 7.64. It will turn out a little higher,
# because unequal guesses cost more on average: if two tokens are equally frequent, guessing 0.6 and
# 0.4 costs (0.51 + 0.92) / 2 = 0.71, guessing 0.5 for both only 0.69. Should you ever see much more
# than ln(V) before training, look for a bug.
def batch_loss(model, inputs, targets):
    """Return the mean loss over a batch of token ids; inputs and targets have shape (B, T).

    >>> def model(inputs):      # prefers token 1 at every position, whatever the input
    ...     return torch.tensor([0.0, 2.0, 0.0]).repeat(*inputs.shape, 1)       # (B, T, 3)
    >>> batch_loss(model, torch.tensor([[0, 0]]), torch.tensor([[1, 2]]))
    tensor(1.2395)
    >>> p = math.e ** 2 / (math.e ** 2 + 1 + 1)                     # probability of token 1: 0.79
    >>> round((-math.log(p) - math.log((1 - p) / 2)) / 2, 4)        # the mean of a hit and a miss
    1.2395
    """
    logits = model(inputs).flatten(0, 1)                # one row per prediction, (B * T, V)
    # cross_entropy computes softmax, -ln(p) and the mean. A window that runs past the end of the
    # text (step 10) is filled with padding, tokens whose target of -100 leaves them out of the
    # mean.
    return F.cross_entropy(logits, targets.flatten(), ignore_index=-100)

# The loss of a whole split is the mean over windows that lie end to end. The figures that training
# prints come from at most 32 windows, spread evenly over the split, so that they cost next to
# nothing.
def mean_loss(model, token_ids, max_windows=32):
    """Return the mean loss over token ids (N,), or None if N < 2."""
    if len(token_ids) < 2:
        return None
    T = min(model.config.context_length, len(token_ids) - 1)
    windows = SlidingWindowDataset(token_ids, T, stride=T)
    count = min(len(windows), max_windows)
    chosen = torch.arange(count) * len(windows) // count
    total, device = 0.0, device_of(model)       # workshop: the CPU or a GPU
    with torch.no_grad():
        for part in chosen.split(max(1, 1024 // T)):        # in parts, to save memory
            inputs, targets = windows[part]
            total += batch_loss(model, inputs.to(device), targets.to(device)) * len(part)
    return total.item() / count

# But the loss does not tell us what we most want to know: can the model continue the story? Recall
# does: it is the share of sentences that the model continues word for word when given only their
# first five words. It has to keep this up for at least 80 characters, if need be into the next
# sentence. (Carlini et al. 2023 call such a sentence extractable.) We test every sentence of the
# training split that has at least eight words, unless another begins alike and goes on differently;
# in a poem or a chat, lines take the place of sentences. Five words may not sound like much, yet
# after training, three are enough for 172 of the 175 sentences.
#
# Do we have to let the model write, token by token? No. One pass over the prompt and its true
# continuation gives the prediction at every position, and as long as each prediction is the token
# that really follows, greedy decoding would have written the same. (Without the causal mask, the
# model would see the answers.)
def recites(model, tokenizer, prompt, continuation):
    """Return whether greedy decoding would continue the prompt with exactly this continuation."""
    prompt_ids = tokenizer.encode(prompt)
    token_ids = torch.tensor(prompt_ids + tokenizer.encode(continuation))
    # predictions[i], the most probable token after token i, must be token i + 1; the workshop's
    # function also handles texts that are longer than the context length
    predictions = greedy_predictions(model, token_ids[:-1])
    n = len(prompt_ids)
    return torch.equal(predictions[n - 1:], token_ids[n:])

#     $ python story_llm.py evaluate --untrained
#     an untrained model:
#       Train loss                 7.808 (perplexity 2,461.30; 2.761 bits per character)
#       Val loss                   7.790 (perplexity 2,417.00; 2.783 bits per character)
#       ln(2079), uniform guess    7.640
#     Recall 0.0%: 0 of 175 sentences continued word for word from their first five words
#
# The parentheses give the loss in two other forms. Perplexity is e to the power of the loss: the
# number of tokens among which pure guessing would cost as much. Like the loss, it depends on how
# the text is split into tokens. Bits per character do not, which makes them the figure to compare
# models by: add up the losses of all tokens, then divide by the number of characters and by ln(2).
# By every one of these figures, our model knows nothing yet.

# ═══ Step 10: training ═════════════════════════════════════════════════════════════════════════
# How do 1.7 million random numbers learn a story? By the loop of the PyTorch page: take a batch of
# windows, compute the loss and its gradient, move all parameters a little, repeat. A pass over the
# training text is an epoch; the part that moves the parameters is the optimizer. The functions of
# this step share two objects, which the workshop defines. A Corpus is the text, split and encoded;
# a Run is a model with everything that belongs to its training:
#
#     corpus.train_ids, corpus.val_ids        the token ids of both splits, (N,) and (M,)
#     corpus.recall_tests                     pairs (the first five words, how the text goes on)
#     run.model, run.tokenizer                what learns, and what encodes for it
#     run.prompt                              the prompt that samples start from
#     run.optimizer, run.train_config         how it is trained
#     run.step, run.total_steps               steps done, and steps in all
#     run.history                             what was measured on the way

# ─── AdamW ─────────────────────────────────────────────────────────────────────────────────────
# On the PyTorch page, gradient descent moved w by -lr times its gradient, with a learning rate lr
# of 0.1. Our model learns too slowly that way: with the best learning rate that we found, its loss
# was still 3.06 after 180 steps. In some matrices, gradients are 60 to 90 times as large as in
# others, so a learning rate that suits large gradients leaves the parameters with small ones almost
# where they were. And since a batch is only a small part of the text, its gradient never points
# exactly the right way.
#
#     Try it: python extras/experiments.py gradient-descent
#
# Adam (Kingma & Ba 2015) solves both problems with two moving averages for every parameter. The
# first, m, follows the gradient g and evens out what differs from batch to batch. The second, v,
# follows g^2; the square root of v says how large the gradients of this parameter usually are. The
# parameter w moves by lr times m, divided by this square root:
#
#     m = 0.9 m + 0.1 g
#     v = 0.98 v + 0.02 g^2
#     w = w - lr (m / a) / (sqrt(v / b) + 1e-8)       a = 1 - 0.9^n, b = 1 - 0.98^n, in step n
#
# Old gradients fade: in m, one from ten steps ago counts 0.9^10 = 0.35 times as much as the newest,
# so m covers about the last 1 / (1 - 0.9) = 10 steps, and v about 50. Both start at 0 and are too
# small at first: after n steps, the shares of all gradients in m add up to a instead of 1, and in v
# to b, which is why we divide m by a and v by b. In the quotient, the size of the gradients cancels
# out: if all were 100 times as large, w would move just as far, by about lr a step. What counts is
# agreement: if the sign flips from step to step, w stays almost where it is.
#
# The W in AdamW (Loshchilov & Hutter 2019) stands for weight decay: in each step, the weights
# shrink a little, whatever their gradients say. Like dropout, weight decay is a form of
# regularization, which limits a model so that it generalizes, that is, does well on unseen text.
# Our model is meant to memorize, which is why its weight decay is 0, like its dropout probability.
class AdamW:
    """torch.optim.AdamW, written out, but only matrices decay, as usual for GPTs, and the second
    beta suits short runs (torch's is 0.999). `parameters` are pairs (name, parameter), as they come
    from `model.named_parameters()`. The betas say how much of m and of v remains after a step.

    >>> w = nn.Parameter(torch.tensor([3.0, 3.0]))
    >>> optimizer = AdamW([("w", w)])
    >>> for _ in range(3):
    ...     w.grad = torch.tensor([100.0, 0.01])        # one gradient is 10,000 times the other,
    ...     optimizer.step(lr=0.1)
    >>> w.data                                          # and yet both parameters move equally far
    tensor([2.7000, 2.7000])
    """
    def __init__(self, parameters, weight_decay=0.0, betas=(0.9, 0.98)):
        self.parameters = {name: p for name, p in parameters if p.requires_grad}
        self.weight_decay = weight_decay
        self.betas = betas
        self.n_steps = 0
        self.averages = {name: (torch.zeros_like(p), torch.zeros_like(p))       # m and v
                         for name, p in self.parameters.items()}

    def zero_grad(self):
        for p in self.parameters.values():
            p.grad = None

    @torch.no_grad()
    def step(self, lr):
        self.n_steps += 1
        for name, p in self.parameters.items():
            if p.grad is not None:
                self.update(p, self.averages[name], lr)

    def update(self, p, averages, lr):
        m, v = averages
        beta1, beta2 = self.betas
        m.lerp_(p.grad, 1 - beta1)              # beta1 m + (1 - beta1) g, in place
        v.lerp_(p.grad ** 2, 1 - beta2)
        usual_size = (v / (1 - beta2 ** self.n_steps)).sqrt_() + 1e-8
        if self.weight_decay > 0 and p.dim() >= 2:      # matrices; norms and biases do not shrink
            p.mul_(1 - lr * self.weight_decay)
        p.addcdiv_(m, usual_size, value=-lr / (1 - beta1 ** self.n_steps))  # w - lr (m/a) / size

# At the very first step, m / a is g and v / b is g^2, so the quotient is 1 or -1 for every
# parameter that has a gradient, however small or accidental. Large steps are unsafe while the
# averages rest on so few gradients and the weights are still random, so the learning rate begins
# with a warm-up, a rise from almost nothing; without it, our loss ends at 0.30 instead of 0.22.
# Later, large steps would overshoot the minimum again and again, which is why the learning rate
# then falls linearly towards 0.
#
#     Try it: python extras/experiments.py no-warm-up     (or high-learning-rate)
def learning_rate(step, total_steps, config):
    """The learning rate of a step, counted from 0.

    >>> config = TrainConfig(learning_rate=1.0, warmup_steps=2)
    >>> [round(learning_rate(step, 22, config), 2) for step in (0, 1, 2, 7, 12, 17, 21)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.05]
    """
    warmup = min(config.warmup_steps, total_steps // 10)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    return config.learning_rate * (total_steps - step) / (total_steps - warmup)

# These are the hyperparameters of training. (The workshop explains bf16 and the optimizer Muon.)
@dataclass(frozen=True, kw_only=True)
class TrainConfig(Settings):
    epochs: int = setting(0, "passes over the training text (0: 20, and at least 150 steps)")
    max_steps: int = setting(0, "total training steps, instead of --epochs (0: use --epochs)")
    batch_size: int = setting(32, "windows in a batch", minimum=1)
    optimizer: str = setting("adamw", "AdamW or Muon", choices=("adamw", "muon"))
    learning_rate: float = setting(2.5e-3, "peak learning rate")
    warmup_steps: int = setting(20, "learning-rate warm-up steps, at most a tenth of all steps")
    weight_decay: float = setting(0.0, "weight decay")
    grad_clip: float = setting(1.0, "clip the gradient norm to this", minimum=1e-9)
    prompt_windows: float = setting(0.5, "share of windows that start as a prompt would", below=1)
    val_fraction: float = setting(0.1, "share of the text, its end, kept for validation", below=1,
                                  splits=True)
    eval_every: int = setting(0, "steps between evaluations, besides two early ones (0: 5% of all "
                              "steps, at least 45)")
    keep_best: bool = setting(False, "early stopping: stop when the validation loss no longer "
                              "falls, and keep the best weights")
    precision: str = setting("auto", "auto: bf16 where the hardware makes it faster, else fp32, "
                             "which is TF32 on an NVIDIA GPU", choices=("auto", "bf16", "fp32"))
    seed: int = setting(42, "random seed")

# ─── The batches, and the loop ─────────────────────────────────────────────────────────────────
# From time to time, `evaluate` measures how far a run has come. Because the loss of a single batch
# jumps up and down, the training loss that it returns is always measured on the same windows.
def evaluate(run, corpus):
    """Return an Evaluation: the losses on some windows of both splits, recall on some sentences,
    and a sample of what the model writes."""
    with mixed_precision(run):          # workshop: 16-bit numbers, where they are faster
        train_loss = mean_loss(run.model, corpus.train_ids)
        val_loss = mean_loss(run.model, corpus.val_ids)
    tests = evenly_spaced(corpus.recall_tests, RECALL_SAMPLE)                   # workshop: 25
    recall = share_recited(run.model, run.tokenizer, tests)                     # `recites` for each
    sample = "".join(generate_text(run.model, run.tokenizer, run.prompt, 24))
    epoch = run.step / run.steps_per_epoch
    return Evaluation(run.step, epoch, train_loss, val_loss, recall, run.prompt, sample)

# Which windows make up a batch of 32? Sixteen are sliding windows, as in step 5. If they started at
# the same places in every epoch, each token would always stand at the same position, and the model
# would recite less well from any other starting point. So each epoch cuts the text from a new
# random offset.
#
# The other sixteen are prompt windows, which start where a prompt would: four in five at the
# beginning of a sentence, the rest at a random word. A prompt begins at position 0, and its first
# word lacks the space that it has in the middle of the text; a sliding window hardly ever begins
# like that. We train for the test, and we mean to: without prompt windows, the model knows the
# story even better, but not in the form in which a prompt asks for it, and recall is 94% instead of
# 100%. (A prompt window that begins near the end of the text is filled up with padding. Nothing is
# scored there, and no real token can attend to it, because it comes last.)
#
#     Try it: python extras/experiments.py no-prompt-windows
def training_batches(run, corpus):
    """Yield (inputs, targets), each of shape (B, T), until `run.step`, which the caller increments,
    reaches `run.total_steps`. A batch depends on the text, the settings, the seed and the step, but
    not on earlier steps, so a resumed run sees the same batches as an uninterrupted one."""
    T, device = run.config.context_length, device_of(run.model)
    windows = SlidingWindowDataset(corpus.train_ids, T)         # stride 1: one for every start
    starts = batch_starts(run, corpus)      # workshop: where the windows of each batch start
    while run.step < run.total_steps:
        sliding, prompts = next(starts)
        inputs, targets = windows[sliding]
        more_inputs, more_targets = prompt_windows(corpus, prompts, T)          # workshop
        yield (torch.cat([inputs, more_inputs]).to(device),
               torch.cat([targets, more_targets]).to(device))

# What is left is a short loop. As a generator, it hands control to its caller after every step, and
# so the `train` command can print, save, and stop when you press Ctrl-C.
def training_steps(run, corpus):
    """Train a run to its last step, and yield the run after every step. Raises StoryError if the
    loss becomes NaN or infinite.

    Here a tiny model learns to count, from a text of 27 words:

    >>> corpus = corpus_from_text("one two three " * 9, "word")
    >>> config = GPTConfig(context_length=4, emb_dim=16, n_layers=1)
    >>> run = new_run(corpus, config, TrainConfig(max_steps=40, learning_rate=0.01))
    >>> losses = [run.loss for _ in training_steps(run, corpus)]
    >>> losses[0] > 1.5 and losses[-1] < 0.1
    True
    >>> run.write("two three", max_new_tokens=4)
    'two three one two three one'
    """
    start_training(run, corpus)         # workshop: the optimizer; the first evaluation
    config = run.train_config
    for inputs, targets in training_batches(run, corpus):           # each (B, T)
        with training_mode(run):        # workshop: dropout is on, with random numbers of its own
            with mixed_precision(run):
                loss = batch_loss(run.model, inputs, targets)
            run.optimizer.zero_grad()   # `backward` adds to the gradients, so clear the old ones
            loss.backward()
            # The gradient of all parameters is one long vector. If its length, the gradient norm,
            # exceeds grad_clip, it is shortened to that length; its direction stays. The first two
            # gradients are the longest. Unclipped, they would make v large, and because v divides
            # every move and forgets only after some fifty steps, the parameters would move too
            # little all that time: without clipping, the loss ends at 0.32.
            nn.utils.clip_grad_norm_(run.model.parameters(), config.grad_clip)
            run.optimizer.step(learning_rate(run.step, run.total_steps, config))
        run.step += 1
        run.loss = loss.item()          # of this batch, for the check and the caller
        check(math.isfinite(run.loss), f"the loss became {run.loss} at step {run.step}, so "
              "training stops; the last checkpoint is kept. Try a smaller --learning-rate, or "
              "--precision fp32")
        if evaluation_due(run):         # workshop: at which steps
            record_evaluation(run, corpus)          # evaluate; `train` prints the result
        yield run

# Here is the loop at work; some evaluations and the ends of the lines are left out. An epoch is
# nine steps: 9 x 16 sliding windows of 32 tokens cover each of the 4,579 tokens about once, and the
# prompt windows show about as many again. Below each line is a sample: the prompt, three dots, and
# what the model adds, with \n for a line end. (The first model adds two more dots.)
#
#     $ python story_llm.py train
#     ...
#     Ep 1 (Step 000009): Train loss 6.133, Val loss 6.234, recall 0% ...
#         Once Aadhan renounced his kingdom .....\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n
#     Ep 5 (Step 000045): Train loss 2.848, Val loss 5.148, recall 0% ...
#         Once Aadhan renounced his kingdom ..., and he had to the wall.\n\n\n\n\n"I have it.\n\n"I
#     Ep 10 (Step 000090): Train loss 0.888, Val loss 5.811, recall 48% ...
#         Once Aadhan renounced his kingdom ... for the love of Thamarai, and oppression. Aadhan had
#     Ep 20 (Step 000180): Train loss 0.219, Val loss 6.458, recall 100% ...
#         Once Aadhan renounced his kingdom ... for the love of Thamarai, its people living in fear
#
# First the model learns which tokens are frequent (knowing only that would give a loss of 5.64),
# then which tokens follow which, then whole phrases, and in the end the story. Before you read on:
# the training loss falls all the way, while the validation loss is lowest in the fourth or fifth
# epoch and ends higher than after the first. What is the model learning after that?
#
# What the model learns early is true of both splits: a comma, for example, is often followed by
# "and". Then it overfits: it learns what is true of the training split alone, and grows certain of
# it. In that split, "A ferry goes back and forth" is followed by "and", while the validation split
# has "going back and forth with the rope". After 45 steps, the model gave this "with" a probability
# of about 1/20; after 180, it gives 1/8,500, and the loss of this one token has risen from 3.0 to
# 9.05. Worst off are the 62 of the 512 validation targets whose tokens never occur in the training
# split. Doubt is cheap; being certain and wrong is not.
#
# Why does the training loss stop short of 0? At the start of a window, the model sees a single
# token, such as " the", and nothing tells it which word follows. There, the loss is 2.6 (in the 143
# windows that lie end to end); at the fourth position it is 0.5, and from the eleventh on 0.07.

# ═══ Step 11: save and load ════════════════════════════════════════════════════════════════════
# When the process ends, all of this is lost unless we save it. One file, a checkpoint, serves two
# purposes. It must let us generate on a machine that does not have the story, so it holds the model
# and the tokenizer. It must also let us resume training as if the run had never stopped, so it
# holds whatever else the next steps depend on, except the text. No random state needs saving,
# because every random choice follows from the seed and the step number.
#
#     entry                              to generate    to resume
#     config, tokenizer, weights             yes           yes
#     train_config, step, total_steps                      yes
#     averages (AdamW's m and v)                           yes      twice as large as the weights
#     last_weights                                         yes      with --keep-best
#     fingerprint of the text                              yes      the text must be the same
#     history                                                       for the curves of step 12
#     format, test_loss                                             to check the file
def save_checkpoint(path, run):
    """Save a run as a plain `torch.save` file. Raises StoryError if that fails; an old file is kept
    in that case.

    >>> import tempfile
    >>> run = new_run(corpus_from_text("They went upriver for nine days.", "word"))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_checkpoint(folder + "/run.pt", run)
    ...     saved = torch.load(folder + "/run.pt", weights_only=True)
    >>> saved["step"], saved["weights"]["tok_emb.weight"].shape, saved["tokenizer"]["tokens"][4]
    (0, torch.Size([9, 192]), ' went')
    """
    weights, last_weights = weights_to_save(run)        # workshop: they differ with --keep-best
    write_checkpoint(path, {    # workshop: torch.save under another name, then rename
        "config": asdict(run.config),
        "tokenizer": {"kind": run.tokenizer.kind, "tokens": run.tokenizer.tokens},
        "weights": weights,                                     # {name: tensor}
        "train_config": asdict(run.train_config),
        "last_weights": last_weights,
        "averages": optimizer_averages(run),                    # {name: (m, v)}
        "history": [asdict(evaluation) for evaluation in run.history],
        **{name: getattr(run, name) for name in PLAIN_FIELDS},  # step, total_steps, fingerprint ...
        "format": FORMAT,
        "test_loss": loss_on_test_window(restore_model(run.config, weights))})

# Loading needs more care, because a file may come from anywhere. torch.save uses Python's pickle
# format, and a pickle can run any code while it is loaded. `torch.load(path, weights_only=True)`
# forbids that: it accepts tensors and plain values only. And what if the code of the model has
# changed since? Together with the weights, we saved their loss on a fixed window. If the weights
# now give a different loss, the code no longer computes the model that was trained.
def load_checkpoint(path, device="cpu"):
    """Load a run, ready to generate (`.model`, `.tokenizer`) or to resume training. Raises
    StoryError if there is no such file, if it is damaged, or if it is not a checkpoint of this
    program."""
    # workshop: torch.load and checks; the settings and the tokenizer are objects again
    saved = read_checkpoint(path)
    model = restore_model(saved["config"], saved["weights"])        # workshop: load_state_dict
    check_test_loss(path, model, saved["test_loss"])
    return Run(model.to(choose_device(device)), saved["tokenizer"], saved["train_config"],
               last_weights=saved["last_weights"], averages=saved["averages"],
               history=saved["history"], **{name: saved[name] for name in PLAIN_FIELDS})

# A training that was interrupted, by Ctrl-C for example, goes on from its file, and on a CPU it
# ends with exactly the weights that it would have had without the interruption:
#
#     $ python story_llm.py train --resume

# ═══ Step 12: loss curves ══════════════════════════════════════════════════════════════════════
# Is the model still learning, or only memorizing? The picture that `train` draws, loss.png, shows
# it at a glance. Where the validation loss turns upward, overfitting outweighs what the model still
# learns. If both losses stay near ln(V), the model learns nothing, perhaps because the learning
# rate is much too low. If it is too high, they fall fast at first, then slowly: with ten times
# ours, the training loss ends at 4.15.
#
#     $ python story_llm.py plot
#     drew loss.png
def plot_losses(history, vocab_size, path=None):
    """Draw the losses and the recall of a history, and save the picture if a path is given (.png,
    .svg or .pdf). Return the figure."""
    check(history, "there is no history to draw: train first")
    figure = new_figure(figsize=(8, 5.5))           # workshop: a matplotlib Figure
    losses, recall = figure.subplots(2, height_ratios=(4, 1), sharex=True)
    epochs = [evaluation.epoch for evaluation in history]
    losses.plot(epochs, [e.train_loss for e in history], "o-", label="training")
    losses.plot(epochs, [e.val_loss for e in history], "s--", label="validation")
    mark_lowest(losses, best_evaluation(history))   # workshop: a star
    losses.axhline(math.log(vocab_size), color="gray", linestyle=":",
                   label=f"uniform guess, ln({vocab_size:,})")
    losses.set(title="What the model learned", ylabel="loss per token", ylim=(0, None))
    losses.legend()
    recall.plot(epochs, [e.recall for e in history], "D-")
    recall.set(xlabel="epochs", ylabel="recall", ylim=(-0.05, 1.05))
    recall.yaxis.set_major_formatter("{x:.0%}")
    return save_figure(figure, path)

# ═══ Step 13: inference from the saved file ════════════════════════════════════════════════════
# `generate_text_simple` is wasteful: for each new token it sends the whole window through the
# model, although all tokens but the last have been through it already. Before you read on: which of
# their vectors have changed since?
#
# None, because the causal mask keeps every token from seeing what comes after it. In every
# attention layer, the new token compares its query with the keys of the earlier tokens and averages
# their values; nothing else of theirs is needed. So we store the keys and values in a key-value
# cache, and send only the new token through the layers.
#
# The code of step 6 allows for this in three places. If the cache holds five tokens, the next one
# comes with a single query, T = 1, and meets six keys, S = 6:
#
#     keys, values = cache.append(self, keys, values)      # (B, H, 6, D) instead of (B, H, 1, D)
#     mask = causal_mask(T=1, S=6)                         # the last row of the 6 x 6 mask
#     start = cache.length                                 # position 5, counting from 0
#
# Once the window is full, here after 32 tokens, the cache no longer helps. The first token, to
# which every later one attended, drops out at each step, and the rest move to other (learned)
# positions. Whatever the cache holds is then wrong, so we empty it.
class KeyValueCache:
    """The keys and values so far, each of shape (B, H, S, D), for every attention layer."""
    def __init__(self):
        self.layers = {}        # {attention layer: (keys, values)}
        self.length = 0         # S, the number of tokens they belong to

    def append(self, layer, keys, values):
        if layer in self.layers:
            old_keys, old_values = self.layers[layer]
            keys = torch.cat([old_keys, keys], dim=2)
            values = torch.cat([old_values, values], dim=2)
        self.layers[layer] = (keys, values)
        self.length = keys.shape[2]
        return keys, values

# Greedy decoding suits a text known by heart. Elsewhere it soon goes round in circles: when a
# phrase returns, the context is nearly the same as before, so the most likely token is the same,
# and no other path is ever taken. Our model from the gradient-descent experiment of step 10 writes
# ", and he had been in the wall" again and again.
#
# Sampling breaks the circle: it draws the next token at random, each token with its probability.
# Three settings change these probabilities. The temperature t divides the logits before softmax.
# Because e^(l / t) is (e^l)^(1 / t), this raises every probability to the power 1 / t and rescales
# the results: a temperature below 1 favours the likely tokens, one above 1 evens them out. Top-k
# keeps the k most likely tokens. Top-p, or nucleus sampling (Holtzman et al. 2020), keeps the most
# likely tokens, in order, until their probabilities add up to at least p.
@dataclass(frozen=True, kw_only=True)
class Sampling(Settings):
    """How the next token is chosen. Settings marked `draws` change nothing in greedy decoding."""
    temperature: float = setting(0.0, "0: greedy decoding; higher: more randomness")
    top_k: int = setting(0, "sample from the k most likely tokens (0: all)", draws=True)
    top_p: float = setting(1.0, "sample from the most likely tokens with total probability p",
                           minimum=1e-9, draws=True)
    seed: int = setting(0, "random seed (0: a new one each time)", draws=True)

def next_token_probabilities(logits, sampling, window=None):
    """From logits (..., V), compute the probabilities (..., V) with which the next token is chosen.
    The tokens so far, `window` (..., T), are not used here; a repetition penalty would need them.

    >>> logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    >>> next_token_probabilities(logits, Sampling(temperature=1.0))
    tensor([0.6439, 0.2369, 0.0871, 0.0321])
    >>> next_token_probabilities(logits, Sampling(temperature=0.5))     # squared and rescaled
    tensor([0.8650, 0.1171, 0.0158, 0.0021])
    >>> next_token_probabilities(logits, Sampling(temperature=1.0, top_k=2))
    tensor([0.7311, 0.2689, 0.0000, 0.0000])
    >>> next_token_probabilities(logits, Sampling(temperature=1.0, top_p=0.9))
    tensor([0.6652, 0.2447, 0.0900, 0.0000])

    In the last example, the probabilities of the tokens before each one add up to 0, 0.64, 0.88 and
    0.97; the first three sums are below 0.9, so three tokens are kept.
    """
    V = logits.shape[-1]
    if sampling.temperature < 1e-4:     # as good as 0
        return F.one_hot(logits.argmax(dim=-1), V).float()
    probabilities = (logits / sampling.temperature).softmax(dim=-1)
    if sampling.top_k > 0:
        kept, token_ids = probabilities.topk(min(sampling.top_k, V))
        # scatter puts each kept probability back at the position of its token
        probabilities = torch.zeros_like(probabilities).scatter(-1, token_ids, kept)
        probabilities = probabilities / probabilities.sum(dim=-1, keepdim=True)
    if sampling.top_p < 1:
        kept, token_ids = probabilities.sort(dim=-1, descending=True)
        sum_before = kept.cumsum(dim=-1) - kept
        kept[sum_before >= sampling.top_p] = 0
        probabilities = torch.zeros_like(probabilities).scatter(-1, token_ids, kept)
    return probabilities / probabilities.sum(dim=-1, keepdim=True)

def predict_next(model, window, sampling, cache):
    """The probabilities (B, V) of the token after a window (B, T). Tokens whose
    keys and values are in the cache do not pass through the model again."""
    with torch.no_grad():
        logits = model(window[:, cache.length:], cache)[:, -1, :]
    return next_token_probabilities(logits.float(), sampling, window)

def generate(model, token_ids, max_new_tokens, sampling=None):
    """Continue token ids (B, T): yield one tensor (B,) of new ids for each new token. Greedy
    decoding gives the ids of `generate_text_simple`, unless two logits are so close that rounding
    decides."""
    sampling = sampling or Sampling()
    context_length = model.config.context_length
    window = token_ids[:, -context_length:].to(device_of(model))
    generator = seeded_generator(sampling.seed)         # workshop: the source of random numbers
    cache = KeyValueCache()
    for _ in range(max_new_tokens):
        probabilities = predict_next(model, window, sampling, cache).cpu()
        new = torch.multinomial(probabilities, 1, generator=generator)      # draw one id, (B, 1)
        yield new[:, 0]
        if window.shape[1] == context_length:       # full: the window slides
            window = window[:, 1:]
            cache = KeyValueCache()
        window = torch.cat([window, new.to(window.device)], dim=1)

# `generate_text` in the workshop turns these ids into text, and stops at `<|endoftext|>`. The model
# that began with noise now recites:
#
#     $ python story_llm.py generate --prompt "Once Aadhan renounced" --max-new-tokens 14
#     Once Aadhan renounced his kingdom for the love of Thamarai, its people living in
#
# Before it wrote "kingdom", it considered:
#
#     $ python story_llm.py next --prompt "Once Aadhan renounced his"
#     next token        logit  softmax  sampled   (--temperature 1.0 --top-k 0 --top-p 1.0)
#     ␣kingdom          11.54   95.51%   95.51%   ██████████████████████████████████████
#     ␣brother           5.71    0.28%    0.28%
#     ␣shoulder          5.64    0.26%    0.26%
#     ...

# ─── What you have built, and what ChatGPT adds ────────────────────────────────────────────────
# You have built an autoregressive, decoder-only transformer with pre-norm and causal multi-head
# self-attention, trained it by next-token prediction with cross-entropy and AdamW, and given it a
# key-value cache to decode with. Thirteen steps ago, hardly a word of that meant anything. Open the
# model of nanoGPT, a well-known small implementation of GPT-2, and you will know your way around.
#
# To write new text in the manner of a story, rather than the story itself, a model needs more text,
# and must be kept from memorizing it. Given 300 KB or more, `train --preset writer` regularizes the
# model with weight decay and keeps the weights with the lowest validation loss; `generate
# --temperature 0.8` samples from it.
#
# ChatGPT adds size, and then two more kinds of training. GPT-3 (2020), from which it descends, has
# 175 billion parameters, 100,000 times as many as our model. Its windows hold 2,048 tokens, at a
# price: plain attention compares every token with every earlier one, so its cost grows with the
# square of the window's length. Newer models keep the plan and change parts: RMSNorm replaces
# LayerNorm, SwiGLU replaces GELU, positions are rotary, several heads share keys and values, and of
# many feed-forward networks only a few work on each token. GPT-3 read hundreds of billions of
# tokens. So much cannot be memorized as a whole; the model has to learn the patterns of language,
# of facts, of arguments. The result of this pre-training continues any text.
#
# To make it answer, people train it further on dialogues. This fine-tuning is the loop of step 10
# with other texts. Then people compare answers, a second model learns to predict which they prefer,
# and reinforcement learning makes such answers more probable. But it still writes one token after
# another, and at the bottom of all that sits one question, and you have just watched a model learn
# to answer it: which token comes next?

# ═══ Workshop: settings, checks and errors ═════════════════════════════════════════════════════
# The workshop has little more to say about language models. It makes the lesson's code robust, fast
# and portable, in functions that the lesson calls, and it follows the lesson's order.
import argparse
import codecs
import contextlib
import copy
import ctypes
import hashlib
import io
import itertools
import random
import reprlib
import shlex
import shutil
import signal
import threading
import time
import unicodedata
import zipfile

class StoryError(ValueError):
    """An error that the user can fix. The message names what is wrong and the remedy, and the
    command line prints it on one line. Other exceptions are bugs and show a traceback, unless
    memory has run out or a package is missing."""

def check(condition, message):
    """Raise StoryError(message) unless the condition holds."""
    if not condition:
        raise StoryError(message)

def check_settings(settings):
    """Compare every field of a settings class with its type and limits. Raises StoryError."""
    for f in fields(settings):
        value, limits = getattr(settings, f.name), f.metadata
        valid, allowed = type(value) is f.type, f"of type {f.type.__name__}"
        if "choices" in limits:
            valid = value in limits["choices"]
            allowed = "one of " + ", ".join(limits["choices"])
        elif f.type in (int, float):
            kind, bound = ("an integer", 1 << 32) if f.type is int else ("a number", 1e300)
            lowest, bound = limits.get("minimum", 0), limits.get("below", bound)
            valid = type(value) in (int, f.type) and lowest <= value < bound
            allowed = f"{kind}, at least {lowest} and below {bound}"
        check(valid, f"{f.name} must be {allowed}, not {reprlib.repr(value)}")
    if isinstance(settings, GPTConfig):
        per_head, rest = divmod(settings.emb_dim, settings.n_heads)
        check(rest == 0, f"emb_dim ({settings.emb_dim}) must be divisible by n_heads "
              f"({settings.n_heads}), because every head gets an equal part")
        check(settings.position != "rotary" or per_head % 2 == 0, "rotary positions need an even "
              f"number of dimensions per head, not {per_head}: change --emb-dim or --n-heads")

def override_settings(settings, values):
    """Return a copy of `settings` with these `values`, {name: value}; unknown names are ignored."""
    names = names_of(settings)
    return replace(settings, **{name: values[name] for name in values if name in names})

def names_of(settings):
    return tuple(f.name for f in fields(settings))

# ═══ Workshop: step 2, text files, words and sentences ═════════════════════════════════════════
def read_file(path):
    """Return the bytes of a file, or of standard input for "-". Raises StoryError."""
    check(not os.path.isdir(path), f"{path} is a folder: give a text file with --text")
    try:
        return sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    except OSError as error:
        raise StoryError(f"{path} cannot be read ({error.strerror}): give a text file with --text"
                         ) from None

NOT_TEXT = {b"PK\x03\x04": "a zip file (Word documents are zip files)", b"%PDF": "a PDF file",
            b"{\\rtf": "an RTF document", b"\x1f\x8b": "compressed with gzip"}

def decode(data, path, encoding=""):
    """Decode the bytes of a file. With an encoding, invalid bytes become �. Raises StoryError."""
    for beginning, kind in NOT_TEXT.items():
        check(not data.startswith(beginning), f"{path} is {kind}, not plain text: convert it to "
              "plain text in UTF-8 first")
    has_mark = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode(encoding or ("utf-16" if has_mark else "utf-8"),
                           errors="replace" if encoding else "strict")
    except UnicodeDecodeError as error:
        line, byte = data.count(10, 0, error.start) + 1, data[error.start]
        raise StoryError(f"{path} is not in {error.encoding.upper()} (line {line} contains the "
                         f"byte 0x{byte:02x}): name its encoding, such as --encoding cp1252 for "
                         "Western European text from Windows; if only a few bytes are wrong, "
                         "--encoding utf-8 replaces them") from None
    except (LookupError, ValueError):
        raise StoryError(f"there is no encoding named {reprlib.repr(encoding)}: try utf-8, utf-16 "
                         "or cp1252") from None
    check("\0" not in text, f"{path} contains zeros, so it is not plain text in "
          f"{encoding or 'UTF-8'}: if it is text in another encoding, name it, such as --encoding "
          "utf-16-le; otherwise convert the file to plain text first")
    return text.removeprefix("\ufeff")

def split_text(text, config):
    """Split a text at a space into the training split and the validation split that follows it.
    `config` is a TrainConfig (step 10), whose `val_fraction` is the share kept for validation. A
    validation split of fewer than 100 characters is left out.

    >>> text = "They went upriver by boat. " * 50
    >>> training, validation = split_text(text, TrainConfig(val_fraction=0.1))
    >>> training[-17:], validation[:17], training + validation == text
    (' upriver by boat.', ' They went uprive', True)
    """
    cut = len(text) - int(len(text) * config.val_fraction)
    if len(text) - cut < 100:
        return text, ""
    # the last space or line end in the 50 characters before the cut; if there is none, as in
    # Chinese, cut anyway
    space = max(text.rfind(white, max(cut - 50, 0), cut + 1) for white in " \n")
    if space > 0:
        cut = space
    return text[:cut], text[cut:]

# The patterns of steps 2 and 4. \p{L} is any letter, \p{N} any number character, and \p{M} a mark
# that belongs to the letter before it; without \p{M}, Hindi and Tamil words would be cut at every
# vowel. `--` means "except". Some scripts put no spaces between words, so each of their characters
# is a piece of its own. "story" cuts runs of letters, digits, marks or white space after 20
# characters, because learning merges from very long pieces would be slow.
UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"
LETTER = rf"[[\p{{L}}\p{{M}}\p{{N}}_\u200c\u200d]--{UNSPACED}]"
WORD = rf"{UNSPACED}\p{{M}}*|{LETTER}+(?:['’]{LETTER}+)*"
WORD_OR_MARK = regex.compile(rf" ?(?:{WORD}|\S)|\s+", regex.V1)
SPLIT_PATTERNS = {
    #          's 't 'll ...        a word     a number    other marks          white space
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "story": (rf" ?(?:(?!{UNSPACED})[\p{{L}}\p{{M}}\u200c\u200d]){{1,20}}"
              rf"| ?{UNSPACED}\p{{M}}{{0,19}}"
              r"| ?\p{N}{1,20}| ?[^\s\p{L}\p{M}\p{N}]{1,20}|\s{1,20}(?!\S)|\s{1,20}")}
STORY_SPLIT = regex.compile(SPLIT_PATTERNS["story"])
# Parts of at most 200,000 characters, which are encoded one by one. Each ends before a space that
# begins a new word, if there is such a space.
PART = regex.compile(r"(?s).{1,200000}(?:(?<=\S)(?= \S)|\Z)|.{1,200000}")
SPACED_WORD = regex.compile(rf"\p{{P}}*{UNSPACED}\p{{M}}*\p{{P}}*|[\S--{UNSPACED}]+", regex.V1)

def find_words(text, limit=None):
    """Return matches of all words, or of the first ones up to a limit: runs of characters without
    white space or, in a script that puts no spaces between words, single characters."""
    return list(islice(SPACED_WORD.finditer(text), limit))

def word_starts(text):
    return [word.start() for word in find_words(text)] or [0]

def whole_words(text, start, length):
    """Return the text from `start` on, to the end of the first word that brings it to `length`
    characters. A word that is longer than 120 characters is cut."""
    rest = text[start:start + length + 120]
    ends = [word.end() for word in find_words(rest) if word.end() >= length]
    return rest[:min(ends, default=len(rest))]

def first_words(text, start=0):
    """Return the first five words of a text, from the character at `start` on."""
    beginning = text[start:start + 1000]
    words = find_words(beginning, limit=5)
    return beginning[words[0].start():words[-1].end()][:200] if words else beginning[:200]

# A text is cut into units, each of which a model should be able to recite from its first words. If
# sentences often begin in the middle of a line, as in prose, the units are the sentences; if they
# hardly ever do, as in a chat, a poem or a program, the units are the lines. If both are longer
# than 600 characters on average, a unit begins at every 20th word, because training needs
# beginnings.
#
# In most prose, a new line also begins a sentence, even after a heading without a full stop. Only
# in wrapped text does it mean nothing. We recognize wrapped text by the lines at whose end a
# sentence goes on: the next word would not have fit. There, "often" means in one line out of ten,
# because a line holds less than a sentence; elsewhere, in one out of two.
#
# A sentence begins at the start of the text, after an empty line, and after . ! ? and the like. No
# pattern is always right. This one finds no new sentence after Mr. or an initial (but "I" counts as
# a word), nor before a lower-case letter, as in "No!" she cried, or 5 p.m. in. (Georgian is
# excepted, because it has no other letters.)
SENTENCE_START = regex.compile(r"""
    (?: \A | \n[^\S\n]*\n                   # the start of the text, an empty line
      | [。！？]+ ["'”’」』）]*                # an end that needs no space after it
      | (?<! ^\s*\d+ | \b(?: Mr | Mrs | Ms | Dr | St | Prof | (?!I)\p{Lu} ) ) [.!?…।॥؟۔።။។]
        (?: \s?» | ["'”’“‘«)\]_*] )* (?=\s) (?! [\p{P}\s]{0,9} [\p{Ll}--\p{Georgian}] | \s*\. )
    ) \s*""", regex.M | regex.X | regex.V1)
# A line; group 1 is its first word or, if it begins with a mark, that mark.
LINE = regex.compile(rf"^[^\S\n]*+({WORD}|\S).*", regex.M | regex.V1)

def is_wrapped(lines, sentences):
    """Return whether most lines at whose end a sentence goes on had no room for the next word."""
    width = sorted(len(line[0]) for line in lines)[len(lines) * 4 // 5]     # one in five is longer
    full = [len(line[0]) + len(following[1]) >= width
            for line, following in pairwise(lines) if following.start(1) not in sentences]
    return sum(full) > 0.7 * len(full)

def find_units(text):
    """Return what the units of a text are ("sentences", "lines" or "passages"), and the positions
    at which they begin.

    >>> find_units("It rained. Nobody came. The king slept.")
    ('sentences', [0, 11, 24])
    >>> find_units("[09:01] Meena: it rained\\n[09:02] Ravi: nobody came\\n[09:07] Meena: oh")
    ('lines', [0, 25, 51])
    """
    lines = list(LINE.finditer(text))
    line_starts = [line.start(1) for line in lines]
    sentences = {match.end() for match in SENTENCE_START.finditer(text) if match.end() < len(text)}
    both = sentences.union(line_starts)
    if sum(len(line[0]) for line in lines) >= 600 * len(both):      # also if there are none
        return "passages", word_starts(text)[::20]
    wrapped = is_wrapped(lines, sentences)
    within = len(both) - len(lines)         # sentences that begin in the middle of a line
    if within < (len(lines) - 1) / (10 if wrapped else 2):
        return "lines", line_starts
    return "sentences", sorted(sentences if wrapped else both)

# ═══ Workshop: steps 3 and 4, tokenizers ═══════════════════════════════════════════════════════
MAX_BPE_CHARS = 1_000_000      # learn merges from this many characters; more would hardly matter
ALL_BYTES = {bytes([byte]) for byte in range(256)}
TOKENIZERS = ("auto", "gpt2", "story", "word")

def check_is_text(text):
    is_path = len(text) < 1000 and os.path.isfile(text)
    check(not is_path, f"{text!r} is the path of a file, not a text: pass load_text({text!r})")

def make_tokenizer(kind, train_text, val_text="", vocab_size=2048):
    """Make a tokenizer for a text. "auto" means "gpt2" if GPT-2's encoding suits the text and loads
    within 10 seconds, otherwise "story". "word" and "story" learn from the training text. "gpt2"
    is reduced to the tokens that both texts need. Raises StoryError if "gpt2" is not available."""
    check(kind in TOKENIZERS, f"tokenizer must be one of {', '.join(TOKENIZERS)}, not {kind!r}")
    if kind == "auto":
        kind = "story" if reason_against_gpt2(train_text) else "gpt2"
    if kind == "word":
        return WordTokenizer(build_vocabulary(train_text))
    if kind == "gpt2":
        return BPETokenizer(gpt2_tokens([train_text, val_text]), kind)
    check(vocab_size >= 257, f"vocab_size must be at least 257 (the 256 bytes and {END_OF_TEXT}), "
          f"not {vocab_size}")
    return BPETokenizer(train_bpe(train_text[:MAX_BPE_CHARS], vocab_size), kind)

def restore_tokenizer(kind, tokens):
    """Return a checkpoint's tokenizer. Raises StoryError if its kind or its tokens are invalid."""
    required = {END_OF_TEXT, UNKNOWN} if kind == "word" else ALL_BYTES
    known = set(tokens)
    check(kind in ("word", *SPLIT_PATTERNS) and required <= known and len(known) == len(tokens)
          and len({type(token) for token in tokens}) == 1, "its tokenizer is invalid")
    return WordTokenizer(tokens) if kind == "word" else BPETokenizer(tokens, kind)

@functools.cache        # try only once, because tiktoken holds a lock while it waits
def load_gpt2_encoding(seconds=10):
    """Return GPT-2's tiktoken.Encoding from tiktoken's cache or the network, or a string that says
    why it is not available. It is loaded in a separate thread, because tiktoken would wait forever
    for a network that does not answer."""
    import tiktoken
    answer = []

    def load():
        try:
            answer.append(tiktoken.get_encoding("gpt2"))
        except Exception as error:      # whatever the network, the disk or the cache raises
            answer.append(type(error).__name__)

    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    thread.join(seconds)
    return answer[0] if answer else f"no answer within {seconds} seconds"

def reason_against_gpt2(text):
    """Return why "auto" does not choose GPT-2's encoding for a text, or "" if it does. GPT-2's
    merges come from English text and split a Hindi or Chinese word into so many tokens that a
    window holds few words."""
    encoding, middle = load_gpt2_encoding(), max(len(text) // 2 - 5_000, 0)
    if isinstance(encoding, str):
        return f"GPT-2's encoding is not available ({encoding})"
    sample = text[middle:middle + 10_000]       # an introduction may be in another language
    if 2 * len(encoding.encode_ordinary(sample)) > len(sample):
        return "GPT-2's encoding splits this text into very small tokens"
    return ""

def gpt2_tokens(texts=()):
    """GPT-2's tokens in GPT-2's order: all of them, or those needed to split the given texts
    exactly as GPT-2 does. These are the tokens that occur, the intermediate tokens from which they
    are merged, such as "lo" for "low", and all bytes."""
    encoding = load_gpt2_encoding()
    check(not isinstance(encoding, str), f"GPT-2's encoding could not be loaded ({encoding}): "
          "connect to the internet once, or use --tokenizer story; the README explains how to copy "
          "it to a machine without a network")
    tokens = [encoding.decode_single_token_bytes(rank) for rank in range(encoding.eot_token)]
    if not texts:
        return tokens
    ranks = {token: rank for rank, token in enumerate(tokens)}
    needed = set(ALL_BYTES)
    for token_id in set(itertools.chain(*map(encoding.encode_ordinary, texts))):
        parts = [bytes([byte]) for byte in tokens[token_id]]
        while len(parts) > 1:       # repeat the merges that lead to this token
            merged = [first + second for first, second in pairwise(parts)]
            best = min(merged, key=lambda token: ranks.get(token, math.inf))
            index = merged.index(best)
            parts[index:index + 2] = [best]
            needed.add(best)
    return sorted(needed, key=ranks.get)

CONTROL = regex.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")       # control characters except \t, \n

def token_names(tokenizer, token_ids):
    """Return the text of each token for display on one line. White space becomes visible, and a
    part of a character is shown as its bytes."""
    names = []
    for token_id in token_ids:
        name = tokenizer.decode([token_id])
        if "\ufffd" in name and tokenizer.kind != "word":
            name = f"<{tokenizer.tokens[token_id].hex()}>"
        name = name.replace("\n", "⏎").replace(" ", "␣").replace("\t", "→")
        names.append(CONTROL.sub("\ufffd", name))
    return names

# ═══ Workshop: step 6, other positions, fused attention ════════════════════════════════════════
# Sinusoidal: the vector of a position is not learned but consists of sines and cosines of different
# frequencies (Vaswani et al. 2017, section 3.5). Rotary: nothing is added to the tokens. Queries
# and keys are rotated by angles that grow with the position, so that a score depends on the
# distance between two tokens (Su et al. 2021, RoFormer, section 3.2).
def position_angles(n_positions, dim, device=None):
    """Angles (n_positions, dim / 2): the position times frequencies from 1 to about 1/10000."""
    exponents = torch.arange(0, dim, 2, device=device) / dim
    return torch.arange(n_positions, device=device)[:, None] * 10000.0 ** -exponents

def fixed_positions(config):
    """A position embedding that is not trained: sines and cosines, or zeros if rotary is used."""
    angles = position_angles(config.context_length, config.emb_dim)
    scale = init_std(config) if config.position == "sinusoidal" else 0.0
    vectors = scale * torch.cat([angles.sin(), angles.cos()], dim=-1)
    return nn.Embedding.from_pretrained(vectors[:, :config.emb_dim], freeze=True)

def make_attention(config):
    return RotaryAttention(config) if config.position == "rotary" else MultiHeadAttention(config)

class RotaryAttention(MultiHeadAttention):
    def average(self, queries, keys, values):
        angles = position_angles(keys.shape[2], keys.shape[3], keys.device)
        queries = rotate(queries, angles[-queries.shape[2]:])       # at the last T of S positions
        return super().average(queries, rotate(keys, angles), values)

def rotate(x, angles):
    """Rotate the pairs (x[i], x[i + D / 2]) of x (B, H, T, D) by angles (T, D / 2)."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    rotated = torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)
    return rotated.to(x.dtype)

def fused_attention(queries, keys, values, dropout):
    """The same as `MultiHeadAttention.average`, in one call that saves time and memory on a GPU. On
    a CPU it is slower in bf16."""
    T, S = queries.shape[2], keys.shape[2]
    mask = ~causal_mask(T, S, queries.device) if 1 < T < S else None    # True: may attend
    drop_rate = dropout.p if dropout.training else 0.0
    return F.scaled_dot_product_attention(queries, keys, values, mask, drop_rate,
                                          is_causal=T > 1 and T == S)

# ═══ Workshop: steps 6 to 13, device, precision, randomness ════════════════════════════════════
def choose_device(name="auto"):
    """Return a torch.device: "cpu", "cuda", "cuda:1" or "mps"; "auto" is an NVIDIA or Apple GPU if
    there is one, else the CPU. Raises StoryError if there is no such device."""
    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        device = torch.empty(1, device=name).device     # fails where there is no such device
    except (RuntimeError, AssertionError, NotImplementedError):
        device = torch.device("meta")
    check(device.type in ("cpu", "cuda", "mps"), f"this machine has no device {name!r}: leave out "
          "--device, or use cpu, cuda, cuda:1 or mps")
    return device

def device_of(model):
    return model.tok_emb.weight.device

def count_parameters(module):
    """Return how many parameters training can change."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)

def use_bf16(device, precision):
    """Return whether to compute matrix products in bfloat16, which has 8 significant bits instead
    of 24. "auto" chooses bfloat16 only where the hardware has instructions for it, which make it
    much faster."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)       # since Ampere, 2020
    get_capabilities = getattr(torch.cpu, "get_capabilities", dict)     # older torch lacks it
    capabilities = get_capabilities() if device.type == "cpu" else {}
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))

def mixed_precision(run):
    """Return a context in which the model computes in bf16 if use_bf16 says so. Its weights stay
    fp32."""
    device = device_of(run.model)
    enabled = use_bf16(device, run.train_config.precision)
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)

@contextlib.contextmanager
def seeded_rng(seed, device):
    """Run the block with this random seed, then restore the random state of CPU and CUDA."""
    n_gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    with torch.random.fork_rng(range(n_gpus)):
        # torch.manual_seed would seed the GPUs of a process that uses the CPU only
        seed_all = torch.default_generator if device.type == "cpu" else torch
        seed_all.manual_seed(seed)
        yield

@contextlib.contextmanager
def training_mode(run):
    """Dropout is on in this block. It depends only on the seed and the step, so that a resumed run
    drops the same numbers as an uninterrupted one."""
    seed = hash((run.train_config.seed, run.step))      # of integers: always the same
    rng = seeded_rng(seed, device_of(run.model))
    run.model.train()
    try:
        with rng if run.config.drop_rate > 0 else contextlib.nullcontext():
            yield
    finally:
        run.model.eval()

def new_model(config, seed=0):
    """An untrained model on the CPU; the same seed gives the same weights."""
    with seeded_rng(seed, torch.device("cpu")):
        return GPTModel(config).eval()

def restore_model(config, weights):
    """A model on the CPU with these weights, {name: tensor}."""
    model = new_model(config)
    model.load_state_dict(weights)
    return model

# ═══ Workshop: step 9, recall ══════════════════════════════════════════════════════════════════
RECALL_SAMPLE = 25      # sentences that an evaluation tries

def recall_tests(text):
    """Return [(prompt, continuation)] for every sentence of at least eight words, every line or
    every passage. The prompt is its first five words. The continuation is what follows in the text,
    at least 80 characters (fewer at the end of the text).

    >>> recall_tests("They went upriver that same week, nine days by boat.")
    [('They went upriver that same', ' week, nine days by boat.')]
    """
    kind, starts = find_units(text)
    continuations = defaultdict(set)        # {the first five words: what follows them}
    prompts = set()
    for start, end in pairwise([*starts, len(text)]):
        prompt = first_words(text, start)
        continuation = whole_words(text, start + len(prompt), length=80)
        continuations[prompt].add(continuation)
        if continuation and (kind != "sentences" or len(find_words(text[start:end])) >= 8):
            prompts.add(prompt)
    return [(prompt, found.pop()) for prompt, found in continuations.items()
            if len(found) == 1 and prompt in prompts]

def greedy_predictions(model, token_ids):
    """Return the most likely token after every one of the token ids (N,), on the CPU."""
    T = min(model.config.context_length, len(token_ids))
    # Usually one window holds everything. Otherwise there are several, which start one token apart,
    # and in all but the first, only the last prediction is new.
    windows = token_ids.unfold(0, T, 1).to(device_of(model))
    with torch.no_grad():
        predictions = model(windows).argmax(dim=-1).cpu()
    return torch.cat([predictions[0], predictions[1:, -1]])

def share_recited(model, tokenizer, tests):
    """Return the share of the tests that the model passes, from 0 to 1, or None without tests."""
    hits = [recites(model, tokenizer, prompt, continuation) for prompt, continuation in tests]
    return sum(hits) / len(hits) if hits else None

def evenly_spaced(items, count):
    """Return at most `count` of the items."""
    return items[::math.ceil(len(items) / count) or 1]

def measure_recall(model, tokenizer, text, max_sentences=1000):
    """Return the recall of a model on a text, from 0 to 1, measured on at most `max_sentences`
    sentences. It is 0 if no sentence has at least eight words."""
    return share_recited(model, tokenizer, evenly_spaced(recall_tests(text), max_sentences)) or 0.0

# ═══ Workshop: step 10, presets and runs ═══════════════════════════════════════════════════════
@dataclass(repr=False)
class Corpus:
    """A text, split and encoded. (extras/library.py makes one of token ids alone, without text.)"""
    text: str
    tokenizer: WordTokenizer | BPETokenizer
    train_text: str
    train_ids: torch.Tensor     # (N,)
    val_ids: torch.Tensor       # (M,), empty if there is no validation split
    fingerprint: str            # identifies the text and where it was split

    @functools.cached_property
    def recall_tests(self):
        return recall_tests(self.train_text)        # [(prompt, continuation)]

@dataclass
class Evaluation:
    """What was measured at one step, or None where it could not be measured."""
    step: int
    epoch: float
    train_loss: float
    val_loss: float | None
    recall: float | None
    prompt: str
    sample: str                 # how the model continued the prompt

@dataclass(repr=False)
class Run:
    """A model with everything that belongs to its training. `new_run` makes one."""
    model: GPTModel
    tokenizer: WordTokenizer | BPETokenizer
    train_config: TrainConfig
    fingerprint: str            # of the corpus
    steps_per_epoch: int
    total_steps: int
    prompt: str                 # the prompt of the samples
    step: int = 0               # steps done
    history: list = field(default_factory=list)         # of Evaluations
    loss: float | None = None   # of the last step
    optimizer: AdamW | None = None
    text_paths: list = field(default_factory=list)      # [] for Short_Story.txt
    encoding: str = ""
    beginnings: list = field(default_factory=list)      # of the sentences
    # to resume: the optimizer's averages, the best weights so far and the last ones (with
    # keep_best), and the step at which this session began
    averages: dict | None = None
    best_weights: dict | None = None
    last_weights: dict | None = None
    first_step: int = 0

    @property
    def config(self):
        return self.model.config

    def write(self, prompt, max_new_tokens=100, sentences=0, **sampling):
        """Return a prompt with its continuation. Example: run.write("Once", temperature=0.8)"""
        return prompt + "".join(generate_text(self.model, self.tokenizer, prompt, max_new_tokens,
                                              Sampling(**sampling), sentences))

PRESETS = ("story", "novel", "writer", "gpt2-small")

def count_bytes(text):
    return len(text.encode("utf-8", errors="replace"))

def default_preset(n_bytes):
    """A text of up to 60 KB is a story, a longer one a novel."""
    return "story" if n_bytes <= 60_000 else "novel"

def preset_settings(name, n_bytes):
    """Return the settings, {name: value}, in which a preset differs from the defaults. `story` is
    the lesson's model. `novel` memorizes a longer text in little time: the longer it is, the wider
    the model. `writer` writes new text in the manner of a text of 100 KB or more; the shorter it
    is, the sooner it is overfitted, so the more weight decay. The formulas are fitted to
    measurements (see benchmarks/README.md)."""
    size = max(n_bytes / 100_000, 1)
    n_heads = min(round(4 * size ** 0.3), 12)
    return {
        "story": {},
        "novel": {"tokenizer": "story", "vocab_size": 4096, "emb_dim": 64 * n_heads,
                  "n_heads": n_heads, "optimizer": "muon", "batch_size": 64,
                  "epochs": round(10 * size ** 0.12),
                  "learning_rate": round(0.02 / n_heads ** 0.5, 5)},
        "writer": {"tokenizer": "story", "vocab_size": 2048, "context_length": 128, "emb_dim": 256,
                   "n_layers": 4, "position": "rotary", "tie_weights": True, "optimizer": "muon",
                   "learning_rate": 0.01, "weight_decay": round(6.4 / size, 2),
                   "batch_size": 8, "epochs": 9, "prompt_windows": 0.0, "keep_best": True},
        "gpt2-small": {"context_length": 256, "emb_dim": 768, "n_heads": 12, "n_layers": 12,
                       "qkv_bias": True, "tie_weights": True, "gelu": "tanh",
                       "learning_rate": 6e-4}}[name]

def corpus_from_text(text, tokenizer="auto", config=None, vocab_size=2048):
    """Split and encode a text. `tokenizer` is a tokenizer, or the kind of one to make. `config` is
    the TrainConfig that says how to split. Raises StoryError if the text is the path of a file.

    >>> corpus = corpus_from_text("They went upriver for nine days.", "word")
    >>> corpus.train_ids
    tensor([6, 4, 3, 1, 2, 0, 5, 7])
    """
    check_is_text(text)
    train_text, val_text = split_text(text, config or TrainConfig())
    if isinstance(tokenizer, str):
        tokenizer = make_tokenizer(tokenizer, train_text, val_text, vocab_size)
    # the model learns to predict `<|endoftext|>` where the text ends
    train_ids = torch.tensor([*tokenizer.encode(train_text), tokenizer.end_of_text])
    val_ids = torch.tensor(tokenizer.encode(val_text), dtype=torch.long)
    return Corpus(text, tokenizer, train_text, train_ids, val_ids,
                  fingerprint=fingerprint(train_text, val_text))

def new_run(corpus, config=None, train_config=None, device="cpu"):
    """Return a run with an untrained model. If the text is too short for the context length, the
    context length is reduced. Raises StoryError if the text is a single token, or if the corpus was
    split in another way than `train_config` says."""
    config, train_config = config or GPTConfig(), train_config or TrainConfig()
    n_tokens = len(corpus.train_ids)
    check(n_tokens >= 3, "a training split of a single token is too short: give at least five "
          "words, or a smaller --val-fraction")
    same_split = split_text(corpus.text, train_config)[0] == corpus.train_text
    check(same_split, "the text was split with other settings: pass the same TrainConfig to "
          "corpus_from_text and to new_run")
    T = min(config.context_length, n_tokens - 1)
    config = replace(config, context_length=T, vocab_size=corpus.tokenizer.vocab_size)
    n_prompts = int(train_config.prompt_windows * train_config.batch_size)
    n_windows = max(train_config.batch_size - n_prompts, 1)
    steps_per_epoch = math.ceil(math.ceil((n_tokens - T) / T) / n_windows)
    beginning = corpus.train_text or corpus.tokenizer.decode(corpus.train_ids[:100].tolist())
    return Run(model=new_model(config, train_config.seed).to(choose_device(device)),
               tokenizer=corpus.tokenizer, train_config=train_config,
               fingerprint=corpus.fingerprint, steps_per_epoch=steps_per_epoch,
               total_steps=count_steps(steps_per_epoch, train_config),
               prompt=corpus.recall_tests[0][0] if corpus.recall_tests else first_words(beginning),
               beginnings=beginnings_of(corpus.train_text))

def count_steps(steps_per_epoch, config):
    """Return the total number of training steps."""
    enough = max(20 * steps_per_epoch, 150)
    return config.max_steps or config.epochs * steps_per_epoch or enough

def beginnings_of(text):
    """The first five words of every sentence, line or passage, each once. With them, the program
    can tell whether a prompt begins like one, and extras/explore.py offers them as prompts."""
    return list(dict.fromkeys(first_words(text, start) for start in find_units(text)[1]))

def fingerprint(train_text, val_text):
    both = f"{len(train_text)} {train_text}{val_text}".encode("utf-8", errors="replace")
    return hashlib.sha256(both).hexdigest()

# ─── Batches ───────────────────────────────────────────────────────────────────────────────────
def window_starts(n_starts, T, seed):
    """Yield where to start windows of T tokens, epoch after epoch, forever. A window may start at
    any of `n_starts` positions, and an epoch uses every T-th of them. With 12 positions and T = 4,
    an epoch has three windows, in random order. In the example, the offset is 2 in the first epoch
    and 3 in the second. (A start beyond the last wraps around to the beginning.)

    >>> list(islice(window_starts(n_starts=12, T=4, seed=3), 6))
    [10, 2, 6, 7, 3, 11]
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        offset = torch.randint(T, (), generator=generator)
        pieces = torch.randperm(math.ceil(n_starts / T), generator=generator)      # shuffled
        yield from ((pieces * T + offset) % n_starts).tolist()

def shuffled(items, seed):
    """Yield all items in random order, over and over, each time in a new order. (Sampling with
    replacement would miss about a third of them in every pass.)"""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for index in torch.randperm(len(items), generator=generator).tolist():
            yield items[index]

def prompt_starts(text, n_prompts, seed):
    """Yield the characters at which prompt windows start, `n_prompts` of them for every step."""
    n_words = n_prompts // 5                                        # 3 of 16, rounded down
    sentences = shuffled(find_units(text)[1], seed + 1)
    words = shuffled(word_starts(text), seed + 2)
    while True:
        yield from islice(sentences, n_prompts - n_words)
        yield from islice(words, n_words)

IGNORE_INDEX = -100     # the target of padding; `batch_loss` ignores it

def prompt_window(corpus, start, T):
    """Return T + 1 token ids of the training text, starting at character `start`. Where the text
    ends, `<|endoftext|>` follows, and then padding."""
    # Hardly any token has more than 32 characters. The last tokens of a piece may be wrong, because
    # it ends within a word, so there must be some more than are needed.
    for length in (32 * (T + 1), 1024 * (T + 1), len(corpus.train_text)):
        token_ids = corpus.tokenizer.encode(corpus.train_text[start:start + length])
        if len(token_ids) > T + 20:
            return token_ids[:T + 1]
    token_ids = [*token_ids, corpus.tokenizer.end_of_text][:T + 1]
    return token_ids + [IGNORE_INDEX] * (T + 1 - len(token_ids))

def prompt_windows(corpus, starts, T):
    """Return the inputs and the targets of prompt windows, each of shape (len(starts), T)."""
    rows = [prompt_window(corpus, start, T) for start in starts]
    rows = torch.tensor(rows, dtype=torch.long).reshape(-1, T + 1)      # even if it is empty
    # As an input, padding can be any token. It comes last, so no real token attends to it.
    return rows[:, :-1].clamp(min=0), rows[:, 1:]

def batch_starts(run, corpus):
    """Yield for each batch, beginning with that of `run.step`, where its windows start: a tensor of
    positions in `train_ids` for the sliding windows, a list of positions in `train_text` for the
    prompt windows."""
    config, T = run.train_config, run.config.context_length
    n_prompts = int(config.prompt_windows * config.batch_size)
    n_sliding = config.batch_size - n_prompts
    sliding = window_starts(len(corpus.train_ids) - T, T, config.seed)
    prompts = prompt_starts(corpus.train_text, n_prompts, config.seed)
    sliding = islice(sliding, run.step * n_sliding, None)       # skip those of earlier steps
    prompts = islice(prompts, run.step * n_prompts, None)
    while True:
        positions = torch.tensor(list(islice(sliding, n_sliding)), dtype=torch.long)
        yield positions, list(islice(prompts, n_prompts))

# ─── Evaluation, and the best weights ──────────────────────────────────────────────────────────
# With keep_best, a run has two sets of weights, those of the lowest validation loss and those of
# the last step. While it trains, the model has the last ones. In a file, and once the training has
# ended, it has the best.
def start_training(run, corpus):
    """Make the optimizer, continue where the run stopped, and evaluate a run that has not begun."""
    keep_best = run.train_config.keep_best
    check(len(corpus.val_ids) > 1 or not keep_best, "--keep-best, which --preset writer sets, "
          "needs a validation split: give a longer text or a larger --val-fraction")
    if keep_best and run.best_weights is None:      # the model has the best: go on from the last
        run.best_weights = copy_weights(run.model)
        run.model.load_state_dict(run.last_weights or run.best_weights)
        run.last_weights = None
    if run.optimizer is None:
        run.optimizer = make_optimizer(run.model, run.train_config)
        run.optimizer.n_steps = run.step
        for name, saved in (run.averages or {}).items():
            for average, value in zip(run.optimizer.averages[name], saved):
                average.copy_(value)
        run.averages = None
    if run.step == 0:
        run.history = []
        record_evaluation(run, corpus)

def make_optimizer(model, config):
    if config.optimizer == "muon":
        return Muon(model, config)
    return AdamW(model.named_parameters(), config.weight_decay)

def evaluation_due(run):
    every = run.train_config.eval_every or max(45, run.total_steps // 20)
    milestones = [round(share * run.total_steps) for share in (0.02, 0.05, 1)]
    return run.step % every == 0 or run.step in milestones

def record_evaluation(run, corpus):
    """Evaluate a run, and append the result to its history. With keep_best, keep a copy of the best
    weights, and end the training if the validation loss has not fallen for a fifth of it. When a
    run is resumed to train longer, its learning rate is high again, so its loss rises before it
    falls. Only evaluations since then decide when it ends."""
    run.history.append(evaluate(run, corpus))
    if not run.train_config.keep_best:
        return
    best = best_evaluation(run.history)
    if best is run.history[-1]:
        run.best_weights = copy_weights(run.model)
    lowest = best_evaluation([e for e in run.history if e.step > run.first_step])
    patience = (run.total_steps - run.first_step) / 5
    if lowest is not None and run.step - lowest.step > patience:
        run.total_steps = run.step
    if run.step >= run.total_steps:
        if best.step < run.step:
            run.last_weights = copy_weights(run.model)
            run.model.load_state_dict(run.best_weights)
        run.best_weights = None

def best_evaluation(history):
    """Return the evaluation with the lowest validation loss, or None if it was never measured."""
    measured = [evaluation for evaluation in history if evaluation.val_loss is not None]
    return min(measured, key=lambda evaluation: evaluation.val_loss, default=None)

def copy_weights(model):
    """Return {name: tensor on the CPU}; with weight tying, two names have one tensor."""
    return copy.deepcopy(model).cpu().state_dict()

def weights_to_save(run):
    """Return (the weights to generate with, those to resume with or None if they are the same)."""
    weights = copy_weights(run.model)
    if run.best_weights is None or step_of_weights(run) == run.step:
        return weights, run.last_weights
    return run.best_weights, weights

def step_of_weights(run):
    """Return the step that the weights of a saved model come from."""
    best = best_evaluation(run.history)
    return best.step if run.train_config.keep_best and best is not None else run.step

def describe_loss(loss, token_ids, tokenizer):
    """Format a loss per token, with its perplexity and the loss in bits per character."""
    text = tokenizer.decode([i for i in token_ids.tolist() if i != tokenizer.end_of_text])
    bits = loss / math.log(2) * len(token_ids) / max(len(text), 1)
    perplexity = torch.tensor(loss, dtype=torch.float64).exp().item()      # or inf
    return f"{loss:.3f} (perplexity {perplexity:,.2f}; {bits:.3f} bits per character)"

# ─── Muon ──────────────────────────────────────────────────────────────────────────────────────
# The average gradient of a weight matrix usually has a few large singular values and many small
# ones. Muon (Jordan et al. 2024) makes the larger ones about equal and raises the small ones, so
# that the matrix changes in many more directions. Our story then needs half as many steps, but each
# takes 10 to 15% longer. Training is also stable at higher learning rates.
class Muon(AdamW):
    """AdamW's sibling: it updates the weight matrices of the blocks in its own way, all those of
    one shape at once, which saves time."""
    def __init__(self, model, config):
        super().__init__(model.named_parameters(), config.weight_decay)
        self.dtype = torch.bfloat16 if use_bf16(device_of(model), config.precision) else None
        for name, p in self.parameters.items():
            if name.startswith("trf_blocks.") and p.dim() == 2:
                self.averages[name] = self.averages[name][:1]       # of the gradient alone
        self.directions = defaultdict(list)     # {shape: [(matrix, the direction of its move)]}

    @torch.no_grad()
    def step(self, lr):
        super().step(lr)                        # `update` for each parameter
        while self.directions:
            shape, moves = self.directions.popitem()
            matrices, directions = zip(*moves)
            scale = 0.2 * math.sqrt(max(shape))                     # as in Liu et al. 2025
            for p, direction in zip(matrices, newton_schulz(torch.stack(directions))):
                p.mul_(1 - lr * self.weight_decay)
                p.sub_(direction, alpha=lr * scale)

    def update(self, p, averages, lr):
        if len(averages) == 2:
            super().update(p, averages, lr)
            return
        momentum = averages[0].lerp_(p.grad, 0.1)
        direction = p.grad.lerp(momentum, 0.9)                      # Nesterov momentum
        self.directions[p.shape].append((p, direction.to(self.dtype or p.dtype)))

def newton_schulz(X):
    """Divide each matrix of X (N, R, C) by a bound on its singular values, and apply two
    polynomials, which turn a singular value x into a x + b x^3 + c x^5. Values between 0.02 and 1
    end up between 0.48 and 1.52. (The coefficients are close to optimal. See Amsel et al. 2025.)

    >>> newton_schulz(torch.tensor([[[3.0, 0.0, 0.0], [0.0, 0.15, 0.0]]]))
    tensor([[[0.5304, 0.0000, 0.0000],
             [0.0000, 1.0832, 0.0000]]])
    """
    if X.shape[1] > X.shape[2]:
        return newton_schulz(X.mT).mT       # X X^T is smaller then
    gram = X @ X.mT
    bound = (1.04 * torch.linalg.matrix_norm(gram, keepdim=True)).clamp(min=1e-20)
    X = odd_polynomial(X / bound.sqrt(), gram / bound, 7.711, -22.114, 16.249)
    return odd_polynomial(X, X @ X.mT, 3.215, -2.411, 0.501)

def odd_polynomial(X, gram, a, b, c):
    """a X + b gram X + c gram^2 X, where gram is X X^T."""
    polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    return torch.baddbmm(X, polynomial, X, beta=a)

# ═══ Workshop: step 11, checkpoint files ═══════════════════════════════════════════════════════
FORMAT = 7      # increase only if old files can no longer be read, not for a new setting
PLAIN_FIELDS = {"fingerprint": str, "encoding": str, "prompt": str, "step": int, "total_steps": int,
                "steps_per_epoch": int, "first_step": int, "text_paths": list, "beginnings": list}

def optimizer_averages(run):
    """Return {name: the averages of this parameter}, on the CPU, or None before the training."""
    averages = run.averages if run.optimizer is None else run.optimizer.averages
    return averages and {name: [a.cpu() for a in entry] for name, entry in averages.items()}

def write_checkpoint(path, contents):
    """torch.save to a temporary file, which then replaces the file at `path`, so that `path` never
    holds a partly written file, even after a power failure. Raises StoryError."""
    path = check_file_path(path)
    temporary = temporary_path(path)
    try:
        with open(temporary, "wb") as file:
            torch.save(contents, file)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:        # on a full disk, torch raises RuntimeError
        reason = getattr(error, "strerror", None) or "is the disk full?"
        raise StoryError(f"{path} could not be written ({reason}): free some disk space, or "
                         "choose another path") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()          # after a failure; else it has been renamed

def read_checkpoint(path):
    """Return the contents of a checkpoint, with its settings, tokenizer and history as objects. The
    file may come from anywhere, so whatever is wrong with it becomes a StoryError."""
    check(os.path.lexists(path), f"there is no model at {path}: train one first (python "
          "story_llm.py train), or give another path with --model")
    check_file_path(path)
    try:
        with open(path, "rb") as file:
            saved = load_plain(file)
        restore_objects(saved)
        check_tensors(saved)
    except ModuleNotFoundError:     # tiktoken is not installed
        raise
    except Exception as error:      # a damaged or hostile file can make torch raise anything
        reason = CONTROL.sub("?", str(error).split("\n")[0])[:150]
        raise StoryError(f"{path} is not a checkpoint that this version of story_llm can read "
                         f"({reason}): use the version that saved it, train again, or give another "
                         "path") from error
    return saved

def load_plain(file):
    """torch.load of a file that holds no code, no compressed data and no damaged entry."""
    size = os.fstat(file.fileno()).st_size
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        check(sum(entry.file_size for entry in entries) <= size, "it is compressed")
        check(not any(entry.external_attr & 0x10 for entry in entries), "it contains a folder")
        check(archive.testzip() is None, "a checksum is wrong")     # compares every CRC-32
    file.seek(0)
    saved = torch.load(file, map_location="cpu", weights_only=True)
    check(type(saved) is dict, "it holds no dictionary")
    check(saved["format"] == FORMAT, f"its format is {reprlib.repr(saved['format'])}, of another "
          f"version, and not {FORMAT}")
    # Tensors that share their memory could claim more of it than the file has.
    claimed = sum(4 * weight.numel() for weight in saved["weights"].values())
    tied = 4 * saved["weights"]["out_head.weight"].numel()
    check(claimed - tied <= size, "it is too small for its weights")
    return saved

def restore_objects(saved):
    """Turn plain values into settings, a tokenizer and evaluations. Raises whatever their classes
    raise, or StoryError."""
    for name, kind in {**PLAIN_FIELDS, "test_loss": float}.items():
        check_plain(name, saved[name], kind)
    check(saved["steps_per_epoch"] > 0, "its steps_per_epoch is 0")
    saved["config"] = GPTConfig(**saved["config"])
    saved["train_config"] = TrainConfig(**saved["train_config"])
    saved["tokenizer"] = restore_tokenizer(**saved["tokenizer"])
    check(saved["tokenizer"].vocab_size == saved["config"].vocab_size, "its vocab_size is wrong")
    saved["history"] = [Evaluation(**entry) for entry in saved["history"]]
    for evaluation, f in itertools.product(saved["history"], fields(Evaluation)):
        check_plain(f.name, getattr(evaluation, f.name), f.type)

def check_plain(name, value, kind):
    valid = isinstance(value, kind)
    if isinstance(value, (int, float)):
        valid = valid and 0 <= value < 1 << 32      # not NaN, for example
    if isinstance(value, list):
        valid = valid and all(type(string) is str for string in value)
    check(valid, f"its {name} is invalid")

def check_tensors(saved):
    """Raise StoryError unless all tensors are finite, and are what this version's model needs."""
    check(saved["config"].n_layers <= len(saved["weights"]), "it has fewer weights than layers")
    with torch.device("meta"):      # shapes without memory, because a file may claim any size
        model = GPTModel(saved["config"])
        averages = make_optimizer(model, saved["train_config"]).averages
    weights = {name: (weight,) for name, weight in model.state_dict().items()}
    for name, expected in (("weights", weights), ("last_weights", weights), ("averages", averages)):
        if name == "weights" or saved[name]:
            found = {key: (entry,) if torch.is_tensor(entry) else tuple(entry)
                     for key, entry in saved[name].items()}
            check(layouts(found) == layouts(expected), f"the names or shapes of its {name} are not "
                  "those of this version's model")
            tensors = itertools.chain(*found.values())
            check(all(t.isfinite().all() for t in tensors), "some of its numbers are not finite")

def layouts(tensors):
    """{name: what there is to know of each of its tensors without its numbers}"""
    return {name: [(type(t), t.dtype, t.shape, t.stride()) for t in entry]
            for name, entry in tensors.items()}

def check_test_loss(path, model, expected):
    found = loss_on_test_window(model)
    check(math.isclose(found, expected, rel_tol=1e-4), f"{path} comes from another version of this "
          f"program: with the same weights, the loss on the test window was {expected:.4f} and is "
          f"{found:.4f} now. Use the version that saved it, or train again")

def loss_on_test_window(model):
    """Return the loss on a window of fixed token ids. Raises StoryError if it is NaN or infinite,
    so that such a model is neither saved nor loaded."""
    # as long as the scores take at most 64 MB, because a file may claim any number of heads
    T = min(model.config.context_length, math.isqrt((1 << 24) // model.config.n_heads))
    window = torch.arange(1 + T) % model.config.vocab_size
    loss = mean_loss(model, window)
    check(math.isfinite(loss), "the model computes NaN or infinite numbers: train again with a "
          "smaller --learning-rate")
    return loss

def keep_finished_model(path):
    """Before a new run first saves to `path`: copy what is there to NAME.old.pt, unless it comes
    from a run that was not finished. Return the name of the copy, or None."""
    path = Path(os.path.realpath(path))
    if not os.path.exists(path):
        return None
    with contextlib.suppress(StoryError):
        previous = load_checkpoint(path)
        if previous.step < previous.total_steps:
            return None
    kept = check_file_path(path.with_name(f"{path.stem}.old{path.suffix}"))
    try:
        return shutil.copy2(path, kept)
    except OSError as error:
        raise StoryError(f"{path} is not replaced, because {kept} could not be written "
                         f"({error.strerror}): choose another path") from None

def check_file_path(path, endings=()):
    """Return the path with links resolved. Raises StoryError if something that is not a file is
    there, or if its name does not have one of these endings."""
    path = Path(os.path.realpath(path))
    check(os.path.isfile(path) or not os.path.lexists(path),
          f"{path} is a folder or a device: give the path of a file")
    check(not endings or path.suffix.lower() in endings,
          f"{path.name} must end in {', '.join(endings)}")
    return path

def check_writable(path, endings=()):
    """Raise StoryError if a file cannot be written, before hours are spent on its contents."""
    folder = check_file_path(path, endings).parent
    check(folder.is_dir() and os.access(folder, os.W_OK), f"{path} cannot be written: give a path "
          "in a folder that exists and that you may write to")

def temporary_path(path):
    return Path(f"{path}.{os.getpid()}.tmp")

# ═══ Workshop: step 12, pictures, and a look inside ════════════════════════════════════════════
PICTURES = (".png", ".svg", ".pdf")

def new_figure(**options):
    """Return a matplotlib Figure that every notebook shows."""
    from matplotlib.figure import Figure

    class NotebookFigure(Figure):
        def _repr_png_(self):
            picture = io.BytesIO()
            self.savefig(picture, format="png")
            return picture.getvalue()

    return NotebookFigure(layout="constrained", **options)

def save_figure(figure, path):
    """Save a figure if a path is given, and return the figure."""
    if path is not None:
        check_writable(path, PICTURES)
        try:
            figure.savefig(path, dpi=150)
        except OSError as error:
            raise StoryError(f"{path} could not be written ({error.strerror}): give another path"
                             ) from None
    return figure

def mark_lowest(axes, best):
    if best is not None:
        axes.plot(best.epoch, best.val_loss, "*", color="black", markersize=11,
                  label=f"lowest validation loss, {best.val_loss:.2f}")

def module_outputs(model, modules, token_ids):
    """Run token ids (B, T) through the model and return what each of the modules returned."""
    outputs = {}

    def keep_output(module, inputs, output):
        outputs[module] = output

    with torch.no_grad(), contextlib.ExitStack() as hooks:      # which removes them in the end
        for module in modules:
            hooks.enter_context(module.register_forward_hook(keep_output))
        model(token_ids)
    return [outputs[module] for module in modules]

def ids_of_prompt(run, prompt):
    """Return the token ids (1, T) of a prompt, cut to its last `context_length` tokens."""
    return torch.tensor([encode_prompt(run.tokenizer, prompt)[-run.config.context_length:]])

def attention_maps(model, token_ids):
    """Return the attention weights of all blocks and heads for token ids (1, T): (blocks, H, T, T).
    They are the output of the dropout module of each attention layer."""
    model = copy.deepcopy(model).cpu()      # a GPU uses `fused_attention`, which has none
    dropouts = [block.att.dropout for block in model.trf_blocks]
    return torch.cat(module_outputs(model, dropouts, token_ids))

def plot_attention(run, prompt, path=None):
    """Draw the attention weights between the tokens of a prompt, for each block and head. Return
    the figure."""
    from matplotlib.colors import PowerNorm
    token_ids = ids_of_prompt(run, prompt)
    names = token_names(run.tokenizer, token_ids[0].tolist())
    names, families, missing = label_fonts(names)
    maps = attention_maps(run.model, token_ids)
    layers, heads = maps.shape[:2]
    side = max(1.6, min(len(names) * 0.16, 60 / max(layers, heads)))        # inches
    figure = new_figure(figsize=(heads * side + 2, layers * side + 2))
    grid = figure.subplots(layers, heads, squeeze=False, sharex=True, sharey=True)
    for layer, head in itertools.product(range(layers), range(heads)):
        axes = grid[layer, head]
        shades = PowerNorm(0.5, vmin=0, vmax=1)         # with many tokens, most weights are small
        image = axes.imshow(maps[layer, head].tolist(), norm=shades, cmap="Blues")
        axes.set_title(f"block {layer + 1}, head {head + 1}", fontsize=9)
        style = {"fontsize": 7, "family": families, "parse_math": False}
        axes.set_xticks(range(len(names)), names, rotation=90, **style)
        axes.set_yticks(range(len(names)), names, **style)
    figure.suptitle("Attention weights")
    figure.supylabel("this token ...", fontsize=9)
    figure.supxlabel("... attends to this one", fontsize=9)
    figure.colorbar(image, ax=grid, shrink=0.6, label="attention weight (a row adds up to 1)")
    figure.missing_characters = missing         # for the command line
    return save_figure(figure, path)

# matplotlib's own font lacks the letters of many scripts, such as Tamil, Hindi and Chinese. Given
# several fonts, matplotlib draws each character in the first one that has it.
def label_fonts(names):
    """Return (the names to draw, the fonts to draw them in, the characters that no installed font
    has: each is a box in the names, which otherwise matplotlib would draw, with a warning)."""
    from matplotlib.font_manager import FontProperties, findfont
    families = list(FontProperties().get_family())
    missing = not_in_font(findfont(FontProperties()), set("".join(names)))
    for font in installed_fonts() if missing else []:
        lacks = not_in_font(font.fname, missing)
        if lacks < missing:
            families.append(font.name)
            missing = lacks
    boxes = dict.fromkeys(map(ord, missing), "□")
    return [name.translate(boxes) for name in names], families, missing

def installed_fonts():
    """All upright fonts, first Noto Sans, and the regular weight of each before its others."""
    from matplotlib.font_manager import findSystemFonts, fontManager
    for path in set(findSystemFonts()) - {font.fname for font in fontManager.ttflist}:
        with contextlib.suppress(Exception):        # a broken file, or emojis in colour
            fontManager.addfont(path)               # newer than matplotlib's list of fonts
    upright = [font for font in fontManager.ttflist if font.style == font.stretch == "normal"
               and "LastResort" not in font.fname]
    return sorted(upright, key=lambda f: ("Noto Sans" not in f.name, f.weight != 400, f.name))

def not_in_font(path, characters):
    """Return the characters that the font in this file does not have."""
    from matplotlib.ft2font import FT2Font
    with contextlib.suppress(OSError, RuntimeError):        # a file that is broken or gone
        font = FT2Font(path)
        return {char for char in characters if not font.get_char_index(ord(char))}
    return characters

# ═══ Workshop: step 13, writing text ═══════════════════════════════════════════════════════════
def seeded_generator(seed):
    """Return a source of random numbers, on the CPU, so that they are the same on any device."""
    generator = torch.Generator()
    if seed == 0:
        generator.seed()            # from the operating system
        return generator
    return generator.manual_seed(seed)

def encode_prompt(tokenizer, prompt):
    """Return the token ids of a prompt without the spaces at its end, because in the story a space
    belongs to the token of the next word."""
    token_ids = tokenizer.encode(prompt.rstrip(" ") or prompt)
    check(token_ids, f"the prompt {prompt!r} is empty: give the first words of a sentence")
    return token_ids

def generate_text(model, tokenizer, prompt, max_new_tokens, sampling=None, sentences=0):
    """Yield the continuation of a prompt piece by piece, but never half a character. End after
    `max_new_tokens` tokens, at `<|endoftext|>`, or after `sentences` sentences (0: no limit)."""
    check(max_new_tokens >= 0, f"max_new_tokens must be at least 0, not {max_new_tokens}")
    token_ids = torch.tensor([encode_prompt(tokenizer, prompt)])
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    superfluous = " " if prompt.endswith(" ") else ""       # the next token begins with this space
    text, shown = prompt, len(prompt)
    for new_ids in generate(model, token_ids, max_new_tokens, sampling):
        if new_ids.item() == tokenizer.end_of_text:
            break
        piece = decoder.decode(tokenizer.decode_bytes(new_ids.tolist()))
        text += piece.removeprefix(superfluous)
        superfluous = ""
        end, later = len(text), []
        if sentences:       # white space is held back, because it may separate two sentences
            starts = [i for i in find_units(text)[1] if text[len(prompt):i].strip()]
            later = starts[sentences - 1:]      # sentences that are no longer wanted
            end = len(text[:min(later, default=end)].rstrip())
        yield text[shown:end]
        shown = max(shown, end)
        if later:
            return
    yield text[shown:]

def prepare_inference(model, precision="fp32"):
    """Round the weights to bf16, in place, if `use_bf16` says so, and return the model. It needs
    half the memory then, and may write different tokens."""
    return model.bfloat16() if use_bf16(device_of(model), precision) else model

# ═══ The command line ══════════════════════════════════════════════════════════════════════════
# Each command has one function, which calls the functions of its step and prints what they return:
# results on stdout, notes on stderr. A table at the end lists which command has which options.
DEFAULT_TEXT = str(Path(os.path.realpath(__file__)).with_name("Short_Story.txt"))
DEFAULT_PROMPT = "Once Aadhan renounced his kingdom"

def log(message="", file=None, end="\n"):
    file = file or sys.stdout
    message = CONTROL.sub("\ufffd", message) if file.isatty() else message
    print(message, end=end, file=file, flush=True)

def note(message):
    log(f"note: {message}", file=sys.stderr)

note_once = functools.cache(note)       # `tour` runs many commands

def command_line(*words):
    """Return a command of this program for the user to copy."""
    own_name = Path(__file__).name
    program = sys.argv[0] if Path(sys.argv[0]).name == own_name else own_name
    return f"python {shlex.join([program, *words])}"

def option_string(name):
    return "--" + name.replace("_", "-")

def describe_options(settings):
    """Return settings as they would be typed: {"n_heads": 4} as "--n-heads 4"."""
    return " ".join(option_string(name) if value is True else f"{option_string(name)} {value}"
                    for name, value in settings.items())

def refuse_options(args, names, reason):
    """Raise StoryError if one of these options was given."""
    for name in names:
        check(name not in args.given, f"{option_string(name)} {reason}")

# ─── From options to a corpus and a run ────────────────────────────────────────────────────────
def settings_from_args(args, n_bytes):
    """Return the settings of the preset and of the user, {name: value}; print what the preset
    sets."""
    by_size = args.preset == "auto"
    preset = default_preset(n_bytes) if by_size else args.preset
    chosen = preset_settings(preset, n_bytes)
    settings = {**chosen, **args.given, "preset": preset}
    if settings.get("tokenizer") != "story":
        refuse_options(args, ["vocab_size"], "can only be used with --tokenizer story")
        chosen.pop("vocab_size", None)
    effective = {name: chosen[name] for name in chosen
                 if name in args.options and name not in args.given}
    if effective:
        reason = f", because the text has {n_bytes // 1000:,} KB" if by_size else ""
        note_once(f"preset {preset}{reason}: {describe_options(effective)}")
    return settings

def corpus_from_args(args):
    """Return (the corpus, the settings)."""
    text = load_text(args.text, args.encoding)
    settings = settings_from_args(args, count_bytes(text))
    kind = settings.get("tokenizer", "auto")
    corpus = corpus_from_text(text, kind, override_settings(TrainConfig(), settings),
                              settings.get("vocab_size", 2048))
    if kind == "auto" and corpus.tokenizer.kind == "story":
        note_once(f"{reason_against_gpt2(corpus.train_text)}, so merges are learned from the story "
                  "(--tokenizer story)")
    return corpus, settings

def new_run_from_args(args):
    """Return (a new run, its corpus)."""
    corpus, settings = corpus_from_args(args)
    config = override_settings(GPTConfig(), settings)
    run = new_run(corpus, config, override_settings(TrainConfig(), settings), args.device)
    if config.context_length > run.config.context_length:
        note(f"the text has only {len(corpus.train_ids)} tokens, so the context length is "
             f"{run.config.context_length}, not {config.context_length}")
    run.text_paths, run.encoding = list(args.given.get("text", ())), args.encoding
    run.prompt = args.given.get("prompt", run.prompt if run.text_paths else DEFAULT_PROMPT)
    args.preset = settings["preset"]        # by name, for the log
    return run, corpus

def load_run(args):
    """Return (the saved run, its corpus). The corpus is made from --text or, if that is not given,
    from the files that the run was trained on, which may have been named by somebody else."""
    run = load_checkpoint(args.model, args.device)
    if "text" in args.given:
        run.text_paths, run.encoding = list(args.text), ""
    else:
        for path in run.text_paths:
            note(f"{args.model} was trained on {path}")
            check(os.path.isfile(path), f"{path}, the text of {args.model}, is not there, or not "
                  "a regular file: give the text with --text")
    run.encoding = args.encoding or run.encoding
    text = load_text(run.text_paths or DEFAULT_TEXT, run.encoding)
    return run, corpus_from_text(text, run.tokenizer, run.train_config)

def change_length(run, args):
    """Apply the options that decide how long a resumed run trains."""
    if "epochs" in args.given:          # it takes the place of an earlier --max-steps
        run.train_config = replace(run.train_config, max_steps=0)
    run.train_config = override_settings(run.train_config, args.given)
    if "epochs" in args.given or "max_steps" in args.given:
        run.total_steps = count_steps(run.steps_per_epoch, run.train_config)
        run.first_step = run.step

def run_to_resume(args):
    refuse_options(args, sorted(args.given.keys() - set(RESUME_OPTIONS)),
                   "cannot be combined with --resume, because the checkpoint determines it")
    run, corpus = load_run(args)
    check_different(args.plot, *run.text_paths)
    check(corpus.fingerprint == run.fingerprint, f"{args.model} was trained on a different text: "
          "give that text with --text, or train a new model without --resume")
    change_length(run, args)
    return run, corpus

def check_different(output, *others):
    """Raise StoryError if one of the files to be written is also used for something else."""
    for path in others:
        check(os.path.realpath(path) != os.path.realpath(output),
              f"{output} cannot be used for two things: give different files")

# ─── Steps 2 to 9 ──────────────────────────────────────────────────────────────────────────────
def command_words(args):
    args.given["tokenizer"] = "word"
    command_bpe(args)

def command_bpe(args):
    corpus, _ = corpus_from_args(args)
    tokenizer, text = corpus.tokenizer, corpus.train_text
    start = min(256, max(0, tokenizer.vocab_size - 14))     # after the bytes
    sample = token_names(tokenizer, range(start, min(start + 14, tokenizer.vocab_size)))
    lossless = tokenizer.decode(tokenizer.encode(text)) == text
    log(f"training split: {len(text):,} characters, {len(corpus.train_ids):,} tokens of the "
        f"{tokenizer.kind} tokenizer\n"
        f"vocabulary: {tokenizer.vocab_size:,} entries, for example {' '.join(sample)}\n"
        f"decoding the token ids gives back the same text: {lossless}")
    prompt = args.given.get("prompt", first_words(text) if "text" in args.given else DEFAULT_PROMPT)
    for sentence in (prompt, "Thamarai bought a laptop <|endoftext|>"):
        token_ids = tokenizer.encode(sentence)
        names = "][".join(token_names(tokenizer, token_ids))
        log(f"\n  text:    {sentence}\n  tokens:  [{names}]\n"
            f"  encoded: {token_ids}\n  decoded: {tokenizer.decode(token_ids)}")

def command_windows(args):
    T = args.context_length
    corpus, _ = corpus_from_args(args)
    windows = SlidingWindowDataset(corpus.train_ids, T, args.stride or T)
    log(f"{len(corpus.train_ids):,} tokens give {len(windows):,} windows of {T} tokens")
    for index in range(min(3, len(windows))):
        log(f"\nfirst tokens of window {index}:")
        for name, token_ids in zip(("input", "target"), windows[index]):
            names = token_names(corpus.tokenizer, token_ids[:6].tolist())
            log(f"  {name:<8}" + "".join(f"{name:<13}" for name in names).rstrip())

def command_model(args):
    run, corpus = new_run_from_args(args)
    for name, value in asdict(run.config).items():
        log(f"  {name:<15} {value}")
    log("\na batch of two windows on its way through the untrained model:")
    batch = corpus.train_ids[:run.config.context_length].expand(2, -1).to(device_of(run.model))
    blocks = [f"trf_blocks.{i}" for i in range(run.config.n_layers)]
    names = ["tok_emb", "pos_emb", *blocks, "final_norm", "out_head"]
    modules = [run.model.get_submodule(name) for name in names]
    log(f"  {'part':<12}{'shape of the output':>20}{'parameters':>14}")
    for name, module, output in zip(names, modules, module_outputs(run.model, modules, batch)):
        log(f"  {name:<12}{str(tuple(output.shape)):>20}{count_parameters(module):>14,}")
    log(f"  {'total':<12}{count_parameters(run.model):>34,}")

def command_evaluate(args):
    if args.untrained:
        run, corpus = new_run_from_args(args)
        log("an untrained model:")
    else:
        run, corpus = load_run(args)
        log(f"{args.model}, after {step_of_weights(run)} steps:")
    run.train_config = override_settings(run.train_config, args.given)      # --precision
    if corpus.fingerprint != run.fingerprint:
        note(f"{args.model} was not trained on {', '.join(run.text_paths or [DEFAULT_TEXT])}, but "
             "on a different text")
    log_losses(run, corpus)
    V = run.config.vocab_size
    log(f"  {f'ln({V}), uniform guess':<27}{math.log(V):.3f}")
    log_recall(run, corpus)

def log_losses(run, corpus):
    """Print the losses on at most 1,000 windows of the training split, and on all of the validation
    split."""
    for name, token_ids, max_windows in (("Train loss", corpus.train_ids, 1000),
                                         ("Val loss", corpus.val_ids, len(corpus.val_ids))):
        with mixed_precision(run):
            loss = mean_loss(run.model, token_ids, max_windows)
        if loss is not None:
            log(f"  {name:<27}{describe_loss(loss, token_ids, run.tokenizer)}")

def log_recall(run, corpus):
    """Print the recall, on at most 1,000 sentences, or 200 of a model that is not meant to
    memorize, and return it."""
    tests = evenly_spaced(corpus.recall_tests, 200 if run.train_config.keep_best else 1000)
    kind, _ = find_units(corpus.train_text)
    recall = share_recited(run.model, run.tokenizer, tests)
    if recall is None:
        log(f"Recall: not measured, because none of the {kind} is long enough and begins with five "
            "words of its own")
        return None
    sample = ""
    if len(tests) < len(corpus.recall_tests):
        sample = f" (sampled from {len(corpus.recall_tests):,})"
    log(f"Recall {recall:.1%}: {round(recall * len(tests))} of {len(tests)} {kind}{sample} "
        "continued word for word from their first five words")
    return recall

# ─── Training ──────────────────────────────────────────────────────────────────────────────────
@contextlib.contextmanager
def stop_requests():
    """Yield a list that stays empty until the first SIGINT (Ctrl-C) or SIGTERM, so that the caller
    can stop safely. A second one acts at once."""
    received, before = [], {}

    def remember(number, frame):
        received.append(number)
        signal.signal(number, before[number])
        with contextlib.suppress(OSError):      # stderr (2) may be closed
            os.write(2, b"\nstopping after this step (Ctrl-C again: at once, which loses what was "
                     b"learned since the last save)\n")

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) != signal.SIG_IGN:
                before[number] = signal.signal(number, remember)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

class Progress:
    """Prints the progress of a run during training, and saves the run if a path is given."""
    def __init__(self, run, path=None):
        self.path = path
        self.shown = len(run.history)       # evaluations that have been printed before
        self.start = self.first_step = None
        self.next_save = self.next_line = 0.0
        self.has_saved = False

    def update(self, run):
        """Print and save what is due after a step."""
        now = time.perf_counter()
        if self.start is None:      # start the clock only now, because the first step is slower
            self.start, self.first_step = now, run.step
        evaluations = run.history[self.shown:]
        self.shown = len(run.history)
        if evaluations and now > self.next_save and run.step < run.total_steps:
            self.save(run)
        for evaluation in evaluations:
            log_evaluation(evaluation, self.speed(run, now))
        if sys.stderr.isatty() and not evaluations and now > self.next_line:
            self.next_line = now + 0.2
            line = f"step {run.step} of {run.total_steps}{self.speed(run, now)}"
            log(line.ljust(79), sys.stderr, end="\r")       # the next line overwrites it

    def speed(self, run, now):
        """Return the tokens per second and the time left, once the clock has started."""
        steps = run.step - self.first_step
        if steps == 0:
            return ""
        seconds = (now - self.start) / steps
        left = round(seconds * (run.total_steps - run.step))
        tokens = run.train_config.batch_size * run.config.context_length / seconds
        return f", {tokens:,.0f} tokens/s, {left // 60}:{left % 60:02} left"

    def save(self, run):
        """Save, and set the time of the next save so that saving takes at most 2% of the time."""
        if self.path is None:
            return
        start = time.perf_counter()
        if not self.has_saved:
            kept = keep_finished_model(self.path)
            if kept:
                note(f"the model that was at {self.path} is kept as {kept}")
        save_checkpoint(self.path, run)
        self.has_saved = True
        self.next_save = time.perf_counter() + 50 * (time.perf_counter() - start)

def train(run, corpus, path=None):
    """Train a run to its last step, print its evaluations, and save it to `path` if one is given.
    After Ctrl-C, training stops at the end of the step, and calling this again continues it."""
    progress = Progress(run, path)
    with stop_requests() as requests:
        try:
            for _ in training_steps(run, corpus):
                progress.update(run)
                if requests:
                    break
        except BrokenPipeError:         # nobody reads the output any more, as in `train | head`
            progress.save(run)
            raise
        progress.save(run)

def log_evaluation(evaluation, speed=""):
    val_loss = "" if evaluation.val_loss is None else f", Val loss {evaluation.val_loss:.3f}"
    recall = "" if evaluation.recall is None else f", recall {evaluation.recall:.0%}"
    loss = f"Train loss {evaluation.train_loss:.3f}"
    epoch = max(1, math.ceil(evaluation.epoch))
    log(f"Ep {epoch} (Step {evaluation.step:06d}): {loss}{val_loss}{recall}{speed}")
    log("    " + f"{evaluation.prompt} ...{evaluation.sample}".replace("\n", "\\n"))

def command_train(args):
    import matplotlib       # noqa: F401; if it is missing, fail now and not after the training
    check_writable(args.model)
    check_writable(args.plot, PICTURES)
    check_different(args.model, args.plot, *args.text)
    check_different(args.plot, *args.text)
    run, corpus = run_to_resume(args) if args.resume else new_run_from_args(args)
    device = device_of(run.model)
    precision = "bf16" if use_bf16(device, run.train_config.precision) else "fp32"
    start = f"resuming after step {run.step}" if args.resume else f"preset {args.preset}"
    log(f"{start}; {run.tokenizer.kind} tokenizer, vocabulary {run.config.vocab_size:,}; "
        f"{count_parameters(run.model):,} parameters; {run.total_steps} steps on {device} in "
        f"{precision}; a uniform guess has a loss of {math.log(run.config.vocab_size):.3f}")
    if len(corpus.recall_tests) > RECALL_SAMPLE:
        log(f"During training, recall is measured on at most {RECALL_SAMPLE} beginnings.")
    if run.step < run.total_steps:
        train(run, corpus, args.model)
    else:
        note(f"{args.model} has already been trained for {run.step} steps, so nothing is left to "
             "do: set a larger --epochs or --max-steps")
    return finish_training(args, run, corpus)

def finish_training(args, run, corpus):
    """Print how to continue if training was interrupted, and return 130. Otherwise print the losses
    and recall, draw the loss curves, and suggest the next command."""
    given = [f"{option_string(name)}={args.given[name]}" for name in ("model", "plot", "device")
             if name in args.given]
    if run.step < run.total_steps:
        log(f"stopped after step {run.step} of {run.total_steps} and saved {args.model}; to "
            f"continue: {command_line('train', '--resume', *given)}", sys.stderr)
        return 130
    writes = run.train_config.keep_best
    if writes:
        step = step_of_weights(run)
        log(f"The weights are those of step {step}, which had the lowest validation loss.")
        if step == run.step:
            epochs = f"--epochs={2 * math.ceil(run.step / run.steps_per_epoch)}"
            log("It was still falling, so a longer training may lower it further: "
                + command_line("train", "--resume", epochs, *given))
    log_losses(run, corpus)
    recall = log_recall(run, corpus)
    if recall is not None and recall < 0.95 and not writes:
        log("To raise recall, train longer (--epochs) or use a larger model (--emb-dim).")
    plot_losses(run.history, run.config.vocab_size, args.plot)
    log(f"The model is in {args.model}, its loss curves are in {args.plot}.")
    if len(corpus.val_ids) > 0 and not writes:
        log(f"{run.train_config.val_fraction:.0%} of the text was kept for validation, so "
            "the model has not learned it; with --val-fraction 0, it learns everything.")
    if not writes:
        log("This model learns its text by heart; for new text in the manner of a long one, use "
            "--preset writer.")
    model = ["--model", args.model] if "model" in args.given else []
    sampling = ["--temperature", "0.8"] if writes else []
    prompt = run.prompt.replace("\n", "\\n")
    log("Now let the model write: "
        + command_line("generate", *model, *sampling, "--prompt", prompt))

# ─── Steps 12 and 13 ───────────────────────────────────────────────────────────────────────────
def command_plot(args):
    check_different(args.model, args.plot)
    run = load_checkpoint(args.model)
    plot_losses(run.history, run.config.vocab_size, args.plot)
    log(f"drew {args.plot}")

def check_prompt(prompt, run):
    """Return the prompt. Print a note if the model may not continue it as expected."""
    token_ids, T = encode_prompt(run.tokenizer, prompt), run.config.context_length
    if run.tokenizer.kind == "word" and run.tokenizer.ids[UNKNOWN] in token_ids:
        note(f"the model sees {run.tokenizer.decode(token_ids)}, because the story does not "
             "contain all of these words")
    if len(token_ids) > T:
        note(f"the prompt has {len(token_ids)} tokens, but the model sees only the last {T}")
    start = prompt.strip()
    known = any(beginning.startswith(start) or start.startswith(beginning)
                for beginning in (*run.beginnings, run.prompt))
    if run.step > 0 and run.beginnings and not run.train_config.keep_best and not known:
        kept = "" if best_evaluation(run.history) is None else (
            f" ({run.train_config.val_fraction:.0%} of the text was kept for validation)")
        note(f"nothing that the model was trained on begins with these words{kept}")
    return prompt

def command_attention(args):
    check_different(args.model, args.plot)
    run = load_checkpoint(args.model)
    figure = plot_attention(run, check_prompt(args.given.get("prompt", run.prompt), run), args.plot)
    log(f"drew {args.plot}")
    missing = figure.missing_characters
    if missing:
        example = min(missing, key=lambda character: (not character.isalpha(), character))
        note(f"no installed font has {len(missing)} of the characters, such as {example} "
             f"({unicodedata.name(example, 'which has no name')}): install a Noto font that has "
             "them, and draw the picture again")

def command_next(args):
    """Print the most likely next tokens, before and after sampling settings change them."""
    run = new_run_from_args(args)[0] if args.untrained else load_checkpoint(args.model, args.device)
    sampling = override_settings(Sampling(temperature=1.0), args.given)
    prompt = check_prompt(args.given.get("prompt", run.prompt), run)
    window = ids_of_prompt(run, prompt).to(device_of(run.model))
    with torch.no_grad():
        logits = run.model(window)[:, -1].float()
    softmax = logits.softmax(dim=-1)[0]
    sampled = next_token_probabilities(logits, sampling, window)[0]
    best = logits[0].topk(min(10, logits.shape[1])).indices
    settings = {name: value for name, value in asdict(sampling).items() if name != "seed"}
    log(f"{'next token':<16}{'logit':>7}{'softmax':>9}{'sampled':>9}   "
        f"({describe_options(settings)})")
    for name, i in zip(token_names(run.tokenizer, best.tolist()), best):
        bar = "█" * round(40 * sampled[i].item())
        row = f"{name:<16}{logits[0, i]:>7.2f}{softmax[i]:>9.2%}{sampled[i]:>9.2%}   {bar}"
        log(row.rstrip())

def command_generate(args):
    if args.untrained:
        log_greedy(args)
        return
    sampling = override_settings(Sampling(), args.given)
    if sampling.temperature == 0:
        draws = [f.name for f in fields(Sampling) if f.metadata.get("draws")]
        refuse_options(args, draws, "is for sampling: give a --temperature above 0 as well")
    run = load_checkpoint(args.model, args.device)
    model = prepare_inference(run.model, args.precision)
    for prompt in [args.prompt] if "prompt" in args.given else typed_prompts():
        check_prompt(prompt, run)
        drawn = sampling
        if sampling.temperature > 0 and sampling.seed == 0:
            drawn = replace(sampling, seed=random.SystemRandom().randrange(1, 10_000))
            note(f"sampled with --seed {drawn.seed}")
        log(prompt, end="")
        for piece in generate_text(model, run.tokenizer, prompt, args.max_new_tokens, drawn,
                                   args.sentences):
            log(piece, end="")
        log()

def log_greedy(args):
    """Continue the prompt with an untrained model, with `generate_text_simple` as in step 8."""
    refuse_options(args, ("temperature", "top_k", "top_p", "sentences"),
                   "cannot be combined with --untrained")
    run, _ = new_run_from_args(args)
    model = prepare_inference(run.model, args.precision)
    idx = ids_of_prompt(run, run.prompt).to(device_of(model))
    longer = generate_text_simple(model, idx, args.max_new_tokens, run.config.context_length)
    log(run.prompt + run.tokenizer.decode(longer[0, idx.shape[1]:].tolist()))

def typed_prompts():
    """Yield the lines that are typed, or that come through a pipe, if they are not empty."""
    lines = sys.stdin
    if sys.stdin.isatty() and sys.stdout.isatty():
        with contextlib.suppress(ImportError):
            import readline     # noqa: F401; input() then has a history and the arrow keys
        log("Type the first words of a sentence, then Enter. Ctrl-C ends the program.", sys.stderr)
        lines = iter(lambda: input("> "), None)
    with contextlib.suppress(EOFError):         # Ctrl-D
        for line in lines:
            if line.strip():
                yield line.rstrip("\r\n").replace("\\n", "\n")

TOUR = (    # (a command, what to look at)
    ("words {text}", "Each word is a token. Words that the story does not contain are <|unk|>."),
    ("bpe {text}", "Frequent words are one token, rare ones several, and nothing is unknown."),
    ("windows {text}", "The target is the input, shifted by one."),
    ("model {text}", "Most parameters are in the blocks, nearly all others in the vocabulary."),
    ("generate --untrained {text}", "Noise, because the weights are random."),
    ("evaluate --untrained {text}", "The loss is about ln(V), that of a uniform guess."),
    ("train {text} {model}", "The training loss falls, the validation loss turns and rises."),
    ("plot {model}", "Look at the picture: where does the validation loss turn?"),
    ("generate --sentences 2 {model} --prompt {prompt}", "Now the model has learned the story."),
    ("attention {model}", "Look at the picture: to which token does each token attend?"),
    ("next --temperature 2 {model}", "A temperature above 1 makes unlikely tokens likelier."))

def command_tour(args):
    text = shlex.join(["--text", *args.text]) if "text" in args.given else ""
    model = shlex.join(["--model", args.model]) if "model" in args.given else ""
    for command, hint in TOUR:
        prompt = ""
        if "{prompt}" in command:
            prompt = shlex.quote(load_checkpoint(args.model).prompt)
        words = shlex.split(command.format(text=text, model=model, prompt=prompt))
        log(f"\n\n═══ {COMMANDS[words[0]][1]}\n{hint}\n\n$ {command_line(*words)}\n")
        status = main(words)
        if status != 0:
            return status

# ─── Options ───────────────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True, kw_only=True)
class Options(Settings):
    """The options that are not settings of a model, of training or of sampling."""
    text: tuple = setting((DEFAULT_TEXT,), "the story: text files, or - for standard input "
                          "(default: Short_Story.txt)")
    encoding: str = setting("", "encoding of the text (default: UTF-8, or UTF-16 if the file is "
                            "marked so)")
    tokenizer: str = setting("auto", "auto: gpt2 if it is available and suits the text, else story",
                             choices=TOKENIZERS)
    vocab_size: int = setting(2048, "vocabulary size of --tokenizer story", minimum=257)
    preset: str = setting("auto", "settings to start from: story to memorize a short text, novel a "
                          "longer one, writer to write new text in the manner of a long one, "
                          "gpt2-small for the shape of GPT-2, auto for story up to 60 KB and "
                          "novel above (default: auto); the defaults below are those of story",
                          choices=("auto", *PRESETS))
    model: str = setting("story_llm.pt", "the checkpoint file")
    untrained: bool = setting(False, "use a new, untrained model, built with the options below")
    resume: bool = setting(False, "continue the training of --model, with the settings saved in it")
    device: str = setting("auto", "cpu, cuda, mps (Apple), or auto: a GPU if there is one")
    prompt: str = setting("", "the beginning of the text; \\n is a line break")
    max_new_tokens: int = setting(100, "maximum number of tokens to generate")
    sentences: int = setting(0, "stop after this many sentences, or after --max-new-tokens "
                             "(0: no limit)")
    stride: int = setting(0, "tokens between the starts of two windows (0: the context length)")
    plot: str = setting("", "where to save the picture: .png, .svg or .pdf (default: loss.png or "
                        "attention.png, preceded by the name of --model if that is given)")

FIELDS, GROUPS = {}, {}     # {setting: its field}, {setting: where --help lists it}; later ones win
for _title, _class in (("sampling", Sampling), ("training", TrainConfig), ("the model", GPTConfig),
                       ("options", Options)):
    FIELDS.update({f.name: f for f in fields(_class)})
    GROUPS.update(dict.fromkeys(names_of(_class), _title))
GROUPS["seed"] = "options"
# {(command, setting): (its default, what it means) with this command, where they differ}
SPECIAL = {
    ("next", "temperature"): (1.0, FIELDS["temperature"].metadata["meaning"]),
    ("generate", "precision"): ("fp32", FIELDS["precision"].metadata["meaning"]),
    ("generate", "seed"): (0, "random seed of sampling (0: another one each time)"),
    ("generate", "prompt"): ("", "the text that the model continues; \\n is a line break (default: "
                             "lines that are typed, or that come through a pipe)")}
TOKENIZER = ("text", "encoding", "tokenizer", "vocab_size")
SPLIT = tuple(f.name for f in fields(TrainConfig) if f.metadata.get("splits"))    # the text
NEW_MODEL = (*TOKENIZER, "preset", *SPLIT, "seed",
             *(name for name in names_of(GPTConfig) if name != "vocab_size"))
RESUME_OPTIONS = ("text", "encoding", "model", "resume", "epochs", "max_steps", "eval_every",
                  "device", "plot")

COMMANDS = {    # {name: (function, help, options)}
    "words": (command_words, "steps 2, 3: the text as words and as word ids",
              ("text", "encoding", "prompt")),
    "bpe": (command_bpe, "step 4: the text as byte-pair tokens", (*TOKENIZER, "prompt")),
    "windows": (command_windows, "step 5: windows of the text, inputs and targets",
                (*TOKENIZER, "context_length", "stride", *SPLIT)),
    "model": (command_model, "steps 6, 7: shapes and parameter counts of the model",
              (*NEW_MODEL, "device")),
    "evaluate": (command_evaluate, "step 9: losses and recall of a model",
                 ("text", "encoding", "model", "device", "precision", "untrained")),
    "train": (command_train, "steps 10, 11: train a model and save it",
              ("text", "model", "epochs", "preset", "tokenizer", "resume", *NEW_MODEL,
               *names_of(TrainConfig), "prompt", "plot", "device")),
    "plot": (command_plot, "step 12: draw the loss curves of a saved model", ("model", "plot")),
    "generate": (command_generate, "steps 8, 13: continue a prompt, or each line that is typed",
                 ("model", "prompt", "max_new_tokens", "sentences", *names_of(Sampling), "device",
                  "precision", "untrained")),
    "attention": (command_attention, "step 6, trained: draw which tokens each token attends to",
                  ("model", "prompt", "plot")),
    "next": (command_next, "step 13: the most likely next tokens, and how sampling changes them",
             ("model", "prompt", *(name for name in names_of(Sampling) if name != "seed"), "device",
              "untrained")),
    "tour": (command_tour, "all steps, one after the other", ("text", "model"))}

def further_options(options):
    """Return the options that a command has with --untrained."""
    return NEW_MODEL if "untrained" in options else ()

def option_of(name, command):
    """Return (the default of an option, what it means) with a command."""
    f = FIELDS[name]
    return SPECIAL.get((command, name), (f.default, f.metadata["meaning"]))

def add_option(parser, name, command=None):
    """Add a command-line option for a settings field, with its meaning and default in the help."""
    f = FIELDS[name]
    default, meaning = option_of(name, command)
    kind = {"type": f.type, "metavar": "FILE" if name in ("model", "plot") else "N"}
    if "choices" in f.metadata:
        kind = {"choices": f.metadata["choices"]}
    elif f.type is bool:
        settings = GROUPS[name] != "options"        # which a preset may have switched on
        kind = {"action": argparse.BooleanOptionalAction if settings else "store_true"}
    elif f.type is tuple:
        kind = {"nargs": "+", "action": "extend", "metavar": "FILE"}
    elif f.type is str and name not in ("model", "plot"):
        kind = {"type": str, "metavar": "TEXT"}
    if default != "" and default is not False and "(default" not in meaning:
        meaning += f" (default: {default})"
    parser.add_argument(option_string(name), default=argparse.SUPPRESS,
                        help=meaning.replace("%", "%%"), **kind)

class Parser(argparse.ArgumentParser):
    """A parser that reports a mistake in one line."""
    def error(self, message):
        self.exit(2, f"error: {message} (--help after a command lists what is possible)\n")

def make_parser():
    parser = Parser(
        prog="story_llm.py", description="A language model that explains itself: read story_llm.py "
        "from top to bottom. Each of its steps has a command:",
        epilog="`python story_llm.py COMMAND --help` lists the options of a command.")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    for name, (_, meaning, options) in COMMANDS.items():
        command = subparsers.add_parser(name, help=meaning, description=meaning, allow_abbrev=False,
                                        usage=f"python story_llm.py {name} [options]")
        groups = {"options": command}
        for option in dict.fromkeys((*options, *further_options(options))):
            title = GROUPS[option] if option in options else "only with --untrained"
            if title not in groups:
                groups[title] = command.add_argument_group(title)
            add_option(groups[title], option, name)
    return parser

def parse(argv):
    """Parse a command line into a namespace. `given` holds only the options that the user typed."""
    parser = make_parser()
    given = vars(parser.parse_args(argv))
    command = given.pop("command")
    if command is None:
        return argparse.Namespace(handler=lambda args: log(parser.format_help().rstrip()))
    if "text" in given:
        given["text"] = tuple(given["text"])
    handler, _, options = COMMANDS[command]
    args = make_namespace(given, handler, command)
    args.options = (*options, *further_options(options))
    override_settings(Options(), given)         # raises StoryError if an option is invalid
    if not args.plot:
        picture = "attention.png" if command == "attention" else "loss.png"
        model = Path(args.model)
        args.plot = str(model.parent / f"{model.stem}_{picture}") if "model" in given else picture
    if args.untrained:
        refuse_options(args, ["model"], "cannot be combined with --untrained")
    else:
        refuse_options(args, sorted(given.keys() - set(options)), "requires --untrained, because a "
                       "saved model keeps the value that it was trained with")
    return args

def make_namespace(given, handler, command=None):
    """Return a namespace of the options that were typed, `given`, and the defaults of all others.
    It also has `given` itself and the handler of the command."""
    if "prompt" in given:
        given["prompt"] = given["prompt"].replace("\\n", "\n")      # line breaks are hard to type
    defaults = {name: option_of(name, command)[0] for name in FIELDS}
    return argparse.Namespace(**{**defaults, **given}, handler=handler, given=given)

def main(argv=None):
    """Run the program with these command-line arguments and return the exit status."""
    return exit_status(run_command, sys.argv[1:] if argv is None else argv)

def run_command(argv):
    args = parse(argv)
    return args.handler(args)

def exit_status(work, *arguments):
    """Call work(*arguments) and return an exit status: what `work` returns, or 0; 1 after an error
    printed on one line, or if nobody reads the output; 2 after a usage error; 130 after Ctrl-C."""
    prepare_streams()
    try:
        return work(*arguments) or 0
    except SystemExit as end:           # argparse has already printed the error
        return end.code
    except BrokenPipeError:             # the reader of our output, perhaps `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    except ModuleNotFoundError as error:
        if error.name not in ("tiktoken", "matplotlib"):
            raise
        mistake = f"{error.name} is not installed: run python -m pip install {error.name}"
    except (MemoryError, RuntimeError) as error:
        # torch reports a lack of memory as a RuntimeError.
        signs = ("out of memory", "not enough memory", "can't allocate memory")
        if isinstance(error, RuntimeError) and not any(sign in str(error) for sign in signs):
            raise
        mistake = "there is not enough memory: use a smaller --batch-size or a smaller model"
    except StoryError as error:
        mistake = error
    log(f"error: {mistake}", sys.stderr)
    return 1

def prepare_streams():
    """Use UTF-8 for files and pipes. In a terminal, print ? for characters that it cannot show."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:                          # closed by the caller
            setattr(sys, name, open(os.devnull, "r+"))
        with contextlib.suppress(AttributeError, OSError):      # replaced, or already read from
            stream = getattr(sys, name)
            stream.reconfigure(encoding=None if stream.isatty() else "utf-8", errors="replace")

def keep_freed_memory():
    """Let glibc keep freed memory for the next step. Otherwise, allocating it again would take
    about a sixth of the training time."""
    with contextlib.suppress(OSError, AttributeError):      # not Linux, or another C library
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        # M_MMAP_THRESHOLD: blocks of up to 1 GB come from the heap
        if mallopt(-3, 1 << 30) == 0:
            mallopt(-3, 32 << 20)   # as much as an older glibc allows
        mallopt(-1, -1)             # M_TRIM_THRESHOLD: the heap never shrinks

# What `from story_llm import *` brings: what this file defines, and what its examples need.
__all__ = ["math", "torch", "nn", "F", "islice"]
__all__ += [name for name, value in list(globals().items())
            if getattr(value, "__module__", None) == __name__ and not name.startswith("_")]

# The threads of torch on Linux (libgomp) wait for each other by spinning. This is fast, but when
# another program needs the processor, spinning threads hold up the ones that have work to do.
# GOMP_SPINCOUNT, set at the top of this file, makes them sleep after 2,000 spins.
if __name__ == "__main__":
    os.environ["MPLBACKEND"] = "agg"        # a notebook's backend works only in the notebook
    torch.set_float32_matmul_precision("high")      # on a GPU, fp32 products in the faster TF32
    keep_freed_memory()
    sys.exit(main())
