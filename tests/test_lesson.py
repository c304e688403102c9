"""What the lesson says is true: its examples, the outputs that it shows, its order, and what it needs."""
import ast
import builtins
import doctest
import json
import math
import importlib.metadata
import os
import platform
import re
import shlex
import shutil
import subprocess
import symtable
import sys
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from helpers import PROGRAM, ROOT, STORY, TEXT, bare_environment, printed_in, story_llm

SOURCE = PROGRAM.read_text(encoding="utf-8")
LINES = SOURCE.splitlines()
HEADINGS = {number: line for number, line in enumerate(LINES, 1) if re.match(r"# ═══ |# ─── ", line)}
WORKSHOP, COMMAND_LINE = [next(number for number, line in HEADINGS.items() if line.startswith(title))
                          for title in ("# ═══ Workshop: ", "# ═══ The command line ")]


def heading_of(line_number):
    """The step of the lesson in which a line stands, or None."""
    above = [number for number, line in HEADINGS.items() if number <= line_number < WORKSHOP and "═" in line]
    return HEADINGS[max(above)] if above else None


# examples

EXAMPLES = [test for test in doctest.DocTestFinder().find(story_llm, "story_llm") if test.examples]


@pytest.mark.parametrize("test", EXAMPLES, ids=lambda test: test.name)
def test_the_examples_give_the_answers_that_they_show_after_an_import_of_everything(test):
    """That is what the lesson tells the reader to enter first."""
    report, test.globs = [], {}
    exec("from story_llm import *", test.globs)
    assert doctest.DocTestRunner(verbose=False).run(test, out=report.append).failed == 0, "".join(report)


def test_an_import_of_everything_brings_what_the_file_defines_and_no_leaked_variable():
    """A loop at the level of the module leaves its variables behind."""
    defined = {node.name for node in ast.parse(SOURCE).body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    others = {"math", "torch", "nn", "F", "islice", "note_once"}
    assert set(story_llm.__all__) - others == defined and len(set(story_llm.__all__)) == len(story_llm.__all__)
    assert not {name for name in story_llm.__all__ if name.startswith("_") or hasattr(builtins, name)}


STATE = """if True:
    import json, os, random, signal, sys, threading, warnings
    {first}
    def state():
        torch = sys.modules.get("torch")
        return json.loads(json.dumps({{
            "environment": dict(os.environ), "random": hash(random.getstate()), "folder": os.getcwd(),
            "signals": [str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)],
            "threads": threading.active_count(), "warnings": len(warnings.filters), "path": sys.path,
            "torch": torch and [str(torch.initial_seed()), torch.get_rng_state().tolist(), torch.get_num_threads(),
                                str(torch.get_default_device()), str(torch.get_default_dtype()),
                                torch.get_float32_matmul_precision(), torch.is_grad_enabled()]}}))
    before = state()
    import story_llm
    print(json.dumps([before, state(), "matplotlib" in sys.modules or "tiktoken" in sys.modules]))"""


@pytest.mark.parametrize("first, added", [("pass", {"GOMP_SPINCOUNT": "2000"}), ("import torch, regex", {})],
                         ids=["first", "after torch"])
def test_importing_the_file_changes_nothing_but_how_long_threads_spin_and_only_if_torch_is_not_there_yet(
        tmp_path, first, added):
    environment = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "MPLBACKEND")}
    done = subprocess.run([sys.executable, "-c", STATE.format(first=first)], cwd=tmp_path, capture_output=True, text=True,
                          env={**environment, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "3"})
    assert (done.returncode, done.stderr) == (0, "")
    before, after, loads_more = json.loads(done.stdout)
    assert after["environment"] == {**before["environment"], **added} and not loads_more
    ignored = {"environment"} if first != "pass" else {"environment", "torch", "warnings", "threads"}   # torch's own
    assert {name: after[name] for name in before if name not in ignored} == {
        name: before[name] for name in before if name not in ignored}


# order

def test_the_lesson_has_13_steps_in_order_then_comes_the_workshop_then_the_command_line():
    order = [re.match(r"# ═══ (Step \d+|Workshop|The command line)\b", line)[1] for line in HEADINGS.values()
             if "═" in line]
    workshop = order.count("Workshop")
    assert order == [f"Step {step}" for step in range(1, 14)] + ["Workshop"] * workshop + ["The command line"]


def global_names(table):
    """[(a global name that a function or class uses, the line where that begins)] of a symbol table and those in it."""
    for child in table.get_children():
        yield from ((symbol.get_name(), child.get_lineno()) for symbol in child.get_symbols() if symbol.is_global())
        yield from global_names(child)


