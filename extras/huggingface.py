"""Load GPT-2 from Hugging Face's files, fine-tune it on a story, and save models in their format.

    python extras/huggingface.py load FOLDER --model gpt2.pt
    python extras/huggingface.py load FOLDER --model gpt2.pt --text my_story.txt
    python extras/huggingface.py save --model story_llm.pt FOLDER

The first command makes a checkpoint from a folder that contains GPT-2 in the format of Hugging
Face's transformers. `python story_llm.py generate --model gpt2.pt` continues a prompt with it. The
second one makes a run at step 0, with GPT-2's weights and tokenizer and your text. `python
story_llm.py train --resume --model gpt2.pt` then trains it. The third command makes such a folder
from a checkpoint. AutoModelForCausalLM and AutoTokenizer of transformers load it without any code
of this project.

The model of story_llm.py is GPT-2, and only the format differs. In GPT-2's files the weights have
other names, the matrices are transposed, and those of queries, keys and values are one matrix.
"""
import argparse
import contextlib
import copy
import functools
import json
import os
import shlex
import shutil
import sys
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))      # the folder of story_llm.py
import story_llm
from story_llm import END_OF_TEXT, GPTConfig, Run, StoryError, TrainConfig, check, log, note

# ─── Settings ──────────────────────────────────────────────────────────────────────────────────
# What config.json calls the settings of GPTConfig, and the values of those that it leaves out.
NAMES = {"vocab_size": "vocab_size", "context_length": "n_positions", "emb_dim": "n_embd",
         "n_heads": "n_head", "n_layers": "n_layer", "tie_weights": "tie_word_embeddings"}
DEFAULTS = {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12,
            "tie_word_embeddings": True, "activation_function": "gelu_new"}
ACTIVATIONS = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "exact"}
APPROXIMATIONS = {"exact": "none", "tanh": "tanh"}      # what torch calls them
# Other values of these describe a model that story_llm.py does not have.
REQUIRED = {"model_type": "gpt2", "layer_norm_epsilon": 1e-5, "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
# GPT-2's format can express these settings. All others must have their defaults, so a model with a
# setting that story_llm.py gets later is refused, and not exported as if it did not have it.
EXPORTABLE = (*NAMES, "gelu", "qkv_bias", "drop_rate")
# The largest difference between two programs, as a share of the largest logit. Rounding makes it
# 0.000001 (0.00004 in a deep model with huge weights), the other form of GELU 0.0002.
ROUNDING = 1e-4

def read_config(folder):
    """Return (the GPTConfig of config.json, the kind of its tokenizer)."""
    found = REQUIRED | DEFAULTS | json.loads((folder / "config.json").read_text("utf-8"))
    for name, value in REQUIRED.items():
        check(found[name] == value, f"its {name} is {found[name]}, not {value}")
    width, activation = found.get("n_inner"), found["activation_function"]
    check(width in (None, 4 * found["n_embd"]), f"its n_inner is {width}, not 4 times n_embd")
    check(activation in ACTIVATIONS, f"its activation_function is {activation}, not one of "
          f"{', '.join(ACTIVATIONS)}")
    kind = found.get("story_llm_tokenizer", "gpt2")
    check(kind in story_llm.SPLIT_PATTERNS, f"its story_llm_tokenizer is {kind}")
    settings = {ours: found[theirs] for ours, theirs in NAMES.items()}
    return GPTConfig(**settings, gelu=ACTIVATIONS[activation], qkv_bias=True), kind

def check_expressible(run, exportable, name):
    """Raise StoryError if a run has a tokenizer or a setting that the format called `name` cannot
    express. Settings that are not `exportable` must have their defaults."""
    check(run.tokenizer.kind != "word", f"{name} cannot express a word tokenizer: train a model "
          "with another --tokenizer")
    for f in fields(run.config):
        value = getattr(run.config, f.name)
        check(f.name in exportable or value == f.default, f"{name} cannot express "
              f"{f.name} {value}: train a model without {story_llm.option_string(f.name)}")
    check(run.config.gelu in APPROXIMATIONS, f"{name} cannot express gelu {run.config.gelu}: train "
          "a model with --gelu exact or --gelu tanh")

def config_json(run):
    """Return the contents of config.json."""
    config = run.config
    settings = {theirs: getattr(config, ours) for ours, theirs in NAMES.items()}
    activation = {"tanh": "gelu_new", "exact": "gelu"}[config.gelu]
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.drop_rate)
    end_of_text = run.tokenizer.end_of_text
    return {**REQUIRED, "architectures": ["GPT2LMHeadModel"], **settings, **dropout,
            "activation_function": activation, "bos_token_id": end_of_text,
            "eos_token_id": end_of_text, "story_llm_tokenizer": run.tokenizer.kind}

