"""How a teacher's outputs lie in a row of a cache, and how they come back.

- whole, float32: the logits themselves, bit for bit.
- whole, float16: log p = z - logsumexp(z) in half precision and logsumexp(z) in single. The surer a class,
  the smaller |log p| and the finer its rounding: |error of log p| <= 2^-11 |log p|.
- top-k: log p of the k most likely classes in the same way, which classes, and `rest`, the logarithm of the
  mean probability of the others: what they have together is spread evenly over them (as in FKD, Shen and
  Xing, 2022, and TinyViT, Wu et al., 2022).

Logits come back with their own offset, so that losses which look at them before the softmax see them too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vmkd_fx.distill.methods import Wanted
from vmkd_fx.errors import CacheError, RecipeError, UnknownNameError
from vmkd_fx.graph.edit import LOGITS

Columns = dict[str, NDArray[Any]]

DTYPES = ("float16", "float32")
INDEX, SKETCH, OFFSET, REST, VALUES, CLASSES = "index", "sketch", "offset", "rest", "values", "classes"
_FEATURE = "feature:"


@dataclass(frozen=True)
class Feature:
    """A tapped feature: how it was read, and its patch tokens and channels (N, C)."""

    wanted: Wanted
    shape: tuple[int, int]


@dataclass(frozen=True)
class Form:
    """What a row holds.

    Attributes:
        classes: length of the logits.
        top_k: how many of them are kept; None: all.
        dtype: of log-probabilities and features, "float16" or "float32".
        features: by name.
    """

    classes: int
    top_k: int | None = None
    dtype: str = "float16"
    features: Mapping[str, Feature] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UnknownNameError("dtype", self.dtype, DTYPES, where="cache")
        if self.top_k is not None and not 0 < self.top_k < self.classes:
            raise RecipeError(
                f"top_k is {self.top_k} and the teacher knows {self.classes} classes; keep 1 to "
                f"{self.classes - 1} of them, or all"
            )

    @property
    def columns(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """NumPy's name of the type, and the shape of one row, by column."""
        found: dict[str, tuple[str, tuple[int, ...]]] = {INDEX: ("int32", ()), SKETCH: ("float32", ())}
        if self.top_k is not None:
            number = "uint16" if self.classes <= 1 << 16 else "uint32"
            found |= {VALUES: (self.dtype, (self.top_k,)), CLASSES: (number, (self.top_k,))}
            found |= {REST: ("float32", ()), OFFSET: ("float32", ())}
        else:
            found[LOGITS] = (self.dtype, (self.classes,))
            found |= {} if self.dtype == "float32" else {OFFSET: ("float32", ())}
        return found | {_FEATURE + name: (self.dtype, one.shape) for name, one in self.features.items()}

    @property
    def bytes_per_image(self) -> int:
        """Of one image in one epoch."""
        return sum(np.dtype(kind).itemsize * math.prod(shape) for kind, shape in self.columns.values())

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries and lists."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Form:
        """The inverse of `to_json`."""
        features = {
            name: Feature(_wanted(one["wanted"]), tuple(one["shape"]))
            for name, one in data["features"].items()
        }
        return cls(data["classes"], data["top_k"], data["dtype"], features)

    def encode(self, outputs: Mapping[str, Tensor]) -> Columns:
        """The columns, but `index` and `sketch`, of a teacher's outputs for B images.

        Raises:
            CacheError: an output is not finite.
        """
        if bad := [name for name, value in outputs.items() if not bool(value.isfinite().all())]:
            raise CacheError(f"the teacher's {bad[0]} hold values that are not finite; this cannot be learnt")
        columns = self._encoded(outputs[LOGITS].detach().cpu())
        for name in self.features:
            columns[_FEATURE + name] = _numbers(outputs[name].detach().cpu(), self.dtype)
        return columns

    def _encoded(self, logits: Tensor) -> Columns:
        if self.top_k is None and self.dtype == "float32":
            return {LOGITS: logits.float().numpy()}
        wide = logits.double()
        offset = wide.logsumexp(-1)
        log_p = wide - offset[:, None]
        if self.top_k is None:
            return {LOGITS: _numbers(log_p, self.dtype), OFFSET: _numbers(offset, "float32")}
        values, classes = log_p.topk(self.top_k, dim=-1)
        left = log_p.scatter(-1, classes, -math.inf).logsumexp(-1) - math.log(self.classes - self.top_k)
        return {
            VALUES: _numbers(values, self.dtype),
            CLASSES: classes.numpy().astype(self.columns[CLASSES][0]),
            REST: _numbers(left, "float32"),
            OFFSET: _numbers(offset, "float32"),
        }

    def decode(self, columns: Columns, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """A teacher's outputs of what `encode` gave: "logits" (B, C) and features (B, N, C)."""

        def there(name: str) -> Tensor:
            return torch.from_numpy(columns[name]).to(device, dtype)

        if self.top_k is None:
            logits = there(LOGITS) + there(OFFSET)[:, None] if OFFSET in columns else there(LOGITS)
        else:
            chosen = torch.from_numpy(columns[CLASSES].astype(np.int64)).to(device)
            log_p = there(REST)[:, None].repeat(1, self.classes).scatter_(1, chosen, there(VALUES))
            logits = log_p + there(OFFSET)[:, None]
        return {LOGITS: logits} | {name: there(_FEATURE + name) for name in self.features}


def _numbers(values: Tensor, dtype: str) -> NDArray[Any]:
    """`values` in that type; what is too large for it as its largest."""
    kind = getattr(torch, dtype)
    bound = torch.finfo(kind)
    return values.clamp(bound.min, bound.max).to(kind).numpy()


def _wanted(data: Mapping[str, Any]) -> Wanted:
    plain: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in data.items()
    }
    return Wanted(**plain)
