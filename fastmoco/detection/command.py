"""`evaluate detection RUN --data VOCdevkit`: fine-tune a detector, judge it, and leave figures and pictures."""

from __future__ import annotations

import dataclasses
import shlex
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn
from tqdm import tqdm

from fastmoco import atomic
from fastmoco.detection import detector, voc
from fastmoco.detection.average_precision import Detections, evaluate
from fastmoco.detection.pictures import draw_detections
from fastmoco.detection.training import PRECISE_BATCHES, Plan, Trainer, detect
from fastmoco.evaluate.options import EvaluateDetection
from fastmoco.options import UsageError
from fastmoco.parallel import Parallel
from fastmoco.process.stop import STOPPED, StopRequest, Vote, note_saved, stop_on_signal
from fastmoco.runs import checkpoint
from fastmoco.runs.facts import program, read_json
from fastmoco.runs.lines import LOG, Lines
from fastmoco.runs.run_folder import figures_name, load_encoder
from fastmoco.terminal import counted

FIGURES, PICTURES = "detection.json", "detections.png"
# What a detector in training may not change; where it stands is another thing.
KEPT = ("untrained", "iterations", "batch_size", "lr", "size", "regions", "seed")


class Work(NamedTuple):
    """Everything of one detector."""

    options: EvaluateDetection
    out: Path
    parallel: Parallel
    model: nn.Module
    trainer: Trainer
    training: voc.Set
    test: voc.Set
    facts: dict[str, Any]


def run(options: EvaluateDetection) -> int:
    """Train, judge and write OUT/detection.json and detections.png; exit code 0, or 143 where asked to stop.

    Raises UsageError on wrong use or a loss that is not finite, DataError on bad images or annotations.
    """
    detector.torchvision()  # before anything is read
    with Parallel.start(options.device, timedelta(seconds=options.timeout_seconds)) as parallel:
        options, out = _places(options, parallel)
        work = _prepare(options, out, parallel)
        with stop_on_signal() as request:
            began = time.perf_counter()
            if _train(work, request):
                if parallel.is_main:
                    note_saved()
                    print(f"stopped after step {work.trainer.step}: go on with {_go_on(options, out)}")
                return STOPPED
        _judge(work, time.perf_counter() - began)
    return 0


def _go_on(options: EvaluateDetection, out: Path) -> str:
    run, data, folder = (shlex.quote(str(path)) for path in (options.run, options.data, out))
    return f"{program()} evaluate detection {run} --data {data} --resume --out {folder}"


def _places(options: EvaluateDetection, parallel: Parallel) -> tuple[EvaluateDetection, Path]:
    out = options.out or options.run / figures_name("detection", options.untrained)
    settings = out / "settings.json"
    if options.batch_size % parallel.world:
        raise UsageError(f"--batch-size {options.batch_size} does not split over {parallel.world} ranks")
    if options.resume:
        saved = read_json(settings)
        if not saved:
            raise UsageError(f"{out} is no detector to resume (it has no settings.json): check --out")
        return dataclasses.replace(options, **{name: saved[name] for name in KEPT}), out
    there = out.exists()
    parallel.barrier()
    if there:
        raise UsageError(f"{out} exists: continue it with --resume, or give --out another name")
    if parallel.is_main:
        out.mkdir(parents=True)
        atomic.write_json(settings, {name: getattr(options, name) for name in KEPT})
    parallel.barrier()
    return options, out


