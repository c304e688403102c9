"""The command line: what each command prints and writes, what it refuses, and that its words are true."""
import contextlib
import dataclasses
import io
import math
import os
import re
import shlex
import subprocess
import sys
import threading
import zipfile

import pytest
import torch
from helpers import PROGRAM, STORY, TEXT, story_llm, train_to, weights_equal

from story_llm import COMMANDS, FIELDS, NEW_MODEL, load_checkpoint, save_checkpoint

pytestmark = pytest.mark.usefixtures("quick_pictures")
PROMPT = "The old ferryman tied his"
ALWAYS = {name: tuple(dict.fromkeys(options)) for name, (_, _, options) in COMMANDS.items()}
USES_A_MODEL = ("evaluate", "generate", "next")
IF_UNTRAINED = {name: tuple(option for option in NEW_MODEL if name in USES_A_MODEL and option not in ALWAYS[name])
                for name in COMMANDS}


def option(name, value=None):
    """The words of an option on a command line, with its default unless there is a value."""
    words, default = [story_llm.option_string(name)], FIELDS[name].default
    if FIELDS[name].type is bool:
        return words
    default = default[0] if isinstance(default, tuple) else default
    return [*words, str(default if value is None else value)]


def assert_one_line_error(result, *names):
    """Exit status 1 or 2, no traceback, and one line of an error, the last one, that contains the names."""
    status, out, err = result
    assert status in (1, 2) and "Traceback" not in out + err
    line = err.strip().splitlines()[-1]
    assert line.startswith("error: ") and err.count("error: ") == 1, err
    assert not any(name not in line for name in names), line
    return line


@pytest.fixture
def idle(monkeypatch):
    """Commands that do nothing but record what they were called with."""
    reached = []
    monkeypatch.setattr(story_llm, "COMMANDS", {name: (reached.append, *rest) for name, (_, *rest) in COMMANDS.items()})
    return reached


# help and usage

