import struct
import warnings
from xml.etree import ElementTree

import pytest

from story_llm import plot_losses


def history(steps, with_validation=True):
    return [{"step": i, "epoch": i / 4, "train_loss": 5.0 - i / 10, "val_loss": 5.0 if with_validation else None,
             "tokens": i * 64, "recall": None}
            for i in steps]


HISTORIES = [history(range(0, 20, 5)), history(range(0, 20, 5), with_validation=False), history([0]), history([0, 1])]


@pytest.fixture(autouse=True)
def warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("entries", HISTORIES, ids=len)
def test_a_png_picture_is_drawn(tmp_path, entries):
    plot_losses(entries, 300, tmp_path / "loss.png")
    content = (tmp_path / "loss.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", content[16:24])
    assert width > height > 300


def lines_of_svg(path):
    root = ElementTree.parse(path).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    return [e for e in root.iter("{http://www.w3.org/2000/svg}g") if e.get("id", "").startswith("line2d")]


def test_an_svg_picture_is_drawn_and_has_one_curve_less_without_validation(tmp_path):
    plot_losses(HISTORIES[0], 300, tmp_path / "both.svg")
    plot_losses(HISTORIES[1], 300, tmp_path / "one.svg")
    assert len(lines_of_svg(tmp_path / "one.svg")) < len(lines_of_svg(tmp_path / "both.svg"))


def test_nothing_to_draw_and_an_unknown_kind_of_picture_are_refused(tmp_path):
    with pytest.raises(ValueError, match="history"):
        plot_losses([], 300)
    with pytest.raises(ValueError, match="xyz"):
        plot_losses(HISTORIES[0], 300, tmp_path / "loss.xyz")
