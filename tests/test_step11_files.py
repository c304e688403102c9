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
import zipfile
from dataclasses import asdict, fields
from itertools import islice

import pytest
import torch
from hypothesis import given, strategies as st

from helpers import KINDS, ROOT, TEXT, same, story_llm, tiny, train_to, trained, weights_equal
from story_llm import FORMAT, StoryError, load_checkpoint, optimizer_averages, save_checkpoint

POSIX = os.name == "posix"
NOT_PRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")      # line ends, and what controls a terminal
has_pipes = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")


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
    save_checkpoint(path, train_to(run, corpus, 3))
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
        if f.name not in ("model", "tokenizer", "loss", "optimizer", "averages"):
            assert same(getattr(loaded, f.name), getattr(run, f.name)), f.name
    assert same(optimizer_averages(loaded), optimizer_averages(run))
    token_ids = torch.arange(2 * run.config.context_length).view(2, -1) % run.config.vocab_size
    assert torch.equal(loaded.model(token_ids), run.model(token_ids))
    assert [p.requires_grad for p in loaded.model.parameters()] == [p.requires_grad for p in run.model.parameters()]
    save_checkpoint(path.with_name("again.pt"), loaded)
    assert same(read(path.with_name("again.pt")), read(path))


@pytest.mark.parametrize("kind", [
    {"tokenizer": "story", "precision": "bf16"}, {"position": "rotary"}, {"position": "sinusoidal", "drop_rate": 0.2},
    {"tie_weights": True, "qkv_bias": True}, {"optimizer": "muon", "gelu": "tanh"},
    {"val_fraction": 0.0, "prompt_windows": 0.0, "seed": (1 << 32) - 1}, {"max_steps": 1, "n_layers": 3},
    {"keep_best": True, "val_fraction": 0.3, "learning_rate": 1.0, "max_steps": 20},
    {"text": "漢字 é\u0301 😀\u200d👩 \"“„ \x1c <|endoftext|> \n\n one two. " * 9}], ids=lambda kind: str(kind)[:40])
def test_everything_that_is_saved_is_loaded(tmp_path, kind):
    run = trained(**{"max_steps": 4, "eval_every": 3, **kind})
    run.prompt, run.text_paths, run.encoding = "Some other prompt", ["somewhere/else.txt", "-"], "cp1252"
    assert ("keep_best" in kind) == (run.last_weights is not None)
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


@pytest.mark.parametrize("kind", [{}, {"tie_weights": True}, {"keep_best": True}], ids=str)
def test_no_weights_are_in_a_file_twice(kind, tmp_path):
    """With keep_best, the last weights are there only where they are not the best; tied weights are one tensor."""
    run, corpus = tiny(**{"max_steps": 100, "learning_rate": 0.01, "eval_every": 1, "val_fraction": 0.3, **kind})
    seen = set()
    for _ in islice(story_llm.training_steps(run, corpus), 40 if "keep_best" in kind else 3):
        save_checkpoint(tmp_path / "run.pt", run)
        contents, last_is_best = read(tmp_path / "run.pt"), story_llm.step_of_weights(run) == run.step
        assert (contents["last_weights"] is None) == last_is_best
        places = {weight.untyped_storage().data_ptr() for weight in contents["weights"].values()}
        assert len(places) == len(contents["weights"]) - ("tie_weights" in kind)
        seen.add(last_is_best)
    assert seen == ({True, False} if "keep_best" in kind else {True})


def test_a_checkpoint_is_a_file_of_plain_values_and_tensors_that_torch_alone_can_read(saved):
    path, run = saved
    found = read(path)      # with weights_only, torch refuses whatever belongs to story_llm
    weights, averages = found.pop("weights"), found.pop("averages")
    assert {name: weight.shape for name, weight in weights.items()} == {
        name: weight.shape for name, weight in run.model.state_dict().items()}
    assert {name: [average.shape for average in pair] for name, pair in averages.items()} == {
        name: [p.shape] * 2 for name, p in run.model.named_parameters()}
    assert json.loads(json.dumps(found)) == found       # plain values
    assert found["config"] == asdict(run.config) and found["train_config"] == asdict(run.train_config)
    assert found["tokenizer"] == {"kind": "word", "tokens": run.tokenizer.tokens}
    assert found["history"] == [asdict(evaluation) for evaluation in run.history]
    assert (found["format"], found["step"], found["prompt"]) == (FORMAT, run.step, run.prompt)


