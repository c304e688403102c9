"""GPT-2 in, and what is learned here out: folders of Hugging Face's transformers.

    python extras/huggingface.py load FOLDER --model gpt2.pt
    python extras/huggingface.py save --model story_llm.pt FOLDER

The model of story_llm.py is GPT-2's. Its weights only have other names there, matrices stand turned
(Conv1D: inputs by outputs), and queries, keys and values are one matrix. A token is written in
letters that can be seen: each byte has one of its own. `load` makes a checkpoint of a folder, with
which `generate`, `next`, `attention`, `evaluate` and `train --start` work. `save` makes a folder
that `AutoModelForCausalLM` and `AutoTokenizer` load without any code of ours.
"""
import argparse
import contextlib
import json
import os
import shutil
import sys
from itertools import pairwise
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))      # there stands story_llm.py
import story_llm
from story_llm import END_OF_TEXT, GPTConfig, Run, TrainConfig, check, log

# What config.json leaves out is as in the first GPT-2; what we cannot do otherwise must be so.
USUAL = {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12,
         "activation_function": "gelu_new", "tie_word_embeddings": True}
MUST_BE = {"model_type": "gpt2", "layer_norm_epsilon": 1e-5, "scale_attn_weights": True,
           "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
GELU = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "exact"}
SPLITS = {"gpt2": story_llm.GPT2_SPLIT, "story": story_llm.STORY_SPLIT}

PARTS = {"wte": "tok_emb", "wpe": "pos_emb", "ln_f": "final_norm"}
PARTS_OF_A_BLOCK = {"ln_1": "norm1", "attn.c_proj": "att.out_proj", "ln_2": "norm2",
                    "mlp.c_fc": "ff.widen", "mlp.c_proj": "ff.narrow"}
THREE = ("query", "key", "value")

def part_names(n_layers):
    """{their name of a part: ours}, but for queries, keys and values."""
    names = dict(PARTS)
    for i in range(n_layers):
        for theirs, ours in PARTS_OF_A_BLOCK.items():
            names[f"h.{i}.{theirs}"] = f"trf_blocks.{i}.{ours}"
    return names

def turned(name, tensor):
    """Conv1D's matrices are nn.Linear's with rows and columns swapped, and the other way round."""
    return tensor.T.contiguous() if ".c_" in name and tensor.dim() == 2 else tensor

def our_weights(theirs, config):
    """The weights of GPTModel(config), of those of a GPT-2 by name. Raises ValueError."""
    names = part_names(config.n_layers)
    ours = {}
    for name, tensor in theirs.items():
        name = name.removeprefix("transformer.")
        part, kind = name.rsplit(".", 1)
        if part.endswith(".attn") or name == "lm_head.weight" and config.tie_weights:
            continue            # the mask, in older files; or the tokens' own matrix once more
        tensor = turned(name, tensor.float())
        if part.endswith("attn.c_attn"):
            block = part.replace("h.", "trf_blocks.", 1).removesuffix("attn.c_attn")
            for which, piece in zip(THREE, tensor.chunk(3)):
                ours[f"{block}att.{which}.{kind}"] = piece.contiguous()
        else:
            ours[names.get(part, "out_head" if part == "lm_head" else part) + "." + kind] = tensor
    if config.tie_weights and "tok_emb.weight" in ours:
        ours["out_head.weight"] = ours["tok_emb.weight"]
    with torch.device("meta"):      # shapes without numbers: config.json may ask for any size
        expected = {name: w.shape for name, w in story_llm.GPTModel(config).state_dict().items()}
    for name in expected.keys() | ours.keys():
        found = tuple(ours[name].shape) if name in ours else "missing"
        wanted = tuple(expected[name]) if name in expected else "no weight of a GPT-2"
        check(found == wanted, f"its weight {name} is {found}, not {wanted}")
    return ours

def their_weights(run):
    """The weights of a run's model as transformers names and turns them."""
    ours, config = run.model.state_dict(), run.config
    theirs = {}
    for part, our_part in part_names(config.n_layers).items():
        for kind in ("weight", "bias"):
            if f"{our_part}.{kind}" in ours:
                name = f"{part}.{kind}"
                theirs[f"transformer.{name}"] = turned(name, ours[f"{our_part}.{kind}"])
    no_bias = torch.zeros(config.emb_dim)
    for i in range(config.n_layers):
        for kind in ("weight", "bias"):
            three = [ours.get(f"trf_blocks.{i}.att.{which}.{kind}", no_bias) for which in THREE]
            name = f"h.{i}.attn.c_attn.{kind}"
            theirs[f"transformer.{name}"] = turned(name, torch.cat(three))
    if not config.tie_weights:
        theirs["lm_head.weight"] = ours["out_head.weight"]
    return theirs