# ─── Weights ───────────────────────────────────────────────────────────────────────────────────
# {name in a block of GPT-2: names in our block, of its parts one after the other}
LAYERS = {"ln_1": ("norm1",), "attn.c_attn": ("att.query", "att.key", "att.value"),
          "attn.c_proj": ("att.out_proj",), "ln_2": ("norm2",), "mlp.c_fc": ("ff.expand",),
          "mlp.c_proj": ("ff.project",)}

def weight_names(n_layers):
    """{name in GPT-2: our names of its parts} of all weights."""
    layers = {"ln_f": ["final_norm"]}
    for i in range(n_layers):
        for theirs, ours in LAYERS.items():
            layers[f"h.{i}.{theirs}"] = [f"trf_blocks.{i}.{layer}" for layer in ours]
    names = {"wte.weight": ["tok_emb.weight"], "wpe.weight": ["pos_emb.weight"],
             "lm_head.weight": ["out_head.weight"]}
    for theirs, ours in layers.items():
        for kind in ("weight", "bias"):
            names[f"{theirs}.{kind}"] = [f"{layer}.{kind}" for layer in ours]
    return names

def check_shapes(weights, config, where):
    """Raise StoryError unless the weights {name in GPT-2: tensor}, which come from `where`, have
    the names and shapes of a GPT-2 with these settings."""
    V, T, C = config.vocab_size, config.context_length, config.emb_dim
    shapes = {"wte.weight": (V, C), "wpe.weight": (T, C), "lm_head.weight": (V, C),
              "ln_f.weight": (C,), "ln_f.bias": (C,)}
    if config.tie_weights:
        del shapes["lm_head.weight"]
    block = {"ln_1": (C,), "attn.c_attn": (C, 3 * C), "attn.c_proj": (C, C), "ln_2": (C,),
             "mlp.c_fc": (C, 4 * C), "mlp.c_proj": (4 * C, C)}
    for i in range(config.n_layers):
        for layer, shape in block.items():
            shapes[f"h.{i}.{layer}.weight"] = shape
            shapes[f"h.{i}.{layer}.bias"] = shape[-1:]
    for name in sorted(weights.keys() | shapes.keys()):
        check(name in shapes, f"{where} has a weight {name}, which is not one of GPT-2's")
        check(name in weights, f"GPT-2's weight {name} is missing in {where}")
        found = tuple(weights[name].shape)
        check(found == shapes[name], f"the weight {name} has the shape {found} in {where}, but "
              f"with its settings it should be {shapes[name]}")

def transposed(name, weight):
    """The linear layers of GPT-2, whose names contain c_, have matrices of shape (inputs, outputs).
    torch has (outputs, inputs)."""
    return weight.T.contiguous() if ".c_" in name and weight.dim() == 2 else weight

def to_gpt2(model):
    """Return the weights of a model as {name in GPT-2: tensor}. Those that GPT-2 does not have keep
    their names."""
    config, ours, theirs = model.config, model.state_dict(), {}
    for name, parts in weight_names(config.n_layers).items():
        if name.endswith("c_attn.bias") and not config.qkv_bias:    # GPT-2 always has one
            ours |= dict.fromkeys(parts, torch.zeros(config.emb_dim))
        if ours.keys() >= set(parts):
            theirs[name] = transposed(name, torch.cat([ours.pop(part) for part in parts]))
    if config.tie_weights:
        theirs.pop("lm_head.weight", None)      # the same as wte.weight
    return theirs | ours