def test_nothing_in_the_lesson_or_the_workshop_uses_a_name_of_the_command_line():
    above = set()
    for node in ast.parse(SOURCE).body:
        if node.lineno >= COMMAND_LINE:
            names = [each for each in ast.walk(node) if isinstance(each, ast.Name)]
            stored = {each.id for each in names if isinstance(each.ctx, ast.Store)}
            above |= {node.name} if isinstance(node, ast.ClassDef | ast.FunctionDef) else stored
    assert {"log", "command_train", "COMMANDS", "Options", "Progress"} <= above
    used = list(global_names(symtable.symtable(SOURCE, "story_llm.py", "exec")))
    assert any(name == "log" and line > COMMAND_LINE for name, line in used)
    assert [(name, line) for name, line in used if line < COMMAND_LINE and name in above] == []


def definitions():
    """{heading in the lesson: names of the classes and functions that are defined below it}"""
    defined = {}
    for node in ast.parse(SOURCE).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and heading_of(node.lineno):
            defined.setdefault(heading_of(node.lineno), set()).add(node.name)
    return defined


@pytest.mark.parametrize("heading, defined", definitions().items(), ids=[name.strip("# ═─") for name in definitions()])
def test_every_step_of_the_lesson_has_an_example_that_is_run(heading, defined):
    """Only step 12 has none but the picture that its command draws."""
    with_examples = {test.name.split(".")[1] for test in EXAMPLES if "." in test.name}
    assert defined & with_examples or defined == {"plot_losses"}, f"none of {', '.join(sorted(defined))} has one"


def test_every_step_but_the_first_defines_something():
    """The first one tells what will be built. A step without code would have no example that could be tested."""
    steps = [int(step) for heading in definitions() for step in re.findall(r"═ Step (\d+): ", heading)]
    assert sorted(steps) == [*range(2, 14)]


# outputs

def shown_outputs():
    """[(a command that the lesson shows, the lines that stand below it)], in order of appearance."""
    shown = []
    for number, line in enumerate(LINES):
        if line.startswith("#     $ python story_llm.py "):
            rest = LINES[number + 1:]
            count = next(i for i, each in enumerate(rest) if not re.match(r"#     +[^$\s]", each))
            command = re.split("   +", line.removeprefix("#     $ python story_llm.py "))[0]     # without a remark
            shown.append((command, [each.removeprefix("#     ") for each in rest[:count]]))
    return [(command, lines) for command, lines in shown if lines]


SHOWN = shown_outputs()
# depends on the speed of the machine, or, half-way, on how it rounds
SPEED = re.compile(r",? [\d,]+ tokens/s|,? \d+:\d\d left|, recall (?!0%|100%)\d+%")


def parts(line):
    """The words, marks and numbers of a line, without those that depend on the speed of the machine."""
    return [float(part.replace(",", "")) if part[0].isdigit() else part
            for part in re.findall(r"\d[\d,]*(?:\.\d+)?|[^\s\d]+", SPEED.sub("", line.rstrip(" █")))]


def same_line(shown, printed, half_trained):
    """Whether the words are equal and the numbers nearly equal. What a model writes before it knows the story depends
    on how the machine rounds, so only the prompt is compared there. A line too long for the file ends after a word, with
    three dots or not."""
    if half_trained and printed.strip().startswith(story_llm.DEFAULT_PROMPT):
        return shown.strip().startswith(story_llm.DEFAULT_PROMPT)
    one, other = parts(shown), parts(printed)
    if (len("#     " + printed) > 100 and len(shown) >= 80) or shown.endswith(" ..."):
        one = parts(shown.removesuffix(" ..."))
        other = other[:len(one)]
    return len(one) == len(other) and all(
        a == pytest.approx(b, rel=0.05) if isinstance(a, float) and isinstance(b, float) else a == b
        for a, b in zip(one, other))


def missing(shown, printed, untrained=False):
    """The first of the shown lines that is not printed after those before it, or None. "..." stands for any lines."""
    start = 0
    for line in shown:
        if line.strip() == "...":
            continue
        before = [False, *("(Step " in each and "recall 100%" not in each for each in printed)]
        start = next((i + 1 for i in range(start, len(printed))
                      if same_line(line, printed[i], untrained or before[i])), None)
        if start is None:
            return line
    return None


