"""Training from the first line to the last: `train(config, workdir)`."""

import math
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from mljax import (
    backend,
    evaluate,
    find_lr,
    finetune,
    groups,
    hosts,
    label_graph_data,
    mutual,
    optim,
    preemption,
    results,
    sam,
    sharding,
    speed,
    step,
    versions,
    workdir,
)
from mljax.checkpoint import Checkpoints, finishing
from mljax.data import DATASETS, pipeline
from mljax.data.source import Source, Sources
from mljax.errors import UserError
from mljax.progress import Progress
from mljax.run import (
    Run,
    check_names,
    data_keys,
    make_augment,
    make_loss,
    make_mesh,
    make_place,
    make_run,
)
from mljax.terminal import Terminal


class Setup(NamedTuple):
    """What a config comes to before the first step.

    Attributes:
        judge: the images on which the best epoch is chosen; chosen_on: their name.
        notes: what was not taken over from `config.init_from`.
        thaw_step: the last step in which `optim.freeze` acts; 0 = it acts in all.
        state: shape, type and place of every array of the state.
        initial: gives the state of step 0, on the devices.
        seed: int32 scalar, an input of the steps: all seeds share their programs.
        place: a batch of the pipeline -> on the devices, as the steps take it.
        step_at: number of a step, from 1 on (and whether SAM has its groups: true) ->
            (state, batch, seed) -> (state, metrics), jitted; the state is donated.
    """

    sources: Sources
    judge: Source
    chosen_on: str
    run: Run
    graph: label_graph_data.LabelGraph | None
    notes: list[str]
    steps_per_epoch: int
    total_steps: int
    thaw_step: int
    state: step.TrainState
    initial: Callable[[], step.TrainState]
    seed: jax.Array
    place: Callable[[Any], Any]
    step_at: Callable[..., Callable[..., Any]]


def setup(
    config: ConfigDict,
    change: Callable[[optim.Optimizer], optim.Optimizer] = lambda same: same,
    resumes: bool = False,
) -> Setup:
    """All that training needs; `change` is applied to the optimiser.

    resumes: the weights come from a checkpoint, so that `config.init_from`, which may
    be gone from a machine that took over, is not read.

    Raises:
        UserError: the data, the weights or the devices do not fit.
    """
    backend.set_up()
    check_names(config)
    make_mesh(config)  # what does not fit is told before data is read
    sources = DATASETS[config.data.name](config.data, config.seed)
    source, names = sources.train, sources.train.class_names
    judge, chosen_on = results.choose_judge(sources, config)
    loss_fn = make_loss(config, names)
    graph = label_graph_data.build(config, source)
    run = make_run(config, names, graph)
    init_from = "" if resumes else config.init_from
    params, batch_stats, notes = mutual.load(config, run.make_model, names, init_from)
    steps_per_epoch = pipeline.steps_per_epoch(len(source), config.batch_size)
    total_steps = config.epochs * steps_per_epoch
    thaw_step = config.optim.freeze_epochs * steps_per_epoch
    optimizer = change(
        optim.make_optimizer(
            config.optim, config.batch_size, total_steps, params, thaw_step
        )
    )
    ema_decay = config.ema.decay
    if config.ema.half_life:
        ema_decay = step.half_life_decay(config.ema.half_life, config.batch_size)
        if not 0 < np.float32(ema_decay) < 1:
            raise UserError(
                f"config.ema.half_life = {config.ema.half_life}: is a decay of "
                f"{ema_decay:g} for a step of {config.batch_size} images, which must "
                "be above 0 and below 1"
            )

    def create(params: Any, batch_stats: Any) -> step.TrainState:
        return step.create_state(
            params,
            batch_stats,
            optimizer,
            use_ema=ema_decay > 0,
            keep_direction=config.sam.every_steps > 1 and config.sam.reuse > 0,
        )

    shapes = jax.eval_shape(create, params, batch_stats)
    shardings = sharding.state_sharding(shapes, run.mesh)
    # As host arrays, equal on every process, the weights go to wherever they belong.
    weights = jax.tree.map(np.asarray, (params, batch_stats))

    def initial() -> step.TrainState:
        return jax.jit(create, out_shardings=shardings)(*weights)

    rows, whole = sharding.batch_sharding(run.mesh), sharding.replicated(run.mesh)
    sam_groups = None
    if config.sam.groups > 1:
        is_mean = config.loss.reduction == "mean"
        sam_groups = groups.over_devices(config.sam.groups, run.mesh, is_mean)

    parts = config.optim.freeze
    frozen = finetune.frozen_parameters(params, parts) if parts else None
    frozen_until = (thaw_step or math.inf) if parts else 0

    # Programs of their own, compiled at their first step: nothing is computed for what
    # is frozen, nor for a perturbation in a step that has none.
    @cache
    def program(is_frozen: bool, full: bool, in_groups: bool) -> Any:
        make = partial(
            step.make_train_step,
            run.train_apply(is_frozen),
            loss_fn,
            optimizer,
            make_augment(config),
            reduction=config.loss.reduction,
            sam_rho=config.sam.rho if full else 0.0,
            sam_adaptive=config.sam.adaptive,
            sam_update_stats=config.sam.update_stats,
            sam_groups=sam_groups if in_groups else None,
            sam_every_images=config.sam.every_images,
            sam_by_momentum=config.sam.direction == "momentum",
            sam_reuse=0.0 if full else config.sam.reuse,
            ema_decay=ema_decay,
            accumulate=config.optim.accumulate,
            clip_norm=config.optim.clip_norm,
            frozen=frozen if is_frozen else None,
            is_pair=run.is_pair,
            mesh=sharding.gathered_on(run.mesh),
        )

        def train_step(state: Any, batch: Any, seed: jax.Array) -> Any:
            return make(seed=seed)(state, batch)

        return jax.jit(
            train_step,
            in_shardings=(shardings, rows, whole),
            out_shardings=(shardings, whole),
            donate_argnums=0,
        )

    def step_at(at: int, in_groups: bool = True) -> Callable[..., Any]:
        full = sam.is_full(at, config.sam.every_steps)
        return program(at <= frozen_until, full, in_groups or sam_groups is None)

    return Setup(
        sources=sources,
        judge=judge,
        chosen_on=chosen_on,
        run=run,
        graph=graph,
        notes=notes,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        thaw_step=thaw_step,
        state=sharding.abstract(shapes, shardings),
        initial=initial,
        seed=sharding.place(np.int32(config.seed), whole),
        place=make_place(config, run.mesh),
        step_at=step_at,
    )


