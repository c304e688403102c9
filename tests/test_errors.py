"""Errors: a user's mistake is one line that names the remedy; a bug, in particular in a model that the reader has
edited, keeps its traceback."""
import os
import subprocess
import sys

import pytest
import torch
from helpers import PROGRAM, STORY, TEXT, story_llm, tiny

from story_llm import COMMANDS, StoryError, load_checkpoint, load_text, save_checkpoint

PROMPT = "The old ferryman tied his"


def assert_one_line(result, *words):
    """Status 1, and one line on stderr that begins with "error: " and contains the words."""
    status, out, err = result
    assert status == 1 and err.startswith("error: ") and err.count("\n") == 1, err
    assert "error" not in out and not [word for word in words if str(word) not in err], err


# a model that the reader has broken

BROKEN = {      # {where: (the line, what the reader made of it, what the traceback names)}
    "split_heads": ("        B, T, _ = x.shape\n", "        B, T = x.shape\n",
                    ["in split_heads", "    B, T = x.shape\n", "ValueError: too many values to unpack"]),
    "FeedForward": ("        return self.project(F.gelu(self.expand(x), ", "        return self.project(F.gelu(self.expand(x).mT, ",
                    ["in forward", "    return self.project(F.gelu(self.expand(x).mT, ", "RuntimeError: "]),
    "GPTModel.forward": ("        return self.out_head(self.final_norm(x)) ",
                         "        return self.out_head(self.final_norm(y)) ",
                         ["in forward", "    return self.out_head(self.final_norm(y)) ",
                          "NameError: name 'y' is not defined"])}


@pytest.mark.parametrize("where", BROKEN)
def test_whoever_breaks_the_model_sees_in_every_command_the_line_that_fails(folder, trained_here, small, where):
    """`generate` reads a checkpoint that the intact program has saved."""
    line, broken_line, named = BROKEN[where]
    source = PROGRAM.read_text(encoding="utf-8")
    assert source.count(line) == 1
    (folder / "story_llm.py").write_text(source.replace(line, broken_line), encoding="utf-8")
    commands = [small("model"), small("train", "--model", "new.pt"), ["generate", "--prompt", PROMPT]]
    processes = [subprocess.Popen([sys.executable, "story_llm.py", *command], cwd=folder, stdout=subprocess.PIPE,
                                  stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"},
                                  encoding="utf-8") for command in commands]
    for command, process in zip(commands, processes):
        _, err = process.communicate(timeout=100)
        assert process.returncode == 1 and err.startswith("Traceback (most recent call last):\n"), (command, err)
        assert f'File "{folder / "story_llm.py"}", line ' in err and "error: " not in err.splitlines()[0]
        assert not [words for words in named if words not in err], (command, err)
    assert not (folder / "new.pt").exists()


def test_a_changed_model_that_works_is_told_from_the_saved_one(folder, trained_here, call, monkeypatch):
    """Other names, other shapes, or the same shapes and another result."""
    make_linear = story_llm.make_linear
    with monkeypatch.context() as patch:
        patch.setattr(story_llm, "make_norm", lambda config: torch.nn.RMSNorm(config.emb_dim))
        assert_one_line(call("generate", "--prompt", PROMPT), "story_llm.pt", "version", "train")
    with monkeypatch.context() as patch:
        patch.setattr(story_llm, "make_linear", lambda n, m, *rest, **options: make_linear(
            n, m + 2 if m == 4 * n else m, *rest, **options))
        assert_one_line(call("generate", "--prompt", PROMPT), "story_llm.pt", "version", "train")
    with monkeypatch.context() as patch:
        patch.setattr(story_llm.F, "gelu", lambda x, approximate: torch.relu(x))
        assert_one_line(call("generate", "--prompt", PROMPT), "story_llm.pt", "version", "train")


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


def test_from_python_a_mistake_is_a_story_error(folder):
    for wrong in (lambda: load_text("missing.txt"), lambda: load_checkpoint("missing.pt"),
                  lambda: load_checkpoint("my.txt"),
                  lambda: story_llm.GPTConfig(emb_dim=0), lambda: story_llm.choose_device("abacus"),
                  lambda: story_llm.make_tokenizer("bytes", TEXT),
                  lambda: next(story_llm.generate_text(tiny()[0].model, tiny()[0].tokenizer, "", 3))):
        with pytest.raises(StoryError):
            wrong()


# the text

