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
ideally in one evening. Most steps have a command that runs them, and examples to try in an
interactive session: start `python`, enter `from story_llm import *`, and type what follows `>>>`.
Python prints the lines below it. After the lesson, the workshop makes the same code robust and
fast, and the command line comes last.

Every figure in the lesson was measured. Yours will differ a little, because processors round
differently. Without a network connection, the program builds a different vocabulary (step 4), and
your figures will differ more.
"""
import math
import os
import sys
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import islice, pairwise
from pathlib import Path

if sys.version_info < (3, 11):
    sys.exit("error: story_llm needs Python 3.11 or later, but this is " + sys.version.split()[0])
if "torch" not in sys.modules:      # affects speed only; the end of this file explains it
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
try:
    import torch
    import regex    # comes with tiktoken; like re, with extra classes such as \p{L} (any letter)
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    sys.exit(f"error: the package {error.name} is not installed in this Python: activate the "
             "environment that has it, or run python -m pip install -r requirements.txt")
from torch import nn
from torch.nn import functional as F

# ═══ Step 1: what to install, the idea, the map ════════════════════════════════════════════════
# A language model predicts how a text continues. Given the beginning of a text, it computes for
# each possible token the probability that this token comes next. (A token is a word or a piece of a
# word.) To write, the program appends the most likely token, or one drawn at random according to
# the probabilities, and repeats. Models that predict each token from the ones before it are called
# autoregressive. ChatGPT is built around such a model. Ours is far smaller, and one story is all it
# reads.
#
# Nobody tells the model any rules. It consists of 1.7 million numbers, its parameters, which are
# random at first, so its predictions are noise. Then it is trained. It reads passages of the story,
# predicts every next token, and compares its predictions with what really came next. All parameters
# are then moved a little in the direction that makes the right tokens more probable. That is one
# training step. After 180 of them, some ten seconds on a laptop, the model has memorized the text.
# Give it the first five words of any training sentence of eight words or more, and it continues
# word for word for at least 80 characters.
#
#      2-4    split the text into tokens, and turn the tokens into numbers
#       5     cut these numbers into training examples: some tokens, and the token that follows them
#      6-8    build the model, and let it write while it is still untrained
#      9-10   measure how wrong the predictions are, and train the model to make them better
#     11-13   save the model, look at how it learned, and let it continue the story
#
# Three packages are needed, and `pip install -r requirements.txt` installs them: torch does the
# arithmetic, tiktoken applies byte-pair encodings (step 4), and matplotlib draws plots (step 12).

# ═══ Step 2: load the text, split it into words ════════════════════════════════════════════════
# A file is a sequence of bytes, which are numbers from 0 to 255. An encoding says which characters
# they stand for. The usual one is UTF-8. It stores an English letter in one byte, an é in two, and
# a Tamil or Chinese character in three. Line endings differ between operating systems, so all of
# them are converted to "\n".
def load_text(paths, encoding=""):
    """Return the text of a file or of several files. They are read as UTF-8, unless they are
    clearly UTF-16 or UTF-32, or `encoding` names another encoding. Raises StoryError if a file
    cannot be read or is not plain text, or if the files contain no text."""
    # workshop: read_files also accepts folders; decode raises StoryError if a file is not text
    texts = [decode(data, path, encoding) for path, data in read_files(paths)]
    text = "\n\n".join(texts).replace("\r\n", "\n").replace("\r", "\n")
    # check(condition, message) raises StoryError unless the condition holds
    check(text.strip(), "the text is empty: give at least five words")
    return text

# The model will be trained on the first nine tenths of the story, the training split. The rest is
# the validation split, which it never trains on. By comparing how well it predicts the two, we
# shall see whether it has learned something that carries over to unseen text.
def split_text(text, val_fraction):
    """Split a text at a space into the training split and the validation split that follows it.

    >>> split_text("They went upriver by boat.", 0.3)
    ('They went upriver', ' by boat.')
    """
    cut = len(text) - int(len(text) * val_fraction)
    # the last space or line end in the 50 characters before the cut
    space = max(text.rfind(white, max(cut - 50, 0), cut + 1) for white in " \n")
    if space > 0 and cut < len(text):       # if there is none, as in Chinese, cut anyway
        cut = space
    return text[:cut], text[cut:]

# The simplest way to turn a text into numbers is to split it into words and punctuation marks, to
# list all the different ones, and to use each one's position in the list as its number. The list is
# called the vocabulary.
#
# A regular expression does the splitting. For English, r" ?[\w']+| ?[^\w\s]|\s+" would do. It
# matches a word, a punctuation mark, or white space. (WORD_OR_MARK in the workshop does much the
# same for every script.) The space before a word is kept as a part of that word, so that nothing is
# lost: joining the pieces gives back the text.
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
    """Return the distinct pieces of a text, sorted, followed by two special tokens (see step 3).

    >>> build_vocabulary("the king and the ferryman")
    [' and', ' ferryman', ' king', ' the', 'the', '<|endoftext|>', '<|unk|>']
    """
    return sorted(set(split_words(text))) + [END_OF_TEXT, UNKNOWN]

# ═══ Step 3: a simple tokenizer ════════════════════════════════════════════════════════════════
# A tokenizer converts in both directions. `encode` turns a text into token ids, which are positions
# in the vocabulary, and `decode` turns token ids back into text.
#
# What happens to a word that is not in the vocabulary? It becomes the special token `<|unk|>`, for
# "unknown". The text can be processed, but the word is lost. Worse, the model never reads this
# token in training, where every word is known. So the model never learns what the token stands for.
# The other special token, `<|endoftext|>`, follows the last word of the training text. So the model
# learns where this text ends, and generation stops when it predicts this token.
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
            # A word without a space before it, such as the first of a text, may be in the
            # vocabulary only with a space. Then use that token. (decode returns the space as well.)
            if piece not in self.ids:
                piece = " " + piece
            token_ids.append(self.ids.get(piece, self.ids[UNKNOWN]))
        return token_ids

    def decode(self, token_ids):
        return "".join(self.tokens[token_id] for token_id in token_ids)

    def decode_bytes(self, token_ids):      # for generate_text (workshop)
        return self.decode(token_ids).encode(errors="replace")

# ═══ Step 4: byte-pair encoding ════════════════════════════════════════════════════════════════
# Words make poor tokens. A language has hundreds of thousands of them. To the model, "king",
# "kings" and "kingdom" are as different as any three words, and every new word is `<|unk|>`.
# Characters are no better. Every word can be spelled with them, but the text becomes long and each
# token says little.
#
# Byte-pair encoding lies in between. It begins with the 256 possible bytes as tokens, so no text is
# unknown to it. Then it finds the pair of neighbouring tokens that occurs most often in some
# training text, and merges them into a new token. It repeats this until the vocabulary has the size
# we want. Frequent words end up as one token, rare words as several. The method comes from data
# compression (Gage 1994), and Sennrich et al. (2016) brought it to machine translation. Language
# models adopted it from there.
#
# By default we do not learn merges from the story. We follow the design of GPT-2, OpenAI's model of
# 2019 (Radford et al.), and use its 50,000 merges, which tiktoken provides. They were learned from
# a large amount of English text from the web. If tiktoken cannot download them because there is no
# network connection, the program learns merges from the story. It also does so for a long text,
# whose own merges suit it better, for a text in another language, and with `--tokenizer story`.
# This is how merges are found in three words, with _ for the space:
#
#     l o w   _ l o w e r   _ l o w l y     merge l + o, which occurs 3 times (o + w does too; the
#                                           pair that comes first in alphabetical order wins)
#     lo w    _ lo w e r    _ lo w l y      merge lo + w, 3 times
#     low     _ low e r     _ low l y       merge _ + low, 2 times
#     low     _low e r      _low l y        every remaining pair occurs only once, so we stop
#
# Merges never cross a word boundary. The text is first split much as in step 2 (by STORY_SPLIT in
# the workshop), and pairs are counted within each word.
def train_bpe(text, vocab_size):
    """Learn byte-pair tokens from a text. Return at most `vocab_size - 1` of them as byte strings,
    the 256 bytes first, then the merged tokens in the order of merging. (The remaining id is for
    `<|endoftext|>`.)

    >>> train_bpe("low lower lowly", 300)[256:]
    [b'lo', b'low', b' low']
    """
    # {distinct word, as a tuple of tokens: how often it occurs}
    words = Counter(split_bytes(word) for word in STORY_SPLIT.findall(text))
    tokens = [bytes([byte]) for byte in range(256)]
    while len(tokens) < vocab_size - 1:
        pair_counts = Counter()
        for word, count in words.items():
            for pair in pairwise(word):
                pair_counts[pair] += count
        best = most_frequent_pair(pair_counts)
        if best is None:
            break
        tokens.append(best[0] + best[1])
        words = {merge_pair(word, best): count for word, count in words.items()}
    return tokens

def split_bytes(word):
    """A word as a tuple of its bytes, each a byte string of length 1."""
    return tuple(bytes([byte]) for byte in word.encode("utf-8", errors="replace"))

def most_frequent_pair(pair_counts):
    """Return the most frequent pair (the smallest in case of a tie), or None if no pair occurs more
    than once."""
    highest = max(pair_counts.values(), default=0)
    if highest < 2:
        return None
    return min(pair for pair, count in pair_counts.items() if count == highest)

def merge_pair(word, pair):
    """Return a word, a tuple of tokens, with every occurrence of the pair merged into one token.

    >>> merge_pair((b"l", b"o", b"w", b"l", b"o"), (b"l", b"o"))
    (b'lo', b'w', b'lo')
    """
    merged = []
    for token in word:
        if merged and (merged[-1], token) == pair:
            merged[-1] += token
        else:
            merged.append(token)
    return tuple(merged)

# Counting all pairs again for every merge takes 0.6 seconds for our story but minutes for a novel,
# so the program calls `train_bpe_fast` (workshop). It finds the same tokens by updating the counts.
#
# To encode a text, the merges are applied again in the same order. tiktoken, OpenAI's library, does
# this fast. We give it the rank of every token, which is its place in the order of merging. Within
# a word, tiktoken always merges the pair whose merged token has the lowest rank.
class BPETokenizer:
    """A byte-pair encoding. `tokens` is a list of byte strings such as `train_bpe` returns. The id
    of a token is its index in this list, which is also its rank. `kind`, "gpt2" or "story", says
    where the merges come from.

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

# Our story needs only a few of GPT-2's tokens. `make_tokenizer` in the workshop keeps those that
# occur in it, and the intermediate ones that lead to them, as "lo" leads to "low". With the 256
# bytes and `<|endoftext|>`, that makes 2,079 of 50,257. Our tokenizer still splits the story
# exactly as GPT-2 does. (A word that the story does not contain may be split into smaller tokens.)
# We leave tokens out because every one of them makes the model larger and slower (step 6).

# ─── PyTorch in one page ───────────────────────────────────────────────────────────────────────
def pytorch_in_one_page():
    """A tensor is what numpy calls an array, and most of numpy carries over: elementwise
    arithmetic, slicing, reshape, broadcasting, and `@` for the matrix product over the last two
    dimensions. What numpy calls `axis` is `dim` here, `x.transpose(1, 2)` swaps just these two
    dimensions, `x.flatten(0, 1)` merges the first two into one, and `x.flatten(2)` merges all from
    the third on.

    >>> x = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    >>> x.shape, x.sum(dim=-1)
    (torch.Size([2, 3]), tensor([ 6., 15.]))

    Two things are new. The first is the layer, a function with parameters that can be trained.
    nn.Linear(3, 2) has a weight matrix W of shape (2, 3) and a bias b of shape (2,), both random at
    first, and computes x @ W.T + b over the last dimension of x. The other dimensions can be
    anything, so a whole batch goes through in one call. nn.Embedding(50, 4) has a matrix of 50 rows
    of four numbers and returns the rows at the indices that you pass.

    >>> nn.Linear(3, 2)(x).shape, nn.Embedding(50, 4)(torch.tensor([7, 7, 30])).shape
    (torch.Size([2, 2]), torch.Size([3, 4]))

    Every layer is an nn.Module. So is a whole model, a module made of modules. When a layer is
    assigned to an attribute of a module, the module registers it, so `parameters()` of a model
    returns the parameters of all its layers. Calling a module like a function runs its `forward`.

    The second new thing is the gradient. torch records every operation on a parameter and on
    whatever is computed from it. After that, `backward` goes through the record once, from the
    result back to the parameters, and applies the chain rule at every operation. This is
    backpropagation. It yields the derivative of the result with respect to each parameter. At w =
    3, the derivative of (2w - 10)^2 is 2 (2w - 10) * 2 = -16, and backpropagation finds it too:

    >>> w = torch.tensor(3.0, requires_grad=True)       # record what is computed from w
    >>> result = (2 * w - 10) ** 2
    >>> result.backward()       # adds the derivative to w.grad, which was empty
    >>> w.grad
    tensor(-16.)

    All these derivatives together are the gradient. If w grows by 0.01, the result falls by about
    0.16. Moving the parameters a little against their gradient makes the result smaller, and that
    is all that training does, over and over. In training, the result is the loss, which measures
    how wrong the predictions are. A trained model only predicts, which is called inference. It
    needs no gradients, and `with torch.no_grad():` tells torch to record nothing."""

# ═══ Step 5: sliding windows ═══════════════════════════════════════════════════════════════════
# What does the model train on? The input is a window, some consecutive tokens of the text. The
# targets are the tokens that it should predict, which are the same tokens shifted by one:
#
#     input     Once     Aadhan      renounced   his
#     target    Aadhan   renounced   his         kingdom
#
# Each column is a training example. After "Once" comes "Aadhan", after "Once Aadhan" comes
# "renounced", and after all four comes "kingdom". So one window of four tokens contains four
# examples, and the model works on all of them at once. At each position it sees the token there and
# the ones to its left.
class SlidingWindowDataset:
    """Sliding windows over token ids of shape (N,). Each window has `context_length` tokens, and
    windows start `stride` tokens apart. Item i is a pair (input, target), each of shape
    (context_length,); if i is a tensor of indices, both have a leading batch dimension. Raises
    StoryError if N <= context_length.

    >>> windows = SlidingWindowDataset(torch.tensor([10, 11, 12, 13, 14, 15, 16]), 4, stride=2)
    >>> len(windows)
    2
    >>> windows[1]
    (tensor([12, 13, 14, 15]), tensor([13, 14, 15, 16]))
    """
    def __init__(self, token_ids, context_length, stride=1):
        check(len(token_ids) > context_length, f"{len(token_ids)} tokens are too few for a window "
              f"of {context_length} tokens: give a longer text or a smaller --context-length")
        # Each window gets one extra token, for the last target. The windows overlap, but `unfold`
        # copies nothing: it returns a view of shape (windows, context_length + 1).
        self.windows = token_ids.unfold(0, context_length + 1, stride)

    def __len__(self):
        return len(self.windows)

    def __getitem__(self, index):
        window = self.windows[index].long()     # 64-bit integers, as cross_entropy requires
        return window[..., :-1], window[..., 1:]        # all but the last token, all but the first

# ═══ Step 6: attention and the GPT model ═══════════════════════════════════════════════════════
# A token id is only a name, and its size means nothing. So each token of the vocabulary gets a
# vector of C numbers, its embedding, which is a row of an nn.Embedding. These vectors are
# parameters, random at first, and training turns them into whatever helps the model to predict.
#
# Now we build the model. It is a decoder-only transformer, like GPT-2 and nearly every large
# language model since. (The original transformer, by Vaswani et al. 2017, had a second half, the
# encoder, which read the sentence to be translated.) It reads token ids, and for every position it
# returns one number per token of the vocabulary, the logit. A higher logit means that the model
# considers the token more likely to come next. A batch consists of B windows of T tokens, and the
# values on the right are those of our story model:
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
# Numbers that we choose, and that training does not change, are called hyperparameters. These are
# the ones that define the model, and the rest of this step explains them. (`setting` stores a
# default together with its meaning, which --help shows, and `Settings` checks the values. "Frozen"
# means that they cannot be changed later.)
def setting(default, meaning):
    return field(default=default, metadata={"meaning": meaning})

class Settings:
    def __post_init__(self):            # a dataclass calls this as soon as its fields are set
        check_settings(self)

@dataclass(frozen=True, kw_only=True)
class GPTConfig(Settings):
    """The shape of the model. The defaults give a small one, which learns a story in seconds."""
    vocab_size: int = setting(50257, "vocabulary size; the tokenizer determines it")
    context_length: int = setting(32, "context length: maximum number of tokens the model sees")
    emb_dim: int = setting(192, "embedding dimension: how many numbers represent a token")
    n_heads: int = setting(4, "attention heads in each block")
    n_layers: int = setting(2, "transformer blocks")
    drop_rate: float = setting(0.0, "dropout probability in training")
    qkv_bias: bool = setting(False, "add biases to the query, key and value layers, as in GPT-2")
    tie_weights: bool = setting(False, "tie the output head to the token embedding, as in GPT-2")
    gelu: str = setting("exact", "GELU variant: exact, or GPT-2's tanh approximation")
    position: str = setting("learned", "kind of position encoding")

