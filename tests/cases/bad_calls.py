"""Calls of the operators by their names, with arguments that don't fit: a program of its own, that a crash may end.

For each call it prints `NAME: ` first, and what came of it when it is done: `raised TYPE: MESSAGE` or `returned`.
`python bad_calls.py host` calls the operators of csrc/cuda, in the build for the host.
"""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import ser_fast.ops.group_action
import ser_fast.ops.nt_xent  # noqa: F401, registers the operators

f32, f64, i64 = torch.float32, torch.float64, torch.int64
Call = tuple[Callable[..., Any], dict[str, Any]]

T, M, D = 6, 9, 8  # queries, keys, columns
PADDED, COLUMNS = 128, 64  # of operands on a GPU


def _action() -> dict[str, Any]:
    return {"linear": torch.eye(2, dtype=f64).repeat(2, 1, 1), "offset": torch.zeros(2, 2, dtype=f64)}


def cpu_calls() -> dict[str, Call]:
    """Calls that are right, of the operators of csrc/cpu and of those in front of them."""
    native, ours = torch.ops.ser_fast_native, torch.ops.ser_fast
    u, v = torch.rand(T, D), torch.rand(M, D)
    image, key_image, positive = torch.arange(T), torch.arange(M), torch.arange(T)
    empty, rows = torch.empty(0), {"query": u, "image": image, "key": v, "key_image": key_image}
    kept = torch.empty(4 * native.kept_similarities(T), dtype=torch.uint8)
    options = {"temperature": 0.3, "bounded": True}
    sides = {"interpolation": "bicubic", "padding": "border", "antialias": False, "backend": "auto"}
    views = {"z0": u, "z1": torch.rand(T, D), "image": image, "valid": torch.ones(T, dtype=torch.bool)}
    keys = {"query": u, "key": v, "image": image, "key_image": key_image, "valid": torch.ones(T, dtype=torch.bool)}
    keys |= {"key_valid": torch.ones(M, dtype=torch.bool), "positive": positive}
    loss = {"temperature": 0.3, "normalize": True}
    sides["backend"] = loss_backend = "cpu"
    return {
        "native.group_action": (
            native.group_action,
            {"x": torch.rand(2, 12, D), **_action(), "out": torch.empty(2, 10, D), "sizes": [3, 4, 5, 2]}
            | {"interpolation": 2, "padding": 1, "antialias": False, "transpose": False},
        ),
        "native.normalize_rows": (
            native.normalize_rows,
            {"first": u, "second": v, "index": torch.arange(T + M), "normalize": True}
            | {"u": torch.empty(T + M, D), "scales": torch.empty(T + M, 2)},
        ),
        "native.normalize_rows_backward": (
            native.normalize_rows_backward,
            {"d_first": torch.empty(T, D), "d_second": torch.empty(M, D), "index": torch.arange(T), "d_u": u, "u": u}
            | {"scales": torch.ones(T, 2), "coefficient": torch.ones(T), "other": v, "positive": positive},
        ),
        "native.dot_rows": (
            native.dot_rows,
            {"u": u, "other": v, "positive": positive, "out": torch.empty(T, dtype=f64)},
        ),
        "native.kept_similarities": (native.kept_similarities, {"count": T}),
        "native.log_negatives": (
            native.log_negatives,
            rows | {"key": u, "key_image": image} | {"out": torch.empty(T, dtype=f64), "kept": kept} | options,
        ),
        "native.log_and_mean_negatives": (
            native.log_and_mean_negatives,
            {**rows, "out": torch.empty(T, dtype=f64), "mean": torch.empty(T, D), **options},
        ),
        "native.negatives_gradient": (
            native.negatives_gradient,
            {**rows, "weight": torch.ones(T), "lse": torch.zeros(T, dtype=f64), "kept": empty.to(torch.uint8)}
            | {"d_query": torch.zeros(T, D), "d_key": torch.zeros(M, D), **options},
        ),
        "group_action": (
            ours.group_action,
            {"x": torch.rand(2, 12, D), **_action(), "size_in": [3, 4], "size_out": [5, 2], **sides},
        ),
        "group_action_transpose": (
            ours.group_action_transpose,
            {"x": torch.rand(2, 10, D), **_action(), "size_in": [3, 4], "size_out": [5, 2], **sides},
        ),
        "nt_xent": (ours.nt_xent, {**views, **loss, "kept": 0, "backend": loss_backend}),
        "nt_xent_backward": (
            ours.nt_xent_backward,
            {**views, **loss, "weight": torch.ones(2 * T), "loss": torch.ones(2 * T)}
            | {"similarities": empty.to(torch.uint8), "backend": loss_backend},
        ),
        "info_nce": (ours.info_nce, {**keys, **loss, "backend": loss_backend}),
        "info_nce_backward": (
            ours.info_nce_backward,
            {**keys, **loss, "weight": torch.ones(T), "loss": torch.ones(T)}
            | {"need_query": True, "need_key": True, "backend": loss_backend},
        ),
        "info_nce_detached": (ours.info_nce_detached, {**keys, **loss, "backend": loss_backend}),
    }


