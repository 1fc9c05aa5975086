#!/usr/bin/env python3
"""Puts libtorch (and, for the Python peers, a virtual environment) into this checkout.

libtorch is what the wheel `torch` carries. Two facts of that wheel decide what is installed (readelf on torch 2.11.0):
libtorch_cpu.so itself needs libcudart and libcupti, so even a CPU set-up takes these two NVIDIA wheels; and its run
path is $ORIGIN/../../nvidia/cu13/lib, so `torch/` and `nvidia/` must lie side by side. libtorch_cuda.so needs all of
NVIDIA's libraries (some gigabytes); they are installed only where there is an NVIDIA driver, or with --cuda yes.

    .libtorch/torch  .libtorch/nvidia   the libraries; LIBTORCH is .libtorch/torch (.cargo/config.toml)
    .libtorch/.complete                 what is installed, name==version a line; written last
    .libtorch/wheels                    downloads that are not installed yet; gone when the set-up is complete
    .libtorch/staging                   where pip installs before anything is moved into place

pip downloads and unpacks, so that its index, proxy and certificate settings hold. Standard library only.
"""

import argparse
import contextlib
import errno
import fcntl
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HOME = ROOT / ".libtorch"
VENV = ROOT / ".venv"
REQUIREMENTS = ROOT / "tests" / "python" / "requirements.txt"

TORCH = ("torch", "2.11.0")
CPU = dict([TORCH, ("nvidia-cuda-runtime", "13.0.96"), ("nvidia-cuda-cupti", "13.0.85")])
# The rest of what torch 2.11.0 asks for, by way of cuda-toolkit 13.0.2, without triton and the Python bindings, which serve
# only Python.
CUDA = {
    "nvidia-cublas": "13.1.0.3", "nvidia-cuda-nvrtc": "13.0.88", "nvidia-cudnn-cu13": "9.19.0.56", "nvidia-cufft": "12.0.0.61",
    "nvidia-cufile": "1.15.1.6", "nvidia-curand": "10.4.0.35", "nvidia-cusolver": "12.0.4.66", "nvidia-cusparse": "12.6.3.3",
    "nvidia-cusparselt-cu13": "0.8.0", "nvidia-nccl-cu13": "2.28.9", "nvidia-nvjitlink": "13.0.88",
    "nvidia-nvshmem-cu13": "3.4.5", "nvidia-nvtx": "13.0.85",
}
# Disk that a set-up needs at its peak, downloads and libraries together, in GB, rounded up.
TORCH_GB, CUDA_GB = 4, 8
GLIBC = (2, 28)
# What building and running needs of the package torch.
KEPT = {"lib", "include", "share", "version.py"}


class Failure(Exception):
    """Something the user has to act on; the text says what and how."""


def say(text):
    print(f"setup: {text}", flush=True)


def machine():
    """The processor's name as wheels spell it; refuses platforms that have no wheel."""
    hint = f"\nhint: install libtorch {TORCH[1]} yourself and set LIBTORCH to its folder"
    name = platform.machine()
    if sys.platform != "linux" or name not in ("x86_64", "aarch64"):
        raise Failure(f"expected Linux on x86_64 or aarch64, found {sys.platform} on {name}{hint}")
    libc, version = platform.libc_ver()
    if libc != "glibc" or tuple(int(n) for n in re.findall(r"\d+", version)[:2]) < GLIBC:
        found = f"{libc or 'another C library'} {version}".rstrip()
        raise Failure(f"expected glibc {GLIBC[0]}.{GLIBC[1]} or newer, found {found}{hint}")
    return name


def has_driver():
    """Whether an NVIDIA driver runs on this machine."""
    if Path("/proc/driver/nvidia/version").exists():
        return True
    try:
        return subprocess.run(["nvidia-smi", "-L"], capture_output=True, timeout=60).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def installed():
    """What the marker says is in place, as {name: version}; empty when nothing whole is there."""
    if not all((HOME / "torch" / "lib" / lib).exists() for lib in ("libtorch_cpu.so", "libc10.so")):
        return {}
    marker = HOME / ".complete"
    return dict(line.split("==", 1) for line in marker.read_text().split() if "==" in line) if marker.exists() else {}


def check_given(folder):
    """LIBTORCH is set: only look whether it can work."""
    hint = "\nhint: unset LIBTORCH to let this set-up install the right one, or point it at a folder with lib/ and include/"
    if not (folder / "lib" / "libtorch_cpu.so").exists():
        raise Failure(f"LIBTORCH is {folder}, but there is no lib/libtorch_cpu.so in it{hint}")
    for name, pattern in (("version.py", r"__version__ = '([^'+]+)"), ("build-version", r"^([^+\s]+)")):
        with contextlib.suppress(OSError):
            match = re.search(pattern, (folder / name).read_text())
            if match and match[1] != TORCH[1]:
                raise Failure(f"expected libtorch {TORCH[1]}, found {match[1]} in LIBTORCH={folder}{hint}")
    say(f"LIBTORCH is set: taking libtorch from {folder}")