def test_without_a_command_the_help_lists_all_commands_each_with_its_meaning(call, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    status, out, err = call()
    assert (status, err) == (0, "") and call("--help") == (0, out, "")
    for name, (_, meaning, _) in COMMANDS.items():
        assert re.search(rf"^    {name}\s+{re.escape(meaning)}$", out, re.MULTILINE), name


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_lists_exactly_its_options_with_meaning_and_default(call, command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    status, out, err = call(command, "--help")
    values = r"(?: (?:TEXT|N|FILE(?: \[FILE \.\.\.\])?|\{[^}]*\}))?"
    shown = {name: " ".join(words.split()) for name, words in
             re.findall(rf"^  --([a-z-]+)(?:, --no-[a-z-]+)?{values}\s+(.*)$", out, re.MULTILINE)}
    accepted = {story_llm.option_string(name)[2:]: FIELDS[name] for name in ALWAYS[command] + IF_UNTRAINED[command]}
    assert (status, err) == (0, "") and shown.keys() == accepted.keys()
    defaults = {("next", "temperature"): 1.0, ("generate", "precision"): "fp32", ("generate", "seed"): 0}
    for name, f in accepted.items():
        default = defaults.get((command, name), f.default)
        assert (command, name) in (("generate", "seed"), ("generate", "prompt")) or (
            shown[name].startswith(f.metadata["meaning"]))
        if f.type not in (bool, tuple) and default != "" and "(default: " not in f.metadata["meaning"]:
            assert f"(default: {default})" in shown[name] or default == 0 and "0: " in shown[name], name


@pytest.mark.parametrize("command, expected", [
    ("train", {"options": {"text", "model", "resume", "tokenizer", "prompt", "plot", "seed"},
               "training": {"epochs", "learning-rate", "keep-best"}, "the model": {"emb-dim", "position"}}),
    ("generate", {"options": {"model", "prompt", "max-new-tokens", "sentences", "untrained"},
                  "sampling": {"temperature", "top-k", "top-p"},
                  "only with --untrained": {"text", "emb-dim", "tokenizer", "preset"}})])
def test_the_help_groups_the_options_and_the_ones_that_one_needs_first_come_first(call, command, expected):
    out = call(command, "--help")[1]
    groups = {block.split(":\n")[0]: re.findall(r"^  --([a-z-]+)", block, re.MULTILINE) for block in out.split("\n\n")}
    groups = {title: names for title, names in groups.items() if names}
    assert list(groups)[0] == "options" and list(groups)[-1] == list(expected)[-1]
    assert {title: names & set(groups[title]) for title, names in expected.items()} == expected
    if command == "train":
        assert groups["options"][:2] == ["text", "model"]
    else:
        assert "typed" in out and "pipe" in out       # without --prompt


@pytest.mark.parametrize("arguments", [
    ["tray"], ["train", "--no-such-option"], ["generate", "--temperature", "warm"], ["train", "extra"],
    ["train", "--epoch", "3"], ["generate", "--top-k"], ["--train"], ["plot", "--model"], ["tour", "now"]])
def test_wrong_usage_is_status_2_and_one_line_that_names_the_value_and_the_help(folder, call, arguments):
    status, out, err = call(*arguments)
    assert (status, out, err.count("\n")) == (2, "", 1) and err.startswith("error: ") and "--help" in err
    assert arguments[min(1, len(arguments) - 1)] in err and os.listdir() == ["my.txt"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_that_a_command_has_reaches_it_and_all_others_are_refused_with_status_2(call, idle, command):
    for name in ALWAYS[command]:
        assert call(command, *option(name)) == (0, "", ""), name
        assert name in idle.pop().given
        if FIELDS[name].type is bool and name not in ("resume", "untrained"):
            assert call(command, option(name)[0].replace("--", "--no-", 1))[0] == 0
            assert idle.pop().given == {name: False}
    others = set(FIELDS) - {*ALWAYS[command], *IF_UNTRAINED[command]}
    for name in others:
        status, out, err = call(command, *option(name))
        assert (status, out) == (2, "") and option(name)[0] in err, name
    assert others and idle == []


@pytest.mark.parametrize("command", USES_A_MODEL)
def test_settings_of_a_new_model_need_untrained_and_a_saved_model_cannot_be_untrained(call, idle, command):
    for name in IF_UNTRAINED[command]:
        result = call(command, *option(name))
        assert_one_line_error(result, option(name)[0], "--untrained")
        assert result[:2] == (1, "")
    assert_one_line_error(call(command, "--untrained", "--model", "story_llm.pt"), "--model", "--untrained")
    assert idle == []
    everything = [word for name in IF_UNTRAINED[command] for word in option(name)]
    assert call(command, "--untrained", *everything) == (0, "", "") and len(idle) == 1


def test_what_is_wished_for_an_untrained_model_has_an_effect(folder, call, small):
    command = [*small("generate"), "--prompt", PROMPT, "--max-new-tokens", "20"]
    assert len({call(*command, *wish)[1] for wish in ([], ["--seed", "3"], ["--emb-dim", "64"])}) == 3
    out = call(*small("model"), "--n-layers", "3", "--position", "rotary", "--emb-dim", "24")[1]
    assert re.search(r"n_layers +3\b", out) and re.search(r"position +rotary\b", out) and "(2, 12, 24)" in out


# presets

def noted_options(err):
    return set(re.findall(r"--[a-z][a-z-]+", "".join(line for line in err.splitlines() if line.startswith("note: "))))


@pytest.mark.parametrize("command", ["words", "bpe", "windows", "model", "evaluate", "generate", "train"])
@pytest.mark.parametrize("tokenizer", ["word", None])
def test_a_note_names_no_option_that_the_command_would_refuse(folder, call, command, tokenizer):
    """Of a text above 60 KB, where a preset sets options that most commands do not have."""
    (folder / "long.txt").write_text("".join(f"{TEXT} {number}\n" for number in range(130)), encoding="utf-8")
    story_llm.note_once.cache_clear()
    words = [command, "--text", "long.txt", *(["--untrained"] if command in USES_A_MODEL else [])]
    words += ["--tokenizer", tokenizer] if tokenizer and command != "words" else []
    words += {"train": ["--max-steps", "1", "--batch-size", "2", "--emb-dim", "32", "--n-heads", "2"],
              "generate": ["--max-new-tokens", "1"]}.get(command, [])
    status, out, err = call(*words)
    accepted = {option(name)[0] for name in ALWAYS[command] + IF_UNTRAINED[command]}
    assert status == 0 and out and noted_options(err) <= accepted
    assert not ({"--vocab-size"} & noted_options(err) and tokenizer == "word")
    assert ("--optimizer muon" in err) == (command == "train")
    if command in ("model", "train"):
        assert "novel" in err and ("--n-heads" in err) == (command == "model")     # what the user sets is not noted


@pytest.mark.parametrize("preset", story_llm.PRESETS)
def test_every_preset_can_be_trained_and_the_users_options_come_first(folder, call, preset):
    options = ["--emb-dim", "24", "--n-heads", "2", "--n-layers", "1", "--context-length", "8", "--val-fraction", "0.3",
               "--tokenizer", "word"]
    status, out, err = call("train", "--text", "my.txt", "--preset", preset, *options, "--max-steps", "2")
    assert status == 0 and "error" not in err and f"preset {preset}" in out
    run = load_checkpoint("story_llm.pt")
    settings = {**vars(run.config), **vars(run.train_config)}
    chosen = {name: value for name, value in story_llm.preset_settings(preset, len(TEXT)).items()
              if option(name)[0] not in options and name not in ("vocab_size", "epochs")}
    assert {name: settings[name] for name in chosen} == chosen and settings["emb_dim"] == 24


# before and after training

def test_untrained_generation_continues_the_prompt(folder, call, small):
    status, out, err = call(*small("generate", "--prompt", PROMPT, "--max-new-tokens", "4"))
    run, _ = story_llm.new_run_from_args(story_llm.parse(small("generate")))
    assert (status, err) == (0, "") and out.startswith(PROMPT)
    assert len(run.tokenizer.encode(out.removesuffix("\n"))) == len(run.tokenizer.encode(PROMPT)) + 4


@pytest.mark.parametrize("step, epoch", [(0, 1), (1, 1), (9, 1), (10, 2), (36, 4), (180, 20)])
def test_an_evaluation_names_the_epoch_of_the_last_step(capsys, step, epoch):
    story_llm.log_evaluation(story_llm.Evaluation(step, step / 9, 1.0, None, None, "", ""))
    assert capsys.readouterr().out.startswith(f"Ep {epoch} (Step {step:06})")


@pytest.mark.parametrize("falls", [True, False])
def test_a_training_whose_loss_was_still_falling_names_the_command_for_a_longer_one(
        folder, call, small, monkeypatch, falls):
    losses = iter(range(900, 0, -1) if falls else range(900))
    real = story_llm.evaluate
    monkeypatch.setattr(story_llm, "evaluate", lambda *args: dataclasses.replace(real(*args), val_loss=next(losses) / 9))
    status, out, _ = call(*small("train", "--keep-best", "--val-fraction", "0.3", "--max-steps", "8", "--eval-every", "1",
                                 "--model", "my.pt"))
    assert status == 0 and ("still falling" in out) == falls
    if falls:
        run = load_checkpoint("my.pt")
        command = shlex.split(re.search(r"longer .*: python story_llm\.py (train .*)$", out, re.MULTILINE)[1])
        assert call(*command)[0] == 0
        longer = load_checkpoint("my.pt")
        twice = 2 * math.ceil(8 / run.steps_per_epoch) * run.steps_per_epoch
        assert longer.step == longer.total_steps == twice and story_llm.step_of_weights(longer) == twice


@pytest.mark.parametrize("options, kept, by_heart", [
    (["--val-fraction", "0.3"], "30%", True), (["--val-fraction", "0"], "", True), ([], "", True),   # too short
    (["--preset", "writer", "--val-fraction", "0.3", "--max-steps", "2"], "", False),
    (["--preset", "writer", "--no-keep-best", "--val-fraction", "0.3", "--max-steps", "2"], "30%", True)], ids=str)
def test_the_last_lines_of_train_are_true_and_their_command_runs_without_a_note(
        folder, call, small, options, kept, by_heart):
    status, out, _ = call(*small("train", *options))
    end = out[out.index("\nRecall"):]
    assert status == 0 and ("kept for validation" in end) == bool(kept) and kept in end
    assert ("--val-fraction 0" in end) == bool(kept) and ("--preset writer" in end) == by_heart
    assert load_checkpoint("story_llm.pt").train_config.keep_best != by_heart
    command = shlex.split(re.search(r": python story_llm\.py (generate .*)$", out.splitlines()[-1])[1])
    assert ("--temperature" in command) != by_heart
    status, _, err = call(*command, "--max-new-tokens", "3")
    assert status == 0 and (err == "" if by_heart else err.startswith("note: sampled with --seed"))


def test_windows_are_as_far_apart_as_their_stride_and_targets_are_shifted_by_one(folder, call, small):
    shown = {}
    for stride in ([], ["--stride", "1"]):
        out = call(*small("windows"), *stride)[1]
        shown[len(stride)] = [[row.split() for row in re.findall(rf"^  {name} +(.*)", out, re.MULTILINE)]
                              for name in ("input", "target")]
        inputs, targets = shown[len(stride)]
        assert len(inputs) == 3 and [row[1:] for row in inputs] == [row[:-1] for row in targets]
    (wide, _), (close, _) = shown.values()
    assert close[0][1:] == close[1][:-1] and close[1][1:] == close[2][:-1]
    assert wide[0] == close[0] and wide[1] != close[1]


# evaluate

@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_evaluate_shows_what_training_showed_last(folder, call, small, precision):
    """Without --text: the checkpoint knows which text it was trained on."""
    out = call(*small("train"), "--precision", precision, "--val-fraction", "0.3")[1]
    last = load_checkpoint("story_llm.pt").history[-1]
    status, shown, err = call("evaluate")
    assert (status, err) == (0, "note: story_llm.pt was trained on my.txt\n")
    assert re.search(r"Train loss +([\d.]+)", shown)[1] == f"{last.train_loss:.3f}"
    assert re.search(r"Val loss +([\d.]+)", shown)[1] == f"{last.val_loss:.3f}"
    assert re.search(r"^Recall .*", out, re.MULTILINE).group() in shown and f"after {last.step} steps" in shown


@pytest.mark.parametrize("trained_in, options, expected", [
    ("fp32", [], False), ("bf16", [], True), ("fp32", ["--precision", "bf16"], True),
    ("bf16", ["--precision", "fp32"], False), ("bf16", ["--precision", "auto"], False)])
def test_evaluate_computes_in_the_precision_that_is_wanted(
        folder, call, small, monkeypatch, trained_in, options, expected):
    assert call(*small("train", "--precision", trained_in, "--max-steps", "1"))[0] == 0
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {}, raising=False)      # so auto is fp32
    used, mean_loss = [], story_llm.mean_loss

    def noted(*args):
        used.append(torch.is_autocast_enabled("cpu"))
        return mean_loss(*args)
    monkeypatch.setattr(story_llm, "mean_loss", noted)
    assert call("evaluate", *options)[0] == 0
    assert set(used[1:]) == {expected}          # the first one is that of the test window


def test_a_model_trained_on_the_default_text_is_evaluated_on_it(folder, call, small):
    default = [word for word in small("train", "--max-steps", "1") if word not in ("--text", "my.txt")]
    assert call(*default)[0] == 0
    assert load_checkpoint("story_llm.pt").prompt == story_llm.DEFAULT_PROMPT
    status, out, err = call("evaluate")
    assert (status, err) == (0, "") and re.search(r"of 17\d sentences", out)


@pytest.mark.parametrize("text", ["other.txt", "my.txt"])
def test_evaluating_with_another_text_is_noted_and_the_note_names_it(folder, trained_here, call, text):
    (folder / text).write_text(TEXT.replace("boat", "raft"))
    options = [] if text == "my.txt" else ["--text", text]
    status, _, err = call("evaluate", *options)
    note = err.splitlines()[-1]
    assert status == 0 and "different text" in note and text in note


@pytest.mark.parametrize("most", [2, 5, 6, 7])
def test_recall_of_a_sample_is_said_to_be_one(folder, trained_here, call, small, monkeypatch, most):
    original = story_llm.evenly_spaced
    monkeypatch.setattr(story_llm, "RECALL_SAMPLE", most)
    monkeypatch.setattr(story_llm, "evenly_spaced", lambda items, count: original(items, min(count, most)))
    of_what = rf"of {3 if most == 5 else most} \w+ \(.*sample.* 6\) " if most < 6 else r"of 6 \w+ continued"
    assert re.search(of_what, call("evaluate")[1])
    out = call(*small("train", "--model", "new.pt"))[1]
    assert re.search(of_what, out) and (f"at most {most} beginnings" in out) == (most < 6)


# generate and next

def test_generate_writes_prompt_and_continuation_to_stdout_and_nothing_else(folder, trained_here, call):
    saved = load_checkpoint("story_llm.pt")
    expected = PROMPT + "".join(story_llm.generate_text(saved.model, saved.tokenizer, PROMPT, 12)) + "\n"
    assert call("generate", "--prompt", PROMPT, "--max-new-tokens", 12) == (0, expected, "")


def test_without_a_prompt_each_line_of_stdin_is_one(folder, trained_here, call, monkeypatch):
    expected = "".join(call("generate", "--prompt", prompt, "--max-new-tokens", 5)[1]
                       for prompt in (PROMPT, "At night"))
    for typed in (f"{PROMPT}\n\n  \nAt night\n", f"{PROMPT}\r\nAt night"):
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        assert call("generate", "--max-new-tokens", 5) == (0, expected, "")
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert call("generate") == (0, "", "")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"At \xff night"), encoding="utf-8"))
    assert call("generate", "--max-new-tokens", 0)[:2] == (0, "At \ufffd night\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"read already\nAt night\n"), encoding="utf-8"))
    assert sys.stdin.readline() == "read already\n"
    assert call("generate", "--max-new-tokens", 0) == (0, "At night\n", "")


@pytest.mark.parametrize("to_file", [False, True])
def test_on_a_terminal_generate_asks_for_prompts_until_ctrl_d_and_a_file_gets_the_texts_alone(
        folder, trained_here, call, to_file):
    pty = pytest.importorskip("pty")
    expected = "".join(call("generate", "--prompt", prompt, "--max-new-tokens", 5)[1]
                       for prompt in (PROMPT, "At night"))
    master, terminal = pty.openpty()
    os.write(master, f"{PROMPT}\n\nAt night\n\x04".encode())
    out = io.StringIO() if to_file else Terminal()
    with open(terminal, encoding="utf-8") as stdin, pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(sys, "stdin", stdin)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()) as err:
            assert story_llm.main(["generate", "--max-new-tokens", "5"]) == 0
    os.close(master)
    first, second = expected.splitlines()
    assert out.getvalue() == (expected if to_file else f"> {first}\n> > {second}\n> ")
    assert err.getvalue().count("first words") == (not to_file)


