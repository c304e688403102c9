"""Step 11: the file of a run: what is saved is loaded, nothing is lost when saving fails, nothing bad is believed."""
import copy
import errno
import hashlib
import io
import json
import math
import os
import pickle
import random
import re
import shutil
import struct
import subprocess
import sys
import threading
import time
import zipfile
from collections import OrderedDict
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings, strategies as st
from helpers import PROGRAM, ROOT, TEXT, bare_environment, story_llm, tiny, trained, weights_equal
from story_llm import (FORMAT, encode_corpus, generate_text, generate_text_simple, keep_other_model, load_checkpoint,
                       measure_recall, optimizer_state, plot_losses, save_checkpoint, train)

POSIX = os.name == "posix"
UNFIT = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")       # what ends a line or steers a terminal


def same(a, b):
    """Equality of nested plain values and tensors."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


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


def write_signed(path, content):
    """Content with the checksum that belongs to it: what somebody who means harm would write."""
    path.write_bytes(content + hashlib.sha256(content).digest())


def read_state(path):
    return torch.load(io.BytesIO(path.read_bytes()[:-32]), weights_only=True)


def write_state(path, state):
    content = io.BytesIO()
    torch.save(state, content)
    write_signed(path, content.getvalue())


def check_refusal(error, path):
    """A refusal is one line, not a long one, that says which file, and that a terminal can show."""
    message = str(error)
    assert str(path) in message and len(message) < 1000 + len(str(path)) and not UNFIT.search(message), repr(message)


def refusal(path, kind=ValueError):
    """The text of the error that loading raises."""
    with pytest.raises(kind) as caught:
        load_checkpoint(path)
    check_refusal(caught.value, path)
    return str(caught.value)


# the way there and back

KINDS = [{"tokenizer": "word"}, {"tokenizer": "story", "precision": "bf16"}, {"position": "rotary"},
         {"position": "sinusoidal", "drop_rate": 0.2}, {"tie_weights": True, "qkv_bias": True},
         {"val_fraction": 0.0, "openings": 0.0, "seed": (1 << 63) - 1}, {"max_steps": 1, "n_layers": 3},
         {"text": "漢字 é\u0301 😀\u200d👩 \"“„ \x1c <|endoftext|> \n\n one two. " * 9}]


def assert_comes_back(run, path):
    save_checkpoint(path, run)
    loaded = load_checkpoint(path)
    assert weights_equal(loaded.model, run.model) and not loaded.model.training
    assert loaded.config == run.config and loaded.tokenizer.kind == run.tokenizer.kind
    assert loaded.tokenizer.tokens == run.tokenizer.tokens
    assert loaded.tokenizer.encode(TEXT) == run.tokenizer.encode(TEXT)
    for f in fields(run):
        if f.name not in ("model", "tokenizer", "loss", "optimizer", "optimizer_state"):
            assert same(getattr(loaded, f.name), getattr(run, f.name)), f.name
    assert same(optimizer_state(loaded), optimizer_state(run))
    token_ids = torch.arange(2 * run.config.context_length).view(2, -1) % run.config.vocab_size
    assert torch.equal(loaded.model(token_ids), run.model(token_ids))
    assert [p.requires_grad for p in loaded.model.parameters()] == [p.requires_grad for p in run.model.parameters()]
    assert story_llm.count_parameters(loaded.model) == story_llm.count_parameters(run.model)
    save_checkpoint(path.with_name("again.pt"), loaded)
    assert same(read_state(path.with_name("again.pt")), read_state(path))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: str(kind)[:40])
def test_all_that_is_saved_is_loaded(tmp_path, kind):
    run = trained(**{"max_steps": 4, "eval_every": 3, **kind})
    run.asked = {"epochs": 4, "learning_rate": 0.5, "qkv_bias": True, "tokenizer": "word"}
    assert_comes_back(run, tmp_path / "model.pt")


@pytest.mark.parametrize("kind", [{}, {"tie_weights": True}, {"position": "sinusoidal", "tokenizer": "story"}], ids=str)
def test_an_untrained_run_comes_back_too(tmp_path, kind):
    run, _ = tiny(**kind)
    run.model.eval()
    assert_comes_back(run, tmp_path / "model.pt")


def test_a_run_with_gpt2s_tokens_comes_back(tmp_path, gpt2):
    run = trained(tokenizer="gpt2", max_steps=1)
    assert_comes_back(run, tmp_path / "model.pt")
    ids = [gpt2.decode_single_token_bytes(i) for i in gpt2.encode_ordinary(TEXT)]
    loaded = load_checkpoint(tmp_path / "model.pt").tokenizer
    assert [loaded.tokens[i] for i in loaded.encode(TEXT)] == ids


def test_a_run_can_be_saved_in_the_middle_of_a_training_with_dropout(tmp_path):
    """While the model is in its training mode, which stays as it is."""
    def save(run):
        was = run.model.training
        save_checkpoint(tmp_path / "model.pt", run)
        assert run.model.training == was
        assert weights_equal(load_checkpoint(tmp_path / "model.pt").model, run.model)

    run = trained(drop_rate=0.5, max_steps=3, after_step=save)
    assert load_checkpoint(tmp_path / "model.pt").step == run.step == 3


def test_only_the_checkpoint_is_left_in_the_folder(tmp_path):
    for _ in range(2):
        save_checkpoint(tmp_path / "model.pt", tiny()[0])
    assert os.listdir(tmp_path) == ["model.pt"]


def test_a_path_may_be_a_string_or_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_checkpoint("model.pt", tiny()[0])
    assert load_checkpoint("model.pt").step == 0 and load_checkpoint(str(tmp_path / "model.pt")).step == 0


def test_what_was_loaded_works_as_others_rely_on(saved):
    run = load_checkpoint(saved[0], device="cpu")
    ids = run.tokenizer.encode("The old ferryman")
    assert run.model(torch.tensor([ids, ids])).shape == (2, len(ids), run.tokenizer.vocab_size)
    assert generate_text_simple(run.model, torch.tensor([ids]), 3, run.config.context_length).shape == (1, len(ids) + 3)
    assert isinstance(run.tokenizer.decode(ids), str)
    assert isinstance(measure_recall(run.model, run.tokenizer, TEXT), float)


def test_generating_from_the_file_needs_nothing_but_the_program_and_the_file(saved, tmp_path):
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


# many at once

def test_threads_that_save_to_one_path_never_leave_a_damaged_or_missing_file(tmp_path):
    path, runs, errors = tmp_path / "model.pt", [tiny(seed=seed)[0] for seed in (1, 2)], []
    for run in runs:
        run.step = run.train_config.seed
    save_checkpoint(path, runs[0])

    def save_often(run):
        try:
            for _ in range(12):
                save_checkpoint(path, run)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=save_often, args=[run]) for run in runs]
    for thread in threads:
        thread.start()
    while POSIX and any(thread.is_alive() for thread in threads):      # Windows replaces no file that is being read
        assert load_checkpoint(path).step in (1, 2)
    for thread in threads:
        thread.join()
    last = load_checkpoint(path)
    assert not errors and os.listdir(tmp_path) == ["model.pt"]
    assert weights_equal(last.model, runs[last.step - 1].model)


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
        for _ in range(20):
            story_llm.save_checkpoint("model.pt", run)"""
    processes = [subprocess.Popen([sys.executable, "-c", code, f"{run.step}.pt"], cwd=tmp_path, stderr=subprocess.PIPE,
                                  env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}) for run in runs]
    while not all((tmp_path / f"{run.step}.pt-ready").exists() for run in runs):
        assert all(process.poll() is None for process in processes)
        time.sleep(0.05)
    (tmp_path / "go").touch()
    while POSIX and any(process.poll() is None for process in processes):
        assert load_checkpoint(path).step in (1, 2)
        time.sleep(0.01)
    assert [(process.communicate(timeout=60)[1], process.returncode) for process in processes] == [(b"", 0)] * 2
    last = load_checkpoint(path)
    assert weights_equal(last.model, runs[last.step - 1].model)
    assert sorted(os.listdir(tmp_path)) == ["1.pt", "1.pt-ready", "2.pt", "2.pt-ready", "go", "model.pt"]


