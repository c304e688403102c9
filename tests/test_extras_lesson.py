"""extras/lesson.py: every word of the lesson is on its page, and the model in it is the one in Python."""
import ast
import html.parser
import io
import itertools
import re
import sys
import tokenize
import types
from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers import PROGRAM, ROOT, STORY, TEXT, lively_model, story_llm, tiny, train_to

sys.path.insert(0, str(ROOT / "extras"))
import lesson  # noqa: E402
from test_extras_explore import NASTY, browser, run_of, shown, wait_until  # noqa: E402, F401

SOURCE = PROGRAM.read_text(encoding="utf-8")
LESSON = SOURCE.partition("\n# ═══ Workshop")[0] + "\n"
PANELS = {3: ["words"], 4: ["tokens"], 5: ["windows"], 6: ["attention", "lens"], 8: ["greedy"], 9: ["losses"],
          10: ["learned"], 12: ["curves"], 13: ["next"]}


class Page(html.parser.HTMLParser):
    """What of a page comes from the lesson: its text, its code and its titles. The model's parts, the exercises, the
    figures and the contents do not. `ids` and `targets` are those of the whole page."""
    FOREIGN = {"live", "exercise", "overview", "box", "model-line", "hint", "label", "number", "skip"}
    VOID = {"meta", "link", "input", "br", "img"}

    def __init__(self, page):
        super().__init__()
        self.open, self.text, self.codes, self.titles, self.ids, self.targets = [], [], [], [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        classes = set((attributes.get("class") or "").split())
        foreign = tag in ("figure", "summary", "nav", "footer", "style", "script", "title") or classes & self.FOREIGN
        if tag not in self.VOID:
            self.open.append((tag, classes, bool(foreign)))
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.targets += [attributes["href"][1:]] if tag == "a" and "href" in attributes else []
        self.targets += [attributes["popovertarget"]] if "popovertarget" in attributes else []
        if tag == "pre" and "code" in classes:
            self.codes.append("")
        if tag in ("h1", "h2", "h3") and not any(foreign for _, _, foreign in self.open):
            self.titles.append("")
        if tag == "sup":
            self.handle_data("^")

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if any(foreign for _, _, foreign in self.open):
            return
        tags, classes = {tag for tag, _, _ in self.open}, set().union(*(classes for _, classes, _ in self.open))
        if "pre" in tags and "code" in classes:
            self.codes[-1] += data
        elif tags & {"h1", "h2", "h3"}:
            self.titles[-1] += data
        else:
            self.text.append(data)


def plain(text):
    """A text without what typesetting changes: white space, backticks, the form of quotation marks, dashes, arrows"""
    for typeset, typed in {"“": '"', "”": '"', "’": "'", "′": "'", "−": "-", "→": "->", "`": ""}.items():
        text = text.replace(typeset, typed)
    return re.sub(r"\s+", "", text)


def split_source(source):
    """(lines of text, lines of code) of the lesson, without the titles. Text are the comments that begin at the left,
    and the docstrings of the module and of what it defines at the top."""
    lines = source.split("\n")
    text = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and token.start[1] == 0:
            text.add(token.start[0])
    tree = ast.parse(source)
    text -= set(range(1, tree.body[0].lineno))              # for the machine
    for node in [tree, *tree.body]:
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node):
            text |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    prose = [re.sub(r'^# ?|"""', "", lines[number - 1]) for number in sorted(text)]
    code = [line for number, line in enumerate(lines, 1) if number not in text and line]
    return [line for line in prose if plain(line) and not re.match("[═─]{3}", line)], code


@pytest.fixture(scope="module")
def without_model():
    return lesson.make_page(SOURCE)


def test_every_line_of_the_lesson_is_on_the_page_once(without_model):
    page, (text, code) = Page(without_model), split_source(LESSON)
    assert len(text) > 500 and len(code) > 300
    assert [line for block in page.codes for line in block.split("\n") if line] == code
    name, _, subtitle = text[0].partition(": ")
    assert [page.titles[0], *text[1:2]] == [f"{name}: {subtitle}", text[1]]
    expected, found = plain("".join(text[1:])), plain("".join(page.text))
    assert Counter(found) == Counter(expected)              # no character more and none less
    for line in map(plain, text[1:]):
        assert found.count(line) == expected.count(line), line