def from_gpt2(theirs, config):
    """Return weights for GPTModel(config) from {name in GPT-2: tensor}. Raises StoryError unless
    the names and shapes are those that the config needs."""
    theirs = {name.removeprefix("transformer."): weight for name, weight in theirs.items()
              if not name.endswith((".attn.bias", ".attn.masked_bias"))}    # masks, in old files
    if config.tie_weights:
        theirs.pop("lm_head.weight", None)
    check_shapes(theirs, config, "the folder")
    theirs.setdefault("lm_head.weight", theirs["wte.weight"])
    ours = {}
    for name, parts in weight_names(config.n_layers).items():
        ours.update(zip(parts, transposed(name, theirs[name]).chunk(len(parts))))
    return ours

# A folder has no place for code. If you have given the model in story_llm.py another activation
# function, say, transformers takes its weights and computes something else with them, without a
# word. That is why GPT-2's forward pass stands here once more, where no edit of story_llm.py
# reaches it: a model is saved only if both compute the same logits.
def plain_logits(weights, config, token_ids):
    """Return the logits (T, V) that GPT-2, with rotary positions if the config says so, computes
    from the weights {name in GPT-2: tensor} and token ids (T,)."""
    def linear(x, name):
        return x @ weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])

    rotary = config.position == "rotary"
    x = weights["wte.weight"][token_ids]                                            # (T, C)
    if not rotary:
        x = x + weights["wpe.weight"][:len(token_ids)]
    for block in (f"h.{i}" for i in range(config.n_layers)):
        parts = linear(norm(x, f"{block}.ln_1"), f"{block}.attn.c_attn").chunk(3, dim=-1)
        queries, keys, values = [part.unflatten(-1, (config.n_heads, -1)).transpose(0, 1)
                                 for part in parts]                                 # (H, T, D)
        if rotary:
            queries, keys = turn(queries), turn(keys)
        contexts = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        x = x + linear(contexts.transpose(0, 1).flatten(1), f"{block}.attn.c_proj")
        hidden = F.gelu(linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc"),
                        approximate=APPROXIMATIONS[config.gelu])
        x = x + linear(hidden, f"{block}.mlp.c_proj")
    return norm(x, "ln_f") @ weights.get("lm_head.weight", weights["wte.weight"]).T

def turn(x):
    """Rotate x (H, T, D). Numbers i and i + D / 2 of a vector are the two parts of a complex
    number, whose angle grows by 10000^(-2i / D) from one position to the next."""
    real, imaginary = x.chunk(2, dim=-1)
    _, T, pairs = real.shape
    angles = torch.outer(torch.arange(T), 10000.0 ** (-torch.arange(pairs) / pairs))
    turned = torch.complex(real, imaginary) * torch.polar(torch.ones(T, pairs), angles)
    return torch.cat([turned.real, turned.imag], dim=-1)

def plain_weights(run, exportable, name):
    """Return the weights of a run as {name in GPT-2: tensor}. Raises StoryError if the format
    called `name`, which has the settings `exportable`, cannot express the run, or if the model
    computes other logits over a whole context than a plain GPT-2 with these weights."""
    check_expressible(run, exportable, name)
    model = copy.deepcopy(run.model).cpu().eval()
    weights, config = to_gpt2(model), model.config
    check_shapes(weights, config, "this edited model")
    generator = torch.Generator().manual_seed(0)
    window = torch.randint(config.vocab_size, (config.context_length,), generator=generator)
    with torch.no_grad():
        expected = plain_logits(weights, config, window)
        difference = (model(window[None])[0] - expected).abs().max()
    check(difference <= ROUNDING * expected.abs().max(), f"{name} has no place for code, and the "
          "model in story_llm.py has been edited: with the same weights, a plain GPT computes "
          f"logits that differ by up to {difference:.2g}. Train and save with the code as it was")
    return weights

