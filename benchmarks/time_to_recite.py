"""From a story to a model that recites it: story_llm's defaults and chapter 5 of LLMs-from-scratch.

    python benchmarks/time_to_recite.py
    python benchmarks/time_to_recite.py --text my_story.txt --tokenizers story word --seeds 1 2 3
    python benchmarks/time_to_recite.py --two-at-once
    python benchmarks/time_to_recite.py --variants adamw fp32 muon

For story_llm, the time is that of the whole process of `python story_llm.py train` with its
defaults, from start to exit: it tokenizes, trains, evaluates, samples, saves, measures recall and
draws. Then the saved file is loaded, and its recall is measured again.

The reference is ch05/01_main-chapter-code/gpt_train.py: 12 layers, width 768, context length 256,
50,257 tokens, dropout 0.1, batches of 2, fp32, AdamW, and 10 epochs of windows that do not overlap.
It evaluates the losses every 5 steps, samples 50 tokens after every epoch, and saves and loads the
weights. That takes long, so each of these parts is timed on its own, with the functions of the
package, and multiplied by how often it happens; --reference-steps of the training steps are timed.
Recall would need the whole training, so it is not measured. If GPT-2's encoding is not available
(see TIKTOKEN_CACHE_DIR), the reference gets random tokens, one for every 4 characters, and its row
says so.

The reference's model is much larger than story_llm's. A second row therefore runs the same training
in full with a model of story_llm's shape (width, layers, heads and context length), and all other
settings of the chapter, among them GPT-2's whole vocabulary. Its recall is measured by the
chapter's own `generate_text_simple`. What separates this row from the reference is the choice of
the model, and what separates it from story_llm is the program.

Seconds, memory and file sizes are medians over the seeds. --reference-steps 0 leaves both out.

--two-at-once: after each training on its own, the same training is started twice at the same time,
as on a machine that has something else to do, and the one that ends later counts. If they share the
machine without loss, that takes at most twice as long as one. The reference is put under the same
load: two processes time its parts at the same time (with twice the memory), and the slower median
of its training steps counts. Recall is measured only for the training on its own.
"""
import argparse
import contextlib
import io
import math
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import common

EPOCHS, BATCH_SIZE, EVAL_EVERY = 10, 2, 5       # of the reference
VARIANTS = {        # {name: options of `train`}
    "adamw": [],
    "fp32": ["--precision", "fp32"],
    "muon": ["--optimizer", "muon", "--learning-rate", "0.01", "--epochs", "10"],
}

def measure_training(name, seed, text, with_recall=True):
    """Measure the reference, or one run of the program with a tokenizer and other options."""
    if name in ("reference", "small"):
        return common.measure(name)
    tokenizer, variant = name.split()
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "story_llm.pt")
        done = common.run_process([
            sys.executable, common.ROOT / "story_llm.py", "train", "--text", text, "--seed",
            str(seed), "--tokenizer", tokenizer, *VARIANTS[variant], "--model", model,
            "--plot", Path(folder, "loss.png")])
        if done.status != 0:
            return common.failure(done)
        recall = common.measure("recall", ["--model", str(model)]) if with_recall else {}
        return {**recall, "seconds": done.seconds, "peak_mb": done.peak_mb,
                "saved_mb": model.stat().st_size / 1e6}

def measure_two_at_once(name, seed, text, alone):
    """Measure the same, started twice at the same time, and compare with the result `alone`."""
    if "absent" in alone:
        return alone
    with ThreadPoolExecutor(2) as pool:
        pair = list(pool.map(lambda _: measure_training(name, seed, text, with_recall=False),
                             range(2)))
    for result in pair:
        if "absent" in result:
            return result
    key = "step" if name == "reference" else "seconds"
    slower = max(result[key] for result in pair)
    return {"alone": alone[key], "two": slower, "ratio": slower / alone[key]}

def saved_recall(model, text):
    """The recall of a saved model on the text that it was trained on."""
    import story_llm
    run = story_llm.load_checkpoint(model)
    text = story_llm.load_text(text)
    train_text, _ = story_llm.split_text(text, run.train_config)
    return {"recall": story_llm.measure_recall(run.model, run.tokenizer, train_text)}

def median_seconds(function, times=1):
    """The median time of some calls."""
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)

