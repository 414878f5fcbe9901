"""Trainings that differ in a few options, with several seeds, and what their differences are worth.

Example:
    >>> from ser_fast.sweep.evaluation import run_sweep
    >>> from ser_fast.sweep.cells import make_cells
    >>> cells = make_cells([["ser.weight", "0", "0.1", "1"]], [])
    >>> result = run_sweep(Path("runs/sweep"), ["--optim.steps", "300"], cells, seeds=3)
    >>> result.write(Path("runs/sweep"))  # sweep.csv, report.html and its figures
"""