def test_sampling_depends_on_the_seed_and_without_one_names_the_seed_that_it_drew(
        folder, trained_here, call, monkeypatch):
    command = ["generate", "--prompt", PROMPT, "--temperature", 2]
    texts = [call(*command, "--seed", seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2] and all(err == "" for _, _, err in texts)
    drawn = set()
    for _ in range(4):
        status, out, err = call(*command)
        seed = re.fullmatch(r"note: sampled with --seed (\d+)\n", err)[1]
        assert status == 0 and call(*command, "--seed", seed) == (0, out, "")
        drawn.add(seed)
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{PROMPT}\n" * 3))
    seeds = re.findall(r"--seed (\d+)", call("generate", "--temperature", 2)[2])     # the same line, typed three times
    assert len(drawn) > 1 and len(seeds) == 3 and len(set(seeds)) > 1
    assert call("generate", "--prompt", PROMPT)[2] == ""


def test_settings_of_sampling_need_a_temperature(folder, trained_here, call):
    for wish in (["--top-k", "3"], ["--top-p", "0.5"], ["--seed", "1"]):
        for temperature in [], ["--temperature", "0"]:
            result = call("generate", "--prompt", PROMPT, *wish, *temperature)
            assert_one_line_error(result, wish[0], "--temperature")
            assert result[:2] == (1, "")
        assert call("generate", "--prompt", PROMPT, *wish, "--temperature", "1", "--seed", "1")[::2] == (0, "")


def test_an_untrained_model_writes_greedily_and_nothing_else(folder, call, small):
    for wish in (["--temperature", "1"], ["--top-k", "3"], ["--top-p", "0.5"], ["--sentences", "1"]):
        result = call(*small("generate"), *wish)
        assert_one_line_error(result, wish[0], "--untrained")
        assert result[:2] == (1, "")


@pytest.mark.parametrize("prompt", ["it's a \"boat\"", "the rain to end.\nNobody", "-- he said $HOME"])
def test_the_next_command_is_printed_and_runs_as_it_is_printed(folder, call, small, prompt):
    status, out, _ = call(*small("train", "--model", "my model.pt", "--max-steps", "1", f"--prompt={prompt}"))
    command = re.search(r": python story_llm\.py (generate .*)$", out.splitlines()[-1])[1]
    status, out, err = call(*shlex.split(command), "--max-new-tokens", "3")
    assert status == 0 and out.startswith(prompt) and "begins with these words" not in err
    assert load_checkpoint("my model.pt").prompt == prompt


def test_a_line_break_can_be_typed_and_does_not_break_the_log(folder, call, small, monkeypatch):
    prompt = "the rain to end.\nNobody came"
    out = call(*small("train", "--prompt", r"the rain to end.\nNobody came"))[1]
    samples = [line for line in out.splitlines() if line.startswith("    ")]
    assert load_checkpoint("story_llm.pt").prompt == prompt and len(samples) == out.count("): Train loss")
    assert all(line.startswith(r"    the rain to end.\nNobody came ...") for line in samples) and len(samples) > 1
    assert call("next")[1] == call("next", "--prompt", r"the rain to end.\nNobody came")[1]
    assert call("generate", "--prompt", r"the rain to end.\nNobody came")[1].startswith(prompt)
    monkeypatch.setattr(sys, "stdin", io.StringIO("the rain to end.\\nNobody came\n"))
    assert call("generate")[1].startswith(prompt)
    rows = [call("next", "--prompt", prompt)[1] for prompt in (r"to end.\n", "to end.\n", "to end.n")]
    assert rows[0] == rows[1] != rows[2]


def test_a_prompt_that_is_longer_than_the_window_is_printed_whole_with_a_note(folder, trained_here, call, small):
    prompt = TEXT.split("\n")[0]
    count = len(load_checkpoint("story_llm.pt").tokenizer.encode(prompt))
    status, out, err = call("generate", "--prompt", prompt, "--max-new-tokens", "2")
    assert status == 0 and out.startswith(prompt)
    assert err.startswith(f"note: the prompt has {count} tokens") and "the last 12\n" in err and err.count("\n") == 1
    assert call(*small("generate"), "--prompt", prompt, "--max-new-tokens", "2")[:2][1].startswith(prompt)


@pytest.mark.parametrize("prompt, notes", [     # for each note, what it must contain
    (PROMPT, []), (PROMPT + " ", []), (PROMPT[:16], []), (PROMPT + " boat to the", []), ("My mother took", []),
    ("The old ferryman tied a", [["begins with these words"]]), ("tied his boat", [["begins with these words"]]),
    ("at night a boy ran", [["<|unk|> night"], ["begins with these words"]]),
    ("At night a laptop", [["<|unk|>"], ["begins with these words"]])])
def test_what_the_model_cannot_know_about_a_prompt_is_noted(folder, trained_here, call, prompt, notes, monkeypatch):
    """TEXT has no validation split, so nothing is said about one."""
    monkeypatch.setattr(story_llm, "save_figure", lambda figure, path: figure)
    for command in (["generate"], ["next"], ["attention"]):
        status, out, err = call(*command, "--prompt", prompt)
        lines = err.splitlines()
        assert status == 0 and len(lines) == len(notes) and all(line.startswith("note: ") for line in lines)
        assert not [word for line, words in zip(lines, notes) for word in words if word not in line]
        assert "last" not in err


def test_no_note_on_a_prompt_is_false(folder, call, small):
    """A sentence of seven words is known, the end of the text is named where it was kept for validation, and of the own
    prompt, a writer and an untrained model nothing is said."""
    (folder / "seven.txt").write_text("Nobody ever saw the king come home. " + TEXT.replace("\n", " "))
    text = ["--text", "seven.txt", "--tokenizer", "story", "--val-fraction", "0.3", "--context-length", "32"]
    assert call(*small("train", *text, "--prompt", "a prompt of my own"))[0] == 0
    assert call("generate", "--prompt", "Nobody ever saw the king")[2] == ""
    assert "begins with these words" in call("generate", "--prompt", "My mother took")[2]
    assert "30% of the text" in call("generate", "--prompt", "My mother took")[2]
    for command in (["next"], ["attention"], ["generate", "--prompt", "a prompt of my own"],
                    small("generate", *text, "--prompt", "Not in the story"),
                    small("next", *text, "--prompt", "Nor this")):
        assert call(*command)[2] == "", command
    assert call(*small("train", *text, "--keep-best"))[0] == 0
    assert call("generate", "--prompt", "Not in the story")[2] == ""


def test_sentences_end_the_text(folder, trained_here, call):
    out = call("generate", "--prompt", TEXT.split("\n")[0][:-4], "--sentences", "1", "--temperature", "0")[1]
    assert story_llm.find_units(out)[1] == [0]


def test_next_shows_ten_tokens_and_their_probabilities_before_and_after_training(folder, trained_here, call, small):
    for command in (["next"], small("next")):
        status, out, err = call(*command, "--prompt", "The old", "--temperature", "0.5", "--top-k", "3")
        rows = re.findall(r"^\S+ +-?[\d.]+ +([\d.]+)% +([\d.]+)%", out, re.MULTILINE)
        assert (status, err, len(rows)) == (0, "", 10) and [row[1] for row in rows[3:]] == ["0.00"] * 7
        assert sum(float(row[1]) for row in rows) == pytest.approx(100, abs=0.1)
        assert [float(row[0]) for row in rows] == sorted([float(row[0]) for row in rows], reverse=True)
    for temperature, same in ([], True), (["--temperature", "1"], True), (["--temperature", "2"], False):
        rows = re.findall(r"([\d.]+)% +([\d.]+)%", call("next", *temperature)[1])
        assert len(rows) == 10 and all(softmax == sampled for softmax, sampled in rows) == same


# one path for two things

def test_no_command_writes_over_what_it_reads_or_has_written(folder, trained_here, call, small):
    os.rename("story_llm.pt", "m.png")
    os.rename("loss.png", "old.png")
    os.rename("my.txt", "my.svg")
    before = {name: (folder / name).read_bytes() for name in os.listdir()}
    os.symlink("m.png", "link.png")
    for command in (["plot", "--model", "m.png", "--plot", "m.png"], ["plot", "--model", "m.png", "--plot", "./m.png"],
                    ["plot", "--model", "m.png", "--plot", "link.png"],
                    ["attention", "--model", "m.png", "--plot", "m.png"],
                    ["train", "--text", "my.svg", "--model", "m.png", "--plot", "m.png"],
                    ["train", "--text", "my.svg", "--model", "./my.svg"],
                    ["train", "--text", "my.svg", "--plot", "my.svg"],
                    ["train", "--text", "old.png", "my.svg", "--plot", str(folder / "my.svg")]):
        assert_one_line_error(call(*command), "different files")
    assert {name: (folder / name).read_bytes() for name in before} == before


# no network, default tokenizer

def test_without_network_and_files_commands_learn_a_tokenizer_and_note_it_in_one_line(folder, call, small):
    status, out, err = call(*small("bpe", "--tokenizer", "auto", "--text", STORY))
    assert status == 0 and out and len(err.splitlines()) == 1 and "--tokenizer story" in err
    assert call(*small("bpe", "--tokenizer", "story", "--text", STORY)) == (0, out, "")
    result = call("train", "--text", "my.txt", "--tokenizer", "gpt2")
    assert_one_line_error(result, "GPT-2", "--tokenizer story", "README")
    assert result[:2] == (1, "")


# wrong values

NUMBERS = [name for name in FIELDS if FIELDS[name].type in (int, float)]


@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_beyond_its_limits_is_one_line_that_names_option_and_value(folder, call, small, name):
    command = next(command for command in ("train", "next", "generate", "windows")
                   if name in ALWAYS[command] + IF_UNTRAINED[command])
    kind, limits = FIELDS[name].type, FIELDS[name].metadata
    values = [kind(limits.get("minimum", 0) - 1), -1, "x",
              *(["nan", "inf", limits.get("below", "1e999")] if kind is float else ["0.5", "1e3", 1 << 32, 10**30])]
    for value in values:
        tokenizer = ["--tokenizer", "story"] if name == "vocab_size" else []
        result = call(*small(command, *tokenizer, *option(name, value)))
        assert name in assert_one_line_error(result, str(value).replace("1e999", "inf")).replace("-", "_") and "Step" not in result[1]
    assert os.listdir() == ["my.txt"]           # noticed before the training, not after


@pytest.mark.parametrize("options, names", [
    (["--emb-dim", "33"], ["n_heads", "33"]), (["--position", "none"], ["none"]), (["--precision", "fp8"], ["fp8"]),
    (["--tokenizer", "bytes"], ["bytes"]), (["--preset", "huge"], ["huge"]), (["--optimizer", "sgd"], ["sgd"]),
    (["--val-fraction", "0.999"], ["--val-fraction"]), (["--preset", "writer"], ["--keep-best", "--val-fraction"]),
    (["--keep-best", "--val-fraction", "0"], ["--keep-best"]),
    (["--position", "rotary", "--n-heads", "32"], ["--n-heads"])])
def test_wrong_settings_and_those_that_do_not_fit_the_text_or_each_other_are_one_line_with_the_remedy(
        folder, call, small, options, names):
    (folder / "line.txt").write_text("a" * 300 + " b c d")
    text = ["--text", "line.txt"] if "0.999" in options else []
    result = call(*small("train", *text, *options))
    assert_one_line_error(result, *names)
    assert not os.path.exists("story_llm.pt")


def test_what_a_tokenizer_cannot_or_may_not_use_is_refused(folder, call):
    for options in (["--tokenizer", "word"], [], ["--tokenizer", "gpt2"]):
        result = call("bpe", "--text", "my.txt", "--vocab-size", "300", *options)
        assert_one_line_error(result, "--vocab-size", "--tokenizer")


@pytest.mark.parametrize("prompt", ["漢字 😀", "a\0b", "x\ud800y", "word " * 3000, "<|endoftext|>", " ", "\r\n",
                                    "-Hello"])
def test_any_other_prompt_works_with_a_learned_tokenizer(folder, trained_on_bytes, call, prompt):
    for command in (["generate", "--max-new-tokens", 3], ["next"]):
        status, out, err = call(*command, f"--prompt={prompt}", "--model", trained_on_bytes)
        assert status == 0 and (len(out) >= len(prompt) or command == ["next"])
        assert all(line.startswith("note: ") for line in err.splitlines())


@pytest.mark.parametrize("content", ["Two words", "One.\r\nTwo.\r\nThree.\r\n", "😀 " * 30,
                                     "\x1b]0;title\x07 the king and the ferryman",
                                     "The king said one long sentence and then he went away."],
                         ids=lambda text: repr(text[:9]))
def test_a_strange_text_is_learned_from_and_no_nan_is_shown(folder, call, small, content):
    (folder / "strange.txt").write_bytes(content.encode())
    text = ["--text", "strange.txt"]
    for command in (["words", *text], small("bpe", *text, "--tokenizer", "story"),
                    small("windows", *text, "--context-length", "1"), small("model", *text), small("evaluate", *text),
                    small("train", *text), ["evaluate"], ["next"],
                    ["generate", f"--prompt={content.strip()[:1]}", "--max-new-tokens", "5"]):
        status, out, err = call(*command)
        assert status == 0 and "nan" not in out.lower() and "error" not in err, (command, err)


def test_a_text_may_be_several_files_or_standard_input_and_resuming_finds_them_again(folder, call, small, monkeypatch):
    """All of them are the same text here, so they make the same model."""
    lines = TEXT.splitlines(keepends=True)
    for name, part in (("1.txt", lines[:3]), ("2.txt", lines[3:])):
        (folder / name).write_text("".join(part))
    (folder / "whole.txt").write_text("\n\n".join(map("".join, (lines[:3], lines[3:]))))
    (folder / "bom.txt").write_bytes(b"\xef\xbb\xbf" + (folder / "whole.txt").read_bytes().replace(b"\n", b"\r\n"))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO((folder / "whole.txt").read_bytes())))
    runs = []
    for text in (["whole.txt"], ["1.txt", "--text", "2.txt"], ["bom.txt"], ["-"]):
        assert call(*small("train", "--text", *text, "--model", "m.pt"))[0] == 0
        runs.append(load_checkpoint("m.pt"))
        names = [word for word in text if word != "--text"]
        assert runs[-1].text_paths == names and weights_equal(runs[-1].model, runs[0].model)
        status, out, err = call("evaluate", "--model", "m.pt")
        if text == ["-"]:
            assert_one_line_error((status, out, err), "--text")
        else:
            assert status == 0 and err == "".join(f"note: m.pt was trained on {name}\n" for name in names)
        os.remove("m.pt")


