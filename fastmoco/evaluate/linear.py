"""The linear probe: a classifier on the frozen backbone, by the protocol of He et al., 2020 (`main_lincls.py`).

The backbone stays in evaluation mode; the classifier starts from N(0, 0.01) and bias 0 and is trained by SGD with
learning rate 30 for batches of 256 (scaled linearly for others), momentum 0.9 and no weight decay, for 100 epochs with
the rate divided by ten at 60 and 80, on random crops of 8 to 100 % of the area, flipped half of the time. Validation
takes the centre crop. Afterwards every weight and statistic of the backbone must be bit-equal to what it was.

`--fast` trains the same classifier in the same order on features that are computed once, of centre crops, and kept on
the device in fp32: minutes instead of hours. `finetune.py` trains the backbone too.

Unless `--lr` says which, the learning rate is chosen on training images that are held out (`rate.py`), under the very
crops and schedule of the probe: the published one trains the classifiers of all rates side by side, so that choosing
takes no second pass over the images. The classifier that is kept was trained on all of them. The last incomplete batch
of an epoch is left out (published: trained on).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from fastmoco.data.loader import Loader, Loading
from fastmoco.data.manifest import Manifest
from fastmoco.data.plan import Plan
from fastmoco.data.quarantine import Quarantine
from fastmoco.encoder import Encoder
from fastmoco.evaluate.classifier import (
    NOT_HELD_OUT,
    Batches,
    Candidates,
    Probe,
    Protocol,
    Report,
    fit,
    fit_cached,
    nothing_held_out,
)
from fastmoco.evaluate.features import extract
from fastmoco.evaluate.labels import both_sides
from fastmoco.evaluate.probe_files import figures_of, write_probe
from fastmoco.evaluate.rate import RATES, Choice, choose, fold_of, judge, looked_at
from fastmoco.kernels.photometric import photometric
from fastmoco.options import EvaluateLinear
from fastmoco.parallel import Parallel
from fastmoco.recipe import Augmentation, Recipe
from fastmoco.runs.run_folder import figures_name, load_encoder, one_rank
from fastmoco.terminal import counted


def training_recipe(recipe: Recipe, protocol: Protocol) -> Recipe:
    """The recipe whose plan is the probe's: its crops, flips and order, and no colour."""
    colours = recipe.augmentation
    augmentation = Augmentation(
        crop_scale=(0.08, 1.0),
        brightness=0,
        contrast=0,
        saturation=0,
        hue=0,
        jitter_p=0,
        gray_p=0,
        blur_p=0,
        flip_p=0.5,
        mean=colours.mean,
        std=colours.std,
    )
    return dataclasses.replace(
        recipe,
        augmentation=augmentation,
        batch_size=protocol.batch_size,
        bn_group=1,
        epochs=protocol.epochs,
        seed=protocol.seed,
        order="auto",
        symmetric=False,
        same_view_negatives=False,
        shuffle_bn=False,
    )


