"""Write the lesson of story_llm.py as a web page, with your own model alive in it.

    python extras/lesson.py --model story_llm.pt lesson.html

Without --model, the page has no model in it. With a file name that ends in .ipynb, the program
writes the lesson as a notebook instead (notebook.py).

The text stands in story_llm.py and nowhere else. This program reads it there: comments and
docstrings become prose, code stays code, and the examples look like the sessions that they are.
"""
import ast
import doctest
import html
import inspect
import io
import itertools
import keyword
import re
import sys
import tokenize
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = map(str, Path(__file__).resolve().parents[:2])       # this folder, and its parent
import explore
import story_llm
from figures import Figure, figures
from story_llm import check, log

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
DRAWN = ("|", "    #", " = ")              # in drawings, code and formulas
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
    if isinstance(statement, ast.Assign):
        return [node.id for target in statement.targets for node in ast.walk(target)
                if isinstance(node, ast.Name)]
    return [(node.asname or node.name).partition(".")[0] for node in ast.walk(statement)
            if isinstance(node, ast.alias)]

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

# ─── Names ─────────────────────────────────────────────────────────────────────────────────────
# A name links to the definition that the page shows. One from the workshop, which the page does not
# show, opens a box with its code instead.
def definitions(source):
    """{name: code} of everything that the source defines at its top."""
    lines, code = source.split("\n"), {}
    for statement in ast.parse(source).body:
        if isinstance(statement, (*DEFINITIONS, ast.Assign)):
            text = "\n".join(lines[first_line(statement) - 1:statement.end_lineno])
            code |= dict.fromkeys(names_defined(statement), text)
    return code

class Names:
    """The names that can be looked up on the page. `used` are those whose boxes it needs, and
    `documented` those whose docstring has begun."""
    def __init__(self, source, steps):
        self.lesson = {name for step in steps[1:] for block in step.blocks for name in block.names}
        self.workshop = {name: code for name, code in definitions(source).items()
                         if name not in self.lesson}
        # In prose, `decode` is the method of a tokenizer, although the workshop has a function of
        # that name.
        self.methods = {method for step in steps for block in step.blocks if block.kind == "code"
                        for method in re.findall(r"^    def (\w+)", block.text, re.MULTILINE)}
        self.used = []
        self.documented = set()

    def link(self, name, shown, new_boxes=True):
        """A piece of HTML as a link to the definition of a name, if it has one."""
        if name in self.lesson:
            return f'<a class="name" href="#{name}">{shown}</a>'
        if name in self.workshop and (new_boxes or name in self.used):
            if name not in self.used:
                self.used.append(name)
            return f'<button class="name" popovertarget="box-{name}">{shown}</button>'
        return shown

    def boxes(self):
        """The boxes with the code of the workshop's names. Code in a box opens no further boxes."""
        boxes = []
        for name in self.used:
            code = highlight(self.workshop[name], self, new_boxes=False)
            boxes.append(
                f'<div popover class="box" id="box-{name}" role="dialog" aria-label="{name}">'
                '<p class="label">From the workshop</p>'
                f'<pre tabindex="0"><code>{code}</code></pre></div>')
        return "\n".join(boxes)

# ─── Code ──────────────────────────────────────────────────────────────────────────────────────
LAYOUT = {tokenize.ENCODING, tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT,
          tokenize.ENDMARKER}

def highlight(code, names, new_boxes=True):
    """Code as HTML, with its tokens marked and its names linked."""
    lines = code.split("\n")
    tokens = [token for token in tokenize.generate_tokens(io.StringIO(code + "\n").readline)
              if token.type not in LAYOUT]
    result, row, column = [], 1, 0

    def copy_until(end_row, end_column):        # the spaces and line ends between two tokens
        nonlocal row, column
        while row < end_row:
            result.append(html.escape(lines[row - 1][column:]) + "\n")
            row, column = row + 1, 0
        result.append(html.escape(lines[row - 1][column:end_column]))
        column = end_column

    for i, token in enumerate(tokens):
        copy_until(*token.start)
        before, after = (tokens[j].string if 0 <= j < len(tokens) else "" for j in (i - 1, i + 1))
        # the source itself, because in the pieces of an f-string, {{ is one brace
        text = html.escape(between(lines, token.start, token.end), quote=False)
        result.append(mark(token, text, before, after, names, new_boxes))
        row, column = token.end
    copy_until(len(lines), len(lines[-1]))
    return "".join(result)

