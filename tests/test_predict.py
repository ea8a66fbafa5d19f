"""fastat predict: windows, scores, what it prints and draws, and what it does with bad files."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import matplotlib.image
import numpy as np
import pytest
import soundfile as sf
import torch
from matplotlib.collections import QuadMesh
from numpy.typing import NDArray
from scipy.special import expit, logit
from torch import Tensor, nn

from fastat.audio.features import FEATURES
from fastat.cli import app as cli
from fastat.data.shards import ClassInfo
from fastat.evaluation.extract import read_waveform
from fastat.evaluation.plot import COLUMNS, _bin_of, draw, mel_image, timeline
from fastat.evaluation.predict import Prediction, Tagger, clock, window_starts
from fastat.training.checkpoints import write_checkpoint
from fastat.weights.checkpoint import ModelMeta, build_frontend, load_model

CLASSES = tuple(
    ClassInfo(f"/m/{i}", name)
    for i, name in enumerate(["Dog", "Rain", "Cash $ register $", "Speech", "[bold]Bell[/bold]"])
)
RATE = 16_000


def meta_of(feature: str = "logmel64", clip_seconds: float = 10.0) -> ModelMeta:
    spec = FEATURES[feature]
    return ModelMeta(
        model="cnn_trans",
        feature=feature,
        clip_seconds=clip_seconds,
        num_mels=spec.num_mels,
        num_frames=spec.num_frames(round(clip_seconds * RATE)),
        mean=spec.mean,
        std=spec.std,
        classes=CLASSES,
        options={"embedding": 64, "num_heads": 4},
    )


def saved_run(folder: Path, meta: ModelMeta) -> Path:
    """A run folder with a small model of random weights that tells sounds apart."""
    torch.manual_seed(1)
    model = meta.create()
    with torch.no_grad():
        for parameter in model.get_submodule("head").parameters():
            parameter.mul_(20.0)
    write_checkpoint(folder / "checkpoints", 1, model.state_dict(), meta, {}, best=True)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_run(tmp_path_factory.mktemp("run"), meta_of())


@pytest.fixture
def fastat(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """The command line, in this process: exit code, standard output, standard error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fastat", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return call


Fastat = Callable[..., tuple[int, str, str]]


def noise(seconds: float, rate: int = RATE, channels: int = 1, seed: int = 0) -> NDArray[Any]:
    rng = np.random.default_rng(seed)
    return 0.1 * rng.standard_normal((round(seconds * rate), channels))


def wav(path: Path, seconds: float, seed: int = 0) -> Path:
    sf.write(path, noise(seconds, seed=seed), RATE)
    return path


# -------------------------------------------------------------------------------------- windows
@pytest.mark.parametrize(
    ("num_samples", "window", "hop", "starts"),
    [
        (25, 10, 10, [0, 10, 15]),
        (20, 10, 10, [0, 10]),
        (10, 10, 10, [0]),
        (3, 10, 10, [0]),
        (11, 10, 10, [0, 1]),
        (25, 10, 5, [0, 5, 10, 15]),
        (26, 10, 5, [0, 5, 10, 15, 16]),
        (12, 10, 1, [0, 1, 2]),
        (40, 10, 15, [0, 15, 30]),
        (65, 10, 60, [0, 55]),
    ],
)
def test_windows(num_samples: int, window: int, hop: int, starts: list[int]) -> None:
    assert window_starts(num_samples, window, hop).tolist() == starts


def test_windows_end_to_end_or_overlapping_leave_no_sample_out() -> None:
    for num_samples in range(1, 60):
        for hop in range(1, 11):
            heard = np.zeros(num_samples, bool)
            for start in window_starts(num_samples, 10, hop):
                assert start + 10 <= num_samples or num_samples < 10
                heard[start : start + 10] = True
            assert heard.all(), (num_samples, hop)


