"""ResNet50 and ResNet34: timm's trunk on an upright spectrogram, attention pooling written out."""

import pytest
import timm
import torch

from fastat.models import create_model
from fastat.models.resnet import ResNet50


def create(name: str, **options: object) -> ResNet50:
    sizes = {"num_mels": 64, "num_frames": 100, "num_classes": 5}
    model = create_model(name, **(sizes | options))  # type: ignore[arg-type]
    assert isinstance(model, ResNet50)
    return model.eval()


@pytest.mark.parametrize("name", ["resnet50", "resnet34"])
def test_equals_the_trunk_and_pooling_written_out(name: str) -> None:
    """Mel bins are the image's height, their mean is pooled by sigmoid attention over time."""
    model = create(name)
    x = torch.randn(2, 100, 64)
    trunk = timm.create_model(name, in_chans=1, num_classes=0).eval()
    trunk.load_state_dict(model.trunk.state_dict())
    image = torch.stack([clip.T for clip in x]).unsqueeze(1)
    features = trunk.forward_features(image)  # [B, D, F', T']
    assert features.shape == (2, model.embedding_size, 2, 4)
    h = features.mean(2).mT
    assert model.head.fc_att is not None
    prob, att = (
        fc(h).sigmoid().clamp(1e-7, 1 - 1e-7) for fc in (model.head.fc_prob, model.head.fc_att)
    )
    want = (prob * att / att.sum(1, keepdim=True)).sum(1)
    torch.testing.assert_close(model(x).sigmoid(), want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("name", "width"), [("resnet50", 2048), ("resnet34", 512)])
def test_every_block_starts_open(name: str, width: int) -> None:
    """The last BatchNorm of a residual block starts at 1, as torchvision's does, not at 0."""
    model = create(name)
    assert model.embedding_size == width
    for key, p in model.trunk.named_parameters():
        if key.endswith(("bn1.weight", "bn2.weight", "bn3.weight")):
            assert (p == 1).all(), key
