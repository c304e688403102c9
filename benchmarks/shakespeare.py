"""New text in the manner of another: story_llm's --preset writer and nanoGPT's quick start.

    python benchmarks/shakespeare.py --text input.txt --nanogpt PATH
    python benchmarks/shakespeare.py --text input.txt --nanogpt PATH --rounds 3 --epochs 2 9

The text of the tables is tinyshakespeare (1.1 MB), data/tinyshakespeare/input.txt of
github.com/karpathy/char-rnn. nanoGPT runs the command that its README gives for a CPU, which trains
a model of characters. For story_llm it is `train --preset writer`, once for each of --epochs. Both
keep the last tenth of the text for validation. (story_llm cuts at the space before, at most 50
characters earlier.)

The seconds are those of the whole process of a training, from start to exit. story_llm also learns
its tokenizer, evaluates its losses, measures recall and draws a picture in this time. nanoGPT's
prepare.py, which turns the text into token ids, is not timed.

Then each model is loaded from its checkpoint and measured in the same way, in fp32. The validation
part is cut into windows that do not overlap, each as long as the model's context, so a model sees
at most one context, and half of one on average. The cross-entropy loss is computed for every token
but the first, which nothing precedes. A token of nanoGPT is a character, and a token of story_llm
is a piece of a word, so their losses per token cannot be compared. Therefore the mean loss is
multiplied by the number of tokens and divided by the number of characters. That gives nats per
character, for nanoGPT the same as its loss. (Divided by ln(2) it would be bits per character.)

A sample of each model, at temperature 0.8, follows the table.
"""
import argparse
import itertools
import shutil
import sys
import tempfile
from pathlib import Path

import common

QUICK_START = ("config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 "
               "--log_interval=1 --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 "
               "--n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0").split()
DATA = Path("data", "shakespeare_char")

def nats_per_character(logits_of, token_ids, context_length, n_characters):
    """Return the loss of token ids (N,) in nats per character of their text. `logits_of` maps token
    ids (1, T) to logits (1, T, V). Windows do not overlap, and the last one may be shorter."""
    import torch
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(token_ids) - 1, context_length):
            window = token_ids[start:start + context_length + 1]
            losses = torch.nn.functional.cross_entropy(logits_of(window[None, :-1])[0], window[1:],
                                                       reduction="sum")
            total += losses.item()
    per_token = total / (len(token_ids) - 1)
    return per_token * len(token_ids) / n_characters

def failure(done):
    """What to report of a process that did not succeed."""
    reason = (done.stderr.strip().splitlines() or [f"exit status {done.status}"])[-1]
    return {"absent": f"failed: {reason}"}

def train_nanogpt(options, folder):
    """Train nanoGPT in a copy of its files, because its scripts write beside themselves."""
    if not options.nanogpt:
        return {"absent": "absent: give --nanogpt PATH, a checkout of github.com/karpathy/nanoGPT"}
    source = Path(options.nanogpt)
    for path in ("model.py", "train.py", "configurator.py", QUICK_START[0], DATA / "prepare.py"):
        if not (source / path).exists():
            return {"absent": f"absent: {source} holds no {path}"}
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / path, folder / path)
    shutil.copy(options.text, folder / DATA / "input.txt")
    prepared = common.run_process([sys.executable, DATA / "prepare.py"], cwd=folder)
    if prepared.status != 0:
        return failure(prepared)
    done = common.run_process([sys.executable, "train.py", *QUICK_START], cwd=folder)
    return {"seconds": done.seconds} if done.status == 0 else failure(done)

def train_story_llm(options, folder, epochs):
    done = common.run_process([
        sys.executable, common.ROOT / "story_llm.py", "train", "--preset", "writer", "--text",
        options.text, "--epochs", str(epochs), "--model", folder / "story_llm.pt", "--plot",
        folder / "loss.png"])
    return {"seconds": done.seconds} if done.status == 0 else failure(done)

def measure_nanogpt(folder, text, n_characters):
    """Measure the checkpoint of a training in the folder, and let the model write."""
    import pickle
    import numpy
    import torch
    sys.path.insert(0, str(folder))
    from model import GPT, GPTConfig
    saved = torch.load(folder / "out-shakespeare-char" / "ckpt.pt", weights_only=True)
    model = GPT(GPTConfig(**saved["model_args"]))
    model.load_state_dict(saved["model"])
    model.eval()
    meta = pickle.loads((folder / DATA / "meta.pkl").read_bytes())
    val_ids = torch.from_numpy(numpy.fromfile(folder / DATA / "val.bin", numpy.uint16)
                               .astype(numpy.int64))

    def logits_of(token_ids):       # without targets, nanoGPT returns only the last position's
        return model(token_ids, token_ids)[0]

    nats = nats_per_character(logits_of, val_ids, model.config.block_size, len(val_ids))
    torch.manual_seed(1)
    prompt = [meta["itos"][i] for i in val_ids.tolist()]
    prompt = first_line("".join(prompt))
    written = model.generate(torch.tensor([[meta["stoi"][c] for c in prompt]]), n_characters,
                             temperature=0.8, top_k=200)
    sample = "".join(meta["itos"][i] for i in written[0].tolist())
    return {"nats": nats, "steps": saved["iter_num"], "sample": sample,
            "parameters": sum(p.numel() for p in model.parameters()),
            "context": f"{model.config.block_size} characters"}

