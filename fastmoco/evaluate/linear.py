"""The linear probe: a classifier on the frozen backbone, by the protocol of He et al., 2020 (`main_lincls.py`).

The backbone stays in evaluation mode; the classifier starts from N(0, 0.01) and bias 0 and is trained by SGD with
learning rate 30 for batches of 256 (scaled linearly for others), momentum 0.9 and no weight decay, for 100 epochs with
the rate divided by ten at 60 and 80, on random crops of 8 to 100 % of the area, flipped half of the time. Validation
takes the centre crop. Afterwards every weight and statistic of the backbone must be bit-equal to what it was.

`--fast` trains the same classifier in the same order on features that are computed once, of centre crops, and kept on
the device in fp32: minutes instead of hours. `--finetune` trains the backbone too.

The last incomplete batch of an epoch is left out (published: trained on).
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from fastmoco import atomic
from fastmoco.data.loader import Loader, Loading
from fastmoco.data.manifest import Manifest
from fastmoco.data.plan import Plan
from fastmoco.data.quarantine import Quarantine
from fastmoco.encoder import BatchNormAct, Encoder
from fastmoco.evaluate.features import extract
from fastmoco.evaluate.labels import both_sides
from fastmoco.evaluate.pictures import draw_probe
from fastmoco.evaluate.scores import Scores, score
from fastmoco.kernels.photometric import photometric
from fastmoco.options import EvaluateLinear
from fastmoco.parallel import Parallel
from fastmoco.recipe import Augmentation, Recipe
from fastmoco.runs.run_folder import figures_name, load_encoder, one_rank

REFERENCE_BATCH = 256
DROPS = (0.6, 0.8)  # shares of the epochs after which the rate is divided by ten: 60 and 80 of 100
CLASSIFIER_STD = 0.01

Batches = Iterator[tuple[Tensor, Tensor]]


class Protocol(NamedTuple):
    """How the classifier is trained; the defaults are the published linear probe's."""

    lr: float = 30.0
    """For batches of 256."""
    momentum: float = 0.9
    weight_decay: float = 0.0
    epochs: int = 100
    batch_size: int = 256
    seed: int = 0

    def rate(self, epoch: int) -> float:
        """Learning rate in `epoch`, counted from 0."""
        drops = sum(epoch >= round(share * self.epochs) for share in DROPS)
        return self.lr * self.batch_size / REFERENCE_BATCH * 0.1**drops


FINETUNE = Protocol(lr=0.03, weight_decay=1e-4)


class Probe(NamedTuple):
    """A trained classifier and how it came about."""

    classifier: nn.Linear
    curve: list[dict[str, float]]
    """For each epoch: epoch, lr, loss of training, top1 and top5 of validation."""
    scores: Scores
    """Of the last epoch."""


def new_classifier(features: int, classes: int, seed: int, device: torch.device) -> nn.Linear:
    """Weights from N(0, 0.01), bias 0: a pure function of the seed."""
    classifier = nn.Linear(features, classes)
    generator = torch.Generator().manual_seed(seed)
    nn.init.normal_(classifier.weight, std=CLASSIFIER_STD, generator=generator)
    nn.init.zeros_(classifier.bias)
    return classifier.to(device)


def fit(
    batches: Batches,
    classifier: nn.Linear,
    parameters: list[nn.Parameter],
    protocol: Protocol,
    steps_per_epoch: int,
    validate: Callable[[], Scores],
    report: Callable[[dict[str, float]], Any] = lambda line: None,
) -> Probe:
    """Train `classifier`, and whatever else is among `parameters`, on (features [N, F], labels [N])."""
    optimizer = torch.optim.SGD(
        parameters, protocol.rate(0), momentum=protocol.momentum, weight_decay=protocol.weight_decay
    )
    curve: list[dict[str, float]] = []
    scores = validate()
    total = torch.zeros((), device=classifier.weight.device)
    for step, (features, labels) in enumerate(batches):
        epoch = step // steps_per_epoch
        optimizer.param_groups[0]["lr"] = protocol.rate(epoch)
        loss = F.cross_entropy(classifier(features), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.detach()
        if (step + 1) % steps_per_epoch == 0:
            scores = validate()
            line = {
                "epoch": epoch + 1,
                "lr": protocol.rate(epoch),
                "loss": total.item() / steps_per_epoch,
                "top1": scores.top1,
                "top5": scores.top5,
            }
            curve.append(line)
            report(line)
            total.zero_()
    return Probe(classifier, curve, scores)


def fit_cached(
    train: tuple[Tensor, Tensor],
    val: tuple[Tensor, Tensor],
    classes: int,
    plan: Plan,
    protocol: Protocol,
    report: Callable[[dict[str, float]], Any] = lambda line: None,
) -> Probe:
    """Train a classifier on (features [n, F], labels [n]) in the plan's order; the features stay as they are."""
    features, labels = train
    classifier = new_classifier(features.shape[1], classes, protocol.seed, features.device)

    def batches() -> Batches:
        for step in range(protocol.epochs * plan.steps_per_epoch):
            rows = torch.from_numpy(plan.samples(step)).to(features.device)
            yield features[rows], labels[rows]

    def validate() -> Scores:
        with torch.no_grad():
            return score(classifier(val[0]), val[1])

    parameters = list(classifier.parameters())
    return fit(batches(), classifier, parameters, protocol, plan.steps_per_epoch, validate, report)


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
        symmetric=False,
        shuffle_bn=False,
    )


