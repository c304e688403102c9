"""Interruption and resuming: after Ctrl-C, SIGTERM, a closed pipe or kill -9, training ends with the same weights as
without."""
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading

import pytest
import torch
from helpers import PROGRAM, TEXT, same, story_llm, tiny, weights_equal

from story_llm import COMMANDS, FIELDS, load_checkpoint, mean_loss, stop_requests

SIGNALS = (signal.SIGINT, signal.SIGTERM)
WARNING = re.compile(r"stopping after this step \(Ctrl-C again: .*since the last save\)")
TRAINED_ON = "note: story_llm.pt was trained on my.txt\n"
pytestmark = pytest.mark.usefixtures("quick_pictures", "handlers_are_restored")
not_on_windows = pytest.mark.skipif(sys.platform == "win32", reason="Windows sends no signals to other processes")


def interrupt_at(monkeypatch, module, name, turn, *signals):
    """Send signals to this process within the given call of a function, as a terminal would."""
    original, calls = getattr(module, name), []

    def interrupted(*args, **kwargs):
        calls.append(1)
        for number in signals if len(calls) == turn else ():
            signal.raise_signal(number)
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, interrupted)


def stopped_at(err):
    """(the step at which the program says that it stopped, the command that it prints for continuing)"""
    step, command = re.search(r"stopped after step (\d+) of .*?python \S*story_llm\.py (.*)", err).groups()
    return int(step), shlex.split(command)


@pytest.fixture
def whole(folder, trained_here):
    """The run of a training that was not interrupted; story_llm.pt itself is deleted."""
    run = load_checkpoint("story_llm.pt")
    os.remove("story_llm.pt")
    return run


def assert_resumed_as_if_whole(result, whole):
    status, out, err = result
    assert (status, err) == (0, TRAINED_ON) and "Recall" in out and "(Step 000000)" not in out
    assert sorted(os.listdir()) == ["loss.png", "my.txt", "story_llm.pt"]
    resumed = load_checkpoint("story_llm.pt")
    assert resumed.step == whole.step and resumed.history == whole.history
    assert weights_equal(resumed.model, whole.model)


# the first signal

@pytest.mark.parametrize("name, turn, number", [
    ("learning_rate", 1, signal.SIGINT), ("learning_rate", 8, signal.SIGTERM), ("mean_loss", 1, signal.SIGINT),
    ("mean_loss", 3, signal.SIGINT), ("save_checkpoint", 1, signal.SIGTERM)])
def test_after_a_signal_training_resumes_to_the_same_weights(whole, call, small, number, name, turn):
    """Within a step, within an evaluation, also the first one, and while saving."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        interrupt_at(monkeypatch, story_llm, name, turn, number)
        status, out, err = call(*small("train"))
    step, again = stopped_at(err)
    assert status == 130 and err.count("\n") == 1 and "Recall" not in out
    stopped = load_checkpoint("story_llm.pt")
    assert stopped.step == step < whole.step and [e.step for e in stopped.history] == [
        e.step for e in whole.history if e.step <= step]
    assert_resumed_as_if_whole(call(*again), whole)


@pytest.mark.parametrize("turn", range(2, 12))
def test_whenever_the_signal_comes_the_step_that_is_said_to_be_saved_is_saved(whole, call, small, turn):
    """The clock is read between all that happens after a step."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        interrupt_at(monkeypatch, story_llm.time, "perf_counter", turn, signal.SIGINT)
        status, _, err = call(*small("train", "--eval-every", "100"))
    assert status == 130 and load_checkpoint("story_llm.pt").step == stopped_at(err)[0]


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_says_what_a_second_one_would_throw_away(capfd, number):
    with stop_requests() as received:
        assert received == [] and capfd.readouterr().err == ""
        signal.raise_signal(number)
        assert received == [number] and WARNING.fullmatch(capfd.readouterr().err.strip("\n"))
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
        assert received == [number] and capfd.readouterr().err == ""


