"""Runs that start from other weights: what is taken, what is made anew, what is an error."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from fastat.audio.features import FEATURES
from fastat.data.shards import ClassInfo
from fastat.models.base import TaggingModel
from fastat.system.errors import UserError
from fastat.weights.checkpoint import ModelMeta, load_model, save_weights
from fastat.weights.initial import initial_options, load_initial
from tests.conftest import TinySets, fastat
from tests.weights.reference_models import (
    AstModel,
    Crnn,
    ResNetAttention,
    TransformerEncoder,
    Vit,
    randomise,
)

CLASSES = tuple(ClassInfo(f"/m/{i}", f"class {i}") for i in range(5))
OTHERS = tuple(ClassInfo(f"/x/{i}", f"other {i}") for i in range(5))


def make(
    model: str,
    *,
    feature: str = "logmel64",
    clip_seconds: float = 10.0,
    classes: tuple[ClassInfo, ...] = CLASSES,
    **options: Any,
) -> tuple[TaggingModel, ModelMeta]:
    """A random model and its meta."""
    spec = FEATURES[feature]
    meta = ModelMeta(
        model=model,
        feature=feature,
        clip_seconds=clip_seconds,
        num_mels=spec.num_mels,
        num_frames=spec.num_frames(round(clip_seconds * 16_000)),
        mean=0.0,
        std=1.0,
        classes=classes,
        options=options,
    )
    created = meta.create()
    randomise(created)
    return created, meta


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def save(path: Path, made: tuple[TaggingModel, ModelMeta]) -> Path:
    save_weights(path, made[0].state_dict(), made[1])
    return path


def only_differ(a: dict[str, Tensor], b: dict[str, Tensor]) -> set[str]:
    assert a.keys() == b.keys()
    return {name for name in a if not torch.equal(a[name], b[name])}


SMALL: dict[str, Any] = {"embedding": 64, "num_heads": 4}
HEAD = {f"head.fc_{a}.{b}" for a in ("prob", "att") for b in ("weight", "bias")}


def test_the_same_classes_take_everything(tmp_path: Path) -> None:
    source = make("cnn_trans", **SMALL)
    model, meta = make("cnn_trans", **SMALL)
    before = state_of(model)
    notes = load_initial(model, meta, save(tmp_path / "a", source))
    assert only_differ(state_of(source[0]), state_of(model)) == set()
    assert len(only_differ(before, state_of(model))) > 60  # it was another model
    assert len(notes) == 1 and "86 tensors loaded" in notes[0]


@pytest.mark.parametrize("classes", [CLASSES[:3], OTHERS, (*CLASSES[:2], *OTHERS)])
def test_other_classes_make_the_head_anew_and_only_it(
    classes: tuple[ClassInfo, ...], tmp_path: Path
) -> None:
    source = make("cnn_trans", **SMALL)
    model, meta = make("cnn_trans", classes=classes, **SMALL)
    before = state_of(model)
    notes = load_initial(model, meta, save(tmp_path / "a", source))
    after = state_of(model)
    assert all(torch.equal(after[name], before[name]) for name in HEAD)
    for name, tensor in source[0].state_dict().items():
        if name not in HEAD:
            assert torch.equal(after[name], tensor), name
    shared = len(set(classes) & set(CLASSES))
    assert "the head is made anew" in notes[0]
    assert f"has 5 classes, {shared} of this set's {len(classes)}" in notes[0]
    assert "82 tensors loaded" in notes[-1] and "4 dropped (of other classes)" in notes[-1]
    assert "4 made anew" in notes[-1]


@pytest.mark.parametrize(
    ("model", "options"),
    [("cnn_trans", SMALL), ("ast", {"size": "tiny224", "num_layers": 1})],
)
def test_the_same_classes_in_another_order_keep_the_head(
    model: str, options: dict[str, Any], tmp_path: Path
) -> None:
    source, _ = made = make(model, **options)
    order = [3, 0, 4, 1, 2]
    other, meta = make(model, classes=tuple(CLASSES[i] for i in order), **options)
    notes = load_initial(other, meta, save(tmp_path / "a", made))
    x = torch.randn(2, 400, 64)
    with torch.inference_mode():
        theirs, ours = source.eval()(x), other.eval()(x)
    assert theirs.std(1).min() > 1e-3  # the order matters
    torch.testing.assert_close(ours, theirs[:, order])
    assert "rows are put into the order of this set's classes" in notes[0]
    assert "dropped" not in notes[-1] and "anew" not in notes[-1]


def test_another_feature_is_told(tmp_path: Path) -> None:
    path = save(tmp_path / "a", make("resnet34"))
    model, meta = make("resnet34", feature="fbank128")
    assert "trained on logmel64, this run takes fbank128" in load_initial(model, meta, path)
    model, meta = make("resnet34")
    assert len(load_initial(model, meta, path)) == 1


def test_head_norm_of_an_ast_stays(tmp_path: Path) -> None:
    options: dict[str, Any] = {"size": "tiny224", "num_layers": 1}
    source = make("ast", **options)
    model, meta = make("ast", classes=OTHERS, **options)
    load_initial(model, meta, save(tmp_path / "a", source))
    assert only_differ(state_of(source[0]), state_of(model)) == {"head.weight", "head.bias"}


def grid_of(pos: Tensor, f: int, t: int) -> Tensor:
    """[1, 2 + f * t, D] -> [D, f, t]."""
    return pos[0, 2:].T.reshape(-1, f, t)


def test_a_shorter_clip_cuts_the_grid_from_its_middle(tmp_path: Path) -> None:
    options: dict[str, Any] = {"size": "tiny224", "num_layers": 1, "fstride": 8, "tstride": 16}
    source = make("ast", **options)  # 7 x 25
    model, meta = make("ast", clip_seconds=4.0, **options)  # 7 x 10
    notes = load_initial(model, meta, save(tmp_path / "a", source))
    old = source[0].state_dict()["pos_embed"]
    new = model.state_dict()["pos_embed"]
    assert torch.equal(new[:, :2], old[:, :2])
    start = 25 // 2 - 10 // 2
    expected = grid_of(old, 7, 25)[:, :, start : start + 10]
    assert torch.equal(grid_of(new, 7, 10), expected)
    assert only_differ(state_of(source[0]), state_of(model) | {"pos_embed": old}) == set()
    assert "positions of 7 x 25 patches adapted to 7 x 10" in notes[0]


def test_a_longer_clip_stretches_the_grid(tmp_path: Path) -> None:
    options: dict[str, Any] = {"size": "tiny224", "num_layers": 1, "fstride": 8, "tstride": 16}
    source = make("ast", clip_seconds=4.0, **options)
    model, meta = make("ast", **options)
    load_initial(model, meta, save(tmp_path / "a", source))
    old, new = (m.state_dict()["pos_embed"] for m in (source[0], model))
    stretched = F.interpolate(grid_of(old, 7, 10)[None], size=(7, 25), mode="bilinear")
    assert torch.allclose(grid_of(new, 7, 25), stretched[0], atol=1e-6)
    assert torch.equal(new[:, :2], old[:, :2])


def test_another_feature_adapts_both_axes(tmp_path: Path) -> None:
    options: dict[str, Any] = {"size": "tiny224", "num_layers": 1, "fstride": 16, "tstride": 16}
    source = make("ast", feature="fbank128", **options)  # 8 x 64
    model, meta = make("ast", **options)  # 4 x 25
    load_initial(model, meta, save(tmp_path / "a", source))
    old, new = (m.state_dict()["pos_embed"] for m in (source[0], model))
    assert torch.equal(grid_of(new, 4, 25), grid_of(old, 8, 64)[:, 2:6, 20:45])


# ------------------------------------------------------------------------------ foreign weights
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.module.", "module.module._orig_mod."])
def test_the_authors_weights_start_a_run(prefix: str, tmp_path: Path) -> None:
    original = randomise(TransformerEncoder(64, 64, 5))
    torch.save({f"{prefix}{k}": v for k, v in original.state_dict().items()}, tmp_path / "x.pth")
    options = initial_options(tmp_path / "x.pth", "cnn_trans")
    assert options == {"embedding": 64, "num_layers": 2, "num_heads": 8, "input_scale": 8.0}
    model, meta = make("cnn_trans", **options)
    head = {name: tensor for name, tensor in state_of(model).items() if name in HEAD}
    notes = load_initial(model, meta, tmp_path / "x.pth")
    x = torch.randn(2, 400, 64)
    with torch.inference_mode():
        theirs = original.enc_layer(original.enc_layer(original.convolve(
            x * 8 + original.positional_encoding.pe[:, :400]
        )))  # fmt: skip
        assert (model.eval().frames(x) - theirs).abs().max() < 1e-4  # type: ignore[operator]
    assert all(torch.equal(model.state_dict()[name], head[name]) for name in HEAD)
    assert any("no class list" in note for note in notes)


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_averaged_weights_start_a_run(prefix: str, tmp_path: Path) -> None:
    """Those of torch's AveragedModel, which counts beside its module what it averaged."""
    original = randomise(TransformerEncoder(64, 64, 5))
    averaged = AveragedModel(original)
    averaged.update_parameters(original)
    states = []
    for name, source in (("plain.pth", original), ("averaged.pth", averaged)):
        state = {f"{prefix}{k}": v for k, v in source.state_dict().items()}
        torch.save(state, tmp_path / name)
        model, meta = make("cnn_trans", **initial_options(tmp_path / name, "cnn_trans"))
        notes = load_initial(model, meta, tmp_path / name)
        states.append({k: v for k, v in state_of(model).items() if k not in HEAD})
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert any("1 dropped (the number of averaged models)" in note for note in notes)


