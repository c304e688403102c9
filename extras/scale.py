"""Train with more hardware: several processes or GPUs, gradient accumulation, a compiled model.

    torchrun --standalone --nproc-per-node 2 extras/scale.py train
    python extras/scale.py train --accumulate 4 --batch-size 256 --preset gpt2-small
    python extras/scale.py train --compile

`train` has all options of `python story_llm.py train`, and up to rounding its steps are the same.
But each batch is divided among the processes (data parallelism), and each process works through its
share in several micro-batches (gradient accumulation), which takes less memory. The gradients are
added up, so that all processes make the same step. Therefore --resume may continue a run with other
numbers of processes and micro-batches.

This is also an example of how an extra changes the training loop: `training_steps` is that of
story_llm with another backward pass in it, and everything else is imported.
"""
import contextlib
import math
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))      # the folder of story_llm.py
import story_llm        # before torch, whose threads it tells to sleep when they wait
from story_llm import IGNORE_INDEX, StoryError, check, log
import torch
from torch import distributed, nn
from torch.nn import functional as F

# torchrun tells each process its number and how many there are, in total and on this machine.
RANK = int(os.environ.get("RANK", 0))
PROCESSES = int(os.environ.get("WORLD_SIZE", 1))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
LOCAL_PROCESSES = int(os.environ.get("LOCAL_WORLD_SIZE", 1))

# ─── Several processes ─────────────────────────────────────────────────────────────────────────
def choose_device(name):
    """Return the torch.device of this process: the CPU, or the GPU with the process's number."""
    device = story_llm.choose_device(name)
    check(device.type != "mps" or PROCESSES == 1, "several processes cannot share an mps device: "
          "use --device cpu")
    if device.type != "cuda":
        return device
    n_gpus = torch.cuda.device_count()
    check(LOCAL_PROCESSES <= n_gpus, f"{LOCAL_PROCESSES} processes need as many GPUs, but this "
          f"machine has {n_gpus}: use --nproc-per-node {n_gpus}, or --device cpu")
    torch.cuda.set_device(LOCAL_RANK)       # from here on, "cuda" means this GPU
    return torch.device("cuda", LOCAL_RANK)

def connect_processes(device):
    """Connect this process to the others, if torchrun has started it. The backend is named, because
    torch would choose one by how it was built and not by what this machine has."""
    if "RANK" not in os.environ:
        return
    if device.type == "cuda":
        distributed.init_process_group("nccl", device_id=device)
    else:
        distributed.init_process_group("gloo")

def from_first(make):
    """Call make() in the first process alone, and return its result in all processes. If it raises
    StoryError, all processes raise it. (After any other exception, torchrun ends them.)"""
    result = None
    if RANK == 0:
        try:
            result = make()
        except StoryError as error:
            result = error
    if distributed.is_initialized():
        message = [result]
        distributed.broadcast_object_list(message)
        result = message[0]
    if isinstance(result, StoryError):
        raise result
    return result

def sum_over_processes(number, device):
    if not distributed.is_initialized():
        return float(number)
    total = torch.as_tensor(number, dtype=torch.float64, device=device)
    distributed.all_reduce(total)
    return total.item()

# ─── The training step ─────────────────────────────────────────────────────────────────────────
class BatchLoss(nn.Module):
    """story_llm.batch_loss as a module, because DistributedDataParallel wraps modules."""
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, inputs, targets):
        return story_llm.batch_loss(self.model, inputs, targets)

def pad_head(head):
    """Make the output head compute a multiple of 64 logits, as the matrix units of a GPU need it to
    be fast, and return only those of real tokens. GPT-2's vocabulary size, 50,257, is odd."""
    n_padding = -head.out_features % 64

    def forward(x):
        weight = F.pad(head.weight, (0, 0, 0, n_padding))       # rows of zeros at the end
        return F.linear(x, weight)[..., :head.out_features]

    head.forward = forward

def check_compiler(device):
    """Compile a small function. Raises StoryError if that fails, because then the machine lacks a
    compiler. If only the model cannot be compiled, that is a bug, and its traceback is shown."""
    try:
        torch.compile(lambda x: x + 1)(torch.ones(2, device=device))
    except Exception as error:      # whatever the compilers raise
        reason = str(error).splitlines()[0]
        raise StoryError(f"this machine cannot compile a model ({reason}): install what is "
                         "missing, for example a C++ compiler, or leave out --compile") from None

def parallel_loss(run, accumulate, compiled):
    """Return `story_llm.batch_loss` of the model of a run, (inputs, targets) -> loss, as a module
    whose gradients are averaged over all processes."""
    batch_size = run.train_config.batch_size
    n_micro_batches = PROCESSES * accumulate
    check(accumulate >= 1, f"--accumulate must be at least 1, not {accumulate}")
    check(n_micro_batches <= batch_size, f"a batch of {batch_size} windows cannot be divided into "
          f"{n_micro_batches} micro-batches: use a larger --batch-size or a smaller --accumulate")
    batch_loss = BatchLoss(run.model)
    if compiled or story_llm.device_of(run.model).type == "cuda":
        pad_head(run.model.out_head)
    if compiled:
        batch_loss = torch.compile(batch_loss)
    if distributed.is_initialized():
        batch_loss = nn.parallel.DistributedDataParallel(batch_loss, gradient_as_bucket_view=True)
    return batch_loss

def own_micro_batches(inputs, targets, accumulate):
    """Divide a batch (B, T) among all processes, and the share of this one into micro-batches. All
    of them get the same number of windows, because a compiled model is compiled anew for every
    shape. So the batch is padded with windows without targets."""
    n_padding = -len(inputs) % (PROCESSES * accumulate)
    inputs = F.pad(inputs, (0, 0, 0, n_padding))
    targets = F.pad(targets, (0, 0, 0, n_padding), value=IGNORE_INDEX)
    return list(zip(inputs[RANK::PROCESSES].chunk(accumulate),
                    targets[RANK::PROCESSES].chunk(accumulate)))

