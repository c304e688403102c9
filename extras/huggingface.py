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
# Other values of these describe a model that story_llm.py does not have.
REQUIRED = {"model_type": "gpt2", "layer_norm_epsilon": 1e-5, "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
# GPT-2's format can express these settings. All others must have their defaults, so a model with a
# setting that story_llm.py gets later is refused, and not exported as if it did not have it.
EXPORTABLE = (*NAMES, "gelu", "qkv_bias", "drop_rate")

def read_config(folder):
    """Return (the GPTConfig of config.json, the kind of its tokenizer)."""
    found = json.loads((folder / "config.json").read_text("utf-8"))
    check(found.get("model_type") == "gpt2", f"its model_type is {found.get('model_type')}, "
          "not gpt2")
    found = REQUIRED | DEFAULTS | found
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

def config_json(run):
    """Return the contents of config.json. Raises StoryError if the model has a setting that GPT-2's
    format cannot express."""
    config = run.config
    for f in fields(config):
        value = getattr(config, f.name)
        check(f.name in EXPORTABLE or value == f.default, f"GPT-2's format cannot express "
              f"{f.name} {value}: train a model without {story_llm.option_string(f.name)}")
    activation = {"tanh": "gelu_new", "exact": "gelu"}.get(config.gelu)
    check(activation, f"GPT-2's format cannot express gelu {config.gelu}: train a model with "
          "--gelu exact or --gelu tanh")
    settings = {theirs: getattr(config, ours) for ours, theirs in NAMES.items()}
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.drop_rate)
    end_of_text = run.tokenizer.end_of_text
    return {**REQUIRED, "architectures": ["GPT2LMHeadModel"], **settings, "n_inner": None,
            "activation_function": activation, **dropout, "bos_token_id": end_of_text,
            "eos_token_id": end_of_text, "story_llm_tokenizer": run.tokenizer.kind}

# ─── Weights ───────────────────────────────────────────────────────────────────────────────────
LAYERS = {"ln_1": "norm1", "attn.c_proj": "att.out_proj", "ln_2": "norm2", "mlp.c_fc": "ff.expand",
          "mlp.c_proj": "ff.project"}       # {name in a block of GPT-2: name in our block}

def weight_names(n_layers):
    """{name in GPT-2: our name} of all weights but the output head and queries, keys and values."""
    layers = {"ln_f": "final_norm"}
    for i in range(n_layers):
        for theirs, ours in LAYERS.items():
            layers[f"h.{i}.{theirs}"] = f"trf_blocks.{i}.{ours}"
    names = {"wte.weight": "tok_emb.weight", "wpe.weight": "pos_emb.weight"}
    for theirs, ours in layers.items():
        for kind in ("weight", "bias"):
            names[f"{theirs}.{kind}"] = f"{ours}.{kind}"
    return names

def attention_names(n_layers):
    """{name in GPT-2: [our names of queries, keys and values, which it contains in this order]}."""
    names = {}
    for i in range(n_layers):
        for kind in ("weight", "bias"):
            names[f"h.{i}.attn.c_attn.{kind}"] = [
                f"trf_blocks.{i}.att.{layer}.{kind}" for layer in ("query", "key", "value")]
    return names

def transposed(name, weight):
    """The linear layers of GPT-2, whose names contain c_, have matrices of shape (inputs, outputs).
    torch has (outputs, inputs)."""
    return weight.T.contiguous() if ".c_" in name and weight.dim() == 2 else weight

def to_gpt2(model):
    """Return the weights of a model as {name in GPT-2: tensor}. Raises StoryError if GPT-2 has no
    place for one of them, or needs one that the model lacks."""
    config, ours = model.config, model.state_dict()

    def take(name):
        check(name in ours, f"GPT-2 needs a weight {name}, which this model does not have")
        return ours.pop(name)

    theirs = {}
    for name, our_name in weight_names(config.n_layers).items():
        theirs[name] = transposed(name, take(our_name))
    for name, our_names in attention_names(config.n_layers).items():
        for our_name in our_names:
            if our_name.endswith(".bias"):      # GPT-2 has one; without qkv_bias, ours is 0
                ours.setdefault(our_name, torch.zeros(config.emb_dim))
        theirs[name] = transposed(name, torch.cat([take(our_name) for our_name in our_names]))
    head = take("out_head.weight")
    if not config.tie_weights:
        theirs["lm_head.weight"] = head
    check(not ours, f"GPT-2 has no place for {', '.join(ours)}, which are weights of this model")
    return theirs

