"""Train with more hardware: several processes or GPUs, gradient accumulation, a compiled model.

    torchrun --standalone --nproc-per-node 2 extras/scale.py train
    python extras/scale.py train --accumulate 4 --batch-size 256 --preset gpt2-small
    python extras/scale.py train --compile

`train` has all options of `python story_llm.py train`, and up to rounding its steps are the same.
But each batch is divided among the processes (data parallelism), and each process works through its
share in several micro-batches (gradient accumulation), which takes less memory. The gradients are
added up, so that all processes make the same step. Therefore --resume may continue a training with
other numbers of processes and micro-batches.

This is also an example of how an extra replaces the training step. story_llm.train is a short loop
over story_llm.training_batches. The function `train` in this file is the same loop with another
step in it, and everything else is imported.
"""
import argparse
import contextlib
import os
import sys
import time
from pathlib import Path

import torch
from torch import distributed, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))      # the folder of story_llm.py
import story_llm
from story_llm import IGNORE_INDEX, StoryError, check, log

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

class ParallelStep:
    """story_llm.training_step, divided among processes and micro-batches."""
    def __init__(self, run, accumulate, compiled):
        batch_size = run.train_config.batch_size
        self.accumulate = accumulate
        self.n_micro_batches = PROCESSES * accumulate
        check(accumulate >= 1, f"--accumulate must be at least 1, not {accumulate}")
        check(self.n_micro_batches <= batch_size, f"a batch of {batch_size} windows cannot be "
              f"divided into {self.n_micro_batches} micro-batches: use a larger --batch-size or a "
              "smaller --accumulate")
        self.unread = None      # (loss, gradient norm) of the last step, as tensors on the device
        self.batch_loss = BatchLoss(run.model)
        if compiled or run.model.tok_emb.weight.is_cuda:
            pad_head(run.model.out_head)
        if compiled:
            self.batch_loss = torch.compile(self.batch_loss)
        self.no_sync = contextlib.nullcontext
        if distributed.is_initialized():
            self.batch_loss = nn.parallel.DistributedDataParallel(self.batch_loss,
                                                                  gradient_as_bucket_view=True)
            self.no_sync = self.batch_loss.no_sync

    def __call__(self, run, inputs, targets):
        """Learn from one batch of token ids, (B, T) each; every process gets the whole batch."""
        self.read_loss(run)
        n_examples = (targets != IGNORE_INDEX).sum().item()
        # All micro-batches get the same number of windows, because a compiled model is compiled
        # anew for every shape. So the batch is padded with windows without targets.
        n_padding = -len(inputs) % self.n_micro_batches
        inputs = F.pad(inputs, (0, 0, 0, n_padding))
        targets = F.pad(targets, (0, 0, 0, n_padding), value=IGNORE_INDEX)
        own_inputs = inputs[RANK::PROCESSES].chunk(self.accumulate)
        own_targets = targets[RANK::PROCESSES].chunk(self.accumulate)
        last = self.accumulate - 1

        run.model.train()
        run.optimizer.zero_grad()
        loss = 0.0
        with self.no_sync():        # the processes add up their gradients once, at the end
            for i in range(last):
                loss += self.backward(run, i, own_inputs[i], own_targets[i], n_examples)
        loss += self.backward(run, last, own_inputs[last], own_targets[last], n_examples)

        norm = nn.utils.clip_grad_norm_(run.model.parameters(), run.train_config.grad_clip)
        for group in run.optimizer.param_groups:
            group["lr"] = story_llm.learning_rate(run.step, run.total_steps, run.train_config)
        run.optimizer.step()
        run.model.eval()
        self.unread = loss, norm

    def backward(self, run, i, inputs, targets, n_examples):
        """Add the gradients of micro-batch number i to those before it, and return its loss: its
        part of the mean over all training examples of the batch, in all processes."""
        share = (targets != IGNORE_INDEX).sum().item() / n_examples
        if share == 0:      # a mean over no examples is NaN; with any other targets, 0 * loss is 0
            targets = targets.clamp(min=0)
        with story_llm.mixed_precision(run), story_llm.dropout_seed(run, RANK, i):
            loss = share * self.batch_loss(inputs, targets)
        # DistributedDataParallel averages the gradients over the processes, and we want their sum.
        (PROCESSES * loss).backward()
        return loss.detach()

    def read_loss(self, run):
        """Set `run.loss` to the loss of the step before. Reading a number from a GPU means waiting
        until it has done all its work. So this is done only now, when the next batch has already
        been prepared while the GPU was working."""
        if self.unread is not None:
            loss, norm = self.unread
            run.loss = sum_over_processes(loss, norm.device)
            story_llm.check_finite(run, run.loss + norm.item())

def train(run, corpus, step):
    """Train a run to its last step: story_llm.train, but with step(run, inputs, targets) in place
    of its training step. A generator, which yields after every step."""
    story_llm.start_optimizer(run)
    if run.step == 0:
        run.history = []
        story_llm.record_evaluation(run, corpus)
    for inputs, targets in story_llm.training_batches(run, corpus):
        step(run, inputs, targets)
        run.step += 1
        if story_llm.evaluation_due(run):
            story_llm.record_evaluation(run, corpus)
        yield run

# ─── The command line ──────────────────────────────────────────────────────────────────────────
def command_train(args, accumulate, compiled):
    device = choose_device(args.device)
    connect_processes(device)
    if compiled:
        check_compiler(device)
    args.device = "cpu"         # on which the first process makes the run for all
    run, corpus = from_first(lambda: story_llm.run_to_train(args))
    run.model.to(device)
    step = ParallelStep(run, accumulate, compiled)
    if RANK == 0:
        log(f"{story_llm.count_parameters(run.model):,} parameters; {run.total_steps} steps; "
            f"processes: {PROCESSES}; micro-batches of each per step: {accumulate}")
    first_step, stop = run.step, False
    progress = story_llm.Progress(run, args.model, args.resume)
    with story_llm.collect_signals() as received:
        for _ in train(run, corpus, step):
            # A signal that reaches any process stops all of them after the same step.
            stop = sum_over_processes(len(received), device) > 0
            is_last = stop or run.step >= run.total_steps
            from_first(lambda: progress.update(run, is_last))
            if stop:
                break
    if RANK == 0:
        story_llm.finish_training(args, run, corpus, first_step)
    elif run.step < run.total_steps:
        raise KeyboardInterrupt

def run_command(argv):
    parser = argparse.ArgumentParser(
        prog="scale.py", description=(__doc__ or "").partition("\n")[0], allow_abbrev=False,
        epilog="All options of `python story_llm.py train` can be given as well.")
    parser.add_argument("command", choices=("train",))
    parser.add_argument("--accumulate", type=int, default=1, metavar="N",
                        help="micro-batches of each process per step (default: 1)")
    parser.add_argument("--compile", action="store_true",
                        help="compile the model: a slow start, then faster steps on a GPU")
    own, others = parser.parse_known_args(argv)
    try:
        command_train(story_llm.parse(["train", *others]), own.accumulate, own.compile)
    except torch.OutOfMemoryError:
        raise StoryError("the GPU does not have enough memory: use a larger --accumulate, or a "
                         "smaller model") from None
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
    story_llm.keep_memory()
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)        # Python's own exit can crash when a thread of torch is still running
