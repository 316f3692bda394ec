"""Put a CUDA runtime, cuBLAS, NCCL and Transformer Engine that need no GPU into the environment whose interpreter runs this.

    make gpu-rehearsal                      # makes .venv-gpu, runs this in it, and then the tests that are marked `gpu`
    .venv-gpu/bin/python tests/fake_gpu/build.py

The environment has the CUDA build of torch from the package index. Each library that it loads is replaced by one of the same
name, made of a source in this folder, which does on the host what the real one does on a device, and of a stub for every
other symbol that the real one exports. The real ones stay beside them as NAME.real, so that this can be run again.

What runs then is torch's own CUDA code (allocator, streams, autograd, process groups, pinned memory), Megatron-Core's, and
all of Transformer Engine's Python; what does not run is a kernel. docs/gpu.md says what that proves and what it cannot.
"""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).parent
SITE = Path(sysconfig.get_path("purelib"))
CUDA = SITE / "nvidia" / "cu13"
"""Folder of the wheels nvidia-cuda-runtime, nvidia-cublas and nvidia-cuda-crt."""
NCCL = SITE / "nvidia" / "nccl"
TORCH = SITE / "torch"
OWN = SITE / "fake_gpu"
"""Where what has no real counterpart is put: the operators, and the preloaded library."""
INCLUDES = [f"-I{folder}" for folder in (CUDA / "include", NCCL / "include")]
REPLACED = {
    "cuda_runtime": CUDA / "lib" / "libcudart.so.13",
    "cublas_lt": CUDA / "lib" / "libcublasLt.so.13",
    "cublas": CUDA / "lib" / "libcublas.so.13",
    "nccl": NCCL / "lib" / "libnccl.so.2",
}
"""Library of each source."""


def main() -> None:
    """Build everything; about a minute, most of it in the compiler of C++."""
    OWN.mkdir(exist_ok=True)
    for source, library in REPLACED.items():
        print(f"{library.name} …", file=sys.stderr, flush=True)
        replace(HERE / f"{source}.c", library)
    print("libcuda.so.1, operators, Transformer Engine's extension …", file=sys.stderr, flush=True)
    build_driver()
    build_operators()
    build_transformer_engine()
    widen_transformer_engine()
    compile_c("-O1", HERE / "no_at_fork.c", "-o", OWN / "no_at_fork.so")
    (SITE / "fake_gpu_startup.py").write_text((HERE / "startup.py").read_text(encoding="utf-8"), encoding="utf-8")
    (SITE / "fake_gpu.pth").write_text("import fake_gpu_startup\n", encoding="utf-8")


def replace(source: Path, library: Path) -> None:
    """Replace a library by the source's functions and stubs for the rest; callers find every symbol at the version they ask."""
    real = library.with_name(f"{library.name}.real")
    if not real.exists():
        library.rename(real)
    with tempfile.TemporaryDirectory() as folder:
        compiled, stubs, versions = (Path(folder) / name for name in ("own.o", "stubs.c", "versions.map"))
        compile_c("-O3", "-c", *INCLUDES, source, "-o", compiled)
        missing = symbols(real, "--dynamic", "--defined-only") - symbols(compiled, "--defined-only")
        stubs.write_text(stubs_of(missing), encoding="utf-8")
        versions.write_text(f"{library.name} {{ global: *; }};\n", encoding="utf-8")
        linked = [f"-Wl,-soname,{library.name}", f"-Wl,--version-script={versions}", "-lm", "-lpthread"]
        compile_c("-O1", compiled, stubs, *linked, "-o", library)


def build_driver() -> None:
    """Build the driver's library: what torch's and NVIDIA's libraries expect of it, all of it doing nothing."""
    libraries = [*TORCH.glob("lib/*.so"), *SITE.glob("nvidia/*/lib/*.so*")]
    wanted = {name for library in libraries for name in symbols(library, "--dynamic", "--undefined-only")}
    others = ("cuda", "cublas", "cudnn", "cufft", "curand", "cusolver", "cusparse", "cufile", "cupti", "cutensor", "cuFile")
    driver = {name for name in wanted if re.match("cu[A-Z]", name) and not name.startswith(others)}
    answered = {
        "cuDriverGetVersion": "int cuDriverGetVersion(int *version) { *version = 13000; return 0; }\n",
        "cuDeviceGetCount": "int cuDeviceGetCount(int *count) { *count = 1; return 0; }\n",
        "cuGetErrorString": 'int cuGetErrorString(int error, const char **text) { *text = "fake"; return 0; }\n',
        "cuGetErrorName": 'int cuGetErrorName(int error, const char **text) { *text = "fake"; return 0; }\n',
    }
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "driver.c"
        source.write_text(stubs_of(driver - answered.keys()) + "".join(answered.values()), encoding="utf-8")
        compile_c("-O1", "-Wl,-soname,libcuda.so.1", source, "-o", CUDA / "lib" / "libcuda.so.1")