# --------------------------------------------------------------------------------------- scores
def test_scores_are_computed_in_float32(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In tf32 CUDA's convolutions would round them to three digits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    Tagger(run, "fp32")
    assert not torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("feature", ["logmel64", "fbank128"])
def test_scores_are_the_models_on_the_files_windows(
    feature: str, tmp_path: Path, fastat: Fastat
) -> None:
    """Against a loop that reads the file with another reader and scores one window at a time."""
    run = saved_run(tmp_path / "run", meta_of(feature, clip_seconds=2.0))
    path = wav(tmp_path / "a.wav", 5.5)
    code, out, _ = fastat("predict", run, path, "--json", "--top", 99, "--precision", "fp32")
    assert code == 0
    (document,) = json.loads(out)

    model, meta = load_model(run)
    frontend = build_frontend(meta)
    samples, _ = sf.read(path, dtype="int16")
    expected = []
    for start in (0, 32_000, 56_000):
        clip = torch.from_numpy(samples[start : start + 32_000])[None]
        with torch.inference_mode():
            expected.append(model(frontend(clip)).sigmoid()[0].tolist())
    assert [(w["start"], w["end"]) for w in document["windows"]] == [(0, 2), (2, 4), (3.5, 5.5)]
    for window, want in zip(document["windows"], expected, strict=True):
        assert by_class(window["tags"]) == pytest.approx(want, abs=1e-5)
        listed = [tag["probability"] for tag in window["tags"]]
        assert listed == sorted(listed, reverse=True)
    best, mean = np.max(expected, axis=0).tolist(), np.mean(expected, axis=0).tolist()
    assert np.ptp(best) > 0.05, "the model must tell classes apart for this test to mean anything"
    assert by_class(document["tags"]) == pytest.approx(best, abs=1e-5)
    assert by_class(document["tags"], "mean_probability") == pytest.approx(mean, abs=1e-5)


def by_class(tags: list[dict[str, Any]], key: str = "probability") -> list[float]:
    """Values in the order of the class list."""
    found = {tag["id"]: tag for tag in tags}
    assert all(found[c.id]["name"] == c.name for c in CLASSES)
    return [found[c.id][key] for c in CLASSES]


def test_a_short_file_is_padded_with_its_length_known(run: Path, tmp_path: Path) -> None:
    tagger = Tagger(run, "fp32")
    samples = (noise(3.0)[:, 0] * 32768).astype(np.int16) + np.int16(500)  # an offset to remove
    found = tagger.tag(tmp_path / "x", samples)
    assert (found.starts.tolist(), found.ends.tolist(), found.seconds) == ([0.0], [3.0], 3.0)

    clip = torch.zeros((1, 160_000), dtype=torch.int16)
    clip[0, :48_000] = torch.from_numpy(samples)
    with torch.inference_mode():
        want = tagger.model(tagger.frontend(clip, torch.tensor([48_000]))).sigmoid()
        as_if_whole = tagger.model(tagger.frontend(clip)).sigmoid()
    assert found.probabilities == pytest.approx(want.numpy(), abs=1e-6)
    assert (want - as_if_whole).abs().max() > 1e-3, "padding must matter for this test to say so"


def test_same_score_as_evaluation_of_the_packed_clip(run: Path, tmp_path: Path) -> None:
    from fastat.data.loader import PackedSource
    from fastat.data.shards import PackedSet
    from fastat.evaluation.evaluate import ClassMatch, evaluate
    from fastat.packing.pack import pack

    device = torch.device("cpu")
    table = ["path,labels"]
    for i, seconds in enumerate((10.0, 4.0, 10.0)):
        wav(tmp_path / f"{i}.wav", seconds, seed=i)
        table.append(f"{i}.wav,{'dog' if i else 'cat'}")
    (tmp_path / "table.csv").write_text("\n".join(table) + "\n")
    pack(tmp_path / "table.csv", tmp_path / "packed", audio=tmp_path, workers=1)

    model, meta = load_model(run)
    packed = PackedSet.open(tmp_path / "packed")
    match = ClassMatch(np.arange(2), np.arange(2), None)  # which classes is not the question here
    result = evaluate(
        model,
        build_frontend(meta),
        packed,
        PackedSource(packed, device),
        match,
        device=device,
        precision="fp32",
        batch=2,
    )
    assert result is not None
    tagger = Tagger(run, "fp32")
    for row, name in enumerate(packed.names(result.rows)):
        found = tagger.tag(tmp_path / name, read_waveform(tmp_path / name))
        assert found.probabilities[0, :2] == pytest.approx(expit(result.logits[row]), abs=1e-6)


class Loudness(nn.Module):
    """Class 0 is "loud", class 1 is "quiet"; the others are never there."""

    def forward(self, x: Tensor) -> Tensor:
        loud = 20.0 * (x.mean((1, 2)) + 0.5)
        never = torch.full_like(loud, -9.0)
        return torch.stack([loud, -loud, never, never, never], 1)


@pytest.fixture
def loudness(monkeypatch: pytest.MonkeyPatch) -> ModelMeta:
    meta = meta_of(clip_seconds=1.0)
    monkeypatch.setattr(
        "fastat.evaluation.predict.load_model", lambda run, device: (Loudness(), meta)
    )
    return meta


@pytest.fixture
def half_loud(tmp_path: Path) -> Path:
    """20 s, loud from 10 s on."""
    samples = noise(20.0)
    samples[: 10 * RATE] *= 1e-3
    sf.write(tmp_path / "half.wav", samples, RATE, subtype="FLOAT")
    return tmp_path / "half.wav"


def test_the_timeline_shows_the_loud_half(
    loudness: ModelMeta, half_loud: Path, tmp_path: Path, fastat: Fastat
) -> None:
    code, out, _ = fastat("predict", "any", half_loud, "--json")
    assert code == 0
    (document,) = json.loads(out)
    names = [window["tags"][0]["name"] for window in document["windows"]]
    assert names == ["Rain"] * 10 + ["Dog"] * 10

    waveform = read_waveform(half_loud)
    figure = draw(Tagger(tmp_path).tag(half_loud, waveform), waveform, loudness, 2)
    mel, tags = figure.axes[:2]
    assert mel.get_xlim() == tags.get_xlim() == (0.0, 20.0)
    (mesh,) = (c for c in tags.collections if isinstance(c, QuadMesh))
    labels = [label.get_text().split()[0] for label in tags.get_yticklabels()]
    rows = dict(zip(labels, np.asarray(mesh.get_array()), strict=True))
    assert rows["Dog"] == pytest.approx([0.0] * 10 + [1.0] * 10, abs=0.1)
    assert rows["Rain"] == pytest.approx([1.0] * 10 + [0.0] * 10, abs=0.1)
    (image,) = mel.images
    assert list(image.get_extent()) == [0.0, 20.0, -0.5, 63.5] and image.origin == "lower"
    ticks = dict(zip((t.get_text() for t in mel.get_yticklabels()), mel.get_yticks(), strict=True))
    assert ticks["1k"] == pytest.approx(_bin_of(1000, FEATURES["logmel64"]))
    loud = np.asarray(image.get_array()).mean(0)  # [T]
    assert loud[: len(loud) // 2 - 2].max() + 30 < loud[len(loud) // 2 + 2 :].min()


class Certain(nn.Module):
    """Logits of 18, 25 and 40 and up, whose probabilities are all 1 in float32."""

    def forward(self, x: Tensor) -> Tensor:
        loud = 20.0 * (x.mean((1, 2)) + 0.5)
        never = torch.full_like(loud, -9.0)
        return torch.stack([never + 27, never + 34, loud + 60, never, never], 1)


def test_certain_tags_are_ranked_by_their_logits(
    loudness: ModelMeta, half_loud: Path, fastat: Fastat, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "fastat.evaluation.predict.load_model", lambda run, device: (Certain(), loudness)
    )
    _, out, _ = fastat("predict", "any", half_loud, "--json", "--top", 3)
    (document,) = json.loads(out)
    for tags in (document["tags"], *(window["tags"] for window in document["windows"])):
        assert [tag["id"] for tag in tags] == [loudness.classes[k].id for k in (2, 1, 0)]
        assert [tag["probability"] for tag in tags] == [1.0] * 3
    _, out, _ = fastat("predict", "any", half_loud, "--top", 1)
    (line,) = (x for x in out.splitlines() if loudness.classes[2].name in x)
    start = int(line.split()[-1].split("-")[0].removeprefix("0:"))
    assert start >= 10, "its strongest window is in the loud half"


def test_hop_gives_the_windows_asked_for(
    loudness: ModelMeta, half_loud: Path, fastat: Fastat
) -> None:
    _, out, _ = fastat("predict", "any", half_loud, "--json", "--hop-seconds", 0.25)
    windows = json.loads(out)[0]["windows"]
    assert [w["start"] for w in windows] == [i * 0.25 for i in range(77)]
    quiet = [w["start"] for w in windows if w["tags"][0]["name"] == "Rain"]
    assert len(quiet) in range(36, 42) and max(quiet) < 10


# ----------------------------------------------------------------------------------- any audio
@pytest.mark.parametrize(
    ("name", "seconds", "rate", "channels", "windows"),
    [
        ("short.wav", 100 / RATE, RATE, 1, 1),
        ("telephone.wav", 12.0, 8_000, 1, 2),
        ("studio.flac", 11.0, 192_000, 2, 2),
        ("five.wav", 3.0, 44_100, 5, 1),
        ("music.mp3", 21.0, 44_100, 2, 3),
        ("music.ogg", 7.0, 48_000, 1, 1),
    ],
)
def test_any_length_rate_and_format(
    name: str,
    seconds: float,
    rate: int,
    channels: int,
    windows: int,
    run: Path,
    tmp_path: Path,
    fastat: Fastat,
) -> None:
    sf.write(tmp_path / name, noise(seconds, rate, channels), rate)
    picture = tmp_path / "out.png"
    code, out, _ = fastat("predict", run, tmp_path / name, "--json", "--plot", picture)
    assert code == 0
    (document,) = json.loads(out)
    assert document["seconds"] == pytest.approx(seconds, abs=0.1)
    assert len(document["windows"]) == windows
    assert len(document["tags"]) == 5
    assert matplotlib.image.imread(picture).shape[1] > 1000


def test_m4a(run: Path, tmp_path: Path, fastat: Fastat) -> None:
    samples = noise(12.0, 44_100, 2).T.astype(np.float32)
    with av.open(str(tmp_path / "a.m4a"), "w") as container:
        stream = container.add_stream("aac", rate=44_100)
        stream.layout = "stereo"
        for i in range(0, samples.shape[1] - 1024, 1024):
            block = np.ascontiguousarray(samples[:, i : i + 1024])
            frame = av.AudioFrame.from_ndarray(block, format="fltp", layout="stereo")
            frame.sample_rate, frame.pts = 44_100, i
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    code, out, _ = fastat("predict", run, tmp_path / "a.m4a", "--json")
    assert code == 0
    assert json.loads(out)[0]["seconds"] == pytest.approx(12.0, abs=0.1)


def test_silence_gives_finite_tags_and_a_dark_picture(
    run: Path, tmp_path: Path, fastat: Fastat
) -> None:
    sf.write(tmp_path / "silent.wav", np.zeros(3 * RATE), RATE)
    picture = tmp_path / "silent.png"
    code, out, _ = fastat("predict", run, tmp_path / "silent.wav", "--json", "--plot", picture)
    assert code == 0
    assert all(math.isfinite(tag["probability"]) for tag in json.loads(out)[0]["tags"])
    pixels = matplotlib.image.imread(picture)[..., :3]
    middle = pixels[pixels.shape[0] // 4, pixels.shape[1] // 2]
    assert middle.max() < 0.1, "silence at the top of the colour scale"


def test_a_long_file_is_scored_in_batches_and_drawn(
    loudness: ModelMeta, tmp_path: Path, fastat: Fastat
) -> None:
    samples = np.tile(noise(60.0)[:, 0], 25)
    sf.write(tmp_path / "long.wav", samples, RATE)
    code, out, err = fastat(
        "predict", "any", tmp_path / "long.wav", "--plot", tmp_path / "long.png", "--top", 1
    )
    assert code == 0
    assert out.splitlines()[0].endswith("long.wav  (25:00, 1500 windows)")
    assert "1,500/1,500 windows" in err
    assert matplotlib.image.imread(tmp_path / "long.png").shape[1] < 4000


# -------------------------------------------------------------------------------------- output
def test_table_when_piped(
    loudness: ModelMeta, half_loud: Path, tmp_path: Path, fastat: Fastat
) -> None:
    short = wav(tmp_path / "short.wav", 0.5)
    code, out, err = fastat("predict", "any", half_loud, short, "--top", 2)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == f"{half_loud}  (0:20, 20 windows)"
    assert [line.split()[1] for line in lines[1:3]] in (["Rain", "Dog"], ["Dog", "Rain"])
    assert lines[3] == f"{short}  (0:00.5, 1 window)"
    assert len(lines) == 6 and lines[4].split()[1:] == ["Dog"]


def test_names_are_printed_as_they_are(
    loudness: ModelMeta, half_loud: Path, fastat: Fastat
) -> None:
    _, out, _ = fastat("predict", "any", half_loud, "--top", 5)
    assert "[bold]Bell[/bold]" in out and "Cash $ register $" in out


def test_json_is_all_there_is_on_standard_output(run: Path, tmp_path: Path, fastat: Fastat) -> None:
    files = [wav(tmp_path / f"{i}.wav", 0.5, seed=i) for i in range(3)]
    code, out, err = fastat("predict", run, *files, "--json", "--top", 2)
    assert code == 0
    documents = json.loads(out)
    assert [d["file"] for d in documents] == [str(f) for f in files]
    assert all(len(d["tags"]) == len(d["windows"][0]["tags"]) == 2 for d in documents)
    assert "3/3 files" in err


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (7, "0:07"), (3.5, "0:03.5"), (9.97, "0:10"), (61.2, "1:01"), (3723, "1:02:03")],
)
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


# ------------------------------------------------------------------------------------- mistakes
def test_bad_files_are_named_and_the_others_tagged(
    run: Path, tmp_path: Path, fastat: Fastat
) -> None:
    good = [wav(tmp_path / "a.wav", 0.5), wav(tmp_path / "z.wav", 0.5)]
    (tmp_path / "text.wav").write_text("no audio in here\n" * 30)
    (tmp_path / "empty.wav").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "pcm.raw").write_bytes(bytes(range(256)))
    too_long = "n" * 300 + ".wav"  # the system cannot even look for it
    names = ("text.wav", "empty.wav", "gone.wav", "folder", "pcm.raw", too_long)
    bad = [tmp_path / name for name in names]
    code, out, err = fastat("predict", run, good[0], *bad, good[1])
    assert code == 1
    assert [line.split("  ")[0] for line in out.splitlines() if line.startswith("/")] == [
        str(path) for path in good
    ]
    found = ("unreadable", "empty", "missing", "unreadable", "unreadable", "unreadable")
    reasons = dict(zip(bad, found, strict=True))
    for path, reason in reasons.items():
        assert f"fastat: {path}: {reason}" in err
    assert err.splitlines()[-1] == "fastat: 6 of 8 files could not be used"

    code, out, _ = fastat("predict", run, good[0], *bad, good[1], "--json")
    assert code == 1
    documents = json.loads(out)
    assert [bool(d["tags"]) for d in documents] == [True, *[False] * 6, True]
    assert [d["error"].split(":")[0] for d in documents[1:7]] == list(reasons.values())