def test_an_encoding_that_is_named_is_remembered(folder, call, small):
    text = TEXT.replace("old", "très âgé")
    (folder / "cp.txt").write_text(text, encoding="cp1252")
    (folder / "utf.txt").write_text(text, encoding="utf-8")
    assert_one_line_error(call(*small("train", "--text", "cp.txt")), "cp.txt", "--encoding cp1252")
    assert call(*small("train", "--text", "cp.txt", "--encoding", "cp1252", "--max-steps", "2"))[0] == 0
    assert call("evaluate", "--text", "utf.txt")[::2] == (0, "")
    assert "different" not in call("evaluate")[2]
    assert call("train", "--resume", "--max-steps", "3")[0] == 0
    assert call("train", "--resume", "--max-steps", "4", "--text", "utf.txt", "--encoding", "utf-8")[0] == 0
    assert load_checkpoint("story_llm.pt").step == 4 and "different" not in call("evaluate")[2]


# what is at --model already

def test_however_often_a_training_is_run_one_finished_model_is_kept_and_the_same_command_makes_the_same(
        folder, trained_here, call, small):
    before = (folder / "story_llm.pt").read_bytes()
    for _ in range(3):
        status, _, err = call(*small("train"))
        assert status == 0 and err == "note: the model that was at story_llm.pt is kept as " + (
            os.path.realpath("story_llm.old.pt") + "\n")
        assert sorted(os.listdir()) == ["loss.png", "my.txt", "story_llm.old.pt", "story_llm.pt"]
        assert weights_equal(load_checkpoint("story_llm.pt").model, load_checkpoint("story_llm.old.pt").model)
    assert (folder / "story_llm.old.pt").read_bytes() == before
    assert call(*small("train", "--seed", "7"))[0] == 0 and call(*small("train", "--seed", "8"))[0] == 0
    assert load_checkpoint("story_llm.old.pt").train_config.seed == 7