# A letter for each byte: its own where that can be seen, else one of those from 256 on.

SEEN = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256)]
UNSEEN = [byte for byte in range(256) if byte not in SEEN]
LETTER_OF = dict(zip(SEEN + UNSEEN, map(chr, SEEN + [*range(256, 512)])))
BYTE_OF = {letter: byte for byte, letter in LETTER_OF.items()}

def in_letters(token):
    return "".join(LETTER_OF[byte] for byte in token)

def merges_of(tokens):
    """All pairs of tokens that make a token, in the order of what they make: so tiktoken joins."""
    known = set(tokens)
    return [(token[:cut], token[cut:]) for token in tokens for cut in range(1, len(token))
            if token[:cut] in known and token[cut:] in known]

def read_tokenizer(folder, kind):
    """The BPETokenizer of vocab.json and merges.txt, or of tokenizer.json. Raises ValueError."""
    if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        ids = json.loads((folder / "vocab.json").read_text("utf-8"))
        lines = (folder / "merges.txt").read_text("utf-8").split("\n")
        merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    else:
        whole = json.loads((folder / "tokenizer.json").read_text("utf-8"))
        check(whole["model"]["type"] == "BPE", "its tokenizer is no byte-pair encoding")
        ids = whole["model"]["vocab"]
        ids |= {added["content"]: added["id"] for added in whole["added_tokens"]}
        merges = [pair.split(" ") if isinstance(pair, str) else pair
                  for pair in whole["model"]["merges"]]
    names = sorted(ids, key=ids.get)
    check([ids[name] for name in names] == list(range(len(ids))), "the ids of its tokens have gaps")
    check(names[-1] == END_OF_TEXT, f"its last token is {names[-1]!r}, not {END_OF_TEXT}")
    strange = [name for name in names[:-1] if not name or not set(name) <= BYTE_OF.keys()]
    check(not strange, f"its token {strange[:1]} is not made of bytes")
    tokens = ["".join(chr(BYTE_OF[letter]) for letter in name) for name in names[:-1]]
    made = [ids.get(left + right, -1) for left, right in merges]
    in_order = all(first <= second for first, second in pairwise(made))
    all_made = {ids[name] for name in names[:-1] if len(name) > 1} == set(made)
    check(in_order and all_made, "its tokens do not stand in the order in which they are joined")
    return story_llm.tokenizer_from({"kind": kind, "tokens": tokens})

def tokenizer_files(run):
    """{name of a file: its content}, by which transformers makes the same tokenizer."""
    tokenizer = run.tokenizer
    ids = {in_letters(token): i for i, token in enumerate(tokenizer.tokens)}
    merges = [[in_letters(half) for half in pair] for pair in merges_of(tokenizer.tokens)]
    split = SPLITS[tokenizer.kind].replace(r"\u200c", "\u200c").replace(r"\u200d", "\u200d")
    bytes_to_letters = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                        "use_regex": False}
    end = {"id": tokenizer.end_of_text, "content": END_OF_TEXT, "special": True,
           "normalized": False, "single_word": False, "lstrip": False, "rstrip": False}
    whole = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [end],
             "normalizer": None, "post_processor": None, "decoder": bytes_to_letters,
             "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                 {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated",
                  "invert": False}, bytes_to_letters]},
             "model": {"type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": False,
                       "continuing_subword_prefix": None, "end_of_word_suffix": None,
                       "byte_fallback": False, "vocab": ids, "merges": merges}}
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT,
             "bos_token": END_OF_TEXT, "model_max_length": run.config.context_length,
             "clean_up_tokenization_spaces": False}
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges), ""]
    return {"tokenizer.json": json.dumps(whole),
            "tokenizer_config.json": json.dumps(about, indent=2),
            "vocab.json": json.dumps(ids | {END_OF_TEXT: tokenizer.end_of_text}),
            "merges.txt": "\n".join(lines)}

def read_config(folder):
    """(the GPTConfig of config.json, which split its tokenizer has). Raises ValueError."""
    found = json.loads((folder / "config.json").read_text("utf-8"))
    for name, value in MUST_BE.items():
        check(found.get(name, value if name != "model_type" else None) == value,
              f"its {name} is {found.get(name)}, not {value}")
    found = USUAL | found
    check(found.get("n_inner") in (None, 4 * found["n_embd"]), "its n_inner is not 4 times n_embd")
    check(found["activation_function"] in GELU, f"its activation is {found['activation_function']}")
    config = GPTConfig(found["vocab_size"], found["n_positions"], found["n_embd"], found["n_head"],
                       found["n_layer"], qkv_bias=True, gelu=GELU[found["activation_function"]],
                       tie_weights=found["tie_word_embeddings"])
    kind = found.get("story_llm_tokenizer", "gpt2")
    check(kind in SPLITS, f"its story_llm_tokenizer is {kind}")
    return config, kind

