"""How time and memory grow with the text, the width, the depth and the context.

    python benchmarks/scaling.py --plot images/scaling.png          (about ten minutes on two cores)
    python benchmarks/scaling.py --series text --text-mb 0.01 1 1000
    python benchmarks/scaling.py --series recite --recite-text FILE --recite-kb 5 20 100 300 1000

Each point is a process of its own and the median of its steps; of the shapes, the median of three rounds. Beside
what was measured stands what the law of that series says if the last point is right, and the growth from point to
point as an exponent: 1 is linear, 2 is quadratic. A training step is story_llm's `training_step` on random tokens,
with its default precision and under `keep_memory`, as the program runs. Memory is the peak of the process; for the
text, less that of importing story_llm.

A text goes through extras/library.py: it is tokenized to a file, which training maps into memory. What it has read
of that file counts as its memory here, 2 bytes a token, though the system may take it back. Several processes are
those of extras/scale.py, by torchrun, training the story beside `python story_llm.py train`.

The series "recite" is not among those that run if none is named: `python story_llm.py train`, the whole process, on
beginnings of a text, with all defaults or with the options of --recite-train; the law is that the time is linear in
the text, at the same recall.

The laws, for a step of N tokens, L layers, width C, context T and vocabulary V: matrix products 6 N (12 L C^2 + V C),
attention 12 N L C T floating-point operations; activations N (L (a C + b H T) + c V) bytes, weights 16 bytes each.
Tokenizing reads every byte once, in memory that does not depend on how many there are.
"""

import argparse
import math
import os
import random
import re
import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path

import common

EXTRAS = common.ROOT / "extras"
sys.path.insert(0, str(EXTRAS))
BASE = common.Shape(vocab_size=2048, context_length=64, emb_dim=256, n_heads=4, n_layers=2, drop_rate=0.0)
TOKENS = 2048  # in a step
WARM_UP, STEPS = 2, 8
SERIES = {  # what grows: the values of it, the law of a step's time, in words
    "width": ([64, 128, 256, 512, 1024], lambda C: 12 * 2 * C ** 2 + 2048 * C + 2 * 2 * C * 64,
              "12 L C² + V C + 2 L C T: linear first, then quadratic"),
    "depth": ([1, 2, 4, 8, 16], lambda L: 12 * L * 256 ** 2 + 2048 * 256 + 2 * L * 256 * 64,
              "V C + L (12 C² + 2 C T): a constant for the head, then linear"),
    "context": ([32, 64, 128, 256, 512, 1024, 2048], lambda T: 12 * 2 * 256 ** 2 + 2048 * 256 + 2 * 2 * 256 * T,
                "12 L C² + V C + 2 L C T: constant, then linear, for as many tokens a step (so quadratic in a window)"),
}
PROCESSES_TRAIN = {  # the options of the training that is shared
    "story": "--epochs 10 --tokenizer story",
    "gpt2-small": "--preset gpt2-small --full-vocab --tokenizer gpt2 --batch-size 8 --max-steps 12",
}
FIELDS = {"width": "emb_dim", "depth": "n_layers", "context": "context_length"}


def peak_megabytes():
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def timed_steps(run, batches):
    """The median milliseconds of some steps, after two that warm up."""
    from story_llm import training_step
    run.model.train()
    times = []
    for step in range(WARM_UP + STEPS):
        began = time.perf_counter()
        training_step(run, *batches[step])
        times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times[WARM_UP:])


