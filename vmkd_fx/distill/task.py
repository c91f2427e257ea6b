"""The training task: timm's class, so that DDP, EMA, compile, checkpoints and a timm-style loop work as they
are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from timm.task import TrainingTask
from timm.utils.model import unwrap_model
from torch import nn

from vmkd_fx.distill.methods import Batch, Method
from vmkd_fx.distill.teachers import Teacher
from vmkd_fx.errors import RecipeError
from vmkd_fx.graph.edit import LOGITS
from vmkd_fx.graph.traced import TracedModule
from vmkd_fx.graph.values import reference_tensor
from vmkd_fx.passes.prediction import predicted


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
    """A student that learns from labels and teachers: the class loss, weighted, and every method's terms.

    `task(images, targets)` returns `loss`, `output` (the class logits), `class_loss`, `dist_loss` (the sum of
    the weighted terms) and each term before its weight, `<method>/<term>`. Make one with `vmkd_fx.wrap`.

    Args:
        student: the traced student with whatever the methods inject.
        teachers: modules that map the student's images to their outputs.
        methods: the terms of the loss.
        criterion: the loss to the labels; cross-entropy by default.
        epochs: how long the training will be, where that is known.
    """

    def __init__(
        self,
        student: TracedModule,
        teachers: Iterable[Teacher],
        methods: Sequence[Method] = (),
        criterion: nn.Module | None = None,
        epochs: int | None = None,
    ) -> None:
        reference = reference_tensor(student)
        super().__init__(device=reference.device, dtype=reference.dtype, verbose=False)
        self.trainable_module: nn.Module = student
        self.teachers = nn.ModuleList(teachers)
        self.methods = tuple(methods)
        self.criterion = criterion or nn.CrossEntropyLoss()
        self.class_share = min((method.class_share for method in methods), default=1.0)
        self.class_output = next((m.class_output for m in methods if m.class_output != LOGITS), LOGITS)
        self.epoch: int | None = None
        self.epochs = epochs

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch runs, from 0; methods with a schedule need it before its first step."""
        self.epoch = epoch

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
        """Losses for images (B, 3, H, W) and labels (B,), or soft labels (B, C) where the criterion takes
        them.

        Raises:
            RecipeError: a method has a schedule and `set_epoch` was never called.
        """
        if self.epoch is None and (waiting := [m.name for m in self.methods if m.needs_epoch]):
            raise RecipeError(
                f"method {waiting[0]!r} changes with the epoch; call task.set_epoch(epoch) before each epoch"
            )
        outputs = self.trainable_module(input)
        outputs = outputs if isinstance(outputs, dict) else {LOGITS: outputs}
        class_loss = self.criterion(outputs[self.class_output], target)
        found = {"output": outputs[LOGITS], "class_loss": class_loss}
        if not self.methods:
            return {"loss": class_loss, **found}
        batch = Batch(outputs, [teacher(input) for teacher in self.teachers], target, self.epoch, self.epochs)
        terms = [term for method in self.methods for term in method.terms(batch)]
        dist_loss = sum((term.weight * term.value for term in terms), torch.zeros_like(class_loss))
        loss = self.class_share * class_loss + dist_loss
        return {"loss": loss, **found, "dist_loss": dist_loss, **{term.name: term.value for term in terms}}

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
