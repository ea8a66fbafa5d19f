"""One whole training step of CNN+Transformer under A4, from packed shards: ours and a plain one.

Both read the same int16 rows. The plain step is what a careful user writes first: float32, eager,
contiguous tensors, separate projections, torch's own dropout and Adam, and a torch.stft front end
clip by clip. That it computes the same logits and features is asserted before anything is timed.
"""

import time
from collections.abc import Iterator
from statistics import median

import numpy as np
import pytest
import soundfile as sf
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

from fastat.checkpoint import ModelMeta, build_frontend
from fastat.data.loader import Batch, PackedSource, mixed_targets
from fastat.data.pack import pack
from fastat.data.sampler import Sampler, StepPlan, balanced_weights
from fastat.data.shards import PackedSet
from fastat.environment import autocast, default_device, device_name
from fastat.features import FEATURES
from fastat.frontend import Frontend
from fastat.models.cnn_trans import CnnTransformer
from fastat.models.layers import ConvBlock, EncoderLayer
from fastat.optim import create_adam, train_step
from fastat.procedures import A4, model_options

BATCH, CLASSES, ROUNDS = 16, 527, 9
DEVICE = default_device()


# ------------------------------------------------------------------------------- the plain step
class PlainLayer(nn.Module):
    """The post-norm encoder layer in torch's plainest modules."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.w_q, self.w_k, self.w_v, self.fc = (nn.Linear(width, width) for _ in range(4))
        self.w_1, self.w_2 = nn.Linear(width, width), nn.Linear(width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        B, N, D = x.shape
        q, k, v = (
            w(x).view(B, N, self.num_heads, -1).transpose(1, 2)
            for w in (self.w_q, self.w_k, self.w_v)
        )
        weights = self.dropout(
            torch.softmax(q @ k.transpose(2, 3) / (D // self.num_heads) ** 0.5, -1)
        )
        y = self.fc((weights @ v).transpose(1, 2).reshape(B, N, D))
        x = self.norm1(x + self.dropout(y))
        y = self.w_2(F.relu(self.w_1(x)))
        out: Tensor = self.norm2(x + self.dropout(y))
        return out


class PlainModel(nn.Module):
    """CNN+Transformer, conv - BatchNorm - ReLU - pool in that order, weights copied from ours."""

    def __init__(self, ours: CnnTransformer, dropout: float) -> None:
        super().__init__()
        self.positions, self.scale = ours.positions, ours.input_scale
        blocks: list[nn.Module] = []
        for block in ours.talnet.blocks:
            assert isinstance(block, ConvBlock)
            conv = nn.Conv2d(block.conv.in_channels, block.conv.out_channels, 3, padding=1)
            norm = nn.BatchNorm2d(block.conv.out_channels)
            conv.load_state_dict(block.conv.state_dict())
            norm.load_state_dict(block.bn.state_dict())
            blocks += [conv, norm, nn.ReLU()]
            if block.pool is not None:
                blocks.append(nn.MaxPool2d(block.pool))
        self.convs = nn.Sequential(*blocks)
        theirs = ours.layers[0]
        assert isinstance(theirs, EncoderLayer) and ours.head.fc_att is not None
        width = theirs.proj.out_features
        self.layer = PlainLayer(width, theirs.num_heads, dropout)
        projections = (self.layer.w_q, self.layer.w_k, self.layer.w_v)
        weights, biases = theirs.qkv.weight.chunk(3), theirs.qkv.bias.chunk(3)
        for linear, weight, bias in zip(projections, weights, biases, strict=True):
            linear.load_state_dict({"weight": weight, "bias": bias})
        self.layer.fc.load_state_dict(theirs.proj.state_dict())
        self.layer.w_1.load_state_dict(theirs.fc1.state_dict())
        self.layer.w_2.load_state_dict(theirs.fc2.state_dict())
        self.layer.norm1.load_state_dict(theirs.norm1.state_dict())
        self.layer.norm2.load_state_dict(theirs.norm2.state_dict())
        self.fc_prob, self.fc_att = nn.Linear(width, CLASSES), nn.Linear(width, CLASSES)
        self.fc_prob.load_state_dict(ours.head.fc_prob.state_dict())
        self.fc_att.load_state_dict(ours.head.fc_att.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, F] -> [B, K] probabilities."""
        x = self.convs(self.positions(x * self.scale).unsqueeze(1)).transpose(1, 2).flatten(2)
        x = self.layer(self.layer(x))
        prob = torch.sigmoid(self.fc_prob(x)).clamp(1e-7, 1 - 1e-7)
        out: Tensor = (prob * torch.softmax(self.fc_att(x), 1)).sum(1).clamp(1e-7, 1 - 1e-7)
        return out