def test_the_beginning_of_a_training_is_replaced_and_a_file_that_is_not_a_model_is_kept(folder, call, small):
    run, corpus = story_llm.new_run_from_args(story_llm.parse(small("train")))
    save_checkpoint("story_llm.pt", train_to(run, corpus, step=1))
    status, _, err = call(*small("train"))
    assert (status, err) == (0, "") and sorted(os.listdir()) == ["loss.png", "my.txt", "story_llm.pt"]
    (folder / "my.notes.txt").write_text("all that I know")
    status, _, err = call(*small("train", "--model", "my.notes.txt"))
    assert status == 0 and err.count("\n") == 1 and "my.notes.old.txt" in err
    assert (folder / "my.notes.old.txt").read_text() == "all that I know" and load_checkpoint("my.notes.txt").step == 12


# the tour

def test_the_tour_shows_all_steps_and_says_what_to_look_at(folder, call, small, monkeypatch):
    monkeypatch.setattr(story_llm, "preset_settings", lambda name, n_bytes: {
        "context_length": 12, "emb_dim": 32, "n_layers": 1, "max_steps": 3, "tokenizer": "word"})
    status, out, err = call("tour", "--text", "my.txt", "--model", "tour.pt")
    assert status == 0 and "error" not in err
    titles = re.findall(r"^═══ steps? ([\d, ]+)[:,]", out, re.MULTILINE)
    assert {int(number) for title in titles for number in re.findall(r"\d+", title)} == set(range(2, 14))
    shown = re.findall(r"^═══ .*\n(.+)\n\n\$ python \S*story_llm\.py ?(.*)$", out, re.MULTILINE)
    assert {command.split()[0] for _, command in shown} == COMMANDS.keys() - {"tour"}
    assert all(hint.endswith(("?", ".")) for hint, _ in shown)
    assert sorted(os.listdir()) == ["my.txt", "tour.pt", "tour_attention.png", "tour_loss.png"]
    assert load_checkpoint("tour.pt").step == 3 and load_checkpoint("tour.pt").text_paths == ["my.txt"]
    status, out, err = call("tour", "--text", "missing.txt")        # a step that fails ends it
    assert status == 1 and "missing.txt" in err and err.count("\n") == 1 and out.count("═══ ") == 1


