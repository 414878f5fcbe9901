"""Evaluations of a frozen encoder, one module a protocol.

Each has `evaluate(model, data, ...) -> Result`: `model` is a SplitViT on its device, `data` names the images ("photos",
"folder:PATH" or another source, as `open_source` takes it; a folder for detection and segmentation), a random
initialization of the model is measured beside it, and the result writes its tables and figures.

Example:
    >>> from ser_fast.evaluation import knn
    >>> from ser_fast.vit import load_split_vit
    >>> result = knn.evaluate(load_split_vit("runs/a/encoder.safetensors"), "folder:images", k=(10, 20))
    >>> result.rows[0][1].top1.value
    0.71
    >>> result.print()
    >>> result.write(Path("runs/a"))  # knn.csv, knn.png, knn_confusion.csv, knn_confusion.png
"""

# Here, and not beside the probes: the command line and the report read them without what a probe takes.
RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Learning rates that a linear probe tries."""
TOKEN_RATES = (0.001, 0.003, 0.01, 0.03)
"""Learning rates that the linear head of the segmentation tries."""

CONTROL = "random"
"""What the names of random controls begin with."""
BUDGET = "patch means"
"""In the tables: an encoder of mean colors, whose error is the resampling's own."""
