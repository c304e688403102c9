"""The command line: what each command prints and writes, and what it refuses, in which words."""
import contextlib
import io
import os
import re
import shlex
import struct
import subprocess
import sys
import threading
import zipfile

import pytest
from helpers import PROGRAM, ROOT, STORY, TEXT, story_llm, train_to, weights_equal

from story_llm import COMMANDS, FIELDS, LIMITS, NEW_MODEL, load_checkpoint, save_checkpoint

PROMPT = "The old ferryman tied his"
ALWAYS = {name: tuple(dict.fromkeys(options)) for name, (_, _, options) in COMMANDS.items()}
USES_A_MODEL = ("evaluate", "generate", "next")
IF_UNTRAINED = {name: tuple(option for option in NEW_MODEL if name in USES_A_MODEL and option not in ALWAYS[name])
                for name in COMMANDS}


def option(name, value=None):
    """The words of an option on a command line, with its default unless there is a value."""
    words = [story_llm.option_string(name)]
    if FIELDS[name].type is bool:
        return words
    return [*words, str(FIELDS[name].default if value is None else value)]


def assert_one_line_error(result, *names):
    """Exit status 1 or 2, no traceback, and one line of an error that contains the names."""
    status, out, err = result
    assert status in (1, 2) and "Traceback" not in out + err
    line = err.strip().splitlines()[-1]
    if status == 1:
        assert line.startswith("error: ") and err.count("error: ") == 1, err
    assert "error: " in line and not any(name not in line for name in names), line
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
    monkeypatch.setenv("COLUMNS", "300")
    status, out, err = call(command, "--help")
    shown = {name: " ".join(words.split()) for name, words in
             re.findall(r"^  --([a-z-]+)(?: (?:TEXT|N|FILE \[FILE \.\.\.\]|\{[^}]*\}))?\s+(.*)$", out, re.MULTILINE)}
    accepted = {story_llm.option_string(name)[2:]: FIELDS[name] for name in ALWAYS[command] + IF_UNTRAINED[command]}
    assert (status, err) == (0, "") and shown.keys() == accepted.keys()
    others = {("next", "temperature"): 1.0, ("generate", "precision"): "fp32"}
    for name, f in accepted.items():
        default = others.get((command, name), f.default)
        assert shown[name].startswith(f.metadata["meaning"])
        if f.type is not bool and default != "" and "(default: " not in f.metadata["meaning"]:
            assert f"(default: {default})" in shown[name] or default == 0 and "0: " in shown[name], name


@pytest.mark.parametrize("command, expected", [
    ("train", {"options": {"text", "model", "resume", "tokenizer", "prompt", "plot", "seed"},
               "training": {"epochs", "learning-rate", "keep-best"}, "the model": {"emb-dim", "position"}}),
    ("generate", {"options": {"model", "prompt", "max-new-tokens", "sentences", "untrained"},
                  "sampling": {"temperature", "top-k", "top-p"},
                  "only with --untrained": {"text", "emb-dim", "tokenizer", "preset"}}),
    ("evaluate", {"options": {"text", "model"}, "training": {"precision"}, "only with --untrained": {"emb-dim"}})])
def test_the_help_groups_the_options_and_the_ones_that_one_needs_first_come_first(call, command, expected):
    blocks = call(command, "--help")[1].split("\n\n")
    groups = {block.split(":\n")[0]: re.findall(r"^  --([a-z-]+)", block, re.MULTILINE) for block in blocks}
    groups = {title: names for title, names in groups.items() if names}
    assert list(groups)[0] == "options" and list(groups)[-1] == list(expected)[-1]
    assert {title: names & set(groups[title]) for title, names in expected.items()} == expected
    if command == "train":
        assert groups["options"][:2] == ["text", "model"]


def test_help_does_not_promise_a_model_where_the_seed_is_that_of_a_text(call):
    assert "gives the same model" not in " ".join(call("generate", "--help")[1].split())


@pytest.mark.parametrize("arguments", [
    ["tray"], ["train", "--no-such-option"], ["generate", "--temperature", "warm"], ["train", "extra"],
    ["train", "--epoch", "3"], ["generate", "--top-k"], ["--train"], ["plot", "--model"]])
def test_wrong_usage_is_status_2_and_the_error_names_the_value(folder, call, arguments):
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


@pytest.mark.parametrize("command", USES_A_MODEL)
def test_settings_of_a_new_model_need_untrained(call, idle, command):
    for name in IF_UNTRAINED[command]:
        result = call(command, *option(name))
        assert_one_line_error(result, option(name)[0], "--untrained")
        assert result[0] == 1 and result[1] == ""
    assert idle == []
    everything = [word for name in IF_UNTRAINED[command] for word in option(name)]
    assert call(command, "--untrained", *everything) == (0, "", "") and len(idle) == 1


@pytest.mark.parametrize("command", USES_A_MODEL)
def test_a_saved_model_cannot_be_combined_with_untrained(call, idle, command):
    assert_one_line_error(call(command, "--untrained", "--model", "story_llm.pt"), "--model", "--untrained")
    assert idle == []


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_that_a_command_has_reaches_it(call, idle, command):
    for name in ALWAYS[command]:
        assert call(command, *option(name)) == (0, "", ""), name
        assert name in idle[-1].given


