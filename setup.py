"""Packaging of megatron_scope. Ranges are the ones tested; constraints.txt holds the exact versions."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
MATPLOTLIB = "matplotlib>=3.8,<4"  # draws; its tests need it too


def read_version() -> str:
    """The package's version, read as text: importing the package would need what is about to be installed."""
    text = (ROOT / "megatron_scope" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if match is None:
        raise RuntimeError('megatron_scope/__init__.py has no line `__version__ = "..."`')
    return match.group(1)


def read_description() -> str:
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.exists() else ""


setup(
    name="megatron_scope",
    version=read_version(),
    description="SCOPE (arXiv:2604.10688) on Megatron-core: on-policy distillation from one CPU to a cluster",
    long_description=read_description(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["megatron_scope", "megatron_scope.*"]),
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.12,<2.15",
        "megatron-core>=0.16,<0.20",
        "transformers>=5.0,<6",
        "tokenizers>=0.22,<1",
        "safetensors>=0.7,<1",
        "numpy>=2.0,<3",
        "pyyaml>=6.0,<7",
        "nltk>=3.9,<4",
        "math-verify>=0.8,<1",
        "aiohttp>=3.10,<4",
        "psutil>=6.0,<8",
        "rich>=13.7,<16",
        "pebble>=5.0.7,<6",
    ],
    extras_require={
        "gpu": ["transformer-engine[pytorch]>=2.0,<3"],
        "sglang": ["sglang>=0.5,<0.6"],
        "report": [MATPLOTLIB],
        # `nodejs` brings the JavaScript engine in a wheel: pyright would otherwise fetch one when first run.
        # ruff's formatting changes between minor versions, so its range is one of them.
        "dev": [
            "pytest>=8.0,<10",
            "pytest-timeout>=2.3,<3,!=2.5.0",
            "pytest-xdist>=3.6,<4",
            "hypothesis>=6.100,<7",
            "ruff>=0.17,<0.18",
            "pyright[nodejs]>=1.1.400,<2",
            "mbridge>=0.15,<0.16",  # a second oracle of the conversion; it needs einops without saying so
            "einops>=0.8,<1",
            "triton>=3.7,<3.8; platform_system == 'Linux'",  # its interpreter runs the CUDA kernels on a CPU
            MATPLOTLIB,
        ],
    },
    entry_points={"console_scripts": ["megatron-scope = megatron_scope.cli:main"]},
)