def between(lines, start, end):
    """The text between two places, each a pair (line from 1, column)."""
    part = lines[start[0] - 1:end[0]]
    part[-1] = part[-1][:end[1]]
    part[0] = part[0][start[1]:]
    return "\n".join(part)

def mark(token, text, before, after, names, new_boxes):
    """A token as HTML. `before` and `after` are its neighbours."""
    kind = tokenize.tok_name[token.type]
    if kind == "COMMENT":
        return f'<span class="c">{text}</span>'
    if kind == "STRING" or kind.startswith("FSTRING"):
        return f'<span class="s">{text}</span>'
    if kind == "NUMBER":
        return f'<span class="n">{text}</span>'
    if kind != "NAME":
        return text
    if keyword.iskeyword(token.string):
        return f'<span class="k">{text}</span>'
    if before in ("def", "class"):
        return f'<span class="d">{text}</span>'
    if before == "." or after in ("=", ":"):        # an attribute, an argument or a field
        return text
    return names.link(token.string, text, new_boxes)

def session(text, names):
    """A doctest as HTML. (The prompts cannot be selected, so that one copies what one can run.)"""
    parts = []
    for part in doctest.DocTestParser().parse(text):
        if isinstance(part, doctest.Example):
            lines = highlight(part.source.rstrip("\n"), names).split("\n")
            prompts = [">>> "] + ["... "] * (len(lines) - 1)
            parts += [f'<span class="p">{html.escape(prompt)}</span>{line}\n'
                      for prompt, line in zip(prompts, lines)]
            parts.append(f'<span class="o">{html.escape(part.want, quote=False)}</span>')
    shown = "".join(parts)
    return f'<pre class="session" tabindex="0"><code>{shown}</code></pre>'

# ─── Prose ─────────────────────────────────────────────────────────────────────────────────────
# In prose, `names` and "strings with a \n" are code, and so are names such as WORD_OR_MARK.
CODE_IN_PROSE = re.compile(r'`([^`]+)`|(r"[^"]*"|"(?:\\.|\W)[^"\s]*"|\b(?:nn|F|torch)\.[\w.]*\w)'
                           r"|(?<!\.)\b(\w*[a-z_][A-Z_]\w*)\b")
TYPOGRAPHY = [
    (r"\^(-?\w+(?:\.\d+)?)", r"<sup>\1</sup>"),
    (r"(?<=[\w)>]) - (?=[\w(])", " − "), (r"(?<![\w)\-])-(?=\d|ln\b|lr\b)", "−"),
    (r"-&gt;", "→"), (r"\bGPT-\d", r'<span class="shape">\g<0></span>'),
    (r"\((?:\.\.\., )?[A-Z](?:, [A-Z]|, \d+| \+ \d+)*,?\)", r'<span class="shape">\g<0></span>'),
    (r'(^|(?<=[\s(\[]))&quot;', "“"), (r"&quot;", "”"), (r"\bf&#x27;", "f′"), (r"&#x27;", "’"),
    (r"\b[Ss]tep (\d+)\b", r'<a href="#step-\1">\g<0></a>')]

def prose(text, names):
    """A paragraph as HTML."""
    parts, end = [], 0
    for found in CODE_IN_PROSE.finditer(text):
        backticks, string, name = found.groups()
        if name and name not in names.lesson and name not in names.workshop:
            continue
        parts.append(typeset(text[end:found.start()], text[:found.start()]))
        shown = backticks or string or name
        code = html.escape(shown, quote=False)
        linked = code if shown in names.methods else names.link(shown, code)
        parts.append(f"<code{' class=shape' * (len(shown) < 24)}>{linked}</code>")
        end = found.end()
    parts.append(typeset(text[end:], text[:end]))
    return re.sub(r"Before you read on:.*?\?", r"<em>\g<0></em>", "".join(parts))

def typeset(text, before=""):
    """A piece of prose without code, as HTML. A quotation mark right behind code closes."""
    behind = "\x00" if before[-1:].strip() and before[-1:] not in "([" else ""
    text = behind + html.escape(text)
    for pattern, replacement in TYPOGRAPHY:
        text = re.sub(pattern, replacement, text)
    return text.removeprefix("\x00")