@pytest.mark.parametrize("wish", [["--temperature", "5"], ["--top-k", "3", "--temperature", "5"]])
def test_what_is_asked_of_an_untrained_model_is_refused_or_has_an_effect(folder, call, small, wish):
    command = [*small("generate"), "--prompt", PROMPT, "--max-new-tokens", "20"]
    plain = call(*command)
    status, out, err = call(*command, *wish)
    assert plain[0] == 0 and (status in (1, 2) or out != plain[1]), "accepted, and of no effect"


def test_the_given_options_of_untrained_models_are_used(folder, call, small):
    out = call(*small("model"), "--n-layers", "3", "--position", "rotary", "--emb-dim", "24")[1]
    assert re.search(r"n_layers +3\b", out) and re.search(r"position +rotary\b", out) and "(2, 12, 24)" in out


@pytest.mark.parametrize("command, meant", [
    (["train", "--epoch", "3"], "--epochs"), (["train", "--epoch=1000000000"], "--epochs"),
    (["generate", "--promt", "Once"], "--prompt"), (["generate", "--emb_dim", "3"], "--emb-dim"),
    (["generate", "Once upon a time"], "--prompt 'Once upon a time'"), (["train", "my.txt"], "--text my.txt"),
    (["words", "my story.txt"], "--text 'my story.txt'"), (["plot", "my.pt"], "--model my.pt")])
def test_an_unknown_word_gets_a_line_that_says_what_may_have_been_meant(call, idle, command, meant):
    status, out, err = call(*command)
    assert (status, out, err.count("\n")) == (2, "", 1) and idle == []
    assert err.startswith(f"error: {command[0]} has no argument {command[1]}; did you mean {meant}?")
    assert f"python story_llm.py {command[0]} --help" in err


@pytest.mark.parametrize("command", [["tour", "now"], ["train", "--zzzzzzzz"], ["trian"], ["plot", "--model"],
                                     ["train", "--epochs", "many"]])
def test_where_nothing_similar_exists_the_line_names_the_help(call, idle, command):
    status, out, err = call(*command)
    assert (status, out, err.count("\n")) == (2, "", 1) and "--help" in err and "did you mean" not in err
    assert command[-1].removeprefix("--") in err


@pytest.mark.parametrize("more, noted, emb_dim", [
    ([], "--n-heads 3 --emb-dim 48", 48), (["--preset", "auto"], "--n-heads 3 --emb-dim 48", 48),
    (["--n-heads", "2"], "--emb-dim 48", 48), (["--emb-dim", "32"], None, 32), (["--preset", "story"], None, 192)])
def test_what_the_size_of_a_text_has_chosen_is_noted_and_used_unless_the_user_chooses(folder, call, monkeypatch, more,
                                                                                      noted, emb_dim):
    monkeypatch.setattr(story_llm, "settings_for_size", lambda n_bytes: {"n_heads": 3, "emb_dim": 48})
    command = ["model", "--text", "my.txt", "--tokenizer", "word", "--context-length", "8"]
    status, out, err = call(*command, *more)
    assert (status, err) == (0, f"note: for a text of 0 KB, the defaults are {noted}\n" if noted else "")
    assert re.search(rf"emb_dim +{emb_dim}$", out, re.MULTILINE)
    run = story_llm.new_run(story_llm.corpus_from_text(TEXT, "word"))
    assert (run.config.n_heads, run.config.emb_dim) == (3, 48)


@pytest.mark.parametrize("preset", story_llm.PRESETS)
def test_every_preset_can_be_trained(folder, call, preset):
    options = ["--emb-dim", "24", "--n-heads", "2", "--n-layers", "1", "--context-length", "8", "--val-fraction", "0.3",
               "--tokenizer", "word"]
    status, out, err = call("train", "--text", "my.txt", "--preset", preset, *options, "--max-steps", "2")
    assert status == 0 and "error" not in err and "Recall" in out
    run = load_checkpoint("story_llm.pt")
    settings = {**vars(run.config), **vars(run.train_config)}
    chosen = {name: value for name, value in story_llm.PRESETS[preset].items() if option(name)[0] not in options}
    chosen.pop("vocab_size", None)      # the words are counted
    if preset == "writer":
        chosen["weight_decay"] = 5      # for a short text
    assert {name: settings[name] for name in chosen} == chosen and settings["emb_dim"] == 24


# before and after training

def test_every_command_works_before_training_or_says_in_one_line_what_is_missing(folder, call, small):
    for command in ("words", "bpe", "windows", "model", "evaluate", "generate", "next"):
        more = ["--prompt", PROMPT] if command in ("generate", "next") else []
        status, out, err = call(*small(command, *more))
        assert status == 0 and out and "error" not in err and "nan" not in out.lower(), command
    for command in ("plot", "generate", "attention", "next", "evaluate"):
        assert "train" in assert_one_line_error(call(command), "story_llm.pt")
    assert os.listdir() == ["my.txt"]


def test_untrained_generation_continues_the_prompt(folder, call, small):
    status, out, err = call(*small("generate", "--prompt", PROMPT, "--max-new-tokens", "4"))
    run, _ = story_llm.new_run_from_args(story_llm.parse(small("generate")))
    assert (status, err) == (0, "") and out.startswith(PROMPT)
    assert len(run.tokenizer.encode(out.removesuffix("\n"))) == len(run.tokenizer.encode(PROMPT)) + 4


def test_a_prompt_that_is_longer_than_the_window_is_printed_whole_with_a_note(folder, trained_here, call, small):
    prompt = TEXT.split("\n")[0]
    count = len(load_checkpoint("story_llm.pt").tokenizer.encode(prompt))
    for command in (small("generate"), ["generate"]):
        status, out, err = call(*command, "--prompt", prompt, "--max-new-tokens", "2")
        assert status == 0 and out.startswith(prompt)
        assert err.startswith(f"note: the prompt has {count} tokens") and "the last 12\n" in err and err.count("\n") == 1


