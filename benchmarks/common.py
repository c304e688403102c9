"""What the benchmarks share: a process for each measurement, the peers' models, and tables.

Every measurement runs in a process of its own: `python BENCHMARK.py --contender NAME ...` measures
one contender and prints a JSON object. When story_llm runs as a program, it tells glibc to keep
freed memory (`keep_freed_memory`). A benchmark does the same for it, and in a shared process the
peers would benefit too. Processes run one at a time and the contenders take turns, so a machine
that slows down in the meantime slows all of them down alike. Works on Linux and macOS.
"""
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import namedtuple
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

Shape = namedtuple("Shape", "vocab_size context_length emb_dim n_heads n_layers drop_rate")
GPT2_SMALL = Shape(50257, 256, 768, 12, 12, 0.0)
FinishedProcess = namedtuple("FinishedProcess", "status seconds peak_mb stdout stderr")

class Absent(Exception):
    """A contender cannot run here. The message says why, and what would help."""

def matmul_weights(shape):
    """Count the weights that each token is multiplied by: 12 C^2 in a block, and the output head.
    The embeddings are only looked up."""
    return shape.n_layers * 12 * shape.emb_dim ** 2 + shape.emb_dim * shape.vocab_size

def make_model(project, shape, options):
    """Return an untrained model of one of the projects; `shape` means the same for all of them."""
    if project == "story_llm":
        import story_llm
        story_llm.keep_freed_memory()       # as the program does; it affects this process alone
        return story_llm.GPTModel(story_llm.GPTConfig(**shape._asdict()))
    if project == "reference":
        from llms_from_scratch.ch04 import GPTModel
        return GPTModel({**shape._asdict(), "qkv_bias": False})
    if project == "optimized":      # the model of ch05/10_llm-training-speed/01_opt_single_gpu.py
        from llms_from_scratch.ch04 import GPTModelFast
        return GPTModelFast({**shape._asdict(), "qkv_bias": False})
    if project == "cached":     # ch04/03_kv-cache; the package's own (1.0.19) fails at token two
        if not options.llms_from_scratch:
            raise Absent("give --llms-from-scratch PATH, a checkout of "
                         "github.com/rasbt/LLMs-from-scratch")
        sys.path.insert(0, str(Path(options.llms_from_scratch, "ch04", "03_kv-cache")))
        from gpt_with_kv_cache_optimized import GPTModel
        return GPTModel({**shape._asdict(), "qkv_bias": False})
    if project == "nanogpt":
        if not options.nanogpt:
            raise Absent("give --nanogpt PATH, a checkout of github.com/karpathy/nanoGPT")
        sys.path.insert(0, options.nanogpt)
        from model import GPT, GPTConfig
        return GPT(GPTConfig(block_size=shape.context_length, vocab_size=shape.vocab_size,
                             n_layer=shape.n_layers, n_head=shape.n_heads, n_embd=shape.emb_dim,
                             dropout=shape.drop_rate))
    from transformers import GPT2Config, GPT2LMHeadModel
    return GPT2LMHeadModel(GPT2Config(
        vocab_size=shape.vocab_size, n_positions=shape.context_length, n_embd=shape.emb_dim,
        n_head=shape.n_heads, n_layer=shape.n_layers, resid_pdrop=shape.drop_rate,
        embd_pdrop=shape.drop_rate, attn_pdrop=shape.drop_rate, bos_token_id=None,
        eos_token_id=None))

def make_run(model, batch_size):
    """Return (a run of story_llm in the middle of its training, a function of (inputs, targets)
    that makes a step of it). The step is that of `training_steps`, on this batch instead of one
    from a text, and none is evaluated."""
    import story_llm
    never = 1_000_000
    config = story_llm.TrainConfig(batch_size=batch_size, eval_every=never)
    run = story_llm.Run(model, tokenizer=None, train_config=config, fingerprint="",
                        steps_per_epoch=1, total_steps=never, prompt="", step=25)
    batches = []
    story_llm.training_batches = lambda run, corpus: iter(batches.pop, None)
    corpus = story_llm.Corpus("", None, "", train_ids=(), val_ids=(), fingerprint="")
    steps = story_llm.training_steps(run, corpus)

    def step(inputs, targets):
        batches.append((inputs, targets))
        next(steps)

    return run, step

