"""extras/explore.py: its page in a real browser, compared with the model in Python."""
import base64
import dataclasses
import itertools
import json
import os
import random
import re
import shutil
import sys
import unicodedata
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from helpers import KINDS, ROOT, STORY, TEXT, LaterConfig, lively_model, story_llm, tiny, train_to, trained
from story_llm import Sampling

sys.path.insert(0, str(ROOT / "extras"))
import explore  # noqa: E402

# Names that browsers are installed under, and arguments that keep Chromium from looking up hosts of its own
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync"]
NASTY = ["</script>", "<script>attacked=1</script>", "<img src=x onerror=attacked=1>", "\"quoted\"", "'single'",
         "a\u2028b", "c\u2029d", "<!--", "]]>", "\\", "${attacked=1}", "`", "__proto__", "PAGE_DATA", "SCRIPT_HASH"]


def without_browser(reason):
    message = f"the page cannot be tested in a browser, because {reason}"
    if os.environ.get("STORY_LLM_NEEDS_BROWSER"):
        pytest.fail(message)
    pytest.skip(message)


@pytest.fixture(scope="module")
def browser():
    """A browser that Python can drive. Where there is none, the tests are skipped, or fail if they are demanded."""
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        without_browser("there is no Chromium (Debian: apt-get install chromium)")
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        without_browser("playwright is not installed (python -m pip install playwright)")
    root = hasattr(os, "geteuid") and os.geteuid() == 0         # Chromium's sandbox does not work for root
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, headless=True,
                                             args=ARGUMENTS + ["--no-sandbox"] * root)
        yield browser
        browser.close()


def wait_until(page, condition):
    """Wait until a condition in JavaScript holds. (playwright's wait_for_function needs `eval`, which we forbid.)"""
    for _ in range(1000):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(20)
    raise AssertionError(f"{condition} does not become true")


@pytest.fixture
def show(browser, tmp_path):
    """show(page as a string, name of the file, width, scheme) returns the opened page. In the end, no page may have
    requested anything but itself or show a number that is none, and none may have reported an error, unless the test
    has provoked it."""
    contexts, requests, errors = [], [], []

    def show(html, name="page.html", width=1280, scheme="light", provoked=False):
        (tmp_path / name).write_text(html, encoding="utf-8", newline="\n")
        context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        uri = (tmp_path / name).as_uri()
        if not provoked:
            page.on("request", lambda request: requests.append(request.url) if request.url != uri else None)
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("dialog", lambda dialog: errors.append(f"dialog: {dialog.message}"))
        page.goto(uri)
        wait_until(page, "/ready|without-model/.test(document.body.className)")
        return page
    yield show
    for context in contexts:
        shown = context.pages[0].evaluate("document.body.innerText + $('chart').outerHTML")
        assert not re.search("NaN|undefined|Infinity", shown)
        context.close()
    assert requests == [] and errors == []


@pytest.fixture(scope="module")
def learned():
    """A run that recites TEXT, and its page."""
    run, corpus = tiny(emb_dim=64, n_layers=2, epochs=60, eval_every=100, val_fraction=0.0, batch_size=16)
    train_to(run, corpus)
    run.prompt = "The old ferryman tied his"
    run.text_paths = ["somewhere/my.txt"]
    return run, explore.make_page(run, "tiny.pt")


@pytest.fixture(scope="module")
def default(trained_with_defaults):
    """The default model's run, corpus and page"""
    run = story_llm.load_checkpoint(trained_with_defaults[0] / "story_llm.pt")
    corpus = story_llm.corpus_from_text(story_llm.load_text(STORY), run.tokenizer)
    return run, corpus, explore.make_page(run)


def data_of(html):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html)[1])


def run_of(model, tokenizer=None):
    """A run at step 0 with this model."""
    words = [f" w{i}" for i in range(model.config.vocab_size - 2)] + [story_llm.END_OF_TEXT, story_llm.UNKNOWN]
    return story_llm.Run(model, tokenizer or story_llm.WordTokenizer(words), story_llm.TrainConfig(), "", 1, 1, " w0")


# The same as Python