def train(config: ConfigDict, path: str) -> dict[str, Any]:
    """Trains, or goes on where the same command stopped.

    Args:
        config: validated.
        path: the work directory: new, empty, or of a run of the same config.

    Returns:
        What metrics.json holds.

    Raises:
        UserError: the data, the weights, the devices or the work directory do not fit.
        Stopped: it was asked to stop (SIGTERM, Ctrl-C) and has saved its last step.
    """
    with workdir.Lock(path) as lock:
        return _train(config, path, lock)


def _train(config: ConfigDict, path: str, lock: workdir.Lock) -> dict[str, Any]:
    started = time.perf_counter()
    resumes = workdir.holds_checkpoint(path)
    stored = workdir.read_config(Path(path)) if resumes else None
    config, found = find_lr.resolve(config, stored)
    if resumes and jax.process_index() == 0:
        lock.open_for_training(config)  # another run may still compute, and save there
    # All else that can be wrong is found before the work directory is touched.
    made = setup(config, resumes=resumes)
    sources, run, graph = made.sources, made.run, made.graph
    steps_per_epoch, total_steps = made.steps_per_epoch, made.total_steps
    source, names = sources.train, sources.train.class_names
    speed.check_span(config.profile, total_steps)
    data = data_keys(sources, config, graph)
    others = "images, labels, class weights or label graph"
    hosts.check_same("config.data.root", others, data)
    folder = Path(path).absolute()
    if jax.process_index() == 0:
        lock.open_for_training(config)
    hosts.wait("work directory")
    workdir.check_shared(path)
    about = {
        "config": config.to_dict(),
        "class_names": names,
        "num_train": len(source.names),
        "data": data,
        "versions": versions.installed(),
        "platform": jax.default_backend(),
    }
    last = Checkpoints(folder / "checkpoints")
    best = Checkpoints(folder / "best")
    start = hosts.of_first(last.latest() or 0)
    progress = Progress()
    if start:
        saved = last.about(start)
        workdir.check_same_data(path, saved, about)
        progress = Progress.from_dict(hosts.of_first(saved["progress"]))
        progress.go_on(config.train.patience)
        if start < total_steps and not progress.stopped:
            backend.check_platform(path, saved.get("platform"))
        state = last.load(start, made.state)
    else:
        workdir.check_nothing_lost(folder)
        # There were checkpoints, and none of them is whole.
        state = (setup(config) if resumes else made).initial()
    workdir.keep_config(folder, config)
    # What came after the last whole checkpoint is computed again, to the same bits.
    done = start - progress.evaluation_due
    best.drop_after(done)
    history = workdir.read_history(folder, done, progress.best is not None)
    workdir.write_history(folder, history)
    batches = pipeline.train_batches(
        source,
        data_config=config.data,
        batch_size=config.batch_size,
        seed=config.seed,
        start_step=start,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    terminal = Terminal(config, folder, steps_per_epoch, total_steps, start)
    terminal.opening(run, sources, made.chosen_on, state.params, made.notes)
    process = f"hosts:   process {hosts.names()}" if jax.process_count() > 1 else ""
    for line in filter(None, (process, lock.note, found)):
        terminal.say(line)
    if graph is not None:
        terminal.say("\n".join(label_graph_data.report(graph)))
        if jax.process_index() == 0:
            label_graph_data.save(folder, graph)

    def absorb(at: int, metrics: Any) -> None:
        values = sharding.fetch(metrics)
        progress.take(values, config.train.max_bad_steps)
        terminal.step(at, values, progress)
        lock.keep()

    def judge(at: int, epoch: int, check: Callable[[], None] | None = None) -> None:
        """Evaluates step `at`, which is saved; keeps the weights if they are best."""
        variants = results.variants(state, run.is_pair)
        scores = run.scores(variants, made.judge, check)
        progress.unreadable.update(evaluate.unreadable(scores, made.judge.names))
        terminal.unreadable(progress)
        # One process decides: on another processor the last bit may differ.
        row, per_class = hosts.of_first(results.row(at, epoch, progress, scores, run))
        decision = progress.decide(row["mAP"], epoch, config)
        last.wait()  # so that an evaluation means that there is a checkpoint
        if decision.is_best:
            chosen = variants[results.variant(row)]
            progress.best = {**row, "per_class": per_class}
            best.save(at, chosen, {**about, "best": progress.best})
            best.wait()
        history.append(row)
        workdir.write_history(folder, history)
        results.write_summary(folder, progress, history, names, made.chosen_on)
        workdir.write_unreadable(folder, progress.unreadable)
        terminal.evaluation(row, decision)
        last.amend(at, progress=progress.to_dict())

    def save(at: int) -> None:
        terminal.flush()  # what is not done again is not written again
        progress.unreadable.update(*hosts.gather(sorted(progress.unreadable)))
        last.save(at, state, {**about, "progress": progress.to_dict()})
        workdir.write_unreadable(folder, progress.unreadable)

    batches = terminal.speed.timed(batches)
    profiler = speed.Profiler(config.profile, folder / "tensorboard")
    previous, compiled = None, set()
    with preemption.watching() as watch, finishing(last, best), profiler:
        if watch.asked_until(start):
            raise watch.stopped(start)
        if progress.evaluation_due:
            judge(start, start // steps_per_epoch, watch.stops(start, last.wait))
            terminal.restart_clock()
        for at in range(start + 1, total_steps + 1):
            if progress.stopped:
                break
            profiler.before(at)
            batch = next(batches)
            progress.see(batch, source.names, config.train.max_bad_steps)
            placed = made.place(batch)
            program = made.step_at(at)
            state, metrics = program(state, placed, made.seed)
            terminal.speed.dispatched(metrics)
            # The numbers of a step are fetched once the next one is running.
            if previous is not None:
                absorb(*previous)
            previous = at, metrics
            if program not in compiled:
                compiled.add(program)
                jax.block_until_ready(metrics)
                terminal.speed.computed()
                if at == start + 1:
                    terminal.first_step(time.perf_counter() - started)
                elif at == made.thaw_step + 1:
                    terminal.thawed()
                if jax.process_index() == 0 and at in (start + 1, made.thaw_step + 1):
                    alike = speed.period(at, config.sam.every_steps, made.thaw_step)
                    # Of SAM's groups those of one device alone would be counted.
                    steps = [made.step_at(i, in_groups=False) for i in alike]
                    flops = speed.mean_flops(steps, made.state, placed, made.seed)
                    terminal.speed.flops = flops
                terminal.restart_clock()

            epoch, inside = divmod(at, steps_per_epoch)
            due = not inside and (
                epoch % config.train.eval_every == 0 or at == total_steps
            )
            every = config.train.checkpoint_every
            stop = watch.asked(at)
            terminal.profile(profiler.after(at, metrics, stop or at == total_steps))
            if inside and not stop and not (every and at % every == 0):
                continue
            absorb(*previous)
            previous = None
            # What an evaluation is ended by costs that alone: the step is saved first.
            progress.evaluation_due = due
            save(at)
            if due and not stop:
                judge(at, epoch, watch.stops(at, last.wait))
            if progress.stopped:
                terminal.profile(profiler.end())
            if stop:
                last.close()
                best.close()
                terminal.close()
                raise watch.stopped(at)
            terminal.restart_clock()
    last.close()
    best.close()
    summary = results.finish(
        run, folder, sources, progress, history, made.chosen_on, terminal
    )
    terminal.close()
    return summary