@pytest.mark.parametrize("command", ["words", "bpe", "windows", "model", "evaluate", "train"])
def test_a_text_that_is_missing_or_not_a_text_is_one_line(folder, call, small, command):
    contents = {"empty.txt": b"", "blank.txt": b" \n\t\n", "latin.txt": "Once there was a café.".encode("latin-1"),
                "letter.docx": b"PK\x03\x04" + bytes(100), "zeros.txt": bytes(100), "picture.gif": b"GIF89a\1\0\1\0;"}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    (folder / "folder").mkdir()
    for text, *words in (("missing.txt",), ("folder", "folder"), ("nowhere/my.txt",), ("empty.txt",), ("blank.txt",),
                         ("latin.txt", "UTF-8", "byte 0xe9", "--encoding cp1252"), ("letter.docx", "zip"),
                         ("zeros.txt", "not plain text"), ("picture.gif", "not plain text")):
        result = call(*small(command, "--text", text))
        assert_one_line(result, *(["empty"] if text in ("empty.txt", "blank.txt") else [text]), *words)
        assert result[1] == ""
    assert_one_line(call(*small(command, "--text", "latin.txt", "--encoding", "utf-9")), "utf-9", "cp1252")
    assert_one_line(call(*small(command, "--text", "my.txt", "missing.txt")), "missing.txt")
    assert not (folder / "story_llm.pt").exists()


# the model

@pytest.mark.parametrize("command", [["generate", "--prompt", PROMPT], ["next"], ["evaluate"], ["plot"], ["attention"],
                                     ["train", "--resume"]])
def test_a_model_that_is_missing_damaged_or_something_else_is_one_line(folder, trained_here, call, recwarn, command):
    content = (folder / "story_llm.pt").read_bytes()
    (folder / "half.pt").write_bytes(content[:len(content) // 2])
    (folder / "bit.pt").write_bytes(content[:2000] + bytes([content[2000] ^ 1]) + content[2001:])
    (folder / "empty.pt").write_bytes(b"")
    torch.save(torch.zeros(3), "tensor.pt")
    torch.save({"format": story_llm.FORMAT - 1}, "older.pt")
    torch.save({"format": torch.tensor([1, 2])}, "odd.pt")
    torch.save({"format": story_llm.FORMAT}, "hollow.pt")
    (folder / "folder.pt").mkdir()
    before = sorted(os.listdir())
    for model, word in (("missing.pt", "train one"), ("half.pt", ""), ("bit.pt", "checksum"), ("empty.pt", ""),
                        ("my.txt", ""), ("loss.png", ""), ("tensor.pt", ""), ("older.pt", "version"), ("odd.pt", ""),
                        ("hollow.pt", ""), ("folder.pt", "folder")):
        result = call(*command, "--model", model, *(["--plot", "new.png"] if command != ["evaluate"] and command[0] in
                                                    ("plot", "attention", "train") else []))
        assert_one_line(result, model, word)
        assert result[1] == ""
    assert sorted(os.listdir()) == before and not list(recwarn)     # a warning would be a second line


# prompts

@pytest.mark.parametrize("command", [["generate"], ["next"], ["attention"], ["generate", "--untrained"],
                                     ["next", "--untrained"]])
def test_an_empty_prompt_is_one_line(folder, trained_here, call, small, command):
    words = small(command[0]) if "--untrained" in command else command
    assert_one_line(call(*words, "--prompt", ""), "prompt", "empty")


# files that cannot be written

@pytest.mark.parametrize("option, path", [
    ("--model", "nowhere/story.pt"), ("--plot", "nowhere/loss.png"), ("--model", "."), ("--model", "my.txt/story.pt"),
    ("--plot", "loss.txt"), ("--plot", "loss")])
def test_a_path_that_cannot_be_written_is_one_line_before_the_training(folder, call, small, option, path):
    result = call(*small("train", option, path))
    assert_one_line(result, path if path != "." else "folder")
    assert result[1] == "" and os.listdir() == ["my.txt"]


@pytest.mark.parametrize("option, path", [("--model", "x" * 300 + ".pt"), ("--plot", "x" * 300 + ".png")])
def test_a_name_that_is_too_long_for_the_system_is_one_line(folder, call, small, option, path):
    status, _, err = call(*small("train", option, path))
    assert (status, err.count("\n")) == (1, 1) and err.startswith("error: ") and path in err


def test_a_folder_in_which_nothing_may_be_written_is_one_line_before_the_training(folder, trained_here, call, small):
    (folder / "locked").mkdir(mode=0o500)
    if os.access("locked", os.W_OK):
        pytest.skip("this user may write everywhere")
    for command in (small("train", "--model", "locked/story.pt"), small("train", "--plot", "locked/loss.png"),
                    ["plot", "--plot", "locked/loss.png"], ["attention", "--plot", "locked/loss.png"]):
        result = call(*command)
        assert_one_line(result, "locked", "cannot be written")
        assert result[1] == ""


@pytest.mark.parametrize("options", [["--model", "same.png", "--plot", "same.png"], ["--model", "./my.txt"]])
def test_one_file_for_two_purposes_is_refused_before_the_training(folder, call, small, options):
    """Otherwise the picture or the model would replace what was written there before it."""
    result = call(*small("train", *options))
    assert_one_line(result, "two things")
    assert result[1] == "" and os.listdir() == ["my.txt"] and (folder / "my.txt").read_text() == TEXT


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_or_a_device_is_neither_read_nor_replaced_by_a_model(folder, call, small):
    os.mkfifo("pipe.pt")
    other_end = os.open("pipe.pt", os.O_RDWR | os.O_NONBLOCK)     # so that whoever opens it does not wait forever
    for command in (small("train"), ["generate"], ["plot"], ["train", "--resume"]):
        assert_one_line(call(*command, "--model", "pipe.pt"), "pipe.pt")
    os.close(other_end)
    assert sorted(os.listdir()) == ["my.txt", "pipe.pt"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows lets only few users make links")
def test_a_link_to_itself_causes_no_traceback(folder, call, small):
    os.symlink("loop.pt", "loop.pt")
    assert_one_line(call("generate", "--model", "loop.pt"), "loop.pt")
    assert "Traceback" not in call(*small("train", "--model", "loop.pt"))[2]


@pytest.fixture
def full_disk():
    """Until the end of the test no file can grow beyond 8 kB, so writing more fails as on a full disk."""
    resource = pytest.importorskip("resource")      # not on Windows
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_while_training_is_one_line_and_keeps_what_was_there(folder, trained_here, call, full_disk):
    before = (folder / "story_llm.pt").read_bytes()
    status, out, err = call("train", "--resume", "--epochs", "6")
    *notes, error = err.splitlines(keepends=True)
    assert_one_line((status, "", error), "story_llm.pt", "could not be written")
    assert all(note.startswith("note: ") for note in notes)
    assert "enforce fail" not in err        # which is torch's way to say so
    assert (folder / "story_llm.pt").read_bytes() == before
    assert not [name for name in os.listdir() if name.endswith(".tmp")]


@pytest.mark.parametrize("picture", ["curve.png", "curve.svg", "curve.pdf"])
def test_a_full_disk_while_drawing_is_one_line(folder, trained_here, call, full_disk, picture):
    assert_one_line(call("plot", "--plot", picture), picture, "could not be written")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), PermissionError(13, "Permission denied")])
