"""Packaging of hf_s3t."""

import re
from pathlib import Path

from setuptools import find_packages, setup


ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "hf_s3t" / "__init__.py").read_text(encoding="utf-8"), re.M)

# The unit suite passes with exactly these (`make test-lowest`), as with the newest (constraints.txt).
INSTALL_REQUIRES = [
    "accelerate>=1.14",  # 1.13 computes in bfloat16 for good once it has evaluated so
    "datasets>=5.1",
    "evaluate>=0.4.5",
    "filelock>=3.29",
    "huggingface-hub>=2.2",  # 2.1 sends its token to whatever else the Hub's machine serves
    "jinja2>=3.1.4",
    "numpy>=2.2.6",
    "pathspec>=1.0",
    "peft>=0.21",  # the first that tells settings which match nothing from other faults
    "psutil>=7.2.2",
    "pyarrow>=24.0",
    "pyyaml>=6.0.2",
    "rich>=14.0",
    "safetensors>=0.8",
    "scikit-learn>=1.7",
    "scipy>=1.15.3",
    "torch>=2.13",  # older ones were not tried
    "transformers>=5.19",  # 5.18 takes the seed 0 of a collator for none
    "trl>=1.10",  # 1.8 keeps rows of which truncation leaves nothing
    "typer>=0.29",  # the first for which NaN is wrong usage where a number is asked for
]

EXTRAS_REQUIRE = {
    "8bit": ["bitsandbytes>=0.49"],
    "docs": ["mkdocs-material>=9.8", "mkdocstrings[python]>=1.0"],
    "figures": ["matplotlib>=3.10"],
    "lm_eval": ["lm-eval[hf]==0.4.13"],
    "ray": ["ray>=2.60"],
    "serve": [
        "fastapi>=0.165",
        "httpx2>=2.16.2",
        "prometheus_client>=0.26",
        "pydantic>=2.14.3",
        "uvicorn>=0.54",
    ],
    "sign": ["cryptography>=46.0"],
    "vision": ["pillow>=12.0"],
}
EXTRAS_REQUIRE["test"] = [
    *EXTRAS_REQUIRE["figures"],
    *EXTRAS_REQUIRE["lm_eval"],
    *EXTRAS_REQUIRE["ray"],
    *EXTRAS_REQUIRE["serve"],
    *EXTRAS_REQUIRE["sign"],
    *EXTRAS_REQUIRE["vision"],
    "hypothesis>=6.170",
    "openai>=3.57",
    "pytest>=9.2",
    "pytest-cov>=7.1",
    "pytest-xdist>=3.8",
    "schedulefree>=1.4",
    "schemathesis>=4.32",
]
EXTRAS_REQUIRE["dev"] = [
    *EXTRAS_REQUIRE["docs"],
    *EXTRAS_REQUIRE["test"],
    "build>=1.6",
    "import-linter>=2.17",
    "mypy>=2.4",
    "ruff>=0.17",
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
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    keywords="unlearning machine-unlearning lora peft transformers privacy right-to-be-forgotten",
    # The templates of cards lie beside the package in a checkout, and go into it where it is installed.
    packages=[*find_packages(include=["hf_s3t", "hf_s3t.*"]), "hf_s3t.model_cards"],
    package_dir={"hf_s3t.model_cards": "model_cards"},
    package_data={
        "hf_s3t": [
            "py.typed",
            "metrics/*/*.py",
            "operations/audit_pack/*",
            "operations/report_pages/*",
            "server/page/*",
        ],
        "hf_s3t.model_cards": ["*.md"],
    },
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
        "Typing :: Typed",
    ],
)