# Run every window through a model, with an empty cache for each, and return the logits after each of its tokens.
LOGITS = """([config, weights, windows, fast]) => {
    const model = new Model(config, weights, fast);
    return windows.map(window => window.map(
        (_, t) => Array.from(model.forward(window.slice(0, t + 1), new Cache(config)))));
}"""
# The logits after each of the windows, by the page's own model
LOGITS_OF_PAGE = """windows => {
    const cache = new Cache(run.config);
    return windows.map(window => Array.from(model.forward(window, cache)));
}"""


def unpacked(packed):
    """The numbers that a packed weight stands for"""
    if "float32" in packed:
        numbers = torch.frombuffer(bytearray(base64.b64decode(packed["float32"])), dtype=torch.float32)
        return numbers.reshape(packed["shape"])
    integers = torch.frombuffer(bytearray(base64.b64decode(packed["int16"])), dtype=torch.int16)
    scales = torch.frombuffer(bytearray(base64.b64decode(packed["scales"])), dtype=torch.float32)
    return integers.reshape(packed["shape"]) * scales[:, None]


@pytest.mark.parametrize("fast", [True, False], ids=["WebAssembly", "JavaScript"])
def test_logits_are_those_of_torch_for_all_kinds_of_models(show, learned, fast):
    """These models have weights so large that their logits are chaotic, so torch gets the rounded weights, too, and
    computes in double precision: its own rounding would be larger than the page's."""
    page = show(learned[1])
    assert page.evaluate("model.dot4.toString().includes('native code')")      # WebAssembly is used
    for number, kind in enumerate([*KINDS, {"emb_dim": 30, "n_heads": 3}, {"emb_dim": 18, "n_heads": 1}]):
        model = lively_model(number, **kind)
        explore.check_supported(model)
        generator = torch.Generator().manual_seed(number)
        shape = (2, model.config.context_length)
        windows = torch.randint(model.config.vocab_size, shape, generator=generator)
        weights = {name: explore.pack(weight) for name, weight in explore.weights_to_store(model).items()}
        found = page.evaluate(LOGITS, [asdict(model.config), weights, windows.tolist(), fast])
        model.load_state_dict({name: unpacked(weight) for name, weight in weights.items()}, strict=False)
        with torch.no_grad():
            expected = model.double()(windows)
        assert expected.abs().max() > 0.1
        assert torch.allclose(torch.tensor(found).double(), expected, rtol=0, atol=1e-4), kind


def test_logits_of_the_default_model_are_within_a_thousandth_of_torch(show, default):
    run, corpus, html = default
    windows = [corpus.train_ids[start:start + 1 + start % 32] for start in range(0, 4000, 77)]
    found = show(html).evaluate(LOGITS_OF_PAGE, [window.tolist() for window in windows])
    with torch.no_grad():
        expected = torch.stack([run.model(window[None])[0, -1] for window in windows])
    assert torch.allclose(torch.tensor(found), expected, rtol=0, atol=1e-3)


def test_sixteen_bits_are_used_as_well_as_they_can_be():
    """The integers of a row use the whole range, and rounding moves a weight by at most half a scale."""
    weight = torch.randn(7, 13) * torch.logspace(-6, 6, 7)[:, None]
    weight[3] = 0
    packed = explore.pack(weight)
    integers = torch.frombuffer(bytearray(base64.b64decode(packed["int16"])), dtype=torch.int16).reshape(7, 13)
    assert integers.abs().amax(dim=1).tolist() == [32767, 32767, 32767, 0, 32767, 32767, 32767]
    errors = (unpacked(packed) - weight).abs()
    assert (errors <= 0.51 * weight.abs().amax(dim=1, keepdim=True) / 32767).all()
    assert errors[2].mean() < (weight[2].half().float() - weight[2]).abs().mean() / 2


