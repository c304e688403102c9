"""More machine for one training: several processes or GPUs, parts of a batch, a compiled model.

    torchrun --standalone --nproc-per-node 2 extras/scale.py train
    python extras/scale.py train --accumulate 4 --batch-size 256 --preset gpt2-small
    python extras/scale.py train --compile

It is story_llm's own `train`, with all its options, but for the step. The windows of each batch are
dealt to the processes; each goes through its own in parts (--accumulate), which takes less memory;
and all the gradients are added up, so that every process takes the same step: the one that a single
process would take, up to rounding. So --resume may go on with other numbers of processes and parts.
"""
import argparse
import contextlib
import gc
import os
import sys
import time
from pathlib import Path

import torch
from torch import distributed, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))      # there stands story_llm.py
import story_llm
from story_llm import IGNORED, check, log

# torchrun says which process this is and how many there are, in all and on this machine.
RANK = int(os.environ.get("RANK", 0))
PROCESSES = int(os.environ.get("WORLD_SIZE", 1))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
LOCAL_PROCESSES = int(os.environ.get("LOCAL_WORLD_SIZE", 1))

def choose_device(name):
    """The torch.device of this process: the CPU, or the GPU with this process's number."""
    device = story_llm.choose_device(name)
    check(device.type != "mps" or PROCESSES == 1, "processes share CPUs or CUDA GPUs, not mps")
    if device.type != "cuda":
        return device
    n_gpus = torch.cuda.device_count()
    check(LOCAL_PROCESSES <= n_gpus, f"{LOCAL_PROCESSES} processes need as many GPUs, and this "
          f"machine has {n_gpus}: give --nproc-per-node {n_gpus}, or --device cpu")
    torch.cuda.set_device(LOCAL_RANK)       # from here on, "cuda" is this GPU
    return torch.device("cuda", LOCAL_RANK)

def join_processes(device):
    """Join the other processes, if torchrun has started this one. The backend is always named, for
    torch would choose it by what it was built for, not by what this machine has."""
    if "RANK" not in os.environ:
        return
    if device.type == "cuda":
        distributed.init_process_group("nccl", device_id=device)
    else:
        distributed.init_process_group("gloo")

def from_first(make):
    """What `make()` returns, or raises, in the first process, which alone calls it: in all."""
    answer = None
    if RANK == 0:
        try:
            answer = make()
        except (ValueError, OSError) as error:
            answer = error
    if distributed.is_initialized():
        letter = [answer]
        distributed.broadcast_object_list(letter)
        answer = letter[0]
    if isinstance(answer, Exception):
        raise answer
    return answer

def sum_of_all(number, device):
    """The sum of a number over all processes. A process that is alone need not ask its GPU for it."""
    if not distributed.is_initialized():
        return float(number)
    total = torch.as_tensor(number, dtype=torch.float64, device=device)
    distributed.all_reduce(total)
    return total.item()

def pad_head(head):
    """Let the output head calculate as many logits as a GPU's matrix units take at once, a multiple
    of 64, and give only those of real tokens: GPT-2's 50,257 is odd, which makes it much slower."""
    more = -head.out_features % 64

    def forward(x):
        weight = F.pad(head.weight, (0, 0, 0, more))        # rows of zeros, behind the others
        return F.linear(x, weight)[..., :head.out_features]

    head.forward = forward

class BatchLoss(nn.Module):
    """`batch_loss` as a module, which torch can compile and share as one."""
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, inputs, targets):
        return story_llm.batch_loss(self.model, inputs, targets)