def test_the_titles_are_those_of_the_lesson(without_model):
    titles = [step or section for step, section in re.findall(r"# ═══ Step \d+: (.+?) ═+|# ─── (.+?) ─+", LESSON)]
    assert [plain(title) for title in Page(without_model).titles[1:]] == [plain(title) for title in titles]
    steps = lesson.read_lesson(SOURCE)
    assert [step.number for step in steps] == list(range(14))
    for _, number, definition in lesson.PANELS:
        assert any(definition in block.names for block in steps[number].blocks)


def test_a_change_of_the_lesson_arrives_on_the_page():
    comment = re.search(r"# ═══ Step 4: .*\n# (.+)\n", SOURCE)[1]
    docstring = re.search(r'def split_words\(text\):\n    """(.+)\n', SOURCE)[1]
    title = re.search(r"# ─── (.+?) ─", SOURCE)[1]
    changes = {comment: 'Sometimes 2^10 "words" <b>make</b> poor `tokens`.', docstring: "Cut & split it, -1 -> 0.",
               "class FeedForward(nn.Module):": "SLOPE = 0.1\n\nclass FeedForward(nn.Module):    # changed",
               f"─── {title} ─": "─── Another title ─"}
    changed = SOURCE
    for old, new in changes.items():
        assert changed.count(old) == 1
        changed = changed.replace(old, new)
    page = Page(lesson.make_page(changed))
    text, found = plain("".join(page.text)), "\n".join(page.codes)
    assert plain('Sometimes 2^10 "words" <b>make</b> poor tokens.') in text and plain(comment) not in text
    assert plain("Cut & split it, -1 -> 0.") in text and plain(docstring) not in text
    assert "SLOPE = 0.1" in found and "class FeedForward(nn.Module):    # changed" in found
    assert "Another title" in page.titles and title not in page.titles


def test_every_link_has_its_target(without_model):
    page = Page(without_model)
    assert Counter(page.ids).most_common(1)[0][1] == 1
    assert set(page.targets) <= set(page.ids)
    boxes = {target for target in page.targets if target.startswith("box-")}
    assert boxes == {name for name in page.ids if name.startswith("box-")}
    assert len(boxes) > 20 and {"MultiHeadAttention", "attention_weights", "step-13"} <= set(page.targets)


def test_a_box_holds_the_code_of_its_name(without_model):
    boxes = re.findall('id="box-(\\w+)".*?<code>(.*?)</code>', without_model, re.DOTALL)
    assert len(boxes) > 20
    for name, box in boxes:
        code = html.unescape(re.sub("<[^>]*>", "", box))
        assert f"\n{code}\n" in SOURCE and re.match(f"(@.*\\n)*(def |class |.*)\\b{name}\\b", code)


@pytest.mark.parametrize("code", [
    SOURCE, 'x = f"{a!r:>{width}} {{}} <b>" + r"\\d" + """a\nb"""  # <i>\n\n\ny = {"a": [1, 2j]}', "def f():", "",
    "a\\\n + b"])
def test_highlighted_code_is_the_same_code(code):
    marked = lesson.highlight(code, lesson.Names(SOURCE, lesson.read_lesson(SOURCE)))
    assert html.unescape(re.sub("<[^>]*>", "", marked)) == code


def test_parts_that_keep_their_lines():
    blocks = lesson.text_blocks("""One paragraph,
in two lines.

    a    one
    b    two, and
         three

    p    1      1/2
    q    yes
    r           no

    x = 1    one
    y = 2    two

    $ python a.py
    prints

>>> 1 + 1
2

Another.""".split("\n"))
    assert [(block.kind, block.text) for block in blocks] == [
        ("prose", "One paragraph, in two lines."), ("list", "a    one\nb    two, and\n     three"),
        ("table", "p    1      1/2\nq    yes\nr           no"), ("drawing", "x = 1    one\ny = 2    two"),
        ("command", "$ python a.py\nprints"), ("example", ">>> 1 + 1\n2"), ("prose", "Another.")]
    assert lesson.table_rows(blocks[1].text) == [["a", "one"], ["b", "two, and three"]]
    assert lesson.table_rows(blocks[2].text) == [["p", "1", "1/2"], ["q", "yes", ""], ["r", "", "no"]]


