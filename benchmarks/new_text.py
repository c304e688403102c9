"""New text in the manner of another: story_llm's --preset writer beside nanoGPT.

    python benchmarks/new_text.py --text FILE --nanogpt PATH
    python benchmarks/new_text.py --text FILE --nanogpt PATH --kb 100 150 300 --epochs 9

The text is cut into three parts. The last tenth is the test part. No contender sees it, and it is
measured once, after the training. Of the rest, the first tenth is for validation, that is, for
choosing the weights to save, and what lies between is for training. Both projects validate on the
end of what they are given, so they are given the middle first and then the beginning. With --kb,
this is done with beginnings of the text.

The contenders:

- nanoGPT as its README trains a model of characters on a CPU (the quick start);
- story_llm, `train --preset writer`, once for each of --max-steps and of --epochs;
- nanoGPT with as many parameters as story_llm's model and, in each round, for as much time as
  story_llm took with the last of --epochs. Its other settings are those of its
  train_shakespeare_char.py, but without dropout, as in the quick start. It is timed in two short
  trainings first, from which follows how many iterations fit in. (When we measured, they took 94 to
  99% of the time.)

The seconds are those of the whole process of a training, from start to exit. story_llm also learns
its tokenizer, evaluates its losses, measures recall and draws a picture in this time. nanoGPT's
prepare.py, which turns the text into token ids, is not timed. nanoGPT computes in fp32 on a CPU;
--precision fp32 makes story_llm do the same.

Then each model is loaded from its checkpoint and measured in the same way, in fp32. The test part
is cut into windows that do not overlap, each as long as the model's context, so a model sees at
most one context, and half of one on average. The cross-entropy loss is computed for every token but
the first, which nothing precedes. A token of nanoGPT is a character, and a token of story_llm is a
piece of a word, so their losses per token cannot be compared. Therefore the mean loss is multiplied
by the number of tokens and divided by the number of characters. That gives nats per character, for
nanoGPT the same as its loss. (Divided by ln(2) it would be bits per character.) Characters that
occur in the test part alone, which nanoGPT could not encode, are left out for all of them.

A sample of each model, at temperature 0.8, follows the table.
"""
import argparse
import math
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import common

CONFIG = "config/train_shakespeare_char.py"
ON_A_CPU = [CONFIG, "--device=cpu", "--compile=False", "--eval_iters=20", "--log_interval=1"]
QUICK_START = ("--block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 "
               "--max_iters=2000 --lr_decay_iters=2000 --dropout=0.0").split()
EQUAL_SIZE = ("--block_size=256 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=272 "
              "--dropout=0.0").split()
DATA = Path("data", "shakespeare_char")

def split(text, n_bytes=0):
    """Return (what the contenders get: the training part and then the validation part; the test
    part) of a text or of its beginning."""
    if n_bytes:
        text = text.encode()[:n_bytes].decode(errors="ignore")
    end = len(text) * 9 // 10
    start = end // 10
    known = set(text[:end])
    return text[start:end] + text[:start], "".join(c for c in text[end:] if c in known)

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

def train_nanogpt(nanogpt, folder, settings):
    """Train nanoGPT in a copy of its files, because its scripts write beside themselves."""
    if not nanogpt:
        return {"absent": "absent: give --nanogpt PATH, a checkout of github.com/karpathy/nanoGPT"}
    for path in ("model.py", "train.py", "configurator.py", CONFIG, DATA / "prepare.py"):
        if not Path(nanogpt, path).exists():
            return {"absent": f"absent: {nanogpt} holds no {path}"}
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(nanogpt, path), folder / path)
    shutil.copy(folder / "text.txt", folder / DATA / "input.txt")
    prepared = common.run_process([sys.executable, DATA / "prepare.py"], cwd=folder)
    if prepared.status != 0:
        return common.failure(prepared)
    done = common.run_process([sys.executable, "train.py", *ON_A_CPU, *settings], cwd=folder)
    return {"seconds": done.seconds} if done.status == 0 else common.failure(done)