def test_signals_that_were_ignored_stay_ignored(folder, call, small, monkeypatch):
    """As after `nohup python story_llm.py train &`."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        interrupt_at(monkeypatch, story_llm, "learning_rate", 3, signal.SIGINT)
        assert call(*small("train"))[::2] == (0, "") and load_checkpoint("story_llm.pt").step == 12
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_interrupted_training_can_be_interrupted_again(whole, call, small):
    command, steps = small("train"), []
    for turn in (2, 5, 3):
        with pytest.MonkeyPatch.context() as monkeypatch:
            interrupt_at(monkeypatch, story_llm, "learning_rate", turn, signal.SIGINT)
            status, _, err = call(*command)
        step, command = stopped_at(err)
        steps.append(step)
        assert status == 130 and command.count("--resume") == 1
    assert 0 < steps[0] < steps[1] < steps[2] < whole.step
    assert_resumed_as_if_whole(call(*command), whole)


@pytest.mark.parametrize("more", [["--drop-rate", "0.2"], ["--optimizer", "muon"], ["--tokenizer", "story"],
                                  ["--keep-best", "--val-fraction", "0.3"], ["--prompt", "At night a boy"]])
def test_a_resumed_training_has_all_its_settings_again(folder, call, small, more):
    command = small("train", *more)
    assert call(*command, "--model", "whole.pt")[0] == 0
    with pytest.MonkeyPatch.context() as monkeypatch:
        interrupt_at(monkeypatch, story_llm, "learning_rate", 3, signal.SIGINT)
        _, _, err = call(*command)
    assert call(*stopped_at(err)[1])[0] == 0
    resumed, whole = load_checkpoint("story_llm.pt"), load_checkpoint("whole.pt")
    assert resumed.train_config == whole.train_config and resumed.config == whole.config
    assert resumed.history == whole.history and weights_equal(resumed.model, whole.model)


@not_on_windows
def test_the_printed_command_works_in_a_shell_as_it_is_printed(folder, call, small):
    os.rename("my.txt", "my own $HOME 'story'.txt")
    shutil.copy(PROGRAM, folder)
    with pytest.MonkeyPatch.context() as monkeypatch:
        interrupt_at(monkeypatch, story_llm, "learning_rate", 3, signal.SIGINT)
        _, _, err = call(*small("train", "--text", "my own $HOME 'story'.txt", "--model", "my model.pt"))
    command = re.search(r"to continue: python (.*)", err)[1]
    done = subprocess.run(f"{shlex.quote(sys.executable)} {command}", shell=True, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr.count("\n") == 1 and "$HOME" in done.stderr
    assert load_checkpoint("my model.pt").step == 12


@pytest.mark.parametrize("option, file", [("--text", "moved.txt"), ("--plot", "curve.svg")])
def test_the_printed_command_knows_the_files_that_were_given(folder, call, small, option, file):
    """Whoever moves the text and says so once need not say it again."""
    if option == "--text":
        assert call(*small("train", "--max-steps", "2"))[0] == 0
        os.rename("my.txt", file)
        os.remove("loss.png")
        command = ["train", "--resume", "--max-steps", "12"]
    else:
        command = small("train")
    with pytest.MonkeyPatch.context() as monkeypatch:
        interrupt_at(monkeypatch, story_llm, "learning_rate", 3, signal.SIGINT)
        _, _, err = call(*command, option, file)
    assert call(*stopped_at(err)[1])[0] == 0
    assert os.path.exists(file) and os.path.exists("loss.png") == (option == "--text")


def test_however_often_a_new_training_is_interrupted_the_finished_model_is_not_lost(folder, trained_here, call, small):
    before = (folder / "story_llm.pt").read_bytes()
    (folder / "other.txt").write_text(TEXT.replace("boat", "raft"))
    for turn in range(3):
        with pytest.MonkeyPatch.context() as monkeypatch:
            interrupt_at(monkeypatch, story_llm, "learning_rate", 1, signal.SIGTERM)
            status, _, err = call(*small("train", "--text", "other.txt"))
        assert status == 130 and load_checkpoint("story_llm.pt").step == 1
        assert ("story_llm.old.pt" in err) == (turn == 0)
        assert (folder / "story_llm.old.pt").read_bytes() == before
    assert call(*stopped_at(err)[1])[0] == 0 and (folder / "story_llm.old.pt").read_bytes() == before
    assert sorted(os.listdir()) == ["loss.png", "my.txt", "other.txt", "story_llm.old.pt", "story_llm.pt"]


def test_ctrl_c_after_the_last_step_finds_everything_saved(whole, call, small):
    with pytest.MonkeyPatch.context() as monkeypatch:
        interrupt_at(monkeypatch, story_llm, "log_recall", 1, signal.SIGINT)
        status, _, err = call(*small("train"))
    assert (status, err) == (130, "")
    assert weights_equal(load_checkpoint("story_llm.pt").model, whole.model)
    status, out, err = call("train", "--resume")
    assert "nothing is left to do" in err
    assert_resumed_as_if_whole((status, out, TRAINED_ON), whole)


# output that nobody reads any more

@pytest.mark.parametrize("number", [signal.SIGINT, None])
def test_a_closed_pipe_loses_no_step(whole, call, small, number):
    """As in `train | tee log`, where Ctrl-C ends tee as well, and in `train | head`, without any signal."""
    def closed(evaluation, speed):
        if evaluation.step == 5:
            raise BrokenPipeError

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(story_llm, "log_evaluation", closed)
        if number is not None:
            interrupt_at(monkeypatch, story_llm, "learning_rate", 5, number)
        with pytest.raises(BrokenPipeError):
            story_llm.run_command(small("train"))
    assert load_checkpoint("story_llm.pt").step == 5
    assert_resumed_as_if_whole(call("train", "--resume"), whole)


# a second signal

@pytest.mark.parametrize("module, name, turn, steps, number", [
    (story_llm, "learning_rate", 6, (1, 5), signal.SIGINT), (story_llm, "learning_rate", 6, (1, 5), signal.SIGTERM),
    (story_llm, "save_checkpoint", 1, (), signal.SIGINT), (torch, "save", 1, (), signal.SIGTERM),
    (os, "fsync", 1, (), signal.SIGINT), (os, "replace", 1, (), signal.SIGINT)])
def test_a_second_signal_ends_the_program_at_once_and_does_no_harm(whole, call, small, number, module, name, turn,
                                                                   steps):
    """What is left is the file of an earlier evaluation, if there was one, and no temporary file."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        interrupt_at(monkeypatch, module, name, turn, number, number)
        status, out, err = call(*small("train"))
    assert status == 130 and "Traceback" not in err and "stopped" not in err
    if not steps:
        assert sorted(os.listdir()) == ["loss.png", "my.txt"]
        return
    assert load_checkpoint("story_llm.pt").step in steps
    assert_resumed_as_if_whole(call("train", "--resume"), whole)