def read_weights(folder):
    """Return {name in GPT-2: tensor}."""
    path = folder / "model.safetensors"
    if path.exists():
        load_file = import_safetensors().torch.load_file
    else:
        path = folder / "pytorch_model.bin"
        load_file = functools.partial(torch.load, map_location="cpu", weights_only=True)
    check(path.exists(), "it has no model.safetensors and no pytorch_model.bin (a model in several "
          "files cannot be loaded)")
    try:
        weights = load_file(path)
    except Exception as error:      # only a library ran, and a hostile file may break it
        raise StoryError(f"its weights cannot be read: {first_line(error)}") from None
    check(all(isinstance(name, str) and torch.is_tensor(weight)
              for name, weight in weights.items()), "its weights are not tensors with names")
    return weights

def import_safetensors():
    try:
        import safetensors.torch
        return safetensors
    except ImportError:
        raise StoryError("safetensors is not installed: python -m pip install "
                         "safetensors") from None

def first_line(error):
    return str(error).split("\n")[0][:200] or type(error).__name__

# ─── Tokenizer ─────────────────────────────────────────────────────────────────────────────────
# GPT-2's files show each byte of a token as a character. A byte that is a visible character in
# latin-1 stands for itself, and the others get the characters from 256 on.
VISIBLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256)]
INVISIBLE = [byte for byte in range(256) if byte not in VISIBLE]
CHARACTERS = dict(zip(VISIBLE + INVISIBLE, map(chr, [*VISIBLE, *range(256, 512)])))
BYTES = {character: byte for byte, character in CHARACTERS.items()}

def as_characters(token):
    """A token, a byte string, as GPT-2's files show it: b" king" is "Ġking"."""
    return "".join(CHARACTERS[byte] for byte in token)

def all_merges(tokens):
    """Return all pairs of tokens that together are a token, in the order of that token. tiktoken
    merges two neighbours whenever the result is a token, no matter from which pair it was learned,
    so transformers must know all these pairs."""
    known, merges = set(tokens), []
    for token in tokens:
        for cut in range(1, len(token)):
            pair = token[:cut], token[cut:]
            if known.issuperset(pair):
                merges.append(pair)
    return merges

def read_tokenizer(folder, kind):
    """Return the BPETokenizer of vocab.json and merges.txt, or of tokenizer.json."""
    if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        ids = json.loads((folder / "vocab.json").read_text("utf-8"))
        lines = (folder / "merges.txt").read_text("utf-8").split("\n")
        merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    else:
        contents = json.loads((folder / "tokenizer.json").read_text("utf-8"))
        check(contents["model"]["type"] == "BPE", "its tokenizer is not a byte-pair encoding")
        ids = contents["model"]["vocab"]
        ids |= {added["content"]: added["id"] for added in contents["added_tokens"]}
        merges = [pair.split(" ") if isinstance(pair, str) else pair
                  for pair in contents["model"]["merges"]]
    names = sorted(ids, key=ids.get)
    check([ids[name] for name in names] == list(range(len(ids))), "its token ids have gaps")
    check(names[-1] == END_OF_TEXT, f"its last token is {names[-1]!r}, not {END_OF_TEXT}")
    tokens = []
    for name in names[:-1]:
        check(name and set(name) <= BYTES.keys(), f"its token {name!r} does not consist of bytes")
        tokens.append(bytes(BYTES[character] for character in name))
    # tiktoken merges in the order of the token ids, so the merges must be in that order too.
    results = [ids.get(first + second, -1) for first, second in merges]
    in_order = all(one <= next_one for one, next_one in pairwise(results))
    merged = {token_id for token_id, token in enumerate(tokens) if len(token) > 1}
    check(in_order and merged == set(results), "its tokens are not in the order of its merges")
    return story_llm.restore_tokenizer(kind, tokens)