def test_exercises_end_their_steps(without_model):
    exercises = lesson.read_exercises(lesson.EXERCISES.read_text(encoding="utf-8"))
    assert len(exercises) == 6 and all(exercise.question and exercise.answer for exercise in exercises)
    for exercise in exercises:
        step = without_model.split('<section class="step"')[exercise.step]
        shown = step[step.index('class="exercise"'):]
        question, answer = (plain(html.unescape(re.sub("<[^>]*>", "", part.replace("<sup>", "^"))))
                            for part in shown.split("<details><summary>Answer</summary>")[:2])
        assert plain(exercise.question[0].text) in question
        assert all(plain(block.text) in answer for block in exercise.answer)


def test_figures_stand_where_the_lesson_speaks_of_them(without_model):
    names = re.findall('<figure id="figure-([^"]+)"', without_model)
    assert Counter(names) == Counter(figure.name for figure in lesson.figures())
    step = without_model.split('<section class="step"')[6]
    table = step[step.index("several heads (one instead)"):]
    named = re.search(r'</pre></div>\n<div class="wide"><div class="figures">(.*?)</div>', table, re.DOTALL)[1]
    assert re.findall('id="figure-experiment-([^"]+)"', named) == [
        "no-attention", "no-feed-forward", "average", "one-block", "one-head", "no-positions"]
    step = without_model.split('<section class="step"')[10]
    assert step.index("Ep 20 (Step 000180)") < step.index('id="figure-prediction"')


# In a browser

@pytest.fixture(scope="module")
def learned():
    """A run that recites TEXT, and its page."""
    run, corpus = tiny(emb_dim=64, n_layers=2, epochs=60, eval_every=100, val_fraction=0.0, batch_size=16)
    train_to(run, corpus)
    run.prompt = "The old ferryman tied his boat"
    return run, lesson.make_page(SOURCE, run, "tiny.pt", TEXT)


@pytest.fixture
def show(browser, tmp_path):  # noqa: F811
    """show(page as a string, width, scheme) returns the opened page. None may request anything or report an error."""
    contexts, requests, errors = [], [], []

    def show(content, width=1280, scheme="light", script=True):
        path = tmp_path / "lesson.html"
        path.write_text(content, encoding="utf-8", newline="\n")
        context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme,
                                      java_script_enabled=script)
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: requests.append(request.url) if request.url != path.as_uri() else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.goto(path.as_uri())
        if script and page.locator("#data").count():
            wait_until(page, "/ready|without-model/.test(document.body.className)")
        return page
    yield show
    for context in contexts:
        context.close()
    assert requests == [] and errors == []


def step_of(page, panel):
    return page.evaluate("name => $(`h-${name}`).closest('.step').id", panel)


