"""Where everything is on this machine: the program, libtorch, the Python halves, the bundle."""

import json
import lzma
import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

# No TF32 in cuDNN and cuBLAS, so that what differs from the CPU is the order of sums.
FULL_F32 = {"NVIDIA_TF32_OVERRIDE": "0", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "0"}
# Drawing needs all but the last.
PEERS = ("torch", "diffusers", "transformers", "peft")
COUNTER = "libsync_counter.so"
COUNTER_FLAGS = ["-O2", "-shared", "-fPIC"]


class Machine:
    """What parts are run with."""

    def __init__(self, options, scratch):
        self.dry = options.dry_run
        self.device = "cpu" if self.dry else "cuda"
        self.scratch = scratch
        own_root = pathlib.Path(__file__).resolve().parents[2]
        self.root = pathlib.Path(os.environ.get("HRA_ROOT") or own_root).resolve()
        self.python = options.python or sys.executable
        self.program = pathlib.Path(os.environ.get("HRA_BIN") or self.root / "target/release/hra").absolute()
        self.tests = os.environ.get("HRA_CUDA_TESTS")
        self.counter = None
        self.site = None
        if options.bundle:
            self.unpack(pathlib.Path(options.bundle))
        if not self.dry and not self.counter:
            self.counter = compiled_counter(scratch)
        self.torch, self.missing = look_for_peers(self.python, self.python_environ())
        self.libtorch = self.find_libtorch()

    def unpack(self, bundle):
        """The bundle's programs and wheels into the scratch folder; the standard library alone, since xz may be missing."""
        if not bundle.is_dir():
            sys.exit(f"gpu_check: --bundle: expected a folder, found none at {bundle}")
        for packed in sorted(bundle.glob("*.xz")):
            program = self.scratch / packed.stem
            with lzma.open(packed) as source, open(program, "wb") as target:
                while block := source.read(1 << 20):
                    target.write(block)
            program.chmod(0o755)
        if (self.scratch / "hra").exists():
            self.program = self.scratch / "hra"
        if (self.scratch / "cuda_tests").exists():
            self.tests = str(self.scratch / "cuda_tests")
        if (bundle / COUNTER).exists():
            self.counter = (bundle / COUNTER).absolute()
        for wheel in sorted((bundle / "wheels").glob("*.whl")):
            # They hold Python alone, and such a wheel is what pip would put there.
            self.site = self.scratch / "site"
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(self.site)

    def find_libtorch(self):
        own = self.root / ".libtorch/torch/lib"
        given = os.environ.get("LIBTORCH")
        if own.is_dir():
            return own
        return pathlib.Path(given).absolute() / "lib" if given else self.torch and pathlib.Path(self.torch) / "lib"

    def test_binary(self):
        """The built tests/cuda.rs, or None."""
        if self.tests:
            return pathlib.Path(self.tests).absolute()
        built = self.root.glob("target/debug/deps/cuda-*")
        built = [path for path in built if path.is_file() and not path.suffix and os.access(path, os.X_OK)]
        return max(built, key=lambda path: path.stat().st_mtime, default=None)

    def environ(self, full_f32=True, **more):
        """The environment of the program. One thread for each process: several run at a time."""
        environ = dict(os.environ, OMP_NUM_THREADS="1", **more)
        if self.libtorch:
            environ["LD_LIBRARY_PATH"] = ":".join(filter(None, [str(self.libtorch), os.environ.get("LD_LIBRARY_PATH")]))
        for name, value in FULL_F32.items():
            environ.pop(name, None)
            if full_f32:
                environ[name] = value
        return environ

    def python_environ(self, **more):
        """The environment of the Python halves; nothing is fetched from a network."""
        environ = dict(os.environ, HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", **more)
        for name in FULL_F32:
            environ.pop(name, None)
        paths = [str(self.site) if self.site else None, os.environ.get("PYTHONPATH")]
        environ["PYTHONPATH"] = ":".join(filter(None, paths))
        return environ


def compiled_counter(folder):
    """The counter, where the bundle has none and there is a compiler; else None."""
    compiler = shutil.which("cc")
    target = folder / COUNTER
    source = pathlib.Path(__file__).with_name("sync_counter.c")
    if compiler and subprocess.run([compiler, *COUNTER_FLAGS, "-o", str(target), str(source), "-ldl"]).returncode == 0:
        return target
    return None


def look_for_peers(python, environ):
    """The folder of that Python's torch, without importing it, and which of the libraries are missing."""
    script = (
        "import importlib.util, json\n"
        f"specs = {{name: importlib.util.find_spec(name) for name in {PEERS!r}}}\n"
        "torch = specs['torch']\n"
        "print(json.dumps([torch and torch.submodule_search_locations[0], [n for n, s in specs.items() if not s]]))"
    )
    try:
        found = subprocess.run([python, "-c", script], env=environ, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                               timeout=60)
        folder, missing = json.loads(found.stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None, list(PEERS)
    return folder, missing