def measure_story_llm(folder, text, n_characters):
    import torch
    import story_llm
    run = story_llm.load_checkpoint(folder / "story_llm.pt")
    _, val_text = story_llm.split_text(story_llm.load_text(text), run.train_config)
    val_ids = torch.tensor(run.tokenizer.encode(val_text))
    nats = nats_per_character(run.model, val_ids, run.config.context_length, len(val_text))
    sampling = story_llm.Sampling(temperature=0.8, seed=1)
    prompt = first_line(val_text)
    pieces = story_llm.generate_text(run.model, run.tokenizer, prompt, n_characters, sampling)
    sample = prompt + "".join(pieces)
    return {"nats": nats, "steps": run.step,
            "sample": sample[:len(prompt) + n_characters],
            "parameters": story_llm.count_parameters(run.model),
            "context": f"{run.config.context_length} tokens"}

def first_line(val_text):
    """The first whole line of the validation part, which no model was trained on, with its end."""
    lines = val_text.split("\n")[1:]
    return next((line + "\n" for line in lines if line.strip()), "\n")

def measure(name, options):
    """Train a contender and measure it, each in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        if name == "nanogpt":
            trained = train_nanogpt(options, Path(folder))
        else:
            trained = train_story_llm(options, Path(folder), int(name))
        if "absent" in trained:
            return trained
        return {**common.measure(name, ["--folder", folder]), **trained}

def print_trainings(results, titles):
    """The table, with medians of the rounds, and a sample of each contender's last round."""
    absent = common.find_absent(results, titles)
    others = [name for name in titles if titles[name] not in absent]
    reference = common.median(results["nanogpt"], "seconds") if "nanogpt" in others else None
    rows = []
    for name in others:
        rounds = results[name]
        seconds = common.median(rounds, "seconds")
        ratio = f"{seconds / reference:.2f}" if reference else "unknown"
        rows.append([titles[name], f"{seconds:.0f}", common.format_range(rounds, "seconds"), ratio,
                     f"{rounds[-1]['steps']:,}", f"{rounds[-1]['parameters']:,}",
                     rounds[-1]["context"], f"{common.median(rounds, 'nats'):.3f}"])
    common.print_table(["", "seconds", "range of rounds", "this / nanoGPT", "steps", "parameters",
                        "context", "nats per character"], rows, absent)
    for name in others:
        print(f"\n{titles[name]}, at temperature 0.8:\n\n{results[name][-1]['sample'].rstrip()}")

def parse():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, metavar="FILE",
                        help="the text, of 100 KB or more; the tables use tinyshakespeare")
    parser.add_argument("--nanogpt", default="", metavar="PATH",
                        help="a checkout of github.com/karpathy/nanoGPT")
    parser.add_argument("--epochs", nargs="+", type=int, default=[2, 9], metavar="N",
                        help="one training of story_llm for each (default: 2, and the preset's 9)")
    parser.add_argument("--rounds", type=int, default=1, help="default: 1")
    parser.add_argument("--characters", type=int, default=300, metavar="N",
                        help="length of a sample (default: 300)")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()

def main():
    options = parse()
    if options.contender:
        function = measure_nanogpt if options.contender == "nanogpt" else measure_story_llm
        common.print_result(function, options.folder, options.text, options.characters)
        return
    size = Path(options.text).stat().st_size / 1000
    print(f"{common.describe_machine()}\n{Path(options.text).name}, {size:,.0f} KB\n")
    titles = {"nanogpt": "nanoGPT, quick start on a CPU"}
    for epochs in options.epochs:
        titles[str(epochs)] = f"story_llm, --preset writer --epochs {epochs}"
    results = {name: [] for name in titles}
    for number, name in itertools.product(range(1, options.rounds + 1), titles):
        if not any("absent" in result for result in results[name]):
            print(f"round {number} of {options.rounds}: {name}", file=sys.stderr, flush=True)
            results[name].append(measure(name, options))
    print_trainings(results, titles)

if __name__ == "__main__":
    main()
