"""Write the lesson of story_llm.py as a notebook, and run it.

    python extras/notebook.py story_llm.ipynb

All prose and all code of the lesson come from story_llm.py, and the exercises from exercises.md.
What belongs to a notebook alone, such as the curve that is drawn while the model trains, stands
below. `python extras/lesson.py story_llm.ipynb` writes the same cells without running them.
"""
import ast
import doctest
import re
import shutil
import sys
import tempfile
import textwrap
from collections import defaultdict
from itertools import groupby, pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))      # the folder of story_llm.py
import story_llm
from lesson import EXERCISES, read_exercises, read_lesson
from story_llm import StoryError, log

# ─── What belongs to the notebook alone ────────────────────────────────────────────────────────
# A cell is a pair (type, source). These stand at the beginning, and at the end of a step.
BEGINNING = [
    ("markdown", """\
---

You are reading the lesson as a notebook. Run its cells from top to bottom, with Shift-Enter.
Two files of the project must be in the same folder: `story_llm.py` and `Short_Story.txt`. In
Colab, upload them with the folder icon on the left, and enter `%pip install tiktoken` in a cell
of its own; torch and matplotlib are installed there.

The cell below brings the whole program into the notebook, workshop included. After it, every
definition of the lesson has a cell of its own. Change one and run it, and from then on the
program uses yours."""),
    ("code", "%run -n -i story_llm.py")]

AFTER_STEP = {
    6: [
        ("markdown", """\
#### The attention of an untrained model

Now the definitions above are put to work: a model for the story, with random weights. In each
head, a token spreads its attention almost evenly over itself and what came before. Compare that
with the picture in step 13."""),
        ("code", """\
story_corpus = corpus_from_text(load_text("Short_Story.txt"))
untrained = new_run(story_corpus)
plot_attention(untrained, "Once Aadhan renounced his kingdom")""")],
    10: [
        ("markdown", """\
#### Your model trains

This takes about a minute. After every epoch, the curves are drawn anew, and after every third
step, the cell asks the model what follows "Once Aadhan renounced his" and keeps the answer."""),
        ("code", """\
settings = TrainConfig(eval_every=9)            # evaluate after every epoch
story_run = new_run(story_corpus, train_config=settings)
prompt_ids = torch.tensor([story_run.tokenizer.encode("Once Aadhan renounced his")])
growth = {}                                     # {step: the probabilities of the next token}
picture = display("the model is being evaluated ...", display_id=True)
for _ in training_steps(story_run, story_corpus):
    if story_run.step % 3 == 0:
        with torch.no_grad():
            growth[story_run.step] = story_run.model(prompt_ids)[0, -1].softmax(dim=-1)
    if story_run.history[-1].step == story_run.step:
        picture.update(plot_losses(story_run.history, story_run.config.vocab_size))
print(story_run.write("Once Aadhan renounced his kingdom", max_new_tokens=20))"""),
        ("markdown", """\
How does a prediction grow? The picture shows the six tokens whose probability rose highest. What
is frequent everywhere comes first, then what may follow "his", and at last the one word that
follows it here."""),
        ("code", """\
steps, probabilities = list(growth), torch.stack(list(growth.values()))     # (steps, V)
figure = new_figure(figsize=(8, 4))
axes = figure.subplots()
for token_id in probabilities.amax(dim=0).topk(6).indices.tolist():
    name = story_run.tokenizer.decode([token_id])
    axes.plot(steps, probabilities[:, token_id].tolist(), label=repr(name))
axes.set(title="What comes next after \\"Once Aadhan renounced his\\"?", xlabel="training steps",
         ylabel="probability", ylim=(0, 1))
axes.legend()
figure"""),
        ("markdown", """\
#### Change the program

Go back to a definition and change it: `F.relu` instead of `F.gelu` in `FeedForward`, or
attention without the mask. Run its cell, then the cell that trains, and compare the curves.""")],
    11: [
        ("markdown", """\
Your model is saved as `notebook.pt`, so that a `story_llm.pt` from the command line stays as it
is. Where an answer to an exercise loads `story_llm.pt`, load this file."""),
        ("code", """save_checkpoint("notebook.pt", story_run)""")],
    13: [
        ("markdown", """\
#### Your model, from its file

It continues a prompt, and the picture shows again where each token looks for information. What was
spread evenly in step 6 has found its places: in one head of block 2, "his" gives most of its
attention to the beginning of "Aadhan"."""),
        ("code", """\
story_run = load_checkpoint("notebook.pt")
print(story_run.write("Vikram was alone.", max_new_tokens=20))"""),
        ("code", """plot_attention(story_run, "Once Aadhan renounced his kingdom")"""),
        ("markdown", """\
Several sentences begin with "Aadhan", so what comes next is open. These are the most likely
tokens, at three temperatures. Change the prompt, or the sampling."""),
        ("code", """\
window = torch.tensor([story_run.tokenizer.encode("Aadhan")])
figure = new_figure(figsize=(9, 3))
for axes, temperature in zip(figure.subplots(1, 3, sharex=True), (0.5, 1.0, 1.5)):
    sampling = Sampling(temperature=temperature)
    probabilities = predict_next(story_run.model, window, sampling, KeyValueCache())[0]
    values, token_ids = probabilities.topk(8)
    names = [repr(story_run.tokenizer.decode([token_id])) for token_id in token_ids.tolist()]
    axes.barh(names, values.tolist())
    axes.set(title=f"temperature {temperature}", xlabel="probability")
    axes.invert_yaxis()             # the most likely token on top
figure""")]}

