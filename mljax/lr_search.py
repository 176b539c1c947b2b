"""The training that `mljax.find_lr` does: the range test, and the trials of TPE."""

import math
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from mljax import config as configs
from mljax import lr_range, pictures, results, sharding, train, workdir
from mljax.data import pipeline
from mljax.errors import UserError
from mljax.optim import Optimizer
from mljax.progress import Progress
from mljax.step import TrainState

STUDY = "study.db"
_RANDOM_TRIALS = 5  # before TPE has something to go by
_WHOLE_TRIALS = 4  # before one can be cut off


def adjustable(optimizer: Optimizer) -> Optimizer:
    """`optimizer` with a factor on its learning rate, 1 at first, kept in its state.

    So one compiled step serves every learning rate. Updates are proportional to the
    learning rate in every optimiser of `optim`, and its schedules to `lr`.
    """

    def init(params: Any) -> dict[str, Any]:
        return {"factor": jnp.ones(()), "inner": optimizer.init(params)}

    def update(grads: Any, state: Any, params: Any, step: Any) -> tuple[Any, Any]:
        updates, inner = optimizer.update(grads, state["inner"], params, step)
        updates = jax.tree.map(lambda u: state["factor"].astype(u.dtype) * u, updates)
        return updates, {"factor": state["factor"], "inner": inner}

    return optimizer._replace(init=init, update=update)


def prepare(config: ConfigDict, settings: Mapping[str, Any]) -> "Search":
    """The config as a search by `settings` trains it, ready to begin.

    Raises:
        UserError: the data, the weights or the devices do not fit.
    """
    config = configs.from_dict(config.to_dict())
    config.optim.lr = 1.0  # the factor of `adjustable` is the learning rate
    if settings["method"] == "range":
        cycles = config.optim.schedule == "one_cycle" and config.optim.cycle_momentum
        key = "momentum" if config.optim.name == "sgd" else "b1"
        if cycles and not config.optim[key]:
            config.optim[key] = 0.85  # what the cycle gives at the peak of the rate
        config.optim.schedule = "constant"
        config.optim.freeze_epochs = 0  # what is frozen at first is so in all of it
        config.ema.decay = config.ema.half_life = 0.0
    else:
        config.epochs = settings["epochs"]
        if config.optim.freeze_epochs >= config.epochs:
            raise UserError(
                f"--epochs={config.epochs}: must be above config.optim.freeze_epochs = "
                f"{config.optim.freeze_epochs}, else no trial trains what the run does"
            )
    configs.validate(config, chosen=())
    if jax.process_count() > 1:
        raise UserError("mljax.find_lr runs in one process: start it on one host")
    return Search(config)


class Search:
    """A config's training, begun again and again with other learning rates."""

    def __init__(self, config: ConfigDict):
        self.config = config
        self.made = train.setup(config, adjustable)
        self.unreadable: set[str] = set()
        for note in self.made.notes:
            print(f"weights: {note}")

    def title(self) -> str:
        config = self.config
        sam = f", SAM {config.sam.rho:g}" if config.sam.rho else ""
        return (
            f"{config.model.backbone} + {config.model.head}, {config.loss.name}, "
            f"{config.optim.name}{sam}, batch size {config.batch_size}"
        )

    def begin(self, lr: float) -> TrainState:
        """The state of step 0, on the devices."""
        return with_lr(self.made.initial(), lr)

    def step(self, at: int, state: TrainState, batch: Any) -> tuple[TrainState, Any]:
        """The run's own step `at`, counted from 1."""
        bad = batch["index"][~batch["ok"]]
        names = self.made.sources.train.names
        self.unreadable.update(names[i] for i in bad)
        return self.made.step_at(at)(state, self.made.place(batch), self.made.seed)

    def batches(self) -> Iterator[Any]:
        """Those that a run of the config trains on, from its first step on."""
        return pipeline.train_batches(
            self.made.sources.train,
            data_config=self.config.data,
            batch_size=self.config.batch_size,
            seed=self.config.seed,
        )


def with_lr(state: TrainState, lr: float) -> TrainState:
    factor = np.float32(lr)
    return replace(state, opt_state={**state.opt_state, "factor": factor})


# ---------------------------------------------------------------------- the range test


