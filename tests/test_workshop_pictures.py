"""Pictures in every script: the fonts in which the tokens are drawn. These tests replace matplotlib's list of fonts, so
they hold whatever fonts are installed."""
import io
import warnings
from pathlib import Path

import matplotlib
import pytest
from matplotlib import font_manager
from matplotlib.figure import Figure

from helpers import story_llm, tiny
from scripts import TAMIL
from story_llm import installed_fonts, label_fonts, not_in_font, plot_attention

SHIPPED = Path(matplotlib.get_data_path(), "fonts/ttf")
IN_STIX = "ⓐⓑ"                 # STIXGeneral has them, DejaVu Sans does not
NOWHERE = "த\u0378\U0010fffd"    # Tamil, unassigned, private


@pytest.fixture
def only(monkeypatch):
    """Let matplotlib know DejaVu Sans and the shipped fonts of these files, and no other."""
    def use(*files, system=()):
        monkeypatch.setattr(font_manager.fontManager, "ttflist", [])
        for file in ("DejaVuSans.ttf", *files):
            font_manager.fontManager.addfont(SHIPPED / file)
        monkeypatch.setattr(font_manager, "findSystemFonts", lambda: list(map(str, system)))
    return use


def fonts_for(text):
    """(the fonts, the characters that none of them has)"""
    return label_fonts([text])[1:]


def draw(names):
    names, families, missing = label_fonts(names)
    figure = Figure()
    axes = figure.subplots()
    axes.set_xticks(range(len(names)), names, family=families, parse_math=False)
    for ending in ("png", "svg", "pdf"):
        figure.savefig(io.BytesIO(), format=ending)
    return [label.get_text() for label in axes.get_xticklabels()]


def test_no_font_is_looked_for_when_the_default_has_all(only, monkeypatch):
    only("STIXGeneral.ttf")
    monkeypatch.delattr(story_llm, "installed_fonts")
    assert fonts_for("Once ␣⏎→□ Жил царь كان �") == (matplotlib.rcParams["font.family"], set())


def test_an_installed_font_fills_the_gaps(only):
    only("STIXGeneral.ttf", "cmr10.ttf")
    assert fonts_for("a" + IN_STIX) == (["sans-serif", "STIXGeneral"], set())
    assert fonts_for(IN_STIX + NOWHERE) == (["sans-serif", "STIXGeneral"], set(NOWHERE))


def test_the_boxes_of_a_last_resort_font_do_not_count(only):
    only(*[path.name for path in SHIPPED.glob("LastResort*")])      # since matplotlib 3.11
    assert fonts_for(NOWHERE) == (["sans-serif"], set(NOWHERE))


def test_a_picture_of_missing_characters_warns_of_nothing(only):
    only("STIXGeneral.ttf")
    before = dict(matplotlib.rcParams)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        labels = draw(["Once", "␣" + NOWHERE, IN_STIX, "$", "x$"])
    assert labels == ["Once", "␣□□□", IN_STIX, "$", "x$"]
    assert dict(matplotlib.rcParams) == before


def test_a_newer_font_is_found_and_a_broken_one_ignored(only, tmp_path):
    broken = tmp_path / "broken.ttf"
    broken.write_bytes(b"no font at all")
    gone = tmp_path / "gone.ttc"
    only(system=[broken, SHIPPED / "STIXGeneral.ttf", gone])
    assert fonts_for(IN_STIX) == (["sans-serif", "STIXGeneral"], set())
    assert not_in_font(str(broken), {"a"}) == not_in_font(str(gone), {"a"}) == {"a"}


def test_upright_fonts_are_preferred_in_their_regular_weight(only):
    only("DejaVuSans-Bold.ttf", "DejaVuSans-Oblique.ttf", "STIXGeneralBol.ttf", "STIXGeneral.ttf")
    files = [Path(font.fname).name for font in installed_fonts()]
    assert files == ["DejaVuSans.ttf", "STIXGeneral.ttf", "DejaVuSans-Bold.ttf", "STIXGeneralBol.ttf"]


def test_the_attention_picture_of_a_text_in_another_script_warns_of_nothing_and_says_what_is_missing(only):
    """A box stands for each letter that no font has. Before, dozens of lines said that glyphs were missing."""
    only()
    run, _ = tiny(TAMIL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = plot_attention(run, TAMIL[:40])
        figure.savefig(io.BytesIO(), format="png")
    assert {character for character in TAMIL[:40] if character not in " .,"} >= figure.missing_characters > set()
    assert "□" in figure.axes[0].get_yticklabels()[0].get_text()


def test_the_note_names_a_letter_that_no_font_has_and_the_remedy(only, folder, call, small):
    only()
    (folder / "tamil.txt").write_text(TAMIL, encoding="utf-8")
    assert call(*small("train", "--text", "tamil.txt", "--epochs", "1"))[0] == 0
    status, out, err = call("attention")
    assert (status, out, err.count("\n")) == (0, "drew attention.png\n", 1)
    assert err.startswith("note: ") and "TAMIL LETTER" in err and "Noto" in err
