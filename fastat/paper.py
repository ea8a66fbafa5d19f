"""What the paper reports of each model (Table 2), to stand beside what is measured here."""

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