# what is left of a process that was killed

def put(path, hours_old):
    path.write_bytes(b"half a model")
    os.utime(path, (time.time() - 3600 * hours_old,) * 2)
    return path


def test_old_orphans_of_this_path_are_cleared_and_nothing_else(tmp_path):
    old = put(tmp_path / "model.pt.123-abc.tmp", 1.1)
    stay = [put(tmp_path / name, hours) for name, hours in (
        ("model.pt.456.tmp", 0.9), ("model.pt.789.tmp", 0), ("other.pt.1.tmp", 9), ("model.pt.old", 9),
        ("xmodel.pt.1.tmp", 9), ("model.pt2.1.tmp", 9))]
    save_checkpoint(tmp_path / "model.pt", tiny()[0])
    assert not old.exists() and all(path.read_bytes() == b"half a model" for path in stay)
    assert len(os.listdir(tmp_path)) == len(stay) + 1


def test_orphans_are_those_of_this_name_whatever_characters_are_in_it(tmp_path):
    old, other = put(tmp_path / "model[1].pt.1.tmp", 2), put(tmp_path / "model1.pt.1.tmp", 2)
    save_checkpoint(tmp_path / "model[1].pt", tiny()[0])
    assert other.exists() and not old.exists()


def test_an_orphan_that_cannot_be_cleared_does_not_matter(tmp_path):
    (tmp_path / "model.pt.folder.tmp").mkdir()
    os.utime(tmp_path / "model.pt.folder.tmp", (0, 0))
    save_checkpoint(tmp_path / "model.pt", tiny()[0])
    assert load_checkpoint(tmp_path / "model.pt").step == 0 and (tmp_path / "model.pt.folder.tmp").is_dir()