def test_hugging_faces_head_is_taken_with_the_same_names(tmp_path: Path) -> None:
    names = [c.name for c in CLASSES]
    config = transformers.ASTConfig(
        hidden_size=192,
        num_hidden_layers=1,
        num_attention_heads=3,
        intermediate_size=768,
        max_length=128,
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
    )
    source = randomise(transformers.ASTForAudioClassification(config))
    source.save_pretrained(tmp_path / "hf")
    options = initial_options(tmp_path / "hf", "ast")
    more = {"fstride": 10, "tstride": 10, "norm_eps": 1e-12}
    assert options == {"size": "tiny224", "num_layers": 1} | more
    named = tuple(ClassInfo(name, name) for name in names)
    there, back = [0, 1, 2, 3, 4], [4, 3, 2, 1, 0]
    cases = ((named, there), (named[::-1], back), (CLASSES, there), (CLASSES[::-1], back))
    for classes, rows in (*cases, (OTHERS, None)):
        model, meta = make("ast", feature="fbank128", clip_seconds=1.0, classes=classes, **options)
        load_initial(model, meta, tmp_path / "hf")
        for part in ("weight", "bias"):
            theirs = source.state_dict()[f"classifier.dense.{part}"]
            ours = model.state_dict()[f"head.{part}"]
            if rows is None:
                assert not torch.isin(ours, theirs).any()
            else:
                assert torch.equal(ours, theirs[rows])
        norm = source.state_dict()["classifier.layernorm.weight"]
        assert torch.equal(model.state_dict()["head_norm.weight"], norm)