@pytest.mark.parametrize("exists", [True, False], ids=["to a file", "to a file that does not exist yet"])
def test_a_symbolic_link_is_followed_and_stays_a_link_and_an_old_model_is_kept_beside_the_file(tmp_path, exists):
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
    target.write_bytes(b"a file of another kind")
    assert os.path.samefile(story_llm.keep_finished_model(link), tmp_path / "disk" / "real.old.pt")


@pytest.mark.skipif(not POSIX, reason="Windows has no such modes")
@pytest.mark.parametrize("mode", [0o600, 0o664, 0o640])
def test_a_file_that_is_replaced_keeps_its_mode(copied, saved, mode):
    copied.chmod(mode)
    save_checkpoint(copied, saved[1])
    assert copied.stat().st_mode & 0o777 == mode


def test_the_contents_are_on_the_disk_before_the_file_gets_its_name(copied, saved, monkeypatch):
    """Otherwise an empty file could stand there after a power failure."""
    events, size = [], copied.stat().st_size
    fsync, replace = os.fsync, os.replace

    def noted_fsync(number):
        events.append(("fsync", os.fstat(number).st_size, copied.read_bytes() == saved[0].read_bytes()))
        fsync(number)

    def noted_replace(source, target):
        events.append(("replace", os.path.getsize(source), os.path.realpath(target)))
        replace(source, target)
    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    save_checkpoint(copied, saved[1])
    assert events[:2] == [("fsync", size, True), ("replace", size, os.path.realpath(copied))]


def assert_untouched(path, saved):
    assert os.listdir(path.parent) == ["model.pt"] and path.read_bytes() == saved[0].read_bytes()


def test_a_full_disk_leaves_the_old_file_and_no_temporary_file(saved, copied):
    """The process may not write files of more than so many bytes. It reaches this limit at once, in a tensor, or at the
    very end."""
    resource = pytest.importorskip("resource")          # Windows does not have it
    size, usual = copied.stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (0, 100, 20_000, size // 2, size - 100, size - 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, usual[1]))
        try:
            with pytest.raises(StoryError, match="could not be written") as caught:
                save_checkpoint(copied, saved[1])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, usual)
        assert_one_line_about(copied, caught.value)
        assert "enforce fail" not in str(caught.value)      # which is torch's way to say so
        assert_untouched(copied, saved)


@pytest.mark.parametrize("owner, function", [(torch, "save"), (os, "fsync"), (os, "replace")])
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


def test_a_missing_folder_and_a_folder_as_path_are_refused_by_save_and_before_the_work(saved, tmp_path):
    for path in (tmp_path / "nowhere" / "model.pt", tmp_path):
        for refuse in (lambda: save_checkpoint(path, saved[1]), lambda: story_llm.check_writable(path)):
            with pytest.raises(StoryError) as caught:
                refuse()
            assert_one_line_about(path, caught.value)
    with pytest.raises(StoryError, match=r"picture\.txt.*\.png"):
        story_llm.check_writable(tmp_path / "picture.txt", story_llm.PICTURES)
    story_llm.check_writable(tmp_path / "picture.png", story_llm.PICTURES)
    assert os.listdir(tmp_path) == []


