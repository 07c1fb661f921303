"""Packaging of hf_s3t."""

import re
from pathlib import Path

from setuptools import find_packages, setup


ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "hf_s3t" / "__init__.py").read_text(encoding="utf-8"), re.M)

INSTALL_REQUIRES = [
    "accelerate>=1.15",
    "datasets>=5.2",
    "evaluate>=0.4.6",
    "filelock>=4.2",
    "huggingface-hub>=2.4",
    "jinja2>=3.1",
    "numpy>=2.4",
    "pathspec>=1.1",
    "peft>=0.21",
    "pyarrow>=26.0",
    "pyyaml>=6.0",
    "rich>=15.0",
    "safetensors>=0.8",
    "scikit-learn>=1.9",
    "scipy>=1.17",
    "torch>=2.13",
    "transformers>=5.23",
    "trl>=1.16",
    "typer>=0.29",
]

EXTRAS_REQUIRE = {
    "8bit": ["bitsandbytes>=0.50"],
    "docs": ["mkdocs-material>=9.8", "mkdocstrings[python]>=1.0"],
    "figures": ["matplotlib>=3.11"],
    "lm_eval": ["lm-eval[hf]==0.4.13"],
    "vision": ["pillow>=13.0"],
}
EXTRAS_REQUIRE["dev"] = [
    *EXTRAS_REQUIRE["docs"],
    *EXTRAS_REQUIRE["figures"],
    *EXTRAS_REQUIRE["lm_eval"],
    *EXTRAS_REQUIRE["vision"],
    "build>=1.6",
    "hypothesis>=6.170",
    "import-linter>=2.17",
    "mypy>=2.4",
    "pytest>=9.2",
    "pytest-cov>=7.1",
    "pytest-xdist>=3.8",
    "ruff>=0.17",
    "schedulefree>=1.4",
    "twine>=7.0",
    "types-psutil",
    "types-PyYAML",
]

setup(
    name="hf_s3t",
    version=VERSION.group(1),
    description="Exact unlearning for fine-tuned Hugging Face models: ensembles of sliced LoRA stacks (S3T).",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The hf_s3t authors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords="unlearning machine-unlearning lora peft transformers privacy",
    # The templates of cards lie beside the package in a checkout, and go into it where it is installed.
    packages=[*find_packages(include=["hf_s3t", "hf_s3t.*"]), "hf_s3t.model_cards"],
    package_dir={"hf_s3t.model_cards": "model_cards"},
    package_data={"hf_s3t": ["metrics/*/*.py"], "hf_s3t.model_cards": ["*.md"]},
    entry_points={"console_scripts": ["hf-s3t = hf_s3t.cli:main"]},
    python_requires=">=3.11",
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
