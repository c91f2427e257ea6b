"""From the start of a process to the first classified picture, where nothing but the edge side is installed.

    python benchmarks/edge_start.py [--model efficientnet_b0] [--bundle DIR_OR_FILE] [--runs 9]

It makes a bundle of a timm model, a fresh virtual environment with numpy, pillow, onnxruntime and vmkd-fx
without its dependencies, and runs there. Times are medians of processes whose files are in the page cache;
"processor" is what the process computed, and what a busy machine leaves as it is.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

from vmkd_fx.table import table

ROOT = Path(__file__).parent.parent
PACKAGES = ("numpy", "pillow", "onnxruntime")

# Run there: each stage's wall and processor time, from the start of the process on.
STAGES = """
import json, sys, time
rows = [("interpreter", 0.0, time.process_time())]
last = (time.perf_counter(), time.process_time())
def done(stage):
    global last
    now = (time.perf_counter(), time.process_time())
    rows.append((stage, now[0] - last[0], now[1] - last[1]))
    last = now
import numpy, PIL.Image
done("import numpy, pillow")
import vmkd_fx.deploy.runtime
done("import vmkd_fx.deploy.runtime")
import onnxruntime
done("import onnxruntime")
run = vmkd_fx.deploy.runtime.load(sys.argv[1])
done("check and load the bundle")
answer = run.classify([sys.argv[2]], top=1)
done("first picture")
heavy = sorted({"torch", "timm", "onnx"} & set(sys.modules))
run.classify([sys.argv[2]], top=1)
done("second picture")
print(json.dumps({"rows": rows, "heavy": heavy, "backend": run.backend, "answer": answer[0][0][0]}))
"""
PLAIN = "import sys, vmkd_fx; print(vmkd_fx.load(sys.argv[1]).classify([sys.argv[2]], top=1)[0][0][0])"
IMPORT = "import vmkd_fx.deploy.runtime"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="efficientnet_b0", help="timm model (default: efficientnet_b0, 5.3 M)"
    )
    parser.add_argument("--bundle", type=Path, help="use this bundle instead of making one")
    parser.add_argument("--environment", type=Path, help="use this virtual environment, or make it there")
    parser.add_argument("--runs", type=int, default=9)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bundle = arguments.bundle or deployed(arguments.model, Path(folder) / "model.vmkd")
        python = environment(arguments.environment or Path(folder) / "venv")
        picture = Path(folder) / "picture.jpg"
        draw(picture)
        print(measured(python, bundle, picture, arguments.runs))


def deployed(model: str, path: Path) -> Path:
    import timm

    import vmkd_fx as vx

    return vx.deploy(timm.create_model(model).eval(), path)


def environment(path: Path) -> Path:
    """The interpreter of a virtual environment that holds the edge side and nothing else."""
    python = path / "bin" / "python"
    if not python.exists():
        print(f"installing {', '.join(PACKAGES)} into {path} ...", file=sys.stderr)
        venv.create(path, with_pip=True)
        install = (python, "-m", "pip", "install", "--quiet")
        subprocess.run([*install, *PACKAGES], check=True)
        with tempfile.TemporaryDirectory() as copy:  # building a package leaves files beside its sources
            source = Path(copy) / "source"
            ignored = shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__", "*-out", "shared")
            shutil.copytree(ROOT, source, ignore=ignored)
            subprocess.run([*install, "--no-deps", source], check=True)
    return python


def draw(path: Path) -> None:
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def measured(python: Path, bundle: Path, picture: Path, runs: int) -> str:
    ask(python, STAGES, bundle, picture)  # fills the page cache and compiles to bytecode
    stages = [json.loads(ask(python, STAGES, bundle, picture)[0]) for _ in range(runs)]
    if any(stage["heavy"] for stage in stages):
        raise SystemExit(f"the environment is not what it should be: {stages[0]['heavy']} were imported")
    rows = []
    for index, (name, _, _) in enumerate(stages[0]["rows"]):
        walls, processors = zip(*(stage["rows"][index][1:] for stage in stages), strict=True)
        rows.append((name, milliseconds(walls) if index else None, milliseconds(processors)))
    for name, code in (
        ("process start to end, first picture", PLAIN),
        ("process start to end, import alone", IMPORT),
    ):
        walls, processors = zip(*(ask(python, code, bundle, picture)[1:] for _ in range(runs)), strict=True)
        rows.append((name, milliseconds(walls), milliseconds(processors)))
    header = ("stage", "wall ms", "processor ms")
    return "\n".join(
        (
            f"{bundle.name} on {stages[0]['backend']}, {os.cpu_count()} cores, median of {runs} processes, "
            f"load {os.getloadavg()[0]:.1f}",
            table(header, rows, right=header[1:]),
        )
    )


def ask(python: Path, code: str, *arguments: Path) -> tuple[str, float, float]:
    """What a process prints, and how long it took: on the clock, and on the processor."""
    before, start = os.times(), time.perf_counter()
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    command = [python, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=clean, cwd=python.parent)
    wall, after = time.perf_counter() - start, os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return done.stdout, wall, used


def milliseconds(seconds: tuple[float, ...]) -> str:
    return f"{1000 * statistics.median(seconds):.0f}"


if __name__ == "__main__":
    main()
