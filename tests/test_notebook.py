"""A notebook: the code of the README's section "From Python", in a real kernel."""
import re
import shutil
import sys

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

from helpers import ROOT, STORY, bare_environment

FEW_STEPS = "new_run(corpus, train_config=story_llm.TrainConfig(max_steps=3))"


def code_of_the_readme():
    """The lines of the first code block of the section."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## From Python\n")[1].split("\n## ")[0]
    return re.search(r"```python\n(.*?)```", section, re.DOTALL)[1].splitlines()


class ThisPython(AsyncKernelManager):
    """Starts kernels of the Python that runs the tests, whatever kernels are installed on the machine."""
    @property
    def kernel_spec(self):
        return KernelSpec(argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"], env={})


@pytest.fixture
def execute(tmp_path, monkeypatch):
    """execute(code, ...) runs these cells in a new kernel, in a folder with the program and the story. Returns the
    executed cells."""
    for path in (STORY, ROOT / "story_llm.py"):
        shutil.copy(path, tmp_path)
    (tmp_path / "home").mkdir()
    for name, value in {**bare_environment(tmp_path / "home"), "IPYTHONDIR": str(tmp_path / "home"),
                        "JUPYTER_RUNTIME_DIR": str(tmp_path / "home"), "PYTHONPATH": "",
                        "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)

    def run(*cells):
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
        client = NotebookClient(notebook, timeout=300, kernel_manager_class=ThisPython, kernel_name="python3",
                                resources={"metadata": {"path": str(tmp_path)}})
        client.execute()
        return notebook.cells
    return run


def kinds(cell):
    """The MIME types of what a cell shows, and the names of the streams that it has written to."""
    shown = [set(output.get("data", ())) | {output.get("name")} - {None} for output in cell.outputs]
    return set().union(*shown)


def test_the_code_of_the_readme_works_in_a_notebook(execute, tmp_path):
    """With a few steps. Then come cells of one line each, as a teacher might go on."""
    lines = code_of_the_readme()
    code = "\n".join(lines).replace('new_run(corpus, device="auto")', FEW_STEPS)
    assert FEW_STEPS in code and len(lines) >= 5
    *cells, last = execute(code, "run.attention(run.prompt)", "print(run.next(run.prompt))", "run.next(run.prompt)",
                           "run.write(run.prompt, 3)", "run",
                           "story_llm.plot_losses(run.history, run.config.vocab_size)")
    training, attention, printed, table, _, run = cells
    assert not any(output.output_type == "error" for cell in (*cells, last) for output in cell.outputs)
    for figure in (attention, last):
        assert "image/png" in kinds(figure)
    assert table.outputs[0].data["text/plain"] == printed.outputs[0].text.rstrip("\n")
    assert table.outputs[0].data["text/plain"].startswith("next token")
    assert len(run.outputs[0].data["text/plain"]) < 200 and "step 3 of 3" in run.outputs[0].data["text/plain"]
    if "train_with_progress" in code:
        assert re.search(r"\(Step 000003\): Train loss", "".join(output.get("text", "") for output in training.outputs))
    if lines[-1].lstrip().startswith(("story_llm.plot_losses(", "run.attention(")):
        assert "image/png" in kinds(training)
