"""Errors: a user's mistake is one line that names the remedy; a bug, in particular in a model that the reader has
edited, keeps its traceback."""
import os
import subprocess
import sys

import pytest
import torch
from helpers import PROGRAM, ROOT, STORY, TEXT, story_llm

from story_llm import COMMANDS, StoryError

sys.path.insert(0, str(ROOT / "extras"))
from experiments import changed_program  # noqa: E402

PROMPT = "The old ferryman tied his"


def assert_one_line(result, *words):
    """Status 1, and one line on stderr that begins with "error: " and contains the words."""
    status, out, err = result
    assert status == 1 and err.startswith("error: ") and err.count("\n") == 1, err
    assert "error" not in out and not [word for word in words if str(word) not in err], err


# a model that the reader has broken

BROKEN = {      # {a function: (its line, what the reader made of it, the error)}
    "split_heads": ("        B, T, _ = x.shape\n", "        B, T = x.shape\n", ValueError),
    "forward of FeedForward": ("self.project(F.gelu(self.expand(x), ", "self.project(F.gelu(self.expand(x).mT, ",
                               RuntimeError),
    "forward of GPTModel": ("self.out_head(self.final_norm(x)) ", "self.out_head(self.final_norm(y)) ", NameError)}


@pytest.mark.parametrize("where", BROKEN)
def test_whoever_breaks_the_model_sees_in_every_command_the_line_that_fails(folder, trained_here, small, where):
    """`generate` reads a checkpoint that the intact program has saved."""
    line, broken_line, error = BROKEN[where]
    program, source = changed_program([(line, broken_line)]), PROGRAM.read_text(encoding="utf-8")
    for command in (small("model"), small("train", "--model", "new.pt"), ["generate", "--prompt", PROMPT]):
        with pytest.raises(error) as raised:
            program.main(command)
        last = [entry for entry in raised.traceback if str(entry.path) == str(PROGRAM)][-1]
        assert (last.name, last.lineno) == (where.split()[0], source[:source.index(line)].count("\n"))
    assert not (folder / "new.pt").exists()


def test_a_process_with_a_broken_model_prints_the_traceback(folder, trained_here, run_program):
    line, broken_line, _ = BROKEN["forward of GPTModel"]
    program = folder / "story_llm.py"
    program.write_text(PROGRAM.read_text(encoding="utf-8").replace(line, broken_line), encoding="utf-8")
    done = run_program(folder, "generate", "--prompt", PROMPT, program=program)
    assert done.returncode == 1 and done.stderr.startswith("Traceback (most recent call last):\n")
    assert broken_line in done.stderr and done.stderr.endswith("NameError: name 'y' is not defined\n")


# a bug anywhere

class Mistake(Exception):
    pass


@pytest.mark.parametrize("bug", [
    KeyError("no such key"), ValueError("too many values"), OSError(2, "No such file"), PermissionError(13, "denied"),
    ImportError("cannot import name"), ModuleNotFoundError("No module named 'numpyy'", name="numpyy"),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    RuntimeError("CUDA error: an illegal memory access was encountered"), RecursionError(), Mistake()],
    ids=lambda bug: f"{type(bug).__name__}-{str(bug)[:10]}")
def test_an_exception_that_is_not_a_users_mistake_keeps_its_traceback(folder, capsys, monkeypatch, bug):
    def command(args):
        raise bug
    monkeypatch.setitem(story_llm.COMMANDS, "words", (command, *COMMANDS["words"][1:]))
    with pytest.raises(type(bug)) as raised:
        story_llm.main(["words"])
    assert raised.value is bug and capsys.readouterr() == ("", "")


def test_a_story_error_is_a_value_error_that_is_printed_in_one_line(call, monkeypatch):
    def command(args):
        raise StoryError("the river is too wide: build a bridge")
    assert issubclass(StoryError, ValueError)
    monkeypatch.setitem(story_llm.COMMANDS, "words", (command, *COMMANDS["words"][1:]))
    assert call("words") == (1, "", "error: the river is too wide: build a bridge\n")


# what every command reads (test_step02_text.py and test_step11_files.py have all that can be wrong with the files)

