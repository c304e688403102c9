"""A notebook: the code of the README's section "From Python", in a real kernel, one cell a block."""
import re
import shutil
import sys

import nbformat
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

from helpers import ROOT, STORY, bare_environment, story_llm


class ThisPython(AsyncKernelManager):
    """Starts kernels of the Python that runs the tests, whatever kernels are installed on the machine."""
    @property
    def kernel_spec(self):
        return KernelSpec(argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"], env={})


def execute(folder, cells):
    """Run these cells in a new kernel, in a folder. Return the executed cells. An error in a cell is raised."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    client = NotebookClient(notebook, timeout=300, kernel_manager_class=ThisPython, kernel_name="python3",
                            resources={"metadata": {"path": str(folder)}})
    client.execute()
    return notebook.cells


def test_the_code_of_the_readme_works_in_a_notebook(tmp_path, monkeypatch):
    """With three steps, in a folder with the program and the story. A cell that ends with a picture shows it."""
    for path in (STORY, ROOT / "story_llm.py"):
        shutil.copy(path, tmp_path)
    (tmp_path / "home").mkdir()
    for name, value in {**bare_environment(tmp_path / "home"), "IPYTHONDIR": str(tmp_path / "home"),
                        "JUPYTER_RUNTIME_DIR": str(tmp_path / "home"), "PYTHONPATH": ""}.items():
        monkeypatch.setenv(name, value)
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## From Python\n")[1].split("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    cells = [re.sub(r"max_steps=\d+", "max_steps=3", block) for block in blocks]
    assert cells != blocks
    pictures = 0
    for cell in execute(tmp_path, cells):
        shown = [kind for output in cell.outputs for kind in output.get("data", ())]
        draws = re.match(r"[\w.]*plot_\w+\(", cell.source.strip().splitlines()[-1]) is not None
        assert ("image/png" in shown) == draws, cell.source
        pictures += draws
        if re.search(r"\btrain\(", cell.source):
            printed = "".join(output.get("text", "") for output in cell.outputs)
            assert re.search(r"\(Step 000003\): Train loss", printed)
    assert pictures > 0
    for name in re.findall(r"[\w-]+\.pt\b", "".join(cells)):
        run = story_llm.load_checkpoint(tmp_path / name)
        assert run.step == run.total_steps == 3