# links

@pytest.mark.parametrize("there", [True, False], ids=["to a file", "to a file that is not there yet"])
def test_a_symbolic_link_is_followed_and_stays_a_link(tmp_path, there):
    (tmp_path / "disk").mkdir()
    link, target = tmp_path / "model.pt", tmp_path / "disk" / "real.pt"
    try:
        link.symlink_to(os.path.join("disk", "real.pt"))
    except OSError:
        pytest.skip("this system lets us make no links")
    if there:
        target.write_bytes(b"old")
    run = tiny()[0]
    save_checkpoint(link, run)
    assert link.is_symlink() and not target.is_symlink()
    assert all(weights_equal(load_checkpoint(path).model, run.model) for path in (target, link))
    assert os.listdir(tmp_path / "disk") == ["real.pt"] and sorted(os.listdir(tmp_path)) == ["disk", "model.pt"]


# saving that fails

def assert_untouched(path, saved):
    assert os.listdir(path.parent) == ["model.pt"] and path.read_bytes() == saved[0].read_bytes()


def test_a_full_disk_leaves_the_old_file_and_no_litter(saved, copied):
    """A real limit on the size of files, wherever in the file it is met: in tensors, at the end, in the checksum."""
    pytest.importorskip("resource")          # Windows has none
    size = copied.stat().st_size
    code = """if True:
        import os, resource, sys, story_llm
        run = story_llm.load_checkpoint("model.pt")
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        for limit in map(int, sys.argv[1:]):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            try:
                story_llm.save_checkpoint("model.pt", run)
            except OSError as error:
                assert "model.pt" in str(error) and "\\n" not in str(error), error
            else:
                sys.exit(f"{limit} bytes were enough")
            assert os.listdir() == ["model.pt"], os.listdir()"""
    limits = [0, 100, 20_000, size // 2, size - 100, size - 33, size - 32, size - 1]
    done = subprocess.run([sys.executable, "-c", code, *map(str, limits)], env={**os.environ, "PYTHONPATH": str(ROOT)},
                          cwd=copied.parent, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert_untouched(copied, saved)


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr)
def test_what_breaks_off_at_the_last_moment_leaves_the_old_file(saved, copied, monkeypatch, function, error):
    def fail(*arguments):
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(os, function, fail)
        with pytest.raises(type(error)) as caught:
            save_checkpoint(copied, saved[1])
    assert type(error) is KeyboardInterrupt or "No space" in str(caught.value)
    assert_untouched(copied, saved)


def test_a_folder_that_is_not_there_and_a_folder_as_path_are_an_os_error(saved, tmp_path):
    for path in (tmp_path / "nowhere" / "model.pt", tmp_path):
        with pytest.raises(OSError) as caught:
            save_checkpoint(path, saved[1])
        check_refusal(caught.value, path)
    assert os.listdir(tmp_path) == []


def test_weights_that_are_no_numbers_do_not_take_the_place_of_good_ones(saved, copied):
    run = load_checkpoint(copied)
    with torch.no_grad():
        run.model.tok_emb.weight.fill_(math.nan)
    with pytest.raises((ValueError, OSError)):
        save_checkpoint(copied, run)
    assert_untouched(copied, saved)


# files that are not what they should be

def test_a_missing_file_is_an_os_error_that_says_what_to_do(tmp_path):
    assert "train" in refusal(tmp_path / "model.pt", OSError)


def test_a_folder_is_refused(tmp_path):
    refusal(tmp_path, (ValueError, OSError))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes in its folders")
def test_a_pipe_is_refused_and_nobody_waits_for_it(tmp_path):
    path, errors = tmp_path / "pipe", []
    os.mkfifo(path)

    def load():
        try:
            load_checkpoint(path)
        except (ValueError, OSError) as error:
            errors.append(error)

    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    thread.join(10)
    waits = thread.is_alive()
    if waits:                       # let it go
        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
        thread.join()
    assert not waits and len(errors) == 1


def test_an_empty_file_a_picture_a_text_and_a_zip_file_are_refused(tmp_path):
    path, packed = tmp_path / "model.pt", io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("data.pkl", b"0" * 1000)
    picture = b"\x89PNG\r\n\x1a\n" + bytes(500)
    for content in (b"", b"x", picture, TEXT.encode() * 9, packed.getvalue(), bytes(32), bytes(33)):
        path.write_bytes(content)
        refusal(path)
        write_signed(path, content)
        refusal(path)


def test_a_file_cut_short_anywhere_is_refused_and_one_that_goes_on(saved, tmp_path):
    content, path, places = saved[0].read_bytes(), tmp_path / "model.pt", random.Random(0)
    size = len(content)
    for length in [0, 1, 31, 32, 33, size - 33, size - 32, size - 1, *places.sample(range(size), 150)]:
        path.write_bytes(content[:length])
        assert "damaged" in refusal(path)
    path.write_bytes(content + b"\0")
    assert "damaged" in refusal(path)


def test_a_file_with_any_bit_changed_is_refused(saved, tmp_path):
    content, path, places = saved[0].read_bytes(), tmp_path / "model.pt", random.Random(1)
    for place in [0, len(content) - 32, len(content) - 1, *places.sample(range(len(content)), 200)]:
        damaged = bytearray(content)
        damaged[place] ^= 1 << places.randrange(8)
        path.write_bytes(damaged)
        assert "damaged" in refusal(path)


def test_what_torch_saves_is_no_file_of_ours(saved, tmp_path):
    torch.save(saved[1].model.state_dict(), tmp_path / "model.pt")
    refusal(tmp_path / "model.pt")
    write_signed(tmp_path / "model.pt", (tmp_path / "model.pt").read_bytes())
    refusal(tmp_path / "model.pt")


def test_a_device_that_is_not_there_is_not_blamed_on_the_file(saved):
    with pytest.raises(ValueError, match="abacus") as caught:
        load_checkpoint(saved[0], device="abacus")
    assert "damaged" not in str(caught.value)


@pytest.mark.parametrize("number", [FORMAT - 1, FORMAT + 1, 1, 12345])
def test_the_format_of_an_older_or_newer_program_is_named(saved, tmp_path, number):
    state = read_state(saved[0])
    write_state(tmp_path / "model.pt", {**state, "format": number})
    assert re.search(rf"\b{number}\b.*\b{FORMAT}\b", refusal(tmp_path / "model.pt"))
    write_state(tmp_path / "model.pt", {"format": number})      # what else was in it, we cannot know
    assert re.search(rf"\b{number}\b.*\b{FORMAT}\b", refusal(tmp_path / "model.pt"))


@pytest.mark.parametrize("kind", ["untrained", "trained", "untrained, of the usual size"])
def test_a_file_of_a_changed_program_is_refused_in_words_that_say_so(kind, tmp_path, monkeypatch):
    if kind.endswith("size"):
        corpus = story_llm.corpus_from_text(TEXT, "word")
        run = story_llm.new_run(corpus)
    else:
        run = trained() if kind == "trained" else tiny()[0]
    save_checkpoint(tmp_path / "model.pt", run)
    with monkeypatch.context() as patched:
        patched.setattr(torch.nn.functional, "gelu", lambda x, approximate: torch.nn.functional.silu(x))
        message = refusal(tmp_path / "model.pt")
        assert "version" in message and "program" in message and "damaged" not in message
    assert weights_equal(load_checkpoint(tmp_path / "model.pt").model, run.model)


# files that are whole and mean harm

def test_a_signed_file_is_read_so_that_the_next_tests_test_what_they_say(saved, tmp_path):
    write_state(tmp_path / "model.pt", read_state(saved[0]))
    assert weights_equal(load_checkpoint(tmp_path / "model.pt").model, saved[1].model)


def change(*path, **to):
    """A function that updates the dictionary at that path of a state."""
    def function(state):
        for key in path:
            state = state[key]
        state.update(to)
    return function


def remember(**to):
    return change("optimizer_state", "out_head.weight", **to)


def weight(**to):
    return lambda state: state["weights"].update({"out_head.weight": to["value"]})


SHAPE = (85, 32)        # of out_head.weight
WRONG = {
    "no format": lambda state: state.pop("format"),
    "no config": lambda state: state.pop("config"),
    "one entry too many": lambda state: state.update(more=1),
    "terabytes": change("config", emb_dim=1 << 30),
    "more than fits an integer": change("config", emb_dim=10**30),
    "endless layers": change("config", n_layers=10**9),
    "many layers": change("config", n_layers=1000),
    "another vocabulary": change("config", vocab_size=7),
    "an endless context": change("config", context_length=10**12),
    "a context that is not in the weights": change("config", context_length=13),
    "an unknown setting": change("config", new_setting=1),
    "config of another type": lambda state: state.update(config=[1, 2]),
    "a wrong setting": change("train_config", batch_size=-1),
    "a setting that is no number": change("train_config", learning_rate=math.nan),
    "no weights": lambda state: state.update(weights=None),
    "wrong shape": weight(value=torch.zeros(3, 3)),
    "text as weights": weight(value="text"),
    "integers as weights": weight(value=torch.zeros(SHAPE, dtype=torch.long)),
    "weights that are no numbers": weight(value=torch.full(SHAPE, math.nan)),
    "a weight is missing": lambda state: state["weights"].popitem(),
    "a weight too many": lambda state: state["weights"].update(more=torch.zeros(3)),
    "step is text": lambda state: state.update(step="many"),
    "step is negative": lambda state: state.update(step=-1),
    "step is beyond counting": lambda state: state.update(step=10**600),
    "no history": lambda state: state.update(history=None),
    "empty entries in the history": lambda state: state.update(history=[{"step": 0}]),
    "a loss of text": lambda state: state["history"][0].update(train_loss="low"),
    "a loss that is no number": lambda state: state["history"][0].update(val_loss=math.nan),
    "epochs of no steps": lambda state: state.update(steps_per_epoch=0),
    "a number among the tokens": lambda state: state["tokenizer"]["tokens"].__setitem__(3, 5),
    "bytes among the tokens": lambda state: state["tokenizer"]["tokens"].__setitem__(3, b"bytes"),
    "a token twice": lambda state: state["tokenizer"]["tokens"].__setitem__(3, state["tokenizer"]["tokens"][4]),
    "a token less": lambda state: state["tokenizer"]["tokens"].pop(3),
    "a token more": lambda state: state["tokenizer"]["tokens"].insert(3, "more"),
    "no end of text among the words": lambda state: state["tokenizer"]["tokens"].__setitem__(-2, "end"),
    "no unknown word among the words": lambda state: state["tokenizer"]["tokens"].__setitem__(-1, "unknown"),
    "no tokenizer that we know": change("tokenizer", kind="letters"),
    "memory of an unknown weight": change("optimizer_state", more={}),
    "memory of another shape": remember(exp_avg=torch.zeros(2, 2)),
    "memory without a shape": remember(exp_avg=torch.zeros(())),
    "a step for each number": remember(step=torch.zeros(SHAPE)),
    "memory that is no number": remember(exp_avg_sq=torch.full(SHAPE, math.nan)),
    "memory that lacks something": lambda state: state["optimizer_state"]["out_head.weight"].pop("exp_avg"),
    "memory that is text": remember(exp_avg="text"),
    "memory of whole numbers": remember(exp_avg=torch.zeros(SHAPE, dtype=torch.int32)),
    "nobody can have asked that": lambda state: state.update(asked={"epochs": [1]}),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_signed_file_with_wrong_contents_is_refused(saved, tmp_path, wrong):
    state = read_state(saved[0])
    WRONG[wrong](state)
    write_state(tmp_path / "model.pt", state)
    refusal(tmp_path / "model.pt")


def test_byte_pairs_that_lack_a_byte_are_refused(tmp_path):
    save_checkpoint(tmp_path / "model.pt", tiny(tokenizer="story")[0])
    state = read_state(tmp_path / "model.pt")
    state["tokenizer"]["tokens"][200] = "no byte"
    write_state(tmp_path / "model.pt", state)
    refusal(tmp_path / "model.pt")


def assert_usable(run, corpus):
    """A run that was loaded can do all that a run is for; a ValueError is an answer, too."""
    for name, p in run.model.named_parameters():        # torch's fused optimizer believes these without looking
        assert p.is_contiguous() and p.isfinite().all()
        for what, tensor in run.optimizer_state.get(name, {}).items():
            assert tensor.shape == (() if what == "step" else p.shape) and tensor.dtype == torch.float32
    ids = torch.arange(run.config.context_length)[None] % run.config.vocab_size
    assert run.model(ids).isfinite().all()
    run.tokenizer.decode(list(range(run.tokenizer.vocab_size)))
    assert repr(run) and run.config and run.train_config
    for action in (lambda: "".join(generate_text(run.model, run.tokenizer, run.prompt, 8)),
                   lambda: plot_losses(run.history, run.config.vocab_size), lambda: train_a_little(run, corpus)):
        try:
            action()
        except ValueError as error:
            assert len(str(error).splitlines()) == 1
    assert all(type(token) is type(run.tokenizer.tokens[0]) for token in run.tokenizer.tokens)


def train_a_little(run, corpus):
    if run.train_config.batch_size <= 64 and run.total_steps < 10_000:         # not what would only take long
        corpus = encode_corpus(run.tokenizer, corpus.train_text, corpus.train_text)
        run.history = [replace(evaluation, step=-1) for evaluation in run.history]
        end = run.step + 2
        train(run, corpus, lambda run: run.step >= end)


@pytest.fixture(scope="module")
def smallest(tmp_path_factory):
    """A function that gives (the state in the file of a run as small as can be, its corpus); it is half trained, and
    of most weights it remembers nothing, for a smaller file is faster."""
    path = tmp_path_factory.mktemp("smallest") / "model.pt"
    run, corpus = tiny("Once there was a king. He went up the river for nine days.", context_length=4, emb_dim=8,
                       batch_size=4, eval_every=1000, max_steps=6)
    train(run, corpus, lambda run: run.step == 3)
    run.asked = {"epochs": 3}
    save_checkpoint(path, run)
    state = read_state(path)
    state["optimizer_state"] = {name: state["optimizer_state"][name] for name in ("out_head.weight", "final_norm.bias")}
    return lambda: (fresh(state), corpus)


def fresh(node):
    """A copy of dictionaries and lists; what is in them is shared."""
    if isinstance(node, dict):
        return {key: fresh(value) for key, value in node.items()}
    return [fresh(value) for value in node] if isinstance(node, list) else node


odd_numbers = st.sampled_from([0, -1, 1, 2, 7, 1 << 31, 1 << 53, 1 << 63, -(1 << 63), 10**18, 10**300, 0.5, -0.0,
                               1e-320, 1e308, -1e308, math.inf, -math.inf, math.nan])
odd_texts = st.one_of(st.text(max_size=9), st.sampled_from(
    ["\ud800", "\x1b[2J\n\x07", "a\nb", "x" * 5000, "word", "gpt2", "auto", "rotary", "bf16", "epochs", ""]))
shapes = st.sampled_from([(), (0,), (1,), (8,), (4, 8), (8, 8), (8, 32), (32, 8), (32,), (16, 8), (2, 3, 4)])
dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool,
                          torch.complex64])
