"""The fixtures that more than one test file uses."""
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import tiktoken
from filelock import FileLock

sys.path.insert(0, str(Path(__file__).parent))
from helpers import GPT2_FILES, PROGRAM, TEXT, bare_environment, printed_in, story_llm, trained  # noqa: E402


@pytest.fixture(scope="session")
def knows_text():
    """A run that recites TEXT. Several tests share it, so they must not change it."""
    return trained(emb_dim=64, epochs=80, eval_every=1000, val_fraction=0.0, batch_size=16)


@pytest.fixture(scope="session")
def gpt2():
    """GPT-2's own encoding, if its files are on this machine. They are never downloaded."""
    cache = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR"))
    cache = Path(cache or Path(tempfile.gettempdir(), "data-gym-cache"))
    for name in GPT2_FILES:
        if not (cache / name).is_file():
            pytest.skip(f"GPT-2's encoding is not on this machine: {cache} has no file {name}; set TIKTOKEN_CACHE_DIR")
    story_llm.load_gpt2_encoding.cache_clear()
    return story_llm.load_gpt2_encoding()


@pytest.fixture
def bare(tmp_path_factory, monkeypatch):
    """This process, without GPT-2's files and without a network. Returns the empty cache folder."""
    cache = tmp_path_factory.mktemp("cache")
    for name, value in bare_environment(cache).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delitem(tiktoken.registry.ENCODINGS, "gpt2", raising=False)
    for cached in (story_llm.load_gpt2_encoding, story_llm.note_once):
        cached.cache_clear()
    yield cache
    story_llm.load_gpt2_encoding.cache_clear()


# The command line, in this process or in one of its own, and folders to work in.

@pytest.fixture(scope="session")
def run_program():
    """run_program(folder, *arguments, **environment): the program in a process of its own, to its end."""
    def run(folder, *arguments, program=PROGRAM, **environment):
        return subprocess.run([sys.executable, program, *arguments], cwd=folder, capture_output=True, encoding="utf-8",
                              env={**os.environ, "PYTHONUTF8": "1", **environment})
    return run


@pytest.fixture(scope="session")
def trained_with_defaults(gpt2, run_program, tmp_path_factory, worker_id):
    """(The folder, what was printed) of `train` without any option, if GPT-2's files are on this machine. The processes
    that share the tests also share this folder, so no test may change it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "trained_with_defaults"
    with FileLock(f"{folder}.lock"):
        if not (folder / "printed.txt").exists():
            folder.mkdir()
            done = run_program(folder, "train")
            assert (done.returncode, done.stderr) == (0, "")
            (folder / "printed.txt").write_text(done.stdout, encoding="utf-8")
    return folder, (folder / "printed.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def small():
    """small("train", ...) returns that command with those settings of a tiny model that are among its options, and with
    further options. (The option --text can be given several times, so one among these takes the place of my.txt.)"""
    settings = {"text": "my.txt", "tokenizer": "word", "context_length": 12, "emb_dim": 32, "n_heads": 2, "n_layers": 1,
                "batch_size": 8, "epochs": 4, "eval_every": 5, "precision": "fp32"}

    def arguments(command, *more):
        _, _, options = story_llm.COMMANDS[command]
        untrained = ("untrained",) if "untrained" in options else ()
        known = (*options, *story_llm.NEW_MODEL) if untrained else options
        known = (*known, "precision") if command == "evaluate" else known
        words = [word for name, value in settings.items() if name in known and not (name == "text" and "--text" in more)
                 for word in (story_llm.option_string(name), str(value))]
        return [command, *map(story_llm.option_string, untrained), *words, *more]
    return arguments


@pytest.fixture
def folder(tmp_path, monkeypatch, bare):
    """A folder to work in, with a story, without a network and without GPT-2's files."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path


@pytest.fixture
def handlers_are_restored():
    """A signal that the program does not handle must not end the tests, and every test ends with the handlers with
    which it began. Also where signals were ignored, as after nohup and in the background; processes inherit that."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    now = {number: signal.signal(number, handler) for number, handler in before.items()}
    assert set(now.values()) == {signal.default_int_handler}


@pytest.fixture
def quick_pictures(monkeypatch):
    """The loss curves at the end of a training are drawn for real in other tests."""
    monkeypatch.setattr(story_llm, "plot_losses", lambda history, size, path: Path(path).write_text("a picture"))


@pytest.fixture
def call(capsys):
    """call(*arguments) runs the program in this process: (exit status, stdout, stderr)."""
    def run(*arguments):
        capsys.readouterr()
        status = story_llm.main([str(argument) for argument in arguments])
        return status, *capsys.readouterr()
    return run


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory, small):
    """(The folder, what was printed) of the training of a tiny model."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "my.txt").write_text(TEXT, encoding="utf-8")
    return folder, printed_in(folder, small("train"))


@pytest.fixture
def trained_here(folder, trained_once):
    """`folder` after that training. Returns what it printed."""
    shutil.copytree(trained_once[0], folder, dirs_exist_ok=True)
    return trained_once[1]


@pytest.fixture(scope="session")
def trained_on_bytes(tmp_path_factory, small):
    """The path of a model with a learned byte-pair tokenizer."""
    folder = tmp_path_factory.mktemp("bytes")
    (folder / "my.txt").write_text(TEXT, encoding="utf-8")
    files = ["--text", str(folder / "my.txt"), "--model", str(folder / "b.pt"), "--plot", str(folder / "b.png")]
    assert story_llm.main(small("train", "--tokenizer", "story", "--vocab-size", "300", "--epochs", "1", *files)) == 0
    return folder / "b.pt"
