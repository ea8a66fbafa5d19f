"""Converted weights give the original's output; what does not fit is an error."""

import json
import math
import pickle
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import soundfile as sf
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastat.audio.features import FEATURES
from fastat.data.shards import ClassInfo
from fastat.models.base import FrameModel
from fastat.system.errors import Failure, UserError
from fastat.training.checkpoints import write_checkpoint
from fastat.weights.checkpoint import ModelMeta, build_frontend, load_model, save_weights
from fastat.weights.convert import Summary, convert
from tests.conftest import fastat, one_line
from tests.weights.reference_models import (
    AstModel,
    Crnn,
    ResNetAttention,
    TransformerEncoder,
    Vit,
    randomise,
)

K = 5
IDS = tuple(f"/m/{i:03}" for i in range(K))
NAMES = ("Speech", "Dog", "Rain, light", "Whistle", "Engine")

State = dict[str, Tensor]


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    """A class_labels_indices.csv of K classes."""
    rows = [f'{i},{a},"{b}"' for i, (a, b) in enumerate(zip(IDS, NAMES, strict=True))]
    path = tmp_path / "labels.csv"
    path.write_text("\n".join(["index,mid,display_name", *rows]) + "\n")
    return path


def save(path: Path, model: nn.Module, *, prefix: str = "", nested: bool = False) -> Path:
    """The model's state dict as a pickle, as training scripts leave it."""
    state = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": state} if nested else state, path)
    return path


def probabilities(checkpoint: Path, x: Tensor) -> Tensor:
    with torch.inference_mode():
        return torch.sigmoid(load_model(checkpoint)[0](x))


def originals(original: nn.Module, x: Tensor) -> Tensor:
    with torch.inference_mode():
        out: Tensor = original(x)
    assert out.std() > 0.01 and ((out > 0.01) & (out < 0.99)).all()  # or every model would do
    return out