# ─── Blocks ────────────────────────────────────────────────────────────────────────────────────
def block_html(block, names):
    """A block as HTML."""
    if block.kind == "prose":
        shown = prose(block.text, names)
        if not block.of:
            return f"<p>{shown}</p>"
        label = "" if block.of in names.documented else f' data-of="{block.of}"'
        names.documented.add(block.of)
        return f'<p class="of"{label}>{shown}</p>'
    if block.kind == "code":
        anchors = "".join(f'<a class="anchor" id="{name}"></a>' for name in block.names
                          if name in names.lesson)
        return (f'{anchors}<pre class="code" tabindex="0"><code>'
                f"{highlight(block.text, names)}</code></pre>")
    if block.kind == "example":
        return session(block.text, names)
    if block.kind == "command":
        return command_html(block.text)
    if block.kind in ("list", "table"):
        return table_html(block, names)
    return f'<pre class="drawing" tabindex="0">{html.escape(block.text, quote=False)}</pre>'

def command_html(text):
    """The lines to enter in a shell, and what they print."""
    lines = []
    for line in text.split("\n"):
        start = next((start for start in SHELL if line.startswith(start)), None)
        shown = html.escape(line, quote=False)
        if start is None:
            lines.append(f'<span class="o">{shown}</span>')
        elif start == "python ":
            lines.append(f"<b>{shown}</b>")
        else:
            lines.append(f'<span class="p">{start}</span><b>{shown.removeprefix(start)}</b>')
    shown = "\n".join(lines)
    return f'<pre class="command" tabindex="0"><code>{shown}</code></pre>'

def table_html(block, names):
    rows = table_rows(block.text)
    short = [max(len(row[i]) for row in rows) < 18 for i in range(len(rows[0]))]
    cells = [[f"<td{' class=short' * is_short}>{prose(cell, names)}</td>"
              for cell, is_short in zip(row, short)] for row in rows]
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in cells)
    return f'<div class="scroll" tabindex="0"><table class="{block.kind}">{body}</table></div>'

# ─── Rows ──────────────────────────────────────────────────────────────────────────────────────
# A wide window has two columns: prose, and beside it the code and the sessions that it is about. A
# row holds some paragraphs and what stands beside them; in a narrow window, one follows the other.
# What keeps its line breaks and is wider than the prose has a row of its own.
PROSE_WIDTH = 66        # characters in a line of prose, about
DRAWING_WIDTH = 77      # characters in a line of what keeps its line breaks

def is_beside(block):
    """Whether a block belongs in the column beside the prose."""
    if isinstance(block, list):         # figures in a row of their own
        return False
    return (isinstance(block, Figure) or block.kind in ("code", "example")
            or block.text.startswith("Try it: "))

def is_wide(block):
    if isinstance(block, list):
        return True
    return (not is_beside(block) and block.kind in ("command", "drawing")
            and max(map(len, block.text.split("\n"))) > DRAWING_WIDTH)

def height(block):
    """The height of a block or figure, in lines of prose and roughly."""
    if isinstance(block, Figure):
        width, svg_height = map(float, re.search(r'viewBox="0 0 (\S+) (\S+)"', block.svg).groups())
        return 18 * svg_height / width + len(block.caption) / PROSE_WIDTH + 1
    if block.kind == "prose":
        return len(block.text) / PROSE_WIDTH + 0.7
    return 0.75 * block.text.count("\n") + 2

def total(blocks):
    """The height of some blocks, where figures that follow each other stand side by side."""
    return sum(max(map(height, group)) if is_figures else sum(map(height, group))
               for is_figures, group in grouped_figures(blocks))

def grouped_figures(blocks):
    """Pairs (whether they are figures, blocks) of the blocks that follow each other."""
    groups = itertools.groupby(blocks, key=lambda block: isinstance(block, Figure))
    return [(is_figures, list(group)) for is_figures, group in groups]

def with_experiments(blocks, figures):
    """The blocks, with the figure of each experiment behind the command that runs it, or behind the
    table whose last column names it. The figures of a table are one list, which stands in a row of
    its own."""
    shown, left = [], {experiment_of(figure): figure for figure in figures}
    for block in blocks:
        shown.append(block)
        if block.kind == "command":
            shown += [left.pop(word) for word in re.findall(r"[\w-]+", block.text) if word in left]
        elif block.kind in ("table", "drawing"):
            last_words = re.findall(r"[\w-]+$", block.text, re.MULTILINE)
            named = [left.pop(word) for word in last_words if word in left]
            shown += [named] if named else []
    return shown

def experiment_of(figure):
    """The name of the experiment that a figure shows, or None."""
    name = figure.name.removeprefix("experiment-")
    return name if name != figure.name else None

