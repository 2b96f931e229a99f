"""Python, packages, compilers and other programs: are they there, and of the right version?"""

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import InvalidRequirement, Requirement

from moe_runtime.cli.doctor.finding import Finding, ok
from moe_runtime.cli.version import package_version

_EXTRAS = {
    "mpi": "ranks started by mpiexec, and the MPI transport",
    "data": "DeepSeek's tokenizer and Parquet",
    "report": "moe-runtime report",
    "dashboard": "moe-runtime dashboard, and TensorBoard",
    "test": "the tests, and peers of some benchmarks",
}


def look() -> Iterator[Finding]:
    """Findings about software."""
    yield ok("python", f"{platform.python_version()}, {sys.executable}")
    yield from _packages()
    yield _compiler()
    yield _launchers()
    yield _browser()


def _packages() -> Iterator[Finding]:
    try:
        wanted = [Requirement(text) for text in requires("moe_runtime") or []]
    except (PackageNotFoundError, InvalidRequirement):
        yield Finding("moe-runtime", "warn", "not installed: it runs from its folder", "pip install -e .")
        return
    yield ok("moe-runtime", f"{package_version()} with {_platform()}")
    core = [one for one in wanted if "extra" not in str(one.marker or "")]
    faults = [fault for one in core if (fault := _fault(one)) is not None]
    for one, said in faults:
        yield Finding(one.name, "fail", said, f"pip install '{one.name}{one.specifier}'")
    if not faults:
        names = ", ".join(f"{one.name} {version(one.name)}" for one in core)
        yield ok("packages", names)
    for extra, what in _EXTRAS.items():
        own = [one for one in wanted if one.marker is not None and one.marker.evaluate({"extra": extra})]
        own = [one for one in own if one not in core]
        lacking = [fault for one in own if (fault := _fault(one)) is not None]
        if not lacking:
            yield ok(f"extra {extra}", what)
        else:
            said = "; ".join(f"{one.name}: {fault}" for one, fault in lacking[:3])
            yield Finding(
                f"extra {extra}", "note", f"{said}; for {what}", f"pip install 'moe_runtime[{extra}]'"
            )


def _fault(wanted: Requirement) -> tuple[Requirement, str] | None:
    try:
        have = version(wanted.name)
    except PackageNotFoundError:
        return wanted, f"expected {wanted.specifier}, got none"
    # A local mark such as +cpu is no other version; pre-releases are what somebody chose.
    if wanted.specifier.contains(have.partition("+")[0], prereleases=True):
        return None
    return wanted, f"expected {wanted.specifier}, got {have}"


def _platform() -> str:
    return f"{platform.system()} {platform.release()} {platform.machine()}"


def _compiler() -> Finding:
    found = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
    if found and shutil.which(found):
        return ok("C++ compiler", found)
    said = f"expected one for the fused CPU optimizer, got {found or 'none'}; the plain one is slower"
    return Finding("C++ compiler", "warn", said, "unset CXX" if found else "apt install g++")


def _launchers() -> Finding:
    names = ("torchrun", "deepspeed", "mpiexec", "srun", "ssh")
    beside = os.path.dirname(sys.executable)
    path = os.pathsep.join((beside, os.environ.get("PATH", "")))
    found = [name for name in names if shutil.which(name, path=path)]
    missing = [name for name in names if name not in found]
    said = f"{', '.join(found) or 'none'}{f'; not here: {chr(44).join(missing)}' if missing else ''}"
    return ok("launchers", said)


def _browser() -> Finding:
    found = next((shutil.which(name) for name in ("chromium", "google-chrome") if shutil.which(name)), None)
    if found:
        return ok("browser", found)
    return Finding("browser", "note", "none: tests of the report's pages are skipped", "apt install chromium")