# ------------------------------------------------------------------------------ Hugging Face
@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random AST as transformers saves it, with its feature extractor."""
    folder = tmp_path_factory.mktemp("hf") / "ast"
    torch.manual_seed(0)
    config = transformers.ASTConfig(
        hidden_size=192,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=768,
        id2label=dict(enumerate(NAMES)),
        label2id={name: i for i, name in enumerate(NAMES)},
    )
    model = randomise(transformers.ASTForAudioClassification(config))
    model.save_pretrained(folder)
    transformers.ASTFeatureExtractor().save_pretrained(folder)
    return folder


def hf_logits(folder: Path, x: Tensor) -> Tensor:
    model = transformers.ASTForAudioClassification.from_pretrained(folder).eval()
    with torch.inference_mode():
        logits: Tensor = model(x).logits
    return logits


def sound(seconds: float = 10.0) -> np.ndarray:
    rng = np.random.default_rng(0)
    t = np.arange(round(seconds * 16_000)) / 16_000
    wave = 0.3 * np.sin(2 * np.pi * 440 * t * (1 + t / 20)) + 0.05 * rng.standard_normal(len(t))
    return wave.astype(np.float32)


def test_hugging_face_both_ways_on_the_command_line(hugging_face: Path, tmp_path: Path) -> None:
    ours, back = tmp_path / "ours", tmp_path / "back"
    done = json.loads(fastat("convert", hugging_face, ours, "--json").stdout)
    assert (done["layout"], done["model"]) == ("Hugging Face AST", "ast")
    assert (done["loaded"], done["dropped"], done["missing"]) == (43, {}, [])
    assert done["options"] == {
        "size": "tiny224", "num_layers": 2, "fstride": 10, "tstride": 10, "norm_eps": 1e-12
    }  # fmt: skip
    assert (done["num_classes"], done["mean"]) == (K, -4.2677393)
    assert not any(isinstance(done[key], dict) for key in done if key not in ("options", "dropped"))

    extractor = transformers.ASTFeatureExtractor.from_pretrained(hugging_face)
    x = extractor(sound(), sampling_rate=16_000, return_tensors="pt")["input_values"]
    expected = hf_logits(hugging_face, x)
    assert expected.std() > 0.1
    model, meta = load_model(ours)
    with torch.inference_mode():
        got = model(x)
    assert (got - expected).abs().max() < 1e-4
    assert [c.name for c in meta.classes] == list(NAMES)
    assert (meta.mean, meta.std, meta.remove_mean) == (-4.2677393, 4.5689974, False)

    # Their statistics and their framing came along: our front end gives their extractor's output.
    with torch.inference_mode():
        features = build_frontend(meta)(torch.from_numpy(sound())[None])
    assert (features - x).abs().median() < 1e-4
    assert (features - x)[:, :998].abs().max() < 2e-3

    text = fastat("convert", ours, back).stdout
    assert re.search(r"loaded +35 tensors", text) and "missing" not in text
    assert (hf_logits(back, x) - expected).abs().max() < 1e-4
    again = transformers.ASTFeatureExtractor.from_pretrained(back)
    assert torch.equal(again(sound(), sampling_rate=16_000, return_tensors="pt")["input_values"], x)
    config = transformers.ASTConfig.from_pretrained(back)
    assert config.id2label == dict(enumerate(NAMES))
    assert (
        load_file(back / "model.safetensors").keys()
        == load_file(hugging_face / "model.safetensors").keys()
    )


def test_a_converted_checkpoint_predicts(hugging_face: Path, tmp_path: Path) -> None:
    convert(hugging_face, tmp_path / "ours")
    sf.write(tmp_path / "a.wav", sound(12.0), 16_000)
    done = fastat("predict", tmp_path / "ours", tmp_path / "a.wav", "--json", "--top", "2")
    assert any(name in done.stdout for name in NAMES)


def test_hugging_face_names_in_memory_and_a_pickle(hugging_face: Path, tmp_path: Path) -> None:
    convert(hugging_face, tmp_path / "a")
    model = transformers.ASTForAudioClassification.from_pretrained(hugging_face)
    names = list(model.state_dict())
    assert "audio_spectrogram_transformer.layers.0.attention.q_proj.weight" in names
    folder = tmp_path / "memory"
    folder.mkdir()
    for name in ("config.json", "preprocessor_config.json"):
        (folder / name).write_text((hugging_face / name).read_text())
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    convert(folder, tmp_path / "b")
    one, two = (load_file(tmp_path / x / "model.safetensors") for x in "ab")
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def edited(source: Path, target: Path, file: str, **values: object) -> Path:
    """A copy of a Hugging Face folder with keys of a JSON file replaced; None removes one."""
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    document = json.loads((target / file).read_text()) | values
    document = {k: v for k, v in document.items() if v is not None}
    (target / file).write_text(json.dumps(document))
    return target


def test_hugging_face_statistics_and_ids(hugging_face: Path, labels: Path, tmp_path: Path) -> None:
    values = {"mean": -1.5, "std": 2.5, "do_normalize": False}
    folder = edited(hugging_face, tmp_path / "e", "preprocessor_config.json", **values)
    convert(folder, tmp_path / "ours", labels=labels)
    meta = load_model(tmp_path / "ours")[1]
    assert (meta.mean, meta.std, meta.normalize) == (-1.5, 2.5, False)
    assert meta.classes == tuple(map(ClassInfo, IDS, NAMES))
    (folder / "preprocessor_config.json").unlink()
    convert(folder, tmp_path / "without", labels=labels)
    meta = load_model(tmp_path / "without")[1]
    assert (meta.mean, meta.std, meta.normalize) == (-4.2677393, 4.5689974, True)


def test_labels_give_ids_to_names_that_are_there_twice(
    hugging_face: Path, labels: Path, tmp_path: Path
) -> None:
    labels.write_text(labels.read_text().replace("Dog", "Speech"))
    twice = {str(i): "Speech" if i == 1 else name for i, name in enumerate(NAMES)}
    folder = edited(hugging_face, tmp_path / "e", "config.json", id2label=twice)
    convert(folder, tmp_path / "ours", labels=labels)
    assert tuple(c.id for c in load_model(tmp_path / "ours")[1].classes) == IDS
    convert(tmp_path / "ours", tmp_path / "back")
    back = json.loads((tmp_path / "back" / "config.json").read_text())
    assert list(back["id2label"].values()) == list(IDS)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"hidden_act": "relu"}, "expected hidden_act 'gelu', got 'relu'"),
        ({"num_attention_heads": 6}, "num_attention_heads 3, got 6"),
        ({"model_type": "wav2vec2"}, "wav2vec2"),
        ({"time_stride": 9}, "10x9 has 1356 patches, the weights have positions for 1212"),
        ({"time_stride": 0}, "config.json"),
        ({"max_length": 1017}, "no clip has max_length 1017 of fbank128"),
        ({"max_length": 10}, "a patch is 16 x 16: .* 10 frames"),
        ({"layer_norm_eps": math.nan}, "norm_eps must be finite and >= 0, got nan"),
        ({"num_mel_bins": 80}, "expected 64 .logmel64. or 128 .fbank128. mel bins, it takes 80"),
        ({"frequency_stride": "x"}, "config.json is damaged: .*'x'"),
        (
            {"id2label": dict(enumerate(["A", "B", 3, "D", "E"]))},
            "each of them a class's id and name",
        ),
        ({"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}, "no class list: expected --labels"),
        ({"id2label": {"0": "A", "1": "B"}}, "head's 5 classes, got 2"),
        ({"id2label": {"0": "A", "2": "B"}}, "id2label with the keys 0, 1, ..., lacks '1'"),
        ({"id2label": dict.fromkeys("01234", "A")}, "id2label share a name: --labels gives ids"),
    ],
)
def test_bad_hugging_face_config(
    hugging_face: Path, tmp_path: Path, values: dict[str, Any], expected: str
) -> None:
    folder = edited(hugging_face, tmp_path / "e", "config.json", **values)
    with pytest.raises(UserError, match=expected):
        convert(folder, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"sampling_rate": 44_100}, "expected sampling_rate 16000, got 44100"),
        ({"feature_extractor_type": "Wav2Vec2FeatureExtractor"}, "'ASTFeatureExtractor', got 'Wav"),
        ({"num_mel_bins": 64}, "expected num_mel_bins 128, got 64"),
        ({"mean": "x"}, "mean must be .*, got 'x'"),
        ({"std": 0}, "std must be .*, got 0"),
        ({"do_normalize": "no"}, "normalize must be true or false, got 'no'"),
    ],
)
def test_bad_hugging_face_preprocessor(
    hugging_face: Path, tmp_path: Path, values: dict[str, Any], expected: str
) -> None:
    folder = edited(hugging_face, tmp_path / "e", "preprocessor_config.json", **values)
    with pytest.raises(UserError, match=expected):
        convert(folder, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def plain_hugging_face(folder: Path, **config: Any) -> nn.Module:
    """An AST as transformers initialises it, which has tokens of a tiny variance."""
    torch.manual_seed(1)
    sizes: dict[str, Any] = {
        "hidden_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 768,
        "max_length": 128,
        "id2label": dict(enumerate(NAMES)),
        "label2id": {name: i for i, name in enumerate(NAMES)},
    }
    model = transformers.ASTForAudioClassification(transformers.ASTConfig(**(sizes | config)))
    model.save_pretrained(folder)
    return cast(nn.Module, model.eval())


@pytest.mark.parametrize("eps", [None, 1e-3, 1e-6])
def test_layer_norm_eps_comes_along_and_goes_back(eps: float | None, tmp_path: Path) -> None:
    more = {} if eps is None else {"layer_norm_eps": eps}
    plain_hugging_face(tmp_path / "hf", **more)
    x = torch.randn(2, 128, 128)
    expected = hf_logits(tmp_path / "hf", x)
    convert(tmp_path / "hf", tmp_path / "ours")
    model, meta = load_model(tmp_path / "ours")
    assert meta.options["norm_eps"] == (1e-12 if eps is None else eps)
    with torch.inference_mode():
        assert (model(x) - expected).abs().max() < 1e-5
    assert not convert(tmp_path / "ours", tmp_path / "back").notes
    assert (hf_logits(tmp_path / "back", x) - expected).abs().max() < 1e-5
    convert(tmp_path / "back", tmp_path / "again")
    assert load_model(tmp_path / "again")[1].options == meta.options


def test_layer_norm_eps_without_a_config_is_transformers_default(
    labels: Path, tmp_path: Path
) -> None:
    frames = FEATURES["fbank128"].num_frames(160_000)
    plain_hugging_face(tmp_path / "hf", max_length=frames)
    done = convert(tmp_path / "hf" / "model.safetensors", tmp_path / "ours", labels=labels)
    assert done.meta.options["norm_eps"] == 1e-12
    assert any("no config.json: layer_norm_eps is taken to be 1e-12" in n for n in done.notes)


def test_labels_in_another_order_are_refused(
    hugging_face: Path, labels: Path, tmp_path: Path
) -> None:
    labels.write_text(labels.read_text().replace("Dog", "?").replace("Speech", "Dog"))
    with pytest.raises(UserError, match="class 0 is 'Dog' there, 'Speech' in"):
        convert(hugging_face, tmp_path / "ours", labels=labels)


AST_META = ModelMeta(
    model="ast",
    feature="logmel64",
    clip_seconds=2.01,
    num_mels=64,
    num_frames=80,
    mean=-20.5,
    std=17.25,
    classes=tuple(map(ClassInfo, IDS, NAMES)),
    options={"size": "tiny224", "num_layers": 1, "fstride": 8, "tstride": 16},
)


def test_logmel64_goes_to_hugging_face_and_back_unchanged(tmp_path: Path) -> None:
    model = AST_META.create()
    save_weights(tmp_path / "ours", model.state_dict(), AST_META)
    summary = convert(tmp_path / "ours", tmp_path / "hf")
    assert "no extractor for logmel64" in summary.notes[0]
    assert "1e-06 also in the head, where it is 1e-5 here" in summary.notes[1]
    assert not (tmp_path / "hf" / "preprocessor_config.json").exists()
    x = torch.randn(2, 80, 64)
    assert (hf_logits(tmp_path / "hf", x) - model.eval()(x)).abs().max() < 1e-5
    convert(tmp_path / "hf", tmp_path / "again")
    again, meta = load_model(tmp_path / "again")
    assert torch.equal(again(x), model(x))
    fields = ("feature", "clip_seconds", "mean", "std", "remove_mean", "classes", "options")
    assert all(getattr(meta, f) == getattr(AST_META, f) for f in fields)


@pytest.mark.parametrize("remove_mean", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("feature", ["logmel64", "fbank128"])
def test_our_statistics_go_to_hugging_face_and_back(
    feature: str, normalize: bool, remove_mean: bool, tmp_path: Path
) -> None:
    spec = FEATURES[feature]
    meta = replace(
        AST_META,
        feature=feature,
        num_mels=spec.num_mels,
        num_frames=spec.num_frames(round(2.01 * 16_000)),
        remove_mean=remove_mean,
        normalize=normalize,
    )
    save_weights(tmp_path / "ours", meta.create().state_dict(), meta)
    convert(tmp_path / "ours", tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "again")
    again = load_model(tmp_path / "again")[1]
    assert replace(again, trained={}) == meta
    if feature == "fbank128":  # the extractor's own file decides over ours, but says nothing of it
        values = {"mean": 3.0, "std": 4.0, "do_normalize": not normalize}
        folder = edited(tmp_path / "hf", tmp_path / "e", "preprocessor_config.json", **values)
        convert(folder, tmp_path / "other")
        other = load_model(tmp_path / "other")[1]
        assert (other.mean, other.std, other.normalize) == (3.0, 4.0, not normalize)
        assert other.remove_mean == remove_mean


def test_an_extractor_of_64_mels_is_not_our_feature(hugging_face: Path, tmp_path: Path) -> None:
    save_weights(tmp_path / "ours", AST_META.create().state_dict(), AST_META)
    convert(tmp_path / "ours", tmp_path / "hf")
    extractor = transformers.ASTFeatureExtractor(num_mel_bins=64, max_length=80)
    extractor.save_pretrained(tmp_path / "hf")
    with pytest.raises(UserError, match="expected num_mel_bins 128, got 64"):
        convert(tmp_path / "hf", tmp_path / "again")


def test_our_ids_do_not_outlive_a_new_head(tmp_path: Path) -> None:
    save_weights(tmp_path / "ours", AST_META.create().state_dict(), AST_META)
    convert(tmp_path / "ours", tmp_path / "hf")
    others = {str(i): f"new {i}" for i in range(K)}
    folder = edited(tmp_path / "hf", tmp_path / "e", "config.json", id2label=others)
    convert(folder, tmp_path / "again")
    assert [c.id for c in load_model(tmp_path / "again")[1].classes] == list(others.values())


# ------------------------------------------------------------------------ the authors' layouts
AUTHORS: dict[str, tuple[Callable[[], nn.Module], str, dict[str, Any]]] = {
    "cnn_trans": (
        lambda: TransformerEncoder(64, 64, K),
        "logmel64",
        {"embedding": 64, "num_layers": 2, "num_heads": 8, "input_scale": 8.0},
    ),
    "cnn_trans, 128 mels, convolutions, 12 heads": (
        lambda: TransformerEncoder(128, 128, K, heads=12, convolutions=True),
        "fbank128",
        {"embedding": 128, "num_layers": 2, "num_heads": 12, "input_scale": 8.0},
    ),
    "crnn": (lambda: Crnn(64, 64, K), "logmel64", {"embedding": 64}),
    "resnet34": (lambda: ResNetAttention("resnet34", K), "fbank128", {"pooling": "sigatt"}),
}


@pytest.mark.parametrize("prefix", ["", "module._orig_mod."])
@pytest.mark.parametrize("case", AUTHORS)
def test_the_authors_checkpoints(case: str, prefix: str, labels: Path, tmp_path: Path) -> None:
    make, feature, options = AUTHORS[case]
    original = randomise(make())
    path = save(tmp_path / "best.pth", original, prefix=prefix, nested=not prefix)
    more: dict[str, Any] = {}
    if case == "resnet34":
        more["feature"] = feature
    elif options.get("num_heads") == 12:
        more["settings"] = ["model.num_heads=12"]
    summary = convert(path, tmp_path / "ours", labels=labels, **more)

    meta = load_model(tmp_path / "ours")[1]
    spec = FEATURES[feature]
    assert (meta.model, meta.feature, meta.options) == (case.split(",")[0], feature, options)
    assert (meta.mean, meta.std, meta.remove_mean) == (spec.mean, spec.std, True)
    assert meta.classes == tuple(map(ClassInfo, IDS, NAMES))
    x = torch.randn(2, meta.num_frames, meta.num_mels)
    error = (probabilities(tmp_path / "ours", x) - originals(original, x)).abs().max()
    assert error < 1e-5

    tensors = original.state_dict()
    assert summary.loaded + len(summary.dropped) == len(tensors)
    dropped = {name for name in tensors if re.match(r"conv\d|positional|model\.fc", name)}
    assert summary.dropped.keys() == dropped and summary.missing == []


def test_resnet50_at_64_mels_converts_and_says_what_differs(labels: Path, tmp_path: Path) -> None:
    original = ResNetAttention("resnet50", K, channels=3)
    state = {k: v for k, v in original.state_dict().items() if "num_batches" not in k}
    torch.save(state, tmp_path / "r.pt")
    with pytest.raises(UserError, match="say which it was trained on with --feature"):
        convert(tmp_path / "r.pt", tmp_path / "ours", labels=labels)
    done = convert(tmp_path / "r.pt", tmp_path / "ours", labels=labels, feature="logmel64")
    assert (done.meta.model, len(done.missing)) == ("resnet50", 53)
    assert any("the output differs" in note for note in done.notes)
    assert any("red, green and blue are summed" in note for note in done.notes)
    weights = load_file(tmp_path / "ours" / "model.safetensors")
    rgb = original.model.conv1.weight
    assert torch.equal(weights["trunk.conv1.weight"], rgb.sum(1, keepdim=True))


@pytest.mark.parametrize("prefix", ["", "_orig_mod.module.module."])
@pytest.mark.parametrize(("mels", "frames", "stride"), [(128, 1024, 16), (64, 400, 8)])
def test_asts_pth(
    prefix: str, mels: int, frames: int, stride: int, labels: Path, tmp_path: Path
) -> None:
    original = randomise(AstModel(mels, frames, stride, K))
    path = save(tmp_path / "audioset.pth", original, prefix=prefix)
    summary = convert(path, tmp_path / "ours", labels=labels)
    assert summary.meta.options == {
        "size": "tiny224", "num_layers": 2, "fstride": stride, "tstride": stride
    }  # fmt: skip
    heads = ("v.head.weight", "v.head.bias", "v.head_dist.weight", "v.head_dist.bias")
    assert tuple(summary.dropped) == heads
    x = torch.randn(2, frames, mels)
    error = (probabilities(tmp_path / "ours", x) - originals(original, x)).abs().max()
    assert error < 1e-5

    meta = summary.meta
    spec = FEATURES[meta.feature]
    if mels == 64:
        assert (meta.mean, meta.std, meta.remove_mean) == (spec.mean, spec.std, True)
        with pytest.raises(UserError, match="--statistics ast is for fbank128"):
            convert(path, tmp_path / "b", labels=labels, statistics="ast")
    else:
        ast = (-4.2677393, 4.5689974, False)
        assert (meta.mean, meta.std, meta.remove_mean) == ast
        other = convert(path, tmp_path / "b", labels=labels, statistics="authors").meta
        assert (other.mean, other.std, other.remove_mean) == (spec.mean, spec.std, True)


def test_strides_that_no_count_of_patches_tells(labels: Path, tmp_path: Path) -> None:
    original = AstModel(64, 400, 8, K, layers=1)
    grid = ((64 - 16) // 4 + 1) * ((400 - 16) // 12 + 1)
    original.v.pos_embed = nn.Parameter(torch.zeros(1, 2 + grid, 192))
    path = save(tmp_path / "a.pth", original)
    with pytest.raises(UserError, match=rf"{grid} positions fit no feature.*model.fstride="):
        convert(path, tmp_path / "ours", labels=labels)
    strides = ["model.fstride=4", "model.tstride=12"]
    done = convert(path, tmp_path / "ours", labels=labels, settings=strides)
    assert done.meta.feature == "logmel64"
    strides = ["model.fstride=4", "model.tstride=13"]
    with pytest.raises(UserError, match="say which"):
        convert(path, tmp_path / "b", labels=labels, settings=strides)


# --------------------------------------------------------------------------------- bad input
def _without(name: str) -> Callable[[State], object]:
    return lambda state: state.pop(name)


def _with(name: str, tensor: Tensor) -> Callable[[State], object]:
    return lambda state: state.update({name: tensor})


BAD: dict[str, tuple[Callable[[State], object], str]] = {
    "missing": (_without("conv.3.bn.bias"), "lacks conv.3.bn.bias"),
    "missing for good": (_without("fc_att.bias"), "lacks fc_att.bias"),
    "missing part": (_without("enc_layer.slf_attn.w_ks.bias"), "w_qs.bias .* got 2 of 3"),
    "missing mark": (
        _without("fc_prob.weight"),
        r"the nearest is the authors' TransformerEncoder \(CNN\+Trans\), but this lacks fc_prob",
    ),
    "shape": (
        _with("fc_att.weight", torch.zeros(K, 63)),
        r"expected fc_att.weight of shape \(5, 64\), got \(5, 63\)",
    ),
    "part's shape": (_with("enc_layer.slf_attn.w_ks.bias", torch.zeros(60)), r"\(60,\)"),
    "no axes": (_with("fc_prob.weight", torch.zeros(())), "expected 2 axes of fc_prob"),
    "extra": (
        _with("enc_layer.extra", torch.zeros(3)),
        "nearest is .*CNN.Trans.* but this has enc_layer.extra, which it does not know",
    ),
    "eleventh convolution": (
        _with("conv.10.conv.bias", torch.zeros(3)),
        "the model has no place for conv.10.conv.bias",
    ),
    "bool": (
        _with("fc_att.weight", torch.ones(K, 64).bool()),
        "expected floating-point numbers in fc_att.weight, got torch.bool",
    ),
    "complex": (
        _with("fc_att.bias", torch.zeros(K, dtype=torch.complex64)), "fc_att.bias, .*complex64"
    ),
    "whole": (_with("fc_att.bias", torch.zeros(K).int()), "numbers in fc_att.bias, got .*int32"),
    "quantized": (
        _with("fc_att.bias", torch.quantize_per_tensor(torch.ones(K), 0.1, 0, torch.qint8)),
        "floating-point numbers in fc_att.bias, got torch.qint8",
    ),
    "sparse": (
        _with("fc_att.bias", torch.zeros(K).to_sparse()), "dense tensors, and 'fc_att.bias' is none"
    ),
    "meta": (_with("fc_att.bias", torch.zeros(K, device="meta")), "'fc_att.bias' is none"),
    "counter": (
        _with("conv.0.bn.num_batches_tracked", torch.tensor(3.0)),
        "expected integers in conv.0.bn.num_batches_tracked, got torch.float32",
    ),
    "NaN": (
        _with("fc_att.bias", torch.full((K,), math.nan)),
        "expected finite numbers in fc_att.bias, got NaN",
    ),
    "infinite": (_with("fc_att.bias", torch.full((K,), -math.inf)), "finite numbers in fc_att"),
    "infinite in float32": (
        _with("fc_att.bias", torch.full((K,), 1e300, dtype=torch.float64)), "finite numbers"
    ),
    "mels": (
        _with("conv.0.conv.weight", torch.zeros(3, 1, 3, 3)),
        "expected 64 .logmel64. or 128 .fbank128. mel bins, it takes 42",
    ),
    "prefix of one": (
        _with("module.fc_att.bias", torch.zeros(K)), r"has module\.fc_att\.bias, .*not know"
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def authors_state() -> State:
    torch.manual_seed(0)
    return randomise(TransformerEncoder(64, 64, K)).state_dict()


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_an_error(
    case: str, authors_state: State, labels: Path, tmp_path: Path
) -> None:
    damage, expected = BAD[case]
    state = dict(authors_state)
    damage(state)
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(UserError, match=expected):
        convert(tmp_path / "x.pth", tmp_path / "ours", labels=labels)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["labels.csv", "x.pth"]


def test_other_precisions_convert_to_float32(
    authors_state: State, labels: Path, tmp_path: Path
) -> None:
    state = {n: t.double() if t.is_floating_point() else t.int() for n, t in authors_state.items()}
    state["fc_att.bias"] = nn.Parameter(state["fc_att.bias"].bfloat16())
    torch.save(state, tmp_path / "x.pth")
    convert(tmp_path / "x.pth", tmp_path / "ours", labels=labels)
    converted = load_file(tmp_path / "ours" / "model.safetensors")
    assert {t.dtype for t in converted.values()} == {torch.float32, torch.int64}
    assert torch.equal(converted["head.fc_prob.bias"], authors_state["fc_prob.bias"])


def test_what_is_missing_has_a_name_where_the_layout_has_none(
    authors_state: State, labels: Path, tmp_path: Path
) -> None:
    torch.save(authors_state, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"lacks layers.1.qkv.weight, layers.1.*and 9 more"):
        convert(tmp_path / "x.pth", tmp_path / "o", labels=labels, settings=["model.shared=false"])


def test_one_line_on_the_command_line(authors_state: State, labels: Path, tmp_path: Path) -> None:
    torch.save(authors_state, tmp_path / "x.pth")
    line = one_line(fastat("convert", tmp_path / "x.pth", tmp_path / "ours", code=2))
    assert "no class list" in line and "its 5 classes" in line
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("seconds", [math.nan, math.inf, -1.0, 0.0, 1e9])
def test_impossible_lengths_of_clips(
    seconds: float, authors_state: State, labels: Path, tmp_path: Path
) -> None:
    torch.save(authors_state, tmp_path / "x.pth")
    with pytest.raises(UserError, match="--clip-seconds"):
        convert(tmp_path / "x.pth", tmp_path / "ours", labels=labels, clip_seconds=seconds)


def test_class_lists_that_do_not_fit(authors_state: State, labels: Path, tmp_path: Path) -> None:
    torch.save(authors_state, tmp_path / "x.pth")
    labels.write_text("\n".join(labels.read_text().splitlines()[:-1]))
    with pytest.raises(UserError, match="has 4 classes, the head of .* 5"):
        convert(tmp_path / "x.pth", tmp_path / "ours", labels=labels)
    assert not (tmp_path / "ours").exists()


def test_an_unknown_layout_names_the_nearest(labels: Path, tmp_path: Path) -> None:
    save_file({"encoder.weight": torch.zeros(3)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="fits no known layout .*encoder.weight.*known: Hugging"):
        convert(tmp_path / "x.safetensors", tmp_path / "ours", labels=labels)
    state = {f"v.{k}": v for k, v in Vit(192, 1, 102, 16, 1).state_dict().items()}
    torch.save(state | {"head2.weight": torch.zeros(3)}, tmp_path / "y.pth")
    with pytest.raises(
        UserError, match="nearest is AST's .pth, but this lacks mlp_head.1.weight and has head2.we"
    ):
        convert(tmp_path / "y.pth", tmp_path / "ours", labels=labels)


def test_pooling_without_attention_has_to_be_named(
    authors_state: State, labels: Path, tmp_path: Path
) -> None:
    state = {k: v for k, v in authors_state.items() if not k.startswith("fc_att")}
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(UserError, match="model.pooling=max"):
        convert(tmp_path / "x.pth", tmp_path / "ours", labels=labels)
    convert(tmp_path / "x.pth", tmp_path / "ours", labels=labels, settings=["model.pooling=max"])
    assert load_model(tmp_path / "ours")[1].options["pooling"] == "max"


class Evil:
    """Unpickling it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("plain", [False, True])
