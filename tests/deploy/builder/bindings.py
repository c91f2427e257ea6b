"""Reads the names in the bindings of either package, which install without the libraries that they call.

    python -m tests.deploy.builder.bindings FOLDER...

A folder holds `tensorrt_bindings` or `tensorrt_rtx_bindings`: an unpacked wheel such as
`tensorrt_cu13_bindings`, or site-packages. The few functions that the bindings import
from the missing libraries get stand-ins that return nothing: enough to import the module and look at its
classes, and not to build.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

OURS = ("libnvinfer", "libnvonnxparser", "libtensorrt")

READ = """
import importlib, json, sys
trt = importlib.import_module(sys.argv[1])
owners = {"": trt, **{name: getattr(trt, name) for name in dir(trt) if isinstance(getattr(trt, name), type)}}
names = {name: [item for item in dir(owner) if not item.startswith("__")] for name, owner in owners.items()}
print(json.dumps({"version": trt.__version__, "names": names}))
"""


def can_read() -> bool:
    """Whether this machine has what is needed to make the stand-ins."""
    return sys.platform == "linux" and all(map(shutil.which, ("cc", "readelf")))


def read(folder: Path) -> tuple[str, dict[str, list[str]]]:
    """The version of the bindings in `folder`, and the names of each class; "" is the module."""
    library = next(folder.glob("tensorrt*_bindings/tensorrt*.so"))
    with tempfile.TemporaryDirectory() as name:
        stand_ins = Path(name)
        _make_stand_ins(library, stand_ins)
        environment = {**os.environ, "LD_LIBRARY_PATH": str(stand_ins), "PYTHONPATH": str(folder)}
        done = subprocess.run(
            [sys.executable, "-c", READ, library.parent.name],
            capture_output=True,
            text=True,
            check=True,
            env=environment,
        )
    found = json.loads(done.stdout)
    return found["version"], found["names"]


def _make_stand_ins(library: Path, folder: Path) -> None:
    headers = subprocess.run(
        ["readelf", "-dW", "--dyn-syms", library], capture_output=True, text=True, check=True
    )
    needed = [name for name in re.findall(r"NEEDED.*\[(.*)\]", headers.stdout) if name.startswith(OURS)]
    called = set(
        re.findall(r"UND ((?:create|get|init)(?:Nv|Infer|Builder|Plugin|Lib)\w*)$", headers.stdout, re.M)
    )
    source = folder / "stand_ins.c"
    for index, name in enumerate(needed):
        functions = (f"void *{function}(void) {{ return 0; }}\n" for function in sorted(called))
        source.write_text("".join(functions) if index == 0 else f"int unused_{index};\n")
        subprocess.run(
            ["cc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", folder / name, source], check=True
        )


if __name__ == "__main__":
    from tests.deploy.builder.test_names import absent

    for argument in sys.argv[1:]:
        version, names = read(Path(argument))
        kind = "tensorrt-rtx" if list(Path(argument).glob("tensorrt_rtx_bindings")) else "tensorrt"
        print(f"{kind} {version}: {', '.join(absent(kind, version, names)) or 'has every name'}")