ALPHABETS = [
    "abcdefghijklmnopqrstuvwxyzABCDEFGHIJ", "éèßøåñçœæłžşğ", "абвгдежзиклмнопрст", "αβγδεζηθικλμνξο", "אבגדהוזחטיכל",
    "ابتثجحخدذرزسشصض" + "\u064e\u064f\u0651", "अआइईकखगघचछज" + "\u093e\u093f\u0940\u094d", "அஆஇகஙசஞடண" + "\u0bbe\u0bbf\u0bcd",
    "กขคงจฉชซ" + "\u0e31\u0e34\u0e48", "漢字日本語中文學生々〆", "ひらがなのと", "カタカナーヽ", "한국어텍스트",
    "ᄒ\u1161ᆫ", "ກຂຄງຈ" + "\u0eb4\u0ec8", "កខគឃង" + "\u17b6\u17d2", "ကခဂဃင" + "\u102b\u1039", "აბგდევზ", "ՀԱՅԵՐԵՆ", "ሀሁሂሃሄ",
    "😀👩‍👩‍👧🏽🇮🇳❤️", "𝒜𝓑𝔠𐍈𒀀", "0123456789", "٠١٢٣४५६Ⅷ½²", ".,;:!?…—–-_()[]{}'’\"“”«»。、！？।॥",
    "\u200c\u200d\u200b\ufeff\u00ad", "\t\n\r\x0b\x0c\x1c\x1d\x1e\x1f\x85\xa0\u1680\u2003\u2028\u2029\u202f\u3000",
    "\0\x01\x7f\x80", "<|endoftext|>", "<|unk|>"]


def random_texts(count, seed):
    """Texts of words and spaces, each with a few scripts"""
    dice = random.Random(seed)
    assigned = [character for character in map(chr, range(0x2ffff)) if unicodedata.category(character) not in
                ("Cn", "Cs", "Co")]
    texts = []
    for _ in range(count):
        alphabets = dice.sample(ALPHABETS, 3) + ["".join(dice.sample(assigned, 20))]
        words = ["".join(dice.choices(dice.choice(alphabets), k=dice.randint(1, 12)))
                 for _ in range(dice.randint(1, 25))]
        texts.append("".join(word + dice.choice(["", " ", " ", "  ", "\n", "'s ", "’ll "]) for word in words))
    return texts


@pytest.mark.parametrize("kind", ["word", "story", "gpt2"])
def test_tokens_are_those_of_python(show, learned, kind, request):
    if kind == "gpt2":
        request.getfixturevalue("gpt2")
    texts = [*random_texts(300, seed=kind), "", "a" * 300, " " * 250 + "x", "1" * 205, "I'LL it's ’s 's", *NASTY]
    tokenizer = story_llm.make_tokenizer(kind, " ".join(texts[::2]), vocab_size=600)
    page = show(learned[1])
    encoded, decoded, names = page.evaluate("""([described, texts]) => {
        const tokenizer = new (described.kind === "word" ? WordTokenizer : BPETokenizer)(described);
        const encoded = texts.map(text => tokenizer.encode(text));
        const names = described.tokens.map((_, id) => tokenizer.decode([id]));
        return [encoded, encoded.map(ids => tokenizer.decode(ids)), names];
    }""", [explore.describe_tokenizer(tokenizer), texts])
    for text, found in zip(texts, encoded, strict=True):
        assert found == tokenizer.encode(text), repr(text)
    assert decoded == [tokenizer.decode(found) for found in encoded]
    assert names == [tokenizer.decode([token_id]) for token_id in range(len(names))]


# Write greedily after every prompt, as the page does.
WRITE = """([prompts, count]) => prompts.map(prompt => {
    const greedy = () => ({temperature: 0, topK: 0, topP: 1});
    const writer = generate(model, tokenizer.encode(prompt), greedy);
    return Array.from({length: count}, () => writer.next().value);
})"""


def written_by_python(run, prompts, count):
    return [[new.item() for new in story_llm.generate(run.model, torch.tensor([run.tokenizer.encode(prompt)]), count)]
            for prompt in prompts]


def test_the_page_recites_every_sentence_that_python_recites(show, default):
    run, corpus, html = default
    tests = story_llm.recall_tests(corpus.train_text)
    prompts = [prompt for prompt, _ in tests]
    page = show(html)
    written = page.evaluate(WRITE, [prompts, 24])
    assert len(written) > 150
    for (prompt, continuation), ids in zip(tests, written, strict=True):
        targets = run.tokenizer.encode(continuation)
        length = min(len(targets), 24)
        recited = story_llm.recites(run.model, run.tokenizer, prompt, run.tokenizer.decode(targets[:length]))
        assert (ids[:length] == targets[:length]) == recited, prompt
    few = prompts[::30]
    assert page.evaluate(WRITE, [few, 80]) == written_by_python(run, few, 80)       # far beyond the window