@has_pipes
def test_devices_and_pipes_are_neither_replaced_nor_read(saved, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "null").symlink_to("/dev/null")
    for path in (tmp_path / "pipe", tmp_path / "null", "/dev/zero"):
        before = os.stat(path)
        with pytest.raises(StoryError) as caught:
            save_checkpoint(path, saved[1])
        assert_one_line_about(os.path.realpath(path), caught.value)
        for refuse in (load_checkpoint, story_llm.check_writable):
            with pytest.raises(StoryError):
                refuse(path)
        assert os.stat(path).st_mode == before.st_mode and os.stat(path).st_ino == before.st_ino
    assert sorted(os.listdir(tmp_path)) == ["null", "pipe"]


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_model_with_nan_or_infinite_weights_does_not_replace_a_good_one(saved, copied, number):
    run = load_checkpoint(copied)
    with torch.no_grad():
        run.model.tok_emb.weight.fill_(number)
    with pytest.raises(StoryError, match="NaN"):
        save_checkpoint(copied, run)
    assert_untouched(copied, saved)


# files that are not checkpoints, or damaged

def test_a_missing_file_is_refused_with_the_remedy_and_a_folder_as_such(tmp_path):
    assert "train" in refusal(tmp_path / "model.pt") and "folder" in refusal(tmp_path)


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
    "a zip file with a pickle": zip_file({"archive/data.pkl": pickle.dumps({"format": FORMAT}, protocol=2)}),
    "a pickle": pickle.dumps({"format": FORMAT})}


@pytest.mark.parametrize("kind", NO_CHECKPOINTS)
def test_a_file_of_another_kind_is_refused(kind, tmp_path, recwarn):
    (tmp_path / "model.pt").write_bytes(NO_CHECKPOINTS[kind])
    refusal(tmp_path / "model.pt")
    assert not list(recwarn)        # a warning would be a second line


@pytest.mark.parametrize("content", [{}, [], "text", torch.zeros(3), {"weights": {}}, {"format": FORMAT},
                                     {"format": torch.tensor([1, 2])}, {"format": torch.tensor(FORMAT)}], ids=str)
def test_another_file_of_torch_is_refused(content, saved, tmp_path):
    torch.save(content, tmp_path / "model.pt")
    assert "not a checkpoint" in refusal(tmp_path / "model.pt")
    torch.save(saved[1].model.state_dict(), tmp_path / "model.pt")
    assert "not a checkpoint" in refusal(tmp_path / "model.pt")


def test_a_file_that_was_cut_off_anywhere_is_refused(small_file, tmp_path):
    path, places = tmp_path / "model.pt", random.Random(0)
    size = len(small_file)
    for length in [1, 30, 100, size - 100, size - 23, size - 22, size - 1, *places.sample(range(size), 60)]:
        path.write_bytes(small_file[:length])
        refusal(path)


# At its end, a zip file has a directory with a record for each entry. A byte of it has MS-DOS's attributes.
DIRECTORY_ENTRY, ATTRIBUTES, FOLDER = b"PK\x01\x02", 38, 0x10


def test_a_damaged_file_is_refused_unless_the_damage_is_in_bytes_that_mean_nothing(small_file, tmp_path):
    """Of a zip file, checksums protect the contents. Between them there are bytes without a meaning, like the time when
    an entry was written. If the file is accepted, all its contents are as before."""
    path, places = tmp_path / "model.pt", random.Random(1)
    path.write_bytes(small_file)
    expected, directory = read(path), small_file.index(DIRECTORY_ENTRY)
    refused = 0
    for place in [*places.sample(range(len(small_file)), 120), *places.sample(range(directory, len(small_file)), 200)]:
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
    assert "folder" in refusal(tmp_path / "model.pt")


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
    assert "checkpoint" not in str(caught.value)


# files of other versions

@pytest.mark.parametrize("number", [6, FORMAT - 1, FORMAT + 1, 12345, str(FORMAT)])
def test_a_file_of_an_older_or_newer_format_is_refused_with_both_numbers(saved, tmp_path, number):
    """Also if its other entries are unknown, as those of format 6, which had an optimizer state as torch writes it."""
    old = {"format": number, "config": asdict(saved[1].config), "train_config": {}, "optimizer": {"state": {}},
           "weights": dict(saved[1].model.state_dict()), "best_weights": None}
    for contents in ({**read(saved[0]), "format": number}, {"format": number}, old):
        torch.save(contents, tmp_path / "model.pt")
        message = refusal(tmp_path / "model.pt")
        assert re.search(rf"\b{number}\b.*\b{FORMAT}\b", message) and "version" in message


