"""How time and memory grow with the text, the width, the depth and the context length.

    python benchmarks/scaling.py --plot images/scaling.png          (about ten minutes on two cores)
    python benchmarks/scaling.py --series text --text-mb 0.01 1 1000
    python benchmarks/scaling.py --series recite --recite-text FILE FILE --recite-kb 5 20 100 1000

Each point is measured in a process of its own and is the median of its steps; for the shapes, it is
the median of three rounds. Next to the measurements stands what the law of the series predicts,
scaled to agree at the last point, and the growth from point to point as an exponent: 1 is linear, 2
is quadratic. A training step is one of story_llm's `training_steps` on random tokens, in its
default precision and under `keep_freed_memory`, as the program runs it. Memory is the peak of the
process; for the text, what importing story_llm takes is subtracted.

The series "text" uses extras/library.py. It tokenizes the text to a file, which training then maps
into memory. The parts of that file that were read count as memory here, 2 bytes per token, although
the system may take them back. The series "processes" uses extras/scale.py, started by torchrun, and
compares it with `python story_llm.py train` on the story.

The series "recite" runs only if it is named. It measures the whole process of `python story_llm.py
train` on beginnings of texts, with one thread, and otherwise with all defaults but the precision.

The laws, for a step of N tokens with L layers, embedding dimension C, context length T and
vocabulary size V: matrix products take 6 N (12 L C^2 + V C) floating-point operations and attention
takes 12 N L C T; activations take N (L (a C + b H T) + c V) bytes, and weights 16 bytes each.
Tokenizing reads every byte once, in an amount of memory that does not depend on how many there are.
"""
import argparse
import math
import os
import random
import re
import resource
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import common

EXTRAS = common.ROOT / "extras"
sys.path.insert(0, str(EXTRAS))
BASE = common.Shape(vocab_size=2048, context_length=64, emb_dim=256, n_heads=4, n_layers=2,
                    drop_rate=0.0)
TOKENS = 2048       # in a step
WARM_UP, STEPS = 2, 8
SERIES = {      # {name: (a field of Shape, its values, the law of a step's time, in words)}
    "width": ("emb_dim", [64, 128, 256, 512, 1024],
              lambda C: 12 * 2 * C ** 2 + 2048 * C + 2 * 2 * C * 64,
              "12 L C² + V C + 2 L C T: linear at first, then quadratic"),
    "depth": ("n_layers", [1, 2, 4, 8, 16],
              lambda L: 12 * L * 256 ** 2 + 2048 * 256 + 2 * L * 256 * 64,
              "V C + L (12 C² + 2 C T): a constant for the output head, then linear"),
    "context": ("context_length", [32, 64, 128, 256, 512, 1024, 2048],
                lambda T: 12 * 2 * 256 ** 2 + 2048 * 256 + 2 * 2 * 256 * T,
                "12 L C² + V C + 2 L C T: constant at first, then linear, for equally many tokens "
                "per step (so quadratic per window)"),
}
PROCESSES_TRAIN = {     # {name: options of the training that several processes share}
    "story": "--epochs 10 --tokenizer story",
    "gpt2-small": "--preset gpt2-small --tokenizer gpt2 --batch-size 8 --max-steps 12",
}

def peak_megabytes():
    """The peak memory of this process so far."""
    return common.peak_megabytes(resource.getrusage(resource.RUSAGE_SELF))

def time_steps(step):
    """The median milliseconds of some calls of `step`, after a warm-up."""
    times = []
    for _ in range(WARM_UP + STEPS):
        start = time.perf_counter()
        step()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[WARM_UP:])