def in_reading_order(blocks):
    """The blocks, but the first paragraphs of a docstring stand before the code they document."""
    ordered = []
    for block in blocks:
        code = ordered[-1] if ordered else None
        documents = (isinstance(code, Block) and isinstance(block, Block) and code.kind == "code"
                     and block.kind == "prose" and block.of in code.names)
        ordered.insert(len(ordered) - documents, block)
    return ordered

def rows_of(blocks, figures):
    """Rows of the blocks between two headings. Each is a pair: the blocks in the column of the
    prose and those beside them; of a wide block, the second is None."""
    rows, prose_column, beside = [], [], []
    for block in [*in_reading_order(blocks), None]:
        if block is not None and is_beside(block):
            beside.append(block)
            continue
        if beside or block is None or is_wide(block):
            names = {name for block in beside if isinstance(block, Block) for name in block.names}
            belonging = [figure for figure in figures if figure.after in names]
            rows += split_row(prose_column, beside, belonging)
            prose_column, beside = [], []
        if block is not None and is_wide(block):
            rows.append(([block], None))
        elif block is not None:
            if prose_column and prose_column[-1].of not in ("", block.of):      # a docstring ends
                rows.append((prose_column, []))
                prose_column = []
            prose_column.append(block)
    return rows

def split_row(prose_column, beside, figures):
    """Put the code beside the last paragraphs, as many as are about as high as the code, and each
    figure where there is room for it."""
    n_first = len(prose_column)
    while n_first > 0 and total(prose_column[n_first:]) < total(beside):
        n_first -= 1
    first, last = (prose_column[:n_first], []), (prose_column[n_first:], list(beside))
    for figure in figures:
        if total(first[1]) + height(figure) / 2 < total(first[0]):
            first[1].append(figure)
        else:
            min(last, key=total).append(figure)
    return [row for row in (first, last) if row[0] or row[1]]

# ─── Steps ─────────────────────────────────────────────────────────────────────────────────────
# What the model shows, and the step and the definition whose section it ends
PANELS = [("words", 3, "WordTokenizer"), ("tokens", 4, "BPETokenizer"),
          ("windows", 5, "SlidingWindowDataset"), ("attention", 6, "MultiHeadAttention"),
          ("lens", 6, "TransformerBlock"), ("greedy", 8, "generate_text_simple"),
          ("losses", 9, "batch_loss"), ("learned", 10, "training_steps"),
          ("curves", 12, "plot_losses"), ("next", 13, "next_token_probabilities")]

def sections_of(step):
    """The blocks of a step, split before each of its headings."""
    sections = [[]]
    for block in step.blocks:
        if isinstance(block, Block) and block.kind == "heading":
            sections.append([])
        sections[-1].append(block)
    return sections

def section_of_panel(step, definition):
    """The number of the section that has the definition; the last one if it is gone."""
    sections = sections_of(step)
    found = [i for i, section in enumerate(sections)
             if any(definition in block.names for block in section)]
    return found[0] if found else len(sections) - 1

def row_html(row, names):
    if row[1] is None:
        block = row[0][0]
        shown = figures_html(block, names) if isinstance(block, list) else block_html(block, names)
        return f'<div class="wide">{shown}</div>'
    columns = []
    for place, blocks in zip(("prose", "beside"), row):
        parts = []
        for is_figures, group in grouped_figures(blocks):
            if is_figures:
                parts.append(figures_html(group, names))
            else:
                parts += [block_html(block, names) for block in group]
        content = "\n".join(parts)
        columns.append(f'<div class="{place}">\n{content}\n</div>' if blocks else "")
    return f'<div class="row">{"".join(columns)}</div>'

def figures_html(figures, names):
    """Figures side by side, as far as there is room."""
    shown = "".join(figure_html(figure, names) for figure in figures)
    return f'<div class="figures">{shown}</div>'

def figure_html(figure, names):
    return (f'<figure id="figure-{figure.name}">{figure.svg}'
            f"<figcaption>{prose(figure.caption, names)}</figcaption></figure>")

