"""How much do interpolation, padding and alignment on the token lattice matter?

Example:
    >>> from ser_fast.sensitivity.evaluation import evaluate
    >>> result = evaluate(load_split_vit("runs/a/encoder.safetensors"), "folder:images")
    >>> result.summary()[1]
    'Recommended: the default (bicubic, no antialias, padding border, half-pixel), error 0.231 [0.214, 0.247]; ...'
    >>> result.write(Path("results"))
"""

# Here, and not beside the training: the command line shows the names before it loads what a training takes.
BASELINE = "bicubic"
VARIANTS: dict[str, dict[str, str | bool]] = {
    BASELINE: {},
    **{
        name: {"interpolation": name} for name in ("nearest", "bilinear", "catmull_rom", "mitchell", "lanczos3", "area")
    },
    "antialias": {"antialias": True},
    **{name: {"padding": name} for name in ("zeros", "reflection")},
}
"""What SERLoss is trained with; the baseline is its default (bicubic, border, no antialias)."""