@pytest.mark.parametrize("kind", [{"position": "learned"}, {"position": "rotary"}], ids=["learned", "rotary"])
def test_the_cache_changes_nothing(show, kind):
    run = run_of(lively_model(context_length=9, n_layers=3, **kind))
    page = show(explore.make_page(run))
    differences = page.evaluate("""() => {
        const random = n => Math.floor(Math.random() * n), V = run.config.vocab_size;
        const cache = new Cache(run.config), lastOnly = new Cache(run.config), differences = [];
        let window = [0];
        for (let i = 0; i < 200; i++) {
            const change = random(4);
            if (change === 0) window = window.slice(0, 1 + random(window.length));         // delete the end
            else if (change === 1) window[random(window.length)] = random(V);               // change one
            else window = [...window, random(V)].slice(-9);                                 // type, or slide
            const expected = model.forward(window, new Cache(run.config));
            for (const logits of [model.forward(window, cache), model.forward(window, lastOnly, true)]) {
                differences.push(Math.max(...logits.map((logit, i) => Math.abs(logit - expected[i]))));
            }
        }
        return differences;
    }""")
    assert len(differences) == 400 and max(differences) == 0


def test_probabilities_are_those_of_python_for_all_combinations_of_settings(show, learned):
    """Top-p counts the probabilities that top-k left. So with top-k 1, [.57, .43] becomes [1, 0] whatever top-p is."""
    page, names = show(learned[1]), ("temperature", "topK", "topP")
    random_logits = 2 * torch.randn(4, 90, generator=torch.Generator().manual_seed(0))
    for logits in (random_logits, torch.tensor([[0.57, 0.43]]).log()):
        for values in itertools.product((0.0, 0.7, 1.0, 2.5), (0, 1, 3, 60, 1000), (1.0, 0.9, 0.5, 0.05)):
            found = page.evaluate("([rows, sampling]) => rows.map(row => Array.from("
                                  "nextTokenProbabilities(Float32Array.from(row), sampling)))",
                                  [logits.tolist(), dict(zip(names, values))])
            temperature, top_k, top_p = values
            sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
            expected = story_llm.next_token_probabilities(logits, sampling)
            assert torch.allclose(torch.tensor(found).float(), expected, rtol=0, atol=1e-6), sampling


def test_tokens_are_drawn_with_their_probabilities(show, learned):
    counts = show(learned[1]).evaluate("""() => {
        const counts = [0, 0, 0, 0];
        for (let i = 0; i < 20000; i++) counts[chooseToken([0.5, 0, 0.3, 0.2])]++;
        return counts;
    }""")
    assert counts[1] == 0
    assert all(abs(count / 20000 - p) < 0.03 for count, p in zip(counts, [0.5, 0, 0.3, 0.2]))


def squared_relu(model):
    network = model.trf_blocks[0].ff
    network.forward = lambda x: network.project(torch.relu(network.expand(x)) ** 2)


def attention_window(model):
    """Tokens attend to the last 20 tokens only."""
    def average(queries, keys, values):
        T = keys.shape[2]
        distances = torch.arange(T)[:, None] - torch.arange(T)
        return story_llm.attention_weights(queries, keys, (distances < 0) | (distances >= 20)) @ values
    for block in model.trf_blocks:
        block.att.average = average


def one_position(model):
    """Only the logits of one position in the middle of a window differ."""
    original = model.forward
    model.forward = lambda ids: original(ids) + (torch.arange(ids.shape[1]) == 11)[:, None]


@pytest.mark.parametrize("change", [squared_relu, attention_window, one_position])
def test_a_page_that_computes_something_else_says_so(show, default, change):
    """With the window, the difference is small: this model seldom attends to the first tokens of a full window."""
    run, _, html = default
    assert not show(html).is_visible("#warning")
    changed = story_llm.restore_model(run.config, run.model.state_dict())
    change(changed)
    page = show(explore.make_page(dataclasses.replace(run, model=changed)))
    assert "does not compute what the model computes" in page.inner_text("#warning")
    assert not any(section.is_visible() for section in page.locator("section").all())


def test_a_setting_or_a_value_that_the_page_does_not_know_is_refused():
    model = lively_model()
    settings = asdict(model.config)
    for changes in ({"attention_window": 4}, {"gelu": "quick"}):
        model.config = LaterConfig(**{**settings, **changes})
        with pytest.raises(story_llm.StoryError, match=" ".join(map(str, *changes.items()))):
            explore.make_page(run_of(model))
    model.config = LaterConfig(**settings)
    assert len(explore.make_page(run_of(model))) > 10_000


