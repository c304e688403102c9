"""Greedy generation with a model of GPT-2's size and random weights, one text at a time.

    python benchmarks/generation.py --nanogpt PATH --llms-from-scratch PATH
    python benchmarks/generation.py --device cuda --nanogpt PATH

Each contender continues a prompt of 8 tokens by --tokens more, within its context of 256, by its own function and
after a short warm-up; story_llm under `keep_memory`, as the program runs. Early and late are the medians of the times
per token of the first and last quarter: what a cache keeps level grows without one. Figures are medians of the rounds.

The ceiling: every token needs all weights that it is multiplied by, so it takes at least their bytes over the
bandwidth of the memory, measured as the faster of reading and copying a large tensor.

Below the table: does story_llm's cached generation choose the same tokens as its `generate_text_simple`, also past
the end of the context? Tested with the same model but for a context of 64, with --check-tokens tokens.
"""

import argparse
import math
import statistics
import time

import common

CONTENDERS = {
    "story_llm:fp32": "story_llm, cached",
    "story_llm:bf16": "story_llm, cached, bf16 weights",
    "reference:fp32": "LLMs-from-scratch, chapter 5, generate_text_simple",
    "cached:fp32": "LLMs-from-scratch, chapter 4 with cache",
    "nanogpt:fp32": "nanoGPT",
    "huggingface:fp32": "Hugging Face, cached",
    "huggingface:bf16": "Hugging Face, cached, bf16 weights",
}
PROMPT_TOKENS = 8


def memory_bandwidth(device):
    """GB/s: the faster of reading (sum) and copying (read and write) 1 GB."""
    import torch
    source, target = torch.ones(250_000_000, device=device), torch.ones(250_000_000, device=device)
    rates = []
    for _ in range(5):
        for work, gigabytes in ((source.sum, 1), (lambda: target.copy_(source), 2)):
            common.wait_for(device)
            began = time.perf_counter()
            work()
            common.wait_for(device)
            rates.append(gigabytes / (time.perf_counter() - began))
    return {"gb_per_s": max(rates)}


def writer(project, model, context):
    """A function of (prompt, number of tokens) that generates greedily as the project does it."""
    if project == "story_llm":
        from story_llm import generate
        return lambda prompt, count: list(generate(model, prompt, count))
    if project == "reference":
        from llms_from_scratch.ch04 import generate_text_simple
        return lambda prompt, count: generate_text_simple(model, prompt, count, context)
    if project == "cached":
        from gpt_with_kv_cache_optimized import generate_text_simple_cached
        return lambda prompt, count: generate_text_simple_cached(model, prompt, count)
    if project == "nanogpt":
        return lambda prompt, count: model.generate(prompt, count, top_k=1)
    return lambda prompt, count: model.generate(prompt, max_new_tokens=count, do_sample=False, pad_token_id=0)


def generation_speed(contender, shape, count, options):
    """Tokens per second, and milliseconds per token, early and late."""
    import torch
    project, _, precision = contender.partition(":")
    torch.manual_seed(0)
    model = common.make_model(project, shape, options).eval()
    model.to(options.device, torch.bfloat16 if precision == "bf16" else torch.float32)
    write, prompt = writer(project, model, shape.context_length), torch.randint(shape.vocab_size, (1, PROMPT_TOKENS))
    prompt = prompt.to(options.device)
    write(prompt, 4)
    common.wait_for(options.device)
    starts = []
    model.register_forward_pre_hook(lambda *_: starts.append(time.perf_counter()))
    began = time.perf_counter()
    write(prompt, count)
    common.wait_for(options.device)
    seconds = time.perf_counter() - began
    steps = [1000 * (b - a) for a, b in zip(starts[1:], starts[2:])]  # without the prompt's
    quarter = max(len(steps) // 4, 1)
    early, late = statistics.median(steps[:quarter]), statistics.median(steps[-quarter:])
    return {"tokens": count / seconds, "early": early, "late": late}


def same_tokens(shape, count):
    """How many of story_llm's cached tokens equal those of `generate_text_simple`, up to the first that differs."""
    import story_llm
    import torch
    torch.manual_seed(1)
    model = common.make_model("story_llm", shape, None).eval()
    prompt = torch.randint(shape.vocab_size, (1, PROMPT_TOKENS))
    plain = story_llm.generate_text_simple(model, prompt, count, shape.context_length)[0, PROMPT_TOKENS:].tolist()
    cached = [token.item() for token in story_llm.generate(model, prompt, count)]
    equal = [a == b for a, b in zip(cached, plain)]
    return {"equal": equal.index(False) if False in equal else len(equal), "distinct": len(set(plain))}


def print_results(results, shape, count):
    bandwidth = max(each["gb_per_s"] for each in results["bandwidth"])
    missing = common.missing_of(results, CONTENDERS)
    speeds = {name: common.median(results[name], "tokens") for name in CONTENDERS if CONTENDERS[name] not in missing}
    reference, hf = speeds.get("reference:fp32", math.nan), speeds.get("huggingface:bf16", math.nan)
    rows = []
    for name, speed in speeds.items():
        used = speed * common.matmul_weights(shape) * (2 if name.endswith("bf16") else 4) / 1e9  # GB/s of weights
        early, late = (f"{common.median(results[name], part):.1f}" for part in ("early", "late"))
        rows.append([CONTENDERS[name], f"{speed:.1f}", common.spread(results[name], "tokens", "{:.1f}"),
                     f"{speed / reference:.2f}", f"{speed / hf:.2f}", early, late, f"{used / bandwidth:.0%}"])
    for name, size in (("float32", 4), ("bfloat16", 2)):
        ceiling = bandwidth * 1e9 / common.matmul_weights(shape) / size
        rows.append([f"ceiling at {bandwidth:.1f} GB/s, {name}", f"{ceiling:.1f}"])
    print(f"\nGreedy generation of {count} tokens after {PROMPT_TOKENS}: {shape}\n")
    common.print_table(["", "tokens/s", "of the rounds", "/ reference", "/ Hugging Face bf16", "ms early", "ms late",
                        "of the ceiling"], rows, missing)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=200, help="tokens to generate, 248 at most (200)")
    parser.add_argument("--check-tokens", type=int, default=120, help="tokens to compare, context of 64 (120)")
    parser.add_argument("--nanogpt", metavar="PATH", help="a checkout of nanoGPT")
    parser.add_argument("--llms-from-scratch", metavar="PATH", help="a checkout of LLMs-from-scratch")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    options = parser.parse_args()
    shape, small_context = common.GPT2_SMALL, common.GPT2_SMALL._replace(context_length=64)
    if options.contender == "bandwidth":
        return common.answer(memory_bandwidth, options.device)
    if options.contender == "check":
        return common.answer(same_tokens, small_context, options.check_tokens)
    if options.contender:
        return common.answer(generation_speed, options.contender, shape, options.tokens, options)
    print(f"{common.machine(options.device)}\n{options.rounds} rounds")
    print_results(common.take_turns([*CONTENDERS, "bandwidth"], options.rounds), shape, options.tokens)
    check = common.measure("check")
    if "absent" in check:
        return print(f"\nCached against generate_text_simple: {check['absent']}")
    within = small_context.context_length - PROMPT_TOKENS
    print(f"\nCached against generate_text_simple: the first {check['equal']} of {options.check_tokens} tokens are the "
          f"same, {check['distinct']} different ones among them; the context is full after {within}.")


if __name__ == "__main__":
    main()
