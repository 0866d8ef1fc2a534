"""A recipe so small that a step of it takes milliseconds: fields of a Recipe, for tests of the step."""

TINY = {
    "arch": "resnet18",
    "width": 0.125,
    "stem": "cifar",
    "dim": 16,
    "batch_size": 16,
    "bn_group": 4,
    "crop_size": 12,
    "queue_size": 40,
    "temperature": 0.2,
    "precision": "fp32",  # the same numbers on every processor: "auto" is what it has
}