def test_weights_that_the_page_does_not_know_are_refused():
    for layer, new, name in [("final_norm", torch.nn.RMSNorm(32), "final_norm.bias"),
                             ("trf_blocks.1.att.key", torch.nn.Linear(32, 8, bias=False), "1.att.key.weight"),
                             ("trf_blocks.0.ff.gate", torch.nn.Linear(4, 4), "trf_blocks.0.ff.gate.bias")]:
        model = lively_model()
        model.set_submodule(layer, new)
        with pytest.raises(story_llm.StoryError, match=name):
            explore.make_page(run_of(model))


# What one sees and does

def shown(page, selector):
    return [text.replace("\xa0", " ") for text in page.locator(selector).all_inner_texts()]


def test_chips_show_the_tokens_while_one_types(show, learned):
    run, html = learned
    page = show(html)
    page.fill("#prompt", "At night a boy")
    ids = run.tokenizer.encode("At night a boy")
    names = story_llm.token_names(run.tokenizer, ids)
    assert shown(page, "#chips button") == [f"{name}\n{token_id}" for name, token_id in zip(names, ids)]
    assert page.locator("#chips button").nth(1).get_attribute("title") == "bytes 20 6e 69 67 68 74"
    page.hover("#chips button >> nth=0")
    assert "bytes 41 74" in page.inner_text("#token")
    page.locator("#prompt").press("End")
    page.locator("#prompt").press_sequentially(" ran")
    assert len(shown(page, "#chips button")) == 5
    page.fill("#prompt", "")
    assert shown(page, "#chips button") == [] and page.is_disabled("#continue")
    page.fill("#prompt", "the laptop")
    assert shown(page, "#chips button")[1].startswith(story_llm.UNKNOWN)


def test_bars_show_the_next_token_and_a_click_appends_it(show, learned):
    run, html = learned
    page = show(html)
    with torch.no_grad():
        logits = run.model(torch.tensor([run.tokenizer.encode(run.prompt)]))[0, -1]
    values, best = logits.topk(10)
    rows = [row.split("\n") for row in shown(page, "#bars button")]
    assert [row[0] for row in rows] == story_llm.token_names(run.tokenizer, best.tolist())
    assert [float(row[1]) for row in rows] == pytest.approx(values.tolist(), abs=0.006)
    assert float(rows[0][2].split()[0]) == pytest.approx(100 * logits.softmax(dim=0).max().item(), abs=0.06)
    assert rows[0][3] == "100 %"
    page.click("#bars button >> nth=0")
    assert page.input_value("#prompt") == run.prompt + " boat"
    assert len(shown(page, "#chips button")) == 6


def test_sliders_change_the_bars(show, learned):
    page = show(learned[1])
    chosen = lambda: [row.split("\n")[-1] for row in shown(page, "#bars button")]  # noqa: E731
    assert chosen() == ["100 %"] + ["0 %"] * 9
    page.fill("#temperature", "3")
    hot = chosen()
    assert hot != ["100 %"] + ["0 %"] * 9 and "3.00" in page.inner_text("#temperature-value")
    page.fill("#top-k", "2")
    assert [p == "0 %" for p in chosen()] == [False, False] + [True] * 8
    page.fill("#top-k", "0")
    page.fill("#top-p", "0.05")
    assert chosen() == ["100 %"] + ["0 %"] * 9


def test_continue_streams_until_stop(show, learned):
    run, html = learned
    page = show(html)
    page.click("#continue")
    wait_until(page, "ids.length > 40")
    page.keyboard.press("Escape")
    wait_until(page, "!streaming && $('speed').textContent")
    text = page.input_value("#prompt")
    ids = page.evaluate("ids.slice(nTyped)")
    assert ids == written_by_python(run, [run.prompt], len(ids))[0]
    assert text == run.prompt + run.tokenizer.decode(ids)
    page.wait_for_timeout(60)
    assert page.input_value("#prompt") == text and page.is_disabled("#stop") and page.is_enabled("#continue")
    page.locator("#prompt").press("Control+Enter")
    wait_until(page, f"ids.length > {len(ids) + 40}")
    page.evaluate("$('stop').click()")          # (page.click would wait, if it had just ended by itself)
    assert page.input_value("#prompt").startswith(text)
    page.click("#continue")
    page.fill("#prompt", "At night")            # to type stops it, too
    page.wait_for_timeout(60)
    assert page.input_value("#prompt") == "At night"