def shape_point(series, value):
    """A training step of a model that differs from BASE in one field."""
    import torch
    shape = BASE._replace(**{SERIES[series][0]: value})
    T = shape.context_length
    windows = torch.randint(shape.vocab_size, (TOKENS // T, T + 1))
    _, step = common.make_run(common.make_model("story_llm", shape, None), len(windows))
    inputs, targets = windows[:, :-1], windows[:, 1:]
    return {"ms": time_steps(lambda: step(inputs, targets)), "mb": peak_megabytes()}

def write_text(megabytes, folder):
    """Write a file of the story's sentences in random order; return its path."""
    story = Path(common.ROOT, "Short_Story.txt").read_text(encoding="utf-8")
    sentences = story.replace("\n", " ").split(". ")
    rng = random.Random(0)
    path = Path(folder, "text.txt")
    written = 0
    with open(path, "w", encoding="utf-8") as file:
        while written < megabytes * 1e6:
            sentence = rng.choice(sentences)
            written += file.write(sentence + (". " if rng.random() < 0.9 else ".\n"))
    return path

def tokenize_point(path):
    """Write the tokens of a text to a file."""
    import library
    before = peak_megabytes()
    start = time.perf_counter()
    kind = "gpt2" if os.environ.get("TIKTOKEN_CACHE_DIR") else "story"
    count = library.tokenize(path, f"{path}.bin", kind)
    return {"seconds": time.perf_counter() - start, "tokens": count,
            "mb": peak_megabytes() - before}

def train_point(path):
    """Training steps on a file of tokens, with windows from all over it. Making the batch is part
    of a step."""
    import library
    import story_llm
    before = peak_megabytes()
    story_llm.keep_freed_memory()
    config = story_llm.GPTConfig(**BASE._asdict())
    train_config = story_llm.TrainConfig(batch_size=TOKENS // config.context_length,
                                         prompt_windows=0.0, max_steps=1_000_000,
                                         eval_every=1_000_000)
    corpus = library.library_corpus(f"{path}.bin", train_config.val_fraction,
                                    config.context_length)
    run = story_llm.new_run(corpus, config, train_config)
    steps = story_llm.training_steps(run, corpus)
    return {"ms": time_steps(lambda: next(steps)), "steps": run.steps_per_epoch,
            "mb": peak_megabytes() - before}

def growth_exponents(x, y):
    """The growth from point to point: [None, log of the ratio of y over log of that of x, ...]."""
    exponents = [None]
    for i in range(1, len(x)):
        exponents.append(math.log(y[i] / y[i - 1]) / math.log(x[i] / x[i - 1]))
    return exponents

def format_exponent(number):
    return "" if number is None else f"{number:.2f}"

def measure_shapes(series, rounds=3):
    """Measure a series of shapes and print its table. Return (values, measured, expected times)."""
    _, values, law, words = SERIES[series]
    names = [f"{series}:{value}" for value in values]
    points = list(common.run_rounds(names, rounds).values())
    times = [common.median(point, "ms") for point in points]
    expected = [times[-1] * law(value) / law(values[-1]) for value in values]
    exponents = growth_exponents(values, times)
    expected_exponents = growth_exponents(values, expected)
    rows = []
    for i, value in enumerate(values):
        rows.append([str(value), f"{times[i]:.1f}", format_exponent(exponents[i]),
                     f"{expected[i]:.1f}", format_exponent(expected_exponents[i]),
                     f"{times[i] / expected[i]:.2f}", f"{common.median(points[i], 'mb'):,.0f}"])
    print(f"\nA training step of {TOKENS:,} tokens by {series}; the law of its time: {words}\n")
    common.print_table([series, "ms", "exponent", "ms by law", "exponent", "measured / law", "MB"],
                       rows)
    return values, times, expected

def measure_text(sizes):
    """Measure tokenizing and training by the size of the text, and print the table. Return (sizes,
    measured, expected seconds)."""
    rows, seconds = [], []
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            path = write_text(size, folder)
            tokenized = common.measure(f"tokenize:{path}")
            trained = common.measure(f"train:{path}")
        for point in (tokenized, trained):
            if "absent" in point:
                sys.exit(point["absent"])
        seconds.append(tokenized["seconds"])
        epoch_seconds = trained["ms"] * trained["steps"] / 1000
        rows.append([f"{size:g} MB", f"{tokenized['seconds']:.2f}",
                     f"{tokenized['tokens'] / tokenized['seconds']:,.0f}",
                     f"{tokenized['mb']:,.0f}", f"{trained['ms']:.1f}", f"{trained['mb']:,.0f}",
                     f"{epoch_seconds:,.0f}"])
    print("\nBy the size of the text; the law: tokenizing and an epoch take linear time, a step "
          "takes constant time, and memory is constant\n")
    common.print_table(["text", "tokenize, s", "tokens/s", "MB", "step, ms", "MB", "epoch, s"],
                       rows)
    return sizes, seconds, [seconds[-1] * size / sizes[-1] for size in sizes]

def measure_processes(name, rounds=3):
    """Compare the training speed of one process with two threads and of two processes, started by
    torchrun, with one thread each."""
    train = ["train", *PROCESSES_TRAIN[name].split()]
    one, two = "one process, two threads", "two processes, one thread each"
    commands = {
        one: ["OMP_NUM_THREADS=2", sys.executable, common.ROOT / "story_llm.py", *train],
        two: ["OMP_NUM_THREADS=1", sys.executable, "-m", "torch.distributed.run", "--standalone",
              "--nproc-per-node", "2", EXTRAS / "scale.py", *train]}
    speeds = {one: [], two: []}
    for _ in range(rounds):
        for title, command in commands.items():
            with tempfile.TemporaryDirectory() as folder:
                done = common.run_process(["env", *command, "--model", Path(folder, "m.pt"),
                                           "--plot", Path(folder, "loss.png")])
            if done.status != 0:
                sys.exit(done.stderr)
            speed = re.findall(r"([\d,]+) tokens/s", done.stdout)[-1]
            speeds[title].append(float(speed.replace(",", "")))
    medians = {title: statistics.median(values) for title, values in speeds.items()}
    rows = [[title, f"{median:,.0f}", f"{min(speeds[title]):,.0f} to {max(speeds[title]):,.0f}",
             f"{median / medians[one]:.2f}"] for title, median in medians.items()]
    print(f"\nTraining by several processes: {' '.join(train)}\n")
    common.print_table(["", "tokens/s", "range of rounds", "/ one process"], rows)

def train_beginning(path, kb, precision):
    """Run a whole training on the first `kb` KB of a text, with one thread. Return its figures."""
    with tempfile.TemporaryDirectory() as folder:
        beginning = Path(path).read_bytes()[:round(1000 * kb)].decode(errors="ignore")
        Path(folder, "text.txt").write_text(beginning, encoding="utf-8")
        done = common.run_process([
            "env", "OMP_NUM_THREADS=1", sys.executable, common.ROOT / "story_llm.py", "train",
            "--text", "text.txt", "--precision", precision], cwd=folder)
    if done.status != 0:
        sys.exit(done.stderr)
    found = re.search(r"preset (\w+); .* vocabulary ([\d,]+); ([\d,]+) parameters; (\d+) steps",
                      done.stdout)
    recall = re.search(r"Recall (.*?%): (\d+) of (\d+)", done.stdout)
    result = {"seconds": done.seconds, "peak_mb": done.peak_mb, "shape": found.groups(),
              "recall": f"{recall[1]} ({recall[2]} of {recall[3]})" if recall else "not measured"}
    print(path, kb, precision, result, file=sys.stderr, flush=True)
    return result

def measure_recite(options):
    """Run whole trainings on beginnings of the texts, with the defaults of `train`, and print a
    table for each text."""
    points = list(product(options.recite_text, options.recite_kb, options.recite_precisions))
    results = {point: [] for point in points}
    with ThreadPoolExecutor(options.recite_at_once) as pool:
        for _ in range(options.recite_rounds):
            due = [point for point in points if not results[point]
                   or results[point][0]["seconds"] < options.recite_once_above]
            for point, result in zip(due, pool.map(lambda point: train_beginning(*point), due)):
                results[point].append(result)
    for text in options.recite_text:
        rows = []
        for kb in options.recite_kb:
            by_precision = [results[text, kb, name] for name in options.recite_precisions]
            row = [f"{kb:g}", *by_precision[0][0]["shape"]]
            row += [f"{common.median(rounds, 'seconds'):.1f}" for rounds in by_precision]
            row += [f"{common.median(by_precision[0], 'peak_mb'):,.0f}"]
            row += [rounds[0]["recall"] for rounds in by_precision]
            rows.append(row)
        names = options.recite_precisions
        print(f"\n{Path(text).name}, by heart, with one thread\n")
        common.print_table(["KB", "preset", "vocabulary", "parameters", "steps",
                            *[f"s, {name}" for name in names], "peak MB",
                            *[f"recall, {name}" for name in names]], rows)

def draw(results, path):
    """Draw one panel for each series, on logarithmic axes; the dashed line is the law."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(9, 7), layout="constrained")
    for axes, (name, (values, measured, law)) in zip(figure.subplots(2, 2).flat, results.items()):
        axes.plot(values, law, color="#555555", linestyle="--", label="law")
        axes.plot(values, measured, color="#0072b2", marker="o", label="measured")
        axes.set(xscale="log", yscale="log", xlabel="text (MB)" if name == "text" else name,
                 ylabel="tokenize (s)" if name == "text" else "training step (ms)")
        axes.set_xticks(values, [f"{value:g}" for value in values], minor=False)
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.25)
        axes.legend()
    figure.savefig(path, dpi=110)

def parse():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--series", nargs="+", choices=["text", "processes", "recite", *SERIES],
                        default=["text", "processes", *SERIES],
                        help="what to measure (default: all but recite)")
    parser.add_argument("--text-mb", nargs="+", type=float, default=[0.01, 0.1, 1, 10, 100],
                        metavar="MB", help="sizes of the texts of the series text")
    recite = parser.add_argument_group("the series recite")
    recite.add_argument("--recite-text", nargs="+", default=[str(common.ROOT / "Short_Story.txt")],
                        metavar="FILE", help="the texts")
    recite.add_argument("--recite-kb", nargs="+", type=float, default=[5, 10, 20], metavar="KB",
                        help="sizes of their beginnings")
    recite.add_argument("--recite-precisions", nargs="+", default=["bf16", "fp32"],
                        metavar="NAME", help="bf16 or fp32 (default: both)")
    recite.add_argument("--recite-rounds", type=int, default=3, metavar="N", help="default: 3")
    recite.add_argument("--recite-once-above", type=float, default=600, metavar="S",
                        help="what takes longer is measured only once (default: 600)")
    recite.add_argument("--recite-at-once", type=int, default=1, metavar="N",
                        help="trainings at the same time, at most one for each core (default: 1)")
    parser.add_argument("--processes", nargs="+", choices=PROCESSES_TRAIN, default=["story"],
                        metavar="MODEL", help="what the series processes trains: story or "
                        "gpt2-small (default: story)")
    parser.add_argument("--plot", metavar="FILE", help="draw the series text and the shapes")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    return parser.parse_args()

def measure_point(contender):
    """In the process of one point: measure it and print the result."""
    name, _, value = contender.partition(":")
    if name == "tokenize":
        common.print_result(tokenize_point, value)
    elif name == "train":
        common.print_result(train_point, value)
    else:
        common.print_result(shape_point, name, int(value))

def main():
    options = parse()
    if options.contender:
        measure_point(options.contender)
        return
    print(common.describe_machine())
    results = {}
    for name in options.series:
        if name == "text":
            results[name] = measure_text(options.text_mb)
        elif name in SERIES:
            results[name] = measure_shapes(name)
    if "recite" in options.series:
        measure_recite(options)
    if "processes" in options.series:
        for name in options.processes:
            measure_processes(name)
    if options.plot:
        draw(results, options.plot)
        print(f"\ndrew {options.plot}")

if __name__ == "__main__":
    main()