tensors = st.builds(lambda shape, number, dtype: torch.full(shape, number, dtype=dtype), shapes,
                    st.sampled_from([0, 1, 3]), dtypes)
stretched = st.builds(torch.zeros(1).expand, st.sampled_from([(1000, 1000), (8, 8), (16, 8), (8, 32)]))
plain = st.one_of(st.none(), st.booleans(), odd_numbers, st.integers(), st.floats(), odd_texts, st.binary(max_size=9))
anything = st.one_of(plain, tensors, stretched, st.just(OrderedDict()), st.recursive(
    plain, lambda inner: st.one_of(st.lists(inner, max_size=3), st.lists(inner, max_size=3).map(tuple),
                                   st.dictionaries(odd_texts, inner, max_size=3),
                                   st.dictionaries(odd_texts, inner, max_size=3).map(OrderedDict)), max_leaves=5))


def nested(depth, kind):
    value = kind()
    for _ in range(depth):
        value = [value] if kind is list else (value,) if kind is tuple else {"": value}
    return value


ALIKE = [       # tensors that are like another one, but for something
    lambda t: t * math.nan, lambda t: t - 1e30, lambda t: t * 0 - 1, lambda t: t * 2, torch.zeros_like, torch.ones_like,
    lambda t: t.double(), lambda t: t.bfloat16(), lambda t: t.reshape(-1), lambda t: t.mT if t.dim() > 1 else t,
    lambda t: t[..., None], lambda t: t.sum(), lambda t: t.tolist(), lambda t: t.clone().requires_grad_(),
    lambda t: torch.zeros(()).expand(t.shape), lambda t: t[:1].expand(t.shape) if t.dim() else t, torch.nn.Parameter,
    lambda t: t.to_sparse() if t.dim() else t, lambda t: torch.zeros(t.shape, device="meta")]