def _prepare(options: EvaluateDetection, out: Path, parallel: Parallel) -> Work:
    assert options.data is not None
    training = voc.training_set(options.data)
    test = voc.test_set(options.data, training.classes)
    encoder, recipe, step = load_encoder(options.run, parallel, options.untrained)
    size = detector.Size(options.size, options.regions)
    model = detector.build(encoder, recipe, len(training.classes), size, parallel, options.seed)
    plan = Plan(options.iterations, options.batch_size, options.lr, options.seed)
    trainer = Trainer(model, training.pictures, plan, parallel, options.threads)
    newest = checkpoint.latest(out) if options.resume else None
    if newest is not None:
        trainer.load(checkpoint.load(newest, verified=True))
    facts = {
        "run": str(options.run),
        "step": step,
        "backbone": f"{recipe.arch}-C4, {'first' if options.untrained else 'pretrained'} weights",
        "data": str(options.data),
        "classes": training.classes,
        "training_images": len(training.pictures),
        "test_images": len(test.pictures),
        **{name: getattr(options, name) for name in KEPT},
        "ranks": parallel.world,
    }
    facts["lr"] = plan.full_rate
    if parallel.is_main:
        print(
            f"{len(training.pictures)} images train, {len(test.pictures)} test, {len(training.classes)} classes; "
            f"{facts['backbone']} of {options.run} after step {step}; {counted(options.iterations, 'step')} of "
            f"{options.batch_size}, lr {facts['lr']:g}, {options.size} pixels; writing {out}",
            flush=True,
        )
    return Work(options, out, parallel, model, trainer, training, test, facts)


def _train(work: Work, request: StopRequest) -> bool:
    """Train to the end, or until asked to stop; a checkpoint is written either way. Returns whether asked."""
    options, trainer, vote = work.options, work.trainer, Vote(work.parallel, every=1)
    log = Lines(work.out / LOG, print) if work.parallel.is_main else None
    with tqdm(total=options.iterations, initial=trainer.step, unit="step", disable=_hidden(work)) as bar:

        def after(figures: dict[str, float]) -> bool:
            bar.update()
            step = int(figures["step"])
            if log is not None and (step % options.log_every == 0 or step == options.iterations):
                log.append(figures)
                bar.set_postfix_str(f"loss {figures['loss']:.3f}")
                if bar.disable:
                    print(
                        f"step {step}/{options.iterations}  loss {figures['loss']:.3f}  lr {figures['lr']:.2e}",
                        flush=True,
                    )
            (stop,) = vote.cast(bool(request))
            if step % options.save_every == 0 or step == options.iterations or stop:
                _save(work)
            return stop

        try:
            return trainer.train(options.iterations, after)
        except FloatingPointError as error:
            raise UsageError(f"{error}: give a smaller --lr than {work.facts['lr']:g}") from error
        finally:
            if log is not None:
                log.close()


def _hidden(work: Work) -> bool | None:
    return None if work.parallel.is_main else True


def _save(work: Work) -> None:
    if work.parallel.is_main:
        checkpoint.save(work.out, work.trainer.step, work.trainer.state(), {"settings": work.facts})


def _judge(work: Work, seconds: float) -> None:
    batches = min(PRECISE_BATCHES, work.options.iterations)
    work.trainer.settle_statistics(batches)
    detections = detect(work.model, work.test.pictures, work.parallel, work.options.threads)
    results = _score(work.test, detections, len(work.training.classes))
    if work.options.on_training:
        again = detect(work.model, work.training.pictures, work.parallel, work.options.threads)
        on_training = _score(work.training, again, len(work.training.classes))
        results["on_training"] = {name: on_training[name] for name in ("AP", "AP50", "AP75")}
    if not work.parallel.is_main:
        return
    atomic.write_json(work.out / FIGURES, {**work.facts, "seconds": seconds, **results})
    draw_detections(work.out / PICTURES, work.test.pictures, detections, work.training.classes)
    figures = "".join(f"{name} {results[name]:.2f}  " for name in ("AP", "AP50", "AP75"))
    extra = f"(on the training images AP50 {results['on_training']['AP50']:.2f}) " if "on_training" in results else ""
    print(f"{figures}{extra}by {results['metric']}; see {work.out / FIGURES} and {PICTURES}")


def _score(part: voc.Set, detections: list[Detections], classes: int) -> dict[str, Any]:
    truth = [picture.objects for picture in part.pictures]
    eleven = part.year == 2007
    kind = "11 points" if eleven else "the area under the curve"
    scores: dict[str, Any] = dict(evaluate(truth, detections, classes, eleven))
    scores["area"] = {
        name: value
        for name, value in evaluate(truth, detections, classes, False).items()
        if name in ("AP", "AP50", "AP75")
    }
    return {"metric": f"the rule of VOC {part.year}, {kind}, mean of ten thresholds", **scores}
