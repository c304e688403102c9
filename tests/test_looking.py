"""Pictures, probabilities, colours, the live line, the tour: what is shown is what the model does."""
import io
import math
import os
import pty
import re
import struct
import subprocess
import sys
import warnings

import pytest
import torch
from conftest import STORY, TEXT, bare_environment, closed_port, lively_model, trained_run
from torch.nn import functional as F

import story_llm
from story_llm import attention_maps, main, next_tokens, plot_attention, plot_losses, plot_next_tokens, visible

IDS = torch.tensor([[3, 1, 4, 1, 5, 9]])
ESCAPE = re.compile(r"\x1b\[[0-9;]*[mK]")


@pytest.fixture(autouse=True)
def warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture
def trained(tmp_path_factory):
    """A folder with a small trained model and its text; the present one."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "my.txt").write_text(TEXT, encoding="utf-8")
    run = trained_run(tokenizer="story", epochs=6)
    story_llm.save_checkpoint(folder / "story_llm.pt", run)
    return folder


@pytest.fixture
def run(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained)

    def call(*arguments):
        status = main(list(arguments))
        output = capsys.readouterr()
        return status, output.out, output.err
    return call


def on_a_terminal(folder, *arguments, **environment):
    """What the program writes if stdout and stderr are a terminal, and its exit status."""
    master, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, STORY.with_name("story_llm.py"), *arguments], cwd=folder, stdout=terminal, stderr=terminal,
        env={**os.environ, **bare_environment(folder, closed_port()), "NO_COLOR": "", "COLUMNS": "60", **environment})
    os.close(terminal)
    output = b""
    try:
        while data := os.read(master, 1000):
            output += data
    except OSError:  # the other end is closed
        pass
    os.close(master)
    return output.decode().replace("\r\n", "\n"), process.wait(timeout=60)


# attention

@pytest.mark.parametrize("position", ["learned", "rotary"])
def test_attention_maps_are_causal_shares_of_every_layer_and_head(position):
    maps = attention_maps(lively_model(position=position), IDS)
    assert maps.shape == (2, 4, 6, 6)
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 4, 6))
    assert maps.triu(1).abs().max() == 0 and maps.min() >= 0 and maps.std() > 0.05


def test_attention_maps_are_the_weights_that_the_model_used():
    """The values of the first layer, mixed by its maps, are what torch's own attention makes of them."""
    model = lively_model()
    block, inputs = model.trf_blocks[0], []
    hook = block.att.register_forward_hook(lambda part, given, _: inputs.append(given[0]))
    maps = attention_maps(model, IDS)
    hook.remove()
    with torch.no_grad():
        queries, keys, values = block.att.queries_keys_values(inputs[0])
        expected = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
    torch.testing.assert_close(maps[0] @ values[0], expected[0], rtol=1e-4, atol=1e-5)
    assert not block.att._forward_hooks


def png_size(path):
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", content[16:24])


def test_one_head_or_one_layer_is_drawn_alone(tmp_path):
    maps, pieces = attention_maps(lively_model(), IDS), ["a", "$b$", "漢", "d_", "\\e", "␣f"]
    counts = [sum(axes.get_title() != "" for axes in plot_attention(maps, pieces, None, layer, head).axes)
              for layer, head in ((None, None), (1, None), (None, 4), (2, 3))]
    assert counts == [8, 4, 2, 1]
    plot_attention(maps, pieces, tmp_path / "one.png", 2, 3)
    assert min(png_size(tmp_path / "one.png")) > 200
    for layer, head in ((0, None), (3, None), (None, 5), (None, -1)):
        with pytest.raises(ValueError, match="layer|head"):
            plot_attention(maps, pieces, None, layer, head)


def test_the_command_draws_and_tells(run, trained):
    status, out, err = run("attention", "--prompt", "The old ferryman")
    assert (status, err) == (0, "") and "drew attention.png" in out and (trained / "attention.png").exists()
    assert run("attention", "--layer", "1", "--head", "2", "--plot", "one.svg", "--prompt", "The")[0] == 0
    for mistake in (["--layer", "2"], ["--head", "0"], ["--plot", "x.txt"], ["--prompt", ""]):
        status, out, err = run("attention", *mistake)
        assert status == 1 and err.count("\n") == 1, err