def tamper(data, state):
    """Change one thing anywhere in the state: another value, a value less, one more, or a tensor of the right shape."""
    parent, node = None, state
    while isinstance(node, (dict, list)) and node and (parent is None or data.draw(st.integers(0, 3))):
        parent = node
        key = data.draw(st.sampled_from(list(node) if isinstance(node, dict) else range(len(node))))
        node = node[key]
    how = data.draw(st.sampled_from(["other", "other", "less", "more", "alike", "alike", "alike", "nested", "kind"]))
    if how == "less":
        del parent[key]
    elif how == "more" and isinstance(node, dict):
        node[data.draw(odd_texts)] = data.draw(anything)
    elif how == "more" and isinstance(node, list):
        node.insert(data.draw(st.integers(0, len(node))), data.draw(anything))
    elif how == "nested":
        parent[key] = nested(data.draw(st.sampled_from([1, 5, 90])), data.draw(st.sampled_from([list, tuple, dict])))
    elif how == "kind" and type(node) is dict:
        parent[key] = OrderedDict(node)
    elif how == "alike" and isinstance(node, torch.Tensor):
        parent[key] = data.draw(st.sampled_from(ALIKE))(node)
    elif how == "alike" and type(node) in (int, float, str):
        parent[key] = data.draw(odd_texts if type(node) is str else odd_numbers)
    else:
        parent[key] = data.draw(anything)


