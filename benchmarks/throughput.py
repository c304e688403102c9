"""Training speed at equal configuration: story_llm, its peers, and the limit of the machine.

    python benchmarks/throughput.py --nanogpt PATH                  (half an hour on two cores)
    python benchmarks/throughput.py --sizes small-16x64 --rounds 5
    python benchmarks/throughput.py --device cuda --nanogpt PATH    (GPT-2 small, context 1,024)
    python benchmarks/throughput.py --parts                         (where the time of a step goes)

A step is everything that training does with a batch of random tokens: forward pass, loss, backward
pass, gradient clipping where the project clips, and AdamW. For story_llm it is a step of
`training_steps`, under `keep_freed_memory`, as the program runs it. The peers run as they
are. Vocabulary, context length, width, depth and dropout (0, or --dropout) are the same for all,
and each project has its own settings of the optimizer. On a GPU, the projects that compile their
model are compiled. nanoGPT and Hugging Face use one matrix for embedding and output head, so their
AdamW has less to do. "bf16 weights" means that no fp32 copy of them is kept, as in
LLMs-from-scratch's ch05/10_llm-training-speed. On a CPU without instructions for bf16, bf16 is left
out. All figures are medians of the rounds, and each round is the median of its steps.

The ceiling: the best GFLOP/s of a large matrix product of the same type, divided by the operations
that a token needs, which are 6 per weight and 12 L C T for attention (Chowdhery et al. 2022, PaLM,
appendix B).

--parts measures each kind of work in a step of story_llm on its own, with the shapes that it has in
the step, forward and backward. It runs on a CPU only.
"""
import argparse
import math
import statistics
import time
from functools import partial

import common

SIZES = {       # {name: (shape, batch size, steps to time)}
    "gpt2-small-2x256": (common.GPT2_SMALL, 2, 4),
    "gpt2-small-8x256": (common.GPT2_SMALL, 8, 2),
    "small-16x64": (common.Shape(2600, 64, 256, 4, 2, 0.0), 16, 100),
    "gpt2-small-16x1024": (common.GPT2_SMALL._replace(context_length=1024), 16, 30),
}
DEFAULT_SIZES = {"cpu": ["gpt2-small-2x256", "gpt2-small-8x256", "small-16x64"],
                 "cuda": ["gpt2-small-16x1024"]}
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
CEILINGS = {"matmul:fp32": "float32", "matmul:bf16": "bfloat16"}
WARM_UP = 3

def matmul_ceiling(dtype, device):
    """GFLOP/s of the fastest of some square matrix products."""
    import torch
    size = 8192 if device == "cuda" else 4096
    a, b, c = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(3))
    times = []
    for _ in range(6):
        common.synchronize(device)
        start = time.perf_counter()
        torch.mm(a, b, out=c)
        common.synchronize(device)
        times.append(time.perf_counter() - start)
    return {"gflops": 2 * size ** 3 / min(times) / 1e9}

def make_peer_step(project, precision, model, device):
    """Return a function of (inputs, targets) that takes a training step as this peer does."""
    import torch
    from torch.nn import functional as F
    adamw = partial(torch.optim.AdamW, lr=5e-4, weight_decay=0.1)
    grad_clip = 1.0
    if project == "nanogpt":
        torch.backends.cuda.matmul.allow_tf32 = True        # as its train.py does
        torch.backends.cudnn.allow_tf32 = True
        optimizer = model.configure_optimizers(0.1, learning_rate=6e-4, betas=(0.9, 0.95),
                                               device_type=device.type)
    elif project == "huggingface":
        optimizer = adamw(model.parameters(), fused=True)
    elif project == "optimized":
        torch.set_float32_matmul_precision("high")
        model.to(torch.bfloat16)
        optimizer, grad_clip = adamw(model.parameters(), fused=True), None
    else:
        optimizer, grad_clip = adamw(model.parameters()), None
    autocast = torch.autocast(device.type, torch.bfloat16, enabled="autocast" in precision)

    def step(inputs, targets):
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

    return step

