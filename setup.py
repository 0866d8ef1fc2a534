"""Packaging of fastmoco.

`kernels/` and `bench/` stand at the top of the tree because people read and time them on their own.
They are imported as `fastmoco.kernels` and `fastmoco.bench`, since the bare names belong to other projects.
Symbolic links inside `fastmoco/` make that so, for Python, for setuptools and for static tools alike.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

setup(
    name="fastmoco",
    version=re.search(r'^__version__ = "(.*)"', (HERE / "fastmoco/__init__.py").read_text(), re.M)[1],
    description="The fastest honest way to pretrain an image encoder with Momentum Contrast (MoCo v1, v2)",
    long_description=(HERE / "README.md").read_text() if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    packages=find_packages(include=["fastmoco", "fastmoco.*"]),
    # Said, so that an editable install adds the folder to the path. The finder that setuptools writes otherwise is
    # asked last: in the folder that holds the clone, `import fastmoco` would find the clone, a folder without a
    # package.
    package_dir={"": "."},
    package_data={"fastmoco": ["py.typed"]},
    # The oldest of each that was tried; CONTRIBUTING.md says where.
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
        "nvidia-dali-cuda130>=2.4; platform_system == 'Linux'",
        "numpy>=2.2",
        "pillow>=10.1",
        "tyro>=1.0",
        "safetensors>=0.5",
        "tqdm>=4.60",
        "matplotlib>=3.9",
        "numba>=0.68",
    ],
    extras_require={
        "test": [
            "pytest>=8",
            "pytest-timeout>=2.3.1",
            "pytest-benchmark>=5",
            "pytest-xdist>=3.5",
            "hypothesis>=6.100",
            "scikit-learn>=1.5",
            "fsspec>=2024.2",
            "aiohttp>=3.9",
        ],
        "lint": ["ruff>=0.15", "mypy>=1.18", "pre-commit>=4"],
        "notebook": ["nbclient>=0.10", "ipykernel>=6.29"],
        "docs": ["mkdocs-material>=9.6"],
        "remote": ["fsspec>=2024.2", "aiohttp>=3.9", "s3fs>=2024.2", "gcsfs>=2024.2", "huggingface-hub>=0.25"],
        "tensorboard": ["tensorboard>=2.15"],
        "export": ["timm>=1.0"],
        "detection": ["torchvision>=0.20"],
        "search": ["faiss-cpu>=1.8", "umap-learn>=0.5"],
        "gpu": ["nvidia-ml-py>=12"],
    },
    entry_points={"console_scripts": ["fastmoco = fastmoco.__main__:start"]},
)