def from_gpt2(theirs, config):
    """Return weights for GPTModel(config) from {name in GPT-2: tensor}. Raises StoryError unless
    the names and shapes are those that the config needs."""
    theirs = {name.removeprefix("transformer."): weight for name, weight in theirs.items()
              if not name.endswith((".attn.bias", ".attn.masked_bias"))}    # masks, in old files
    if config.tie_weights:
        theirs.pop("lm_head.weight", None)          # the same as wte.weight
    with torch.device("meta"):      # shapes without memory, because config.json may claim any size
        needed = to_gpt2(story_llm.GPTModel(config))
    for name in sorted(theirs.keys() | needed.keys()):
        check(name in needed, f"the folder has a weight {name}, which is not one of GPT-2's")
        check(name in theirs, f"the weight {name} is missing in the folder")
        found, expected = tuple(theirs[name].shape), tuple(needed[name].shape)
        check(found == expected, f"the weight {name} has the shape {found} in the folder, but "
              f"according to its config.json it should be {expected}")
    theirs = {name: transposed(name, weight) for name, weight in theirs.items()}
    ours = {}
    for name, our_name in weight_names(config.n_layers).items():
        ours[our_name] = theirs[name]
    for name, our_names in attention_names(config.n_layers).items():
        for our_name, part in zip(our_names, theirs[name].chunk(3)):
            ours[our_name] = part
    ours["out_head.weight"] = theirs["wte.weight" if config.tie_weights else "lm_head.weight"]
    return ours

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

def tokenizer_files(run):
    """Return {name of a file: its contents}, from which transformers makes the same tokenizer."""
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
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [end_of_text],
        "normalizer": None, "post_processor": None, "decoder": byte_level,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": False,
                  "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "byte_fallback": False, "vocab": ids, "merges": merges}}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT,
              "bos_token": END_OF_TEXT, "model_max_length": run.config.context_length,
              "clean_up_tokenization_spaces": False}
    lines = ["#version: 0.2", *(f"{first} {second}" for first, second in merges), ""]
    return {"tokenizer.json": json.dumps(contents),
            "tokenizer_config.json": json.dumps(config, indent=2),
            "vocab.json": json.dumps(ids | {END_OF_TEXT: tokenizer.end_of_text}),
            "merges.txt": "\n".join(lines)}

# ─── Folders ───────────────────────────────────────────────────────────────────────────────────
@contextlib.contextmanager
def explain_folder_errors(folder):
    """Turn the errors of reading a folder, which may come from anywhere, into StoryErrors."""
    try:
        yield
    except OSError as error:
        raise StoryError(f"{error.filename} cannot be read ({error.strerror})") from None
    except (AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise StoryError(f"{folder} does not contain a GPT-2 that can be loaded "
                         f"({first_line(error)})") from None

def read_folder(folder):
    """Return (config, tokenizer, weights) of a folder. Raises StoryError if it is not a GPT-2."""
    folder = Path(folder)
    check(folder.is_dir(), f"{folder} is not a folder: give one that contains config.json, the "
          "weights and the tokenizer")
    with explain_folder_errors(folder):
        config, kind = read_config(folder)
        tokenizer = read_tokenizer(folder, kind)
        check(tokenizer.vocab_size == config.vocab_size, f"its vocab_size is {config.vocab_size}, "
              f"but its tokenizer has {tokenizer.vocab_size} tokens")
        theirs = read_weights(folder)
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

def save(run, folder):
    """Write a run to a new folder. Raises StoryError if that fails, or if GPT-2's format cannot
    express the model."""
    folder = Path(folder)
    check(not folder.exists(), f"{folder} exists: give the path of a new folder")
    check(run.tokenizer.kind != "word", "GPT-2's format cannot express a word tokenizer: train a "
          "model with another --tokenizer")
    settings, weights = config_json(run), {}
    for name, weight in to_gpt2(copy.deepcopy(run.model).cpu()).items():
        weights[name if name == "lm_head.weight" else f"transformer.{name}"] = weight
    safetensors = import_safetensors()
    temporary = Path(f"{folder}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        files = {**tokenizer_files(run), "config.json": json.dumps(settings, indent=2)}
        for name, contents in files.items():
            (temporary / name).write_text(contents, "utf-8")
        safetensors.torch.save_file(weights, temporary / "model.safetensors", {"format": "pt"})
        temporary.rename(folder)
    except (OSError, safetensors.SafetensorError) as error:
        raise StoryError(f"{folder} could not be written ({first_line(error)}): make room, or give "
                         "another path") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)

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