def shape_point(series, value):
    """A training step of a model that differs from BASE in one field."""
    import torch
    shape = BASE._replace(**{FIELDS[series]: value})
    rows = torch.randint(shape.vocab_size, (TOKENS // shape.context_length, shape.context_length + 1))
    run = common.make_run(common.make_model("story_llm", shape, None), len(rows))
    return {"ms": timed_steps(run, [(rows[:, :-1], rows[:, 1:])] * (WARM_UP + STEPS)), "mb": peak_megabytes()}


def text_of(megabytes, folder):
    """A file of the story's sentences in random order."""
    text, path = Path(common.ROOT, "Short_Story.txt").read_text(encoding="utf-8"), Path(folder, "text.txt")
    sentences, chance, written = text.replace("\n", " ").split(". "), random.Random(0), 0
    with open(path, "w", encoding="utf-8") as file:
        while written < megabytes * 1e6:
            written += file.write(chance.choice(sentences) + (". " if chance.random() < 0.9 else ".\n"))
    return path


def tokenize_point(path):
    """Write a text's tokens to a file."""
    import library
    before, began = peak_megabytes(), time.perf_counter()
    count = library.tokenize(path, f"{path}.bin", "gpt2" if os.environ.get("TIKTOKEN_CACHE_DIR") else "story")
    return {"seconds": time.perf_counter() - began, "tokens": count, "mb": peak_megabytes() - before}


def train_point(path):
    """Steps on a file of tokens, windows from all over it."""
    import library
    import story_llm
    before = peak_megabytes()
    story_llm.keep_memory()
    config = story_llm.GPTConfig(**BASE._asdict())
    train_config = story_llm.TrainConfig(batch_size=TOKENS // config.context_length, openings=0.0,
                                         max_steps=WARM_UP + STEPS)
    corpus = library.library_corpus(f"{path}.bin", train_config.val_fraction, config.context_length)
    run = story_llm.new_run(corpus, config, train_config)
    story_llm.start_optimizer(run)
    milliseconds = timed_steps(run, story_llm.TrainingBatches(corpus, run))
    return {"ms": milliseconds, "steps": run.steps_per_epoch, "mb": peak_megabytes() - before}


def exponent(x, y):
    """The growth from point to point: [None, log of the ratio over log of the ratio, ...]."""
    return [None] + [math.log(y[i] / y[i - 1]) / math.log(x[i] / x[i - 1]) for i in range(1, len(x))]


def shown(number):
    return "" if number is None else f"{number:.2f}"


def measure_shapes(series, rounds=3):
    values, law, words = SERIES[series]
    points = common.take_turns([f"{series}:{value}" for value in values], rounds).values()
    times = [common.median(point, "ms") for point in points]
    expected = [times[-1] * law(value) / law(values[-1]) for value in values]
    print(f"\nA training step of {TOKENS:,} tokens by {series}; time by the law {words}\n")
    common.print_table([series, "ms", "exponent", "ms by law", "exponent", "measured / law", "MB"], [
        [str(value), f"{ms:.1f}", shown(grown), f"{law_ms:.1f}", shown(law_grown),
         f"{ms / law_ms:.2f}", f"{common.median(point, 'mb'):,.0f}"]
        for value, point, ms, grown, law_ms, law_grown in
        zip(values, points, times, exponent(values, times), expected, exponent(values, expected))])
    return values, times, expected


def measure_text(sizes):
    rows, seconds = [], []
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            path = text_of(size, folder)
            written, trained = (common.measure(f"{name}:{path}") for name in ("tokenize", "train"))
        seconds.append(written["seconds"])
        rows.append([f"{size:g} MB", f"{written['seconds']:.2f}", f"{written['tokens'] / written['seconds']:,.0f}",
                     f"{written['mb']:,.0f}", f"{trained['ms']:.1f}", f"{trained['mb']:,.0f}",
                     f"{trained['ms'] * trained['steps'] / 1000:,.0f}"])
    print("\nBy the size of the text; the law: tokenizing and an epoch linear, a step and all memory constant\n")
    common.print_table(["text", "tokenize, s", "tokens/s", "MB", "step, ms", "MB", "epoch, s"], rows)
    return sizes, seconds, [seconds[-1] * size / sizes[-1] for size in sizes]


def measure_processes(size, rounds=3):
    """Training speed of one process with two threads against two processes, by torchrun, with one thread each."""
    train = ["train", *PROCESSES_TRAIN[size].split()]
    launch = {
        "one process, two threads": ["OMP_NUM_THREADS=2", sys.executable, common.ROOT / "story_llm.py", *train],
        "two processes, one thread each": ["OMP_NUM_THREADS=1", sys.executable, "-m", "torch.distributed.run",
                                           "--standalone", "--nproc-per-node", "2", EXTRAS / "scale.py", *train]}
    speeds = {name: [] for name in launch}
    for _ in range(rounds):
        for name, command in launch.items():
            with tempfile.TemporaryDirectory() as folder:
                done = common.finish(["env", *command, "--model", Path(folder, "m.pt"),
                                      "--plot", Path(folder, "loss.png")])
            if done.status:
                sys.exit(done.stderr)
            speeds[name].append(float(re.findall(r"([\d,]+) tokens/s", done.stdout)[-1].replace(",", "")))
    medians = {name: statistics.median(each) for name, each in speeds.items()}
    print(f"\nTraining by several processes: {' '.join(train)}\n")
    common.print_table(["", "tokens/s", "of the rounds", "/ one process"], [
        [name, f"{median:,.0f}", f"{min(speeds[name]):,.0f} to {max(speeds[name]):,.0f}",
         f"{median / medians['one process, two threads']:.2f}"] for name, median in medians.items()])


def measure_reciting(text, sizes, options):
    """Whole trainings on beginnings of a text, of so many KB, with defaults but for the `options` of train."""
    text, seconds, rows = Path(text).read_text(encoding="utf-8"), [], []
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "text.txt").write_text(text[:round(1000 * size)], encoding="utf-8")
            done = common.finish([sys.executable, common.ROOT / "story_llm.py", "train", "--text", "text.txt",
                                  *options], cwd=folder)
        if done.status:
            sys.exit(done.stderr)
        steps = re.search(r"([\d,]+) steps", done.stdout)[1]
        vocabulary, parameters = re.search(r"vocabulary ([\d,]+); ([\d,]+) parameters", done.stdout).groups()
        recall = re.search(r"Recall (.*) sentences", done.stdout)[1]
        seconds.append(done.seconds)
        rows.append([f"{size:g}", vocabulary, parameters, steps, f"{done.seconds:.1f}",
                     f"{done.seconds / size:.2f}", f"{done.peak_mb:,.0f}", recall])
        print(rows[-1], file=sys.stderr, flush=True)
    print(f"\nLearned by heart, whole process, by the size of the text: {' '.join(options) or 'all defaults'}\n")
    common.print_table(["KB", "vocabulary", "parameters", "steps", "s", "exponent", "s per KB", "peak MB", "recall"], [
        [*row[:5], shown(grown), *row[5:]] for row, grown in zip(rows, exponent(sizes, seconds))])


def draw(results, path):
    """One panel for each series, on logarithmic axes; the law is the dashed line."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(9, 7), layout="constrained")
    for axes, (name, (values, measured, law)) in zip(figure.subplots(2, 2).flat, results.items()):
        axes.plot(values, law, color="#555555", linestyle="--", label="the law")
        axes.plot(values, measured, color="#0072b2", marker="o", label="measured")
        axes.set(xscale="log", yscale="log", xlabel="text (MB)" if name == "text" else name,
                 ylabel="tokenize (s)" if name == "text" else "training step (ms)")
        axes.set_xticks(values, [f"{value:g}" for value in values], minor=False)
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.25)
        axes.legend()
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--series", nargs="+", choices=["text", "processes", "recite", *SERIES],
                        default=["text", "processes", *SERIES])
    parser.add_argument("--text-mb", nargs="+", type=float, default=[0.01, 0.1, 1, 10, 100], metavar="MB")
    parser.add_argument("--recite-text", default=str(common.ROOT / "Short_Story.txt"), metavar="FILE")
    parser.add_argument("--recite-kb", nargs="+", type=float, default=[5, 10, 20], metavar="KB")
    parser.add_argument("--recite-train", default="", metavar="OPTIONS", help='of `train`, as in "--emb-dim 256"')
    parser.add_argument("--processes", nargs="+", choices=PROCESSES_TRAIN, default=["story"], metavar="MODEL",
                        help="what the series of processes trains: story, gpt2-small (story)")
    parser.add_argument("--plot", metavar="FILE")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        name, _, value = options.contender.partition(":")
        points = {"tokenize": tokenize_point, "train": train_point}
        return common.answer(points[name], value) if name in points else common.answer(shape_point, name, int(value))
    print(common.machine())
    results = {name: measure_text(options.text_mb) if name == "text" else measure_shapes(name)
               for name in options.series if name not in ("processes", "recite")}
    if "recite" in options.series:
        measure_reciting(options.recite_text, options.recite_kb, shlex.split(options.recite_train))
    if "processes" in options.series:
        for size in options.processes:
            measure_processes(size)
    if options.plot:
        draw(results, options.plot)
        print(f"\ndrew {options.plot}")


if __name__ == "__main__":
    main()