@pytest.fixture(scope="module")
def printed(trained_with_defaults, tmp_path_factory):
    """{command: the lines that it prints}. The commands run in the order of the lesson. Those after `train` run in a
    folder with what it saved."""
    folder, training = trained_with_defaults
    before, outputs = tmp_path_factory.mktemp("before"), {}
    for command, _ in SHOWN:
        if command == "train":
            outputs[command] = training.splitlines()
            shutil.copytree(folder, before, dirs_exist_ok=True)
        else:
            outputs[command] = printed_in(before, shlex.split(command)).splitlines()
    return outputs


def steps_that_show():
    """{command: the steps in which the lesson shows it}"""
    steps, step = {}, 0
    for line in LINES[:WORKSHOP]:
        step += line.startswith("# ═══ Step ")
        for name in re.findall(r"^#     \$ python story_llm\.py (\w+)", line):
            steps.setdefault(name, set()).add(step)
    return steps


def test_each_step_shows_its_command():
    """The help of a command says which steps it belongs to. Steps that share one may show it once."""
    shown = steps_that_show()
    for name, (_, meaning, _) in story_llm.COMMANDS.items():
        steps = {int(step) for step in re.findall(r"\d+", meaning.partition(":")[0])} or {1}       # tour
        assert shown.get(name, set()) & steps, f"no {name} in step {steps}"
    assert {"generate --untrained", "evaluate --untrained"} <= {" ".join(c.split()[:2]) for c, _ in SHOWN}


@pytest.mark.parametrize("command, shown", SHOWN, ids=[command for command, _ in SHOWN])
def test_a_command_prints_what_the_lesson_shows(command, shown, printed):
    if command.startswith("next"):      # below the most likely token, rounding decides which come next
        shown = shown[:2]
    line = missing(shown, printed[command], "--untrained" in command)
    assert line is None, "\n".join([f"not printed (there): {line}", "printed:", *printed[command]])


@pytest.mark.parametrize("shown, wrong", [
    (["a", "b 1.00"], None), (["b 1.04"], None), (["b 1.06"], "b 1.06"), (["c 1.00"], "c 1.00"), (["b"], "b"),
    (["b 1.00 x"], "b 1.00 x"), (["a", "c d"], None), (["a", "...", "c d"], None), (["c d", "...", "a"], "a"),
    (["a", "a"], "a"), (["Ep 9, 5 tokens/s, 0:01 left"], None), (["Ep 8, 5 tokens/s"], "Ep 8, 5 tokens/s"),
    (["..."], None), ([], None), (["long " * 16 + "word"], None), (["long " * 16 + "wo"], "long " * 16 + "wo"),
    (["long " * 4], "long " * 4), (["long ..."], None), (["lang ..."], "lang ...")])
def test_the_comparison_notices_what_is_wrong(shown, wrong):
    long_line = "long " * 16 + "word and so on to the end of the line"
    assert missing(shown, ["a", "b  1.00", "c d", "Ep 9, 1,234 tokens/s, 2:03 left", long_line]) == wrong


def test_only_the_prompt_of_a_sample_is_compared_before_the_model_knows_the_story():
    prompt = story_llm.DEFAULT_PROMPT
    printed = ["Ep 1 (Step 000000): Train loss 7", f"    {prompt} ... noise", "Ep 2 (Step 000045): recall 100%",
               f"    {prompt} ... and"]
    assert missing(["Ep 1 (Step 000000): Train loss 7", f"    {prompt} ... other"], printed) is None
    assert missing(["Ep 2 (Step 000045): recall 100%", f"    {prompt} ... other"], printed) is not None
    assert missing([f"{prompt} x"], [f"{prompt} y"], untrained=True) is None
    assert missing(["Once x"], [f"{prompt} y"], untrained=True) == "Once x"


def test_every_command_that_the_file_names_exists(monkeypatch, capsys):
    """In its docstring, in the lesson and in the tour."""
    on_lines = re.findall(r"(?m)^ *(?:# *)?(?:\$ )?python story_llm\.py ([a-z].*?)(?:   .*)?$", SOURCE)
    in_sentences = re.findall(r"`python story_llm\.py ([a-z][^`]*)`", re.sub(r"\n *(?:# *)?", " ", SOURCE))
    assert len(on_lines) > len(SHOWN) > 0
    commands = {*on_lines, *in_sentences, *(command.format(text="", model="", prompt="Once") for command, _ in story_llm.TOUR)}
    reached = []
    monkeypatch.setattr(story_llm, "COMMANDS", {name: (reached.append, *rest)
                                                for name, (_, *rest) in story_llm.COMMANDS.items()})
    for command in commands:
        assert story_llm.main(shlex.split(command)) == 0, (command, capsys.readouterr().err)
    assert len(reached) == len(commands)


