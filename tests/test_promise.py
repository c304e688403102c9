"""What the program promises: with every default, a model learns the story and continues it word for word. It is used as
a user uses it, in processes of its own."""
import re

import pytest
from helpers import STORY, bare_environment

PROMPT = "Once Aadhan renounced his kingdom"
CONTINUATION = (" for the love of Thamarai, its people living in fear and oppression. Aadhan knew he had to act "
                "swiftly to overthrow his brother's oppressive regime.")


@pytest.fixture(scope="module", params=["auto", "word", "gpt2"])
def trained(request, run_program, tmp_path_factory):
    """(tokenizer, folder, output of training, environment). "auto" runs without a network and without GPT-2's files."""
    if request.param == "gpt2":      # skipped if its files are not on this machine
        return "gpt2", *request.getfixturevalue("trained_with_defaults"), {}
    folder = tmp_path_factory.mktemp(request.param)
    environment = bare_environment(tmp_path_factory.mktemp("cache"))
    options = [] if request.param == "auto" else ["--tokenizer", request.param]
    done = run_program(folder, "train", *options, **environment)
    assert done.returncode == 0, done.stderr
    return {"auto": "story"}.get(request.param, request.param), folder, done.stdout, environment


def test_with_the_defaults_the_model_recites_the_story_and_continues_the_promised_line(trained, run_program):
    tokenizer, folder, printed, environment = trained
    assert f"; {tokenizer} tokenizer, " in printed.splitlines()[0]
    recited, tested = map(int, re.search(r"^Recall [\d.]+%: (\d+) of (\d+) sentences ", printed, re.MULTILINE).groups())
    assert recited >= 173 and recited >= 0.98 * tested, printed
    assert (folder / "story_llm.pt").stat().st_size < 40e6
    assert (folder / "loss.png").stat().st_size > 10_000
    done = run_program(folder, "generate", "--prompt", PROMPT, **environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(PROMPT + CONTINUATION)
    # The continuation is longer than the window, and the text after it is the story's as well.
    beginning = done.stdout[:len(PROMPT + CONTINUATION) + 40]
    assert len(beginning) == len(PROMPT + CONTINUATION) + 40
    assert beginning in STORY.read_text(encoding="utf-8")
