"""The command line: what each command prints and writes, and what it refuses, in which words."""
import contextlib
import hashlib
import io
import os
import re
import struct
import subprocess
import sys
import threading
import zipfile
from dataclasses import fields

import pytest
import torch
from helpers import PROGRAM, ROOT, STORY, TEXT, story_llm, tiny, weights_equal

from story_llm import COMMANDS, FIELDS, GPTConfig, Sampling, TrainConfig, load_checkpoint

PROMPT = "The old ferryman tied his"
ALWAYS = {name: options.split() for name, (_, _, options, _) in COMMANDS.items()}
IF_UNTRAINED = {name: [option for option in options.split() if option not in ALWAYS[name]]
                for name, (_, _, _, options) in COMMANDS.items()}


def option(name, value=None):
    """The words of an option on a command line, with its default unless there is a value."""
    f = FIELDS[name]
    words = ["--" + name.replace("_", "-")]
    if f.type is bool:
        return words
    if value is None:
        value = f.default if f.default is not None else "x.png" if name == "plot" else "The"
    return [*words, str(value)]


def assert_one_line_error(result, *names):
    """Exit status 1 or 2, nothing on stdout but what came before, and an error that names the value."""
    status, out, err = result
    assert status in (1, 2) and "Traceback" not in out + err
    line = err.strip().splitlines()[-1]
    assert "error: " in line and (status == 2 or sum("error: " in line for line in err.splitlines()) == 1), err
    assert not any(name not in line for name in names), line
    return line


@pytest.fixture
def idle(monkeypatch):
    """Commands that do nothing but note what they were asked for."""
    reached = []
    monkeypatch.setattr(story_llm, "COMMANDS", {name: (reached.append, *rest) for name, (_, *rest) in COMMANDS.items()})
    monkeypatch.setattr(story_llm, "command_map", reached.append)
    return reached


# help and usage