# ─── Attention ─────────────────────────────────────────────────────────────────────────────────
# What follows "Once Aadhan renounced his"? In the story it is "kingdom". But this cannot be read
# from the vector of "his", which says nothing about who "he" is or what he did. The model must mix
# in information from the earlier tokens. The simplest mixture is the average of all four vectors,
# but an average treats "Once" and "Aadhan" alike, and "Once" is of no use here. Attention is an
# average as well, but a weighted one, and each token chooses its own weights.
#
# For this choice, three linear layers turn the vector of each token into three other vectors:
#
#     query    what this token is looking for
#     key      what this token can be found by
#     value    what this token passes on to those that find it
#
# Why three? "his" is looking for a person but is not one itself, so its query must differ from its
# key. "Aadhan" can be found because he is a person, but what "his" needs to know is that he is the
# prince who left. So the value differs from the key. Nobody defines what queries look for. The
# three layers are trained like all others, and what they learn is whatever makes the predictions
# better.
#
# How well a query matches a key is measured by their dot product, the attention score. Softmax
# turns all the scores of a query into its attention weights. It raises e to the power of each score
# and divides by the sum, so the weights are positive and add up to 1. Suppose that "his" has a
# score of 0 with "Once", 2 with "Aadhan", 1 with "renounced", and 0 with itself:
#
#     softmax([0, 2, 1, 0]) = [1, 7.39, 2.72, 1] / 12.11 = [0.08, 0.61, 0.22, 0.08]
#
# The sum of the values, each multiplied by its weight, is the context vector of "his". Here it
# consists mostly of what "Aadhan" passes on.
#
# Large scores would be a problem. A dot product of two vectors of dimension D is a sum of D
# products. If these are independent and each has mean 0 and variance 1, their sum has a variance of
# D, and a standard deviation of sqrt(D), which is 7 for D = 48, the length of a query in our model.
# (The paragraph on heads says why it is not 192.) So two scores often differ by 7. But softmax([7,
# 0]) is [0.999, 0.001], and with a 6 in place of the 7 it is still [0.998, 0.002]. Softmax is
# saturated. Its output hardly reacts to the scores. In other words, its derivative is almost 0, and
# by the chain rule, hardly any gradient reaches the query and key layers. Dividing all scores by
# sqrt(D) brings their standard deviation back to 1, and softmax([1, 0]) = [0.73, 0.27] reacts to
# every change. The result is scaled dot-product attention (Vaswani et al. 2017, section 3.2.1).
# Trained without this division, our model recites only a third of the story's sentences. (Try it:
# python extras/experiments.py no-scaling)
def attention_weights(queries, keys, mask):
    """Return how much each query attends to each key. Queries (..., T, D) and keys (..., S, D) give
    weights (..., T, S). Each row adds up to 1. A weight is 0 where `mask` (T, S) is True, for a
    reason explained below. (In the model, S equals T until step 13. In this example there is one
    query, so T is 1, and there are four keys, so S is 4.)

    With D = 2, the dot products of this query with the four keys are 0, 2.8, 1.4 and 0. Divided by
    sqrt(2), they are close to the scores 0, 2, 1 and 0 of the example.

    >>> his = torch.tensor([[1.4, 1.4]])
    >>> keys = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 1.0], [1.0, -1.0]])
    >>> weights = attention_weights(his, keys, mask=torch.tensor([[False, False, False, False]]))
    >>> weights
    tensor([[0.0838, 0.6069, 0.2255, 0.0838]])
    >>> values = torch.tensor([[0.0, 1.0], [10.0, 0.0], [0.0, 10.0], [1.0, 0.0]])
    >>> weights @ values        # the context vector of "his": 0.61 of Aadhan's 10, and some more
    tensor([[6.1526, 2.3390]])
    """
    D = queries.shape[-1]
    # row t, column s: the dot product of query t and key s
    scores = queries @ keys.transpose(-2, -1) / math.sqrt(D)        # (..., T, S)
    scores = scores.masked_fill(mask, -math.inf)                    # e^-inf is 0
    return scores.softmax(dim=-1)

# In training, the model reads a whole window at once and predicts the next token at every position.
# But for every position except the last, the next token is already in the window. If the model
# could attend to that token, it would just copy it. We tried this. Without the mask introduced
# below, the loss (step 9) is 0.34 after 60 of the 180 steps. With the mask it is 2.05. The low
# figure looks splendid, but the model is useless, because during generation there is no next token
# to copy. This model continues "Once Aadhan renounced his kingdom" with "Aadhan Aad Aad Aadhan
# Aadhan Aad Aad Aad Aad". ("Aad" is a token.) (Try it: python extras/experiments.py no-mask)
#
# So no token may attend to a token after it. The causal mask enforces this, and the result is
# called causal self-attention. ("Self", because queries, keys and values come from the same
# tokens.)
def causal_mask(T, S, device=None):
    """Return a mask (T, S) for the last T of S tokens. It is True where the token of the row must
    not attend to the token of the column.

    >>> causal_mask(3, 3)
    tensor([[False,  True,  True],
            [False, False,  True],
            [False, False, False]])
    """
    positions = torch.arange(S, device=device)
    return positions > positions[S - T:, None]      # broadcasting: a row against a column

