"""extras/scale.py: several processes, parts of a batch, a compiled model: the same steps as without."""
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
from helpers import ROOT, TEXT, bare_environment, closed_port, note_questions, story_llm, tiny, weights_equal
from torch import distributed

sys.path.insert(0, str(ROOT / "extras"))
import scale  # noqa: E402

PROGRAM = str(ROOT / "extras" / "scale.py")
SMALL = ["train", "--text", "story.txt", "--tokenizer", "word", "--emb-dim", "32", "--n-layers", "1",
         "--context-length", "12", "--batch-size", "9", "--eval-every", "5", "--precision", "fp32",
         "--learning-rate", "0.01", "--model"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder of a story, in which the programs run, without a network."""
    (tmp_path / "story.txt").write_text(TEXT, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for name, value in {**bare_environment(tmp_path), "OMP_NUM_THREADS": "1"}.items():
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
        process.terminate()         # torchrun ends its own processes then
        process.communicate(timeout=60)


def workers_once_saved(process, path):
    """The ids of the two processes, once there is a checkpoint."""
    began = time.monotonic()
    while not Path(path).exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < began + 120, "no checkpoint after two minutes"
        time.sleep(0.05)
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    assert len(found) == 2
    return [int(number) for number in found]


def assert_same_training(path, other):
    one, two = story_llm.load_checkpoint(path), story_llm.load_checkpoint(other)
    assert one.step == two.step == one.total_steps
    for name in ("step", "epoch", "tokens", "train_loss", "val_loss", "recall"):
        expected = [getattr(evaluation, name) for evaluation in one.history]
        assert [getattr(evaluation, name) for evaluation in two.history] == pytest.approx(expected, rel=1e-3)
    for a, b in zip(one.model.parameters(), two.model.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert one.history[-1].train_loss < 0.8 * one.history[0].train_loss


def test_two_processes_take_the_steps_of_one_with_one_log_and_stop_together_and_go_on(folder, start, capsys):
    """One of both is asked to stop, and both do; then they go on, and now in parts, too."""
    command = [*SMALL, "two.pt", "--max-steps", "80"]
    first = start(*command)
    os.kill(workers_once_saved(first, "two.pt")[1], signal.SIGTERM)
    output, errors = first.communicate(timeout=60)
    step = story_llm.load_checkpoint("two.pt").step
    assert f"stopped after step {step} of 80, saved two.pt" in errors
    assert "[rank" not in errors            # so torch would begin the traceback of a process

    second = start(*command, "--resume", "--accumulate", "2")
    more_output, errors = second.communicate(timeout=60)
    assert second.returncode == 0, errors
    assert story_llm.main([*SMALL, "one.pt", "--max-steps", "80"]) == 0
    assert_same_training("one.pt", "two.pt")
    shown = [re.findall(r"\(Step (\d+)\)", some) for some in (output, more_output, capsys.readouterr().out)]
    assert all(len(steps) == len(set(steps)) for steps in shown)        # nobody else has printed
    assert set(shown[0]) | set(shown[1]) == set(shown[2]) and Path("loss.png").exists()


def test_a_process_that_is_killed_ends_the_run_and_leaves_the_checkpoint_whole(folder, start):
    process = start(*SMALL, "killed.pt", "--max-steps", "1000000")
    os.kill(workers_once_saved(process, "killed.pt")[1], signal.SIGKILL)
    assert process.wait(timeout=60) != 0
    assert story_llm.load_checkpoint("killed.pt").step > 0


def test_a_mistake_is_told_in_one_line(folder, start):
    """Here by the first process alone, which reads the story for both; the other one raises it, too."""
    process = start(*SMALL, "none.pt", "--text", "no.txt")
    output, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and output == ""
    assert [line for line in errors.splitlines() if "no.txt" in line] == [
        "error: no.txt is not a file: give a text file with --text"]
    assert "[rank" not in errors


@pytest.mark.parametrize("wrong, words", [
    (["--emb-dim", "33"], "n_heads"), (["--accumulate", "0"], "1 or more"), (["--accumulate", "10"], "10 parts"),
    (["--resume"], "there is no model")])
def test_mistakes_of_a_single_process_are_told_in_one_line(folder, capsys, wrong, words):
    assert scale.main([*SMALL, "none.pt", *wrong]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error and error.count("\n") == 1
    assert not Path("none.pt").exists()


@pytest.mark.parametrize("arguments", [[], ["generate"], ["train", "--no-such-option"], ["train", "--acc", "2"]])
def test_wrong_usage_is_refused(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        scale.main(arguments)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_losses_of_the_processes_add_up_and_their_gradients_have_the_right_mean(accumulate, monkeypatch):
    run, corpus = tiny(batch_size=9)
    inputs, targets = story_llm.TrainingBatches(corpus, run)[0]
    expected = story_llm.batch_loss(run.model, inputs, targets)
    expected.backward()
    wanted = [parameter.grad.clone() for parameter in run.model.parameters()]
    monkeypatch.setattr(scale, "PROCESSES", 3)
    losses, gradients = [], []
    for rank in range(3):
        monkeypatch.setattr(scale, "RANK", rank)
        share = copy.deepcopy(run)
        story_llm.start_optimizer(share)
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda parameters, _: gradients.append(
            [parameter.grad.clone() for parameter in parameters]) or torch.tensor(1.0))
        take_step = scale.SharedStep(share, accumulate, compiled=False)
        take_step(share, inputs, targets)
        losses.append(take_step.unread[0].item())
    assert sum(losses) == pytest.approx(expected.item(), rel=1e-5) and min(losses) > 0
    for parts, whole in zip(zip(*gradients), wanted):
        torch.testing.assert_close(sum(parts) / 3, whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("accumulate", [1, 2, 4, 9])
def test_a_step_in_parts_is_the_step_of_the_lesson(accumulate):
    """Also where a part has less to guess than others, and where it has nothing at all."""
    run, corpus = tiny(batch_size=9, max_steps=5)
    twin = copy.deepcopy(run)
    batches = story_llm.TrainingBatches(corpus, run)
    take_step = scale.SharedStep(run, accumulate, compiled=False)
    for some in (run, twin):
        story_llm.start_optimizer(some)
    for step in range(5):
        inputs, targets = batches[step]
        targets[step] = story_llm.IGNORED
        targets[-1, 3:] = story_llm.IGNORED
        loss_before = twin.loss
        take_step(run, inputs, targets)
        story_llm.training_step(twin, inputs, targets)
        assert run.loss == loss_before is None if step == 0 else run.loss == pytest.approx(loss_before, rel=1e-5)
        assert run.step == twin.step == step + 1
        for a, b in zip(run.model.parameters(), twin.model.parameters()):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_each_part_drops_by_itself_and_the_same_again(monkeypatch):
    run, corpus = tiny(drop_rate=0.5)
    inputs, targets = story_llm.TrainingBatches(corpus, run)[0]
    take_step = scale.SharedStep(run, 1, compiled=False)
    run.model.train()
    before = torch.get_rng_state()

    def loss(rank, part, step):
        monkeypatch.setattr(scale, "RANK", rank)
        run.step = step
        return take_step.backward(run, part, inputs, targets, (targets != story_llm.IGNORED).sum().item()).item()

    losses = [loss(rank, part, step) for rank in (0, 1) for part in (0, 1) for step in (0, 1)]
    assert len(set(losses)) == 8 and loss(0, 0, 0) == losses[0]
    assert torch.equal(torch.get_rng_state(), before)


def test_only_the_last_part_shares_its_gradients(monkeypatch):
    run, corpus = tiny()
    story_llm.start_optimizer(run)
    take_step, alone, seen = scale.SharedStep(run, 3, compiled=False), [], []

    @contextlib.contextmanager
    def without_sharing():
        alone.append(True)
        yield
        alone.pop()

    def backward(run, part, *rest):
        seen.append((part, bool(alone)))
        return scale.SharedStep.backward(take_step, run, part, *rest)

    monkeypatch.setattr(take_step, "without_sharing", without_sharing)
    monkeypatch.setattr(take_step, "backward", backward)
    take_step(run, *story_llm.TrainingBatches(corpus, run)[0])
    assert seen == [(0, True), (1, True), (2, False)]


def test_a_loss_that_is_no_number_stops_the_training():
    run, corpus = tiny()
    run.model.out_head.weight.data[0] = torch.inf
    story_llm.start_optimizer(run)
    take_step, batches = scale.SharedStep(run, 2, compiled=False), story_llm.TrainingBatches(corpus, run)
    take_step(run, *batches[0])
    with pytest.raises(ValueError, match="at step 1: .*learning-rate"):
        take_step(run, *batches[1])


@pytest.mark.parametrize("parts", [[], ["--accumulate", "2"]])
def test_a_compiled_model_takes_the_same_steps_and_is_saved_as_it_is(folder, monkeypatch, parts):
    """Compiled as far as the machine's code, which takes a C++ compiler half a minute."""
    from torch._dynamo.testing import CompileCounterWithBackend
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", torch._dynamo.optimize(counter))
    torch._dynamo.reset()
    for name, options in (("plain.pt", []), ("compiled.pt", ["--compile"])):
        assert scale.main([*SMALL, name, "--max-steps", "6", "--learning-rate", "0.03", *options, *parts]) == 0
    assert counter.frame_count == (1 if options else 0)     # one graph, the loss in it, for all parts and steps
    run = story_llm.load_checkpoint("compiled.pt")
    assert run.config.vocab_size % 64 and run.model.out_head.weight.shape == (run.config.vocab_size, 32)
    assert_same_training("plain.pt", "compiled.pt")
    assert not any("_orig_mod" in name for name in story_llm.load_checkpoint("compiled.pt").model.state_dict())


@pytest.mark.parametrize("vocab_size", [1, 40, 64, 65])
def test_a_padded_head_gives_the_same_logits_and_gradients_of_as_many_columns(vocab_size, monkeypatch):
    head, x = torch.nn.Linear(8, vocab_size, bias=False), torch.randn(3, 5, 8)
    twin, used = copy.deepcopy(head), []
    linear = torch.nn.functional.linear
    scale.pad_head(head)
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, weight: used.append(len(weight)) or linear(x, weight))
    padded = head(x)
    monkeypatch.undo()
    torch.testing.assert_close(padded, twin(x))
    padded.square().sum().backward()
    twin(x).square().sum().backward()
    torch.testing.assert_close(head.weight.grad, twin.weight.grad)
    assert used == [-(-vocab_size // 64) * 64] and dict(head.named_parameters()).keys() == {"weight"}


def test_without_a_compiler_a_model_is_not_compiled_and_one_line_says_so(folder, monkeypatch, capsys):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder / "cache"))
    with torch._inductor.config.patch("cpp.cxx", (None, "/nowhere/g++")):      # which it has from CXX
        assert scale.main([*SMALL, "none.pt", "--max-steps", "2", "--compile"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: the model cannot be compiled here") and "/nowhere/g++" in error
    assert error.count("\n") == 1 and not Path("none.pt").exists()


@pytest.fixture
def as_by_torchrun(monkeypatch):
    """This process, as torchrun would start it alone."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(closed_port()))
    yield
    if distributed.is_initialized():
        distributed.destroy_process_group()


def test_processes_join_whatever_torch_was_built_for(as_by_torchrun, monkeypatch):
    """The usual torch is built for CUDA, and without a GPU its own choice of a backend fails."""
    with monkeypatch.context() as built_for_another:
        built_for_another.setattr(torch._C, "_get_accelerator", lambda *_: torch.device("mps"))
        scale.join_processes(torch.device("cpu"))
    assert distributed.get_backend() == "gloo"
    assert scale.sum_of_all(2.5, "cpu") == 2.5 and scale.from_first(lambda: [TEXT]) == [TEXT]


def test_a_mistake_of_the_first_process_is_raised_in_all(as_by_torchrun, monkeypatch):
    scale.join_processes(torch.device("cpu"))
    letters = []
    monkeypatch.setattr(distributed, "broadcast_object_list", letters.append)
    with pytest.raises(ValueError, match="no text"):
        scale.from_first(lambda: story_llm.check(False, "no text"))
    assert str(letters[0][0]) == "no text"
    monkeypatch.setattr(scale, "RANK", 1)
    monkeypatch.setattr(distributed, "broadcast_object_list", lambda letter: letter.__setitem__(0, OSError("no disk")))
    with pytest.raises(OSError, match="no disk"):
        scale.from_first(lambda: pytest.fail("called by another than the first"))


@pytest.fixture
def two_gpus(monkeypatch):
    """A machine with two GPUs, for all that is asked of it here. Returns what was done with them."""
    done = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(scale, "LOCAL_RANK", 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", done.append)
    monkeypatch.setattr(distributed, "init_process_group", lambda *names, **options: done.append((names, options)))
    return done


def test_each_process_takes_its_own_gpu(two_gpus, monkeypatch):
    monkeypatch.setattr(scale, "LOCAL_PROCESSES", 2)
    device = scale.choose_device("auto")
    scale.join_processes(device)
    assert device == torch.device("cuda", 1)
    assert two_gpus == [1, (("nccl",), {"device_id": device})]


def test_more_processes_than_gpus_are_refused_unless_on_cpus(two_gpus, monkeypatch, capsys, folder):
    monkeypatch.setattr(scale, "LOCAL_PROCESSES", 3)
    assert scale.main([*SMALL, "none.pt"]) == 1
    assert capsys.readouterr().err.startswith("error: 3 processes need as many GPUs, and this machine has 2")
    assert scale.choose_device("cpu") == torch.device("cpu") and two_gpus == []


def test_a_request_to_stop_counts_when_all_have_agreed_on_it(monkeypatch, tmp_path):
    """A signal may come at any moment, also while the others are asked: it is not lost, and nobody stops alone."""
    progress = scale.SharedProgress(tmp_path / "run.pt")
    run, corpus = tiny(max_steps=9)
    monkeypatch.setattr(scale.SharedProgress, "save", lambda self, run: saved.append(run.step))
    saved, answers = [], []

    def ask(number, device):
        answers.append(number)
        progress.stop = run.step == 2       # the signal comes when this process has given its answer
        return number

    monkeypatch.setattr(scale, "sum_of_all", ask)
    story_llm.train(run, corpus, progress)
    assert answers == [False, False, False, True] and run.step == 3 and saved[-1] == 3


def test_no_number_is_asked_for_between_the_last_backward_and_the_step(monkeypatch):
    run, corpus = tiny(batch_size=9)
    story_llm.start_optimizer(run)
    take_step = scale.SharedStep(run, 3, compiled=False)
    events = note_questions(monkeypatch, run)
    take_step(run, *story_llm.TrainingBatches(corpus, run)[0])
    assert events.count("backward") == 3 and "item" in events
    assert events[events.index("step") - 1] == "backward"


def test_a_start_is_made_by_processes_too(folder, capsys):
    assert story_llm.main(["train", "--text", "story.txt", "--tokenizer", "story", "--vocab-size", "300", "--emb-dim", "32",
                           "--max-steps", "2", "--model", "old.pt"]) == 0
    assert scale.main(["train", "--text", "story.txt", "--start", "old.pt", "--max-steps", "1"]) == 0
    old, new = story_llm.load_checkpoint("old.pt"), story_llm.load_checkpoint("story_llm.pt")
    assert new.tokenizer.tokens == old.tokenizer.tokens and new.config == old.config and new.step == 1
