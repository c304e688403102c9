import os
import re
import shlex

import pytest
import torch

import story_llm
from conftest import STORY

README = STORY.with_name("README.md")
pytestmark = pytest.mark.skipif(not README.exists(), reason="the README stands elsewhere")


def commands():
    """All calls of the program that the README shows."""
    text = README.read_text(encoding="utf-8") if README.exists() else ""
    return sorted(set(re.findall(r"python3? story_llm\.py([^`\n&|]*)", text)))


@pytest.mark.parametrize("command", commands())
def test_every_command_of_the_readme_has_right_usage(command, monkeypatch):
    reached = []
    for name in [name for name in dir(story_llm) if name.startswith("command_")]:
        monkeypatch.setattr(story_llm, name, reached.append)
    monkeypatch.setattr(story_llm, "COMMANDS", {  # the table holds the handlers themselves
        name: (reached.append, *rest) for name, (_, *rest) in story_llm.COMMANDS.items()})
    assert story_llm.main(shlex.split(command.strip())) == 0 and len(reached) == 1


def test_every_option_of_the_readme_exists(capsys):
    known = set()
    for command in story_llm.COMMANDS:
        with pytest.raises(SystemExit):
            story_llm.main([command, "--help"])
        known |= set(re.findall(r"--[a-z][a-z0-9-]+", capsys.readouterr().out))
    text = re.sub(r"^.*(pip|venv) .*$", "", README.read_text(encoding="utf-8"), flags=re.MULTILINE)
    text = re.sub(r"`python benchmarks/[^`]*`|^torchrun .* story_llm.py", "", text, flags=re.MULTILINE)  # have their own
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", text)) <= known | {"--help"}


def test_the_names_of_the_python_example_exist():
    names = re.findall(r"story_llm\.(\w+)\(", README.read_text(encoding="utf-8"))
    assert names and all(callable(getattr(story_llm, name)) for name in names)


def test_the_python_example_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "Short_Story.txt").write_bytes(STORY.read_bytes())
    monkeypatch.chdir(tmp_path)
    values, threads = {}, torch.get_num_threads()
    torch.set_num_threads(os.cpu_count())
    try:
        exec(example, values)
    finally:
        torch.set_num_threads(threads)
    assert values["run"].step == values["run"].total_steps and (tmp_path / "story_llm.pt").exists()
    out = capsys.readouterr().out
    run, prompt = values["run"], re.search(r'"(\w[^"]*)", 40\)', example)[1]
    continuation = "".join(story_llm.generate_text(run.model, run.tokenizer, prompt, 40))
    assert continuation in out and prompt + continuation[:40] in STORY.read_text(encoding="utf-8")
    assert float(re.search(r"^(\d\.\d+)$", out, re.MULTILINE)[1]) > 0.95


def test_importing_needs_no_package_that_is_not_pinned():
    pinned = re.findall(r"^(\w+)==[\d.]+$", README.with_name("requirements.txt").read_text(), re.MULTILINE)
    assert {"torch", "tiktoken", "matplotlib", "pytest", "hypothesis"} == set(pinned)