def test_a_space_behind_the_prompt_costs_nothing_and_the_end_of_the_text_ends_it(show, learned):
    run, html = learned
    # This page takes the full stop for the end of the text.
    stop_id = run.tokenizer.ids["."]
    page = show(html.replace(f'"end_id": {run.tokenizer.end_of_text}', f'"end_id": {stop_id}'))
    prompt = "At night a boy ran along "
    page.fill("#prompt", prompt)
    page.click("#continue")
    wait_until(page, "!streaming && $('speed').textContent")
    assert page.input_value("#prompt") == run.write(prompt, 100).split(".")[0]


def test_the_menu_holds_the_beginnings_of_the_sentences(show, learned):
    page = show(learned[1])
    beginnings = story_llm.beginnings_of(TEXT)
    assert len(beginnings) > 5 and page.locator("#beginnings option").all_text_contents() == ["choose …", *beginnings]
    page.select_option("#beginnings", beginnings[2])
    assert page.input_value("#prompt") == beginnings[2] and len(shown(page, "#chips button")) >= 5
    run, _ = tiny()
    run.beginnings = []
    assert not show(explore.make_page(run)).is_visible("#beginnings")


def test_attention_follows_the_mouse_and_the_keyboard(show, learned):
    run, html = learned
    page = show(html)
    maps = story_llm.attention_maps(run.model, torch.tensor([run.tokenizer.encode(run.prompt)]))
    page.select_option("#block", index=0)
    page.select_option("#head", index=1)

    def check(t):
        for s, chip in enumerate(page.locator("#shades button").all()):
            title = chip.get_attribute("title")
            if s > t:
                assert title == "a later token"
            else:
                assert float(title.removeprefix("weight ")) == pytest.approx(maps[0, 1, t, s].item(), abs=0.002)

    check(4)
    page.hover("#shades button >> nth=2")
    check(2)
    page.hover("h1")
    check(4)
    page.locator("#chips [aria-pressed=true]").focus()
    page.keyboard.press("ArrowLeft")
    check(3)
    page.keyboard.press("Home")
    check(0)
    assert "token 1, " in page.inner_text("#lens-token")
    labels, cell = page.evaluate("[labels, cell]")
    page.hover("#map", position={"x": labels + 1.5 * cell, "y": 3.5 * cell})
    weight = float(page.inner_text("#weight").split()[-1])
    assert abs(weight - maps[0, 1, 3, 1].item()) < 0.002


def test_the_lens_shows_what_every_part_of_a_block_would_predict(show, learned):
    run, html = learned
    page = show(html)
    vectors = []
    with torch.no_grad():
        ids = torch.tensor([run.tokenizer.encode(run.prompt)])
        vectors.append(run.model.tok_emb(ids) + run.model.pos_emb(torch.arange(ids.shape[1])))
        for block in run.model.trf_blocks:
            vectors.append(vectors[-1] + block.att(block.norm1(vectors[-1])))
            vectors.append(block(vectors[-2]))
    predictions, norms = shown(page, "#lens .says"), shown(page, "#lens b")[1:]
    assert len(predictions) == len(norms) == len(vectors) == 5
    assert [text for text in shown(page, "#lens > span:not(.says, .head)")] == [
        "at first", "after attention 1", "after feed-forward 1", "after attention 2", "after feed-forward 2"]
    for vector, prediction, norm in zip(vectors, predictions, norms):
        vector = vector[0, -1]
        with torch.no_grad():
            probabilities = run.model.out_head(run.model.final_norm(vector)).softmax(dim=-1)
        best = probabilities.argmax().item()
        name, probability = story_llm.token_names(run.tokenizer, [best])[0], 100 * probabilities[best].item()
        assert prediction.startswith(f"“{name}” ")
        assert float(prediction.split()[1]) == pytest.approx(probability, abs=0.06)
        assert float(norm) == pytest.approx(vector.norm().item(), abs=0.06)
    page.click("#lens-chips button >> nth=1")
    assert "token 2, " in page.inner_text("#lens-token")
    assert float(shown(page, "#lens b")[-1]) == pytest.approx(vectors[-1][0, 1].norm().item(), abs=0.06)
    page.fill("#prompt", "")
    assert page.inner_text("#lens") == page.inner_text("#lens-token") == ""


