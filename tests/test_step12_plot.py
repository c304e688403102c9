"""Step 12: the loss curves show the history, in a picture of the requested kind."""
import math
import struct
import warnings
from xml.etree import ElementTree

import pytest
from helpers import trained
from story_llm import Evaluation, StoryError, plot_losses, save_checkpoint


def history(steps, val_loss=5.0, recall=0.5):
    return [Evaluation(i, i / 4, 5.0 - i / 10, val_loss, recall, "prompt", "sample") for i in steps]


HISTORIES = {"usual": history(range(0, 20, 5)), "no validation": history(range(0, 20, 5), val_loss=None),
             "no recall": history(range(3), recall=None), "one point": history([0]), "two points": history([0, 1])}


@pytest.fixture(autouse=True)
def warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def curves(figure):
    """{label: [(x, y), ...]} of all curves in a figure."""
    return {line.get_label(): [tuple(map(float, point)) for point in line.get_xydata()]
            for axes in figure.axes for line in axes.lines}


@pytest.mark.parametrize("kind", HISTORIES)
def test_the_curves_are_the_numbers_of_the_history(kind):
    entries = HISTORIES[kind]
    drawn = curves(plot_losses(entries, 300))
    for name, label in (("train_loss", "training"), ("val_loss", "validation"), ("recall", "recall")):
        values = [getattr(entry, name) for entry in entries]
        expected = None if None in values else [(entry.epoch, value) for entry, value in zip(entries, values)]
        assert drawn.pop(label, None) == expected
    (label, points), = [(label, points) for label, points in drawn.items() if "lowest" not in label]
    assert "300" in label and {y for _, y in points} == {math.log(300)}


@pytest.mark.parametrize("val_losses, lowest", [
    ([7.5, 5.25, 6.0], (0.25, 5.25)), ([7.5, 6.25, 6.0], (0.5, 6.0)), ([4.0, None, 5.0], (0.0, 4.0)),
    ([4.0, 4.0, 4.0], (0.0, 4.0)), ([None, None, None], None)], ids=str)
def test_the_lowest_validation_loss_is_marked_and_named(val_losses, lowest):
    entries = [Evaluation(i, i / 4, 5.0, val_loss, None, "", "") for i, val_loss in enumerate(val_losses)]
    marks = {label: points for label, points in curves(plot_losses(entries, 300)).items() if "lowest" in label}
    assert marks == ({} if lowest is None else {f"lowest validation loss, {lowest[1]:.2f}": [lowest]})


def test_everything_that_is_drawn_is_visible_and_labelled():
    figure = plot_losses(HISTORIES["usual"], 300)
    losses, recall = figure.axes
    assert losses.get_ylim()[0] == 0 and losses.get_ylim()[1] > math.log(300)
    assert recall.get_ylim()[0] < 0 and recall.get_ylim()[1] > 1
    assert [text.get_text() for text in losses.get_legend().get_texts()] == list(curves(figure))[:4]
    assert "epoch" in recall.get_xlabel() and "loss" in losses.get_ylabel() and "recall" in recall.get_ylabel()


def test_the_history_of_a_real_run_is_drawn(tmp_path):
    run = trained(max_steps=3, val_fraction=0.0)
    drawn = curves(plot_losses(run.history, run.config.vocab_size, tmp_path / "loss.png"))
    assert drawn["training"] == [(entry.epoch, entry.train_loss) for entry in run.history] and len(run.history) > 1


@pytest.mark.parametrize("kind", HISTORIES)
def test_a_png_picture_is_saved(tmp_path, kind):
    plot_losses(HISTORIES[kind], 300, tmp_path / "loss.png")
    content = (tmp_path / "loss.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", content[16:24])
    assert width > height > 300


def lines_of_svg(path):
    root = ElementTree.parse(path).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    return [e for e in root.iter("{http://www.w3.org/2000/svg}g") if e.get("id", "").startswith("line2d")]


def test_an_svg_picture_has_one_curve_less_without_validation(tmp_path):
    plot_losses(HISTORIES["usual"], 300, tmp_path / "both.svg")
    plot_losses(HISTORIES["no validation"], 300, str(tmp_path / "one.svg"))
    assert len(lines_of_svg(tmp_path / "one.svg")) < len(lines_of_svg(tmp_path / "both.svg"))


def test_a_pdf_picture_is_saved(tmp_path):
    plot_losses(HISTORIES["usual"], 300, tmp_path / "loss.pdf")
    assert (tmp_path / "loss.pdf").read_bytes().startswith(b"%PDF")


def test_without_a_path_nothing_is_saved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plot_losses(HISTORIES["usual"], 300)
    assert not list(tmp_path.iterdir())


def test_a_notebook_shows_the_figure_as_a_png_picture():
    content = plot_losses(HISTORIES["usual"], 300)._repr_png_()
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and min(struct.unpack(">II", content[16:24])) > 300


@pytest.mark.parametrize("backend", ["nonsense", "module://a_notebook.backend_inline"])
def test_a_picture_is_drawn_whatever_the_backend_of_the_environment_is(tmp_path, run_program, backend):
    """A notebook sets one that other programs do not have."""
    save_checkpoint(tmp_path / "story_llm.pt", trained(max_steps=2))
    done = run_program(tmp_path, "plot", MPLBACKEND=backend, DISPLAY="")
    assert (done.returncode, done.stdout, done.stderr) == (0, "drew loss.png\n", "")


def test_an_empty_history_an_unknown_kind_of_picture_and_a_missing_folder_are_refused(tmp_path):
    with pytest.raises(StoryError, match="history"):
        plot_losses([], 300)
    for name in ("loss.xyz", "loss", "loss.png.txt"):
        with pytest.raises(StoryError, match=name):
            plot_losses(HISTORIES["usual"], 300, tmp_path / name)
    with pytest.raises(StoryError, match="nowhere"):
        plot_losses(HISTORIES["usual"], 300, tmp_path / "nowhere" / "loss.png")
    assert not list(tmp_path.iterdir())
