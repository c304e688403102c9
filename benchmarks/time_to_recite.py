"""From a story to a model that recites it: story_llm's defaults against chapter 5 of LLMs-from-scratch.

    python benchmarks/time_to_recite.py
    python benchmarks/time_to_recite.py --text my_story.txt --tokenizers story word --seeds 1 2 3
    python benchmarks/time_to_recite.py --two-at-once
    python benchmarks/time_to_recite.py --optimizers adamw muon

Ours is `python story_llm.py train` with defaults, the whole process from start to exit: it tokenizes, trains,
evaluates, samples, saves, measures recall and draws. Then the saved file is loaded and its recall measured again.

The reference is ch05/01_main-chapter-code/gpt_train.py: 12 layers, width 768, context 256, 50,257 tokens,
dropout 0.1, batches of 2, fp32, AdamW, 10 epochs of windows that do not overlap; a look at the losses every 5
steps, a sample of 50 tokens each epoch, weights saved and loaded. It takes long, so each of these parts is
timed alone, by the package's own functions, --reference-steps of the training steps, and multiplied by how
often it happens. Its recall would need the whole run: not measured here. Without GPT-2's encoding at hand
(TIKTOKEN_CACHE_DIR) its tokens are random, one for every 4 characters, and its row says so.

Seconds, memory and sizes are medians over the seeds; --reference-steps 0 leaves the reference out.

--two-at-once: after each training alone, the same training is started twice at the same moment, as on a machine that
has something else to do; the later end counts. If the machine is shared without loss, the ratio to one alone is 2 at
most. The reference is put under the same load: two processes time its parts at the same moment (with twice the
memory), and the slower median of its training steps counts. Recall is measured of the training alone.
"""

import argparse
import math
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import common

EPOCHS, BATCH_SIZE, EVAL_EVERY = 10, 2, 5  # of the reference


def measure_training(name, seed, text, alone=True):
    """The reference, or one run of the program with a tokenizer and its defaults; if it runs alone, with recall."""
    if name == "reference":
        return common.measure(name)
    tokenizer, optimizer = name.split()
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "story_llm.pt")
        done = common.finish([
            sys.executable, common.ROOT / "story_llm.py", "train", "--text", text, "--seed", str(seed),
            "--tokenizer", tokenizer, "--optimizer", optimizer, "--model", model, "--plot", Path(folder, "loss.png")])
        if done.status:
            return {"absent": f"failed: {(done.stderr.strip().splitlines() or [done.status])[-1]}"}
        recall = common.measure("recall", ["--model", str(model)]) if alone else {}
        return {**recall, "seconds": done.seconds, "peak_mb": done.peak_mb, "saved_mb": model.stat().st_size / 1e6}


def measure_two_at_once(name, seed, text, alone):
    """The same, started twice at the same moment, beside the result of it alone."""
    if "absent" in alone:
        return alone
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda _: measure_training(name, seed, text, alone=False), range(2)))
    failed = [result for result in both if "absent" in result]
    if failed:
        return failed[0]
    key = "step" if name == "reference" else "seconds"
    slower = max(result[key] for result in both)
    return {"alone": alone[key], "two": slower, "ratio": slower / alone[key]}


def saved_recall(model, text):
    """Recall of a saved model on the text that it was trained on."""
    import story_llm
    run = story_llm.load_checkpoint(model)
    train_text, _ = story_llm.split_text(story_llm.load_text(text), run.train_config.val_fraction)
    return {"recall": story_llm.measure_recall(run.model, run.tokenizer, train_text)}


def timed(function, times=1):
    """Median seconds of some calls."""
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