def load_or_refuse(path, state, corpus):
    write_state(path, state)
    try:
        run = load_checkpoint(path)
    except ValueError as error:
        check_refusal(error, path)
    else:
        assert_usable(run, corpus)


@settings(max_examples=300)
@given(data=st.data())
def test_a_signed_file_with_anything_in_it_is_a_usable_run_or_refused_in_one_line(smallest, tmp_path_factory, data):
    state, corpus = smallest()
    for _ in range(data.draw(st.sampled_from([1, 1, 1, 2]))):
        tamper(data, state)
    load_or_refuse(tmp_path_factory.getbasetemp() / "tampered.pt", state, corpus)


def test_the_unchanged_state_of_that_test_is_usable(smallest, tmp_path):
    state, corpus = smallest()
    write_state(tmp_path / "model.pt", state)
    run = load_checkpoint(tmp_path / "model.pt")
    assert_usable(run, corpus)
    assert run.step == 5


@pytest.mark.parametrize("where", ["weights", "config", "optimizer_state", "asked", "train_config"])
def test_dictionaries_of_another_kind_and_what_hangs_on_them_change_nothing(smallest, tmp_path, where):
    """load_state_dict listens to a `_metadata` that an OrderedDict may bring along."""
    state, corpus = smallest()
    state[where] = OrderedDict(state[where])
    state[where]._metadata = OrderedDict({name: {"assign_to_params_buffers": True} for name in
                                          ("", "out_head", "tok_emb", "final_norm")})
    load_or_refuse(tmp_path / "model.pt", state, corpus)
    if where == "weights":
        state["weights"]["out_head.weight"] = torch.zeros(1).expand(state["weights"]["out_head.weight"].shape)
        state["fixed_loss"] = math.log(state["config"]["vocab_size"])           # which is then the loss
        load_or_refuse(tmp_path / "model.pt", state, corpus)