def test_training_prints_its_progress_and_recall_and_writes_its_two_files(folder, trained_here):
    assert re.search(r"^Ep 1 \(Step 000000\): Train loss \d\.\d{3}, Val loss \d\.\d{3}", trained_here, re.MULTILINE)
    assert re.search(r"^Recall \d+\.\d%: \d+ of \d+ sentences", trained_here, re.MULTILINE)
    assert sorted(os.listdir()) == ["loss.png", "my.txt", "story_llm.pt"]
    steps = [int(step) for step in re.findall(r"\(Step (\d{6})\)", trained_here)]
    assert steps == [evaluation.step for evaluation in load_checkpoint("story_llm.pt").history]


@pytest.mark.parametrize("step, epoch", [(0, 1), (1, 1), (9, 1), (10, 2), (36, 4), (180, 20)])
def test_an_evaluation_names_the_epoch_of_the_last_step(capsys, step, epoch):
    story_llm.log_evaluation(story_llm.Evaluation(step, step / 9, 1.0, None, None, "", ""))
    assert capsys.readouterr().out.startswith(f"Ep {epoch} (Step {step:06})")


def test_every_command_works_after_training(folder, trained_here, call):
    text = ["--text", "my.txt"]
    for command in ("words", "bpe", "windows", "model", "evaluate", "plot", "generate", "attention", "next"):
        options = {"plot": [], "generate": ["--prompt", PROMPT], "next": [], "attention": []}.get(command, text)
        status, out, err = call(command, *options)
        assert status == 0 and out and "error" not in err and "nan" not in out.lower(), command


def test_words_shows_words_and_bpe_byte_pairs(folder, call):
    out = call("words", "--text", "my.txt")[1]
    assert "tokens of the word tokenizer" in out and "[The][␣old][␣ferryman]" in out
    out = call("bpe", "--text", "my.txt", "--tokenizer", "story", "--vocab-size", "300")[1]
    assert "tokens of the story tokenizer" in out and "[The][␣old]" not in out


def test_windows_are_as_far_apart_as_their_stride(folder, call, small):
    rows = [re.findall(r"^  input +(.*)", call(*small("windows"), *stride)[1], re.MULTILINE)
            for stride in ([], ["--stride", "1"])]
    pieces = [re.split(r" {2,}", row) for row in rows[1]]
    assert pieces[0][1:] == pieces[1][:-1] and pieces[1][1:] == pieces[2][:-1]
    assert rows[0][0] == rows[1][0] and rows[0][1] != rows[1][1]


def test_targets_are_the_inputs_shifted_by_one(folder, call, small):
    out = call(*small("windows"))[1]
    inputs, targets = [[row.split() for row in re.findall(rf"^  {name} +(.*)", out, re.MULTILINE)]
                       for name in ("input", "target")]
    assert len(inputs) == 3 and [row[1:] for row in inputs] == [row[:-1] for row in targets]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_evaluate_shows_what_training_showed_last(folder, call, small, precision):
    """Without --text: the checkpoint knows which text it was trained on."""
    out = call(*small("train"), "--precision", precision)[1]
    last = load_checkpoint("story_llm.pt").history[-1]
    status, shown, err = call("evaluate")
    assert (status, err) == (0, "")
    assert re.search(r"Train loss +([\d.]+)", shown)[1] == f"{last.train_loss:.3f}"
    assert re.search(r"Val loss +([\d.]+)", shown)[1] == f"{last.val_loss:.3f}"
    assert re.search(r"^Recall .*", out, re.MULTILINE).group() in shown


def test_a_model_trained_on_the_default_text_is_evaluated_on_it(folder, call, small):
    default = [word for word in small("train", "--max-steps", "1") if word not in ("--text", "my.txt")]
    assert call(*default)[0] == 0
    assert load_checkpoint("story_llm.pt").prompt == story_llm.DEFAULT_PROMPT
    status, out, err = call("evaluate")
    assert (status, err) == (0, "") and re.search(r"of 175 sentences", out)


@pytest.mark.parametrize("text", ["other.txt", "my.txt"])
def test_evaluating_with_another_text_is_noted_and_the_note_names_it(folder, trained_here, call, text):
    (folder / text).write_text(TEXT.replace("boat", "raft"))
    options = [] if text == "my.txt" else ["--text", text]
    status, _, err = call("evaluate", *options)
    assert status == 0 and "different text" in err and text in err and err.count("\n") == 1


def test_a_model_that_is_named_must_exist(folder, trained_here, call, small):
    assert "untrained" in call(*small("evaluate"))[1]
    assert_one_line_error(call("evaluate", "--text", "my.txt", "--model", "typo.pt"), "typo.pt")


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


def test_on_a_terminal_generate_asks_for_prompts_until_ctrl_d(folder, trained_here, call):
    pty = pytest.importorskip("pty")
    master, terminal = pty.openpty()
    os.write(master, f"{PROMPT}\n\nAt night\n\x04".encode())
    with open(terminal, encoding="utf-8") as stdin, pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(sys, "stdin", stdin)
        status, out, err = call("generate", "--max-new-tokens", 5)
    os.close(master)
    expected = "".join(call("generate", "--prompt", prompt, "--max-new-tokens", 5)[1]
                       for prompt in (PROMPT, "At night"))
    first, second = expected.splitlines()
    assert (status, out) == (0, f"> {first}\n> > {second}\n> ") and err.count("first words") == 1


