"""Step 11: checkpoint files. What is saved is loaded, a failed save loses nothing, and no file can do harm."""
import errno
import io
import json
import math
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import time
import zipfile
from dataclasses import asdict, fields

import pytest
import torch
from hypothesis import given, strategies as st

from helpers import (KINDS, PROGRAM, ROOT, TEXT, bare_environment, same, story_llm, tiny, train_to, trained,
                     weights_equal)
from story_llm import (FORMAT, StoryError, generate_text, generate_text_simple, keep_previous_model, load_checkpoint,
                       measure_recall, optimizer_state, save_checkpoint)

POSIX = os.name == "posix"
NOT_PRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")      # line ends, and what controls a terminal


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(path, the trained run that was saved there)"""
    path = tmp_path_factory.mktemp("saved") / "model.pt"
    run = trained()
    save_checkpoint(path, run)
    return path, run


@pytest.fixture
def copied(saved, tmp_path):
    """The path of a copy of that file, alone in its folder."""
    return shutil.copy(saved[0], tmp_path / "model.pt")


@pytest.fixture(scope="module")
def small_file(tmp_path_factory):
    """The bytes of a checkpoint that is as small as possible."""
    path = tmp_path_factory.mktemp("small") / "model.pt"
    run, corpus = tiny("Once there was a king. He went up the river for nine days.", context_length=4, emb_dim=8,
                       n_heads=1, batch_size=4, max_steps=6)
    train_to(run, corpus, 3)
    save_checkpoint(path, run)
    return path.read_bytes()


def read(path):
    return torch.load(path, weights_only=True)


def assert_one_line_about(path, error):
    """A message is one line that is not too long, names the file, and can be shown in a terminal."""
    message = str(error)
    assert str(path) in message and len(message) < 600 + len(str(path)), repr(message)
    assert not NOT_PRINTABLE.search(message), repr(message)


def refusal(path):
    """The message of the StoryError with which a file is refused."""
    with pytest.raises(StoryError) as caught:
        load_checkpoint(path)
    assert_one_line_about(path, caught.value)
    return str(caught.value)


# saving and loading

def assert_comes_back(run, path):
    save_checkpoint(path, run)
    loaded = load_checkpoint(path)
    assert weights_equal(loaded.model, run.model) and not loaded.model.training
    assert loaded.config == run.config and loaded.tokenizer.kind == run.tokenizer.kind
    assert loaded.tokenizer.tokens == run.tokenizer.tokens
    assert loaded.tokenizer.encode(TEXT) == run.tokenizer.encode(TEXT)
    for f in fields(run):       # a new field is compared as well
        if f.name not in ("model", "tokenizer", "loss", "optimizer", "saved_optimizer"):
            assert same(getattr(loaded, f.name), getattr(run, f.name)), f.name
    assert same(optimizer_state(loaded), optimizer_state(run))
    token_ids = torch.arange(2 * run.config.context_length).view(2, -1) % run.config.vocab_size
    assert torch.equal(loaded.model(token_ids), run.model(token_ids))
    assert [p.requires_grad for p in loaded.model.parameters()] == [p.requires_grad for p in run.model.parameters()]
    save_checkpoint(path.with_name("again.pt"), loaded)
    assert same(read(path.with_name("again.pt")), read(path))


@pytest.mark.parametrize("kind", [
    {"tokenizer": "word"}, {"tokenizer": "story", "precision": "bf16"}, {"position": "rotary"},
    {"position": "sinusoidal", "drop_rate": 0.2}, {"tie_weights": True, "qkv_bias": True},
    {"optimizer": "muon", "gelu": "tanh"}, {"val_fraction": 0.0, "prompt_windows": 0.0, "seed": (1 << 32) - 1},
    {"max_steps": 1, "n_layers": 3},
    {"text": "漢字 é\u0301 😀\u200d👩 \"“„ \x1c <|endoftext|> \n\n one two. " * 9}], ids=lambda kind: str(kind)[:40])
def test_everything_that_is_saved_is_loaded(tmp_path, kind):
    run = trained(**{"max_steps": 4, "eval_every": 3, **kind})
    run.prompt, run.text_paths, run.encoding = "Some other prompt", ["somewhere/else.txt", "-"], "cp1252"
    assert_comes_back(run, tmp_path / "model.pt")


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_an_untrained_model_of_any_kind_comes_back(tmp_path, kind):
    assert_comes_back(tiny(**kind)[0], tmp_path / "model.pt")


def test_a_run_with_gpt2s_tokens_comes_back(tmp_path, gpt2):
    run = trained(tokenizer="gpt2", max_steps=1)
    assert_comes_back(run, tmp_path / "model.pt")
    expected = [gpt2.decode_single_token_bytes(i) for i in gpt2.encode_ordinary(TEXT)]
    loaded = load_checkpoint(tmp_path / "model.pt").tokenizer
    assert [loaded.tokens[i] for i in loaded.encode(TEXT)] == expected


def test_only_the_checkpoint_is_left_in_the_folder(tmp_path):
    for _ in range(2):
        save_checkpoint(tmp_path / "model.pt", tiny()[0])
    assert os.listdir(tmp_path) == ["model.pt"]


def test_a_path_may_be_a_string_or_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_checkpoint("model.pt", tiny()[0])
    assert load_checkpoint("model.pt").step == 0 and load_checkpoint(str(tmp_path / "model.pt")).step == 0


def test_a_loaded_run_can_be_used_like_any_other(saved):
    run = load_checkpoint(saved[0], device="cpu")
    ids = run.tokenizer.encode("The old ferryman")
    assert run.model(torch.tensor([ids, ids])).shape == (2, len(ids), run.tokenizer.vocab_size)
    assert generate_text_simple(run.model, torch.tensor([ids]), 3, run.config.context_length).shape == (1, len(ids) + 3)
    assert isinstance(run.tokenizer.decode(ids), str)
    assert isinstance(measure_recall(run.model, run.tokenizer, TEXT), float)


def test_generating_needs_nothing_but_the_program_and_the_file(saved, tmp_path):
    path, run = saved
    (tmp_path / "cache").mkdir()
    (tmp_path / "here").mkdir()
    shutil.copy(PROGRAM, tmp_path / "here" / "story_llm.py")
    shutil.copy(path, tmp_path / "here" / "story_llm.pt")
    expected = "The old ferryman" + "".join(generate_text(run.model, run.tokenizer, "The old ferryman", 12)) + "\n"
    done = subprocess.run(
        [sys.executable, "story_llm.py", "generate", "--prompt", "The old ferryman", "--max-new-tokens", "12"],
        env={**os.environ, **bare_environment(tmp_path / "cache"), "PYTHONPATH": "", "PYTHONDONTWRITEBYTECODE": "1"},
        cwd=tmp_path / "here", capture_output=True, encoding="utf-8", timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, expected, "")
    assert sorted(os.listdir(tmp_path / "here")) == ["story_llm.pt", "story_llm.py"]
    assert os.listdir(tmp_path / "cache") == []


def test_a_checkpoint_is_a_plain_file_of_torch_that_needs_no_story_llm(saved):
    """A process that does not know the program loads the file with torch alone and finds plain values in it."""
    path, run = saved
    code = """if True:
        import json, sys, torch
        saved = torch.load(sys.argv[1], weights_only=True)
        assert "story_llm" not in sys.modules
        weights = {name: list(weight.shape) for name, weight in saved.pop("weights").items()}
        assert set(saved.pop("optimizer")) == {"state", "param_groups"}
        print(json.dumps({"weights": weights, **saved}))"""
    done = subprocess.run([sys.executable, "-I", "-c", code, path], capture_output=True, encoding="utf-8", timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found["weights"] == {name: list(weight.shape) for name, weight in run.model.state_dict().items()}
    assert found["config"] == asdict(run.config) and found["train_config"] == asdict(run.train_config)
    assert found["tokenizer"] == {"kind": "word", "tokens": run.tokenizer.tokens}
    assert found["history"] == [asdict(evaluation) for evaluation in run.history]
    assert (found["format"], found["step"], found["prompt"]) == (FORMAT, run.step, run.prompt)


# saving

def test_processes_that_save_to_one_path_never_leave_a_damaged_or_missing_file(tmp_path):
    path, runs = tmp_path / "model.pt", [tiny(seed=seed)[0] for seed in (1, 2)]
    for run in runs:
        run.step = run.train_config.seed
        save_checkpoint(tmp_path / f"{run.step}.pt", run)
    save_checkpoint(path, runs[0])
    code = """if True:
        import pathlib, sys, time, story_llm
        run = story_llm.load_checkpoint(sys.argv[1])
        pathlib.Path(sys.argv[1] + "-ready").touch()
        while not pathlib.Path("go").exists():
            time.sleep(0.01)
        for _ in range(10):
            story_llm.save_checkpoint("model.pt", run)"""
    processes = [subprocess.Popen([sys.executable, "-c", code, f"{run.step}.pt"], cwd=tmp_path, stderr=subprocess.PIPE,
                                  env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}) for run in runs]
    while not all((tmp_path / f"{run.step}.pt-ready").exists() for run in runs):
        assert all(process.poll() is None for process in processes)
        time.sleep(0.05)
    (tmp_path / "go").touch()
    while POSIX and any(process.poll() is None for process in processes):   # Windows replaces no file that is open
        assert load_checkpoint(path).step in (1, 2)
        time.sleep(0.01)
    assert [(process.communicate(timeout=60)[1], process.returncode) for process in processes] == [(b"", 0)] * 2
    last = load_checkpoint(path)
    assert weights_equal(last.model, runs[last.step - 1].model)
    assert sorted(os.listdir(tmp_path)) == ["1.pt", "1.pt-ready", "2.pt", "2.pt-ready", "go", "model.pt"]


@pytest.mark.parametrize("exists", [True, False], ids=["to a file", "to a file that does not exist yet"])
def test_a_symbolic_link_is_followed_and_stays_a_link(tmp_path, exists):
    (tmp_path / "disk").mkdir()
    link, target = tmp_path / "model.pt", tmp_path / "disk" / "real.pt"
    try:
        link.symlink_to(os.path.join("disk", "real.pt"))
    except OSError:
        pytest.skip("symbolic links are not allowed here")
    if exists:
        target.write_bytes(b"old")
    run = tiny()[0]
    save_checkpoint(link, run)
    assert link.is_symlink() and not target.is_symlink()
    assert all(weights_equal(load_checkpoint(path).model, run.model) for path in (target, link))
    assert os.listdir(tmp_path / "disk") == ["real.pt"] and sorted(os.listdir(tmp_path)) == ["disk", "model.pt"]


def assert_untouched(path, saved):
    assert os.listdir(path.parent) == ["model.pt"] and path.read_bytes() == saved[0].read_bytes()


def test_a_full_disk_leaves_the_old_file_and_no_temporary_file(saved, copied):
    """The process may not write files of more than so many bytes. It reaches this limit at once, in a tensor, or at the
    very end."""
    pytest.importorskip("resource")          # Windows does not have it
    size = copied.stat().st_size
    code = """if True:
        import os, resource, sys, story_llm
        run = story_llm.load_checkpoint("model.pt")
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        for limit in map(int, sys.argv[1:]):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            try:
                story_llm.save_checkpoint("model.pt", run)
            except story_llm.StoryError as error:
                assert "model.pt" in str(error) and "\\n" not in str(error), error
            else:
                sys.exit(f"{limit} bytes were enough")
            assert os.listdir() == ["model.pt"], os.listdir()"""
    limits = [0, 100, 20_000, size // 2, size - 100, size - 1]
    done = subprocess.run([sys.executable, "-c", code, *map(str, limits)], env={**os.environ, "PYTHONPATH": str(ROOT)},
                          cwd=copied.parent, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert_untouched(copied, saved)


@pytest.mark.parametrize("owner, function", [(torch, "save"), (os, "replace")], ids=["torch.save", "os.replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr)
def test_a_save_that_fails_leaves_the_old_file(saved, copied, monkeypatch, owner, function, error):
    original = getattr(owner, function)

    def fail(*arguments):
        if function == "save":              # it has written something already
            original(*arguments)
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(owner, function, fail)
        with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else StoryError) as caught:
            save_checkpoint(copied, saved[1])
    assert isinstance(error, KeyboardInterrupt) or "No space left" in str(caught.value)
    assert_untouched(copied, saved)


def test_a_folder_that_does_not_exist_and_a_folder_as_path_are_refused(saved, tmp_path):
    for path in (tmp_path / "nowhere" / "model.pt", tmp_path):
        with pytest.raises(StoryError) as caught:
            save_checkpoint(path, saved[1])
        assert_one_line_about(path, caught.value)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_model_with_nan_or_infinite_weights_does_not_replace_a_good_one(saved, copied, number):
    run = load_checkpoint(copied)
    with torch.no_grad():
        run.model.tok_emb.weight.fill_(number)
    with pytest.raises(StoryError, match="NaN"):
        save_checkpoint(copied, run)
    assert_untouched(copied, saved)


# files that are not checkpoints, or damaged

def test_a_missing_file_is_refused_with_the_remedy(tmp_path):
    assert "train" in refusal(tmp_path / "model.pt")


def test_a_folder_is_refused(tmp_path):
    refusal(tmp_path)


def zip_file(entries, compression=zipfile.ZIP_STORED):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return packed.getvalue()


NO_CHECKPOINTS = {
    "an empty file": b"", "one byte": b"x", "text": TEXT.encode() * 9, "a picture": b"\x89PNG\r\n\x1a\n" + bytes(500),
    "zeros": bytes(1000), "an empty zip file": zip_file({}), "a zip file of a text": zip_file({"a.txt": b"text"}),
    "a zip file with a pickle that is none": zip_file({"archive/data.pkl": b"0" * 1000}),
    "a zip file with a pickle": zip_file({"archive/data.pkl": pickle.dumps({"format": 5}, protocol=2)}),
    "a pickle": pickle.dumps({"format": 5})}


@pytest.mark.parametrize("kind", NO_CHECKPOINTS)
def test_a_file_of_another_kind_is_refused(kind, tmp_path):
    (tmp_path / "model.pt").write_bytes(NO_CHECKPOINTS[kind])
    refusal(tmp_path / "model.pt")


@pytest.mark.parametrize("content", [{}, [], "text", torch.zeros(3), {"weights": {}}], ids=str)
def test_another_file_of_torch_is_refused(content, saved, tmp_path):
    torch.save(content, tmp_path / "model.pt")
    assert "not a checkpoint" in refusal(tmp_path / "model.pt")
    torch.save(saved[1].model.state_dict(), tmp_path / "model.pt")
    assert "not a checkpoint" in refusal(tmp_path / "model.pt")


def test_a_file_that_was_cut_off_anywhere_is_refused(small_file, tmp_path):
    path, places = tmp_path / "model.pt", random.Random(0)
    size = len(small_file)
    for length in [1, 30, 100, size - 100, size - 23, size - 22, size - 1, *places.sample(range(size), 100)]:
        path.write_bytes(small_file[:length])
        assert "damaged" in refusal(path)


# At its end, a zip file has a directory with a record for each entry. A byte of it has MS-DOS's attributes.
DIRECTORY_ENTRY, ATTRIBUTES, FOLDER = b"PK\x01\x02", 38, 0x10


def test_a_damaged_file_is_refused_unless_the_damage_is_in_bytes_that_mean_nothing(small_file, tmp_path):
    """Of a zip file, checksums protect the contents. Between them there are bytes without a meaning, like the time when
    an entry was written. If the file is accepted, all its contents are as before."""
    path, places = tmp_path / "model.pt", random.Random(1)
    path.write_bytes(small_file)
    expected, directory = read(path), small_file.index(DIRECTORY_ENTRY)
    refused = 0
    for place in [*places.sample(range(len(small_file)), 200), *places.sample(range(directory, len(small_file)), 200)]:
        damaged = bytearray(small_file)
        damaged[place] ^= 1 << places.randrange(8)
        path.write_bytes(damaged)
        try:
            load_checkpoint(path)
        except StoryError as error:
            assert_one_line_about(path, error)
            refused += 1
        else:
            assert same(read(path), expected), place
    assert refused > 100


def test_a_file_whose_entries_are_marked_as_folders_is_refused(small_file, tmp_path):
    """Python's zipfile ignores this mark, so it finds that the checksum is right. torch does not read such an entry and
    would return what was in its memory before."""
    start = small_file.index(DIRECTORY_ENTRY, small_file.index(DIRECTORY_ENTRY) + 1)
    damaged = bytearray(small_file)
    damaged[start + ATTRIBUTES] ^= FOLDER
    (tmp_path / "model.pt").write_bytes(damaged)
    refusal(tmp_path / "model.pt")


def test_a_damaged_byte_in_any_of_the_contents_is_noticed(small_file, tmp_path):
    path, places = tmp_path / "model.pt", random.Random(2)
    path.write_bytes(small_file)
    with zipfile.ZipFile(path) as archive:
        contents = [archive.read(entry) for entry in archive.infolist() if entry.file_size > 50]
    for content in contents:
        start = small_file.index(content)
        damaged = bytearray(small_file)
        damaged[start + places.randrange(len(content))] ^= 1 << places.randrange(8)
        path.write_bytes(damaged)
        assert "checksum" in refusal(path)


def test_a_device_that_does_not_exist_is_not_blamed_on_the_file(saved):
    with pytest.raises(StoryError, match="abacus") as caught:
        load_checkpoint(saved[0], device="abacus")
    assert "damaged" not in str(caught.value)


# files of other versions

@pytest.mark.parametrize("number", [FORMAT - 1, FORMAT + 1, 1, 12345])
def test_a_file_of_an_older_or_newer_format_is_refused_with_both_numbers(saved, tmp_path, number):
    path, expected = tmp_path / "model.pt", rf"\b{number}\b.*\b{FORMAT}\b"
    torch.save({**read(saved[0]), "format": number}, path)
    message = refusal(path)
    assert re.search(expected, message) and "version" in message and "damaged" not in message
    torch.save({"format": number}, path)        # its other contents are unknown
    assert re.search(expected, refusal(path))


def test_a_file_as_the_version_before_wrote_it_is_refused_with_a_line_that_says_so(saved, tmp_path):
    """It had other entries, and a checksum after the end of torch's file."""
    content = io.BytesIO()
    torch.save({"format": 4, "config": asdict(saved[1].config), "train_config": {}, "asked": {}, "fixed_loss": 1.0,
                "optimizer_state": {}, "weights": dict(saved[1].model.state_dict())}, content)
    (tmp_path / "model.pt").write_bytes(content.getvalue() + bytes(range(32)))
    message = refusal(tmp_path / "model.pt")
    assert f"another version of story_llm (format 4, here {FORMAT})" in message


