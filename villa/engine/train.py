"""``run_type=train`` and ``train_val_test``: one training run in its output folder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from villa.adversarial.ascent import AscentSettings
from villa.batch import Batch
from villa.checkpoints.layout import CHECKPOINTS, CONFIG
from villa.checkpoints.store import Checkpoint, CheckpointStore
from villa.config.printer import leaves
from villa.config.schema import RunConfig
from villa.config.validate import callback_options
from villa.datasets.base import Split
from villa.datasets.samplers import Sampler
from villa.datasets.stream import StandIn, UpdateStream
from villa.distributed.processes import Processes
from villa.distributed.strategy import strategy_of
from villa.engine.attacking import robust_values
from villa.engine.callbacks.checkpointing import CheckpointCallback, SignalCallback
from villa.engine.callbacks.evaluation import EvaluationCallback
from villa.engine.callbacks.logging import LastIntervalCallback, LoggingCallback
from villa.engine.inference import restore_parts
from villa.engine.loop import Callback, Progress, Training, fit
from villa.engine.passes import ModelPasses
from villa.engine.report import about_split, data_line, report, warnings_of_run, wrapped
from villa.engine.run_folder import changes, claim, mark_finished, saved_yaml
from villa.engine.setup import Parts, batch_of_processes, build, build_trainer, idle_note
from villa.engine.updater import Updater
from villa.errors import CheckpointError, ConfigError, about, reading
from villa.files import atomic_write
from villa.hub.source import load_model
from villa.progress import TrainingProgress
from villa.provenance import provenance
from villa.registry import CALLBACKS, OPTIMIZERS, SCHEDULERS
from villa.signals import Interrupted, check, interruptible
from villa.tracking import TrackedRun, Trackers, run_trackers
from villa.trainers.base import Cost, Trainer


def train(config: RunConfig, callbacks: Sequence[Callback] = ()) -> int:
    """Train, from the newest intact checkpoint if resuming, then test.

    Args:
        config: the recipe.
        callbacks: more callbacks, besides those that the recipe names.

    Returns:
        0, or 128 + the number of the signal that ended the run.

    Raises:
        VillaError: the recipe, data, folder or checkpoints cannot be used.
        Interrupted: a signal has ended one of several processes.
    """
    with interruptible():
        try:
            return _train(config, callbacks)
        except Interrupted as interrupted:
            if not interrupted.agreed and Processes.connected().world_size > 1:
                raise
            advice = "" if interrupted.agreed else "; go on with checkpoint.resume=true"
            print(f"ended by {interrupted}{advice}", flush=True)
            return interrupted.exit_code


def _train(config: RunConfig, callbacks: Sequence[Callback]) -> int:
    """Run the training; signals end it with ``Interrupted``."""
    processes = strategy_of(config.distributed).connect()
    with claim(Path(config.output_dir), resume=config.checkpoint.resume, processes=processes) as folder:
        store = CheckpointStore(folder / CHECKPOINTS, config.checkpoint.keep)
        if processes.is_main:
            store.clean()
        checkpoint = newest(store, processes) if config.checkpoint.resume else None
        parts = build(config, assets=checkpoint.assets) if checkpoint else start(config)
        recipe = saved_yaml(config)
        trackers = _trackers(config, folder, recipe) if processes.is_main else Trackers({})
        training = assemble(parts, store, trackers, callbacks)
        if checkpoint is not None:
            restore(training, checkpoint, config)
            progress = training.progress
            if processes.is_main:
                store.set_best(progress.best_update)
            if progress.best_update is not None and not store.path(progress.best_update).is_dir():
                progress.best = progress.best_update = None  # the best checkpoint is gone, so it could not be tested
        if processes.is_main:
            atomic_write(folder / CONFIG, recipe)
        try:
            fit(training)
            check()
            if training.progress.stopped is not None:
                print(f"stopped after update {training.progress.update}: {training.progress.stopped}", flush=True)
            if config.run_type == "train_val_test":
                report(parts, training, store, trackers, folder)
        finally:
            trackers.close()
        if processes.is_main:
            mark_finished(config)
    return 0


def start(config: RunConfig) -> Parts:
    """Build the parts of a new run, from the trained model ``checkpoint.path`` or from the recipe.

    Raises:
        VillaError: the recipe, the data or the weights do not fit together.
    """
    if config.checkpoint.path is None:
        return build(config)
    parts, source = restore_parts(config)
    print(f"starting from the weights, vocabulary and labels of {source.path}", flush=True)
    return parts


def newest(store: CheckpointStore, processes: Processes) -> Checkpoint | None:
    """Return the newest intact checkpoint, or None if the run was killed before its first one.

    Args:
        store: the run's checkpoints; ``clean`` must have been called.
        processes: the processes of the run; all get the checkpoint that rank 0 finds.

    Raises:
        CheckpointError: there are checkpoints, but none is intact.
    """
    checkpoint = None
    if processes.is_main:
        checkpoint = store.newest()
        if checkpoint is None and store.updates():
            raise CheckpointError(
                f"every checkpoint in '{store.folder}' is damaged; restore a copy, or start again in another output_dir"
            )
    update = processes.gather(checkpoint and checkpoint.update)[0]
    return checkpoint if processes.is_main or update is None else store.load(update, verified=True)


def assemble(parts: Parts, store: CheckpointStore, trackers: Trackers, callbacks: Sequence[Callback] = ()) -> Training:
    """Assemble a training run from its parts and print its plan."""
    config = parts.config
    trainer = build_trainer(config, parts.model)  # before any work on data, as it may refuse the model
    parts.distribute()
    split, share = parts.split("train", "the training split"), parts.strategy.share
    compares = parts.loss.compares_examples(config.dataset.objectives())
    batch = batch_of_processes(config.batch, share.world_size, compares_examples=compares)
    sampler = split.sampler(batch, config.seed)
    pin = parts.precision.device.type == "cuda"
    workers, timeout = config.training.workers, config.training.data_timeout
    stream = UpdateStream(split, parts.data.collate, sampler, workers, pin=pin, share=share, timeout=timeout)
    total = config.training.updates or sampler.total_updates(config.training.epochs or 1)
    updater = _updater(parts, trainer, total)
    cost = config.training.passes() * trainer.relative_cost(config.dataset.objectives())
    display = TrainingProgress(total, config.logging.progress, monitor=config.evaluation.monitor, cost=cost)
    name = config.evaluation.split
    validation = {} if name is None else {name: parts.split(name, "evaluation.split (null for none)")}
    print(wrapped(data_line(config, parts.data, {"train": split, **validation})))
    print(plan(parts, trainer, sampler, total), flush=True)
    for note in (
        *warnings_of_run(config, split, sampler, total),
        *trainer.notes(),
        *idle_note(batch, share.world_size),
        *parts.precision.notes(),
        *(note for name, examples in validation.items() for note in about_split(name, examples)),
    ):
        print(wrapped(f"note: {note}", "  "), flush=True)
    called = _callbacks(parts, store, trackers, display, [*validation.values()], callbacks)
    return Training(parts.model, updater, stream, parts.prepare, called, Progress(total=total))


def plan(parts: Parts, trainer: Trainer, sampler: Sampler, total: int) -> str:
    """Return a summary of the run: its model, method, updates and passes."""
    config, device = parts.config, parts.precision.device
    parameters = sum(parts.strategy.shape(p).numel() for p in parts.model.parameters() if p.requires_grad)
    count = parts.strategy.processes.world_size
    processes = "1 process" if count == 1 else f"{count} processes ({config.distributed.strategy})"
    lines = (
        f"{config.model.name} ({parameters / 1e6:.1f}M parameters) with {config.trainer.name} on {device}",
        f"{total:,} updates, {sampler.describe()} on {processes}",
        describe_cost(trainer, config),
    )
    return "\n".join(map(wrapped, lines))


def describe_cost(trainer: Trainer, config: RunConfig) -> str:
    """Describe the passes of a micro-batch, by objective if they differ, and their mean cost."""
    objectives, times = config.dataset.objectives(), config.training.passes()
    groups: dict[Cost, list[str]] = {}
    for name in objectives:
        groups.setdefault(trainer.cost_of(name), []).append(name)
    relative = f"{times * trainer.relative_cost(objectives):.1f}x standard training"
    if times > 1:
        relative = f"run twice ({config.training.weight_perturbation.name}), {relative}"
    cost, *others = groups or [trainer.cost()]
    if not others:
        return f"{_passes(cost)} a micro-batch, {relative}"
    passes = (f"{_passes(cost)} of {', '.join(names)}" for cost, names in groups.items())
    return f"a micro-batch is {' and '.join(passes)}; on average {relative}"


def _passes(cost: Cost) -> str:
    return " + ".join(f"{n} {what}" for n, what in zip(cost, ("forward", "backward", "ascent"), strict=False))


def _trackers(config: RunConfig, folder: Path, recipe: str) -> Trackers:
    logging = config.logging
    run = TrackedRun(folder, config.name, logging.project, recipe, leaves(config))
    return run_trackers(run, dict.fromkeys([*["tensorboard"] * logging.tensorboard, *logging.trackers]))


def restore(training: Training, checkpoint: Checkpoint, config: RunConfig) -> None:
    """Restore a run from a checkpoint and print the options that have changed since.

    Raises:
        CheckpointError: the checkpoint is damaged, or belongs to another model or optimiser.
    """
    changed = changes(checkpoint.config_yaml(), config)
    changed.pop("run_type", None)
    if "optimizer.name" in changed:
        raise CheckpointError(
            f"checkpoint '{checkpoint.path}' was trained with optimizer '{changed['optimizer.name'][0]}'; a resumed "
            "run cannot change it: start another run with model.checkpoint"
        )
    load_model(training.model, checkpoint, training.updater.strategy)
    state = checkpoint.training_state(dict(training.model.named_parameters()))
    unfit = f"checkpoint '{checkpoint.path}' does not fit this recipe"
    with reading(unfit, "use another one, or the recipe that it was trained with", CheckpointError), about(unfit):
        if "trainer.name" in changed:
            state["updater"].pop("trainer", None)  # the state of another method
        training.load_state_dict(state)
        if training.progress.update != checkpoint.update:
            raise CheckpointError(f"its state is that of update {training.progress.update}")
    if changed.keys() & {"evaluation.monitor", "evaluation.split"}:
        training.progress.best = training.progress.best_update = None
    print(f"resuming after update {checkpoint.update}", flush=True)
    if config.training.ema is not None and training.updater.ema is None:
        print(f"  training.ema: the average starts with the weights of update {checkpoint.update}", flush=True)
    for key, (before, now) in changed.items():
        print(f"  changed since: {key}: {before} -> {now}", flush=True)
    for line in moved(state.get("provenance", {}).get("processes"), "distributed.strategy" in changed, config):
        print(f"  {line}", flush=True)


def moved(before: int | None, other_strategy: bool, config: RunConfig) -> Iterator[str]:
    """Yield notes on what will differ because the run resumes on other processes or with another strategy.

    Args:
        before: number of processes that saved the checkpoint, if known.
        other_strategy: whether the strategy has changed.
        config: recipe of the run, whose processes are connected.
    """
    count = Processes.connected().world_size
    if before not in (None, count):
        yield f"changed since: number of processes: {before} -> {count}"
    elif not other_strategy:
        return
    yield "not to the bit as if nothing had changed: sums over processes are rounded in another order"
    if config.batch.per_pass is None and before not in (None, count):
        yield (
            "not the same updates either: without batch.per_pass each is cut into a part for every process, which "
            "draws other dropout and random starts, and with batch.tokens may hold other examples"
        )


def _updater(parts: Parts, trainer: Trainer, total: int) -> Updater:
    config = parts.config
    factory = OPTIMIZERS.get(config.optimizer.name)(config.optimizer)
    optimizer = parts.strategy.optimizer(lambda: factory.build(parts.model))
    noise = {
        modality: AscentSettings(0.0, None, config.training.noise.norm, "uniform", size)
        for modality, size in config.training.noise.sizes().items()
    }
    passes = ModelPasses(parts.model, parts.loss, parts.precision, config.seed, parts.strategy, noise)
    schedule = SCHEDULERS.get(config.scheduler.name)(config.scheduler, total)
    return Updater(passes, trainer, optimizer, schedule, config.training, config.batch.accumulation)


def _callbacks(
    parts: Parts,
    store: CheckpointStore,
    trackers: Trackers,
    display: TrainingProgress,
    validation: Sequence[Split],
    given: Sequence[Callback],
) -> list[Callback]:
    """Return all callbacks in their order: those that may stop the run before those that then write and save."""
    config, evaluation = parts.config, parts.config.evaluation
    logging = LoggingCallback(trackers, display, config.logging.every)
    callbacks: list[Callback] = [logging]
    if validation:

        def batches(first: bool = False) -> Iterable[Batch | StandIn]:
            plain, count = parts.evaluation_batches(validation[0], first=first)
            return display.track(plain, str(evaluation.split), count)

        attack = robust_values(parts) if evaluation.robustness.attacks else None
        callbacks.append(EvaluationCallback(parts.evaluator, batches, evaluation, trackers, display, attack))
    callbacks += [*_of_recipe(config), *given, LastIntervalCallback(logging)]
    checkpoints = CheckpointCallback(
        store,
        config.checkpoint.every or evaluation.every,
        config_yaml=saved_yaml(config),
        assets=parts.save_assets,
        provenance={
            **provenance(),
            "data": parts.data.fingerprint(),
            "seed": config.seed,
            "processes": parts.strategy.processes.world_size,
        },
        sharded=config.checkpoint.sharded,
        asynchronous=config.checkpoint.asynchronous,
    )
    callbacks += [checkpoints, SignalCallback(checkpoints)]
    names = [callback.name for callback in callbacks]
    taken = next((name for name in names if names.count(name) > 1), None)
    if taken is not None:
        raise ConfigError(
            f"two callbacks are called '{taken}', by which checkpoints know their state; give one of them another name"
        )
    return callbacks


def _of_recipe(config: RunConfig) -> Iterator[Callback]:
    for name, given in config.callbacks.items():
        options = callback_options(name, given)
        if options is not None:
            callback: Callback = CALLBACKS.get(name)(options)
            callback.name = name
            yield callback
