"""A CSV file with a line an image: a column for each label, or one that lists them.

    image,cat,dog            image,labels,unknown
    photos/1.jpg,1,0         photos/1.jpg,cat,
    photos/2.jpg,,-1         photos/2.jpg,,dog

Paths are relative to the file, or to data.train_images / data.val_images in data.root.
A label column holds 1 (present), 0 (absent), -1 (unknown) or nothing, which means what
`data.table.empty` says. In a list, labels stand between `data.table.separator`s (or as
a list of Python or numpy: ['cat', 'dog'], ['cat' 'dog'], [3, 10]); those in the column
`data.table.unknown` are unknown unless they are in the first list too. Lines with lists
that name an image again add to its labels. The labels are sorted by name, or by value
if all are numbers: the label columns, or what occurs in the lists of both splits
(data.classes names a file that lists them).

Two files, data.train and data.val; or one, `data.table.file`, of which data.train and
data.val are values in the column `data.table.split`.
"""

import ast
import csv
import io
import os
import tokenize
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from mljax.data import files
from mljax.data.source import Source
from mljax.errors import UserError

_VALUES = {
    **{"1": 1, "1.0": 1, "true": 1},
    **{"0": 0, "0.0": 0, "false": 0},
    **{"-1": -1, "-1.0": -1},
}
_EMPTY = {"absent": 0, "unknown": -1}
_DELIMITERS = {"tab": "\t"}
_MOST_CELLS = 10**9  # of a table of labels that are most likely none
_SEPARATORS = (",", ";", "|", "/", " ")  # that people put between labels


class _Table(NamedTuple):
    path: str
    header: list[str]
    rows: list[tuple[int, list[str]]]  # line number, cells


def load(data_config: ConfigDict, seed: int = 0) -> dict[str, Source]:
    """The files data.train and data.val in data.root, or two parts of one file.

    Raises UserError where a file is missing or wrong.
    """
    del seed
    tables = {split: _read(data_config, split) for split in ("train", "val")}
    if data_config.table.labels:
        return _from_lists(data_config, tables)
    if data_config.classes:
        raise UserError(
            f"data.classes = {data_config.classes}: does nothing where each label has "
            "a column of its own: name these columns with data.table.columns"
        )
    sources = {}
    for split, table in tables.items():
        names = _label_columns(data_config, table)
        labels = _cells(data_config, table, names)
        sources[split] = _source(data_config, split, table, names, labels)
    files.check_same_classes(data_config, sources)
    return sources


def _read(data_config: ConfigDict, split: str) -> _Table:
    options = data_config.table
    path = os.path.join(data_config.root, options.file or data_config[split])
    text = files.read_text(path, "data.train and data.val name CSV files in data.root")
    delimiter = _DELIMITERS.get(options.delimiter, options.delimiter)
    reader = csv.reader(
        io.StringIO(text), delimiter=delimiter, strict=True, skipinitialspace=True
    )
    try:
        lines = [
            (reader.line_num, cells)
            for cells in reader
            if any(cell.strip() for cell in cells)  # programs leave rows of blanks
        ]
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: {error}") from None
    if not lines:
        raise UserError(f"{path}: is empty")
    header = [cell.strip() for cell in lines[0][1]]
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        raise UserError(
            f"{path}, line 1: column {files.quoted(repeated[0])} stands there twice"
        )
    rows = lines[1:]
    table = _Table(path, header, rows)
    for number, cells in rows:
        if len(cells) != len(header):
            raise UserError(
                f"{path}, line {number}: has {len(cells)} cells, the first line "
                f"{len(header)}{_other_delimiter(table)}"
            )
    if options.split:
        at = _column(table, options.split, "data.table.split")
        rows = [row for row in rows if row[1][at].strip() == data_config[split]]
        if not rows:
            raise UserError(
                f"{path}: no line has {data_config[split]!r} in the column "
                f"{options.split!r} (data.{split})"
            )
    if not rows:
        raise UserError(f"{path}: lists no image below its first line")
    return table._replace(rows=rows)


def _column(table: _Table, name: str, key: str) -> int:
    if name not in table.header:
        known = ", ".join(table.header)[:200]
        raise UserError(
            f"{table.path}, line 1: has no column {name!r} ({key}); it has "
            f"{known!r}{_other_delimiter(table)}"
        )
    return table.header.index(name)


