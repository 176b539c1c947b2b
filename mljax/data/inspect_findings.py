"""What a person should know about a data set, in sentences, the gravest first."""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from mljax.tables import count

_RARE = 10  # positives in train
_SHIFT = 3.0  # a label this many times as frequent in one split as in another


def findings(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """[{"level": "problem" | "look" | "note", "text": ...}] from the counts."""
    found = [
        *(("problem", text) for text in _problems(report)),
        *(("look", text) for text in _looks(report)),
        *(("note", text) for text in _notes(report)),
    ]
    if not any(level == "problem" for level, _ in found):
        found.insert(0, ("note", "nothing is wrong that would disturb training"))
    return [{"level": level, "text": text} for level, text in found]


def some(names: list[str], most: int = 5) -> str:
    """The first few of a list: "a, b and 7 more"."""
    shown = ", ".join(names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


def _problems(report: Mapping[str, Any]) -> list[str]:
    texts = []
    for split, counts in report["splits"].items():
        if bad := counts["unreadable"]:
            texts.append(
                f"{split}: {count(len(bad), 'image')} cannot be read, such as "
                f"{bad[0]['name']} ({bad[0]['reason']}); training stops there unless "
                "data.on_error=skip"
            )
    if leaks := [g for g in report["duplicates"] if len(g["splits"]) > 1]:
        texts.append(
            f"{' and '.join(leaks[0]['splits'])} share {count(len(leaks), 'image')}, "
            "byte for byte: what is measured there is too good"
        )
    if differ := [g for g in report["duplicates"] if g["labels_differ"]]:
        texts.append(
            f"{count(len(differ), 'image')} stand there several times with different "
            f"labels, such as {differ[0]['images'][0]['name']}"
        )
    names = report["splits"]["train"]["classes_without_positives"]
    if names:
        texts.append(
            f"train: {count(len(names), 'label')} without a positive, which nothing "
            f"can be learned of: {some(names)}"
        )
    names = report["splits"]["train"]["classes_without_negatives"]
    if names:
        texts.append(
            f"train: {count(len(names), 'label')} without a known negative, of which "
            f"only that it is always there can be learned: {some(names)}"
        )
    return texts


def _looks(report: Mapping[str, Any]) -> list[str]:
    texts = []
    for split, counts in report["splits"].items():
        names = counts["classes_without_positives"]
        if split != "train" and names:
            texts.append(
                f"{split}: {count(len(names), 'label')} without a positive, left out "
                f"of its mAP: {some(names)}"
            )
        names = counts["classes_without_negatives"]
        if split != "train" and names:
            texts.append(
                f"{split}: {count(len(names), 'label')} without a known negative, "
                f"whose AP is 100 whatever is predicted: {some(names)}"
            )
    texts += odd_names(report["class_names"])
    rare = [
        row["name"]
        for row in report["classes"]
        if 0 < row["train"]["positives"] < _RARE
    ]
    if rare:
        texts.append(
            f"train: {count(len(rare), 'label')} with fewer than {_RARE} positives: "
            f"{some(rare)}"
        )
    if moved := _moved(report):
        texts.append(
            f"{count(len(moved), 'label')} at least {_SHIFT:g} times as frequent in "
            f"train as in val, or the other way: {some(moved)}"
        )
    same = [g for g in report["duplicates"] if len(g["splits"]) == 1]
    for split in report["splits"]:
        if groups := [g for g in same if g["splits"] == [split]]:
            extra = sum(len(g["images"]) - 1 for g in groups)
            stand = "stands" if extra == 1 else "stand"
            texts.append(
                f"{split}: {count(extra, 'image')} {stand} there once more, byte for "
                "byte"
            )
    for split, counts in report["splits"].items():
        for kind, what in (("tiny", "tiny"), ("huge", "huge, slow to decode")):
            if images := counts[kind]:
                one = images[0]
                texts.append(
                    f"{split}: {count(len(images), 'image')} {what}, such as "
                    f"{one['name']} ({one['width']} x {one['height']})"
                )
        for trait, images in counts["unusual"].items():
            if trait.startswith(("named", "longer", "animated")):
                texts.append(
                    f"{split}: {count(len(images), 'image')} {trait}, such as "
                    f"{images[0]}"
                )
    return texts


def odd_names(names: Sequence[str]) -> list[str]:
    """What looks like a slip in the names of the labels, such as Cat beside cat."""
    texts = []
    same: dict[str, list[str]] = {}
    for name in names:
        plain = unicodedata.normalize("NFKC", name).casefold()
        same.setdefault(" ".join(re.split(r"[\s_-]+", plain)).strip(), []).append(name)
    groups = [group for key, group in same.items() if key and len(group) > 1]
    if groups:
        shown = " and ".join(map(repr, groups[0][:3]))
        texts.append(
            f"{count(len(groups), 'label')} in several spellings: {shown}"
            + (f", and {len(groups) - 1} more" if groups[1:] else "")
        )
    blank = [n for n in names if n != n.strip() or not n.isprintable()]
    if blank:
        shown = some(list(map(repr, blank)))
        texts.append(
            f"{count(len(blank), 'label')} with blanks at an end, line breaks or other "
            f"signs that nobody sees: {shown}"
        )
    return texts


def _notes(report: Mapping[str, Any]) -> list[str]:
    texts = []
    size = report["data"]["image_size"]
    smallest_side = min(size) if isinstance(size, list | tuple) else size
    for split, counts in report["splits"].items():
        texts += [f"{split}: {note}" for note in counts["notes"]]
        if without := counts["images_known_to_have_no_label"]:
            share = without / counts["images"]
            texts.append(
                f"{split}: {count(without, 'image')} ({share:.1%}) without any label: "
                "negatives for all (data.drop_unlabelled leaves them out)"
            )
        if unknown := counts["unknown_labels"]:
            texts.append(
                f"{split}: {count(unknown, 'label')} unknown (-1), in "
                f"{count(counts['images_with_unknown_labels'], 'image')}: "
                "they count nowhere"
            )
        sizes = counts["sizes_min_median_max"]
        if sizes and sizes["shorter_side"][1] < smallest_side:
            texts.append(
                f"{split}: half of the images have a shorter side of at most "
                f"{sizes['shorter_side'][1]} pixels and are enlarged to "
                f"data.image_size = {size}"
            )
        for trait, images in counts["unusual"].items():
            if not trait.startswith(("named", "longer", "animated", "progressive")):
                texts.append(f"{split}: {count(len(images), 'image')} {trait}")
    return texts


def _moved(report: Mapping[str, Any]) -> list[str]:
    """Labels whose share differs much between train and val, counted well enough."""
    found = []
    for row in report["classes"]:
        one, other = row["train"], row["val"]
        if one["share"] and other["share"]:
            ratio = one["share"] / other["share"]
            enough = min(one["positives"], other["positives"]) >= _RARE
            if enough and not 1 / _SHIFT < ratio < _SHIFT:
                found.append(row["name"])
    return found
