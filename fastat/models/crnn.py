"""CRNN: the TALNet stack, then a bidirectional GRU.

Source: Li et al., "AudioTagging Done Right" (2022), Table 2: 10.5M parameters, mAP 0.429 (A2),
0.406 (A4); TALNet is Wang's (2019). 10,520,702 parameters at 64 mels, embedding 1024, 527 classes.
"""

import torch
from torch import Tensor, nn

from fastat.models.base import FrameModel
from fastat.models.layers import PoolingHead, TalNet, one_channel_image


class Crnn(FrameModel):
    """[B, T, F] normalised features -> [B, K] logits, float32.

    torch.compile breaks at the GRU, which is cuDNN's: two regions, before it and after it. Under
    bfloat16 autocast on a GPU the GRU computes in float32, see ``_recurrent``: the casts around it
    are two more, of nothing else.

    Args:
        num_mels, num_frames, num_classes: the feature map and the classes.
        embedding: width of a frame after the convolutions; a direction of the GRU has half of it.
        pooling: "att", "max", "ave", "lin", "exp" or "sigatt".
    """

    def __init__(
        self,
        *,
        num_mels: int,
        num_frames: int,
        num_classes: int,
        embedding: int = 1024,
        pooling: str = "att",
    ) -> None:
        super().__init__()
        self.talnet = TalNet(num_mels, num_frames, embedding)
        self.gru = nn.GRU(embedding, embedding // 2, batch_first=True, bidirectional=True)
        for name, p in self.gru.named_parameters():
            nn.init.orthogonal_(p) if name.startswith("weight") else nn.init.zeros_(p)
        self.embedding_size = embedding
        self.head = PoolingHead(embedding, num_classes, pooling)

    def frames(self, x: Tensor) -> Tensor:
        """x: [B, T, F] float32 -> [B, T // 4, D]."""
        x = self.run(self.talnet.blocks, one_channel_image(x))  # [B, C, T / 4, F']
        out: Tensor = self._recurrent(self.talnet.flatten(x))
        return out

    def _recurrent(self, x: Tensor) -> Tensor:
        """The GRU, [B, N, D] -> [B, N, D].

        Whatever dtype autocast was asked for, it runs cuDNN's recurrent networks in float16
        (ATen/cudnn/AutocastRNN.cpp). Their gradients would be too: one of a mean over clips and
        classes is mostly below 6e-8 here, which is 0, and all before the GRU would learn nothing.
        Only fp16 training scales its loss.
        """
        apart = x.is_cuda and torch.is_autocast_enabled("cuda")
        if apart and torch.get_autocast_dtype("cuda") != torch.float16:
            with torch.autocast("cuda", enabled=False):
                out: Tensor = self.gru(x.float())[0]
        else:
            out = self.gru(x)[0]
        return out