def test_after_any_change_of_the_model_its_old_files_are_refused_with_a_line_that_says_so(tmp_path, monkeypatch):
    """Other shapes, another result with the same weights, or other parts."""
    forward = story_llm.GPTModel.forward
    make_linear = story_llm.make_linear
    changes = [(story_llm, "make_linear", lambda n, m, *rest, **options: make_linear(
                   n, m + 2 if m == 4 * n else m, *rest, **options)),
               (torch.nn.functional, "gelu", lambda x, approximate: torch.nn.functional.silu(x)),
               (story_llm.GPTModel, "forward", lambda self, ids, cache=None: 1.1 * forward(self, ids, cache)),
               (story_llm, "make_norm", lambda config: torch.nn.RMSNorm(config.emb_dim))]
    runs = [tiny()[0], trained(), story_llm.new_run(story_llm.corpus_from_text(TEXT, "word"))]
    for run in runs:
        save_checkpoint(tmp_path / "model.pt", run)
        for change in changes:
            with monkeypatch.context() as patched:
                patched.setattr(*change)
                assert "version" in refusal(tmp_path / "model.pt")
        assert weights_equal(load_checkpoint(tmp_path / "model.pt").model, run.model)


def test_a_change_that_shows_in_long_windows_only_is_noticed(tmp_path, monkeypatch):
    """As if attention reached back over 300 tokens only. A test window of 256 tokens would not show it."""
    run, _ = tiny(TEXT * 9, context_length=512)
    save_checkpoint(tmp_path / "model.pt", run)
    mask = story_llm.causal_mask

    def short_sighted(T, S, device=None):
        positions = torch.arange(S, device=device)
        return mask(T, S, device) | (positions < positions[S - T:, None] - 300)
    monkeypatch.setattr(story_llm, "causal_mask", short_sighted)
    assert "version" in refusal(tmp_path / "model.pt")


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
        assert "not a checkpoint" in refusal(tmp_path / "model.pt"), name
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


def test_a_file_whose_weights_share_their_memory_is_refused(tmp_path):
    """Otherwise a small file could claim a thousand layers, all of them the same one."""
    run, _ = tiny(n_layers=12, emb_dim=64)
    path = tmp_path / "model.pt"
    save_checkpoint(path, run)
    state, first = read(path), {}
    state["weights"] = {name: first.setdefault(weight.shape, weight) for name, weight in state["weights"].items()}
    state["averages"] = None
    torch.save(state, path)
    assert path.stat().st_size < sum(4 * weight.numel() for weight in state["weights"].values()) / 2
    assert "too small for its weights" in refusal(path)


def change(*path, **to):
    """A function that updates the dictionary at that path of a saved state."""
    def function(state):
        for key in path:
            state = state[key]
        state.update(to)
    return function


def edit(name, function, entry="weights"):
    """A function that replaces one of the weights, or one pair of averages, by function(it)."""
    def changed(state):
        state[entry][name] = function(state[entry][name])
    return changed


def set_token(index, token):
    return lambda state: state["tokenizer"]["tokens"].__setitem__(index, token)


ENTRIES = ("config", "tokenizer", "weights", "format", "test_loss", "train_config", "history",
           *story_llm.PLAIN_FIELDS)
OTHER_TYPES = {"a tensor": torch.zeros(2), "a tensor of one number": torch.tensor(1), "None": None, "a number": 3.5,
               "a huge number": 10**400, "text": "text", "a list": [[1]], "NaN": math.nan}
