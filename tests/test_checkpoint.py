import dataclasses
import errno
import hashlib
import io
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import zipfile

import pytest
import torch

import story_llm
from conftest import TEXT, bare_environment, closed_port, tiny_run, trained_run, weights_equal
from story_llm import generate_text, generate_text_simple, load_checkpoint, measure_recall, save_checkpoint, train

KINDS = [{"tokenizer": "word"}, {"tokenizer": "story"}, {"position": "rotary"}, {"position": "sinusoidal"},
         {"tie_weights": True, "qkv_bias": True}]


def same(a, b):
    """Equality of nested plain values and tensors."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def quiet(line):
    pass


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(path, the trained run that was saved there)"""
    path = tmp_path_factory.mktemp("saved") / "model.pt"
    run = trained_run()
    save_checkpoint(path, run)
    return path, run


# the way there and back

@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_all_that_is_saved_is_loaded(tmp_path, kind):
    run = trained_run(**kind)
    save_checkpoint(tmp_path / "model.pt", run)
    loaded = load_checkpoint(tmp_path / "model.pt")
    assert weights_equal(loaded.model, run.model) and not loaded.model.training
    assert loaded.config == run.config and loaded.tokenizer.kind == run.tokenizer.kind
    assert loaded.tokenizer.tokens == run.tokenizer.tokens
    assert loaded.tokenizer.encode(TEXT) == run.tokenizer.encode(TEXT)
    for f in dataclasses.fields(run):
        if f.name not in ("model", "tokenizer"):
            assert same(getattr(loaded, f.name), getattr(run, f.name)), f.name
    prompt = torch.tensor([run.tokenizer.encode("The old ferryman")])
    run.model.eval()
    assert torch.equal(loaded.model(prompt), run.model(prompt))
    assert [p.requires_grad for p in loaded.model.parameters()] == [p.requires_grad for p in run.model.parameters()]
    assert story_llm.count_parameters(loaded.model) == story_llm.count_parameters(run.model)


def test_only_the_checkpoint_is_left_in_the_folder(tmp_path):
    for _ in range(2):
        save_checkpoint(tmp_path / "model.pt", tiny_run())
    assert os.listdir(tmp_path) == ["model.pt"]


def test_a_path_may_be_a_string_or_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_checkpoint("model.pt", tiny_run())
    assert load_checkpoint("model.pt").step == 0


def test_generating_from_the_file_needs_nothing_but_the_program_and_the_file(saved, tmp_path):
    path, run = saved
    shutil.copy(story_llm.__file__, tmp_path / "story_llm.py")
    shutil.copy(path, tmp_path / "story_llm.pt")
    expected = "The old ferryman" + "".join(generate_text(run.model, run.tokenizer, "The old ferryman", 12)) + "\n"
    done = subprocess.run(
        [sys.executable, "story_llm.py", "generate", "--prompt", "The old ferryman", "--max-new-tokens", "12"],
        env={**bare_environment(tmp_path, closed_port()), "PYTHONPATH": "", "PYTHONUTF8": "1"},
        cwd=tmp_path, capture_output=True, encoding="utf-8", timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, expected, "")


# going on

@pytest.fixture(scope="module", params=[{"drop_rate": 0.1}, {"precision": "bf16"},
                                        {"tie_weights": True, "position": "rotary"}], ids=str)
def uninterrupted(request):
    return request.param, trained_run(**request.param)


@pytest.mark.parametrize("stop_at", [1, 4, 5, 7, -2, -1, 0])
def test_resumed_training_ends_as_if_it_had_never_stopped(uninterrupted, tmp_path, stop_at):
    """`stop_at`: from the start, or, if not positive, from the end; an evaluation is due every 5 steps."""
    changed, whole = uninterrupted
    stop_at = stop_at if stop_at > 0 else whole.total_steps + stop_at
    run, path = tiny_run(**changed), tmp_path / "model.pt"
    train(run, TEXT, quiet, lambda run: save_checkpoint(path, run), lambda: run.step >= stop_at)
    assert run.step == stop_at
    torch.manual_seed(12345)
    resumed = load_checkpoint(path)
    assert resumed.step == stop_at
    train(resumed, TEXT, quiet)
    assert weights_equal(resumed.model, whole.model) and resumed.history == whole.history
    assert resumed.step == whole.step