def test_sampling_depends_on_the_seed(folder, trained_here, call):
    texts = [call("generate", "--prompt", PROMPT, "--temperature", 2, "--seed", seed)[1] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("command, wish", [("generate", ["--top-k", "3"]), ("generate", ["--top-p", "0.5"]),
                                           ("generate", ["--seed", "1"]), ("generate --untrained", ["--top-k", "3"])])
def test_settings_of_sampling_need_a_temperature(folder, trained_here, call, small, command, wish):
    command = small("generate") if "untrained" in command else ["generate"]
    for temperature in [], ["--temperature", "0"]:
        result = call(*command, "--prompt", PROMPT, *wish, *temperature)
        assert_one_line_error(result, wish[0], "--temperature")
        assert result[:2] == (1, "")
    status, _, err = call(*command, "--prompt", PROMPT, *wish, "--temperature", "1")
    assert (status, err) == (0, "")


def test_an_untrained_model_has_a_seed_of_its_own(folder, call, small):
    texts = [call(*small("generate"), "--prompt", PROMPT, "--seed", seed)[1] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("wish", [["--temperature", "1e-300"], ["--temperature", "5", "--top-k", "1"],
                                  ["--temperature", "5", "--top-p", "1e-9"]])
def test_sampling_that_leaves_one_token_is_greedy(folder, trained_here, call, wish):
    assert call("generate", "--prompt", PROMPT, *wish) == call("generate", "--prompt", PROMPT)


def test_the_same_command_makes_the_same_weights(folder, trained_here, call, small):
    assert call(*small("train"), "--model", "again.pt")[0] == 0
    assert weights_equal(load_checkpoint("story_llm.pt").model, load_checkpoint("again.pt").model)


def test_the_prompt_of_training_is_continued_at_evaluations_and_afterwards(folder, call, small):
    out = call(*small("train"), "--prompt", "At night a boy")[1]
    assert len(re.findall(r"^    At night a boy \.\.\.", out, re.MULTILINE)) == out.count("): Train loss") > 1
    assert load_checkpoint("story_llm.pt").prompt == "At night a boy"
    assert call("next")[1] == call("next", "--prompt", "At night a boy")[1]


@pytest.mark.parametrize("prompt", ["At night a boy", "it's a \"boat\"", "the rain to end.\nNobody", "-- he said",
                                    "$HOME"])
def test_the_next_command_is_printed_and_runs_as_it_is_printed(folder, call, small, prompt):
    status, out, _ = call(*small("train", "--model", "my model.pt", "--max-steps", "1", f"--prompt={prompt}"))
    command = re.search(r": python story_llm\.py (generate .*)$", out.splitlines()[-1])[1]
    status, out, err = call(*shlex.split(command), "--max-new-tokens", "3")
    assert status == 0 and out.startswith(prompt) and "error" not in err
    assert load_checkpoint("my model.pt").prompt == prompt


def test_a_line_break_in_a_sample_does_not_break_the_log(folder, call, small):
    out = call(*small("train", "--prompt", r"the rain to end.\nNobody came"))[1]
    samples = [line for line in out.splitlines() if line.startswith("    ")]
    assert load_checkpoint("story_llm.pt").prompt == "the rain to end.\nNobody came"
    assert len(samples) == out.count("): Train loss")
    assert all(line.startswith(r"    the rain to end.\nNobody came ...") for line in samples)


@pytest.mark.parametrize("prompt", ["-Hello", "-", "-1 is less than 0", "-m", "-- he said", "—¿Está lejos?"])
def test_a_prompt_may_begin_with_a_dash(folder, trained_on_bytes, call, prompt):
    for words in (["--prompt", prompt], [f"--prompt={prompt}"]):
        status, out, err = call("generate", "--model", trained_on_bytes, "--max-new-tokens", "2", *words)
        assert status == 0 and out.startswith(prompt) and "error" not in err
    assert_one_line_error(call("generate", "--prompt", "--model", trained_on_bytes), "--prompt")


def test_a_line_break_can_be_typed(folder, trained_here, call, monkeypatch):
    expected = "the rain to end.\nNobody came down"
    assert call("generate", "--prompt", r"the rain to end.\nNobody came down")[1].startswith(expected)
    monkeypatch.setattr(sys, "stdin", io.StringIO("the rain to end.\\nNobody came down\n"))
    assert call("generate")[1].startswith(expected)
    rows = [call("next", "--prompt", prompt)[1] for prompt in (r"to end.\n", "to end.\n", "to end.n")]
    assert rows[0] == rows[1] != rows[2]


@pytest.mark.parametrize("prompt, notes", [     # for each note, what it must contain
    (PROMPT, []), (PROMPT + " ", []), (PROMPT[:16], []), (PROMPT + " boat to the", []),
    ("The old ferryman tied a", [["no sentence", "'The old ferryman tied his'"]]),
    ("at night a boy ran", [[" at", "<|unk|>"], ["no sentence", "'At night a boy ran'"]]),
    ("Zzzz", [["Zzzz", "<|unk|>"], ["no sentence"]]),
    ("At night a laptop, a phone", [["laptop, phone", "<|unk|>"], ["no sentence", "'At night a boy ran'"]])])
def test_what_the_model_cannot_know_about_a_prompt_is_noted(folder, trained_here, call, prompt, notes):
    for command in (["generate"], ["next"], ["attention"]):
        status, out, err = call(*command, "--prompt", prompt)
        lines = err.splitlines()
        assert status == 0 and len(lines) == len(notes) and all(line.startswith("note: ") for line in lines)
        for line, words in zip(lines, notes):
            assert not [word for word in words if word not in line] and ("'" in line) == ("'" in "".join(words))


def test_sentences_end_the_text(folder, trained_here, call):
    out = call("generate", "--prompt", TEXT.split("\n")[0][:-4], "--sentences", "1", "--temperature", "0")[1]
    assert story_llm.sentence_starts(out) == [0]


@pytest.mark.parametrize("most", [2, 3, 6, 7])
def test_recall_of_a_sample_is_said_to_be_one(folder, trained_here, call, small, monkeypatch, most):
    original = story_llm.evenly_spaced
    monkeypatch.setattr(story_llm, "RECALL_SAMPLE", most)
    monkeypatch.setattr(story_llm, "evenly_spaced", lambda items, count: original(items, min(count, most)))

    def sample(count):
        return rf"of {most} sentences \(.*sample.* {count}\) " if most < count else f"of {count} sentences continued"

    assert re.search(sample(5), call("evaluate")[1])
    out = call(*small("train", "--model", "new.pt", "--val-fraction", "0"))[1]
    assert re.search(sample(6), out) and (f" {most} sentences\n" in out.replace(".\n", "\n")) == (most < 6)


# pictures, and looking inside

def png_size(path):
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", content[16:24])


def test_plot_draws_where_it_is_told(folder, trained_here, call):
    assert call("plot", "--plot", "curve.svg") == (0, "drew curve.svg\n", "")
    assert (folder / "curve.svg").read_text(encoding="utf-8").startswith("<?xml")


@pytest.mark.parametrize("model, name", [("other.pt", "other_{}.png"), ("runs/a.b.pt", "runs/a.b_{}.png")])
def test_a_picture_is_named_after_the_model_unless_that_has_its_usual_name(folder, trained_here, call, model, name):
    (folder / "runs").mkdir()
    os.rename("story_llm.pt", model)
    assert call("plot", "--model", model) == (0, f"drew {name.format('loss')}\n", "")
    assert call("attention", "--model", model) == (0, f"drew {name.format('attention')}\n", "")
    assert call("plot", "--model", model, "--plot", "x.svg") == (0, "drew x.svg\n", "")
    assert {name.format("loss"), name.format("attention"), "x.svg"} <= {
        str(path.relative_to(folder)) for path in folder.rglob("*.*")}


def test_attention_is_drawn(folder, trained_here, call):
    assert call("attention", "--prompt", "The old ferryman") == (0, "drew attention.png\n", "")
    assert min(png_size(folder / "attention.png")) > 200
    for mistake in (["--plot", "x.txt"], ["--prompt", ""], ["--plot", "nowhere/x.png"]):
        assert_one_line_error(call("attention", *mistake))


def test_next_shows_ten_tokens_and_their_probabilities_before_and_after_training(folder, trained_here, call, small):
    for command in (["next"], small("next")):
        status, out, err = call(*command, "--prompt", "The old", "--temperature", "0.5", "--top-k", "3")
        rows = re.findall(r"^\S+ +-?[\d.]+ +([\d.]+)% +([\d.]+)%", out, re.MULTILINE)
        assert (status, err, len(rows)) == (0, "", 10) and [row[1] for row in rows[3:]] == ["0.00"] * 7
        assert sum(float(row[1]) for row in rows) == pytest.approx(100, abs=0.1)
        assert [float(row[0]) for row in rows] == sorted([float(row[0]) for row in rows], reverse=True)


def test_next_samples_with_a_temperature_of_1_unless_another_is_given(folder, trained_here, call):
    for temperature, same in ([], True), (["--temperature", "1"], True), (["--temperature", "2"], False):
        rows = re.findall(r"([\d.]+)% +([\d.]+)%", call("next", *temperature)[1])
        assert len(rows) == 10 and all(softmax == sampled for softmax, sampled in rows) == same


@pytest.mark.parametrize("wrong", [["--temperature", "-1"], ["--temperature", "nan"], ["--top-k", "-1"],
                                   ["--top-p", "-0.5"], ["--prompt", ""]])
def test_wrong_values_for_the_next_token_are_refused(folder, trained_here, call, wrong):
    assert_one_line_error(call("next", "--prompt", "The", *wrong))


# no network, default tokenizer

@pytest.mark.parametrize("command", ["bpe", "windows", "model", "evaluate"])
def test_without_network_and_files_commands_learn_a_tokenizer_and_note_it_in_one_line(folder, call, small, command):
    status, out, err = call(*small(command, "--tokenizer", "auto", "--text", STORY))
    assert status == 0 and out and len(err.splitlines()) == 1 and "--tokenizer story" in err
    assert call(*small(command, "--tokenizer", "story", "--text", STORY)) == (0, out, "")


def test_without_network_and_files_the_real_story_is_trained_on_and_continued(folder, call, small):
    status, out, err = call(*small("train", "--text", STORY, "--tokenizer", "auto", "--max-steps", "3"))
    assert status == 0 and len(err.splitlines()) == 1 and "--tokenizer story" in err
    assert re.match(r"story tokenizer, vocabulary [12],\d{3};", out)
    status, out, err = call("generate", "--prompt", "Once Aadhan", "--max-new-tokens", "3")
    assert (status, err) == (0, "") and out.startswith("Once Aadhan")


def test_without_network_and_files_gpt2_by_name_is_an_error_that_tells_what_to_do(folder, call):
    result = call("train", "--text", "my.txt", "--tokenizer", "gpt2")
    assert_one_line_error(result, "GPT-2", "--tokenizer story", "README")
    assert result[:2] == (1, "")


# wrong values

@pytest.mark.parametrize("name, value", [
    ("--emb-dim", "0"), ("--emb-dim", "-8"), ("--emb-dim", "33"), ("--emb-dim", "x"), ("--emb-dim", "nan"),
    ("--emb-dim", "1000000000000"), ("--emb-dim", "1" + "0" * 30), ("--n-heads", "0"), ("--n-heads", "5"),
    ("--n-layers", "0"), ("--n-layers", "1000000000"), ("--n-layers", "1.5"), ("--context-length", "0"),
    ("--context-length", "-3"), ("--drop-rate", "1"), ("--drop-rate", "nan"), ("--drop-rate", "-0.1"),
    ("--position", "none"), ("--epochs", "-1"), ("--epochs", "nan"), ("--max-steps", "-1"), ("--batch-size", "0"),
    ("--batch-size", "1000000000000"), ("--learning-rate", "0"), ("--learning-rate", "nan"),
    ("--learning-rate", "inf"), ("--learning-rate", "-1"), ("--warmup-steps", "-1"), ("--weight-decay", "-1"),
    ("--weight-decay", "nan"), ("--grad-clip", "0"), ("--prompt-windows", "1"), ("--prompt-windows", "nan"),
    ("--val-fraction", "1"), ("--val-fraction", "-0.5"), ("--eval-every", "-1"), ("--precision", "fp8"),
    ("--seed", "-1"), ("--seed", "1" + "0" * 30), ("--tokenizer", "bytes"), ("--preset", "huge"),
    ("--device", "abacus"), ("--text", "missing.txt"), ("--model", "nowhere/story.pt"),
    ("--model", "."), ("--plot", "loss.xyz"), ("--plot", "nowhere/loss.png")])
def test_a_wrong_value_for_training_is_one_line_that_names_it(folder, call, small, name, value):
    result = call(*small("train", name, value))
    assert_one_line_error(result, value if value != "." else "folder")
    assert "Step" not in result[1] and os.listdir() == ["my.txt"]      # noticed before the training, not after


@pytest.mark.parametrize("name", LIMITS)
def test_every_number_beyond_its_limits_is_one_line_that_names_option_and_value(folder, call, small, name):
    command = next(command for command in ("train", "next", "generate", "windows")
                   if name in ALWAYS[command] + IF_UNTRAINED[command])
    number, (lowest, bound) = FIELDS[name].type, LIMITS[name]
    wrong = [number(lowest - 1), "x", *(["nan", "inf"] if number is float else ["0.5"])]
    if bound < float("inf"):
        wrong.append(bound)
    for value in wrong:
        tokenizer = ["--tokenizer", "story"] if name == "vocab_size" else []
        result = call(*small(command, *tokenizer, *option(name, value)))
        assert name in assert_one_line_error(result, str(value)).replace("-", "_") and "Step" not in result[1]


@pytest.mark.parametrize("size", ["256", "0", "-5"])
def test_a_vocabulary_smaller_than_all_bytes_is_one_line_that_names_it(folder, call, size):
    line = assert_one_line_error(call("bpe", "--text", "my.txt", "--tokenizer", "story", "--vocab-size", size), size)
    assert "257" in line or "at least 1" in line


@pytest.mark.parametrize("options, name", [
    (["--tokenizer", "word", "--vocab-size", "300"], "--vocab-size"), (["--tokenizer", "word", "--full-vocab"], "full"),
    (["--tokenizer", "story", "--full-vocab"], "--full-vocab"), (["--full-vocab"], "--full-vocab"),
    (["--tokenizer", "gpt2", "--vocab-size", "300"], "--vocab-size"), (["--vocab-size", "300"], "--vocab-size")])
def test_what_a_tokenizer_cannot_or_may_not_use_is_refused(folder, call, options, name):
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
        assert status == 0 and (len(out) >= len(prompt) or command == ["next"])
        assert all(line.startswith("note: ") for line in err.splitlines())


@pytest.mark.parametrize("content, name", [(b"", "empty"), (b" \n\t ", "empty"), (b"a", "short"),
                                           (b"\xff\xfeO\0n\0c\0e\0", "short"), (b"\xef\xbb\xbf", "empty"),
                                           (b"Once \x93there\x94", "byte 0x93"), (bytes(range(256)) * 9, "UTF-8")])
def test_a_text_that_cannot_be_learned_is_one_line(folder, call, small, content, name):
    (folder / "strange.txt").write_bytes(content)
    for command in ("train", "evaluate", "model"):
        assert_one_line_error(call(*small(command, "--text", "strange.txt")), name)
    assert_one_line_error(call(*small("windows", "--text", "strange.txt")), "few" if name == "short" else name)


@pytest.mark.parametrize("content", ["Once there was a king", "Two words", "One.\r\nTwo.\r\nThree.\r\n", "😀 " * 30,
                                     "e\u0301 " * 99, "\0 \0 \0", "\x1b]0;title\x07 the king and the ferryman",
                                     "The king said one long sentence and then he went away."])
def test_a_strange_text_is_learned_from_and_no_nan_is_shown(folder, call, small, content):
    (folder / "strange.txt").write_bytes(content.encode())
    text = ["--text", "strange.txt"]
    for command in (["words", *text], small("bpe", *text, "--tokenizer", "story"),
                    small("windows", *text, "--context-length", "1"), small("model", *text), small("evaluate", *text),
                    small("train", *text), ["evaluate"], ["next"],
                    ["generate", f"--prompt={content[:1]}", "--max-new-tokens", "5"]):
        status, out, err = call(*command)
        assert status == 0 and "nan" not in out.lower() and "error" not in err, (command, err)


def test_a_text_with_a_byte_order_mark_and_other_line_ends_is_the_same_text(folder, trained_here, call, small):
    (folder / "bom.txt").write_bytes(b"\xef\xbb\xbf" + TEXT.replace("\n", "\r\n").encode())
    assert call(*small("train", "--text", "bom.txt", "--model", "bom.pt"))[0] == 0
    assert weights_equal(load_checkpoint("story_llm.pt").model, load_checkpoint("bom.pt").model)
    assert call("evaluate", "--text", "bom.txt")[2] == ""


def test_a_text_may_be_several_files_a_folder_or_standard_input(folder, call, small, monkeypatch):
    """All of them are the same text here, so they make the same model, and resuming finds them again."""
    lines = TEXT.splitlines(keepends=True)
    (folder / "parts").mkdir()
    for name, part in (("parts/1.txt", lines[:3]), ("parts/2.txt", lines[3:])):
        (folder / name).write_text("".join(part))
    (folder / "whole.txt").write_text("\n\n".join(map("".join, (lines[:3], lines[3:]))))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO((folder / "whole.txt").read_bytes())))
    runs = []
    for text in (["whole.txt"], ["parts/1.txt", "parts/2.txt"], ["parts"], ["-"]):
        assert call(*small("train", "--text", *text, "--model", "m.pt"))[0] == 0
        runs.append(load_checkpoint("m.pt"))
        assert runs[-1].text_paths == text and weights_equal(runs[-1].model, runs[0].model)
        if text != ["-"]:
            assert call("evaluate", "--model", "m.pt")[2] == ""
        os.remove("m.pt")
    assert call(*small("train", "--text", "parts/1.txt", "--text", "parts/2.txt"))[0] == 0     # also given one by one
    assert weights_equal(load_checkpoint("story_llm.pt").model, runs[0].model)


