"""Long tables show their two ends and say where the rest is."""

from mljax import tables


def test_ends_of_a_long_table():
    lines = [str(i) for i in range(41)]
    assert tables.ends(lines[:40], "all.json") == lines[:40]
    shown = tables.ends(lines, "all.json")
    assert shown == [*lines[:10], "... 21 more: all.json", *lines[31:]]


def test_count():
    assert [tables.count(n, "image") for n in (0, 1, 2)] == [
        "0 images",
        "1 image",
        "2 images",
    ]
