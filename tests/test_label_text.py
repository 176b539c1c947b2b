"""Names of labels in pictures."""

import warnings

import numpy as np
import pytest

from mljax import label_graph_picture, label_text, pictures


@pytest.mark.parametrize(
    ("text", "most", "expected"),
    [
        ("traffic light", 13, "traffic light"),
        ("traffic light", 12, "traffic\u2026ight"),
        ("a\n b", 3, "a b"),
        ("\u4eba\u3068\u304f\u308b\u307e", 10, "\u4eba\u3068\u304f\u308b\u307e"),
        ("\u4eba\u3068\u304f\u308b\u307e", 9, "\u4eba\u3068\u2026\u307e"),
        ("cafe\u0301", 4, "cafe\u0301"),
    ],
)
def test_shorten(text, most, expected):
    shown = label_text.shorten(text, most)
    assert shown == expected and label_text.width(shown) <= most


def test_names_stay_in_their_pictures_and_no_letter_is_a_warning(tmp_path, caplog):
    names = ["\u4eba\u3068", "\u0926\u0941", 20 * "of many words ", "x$y$z"]
    edges = np.array([[0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0]], float)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images = [np.zeros((9, 9, 3), np.uint8)] * 4
        pictures.contact_sheet(tmp_path / "1.png", images, np.eye(4), names)
        label_graph_picture.draw(tmp_path / "2.png", names, edges, 0.5)
    assert not caplog.records

    with label_text.all_scripts():
        made = label_graph_picture.figure(names, edges, 0.5)
        made.canvas.draw()
        for text in made.axes[0].texts:
            box = text.get_window_extent()
            assert 0 <= box.x0 and box.x1 <= made.bbox.x1, text.get_text()
            assert 0 <= box.y0 and box.y1 <= made.bbox.y1, text.get_text()