def test_an_encoding_that_is_named_is_remembered(folder, call, small):
    text = TEXT.replace("old", "très âgé")
    (folder / "cp.txt").write_text(text, encoding="cp1252")
    (folder / "utf.txt").write_text(text, encoding="utf-8")
    assert_one_line_error(call(*small("train", "--text", "cp.txt")), "cp.txt", "--encoding cp1252")
    assert call(*small("train", "--text", "cp.txt", "--encoding", "cp1252", "--max-steps", "2"))[0] == 0
    assert call("evaluate")[::2] == call("evaluate", "--text", "utf.txt")[::2] == (0, "")
    assert call("train", "--resume", "--max-steps", "3")[::2] == (0, "")
    assert call("train", "--resume", "--max-steps", "4", "--text", "utf.txt", "--encoding", "utf-8")[::2] == (0, "")
    assert load_checkpoint("story_llm.pt").step == 4
    assert call("evaluate")[::2] == (0, "")


def test_two_hundred_blank_lines_in_front_of_a_text_do_no_harm(folder, call, small):
    (folder / "blank.txt").write_text("\n" * 200 + TEXT)
    status, out, err = call(*small("train", "--text", "blank.txt"))
    assert (status, err) == (0, "") and load_checkpoint("story_llm.pt").prompt == PROMPT
    assert re.search(r"^Recall \d+\.\d%: \d+ of 5 sentences", out, re.MULTILINE)
    assert call("words", "--text", "blank.txt")[1].count(f"text:    {PROMPT}\n") == 1


