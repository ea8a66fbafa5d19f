"""How other projects name the tensors of our models: tables of rules between their names and ours.

In a rule ``#`` stands for a number and ``*`` for the last part of a name (weight, bias, ...). The
layout of a checkpoint is recognised by its names alone. Each of its tensors is either renamed, or
dropped for a reason given here; ``translate`` does it.

Sources: transformers' ASTForAudioClassification (its names on disk and, since version 5, in
memory); Gong et al.'s AST; the code of Li et al., "AudioTagging Done Right" (2022); timm.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

LEAF = "(weight|bias|running_mean|running_var|num_batches_tracked)"

QKV = 3
"""Number of parts of a packed projection: the rows of queries, keys and values, in this order."""


@dataclass(frozen=True)
class Rule:
    """One of their names (or a family of them) and ours."""

    theirs: str
    ours: str
    part: int | None = None
    """Which of the QKV parts of a packed projection it is."""
    change: Callable[[Tensor], Tensor] | None = None
    """Their tensor -> ours, where more than the name differs."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One way to name a model's tensors."""

    title: str
    model: str
    """Our model; "resnet" for ResNet50 and ResNet34."""
    marks: tuple[str, ...]
    """Names that every such checkpoint has."""
    rules: tuple[Rule, ...]
    drops: dict[str, str] = field(default_factory=dict)
    """Names of tensors that our models have no use for -> why they are dropped."""
    trunk: bool = False
    """Trained on images, without a head for our classes."""

    def find(self, name: str) -> tuple[Rule, str] | None:
        """The rule for a tensor of theirs, and our name for it."""
        for rule in self.rules:
            if (ours := renamed(name, rule.theirs, rule.ours)) is not None:
                return rule, ours
        return None

    def reason_to_drop(self, name: str) -> str | None:
        """Why a tensor of theirs is dropped; None when it is not."""
        return next((why for drop, why in self.drops.items() if _match(name, drop)), None)

    def theirs(self, name: str) -> str:
        """Their name (or the names of the parts) for a tensor of ours, for messages.

        It is our name where they have none.
        """
        names: dict[int | None, str] = {}
        for rule in self.rules:
            if (theirs := renamed(name, rule.ours, rule.theirs)) is not None:
                names.setdefault(rule.part, theirs)
        return " + ".join(names.values()) or name


def renamed(name: str, old: str, new: str) -> str | None:
    """``name`` with ``old``'s wildcards put into ``new``; None when ``old`` does not match."""
    if (match := _match(name, old)) is None:
        return None
    values = iter(match.groups())
    return re.sub(r"[#*]", lambda _: next(values), new)


def _match(name: str, pattern: str) -> re.Match[str] | None:
    return re.fullmatch(re.escape(pattern).replace(r"\#", r"(\d+)").replace(r"\*", LEAF), name)


# ------------------------------------------------------- what differs in more than the name
def sum_rgb(weight: Tensor) -> Tensor:
    """A stem for images, [C, 3, h, w] -> [C, 1, h, w]; a stem of one channel stays as it is."""
    return weight.sum(1, keepdim=True) if weight.shape[1:2] == (3,) else weight


def _matrix(weight: Tensor) -> Tensor:
    """A convolution of width 1, [D, C, 1] or [D, C, 1, 1] -> [D, C]."""
    while weight.ndim > 2 and weight.shape[-1] == 1:
        weight = weight.squeeze(-1)
    return weight


# ------------------------------------------------------------------------------------- the layouts
def _vit(prefix: str) -> tuple[Rule, ...]:
    """timm's distilled vision Transformer."""
    blocks = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    return (
        *(Rule(prefix + name, name) for name in ("cls_token", "dist_token", "pos_embed")),
        Rule(prefix + "patch_embed.proj.weight", "patch_embed.weight", change=sum_rgb),
        Rule(prefix + "patch_embed.proj.bias", "patch_embed.bias"),
        *(Rule(f"{prefix}blocks.#.{name}.*", f"layers.#.{name}.*") for name in blocks),
        Rule(prefix + "norm.*", "norm.*"),
    )


def _resnet(prefix: str) -> tuple[Rule, ...]:
    """torchvision's and timm's ResNet."""
    names = (
        "bn1.*",
        "layer#.#.conv#.weight",
        "layer#.#.bn#.*",
        "layer#.#.downsample.0.weight",
        "layer#.#.downsample.1.*",
    )
    return (
        Rule(prefix + "conv1.weight", "trunk.conv1.weight", change=sum_rgb),
        *(Rule(prefix + name, "trunk." + name) for name in names),
    )


_IMAGENET = "ImageNet's classes"