def test_the_map_lists_the_13_steps_each_with_its_command(call):
    status, out, err = call()
    rows = re.findall(r"^ *(\d+)  (\S.*?)  +python story_llm\.py ?([a-z]*)", out, re.MULTILINE)
    assert (status, err) == (0, "") and [int(number) for number, *_ in rows] == list(range(1, 14))
    assert {command for *_, command in rows} - {""} <= COMMANDS.keys() and all(title for _, title, _ in rows)
    assert "tour" in out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_exactly_its_options(call, command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    status, out, err = call(command, "--help")
    shown = set(re.findall(r"^  (?:-h, )?--([a-z][a-z-]*)", out, re.MULTILINE))
    assert (status, err) == (0, "")
    assert shown == {"help"} | {name.replace("_", "-") for name in ALWAYS[command] + IF_UNTRAINED[command]}


@pytest.mark.parametrize("settings, command", [(GPTConfig, "train"), (TrainConfig, "train"), (Sampling, "generate")])
def test_every_setting_is_an_option_with_its_default_in_the_help(call, settings, command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    words = " ".join(call(command, "--help")[1].split())
    for f in fields(settings):
        if f.name != "vocab_size":      # the tokenizer says
            default = "" if f.type is bool else rf".*?\({re.escape(str(f.default))}\)"
            assert re.search(rf"--{f.name.replace('_', '-')} {default}", words), f.name


@pytest.mark.parametrize("arguments", [
    ["tray"], ["train", "--no-such-option"], ["generate", "--temperature", "warm"], ["train", "extra"],
    ["train", "--epoch", "3"], ["generate", "--top-k"], ["--train"], ["plot", "--model"]])
def test_wrong_usage_is_status_2_with_the_value_named(folder, call, arguments):
    status, out, err = call(*arguments)
    assert (status, out) == (2, "") and arguments[min(1, len(arguments) - 1)] in err and "Traceback" not in err
    assert os.listdir() == ["my.txt"]


@pytest.mark.parametrize("command", COMMANDS)
def test_an_option_that_a_command_cannot_use_is_refused_with_status_2(call, idle, command):
    others = set(FIELDS) - {*ALWAYS[command], *IF_UNTRAINED[command]}
    assert others
    for name in others:
        status, out, err = call(command, *option(name))
        assert (status, out) == (2, "") and option(name)[0] in err, name
    assert idle == []


@pytest.mark.parametrize("command", [command for command in COMMANDS if IF_UNTRAINED[command]])
def test_settings_of_a_saved_model_are_refused_with_status_2_unless_untrained(call, idle, command):
    for name in IF_UNTRAINED[command]:
        status, out, err = call(command, *option(name))
        assert (status, out) == (2, "") and option(name)[0] in err and "--untrained" in err, name
    assert idle == []
    everything = [word for name in IF_UNTRAINED[command] for word in option(name)]
    assert call(command, "--untrained", *everything) == (0, "", "") and len(idle) == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_that_a_command_has_reaches_it(call, idle, command):
    for name in ALWAYS[command]:
        assert call(command, *option(name)) == (0, "", ""), name
        assert name in idle[-1].given


@pytest.mark.parametrize("wish", [["--temperature", "5"], ["--top-k", "3", "--temperature", "5"], ["--model", "no.pt"]])
def test_what_an_untrained_model_cannot_do_is_refused_or_done(folder, call, small, wish):
    """It generates greedily and from no file: chance must be refused, or change the text."""
    plain = call(*small("generate"), "--prompt", PROMPT, "--max-new-tokens", "20")
    status, out, err = call(*small("generate"), "--prompt", PROMPT, "--max-new-tokens", "20", *wish)
    assert plain[0] == 0 and (status == 2 or out != plain[1]), "accepted, and of no effect"


def test_the_given_options_of_untrained_models_are_used(folder, call, small):
    out = call(*small("model"), "--n-layers", "3", "--position", "rotary", "--emb-dim", "24")[1]
    assert "n_layers=3" in out and "position='rotary'" in out and "(2, 12, 24)" in out


# before and after training

def test_every_command_works_before_training_or_says_in_one_line_what_is_missing(folder, call, small):
    for command in ("words", "bpe", "windows", "model", "evaluate", "generate", "next"):
        more = ["--prompt", PROMPT] if command in ("generate", "next") else []
        status, out, err = call(*small(command, *more))
        assert status == 0 and out and "error" not in err and "nan" not in out.lower(), command
    for command in ("plot", "generate", "attention", "next", "evaluate"):
        more = ["--text", "my.txt"] if command == "evaluate" else []
        assert "train" in assert_one_line_error(call(command, *more), "story_llm.pt")
    assert os.listdir() == ["my.txt"]


def test_untrained_generation_goes_on_from_the_prompt(folder, call, small):
    status, out, err = call(*small("generate", "--prompt", PROMPT, "--max-new-tokens", "4"))
    run, _ = story_llm.untrained(story_llm.parse(small("generate")))
    assert (status, err) == (0, "") and out.startswith(PROMPT)
    assert len(run.tokenizer.encode(out.removesuffix("\n"))) == len(run.tokenizer.encode(PROMPT)) + 4


def test_training_tells_its_progress_and_recall_and_writes_its_two_files(folder, trained_here):
    assert re.search(r"^Ep 1 \(Step 000000\): Train loss \d\.\d{3}, Val loss \d\.\d{3}", trained_here, re.MULTILINE)
    assert re.search(r"^Recall \d+\.\d%: \d+ of \d+ sentences", trained_here, re.MULTILINE)
    assert sorted(os.listdir()) == ["loss.png", "my.txt", "story_llm.pt"]


@pytest.mark.parametrize("step, epoch", [(0, 1), (1, 1), (9, 1), (10, 2), (36, 4), (180, 20)])
def test_an_evaluation_names_the_epoch_of_the_last_step(capsys, step, epoch):
    run, _ = tiny()
    run.step, run.steps_per_epoch, run.total_steps = step, 9, 180
    run.history = [story_llm.Evaluation(step, step / 9, 0, 1.0, None, None, "", "")]
    story_llm.log_evaluation(run, "")
    assert capsys.readouterr().out.startswith(f"Ep {epoch} (Step {step:06})")


def test_every_command_works_after_training(folder, trained_here, call):
    text = ["--text", "my.txt"]
    for command in ("words", "bpe", "windows", "model", "evaluate", "plot", "generate", "attention", "next"):
        options = {"plot": [], "generate": ["--prompt", PROMPT], "next": [], "attention": []}.get(command, text)
        status, out, err = call(command, *options)
        assert status == 0 and out and "error" not in err and "nan" not in out.lower(), command


def test_windows_are_as_far_apart_as_their_stride(folder, call, small):
    rows = [re.findall(r"^  input +(.*)", call(*small("windows"), *stride)[1], re.MULTILINE)
            for stride in ([], ["--stride", "1"])]
    pieces = [re.split(r" {2,}", row) for row in rows[1]]
    assert pieces[0][1:] == pieces[1][:-1] and pieces[1][1:] == pieces[2][:-1]
    assert rows[0][0] == rows[1][0] and rows[0][1] != rows[1][1]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_evaluate_shows_what_training_showed_last(folder, call, small, precision):
    out = call(*small("train"), "--precision", precision)[1]
    last = load_checkpoint("story_llm.pt").history[-1]
    status, shown, err = call("evaluate", "--text", "my.txt")
    assert (status, err) == (0, "")
    assert re.search(r"Train loss +([\d.]+)", shown)[1] == f"{last.train_loss:.3f}"
    assert re.search(r"Val loss +([\d.]+)", shown)[1] == f"{last.val_loss:.3f}"
    assert re.search(r"^Recall .*", out, re.MULTILINE).group() in shown


def test_evaluating_with_another_text_is_noted(folder, trained_here, call):
    (folder / "other.txt").write_text(TEXT.replace("boat", "raft"))
    status, _, err = call("evaluate", "--text", "other.txt")
    assert status == 0 and "another text" in err and err.count("\n") == 1


def test_a_model_that_is_named_must_be_there(folder, trained_here, call, small):
    assert "untrained" in call(*small("evaluate"))[1]
    assert_one_line_error(call("evaluate", "--text", "my.txt", "--model", "typo.pt"), "typo.pt")


def test_generate_writes_prompt_and_continuation_to_stdout_and_nothing_else(folder, trained_here, call):
    saved = load_checkpoint("story_llm.pt")
    expected = PROMPT + "".join(story_llm.generate_text(saved.model, saved.tokenizer, PROMPT, 12)) + "\n"
    assert call("generate", "--prompt", PROMPT, "--max-new-tokens", 12) == (0, expected, "")


def test_without_a_prompt_each_line_of_stdin_is_one(folder, trained_here, call, monkeypatch):
    expected = "".join(call("generate", "--prompt", prompt, "--max-new-tokens", 5)[1] for prompt in (PROMPT, "At night"))
    for typed in (f"{PROMPT}\n\n  \nAt night\n", f"{PROMPT}\r\nAt night"):
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        assert call("generate", "--max-new-tokens", 5) == (0, expected, "")
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert call("generate") == (0, "", "")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"At \xff night"), encoding="utf-8"))
    assert call("generate", "--max-new-tokens", 0) == (0, "At \ufffd night\n", "")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"read already\nAt night\n"), encoding="utf-8"))
    assert sys.stdin.readline() == "read already\n"
    assert call("generate", "--max-new-tokens", 0) == (0, "At night\n", "")


