"""extras/scale.py: with several processes, micro-batches or a compiled model, the training steps are the same."""
import contextlib
import copy
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import ROOT, TEXT, bare_environment, closed_port, story_llm, tiny, train_to
from torch import distributed

sys.path.insert(0, str(ROOT / "extras"))
import scale  # noqa: E402

PROGRAM = str(ROOT / "extras" / "scale.py")
SMALL = ["train", "--text", "story.txt", "--tokenizer", "word", "--emb-dim", "32", "--n-layers", "1",
         "--context-length", "12", "--batch-size", "9", "--eval-every", "5", "--precision", "fp32",
         "--learning-rate", "0.01", "--val-fraction", "0.3", "--model"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with a story, for programs without a network."""
    (tmp_path / "story.txt").write_text(TEXT, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for name, value in bare_environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    return tmp_path


@pytest.fixture
def start():
    """start(arguments...) starts scale.py with two processes. None of them outlives the test."""
    started = []

    def start(*arguments):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        process = subprocess.Popen([*torchrun, PROGRAM, *arguments], text=True, start_new_session=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        started.append(process)
        return process

    yield start
    for process in started:
        process.terminate()         # torchrun then ends its own processes
        process.communicate(timeout=60)


def workers_after_the_first_save(process, path):
    """Wait for a checkpoint, and return the ids of the two processes that torchrun has started."""
    start_time = time.monotonic()
    while not Path(path).exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < start_time + 120, "no checkpoint after two minutes"
        time.sleep(0.05)
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    assert len(found) == 2
    return [int(process_id) for process_id in found]


def assert_same_training(path, other_path):
    run, other = story_llm.load_checkpoint(path), story_llm.load_checkpoint(other_path)
    assert run.step == other.step == run.total_steps
    for name in ("step", "epoch", "train_loss", "val_loss", "recall"):
        expected = [getattr(evaluation, name) for evaluation in run.history]
        assert [getattr(evaluation, name) for evaluation in other.history] == pytest.approx(expected, rel=1e-3)
    for a, b in zip(run.model.parameters(), other.model.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert run.history[-1].train_loss < 0.8 * run.history[0].train_loss


# Whole trainings

def test_two_processes_make_the_steps_of_one_and_stop_together_and_resume(folder, start, capsys):
    """A signal reaches only one of them, and yet both stop. Then both resume, now with micro-batches."""
    first = start(*SMALL, "two.pt", "--max-steps", "80")
    os.kill(workers_after_the_first_save(first, "two.pt")[1], signal.SIGTERM)
    output, errors = first.communicate(timeout=60)
    step = story_llm.load_checkpoint("two.pt").step
    assert f"stopped after step {step} of 80 and saved two.pt" in errors
    assert "[rank" not in errors            # with which torch begins the traceback of a process

    second = start("train", "--resume", "--model", "two.pt", "--accumulate", "2")
    resumed_output, errors = second.communicate(timeout=60)
    assert second.returncode == 0, errors
    assert story_llm.main([*SMALL, "one.pt", "--max-steps", "80"]) == 0
    assert_same_training("one.pt", "two.pt")
    printed = [re.findall(r"\(Step (\d+)\)", text) for text in (output, resumed_output, capsys.readouterr().out)]
    assert all(len(steps) == len(set(steps)) for steps in printed)      # only one process has printed
    assert set(printed[0]) | set(printed[1]) == set(printed[2]) and Path("two_loss.png").exists()


@pytest.mark.usefixtures("handlers_are_restored")
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_both_optimizers_make_the_same_steps_in_micro_batches_and_can_be_resumed(folder, monkeypatch, optimizer):
    options = ["--optimizer", optimizer, "--max-steps", "24"]
    assert story_llm.main([*SMALL, "plain.pt", *options]) == 0
    learning_rate = story_llm.learning_rate

    def signal_in_the_fourth_step(step, *rest):
        if step == 3:
            signal.raise_signal(signal.SIGINT)
        return learning_rate(step, *rest)

    with monkeypatch.context() as interrupted:
        interrupted.setattr(story_llm, "learning_rate", signal_in_the_fourth_step)
        assert scale.main([*SMALL, "scale.pt", *options, "--accumulate", "2"]) == 130
    assert story_llm.load_checkpoint("scale.pt").step == 4
    assert scale.main(["train", "--resume", "--model", "scale.pt", "--accumulate", "3"]) == 0
    assert_same_training("plain.pt", "scale.pt")


# Mistakes

@pytest.mark.parametrize("wrong, words", [
    (["--emb-dim", "33"], "n_heads"), (["--accumulate", "0"], "at least 1"),
    (["--accumulate", "10"], "10 micro-batches"), (["--vocab-size", "300"], "--tokenizer story"),
    (["--resume"], "--resume"), (["--plot", "x.txt"], ".png"), (["--text", "none.pt"], "two things")])
def test_the_mistakes_of_a_single_process_are_reported_in_one_line(folder, capsys, wrong, words):
    assert scale.main([*SMALL, "none.pt", *wrong]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error and error.count("\n") == 1
    assert not Path("none.pt").exists()


def test_a_finished_training_is_not_resumed_without_more_steps(folder, capsys):
    assert scale.main([*SMALL, "done.pt", "--max-steps", "1"]) == 0
    capsys.readouterr()
    assert scale.main(["train", "--resume", "--model", "done.pt"]) == 1
    assert "larger --epochs" in capsys.readouterr().err


def test_a_second_process_reports_no_mistake_and_ends_later(folder, monkeypatch, capsys):
    """Its mistake is the first one's, and torchrun ends all processes as soon as one ends."""
    slept = []
    monkeypatch.setattr(scale, "LOCAL_RANK", 1)
    monkeypatch.setattr(time, "sleep", slept.append)
    assert scale.main([*SMALL, "none.pt", "--accumulate", "0"]) == 1
    assert capsys.readouterr().err == "" and slept == [5]


@pytest.mark.parametrize("arguments", [[], ["generate"], ["train", "--no-such-option"], ["train", "--acc", "2"]])
def test_wrong_usage_is_refused(arguments, capsys):
    assert scale.main(arguments) == 2


# The training step

@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_losses_of_the_processes_add_up_and_so_do_their_gradients(accumulate, monkeypatch):
    run, corpus = tiny(batch_size=9)
    inputs, targets = next(story_llm.training_batches(run, corpus))
    expected_loss = story_llm.batch_loss(run.model, inputs, targets)
    expected_loss.backward()
    expected = [parameter.grad for parameter in run.model.parameters()]
    monkeypatch.setattr(scale, "PROCESSES", 3)
    losses, gradients = [], []
    for rank in range(3):
        monkeypatch.setattr(scale, "RANK", rank)
        run.model.zero_grad()
        batch_loss = scale.parallel_loss(run, accumulate, compiled=False)
        losses.append(scale.add_gradients(run, batch_loss, inputs, targets, accumulate).item())
        gradients.append([parameter.grad for parameter in run.model.parameters()])
    assert sum(losses) == pytest.approx(expected_loss.item(), rel=1e-5) and min(losses) > 0
    for of_processes, of_batch in zip(zip(*gradients), expected):
        torch.testing.assert_close(sum(of_processes) / 3, of_batch, rtol=1e-4, atol=1e-6)       # DDP divides by 3


def take_steps(run, corpus, accumulate):
    """Train with scale.py; return the losses of the steps."""
    batch_loss = scale.parallel_loss(run, accumulate, compiled=False)
    return [run.loss for _ in scale.training_steps(run, corpus, batch_loss, accumulate)]


@pytest.mark.parametrize("accumulate", [1, 2, 4, 9])
def test_a_step_in_micro_batches_is_the_step_of_the_lesson(accumulate, monkeypatch):
    """Even if one micro-batch has fewer targets than the others, or none."""
    training_batches = story_llm.training_batches

    def batches_with_few_targets(run, corpus):
        for inputs, targets in training_batches(run, corpus):
            targets[run.step] = story_llm.IGNORE_INDEX
            targets[-1, 3:] = story_llm.IGNORE_INDEX
            yield inputs, targets

    monkeypatch.setattr(story_llm, "training_batches", batches_with_few_targets)
    run, corpus = tiny(batch_size=9, max_steps=5, learning_rate=0.01)
    twin = copy.deepcopy(run)
    expected = [twin.loss for _ in story_llm.training_steps(twin, corpus)]
    assert take_steps(run, corpus, accumulate) == pytest.approx(expected, rel=1e-4)
    assert expected[-1] < 0.95 * expected[0]
    for a, b in zip(run.model.parameters(), twin.model.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_every_process_and_step_has_its_own_dropout_that_can_be_repeated(monkeypatch):
    run, _ = tiny()
    state_before = torch.get_rng_state()

    def draw(rank, step):
        monkeypatch.setattr(scale, "RANK", rank)
        run.step = step
        with scale.own_dropout(run):
            return torch.rand(()).item()

    numbers = [draw(rank, step) for rank in (0, 1) for step in (0, 1)]
    assert len(set(numbers)) == 4 and draw(0, 0) == numbers[0]
    assert torch.equal(torch.get_rng_state(), state_before)


@pytest.mark.parametrize("precision, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_a_step_has_dropout_and_the_precision_of_the_run(precision, dtype):
    run, corpus = tiny(precision=precision, drop_rate=0.5, max_steps=1)
    seen = []
    run.model.register_forward_hook(
        lambda model, inputs, output: seen.append(output.dtype) if model.training else None)
    take_steps(run, corpus, 2)
    assert seen == [dtype, dtype] and not run.model.training
    assert all(parameter.dtype == torch.float32 for parameter in run.model.parameters())


def test_only_the_last_micro_batch_shares_its_gradients(monkeypatch):
    run, corpus = tiny()
    inputs, targets = next(story_llm.training_batches(run, corpus))
    alone, seen = [], []

    class Wrapped(scale.BatchLoss):
        @contextlib.contextmanager
        def no_sync(self):
            alone.append(True)
            yield
            alone.pop()

        def forward(self, inputs, targets):
            seen.append(bool(alone))
            return super().forward(inputs, targets)

    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    scale.add_gradients(run, Wrapped(run.model), inputs, targets, 3)
    assert seen == [True, True, False]


def test_a_loss_that_becomes_nan_or_infinite_stops_the_training():
    run, corpus = tiny()
    train_to(run, corpus, 1)
    run.model.out_head.weight.data[0] = torch.inf
    with pytest.raises(story_llm.StoryError, match="at step 2, .*learning-rate"):
        take_steps(run, corpus, 2)


# Compiled models

@pytest.mark.parametrize("options", [[], ["--accumulate", "2"]])
def test_a_compiled_model_makes_the_same_steps_and_is_saved_under_the_same_names(folder, monkeypatch, options):
    """The backend does not generate machine code, because that takes a C++ compiler half a minute."""
    from torch._dynamo.testing import CompileCounterWithBackend
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", torch._dynamo.optimize(counter))
    monkeypatch.setattr(scale, "check_compiler", lambda device: None)
    torch._dynamo.reset()
    for name, more in (("plain.pt", []), ("compiled.pt", ["--compile"])):
        assert scale.main([*SMALL, name, "--max-steps", "6", "--learning-rate", "0.03", *options, *more]) == 0
    assert counter.frame_count == 1         # one graph that contains the loss, for all micro-batches and steps
    run = story_llm.load_checkpoint("compiled.pt")
    assert run.config.vocab_size % 64 and run.model.out_head.weight.shape == (run.config.vocab_size, 32)
    assert_same_training("plain.pt", "compiled.pt")


@pytest.mark.parametrize("vocab_size", [1, 40, 64, 65])
def test_a_padded_head_returns_the_same_logits_and_computes_a_multiple_of_64(vocab_size, monkeypatch):
    head, x = torch.nn.Linear(8, vocab_size, bias=False), torch.randn(3, 5, 8)
    twin, rows = copy.deepcopy(head), []
    linear = torch.nn.functional.linear
    scale.pad_head(head)
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, weight: rows.append(len(weight)) or linear(x, weight))
    padded = head(x)
    monkeypatch.undo()
    torch.testing.assert_close(padded, twin(x))
    padded.square().sum().backward()
    twin(x).square().sum().backward()
    torch.testing.assert_close(head.weight.grad, twin.weight.grad)
    assert rows == [-(-vocab_size // 64) * 64] and dict(head.named_parameters()).keys() == {"weight"}


def test_without_a_compiler_one_line_names_what_is_missing(folder, monkeypatch, capsys):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder / "cache"))
    with torch._inductor.config.patch("cpp.cxx", (None, "/nowhere/g++")):      # by default, the value of CXX
        assert scale.main([*SMALL, "none.pt", "--max-steps", "2", "--compile"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: this machine cannot compile a model") and "/nowhere/g++" in error
    assert error.count("\n") == 1 and not Path("none.pt").exists()


# Processes

@pytest.fixture
def one_process(monkeypatch):
    """The environment of a process that torchrun has started alone."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(closed_port()))
    yield
    if distributed.is_initialized():
        distributed.destroy_process_group()


def test_processes_connect_whatever_torch_was_built_for(one_process, monkeypatch):
    """The usual torch is built for CUDA, and without a GPU its own choice of a backend fails."""
    with monkeypatch.context() as built_for_another:
        built_for_another.setattr(torch._C, "_get_accelerator", lambda *_: torch.device("mps"))
        scale.connect_processes(torch.device("cpu"))
    assert distributed.get_backend() == "gloo"
    assert scale.sum_over_processes(2.5, "cpu") == 2.5 and scale.from_first(lambda: [TEXT]) == [TEXT]


def test_a_mistake_of_the_first_process_is_raised_in_all_of_them(one_process, monkeypatch):
    scale.connect_processes(torch.device("cpu"))
    messages = []
    monkeypatch.setattr(distributed, "broadcast_object_list", messages.append)
    with pytest.raises(story_llm.StoryError, match="no text"):
        scale.from_first(lambda: story_llm.check(False, "no text"))
    assert str(messages[0][0]) == "no text"
    monkeypatch.setattr(scale, "RANK", 1)
    received = story_llm.StoryError("no disk")
    monkeypatch.setattr(distributed, "broadcast_object_list", lambda message: message.__setitem__(0, received))
    with pytest.raises(story_llm.StoryError, match="no disk"):
        scale.from_first(lambda: pytest.fail("called by another process than the first"))


@pytest.fixture
def two_gpus(monkeypatch):
    """A machine that seems to have two GPUs. Returns the list of what is done with them."""
    done = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(scale, "LOCAL_RANK", 1)
    monkeypatch.setattr(story_llm, "choose_device", lambda name: torch.device(name.replace("auto", "cuda")))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", done.append)
    monkeypatch.setattr(distributed, "init_process_group", lambda *names, **options: done.append((names, options)))
    return done


def test_each_process_uses_its_own_gpu(two_gpus, monkeypatch):
    monkeypatch.setattr(scale, "LOCAL_PROCESSES", 2)
    device = scale.choose_device("auto")
    scale.connect_processes(device)
    assert device == torch.device("cuda", 1)
    assert two_gpus == [1, (("nccl",), {"device_id": device})]


def test_more_processes_than_gpus_are_refused_but_may_share_the_cpu(two_gpus, monkeypatch, capsys, folder):
    monkeypatch.setattr(scale, "LOCAL_PROCESSES", 3)
    monkeypatch.setattr(scale, "LOCAL_RANK", 0)
    assert scale.main([*SMALL, "none.pt"]) == 1
    assert capsys.readouterr().err.startswith("error: 3 processes need as many GPUs, but this machine has 2")
    assert scale.choose_device("cpu") == torch.device("cpu") and two_gpus == []


def test_several_processes_cannot_share_an_mps_device(monkeypatch):
    monkeypatch.setattr(story_llm, "choose_device", torch.device)
    assert scale.choose_device("mps") == torch.device("mps")
    monkeypatch.setattr(scale, "PROCESSES", 2)
    with pytest.raises(story_llm.StoryError, match="mps"):
        scale.choose_device("mps")


def test_a_signal_that_reaches_another_process_stops_this_one_after_the_same_step(folder, monkeypatch, capsys):
    """What counts is the sum of the signals of all processes, which all of them compute after the same steps."""
    answers = []

    def sum_over_processes(number, device):
        if isinstance(number, torch.Tensor):        # the loss
            return number.item()
        answers.append(number)
        return number + (len(answers) == 3)     # another process has received one during the third step

    monkeypatch.setattr(scale, "sum_over_processes", sum_over_processes)
    assert scale.main([*SMALL, "one.pt", "--max-steps", "9"]) == 130
    assert answers == [0, 0, 0] and story_llm.load_checkpoint("one.pt").step == 3
    assert "stopped after step 3 of 9 and saved one.pt" in capsys.readouterr().err