def require_space(needed_gb, folder):
    free = shutil.disk_usage(folder).free / 1e9
    if free < needed_gb:
        raise Failure(f"expected {needed_gb} GB of free disk space in {folder}, found {free:.1f} GB")


def pip(arguments, scratch, *options):
    """Runs pip, its temporary files in `scratch`, with its error output shown and kept; raises what it said where it fails."""
    command = [sys.executable, "-m", "pip", *options]
    if subprocess.run([*command, "--version"], capture_output=True).returncode:
        raise Failure(f"{sys.executable} has no pip 22.3 or newer\n"
                      "hint: install it (Debian: apt install python3-pip), or name another Python: make setup PYTHON=python3.12")
    # TMPDIR next to the target: /tmp is often a small RAM disk. The user's pip may be set to install elsewhere than it is told.
    settings = {"DISABLE_PIP_VERSION_CHECK": 1, "RESUME_RETRIES": 10, "USER": 0, "REQUIRE_VIRTUALENV": 0, "ROOT_USER_ACTION": "ignore"}
    environment = {**os.environ, "TMPDIR": str(scratch), **{f"PIP_{name}": str(value) for name, value in settings.items()}}
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    errors = []
    command += arguments
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=environment, encoding="utf-8", errors="replace") as process:
        for line in process.stderr:
            errors += [line.strip()] if line.strip() else []
            sys.stderr.write(line)
    shutil.rmtree(scratch, ignore_errors=True)
    if process.returncode:
        raise Failure(explain(errors))


def explain(errors):
    """Turns pip's last words into one message a user can act on."""
    text = "\n".join(errors).lower()
    said = f"pip said: {errors[-1] if errors else 'nothing'}"
    elsewhere = f"hint: wheels from elsewhere are taken from a folder: make setup WHEELS=DIR\n{said}"
    if "no space left" in text:
        return f"the disk is full\nhint: free some gigabytes and run it again\n{said}"
    if "invalid" in text or "badzipfile" in text or "bad crc" in text:
        return f"a wheel is damaged\nhint: run it again; a wheel of your own, fetch again\n{said}"
    # An index that answers lists versions; "none" is also what pip says when it gave up on an index in silence.
    if any(word in text for word in ("from versions: none", "connection", "timed out", "name resolution", "proxy", "ssl", "unreachable")):
        return f"no package index was reached\nhint: check the network and pip's settings\n{elsewhere}"
    if "no matching distribution" in text:
        return f"the package index lacks a package for {platform.machine()}\n{elsewhere}"
    return f"pip could not install\n{elsewhere}"


def local_wheel(name, version, arch):
    """The wheel that TORCH_WHEEL names, or a whole one of any Python version in WHEELS or among the downloads; None without."""
    given, folder = os.environ.get("TORCH_WHEEL"), os.environ.get("WHEELS")
    if name == TORCH[0] and given:
        if not zipfile.is_zipfile(given) or not Path(given).name.startswith(f"torch-{version}"):
            raise Failure(f"TORCH_WHEEL is {given}: expected a whole wheel torch-{version}-*.whl")
        return Path(given)
    if folder and not Path(folder).is_dir():
        raise Failure(f"WHEELS is {folder}: expected a folder of wheels")
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    for path in [*(sorted(Path(folder).glob(pattern)) if folder else []), *(HOME / "wheels").glob(pattern)]:
        if zipfile.is_zipfile(path) and path.name.endswith((f"{arch}.whl", "-any.whl")):
            return path
        say(f"{path.name} is not whole or not for {arch}, passing it by")
    return None


