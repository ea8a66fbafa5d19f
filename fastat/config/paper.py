"""What the paper reports (Tables 2 to 4), to stand beside what is measured here."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PaperModel:
    """A row of Table 2."""

    title: str
    million_params: float | None
    """None: the paper does not have the model."""
    mAP: dict[str, float]
    """By procedure. A1 and A3 start from ImageNet weights, which exist for two architectures."""


TABLE_2 = {
    "ast": PaperModel("AST/ViT", 87.9, {"A1": 0.430, "A2": 0.274, "A3": 0.410, "A4": 0.268}),
    "transformer": PaperModel("Transformer", 28.5, {"A2": 0.230, "A4": 0.209}),
    "cnn_trans": PaperModel("CNN+Transformer", 12.1, {"A2": 0.437, "A4": 0.411}),
    "conformer": PaperModel("Conformer", 88.1, {"A2": 0.335, "A4": 0.308}),
    "resnet50": PaperModel("ResNet50", 25.6, {"A1": 0.410, "A2": 0.399, "A3": 0.382, "A4": 0.370}),
    "resnet34": PaperModel("ResNet34", None, {}),
    "crnn": PaperModel("CRNN", 10.5, {"A2": 0.429, "A4": 0.406}),
}


@dataclass(frozen=True)
class PaperStride:
    """A column of Table 3: the AST with patches a stride apart along both axes."""

    patches: int
    """As printed; most of them differ from the true count."""
    mAP: float | None
    hours_per_epoch: float | None
    """On the V100s of the procedure."""


TABLE_3 = {
    "A1": {
        4: PaperStride(8192, None, None),
        6: PaperStride(3570, None, None),
        8: PaperStride(2048, None, None),
        10: PaperStride(1212, 0.430, 10.8),
        12: PaperStride(756, 0.429, 6.19),
        16: PaperStride(512, 0.421, 5.53),
    },
    "A3": {
        4: PaperStride(1485, 0.414, 12.67),
        6: PaperStride(390, 0.408, 2.45),
        8: PaperStride(343, 0.410, 2.1),
        10: PaperStride(195, 0.370, 1.44),
        12: PaperStride(128, 0.320, 1.01),
        16: PaperStride(72, 0.24, 0.8),
    },
}
"""By procedure and stride."""

TABLE_4 = {
    "balancing": (3.9, 2.0),
    "mixup": (1.5, 0.8),
    "SpecAugment": (1.5, 0.3),
    "normalisation": (16.5, 9.0),
}
"""Percent of the mAP lost without each under A4: mean and spread over the models."""

TRAIN_CLIPS = 1_998_999
EVAL_CLIPS = 20_126
NUM_CLASSES = 527