class RandomTokenizer:
    """Takes the place of GPT-2's encoding where that is not available."""
    def encode(self, text, allowed_special=()):
        import torch
        return torch.randint(50257, (len(text) // 4,)).tolist()

    def decode(self, ids):
        return " ".join(map(str, ids))

def chapter_5(text, shape):
    """Return (model, optimizer, training batches, validation batches) of the chapter."""
    import torch
    from llms_from_scratch import ch02
    model = common.make_model("reference", shape, None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.1)
    cut = int(0.9 * len(text))
    loaders = [
        ch02.create_dataloader_v1(part, batch_size=BATCH_SIZE, max_length=shape.context_length,
                                  stride=shape.context_length, shuffle=training, drop_last=training)
        for part, training in ((text[:cut], True), (text[cut:], False))]
    return model, optimizer, *loaders

def train_small(text):
    """Run the chapter's whole training with a model of story_llm's shape, and measure recall."""
    start = time.perf_counter()
    import tiktoken
    import torch
    from llms_from_scratch import ch04, ch05
    try:
        tokenizer = tiktoken.get_encoding("gpt2")
    except OSError as error:
        raise common.Absent("GPT-2's encoding is not available") from error
    import story_llm
    ours = story_llm.GPTConfig()
    shape = common.Shape(50257, ours.context_length, ours.emb_dim, ours.n_heads, ours.n_layers, 0.1)
    torch.manual_seed(123)
    text = Path(text).read_text(encoding="utf-8")
    model, optimizer, train_loader, val_loader = chapter_5(text, shape)
    with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as folder:
        ch05.train_model_simple(model, train_loader, val_loader, optimizer, torch.device("cpu"),
                                EPOCHS, EVAL_EVERY, 1, text[:20], tokenizer)
        file = Path(folder, "model.pth")
        torch.save(model.state_dict(), file)
        model.load_state_dict(torch.load(file, weights_only=True))
        saved_mb = file.stat().st_size / 1e6
    seconds = time.perf_counter() - start

    model.eval()
    train_text, _ = story_llm.split_text(text, story_llm.TrainConfig())
    recited = []
    for prompt, continuation in story_llm.recall_tests(train_text):
        prompt_ids = torch.tensor([tokenizer.encode(prompt)])
        count = len(tokenizer.encode(continuation)) + 2     # tokens may be cut in other places
        ids = ch04.generate_text_simple(model, prompt_ids, count, ours.context_length)
        recited.append(tokenizer.decode(ids[0].tolist()).startswith(prompt + continuation))
    return {"seconds": seconds, "saved_mb": saved_mb, "recall": statistics.mean(recited)}

def time_reference(text, steps):
    """Time the parts of the reference's training, each on its own, and add them up for all of
    it."""
    start = time.perf_counter()
    import tiktoken
    import torch
    from llms_from_scratch import ch02, ch05
    try:
        tokenizer, note = tiktoken.get_encoding("gpt2"), ""
    except OSError:
        tokenizer, note = RandomTokenizer(), ", random tokens"
        ch02.tiktoken.get_encoding = lambda name: tokenizer
    torch.manual_seed(123)
    device, shape = torch.device("cpu"), common.GPT2_SMALL._replace(drop_rate=0.1)
    text = Path(text).read_text(encoding="utf-8")
    model, optimizer, train_loader, val_loader = chapter_5(text, shape)
    if len(train_loader) == 0:
        raise common.Absent("the text is too short for a batch of the reference")
    seconds = {"start": time.perf_counter() - start}

    batches = (batch for _ in range(2 + steps) for batch in train_loader)

    def step():
        optimizer.zero_grad()
        ch05.calc_loss_batch(*next(batches), model, device).backward()
        optimizer.step()

    def evaluate():
        ch05.evaluate_model(model, train_loader, val_loader, device, 1)

    def sample():
        ch05.generate_and_print_sample(model, tokenizer, device, text[:20])

    model.train()
    median_seconds(step, 2)     # warm-up
    seconds["step"] = median_seconds(step, steps)
    seconds["evaluation"] = median_seconds(evaluate, 2)
    seconds["sample"] = median_seconds(sample)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.pth")
        save = median_seconds(lambda: torch.save(model.state_dict(), file))
        load = median_seconds(lambda: model.load_state_dict(torch.load(file, weights_only=True)))
        seconds["save and load"] = save + load
        saved_mb = file.stat().st_size / 1e6

    total_steps = EPOCHS * len(train_loader)
    counts = {"start": 1, "step": total_steps, "evaluation": math.ceil(total_steps / EVAL_EVERY),
              "sample": EPOCHS, "save and load": 1}
    parts = [f"{counts[part]} x {each:.2f} s {part}" for part, each in seconds.items()]
    return {"seconds": sum(counts[part] * each for part, each in seconds.items()),
            "step": seconds["step"], "saved_mb": saved_mb, "note": note, "parts": " + ".join(parts)}

def print_trainings(results, titles):
    """The main table: seconds, memory, file size and recall of each training."""
    absent = common.find_absent(results, titles)
    reference = math.nan
    if "reference" in titles and titles["reference"] not in absent:
        reference = common.median(results["reference"], "seconds")
    rows = []
    for name, rounds in results.items():
        if titles[name] in absent:
            continue
        seconds = common.median(rounds, "seconds")
        recall = "not measured"
        if name != "reference":
            recall = " ".join(f"{result['recall']:.1%}" for result in rounds)
        rows.append([titles[name] + rounds[0].get("note", ""), f"{seconds:.1f}",
                     common.format_range(rounds, "seconds", "{:.1f}"),
                     "" if math.isnan(reference) else f"{reference / seconds:.1f}",
                     f"{common.median(rounds, 'peak_mb'):,.0f}",
                     f"{common.median(rounds, 'saved_mb'):.1f}", recall])
    common.print_table(["", "seconds", "range of seeds", "reference / this", "peak MB",
                        "checkpoint MB", "recall"], rows, absent)
    if not math.isnan(reference):
        print("\nThe reference's seconds in the last round:", results["reference"][-1]["parts"])

def print_pairs(pairs, titles):
    """The table of --two-at-once. Each seed has its own ratio, and the first ratio is their
    median."""
    absent = common.find_absent(pairs, titles)
    rows = []
    for name, rounds in pairs.items():
        if titles[name] not in absent:
            medians = [f"{common.median(rounds, key):.2f}" for key in ("alone", "two", "ratio")]
            rows.append([titles[name], *medians, common.format_range(rounds, "ratio", "{:.2f}")])
    print("\nTwo at once, started at the same time; the slower one of the two\n")
    common.print_table(["", "alone, s", "two at once, s", "two at once / alone", "range of seeds"],
                       rows, absent)

def parse():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", default=str(common.ROOT / "Short_Story.txt"), metavar="FILE",
                        help="the story")
    parser.add_argument("--tokenizers", nargs="+", default=["gpt2", "story", "word"],
                        help="story_llm's tokenizers (default: gpt2 story word)")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["adamw"],
                        help="adamw: the defaults; fp32: AdamW without bf16; muon: with the "
                        "learning rate and the number of epochs that suit it (default: adamw)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 43, 44],
                        help="one round for each (default: 42 43 44)")
    parser.add_argument("--reference-steps", type=int, default=5, metavar="N",
                        help="steps of the reference to time in each round (default: 5)")
    parser.add_argument("--two-at-once", action="store_true",
                        help="also measure two trainings at the same time")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    return parser.parse_args()

