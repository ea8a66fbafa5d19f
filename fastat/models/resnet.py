"""ResNet50 and ResNet34 on the log-mel as an image of one channel, with attention pooling.

Source: Li et al., "AudioTagging Done Right" (2022), Table 2: 25.6M parameters, mAP 0.410 (A1),
0.399 (A2), 0.382 (A3), 0.370 (A4); pooling after Gong et al., PSLA (2021). 25,661,406 parameters at
527 classes. At 64 mels the authors' code scrambles time and channels before pooling; that is not
reproduced.
"""

from collections.abc import Iterator
from typing import Any, ClassVar

from torch import Tensor, nn

from fastat.models.base import FrameModel
from fastat.models.layers import PoolingHead, one_channel_image


class ResNet50(FrameModel):
    """[B, T, F] normalised features -> [B, K] logits, float32.

    Args:
        num_mels, num_frames, num_classes: the feature map and the classes; any map fits.
        pooling: "sigatt", or "att", "max", "ave", "lin", "exp".
    """

    TRUNK: ClassVar[str] = "resnet50"
    trunk: Any

    def __init__(
        self, *, num_mels: int, num_frames: int, num_classes: int, pooling: str = "sigatt"
    ) -> None:
        import timm  # takes three seconds, which other models need not wait for

        super().__init__()
        # torchvision's initialisation, as the authors': no zeros in the last BatchNorm of a block.
        self.trunk = timm.create_model(
            self.TRUNK, in_chans=1, num_classes=0, global_pool="", zero_init_last=False
        )
        self.embedding_size = self.trunk.num_features
        self.head = PoolingHead(self.embedding_size, num_classes, pooling)

    def frames(self, x: Tensor) -> Tensor:
        """x: [B, T, F] float32 -> [B, T / 32, D], the mean over the mel axis."""
        x = self.run(self._blocks(), one_channel_image(x.transpose(1, 2)))  # [B, D, F', T']
        return x.mean(2).transpose(1, 2)

    def _blocks(self) -> Iterator[nn.Module]:
        # One block: its ReLU works in place, on a map that a block of its own would have to keep.
        yield nn.Sequential(self.trunk.conv1, self.trunk.bn1, self.trunk.act1, self.trunk.maxpool)
        for stage in (self.trunk.layer1, self.trunk.layer2, self.trunk.layer3, self.trunk.layer4):
            yield from stage


class ResNet34(ResNet50):
    """ResNet50's smaller sibling: 512 channels."""

    TRUNK = "resnet34"