def test_pickles_with_code_are_refused(plain: bool, labels: Path, tmp_path: Path) -> None:
    content = {"state_dict": {"fc_prob.weight": Evil(tmp_path / "pwned")}}
    path = tmp_path / "x.pth"
    if plain:
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    with pytest.raises(UserError, match="refused: .*"):
        convert(path, tmp_path / "ours", labels=labels)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["labels.csv", "x.pth"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([1, 2], "expected a state dict, got list"),
        ({}, "expected a state dict"),
        ({"fc_prob.weight": 3}, "expected only tensors, got 'fc_prob.weight': int"),
    ],
)
def test_pickles_without_a_state_dict(content: object, expected: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(UserError, match=expected):
        convert(tmp_path / "x.pth", tmp_path / "ours")


def test_damaged_and_absent_files(authors_state: State, tmp_path: Path) -> None:
    torch.save(authors_state, tmp_path / "x.pth")
    whole = (tmp_path / "x.pth").read_bytes()
    cut = whole[: len(whole) // 2]
    for damaged in (cut, whole[10:], b"", b"no pickle at all", b"\x80\x02}q", b"\x80\x02X\x01"):
        (tmp_path / "x.pth").write_bytes(damaged)
        with pytest.raises(UserError, match="damaged"):
            convert(tmp_path / "x.pth", tmp_path / "ours")
    (tmp_path / "x.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(Failure, match="damaged"):
        convert(tmp_path / "x.safetensors", tmp_path / "ours")
    with pytest.raises(UserError, match="no such checkpoint"):
        convert(tmp_path / "none.pth", tmp_path / "ours")
    with pytest.raises(UserError, match="expected a run, a checkpoint, or a Hugging Face folder"):
        convert(tmp_path, tmp_path / "ours")
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(UserError, match=r"expected a folder, .safetensors or .pth"):
        convert(tmp_path / "x.txt", tmp_path / "ours")


def test_an_existing_destination_stays(hugging_face: Path, tmp_path: Path) -> None:
    (tmp_path / "ours").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        convert(hugging_face, tmp_path / "ours")
    assert (tmp_path / "ours").read_text() == "mine"


def test_options_that_are_none(hugging_face: Path, labels: Path, tmp_path: Path) -> None:
    for more, expected in (
        ({"settings": ["lr=3"]}, "takes model.KEY=value here, got lr=3"),
        ({"settings": ["model.fstrid=8"]}, "no option 'fstrid'; did you mean 'fstride'"),
        ({"feature": "logmel64"}, r"expected 64 \(logmel64\) mel bins, it takes 128"),
        ({"clip_seconds": 3.0}, "no clip of 3 s has max_length 1024"),
        ({"settings": ["model.fstride=0"]}, "fstride must be in 1..16, got 0"),
        ({"feature": "mfcc"}, "feature must be one of"),
        ({"statistics": "mine"}, "--statistics must be one of ast, authors, got 'mine'"),
    ):
        with pytest.raises(UserError, match=expected):
            convert(hugging_face, tmp_path / "ours", **more)
        assert not (tmp_path / "ours").exists()


# -------------------------------------------------------------------------------- trunks, runs
def test_a_trunk_is_for_init(labels: Path, tmp_path: Path) -> None:
    torch.save({"model": Vit(192, 1, 2 + 14 * 14, 16, 3).state_dict()}, tmp_path / "deit.pth")
    with pytest.raises(UserError, match="fastat train --model ast --init"):
        convert(tmp_path / "deit.pth", tmp_path / "ours", labels=labels)
    trunk = ResNetAttention("resnet34", K).model
    with pytest.raises(UserError, match="fastat train --model resnet34 --init"):
        convert(save(tmp_path / "r.pth", trunk), tmp_path / "ours", labels=labels)
    assert not (tmp_path / "ours").exists()


RESNET_META = ModelMeta(
    model="resnet34",
    feature="logmel64",
    clip_seconds=1.0,
    num_mels=64,
    num_frames=40,
    mean=0.0,
    std=1.0,
    classes=(ClassInfo("a", "A"), ClassInfo("b", "B")),
)


def test_a_resnet_goes_to_timm_and_only_it(tmp_path: Path) -> None:
    import timm

    model = randomise(RESNET_META.create())
    assert isinstance(model, FrameModel)
    run = tmp_path / "run"
    write_checkpoint(run / "checkpoints", 3, model.state_dict(), RESNET_META, {}, best=True)
    summary: Summary = convert(run, tmp_path / "trunk.safetensors")
    heads = ("head.fc_prob.weight", "head.fc_prob.bias", "head.fc_att.weight", "head.fc_att.bias")
    assert tuple(summary.dropped) == heads
    trunk = timm.create_model("resnet34", in_chans=1, num_classes=0, global_pool="").eval()
    trunk.load_state_dict(load_file(tmp_path / "trunk.safetensors"))
    x = torch.randn(2, 40, 64)
    with torch.inference_mode():
        expected = trunk(x.mT[:, None]).mean(2).mT
        assert (model.frames(x) - expected).abs().max() < 1e-4 * expected.abs().max()
    with pytest.raises(UserError, match="only ast has a Hugging Face layout, this is resnet34"):
        convert(run, tmp_path / "hf")
    with pytest.raises(UserError, match="--labels is for other projects' checkpoints"):
        convert(run, tmp_path / "hf", labels=tmp_path)
    assert not (tmp_path / "hf").exists()
