import contextlib
import io
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest

import story_llm
from conftest import STORY, TEXT, bare_environment, closed_port, weights_equal
from story_llm import GPTConfig, TrainConfig, load_checkpoint, main

COMMANDS = ("words", "bpe", "windows", "model", "evaluate", "train", "plot", "generate")
TINY = ["--tokenizer", "word", "--context-length", "12", "--emb-dim", "32", "--n-heads", "2", "--n-layers", "1",
        "--batch-size", "8", "--epochs", "4", "--eval-every", "5", "--precision", "fp32"]
PROMPT = "The old ferryman tied his"


@pytest.fixture
def folder(tmp_path, monkeypatch, bare):
    """An empty folder to work in, with a story, no network and no files of GPT-2's."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path


@pytest.fixture
def run(capsys):
    """run(*arguments) gives (exit status, stdout, stderr)."""
    def call(*arguments):
        capsys.readouterr()
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()
    return call


def assert_one_line_error(result, *names):
    """Exit status 1 or 2, nothing on stdout but what came before, and an error that names the value."""
    status, out, err = result
    assert status in (1, 2) and "Traceback" not in out + err
    line = err.strip().splitlines()[-1]
    assert "error: " in line and (status == 2 or sum("error: " in line for line in err.splitlines()) == 1)
    assert not any(name not in line for name in names), line
    return line


# help

def test_without_a_command_the_pipeline_and_all_commands_are_shown(run):
    status, out, err = run()
    assert status == 0 and err == "" and all(re.search(rf"story_llm\.py {command}\b", out) for command in COMMANDS)
    assert [int(step) for step in re.findall(r"^\s*(\d+)  ", out, re.MULTILINE)] == list(range(1, 14))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(run, command):
    status, out, err = run(command, "--help")
    assert status == 0 and err == "" and "--help" in out
    assert "--model" in out or "--text" in out


@pytest.mark.parametrize("settings", [GPTConfig, TrainConfig])
def test_every_setting_is_an_option_with_its_default_in_the_help(run, settings):
    _, out, _ = run("train", "--help")
    words = " ".join(out.split())
    for name in settings.__dataclass_fields__:
        if name not in ("vocab_size", "qkv_bias", "tie_weights"):
            option, default = name.replace("_", "-"), re.escape(str(getattr(settings(), name)))
            assert re.search(rf"--{option} .*?\({default}\)", words), name


@pytest.mark.parametrize("arguments", [["tray"], ["train", "--no-such-option"], ["generate", "--temperature", "warm"]])
def test_wrong_usage_is_status_2_with_the_value_named(run, arguments):
    status, out, err = run(*arguments)
    assert status == 2 and out == "" and arguments[-1] in err


# before and after training

def test_every_command_works_before_training_or_says_in_one_line_what_is_missing(folder, run):
    for command in COMMANDS:
        options = {"plot": [], "generate": ["--prompt", PROMPT], "words": ["--text", "my.txt"],
                   "bpe": ["--text", "my.txt", "--tokenizer", "word"]}.get(command, ["--text", "my.txt", *TINY])
        if command == "train":
            continue
        result = run(command, *options)
        if command in ("plot", "generate"):
            assert "train" in assert_one_line_error(result, "story_llm.pt")
        else:
            assert result[0] == 0 and result[1] and "nan" not in result[1].lower() and "Traceback" not in result[2]
    status, out, _ = run("generate", "--untrained", "--prompt", PROMPT, "--text", "my.txt", *TINY)
    assert status == 0 and out.startswith(PROMPT)
    assert sorted(os.listdir()) == ["my.txt"]


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory):
    """A folder after training, and what was printed."""
    folder, out, err = tmp_path_factory.mktemp("trained"), io.StringIO(), io.StringIO()
    (folder / "my.txt").write_text(TEXT, encoding="utf-8")
    with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert main(["train", "--text", "my.txt", *TINY]) == 0
    assert err.getvalue() == ""
    return folder, out.getvalue()


@pytest.fixture
def trained(folder, trained_once):
    """`folder`, after training; gives what that printed."""
    shutil.copytree(trained_once[0], folder, dirs_exist_ok=True)
    return trained_once[1]


def test_training_tells_its_progress_and_recall_and_writes_its_two_files(folder, trained):
    assert re.search(r"^Ep 1 \(Step 000000\): Train loss \d\.\d{3}, Val loss \d\.\d{3}", trained, re.MULTILINE)
    assert re.search(r"^Recall \d+\.\d%: \d+ of \d+ sentences", trained, re.MULTILINE)
    assert sorted(os.listdir()) == ["loss.png", "my.txt", "story_llm.pt"]


def test_every_command_works_after_training(folder, trained, run):
    for command in COMMANDS:
        text = ["--text", "my.txt"]
        options = {"plot": [], "generate": ["--max-new-tokens", "5"], "words": text, "bpe": text}
        status, out, err = run(command, *options.get(command, [*text, *TINY]))
        assert status == 0 and out and "error" not in err and "nan" not in out.lower(), command


def test_evaluate_shows_what_training_showed_last(folder, trained, run):
    _, out, err = run("evaluate", "--text", "my.txt")
    last = load_checkpoint("story_llm.pt").history[-1]
    assert err == "" and f"{last['train_loss']:.3f}" in out and f"{last['val_loss']:.3f}" in out
    assert re.search(r"^Recall .*", trained, re.MULTILINE).group() in out


def test_evaluating_with_another_text_is_noted(folder, trained, run):
    (folder / "other.txt").write_text(TEXT.replace("boat", "raft"))
    status, _, err = run("evaluate", "--text", "other.txt")
    assert status == 0 and "another text" in err


def test_generate_writes_prompt_and_continuation_to_stdout_and_nothing_else(folder, trained, run):
    saved = load_checkpoint("story_llm.pt")
    expected = PROMPT + "".join(story_llm.generate_text(saved.model, saved.tokenizer, PROMPT, 12)) + "\n"
    assert run("generate", "--prompt", PROMPT, "--max-new-tokens", 12) == (0, expected, "")


def test_generation_by_chance_depends_on_the_seed(folder, trained, run):
    texts = [run("generate", "--prompt", PROMPT, "--temperature", 2, "--seed", seed)[1] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_the_same_command_makes_the_same_weights(folder, trained, run):
    first = load_checkpoint("story_llm.pt").model
    assert run("train", "--text", "my.txt", *TINY, "--model", "again.pt")[0] == 0
    assert weights_equal(first, load_checkpoint("again.pt").model)


def test_plot_draws_where_it_is_told(folder, trained, run):
    assert run("plot", "--plot", "curve.svg")[0] == 0
    assert (folder / "curve.svg").read_text().startswith("<?xml")


# no network, default tokenizer

@pytest.mark.parametrize("command", ["bpe", "windows", "model", "evaluate"])
def test_without_network_and_files_commands_work_with_a_learned_tokenizer_and_one_line(folder, run, command):
    settings = [] if command == "bpe" else TINY[2:]
    status, out, err = run(command, "--text", "my.txt", "--vocab-size", "300", *settings)
    assert status == 0 and out and len(err.splitlines()) == 1 and "--tokenizer gpt2" in err


def test_without_network_and_files_the_real_story_is_trained_on_and_continued(folder, run):
    status, out, err = run("train", *TINY[2:], "--epochs", "1", "--eval-every", "1000")
    assert status == 0 and len(err.splitlines()) == 1 and "--tokenizer gpt2" in err
    assert out.startswith("story tokenizer, vocabulary 1,")
    status, out, err = run("generate", "--max-new-tokens", "3")
    assert status == 0 and err == "" and out.startswith("Once Aadhan renounced his kingdom")


def test_without_network_and_files_gpt2_by_name_is_an_error_that_tells_how_to_get_it(folder, run):
    status, out, err = run("train", "--text", "my.txt", "--tokenizer", "gpt2")
    assert status == 1 and out == "" and err.startswith("error: ") and "TIKTOKEN_CACHE_DIR" in err
    assert "6d1cbeee0f20b3d9449abfede4726ed8212e3aee" in err and "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6" in err


# wrong values

@pytest.mark.parametrize("option, value", [
    ("--emb-dim", "0"), ("--emb-dim", "-8"), ("--emb-dim", "33"), ("--emb-dim", "x"), ("--emb-dim", "nan"),
    ("--emb-dim", "1000000000000"), ("--emb-dim", "1" + "0" * 30), ("--n-heads", "0"), ("--n-heads", "5"),
    ("--n-layers", "0"), ("--n-layers", "1000000000"), ("--n-layers", "1.5"), ("--context-length", "0"),
    ("--context-length", "-3"), ("--drop-rate", "1"), ("--drop-rate", "nan"), ("--drop-rate", "-0.1"),
    ("--position", "none"), ("--epochs", "-1"), ("--epochs", "nan"), ("--batch-size", "0"),
    ("--batch-size", "1000000000000"), ("--stride", "-1"), ("--learning-rate", "0"), ("--learning-rate", "nan"),
    ("--learning-rate", "inf"), ("--learning-rate", "-1"), ("--warmup-steps", "-1"), ("--weight-decay", "-1"),
    ("--weight-decay", "nan"), ("--grad-clip", "0"), ("--openings", "1"), ("--openings", "nan"),
    ("--val-fraction", "1"), ("--val-fraction", "-0.5"), ("--eval-every", "0"), ("--precision", "fp8"),
    ("--seed", "-1"), ("--seed", "1" + "0" * 30), ("--tokenizer", "bytes"), ("--preset", "huge"),
    ("--device", "abacus"), ("--text", "missing.txt"), ("--text", "."), ("--model", "nowhere/story.pt"),
    ("--model", "."), ("--plot", "loss.xyz"), ("--plot", "nowhere/loss.png")])
def test_a_wrong_value_for_training_is_one_line_that_names_it(folder, run, option, value):
    result = run("train", "--text", "my.txt", *TINY, option, value)
    assert_one_line_error(result, value.removeprefix("loss."))
    if option != "--plot":
        assert "Step 000005" not in result[1]  # noticed before the training, not after


@pytest.mark.parametrize("size", ["256", "0", "-5"])
def test_a_vocabulary_smaller_than_all_bytes_is_one_line_that_names_it(folder, run, size):
    assert_one_line_error(run("bpe", "--text", "my.txt", "--tokenizer", "story", "--vocab-size", size), size, "257")


@pytest.mark.parametrize("option, value", [
    ("--temperature", "-1"), ("--temperature", "nan"), ("--temperature", "inf"), ("--top-k", "0"), ("--top-k", "-1"),
    ("--max-new-tokens", "-1"), ("--max-new-tokens", "1.5"), ("--prompt", ""), ("--device", "abacus"),
    ("--model", "missing.pt"), ("--model", "my.txt"), ("--model", "."), ("--model", "loss.png"),
    ("--seed", "1" + "0" * 30)])
def test_a_wrong_value_for_generating_is_one_line_that_names_it(folder, trained, run, option, value):
    assert_one_line_error(run("generate", "--temperature", "1", option, value), value)


@pytest.mark.parametrize("prompt", ["漢字 😀", "a\0b", "x\ud800y", "word " * 3000, "<|endoftext|>", " ", "\r\n", "-"])
def test_any_other_prompt_works_with_a_learned_tokenizer(folder, run, prompt):
    options = ["--tokenizer", "story", "--vocab-size", "300", "--epochs", "1"]
    assert run("train", "--text", "my.txt", *TINY, *options)[0] == 0
    status, out, err = run("generate", f"--prompt={prompt}", "--max-new-tokens", 3)
    assert (status, err) == (0, "") and len(out) >= len(prompt)


@pytest.mark.parametrize("content, name", [(b"", "empty"), (b" \n\t ", "empty"), (b"a", "short"),
                                           (b"\xff\xfeO\0n\0c\0e\0", "byte 0"),
                                           (b"Once \x93there\x94", "byte 5"), (bytes(range(256)) * 9, "byte 128")])
def test_a_text_that_cannot_be_learned_is_one_line(folder, run, content, name):
    (folder / "strange.txt").write_bytes(content)
    for command in ("train", "evaluate", "windows", "model"):
        assert_one_line_error(run(command, "--text", "strange.txt", *TINY), name)


@pytest.mark.parametrize("content", ["Once there was a king", "Two words", "One.\r\nTwo.\r\nThree.\r\n", "😀 " * 30,
                                     "e\u0301 " * 99,
                                     "\0 \0 \0", "The king said one long sentence and then he went away."])
def test_a_strange_text_is_learned_from_and_no_nan_is_shown(folder, run, content):
    (folder / "strange.txt").write_bytes(content.encode())
    for command in ("words", "windows", "model", "evaluate", "train", "evaluate"):
        status, out, err = run(command, "--text", "strange.txt", *([] if command == "words" else TINY))
        assert status == 0 and "nan" not in out.lower() and "error" not in err, command
    assert run("generate", "--prompt", content[:1], "--max-new-tokens", "5")[0] == 0


def test_a_text_in_the_same_command_with_a_byte_order_mark_is_the_same_text(folder, run):
    (folder / "bom.txt").write_bytes(b"\xef\xbb\xbf" + TEXT.replace("\n", "\r\n").encode())
    outputs = [run("train", "--text", text, *TINY, "--model", text + ".pt")[0] for text in ("my.txt", "bom.txt")]
    assert outputs == [0, 0] and weights_equal(load_checkpoint("my.txt.pt").model, load_checkpoint("bom.txt.pt").model)


# interruption and resuming

def interrupt_at(monkeypatch, name, call, times=1):
    """Send Ctrl-C to this process within the given call of a function of story_llm, as a terminal would."""
    original, calls = getattr(story_llm, name), []

    def interrupted(*args, **kwargs):
        calls.append(1)
        for _ in range(times * (len(calls) == call)):
            signal.raise_signal(signal.SIGINT)
        return original(*args, **kwargs)

    monkeypatch.setattr(story_llm, name, interrupted)


@pytest.mark.parametrize("name, call", [("learning_rate", 1), ("learning_rate", 4), ("learning_rate", 8),
                                        ("mean_loss", 1),
                                        ("mean_loss", 3), ("save_checkpoint", 1)])
def test_ctrl_c_leaves_a_checkpoint_from_which_training_goes_on_to_the_same_weights(folder, trained, run, name, call):
    """Within a step, within an evaluation, the first one too, and within saving."""
    whole = load_checkpoint("story_llm.pt")
    os.rename("story_llm.pt", "whole.pt")
    with pytest.MonkeyPatch.context() as monkeypatch:
        interrupt_at(monkeypatch, name, call)
        status, out, err = run("train", "--text", "my.txt", *TINY)
    assert status == 130 and "--resume" in err and "Traceback" not in err
    stopped = load_checkpoint("story_llm.pt")
    assert f"step {stopped.step}" in err and stopped.step < whole.step
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    status, out, err = run("train", "--text", "my.txt", *TINY, "--resume")
    assert (status, err) == (0, "") and sorted(os.listdir()) == ["loss.png", "my.txt", "story_llm.pt", "whole.pt"]
    resumed = load_checkpoint("story_llm.pt")
    assert weights_equal(resumed.model, whole.model) and resumed.history == whole.history


@pytest.mark.parametrize("name, call", [("learning_rate", 6), ("save_checkpoint", 1)])
def test_a_second_ctrl_c_ends_at_once_and_harms_nothing(folder, trained, run, monkeypatch, name, call):
    interrupt_at(monkeypatch, name, call, times=2)
    status, out, err = run("train", "--text", "my.txt", *TINY)
    assert status == 130 and "Traceback" not in err
    assert load_checkpoint("story_llm.pt").step in (1, 2, 5, 12)  # the last evaluation's, or that of the training before


def start_training(folder, *options):
    return subprocess.Popen(
        [sys.executable, STORY.with_name("story_llm.py"), "train", "--text", "my.txt", *TINY, *options],
        env={**bare_environment(folder, closed_port()), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"},
        cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_for(process, words):
    for line in process.stdout:
        if words in line:
            return
    pytest.fail(f"it ended before: {process.communicate()[1]}")


def test_a_real_ctrl_c_in_a_real_process_saves_and_resume_finishes(folder, run):
    process = start_training(folder, "--epochs", "600", "--eval-every", "100")
    wait_for(process, "Step 000100")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "--resume" in err and "Traceback" not in err
    stopped = load_checkpoint(folder / "story_llm.pt")
    assert 100 <= stopped.step < stopped.total_steps
    epochs = stopped.step // stopped.steps_per_epoch + 2
    assert run("train", "--text", "my.txt", *TINY, "--eval-every", "100", "--epochs", epochs, "--resume")[0] == 0
    assert load_checkpoint("story_llm.pt").step == epochs * stopped.steps_per_epoch


def test_kill_9_leaves_the_last_checkpoint_whole_and_the_next_run_no_litter(folder, run):
    process = start_training(folder, "--epochs", "5000", "--eval-every", "1")
    wait_for(process, "Step 000040")
    process.kill()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert load_checkpoint(folder / "story_llm.pt").step > 0
    assert run("train", "--text", "my.txt", *TINY)[0] == 0
    assert sorted(os.listdir()) == ["loss.png", "my.txt", "story_llm.pt"]


def test_resume_without_a_checkpoint_is_one_line(folder, run):
    assert_one_line_error(run("train", "--text", "my.txt", *TINY, "--resume"), "story_llm.pt")


@pytest.mark.parametrize("option, value, name", [("--text", "other.txt", "text"), ("--tokenizer", "story", "tokenizer"),
                                                 ("--emb-dim", "64", "emb_dim"), ("--position", "rotary", "position"),
                                                 ("--learning-rate", "0.5", "learning_rate"), ("--seed", "9", "seed")])
def test_resuming_with_anything_changed_is_refused_with_the_difference(folder, trained, run, option, value, name):
    (folder / "other.txt").write_text(TEXT.replace("boat", "raft"))
    before = (folder / "story_llm.pt").read_bytes()
    assert_one_line_error(run("train", "--text", "my.txt", *TINY, "--resume", option, value), name)
    assert (folder / "story_llm.pt").read_bytes() == before


def test_resuming_with_more_epochs_goes_on(folder, trained, run):
    before = load_checkpoint("story_llm.pt").step
    assert run("train", "--text", "my.txt", *TINY, "--resume", "--epochs", "6")[0] == 0
    assert load_checkpoint("story_llm.pt").step == before * 6 // 4


# others

def test_a_damaged_checkpoint_is_one_line_for_every_command(folder, trained, run):
    content = bytearray((folder / "story_llm.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "story_llm.pt").write_bytes(content)
    for command in (["generate"], ["plot"], ["evaluate", "--text", "my.txt"],
                    ["train", "--text", "my.txt", *TINY, "--resume"]):
        assert_one_line_error(run(*command), "story_llm.pt")


def test_a_reader_that_stops_reading_is_no_traceback(folder):
    """As in `python story_llm.py | head -1`."""
    program = [sys.executable, STORY.with_name("story_llm.py")]
    process = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    err = process.stderr.read().decode()
    assert process.wait(60) in (0, 1, 141) and "Traceback" not in err and "Exception ignored" not in err


def test_importing_runs_and_prints_nothing_and_needs_no_matplotlib(folder):
    program = "import sys, story_llm; print('matplotlib' in sys.modules, 'tiktoken' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60,
                          env=bare_environment(folder, closed_port()))
    assert (done.stdout, done.stderr, done.returncode) == ("False False\n", "", 0)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_on_a_terminal_text_cannot_send_control_sequences_and_in_a_pipe_it_is_left_alone():
    evil = "a\x1b[31mred\x1b]0;title\x07\x9b2J\r\x08b\tc\nd"
    terminal, pipe = Terminal(), io.StringIO()
    story_llm.log(evil, file=terminal)
    story_llm.log(evil, file=pipe)
    assert not set(terminal.getvalue()) & {chr(i) for i in (*range(32), *range(127, 160))} - {"\t", "\n"}
    assert re.sub("[\ufffd]", "", terminal.getvalue()) == "a[31mred]0;title2Jb\tc\nd\n"
    assert pipe.getvalue() == evil + "\n"


def test_text_that_the_terminal_cannot_show_is_no_traceback(folder):
    (folder / "story.txt").write_text("“Thāmarai — 天地 😀,” said the king to the old one.\n" * 3, encoding="utf-8")
    done = subprocess.run([sys.executable, story_llm.__file__, "words", "--text", "story.txt"], capture_output=True,
                          env={**os.environ, "PYTHONIOENCODING": "ascii"}, cwd=folder)
    assert done.returncode == 0 and b"king" in done.stdout and b"Traceback" not in done.stderr


# going on, and what is meant when nothing is said

def test_going_on_takes_again_what_a_short_text_took_away(folder, run):
    (folder / "short.txt").write_text("Only a few words stand in this very short text.", encoding="utf-8")
    command = ["train", "--text", "short.txt", *TINY, "--context-length", "40", "--val-fraction", "0.3"]
    assert run(*command)[0] == 0
    assert load_checkpoint("story_llm.pt").config.context_length < 40
    status, _, err = run(*command, "--epochs", "200", "--resume")
    assert (status, err) == (0, "") and load_checkpoint("story_llm.pt").step > 150
    assert_one_line_error(run(*command, "--context-length", "5", "--resume"), "context_length", "5")


def test_epochs_given_on_resume_replace_the_steps_that_it_was_begun_with(folder, run):
    command = ["train", "--text", "my.txt", *TINY]
    assert run(*command, "--max-steps", "2")[0] == 0 and load_checkpoint("story_llm.pt").step == 2
    assert run(*command, "--resume")[0] == 0 and load_checkpoint("story_llm.pt").step == 12  # 4 epochs of 3 steps
    assert run(*command, "--resume", "--max-steps", "15")[0] == 0 and load_checkpoint("story_llm.pt").step == 15


def test_a_model_that_is_named_must_be_there(folder, trained, run):
    assert "untrained" in run("evaluate", "--text", "my.txt", "--untrained")[1]
    assert_one_line_error(run("evaluate", "--text", "my.txt", "--model", "typo.pt"), "typo.pt")


def test_evaluating_gives_the_losses_that_training_ended_with(folder, run):
    assert run("train", "--text", "my.txt", *TINY, "--precision", "bf16")[0] == 0
    last = load_checkpoint("story_llm.pt").history[-1]
    out = run("evaluate", "--text", "my.txt")[1]
    assert re.search(r"Train loss +([\d.]+)", out)[1] == f"{last['train_loss']:.3f}"
    assert re.search(r"Val loss +([\d.]+)", out)[1] == f"{last['val_loss']:.3f}"


def test_without_a_prompt_the_model_goes_on_from_its_own_text(folder, trained, run):
    assert run("generate", "--max-new-tokens", "1")[1].startswith(PROMPT)


def test_a_package_that_is_missing_is_named_with_the_remedy(folder, trained, run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert_one_line_error(run("plot"), "matplotlib", "requirements.txt")


def test_a_reader_that_has_seen_enough_is_no_error(folder):
    process = subprocess.Popen([sys.executable, STORY.with_name("story_llm.py"), "bpe", "--text", "my.txt", "--tokenizer",
                                "word"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=folder)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(timeout=60) == 1
