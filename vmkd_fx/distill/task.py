"""The training task: timm's class, so that DDP, EMA, compile, checkpoints and a timm-style loop work as they
are.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from timm.task import TrainingTask
from timm.utils.model import unwrap_model
from torch import nn

from vmkd_fx.distill.losses import HardDistillation, SoftDistillation, TeacherLoss
from vmkd_fx.distill.methods import Method
from vmkd_fx.distill.teachers import Teacher
from vmkd_fx.graph.edit import LOGITS
from vmkd_fx.graph.traced import TracedModule
from vmkd_fx.graph.values import reference_tensor
from vmkd_fx.passes.std_tokens import NAME as STD
from vmkd_fx.passes.std_tokens import predicted


class Predictor(nn.Module):
    """A student in training as a plain classifier: images in, logits (B, C) out.

    `predict` is "class" for the class head, "dist" for the mean of the distillation heads, "mean" for the
    average of both.
    """

    def __init__(self, student: nn.Module, predict: str = "class") -> None:
        super().__init__()
        self.student = student
        self.predict = predict

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        outputs = self.student(images)
        return predicted(outputs, self.predict) if isinstance(outputs, dict) else outputs


class DistillationTask(TrainingTask):
    """A student that learns from labels and teachers: L = (1 - alpha) L_class + alpha L_dist (STD Eq. 12).

    `task(images, targets)` returns `loss`, `output` (the class logits), `class_loss`, `dist_loss` and one
    `dist_loss/i` a teacher. Make one with `vmkd_fx.wrap`.

    Args:
        student: the traced student with whatever the method injects.
        teachers: modules that map the student's images to logits.
        method: losses and their weights.
        criterion: the loss to the labels; cross-entropy by default.
    """

    def __init__(
        self,
        student: TracedModule,
        teachers: Iterable[Teacher],
        method: Method,
        criterion: nn.Module | None = None,
    ) -> None:
        reference = reference_tensor(student)
        super().__init__(device=reference.device, dtype=reference.dtype, verbose=False)
        self.trainable_module: nn.Module = student
        self.teachers = nn.ModuleList(teachers)
        self.method = method
        self.criterion = criterion or nn.CrossEntropyLoss()
        distillation = (
            HardDistillation() if method.distillation == "hard" else SoftDistillation(method.temperature)
        )
        self.teacher_loss = TeacherLoss(distillation, method.confidence)

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
        """Losses for images (B, 3, H, W) and labels (B,), or soft labels (B, C) where the criterion takes
        them.
        """
        outputs = self.trainable_module(input)
        logits = outputs[LOGITS] if isinstance(outputs, dict) else outputs
        class_loss = self.criterion(logits, target)
        if not len(self.teachers):
            return {"loss": class_loss, "output": logits, "class_loss": class_loss}
        teachers = torch.stack([teacher(input) for teacher in self.teachers])
        heads = (
            [outputs[f"{STD}/{i}"] for i in range(len(teachers))]
            if self.method.tokens
            else [logits] * len(teachers)
        )
        losses = self.teacher_loss(torch.stack(heads), teachers)
        dist_loss = losses.sum()
        alpha = self.method.alpha
        return {
            "loss": (1 - alpha) * class_loss + alpha * dist_loss,
            "output": logits,
            "class_loss": class_loss,
            "dist_loss": dist_loss,
            **{f"dist_loss/{index}": loss for index, loss in enumerate(losses)},
        }

    def prepare_distributed(self, device_ids: list[Any] | None = None, **ddp_kwargs: Any) -> DistillationTask:
        """Wrap the student in DistributedDataParallel; teachers stay as they are."""
        from torch.nn.parallel import DistributedDataParallel

        self.trainable_module = DistributedDataParallel(
            self.trainable_module, device_ids=device_ids, **ddp_kwargs
        )
        return self

    def compile(self, backend: str = "inductor", mode: str | None = None, **compile_kwargs: Any) -> nn.Module:
        """Compile the student and the teachers; returns the compiled student."""
        compiled = torch.compile(self.trainable_module, backend=backend, mode=mode, **compile_kwargs)
        self.trainable_module = compiled  # type: ignore[assignment]
        for teacher in self.teachers:
            teacher.compile(backend=backend, mode=mode, **compile_kwargs)
        return self.trainable_module

    def get_eval_model(
        self, module: nn.Module | None = None, ema: bool = False, predict: str = "class"
    ) -> Predictor | None:
        """The student, or its moving average, as a module that returns logits."""
        module = module if module is not None else self.get_trainable_module(ema=ema)
        return None if module is None else Predictor(module, predict)

    def get_checkpoint_state(self, ema: bool = False, unwrap_fn: Any = unwrap_model) -> dict[str, Any]:
        """The student's state under its own keys, and what training added under the reserved prefix."""
        module = self.get_trainable_module(ema=ema)
        if module is None:
            return {}
        return {"state_dict_ema" if ema else "state_dict": unwrap_fn(module).state_dict()}

    def load_checkpoint_state(
        self,
        state_dict: dict[str, Any],
        task_state: dict[str, Any] | None = None,
        ema: bool = False,
        strict: bool = True,
    ) -> None:
        """Load what `get_checkpoint_state` returned."""
        module = self.get_trainable_module(ema=ema)
        if module is None:
            raise RuntimeError("there is no moving average to load into; call setup_ema() first")
        unwrap_model(module).load_state_dict(state_dict, strict=strict)
