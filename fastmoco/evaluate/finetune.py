"""`evaluate finetune RUN`: backbone and classifier trained together on labelled images, or on a small share of them.

The protocol is SimCLR's for few labels (Chen et al., 2020, appendix B.5): Nesterov's momentum 0.9, no weight decay, no
warm-up, a cosine to zero, crops and flips alone; 60 epochs on 1 % of the labels, 30 on more, but at least LEAST_STEPS
steps. Batch norm takes its statistics over the whole batch, over all ranks. The published rate is 0.05 for batches of
256; unless `--lr` says which, it is chosen among RATES by training each for a third of the epochs on four fifths of
the labelled images and judging it by the last fifth (`rate.held_out_split`). A hundred labels leave twenty to judge by,
which tell little. So where few are held out the rates that are still in the race are tried with the next fifth held
out, and so on (a race of models, as in Maron and Moore, 1994).

With bf16 the convolutions compute in 16 bits, from fp32 masters that the optimiser moves.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from fastmoco.contrast.build import BUFFERS
from fastmoco.data.loader import Loader, Loading
from fastmoco.data.manifest import Manifest
from fastmoco.data.plan import Plan
from fastmoco.data.quarantine import Quarantine
from fastmoco.encoder import BatchNormAct, Encoder
from fastmoco.evaluate.classifier import REFERENCE_BATCH, Probe, new_classifier
from fastmoco.evaluate.features import extract
from fastmoco.evaluate.fraction import listed, share_of
from fastmoco.evaluate.labels import both_sides
from fastmoco.evaluate.linear import training_recipe, warn_of_bad
from fastmoco.evaluate.options import EvaluateFinetune
from fastmoco.evaluate.probe_files import figures_of, write_probe
from fastmoco.evaluate.rate import FOLDS, Choice, Tried, held_out_split
from fastmoco.evaluate.scores import Scores, score
from fastmoco.kernels.photometric import photometric
from fastmoco.parallel import Parallel
from fastmoco.recipe import Recipe
from fastmoco.runs.run_folder import figures_name, load_encoder
from fastmoco.terminal import counted

RATES = (0.05, 0.5, 0.15, 0.015, 0.005)  # for batches of 256; the first one is the published one
TRIAL = 3  # a rate is tried for one of so many epochs
EPOCHS, EPOCHS_OF_FEW, FEW = 30, 60, 0.01
LEAST_STEPS = 300
ENOUGH = 500  # held-out images: top-1 on them has a standard error of about two points
MARGIN = 2  # standard errors below the best rate, from which on a rate is out of the race
LOOKS = 10  # at the validation images, which may be many more than those that train
MOMENTUM = 0.9

Report = Callable[[dict[str, float]], Any]


class Protocol(NamedTuple):
    """How backbone and classifier are trained."""

    lr: float = RATES[0]
    """For batches of 256."""
    lr_head: float | None = None
    """That of the classifier; None takes that of the backbone."""
    epochs: int = EPOCHS
    batch_size: int = REFERENCE_BATCH
    """Over all ranks."""
    seed: int = 0

    def rates(self, progress: float) -> tuple[float, float]:
        """Learning rates of backbone and classifier after a share `progress` of the run."""
        scale = self.batch_size / REFERENCE_BATCH * 0.5 * (1 + math.cos(math.pi * progress))
        return self.lr * scale, (self.lr if self.lr_head is None else self.lr_head) * scale

    def fitting(self, images: int, world: int, fraction: float, epochs: int | None) -> Protocol:
        """The protocol for `images` labelled images: whole batches, and enough epochs unless `epochs` says how many."""
        batch = max(world, min(self.batch_size, images) // world * world)
        usual = EPOCHS_OF_FEW if fraction <= FEW else EPOCHS
        return self._replace(
            batch_size=batch, epochs=epochs or max(usual, math.ceil(LEAST_STEPS / max(1, images // batch)))
        )


class Network(nn.Module):
    """An encoder's backbone and a classifier: views [N, 3, S, S] -> logits float32 [N, C]."""

    def __init__(self, encoder: Encoder, classifier: nn.Linear) -> None:
        super().__init__()
        self.encoder, self.classifier = encoder, classifier

    def forward(self, views: Tensor) -> Tensor:
        """Logits."""
        return self.classifier(self.encoder.features(views).to(self.classifier.weight.dtype))


