"""What a cache holds and takes, in a line or two."""

from __future__ import annotations

from vmkd_fx.distill.cache.folder import CacheFolder
from vmkd_fx.distill.cache.form import Form
from vmkd_fx.distill.methods import Method, resolve
from vmkd_fx.distill.recipe import Recipe

TINYVIT_BYTES = 404
"""Bytes an image and epoch of TinyViT's cache (Wu et al., 2022, by their code): a seed of 4 bytes, and 2 + 2
for each of 100 classes.
"""


def report(folder: CacheFolder) -> str:
    """What is kept, how much of it is there, and its bytes beside those of TinyViT's cache."""
    manifest = folder.manifest
    form, count = manifest.form, manifest.count
    kept = f"all {form.classes}" if form.top_k is None else f"the top {form.top_k} of {form.classes}"
    features = f" and {', '.join(form.features)}" if form.features else ""
    files = sorted(folder.path.glob("epoch-*/*.safetensors"))
    epochs = len({file.parent for file in files})
    held = sum(file.stat().st_size for file in files)
    return (
        f"{folder.path}: {epochs} epochs of {count} images, {kept} classes{features} in {form.dtype}\n"
        f"  {form.bytes_per_image} bytes an image and epoch, {readable(held)} in all; TinyViT's cache has "
        f"{TINYVIT_BYTES} (top 100 in float16; 499 GB for 90 epochs of ImageNet-22k)"
    )


def advice(folder: CacheFolder, recipe: Recipe) -> str | None:
    """A warning where a method softens distributions of which the cache keeps the top alone.

    At a temperature above 1 the tail weighs more than in the distribution itself, and there it is flat.
    """
    form = folder.manifest.form
    methods = [resolve(method.preset, method.overrides) for method in recipe.method]
    warmest, name = max(((_temperature(method), method.name) for method in methods), default=(1.0, ""))
    if form.top_k is None or warmest <= 1:
        return None
    whole = Form(form.classes, None, form.dtype, form.features)
    return (
        f"{folder.path}: {name} softens at temperature {warmest}, where classes "
        f"beyond the top {form.top_k} count for more than their even share; --full keeps all of them in "
        f"{whole.bytes_per_image} bytes an image and epoch"
    )


def _temperature(method: Method) -> float:
    """The highest that a method softens distributions at; CiT has one for each teacher."""
    return max((getattr(method, "temperature", 1.0), *getattr(method, "temperatures", ())))


def readable(count: float) -> str:
    """Bytes as people write them, in powers of 1000."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