# ─── From the lesson to cells ──────────────────────────────────────────────────────────────────
def lesson_cells():
    """Return the cells of the notebook as {step: [(type, source)]}."""
    exercises = defaultdict(list)           # {step: cells}
    for exercise in read_exercises(EXERCISES.read_text(encoding="utf-8")):
        exercises[exercise.step] += cells_of_exercise(exercise)
    source = Path(story_llm.__file__).read_text(encoding="utf-8")
    cells = {}
    for step in read_lesson(source):
        if step.number == 0:
            # the code before step 1 is mostly imports, and %run brings what they bring
            prose = [block for block in step.blocks if block.kind != "code"]
            title = ("markdown", f"# {step.title.removesuffix('.')}")
            found = [title, *cells_of(prose), *BEGINNING]
        else:
            end = end_of_subject(step.blocks)
            title = ("markdown", f"## Step {step.number}: {step.title}")
            found = [title, *cells_of(step.blocks[:end]), *AFTER_STEP.get(step.number, []),
                     *exercises[step.number], *cells_of(step.blocks[end:])]
        cells[step.number] = join_prose(found)
    return cells

def end_of_subject(blocks):
    """Where the blocks on the subject of a step end. A step with several sections has divided its
    subject; a single section, such as the page on PyTorch, comes after it."""
    headings = [i for i, block in enumerate(blocks) if block.kind == "heading"]
    return headings[0] if len(headings) == 1 else len(blocks)

def cells_of(blocks):
    """The cells for some blocks of the lesson."""
    cells = []
    rest = list(blocks)
    while rest:
        block = rest.pop(0)
        if block.kind == "example":
            cells += cells_of_example(block.text)
        elif block.kind != "code":
            cells.append(("markdown", as_markdown(block)))
        elif has_body(block.text):
            code = block.text
            if rest and rest[0].of and is_summary(rest[0]):
                code = with_docstring(code, rest.pop(0).text)
            cells.append(("code", code))
    return cells

def has_body(code):
    """Whether a block of code is more than the first line of a definition."""
    return not re.fullmatch(r"(def|class) .*:", code)

def is_summary(block):
    """Whether the first block of a docstring stays in the code, for help(). A sentence that ends
    with a colon introduces the example below."""
    return block.kind == "prose" and not block.text.endswith(":")

def with_docstring(code, text):
    """Put a docstring into the code of a definition."""
    lines = code.split("\n")
    statement = ast.parse(code).body[0].body[0]
    decorators = getattr(statement, "decorator_list", [])
    start = min(node.lineno for node in [statement, *decorators]) - 1
    while lines[start - 1].lstrip().startswith("#") or not lines[start - 1]:
        start -= 1                      # a comment or an empty line above the first statement
    text = text.replace("\\", "\\\\")
    docstring = textwrap.wrap(f'"""{text}"""', 100, initial_indent="    ",
                              subsequent_indent="    ", break_on_hyphens=False)
    return "\n".join(lines[:start] + docstring + lines[start:])

def cells_of_example(text):
    """Cells for what is entered after >>>. Each shows one result, below its last line."""
    cells, lines = [], []
    for example in doctest.DocTestParser().get_examples(text):
        lines.append(example.source.rstrip())
        if example.want:
            cells.append(("code", "\n".join(lines)))
            lines = []
    if lines:
        cells.append(("code", "\n".join(lines)))
    return cells

