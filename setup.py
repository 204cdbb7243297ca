"""Install mmagent, its data pipelines, evaluation harness and recipes."""

from setuptools import find_packages, setup

setup(
    name="mmagent",
    version="0.1.0",
    description="Train multimodal agent foundation models, from two vision teachers to a clicking agent",
    python_requires=">=3.11",
    packages=find_packages(
        include=[
            "mmagent",
            "mmagent.*",
            "data_pipelines",
            "data_pipelines.*",
            "evals",
            "evals.*",
            "recipes",
            "recipes.*",
        ]
    ),
    entry_points={"lmms_eval.models": ["mmagent = evals.bridges.lmms_entry:manifest"]},  # loaded by lmms-eval alone
    package_data={"": ["*.html", "*.css", "*.js", "*.txt", "lexicons/*.txt", "*.jinja", "*.yaml"]},
    install_requires=[
        "torch>=2.11,<2.14",  # the upper bound keeps timm -> torchvision from pulling a newer CUDA build
        "torchvision>=0.26,<0.29",
        "timm>=1.0.31,<1.1",
        "transformers>=5.17,<5.24",
        "httpx2>=2.12,<3",  # comes with huggingface_hub, which transformers brings
        "tokenizers>=0.22",
        "safetensors>=0.6",
        "omegaconf>=2.3,<2.5",
        "webdataset>=1.0.2,<1.1",
        "numpy>=2.0",
        "pillow>=11",
        "tensorboard>=2.20",
        "tqdm>=4.66",
        "markupsafe>=2.1",
        "miniwob>=1.1,<1.2",
        "matplotlib>=3.10",  # sets formulas, and brings the typefaces of drawn questions
        "scikit-image>=0.25",
        "scikit-learn>=1.6",
    ],
    extras_require={
        "bench": ["playwright>=1.60,<2"],  # a peer of python tools/bench.py browser
        "datasets": ["datasets>=4.0,<6"],
        "deepspeed": ["deepspeed>=0.19.8,<0.20", "accelerate>=1.15,<1.16"],
        "evals": ["beautifulsoup4>=4.13,<5", "av>=15"],  # Design2Code reads pages as its authors do; videos
        "clip": ["beautifulsoup4>=4.13,<5", "opencv-python-headless>=4.11,<6"],  # its fifth score, which inpaints text
        "ingest": ["datasets>=4.0,<6", "pyarrow>=20", "pypdfium2>=5,<6", "av>=15"],  # parquet, PDF pages and videos
        "quality": ["py3langid>=0.4,<0.5"],  # tells languages; its model comes with it (4.5 MB)
        "wandb": ["wandb>=0.20"],
        "ray": ["ray>=2.50,<3"],  # python -m recipes.ray_rl
        "serving": [  # python -m mmagent.serve; transformers serve, for exported folders
            "accelerate>=1.15,<1.16",
            "fastapi>=0.160",
            "openai>=3.0",
            "uvicorn>=0.50",
        ],
        "dev": [
            "beautifulsoup4>=4.13,<5",
            "opencv-python-headless>=4.11,<6",
            "py3langid>=0.4,<0.5",
            "datasets>=4.0,<6",
            "pyarrow>=20",
            "pypdfium2>=5,<6",
            "av>=15",
            "deepspeed>=0.19.8,<0.20",
            "pytest>=9",
            "ray>=2.50,<3",
            "sympy>=1.13",  # judges the judges of formulas; torch brings it
            "hypothesis>=6.150",
            "ruff==0.17.6",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.8",
            "accelerate>=1.15,<1.16",
            "fastapi>=0.160",
            "openai>=3.0",
            "uvicorn>=0.50",
            "trl>=1.16,<2",  # its losses are what ours are compared with
        ],
    },
)
