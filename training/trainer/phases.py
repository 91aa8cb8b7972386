"""The phases of a session that need torch: load, evaluate_before, train, evaluate_after, export."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from training.errors import Interrupted, MissingInput, StoppedByUser, UsageError
from training.trainer.imports import quick_imports

with quick_imports():
    import torch
    from torch import Tensor

    from training.dataset.store import WindowStore
    from training.trainer import (
        averaging,
        checkpoints,
        evaluation,
        export,
        grouped,
        identities,
        pacing,
        processes,
    )
    from training.trainer import device as device_settings
    from training.trainer.engine import Captured, Engine, PlainEngine
    from training.trainer.journal import AVERAGED, LAST, Journal, read_lines
    from training.trainer.loading import LoadedModel, load
    from training.trainer.loop import Progress, Training
    from training.trainer.loss import LossFunction, causal_loss
    from training.trainer.resources import measured_bytes
    from training.trainer.session import Session
    from training.trainer.stopping import stop_error

log = logging.getLogger(__name__)

# A copy this large is made in well under a second; an adapter of rank 64 on a 7 B model is 0.6 GB.
KEPT_BYTES = 1 << 30
# The four arms need the curve's two ends before training; all of it costs about as much as an evaluation.
CURVES = {"evaluate_before": "ends", "evaluate_after": "whole", "evaluate_average": "whole"}


def with_folder(session: Session, work: Callable[[Session], None]) -> None:
    """`work` with the folder that layer inputs go to, where they go to the disk."""
    if not session.config["stream.chunk_tokens"]:
        work(session)
        return
    from training.trainer import streaming

    with streaming.directory(session.config, session.run.path):
        work(session)


def run(session: Session) -> None:
    """All phases in order; what came out is in `session.training` and `session.facts`."""
    with_folder(session, _run)


def _run(session: Session) -> None:
    session.mark("import")
    device = choose_device(session)
    store = WindowStore.open(session.run.dataset)
    identity = _identity(session, store)
    loaded, training, first = prepare(session, store, identity, device)
    training.evaluate = lambda step: _evaluate_between(session, loaded, step)
    if first is None:
        session.facts["before"] = _evaluate(session, loaded, 0, "evaluate_before")
        session.mark("evaluate_before")
    try:
        training.train()
    finally:
        session.facts["measured_bytes"] = measured_bytes(device, session.config["device.pool_share"] > 0)
    session.watch.step = training.progress.step
    session.mark("train")
    if first is not None:
        with _weights(first, loaded):
            session.facts["before"] = _evaluate(session, loaded, 0, "evaluate_before")
        session.mark("evaluate_before")
    session.facts["after"] = _evaluate_end(session, loaded)
    training.prune()
    session.facts["samples"] = paired_samples(session.facts["before"], session.facts["after"])
    session.mark("evaluate_after")
    _export(session, loaded)
    training.engine.close()
    log.info("seconds at the end of each phase: %s",
             ", ".join(f"{name} {seconds:.1f}" for name, seconds in session.marks.items()))


def _identity(session: Session, store: WindowStore) -> dict[str, Any]:
    config, tell = session.config, session.tell("load")
    tell("reading the base model's files")
    with session.watch.at_once():
        base = identities.base_digest(config, session.run)
    return identities.identity(config, store.digest, base, identities.versions_of(config))


def prepare(session: Session, store: WindowStore, identity: dict[str, Any], device: torch.device
            ) -> tuple[LoadedModel, Training, dict[str, Tensor] | None]:
    """Join the other ranks and load the model: (model, training, untrained weights or None)."""
    _join(session, device)
    loaded, session.training, first = _load(session, store, identity, device)
    session.watch.step = session.training.progress.step
    session.mark("load")
    return loaded, session.training, first


def _join(session: Session, device: torch.device) -> None:
    """Start talking to the other ranks. Raises UsageError when the launcher started none of them."""
    if session.config["deepspeed.stage"]:
        from training.trainer.zero import start_processes

        session.rank, session.ranks = start_processes(device, session.tell("load"))
    elif session.ranks > 1:
        session.rank, session.ranks = processes.join(device)
    elif session.config["device.count"] > 1:
        raise UsageError(f"device.count is {session.config['device.count']} and this is one process; start "
                         "as many through the command, or set device.count=1.")


def choose_device(session: Session) -> torch.device:
    """This rank's device, with the CPU threads it may use."""
    config = session.config
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(config["device.threads"] or max(1, cores // session.ranks))
    if config["device.kind"] == "cpu":
        device_settings.apply(config, torch.device("cpu"))
        return torch.device("cpu")
    if torch.cuda.device_count() <= session.local_rank:
        raise MissingInput(f"device.kind is cuda and this machine has {torch.cuda.device_count()} GPUs for "
                           f"process {session.local_rank + 1}; set device.kind=cpu or lower device.count.")
    device = torch.device("cuda", session.local_rank)
    torch.cuda.set_device(device)
    device_settings.apply(config, device)
    return device


def _load(session: Session, store: WindowStore, identity: dict[str, Any],
          device: torch.device) -> tuple[LoadedModel, Training, dict[str, Tensor] | None]:
    """The model, the engine, the place to go on from, and the weights to evaluate as they were at first."""
    captured, progress = _newest(session, identity)
    tell = session.tell("load")
    base = grouped.prepare(session, store, device)
    tell(f"loading {session.config['model.base']}")
    with session.watch.at_once():
        loaded = load(session.config, store, device, base)
    if session.rank == 0:
        for note in loaded.notes:
            log.info("%s", note)
    first = _first_weights(session, loaded)
    if captured:
        checkpoints.put_weights(captured.weights, loaded.trainable)
        if not session.config["deepspeed.stage"]:  # whose engines need them once more
            captured.weights.clear()
    if session.config["stream.chunk_tokens"]:
        _check_streaming(session, loaded, device)
    if not session.trial:
        _begin(session, loaded, device)
    engine = _engine(session, loaded, device)
    average = averaging.build(loaded.trainable, session.config) if session.rank == 0 else None
    if captured:
        engine.restore(captured)
        if average is not None:
            average.restore(captured)
    journal = Journal(session.run)
    if session.rank == 0:
        journal.rewind(progress.step, identities.digest_of(identity))
    training = Training(
        run=session.run, config=session.config, store=store, engine=engine,
        loss_function=_loss_function(session, loaded, engine), heartbeat=session.heartbeat, journal=journal,
        watch=session.watch, identity=identity, session_start=session.start, progress=progress,
        average=average, put_back=lambda captured: checkpoints.put_back(captured, loaded.trainable, engine))
    decision = engine.share(pacing.recorded(session.run, identities.digest_of(identity)))
    if decision and progress.steps_fitted is None:
        training.adopt(decision)
    return loaded, training, first


def _first_weights(session: Session, loaded: LoadedModel) -> dict[str, Tensor] | None:
    """A copy of the untrained weights, so that the first step need not wait for the evaluation of them.

    None, and the evaluation comes first, when the copy would be larger than `KEPT_BYTES` or when DeepSpeed
    keeps weights of its own. Loading is a function of the seed, so a resumed run has the same copy.
    """
    size_bytes = sum(p.numel() * p.element_size() for p in loaded.trainable.values())
    if session.config["deepspeed.stage"] or size_bytes > KEPT_BYTES:
        return None
    return {name: p.detach().to("cpu", copy=True) for name, p in loaded.trainable.items()}


@contextmanager
def _weights(lent: dict[str, Tensor], loaded: LoadedModel) -> Iterator[None]:
    """Other trainable weights for a while; the model's own come back bit for bit."""
    own = {name: p.detach().to("cpu", copy=True) for name, p in loaded.trainable.items()}
    checkpoints.put_weights(lent, loaded.trainable)
    try:
        yield
    finally:
        checkpoints.put_weights(own, loaded.trainable)


def _newest(session: Session, identity: dict[str, Any]) -> tuple[Captured | None, Progress]:
    """The checkpoint to go on from, or a fresh start. Raises when configuration or data changed since."""
    run = session.run.path
    if session.rank == 0:
        for name in checkpoints.remove_leftovers(run):
            log.info("removed %s, left by a process that was killed", name)
    path, skipped = checkpoints.newest_valid(run)
    if session.rank == 0:
        for reason in skipped:
            log.warning("%s", reason)
    if path is None:
        if session.rank == 0 and (skipped or read_lines(session.run.metrics)):
            log.warning("No checkpoint can be used; training starts from step 0.")
        return None, Progress()
    changed = identities.refuse_changes(checkpoints.read_identity(path), identity, path.name, session.allowed)
    captured, state = checkpoints.load(path)
    if session.rank == 0:
        Journal(session.run).changes(changed, path.name)
        log.info("going on from %s", path.name)
    return captured, Progress.of(state, path.name)


def _engine(session: Session, loaded: LoadedModel, device: torch.device) -> Engine:
    config = session.config
    if not config["deepspeed.stage"]:
        if session.ranks == 1:
            return PlainEngine(loaded.model, loaded.trainable, config, device)
        from training.trainer.parallel import DistributedEngine

        return DistributedEngine(loaded.model, loaded.trainable, config, device)
    from training.trainer.zero import ZeroEngine

    return ZeroEngine(loaded.model, loaded.trainable, config, device,
                      ds_config=session.run.deepspeed, tell=session.tell("compile_ops"))


def _begin(session: Session, loaded: LoadedModel, device: torch.device) -> None:
    """Warm-up and memory pool, before an engine has the model."""
    planned = session.plan.memory.device_bytes if session.plan else 0
    with session.watch.at_once():
        for line in device_settings.begin(session.config, loaded.model, loaded.trainable, device, planned):
            log.info("%s", line)


def _check_streaming(session: Session, loaded: LoadedModel, device: torch.device) -> None:
    """On every rank, before DeepSpeed has the model. Raises Unsupported or StreamError."""
    from training.trainer import streaming

    session.tell("load")("comparing the streamed step with the plain one")
    with session.watch.at_once():
        line = streaming.check(loaded.model, session.config, session.run.path, device)
    if session.rank == 0:
        log.info("%s", line)


def _loss_function(session: Session, loaded: LoadedModel, engine: Engine) -> LossFunction:
    if session.config["parallel.ring"] > 1:
        from training.trainer.ring import RingLoss

        with session.watch.at_once():
            return RingLoss(loaded.model, session.config)
    if not session.config["stream.chunk_tokens"]:
        return causal_loss
    from training.trainer.streaming import StreamedLoss

    return StreamedLoss(loaded.model, session.config, session.run.path, engine.device, engine.streamed(),
                        engine.aside)


def _evaluate(session: Session, loaded: LoadedModel, step: int, phase: str,
              weights: str = LAST) -> dict[str, Any] | None:
    """The evaluation at a step: the recorded one, else made now and recorded. None off rank 0.

    `weights`: which ones the model has now, for the record.
    """
    training: Any = session.training
    found = training.engine.share(training.journal.evaluation_at(step, weights))
    if found is not None:
        return dict(found)
    session.heartbeat.beat(phase)
    progress = session.heartbeat.progress(phase, _check(session, training.engine))
    store, device = training.store, training.engine.device
    with session.watch.at_once() if training.engine.captures_alone else nullcontext():
        made = training.engine.on_model(
            lambda model: evaluation.evaluate(model, store, session.config, device, progress,
                                              training.loss_function, CURVES.get(phase, "")))
    if session.rank or made is None:
        return None
    line = {"step": step, **made, "time": time.time(), "identity": identities.digest_of(training.identity),
            **({"weights": weights} if weights != LAST else {})}
    training.journal.evaluation(line)
    log.info("step %d: held-out loss %.4f, %.4f bits per byte", step, made["loss"], made["bits_per_byte"])
    return line


def _evaluate_between(session: Session, loaded: LoadedModel, step: int) -> None:
    """An evaluation between two updates. A stop in it leaves a checkpoint, as in an update. Together."""
    training: Any = session.training
    try:
        _evaluate(session, loaded, step, "evaluate")
    except (StoppedByUser, Interrupted) as error:
        training.save()
        raise stop_error("SIGINT" if isinstance(error, StoppedByUser) else "SIGTERM", step) from None


def _evaluate_end(session: Session, loaded: LoadedModel) -> dict[str, Any] | None:
    """The evaluation of the run's result: of the last weights, or of their average where its held-out loss is
    lower, which then takes their place in the model. Together; None off rank 0."""
    training: Any = session.training
    last = _evaluate(session, loaded, training.progress.step, "evaluate_after")
    average = training.average  # rank 0 has it
    if not training.engine.share(average is not None and average.updates > 0):
        return last
    with _weights(average.weights, loaded) if average else nullcontext():
        averaged = _evaluate(session, loaded, training.progress.step, "evaluate_average", AVERAGED)
    if last is None or averaged is None or average is None:
        return None
    better = _held_out_loss(averaged) < _held_out_loss(last)
    if better:
        checkpoints.put_weights(average.weights, loaded.trainable)
    log.info("averaged weights: held-out loss %.4f, the last ones: %.4f; the %s ones are the result",
             _held_out_loss(averaged), _held_out_loss(last), "averaged" if better else "last")
    return averaged if better else last


def _held_out_loss(evaluated: dict[str, Any]) -> float:
    """Of an evaluation, made or recorded; one that is not finite is recorded as None and never the lower."""
    loss = evaluated["loss"]
    return loss if loss is not None and math.isfinite(loss) else math.inf


def _check(session: Session, engine: Engine) -> Callable[[], None]:
    """Raises when a stop was asked for: on every rank at once where all of them evaluate."""
    if not engine.evaluates_together:
        return session.watch.check

    def check() -> None:
        if asked := engine.share(session.watch.poll()):
            raise stop_error(asked, session.training.progress.step if session.training else 0)
    return check


def paired_samples(before: dict[str, Any] | None, after: dict[str, Any] | None) -> list[dict[str, str]]:
    """Completions of the same held-out spans before and after training."""
    if not before or not after:
        return []
    earlier = {(s["path"], s["prefix"]): s["completion"] for s in before.get("samples", ())}
    return [{"path": s["path"], "prefix": s["prefix"], "before": earlier.get((s["path"], s["prefix"]), ""),
             "after": s["completion"], "expected": s["expected"]} for s in after.get("samples", ())]


def _export(session: Session, loaded: LoadedModel) -> None:
    """Write adapter/ or model/ and the digest of the trained weights."""
    training: Any = session.training
    session.tell("export")("writing the model")
    facts = {"steps": training.progress.step, "epochs": training.epochs, "seconds": training.seconds(),
             "tokens_trained": training.progress.tokens_trained, "before": session.facts["before"],
             "after": session.facts["after"]}

    def write() -> tuple[str, str]:
        with session.watch.at_once():
            folder = export.export(loaded, session.config, session.run.dataset, session.run.path, facts)
        return folder, export.weights_digest(loaded.trainable)

    written = training.engine.with_whole_weights(write, everything=loaded.kind == "model")
    if written:
        session.facts["model_dir"], session.facts["digest"] = written
    session.mark("export")
