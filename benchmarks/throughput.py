"""Training speed at equal configuration: story_llm, its peers, and what the machine's matrix products allow.

    python benchmarks/throughput.py --nanogpt PATH                  (about half an hour on two cores)
    python benchmarks/throughput.py --sizes small-16x64 --rounds 5
    python benchmarks/throughput.py --device cuda --nanogpt PATH    (GPT-2 small, context 1,024, on a GPU)
    python benchmarks/throughput.py --parts                         (what the milliseconds of a step are spent on)

A step is all that training does with a batch of random tokens: forward, loss, backward, clipping where the project
clips, AdamW; of story_llm it is its `training_step`, under `keep_memory`, which the program calls when it runs: glibc
then keeps freed memory. The peers run as they are. Same vocabulary, context, width, depth and dropout (none, or
--dropout) for all; each project has its own optimizer settings. On a GPU, those that compile are compiled. nanoGPT
and Hugging Face share one matrix between embedding and head, so their AdamW has less to do. "bf16 weights": no fp32
copy is kept, as in LLMs-from-scratch's ch05/10_llm-training-speed; on a CPU without instructions for it, bf16 is left
out. Figures are medians of the rounds, in each the median of the steps.

The ceiling: a large matrix product of the same type, its best GFLOP/s, over the products that a token needs:
6 flops per weight and 12 L C T for attention (Chowdhery et al. 2022, PaLM, appendix B).

--parts: each kind of work in a step of story_llm, alone, at the shapes that it has in the step, forward and backward;
on a CPU.
"""

import argparse
import math
import statistics
import time
from functools import partial

import common

SIZES = {  # name: shape, batch, steps timed
    "gpt2-small-2x256": (common.GPT2_SMALL, 2, 4),
    "gpt2-small-8x256": (common.GPT2_SMALL, 8, 2),
    "small-16x64": (common.Shape(2600, 64, 256, 4, 2, 0.0), 16, 100),
    "gpt2-small-16x1024": (common.GPT2_SMALL._replace(context_length=1024), 16, 30),
}
SIZES_OF = {"cpu": list(SIZES)[:3], "cuda": list(SIZES)[3:]}  # if none are asked for
CONTENDERS = {
    "story_llm": "story_llm",
    "reference:fp32": "LLMs-from-scratch, chapter 5, fp32",
    "optimized:bf16-weights": "LLMs-from-scratch, optimized, bf16 weights",
    "nanogpt:fp32": "nanoGPT, fp32",
    "nanogpt:bf16-autocast": "nanoGPT, bf16 autocast",
    "huggingface:fp32": "Hugging Face, fp32",
    "huggingface:bf16-autocast": "Hugging Face, bf16 autocast",
}
CONTENDERS_ON_GPU = {
    "story_llm": "story_llm",
    "story_llm:compiled": "story_llm, compiled",
    "reference:fp32": "LLMs-from-scratch, chapter 5, fp32",
    "optimized:bf16-weights-compiled": "LLMs-from-scratch, optimized, bf16 weights, compiled",
    "nanogpt:bf16-autocast": "nanoGPT, bf16 autocast",
    "nanogpt:bf16-autocast-compiled": "nanoGPT, bf16 autocast, compiled",
    "huggingface:bf16-autocast": "Hugging Face, bf16 autocast",
}
WARM_UP = 3
CEILINGS = {"matmul:fp32": "float32", "matmul:bf16": "bfloat16"}


def matmul_ceiling(dtype, device):
    """GFLOP/s of the fastest of some square products."""
    import torch
    size = 8192 if device == "cuda" else 4096
    a, b, c = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(3))
    times = []
    for _ in range(6):
        common.wait_for(device)
        began = time.perf_counter()
        torch.mm(a, b, out=c)
        common.wait_for(device)
        times.append(time.perf_counter() - began)
    return {"gflops": 2 * size ** 3 / min(times) / 1e9}