def host_calls() -> dict[str, Call]:
    """Calls that are right, of the operators of csrc/cuda."""
    native = torch.ops.ser_fast_native
    x, key = torch.rand(T, D), torch.rand(M, D)
    none, image, valid = x[:0], torch.arange(T), torch.ones(T, dtype=torch.bool)
    u = torch.zeros(PADDED, COLUMNS, dtype=torch.float16)
    table = torch.zeros(2 * PADDED + 3 * PADDED // 32, dtype=i64)
    weights, panel = torch.ones(3, PADDED), torch.empty(PADDED, PADDED, dtype=torch.float16)
    kept = torch.zeros(PADDED * PADDED, dtype=torch.float16)
    positives = {"q0": x, "q1": none, "k0": key, "k1": none, "positive": image, "table": table}
    sides = {"q": u, "q_table": table, "k": u.clone(), "k_table": table}
    weighted = {"q": u, "q_table": table, "q_weights": weights, "k": u.clone(), "k_table": table, "k_weights": weights}
    state, accumulated = torch.zeros(2, 1, PADDED), torch.zeros(1, PADDED, COLUMNS)
    both = {"bounded": True, "by_row": True, "by_key": True}
    options = {"temperature": 0.3, "views": False}
    at = {"scale": 1.0, "first_row": 0, "first_key": 0}
    finish = {"x0": x, "x1": none, "y0": key, "y1": none, "table": table, "gradient_weights": weights}
    finish |= {"positive": image}
    finish |= {"order": image, "first": image, "accumulated": accumulated, "largest": torch.ones(1)}
    finish |= {"d_x0": torch.empty(T, D), "d_x1": torch.empty(0, D), "temperature": 0.3}
    half = x.to(torch.bfloat16)
    return {
        "prepare": (
            native.nt_xent_prepare,
            {"x0": x, "x1": none, "image": image, "valid": valid, "u": torch.empty(PADDED, COLUMNS), "table": table}
            | {"normalize": True},
        ),
        "symmetric_sums": (
            native.nt_xent_symmetric_sums,
            {"u": u, "table": table, "sums": torch.zeros(4, PADDED, dtype=i64), "kept": kept, "scale": 1.0, "count": T},
        ),
        "row_sums": (native.nt_xent_row_sums, {**sides, "state": state, "scale": 1.0, "keys": M}),
        "panel_row_sums": (
            native.nt_xent_panel_row_sums,
            {
                "panel": panel.float(),
                "q_table": table,
                "k_table": table,
                "state": state,
                "first_row": 0,
                "first_key": 0,
            },
        ),
        "losses": (
            native.nt_xent_losses,
            {**positives, "state": state, "loss": torch.empty(T), **options, "summed": False, "normalize": True},
        ),
        "gradient_weights": (
            native.nt_xent_gradient_weights,
            {**positives, "weight": torch.ones(T), "largest": torch.ones(1), "loss": torch.ones(T)}
            | {"out": weights, **options, "bounded": True, "library": False, "normalize": True},
        ),
        "stationary_gradient": (
            native.nt_xent_stationary_gradient,
            {**weighted, "out": accumulated, "scale": 1.0, "keys": M, **both},
        ),
        "gradient_panel": (
            native.nt_xent_gradient_panel,
            {**weighted, "kept": kept, "panel": panel, **at, "source": 0, **both},
        ),
        "gradient_panel from kept": (
            native.nt_xent_gradient_panel,
            {**weighted, "kept": kept, "panel": panel, **at, "source": 3, **both},
        ),
        "finish_gradient": (native.nt_xent_finish_gradient, {**finish, "side": 1, "library": True, "normalize": True}),
        "finish_gradient of keys": (
            native.nt_xent_finish_gradient,
            finish
            | {"x0": key, "y0": x, "order": image, "first": torch.zeros(M + 1, dtype=i64), "d_x0": torch.empty(M, D)}
            | {"side": 2, "library": True, "normalize": True},
        ),
        "detached_sums": (
            native.nt_xent_detached_sums,
            {**sides, "state": state, "out": accumulated, "scale": 1.0, "keys": M, "bounded": True},
        ),
        "finish_detached": (
            native.nt_xent_finish_detached,
            {"query": half, "key": key.to(torch.bfloat16), "positive": image, "table": table, "state": state}
            | {"accumulated": accumulated, "loss": torch.empty(T), "gradient": torch.empty(T, D)}
            | {"temperature": 0.3, "normalize": True},
        ),
    }


# What is not read in the calls above, or may have any length; on a GPU nothing looks at an index before a kernel does.
GAPS = ("with gaps", "memory taken away")
ANY_INDEX = {f"{name}: {change}" for name in ("positive", "order", "first") for change in ("negative", "too large")}
FREE = {
    "native.normalize_rows": {"first: a row less", "second: a row less"},
    "native.normalize_rows_backward": {"d_first: a row less", "d_second: a row less", "other: a row less"},
    "native.dot_rows": {"other: a row less"},
    "native.negatives_gradient": {f"kept: {change}" for change in ("a row less", *GAPS)},
    "nt_xent_backward": {f"similarities: {change}" for change in ("a row less", "with gaps", "memory taken away")},
    "losses": ANY_INDEX | {"k0: a row less"},
    "gradient_weights": ANY_INDEX | {"k0: a row less", "largest: with gaps"},
    "stationary_gradient": {"out: a row less"},
    "gradient_panel": {f"kept: {change}" for change in ("dtype", "a row less", "a dimension more", *GAPS)},
    "finish_gradient": ANY_INDEX
    | {"y0: a row less", "largest: with gaps", "accumulated: a row less"}
    | {f"{name}: {change}" for name in ("order", "first") for change in ("dtype", "a row less", *GAPS)}
    | {f"{name}: a dimension more" for name in ("order", "first")},
    "finish_gradient of keys": ANY_INDEX
    | {"largest: with gaps", "accumulated: a row less"}
    | {f"positive: {change}" for change in ("dtype", "a row less", "a dimension more", *GAPS)},
    "finish_detached": ANY_INDEX | {"key: a row less"},
}
INDICES = ("index", "positive", "order", "first")  # of rows


def damaged(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """x in ways that don't fit."""
    yield "dtype", x.to(torch.int32 if x.dtype != torch.int32 else f32)
    yield "a row less", x[:-1]
    yield "a dimension more", x[None]
    yield "on another device", x.to("meta")
    gaps = x.new_empty(*x.shape[:-1], 2 * x.shape[-1])[..., ::2]
    yield "with gaps", gaps.copy_(x)
    bare = x.clone()
    bare.untyped_storage().resize_(0)
    yield "memory taken away", bare


def bad(name: str, arguments: dict[str, Any], native: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """The arguments with one of them damaged, and what was done."""
    for argument, value in arguments.items():
        changes: list[tuple[str, Any]] = []
        if isinstance(value, Tensor):
            changes = list(damaged(value)) if value.numel() > 0 else list(damaged(value))[2:4]
            if not native:  # those in front make tensors contiguous; torch itself fails where there is no memory
                changes = [change for change in changes if change[0] not in ("with gaps", "memory taken away")]
            if argument in INDICES and value.dtype == i64 and value.numel() > 0:
                changes += [("negative", value - 1), ("too large", value + 2**40)]
        elif isinstance(value, list):
            changes = [("negative", [-n for n in value]), ("huge", [2**40] * len(value)), ("too few", value[:-1])]
        elif isinstance(value, str):
            changes = [("unknown", "nonsense")]
        elif isinstance(value, int) and not isinstance(value, bool):
            changes = [("negative", -1), ("huge", 2**62)]
        elif argument == "temperature":
            changes = [("zero", 0.0), ("infinite", float("inf"))]
        for change, damage in changes:
            what = f"{argument}: {change}"
            if what not in FREE.get(name, set()):
                yield what, {**arguments, argument: damage}


def main() -> None:
    host = sys.argv[1:] == ["host"]
    if host:
        from cases.host_cuda import kernels

        kernels()
    torch.set_num_threads(1)
    for name, (operator, arguments) in (host_calls() if host else cpu_calls()).items():
        native = host or name.startswith("native.")
        for what, call in [("right", arguments), *bad(name, arguments, native)]:
            print(f"{name}, {what}: ", end="", flush=True)
            try:
                operator(**call)
            except Exception as error:
                print(f"raised {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
            else:
                print("returned", flush=True)


if __name__ == "__main__":
    main()