def test_the_model_is_alive_where_it_is_explained(show, learned):
    run, content = learned
    page = show(content)
    assert page.locator(".live").count() == sum(map(len, PANELS.values()))
    for step, panels in PANELS.items():
        assert [step_of(page, panel) for panel in panels] == [f"step-{step}"] * len(panels)
    # A prompt that is typed anywhere is the prompt everywhere.
    prompt = "At night a boy ran along the laptop"
    page.locator("[aria-labelledby=h-losses] .prompt").fill(prompt)
    ids = run.tokenizer.encode(prompt)
    assert {box.input_value() for box in page.locator(".prompt").all()} == {prompt}
    names = story_llm.token_names(run.tokenizer, ids)
    assert shown(page, "#chips button") == [f"{name}\n{token_id}" for name, token_id in zip(names, ids)]
    assert len(shown(page, "#words li.unknown")) == 1 and "1 is unknown" in page.inner_text("#unknown")
    with torch.no_grad():
        logits = run.model(torch.tensor([ids]))[0]
    maps = story_llm.attention_maps(run.model, torch.tensor([ids]))
    titles = [chip.get_attribute("title") for chip in page.locator("#shades button").all()]
    weights = [float(title.removeprefix("weight ")) for title in titles]
    assert weights == pytest.approx(maps[0, -1, -1].tolist(), abs=0.002)       # block 1, head 3 or the last
    # the loss of each token
    rows = [re.split(r"\s+", row.replace("\xa0", " ").strip()) for row in shown(page, "#losses tr")]
    losses = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none")
    assert [float(row[-1]) for row in rows] == pytest.approx(losses.tolist(), abs=0.02)
    assert f"is {losses.mean():.2f}, their perplexity" in page.inner_text("#mean-loss")
    # the bars of step 8, and of step 13
    best = story_llm.token_names(run.tokenizer, logits[-1].topk(10).indices.tolist())
    for step in (8, 13):
        assert [row.split("\n")[0] for row in shown(page, f"#step-{step} .bars button")] == best


def test_windows_hold_what_the_dataset_holds(show, learned):
    run, content = learned
    page = show(content)
    ids = torch.tensor(run.tokenizer.encode(run.prompt))
    for length, start in ((4, 0), (3, 2), (1, 4)):
        page.fill("#length", str(length))
        page.fill("#window-start", str(start))
        expected = story_llm.SlidingWindowDataset(ids, length)[start]
        found = [re.split(r"\s+", row)[1:] for row in shown(page, "#windows tr")]
        assert found == [story_llm.token_names(run.tokenizer, row.tolist()) for row in expected]
        assert len(shown(page, "#windows li")) == length


def test_step_8_is_greedy_whatever_step_13_draws(show, learned):
    run, content = learned
    page = show(content)
    page.fill("#temperature", "3")
    page.click("#step-8 .continue")
    ids = torch.tensor([run.tokenizer.encode(run.prompt)])
    greedy = [new.item() for new in story_llm.generate(run.model, ids, 60)]
    for count in (30, 60):          # it stops by itself, and a second click goes on
        if count == 60:
            page.click("#step-8 .continue")
        wait_until(page, "!streaming")
        assert page.evaluate("ids.slice(nTyped)") == greedy[:count]
        assert page.inner_text("#step-8 .speed").startswith("30 tokens written")
    page.locator("#step-8 .prompt").fill("At night")
    assert shown(page, ".speed:not(:empty)") == []


def test_the_panels_say_that_they_share_a_prompt_and_survive_an_empty_one(show, learned):
    page = show(learned[1])
    assert "share one prompt" in page.locator(".live").first.inner_text()
    assert page.locator(".live", has_text="share one prompt").count() == 1
    page.locator("#step-9 .prompt").fill(learned[0].prompt)         # chooses the last token
    before = [page.inner_text(f"#{name}") for name in ("lens", "losses", "windows", "length-value")]
    page.locator("#step-9 .prompt").fill("")
    assert page.inner_text("#lens") == "" and not page.is_visible(".losses") and not page.is_visible(".bar-head")
    assert page.inner_text("#length-value") == "1"
    page.locator("#step-9 .prompt").fill(learned[0].prompt)
    assert [page.inner_text(f"#{name}") for name in ("lens", "losses", "windows", "length-value")] == before


def test_attention_opens_where_the_lesson_looks(show, learned):
    run, content = learned
    page = show(content)
    ids, T = run.tokenizer.encode(run.prompt), len(run.tokenizer.encode(run.prompt))
    his = story_llm.token_names(run.tokenizer, ids).index("␣his")
    assert 0 < his < T - 1 and page.evaluate("[selected, chosenBlock(), chosenHead()]") == [
        his, 0, min(3, run.config.n_heads) - 1]