def train_for(seconds, train, trial=50):
    """Train for so many seconds. `train` trains for a number of iterations and returns its
    {"seconds": ...}."""
    once = train(trial)
    twice = train(2 * trial) if "absent" not in once else once
    if "absent" in twice:
        return twice
    each = (twice["seconds"] - once["seconds"]) / trial
    start = once["seconds"] - trial * each
    return train(max(round((seconds - start) / each), 1))

def length_settings(iterations):
    """nanoGPT's settings for so many iterations, or a few fewer. It saves only when it evaluates,
    here at least every 250 iterations, so the last iteration must be one of these."""
    n_evaluations = math.ceil(iterations / 250)
    interval = iterations // n_evaluations
    iterations = n_evaluations * interval
    return [f"--max_iters={iterations}", f"--eval_interval={interval}",
            f"--lr_decay_iters={max(iterations, 200)}"]             # more than its warm-up

def train_equal_nanogpt(nanogpt, folder, seconds):
    return train_for(seconds, lambda iterations: train_nanogpt(
        nanogpt, folder, [*EQUAL_SIZE, *length_settings(iterations)]))

def train_story_llm(folder, length, precision):
    """Train for a length such as "epochs-2" or "max-steps-500", an option of `train`."""
    option, _, number = length.rpartition("-")
    done = common.run_process([
        sys.executable, common.ROOT / "story_llm.py", "train", "--preset", "writer", "--text",
        folder / "text.txt", f"--{option}", number, "--precision", precision, "--model",
        folder / "story_llm.pt", "--plot", folder / "loss.png"])
    return {"seconds": done.seconds} if done.status == 0 else common.failure(done)

def measure_nanogpt(folder, n_characters):
    """Measure the checkpoint of a training in the folder, and let the model write."""
    import pickle
    import torch
    sys.path.insert(0, str(folder))
    from model import GPT, GPTConfig
    saved = torch.load(folder / "out-shakespeare-char" / "ckpt.pt", weights_only=True)
    model = GPT(GPTConfig(**saved["model_args"]))
    model.load_state_dict(saved["model"])
    model.eval()
    meta = pickle.loads((folder / DATA / "meta.pkl").read_bytes())
    text = (folder / "test.txt").read_text(encoding="utf-8")
    token_ids = torch.tensor([meta["stoi"][character] for character in text])

    def logits_of(token_ids):       # without targets, nanoGPT returns only the last position's
        return model(token_ids, token_ids)[0]

    nats = nats_per_character(logits_of, token_ids, model.config.block_size, len(text))
    torch.manual_seed(1)
    prompt = first_line(text)
    written = model.generate(torch.tensor([[meta["stoi"][c] for c in prompt]]), n_characters,
                             temperature=0.8, top_k=200)
    sample = "".join(meta["itos"][i] for i in written[0].tolist())
    return {"nats": nats, "steps": saved["iter_num"], "sample": sample,
            "parameters": sum(p.numel() for p in model.parameters()),
            "context": f"{model.config.block_size} characters"}

def measure_story_llm(folder, n_characters):
    import torch
    import story_llm
    run = story_llm.load_checkpoint(folder / "story_llm.pt")
    text = (folder / "test.txt").read_text(encoding="utf-8")
    token_ids = torch.tensor(run.tokenizer.encode(text))
    nats = nats_per_character(run.model, token_ids, run.config.context_length, len(text))
    sampling = story_llm.Sampling(temperature=0.8, seed=1)
    prompt = first_line(text)
    pieces = story_llm.generate_text(run.model, run.tokenizer, prompt, n_characters, sampling)
    sample = prompt + "".join(pieces)
    return {"nats": nats, "steps": story_llm.step_of_weights(run),
            "sample": sample[:len(prompt) + n_characters],
            "parameters": story_llm.count_parameters(run.model),
            "context": f"{run.config.context_length} tokens"}

def first_line(text):
    """The first whole line of the test part, with its end."""
    lines = text.split("\n")[1:]
    return next((line + "\n" for line in lines if line.strip()), "\n")

