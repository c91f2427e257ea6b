"""What `papers.py` trains: small students and teachers, and every method as rows of a table.

Everything is small enough for one CPU thread: 16x16 images of the handwritten digits, four to six blocks. A
student sees sixty labelled digits and a teacher a thousand, so that there is something to be taught.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm.models.metaformer import Pooling
from torch import nn

from vmkd_fx.distill.recipe import Recipe
from vmkd_fx.models.riformer import RIFormer

Config = dict[str, Any]

LABELLED, TEACHER_LABELLED, BATCH = 60, 1000, 30
ALONE, KD = "alone", "kd"


@dataclass(frozen=True)
class Row:
    """One line of the table: methods with their settings, on a student, with teachers.

    Attributes:
        label: what the line is called.
        student: as a recipe takes it.
        teachers: names in `TEACHERS`.
        methods: presets with their settings, together; none is the student alone.
    """

    label: str
    student: Config
    teachers: tuple[str, ...] = ()
    methods: tuple[Config, ...] = ()

    @property
    def preset(self) -> str:
        """The presets joined by "+", or "alone"."""
        return "+".join(method["preset"] for method in self.methods) or ALONE


@dataclass(frozen=True)
class Family:
    """Students that are compared with one another; the first row is the student alone, the second plain KD.

    Attributes:
        name: the title of its table.
        rows: its lines.
        image_size: height and width in pixels.
        steps, lr: of a student. Those of the transformers were chosen by the student alone, which at the
            others' learns little.
        teacher_lr: of a teacher.
    """

    name: str
    rows: tuple[Row, ...]
    image_size: int = 16
    steps: int = 300
    lr: float = 2e-3
    teacher_lr: float = 2e-3


def metaformer(mixer: str, num_classes: int = 10) -> nn.Module:
    """A MetaFormer of three stages, 8x8, 4x4 and 2x2 locations; mixer "pooling" or "identity".

    Layer scale starts at 0.1: from the published 1e-5 no block would take part in so few steps.
    """
    chosen = {"pooling": Pooling, "identity": nn.Identity}[mixer]
    sizes = {"depths": (1, 1, 2), "dims": (24, 48, 96), "layer_scale_init_values": 0.1}
    model = RIFormer(token_mixers=chosen, num_classes=num_classes, **sizes)
    model.default_cfg = {"input_size": (3, 32, 32)}
    return model


_PATCHES = {"img_size": 16, "patch_size": 4}
_VIT_SIZES = {**_PATCHES, "embed_dim": 48, "depth": 4, "num_heads": 3}
_MIXER = {"model": "mixer_nano_32", "options": {"img_size": 16, "num_blocks": 4, "embed_dim": 64}}
_VIT = {"model": "deit_tiny_patch16_224", "options": _VIT_SIZES}
_DISTILLED = {"model": "deit_tiny_distilled_patch16_224", "options": _VIT_SIZES}
_POOLING, _IDENTITY = (
    {"model": "papers_tasks:metaformer", "options": {"mixer": mixer}} for mixer in ("pooling", "identity")
)

TEACHERS: dict[str, Config] = {
    "resnet": {"model": "test_resnet"},
    "efficientnet": {"model": "test_efficientnet"},
    "rednet": {
        "model": "rednet26",
        "options": {"layers": [1, 1, 1, 1], "stem_width": 32, "channels": [16, 32, 48, 64]},
    },
    "vit": {
        "model": "deit_tiny_patch16_224",
        "options": {**_PATCHES, "embed_dim": 96, "depth": 4, "num_heads": 4},
    },
    "poolformer": _POOLING,
}

_SOFT = {"distillation": "soft", "temperature": 3.0}
_STD_SOFT = {"preset": "std", **_SOFT}
_RATIO = 196 * 384 / (16 * 96)
"""Numbers in ViTKD's teacher feature, 196 patches of DeiT III-Small's width, for one in this one's."""
_VITKD_SCALED = {"preset": "vitkd", "alpha": 3e-5 * _RATIO, "beta": 3e-6 * _RATIO}
_WITHOUT_IMITATION = {"input_weight": 0.0, "output_weight": 0.0, "relation_weight": 0.0}


_TRANSFORMERS: Config = {"steps": 450, "lr": 3e-3}


def _row(label: str, student: Config, teachers: str = "", *methods: str | Config) -> Row:
    settings = tuple({"preset": method} if isinstance(method, str) else method for method in methods)
    return Row(label, student, tuple(teachers.split()), settings)