def test_whatever_keeps_a_checkpoint_from_being_written_is_a_story_error(folder, trained_here, monkeypatch, error):
    run, before = load_checkpoint("story_llm.pt"), (folder / "story_llm.pt").read_bytes()

    def save(contents, file):
        raise error
    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(StoryError, match="could not be written"):
        save_checkpoint("story_llm.pt", run)
    assert (folder / "story_llm.pt").read_bytes() == before


# the machine

@pytest.mark.parametrize("command", ["train", "model", "evaluate", "generate", "next"])
def test_a_device_that_does_not_exist_is_one_line(folder, call, small, monkeypatch, command):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.mps, "is_available", lambda: False, raising=False)
    for device in ("abacus", "cuda", "mps", "cuda:99", ""):
        assert_one_line(call(*small(command), "--device", device), device, "device", "cpu")


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


@pytest.mark.parametrize("command", [["plot"], ["attention"]])
def test_without_matplotlib_drawing_is_one_line_that_tells_how_to_install_it(folder, trained_here, call, monkeypatch,
                                                                             command):
    without(monkeypatch, "matplotlib")
    assert_one_line(call(*command), "matplotlib is not installed", "pip install")
    assert call("generate", "--prompt", PROMPT, "--max-new-tokens", "1")[::2] == (0, "")


def test_without_matplotlib_training_says_so_before_it_begins_or_saves_the_model(folder, call, small, monkeypatch):
    without(monkeypatch, "matplotlib")
    result = call(*small("train"))
    assert_one_line(result, "matplotlib is not installed")
    assert result[1] == "" or load_checkpoint("story_llm.pt").step == 12


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


@pytest.mark.parametrize("version", ["3.10.9", "3.8.20"])
def test_an_old_python_is_told_so_in_one_line(start_without, version):
    status, out, err = start_without("run", version)
    assert (status, out, err.count("\n")) == (1, "", 1) and err.startswith("error: ")
    assert "Python 3.11 or later" in err and version in err