# what would take memory, run code or crash: each read in a process of its own, whose memory is measured

HERE = "here@@stands@@the@@harm"


def text_in_a_pickle(text):
    return b"X" + struct.pack("<I", len(text)) + text.encode()


def with_pickle(state, path, harm, rename=lambda name: name, before=(), replaced=()):
    """Write the state with `harm`, operations of a pickle, in place of the text HERE."""
    content, harmful = io.BytesIO(), io.BytesIO()
    torch.save(state, content)
    with zipfile.ZipFile(content) as good, zipfile.ZipFile(harmful, "w") as bad:
        for name, data in before:
            bad.writestr(name, data)
        for name in good.namelist():
            data = good.read(name)
            if name.endswith("data.pkl"):
                assert data.count(text_in_a_pickle(HERE)) == 1
                data = data.replace(text_in_a_pickle(HERE), harm)
            bad.writestr(rename(name), data)
    write_signed(path, harmful.getvalue())


def doubled(depth):
    """A list that is small, but each of whose ten parts is the next such list: to write it down takes 10**depth."""
    value = []
    for _ in range(depth):
        value = [value] * 10
    return value


class RunsCode:
    def __reduce__(self):
        return os.mkdir, ("evil",)


GIGABYTE = b"c%s\nbytearray\n(J" + struct.pack("<i", 10**9) + b"tR"
DEEP = 100_000


def harmful_files(folder, state):
    """Write them; returns their names."""
    files = []

    def new(name):
        files.append(name)
        return folder / name

    def changed(name, function):
        other = copy.deepcopy(state)
        function(other)
        write_state(new(name), other)

    pickled = {**state, "prompt": HERE}
    for module in (b"builtins", b"__builtin__"):
        with_pickle(pickled, new(f"a bytearray of {module.decode()}"), GIGABYTE % module)
    harmless = [("archive/xdata.pkl", pickle.dumps(None, protocol=2))]
    with_pickle(pickled, new("a bytearray behind a harmless pickle"), GIGABYTE % b"builtins", before=harmless)
    with_pickle(pickled, new("a bytearray in capital letters"), GIGABYTE % b"builtins", before=harmless,
                rename=lambda name: name.replace("data.pkl", "DATA.PKL"))
    with_pickle(pickled, new("a bytearray in another folder"), GIGABYTE % b"builtins", rename=lambda name: "x/" + name)
    with_pickle(pickled, new("code"), b"cos\nmkdir\n(X\x04\0\0\0eviltR")
    with_pickle(pickled, new("code by a name on the stack"), b"X\x02\0\0\0osX\x05\0\0\0mkdir\x93(X\x04\0\0\0eviltR")
    with_pickle(pickled, new("code by INST"), b"(X\x04\0\0\0evilios\nmkdir\n")
    with_pickle(pickled, new("names that steer a terminal"), b"cos\x1b[2J\nmkdir\n)R")
    changed("code of torch.save", lambda state: state.update(history=RunsCode()))
    with_pickle(pickled, new("a deep list"), b"]" * DEEP + b"a" * (DEEP - 1))
    tokens = [*state["tokenizer"]["tokens"][:-3], HERE, *state["tokenizer"]["tokens"][-2:]]
    with_pickle({**state, "tokenizer": {"kind": "word", "tokens": tokens}}, new("a deep tuple as a token"),
                b")" + b"\x85" * DEEP)
    with_pickle({**state, "format": HERE}, new("a deep list as the format"), b"]" * DEEP + b"a" * (DEEP - 1))
    changed("a format that is long to tell", lambda state: state.update(format=doubled(7)))
    changed("a setting that is long to tell", lambda state: state["config"].update(emb_dim=doubled(7)))
    changed("a choice that is long to tell", lambda state: state["train_config"].update(precision=doubled(7)))
    changed("an option that is long to tell", lambda state: state.update(asked={"epochs": doubled(7)}))
    wide = torch.zeros(1).expand(20_000, 20_000)
    changed("wide weights", lambda state: state["weights"].update({"out_head.weight": wide}))
    changed("wide memory", lambda state: state["optimizer_state"]["out_head.weight"].update(exp_avg=wide))
    changed("a long context", lambda state: state["config"].update(context_length=(1 << 20) - 1))
    changed("a long context, fixed", lambda state: state["config"].update(context_length=(1 << 20) - 1,
                                                                         position="sinusoidal"))
    changed("a large vocabulary", lambda state: state["config"].update(vocab_size=(1 << 24) - 1))
    changed("a wide model", lambda state: state["config"].update(emb_dim=(1 << 16) - 2))
    changed("many layers", lambda state: state["config"].update(n_layers=(1 << 10) - 1))
    content = io.BytesIO()
    torch.save(state, content)
    packed = io.BytesIO()
    with zipfile.ZipFile(content) as good, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as bomb:
        for name in good.namelist():
            bomb.writestr(name, bytes(10**8) if name.endswith("data/0") else good.read(name))
    write_signed(new("a zip bomb"), packed.getvalue())
    return files


