"""Interruption and going on: after Ctrl-C, or a request to end, training comes to the same weights as without."""
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from helpers import PROGRAM, TEXT, story_llm, weights_equal

from story_llm import COMMANDS, FIELDS, load_checkpoint

SIGNALS = (signal.SIGINT, signal.SIGTERM)
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
    """(the step at which the program says it has stopped, the command by which it says that it goes on)"""
    step, command = re.search(r"stopped after step (\d+) of .*?python story_llm\.py (.*)", err).groups()
    return int(step), shlex.split(command)


@pytest.fixture(autouse=True)
def handlers_are_as_before():
    """A signal that is not ours must not end the tests; and after each test all handlers are as they were."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in SIGNALS}
    yield
    now = {number: signal.signal(number, handler) for number, handler in before.items()}
    assert set(now.values()) == {signal.default_int_handler}


@pytest.fixture(autouse=True)
def quick_pictures(monkeypatch):
    """The picture at the end of a training is drawn for real in other tests."""
    monkeypatch.setattr(story_llm, "plot_losses", lambda history, size, path: Path(path).write_text("a picture"))


@pytest.fixture
def whole(folder, trained_here):
    """The run of an uninterrupted training; story_llm.pt itself is gone."""
    run = load_checkpoint("story_llm.pt")
    os.remove("story_llm.pt")
    return run


# the first signal

@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("name, turn", [("learning_rate", 1), ("learning_rate", 4), ("learning_rate", 8),
                                        ("mean_loss", 1), ("mean_loss", 3), ("save_checkpoint", 1)])
def test_a_signal_leaves_a_checkpoint_from_which_training_goes_on_to_the_same_weights(
        whole, call, small, number, name, turn):
    """Within a step, within an evaluation, the first one too, and within saving."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        interrupt_at(monkeypatch, story_llm, name, turn, number)
        status, out, err = call(*small("train"))
    step, again = stopped_at(err)
    assert status == 130 and err.count("\n") == 1 and "Recall" not in out
    stopped = load_checkpoint("story_llm.pt")
    assert stopped.step == step < whole.step and [e.step for e in stopped.history] == [
        e.step for e in whole.history if e.step <= step]
    status, out, err = call(*again)
    assert (status, err) == (0, "") and "Recall" in out
    assert sorted(os.listdir()) == ["loss.png", "my.txt", "story_llm.pt"]
    resumed = load_checkpoint("story_llm.pt")
    assert weights_equal(resumed.model, whole.model) and resumed.history == whole.history