def test_a_deit_trunk_sums_its_colours_and_adapts_its_square(tmp_path: Path) -> None:
    trunk = randomise(Vit(192, 3, 2 + 14 * 14, 16, 3))
    torch.save({"model": trunk.state_dict()}, tmp_path / "deit.pth")
    assert initial_options(tmp_path / "deit.pth", "ast") == {"size": "tiny224", "num_layers": 3}
    # Two layers of the trunk's three, and a grid that is cut in one axis and stretched in the other
    model, meta = make("ast", size="tiny224", num_layers=2, fstride=8, tstride=10)  # 7 x 39
    fresh = state_of(model)
    notes = load_initial(model, meta, tmp_path / "deit.pth")
    state, theirs = model.state_dict(), trunk.state_dict()
    summed = theirs["patch_embed.proj.weight"].sum(1, keepdim=True)
    assert torch.equal(state["patch_embed.weight"], summed)
    assert torch.equal(state["layers.1.attn.qkv.weight"], theirs["blocks.1.attn.qkv.weight"])
    cut = grid_of(theirs["pos_embed"], 14, 14)[:, 4:11]
    expected = F.interpolate(cut[None], size=(7, 39), mode="bilinear")[0]
    assert torch.allclose(grid_of(state["pos_embed"], 7, 39), expected, atol=1e-6)
    for name in ("head.weight", "head.bias", "head_norm.weight", "head_norm.bias"):
        assert torch.equal(state[name], fresh[name])
    assert any("red, green and blue are summed" in note for note in notes)
    assert "4 dropped (ImageNet's classes)" in notes[-1]
    assert "12 dropped (layers beyond the model's)" in notes[-1]


