"""Faster R-CNN with a C4 backbone, made of torchvision's parts, as MoCo is transferred (He et al., 2020, appendix A.1).

The backbone is the encoder up to its third stage; the box head is its fourth, then a batch norm, then the mean over
places. Every layer is trained, batch norm included. Over several ranks batch norm takes the mean of the ranks'
statistics, each rank counted alike: detectron2's naiveSyncBN. RoIAlign is the aligned one.

Two things differ from detectron2's and cannot be set in torchvision: the box losses are smooth within 1/9 (there plain
L1), and proposals are sampled by another generator. The classifier and the box regressor start as there, from
N(0, 0.01) and N(0, 0.001).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastmoco.encoder import BatchNormAct, Encoder
from fastmoco.options import UsageError
from fastmoco.parallel import Parallel
from fastmoco.recipe import Recipe

INSTALL = (
    "evaluate detection needs torchvision: pip install -c constraints.txt -e '.[detection]'; or train by detectron2: "
    "fastmoco export RUN --format detectron2, and docs/detection.md"
)
ANCHORS, RATIOS = (32, 64, 128, 256, 512), (0.5, 1.0, 2.0)
POOLED = 14  # places a side of a region, before the fourth stage halves them
SCALES = 11  # training sizes: 480, 512 .. 800 where tests have 800
SMALLEST = 0.6
LONGER = 1333 / 800  # an image's longer side is at most so much of the shorter one's size


class Size(NamedTuple):
    """What decides the work for an image."""

    shorter: int = 800
    """Shorter side of test images in pixels; training draws from 60 % to all of it in eleven steps."""
    regions: int = 512
    """Regions for which the box head is trained, of each image."""
    proposals: int = 1000
    """Regions of a test image that the box head looks at."""


def torchvision() -> Any:
    """The package; UsageError with what to do where it is not installed."""
    try:
        import torchvision as package
        import torchvision.models.detection  # noqa: F401
    except ImportError as error:
        raise UsageError(INSTALL) from error
    return package


class Backbone(nn.Module):
    """An encoder's stem and first three stages: images [N, 3, H, W] -> features [N, C, H / stride, W / stride]."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.stem_conv, self.bn1, self.maxpool = encoder.conv1, encoder.bn1, encoder.maxpool
        self.layer1, self.layer2, self.layer3 = encoder.layer1, encoder.layer2, encoder.layer3
        self.out_channels = _channels(encoder.layer3)
        self.stride = 4 if isinstance(encoder.maxpool, nn.Identity) else 16

    def forward(self, x: Tensor) -> Tensor:
        """The third stage's output."""
        x = self.stem_conv(x.contiguous(memory_format=torch.channels_last))
        pair = self.bn1(x, twice=True) if isinstance(self.maxpool, nn.Identity) else self.bn1.pooled(x)
        return self.layer3(self.layer2(self.layer1(pair)))[0]


class BoxHead(nn.Module):
    """An encoder's fourth stage, a batch norm and the mean over places: regions [R, C, 14, 14] -> [R, F]."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.layer4 = encoder.layer4
        self.norm = BatchNormAct(encoder.feature_dim, relu=False)
        self.norm.reset()

    def forward(self, x: Tensor) -> Tensor:
        """Features of regions."""
        x = x.contiguous(memory_format=torch.channels_last)
        return self.norm(self.layer4((x, x))[0]).mean((2, 3))


class AlignedPool(nn.Module):
    """RoIAlign with pixel centres at halves, as many samples as a region needs (detectron2's ROIAlignV2)."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.pool = torchvision().ops.RoIAlign(POOLED, 1 / stride, 0, aligned=True)

    def forward(self, features: dict[str, Tensor], boxes: list[Tensor], _: list[tuple[int, int]]) -> Tensor:
        """Regions [R, C, 14, 14] of feature maps [N, C, h, w] and boxes [r, 4] of each image."""
        return self.pool(next(iter(features.values())), boxes)


def build(encoder: Encoder, recipe: Recipe, classes: int, size: Size, parallel: Parallel, seed: int) -> nn.Module:
    """A detector of `classes` classes around the layers of `encoder`, on the device; new layers are drawn from `seed`.

    Called as torchvision's detectors: (images, targets) -> losses in training mode, else images -> detections, with
    labels from 1. Raises UsageError without torchvision.
    """
    detection = torchvision().models.detection
    _share_statistics(encoder, parallel)
    torch.manual_seed(seed)
    backbone, head = Backbone(encoder), BoxHead(encoder)
    head.norm.gather = parallel.all_gather if parallel.world > 1 else None
    steps = [SMALLEST + (1 - SMALLEST) * i / (SCALES - 1) for i in range(SCALES)]
    model = detection.FasterRCNN(
        backbone,
        min_size=tuple(round(size.shorter * step) for step in steps),
        max_size=round(size.shorter * LONGER),
        image_mean=list(recipe.augmentation.mean),
        image_std=list(recipe.augmentation.std),
        rpn_anchor_generator=detection.anchor_utils.AnchorGenerator((ANCHORS,), (RATIOS,)),
        rpn_pre_nms_top_n_train=12000,
        rpn_pre_nms_top_n_test=6000,
        rpn_post_nms_top_n_train=2000,
        rpn_post_nms_top_n_test=size.proposals,
        box_roi_pool=torchvision().ops.MultiScaleRoIAlign(["0"], POOLED, 0),  # it takes no other kind, until below
        box_head=head,
        box_predictor=detection.faster_rcnn.FastRCNNPredictor(encoder.feature_dim, classes + 1),
        box_batch_size_per_image=size.regions,
        size_divisible=backbone.stride,
    )
    model.roi_heads.box_roi_pool = AlignedPool(backbone.stride)
    for layer, std in (
        (model.roi_heads.box_predictor.cls_score, 0.01),
        (model.roi_heads.box_predictor.bbox_pred, 1e-3),
    ):
        nn.init.normal_(layer.weight, std=std)
        nn.init.zeros_(layer.bias)
    return model.requires_grad_(True).to(parallel.device)


def norms(model: nn.Module) -> list[BatchNormAct]:
    """The batch norms of a detector."""
    return [module for module in model.modules() if isinstance(module, BatchNormAct)]


def _share_statistics(encoder: Encoder, parallel: Parallel) -> None:
    for norm in norms(encoder):
        norm.group_size = 0
        norm.gather = parallel.all_gather if parallel.world > 1 else None


def _channels(stage: nn.Sequential) -> int:
    convolutions = [module for name, module in stage[-1].named_modules() if isinstance(module, nn.Conv2d)]
    return convolutions[-1].out_channels
