"""A training recipe: which student, teachers, method, data and schedule, as one YAML file.

    student: {model: resmlp_12_224, options: {img_size: 32}}
    teachers:
      - {model: resnet10t, checkpoint: runs/teacher/last.safetensors}
    method: {preset: std, alpha: 0.7}
    data: {name: digits, labelled: 200}
    train: {epochs: 30, lr: 1.0e-3, ema_decay: 0.999}
    out: runs/std

A key that is no key, a value of the wrong kind and a name that nobody knows are refused when the recipe is
read, with the line where they stand.
"""

from vmkd_fx.distill.recipe.data import DataConfig
from vmkd_fx.distill.recipe.load import load_recipe
from vmkd_fx.distill.recipe.method import MethodConfig
from vmkd_fx.distill.recipe.models import ModelConfig, TeacherConfig
from vmkd_fx.distill.recipe.training import SCHEDULES, TrainConfig
from vmkd_fx.distill.recipe.whole import Recipe

__all__ = [
    "SCHEDULES",
    "DataConfig",
    "MethodConfig",
    "ModelConfig",
    "Recipe",
    "TeacherConfig",
    "TrainConfig",
    "load_recipe",
]