def by_range(
    search: Search, folder: Path, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Runs the range test; writes curve.csv and curve.png into `folder`.

    Returns:
        "lr", the suggestion, and "lowest", where the smoothed loss was lowest.

    Raises:
        UserError: the loss did not fall.
    """
    low, high, steps = settings["min"], settings["max"], settings["steps"]
    print(f"range test: {steps} steps, learning rate {low:g} to {high:g}", flush=True)
    curve = range_test(search, lr_range.ramp(low, high, steps))
    workdir.write_text(folder / "curve.csv", curve.csv())
    picture, title = folder / "curve.png", f"range test: {search.title()}"
    try:
        found = lr_range.suggest(curve)
    except UserError as error:
        lr_range.draw(picture, curve, None, title)
        raise UserError(f"{error} (the curve: {picture})") from None
    lr_range.draw(picture, curve, found, title)
    return {"lr": three_digits(found.steepest), "lowest": three_digits(found.lowest)}


def range_test(search: Search, lrs: np.ndarray) -> lr_range.Curve:
    """Trains with each of `lrs` [steps] for one step, until the loss diverges."""
    curve, batches = lr_range.Curve(), search.batches()
    state = search.begin(lrs[0])
    for at, lr in enumerate(lrs.tolist(), 1):
        state, metrics = search.step(at, with_lr(state, lr), next(batches))
        loss = float(metrics["loss"]) if metrics["finite"] else math.nan
        diverged = curve.add(lr, loss)
        if diverged or at % max(1, len(lrs) // 10) == 0:
            text = f"step {at}/{len(lrs)}  lr {lr:.3g}  loss {loss:.4g}"
            print(text + ("  diverged" if diverged else ""), flush=True)
        if diverged:
            break
    return curve


# ------------------------------------------------------------------------------- trials


def by_trials(
    search: Search, folder: Path, settings: Mapping[str, Any], first: float
) -> dict[str, Any]:
    """Trials until there are enough; writes trials.csv and trials.png into `folder`.

    Args:
        first: the learning rate of the first trial, if it is within the range.

    Returns:
        "lr" of the best trial, its "mAP", and "judged_on".

    Raises:
        UserError: every trial diverged, or their storage fails.
    """
    low, high, count = settings["min"], settings["max"], settings["trials"]
    epochs, judge = settings["epochs"], search.made.chosen_on
    print(
        f"search: {count} trials of {epochs} epochs, learning rate {low:g} to {high:g}"
    )
    advice = "; data.holdout judges on a part of train instead"
    held_out = search.made.sources.holdout is not None
    print(f"judged on {judge}{'' if held_out else advice}", flush=True)
    with _storage(folder / STUDY):
        study = Study(folder, low, high, search.config.seed)
        while len(trials := study.trials()) < count:
            trial = study.ask(first)
            lr = trial.user_attrs["lr"]
            print(f"trial {len(trials) + 1}/{count}: lr {lr:g}", flush=True)
            study.tell(trial, run_trial(search, trial))
            workdir.write_text(folder / "trials.csv", csv(study.trials(), epochs))
    trials = sorted(trials, key=lambda trial: -trial.best)
    print("\n".join(["", f"{'lr':<10} mAP after each epoch", *map(describe, trials)]))
    # One that was cut off has not shown what it can do.
    whole = [trial for trial in trials if trial.outcome == "whole"]
    if not whole:
        raise UserError("every learning rate diverged: try another --min and --max")
    best = whole[0]
    title = f"{search.title()}, {epochs} epochs"
    draw_trials(folder / "trials.png", trials, best, title)
    return {"lr": best.lr, "mAP": best.best, "judged_on": judge}


@contextmanager
def _storage(file: Path) -> Iterator[None]:
    """What goes wrong with Optuna's storage as one line."""
    from optuna.exceptions import OptunaError
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (OptunaError, SQLAlchemyError, sqlite3.Error) as error:
        cause: BaseException = error
        while cause.__cause__:  # what each has wrapped
            cause = cause.__cause__
        raise UserError(
            f"{file}: the trials cannot be read or written ({cause}); if the disk is "
            "not full and the folder may be written to, delete this file to begin anew"
        ) from None


class Trial(NamedTuple):
    """A learning rate that was tried.

    Attributes:
        outcome: "whole", "cut off" (worse than the median) or "diverged".
        mAP: after each epoch, in [0, 1].
    """

    lr: float
    outcome: str
    mAP: list[float]

    @property
    def best(self) -> float:
        return 0.0 if self.outcome == "diverged" else max(self.mAP)


class Study:
    """Trials in Optuna's storage in `folder`, which outlives a kill.

    A trial that a kill cut short is run again, with the same learning rate: what is
    tried follows from the seed and the trials that have ended.
    """

    def __init__(self, folder: Path, low: float, high: float, seed: int):
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.optuna, self.low, self.high, self.seed = optuna, low, high, seed
        self.states = optuna.trial.TrialState
        # Opened here: in a URL some characters of a path mean something else.
        opened = partial(sqlite3.connect, folder / STUDY, check_same_thread=False)
        storage = optuna.storages.RDBStorage(
            f"sqlite:///{STUDY}", engine_kwargs={"creator": opened}
        )
        self.study = optuna.create_study(
            storage=storage,
            study_name="learning_rate",
            direction="maximize",
            pruner=optuna.pruners.MedianPruner(n_startup_trials=_WHOLE_TRIALS),
            load_if_exists=True,
        )
        for trial in self.study.get_trials(states=(self.states.RUNNING,)):
            self.study.tell(trial.number, state=self.states.FAIL)

    def trials(self) -> list[Trial]:
        """Those that have ended, the oldest first."""
        states = (self.states.COMPLETE, self.states.PRUNED)
        return [
            Trial(
                t.user_attrs["lr"],
                t.user_attrs["outcome"],
                [mAP for _, mAP in sorted(t.intermediate_values.items())],
            )
            for t in self.study.get_trials(states=states)
        ]

    def ask(self, first: float) -> Any:
        """A new trial, with user_attrs["lr"]; that of the very first is `first`."""
        done = len(self.trials())
        waiting = self.study.get_trials(states=(self.states.WAITING,))
        if not done and not waiting and self.low <= first <= self.high:
            self.study.enqueue_trial({"lr": first})
        self.study.sampler = self.optuna.samplers.TPESampler(
            n_startup_trials=_RANDOM_TRIALS, seed=self.seed + done
        )
        trial = self.study.ask()
        lr = trial.suggest_float("lr", self.low, self.high, log=True)
        trial.set_user_attr("lr", three_digits(lr))
        return trial

    def tell(self, trial: Any, outcome: str) -> None:
        trial.set_user_attr("outcome", outcome)
        if outcome == "cut off":
            self.study.tell(trial, state=self.states.PRUNED)
        else:
            reported = self.study.trials[trial.number].intermediate_values.values()
            self.study.tell(trial, 0.0 if outcome == "diverged" else max(reported))


def run_trial(search: Search, trial: Any) -> str:
    """Trains with the learning rate of `trial`, reports to it, returns its outcome."""
    made, progress = search.made, Progress()
    state, batches = search.begin(trial.user_attrs["lr"]), search.batches()
    for at in range(1, made.total_steps + 1):
        state, metrics = search.step(at, state, next(batches))
        try:
            progress.take(sharding.fetch(metrics), search.config.train.max_bad_steps)
        except UserError:  # too many steps in a row were not finite
            return "diverged"
        epoch, inside = divmod(at, made.steps_per_epoch)
        if inside:
            continue
        variants = results.variants(state, made.run.is_pair)
        scores = made.run.scores(variants, made.judge)
        row, _ = results.row(at, epoch, progress, scores, made.run)
        trial.report(row["mAP"], epoch)
        print(f"  epoch {epoch}: mAP {100 * row['mAP']:.2f}", flush=True)
        if at < made.total_steps and trial.should_prune():
            return "cut off"
    return "whole"


def describe(trial: Trial) -> str:
    figures = "  ".join(f"{100 * mAP:.2f}" for mAP in trial.mAP)
    outcome = "" if trial.outcome == "whole" else trial.outcome
    return f"{trial.lr:<10g} {figures}  {outcome}".rstrip()


def csv(trials: list[Trial], epochs: int) -> str:
    """One line a trial."""
    lines = ["lr,outcome," + ",".join(f"mAP_epoch_{i + 1}" for i in range(epochs))]
    for trial in trials:
        figures = [f"{mAP:.6f}" for mAP in trial.mAP] + [""] * (epochs - len(trial.mAP))
        lines.append(",".join([f"{trial.lr:g}", trial.outcome, *figures]))
    return "\n".join(lines) + "\n"


def three_digits(lr: float) -> float:
    """What is found is what is later typed."""
    return float(f"{lr:.3g}")


def draw_trials(file: Path, trials: list[Trial], best: Trial, title: str) -> None:
    """Writes a PNG: the mAP of every trial over its learning rate."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for outcome, marker, colour, label in (
        ("whole", "o", "#08306b", "best epoch"),
        ("cut off", "x", "#6b9ac4", "cut off: until then"),
        ("diverged", "v", "#8a6d00", "diverged"),
    ):
        some = [t for t in trials if t.outcome == outcome]
        if some:
            x, y = [t.lr for t in some], [100 * t.best for t in some]
            axis.plot(x, y, marker, color=colour, markersize=7, label=label)
    axis.axvline(best.lr, color="#c62828", linewidth=1.5, label=f"{best.lr:g}  best")
    axis.set(xscale="log", xlabel="learning rate (config.optim.lr)", ylabel="mAP")
    axis.set_title(title, fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(loc="best", framealpha=1)
    pictures.save(figure, file)