def test_training_can_stop_after_every_single_step(tmp_path):
    whole, path = trained_run(drop_rate=0.1), tmp_path / "model.pt"
    run = tiny_run(drop_rate=0.1)
    save_checkpoint(path, run)
    while run.step < whole.step:
        run = load_checkpoint(path)
        before = run.step
        train(run, TEXT, quiet, lambda run: save_checkpoint(path, run), lambda: run.step > before)
    assert weights_equal(run.model, whole.model) and run.history == whole.history


def test_more_epochs_train_on(saved):
    run = load_checkpoint(saved[0])
    before = run.total_steps
    run.train_config = dataclasses.replace(run.train_config, epochs=8)
    train(run, TEXT, quiet)
    assert run.step == run.total_steps == 2 * before
    assert [entry["step"] for entry in run.history] == sorted({entry["step"] for entry in run.history})


# saving that fails

def test_a_file_that_cannot_be_written_whole_leaves_the_old_one_and_no_litter(saved, tmp_path):
    """A real limit on the size of files, as a full disk would set it."""
    path = tmp_path / "model.pt"
    shutil.copy(saved[0], path)
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        with pytest.raises(OSError, match="model.pt"):
            save_checkpoint(path, saved[1])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert os.listdir(tmp_path) == ["model.pt"] and path.read_bytes() == saved[0].read_bytes()