def test_a_resnet_trunk(tmp_path: Path) -> None:
    trunk = randomise(ResNetAttention("resnet34", 5, channels=3)).model
    torch.save(trunk.state_dict(), tmp_path / "r.pth")
    assert initial_options(tmp_path / "r.pth", "resnet34") == {}
    with pytest.raises(UserError, match="is of model resnet34, the run is of resnet50"):
        initial_options(tmp_path / "r.pth", "resnet50")
    model, meta = make("resnet34")
    load_initial(model, meta, tmp_path / "r.pth")
    x = torch.randn(1, 400, 64)
    with torch.inference_mode():
        y = trunk.maxpool(torch.relu(trunk.bn1(trunk.conv1(x.mT[:, None].expand(-1, 3, -1, -1)))))
        y = trunk.layer4(trunk.layer3(trunk.layer2(trunk.layer1(y)))).mean(2).mT
        error = (model.eval().frames(x) - y).abs().max()  # type: ignore[operator]
    assert error < 1e-4 * y.abs().max()


# --------------------------------------------------------------------------------- options
def test_options_that_the_weights_need(tmp_path: Path) -> None:
    own_choice: dict[str, Any] = {"dropout": 0.5, "activation_checkpointing": True}
    save(tmp_path / "a", make("cnn_trans", num_layers=3, **own_choice, **SMALL))
    assert initial_options(tmp_path / "a", "cnn_trans") == {
        "embedding": 64,
        "num_layers": 3,
        "shared": True,
        "num_heads": 4,
        "pooling": "att",
        "input_scale": 8,
    }
    save(tmp_path / "b", make("cnn_trans", feature="fbank128", **SMALL))
    assert initial_options(tmp_path / "b", "cnn_trans")["input_scale"] == 11
    save(tmp_path / "c", make("ast", size="tiny224", fstride=16, num_layers=1))
    options: dict[str, Any] = {"fstride": 16, "tstride": 10, "size": "tiny224", "num_layers": 1}
    assert initial_options(tmp_path / "c", "ast") == options | {"norm_eps": None}
    save(tmp_path / "e", make("ast", norm_eps=1e-12, **options))
    assert initial_options(tmp_path / "e", "ast") == options | {"norm_eps": 1e-12}
    torch.save(ResNetAttention("resnet34", 5).state_dict(), tmp_path / "r.pth")
    assert initial_options(tmp_path / "r.pth", "resnet34") == {"pooling": "sigatt"}
    torch.save(AstModel(64, 400, 8, 5, layers=1).state_dict(), tmp_path / "d.pth")
    strides = {"fstride": 8, "tstride": 8}
    assert initial_options(tmp_path / "d.pth", "ast") == strides | {
        "size": "tiny224", "num_layers": 1
    }  # fmt: skip