_HF = "audio_spectrogram_transformer."
_HF_BOTH = (
    Rule(_HF + "embeddings.cls_token", "cls_token"),
    Rule(_HF + "embeddings.distillation_token", "dist_token"),
    Rule(_HF + "embeddings.position_embeddings", "pos_embed"),
    Rule(_HF + "embeddings.patch_embeddings.projection.*", "patch_embed.*"),
    Rule(_HF + "layernorm.*", "norm.*"),
    Rule("classifier.layernorm.*", "head_norm.*"),
    Rule("classifier.dense.*", "head.*"),
)
_HF_DISK = (
    Rule(_HF + "encoder.layer.#.layernorm_before.*", "layers.#.norm1.*"),
    Rule(_HF + "encoder.layer.#.attention.attention.query.*", "layers.#.attn.qkv.*", 0),
    Rule(_HF + "encoder.layer.#.attention.attention.key.*", "layers.#.attn.qkv.*", 1),
    Rule(_HF + "encoder.layer.#.attention.attention.value.*", "layers.#.attn.qkv.*", 2),
    Rule(_HF + "encoder.layer.#.attention.output.dense.*", "layers.#.attn.proj.*"),
    Rule(_HF + "encoder.layer.#.layernorm_after.*", "layers.#.norm2.*"),
    Rule(_HF + "encoder.layer.#.intermediate.dense.*", "layers.#.mlp.fc1.*"),
    Rule(_HF + "encoder.layer.#.output.dense.*", "layers.#.mlp.fc2.*"),
)
_HF_MEMORY = (
    Rule(_HF + "layers.#.layernorm_before.*", "layers.#.norm1.*"),
    Rule(_HF + "layers.#.attention.q_proj.*", "layers.#.attn.qkv.*", 0),
    Rule(_HF + "layers.#.attention.k_proj.*", "layers.#.attn.qkv.*", 1),
    Rule(_HF + "layers.#.attention.v_proj.*", "layers.#.attn.qkv.*", 2),
    Rule(_HF + "layers.#.attention.o_proj.*", "layers.#.attn.proj.*"),
    Rule(_HF + "layers.#.layernorm_after.*", "layers.#.norm2.*"),
    Rule(_HF + "layers.#.mlp.fc1.*", "layers.#.mlp.fc1.*"),
    Rule(_HF + "layers.#.mlp.fc2.*", "layers.#.mlp.fc2.*"),
)
HF_RULES = _HF_BOTH + _HF_DISK
"""The names on disk, which every version of transformers reads."""
HF_AST = Layout(
    title="Hugging Face AST",
    model="ast",
    marks=(_HF + "embeddings.position_embeddings", "classifier.dense.weight"),
    rules=(*HF_RULES, *_HF_MEMORY),
)

AST = Layout(
    title="AST's .pth",
    model="ast",
    marks=("v.pos_embed", "mlp_head.1.weight"),
    rules=(*_vit("v."), Rule("mlp_head.0.*", "head_norm.*"), Rule("mlp_head.1.*", "head.*")),
    drops={"v.head.*": _IMAGENET, "v.head_dist.*": _IMAGENET},
)

_TALNET = (
    Rule("conv.#.conv.*", "talnet.blocks.#.conv.*"),
    Rule("conv.#.bn.*", "talnet.blocks.#.bn.*"),
    Rule("fc_prob.*", "head.fc_prob.*"),
    Rule("fc_att.*", "head.fc_att.*"),
)
_TALNET_MARKS = ("conv.0.conv.weight", "fc_prob.weight")
_TALNET_COPIES = dict.fromkeys(("conv#.conv.*", "conv#.bn.*"), "the same tensors again")
CNN_TRANS = Layout(
    title="the authors' TransformerEncoder (CNN+Trans)",
    model="cnn_trans",
    marks=(*_TALNET_MARKS, "enc_layer.slf_attn.w_qs.weight"),
    rules=(
        *_TALNET,
        Rule("enc_layer.slf_attn.w_qs.*", "layers.0.qkv.*", 0),
        Rule("enc_layer.slf_attn.w_ks.*", "layers.0.qkv.*", 1),
        Rule("enc_layer.slf_attn.w_vs.*", "layers.0.qkv.*", 2),
        Rule("enc_layer.slf_attn.fc.*", "layers.0.proj.*"),
        Rule("enc_layer.slf_attn.layer_norm.*", "layers.0.norm1.*"),
        Rule("enc_layer.pos_ffn.w_1.*", "layers.0.fc1.*", change=_matrix),
        Rule("enc_layer.pos_ffn.w_2.*", "layers.0.fc2.*", change=_matrix),
        Rule("enc_layer.pos_ffn.layer_norm.*", "layers.0.norm2.*"),
    ),
    drops=_TALNET_COPIES | {"positional_encoding.pe": "positions, computed here"},
)
CRNN = Layout(
    title="the authors' TALNet (CRNN)",
    model="crnn",
    marks=(*_TALNET_MARKS, "gru.weight_ih_l0"),
    rules=(
        *_TALNET,
        *(
            Rule(name, name)
            for end in ("", "_reverse")
            for kind in ("weight", "bias")
            for name in (f"gru.{kind}_ih_l0{end}", f"gru.{kind}_hh_l0{end}")
        ),
    ),
    drops=_TALNET_COPIES,
)
RESNET_ATTENTION = Layout(
    title="the authors' ResNetAttention",
    model="resnet",
    marks=("model.conv1.weight", "attention.cla.weight", "attention.att.weight"),
    rules=(
        *_resnet("model."),
        Rule("attention.cla.*", "head.fc_prob.*", change=_matrix),
        Rule("attention.att.*", "head.fc_att.*", change=_matrix),
    ),
    drops={"model.fc.*": _IMAGENET},
)
DEIT_TRUNK = Layout(
    title="timm's distilled DeiT",
    model="ast",
    marks=("pos_embed", "dist_token"),
    rules=_vit(""),
    drops={"head.*": _IMAGENET, "head_dist.*": _IMAGENET},
    trunk=True,
)
RESNET_TRUNK = Layout(
    title="timm's ResNet",
    model="resnet",
    marks=("conv1.weight", "layer4.0.conv1.weight"),
    rules=_resnet(""),
    drops={"fc.*": _IMAGENET},
    trunk=True,
)
LAYOUTS = (HF_AST, AST, CNN_TRANS, CRNN, RESNET_ATTENTION, DEIT_TRUNK, RESNET_TRUNK)
