"""extras/notebook.py, story_llm.ipynb and extras/exercises.md: the notebook says what the lesson says and runs from top
to bottom; whoever edits a cell changes the program; the answers to the exercises print what they state."""
import ast
import contextlib
import doctest
import io
import math
import re
import shutil
import sys

import nbformat
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import PROGRAM, ROOT, STORY, bare_environment, story_llm

sys.path.insert(0, str(ROOT / "extras"))
import lesson  # noqa: E402
import notebook  # noqa: E402

COMMITTED = ROOT / "story_llm.ipynb"
SOURCE = PROGRAM.read_text(encoding="utf-8")
LESSON = SOURCE.partition("\n# ═══ Workshop")[0]


def code_cells(cells):
    return [cell for cell in cells if cell.cell_type == "code"]


# the exercises

EXERCISES = {int(text.partition(":")[0]): text
             for text in lesson.EXERCISES.read_text(encoding="utf-8").split("\n## Step ")[1:]}
DEFINITION = ast.FunctionDef | ast.ClassDef
SHORT = "TrainConfig(eval_every=9, max_steps=9)"


def parts_of(step):
    """(The question, the prose of the answer, its code, and what the answer says that the code prints)."""
    question, answer = EXERCISES[step].split("\n### Answer\n")
    prose, code, stated = re.fullmatch(r"(.*)```python\n(.*?)```\n\n((?: {4}.*\n?)+)\s*", answer, re.DOTALL).groups()
    return question, prose, code, re.sub(r"(?m)^ {4}", "", stated).rstrip()


def numbers(text):
    return [float(number.replace(",", "")) for number in re.findall(r"\d[\d,]*(?:\.\d+)?", text)]


def printed_by(code):
    """What the code of an answer prints after the import that the lesson asks for."""
    names, out = {}, io.StringIO()
    exec("from story_llm import *", names)
    with contextlib.redirect_stdout(out):
        exec(code, names)
    return out.getvalue().rstrip()