class PlainFrontend:
    """The same features, clip by clip, through torch.stft."""

    def __init__(self, ours: Frontend) -> None:
        self.ours = ours
        self.bank = torch.from_numpy(FEATURES["logmel64"].mel_bank()).float().to(DEVICE)

    def __call__(self, rows: Tensor, plan: StepPlan) -> Tensor:
        clips = []
        partner = {int(i): j for j, i in enumerate(plan.mix_into)}
        for i in range(len(plan.rows)):
            x = rows[i].float() / 32768
            x = x - x.mean()
            if i in partner:
                j = partner[i]
                y = rows[len(plan.rows) + j].float() / 32768
                x = float(plan.lam[j]) * x + (1 - float(plan.lam[j])) * (y - y.mean())
                x = x - x.mean()
            window = torch.hann_window(1024, device=DEVICE)
            spectrum = torch.stft(
                x, 4096, 400, 1024, window, center=True, pad_mode="constant", return_complex=True
            )
            mel = spectrum.abs().pow(2).T @ self.bank
            clip = (10 * torch.log10(mel.clamp(min=1e-10)))[:400]
            for (start, width), axis in ((plan.time_mask[i], 0), (plan.freq_mask[i], 1)):
                clip.narrow(axis, int(start), int(width)).zero_()
            clips.append((clip - self.ours.mean) / (2 * self.ours.std))
        return torch.stack(clips)


# ------------------------------------------------------------------------------------- set-up
@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PackedSet]:
    """64 ten-second clips of coloured noise, 527 classes declared."""
    root = tmp_path_factory.mktemp("step")
    rng = np.random.default_rng(0)
    lines = ["path,labels"]
    for i in range(64):
        sf.write(root / f"{i}.wav", 0.1 * rng.standard_normal(160_000), 16_000, subtype="PCM_16")
        lines.append(f"{i}.wav,c{i % 8}")
    (root / "table.csv").write_text("\n".join(lines) + "\n")
    names = "\n".join(f"{k},c{k},class {k}" for k in range(CLASSES))
    (root / "classes.csv").write_text("index,mid,display_name\n" + names + "\n")
    pack(root / "table.csv", root / "set", labels=root / "classes.csv")
    opened = PackedSet.open(root / "set")
    yield opened
    opened.close()


