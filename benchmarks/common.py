"""What the benchmarks share: one process per measurement, the peers' models, tables.

Every measurement is a process of its own: `python <benchmark>.py --contender NAME ...` measures that one
contender and prints a JSON object. For story_llm, when it runs as a program, tells glibc to keep freed memory
(`keep_memory`); a benchmark does that for it, and in one process its peers would run under that too. Processes
run one at a time and in turns, so a machine that slows down meanwhile slows all contenders alike. Linux or macOS.
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

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

Shape = namedtuple("Shape", "vocab_size context_length emb_dim n_heads n_layers drop_rate")
GPT2_SMALL = Shape(50257, 256, 768, 12, 12, 0.0)
Finished = namedtuple("Finished", "status seconds peak_mb stdout stderr")


class Absent(Exception):
    """A contender that cannot run here; the text says why and what would help."""


def matmul_weights(shape):
    """Weights that one token is multiplied by: 12 C^2 in a block and the head; looking up an embedding is none."""
    return shape.n_layers * 12 * shape.emb_dim ** 2 + shape.emb_dim * shape.vocab_size


def make_model(project, shape, options):
    """An untrained model of one of the projects; `shape` says the same to all of them."""
    if project == "story_llm":
        import story_llm
        story_llm.keep_memory()  # as the program does when it runs; it holds for this process alone
        return story_llm.GPTModel(story_llm.GPTConfig(**shape._asdict()))
    if project == "reference":
        from llms_from_scratch.ch04 import GPTModel
        return GPTModel({**shape._asdict(), "qkv_bias": False})
    if project == "optimized":  # the model of ch05/10_llm-training-speed/01_opt_single_gpu.py
        from llms_from_scratch.ch04 import GPTModelFast
        return GPTModelFast({**shape._asdict(), "qkv_bias": False})
    if project == "cached":  # ch04/03_kv-cache; that of the package (1.0.19) cannot take a second token
        if not options.llms_from_scratch:
            raise Absent("give --llms-from-scratch PATH, a checkout of github.com/rasbt/LLMs-from-scratch")
        sys.path.insert(0, str(Path(options.llms_from_scratch, "ch04", "03_kv-cache")))
        from gpt_with_kv_cache_optimized import GPTModel
        return GPTModel({**shape._asdict(), "qkv_bias": False})
    vocabulary, context, width, heads, layers, drop = shape
    if project == "nanogpt":
        if not options.nanogpt:
            raise Absent("give --nanogpt PATH, a checkout of github.com/karpathy/nanoGPT")
        sys.path.insert(0, options.nanogpt)
        from model import GPT, GPTConfig
        return GPT(GPTConfig(context, vocabulary, layers, heads, width, drop))
    from transformers import GPT2Config, GPT2LMHeadModel
    return GPT2LMHeadModel(GPT2Config(
        vocab_size=vocabulary, n_positions=context, n_embd=width, n_head=heads, n_layer=layers, resid_pdrop=drop,
        embd_pdrop=drop, attn_pdrop=drop, bos_token_id=None, eos_token_id=None))


def make_run(model, batch_size):
    """A run of story_llm amidst its training; `training_step` takes its steps, on any batches."""
    import story_llm
    run = story_llm.Run(model, None, story_llm.TrainConfig(batch_size=batch_size), fingerprint="", steps_per_epoch=1,
                        total_steps=10_000, prompt="", step=25)
    story_llm.start_optimizer(run)
    return run


def finish(command, cwd=None):
    """Run a command to its end; its time from start to exit, its peak memory, what it wrote."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=out, stderr=err, cwd=cwd)
        _, status, usage = os.wait4(process.pid, 0)  # Linux counts from the size of the process that starts it,
        seconds = time.perf_counter() - began        # so the benchmarks themselves never import torch
        process.returncode = os.waitstatus_to_exitcode(status)
        peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6
        out.seek(0), err.seek(0)
        return Finished(process.returncode, seconds, peak, out.read(), err.read())


def wait_for(device):
    """Until a GPU has done all that it was asked to."""
    if device == "cuda":
        import torch
        torch.cuda.synchronize()


def measure(name, arguments=()):
    """One measurement of one contender in a process of its own: a dictionary, {"absent": why} if there is none."""
    done = finish([sys.executable, sys.argv[0], *sys.argv[1:], *arguments, "--contender", name])
    last = (done.stderr if done.status else done.stdout).strip().splitlines()[-1:] or [f"exit status {done.status}"]
    return {"absent": f"failed: {last[0]}"} if done.status else {**json.loads(last[0]), "peak_mb": done.peak_mb}


def take_turns(names, rounds, arguments=()):
    """{name: [measurement of each round]}; each round measures every contender once. Absent ones are not retried."""
    results = {name: [] for name in names}
    for turn in range(rounds):
        for name in names:
            if not any("absent" in result for result in results[name]):
                print(f"round {turn + 1} of {rounds}: {name}", file=sys.stderr, flush=True)
                results[name].append(measure(name, arguments))
    return results


def answer(function, *arguments):
    """In the process of one contender: print what it measures, or why it cannot."""
    try:
        result = function(*arguments)
    except (Absent, ImportError) as error:
        result = {"absent": f"absent: {error}"}
    print("\n" + json.dumps(result))


def missing_of(results, titles):
    """{title: why} of the contenders that did not run."""
    why = {name: [each["absent"] for each in results[name] if "absent" in each] for name in titles}
    return {titles[name]: reasons[0] for name, reasons in why.items() if reasons}


def median(results, key):
    return statistics.median(result[key] for result in results)


def spread(results, key, form="{:,.0f}"):
    """The smallest and the largest of the rounds."""
    values = [result[key] for result in results]
    return f"{form.format(min(values))} to {form.format(max(values))}"


def cpu_info():
    return Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""


def bf16_instructions():
    """Those of this CPU for bf16. Where there are none, products in bf16 take sixty times as long as in fp32."""
    return [flag for flag in ("avx512_bf16", "amx_bf16") if flag in cpu_info()]


def machine(device="cpu"):
    """Where and when this is measured; call it before measuring."""
    names = [line.split(":")[1].strip() for line in cpu_info().splitlines() if line.startswith("model name")]
    bf16 = bf16_instructions()
    if device == "cuda":
        command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        bf16.insert(0, subprocess.run(command, capture_output=True, text=True).stdout.strip())
    parts = [names[0] if names else platform.processor() or platform.machine(), f"{os.cpu_count()} cores", *bf16,
             f"torch {metadata.version('torch')}", f"Python {platform.python_version()}", time.strftime("%Y-%m-%d")]
    busy = os.getloadavg()[0]
    warning = f"\n**The machine is busy with something else (load {busy:.1f}): do not trust these figures.**"
    return ", ".join(parts) + warning * (busy > 0.5)


def print_table(header, rows, missing=()):
    """A markdown table; below it, why each of the `missing` contenders ({title: why}) has no figures."""
    rows = [[*row, *[""] * (len(header) - len(row))] for row in
            [header, *rows, *([title, missing[title].partition(":")[0]] for title in missing)]]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    rows.insert(1, ["-" * widths[0]] + ["-" * (width - 1) + ":" for width in widths[1:]])
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:]))]
        print(f"| {' | '.join(cells)} |")
    for title in missing:
        print(f"\n{title}: {missing[title]}")