class RandomTokens:
    """In place of GPT-2's encoding where that is not at hand."""
    def encode(self, text, allowed_special=()):
        import torch
        return torch.randint(50257, (len(text) // 4,)).tolist()

    def decode(self, ids):
        return " ".join(map(str, ids))


def time_reference(text, steps):
    """The parts of the reference's run, each timed alone, and their sum over the whole run."""
    began = time.perf_counter()
    import tiktoken
    import torch
    from llms_from_scratch import ch02, ch05
    try:
        tokenizer, note = tiktoken.get_encoding("gpt2"), ""
    except OSError:
        tokenizer, note = RandomTokens(), ", random tokens"
        ch02.tiktoken.get_encoding = lambda name: tokenizer
    torch.manual_seed(123)
    device, shape = torch.device("cpu"), common.GPT2_SMALL._replace(drop_rate=0.1)
    model = common.make_model("reference", shape, None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.1)
    text = Path(text).read_text(encoding="utf-8")
    parts = text[:int(0.9 * len(text))], text[int(0.9 * len(text)):]
    windows = dict(batch_size=BATCH_SIZE, max_length=shape.context_length, stride=shape.context_length)
    loaders = [ch02.create_dataloader_v1(part, shuffle=training, drop_last=training, **windows)
               for part, training in zip(parts, (True, False))]
    if not len(loaders[0]):
        raise common.Absent("the text is too short for a batch of the reference")
    seconds = {"start": time.perf_counter() - began}

    def step():
        optimizer.zero_grad()
        ch05.calc_loss_batch(*next(batches), model, device).backward()
        optimizer.step()

    batches = (batch for _ in range(2 + steps) for batch in loaders[0])
    model.train()
    timed(step, 2)  # warm-up
    seconds["step"] = timed(step, steps)
    seconds["evaluation"] = timed(lambda: ch05.evaluate_model(model, *loaders, device, 1), 2)
    seconds["sample"] = timed(lambda: ch05.generate_and_print_sample(model, tokenizer, device, text[:20]))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.pth")
        seconds["save and load"] = timed(lambda: torch.save(model.state_dict(), file)) + timed(
            lambda: model.load_state_dict(torch.load(file, weights_only=True)))
        saved_mb = file.stat().st_size / 1e6
    total_steps = EPOCHS * len(loaders[0])
    often = {"step": total_steps, "evaluation": -(-total_steps // EVAL_EVERY), "sample": EPOCHS}
    return {"seconds": sum(often.get(part, 1) * each for part, each in seconds.items()), "step": seconds["step"],
            "saved_mb": saved_mb, "note": note,
            "parts": " + ".join(f"{often.get(part, 1)} x {each:.2f} s {part}" for part, each in seconds.items())}


def print_two_at_once(pairs, titles):
    """The table of --two-at-once; each ratio is one of a seed, and the median of them stands beside."""
    missing = common.missing_of(pairs, titles)
    print("\nTwo at once, started at the same moment; the slower of both\n")
    common.print_table(["", "alone, s", "two at once, s", "two at once / alone", "of the seeds"], [
        [titles[name], *(f"{common.median(rounds, key):.2f}" for key in ("alone", "two", "ratio")),
         common.spread(rounds, "ratio", "{:.2f}")] for name, rounds in pairs.items() if titles[name] not in missing],
        missing)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", default=str(common.ROOT / "Short_Story.txt"), metavar="FILE")
    parser.add_argument("--tokenizers", nargs="+", default=["gpt2", "story", "word"])
    parser.add_argument("--optimizers", nargs="+", default=["adamw"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 43, 44], help="each is a round")
    parser.add_argument("--reference-steps", type=int, default=5, metavar="N", help="steps timed in each round (5)")
    parser.add_argument("--two-at-once", action="store_true", help="measure two trainings at the same time, too")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender == "recall":
        return common.answer(saved_recall, options.model, options.text)
    if options.contender:
        return common.answer(time_reference, options.text, options.reference_steps)
    size = Path(options.text).stat().st_size / 1000
    print(f"{common.machine()}\n{Path(options.text).name}, {size:.1f} KB; seeds {options.seeds}\n")
    titles = {f"{name} {optimizer}": f"story_llm, {name}, {optimizer}"
              for name in options.tokenizers for optimizer in options.optimizers}
    if options.reference_steps:
        titles["reference"] = "LLMs-from-scratch, chapter 5, scaled"
    results, pairs = ({name: [] for name in titles} for _ in range(2))
    for seed in options.seeds:
        for name in titles:
            print(f"seed {seed}: {name}", file=sys.stderr, flush=True)
            results[name].append(measure_training(name, seed, options.text))
            if options.two_at_once:
                pairs[name].append(measure_two_at_once(name, seed, options.text, results[name][-1]))
    missing = common.missing_of(results, titles)
    rows, compared = [], "reference" in titles and titles["reference"] not in missing
    for name, rounds in results.items():
        if titles[name] in missing:
            continue
        seconds = common.median(rounds, "seconds")
        times = common.median(results["reference"], "seconds") / seconds if compared else math.nan
        recall = " ".join(f"{each['recall']:.1%}" for each in rounds) if name != "reference" else "not measured"
        rows.append([titles[name] + rounds[0].get("note", ""), f"{seconds:.1f}",
                     common.spread(rounds, "seconds", "{:.1f}"), f"{times:.1f}",
                     f"{common.median(rounds, 'peak_mb'):,.0f}", f"{common.median(rounds, 'saved_mb'):.1f}", recall])
    header = ["", "seconds", "of the seeds", "reference / this", "peak MB", "checkpoint MB", "recall"]
    common.print_table(header, rows, missing)
    if compared:
        print("\nThe reference's seconds, in the last round:", results["reference"][-1]["parts"])
    if options.two_at_once:
        if "reference" in titles:
            titles["reference"] = "LLMs-from-scratch, chapter 5, one training step"
        print_two_at_once(pairs, titles)


if __name__ == "__main__":
    main()