def read_weights(folder):
    """Their weights by name: safetensors, or a pickle of tensors only."""
    if (folder / "model.safetensors").exists():
        return safetensors().load_file(folder / "model.safetensors")
    check((folder / "pytorch_model.bin").exists(), "it has no model.safetensors, nor a "
          "pytorch_model.bin (a model in several files is not read)")
    return torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)

def safetensors():
    try:
        import safetensors.torch
    except ImportError:
        raise OSError("safetensors is missing: python -m pip install safetensors") from None
    return safetensors.torch

@contextlib.contextmanager
def what_is_wrong_with_folder(folder):
    """Within this a folder is read; whatever goes wrong is said in one line."""
    check(folder.is_dir(), f"{folder} is not a folder: give one with config.json and the weights")
    try:
        yield
    except OSError as error:
        raise OSError(f"{folder} cannot be read ({error})") from None
    except Exception as error:      # what is in the folder may be from anybody
        reason = str(error).split("\n")[0][:200] or type(error).__name__
        raise ValueError(f"{folder} holds no GPT-2 that can be taken in ({reason})") from None

def load(folder):
    """The Run of a folder, ready to generate, or to be saved. Raises OSError or ValueError."""
    folder = Path(folder)
    with what_is_wrong_with_folder(folder):
        config, kind = read_config(folder)
        tokenizer = read_tokenizer(folder, kind)
        check(tokenizer.vocab_size == config.vocab_size, f"its vocab_size is {config.vocab_size}, "
              f"but its tokenizer has {tokenizer.vocab_size} tokens")
        weights = our_weights(read_weights(folder), config)
        model = story_llm.new_model(config)
        model.load_state_dict(weights)
    return Run(model, tokenizer, TrainConfig(), fingerprint="", steps_per_epoch=1, total_steps=1,
               prompt="Once upon a time")

def save(run, folder):
    """Write a run to a new folder, in one go. Raises ValueError for what GPT-2 cannot say."""
    folder, config = Path(folder), run.config
    check(run.tokenizer.kind in SPLITS, "GPT-2 has no tokenizer of words: train with another "
          "--tokenizer")
    check(config.position == "learned", f"GPT-2 has learned positions, not {config.position}")
    check(not folder.exists(), f"{folder} exists: give a new folder")
    settings = {**MUST_BE, "architectures": ["GPT2LMHeadModel"], "vocab_size": config.vocab_size,
                "n_positions": config.context_length, "n_embd": config.emb_dim,
                "n_head": config.n_heads, "n_layer": config.n_layers, "n_inner": None,
                "activation_function": "gelu_new" if config.gelu == "tanh" else "gelu",
                "tie_word_embeddings": config.tie_weights, "resid_pdrop": config.drop_rate,
                "embd_pdrop": config.drop_rate, "attn_pdrop": config.drop_rate,
                "bos_token_id": run.tokenizer.end_of_text,
                "eos_token_id": run.tokenizer.end_of_text,
                "story_llm_tokenizer": run.tokenizer.kind}
    write_weights = safetensors().save_file
    beside = Path(f"{folder}.{os.getpid()}.tmp")
    try:
        beside.mkdir(parents=True)
        write_weights(their_weights(run), beside / "model.safetensors", metadata={"format": "pt"})
        files = tokenizer_files(run) | {"config.json": json.dumps(settings, indent=2)}
        for name, content in files.items():
            (beside / name).write_text(content, "utf-8")
        beside.rename(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)

def main(argv=None):
    """Run the program; returns the exit status, as story_llm's."""
    return story_llm.exit_status(run_command, argv)

def run_command(argv):
    parser = argparse.ArgumentParser(prog="huggingface.py", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(title="commands", dest="command", required=True)
    for name, meaning in ("load", "make a checkpoint of a folder"), ("save", "and back again"):
        command = commands.add_parser(name, help=meaning, description=meaning, allow_abbrev=False)
        command.add_argument("folder", help="has config.json, the weights and the tokenizer")
        command.add_argument("--model", default="gpt2.pt" if name == "load" else "story_llm.pt",
                             help="the checkpoint (%(default)s)")
    args = parser.parse_args(argv)
    if args.command == "load":
        story_llm.check_writable(args.model)
        run = load(args.folder)
        story_llm.Progress(args.model).save(run)
        log(f"saved {args.model}: {story_llm.count_parameters(run.model):,} parameters, "
            f"vocabulary {run.config.vocab_size:,}, context {run.config.context_length}")
    else:
        save(story_llm.load_checkpoint(args.model), args.folder)
        log(f"saved {args.folder}")

if __name__ == "__main__":
    sys.exit(main())