def test_every_option_that_the_file_names_exists():
    """Also in the errors and notes, which name the options that help."""
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+[a-z]", SOURCE))
    known = {story_llm.option_string(name) for name in story_llm.FIELDS} | {"--help"}
    assert len(named) > 10 and named - known == set()


def test_no_line_has_more_than_100_columns():
    assert [number for number, line in enumerate(LINES, 1) if len(line) > 100] == []


def test_the_sizes_that_the_lesson_names_are_those_of_the_story_with_gpt2s_tokens(gpt2):
    corpus = story_llm.corpus_from_text(story_llm.load_text(STORY))
    run = story_llm.new_run(corpus)
    V, C, n = run.config.vocab_size, run.config.emb_dim, story_llm.count_parameters(run.model)
    per_block = story_llm.count_parameters(run.model.trf_blocks[0])
    assert per_block == 12 * C ** 2 + 10 * C
    lesson = " ".join(line.removeprefix("# ") for line in LINES[:WORKSHOP])
    for words in (f"{V:,} in all", f"ln({V}) = {math.log(V):.2f}", f"a list of {n / 1e6:.1f} million numbers",
                  f"the {len(corpus.train_ids):,} tokens about once", f"After {run.total_steps} such training steps", "12 C^2 weights",
                  f"0 of {len(corpus.recall_tests)} sentences", f"for our C = {C}", f"about 1/{V}"):
        assert words in lesson, words
    assert run.steps_per_epoch == 9 and "An epoch is nine steps" in lesson


# what it needs

def script_metadata():
    """What the comment at the beginning tells `uv run` and other programs, as defined in PEP 723."""
    blocks = re.findall(r"(?m)^# /// script$\n((?:^#(?: .*)?$\n)+?)^# ///$", SOURCE)
    assert len(blocks) == 1
    return tomllib.loads("".join(line.removeprefix("#").removeprefix(" ") for line in blocks[0].splitlines(True)))


def test_the_file_names_the_packages_of_requirements_txt_and_ranges_that_include_its_versions():
    ranges = {each.name: each.specifier for each in map(Requirement, script_metadata()["dependencies"])}
    pinned = dict(line.split("==") for line in (ROOT / "requirements.txt").read_text().split())
    assert ranges.keys() == pinned.keys() and len(ranges) == len(script_metadata()["dependencies"])
    for name, version in pinned.items():
        assert re.fullmatch(r"[\d.]+", version) and ranges[name].contains(version), name
        assert any(each.operator == ">=" for each in ranges[name]), f"{name} has no oldest version"


def test_this_python_is_one_that_the_file_asks_for():
    asked = SpecifierSet(script_metadata()["requires-python"])
    assert asked.contains(platform.python_version(), prereleases=True) and not asked.contains("3.10.99")


def test_the_file_imports_only_pythons_own_modules_and_the_packages_that_it_names():
    """And regex, because tiktoken needs it too."""
    imported = set()
    for node in ast.walk(ast.parse(SOURCE)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    named = {Requirement(each).name for each in script_metadata()["dependencies"]}
    assert imported - sys.stdlib_module_names == named | {"regex"}
    assert "regex" in {Requirement(each).name for each in importlib.metadata.requires("tiktoken")}


def test_copied_alone_beside_a_text_the_file_works_and_generates_without_the_text_and_a_network(
        tmp_path, tmp_path_factory, run_program):
    program = shutil.copy(PROGRAM, tmp_path / "story_llm.py")
    (tmp_path / "my.txt").write_text(TEXT, encoding="utf-8")
    cache = tmp_path_factory.mktemp("cache")
    alone = {**bare_environment(cache), "PYTHONPATH": ""}
    small = ["--tokenizer", "word", "--emb-dim", "32", "--n-layers", "1", "--max-steps", "3"]
    done = run_program(tmp_path, "train", "--text", "my.txt", *small, program=program, **alone)
    assert done.returncode == 0 and "story_llm.pt" in done.stdout, done.stderr
    (tmp_path / "my.txt").unlink()
    done = run_program(tmp_path, "generate", "--prompt", "The old ferryman tied his", "--max-new-tokens", "3",
                       program=program, **alone)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("The old ferryman tied his ")
    assert {name for name in os.listdir(tmp_path) if name != "__pycache__"} == {
        "story_llm.py", "story_llm.pt", "loss.png"}
    assert os.listdir(cache) == []


def test_without_the_story_that_comes_with_it_the_file_asks_for_a_text(tmp_path, run_program):
    done = run_program(tmp_path, "words", program=shutil.copy(PROGRAM, tmp_path), PYTHONPATH="")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith("error: ") and "Short_Story.txt" in done.stderr and "--text" in done.stderr