def _other_delimiter(table: _Table) -> str:
    """What to add to an error where the first line is one cell with several names."""
    marks = {";": ";", "\t": "tab", ",": ","}
    (first, *others) = table.header
    found = [mark for mark in marks if mark in first and not others]
    if not found:
        return ""
    return f" (data.table.delimiter={marks[found[0]]!r} would split that)"


def _label_columns(data_config: ConfigDict, table: _Table) -> list[str]:
    """The names of the label columns, sorted."""
    options = data_config.table
    _column(table, options.image, "data.table.image")
    given = [name.strip() for name in options.columns.split(",") if name.strip()]
    for name in given:
        _column(table, name, "data.table.columns")
    others = {options.image} | ({options.split} if options.split else set())
    names = _sorted(set(given) or {n for n in table.header if n not in others})
    if "" in names:
        raise UserError(
            f"{table.path}, line 1: column {table.header.index('') + 1} has no name; "
            "give it one, or name the label columns with data.table.columns"
        )
    if not names:
        raise UserError(
            f"{table.path}, line 1: needs a name for each label column (or name the "
            "column that lists the labels with data.table.labels)"
        )
    return names


def _cells(data_config: ConfigDict, table: _Table, names: list[str]) -> np.ndarray:
    """The label columns: int8 [num_images, num_classes]."""
    values = _VALUES | {"": _EMPTY[data_config.table.empty]}
    places = [table.header.index(name) for name in names]
    labels = np.zeros((len(table.rows), len(names)), np.int8)
    for row, (number, cells) in enumerate(table.rows):
        try:
            labels[row] = [values[cells[at].strip().lower()] for at in places]
        except KeyError as error:
            found = str(error.args[0])
            at = next(at for at in places if cells[at].strip().lower() == found)
            name = table.header[at]
            raise UserError(
                f"{table.path}, line {number}: column {files.quoted(name)} must be 1, "
                f"0, -1 or empty, found {files.quoted(found)} (data.table.columns "
                "names the label columns where others stand beside them)"
            ) from None
    return labels


def _from_lists(
    data_config: ConfigDict, tables: dict[str, _Table]
) -> dict[str, Source]:
    options = data_config.table
    columns = {"labels": options.labels, "unknown": options.unknown}
    separator = _DELIMITERS.get(options.separator, options.separator)

    def read_lists(table: _Table) -> list[list[list[str]]]:
        """For each line its labels and, with data.table.unknown, its unknown labels."""
        places = [
            _column(table, name, f"data.table.{key}")
            for key, name in columns.items()
            if name
        ]
        return [
            [_names(table.path, number, cells[at], separator) for at in places]
            for number, cells in table.rows
        ]

    lists = {split: read_lists(table) for split, table in tables.items()}
    occur = {
        name: (table.path, number)
        for split, table in tables.items()
        for (number, _), found in zip(table.rows, lists[split], strict=True)
        for names in found
        for name in names
    }
    class_names = _sorted(occur)
    if data_config.classes:
        file = os.path.join(data_config.root, data_config.classes)
        class_names = _sorted(files.class_names_of(file))
        if other := sorted(occur.keys() - set(class_names)):
            path, number = occur[other[0]]
            raise UserError(
                f"{path}, line {number}: label {files.quoted(other[0])} is not in "
                f"{file} ({len(other)} such labels): add it there or correct it"
            )
    if not class_names:
        raise UserError(
            f"{tables['train'].path}: the column {options.labels!r} holds no label"
        )
    column = {name: i for i, name in enumerate(class_names)}
    sources = {}
    for split, rows in lists.items():
        table = tables[split]
        at = _column(table, options.image, "data.table.image")
        images = [os.path.normpath(cells[at].strip()) for _, cells in table.rows]
        first = {name: i for i, name in reversed(list(enumerate(images)))}
        keep = sorted(first.values())
        place = {images[i]: at for at, i in enumerate(keep)}
        notes = _other_separator(class_names, separator)
        too_many = (
            len(keep) * len(class_names) > _MOST_CELLS and not data_config.classes
        )
        if notes and too_many and notes[0].startswith(f"{len(class_names)} labels"):
            raise UserError(f"{table.path}: {notes[0]}")
        labels = np.zeros((len(keep), len(class_names)), np.int8)
        objects = np.zeros(labels.shape, np.uint16)
        # Positives last: they win over unknown.
        for name, found in zip(images, rows, strict=True):
            for names in found[1:]:
                labels[place[name], [column[name] for name in names]] = -1
        for name, found in zip(images, rows, strict=True):
            for label in found[0]:
                labels[place[name], column[label]] = 1
                objects[place[name], column[label]] += 1
        if again := len(rows) - len(keep):
            notes.append(
                f"{again} lines name an image again: their labels are added to it"
            )
        table = table._replace(rows=[table.rows[i] for i in keep])
        sources[split] = _source(
            data_config, split, table, class_names, labels, objects, notes
        )
    return sources