def training_speed(contender, shape, batch_size, steps, options):
    """Tokens per second of one contender, and the type of its matrix products."""
    import torch
    project, _, precision = contender.partition(":")
    device = torch.device(options.device)
    torch.manual_seed(0)
    model = common.make_model(project, shape, options).to(device).train()
    if project == "story_llm":
        import story_llm
        run, step = common.make_run(model, batch_size)
        bf16 = story_llm.use_bf16(device, run.train_config.precision)
    else:
        step = make_peer_step(project, precision, model, device)
        bf16 = "bf16" in precision
    if "compiled" in precision:
        model.compile()
    times = []
    for _ in range(WARM_UP + steps):
        windows = torch.randint(shape.vocab_size, (batch_size, shape.context_length + 1),
                                device=device)
        inputs, targets = windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
        common.synchronize(options.device)
        start = time.perf_counter()
        step(inputs, targets)
        common.synchronize(options.device)
        times.append(time.perf_counter() - start)
    result = {"tokens": batch_size * shape.context_length / statistics.median(times[WARM_UP:]),
              "dtype": "bfloat16" if bf16 else "float32"}
    if device.type == "cuda":
        result["gpu_mb"] = torch.cuda.max_memory_allocated() / 1e6
    return result

def time_parts(shape, batch_size, steps, options):
    """{part: milliseconds in a step of story_llm}. Each kind of work is measured on its own,
    forward and backward, with the shapes that it has in the step."""
    import story_llm
    import torch
    from torch import nn
    V, T, C, H, L, _ = shape
    N = batch_size * T
    model = common.make_model("story_llm", shape, options)
    run, training_step = common.make_run(model, batch_size)
    bf16 = story_llm.use_bf16(torch.device("cpu"), run.train_config.precision)
    dtype = torch.bfloat16 if bf16 else torch.float32       # of matrix products
    windows = torch.randint(V, (batch_size, T + 1))
    inputs, targets = windows[:, :-1].contiguous(), windows[:, 1:].contiguous()

    def milliseconds(function, *arguments):
        """Of a function, and of the gradients of those arguments that require them."""
        differentiable = [argument for argument in arguments
                          if getattr(argument, "requires_grad", False)]
        upstream = torch.ones_like(function(*arguments)) if differentiable else None
        times = []
        for _ in range(WARM_UP + max(steps, 5)):
            start = time.perf_counter()
            output = function(*arguments)
            if differentiable:
                torch.autograd.grad(output, differentiable, upstream)
            del output
            times.append(1000 * (time.perf_counter() - start))
        return statistics.median(times[WARM_UP:])

    def random_tensor(*size, dtype=dtype):
        return torch.randn(*size).to(dtype).requires_grad_()

    def matrix_product(n_inputs, n_outputs):
        return milliseconds(nn.functional.linear, random_tensor(N, n_inputs),
                            random_tensor(n_outputs, n_inputs))

    def attention(queries, keys, values, mask):
        with story_llm.mixed_precision(run):
            return story_llm.attention_weights(queries, keys, mask) @ values

    def cast_weights():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.detach().to(dtype).to(torch.float32)

    def loss_milliseconds():
        """Measured within a step, because on its own, the loss would have to get its large blocks
        of memory from the system, which is slower."""
        model.train()
        run.optimizer.zero_grad()
        ends = []
        with story_llm.mixed_precision(run):
            logits = model(inputs)
            logits.register_hook(lambda gradient: ends.append(time.perf_counter()))
            start = time.perf_counter()
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        return 1000 * (ends[0] - start)

    step = milliseconds(training_step, inputs, targets)
    parts = {"softmax of the loss":
             statistics.median(loss_milliseconds() for _ in range(WARM_UP + steps))}
    parts["clipping"] = milliseconds(nn.utils.clip_grad_norm_, list(model.parameters()), 1.0)
    parts["AdamW"] = milliseconds(run.optimizer.step, 1e-3)
    if bf16:
        parts["weights to bf16, gradients back"] = milliseconds(cast_weights)
    parts["matrix products"] = matrix_product(C, V) + L * (
        4 * matrix_product(C, C) + matrix_product(C, 4 * C) + matrix_product(4 * C, C))
    heads = [random_tensor(batch_size, H, T, C // H) for _ in range(3)]
    parts["attention, with its products"] = L * milliseconds(attention, *heads,
                                                             story_llm.causal_mask(T, T))
    parts["GELU"] = L * milliseconds(nn.functional.gelu, random_tensor(N, 4 * C))
    parts["LayerNorm"] = (2 * L + 1) * milliseconds(nn.LayerNorm(C),
                                                    random_tensor(N, C, dtype=torch.float32))
    return {**parts, "the rest": step - sum(parts.values()), "a step": step}

def print_parts(results):
    """The table of --parts: {size: {part: milliseconds}}, a column for each size."""
    print("\nMilliseconds of a training step\n")
    names = next(iter(results.values()))
    common.print_table(["", *results], [[name, *(f"{parts[name]:,.1f}" for parts in
                                                 results.values())] for name in names])

def print_size(size, results, shape, contenders):
    """The table of one size."""
    gflops = {dtype: max(result["gflops"] for result in results[name])
              for name, dtype in CEILINGS.items() if name in results}
    flops = (6 * common.matmul_weights(shape)
             + 12 * shape.n_layers * shape.emb_dim * shape.context_length)
    absent = common.find_absent(results, contenders)
    speeds = {name: common.median(results[name], "tokens")
              for name, title in contenders.items() if title not in absent}
    reference = speeds.get("reference:fp32", math.nan)
    ours = speeds.get("story_llm", math.nan)
    rows = []
    for name, speed in speeds.items():
        dtype = results[name][0]["dtype"]
        memory = "gpu_mb" if "gpu_mb" in results[name][0] else "peak_mb"
        rows.append([contenders[name], f"{speed:,.0f}",
                     common.format_range(results[name], "tokens"), f"{speed / reference:.2f}",
                     f"{ours / speed:.2f}", f"{speed * flops / gflops[dtype] / 1e9:.0%} of {dtype}",
                     f"{common.median(results[name], memory):,.0f}"])
    for dtype, rate in gflops.items():
        rows.append([f"ceiling, {dtype}: {rate:,.0f} GFLOP/s", f"{rate * 1e9 / flops:,.0f}"])
    print(f"\nTraining, {size}: {shape}, {flops / 1e6:,.1f} MFLOP per token\n")
    common.print_table(["", "tokens/s", "range of rounds", "/ reference", "story_llm / this",
                        "of the ceiling", "peak MB"], rows, absent)

def parse():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES,
                        help="what to measure (default: the first three on a CPU, the last on a "
                        "GPU)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of measurements (default: 3)")
    parser.add_argument("--steps", type=int,
                        help=f"steps to time in each round, after {WARM_UP} that are not timed")
    parser.add_argument("--dropout", type=float, help="dropout probability, for all contenders")
    parser.add_argument("--nanogpt", metavar="PATH", help="a checkout of nanoGPT")
    parser.add_argument("--parts", action="store_true", help="measure the kinds of work in a step")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--size", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.parts and options.device != "cpu":
        parser.error("--parts measures a CPU: leave out --device")
    return options

def size_settings(size, options):
    """Return (shape, batch size, steps to time) of a size, with the options applied."""
    shape, batch_size, steps = SIZES[size]
    if options.dropout is not None:
        shape = shape._replace(drop_rate=options.dropout)
    return shape, batch_size, options.steps or steps

def measure_contender(contender, options):
    """In the process of one contender: measure it and print the result."""
    if contender in CEILINGS:
        common.print_result(matmul_ceiling, CEILINGS[contender], options.device)
        return
    shape, batch_size, steps = size_settings(options.size, options)
    if contender == "parts":
        common.print_result(time_parts, shape, batch_size, max(steps, 3), options)
    else:
        common.print_result(training_speed, contender, shape, batch_size, steps, options)

def measure_sizes(sizes, options):
    """Measure all contenders at these sizes, and print a table for each size."""
    contenders = CONTENDERS if options.device == "cpu" else CONTENDERS_ON_GPU
    ceilings = list(CEILINGS)
    if options.device == "cpu" and not common.bf16_instructions():
        contenders = {name: title for name, title in contenders.items() if "bf16" not in name}
        ceilings = ["matmul:fp32"]
    for size in sizes:
        results = common.run_rounds([*contenders, *ceilings], options.rounds, ["--size", size])
        print_size(size, results, size_settings(size, options)[0], contenders)

def measure_parts(sizes, options):
    """Measure the parts of a step at these sizes, and print one table for all."""
    parts = {}
    for size in sizes:
        rounds = common.run_rounds(["parts"], options.rounds, ["--size", size])["parts"]
        parts[size] = {name: common.median(rounds, name) for name in rounds[0] if name != "peak_mb"}
    print_parts(parts)

def main():
    options = parse()
    if options.contender:
        measure_contender(options.contender, options)
        return
    sizes = options.sizes or DEFAULT_SIZES[options.device]
    print(f"{common.describe_machine(options.device)}\n{options.rounds} rounds")
    if options.parts:
        measure_parts(sizes, options)
    else:
        measure_sizes(sizes, options)

if __name__ == "__main__":
    main()