def step_html(step, names, figures, panels, exercises):
    """A step as HTML. `panels` is {(step, section): [HTML]}."""
    figures = [figure for figure in figures if figure.step == step.number]
    last = [figure for figure in figures if figure.ends_step]
    blocks = [*with_experiments(step.blocks, figures), *last]
    step = Step(step.number, step.title, blocks)
    placed = [figure for block in blocks
              for figure in (block if isinstance(block, list) else [block])]
    figures = [figure for figure in figures if figure not in placed]
    opening = [figure for figure in figures if not figure.after]
    parts = []
    for i, section in enumerate(sections_of(step)):
        blocks = section
        if i > 0:                       # a heading begins it
            anchor = re.sub(r"\W+", "-", section[0].text.lower())
            parts.append(f'<h3 id="step-{step.number}-{anchor}">{typeset(section[0].text)}</h3>')
            blocks = section[1:]
        rows = rows_of(blocks, figures)
        if i == 0 and opening:
            if rows[0][1] is None:      # a wide row
                rows.insert(0, ([], []))
            rows[0][1][:0] = opening
        parts += [row_html(row, names) for row in rows]
        parts += panels.get((step.number, i), [])
    parts += [exercise_html(exercise, names) for exercise in exercises]
    content = "\n".join(parts)
    return (f'<section class="step" id="step-{step.number}" aria-labelledby="title-{step.number}">'
            f'<header><p class="number">Step {step.number}</p>'
            f'<h2 id="title-{step.number}">{typeset(step.title)}</h2></header>\n'
            f"{content}\n</section>")

# ─── Exercises ─────────────────────────────────────────────────────────────────────────────────
# exercises.md has a section "## Step 6: title" for each, with "### Answer" between the question and
# its answer. Code stands between lines of ```, and what it prints is indented.
EXERCISES = Path(__file__).with_name("exercises.md")

@dataclass(frozen=True)
class Exercise:
    step: int
    title: str
    question: list          # of Blocks
    answer: list

def read_exercises(text):
    """Return the Exercises of exercises.md."""
    exercises = []
    for section in re.split(r"^## (?=Step)", text, flags=re.MULTILINE)[1:]:
        heading, _, content = section.partition("\n")
        step, title = re.fullmatch(r"Step (\d+): (.+)", heading).groups()
        question, _, answer = content.partition("\n### Answer\n")
        exercises.append(Exercise(int(step), title, markdown_blocks(question),
                                  markdown_blocks(answer)))
    return exercises

def markdown_blocks(text):
    """The blocks of a text with code between lines of ```."""
    blocks = []
    for i, part in enumerate(re.split(r"^```(?:python)?\n", text, flags=re.MULTILINE)):
        blocks += [Block("code", part.rstrip("\n"))] if i % 2 else text_blocks(part.split("\n"))
    return blocks

def exercise_html(exercise, names):
    question, answer = ("\n".join(exercise_block_html(block, names) for block in blocks)
                        for blocks in (exercise.question, exercise.answer))
    return (f'<aside class="exercise"><p class="label">Exercise</p>'
            f"<h3>{typeset(exercise.title)}</h3>\n{question}\n"
            f"<details><summary>Answer</summary>\n{answer}\n</details></aside>")

def exercise_block_html(block, names):
    if block.kind in ("list", "table"):         # here, columns of numbers
        block = Block("drawing", block.text)
    return block_html(block, names)

# ─── The page ──────────────────────────────────────────────────────────────────────────────────
def panels_html():
    """{name: HTML} of the parts in which the model is alive. Those that explore.html has are taken
    from there, the others are in panels.html."""
    folder = Path(__file__).parent
    panels = {}
    for template in ("explore.html", "panels.html"):
        text = (folder / template).read_text(encoding="utf-8")
        for panel in re.findall(r'<section class="live.*?</section>', text, re.DOTALL):
            name = re.search(r'aria-labelledby="h-(\w+)"', panel)[1]
            panel = re.sub(r" <small>.*?</small>", "", panel)       # names the step
            panels[name] = re.sub(r"(</?)h2\b", r"\1h4", panel)
    return panels

def make_page(source, run=None, name="", text=None):
    """Return the page of the lesson in the source of story_llm.py, with the model of a run in it
    if there is one. `name` is what the page calls the model, and `text` the story that it has
    learned, if it is at hand. Raises StoryError if the page cannot compute the model."""
    steps = read_lesson(source)
    names = Names(source, steps)
    panels = {}
    if run is not None:
        shown = panels_html()
        for panel, number, definition in PANELS:
            if panel == "words" and text is None:
                continue            # nobody knows which words the story has
            place = (number, section_of_panel(steps[number], definition))
            panels.setdefault(place, []).append(shown[panel])
    drawn = figures(run)
    exercises = read_exercises(EXERCISES.read_text(encoding="utf-8"))
    cover = cover_html(steps[0], names)
    lesson = "\n".join(step_html(step, names, drawn, panels,
                                 [each for each in exercises if each.step == step.number])
                       for step in steps[1:])
    contents = "\n".join(f'<li><a href="#step-{step.number}">'
                         f'<span class="number">{step.number}</span> '
                         f'<span class="title">{typeset(step.title)}</span></a></li>'
                         for step in steps[1:])
    page = explore.fill("lesson.html", ["page.css", "lesson.css"], ["model.js", "lesson.js"],
                        title=html.escape(steps[0].title), cover=cover, overview=contents,
                        contents=contents,
                        model=model_html(run), lesson=lesson, boxes=names.boxes(),
                        data=data_html(run, name, text))
    explore.check_size(len(page))
    return page