# other commands

@pytest.mark.parametrize("command, name", [("generate", "load_checkpoint"), ("train", "load_text"),
                                           ("plot", "plot_losses")])
def test_ctrl_c_in_any_command_is_status_130_without_a_message(folder, trained_here, call, small, command, name):
    before = (folder / "story_llm.pt").read_bytes()
    with pytest.MonkeyPatch.context() as monkeypatch:
        interrupt_at(monkeypatch, story_llm, name, 1, signal.SIGINT)
        assert call(*(small(command) if command == "train" else [command])) == (130, "", "")
    assert (folder / "story_llm.pt").read_bytes() == before


def test_ctrl_c_in_the_tour_ends_it_with_status_130(folder, trained_here, call, monkeypatch):
    interrupt_at(monkeypatch, story_llm, "learning_rate", 2, signal.SIGINT)
    status, out, err = call("tour", "--text", "my.txt", "--model", "tour.pt")
    assert status == 130 and "Traceback" not in err and "story_llm.py plot" not in out
    assert load_checkpoint("tour.pt").step == 2


def test_in_another_thread_signals_stay_as_they_are_and_training_works(folder, small):
    statuses = []
    thread = threading.Thread(target=lambda: statuses.append(story_llm.main(small("train", "--epochs", "1"))))
    thread.start()
    thread.join()
    assert statuses == [0]


# real processes

