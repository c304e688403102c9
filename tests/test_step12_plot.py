"""Step 12: the loss curves show the history, in a picture of the requested kind."""
import math
import os
import struct
import warnings
from xml.etree import ElementTree

import pytest
from helpers import trained
from story_llm import Evaluation, StoryError, plot_losses, save_checkpoint

PNG = b"\x89PNG\r\n\x1a\n"


def history(steps, val_loss=5.0, recall=0.5):
    return [Evaluation(i, i / 4, 5.0 - i / 10, val_loss, recall, "prompt", "sample") for i in steps]


HISTORIES = {"usual": history(range(0, 20, 5)), "no validation": history(range(0, 20, 5), val_loss=None),
             "no recall": history(range(3), recall=None), "one point": history([0])}


@pytest.fixture(autouse=True)
def warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def curves(figure):
    """[(label, [(x, y), ...])] of all curves in a figure. A missing number is None."""
    return [(line.get_label(), [(x, None if math.isnan(y) else y) for x, y in line.get_xydata().tolist()])
            for axes in figure.axes for line in axes.lines]


@pytest.mark.parametrize("kind", HISTORIES)
def test_the_curves_are_the_numbers_of_the_history(kind, tmp_path):
    entries, path = HISTORIES[kind], tmp_path / "loss.png"
    figure = plot_losses(entries, 300, path)
    expected = [[(entry.epoch, getattr(entry, name)) for entry in entries]
                for name in ("train_loss", "val_loss", "recall")]
    (_, training), (_, validation), *_, (label, uniform), (_, recall) = curves(figure)
    assert [training, validation, recall] == expected
    assert "300" in label and {y for _, y in uniform} == {math.log(300)}
    for content in (path.read_bytes(), figure._repr_png_()):       # the second is what a notebook shows
        width, height = struct.unpack(">II", content[16:24])
        assert content[:8] == PNG and width > height > 300


@pytest.mark.parametrize("val_losses, lowest", [
    ([7.5, 5.25, 6.0], (0.25, 5.25)), ([7.5, 6.25, 6.0], (0.5, 6.0)), ([4.0, None, 5.0], (0.0, 4.0)),
    ([4.0, 4.0, 4.0], (0.0, 4.0)), ([None, None, None], None)], ids=str)
def test_the_lowest_validation_loss_is_marked_and_named(val_losses, lowest):
    entries = [Evaluation(i, i / 4, 5.0, val_loss, None, "", "") for i, val_loss in enumerate(val_losses)]
    marks = [curve for curve in curves(plot_losses(entries, 300)) if "lowest" in curve[0]]
    assert marks == ([] if lowest is None else [(f"lowest validation loss, {lowest[1]:.2f}", [lowest])])


def test_everything_that_is_drawn_is_visible_and_labelled():
    figure = plot_losses(HISTORIES["usual"], 300)
    losses, recall = figure.axes
    assert losses.get_ylim()[0] == 0 and losses.get_ylim()[1] > math.log(300)
    assert recall.get_ylim()[0] < 0 and recall.get_ylim()[1] > 1
    assert [text.get_text() for text in losses.get_legend().get_texts()] == [label for label, _ in curves(figure)][:4]
    assert "epoch" in recall.get_xlabel() and "loss" in losses.get_ylabel() and "recall" in recall.get_ylabel()


def test_the_history_of_a_real_run_is_drawn_and_without_a_path_nothing_is_saved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = trained(max_steps=3, val_fraction=0.0)
    (_, training), *_ = curves(plot_losses(run.history, run.config.vocab_size))
    assert training == [(entry.epoch, entry.train_loss) for entry in run.history] and len(training) > 1
    assert not list(tmp_path.iterdir())


def test_an_svg_and_a_pdf_picture_are_saved(tmp_path):
    plot_losses(HISTORIES["usual"], 300, tmp_path / "loss.svg")
    plot_losses(HISTORIES["usual"], 300, str(tmp_path / "loss.pdf"))
    assert ElementTree.parse(tmp_path / "loss.svg").getroot().tag == "{http://www.w3.org/2000/svg}svg"
    assert (tmp_path / "loss.pdf").read_bytes().startswith(b"%PDF")


def test_a_picture_is_drawn_whatever_the_backend_of_the_environment_is(tmp_path, run_program):
    """A notebook sets one that other programs do not have."""
    save_checkpoint(tmp_path / "story_llm.pt", trained(max_steps=2))
    done = run_program(tmp_path, "plot", MPLBACKEND="module://a_notebook.backend_inline", DISPLAY="")
    assert (done.returncode, done.stdout, done.stderr) == (0, "drew loss.png\n", "")


def test_an_empty_history_an_unknown_kind_of_picture_and_a_missing_folder_are_refused(tmp_path):
    with pytest.raises(StoryError, match="history"):
        plot_losses([], 300)
    (tmp_path / "folder.png").mkdir()
    for name in ("loss.xyz", "loss", "loss.png.txt", "folder.png"):
        with pytest.raises(StoryError, match=name):
            plot_losses(HISTORIES["usual"], 300, tmp_path / name)
    with pytest.raises(StoryError, match="nowhere"):
        plot_losses(HISTORIES["usual"], 300, tmp_path / "nowhere" / "loss.png")
    assert os.listdir(tmp_path) == ["folder.png"]


def test_a_picture_is_named_after_the_model_unless_that_has_its_usual_name(folder, trained_here, call):
    (folder / "runs").mkdir()
    model, name = "runs/a.b.pt", "runs/a.b_{}.png"
    assert call("attention") == (0, "drew attention.png\n", "")
    os.rename("story_llm.pt", model)
    assert call("plot", "--model", model) == (0, f"drew {name.format('loss')}\n", "")
    assert call("attention", "--model", model) == (0, f"drew {name.format('attention')}\n", "")
    assert call("plot", "--model", model, "--plot", "x.svg") == (0, "drew x.svg\n", "")
    assert (folder / "x.svg").read_text(encoding="utf-8").startswith("<?xml")
    assert {name.format("loss"), name.format("attention"), "x.svg"} <= {
        str(path.relative_to(folder)) for path in folder.rglob("*.*")}