FAMILIES = (
    Family(
        "Mixer, convolutional teachers",
        (
            _row(ALONE, _MIXER),
            _row(KD, _MIXER, "resnet", "kd"),
            _row("kd, two teachers", _MIXER, "resnet efficientnet", "kd"),
            _row("hard", _MIXER, "resnet", "hard"),
            _row("dkd", _MIXER, "resnet", "dkd"),
            _row("nkd", _MIXER, "resnet", "nkd"),
            _row("std, hard as in the paper", _MIXER, "resnet", "std"),
            _row("std, soft", _MIXER, "resnet", _STD_SOFT),
            _row("std, soft, information 0.01", _MIXER, "resnet", {**_STD_SOFT, "information": 0.01}),
            _row("std, soft, information 0.1", _MIXER, "resnet", {**_STD_SOFT, "information": 0.1}),
            _row(
                "std-intermediate, soft",
                _MIXER,
                "resnet efficientnet",
                {"preset": "std-intermediate", **_SOFT},
            ),
            _row("ccs: circulant mixers, alone", _MIXER, "", "ccs"),
            _row("ccs+kd", _MIXER, "resnet", "ccs", "kd"),
            _row("ccs+std+kd, std soft", _MIXER, "resnet", "ccs", _STD_SOFT, "kd"),
        ),
    ),
    Family(
        "Transformer, transformer teacher",
        (
            _row(ALONE, _VIT),
            _row(KD, _VIT, "vit", "kd"),
            _row("nkd", _VIT, "vit", "nkd"),
            _row("vitkd", _VIT, "vit", "vitkd"),
            _row("vitkd, weights x 49", _VIT, "vit", _VITKD_SCALED),
            _row("vitkd+nkd", _VIT, "vit", "vitkd", "nkd"),
            _row("vitkd+nkd, vitkd's weights x 49", _VIT, "vit", _VITKD_SCALED, "nkd"),
            _row("fitnet", _VIT, "vit", "fitnet"),
            _row("mgd", _VIT, "vit", "mgd"),
            _row("mgd, weight x 49", _VIT, "vit", {"preset": "mgd", "alpha": 7e-5 * _RATIO}),
        ),
        **_TRANSFORMERS,
        teacher_lr=1e-3,
    ),
    Family(
        "Transformer, convolutional and involutional teachers",
        (
            _row(ALONE, _VIT),
            _row(KD, _VIT, "resnet", "kd"),
            _row("kd, two teachers", _VIT, "resnet rednet", "kd"),
            _row("cit, random tokens", _VIT, "resnet rednet", {"preset": "cit", "tokens": "random"}),
            _row("cit, aligned tokens", _VIT, "resnet rednet", {"preset": "cit", "tokens": "aligned"}),
        ),
        **_TRANSFORMERS,
    ),
    Family(
        "Transformer with a distillation token, convolutional teacher",
        (
            _row(ALONE, _DISTILLED),
            _row(KD, _DISTILLED, "resnet", "kd"),
            _row("deit, hard as in the paper", _DISTILLED, "resnet", "deit"),
            _row("deit, soft", _DISTILLED, "resnet", {"preset": "deit", **_SOFT}),
        ),
        **_TRANSFORMERS,
    ),
    Family(
        "MetaFormer without token mixers, PoolFormer teacher",
        (
            _row(ALONE, _IDENTITY),
            _row(KD, _IDENTITY, "poolformer", "kd"),
            _row(
                "kd, no labels", _IDENTITY, "poolformer", {"preset": "kd", "alpha": 1.0, "temperature": 1.0}
            ),
            _row(
                "riformer, teacher's weights, no imitation",
                _POOLING,
                "poolformer",
                {"preset": "riformer", **_WITHOUT_IMITATION},
            ),
            _row(
                "riformer, imitation, own weights",
                _POOLING,
                "poolformer",
                {"preset": "riformer", "teacher_weights": False},
            ),
            _row("riformer", _POOLING, "poolformer", "riformer"),
            _row("with its pooling, alone", _POOLING),
        ),
        image_size=32,
    ),
)


def student_recipe(
    family: Family, row: Row, teachers: Sequence[Config], seed: int, steps: int | None = None
) -> Recipe:
    """The training of one row with one seed; the teachers with their checkpoints."""
    epochs = max((steps or family.steps) // (LABELLED // BATCH), 1)
    content = {"student": row.student, "teachers": teachers, "method": list(row.methods)}
    return _recipe(content, family.image_size, LABELLED, {"epochs": epochs, "lr": family.lr, "seed": seed})


def teacher_recipe(name: str, family: Family, steps: int) -> Recipe:
    """The training of a teacher."""
    epochs = max(steps // (TEACHER_LABELLED // BATCH), 1)
    content = {"student": TEACHERS[name]}
    return _recipe(content, family.image_size, TEACHER_LABELLED, {"epochs": epochs, "lr": family.teacher_lr})


def _recipe(content: Config, image_size: int, labelled: int, course: Config) -> Recipe:
    epochs = course["epochs"]
    course = {**course, "warmup_epochs": epochs // 30, "batch_size": BATCH}
    writing = {"evaluate_every": epochs, "checkpoint_every": 100, "log_every": 50}
    data = {"name": "digits", "image_size": image_size, "labelled": labelled}
    return Recipe.model_validate({**content, "data": data, "train": {**course, **writing}, "out": "-"})


def in_folder(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with a folder of its own below `folder`."""
    return recipe.model_copy(update={"out": str(folder / recipe.digest()[:16])})
