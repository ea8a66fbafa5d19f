"""The DALI source against the packed source, and the files DALI cannot take."""

import csv
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import soxr
import torch
from numpy.typing import NDArray

from fastat.audio.frontend import Frontend
from fastat.data import dali_check
from fastat.data.dali import DaliSource
from fastat.data.loader import Batch, PackedSource
from fastat.data.sampler import StepPlan
from fastat.data.shards import PackedSet
from fastat.packing.pack import pack
from fastat.system.errors import Failure, UserError
from tests.conftest import kept
from tests.reference_features import NEAR_PEAK_DB, TOLERANCE, assert_right

CPU = torch.device("cpu")
CLIP = 32_000  # two seconds

# name, subtype, seconds, channels, gain; all at 16 kHz and decoded without loss
LOSSLESS = [
    ("mono.wav", "PCM_16", 2.0, 1, 1.0),
    ("stereo.flac", "PCM_16", 2.0, 2, 1.0),  # the mean is a tie at every other sample
    ("short.wav", "PCM_24", 0.7001, 2, 1.0),
    ("six.flac", "PCM_24", 1.3, 6, 1.0),  # 1 / 6 is no float32
    ("four.wav", "PCM_24", 2.0, 4, 1.0),
    ("loud.wav", "FLOAT", 2.7, 1, 3.0),  # clips, and is longer than the clip
    ("double.wav", "DOUBLE", 2.0, 1, 1.0),
    ("eight_bit.wav", "PCM_U8", 2.0, 1, 1.0),
    ("tiny.wav", "PCM_16", 0.1, 1, 1.0),
]


def sound(seconds: float, channels: int, rate: int, seed: int) -> NDArray[np.float32]:
    """Gliding tones over noise, with an offset: [n, C]. Tones show errors of the mel bank."""
    rng = np.random.default_rng(seed)
    t = np.arange(round(seconds * rate)) / rate
    x = rng.uniform(-0.1, 0.1) + np.zeros_like(t)
    for _ in range(3):
        x += rng.uniform(0.05, 0.2) * np.sin(
            2 * np.pi * (rng.uniform(50, 3000) * t + rng.uniform(0, 200) * t**2)
        )
    noise = 0.002 * rng.standard_normal((len(t), channels))
    return np.asarray(x[:, None] + noise, np.float32)


def pack_files(folder: Path, files: list[Path], **options: object) -> PackedSet:
    """A packed set with these files in this order."""
    table = folder / "table.csv"
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "labels"))
        writer.writerows((path, f"class{i % 3}") for i, path in enumerate(files))
    options = {"clip_seconds": CLIP / 16_000, **options}
    pack(table, folder / "set", workers=1, **options)  # type: ignore[arg-type]
    return PackedSet.open(folder / "set")