def test_the_curves_of_steps_10_and_12_are_one(show, learned):
    run, content = learned
    page = show(content)
    page.locator("#step-12 .evaluation").fill("0")
    for step in (10, 12):
        assert shown(page, f"#step-{step} .measured")[0].startswith("Step 0, epoch 0.0")
        assert shown(page, f"#step-{step} .sample")[0] == (run.history[0].prompt + run.history[0].sample).strip()


def test_contents_follow_the_reader_and_boxes_open_in_place(show, learned):
    page = show(learned[1])
    marked = "[...document.querySelectorAll('[aria-current=step]')].map(link => link.hash).join()"
    # what stands at the end of the upper third, or, between two steps, a little above it
    above = """[...Array(50).keys()].map(
        i => document.elementFromPoint(640, 800 / 3 - 5 * i)?.closest('.step')?.id).find(id => id)"""
    for step in (9, 13, 2, 6):
        page.evaluate("step => document.querySelector(`#contents [href='#step-${step}']`).click()", step)
        wait_until(page, f"{marked} === '#step-{step}'")
    for share in (0.9, 0.2, 0.7, 0.4, 1):           # wherever one lands: the step at the end of the upper third
        page.evaluate("share => scrollTo(0, share * document.body.scrollHeight)", share)
        wait_until(page, f"{marked} === '#' + {above}")
    name = page.locator("#step-4 button[popovertarget]").first
    name.click()
    box = page.locator("#" + name.get_attribute("popovertarget"))
    assert box.is_visible() and name.inner_text() in box.inner_text()
    assert abs(box.bounding_box()["y"] - name.bounding_box()["y"]) < 800
    page.keyboard.press("Escape")
    assert not box.is_visible()


@pytest.mark.parametrize("width, scheme", [(390, "dark"), (900, "light"), (1440, "light"), (1920, "dark")])
def test_the_page_fits_every_window(show, learned, width, scheme):
    page = show(learned[1], width=width, scheme=scheme)
    page.locator(".prompt").first.fill(TEXT)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.evaluate("""() => [...document.querySelectorAll('.cover pre, .prose .scroll, .bar-head, .bars button')]
        .filter(part => part.scrollWidth > part.clientWidth).map(part => part.innerText)""") == []
    beside = page.evaluate("""() => [...document.querySelectorAll('#step-6 > .row')].filter(
        row => row.children.length > 1).map(row => row.children[1].getBoundingClientRect().left > row.children[0].getBoundingClientRect().right)""")
    assert len(beside) > 8 and all(found == (width >= 1200) for found in beside)
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background[4:-1].split(","))) > 384) == (scheme == "light")
    if width == 390:
        page.click("#menu")
        page.click("#contents a >> nth=8")
        wait_until(page, "$('menu').textContent.startsWith('Step 9')")
        assert not page.is_visible("#contents")


def test_everything_has_a_name_for_screen_readers(show, learned):
    page = show(learned[1])
    assert page.evaluate("""() => [...document.querySelectorAll(
        "main button, select, input, textarea, canvas, main svg, [role=dialog], nav, section")].filter(found =>
        !found.textContent.trim() && !found.getAttribute("aria-label") && !found.labels?.length).map(
        found => found.outerHTML)""") == []
    levels = page.evaluate("[...document.querySelectorAll('main :is(h1, h2, h3, h4)')].map(h => Number(h.tagName[1]))")
    assert levels.count(1) == 1 and all(b <= a + 2 for a, b in itertools.pairwise(levels))


def test_printed_it_is_a_handout(show, learned):
    page = show(learned[1])
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    for selector in ("nav", "#h-attention", ".skip"):
        assert not page.is_visible(selector)
    assert page.locator(".exercise details").count() == 6
    assert all(answer.is_visible() for answer in page.locator(".exercise details > p").all())
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator(".exercise details[open]").count() == 0


def test_without_a_model_the_page_is_the_lesson_and_says_so(show, without_model):
    for script in (True, False):
        page = show(without_model, script=script)
        assert "no model in it" in page.inner_text(".model-line")
        assert page.locator(".live, .warning").count() == 0 and page.is_visible("#step-13")