def build_operators() -> None:
    """Build the library that has torch's CUDA operators computed by its CPU operators."""
    includes = [f"-I{TORCH / 'include'}", f"-I{TORCH / 'include' / 'torch' / 'csrc' / 'api' / 'include'}", *INCLUDES]
    libraries = [f"-L{TORCH / 'lib'}", *(f"-l{name}" for name in ("torch", "torch_cpu", "c10", "c10_cuda", "torch_cuda"))]
    target = OWN / "host_operators.so"
    run("g++", "-O1", "-std=c++20", "-fPIC", "-shared", "-w", *includes, HERE / "host_operators.cpp", "-o", target, *libraries)


def build_transformer_engine() -> None:
    """Build the module that Transformer Engine's Python loads in place of its compiled extension."""
    folder = SITE / "transformer_engine" / "wheel_lib"
    folder.mkdir(exist_ok=True)
    extension = folder / f"transformer_engine_torch{sysconfig.get_config_var('EXT_SUFFIX')}"
    compile_c("-O1", f"-I{sysconfig.get_path('include')}", HERE / "transformer_engine_extension.c", "-o", extension)
    functions = (HERE / "transformer_engine_functions.py").read_text(encoding="utf-8")
    (SITE / "fake_transformer_engine.py").write_text(functions, encoding="utf-8")


def widen_transformer_engine() -> None:
    """Let Transformer Engine's attention choose its fused kernel for float32 too, which only the functions here compute.

    Then layers of Transformer Engine can be compared with others to 1e-5 (`tests.fake_gpu.wide`).
    """
    folder = SITE / "transformer_engine" / "pytorch" / "attention" / "dot_product_attention"
    allowed = {
        "utils.py": "qkv_dtype not in [torch.bfloat16, torch.float16, torch.float8_e4m3fn",
        "backends.py": "x.dtype in [torch.float16, torch.bfloat16",
    }
    for name, text in allowed.items():
        source = (folder / name).read_text(encoding="utf-8")
        if text not in source:
            sys.exit(f"{folder / name}: no longer has the line that is widened: {text}")
        if f"{text}, torch.float32" not in source:
            (folder / name).write_text(source.replace(text, f"{text}, torch.float32"), encoding="utf-8")


def stubs_of(names: Iterable[str]) -> str:
    """Return C functions of these names that do nothing and return success; FAKE_GPU_TRACE=1 tells which are called."""
    head = "#include <stdio.h>\n#include <stdlib.h>\n"
    note = 'static void note(const char *n) { if (getenv("FAKE_GPU_TRACE")) fprintf(stderr, "[fake GPU] stub %s\\n", n); }\n'
    return head + note + "".join(f'long {name}(void) {{ note("{name}"); return 0; }}\n' for name in sorted(names))


def symbols(library: Path, *which: str) -> set[str]:
    """Return the functions that a library or object file defines or needs, as `nm` lists them."""
    listed = subprocess.run(["nm", *which, library], capture_output=True, text=True, check=True).stdout.splitlines()
    names = {line.split()[-1].partition("@")[0] for line in listed if line.split()[-2:-1] in (["T"], ["U"], ["W"], ["i"])}
    return {name for name in names if re.fullmatch("[A-Za-z_]\\w*", name) and not name.startswith("lib")}


def compile_c(*arguments: str | Path) -> None:
    """Call the C compiler for position-independent code; it links a shared library unless `-c` is among the arguments."""
    run("gcc", "-fPIC", "-w", *([] if "-c" in arguments else ["-shared"]), *arguments)


def run(*command: str | Path) -> None:
    """Run a command, and end with what it said if it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stderr}")


if __name__ == "__main__":
    main()