def test_the_history_is_shown_with_its_values(show, learned):
    run, html = learned
    page = show(html)
    for index in (0, len(run.history) - 1):
        page.fill("#evaluation", str(index))
        evaluation, text = run.history[index], shown(page, "#measured")[0]
        assert f"Step {evaluation.step}, " in text and f"training loss {evaluation.train_loss:.3f}" in text
        assert f"recall {100 * evaluation.recall:.0f} %" in text and "validation loss not measured" in text
    page.hover("#chart", position={"x": 46, "y": 100})
    assert "Step 0, " in page.inner_text("#measured")
    page.click("summary")
    assert {"emb_dim", "learning_rate"} <= set(shown(page, "#settings dt"))


def test_a_model_without_a_history_and_one_whose_history_lacks_numbers(show):
    page = show(explore.make_page(run_of(lively_model())))
    assert not page.is_visible("#chart") and "not trained here" in page.inner_text(".learned")
    run = run_of(lively_model(context_length=1))
    run.history = [story_llm.Evaluation(0, 0.0, 0.0, None, None, "", "")]
    page = show(explore.make_page(run))
    assert "validation loss not measured, recall not measured" in page.inner_text("#measured")
    page.click("#continue")         # the page may not show NaN anywhere: see `show`
    page.keyboard.press("Escape")
    wait_until(page, "!streaming && $('speed').textContent")


@pytest.mark.parametrize("width, scheme", [(360, "light"), (800, "dark"), (1280, "light")])
def test_nothing_is_wider_than_the_screen(show, learned, width, scheme):
    run, html = learned
    page = show(html, width=width, scheme=scheme)
    for text in (run.prompt, TEXT, "x" * 300):
        page.fill("#prompt", text)
        assert page.evaluate("document.documentElement.scrollWidth") == width
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background[4:-1].split(","))) > 384) == (scheme == "light")


def test_everything_has_a_name_for_screen_readers(show, learned):
    page = show(learned[1])
    assert page.evaluate("""() => [...document.querySelectorAll("button, select, input, textarea, canvas, svg")].filter(
        found => !found.textContent.trim() && !found.getAttribute("aria-label") && !found.labels?.length
    ).map(found => found.outerHTML)""") == []


# Safe

def test_a_story_is_data_and_stays_data(show, tmp_path):
    text = " ".join(NASTY) + " and " + " then ".join(NASTY) + ". " + TEXT
    run = trained(text, emb_dim=16, epochs=1, val_fraction=0.0)
    name = "<img src=x onerror=attacked=1>\"'&amp;\u2028 a.pt"
    run.prompt, run.text_paths = " ".join(NASTY), [name]
    page = show(explore.make_page(run, name), "<b>&amp; 'a' \"b\".html")
    assert page.evaluate("typeof attacked") == "undefined"
    assert page.locator("img, main script, main b:not(.lens b, .sample b)").count() == 0
    assert page.text_content("#title") == f"Inside {name}" and f"on {name}." in page.text_content("#subtitle")
    assert page.input_value("#prompt") == run.prompt
    assert page.evaluate("ids") == run.tokenizer.encode(run.prompt)
    assert page.evaluate("Array.from($('beginnings').options, option => option.value)") == ["", *run.beginnings]
    assert page.evaluate("run.tokenizer.tokens") == run.tokenizer.tokens
    names = story_llm.token_names(run.tokenizer, run.tokenizer.encode(run.prompt)[-12:])       # those in the window
    assert [text.split("\n")[0] for text in shown(page, "#chips button:enabled")] == [
        name.replace("\u2028", "\ufffd").replace("\u2029", "\ufffd") for name in names]