class Step:
    """Both steps over one packed set, and where their time goes."""

    def __init__(self, packed: PackedSet) -> None:
        torch.manual_seed(0)
        stats = packed.stats["logmel64"]
        dropout = model_options("cnn_trans", A4)["dropout"]
        meta = ModelMeta(
            model="cnn_trans", feature="logmel64", clip_seconds=10.0, num_mels=64, num_frames=400,
            mean=stats.mean, std=stats.std, classes=packed.classes, options={"dropout": dropout},
        )  # fmt: skip
        model = meta.create()
        assert isinstance(model, CnnTransformer)
        self.packed = packed
        self.frontend = build_frontend(meta).to(DEVICE)
        self.plain = PlainModel(model, dropout).to(DEVICE)
        self.plain_frontend = PlainFrontend(self.frontend)
        self.plain_adam = torch.optim.Adam(self.plain.parameters(), lr=1e-4)
        self.model = model.to(DEVICE).to(memory_format=torch.channels_last)
        self.params = list(self.model.parameters())
        self.adam, _ = create_adam(
            self.params, lr=1e-4, betas=(0.9, 0.999), weight_decay=0.0, device=DEVICE
        )
        self.sampler = Sampler(
            packed.num_clips, BATCH, seed=0, num_frames=400, num_mels=64,
            weights=balanced_weights(packed.target_bits, packed.label_counts),
            mixup=A4.mixup, mixup_alpha=A4.mixup_alpha,
            time_mask=A4.time_mask, freq_mask=A4.freq_mask,
        )  # fmt: skip
        self.batches = PackedSource(packed, DEVICE).batches(self.plans())
        self.plain_plans = self.plans()
        self.seconds: dict[str, list[float]] = {"data": [], "frontend": [], "step": []}

    def plans(self) -> Iterator[StepPlan]:
        steps = self.sampler.steps_per_epoch
        for i in range(10**9):
            yield self.sampler.plan(i // steps, i % steps)

    def ours(self) -> Tensor:
        """Our step, with a stamp after each part."""
        stamps = [time.perf_counter()]
        batch: Batch = next(self.batches)
        stamps.append(time.perf_counter())
        features = batch.features(self.frontend)
        synchronize()
        stamps.append(time.perf_counter())
        precision = autocast(DEVICE, "bf16")
        loss, _, _ = train_step(
            self.model, self.params, self.adam, features, batch.target, precision
        )
        synchronize()
        stamps.append(time.perf_counter())
        for name, a, b in (("data", 0, 1), ("frontend", 1, 2), ("step", 0, 3)):
            self.seconds[name].append(stamps[b] - stamps[a])
        return loss

    def plain_step(self) -> Tensor:
        """The plain step over the same rows."""
        plan = next(self.plain_plans)
        features = self.plain_frontend(self.read(plan), plan)
        target = mixed_targets(self.packed, plan).to(DEVICE)
        loss = F.binary_cross_entropy(self.plain(features), target)
        self.plain_adam.zero_grad()
        loss.backward()
        self.plain_adam.step()
        return loss.detach()

    def read(self, plan: StepPlan) -> Tensor:
        rows = np.concatenate([plan.rows, plan.partners])
        out = np.empty((len(rows), self.packed.clip_samples), np.int16)
        self.packed.read_rows(rows, out)
        return torch.from_numpy(out).to(DEVICE)


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


@pytest.fixture(scope="module")
def step(packed: PackedSet) -> Iterator[Step]:
    """Both steps, shown to compute the same before they are timed."""
    s = Step(packed)
    plan = s.sampler.plan(0, 0)
    batch = next(PackedSource(packed, DEVICE).batches([plan]))
    features = batch.features(s.frontend)
    plain_features = s.plain_frontend(s.read(plan), plan)
    torch.testing.assert_close(features, plain_features, rtol=1e-3, atol=1e-3)
    s.model.eval()
    s.plain.eval()
    with torch.no_grad():
        ours, plain = s.model(features).sigmoid(), s.plain(features)
    torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-4)
    s.model.train()
    s.plain.train()
    yield s
    s.batches.close()  # type: ignore[attr-defined]


@pytest.mark.benchmark(group="training step, cnn_trans A4, batch 16")
def test_training_step(benchmark: BenchmarkFixture, step: Step) -> None:
    """Ours timed; a plain step before every one of ours, so that both meet the same weather."""
    plain: list[float] = []

    def plain_first() -> None:
        started = time.perf_counter()
        step.plain_step()
        synchronize()
        plain.append(time.perf_counter() - started)

    for _ in range(2):
        step.plain_step()
        step.ours()
    for times in step.seconds.values():
        times.clear()
    loss = benchmark.pedantic(step.ours, setup=plain_first, rounds=ROUNDS)
    assert torch.isfinite(loss)
    seconds = step.seconds["step"]
    ours, theirs = median(seconds), median(plain)
    benchmark.extra_info.update(
        device=device_name(DEVICE),
        clips_per_s=BATCH / ours,
        plain_clips_per_s=BATCH / theirs,
        ours_over_plain=median(p / o for p, o in zip(plain, seconds, strict=True)),
        data_share=median(step.seconds["data"]) / ours,
        frontend_share=median(step.seconds["frontend"]) / ours,
    )