# The weights of a row add up to 1, so more weight for one token means less for the others. But
# "his" needs to know who he is and also what he did. So attention is computed several times in
# parallel, by heads, each with its own attention weights. In the first block of our trained model,
# "his" gives a weight of 0.36 to "Aad", the first token of "Aadhan", in one head, and 0.46 to
# "ounced", the end of "renounced", in another. (GPT-2's tokens split both words. A short story can
# be memorized with a single head, too: python extras/experiments.py one-head)
#
# With H heads, the query, key and value layers still map C numbers to C. Their outputs are cut into
# H pieces of D = C / H numbers, 192 / 4 = 48 in our model, and each head works with its own pieces.
# So the number of parameters does not depend on H. Each of the three layers has C^2 weights, and so
# does out_proj, a linear layer that mixes what the heads have found. (`make_linear` and dropout are
# explained below. You can skip rotary, an option that the workshop explains, and the cache until
# step 13.)
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
        self.query = make_linear(C, C, config, bias=config.qkv_bias)
        self.key = make_linear(C, C, config, bias=config.qkv_bias)
        self.value = make_linear(C, C, config, bias=config.qkv_bias)
        self.out_proj = make_linear(C, C, config, added_to_x=True)
        self.dropout = nn.Dropout(config.drop_rate)

    def split_heads(self, x):
        """(B, T, C) -> (B, T, H, D): cut the C numbers of each token into H pieces. Then swap T and
        H, -> (B, H, T, D): `@` works on the last two dimensions, so the heads must not be among
        them."""
        B, T, C = x.shape
        H = self.config.n_heads
        return x.reshape(B, T, H, C // H).transpose(1, 2)

    def forward(self, x, cache=None):
        queries = self.split_heads(self.query(x))
        keys = self.split_heads(self.key(x))
        values = self.split_heads(self.value(x))
        if cache is not None:
            keys, values = cache.append(self, keys, values)         # (B, H, S, D)
        if self.config.position == "rotary":
            queries, keys = rotate(queries, keys)
        if fused_is_faster(queries):        # workshop: on a GPU, one call of torch does all this
            contexts = fused_attention(queries, keys, values, self.dropout)
        else:
            mask = causal_mask(queries.shape[2], keys.shape[2], x.device)
            weights = self.dropout(attention_weights(queries, keys, mask))
            contexts = weights @ values                             # (B, H, T, D)
        return self.out_proj(contexts.transpose(1, 2).flatten(2))   # (B, T, H, D), then (B, T, C)

# ─── The block ─────────────────────────────────────────────────────────────────────────────────
# Attention moves information between tokens. Then the feed-forward network processes each token on
# its own. It maps the C numbers to 4 C hidden units, applies an activation function to each, and
# maps the result back to C numbers. The activation function is needed because two linear layers in
# a row amount to a single linear layer, just as 3 (2x) is 6x. With it, the network can combine
# facts. Suppose that one of the C numbers is 1 if the token is "his" and 0 otherwise, and that
# another is 1 if attention has found "renounced". A hidden unit with weight 10 for both numbers and
# bias -15 receives 5 if both are 1, -5 if only one is, and -15 if neither is. GELU (Hendrycks &
# Gimpel 2016) is a smooth version of max(0, x), so it leaves the 5 almost unchanged and turns the
# negative numbers into almost 0. The second layer can then add something in favour of "kingdom" if
# both facts hold, and only then.
class FeedForward(nn.Module):
    """Two linear layers with an activation function in between, (B, T, C) -> (B, T, C).

    >>> F.gelu(torch.tensor([-15.0, -5.0, -1.0, 0.0, 1.0, 5.0])).round(decimals=2)
    tensor([-0.0000, -0.0000, -0.1600,  0.0000,  0.8400,  5.0000])
    """
    def __init__(self, config):
        super().__init__()
        self.approximate = {"exact": "none", "tanh": "tanh"}[config.gelu]       # torch's names
        self.expand = make_linear(config.emb_dim, 4 * config.emb_dim, config)
        self.project = make_linear(4 * config.emb_dim, config.emb_dim, config, added_to_x=True)

    def forward(self, x):
        return self.project(F.gelu(self.expand(x), approximate=self.approximate))

# Attention and the feed-forward network are both used in the form x = x + f(norm(x)). Why?
#
# The `x +` is the residual connection (He et al. 2016). Without it, a token would lose everything
# in its vector that f does not pass on. Attention would leave only an average over the tokens so
# far. Early in training, its weights are nearly equal, and this average is almost the same for a
# token and its neighbour. Without residual connections, the loss was still 4.6 after 180 steps,
# where it should be 0.2, and the model could not recite a single sentence. In deep models there is
# a second reason. By the chain rule, the gradient is multiplied by one factor f' per layer on its
# way back. With factors of 0.5, only 0.5^24 of it is left after 24 layers, less than a
# ten-millionth. But the derivative of x + f(x) is 1 + f'(x), and the 1 passes the gradient on
# undiminished. (It does not explode either, because the initial weights are small and keep f'
# small.) (Try it: python extras/experiments.py no-residual)
#
# The `norm` is LayerNorm (Ba et al. 2016). It takes the C numbers of a token, subtracts their mean,
# divides them by their standard deviation, and applies a scale and a shift that it learns. So every
# layer receives inputs of the same size, whatever the size of x, and can still give some dimensions
# more weight than others. Without it, our x would start so small (its standard deviation is 0.06)
# that all scores would be almost 0, and attention would stay a plain average for long. In deep
# models x grows with every block, and large inputs would give large scores, which saturate softmax.
# The original transformer used norm(x + f(x)) instead. There, the gradient must pass through every
# norm, and deep models are hard to train. In x + f(norm(x)), which is called pre-norm, it can
# bypass f and its norm along the `x +` (Xiong et al. 2020). (Try it: python extras/experiments.py
# no-norm, or post-norm)
#
# The last part is dropout (Srivastava et al. 2014). In training, it sets randomly chosen numbers in
# its input to 0 and enlarges the others to make up for it, so that the network does not come to
# rely on any one of them. This helps a model that is meant to do well on unseen text. Ours is meant
# to memorize one text, so its dropout probability is 0 by default.
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
        self.att = MultiHeadAttention(config)
        self.norm2 = make_norm(config)
        self.ff = FeedForward(config)
        self.dropout = nn.Dropout(config.drop_rate)

    def forward(self, x, cache=None):
        x = x + self.dropout(self.att(self.norm1(x), cache))
        x = x + self.dropout(self.ff(self.norm2(x)))
        return x

# Training changes the parameters, but where do they start? If all were equal, all heads would
# compute the same result and receive the same gradient, and they would stay equal forever.
# Therefore the initialization is random. The initial weights are also small, so that the first
# logits are close to 0 and no token is preferred. GPT-2 draws them from a normal distribution with
# a standard deviation of 0.02. Our vectors are shorter (192 numbers instead of 768), so dot
# products have fewer terms, and we use larger weights to make up for it.
#
# As in GPT-2, the layers whose output is added to x start with smaller weights. Each block has 2
# such layers, so x becomes a sum of n = 2 n_layers outputs. The standard deviation of a sum of n
# independent numbers is sqrt(n) times that of each, so these layers get weights that are smaller by
# this factor, and x does not grow with the number of blocks.
def init_std(config):
    """The standard deviation of the initial weights: 0.04 for our C = 192."""
    return 0.02 * math.sqrt(768 / config.emb_dim)

def make_linear(n_inputs, n_outputs, config, bias=True, added_to_x=False):
    """Return an nn.Linear with small random weights and biases of 0."""
    layer = nn.Linear(n_inputs, n_outputs, bias=bias)
    n_sums = 2 * config.n_layers if added_to_x else 1
    nn.init.normal_(layer.weight, std=init_std(config) / math.sqrt(n_sums))
    if bias:
        nn.init.zeros_(layer.bias)
    return layer

# ─── The model ─────────────────────────────────────────────────────────────────────────────────
# One thing is still missing. Scores depend on what the tokens are, not on where they stand. After
# "dog bites man" and after "man bites dog", the next token would find the same three keys, and the
# first block could not tell who bites. So each position has a learned vector of its own, its
# positional embedding, and the input of the first block is the sum of the token embedding and the
# positional embedding. The workshop has two other kinds of position encoding.
#
# (Our short story can be memorized even without positions. The model still recites 99 % of the
# sentences. Because of the causal mask, each token has mixed in only the tokens before it, so later
# blocks can infer some of the order. Try it: python extras/experiments.py no-positions)
#
# The output head is a linear layer without bias. Its weight matrix has one row of C numbers for
# every token, and the logit of a token is the dot product of x with that row. The embedding is a
# matrix of the same shape, so the two can share one matrix. This is called weight tying. GPT-2 does
# this, and our model does so with `--tie-weights`.
class GPTModel(nn.Module):
    """Token ids (B, T) -> logits (B, T, V). Raises StoryError if T exceeds the context length.

    >>> model = GPTModel(GPTConfig(vocab_size=50, context_length=8, emb_dim=32))
    >>> model(torch.tensor([[4, 8, 15], [16, 23, 42]])).shape
    torch.Size([2, 3, 50])
    """
    def __init__(self, config):
        super().__init__()
        C, V = config.emb_dim, config.vocab_size
        self.config = config
        self.tok_emb = nn.Embedding(V, C)
        nn.init.normal_(self.tok_emb.weight, std=init_std(config))
        self.pos_emb = nn.Embedding(config.context_length, C)
        nn.init.normal_(self.pos_emb.weight, std=init_std(config))
        if config.position != "learned":
            self.pos_emb = make_fixed_positions(config)             # workshop
        self.dropout = nn.Dropout(config.drop_rate)
        # a list whose modules are registered, like those assigned to attributes
        self.trf_blocks = nn.ModuleList(TransformerBlock(config) for _ in range(config.n_layers))
        self.final_norm = make_norm(config)
        self.out_head = make_linear(C, V, config, bias=False)
        if config.tie_weights:
            self.out_head.weight = self.tok_emb.weight

    def forward(self, token_ids, cache=None):
        token_ids = token_ids.to(self.tok_emb.weight.device)        # the CPU or a GPU
        start = 0 if cache is None else cache.length                # step 13
        end = start + token_ids.shape[1]
        check(end <= self.config.context_length, f"{end} tokens are more than the context length "
              f"of {self.config.context_length}: pass only the last {self.config.context_length}")
        positions = torch.arange(start, end, device=token_ids.device)
        x = self.tok_emb(token_ids) + self.pos_emb(positions)       # (B, T, C) + (T, C)
        x = self.dropout(x)
        for block in self.trf_blocks:
            x = block(x, cache)                                     # (B, T, C)
        if cache is not None:       # when generating, only the logits of the last token are needed
            x = x[:, -1:]
        return self.out_head(self.final_norm(x))                    # (B, T, V)

# ═══ Step 7: a batch through the untrained model ═══════════════════════════════════════════════
# Before we train the model, let us push a batch of two windows through it and look at the shapes.
# The command `model` does this. Its last column counts the parameters. More than half of them are
# in the blocks. Each block has 12 C^2 weights (4 C^2 in attention and 8 C^2 in the feed-forward
# network), plus 10 C biases and scales. Almost all the others belong to the vocabulary, in tok_emb
# and out_head.
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
# Three kinds of numbers should not be confused. Parameters are learned and stored. Activations,
# such as the outputs listed above, are computed anew for every batch. Gradients exist only in
# training, one number for each parameter.
def count_parameters(module):
    """Count the parameters that training can change. Here they are 3 x 2 weights and 2 biases:

    >>> count_parameters(nn.Linear(3, 2))
    8
    """
    return sum(p.numel() for p in module.parameters() if p.requires_grad)

# ═══ Step 8: greedy generation ═════════════════════════════════════════════════════════════════
# Now we let the model write. Greedy decoding takes the token with the highest logit each time. The
# untrained model writes only noise:
#
#     $ python story_llm.py generate --untrained --max-new-tokens 8
#     Once Aadhan renounced his kingdom keeps reached keeps reachedum mor wrote mor
def generate_text_simple(model, idx, max_new_tokens, context_size):
    """Append `max_new_tokens` tokens to the token ids idx (B, T), chosen greedily. The model sees
    the last `context_size` tokens.

    Any function from ids to logits can serve as the model. This one knows five tokens. After each
    token it predicts the next one, and after the last token the first:

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
            logits = model(idx_cond)                                # (B, T, V)
        logits = logits[:, -1, :]                                   # the last position, (B, V)
        idx_next = torch.argmax(logits, dim=-1, keepdim=True)       # (B, 1)
        idx = torch.cat([idx, idx_next.to(idx.device)], dim=1)      # (B, T + 1)
    return idx

# ═══ Step 9: the loss before training, and recall ══════════════════════════════════════════════
# How wrong are the predictions? Softmax turns the logits into probabilities. For each example, take
# the probability p that the model gave to the token that really came next. The cross-entropy loss
# is -ln(p). It is 0 if the model was certain and right, and it grows as p falls: 0.69 for p = 1/2,
# 2.3 for 1/10, 9.2 for 1/10,000. The loss of a batch is the mean over all its examples.
#
# An untrained model has logits close to 0, so that after softmax every token gets about 1/2079,
# whatever the text says. Its loss should be about -ln(1/2079) = ln(2079) = 7.64. In fact it is a
# little higher, because the logits are not exactly 0, and unequal predictions cost more on average.
# Suppose that two tokens are equally frequent. A model that gives each a probability of 0.5 has a
# loss of 0.69. With 0.6 and 0.4, its loss is 0.51 or 0.92, which is 0.71 on average. A loss much
# above ln(V) before training indicates a bug.
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
    targets = targets.flatten().to(logits.device)       # (B * T,)
    # cross_entropy computes softmax, -ln(p) and the mean. Prompt windows (step 10) near the end of
    # the text are filled up with padding, which is left out of the mean.
    return F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX)

# The loss does not tell us what we most want to know. Can the model continue the story? So we test
# it. Recall is the share of sentences that the model continues word for word from their first five
# words alone. The continuation must match for at least 80 characters (fewer at the end of the
# text), and may reach into the next sentence. (Research papers call this verbatim memorization,
# Carlini et al. 2023.) The test is hard, because nothing before those five words tells the model
# where in the story it is. The test uses the training split, because no model could guess the
# sentences of the validation split.
def recall_tests(text):
    """Return [(prompt, continuation)] for every sentence of at least eight words. The prompt is its
    first five words. The continuation is what follows in the text, at least 80 characters (fewer at
    the end of the text). Sentences with the same five words and different continuations are left
    out, because no model could tell them apart.

    >>> recall_tests("They went upriver that same week, nine days by boat.")
    [('They went upriver that same', ' week, nine days by boat.')]
    """
    continuations = defaultdict(set)        # {the first five words: what follows them}
    prompts = set()
    for start, end in pairwise([*sentence_starts(text), len(text)]):        # workshop
        words = find_words(text[start:end])
        if len(words) >= 5:     # those below 8 are not tested, but may begin like one that is
            fifth_word_end = start + words[4].end()
            prompt = text[start:fifth_word_end]
            continuations[prompt].add(whole_words(text, fifth_word_end, length=80))     # workshop
            if len(words) >= 8:
                prompts.add(prompt)
    return [(prompt, found.pop()) for prompt, found in continuations.items()
            if len(found) == 1 and prompt in prompts]

# To check a sentence we need not generate token by token. We show the model the prompt together
# with the right continuation, in one pass, and compare its prediction at each position with the
# token that follows. As long as they agree, greedy decoding would have written exactly these
# tokens. (This relies on the causal mask. A model without it sees the answers, and the test is
# worthless.)
def recites(model, tokenizer, prompt, continuation):
    """Return whether greedy decoding would continue the prompt with exactly this continuation."""
    prompt_ids = tokenizer.encode(prompt)
    token_ids = torch.tensor(prompt_ids + tokenizer.encode(continuation))
    # predictions[i] is what the model predicts after token i; workshop: argmax, in one pass
    predictions = greedy_predictions(model, token_ids[:-1])
    n = len(prompt_ids)
    return torch.equal(predictions[n - 1:], token_ids[n:])

def share_recited(model, tokenizer, tests):
    """Return the share of the tests that the model passes, from 0 to 1."""
    hits = [recites(model, tokenizer, prompt, continuation) for prompt, continuation in tests]
    return sum(hits) / max(len(tests), 1)

# Before training, loss and recall are as bad as expected. A hit takes some twenty right tokens in a
# row, so a model that guesses has no chance.
#
#     $ python story_llm.py evaluate --untrained
#     an untrained model:
#       Train loss                 7.781 (perplexity 2,395.67; 2.750 bits per character)
#       Val loss                   7.803 (perplexity 2,448.14; 2.787 bits per character)
#       ln(2079), uniform guess    7.640
#     Recall 0.0%: 0 of 175 sentences continued word for word from their first five words
#
# The figures in parentheses are two other forms of the loss. Perplexity is e raised to the power of
# the loss, the number of equally likely tokens among which the model would be just as uncertain.
# Loss and perplexity depend on how the text is split into tokens, so they cannot be used to compare
# models whose tokenizers differ. Bits per character can be used for that. They are the losses of
# all tokens added up, divided by the number of characters, and by ln(2) to get bits.

# ═══ Step 10: training ═════════════════════════════════════════════════════════════════════════
# Training repeats one step. Take a batch of windows, compute the loss and its gradient, and change
# all parameters a little so that the loss falls.
#
# Plain gradient descent moves every parameter by -lr times its gradient, where lr is the learning
# rate. That works badly here, because gradients differ by orders of magnitude between parameters.
# Adam (Kingma & Ba 2015) makes their steps comparable. For each parameter it keeps two moving
# averages, one of its gradients, in which the noise of single batches cancels, and one of their
# squares. (Both are corrected for having started at 0.) It moves the parameter by -lr times the
# first average divided by the square root of the second. So gradients of 3, 1, 2 and of 0.03, 0.01,
# 0.02 have the same effect, and a gradient that keeps flipping between 3 and -3 has hardly any.
# (Try it: python extras/experiments.py gradient-descent)
#
# AdamW (Loshchilov & Hutter 2019) adds weight decay, which shrinks all weights a little in each
# step. Like dropout, it is a form of regularization, which limits a model to help it generalize,
# that is, do well on unseen text. Ours is meant to memorize, so its weight decay is 0, which makes
# AdamW the same as Adam.
def make_optimizer(model, config):
    """Return an optimizer that decays only matrices, because a norm would suffer if its scale
    shrank."""
    if config.optimizer == "muon":
        return Muon(model, config)      # workshop
    groups = [{"params": [p for p in model.parameters() if p.dim() >= 2],
               "weight_decay": config.weight_decay},
              {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}]
    # The averages cover about the last 1 / (1 - beta) steps: 10 gradients and 50 squares.
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98), fused=True)

# The learning rate changes during training. In the first steps, Adam's averages rest on a few
# batches and are not reliable, so the learning rate rises from near 0. This is called warm-up.
# Later, large steps would overshoot the minimum again and again, so after the warm-up the learning
# rate falls linearly towards 0. (Try it: python extras/experiments.py no-warm-up, or
# high-learning-rate)
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

# These are the hyperparameters of training. The rest of this step explains most of those that we
# have not met yet, and the workshop explains Muon and bf16.
@dataclass(frozen=True, kw_only=True)
class TrainConfig(Settings):
    """How the model is trained."""
    epochs: int = setting(0, "passes over the training text (0: enough to memorize it)")
    max_steps: int = setting(0, "total training steps; overrides --epochs (0: use --epochs)")
    batch_size: int = setting(32, "windows in a batch")
    optimizer: str = setting("adamw", "AdamW or Muon")
    learning_rate: float = setting(2.5e-3, "peak learning rate (Muon multiplies it by 4)")
    warmup_steps: int = setting(20, "learning-rate warm-up steps, at most a tenth of all steps")
    weight_decay: float = setting(0.0, "weight decay")
    grad_clip: float = setting(1.0, "clip the gradient norm to this")
    prompt_windows: float = setting(0.5, "share of windows that start where a prompt would, "
                                  "rounded down")
    val_fraction: float = setting(0.1, "share of the text kept for validation")
    eval_every: int = setting(0, "steps between evaluations, besides two early ones (0: 5 % of all "
                            "steps, at least 45)")
    keep_best: bool = setting(False, "early stopping: stop when the validation loss no longer "
                              "falls, and keep the best weights")
    precision: str = setting("auto", "auto: bf16 where the hardware makes it faster, else "
                            "fp32, which is TF32 on an NVIDIA GPU in training")
    seed: int = setting(42, "random seed")

# From here on, a `corpus` (class Corpus in the workshop) holds both splits of the text, their token
# ids, and the tokenizer. A `run` (class Run) holds everything else that belongs to a training run:
# the model, the configurations, the optimizer, the steps done so far, and the history.
def training_step(run, inputs, targets):
    """Train on one batch; inputs and targets are token ids of shape (B, T). Set `run.loss` to the
    loss before the step."""
    config = run.train_config
    run.model.train()                   # training mode: dropout is on
    run.optimizer.zero_grad()           # `backward` adds to the gradients, so clear the old ones
    with mixed_precision(run), dropout_seed(run):       # workshop: faster, and reproducible
        loss = batch_loss(run.model, inputs, targets)
    run.model.eval()                    # evaluation mode: dropout is off again
    loss.backward()                     # goes back through what was recorded in training mode
    # A single unusual batch can have a gradient many times longer than the others and spoil Adam's
    # averages for many steps. The gradient of all parameters is one long vector, and the length of
    # this vector is its norm. Gradient clipping scales the gradient down to a norm of grad_clip if
    # it is longer.
    norm = nn.utils.clip_grad_norm_(run.model.parameters(), config.grad_clip)
    run.loss = loss.item()              # a Python number
    check_finite(run, run.loss + norm.item())       # workshop: stops if one is NaN or infinite
    for group in run.optimizer.param_groups:        # where torch keeps the learning rate
        group["lr"] = learning_rate(run.step, run.total_steps, config)
    run.optimizer.step()

# A batch contains two kinds of windows. The first kind is the sliding windows of step 5. If they
# always started at the same places in the story, each token would always stand at the same position
# in its window, and the model would recognize a passage poorly at other positions. So in every
# epoch, that is, in every pass over the text, the text is cut into windows from a different random
# offset.
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

# The second kind is prompt windows. During generation, a prompt starts at position 0. Its first
# word has no space before it, so it is tokenized differently than in the middle of the text.
# Sliding windows almost never look like this. Therefore half of the windows in each batch start
# where a prompt would, and are tokenized like a prompt. Most start at the beginning of a sentence,
# as in the recall test, and one in five starts at a random word. Without prompt windows, recall is
# 94 % after the same number of steps (python extras/experiments.py no-prompt-windows).
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
    sentences = shuffled(sentence_starts(text), seed + 1)
    words = shuffled(word_starts(text), seed + 2)
    while True:
        yield from islice(sentences, n_prompts - n_words)
        yield from islice(words, n_words)

IGNORE_INDEX = -100     # the target of padding; the loss ignores it

def prompt_window(corpus, start, T):
    """Return T + 1 token ids of the training text, starting at character `start`. Where the text
    ends, `<|endoftext|>` follows, and then padding."""
    end = start + 32 * (T + 1)      # hardly any token has more than 32 characters
    token_ids = corpus.tokenizer.encode(corpus.train_text[start:end])
    if end >= len(corpus.train_text):
        token_ids.append(corpus.tokenizer.end_of_text)
    token_ids = token_ids[:T + 1]
    return token_ids + [IGNORE_INDEX] * (T + 1 - len(token_ids))

# A batch of our story model consists of 16 sliding windows and 16 prompt windows. `in_batches` in
# the workshop cuts an endless stream into lists, one for each step, and skips those of the steps
# that a resumed run has already done.
def training_batches(run, corpus):
    """Yield (inputs, targets), each of shape (B, T), until `run.step`, which the caller increases,
    is the last step. The batch of a step depends on the text, the settings and the seed, but not on
    earlier steps, so a resumed run sees the same batches as an uninterrupted one."""
    config, T = run.train_config, run.config.context_length
    n_prompts = int(config.prompt_windows * config.batch_size)
    windows = SlidingWindowDataset(corpus.train_ids, T)     # stride 1: one for every start
    starts = window_starts(len(windows), T, config.seed)
    sliding = in_batches(starts, config.batch_size - n_prompts, skip=run.step)
    starts = prompt_starts(corpus.train_text, n_prompts, config.seed)
    prompts = in_batches(starts, n_prompts, skip=run.step)
    while run.step < run.total_steps:
        inputs, targets = windows[torch.tensor(next(sliding), dtype=torch.long)]
        rows = [prompt_window(corpus, start, T) for start in next(prompts)]
        rows = torch.tensor(rows, dtype=torch.long).reshape(-1, T + 1)      # even if it is empty
        # As an input, padding can be any token. It comes last, so no real token attends to it.
        inputs = torch.cat([inputs, rows[:, :-1].clamp(min=0)])
        yield inputs, torch.cat([targets, rows[:, 1:]])

# Now all the parts are in place. From time to time the run is evaluated. An evaluation contains the
# losses on some windows of both splits, recall on some sentences, and a sample of what the model
# writes.
def train(run, corpus):
    """Train a run to its last step. This function is a generator: after every step it hands control
    to the caller, who may print, draw or save, and who can stop the training by leaving the loop.
    Raises StoryError if the loss becomes NaN or infinite.

    Here a tiny model learns to count, from a text of 27 words:

    >>> corpus = corpus_from_text("one two three " * 9, "word", context_length=4)
    >>> config = GPTConfig(context_length=4, emb_dim=16, n_layers=1)
    >>> run = new_run(corpus, config, TrainConfig(max_steps=40, learning_rate=0.01))
    >>> for _ in train(run, corpus):
    ...     if run.step == 1:
    ...         first_loss = run.loss
    >>> first_loss > 1.5 and run.loss < 0.1
    True
    >>> "".join(generate_text(run.model, run.tokenizer, "two three", 4))
    ' one two three one'
    """
    start_optimizer(run)        # workshop: make_optimizer, plus the saved state of a resumed run
    if run.step == 0:
        run.history = []
        record_evaluation(run, corpus)
    for inputs, targets in training_batches(run, corpus):
        training_step(run, inputs, targets)
        run.step += 1
        if evaluation_due(run):
            record_evaluation(run, corpus)      # in run.history
        yield run

# Here is the log of training on our story. (Some of its evaluations and the ends of its lines are
# left out.) The training split has 4,579 tokens. Nine steps make an epoch, in which the sliding
# windows cover them once and the prompt windows show about as many tokens again. The second line of
# each evaluation is the sample: the prompt, three dots, and what the model writes, with \n for a
# line break. (The first sample begins with a full stop.)
#
#     $ python story_llm.py train
#     ...
#     Ep 1 (Step 000009): Train loss 6.172, Val loss 6.260, recall 0%, 26,340 tokens/s, 0:07 left
#         Once Aadhan renounced his kingdom ....\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n
#     Ep 5 (Step 000045): Train loss 2.857, Val loss 5.058, recall 0%, 38,633 tokens/s, 0:04 left
#         Once Aadhan renounced his kingdom ..., and he had been in his in the wall, and he had been
#     Ep 10 (Step 000090): Train loss 0.857, Val loss 5.715, recall 56%, 40,750 tokens/s, 0:02 left
#         Once Aadhan renounced his kingdom ... for the love of Thamarai, and then, the story had to
#     Ep 20 (Step 000180): Train loss 0.222, Val loss 6.266, recall 100%, 42,209 tokens/s, 0:00 left
#         Once Aadhan renounced his kingdom ... for the love of Thamarai, its people living in fear
#
# The training loss and recall say that the model has learned the story. The loss is not 0, because
# at the start of a window the model sees a single token, such as " the", and nothing tells it which
# word follows. The loss is 2.8 at the first position, 0.4 at the fourth and 0.06 from the eleventh
# on. The validation loss falls at first, as the model learns patterns that hold in both splits,
# such as that a comma is often followed by "and". Then it rises again. This is overfitting: what
# the model learns from here on is true of the training split alone. It memorizes. In the training
# split, for example, "A ferry goes back and forth" is followed by "and", while the validation split
# has "going back and forth with the rope". After 45 steps the model gives this "with" a probability
# of about 1/36. In the end it is certain of "and", and "with" gets about 1/10,000. The loss of this
# token has risen from 3.6 to 9.3. Being certain and wrong costs far more than being uncertain.
#
# With a single short story, a model can do little but memorize, and that is what we wanted. To
# generalize, a model needs far more text. The validation loss tells us how well our model does on
# the rest of the same story. As an estimate for other texts, even that would be too optimistic.

# ═══ Step 11: save and load ════════════════════════════════════════════════════════════════════
# Everything in a run goes into one file, a checkpoint. With it, the model can generate text even
# without the story, and training can continue as if it had never stopped.
def save_checkpoint(path, run):
    """Save a run as a plain `torch.save` file. Raises StoryError if that fails; an old file is kept
    in that case.

    >>> import tempfile
    >>> run = new_run(corpus_from_text("They went upriver for nine days.", "word"))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_checkpoint(folder + "/run.pt", run)
    ...     loaded = load_checkpoint(folder + "/run.pt")
    >>> loaded.config == run.config, loaded.tokenizer.encode("They went")
    (True, [6, 4])
    """
    atomic_save(path, {         # workshop: torch.save to a temporary file, then rename it
        "format": FORMAT,
        "config": asdict(run.config),
        "train_config": asdict(run.train_config),
        "tokenizer": {"kind": run.tokenizer.kind, "tokens": run.tokenizer.tokens},
        "weights": run.model.state_dict(),                      # {name: tensor}
        "best_weights": run.best_weights,                       # with --keep-best
        "optimizer": optimizer_state(run),                      # its moving averages
        "history": [asdict(evaluation) for evaluation in run.history],
        "test_loss": loss_on_test_window(run.model),
        **{name: getattr(run, name) for name in PLAIN_FIELDS}})     # the step, the prompt, ...

# Loading needs more care, because a file may come from anywhere. torch.save uses Python's pickle
# format, and a pickle can run any code when it is loaded. torch's `weights_only=True` refuses that
# and accepts tensors and plain values only. The last step is a test. When the model was saved, its
# loss on a fixed window was saved with it. If the same weights now give a different loss, the code
# of the model has probably changed since.
def load_checkpoint(path, device="cpu"):
    """Load a run, ready to generate (`.model`, `.tokenizer`) or to resume training. Raises
    StoryError if there is no such file, if it is damaged, or if it is not a checkpoint of this
    program."""
    saved = read_checkpoint(path)           # workshop: torch.load(path, weights_only=True), checks
    model = new_model(saved["config"])      # workshop: GPTModel
    model.load_state_dict(saved["weights"])
    check_test_loss(path, model, saved["test_loss"])
    return Run(model.to(choose_device(device)), saved["tokenizer"], saved["train_config"],
               saved_optimizer=saved["optimizer"], history=saved["history"],
               best_weights=saved["best_weights"],
               **{name: saved[name] for name in PLAIN_FIELDS})

# ═══ Step 12: loss curves ══════════════════════════════════════════════════════════════════════
# The picture that `train` draws, loss.png, shows what the log has told us. While both losses fall,
# the model learns patterns that carry over to unseen text. When the validation loss rises again,
# the model is overfitting. If both stay near ln(V), nothing is learned, perhaps because the
# learning rate is much too low or high.
def plot_losses(history, vocab_size, path=None):
    """Draw the losses and the recall of a history, and save the picture if a path is given (.png,
    .svg or .pdf). Return the figure.

    >>> history = [     # step, epoch, training loss, validation loss, recall, prompt, sample
    ...     Evaluation(0, 0.0, 7.8, 7.8, 0.0, "", ""), Evaluation(9, 1.0, 6.1, 6.2, 0.0, "", "")]
    >>> [curve.get_label() for curve in plot_losses(history, vocab_size=2079).axes[0].lines]
    ['training', 'validation', 'lowest validation loss, 6.20', 'uniform guess, ln(2,079)']
    """
    check(history, "there is no history to draw: train first")
    figure = new_figure(figsize=(8, 5.5), layout="constrained")     # workshop: a matplotlib Figure
    losses, recall = figure.subplots(2, height_ratios=(4, 1), sharex=True)

    epochs = [evaluation.epoch for evaluation in history]
    for axes, name, style, label in ((losses, "train_loss", "o-", "training"),
                                     (losses, "val_loss", "s--", "validation"),
                                     (recall, "recall", "D-", "recall")):
        values = [getattr(evaluation, name) for evaluation in history]
        if None not in values:          # a short text may have no validation split
            axes.plot(epochs, values, style, label=label)
    best = best_evaluation(history)     # workshop
    if best is not None:
        losses.plot(best.epoch, best.val_loss, "*", color="black", markersize=11,
                    label=f"lowest validation loss, {best.val_loss:.2f}")
    losses.axhline(math.log(vocab_size), color="gray", linestyle=":",
                   label=f"uniform guess, ln({vocab_size:,})")
    losses.set(title="What the model learned", ylabel="loss per token", ylim=(0, None))
    losses.legend()
    recall.set(xlabel="epochs", ylabel="recall", ylim=(-0.05, 1.05))
    recall.yaxis.set_major_formatter("{x:.0%}")
    return save_figure(figure, path)

# ═══ Step 13: inference from the saved file ════════════════════════════════════════════════════
# `generate_text_simple` runs the whole window through the model for every new token. That is
# wasteful. Because of the causal mask, a token's vectors depend only on itself and the tokens
# before it, so they do not change when another token is appended. Only the vectors of the new token
# have to be computed, and this requires only the keys and values of the earlier tokens. The
# key-value cache keeps them. So the queries of T new tokens meet the keys of S tokens, the old and
# the new.
#
# This works until the window is full. After that, each new token pushes the first token out of the
# window. The other tokens had attended to it, and they move to other positions, so their vectors
# change and must be computed again. The cache is emptied, and from then on it saves no time. (Now
# return to the lines with `cache` in the two `forward` methods of step 6. In GPTModel, `start` is
# the position of the first new token.)
class KeyValueCache:
    """The keys and values so far, each of shape (B, H, S, D), for every attention layer."""
    def __init__(self):
        self.layers = {}        # {attention layer: (keys, values)}
        self.length = 0         # S, the number of tokens they belong to

    def append(self, layer, keys, values):
        """Append the keys and values of new tokens to those of a layer, and return all of them."""
        if layer in self.layers:
            old_keys, old_values = self.layers[layer]
            keys = torch.cat([old_keys, keys], dim=2)
            values = torch.cat([old_values, values], dim=2)
        self.layers[layer] = (keys, values)
        self.length = keys.shape[2]
        return keys, values

# Greedy decoding suits a story that is known by heart. Otherwise it soon repeats itself, and we get
# better text by sampling, where the next token is drawn at random according to its probability.
# Three settings change these probabilities. The temperature divides the logits before softmax.
# Since softmax exponentiates, that raises every probability to the power 1/temperature and then
# rescales the results so that they add up to 1. Values below 1 favour the most likely tokens, and
# values above 1 the others. Top-k keeps the k most likely tokens. Top-p, or nucleus sampling
# (Holtzman et al. 2020), takes the most likely tokens one by one until their probabilities add up
# to p.
@dataclass(frozen=True, kw_only=True)
class Sampling(Settings):
    """How the next token is chosen."""
    temperature: float = setting(0.0, "0: greedy decoding; higher: more randomness")
    top_k: int = setting(0, "sample from the k most likely tokens (0: all)")
    top_p: float = setting(1.0, "sample from the most likely tokens with total probability p")
    seed: int = setting(42, "random seed")

def next_token_probabilities(logits, sampling):
    """From logits (..., V), compute the probabilities (..., V) with which the next token is chosen.

    >>> logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    >>> next_token_probabilities(logits, Sampling(temperature=1.0))
    tensor([0.6439, 0.2369, 0.0871, 0.0321])
    >>> next_token_probabilities(logits, Sampling(temperature=0.5))     # their squares, rescaled
    tensor([0.8650, 0.1171, 0.0158, 0.0021])
    >>> next_token_probabilities(logits, Sampling(temperature=1.0, top_k=2))
    tensor([0.7311, 0.2689, 0.0000, 0.0000])
    >>> next_token_probabilities(logits, Sampling(temperature=1.0, top_p=0.9))
    tensor([0.6652, 0.2447, 0.0900, 0.0000])

    In the last example, the probabilities before each token add up to 0, 0.64, 0.88 and 0.97. The
    first three of these sums are below 0.9, so three tokens are kept.
    """
    if sampling.temperature < 1e-4:     # as good as 0
        return F.one_hot(logits.argmax(dim=-1), logits.shape[-1]).float()
    probabilities = (logits / sampling.temperature).softmax(dim=-1)
    sorted_probs, token_ids = probabilities.sort(dim=-1, descending=True)
    if sampling.top_k > 0:
        sorted_probs[..., sampling.top_k:] = 0
        sorted_probs /= sorted_probs.sum(dim=-1, keepdim=True)
    sum_before = sorted_probs.cumsum(dim=-1) - sorted_probs
    if sampling.top_p < 1:
        sorted_probs[sum_before >= sampling.top_p] = 0
    # scatter undoes the sorting: it moves each probability back to the position of its token.
    kept = torch.zeros_like(probabilities).scatter(-1, token_ids, sorted_probs)
    return kept / kept.sum(dim=-1, keepdim=True)

def predict_next(model, window, sampling, cache):
    """The probabilities (B, V) of the token after a window (B, T). If the cache already knows the
    first tokens of the window, only the others are computed."""
    with torch.no_grad():
        logits = model(window[:, cache.length:], cache)[:, -1, :]
    return next_token_probabilities(logits.float().cpu(), sampling)

def generate(model, token_ids, max_new_tokens, sampling=None):
    """Continue token ids (B, T). This generator yields a tensor (B,) of new ids at every step. With
    greedy decoding, these are the ids that `generate_text_simple` would append (unless rounding
    decides between two tokens), but computed faster."""
    sampling = sampling or Sampling()
    context_length = model.config.context_length
    window = token_ids[:, -context_length:].cpu()
    generator = torch.Generator().manual_seed(sampling.seed)     # CPU: same numbers on any device
    cache = KeyValueCache()
    for _ in range(max_new_tokens):
        probabilities = predict_next(model, window, sampling, cache)
        new = torch.multinomial(probabilities, 1, generator=generator)      # draw ids, (B, 1)
        yield new[:, 0]
        if window.shape[1] == context_length:       # full: the window slides
            window = window[:, 1:]
            cache = KeyValueCache()
        window = torch.cat([window, new], dim=1)

# (`generate_text` in the workshop turns these ids into text, and stops at `<|endoftext|>`.)
#
# The model that began with noise now recites:
#
#     $ python story_llm.py generate --prompt "Once Aadhan renounced" --max-new-tokens 14
#     Once Aadhan renounced his kingdom for the love of Thamarai, its people living in
#
# ─── What you have built, and what ChatGPT adds ────────────────────────────────────────────────
# You have built a decoder-only transformer with pre-norm, learned positions and causal multi-head
# self-attention. It was trained by next-token prediction, with cross-entropy as the loss, AdamW as
# the optimizer, warm-up and linear decay as the schedule, and gradient clipping. It is
# autoregressive and generates with a key-value cache. You can now read the model of nanoGPT, a
# well-known small implementation of GPT-2, or the description in the GPT-2 paper, and find hardly
# anything new.
#
# To get new text in the manner of a story, rather than the story itself, give the model more text
# than it can memorize, turn on weight decay or dropout, keep the weights with the lowest validation
# loss, and sample instead of decoding greedily. For a text of 100 KB or more, `train --preset
# writer` turns on weight decay and keeps the best weights, and `generate --temperature 0.8`
# samples.
#
# GPT-3 (2020) has 175 billion parameters, 100,000 times as many as our model, and was trained on
# hundreds of billions of tokens. With so much text, memorizing does not get a model far, and it has
# to learn the patterns of language, facts and arguments. This is called pre-training. The result is
# a model that continues any text. To turn it into one that answers, as ChatGPT does, it is
# fine-tuned on dialogues, which is the loop of step 10 with other texts. Then comes reinforcement
# learning. The model writes answers itself, each is given a score that reflects what people prefer,
# and training makes answers with a high score more probable.
#
# Further reading
#   Gage 1994, A new algorithm for data compression
#   Srivastava et al. 2014, Dropout: a simple way to prevent neural networks from overfitting
#   Kingma & Ba 2015, Adam: a method for stochastic optimization
#   Ba et al. 2016, Layer normalization
#   He et al. 2016, Deep residual learning for image recognition
#   Hendrycks & Gimpel 2016, Gaussian error linear units (GELUs)
#   Sennrich et al. 2016, Neural machine translation of rare words with subword units
#   Vaswani et al. 2017, Attention is all you need
#   Radford et al. 2019, Language models are unsupervised multitask learners (GPT-2)
#   Loshchilov & Hutter 2019, Decoupled weight decay regularization (AdamW)
#   Xiong et al. 2020, On layer normalization in the transformer architecture
#   Holtzman et al. 2020, The curious case of neural text degeneration
#   Carlini et al. 2023, Quantifying memorization across neural language models
#   On other options of this file: Su et al. 2021 (RoFormer); Jordan et al. 2024, Liu et al. 2025
#   and Amsel et al. 2025 (Muon)

# ═══ Workshop: settings, checks and errors ═════════════════════════════════════════════════════
# The workshop has little more to say about language models. It makes the lesson's code robust, fast
# and portable, in functions that the lesson calls.
import argparse
import codecs
import contextlib
import ctypes
import difflib
import functools
import hashlib
import io
import itertools
import reprlib
import shlex
import signal
import subprocess
import threading
import time
import zipfile

class StoryError(ValueError):
    """An error that the user can fix. The message names what is wrong and the remedy, and the
    command line prints it on one line. Other exceptions are bugs and show a traceback, unless
    memory has run out or a package is missing."""

def check(condition, message):
    """Raise StoryError(message) unless the condition holds."""
    if not condition:
        raise StoryError(message)

LIMITS = {      # {setting: (minimum, exclusive maximum)}; many are there only to catch typos
    "vocab_size": (1, 1 << 24), "context_length": (1, 1 << 20), "emb_dim": (1, 1 << 16),
    "n_heads": (1, 1 << 16), "n_layers": (1, 1 << 10), "drop_rate": (0, 1),
    "epochs": (0, 1 << 22), "max_steps": (0, 1 << 22), "batch_size": (1, 1 << 16),
    "learning_rate": (1e-9, 1e9), "warmup_steps": (0, 1 << 22), "weight_decay": (0, 1e9),
    "grad_clip": (1e-9, math.inf), "prompt_windows": (0, 1), "val_fraction": (0, 1),
    "eval_every": (0, 1 << 22), "seed": (0, 1 << 32), "temperature": (0, math.inf),
    "top_k": (0, 1 << 24), "top_p": (1e-9, math.inf),
    "max_new_tokens": (0, 1 << 24), "sentences": (0, 1 << 24), "stride": (0, 1 << 24)}
CHOICES = {
    "gelu": ("exact", "tanh"), "position": ("learned", "sinusoidal", "rotary"),
    "optimizer": ("adamw", "muon"), "precision": ("auto", "bf16", "fp32"),
    "tokenizer": ("auto", "gpt2", "story", "word"),
    "preset": ("auto", "story", "writer", "gpt2-small")}

def check_settings(settings):
    """Compare every field of a settings class with its type and limits. Raises StoryError."""
    for f in fields(settings):
        value = getattr(settings, f.name)
        valid, allowed = type(value) is f.type, f"of type {f.type.__name__}"
        if f.name in CHOICES:
            valid, allowed = value in CHOICES[f.name], "one of " + ", ".join(CHOICES[f.name])
        elif f.type in (int, float):
            lowest, bound = LIMITS[f.name]
            valid = type(value) in (int, f.type) and lowest <= value < bound
            kind = "an integer" if f.type is int else "a number"
            allowed = f"{kind}, at least {lowest}"
            if bound < math.inf:
                allowed += f" and below {bound}"
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

# ═══ Workshop: text files, words and sentences ═════════════════════════════════════════════════
def read_files(paths):
    """Return [(path, bytes)]. A folder means all .txt files directly in it, and "-" means standard
    input. Raises StoryError if a file cannot be read or a folder has no .txt file."""
    files, found = [], []
    for path in [paths] if isinstance(paths, (str, os.PathLike)) else paths:
        inside = sorted(Path(path).glob("*.txt")) if os.path.isdir(path) else [path]
        check(inside, f"the folder {path} contains no .txt file: give a text file with --text")
        files += inside
    for file in files:
        try:
            data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        except OSError as error:
            raise StoryError(f"{file} cannot be read ({error.strerror}): give a text file with "
                             "--text") from None
        found.append((file, data))
    return found

FILE_TYPES = {      # {the first bytes of a file: the kind of file}
    b"PK\x03\x04": "a zip file (Word documents are zip files)",
    b"\xd0\xcf\x11\xe0": "an old Office document, such as .doc", b"{\\rtf": "an RTF document",
    b"%PDF": "a PDF file", b"\x1f\x8b": "compressed with gzip", b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture"}

def decode(data, path, encoding=""):
    """Decode the bytes of a file. With an encoding, invalid bytes become �. Without one, they are
    read as UTF-8. If they begin with a byte order mark of UTF-16 or contain zeros, UTF-16 and
    UTF-32 are tried as well, and the most plausible text is returned. Raises StoryError if the file
    is recognizably not plain text, if the encoding is unknown, or if no encoding fits."""
    for beginning, kind in FILE_TYPES.items():
        check(not data.startswith(beginning), f"{path} is {kind}, not plain text: convert it to "
              "plain text in UTF-8 first")
    names = [encoding or "utf-8"]
    if not encoding and (b"\0" in data or data[:2] in (b"\xff\xfe", b"\xfe\xff")):
        names += ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"]
    texts = []
    for name in names:
        try:
            texts.append(data.decode(name, errors="replace" if encoding else "strict"))
        except UnicodeDecodeError as error:
            position = error.start
        except (LookupError, UnicodeError):
            raise StoryError(f"there is no encoding named {encoding!r}: try utf-8, utf-16 or cp1252"
                             ) from None
    if not texts:
        check(len(names) == 1, f"{path} is not in UTF-8, and not valid UTF-16 or UTF-32: if it "
              "should be UTF-16, --encoding utf-16 reads it and replaces what is wrong")
        raise StoryError(
            f"{path} is not in UTF-8 (line {data.count(10, 0, position) + 1} contains the byte "
            f"0x{data[position]:02x}): name its encoding, such as --encoding cp1252 for Western "
            "European text from Windows; if only a few bytes are wrong, --encoding utf-8 replaces "
            "them")
    best = min(texts, key=lambda text: (text[:1] != "\ufeff", count_oddities(text)))
    return best.removeprefix("\ufeff")

def count_oddities(text):
    """Return the number of control characters in a text, plus the number of blocks of 256 code
    points that its characters come from. Both are large if the encoding is wrong."""
    return len(CONTROL.findall(text)) + len({ord(character) >> 8 for character in set(text)})

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
# A sentence begins at the start of the text, after an empty line, and after . ! ? and the like. No
# pattern is always right. This one finds no new sentence after Mr. or an initial (but "I" counts as
# a word). After a quotation, a lower-case letter continues the sentence, as in "No!" she cried. In
# a text whose sentences begin in upper case, a lower-case letter continues the sentence everywhere,
# as in "Oh! how" and "5 p.m. in".
GAP = r"(?=\s) [^\S\n]*+ \n?+ [^\S\n]*+ (?!\n)"        # white space without an empty line
LOWER = r"[\p{P}\s]{0,9} \p{Ll}"                        # lower case, perhaps after quotes or dashes
SENTENCE_START = regex.compile(rf"""
    (?: \A | \n[^\S\n]*\n                   # the start of the text, an empty line
      | [。！？]["'”’」』）]*                  # an end that needs no space after it
      | (?: (?<! \b(?: (?i:mr|mrs|ms|dr|st|prof) | (?!I)\p{{Lu}} ) ) \. | [!?…।॥؟۔።။។] )
        (?: (?: \s?» | ["'”’“‘«)\]_] )++ {GAP} (?! {LOWER} )    # after a closing quotation mark
          | {GAP} (?!\.) (?P<plain>) )                          # without one
    ) \s* (?P<lower> (?= {LOWER} ) )?""", regex.VERBOSE)
LINE_START = regex.compile(r"(?:\A|\n)\s*")
SPACED_WORD = regex.compile(rf"\p{{P}}*{UNSPACED}\p{{M}}*\p{{P}}*|[\S--{UNSPACED}]+", regex.V1)

def sentence_starts(text):
    """Return the positions at which sentences begin. If the text has hardly any sentences, like
    some poems, return the positions at which lines begin."""
    matches = list(SENTENCE_START.finditer(text))
    lower = [match for match in matches if match["lower"] is not None]
    if len(lower) <= len(matches) / 2:      # if most begin in lower case, as in a chat, keep all
        matches = [match for match in matches if match["lower"] is None or match["plain"] is None]
    starts = [match.end() for match in matches]
    lines = [match.end() for match in LINE_START.finditer(text)]
    if len(lines) > 10 * len(starts):
        starts = lines
    return [start for start in starts if start < len(text)] or [0]

def find_words(text):
    """Return matches of all words: runs of characters without white space or, in a script that puts
    no spaces between words, single characters."""
    return list(SPACED_WORD.finditer(text))

def word_starts(text):
    return [word.start() for word in find_words(text)] or [0]

def whole_words(text, start, length):
    """Return the text from `start` on, to the end of the first word that brings it to `length`
    characters. A word that is longer than 120 characters is cut."""
    rest = text[start:start + length + 120]
    ends = [word.end() for word in find_words(rest) if word.end() >= length]
    return rest[:min(ends, default=len(rest))]

def first_words(text, count=5):
    beginning = text.lstrip()[:1000]
    words = find_words(beginning)[:count]
    return beginning[:words[-1].end()][:200] if words else text[:200]

# ═══ Workshop: tokenizers ══════════════════════════════════════════════════════════════════════
MAX_BPE_CHARS = 1_000_000      # learn merges from this many characters; more would hardly matter
ALL_BYTES = {bytes([byte]) for byte in range(256)}

def make_tokenizer(kind, train_text, val_text="", vocab_size=None, full_vocab=False):
    """Make a tokenizer for a text. "auto" means "gpt2" if the text is short and GPT-2's encoding
    suits it and loads within 10 seconds, otherwise "story". "word" and "story" learn from the
    training text. "gpt2" is reduced to the tokens that both texts need, unless `full_vocab` is set.
    Raises StoryError if "gpt2" is not available."""
    Options(tokenizer=kind)         # raises StoryError if there is no such kind
    by_size = settings_for_size(count_bytes(train_text) + count_bytes(val_text))
    if vocab_size is None:
        vocab_size = by_size.get("vocab_size", 2048)
    if kind == "auto":
        kind = by_size.get("tokenizer") or ("story" if reason_against_gpt2(train_text) else "gpt2")
    if kind == "word":
        return WordTokenizer(build_vocabulary(train_text))
    if kind == "story":
        check(vocab_size >= 257, f"vocab_size must be at least 257 (the 256 bytes and "
              f"{END_OF_TEXT}), not {vocab_size}")
        return BPETokenizer(train_bpe_fast(train_text[:MAX_BPE_CHARS], vocab_size), kind)
    return BPETokenizer(gpt2_tokens([] if full_vocab else [train_text, val_text]), kind)

def restore_tokenizer(kind, tokens):
    """Return a checkpoint's tokenizer. Raises StoryError if its kind or its tokens are invalid."""
    required = {END_OF_TEXT, UNKNOWN} if kind == "word" else ALL_BYTES
    known = set(tokens)
    check(kind in ("word", *SPLIT_PATTERNS) and required <= known and len(known) == len(tokens)
          and len({type(token) for token in tokens}) == 1, "its tokenizer is invalid")
    return WordTokenizer(tokens) if kind == "word" else BPETokenizer(tokens, kind)

def train_bpe_fast(text, vocab_size):
    """Return the same tokens as `train_bpe`, but faster: after a merge, pairs are counted again
    only in the words that contain the merged pair."""
    counts = Counter(STORY_SPLIT.findall(text))
    words = [split_bytes(word) for word in counts]
    word_counts = list(counts.values())
    pair_counts = Counter()
    words_with = defaultdict(set)       # {pair: indices of words that contain it, or once did}

    def count_pairs(index, sign):
        for pair in pairwise(words[index]):
            pair_counts[pair] += sign * word_counts[index]
            words_with[pair].add(index)

    for index in range(len(words)):
        count_pairs(index, +1)
    tokens = sorted(ALL_BYTES)
    while len(tokens) < vocab_size - 1:
        best = most_frequent_pair(pair_counts)
        if best is None:
            break
        tokens.append(best[0] + best[1])
        for index in list(words_with.pop(best)):
            count_pairs(index, -1)
            words[index] = merge_pair(words[index], best)
            count_pairs(index, +1)
        del pair_counts[best]
    return tokens

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
    exactly as GPT-2 does. These are the tokens that occur, the intermediate tokens that lead to
    them, and all bytes. With them, these texts are merged exactly as with all tokens."""
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

# ═══ Workshop: other positions, fused attention ════════════════════════════════════════════════
# Sinusoidal: the vector of a position is not learned but consists of sines and cosines of different
# frequencies (Vaswani et al. 2017, section 3.5). Rotary: nothing is added to the tokens. Queries
# and keys are rotated by angles that grow with the position, so that a score depends on the
# distance between two tokens (Su et al. 2021, RoFormer, section 3.2).
def position_angles(n_positions, dim, device=None):
    """Angles (n_positions, dim / 2): the position times frequencies from 1 to about 1/10000."""
    exponents = torch.arange(0, dim, 2, device=device) / dim
    return torch.arange(n_positions, device=device)[:, None] * 10000.0 ** -exponents

def make_fixed_positions(config):
    """A position embedding that is not trained: sines and cosines, or zeros if rotary is used."""
    angles = position_angles(config.context_length, config.emb_dim)
    scale = init_std(config) if config.position == "sinusoidal" else 0.0
    vectors = scale * torch.cat([angles.sin(), angles.cos()], dim=-1)
    return nn.Embedding.from_pretrained(vectors[:, :config.emb_dim], freeze=True)

def rotate(queries, keys):
    """Rotate keys (B, H, S, D) at positions 0 to S - 1, and queries (B, H, T, D) at the last T of
    these positions."""
    angles = position_angles(keys.shape[2], keys.shape[3], keys.device)

    def rotate_by(x, angles):
        first, second = x.chunk(2, dim=-1)          # the pairs are (x[i], x[i + D / 2])
        cos, sin = angles.cos(), angles.sin()
        rotated = torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)
        return rotated.to(x.dtype)

    return rotate_by(queries, angles[-queries.shape[2]:]), rotate_by(keys, angles)

def fused_is_faster(queries):
    """Return whether to use torch's fused attention. On an NVIDIA GPU it saves time and memory. On
    a CPU it is not used, because it is slower in bf16."""
    return queries.is_cuda

def fused_attention(queries, keys, values, dropout):
    """The same as `attention_weights` with the causal mask, dropout and the sum of the values, in
    one call. Where it needs no explicit mask, torch can use its fastest kernel (FlashAttention)."""
    mask, is_causal = fused_mask(queries.shape[2], keys.shape[2], queries.device)
    drop_rate = dropout.p if dropout.training else 0.0
    return F.scaled_dot_product_attention(queries, keys, values, mask, drop_rate, is_causal)

@functools.cache
def fused_mask(T, S, device):
    """Return torch's mask and its flag `is_causal`, derived from `causal_mask`, so that a change
    there takes effect here too. (A change to `attention_weights` does not. If you make one, let
    `fused_is_faster` return False.) In torch's masks, True means that attending is allowed."""
    mask = causal_mask(T, S, device)
    if not mask.any():
        return None, False
    if T == S and torch.equal(mask, torch.ones_like(mask).triu(1)):
        return None, True
    return ~mask, False

# ═══ Workshop: device, precision, randomness ═══════════════════════════════════════════════════
def choose_device(name="auto"):
    """Return a torch.device: "cpu", "cuda", "cuda:1" or "mps"; "auto" is an NVIDIA or Apple GPU if
    there is one, else the CPU. Raises StoryError if there is no such device."""
    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise StoryError(f"device must be auto, cpu, cuda, cuda:1 or mps, not {name!r}") from None
    counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": torch.mps.device_count()}
    check((device.index or 0) < counts.get(device.type, 0),
          f"this machine has no {name} device: leave out --device, or use --device cpu")
    return device

def use_bf16(device, precision):
    """Return whether to compute matrix products in bfloat16, which has 8 significant bits instead
    of 24. "auto" chooses bfloat16 only where the hardware has instructions for it, which make it
    much faster."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    get_capabilities = getattr(torch.cpu, "get_capabilities", dict)     # older torch lacks it
    capabilities = get_capabilities() if device.type == "cpu" else {}
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))

def mixed_precision(run):
    """Return a context in which the model computes in bf16 if use_bf16 says so. Its weights stay
    fp32."""
    device = run.model.tok_emb.weight.device
    enabled = use_bf16(device, run.train_config.precision)
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)

@contextlib.contextmanager
def allow_tf32():
    """Let GPUs compute fp32 matrix products in TF32 within the block. TF32 has 11 significant bits
    instead of 24 and is several times as fast."""
    settings = torch.backends.cuda.matmul
    name, value = "allow_tf32", True
    if hasattr(settings, "fp32_precision"):     # since torch 2.9, which refuses a mix of both
        name, value = "fp32_precision", "tf32"
    before = getattr(settings, name)
    setattr(settings, name, value)
    try:
        yield
    finally:
        setattr(settings, name, before)

class PackedLinear(nn.Module):
    """A linear layer for inference, with its weights in the memory layout that oneDNN, torch's
    library for CPUs, prefers for a single token."""
    def __init__(self, linear):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 1)
        self.bias = linear.bias

    def _save_to_state_dict(self, *_):
        raise RuntimeError("a model that was prepared for inference cannot be saved")

    def forward(self, x):
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")

def prepare_inference(model, precision="fp32"):
    """Change a model in place so that it generates faster. Do not train or save it afterwards. In
    bf16, weights and activations are rounded, so it may write different tokens. On a CPU, the
    linear layers are packed, unless the model is so small that this would make it slower."""
    device = model.tok_emb.weight.device
    in_bf16 = use_bf16(device, precision)
    if in_bf16:
        model.bfloat16()
    ops = torch.ops.mkldnn      # private functions of torch, which another version may lack
    packable = (device.type == "cpu" and torch.backends.mkldnn.is_available()
                and hasattr(ops, "_reorder_linear_weight") and hasattr(ops, "_linear_pointwise")
                and (not in_bf16 or ops._is_mkldnn_bf16_supported()))
    if packable and count_parameters(model) > 4_000_000:
        for module in list(model.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.Linear):
                    setattr(module, name, PackedLinear(child))

@contextlib.contextmanager
def seeded_rng(*names, device=torch.device("cpu")):
    """Run the block with a seed derived from `names`, then restore the random state of the CPU and
    of the device."""
    seed = int.from_bytes(hashlib.sha256(repr(names).encode()).digest()[:7], "big")
    on_mps = device.type == "mps"
    state = torch.mps.get_rng_state() if on_mps else None
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):         # `manual_seed` seeds the current GPU
                torch.cuda.manual_seed(seed)
        if on_mps:
            torch.mps.manual_seed(seed)
        try:
            yield
        finally:
            if on_mps:
                torch.mps.set_rng_state(state)

def dropout_seed(run, *names):
    """Return a context in which dropout depends only on the seed, the step and the names."""
    device = run.model.tok_emb.weight.device
    return seeded_rng("dropout", run.train_config.seed, run.step, *names, device=device)

def new_model(config, seed=0):
    """An untrained model; the same seed gives the same weights."""
    with seeded_rng("weights", seed):
        return GPTModel(config).eval()

def on_cpu(model):
    """The model itself if it is on the CPU, else a copy of it there."""
    if model.tok_emb.weight.device.type == "cpu":
        return model
    copy = new_model(model.config)
    copy.load_state_dict(model.state_dict())
    return copy

# ═══ Workshop: runs ════════════════════════════════════════════════════════════════════════════
@dataclass(repr=False)
class Corpus:
    """A text, split and encoded. `val_ids` is empty if there is no validation split."""
    tokenizer: WordTokenizer | BPETokenizer
    train_text: str
    train_ids: torch.Tensor     # (N,)
    val_ids: torch.Tensor       # (M,)
    fingerprint: str            # identifies the text and where it was split
    val_fraction: float
    n_bytes: int = 0            # of the text in UTF-8; 0 if that is not known

    def __repr__(self):
        return (f"Corpus of {len(self.train_ids):,} tokens for training and {len(self.val_ids):,} "
                f"for validation: {self.train_text[:60]!r}")

    @functools.cached_property
    def recall_tests(self):
        return recall_tests(self.train_text)

@dataclass
class Evaluation:
    """How good a run was at some step. What could not be measured is None."""
    step: int
    epoch: float
    train_loss: float
    val_loss: float | None
    recall: float | None
    prompt: str
    sample: str                 # how the model continued the prompt

@dataclass(repr=False)
class Run:
    """A model with everything that belongs to its training."""
    model: GPTModel
    tokenizer: WordTokenizer | BPETokenizer
    train_config: TrainConfig
    fingerprint: str            # of the corpus
    steps_per_epoch: int
    total_steps: int
    prompt: str                 # the prompt of the samples
    text_paths: list = field(default_factory=list)      # files of the text; []: Short_Story.txt
    encoding: str = ""          # of these files; "": detected from their contents
    beginnings: list = field(default_factory=list)      # the prompts of all recall tests
    step: int = 0               # steps done
    history: list = field(default_factory=list)         # of Evaluations
    loss: float | None = None                           # of the last step
    optimizer: torch.optim.Optimizer | None = None
    saved_optimizer: dict | None = None                 # state of a loaded run's optimizer
    best_weights: dict | None = None                    # see record_evaluation

    @property
    def config(self):
        return self.model.config

    def __repr__(self):
        return (f"Run at step {self.step} of {self.total_steps}: {count_parameters(self.model):,} "
                f"parameters, {self.tokenizer.kind} tokenizer")

    def window(self, prompt):
        """Return the token ids (1, T) of a prompt, cut to its last `context_length` tokens."""
        return torch.tensor([encode_prompt(self.tokenizer, prompt)[-self.config.context_length:]])

    def write(self, prompt, max_new_tokens=100, sentences=0, **sampling):
        """Return a prompt with its continuation. Example: run.write("Once", temperature=0.8)"""
        return prompt + "".join(generate_text(self.model, self.tokenizer, prompt, max_new_tokens,
                                              Sampling(**sampling), sentences))

    def attention(self, prompt):
        """Return a figure of the attention weights between the tokens of a prompt."""
        window = self.window(prompt)
        names = token_names(self.tokenizer, window[0].tolist())
        return plot_attention(attention_maps(self.model, window), names)

    def next(self, prompt, **sampling):
        """Return a table of the ten most likely next tokens, with their probabilities before and
        after settings such as temperature=0.8 change them."""
        sampling = Sampling(**{"temperature": 1.0, **sampling})
        with torch.no_grad():
            logits = self.model(self.window(prompt))[0, -1].float().cpu()
        softmax = logits.softmax(dim=-1)
        sampled = next_token_probabilities(logits, sampling)
        best = logits.topk(min(10, len(logits))).indices
        lines = [f"{'next token':<16}{'logit':>7}{'softmax':>9}{'sampled':>9}   (temperature "
                 f"{sampling.temperature:g}, top-k {sampling.top_k}, top-p {sampling.top_p:g})"]
        for name, i in zip(token_names(self.tokenizer, best.tolist()), best):
            bar = "".ljust(round(40 * sampled[i].item()), "█")
            row = f"{name:<16}{logits[i]:>7.2f}{softmax[i]:>9.2%}{sampled[i]:>9.2%}   {bar}"
            lines.append(row.rstrip())
        return Table("\n".join(lines))

class Table(str):
    """A text of several lines, which a notebook or an interactive session shows as it is."""
    __repr__ = str.__str__

def corpus_from_text(text, tokenizer="auto", val_fraction=0.1, context_length=32, **options):
    """Split and encode a text. `tokenizer` is a tokenizer, or the kind that `make_tokenizer` makes
    with these options. If the validation split would not fill a window, the whole text is used for
    training.

    >>> corpus = corpus_from_text("They went upriver for nine days.", "word", 0.3, context_length=2)
    >>> corpus.train_text, len(corpus.train_ids), len(corpus.val_ids)
    ('They went upriver for', 5, 3)
    """
    TrainConfig(val_fraction=val_fraction)      # raises StoryError if it is out of range
    train_text, val_text = split_text(text, val_fraction)
    resolved = tokenizer
    if isinstance(tokenizer, str):
        resolved = make_tokenizer(tokenizer, train_text, val_text, **options)
    train_ids = torch.tensor([*resolved.encode(train_text), resolved.end_of_text])
    val_ids = torch.tensor(resolved.encode(val_text), dtype=torch.long)
    if val_text and len(val_ids) <= context_length:
        return corpus_from_text(text, tokenizer, 0.0, context_length, **options)
    both = f"{len(train_text)} {train_text}{val_text}".encode("utf-8", errors="replace")
    fingerprint = hashlib.sha256(both).hexdigest()
    return Corpus(resolved, train_text, train_ids, val_ids, fingerprint, val_fraction,
                  count_bytes(text))

def count_bytes(text):
    return len(text.encode("utf-8", errors="replace"))

def settings_for_size(n_bytes):
    """Return the settings, {name: value}, whose defaults do not suit a text of this size. With
    these values, the model memorizes it in little time. They are fitted to measurements (see "By
    the size of the text" in benchmarks/README.md): a longer text needs a wider model."""
    if n_bytes < 60_000:
        return {}
    growth = n_bytes / 100_000
    n_heads = min(max(round(4 * growth ** 0.3), 4), 12)
    return {"tokenizer": "story", "vocab_size": 4096, "n_heads": n_heads, "emb_dim": 64 * n_heads,
            "optimizer": "muon", "batch_size": 64, "epochs": round(10 * max(growth, 1) ** 0.12),
            "learning_rate": round(0.005 / n_heads ** 0.5, 5)}

# How long to train, so that a story is memorized: {optimizer: (epochs, minimum number of steps)}
TRAINING_LENGTH = {"adamw": (20, 150), "muon": (10, 75)}
EVALUATE_AT = (0.02, 0.05, 1)           # fractions of all steps, two of them early in training
RECALL_SAMPLE = 25      # sentences that an evaluation tries

def new_run(corpus, config=None, train_config=None, device="cpu"):
    """Return a run with an untrained model. By default, its settings suit the size of the text. If
    the text is too short for the context length, the context length is reduced. Raises StoryError
    if the text is a single token."""
    by_size = settings_for_size(corpus.n_bytes)
    config = config or override_settings(GPTConfig(), by_size)
    train_config = train_config or override_settings(TrainConfig(), by_size)
    n_tokens = len(corpus.train_ids)
    check(n_tokens >= 3, "a text of a single token is too short: give at least five words")
    T = min(config.context_length, n_tokens - 1)
    config = replace(config, context_length=T, vocab_size=corpus.tokenizer.vocab_size)
    train_config = replace(train_config, val_fraction=corpus.val_fraction)
    n_prompts = int(train_config.prompt_windows * train_config.batch_size)
    n_windows = max(train_config.batch_size - n_prompts, 1)
    steps_per_epoch = math.ceil(math.ceil((n_tokens - T) / T) / n_windows)
    beginning = corpus.train_text or corpus.tokenizer.decode(corpus.train_ids[:100].tolist())
    return Run(model=new_model(config, train_config.seed).to(choose_device(device)),
               tokenizer=corpus.tokenizer, train_config=train_config,
               fingerprint=corpus.fingerprint, steps_per_epoch=steps_per_epoch,
               total_steps=count_steps(steps_per_epoch, train_config),
               prompt=first_words(beginning),
               beginnings=[prompt for prompt, _ in corpus.recall_tests])

def count_steps(steps_per_epoch, config):
    """Return the total number of training steps."""
    epochs, min_steps = TRAINING_LENGTH[config.optimizer]
    enough = max(epochs * steps_per_epoch, min_steps)
    steps = config.max_steps or config.epochs * steps_per_epoch or enough
    check(steps < 1 << 22, f"{steps:,} training steps are too many: use a smaller --epochs or "
          "--max-steps")
    return steps

def in_batches(stream, size, skip):
    """Cut an endless stream into lists of `size` items, and skip the first `skip` lists."""
    stream = islice(stream, size * skip, None)
    while True:
        yield list(islice(stream, size))

def greedy_predictions(model, token_ids):
    """Return the most likely token after every one of the token ids (N,), on the CPU."""
    T = min(model.config.context_length, len(token_ids))
    # Usually one window holds everything. Otherwise there are several, which start one token apart,
    # and in all but the first, only the last prediction is new.
    windows = token_ids.unfold(0, T, 1)
    with torch.no_grad():
        predictions = model(windows).argmax(dim=-1).cpu()
    return torch.cat([predictions[0], predictions[1:, -1]])

def evenly_spaced(items, count):
    """Return at most `count` of the items."""
    return items[::math.ceil(len(items) / count) or 1]

def measure_recall(model, tokenizer, text, max_sentences=1000):
    """Return the recall of a model on a text, from 0 to 1, measured on at most `max_sentences`
    sentences. It is 0 if no sentence has at least eight words."""
    return share_recited(model, tokenizer, evenly_spaced(recall_tests(text), max_sentences))

def start_optimizer(run):
    """Create the optimizer of a run, and restore its saved state if the run was loaded."""
    if run.optimizer is not None:
        return
    run.optimizer = make_optimizer(run.model, run.train_config)
    saved, run.saved_optimizer = run.saved_optimizer, None
    if saved is None:
        return
    mistake = "the optimizer state of the checkpoint does not fit its model: train again"
    groups, saved_groups = run.optimizer.state_dict()["param_groups"], saved["param_groups"]
    check([group["params"] for group in groups] == [group["params"] for group in saved_groups],
          mistake)                      # a file of another version
    # Load the averages, but not options such as betas.
    run.optimizer.load_state_dict({**saved, "param_groups": groups})
    for parameter, state in run.optimizer.state.items():            # a file may hold wrong shapes
        for name, value in state.items():
            check(value.shape == (() if name == "step" else parameter.shape), mistake)

def optimizer_state(run):
    return run.saved_optimizer if run.optimizer is None else run.optimizer.state_dict()

def evaluation_due(run):
    every = run.train_config.eval_every or max(45, run.total_steps // 20)
    milestones = [round(share * run.total_steps) for share in EVALUATE_AT]
    return run.step % every == 0 or run.step in milestones

def evaluate(run, corpus):
    """Return the Evaluation of a run as it is now."""
    with mixed_precision(run):
        train_loss = mean_loss(run.model, corpus.train_ids)
        val_loss = mean_loss(run.model, corpus.val_ids)
    check_finite(run, train_loss)
    tests = evenly_spaced(corpus.recall_tests, RECALL_SAMPLE)
    recall = share_recited(run.model, run.tokenizer, tests) if tests else None
    sample = "".join(generate_text(run.model, run.tokenizer, run.prompt, 24))
    epoch = run.step / run.steps_per_epoch
    return Evaluation(run.step, epoch, train_loss, val_loss, recall, run.prompt, sample)

def describe_loss(loss, token_ids, tokenizer):
    """Format a loss per token, with its perplexity and the loss in bits per character."""
    text = tokenizer.decode([i for i in token_ids.tolist() if i != tokenizer.end_of_text])
    bits = loss / math.log(2) * len(token_ids) / max(len(text), 1)
    perplexity = torch.tensor(loss, dtype=torch.float64).exp().item()      # or inf
    return f"{loss:.3f} (perplexity {perplexity:,.2f}; {bits:.3f} bits per character)"

def best_evaluation(history):
    """Return the evaluation with the lowest validation loss, or None if it was never measured."""
    measured = [evaluation for evaluation in history if evaluation.val_loss is not None]
    return min(measured, key=lambda evaluation: evaluation.val_loss, default=None)

def step_of_weights(run):
    """Return the step after which the model had its present weights. With keep_best, a complete run
    has those of the lowest validation loss."""
    if run.train_config.keep_best and run.step >= run.total_steps:
        return best_evaluation(run.history).step
    return run.step

def record_evaluation(run, corpus):
    """Evaluate a run, and append the result to its history. With keep_best, keep the weights with
    the lowest validation loss, and return to them at the end. Training ends early if this loss has
    not fallen for a fifth of all steps."""
    run.history.append(evaluate(run, corpus))
    if not run.train_config.keep_best:
        return
    check(run.history[-1].val_loss is not None, "--keep-best, which --preset writer sets, "
          "needs a validation split: give a longer text or a larger --val-fraction")
    best = best_evaluation(run.history)
    if best is run.history[-1]:
        run.best_weights = {name: weight.detach().cpu().clone()
                            for name, weight in run.model.state_dict().items()}
    if run.step >= run.total_steps or run.step - best.step > run.total_steps / 5:
        run.model.load_state_dict(run.best_weights)
        run.total_steps = run.step

def mean_loss(model, token_ids, max_windows=32):
    """The mean loss over token ids (N,), or None if N < 2. At most `max_windows` windows are used,
    evenly spaced. They do not overlap."""
    if len(token_ids) < 2:
        return None
    T = min(model.config.context_length, len(token_ids) - 1)
    windows = SlidingWindowDataset(token_ids, T, stride=T)
    count = min(len(windows), max_windows)
    indices = torch.arange(count) * len(windows) // count
    total = 0.0
    with torch.no_grad():
        for part in indices.split(max(1, 1024 // T)):        # in parts, to save memory
            total += batch_loss(model, *windows[part]).item() * len(part)
    return total / count

def check_finite(run, number):
    check(math.isfinite(number), f"the loss or the gradient became {number} at step {run.step}, so "
          "training stops; the last checkpoint is kept. Try a smaller --learning-rate, or "
          "--precision fp32")

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
            starts = [i for i in sentence_starts(text) if text[len(prompt):i].strip()]
            later = starts[sentences - 1:]      # sentences that are no longer wanted
            end = len(text[:min(later, default=end)].rstrip())
        yield text[shown:end]
        shown = max(shown, end)
        if later:
            return
    yield text[shown:]

# ═══ Workshop: the optimizer Muon ══════════════════════════════════════════════════════════════
# The average gradient of a weight matrix usually has a few large singular values and many small
# ones. Muon (Jordan et al. 2024) makes the larger ones about equal and raises the small ones, so
# that the matrix changes in many more directions. Our story then needs half as many steps, but each
# takes about 30 % longer.
class Muon(torch.optim.AdamW):
    """AdamW, except that Muon updates the weight matrices of the blocks."""
    def __init__(self, model, config):
        super().__init__(make_optimizer(model, replace(config, optimizer="adamw")).param_groups)
        self.matrices = [p for p in model.trf_blocks.parameters() if p.dim() == 2]
        self.bf16 = use_bf16(self.matrices[0].device, config.precision)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["lr"] *= 4            # with Muon, training is stable at higher learning rates
        lr, weight_decay = (self.param_groups[0][name] for name in ("lr", "weight_decay"))
        for weight in self.matrices:
            if weight.grad is None:     # as AdamW does
                continue
            if weight not in self.state:        # AdamW expects a step in every state
                self.state[weight] = {"step": torch.zeros(()), "momentum": torch.zeros_like(weight)}
            momentum = self.state[weight]["momentum"].lerp_(weight.grad, 0.1)   # a moving average
            update = weight.grad.lerp(momentum, 0.9)                            # Nesterov momentum
            update = newton_schulz(update.bfloat16() if self.bf16 else update)
            scale = 0.2 * math.sqrt(max(weight.shape))                  # as in Liu et al. 2025
            weight.mul_(1 - lr * weight_decay).sub_(update, alpha=lr * scale)
            weight.grad = None          # so AdamW leaves this weight alone
        super().step()
        for group in self.param_groups:
            group["lr"] /= 4

def newton_schulz(X):
    """Divide X by a bound on its singular values, and apply two polynomials, which turn a singular
    value x into a x + b x^3 + c x^5. Values between 0.02 and 1 end up between 0.48 and 1.52. (The
    coefficients are close to optimal. See Amsel et al. 2025.)

    >>> newton_schulz(torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.15, 0.0]]))
    tensor([[0.5304, 0.0000, 0.0000],
            [0.0000, 1.0832, 0.0000]])
    """
    if X.shape[0] > X.shape[1]:
        return newton_schulz(X.mT).mT       # X X^T is smaller then
    X = X / (1.04 * (X @ X.mT).norm()).sqrt().clamp(min=1e-10)      # singular values below 1
    for a, b, c in ((7.711, -22.114, 16.249), (3.215, -2.411, 0.501)):
        gram = X @ X.mT
        X = a * X + (b * gram + c * gram @ gram) @ X
    return X

# ═══ Workshop: checkpoint files ════════════════════════════════════════════════════════════════
FORMAT = 6      # increase only if old files can no longer be read, not for a new setting
PLAIN_FIELDS = {"fingerprint": str, "encoding": str, "prompt": str, "step": int, "total_steps": int,
                "steps_per_epoch": int, "text_paths": list, "beginnings": list}
ENTRIES = {**PLAIN_FIELDS, "config": dict, "train_config": dict, "tokenizer": dict,
           "history": list, "weights": dict, "best_weights": dict | None,
           "optimizer": dict | None, "test_loss": float}

def atomic_save(path, contents):
    """torch.save to a temporary file, which then replaces the file at `path`, so that `path` never
    holds a partly written file. A symbolic link stays a link. Raises StoryError."""
    path = Path(os.path.realpath(path))
    temporary = temporary_path(path)
    try:
        torch.save(contents, temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:        # on a full disk, torch raises RuntimeError
        reason = getattr(error, "strerror", None) or "is the disk full?"
        raise StoryError(f"{path} could not be written ({reason}): free some disk space, or "
                         "choose another path") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()          # after a failure; else it has been renamed

def read_checkpoint(path):
    """Return the dictionary of a checkpoint, with its settings, tokenizer and history restored as
    objects. Raises StoryError if the file is missing, damaged, or not compatible."""
    try:
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            size = os.fstat(file.fileno()).st_size
            entries = archive.infolist()
            check(sum(entry.file_size for entry in entries) <= size, "it is compressed")
            check(not any(entry.external_attr & 0x10 for entry in entries), "it contains a folder")
            check(archive.testzip() is None, "a checksum is wrong")     # compares every CRC-32
            file.seek(0)
            saved = torch.load(file, map_location="cpu", weights_only=True)
        check(isinstance(saved, dict) and "format" in saved, "it has no format number")
    except FileNotFoundError:
        raise StoryError(f"there is no model at {path}: train one or give another path") from None
    except OSError as error:
        raise StoryError(f"{path} cannot be read ({error.strerror or error}): give another path"
                         ) from None
    except Exception as error:      # a damaged or hostile file can make torch raise anything
        reason = CONTROL.sub("?", str(error).split("\n")[0])[:150]
        raise StoryError(f"{path} is damaged or not a checkpoint of story_llm ({reason}): train "
                         "again, or give another path") from None
    check(saved["format"] == FORMAT, f"{path} was saved by another version of story_llm (format "
          f"{reprlib.repr(saved['format'])}, here {FORMAT}): use that version, or train again")
    try:
        for name, kind in ENTRIES.items():
            check(isinstance(saved[name], kind), f"its {name} has the wrong type")
        saved["config"] = GPTConfig(**saved["config"])
        saved["train_config"] = TrainConfig(**saved["train_config"])
        saved["tokenizer"] = restore_tokenizer(**saved["tokenizer"])
        saved["history"] = [Evaluation(**entry) for entry in saved["history"]]
        weights, best_weights = saved["weights"], saved["best_weights"] or saved["weights"]
        optimizer = saved["optimizer"] or {"state": {}, "param_groups": ()}
        states = (weights, best_weights, *optimizer["state"].values())
        tensors = itertools.chain(*(state.values() for state in states))
        check(all("params" in group for group in optimizer["param_groups"]),
              "its optimizer state is invalid")
        check(all(map(is_plain, tensors)), "some of its tensors are not dense and finite")
        check(saved["step"] >= 0 and saved["steps_per_epoch"] > 0, "its step counts are wrong")
        strings = [*saved["text_paths"], *saved["beginnings"]]
        check(all(type(string) is str for string in strings), "one of its texts is not a string")
    except (AttributeError, KeyError, TypeError, StoryError) as error:
        raise StoryError(f"{path} is not compatible with this version of story_llm ({error}): use "
                         "the version that saved it, or train again") from None
    with torch.device("meta"):      # shapes without memory, because a file may claim any size
        model = GPTModel(saved["config"])
        model(torch.zeros(1, 1, dtype=torch.long))      # a bug in an edited model shows up here
    shapes = [{name: weight.shape for name, weight in group.items()}
              for group in (weights, best_weights, model.state_dict())]
    check(shapes[0] == shapes[1] == shapes[2], f"{path} does not match this version's GPTModel "
          "(names or shapes of weights differ): use the version that saved it, or train again")
    check(4 * sum(weight.numel() for weight in model.parameters()) <= size
          and saved["tokenizer"].vocab_size == saved["config"].vocab_size,
          f"{path} is damaged (it is too small, or its tokenizer has the wrong vocabulary size): "
          "train again")
    return saved

def is_plain(tensor):
    """Return whether this is a dense, contiguous CPU tensor of finite numbers."""
    return (type(tensor) is torch.Tensor and tensor.layout == torch.strided
            and tensor.is_contiguous() and tensor.device.type == "cpu"
            and bool(tensor.isfinite().all()))

def check_test_loss(path, model, expected):
    found = loss_on_test_window(model)
    check(math.isclose(found, expected, rel_tol=1e-4), f"{path} comes from another version of this "
          f"program: with the same weights, the loss on the test window was {expected:.4f} and is "
          f"{found:.4f} now. Use the version that saved it, or train again")

def loss_on_test_window(model):
    """Return the loss on a window of fixed token ids, on the CPU in fp32. Raises StoryError if it
    is NaN or infinite, so that such a model is neither saved nor loaded."""
    T = min(model.config.context_length, 256)
    window = torch.arange(1 + T) % model.config.vocab_size
    loss = mean_loss(on_cpu(model), window)
    check(math.isfinite(loss), "the model computes NaN or infinite numbers: train again with a "
          "smaller --learning-rate")
    return loss

def keep_previous_model(path, run):
    """If there is a file at `path` that is not an earlier state of this run, rename it to
    NAME.old.pt, .old2.pt, ... and return the new path. Otherwise return None."""
    path = Path(os.path.realpath(path))
    if not path.exists():
        return None
    with contextlib.suppress(StoryError):
        previous = load_checkpoint(path)
        same = ((previous.fingerprint, previous.config, previous.tokenizer.tokens)
                == (run.fingerprint, run.config, run.tokenizer.tokens))
        if same and previous.train_config == run.train_config and previous.step <= run.step:
            return None
    return path.replace(unused_path(path))

def unused_path(path):
    """Return the first of NAME.old.pt, NAME.old2.pt, ... that does not exist."""
    for number in itertools.chain([""], itertools.count(2)):
        unused = Path(path).with_name(f"{Path(path).stem}.old{number}{Path(path).suffix}")
        if not unused.exists():
            return unused

def check_writable(path, endings=()):
    """Fail early if a file cannot be written. Raises StoryError."""
    path = Path(os.path.realpath(path))
    check(not endings or path.suffix.lower() in endings,
          f"{path.name} must end in {', '.join(endings)}")
    check(os.path.isfile(path) or not os.path.lexists(path),
          f"{path} is a folder or a device: give the path of a file")
    try:
        temporary_path(path).write_bytes(b"")
        temporary_path(path).unlink()
    except OSError as error:
        raise StoryError(f"{path} cannot be written ({error.strerror}): give another path"
                         ) from None

def temporary_path(path):
    return Path(f"{path}.{os.getpid()}.tmp")

# ═══ Workshop: pictures, and a look inside ═════════════════════════════════════════════════════
PICTURES = (".png", ".svg", ".pdf")

def new_figure(**options):
    """Return a matplotlib Figure that every notebook shows."""
    from matplotlib.figure import Figure

    class NotebookFigure(Figure):
        def _repr_png_(self):
            picture = io.BytesIO()
            self.savefig(picture, format="png")
            return picture.getvalue()

    return NotebookFigure(**options)

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

def attention_maps(model, token_ids):
    """Return the attention weights of all blocks and heads for token ids (1, T): (blocks, H, T, T).
    They are the output of the dropout module of each attention layer."""
    model = on_cpu(model)
    dropouts = [block.att.dropout for block in model.trf_blocks]
    return torch.cat(module_outputs(model, dropouts, token_ids))

def plot_attention(maps, names, path=None):
    """Draw attention maps of T tokens with these names; return the figure."""
    from matplotlib.colors import PowerNorm
    layers, heads = maps.shape[:2]
    side = max(1.6, min(len(names) * 0.16, 60 / max(layers, heads)))        # inches
    figure = new_figure(figsize=(heads * side + 2, layers * side + 2), layout="constrained")
    grid = figure.subplots(layers, heads, squeeze=False, sharex=True, sharey=True)
    for layer, head in itertools.product(range(layers), range(heads)):
        axes = grid[layer, head]
        shades = PowerNorm(0.5, vmin=0, vmax=1)         # with many tokens, most weights are small
        image = axes.imshow(maps[layer, head].tolist(), norm=shades, cmap="Blues")
        axes.set_title(f"block {layer + 1}, head {head + 1}", fontsize=9)
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7, parse_math=False)
        axes.set_yticks(range(len(names)), names, fontsize=7, parse_math=False)
    figure.suptitle("Attention weights")
    figure.supylabel("this token ...", fontsize=9)
    figure.supxlabel("... attends to this one", fontsize=9)
    figure.colorbar(image, ax=grid, shrink=0.6, label="attention weight (a row adds up to 1)")
    return save_figure(figure, path)

# ═══ The command line ══════════════════════════════════════════════════════════════════════════
# Each command has one function, which calls the functions of its step and prints what they return:
# results on stdout, notes on stderr. A table at the end lists which command has which options.
DEFAULT_TEXT = str(Path(__file__).with_name("Short_Story.txt"))
DEFAULT_PROMPT = "Once Aadhan renounced his kingdom"
CONTROL = regex.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")       # control characters except \t, \n

def log(message="", file=None, end="\n"):
    file = file or sys.stdout
    message = CONTROL.sub("\ufffd", message) if file.isatty() else message
    try:
        print(message, end=end, file=file, flush=True)
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            raise
        raise StoryError(f"the output cannot be written ({error.strerror})") from None

def note(message):
    log(message, file=sys.stderr)

note_once = functools.cache(note)       # `tour` runs many commands

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

def command_line(*words):
    """Return a command of this program for the user to copy, quoted for the shell of this
    system."""
    own_name = Path(__file__).name
    program = sys.argv[0] if Path(sys.argv[0]).name == own_name else own_name
    quote = subprocess.list2cmdline if os.name == "nt" else shlex.join
    return f"python {quote([program, *words])}"

def option_string(name):
    return "--" + name.replace("_", "-")

def refuse_options(args, names, reason):
    """Raise StoryError if one of these options was given."""
    for name in names:
        check(name not in args.given, f"{option_string(name)} {reason}")

def corpus_from_args(args):
    """Return (the corpus, the settings that the preset and the user have chosen)."""
    text = load_text(args.text, args.encoding)
    n_bytes = count_bytes(text)
    preset = PRESETS[args.preset]
    if args.preset == "auto":
        preset = settings_for_size(n_bytes)
        dependent = {"emb_dim": ["n_heads"], "optimizer": ["epochs", "learning_rate"]}
        for option in dependent.keys() & args.given.keys():
            for name in dependent[option]:          # it suits only the preset's value of the option
                preset.pop(name, None)
    if args.preset == "writer":         # a shorter text is overfitted sooner
        weight_decay = 5 / math.sqrt(max(n_bytes / 100_000, 1))
        preset = {**preset, "weight_decay": round(weight_decay, 2)}
    settings = {**preset, **args.given}
    kind = settings.get("tokenizer", "auto")
    for option, required in (("vocab_size", "story"), ("full_vocab", "gpt2")):
        if kind != required:
            refuse_options(args, [option], f"can only be used with --tokenizer {required}")
    corpus = corpus_from_text(text, kind, args.val_fraction,
                              override_settings(GPTConfig(), settings).context_length,
                              vocab_size=settings.get("vocab_size"), full_vocab=args.full_vocab)
    if kind == "auto" and corpus.tokenizer.kind == "story":
        reason = "the text is long"
        if not settings_for_size(n_bytes):
            reason = reason_against_gpt2(corpus.train_text)
        note_once(f"note: {reason}, so merges are learned from the story (use --tokenizer story to "
                  "silence this note)")
    return corpus, settings

def new_run_from_args(args):
    """Return (a new run, its corpus). Print a note wherever the run differs from what was
    requested."""
    corpus, settings = corpus_from_args(args)
    chosen = [f"{option_string(name)} {value}" for name, value in settings.items()
              if name not in args.given]
    if args.preset == "auto" and chosen:
        note_once(f"note: for a text of {corpus.n_bytes // 1000:,} KB, the defaults are "
                  f"{' '.join(chosen)}")
    config = override_settings(GPTConfig(), settings)
    train_config = override_settings(TrainConfig(), settings)
    run = new_run(corpus, config, train_config, args.device)
    if train_config.val_fraction > run.train_config.val_fraction:
        note(f"note: {train_config.val_fraction:.0%} of the text would not fill a window of "
             f"{config.context_length} tokens, so there is no validation split")
    if config.context_length > run.config.context_length:
        note(f"note: the text has only {len(corpus.train_ids)} tokens, so the context length is "
             f"{run.config.context_length}, not {config.context_length}")
    run.text_paths, run.encoding = list(args.given.get("text", ())), args.encoding
    run.prompt = args.given.get("prompt", run.prompt if run.text_paths else DEFAULT_PROMPT)
    return run, corpus

def load_run(args):
    """Return (the saved run, its corpus). The corpus is made from --text or, if that is not given,
    from the files that the run was trained on."""
    run = load_checkpoint(args.model, args.device)
    if "text" not in args.given:
        args.text, args.encoding = run.text_paths or args.text, args.encoding or run.encoding
        check("-" not in args.text, f"{args.model} was trained on standard input: give the text "
              "again with --text")
    return run, corpus_from_text(load_text(args.text, args.encoding), run.tokenizer,
                                 run.train_config.val_fraction, context_length=0)

def change_length(run, args):
    """Apply the options that decide how long a resumed run trains."""
    if "epochs" in args.given:
        run.train_config = replace(run.train_config, max_steps=0)
    run.train_config = override_settings(run.train_config, args.given)
    if run.step < run.total_steps or "epochs" in args.given or "max_steps" in args.given:
        run.total_steps = count_steps(run.steps_per_epoch, run.train_config)

def run_to_train(args):
    """Return (a run, its corpus), after making sure that the results can be written."""
    import matplotlib       # noqa: F401; if it is missing, fail now and not after the training
    check_writable(args.model)
    check_writable(args.plot, PICTURES)
    paths = [*set(args.text), args.model, args.plot]
    check(len(set(map(os.path.realpath, paths))) == len(paths),
          "--text, --model and --plot must be different files")
    if not args.resume:
        return new_run_from_args(args)
    refuse_options(args, args.given.keys() - set(RESUME_OPTIONS),
                   "cannot be combined with --resume, because the checkpoint determines it")
    run, corpus = load_run(args)
    check(corpus.fingerprint == run.fingerprint, f"{args.model} was trained on a different text: "
          "give that text with --text, or train a new model without --resume")
    run.text_paths, run.encoding = list(args.given.get("text", run.text_paths)), args.encoding
    change_length(run, args)
    return run, corpus

def load_or_create_run(args):
    if args.untrained:
        return new_run_from_args(args)[0]
    return load_checkpoint(args.model, args.device)

def log_recall(run, corpus):
    memorizes = not run.train_config.keep_best
    tests = evenly_spaced(corpus.recall_tests, 1000 if memorizes else 200)
    if not tests:
        log("Recall: not measured, because no sentence of at least 8 words has a "
            "unique beginning")
        return None
    recall = share_recited(run.model, run.tokenizer, tests)
    sample = ""
    if len(tests) < len(corpus.recall_tests):
        sample = f" (sampled from {len(corpus.recall_tests):,})"
    log(f"Recall {recall:.1%}: {round(recall * len(tests))} of {len(tests)} sentences{sample} "
        "continued word for word from their first five words")
    return recall

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
    batch = corpus.train_ids[:run.config.context_length].expand(2, -1)
    blocks = [f"trf_blocks.{i}" for i in range(run.config.n_layers)]
    names = ["tok_emb", "pos_emb", *blocks, "final_norm", "out_head"]
    modules = [run.model.get_submodule(name) for name in names]
    log(f"  {'part':<12}{'shape of the output':>20}{'parameters':>14}")
    for name, module, output in zip(names, modules, module_outputs(run.model, modules, batch)):
        log(f"  {name:<12}{str(tuple(output.shape)):>20}{count_parameters(module):>14,}")
    log(f"  {'total':<12}{count_parameters(run.model):>34,}")

def command_evaluate(args):
    run, corpus = new_run_from_args(args) if args.untrained else load_run(args)
    run.train_config = override_settings(run.train_config, args.given)
    trained = f"{args.model}, after {step_of_weights(run)} steps:"
    log("an untrained model:" if args.untrained else trained)
    if corpus.fingerprint != run.fingerprint:
        note(f"note: {args.model} was not trained on {', '.join(args.text)}, but on a different "
             "text")
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

@contextlib.contextmanager
def collect_signals():
    """Yield a list of signals. The first SIGINT (Ctrl-C), SIGTERM or SIGHUP in the block is only
    appended to it, so that the caller can stop safely. A second raises KeyboardInterrupt."""
    received, handlers = [], {}

    def collect(number, frame):
        received.append(number)
        for number in handlers:
            signal.signal(number, signal.default_int_handler)
        with contextlib.suppress(OSError, ValueError, AttributeError):      # no stderr
            os.write(sys.__stderr__.fileno(), b"\nstopping after this step; press Ctrl-C again to "
                     b"stop at once and lose what was learned since the last save\n")

    if threading.current_thread() is threading.main_thread():
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):        # SIGHUP: the terminal was closed
            number = getattr(signal, name, None)            # Windows has no SIGHUP
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:
                handlers[number] = signal.signal(number, collect)
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)

class Progress:
    """Prints the progress of a run during training, and saves the run if a path is given."""
    def __init__(self, run, path=None, resumed=False):
        self.path = path
        self.written = file_signature(path) if resumed else None    # signature of this run's file
        self.shown = len(run.history)       # evaluations that have been printed before
        self.start = self.first_step = None
        self.next_save = self.next_line = 0.0

    def update(self, run, is_last):
        """Print and save what is due after a step; `is_last` says whether it was the last step."""
        now = time.perf_counter()
        evaluations = run.history[self.shown:]
        self.shown = len(run.history)
        speed = ""
        if self.start is None:      # start the clock only now, because the first step is slower
            self.start, self.first_step = now, run.step
        else:
            seconds = (now - self.start) / (run.step - self.first_step)     # for each step
            left = round(seconds * (run.total_steps - run.step))
            tokens = run.train_config.batch_size * run.config.context_length / seconds
            speed = f", {tokens:,.0f} tokens/s, {left // 60}:{left % 60:02} left"
        if is_last or (evaluations and now > self.next_save):
            self.save(run, is_last)
        try:
            for evaluation in evaluations:
                log_evaluation(evaluation, speed)
        except (BrokenPipeError, StoryError):       # nobody is reading any more: `train | head`
            self.save(run, is_last=True)
            raise
        if sys.stderr.isatty() and not evaluations and now > self.next_line:
            self.next_line = now + 0.2
            line = f"step {run.step} of {run.total_steps}{speed}"
            log(line.ljust(79), sys.stderr, end="\r")       # the next line overwrites it

    def save(self, run, is_last):
        """Save, and set the time of the next save so that saving takes at most 2 % of the time. If
        a save fails during training, it is tried again after the next evaluation."""
        if self.path is None:
            return
        start = time.perf_counter()
        signature = file_signature(self.path)
        if None not in (signature, self.written) and signature != self.written:
            other = unused_path(self.path)
            save_checkpoint(other, run)
            raise StoryError(f"another program has written to {self.path}, so this run stops, "
                             f"and its model is saved as {other}: give each run its own "
                             "--model")
        if self.written is None:
            kept = keep_previous_model(self.path, run)
            if kept:
                note(f"note: the file at {self.path} was not an earlier state of this run, so "
                     f"it is kept as {kept.name}")
        try:
            save_checkpoint(self.path, run)
        except StoryError as error:
            if is_last:
                raise
            note(f"note: {error}; training continues, and saving is tried again after the next "
                 "evaluation")
        self.written = file_signature(self.path)
        self.next_save = time.perf_counter() + 50 * (time.perf_counter() - start)

def file_signature(path):
    """Return values that change when another file replaces this one, or None if it is missing."""
    with contextlib.suppress(OSError, TypeError):
        status = os.stat(path)
        return status.st_ino, status.st_size, status.st_mtime_ns
    return None

def train_with_progress(run, corpus, path=None, resumed=False):
    """Train a run, print its evaluations, and save it to `path` if one is given. After Ctrl-C,
    training stops at the end of the step, and calling this again continues it."""
    progress = Progress(run, path, resumed)
    with allow_tf32(), collect_signals() as received:
        for _ in train(run, corpus):
            stop = len(received) > 0        # read once, because it may change at any moment
            progress.update(run, is_last=stop or run.step >= run.total_steps)
            if stop:
                break

def log_evaluation(evaluation, speed=""):
    val_loss = "" if evaluation.val_loss is None else f", Val loss {evaluation.val_loss:.3f}"
    recall = "" if evaluation.recall is None else f", recall {evaluation.recall:.0%}"
    loss = f"Train loss {evaluation.train_loss:.3f}"
    epoch = max(1, math.ceil(evaluation.epoch))
    log(f"Ep {epoch} (Step {evaluation.step:06d}): {loss}{val_loss}{recall}{speed}")
    log("    " + f"{evaluation.prompt} ...{evaluation.sample}".replace("\n", "\\n"))

def command_train(args):
    check(os.environ.get("WORLD_SIZE", "1") == "1", "torchrun starts several processes, and each "
          "of them would train a model of its own: use extras/scale.py train")
    run, corpus = run_to_train(args)
    log(f"{run.tokenizer.kind} tokenizer, vocabulary {run.config.vocab_size:,}; "
        f"{count_parameters(run.model):,} parameters; {run.total_steps} steps; loss of a uniform "
        f"guess {math.log(run.config.vocab_size):.3f}")
    if len(corpus.recall_tests) > RECALL_SAMPLE:
        log(f"During training, recall is measured on at most {RECALL_SAMPLE} sentences.")
    first_step = run.step
    if first_step >= run.total_steps:
        note(f"note: {args.model} has already been trained for {run.step} steps, so nothing is "
             "left to do: set a larger --epochs or --max-steps")
    train_with_progress(run, corpus, args.model, args.resume)
    finish_training(args, run, corpus, first_step)

def finish_training(args, run, corpus, first_step):
    """If training is complete, print the losses and recall, draw the loss curves, and suggest the
    next command. Otherwise print how to continue, and raise KeyboardInterrupt."""
    given = [f"{option_string(name)}={args.given[name]}" for name in ("model", "plot", "device")
             if name in args.given]
    if run.step < run.total_steps:
        note(f"stopped after step {run.step} of {run.total_steps} and saved {args.model}; to "
             f"continue: {command_line('train', '--resume', *given)}")
        raise KeyboardInterrupt
    if run.train_config.keep_best:
        log(f"The weights are those of step {step_of_weights(run)}, which had the lowest "
            "validation loss.")
    log_losses(run, corpus)
    recall = log_recall(run, corpus)
    if recall is not None and recall < 0.95 and not run.train_config.keep_best:
        log("To raise recall, train longer (--epochs) or use a larger model (--emb-dim)")
    if run.step > first_step:
        log(f"saved {args.model}")
    plot_losses(run.history, run.config.vocab_size, args.plot)
    log(f"drew {args.plot}")
    model = ["--model", args.model] if "model" in args.given else []
    prompt = run.prompt.replace("\n", "\\n")
    log(f"Now let the model write: {command_line('generate', *model, '--prompt', prompt)}")

def command_plot(args):
    run = load_checkpoint(args.model)
    plot_losses(run.history, run.config.vocab_size, args.plot)
    log(f"drew {args.plot}")

def prompt_from_args(args, run):
    """Return the user's prompt or the run's. Print a note if the model may not continue it."""
    return check_prompt(args.given.get("prompt", run.prompt), run)

def check_prompt(prompt, run):
    token_ids, T = encode_prompt(run.tokenizer, prompt), run.config.context_length
    if run.tokenizer.kind == "word":
        pieces = zip(split_words(prompt), token_ids)
        unknown = [piece.strip() for piece, i in pieces if run.tokenizer.tokens[i] == UNKNOWN]
        if unknown:
            note(f"note: not in the vocabulary: {', '.join(unknown)}; the model sees {UNKNOWN} "
                 "instead")
    known = [beginning for beginning in run.beginnings
             if beginning.startswith(prompt.rstrip()) or prompt.startswith(beginning)]
    if run.beginnings and not known:
        similar = {beginning[:len(prompt)]: beginning for beginning in run.beginnings}
        close = difflib.get_close_matches(prompt, similar, n=1)
        nearest = f" (the most similar one begins with {similar[close[0]]!r})" if close else ""
        note(f"note: no sentence of the recall test begins like this prompt{nearest}, so the "
             "continuation may not be in the story")
    if len(token_ids) > T:
        note(f"note: the prompt has {len(token_ids)} tokens, but the model sees only the last {T}")
    return prompt

def command_attention(args):
    run = load_checkpoint(args.model)
    save_figure(run.attention(prompt_from_args(args, run)), args.plot)
    log(f"drew {args.plot}")

def command_next(args):
    run = load_or_create_run(args)
    sampling = asdict(override_settings(Sampling(temperature=1.0), args.given))
    log(run.next(prompt_from_args(args, run), **sampling))

def command_generate(args):
    sampling = override_settings(Sampling(), args.given)
    if sampling.temperature == 0:
        names = [name for name in names_of(Sampling) if name != "temperature"]
        if args.untrained:
            names.remove("seed")            # it also seeds the weights
        refuse_options(args, names, "is for sampling: give a --temperature above 0 as well")
    run = load_or_create_run(args)
    prepare_inference(run.model, args.precision)
    if args.untrained and sampling.temperature == 0 and args.sentences == 0:       # step 8
        idx = run.window(prompt_from_args(args, run))
        longer = generate_text_simple(run.model, idx, args.max_new_tokens,
                                      run.config.context_length)
        log(run.prompt + run.tokenizer.decode(longer[0, idx.shape[1]:].tolist()))
        return
    typed = "prompt" not in args.given and not args.untrained
    for prompt in typed_prompts() if typed else [args.given.get("prompt", run.prompt)]:
        check_prompt(prompt, run)
        pieces = generate_text(run.model, run.tokenizer, prompt, args.max_new_tokens, sampling,
                               args.sentences)
        first = next(pieces, "")        # before the prompt is printed, because it may be refused
        for piece in itertools.chain([prompt, first], pieces):
            log(piece, end="")
        log()

def typed_prompts():
    """Yield the lines that are typed, or that come through a pipe, if they are not empty."""
    lines = sys.stdin
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline     # noqa: F401; input() then has a history and the arrow keys
        note("Type the first words of a sentence, then Enter. Ctrl-C ends the program.")
        lines = iter(lambda: input("> "), None)
    try:
        for line in lines:
            if line.strip():
                yield line.rstrip("\r\n").replace("\\n", "\n")
    except EOFError:        # Ctrl-D
        note("")

def command_tour(args):
    folder = Path("story_llm_tour")
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise StoryError(f"the folder {folder} cannot be created here ({error.strerror}): run the "
                         "tour in another folder") from None
    log(f"Running all steps in order. Their files are saved in the folder {folder}.")
    for command in TOUR:
        words = shlex.split(command)
        _, meaning, options = COMMANDS[words[0]]
        if "model" in options and "--untrained" not in words:
            words += ["--model", str(folder / "story_llm.pt")]
        log(f"\n\n═══ {meaning}\n\n$ {command_line(*words)}\n")
        status = main(words)
        if status != 0:
            return status

TOUR = ("words", "bpe", "windows", "model", "generate --untrained", "evaluate --untrained", "train",
        "plot", f'generate --prompt "{DEFAULT_PROMPT}"', "attention", "next --temperature 2")
PRESETS = {     # {name: the settings that differ from the defaults}; "auto": settings_for_size
    "auto": {}, "story": {},
    "writer": {"tokenizer": "story", "vocab_size": 2048, "context_length": 128, "emb_dim": 256,
               "n_layers": 4, "position": "rotary", "tie_weights": True, "optimizer": "muon",
               "batch_size": 16, "epochs": 9, "prompt_windows": 0.0, "keep_best": True},
    "gpt2-small": {"context_length": 256, "emb_dim": 768, "n_heads": 12, "n_layers": 12,
                   "qkv_bias": True, "tie_weights": True, "gelu": "tanh", "learning_rate": 6e-4}}

@dataclass(frozen=True, kw_only=True)
class Options(Settings):
    """The options that are not settings of a model, of training or of sampling."""
    text: tuple = setting((DEFAULT_TEXT,), "the story: text files, folders of .txt files, or - for "
                          "standard input (default: Short_Story.txt)")
    encoding: str = setting("", "encoding of the text (default: detect UTF-8, UTF-16 or UTF-32)")
    tokenizer: str = setting("auto", "auto: gpt2 for a short text, if it is available and "
                             "suits the text, else story")
    vocab_size: int = setting(2048, "vocabulary size of --tokenizer story (default: 2048, or more "
                              "for a long text)")
    full_vocab: bool = setting(False, "keep all 50,257 tokens of GPT-2")
    preset: str = setting("auto", "settings to start from: auto to memorize a text of any size, "
                          "story to memorize a short text, writer to write new text in the same "
                          "style, gpt2-small for the smallest GPT-2; the defaults below are those "
                          "for a text of less than 60 KB")
    model: str = setting("story_llm.pt", "the checkpoint file")
    untrained: bool = setting(False, "use a new, untrained model, built with the options below")
    resume: bool = setting(False, "continue the training of --model, with the settings saved in it")
    device: str = setting("auto", "cpu, cuda, mps (Apple), or auto: a GPU if there is one")
    prompt: str = setting("", "the text that the model continues; \\n is a line break")
    max_new_tokens: int = setting(100, "maximum number of tokens to generate")
    sentences: int = setting(0, "stop after this many sentences, or after --max-new-tokens "
                             "(0: no limit)")
    stride: int = setting(0, "tokens between the starts of two windows (0: the context length)")
    plot: str = setting("", "where to save the picture: .png, .svg or .pdf (default: loss.png or "
                        "attention.png, preceded by the name of --model if that is given)")

FIELDS, GROUPS = {}, {}     # {setting: its field}, {setting: where --help lists it}; later ones win
for title, settings in (("sampling", Sampling), ("training", TrainConfig), ("the model", GPTConfig),
                        ("options", Options)):
    FIELDS.update({f.name: f for f in fields(settings)})
    GROUPS.update(dict.fromkeys(names_of(settings), title))
GROUPS["seed"] = "options"
# {(command, setting): the default of this command, where it is a different one}
DEFAULTS = {("next", "temperature"): 1.0, ("generate", "precision"): "fp32"}
TOKENIZER = ("text", "encoding", "tokenizer", "vocab_size", "full_vocab")
NEW_MODEL = (*TOKENIZER, "preset", "val_fraction", "seed", *names_of(GPTConfig))
RESUME_OPTIONS = ("text", "encoding", "model", "resume", "epochs", "max_steps", "eval_every",
                  "device", "plot")

def further_options(options):
    """Return the options that a command has with --untrained."""
    return NEW_MODEL if "untrained" in options else ()

COMMANDS = {    # {name: (function, help, options)}
    "words": (command_words, "steps 2, 3: the text as words and as word ids",
              ("text", "encoding", "prompt")),
    "bpe": (command_bpe, "step 4: the text as byte-pair tokens", (*TOKENIZER, "prompt")),
    "windows": (command_windows, "step 5: windows of the text, inputs and targets",
                (*TOKENIZER, "context_length", "stride", "val_fraction")),
    "model": (command_model, "steps 6, 7: shapes and parameter counts of the model",
              (*NEW_MODEL, "device")),
    "evaluate": (command_evaluate, "step 9: losses and recall of a model",
                 ("text", "encoding", "model", "device", "precision", "untrained")),
    "train": (command_train, "steps 10, 11: train a model and save it",
              ("text", "model", "epochs", "tokenizer", "resume", *NEW_MODEL, *names_of(TrainConfig),
               "prompt", "plot", "device")),
    "plot": (command_plot, "step 12: draw the loss curves of a saved model", ("model", "plot")),
    "generate": (command_generate, "steps 8, 13: continue a prompt",
                 ("model", "prompt", "max_new_tokens", "sentences", *names_of(Sampling), "device",
                  "precision", "untrained")),
    "attention": (command_attention, "draw which tokens each token attends to",
                  ("model", "prompt", "plot")),
    "next": (command_next, "show the most likely next tokens and how sampling changes them",
             ("model", "prompt", *(name for name in names_of(Sampling) if name != "seed"), "device",
              "untrained")),
    "tour": (command_tour, "run all steps, one after the other", ())}

def add_option(parser, name, default=None):
    """Add a command-line option for a settings field, with its meaning and default in the help."""
    f = FIELDS[name]
    kind = {"type": f.type, "metavar": "TEXT" if f.type is str else "N"}
    if name in CHOICES:
        kind = {"choices": CHOICES[name]}
    elif f.type is bool:
        kind = {"action": "store_true"}
    elif f.type is tuple:
        kind = {"nargs": "+", "action": "extend", "metavar": "FILE"}
    text = f.metadata["meaning"]
    default = f.default if default is None else default
    if default != "" and default is not False and "(default" not in text:
        text += f" (default: {default})"
    parser.add_argument(option_string(name), default=argparse.SUPPRESS,
                        help=text.replace("%", "%%"), **kind)

class Parser(argparse.ArgumentParser):
    """A parser that reports a mistake in one line."""
    def error(self, message):
        self.exit(2, f"error: {message} (python {self.prog} --help lists what is possible)\n")

def suggestion(word, options):
    """Return what the user may have meant by an unknown word of the command line."""
    if word.startswith("-"):
        possible = map(option_string, (*options, *further_options(options)))
        close = difflib.get_close_matches(word.split("=")[0], possible, 1)
    else:
        names = [name for name in ("text", "prompt", "model") if name in options]
        close = [f"{option_string(names[0])} {shlex.quote(word)}"] if names else []
    return f"; did you mean {close[0]}?" if close else ""

def parse(argv):
    """Parse a command line into a namespace. `given` holds only the options that the user typed."""
    argv = list(argv)
    for i in range(len(argv) - 1, 0, -1):
        if argv[i - 1] == "--prompt" and regex.match(r"-(?!-)", argv[i]):
            argv[i - 1:i + 1] = ["--prompt=" + argv[i]]     # argparse would take it for an option
    parser = Parser(
        prog="story_llm.py", description="A language model that explains itself: read story_llm.py "
        "from top to bottom. Most of its steps have a command.",
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
            add_option(groups[title], option, DEFAULTS.get((name, option)))
    parsed, unknown = parser.parse_known_args(argv)
    given = vars(parsed)
    command = given.pop("command")
    if command is None and unknown:
        parser.error(f"the first word must be a command, not {unknown[0]}")
    if command is None:
        return argparse.Namespace(handler=lambda args: log(parser.format_help().rstrip()))
    handler, _, options = COMMANDS[command]
    if unknown:
        subparsers.choices[command].error(f"{command} has no argument {unknown[0]}"
                                          f"{suggestion(unknown[0], options)}")
    if "text" in given:
        given["text"] = tuple(given["text"])
    args = make_namespace(given, handler, command)
    override_settings(Options(), given)         # raises StoryError if an option is invalid
    if not args.plot:
        picture = "attention.png" if command == "attention" else "loss.png"
        model = Path(args.model)
        args.plot = str(model.parent / f"{model.stem}_{picture}") if "model" in given else picture
    if not args.untrained:
        refuse_options(args, given.keys() - set(options), "requires --untrained, because a saved "
                       "model keeps the value that it was trained with")
    else:
        refuse_options(args, ["model"], "cannot be combined with --untrained")
    return args

def make_namespace(given, handler, command=None):
    """Return a namespace of the options that were typed, `given`, and the defaults of all others.
    It also has `given` itself and the handler of the command."""
    if "prompt" in given:
        given["prompt"] = given["prompt"].replace("\\n", "\n")      # line breaks are hard to type
    defaults = {name: DEFAULTS.get((command, name), f.default) for name, f in FIELDS.items()}
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
    note(f"error: {mistake}")
    return 1

def prepare_streams():
    """Use UTF-8 for files and pipes. In a terminal, print ? for characters that it cannot show."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:                          # closed by the caller
            setattr(sys, name, open(os.devnull, "r+"))
        with contextlib.suppress(AttributeError, OSError):      # replaced, or already read from
            stream = getattr(sys, name)
            stream.reconfigure(encoding=None if stream.isatty() else "utf-8", errors="replace")

# torch's threads wait for each other by spinning. This is fast, but when another program needs the
# processor, spinning threads hold up the ones that have work to do. GOMP_SPINCOUNT, set at the top
# of this file, makes them sleep after 2,000 spins.

def keep_memory():
    """Let glibc keep freed memory for the next step. Otherwise, allocating it again would take
    about a sixth of the training time."""
    with contextlib.suppress(OSError, AttributeError):      # not Linux, or another C library
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        # M_MMAP_THRESHOLD: blocks of up to 1 GB come from the heap
        if mallopt(-3, 1 << 30) == 0:
            mallopt(-3, 32 << 20)   # as much as an older glibc allows
        mallopt(-1, -1)             # M_TRIM_THRESHOLD: the heap never shrinks

if __name__ == "__main__":
    os.environ["MPLBACKEND"] = "agg"        # a notebook's backend works only in the notebook
    keep_memory()
    sys.exit(main())