def training_speed(contender, shape, batch_size, steps, options):
    """Tokens per second of one contender, and the type in which it multiplies."""
    import torch
    from torch.nn import functional as F
    project, _, precision = contender.partition(":")
    device = torch.device(options.device)
    torch.manual_seed(0)
    if project == "optimized":
        torch.set_float32_matmul_precision("high")
    model = common.make_model(project, shape, options).to(device).train()
    autocast, grad_clip = torch.autocast(device.type, torch.bfloat16, enabled="autocast" in precision), 1.0
    if project == "nanogpt":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # as its train.py does
        optimizer = model.configure_optimizers(0.1, learning_rate=6e-4, betas=(0.9, 0.95), device_type=device.type)
    elif project == "huggingface":
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.1, fused=True)
    elif project == "optimized":
        model, grad_clip = model.to(torch.bfloat16), None
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.1, fused=True)
    elif project == "reference":
        optimizer, grad_clip = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.1), None
    if "compiled" in precision:
        model.compile()

    def plain_step(inputs, targets):
        with autocast:
            if project == "nanogpt":
                loss = model(inputs, targets)[1]
            elif project == "huggingface":
                loss = model(inputs, labels=inputs).loss
            else:
                loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        loss.backward()
        if grad_clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()

    step, bf16 = plain_step, "bf16" in precision
    if project == "story_llm":
        import story_llm
        run = common.make_run(model, batch_size)
        step, bf16 = partial(story_llm.training_step, run), story_llm.use_bf16(device, run.train_config.precision)
    times = []
    for _ in range(WARM_UP + steps):
        tokens = torch.randint(shape.vocab_size, (batch_size, shape.context_length + 1), device=device)
        inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        common.wait_for(options.device)
        began = time.perf_counter()
        step(inputs, targets)
        common.wait_for(options.device)
        times.append(time.perf_counter() - began)
    on_gpu = {"gpu_mb": torch.cuda.max_memory_allocated() / 1e6} if device.type == "cuda" else {}
    return {"tokens": batch_size * shape.context_length / statistics.median(times[WARM_UP:]),
            "dtype": "bfloat16" if bf16 else "float32", **on_gpu}