def test_one_bad_file_is_one_line(run: Path, tmp_path: Path, fastat: Fastat) -> None:
    (tmp_path / "empty.wav").touch()
    code, out, err = fastat("predict", run, tmp_path / "empty.wav")
    assert (code, out) == (1, "")
    assert err == f"fastat: {tmp_path / 'empty.wav'}: empty: 0 bytes\n"
    code, out, err = fastat("predict", run, tmp_path / "gone.wav")
    assert (code, out) == (2, "")
    assert err == f"fastat: {tmp_path / 'gone.wav'} does not exist\n"
    code, _, err = fastat("predict", run, tmp_path)
    assert code == 2 and f"{tmp_path} is not a file" in err


def test_a_wrong_length_in_the_header_is_one_line(
    run: Path, tmp_path: Path, fastat: Fastat
) -> None:
    path = wav(tmp_path / "stale.wav", 0.5)
    data = path.read_bytes()
    path.write_bytes(data[:40] + (len(data) // 4 * 2).to_bytes(4, "little") + data[44:])
    code, out, err = fastat("predict", run, path)
    assert code == 0 and "(0:00.5, 1 window)" in out
    assert err.startswith(f"fastat: {path}: wrong length: ") and err.count("\n") == 1


def test_mistakes_are_found_before_the_work_starts(
    tmp_path: Path, fastat: Fastat, monkeypatch: pytest.MonkeyPatch
) -> None:
    def must_not_load(*_: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("fastat.evaluation.predict.load_model", must_not_load)
    a = wav(tmp_path / "a.wav", 0.1)
    (tmp_path / "other").mkdir()
    same = wav(tmp_path / "other" / "a.wav", 0.1)
    (tmp_path / "folder.png").mkdir()
    for arguments, message in (
        (("--top", 0), "--top must be at least 1, got 0"),
        (("--hop-seconds", 0), "--hop-seconds must be a positive number"),
        (("--hop-seconds", -3), "--hop-seconds must be a positive number"),
        (("--hop-seconds", "nan"), "--hop-seconds must be a positive number"),
        (("--plot", tmp_path / "gone" / "a.png"), f"there is no folder {tmp_path / 'gone'}"),
        (("--plot", tmp_path / "a.pdf"), "ends in .png"),
        (("--plot", tmp_path / "folder.png"), "is a folder"),
        ((same, "--plot", tmp_path / "p.png"), "2 files would be written to p-a.png"),
    ):
        code, out, err = fastat("predict", "any", a, *arguments)
        assert (code, out) == (2, ""), arguments
        assert message in err and err.count("\n") == 1, (arguments, err)


def test_no_checkpoint(tmp_path: Path, fastat: Fastat) -> None:
    code, _, err = fastat("predict", tmp_path, wav(tmp_path / "a.wav", 0.1))
    assert code == 2 and str(tmp_path) in err


# -------------------------------------------------------------------------------------- picture
def test_each_of_several_files_has_its_picture(
    loudness: ModelMeta, tmp_path: Path, fastat: Fastat
) -> None:
    files = [wav(tmp_path / f"{name}.wav", 0.5) for name in ("one", "two")]
    code, _, _ = fastat("predict", "any", *files, "--plot", tmp_path / "out.png")
    assert code == 0
    pictures = sorted(path.name for path in tmp_path.glob("*.png"))
    assert pictures == ["out-one.png", "out-two.png"]


def prediction(starts: list[float], ends: list[float], values: list[float]) -> Prediction:
    return Prediction(
        Path("x"),
        ends[-1],
        np.array(starts),
        np.array(ends),
        logit(np.array([values], np.float32)).T,
    )


def test_timeline_of_windows_end_to_end_with_a_tail() -> None:
    found = prediction([0, 10, 15], [10, 20, 25], [0.25, 0.5, 0.75])
    values, edges = timeline(found, [0])
    assert values == pytest.approx(np.array([[0.25, 0.5, 0.75]]))
    assert edges.tolist() == [0, 10, 17.5, 25]


def test_timeline_of_overlapping_windows() -> None:
    found = prediction([0, 2, 4], [10, 12, 14], [0.25, 0.5, 0.75])
    values, edges = timeline(found, [0])
    assert values == pytest.approx(np.array([[0.25, 0.5, 0.75]]))
    assert edges.tolist() == [0, 6, 8, 14]


def test_timeline_with_gaps_shows_them() -> None:
    found = prediction([0, 30, 50], [10, 40, 60], [0.25, 0.5, 0.75])
    values, edges = timeline(found, [0])
    np.testing.assert_allclose(values, [[0.25, np.nan, 0.5, np.nan, 0.75]], rtol=1e-6)
    assert edges.tolist() == [0, 10, 30, 40, 50, 60]


@pytest.mark.parametrize("feature", ["logmel64", "fbank128"])
@pytest.mark.parametrize("seconds", [5, 120])
def test_a_tone_is_drawn_where_and_when_it_sounds(feature: str, seconds: int) -> None:
    """On the axis's own scale; long files are drawn with several frames a column."""
    spec = FEATURES[feature]
    t = np.arange(seconds * RATE) / RATE
    for hz in (500, 1000, 4000):
        tone = 8000 * np.sin(2 * np.pi * hz * t) * (t >= 0.6 * seconds)
        image, duration = mel_image(tone.astype(np.int16), spec)
        assert len(image) <= COLUMNS
        assert duration == pytest.approx(seconds, abs=0.05)
        columns = image.max(1)
        first = np.flatnonzero(columns > -20)[0] / len(image)
        assert first == pytest.approx(0.6, abs=0.01)
        assert image.max() == pytest.approx(0.0, abs=1e-3)
        row = int(image[-5:].mean(0).argmax())
        assert abs(row - _bin_of(hz, spec)) < 1.0