def run_process(command, cwd=None):
    """Run a command to its end; return a FinishedProcess with its time from start to exit, its peak
    memory and its output."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=out, stderr=err, cwd=cwd)
        # Linux counts a process's peak memory from the size of the process that started it, so
        # the benchmarks themselves never import torch.
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        return FinishedProcess(process.returncode, seconds, peak_megabytes(usage), out.read(),
                               err.read())

def peak_megabytes(usage):
    """The peak memory of a process, from its resource usage; the unit depends on the system."""
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6

def synchronize(device):
    """Wait until a GPU has finished all its work."""
    if device == "cuda":
        import torch
        torch.cuda.synchronize()

def measure(name, arguments=()):
    """Measure one contender once, in a process of its own. Return a dictionary, or {"absent":
    reason} if the contender cannot run."""
    command = [sys.executable, sys.argv[0], *sys.argv[1:], *arguments, "--contender", name]
    done = run_process(command)
    if done.status != 0:
        return failure(done)
    return {**json.loads(done.stdout.splitlines()[-1]), "peak_mb": done.peak_mb}

def failure(done):
    """What to report of a process that did not succeed."""
    reason = (done.stderr.strip().splitlines() or [f"exit status {done.status}"])[-1]
    return {"absent": f"failed: {reason}"}

def run_rounds(names, rounds, arguments=()):
    """Measure every contender once in each round; return {name: [measurement of each round]}. An
    absent one is not tried again."""
    results = {name: [] for name in names}
    for number in range(1, rounds + 1):
        for name in names:
            if not any("absent" in result for result in results[name]):
                print(f"round {number} of {rounds}: {name}", file=sys.stderr, flush=True)
                results[name].append(measure(name, arguments))
    return results

def print_result(function, *arguments):
    """In the process of one contender: print what the function returns, or why it cannot run."""
    try:
        result = function(*arguments)
    except (Absent, ImportError) as error:
        result = {"absent": f"absent: {error}"}
    print("\n" + json.dumps(result))

def find_absent(results, titles):
    """{title: reason} of the contenders that did not run."""
    absent = {}
    for name, title in titles.items():
        reasons = [result["absent"] for result in results[name] if "absent" in result]
        if reasons:
            absent[title] = reasons[0]
    return absent

def median(results, key):
    return statistics.median(result[key] for result in results)

def format_range(results, key, form="{:,.0f}"):
    """The smallest and the largest value of the rounds."""
    values = [result[key] for result in results]
    return f"{form.format(min(values))} to {form.format(max(values))}"

def cpu_info():
    return Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""

def bf16_instructions():
    """This CPU's instructions for bf16. Without them, matrix products in bf16 take sixty times as
    long as in fp32."""
    return [flag for flag in ("avx512_bf16", "amx_bf16") if flag in cpu_info()]

def busy_share():
    """The share of all cores' time that this machine spends on something, over a second. (The load
    average still counts what ended a minute ago.) 0 if the system does not tell."""
    def times():
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
        return sum(map(int, fields)), int(fields[3]) + int(fields[4])       # all; idle or waiting

    if not os.path.exists("/proc/stat"):
        return 0.0
    all_before, idle_before = times()
    time.sleep(1)
    all_after, idle_after = times()
    return 1 - (idle_after - idle_before) / max(all_after - all_before, 1)

def describe_machine(device="cpu"):
    """Where and when this is measured, with a warning if the machine is busy. To be called before
    the measurements."""
    models = [line.split(":")[1].strip() for line in cpu_info().splitlines()
              if line.startswith("model name")]
    parts = [models[0] if models else platform.processor() or platform.machine(),
             f"{os.cpu_count()} cores"]
    if device == "cuda":
        command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        parts.append(subprocess.run(command, capture_output=True, text=True).stdout.strip())
    parts += [*bf16_instructions(), f"torch {metadata.version('torch')}",
              f"Python {platform.python_version()}", time.strftime("%Y-%m-%d")]
    busy = busy_share()
    warning = ""
    if busy > 0.1:
        warning = (f"\n**The machine is busy with something else ({busy:.0%} of its time): do not "
                   "trust these figures.**")
    return ", ".join(parts) + warning

def print_table(header, rows, absent=()):
    """Print a markdown table, and below it why each of the `absent` contenders ({title: reason})
    has no figures."""
    rows = [list(header), *rows]
    for title in absent:
        rows.append([title, absent[title].partition(":")[0]])
    rows = [[*row, *[""] * (len(header) - len(row))] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    rows.insert(1, ["-" * widths[0]] + ["-" * (width - 1) + ":" for width in widths[1:]])
    for first, *others in rows:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:])]
        print(f"| {' | '.join(cells)} |")
    for title in absent:
        print(f"\n{title}: {absent[title]}")