# streams, and what goes wrong

@pytest.mark.parametrize("error, status", [(KeyboardInterrupt(), 130), (MemoryError(), 1), (BrokenPipeError(), 1),
                                           (story_llm.StoryError("mine"), 1), (RuntimeError("CUDA out of memory"), 1)])
def test_the_exit_status_of_what_ends_a_command(error, status, capfd):
    def work():
        raise error
    stdout = os.dup(1)
    try:
        assert story_llm.exit_status(work) == status
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)
    assert story_llm.exit_status(lambda: None) == 0 and story_llm.exit_status(lambda: 130) == 130
    err = capfd.readouterr().err
    assert err.count("\n") == (not isinstance(error, (KeyboardInterrupt, BrokenPipeError))) and "Traceback" not in err


def test_closed_streams_are_no_error(folder, trained_here, small):
    """As after <&- or 2>&- in a shell: Python has None for them."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in ("stdin", "stdout", "stderr"):
            monkeypatch.setattr(sys, name, None)
        commands = (["generate"], ["words", "--text", "my.txt"], ["words", "-x"], ["words", "--text", "no"],
                    small("train"))
        statuses = [story_llm.main(command) for command in commands]
        for name in ("stdin", "stdout", "stderr"):
            getattr(sys, name).close()
    assert statuses == [0, 0, 2, 1, 0]


def test_a_folder_with_a_percent_sign_in_its_name_is_no_error(call, monkeypatch):
    monkeypatch.setattr(FIELDS["model"], "default", "/My%20stories/100%/%s.pt")
    status, out, err = call("train", "--help")
    assert (status, err) == (0, "") and "/My%20stories/100%/%s.pt" in out


def test_redirected_output_is_utf_8_whatever_the_locale(folder):
    text = "“Thāmarai — 天地 😀,” said the king to the old one.\n" * 3
    (folder / "story.txt").write_text(text, encoding="utf-8")
    done = subprocess.run([sys.executable, PROGRAM, "words", "--text", "story.txt"], cwd=folder,
                          capture_output=True,
                          env={**os.environ, "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii", "LC_ALL": "C"})
    assert (done.returncode, done.stderr) == (0, b"") and "text:    “Thāmarai — 天地" in done.stdout.decode("utf-8")


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


def test_no_text_no_prompt_no_name_and_no_file_can_steer_the_terminal(folder, small):
    (folder / "evil.txt").write_text(f"{EVIL} {TEXT} {EVIL}", encoding="utf-8")
    with zipfile.ZipFile(folder / "evil.pt", "w") as file:      # like a checkpoint, but for a name in it
        file.writestr("archive/data.pkl", b"\x80\x02cos\n\x1b]0;title\x07\n.")
    text = ["--text", "evil.txt"]
    output = on_a_terminal(
        ["words", *text, "--prompt", EVIL], small("bpe", *text, "--tokenizer", "story", "--prompt", EVIL),
        small("windows", *text), small("train", *text, "--epochs", "1"), ["evaluate"], ["next"],
        ["generate", "--prompt", EVIL], ["generate", "--prompt", f"a{EVIL}b"], ["generate", "--model", "evil.pt"],
        small("evaluate", "--text", EVIL))
    output = re.sub(r"step \d+ of [^\r\n]*\r(?!\n)", "", output).replace("\r\n", "\n")       # the live line returns
    assert len(output) > 1000 and not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", output), repr(output)


def screen(output):
    """The lines that a terminal shows, which knows a line break and a return."""
    rows, column = [""], 0
    for part in re.findall(r"[^\r\n]+|[\r\n]", output):
        if part == "\n":
            rows.append("")
        elif part != "\r":
            rows[-1] = rows[-1][:column].ljust(column) + part + rows[-1][column + len(part):]
        column = 0 if part in ("\r", "\n") else column + len(part)
    return [row.rstrip() for row in rows]


class Clock:
    """A clock of its own, on which some time passes whenever somebody looks at it."""
    def __init__(self, seconds):
        self.now, self.seconds = 0.0, seconds

    def perf_counter(self):
        self.now += self.seconds
        return self.now


def test_a_line_moves_on_a_terminal_and_leaves_the_log_as_it_is_elsewhere(folder, call, small, monkeypatch):
    monkeypatch.setattr(story_llm, "time", Clock(1.0))
    shown = on_a_terminal(small("train"))
    os.remove("story_llm.pt")
    _, out, err = call(*small("train"))
    live = re.findall(r"(step \d+ of 12[^\r\n]*?)\r(?!\n)", shown)
    assert err == "" and len(live) == 12 - 4 and all(len(line) < 80 for line in live)      # not at 1, 5, 10 and 12
    without_speed = [re.sub(r", [\d,]+ tokens/s.*", "", line) for line in screen(shown)]
    assert without_speed == [re.sub(r", [\d,]+ tokens/s.*", "", line).rstrip() for line in out.split("\n")]


def test_the_moving_line_is_shown_five_times_a_second_at_most(folder, small, monkeypatch):
    """A terminal at the other end of a network could not keep up with a thousand steps a second."""
    monkeypatch.setattr(story_llm, "time", Clock(0.01))     # it is read once in each step, and when a file is saved
    shown = on_a_terminal(small("train", "--max-steps", "200", "--eval-every", "1000"))
    steps = [int(step) for step in re.findall(r"step (\d+) of 200", shown)]
    assert len(steps) > 5 and min(later - earlier for earlier, later in zip(steps, steps[1:])) >= 19