def snapshot(encoder: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter and buffer."""
    return {name: value.clone() for name, value in encoder.state_dict().items()}


def changed(before: dict[str, Tensor], encoder: nn.Module) -> list[str]:
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

    def fast(self, report: Callable) -> Probe:
        """The probe on features of centre crops, computed once."""
        return fit_cached(
            self.features(self.train), self.features(self.val), self.classes, self.plan, self.protocol, report
        )

    def exact(self, report: Callable) -> Probe:
        """The probe as published. Raises AssertionError if the backbone did not stay bit-equal."""
        before = snapshot(self.encoder)
        classifier = self._classifier()
        val, labels = self.features(self.val)  # a frozen backbone gives the same ones after every epoch

        def validate() -> Scores:
            with torch.no_grad():
                return score(classifier(val), labels)

        self.encoder.eval().requires_grad_(False)
        probe = self._fit(classifier, list(classifier.parameters()), validate, report)
        assert not changed(before, self.encoder), f"the probe changed the backbone: {changed(before, self.encoder)}"
        return probe

    def finetune(self, report: Callable) -> Probe:
        """Classifier and backbone trained together, batch norm over whole batches."""
        classifier = self._classifier()
        for module in self.encoder.modules():
            if isinstance(module, BatchNormAct):
                module.group_size = 0
        self.encoder.train().requires_grad_(True)
        backbone = [value for name, value in self.encoder.named_parameters() if not name.startswith("fc.")]

        def validate() -> Scores:
            features, labels = self.features(self.val)
            with torch.no_grad():
                return score(classifier(features), labels)

        return self._fit(classifier, [*classifier.parameters(), *backbone], validate, report)

    def _classifier(self) -> nn.Linear:
        return new_classifier(self.encoder.feature_dim, self.classes, self.protocol.seed, self.parallel.device)

    def _fit(self, classifier: nn.Linear, parameters: list, validate: Callable[[], Scores], report: Callable) -> Probe:
        steps = self.protocol.epochs * self.plan.steps_per_epoch
        labels = torch.from_numpy(self.train.labels).to(self.parallel.device)
        colours = self.recipe.augmentation
        quarantine = Quarantine(self.train, max_share=self.recipe.max_bad_share)
        with Loader(self.train, self.plan, self.parallel, range(steps), self.loading, quarantine) as loader:

            def batches() -> Batches:
                for batch in loader:
                    _warn(quarantine)
                    views = photometric(batch.query_crops, batch.query_parameters, colours.mean, colours.std)
                    shown = quarantine.replaced(batch.step, batch.sample)  # a substitute comes with its own label
                    yield self.encoder.features(views), labels[torch.from_numpy(shown).to(labels.device)]

            return fit(batches(), classifier, parameters, self.protocol, self.plan.steps_per_epoch, validate, report)


def _warn(quarantine: Quarantine) -> None:
    while quarantine.news:
        bad = quarantine.news.popleft()
        warnings.warn(f"{bad.file}: {bad.reason}; training on {bad.substitute} in its place", stacklevel=2)


def run(options: EvaluateLinear) -> None:
    """`evaluate linear RUN`: train the probe, write RUN/linear.json, .png and .safetensors.

    The name is linear-fast or finetune where that was asked for, with -untrained after it for untrained weights.
    """
    parallel = one_rank(options.device)
    encoder, recipe, step = load_encoder(options.run, parallel, options.untrained)
    train, val = both_sides(options.run, options.data, options.val, options.labels, recipe.max_pixels)
    protocol = _protocol(options)
    evaluation = Evaluation(encoder, recipe, train, val, protocol, parallel, options.threads or None)
    print(
        f"{len(train)} images train, {len(val)} validate, {len(train.classes)} classes; encoder of {options.run} "
        f"after step {step}; lr {evaluation.protocol.rate(0):g}, batch {evaluation.protocol.batch_size}, "
        f"{protocol.epochs} epochs"
    )
    name, train_probe = _mode(evaluation, options)
    name = figures_name(name, options.untrained)
    began = time.perf_counter()
    with tqdm(total=protocol.epochs, unit="epoch", disable=None) as bar:
        probe = train_probe(lambda line: _tell(bar, line, protocol.epochs))
    facts = {
        "step": step,
        "protocol": evaluation.protocol._asdict(),
        "classes": len(train.classes),
        "train": len(train),
        "queries": len(val),
        "data": train.root,
        "val": val.root,
        "seconds": time.perf_counter() - began,
        "backbone": "trained" if options.finetune else "bit-equal after the probe",
    }
    if (options.run / f"{name}.json").exists():
        print(f"note: the figures of an earlier probe in {options.run / name}.json are replaced")
    _write(options.run, name, probe, facts, train.classes, encoder if options.finetune else None)
    pair = [figures_name(each, options.untrained) for each in ("linear", "linear-fast")]
    agreement = _agreement(options.run, evaluation, step, pair) if not options.finetune else None
    agrees = f"; fast and exact agree on {agreement:.1f}% of the validation images" if agreement is not None else ""
    print(
        f"{name}: top-1 {probe.scores.top1:.2f}%, top-5 {probe.scores.top5:.2f}%{agrees} (see {options.run}/{name}."
        f"json and .png)"
    )
    if hint := rate_hint(probe, evaluation.protocol, len(train.classes)):
        print(hint)


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
    base = FINETUNE if options.finetune else Protocol()
    chosen = base._replace(epochs=options.epochs, batch_size=options.batch_size, seed=options.seed)
    return chosen if options.lr is None else chosen._replace(lr=options.lr)


def _mode(evaluation: Evaluation, options: EvaluateLinear) -> tuple[str, Callable]:
    if options.finetune:
        return "finetune", evaluation.finetune
    return ("linear-fast", evaluation.fast) if options.fast else ("linear", evaluation.exact)


def _tell(bar: tqdm, line: dict[str, float], epochs: int) -> None:
    bar.update()
    bar.set_postfix_str(f"loss {line['loss']:.3f}  top-1 {line['top1']:.2f}%")
    if bar.disable and (line["epoch"] % max(1, epochs // 10) == 0 or line["epoch"] == epochs):
        print(f"epoch {line['epoch']}/{epochs}  loss {line['loss']:.3f}  top-1 {line['top1']:.2f}%", flush=True)


def _write(
    folder: Path, name: str, probe: Probe, facts: dict[str, Any], classes: list[str], encoder: Encoder | None
) -> None:
    best = max(line["top1"] for line in probe.curve)
    data = {**facts, "best_top1": best, **probe.scores.as_dict(classes), "curve": probe.curve}
    atomic.write_json(folder / f"{name}.json", data)
    draw_probe(folder / f"{name}.png", probe.curve, probe.scores.confusion, classes)
    weights = {f"fc.{key}": value.detach().cpu() for key, value in probe.classifier.named_parameters()}
    if encoder is not None:
        backbone = {key: value.cpu().contiguous() for key, value in encoder.state_dict().items()}
        weights |= {key: value for key, value in backbone.items() if not key.startswith("fc.")}
    with atomic.replacing(folder / f"{name}.safetensors") as draft:
        save_file(weights, draft, metadata={"format": "pt", "step": str(facts["step"])})


def _agreement(folder: Path, evaluation: Evaluation, step: int, pair: list[str]) -> float | None:
    """Percent of the validation images that the exact and the fast classifier of this step put in the same class."""
    predictions = []
    features, _ = evaluation.features(evaluation.val)
    for name in pair:
        weights, facts = folder / f"{name}.safetensors", folder / f"{name}.json"
        if not weights.is_file() or json.loads(facts.read_text())["step"] != step:
            return None
        classifier = load_file(weights, device=str(features.device))
        if len(classifier["fc.bias"]) != evaluation.classes:
            return None
        predictions.append(F.linear(features, classifier["fc.weight"], classifier["fc.bias"]).argmax(1))
    return 100 * (predictions[0] == predictions[1]).double().mean().item()
