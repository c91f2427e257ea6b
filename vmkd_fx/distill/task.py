"""The training task: timm's class, so that DDP, EMA, compile, checkpoints and a timm-style loop work as they
are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from timm.task import TrainingTask
from timm.utils.model import unwrap_model
from timm.utils.model_ema import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from vmkd_fx.distill.cache.teacher import CachedTeacher
from vmkd_fx.distill.methods import Batch, Method
from vmkd_fx.distill.teachers import Teacher
from vmkd_fx.errors import RecipeError
from vmkd_fx.graph.edit import LOGITS
from vmkd_fx.graph.receipt import PREFIX
from vmkd_fx.graph.share import unwrapped
from vmkd_fx.graph.traced import TracedModule
from vmkd_fx.graph.values import reference_tensor
from vmkd_fx.passes.heads.full_precision import in_full_precision
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

    Under autocast the student runs in half precision and every loss in float32.

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
        teachers: Iterable[Teacher | CachedTeacher],
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

    def forward(
        self, input: torch.Tensor, target: torch.Tensor, indices: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Losses for images (B, 3, H, W) and labels (B,), or soft labels (B, C) where the criterion takes
        them.

        `indices` (B,) says which samples these are; a cache of a teacher's outputs looks them up by it.

        Raises:
            RecipeError: a method has a schedule and `set_epoch` was never called.
            CacheError: a teacher's cache has nothing for these images in this epoch.
        """
        if self.epoch is None and (waiting := [m.name for m in self.methods if m.needs_epoch]):
            raise RecipeError(
                f"method {waiting[0]!r} changes with the epoch; call task.set_epoch(epoch) before each epoch"
            )
        outputs = self.trainable_module(input)
        outputs = outputs if isinstance(outputs, dict) else {LOGITS: outputs}
        found = [self._said(teacher, input, indices) for teacher in self.teachers] if self.methods else []
        return {"output": outputs[LOGITS], **self._losses(outputs, found, target)}

    def _said(
        self, teacher: nn.Module, input: torch.Tensor, indices: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """A teacher's outputs, from itself or from its cache."""
        return teacher(input, indices, self.epoch) if isinstance(teacher, CachedTeacher) else teacher(input)

    @in_full_precision
    def _losses(
        self,
        outputs: dict[str, torch.Tensor],
        teachers: list[dict[str, torch.Tensor]],
        target: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """The loss, and what it is made of."""
        class_loss = self.criterion(outputs[self.class_output], target)
        if not self.methods:
            return {"loss": class_loss, "class_loss": class_loss}
        batch = Batch(outputs, teachers, target, self.epoch, self.epochs)
        terms = [term for method in self.methods for term in method.terms(batch)]
        dist_loss = sum((term.weight * term.value for term in terms), torch.zeros_like(class_loss))
        loss = self.class_share * class_loss + dist_loss
        parts = {term.name: term.value for term in terms}
        return {"loss": loss, "class_loss": class_loss, "dist_loss": dist_loss, **parts}

    def prepare_distributed(self, device_ids: list[Any] | None = None, **ddp_kwargs: Any) -> DistillationTask:
        """Wrap the student in DistributedDataParallel; teachers stay as they are."""
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

    def setup_ema(
        self,
        decay: float = 0.9999,
        use_warmup: bool = False,
        device: torch.device | None = None,
        **kwargs: Any,
    ) -> nn.Module:
        """Average the student's weights from now on, whether it is wrapped or compiled by now or not."""
        average = ModelEmaV3(
            unwrapped(self.trainable_module), decay=decay, use_warmup=use_warmup, device=device, **kwargs
        )
        self.trainable_module_ema: nn.Module = average
        return average

    def get_clip_parameters(self, exclude_head: bool = False) -> list[nn.Parameter]:
        """What is clipped; `exclude_head` leaves out the student's last two parameters, as timm does, and
        nothing of what training added behind them.
        """
        named = list(unwrapped(self.trainable_module).named_parameters())
        own = [parameter for name, parameter in named if not _is_added(name)]
        added = [parameter for name, parameter in named if _is_added(name)]
        return (own[:-2] if exclude_head else own) + added

    def get_eval_model(
        self, module: nn.Module | None = None, ema: bool = False, predict: str = "class"
    ) -> nn.Module | None:
        """The student, or its moving average, as a module that returns logits.

        Outside of DistributedDataParallel: ranks may evaluate different numbers of batches.
        """
        if module is None and predict == "class" and ema and hasattr(self, "eval_model_ema"):
            return self.eval_model_ema
        module = module if module is not None else self.get_trainable_module(ema=ema)
        if isinstance(module, DistributedDataParallel):
            module = module.module
        return None if module is None else Predictor(module, predict)

    def get_task_state(
        self, module: nn.Module | None = None, ema: bool = False
    ) -> dict[str, dict[str, torch.Tensor]]:
        """The state of what training added to the student; empty where nothing was."""
        module = module if module is not None else self.get_trainable_module(ema=ema)
        if module is None:
            return {}
        added = {key: value for key, value in unwrapped(module).state_dict().items() if _is_added(key)}
        return {PREFIX: added} if added else {}

    def load_task_state(
        self,
        state: dict[str, dict[str, torch.Tensor]] | None,
        strict: bool = True,
        module: nn.Module | None = None,
        ema: bool = False,
    ) -> None:
        """Load what `get_task_state` returned; None and an empty state leave what is there."""
        if state:
            self._load(state.get(PREFIX, {}), strict, module, ema, added=True)

    def get_checkpoint_state(self, ema: bool = False, unwrap_fn: Any = unwrap_model) -> dict[str, Any]:
        """As timm has it: "state_dict" is the student's own and loads into timm's model; "task_state" holds
        what training added.
        """
        module = self.get_trainable_module(ema=ema)
        if module is None:
            return {}
        suffix = "_ema" if ema else ""
        own = {key: value for key, value in unwrap_fn(module).state_dict().items() if not _is_added(key)}
        added = self.get_task_state(ema=ema)
        return {f"state_dict{suffix}": own, **({f"task_state{suffix}": added} if added else {})}

    def load_checkpoint_state(
        self,
        state_dict: dict[str, Any],
        task_state: dict[str, Any] | None = None,
        ema: bool = False,
        strict: bool = True,
    ) -> None:
        """Load what `get_checkpoint_state` returned, or weights of the student alone.

        Raises:
            RuntimeError: there is no moving average, or keys differ and `strict` is set.
        """
        own = {key: value for key, value in state_dict.items() if not _is_added(key)}
        self._load(own, strict, None, ema, added=False)
        both = len(own) < len(state_dict)
        added = {PREFIX: {key: value for key, value in state_dict.items() if _is_added(key)}}
        self.load_task_state(added if both else task_state, strict, ema=ema)

    def _load(
        self, state: dict[str, torch.Tensor], strict: bool, module: nn.Module | None, ema: bool, added: bool
    ) -> None:
        """Load the half of the student's state that training added, or the other one."""
        module = module if module is not None else self.get_trainable_module(ema=ema)
        if module is None:
            raise RuntimeError("there is no moving average to load into; call setup_ema() first")
        module = unwrapped(module)
        rest = {key: value for key, value in module.state_dict().items() if _is_added(key) is not added}
        module.load_state_dict({**rest, **state}, strict=strict)


def _is_added(key: str) -> bool:
    """Whether training added what stands under this key of the student's state."""
    return key.startswith(f"{PREFIX}.")