@pytest.mark.parametrize("turn", (2, 5, 8, 9, 12))
def test_whenever_the_signal_comes_what_is_said_to_be_saved_is_saved(whole, call, small, turn):
    """The clock is read between all that happens after a step."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        interrupt_at(monkeypatch, story_llm.time, "perf_counter", turn, signal.SIGINT)
        status, _, err = call(*small("train", "--eval-every", "100"))
    assert status == 130 and load_checkpoint("story_llm.pt").step == stopped_at(err)[0]


def test_an_interrupted_training_can_be_interrupted_again(whole, call, small):
    command, steps = small("train"), []
    for turn in (2, 5, 3):
        with pytest.MonkeyPatch.context() as monkeypatch:
            interrupt_at(monkeypatch, story_llm, "learning_rate", turn, signal.SIGINT)
            status, _, err = call(*command)
        step, command = stopped_at(err)
        steps.append(step)
        assert status == 130 and command.count("--resume") == 1
    assert 0 < steps[0] < steps[1] < steps[2] < whole.step and call(*command)[0] == 0
    assert weights_equal(load_checkpoint("story_llm.pt").model, whole.model)


def test_the_way_to_go_on_is_told_so_that_a_shell_understands_it(folder, call, small):
    os.rename("my.txt", "my own $HOME 'story'.txt")
    with pytest.MonkeyPatch.context() as monkeypatch:
        interrupt_at(monkeypatch, story_llm, "learning_rate", 3, signal.SIGINT)
        _, _, err = call(*small("train", "--text", "my own $HOME 'story'.txt", "--model", "my model.pt"))
    assert call(*stopped_at(err)[1])[0] == 0
    assert load_checkpoint("my model.pt").step == load_checkpoint("my model.pt").total_steps


def test_an_interrupted_training_keeps_the_model_of_another_text(folder, trained_here, call, small):
    before = (folder / "story_llm.pt").read_bytes()
    (folder / "other.txt").write_text(TEXT.replace("boat", "raft"))
    with pytest.MonkeyPatch.context() as monkeypatch:
        interrupt_at(monkeypatch, story_llm, "learning_rate", 1, signal.SIGTERM)
        status, _, err = call(*small("train", "--text", "other.txt"))
    assert status == 130 and "story_llm.old.pt" in err and load_checkpoint("story_llm.pt").step == 1
    status, _, err = call(*stopped_at(err)[1])
    assert (status, err) == (0, "") and (folder / "story_llm.old.pt").read_bytes() == before


def test_who_no_longer_reads_what_is_printed_does_not_keep_a_stop_from_saving(folder, small):
    """As in `train | tee log`: Ctrl-C ends tee as well."""
    def closed(run, speed):
        if run.step == 5:
            raise BrokenPipeError
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(story_llm, "log_evaluation", closed)
        interrupt_at(monkeypatch, story_llm, "training_step", 5, signal.SIGINT)
        with pytest.raises(BrokenPipeError):
            story_llm.run_command(small("train"))
    assert load_checkpoint("story_llm.pt").step == 5


# a second signal

@pytest.mark.parametrize("second", SIGNALS)
@pytest.mark.parametrize("first", SIGNALS)
@pytest.mark.parametrize("name, turn", [("learning_rate", 6), ("save_checkpoint", 1)])
def test_a_second_signal_ends_at_once_and_harms_nothing(folder, trained_here, call, small, first, second,
                                                        name, turn):
    whole = load_checkpoint("story_llm.pt")
    with pytest.MonkeyPatch.context() as monkeypatch:
        interrupt_at(monkeypatch, story_llm, name, turn, first, second)
        status, out, err = call(*small("train"))
    assert status == 130 and "Traceback" not in err and "stopped" not in err
    # that of an evaluation before, or of the training before
    assert load_checkpoint("story_llm.pt").step in ((1, 2, 5, 12) if name == "learning_rate" else (12,))
    assert sorted(os.listdir()) == ["loss.png", "my.txt", "story_llm.pt"]
    assert call(*small("train", "--resume"))[0] == 0
    assert weights_equal(load_checkpoint("story_llm.pt").model, whole.model)


# other commands

@pytest.mark.parametrize("command, name", [("generate", "load_checkpoint"), ("train", "load_text"), ("plot", "draw")])
def test_ctrl_c_in_any_command_is_status_130_without_a_word(folder, trained_here, call, small, command, name):
    before = (folder / "story_llm.pt").read_bytes()
    with pytest.MonkeyPatch.context() as monkeypatch:
        interrupt_at(monkeypatch, story_llm, name, 1, signal.SIGINT)
        assert call(*(small(command) if command == "train" else [command])) == (130, "", "")
    assert (folder / "story_llm.pt").read_bytes() == before


@pytest.mark.parametrize("name, turn", [("learning_rate", 2), ("load_text", 2)])
def test_ctrl_c_in_the_tour_ends_it_with_status_130(folder, call, monkeypatch, name, turn):
    monkeypatch.setattr(story_llm, "FEWEST_STEPS", 5)
    monkeypatch.setitem(story_llm.USUAL, "text", str(folder / "my.txt"))
    monkeypatch.setitem(story_llm.PRESETS, "story", story_llm.GPTConfig(context_length=12, emb_dim=32, n_layers=1))
    interrupt_at(monkeypatch, story_llm, name, turn, signal.SIGINT)
    status, out, err = call("tour")
    assert status == 130 and "Traceback" not in err and "═══ 13" not in out and os.getcwd() == str(folder)


def test_in_another_thread_signals_stay_as_they_are_and_training_works(folder, small):
    statuses = []
    thread = threading.Thread(target=lambda: statuses.append(story_llm.main(small("train", "--epochs", "1"))))
    thread.start()
    thread.join()
    assert statuses == [0]


# real processes

def start_training(folder, arguments):
    return subprocess.Popen([sys.executable, PROGRAM, *arguments], cwd=folder, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})


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
    assert process.returncode == 130 and err.count("\n") == 1
    stopped = load_checkpoint("story_llm.pt")
    assert 10 <= stopped.step == stopped_at(err)[0] < stopped.total_steps
    epochs = stopped.step // stopped.steps_per_epoch + 2
    assert call(*stopped_at(err)[1], "--epochs", epochs)[0] == 0
    assert load_checkpoint("story_llm.pt").step == epochs * stopped.steps_per_epoch


@not_on_windows
def test_kill_9_leaves_the_last_checkpoint_whole_and_the_next_run_no_litter(folder, call, small):
    process = start_training(folder, small("train", "--epochs", "5000", "--eval-every", "1"))
    wait_for(process, "Step 000010")
    process.kill()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert load_checkpoint("story_llm.pt").step > 0
    for orphan in folder.glob("*.tmp"):      # if it was just saving: an hour later, the next run takes that away
        os.utime(orphan, (0, 0))
    assert call(*small("train"))[0] == 0
    assert sorted(os.listdir()) == ["loss.png", "my.txt", "story_llm.pt"]


# going on

def assert_refused(result, *names):
    status, out, err = result
    assert status in (1, 2) and out == "" and err.count("\n") == 1 and err.startswith("error: ")
    assert all(name in err for name in names), err


def test_resume_without_a_checkpoint_is_one_line(folder, call, small):
    assert_refused(call(*small("train", "--resume")), "story_llm.pt")


CAN_CHANGE = {"epochs", "max_steps", "eval_every", "model", "resume", "prompt", "plot", "device"}
CANNOT = [name for name in " ".join(COMMANDS["train"][2:]).split() if name not in CAN_CHANGE]


@pytest.mark.parametrize("name", sorted({*CANNOT}))
def test_resuming_with_anything_changed_is_refused_with_the_difference(folder, trained_here, call, small, name):
    (folder / "other.txt").write_text(TEXT.replace("boat", "raft"))
    f = FIELDS[name]
    if name in ("text", "start"):
        value = ["other.txt"]
    elif f.type is bool:
        value = []
    elif f.metadata["choices"]:
        value = [next(choice for choice in f.metadata["choices"] if choice not in (f.default, "word", "fp32"))]
    else:
        value = [str(f.default + 7 if f.type is int else f.default / 2 or 0.25)]
    before = (folder / "story_llm.pt").read_bytes()
    option = "--" + name.replace("_", "-")
    assert_refused(call(*small("train", "--resume", option, *value)), *value, *([option] if name != "text" else []))
    assert (folder / "story_llm.pt").read_bytes() == before and sorted(os.listdir()) == [
        "loss.png", "my.txt", "other.txt", "story_llm.pt"]


def test_what_a_preset_or_a_start_has_settled_is_what_resuming_compares_with(folder, trained_on_bytes, call, monkeypatch):
    monkeypatch.setitem(story_llm.PRESETS, "gpt2-small", story_llm.GPTConfig(context_length=12, emb_dim=16, n_layers=1))
    (folder / "other.txt").write_text(TEXT)
    for begun, same, other in ((["--preset", "gpt2-small", "--tokenizer", "word"], ["--emb-dim", "16"], ["--emb-dim", "192"]),
                               (["--start", trained_on_bytes], ["--learning-rate", "0.00125"], ["--learning-rate", "0.0025"])):
        command = ["train", "--text", "other.txt", *begun]
        assert call(*command, "--max-steps", 1)[0] == 0
        assert_refused(call(*command, "--max-steps", 2, "--resume", *other), other[0], other[1], same[1])
        assert call(*command, "--max-steps", 2, "--resume", *same)[0] == 0


def test_resuming_with_more_epochs_goes_on_with_all_else_as_it_was(folder, trained_here, call):
    first = load_checkpoint("story_llm.pt")
    assert call("train", "--text", "my.txt", "--resume", "--epochs", "6")[0] == 0
    run = load_checkpoint("story_llm.pt")
    assert run.step == first.step * 6 // 4 and run.config == first.config and run.history[:len(first.history)] == (
        first.history)


def test_going_on_takes_again_what_a_short_text_took_away(folder, call, small):
    (folder / "short.txt").write_text("Only a few words stand in this very short text.", encoding="utf-8")
    command = small("train", "--text", "short.txt", "--context-length", "40", "--val-fraction", "0.3")
    assert call(*command)[0] == 0
    assert load_checkpoint("story_llm.pt").config.context_length < 40
    status, _, err = call(*command, "--epochs", "60", "--resume")
    assert (status, err) == (0, "") and load_checkpoint("story_llm.pt").step > 50
    assert_refused(call(*command, "--context-length", "5", "--resume"), "context-length", "5")


def test_epochs_given_on_resume_replace_the_steps_that_it_was_begun_with(folder, call, small):
    for more, step in ((["--max-steps", "2"], 2), (["--resume"], 12), (["--resume", "--max-steps", "15"], 15)):
        assert call(*small("train", *more))[0] == 0 and load_checkpoint("story_llm.pt").step == step


def test_going_on_where_nothing_is_left_to_do_changes_nothing(folder, trained_here, call, small):
    before = load_checkpoint("story_llm.pt")
    for fewer in ([], ["--epochs", "2"]):
        status, _, err = call(*small("train", "--resume", *fewer))
        after = load_checkpoint("story_llm.pt")
        assert "Traceback" not in err and weights_equal(before.model, after.model) and after.history == before.history
        assert status == 0 or "error" in err


# beginning with the weights of another

def test_a_start_has_the_weights_and_tokenizer_of_a_model_and_an_own_history(folder, trained_on_bytes, call):
    (folder / "other.txt").write_text(TEXT.replace("boat", "raft").replace("river", "lake") * 3)
    old = load_checkpoint(trained_on_bytes)
    assert call("train", "--start", trained_on_bytes, "--text", "other.txt", "--max-steps", 3,
                "--learning-rate", 1e-9)[0] == 0
    run = load_checkpoint("story_llm.pt")
    assert run.config == old.config and run.tokenizer.tokens == old.tokenizer.tokens
    assert run.step == run.total_steps == 3 and run.history[0].step == 0
    for one, other in zip(run.model.parameters(), old.model.parameters()):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-7)
    assert run.fingerprint != old.fingerprint and old.step > 0


def test_a_start_learns_with_half_the_usual_rate_unless_another_is_given(folder, trained_on_bytes, call):
    (folder / "other.txt").write_text(TEXT)
    for more, rate in ([], story_llm.TrainConfig().learning_rate / 2), (["--learning-rate", "0.003"], 0.003):
        assert call("train", "--start", trained_on_bytes, "--text", "other.txt", "--max-steps", 1, *more)[0] == 0
        assert load_checkpoint("story_llm.pt").train_config.learning_rate == rate


@pytest.mark.parametrize("text, options, context", [("other.txt", ["--context-length", "5"], 5), ("short.txt", [], None)])
def test_a_start_can_have_a_shorter_context_its_first_places_stay(folder, trained_on_bytes, call, text, options, context):
    (folder / "other.txt").write_text(TEXT)
    (folder / "short.txt").write_text("The old man")
    old = load_checkpoint(trained_on_bytes)
    assert call("train", "--start", trained_on_bytes, "--text", text, *options, "--max-steps", 1,
                "--learning-rate", 1e-9)[0] == 0
    run = load_checkpoint("story_llm.pt")
    T = run.config.context_length
    assert T < old.config.context_length and context in (T, None)
    torch.testing.assert_close(run.model.pos_emb.weight, old.model.pos_emb.weight[:T], rtol=0, atol=1e-7)


@pytest.mark.parametrize("options, names", [
    (["--n-layers", "2"], ["--n-layers", "--start"]), (["--tokenizer", "story"], ["--tokenizer"]),
    (["--preset", "story"], ["--preset"]), (["--context-length", "99"], ["99"])])
def test_what_the_model_of_a_start_has_settled_is_refused(folder, trained_on_bytes, call, options, names):
    (folder / "other.txt").write_text(TEXT)
    assert_refused(call("train", "--start", trained_on_bytes, "--text", "other.txt", *options), *names)
    assert not (folder / "story_llm.pt").exists()


def test_a_word_tokenizer_cannot_be_started_from_nor_can_what_is_no_model(folder, trained_here, call):
    assert_refused(call("train", "--start", "story_llm.pt", "--text", "my.txt"), "story_llm.pt", "words")
    assert_refused(call("train", "--start", "my.txt", "--text", "my.txt"), "my.txt")


def test_a_start_that_was_interrupted_goes_on_with_the_same_options(folder, trained_on_bytes, call):
    (folder / "other.txt").write_text(TEXT)
    command = ["train", "--start", trained_on_bytes, "--text", "other.txt", "--eval-every", 100]
    assert call(*command, "--model", "whole.pt", "--max-steps", 6)[0] == 0
    with pytest.MonkeyPatch.context() as monkeypatch:
        interrupt_at(monkeypatch, story_llm, "learning_rate", 3, signal.SIGINT)
        status, out, err = call(*command, "--max-steps", 6)
    assert status == 130 and "--resume" in err and "--start" in err
    assert call(*command, "--max-steps", 6, "--resume")[0] == 0
    assert weights_equal(load_checkpoint("story_llm.pt").model, load_checkpoint("whole.pt").model)


def test_a_start_says_like_any_other_training_what_is_not_as_it_was_asked_for(folder, trained_on_bytes, call):
    (folder / "short.txt").write_text("The old man")
    err = call("train", "--start", trained_on_bytes, "--text", "short.txt", "--max-steps", 1)[2]
    assert err.count("note: ") == 2 and "without validation" in err and "context" in err