def test_a_disk_that_fails_at_the_last_moment_leaves_the_old_one_and_no_litter(saved, tmp_path, monkeypatch):
    path = tmp_path / "model.pt"
    shutil.copy(saved[0], path)

    def fail(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(path, saved[1])
    assert os.listdir(tmp_path) == ["model.pt"] and path.read_bytes() == saved[0].read_bytes()


def test_a_folder_that_is_not_there_is_an_os_error(saved, tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        save_checkpoint(tmp_path / "nowhere" / "model.pt", saved[1])


# files that are not what they should be

def refusal(path, kind=ValueError):
    """The text of the error that loading raises."""
    with pytest.raises(kind) as caught:
        load_checkpoint(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_file_is_an_os_error_that_says_what_to_do(tmp_path):
    assert "train" in refusal(tmp_path / "model.pt", OSError)


def test_a_folder_and_a_pipe_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    refusal(tmp_path, (ValueError, OSError))
    refusal(tmp_path / "pipe", (ValueError, OSError))


def test_an_empty_file_a_picture_a_text_and_a_zip_file_are_refused(tmp_path):
    path = tmp_path / "model.pt"
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("data.pkl", b"0" * 1000)
    picture = b"\x89PNG\r\n\x1a\n" + bytes(500)
    for content in (b"", b"x", picture, TEXT.encode() * 9, packed.getvalue(), bytes(32), bytes(33)):
        path.write_bytes(content)
        refusal(path)


def test_a_file_cut_short_anywhere_is_refused(saved, tmp_path):
    content, path, places = saved[0].read_bytes(), tmp_path / "model.pt", random.Random(0)
    size = len(content)
    for length in [1, 31, 32, 33, size - 33, size - 32, size - 1, *places.sample(range(size), 200)]:
        path.write_bytes(content[:length])
        refusal(path)


def test_a_file_with_any_byte_changed_is_refused(saved, tmp_path):
    content, path, places = saved[0].read_bytes(), tmp_path / "model.pt", random.Random(1)
    for place in [0, len(content) - 32, len(content) - 1, *places.sample(range(len(content)), 500)]:
        damaged = bytearray(content)
        damaged[place] ^= 1 << places.randrange(8)
        path.write_bytes(damaged)
        refusal(path)


def write_signed(path, content):
    """Content with the checksum that belongs to it: what somebody who means harm would write."""
    path.write_bytes(content + hashlib.sha256(content).digest())


def test_a_signed_file_is_read_so_that_the_next_tests_test_what_they_say(saved, tmp_path):
    content = saved[0].read_bytes()[:-32]
    write_signed(tmp_path / "model.pt", content)
    assert weights_equal(load_checkpoint(tmp_path / "model.pt").model, saved[1].model)


WRONG = {
    "newer format": lambda state: state.update(format=state["format"] + 1),
    "no format": lambda state: state.pop("format"),
    "no config": lambda state: state.pop("config"),
    "terabytes": lambda state: state["config"].update(emb_dim=1 << 30),
    "more than fits an integer": lambda state: state["config"].update(emb_dim=10**30),
    "endless layers": lambda state: state["config"].update(n_layers=10**9),
    "many layers": lambda state: state["config"].update(n_layers=1000),
    "another vocabulary": lambda state: state["config"].update(vocab_size=7),
    "an endless context": lambda state: state["config"].update(context_length=10**12),
    "an unknown setting": lambda state: state["config"].update(new_setting=1),
    "config of another type": lambda state: state.update(config=[1, 2]),
    "a wrong setting": lambda state: state["train_config"].update(batch_size=-1),
    "no weights": lambda state: state.update(model=None),
    "wrong shape": lambda state: state["model"].update({"tok_emb.weight": torch.zeros(3, 3)}),
    "text as weights": lambda state: state["model"].update({"tok_emb.weight": "text"}),
    "integers as weights": lambda state: state["model"].update(
        {"out_head.weight": state["model"]["out_head.weight"].long()}),
    "a weight is missing": lambda state: state["model"].popitem(),
    "step is text": lambda state: state.update(step="many"),
    "step is negative": lambda state: state.update(step=-1),
    "no history": lambda state: state.update(history=None),
    "empty entries in the history": lambda state: state.update(history=[{"step": 0}]),
    "epochs of no steps": lambda state: state.update(steps_per_epoch=0),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_signed_file_with_wrong_contents_is_refused(saved, tmp_path, wrong):
    state = torch.load(io.BytesIO(saved[0].read_bytes()[:-32]), weights_only=True)
    WRONG[wrong](state)
    content = io.BytesIO()
    torch.save(state, content)
    write_signed(tmp_path / "model.pt", content.getvalue())
    refusal(tmp_path / "model.pt")


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def test_a_signed_pickle_that_would_run_code_is_refused_and_does_not_run(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = torch.load(io.BytesIO(saved[0].read_bytes()[:-32]), weights_only=True)
    content = io.BytesIO()
    torch.save({**state, "history": Evil()}, content)
    write_signed(tmp_path / "model.pt", content.getvalue())
    refusal(tmp_path / "model.pt")
    assert os.listdir(tmp_path) == ["model.pt"]


def test_a_signed_zip_bomb_is_refused(saved, tmp_path):
    good, content = zipfile.ZipFile(io.BytesIO(saved[0].read_bytes()[:-32])), io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as bomb:
        for name in good.namelist():
            bomb.writestr(name, bytes(1 << 26) if name.endswith("data/0") else good.read(name))
    assert len(content.getvalue()) < 1 << 20
    write_signed(tmp_path / "model.pt", content.getvalue())
    refusal(tmp_path / "model.pt")


def test_what_was_loaded_works_as_others_rely_on(saved):
    run = load_checkpoint(saved[0], device="cpu")
    ids = run.tokenizer.encode("The old ferryman")
    assert run.model(torch.tensor([ids, ids])).shape == (2, len(ids), run.tokenizer.vocab_size)
    assert generate_text_simple(run.model, torch.tensor([ids]), 3, run.config.context_length).shape == (1, len(ids) + 3)
    assert isinstance(run.tokenizer.decode(ids), str)
    assert isinstance(measure_recall(run.model, run.tokenizer, TEXT), float)
    assert run.step == saved[1].step and run.history == saved[1].history


def test_a_device_that_is_not_there_is_not_blamed_on_the_file(saved):
    with pytest.raises(ValueError, match="abacus") as caught:
        load_checkpoint(saved[0], device="abacus")
    assert "damaged" not in str(caught.value)