def count_targets(targets):
    return (targets != IGNORE_INDEX).sum().item()

def add_gradients(run, batch_loss, inputs, targets, accumulate):
    """Compute the gradients of a batch, of which every process gets the whole. Return the loss of
    the share of this process: its part of the mean over all targets of the batch."""
    n_targets = count_targets(targets)
    *others, last = own_micro_batches(inputs, targets, accumulate)
    loss = 0.0
    # The processes exchange their gradients once, with those of the last micro-batch.
    with batch_loss.no_sync() if distributed.is_initialized() else contextlib.nullcontext():
        for inputs, targets in others:
            loss += backward(run, batch_loss, inputs, targets, n_targets)
    return loss + backward(run, batch_loss, *last, n_targets)

def backward(run, batch_loss, inputs, targets, n_targets):
    """Add the gradients of a micro-batch to those before it, and return its part of the loss."""
    share = count_targets(targets) / n_targets
    if share == 0:      # a mean over no targets is NaN; with any other targets, 0 * loss is 0
        targets = targets.clamp(min=0)
    with story_llm.mixed_precision(run):
        loss = share * batch_loss(inputs, targets)
    # DistributedDataParallel averages the gradients over the processes, and we want their sum.
    (PROCESSES * loss).backward()
    return loss.detach()

def own_dropout(run):
    """Return a context with random numbers that are different in every process and step."""
    seed = hash((run.train_config.seed, run.step, RANK))
    return story_llm.seeded_rng(seed, story_llm.device_of(run.model))

def training_steps(run, corpus, batch_loss, accumulate):
    """story_llm.training_steps, with a backward pass that is divided among processes and
    micro-batches."""
    story_llm.start_training(run, corpus)
    config = run.train_config
    for inputs, targets in story_llm.training_batches(run, corpus):
        with story_llm.training_mode(run), own_dropout(run):
            run.optimizer.zero_grad()
            loss = add_gradients(run, batch_loss, inputs, targets, accumulate)
            nn.utils.clip_grad_norm_(run.model.parameters(), config.grad_clip)
            run.optimizer.step(story_llm.learning_rate(run.step, run.total_steps, config))
        run.step += 1
        run.loss = sum_over_processes(loss, inputs.device)
        check(math.isfinite(run.loss), f"the loss became {run.loss} at step {run.step}, so "
              "training stops; the last checkpoint is kept. Try a smaller --learning-rate, or "
              "--precision fp32")
        if story_llm.evaluation_due(run):
            story_llm.record_evaluation(run, corpus)
        yield run

# ─── The command line ──────────────────────────────────────────────────────────────────────────
def make_run(args):
    """Return (a new or resumed run, its corpus), after the checks of story_llm.command_train."""
    story_llm.check_writable(args.model)
    story_llm.check_writable(args.plot, story_llm.PICTURES)
    story_llm.check_different(args.model, args.plot, *args.text)
    story_llm.check_different(args.plot, *args.text)
    if not args.resume:
        return story_llm.new_run_from_args(args)
    run, corpus = story_llm.run_to_resume(args)
    check(run.step < run.total_steps, f"{args.model} has already been trained for {run.step} "
          "steps: set a larger --epochs or --max-steps")
    return run, corpus

def command_train(args, accumulate, compiled):
    device = choose_device(args.device)
    connect_processes(device)
    if compiled:
        check_compiler(device)
    args.device = "cpu"         # on which the first process makes the run for all
    run, corpus = from_first(lambda: make_run(args))
    run.model.to(device)
    batch_loss = parallel_loss(run, accumulate, compiled)
    if RANK == 0:
        log(f"{story_llm.count_parameters(run.model):,} parameters; {run.total_steps} steps; "
            f"processes: {PROCESSES}; micro-batches of each per step: {accumulate}")
    progress = story_llm.Progress(run, args.model)
    with story_llm.stop_requests() as requests:
        for _ in training_steps(run, corpus, batch_loss, accumulate):
            from_first(lambda: progress.update(run))
            # A signal that reaches any process stops all of them after the same step.
            if sum_over_processes(len(requests), device) > 0:
                break
        from_first(lambda: progress.save(run))
    return from_first(lambda: story_llm.finish_training(args, run, corpus))

def run_command(argv):
    parser = story_llm.Parser(
        prog="extras/scale.py", description=(__doc__ or "").partition("\n")[0], allow_abbrev=False,
        epilog="All options of `python story_llm.py train` can be given as well.")
    parser.add_argument("command", choices=("train",))
    parser.add_argument("--accumulate", type=int, default=1, metavar="N",
                        help="micro-batches of each process per step (default: 1)")
    parser.add_argument("--compile", action="store_true",
                        help="compile the model: a slow start, then faster steps on a GPU")
    own, others = parser.parse_known_args(argv)
    try:
        args = story_llm.parse(["train", *others])
        return command_train(args, own.accumulate, own.compile)
    except StoryError:
        if LOCAL_RANK == 0:         # one process of each machine reports the mistake
            raise
        time.sleep(5)       # let it report first: torchrun ends all processes once one has ended
        return 1
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()

def main(argv=None):
    """Run the program with the words of a command line; return the exit status."""
    return story_llm.exit_status(run_command, sys.argv[1:] if argv is None else argv)

if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")      # as story_llm.py does when it runs
    story_llm.keep_freed_memory()
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)        # Python's own exit can crash when a thread of torch is still running