OUT, QUERY = "out_head.weight", "trf_blocks.0.att.query.weight"
ODD_TENSORS = {
    "of another shape": lambda weight: weight[:-1].clone(), "transposed": lambda weight: weight.mT.contiguous().mT,
    "without numbers": lambda weight: weight.to("meta"), "sparse": lambda weight: weight.to_sparse(),
    "complex": lambda weight: weight.to(torch.complex64), "of integers": lambda weight: weight.long(),
    "in bf16": lambda weight: weight.bfloat16(), "in float64": lambda weight: weight.double(),
    "a parameter": torch.nn.Parameter, "expanded": lambda weight: torch.zeros(1).expand(weight.shape),
    "with NaN": lambda weight: weight * math.nan, "with infinity": lambda weight: weight + math.inf,
    "a list": lambda weight: weight.tolist(), "text": lambda weight: "text", "None": lambda weight: None}
WRONG = {       # {what is wrong: how to make a good state wrong}
    **{f"no {name}": lambda state, name=name: state.pop(name) for name in (*ENTRIES, "last_weights", "averages")},
    **{f"{name} is {kind}": change(**{name: value}) for name in ENTRIES for kind, value in OTHER_TYPES.items()
       if not (name == "test_loss" and kind == "a number") and not (kind == "a list" and name == "history")
       and not (kind == "text" and type(value) is story_llm.PLAIN_FIELDS.get(name))},
    **{f"{name} is {kind}": change(**{name: value}) for name in ("last_weights", "averages")
       for kind, value in OTHER_TYPES.items() if value is not None},
    **{f"a weight is {kind}": edit(QUERY, function) for kind, function in ODD_TENSORS.items()},
    **{f"an average is {kind}": edit(QUERY, lambda pair, function=function: [pair[0], function(pair[1])], "averages")
       for kind, function in ODD_TENSORS.items()},
    **{f"a last weight is {kind}": lambda state, function=function: state.update(
        last_weights={**state["weights"], QUERY: function(state["weights"][QUERY])})
       for kind, function in ODD_TENSORS.items()},
    **{f"{name} is {value!r:.9}": change("history", 0, **{name: value})
       for name in ("train_loss", "val_loss", "recall", "epoch", "step") for value in (
           math.nan, -math.inf, -1e308, 1e308, 10**400, [1], "0", torch.tensor(1.0))},
    **{f"{name} is {value!r:.9}": change("history", 0, **{name: value})
       for name in ("sample", "prompt") for value in (None, 1, b"x")},
    "weights are missing": lambda state: state["weights"].clear(),
    "a weight is missing": lambda state: state["weights"].pop(QUERY),
    "a weight too many": change("weights", more=torch.zeros(3)),
    "last weights are missing": lambda state: state.update(last_weights={QUERY: state["weights"][QUERY]}),
    "averages are missing": lambda state: state["averages"].pop(QUERY),
    "averages of an unknown parameter": lambda state: state["averages"].update(unknown=state["averages"][QUERY]),
    "one average": edit(QUERY, lambda pair: pair[:1], "averages"),
    "three averages": edit(QUERY, lambda pair: [*pair, pair[0]], "averages"),
    "an average that is no list": edit(QUERY, lambda pair: pair[0], "averages"),
    "averages of the other optimizer": change("train_config", optimizer="muon"),
    "a path that is a number": change(text_paths=[7]),
    "a beginning that is bytes": change(beginnings=[b"Once"]),
    "an unknown setting": change("config", new_setting=1),
    "a setting is missing": lambda state: state["train_config"].update(unknown=state["train_config"].pop("seed")),
    "another vocabulary size": change("config", vocab_size=7),
    "another context length": change("config", context_length=13),
    "another number of layers": change("config", n_layers=2),
    "a setting that is out of range": change("train_config", batch_size=-1),
    "a setting that is NaN": change("train_config", learning_rate=math.nan),
    "a setting that is a tensor": change("config", n_heads=torch.tensor(2)),
    "an odd number of heads": change("config", n_heads=3),
    "the step is negative": change(step=-1),
    "an epoch has no steps": change(steps_per_epoch=0),
    "an entry in the history without losses": change(history=[{"step": 0}]),
    "a history of numbers": change(history=[1, 2]),
    "the test loss is NaN": change(test_loss=math.nan), "the test loss is another": change(test_loss=1.0),
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


# What is right in itself but does not fit together: each command ends as usual or says in one line what is wrong.

STRANGE = {
    "keep_best with an empty history": lambda state: (change("train_config", keep_best=True)(state),
                                                      change(history=[])(state)),
    **{f"a huge {name}": change("train_config", **{name: 10**400})
       for name in ("learning_rate", "grad_clip", "weight_decay")},
    "keep_best without a validation loss": change("train_config", keep_best=True),
    "keep_best with a lowest loss before the first step": lambda state: (
        change("train_config", keep_best=True)(state), change("history", 0, val_loss=0.0)(state)),
    "an empty history": change(history=[]), "an empty prompt": change(prompt=""),
    "a prompt that no text has": change(prompt="\ud800\0"), "no beginnings": change(beginnings=[]),
    "beginnings that no text has": change(beginnings=["\0", "\ud800", ""]),
    "a sample that no text has": change("history", 0, sample="\ud800\0"),
    "no averages": change(averages=None), "averages that are empty": change(averages={}),
    "last weights that are empty": change(last_weights={}), "more steps than there are": change(step=99, total_steps=3),
    "the first step": change(step=0), "a first step beyond the last": change(first_step=4_000_000_000),
    "another split": change("train_config", val_fraction=0.5), "huge steps": change("history", 0, step=(1 << 32) - 1),
    "a path with a zero byte": change(text_paths=["a\0b"]), "a path that no file has": change(text_paths=["\ud800"]),
    "the standard input": change(text_paths=["-"]), "a folder": change(text_paths=["."]),
    "an encoding with a zero byte": change(encoding="utf-8\0"), "an encoding of surrogates": change(encoding="\ud800"),
    "an encoding that decodes no text": change(encoding="hex"), "an encoding that fails": change(encoding="undefined")}
COMMANDS = (["generate", "--prompt", "The old", "--max-new-tokens", "2"], ["evaluate"], ["plot"], ["attention"],
            ["next"], ["train", "--resume", "--epochs", "6"])


@pytest.mark.parametrize("strange", STRANGE)
def test_no_command_shows_a_traceback_for_a_file_whose_parts_do_not_fit_together(
        folder, trained_here, call, strange, recwarn, monkeypatch):
    if "prompt" not in strange and "history" not in strange:
        monkeypatch.setattr(story_llm, "save_figure", lambda figure, path: figure)      # what is drawn is the usual
    state = read("story_llm.pt")
    STRANGE[strange](state)
    torch.save(state, "strange.pt")
    for command in COMMANDS:
        status, out, err = call(*command, "--model", "strange.pt")
        lines = [line for line in err.splitlines() if not line.startswith("note: ")]
        assert (status, len(lines)) in ((0, 0), (1, 1)) and "nan" not in out, (command, err)
        assert status == 0 or lines[0].startswith("error: ") and len(lines[0]) < 600
    assert not [warning for warning in recwarn if "Glyph" not in str(warning.message)]


@has_pipes
@pytest.mark.parametrize("command", [["evaluate"], ["train", "--resume", "--epochs", "6"]])
def test_a_file_cannot_make_a_command_read_a_device_or_a_pipe_and_what_it_reads_is_named(
        folder, trained_here, call, command):
    os.mkfifo("pipe")       # whoever opens it waits forever
    os.symlink("/dev/zero", "link.txt")
    os.rename("my.txt", "mine.txt")
    state = read("story_llm.pt")
    for path in ("/dev/zero", "pipe", "link.txt", "my.txt", "/dev/stdin"):
        torch.save({**state, "text_paths": [path]}, "foreign.pt")
        status, out, err = call(*command, "--model", "foreign.pt")
        *notes, error = err.splitlines()
        assert (status, out) == (1, "") and error.startswith("error: ") and path in error and "--text" in error
        assert len(notes) == 1 and path in notes[0] and "foreign.pt" in notes[0]
    torch.save({**state, "text_paths": ["mine.txt"]}, "foreign.pt")
    status, _, err = call(*command, "--model", "foreign.pt")
    assert status == 0 and err.startswith("note: foreign.pt was trained on mine.txt\n")
    status, _, err = call(*command, "--model", "story_llm.pt", "--text", "mine.txt")    # the user's own choice
    assert status == 0 and "mine.txt" not in err


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


def huge_average(state):
    state["averages"][QUERY] = [torch.zeros(1).expand(20_000, 20_000)] * 2


def many_heads(state):
    """Attention scores of 256 heads over 1,024 positions are 1 GB, and the file has 3 MB."""
    state["config"].update(emb_dim=256, n_heads=256, context_length=1024)
    model = story_llm.new_model(story_llm.GPTConfig(**state["config"]))
    state.update(weights=dict(model.state_dict()), averages=None)


CLAIMS = {
    "wide": grow(emb_dim=(1 << 16) - 2), "rather wide": grow(emb_dim=2048), "long": grow(context_length=(1 << 20) - 1),
    "long with fixed positions": grow(context_length=(1 << 20) - 1, position="sinusoidal"),
    "deep": grow(n_layers=200, emb_dim=512), "one storage for all": share_storage,
    "without these weights": change("config", emb_dim=(1 << 16) - 2), "wider": change("config", emb_dim=10**12),
    "widest": change("config", emb_dim=1 << 31, n_heads=1), "deepest": change("config", n_layers=10**9),
    "longest": change("config", context_length=(1 << 32) - 1, position="rotary"),
    "a vocabulary": change("config", vocab_size=10**9), "an average": huge_average, "heads": many_heads}
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
    names = [*CLAIMS, "zip bomb"]
    done = subprocess.run([sys.executable, "-c", READ_EACH, saved[0], *names], cwd=tmp_path, capture_output=True,
                          text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=300)
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [result[0] for result in results] == names
    for name, kind, message, grown in results:
        assert kind == "StoryError" and name in message and "\n" not in message, (name, kind, message)
        assert grown < (400e6 if name == "heads" else 100e6), (name, grown)


# models that stood at the path before

@pytest.mark.parametrize("content", [b"", b"my thesis", bytes(1000), None], ids=repr)
def test_a_finished_model_or_a_foreign_file_is_copied_once_and_stays_whole(content, saved, copied):
    if content is not None:
        copied.write_bytes(content)
    before = copied.read_bytes()
    for _ in range(3):
        assert os.path.basename(story_llm.keep_finished_model(copied)) == "model.old.pt"
        assert sorted(os.listdir(copied.parent)) == ["model.old.pt", "model.pt"]
        assert copied.read_bytes() == copied.with_name("model.old.pt").read_bytes() == before


def test_an_unfinished_training_is_not_kept_and_where_nothing_is_there_is_nothing_to_keep(tmp_path):
    assert story_llm.keep_finished_model(tmp_path / "model.pt") is None and os.listdir(tmp_path) == []
    run, corpus = tiny()
    for step in (0, 1, run.total_steps - 1):
        if step:
            train_to(run, corpus, step)
        save_checkpoint(tmp_path / "model.pt", run)
        assert story_llm.keep_finished_model(tmp_path / "model.pt") is None and os.listdir(tmp_path) == ["model.pt"]


@pytest.mark.parametrize("obstacle", ["a full disk", "a pipe", "a folder"])
def test_an_old_model_that_cannot_be_kept_is_one_line_and_is_not_replaced(obstacle, saved, copied, monkeypatch):
    kept = copied.with_name("model.old.pt")
    if obstacle == "a pipe" and hasattr(os, "mkfifo"):
        os.mkfifo(kept)
    elif obstacle == "a folder":
        kept.mkdir()
    else:
        def fail(source, target, **options):
            raise OSError(errno.ENOSPC, "No space left on device")
        monkeypatch.setattr(shutil, "copyfile", fail)
    run, corpus = tiny(seed=5)
    with pytest.raises(StoryError) as caught:
        story_llm.train(run, corpus, copied)
    assert_one_line_about(os.path.realpath(kept), caught.value)
    assert copied.read_bytes() == saved[0].read_bytes() and not kept.is_file()