# what is at --model already

@pytest.mark.parametrize("more", [["--text", "other.txt"], ["--emb-dim", "16"], ["--epochs", "3"], []])
def test_a_model_that_training_would_not_come_to_is_kept_under_another_name(folder, trained_here, call, small, more):
    """One of another text, another shape or other settings; or one that has got further, as the same training has after
    its first steps."""
    before = (folder / "story_llm.pt").read_bytes()
    (folder / "other.txt").write_text(TEXT.replace("boat", "raft"))
    status, out, err = call(*small("train", *more))
    assert status == 0 and err.count("\n") == 1 and "story_llm.old.pt" in err
    assert (folder / "story_llm.old.pt").read_bytes() == before
    run = load_checkpoint("story_llm.pt")
    assert run.step == run.total_steps
    assert (run.fingerprint == load_checkpoint("story_llm.old.pt").fingerprint) == ("--text" not in more)


def test_however_many_texts_are_learned_one_after_the_other_no_model_is_lost(folder, call, small):
    names, models = ["story_llm.old.pt", "story_llm.old2.pt", "story_llm.old3.pt"], []
    for number, thing in enumerate(["boat", "raft", "ship", "tub"]):
        (folder / "other.txt").write_text(TEXT.replace("boat", thing))
        status, _, err = call(*small("train", "--text", "other.txt", "--epochs", "1"))
        assert status == 0 and re.findall(r"story_llm\.old\d*\.pt", err) == names[max(0, number - 1):number]
        models.append((folder / "story_llm.pt").read_bytes())
    assert [(folder / name).read_bytes() for name in [*names, "story_llm.pt"]] == models


