"""The promise itself: the README's main job as a user runs it, with every default, in processes of its own."""
import os
import re
import subprocess
import sys

import pytest

from conftest import STORY, bare_environment, closed_port

PROMPT = "Once Aadhan renounced his kingdom"
REST = (" for the love of Thamarai, its people living in fear and oppression. Aadhan knew he had to act swiftly to "
        "overthrow his brother's oppressive regime.")


@pytest.mark.parametrize("tokenizer", ["auto", "word", "gpt2"])
def test_trained_with_the_defaults_the_model_continues_the_promised_line_and_goes_on(tokenizer, tmp_path, request):
    environment = {**os.environ, **bare_environment(tmp_path, closed_port())}
    if tokenizer == "gpt2":
        request.getfixturevalue("gpt2")  # skips where the files are not at hand
        environment = dict(os.environ)

    def run(*arguments):
        return subprocess.run([sys.executable, STORY.with_name("story_llm.py"), *arguments], check=True, cwd=tmp_path,
                              env=environment, capture_output=True, encoding="utf-8").stdout

    trained = run("train", "--tokenizer", tokenizer)
    assert float(re.search(r"Recall ([\d.]+)%", trained)[1]) >= 98
    assert (tmp_path / "story_llm.pt").stat().st_size < 40e6
    generated = run("generate", "--prompt", PROMPT)
    assert generated.startswith(PROMPT + REST)
    story = STORY.read_text(encoding="utf-8")
    assert len(generated) > len(PROMPT + REST) + 40 and generated[:len(PROMPT + REST) + 40] in story