HARMFUL = """if True:
    import json, os, resource, sys, story_llm
    story_llm.load_checkpoint(sys.argv[1])      # what torch sets up once, before it is measured
    unit = 1 if sys.platform == "darwin" else 1024
    for name in sys.argv[2:]:
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            try:
                story_llm.load_checkpoint(name)
                kind, message = "loaded", ""
            except BaseException as error:
                kind, message = type(error).__name__, str(error)
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit
            print(json.dumps([name, kind, message[:2000], grown]), flush=True)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        if status != 0:
            print(json.dumps([name, "crashed", str(status), 0]), flush=True)"""


def test_files_that_would_run_code_take_memory_or_crash_are_refused_before_they_do(saved, tmp_path):
    pytest.importorskip("resource")
    folder = tmp_path / "files"
    folder.mkdir()
    names = harmful_files(folder, read_state(saved[0]))
    done = subprocess.run([sys.executable, "-c", HARMFUL, saved[0], *names], cwd=folder, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, timeout=300)
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [result[0] for result in results] == names
    bad = []
    for name, kind, message, grown in results:
        fine = kind == "ValueError" and name in message and len(message) < 1000 and not UNFIT.search(message)
        if not fine or grown > 60e6:
            bad.append(f"{name}: {kind}, {message[:100]!r}, {grown / 1e6:.0f} MB more")
    assert not bad, "\n".join(bad)
    assert sorted(os.listdir(folder)) == sorted(names)       # no folder "evil"


# models of other texts

OTHER = "A sparrow sat on a wall. It sang of rain all day long."


def test_a_model_of_another_text_is_moved_out_of_the_way(saved, copied):
    run, _ = tiny(OTHER)
    assert keep_other_model(copied, run) == copied.with_name("model.old.pt").resolve()
    assert os.listdir(copied.parent) == ["model.old.pt"]
    assert weights_equal(load_checkpoint(copied.with_name("model.old.pt")).model, saved[1].model)


def test_a_model_of_the_same_text_stays(saved, copied):
    run, _ = tiny(n_layers=2, epochs=9)
    assert keep_other_model(copied, run) is None
    assert_untouched(copied, saved)


@pytest.mark.parametrize("content", [b"", b"my thesis", bytes(1000)], ids=repr)
def test_a_file_that_is_no_checkpoint_is_kept_too(tmp_path, content):
    (tmp_path / "model.pt").write_bytes(content)
    assert keep_other_model(tmp_path / "model.pt", tiny()[0]) == (tmp_path / "model.old.pt").resolve()
    assert (tmp_path / "model.old.pt").read_bytes() == content


def test_where_there_is_nothing_nothing_is_moved(tmp_path):
    assert keep_other_model(tmp_path / "model.pt", tiny()[0]) is None and os.listdir(tmp_path) == []


def test_a_model_behind_a_link_is_kept_beside_itself(saved, tmp_path):
    (tmp_path / "disk").mkdir()
    shutil.copy(saved[0], tmp_path / "disk" / "real.pt")
    try:
        (tmp_path / "model.pt").symlink_to(tmp_path / "disk" / "real.pt")
    except OSError:
        pytest.skip("this system lets us make no links")
    run, _ = tiny(OTHER)
    assert keep_other_model(tmp_path / "model.pt", run) == (tmp_path / "disk" / "real.old.pt").resolve()
    save_checkpoint(tmp_path / "model.pt", run)
    assert (tmp_path / "model.pt").is_symlink()
    assert weights_equal(load_checkpoint(tmp_path / "model.pt").model, run.model)
    assert weights_equal(load_checkpoint(tmp_path / "disk" / "real.old.pt").model, saved[1].model)
