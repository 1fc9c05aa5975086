#!/usr/bin/env python3
"""Puts libtorch (and, for the Python peers, a virtual environment) into this checkout.

libtorch is what the wheel `torch` carries. Two facts of that wheel decide what is installed (readelf on torch 2.11.0):
libtorch_cpu.so itself needs libcudart and libcupti, so even a CPU set-up takes these two NVIDIA wheels; and its run
path is $ORIGIN/../../nvidia/cu13/lib, so `torch/` and `nvidia/` must lie side by side. libtorch_cuda.so needs all of
NVIDIA's libraries (some gigabytes); they are installed only where there is an NVIDIA driver, or with --cuda yes.

    .libtorch/torch  .libtorch/nvidia   the libraries; LIBTORCH is .libtorch/torch (.cargo/config.toml)
    .libtorch/.complete                 what is installed, name==version a line; written last
    .libtorch/wheels                    wheels that are not yet unpacked; gone when the set-up is complete
    .libtorch/staging                   where wheels are unpacked before anything is moved into place

Downloads go through pip, so that its index, proxy and certificate settings hold. Standard library only.
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
import time
import zipfile
import zlib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HOME = ROOT / ".libtorch"
VENV = ROOT / ".venv"
REQUIREMENTS = ROOT / "tests" / "python" / "requirements.txt"

TORCH = ("torch", "2.11.0")
CPU = [TORCH, ("nvidia-cuda-runtime", "13.0.96"), ("nvidia-cuda-cupti", "13.0.85")]
# The rest of what torch 2.11.0 asks for, by way of cuda-toolkit 13.0.2, without triton and the Python bindings,
# which serve only Python.
CUDA = [
    ("nvidia-cublas", "13.1.0.3"),
    ("nvidia-cuda-nvrtc", "13.0.88"),
    ("nvidia-cudnn-cu13", "9.19.0.56"),
    ("nvidia-cufft", "12.0.0.61"),
    ("nvidia-cufile", "1.15.1.6"),
    ("nvidia-curand", "10.4.0.35"),
    ("nvidia-cusolver", "12.0.4.66"),
    ("nvidia-cusparse", "12.6.3.3"),
    ("nvidia-cusparselt-cu13", "0.8.0"),
    ("nvidia-nccl-cu13", "2.28.9"),
    ("nvidia-nvjitlink", "13.0.88"),
    ("nvidia-nvshmem-cu13", "3.4.5"),
    ("nvidia-nvtx", "13.0.85"),
]
# Disk that a set-up needs at its peak, wheels and unpacked libraries together, in GB, rounded up.
TORCH_GB, CUDA_GB = 2, 6
ATTEMPTS = 3
GLIBC = (2, 28)


class Failure(Exception):
    """Something the user has to act on; the text says what and how."""


def say(text):
    print(f"setup: {text}", flush=True)


def machine():
    """The processor's name as wheels spell it; refuses platforms that have no wheel."""
    name = platform.machine()
    if sys.platform != "linux" or name not in ("x86_64", "aarch64"):
        raise Failure(
            f"expected Linux on x86_64 or aarch64, found {sys.platform} on {name}\n"
            f"hint: install libtorch {TORCH[1]} yourself and set LIBTORCH to its folder"
        )
    libc, version = platform.libc_ver()
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
    if libc != "glibc" or numbers < GLIBC:
        raise Failure(
            f"expected glibc {GLIBC[0]}.{GLIBC[1]} or newer, found {libc or 'another C library'} {version}".rstrip()
            + f"\nhint: install libtorch {TORCH[1]} yourself and set LIBTORCH to its folder"
        )
    return name