def cover_html(step, names):
    """What stands before step 1. The imports are folded, because nobody begins a book with them."""
    folded = [block for block in step.blocks if block.kind == "code"]
    shown = "\n".join(block_html(block, names) for block in step.blocks if block not in folded)
    code = "\n".join(block_html(block, names) for block in folded)
    name, _, description = step.title.partition(": ")
    return (f"<h1>{typeset(name)}<span>: </span><small>{typeset(description)}</small></h1>"
            f'\n{shown}\n<details class="imports"><summary>The first lines of the file</summary>'
            f"\n{code}\n</details>")

def data_html(run, name, text):
    if run is None:
        return ""
    words = None
    if text is not None:
        tokenizer = story_llm.WordTokenizer(story_llm.build_vocabulary(text))
        words = explore.describe_tokenizer(tokenizer)
    data = explore.run_data(run, name, words=words)
    return f'<script type="application/json" id="data">{data}</script>'

def model_html(run):
    """What the beginning of the page says about the model; the script completes it."""
    if run is None:
        return ('<p class="model-line">This page has no model in it. To put yours into it: '
                "<code>python extras/lesson.py --model story_llm.pt lesson.html</code></p>")
    return ('<p class="model-line" id="subtitle">Loading the model …</p>'
            '<p class="warning" id="warning" role="alert" hidden></p>'
            '<noscript><p class="warning">To run the model, this page needs JavaScript.</p>'
            "</noscript>")

# ─── The command line ──────────────────────────────────────────────────────────────────────────
def text_of(run, path):
    """The story of a run, from the file that was named or else from Short_Story.txt, or None if the
    run has learned another. (The files that a checkpoint names are not opened: somebody else may
    have made it.)"""
    if path is None and (run.text_paths or not Path(story_llm.DEFAULT_TEXT).is_file()):
        return None
    text = story_llm.load_text(path or story_llm.DEFAULT_TEXT)
    corpus = story_llm.corpus_from_text(text, run.tokenizer, run.train_config)
    same = corpus.fingerprint == run.fingerprint
    check(same or path is None, f"the model was trained on a different text than {path}")
    return text if same else None

def run_command(argv):
    parser = story_llm.Parser(prog="extras/lesson.py", allow_abbrev=False,
                              description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("page", metavar="FILE",
                        help="the page (.html) or notebook (.ipynb) to write")
    parser.add_argument("--model", metavar="FILE",
                        help="the checkpoint of the model that is alive in the page")
    parser.add_argument("--text", metavar="FILE", help="the story of this model, whose words step "
                        "3 shows (default: Short_Story.txt, if it was trained on that)")
    args = parser.parse_args(argv)
    story_llm.check_different(args.page, *filter(None, (args.model, args.text)))
    story_llm.check_writable(args.page, (".html", ".htm", ".ipynb"))
    if args.page.endswith(".ipynb"):
        check(args.model is None and args.text is None,
              "a notebook trains its own model: leave out --model and --text")
        import notebook
        notebook.write_notebook(args.page)
        log(f"wrote {args.page}")
        return
    check(args.text is None or args.model is not None, "--text is the story of a model: give "
          "the model with --model as well")
    run = text = None
    if args.model is not None:
        run = story_llm.load_checkpoint(args.model)
        explore.check_supported(run.model)
        text = text_of(run, args.text)
    source = Path(story_llm.__file__).read_text(encoding="utf-8")
    page = make_page(source, run, Path(args.model or "").name, text)
    explore.write_page(args.page, page)
    without = "" if run else ", without a model in it (--model story_llm.pt)"
    log(f"wrote {args.page}: {len(page) / 1e6:.1f} MB{without}. Open it in a browser")

def main(argv=None):
    """Run the program with the words of a command line; return the exit status."""
    return story_llm.exit_status(run_command, sys.argv[1:] if argv is None else argv)

if __name__ == "__main__":
    sys.exit(main())