def start_training(folder, arguments):
    return subprocess.Popen([sys.executable, PROGRAM, *arguments], cwd=folder, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


def wait_for(process, words):
    for line in process.stdout:
        if words in line:
            return
    pytest.fail(f"it ended before: {process.communicate()[1]}")


@not_on_windows
@pytest.mark.parametrize("number", SIGNALS)
def test_a_real_signal_to_a_real_process_saves_and_resume_finishes(folder, call, small, number):
    process = start_training(folder, small("train", "--epochs", "2000", "--eval-every", "10"))
    wait_for(process, "Step 000010")
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and WARNING.fullmatch(err.splitlines()[1]) and err.count("\n") == 3
    stopped = load_checkpoint("story_llm.pt")
    assert 10 <= stopped.step == stopped_at(err)[0] < stopped.total_steps
    epochs = stopped.step // stopped.steps_per_epoch + 2
    assert call(*stopped_at(err)[1], "--epochs", epochs)[0] == 0
    assert load_checkpoint("story_llm.pt").step == epochs * stopped.steps_per_epoch


@not_on_windows
@pytest.mark.parametrize("how", ["kill -9", "train | head"])
def test_a_process_that_was_killed_or_lost_its_reader_left_a_whole_file_from_which_training_resumes(
        folder, call, small, how):
    command = small("train", "--max-steps", "60", "--eval-every", "1", "--drop-rate", "0.1")
    process = start_training(folder, command)
    wait_for(process, "Step 000010")
    if how == "kill -9":
        process.kill()
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
    else:
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait(timeout=60) == 1
        process.stderr.close()
    assert (0 if how == "kill -9" else 9) < load_checkpoint("story_llm.pt").step < 60
    assert call("train", "--resume")[0] == 0 and call(*command, "--model", "whole.pt")[0] == 0
    resumed, whole = load_checkpoint("story_llm.pt"), load_checkpoint("whole.pt")
    assert resumed.history == whole.history and weights_equal(resumed.model, whole.model)


# resuming

def assert_refused(result, *names):
    status, out, err = result
    *notes, error = err.splitlines()
    assert (status, out) == (1, "") and error.startswith("error: ") and all(line.startswith("note: ") for line in notes)
    assert all(name in error for name in names), err


RESUME_OPTIONS = {"text", "encoding", "model", "resume", "epochs", "max_steps", "eval_every", "device", "plot"}


def test_resuming_with_any_other_setting_is_refused(folder, trained_here, call):
    """Also with the value that the checkpoint has: everything comes from there."""
    before = (folder / "story_llm.pt").read_bytes()
    for name in {*COMMANDS["train"][2]} - RESUME_OPTIONS:
        option = story_llm.option_string(name)
        value = [] if FIELDS[name].type is bool else [str(FIELDS[name].default)]
        assert_refused(call("train", "--resume", option, *value), option, "--resume")
    assert (folder / "story_llm.pt").read_bytes() == before
    assert sorted(os.listdir()) == ["loss.png", "my.txt", "story_llm.pt"]


def test_what_may_change_at_a_resume_is_accepted(folder, trained_here, call):
    os.rename("my.txt", "moved.txt")
    os.rename("story_llm.pt", "moved.pt")
    status, _, err = call("train", "--resume", "--text", "moved.txt", "--model", "moved.pt", "--max-steps", "14",
                          "--eval-every", "1", "--device", "cpu", "--plot", "curve.svg")
    run = load_checkpoint("moved.pt")
    assert (status, run.step) == (0, 14) and "moved.old.pt" in err and [e.step for e in run.history[-2:]] == [13, 14]
    assert sorted(os.listdir()) == ["curve.svg", "loss.png", "moved.old.pt", "moved.pt", "moved.txt"]


@pytest.mark.parametrize("text", ["other.txt", "my.txt"])
def test_resuming_with_another_text_is_refused(folder, trained_here, call, text):
    """Another file, or the same one with other words in it."""
    (folder / text).write_text(TEXT.replace("boat", "raft"))
    before = (folder / "story_llm.pt").read_bytes()
    options = [] if text == "my.txt" else ["--text", text]
    assert_refused(call("train", "--resume", *options), "different text", "--text")
    assert (folder / "story_llm.pt").read_bytes() == before


def test_resuming_with_more_epochs_continues_with_everything_else_as_it_was(folder, trained_here, call):
    first = load_checkpoint("story_llm.pt")
    assert call("train", "--resume", "--max-steps", "15")[0] == 0 and load_checkpoint("story_llm.pt").step == 15
    assert call("train", "--resume", "--epochs", "6")[0] == 0       # takes the place of the 15 steps
    run = load_checkpoint("story_llm.pt")
    assert run.step == first.step * 6 // 4 and run.config == first.config
    assert run.history[:len(first.history)] == first.history


@pytest.mark.parametrize("fewer", [[], ["--epochs", "2"], ["--max-steps", "12"]])
def test_resuming_a_training_that_is_finished_changes_nothing_and_says_so(folder, trained_here, call, fewer):
    before = (folder / "story_llm.pt").read_bytes()
    status, _, err = call("train", "--resume", *fewer)
    assert status == 0 and "nothing is left to do" in err and "--epochs or --max-steps" in err
    assert (folder / "story_llm.pt").read_bytes() == before


BEST = {"keep_best": True, "val_fraction": 0.3, "max_steps": 100, "eval_every": 5, "learning_rate": 0.01, "epochs": 0,
        "warmup_steps": 3, "drop_rate": 0.1}


@pytest.mark.parametrize("stop_at, shorter", [
    (25, ["--max-steps", "20"]), (23, ["--max-steps", "24"]), (23, ["--max-steps", "30"]), (7, []),
    (None, ["--max-steps", "9"])])
def test_the_weights_in_the_file_are_those_of_the_step_that_is_named(folder, call, small, stop_at, shorter):
    """keep_best, interrupted and resumed for fewer, as many or more steps."""
    run, corpus = tiny(**BEST)
    models = {0: {name: p.clone() for name, p in run.model.state_dict().items()}}
    for _ in story_llm.training_steps(run, corpus):
        models[run.step] = {name: p.clone() for name, p in run.model.state_dict().items()}
    models.pop(run.step)                                    # at the end it has the best ones again
    options = [word for name, value in BEST.items() for word in [story_llm.option_string(name), str(value)]
               if word not in ("True", "--epochs", "0")]
    with pytest.MonkeyPatch.context() as monkeypatch:
        if stop_at is not None:
            interrupt_at(monkeypatch, story_llm, "learning_rate", stop_at, signal.SIGINT)
        status, out, _ = call(*small("train", *options))
    assert status == (0 if stop_at is None else 130)
    for resumed in (["--resume", *shorter],) if stop_at is not None else ([], ["--resume", *shorter]):
        if resumed:
            status, out, _ = call("train", *resumed)
        assert status == 0
        named = int(re.search(r"The weights are those of step (\d+)", out)[1])
        loaded = load_checkpoint("story_llm.pt")
        best = min(loaded.history, key=lambda evaluation: evaluation.val_loss)
        assert named == best.step == story_llm.step_of_weights(loaded)
        assert mean_loss(loaded.model, corpus.val_ids) == pytest.approx(best.val_loss, rel=1e-5)
        if named <= (stop_at or 100):                       # later ones have another learning rate
            assert same(dict(loaded.model.state_dict()), models[named])
        assert f"after {named} steps" in call("evaluate")[1]


def test_a_notebook_can_interrupt_and_continue_a_training(folder, whole, small, monkeypatch):
    run, corpus = story_llm.new_run_from_args(story_llm.parse(small("train")))
    interrupt_at(monkeypatch, story_llm, "learning_rate", 3, signal.SIGINT)
    story_llm.train(run, corpus, "story_llm.pt")
    assert run.step == load_checkpoint("story_llm.pt").step == 3
    story_llm.train(run, corpus, "story_llm.pt")
    assert load_checkpoint("story_llm.pt").step == 12 and weights_equal(run.model, whole.model)
    assert run.history == whole.history and not any("old" in name for name in os.listdir())