def time_parts(shape, batch_size, steps, options):
    """{part: milliseconds in a step of story_llm}: each kind of work alone, forward and backward, at its shapes."""
    import story_llm
    import torch
    from torch import nn
    V, T, C, H, L, _ = shape
    model = common.make_model("story_llm", shape, options).train()
    run = common.make_run(model, batch_size)
    bf16 = torch.bfloat16 if story_llm.use_bf16(torch.device("cpu"), run.train_config.precision) else torch.float32

    def milliseconds(function, *inputs):
        times = []
        learned = [each for each in inputs if getattr(each, "requires_grad", False)]
        upstream = torch.ones_like(function(*inputs)) if learned else None
        for _ in range(WARM_UP + max(steps, 5)):
            began = time.perf_counter()
            output = function(*inputs)
            if learned:
                torch.autograd.grad(output, learned, upstream)
            del output
            times.append(1000 * (time.perf_counter() - began))
        return statistics.median(times[WARM_UP:])

    def some(*size, dtype=bf16):
        return torch.randn(*size).to(dtype).requires_grad_()

    def loss_milliseconds():
        """Within a step: by itself, its large blocks of memory would come from elsewhere, and be slower."""
        run.optimizer.zero_grad()
        with story_llm.precision_of(run):
            logits, ends = model(tokens[:, :-1]), []
            logits.register_hook(lambda gradient: ends.append(time.perf_counter()))
            began = time.perf_counter()
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        return 1000 * (ends[0] - began)

    N = batch_size * T
    tokens = torch.randint(V, (batch_size, T + 1))
    step = milliseconds(story_llm.training_step, run, tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    parts = {"softmax of the loss": statistics.median(loss_milliseconds() for _ in range(WARM_UP + steps))}

    def cast():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.detach().to(bf16).to(torch.float32)

    def products(inputs, outputs):
        return milliseconds(nn.functional.linear, some(N, inputs), some(outputs, inputs))

    parts["clipping"] = milliseconds(nn.utils.clip_grad_norm_, list(model.parameters()), 1.0)
    parts["AdamW"] = milliseconds(run.optimizer.step)
    if bf16 != torch.float32:
        parts["weights to bf16, gradients back"] = milliseconds(cast)
    parts["matrix products"] = L * (4 * products(C, C) + products(C, 4 * C) + products(4 * C, C)) + products(C, V)
    mask = story_llm.causal_mask(T, T)
    parts["attention, with its products"] = L * milliseconds(
        story_llm.attend, *(some(batch_size, H, T, C // H) for _ in range(3)), mask)
    parts["GELU"] = L * milliseconds(nn.functional.gelu, some(N, 4 * C))
    parts["LayerNorm"] = (2 * L + 1) * milliseconds(nn.LayerNorm(C), some(N, C, dtype=torch.float32))
    return {**parts, "the rest": step - sum(parts.values()), "a step": step}


def print_parts(results):
    """The table of --parts: a column for each size."""
    print("\nMilliseconds of a training step\n")
    common.print_table(["", *results], [[part, *(f"{sizes[part]:,.1f}" for sizes in results.values())]
                                        for part in next(iter(results.values()))])


def print_size(size, results, shape, contenders):
    """The table of one size."""
    gflops = {dtype: max(each["gflops"] for each in results[name]) for name, dtype in CEILINGS.items() if name in results}
    flops = 6 * common.matmul_weights(shape) + 12 * shape.n_layers * shape.emb_dim * shape.context_length
    missing = common.missing_of(results, contenders)
    speeds = {name: common.median(results[name], "tokens") for name in contenders if contenders[name] not in missing}
    reference, ours = speeds.get("reference:fp32", math.nan), speeds.get("story_llm", math.nan)
    rows = []
    for name, speed in speeds.items():
        dtype = results[name][0]["dtype"]
        rows.append([contenders[name], f"{speed:,.0f}", common.spread(results[name], "tokens"),
                     f"{speed / reference:.2f}", f"{ours / speed:.2f}",
                     f"{speed * flops / gflops[dtype] / 1e9:.0%} of {dtype}",
                     f"{common.median(results[name], 'gpu_mb' if 'gpu_mb' in results[name][0] else 'peak_mb'):,.0f}"])
    rows += [[f"ceiling, {dtype}: {g:,.0f} GFLOP/s", f"{g * 1e9 / flops:,.0f}"] for dtype, g in gflops.items()]
    print(f"\nTraining, {size}: {shape}, {flops / 1e6:,.1f} MFLOP per token\n")
    header = ["", "tokens/s", "of the rounds", "/ reference", "story_llm / this", "of the ceiling", "peak MB"]
    common.print_table(header, rows, missing)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="steps timed in each round, after three that are not")
    parser.add_argument("--dropout", type=float, help="for all contenders, instead of the preset's")
    parser.add_argument("--nanogpt", metavar="PATH", help="a checkout of nanoGPT")
    parser.add_argument("--parts", action="store_true", help="what the milliseconds of a step are spent on")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--size", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.parts and options.device != "cpu":
        parser.error("--parts measures a CPU")
    if options.contender in CEILINGS:
        return common.answer(matmul_ceiling, CEILINGS[options.contender], options.device)
    contenders, ceilings = CONTENDERS if options.device == "cpu" else CONTENDERS_ON_GPU, list(CEILINGS)
    if options.device == "cpu" and not common.bf16_instructions():
        contenders, ceilings = {name: title for name, title in contenders.items() if "bf16" not in name}, ["matmul:fp32"]
    if not options.contender:
        print(f"{common.machine(options.device)}\n{options.rounds} rounds")
    parts = {}
    for size in [options.size] if options.contender else options.sizes or SIZES_OF[options.device]:
        shape, batch_size, steps = SIZES[size]
        shape = shape if options.dropout is None else shape._replace(drop_rate=options.dropout)
        if options.contender == "parts":
            return common.answer(time_parts, shape, batch_size, max(options.steps or steps, 3), options)
        if options.contender:
            return common.answer(training_speed, options.contender, shape, batch_size, options.steps or steps, options)
        if options.parts:
            rounds = common.take_turns(["parts"], options.rounds, ["--size", size])["parts"]
            parts[size] = {part: common.median(rounds, part) for part in rounds[0] if part != "peak_mb"}
            continue
        results = common.take_turns([*contenders, *ceilings], options.rounds, ["--size", size])
        print_size(size, results, shape, contenders)
    if parts:
        print_parts(parts)


if __name__ == "__main__":
    main()
