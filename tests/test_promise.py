"""The promise itself: the main job as a user does it, with every default, in processes of its own."""
import re

import pytest
from helpers import STORY, bare_environment

PROMPT = "Once Aadhan renounced his kingdom"
REST = (" for the love of Thamarai, its people living in fear and oppression. Aadhan knew he had to act swiftly to "
        "overthrow his brother's oppressive regime.")


@pytest.fixture(scope="module", params=["auto", "word", "gpt2"])
def trained(request, run_program, tmp_path_factory):
    """(tokenizer, folder, what training printed, environment); "auto" without a network and without GPT-2's files."""
    if request.param == "gpt2":      # skips where its files are not at hand
        return "gpt2", *request.getfixturevalue("trained_with_defaults"), {}
    folder = tmp_path_factory.mktemp(request.param)
    environment = bare_environment(tmp_path_factory.mktemp("cache"))
    options = [] if request.param == "auto" else ["--tokenizer", request.param]
    done = run_program(folder, "train", *options, **environment)
    assert done.returncode == 0, done.stderr
    return {"auto": "story"}.get(request.param, request.param), folder, done.stdout, environment


def test_trained_with_the_defaults_the_model_continues_the_promised_line_and_goes_on(trained, run_program):
    tokenizer, folder, printed, environment = trained
    assert printed.startswith(f"{tokenizer} tokenizer")
    assert float(re.search(r"^Recall ([\d.]+)%", printed, re.MULTILINE)[1]) >= 98
    assert (folder / "story_llm.pt").stat().st_size < 40e6 and (folder / "loss.png").stat().st_size > 10_000
    done = run_program(folder, "generate", "--prompt", PROMPT, **environment)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith(PROMPT + REST)
    story = STORY.read_text(encoding="utf-8")
    assert len(done.stdout) > len(PROMPT + REST) + 40 and done.stdout[:len(PROMPT + REST) + 40] in story
