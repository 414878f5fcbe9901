"""Which extra of the package brings a module that is missing: `import ser_fast` takes torch and numpy alone."""

# By extra, the names that modules of it are imported by. The lower ones bring the upper ones where they need them.
EXTRAS = {
    "train": ("kornia", "PIL", "rich", "safetensors", "skimage", "tensorboard", "timm", "torchvision", "tyro", "yaml"),
    "eval": ("av", "jinja2", "matplotlib", "pycocotools", "scipy"),
    "export": ("onnx", "onnxruntime", "onnxscript"),
    "hf": ("datasets", "huggingface_hub", "pyarrow"),
    "wandb": ("wandb",),
}


def advice(error: ModuleNotFoundError) -> str:
    """The line that says what to install.

    Raises:
        ModuleNotFoundError: `error`, if the module is of no extra; then something is broken.
    """
    module = (error.name or "").partition(".")[0]
    for extra, modules in EXTRAS.items():
        if module in modules:
            return f"ser-fast: {module} is not installed, which this command takes: pip install 'ser-fast[{extra}]'"
    raise error