# the next token

def test_next_tokens_are_the_likeliest_with_their_probabilities():
    model = lively_model()
    with torch.no_grad():
        logits = model(IDS)[0, -1]
    found = next_tokens(model, IDS, 10, temperature=0.5, top_k=3)
    assert [i for i, *_ in found] == logits.argsort(descending=True)[:10].tolist()
    for i, logit, probability, drawn in found:
        assert logit == pytest.approx(logits[i].item(), rel=1e-5)
        assert probability == pytest.approx(math.exp(logit) / logits.exp().sum().item(), rel=1e-4)
    three = [math.exp(2 * logit) for _, logit, _, _ in found[:3]]
    assert [drawn for *_, drawn in found] == pytest.approx([each / sum(three) for each in three] + [0] * 7, rel=1e-4)


def test_chances_are_those_by_which_tokens_are_drawn():
    model, generator = lively_model(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        logits = model(IDS)[:, -1].expand(20_000, -1)
    drawn = story_llm.choose_token(logits, 0.7, 4, generator).bincount(minlength=40) / 20_000
    for i, _, _, chance in next_tokens(model, IDS, 10, 0.7, 4):
        assert drawn[i].item() == pytest.approx(chance, abs=0.02)


def test_the_command_shows_ten_tokens_before_and_after_training(run, trained):
    for extra in ([], ["--untrained", "--text", "my.txt", "--tokenizer", "word"]):
        status, out, err = run("next", "--prompt", "The old", "--temperature", "0.5", "--top-k", "3", "--plot", "n.png",
                               *extra)
        rows = re.findall(r"^  \S+ +-?[\d.]+ +([\d.]+)% +([\d.]+)%", out, re.M)
        assert (status, "error" in err, len(rows)) == (0, False, 10) and [row[1] for row in rows[3:]] == ["0.00"] * 7
        assert sum(float(row[1]) for row in rows) == pytest.approx(100, abs=0.1)
        assert min(png_size(trained / "n.png")) > 200


def test_bars_are_drawn_for_any_pieces():
    assert plot_next_tokens(["$", "␣a"], {"one": [0.5, 0.25], "two": [1.0, 0.0]}).axes[0].patches[0].get_width() == 0.5


# tokens in colour, the live line

def test_tokens_are_coloured_on_a_terminal_and_bracketed_elsewhere(run, trained):
    words = ["bpe", "--text", "my.txt", "--tokenizer", "story", "--prompt", "The old\nferryman"]
    _, out, _ = run(*words)
    plain = re.search(r"^  (\[T.*)$", out, re.M)[1]
    assert visible("The old\nferryman") == plain.replace("][", "")[1:-1]
    coloured, status = on_a_terminal(trained, *words)
    rows = [row for row in coloured.splitlines() if ESCAPE.sub("", row).strip() == "The old⏎ferryman"]
    assert status == 0 and len(rows) == 1
    colours = ESCAPE.findall(rows[0])
    assert colours[1::2] == ["\x1b[0m"] * (len(colours) // 2) and colours[0] != colours[2] and colours[0] == colours[4]
    without, _ = on_a_terminal(trained, *words, NO_COLOR="1")
    assert "\x1b" not in without and plain in without


def test_pieces_cannot_steer_the_terminal(trained):
    (trained / "evil.txt").write_text(TEXT + "\x1b[31m\x1b]0;title\x07 bad", encoding="utf-8")
    output, status = on_a_terminal(trained, "words", "--text", "evil.txt", "--prompt", "\x1b[31m red")
    assert status == 0 and set(ESCAPE.findall(output)) <= {"\x1b[30;46m", "\x1b[30;43m", "\x1b[0m"}
    assert "\x1b]" not in output and "\x1b[31m" not in output


TRAIN = ["train", "--text", "my.txt", "--tokenizer", "word", "--emb-dim", "16", "--n-layers", "1", "--epochs", "3",
         "--context-length", "12", "--model", "live.pt"]


def test_a_line_moves_on_a_terminal_and_leaves_the_log_alone(run, trained):
    shown, status = on_a_terminal(trained, *TRAIN)
    _, out, err = run(*TRAIN)
    live = re.findall(r"\r\x1b\[K(epoch \d+, step \d+ of \d+, loss [^\r]*)", shown)
    assert status == 0 and len(live) >= 3 and all(len(line) < 60 for line in live)
    remains = [re.sub(r".*\x1b\[K", "", line) for line in shown.split("\n")]
    without_speed = [re.sub(r", [\d,]+ tokens/s.*", "", line) for line in remains if line]
    assert without_speed == [re.sub(r", [\d,]+ tokens/s.*", "", line) for line in out.splitlines()] and err == ""


# learning to speak, the tour

def test_samples_show_the_way_from_noise_to_the_story(run, trained, knows_text):
    story_llm.save_checkpoint("by_heart.pt", knows_text)
    status, out, err = run("plot", "--samples", "--model", "by_heart.pt", "--text", "my.txt")
    lines = out.splitlines()
    assert (status, err) == (0, "") and [line.split()[0] for line in lines] == ["0%", "2%", "5%", "20%", "100%"]
    known = [(re.findall(r"\[(.*?)\]", line) or [""])[0] for line in lines]
    assert len(known[0]) < 20 < len(known[-1]) and all(part in " ".join(TEXT.split()) for part in known)
    assert lines[-1].endswith("]")
    status, _, err = run("plot", "--samples", "--model", "by_heart.pt")
    assert status == 1 and "another text" in err


def test_the_tour_walks_all_steps_in_the_order_of_the_file(trained, monkeypatch, capsys, bare):
    monkeypatch.chdir(trained)
    monkeypatch.setattr(story_llm, "USUAL_EPOCHS", 0)
    monkeypatch.setattr(story_llm, "FEWEST_STEPS", 3)
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n" * 16 + "not read"))
    assert main(["tour", "--pause"]) == 0
    out = capsys.readouterr().out
    titles = [int(number) for number in re.findall(r"^═══ Step (\d+): ", out, re.M)]
    assert titles == list(range(1, 14)) and sys.stdin.read() == "not read"
    commands = re.findall(r"^\$ python story_llm.py ?(.*)$", out, re.M)
    assert len(commands) == len(set(commands)) == 13 and {"train", "generate", "attention"} <= {*commands}
    for name in ("story_llm.pt", "loss.png", "attention.png", "next.png"):
        assert (trained / name).stat().st_size > 1000


def test_a_step_of_the_tour_that_fails_ends_it(trained, monkeypatch, capsys, bare):
    monkeypatch.chdir(trained)
    monkeypatch.setattr(story_llm, "DEFAULT_TEXT", "missing.txt")
    monkeypatch.setitem(story_llm.OPTIONS, "--text", {**story_llm.OPTIONS["--text"], "default": "missing.txt"})
    assert main(["tour"]) == 1
    assert "missing.txt" in capsys.readouterr().err


def test_recall_is_drawn_where_it_was_measured():
    entries = [{"step": i, "epoch": i / 4, "train_loss": 5.0 - i / 10, "val_loss": 5 + (i - 5) ** 2 / 100,
                "tokens": i * 64, "recall": i / 20} for i in range(0, 20, 5)]
    figure = plot_losses(entries, 300)
    losses, recall = figure.axes[:2]
    assert list(recall.lines[0].get_ydata()) == [0, 0.25, 0.5, 0.75]
    assert "best validation loss, at step 5" in [text.get_text() for text in losses.get_legend().get_texts()]
    assert recall.get_xlabel() == "epochs" and losses.get_xlabel() == ""
    for entry in entries:
        entry["recall"] = None
    assert [axes.get_xlabel() for axes in plot_losses(entries, 300).axes] == ["epochs"]


@pytest.mark.parametrize("wrong", [["--temperature", "-1"], ["--temperature", "nan"], ["--top-k", "0"],
                                   ["--plot", "n.xyz"], ["--prompt", ""]])
def test_wrong_wishes_for_the_next_token_are_refused(run, wrong):
    status, _, err = run("next", "--prompt", "The", *wrong)
    assert status == 1 and err.startswith("error: ") and err.count("\n") == 1
