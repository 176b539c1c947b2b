"""The held-out images of a checkpoint's own run, to choose thresholds or measure on."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mljax import config as configs
from mljax.errors import UserError, complain

if TYPE_CHECKING:
    from mljax.data.source import Source

CHOICES = ("holdout", "val")


def load(
    about: Mapping[str, Any], which: str | None, root: str | None
) -> tuple["Source", str]:
    """The images, and what to call them.

    Args:
        about: the description of a checkpoint.
        which: "val", "holdout" (the part of train that data.holdout kept out), or
            None: holdout where the run has one, else val.
        root: the folder of the data; None = where the run had it.

    Images that cannot be read are among them: they are read with data.on_error "skip",
    and `left_out` says how many they were.

    Raises:
        UserError: the data cannot be read, or has other classes than the checkpoint.
    """
    from mljax import results
    from mljax.data import DATASETS
    from mljax.run import check_names

    config = configs.from_dict(about["config"])
    if root is not None:
        config.data.root = root
    if not config.data.root and config.data.name not in ("shapes", "tfds"):
        raise UserError("--root FOLDER must say where the data is")
    config.data.on_error = "skip"
    configs.validate(config, chosen=())
    check_names(config)
    if which == "holdout" and not config.data.holdout:
        raise UserError(
            "--data holdout: the run held nothing out of train (config.data.holdout = "
            "0); use --data val"
        )
    try:
        sources = DATASETS[config.data.name](config.data, config.seed)
    except UserError as error:
        raise UserError(f"{error} (here: --root FOLDER)") from error
    source, name = sources.val, "val"
    if which != "val" and sources.holdout is not None:
        source, name = sources.holdout, f"{config.data.holdout:.0%} held out of train"
    elif sources.holdout is None:
        name = "val, on which the best epoch was chosen too"
    results.need_positives(source, name)
    if source.class_names != about["class_names"]:
        off = sorted(set(source.class_names) ^ set(about["class_names"]))
        raise UserError(
            f"the data has other classes than the checkpoint (check "
            f"{', '.join(off[:5]) or 'their order'}); --root names its folder"
        )
    if source is sources.holdout:
        before = about.get("data", {}).get("holdout images")
        if before not in (None, source.fingerprint()):
            raise UserError(
                "--data holdout: the training data has changed since the run, and with "
                "it what is held out of it: it may hold images that were trained on; "
                "use --data val, or the data as it was"
            )
    return source, name


def left_out(count: int, of: int) -> None:
    """Says how many images could not be read; raises UserError where all could not."""
    if count == of:
        raise UserError(
            "none of the held-out images can be read; --root FOLDER says where they are"
        )
    if count:
        complain(f"{count} of the {of} held-out images cannot be read and are left out")
