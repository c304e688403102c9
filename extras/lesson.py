"""Write the lesson of story_llm.py as a web page, with your own model alive in it.

    python extras/lesson.py --model story_llm.pt lesson.html

The text stands in story_llm.py and nowhere else. This program reads it there: comments and
docstrings become prose, code stays code, and the examples look like the sessions that they are.
"""
import ast
import inspect
import re
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))      # the folder of story_llm.py

# ─── Reading the lesson ────────────────────────────────────────────────────────────────────────
# A step begins with "# ═══ Step 6: title ═══", a section within it with "# ─── title ───", and the
# lesson ends where the workshop begins. In comments and docstrings, an empty line separates
# paragraphs, and a part that is indented by four spaces keeps its line breaks.
@dataclass(frozen=True)
class Block:
    """A part of a step. Its `kind` is one of these:

    heading     the title of a section within the step
    prose       a paragraph, in one line
    list        terms with their explanations, one a line
    table       rows of three columns or more (`table_rows` splits them)
    drawing     anything else that keeps its line breaks, formulas for example
    command     what to enter in a shell, and often what it prints
    example     what to enter in Python, after >>>, and what it prints
    code        one definition without its docstring, or a few statements

    `names` are the names that a code block defines. The blocks of a docstring follow the code that
    they belong to, and their `of` is its name. (Of a function that consists of its docstring alone,
    the first line is left as code, which does not run.)"""
    kind: str
    text: str
    names: tuple = ()
    of: str = ""

@dataclass(frozen=True)
class Step:
    """A step of the lesson; what stands before step 1 is number 0."""
    number: int
    title: str
    blocks: list

STEP = re.compile(r"# ═══ Step (\d+): (.+?) ═+")
SECTION = re.compile(r"# ─── (.+?) ─+")
WORKSHOP = "\n# ═══ Workshop"
DRAWN = ("|", "    #", "┐")              # in drawings and in code
SHELL = ("$ ", "python ", "Try it: ")       # how the commands begin
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)

def read_lesson(source):
    """Return the Steps of the lesson in the source of story_llm.py. Number 0 is what stands before
    step 1: the docstring of the module, whose first paragraph is the title, and the imports."""
    lesson = source.partition(WORKSHOP)[0]
    lines = lesson.split("\n")
    docstring, *statements = ast.parse(lesson).body
    title, *introduction = text_blocks(docstring_lines(docstring))
    above = "\n".join(lines[:docstring.lineno - 1])         # tells systems how to run the file
    steps = [Step(0, title.text, [Block("code", above), *introduction])]
    end = docstring.end_lineno
    for group in grouped(statements, lines):
        start = first_line(group[0]) - 1
        add_comments(steps, lines[end:start])
        end = group[-1].end_lineno
        steps[-1].blocks.extend(code_blocks(group, start, lines[start:end]))
    add_comments(steps, lines[end:])
    return steps

def first_line(statement):
    """The number of its first line, which is that of its decorator if there is one."""
    decorators = getattr(statement, "decorator_list", [])
    return min(node.lineno for node in [statement, *decorators])

def grouped(statements, lines):
    """Each definition alone, and other statements together if only empty lines separate them."""
    groups = []
    for statement in statements:
        last = groups[-1][-1] if groups else statement
        between = "".join(lines[last.end_lineno:first_line(statement) - 1])
        if groups and not between and not isinstance(last, DEFINITIONS) \
                and not isinstance(statement, DEFINITIONS):
            groups[-1].append(statement)
        else:
            groups.append([statement])
    return groups

def docstring_node(statement):
    """The docstring of a class or function as a statement, or None."""
    if isinstance(statement, DEFINITIONS) and ast.get_docstring(statement) is not None:
        return statement.body[0]
    return None

def docstring_lines(node):
    return inspect.cleandoc(node.value.value).split("\n")

def code_blocks(group, start, lines):
    """The code of some statements, whose first line has the index `start` in the file, and then the
    blocks of their docstring."""
    names = tuple(name for statement in group for name in names_defined(statement))
    node = docstring_node(group[0])
    if node is None:
        return [Block("code", "\n".join(lines), names)]
    documentation = text_blocks(docstring_lines(node), of=names[0])
    rest = lines[:node.lineno - 1 - start] + lines[node.end_lineno - start:]
    return [Block("code", "\n".join(rest), names), *documentation]

def names_defined(statement):
    """The names that a statement at the top of a module binds."""
    if isinstance(statement, DEFINITIONS):
        return [statement.name]
    names = []
    for node in ast.walk(statement):
        if isinstance(node, ast.alias):
            names.append((node.asname or node.name).partition(".")[0])
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.append(node.id)
    return names

def add_comments(steps, lines):
    """Add the comments among these lines to the last step, or begin steps as they say."""
    text = []
    for line in lines:
        step, section = STEP.fullmatch(line), SECTION.fullmatch(line)
        if step or section:
            steps[-1].blocks.extend(text_blocks(text))
            text = []
        if step:
            steps.append(Step(int(step[1]), step[2], []))
        elif section:
            steps[-1].blocks.append(Block("heading", section[1]))
        else:
            text.append(line.removeprefix("#").removeprefix(" "))
    steps[-1].blocks.extend(text_blocks(text))

def text_blocks(lines, of=""):
    """The blocks of a text. An empty line ends a block, and so does a change of the manner."""
    blocks, part, manner = [], [], ""
    for line in [*lines, ""]:
        if line.startswith(">>>"):
            found = "example"
        elif manner == "example" and line:
            found = "example"           # what Python prints, or a continued line
        else:
            found = "indented" if line.startswith("    ") else "prose" if line else ""
        if part and found != manner:
            blocks.append(text_block(manner, part, of))
            part = []
        if found:
            part.append(line)
        manner = found
    return blocks

def text_block(manner, lines, of):
    if manner == "prose":
        return Block("prose", " ".join(lines), of=of)
    text = inspect.cleandoc("\n" + "\n".join(lines))
    return Block("example" if manner == "example" else kind_of(text), text, of=of)

# ─── Tables and lists ──────────────────────────────────────────────────────────────────────────
def kind_of(text):
    """The kind of an indented part."""
    if text.startswith(SHELL):
        return "command"
    rows = table_rows(text)
    if not rows or any(mark in text for mark in DRAWN):
        return "drawing"
    return "list" if len(rows[0]) == 2 else "table"

def table_rows(text):
    """The rows of a table whose columns are separated by three spaces or more; a row that has only
    a last column continues the row above. Return [] if the text is no such table."""
    cells = [list(re.finditer(r"\S+(?: {1,2}\S+)*", line)) for line in text.split("\n")]
    columns = []            # (start, end), of all cells that overlap
    for start, end in sorted(cell.span() for line in cells for cell in line):
        if columns and start < columns[-1][1]:
            columns[-1] = (columns[-1][0], max(end, columns[-1][1]))
        else:
            columns.append((start, end))
    rows = []
    for line in cells:
        row = [""] * len(columns)
        for cell in line:
            i = next(i for i, (start, end) in enumerate(columns) if start <= cell.start() < end)
            if row[i]:
                return []           # two cells in one column
            row[i] = cell[0]
        if rows and not any(row[:-1]):
            rows[-1][-1] += " " + row[-1]
        else:
            rows.append(row)
    regular = len(rows) > 1 and len(columns) > 1 and all(row[0] for row in rows)
    return rows if regular else []
