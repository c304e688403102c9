"""Save a model with rotary positions as a checkpoint of litgpt.

    python story_llm.py train --position rotary
    python extras/litgpt.py save --model story_llm.pt FOLDER
    litgpt generate FOLDER --prompt "Once Aadhan renounced his kingdom" --top_k 1

litgpt runs, fine-tunes and serves many families of language models. One of them, GPT-NeoX, can be
set up as a GPT-2 with rotary positions, which is what `train --position rotary` trains, so only the
names of the weights differ. The files are plain and can be written without litgpt. huggingface.py,
beside this file, checks the model and writes the tokenizer.

Tried with litgpt 0.5.13 on 2026-12-01: the command above went on with the story, and over the whole
of Short_Story.txt, the logits were those of our model within 0.00001.
"""
import shlex
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))      # the folder of story_llm.py
import huggingface
import story_llm
from story_llm import check, log

# ─── Settings ──────────────────────────────────────────────────────────────────────────────────
EXPORTABLE = (*huggingface.EXPORTABLE, "position")

# When a text outgrows the context, `story_llm.py generate` drops its first tokens and computes the
# rest anew, while litgpt stops with an error where its block size ends. A larger block size alone
# is no help, because the model never learned to look that far back: with a context of 32, it lost
# the thread after 68 tokens. But rotary positions know only distances, and a sliding window of
# attention keeps those within what was trained. With it, litgpt wrote the same 150 tokens as we.
BLOCK_SIZE = 4096       # litgpt's default

def config_yaml(config):
    """Return the contents of model_config.yaml. What it leaves out has litgpt's defaults. Dropout
    is left out because litgpt has none; it changes only the training."""
    settings = {
        "name": "story_llm", "block_size": max(BLOCK_SIZE, config.context_length),
        "sliding_window_size": config.context_length, "n_layer": config.n_layers,
        "n_head": config.n_heads, "n_embd": config.emb_dim, "vocab_size": config.vocab_size,
        "padded_vocab_size": config.vocab_size, "norm_class_name": "LayerNorm",
        "norm_eps": "0.00001",      # YAML would take 1e-05 for a word
        "parallel_residual": False, "rotary_percentage": 1.0, "rope_base": 10000, "bias": True,
        "lm_head_bias": False, "mlp_class_name": "GptNeoxMLP",
        "intermediate_size": 4 * config.emb_dim,
        "gelu_approximate": huggingface.APPROXIMATIONS[config.gelu]}
    return "".join(f"{name}: {value}\n" for name, value in settings.items())

# ─── Weights ───────────────────────────────────────────────────────────────────────────────────
RENAMED = {"ln_1": "norm_1", "ln_2": "norm_2", "attn.c_attn": "attn.qkv", ".c_": "."}

def to_litgpt(weights):
    """Return weights {name in GPT-2: tensor} as {name in litgpt: tensor}. litgpt has no table of
    positions, its matrices are torch's, and its output head is always a matrix of its own."""
    theirs = {"lm_head.weight": weights.get("lm_head.weight", weights["wte.weight"])}
    for name, weight in weights.items():
        if name in ("wpe.weight", "lm_head.weight"):
            continue
        weight = huggingface.transposed(name, weight)
        for old, new in RENAMED.items():
            name = name.replace(old, new)
        theirs[f"transformer.{name}"] = weight
    return theirs

def save(run, folder):
    """Write a run to a new folder. Raises StoryError if that fails, or if litgpt cannot express the
    model."""
    check(run.config.position == "rotary", f"litgpt cannot express position {run.config.position}: "
          "train a model with --position rotary")
    weights = to_litgpt(huggingface.plain_weights(run, EXPORTABLE, "litgpt"))
    with huggingface.new_folder(folder, RuntimeError) as new:      # torch's error on a full disk
        huggingface.write_tokenizer(run, new)
        (new / "model_config.yaml").write_text(config_yaml(run.config), "utf-8")
        torch.save(weights, new / "lit_model.pth")

# ─── The command line ──────────────────────────────────────────────────────────────────────────
def run_command(argv):
    parser = story_llm.Parser(prog="extras/litgpt.py",
                              description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(title="commands", dest="command", required=True)
    command = commands.add_parser("save", allow_abbrev=False,
                                  help="make a folder for litgpt from a checkpoint")
    command.add_argument("folder", help="the folder to make")
    command.add_argument("--model", default="story_llm.pt", metavar="FILE",
                         help="the checkpoint (default: story_llm.pt)")
    args = parser.parse_args(argv)
    run = story_llm.load_checkpoint(args.model)
    save(run, args.folder)
    log(f"saved {args.folder}")
    words = ["generate", args.folder, "--prompt", run.prompt, "--top_k", "1"]
    log(f"now let litgpt write: litgpt {shlex.join(words)}")

def main(argv=None):
    """Run the program with the words of a command line; return the exit status."""
    return story_llm.exit_status(run_command, sys.argv[1:] if argv is None else argv)

if __name__ == "__main__":
    sys.exit(main())