def measure(name, options, n_bytes, seconds):
    """Train a contender and measure it, each in a process of its own. `seconds` is the time of the
    last of the contenders before it."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        text, test_text = split(Path(options.text).read_text(encoding="utf-8"), n_bytes)
        (folder / "text.txt").write_text(text, encoding="utf-8")
        (folder / "test.txt").write_text(test_text, encoding="utf-8")
        if name == "quick":
            trained = train_nanogpt(options.nanogpt, folder, QUICK_START)
        elif name == "equal":
            trained = train_equal_nanogpt(options.nanogpt, folder, seconds)
        else:
            trained = train_story_llm(folder, name, options.precision)
        if "absent" in trained:
            return trained
        return {**common.measure(name, ["--folder", folder]), **trained}

def print_trainings(results, titles):
    absent = common.find_absent(results, titles)
    others = [name for name in titles if titles[name] not in absent]
    quick = common.median(results["quick"], "seconds") if "quick" in others else None
    rows = []
    for name in others:
        rounds = results[name]
        seconds = common.median(rounds, "seconds")
        ratio = f"{seconds / quick:.2f}" if quick else "unknown"
        steps = statistics.median_low(result["steps"] for result in rounds)
        rows.append([titles[name], f"{seconds:.0f}", common.format_range(rounds, "seconds"), ratio,
                     f"{steps:,}", f"{rounds[-1]['parameters']:,}", rounds[-1]["context"],
                     f"{common.median(rounds, 'nats'):.3f}",
                     common.format_range(rounds, "nats", "{:.3f}")])
    common.print_table(["", "seconds", "range of rounds", "/ quick start", "step of the weights",
                        "parameters", "context", "nats per character, test", "range of rounds"],
                       rows, absent)
    for name in others:
        print(f"\n{titles[name]}, at temperature 0.8:\n\n{results[name][-1]['sample'].rstrip()}")

def parse():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, metavar="FILE", help="the text, in UTF-8")
    parser.add_argument("--kb", nargs="+", type=float, default=[0], metavar="N",
                        help="the sizes of its beginnings (default: 0, which is all of it)")
    parser.add_argument("--nanogpt", default="", metavar="PATH",
                        help="a checkout of github.com/karpathy/nanoGPT")
    parser.add_argument("--peers", nargs="*", choices=("quick", "equal"),
                        default=("quick", "equal"), help="which nanoGPTs (default: both)")
    parser.add_argument("--epochs", nargs="*", type=int, default=[2, 9], metavar="N",
                        help="one training of story_llm for each (default: 2, and the preset's 9)")
    parser.add_argument("--max-steps", nargs="+", type=int, default=[], metavar="N",
                        help="further trainings, of so many steps (default: none)")
    parser.add_argument("--precision", default="auto", choices=("auto", "bf16", "fp32"),
                        help="that of story_llm (default: auto)")
    parser.add_argument("--rounds", type=int, default=1, help="default: 1")
    parser.add_argument("--characters", type=int, default=300, metavar="N",
                        help="length of a sample (default: 300)")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()

def main():
    options = parse()
    if options.contender:
        of_nanogpt = options.contender in ("quick", "equal")
        function = measure_nanogpt if of_nanogpt else measure_story_llm
        common.print_result(function, options.folder, options.characters)
        return
    print(common.describe_machine())
    titles = {"quick": "nanoGPT, quick start on a CPU"}
    for option, number in [*(("max-steps", n) for n in options.max_steps),
                           *(("epochs", n) for n in options.epochs)]:
        titles[f"{option}-{number}"] = f"story_llm, --preset writer --{option} {number}"
    titles["equal"] = "nanoGPT of the same size, for the same time"
    for name in {"quick", "equal"} - set(options.peers):
        titles.pop(name)
    for kb in options.kb:
        results = {name: [] for name in titles}
        for number in range(1, options.rounds + 1):
            seconds = 0
            for name in titles:
                if not any("absent" in result for result in results[name]):
                    print(f"round {number} of {options.rounds}: {name}", file=sys.stderr,
                          flush=True)
                    results[name].append(measure(name, options, round(1000 * kb), seconds))
                    seconds = results[name][-1].get("seconds", 0)
        text, test_text = split(Path(options.text).read_text(encoding="utf-8"), round(1000 * kb))
        print(f"\n{Path(options.text).name}, {len((text + test_text).encode()) / 1000:,.0f} KB\n")
        print_trainings(results, titles)

if __name__ == "__main__":
    main()