def test_a_page_that_would_show_another_model_shows_none(show, learned):
    run, _ = learned

    def mask(T, S, device=None):        # each token attends to itself and to the one before it
        distances = torch.arange(S - T, S)[:, None] - torch.arange(S)
        return (distances < 0) | (distances > 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(story_llm, "causal_mask", mask)
        content = lesson.make_page(SOURCE, run, "a.pt", TEXT)
    page = show(content)
    assert "does not compute what the model computes" in page.inner_text("#warning")
    assert not any(panel.is_visible() for panel in page.locator(".live").all()) and page.is_visible("#step-13")


def test_a_story_and_its_name_are_data(show):
    run = run_of(lively_model(), story_llm.WordTokenizer([f" w{i}" for i in range(38)] + ["<|endoftext|>", "<|unk|>"]))
    run.prompt, run.text_paths = " ".join(NASTY), ["<b>PAGE_DATA.txt"]
    page = show(lesson.make_page(SOURCE, run, "<img src=x onerror=attacked=1>", " ".join(NASTY)))
    assert page.evaluate("typeof attacked") == "undefined" and page.locator("img").count() == 0
    subtitle = page.inner_text("#subtitle")
    assert "trained model inside" in subtitle and ": <img src=x onerror=attacked=1>, with " in subtitle and "on <b>PAGE_DATA.txt." in subtitle
    assert page.input_value("#prompt") == run.prompt


# The command line

@pytest.fixture
def command(capsys):
    def run(*arguments):
        capsys.readouterr()
        status = lesson.main([str(argument) for argument in arguments])
        return status, *capsys.readouterr()
    return run


def test_the_command_writes_the_page(command, trained_here, folder):
    model = next(folder.glob("*.pt"))
    status, out, err = command("--model", model, "my.html")
    assert (status, err) == (0, "") and re.fullmatch(r"wrote my.html: 0\.\d MB. Open it in a browser\n", out)
    page = Path("my.html").read_text(encoding="utf-8")
    assert 'id="h-attention"' in page and str(folder) not in page
    assert 'id="words"' not in page         # a file that a checkpoint names is not opened ...
    assert command("--model", model, "--text", "my.txt", "my.html")[0] == 0
    assert 'id="words"' in Path("my.html").read_text(encoding="utf-8")      # ... unless one asks for it
    status, out, err = command("plain.html")
    assert (status, err) == (0, "") and "without a model" in out
    assert 'class="live"' not in Path("plain.html").read_text(encoding="utf-8")


def test_mistakes_are_one_line_and_write_nothing(command, trained_here, folder, monkeypatch):
    model = next(folder.glob("*.pt"))
    for arguments, message in [
            (("my.pdf",), ".html, .htm"), (("--model", "none.pt", "my.html"), "none.pt"), ((), "FILE"),
            (("--model", model, "--text", STORY, "my.html"), "a different text"),
            (("--text", "my.txt", "my.html"), "--model"), (("--model", model, "my.ipynb"), "leave out --model"),
            (("--model", model, "none/my.html"), "cannot be written")]:
        status, out, err = command(*arguments)
        assert status == (1 if arguments else 2)
        assert out == "" and err.startswith("error: ") and message in err and err.count("\n") == 1
    monkeypatch.setattr(story_llm, "make_norm", lambda config: torch.nn.RMSNorm(config.emb_dim))
    run, _ = tiny()
    story_llm.save_checkpoint("edited.pt", run)
    status, out, err = command("--model", "edited.pt", "my.html")
    assert (status, out) == (1, "") and "final_norm.bias" in err and err.count("\n") == 1
    assert not list(folder.glob("*.html")) + list(folder.glob("*.ipynb"))


def test_a_notebook_is_written_by_its_own_module(command, folder, monkeypatch):
    written = []
    monkeypatch.setitem(sys.modules, "notebook", types.SimpleNamespace(write_notebook=written.append))
    assert command("my.ipynb") == (0, "wrote my.ipynb\n", "") and written == ["my.ipynb"]