def has_driver():
    """Whether an NVIDIA driver runs on this machine."""
    if Path("/proc/driver/nvidia/version").exists():
        return True
    try:
        run = subprocess.run(["nvidia-smi", "-L"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=60)
        return run.returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def installed():
    """What the marker says is in place, as {name: version}; empty when nothing whole is there."""
    try:
        lines = (HOME / ".complete").read_text().split()
    except OSError:
        return {}
    found = dict(line.split("==", 1) for line in lines if "==" in line)
    here = all((HOME / "torch" / "lib" / lib).exists() for lib in ("libtorch_cpu.so", "libc10.so"))
    return found if here else {}


def check_given(folder):
    """LIBTORCH is set: only look whether it can work."""
    folder = Path(folder)
    if not (folder / "lib" / "libtorch_cpu.so").exists():
        raise Failure(
            f"LIBTORCH is {folder}, but there is no lib/libtorch_cpu.so in it\n"
            "hint: unset LIBTORCH to let this set-up install libtorch, or point it at a folder with lib/ and include/"
        )
    version = None
    for name, pattern in (("version.py", r"__version__ = '([^'+]+)"), ("build-version", r"^([^+\s]+)")):
        with contextlib.suppress(OSError):
            match = re.search(pattern, (folder / name).read_text())
            version = match.group(1) if match else version
    if version is not None and version != TORCH[1]:
        raise Failure(
            f"expected libtorch {TORCH[1]}, found {version} in LIBTORCH={folder}\n"
            "hint: unset LIBTORCH to let this set-up install the right one"
        )
    say(f"LIBTORCH is set: taking libtorch from {folder}")


@contextlib.contextmanager
def lock():
    """One set-up of this checkout at a time."""
    with open(HOME / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say("another set-up of this checkout is running, waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def require_space(needed_gb, folder):
    free = shutil.disk_usage(folder).free / 1e9
    if free < needed_gb:
        raise Failure(f"expected {needed_gb} GB of free disk space in {folder}, found {free:.1f} GB")


def pip(arguments, scratch, python=None):
    """Runs pip with its error output shown and kept; returns (exit status, error output)."""
    command = [sys.executable, "-m", "pip"]
    if python is not None:
        command += ["--python", str(python)]
    # Next to the target, since /tmp is often a small RAM disk and a wheel is half a gigabyte.
    environment = dict(os.environ, TMPDIR=str(scratch), PIP_DISABLE_PIP_VERSION_CHECK="1")
    try:
        process = subprocess.Popen(
            command + arguments, stderr=subprocess.PIPE, env=environment, encoding="utf-8", errors="replace"
        )
    except OSError as error:
        raise Failure(f"cannot run {command[0]}: {error}") from error
    errors = []
    with process:
        for line in process.stderr:
            errors.append(line)
            sys.stderr.write(line)
    return process.returncode, "".join(errors)


def pip_version():
    run = subprocess.run([sys.executable, "-m", "pip", "--version"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    match = re.match(rb"pip (\d+)\.(\d+)", run.stdout)
    if run.returncode != 0 or not match:
        raise Failure(
            f"{sys.executable} has no pip\n"
            "hint: install it (Debian: apt install python3-pip), or name another Python: make setup PYTHON=python3.12"
        )
    return int(match.group(1)), int(match.group(2))


def explain(name, version, errors):
    """Turns pip's last words into one message a user can act on."""
    text = errors.lower()
    hint = f"hint: wheels from elsewhere are taken from a folder: make setup WHEELS=DIR\n{last_line(errors)}"
    if "no space left" in text:
        return f"the disk is full while {name} {version} was downloaded\nhint: free some gigabytes and run it again"
    # An index that answers lists versions; "none" is also what pip says when it gave up on an index in silence.
    network = ("from versions: none", "connection", "timed out", "name resolution", "proxy", "ssl", "unreachable")
    if any(word in text for word in network):
        return f"no package index was reached for {name} {version}\nhint: check the network and pip's settings\n{hint}"
    if "no matching distribution" in text:
        return f"the package index has no {name} {version} for {platform.machine()}\n{hint}"
    return f"pip could not download {name} {version}\n{hint}"


def last_line(errors):
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    return f"pip said: {lines[-1]}" if lines else "pip said nothing"


def wheel_in(folder, name, version, arch):
    """A whole wheel of that name and version for this processor in `folder`, of any Python version, or None."""
    prefix = f"{name.replace('-', '_')}-{version}-"
    for path in sorted(folder.glob("*.whl")):
        if path.name.startswith(prefix) and (arch in path.name or path.name.endswith("-any.whl")):
            if zipfile.is_zipfile(path):
                return path
            say(f"{path.name} is not whole, passing it by")
    return None


def local_wheel(name, version, arch):
    """The wheel that TORCH_WHEEL or WHEELS names, or None."""
    given = os.environ.get("TORCH_WHEEL")
    if name == "torch" and given:
        path = Path(given)
        if not zipfile.is_zipfile(path) or not path.name.startswith(f"torch-{version}"):
            raise Failure(f"TORCH_WHEEL is {given}: expected a whole wheel torch-{version}-*.whl")
        return path
    folder = os.environ.get("WHEELS")
    if not folder:
        return None
    if not Path(folder).is_dir():
        raise Failure(f"WHEELS is {folder}: expected a folder of wheels")
    return wheel_in(Path(folder), name, version, arch)


def download(name, version, arch, wheels):
    """A wheel through pip into `wheels`, tried three times; a wheel that is there already is taken."""
    ready = wheel_in(wheels, name, version, arch)
    if ready:
        say(f"{name} {version}: already downloaded")
        return ready
    arguments = ["download", "--no-deps", "--only-binary=:all:"]
    # The libraries do not depend on the Python version, so that any Python of the user's can fetch them.
    arguments += ["--python-version", "3.12", "--implementation", "cp"]
    # pip takes each name literally: a wheel for glibc 2.17 is not found under 2.28.
    for minor in range(GLIBC[1], 16, -1):
        arguments += ["--platform", f"manylinux_2_{minor}_{arch}"]
    arguments += ["--platform", f"manylinux2014_{arch}"]
    if pip_version() >= (25, 1):
        arguments += ["--resume-retries", "10"]
    # pip may copy a wheel into place slowly; only a whole one gets its final name.
    partial = wheels / "partial"
    errors = ""
    for attempt in range(1, ATTEMPTS + 1):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        say(f"{name} {version}: downloading" + (f" (attempt {attempt} of {ATTEMPTS})" if attempt > 1 else ""))
        status, errors = pip(arguments + ["--dest", str(partial), f"{name}=={version}"], partial)
        fetched = wheel_in(partial, name, version, arch)
        if status == 0 and fetched:
            final = wheels / fetched.name
            os.replace(fetched, final)
            shutil.rmtree(partial, ignore_errors=True)
            return final
        if "no space left" in errors.lower():
            break
        if attempt < ATTEMPTS:
            say(f"{name} {version}: that did not work, trying again in {3 * attempt} s")
            time.sleep(3 * attempt)
    raise Failure(explain(name, version, errors))


def wanted(member):
    """Whether a file of a wheel is needed to build and run: libraries, headers, versions, licences."""
    parts = member.split("/")
    if ".dist-info" in parts[0] or parts[0] == "torch.libs":
        return True
    if parts[0] == "nvidia":
        return "lib" in parts and ".so" in parts[-1]
    if parts[0] != "torch" or len(parts) < 2:
        return False
    if parts[1] == "lib":
        return len(parts) == 3 and ".so" in parts[2] and not parts[2].startswith(("libtorch_python", "libshm"))
    return parts[1] in ("include", "share") or parts[1:] == ["version.py"]


def unpack(wheel, staging):
    with zipfile.ZipFile(wheel) as archive:
        for info in archive.infolist():
            if not info.is_dir() and wanted(info.filename):
                archive.extract(info, staging)


def move_into_place(staging, target):
    """Renames every staged file into `target`, folder by folder: the NVIDIA wheels share folders."""
    for folder, _, files in os.walk(staging):
        place = target / Path(folder).relative_to(staging)
        place.mkdir(parents=True, exist_ok=True)
        for file in files:
            os.replace(Path(folder) / file, place / file)


def install(packages):
    """Downloads and unpacks what is missing of `packages`; can be stopped at any point and run again."""
    arch = machine()
    wheels, staging, marker = HOME / "wheels", HOME / "staging", HOME / ".complete"
    there = installed()
    if any(there.get(name, version) != version for name, version in packages) or not there:
        # Another version, or an unpacking that was stopped half-way: nothing of it is worth keeping.
        marker.unlink(missing_ok=True)
        for name in ("torch", "nvidia", "torch.libs"):
            shutil.rmtree(HOME / name, ignore_errors=True)
        for info in HOME.glob("*.dist-info"):
            shutil.rmtree(info, ignore_errors=True)
        there = {}
    missing = [package for package in packages if package[0] not in there]
    wheels.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    require_space(TORCH_GB * (TORCH in missing) + CUDA_GB * any(package in CUDA for package in missing), HOME)
    sources = []
    for name, version in missing:
        local = local_wheel(name, version, arch)
        if local:
            say(f"{name} {version}: taking {local}")
        sources.append((local, local or download(name, version, arch, wheels)))
    for local, wheel in sources:
        say(f"unpacking {wheel.name}")
        try:
            unpack(wheel, staging)
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            if local is None:
                wheel.unlink()
            again = "hint: run it again, it will be downloaded anew" if local is None else "hint: fetch it again"
            raise Failure(f"{wheel.name} is damaged: {error}\n{again}") from error
    move_into_place(staging, HOME)
    there.update(missing)
    scratch = HOME / ".complete.new"
    scratch.write_text("".join(f"{name}=={version}\n" for name, version in sorted(there.items())))
    os.replace(scratch, marker)
    shutil.rmtree(staging, ignore_errors=True)
    shutil.rmtree(wheels, ignore_errors=True)
    if installed() != there:
        raise Failure(f"{HOME} is not whole after the set-up\nhint: remove that folder and run it again")


def set_up_libtorch(cuda):
    given = os.environ.get("LIBTORCH")
    if given:
        check_given(given)
        return
    packages = list(CPU)
    if cuda == "yes" or (cuda == "auto" and has_driver()):
        packages += CUDA
    if all(installed().get(name) == version for name, version in packages):
        return
    HOME.mkdir(exist_ok=True)
    with lock():
        if all(installed().get(name) == version for name, version in packages):
            return
        kind = "for CPU and CUDA" if len(packages) > len(CPU) else "for CPU (no NVIDIA driver was found)"
        if cuda == "no":
            kind = "for CPU"
        say(f"installing libtorch {TORCH[1]} {kind} into {HOME.name}/")
        install(packages)
        say("libtorch is ready")


def set_up_venv():
    """The Python peers of tests/python in .venv; done again when requirements.txt changes."""
    if not (3, 11) <= sys.version_info[:2] <= (3, 12):
        raise Failure(
            f"the Python peers expect Python 3.11 or 3.12, found {platform.python_version()}\n"
            "hint: name another one: make test-python PYTHON=python3.12"
        )
    text = REQUIREMENTS.read_bytes()
    stamp = f"{platform.python_version()} {hashlib.sha256(text).hexdigest()}\n"
    marker = VENV / ".complete"
    with contextlib.suppress(OSError):
        if marker.read_text() == stamp:
            return
    if pip_version() < (22, 3):
        raise Failure(f"expected pip 22.3 or newer, found pip {'.'.join(map(str, pip_version()))}")
    require_space(10, ROOT)
    say(f"installing the Python peers into {VENV.name}/ (about 8 GB: in Python, torch is not imported without CUDA)")
    python = VENV / "bin" / "python"
    if not python.exists():
        # Debian splits ensurepip off, so the pip that is here fills the environment.
        run = subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(VENV)])
        if run.returncode != 0:
            raise Failure(f"cannot make a virtual environment in {VENV.name}/")
    marker.unlink(missing_ok=True)
    scratch = VENV / "tmp"
    scratch.mkdir(exist_ok=True)
    arguments = ["install", "--requirement", str(REQUIREMENTS)]
    if os.environ.get("WHEELS"):
        arguments += ["--find-links", os.environ["WHEELS"]]
    status, errors = pip(arguments, scratch, python)
    shutil.rmtree(scratch, ignore_errors=True)
    if status != 0:
        raise Failure(f"pip could not install {REQUIREMENTS.relative_to(ROOT)}\n{last_line(errors)}")
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
        if arguments.what == "venv":
            set_up_venv()
        else:
            set_up_libtorch(arguments.cuda)
    except Failure as failure:
        print(f"setup: error: {failure}", file=sys.stderr)
        return 1
    except OSError as error:
        hint = "\nhint: free some gigabytes and run it again" if error.errno == errno.ENOSPC else ""
        print(f"setup: error: {error}{hint}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nsetup: stopped; run it again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