def _other_separator(labels: Sequence[str], separator: str) -> list[str]:
    """A note where labels look like lists of labels between another separator."""
    for other in _SEPARATORS:
        parts = {part.strip() for label in labels for part in label.split(other)}
        if other != separator and 2 * len(parts - {""}) < len(labels):
            return [
                f"{len(labels)} labels, which would be {len(parts - {''})} if "
                f"{other!r} separated them (data.table.separator)"
            ]
    known = set(labels)
    for other in _SEPARATORS[:3]:
        several = [
            label
            for label in labels
            if other != separator
            and other in label
            and {part.strip() for part in label.split(other)} <= known
        ]
        if several:
            return [
                f"{len(several)} labels are lists of others with {other!r} between "
                f"them, such as {files.quoted(several[0])} (data.table.separator)"
            ]
    return []


def _names(path: str, number: int, cell: str, separator: str) -> list[str]:
    """The labels in a cell."""
    cell = cell.strip()
    if not cell.startswith(("[", "{", "('", '("', '"')):
        return [name.strip() for name in cell.split(separator) if name.strip()]
    found = _listed(cell)
    if found is None:  # also a set, a tuple, an array of a database, quotes left over
        raise UserError(
            f"{path}, line {number}: {files.quoted(cell)} is no list of labels, such "
            "as ['cat', 'dog']"
        )
    return [name.strip() for name in found if name.strip()]


def _listed(text: str) -> list[str] | None:
    """The texts and whole numbers of a list as Python or numpy write it, else None."""
    marks, found = [], []
    blank = (tokenize.NEWLINE, tokenize.NL, tokenize.ENDMARKER)
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type in (tokenize.STRING, tokenize.NUMBER):
                value = ast.literal_eval(token.string)
                if type(value) not in (str, int):
                    return None
                found.append(str(value))
            elif token.type == tokenize.OP:
                marks.append(token.string)
            elif token.type not in blank:
                return None
        if [*marks[:1], *marks[-1:]] != ["[", "]"] or set(marks[1:-1]) - {","}:
            return None
        # With commas there is one between any two: Python joins texts without one.
        if marks[1:-1] and len(ast.literal_eval(text)) != len(found):
            return None
    except (ValueError, SyntaxError, tokenize.TokenError, MemoryError):
        return None
    return found


def _sorted(names: Iterable[str]) -> list[str]:
    """By value if all are whole numbers, else by name."""
    names = list(names)
    if all(name.isascii() and name.isdecimal() for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def _source(
    data_config: ConfigDict,
    split: str,
    table: _Table,
    class_names: Sequence[str],
    labels: np.ndarray,
    objects: np.ndarray | None = None,
    notes: Sequence[str] = (),
) -> Source:
    at = _column(table, data_config.table.image, "data.table.image")
    names = [cells[at].strip() for _, cells in table.rows]
    for (number, _), name in zip(table.rows, names, strict=True):
        if not name:
            raise UserError(f"{table.path}, line {number}: names no image")
    given = data_config[f"{split}_images"]
    folder = os.path.dirname(table.path)
    if given:
        folder = os.path.join(data_config.root, given)
    return files.from_files(
        table.path,
        class_names=class_names,
        labels=labels,
        names=names,
        files=[os.path.join(folder, name) for name in names],
        split=split,
        max_pixels=data_config.max_pixels,
        missing=files.missing_policy(data_config),
        folder=folder,
        objects=objects,
        notes=notes,
    )