def test_the_page_may_load_and_run_nothing_else(show, learned):
    """Whatever one might smuggle into the page, the browser refuses it, and names the directive that it violates."""
    page = show(learned[1], provoked=True)
    page.evaluate("""async () => {
        window.violated = [];
        document.addEventListener("securitypolicyviolation", event => violated.push(event.effectiveDirective));
        await fetch("http://127.0.0.1:1/").catch(() => {});
        document.body.append(Object.assign(new Image(), {src: "http://127.0.0.1:1/a.png"}));
        document.body.insertAdjacentHTML("beforeend", "<img src='data:,' onerror='attacked=1'><i style='color:red'></i>"
            + "<iframe src='http://127.0.0.1:1/'></iframe><link rel=stylesheet href='http://127.0.0.1:1/a.css'>");
        const script = Object.assign(document.createElement("script"), {textContent: "attacked=1"});
        const form = Object.assign(document.createElement("form"), {action: "http://127.0.0.1:1/"});
        document.body.append(script, form);
        form.submit();
    }""")
    wait_until(page, "violated.length >= 8")
    assert set(page.evaluate("violated")) == {
        "connect-src", "img-src", "script-src-attr", "script-src-elem", "form-action", "frame-src", "style-src-attr",
        "style-src-elem"}
    assert page.evaluate("typeof attacked") == "undefined"


# The command line

@pytest.fixture
def command(capsys):
    def run(*arguments):
        capsys.readouterr()
        status = explore.main([str(argument) for argument in arguments])
        return status, *capsys.readouterr()
    return run


def test_the_command_writes_a_page_with_the_sentences_of_the_story(command, trained_here, folder):
    model = next(folder.glob("*.pt"))
    assert command("--model", model, "my.html") == (0, "wrote my.html: 0.1 MB. Open it in a browser\n", "")
    page = (folder / "my.html").read_text(encoding="utf-8")
    beginnings = data_of(page)["beginnings"]
    train_text, _ = story_llm.split_text(TEXT, story_llm.TrainConfig())
    assert beginnings == story_llm.beginnings_of(train_text)
    assert str(folder) not in page          # no paths of this machine


def test_mistakes_are_one_line_and_write_nothing(command, trained_here, folder, monkeypatch):
    model = next(folder.glob("*.pt"))
    shutil.copy(model, "model.html")
    for arguments, message in [
            (("--model", "none.pt", "my.html"), "none.pt"), (("--model", model, "my.pdf"), ".html, .htm"),
            (("--model", model, "none/my.html"), "cannot be written"),
            (("--model", "model.html", "./model.html"), "two things"), (("--model", model), "PAGE.html")]:
        status, out, err = command(*arguments)
        assert status == (2 if message == "PAGE.html" else 1)
        assert out == "" and err.startswith("error: ") and message in err and err.count("\n") == 1
    monkeypatch.setattr(story_llm, "make_norm", lambda config: torch.nn.RMSNorm(config.emb_dim))
    story_llm.save_checkpoint("edited.pt", trained(max_steps=2))
    status, out, err = command("--model", "edited.pt", "my.html")
    assert (status, out) == (1, "") and "final_norm.bias" in err and err.count("\n") == 1
    assert [path.name for path in folder.glob("*.html")] == ["model.html"]
    assert Path("model.html").read_bytes() == model.read_bytes()


def test_a_page_is_written_in_one_go(command, trained_here, folder, monkeypatch):
    model, page = next(folder.glob("*.pt")), folder / "my.html"
    page.write_text("the old page", encoding="utf-8")
    before = sorted(folder.iterdir())

    def full_disk(path, contents, **options):
        path.write_bytes(contents[:100].encode())
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full_disk)
        status, out, err = command("--model", model, page)
    assert (status, out) == (1, "") and "No space" in err and err.count("\n") == 1
    assert page.read_text(encoding="utf-8") == "the old page" and sorted(folder.iterdir()) == before
    assert command("--model", model, page)[0] == 0 and page.read_text(encoding="utf-8").endswith("</html>\n")


def test_a_page_that_would_be_too_large_is_refused(command, trained_here, folder, monkeypatch):
    with torch.device("meta"):
        large = story_llm.GPTModel(story_llm.GPTConfig(emb_dim=768, n_heads=12, n_layers=12))
    with pytest.raises(story_llm.StoryError, match="the page would have 4.. MB, and browsers become slow above 60"):
        explore.make_page(run_of(large, tokenizer="not needed"))
    size = len(explore.make_page(story_llm.load_checkpoint(next(folder.glob("*.pt")))))
    monkeypatch.setattr(explore, "MAX_BYTES", size - 100)
    status, out, err = command("--model", next(folder.glob("*.pt")), "my.html")
    assert (status, out) == (1, "") and "error: the page would have" in err and not (folder / "my.html").exists()