# --------------------------------------------------------------------------------- errors
def test_another_model_names_both(tmp_path: Path) -> None:
    path = save(tmp_path / "a", make("crnn", embedding=64))
    with pytest.raises(UserError, match="is of model crnn, the run is of cnn_trans"):
        initial_options(path, "cnn_trans")
    model, meta = make("cnn_trans", **SMALL)
    with pytest.raises(UserError, match="is of model crnn, the run is of cnn_trans"):
        load_initial(model, meta, path)


def _authors_crnn(path: Path) -> None:
    torch.save(Crnn(64, 64, 5).state_dict(), path)


@pytest.mark.parametrize(
    ("write", "model", "options", "expected"),
    [
        (
            lambda path: save(path, make("crnn", embedding=64)),
            "crnn",
            {"embedding": 96},
            r"expected talnet.blocks.0.conv.weight of shape \(3, 1, 3, 3\), got \(2, 1, 3, 3\)",
        ),
        (
            lambda path: _authors_crnn(path.with_suffix(".pth")),
            "crnn",
            {"embedding": 96},
            r"expected conv.0.conv.weight of shape \(3, 1, 3, 3\), got \(2, 1, 3, 3\)",
        ),
        (
            lambda path: save(path, make("crnn", embedding=64, pooling="max")),
            "crnn",
            {"embedding": 64},
            "lacks head.fc_att.weight, head.fc_att.bias",
        ),
        (
            lambda path: save(path, make("ast", size="tiny224", num_layers=2)),
            "ast",
            {"size": "tiny224", "num_layers": 1},
            "no place for layers.1.norm1.weight, .* and 9 more",
        ),
        (
            lambda path: save(path, make("ast", size="tiny224", num_layers=1)),
            "ast",
            {"size": "small224", "num_layers": 1},
            r"expected cls_token of shape \(1, 1, 384\), got \(1, 1, 192\)",
        ),
    ],
    ids=["width", "authors' width", "pooling", "layers", "size"],
)
def test_other_shapes_name_the_tensor(
    write: Callable[[Path], object],
    model: str,
    options: dict[str, Any],
    expected: str,
    tmp_path: Path,
) -> None:
    write(tmp_path / "a")
    path = next(tmp_path.iterdir())
    created, meta = make(model, **options)
    before = state_of(created)
    with pytest.raises(UserError, match=expected):
        load_initial(created, meta, path)
    assert only_differ(before, state_of(created)) == set()


def test_positions_that_contradict_the_options(tmp_path: Path) -> None:
    made, meta = make("ast", size="tiny224", num_layers=1, fstride=8, tstride=16)
    wrong = replace(meta, options=meta.options | {"tstride": 10})
    save(tmp_path / "a", (made, wrong))
    model, meta = make("ast", clip_seconds=4.0, size="tiny224", num_layers=1)
    with pytest.raises(
        UserError, match=r"expected pos_embed of shape \(1, 275, 192\), got \(1, 177, 192\)"
    ):
        load_initial(model, meta, tmp_path / "a")


def test_a_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected a run, a checkpoint, or a Hugging Face folder"):
        initial_options(tmp_path, "ast")


def test_training_starts_from_converted_weights(tiny_sets: TinySets, tmp_path: Path) -> None:
    """The real command: another class list, another clip length, the source's embedding."""
    original = randomise(TransformerEncoder(64, 64, 5))
    torch.save(original.state_dict(), tmp_path / "x.pth")
    run = tmp_path / "run"
    done = fastat(
        "train", "--proc", "A4", "--model", "cnn_trans", "--data", tiny_sets.train, "--out", run,
        "--init", tmp_path / "x.pth", "--steps", "1", "--no-compile",
    )  # fmt: skip
    text = done.stdout + done.stderr
    assert "the head is made anew" in text and "has no class list" in text
    assert "tensors loaded" in text
    model, meta = load_model(run)
    assert meta.options["embedding"] == 64 and meta.options["input_scale"] == 8.0
    theirs = original.conv[5].conv.weight
    ours = model.state_dict()["talnet.blocks.5.conv.weight"]
    moved = (ours - theirs).abs().max().item()
    assert moved < 1e-3 and math.isfinite(moved)  # one warm-up step of Adam away