@pytest.fixture
def beside_the_story(tmp_path, monkeypatch):
    shutil.copy(STORY, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def check_answer(step, tolerance=(0.0, 0.0)):
    """The answer prints what it states; numbers may differ by an absolute and a relative tolerance."""
    _, _, code, stated = parts_of(step)
    printed = printed_by(code)
    absolute, relative = tolerance
    assert re.sub(r"[\d ]+", " ", printed) == re.sub(r"[\d ]+", " ", stated)
    for found, expected in zip(numbers(printed), numbers(stated), strict=True):
        assert found == pytest.approx(expected, abs=absolute, rel=relative), printed
    return numbers(printed)


def test_there_are_six_exercises_at_different_steps_each_with_a_question_code_and_its_output():
    assert len(EXERCISES) == 6 and list(EXERCISES) == sorted(EXERCISES) and set(EXERCISES) <= set(range(1, 14))
    for step in EXERCISES:
        question, prose, code, stated = parts_of(step)
        assert "?" in question and prose.strip() and stated
        assert max(map(len, code.splitlines())) <= 100 and "print(" in code


def test_the_merges_of_step_4(beside_the_story):
    assert len(STORY.read_bytes()) == 20759
    found = check_answer(4)
    tokens = dict(zip(found[:14:2], found[1:14:2]))
    gains = [tokens[n] - tokens[2 * n] for n in (128, 256, 512)]
    assert gains == sorted(gains, reverse=True) and gains[0] == 1705 and tokens[128] < 20759 / 2
    assert (tokens[0] - tokens[1], tokens[1023] - tokens[1024]) == (663, 2)


def test_order_needs_the_mask_and_two_blocks_as_step_6_says(monkeypatch):
    _, one, _, two = check_answer(6, (0.02, 0))
    assert one == 0 < two
    monkeypatch.setattr(story_llm, "causal_mask", lambda T, S, device=None: torch.zeros(T, S, dtype=torch.bool))
    assert numbers(printed_by(parts_of(6)[2])) == [1, 0, 2, 0]


def test_the_parameters_of_step_7():
    check_answer(7)
    table = [line for line in parts_of(7)[1].splitlines() if line.startswith("    ")]
    embedding, positions, block, blocks, norm, total = [numbers(line)[-1] for line in table]
    assert 12 * block == blocks and embedding + positions + blocks + norm == total
    assert f"vocabulary takes {embedding / total:.0%}" in EXERCISES[7]


def test_the_frequencies_of_step_9_and_when_training_passes_them(beside_the_story, trained_with_defaults):
    uniform, frequencies, pairs, *_ = check_answer(9)
    run = story_llm.load_checkpoint(trained_with_defaults[0] / "story_llm.pt")
    losses = {evaluation.step: evaluation.train_loss for evaluation in run.history}
    assert uniform > losses[9] > frequencies > losses[45] > pairs > losses[90]


def test_a_text_without_sense_is_learned_as_well_as_step_10_says(beside_the_story):
    check_answer(10, (0.15, 0.08))


def test_sampling_loses_the_sentences_that_step_13_says(beside_the_story, trained_with_defaults):
    shutil.copy(trained_with_defaults[0] / "story_llm.pt", beside_the_story)
    n_tokens, loss, _, greedy, *_, one, _, _ = check_answer(13, (1, 0.1))
    assert greedy == 100 and math.exp(-loss) ** n_tokens == pytest.approx(one / 100, abs=0.06)
    run = story_llm.load_checkpoint("story_llm.pt")
    ids = run.tokenizer.encode(story_llm.split_text(story_llm.load_text(STORY), run.train_config)[0])
    inputs, targets = story_llm.SlidingWindowDataset(torch.tensor(ids), 32, stride=32)[:]
    with torch.no_grad():
        by_position = torch.nn.functional.cross_entropy(run.model(inputs).transpose(1, 2), targets, reduction="none")
    by_position = by_position.mean(dim=0)
    assert by_position.mean() == pytest.approx(0.22, abs=0.03) and by_position[:10].sum() > by_position[10:].sum()


def test_his_looks_at_aadhan_in_a_head_of_block_2_as_the_notebook_says(trained_with_defaults):
    run = story_llm.load_checkpoint(trained_with_defaults[0] / "story_llm.pt")
    ids = torch.tensor([run.tokenizer.encode("Once Aadhan renounced his")])
    assert run.tokenizer.decode([ids[0, 1].item()]) == " Aad"
    assert story_llm.attention_maps(run.model, ids)[1, :, 5, 1].max() > 0.5


# the cells

def test_the_committed_notebook_has_the_cells_of_the_lesson_of_today_and_their_results():
    committed = nbformat.read(COMMITTED, 4)
    nbformat.validate(committed)
    expected = notebook.make_notebook()
    assert [(cell.id, cell.cell_type, cell.source) for cell in committed.cells] == [
        (cell.id, cell.cell_type, cell.source) for cell in expected.cells], "python extras/notebook.py story_llm.ipynb"
    assert COMMITTED.stat().st_size < 700_000
    cells = code_cells(committed.cells)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert sum("image/png" in output.get("data", ()) for output in outputs) == 5
    assert all(output.output_type != "error" and output.get("name") != "stderr" for output in outputs)
    check_examples(cells)


def check_examples(cells):
    """The cells of the examples show what the lesson says that Python prints, one after the other."""
    shown = {}
    for cell in cells:
        for output in cell.outputs:
            if output.output_type == "execute_result":
                shown.setdefault(cell.source, []).append("".join(output.data["text/plain"].split()))
    wanted = []
    for statement in ast.walk(ast.parse(LESSON)):
        if isinstance(statement, DEFINITION):
            wanted += doctest.DocTestParser().get_examples(ast.get_docstring(statement) or "")
    wanted = [example for example in wanted if example.want]
    assert len(wanted) > 40
    for example in wanted:
        found = [texts for source, texts in shown.items() if source.endswith(example.source.rstrip())]
        assert "".join(example.want.split()) in [text for texts in found for text in texts], example.source


def test_every_definition_of_the_lesson_is_a_cell_of_its_own():
    cells = [cell.source for cell in code_cells(notebook.make_notebook().cells)]
    found = {}
    for source in cells:
        with contextlib.suppress(SyntaxError):      # %run
            statements = ast.parse(source).body
            if statements and isinstance(statements[0], DEFINITION):
                found.setdefault(statements[0].name, []).append(statements)
    wanted = [statement for statement in ast.parse(LESSON).body if isinstance(statement, DEFINITION)]
    assert len(wanted) > 40
    for statement in wanted:
        documentation = ast.get_docstring(statement) or ""
        if documentation:
            del statement.body[0]
        if not statement.body:          # a part of the text, with examples
            assert statement.name not in found
            continue
        [[cell]] = found[statement.name]
        if (kept := ast.get_docstring(cell)) is not None:
            assert "".join(kept.split()) == "".join(documentation.partition("\n\n")[0].split())
            del cell.body[0]
        assert ast.dump(cell) == ast.dump(statement)


def test_every_line_of_prose_of_the_lesson_is_in_the_notebook():
    """Comments, and what the docstrings say around their examples; without white space and escapes."""
    cells = notebook.make_notebook().cells
    text = "".join("".join(cell.source.split()).replace("\\", "") for cell in cells)
    comments = LESSON.partition('"""')[2].splitlines()          # without what tells systems how to run the file
    lines = [line.strip("# ═─") for line in comments if line.startswith("#")]
    for statement in ast.parse(LESSON).body:
        if isinstance(statement, DEFINITION):
            documentation = re.sub(r"(?m)^>>>.*(\n.+)*", "", ast.get_docstring(statement) or "")
            lines += documentation.splitlines()
    assert len(lines) > 500
    for line in lines:
        assert "".join(line.split()).replace("\\", "") in text, line


@given(st.text(st.sampled_from("ab `*_<$[\\|>#^-"), max_size=30))
def test_prose_is_escaped_where_markdown_would_see_a_sign(text):
    escaped = notebook.escape(text)
    assert re.sub(r"\\([\\*_<$\[])", r"\1", escaped) == text or "`" in text
    outside = re.sub(r"`[^`]+`", "", escaped)
    assert re.search(r"(?<!\\)(?:\\\\)*[*_<$\[]", outside) is None


@pytest.mark.parametrize("code", [
    "def f(x):\n    return x", "class A:\n    n = 1\n\n    def f(self):\n        pass",
    "@dataclass(frozen=True)\nclass A:\n    # about n\n\n    n: int = 1",
    "def f(a,\n      b):\n    @g\n    def h():\n        pass"])
def test_a_docstring_comes_first_in_the_body(code):
    text = r"Say \n and `x`, " + "again " * 40 + "at last."
    documented = notebook.with_docstring(code, text)
    statement = ast.parse(documented).body[0]
    assert " ".join(ast.get_docstring(statement).split()) == text
    assert max(map(len, documented.splitlines())) <= 100
    del statement.body[0]
    assert ast.dump(statement) == ast.dump(ast.parse(code).body[0])


# running

@pytest.fixture
def own_kernel(tmp_path, monkeypatch, bare):
    """A home for kernels, so that the one of this Python runs, without a network and without GPT-2's files."""
    home = tmp_path / "home"
    home.mkdir()
    for name, value in {**bare_environment(bare), "PYTHONPATH": "", **{
            name: str(home) for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR")}}.items():
        monkeypatch.setenv(name, value)


def test_it_runs_from_top_to_bottom_and_an_edited_cell_changes_the_training(own_kernel, tmp_path, monkeypatch):
    """With nothing but the two files beside it, and nine steps of training. Then, as a reader would do,
    FeedForward gets another activation function, and its cell and the training are run again."""
    cells = {cell.id: cell for cell in notebook.make_notebook().cells}
    [training] = [cell for cell in cells.values() if "in training_steps(story_run" in cell.source]
    assert "TrainConfig(eval_every=9)" in training.source
    training.source = training.source.replace("TrainConfig(eval_every=9)", SHORT)
    [feed_forward] = [cell for cell in cells.values() if cell.source.startswith("class FeedForward(")]
    edited = re.sub(r"F\.gelu\((.*), approximate=.*?\)", r"F.relu(\1)", feed_forward.source)
    assert edited.count("F.relu(") == 1 and "gelu(" not in edited
    losses = "[evaluation.train_loss for evaluation in story_run.history]"
    new = nbformat.v4.new_code_cell
    again = nbformat.v4.new_notebook(metadata=notebook.make_notebook().metadata, cells=[
        *cells.values(), new(losses), new(edited), new(training.source), new(losses)])
    folder = tmp_path / "folder"
    folder.mkdir()
    for path in (STORY, PROGRAM):
        shutil.copy(path, folder)
    notebook.run_notebook(again, folder)

    assert {path.name for path in folder.iterdir()} == {"story_llm.py", "Short_Story.txt", "notebook.pt"}
    assert story_llm.load_checkpoint(folder / "notebook.pt").step == 9
    ran = code_cells(again.cells)
    check_examples(ran)
    for cell in ran:
        shown = [kind for output in cell.outputs for kind in output.get("data", ())]
        draws = cell.source.endswith("\nfigure") or re.search(r"(?:^|[\n.(])plot_\w+\(\w+(, \"|\.history)", cell.source)
        assert ("image/png" in shown) == bool(draws), cell.source
        assert all(output.output_type != "error" and output.get("name") != "stderr" for output in cell.outputs)

    # the same training in this process, with the other activation function
    corpus = story_llm.corpus_from_text(story_llm.load_text(STORY))
    settings = story_llm.TrainConfig(eval_every=9, max_steps=9)
    monkeypatch.setattr(story_llm.F, "gelu", lambda x, approximate: x.relu())
    run = story_llm.new_run(corpus, train_config=settings)
    for _ in story_llm.training_steps(run, corpus):
        pass
    before, after = [ast.literal_eval(cell.outputs[0].data["text/plain"]) for cell in (ran[-4], ran[-1])]
    assert after == pytest.approx([evaluation.train_loss for evaluation in run.history], abs=1e-3)
    assert abs(before[-1] - after[-1]) > 0.01


def test_the_code_of_the_readme_works_in_a_notebook(own_kernel, tmp_path):
    """That of the section "From Python", one cell a block, with three steps, in a folder with the program and the story.
    A cell that ends with a picture shows it."""
    for path in (STORY, PROGRAM):
        shutil.copy(path, tmp_path)
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## From Python\n")[1].split("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    sources = [re.sub(r"max_steps=\d+", "max_steps=3", block) for block in blocks]
    assert sources != blocks
    readme = nbformat.v4.new_notebook(metadata=notebook.make_notebook().metadata,
                                      cells=[nbformat.v4.new_code_cell(source) for source in sources])
    notebook.run_notebook(readme, tmp_path)
    pictures = 0
    for cell in readme.cells:
        shown = [kind for output in cell.outputs for kind in output.get("data", ())]
        draws = re.match(r"[\w.]*plot_\w+\(", cell.source.strip().splitlines()[-1]) is not None
        assert ("image/png" in shown) == draws, cell.source
        pictures += draws
        if re.search(r"\btrain\(", cell.source):
            printed = "".join(output.get("text", "") for output in cell.outputs)
            assert re.search(r"\(Step 000003\): Train loss", printed)
    assert pictures > 0
    for name in re.findall(r"[\w-]+\.pt\b", "".join(sources)):
        run = story_llm.load_checkpoint(tmp_path / name)
        assert run.step == run.total_steps == 3


# the command line

@pytest.mark.parametrize("path, message", [("lesson.txt", ".ipynb"), ("nowhere/lesson.ipynb", "folder that exists")])
def test_a_mistake_is_one_line_before_anything_runs(path, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(notebook, "run_notebook", None)
    assert notebook.main([path]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and message in err


@pytest.mark.parametrize("package", ["nbformat", "nbclient"])
def test_a_package_that_is_missing_is_named_in_one_line(package, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    assert notebook.main([str(tmp_path / "lesson.ipynb")]) == 1
    _, err = capsys.readouterr()
    assert f"pip install {package}" in err.splitlines()[-1]


def test_the_command_runs_the_cells_and_leaves_only_the_notebook(own_kernel, tmp_path, monkeypatch, capsys):
    start = ("code", "%run -n -i story_llm.py")
    monkeypatch.setattr(notebook, "lesson_cells", lambda: {1: [start, ("code", "len(load_text('Short_Story.txt'))")]})
    folder = tmp_path / "folder"
    folder.mkdir()
    assert notebook.main([str(folder / "a.ipynb")]) == 0
    assert [path.name for path in folder.iterdir()] == ["a.ipynb"]
    written = nbformat.read(folder / "a.ipynb", 4)
    assert written.cells[1].outputs[0].data["text/plain"] == str(len(story_llm.load_text(STORY)))