@pytest.mark.parametrize("typed", [f"{PROMPT}\nAt night\n\nThe boy\n", f"{PROMPT}\nAt night\n\x04"])
def test_on_a_terminal_prompts_are_asked_for_until_an_empty_line_or_ctrl_d(folder, trained_here, call, typed):
    pty = pytest.importorskip("pty")
    master, terminal = pty.openpty()
    os.write(master, typed.encode())
    with open(terminal, encoding="utf-8") as stdin, pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(sys, "stdin", stdin)
        status, out, err = call("generate", "--max-new-tokens", 5)
    os.close(master)
    expected = "".join(call("generate", "--prompt", prompt, "--max-new-tokens", 5)[1] for prompt in (PROMPT, "At night"))
    assert (status, out) == (0, expected) and err.count("first words") == err.count("\n") == 1


def test_generation_by_chance_depends_on_the_seed(folder, trained_here, call):
    texts = [call("generate", "--prompt", PROMPT, "--temperature", 2, "--seed", seed)[1] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("command, wish", [("generate", ["--top-k", "3"]), ("generate", ["--top-p", "0.5"]),
                                           ("generate", ["--seed", "1"]), ("generate --untrained", ["--top-k", "3"])])
def test_what_is_for_chance_is_refused_where_nothing_is_left_to_chance(folder, trained_here, call, small, command, wish):
    command = small("generate") if "untrained" in command else ["generate"]
    for temperature, right in ([], False), (["--temperature", "0"], False), (["--temperature", "1"], True):
        result = call(*command, "--prompt", PROMPT, *wish, *temperature)
        if right:
            assert result[0] == 0 and result[2] == ""
        else:
            assert_one_line_error(result, wish[0], "--temperature")
    assert command == ["generate"] or call(*command, "--prompt", PROMPT, "--seed", "1")[0] == 0      # of the weights


@pytest.mark.parametrize("wish", [["--temperature", "1e-300"], ["--temperature", "5", "--top-k", "1"],
                                  ["--temperature", "5", "--top-p", "1e-9"]])
def test_chance_that_leaves_one_token_is_greedy(folder, trained_here, call, wish):
    assert call("generate", "--prompt", PROMPT, *wish) == call("generate", "--prompt", PROMPT)


def test_the_same_command_makes_the_same_weights(folder, trained_here, call, small):
    assert call(*small("train"), "--model", "again.pt")[0] == 0
    assert weights_equal(load_checkpoint("story_llm.pt").model, load_checkpoint("again.pt").model)


def test_the_prompt_of_training_is_continued_at_evaluations_and_afterwards(folder, call, small):
    out = call(*small("train"), "--prompt", "At night a boy")[1]
    assert len(re.findall(r"^    At night a boy \.\.\.", out, re.MULTILINE)) == out.count("Train loss") > 1
    assert load_checkpoint("story_llm.pt").prompt == "At night a boy"


# pictures, and looking inside

def png_size(path):
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", content[16:24])


def test_plot_draws_where_it_is_told(folder, trained_here, call):
    assert call("plot", "--plot", "curve.svg") == (0, "drew curve.svg\n", "")
    assert (folder / "curve.svg").read_text(encoding="utf-8").startswith("<?xml")


def test_attention_is_drawn_and_told(folder, trained_here, call):
    assert call("attention", "--prompt", "The old ferryman") == (0, "drew attention.png\n", "")
    assert min(png_size(folder / "attention.png")) > 200
    for mistake in (["--plot", "x.txt"], ["--prompt", ""], ["--plot", "nowhere/x.png"]):
        assert_one_line_error(call("attention", *mistake))


def test_characters_that_no_font_has_are_one_note(folder, trained_here, call):
    status, _, err = call("attention", "--prompt", "The 漢字 ferryman")
    assert status == 0 and err.count("\n") <= 1      # a word model knows neither of them


def test_next_shows_ten_tokens_and_their_chances_before_and_after_training(folder, trained_here, call, small):
    for command in (["next"], small("next")):
        status, out, err = call(*command, "--prompt", "The old", "--temperature", "0.5", "--top-k", "3")
        rows = re.findall(r"^  \S+ +-?[\d.]+ +([\d.]+)% +([\d.]+)%", out, re.MULTILINE)
        assert (status, err, len(rows)) == (0, "", 10) and [row[1] for row in rows[3:]] == ["0.00"] * 7
        assert sum(float(row[1]) for row in rows) == pytest.approx(100, abs=0.1)
        assert [float(row[0]) for row in rows] == sorted([float(row[0]) for row in rows], reverse=True)


@pytest.mark.parametrize("wrong", [["--temperature", "-1"], ["--temperature", "nan"], ["--top-k", "-1"],
                                   ["--top-p", "-0.5"], ["--prompt", ""]])
def test_wrong_wishes_for_the_next_token_are_refused(folder, trained_here, call, wrong):
    assert_one_line_error(call("next", "--prompt", "The", *wrong))


# no network, default tokenizer

@pytest.mark.parametrize("command", ["bpe", "windows", "model", "evaluate"])
def test_without_network_and_files_commands_work_with_a_learned_tokenizer_and_one_line(folder, call, small, command):
    status, out, err = call(*small(command, "--tokenizer", "auto", "--text", STORY))
    assert status == 0 and out and len(err.splitlines()) == 1 and "--tokenizer gpt2" in err


def test_without_network_and_files_the_real_story_is_trained_on_and_continued(folder, call, small):
    status, out, err = call(*small("train", "--text", STORY, "--tokenizer", "auto", "--max-steps", "3"))
    assert status == 0 and len(err.splitlines()) == 1 and "--tokenizer gpt2" in err
    assert re.match(r"story tokenizer, vocabulary [12],\d{3};", out)
    status, out, err = call("generate", "--prompt", "Once Aadhan", "--max-new-tokens", "3")
    assert (status, err) == (0, "") and out.startswith("Once Aadhan")


def test_without_network_and_files_gpt2_by_name_is_an_error_that_tells_how_to_get_it(folder, call):
    status, out, err = call("train", "--text", "my.txt", "--tokenizer", "gpt2")
    assert (status, out) == (1, "") and err.startswith("error: ") and "TIKTOKEN_CACHE_DIR" in err
    assert "6d1cbeee0f20b3d9449abfede4726ed8212e3aee" in err and "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6" in err


# wrong values

@pytest.mark.parametrize("name, value", [
    ("--emb-dim", "0"), ("--emb-dim", "-8"), ("--emb-dim", "33"), ("--emb-dim", "x"), ("--emb-dim", "nan"),
    ("--emb-dim", "1000000000000"), ("--emb-dim", "1" + "0" * 30), ("--n-heads", "0"), ("--n-heads", "5"),
    ("--n-layers", "0"), ("--n-layers", "1000000000"), ("--n-layers", "1.5"), ("--context-length", "0"),
    ("--context-length", "-3"), ("--drop-rate", "1"), ("--drop-rate", "nan"), ("--drop-rate", "-0.1"),
    ("--position", "none"), ("--epochs", "-1"), ("--epochs", "nan"), ("--max-steps", "-1"), ("--batch-size", "0"),
    ("--batch-size", "1000000000000"), ("--learning-rate", "0"), ("--learning-rate", "nan"),
    ("--learning-rate", "inf"), ("--learning-rate", "-1"), ("--warmup-steps", "-1"), ("--weight-decay", "-1"),
    ("--weight-decay", "nan"), ("--grad-clip", "0"), ("--openings", "1"), ("--openings", "nan"),
    ("--val-fraction", "1"), ("--val-fraction", "-0.5"), ("--eval-every", "-1"), ("--precision", "fp8"),
    ("--seed", "-1"), ("--seed", "1" + "0" * 30), ("--tokenizer", "bytes"), ("--preset", "huge"),
    ("--device", "abacus"), ("--text", "missing.txt"), ("--text", "."), ("--model", "nowhere/story.pt"),
    ("--model", "."), ("--plot", "loss.xyz"), ("--plot", "nowhere/loss.png")])
def test_a_wrong_value_for_training_is_one_line_that_names_it(folder, call, small, name, value):
    result = call(*small("train", name, value))
    assert_one_line_error(result, value if value != "." else "folder" if name != "--text" else "file")
    assert "Step" not in result[1] and os.listdir() == ["my.txt"]      # noticed before the training, not after


@pytest.mark.parametrize("name", [name for name, f in FIELDS.items() if f.metadata["at_least"] is not None])
def test_every_number_beyond_its_limits_is_one_line_that_names_option_and_value(folder, call, small, name):
    command = next(command for command in ("train", "next", "generate", "windows")
                   if name in ALWAYS[command] + IF_UNTRAINED[command])
    number, below = FIELDS[name].type, FIELDS[name].metadata["below"]
    wrong = [number(FIELDS[name].metadata["at_least"] - 1), "x", *(["nan", "inf"] if number is float else ["0.5"])]
    for value in wrong + [below] * (below < float("inf")):
        tokenizer = ["--tokenizer", "story"] if name == "vocab_size" else []
        result = call(*small(command, *tokenizer, *option(name, value)))
        assert name in assert_one_line_error(result, str(value)).replace("-", "_") and "Step" not in result[1]


@pytest.mark.parametrize("size", ["256", "0", "-5"])
def test_a_vocabulary_smaller_than_all_bytes_is_one_line_that_names_it(folder, call, size):
    assert_one_line_error(call("bpe", "--text", "my.txt", "--tokenizer", "story", "--vocab-size", size), size, "257")


@pytest.mark.parametrize("options, name", [
    (["--tokenizer", "word", "--vocab-size", "300"], "--vocab-size"), (["--tokenizer", "word", "--full-vocab"], "full"),
    (["--tokenizer", "story", "--full-vocab"], "--full-vocab"), (["--full-vocab"], "--full-vocab"),
    (["--tokenizer", "gpt2", "--vocab-size", "300"], "--vocab-size"), (["--vocab-size", "300"], "--vocab-size")])
def test_what_a_tokenizer_cannot_use_or_may_not_use_is_refused(folder, call, options, name):
    assert_one_line_error(call("bpe", "--text", "my.txt", *options), name, "--tokenizer")


@pytest.mark.parametrize("name, value", [
    ("--temperature", "-1"), ("--temperature", "nan"), ("--temperature", "inf"), ("--top-k", "-1"), ("--top-k", "1.5"),
    ("--top-p", "-0.1"), ("--top-p", "nan"), ("--max-new-tokens", "-1"), ("--max-new-tokens", "1.5"), ("--prompt", ""),
    ("--device", "abacus"), ("--model", "missing.pt"), ("--model", "my.txt"), ("--model", "."), ("--model", "loss.png"),
    ("--seed", "1" + "0" * 30), ("--seed", "-1")])
def test_a_wrong_value_for_generating_is_one_line_before_the_prompt_is_printed(folder, trained_here, call, name, value):
    result = call("generate", *([] if name == "--prompt" else ["--prompt", PROMPT]), name, value)
    assert_one_line_error(result, value)
    assert result[1] == ""


@pytest.mark.parametrize("prompt", ["漢字 😀", "a\0b", "x\ud800y", "word " * 3000, "<|endoftext|>", " ", "\r\n", "-"])
def test_any_other_prompt_works_with_a_learned_tokenizer(folder, trained_on_bytes, call, prompt):
    for command in (["generate", "--max-new-tokens", 3], ["next"]):
        status, out, err = call(*command, f"--prompt={prompt}", "--model", trained_on_bytes)
        assert (status, err) == (0, "") and (len(out) >= len(prompt) or command == ["next"])


@pytest.mark.parametrize("content, name", [(b"", "empty"), (b" \n\t ", "empty"), (b"a", "short"),
                                           (b"\xff\xfeO\0n\0c\0e\0", "byte 0"), (b"\xef\xbb\xbf", "empty"),
                                           (b"Once \x93there\x94", "byte 5"), (bytes(range(256)) * 9, "byte 128")])
def test_a_text_that_cannot_be_learned_is_one_line(folder, call, small, content, name):
    (folder / "strange.txt").write_bytes(content)
    for command in ("train", "evaluate", "windows", "model"):
        assert_one_line_error(call(*small(command, "--text", "strange.txt")), name)


@pytest.mark.parametrize("content", ["Once there was a king", "Two words", "One.\r\nTwo.\r\nThree.\r\n", "😀 " * 30,
                                     "e\u0301 " * 99, "\0 \0 \0", "\x1b]0;title\x07 the king and the ferryman",
                                     "The king said one long sentence and then he went away."])
def test_a_strange_text_is_learned_from_and_no_nan_is_shown(folder, call, small, content):
    (folder / "strange.txt").write_bytes(content.encode())
    text = ["--text", "strange.txt"]
    for command in (["words", *text], small("bpe", *text, "--tokenizer", "story"), small("windows", *text),
                    small("model", *text), small("evaluate", *text), small("train", *text), ["evaluate", *text],
                    ["next"], ["generate", f"--prompt={content[:1]}", "--max-new-tokens", "5"]):
        status, out, err = call(*command)
        assert status == 0 and "nan" not in out.lower() and "error" not in err, (command, err)


def test_a_text_with_a_byte_order_mark_and_other_line_ends_is_the_same_text(folder, trained_here, call, small):
    (folder / "bom.txt").write_bytes(b"\xef\xbb\xbf" + TEXT.replace("\n", "\r\n").encode())
    assert call(*small("train", "--text", "bom.txt", "--model", "bom.pt"))[0] == 0
    assert weights_equal(load_checkpoint("story_llm.pt").model, load_checkpoint("bom.pt").model)
    assert call("evaluate", "--text", "bom.txt")[2] == ""


# what stands at --model already

def test_a_model_of_another_text_is_kept_under_another_name_with_one_line(folder, trained_here, call, small):
    before = (folder / "story_llm.pt").read_bytes()
    (folder / "other.txt").write_text(TEXT.replace("boat", "raft"))
    status, out, err = call(*small("train", "--text", "other.txt"))
    assert status == 0 and err.count("\n") == 1 and "story_llm.old.pt" in err
    assert (folder / "story_llm.old.pt").read_bytes() == before
    run = load_checkpoint("story_llm.pt")
    assert run.fingerprint != load_checkpoint("story_llm.old.pt").fingerprint and " raft" in run.tokenizer.tokens


def test_however_many_texts_are_learned_one_after_the_other_no_model_is_lost(folder, call, small):
    names, models = ["story_llm.old.pt", "story_llm.old2.pt", "story_llm.old3.pt"], []
    for number, thing in enumerate(["boat", "raft", "ship", "tub"]):
        (folder / "other.txt").write_text(TEXT.replace("boat", thing))
        status, _, err = call(*small("train", "--text", "other.txt", "--epochs", "1"))
        assert status == 0 and re.findall(r"story_llm\.old\d*\.pt", err) == names[max(0, number - 1):number]
        models.append((folder / "story_llm.pt").read_bytes())
    assert [(folder / name).read_bytes() for name in [*names, "story_llm.pt"]] == models


def test_a_model_of_the_same_text_is_replaced(folder, trained_here, call, small):
    status, _, err = call(*small("train", "--epochs", "2"))
    assert (status, err) == (0, "") and sorted(os.listdir()) == ["loss.png", "my.txt", "story_llm.pt"]
    assert load_checkpoint("story_llm.pt").train_config.epochs == 2


def test_a_file_that_is_no_model_is_not_lost_either(folder, call, small):
    (folder / "my.notes.txt").write_text("all that I know")
    status, _, err = call(*small("train", "--model", "my.notes.txt"))
    assert status == 0 and err.count("\n") == 1 and "my.notes.old.txt" in err
    assert (folder / "my.notes.old.txt").read_text() == "all that I know" and load_checkpoint("my.notes.txt").step > 0


def test_as_long_as_nothing_is_saved_nothing_is_moved(folder, trained_here, call, small):
    before = (folder / "story_llm.pt").read_bytes()
    (folder / "other.txt").write_text(TEXT.replace("boat", "raft"))
    assert_one_line_error(call(*small("train", "--text", "other.txt", "--learning-rate", "1e38")), "--learning-rate")
    assert (folder / "story_llm.pt").read_bytes() == before and not (folder / "story_llm.old.pt").exists()


@pytest.mark.parametrize("damage", [lambda content: content[:len(content) // 2], lambda content: b"",
                                    lambda content: content[:999] + bytes([content[999] ^ 1]) + content[1000:]])
def test_a_damaged_checkpoint_is_one_line_for_every_command(folder, trained_here, call, small, damage):
    (folder / "story_llm.pt").write_bytes(damage((folder / "story_llm.pt").read_bytes()))
    for command in (["generate"], ["plot"], ["next"], ["attention"], ["evaluate", "--text", "my.txt"],
                    small("train", "--resume")):
        assert_one_line_error(call(*command), "story_llm.pt")


# the tour

@pytest.fixture
def short_tour(folder, monkeypatch):
    """A tour through a small text with a small model."""
    monkeypatch.setattr(story_llm, "USUAL_EPOCHS", 0)
    monkeypatch.setattr(story_llm, "FEWEST_STEPS", 3)
    monkeypatch.setitem(story_llm.USUAL, "text", str(folder / "my.txt"))
    monkeypatch.setitem(story_llm.PRESETS, "story", GPTConfig(context_length=12, emb_dim=32, n_layers=1))


def test_the_tour_walks_all_steps_in_its_own_folder_and_touches_nothing_else(folder, call, short_tour):
    mine = {name: f"my own {name}" for name in ("story_llm.pt", "loss.png", "attention.png", "story_llm.old.pt")}
    for name, content in mine.items():
        (folder / name).write_text(content)
    status, out, err = call("tour")
    assert status == 0 and "error" not in err
    assert [int(number) for number in re.findall(r"^═══ (\d+): ", out, re.MULTILINE)][:13] == list(range(1, 14))
    commands = re.findall(r"^\$ python story_llm.py ?(.*)$", out, re.MULTILINE)
    names = {command.split()[0] for command in commands if command}
    assert {"train", "generate", "attention", "words", "bpe", "windows", "model", "plot"} <= names
    assert sorted(os.listdir()) == sorted(["my.txt", "story_llm_tour", *mine]) and os.getcwd() == str(folder)
    assert all((folder / name).read_text() == content for name, content in mine.items())
    assert load_checkpoint("story_llm_tour/story_llm.pt").step == 3
    for name in ("loss.png", "attention.png"):
        assert min(png_size(folder / "story_llm_tour" / name)) > 200


def test_a_step_of_the_tour_that_fails_ends_it(folder, call, monkeypatch):
    monkeypatch.setitem(story_llm.USUAL, "text", "missing.txt")
    status, out, err = call("tour")
    assert status == 1 and "missing.txt" in err and err.count("\n") == 1 and os.getcwd() == str(folder)


# others

def test_a_reader_that_stops_reading_is_no_traceback(folder):
    """As in `python story_llm.py | head -1`."""
    process = subprocess.Popen([sys.executable, PROGRAM, "bpe", "--text", "my.txt", "--tokenizer", "word"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=folder)
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) in (0, 1, 141)
    assert not any(words in err for words in (b"error", b"Error", b"Traceback", b"ignored")), err


def test_importing_runs_and_prints_nothing_and_needs_no_matplotlib(folder):
    program = "import sys, story_llm; print('matplotlib' in sys.modules, 'tiktoken' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert (done.stdout, done.stderr, done.returncode) == ("False False\n", "", 0)


def test_a_package_that_is_missing_is_named_with_the_remedy(folder, trained_here, call, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert_one_line_error(call("plot"), "matplotlib", "requirements.txt")


@pytest.mark.parametrize("words", ["[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you "
                                   "tried to allocate 68719476736 bytes.", "CUDA out of memory. Tried to allocate 2 GiB"])
def test_too_little_memory_is_one_line_and_another_fault_of_torch_is_not_hidden(folder, call, small, monkeypatch, words):
    def fail(config, seed):
        raise RuntimeError(words)
    monkeypatch.setattr(story_llm, "new_model", fail)
    assert_one_line_error(call(*small("train")), "too little memory", "--batch-size")
    words = "The size of tensor a must match the size of tensor b"
    with pytest.raises(RuntimeError, match="must match"):
        call(*small("train"))


@pytest.mark.parametrize("mistake", [ImportError("No module named 'tiktoken'"), torch.OutOfMemoryError("out of memory")])
def test_what_is_not_the_fault_of_a_checkpoint_is_not_said_of_it(folder, trained_here, call, monkeypatch, mistake):
    def fail(state):
        raise mistake
    monkeypatch.setattr(story_llm, "tokenizer_from", fail)
    assert "damaged" not in assert_one_line_error(call("generate", "--prompt", "The"), "tiktoken" if isinstance(
        mistake, ImportError) else "memory")


def test_streams_that_are_closed_are_no_error(folder, trained_here, small):
    """As after <&- or 2>&- in a shell: Python has None for them."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in ("stdin", "stdout", "stderr"):
            monkeypatch.setattr(sys, name, None)
        statuses = [story_llm.main(command) for command in (["generate"], ["words", "--text", "my.txt"], ["words", "-x"],
                                                            ["words", "--text", "no"], small("train"))]
        for name in ("stdin", "stdout", "stderr"):
            getattr(sys, name).close()
    assert statuses == [0, 0, 2, 1, 0]


def test_a_folder_with_a_percent_sign_in_its_name_is_no_error(call, monkeypatch):
    monkeypatch.setattr(FIELDS["text"], "default", "/My%20stories/100%/%s.txt")
    status, out, err = call("train", "--help")
    assert (status, err) == (0, "") and "/My%20stories/100%/%s.txt" in out


def test_text_that_the_terminal_cannot_show_is_no_error(folder, run_program):
    (folder / "story.txt").write_text("“Thāmarai — 天地 😀,” said the king to the old one.\n" * 3, encoding="utf-8")
    done = run_program(folder, "words", "--text", "story.txt", PYTHONUTF8="0", PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and "said" in done.stdout and "rror" not in done.stderr


# the terminal

class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_on_a_terminal_text_cannot_send_control_sequences_and_in_a_pipe_it_is_left_alone():
    evil = "a\x1b[31mred\x1b]0;title\x07\x9b2J\r\x08b\tc\nd"
    terminal, pipe = Terminal(), io.StringIO()
    story_llm.log(evil, file=terminal)
    story_llm.log(evil, file=pipe)
    assert not set(terminal.getvalue()) & {chr(i) for i in (*range(32), *range(127, 160))} - {"\t", "\n"}
    assert terminal.getvalue().replace("\ufffd", "") == "a[31mred]0;title2Jb\tc\nd\n"
    assert pipe.getvalue() == evil + "\n"


def on_a_terminal(*commands):
    """All that the commands write if stdout and stderr are a terminal."""
    pty = pytest.importorskip("pty")      # not on Windows
    master, terminal = pty.openpty()
    output = []

    def read():
        with contextlib.suppress(OSError):      # the other end is closed
            while output.append(os.read(master, 1000)) or output[-1]:
                pass

    reader = threading.Thread(target=read)
    reader.start()
    with open(terminal, "w", encoding="utf-8") as shown:
        with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
            for command in commands:
                story_llm.main(command)
    reader.join(timeout=60)
    os.close(master)
    return b"".join(output).decode()


EVIL = "\x1b[31m\x1b]0;title\x07\x9b2J\x08"


def assert_harmless(output):
    output = output.replace("\r\n", "\n").replace("\x1b[K\r", "")      # the live line's own
    assert len(output) > 50 and not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", output), repr(output)


def test_no_text_and_no_prompt_can_steer_the_terminal(folder, small):
    (folder / "evil.txt").write_text(f"{EVIL} {TEXT} {EVIL}", encoding="utf-8")
    text = ["--text", "evil.txt"]
    assert_harmless(on_a_terminal(
        ["words", *text, "--prompt", EVIL], small("bpe", *text, "--tokenizer", "story", "--prompt", EVIL),
        small("windows", *text), small("train", *text, "--epochs", "1"), ["evaluate", *text], ["next"],
        ["generate", "--prompt", EVIL], ["generate", "--prompt", f"a{EVIL}b"]))


def test_no_name_and_no_file_can_steer_the_terminal_through_an_error(folder, small):
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:      # a checkpoint, all in order but for a name in it
        file.writestr("archive/data.pkl", b"\x80\x02cos\n\x1b]0;title\x07\n.")
    content = archive.getvalue()
    (folder / "evil.pt").write_bytes(content + hashlib.sha256(content).digest())
    assert_harmless(on_a_terminal(["generate", "--model", "evil.pt"]))
    assert_harmless(on_a_terminal(small("evaluate", "--text", EVIL)))


def screen(output):
    """The lines that a terminal shows, which knows a line break, a return and "erase the rest of the line"."""
    rows, column = [""], 0
    for part in re.findall(r"\x1b\[K|[^\r\n\x1b]+|[\r\n]", output):
        if part == "\n":
            rows.append("")
        elif part == "\x1b[K":
            rows[-1] = rows[-1][:column]
        elif part != "\r":
            rows[-1] = rows[-1][:column].ljust(column) + part + rows[-1][column + len(part):]
        column = 0 if part in ("\r", "\n") else column + len(part) * (part != "\x1b[K")
    return [row.rstrip() for row in rows]


def test_a_line_moves_on_a_terminal_and_leaves_the_log_as_it_is_elsewhere(folder, call, small):
    shown = on_a_terminal(small("train"))
    _, out, err = call(*small("train"))
    live = re.findall(r"(step \d+ of 12[^\r\n]*?)\x1b\[K\r", shown)
    assert err == "" and len(live) >= 3 and all(len(line) < 80 for line in live)
    without_speed = [re.sub(r", [\d,]+ tokens/s.*", "", line) for line in screen(shown)]
    assert without_speed == [re.sub(r", [\d,]+ tokens/s.*", "", line).rstrip() for line in out.split("\n")]
