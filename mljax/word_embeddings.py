"""A vector for every label: from a file of the user's, or random ones that stay."""

import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from mljax.errors import UserError


def random_embeddings(
    names: Sequence[str], dim: int = 300, std: float = 0.4
) -> np.ndarray:
    """float32 [labels, dim], drawn N(0, std^2); 0.4 is the spread of GloVe's numbers.

    A label's vector depends on its name alone: it is the same in every run and data
    set, so that weights can be taken from one to the other.
    """
    rows = [
        np.random.default_rng(zlib.crc32(name.encode())).standard_normal(dim)
        for name in names
    ]
    return (std * np.reshape(rows, (len(names), dim))).astype(np.float32)


def load_embeddings(
    path: str | Path, names: Sequence[str], std: float = 0.4
) -> tuple[np.ndarray, list[str]]:
    """The vectors of the labels `names` from a file, and what to tell the user.

    Args:
      path: an .npy array [labels, dim] in the order of `names`, or a text file of
        GloVe or word2vec: a word and its numbers a line.
      names: of the labels. One of several words ("dining table", "dining_table") has
        the mean of their vectors, unless the file has it as one word with "_".
      std: of the random vectors that labels without any known word get.

    Returns:
      float32 [labels, dim], and a line for each kind of unknown word, naming them.

    Raises UserError if the file is missing, is of another kind or size, or has none of
    the words.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"model.graph.embeddings {path}: there is no such file")
    if path.suffix == ".npy":
        return _read_npy(path, len(names)), []
    words = {name: _words(name) for name in names}
    wanted = {
        form
        for name in names
        for word in (_joined(name), *words[name])
        for form in (word, word.lower())
    }
    vectors = _read_text(path, wanted)

    def find(word: str) -> np.ndarray | None:
        return vectors.get(word, vectors.get(word.lower()))

    rows, unknown, partly = [], [], []
    dim = len(next(iter(vectors.values())))
    for name in names:
        whole = find(_joined(name))
        parts = {word: find(word) for word in words[name]}
        known = [vector for vector in parts.values() if vector is not None]
        if whole is not None:
            rows.append(whole)
        elif known:
            rows.append(np.mean(known, 0))
            missing = [word for word, vector in parts.items() if vector is None]
            partly += [f"{word!r} of {name!r}" for word in missing]
        else:
            rows.append(random_embeddings([name], dim, std)[0])
            unknown.append(name)
    notes = []
    if unknown:
        notes.append(
            f"no word vector for {len(unknown)} of {len(names)} labels, which have a "
            f"random one: {', '.join(unknown)}"
        )
    if partly:
        notes.append(f"no word vector, left out of the mean: {', '.join(partly)}")
    return np.asarray(rows, np.float32), notes


def _joined(name: str) -> str:
    return "_".join(name.split())


def _words(name: str) -> list[str]:
    return [word for word in re.split(r"[\s_/,()-]+", name) if word]


def _read_npy(path: Path, count: int) -> np.ndarray:
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise UserError(f"model.graph.embeddings {path}: {error}") from error
    if not isinstance(array, np.ndarray):
        raise UserError(
            f"model.graph.embeddings {path}: is an .npz archive; save the one array "
            "with numpy.save"
        )
    number = np.issubdtype(array.dtype, np.number)
    if array.ndim != 2 or len(array) != count or not number:
        raise UserError(
            f"model.graph.embeddings {path}: has shape {list(array.shape)}; needs one "
            f"row of numbers for each of the {count} labels"
        )
    if not np.isfinite(array).all():
        raise UserError(f"model.graph.embeddings {path}: holds NaN or infinity")
    return array.astype(np.float32)


def _read_text(path: Path, wanted: set[str]) -> dict[str, np.ndarray]:
    """word -> vector; read line by line, as such a file may not fit in memory."""
    vectors: dict[str, np.ndarray] = {}
    dim = 0
    with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
        for number, line in enumerate(file):
            if number == 0:
                first = line.split()
                header = len(first) == 2  # word2vec: how many words, how many numbers
                dim = int(first[1]) if header and first[1].isdigit() else len(first) - 1
            word, _, rest = line.partition(" ")
            if word not in wanted or word in vectors:
                continue
            values = rest.split()
            if len(values) != dim:  # a token with spaces in it, as GloVe has some
                continue
            try:
                vectors[word] = np.array(values, np.float32)
            except ValueError:
                raise UserError(
                    f"model.graph.embeddings {path}: line {number + 1} ({word!r}) has "
                    "something other than numbers"
                ) from None
            if not np.isfinite(vectors[word]).all():
                raise UserError(
                    f"model.graph.embeddings {path}: line {number + 1} ({word!r}) "
                    "holds NaN or infinity"
                )
    if not vectors:
        raise UserError(
            f"model.graph.embeddings {path}: has none of the labels' words; needs a "
            "text file with a word and its numbers in each line (GloVe, word2vec text "
            "format), or an .npy array"
        )
    return vectors