def plan(rows: list[int], partners: list[int], mix_into: list[int], frames: int = 80) -> StepPlan:
    rng = np.random.default_rng(len(rows))
    masks = np.stack([rng.integers(0, frames // 2, len(rows)), rng.integers(0, 9, len(rows))], 1)
    return StepPlan(
        rows=np.array(rows, np.int64),
        partners=np.array(partners, np.int64),
        mix_into=np.array(mix_into, np.int64),
        lam=rng.beta(10, 10, len(partners)).astype(np.float32),
        time_mask=masks,
        freq_mask=masks[::-1].copy(),
    )


def dali(packed: PackedSet, feature: str = "logmel64", **options: object) -> DaliSource:
    return DaliSource(packed, feature, batch=16, threads=2, device=CPU, **options)  # type: ignore[arg-type]


def packed_batches(packed: PackedSet, plans: list[StepPlan]) -> list[Batch]:
    return [kept(batch) for batch in PackedSource(packed, CPU).batches(plans)]


def mixed(packed: PackedSet, step: StepPlan, remove_mean: bool) -> NDArray[np.float64]:
    """The waveforms that a step's features are taken from, in float64: [B, S]."""

    def centred(row: int) -> NDArray[np.float64]:
        raw = np.empty((1, packed.clip_samples), np.int16)
        packed.read_rows(np.array([row]), raw)
        x = raw[0, : packed.num_samples[row]] / 32768.0
        return x - x.mean() if remove_mean else x

    out = np.zeros((len(step.rows), packed.clip_samples))
    partner_of = dict(zip(step.mix_into.tolist(), range(len(step.partners)), strict=True))
    for i, row in enumerate(step.rows.tolist()):
        x = centred(row)
        if i in partner_of:
            lam = float(step.lam[partner_of[i]])
            y = centred(int(step.partners[partner_of[i]]))[: len(x)]
            x = lam * x + (1 - lam) * np.pad(y, (0, len(x) - len(y)))
            x = x - x.mean() if remove_mean else x
        out[i, : len(x)] = x
    return out


@pytest.fixture(scope="module")
def lossless(tmp_path_factory: pytest.TempPathFactory) -> PackedSet:
    folder = tmp_path_factory.mktemp("lossless")
    files = []
    for i, (name, subtype, seconds, channels, gain) in enumerate(LOSSLESS):
        x = gain * sound(seconds, channels, 16_000, seed=i)
        sf.write(folder / name, x, 16_000, subtype=subtype)
        files.append(folder / name)
    # A tone that glides past the foot of band 57, where DALI's own weights are 2 % off.
    t = np.arange(CLIP) / 16_000
    glide = 0.5 * np.sin(2 * np.pi * (5_660 * t + 20 * t**2))
    sf.write(folder / "glide.wav", glide, 16_000)
    return pack_files(folder, [*files, folder / "glide.wav"])


@pytest.fixture(scope="module")
def steps() -> list[StepPlan]:
    """Every clip unmixed; long into short, short into long, and itself; a smaller last step."""
    return [
        plan(list(range(10)), [], []),
        plan(list(range(9)), [0, 2, 5, 3, 8], [2, 0, 5, 7, 3]),
        plan([3, 3, 1], [8, 1], [1, 0]),
    ]


@pytest.mark.parametrize("remove_mean", [True, False], ids=["centred", "as_is"])
def test_log_mels_meet_the_criterion(
    lossless: PackedSet, steps: list[StepPlan], remove_mean: bool
) -> None:
    source = dali(lossless, remove_mean=remove_mean)
    assert not source.bad and source.usable.all()
    for step, batch in zip(steps[:2], source.batches(steps[:2]), strict=True):
        assert batch.log_mel is not None
        for got, x in zip(batch.log_mel, mixed(lossless, step, remove_mean), strict=True):
            assert_right("logmel64", got.double().numpy(), x.astype(np.float32))


@pytest.mark.parametrize("feature", ["logmel64", "fbank128"])
def test_batches_are_the_packed_sources(
    lossless: PackedSet, steps: list[StepPlan], feature: str
) -> None:
    frontend = Frontend(feature, clip_samples=CLIP)
    ours = list(dali(lossless, feature).batches(steps))
    for batch, want in zip(ours, packed_batches(lossless, steps), strict=True):
        np.testing.assert_array_equal(batch.rows, want.rows)
        torch.testing.assert_close(batch.target, want.target, rtol=0, atol=0)
        got, expected = batch.features(frontend), want.features(frontend)
        assert got.shape == expected.shape
        if feature == "fbank128":
            assert batch.waveform is not None and want.waveform is not None
            assert torch.equal(batch.waveform, want.waveform)
            assert torch.equal(batch.num_samples, want.num_samples)
            assert torch.equal(got, expected)
        else:
            near = expected >= expected.amax(-1, keepdim=True) - NEAR_PEAK_DB / (2 * frontend.std)
            limit = TOLERANCE / (2 * frontend.std)
            torch.testing.assert_close(got[near], expected[near], rtol=0, atol=limit)


def test_same_plans_same_batches(lossless: PackedSet, steps: list[StepPlan]) -> None:
    """However far DALI works ahead, in the second epoch, and after an epoch that was given up."""
    want = [batch.log_mel for batch in dali(lossless, queue=1).batches(steps)]
    source = dali(lossless, queue=3)
    for epoch in range(4):
        if epoch == 2:
            next(source.batches(steps * 3))  # nobody asks for the others
        got = [batch.log_mel for batch in source.batches(steps)]
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))  # type: ignore[arg-type]
    source.close()


def test_clips_from_the_middle_of_files(tmp_path: Path) -> None:
    """A segmented set: at 16 kHz the same samples, at 44.1 kHz the same sound."""
    for name, rate in (("a.flac", 16_000), ("b.flac", 44_100)):
        sf.write(tmp_path / name, sound(5.3, 1, rate, seed=1), rate)
    packed = pack_files(tmp_path, [tmp_path / "a.flac", tmp_path / "b.flac"], segments=True)
    rows = np.arange(packed.num_clips)
    starts = [start for _, start in packed.sources(rows)]
    assert starts.count(2.0) == 2, starts
    (got,) = dali(packed, "fbank128").batches([plan(rows.tolist(), [], [])])
    (want,) = packed_batches(packed, [plan(rows.tolist(), [], [])])
    assert got.waveform is not None and want.waveform is not None
    half = len(rows) // 2
    assert torch.equal(got.waveform[:half], want.waveform[:half])
    error = (got.waveform[half:].int() - want.waveform[half:].int()).abs()
    end = int(packed.num_samples[-1])
    assert error[:-1].max() <= 5, "int16 steps between the resamplers"
    assert error[-1, : end - 50].max() <= 5 and error[-1].max() < 500  # the end of the file rings


RATES = [("8k.wav", 8_000, 1), ("22k.ogg", 22_050, 1), ("44k.flac", 44_100, 2)]
RATES += [("48k.wav", 48_000, 1), ("96k.flac", 96_000, 1), ("16k.flac", 16_000, 2)]


def test_other_rates_are_resampled_as_packing_does(tmp_path: Path) -> None:
    """DALI's resampler alone folds what lies above 8 kHz back into the clip."""
    for i, (name, rate, channels) in enumerate(RATES):
        x = sound(2.0, channels, rate, seed=i)
        if rate > 32_000:
            x += 0.2 * np.sin(2 * np.pi * 12_000 * np.arange(len(x)) / rate)[:, None]
        sf.write(tmp_path / name, x, rate)
    packed = pack_files(tmp_path, [tmp_path / name for name, *_ in RATES])
    step = plan(list(range(len(RATES))), [], [])
    (got,) = dali(packed, "fbank128").batches([step])
    (want,) = packed_batches(packed, [step])
    assert got.waveform is not None and want.waveform is not None
    inner = slice(400, -400)  # a file's ends ring
    error = (got.waveform.double() - want.waveform.double())[:, inner].square().mean(1)
    level = 10 * torch.log10(error.clamp(min=1e-9) / want.waveform[:, inner].double().var(1))
    for (name, *_), decibels in zip(RATES, level.tolist(), strict=True):
        assert decibels < -70, f"{name}: {decibels:.1f} dB"
    assert torch.equal(got.waveform[-1], want.waveform[-1])  # 16 kHz stays exact among others


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> PackedSet:
    """A file of every kind that soundfile can write."""
    folder = tmp_path_factory.mktemp("kinds")
    files = []
    for format in sf.available_formats():
        for subtype in sf.available_subtypes(format):
            path = folder / f"{format}_{subtype}.{format.lower()}"
            try:
                sf.write(path, sound(0.5, 1, 16_000, 0)[:, 0], 16_000, subtype, format=format)
            except sf.LibsndfileError:
                continue
            # RAW has no header; VOC, WVE and XI round the rate or have one of their own.
            if format != "RAW" and sf.info(path).samplerate == 16_000:
                files.append(path)
    return pack_files(folder, files, clip_seconds=0.5, max_bad=1.0)


def test_every_kind_said_to_be_fine_is(kinds: PackedSet) -> None:
    source = dali(kinds, "fbank128", max_bad=1.0)
    names = kinds.names(np.arange(kinds.num_clips))
    bad = {Path(clip.path).name: clip.reason for clip in source.bad}
    assert bad["MP3_MPEG_LAYER_III.mp3"].startswith("unreadable: DALI: "), bad
    (rows,) = source.usable.nonzero()
    assert len(rows) > 80
    steps = [plan(part.tolist(), [], []) for part in np.array_split(rows, len(rows) // 10)]
    got = torch.cat([b.waveform for b in source.batches(steps)])  # type: ignore[misc]
    want = torch.cat([b.waveform for b in packed_batches(kinds, steps)])  # type: ignore[misc]
    differ = (got != want).sum(1)
    for row, count in zip(rows.tolist(), differ.tolist(), strict=True):
        # The two builds of the Ogg decoders differ in the last bit of a float32, which turns a
        # rounding now and then; by one step, and in less than a sample of a thousand.
        assert count <= (8 if "OGG" in names[row] else 0), f"{names[row]}: {count} samples differ"
    assert (got.int() - want.int()).abs().max() <= 1


def test_a_file_that_dali_reads_shorter_than_packing_is_found(tmp_path: Path) -> None:
    """libsndfile counts an ID3 tag before RIFF as part of the WAV in DALI's version of it."""
    tag = b"ID3\x03\0\0\0\0\x01\0" + bytes(128)
    names = ["plain.wav", "tagged.wav", "tagged_but_longer_than_the_clip.wav"]
    for name, seconds in zip(names, (0.5, 0.5, 2.5), strict=True):
        sf.write(tmp_path / name, sound(seconds, 1, 16_000, 0), 16_000)
        if name != "plain.wav":
            path = tmp_path / name
            path.write_bytes(tag + path.read_bytes())
    packed = pack_files(tmp_path, [tmp_path / name for name in names])
    source = dali(packed, "fbank128", max_bad=1.0)
    assert [(clip.row, clip.reason.partition(":")[0]) for clip in source.bad] == [
        (1, "length differs")
    ]
    step = plan([0, 2], [], [])
    (got,), (want,) = source.batches([step]), packed_batches(packed, [step])
    assert got.waveform is not None and want.waveform is not None
    assert torch.equal(got.waveform, want.waveform)


def damaged(kind: str, path: Path, good: bytes) -> None:
    """Makes ``path``, which held ``good``, one that DALI cannot take."""
    middle = len(good) // 2
    if kind == "missing":
        path.unlink()
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "cut":
        path.write_bytes(good[:middle])
    elif kind == "cut at the end":
        path.write_bytes(good[:-100])
    elif kind == "scratched":
        path.write_bytes(good[:middle] + bytes(2000) + good[middle + 2000 :])
    elif kind == "text":
        path.write_text("not audio")
    elif kind == "no samples":
        sf.write(path, np.zeros(0, np.float32), 16_000, format="WAV")
    elif kind == "longer":
        sf.write(path, sound(1.9, 1, 16_000, 0), 16_000, format="FLAC")
    elif kind == "not finite":
        x = sound(1.5, 1, 16_000, 0)
        x[100] = np.nan
        sf.write(path, x, 16_000, "FLOAT", format="WAV")
    elif kind == "unknown length":  # FLAC's STREAMINFO may say 0 samples: not known
        streaminfo = bytearray(good)
        streaminfo[21] &= 0xF0
        streaminfo[22:26] = bytes(4)
        path.write_bytes(streaminfo)
    else:
        assert kind == "mp3" and path.suffix == ".mp3"  # packed as it is, by libsndfile


DAMAGES: dict[str, str] = {
    "missing": "missing",
    "folder": "unreadable: not a file",
    "empty": "empty",
    "cut": "unreadable: DALI",
    "cut at the end": "unreadable: DALI",
    "scratched": "unreadable: DALI",
    "text": "unreadable: DALI",
    "no samples": "empty",
    "longer": "length differs",
    "not finite": "non-finite",
    "unknown length": "unreadable: its header promises no number of samples",
    "mp3": "unreadable: DALI",
}


def test_files_dali_cannot_take_are_found_before_it_starts(tmp_path: Path) -> None:
    good = tmp_path / "good.flac"
    sf.write(good, sound(1.5, 1, 16_000, 0), 16_000)
    files = [good]
    for i, kind in enumerate(DAMAGES):
        path = tmp_path / (f"{i}.mp3" if kind == "mp3" else f"{i}.flac")
        sf.write(path, sound(1.5, 1, 16_000, seed=i), 16_000)
        files.append(path)
    ogg, wav = tmp_path / "cut.ogg", tmp_path / "cut.wav"
    for path in (ogg, wav):
        sf.write(path, sound(9.0, 1, 16_000, 0), 16_000)
    packed = pack_files(tmp_path, [*files, ogg, wav], clip_seconds=8.0)
    for kind, path in zip(DAMAGES, files[1:], strict=True):
        damaged(kind, path, path.read_bytes())
    for path in (ogg, wav):
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 4])

    source = dali(packed, max_bad=1.0)
    reasons = {row: reason for row, _, reason in source.bad}
    expected = [*DAMAGES.values(), "length differs", "length differs"]
    for row, want in enumerate(expected, start=1):
        assert reasons.get(row, "nothing").startswith(want), f"row {row}: {reasons.get(row)}"
    assert source.usable.tolist() == [True] + [False] * len(expected)
    with (packed.directory / dali_check.BAD_FILE).open(newline="") as file:
        listed = list(csv.DictReader(file))
    assert [int(line["row"]) for line in listed] == list(range(1, len(expected) + 1))
    assert listed[0]["path"] == str(files[1]) and listed[0]["reason"] == "missing"
    (batch,) = source.batches([plan([0], [0], [0])])
    assert batch.log_mel is not None and batch.log_mel.isfinite().all()
    with pytest.raises(ValueError, match="cannot take \\[2\\]"):
        list(source.batches([plan([0, 2], [], [])]))

    with pytest.raises(UserError) as error:
        dali(packed)
    message = str(error.value)
    assert "14 of 15 clips, more than --max-bad 0.01" in message and "\n" not in message
    assert str(files[1]) in message and dali_check.BAD_FILE in message


def test_a_check_is_kept_until_a_file_changes(tmp_path: Path) -> None:
    path = tmp_path / "a.flac"
    sf.write(path, sound(1.0, 1, 16_000, 0), 16_000)
    packed = pack_files(tmp_path, [path])
    kept, good = path.stat(), path.read_bytes()
    dali(packed)
    path.write_bytes(bytes(kept.st_size))
    os.utime(path, ns=(kept.st_atime_ns, kept.st_mtime_ns))
    assert not dali(packed).bad, "a file of the same size and time was decoded again"
    os.utime(path, ns=(kept.st_atime_ns, kept.st_mtime_ns + 1))
    assert dali(packed, max_bad=1.0).bad
    path.write_bytes(good)
    os.utime(path, ns=(kept.st_atime_ns, kept.st_mtime_ns))
    (packed.directory / dali_check.CHECKED_FILE).write_bytes(b"broken")
    source = dali(packed)
    assert not source.bad and not (packed.directory / dali_check.BAD_FILE).exists()

    path.write_bytes(good[:-3000])  # after the check
    with pytest.raises(Failure, match=r"a\.flac changed after it was checked: unreadable: DALI"):
        list(source.batches([plan([0], [], [])]))
    path.unlink()
    with pytest.raises(Failure, match=r"cannot read .*a\.flac"):
        list(source.batches([plan([0], [], [])]))


def test_a_refusal_is_kept_until_the_file_changes(tmp_path: Path) -> None:
    path, other = tmp_path / "a.flac", tmp_path / "b.flac"
    for file in (path, other):
        sf.write(file, sound(1.0, 1, 16_000, 0), 16_000)
    packed = pack_files(tmp_path, [path, other])
    kept, good = path.stat(), path.read_bytes()
    path.write_bytes(good[: len(good) // 2] + bytes(len(good) - len(good) // 2))
    os.utime(path, ns=(kept.st_atime_ns, kept.st_mtime_ns))
    first = dali(packed, max_bad=1.0).bad
    assert [clip.row for clip in first] == [0] and "unreadable: DALI" in first[0].reason
    path.write_bytes(good)
    os.utime(path, ns=(kept.st_atime_ns, kept.st_mtime_ns))
    assert dali(packed, max_bad=1.0).bad == first, "a file of the same size and time was decoded"
    listed = (packed.directory / dali_check.BAD_FILE).read_text()
    assert str(path) in listed and str(other) not in listed
    os.utime(path, ns=(kept.st_atime_ns, kept.st_mtime_ns + 1))
    assert not dali(packed).bad and not (packed.directory / dali_check.BAD_FILE).exists()


def test_a_file_that_was_touched_is_not_blamed(tmp_path: Path) -> None:
    files = [tmp_path / "touched.flac", tmp_path / "broken.flac"]
    for path in files:
        sf.write(path, sound(1.0, 1, 16_000, 0), 16_000)
    source = dali(pack_files(tmp_path, files))
    os.utime(files[0], ns=(0, files[0].stat().st_mtime_ns + 1))
    files[1].write_bytes(files[1].read_bytes()[:-3000])
    with pytest.raises(
        Failure, match=r"broken\.flac changed after it was checked: unreadable: DALI"
    ):
        list(source.batches([plan([0, 1], [], [])]))


def test_another_dali_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastat.data import dali_graph

    path = tmp_path / "a.wav"
    sf.write(path, sound(1.0, 1, 16_000, 0), 16_000)
    packed = pack_files(tmp_path, [path])
    kept = path.stat()
    dali(packed)
    path.write_bytes(bytes(kept.st_size))
    os.utime(path, ns=(kept.st_atime_ns, kept.st_mtime_ns))
    monkeypatch.setattr(dali_graph, "DALI_VERSION", "another")
    assert len(dali(packed, max_bad=1.0).bad) == 1


def test_without_dali_the_user_is_told(
    lossless: PackedSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "fastat.data.dali_graph", raising=False)
    monkeypatch.delattr("fastat.data.dali_graph", raising=False)
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(UserError, match="--source dali needs NVIDIA DALI"):
        dali(lossless)


def test_real_recordings_at_16_khz(recordings: Path, tmp_path: Path) -> None:
    files = []
    for path in sorted((recordings / "esc10" / "audio").glob("*.flac"))[::16]:
        x, rate = sf.read(path, dtype="float32")
        files.append(tmp_path / path.name)
        sf.write(files[-1], soxr.resample(x, rate, 16_000), 16_000)
    assert len(files) == 5
    packed = pack_files(tmp_path, files, clip_seconds=5.0)
    step = plan([0, 1, 2, 3, 4], [1, 2], [0, 3])
    (batch,) = dali(packed).batches([step])
    assert batch.log_mel is not None
    for got, x in zip(batch.log_mel, mixed(packed, step, True), strict=True):
        assert_right("logmel64", got.double().numpy(), x.astype(np.float32))