def test_a_text_that_is_missing_or_not_a_text_is_one_line_in_every_command(folder, call, small):
    (folder / "latin.txt").write_bytes("Once there was a café.".encode("latin-1"))
    for command in ("words", "bpe", "windows", "model", "evaluate", "train"):
        for options, *words in ((["missing.txt"], "missing.txt"), (["my.txt", "missing.txt"], "missing.txt"),
                                (["latin.txt"], "latin.txt", "UTF-8", "byte 0xe9", "--encoding cp1252"),
                                (["latin.txt", "--encoding", "utf-9"], "utf-9", "cp1252")):
            result = call(*small(command, "--text", *options))
            assert_one_line(result, *words)
            assert result[1] == ""
    assert not (folder / "story_llm.pt").exists()


def test_a_model_that_is_missing_or_damaged_is_one_line_in_every_command(folder, trained_here, call, recwarn):
    content = (folder / "story_llm.pt").read_bytes()
    (folder / "half.pt").write_bytes(content[:len(content) // 2])
    torch.save({"format": story_llm.FORMAT - 1}, "older.pt")
    (folder / "folder.pt").mkdir()
    before = sorted(os.listdir())
    new_plot = ["--plot", "new.png"]
    for command in (["generate", "--prompt", PROMPT], ["next"], ["evaluate"], ["plot", *new_plot],
                    ["attention", *new_plot], ["train", "--resume", *new_plot]):
        for model, word in (("missing.pt", "train one"), ("half.pt", ""), ("older.pt", "version"), ("my.txt", ""),
                            ("folder.pt", "folder")):
            result = call(*command, "--model", model)
            assert_one_line(result, model, word)
            assert result[1] == ""
    assert sorted(os.listdir()) == before and not list(recwarn)     # a warning would be a second line


def test_an_empty_prompt_is_one_line(folder, trained_here, call, small):
    for command in (["generate"], ["next"], ["attention"], small("generate"), small("next")):
        assert_one_line(call(*command, "--prompt", ""), "prompt", "empty")


# files that cannot be written

@pytest.mark.parametrize("option, path", [
    ("--model", "nowhere/story.pt"), ("--plot", "nowhere/loss.png"), ("--model", "."), ("--model", "my.txt/story.pt"),
    ("--plot", "loss.txt"), ("--plot", "loss"), ("--model", "x" * 300 + ".pt"), ("--plot", "x" * 300 + ".png")],
    ids=lambda value: value[:20])
def test_a_path_that_cannot_be_written_is_one_line_before_the_training(folder, call, small, option, path):
    status, out, err = call(*small("train", option, path))
    assert_one_line((status, out, err), path if path != "." else "folder")
    if len(path) < 300:     # only the system knows that a name is too long
        assert out == "" and os.listdir() == ["my.txt"]


def test_a_folder_in_which_nothing_may_be_written_is_one_line_before_the_training(folder, trained_here, call, small):
    (folder / "locked").mkdir(mode=0o500)
    if os.access("locked", os.W_OK):
        pytest.skip("this user may write everywhere")
    for command in (small("train", "--model", "locked/story.pt"), small("train", "--plot", "locked/loss.png"),
                    ["plot", "--plot", "locked/loss.png"], ["attention", "--plot", "locked/loss.png"]):
        result = call(*command)
        assert_one_line(result, "locked", "cannot be written")
        assert result[1] == ""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows lets only few users make links")
def test_a_link_to_itself_causes_no_traceback(folder, call, small):
    os.symlink("loop.pt", "loop.pt")
    assert_one_line(call("generate", "--model", "loop.pt"), "loop.pt")
    assert "Traceback" not in call(*small("train", "--model", "loop.pt"))[2]


def test_a_full_disk_while_drawing_is_one_line(folder, trained_here, call):
    """No file can grow beyond 8 kB, so writing more fails as on a full disk."""
    resource = pytest.importorskip("resource")      # not on Windows
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, limits[1]))
    try:
        for picture in ("curve.png", "curve.svg", "curve.pdf"):
            assert_one_line(call("plot", "--plot", picture), picture, "could not be written")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# the machine

def test_a_device_that_does_not_exist_is_one_line_in_every_command(folder, call, small):
    for command in ("train", "model", "evaluate", "generate", "next"):
        assert_one_line(call(*small(command), "--device", "abacus"), "abacus", "device", "cpu")


@pytest.mark.parametrize("error", [
    MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to "
                 "allocate 68719476736 bytes."), RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)")],
    ids=["Python", "CUDA", "CPU", "MPS"])
