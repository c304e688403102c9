"""Greedy generation with a model of GPT-2's size and random weights, one text at a time.

    python benchmarks/generation.py --nanogpt PATH --llms-from-scratch PATH
    python benchmarks/generation.py --device cuda --nanogpt PATH

After a short warm-up, each contender continues a prompt of 8 tokens by --tokens more, within its
context length of 256, with the project's own function. story_llm runs under `keep_freed_memory` and
after `prepare_inference`, as `generate` does. "Early" and "late" are the median times per token in
the first and the last quarter. With a key-value cache they are about equal, and without one they
grow. All figures are medians of the rounds. The column "/ Hugging Face" compares with the same
precision.

The ceiling: every token needs all weights that it is multiplied by, so it takes at least the time
of reading them from memory. The bandwidth of the memory is the higher one of reading and copying a
large tensor.

Below the table stands a check: does story_llm choose the same tokens with its cache as
`generate_text_simple` does without it, even beyond the context length? It is made with
the same model, but with a context length of 64, and with --check-tokens tokens.
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
CHECK_CONTEXT = 64

def memory_bandwidth(device):
    """GB/s: the higher one of reading (sum) and copying (read and write) 1 GB."""
    import torch
    source = torch.ones(250_000_000, device=device)
    target = torch.ones(250_000_000, device=device)
    rates = []
    for _ in range(5):
        for work, gigabytes in ((source.sum, 1), (lambda: target.copy_(source), 2)):
            common.synchronize(device)
            start = time.perf_counter()
            work()
            common.synchronize(device)
            rates.append(gigabytes / (time.perf_counter() - start))
    return {"gb_per_s": max(rates)}

def generation_function(project, model, context_length):
    """Return a function of (prompt, number of tokens) that generates greedily, as the project
    does."""
    if project == "story_llm":
        from story_llm import generate
        return lambda prompt, count: list(generate(model, prompt, count))
    if project == "reference":
        from llms_from_scratch.ch04 import generate_text_simple
        return lambda prompt, count: generate_text_simple(model, prompt, count, context_length)
    if project == "cached":
        from gpt_with_kv_cache_optimized import generate_text_simple_cached
        return lambda prompt, count: generate_text_simple_cached(model, prompt, count)
    if project == "nanogpt":
        return lambda prompt, count: model.generate(prompt, count, top_k=1)
    return lambda prompt, count: model.generate(prompt, max_new_tokens=count, do_sample=False,
                                                pad_token_id=0)

def generation_speed(contender, shape, count, options):
    """Tokens per second, and milliseconds per token, early and late."""
    import torch
    project, _, precision = contender.partition(":")
    torch.manual_seed(0)
    model = common.make_model(project, shape, options).eval()
    model.to(options.device, torch.bfloat16 if precision == "bf16" else torch.float32)
    if project == "story_llm":
        from story_llm import prepare_inference
        model = prepare_inference(model, precision)
    generate = generation_function(project, model, shape.context_length)
    prompt = torch.randint(shape.vocab_size, (1, PROMPT_TOKENS)).to(options.device)
    generate(prompt, 4)
    common.synchronize(options.device)

    starts = []     # of the passes through the model
    model.register_forward_pre_hook(lambda *_: starts.append(time.perf_counter()))
    start = time.perf_counter()
    generate(prompt, count)
    common.synchronize(options.device)
    seconds = time.perf_counter() - start

    passes = [1000 * (b - a) for a, b in zip(starts[1:], starts[2:])]       # without the prompt's
    quarter = max(len(passes) // 4, 1)
    return {"tokens": count / seconds, "early": statistics.median(passes[:quarter]),
            "late": statistics.median(passes[-quarter:])}

def compare_tokens(shape, count):
    """Count how many of story_llm's cached tokens equal those of `generate_text_simple`, up to the
    first that differs."""
    import story_llm
    import torch
    torch.manual_seed(1)
    model = common.make_model("story_llm", shape, None).eval()
    prompt = torch.randint(shape.vocab_size, (1, PROMPT_TOKENS))
    expected = story_llm.generate_text_simple(model, prompt, count, shape.context_length)
    expected = expected[0, PROMPT_TOKENS:].tolist()
    model = story_llm.prepare_inference(model)
    cached = [token.item() for token in story_llm.generate(model, prompt, count)]
    equal = [a == b for a, b in zip(cached, expected)]
    return {"equal": equal.index(False) if False in equal else len(equal),
            "distinct": len(set(expected))}

def print_results(results, shape, count):
    bandwidth = max(result["gb_per_s"] for result in results["bandwidth"])
    absent = common.find_absent(results, CONTENDERS)
    speeds = {name: common.median(results[name], "tokens")
              for name, title in CONTENDERS.items() if title not in absent}
    reference = speeds.get("reference:fp32", math.nan)
    hugging_face = {precision: speeds.get(f"huggingface:{precision}", math.nan)
                    for precision in ("fp32", "bf16")}
    rows = []
    for name, speed in speeds.items():
        precision = name.partition(":")[2]
        bytes_per_weight = 2 if precision == "bf16" else 4
        used = speed * common.matmul_weights(shape) * bytes_per_weight / 1e9        # GB/s
        early, late = (f"{common.median(results[name], part):.1f}" for part in ("early", "late"))
        rows.append([CONTENDERS[name], f"{speed:.1f}",
                     common.format_range(results[name], "tokens", "{:.1f}"),
                     f"{speed / reference:.2f}", f"{speed / hugging_face[precision]:.2f}",
                     early, late, f"{used / bandwidth:.0%}"])
    for name, bytes_per_weight in (("float32", 4), ("bfloat16", 2)):
        ceiling = bandwidth * 1e9 / common.matmul_weights(shape) / bytes_per_weight
        rows.append([f"ceiling at {bandwidth:.1f} GB/s, {name}", f"{ceiling:.1f}"])
    print(f"\nGreedy generation of {count} tokens after {PROMPT_TOKENS}: {shape}\n")
    common.print_table(["", "tokens/s", "range of rounds", "/ reference", "/ Hugging Face",
                        "ms early", "ms late", "of the ceiling"], rows, absent)

def print_check(check, count):
    title = "Cached generation against generate_text_simple"
    if "absent" in check:
        print(f"\n{title}: {check['absent']}")
        return
    print(f"\n{title}: the first {check['equal']} of {count} tokens are the same, "
          f"{check['distinct']} different ones among them; the window is full after "
          f"{CHECK_CONTEXT - PROMPT_TOKENS}.")

def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="rounds of measurements (default: 3)")
    parser.add_argument("--tokens", type=int, default=200,
                        help="tokens to generate, at most 248 (default: 200)")
    parser.add_argument("--check-tokens", type=int, default=120,
                        help="tokens to compare with generate_text_simple (default: 120)")
    parser.add_argument("--nanogpt", metavar="PATH", help="a checkout of nanoGPT")
    parser.add_argument("--llms-from-scratch", metavar="PATH",
                        help="a checkout of LLMs-from-scratch")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    options = parser.parse_args()
    shape = common.GPT2_SMALL
    if options.contender == "bandwidth":
        common.print_result(memory_bandwidth, options.device)
    elif options.contender == "check":
        check_shape = shape._replace(context_length=CHECK_CONTEXT)
        common.print_result(compare_tokens, check_shape, options.check_tokens)
    elif options.contender:
        common.print_result(generation_speed, options.contender, shape, options.tokens, options)
    else:
        print(f"{common.describe_machine(options.device)}\n{options.rounds} rounds")
        results = common.run_rounds([*CONTENDERS, "bandwidth"], options.rounds)
        print_results(results, shape, options.tokens)
        print_check(common.measure("check"), options.check_tokens)

if __name__ == "__main__":
    main()
