"""The work shared by several processes, in several parts, or by a compiled model: the same steps as without."""
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import STORY, TEXT, bare_environment, closed_port, trained_run

import story_llm

SMALL = ["--text", "story.txt", "--tokenizer", "story", "--vocab-size", "300", "--emb-dim", "32", "--n-layers", "1",
         "--context-length", "12", "--batch-size", "9", "--eval-every", "5", "--precision", "fp32",
         "--learning-rate", "0.01"]


@pytest.fixture
def run(tmp_path):
    """Runs the program in a folder of its own with `processes` processes; returns the finished process."""
    (tmp_path / "story.txt").write_text(TEXT, encoding="utf-8")
    environment = {**bare_environment(tmp_path, closed_port()), "OMP_NUM_THREADS": "1"}

    def start(processes, *arguments):
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command = [sys.executable, *(torchrun if processes > 1 else []), STORY.with_name("story_llm.py"), *arguments]
        return subprocess.Popen(command, cwd=tmp_path, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                text=True, start_new_session=True)

    def finish(processes, *arguments):
        process = start(processes, *arguments)
        process.stdout_text, process.stderr_text = process.communicate(timeout=120)
        return process

    finish.start = start
    return finish


def assert_close(path, other, folder):
    one, two = (story_llm.load_checkpoint(folder / name) for name in (path, other))
    assert [entry["step"] for entry in one.history] == [entry["step"] for entry in two.history]
    for name in ("train_loss", "val_loss"):
        assert [entry[name] for entry in one.history] == pytest.approx([entry[name] for entry in two.history], rel=1e-4)
    for a, b in zip(one.model.parameters(), two.model.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert one.history[-1]["train_loss"] < 0.8 * one.history[0]["train_loss"]


def test_two_processes_take_the_steps_of_one_with_one_log_and_resume(run, tmp_path):
    for epochs in (["--epochs", "4"], ["--epochs", "6", "--resume"]):
        alone = run(1, "train", *SMALL, *epochs, "--model", "one.pt", "--plot", "one.png")
        shared = run(2, "train", *SMALL, *epochs, "--model", "two.pt", "--plot", "two.png")
        assert (alone.returncode, shared.returncode) == (0, 0), shared.stderr_text
        assert_close("one.pt", "two.pt", tmp_path)
        logs = [[line for line in process.stdout_text.splitlines() if not line.startswith(("    ", "Ep", "saved", "drew"))]
                for process in (alone, shared)]
        assert logs[0][1:] == logs[1][1:]  # but for the first line, with the memory of a process
        assert alone.stdout_text.count("\n") == shared.stdout_text.count("\n")


def test_a_process_that_dies_ends_the_run_and_leaves_the_checkpoint_whole(run, tmp_path):
    process = run.start(2, "train", *SMALL, "--epochs", "100000")
    try:
        while not (tmp_path / "story_llm.pt").exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        os.kill(int(workers[-1]), signal.SIGKILL)
        assert process.wait(timeout=60) != 0
    finally:
        process.kill()
    assert story_llm.load_checkpoint(tmp_path / "story_llm.pt").step > 0


def test_a_mistake_ends_all_processes_with_one_line_of_ours(run):
    finished = run(2, "train", *SMALL, "--emb-dim", "33")
    assert finished.returncode == 1 and finished.stderr_text.count("error: the width") == 1


def test_batches_in_parts_give_the_same_losses():
    whole, parts = (trained_run(batch_size=9, epochs=20, accumulate=parts) for parts in (1, 4))
    for one, other in zip(whole.history, parts.history):
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-4)
    assert whole.history[-1]["train_loss"] < 0.8 * whole.history[0]["train_loss"]


def test_more_parts_than_windows_are_refused():
    with pytest.raises(ValueError, match="--batch-size"):
        trained_run(batch_size=2, accumulate=3)


def test_without_a_compiler_a_compiled_model_is_the_plain_one(run, tmp_path, monkeypatch):
    for name in ("CXX", "CC"):
        monkeypatch.setenv(name, "/nowhere/compiler")
    plain = run(1, "train", *SMALL, "--epochs", "1", "--model", "one.pt")
    compiled = run(1, "train", *SMALL, "--epochs", "1", "--model", "two.pt", "--compile")
    assert (plain.returncode, compiled.returncode) == (0, 0), compiled.stderr_text
    weights = story_llm.load_checkpoint(tmp_path / "two.pt").model.state_dict()
    assert not any("_orig_mod" in name for name in weights)
    assert compiled.stdout_text.count("could not be compiled") == 1 and len(compiled.stderr_text) < 500
    for a, b in zip(story_llm.load_checkpoint(tmp_path / "one.pt").model.state_dict().values(), weights.values()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