def main():
    options = parse()
    if options.contender == "recall":
        common.print_result(saved_recall, options.model, options.text)
        return
    if options.contender == "small":
        common.print_result(train_small, options.text)
        return
    if options.contender:
        common.print_result(time_reference, options.text, options.reference_steps)
        return
    size = Path(options.text).stat().st_size / 1000
    print(f"{common.describe_machine()}\n{Path(options.text).name}, {size:.1f} KB; "
          f"seeds {options.seeds}\n")
    titles = {f"{tokenizer} {variant}": f"story_llm, {tokenizer}, {variant}"
              for tokenizer in options.tokenizers for variant in options.variants}
    if options.reference_steps:
        titles["reference"] = "LLMs-from-scratch, chapter 5, scaled"
        titles["small"] = "the same with story_llm's small model, in full"
    results = {name: [] for name in titles}
    pairs = {name: [] for name in titles if name != "small"}
    for seed in options.seeds:
        for name in titles:
            print(f"seed {seed}: {name}", file=sys.stderr, flush=True)
            alone = measure_training(name, seed, options.text)
            results[name].append(alone)
            if options.two_at_once and name in pairs:
                pairs[name].append(measure_two_at_once(name, seed, options.text, alone))
    print_trainings(results, titles)
    if options.two_at_once:
        titles.pop("small", None)
        if "reference" in titles:
            titles["reference"] = "LLMs-from-scratch, chapter 5, one training step"
        print_pairs(pairs, titles)

if __name__ == "__main__":
    main()