@pytest.mark.parametrize("kind", ["untrained", "trained", "with the default shape"])
def test_after_a_change_of_the_model_its_old_files_are_refused(kind, tmp_path, monkeypatch):
    if kind == "with the default shape":
        run = story_llm.new_run(story_llm.corpus_from_text(TEXT, "word"))
    else:
        run = trained() if kind == "trained" else tiny()[0]
    save_checkpoint(tmp_path / "model.pt", run)
    with monkeypatch.context() as patched:
        patched.setattr(torch.nn.functional, "gelu", lambda x, approximate: torch.nn.functional.silu(x))
        message = refusal(tmp_path / "model.pt")
        assert "another version" in message and "damaged" not in message
    assert weights_equal(load_checkpoint(tmp_path / "model.pt").model, run.model)


def test_after_a_change_of_the_forward_pass_old_files_are_refused(saved, monkeypatch):
    forward = story_llm.GPTModel.forward
    monkeypatch.setattr(story_llm.GPTModel, "forward", lambda self, ids, cache=None: 1.1 * forward(self, ids, cache))
    assert "another version" in refusal(saved[0])


def test_a_model_with_other_parts_is_refused_with_a_line_that_says_so(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(story_llm, "make_norm", lambda config: torch.nn.RMSNorm(config.emb_dim))
    message = refusal(saved[0])
    assert "version" in message and "damaged" not in message


# files that mean harm

class RunsCode:
    """Unpickled without care, this creates a folder."""
    def __reduce__(self):
        return os.system, ("mkdir evil",)


def test_no_code_in_a_file_is_run(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = read(saved[0])
    files = {"torch's format": lambda path: torch.save({**state, "prompt": RunsCode()}, path),
             "torch's old format": lambda path: torch.save({**state, "prompt": RunsCode()}, path,
                                                           _use_new_zipfile_serialization=False),
             "a pickle": lambda path: path.write_bytes(pickle.dumps(RunsCode())),
             "a whole model": lambda path: torch.save(saved[1].model, path),
             "a whole run": lambda path: torch.save(saved[1], path)}
    for name, write in files.items():
        write(tmp_path / "model.pt")
        assert "damaged or not a checkpoint" in refusal(tmp_path / "model.pt"), name
        assert os.listdir() == ["model.pt"]
    torch.save(RunsCode(), "model.pt")
    torch.load("model.pt", weights_only=False)      # a careless reader does run it
    assert "evil" in os.listdir()


def test_a_compressed_file_is_refused(saved, tmp_path):
    """Otherwise a small file could fill the memory with its contents."""
    path, state = tmp_path / "model.pt", read(saved[0])
    state["weights"] = {name: torch.zeros_like(weight) for name, weight in state["weights"].items()}
    state["test_loss"] = math.log(len(state["tokenizer"]["tokens"]))
    torch.save(state, path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    path.write_bytes(zip_file(entries))
    load_checkpoint(path)
    path.write_bytes(zip_file(entries, zipfile.ZIP_DEFLATED))
    assert "compressed" in refusal(path)


def change(*path, **to):
    """A function that updates the dictionary at that path of a saved state."""
    def function(state):
        for key in path:
            state = state[key]
        state.update(to)
    return function


def set_token(index, token):
    return lambda state: state["tokenizer"]["tokens"].__setitem__(index, token)


WRONG = {       # {what is wrong: how to make a good state wrong}
    "no format": lambda state: state.pop("format"),
    "no config": lambda state: state.pop("config"),
    "no step": lambda state: state.pop("step"),
    "no test loss": lambda state: state.pop("test_loss"),
    "no optimizer": lambda state: state.pop("optimizer"),
    "no prompt": lambda state: state.pop("prompt"),
    "no best weights": lambda state: state.pop("best_weights"),
    "best weights of another shape": change(best_weights={"out_head.weight": torch.zeros(3, 3)}),
    "best weights that are a list": change(best_weights=[1]),
    "a path that is a number": change(text_paths=[7]),
    "paths that are text": change(text_paths="story.txt"),
    "a beginning that is bytes": change(beginnings=[b"Once"]),
    "an encoding that is a number": change(encoding=8),
    "no weights": lambda state: state.update(weights=None),
    "config of another type": lambda state: state.update(config=[1, 2]),
    "an unknown setting": change("config", new_setting=1),
    "a huge setting": change("config", emb_dim=10**30),
    "another vocabulary size": change("config", vocab_size=7),
    "another context length": change("config", context_length=13),
    "another number of layers": change("config", n_layers=2),
    "a setting that is out of range": change("train_config", batch_size=-1),
    "a setting that is NaN": change("train_config", learning_rate=math.nan),
    "a weight of another shape": change("weights", **{"out_head.weight": torch.zeros(3, 3)}),
    "text in place of a weight": change("weights", **{"out_head.weight": "text"}),
    "a weight is missing": lambda state: state["weights"].popitem(),
    "a weight too many": change("weights", more=torch.zeros(3)),
    "the step is text": change(step="many"),
    "the step is negative": change(step=-1),
    "the total number of steps is text": change(total_steps="many"),
    "the test loss is text": change(test_loss="low"),
    "the prompt is a number": change(prompt=7),
    "the optimizer is a list": change(optimizer=[1]),
    "an epoch has no steps": change(steps_per_epoch=0),
    "no history": change(history=None),
    "an empty entry in the history": change(history=[{"step": 0}]),
    "a number among the tokens": set_token(3, 5),
    "bytes among the tokens": set_token(3, b"bytes"),
    "a list among the tokens": set_token(3, [5]),
    "the same token twice": lambda state: set_token(3, state["tokenizer"]["tokens"][4])(state),
    "a token is missing": lambda state: state["tokenizer"]["tokens"].pop(3),
    "a token too many": lambda state: state["tokenizer"]["tokens"].insert(3, "more"),
    "no end of text among the words": set_token(-2, "end"),
    "no unknown word among the words": set_token(-1, "unknown"),
    "an unknown kind of tokenizer": change("tokenizer", kind="letters"),
    "auto as the kind of tokenizer": change("tokenizer", kind="auto"),
    "words as byte pairs": change("tokenizer", kind="story"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_whole_file_with_wrong_contents_is_refused_in_one_line(saved, tmp_path, wrong):
    state = read(saved[0])
    WRONG[wrong](state)
    torch.save(state, tmp_path / "model.pt")
    refusal(tmp_path / "model.pt")


@pytest.mark.parametrize("change_weight", [
    lambda weight: weight.to("meta"), lambda weight: weight.to_sparse(), lambda weight: weight * math.nan],
    ids=["without numbers", "sparse", "NaN"])
def test_weights_of_another_kind_are_refused_in_one_line(saved, tmp_path, change_weight):
    state = read(saved[0])
    state["weights"]["out_head.weight"] = change_weight(state["weights"]["out_head.weight"])
    torch.save(state, tmp_path / "model.pt")
    refusal(tmp_path / "model.pt")


def test_byte_pairs_without_one_of_the_bytes_are_refused(tmp_path):
    save_checkpoint(tmp_path / "model.pt", tiny(tokenizer="story")[0])
    state = read(tmp_path / "model.pt")
    state["tokenizer"]["tokens"][200] = b"no byte"
    torch.save(state, tmp_path / "model.pt")
    refusal(tmp_path / "model.pt")


plain_values = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=9),
                         st.sampled_from(["\x1b[2J\n\x07", "x" * 5000, "\ud800", [], {}, [[]], 1 << 63, -1, 0.0]))


@given(data=st.data())
def test_whatever_is_wrong_in_the_settings_the_refusal_is_one_line(small_file, tmp_path_factory, data):
    """One value in the settings, the tokenizer or the history is replaced by any other value."""
    state = torch.load(io.BytesIO(small_file), weights_only=True)
    part = data.draw(st.sampled_from([state["config"], state["train_config"], state["tokenizer"], state["history"][0]]))
    part[data.draw(st.sampled_from(sorted(part)))] = data.draw(plain_values)
    path = tmp_path_factory.getbasetemp() / "changed.pt"
    torch.save(state, path)
    try:
        load_checkpoint(path)
    except StoryError as error:
        assert_one_line_about(path, error)


# Files that claim more memory than they have bytes. Each is read in a process of its own, whose memory is measured.

def grow(**to):
    """A function that makes a state claim a huge model. Each of its weights is stored as a single number."""
    def function(state):
        state["config"].update(to)
        with torch.device("meta"):
            model = story_llm.GPTModel(story_llm.GPTConfig(**state["config"]))
        state["weights"] = {name: torch.zeros(1).expand(weight.shape) for name, weight in model.state_dict().items()}
    return function


def share_storage(state):
    """All weights are the beginning of the same 16 MB. Together they claim 800 MB."""
    grow(emb_dim=1024, n_layers=16)(state)
    numbers = torch.zeros(max(weight.numel() for weight in state["weights"].values()))
    state["weights"] = {name: numbers[:weight.numel()].view(weight.shape) for name, weight in state["weights"].items()}


CLAIMS = {
    "wide": grow(emb_dim=(1 << 16) - 2), "rather wide": grow(emb_dim=2048), "long": grow(context_length=(1 << 20) - 1),
    "long with fixed positions": grow(context_length=(1 << 20) - 1, position="sinusoidal"),
    "deep": grow(n_layers=200, emb_dim=512), "one storage for all": share_storage,
    "without these weights": change("config", emb_dim=(1 << 16) - 2)}
READ_EACH = """if True:
    import json, os, resource, sys, story_llm
    story_llm.load_checkpoint(sys.argv[1])      # what torch sets up once is not measured
    unit = 1 if sys.platform == "darwin" else 1024
    for name in sys.argv[2:]:
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            try:
                run = story_llm.load_checkpoint(name)
                story_llm.start_optimizer(run)
                kind, message = "loaded", ""
            except BaseException as error:
                kind, message = type(error).__name__, str(error)
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit
            print(json.dumps([name, kind, message[:2000], grown]), flush=True)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        if status != 0:
            print(json.dumps([name, "crashed", str(status), 0]), flush=True)"""


def read_each(saved, folder, names):
    """[(name, kind of error, its message, bytes by which the process grew)] for each of these files."""
    done = subprocess.run([sys.executable, "-c", READ_EACH, saved[0], *names], cwd=folder, capture_output=True,
                          text=True, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, timeout=300)
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [result[0] for result in results] == names
    return results


def test_a_file_that_claims_a_huge_model_is_refused_before_it_takes_memory(saved, small_file, tmp_path):
    pytest.importorskip("resource")
    for name, function in CLAIMS.items():
        state = read(saved[0])
        function(state)
        torch.save(state, tmp_path / name)
        assert (tmp_path / name).stat().st_size < 20e6
    with zipfile.ZipFile(io.BytesIO(small_file)) as archive:
        entries = {name: bytes(10**8) if name.endswith("data/0") else archive.read(name) for name in archive.namelist()}
    (tmp_path / "zip bomb").write_bytes(zip_file(entries, zipfile.ZIP_DEFLATED))
    for name, kind, message, grown in read_each(saved, tmp_path, [*CLAIMS, "zip bomb"]):
        assert kind == "StoryError" and name in message, (name, kind, message)
        assert grown < 100e6, (name, grown)


def with_optimizer_entries(saved, folder, kinds):
    """Write files in which one entry of the optimizer state has another value; return their names."""
    names = []
    for entry in ("exp_avg", "exp_avg_sq", "step"):
        for kind, value in kinds.items():
            state = read(saved[0])
            assert state["weights"]["tok_emb.weight"].shape == (85, 32)
            state["optimizer"]["state"][0][entry] = value
            names.append(f"{entry} {kind}")
            torch.save(state, folder / names[-1])
    return names


def test_optimizer_state_that_does_not_fit_its_weights_is_refused(saved, tmp_path):
    """torch's fused AdamW believes the shapes of its state, and would read and write memory that belongs to others."""
    pytest.importorskip("resource")
    names = with_optimizer_entries(saved, tmp_path, {
        "of another shape": torch.zeros(2, 2), "of a huge shape": torch.zeros(1).expand(20_000, 20_000),
        "of one number, repeated": torch.zeros(1).expand(85, 32), "transposed": torch.zeros(32, 85).mT})
    for name, kind, message, grown in read_each(saved, tmp_path, names):
        assert kind == "StoryError" and grown < 100e6, (name, kind, message, grown)


def test_optimizer_state_of_another_kind_is_refused(saved, tmp_path):
    """torch converts a tensor to float32 before its shape can be checked, and that would take 1.6 GB here."""
    pytest.importorskip("resource")
    names = with_optimizer_entries(saved, tmp_path, {
        "as text": "text", "huge": torch.zeros(1, dtype=torch.float64).expand(20_000, 20_000)})
    for name, kind, message, grown in read_each(saved, tmp_path, names):
        assert kind == "StoryError" and grown < 100e6, (name, kind, message, grown)


# models that stood at the path before

OTHER = "A sparrow sat on a wall. It sang of rain all day long, and nobody listened to it."


def assert_kept(path, run, content):
    """The file at the path gets out of the way of this run, and is still there under its new name."""
    kept = path.with_name("model.old.pt").resolve()
    assert keep_previous_model(path, run) == kept
    assert os.listdir(path.parent) == ["model.old.pt"] and kept.read_bytes() == content


@pytest.mark.parametrize("text, changed", [
    (OTHER, {}), (TEXT + OTHER, {}), (TEXT, {"val_fraction": 0.2}), (TEXT, {"n_layers": 2}), (TEXT, {"emb_dim": 16}),
    (TEXT, {"position": "rotary"}), (TEXT, {"tokenizer": "story"}), (TEXT, {"seed": 1}), (TEXT, {"epochs": 9}),
    (TEXT, {"learning_rate": 0.01}), (TEXT, {"optimizer": "muon"})], ids=lambda value: str(value)[:30])
def test_a_model_of_another_text_shape_or_training_is_kept(text, changed, saved, copied):
    run, _ = tiny(text, **changed)
    run.step = 100
    assert_kept(copied, run, saved[0].read_bytes())


def test_a_model_with_another_tokenizer_of_the_same_size_is_kept(saved, copied):
    run, _ = tiny()
    run.tokenizer = story_llm.WordTokenizer(["other", *run.tokenizer.tokens[1:]])
    run.step = 100
    assert_kept(copied, run, saved[0].read_bytes())


def test_a_model_that_had_got_further_is_kept(saved, copied):
    run, _ = tiny()
    run.step = saved[1].step - 1
    assert_kept(copied, run, saved[0].read_bytes())


@pytest.mark.parametrize("more_steps", [0, 1])
def test_an_earlier_state_of_the_same_run_is_replaced(more_steps, saved, copied):
    run, _ = tiny()
    run.step = saved[1].step + more_steps
    assert keep_previous_model(copied, run) is None
    assert_untouched(copied, saved)


def test_a_changed_device_or_prompt_makes_no_other_run(saved, copied):
    run = load_checkpoint(copied)
    run.prompt, run.text_paths, run.history = "Another prompt", ["/elsewhere/story.txt"], []
    assert keep_previous_model(copied, run) is None
    assert_untouched(copied, saved)


@pytest.mark.parametrize("content", [b"", b"my thesis", bytes(1000)], ids=repr)
def test_a_file_that_is_no_checkpoint_is_kept(content, tmp_path):
    (tmp_path / "model.pt").write_bytes(content)
    assert_kept(tmp_path / "model.pt", tiny()[0], content)


def test_as_many_models_as_come_are_kept(saved, tmp_path):
    """No name is used twice, whether it has been given by the program or was there before."""
    run, _ = tiny(OTHER)
    (tmp_path / "model.old2.pt").write_bytes(b"mine")
    kept = []
    for content in (b"a", b"b", b"c"):
        (tmp_path / "model.pt").write_bytes(content)
        kept.append(keep_previous_model(tmp_path / "model.pt", run).name)
    assert kept == ["model.old.pt", "model.old3.pt", "model.old4.pt"]
    assert [(tmp_path / name).read_bytes() for name in kept] == [b"a", b"b", b"c"]
    assert (tmp_path / "model.old2.pt").read_bytes() == b"mine"


def test_where_there_is_no_model_nothing_is_renamed(tmp_path):
    assert keep_previous_model(tmp_path / "model.pt", tiny()[0]) is None and os.listdir(tmp_path) == []


def test_a_model_behind_a_symbolic_link_is_kept_in_its_folder(saved, tmp_path):
    (tmp_path / "disk").mkdir()
    shutil.copy(saved[0], tmp_path / "disk" / "real.pt")
    try:
        (tmp_path / "model.pt").symlink_to(tmp_path / "disk" / "real.pt")
    except OSError:
        pytest.skip("symbolic links are not allowed here")
    run, _ = tiny(OTHER)
    assert keep_previous_model(tmp_path / "model.pt", run) == (tmp_path / "disk" / "real.old.pt").resolve()
    save_checkpoint(tmp_path / "model.pt", run)
    assert (tmp_path / "model.pt").is_symlink()
    assert weights_equal(load_checkpoint(tmp_path / "model.pt").model, run.model)
    assert weights_equal(load_checkpoint(tmp_path / "disk" / "real.old.pt").model, saved[1].model)


# paths that cannot be written

def test_a_path_that_cannot_be_written_is_refused_before_the_work(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere" / "model.pt"):
        with pytest.raises(StoryError) as caught:
            story_llm.check_writable(path)
        assert_one_line_about(path, caught.value)
    with pytest.raises(StoryError, match=r"picture\.txt.*\.png"):
        story_llm.check_writable(tmp_path / "picture.txt", story_llm.PICTURES)
    for name in ("model.pt", "picture.png"):
        story_llm.check_writable(tmp_path / name, () if name == "model.pt" else story_llm.PICTURES)
    assert os.listdir(tmp_path) == []