def test_too_little_memory_is_one_line(folder, call, small, monkeypatch, error):
    def fail(config, seed):
        raise error
    monkeypatch.setattr(story_llm, "new_model", fail)
    assert_one_line(call(*small("train")), "memory", "--batch-size")


def test_a_loss_that_becomes_nan_is_one_line_and_replaces_no_model(folder, trained_here, call, small):
    before = (folder / "story_llm.pt").read_bytes()
    (folder / "other.txt").write_text(TEXT.replace("boat", "raft"))
    status, out, err = call(*small("train", "--text", "other.txt", "--learning-rate", "1e8"))
    assert_one_line((status, out, err.splitlines(keepends=True)[-1]), "--learning-rate")
    assert "nan" in err.lower() or "inf" in err
    assert (folder / "story_llm.pt").read_bytes() == before


# packages that are not installed

def without(monkeypatch, package):
    """Import as on a machine that has no such package."""
    class Missing:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name.split(".")[0] == package:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Missing, *sys.meta_path])


def test_without_matplotlib_drawing_and_training_are_one_line_that_tells_how_to_install_it(
        folder, trained_here, call, small, monkeypatch):
    without(monkeypatch, "matplotlib")
    for command in (["plot"], ["attention"], small("train")):
        result = call(*command)
        assert_one_line(result, "matplotlib is not installed", "pip install")
        assert result[1] == ""      # nothing has been trained for nothing
    assert call("generate", "--prompt", PROMPT, "--max-new-tokens", "1")[::2] == (0, "")


def test_without_tiktoken_byte_pairs_are_one_line_and_words_still_work(folder, trained_on_bytes, call, small,
                                                                       monkeypatch):
    without(monkeypatch, "tiktoken")
    story_llm.load_gpt2_encoding.cache_clear()
    for tokenizer in ("story", "gpt2", "auto"):
        assert_one_line(call(*small("bpe", "--tokenizer", tokenizer)), "tiktoken is not installed", "pip install")
    assert_one_line(call("generate", "--model", trained_on_bytes, "--prompt", PROMPT), "tiktoken is not installed")
    assert call(*small("train"))[::2] == (0, "") and call("words", "--text", STORY)[::2] == (0, "")
    assert call("generate", "--prompt", PROMPT, "--max-new-tokens", "1")[::2] == (0, "")


RUNNER = """if True:
    import runpy, sys
    how, program, version, *missing = sys.argv[1:]
    if version:
        sys.version_info, sys.version = tuple(map(int, version.split("."))), version + " (main)"

    class Missing:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name.split(".")[0] in missing:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    sys.meta_path.insert(0, Missing)
    sys.argv = [program, "words"]
    runpy.run_path(program, run_name="__main__" if how == "run" else "story_llm")"""


@pytest.fixture
def start_without(tmp_path):
    """start_without(how, version, missing) runs or imports the program in such a Python: (status, stdout, stderr)."""
    (tmp_path / "torch").mkdir()                # takes long to import, and is not needed here
    (tmp_path / "torch" / "__init__.py").write_text("nn = None")

    def start(how, version="", *missing):
        done = subprocess.run([sys.executable, "-c", RUNNER, how, PROGRAM, version, *missing], capture_output=True,
                              text=True, env={**os.environ, "PYTHONPATH": str(tmp_path)})
        return done.returncode, done.stdout, done.stderr
    return start


@pytest.mark.parametrize("package", ["torch", "regex"])
def test_without_a_package_that_everything_needs_the_program_says_so_and_an_import_fails_as_usual(start_without,
                                                                                                  package):
    status, out, err = start_without("run", "", package)
    assert (status, out, err.count("\n")) == (1, "", 1) and "pip install -r requirements.txt" in err
    assert err.startswith(f"error: the package {package} is not installed in this Python")
    status, out, err = start_without("import", "", package)
    assert (status, out) == (1, "") and err.startswith("Traceback")
    assert err.splitlines()[-1] == f"ModuleNotFoundError: No module named '{package}'"


def test_an_old_python_is_told_so_in_one_line(start_without):
    status, out, err = start_without("run", "3.10.9")
    assert (status, out, err.count("\n")) == (1, "", 1) and err.startswith("error: ")
    assert "Python 3.11 or later" in err and "3.10.9" in err