class Masters:
    """fp32 masters of parameters that compute in fewer bits; of all others the parameters themselves."""

    def __init__(self, module: nn.Module, work: torch.dtype) -> None:
        values = list(module.parameters())
        before = [value.detach().clone() for value in values]
        for each in module.modules():
            if isinstance(each, nn.Conv2d):
                each.to(work)
        self.pairs = [
            (value, value if value.dtype == master.dtype else nn.Parameter(master))
            for value, master in zip(values, before, strict=True)
            if value.requires_grad
        ]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What the optimiser moves."""
        return [master for _, master in self.pairs]

    def take_gradients(self) -> None:
        """Hand the gradients of the working copies to the masters."""
        for value, master in self.pairs:
            if master is not value:
                master.grad = None if value.grad is None else value.grad.to(master.dtype)
                value.grad = None

    @torch.no_grad()
    def cast(self) -> None:
        """Cast the masters to the working copies."""
        for value, master in self.pairs:
            if master is not value:
                value.copy_(master)


class Tuning:
    """Fine-tuning of one encoder, as often as is asked for: each training begins with its first weights."""

    def __init__(
        self, encoder: Encoder, recipe: Recipe, classes: int, parallel: Parallel, loading: Loading, work: torch.dtype
    ) -> None:
        self.encoder, self.recipe, self.classes, self.parallel = encoder, recipe, classes, parallel
        self.loading = loading
        _take_whole_batches(encoder, parallel)
        encoder.requires_grad_(True)
        encoder.fc.requires_grad_(False)
        self._first = {name: value.clone() for name, value in encoder.state_dict().items()}
        self.masters = Masters(encoder, work)

    def fit(
        self,
        train: Manifest,
        val: Manifest,
        protocol: Protocol,
        report: Report = lambda line: None,
        looks: int = LOOKS,
    ) -> Probe:
        """Train on `train` and judge by the centre crops of `val`, at most `looks` times.

        All ranks get the same figures. A line of the curve has the mean loss since the one before. Stops early where it
        is not finite: the last line then holds it.
        """
        self._begin_again()
        recipe = _recipe(self.recipe, protocol)
        plan = Plan(recipe, train.sizes, self.parallel.world, self.parallel.rank)
        classifier = new_classifier(self.encoder.feature_dim, self.classes, protocol.seed, self.parallel.device)
        network: nn.Module = Network(self.encoder, classifier)
        if self.parallel.world > 1:
            devices = [self.parallel.device] if self.parallel.device.type == "cuda" else None
            network = nn.parallel.DistributedDataParallel(network, devices, **{BUFFERS: False})  # type: ignore[arg-type]
        groups = [{"params": self.masters.parameters}, {"params": list(classifier.parameters())}]
        optimizer = torch.optim.SGD(groups, lr=0.0, momentum=MOMENTUM, nesterov=True)
        curve: list[dict[str, float]] = []
        scores = Scores(0.0, 0.0, [None] * self.classes, torch.zeros(self.classes, self.classes, dtype=torch.int64))
        total, steps = torch.zeros((), device=self.parallel.device), plan.steps_per_epoch
        last, between, since = protocol.epochs * steps, steps * math.ceil(protocol.epochs / looks), 0
        for step, (views, labels) in enumerate(self._batches(train, plan, last)):
            self.encoder.train()
            rates = protocol.rates(step / last)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            loss = F.cross_entropy(network(views), labels)
            optimizer.zero_grad()
            loss.backward()
            self.masters.take_gradients()
            optimizer.step()
            self.masters.cast()
            total += loss.detach()
            since += 1
            if since == between or step + 1 == last:
                mean = self.parallel.mean(total).item() / since
                total.zero_()
                since = 0
                line = {"epoch": (step + 1) // steps, "lr": rates[0], "loss": mean}
                if not math.isfinite(mean):
                    curve.append(line | {"top1": 0.0, "top5": 0.0})
                    break
                scores = self._judge(val, classifier)
                curve.append(line | {"top1": scores.top1, "top5": scores.top5})
                report(curve[-1])
        return Probe(classifier, curve, scores)

    def choose(self, train: Manifest, protocol: Protocol) -> Choice:
        """The rate of RATES that does best on images held out, after a third of the epochs on the others.

        A fifth of each class is held out, then the next one, until the rates were judged by ENOUGH images or one rate
        is left. After each fifth those are left out that are MARGIN standard errors worse than the best.
        """
        assert train.labels is not None
        race = {lr: Tried(lr, 0.0, None) for lr in RATES}
        running, judged, turns, count = list(RATES), 0, 0, 0
        while len(running) > 1 and turns < FOLDS and judged < ENOUGH:
            fitted, held = held_out_split(train.labels, turns)
            if not len(held) or len(fitted) < 2 * self.parallel.world:
                break
            count, before, judged, turns = len(fitted), judged, judged + len(held), turns + 1
            short = protocol.fitting(len(fitted), self.parallel.world, 1, max(1, protocol.epochs // TRIAL))
            for lr in running:
                probe = self.fit(train.take(fitted), train.take(held), short._replace(lr=lr), looks=1)
                race[lr] = _together(race[lr], before, probe, len(held))
            running = _in_the_race([race[lr] for lr in running], judged)
        if not turns:
            return Choice(protocol.lr)
        best = max((race[lr] for lr in running), key=lambda each: (each.top1, -_or_infinity(each.loss)))
        return Choice(best.lr, count, judged, turns, list(race.values()))

    def weights(self) -> dict[str, Tensor]:
        """The backbone as it is now, in fp32, by torchvision's names."""
        masters = {id(value): master for value, master in self.masters.pairs}
        state = dict(self.encoder.state_dict(keep_vars=True))
        backbone = {name: value for name, value in state.items() if not name.startswith("fc.")}
        return {name: masters.get(id(value), value).detach().cpu().contiguous() for name, value in backbone.items()}

    def _begin_again(self) -> None:
        self.encoder.load_state_dict(self._first)
        for (_, master), value in zip(self.masters.pairs, self._first_parameters(), strict=True):
            with torch.no_grad():
                master.copy_(value)
        self.masters.cast()

    def _first_parameters(self) -> list[Tensor]:
        return [self._first[name] for name, value in self.encoder.named_parameters() if value.requires_grad]

    def _batches(self, train: Manifest, plan: Plan, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        labels = torch.from_numpy(train.labels).to(self.parallel.device)
        colours = plan.recipe.augmentation
        dtype = self.encoder.conv1.weight.dtype
        quarantine = Quarantine(train, max_share=plan.recipe.max_bad_share)
        with Loader(train, plan, self.parallel, range(steps), self.loading, quarantine) as loader:
            for batch in loader:
                warn_of_bad(quarantine)
                crops, parameters = batch.query_crops, batch.query_parameters
                origins = quarantine.replace(batch.step, batch.sample)
                views = photometric(crops, parameters, colours.mean, colours.std, dtype=dtype)
                yield views, labels[torch.from_numpy(origins).to(labels.device)]

    def _judge(self, val: Manifest, classifier: nn.Linear) -> Scores:
        features = extract(self.encoder, val, self.recipe, self.parallel, loading=self.loading, normalise=False)
        with torch.no_grad():
            return score(classifier(features[0].to(classifier.weight.dtype)), features[1])


def _together(sofar: Tried, before: int, probe: Probe, count: int) -> Tried:
    """What a rate came to on `before` images, and now on `count` others."""
    loss = probe.curve[-1]["loss"]
    old = sofar.loss if before else 0.0
    top1 = (sofar.top1 * before + probe.scores.top1 * count) / (before + count)
    if old is None or not math.isfinite(loss):
        return Tried(sofar.lr, top1, None)
    return Tried(sofar.lr, top1, (old * before + loss * count) / (before + count))


def _in_the_race(tried: Sequence[Tried], judged: int) -> list[float]:
    best = max(each.top1 for each in tried) / 100
    error = math.sqrt(best * (1 - best) / judged)
    return [each.lr for each in tried if each.top1 / 100 >= best - MARGIN * error]


def _or_infinity(loss: float | None) -> float:
    return math.inf if loss is None else loss


def _recipe(recipe: Recipe, protocol: Protocol) -> Recipe:
    # One view of each image: of a bank's, the only one that is decoded.
    plain: dict[str, Any] = {"dictionary": "bank", "ema_momentum": Recipe.ema_momentum, "same_view_negatives": False}
    fitted: Any = protocol
    return training_recipe(dataclasses.replace(recipe, symmetric=False, **plain), fitted)


def _take_whole_batches(encoder: Encoder, parallel: Parallel) -> None:
    for module in encoder.modules():
        if isinstance(module, BatchNormAct):
            module.group_size = 0
            module.gather = parallel.all_gather if parallel.world > 1 else None


def run(options: EvaluateFinetune) -> None:
    """Fine-tune and write RUN/finetune.json, .png and .safetensors; finetune-0.1 for a tenth of the labels.

    Raises UsageError or DataError on wrong use or bad images.
    """
    with Parallel.start(options.device, timedelta(seconds=options.timeout_seconds)) as parallel:
        encoder, recipe, step = load_encoder(options.run, parallel, options.untrained)
        train, val = both_sides(options.run, options.data, options.val, options.labels, recipe.max_pixels)
        whole = len(train)
        train = listed(train, options.subset) if options.subset else share_of(train, options.fraction)
        base = Protocol(RATES[0] if options.lr == "auto" else options.lr, options.lr_head, seed=options.seed)
        protocol = base._replace(batch_size=options.batch_size).fitting(
            len(train), parallel.world, len(train) / whole, options.epochs
        )
        loading = Loading(threads=options.threads or None)
        work = _numbers(options, parallel)
        tuning = Tuning(encoder, recipe, len(train.classes), parallel, loading, work)
        began = time.perf_counter()
        if parallel.is_main:
            print(
                f"{len(train)} of {whole} labelled images train, {len(val)} validate, {len(train.classes)} classes; "
                f"encoder of {options.run} after step {step}",
                flush=True,
            )
        choice = tuning.choose(train, protocol) if options.lr == "auto" else None
        protocol = protocol._replace(lr=choice.lr) if choice else protocol
        if parallel.is_main:
            print(choice or f"lr {protocol.lr:g} for batches of 256")
            print(f"{counted(protocol.epochs, 'epoch')} of batches of {protocol.batch_size}", flush=True)
        with tqdm(total=protocol.epochs, unit="epoch", disable=None if parallel.is_main else True) as bar:
            probe = tuning.fit(train, val, protocol, lambda line: _tell(bar, line, protocol.epochs, parallel.is_main))
        if parallel.is_main:
            facts: dict[str, Any] = {
                "step": step,
                "protocol": protocol._asdict(),
                "rate": choice.as_dict() if choice else None,
                "fraction": len(train) / whole,
                "precision": str(work).removeprefix("torch."),
                "seconds": time.perf_counter() - began,
                "backbone": "trained",
            }
            name = name_of(options)
            figures = figures_of(probe, train, val, **facts)
            write_probe(options.run, name, probe, figures, train.classes, tuning.weights())
            print(
                f"{name}: top-1 {probe.scores.top1:.2f}%, top-5 {probe.scores.top5:.2f}% "
                f"(see {options.run / name}.json and .png; weights in {name}.safetensors)"
            )


def _numbers(options: EvaluateFinetune, parallel: Parallel) -> torch.dtype:
    device = parallel.device
    able = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    precision = ("bf16" if able else "fp32") if options.precision == "auto" else options.precision
    return torch.bfloat16 if precision == "bf16" else torch.float32


def name_of(options: EvaluateFinetune) -> str:
    """Name of the files: each share of the labels has its own."""
    share = "-subset" if options.subset else "" if options.fraction == 1 else f"-{options.fraction:g}"
    return figures_name(f"finetune{share}", options.untrained)


def _tell(bar: tqdm, line: dict[str, float], epochs: int, is_main: bool) -> None:
    bar.update(int(line["epoch"]) - bar.n)
    bar.set_postfix_str(f"loss {line['loss']:.3f}  top-1 {line['top1']:.2f}%")
    if is_main and bar.disable:
        print(f"epoch {line['epoch']:.0f}/{epochs}  loss {line['loss']:.3f}  top-1 {line['top1']:.2f}%", flush=True)