def snapshot(encoder: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter and buffer."""
    return {name: value.clone() for name, value in encoder.state_dict().items()}


def changes(before: dict[str, Tensor], encoder: nn.Module) -> list[str]:
    """Names of the parameters and buffers that are not bit-equal to the snapshot."""
    return [name for name, value in encoder.state_dict().items() if not torch.equal(value, before[name])]


class Evaluation:
    """The probe of one encoder on one pair of labelled sets."""

    def __init__(
        self,
        encoder: Encoder,
        recipe: Recipe,
        train: Manifest,
        val: Manifest,
        protocol: Protocol,
        parallel: Parallel,
        threads: int | None = None,
    ) -> None:
        self.encoder, self.train, self.val, self.parallel = encoder, train, val, parallel
        self.loading = Loading(threads)
        self.protocol = protocol._replace(batch_size=min(protocol.batch_size, len(train)))
        self.recipe = training_recipe(recipe, self.protocol)
        self.plan = Plan(self.recipe, train.sizes)
        self.classes = len(train.classes)

    def features(self, images: Manifest) -> tuple[Tensor, Tensor]:
        """Features [n, F] of the centre crops, of any length, and labels [n]."""
        return extract(self.encoder, images, self.recipe, self.parallel, loading=self.loading, normalise=False)

    @functools.cached_property
    def train_features(self) -> tuple[Tensor, Tensor]:
        """Those of all training images."""
        return self.features(self.train)

    def fast(self, report: Report = lambda lines: None) -> Probe:
        """The probe on features of centre crops, computed once."""
        val = self.features(self.val)
        return fit_cached(self.train_features, val, self.classes, self.plan, self.protocol, report)

    def fast_of_best(self, report: Report = lambda lines: None) -> tuple[Probe, Choice]:
        """The same at the rate that does best on training images held out, and why at that one."""
        assert self.train.labels is not None
        features, labels = self.train_features
        rows = torch.from_numpy(looked_at(self.train.labels)).to(features.device)
        choice = choose(features[rows], labels[rows], self.classes, self.recipe, self.protocol)
        self.protocol = self.protocol._replace(lr=choice.lr)
        return self.fast(report), choice

    def exact(self, report: Report = lambda lines: None) -> Probe:
        """The probe as published. Raises AssertionError if the backbone did not stay bit-equal."""
        alone = nothing_held_out(len(self.train), self.parallel.device)
        return self._fit(self._candidates([self.protocol.lr], alone), report)[0]

    def exact_of_best(self, report: Report = lambda lines: None) -> tuple[Probe, Choice]:
        """The same at the rate that does best on training images held out, and why at that one.

        All rates are trained side by side; each image that a fold holds out is judged by its centre crop. `report` gets
        the line of the rate that leads.
        """
        assert self.train.labels is not None
        folds = fold_of(self.train.labels)
        held = np.flatnonzero(folds != NOT_HELD_OUT)
        if not len(held):
            return self.exact(report), Choice(self.protocol.lr)
        candidates = self._candidates(RATES, torch.from_numpy(folds).to(self.parallel.device))
        sides = *self.features(self.train.take(held)), torch.from_numpy(held).to(self.parallel.device)

        def leader() -> int:
            return RATES.index(judge(candidates, *sides).lr)

        probes = self._fit(candidates, lambda lines: report([lines[leader()]]))
        choice = judge(candidates, *sides)
        self.protocol = self.protocol._replace(lr=choice.lr)
        return probes[RATES.index(choice.lr)], choice

    def _candidates(self, rates: Sequence[float], folds: Tensor) -> Candidates:
        return Candidates(self.encoder.feature_dim, self.classes, self.protocol, rates, folds)

    def _fit(self, candidates: Candidates, report: Report) -> list[Probe]:
        before = snapshot(self.encoder)
        val = self.features(self.val)  # a frozen backbone gives the same ones after every epoch
        self.encoder.eval().requires_grad_(False)
        probes = fit(self._batches(), candidates, self.plan.steps_per_epoch, val, report)
        assert not changes(before, self.encoder), f"the probe changed the backbone: {changes(before, self.encoder)}"
        return probes

    def _batches(self) -> Batches:
        steps = self.protocol.epochs * self.plan.steps_per_epoch
        labels = torch.from_numpy(self.train.labels).to(self.parallel.device)
        colours = self.recipe.augmentation
        quarantine = Quarantine(self.train, max_share=self.recipe.max_bad_share)
        with Loader(self.train, self.plan, self.parallel, range(steps), self.loading, quarantine) as loader:
            for batch in loader:
                warn_of_bad(quarantine)
                views = photometric(batch.query_crops, batch.query_parameters, colours.mean, colours.std)
                origins = quarantine.replace(batch.step, batch.sample)  # a substitute comes with its own label
                images = torch.from_numpy(origins).to(labels.device)
                yield self.encoder.features(views), labels[images], images


def warn_of_bad(quarantine: Quarantine) -> None:
    """Warn of each image that turned out to be bad since the last call."""
    while quarantine.news:
        bad = quarantine.news.popleft()
        warnings.warn(f"{bad.file}: {bad.reason}; training on {bad.substitute} in its place", stacklevel=2)


def run(options: EvaluateLinear) -> None:
    """`evaluate linear RUN`: train the probe, write RUN/linear.json, .png and .safetensors.

    The name is linear-fast where that was asked for, with -untrained after it for untrained weights.
    """
    parallel = one_rank(options.device)
    encoder, recipe, step = load_encoder(options.run, parallel, options.untrained)
    train, val = both_sides(options.run, options.data, options.val, options.labels, recipe.max_pixels)
    evaluation = Evaluation(encoder, recipe, train, val, _protocol(options), parallel, options.threads or None)
    name = figures_name("linear-fast" if options.fast else "linear", options.untrained)
    print(
        f"{len(train)} images train, {len(val)} validate, {len(train.classes)} classes; encoder of {options.run} "
        f"after step {step}"
    )
    began = time.perf_counter()
    probe, choice = _train(evaluation, options.fast, options.lr == "auto")
    protocol = evaluation.protocol
    facts: dict[str, Any] = {
        "step": step,
        "protocol": protocol._asdict(),
        "rate": choice.as_dict() if choice else None,
        "seconds": time.perf_counter() - began,
        "backbone": "bit-equal after the probe",
    }
    write_probe(options.run, name, probe, figures_of(probe, train, val, **facts), train.classes)
    pair = [figures_name(each, options.untrained) for each in ("linear", "linear-fast")]
    agreement = _agreement(options.run, evaluation, step, pair)
    agrees = f"; fast and exact agree on {agreement:.1f}% of the validation images" if agreement is not None else ""
    print(
        f"{name}: top-1 {probe.scores.top1:.2f}%, top-5 {probe.scores.top5:.2f}%{agrees} (see {options.run}/{name}."
        f"json and .png)"
    )
    if hint := rate_hint(probe, protocol, len(train.classes)):
        print(hint)


def _train(evaluation: Evaluation, fast: bool, auto: bool) -> tuple[Probe, Choice | None]:
    protocol = evaluation.protocol
    rates = f"lr auto, {len(RATES)} rates side by side" if auto else f"lr {protocol.lr:g} for batches of 256"
    print(f"{counted(protocol.epochs, 'epoch')} of batches of {protocol.batch_size}; {rates}", flush=True)
    with tqdm(total=protocol.epochs, unit="epoch", disable=None) as bar:

        def tell(lines: list[dict[str, float]]) -> None:
            _tell(bar, lines[0], protocol.epochs)

        if not auto:
            return (evaluation.fast if fast else evaluation.exact)(tell), None
        probe, choice = (evaluation.fast_of_best if fast else evaluation.exact_of_best)(tell)
    print(choice)
    return probe, choice


def rate_hint(probe: Probe, protocol: Protocol, classes: int) -> str:
    """What to do where the probe ends worse than one that knows nothing, whose loss is ln(classes); else nothing."""
    loss, chance = probe.curve[-1]["loss"], math.log(classes)
    if loss <= chance or classes == 1:
        return ""
    return (
        f"note: the loss ended at {loss:.2f}, above ln(classes) = {chance:.2f}: the rate is too high for these "
        f"features, try --lr {protocol.lr / 10:g}"
    )


def _protocol(options: EvaluateLinear) -> Protocol:
    protocol = Protocol(epochs=options.epochs, batch_size=options.batch_size, seed=options.seed)
    return protocol if options.lr == "auto" else protocol._replace(lr=options.lr)


def _tell(bar: tqdm, line: dict[str, float], epochs: int) -> None:
    bar.update()
    bar.set_postfix_str(f"loss {line['loss']:.3f}  top-1 {line['top1']:.2f}%")
    if bar.disable and (line["epoch"] % max(1, epochs // 10) == 0 or line["epoch"] == epochs):
        print(f"epoch {line['epoch']}/{epochs}  loss {line['loss']:.3f}  top-1 {line['top1']:.2f}%", flush=True)


def _agreement(folder: Path, evaluation: Evaluation, step: int, pair: list[str]) -> float | None:
    """Percent of the validation images that the exact and the fast classifier put in the same class.

    None unless both are of this step, and were trained and judged on the same images.
    """
    predictions, sets = [], set()
    features, _ = evaluation.features(evaluation.val)
    for name in pair:
        weights, facts = folder / f"{name}.safetensors", folder / f"{name}.json"
        if not weights.is_file():
            return None
        figures = json.loads(facts.read_text())
        sets.add(tuple(figures[key] for key in ("data", "train", "val", "queries")))
        if figures["step"] != step or len(sets) > 1:
            return None
        classifier = load_file(weights, device=str(features.device))
        if len(classifier["fc.bias"]) != evaluation.classes:
            return None
        predictions.append(F.linear(features, classifier["fc.weight"], classifier["fc.bias"]).argmax(1))
    return 100 * (predictions[0] == predictions[1]).double().mean().item()