def write_tokenizer(run, folder):
    """Write the files from which transformers, or the package tokenizers, makes the tokenizer."""
    tokenizer = run.tokenizer
    ids = {as_characters(token): token_id for token_id, token in enumerate(tokenizer.tokens)}
    merges = [[as_characters(half) for half in pair] for pair in all_merges(tokenizer.tokens)]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                  "use_regex": False}
    end_of_text = {"id": tokenizer.end_of_text, "content": END_OF_TEXT, "special": True,
                   "normalized": False, "single_word": False, "lstrip": False, "rstrip": False}
    split = {"type": "Split", "pattern": {"Regex": story_llm.SPLIT_PATTERNS[tokenizer.kind]},
             "behavior": "Isolated", "invert": False}
    contents = {
        "version": "1.0", "added_tokens": [end_of_text],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "model": {"type": "BPE", "vocab": ids, "merges": merges}, "decoder": byte_level}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT,
              "bos_token": END_OF_TEXT, "model_max_length": run.config.context_length,
              "clean_up_tokenization_spaces": False}
    (folder / "tokenizer.json").write_text(json.dumps(contents), "utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), "utf-8")

# ─── Folders ───────────────────────────────────────────────────────────────────────────────────
def read_folder(folder):
    """Return (config, tokenizer, weights) of a folder. Raises StoryError if it is not a GPT-2."""
    folder = Path(folder)
    check(folder.is_dir(), f"{folder} is not a folder: give one that contains config.json, the "
          "weights and the tokenizer")
    try:        # the files may come from anywhere
        config, kind = read_config(folder)
        tokenizer = read_tokenizer(folder, kind)
        check(tokenizer.vocab_size == config.vocab_size, f"its vocab_size is {config.vocab_size}, "
              f"but its tokenizer has {tokenizer.vocab_size} tokens")
        theirs = read_weights(folder)
    except OSError as error:
        raise StoryError(f"{error.filename} cannot be read ({error.strerror})") from None
    except (AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise StoryError(f"{folder} does not contain a GPT-2 that can be loaded "
                         f"({first_line(error)})") from None
    return config, tokenizer, from_gpt2(theirs, config)

def load(folder):
    """Return the Run of a folder, ready to generate. Raises StoryError."""
    config, tokenizer, weights = read_folder(folder)
    model = story_llm.restore_model(config, weights)
    return Run(model, tokenizer, TrainConfig(), fingerprint="", steps_per_epoch=1, total_steps=1,
               prompt="Once upon a time")

def load_to_train(folder, text, train_config, context_length=None, drop_rate=0.0):
    """Return (a run at step 0 with the weights of a folder, the corpus of a text, which is split as
    `train_config` says). A context length shorter than GPT-2's takes less time and memory. Raises
    StoryError."""
    config, tokenizer, weights = read_folder(folder)
    n_positions = config.context_length
    if context_length is None:
        context_length = n_positions
    check(context_length <= n_positions, f"--context-length {context_length} is too long: this "
          f"GPT-2 has learned only {n_positions} positions")
    config = replace(config, context_length=context_length, drop_rate=drop_rate)
    corpus = story_llm.corpus_from_text(text, tokenizer, train_config)
    run = story_llm.new_run(corpus, config, train_config)       # may reduce the context length
    weights["pos_emb.weight"] = weights["pos_emb.weight"][:run.config.context_length]
    run.model.load_state_dict(weights)
    return run, corpus

@contextlib.contextmanager
def new_folder(folder, *errors):
    """Yield a temporary folder, which is renamed to `folder` after the block, or deleted if the
    block fails. OSError and `errors` become StoryErrors."""
    folder = Path(folder)
    check(not os.path.lexists(folder), f"{folder} exists: give the path of a new folder")
    temporary = Path(f"{folder}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        temporary.rename(folder)
    except (OSError, *errors) as error:
        raise StoryError(f"{folder} could not be written ({first_line(error)}): make room, or give "
                         "another path") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)

def save(run, folder):
    """Write a run to a new folder. Raises StoryError if that fails, or if GPT-2's format cannot
    express the model."""
    weights = {}
    for name, weight in plain_weights(run, EXPORTABLE, "GPT-2's format").items():
        weights[name if name == "lm_head.weight" else f"transformer.{name}"] = weight
    safetensors = import_safetensors()
    with new_folder(folder, safetensors.SafetensorError) as new:
        write_tokenizer(run, new)
        (new / "config.json").write_text(json.dumps(config_json(run), indent=2), "utf-8")
        safetensors.torch.save_file(weights, new / "model.safetensors", {"format": "pt"})

# ─── The command line ──────────────────────────────────────────────────────────────────────────
FINE_TUNING = TrainConfig(learning_rate=1.25e-3)    # half of the default, for a trained model
TRAINING = story_llm.names_of(TrainConfig)

def run_from_args(args):
    """Return a run of the folder: with --text, one to train, else one to generate with."""
    if "text" not in args.given:
        story_llm.refuse_options(args, (*TRAINING, "context_length", "drop_rate", "prompt"),
                                 "is for training: give a --text as well")
        return load(args.folder)
    train_config = story_llm.override_settings(FINE_TUNING, args.given)
    text = story_llm.load_text(args.text, args.encoding)
    run, corpus = load_to_train(args.folder, text, train_config,
                                args.given.get("context_length"), args.drop_rate)
    if run.config.context_length == len(corpus.train_ids) - 1:
        note(f"the text has only {len(corpus.train_ids)} tokens, so the context length is "
             f"{run.config.context_length}")
    run.text_paths, run.encoding = list(args.text), args.encoding
    run.prompt = args.given.get("prompt", run.prompt)
    return run

def command_load(args):
    story_llm.check_writable(args.model)
    story_llm.check_different(args.model, *args.text)
    run = run_from_args(args)
    kept = story_llm.keep_finished_model(args.model)
    if kept:
        note(f"the model that was at {args.model} is kept as {kept}")
    story_llm.save_checkpoint(args.model, run)
    log(f"saved {args.model}: {story_llm.count_parameters(run.model):,} parameters, vocabulary "
        f"{run.config.vocab_size:,}, context length {run.config.context_length}")
    if run.text_paths:
        command = shlex.join(["train", "--resume", "--model", args.model])
        log(f"to train it for {run.total_steps} steps: python story_llm.py {command}")

def command_save(args):
    save(story_llm.load_checkpoint(args.model), args.folder)
    log(f"saved {args.folder}")

def parse(argv):
    """Parse a command line into a namespace. `given` holds only the options that were typed."""
    parser = story_llm.Parser(prog="extras/huggingface.py",
                              description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(title="commands", dest="command", required=True)

    command = commands.add_parser("load", allow_abbrev=False,
                                  help="make a checkpoint from a folder that contains GPT-2")
    command.add_argument("folder", help="contains config.json, the weights and the tokenizer")
    command.add_argument("--model", default="gpt2.pt", help="the checkpoint (default: gpt2.pt)")
    training = command.add_argument_group("to train it with `story_llm.py train --resume`")
    training.add_argument("--context-length", type=int, default=argparse.SUPPRESS, metavar="N",
                          help="tokens in a window (default: the positions that GPT-2 has learned)")
    training.add_argument("--learning-rate", type=float, default=argparse.SUPPRESS, metavar="N",
                          help=f"peak learning rate (default: {FINE_TUNING.learning_rate})")
    for name in ("text", "encoding", "drop_rate", "prompt", *TRAINING):
        if name != "learning_rate":
            story_llm.add_option(training, name)

    command = commands.add_parser("save", allow_abbrev=False,
                                  help="make a folder for transformers from a checkpoint")
    command.add_argument("folder", help="the folder to make")
    command.add_argument("--model", default="story_llm.pt",
                         help="the checkpoint (default: story_llm.pt)")

    given = vars(parser.parse_args(argv))
    handler = {"load": command_load, "save": command_save}[given.pop("command")]
    return story_llm.make_namespace(given, handler)

def run_command(argv):
    args = parse(argv)
    return args.handler(args)

def main(argv=None):
    """Run the program with the words of a command line; return the exit status."""
    return story_llm.exit_status(run_command, sys.argv[1:] if argv is None else argv)

if __name__ == "__main__":
    sys.exit(main())
