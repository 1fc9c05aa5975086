"""Proves that hra works on a GPU, part by part, in the first minutes on a machine that has one.

    bash tools/gpu_check.sh --bundle .gpu --out OUT      on the machine with a GPU
    bash tools/gpu_check.sh --dry-run                    the same on the CPU, at small sizes

Needs Python 3.9 with torch 2.11, whose libraries are libtorch; no cargo, no network. Beside it:

    HRA_BIN          the program (target/release/hra)
    HRA_ROOT         the checkout (where this script lies)
    HRA_CUDA_TESTS   the built tests/cuda.rs (the newest target/debug/deps/cuda-*)
    LIBTORCH         where HRA_ROOT/.libtorch is not there; without both, libtorch is the Python's
    --bundle DIR     what `make gpu-bundle` packed: program, tests, wheels and counter that such a machine lacks
    --python PYTHON  the Python with torch, diffusers, transformers and PEFT (that which runs this)
    HRA_GPU_CHECK_BREAK=PART[,PART]   plants an error of 1 % in what these parts find: each must then fail

Every part (`parts.py`) is a process with a limit in seconds; what goes wrong in one, the others do not notice. A check is
written to OUT/results.json and OUT/results.md as soon as it is made. The number of checks is fixed (counts.json, written by
`--dry-run --write-counts`), so that none can be lost unseen; one that cannot be made is skipped by name, which is a failure
unless it is a dry run. The exit code is 0 if all parts passed, else 1.
"""
