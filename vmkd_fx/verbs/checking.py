"""The verbs that look at a bundle again: `verify` and `bench`."""

from __future__ import annotations

import argparse
from typing import Any

from vmkd_fx.errors import RecipeError
from vmkd_fx.verbs.given import named_or_restored


def verify(parsed: argparse.Namespace) -> None:
    from vmkd_fx.deploy.verify import examine, sign_off

    model = _made_of(parsed)
    found = examine(parsed.bundle, model=model, images=parsed.images, predict=parsed.predict)
    print(found)
    if parsed.no_sign:
        found.check()
        return
    manifest = sign_off(found).manifest
    assert manifest.verified is not None
    left = [name for name in manifest.files if name not in manifest.verified.files]
    print(f"signed: {', '.join(manifest.verified.files)}" + (f"; not yet: {', '.join(left)}" if left else ""))


def bench(parsed: argparse.Namespace) -> None:
    from vmkd_fx.deploy.bench import Settings, bench
    from vmkd_fx.deploy.bench_plot import plot
    from vmkd_fx.picture import check_picture

    if parsed.plot:
        check_picture(parsed.plot)
    given = {} if parsed.threads is None else {"threads": parsed.threads}
    settings = Settings(parsed.batch, parsed.runs, parsed.seconds, memory=not parsed.no_memory, **given)
    found = bench(
        parsed.bundle,
        against=parsed.against,
        model=_made_of(parsed),
        settings=settings,
        device=parsed.device,
        predict=parsed.predict,
    )
    print(found)
    if parsed.out:
        found.write(parsed.out)
    if parsed.plot:
        plot(found, parsed.plot)


def _made_of(parsed: argparse.Namespace) -> Any:
    """The model that a bundle was made of, where it is named."""
    from vmkd_fx.extras import require

    if parsed.source is None:
        if parsed.model or parsed.option or parsed.input_size:
            raise RecipeError("--model, --option and --input-size belong to a MODEL_OR_CHECKPOINT: name it")
        return None
    require("timm", "train", "running the model that a bundle was made of")
    return named_or_restored(parsed)