class SharedStep:
    """What `training_step` does, by all processes together, each of them in parts."""
    def __init__(self, run, accumulate, compiled):
        n_parts = PROCESSES * accumulate
        batch_size = run.train_config.batch_size
        check(accumulate >= 1, f"accumulate must be 1 or more, not {accumulate}")
        check(n_parts <= batch_size, f"a batch of {batch_size} windows is too small for {n_parts} "
              "parts: give a larger --batch-size, or fewer parts")
        self.n_parts = n_parts
        self.accumulate = accumulate
        self.unread = None      # (loss, length of the gradient) of the step before, as tensors
        self.loss_of = BatchLoss(run.model)
        if compiled or run.model.tok_emb.weight.is_cuda:
            pad_head(run.model.out_head)
        if compiled:
            self.loss_of = torch.compile(self.loss_of)
        self.without_sharing = contextlib.nullcontext
        if distributed.is_initialized():
            self.loss_of = nn.parallel.DistributedDataParallel(self.loss_of,
                                                               gradient_as_bucket_view=True)
            self.without_sharing = self.loss_of.no_sync

    def __call__(self, run, inputs, targets):
        model, optimizer = run.model, run.optimizer
        # To ask for a loss is to wait until the GPU has done all that it was told to. So that of the
        # step before is read here: while the GPU worked on that step, this batch was prepared.
        if self.unread is not None:
            loss_before, length_before = self.unread
            run.loss = sum_of_all(loss_before, length_before.device)
            story_llm.check_finite(run.loss + length_before.item(), run)
        optimizer.zero_grad()
        exercises = (targets != IGNORED).sum().item()
        # All parts get as many windows, or a compiled model would be compiled for each number of
        # them: the batch is filled up with windows in which nothing is asked.
        more = -len(inputs) % self.n_parts
        inputs = F.pad(inputs, (0, 0, 0, more))
        targets = F.pad(targets, (0, 0, 0, more), value=IGNORED)
        own_inputs = inputs[RANK::PROCESSES].chunk(self.accumulate)
        own_targets = targets[RANK::PROCESSES].chunk(self.accumulate)
        last = self.accumulate - 1
        loss = 0.0
        with self.without_sharing():        # the gradients stay here until the last part
            for part in range(last):
                loss += self.backward(run, part, own_inputs[part], own_targets[part], exercises)
        loss += self.backward(run, last, own_inputs[last], own_targets[last], exercises)

        length = nn.utils.clip_grad_norm_(model.parameters(), run.train_config.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = story_llm.learning_rate(run.step, run.total_steps, run.train_config)
        optimizer.step()
        self.unread = loss, length
        run.step += 1

    def backward(self, run, part, inputs, targets, exercises):
        """Add a part's gradients to those that are there, and return its share of the loss. That is
        the mean over all exercises of the batch, in whatever part and process they are."""
        share = (targets != IGNORED).sum().item() / exercises
        if share == 0:      # a mean over nothing is no number; any other will do, 0 times
            targets = targets.clamp(min=0)
        with story_llm.precision_of(run, RANK, part):
            loss = share * self.loss_of(inputs, targets)
        # DistributedDataParallel divides the sum of the gradients by the number of processes.
        (PROCESSES * loss).backward()
        return loss.detach()        # as a tensor: to ask for the number is to wait for the GPU

class SharedProgress(story_llm.Progress):
    """Only the first process prints and saves, and if any is asked to stop, all stop after the same
    step. So asking (a signal sets `stop`, at any moment) is one thing, and what all have agreed on
    (`stop`, when it is read) another."""
    asked = agreed = False

    @property
    def stop(self):
        return self.agreed

    @stop.setter
    def stop(self, asked):
        self.asked = asked

    def __call__(self, run):
        self.agreed = sum_of_all(self.asked, run.model.tok_emb.weight.device) > 0
        print_and_save = super().__call__
        return from_first(lambda: print_and_save(run))

def train(args, accumulate, compiled):
    device = choose_device(args.device)
    join_processes(device)
    args.device = "cpu"
    run, corpus = from_first(lambda: story_llm.to_train(args))
    run.model.to(device)
    take_step = SharedStep(run, accumulate, compiled)
    weights = story_llm.count_parameters(run.model)
    if RANK == 0:
        log(f"{weights:,} parameters; {run.total_steps} steps; processes: {PROCESSES}; parts of a "
            f"batch in each: {accumulate}")
    with SharedProgress(args.model) as progress:
        story_llm.train(run, corpus, progress, take_step)
    if run.step < run.total_steps:
        if RANK == 0:
            story_llm.note(f"stopped after step {run.step} of {run.total_steps}, saved "
                           f"{args.model}; to go on: the same command with --resume")
        raise KeyboardInterrupt
    if RANK == 0:
        story_llm.log_recall(run, corpus.train_text)
        log(f"saved {args.model}")
        story_llm.draw(story_llm.plot_losses, run.history, run.config.vocab_size, args.plot)

def main(argv=None):
    """Run the program; returns the exit status: 0, 1 after a mistake, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="scale.py", description=__doc__.splitlines()[0],
                                     epilog="and all options of: python story_llm.py train",
                                     allow_abbrev=False)
    parser.add_argument("command", choices=("train",))
    parser.add_argument("--accumulate", type=int, default=1, metavar="N",
                        help="parts in which each process calculates its share of a batch (1)")
    parser.add_argument("--compile", action="store_true",
                        help="compile the model: a slow start, and faster steps on a GPU")
    own, others = parser.parse_known_args(argv)
    story_llm.forgiving_streams()
    try:
        train(story_llm.parse(["train", *others]), own.accumulate, own.compile)
    except KeyboardInterrupt:
        return 130
    except torch.OutOfMemoryError:
        story_llm.note("error: the GPU has too little memory: try --accumulate 4, or more of it")
        return 1
    except (ValueError, OSError) as error:
        if RANK == 0:
            story_llm.note(f"error: {error}")
        else:       # torchrun ends all once one ends: give the first the time to tell it
            time.sleep(5)
        return 1
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = str(error).splitlines()[0]
        story_llm.note(f"error: the model cannot be compiled here ({reason}): install what is "
                       "missing, for example a C++ compiler, or leave out --compile")
        return 1
    finally:
        gc.collect()        # DistributedDataParallel holds itself, and so the group
        if distributed.is_initialized():
            distributed.destroy_process_group()
    return 0

if __name__ == "__main__":
    story_llm.keep_memory()
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)        # Python's own end sometimes meets a thread of torch's that still runs