def stage(packages, arch, staging):
    """Installs what building and running needs of `packages` into the folder `staging`."""
    # pip takes each name literally: a wheel for glibc 2.17 is not found under 2.28.
    names = [f"manylinux_2_{minor}_{arch}" for minor in range(GLIBC[1], 16, -1)] + [f"manylinux2014_{arch}", f"linux_{arch}"]
    common = ["--no-deps", "--only-binary=:all:", "--implementation", "cp", *(f"--platform={name}" for name in names)]
    wheels, python = [], "3.12"
    for name, version in packages.items():
        if not local_wheel(name, version, arch):
            say(f"{name} {version}: downloading")
            arguments = ["download", "--dest", str(HOME / "wheels"), "--retries", "10", "--python-version", python]
            pip([*arguments, *common, f"{name}=={version}"], HOME / "tmp")
        wheels.append(local_wheel(name, version, arch))
    # The libraries do not depend on the Python version: any Python can install them, from a wheel for any other.
    for match in filter(None, (re.search(r"-cp(\d)(\d+)-", wheel.name) for wheel in wheels)):
        python = f"{match[1]}.{match[2]}"
    shutil.rmtree(staging, ignore_errors=True)
    arguments = ["install", "--target", str(staging), "--no-compile", "--no-index", "--python-version", python]
    try:
        pip([*arguments, *common, *map(str, wheels)], HOME / "tmp")
    except Failure:
        shutil.rmtree(HOME / "wheels", ignore_errors=True)
        raise
    unneeded = [path for path in staging.iterdir() if path.name not in ("torch", "nvidia", "torch.libs") and path.suffix != ".dist-info"]
    unneeded += [path for path in staging.glob("torch/*") if path.name not in KEPT]
    unneeded += [*staging.glob("torch/lib/libtorch_python*"), *staging.glob("torch/lib/libshm*")]
    unneeded += [*staging.glob("nvidia/*/include"), *staging.glob("nvidia/*/lib/*.a")]
    for path in unneeded:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def install(packages):
    """Installs what is missing of `packages`; can be stopped at any point and run again."""
    arch, there = machine(), installed()
    staging, marker = HOME / "staging", HOME / ".complete"
    missing = {name: version for name, version in packages.items() if there.get(name) != version}
    if not there or any(name in there for name in missing):
        missing, there = packages, {}  # another version, or files that were moved half-way: nothing of it is worth keeping
        for path in [marker, *(HOME / name for name in ("torch", "nvidia", "torch.libs")), *HOME.glob("*.dist-info")]:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    require_space(TORCH_GB * (TORCH[0] in missing) + CUDA_GB * any(name in CUDA for name in missing), HOME)
    stage(missing, arch, staging)
    # File by file: NVIDIA's wheels share folders.
    for source in [path for path in staging.rglob("*") if not path.is_dir()]:
        target = HOME / source.relative_to(staging)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(source, target)
    there = {**there, **missing}
    new = HOME / ".complete.new"
    new.write_text("".join(f"{name}=={version}\n" for name, version in sorted(there.items())))
    os.replace(new, marker)
    for scratch in (staging, HOME / "wheels"):
        shutil.rmtree(scratch, ignore_errors=True)
    if installed() != there:
        raise Failure(f"{HOME} is not whole after the set-up\nhint: remove that folder and run it again")


def set_up_libtorch(cuda):
    if os.environ.get("LIBTORCH"):
        check_given(Path(os.environ["LIBTORCH"]))
        return
    with_cuda = cuda == "yes" or (cuda == "auto" and has_driver())
    packages = {**CPU, **(CUDA if with_cuda else {})}
    if packages.items() <= installed().items():
        return
    HOME.mkdir(exist_ok=True)
    with open(HOME / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say("another set-up of this checkout is running, waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        if not packages.items() <= installed().items():
            kind = "CPU and CUDA" if with_cuda else "CPU" if cuda == "no" else "CPU (no NVIDIA driver was found)"
            say(f"installing libtorch {TORCH[1]} for {kind} into {HOME.name}/")
            install(packages)
            say("libtorch is ready")


def set_up_venv():
    """The Python peers of tests/python in .venv; done again when requirements.txt changes."""
    if not (3, 11) <= sys.version_info[:2] <= (3, 12):
        raise Failure(f"the Python peers expect Python 3.11 or 3.12, found {platform.python_version()}\n"
                      "hint: name another one: make test-python PYTHON=python3.12")
    stamp = f"{platform.python_version()} {hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()}\n"
    marker = VENV / ".complete"
    if marker.exists() and marker.read_text() == stamp:
        return
    require_space(10, ROOT)
    say(f"installing the Python peers into {VENV.name}/ (about 8 GB: in Python, torch is not imported without CUDA)")
    python = VENV / "bin" / "python"
    # Debian splits ensurepip off, so the pip that is here fills the environment.
    if not python.exists() and subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(VENV)]).returncode:
        raise Failure(f"cannot make a virtual environment in {VENV.name}/")
    marker.unlink(missing_ok=True)
    links = ["--find-links", os.environ["WHEELS"]] if os.environ.get("WHEELS") else []
    pip(["install", "--requirement", str(REQUIREMENTS), *links], VENV / "tmp", "--python", str(python))
    marker.write_text(stamp)
    say("the Python peers are ready")


def main():
    parser = argparse.ArgumentParser(description="Installs libtorch, or the Python peers, into this checkout.")
    parser.add_argument("what", nargs="?", choices=("libtorch", "venv", "has-driver"), default="libtorch")
    parser.add_argument("--cuda", choices=("auto", "yes", "no"), default=os.environ.get("HRA_CUDA") or "auto")
    arguments = parser.parse_args()
    if arguments.cuda not in ("auto", "yes", "no"):
        parser.error(f"HRA_CUDA is {arguments.cuda}: expected auto, yes or no")
    try:
        if arguments.what == "has-driver":
            return 0 if has_driver() else 1
        set_up_venv() if arguments.what == "venv" else set_up_libtorch(arguments.cuda)
        return 0
    except (Failure, OSError) as error:
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        print(f"setup: error: {error}" + "\nhint: free some gigabytes and run it again" * full, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nsetup: stopped; run it again to go on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