def as_markdown(block):
    """A block in Markdown. Whatever keeps its line breaks is set like code."""
    if block.kind == "heading":
        return f"### {escape(block.text)}"
    if block.kind == "prose":
        return escape(block.text)
    language = "python" if block.kind == "code" else ""
    return f"```{language}\n{block.text}\n```"

def escape(text):
    """Let Markdown show a text as it is, except for what stands between backticks."""
    parts = re.split(r"(`[^`]+`)", text)        # every second one is code
    parts[::2] = [re.sub(r"([\\*_<$\[])", r"\\\1", part) for part in parts[::2]]
    return "".join(parts)

def join_prose(cells):
    """Join the cells of prose that follow one another, so that a step reads as a page."""
    joined = []
    for cell_type, group in groupby(cells, key=lambda cell: cell[0]):
        sources = [source for _, source in group]
        if cell_type == "markdown":
            sources = ["\n\n".join(sources)]
        joined += [(cell_type, source) for source in sources]
    return joined

def cells_of_exercise(exercise):
    """Cells for the question of an exercise, for the reader's code, and for the answer, folded."""
    question = "\n\n".join(as_markdown(block) for block in exercise.question)
    parts = []
    for before, block in pairwise([None, *exercise.answer]):
        if before and before.kind == "code":
            parts.append("It prints:")
        parts.append(as_markdown(block))
    answer = "\n\n".join(parts)
    return [("markdown", f"#### Exercise: {exercise.title}\n\n{question}"),
            ("code", "# Try it here."),
            ("markdown", f"<details>\n<summary>Answer</summary>\n\n{answer}\n\n</details>")]

# ─── The file ──────────────────────────────────────────────────────────────────────────────────
def make_notebook():
    """Return the notebook, without results. Raises StoryError if nbformat is not installed."""
    try:
        from nbformat import v4
    except ModuleNotFoundError:
        raise StoryError("a notebook needs the package nbformat: python -m pip install "
                         "nbformat") from None
    cells = []
    for step, pairs in lesson_cells().items():
        for i, (cell_type, source) in enumerate(pairs):
            new_cell = v4.new_code_cell if cell_type == "code" else v4.new_markdown_cell
            cells.append(new_cell(source, id=f"step-{step}-cell-{i}"))
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})

def write_notebook(path, notebook=None):
    """Write a notebook, by default the lesson without results. Raises StoryError."""
    path = story_llm.check_file_path(path, (".ipynb",))
    notebook = notebook or make_notebook()
    import nbformat
    nbformat.validate(notebook)
    try:
        path.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8", newline="\n")
    except OSError as error:
        raise StoryError(f"{path} could not be written ({error.strerror})") from None

def run_notebook(notebook, folder):
    """Run all cells in a folder that has story_llm.py and Short_Story.txt; the results are stored
    in the notebook. An error in a cell is raised."""
    try:
        from nbclient import NotebookClient
    except ModuleNotFoundError:
        raise StoryError("running a notebook needs the packages nbclient and ipykernel: python -m "
                         "pip install nbclient ipykernel") from None
    client = NotebookClient(notebook, timeout=1800, record_timing=False,
                            resources={"metadata": {"path": str(folder)}})
    client.execute()
    notebook.metadata = {**notebook.metadata, "language_info": {"name": "python"}}

# ─── The command line ──────────────────────────────────────────────────────────────────────────
def run_command(argv):
    parser = story_llm.Parser(prog="extras/notebook.py", allow_abbrev=False,
                              description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("notebook", metavar="NAME.ipynb", help="the notebook to write")
    path = parser.parse_args(argv).notebook
    story_llm.check_writable(path, (".ipynb",))
    notebook = make_notebook()
    log("running the cells, which takes about a minute ...", sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        for file in (story_llm.__file__, story_llm.DEFAULT_TEXT):
            shutil.copy(file, folder)
        run_notebook(notebook, folder)
    write_notebook(path, notebook)
    log(f"wrote {path}: {Path(path).stat().st_size / 1000:.0f} KB. Open it in Jupyter")

def main(argv=None):
    """Run the program with the words of a command line; return the exit status."""
    return story_llm.exit_status(run_command, sys.argv[1:] if argv is None else argv)

if __name__ == "__main__":
    sys.exit(main())