def test_an_earlier_state_of_the_same_training_is_replaced(folder, call, small):
    run, corpus = story_llm.new_run_from_args(story_llm.parse(small("train")))
    save_checkpoint("story_llm.pt", train_to(run, corpus, step=1))
    status, _, err = call(*small("train"))
    assert (status, err) == (0, "") and sorted(os.listdir()) == ["loss.png", "my.txt", "story_llm.pt"]
    assert load_checkpoint("story_llm.pt").step == 12


def test_a_file_that_is_not_a_model_is_not_lost_either(folder, call, small):
    (folder / "my.notes.txt").write_text("all that I know")
    status, _, err = call(*small("train", "--model", "my.notes.txt"))
    assert status == 0 and err.count("\n") == 1 and "my.notes.old.txt" in err
    assert (folder / "my.notes.old.txt").read_text() == "all that I know" and load_checkpoint("my.notes.txt").step > 0


@pytest.mark.parametrize("damage", [lambda content: content[:len(content) // 2], lambda content: b"",
                                    lambda content: content[:999] + bytes([content[999] ^ 1]) + content[1000:]])
def test_a_damaged_checkpoint_is_one_line_for_every_command(folder, trained_here, call, damage):
    (folder / "story_llm.pt").write_bytes(damage((folder / "story_llm.pt").read_bytes()))
    for command in (["generate"], ["plot"], ["next"], ["attention"], ["evaluate"], ["train", "--resume"]):
        assert_one_line_error(call(*command), "story_llm.pt")


# the tour

@pytest.fixture
def short_tour(folder, monkeypatch):
    """A tour through a small text with a small model."""
    monkeypatch.setattr(FIELDS["text"], "default", (str(folder / "my.txt"),))
    settings = {"context_length": 12, "emb_dim": 32, "n_layers": 1, "max_steps": 3}
    monkeypatch.setattr(story_llm, "settings_for_size", lambda n_bytes: settings)


def test_the_tour_shows_all_steps_in_its_own_folder_and_touches_nothing_else(folder, call, short_tour):
    mine = {name: f"my own {name}" for name in ("story_llm.pt", "loss.png", "attention.png", "story_llm.old.pt")}
    for name, content in mine.items():
        (folder / name).write_text(content)
    status, out, err = call("tour")
    assert status == 0 and "error" not in err
    titles = re.findall(r"^═══ steps? ([\d, ]+): ", out, re.MULTILINE)
    assert {int(number) for title in titles for number in title.split(", ")} == set(range(2, 14))
    commands = re.findall(r"^\$ python story_llm.py ?(.*)$", out, re.MULTILINE)
    assert {command.split()[0] for command in commands} == COMMANDS.keys() - {"tour"}
    assert sorted(os.listdir()) == sorted(["my.txt", "story_llm_tour", *mine]) and os.getcwd() == str(folder)
    assert all((folder / name).read_text() == content for name, content in mine.items())
    assert load_checkpoint("story_llm_tour/story_llm.pt").step == 3
    for name in ("story_llm_loss.png", "story_llm_attention.png"):
        assert min(png_size(folder / "story_llm_tour" / name)) > 200
    assert call("tour")[0] == 0     # a second time too


def test_a_step_of_the_tour_that_fails_ends_it(folder, call, monkeypatch):
    monkeypatch.setattr(FIELDS["text"], "default", ("missing.txt",))
    status, out, err = call("tour")
    assert status == 1 and "missing.txt" in err and err.count("\n") == 1 and os.getcwd() == str(folder)


# others

def test_a_reader_that_stops_reading_causes_no_traceback(folder):
    """As in `python story_llm.py | head -1`."""
    process = subprocess.Popen([sys.executable, PROGRAM, "bpe", "--text", "my.txt", "--tokenizer", "word"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=folder)
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) in (0, 1, 141)
    assert not any(words in err for words in (b"error", b"Error", b"Traceback", b"ignored")), err


def test_importing_runs_and_prints_nothing_and_needs_neither_matplotlib_nor_tiktoken(folder):
    program = "import sys, story_llm; print('matplotlib' in sys.modules, 'tiktoken' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert (done.stdout, done.stderr, done.returncode) == ("False False\n", "", 0)


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
    output = re.sub(r"step \d+ of [^\r\n]*\r(?!\n)", "", output).replace("\r\n", "\n")       # the live line returns
    assert len(output) > 50 and not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", output), repr(output)


def test_no_text_and_no_prompt_can_steer_the_terminal(folder, small):
    (folder / "evil.txt").write_text(f"{EVIL} {TEXT} {EVIL}", encoding="utf-8")
    text = ["--text", "evil.txt"]
    assert_harmless(on_a_terminal(
        ["words", *text, "--prompt", EVIL], small("bpe", *text, "--tokenizer", "story", "--prompt", EVIL),
        small("windows", *text), small("train", *text, "--epochs", "1"), ["evaluate"], ["next"],
        ["generate", "--prompt", EVIL], ["generate", "--prompt", f"a{EVIL}b"]))


def test_no_name_and_no_file_can_steer_the_terminal_through_an_error(folder, small):
    with zipfile.ZipFile(folder / "evil.pt", "w") as file:      # like a checkpoint, but for a name in it
        file.writestr("archive/data.pkl", b"\x80\x02cos\n\x1b]0;title\x07\n.")
    assert_harmless(on_a_terminal(["generate", "--model", "evil.pt"]))
    assert_harmless(on_a_terminal(small("evaluate", "--text", EVIL)))


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
    """A clock of its own, on which a second passes whenever somebody looks at it."""
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
